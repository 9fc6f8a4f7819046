"""Quality: every case of a workload under every policy, beside a full prefill of the same prompt.

What a case's references leave in the store is computed once, without reuse off the prefix, and given to every policy.
Answers are generated greedily. See ``lab.metrics`` for the figures that are made of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.checks import require
from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.kv import Generation, Reference
from semsharekv_integrations.lab.policies import FULL, Corrupt
from semsharekv_integrations.lab.prompts import right_share
from semsharekv_integrations.lab.rouge import rouge_l
from semsharekv_integrations.lab.workloads import Case
from semsharekv_integrations.modes import Mode

Judging = Literal["exact", "mentions"]
JUDGINGS: tuple[Judging, ...] = get_args(Judging)
NAMESPACE = "quality"
EXTRA_TOKENS = 4  # generated at most beyond those of the right answer
FREE_TOKENS = 64  # generated at most where the answer may be in any words, or is not known
_FILLER = EngineConfig(  # stores every prompt, and computes each in full
    reuse=ReuseConfig(mode="exact", min_prefix_tokens=2**31), store=StoreConfig(max_bytes=2**62)
)


@dataclass(frozen=True)
class Outcome:
    """One case under one policy.

    Attributes:
        workload: of the case.
        policy: what ran.
        mode: the mode it ran in.
        case: index within the workload.
        num_documents: in the target.
        prompt_tokens: of the target.
        text: what was generated.
        right: whether that is the right answer; None if that is not known.
        agrees: whether it is what a full prefill gives.
        stale: whether it is what the references' documents would answer; None if they say nothing else.
        fired: whether KV was reused off the exact prefix.
        reused_tokens: prompt tokens whose KV was not computed.
        compute_ratio: token-layers computed over tokens times layers, 0 to 1.
        ttft_s: seconds to the first new token.
        declined: why nothing was reused, or None.
        kv_kept_ratio: bytes of the prompt's KV that decoding had, over all of them, 0 to 1.
        rouge_l: of a summary to the right one, 0 to 1; None for other answers.
        rouge_l_to_full: of a summary to what a full prefill gives, likewise.
        similarity: of the document asked about to its stored version, -1 to 1, where a sweep measures it.
        lsh_recall: share of the tokens that hashing matches as well as comparing all of them, likewise.
    """

    workload: str
    policy: str
    mode: Mode
    case: int
    num_documents: int
    prompt_tokens: int
    text: str
    right: bool | None
    agrees: bool
    stale: bool | None
    fired: bool
    reused_tokens: int
    compute_ratio: float
    ttft_s: float
    declined: str | None
    kv_kept_ratio: float = 1.0
    rouge_l: float | None = None
    rouge_l_to_full: float | None = None
    similarity: float | None = None
    lsh_recall: float | None = None


class Bench:
    """One engine for each policy, all on the same weights.

    Args:
        model: any loaded transformers model.
        tokenizer: its tokenizer.
        configs: settings by policy; a full prefill named ``off`` is added if there is none.
        corrupt: what is done to the stored references of a policy, by its name.
        judging: whether the right answer is ``exact``, in the words of the case, or ``mentions`` its facts, in any
            words and spelling, as a model answers that was not trained on these words.
        max_new_tokens: of an answer; None for a few more than the right one has, or, where it may be in any words or
            is not known, for 64.

    Raises:
        ValueError: if ``off`` is no full prefill, or ``corrupt`` names no policy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        configs: Mapping[str, EngineConfig],
        corrupt: Mapping[str, Corrupt] | None = None,
        *,
        judging: Judging = "exact",
        max_new_tokens: int | None = None,
    ) -> None:
        self.judging = judging
        self._max_new_tokens = max_new_tokens
        configs = {FULL: EngineConfig(reuse=ReuseConfig(mode="off")), **configs}
        self.corrupt = dict(corrupt or {})
        unknown = sorted(self.corrupt.keys() - configs.keys())
        require(configs[FULL].reuse.mode == "off", f"configs[{FULL!r}].reuse.mode", configs[FULL].reuse.mode, "'off'")
        require(not unknown, "corrupt", ", ".join(unknown), f"policies of this run: {', '.join(configs)}")
        self.engines = {name: SemShareEngine(model, tokenizer, config) for name, config in configs.items()}
        self.filler = SemShareEngine(model, tokenizer, _FILLER)
        for engine in self.engines.values():
            engine.generate("Warm up.", max_new_tokens=2)  # so that no timing holds one-time costs
            engine.clear()

    def outcomes(self, index: int, case: Case) -> list[Outcome]:
        """One for each policy. Who goes first changes with ``index``, so that no policy's time is favoured."""
        references = self._references(case)
        names = list(self.engines)
        first = index % len(names)
        said = {name: self._say(name, case, references) for name in (*names[first:], *names[:first])}
        return [_outcome(name, index, case, said[name], said[FULL], self.judging) for name in names]

    def _references(self, case: Case) -> list[Reference]:
        """What the case's references leave in a store, exact and in their order."""
        self.filler.clear()
        for query in case.references:
            self.filler.generate(query.prompt, documents=query.documents, namespace=NAMESPACE, max_new_tokens=1)
        return self.filler.store.fetch_all(NAMESPACE)

    def _say(self, name: str, case: Case, references: Sequence[Reference]) -> Generation:
        engine = self.engines[name]
        if engine.config.reuse.mode != "off":
            for reference in references:
                stored = engine.store.put(self.corrupt.get(name, _as_it_is)(reference))
                require(stored, "store.max_bytes", engine.config.store.max_bytes, f"{reference.num_bytes} or more")
        generation = engine.generate(
            case.target.prompt,
            documents=case.target.documents,
            namespace=NAMESPACE,
            max_new_tokens=self._room(case),
        )
        engine.clear()
        return generation

    def _room(self, case: Case) -> int:
        """How many tokens an answer may have."""
        if self._max_new_tokens is not None:
            return self._max_new_tokens
        if case.answer is None:
            return FREE_TOKENS
        answer_tokens = len(self.filler.tokenizer.encode(case.answer, add_special_tokens=False))
        return max(answer_tokens + EXTRA_TOKENS, FREE_TOKENS if self.judging == "mentions" else 0)


