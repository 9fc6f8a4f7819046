"""One loaded model: what it allows, prefill behind a reused prefix, and single decode steps.

Knows transformers' caches and attention masks. Reused keys stand at their old positions here, so nothing is rotated.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from semsharekv_integrations.concurrency.threads import free_in_children
from semsharekv_integrations.config import Mode
from semsharekv_integrations.errors import UnsupportedModelError, is_whole, require
from semsharekv_integrations.kv import LayerKV, PrefixMatch, Reference, State, TokenIds, take_first_tokens
from semsharekv_integrations.model.attention import blocked_attention
from semsharekv_integrations.model.checkpoints import OwnCache, StateCache, list_tensors
from semsharekv_integrations.model.continuing import Continuation, find_continuation
from semsharekv_integrations.model.layers import (
    find_cache_argument,
    find_input_device,
    has_plain_embeddings,
    list_handed_on,
    list_left_out,
    make_cache,
    read_embeddings,
    require_decoder,
    require_plain_adapters,
    require_text_alone,
)
from semsharekv_integrations.model.sight import Block, Rows, blocks_of
from semsharekv_integrations.model.state import LENGTH_DEPENDENT_ROPE, StateWatch
from semsharekv_integrations.model.transfers import send
from semsharekv_integrations.store.homes import Homes

_PROBE_TOKENS = 12
# How far logits may be from equal ones by rounding, as a share of their spread: in float32; in half precision; there at
# most, in models that round much. A token or a window that is missing makes 0.3 to 2.
_ROUNDING, _HALF_ROUNDING, _MOST_ROUNDING = 2.5e-4, 0.1, 0.2
_KEEP_IN_MODULES, _READ_WHOLE = "recurrent_gemma", "cpmant"  # types
_SCALE_BY_SLOTS = "llama4_text"  # far in a text, and no probe is so long
_OFF_ALONE = {
    _KEEP_IN_MODULES: "keeps the state of the text that it read last in its modules, and in no cache",
    _READ_WHOLE: "takes the whole text in every pass, cached or not",
}
_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()  # one for all engines that share a model
_LATEST: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()  # id of the cache that it ran with last


class Prefill(NamedTuple):
    """Logits of the last prompt token [B, V], and the cache that decoding goes on with."""

    logits: Tensor
    cache: DynamicCache


class ModelAdapter:
    """A transformers causal language model as the engine sees it. A lock serializes its forward passes.

    Sets the model to eval mode. ``watch`` tells the model's state; None makes a new one.

    Raises:
        UnsupportedModelError: if the model is no decoder, takes no cache, or has an unfit adapter or no weights; unless
            ``mode`` is ``off`` also if it cannot go on from a stored prefix (which a probe tries).
    """

    def __init__(self, model: PreTrainedModel, mode: Mode, watch: StateWatch | None = None) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)
        self.mode = mode
        self.watch = watch or StateWatch(model)
        self._lock = _LOCKS.setdefault(model, free_in_children(threading.RLock()))
        require_decoder(model.config, type(model).__name__)
        require_plain_adapters(model)
        if not model.can_generate():
            raise UnsupportedModelError(f"{type(model).__name__} is not a causal language model")
        find_input_device(model)  # a model without weights is refused here
        with self._lock:
            require_text_alone(model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT adapter
        own = frozenset(inspect.signature(type(base).forward).parameters)
        self._accepts = (own | list_handed_on(base)) - list_left_out(base)
        self.takes_positions = "position_ids" in self._accepts
        # Whether queries are scaled by how many slots the cache has, whatever is in them
        self.counts_slots = self.config.model_type == _SCALE_BY_SLOTS and bool(self.config.attn_temperature_tuning)
        # Whether a pass can be told which slots of a batch are padding, and each row's position
        self.accepts_padding = {"attention_mask", "position_ids"} <= own and not self.counts_slots
        self._cache_argument = find_cache_argument(type(base))
        self.way = Continuation() if mode == "off" else find_continuation(self, _OFF_ALONE.get(self.config.model_type))

    def prefill(
        self, token_ids: TokenIds, prefix: PrefixMatch | None = None, checkpoints: Sequence[int] = ()
    ) -> Prefill:
        """Run the tokens [T] that ``prefix`` does not cover, at least one; return last logits and cache of all.

        The reference's tensors are read, never written: the cache's first update makes new ones. The cache of a model
        that keeps states has one behind each number of tokens in ``checkpoints``, which ascend.
        """
        start = prefix.num_tokens if prefix else 0
        assert 0 <= start < len(token_ids), "at least one prompt token is computed"
        cache = self._restore(prefix) if prefix else self._make_empty_cache()
        for stop in checkpoints if isinstance(cache, StateCache) else ():
            if start < stop < len(token_ids):
                self.forward(token_ids[start:stop], cache, start)
                cache.keep_state()
                start = stop
        return Prefill(self.forward(token_ids[start:], cache, start), cache)

    def _restore(self, prefix: PrefixMatch) -> DynamicCache:
        """Return a new cache of the tokens of ``prefix``."""
        layers = take_first_tokens(prefix.reference.layers, prefix.num_tokens)
        if not self.way.keeps_states:
            return make_cache(layers)
        state = prefix.reference.checkpoints[prefix.num_tokens]
        return StateCache.restore(self.model.config, list(layers), state, self.homes)

    def forward(self, token_ids: TokenIds, cache: DynamicCache, start: int) -> Tensor:
        """Run ``token_ids`` [N] from position ``start`` on, add KV to ``cache``, return logits [B, V] of the last."""
        positions = torch.arange(start, start + len(token_ids))
        ids = torch.from_numpy(token_ids)[None]
        if start and self.way.one_by_one:
            return self._forward_each(ids, cache, start)[-1:]
        if not start:
            return self._forward(ids, cache, positions)
        with self._lock, self.attention(blocks_of(positions.numpy(), self.device.type)):
            return self._forward(ids, cache, positions)

    def attention(self, blocks: Sequence[Block] = ()) -> AbstractContextManager[None]:
        """Compute attention by ``blocks`` inside, if the model's may be."""
        return blocked_attention(self.config, blocks) if self.way.in_blocks else nullcontext()

    def _forward_each(self, ids: Tensor, cache: DynamicCache, start: int) -> Tensor:
        """Run ``ids`` [B, N] one after another from position ``start`` on; return the logits [N, V] of one row each."""
        each = enumerate(ids.split(1, dim=1), start)
        return torch.cat([self._forward(one, cache, torch.tensor([position])) for position, one in each])

    def forward_rows(self, token_ids: TokenIds, rows: Rows, cache: DynamicCache, mask: Tensor) -> Tensor:
        """Run ``rows`` [N] of a prompt [T] with ``mask`` and ``cache``; return the last one's logits [B, V]."""
        ids = torch.from_numpy(token_ids[rows.positions])
        return self._forward(ids[None], cache, rows.on_device, attention_mask=mask)

    def decode_step(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Run the last of ``ids`` [B, T] (at a rope's limit all), add KV to ``cache``, return next logits [B, V]."""
        position = ids.shape[1] - 1
        # transformers' own ``generate`` starts again with an empty cache there: Phi-3 and kin switch their rope
        if self.stable_positions and position == getattr(self.config, "original_max_position_embeddings", None):
            return self.compute_anew(ids, cache)
        if self.config.model_type == _READ_WHOLE:
            return self._forward(ids, cache, torch.arange(position + 1))
        return self._forward(ids[:, -1:], cache, torch.arange(position, position + 1, device=self.device))

    def compute_anew(self, ids: Tensor, cache: DynamicCache) -> Tensor:
        """Run all of ``ids`` [B, T] in an empty cache, whose content ``cache`` takes; return next logits [B, V]."""
        fresh = self._make_empty_cache()
        logits = self._forward(ids, fresh, torch.arange(ids.shape[1]))
        vars(cache).update(vars(fresh))
        if self.model in _LATEST:
            _LATEST[self.model] = id(cache)
        return logits

    def verify(self, ids: Tensor, cache: DynamicCache, start: int) -> Tensor:
        """Run ``ids`` [B, N] from position ``start`` on, add KV to ``cache``; return logits [N, V] behind each."""
        positions = torch.arange(start, start + ids.shape[1], device=self.device)
        with self._lock, self.attention(blocks_of(range(start, start + ids.shape[1]), self.device.type)):
            return self._forward(ids, cache, positions, keep=ids.shape[1])[0]

    @property
    def takes_drafts(self) -> bool:
        """Whether ``verify`` gives what single steps do, and its KV can be cut off again. Not known in mode ``off``."""
        is_plain = not (self.way.keeps_states or self.way.one_by_one)
        return self.mode != "off" and is_plain and self.stable_positions is None

    def decode_padded(self, ids: Tensor, cache: DynamicCache, positions: Tensor, pads: Tensor) -> Tensor:
        """Run ``ids`` [B, 1] at ``positions`` [B], add KV, return logits [B, V]; first ``pads`` [B] slots are empty."""
        slots = torch.arange(cache.layers[0].keys.shape[2] + 1, device=pads.device)
        return self._forward(ids, cache, positions[:, None], attention_mask=(slots >= pads[:, None]).long())

    def _forward(self, ids: Tensor, cache: DynamicCache, positions: Tensor, keep: int = 0, **more: Tensor) -> Tensor:
        """Run ``ids`` [B, N] at ``positions``, add KV to ``cache``; return the last logits [B, V], or [B, keep, V]."""
        place = send(positions, self.device).expand(len(ids), -1)
        inputs: dict[str, Any] = {"position_ids": place, "logits_to_keep": max(keep, 1), **more}
        inputs[self._cache_argument] = cache.own if isinstance(cache, OwnCache) else cache
        accepted = {name: value for name, value in inputs.items() if name in self._accepts}
        with self._lock, torch.inference_mode():
            self._require_in_turn(cache, positions)
            self.watch.glance()
            output = self.model(input_ids=send(ids, self.device), use_cache=True, **accepted)
        if isinstance(cache, StateCache):
            cache.num_tokens += ids.shape[1]
        if isinstance(cache, OwnCache):
            cache.own = output[self._cache_argument]
        return output.logits[:, -keep:] if keep else output.logits[:, -1]

    def _require_in_turn(self, cache: DynamicCache, positions: Tensor) -> None:
        """Raise ``RuntimeError`` if the model keeps its state in modules, and other calls ran since ``cache`` did."""
        if self.config.model_type != _KEEP_IN_MODULES:
            return
        if positions.flatten()[0] and _LATEST.get(self.model) != id(cache):
            name = f"{type(self.model).__name__} {_OFF_ALONE[_KEEP_IN_MODULES]}"
            raise RuntimeError(f"{name}, so calls cannot overlap; run one after the other")
        _LATEST[self.model] = id(cache)

    def _make_empty_cache(self) -> DynamicCache:
        """Return, in mode ``off``, the cache transformers would use; else one that keeps every token, or states."""
        if not self.model._supports_default_dynamic_cache():
            return OwnCache()
        if self.way.keeps_states:
            return StateCache(self.model.config)
        return DynamicCache(config=self.model.config) if self.mode == "off" else DynamicCache()

    def compute_logits(self, token_ids: TokenIds, answered: TokenIds) -> Tensor:
        """Prefill ``token_ids`` without reuse; return logits [N + 1, V] after them and each of ``answered`` [N]."""
        return self._follow(self.prefill(token_ids), len(token_ids), answered)

    def trace_answer(self, prefill: Prefill, token_ids: TokenIds, answered: TokenIds) -> Tensor:
        """Return logits [N + 1, V] behind the prompt ``token_ids`` [T] and behind each of ``answered`` [N].

        ``prefill`` is the prompt's, in any mode but ``off``; its cache may hold an answer by now, and stays as it is.
        """
        end, cache = len(token_ids), prefill.cache
        kept = Reference("traced", "traced", token_ids, self.read_layers(cache))
        if isinstance(cache, StateCache):  # which has a checkpoint before the last token, and cannot be cut elsewhere
            kept = replace(kept, checkpoints=cache.checkpoints)
            again = self.prefill(token_ids, PrefixMatch(kept, end - 1))
        else:
            again = Prefill(prefill.logits, self._restore(PrefixMatch(kept, end)))
        return self._follow(again, end, answered)

    def _follow(self, prefill: Prefill, start: int, answered: TokenIds) -> Tensor:
        """Run ``answered`` [N] from position ``start`` on, add KV to the cache; return logits [N + 1, V]."""
        logits = [prefill.logits]
        if len(answered) and self.way.one_by_one:
            logits.append(self._forward_each(torch.from_numpy(answered)[None], prefill.cache, start))
        elif len(answered):
            positions = torch.arange(start, start + len(answered))
            ids = torch.from_numpy(answered)[None]
            logits.append(self._forward(ids, prefill.cache, positions, keep=len(answered))[0])
        return torch.cat(logits)

    def compute_kv(self, token_ids: TokenIds, start: int) -> tuple[LayerKV, ...]:
        """Run ``token_ids`` [N] alone, at positions from ``start`` on, and return each layer's KV."""
        cache = self._make_empty_cache()
        self.forward(token_ids, cache, start)
        return self.read_layers(cache)

    def read_layers(self, cache: DynamicCache) -> tuple[LayerKV, ...]:
        """Return each layer's keys and values, not copied; ``AssertionError`` if layers differ in number of tokens."""
        if isinstance(cache, StateCache):
            return cache.read_kv()
        layers = tuple(LayerKV(layer.keys, layer.values) for layer in cache.layers)
        assert len({tensor.shape[2] for layer in layers for tensor in layer}) == 1, "layers differ in length"
        return layers

    def read_states(self, cache: DynamicCache) -> dict[int, State] | None:
        """Return the states of ``cache`` at its checkpoints and where it is now; None if the model keeps none."""
        if not isinstance(cache, StateCache):
            return None
        cache.keep_state()
        return dict(cache.checkpoints)

    def measure_kv(self, cache: DynamicCache) -> int:
        """Return the bytes of all keys, values and states in ``cache``, not of checkpoints."""
        kept = (tensor for layer in cache.layers for _, tensor in list_tensors(layer) if tensor.ndim)
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def embed(self, token_ids: TokenIds) -> Tensor:
        """Return input embeddings [N, hidden] of ``token_ids``, looked up anew, on ``device`` (the paper's E-cache)."""
        matrix = self.embedding_matrix
        return matrix[torch.from_numpy(token_ids).to(matrix.device)].to(self.device)

    @property
    def embedding_matrix(self) -> Tensor:
        """Return the input embeddings of all tokens [V, hidden]; if they are packed or offloaded, read only once."""
        return read_embeddings(self.model) if has_plain_embeddings(self.model) else self._unpacked_matrix

    @cached_property
    def _unpacked_matrix(self) -> Tensor:
        return read_embeddings(self.model)  # once, as every look would read a file or unpack all of them

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the model computes in: that of its weights, past those in fewer than 16 bits."""
        if self.model.dtype.itemsize >= 2:
            return self.model.dtype
        wide = (w.dtype for w in self.model.parameters() if w.is_floating_point() and w.itemsize >= 2 and w.numel() > 1)
        return next(wide, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Return the device that token ids are put on: of a model on several ones, that of its embeddings."""
        return find_input_device(self.model)

    @cached_property
    def homes(self) -> Homes:
        """Return where the model leaves each layer's KV and states, which a short pass shows; it keeps none if off."""
        if self.mode == "off":
            return Homes((self.device,))
        layers = self.prefill(self.probe_ids()[:1]).cache.layers
        kept = ([t.device for _, t in list_tensors(layer) if t.ndim] for layer in layers)
        return Homes.from_devices([devices[0] if devices else self.device for devices in kept])

    @property
    def end_ids(self) -> list[int]:
        """Return the end-of-sequence token ids, [] if there are none; raise ``ValueError`` if they are not ids."""
        ends = self.model.generation_config.eos_token_id
        found = ends if isinstance(ends, list) else [] if ends is None else [ends]
        accepted = "a token id, a list of them, or None"
        require(all(is_whole(end, -1) for end in found), "eos_token_id of the generation config", ends, accepted)
        return found

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Return the texts that end every answer by the generation config."""
        stops = self.model.generation_config.stop_strings or ()
        return (stops,) if isinstance(stops, str) else tuple(stops)

    @cached_property
    def stable_positions(self) -> int | None:
        """Return the most tokens a text may have for KV not to depend on its length; None if it never does.

        Beyond that, rope of type dynamic or longrope turns all tokens otherwise, and KV of a shorter text is of no use.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        groups = [rope, *(group for group in rope.values() if isinstance(group, dict))]
        changing = [group for group in groups if group.get("rope_type") in LENGTH_DEPENDENT_ROPE]
        # a text just as long as the original length does not bring dynamic rope back from that of a longer one
        limits = (
            (group.get("original_max_position_embeddings") or self.config.max_position_embeddings)
            - (group["rope_type"] == "dynamic")
            for group in changing
        )
        return min(limits, default=None)

    def settle(self, cache: DynamicCache) -> None:
        """Wait until what was begun on the devices of ``cache`` is done, so that a clock may be read; on CUDA alone."""
        kept = (tensor for layer in cache.layers for _, tensor in list_tensors(layer))
        for device in {self.device, *(tensor.device for tensor in kept)}:
            if device.type == "cuda" and torch.cuda.is_initialized():
                torch.cuda.current_stream(device).synchronize()

    def lock(self) -> AbstractContextManager[object]:
        """Return the model's lock. While it is held (``with``), no adapter runs the model in another thread."""
        return self._lock

    def probe_ids(self) -> TokenIds:
        """Return twelve token ids [N] to try the model on."""
        return torch.arange(_PROBE_TOKENS).remainder(self.config.vocab_size).numpy()

    def is_close(self, one: Tensor, other: Tensor) -> bool:
        """Return True if logits ``one`` [B, V] differ from ``other`` by no more than rounding does in this model."""
        # their mean square: the maximum grows with the vocabulary
        difference, spread = (one.float() - other.float()).square().mean().sqrt(), other.float().std()
        share = float(difference / spread.clamp_min(1e-6))
        if other.dtype == torch.float32:
            return share <= _ROUNDING
        return share <= _HALF_ROUNDING or share <= min(2 * self._rounding, _MOST_ROUNDING)

    @cached_property
    def _rounding(self) -> float:
        """Return how far transformers' own prefill in two pieces is from one in one piece, as a share of the spread.

        In half precision that is much in deep, narrow models: 0.1 in SmolLM2-135M. 0 where the model refuses.
        """
        ids, cache = self.probe_ids(), DynamicCache(config=self.model.config)
        pieces = [
            torch.from_numpy(piece)[None].to(self.device) for piece in (ids[: len(ids) // 2], ids[len(ids) // 2 :])
        ]
        with self._lock, torch.inference_mode():
            try:
                whole = self.model(input_ids=torch.cat(pieces, 1), use_cache=False).logits[:, -1].float()
                for piece in pieces:
                    found = self.model(input_ids=piece, use_cache=True, **{self._cache_argument: cache}).logits[:, -1]
            except torch.OutOfMemoryError:
                raise
            except (TypeError, AttributeError, ValueError, RuntimeError, LookupError):
                return 0.0
        return float((found.float() - whole).square().mean().sqrt() / whole.std().clamp_min(1e-6))
