"""The plan of one prefill: where every token's KV comes from, what is computed, and what that will cost.

A plan is decided before anything is computed, from token ids alone; ``model.selective`` carries it out. Which borrowed
tokens are computed again depends on attention and on deviation, so the plan holds their budgets, not their names.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import Mask, PrefixMatch, Reference, Run, Span, Substitution, TokenIds, substitute
from semsharekv_integrations.reuse.selection import choose_relevant_tokens, score_documents, spread_shares

# Share of a layer's cost to measure deviation (queries, keys, values alone); an upper estimate.
PROJECTION_SHARE = 0.25
MOST_AT_BOUNDARIES = 0.5  # share of the budget that first tokens of runs may take
_LONGEST_EDIT_TOKENS = 16


class Borrowing(NamedTuple):
    """Tokens ``targets`` [N] of the prompt take the KV of tokens ``sources`` [N] of ``reference``.

    ``fuzzy`` [N] marks what was matched by similarity; a different token may stand there.
    """

    reference: Reference
    targets: NDArray[np.int64]
    sources: NDArray[np.int64]
    fuzzy: Mask


@dataclass(frozen=True, eq=False)
class ReusePlan:
    """The decided prefill of one prompt, ``token_ids`` [T].

    Attributes:
        prefix: the stored prefix, borrowed as it is, or None.
        borrowings: what is borrowed behind the prefix; no token twice.
        must: [T] marks what is computed at every layer: without a source, at a boundary, relevant, or of the question.
        question: [T] marks the tokens whose attention says what matters.
        relevant: [T] marks borrowed tokens in ``must`` since their documents share rare words with the question.
        attention_tokens: how many borrowed tokens the question's attention selects, at the first layer; 0 where some
            are relevant.
        deviation_tokens: how many borrowed tokens deviation selects, likewise.
        shares: for each layer, what is left of both; never growing.
        full_layers: number of first layers that compute every token behind the prefix.
        max_deviation: above which the prompt is finished as a full prefill.
        declined: why nothing, or nothing but the prefix, is borrowed; else None.
        rotate_keys: whether borrowed keys are turned to where they stand now.
        attention_depth: share of the layers, the first ones, that tell what the question attends to.
        substitutions: turn the prompt as it was asked into ``token_ids``, which the model reads.
    """

    token_ids: TokenIds
    prefix: PrefixMatch | None
    borrowings: tuple[Borrowing, ...]
    must: Mask
    question: Mask
    relevant: Mask
    num_layers: int
    attention_tokens: int
    deviation_tokens: int
    shares: tuple[float, ...]
    full_layers: int
    max_deviation: float
    declined: str | None = None
    rotate_keys: bool = True
    attention_depth: float = 1.0
    substitutions: tuple[Substitution, ...] = ()

    @property
    def prefix_tokens(self) -> int:
        """Length of the reused prefix; 0 without one."""
        return self.prefix.num_tokens if self.prefix else 0

    def find_document_spans(self) -> dict[str, Span]:
        """Return, by id, the documents that borrowed KV may come from, each with the first token that borrows from it.

        A token's KV depends on that token and those before it, so later documents in the reference play no part.
        """
        starts: dict[str, int] = {}
        for borrowing in self.borrowings:
            for key, start in borrowing.reference.document_starts.items():
                behind = borrowing.targets[borrowing.sources >= start]
                if len(behind):
                    starts[key] = min(int(behind.min()), starts.get(key, int(behind.min())))
        for span, each in zip(self.substituted_spans, self.substitutions, strict=True):
            starts |= {key: min(span.start, starts.get(key, span.start)) for key in each.documents}
        return {key: Span(start, start + 1) for key, start in starts.items()}

    @cached_property
    def substituted_spans(self) -> list[Span]:
        """Where the substitutions stand in ``token_ids``, in order."""
        growths = accumulate((each.growth for each in self.substitutions), initial=0)
        starts = [each.start + growth for each, growth in zip(self.substitutions, growths, strict=False)]
        return [Span(at, at + len(each.token_ids)) for at, each in zip(starts, self.substitutions, strict=True)]

    @cached_property
    def substituted(self) -> Mask:
        """Mask [T] of the tokens that are read in place of others."""
        return self._mark([(np.arange(*span), True) for span in self.substituted_spans])

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """For each token that was asked, the one of ``token_ids`` that it is read as, or at the same share of it."""
        shares = [np.arange(each.stop - each.start) / (each.stop - each.start) for each in self.substitutions]
        stand_ins = [
            Substitution(*span, span.start + (share * (span.stop - span.start)).astype(np.int64))
            for span, share in zip(self.substituted_spans, shares, strict=True)
        ]
        return substitute(np.arange(len(self.token_ids)), stand_ins)

    @property
    def own_tokens(self) -> int:
        """How many first tokens are read as they were asked; ``sys.maxsize`` if all are."""
        return min((span.start for span in self.substituted_spans), default=sys.maxsize)

    @cached_property
    def served(self) -> list[Substitution]:
        """The substitutions whose tokens all have KV to take, not all of it computed anew."""
        have = self.borrowed.copy()
        have[: self.prefix_tokens] = True
        places = zip(self.substituted_spans, self.substitutions, strict=True)
        return [s for span, s in places if have[slice(*span)].all() and not self.must[slice(*span)].all()]

    @cached_property
    def fuzzy(self) -> Mask:
        """Mask [T] of the tokens borrowed by similarity."""
        return self._mark([(b.targets, b.fuzzy) for b in self.borrowings])

    @cached_property
    def borrowed(self) -> Mask:
        """Mask [T] of the tokens borrowed from behind the prefix, whether or not they are computed again."""
        return self._mark([(b.targets, True) for b in self.borrowings])

    @cached_property
    def optional(self) -> Mask:
        """Mask [T] of the tokens that are borrowed, and computed only if selected."""
        return self.borrowed & ~self.must

    @cached_property
    def predicted_rows(self) -> tuple[int, ...]:
        """For each layer, the most tokens that it will compute."""
        behind, least = len(self.token_ids) - self.prefix_tokens, int(self.must.sum())
        quotas = (self.attention_tokens, self.deviation_tokens)
        most = int(self.optional.sum())
        rows = [least + min(most, sum(int(np.ceil(share * quota)) for quota in quotas)) for share in self.shares]
        return (*[behind] * self.full_layers, *rows[self.full_layers :])[: self.num_layers]

    @property
    def predicted_compute_ratio(self) -> float:
        """The most token-layers that this plan computes, over tokens times layers; may exceed 1."""
        total = len(self.token_ids) * self.num_layers
        rows = float(sum(self.predicted_rows))
        if self.attention_tokens:
            rows += self.question.sum() * self.looked_layers  # they run ahead, to see what they attend to
        if self.borrowings and self.measured_layer < self.num_layers:
            before = max(self.measured_layer - 1, 0)
            rows += PROJECTION_SHARE * self.predicted_rows[before]
        return rows / total

    @property
    def looked_layers(self) -> int:
        """How many first layers tell what the question attends to."""
        return math.ceil(self.attention_depth * self.num_layers)

    @property
    def measured_layer(self) -> int:
        """The layer at which fresh keys and values are compared with borrowed ones.

        It is the one behind the full layers, where the comparison also chooses what is computed. Without full layers it
        lies half way up, where the tokens computed anyway only tell whether the rest is to be trusted.
        """
        return self.full_layers or (self.num_layers + 1) // 2

    def __str__(self) -> str:
        """Return one line for logs: counts and the reason to decline, never text."""
        return (
            f"{len(self.token_ids)} tokens: {self.prefix_tokens} prefix, {int((self.borrowed & ~self.fuzzy).sum())} "
            f"identical, {int(self.fuzzy.sum())} fuzzy, {int(self.substituted.sum())} substituted, "
            f"{int(self.must.sum())} computed at every layer, rows by layer {list(self.predicted_rows)}, "
            f"compute ratio {self.predicted_compute_ratio:.3f}, declined: {self.declined}"
        )

    def _mark(self, marks: Sequence[tuple[NDArray[np.int64], Mask | bool]]) -> Mask:
        """Return an array [T] that is False, but has the given value at each of the given targets."""
        mask = np.zeros(len(self.token_ids), dtype=bool)
        for targets, value in marks:
            mask[targets] = value
        return mask


def build_plan(
    token_ids: TokenIds,
    prefix: PrefixMatch | None,
    runs: Sequence[Run],
    matches: Sequence[Borrowing],
    question: Mask,
    rules: ReuseConfig,
    num_layers: int,
    segments: Sequence[tuple[int, int]] = (),
) -> ReusePlan:
    """Decide what is borrowed and what is computed, whatever that costs.

    Args:
        token_ids: [T], of the prompt.
        runs: identical runs behind the prefix, in prompt order, none overlapping.
        matches: similar tokens outside the runs.
        question: [T] tokens that are always computed.
        segments: what may be relevant to the question, documents or else passages, as (start, stop).
    """
    rules, start = rules.resolve(), prefix.num_tokens if prefix else 0
    borrowings = (*map(_borrow_run, runs), *matches)
    must = np.zeros(len(token_ids), dtype=bool)
    must[start:] = True
    for borrowing in borrowings:
        must[borrowing.targets] = False
    borrowed = ~must
    borrowed[:start] = False
    _mark_first_tokens(must, prefix, runs, rules)
    must |= question
    must[:start] = False
    room = _find_room(rules, borrowed, must, question)
    scores = score_documents(token_ids, segments, question)
    relevant = choose_relevant_tokens(scores, segments, borrowed & ~must, rules.relevance_ratio, room)
    num_optional = 0 if relevant.any() else int((borrowed & ~must).sum())
    attention_tokens = room - int(relevant.sum())
    if rules.budget is None:
        attention_tokens = math.ceil((rules.attention_ratio or 0.0) * num_optional)
    return ReusePlan(
        token_ids,
        prefix,
        borrowings,
        must | relevant,
        question,
        relevant,
        num_layers,
        attention_tokens=attention_tokens,
        deviation_tokens=math.ceil(rules.deviation_ratio * num_optional),
        shares=spread_shares(num_layers, 1.0, rules.final_share),
        full_layers=min(rules.full_layers, num_layers),
        max_deviation=rules.max_deviation,
        rotate_keys=rules.rotate_keys,
        attention_depth=rules.attention_depth or 1.0,
    )


def decline_if_costly(plan: ReusePlan, rules: ReuseConfig) -> ReusePlan:
    """Return ``plan``, or its exact prefix alone and why: it borrows no more, or is predicted to save too little."""
    left = 1 - plan.prefix_tokens / len(plan.token_ids)
    if not plan.borrowings:
        reason = "nothing similar enough is stored"
    elif plan.predicted_compute_ratio > rules.resolve().max_compute_ratio * left:
        share = plan.predicted_compute_ratio / left
        reason = f"predicted to compute {share:.0%} of what the prefix leaves, above max_compute_ratio"
    else:
        return plan
    return build_prefix_plan(plan.token_ids, plan.prefix, plan.num_layers, reason)


def build_prefix_plan(
    token_ids: TokenIds, prefix: PrefixMatch | None, num_layers: int, declined: str | None
) -> ReusePlan:
    """Return a plan that borrows the prefix alone, or nothing if that is None; ``declined`` says why."""
    behind = np.arange(len(token_ids)) >= (prefix.num_tokens if prefix else 0)
    none = np.zeros_like(behind)
    return ReusePlan(
        token_ids, prefix, (), behind, behind, none, num_layers, 0, 0, (0.0,) * num_layers, 0, 0.0, declined
    )


def _mark_first_tokens(must: Mask, prefix: PrefixMatch | None, runs: Sequence[Run], rules: ReuseConfig) -> None:
    """Mark in ``must`` [T] the first tokens of each run that are computed, as many as the rules have room for."""
    most = num_tokens = sum(run.num_tokens for run in runs)
    if rules.budget is not None:
        most = math.ceil(MOST_AT_BOUNDARIES * rules.budget * num_tokens / max(1, len(runs)))
    last = Run(0, prefix.reference, 0, prefix.num_tokens) if prefix else None
    for run in runs:
        wanted = rules.edit_tokens if _follows_edit(last, run) else rules.boundary_tokens
        must[run.start : run.start + min(run.num_tokens, wanted, most)] = True
        last = run


def _find_room(rules: ReuseConfig, borrowed: Mask, must: Mask, question: Mask) -> int:
    """Return how many borrowed tokens the budget computes beside ``must`` [T]; ``sys.maxsize`` without a budget."""
    if rules.budget is None:
        return sys.maxsize
    outside = borrowed & ~question
    return max(0, math.ceil(rules.budget * outside.sum()) - int((outside & must).sum()))


def _borrow_run(run: Run) -> Borrowing:
    offsets = np.arange(run.num_tokens)
    return Borrowing(run.reference, run.start + offsets, run.source_start + offsets, np.zeros(run.num_tokens, bool))


def _follows_edit(last: Run | None, run: Run) -> bool:
    """Return whether both runs stand in one reference with little between them; if so, ``run`` follows an edit."""
    if last is None or last.reference.id != run.reference.id:
        return False
    gaps = (run.start - last.start - last.num_tokens, run.source_start - last.source_start - last.num_tokens)
    return all(0 <= gap <= _LONGEST_EDIT_TOKENS for gap in gaps)
