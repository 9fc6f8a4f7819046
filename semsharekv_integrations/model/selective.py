"""The selective prefill: the model's own layers carry a plan out, on the rows that need it.

SemShareKV (arXiv 2509.24832, section 3): the KV of similar tokens is gathered into the prompt's order, and only some
tokens are computed, fewer with depth. Departs from the paper: borrowed keys are turned to their new position, deviation
is measured behind the full layers, and a short pass of the question over borrowed KV helps to select tokens as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import Mask, Reference, Run, TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter, Prefill
from semsharekv_integrations.model.attention import takes_blocks, watch_operations, watched_attention
from semsharekv_integrations.model.backends import WithoutCudnn
from semsharekv_integrations.model.gathering import GatheredCache, gather
from semsharekv_integrations.model.layers import INSTEAD, make_cache, require_reuse_off_prefix
from semsharekv_integrations.model.probing import Probe, probe_model, short_windows, try_views
from semsharekv_integrations.model.rotations import PROBE_SHIFT
from semsharekv_integrations.model.rows import Measure, Positions, RowPass, Stopped, keep_all
from semsharekv_integrations.model.views import LayerView, list_windows
from semsharekv_integrations.report import Stopwatch
from semsharekv_integrations.reuse.plan import ReusePlan, build_plan
from semsharekv_integrations.reuse.selection import Signal, measure_deviation, measure_reading, rank_tokens


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


def prefill_behind_prefix(adapter: ModelAdapter, plan: ReusePlan, checkpoints: Sequence[int] = ()) -> Outcome:
    """Compute everything behind the prefix of ``plan``, ignoring what else it borrows, and return the outcome.

    For ``checkpoints`` see ``ModelAdapter.prefill``.
    """
    computed = np.arange(len(plan.token_ids)) >= plan.prefix_tokens
    prefill = adapter.prefill(plan.token_ids, plan.prefix, checkpoints)
    return Outcome(prefill, float(computed.mean()), computed, _count_exact(plan, computed))


def _count_exact(plan: ReusePlan, computed: Mask) -> int:
    """Return how many leading tokens rest on nothing approximate; ``sys.maxsize`` if all of them do."""
    return min(_count_computed_exactly(plan, computed), plan.own_tokens)


def _count_computed_exactly(plan: ReusePlan, computed: Mask) -> int:
    """Return how many leading tokens have the KV of a full prefill of what was read; ``sys.maxsize`` if all have."""
    if plan.prefix and plan.prefix.reference.is_tainted:
        exact = plan.prefix.reference.exact_tokens or 0
        if exact < plan.prefix_tokens:
            return exact
    borrowed = np.flatnonzero(~computed[plan.prefix_tokens :])
    return plan.prefix_tokens + int(borrowed[0]) if len(borrowed) else sys.maxsize


class SelectivePrefill:
    """Carries plans out on one model. Making one runs probes on the model.

    Raises:
        UnsupportedModelError: if the model's keys cannot be moved, or a selective pass over exact KV does not give the
            logits of a full prefill.
    """

    def __init__(self, adapter: ModelAdapter) -> None:
        require_reuse_off_prefix(adapter.model, adapter.config, adapter.mode)
        if adapter.way.keeps_states:
            kept = "keeps more than KV per token, such as a recurrent state, which cannot be moved"
            raise UnsupportedModelError(f"{type(adapter.model).__name__} {kept}; {INSTEAD}")
        self._adapter = adapter
        with short_windows(adapter):
            probe = probe_model(adapter)
            by_positions = adapter.way.in_blocks and takes_blocks(adapter.config)
            self._view, self.rotations = replace(probe.view, by_positions=by_positions), probe.rotations
            self.num_layers = len(self._view.modules)
            self._require_same_logits(probe)
        self._view = replace(self._view, windows=list_windows(adapter.config))

    def find_frequencies(self) -> Tensor | None:
        """Return the inverse frequencies [R] of the first layer that turns keys; None if none does."""
        turning = (part for layer in self.rotations for part in layer if part is not None)
        return next((rotation.inverse_frequencies for rotation in turning), None)

    @property
    def counts_tokens(self) -> bool:
        """Whether biases of attention (ALiBi) go by the number of tokens in the cache."""
        return self._view.takes_lengths

    def run(self, plan: ReusePlan, watch: Stopwatch | None = None) -> Outcome:
        """Prefill by ``plan`` and return the outcome; references are never written. ``watch`` gets each part's time.

        Raises:
            UnservedError: if the plan has substitutions and the borrowed KV deviates too much.
        """
        watch = watch or Stopwatch()
        if not plan.borrowings:
            with watch.phase("forward"):
                return prefill_behind_prefix(self._adapter, plan)
        with self._adapter.lock(), torch.inference_mode():
            with watch.phase("gather"):
                cache = gather(plan, self.rotations)
            selection = _Selection(plan, cache, self._view.places)
            if plan.attention_tokens:
                with watch.phase("attend"):
                    selection.attended = self._attend(plan, cache).cpu()  # all that is ranked by, in one transfer
            selection.rank(None)
            with watch.phase("forward"):
                return self._forward(selection)

    def _attend(self, plan: ReusePlan, cache: GatheredCache) -> Tensor:
        """Return [T] how much each token adds to what the question reads; writes the question's KV to ``cache``."""
        absent = ~(plan.borrowed | plan.question)
        absent[: plan.prefix_tokens] = False
        layers = self.watch_attention(plan.token_ids, plan.question, cache, absent, plan.looked_layers)
        # where values turn, they are the latent keys' positions, and what is read stands in the keys
        kept = [
            layer.keys if rotation.values else layer.values
            for layer, rotation in zip(cache.layers, self.rotations, strict=True)
        ]
        read = [measure_reading(*pair) for pair in zip(layers, kept, strict=False)]
        return torch.stack([amounts.to(self._adapter.device) for amounts in read]).mean(0)

    def watch_attention(
        self, token_ids: TokenIds, question: Mask, cache: GatheredCache, absent: Mask, num_layers: int | None = None
    ) -> list[Tensor]:
        """Return for each layer of ``cache`` the attention [heads, T] from ``question`` [T], averaged over its rows.

        Runs the question alone through the first ``num_layers`` (None: all), and writes its KV to ``cache``, in those
        alone. Tokens ``absent`` [T] have no KV and are not seen.
        """
        adapter, rows = self._adapter, np.flatnonzero(question)
        stop = self.num_layers if num_layers is None else num_layers
        ahead = RowPass(self._view, cache, rows, keep_all, adapter.dtype, adapter.device, absent, stop)
        if self._view.by_operations:
            watch = watch_operations(len(rows), len(token_ids))
        else:
            watch = watched_attention(adapter.config)
        with adapter.lock(), watch as collected, ahead.install(), suppress(Stopped):
            adapter.forward_rows(token_ids, ahead.first, cache, ahead.given_mask)
        return self._view.share_out(collected, stop)

    def _forward(self, selection: _Selection) -> Outcome:
        """Run the selective pass and return its outcome; if it gives up, that of all behind the prefix, or raise."""
        adapter, plan, cache = self._adapter, selection.plan, selection.cache
        token_layers = len(plan.token_ids) * self.num_layers
        first = np.arange(plan.prefix_tokens, len(plan.token_ids)) if plan.full_layers else selection.select(0)
        rows = RowPass(self._view, cache, first, selection.choose, adapter.dtype, adapter.device)
        looked = int(plan.question.sum()) * plan.looked_layers if plan.attention_tokens else 0
        try:
            with adapter.attention(), rows.install(), self._avoid_cudnn():
                logits = adapter.forward_rows(plan.token_ids, rows.first, cache, rows.given_mask)
        except _GivenUp:
            if plan.substitutions:
                spent = looked + rows.row_layers
                raise UnservedError(str(selection.fell_back), spent, selection.deviation) from None
            whole = prefill_behind_prefix(adapter, plan)
            ratio = whole.compute_ratio + (looked + rows.row_layers) / token_layers
            return whole._replace(compute_ratio=ratio, deviation=selection.deviation, fell_back=selection.fell_back)
        computed = np.zeros(len(plan.token_ids), dtype=bool)
        computed[rows.positions] = True
        ratio = (looked + rows.row_layers) / token_layers
        prefill = Prefill(logits, make_cache(adapter.read_layers(cache)))  # which decoding lets grow
        exact = _count_exact(plan, computed)
        return Outcome(prefill, ratio, computed, exact, selection.deviation, selection.fell_back)

    def _avoid_cudnn(self) -> AbstractContextManager[object]:
        """Return what keeps cuDNN out of attention that models compute by code of their own."""
        own = self._adapter.device.type == "cuda" and not self._view.by_positions
        return WithoutCudnn() if own else nullcontext()

    def _require_same_logits(self, probe: Probe) -> None:
        """Raise ``UnsupportedModelError`` unless selective passes over moved exact KV give a full prefill's logits."""
        name, wanted = type(self._adapter.model).__name__, self._adapter.prefill(probe.token_ids).logits
        for full_layers in (0, 1):
            plan = self._plan_move(probe, full_layers)
            self._view, found = try_views(self._view, partial(self._run_on, plan, wanted), name)
            if not self._adapter.is_close(found, wanted):
                raise UnsupportedModelError(
                    f"{name} gives other logits if some rows are computed alone; use mode='exact'"
                )

    def _run_on(self, plan: ReusePlan, wanted: Tensor, view: LayerView) -> Tensor:
        """Return the logits of ``run``, with ``view`` from now on.

        Raises:
            ValueError: if they are not ``wanted`` where positions decide what is seen: masks may do better.
        """
        self._view = view
        logits = self.run(plan).prefill.logits
        if view.by_positions and not self._adapter.is_close(logits, wanted):
            raise ValueError("other logits where positions decide what is seen")
        return logits

    def _plan_move(self, probe: Probe, full_layers: int) -> ReusePlan:
        """Return a plan that moves the probe back to the first place, and computes a few of its tokens, whatever."""
        rules = ReuseConfig(
            mode="identical",
            full_layers=full_layers,
            attention_ratio=0.2,
            deviation_ratio=0.2 * full_layers,
            boundary_tokens=1,
            max_deviation=sys.float_info.max,
        )
        num_tokens = len(probe.token_ids)
        ids = np.concatenate([np.zeros(PROBE_SHIFT, dtype=np.int64), probe.token_ids])
        run = Run(0, Reference("probe", "probe", ids, probe.moved), PROBE_SHIFT, num_tokens - 2)
        question = np.arange(num_tokens) >= num_tokens - 2
        return build_plan(probe.token_ids, None, [run], [], question, rules, self.num_layers)


