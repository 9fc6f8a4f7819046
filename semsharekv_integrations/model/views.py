"""A model's decoder layers as they are seen on a pass: which they are, what each adds to the cache, what it sees.

The decoder layers are the members of module lists that get the cache, outermost first: other lists of the same length
(a vision tower's, norms') do not. Windows are what the configuration says; probes hold it to that.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from semsharekv_integrations.errors import UnsupportedModelError

MASK = "attention_mask"  # by this name every decoder layer takes it
WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}  # types, their sizes


class Window(NamedTuple):
    """What a token sees: itself and the ``num_tokens - 1`` before; or, ``chunked``, its chunk of so many up to it."""

    num_tokens: int
    chunked: bool = False


@dataclass(frozen=True, eq=False)
class LayerView:
    """The decoder layers of a model, in the order in which they run.

    Attributes:
        modules: the layers.
        places: which layers of the cache each one adds to: one, two, or none, where it reads another's.
        windows: what each one sees; None for all before it.
        hides: whether masks are boolean and True where nothing is seen, as in MPT.
        takes_lengths: whether the model takes no mask of rows and tokens, and builds biases from that of tokens alone.
        by_operations: whether attention shows in its operations only, since the model uses no interface for it.
        by_positions: whether layers get no mask: this package's attention, which they call, goes by rows' positions.
            False if any of the three above is True.
        parameters: the names of each one's positional arguments.
    """

    modules: Sequence[nn.Module]
    places: Sequence[tuple[int, ...]]
    windows: Sequence[Window | None]
    hides: bool = False
    takes_lengths: bool = False
    by_operations: bool = False
    by_positions: bool = False
    parameters: Sequence[Sequence[str]] = field(init=False)

    def __post_init__(self) -> None:
        """Read the parameters, and let no view contradict itself."""
        needs_masks = self.hides or self.takes_lengths or self.by_operations
        object.__setattr__(self, "by_positions", self.by_positions and not needs_masks)
        object.__setattr__(self, "parameters", [_list_parameters(module) for module in self.modules])

    def name_arguments(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return by name what layer ``index`` is called with; ``TypeError`` if it does not say what it takes."""
        names = self.parameters[index]
        if len(args) > len(names):
            raise TypeError(f"{type(self.modules[index]).__name__} does not name what it takes")
        return dict(zip(names, args, strict=False), **kwargs)

    def share_out(self, collected: Sequence[Tensor], num_layers: int) -> list[Tensor]:
        """Return for each layer of the cache what was ``collected`` from it, the mean if it attends several times.

        Only the first ``num_layers`` of the model ran.
        """
        places = self.places[:num_layers]
        times = [max(1, len(each)) for each in places]
        again, left = divmod(len(collected), sum(times))
        if left or not again:
            raise RuntimeError(f"{len(times)} layers show {len(collected)} times what they attend to")
        groups = [collected[i : i + again] for i in range(0, len(collected), again)]
        means = iter([torch.stack(list(group)).mean(0) if again > 1 else group[0] for group in groups])
        found = [[next(means) for _ in range(num)] for num in times]
        return [each for own, kept in zip(found, places, strict=True) if kept for each in own]


class LayerCall(NamedTuple):
    """One layer as it was called: the mask it got, and the layers of the cache that it added tokens to."""

    module: nn.Module
    mask: Tensor | None
    added_to: tuple[int, ...]


@contextmanager
def watch_layers(model: nn.Module) -> Iterator[list[LayerCall]]:
    """Yield a list to which members of module lists that get a cache add their calls inside; no members of members."""
    members = [m for each in model.modules() if isinstance(each, nn.ModuleList) for m in each]
    watch = _Watch()
    handles = [module.register_forward_pre_hook(watch.enter, with_kwargs=True) for module in members]
    handles += [module.register_forward_hook(watch.leave, with_kwargs=True) for module in members]
    try:
        yield watch.calls
    finally:
        for handle in handles:
            handle.remove()


