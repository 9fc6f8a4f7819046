"""Scenarios: cases, each a prompt behind earlier ones that it resembles in some way.

Knows nothing about tokenizers, models or engines, or where the words of a prompt come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from semsharekv_integrations.lab.answers import Judging
from semsharekv_integrations.world import Message

_T = TypeVar("_T")


@dataclass(frozen=True)
class Query:
    """A prompt, plain text or messages, and the documents that stand in it: texts by id."""

    prompt: str | list[Message]
    documents: Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """One prompt behind others that it resembles."""

    scenario: str  # how it resembles them
    references: tuple[Query, ...]  # what is seen first
    target: Query  # what is then asked
    answer: str | None  # the right answer, or None if it is not known. Its lines may come in any order
    # what the references' documents would answer, or None if that is the same or they do not say
    stale: str | None = None
    # the facts of the right answer: what one in other words has to hold. On text its gold answers: one suffices
    values: tuple[str, ...] = ()
    stale_values: tuple[str, ...] = ()  # likewise of the stale answer
    asked: str | None = None  # id of the document that is asked about, or None if it is about several
    # the number of its group, whose cases share a full prefill of their documents, and its own within it; or None
    place: tuple[int, int] | None = None
    in_order: Query | None = None  # the target with its documents in the stored order, or None if that is none other


@dataclass(frozen=True)
class Scenario:
    """Cases that a report counts together."""

    name: str  # how their prompts resemble what was seen
    cases: Iterable[Case]  # iterated once
    total: int  # how many there are
    max_new_tokens: int = 64  # of an answer
    judging: Judging | None = None  # None for that of the study
    problem: str = ""  # why there are no cases, or nothing


def shuffle(rng: Random, documents: Sequence[_T]) -> Sequence[_T]:
    """In another order; two documents or more."""
    while (shuffled := rng.sample(documents, len(documents))) == documents:
        pass
    return shuffled
