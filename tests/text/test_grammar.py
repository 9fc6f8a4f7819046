"""Answers that are held to a schema or to tool calls: valid whatever the model wants, and whole or marked as cut."""

from __future__ import annotations

import json
import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordPiece
from transformers import PreTrainedTokenizerFast

from semsharekv_integrations import ReuseConfig, SemShareEngine, SemShareError, UnsupportedModelError
from semsharekv_integrations.text.answer_stream import AnswerReaderFactory
from semsharekv_integrations.text.grammar import Constraint, ConstraintProcessor, GrammarFactory
from semsharekv_integrations.text.schema import close_schema
from semsharekv_integrations.text.tool_format import ToolFormat
from tiny_models import EngineMaker, make_model
from tool_templates import TEMPLATES, TOOLS, tool, tool_tokenizer

ASK = [{"role": "user", "content": "What happened in Prorna?"}]
REPORT = {
    "type": "object",
    "properties": {
        "town": {"$ref": "#/$defs/town"},
        "affected": {"type": "integer", "minimum": 0, "maximum": 5000},
        "kinds": {"type": "array", "items": {"enum": ["flood", "fire"]}, "minItems": 1, "maxItems": 2},
        "mayor": {"type": "object", "properties": {"known": {"type": "boolean"}}, "required": ["known"]},
    },
    "required": ["town", "affected", "kinds", "mayor"],
    "$defs": {"town": {"type": "string", "pattern": "^[A-Z][a-z]{2,6}$"}},
}


ROOMY = {"max_position_embeddings": 1024, "eos_token_id": None}


def valid_report(text: str) -> bool:
    found = json.loads(text)
    return (
        list(found) == list(REPORT["properties"])
        and re.fullmatch("[A-Z][a-z]{2,6}", found["town"]) is not None
        and type(found["affected"]) is int
        and 0 <= found["affected"] <= 5000
        and 1 <= len(found["kinds"]) <= 2
        and set(found["kinds"]) <= {"flood", "fire"}
        and list(found["mayor"]) == ["known"]
        and type(found["mayor"]["known"]) is bool
    )


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: tool_tokenizer(name, special=name != "bare") for name in TEMPLATES}


@pytest.mark.parametrize("options", [{}, {"temperature": 3.0, "seed": 1}, {"temperature": 1.0, "top_k": 1, "seed": 2}])
def test_json_of_the_schema_and_then_the_end(make_engine: EngineMaker, options: dict) -> None:
    generation = make_engine("off").generate(ASK, json_schema=REPORT, max_new_tokens=200, **options)
    assert generation.finish_reason == "stop" and not generation.tool_calls
    assert valid_report(generation.text), generation.text


@pytest.mark.parametrize("extra", [0, 1, 45])
def test_logits_may_be_wider_than_the_vocabulary(tokenizer, extra: int) -> None:
    engine = SemShareEngine(make_model("llama", len(tokenizer) + extra, **ROOMY), tokenizer)
    assert valid_report(engine.generate("News?", json_schema=REPORT, max_new_tokens=200).text)


def test_tokens_behind_the_vocabulary_and_forbidden_ones_are_out(tokenizer) -> None:
    constraint = GrammarFactory(tokenizer, [1]).build_json({"const": "ab"})
    scores = ConstraintProcessor(constraint)(torch.zeros(1, 1), torch.zeros(1, len(tokenizer) + 50))
    allowed = torch.isfinite(scores[0]).nonzero().flatten().tolist()
    assert allowed and {tokenizer.decode([token_id]) for token_id in allowed} <= {'"', '"a', '"ab', '"ab"'}
    suppressed = torch.full((1, len(tokenizer)), -torch.inf)  # by the model's own settings
    scores = ConstraintProcessor(constraint)(torch.zeros(1, 1), suppressed)
    assert torch.isfinite(scores[0]).nonzero().flatten().tolist() == allowed


def test_the_models_own_settings_do_not_break_it(tokenizer) -> None:
    model = make_model("llama", len(tokenizer))
    model.generation_config.min_new_tokens = 150
    model.generation_config.no_repeat_ngram_size = 1
    engine = SemShareEngine(model, tokenizer)
    generation = engine.generate("News?", json_schema=REPORT, max_new_tokens=200, repetition_penalty=1.5)
    assert valid_report(generation.text) and generation.finish_reason == "stop"


