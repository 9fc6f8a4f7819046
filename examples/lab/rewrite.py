"""Rewrite sentences by a local model, as SemShareKV's targets are made (arXiv 2509.24832), and check them by rules.

    PYTHONPATH=. python examples/lab/rewrite.py xquad --model FOLDER --out reworded.json
    PYTHONPATH=. python examples/lab/rewrite.py dialogues --data dialogues.json --texts 40 --model FOLDER --out out.json

``xquad`` takes the sentences of the shipped paragraphs that have no rewording; ``dialogues`` the turns of dialogues in
a file, whose speakers' tags stay. A rewriting counts if it has the same numbers, names and negations as its source, is
not the source, shares some words with it, and is about as long. The first try is greedy, later ones are drawn by seed.
What no try gives keeps its source. So do, in texts that would come out more than 10% longer or shorter in the model's
tokens, the sentences that change the length most. Rules see no meaning: read a sample before relying on it.
Every batch is appended to a .jsonl beside ``--out`` when it is done; a later run goes on behind them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, LogitsProcessorList

from semsharekv_integrations.lab.texts import read_passages
from semsharekv_integrations.reuse.facts import FUNCTION_WORDS, NEGATIONS, find_guarded_tokens

FEWEST_WORDS = 4  # of what is rewritten: in less there is nothing to say otherwise
MOST_LONGER = 0.1  # of a whole text, in tokens, as in the paper
SENTENCE_LONGER, SENTENCE_WORDS = 0.35, 3  # of one sentence, in words: the larger of the two
LEAST_SHARED, MOST_SHARED = 0.35, 0.92  # how alike in words the two must and may be
TEMPERATURE, TOP_P = 0.7, 0.95  # behind the first try
MOST_COPIED = (3, 2)  # source tokens in a row that are free, at the first try and at later ones
COPY_PENALTY = (4.0, 5.0)  # taken off the logit of one more, likewise
SYSTEM = (
    "You rewrite what the user says in other words. Keep the meaning, every name and every number exactly as they are, "
    "and about the same length. Reply with the rewritten text alone. Never answer it."
)
EXAMPLES = (
    (
        "The bridge over the Avon was closed for 3 weeks in 1968 because its northern pier had sunk.",
        "In 1968 the bridge across the Avon stayed shut for 3 weeks, since its northern pier had subsided.",
    ),
    (
        "I don't think we can finish the report before Friday. Could you ask Sarah to help us?",
        "I don't believe the report can be done before Friday. Would you ask Sarah for some help?",
    ),
    (
        "Most visitors arrive by train, although a ferry from Dover also serves the island.",
        "While a ferry from Dover serves the island too, most visitors come by train.",
    ),
)
_WORD = re.compile(r"\s*\S+")
_EDGES = " \t\n.,;:!?\"'()[]{}“”‘’«»…"
_STOP = re.compile(r"[.!?:…][\"')\]”’]*\s*$")
_NEGATED = re.compile(r"(?:n['’]t|^cannot)$")


class Part(NamedTuple):
    """A sentence or turn to rewrite: the text it stands in, its place there, and a tag that stays before it."""

    text: str
    place: int
    source: str
    tag: str = ""

    @property
    def key(self) -> str:
        """Names it in files."""
        return f"{self.text}:{self.place}"


class NameBook:
    """Which words are names, by how ``texts`` write them within sentences."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._written = {True: Counter[str](), False: Counter[str]()}  # with a capital, and without
        for text in texts:
            for word, opens in split_words(text):
                if not opens:
                    self._written[word != word.lower()][word.lower()] += 1

    def is_ordinary(self, word: str) -> bool:
        """Whether a word that opens a sentence is no name. What no text has within a sentence counts as one."""
        lower = word.lower()
        return lower in FUNCTION_WORDS or self._written[False][lower] > self._written[True][lower]

    def list_facts(self, text: str) -> Counter[str]:
        """Numbers, names and negations in a text, each as often as it stands there."""
        pieces = _WORD.findall(text)
        facts: Counter[str] = Counter()
        for (word, opens), is_guarded in zip(split_words(text), find_guarded_tokens(pieces), strict=True):
            stem = re.split(r"['’]", word)[0].lower()
            if word.lower() in NEGATIONS or _NEGATED.search(word.lower()):
                facts["not"] += 1
            elif is_guarded and not (opens and self.is_ordinary(word)) and stem not in FUNCTION_WORDS:
                facts[re.sub(r"['’]s$", "", word).lower()] += 1
        return facts

    def find_fault(self, source: str, rewritten: str) -> str | None:
        """Why a rewriting does not count, or None."""
        before, after = ([word.lower() for word, _ in split_words(text)] for text in (source, rewritten))
        if before == after:
            return "as it was"
        if abs(len(after) - len(before)) > max(SENTENCE_WORDS, SENTENCE_LONGER * len(before)):
            return "length"
        if not LEAST_SHARED <= SequenceMatcher(None, before, after, autojunk=False).ratio() <= MOST_SHARED:
            return "words"
        return None if self.list_facts(source) == self.list_facts(rewritten) else "facts"


