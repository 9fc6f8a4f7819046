"""Which mode and budget a user should take, by what a run measured without gold answers.

The KL along a full prefill's answer stands in for right answers. On the two real models of docs/results.md, settings of
up to .02 nats a token lost less than a point of right answers in 591 questions, and those of .024 to .036 nearly two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from semsharekv_integrations.config import EngineConfig, ReuseConfig
from semsharekv_integrations.lab.figures import Outcome, Row, summarize
from semsharekv_integrations.lab.policies import EXACT, FLOORS, FULL, UNBOUNDED

MOST_KL = 0.02  # nats a token
LEAST_GAIN = 1.2  # times as fast as `exact`, below which an approximation is not worth it


def recommend(configs: Mapping[str, EngineConfig], outcomes: Sequence[Outcome]) -> str:
    """Return which setting is the fastest that stays near a full prefill, and why.

    What counts are the prompts of all scenarios together in which the setting reused more than an exact prefix: in
    the others it answers as ``exact`` does. A setting is near if its mean KL over them is at most ``MOST_KL``. If its
    interval reaches beyond that, the text says so.
    """
    rows = {row.policy: row for row in summarize(_pool(outcomes))}
    near = [name for name in rows if _is_near(rows[name]) and name not in (FULL, EXACT, *FLOORS)]
    gains = {name: gain.value for name in near if (gain := rows[name]["exact_ratio"])}
    best = max(gains, key=lambda name: gains[name], default=None)
    if best is None or gains[best] < LEAST_GAIN:
        return f'Recommended: ReuseConfig(mode="exact"). {_explain_exact(rows, best, gains)}'
    return f"Recommended: {_write_settings(configs[best])}. {_explain_gain(rows[best], gains[best])}"


def _write_settings(config: EngineConfig) -> str:
    """Return what a user writes for these settings: all that they change, but for the bench's bound on the store."""
    parts = []
    for own, usual in ((config.reuse, ReuseConfig()), (config.store, UNBOUNDED)):
        given = {field.name: getattr(own, field.name) for field in fields(own)}
        changed = {name: value for name, value in given.items() if value != getattr(usual, name)}
        told = (
            f'{name}="{value}"' if isinstance(value, str) else f"{name}={value!r}" for name, value in changed.items()
        )
        parts += [f"{type(own).__name__}({', '.join(told)})"] if changed else []
    return " with ".join(parts)


def _pool(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes that count as if they were of one scenario; cases and groups keep apart."""
    outcomes = [outcome for outcome in outcomes if outcome.fired or outcome.policy in (FULL, EXACT)]
    cases = {key: number for number, key in enumerate(dict.fromkeys((o.scenario, o.case) for o in outcomes))}
    groups = {key: number for number, key in enumerate(dict.fromkeys((o.scenario, o.group) for o in outcomes))}
    return [
        replace(o, scenario="all", case=cases[o.scenario, o.case], group=groups[o.scenario, o.group]) for o in outcomes
    ]


def _is_near(row: Row) -> bool:
    kl = row["answer_kl"]
    return kl is not None and kl.value <= MOST_KL


def _explain_exact(rows: Mapping[str, Row], best: str | None, gains: Mapping[str, float]) -> str:
    if best is not None:
        return (
            f"Of the approximate settings near a full prefill, the fastest, {best}, is {gains[best]:.1f} times as "
            f"fast as exact reuse; below {LEAST_GAIN} that is not worth answers that can differ."
        )
    measured = [
        f"{name} {kl.value:.3f}" for name, row in rows.items() if (kl := row["answer_kl"]) and kl.value > MOST_KL
    ]
    if measured:
        return f"No approximate setting stayed within {MOST_KL} nats a token of a full prefill: {', '.join(measured)}."
    return "No approximate setting reused anything in what was measured."


def _explain_gain(row: Row, gain: float) -> str:
    kl, same, full = row["answer_kl"], row["agreement"], row["ttft_ratio"]
    assert kl is not None and same is not None and full is not None, "it was measured beside a full prefill"
    said = (
        f"The first token comes {full.value:.1f} times as fast as with a full prefill and {gain:.1f} times as with "
        f"exact reuse (medians, over the {row.cases} prompts in which it reused more than an exact prefix); "
        f"{same.value:.0%} of the answers are the same word for word, and the KL along the full prefill's answers is "
        f"{kl.value:.3f} nats a token [{kl.low:.3f}, {kl.high:.3f}]."
    )
    if kl.high > MOST_KL:
        said += f" The interval reaches beyond {MOST_KL}: more --groups would tell."
    return said