def test_a_limit_cuts_it_and_says_so(make_engine: EngineMaker) -> None:
    generation = make_engine().generate(ASK, json_schema=REPORT, max_new_tokens=5)
    assert generation.finish_reason == "length" and len(generation.token_ids) == 5
    with pytest.raises(json.JSONDecodeError):
        json.loads(generation.text)


def test_space_is_bounded(tokenizer) -> None:
    grammars = GrammarFactory(tokenizer, [1])
    whole = grammars.build_json(REPORT)
    consumed(whole, tokenizer, '{"town": "Prorna", "affected": 3, "kinds": ["fire"], "mayor": {"known": true}}')
    assert whole.is_complete
    for wrong in ("{ ", "{\n", '{"town":  ', '{"town" :'):
        with pytest.raises(SemShareError, match="left its grammar"):
            consumed(grammars.build_json(REPORT), tokenizer, wrong)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", ["any", "weather"])
def test_a_forced_call_is_valid_in_every_format(tokenizers, name: str, choice: str) -> None:
    tokenizer = tokenizers[name]
    engine = SemShareEngine(make_model("llama", len(tokenizer) + 3, **ROOMY), tokenizer)
    tools = TOOLS if choice != "any" else TOOLS[1:]
    generation = engine.generate(ASK, tools=tools, tool_choice=choice, max_new_tokens=120)
    assert (generation.finish_reason, generation.text) == ("tool_calls", "")
    (call,) = generation.tool_calls
    assert call.name == "weather" and list(call.arguments) == ["town", "days"]
    assert re.fullmatch("[A-Z][a-z]{0,7}", call.arguments["town"]) and 1 <= call.arguments["days"] <= 9


def consumed(constraint: Constraint, tokenizer, text: str) -> str:
    """The text of the tokens that may follow ``text``; "" if anything may."""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        constraint.add(token_id)
    allowed = constraint.find_allowed(len(tokenizer))
    return "" if allowed is None else "|".join(tokenizer.decode(int(i)) for i in allowed.nonzero())


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["tagged", "listed"])
def test_an_opened_call_is_held_to_the_tools_and_text_is_free(name: str, special: bool) -> None:
    tokenizer = tool_tokenizer(name, special=special)
    tool_format = ToolFormat.learn(tokenizer)
    one = tool_format.write([("get_news", {"town": "Prorna"})])
    grammars = GrammarFactory(tokenizer, [1])

    def follows(text: str) -> str:
        return consumed(grammars.build_opened_calls(tool_format, TOOLS), tokenizer, text)

    for text in ("", "Well <", f"Well {one}", f"{one} and text", "<|tool|>", "<|tool|> a"):
        assert follows(text) == "", text
    begun = one[: one.index("get_news")]
    for before in ("", "Well ", "<|tool|>", one + "\n", one + "<|tool|>"):
        after = follows(before + begun)
        assert after and set(after) <= set('|get_newsweather"'), before
    after = follows(begun + 'weather", "arguments": {"town": "P", "days": 1')
    assert after and "1" not in after


def test_what_a_schema_does_not_name_is_left_out() -> None:
    assert close_schema(REPORT)["additionalProperties"] is False
    assert close_schema(REPORT)["properties"]["mayor"]["additionalProperties"] is False
    free = {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer"}}
    both = {"allOf": [REPORT, {"properties": {"more": {}}}]}
    for schema in (free, both, {"type": "object"}, {"properties": {}, "anyOf": [{"required": ["a"]}]}):
        assert close_schema(schema) == schema
    assert close_schema({"anyOf": [REPORT]}) == {"anyOf": [close_schema(REPORT)]}


LOOP = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/a"}},
    "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
}


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"type": "nothing"}, "json_schema is .*nothing.*accepted is a schema"),
        ({"$ref": "#/$defs/x"}, "json_schema is "),
        ({"$ref": "#"}, r"json_schema is .*: \$ref '#' leads back to itself"),
        (LOOP, r"json_schema is .*: \$ref '#/\$defs/[ab]' leads back to itself"),
        ({"type": {1, 2}}, "json_schema is .*accepted is .*a JSON schema"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "json_schema is "),
    ],
)
def test_schemas_that_nothing_can_be_valid_for_are_refused_before_anything_is_computed(
    make_engine, schema, error
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=error):
        engine.generate(ASK, json_schema=schema)
    assert engine.stats()["requests"] == 0


