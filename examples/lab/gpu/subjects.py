"""What is checked: the built-in model, whose answers mean something, and a random model of a known shape, for time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from gpu.checks import Checks
from semsharekv_integrations import EngineConfig, Generation, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.call import Call
from semsharekv_integrations.lab.scenarios import Case, Query
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.runtime import Runtime
from semsharekv_integrations.text.prompt import PromptRenderer
from semsharekv_integrations.world import Message
from shapes import UNGUARDED, drop_guard, make_random
from sized import make_sized_case

TINY = "tiny"
NAMESPACE = "bench"
TOWNS = ("Velmar", "Osteck", "Karna", "Brunn", "Silva", "Toren")
NEWS = {
    town: f"News from {town}, by the Morning Post. The mayor of {town} is Anna Kelsen. Schools in {town} will open "
    f"again soon. The cost to {town} is set at {7 + 5 * index} million crowns. Shops in {town} stayed shut for hours. "
    "Life will slowly return to normal."
    for index, town in enumerate(TOWNS)
}
_ROOM = StoreConfig(max_bytes=40 << 30)
EngineMaker = Callable[..., SemShareEngine]


class Asked(NamedTuple):
    """A prompt, and its documents."""

    prompt: list[Message]
    documents: dict[str, str]


@cache
def load_tokenizer() -> PreTrainedTokenizerBase:
    """The built-in model's."""
    return AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))


@cache
def load_reference(device: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The built-in model there."""
    return AutoModelForCausalLM.from_pretrained(resolve(REFERENCE_MODEL), dtype=dtype).to(device).eval()


def make_maker(model: PreTrainedModel, *, is_random: bool = False) -> EngineMaker:
    """What makes engines with empty stores around the model; deviation of random weights means nothing."""

    def make(mode: str = "exact", store: dict[str, Any] | None = None, **settings: Any) -> SemShareEngine:
        engine = {name: settings.pop(name) for name in list(settings) if name in EngineConfig.__dataclass_fields__}
        reuse = ReuseConfig(mode=mode, **settings)  # type: ignore[arg-type]
        if is_random and reuse.is_approximate:
            reuse = replace(reuse, max_deviation=UNGUARDED)
        config = EngineConfig(reuse=reuse, store=StoreConfig(**(store or {})), **engine)
        return SemShareEngine(model, load_tokenizer(), config)

    return make


def ask_about(order: tuple[str, ...], question: str) -> list[Message]:
    """A chat over the news of these towns."""
    text = "Use these documents:\n\n" + "\n\n".join(NEWS[town] for town in order)
    return [{"role": "system", "content": text}, {"role": "user", "content": question}]


def write_flow() -> Iterator[Asked]:
    """Prompts in an order that gives prefixes, runs and a next turn."""
    for town in TOWNS[:2]:
        yield Asked(ask_about(TOWNS, f"Who is the mayor of {town}?"), NEWS)
    order = TOWNS[1::2] + TOWNS[::2]
    yield Asked(ask_about(order, f"What was the cost in {order[1]}?"), {town: NEWS[town] for town in order})
    answer: Message = {"role": "assistant", "content": "Anna Kelsen."}
    question: Message = {"role": "user", "content": f"What was the cost in {TOWNS[0]}?"}
    yield Asked([*ask_about(TOWNS, f"Who is the mayor of {TOWNS[0]}?"), answer, question], NEWS)


def run_flow(engine: SemShareEngine, tokens: int, **options: Any) -> list[Generation]:
    """Answers to the flow's prompts, one after the other."""
    return [
        engine.generate(asked.prompt, documents=asked.documents, max_new_tokens=tokens, **options)
        for asked in write_flow()
    ]


class ForgetfulEngine(SemShareEngine):
    """An engine whose calls leave nothing behind unless ``keeps`` is set, so that calls can be repeated."""

    keeps = True

    def _remember(self, call: Call, runtime: Runtime) -> None:
        if self.keeps:
            super()._remember(call, runtime)


class TimedSubject:
    """A model with random weights, and the scenarios that it is timed on.

    Args:
        checks: whose device and preset these are.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self.tokenizer = load_tokenizer()
        preset = checks.options.preset
        seconds = checks.time(lambda: setattr(self, "model", self._make(preset)))
        parameters = sum(parameter.numel() for parameter in self.model.parameters()) / 1e9
        checks.say(f"model {preset}", seconds=seconds, parameters=parameters, dtype=str(self.model.dtype))
        self.renderer = PromptRenderer(self.tokenizer)

    model: PreTrainedModel

    def _make(self, preset: str) -> PreTrainedModel:
        if preset != TINY:
            return make_random(preset, str(self._checks.device), "auto", 0).model
        return make_tiny(self._checks.options.layers).to(self._checks.device)

    def make_engine(self, mode: str, store: StoreConfig = _ROOM) -> ForgetfulEngine:
        """An engine with an empty store, and no guard against deviation, which means nothing on random weights."""
        reuse = ReuseConfig(mode=mode)  # type: ignore[arg-type]
        config = drop_guard(EngineConfig(reuse=reuse, store=store))
        return ForgetfulEngine(self.model, self.tokenizer, config)

    def make_case(self, name: str, length: int, seed: int) -> Case:
        """A scenario's prompts at a length."""
        return make_sized_case(name, length, seed, lambda prompt: len(self.renderer.render(prompt, {}).token_ids))

    def ask(self, engine: ForgetfulEngine, query: Query, tokens: int = 1) -> tuple[Generation, float]:
        """The answer, and by how many GB memory grew at its peak; nothing is kept of the call."""
        self._checks.synchronize()
        gc.collect()
        on_gpu, engine.keeps, before = self._checks.on_gpu, False, 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            said = tell(engine, query, tokens)
        finally:
            engine.keeps = True
        self._checks.synchronize()
        return said, (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else 0.0


def make_tiny(layers: int) -> PreTrainedModel:
    """A Llama as narrow as any, and as deep as asked for: waits and launches go with depth, hardly with width."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"max_position_embeddings": 131072, "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig(vocab_size=len(load_tokenizer()), num_hidden_layers=layers, **sizes, **more)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def tell(engine: SemShareEngine, query: Query, tokens: int = 1) -> Generation:
    """Let the engine answer, and keep what it will."""
    return engine.generate(query.prompt, documents=query.documents, max_new_tokens=tokens, namespace=NAMESPACE)
