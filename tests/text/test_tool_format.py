"""How calls are written is learnt from the template, and read back from any cutting of the text."""

from __future__ import annotations

import json
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rendered_chats import render_chat
from semsharekv_integrations import PromptError
from semsharekv_integrations.text.answer_stream import TextStream
from semsharekv_integrations.text.prompt import PromptRenderer
from semsharekv_integrations.text.tool_calls import ToolCallParser
from semsharekv_integrations.text.tool_format import ToolFormat
from tool_templates import NEWS, TEMPLATES, TOOLS, calling, tool_tokenizer

FORMATS = {
    "tagged": ToolFormat(is_native=True),
    "text arguments": ToolFormat(is_native=True, takes_json_text=True),
    "bare": ToolFormat("", "", "", None, arguments_key="parameters", is_native=True),
    "listed": ToolFormat("[TOOL_CALLS]", "", " ", "", in_list=True, is_native=True, takes_short_ids=True),
    "none": ToolFormat(),
}
NAMES = ("get_news", "weather")
CALLS = [("get_news", {"town": 'Prorna "old" } </tool_call> \\'}), ("weather", {"days": [1, {"a": None}]})]
ASK, RESULT = (
    {"role": "user", "content": "News of Prorna?"},
    {"role": "tool", "tool_call_id": "c1", "content": "A flood."},
)
TURN = calling("c1", "get_news", {"town": "Prorna"})


def read(tool_format: ToolFormat, text: str, cuts: list[int] | None = None) -> tuple[str, list[tuple[str, dict]]]:
    """Visible text and calls of a text that comes in pieces, by default letter by letter."""
    parser, visible, calls = ToolCallParser(tool_format, NAMES), "", []
    bounds = range(len(text) + 1) if cuts is None else [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    said = [parser.push(text[a:b]) for a, b in pairwise(bounds)]
    for piece in [*said, parser.finish()]:
        visible += piece.text
        calls += [(call.name, call.arguments) for call in piece.tool_calls]
    return visible, calls


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_format_is_learnt_from_the_template(name: str, special: bool) -> None:
    tokenizer = tool_tokenizer(name, special=special)
    found = ToolFormat.learn(tokenizer)
    assert found == FORMATS[name]
    wanted = [mark for mark in (found.opening, found.closing, "<|python_tag|>" * (not found.opening)) if mark]
    assert found.find_marks(tokenizer) == (set(tokenizer.convert_tokens_to_ids(wanted)) if special else set())


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATES["tagged"].replace("tool | tojson", "'a tool'"),  # not shown
        TEMPLATES["tagged"].replace('{"name": "\' + call.function.name', '\' + call.function.name + \'{"a": "'),
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson if tools }}",
        "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
        "{{ raise_exception('nothing at all') }}",
    ],
)
def test_templates_of_other_ways_get_the_common_format(template: str) -> None:
    tokenizer = tool_tokenizer("none")
    tokenizer.chat_template = template
    assert ToolFormat.learn(tokenizer) == FORMATS["none"]