class _Watch:
    """Notes the calls of layers, but none of those that run inside of another layer."""

    def __init__(self) -> None:
        self.calls: list[LayerCall] = []
        self._running: nn.Module | None = None
        self._before: list[int] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the cache as it is, if ``module`` gets one and runs inside of no other layer."""
        cache = _find_cache(args, kwargs)
        if self._running is None and cache is not None:
            self._running, self._before = module, _count_tokens(cache)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add the call of ``module``, if it is the one that runs."""
        if module is not self._running:
            return
        self._running = None
        after = _count_tokens(_find_cache(args, kwargs))
        before = [*self._before, *[0] * (len(after) - len(self._before))]
        added_to = tuple(index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        named = dict(zip(_list_parameters(module), args, strict=False), **kwargs)
        self.calls.append(LayerCall(module, named.get(MASK), added_to))


def _list_parameters(module: nn.Module) -> list[str]:
    """Return the names of what ``forward`` takes by position."""
    taken = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [parameter.name for parameter in taken if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


def _find_cache(args: Iterable[Any], kwargs: dict[str, Any]) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


def _count_tokens(cache: Cache | None) -> list[int]:
    """Return how many tokens each layer of the cache holds keys of."""
    kept = [getattr(layer, "keys", None) for layer in cache.layers] if cache is not None else []
    return [keys.shape[2] if isinstance(keys, Tensor) and keys.ndim > 2 else 0 for keys in kept]


def view_layers(calls: Sequence[LayerCall], windows: Sequence[Window | None], name: str) -> LayerView:
    """Return the layers that ``watch_layers`` saw in a pass from an empty cache, with their ``windows``.

    Raises:
        UnsupportedModelError: naming the model by ``name``, if layers do not run once each, or see other tokens.
    """
    modules, added = [call.module for call in calls], [index for call in calls for index in call.added_to]
    if not added:
        raise UnsupportedModelError(f"{name} has no list of decoder layers that add to the cache; use mode='exact'")
    if len(set(modules)) < len(modules):
        raise UnsupportedModelError(f"{name} runs its layers several times in one pass; use mode='exact'")
    if added != list(range(len(added))) or not calls[0].added_to:
        raise UnsupportedModelError(f"{name} has layers that add nothing to the cache; use mode='exact'")
    if not any(windows):
        windows = (None,) * len(modules)
    if len(windows) != len(modules):
        raise UnsupportedModelError(f"{name} has {len(windows)} layers, of which {len(modules)} run; use mode='exact'")
    for index, (call, window) in enumerate(zip(calls, windows, strict=True)):
        if not _sees(call.mask, window):
            raise UnsupportedModelError(
                f"{name} does not see in layer {index} what its configuration says ({window or 'all before it'}); "
                f"use mode='exact'"
            )
    return LayerView(modules, [call.added_to for call in calls], windows, hides=_hides(calls[0].mask))


def _sees(mask: Tensor | None, window: Window | None) -> bool:
    """Return True if the mask [B, heads or 1, T, T] of a pass shows just what ``window`` says, and what is causal."""
    if mask is None or mask.ndim != 4 or mask.shape[2] != mask.shape[3]:
        return window is None
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] > torch.finfo(mask.dtype).min / 2
    seen = ~seen if _hides(mask) else seen
    return bool(torch.equal(~seen, find_unseen(torch.arange(len(seen), device=seen.device), len(seen), window)))


def find_unseen(rows: Tensor, num_tokens: int, window: Window | None, first: int = 0) -> Tensor:
    """Return [N, T - first], True where a token ``rows`` [N] does not see one of ``first`` to ``num_tokens`` (T).

    It is behind it, or out of its window.
    """
    keys = torch.arange(first, num_tokens, device=rows.device)
    unseen = keys > rows[:, None]
    if window is not None:
        firsts = rows - rows % window.num_tokens if window.chunked else rows - window.num_tokens + 1
        unseen |= keys < firsts[:, None]
    return unseen


def _hides(mask: Tensor | None) -> bool:
    """Return True if the mask [B, 1, T, T] of a causal pass is boolean and True at what the first token cannot see."""
    return mask is not None and mask.dtype == torch.bool and bool(mask[0, 0, 0, -1])


def list_windows(config: PreTrainedConfig) -> tuple[Window | None, ...]:
    """Return what a token sees in each layer; None if it sees all before it.

    Raises:
        UnsupportedModelError: if layers slide or are chunked, and the configuration does not say by how much.
    """
    types = getattr(config, "layer_types", None)
    if types is None:
        slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        types = ["sliding_attention" if slides else "full_attention"] * config.num_hidden_layers
    known = {kind: _find_window(config, kind) for kind in set(types)}
    return tuple(known[kind] for kind in types)


def _find_window(config: PreTrainedConfig, kind: str) -> Window | None:
    """Return what a token sees in layers of type ``kind``."""
    if kind not in WINDOWED:
        return None
    size = getattr(config, WINDOWED[kind], None)
    if not size:
        raise UnsupportedModelError(
            f"the configuration has layers of type {kind!r}, but no {WINDOWED[kind]}; use mode='exact'"
        )
    return Window(size, kind == "chunked_attention")
