"""Models that keep more than KV per token go on from checkpoints of their state, as if they had read it all."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from test_parity import FIRST, NEW_TOKENS, PROMPTS, double, engine_of, plain_tokens
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import (
    EngineConfig,
    ReuseConfig,
    SemShareEngine,
    StoreConfig,
    UnsupportedModelError,
    world,
)
from semsharekv_integrations.kv import Reference
from semsharekv_integrations.model.checkpoints import StateCache, list_tensors
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.codec import PackedKV
from semsharekv_integrations.store.records import reference_id
from tiny_models import STATEFUL, make_model

ONE_BY_ONE: dict[str, dict[str, Any]] = {"mamba": {}, "falcon_mamba": {}}
ALL = STATEFUL | ONE_BY_ONE


def make(architecture: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    return double(architecture, tokenizer, **ALL[architecture])


@pytest.mark.parametrize("architecture", ALL)
def test_prompts_that_begin_alike_are_answered_as_without_reuse(architecture: str, tokenizer) -> None:
    model = make(architecture, tokenizer)
    off, exact = engine_of(model, tokenizer, "off"), engine_of(model, tokenizer, "exact")
    reused = {}
    for name, prompt in PROMPTS.items():
        named = {"documents": [FIRST]} if FIRST in prompt else {}
        found = exact.generate(prompt, max_new_tokens=NEW_TOKENS, **named)
        assert found.token_ids == plain_tokens(model, tokenizer, prompt), name
        assert found.token_ids == off.generate(prompt, max_new_tokens=NEW_TOKENS).token_ids, name
        assert found.report.prefix_tokens + found.report.recomputed_tokens == found.report.prompt_tokens
        reused[name] = found.report.prefix_tokens
        exact.store.check()
    assert reused["again"] == len(tokenizer(PROMPTS["again"]).input_ids) - 1
    if architecture in STATEFUL:
        document_tokens = len(tokenizer(FIRST).input_ids)
        assert min(reused["longer"], reused["branch"]) >= document_tokens - 1


@pytest.mark.parametrize("architecture", ALL)
def test_a_conversation_goes_on_from_its_last_state(architecture: str, tokenizer) -> None:
    model = make(architecture, tokenizer)
    exact = engine_of(model, tokenizer, "exact")
    text = FIRST * 4
    for turn in range(3):
        found = exact.generate(text, max_new_tokens=NEW_TOKENS, session="one")
        assert found.token_ids == plain_tokens(model, tokenizer, text)
        assert (found.report.prefix_tokens > 0.9 * found.report.prompt_tokens) == (turn > 0)
        text += found.text + " And?"


@pytest.mark.parametrize("architecture", STATEFUL)
def test_a_prefix_ends_at_a_checkpoint_wherever_the_prompts_part(architecture: str, tokenizer) -> None:
    """Without documents the third prompt reuses where the second parted from the first; the end of a part is exact."""
    model = make(architecture, tokenizer)
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(checkpoint_tokens=16))
    engines = engine_of(model, tokenizer, "exact"), SemShareEngine(model, tokenizer, config)
    shared = " ".join(FIRST.split()[:40])
    common = len(tokenizer(shared).input_ids)
    for engine, second, third in zip(engines, (0, common - 18), (common - 2, common - 18), strict=True):
        prefixes = []
        for end in ("one of them all", "Two is it now", "3 and so on"):
            found = engine.generate(f"{shared} {end}", max_new_tokens=NEW_TOKENS)
            assert found.token_ids == plain_tokens(model, tokenizer, f"{shared} {end}")
            prefixes.append(found.report.prefix_tokens)
        assert prefixes[0] == 0 and (prefixes[1] > 0) == (second > 0)
        assert prefixes[1] >= second and prefixes[2] >= third
        engine.store.check()


@pytest.mark.parametrize("architecture", ["qwen3_next", "mamba2", "falcon_h1"])
def test_states_outlive_the_process(architecture: str, tokenizer, tmp_path: Path) -> None:
    """They lie in the store's directory and in saved files like KV, whole and divided."""
    model = make(architecture, tokenizer)
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(directory=tmp_path / "kv"))
    first = SemShareEngine(model, tokenizer, config)
    for name in ("first", "branch"):
        first.generate(PROMPTS[name], documents=[FIRST], max_new_tokens=2)
    saved = first.save(tmp_path / "file")
    first.close()
    again = SemShareEngine(model, tokenizer, config)
    loaded = engine_of(model, tokenizer, "exact")
    assert loaded.load(tmp_path / "file") == saved
    for engine in (again, loaded):
        found = engine.generate(PROMPTS["longer"], documents=[FIRST], max_new_tokens=NEW_TOKENS)
        assert found.token_ids == plain_tokens(model, tokenizer, PROMPTS["longer"])
        assert found.report.prefix_tokens >= len(tokenizer(FIRST).input_ids) - 1
        engine.store.check()
    assert again.forget("missing") == 0 and again.clear() > 0
    again.close()


