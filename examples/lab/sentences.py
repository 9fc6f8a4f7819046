"""Documents of which only some sentences stay, as in SemShareKV's sensitivity test (arXiv 2509.24832).

The paper removes or replaces 10 to 90% of the sentences and measures ROUGE-L. Here a question is asked about a
sentence that stays, so that the right answer stands in both versions, and the stored one never gives a wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from types import MappingProxyType
from typing import Literal, get_args

from drawn import Scene, ask_about_scene, maybe_shuffle
from semsharekv_integrations import world
from semsharekv_integrations.errors import require
from semsharekv_integrations.lab.scenarios import Case
from semsharekv_integrations.world import Document, Layout

Change = Literal["removed", "replaced"]
CHANGES: tuple[Change, ...] = get_args(Change)


def sentence_cases(
    change: Change,
    share: float,
    num_cases: int,
    seed: int,
    num_documents: tuple[int, int],
    layouts: Sequence[Layout],
) -> Iterator[Case]:
    """Cases in which that share of every document's sentences is another than in the stored version.

    The documents, and what is asked, depend on seed and index alone.

    Args:
        change: what happens to the sentences.
        share: of each document's sentences, above 0 and below 1; at least one always stays.
        num_cases: how many.
        seed: of all that is drawn.
        num_documents: fewest and most documents.
        layouts: where documents may stand.

    Raises:
        ValueError: naming the argument, its value and what is accepted.
    """
    require(change in CHANGES, "change", change, " or ".join(map(repr, CHANGES)))
    require(0 < share < 1, "share", share, "above 0 and below 1")
    return (_make_case(index, change, share, seed, num_documents, layouts) for index in range(num_cases))


def _make_case(
    index: int, change: Change, share: float, seed: int, num_documents: tuple[int, int], layouts: Sequence[Layout]
) -> Case:
    rng = Random(f"sentences {seed} {index}")
    documents = world.make_documents(rng, rng.randint(*num_documents))
    place = rng.randrange(len(documents))
    kind = rng.choice(sorted(documents[place].facts))
    kept = {place: kind}
    target = [
        change_sentences(rng, document, change, share, kept.get(index)) for index, document in enumerate(documents)
    ]
    scene = Scene([documents], maybe_shuffle(rng, target))
    return ask_about_scene(rng, name_group(change, share), scene, layouts, (target[place], kind))


def name_group(change: Change, share: float) -> str:
    """What the cases of one share are called, such as ``removed 30%``."""
    return f"{change} {share:.0%}"


def change_sentences(
    rng: Random, document: Document, change: Change, share: float, kept_kind: str | None = None
) -> Document:
    """``document`` with a share of its sentences removed, or replaced by others of their kind with other values.

    Args:
        rng: draws the sentences.
        document: as it is stored.
        change: what happens to them.
        share: of the sentences, rounded to a whole number of them, one less than all at most.
        kept_kind: the kind of fact whose sentence stays, or None.
    """
    kinds = [sentence.kind for sentence in document.sentences]
    free = [place for place, kind in enumerate(kinds) if kind is None or kind != kept_kind]
    count = min(round(share * len(kinds)), len(kinds) - 1)
    chosen = set(rng.sample(free, min(count, len(free))))
    return _remove(document, chosen) if change == "removed" else _replace(rng, document, chosen)


def _remove(document: Document, places: set[int]) -> Document:
    sentences = tuple(sentence for place, sentence in enumerate(document.sentences) if place not in places)
    stated = {sentence.kind for sentence in sentences}
    return replace(document, sentences=sentences, facts=_select(document.facts, stated))


def _select(facts: Mapping[str, str], kinds: set[str | None]) -> Mapping[str, str]:
    return MappingProxyType({kind: value for kind, value in facts.items() if kind in kinds})


def _replace(rng: Random, document: Document, places: set[int]) -> Document:
    """Other words for the chosen sentences, and other values for the facts that they state."""
    others = document.sentences
    while any(others[place] == document.sentences[place] for place in places):  # filler may be drawn again
        others = world.reword(rng, document).sentences
    kinds = tuple(kind for place in sorted(places) if (kind := document.sentences[place].kind))
    edited = world.edit(rng, document, kinds) if kinds else document
    pairs = zip(document.sentences, others, strict=True)
    sentences = tuple(other if place in places else stays for place, (stays, other) in enumerate(pairs))
    return replace(edited, sentences=sentences)
