"""Compare an engine's answers with transformers' own, mode by mode, on prompts shorter and longer than every window.

Answers are greedy, of words that mean nothing. Tokens that ``generate`` itself holds for as good as equally likely may
stand for each other, since rounding decides between them; nothing behind them is compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from random import Random
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from semsharekv_integrations import EngineConfig, Generation, ReuseConfig, SemShareEngine, UnsupportedModelError
from shapes import UNGUARDED

MODES = ("off", "exact", "identical")
LENGTHS = (7, 40, 120)  # words of prompts: windows and chunks are 9 to 18
SHARED = 5 / 6  # of a prompt, that another begins with
NEW_TOKENS = 10
SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")  # the first ids
RESERVED = 10  # last ids, which stand for images and the like
ROUNDING = 1e-3  # of the spread of scores
MOST_CHARS = 240  # of a reason
REUSED, EQUAL, DIFFERS, REFUSED, CRASHED, FELL_BACK = "reused", "equal", "differs", "refused", "crashed", "fell back"
NOT_RUN = "could not be run"  # by transformers itself


@dataclass(frozen=True)
class Finding:
    """What came of a mode, why if it was not fine, and the tokens reused by prompt."""

    mode: str
    status: str
    why: str = ""
    reused_tokens: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """What ``generate`` gives: tokens [N] and the scores [N, V] that they were chosen by."""

    tokens: list[int]
    scores: Tensor

    def find_difference(self, tokens: list[int]) -> int | None:
        """Where ``tokens`` leave this answer for one that is clearly less likely; None if they do not."""
        pairs = zip(self.tokens, tokens, strict=False)
        first = next((index for index, (own, other) in enumerate(pairs) if own != other), None)
        if first is None:
            return None if len(tokens) == len(self.tokens) else min(len(tokens), len(self.tokens))
        scores = self.scores[first]
        spread = scores[scores.isfinite()].std()
        gap = scores[self.tokens[first]] - scores[tokens[first]]
        return None if gap <= ROUNDING * spread else first


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """A tokenizer of so many made-up words."""
    special = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL_TOKENS, strict=True))
    words = [*SPECIAL_TOKENS, *(f"w{index}" for index in range(len(SPECIAL_TOKENS), vocabulary))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[-1]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_prompts(vocabulary: int, seed: int = 5) -> dict[str, str]:
    """Prompts by name: of each length one, one that begins like it, and one that goes on; documents in two orders."""
    random = Random(seed)

    def write(words: int) -> list[str]:
        return [f"w{random.randrange(len(SPECIAL_TOKENS), vocabulary - RESERVED)}" for _ in range(words)]

    prompts = {}
    for length in LENGTHS:
        first = write(length)
        prompts[f"{length} first"] = " ".join(first)
        prompts[f"{length} branch"] = " ".join([*first[: int(SHARED * length)], *write(length // 4)])
        prompts[f"{length} longer"] = " ".join([*first, *write(9)])
    one, two, three = (" ".join(write(LENGTHS[1])) for _ in range(3))
    asked, otherwise = (" ".join(write(10)) for _ in range(2))
    prompts["documents"] = f"{one} {two} {three} {asked}"
    prompts["asked otherwise"] = f"{one} {two} {three} {otherwise}"
    prompts["moved"] = f"{three} {one} {two} {asked}"
    return prompts


def list_documents(prompts: Mapping[str, str]) -> dict[str, str]:
    """The documents that two of the prompts have, by id."""
    words = prompts["documents"].split()
    size = LENGTHS[1]
    return {f"d{index}": " ".join(words[index * size : (index + 1) * size]) for index in range(3)}


def list_moved(prompts: Mapping[str, str]) -> dict[str, str]:
    """The same documents in every other order, each with another question."""
    texts, words = list(list_documents(prompts).values()), prompts["documents"].split()
    question = words[len(texts) * LENGTHS[1] :]
    orders = enumerate(permutations(texts))
    return {
        f"order {place}": " ".join([*order, *question[place:], *question[:place]]) for place, order in orders if place
    }


def check_model(
    model: PreTrainedModel, vocabulary: int, single_layers: Iterable[PreTrainedModel] = ()
) -> Iterator[Finding]:
    """Try every mode; a single finding if transformers cannot run the model.

    ``single_layers`` are models of the same type with one layer each. A layer's KV depends on a token and its place
    alone if there is none below, so in these it is the same wherever the token is moved from.
    """
    tokenizer, prompts = make_tokenizer(vocabulary), write_prompts(vocabulary)
    try:  # before any engine touches the model
        answers = {name: generate(model, tokenizer, prompt) for name, prompt in prompts.items()}
        finite = all(answer.scores.isfinite().any(1).all() for answer in answers.values())
    except Exception as error:
        yield Finding("off", NOT_RUN, describe(error))
        return
    if not finite:
        yield Finding("off", NOT_RUN, "its scores are no numbers")
        return
    subject = _Subject(model, tokenizer, prompts, answers)
    for mode in MODES:
        try:
            found = _CHECKS[mode](subject)
            moves = mode == "identical" and found.status != DIFFERS
            yield _check_moved(found, single_layers, tokenizer, prompts) if moves else found
        except UnsupportedModelError as error:
            yield Finding(mode, REFUSED, describe(error))
        except Exception as error:
            yield Finding(mode, CRASHED, describe(error))


def describe(error: BaseException) -> str:
    """An error in one line; the kind is told where it is not ours."""
    text = " ".join(str(error).split())[:MOST_CHARS]
    return text if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {text}"


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Answer:
    """What transformers answers."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    return Answer(found.sequences[0, ids.shape[1] :].tolist(), torch.cat(found.scores).float())


