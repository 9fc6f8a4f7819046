"""KV belongs to the state of the model that made it: whatever changes the model, no answer rests on KV of before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import (
    EngineConfig,
    ReuseConfig,
    SemShareEngine,
    StoreConfig,
    StoreFileError,
    UnsupportedModelError,
)
from semsharekv_integrations.model.state import StateWatch
from tiny_models import make_model

PROMPT = "News from Velmar . The mayor of Velmar is Anna Kelsen . The cost is 42 million crowns . " * 3
LONGER = f"{PROMPT} Who is the mayor ?"
Change = Callable[[Any], Callable[[Any], Any] | None]  # changes a model; gives what takes that back, if anything does
MODES = ("exact", "identical", "semantic")


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return make_model("llama", len(tokenizer))


@pytest.fixture
def adapted(model: PreTrainedModel) -> Any:
    """A model with three adapters, of which ``tone`` is active."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    found = get_peft_model(model, lora, adapter_name="tone")
    for name in ("law", "spare"):
        found.add_adapter(name, lora)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in found.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    found.set_adapter("tone")
    return found.eval()


def engine_of(model: Any, tokenizer: Any, mode: str = "exact", directory: Path | None = None) -> SemShareEngine:
    config = EngineConfig(reuse=ReuseConfig(mode=mode), store=StoreConfig(directory=directory))  # type: ignore[arg-type]
    return SemShareEngine(model, tokenizer, config)


def answer(engine: SemShareEngine, prompt: str = LONGER, **options: Any) -> tuple[list[int], int]:
    found = engine.generate(prompt, max_new_tokens=6, **options)
    return found.token_ids, found.report.reused_tokens


def afresh(model: Any, tokenizer: Any) -> list[int]:
    """What an engine says that has never seen the model in another state."""
    return answer(engine_of(model, tokenizer, "off"))[0]


def train(model: Any) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.enable_grad():
        loss = model(input_ids=torch.arange(9)[None], labels=torch.arange(9)[None]).loss
        optimizer = torch.optim.SGD(weights, lr=5.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def in_place(model: Any) -> Callable[[Any], Any]:
    before = copy.deepcopy(model.state_dict())
    train(model)
    return lambda changed: changed.load_state_dict(before)


def by_data(model: Any) -> None:
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.1)


def one_row(model: Any) -> None:
    with torch.no_grad():
        model.model.embed_tokens.weight[5:400].neg_()


def one_weight(model: Any) -> Callable[[Any], Any]:
    weight = model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.neg_()
    return lambda _: weight.data.neg_()


def new_data(model: Any) -> Callable[[Any], Any]:
    weight = model.model.layers[0].self_attn.v_proj.weight
    before = weight.data
    weight.data = before * 3
    return lambda _: setattr(weight, "data", before)


def transpose(model: Any) -> Callable[[Any], Any]:
    square = [w for w in model.model.layers.parameters() if w.ndim == 2 and w.shape[0] == w.shape[1]]
    assert square

    def turn(_: Any) -> None:
        for weight in square:
            weight.data = weight.data.t()  # the same memory, read in another order

    turn(model)
    return turn


class Tripled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return -3 * super().forward(input)


def another_class(model: Any) -> Callable[[Any], Any]:
    projection = model.model.layers[0].mlp.down_proj
    projection.__class__ = Tripled
    return lambda _: setattr(projection, "__class__", torch.nn.Linear)


def cast(model: Any) -> None:
    model.bfloat16()


def resize(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 64)


def replace_module(model: Any) -> Callable[[Any], Any]:
    before = model.model.layers[1].mlp
    model.model.layers[1].mlp = copy.deepcopy(before)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(-2)
    return lambda _: setattr(model.model.layers[1], "mlp", before)


def swap_layers(model: Any) -> Callable[[Any], Any]:
    def swap(changed: Any) -> None:
        layers = changed.model.layers
        layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp

    swap(model)
    return swap


def scale_attention(model: Any) -> Callable[[Any], Any]:
    attention = model.model.layers[0].self_attn
    before, attention.scaling = attention.scaling, attention.scaling * 4
    return lambda _: setattr(attention, "scaling", before)


