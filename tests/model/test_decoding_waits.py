"""On an accelerator the host waits once for each further token, and clocks are read when the device is done."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import GenerationChunk, SemShareEngine
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.batching import SharedDecoding
from semsharekv_integrations.model.drafting import Drafter
from simulated_device import count, move_model
from tiny_models import EngineMaker, make_model

PROMPT = "Report on Prorna in the Daily Courier. People affected by it numbered 1204."
SCHEMA = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "seed": 3},
    "penalty": {"repetition_penalty": 1.3},
    "constrained": {"json_schema": SCHEMA, "temperature": 2.0, "seed": 1},
    "drafts": {},
}


def read(chunks: Any) -> GenerationChunk:
    *_, last = chunks
    return last


@pytest.fixture
def endless(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A model whose answers end where they must."""
    model = make_model("llama", len(tokenizer))
    model.generation_config.eos_token_id = None
    return model


def test_each_further_token_waits_once(
    endless: PreTrainedModel, make_engine: EngineMaker, pretended_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("exact", move_model(endless, pretended_device))

    def ask(tokens: int, way: str, options: dict[str, Any]) -> list[int]:
        if way == "whole":
            return engine.generate(PROMPT, max_new_tokens=tokens, **options).token_ids
        last = read(engine.stream(PROMPT, max_new_tokens=tokens, **options)).generation
        assert last is not None
        return last.token_ids

    for name, options in OPTIONS.items():
        if name == "drafts":
            monkeypatch.setattr(Drafter, "propose", lambda self, room: np.array([5, 6, 7][:room], dtype=np.int64))
        ask(5, "whole", options)
        for way in ("whole", "streamed"):
            short, long = (count(partial(ask, tokens, way, options)) for tokens in (2, 5))
            assert len(short.result) == 2 and len(long.result) == 5
            assert long.waits - short.waits == 3, f"{name} {long.table()}"
    assert engine.stats()["drafted_tokens"] > 0


def test_a_step_of_calls_that_decode_together_waits_for_nothing_of_ours(
    llama: PreTrainedModel, pretended_device: str
) -> None:
    adapter = ModelAdapter(move_model(llama, pretended_device), "exact")
    together = SharedDecoding(adapter, 2)
    rows = [together.join(), together.join()]
    for row, size in zip(rows, (4, 7), strict=True):
        ids = adapter.probe_ids()[:size]
        row.ids, row.cache = torch.from_numpy(ids)[None].to(pretended_device), adapter.prefill(ids).cache
    together._forward(rows)  # which brings them together
    for row in rows:
        row.ids = torch.cat([row.ids, row.ids[:, -1:]], dim=1)
    counted = count(lambda: together._forward(rows))
    assert counted.waits <= 1, f"it looks at the mask; {counted.table()}"
    assert counted.result.shape[0] == 2


def test_a_phase_that_ends_on_the_device_waits_for_it(
    llama: PreTrainedModel, make_engine: EngineMaker, pretended_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("exact", move_model(llama, pretended_device))
    events: list[str] = []
    stream, settle = torch.cuda.current_stream(), torch.cuda.synchronize
    monkeypatch.setattr(type(stream), "synchronize", lambda self: events.append("waited") or settle())
    prefill, decode = ModelAdapter.prefill, ModelAdapter.decode_step
    monkeypatch.setattr(ModelAdapter, "prefill", lambda *a, **b: events.append("prefill") or prefill(*a, **b))
    monkeypatch.setattr(ModelAdapter, "decode_step", lambda *a: events.append("decode") or decode(*a))
    engine.generate(PROMPT, max_new_tokens=3)
    assert events[:2] == ["prefill", "waited"], "what the prefill takes is no part of decoding"
    assert events[2:] == ["decode", "decode", "waited"]


def test_on_the_cpu_nothing_is_waited_for(make_engine: EngineMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: SemShareEngine = make_engine("exact")
    monkeypatch.setattr(torch.cuda, "current_stream", None)
    assert engine.generate(PROMPT, max_new_tokens=2).report.decode_s > 0


def test_verifying_drafts_waits_for_nothing_before_the_logits(
    endless: PreTrainedModel, make_engine: EngineMaker, pretended_device: str
) -> None:
    """The blocks of its rows are told by numbers that the host has."""
    adapter = make_engine("exact", move_model(endless, pretended_device))._load().adapter
    prefill = adapter.prefill(np.arange(5, 25))
    drafted = torch.tensor([[7, 8, 9, 10]], device=pretended_device)
    counted = count(lambda: adapter.verify(drafted, prefill.cache, 20))
    assert counted.waits == 0, counted.table()
    assert len(counted.result) == 4
