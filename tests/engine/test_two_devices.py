"""A model over two devices says what it says on one, and each layer's KV lies where the layer is, wherever it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from simulated_device import move_model
from tiny_models import STATEFUL, make_model

NUM_LAYERS = 3  # the last of them on the second device
WORDS = "the mayor of cost crowns and schools open again soon shops stayed shut for hours news by morning post"
DOCUMENTS = [" ".join(WORDS.split()[n % 19] for n in range(start, start * 40, start)) + "." for start in (2, 3, 5)]
QUESTIONS = ("Who is the mayor?", "Who was that?", "What is it?", "Who is the mayor of it?")
ORDERS = ([0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 1, 2])
PROMPTS = ["\n\n".join([*(DOCUMENTS[n] for n in order), asked]) for order, asked in zip(ORDERS, QUESTIONS, strict=True)]
Said = list[tuple[list[int], int]]

pytestmark = pytest.mark.usefixtures("pretended_device")


def home_of(layer: int) -> torch.device:
    return torch.device("cuda", int(layer == NUM_LAYERS - 1))


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with its last layer, norm and head on the second device."""
    inner = model.base_model_prefix
    names = [name for name, _ in model.base_model.named_children() if name != "layers"]
    places = {f"{inner}.{name}": home_of(NUM_LAYERS - 1 if "norm" in name else 0) for name in names}
    places |= {f"{inner}.layers.{index}": home_of(index) for index in range(NUM_LAYERS)}
    dispatched = dispatch_model(copy.deepcopy(model), {**places, "lm_head": home_of(NUM_LAYERS - 1)})
    assert {weight.device for weight in dispatched.parameters()} == {home_of(0), home_of(NUM_LAYERS - 1)}
    return dispatched


@pytest.fixture
def engines(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Iterator[SemShareEngine]]:
    """Makes engines, with stores of their own, of the model on one device and on two."""

    def make(mode: Any, model: PreTrainedModel = llama, **config: Any) -> Iterator[SemShareEngine]:
        reuse = config.pop("reuse", {})
        for placed in (move_model(model), spread(model)):
            yield SemShareEngine(placed, tokenizer, EngineConfig(ReuseConfig(mode, **reuse), **config))

    return make


def answer(engine: SemShareEngine, prompts: Sequence[str] = PROMPTS) -> Said:
    done = [engine.generate(prompt, max_new_tokens=4) for prompt in prompts]
    return [(one.token_ids, one.report.reused_tokens) for one in done]


def list_kept(engine: SemShareEngine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and tensor of all KV that the engine's store has in memory."""
    for space in engine._store._entries.namespaces.values():
        for node in [*space.tree.nodes(), *(entry.node for entry in space.tainted.values())]:
            yield from node.held.tensors.items() if node.held is not None else ()


def assert_at_home(engine: SemShareEngine) -> None:
    kept = list(list_kept(engine))
    assert kept
    for name, tensor in kept:
        layer = int(name.partition("@")[2].partition("/")[0] if "@" in name else name.partition(".")[0])
        if tensor.ndim and tensor.shape[1]:
            assert tensor.device == home_of(layer), name


@pytest.mark.parametrize("mode", ["off", "exact", "identical", "paper"])
def test_every_mode_says_what_it_says_on_one_device(engines: Any, mode: str) -> None:
    one, two = engines(mode)
    said = answer(two)
    assert said == answer(one) and (mode == "off" or any(reused for _, reused in said))
    if mode != "off":
        assert_at_home(two)
    adapter = two._load().adapter
    assert adapter.device == home_of(0) == two.model.device, "ids go to the embeddings"


def list_places(engine: SemShareEngine) -> set[tuple[int, str]]:
    """Return the pairs of a layer and the type of a device where it has KV; ``AssertionError`` if on a wrong one."""
    found = set()
    for name, tensor in list_kept(engine):
        layer = int(name.partition(".")[0])
        assert tensor.device in (home_of(layer), torch.device("cpu")), name
        found.add((layer, tensor.device.type))
    return found


@pytest.mark.parametrize(("mode", "bits"), [("exact", None), ("identical", 8)])
def test_kv_goes_to_the_host_and_comes_home(engines: Any, mode: str, bits: int | None) -> None:
    prompts = [*PROMPTS, *(f"{n} {text}" for n, text in enumerate(DOCUMENTS)), *PROMPTS[::-1]]
    size = 200_000 if bits is None else 40_000  # less than the prompts need
    one, two = engines(mode, store=StoreConfig(max_bytes=size, host_max_bytes=2**30, kv_bits=bits))
    assert answer(two, prompts) == answer(one, prompts)
    moved = [[engine.stats()[f"store_{name}"] for name in ("demoted", "promoted")] for engine in (one, two)]
    assert moved[0] == moved[1] and moved[1][0] and (moved[1][1] or bits)
    assert list_places(two) == {(layer, kind) for layer in range(NUM_LAYERS) for kind in ("cpu", "cuda")}


def test_kv_comes_home_from_a_directory_and_from_a_file(engines: Any, tmp_path: Path) -> None:
    said = []
    for number in range(2):

        def make(**config: Any) -> SemShareEngine:
            return list(engines("identical", **config))[number]  # noqa: B023

        store, file = StoreConfig(directory=tmp_path / str(number)), tmp_path / f"{number}.kv"
        first = make(store=store)
        rounds = [answer(first, PROMPTS[:2])]
        first.save(file)
        first.close()
        again, loaded = make(store=store), make()
        assert loaded.load(file)
        for engine in (again, loaded):
            if number:
                assert {kind for _, kind in list_places(loaded)} == {"cuda"}
            rounds.append(answer(engine, PROMPTS[2:]))
            engine.close()
        said.append(rounds)
    assert said[0] == said[1] and all(any(reused for _, reused in one) for one in said[0][1:])


def test_states_come_home_too(engines: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model("qwen3_next", len(tokenizer), **STATEFUL["qwen3_next"])
    prompts = [PROMPTS[0], PROMPTS[0] + " Why?", PROMPTS[0]]
    for store in (StoreConfig(), StoreConfig(max_bytes=0, host_max_bytes=2**30)):
        one, two = engines("exact", model, store=store)
        said = answer(two, prompts)
        assert said == answer(one, prompts) and said[1][1]
