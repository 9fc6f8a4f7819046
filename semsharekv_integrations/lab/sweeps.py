"""Sweeps: one thing is varied, and everything else stays; each is a study with its own axis.

``sentences``, ``similarity`` and ``retention`` are SemShareKV's sensitivity tests (arXiv 2509.24832) with facts in
place of ROUGE-L. ``budget`` asks which signal makes the most of a recomputed token, ``lsh`` how many bits it takes.
Every sweep has a full prefill, its rerun, the exact prefix and the negative control beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import floor
from random import Random
from types import MappingProxyType

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.lab import policies, world
from semsharekv_integrations.lab.policies import RAW, UNGUARDED
from semsharekv_integrations.lab.probes import RecallProbe, SimilarityProbe
from semsharekv_integrations.lab.quality import Outcome
from semsharekv_integrations.lab.sentences import CHANGES, group_name, sentence_cases
from semsharekv_integrations.lab.studies import (
    NEGATIVE_CONTROL,
    Axis,
    Group,
    Options,
    Study,
    compute_of,
    controls,
    world_group,
)
from semsharekv_integrations.lab.workloads import Case, Query, Scene, case_of_scene

MakeStudy = Callable[[Options, PreTrainedModel, PreTrainedTokenizerBase], Study]

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
KEPT_RATIOS = (0.2, 0.3, 0.42, 0.58, 0.7, 0.85, 1.0)
FINAL_SHARES = (0.25, 1.0)  # of the first layer's; the paper's decay as mode ``paper`` has it, and none
SIGNAL_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4)
RELEVANCE_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3)
HASH_BITS = (16, 32, 64, 128, 256, 512)
LONG_DOCUMENTS = (14, 30)  # reports in one long document: more tokens than are compared in full
_REPORT = "report"
_BIN = 0.1
_ROUNDING = 1e-6  # so that 0.3 is not below 0.3
_EITHER = "sentences removed or replaced"


def _points(options: Options, values: tuple[float, ...]) -> tuple[float, ...]:
    """All of them, or the first, the middle and the last."""
    return (values[0], values[len(values) // 2], values[-1]) if options.quick else values


def sentences(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """Shares of every document's sentences removed or replaced; the question is about one that stays."""
    shares = {group_name(change, share): share for change in CHANGES for share in _points(options, SHARES)}
    changes = {group_name(change, share): change for change in CHANGES for share in SHARES}
    count = options.num_cases
    groups = [
        Group(
            name,
            sentence_cases(changes[name], share, count, options.seed, options.num_documents, options.layouts),
            count,
        )
        for name, share in shares.items()
    ]
    return Study(
        "Sentences removed or replaced",
        controls() | policies.make_configs(("identical", "semantic"), options.settings),
        [*groups, world_group(options, NEGATIVE_CONTROL)],
        Axis(
            "sentences changed (%)",
            lambda row: 100 * shares[row.workload] if row.workload in shares else None,
            lambda row: row.policy,
            lambda row: str(changes.get(row.workload, row.workload)),
        ),
        annotate=SimilarityProbe(model, tokenizer),
    )