def test_another_turn_for_calls_is_none_that_the_model_can_go_on_with() -> None:
    tokenizer = tool_tokenizer("none")
    tokenizer.chat_template = (
        "{{ tools | tojson if tools }}{% for m in messages %}{% if m.tool_calls %}<|action|>"
        "{{ m.tool_calls[0].function | tojson }}{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert ToolFormat.learn(tokenizer) == FORMATS["none"]
    tokenizer.chat_template = tokenizer.chat_template.replace("<|action|>", "<|assistant|>")
    assert ToolFormat.learn(tokenizer).is_native


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_writes_is_read_as_the_same_calls(name: str) -> None:
    tool_format = FORMATS[name]
    calls = CALLS if tool_format.separator is not None else CALLS[:1]
    assert read(tool_format, tool_format.write(calls)) == ("", calls)
    if tool_format.is_native and not tool_format.takes_short_ids:  # which also writes the id
        turn = {"role": "assistant", "tool_calls": [calling("c", *call)["tool_calls"][0] for call in calls]}
        assert tool_format.write(calls) in render_chat(PromptRenderer(tool_tokenizer(name)), [ASK, turn, RESULT], TOOLS)


@given(cuts=st.lists(st.integers(0, 10**4), max_size=8), name=st.sampled_from(["tagged", "listed", "bare"]))
def test_cutting_does_not_matter(cuts: list[int], name: str) -> None:
    tool_format = FORMATS[name]
    text = f"Let me see {{x}} <tool\n{tool_format.write(CALLS)}"
    assert read(tool_format, text, cuts) == read(tool_format, text)
    assert read(tool_format, text) == ("Let me see {x} <tool\n", CALLS)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\n{'name': 'get_news'}\n</tool_call>",
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "get_news", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "get_news", "arguments": "no json"}\n</tool_call>',
        '<tool_call>\n{"name": "get_news", "arguments": {"town": "Pro',
        '<tool_call>\n{"name": ["get_news"], "arguments": {}}\n</tool_call>',
        "<tool_call>",
        "<tool_call><tool_call> </tool_call>",
        "a < b <tool_cal",
        "<tool_call>\n[]\n</tool_call>",
    ],
)
def test_what_is_no_valid_call_stays_text(text: str) -> None:
    assert read(FORMATS["tagged"], text) == (text, [])
    good = FORMATS["tagged"].write(CALLS[1:])
    if text.endswith("</tool_call>"):
        assert read(FORMATS["tagged"], f"{text}\n{good}") == (f"{text}\n", CALLS[1:])


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 42}',
        '{"name": "unknown", "parameters": {}}',
        '{"name": "get_news"}',
        "{",
        "{}",
        'In line {"name": "get_news", "parameters": {}}',
        '{"name": "get_news", "parameters": {"town": ',
    ],
)
def test_bare_json_that_is_no_call_stays_text(text: str) -> None:
    assert read(FORMATS["bare"], text) == (text, [])


def test_json_that_is_no_call_is_not_held_back() -> None:
    parser = ToolCallParser(FORMATS["bare"], NAMES)
    assert parser.push('{"ans').text == '{"ans'
    assert parser.push('wer": 1').text == 'wer": 1'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bare", '<|python_tag|>{"name": "weather", "parameters": {}}'),
        ("bare", '{"type": "function", "function": {"name": "weather", "parameters": {}}}'),
        ("bare", '{"type": "function", "name": "weather", "arguments": "{}"}'),
        ("listed", '[TOOL_CALLS][{"name": "weather", "arguments": {}, "id": "abcdefghi"}]'),
        ("listed", '[TOOL_CALLS]{"name":"weather","arguments":{}}'),
        ("tagged", '<tool_call>{"name": "weather"}</tool_call>'),
        ("tagged", '<tool_call>\n{"name": "weather", "arguments": {}}'),  # the end of the answer ends it
        ("tagged", '<tool_call>\n{"name": "weather", "parameters": "{}"}\n</tool_call>\n'),
    ],
)
def test_models_write_calls_a_little_otherwise(name: str, text: str) -> None:
    assert read(FORMATS[name], text) == ("", [("weather", {})])


def test_several_calls_in_a_row_and_text_around_them() -> None:
    one, two = (FORMATS["tagged"].write([call]) for call in CALLS)
    found = read(FORMATS["tagged"], f"First.\n{one}\n{two}\nThen {one} end")
    assert found == ("First.\nThen end", [*CALLS, CALLS[0]])
    bare = [FORMATS["bare"].write([call]) for call in CALLS]
    assert read(FORMATS["bare"], "; ".join(bare)) == ("", CALLS)


def test_ids_are_all_different() -> None:
    parser = ToolCallParser(FORMATS["tagged"], NAMES)
    calls = parser.push(FORMATS["tagged"].write(CALLS * 2)).tool_calls
    assert len({call.id for call in calls}) == 4 and all(call.id.startswith("call_") for call in calls)


