"""What can be watched around a call or measured on its documents: similarity, hashing, layers and memory.

Each probe's ``watch`` fits the ``watch`` of a study, and what it measures is in the outcome's ``extra``.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lengths import UNTIMED
from semsharekv_integrations import EngineConfig
from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.lab.figures import Figure, estimate_mean
from semsharekv_integrations.lab.policies import Subject
from semsharekv_integrations.lab.scenarios import Case
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.selective import SelectivePrefill
from semsharekv_integrations.model.views import watch_layers
from semsharekv_integrations.reuse.matching import LONGEST_EXACT_TOKENS, find_nearest_tokens, rotate_embeddings
from semsharekv_integrations.reuse.similarity import PooledEmbedder

SIMILARITY = Figure("similarity", "similarity", ".2f", lambda p: p.own.extra.get("similarity"))
RECALL = Figure("lsh_recall", "LSH recall", ".3f", lambda p: p.own.extra.get("lsh_recall"), estimate_mean)
_EQUAL_COSINE = 1e-5  # cosines this close are the same, up to rounding
_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # what Linux takes in clear_refs


class SimilarityProbe:
    """How alike the document asked about is to its stored version, as mode ``semantic`` sees it.

    The pooled embeddings are fitted to the stored documents of the case, as the index fits them to what is stored.

    Args:
        subject: whose input embeddings are pooled.
    """

    def __init__(self, subject: Subject) -> None:
        self._tokenizer = subject.tokenizer
        self._embedder = PooledEmbedder(subject.model.get_input_embeddings().weight)
        self._last: tuple[Case | None, dict[str, float]] = None, {}

    @contextmanager
    def watch(self, case: Case, policy: str, turn: int) -> Iterator[dict[str, Any]]:
        """``similarity``; nothing where the document is not stored in any version."""
        yield dict(self.measure(case))

    def measure(self, case: Case) -> dict[str, float]:
        """The same, once for each case."""
        if case is not self._last[0]:
            self._last = case, self._compare(case)
        return self._last[1]

    def _compare(self, case: Case) -> dict[str, float]:
        stored = {key: text for reference in case.references for key, text in reference.documents.items()}
        if case.asked not in stored:
            return {}
        fitted = self._embedder.fit_to([_encode(self._tokenizer, text) for text in stored.values()])
        texts = case.target.documents[case.asked], stored[case.asked]
        one, other = fitted.embed([_encode(self._tokenizer, text) for text in texts])
        return {"similarity": float(one @ other)}


def measure_lsh_recall(target: torch.Tensor, reference: torch.Tensor, *, bits: int, candidates: int = 4) -> float:
    """Measure the share of target tokens [T], 0 to 1, whose match by ``bits`` hash bits is as near as the nearest."""
    exact = find_nearest_tokens(target, reference)
    hashed = find_nearest_tokens(target, reference, bits=bits, candidates=candidates)
    return float(np.mean(hashed.cosine >= exact.cosine - _EQUAL_COSINE))


class RecallProbe:
    """The share of a document's tokens that hashing matches as well as comparing all of them.

    Args:
        subject: whose input embeddings and RoPE are used.
        configs: settings by policy, with the number of hash bits.
    """

    def __init__(self, subject: Subject, configs: Mapping[str, EngineConfig]) -> None:
        self._tokenizer = subject.tokenizer
        self._adapter = ModelAdapter(subject.model, "paper")
        rotations = SelectivePrefill(self._adapter).rotations
        self._frequencies = next(r.keys.inverse_frequencies for r in rotations if r.keys is not None)
        rules = {name: config.reuse.resolve() for name, config in configs.items()}
        self._bits = {name: of_mode.lsh_bits for name, of_mode in rules.items() if of_mode.fuzzy}
        self._last: tuple[Case | None, dict[str, float]] = None, {}

    @contextmanager
    def watch(self, case: Case, policy: str, turn: int) -> Iterator[dict[str, Any]]:
        """``lsh_recall``; nothing where a policy, or a document so short, is not hashed."""
        yield self.measure(case, policy)

    def measure(self, case: Case, policy: str) -> dict[str, float]:
        """The same, once for each case."""
        if case is not self._last[0]:
            self._last = case, self._compare(case)
        return {"lsh_recall": self._last[1][policy]} if policy in self._last[1] else {}

    def _compare(self, case: Case) -> dict[str, float]:
        (target,), (stored,) = case.target.documents.values(), case.references[0].documents.values()
        ids = [_encode(self._tokenizer, text) for text in (target, stored)]
        if max(map(len, ids)) <= LONGEST_EXACT_TOKENS:
            return {}
        pair = [self._rotate(version) for version in ids]
        return {
            name: measure_lsh_recall(pair[0], pair[1], bits=bits) if bits else 1.0 for name, bits in self._bits.items()
        }

    def _rotate(self, ids: TokenIds) -> torch.Tensor:
        positions = torch.arange(len(ids), device=self._frequencies.device)
        return rotate_embeddings(self._adapter.embed(ids), positions, self._frequencies)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


class LayerUse(NamedTuple):
    """What one decoder layer did before the first new token, over all passes.

    Attributes:
        seconds: from before its first hook to after its forward, choosing rows included.
        rows: tokens that came out of it.
    """

    seconds: float
    rows: int


def find_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers that run in a pass of one token through ``model``."""
    with watch_layers(model) as calls, torch.inference_mode():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device), use_cache=True)
    return [call.module for call in calls]


