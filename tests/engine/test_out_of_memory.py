"""Where the device's memory runs out, stored KV makes room once: answers stay what they were, whichever pass failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from semsharekv_integrations import AuditConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.errors import SemShareError
from semsharekv_integrations.model.relief import DeviceMemoryError
from semsharekv_integrations.store.codec import PackedKV
from tiny_models import STATEFUL, EngineMaker, make_model

PROMPT = "News: The mayor of Velmar opened the bridge on Monday. Prorna has a new school . Who opened it?"
OTHER = "Nothing of this is known to anybody in Karna ."
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB."
ERRORS = (torch.OutOfMemoryError(SAID), RuntimeError("CUDA error: out of memory"), MemoryError("no more"))


class Full:
    """Runs of a model's last layer, of which some find the memory full: those in ``fails``, counted from 0."""

    def __init__(self, layer: nn.Module, fails: Callable[[int], bool], error: Exception) -> None:
        self.calls, self.layer, self.fails, self.error = 0, layer, fails, error
        self.call = type(layer).__call__

    def run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if layer is self.layer:
            self.calls += 1
            if self.fails(self.calls - 1):
                raise type(self.error)(*self.error.args)
        return self.call(layer, *args, **kwargs)


@contextmanager
def full(engine: SemShareEngine, fails: Callable[[int], bool], error: Exception = ERRORS[0]) -> Iterator[Full]:
    """Some runs of the last layer fail inside: those before it have taken up their KV by then."""
    model = engine._load().adapter.model
    layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[-1]
    runs = Full(layer, fails, error)
    with patch.object(type(layer), "__call__", lambda self, *args, **kwargs: runs.run(self, *args, **kwargs)):
        yield runs


def filled(make_engine: EngineMaker, mode: str = "exact", **config: Any) -> SemShareEngine:
    engine = make_engine(mode, **config)
    for prompt in (OTHER, PROMPT[:60]):
        engine.generate(prompt, max_new_tokens=2)
    return engine


@pytest.mark.parametrize("mode", ["exact", "identical", "semantic"])
@pytest.mark.parametrize("way", ["generate", "stream", "batch"])
def test_whichever_pass_fails_the_answer_is_the_same(make_engine: EngineMaker, mode: str, way: str) -> None:
    prompt = PROMPT if mode == "exact" else f"And now : {PROMPT}"

    def answer(engine: SemShareEngine) -> list[list[int]]:
        if way == "batch":
            found = engine.generate_batch([prompt, prompt[:-20]], max_new_tokens=4)
            return [generation.token_ids for generation in found]
        if way == "stream":
            *chunks, last = engine.stream(prompt, max_new_tokens=4)
            assert last.generation is not None and "".join(chunk.text for chunk in chunks) == last.generation.text
            return [last.generation.token_ids]
        return [engine.generate(prompt, max_new_tokens=4).token_ids]

    engine = filled(make_engine, mode)
    with full(engine, lambda _: False) as counted:
        wanted = answer(engine)
    assert counted.calls >= 4
    for nth in range(counted.calls if way != "batch" else 5):
        engine = filled(make_engine, mode)
        with full(engine, lambda call, nth=nth: call == nth) as hook:
            assert answer(engine) == wanted, nth
        assert hook.calls > nth
        engine.store.check()
        assert engine.generate(prompt, max_new_tokens=4).token_ids == wanted[0], "what was stored then is right"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("host", [0, 2**30])
def test_stored_kv_goes_down_before_the_second_attempt(make_engine: EngineMaker, error: Exception, host: int) -> None:
    engine = filled(make_engine, store=StoreConfig(host_max_bytes=host))
    before = engine.stats()["store_bytes"]
    seen: list[int] = []
    with full(engine, lambda call: seen.append(engine.stats()["store_bytes"]) or call == 0, error):  # type: ignore[func-returns-value]
        engine.generate(PROMPT, max_new_tokens=1)
    assert seen[:2] == [before, 0] and before > 0
    engine.store.check()


def test_what_is_pinned_stays(make_engine: EngineMaker) -> None:
    engine = make_engine()
    engine.warm({"kept": PROMPT}, pinned=True)
    engine.generate(OTHER, max_new_tokens=1)
    with full(engine, lambda call: call == 0):
        assert engine.generate(PROMPT + " Ask", max_new_tokens=1).report.prefix_tokens > 5
    assert any(reference.pinned for reference in engine.store.references())


