"""Calls at the same time: they decode in one forward pass, share what their prompts share, and end as each alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, zip_longest

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.concurrency.streams import run_each
from semsharekv_integrations.errors import PromptError
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.batching import SharedDecoding, merge_caches
from semsharekv_integrations.report import Stopwatch
from tiny_models import ARCHITECTURES, EngineMaker, make_model

PROMPTS = [f"News from {town}." + " People affected by it numbered 1204." * n for n, town in enumerate("abcde")]


@contextmanager
def widths(adapter: ModelAdapter, before: Callable[[int], None] = lambda width: None) -> Iterator[list[int]]:
    """How many calls each decode step was for."""
    found: list[int] = []
    alone, together = adapter.decode_step, adapter.decode_padded

    def one(ids, cache):
        found.append(1)
        before(1)
        return alone(ids, cache)

    def several(ids, *rest):
        found.append(len(ids))
        before(len(ids))
        return together(ids, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter, "decode_step", one)
        patch.setattr(adapter, "decode_padded", several)
        yield found


def decoded(adapter: ModelAdapter, tokenizer: PreTrainedTokenizerBase, together: SharedDecoding, prompt: str):
    """A call's logits at every step, and its cache, decoding greedily by hand."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    prefill = adapter.prefill(ids[0].numpy())
    row, logits = together.join(), [prefill.logits]
    for _ in range(6):
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        logits.append(together.step(row, ids, prefill.cache))
    together.leave(row)
    return torch.cat(logits), adapter.read_layers(prefill.cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calls_of_all_lengths_have_the_logits_and_kv_they_have_alone(architecture: str, tokenizer) -> None:
    adapter = ModelAdapter(make_model(architecture, len(tokenizer)), "exact")
    wanted = [decoded(adapter, tokenizer, SharedDecoding(adapter, 1), prompt) for prompt in PROMPTS]
    together = SharedDecoding(adapter, 8)
    barrier = threading.Barrier(len(PROMPTS))

    def one(prompt: str):
        barrier.wait()
        return decoded(adapter, tokenizer, together, prompt)

    with widths(adapter) as found, ThreadPoolExecutor(len(PROMPTS)) as pool:
        outcome = list(pool.map(one, PROMPTS))
    assert (max(found) > 1) == (adapter.stable_positions is None), "phi3 of this size has no limit"
    for (logits, layers), (wanted_logits, wanted_layers) in zip(outcome, wanted, strict=True):
        torch.testing.assert_close(logits, wanted_logits, atol=2e-4, rtol=1e-4)
        for layer, wanted_layer in zip(layers, wanted_layers, strict=True):
            torch.testing.assert_close(layer.keys, wanted_layer.keys, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(layer.values, wanted_layer.values, atol=2e-4, rtol=1e-4)


def test_a_batch_gives_what_each_gives_alone_in_order_and_in_fewer_passes(make_engine: EngineMaker) -> None:
    engine = make_engine("exact")
    wanted = [make_engine("off").generate(prompt, max_new_tokens=12).token_ids for prompt in PROMPTS]
    with widths(engine._load().adapter) as found:
        generations = engine.generate_batch(PROMPTS, max_new_tokens=12)
    assert [generation.token_ids for generation in generations] == wanted
    assert max(found) >= 3 and len(found) < sum(found) / 1.5
    engine.store.check()
    for prompt, ids in zip(PROMPTS, wanted, strict=True):  # what they left is whole and exact
        again = engine.generate(prompt, max_new_tokens=12)
        assert again.token_ids == ids and again.report.prefix_tokens == again.report.prompt_tokens - 1


def test_queries_that_are_scaled_by_slots_of_the_cache_are_as_alone(tokenizer) -> None:
    sizes = {"head_dim": 8, "intermediate_size_mlp": 36, "num_local_experts": 2, "no_rope_layers": [1, 0, 1]}
    model = make_model("llama4_text", len(tokenizer), **sizes, floor_scale=16, attn_scale=2.0)
    alone, together = (SemShareEngine(model, tokenizer) for _ in range(2))
    wanted = [alone.generate(prompt, max_new_tokens=6).token_ids for prompt in PROMPTS[:3]]
    assert [found.token_ids for found in together.generate_batch(PROMPTS[:3], max_new_tokens=6)] == wanted


def test_batches_no_larger_than_asked_for(llama, tokenizer) -> None:
    for size in (1, 2):
        engine = SemShareEngine(llama, tokenizer, EngineConfig(max_batch_size=size))
        with widths(engine._load().adapter) as found, ThreadPoolExecutor(5) as pool:
            list(pool.map(partial(engine.generate, max_new_tokens=6), PROMPTS))
        assert max(found) <= size
    with pytest.raises(ValueError, match="max_batch_size is 0; accepted is 1 or more calls"):
        EngineConfig(max_batch_size=0)


@pytest.mark.parametrize("mode", ["exact", "identical"])
def test_what_prompts_of_a_batch_share_is_computed_once(llama, tokenizer, mode) -> None:
    engine = SemShareEngine(llama, tokenizer, EngineConfig(reuse=ReuseConfig(mode=mode)))
    start = "News from Velmar. " + "The mayor was born in Osteck. " * 10
    reports = [g.report for g in engine.generate_batch([f"{start} {end}" for end in ("Who?", "When?", "Why?")])]
    reused = sorted(report.prefix_tokens for report in reports)
    assert reused[0] == 0 and reused[1] == reused[2] > 0.8 * reports[0].prompt_tokens


def test_one_that_fails_takes_none_of_the_others_down(make_engine: EngineMaker) -> None:
    engine = make_engine("exact")
    wanted = [make_engine("off").generate(prompt, max_new_tokens=6).token_ids for prompt in PROMPTS[:3]]
    with pytest.raises(PromptError, match=r"^prompt is"):
        engine.generate_batch([PROMPTS[0], [], *PROMPTS[1:3]], max_new_tokens=6)
    assert engine.stats()["requests"] == 3
    found = run_each(lambda p: engine.generate(p, max_new_tokens=6).token_ids, [PROMPTS[0], [], *PROMPTS[1:3]], 4)
    assert isinstance(found.pop(1), PromptError) and found == wanted


def test_a_forward_pass_that_fails_for_all_is_tried_for_each(make_engine: EngineMaker, monkeypatch) -> None:
    engine = make_engine("exact")
    wanted = [make_engine("off").generate(prompt, max_new_tokens=8).token_ids for prompt in PROMPTS]

    def out_of_memory(width: int) -> None:
        if width > 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(SharedDecoding, "_is_same_in_batches", lambda self: True)
    with widths(engine._load().adapter, out_of_memory) as found:
        assert [g.token_ids for g in engine.generate_batch(PROMPTS, max_new_tokens=8)] == wanted
    assert max(found) > 1


def test_a_stream_that_nobody_reads_is_not_waited_for(make_engine: EngineMaker, monkeypatch) -> None:
    engine, options = make_engine("exact"), {"max_new_tokens": 60, "temperature": 3.0}
    wanted = make_engine("off").generate(PROMPTS[1], seed=1, **options).token_ids
    missing, waits = SharedDecoding._list_missing, []
    monkeypatch.setattr(SharedDecoding, "_list_missing", lambda self: waits.extend(found := missing(self)) or found)
    with ThreadPoolExecutor(1) as pool:
        idle = engine.stream(PROMPTS[0], seed=4, **options)
        pool.submit(lambda: [next(idle) for _ in range(3)]).result()
        (row,) = engine._load()._together._rows
        row.shares = True  # as if it had decoded with others before
        assert engine.generate(PROMPTS[1], seed=1, **options).token_ids == wanted
        assert not waits, "nobody is at work on it"
        rest = pool.submit(lambda: [chunk.generation for chunk in idle][-1]).result()
    expected = make_engine("off").generate(PROMPTS[0], seed=4, **options)
    assert rest is not None and rest.token_ids == expected.token_ids


def test_two_streams_read_in_turn_by_one_thread(make_engine: EngineMaker) -> None:
    engine, off, options = make_engine("exact"), make_engine("off"), {"max_new_tokens": 60, "temperature": 3.0}
    streams = [engine.stream(prompt, seed=seed, **options) for seed, prompt in enumerate(PROMPTS[:2])]
    pairs = list(zip_longest(*streams))
    for seed, prompt in enumerate(PROMPTS[:2]):
        (found,) = [pair[seed].generation for pair in pairs if pair[seed] and pair[seed].generation]
        assert found.token_ids == off.generate(prompt, seed=seed, **options).token_ids
    engine.store.check()


def test_a_stream_dropped_in_the_middle_of_a_pass_spoils_no_other(llama, tokenizer, monkeypatch) -> None:
    """As the garbage collector may drop it, in the very thread that computes for both."""
    adapter = ModelAdapter(llama, "exact")
    together = SharedDecoding(adapter, 8)
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS[:2]]
    wanted = [decoded(adapter, tokenizer, SharedDecoding(adapter, 1), prompt) for prompt in PROMPTS[:2]]
    prefills = [adapter.prefill(tokens[0].numpy()) for tokens in ids]
    rows = [together.join() for _ in ids]
    rows[0].shares = rows[1].shares = together._is_allowed = True
    monkeypatch.setattr("semsharekv_integrations.model.batching.PATIENCE_S", 60)  # so that both come together
    alone = adapter.decode_padded
    dropped: list[bool] = []

    def dropping(*args):
        if len(dropped) == 2:
            together.leave(rows[1])
        dropped.append(True)
        return alone(*args)

    monkeypatch.setattr(adapter, "decode_padded", dropping)
    logits = [[prefill.logits] for prefill in prefills]

    def step(at: int) -> None:
        ids[at] = torch.cat([ids[at], logits[at][-1].argmax(-1, keepdim=True)], dim=1)
        logits[at].append(together.step(rows[at], ids[at], prefills[at].cache))

    threads = [ThreadPoolExecutor(1) for _ in rows]  # one for each: a thread waits for no row that it drove itself
    for _ in range(6):
        for done in [threads[at].submit(step, at) for at in ([0] if rows[1].has_left else [0, 1])]:
            done.result()
    assert len(dropped) == 3 and together._rows == [rows[0]] and not together._group
    together.leave(rows[0])
    torch.testing.assert_close(torch.cat(logits[0]), wanted[0][0], atol=2e-4, rtol=1e-4)
    for layer, wanted_layer in zip(adapter.read_layers(prefills[0].cache), wanted[0][1], strict=True):
        torch.testing.assert_close(layer.keys, wanted_layer.keys, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("outcome", ["other logits", "error"])
def test_a_model_that_takes_no_padding_decodes_each_by_itself(make_engine: EngineMaker, monkeypatch, outcome) -> None:
    engine = make_engine("exact")
    adapter = engine._load().adapter
    padded_step = adapter.decode_padded

    def refusing(*args):
        if outcome == "error":
            raise ValueError("no such mask")
        return padded_step(*args).flip(-1)

    monkeypatch.setattr(adapter, "decode_padded", refusing)
    with widths(adapter) as found:
        generations = engine.generate_batch(PROMPTS, max_new_tokens=6)
    assert found.count(2) == 1 and set(found) == {1, 2}, "the probe alone"
    wanted = [make_engine("off").generate(prompt, max_new_tokens=6).token_ids for prompt in PROMPTS]
    assert [generation.token_ids for generation in generations] == wanted


def test_padding_comes_first(llama, tokenizer) -> None:
    adapter = ModelAdapter(llama, "exact")
    caches = [adapter.prefill(adapter.probe_ids()[:size]).cache for size in (3, 5)]
    joint, pads = merge_caches(caches)
    assert pads == [2, 0]
    for layer, short, long in zip(joint.layers, *(cache.layers for cache in caches), strict=True):
        assert not layer.keys[0, :, :2].any() and not layer.values[0, :, :2].any()
        assert layer.keys[:1, :, 2:].equal(short.keys) and layer.values[1:].equal(long.values)


def test_prompts_of_a_batch_are_prefilled_in_order(make_engine: EngineMaker) -> None:
    engine = make_engine("exact")
    growing = ["News from Velmar." + " Nobody was hurt." * count for count in range(12)]
    reports = [generation.report for generation in engine.generate_batch(growing, max_new_tokens=2)]
    assert [report.recomputed_tokens for report in reports[1:]] == [
        later.prompt_tokens - earlier.prompt_tokens for earlier, later in pairwise(reports)
    ]


def test_waiting_for_the_turn_is_a_phase_of_its_own(make_engine: EngineMaker, monkeypatch) -> None:
    engine, waits, phase = make_engine("exact"), threading.Event(), Stopwatch.phase
    assert "wait" not in engine.generate(PROMPTS[0], max_new_tokens=2).report.phases_s

    @contextmanager
    def watched(watch: Stopwatch, name: str) -> Iterator[None]:
        if name == "wait":
            waits.set()
        with phase(watch, name):
            yield

    monkeypatch.setattr(Stopwatch, "phase", watched)
    with ThreadPoolExecutor(1) as pool:
        with engine._queue.admit():
            call = pool.submit(engine.generate, PROMPTS[1], max_new_tokens=2)
            assert waits.wait(60)
        report = call.result().report
    assert 0 < report.phases_s["wait"] <= report.ttft_s