def split_words(text: str) -> list[tuple[str, bool]]:
    """Every word without the punctuation around it, and whether it opens a sentence."""
    pieces = _WORD.findall(text)
    opens = [True, *(bool(_STOP.search(piece)) for piece in pieces[:-1])]
    return [(piece.strip(_EDGES), first) for piece, first in zip(pieces, opens, strict=False)]


def read_shipped() -> list[Part]:
    """The sentences of the shipped paragraphs that have no rewording."""
    return [
        Part(passage.id, place, sentence)
        for passage in read_passages()
        for place, sentence in enumerate(passage.sentences)
        if place not in passage.reworded
    ]


def read_rest() -> dict[str, str]:
    """The other sentences of the shipped paragraphs."""
    return {p.id: " ".join(p.sentences[place] for place in sorted(p.reworded)) for p in read_passages()}


def read_turns(path: Path, most: int) -> list[Part]:
    """The turns of the first ``most`` dialogues of a file; they are named by number, from 0 on."""
    found = json.loads(path.read_text(encoding="utf-8"))[:most]
    return [
        Part(f"dialogue {number}", place, match[2], match[1])
        for number, each in enumerate(found)
        for place, turn in enumerate(each["dialogue"].split("\n"))
        if (match := re.fullmatch(r"(#[^#]+#:\s*|)(.*)", turn))
    ]


def fit_lengths(
    texts: Mapping[str, Sequence[tuple[int, int]]], rest: Mapping[str, int], most: float = MOST_LONGER
) -> dict[str, set[int]]:
    """Which parts of each text keep their source, so that no text is more than ``most`` longer or shorter.

    ``texts`` holds for each part of a text how many tokens it had, and has now; ``rest`` how many tokens a text has
    outside of these parts, where it has any.
    """
    kept: dict[str, set[int]] = {}
    for name, parts in texts.items():
        total, kept[name] = rest.get(name, 0) + sum(before for before, _ in parts), set()
        changes = {place: after - before for place, (before, after) in enumerate(parts)}
        while abs(off := sum(changes.values())) > most * total:
            worst = max(changes, key=lambda place: changes[place] * (1 if off > 0 else -1))
            kept[name].add(worst)
            changes[worst] = 0
    return kept