def similarity(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """The cases of ``sentences``, by how alike the document asked about is to its stored version."""
    centre = {_bin_name(index): (index + 0.5) * _BIN for index in range(-10, 11)}
    return replace(
        sentences(options, model, tokenizer),
        title="Similarity of the document asked about",
        regroup=by_similarity,
        axis=Axis(
            "similarity of pooled embeddings",
            lambda row: centre.get(row.workload),
            lambda row: row.policy,
            lambda row: _EITHER if row.workload in centre else row.workload,
        ),
    )


def by_similarity(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes with a similarity, least first, in groups 0.1 wide and numbered anew; then the others, unchanged."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys((o.workload, o.case) for o in outcomes))}
    binned = [
        (_bin_of(outcome.similarity), numbers[outcome.workload, outcome.case], outcome)
        for outcome in outcomes
        if outcome.similarity is not None
    ]
    binned.sort(key=lambda entry: entry[:2])
    found = [replace(outcome, workload=_bin_name(index), case=number) for index, number, outcome in binned]
    return [*found, *(outcome for outcome in outcomes if outcome.similarity is None)]


def _bin_of(value: float) -> int:
    """The last one ends with the value 1 itself."""
    return min(floor(value / _BIN + _ROUNDING), round(1 / _BIN) - 1)


def _bin_name(index: int) -> str:
    return f"{index * _BIN:.1f} to {(index + 1) * _BIN:.1f}"


def retention(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """What share of the KV is kept for decoding: even in all layers, or decaying to a quarter from first to last."""
    names = {
        f"keeps {ratio:g}, {_spread(final)}": (ratio, final)
        for final in FINAL_SHARES
        for ratio in _points(options, KEPT_RATIOS)
    }
    kept = {
        name: ReuseConfig(mode="identical", retention_ratio=ratio, retention_final_share=final)
        for name, (ratio, final) in names.items()
    }
    return Study(
        "KV kept for decoding",
        controls() | policies.with_settings(kept, options.settings),
        [world_group(options, name) for name in ("reordered", NEGATIVE_CONTROL)],
        Axis(
            "KV kept (share of bytes, median)",
            lambda row: row.kv_kept_ratio.value if row.kv_kept_ratio and row.policy in names else None,
            lambda row: _spread(names[row.policy][1]),
            lambda row: row.workload,
        ),
    )


def _spread(final_share: float) -> str:
    return "even" if final_share == 1 else "decaying"


def budget(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """Quality against compute, by what chooses the tokens to compute again; each signal on top of the boundaries."""
    signals = budget_policies(options)
    named = {name: reuse for signal in signals.values() for name, reuse in signal.items()}
    signal_of = {name: signal for signal, configs in signals.items() for name in configs}
    return Study(
        "Quality against compute, by signal",
        controls() | policies.with_settings(named, options.settings),
        [world_group(options, name) for name in ("reordered", NEGATIVE_CONTROL)],
        Axis(
            "compute ratio (median)",
            lambda row: compute_of(row) if row.policy in signal_of else None,
            lambda row: signal_of.get(row.policy, row.policy),
            lambda row: row.workload,
        ),
    )


def budget_policies(options: Options) -> dict[str, dict[str, ReuseConfig]]:
    """Settings by signal and by name. Attention and deviation act only where no document is relevant."""
    bounds = ReuseConfig(
        mode="identical",
        relevance_ratio=0.0,
        attention_ratio=0.0,
        max_deviation=UNGUARDED,
        max_compute_ratio=1.0,
    )
    ratios = _points(options, SIGNAL_RATIOS)
    return {
        "none": {"none": RAW},
        "boundaries": {"boundaries": bounds},
        "deviation": {f"deviation {r:g}": replace(bounds, full_layers=1, deviation_ratio=r) for r in ratios},
        "attention": {f"attention {r:g}": replace(bounds, attention_ratio=r) for r in ratios},
        "both": {
            f"both {r:g}": replace(bounds, full_layers=1, deviation_ratio=r / 2, attention_ratio=r / 2) for r in ratios
        },
        "relevance": {
            f"relevance {r:g}": replace(bounds, relevance_ratio=r) for r in _points(options, RELEVANCE_RATIOS)
        },
    }


def lsh(options: Options, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Study:
    """Hash bits against recall and answers, on one long reworded document; 0 bits compare all tokens."""
    bits_of = {f"{bits:g} bits": int(bits) for bits in (0, *_points(options, HASH_BITS))}
    hashed = {name: ReuseConfig(mode="semantic", lsh_bits=bits) for name, bits in bits_of.items()}
    configs: Mapping[str, EngineConfig] = controls() | policies.with_settings(hashed, options.settings)
    long = replace(options, documents=options.documents or LONG_DOCUMENTS)
    return Study(
        "Bits of the locality-sensitive hash",
        configs,
        [Group(_long_name(alike), long_cases(long, alike=alike), long.num_cases) for alike in (True, False)],
        Axis(
            "hash bits",
            lambda row: bits_of.get(row.policy) or None,
            lambda row: "semantic",
            lambda row: row.workload,
            is_logarithmic=True,
        ),
        annotate=RecallProbe(model, tokenizer, configs),
    )


def long_cases(options: Options, *, alike: bool) -> Iterator[Case]:
    """Cases in which all documents of a prompt are one to the engine, so long that its tokens are hashed.

    Args:
        options: how many cases, of how many reports.
        alike: whether the stored one tells the same in other words, or is on other towns.
    """
    for index in range(options.num_cases):
        rng = Random(f"long {options.seed} {index}")
        count = rng.randint(*options.num_documents)
        documents = world.make_documents(rng, count if alike else 2 * count)
        seen = documents[:count]
        target = [world.reword(rng, document) for document in seen] if alike else documents[count:]
        case = case_of_scene(rng, _long_name(alike), Scene([seen], target), options.layouts)
        yield replace(case, references=tuple(map(_as_one, case.references)), target=_as_one(case.target), asked=None)


def _long_name(alike: bool) -> str:
    return f"{'reworded' if alike else NEGATIVE_CONTROL}, long"


def _as_one(query: Query) -> Query:
    return Query(query.prompt, {_REPORT: "\n\n".join(query.documents.values())})


SWEEPS: Mapping[str, MakeStudy] = MappingProxyType(
    {"sentences": sentences, "similarity": similarity, "retention": retention, "budget": budget, "lsh": lsh}
)


def about(name: str) -> str:
    """What a sweep varies, in one line."""
    return (SWEEPS[name].__doc__ or "").strip().splitlines()[0]
