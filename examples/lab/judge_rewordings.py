"""Count which pairs of sentences ``say_the_same`` accepts: rewordings by a language model, news pairs, edits by rule.

    PYTHONPATH=. python examples/lab/judge_rewordings.py --pairs PAIRS.tsv --half second --show

Rewordings are those that come with the package, some of which are wrong. ``--pairs`` names a file with two sentences a
line, parted by a tab, such as the Microsoft Research Paraphrase Corpus, which may not be copied. Edits change one fact
of a sentence, so that each accepted one is a fault; whether the others' acceptances are right is for a reader to judge
(``--show`` prints them). The rules were made on the first half of each source.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from time import process_time
from typing import NamedTuple, TypeVar

from semsharekv_integrations.lab.texts import read_passages
from semsharekv_integrations.reuse.sentences import say_the_same

_T = TypeVar("_T")
_NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*")
_VERBS = re.compile(r"\b(?:is|are|was|were|will|has|had|can|could|would|should|may)\b")
# Either of two takes the other's place.
COMPARISONS = (
    "more less|most least|before after|at_least at_most|rose fell|increased decreased|won lost|north south|east west"
    "|first last|highest lowest|all some|many few|only also|always often|with without|up down|and or|over under"
)
UNITS = "million billion|percent points|km miles|days years|hours minutes|dollars euros|tons pounds|$ €|year month"
DATES = (
    "January June|February July|March April|May September|October November|Monday Tuesday|Wednesday Friday"
    "|yesterday today|week month"
)


class Pair(NamedTuple):
    """Two sentences."""

    asked: str
    stored: str


def swap_words(table: str) -> Callable[[str], Iterator[str]]:
    """Return a rule that puts a word of the table in place of the other one beside it, once for each that stands."""
    swaps = [[word.replace("_", " ") for word in pair.split()] for pair in table.split("|")]

    def edit(sentence: str) -> Iterator[str]:
        for old, new in [*swaps, *(swap[::-1] for swap in swaps)]:
            found = re.search(rf"(?<!\w){re.escape(old)}(?!\w)", sentence)
            if found:
                yield sentence[: found.start()] + new + sentence[found.end() :]

    return edit


def change_number(sentence: str) -> Iterator[str]:
    """Yield the sentence with each of its numbers changed by one in its last digit."""
    for found in _NUMBER.finditer(sentence):
        last = found.end() - 1
        yield sentence[:last] + str((int(sentence[last]) + 1) % 10) + sentence[found.end() :]


def negate(sentence: str) -> Iterator[str]:
    """Yield the sentence with a negation behind its first verb, or without one that it has."""
    found = _VERBS.search(sentence)
    if found and not sentence.startswith((" not", "n't"), found.end()):
        yield f"{sentence[: found.end()]} not{sentence[found.end() :]}"
    for negation in (" not ", " no ", " never "):
        if negation in sentence:
            yield sentence.replace(negation, " ", 1)


def swap_places(pattern: re.Pattern[str], neighbours: bool = False) -> Callable[[str], Iterator[str]]:
    """Return a rule that swaps two different matches of the pattern: all pairs, or neighbours alone."""

    def edit(sentence: str) -> Iterator[str]:
        found = list(pattern.finditer(sentence))
        for one, two in pairwise(found) if neighbours else combinations(found, 2):
            if one.group() != two.group():
                between = sentence[one.end() : two.start()]
                yield sentence[: one.start()] + two.group() + between + one.group() + sentence[two.end() :]

    return edit


EDITS: dict[str, Callable[[str], Iterator[str]]] = {
    "a number is another": change_number,
    "two numbers are swapped": swap_places(_NUMBER, neighbours=True),
    "a negation is added or gone": negate,
    "two names are swapped": swap_places(_NAME),
    "a comparison or a quantifier is another": swap_words(COMPARISONS),
    "a unit is another": swap_words(UNITS),
    "a date is another": swap_words(DATES),
}


def choose_half(items: Sequence[_T], half: str) -> Sequence[_T]:
    """Return the first or the second half of the items, or all."""
    middle = len(items) // 2
    return {"first": items[:middle], "second": items[middle:], "all": items}[half]


def read_sources(pairs: Path | None, half: str) -> Iterator[tuple[str, list[Pair]]]:
    """Yield each source of pairs with its name: first those that a reader must judge, then edits."""
    passages = choose_half(read_passages(), half)
    yield "rewordings", [Pair(text, p.sentences[index]) for p in passages for index, text in p.reworded.items()]
    lines = pairs.read_text().splitlines() if pairs else []
    news = [Pair(*line.split("\t")) for line in choose_half(lines, half)]
    if news:
        yield "news pairs", news
    sentences = [*(sentence for passage in passages for sentence in passage.sentences), *(pair.asked for pair in news)]
    for name, edit in EDITS.items():
        yield name, [Pair(edited, text) for text in sentences for edited in edit(text) if edited != text]


def judge(pairs: Iterable[Pair]) -> tuple[list[Pair], float]:
    """Return the pairs that are accepted, and how many microseconds one took."""
    pairs = list(pairs)
    began = process_time()
    accepted = [pair for pair in pairs if say_the_same(*pair)]
    return accepted, 1e6 * (process_time() - began) / max(1, len(pairs))


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=Path, help="a file of two sentences a line, parted by a tab")
    parser.add_argument("--half", choices=("first", "second", "all"), default="all", help="of each source")
    parser.add_argument("--show", action="store_true", help="print every accepted pair")
    return parser.parse_args()


def main() -> None:
    """Print how many pairs of each source are accepted."""
    arguments = parse_arguments()
    print("| source | pairs | accepted | share | microseconds a pair |\n|---|---|---|---|---|")
    shown: list[Pair] = []
    for name, pairs in read_sources(arguments.pairs, arguments.half):
        accepted, cost = judge(pairs)
        print(f"| {name} | {len(pairs)} | {len(accepted)} | {len(accepted) / max(1, len(pairs)):.3f} | {cost:.0f} |")
        shown += accepted
    if arguments.show:
        print("\n".join(f"\n{pair.asked}\n{pair.stored}" for pair in shown))


if __name__ == "__main__":
    main()
