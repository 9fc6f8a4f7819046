"""The journal of a run: a file with a line for each case, written as it is done, that a later run goes on from.

The first line says what is measured on what; outcomes of other settings are never mixed in. How many cases there are
is not part of it, so a longer run goes on from a shorter one. Several processes may append, each line in one write.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from semsharekv_integrations.errors import show_value
from semsharekv_integrations.lab.figures import Failure, Outcome

Key = tuple[str, int | None]  # scenario and number of the case


@dataclass(frozen=True)
class Entry:
    """What one case gave. ``case`` is None for what failed for all cases of a scenario."""

    scenario: str
    case: int | None
    seconds: float  # that it took
    outcomes: tuple[Outcome, ...] = ()
    failures: tuple[Failure, ...] = ()

    @property
    def key(self) -> Key:
        """Which case it is about."""
        return self.scenario, self.case


_ENTRIES = TypeAdapter(Entry)


class Journal:
    """What was measured, case by case. Without a path it is kept in memory alone.

    Args:
        path: of the file, or None.
        header: what is measured on what, as JSON holds it; None to append to what another process has begun.

    Raises:
        ValueError: naming the first field in which an earlier run's header differs.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any] | None) -> None:
        self.path = path
        self._kept: dict[Key, Entry] = {}
        if path is not None and header is not None:
            self._open(path, json.loads(json.dumps(header)))

    def _open(self, path: Path, header: Mapping[str, Any]) -> None:
        """Check the header of what is there, or write it; drop a last line that a kill tore."""
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.read_bytes() if path.exists() else b""
        whole = found[: found.rfind(b"\n") + 1]
        if not whole:
            path.write_text(f"{json.dumps(header)}\n", encoding="utf-8")
            return
        try:
            earlier = dict(json.loads(whole.splitlines()[0]))
        except ValueError as error:
            raise ValueError(f"{path} is no journal of this command; accepted is another --out") from error
        for name, had, has in _list_differences(earlier, header):
            accepted = f"{show_value(has)} as in this run, or another --out, or to delete the file"
            raise ValueError(f"{name} is {show_value(had)} in {path}, of an earlier run; accepted is {accepted}")
        if whole != found:
            os.truncate(path, len(whole))

    def add(self, entry: Entry) -> None:
        """Keep an entry; what is in the file outlives this process."""
        self._kept[entry.key] = entry
        if self.path is None:
            return
        line = f"{json.dumps(asdict(entry))}\n".encode()
        with self.path.open("ab", buffering=0) as file:
            written = file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: {written} of {len(line)} bytes were written")

    def count(self) -> int:
        """How many lines there are, which costs less than to read them; without a path, how many entries."""
        return len(self._kept) if self.path is None else self.path.read_bytes().count(b"\n") - 1

    def read(self) -> list[Entry]:
        """Every entry once, in the order of cases. A line that is no entry was torn: its case counts as not done."""
        kept = dict(self._kept)
        for line in [] if self.path is None else self.path.read_bytes().splitlines()[1:]:
            try:
                entry = _ENTRIES.validate_json(line)
            except ValidationError:
                continue
            kept.setdefault(entry.key, entry)
        return sorted(kept.values(), key=lambda entry: -1 if entry.case is None else entry.case)


def _list_differences(one: Any, other: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two headers differ, by dotted name."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*other, *one]):
            yield from _list_differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name, one, other