class _Subject(NamedTuple):
    """A model, and what ``generate`` answers to prompts, by name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[str, str]
    answers: Mapping[str, Answer]

    def compare(self, **rules: Any) -> _Comparison:
        """A comparison of an engine that reuses by ``rules``."""
        return _Comparison(_make_engine(self.model, self.tokenizer, **rules), self.prompts, self.answers)


class _Comparison:
    """Answers of an engine beside those of ``generate``: which differ, and what was reused."""

    def __init__(self, engine: SemShareEngine, prompts: Mapping[str, str], answers: Mapping[str, Answer]) -> None:
        self._engine, self._prompts, self._answers = engine, prompts, answers
        self.differences: list[str] = []
        self.reused_tokens: dict[str, int] = {}

    def ask(self, name: str, *, again: bool = False, **options: Any) -> Generation:
        """Answer the prompt of that name, and compare."""
        found = self._engine.generate(self._prompts[name], max_new_tokens=NEW_TOKENS, **options)
        label = f"{name} again" if again else name
        self.reused_tokens[label] = found.report.reused_tokens
        place = self._answers[name].find_difference(found.token_ids)
        if place is not None:
            self.differences.append(f"{label} from token {place} on ({found.report.reused_tokens} reused)")
        return found


def _check_off(subject: _Subject) -> Finding:
    compared = subject.compare(mode="off")
    for length in LENGTHS:
        compared.ask(f"{length} first")
    return Finding("off", DIFFERS if compared.differences else EQUAL, "; ".join(compared.differences))


def _check_exact(subject: _Subject) -> Finding:
    compared = subject.compare(mode="exact")
    for length in LENGTHS:
        for name in ("first", "branch", "longer"):
            compared.ask(f"{length} {name}")
        compared.ask(f"{length} first", again=True)
    for name in ("documents", "asked otherwise"):
        compared.ask(name, documents=list_documents(subject.prompts))
    reused = compared.reused_tokens
    if compared.differences:
        return Finding("exact", DIFFERS, "; ".join(compared.differences), reused)
    if reused[f"{LENGTHS[-1]} branch"]:
        return Finding("exact", REUSED, reused_tokens=reused)
    if reused["asked otherwise"]:
        return Finding("exact", REUSED, "behind documents and whole prompts", reused)
    whole = any(reused.values())
    return Finding("exact", REUSED if whole else EQUAL, "behind whole prompts alone" if whole else "", reused)


def _check_identical(subject: _Subject) -> Finding:
    """All computed again must give ``generate``'s answer; the mode's own share must reuse."""
    documents = list_documents(subject.prompts)
    compared = subject.compare(mode="identical", budget=1.0, max_compute_ratio=1.0)
    for name in ("documents", "moved"):
        compared.ask(name, documents=documents)
    if compared.differences:
        return Finding("identical", DIFFERS, f"all computed again: {'; '.join(compared.differences)}")
    usual = _make_engine(subject.model, subject.tokenizer, mode="identical")
    for name in ("documents", "moved"):
        report = usual.generate(subject.prompts[name], documents=documents, max_new_tokens=NEW_TOKENS).report
    reused = {"moved": report.identical_tokens}
    if report.identical_tokens and report.declined is None:
        return Finding("identical", REUSED, reused_tokens=reused)
    return Finding("identical", FELL_BACK, report.declined or "nothing was reused", reused)


def _check_moved(
    found: Finding,
    single_layers: Iterable[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, str],
) -> Finding:
    """``found``, unless moved KV that nothing is computed again of gives another answer in one of the layers."""
    compared_layers = 0
    for model in single_layers:
        asked = list_moved(prompts)
        answers = {name: generate(model, tokenizer, prompt) for name, prompt in asked.items()}
        engine = _make_engine(model, tokenizer, mode="identical", budget=0.0, max_deviation=UNGUARDED)
        compared = _Comparison(engine, asked, answers)
        engine.generate(prompts["documents"], documents=list_documents(prompts), max_new_tokens=1)
        moved = [compared.ask(name, documents=list_documents(prompts)).report.identical_tokens for name in asked]
        compared_layers += all(moved)
        if compared.differences:
            kind = ", ".join(
                getattr(engine.model.config.get_text_config(decoder=True), "layer_types", None) or ["layer"]
            )
            return replace(found, status=DIFFERS, why=f"a single {kind}: {'; '.join(compared.differences)}")
    unseen = "no single layer could be compared"
    return found if compared_layers else replace(found, why="; ".join(filter(None, (found.why, unseen))))


def _make_engine(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **rules: Any) -> SemShareEngine:
    return SemShareEngine(model, tokenizer, EngineConfig(reuse=ReuseConfig(**rules)))


_CHECKS = {"off": _check_off, "exact": _check_exact, "identical": _check_identical}
