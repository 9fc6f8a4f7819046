"""The selective prefill: a plan carried out by the model's own layers, on the rows that need it.

SemShareKV (arXiv 2509.24832, section 3): the KV of similar tokens is gathered into the prompt's order, and only some
tokens are computed, fewer with depth. Departs from the paper: borrowed keys are turned to their new position, deviation
is measured behind the full layers, and the question's attention selects tokens as well. It is seen in a pass of the
question alone over the borrowed KV, which costs little because a question is short.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, Mask, Reference, Run, TokenIds
from semsharekv_integrations.model.adapter import PROBE_SHIFT, ModelAdapter, Prefill, find_rotations
from semsharekv_integrations.model.attention import blocked_attention, watched_attention
from semsharekv_integrations.model.layers import find_layers, require_reuse_off_prefix, windows_of
from semsharekv_integrations.model.rows import GatheredCache, LayerView, Measure, RowPass, gather
from semsharekv_integrations.report import Stopwatch
from semsharekv_integrations.reuse.plan import ReusePlan, build_plan
from semsharekv_integrations.reuse.selection import Signal, measure_deviation, rank_tokens, select_tokens


class Outcome(NamedTuple):
    """A plan as it was carried out.

    Attributes:
        prefill: what decoding goes on with.
        compute_ratio: token-layers computed over tokens times layers.
        computed: [T] tokens that were computed at every layer.
        exact_tokens: number of leading tokens whose KV is that of a full prefill.
        deviation: mean deviation of the borrowed tokens that were computed again, or None if there were none.
        fell_back: why everything behind the prefix was computed though the plan borrowed, or None.
    """

    prefill: Prefill
    compute_ratio: float
    computed: Mask
    exact_tokens: int
    deviation: float | None = None
    fell_back: str | None = None


def prefill_behind_prefix(adapter: ModelAdapter, plan: ReusePlan) -> Outcome:
    """A full prefill of what ``plan`` leaves behind the exact prefix; it borrows nothing else."""
    computed = np.arange(len(plan.token_ids)) >= plan.prefix_tokens
    prefill = adapter.prefill(plan.token_ids, plan.prefix)
    return Outcome(prefill, float(computed.mean()), computed, _exact_tokens(plan, computed))


def _exact_tokens(plan: ReusePlan, computed: Mask) -> int:
    """Number of leading tokens that stand on nothing approximate; every token to come, if that is all."""
    if plan.prefix and plan.prefix.reference.is_tainted:
        exact = plan.prefix.reference.exact_tokens or 0
        if exact < plan.prefix_tokens:
            return exact
    borrowed = np.flatnonzero(~computed[plan.prefix_tokens :])
    return plan.prefix_tokens + int(borrowed[0]) if len(borrowed) else sys.maxsize


class GivenUp(Exception):
    """The borrowed KV deviates too much, and the rows that were left out have no hidden states to go on with."""


@dataclass(eq=False)
class _State:
    """What one selective pass has found out."""

    plan: ReusePlan
    optional: torch.Tensor
    borrowed: torch.Tensor  # optional or relevant: behind no boundary, so that deviation says how good borrowing is
    must: torch.Tensor
    attended: torch.Tensor | None = None
    priority: torch.Tensor | None = None
    deviation: float | None = None
    fell_back: str | None = None

    @classmethod
    def of(cls, plan: ReusePlan, device: torch.device) -> _State:
        masks = plan.optional, plan.optional | plan.relevant, plan.must
        optional, borrowed, must = (torch.from_numpy(mask).to(device) for mask in masks)
        return cls(plan, optional, borrowed, must)

    def rank(self, deviations: torch.Tensor | None) -> None:
        """Priorities from the signals there are."""
        signals = []
        if self.attended is not None:
            signals.append(Signal(self.attended, self.plan.attention_tokens))
        if deviations is not None:
            signals.append(Signal(deviations, self.plan.deviation_tokens))
        self.priority = rank_tokens(signals, self.optional)

    def judge(self, deviations: torch.Tensor, rows: torch.Tensor) -> None:
        """Take the deviations [T] measured at ``rows`` in: rank by them, or give the reuse up."""
        measured = rows[self.borrowed[rows]]
        if len(measured):
            self.deviation = float(deviations[measured].mean())
        if self.deviation is not None and self.deviation > self.plan.max_deviation:
            self.fell_back = f"deviation of {self.deviation:.2f} is above max_deviation"
            if not self.plan.full_layers:
                raise GivenUp
        if self.plan.full_layers:
            self.rank(deviations)

    def active(self, layer: int) -> torch.Tensor:
        """[T] tokens that ``layer`` computes."""
        assert self.priority is not None, "priorities are known"
        return self.must | select_tokens(self.priority, self.plan.shares[layer])


class SelectivePrefill:
    """Carries plans out on one model.

    Args:
        adapter: the model.

    Raises:
        UnsupportedModelError: if its keys cannot be moved, or a selective pass over exact KV does not give the
            logits of a full prefill.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        require_reuse_off_prefix(adapter.model, adapter.config, adapter.mode)
        self._adapter = adapter
        self._view = LayerView(find_layers(adapter.model, adapter.config), windows_of(adapter.config))
        probe = adapter.probe_ids()
        here, there = (adapter.compute_kv(probe, start) for start in (0, PROBE_SHIFT))
        self.rotations = find_rotations(adapter.model, here, there, PROBE_SHIFT)
        self._prove(probe, here)

    @property
    def windows(self) -> Sequence[int | None]:
        """How many positions each layer sees; None for all."""
        return self._view.windows

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return len(self._view.modules)

    def run(self, plan: ReusePlan, watch: Stopwatch | None = None) -> Outcome:
        """Carry ``plan`` out. Stored references are read, never written. ``watch`` takes the time of each part."""
        watch = watch or Stopwatch()
        if not plan.borrowings:
            with watch.phase("forward"):
                return prefill_behind_prefix(self._adapter, plan)
        with self._adapter.lock(), torch.inference_mode():
            with watch.phase("gather"):
                cache = gather(plan, self.rotations)
            state = _State.of(plan, self._adapter.device)
            if plan.attention_tokens:
                with watch.phase("attend"):
                    state.attended = self._attended(plan, cache)
            state.rank(None)
            with watch.phase("forward"):
                return self._forward(state, cache)

    def _attended(self, plan: ReusePlan, cache: GatheredCache) -> torch.Tensor:
        """[T] how much the question attends to each token, averaged over layers and heads."""
        absent = ~(plan.borrowed | plan.question)
        absent[: plan.prefix_tokens] = False
        layers = self.attention_of(plan.token_ids, plan.question, cache, absent)
        return torch.stack([weights.mean(0).to(self._adapter.device) for weights in layers]).mean(0)

    def _forward(self, state: _State, cache: GatheredCache) -> Outcome:
        plan, num_tokens = state.plan, len(state.plan.token_ids)
        first = _positions(np.arange(num_tokens) >= plan.prefix_tokens, self._adapter.device)
        if not plan.full_layers:
            first = state.active(0).nonzero()[:, 0]
        selective = RowPass(self._view, cache, first, partial(_choose, state, cache), self._adapter.model.dtype)
        looked = int(plan.question.sum()) * self.num_layers if plan.attention_tokens else 0
        try:
            with blocked_attention(self._adapter.config), selective.installed():
                logits = self._adapter.forward_rows(plan.token_ids, first, cache, selective.first_mask)
        except GivenUp:
            whole, wasted = prefill_behind_prefix(self._adapter, plan), selective.row_layers + looked
            ratio = whole.compute_ratio + wasted / (num_tokens * self.num_layers)
            return whole._replace(compute_ratio=ratio, deviation=state.deviation, fell_back=state.fell_back)
        computed = np.zeros(num_tokens, dtype=bool)
        computed[selective.rows.cpu().numpy()] = True
        ratio = (looked + selective.row_layers) / (num_tokens * self.num_layers)
        exact = _exact_tokens(plan, computed)
        return Outcome(Prefill(logits, cache.finished()), ratio, computed, exact, state.deviation, state.fell_back)

    def attention_of(
        self, token_ids: TokenIds, question: Mask, cache: GatheredCache, absent: Mask
    ) -> list[torch.Tensor]:
        """For each layer [heads, T], the attention from ``question`` [T] to each token, averaged over rows.

        A pass of the question alone: ``cache`` takes up its KV. ``absent`` [T] marks tokens that have none yet.
        """
        rows = _positions(question, self._adapter.device)
        hidden = torch.from_numpy(absent).to(rows.device)
        ahead = RowPass(self._view, cache, rows, lambda _, active, __: active, self._adapter.model.dtype, hidden)
        with self._adapter.lock(), watched_attention(self._adapter.config) as collected, ahead.installed():
            self._adapter.forward_rows(token_ids, rows, cache, ahead.first_mask)
        return collected

    def _prove(self, probe: TokenIds, layers: tuple[LayerKV, ...]) -> None:
        """A selective pass over the probe's own KV must end in the logits of its full prefill."""
        name = type(self._adapter.model).__name__
        rules = ReuseConfig(mode="identical", full_layers=1, attention_ratio=0.2, deviation_ratio=0.2)
        run = Run(0, Reference("probe", "probe", probe, layers), 0, len(probe) - 2)
        question = np.arange(len(probe)) >= len(probe) - 2
        plan = build_plan(probe, None, [run], [], question, rules, self.num_layers)
        try:
            logits = self.run(plan).prefill.logits
        except (TypeError, AttributeError, ValueError, RuntimeError, LookupError) as error:
            raise UnsupportedModelError(f"{name} cannot compute some rows alone ({error}); use mode='exact'") from error
        if not self._adapter.is_close(logits, self._adapter.prefill(probe).logits):
            raise UnsupportedModelError(f"{name} gives other logits if some rows are computed alone; use mode='exact'")


def _choose(state: _State, cache: GatheredCache, layer: int, rows: torch.Tensor, measure: Measure) -> torch.Tensor:
    """The rows that ``layer`` goes on with; deviation is measured on the way into the first layer that narrows."""
    plan = state.plan
    if layer < plan.full_layers or state.fell_back:
        return rows
    if layer == plan.measured_layer:
        fresh, gathered = measure(), cache.layers[layer]
        deviations = torch.zeros_like(state.must, dtype=torch.float32)
        deviations[rows] = measure_deviation(fresh, gathered.take(rows)).to(rows.device)
        gathered.put(rows, fresh)
        state.judge(deviations, rows)
        if state.fell_back:
            return rows
    return rows[state.active(layer)[rows]]


def _positions(mask: Mask, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(mask.nonzero()[0]).to(device)
