"""The report of the latest call, kept beside the store's directories so that ``semsharekv inspect --last`` can read it.

It names the caller's documents and has no text of theirs; whatever is forgotten takes it along.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.errors import StoreFileError
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.report import ReuseReport
from semsharekv_integrations.store.ownership import is_own_directory, open_private, require_plain

LAST_REPORT = "last_report.json"


class LastReport:
    """The file of one store's directory; without a directory it does nothing.

    Attributes:
        path: of the file, or None.
    """

    def __init__(self, directory: str | PathLike[str] | None, reuse: ReuseConfig) -> None:
        self.path = None if directory is None else Path(directory) / LAST_REPORT
        self._reuse = reuse

    def write(self, report: ReuseReport) -> None:
        """Replace what is there, but for texts and token ids of the prompt. Logs it if that fails."""
        if self.path is None or not is_own_directory(self.path.parent):
            return
        plain = replace(report, prompt_ids=(), substitutions=()).to_dict()
        temporary = self.path.with_name(f"{LAST_REPORT}.{os.getpid()}")
        try:
            require_plain(self.path)
            with open(open_private(temporary), "w", encoding="utf-8") as file:
                file.truncate()
                json.dump({"report": plain, "reuse": asdict(self._reuse)}, file)
            os.replace(temporary, self.path)
        except OSError as error:
            log_trouble("unwritten_report", error=type(error).__name__)

    def remove(self) -> bool:
        """Delete it, if it is there; return whether it is gone."""
        try:
            if self.path is not None:
                remove_last_report(self.path.parent)
        except OSError:
            return False
        return True


def remove_last_report(directory: Path) -> None:
    """Delete the report in a store's directory, if there is one, and what a killed writer left of another."""
    for path in directory.glob(f"{LAST_REPORT}*"):
        path.unlink(missing_ok=True)


def read_last_report(directory: Path) -> tuple[ReuseReport, ReuseConfig]:
    """Return the report of the latest call that used a store's directory, and the settings that it ran with.

    Raises:
        StoreFileError: if there is none, or it cannot be read.
    """
    path = Path(directory) / LAST_REPORT
    try:
        require_plain(path)
        told = json.loads(path.read_text(encoding="utf-8"))
        return ReuseReport.from_dict(told["report"]), ReuseConfig(**told["reuse"])
    except FileNotFoundError:
        raise StoreFileError(
            f"{directory} has no report of a call: none has ended since something was forgotten"
        ) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreFileError(f"{path} is no report of a call: {error}") from error
