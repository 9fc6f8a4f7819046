"""Decode steps of several calls at once: one forward pass for those who ask for a token at about the same time.

While the same calls come together, their KV lies in one joint cache, padded on the left. Else each has its own again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from semsharekv_integrations.concurrency.scheduler import get_current_job
from semsharekv_integrations.concurrency.threads import tell_of_forks
from semsharekv_integrations.kv import LayerKV
from semsharekv_integrations.logs import log_trouble
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.continuing import has_kv_alone
from semsharekv_integrations.model.drafting import PassCosts
from semsharekv_integrations.model.layers import make_cache
from semsharekv_integrations.model.relief import DeviceMemoryError, Relief

PATIENCE_S = 0.005  # a step waits so long for calls that are still at their last token; a forward pass takes longer
_PROBE_TOKENS = (7, 4)


class Row:
    """One call's place: what its thread asks for, and the logits or error that whoever computes the step leaves it."""

    def __init__(self) -> None:
        self.waits = self.late = self.shares = self.has_left = False  # late: nobody waits for its step
        self.thread = 0
        self.call = get_current_job()
        self.ids = torch.empty(1, 0)
        self.cache = DynamicCache()
        self.num_stored = 0  # tokens that have KV in the joint cache
        self.logits: Tensor | None = None
        self.error: Exception | None = None

    @property
    def is_driven(self) -> bool:
        """Return True if a thread works on the call, so may ask for a step; if the call has no job, not this thread."""
        if self.call is None:  # a thread that takes turns between calls waits for none of its own
            return self.thread != threading.get_ident()
        return self.call.is_driven


