"""One loaded model: what it allows, prefill behind a reused prefix, and single decode steps.

Knows transformers' caches and attention masks. Reused keys stand at their old positions here, so nothing is rotated.

How a loaded model's layers turn their keys by position: found among its buffers, and proven on a real forward pass.

A probe is run at two places; each layer's rotation is the candidate that carries the keys of the one over to the
other. A model for which none does (learned positions, rotation of a part that is not the first, frequencies that
change) cannot have keys moved, and is refused for the modes that move them.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from semsharekv_integrations.concurrency.threads import free_in_children
from semsharekv_integrations.config import Mode
from semsharekv_integrations.errors import UnsupportedModelError, is_whole, require
from semsharekv_integrations.kv import LayerKV, PrefixMatch, Reference, Rotation, TokenIds, rotate, take_first_tokens
from semsharekv_integrations.model.attention import blocked_attention, blocks_of
from semsharekv_integrations.model.layers import cache_argument, require_decoder, require_no_prompt_learning
from semsharekv_integrations.model.loading import embeddings_of, has_embeddings_elsewhere, input_device
from semsharekv_integrations.model.state import StateWatch

_PREFIX_LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
_PROBE_TOKENS = 12
_LOCKS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()  # one for all engines that share a model


class Prefill(NamedTuple):
    """Logits of the last prompt token [B, V], and the cache that decoding goes on with."""

    logits: torch.Tensor
    cache: DynamicCache


class ModelAdapter:
    """A transformers causal language model as the engine sees it. Forward passes are serialized by a lock.

    Args:
        model: any loaded one; it leaves training mode.
        mode: what is to be allowed.
        watch: tells its state, if there is one already.

    Raises:
        UnsupportedModelError: if the model is no decoder, takes no cache, or cannot continue from a stored prefix
            in ``mode``.
    """

    def __init__(self, model: PreTrainedModel, mode: Mode, watch: StateWatch | None = None) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)
        self.mode = mode
        self.watch = watch or StateWatch(model)
        self._lock = _LOCKS.setdefault(model, free_in_children(threading.RLock()))
        require_decoder(model.config, type(model).__name__)
        require_no_prompt_learning(model)
        if not model.can_generate():
            raise UnsupportedModelError(f"{type(model).__name__} is not a causal language model")
        input_device(model)  # a model without weights is refused here
        base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a PEFT adapter
        self._accepts = frozenset(inspect.signature(type(base).forward).parameters)
        self._cache_argument = cache_argument(type(base))
        if mode != "off":
            self._require_prefix_reuse()

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return input_device(self.model)

    @property
    def embedding_matrix(self) -> torch.Tensor:
        """The input embeddings of all tokens [V, hidden]; on the host if they are kept elsewhere between passes."""
        return self._matrix_elsewhere if has_embeddings_elsewhere(self.model) else embeddings_of(self.model)

    @cached_property
    def _matrix_elsewhere(self) -> torch.Tensor:
        """Read once, where every look would read a file."""
        return embeddings_of(self.model)

    def embed(self, token_ids: TokenIds) -> torch.Tensor:
        """The input embeddings of ``token_ids`` [N, hidden]: the E-cache, looked up when it is needed."""
        matrix = self.embedding_matrix
        return matrix[torch.from_numpy(token_ids).to(matrix.device)].to(self.device)

    @property
    def end_ids(self) -> list[int]:
        """The model's end-of-sequence tokens; none if it knows no end."""
        ends = self.model.generation_config.eos_token_id
        found = ends if isinstance(ends, list) else [] if ends is None else [ends]
        accepted = "a token id, a list of them, or None"
        require(all(is_whole(end, -1) for end in found), "eos_token_id of the generation config", ends, accepted)
        return found

    @cached_property
    def stable_positions(self) -> int | None:
        """Most tokens for which a token's KV does not depend on how many there are, or None if it never does.

        Rope of type dynamic or longrope rotates all tokens otherwise once there are more: KV of a shorter text is
        then not that of the longer one's prefix.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        groups = [rope, *(group for group in rope.values() if isinstance(group, dict))]
        limits = [
            group.get("original_max_position_embeddings") or self.config.max_position_embeddings
            for group in groups
            if group.get("rope_type") in _LENGTH_DEPENDENT_ROPE
        ]
        return min(limits, default=None)

    @cached_property
    def _restart_position(self) -> int | None:
        """Where transformers' own ``generate`` starts again with an empty cache: Phi-3 and kin switch their rope."""
        return getattr(self.config, "original_max_position_embeddings", None) if self.stable_positions else None

    def prefill(self, token_ids: TokenIds, prefix: PrefixMatch | None = None) -> Prefill:
        """Run the prompt's tokens [T] behind ``prefix``, which must leave at least one of them.

        The reference's tensors are read, never written: the cache's first update makes new ones.
        """
        start = prefix.num_tokens if prefix else 0
        assert 0 <= start < len(token_ids), "at least one prompt token is computed"
        cache = self._cache_from(prefix) if prefix else self._empty_cache()
        return Prefill(self.forward(token_ids[start:], cache, start), cache)

    def compute_logits(self, token_ids: TokenIds, answered: TokenIds) -> torch.Tensor:
        """Logits [N + 1, V] after a full prefill of ``token_ids`` [T] and after each token of ``answered`` [N]."""
        cache = self._empty_cache()
        logits = [self.forward(token_ids, cache, 0)]
        if len(answered):
            positions = torch.arange(len(token_ids), len(token_ids) + len(answered))
            logits.append(self._forward(torch.from_numpy(answered)[None], cache, positions, keep=len(answered))[0])
        return torch.cat(logits)

    def lock(self) -> AbstractContextManager[object]:
        """Keeps other threads from running the model meanwhile."""
        return self._lock

    def forward(self, token_ids: TokenIds, cache: DynamicCache, start: int) -> torch.Tensor:
        """Logits [B, V] of the last of ``token_ids`` [N], at positions from ``start`` on, behind ``cache``."""
        positions = torch.arange(start, start + len(token_ids))
        ids = torch.from_numpy(token_ids)[None]
        if not start:
            return self._forward(ids, cache, positions)
        with self._lock, blocked_attention(self.config, blocks_of(positions)):
            return self._forward(ids, cache, positions)

    def forward_rows(
        self, token_ids: TokenIds, rows: torch.Tensor, cache: DynamicCache, mask: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, V] of the last of ``rows`` [N] of a prompt [T], which see what ``mask`` [B, 1, N, T] says."""
        ids = torch.from_numpy(token_ids).to(rows.device)[rows]
        return self._forward(ids[None], cache, rows, attention_mask=mask)

    def compute_kv(self, token_ids: TokenIds, start: int) -> tuple[LayerKV, ...]:
        """KV of ``token_ids`` [N] by themselves, at positions from ``start`` on."""
        cache = self._empty_cache()
        self.forward(token_ids, cache, start)
        return self.read_layers(cache)

    def probe_ids(self) -> TokenIds:
        """A few token ids [N] to try the model on."""
        return torch.arange(_PROBE_TOKENS).remainder(self.config.vocab_size).numpy()

    def is_close(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Whether two computations of the same logits [B, V] differ by no more than rounding.

        The mean square counts, not the maximum, which grows with the vocabulary.
        """
        difference, spread = (one.float() - other.float()).square().mean().sqrt(), other.float().std()
        tolerance = 2.5e-4 if other.dtype == torch.float32 else 0.1  # share of the logits' spread
        return bool(difference <= tolerance * spread.clamp_min(1e-6))

    def decode_step(self, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Logits [B, V] after the last of all tokens so far [B, T]; the cache grows by it."""
        position = ids.shape[1] - 1
        if position == self._restart_position:
            fresh = self._empty_cache()
            logits = self._forward(ids, fresh, torch.arange(ids.shape[1]))
            cache.layers = fresh.layers
            return logits
        return self._forward(ids[:, -1:], cache, torch.tensor([position]))

    @property
    def accepts_padding(self) -> bool:
        """Whether a forward pass can be told which slots of a batch are padding, and each row's position."""
        return {"attention_mask", "position_ids"} <= self._accepts

    def decode_padded(
        self, ids: torch.Tensor, cache: DynamicCache, positions: Sequence[int], pads: NDArray[np.int64]
    ) -> torch.Tensor:
        """Logits [B, V] after ``ids`` [B, 1] at ``positions`` [B]; cached rows begin with ``pads`` [B] empty slots."""
        slots = torch.arange(cache.layers[0].keys.shape[2] + 1)
        mask = (slots >= torch.from_numpy(pads)[:, None]).long().to(self.device)
        return self._forward(ids, cache, torch.tensor(positions)[:, None], attention_mask=mask)

    def read_layers(self, cache: DynamicCache) -> tuple[LayerKV, ...]:
        """The cache's keys and values, without copying; all layers hold the same tokens."""
        layers = tuple(LayerKV(layer.keys, layer.values) for layer in cache.layers)
        assert len({tensor.shape[2] for layer in layers for tensor in layer}) == 1, "layers differ in length"
        return layers

    def measure_kv(self, cache: DynamicCache) -> int:
        """Bytes of the keys and values in the cache; recurrent states are not counted."""
        kept = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def _forward(
        self, ids: torch.Tensor, cache: DynamicCache, positions: torch.Tensor, keep: int = 0, **more: torch.Tensor
    ) -> torch.Tensor:
        """Logits [B, V] of the last of ``ids`` [B, N] at ``positions``, or [B, keep, V] of the last ``keep``.

        Positions are [N] where all rows have the same, else [B, N].
        """
        place = positions.to(self.device).expand(len(ids), -1)
        inputs: dict[str, Any] = {"position_ids": place, "logits_to_keep": max(keep, 1), **more}
        inputs[self._cache_argument] = cache
        accepted = {name: value for name, value in inputs.items() if name in self._accepts}
        with self._lock, torch.inference_mode():
            self.watch.glance()
            output = self.model(input_ids=ids.to(self.device), use_cache=True, **accepted)
        return output.logits[:, -keep:] if keep else output.logits[:, -1]

    def _empty_cache(self) -> DynamicCache:
        """Plain transformers' own cache in mode ``off``; else one that keeps every token, sliding layers included."""
        return DynamicCache(config=self.model.config) if self.mode == "off" else DynamicCache()

    def _cache_from(self, prefix: PrefixMatch) -> DynamicCache:
        cache = DynamicCache()
        for keys, values in take_first_tokens(prefix.reference.layers, prefix.num_tokens):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache

    def _require_prefix_reuse(self) -> None:
        name = type(self.model).__name__
        found = sorted(set(getattr(self.config, "layer_types", None) or ()) - _PREFIX_LAYER_TYPES)
        if found:
            raise UnsupportedModelError(
                f"{name} has layers of type {', '.join(found)}, which keep no KV per token; use mode='off'"
            )
        if not self._continues_from_prefix():
            raise UnsupportedModelError(
                f"{name} gives other logits behind a reused prefix than in a full prefill; use mode='off'"
            )

    def _continues_from_prefix(self) -> bool:
        """Whether a probe prefilled in two pieces ends in the logits of one piece. Exact up to rounding."""
        ids, half = self.probe_ids(), _PROBE_TOKENS // 2
        try:
            whole = self.prefill(ids)
            if len(whole.cache.layers) == 0 or any(not isinstance(layer, DynamicLayer) for layer in whole.cache.layers):
                return False
            first = Reference("probe", "probe", ids[:half], self.read_layers(self.prefill(ids[:half]).cache))
            logits = self.prefill(ids, PrefixMatch(first, half)).logits
        except (TypeError, AttributeError, ValueError):  # the model takes no such cache
            return False
        return self.is_close(logits, whole.logits)


PROBE_SHIFT = 23  # positions
HALF_TOLERANCE, FLOAT_TOLERANCE = 0.1, 1e-3  # mean error as a share of the keys' mean magnitude


def find_rotations(
    model: nn.Module, here: Sequence[LayerKV], there: Sequence[LayerKV], shift: int
) -> tuple[Rotation | None, ...]:
    """The rotation of each layer; None for a layer that does not turn its keys.

    Args:
        model: whose buffers hold the inverse frequencies.
        here: KV of a probe, one pair for each layer.
        there: KV of the same probe ``shift`` positions later.
        shift: in positions.

    Raises:
        UnsupportedModelError: if values change with position, or keys in another way than by a rotation.
    """
    width = min(layer.keys.shape[3] for layer in here)
    candidates = [None, *(c for c in _candidates(model) if 2 * len(c.inverse_frequencies) <= width)]
    return tuple(
        _rotation_of(index, candidates, first, second, shift)
        for index, (first, second) in enumerate(zip(here, there, strict=True))
    )


def _rotation_of(
    index: int, candidates: Sequence[Rotation | None], here: LayerKV, there: LayerKV, shift: int
) -> Rotation | None:
    shifts = torch.full((here.keys.shape[2],), shift, device=here.keys.device)
    moved = [here.keys if rotation is None else rotate(here.keys, shifts, rotation) for rotation in candidates]
    errors = [_error(keys, there.keys) for keys in moved]
    best = min(range(len(errors)), key=errors.__getitem__)
    tolerance = FLOAT_TOLERANCE if here.keys.dtype == torch.float32 else HALF_TOLERANCE
    if errors[best] > tolerance or _error(here.values, there.values) > tolerance:
        raise UnsupportedModelError(
            f"layer {index}: keys at another position are not the rotated ones (error {errors[best]:.3f} of their "
            f"magnitude), as with learned positions, ALiBi, MLA or partial rotation; use mode='exact'"
        )
    return candidates[best]


def _error(moved: torch.Tensor, real: torch.Tensor) -> float:
    return float((moved.float() - real.float()).abs().mean() / real.float().abs().mean().clamp_min(1e-6))


def _candidates(model: nn.Module) -> Iterator[Rotation]:
    """Every set of inverse frequencies that the model holds (its original one where it changes), in both pairings."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, frequencies in buffers.items():
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                original = buffers.get(f"{name.removesuffix('inv_freq')}original_inv_freq")
                chosen = frequencies if original is None else original
                yield from (Rotation(chosen.float(), interleaved) for interleaved in (False, True))
