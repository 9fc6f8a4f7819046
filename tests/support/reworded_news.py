"""News whose sentences come in two wordings, and a judge that knows which of them say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

STORED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "flood": (
            "A flood hit the old town of Prorna in May , and water stood in many streets for days .",
            "The mayor said that many people were affected and that help was on the way .",
            "Repairs to the town hall will take a year , as the council told reporters .",
        ),
        "fire": (
            "The report from Velmar names a fire at the bridge as the cause of the long delay .",
            "It was closed on Monday for repairs , and trains to the city had to wait there .",
            "Nobody was hurt in it , but the costs have risen since June by a good deal .",
        ),
        "vote": (
            "Reporters said that the council of Dunvik will vote on a new school in the autumn .",
            "The company that is to build it comes from the north of the country , they said .",
            "Many families have asked for it since the old one was closed two years ago .",
        ),
    }
)
OTHER_WORDS: Mapping[str, str] = MappingProxyType(
    {
        STORED["flood"][1]: "Help was on the way to the many people affected , according to the mayor .",
        STORED["fire"][1]: "Trains to the city had to wait there , as repairs on Monday meant that it was shut .",
        STORED["vote"][1]: "They said that a company from the north of the country is to be its builder .",
    }
)
QUESTION = "When will the council of Dunvik vote on a new school ?"  # about "vote"


def join_stored() -> dict[str, str]:
    """Texts by id, as they are stored first."""
    return {key: " ".join(sentences) for key, sentences in STORED.items()}


def join_reworded(*keys: str) -> dict[str, str]:
    """The same, with the middle sentence of each of ``keys`` in other words (default: of all)."""
    return {
        key: " ".join(OTHER_WORDS.get(each, each) if key in (keys or STORED) else each for each in sentences)
        for key, sentences in STORED.items()
    }


def say_the_same(asked: str, stored: str) -> bool:
    """Return whether the one is the other in other words."""
    return OTHER_WORDS.get(stored) == asked or OTHER_WORDS.get(asked) == stored


def ask(texts: Mapping[str, str], *said: str, start: str = "Answer in one line .") -> list[dict[str, Any]]:
    """A system line, the documents with the first of ``said``, and what was said then."""
    first, *more = said or (QUESTION,)
    contents = ["\n\n".join([*texts.values(), first]), *more]
    turns = [{"role": role, "content": content} for role, content in zip(_ROLES, contents, strict=False)]
    return [{"role": "system", "content": start}, *turns]


_ROLES: Sequence[str] = ("user", "assistant") * 8
