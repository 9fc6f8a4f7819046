"""Streamed text: the whole text cut at the first complete stop string, in whole characters, whatever the tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, StopStringCriteria

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.model.loading import REFERENCE_MODEL, resolve
from semsharekv_integrations.text.answer_stream import TextStream
from tiny_models import EngineMaker, make_model

TOKENIZER: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve(REFERENCE_MODEL))
ORDINARY = [i for i in range(len(TOKENIZER)) if i not in TOKENIZER.all_special_ids]
TEXTS = st.text(alphabet="ab \n世界🌊é", max_size=24)
STOPS = st.lists(st.text(alphabet="ab \n世🌊", min_size=1, max_size=4), max_size=3)


def letters(text: str) -> list[int]:
    """One token for every byte: characters of several bytes arrive in parts."""
    return [token for char in text for token in _byte_tokens(char)]


def _byte_tokens(char: str) -> list[int]:
    alphabet = dict(zip(range(256), _byte_letters(), strict=True))
    return [TOKENIZER.convert_tokens_to_ids(alphabet[byte]) for byte in char.encode()]


def _byte_letters() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def streamed(token_ids: Sequence[int], stop: Sequence[str]) -> tuple[list[str], bool]:
    stream = TextStream(TOKENIZER, stop)
    pieces = []
    for token_id in token_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


def cut(text: str, stop: Sequence[str]) -> str:
    """The definition: read on until some stop string is complete, then drop the longest one that is."""
    for end in range(len(text) + 1):
        complete = [len(s) for s in stop if text[:end].endswith(s)]
        if complete:
            return text[: end - max(complete)]
    return text


@given(TEXTS, STOPS)
def test_text_is_cut_at_the_first_complete_stop_string(text: str, stop: list[str]) -> None:
    pieces, stopped = streamed(letters(text), stop)
    assert "".join(pieces) == cut(text, stop)
    assert stopped == any(s in text for s in stop)
    assert "\ufffd" not in "".join(pieces)


@given(TEXTS, STOPS)
def test_tokenization_does_not_matter(text: str, stop: list[str]) -> None:
    by_bytes, _ = streamed(letters(text), stop)
    by_words, _ = streamed(TOKENIZER.encode(text, add_special_tokens=False), stop)
    assert "".join(by_bytes) == "".join(by_words)


@given(TEXTS, st.text(alphabet="ab世🌊", min_size=1, max_size=4))
def test_no_part_of_a_stop_string_is_released_before_it(text: str, stop: str) -> None:
    stream, released = TextStream(TOKENIZER, [stop]), ""
    for token_id in letters(text + stop):
        released += stream.push(token_id)
        assert cut(text + stop, [stop]).startswith(released)
        if stream.stopped:
            break
    assert stream.stopped and released == cut(text + stop, [stop])


@given(st.lists(st.sampled_from(ORDINARY), max_size=20))
def test_any_tokens_stream_to_what_they_decode_to(token_ids: list[int]) -> None:
    pieces, _ = streamed(token_ids, [])
    assert "".join(pieces) == TOKENIZER.decode(token_ids)
    for piece in pieces[:-1]:
        assert not piece.endswith("\ufffd")


def test_an_unfinished_character_comes_last() -> None:
    pieces, _ = streamed(letters("a🌊")[:-1], [])
    assert pieces[0] == "a" and not any(pieces[1:-1])
    assert set(pieces[-1]) == {"\ufffd"}


def test_of_several_stop_strings_the_first_complete_one_counts() -> None:
    for token_ids in (letters("xabcd"), TOKENIZER.encode("xabcd", add_special_tokens=False)):
        assert "".join(streamed(token_ids, ["abcd", "c"])[0]) == "xab"
        assert "".join(streamed(token_ids, ["c", "bc"])[0]) == "xa"
    (token_id,) = TOKENIZER.encode(" Prorna", add_special_tokens=False)
    assert "".join(streamed([token_id], ["Prorna", "orn"])[0]) == " Pr"


def test_special_tokens_have_no_text_but_can_stop() -> None:
    user = TOKENIZER.convert_tokens_to_ids("<|user|>")
    token_ids = [*letters("ab"), user, *letters("cd")]
    assert "".join(streamed(token_ids, [])[0]) == "abcd"
    pieces, stopped = streamed(token_ids, ["bX", "<|user|>"])
    assert stopped and "".join(pieces) == "ab"  # what was held back for another stop string is text after all


def with_added_token() -> PreTrainedTokenizerBase:
    """A tokenizer with a special token that it has no use for, as Llama 3's has ``<|eot_id|>``."""
    changed = copy.deepcopy(TOKENIZER)
    changed.add_tokens([AddedToken("<|eot_id|>", special=True)])
    assert "<|eot_id|>" not in changed.all_special_tokens
    return changed


