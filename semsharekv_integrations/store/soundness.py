"""What every field of a record may be. A catalog's digests need no key, so a right digest says nothing about values.

One table for each kind of record, asked where records come in; whether records fit together is ``store.records``'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from semsharekv_integrations.checks import check_lifetime, is_number, is_whole
from semsharekv_integrations.kv import UNPLACED
from semsharekv_integrations.store.records import EntryRecord, FileRecord, NodeRecord

_MOST_TOKENS = 2**31 - 1
_MOST_BYTES = 2**62
_LARGEST = 2.0**53  # up to which a float counts exactly
_FILE_ID = re.compile(r"[0-9a-f]{32}")  # it becomes a file's name

_Rule = Callable[[Any], bool]


def is_sound(record: FileRecord | NodeRecord | EntryRecord) -> bool:
    """Whether every field of ``record`` is of its type, and within its bounds."""
    return all(rule(getattr(record, name)) for name, rule in _RULES[type(record)].items())


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_file_id(value: object) -> bool:
    return isinstance(value, str) and _FILE_ID.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return is_whole(value, 1) and value <= _MOST_TOKENS  # type: ignore[operator]


def _is_position(value: object) -> bool:
    return is_whole(value, 0) and value <= _MOST_TOKENS  # type: ignore[operator]


def _is_place(value: object) -> bool:
    return (value == UNPLACED and is_whole(value, UNPLACED)) or _is_position(value)


def _are_token_ids(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 1 and len(value) > 0 and bool((value >= 0).all())


def _are_places(value: object) -> bool:
    return isinstance(value, Mapping) and all(_is_text(key) and _is_place(place) for key, place in value.items())


def _are_segments(value: object) -> bool:
    return isinstance(value, list) and all(_is_segment(item) for item in value)


def _is_segment(value: object) -> bool:
    if not (isinstance(value, list) and len(value) == 3):
        return False
    name, start, stop = value
    return _is_text(name) and _is_position(start) and _is_position(stop) and start <= stop


def _is_lifetime(value: object) -> bool:
    try:
        check_lifetime("expires_after_s", value)
    except ValueError:
        return False
    return True


_LABELS: dict[str, _Rule] = {
    "document_starts": _are_places,
    "segments": _are_segments,
    "session": lambda value: value is None or _is_text(value),
    "pinned": lambda value: isinstance(value, bool),
    "expires_after_s": _is_lifetime,
}
_LATER_LABELS: dict[str, _Rule] = {  # which earlier versions did not write
    "document_stops": lambda value: value is None or _are_places(value),
    "rounded": lambda value: isinstance(value, bool),
    "state": _is_text,
}


def _are_labels(value: object) -> bool:
    if not isinstance(value, Mapping) or not all(name in value and rule(value[name]) for name, rule in _LABELS.items()):
        return False
    later = all(rule(value[name]) for name, rule in _LATER_LABELS.items() if name in value)
    return later and (value.get("document_stops") or {}).keys() <= value["document_starts"].keys()


_RULES: dict[type, dict[str, _Rule]] = {
    FileRecord: {
        "id": _is_file_id,
        "num_tokens": _is_count,
        "num_bytes": lambda value: is_whole(value, 1) and value <= _MOST_BYTES,
    },
    NodeRecord: {
        "id": _is_id,
        "parent": lambda value: value is None or _is_id(value),
        "namespace": _is_text,
        "token_ids": _are_token_ids,
        "file": _is_file_id,
        "first": _is_position,
    },
    EntryRecord: {
        "id": _is_id,
        "namespace": _is_text,
        "node": _is_id,
        "labels": _are_labels,
        "hits": lambda value: is_number(value) and 0 <= value <= _LARGEST,
        "used_s": lambda value: is_number(value) and abs(value) <= _LARGEST,
    },
}