@pytest.mark.parametrize("architecture", ["qwen3_next", "lfm2"])
def test_a_small_store_counts_states_and_stays_within_its_bound(architecture: str, tokenizer) -> None:
    model = make(architecture, tokenizer)
    everything = engine_of(model, tokenizer, "exact")
    for prompt in PROMPTS.values():
        everything.generate(prompt, documents=[FIRST] if FIRST in prompt else [], max_new_tokens=2)
    most = everything.store.stats()["bytes"]
    for share in (0.1, 0.5, 0.9):
        store = StoreConfig(max_bytes=int(share * most), host_max_bytes=int(0.2 * most))
        engine = SemShareEngine(model, tokenizer, EngineConfig(reuse=ReuseConfig(mode="exact"), store=store))
        for prompt in PROMPTS.values():
            found = engine.generate(prompt, documents=[FIRST] if FIRST in prompt else [], max_new_tokens=2)
            assert found.token_ids == plain_tokens(model, tokenizer, prompt, max_new_tokens=2)
            engine.store.check()


@pytest.mark.parametrize("architecture", STATEFUL)
def test_a_state_is_a_copy(architecture: str, tokenizer) -> None:
    """What a call computes behind a checkpoint never changes it."""
    adapter = engine_of(make(architecture, tokenizer), tokenizer, "exact")._load().adapter
    ids = np.arange(5, 45)
    cache = adapter.prefill(ids, checkpoints=[10, 30]).cache
    assert isinstance(cache, StateCache) and list(cache.checkpoints) == [10, 30]
    before = {name: tensor.clone() for name, tensor in cache.checkpoints[10].items()}
    layers = [_cut(kv, 10) for kv in cache.read_kv()]
    restored = StateCache.restore(adapter.model.config, layers, cache.checkpoints[10], adapter.device)
    logits = adapter.forward(ids[10:], restored, 10)
    torch.testing.assert_close(logits, adapter.prefill(ids).logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in cache.checkpoints[10].items())


def test_a_state_goes_to_the_device_of_the_model_wherever_it_was_kept(tokenizer) -> None:
    adapter = engine_of(make("qwen3_next", tokenizer), tokenizer, "exact")._load().adapter
    cache = adapter.prefill(np.arange(5, 45), checkpoints=[10]).cache
    layers, meta = [_cut(kv, 10) for kv in cache.read_kv()], torch.device("meta")
    restored = StateCache.restore(adapter.model.config, layers, cache.checkpoints[10], meta)
    states = [tensor for layer in restored.layers for name, tensor in list_tensors(layer) if "state" in name]
    assert {tensor.device.type for tensor in states if tensor.ndim} == {"meta"}


def _cut(kv: Any, num_tokens: int) -> Any:
    return type(kv)(*(tensor[:, :, :num_tokens] for tensor in kv))


def test_parts_of_packed_kv_have_the_states_behind_their_tokens(tokenizer) -> None:
    adapter = engine_of(make("qwen3_next", tokenizer), tokenizer, "exact")._load().adapter
    cache = adapter.prefill(np.arange(5, 45), checkpoints=[10, 20, 30]).cache
    packed = PackedKV.pack(adapter.read_layers(cache), None, 0, cache.checkpoints)
    assert list(packed.checkpoints) == [10, 20, 30]
    assert packed.num_bytes == sum(tensor.nbytes for tensor in packed.tensors.values())
    parts = [packed.copy_part(0, 20), packed.view_part(20, 40)]
    assert [list(part.checkpoints) for part in parts] == [[10, 20], [10]]
    joined = PackedKV.join(parts)
    assert joined.tensors.keys() == packed.tensors.keys() and joined.num_bytes == packed.num_bytes
    assert all(torch.equal(tensor, packed.tensors[name]) for name, tensor in joined.tensors.items())