class CopyPenalty(LogitsProcessor):
    """Makes it less likely to go on copying the source behind some tokens of it, but for its facts.

    Small models copy most sentences otherwise.

    Args:
        sources: for each row the tokens of its source, and which of them state a fact.
        start: how many tokens of each row are its prompt.
        free: how many copied tokens in a row are free.
        penalty: what is taken off the logit of one more.
    """

    def __init__(
        self, sources: Sequence[tuple[Sequence[int], Sequence[bool]]], start: int, free: int, penalty: float
    ) -> None:
        self._start, self._free, self._penalty = start, free, penalty
        self._next: list[dict[tuple[int, ...], set[int]]] = []
        for ids, facts in sources:
            found: dict[tuple[int, ...], set[int]] = {}
            for place in range(free, len(ids)):
                if not facts[place]:
                    found.setdefault(tuple(ids[place - free : place]), set()).add(ids[place])
            self._next.append(found)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the logits [B, V] of the next tokens."""
        changed = scores.clone()
        for row, found in enumerate(self._next):
            said = input_ids[row, self._start :].tolist()
            for token_id in found.get(tuple(said[-self._free :]), ()):
                changed[row, token_id] -= self._penalty
        return changed


class Rewriter:
    """A model that rewrites in batches; what is the same before every sentence is computed once."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        said = [message for asked, answer in EXAMPLES for message in _make_turns(asked, answer)]
        self._before = [{"role": "system", "content": SYSTEM}, *said]
        one, other = (self._render(text) for text in ("A", "B"))
        shared = next(place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
        self._prefix = one[:shared]
        self._cache = DynamicCache()
        with torch.inference_mode():
            self.model(torch.tensor([self._prefix]), cache=self._cache)

    def count_tokens(self, text: str) -> int:
        """Length of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def _render(self, text: str) -> list[int]:
        messages = [*self._before, {"role": "user", "content": text}]
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        return list(ids)

    def _mark_facts(self, source: str) -> tuple[list[int], list[bool]]:
        """A text's tokens, and which of them are of a number, a name or a negation."""
        ids = self.tokenizer.encode(source, add_special_tokens=False)
        return ids, find_guarded_tokens([self.tokenizer.decode([token_id]) for token_id in ids]).tolist()

    @torch.inference_mode()
    def rewrite(self, sources: Sequence[str], seed: str | None) -> list[str]:
        """One rewriting of each text; greedy without a seed."""
        prompts = [self._render(source)[len(self._prefix) :] for source in sources]
        width, pad = max(map(len, prompts)), self.tokenizer.pad_token_id or self.tokenizer.eos_token_id
        ids = torch.tensor([[*self._prefix, *[pad] * (width - len(own)), *own] for own in prompts])
        mask = torch.ones_like(ids)
        for row, own in zip(mask, prompts, strict=True):
            row[len(self._prefix) : len(self._prefix) + width - len(own)] = 0
        past = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in self._cache.layers])
        past.batch_repeat_interleave(len(sources))
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if seed is not None:
            torch.manual_seed(random.Random(seed).getrandbits(32))
            sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
        longest = max(self.count_tokens(source) for source in sources)
        copying = CopyPenalty(
            [self._mark_facts(source) for source in sources],
            ids.shape[1],
            MOST_COPIED[seed is not None],
            COPY_PENALTY[seed is not None],
        )
        said = self.model.generate(
            ids,
            logits_processor=LogitsProcessorList([copying]),
            attention_mask=mask,
            cache=past,
            max_new_tokens=round(1.3 * longest) + 4,
            pad_token_id=pad,
            **sampling,
        )
        return [clean(text) for text in self.tokenizer.batch_decode(said[:, ids.shape[1] :], skip_special_tokens=True)]