@pytest.mark.parametrize("begins", [0, 2])
def test_a_device_that_stays_full_is_told_with_what_to_do(make_engine: EngineMaker, begins: int) -> None:
    engine = filled(make_engine)
    wanted = make_engine("off").generate(PROMPT, max_new_tokens=4).token_ids
    said: list[str] = []
    with full(engine, lambda call: call >= begins), pytest.raises(DeviceMemoryError) as raised:
        said += [chunk.text for chunk in engine.stream(PROMPT, max_new_tokens=4)]
    for base in (SemShareError, MemoryError, torch.OutOfMemoryError):
        assert isinstance(raised.value, base)
    what = "a prompt of" if not begins else "a token behind"
    for part in (what, "Tried to allocate 2.00 GiB", "MB of KV", "StoreConfig.max_bytes (now 2,147.5 MB)"):
        assert part in str(raised.value)
    engine.store.check()
    assert engine.generate(PROMPT, max_new_tokens=4).token_ids == wanted, "and it goes on"


def test_other_errors_are_passed_on_at_once(make_engine: EngineMaker) -> None:
    engine = filled(make_engine)
    with full(engine, lambda _: True, RuntimeError("another")) as hook, pytest.raises(RuntimeError, match="another"):
        engine.generate(PROMPT, max_new_tokens=1)
    assert hook.calls == 1 and engine.stats()["store_bytes"] > 0


@pytest.mark.parametrize("architecture", ["mamba2", "lfm2", "qwen3_next"])
def test_states_that_cannot_be_cut_back_are_computed_anew(
    make_engine: EngineMaker, tokenizer: Any, architecture: str
) -> None:
    model = make_model(architecture, len(tokenizer), **STATEFUL[architecture])
    wanted = make_engine(model=model).generate(PROMPT, max_new_tokens=4).token_ids
    for nth in range(4):
        engine = make_engine(model=model)
        with full(engine, lambda call, nth=nth: call == nth):
            assert engine.generate(PROMPT, max_new_tokens=4).token_ids == wanted, nth
        engine.store.check()


@pytest.mark.parametrize("architecture", ["gemma3_text", "mistral", "llama"])
def test_without_reuse_as_well(make_engine: EngineMaker, tokenizer: Any, architecture: str) -> None:
    model = make_model(architecture, len(tokenizer))
    wanted = make_engine("off", model=model).generate(PROMPT, max_new_tokens=4).token_ids
    for nth in range(4):
        engine = make_engine("off", model=model)
        with full(engine, lambda call, nth=nth: call == nth):
            assert engine.generate(PROMPT, max_new_tokens=4).token_ids == wanted, nth


def test_a_shortened_cache_and_an_audit(make_engine: EngineMaker) -> None:
    def make() -> SemShareEngine:
        reuse = ReuseConfig(mode="identical", retention_ratio=0.7)
        return filled(make_engine, reuse=reuse, audit=AuditConfig(sample_ratio=1.0))

    engine = make()
    with full(engine, lambda _: False) as counted:
        wanted = engine.generate(PROMPT, max_new_tokens=4)
    assert wanted.report.audit is not None
    for nth in range(counted.calls):
        engine = make()
        with full(engine, lambda call, nth=nth: call == nth):
            found = engine.generate(PROMPT, max_new_tokens=4)
        assert found.token_ids == wanted.token_ids and found.report.audit is not None
        assert found.report.audit.agrees == wanted.report.audit.agrees


@pytest.mark.parametrize("times", [1, 99])
def test_storing_makes_room_once_and_fails_no_answer(
    make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    engine = filled(make_engine)
    wanted = make_engine("off").generate(OTHER + PROMPT, max_new_tokens=2).token_ids
    pack, left = PackedKV.pack, [None] * times

    def fail(*args: Any, **options: Any) -> PackedKV:
        if left:
            left.pop()
            raise ERRORS[0]
        return pack(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(PackedKV, "pack", fail)
        assert engine.generate(OTHER + PROMPT, max_new_tokens=2).token_ids == wanted
    engine.store.check()
    assert engine.stats()["store_refused"] == (times > 1)
    assert (engine.generate(OTHER + PROMPT, max_new_tokens=2).report.recomputed_tokens == 1) == (times == 1)


def test_warming_makes_room_too(make_engine: EngineMaker) -> None:
    engine = filled(make_engine)
    with full(engine, lambda call: call == 0):
        assert engine.warm({"a": PROMPT}) == 1
    engine.store.check()