@pytest.mark.parametrize("mode", ["identical", "semantic", "paper"])
def test_a_state_cannot_be_moved(mode: str, tokenizer) -> None:
    model = make("mamba2", tokenizer)
    with pytest.raises(UnsupportedModelError, match=r"use mode='exact'.*arrange"):
        engine_of(model, tokenizer, mode)
    assert engine_of(model, tokenizer, "auto").generate(FIRST, max_new_tokens=2).report.mode == "exact"


def test_state_that_is_kept_in_modules_is_noticed(tokenizer) -> None:
    """Another text between two pieces would be read as the first one's beginning, so this is an error."""
    model = double("recurrent_gemma", tokenizer, lru_width=32, attention_window_size=9)
    with pytest.raises(UnsupportedModelError, match=r"in its modules, and in no cache; use mode='off'"):
        engine_of(model, tokenizer, "exact")
    off = engine_of(model, tokenizer, "off")
    wanted = off.generate(FIRST, max_new_tokens=NEW_TOKENS).token_ids
    assert wanted == plain_tokens(model, tokenizer, FIRST)
    first, second = (off.stream(FIRST, max_new_tokens=NEW_TOKENS) for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="in no cache, so calls cannot overlap"):
        list(first)
    assert off.generate(FIRST, max_new_tokens=NEW_TOKENS).token_ids == wanted


def test_engines_that_share_such_a_model_cannot_mix_their_calls_either(tokenizer) -> None:
    model = double("recurrent_gemma", tokenizer, lru_width=32, attention_window_size=9)
    first, second = (engine_of(model, tokenizer, "off").stream(FIRST, max_new_tokens=NEW_TOKENS) for _ in range(2))
    next(first)
    next(second)
    with pytest.raises(RuntimeError, match="in no cache, so calls cannot overlap"):
        list(first)


def test_the_probe_notices_state_that_is_kept_in_modules(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("semsharekv_integrations.model.adapter._OFF_ALONE", {})
    monkeypatch.setattr("semsharekv_integrations.model.adapter._KEEP_IN_MODULES", "")
    model = double("recurrent_gemma", tokenizer, lru_width=32, attention_window_size=9)
    with pytest.raises(UnsupportedModelError, match="other logits behind a reused prefix"):
        engine_of(model, tokenizer, "exact")


@pytest.mark.parametrize("window", [9, 3000])
def test_a_model_whose_prefill_ignores_its_window_is_noticed(window: int, tokenizer) -> None:
    """However long the window is: Moshi sees all of a prompt, but of an answer only what its window reaches."""
    with pytest.raises(UnsupportedModelError, match="other logits behind a reused prefix"):
        engine_of(double("moshi", tokenizer, sliding_window=window), tokenizer, "exact")


@pytest.mark.parametrize("architecture", ["doge", "falcon"])
def test_models_whose_attention_takes_no_blocks_reuse_prefixes_without(architecture: str, tokenizer) -> None:
    model = double(architecture, tokenizer, **({"sliding_window": 9} if architecture == "doge" else {}))
    exact = engine_of(model, tokenizer, "exact")
    for name, prompt in PROMPTS.items():
        found = exact.generate(prompt, max_new_tokens=NEW_TOKENS)
        assert found.token_ids == plain_tokens(model, tokenizer, prompt), name
        assert (found.report.prefix_tokens > 0) == (name in {"longer", "branch", "again"})


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("xlstm", {"hidden_size": 128, "embedding_dim": 128}),
        ("minimax", {"head_dim": 16, "num_local_experts": 2, "intermediate_size": 48, "block_size": 8}),
    ],
)
def test_caches_of_a_models_own_class_serve_mode_off_alone(
    architecture: str, changes: dict[str, Any], tokenizer
) -> None:
    model = make_model(architecture, len(tokenizer), **changes)
    with pytest.raises(UnsupportedModelError, match=r"keeps a cache of a class of its own; use mode='off'"):
        engine_of(model, tokenizer, "exact")
    found = engine_of(model, tokenizer, "off").generate(FIRST, max_new_tokens=NEW_TOKENS)
    assert found.token_ids == plain_tokens(model, tokenizer, FIRST)