def _make_turns(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def clean(said: str) -> str:
    """The first line of an answer, without quotes around it."""
    line = next((line.strip() for line in said.splitlines() if line.strip()), "")
    return line[1:-1].strip() if len(line) > 1 and line[0] in '"“' and line[-1] in '"”' else line


def run_rounds(
    rewriter: Rewriter, parts: Sequence[Part], book: NameBook, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Yield every try of every part, done before or now; a part is tried again until a rewriting counts."""
    journal = args.out.with_suffix(".jsonl")
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    known = {(found["round"], found["key"]): found for line in lines if (found := _read_line(line))}
    waiting = sorted(parts, key=lambda part: len(part.source))  # so that those of a batch are about as long
    for turn in range(args.tries):
        for start in range(0, len(waiting), args.batch):
            batch = waiting[start : start + args.batch]
            if any((turn, part.key) not in known for part in batch):
                seed = f"{args.seed} {turn} {batch[0].key}" if turn else None
                said = rewriter.rewrite([part.source for part in batch], seed)
                found = [
                    {"round": turn, "key": part.key, "said": text, "fault": book.find_fault(part.source, text)}
                    for part, text in zip(batch, said, strict=True)
                ]
                with journal.open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(each)}\n" for each in found)
                known.update({(turn, each["key"]): each for each in found})
            yield from (known[turn, part.key] for part in batch)
        waiting = [part for part in waiting if known[turn, part.key]["fault"] is not None]


def _read_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # cut by a kill
        return None


def collect(
    parts: Sequence[Part],
    tries: Iterable[Mapping[str, Any]],
    count_tokens: Callable[[str], int],
    rest: Mapping[str, str],
) -> dict[str, Any]:
    """Every part with its rewriting, or None where it keeps its source; and how often which rule was broken.

    ``rest`` is what else stands in a text.
    """
    tries = list(tries)
    found = {each["key"]: each for each in tries if each["fault"] is None}
    by_text: dict[str, list[Part]] = {}
    for part in parts:
        by_text.setdefault(part.text, []).append(part)
    lengths = {
        name: [(count_tokens(p.source), count_tokens(found.get(p.key, {"said": p.source})["said"])) for p in own]
        for name, own in by_text.items()
    }
    kept = fit_lengths(lengths, {name: count_tokens(text) for name, text in rest.items()})
    dropped = {by_text[name][place].key for name, places in kept.items() for place in places}
    rows = [
        {
            **part._asdict(),
            "rewritten": found[part.key]["said"] if part.key in found and part.key not in dropped else None,
            "round": found[part.key]["round"] if part.key in found else None,
        }
        for part in parts
    ]
    faults = Counter(each["fault"] for each in tries if each["fault"])
    counts = {
        "parts": len(parts),
        "short": sum(len(part.source.split()) < FEWEST_WORDS for part in parts),
        "rewritten": sum(row["rewritten"] is not None for row in rows),
        "dropped_for_length": len(dropped),
        "tries": len(tries),
        "faults": dict(faults),
    }
    return {"counts": counts, "parts": rows}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("xquad", "dialogues"))
    parser.add_argument("--model", required=True, help="a folder or hub id")
    parser.add_argument("--data", type=Path, help="of dialogues: a JSON list of objects with a field dialogue")
    parser.add_argument("--texts", type=int, default=40, help="how many dialogues")
    parser.add_argument("--tries", type=int, default=5, help="of one sentence, at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON; with a .jsonl beside it")
    found = parser.parse_args(arguments)
    if (found.what == "dialogues") != (found.data is not None):
        parser.error("--data goes with dialogues, and only with them")
    return found


def main() -> None:
    """Rewrite what is not done yet, and write all."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    parts = read_shipped() if args.what == "xquad" else read_turns(args.data, args.texts)
    book = NameBook([*(part.source for part in parts), *(text for p in read_passages() for text in p.sentences)])
    rewriter = Rewriter(args.model)
    long = [part for part in parts if len(part.source.split()) >= FEWEST_WORDS]
    rest = read_rest() if args.what == "xquad" else {}
    found = collect(parts, run_rounds(rewriter, long, book, args), rewriter.count_tokens, rest)
    about = {"model": Path(args.model).name, "seed": args.seed, "tries": args.tries, "batch": args.batch}
    args.out.write_text(json.dumps({**about, **found}, indent=1, ensure_ascii=False), encoding="utf-8")
    print(json.dumps(found["counts"]))


if __name__ == "__main__":
    main()