def test_references_by_anchor_or_odd_digit_are_never_taken_for_loops_or_crashes(make_engine) -> None:
    anchored = {"$ref": "#p", "$defs": {"p": {"$anchor": "p", "type": "boolean"}}}
    assert make_engine().generate(ASK, json_schema=anchored, max_new_tokens=8).text in ("true", "false")
    odd = {"type": "array", "prefixItems": [{"$ref": "#/prefixItems/\u00b2"}]}
    with pytest.raises(ValueError, match="json_schema is "):
        make_engine().generate(ASK, json_schema=odd)


ODD = {
    "look-ahead": {"type": "string", "pattern": "^(?!undefined$|null$)"},
    "word border": {"type": "string", "pattern": r"\bcat\b"},
    "broken pattern": {"type": "string", "pattern": "("},
    "unique": {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "maxItems": 1},
    "format": {"type": "string", "format": "binary"},
    "named by patterns": {"type": "object", "patternProperties": {"^(?!x)": {"type": "string"}}, "maxProperties": 1},
    "not": {"type": "string", "not": {"const": "x"}},
    "one of": {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]},
    "deep": {"type": "array", "items": {"anyOf": [{"type": "string", "pattern": "(?=a)b"}]}, "maxItems": 1},
}
WRONG = {
    "no type": {"type": "nothing"},
    "no such reference": {"$ref": "#/$defs/none"},
    "nowhere": {"$ref": "https://x/y"},
    "a loop": {"$ref": "#/properties/odd"},
}
SHORT = {"maxLength": 4}


def held(schema: dict) -> dict:
    """A property of ``schema`` beside one that can be held to."""
    return {"odd": schema, "days": {"type": "integer", "minimum": 1, "maximum": 9}}


@pytest.fixture(scope="module")
def roomy(tokenizer) -> SemShareEngine:
    return SemShareEngine(make_model("llama", len(tokenizer), **ROOMY), tokenizer)


@pytest.mark.parametrize("name", ODD)
def test_of_a_schema_all_that_can_be_is_held_to_and_the_rest_is_said(roomy, name: str) -> None:
    properties = held(ODD[name])
    schema = {"type": "object", "properties": properties, "required": ["days"]}
    with pytest.warns(UserWarning, match="not all of json_schema can be held to while sampling: "):
        text = roomy.generate(ASK, json_schema=schema, temperature=2.0, seed=1, max_new_tokens=99).text
    found = json.loads(text) if text.endswith("}") else {"days": 1}  # cut within the odd one
    assert found.keys() <= properties.keys() and 1 <= found["days"] <= 9


@pytest.mark.parametrize("name", [*ODD, *WRONG])
@pytest.mark.parametrize("choice", ["any", "weather", "auto"])
def test_one_tool_of_an_odd_schema_costs_no_other_tool_anything(roomy, name: str, choice: str) -> None:
    """Calls of the others are what they are without it."""
    odd = tool("odd", **held((ODD | WRONG)[name]))
    tool_format = ToolFormat()
    grammars = GrammarFactory(roomy.tokenizer, [1])
    with pytest.warns(UserWarning, match="tool 'odd'") as said:
        both = grammars.build_forced_calls(tool_format, [*TOOLS, odd])
    assert all(len(str(one.message)) < 400 for one in said)
    alone = grammars.build_forced_calls(tool_format, TOOLS)
    for constraint in (both, alone):
        begun = '<tool_call>\n{"name": "weather", "arguments": {"town": "'
        after = consumed(constraint, roomy.tokenizer, begun)
        assert not {"a", "1", '"'} & set(after.split("|")) and "P" in after
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generation = roomy.generate(
            ASK, tools=[*TOOLS, odd], tool_choice=choice, max_new_tokens=99 if choice == "weather" else 3
        )
    assert generation.token_ids
    if choice == "weather":
        (call,) = generation.tool_calls
        assert 1 <= call.arguments["days"] <= 9


