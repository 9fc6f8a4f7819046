"""Bad input is refused at once, naming the field, the value and what is accepted; nothing is left of it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from semsharekv_integrations import AuditConfig, EngineConfig, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.errors import MOST_STOP_STRINGS, PromptError
from semsharekv_integrations.request import GenerateOptions
from semsharekv_integrations.sampling import SamplingConfig
from tiny_models import EngineMaker, make_model
from tool_templates import tool

TEXT = "The mayor of Velmar is Anna Kelsen."
LONE = "a lone \ud800 surrogate"


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


CIRCULAR: dict[str, Any] = {"type": "object"}
CIRCULAR["properties"] = {"self": CIRCULAR}


def with_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


NO_JSON = ({"const": float("nan")}, {"maximum": float("inf")}, {"default": object()}, {"const": "\ud800"})
TOOL = {"type": "function", "function": {"name": "f", "parameters": CIRCULAR}}

BAD_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *(("documents", {"documents": {key: TEXT}}) for key in (1, uuid.UUID(int=5), ("a", 1), b"id", "", None, LONE)),
    *(("documents", {"documents": given}) for given in (TEXT, b"x", 3, [""], ["  "], [3], {"a": " "}, {"a": None})),
    *(("documents", {"documents": given}) for given in ({"a": LONE}, [LONE], {"a": "It is not there."})),
    *(("namespace", {"namespace": name}) for name in ("", None, 3, b"n", LONE)),
    *(("session", {"session": name}) for name in ("", 3, b"s", LONE)),
    *(("max_new_tokens", {"max_new_tokens": value}) for value in (0, -1, 1.0, "1", True, None, 10**9, 513)),
    *(("temperature", {"temperature": value}) for value in (True, "1", None, -1, float("nan"), float("inf"), 10**400)),
    *(("top_p", {"top_p": value}) for value in (0, 1.1, True, "1", float("nan"))),
    *(("top_k", {"top_k": value}) for value in (0, 1.5, True, "1")),
    *(("repetition_penalty", {"repetition_penalty": value}) for value in (0, True, float("inf"))),
    *(("seed", {"seed": value}) for value in (-1, 2**63, 1.0, True, "1")),
    *(("prompt_lookup", {"prompt_lookup": value}) for value in (0, 65, 1.0, "1", None)),
    *(("stop", {"stop": value}) for value in (3, [""], "", [3], b"a", ["x" * 10**6], LONE, {"a": 1}.keys())),
    ("stop", {"stop": [f"{n}" for n in range(100_000)]}),
    *(("json_schema", {"json_schema": schema}) for schema in ("{}", [], 3, nested(5000), CIRCULAR, *NO_JSON)),
    ("tools[0].function.parameters", {"tools": [TOOL]}),
    *(("tools[0].function", {"tools": [with_parameters(schema)]}) for schema in NO_JSON),
    *(("tools[0].function", {"tools": [odd]}) for odd in (tool(LONE), tool("a", LONE), tool("a", x={"const": LONE}))),
    ("tools[0].function", {"tools": [tool("a", x={"enum": {1}})]}),
    ("options", {"max_tokens": 3}),
]


def calls_of(engine: SemShareEngine) -> list[Callable[..., Any]]:
    async def streamed(prompt: Any, **options: Any) -> list[Any]:
        return [chunk async for chunk in engine.astream(prompt, **options)]

    return [
        engine.generate,
        lambda prompt, **options: list(engine.stream(prompt, **options)),
        lambda prompt, **options: engine.generate_batch([prompt], **options),
        lambda prompt, **options: asyncio.run(engine.agenerate(prompt, **options)),
        lambda prompt, **options: asyncio.run(streamed(prompt, **options)),
    ]


@pytest.mark.parametrize(("field", "options"), BAD_OPTIONS)
def test_bad_options_are_refused_by_every_call(make_engine: EngineMaker, field: str, options: dict[str, Any]) -> None:
    engine = make_engine()
    prompt: Any = [{"role": "user", "content": TEXT}] if "tools" in options else TEXT
    for call in calls_of(engine):
        with pytest.raises(ValueError, match="accepted is") as refusal:
            call(prompt, **options)
        assert str(refusal.value).startswith((field, f"{field}[")) and len(str(refusal.value)) < 2000
        str(refusal.value).encode()
    assert engine.stats()["requests"] == engine.stats()["store_entries"] == 0


BAD_PROMPTS = [
    *("", [], None, 3, b"text", {}, {"role": "user"}, iter(["x"]), LONE, [3], [{"role": "user", "content": LONE}]),
    [{"role": "user", "content": [{"type": "text", "text": LONE}]}],
]


@pytest.mark.parametrize("prompt", BAD_PROMPTS, ids=lambda prompt: ascii(prompt).split(" at 0x")[0][:40])
def test_bad_prompts_are_refused_by_every_call(make_engine: EngineMaker, prompt: Any) -> None:
    engine = make_engine()
    for call in calls_of(engine):
        with pytest.raises(PromptError, match="accepted is"):
            call(prompt)


OTHER_CALLS: list[tuple[str, Callable[[SemShareEngine], Any]]] = [
    ("documents", lambda engine: engine.warm(TEXT)),
    ("documents", lambda engine: engine.warm(None)),  # type: ignore[arg-type]
    ("documents", lambda engine: engine.warm({1: TEXT})),  # type: ignore[dict-item]
    ("documents", lambda engine: engine.warm([TEXT, ""])),
    ("documents", lambda engine: engine.warm([TEXT, LONE])),
    ("namespace", lambda engine: engine.warm([TEXT], namespace="")),
    ("pinned", lambda engine: engine.warm([TEXT], pinned="yes")),  # type: ignore[arg-type]
    ("progress", lambda engine: engine.warm([TEXT], progress=1)),  # type: ignore[arg-type]
    ("ttl_s", lambda engine: engine.warm([TEXT], ttl_s="1")),  # type: ignore[arg-type]
    ("prompts", lambda engine: engine.generate_batch(TEXT)),
    ("prompts", lambda engine: engine.generate_batch({"role": "user", "content": TEXT})),  # type: ignore[arg-type]
    ("prompts", lambda engine: engine.generate_batch(None)),  # type: ignore[arg-type]
    *(("document_id", lambda engine, key=key: engine.forget(key)) for key in (None, "", 3, uuid.UUID(int=5), LONE)),
    ("namespace", lambda engine: engine.forget("d", namespace=3)),  # type: ignore[arg-type]
    *(("namespace", lambda engine, name=name: engine.clear(namespace=name)) for name in (3, "", LONE)),
    ("namespace", lambda engine: engine.clear(session="s")),
    *(("session", lambda engine, name=name: engine.clear("n", session=name)) for name in (3, "")),
    *(("path", lambda engine, path=path: engine.save(path)) for path in (None, "", 3, "a\0b")),
    *(("path", lambda engine, path=path: engine.load(path)) for path in (None, "", 3)),
    ("callback", lambda engine: engine.observe(3)),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("mode", ["exact", "off"])
@pytest.mark.parametrize(("field", "call"), OTHER_CALLS)
def test_other_calls_refuse_by_name_before_anything_is_done(
    make_engine: EngineMaker, field: str, call: Callable[[SemShareEngine], Any], mode: str
) -> None:
    engine = make_engine(mode)
    with pytest.raises(ValueError, match="accepted") as refusal:
        call(engine)
    assert str(refusal.value).startswith(field)
    assert engine.stats()["store_entries"] == 0


BAD_CONFIGS: list[tuple[str, Callable[[], Any]]] = [
    ("reuse", lambda: EngineConfig(reuse="exact")),  # type: ignore[arg-type]
    ("store", lambda: EngineConfig(store={})),  # type: ignore[arg-type]
    ("audit", lambda: EngineConfig(audit=0.5)),  # type: ignore[arg-type]
    ("reuse", lambda: EngineConfig(reuse=None)),  # type: ignore[arg-type]
    ("store.kv_bits", lambda: StoreConfig(kv_bits=8.0)),  # type: ignore[arg-type]
    ("store.directory", lambda: StoreConfig(directory="a\0b")),
    ("store.directory", lambda: StoreConfig(directory=3)),  # type: ignore[arg-type]
    ("store.shared_namespace", lambda: StoreConfig(shared_namespace=LONE)),
    ("stop", lambda: SamplingConfig(stop="ab")),  # type: ignore[arg-type]
]
KINDS: tuple[tuple[Any, str], ...] = (
    (ReuseConfig, "reuse."),
    (StoreConfig, "store."),
    (AuditConfig, "audit."),
    (EngineConfig, ""),
    (SamplingConfig, ""),
)
BAD_CONFIGS += [
    ("config", lambda given=given: SemShareEngine.from_pretrained("x", given)) for given in (3, {}, "exact")
]
BAD_CONFIGS += [
    (prefix + name, lambda kind=kind, name=name: kind(**{name: object()}))
    for kind, prefix in KINDS
    for name in kind.__dataclass_fields__
]


@pytest.mark.parametrize(("field", "make"), BAD_CONFIGS)
def test_every_setting_refuses_another_type(field: str, make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match="accepted is") as refusal:
        make()
    assert str(refusal.value).startswith(field) or field.removeprefix("reuse.") in str(refusal.value)


def accepted_of(call: Callable[[Any], Any]) -> str:
    """What the error of ``call`` says is accepted, when it is given what no field takes."""
    with pytest.raises(ValueError, match="; accepted is ") as refusal:
        call(object())
    return str(refusal.value).partition("; accepted is ")[2]


def is_refused(call: Callable[[Any], Any]) -> bool:
    try:
        call(None)
    except ValueError:
        return True
    return False


def assert_told_of_none(call: Callable[[Any], Any], field: str) -> None:
    """An error says that None is accepted exactly where it is."""
    assert ("None" in accepted_of(call)) != is_refused(call), (field, accepted_of(call))


@pytest.mark.parametrize("field", GenerateOptions.__annotations__)
def test_errors_of_options_say_where_none_is_accepted(make_engine: EngineMaker, field: str) -> None:
    engine = make_engine("off")
    assert_told_of_none(lambda value: engine.generate(TEXT, **{"max_new_tokens": 1, field: value}), field)


@pytest.mark.parametrize(("kind", "field"), [(kind, name) for kind, _ in KINDS for name in kind.__dataclass_fields__])
def test_errors_of_settings_say_where_none_is_accepted(kind: Any, field: str) -> None:
    mode = {"mode": "semantic"} if kind is ReuseConfig and field != "mode" else {}
    assert_told_of_none(lambda value: kind(**mode, **{field: value}), field)


NONE_OR_NOT: dict[str, Callable[[SemShareEngine, Any], Any]] = {
    "clear": lambda engine, value: engine.clear(value),
    "session of clear": lambda engine, value: engine.clear("n", value),
    "forget": lambda engine, value: engine.forget(value),
    "namespace of forget": lambda engine, value: engine.forget("d", value),
    "warm": lambda engine, value: engine.warm(value),
    "namespace of warm": lambda engine, value: engine.warm([TEXT], value),
    "pinned": lambda engine, value: engine.warm([TEXT], pinned=value),
    "ttl_s": lambda engine, value: engine.warm([TEXT], ttl_s=value),
    "progress": lambda engine, value: engine.warm([TEXT], progress=value),
    "description": lambda engine, value: engine.generate([HELLO], tools=[tool("a", value)]),
    "parameters": lambda engine, value: engine.generate([HELLO], tools=[with_parameters(value)]),
    "config": lambda engine, value: SemShareEngine.from_pretrained("semsharekv/reference", value),
    "device": lambda engine, value: SemShareEngine.from_pretrained("semsharekv/reference", device=value),
    "dtype": lambda engine, value: SemShareEngine.from_pretrained("semsharekv/reference", dtype=value),
    "save": lambda engine, value: engine.save(value),
    "observe": lambda engine, value: engine.observe(value),
    "prompts": lambda engine, value: engine.generate_batch(value),
}
HELLO = {"role": "user", "content": TEXT}


def with_parameters(value: Any) -> Any:
    return {"type": "function", "function": {"name": "a", "parameters": value}}


@pytest.mark.parametrize("call", NONE_OR_NOT)
def test_errors_of_other_calls_say_where_none_is_accepted(make_engine: EngineMaker, call: str) -> None:
    engine = make_engine()
    assert_told_of_none(partial(NONE_OR_NOT[call], engine), call)


class Odd:
    """What shows as text that cannot be written, or not at all."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    def __repr__(self) -> str:
        if self.text is None:
            raise KeyError("no text")
        return self.text


