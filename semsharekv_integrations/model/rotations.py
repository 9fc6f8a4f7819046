"""How a model's keys turn with position, found by trying and proven on real forward passes.

A probe runs at two places. A layer's rotation is the candidate that carries its keys from one to the other: which
frequencies, where in the head they turn (first, or last as in latent attention), which numbers are a pair, which way.
Frequencies come from the model's buffers and configuration. Keys that stay as they are have no position (NoPE), or get
it from a bias of attention (ALiBi). What no candidate explains is refused, naming what failed, and where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from semsharekv_integrations.errors import UnsupportedModelError
from semsharekv_integrations.kv import LayerKV, LayerRotation, Rotation, rotate

PROBE_SHIFT = 23  # positions
HALF_TOLERANCE, FLOAT_TOLERANCE = 0.1, 1e-3  # mean error as a share of the mean magnitude
_TABLES = {"wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed", "pos_emb"}
_SAME = 1e-5  # largest difference of frequencies that count as the same, as a share


def find_rotations(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    here: Sequence[LayerKV],
    there: Sequence[LayerKV],
    shift: int,
) -> tuple[LayerRotation, ...]:
    """Return how each layer turns, from a probe's KV and its KV ``shift`` positions on.

    Raises:
        UnsupportedModelError: if keys or values change with position, and not by a rotation.
    """
    known: dict[int, list[list[Rotation]]] = {}  # candidates by head size
    found: list[LayerRotation] = []
    for index, pair in enumerate(zip(here, there, strict=True)):
        parts = []
        for name, first, second in zip(LayerKV._fields, *pair, strict=True):
            width = first.shape[3]
            if width not in known:
                known[width] = _list_candidates(model, config, width)
            rotation, error = _find_rotation(known[width], first, second, shift)
            if error > _get_tolerance(first):
                raise UnsupportedModelError(
                    _explain(model, f"layer {index}: {name} at another position are {error:.1%}")
                )
            parts.append(rotation)
        found.append(LayerRotation(*parts))
    return tuple(found)


def _get_tolerance(tensor: Tensor) -> float:
    return FLOAT_TOLERANCE if tensor.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE


def _find_rotation(
    candidates: Sequence[Sequence[Rotation]], here: Tensor, there: Tensor, shift: int
) -> tuple[Rotation | None, float]:
    """Return what brings keys ``here`` closest to ``there``, None for no turn, and its error.

    It is of the first group of ``candidates`` that has one close enough.
    """
    best: tuple[Rotation | None, float] = None, _measure_error(here, there)
    shifts = torch.full((here.shape[2],), shift, device=here.device)
    for rotations in candidates if best[1] else ():
        for rotation in rotations:
            error = _measure_error(rotate(here, shifts, rotation), there)
            if error < best[1]:
                best = rotation, error
        if best[1] <= _get_tolerance(here):
            break
    return best


def _measure_error(moved: Tensor, real: Tensor) -> float:
    return float((moved.float() - real.float()).abs().mean() / real.float().abs().mean().clamp_min(1e-6))


def _explain(model: PreTrainedModel, found: str) -> str:
    """Return what was ``found``, with the table that positions come from, if there is one."""
    decoder = model.get_decoder() or model
    modules = decoder.named_modules()
    tables = [name or type(module).__name__ for name, module in modules if _is_position_table(name, module)]
    cause = f"; positions come from a table ({tables[0]})" if tables else ""
    return f"{found} of their magnitude off, at best, from the same ones rotated{cause}; use mode='exact'"


def _is_position_table(name: str, module: nn.Module) -> bool:
    """Return True for a table of learned or sinusoidal positions, by what models call theirs."""
    last = name.rpartition(".")[2]
    return last in _TABLES or isinstance(getattr(module, "pos_encoding", None), Tensor)


def _list_candidates(model: nn.Module, config: PreTrainedConfig, width: int) -> list[list[Rotation]]:
    """Return the rotations to try on heads of ``width``: by the model's buffers, and by its configuration.

    Scaled frequencies are in buffers alone. Short probes in half precision hardly tell them from those that are not.
    """
    groups = (list(_read_buffers(model)), list(_compute_frequencies(config, width)))
    return [list(_spread(_list_unlike(frequencies), width)) for frequencies in groups]


def _spread(frequencies: Sequence[Tensor], width: int) -> Iterator[Rotation]:
    """Yield a rotation of heads of ``width`` by each set that fits in there, at each place, pairing and direction."""
    for each in frequencies:
        room = width - 2 * len(each)
        if room >= 0:
            for sign, start, interleaved in product((1, -1), sorted({0, room}), (False, True)):
                yield Rotation(sign * each, interleaved, start)


def _list_unlike(frequencies: Sequence[Tensor]) -> list[Tensor]:
    """Return each set [R] of inverse frequencies once."""
    found: list[Tensor] = []
    for each in frequencies:
        if len(each) and not any(_is_same(each, known) for known in found):
            found.append(each)
    return found


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other.to(one.device), rtol=_SAME, atol=0)


def _read_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Yield the inverse frequencies among the model's buffers, the original set where it changes with length."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
                original = buffers.get(f"{name.removesuffix('inv_freq')}original_inv_freq")
                yield (buffer if original is None else original).float().flatten()
            elif name == "embed_positions" and buffer.ndim == 2 and len(buffer) > 1:  # sines [P, R], then cosines
                sine, cosine = buffer[1].float().chunk(2)
                yield torch.atan2(sine, cosine)


def _compute_frequencies(config: PreTrainedConfig, width: int) -> Iterator[Tensor]:
    """Yield base ** (-2i / R) by what the configuration says of bases and of how many numbers turn."""
    told = config.to_dict()
    groups = [told, *(value for value in told.values() if isinstance(value, Mapping))]
    groups += [value for group in groups[1:] for value in group.values() if isinstance(value, Mapping)]
    bases = {value for group in groups for name, value in group.items() if _is_base(name, value)}
    shares = {value for group in groups for name, value in group.items() if _is_share(name, value)}
    named = {told.get(name) for name in ("rotary_dim", "qk_rope_head_dim")}
    widths = {width, *(size for size in named if size), *(int(share * width) for share in shares)}
    for base, size in product(sorted(bases or {10_000.0}), sorted(widths)):
        if size % 2 == 0:
            yield base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)


def _is_base(name: Any, value: Any) -> bool:
    named = "theta" in str(name) or name in ("rotary_emb_base", "rotary_base")
    return named and isinstance(value, int | float) and value > 1


def _is_share(name: Any, value: Any) -> bool:
    return name in ("partial_rotary_factor", "rotary_pct") and isinstance(value, int | float) and 0 < value <= 1
