"""Quality: every case of a workload under every policy, beside a full prefill of the same prompt.

What a case's references leave in the store is computed once, without reuse off the prefix, and given to every policy.
Answers are generated greedily. See ``lab.metrics`` for the figures that are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.checks import require
from semsharekv_integrations.config import EngineConfig, ReuseConfig, StoreConfig
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.kv import Generation, Reference
from semsharekv_integrations.lab.policies import FULL, Corrupt
from semsharekv_integrations.lab.prompts import Layout
from semsharekv_integrations.lab.workloads import DEFAULT_DOCUMENTS, DEFAULT_LAYOUTS, Case, make_cases
from semsharekv_integrations.modes import Mode

NAMESPACE = "quality"
EXTRA_TOKENS = 4  # generated at most beyond those of the right answer
_FILLER = EngineConfig(  # stores every prompt, and computes each in full
    reuse=ReuseConfig(mode="exact", min_prefix_tokens=2**31), store=StoreConfig(max_bytes=2**62)
)
Progress = Callable[[Iterable[Case]], Iterable[Case]]


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
        right: whether that is the right answer.
        agrees: whether it is what a full prefill gives.
        stale: whether it is what the references' documents would answer; None if they say nothing else.
        fired: whether KV was reused off the exact prefix.
        reused_tokens: prompt tokens whose KV was not computed.
        compute_ratio: token-layers computed over tokens times layers, 0 to 1.
        ttft_s: seconds to the first new token.
        declined: why nothing was reused, or None.
    """

    workload: str
    policy: str
    mode: Mode
    case: int
    num_documents: int
    prompt_tokens: int
    text: str
    right: bool
    agrees: bool
    stale: bool | None
    fired: bool
    reused_tokens: int
    compute_ratio: float
    ttft_s: float
    declined: str | None


class Bench:
    """One engine for each policy, all on the same weights.

    Args:
        model: any loaded transformers model.
        tokenizer: its tokenizer.
        configs: settings by policy; a full prefill named ``off`` is added if there is none.
        corrupt: what is done to the stored references of a policy, by its name.

    Raises:
        ValueError: if ``off`` is no full prefill, or ``corrupt`` names no policy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        configs: Mapping[str, EngineConfig],
        corrupt: Mapping[str, Corrupt] | None = None,
    ) -> None:
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
        return [_outcome(name, index, case, said[name], said[FULL]) for name in names]

    def _references(self, case: Case) -> list[Reference]:
        """What the case's references leave in a store, exact and in their order."""
        self.filler.clear()
        for query in case.references:
            self.filler.generate(query.prompt, documents=query.documents, namespace=NAMESPACE, max_new_tokens=1)
        return self.filler.store.references(NAMESPACE)

    def _say(self, name: str, case: Case, references: Sequence[Reference]) -> Generation:
        engine = self.engines[name]
        if engine.config.reuse.mode != "off":
            for reference in references:
                stored = engine.store.put(self.corrupt.get(name, _as_it_is)(reference))
                require(stored, "store.max_bytes", engine.config.store.max_bytes, f"{reference.num_bytes} or more")
        answer_tokens = len(engine.tokenizer.encode(case.answer, add_special_tokens=False))
        generation = engine.generate(
            case.target.prompt,
            documents=case.target.documents,
            namespace=NAMESPACE,
            max_new_tokens=answer_tokens + EXTRA_TOKENS,
        )
        engine.clear()
        return generation


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, EngineConfig],
    workload: str,
    num_cases: int,
    seed: int,
    *,
    num_documents: tuple[int, int] = DEFAULT_DOCUMENTS,
    layouts: Sequence[Layout] = DEFAULT_LAYOUTS,
    corrupt: Mapping[str, Corrupt] | None = None,
    progress: Progress = iter,
) -> list[Outcome]:
    """Every case of ``workload`` under every policy. For the arguments see ``Bench`` and ``make_cases``.

    Args:
        progress: wraps the cases, to show how far it is.
    """
    bench = Bench(model, tokenizer, configs, corrupt)
    cases = progress(make_cases(workload, num_cases, seed, num_documents, layouts))
    return [outcome for index, case in enumerate(cases) for outcome in bench.outcomes(index, case)]


def _as_it_is(reference: Reference) -> Reference:
    return reference


def _outcome(name: str, index: int, case: Case, said: Generation, full: Generation) -> Outcome:
    report = said.report
    return Outcome(
        workload=case.workload,
        policy=name,
        mode=report.mode,
        case=index,
        num_documents=len(case.target.documents),
        prompt_tokens=report.prompt_tokens,
        text=said.text,
        right=said.text.strip() == case.answer,
        agrees=said.text.strip() == full.text.strip(),
        stale=None if case.stale is None else said.text.strip() == case.stale,
        fired=report.identical_tokens + report.fuzzy_tokens > 0,
        reused_tokens=report.reused_tokens,
        compute_ratio=report.compute_ratio,
        ttft_s=report.ttft_s,
        declined=report.declined,
    )
