"""Strict chat templates: whatever the history, a form of it is found that the template takes, the least changed one."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from rendered_chats import render_chat
from semsharekv_integrations import PromptError
from semsharekv_integrations.text.prompt import PromptRenderer
from tool_templates import TEMPLATES, TOOLS, calling

_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}"
_ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}<system>{{ messages[0].content }}</>"
    "{% set messages = messages[1:] %}{% endif %}"
)
_KNOWN = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}{% endfor %}"
)
STRICT = {
    "alternation": _FIRST_SYSTEM + _ALTERNATING + _TURNS,
    "no system": _KNOWN + _ALTERNATING + _TURNS,
    "words": _KNOWN + _ALTERNATING.replace("{% if (", "{% if not m.content or (") + _TURNS,
    "drops later systems": _FIRST_SYSTEM
    + _TURNS.replace(
        "<{{ m.role }}>", "{% if m.role not in ['user', 'assistant'] %}{% continue %}{% endif %}<{{ m.role }}>"
    ),
    "needs a user": _FIRST_SYSTEM
    + "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
    + _TURNS,
}
HISTORIES = {
    "a greeting first": "au",
    "a system message, then a greeting": "sau",
    "a system message later on": "uasu",
    "a system message at the end": "uaus",
    "two system messages": "ssu",
    "two far from each other": "suasuas",
    "the developer": "du",
    "two answers in a row": "uaau",
    "two questions in a row": "suua",
    "questions at last": "uauu",
    "system alone": "s",
    "an answer to go on with": "ua",
    "a greeting alone": "a",
    "an empty question": "eau",
    "an empty answer": "uxu",
    "an empty system message": "nu",
    "results without calls": "tu",
    "a result at last": "ut",
}
ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
EMPTY = {"e": "user", "x": "assistant", "n": "system"}


def history(letters: str) -> list[dict[str, str]]:
    """A message for each letter; all of them say different things."""
    return [
        {"role": EMPTY[letter], "content": ""}
        if letter in EMPTY
        else {"role": ROLES[letter], "content": f"{ROLES[letter]} says {at}."}
        for at, letter in enumerate(letters)
    ]


@cache
def with_template(tokenizer: PreTrainedTokenizerBase, template: str, behind: str = "") -> PromptRenderer:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template + "{% if add_generation_prompt %}<model>{% endif %}" + behind
    return PromptRenderer(changed)


def assert_all_in_order(text: str, messages: list[dict[str, str]]) -> None:
    places = [text.index(message["content"]) for message in messages if message["content"]]
    assert places == sorted(places), text
    assert all(text.count(message["content"]) == 1 for message in messages if message["content"]), text


@pytest.mark.parametrize(("strict", "letters"), product(STRICT, HISTORIES.values()))
def test_every_history_is_rendered_whole_and_in_order(tokenizer, strict: str, letters: str) -> None:
    messages = history(letters)
    text = render_chat(with_template(tokenizer, STRICT[strict]), messages)
    assert_all_in_order(text, messages)
    assert text.endswith("<model>") != (messages[-1]["role"] == "assistant" and bool(messages[-1]["content"]))


@given(letters=st.text("sduatexn", min_size=1, max_size=8), strict=st.sampled_from(sorted(STRICT)))
def test_any_history_is_rendered_whole_and_in_order(tokenizer, letters: str, strict: str) -> None:
    messages = history(letters)
    assert_all_in_order(render_chat(with_template(tokenizer, STRICT[strict]), messages), messages)


@pytest.mark.parametrize(("strict", "letters"), product(STRICT, ["u", "uau", "suau", "uaua"]))
def test_what_a_template_takes_is_left_alone(tokenizer, strict: str, letters: str) -> None:
    renderer = with_template(tokenizer, STRICT[strict])
    messages = history(letters)
    if letters[0] == "s" and strict in ("no system", "words"):
        messages = [{"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]
    last = letters[-1] == "a"
    assert render_chat(renderer, messages) == renderer._tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not last, continue_final_message=last
    )


def test_a_lenient_template_gets_the_messages_as_they_are(tokenizer) -> None:
    renderer = with_template(tokenizer, _TURNS)
    for letters in HISTORIES.values():
        if letters[-1] not in "ax" and "t" not in letters:
            assert render_chat(renderer, history(letters)).count("</>") == len(letters)


def test_a_turn_more_leaves_the_beginning_as_it_was(tokenizer) -> None:
    for strict, letters in product(STRICT, ["suauasu", "auau", "uaasu"]):
        renderer = with_template(tokenizer, STRICT[strict])
        before = render_chat(renderer, history(letters)).removesuffix("<model>")
        after = render_chat(renderer, [*history(letters), *history("au")])
        assert after.startswith(before), (strict, letters)


@pytest.mark.parametrize(("mentions", "role"), [(False, "system"), (True, "developer")])
def test_the_developer_is_the_system_where_the_template_does_not_name_it(tokenizer, mentions: bool, role: str) -> None:
    template = _TURNS + "{# developer #}" * mentions
    assert render_chat(with_template(tokenizer, template), history("du")).startswith(f"<{role}>developer says 0.")


@pytest.mark.parametrize("name", ["tagged", "bare", "listed"])
def test_calls_and_results_that_a_template_of_tools_refuses_become_text(tokenizer, name: str) -> None:
    strict = (
        "{% for m in messages %}{% if m.role == 'tool' and not (messages[loop.index0 - 1].tool_calls) %}"
        "{{ raise_exception('a result without its call') }}{% endif %}{% endfor %}"
    )
    renderer = with_template(tokenizer, strict + TEMPLATES[name])
    assert renderer.tool_format.is_native
    result = {"role": "tool", "tool_call_id": "c1", "content": "A flood."}
    whole = [*history("u"), calling("c1", "get_news", {"town": "Prorna"}), result]
    assert "tool_response" not in render_chat(renderer, whole, TOOLS)
    trimmed = render_chat(renderer, [result, *history("u")], TOOLS)
    assert trimmed.index("A flood.") < trimmed.index("user says 0.") and "get_news" in trimmed


def test_an_answer_and_then_a_call_are_one_turn(tokenizer) -> None:
    renderer = with_template(tokenizer, STRICT["alternation"])
    call = calling("c1", "get_news", {"town": "Prorna"})
    text = render_chat(renderer, [*history("ua"), call, {"role": "tool", "tool_call_id": "c1", "content": "Rain."}])
    assert text.count("<assistant>") == 1 and text.index("assistant says 1.") < text.index("get_news")


def test_a_template_that_refuses_everything_is_quoted(tokenizer) -> None:
    renderer = with_template(tokenizer, "{{ raise_exception('never ' + messages[0].role) }}")
    with pytest.raises(PromptError, match="the model's chat template refuses the messages: never system"):
        render_chat(renderer, history("su"))


@pytest.mark.parametrize("name", HISTORIES)
def test_a_template_that_reads_parts_alone_shows_all_that_is_said(tokenizer, name: str) -> None:
    part = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}{% endfor %}"
    assert "m.content | trim" in _TURNS
    by_parts = with_template(tokenizer, _TURNS.replace("{{ m.content | trim }}", part))
    by_text = with_template(tokenizer, _TURNS)
    messages = history(HISTORIES[name])
    assert render_chat(by_parts, messages) == render_chat(by_text, messages)


def test_what_a_template_leaves_out_in_every_form_is_warned_of(tokenizer) -> None:
    renderer = with_template(tokenizer, "{{ messages[-1].content }}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render_chat(renderer, history("u"))
    with pytest.warns(UserWarning, match="leaves out or rewrites what some of the messages say"):
        render_chat(renderer, history("uau"))


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_an_answer_whose_thoughts_a_template_strips_is_continued_with_them(tokenizer, opened: str) -> None:
    stripping = _TURNS.replace("m.content | trim", "m.content.split('</think>')[-1] | trim")
    mark = f"{{% if add_generation_prompt %}}{opened}{{% endif %}}"
    renderer = with_template(tokenizer, stripping, mark)
    begun = "<think>\nA flood?\n</think>\n\nIt was a fl"
    text = render_chat(renderer, [*history("u"), {"role": "assistant", "content": begun}])
    assert text == render_chat(renderer, history("u")).removesuffix(opened) + begun
    later = render_chat(renderer, [*history("u"), {"role": "assistant", "content": begun}, *history("u")])
    assert "A flood?" not in later, "as the template wants it in turns that are over"