class _GivenUp(Exception):
    """The borrowed KV deviates too much, and what was left out cannot be computed now: rows, or the prompt as asked."""


class UnservedError(Exception):
    """A prompt with substitutions has to be read as it was asked, because borrowed KV deviates too much.

    Attributes:
        reason: in words.
        row_layers: how many rows were computed in vain, summed over layers.
        deviation: of the borrowed KV.
    """

    def __init__(self, reason: str, row_layers: float, deviation: float | None) -> None:
        super().__init__(reason)
        self.reason, self.row_layers, self.deviation = reason, row_layers, deviation

    def charge(self, outcome: Outcome, num_layers: int) -> Outcome:
        """Return ``outcome``, that of the prompt as it was asked, with what was spent in vain, and why."""
        ratio = outcome.compute_ratio + self.row_layers / (len(outcome.computed) * num_layers)
        return outcome._replace(compute_ratio=ratio, deviation=self.deviation, fell_back=self.reason)


class _Selection:
    """Which tokens each layer of one selective pass computes, and what is known so far to choose them by."""

    def __init__(self, plan: ReusePlan, cache: GatheredCache, places: Sequence[tuple[int, ...]]) -> None:
        self.plan = plan
        # the one to measure, or the last before it that keeps keys and values: the last ones may read another's
        self._measured_layer = plan.measured_layer
        while self._measured_layer < len(places) and not places[self._measured_layer]:
            self._measured_layer -= 1
        self.cache = cache
        # borrowed: without boundary tokens, so that deviation tells how good borrowing is
        self._optional, self._borrowed = torch.from_numpy(plan.optional), plan.optional | plan.relevant
        self._priority: Tensor | None = None
        self._last_share: float | None = None  # by which the rows that go on were chosen
        self.attended: Tensor | None = None  # [T] by the question, if the plan asks for it, on the host
        self.deviation: float | None = None  # as in ``Outcome``, once it is measured
        self.fell_back: str | None = None  # why everything is computed from here on

    def rank(self, deviations: Tensor | None) -> None:
        """Set each optional token's priority, which ``select`` reads, by attention and ``deviations`` [T] if known."""
        signals = []
        if self.attended is not None:
            signals.append(Signal(self.attended, self.plan.attention_tokens))
        if deviations is not None:
            signals.append(Signal(deviations, self.plan.deviation_tokens))
        self._priority, self._last_share = rank_tokens(signals, self._optional), None

    def select(self, layer: int) -> Positions:
        """Return the tokens [N] that ``layer`` computes, ascending; ``rank`` must have been called."""
        assert self._priority is not None, "priorities are known"
        self._last_share = self.plan.shares[layer]
        return np.flatnonzero(self.plan.must | (self._priority < self._last_share).numpy())

    def choose(self, layer: int, rows: Positions, measure: Measure) -> Positions:
        """Return the rows ``layer`` computes. At the measured layer, write fresh KV and judge it as ``_judge`` does."""
        if layer < self.plan.full_layers or self.fell_back:
            return rows
        if layer == self._measured_layer:
            fresh = measure()
            found = measure_deviation(fresh.kv, fresh.gathered.take(fresh.rows)).cpu()
            fresh.gathered.put(fresh.rows, fresh.kv)
            self._judge(found, rows)
            if self.fell_back:
                return rows
        return rows if self.plan.shares[layer] == self._last_share else self.select(layer)

    def _judge(self, found: Tensor, rows: Positions) -> None:
        """Set ``deviation`` by what was ``found`` [N] of ``rows`` [N]; ``fell_back`` if it is too high.

        Behind full layers, rank the tokens by it too.

        Raises:
            _GivenUp: if it is too high and there are no full layers, so that some rows have no hidden states.
        """
        measured = torch.from_numpy(self._borrowed[rows])
        if measured.any():
            self.deviation = float(found[measured].mean())
        if self.deviation is not None and self.deviation > self.plan.max_deviation:
            self.fell_back = f"deviation of {self.deviation:.2f} is above max_deviation"
            if not self.plan.full_layers or self.plan.substitutions:
                raise _GivenUp
        if self.plan.full_layers:
            deviations = torch.zeros(len(self.plan.token_ids))
            deviations[torch.from_numpy(rows)] = found
            self.rank(deviations)
