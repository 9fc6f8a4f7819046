"""Tools through the engine: whatever the model writes, calls come as calls, text as text, and prefixes are reused."""

from __future__ import annotations

import asyncio
import copy
import json
from functools import partial
from typing import Any

import pytest

from semsharekv_integrations import EngineConfig, Generation, PromptError, ReuseConfig, SemShareEngine, ToolCall
from semsharekv_integrations.text.tool_format import ToolFormat
from tiny_models import make_model
from tool_templates import NEWS, TOOLS, calling, tool, tool_tokenizer

ASK = [{"role": "user", "content": "What happened in Prorna?"}]
FLOOD = ("get_news", {"town": "Prorna"})


class Speaker:
    """An engine whose model writes given texts, one for each call, whatever its prompt; so it verifies no drafts."""

    def __init__(self, template: str = "tagged", mode: str = "exact", *, special: bool = False) -> None:
        self.tokenizer = tool_tokenizer(template, special=special)
        self.model = make_model("llama", len(self.tokenizer), max_position_embeddings=2048)
        self.engine = SemShareEngine(self.model, self.tokenizer, EngineConfig(reuse=ReuseConfig(mode=mode)))  # type: ignore[arg-type]
        for name in ("generate", "stream", "astream", "generate_batch"):
            setattr(self.engine, name, partial(getattr(self.engine, name), prompt_lookup=False))
        self.tool_format = ToolFormat.learn(self.tokenizer)
        self._rest: list[int] = []
        forward = self.model.forward

        def favoured(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if self._rest:
                output.logits[:, -1] = 0
                output.logits[:, -1, self._rest.pop(0)] = 99
            return output

        self.model.forward = favoured

    def says(self, text: str) -> SemShareEngine:
        self._rest = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
        return self.engine

    def written(self, *calls: tuple[str, dict]) -> str:
        return self.tool_format.write(calls)


def calls_of(generation: Generation) -> list[tuple[str, dict]]:
    return [(call.name, call.arguments) for call in generation.tool_calls]


@pytest.mark.parametrize(
    ("template", "special"), [("tagged", True), ("listed", True), ("bare", False), ("none", False)]
)
def test_calls_that_the_model_writes_come_as_calls(template: str, special: bool) -> None:
    speaker = Speaker(template, special=special)
    calls = [FLOOD, ("weather", {"town": "Velmar", "days": 2})][: 1 if template == "bare" else 2]
    generation = speaker.says("I look.\n" + speaker.written(*calls)).generate(ASK, tools=TOOLS)
    assert generation.finish_reason == "tool_calls" and calls_of(generation) == calls
    assert generation.text == "I look.\n"
    assert speaker.says("A flood.").generate(ASK, tools=TOOLS).finish_reason == "stop"


@pytest.mark.parametrize("special", [False, True])
def test_streams_hold_calls_back_and_agree_with_the_whole(special: bool) -> None:
    speaker = Speaker("tagged", special=special)
    text = f"I <look>.\n{speaker.written(FLOOD, FLOOD)}\nDone <tool"
    whole = speaker.says(text).generate(ASK, tools=TOOLS)

    async def asynchronous() -> list:
        return [chunk async for chunk in speaker.says(text).astream(ASK, tools=TOOLS)]

    for chunks in (list(speaker.says(text).stream(ASK, tools=TOOLS)), asyncio.run(asynchronous())):
        assert "".join(chunk.text for chunk in chunks) == whole.text == "I <look>.\nDone <tool"
        called = [chunk for chunk in chunks if chunk.tool_calls]
        assert [len(chunk.tool_calls) for chunk in called] == [1, 1] and not any(chunk.text for chunk in called)
        last = chunks[-1].generation
        assert last is not None and last.tool_calls == tuple(chunk.tool_calls[0] for chunk in called)
        assert calls_of(last) == calls_of(whole) == [FLOOD, FLOOD]
        assert not any(chunk.is_empty for chunk in chunks)


def test_what_is_no_call_is_text() -> None:
    speaker = Speaker("bare")
    call = '{"name": "get_news", "parameters": {"town": %s}}'
    no_json = (call % r'"\ud83d"', call % "NaN")  # half a character, and no number of JSON's
    for text in ('{"name": "unknown", "parameters": {}}', call[:42], '{"a": 1}', *no_json):
        generation = speaker.says(text).generate(ASK, tools=TOOLS)
        assert (generation.text, generation.tool_calls, generation.finish_reason) == (text, (), "stop")


def test_no_call_is_looked_for_without_tools() -> None:
    speaker = Speaker("tagged")
    text = speaker.written(FLOOD)
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        generation = speaker.says(text).generate(ASK, **options)
        assert (generation.text, generation.tool_calls, generation.finish_reason) == (text, (), "stop")


@pytest.mark.parametrize("template", ["tagged", "bare"])
def test_stop_strings_end_visible_text_alone(template: str) -> None:
    speaker = Speaker(template)
    text = "I look.\n" + speaker.written(("weather", {"town": "Stop", "days": 2}))
    generation = speaker.says(text).generate(ASK, tools=TOOLS, stop=["Stop", "{", "\n{", "_call>"])
    assert (generation.text, len(generation.tool_calls)) == ("I look.\n", 1)
    generation = speaker.says(text).generate(ASK, tools=TOOLS, stop=["ok."])
    assert (generation.text, generation.tool_calls, generation.finish_reason) == ("I lo", (), "stop")
    ids = speaker.tokenizer.encode(text, add_special_tokens=False)
    behind = len(speaker.tokenizer.encode(text.partition("Stop")[2], add_special_tokens=False))
    cut, stop = ids[: 3 - behind], ["Stop", "{"]  # in a call, a cut one too, they mean nothing
    generation = speaker.says(text).generate(ASK, tools=TOOLS, stop=stop, max_new_tokens=len(cut))
    assert (generation.text, generation.finish_reason) == (speaker.tokenizer.decode(cut), "length")
    assert "Stop" in generation.text
    if template == "tagged":  # of its end alone
        generation = speaker.says(text).generate(ASK, tools=TOOLS, stop=stop, max_new_tokens=len(ids) - 1)
        assert (generation.text, len(generation.tool_calls)) == ("I look.\n", 1)
    assert speaker.says("I <|user|> x").generate(ASK, tools=TOOLS, stop=["<|user|>"]).text == "I "


def test_a_begun_call_is_held_to_the_schema() -> None:
    """The model wants a wrong name and wrong arguments, and no end."""
    speaker = Speaker("tagged")
    generation = speaker.says('Well <tool_call>\n{"name": "wea').generate(ASK, tools=TOOLS, max_new_tokens=150)
    assert generation.text.startswith("Well ")
    assert generation.tool_calls and generation.tool_calls[0].name == "weather"
    assert 1 <= generation.tool_calls[0].arguments["days"] <= 9


def test_the_limit_leaves_no_half_call() -> None:
    speaker = Speaker("tagged")
    generation = speaker.says(speaker.written(FLOOD, FLOOD)).generate(ASK, tools=TOOLS, max_new_tokens=60)
    assert generation.finish_reason == "length" and calls_of(generation) == [FLOOD]
    assert speaker.tokenizer.decode(generation.token_ids).endswith(generation.text) and generation.text
    forced = speaker.engine.generate(ASK, tools=TOOLS, tool_choice="weather", max_new_tokens=12)
    assert forced.finish_reason == "length" and not forced.tool_calls and forced.text.startswith("<tool_call>")


@pytest.mark.parametrize("template", ["tagged", "bare", "listed", "none"])
def test_a_conversation_with_tools_reuses_its_prefix_and_says_the_same(template: str) -> None:
    off, exact = Speaker(template, "off"), Speaker(template, "exact")
    turn = calling("call_1", *FLOOD)
    result = {"role": "tool", "tool_call_id": "call_1", "content": "A flood hit Prorna on Monday."}
    prompts = [ASK, ASK, [*ASK, turn, result], [*ASK, turn, result]]
    reused = []
    for prompt in prompts:
        options = {"tools": TOOLS, "max_new_tokens": 12}
        wanted, found = (speaker.engine.generate(prompt, **options) for speaker in (off, exact))
        assert (found.text, found.token_ids) == (wanted.text, wanted.token_ids)
        reused.append(found.report.prompt_tokens - found.report.recomputed_tokens)
        last = found.report
    assert reused[1] > 0 and last.recomputed_tokens == 1
    assert reused[2] >= reused[1] - 5, "the tools and the question stand before the call"
    other = exact.engine.generate(ASK, tools=[tool("other")], max_new_tokens=2).report
    assert other.prefix_tokens < reused[1]


@pytest.mark.parametrize("special", [False, True])
def test_the_turn_behind_a_call_reuses_text_and_call(special: bool) -> None:
    speaker = Speaker("tagged", special=special)
    text = f"I look.\n{speaker.written(FLOOD)}"
    first = speaker.says(text).generate(ASK, tools=TOOLS)
    (call,) = first.tool_calls
    turn = calling(call.id, call.name, json.dumps(call.arguments)) | {"content": first.text}
    result = {"role": "tool", "tool_call_id": call.id, "content": "A flood."}
    second = speaker.engine.generate([*ASK, turn, result], tools=TOOLS, max_new_tokens=1)
    assert second.report.prefix_tokens >= first.report.prompt_tokens + len(first.token_ids) - 3


def test_the_turn_behind_a_reply_with_tools_is_what_the_template_says() -> None:
    speaker = Speaker("tagged")
    letters = [token for letter in "flood" for token in speaker.tokenizer.encode(letter, add_special_tokens=False)]
    engine = speaker.says("")
    speaker._rest = [*letters, speaker.tokenizer.eos_token_id]
    first = engine.generate(ASK, tools=TOOLS)
    turn = [*ASK, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And the cost?"}]
    plain = speaker.tokenizer.apply_chat_template(turn, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    second = engine.generate(turn, tools=TOOLS, max_new_tokens=1)
    ends = speaker.tokenizer.encode("\n", add_special_tokens=False)
    assert first.text == "flood" and second.report.prompt_tokens == len(plain)
    assert second.report.prefix_tokens >= first.report.prompt_tokens - len(ends)


def test_arguments_may_be_named_as_an_object_or_none(make_engine) -> None:
    with_none = copy.deepcopy(NEWS)
    with_none["function"]["parameters"]["type"] = ["object", "null"]
    found = [make_engine().generate(ASK, tools=[one], tool_choice="any", seed=1) for one in (NEWS, with_none)]
    assert found[0].token_ids == found[1].token_ids or found[0].tool_calls == found[1].tool_calls


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tools": []}, r"tools is \[\]"),
        ({"tools": "x"}, "tools is 'x'"),
        ({"tools": [{"name": "a"}]}, r"tools\[0\] is"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, r"tools\[0\].function.name is ''"),
        ({"tools": [tool("any")]}, r"tools\[0\].function.name is 'any'"),
        ({"tools": [tool("a"), tool("a")]}, r"tools is \['a', 'a'\]; accepted is tools of different names"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 3}}]}, "parameters is 3"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "an object"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": 3}}]}, "description is 3"),
        ({"tools": TOOLS, "tool_choice": "unknown"}, "tool_choice is 'unknown'; accepted is .*get_news, weather"),
        ({"tool_choice": "any"}, "tool_choice is 'any'; accepted is None, auto, none"),
        ({"tools": TOOLS, "tool_choice": 3}, "tool_choice is 3"),
        ({"json_schema": "x"}, "json_schema is 'x'"),
        ({"tools": TOOLS, "json_schema": {}}, "accepted is None with tools"),
    ],
)
def test_bad_tools_are_refused(make_engine, options: dict, error: str) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=error):
        engine.generate(ASK, **options)
    assert engine.stats()["requests"] == 0


def test_tools_need_messages(make_engine) -> None:
    with pytest.raises(PromptError, match="accepted with tools is a sequence of messages"):
        make_engine().generate("News?", tools=TOOLS)


def test_tools_without_schema_and_schemas_with_tools_off(make_engine) -> None:
    bare = [{"type": "function", "function": {"name": "stop"}}]
    generation = make_engine().generate(ASK, tools=bare, tool_choice="stop")
    assert calls_of(generation) == [("stop", {})] and isinstance(generation.tool_calls[0], ToolCall)
    generation = make_engine().generate(ASK, tools=bare, tool_choice="none", json_schema={"type": "boolean"})
    assert generation.text in ("true", "false") and generation.finish_reason == "stop"


def test_the_reference_model_calls_when_it_must() -> None:
    engine = SemShareEngine.from_pretrained("semsharekv/reference")
    generation = engine.generate(ASK, tools=TOOLS, tool_choice="get_news", max_new_tokens=80)
    assert generation.finish_reason == "tool_calls" and list(generation.tool_calls[0].arguments) == ["town"]
    assert json.dumps(generation.tool_calls[0].arguments)