@pytest.mark.parametrize("text", [None, LONE, "x" * 10**6], ids=["none", "surrogate", "long"])
def test_values_that_show_badly_are_named_as_well_as_they_can_be(make_engine: EngineMaker, text: str | None) -> None:
    engine = make_engine("off")
    for field in GenerateOptions.__annotations__:
        with pytest.raises(ValueError, match=f"^{field} is .*; accepted is ") as refusal:
            engine.generate(TEXT, **{field: Odd(text)})
        assert len(str(refusal.value).encode()) < 2000


def test_numpys_numbers_are_as_good_as_pythons(make_engine: EngineMaker) -> None:
    given = {
        "max_new_tokens": np.int64(3),
        "temperature": np.float32(0.5),
        "top_p": np.float64(0.9),
        "seed": np.int32(4),
    }
    plain = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 4}
    results = [make_engine().generate(TEXT, **options).token_ids for options in (given, plain)]
    assert results[0] == results[1]
    assert ReuseConfig(min_prefix_tokens=np.int64(4)) == ReuseConfig(min_prefix_tokens=4)
    with pytest.raises(ValueError, match="temperature"):
        make_engine().generate(TEXT, temperature=np.bool_(True))


def test_within_the_window_the_limit_is_what_the_prompt_leaves(make_engine: EngineMaker) -> None:
    engine = make_engine(max_context_tokens=40)
    assert engine.generate(TEXT, max_new_tokens=40).report.output_tokens <= 40 - 9
    assert engine.generate(TEXT).report.output_tokens <= 40 - 9, "the default asks for what there is"