class LayerClock:
    """Times every decoder layer by hooks. Passes of a single row are decoding, and left out.

    On CUDA events are recorded and nothing is waited for, so that the clock does not slow what it times.

    Args:
        layers: the decoder layers, in order.
        device: of the model.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._entered: list[Any] = [None] * len(layers)
        self._passes: list[list[tuple[Any, Any, int]]] = [[] for _ in layers]
        self._handles: list[Any] = []
        for index, layer in enumerate(layers):
            self._handles.append(layer.register_forward_pre_hook(partial(self._enter, index)))
            self._handles.append(layer.register_forward_hook(partial(self._leave, index)))

    def start(self) -> None:
        """Forget what was timed."""
        for passes in self._passes:
            passes.clear()

    def read(self) -> tuple[LayerUse, ...]:
        """What each layer did since the start; on CUDA this waits for it."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return tuple(
            LayerUse(sum(map(self._count_seconds, passes)), sum(p[2] for p in passes)) for passes in self._passes
        )

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, index: int, *_: object) -> None:
        self._entered[index] = self._now()

    def _leave(self, index: int, _: object, __: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output  # [B, N, hidden]
        if hidden.shape[1] > 1:
            self._passes[index].append((self._entered[index], self._now(), hidden.shape[1]))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count_seconds(self, one_pass: tuple[Any, Any, int]) -> float:
        began, ended, _ = one_pass
        return float(began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began)


@contextmanager
def watch_peak(device: torch.device) -> Iterator[dict[str, Any]]:
    """Afterwards ``peak_bytes``: by how much memory grew at its peak over what was in use before.

    On CUDA that is what PyTorch's allocator gave out; on a Linux CPU, resident memory, after free memory was handed
    back to the system. Nothing where neither can be measured.
    """
    found: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    resident = _reset_resident_peak() if device.type == "cpu" else None
    yield found
    if resident is not None:
        found["peak_bytes"] = max(0, _read_resident_bytes("VmHWM") - resident)


def _reset_resident_peak() -> int | None:
    """Resident bytes now, with the peak set to them; None where the system does not tell."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
        return _read_resident_bytes("VmRSS")
    except (OSError, AttributeError, TypeError):
        return None


def _read_resident_bytes(name: str) -> int:
    lines = (_PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class CallProbe:
    """``layers`` of every call and, in the untimed round alone, ``peak_bytes``.

    Args:
        subject: what is measured on.
    """

    def __init__(self, subject: Subject) -> None:
        self._device = subject.model.device
        self._clock = LayerClock(find_layers(subject.model), self._device)

    @contextmanager
    def watch(self, case: Case, policy: str, turn: int) -> Iterator[dict[str, Any]]:
        """Around one call."""
        self._clock.start()
        found: dict[str, Any] = {}
        if turn == UNTIMED:
            with watch_peak(self._device) as peak:
                yield found
            found |= peak
        else:
            yield found
        found["layers"] = self._clock.read()