class TestRendering:
    @pytest.mark.parametrize("name", TEMPLATES)
    @pytest.mark.parametrize("as_text", [False, True])
    def test_a_round_of_tools(self, name: str, as_text: bool) -> None:
        arguments = '{"town": "Prorna"}' if as_text else {"town": "Prorna"}
        messages = [ASK, calling("c1", "get_news", arguments), RESULT]
        text = render_chat(PromptRenderer(tool_tokenizer(name)), messages, TOOLS)
        ask, call, result = (text.index(part) for part in (ASK["content"], '"town": "Prorna"', RESULT["content"]))
        assert ask < call < result and text.index(NEWS["function"]["description"]) < ask
        assert text.count("get_news") == 2

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_the_question_is_the_last_user_turn(self, name: str) -> None:
        tokenizer = tool_tokenizer(name)
        rendered = PromptRenderer(tokenizer).render([ASK, TURN, RESULT], {}, tools=TOOLS)
        assert rendered.question is not None
        found = tokenizer.decode(rendered.token_ids[slice(*rendered.question)])
        assert found.strip().removeprefix("<|user|>").strip() == ASK["content"]

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_without_tools_nothing_changes(self, name: str) -> None:
        tokenizer = tool_tokenizer(name)
        wanted = tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
        assert render_chat(PromptRenderer(tokenizer), [ASK]) == wanted

    def test_ids_and_results_agree_where_ids_are_short(self) -> None:
        text = render_chat(PromptRenderer(tool_tokenizer("listed")), [ASK, TURN, RESULT], TOOLS)
        (made,) = json.loads(text[text.index("[TOOL_CALLS] ") :].removeprefix("[TOOL_CALLS] ").split("<|end|>")[0])
        assert len(made["id"]) == 9 and f'"call_id": "{made["id"]}"' in text

    def test_calls_of_one_turn_follow_each_other_where_a_template_takes_one(self) -> None:
        turn = {"role": "assistant", "tool_calls": [TURN["tool_calls"][0], calling("c2", *CALLS[1])["tool_calls"][0]]}
        late = RESULT | {"tool_call_id": "c2", "content": "Rain."}
        text = render_chat(PromptRenderer(tool_tokenizer("bare")), [ASK, turn, late, RESULT, ASK], TOOLS)
        places = [
            text.index(part) for part in ('"get_news", "parameters"', "A flood.", '"weather", "parameters"', "Rain.")
        ]
        assert places == sorted(places) and text.count("Rain.") == text.count("A flood.") == 1

    def test_a_template_without_tools_gets_everything_as_text(self) -> None:
        system = {"role": "system", "content": "You read the news."}
        text = render_chat(PromptRenderer(tool_tokenizer("none")), [system, ASK, TURN, RESULT, RESULT, ASK], TOOLS)
        assert text.startswith("<|begin|><|system|>You read the news.\n\n# Tools")
        for tool in TOOLS:
            assert json.dumps(tool) in text
        assert "<|tool|>" not in text and text.count("<|user|>") == 2 and text.count("<tool_response>") == 2
        plain = render_chat(PromptRenderer(tool_tokenizer("none")), [ASK, ASK])
        assert plain.count("<|user|>") == 2, "only results are joined with what follows"

    @pytest.mark.parametrize(
        ("message", "error"),
        [
            ({"role": "assistant", "content": None}, r"messages\[0\].content is NoneType"),
            ({"role": "assistant", "content": None, "tool_calls": []}, r"messages\[0\].content is NoneType"),
            ({"role": "user", "content": "x", "tool_calls": [1]}, "of the assistant alone"),
            ({"role": "assistant", "tool_calls": {"a": 1}}, "tool_calls is dict; accepted is a list"),
            ({"role": "assistant", "tool_calls": ["x"]}, r"tool_calls\[0\] is 'x'"),
            (calling("c", "", {}), r"tool_calls\[0\].function.name is ''"),
            (calling("c", "a", "{"), r"tool_calls\[0\].function.arguments is no JSON"),
            (
                calling("c", "a", {"x": {1}}),
                r"tool_calls\[0\].function.arguments is .*; accepted is what JSON can hold",
            ),
            (calling("c", "a", "[]"), r"tool_calls\[0\].function.arguments is \[\]"),
            (calling(7, "a", {}), r"tool_calls\[0\].id is 7"),
        ],
    )
    def test_malformed_calls_are_refused(self, message: dict, error: str) -> None:
        with pytest.raises(PromptError, match=error):
            render_chat(PromptRenderer(tool_tokenizer("tagged")), [message], TOOLS)

    def test_text_prompts_take_no_tools(self) -> None:
        with pytest.raises(PromptError, match="prompt is text; accepted with tools"):
            PromptRenderer(tool_tokenizer("tagged")).render("News?", {}, tools=TOOLS)