def _as_it_is(reference: Reference) -> Reference:
    return reference


def _outcome(
    name: str, index: int, case: Case, said: Generation, full: Generation, judging: Judging = "exact"
) -> Outcome:
    report = said.report
    return Outcome(
        workload=case.workload,
        policy=name,
        mode=report.mode,
        case=index,
        num_documents=len(case.target.documents),
        prompt_tokens=report.prompt_tokens,
        text=said.text,
        right=is_answer(said.text, case.answer, case.values, judging),
        agrees=said.text.strip() == full.text.strip(),
        stale=is_answer(said.text, case.stale, case.stale_values, judging),
        fired=report.identical_tokens + report.fuzzy_tokens > 0,
        reused_tokens=report.reused_tokens,
        compute_ratio=report.compute_ratio,
        ttft_s=report.ttft_s,
        declined=report.declined,
        kv_kept_ratio=report.kv_retained_ratio,
        rouge_l=rouge_l(said.text, case.answer) if case.is_summary and case.answer is not None else None,
        rouge_l_to_full=rouge_l(said.text, full.text) if case.is_summary else None,
    )


def is_answer(said: str, answer: str | None, values: Sequence[str], judging: Judging) -> bool | None:
    """Whether ``said`` is the answer; None if there is none.

    Args:
        said: what was generated.
        answer: in the words that ``exact`` asks for; its lines may come in any order.
        values: what ``mentions`` asks for, each as whole words in any case.
        judging: which of both.
    """
    if answer is None:
        return None
    return right_share(said, answer) == 1 if judging == "exact" else all(_mentions(said, value) for value in values)


def _mentions(said: str, value: str) -> bool:
    words = r"\s+".join(map(re.escape, value.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", said, re.IGNORECASE) is not None