@pytest.mark.parametrize("name", [*ODD, *WRONG])
def test_calls_of_an_odd_tool_are_json_of_its_name(roomy, name: str) -> None:
    constraint = GrammarFactory(roomy.tokenizer, [1]).build_forced_calls(
        ToolFormat(), [tool("odd", **held((ODD | WRONG)[name]))]
    )
    assert set(consumed(constraint, roomy.tokenizer, '<tool_call>\n{"name": "').split("|")) <= {
        "o",
        "od",
        "odd",
        'odd"',
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_not_cost_no_tool_anything(roomy, value: float) -> None:
    odd = tool("odd", days={"type": "number", "default": value, "maximum": 9})
    grammars = GrammarFactory(roomy.tokenizer, [1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constraint = grammars.build_forced_calls(ToolFormat(), [*TOOLS, odd])
    after = consumed(constraint, roomy.tokenizer, '<tool_call>\n{"name": "weather", "arguments": {"town": "')
    assert not {"a", "1", '"'} & set(after.split("|")) and "P" in after


def test_what_is_left_out_is_said_once(roomy) -> None:
    odd = [tool("odd", **held(ODD["look-ahead"]))]
    grammars = GrammarFactory(roomy.tokenizer, [1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            grammars.build_opened_calls(ToolFormat(), odd)
    assert len(said) == 1


@pytest.mark.parametrize("name", ['a"b', "a\\b", "é世", "a b", "x.y-z/1", "<tool>"])
@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"properties": {}}])
def test_any_name_and_empty_parameters_can_be_called(roomy, name: str, parameters) -> None:
    odd = {"type": "function", "function": {"name": name, "parameters": parameters}}
    generation = roomy.generate(ASK, tools=[odd], tool_choice=name, max_new_tokens=60, temperature=1.0, seed=2)
    if generation.finish_reason != "length":
        assert [call.name for call in generation.tool_calls] == [name]


def test_a_schema_that_names_itself_and_a_hundred_tools(roomy) -> None:
    nodes = {"type": "object", "properties": {"v": SHORT | {"type": "string"}, "c": {"$ref": "#/$defs/node"}}}
    tree = tool("tree", node={"$ref": "#/$defs/node"})
    tree["function"]["parameters"]["$defs"] = {"node": nodes}
    many = [tool(f"tool_{at}", a={"type": "string"}, b={"enum": [1, 2]}) for at in range(100)]
    constraint = GrammarFactory(roomy.tokenizer, [1]).build_forced_calls(ToolFormat(), [tree, *many])
    after = consumed(constraint, roomy.tokenizer, '<tool_call>\n{"name": "tree", "arguments": {"node": {"c": {"')
    assert set(after) <= set('vc"|')


def other_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer whose tokens llguidance has no bytes for."""
    words = Tokenizer(WordPiece({"▁": 0, "a": 1}, unk_token="▁", continuing_subword_prefix=""))
    words.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [(SimpleNamespace(is_fast=False), "SimpleNamespace is slow"), (other_tokenizer(), "is of another kind: can't")],
)
def test_tokenizers_that_do_not_allow_it_are_refused_by_name(tokenizer, reason: str) -> None:
    grammars = GrammarFactory(tokenizer, [])
    assert not grammars.is_possible
    with pytest.raises(UnsupportedModelError, match=f"need a fast tokenizer that llguidance knows; .*{reason}"):
        grammars.build_json({})


def test_with_such_a_tokenizer_free_calls_are_only_read() -> None:
    texts = AnswerReaderFactory(other_tokenizer(), [])
    assert texts.begin_calling((), ToolFormat(), TOOLS, "auto").constraint is None
    with pytest.raises(UnsupportedModelError):
        texts.begin_calling((), ToolFormat(), TOOLS, "any")


def test_constrained_answers_do_not_depend_on_reuse(make_engine: EngineMaker) -> None:
    off, exact = make_engine("off"), make_engine("exact")
    wanted = off.generate(ASK, json_schema=REPORT, max_new_tokens=150)
    for _ in range(2):
        found = exact.generate(ASK, json_schema=REPORT, max_new_tokens=150)
        assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
    assert found.report.prefix_tokens > 0


def test_the_wrapped_tokenizer_is_made_once(make_engine: EngineMaker, monkeypatch) -> None:
    from semsharekv_integrations.text import grammar

    made: list[int] = []
    real = grammar.from_tokenizer
    monkeypatch.setattr(grammar, "from_tokenizer", lambda *a, **k: made.append(1) or real(*a, **k))
    engine = make_engine(reuse=ReuseConfig(mode="exact"))
    engine.generate(ASK, max_new_tokens=1)
    assert not made
    for _ in range(2):
        engine.generate(ASK, json_schema={"type": "boolean"}, max_new_tokens=3)
    assert made == [1]