def test_marks_are_decoded_and_other_special_tokens_are_not() -> None:
    tokenizer = tool_tokenizer("listed", special=True)
    ids = tokenizer.encode('<|tool|>[TOOL_CALLS] [{"a": 1}]<|end|>', add_special_tokens=False)
    for marks, wanted in (
        (ToolFormat.learn(tokenizer).find_marks(tokenizer), '[TOOL_CALLS] [{"a": 1}]'),
        ((), ' [{"a": 1}]'),
    ):
        stream = TextStream(tokenizer, (), marks)
        assert "".join(map(stream.push, ids)) + stream.finish() == wanted


def as_json(*calls: tuple[str, dict], key: str = "arguments") -> str:
    return json.dumps([{"name": name, key: arguments} for name, arguments in calls], ensure_ascii=False)


BARE = {
    "an object": as_json(CALLS[0])[1:-1],
    "parameters": as_json(CALLS[0], key="parameters")[1:-1],
    "a list": as_json(*CALLS),
    "over lines": json.dumps({"name": CALLS[0][0], "arguments": CALLS[0][1]}, indent=2),
    "two in a row": f"{as_json(CALLS[0])[1:-1]}\n{as_json(CALLS[1])[1:-1]}",
    "OpenAI's form": json.dumps({"type": "function", "function": {"name": CALLS[0][0], "arguments": "{}"}}),
}
FENCES = [
    "{}",
    "```json\n{}\n```",
    "```\n{}\n```",
    "```tool_call\n{}```",
    "```json\n{}",
    "\n\n{}\n",
    "```json\n{}\n```\n",
]


@pytest.mark.parametrize("name", ["tagged", "text arguments", "bare", "listed", "none"])
@pytest.mark.parametrize("kind", BARE)
@pytest.mark.parametrize("fence", FENCES)
def test_calls_without_tags_are_calls_in_every_format(name: str, kind: str, fence: str) -> None:
    text = fence.replace("{}", BARE[kind])
    wanted = CALLS if kind in ("a list", "two in a row") else [(CALLS[0][0], {} if "Open" in kind else CALLS[0][1])]
    for cuts in (None, [], [len(text) // 2, 3, 9]):
        visible, calls = read(FORMATS[name], text, cuts)
        assert (visible.strip(), calls) == ("", wanted)
        assert read(FORMATS[name], f"I look.\n{text}", cuts) == ("I look.\n" + visible, wanted)


@pytest.mark.parametrize(
    "text",
    [
        '{"answer": 42}',
        '{"name": "Anna", "parameters": {}}',
        '{"name": "get_news"}',
        '[{"name": "get_news", "arguments": {}}, {"name": "Anna"}]',
        "[1, 2]",
        "```python\nprint([1])\n```",
        '```json\n{"name": "Anna", "age": 3}\n```\nThat is she.',
        'Write {"name": "get_news", "arguments": {}} to call it.',
        'For example:\n{"name": "get_news", "arguments": {}}\nThis would read the news.',
        'For example:\n```json\n{"name": "get_news", "arguments": {}}\n```\nThis would read the news.',
        '{"name": "get_news", "arguments": {"town": ',
        "```",
        "``",
        "a `b",
        "```json",
        "```json\n",
        "{",
        "[",
    ],
)
def test_text_that_holds_json_is_text(text: str) -> None:
    for name, cuts in product(("tagged", "none", "text arguments", "listed"), (None, [], [7, 11])):
        assert read(FORMATS[name], text, cuts) == (text, [])


def test_what_is_no_call_comes_as_it_is_written() -> None:
    for text in ('```python\nx = "', '{"ans', "[1, 2", "A `word` and"):
        parser = ToolCallParser(FORMATS["tagged"], NAMES)
        assert "".join(parser.push(letter).text for letter in text + "abc").startswith(text)
