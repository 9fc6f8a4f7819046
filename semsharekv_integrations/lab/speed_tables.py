"""The speed bench's report in Markdown: how it was measured, every figure, and the aims, met or missed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from semsharekv_integrations.lab.policies import FULL
from semsharekv_integrations.lab.speed import Results, Sample
from semsharekv_integrations.lab.speed_figures import (
    AIM_LENGTH,
    Row,
    Spread,
    Verdict,
    aim_length,
    layers_of,
    phases_of,
    summarize,
    verdicts,
)

MEGABYTE = 10**6
TIME_COLUMNS = (
    "scenario",
    "asked",
    "tokens",
    "policy",
    "n",
    "TTFT, ms",
    "times faster than off",
    "than exact",
    "reused",
    "compute",
    "overhead",
    "note",
)
MEMORY_COLUMNS = (
    "scenario",
    "tokens",
    "policy",
    "peak growth, MB",
    "KV, MB",
    "KV kept",
    "in store, MB",
    "into store, ms",
    "decode, tokens/s",
)
LAYER_COLUMNS = (
    "scenario",
    "policy",
    "rows of off's",
    "time of off's",
    "all layers, ms",
    "first layer, ms",
    "median layer, ms",
    "last layer, ms",
    "outside the layers, ms",
)
LEGEND = (
    "Brackets are quartiles over n timed rounds; in each round every policy takes its turn, in an order drawn anew, "
    "and ratios are taken within a round. TTFT: time to first token. Compute: token-layers computed over tokens times "
    "layers. Overhead: share of off's time over compute; 1 would be none. Before each call the store holds the "
    "references alone. A first round is not timed: memory is measured in it, and the references' texts are indexed in "
    "it, once, as they would be in use."
)
MEMORY_LEGEND = (
    "Peak growth: by how much the call's peak exceeds what was in use before it (on CUDA what PyTorch's allocator gave "
    "out; on a Linux CPU resident memory; else left out). In store: references and what the call left. Into store: "
    "putting the references in, which in use falls to the call that leaves them."
)
LAYER_LEGEND = (
    "Taken by hooks on the decoder layers until the first new token; rows are tokens that leave a layer, summed over "
    "layers and passes. Outside the layers is all the rest of TTFT."
)


def report(about: Mapping[str, Any], results: Results, reusing: Sequence[str]) -> str:
    """All tables, with where they come from.

    Args:
        about: command, commit, uncommitted_changes, model, dtype, device, threads, seed, repeats and note.
        results: what was measured.
        reusing: policies that aims are held against.
    """
    rows = summarize(results.samples, results.failures)
    length = aim_length(rows) or max((row.length for row in rows if row.rounds), default=None)
    detailed = [sample for sample in results.samples if sample.length == length]
    sections = (
        f"# Speed under reuse\n\n{headline(about)}\n\n{LEGEND} {about['note']}".rstrip(),
        f"## Time to first token\n\n{_table(TIME_COLUMNS, map(_time_cells, rows))}",
        f"## Memory and decoding\n\n{MEMORY_LEGEND}\n\n{_table(MEMORY_COLUMNS, _memory_rows(rows))}",
        f"## Phases at {length} tokens asked for\n\nMedian milliseconds.\n\n{_phase_table(detailed)}",
        f"## Decoder layers at {length} tokens asked for\n\n{LAYER_LEGEND}\n\n{_layer_table(detailed)}",
        f"## Aims\n\n{_aims(verdicts(rows, reusing))}",
    )
    return "\n\n".join(sections) + "\n"


def headline(about: Mapping[str, Any]) -> str:
    """Where the figures come from, in one sentence."""
    commit = about["commit"][:12] + (" with uncommitted changes" if about["uncommitted_changes"] else "")
    return (
        f"`{about['command']}` at commit {commit}: model {about['model']} in {about['dtype']} on {about['device']}, "
        f"{threads_of(about)}, seed {about['seed']}, n = {about['repeats']}, {about['seconds']} s."
    )


def threads_of(about: Mapping[str, Any]) -> str:
    """How many threads PyTorch had, in words."""
    return f"{about['threads']} thread{'s' if about['threads'] != 1 else ''}"


def _time_cells(row: Row) -> Iterator[str]:
    yield from (row.scenario, str(row.length), _number(row.prompt_tokens, "d"), row.policy, str(row.rounds))
    yield _number(row.ttft_s, ".1f", 1000)
    yield from (_number(row.speedup, ".2f"), _number(row.speedup_over_exact, ".2f"))
    yield from (_number(row.reused_tokens, "d"), _number(row.compute_ratio, ".3f"))
    yield from (_number(row.overhead_quotient, ".2f"), row.note.replace("|", "/"))


def _memory_rows(rows: Iterable[Row]) -> Iterator[Iterator[str]]:
    return (_memory_cells(row) for row in rows if row.rounds)


def _memory_cells(row: Row) -> Iterator[str]:
    yield from (row.scenario, _number(row.prompt_tokens, "d"), row.policy)
    yield from (_number(row.peak_bytes, ".1f", 1 / MEGABYTE), _number(row.kv_bytes, ".1f", 1 / MEGABYTE))
    yield from (_number(row.kv_retained_ratio, ".3f"), _number(row.store_bytes, ".1f", 1 / MEGABYTE))
    yield from (_number(row.store_s, ".1f", 1000), _number(row.decode_tokens_per_s, ".1f"))


def _phase_table(samples: Sequence[Sample]) -> str:
    groups = {key: phases_of(group) for key, group in _grouped(samples).items()}
    names = list(dict.fromkeys(name for phases in groups.values() for name in phases))
    rows = (
        [*key, *(_number(phases.get(name), ".1f", 1000) for name in names)] for key, phases in groups.items() if phases
    )
    return _table(("scenario", "policy", *names), rows)


def _layer_table(samples: Sequence[Sample]) -> str:
    groups = _grouped(samples)
    return _table(LAYER_COLUMNS, (_layer_cells(key, groups) for key in groups))


def _layer_cells(key: tuple[str, str], groups: Mapping[tuple[str, str], Sequence[Sample]]) -> list[str]:
    seconds, rows = layers_of(groups[key])
    full_s, full_rows = layers_of(groups.get((key[0], FULL), ()))
    if not seconds or not sum(full_rows):
        return [*key, *["-"] * (len(LAYER_COLUMNS) - len(key))]
    ttft = Spread.of(sample.reading.ttft_s for sample in groups[key] if sample.round)
    middle = Spread.of(seconds).value
    times = (sum(seconds), seconds[0], middle, seconds[-1], ttft.value - sum(seconds))
    shares = (sum(rows) / sum(full_rows), sum(seconds) / sum(full_s))
    return [*key, *(f"{share:.3f}" for share in shares), *(_number(time, ".1f", 1000) for time in times)]


def _grouped(samples: Iterable[Sample]) -> dict[tuple[str, str], list[Sample]]:
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.scenario, sample.policy), []).append(sample)
    return groups


def _aims(found: Sequence[Verdict]) -> str:
    if not found:
        return f"None of the scenarios that aims are for was measured at up to {AIM_LENGTH} tokens."
    lines = (
        [verdict.aim, verdict.policy, str(verdict.length), verdict.figure, "met" if verdict.met else "missed"]
        for verdict in found
    )
    return _table(("aim", "policy", "asked", "measured", ""), lines)


def _table(columns: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def _number(value: Spread | float | None, form: str, scale: float = 1) -> str:
    if value is None:
        return "-"
    if isinstance(value, Spread):
        return f"{value.value * scale:{form}} [{value.low * scale:{form}}, {value.high * scale:{form}}]"
    return f"{value if scale == 1 else value * scale:{form}}"