class SharedDecoding:
    """Brings together the decode steps of all calls of one engine, at most ``max_batch_size`` in one forward pass.

    A model that does not give the same logits in a padded batch, which is tried once, decodes each call by itself.

    Attributes:
        costs: of passes for one call by itself.
    """

    def __init__(self, adapter: ModelAdapter, max_batch_size: int, relief: Relief | None = None) -> None:
        self.costs = PassCosts(on_cpu=adapter.device.type == "cpu")
        self._adapter = adapter
        self._max_batch_size = max_batch_size
        self._relief = relief or Relief(adapter)
        self._is_allowed: bool | None = None
        self.go_on_in_child()
        tell_of_forks(self)

    def go_on_in_child(self) -> None:
        """Forget all calls and their KV, with a new lock: at the start, and in a forked child; no cache is restored."""
        self._turn = threading.Condition()
        self._is_busy = False  # caches are being moved or computed: see ``leave``
        self._rows: list[Row] = []
        self._group: list[Row] = []  # whose KV is in ``_joint``
        self._joint = DynamicCache()  # [B, H, T, D], each row at the end, behind padding
        self._pads: Sequence[int] = ()  # of each row of the group
        self._places = torch.empty(2, 0)  # these and the rows' next positions, [2, B], where the model is

    def join(self) -> Row:
        """Add a call and return its place, to be given to ``step`` and, in the end, to ``leave``."""
        row = Row()
        with self._turn:
            self._rows.append(row)
        return row

    def step(self, row: Row, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Return logits [B, V] after ``ids`` [B, T], or raise the pass's error. ``leave`` makes ``cache`` whole."""
        with self._turn:
            takes = self._takes(cache)
        if not takes:
            return self._relief.decode_step(ids, cache)
        with self._turn:
            row.ids, row.cache, row.thread = ids, cache, threading.get_ident()
            row.waits, row.late, row.shares = True, False, True
            self._turn.notify_all()
            self._turn.wait_for(lambda: not (row.waits and self._list_missing()), PATIENCE_S)
            if row.waits:
                for other in self._list_missing():
                    other.late = True  # nobody waits for it again until it is back
                self._work([row, *(other for other in self._rows if other.waits and other is not row)])
            logits, error, row.logits, row.error = row.logits, row.error, None, None
        if error is not None:
            raise error
        assert logits is not None
        return logits

    def decodes_alone(self, cache: DynamicCache) -> bool:
        """Return True if the next step of a call with ``cache`` is its own: no other call is here that could join."""
        with self._turn:
            return not self._takes(cache)

    def leave(self, row: Row) -> None:
        """Take ``row`` out. Its cache has its KV again on return, unless this thread was in the middle of a step."""
        # The garbage collector may end a stream in any thread, also in one that is at work here. Such a call leaves
        # when that is done, without its KV, which nobody keeps then.
        with self._turn:
            row.has_left = True
            if not self._is_busy:
                self._work([])
            self._turn.notify_all()

    def _work(self, waiting: list[Row]) -> None:
        """Advance ``waiting``. Then drop rows that left; if one was in the group, give its members their KV back."""
        self._is_busy = True
        try:
            if waiting:
                self._advance(waiting)
            while gone := [row for row in self._rows if row.has_left]:
                if any(row in self._group for row in gone):
                    self._split()
                self._rows = [row for row in self._rows if row not in gone]
        finally:
            self._is_busy = False

    def _takes(self, cache: DynamicCache) -> bool:
        """Return True if other calls are here and model and cache allow joining. Probes the model once; logs a no."""
        if len(self._rows) == 1 or self._max_batch_size == 1 or self._adapter.stable_positions is not None:
            return False
        layers = cache.layers
        if not has_kv_alone(cache) or len({x.keys.shape[2] for x in layers}) != 1:
            return False
        if self._is_allowed is None:
            try:
                self._is_allowed = self._relief.run("a batch that is tried", self._is_same_in_batches)
            except DeviceMemoryError:  # not now
                return False
            if not self._is_allowed:
                log_trouble("unbatched")
        return self._is_allowed

    def _list_missing(self) -> list[Row]:
        """Return the calls worth waiting for: those about to ask for a token; none if a whole batch waits already."""
        if sum(row.waits for row in self._rows) >= self._max_batch_size:
            return []
        return [row for row in self._rows if row.shares and row.is_driven and not (row.waits or row.late)]

    def _advance(self, waiting: list[Row]) -> None:
        """Give the first ``max_batch_size`` of ``waiting`` logits or an error. If a batch fails, try each row alone."""
        rows = [row for row in self._rows if row in waiting[: self._max_batch_size]]
        try:
            for row, logits in zip(rows, self._forward(rows), strict=True):
                row.logits = logits[None]
        except Exception as error:
            self._split()
            for row in rows:
                if len(rows) == 1:
                    row.error = error
                else:  # each by itself: one that cannot go on does not take the others down
                    self._advance([row])
        for row in rows:
            row.waits = False
        self._turn.notify_all()

    def _forward(self, rows: Sequence[Row]) -> Tensor:
        """Run one step and return logits [B, V]: of one row on its own cache, of several on the joint one."""
        if len(rows) == 1:
            self._split()
            return self._relief.decode_step(rows[0].ids, rows[0].cache)
        if rows != self._group:
            self._split()
            self._merge(rows)
        last = torch.cat([row.ids[:, -1:] for row in rows])
        pads, positions = self._places
        logits = self._adapter.decode_padded(last, self._joint, positions, pads)
        positions += 1
        for row in rows:
            row.num_stored += 1
        return logits

    def _merge(self, rows: Sequence[Row]) -> None:
        """Make ``rows`` the group: move their KV into a new joint cache and leave their own caches empty."""
        self._joint, self._pads = merge_caches([row.cache for row in rows])
        self._group = list(rows)
        positions = [row.ids.shape[1] - 1 for row in rows]
        self._places = torch.tensor([self._pads, positions], device=self._adapter.device)
        for row in rows:
            row.num_stored = row.cache.layers[0].keys.shape[2]
            for layer in row.cache.layers:  # [B, H, 0, D] of [B, H, T, D]
                layer.keys, layer.values = (
                    t.new_empty((*t.shape[:2], 0, t.shape[3])) for t in (layer.keys, layer.values)
                )

    def _split(self) -> None:
        """Give every call of the group its KV back in its own cache, and empty the group."""
        if self._group:
            self._relief.run(f"the KV of {len(self._group)} calls apart", self._copy_back)
        self._group, self._joint, self._pads = [], DynamicCache(), ()

    def _copy_back(self) -> None:
        """Copy the KV of every call of the group into its own cache. The joint cache stays."""
        for index, (row, padding) in enumerate(zip(self._group, self._pads, strict=True)):
            place = (slice(index, index + 1), slice(None), slice(padding, padding + row.num_stored))
            for own, joint in zip(row.cache.layers, self._joint.layers, strict=True):
                own.keys, own.values = joint.keys[place].clone(), joint.values[place].clone()

    def _is_same_in_batches(self) -> bool:
        """Decode two probes in a batch. Return True if logits are as for each alone, False too if the model refuses."""
        adapter = self._adapter
        if not adapter.accepts_padding:
            return False
        probes = [adapter.probe_ids()[: size + 1] for size in _PROBE_TOKENS]
        alone = [adapter.prefill(ids).logits for ids in probes]
        joint, pads = merge_caches([adapter.prefill(ids[:-1]).cache for ids in probes])
        last = torch.tensor([[ids[-1]] for ids in probes])
        places = torch.tensor([_PROBE_TOKENS, pads], device=adapter.device)
        try:
            together = adapter.decode_padded(last, joint, *places)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError):  # the model takes no such mask
            return False
        return all(adapter.is_close(one[None], other) for one, other in zip(together, alone, strict=True))


def merge_caches(caches: Sequence[DynamicCache]) -> tuple[DynamicCache, list[int]]:
    """Return one new cache [B, H, T, D] of copies, each padded on the left to end together, and the padding of each."""
    lengths = [cache.layers[0].keys.shape[2] for cache in caches]
    pads = [max(lengths) - length for length in lengths]

    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([pad(tensor, (0, 0, slots, 0)) for tensor, slots in zip(tensors, pads, strict=True)])

    with torch.inference_mode():
        joint = make_cache(
            LayerKV(stack([part.keys for part in parts]), stack([part.values for part in parts]))
            for parts in zip(*(cache.layers for cache in caches), strict=True)
        )
    return joint, pads