def test_a_model_that_takes_the_whole_text_in_every_pass_gets_it(tokenizer) -> None:
    model = make_model("cpmant", len(tokenizer), dim_head=8, dim_ff=32)
    with pytest.raises(UnsupportedModelError, match=r"takes the whole text in every pass"):
        engine_of(model, tokenizer, "exact")
    found = engine_of(model, tokenizer, "off").generate(FIRST, max_new_tokens=NEW_TOKENS)
    assert found.token_ids == plain_tokens(model, tokenizer, FIRST)


@pytest.mark.parametrize("architecture", ["qwen3_next", "lfm2"])
def test_what_a_longer_match_pushes_out_is_not_looked_at(architecture: str, tokenizer) -> None:
    """The namespace's own entry agrees for longer; promoting it takes the room of the shared one, with more states."""
    model = make(architecture, tokenizer)
    adapter = engine_of(model, tokenizer, "exact")._load().adapter
    ids = np.arange(5, 55)

    def make_reference(namespace: str, num_tokens: int, checkpoints: list[int]) -> Reference:
        cache = adapter.prefill(ids[:num_tokens], checkpoints=checkpoints).cache
        key = reference_id(namespace, ids[:num_tokens])
        states = adapter.read_states(cache)
        return Reference(key, namespace, ids[:num_tokens], adapter.read_layers(cache), checkpoints=states)

    own, shared = make_reference("own", 40, []), make_reference("all", 30, [5, 10, 15, 20, 25])
    assert own.num_bytes < shared.num_bytes
    bounds = {"max_bytes": shared.num_bytes, "host_max_bytes": own.num_bytes}
    store = KVStore(StoreConfig(**bounds, shared_namespace="all"))
    assert store.put(own) and store.put(shared)
    found = store.find_prefix(ids, "own", max_tokens=len(ids), at_checkpoint=True)
    assert found is not None and found.num_tokens == 40 and found.reference.namespace == "own"
    assert store.stats()["entries"] == store.stats()["evicted"] == 1 and store.stats()["unreadable"] == 0
    store.check()


@pytest.mark.parametrize("architecture", STATEFUL)
def test_calls_that_overlap_and_are_left_keep_states_apart(architecture: str, tokenizer) -> None:
    model = make(architecture, tokenizer)
    wanted = {name: plain_tokens(model, tokenizer, prompt) for name, prompt in PROMPTS.items()}
    engine = engine_of(model, tokenizer, "exact")
    for round_ in range(2):
        streams = {name: engine.stream(prompt, max_new_tokens=NEW_TOKENS) for name, prompt in PROMPTS.items()}
        for left in ("branch", "again"):
            next(streams[left])
        streams.pop("branch").close()
        ends = {name: list(stream)[-1].generation for name, stream in streams.items()}
        assert {name: end.token_ids for name, end in ends.items()} == {name: wanted[name] for name in streams}
        assert all(end.report.prefix_tokens for end in ends.values()) or round_ == 0
        engine.store.check()


@pytest.mark.parametrize("architecture", STATEFUL)
def test_arranged_documents_go_on_from_states(architecture: str, tokenizer) -> None:
    model = make(architecture, tokenizer)
    engine = engine_of(model, tokenizer, "exact")
    texts = {f"d{n}": document.text for n, document in enumerate(world.make_documents(Random(4), 3, extra_facts=1))}
    prefixes = []
    for order in (["d0", "d1", "d2"], ["d2", "d1", "d0"]):
        documents = engine.arrange({key: texts[key] for key in order})
        prompt = "\n\n".join(["Read this.", *documents.values(), f"And {order[0]}?"])
        found = engine.generate(prompt, documents=documents, max_new_tokens=NEW_TOKENS)
        assert found.token_ids == plain_tokens(model, tokenizer, prompt)
        prefixes.append(found.report.prefix_tokens)
    assert prefixes[0] == 0 and prefixes[1] >= len(tokenizer("".join(texts.values())).input_ids) - 3
