"""Prompts to token ids: as the tokenizer and its chat template say, refused where they say nothing sensible."""

from __future__ import annotations

import copy
import re
from itertools import zip_longest
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rendered_chats import render_chat
from semsharekv_integrations import PromptError
from semsharekv_integrations.text.prompt import PromptRenderer, SearchedText
from tiny_models import EngineMaker

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
USER = {"role": "user", "content": "What happened in Prorna?"}
REPLY = {"role": "assistant", "content": "A flood."}
DEEP: list = []
for _ in range(900):
    DEEP = [DEEP]


@pytest.fixture
def renderer(tokenizer) -> PromptRenderer:
    return PromptRenderer(tokenizer)


def tool_of(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}


def with_template(tokenizer, template: str | None):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return PromptRenderer(changed)


def ids(renderer: PromptRenderer, prompt) -> list[int]:
    return list(renderer.render(prompt, {}).token_ids)


def test_text_is_tokenized_as_the_tokenizer_does(renderer, tokenizer) -> None:
    assert ids(renderer, "A flood hit.") == tokenizer("A flood hit.").input_ids
    assert ids(renderer, tokenizer.bos_token + "A flood hit.") == tokenizer("A flood hit.").input_ids  # not twice


@pytest.mark.parametrize("kind", [list, tuple])
def test_messages_go_through_the_chat_template(renderer, tokenizer, kind) -> None:
    messages = [SYSTEM, USER, REPLY, USER]
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids(renderer, kind(messages)) == wanted


def test_a_last_assistant_message_is_continued(renderer, tokenizer) -> None:
    found = tokenizer.decode(ids(renderer, [USER, REPLY]))
    assert found.endswith("<|assistant|>A flood.")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "no messages"),
        ((), "no messages"),
        (None, "prompt is NoneType"),
        (7, "prompt is int"),
        (["text"], r"messages\[0\] is str"),
        (b"bytes", r"messages\[0\] is int"),
        ([USER, {"role": "user"}], r"messages\[1\].content is NoneType"),
        ([{"role": "user", "content": ["parts"]}], r"messages\[0\].content is list"),
        ([{"content": "x"}], r"messages\[0\].role is None"),
        ([{"role": "robot", "content": "x"}], "role is 'robot'; accepted is one of system"),
    ],
)
def test_malformed_prompts_are_refused(renderer, prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        renderer.render(prompt, {})


def test_an_empty_text_is_the_start_token_or_refused(renderer, tokenizer) -> None:
    assert ids(renderer, "") == [tokenizer.bos_token_id]
    without = copy.deepcopy(tokenizer)
    without._tokenizer.post_processor = None
    with pytest.raises(PromptError, match="prompt is empty"):
        PromptRenderer(without).render("", {})


def test_errors_leave_the_engine_usable(make_engine: EngineMaker) -> None:
    engine = make_engine()
    with pytest.raises(PromptError):
        engine.generate([])
    with pytest.raises(ValueError, match="stop"):
        engine.generate("x", stop=["a", 3])
    assert engine.stats()["requests"] == 0
    assert engine.generate("x", max_new_tokens=1).report.prompt_tokens == 2


def test_a_template_that_cannot_continue_a_reply_is_a_prompt_error(tokenizer) -> None:
    renderer = with_template(tokenizer, "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}")
    with pytest.raises(PromptError, match="chat template"):
        render_chat(renderer, [USER, REPLY])


def test_without_a_template_there_are_plain_lines_and_a_warning(tokenizer) -> None:
    renderer = with_template(tokenizer, None)
    with pytest.warns(UserWarning, match="no chat_template"):
        assert render_chat(renderer, [USER]) == "user: What happened in Prorna?\nassistant:"
    with pytest.warns(UserWarning, match="no chat_template"):
        assert ids(renderer, [USER])[0] == tokenizer.bos_token_id


THINKING = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not enable_thinking | default(true) %}<think></think>"
    "{% endif %}{% endif %}"
)


class TestChatTemplateKwargs:
    @pytest.mark.parametrize("tools", [(), [tool_of("f")]])
    def test_the_template_sees_them(self, tokenizer, tools) -> None:
        renderer = with_template(tokenizer, THINKING)
        thoughtful, plain = (
            render_chat(renderer, [USER], tools, {"enable_thinking": value}) for value in (True, False)
        )
        assert thoughtful == render_chat(renderer, [USER], tools)
        assert plain == thoughtful + "<think></think>"

    def test_every_way_of_calling_takes_them(self, make_engine: EngineMaker, monkeypatch) -> None:
        engine = make_engine("exact")
        monkeypatch.setattr(engine.tokenizer, "chat_template", THINKING)
        options = {"chat_template_kwargs": {"enable_thinking": False}, "max_new_tokens": 1}
        whole = engine.generate([USER], **options)
        streamed = list(engine.stream([USER], **options))[-1].generation
        (batched,) = engine.generate_batch([[USER]], **options)
        without = engine.generate([USER], max_new_tokens=1)
        sizes = [found.report.prompt_tokens for found in (whole, streamed, batched)]
        assert len(set(sizes)) == 1 and sizes[0] > without.report.prompt_tokens

    def test_none_are_as_none_at_all(self, make_engine: EngineMaker) -> None:
        engine = make_engine("off")
        wanted = engine.generate([USER], max_new_tokens=4).token_ids
        for none in (None, {}):
            assert engine.generate([USER], max_new_tokens=4, chat_template_kwargs=none).token_ids == wanted

    @pytest.mark.parametrize(
        ("given", "named"),
        [("x", "is 'x'"), ([1], r"is \[1\]"), ({1: 2}, "is {1: 2}"), ({"a b": 1}, "a b"), ({"a": DEEP}, "up to 64")]
        + [({name: None}, name) for name in ("tokenize", "messages", "tools", "chat_template", "conversation")]
        + [({name: 1}, name) for name in ("add_generation_prompt", "continue_final_message", "return_dict", "self")],
    )
    def test_others_are_refused_by_name(self, make_engine: EngineMaker, given, named: str) -> None:
        with pytest.raises(ValueError, match=f"chat_template_kwargs.*{named}"):
            make_engine("off").generate([USER], chat_template_kwargs=given)

    def test_one_that_the_template_does_not_read_is_said(self, tokenizer) -> None:
        with pytest.warns(UserWarning, match="reads no enable_thinkin of"):
            render_chat(with_template(tokenizer, THINKING), [USER], (), {"enable_thinkin": 1})

    def test_a_value_that_the_template_fails_at_is_a_prompt_error(self, tokenizer) -> None:
        renderer = with_template(tokenizer, "{{ messages[0]['content'] * times }}")
        assert render_chat(renderer, [USER], (), {"times": 2}) == USER["content"] * 2
        with pytest.raises(PromptError, match="refuses the messages"):
            render_chat(renderer, [USER], (), {"times": "x"})


