"""Structured logs, and who else is told of finished calls.

Records carry numbers and names from closed lists: no prompt, answer, namespace, session or document id gets into them.
The package's logger has no handler but a ``NullHandler``: where records go is up to the application. Knows nothing
about engines and stores, which log through it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime

from semsharekv_integrations.errors import is_number, require
from semsharekv_integrations.report import ReuseReport

LOGGER = logging.getLogger("semsharekv_integrations")
LOGGER.addHandler(logging.NullHandler())

CALL_FIELDS = (
    "mode",
    "prompt_tokens",
    "prefix_tokens",
    "identical_tokens",
    "fuzzy_tokens",
    "recomputed_tokens",
    "compute_ratio",
    "ttft_s",
    "decode_s",
    "output_tokens",
    "drafted_tokens",
    "accepted_tokens",
    "kv_bytes",
)
# How the reasons in ``ReuseReport.declined`` begin, and the kind that stands for each.
DECLINED_KINDS = {
    "audit suspended reuse": "suspended",
    "beyond": "too_long",
    "no stored prefix": "no_prefix",
    "longest stored prefix": "short_prefix",
    "stored prefix of": "one_by_one",
    "nothing similar enough": "nothing_similar",
    "predicted to compute": "too_costly",
    "deviation of": "deviation",
}
WITHHELD = "withheld"
_IDENTIFIER = re.compile(r"[A-Za-z0-9_.<>]{1,80}")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}  # what every record has


def classify_declined(declined: str | None) -> str | None:
    """Return the kind of a report's reason: None for None, ``other`` for one that is not listed."""
    if declined is None:
        return None
    return next((kind for start, kind in DECLINED_KINDS.items() if declined.startswith(start)), "other")


def log_call(report: ReuseReport) -> None:
    """Log one INFO record "generated" with the mode and the numbers of a finished call."""
    if LOGGER.isEnabledFor(logging.INFO):
        fields = {name: getattr(report, name) for name in CALL_FIELDS}
        LOGGER.info("generated", extra={**fields, "declined": classify_declined(report.declined)})


def log_trouble(event: str, **fields: float | str) -> None:
    """Log one WARNING record for trouble that was dealt with, such as a damaged file.

    Args:
        event: what happened, as an identifier; the record's message.
        fields: finite numbers, and identifiers such as an error's type; never what a caller gave, nor a path. Any other
            value is withheld, and a name that every record has gets an underscore.
    """
    extra = {f"{name}_" if name in _STANDARD else name: _show(value) for name, value in fields.items()}
    LOGGER.warning(_show(event), extra=extra)


def _show(value: float | str) -> float | str:
    identifies = isinstance(value, str) and _IDENTIFIER.fullmatch(value)
    return value if identifies or is_number(value) else WITHHELD


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object: timestamp (UTC), level, logger, message and the extra fields.

    Tracebacks are left out, as they may hold text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON; what JSON does not know is written as its ``str``."""
        line = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD | line.keys()}
        return json.dumps({**line, **extra}, default=str)


class Observers:
    """Callbacks for finished calls. If one raises, the others are still called, and the error is logged once."""

    def __init__(self, *callbacks: Callable[[ReuseReport], None]) -> None:
        self._callbacks = list(callbacks)
        self._failed: set[str] = set()

    def add(self, callback: Callable[[ReuseReport], None]) -> None:
        """Call ``callback`` from the next report on. Raises ``ValueError`` if it cannot be called."""
        require(callable(callback), "callback", callback, "a function of one report")
        self._callbacks.append(callback)

    def tell(self, report: ReuseReport) -> None:
        """Call every callback, in the order in which they were added. Does not raise their errors.

        Logs an error's type, once for each name of a callback; its text may quote the report's document ids.
        """
        for callback in tuple(self._callbacks):
            try:
                callback(report)
            except Exception as error:
                name = _name_of(callback)
                if name not in self._failed:
                    self._failed.add(name)
                    log_trouble("failed_observer", observer=name[-80:], error=type(error).__name__)


def _name_of(callback: Callable[[ReuseReport], None]) -> str:
    """Return module and name of a function, or of the type of any other callable."""
    named = callback if hasattr(callback, "__qualname__") else type(callback)
    return f"{named.__module__}.{named.__qualname__}"