def turn_otherwise(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def norm_otherwise(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 3.0


def hook(model: Any) -> Callable[[Any], Any]:
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * -3)
    return lambda _: handle.remove()


def train_mode(model: Any) -> None:
    train(model.train())


PLAIN: list[Change] = [
    in_place,
    by_data,
    one_row,
    one_weight,
    new_data,
    transpose,
    another_class,
    cast,
    resize,
    replace_module,
    swap_layers,
    scale_attention,
    turn_otherwise,
    norm_otherwise,
    hook,
    train_mode,
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", PLAIN, ids=lambda change: change.__name__)
def test_no_answer_rests_on_kv_of_another_state(model: Any, tokenizer: Any, change: Change, mode: str) -> None:
    engine = engine_of(model, tokenizer, mode)
    before, _ = answer(engine)
    back = change(model)
    if change is turn_otherwise and mode != "exact":
        with pytest.raises(UnsupportedModelError, match="keys at another position"):
            answer(engine)
        return
    assert answer(engine) == (afresh(model, tokenizer), 0)
    again, reused = answer(engine)
    assert again == afresh(model, tokenizer) and reused > 0, "KV of the new state is found"
    if back is not None:
        back(model)
        again, reused = answer(engine)
        assert again == before and reused > 0, "KV of the first state is found again"
    engine.store.check()


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_a_call_takes_every_part_of_the_model_out_of_training(model: Any, tokenizer: Any, mode: str) -> None:
    engine = engine_of(model, tokenizer, mode)
    model.model.layers[1].mlp.train()
    answer(engine)
    assert not any(module.training for module in model.modules())


def switch(model: Any) -> Callable[[Any], Any]:
    model.set_adapter("law")
    return lambda changed: changed.set_adapter("tone")


def both(model: Any) -> Callable[[Any], Any]:
    model.base_model.set_adapter(["tone", "law"])
    return lambda changed: changed.set_adapter("tone")


def scale(model: Any) -> Callable[[Any], Any]:
    def scaled(factor: float) -> None:
        for module in model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["tone"] *= factor

    scaled(4.0)
    return lambda _: scaled(0.25)


def disable(model: Any) -> Callable[[Any], Any]:
    model.base_model.disable_adapter_layers()
    return lambda changed: changed.base_model.enable_adapter_layers()


def merge(model: Any) -> None:
    model.merge_adapter()


def delete(model: Any) -> None:
    model.delete_adapter("tone")
    model.set_adapter("law")


def train_adapter(model: Any) -> None:
    train(model)


def train_adapter_by_data(model: Any) -> None:
    for name, weight in model.named_parameters():
        if "lora_B.tone" in name:
            weight.data.mul_(-1)


ADAPTERS: list[Change] = [switch, both, scale, disable, merge, delete, train_adapter, train_adapter_by_data]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", ADAPTERS, ids=lambda change: change.__name__)
def test_adapters_have_kv_of_their_own(adapted: Any, tokenizer: Any, change: Change, mode: str) -> None:
    test_no_answer_rests_on_kv_of_another_state(adapted, tokenizer, change, mode)


def test_what_is_not_active_does_not_count(adapted: Any, tokenizer: Any) -> None:
    engine = engine_of(adapted, tokenizer)
    before, _ = answer(engine)
    adapted.add_adapter("late", adapted.peft_config["law"])
    adapted.delete_adapter("spare")
    with torch.no_grad():
        adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["law"].weight.mul_(2)
    again, reused = answer(engine)
    assert again == before and reused > 0


def test_without_adapters_all_states_are_one(adapted: Any, tokenizer: Any) -> None:
    engine = engine_of(adapted, tokenizer)
    for name in ("tone", "law"):
        adapted.set_adapter(name)
        with adapted.disable_adapter():
            found, reused = answer(engine)
    assert reused > 0
    with adapted.disable_adapter():
        assert found == afresh(adapted, tokenizer)


@pytest.mark.parametrize("mode", MODES)
def test_a_call_in_which_the_model_changes_leaves_nothing(adapted: Any, tokenizer: Any, mode: str) -> None:
    engine = engine_of(adapted, tokenizer, mode)
    chunks = engine.stream(LONGER, max_new_tokens=12, session="s")
    next(chunks)
    adapted.set_adapter("law")
    next(chunks)
    adapted.set_adapter("tone")  # as at the beginning, but not all along
    list(chunks)
    assert engine.stats()["store_entries"] == 0
    for name in ("tone", "law"):
        adapted.set_adapter(name)
        assert answer(engine, session="s") == (afresh(adapted, tokenizer), 0)


@pytest.mark.parametrize("change", [in_place, switch], ids=lambda change: change.__name__)
def test_a_call_that_began_before_a_change_stores_under_neither(adapted: Any, tokenizer: Any, change: Change) -> None:
    engine = engine_of(adapted, tokenizer)
    chunks = engine.stream(LONGER, max_new_tokens=12)
    next(chunks)
    change(adapted)
    list(chunks)
    assert engine.stats()["store_entries"] == 0
    assert answer(engine) == (afresh(adapted, tokenizer), 0)


def test_a_document_is_forgotten_in_every_state(adapted: Any, tokenizer: Any) -> None:
    engine = engine_of(adapted, tokenizer)
    for name in ("tone", "law"):
        adapted.set_adapter(name)
        answer(engine, documents={"d": PROMPT}, namespace="n")
        engine.generate("Something else .", namespace="m", max_new_tokens=1)
    assert {reference.namespace for reference in engine.store.references()} == {"n", "m"}
    assert len(engine.store.references("n")) == 2
    assert engine.forget("d", "n") == 2 and not engine.store.references("n")
    assert engine.clear("m") == 2 and engine.stats()["store_entries"] == 0
    engine.store.check()


def test_a_shared_namespace_is_shared_in_every_state(adapted: Any, tokenizer: Any) -> None:
    config = EngineConfig(reuse=ReuseConfig(mode="exact"), store=StoreConfig(shared_namespace="all"))
    engine = SemShareEngine(adapted, tokenizer, config)
    for name in ("tone", "law"):
        adapted.set_adapter(name)
        assert answer(engine, namespace="all")[1] == 0
        found, reused = answer(engine, namespace="tenant")
        assert reused > 0 and found == afresh(adapted, tokenizer)
    assert answer(engine, namespace="other\0tenant")[1] > 0 and not engine.store.references("none")


def test_many_states_take_no_more_room_than_one(model: Any, tokenizer: Any) -> None:
    engine = engine_of(model, tokenizer, "semantic")
    answer(engine)
    room = engine.store.stats()["bytes"]
    config = EngineConfig(reuse=ReuseConfig(mode="semantic"), store=StoreConfig(max_bytes=2 * room))
    engine = SemShareEngine(model, tokenizer, config)
    for _ in range(20):
        one_weight(model)
        scale_attention(model)
        answer(engine)
    assert 0 < engine.store.stats()["bytes"] <= 2 * room
    assert len(engine._load()._states._runtimes) <= 8
    engine.store.check()


@pytest.mark.parametrize("change", [switch, one_row, cast], ids=lambda change: change.__name__)
def test_a_directory_keeps_states_apart(adapted: Any, tokenizer: Any, change: Change, tmp_path: Path) -> None:
    change = change if change is not one_row else (lambda model: one_row(model.base_model.model))
    engine = engine_of(adapted, tokenizer, directory=tmp_path)
    first, _ = answer(engine)
    back = change(adapted)
    assert answer(engine) == (afresh(adapted, tokenizer), 0)
    engine.store.check()
    engine.close()
    other = engine_of(adapted, tokenizer, directory=tmp_path)
    assert answer(other) == (afresh(adapted, tokenizer), 0)
    other.close()
    if back is not None:
        back(adapted)
        engine = engine_of(adapted, tokenizer, directory=tmp_path)
        found, reused = answer(engine)
        assert found == first and reused > 0
        engine.close()


def test_a_file_is_of_one_state(adapted: Any, tokenizer: Any, tmp_path: Path) -> None:
    engine, file = engine_of(adapted, tokenizer), tmp_path / "kv.safetensors"
    answer(engine)
    adapted.set_adapter("law")
    answer(engine)
    assert engine.save(file) == 1
    other = engine_of(adapted, tokenizer)
    assert other.load(file) == 1
    found, reused = answer(other)
    assert found == afresh(adapted, tokenizer) and reused > 0
    adapted.set_adapter("tone")
    with pytest.raises(StoreFileError, match="fingerprint"):
        other.load(file)
    assert answer(other) == (afresh(adapted, tokenizer), 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_value_counts(tokenizer: Any, dtype: torch.dtype) -> None:
    model = make_model("llama", 50).to(dtype)
    fingerprint = StateWatch(model).get_state().fingerprint
    assert StateWatch(copy.deepcopy(model)).get_state().fingerprint == fingerprint
    generator = torch.Generator().manual_seed(0)
    weight = model.model.layers[2].mlp.down_proj.weight.data.view(-1)
    seen = {fingerprint}
    for _ in range(40):
        places = torch.randperm(len(weight), generator=generator)[:2]
        changed = weight.clone()
        changed[places] = -changed[places]
        other = copy.deepcopy(model)
        other.model.layers[2].mlp.down_proj.weight.data.view(-1).copy_(changed)
        seen.add(StateWatch(other).get_state().fingerprint)
    assert len(seen) == 41


def test_a_forward_that_is_replaced_in_its_class_counts(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = StateWatch(model)
    first = watch.get_state()
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, states: -states)
        other = watch.get_state()
        assert other.key != first.key and other.fingerprint != first.fingerprint
        assert StateWatch(model).get_state()[:2] == other[:2]
    assert watch.get_state()[:2] == first[:2]


def test_looking_costs_no_change(model: Any, tokenizer: Any) -> None:
    """Nothing that the engine itself does, nor another one at the same time, looks like a change."""
    watch = StateWatch(model)
    before = watch.get_state()
    for mode in (*MODES, "off"):
        engine = engine_of(model, tokenizer, mode)
        for prompt in (PROMPT, LONGER, f"First . {LONGER}"):
            answer(engine, prompt)
    assert watch.get_state() == before
    assert isinstance(model, LlamaForCausalLM)