class TestSegments:
    def test_a_document_is_found_where_it_stands(self, renderer, tokenizer) -> None:
        text = "A flood hit Prorna in May."
        rendered = renderer.render([SYSTEM, {"role": "user", "content": f"News: {text} Really?"}], {"d": text})
        (segment,) = rendered.segments
        assert tokenizer.decode(rendered.token_ids[segment.start : segment.stop]).strip() == text
        (whole,) = renderer.render(text, {"d": text}).segments
        assert (whole.start, whole.stop) == (1, len(tokenizer(text).input_ids))  # without the start token

    def test_special_tokens_behind_the_text_do_not_matter(self, tokenizer) -> None:
        ending = copy.deepcopy(tokenizer)
        ending._tokenizer.post_processor = TemplateProcessing(
            single="<|begin|> $A <|end|>", special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
        )
        rendered = PromptRenderer(ending).render("News: a flood hit.", {"d": "flood hit."})
        assert rendered.token_ids[-1] == 1
        (segment,) = rendered.segments
        found = tokenizer.decode(rendered.token_ids[segment.start : segment.stop], skip_special_tokens=True)
        assert found == " flood hit."

    @given(st.lists(st.sampled_from(["a", "b", "a b"]), min_size=1), st.lists(st.sampled_from([" ", "\n", " \u00a0"])))
    @settings(max_examples=60)
    def test_space_within_a_document_may_be_another(self, words: list[str], spaces: list[str]) -> None:
        text = "".join(map("".join, zip_longest(words, spaces, fillvalue="b ")))
        content = " ".join(words[1:])
        found = re.search(r"\s+".join(map(re.escape, content.split())), text)
        wanted = text.find(content), text.find(content) + len(content)
        if content not in text:
            wanted = found.span() if found else (-1, -1)
        assert SearchedText(text, loosely=True).find(content) == wanted

    def test_what_is_not_there_is_left_out(self, renderer) -> None:
        assert not renderer.render("A flood.", {"d": "A fire.", "e": " "}).segments

    def test_a_tokenizer_without_offsets_finds_none_and_forget_still_works(self, make_engine, tokenizer) -> None:
        engine = make_engine()
        real = engine._load().renderer._tokenizer
        slow = SimpleNamespace(
            is_fast=False,
            bos_token=real.bos_token,
            all_special_ids=real.all_special_ids,
            decode=real.decode,
            __call__=None,
        )

        class Slow(SimpleNamespace):
            def __call__(self, text, return_offsets_mapping=False, **options):
                assert not return_offsets_mapping
                return real(text, **options)

        engine._load().renderer._tokenizer = Slow(**vars(slow))
        report = engine.generate("News: a flood.", documents={"d": "a flood."}, max_new_tokens=2).report
        assert report.documents == ()
        assert engine.forget("d") == 1


class TestWithoutTemplate:
    """The next turn begins with no special token, so nothing but its beginning tells that the answer has ended."""

    @pytest.fixture
    def engine(self, make_engine: EngineMaker, monkeypatch):
        engine = make_engine("off")
        monkeypatch.setattr(engine.tokenizer, "chat_template", None)
        return engine

    @pytest.mark.parametrize("next_turn", ["\nuser:", "\nUser: And?", "\n\nuser: x", "\nassistant: y", "\nSystem:"])
    @pytest.mark.parametrize("options", [{}, {"stop": ["zzz"]}, {"tools": [tool_of("f")]}])
    def test_the_answer_ends_before_the_next_turn(self, engine, monkeypatch, next_turn: str, options) -> None:
        said = engine.tokenizer("A flood." + next_turn + " and more", add_special_tokens=False).input_ids
        forward = engine.model.forward

        def says(*args, **kwargs):
            output = forward(*args, **kwargs)
            output.logits[:, -1] = 0
            output.logits[:, -1, rest.pop(0)] = 9
            return output

        monkeypatch.setattr(engine.model, "forward", says)
        for ask in (engine.generate, lambda *a, **k: list(engine.stream(*a, **k))[-1].generation):
            rest = list(said)
            with pytest.warns(UserWarning, match="no chat_template"):
                found = ask([USER], max_new_tokens=len(said), **options)
            assert (found.text.rstrip("\n"), found.finish_reason) == ("A flood.", "stop")
            assert rest, "the rest was not computed"
        rest = list(said)
        assert next_turn in engine.generate("user: Who?", max_new_tokens=len(said)).text, "text prompts have no turns"