WITH_ADDED = with_added_token()
PIECES = ["<|eot_id|>", "<|user|>", "a", "b", "\n", "<", "世"]
MARKED = st.lists(st.sampled_from(PIECES), max_size=12)


@given(MARKED, st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=3), max_size=3))
def test_stop_strings_may_name_any_special_token(said: list[str], stops: list[list[str]]) -> None:
    """The text ends where one is complete, special tokens read as their names, and never shows them."""
    stop = ["".join(pieces) for pieces in stops]
    token_ids = [token for piece in said for token in WITH_ADDED.encode(piece, add_special_tokens=False)]
    stream, text, num_read = TextStream(WITH_ADDED, stop), "", 0
    for token_id in token_ids:
        text, num_read = text + stream.push(token_id), num_read + 1
        if stream.stopped:
            break
    text += stream.finish()
    visible = [piece for piece in said if len(piece) == 1]
    named = [at for at in range(len(said) + 1) if any("".join(said[:at]).endswith(one) for one in stop)]
    named += [at for at, piece in enumerate(said) if any(piece.startswith(one) for one in stop)]
    shown = [at for at in range(len(visible) + 1) if any("".join(visible[:at]).endswith(one) for one in stop)]
    assert stream.stopped == bool(named or shown)
    assert "".join(visible).startswith(text) and not any(one in text for one in stop)
    assert "<|" not in text or "<|" in "".join(visible)
    if not stream.stopped:
        assert text == "".join(visible)


@pytest.mark.parametrize("half", ["<|", "<|eot", "id|>", "|>", "<|eot_id|"])
def test_half_of_a_special_token_stops_as_it_does_in_transformers(half: str) -> None:
    token_ids = [WITH_ADDED.convert_tokens_to_ids(piece) for piece in ("a", "<|eot_id|>", "b")]
    criterion = StopStringCriteria(WITH_ADDED, half)
    theirs = [bool(criterion(torch.tensor([token_ids[:at]]), None)) for at in range(1, 4)]
    stream = TextStream(WITH_ADDED, [half])
    said = [(stream.push(token_id), stream.stopped) for token_id in token_ids[: theirs.index(True) + 1]]
    assert "".join(text for text, _ in said) == "a" and [stopped for _, stopped in said] == [False, True]


def test_every_special_token_stops_every_way_of_calling(monkeypatch) -> None:
    tokenizer = with_added_token()
    engine = SemShareEngine(make_model("llama", len(tokenizer)), tokenizer)
    eot, forward = tokenizer.convert_tokens_to_ids("<|eot_id|>"), engine.model.forward

    def says_it_third(*args, **kwargs):
        output = forward(*args, **kwargs)
        if (seen := len(steps)) % 3 == 2:
            output.logits[:, -1, eot] = 1e4
        steps.append(seen)
        return output

    monkeypatch.setattr(engine.model, "forward", says_it_third)
    ask = [{"role": "user", "content": "News?"}]
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    for options in ({}, {"tools": tools}):
        for call in (engine.generate, lambda *a, **k: list(engine.stream(*a, **k))[-1].generation):
            steps: list[int] = []
            found = call(ask, stop="<|eot_id|>", max_new_tokens=9, prompt_lookup=False, **options)
            assert (found.finish_reason, len(found.token_ids), found.token_ids[-1]) == ("stop", 3, eot)
            assert "<|eot_id|>" not in found.text


@pytest.mark.parametrize("seed", range(4))
def test_engine_streams_what_it_generates(make_engine: EngineMaker, seed: int) -> None:
    engine = make_engine()
    options = {"temperature": 1.5, "seed": seed, "max_new_tokens": 24}
    whole = engine.generate("Report on Prorna.", **options)
    middle = whole.text[len(whole.text) // 2 :][:3]
    for stop in (None, middle, [middle, whole.text[3:5]]):
        chunks = list(engine.stream("Report on Prorna.", stop=stop, **options))
        final = chunks[-1].generation
        assert final is not None
        assert "".join(chunk.text for chunk in chunks) == final.text
        assert final.text == cut(whole.text, [stop] if isinstance(stop, str) else stop or [])
        assert final.token_ids == whole.token_ids[: len(final.token_ids)]
        assert all(chunk.text for chunk in chunks[:-1]) and not any(chunk.generation for chunk in chunks[:-1])
        if stop:
            assert final.finish_reason == "stop"
