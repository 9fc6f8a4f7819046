"""Prompts beyond the context window: refused, whatever they are made of, and soon if they are far beyond it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations import ContextWindowError
from semsharekv_integrations.text.prompt import PromptRenderer, require_room_for_text
from tiny_models import EngineMaker

WINDOW = 64
FAR_BEYOND = "the mayor of Velmar " * 200_000


@given(parts=st.lists(st.sampled_from(["flood ", "a", " " * 40, "\n", "世界", "<|end|>", "xqzj"]), max_size=200))
def test_only_what_is_too_long_is_refused(tokenizer, parts: list[str]) -> None:
    text = "".join(parts) * 3
    renderer = PromptRenderer(tokenizer)
    size = len(tokenizer(text, verbose=False).input_ids)
    try:
        found = renderer.render(text, {}, window=WINDOW)
    except ContextWindowError:
        assert size >= WINDOW
    else:
        assert len(found.token_ids) == size < WINDOW


def test_text_of_few_tokens_is_never_refused_for_its_length() -> None:
    """Some tokenizers make one token of a word or of space of any length."""
    require_room_for_text("x" * 10_000_000, WINDOW, lambda text: 1)
    require_room_for_text(FAR_BEYOND, None, len)


@pytest.fixture
def tokenized(monkeypatch) -> list[int]:
    """How many characters each call of the tokenizer got."""
    sizes: list[int] = []
    for name in ("_count", "_encode"):
        real = getattr(PromptRenderer, name)

        def counting(self, text, real=real, **options):
            sizes.append(len(text))
            return real(self, text, **options)

        monkeypatch.setattr(PromptRenderer, name, counting)
    return sizes


@pytest.mark.parametrize("size", [1, 10])
def test_far_beyond_the_window_no_more_is_tokenized_than_a_little(make_engine: EngineMaker, tokenized, size) -> None:
    engine = make_engine("exact", max_context_tokens=1000)
    text = FAR_BEYOND * size
    said = [
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": text},
        {"role": "user", "content": "?"},
    ]
    for call in (
        lambda: engine.generate(text, documents=[text, text[:-1]]),
        lambda: engine.generate([{"role": "user", "content": text}]),
        lambda: engine.generate(said),
        lambda: next(engine.stream([{"role": "system", "content": text}, {"role": "user", "content": "Who?"}])),
        lambda: engine.generate_batch([text]),
        lambda: engine.warm([text]),
    ):
        tokenized.clear()
        with pytest.raises(ContextWindowError, match=r"more than \d+ tokens; accepted is up to 999"):
            call()
        assert sum(tokenized) < 100_000
    assert engine.stats()["requests"] == 0 == engine.stats()["store_entries"]


def test_it_is_refused_while_others_compute(make_engine: EngineMaker) -> None:
    """Nothing of it waits for the turn of another call, and none waits for it."""
    engine = make_engine("exact", max_context_tokens=1000)
    with engine._queue.admit():
        for call in (lambda: engine.generate(FAR_BEYOND), lambda: engine.warm([FAR_BEYOND])):
            with pytest.raises(ContextWindowError):
                call()