def test_as_many_stop_strings_as_the_error_names_are_accepted(make_engine: EngineMaker) -> None:
    stop = [f"no such text {n}" for n in range(MOST_STOP_STRINGS)]
    assert make_engine().generate(TEXT, stop=stop, max_new_tokens=2).report.output_tokens > 0


@pytest.mark.parametrize("name", ["a\0b", "\U0001f600", "é" * 500, "' OR 1=1 --"])
def test_odd_names_do_everywhere(make_engine: EngineMaker, tmp_path: Path, name: str) -> None:
    store = StoreConfig(directory=tmp_path)
    first = make_engine(store=store)
    first.generate(f"{TEXT} Who?", documents={name: TEXT}, namespace=name, session=name, max_new_tokens=2)
    first.store.check()
    first.close()
    second = make_engine(store=store)
    second.generate("Another.", max_new_tokens=2)
    assert second.forget(name, namespace=name) == 1
    second.close()


def test_a_name_that_cannot_be_written_fails_alone(make_engine: EngineMaker, tmp_path: Path) -> None:
    """Even past the checks of calls: no other tenant's entry waits behind it."""
    engine = make_engine(store=StoreConfig(directory=tmp_path))
    engine.generate(TEXT, namespace="a", max_new_tokens=2)
    (reference,) = engine.store.fetch_all()
    for labels in ({uuid.UUID(int=5): 1}, {LONE: 1}, {"d": object()}):
        bad = reference.__class__(**{**vars(reference), "document_starts": labels})
        with pytest.raises(ValueError, match="reference"):
            engine.store.put(bad)
        engine.store.check()
    engine.generate("Another.", namespace="b", documents={"d": "Another."}, max_new_tokens=2)
    assert engine.stats()["store_write_failed"] == 0
    engine.store.check()
    engine.close()
    again = make_engine(store=StoreConfig(directory=tmp_path))
    assert again.generate("Another.", namespace="b", max_new_tokens=2).report.prefix_tokens > 0


def test_every_option_is_tried() -> None:
    tried = {name for _, options in BAD_OPTIONS for name in options}
    assert GenerateOptions.__annotations__.keys() - tried <= {"tool_choice", "chat_template_kwargs"}


@pytest.mark.parametrize("given", [None, 3, "gpt2", torch.nn.Linear(2, 2)])
def test_what_is_no_model_or_no_tokenizer_is_refused_by_name(llama, tokenizer, given: Any) -> None:
    with pytest.raises(ValueError, match=f"model is '{type(given).__name__}'; accepted is a loaded transformers model"):
        SemShareEngine(given, tokenizer)
    with pytest.raises(
        ValueError, match=f"tokenizer is '{type(given).__name__}'; accepted is a transformers tokenizer"
    ):
        SemShareEngine(llama, given)


def test_a_tokenizer_of_another_model_is_told_by_its_tokens(tokenizer) -> None:
    small = SemShareEngine(make_model("llama", 40), tokenizer, EngineConfig())
    for call in [*calls_of(small), lambda text: small.warm([text])]:
        with pytest.raises(PromptError, match=r"prompt has token \d+ \(.*\); accepted is tokens below 40"):
            call(TEXT)
    assert small.stats()["store_entries"] == 0
