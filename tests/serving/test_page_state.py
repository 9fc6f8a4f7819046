"""What a visitor of the chat page has, and how it is written: documents, conversations, turns, origins of tokens."""

from __future__ import annotations

import re
from base64 import b64encode
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import ReuseReport
from semsharekv_integrations.report import TokenRun
from semsharekv_integrations.serving import page_lists, page_state
from semsharekv_integrations.serving.highlight import render_turns, split_text
from semsharekv_integrations.serving.page_state import Reply, Turn, Visitor
from semsharekv_integrations.serving.prefill_times import PrefillTimes

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;{{#if x}}${y}`"


def make_visitor(*names: str) -> Visitor:
    visitor = Visitor()
    for name in names:
        visitor.add_document(name, f"News from {name}.")
    return visitor


def list_names(visitor: Visitor) -> list[str]:
    return [each.name for each in visitor.documents]


def encode(text: bytes) -> str:
    return b64encode(text).decode()


def report_of(reused: int, tokens: int, ttft_s: float, *runs: TokenRun, **more: Any) -> ReuseReport:
    ids = tuple(range(tokens))
    counts = {"prefix_tokens": reused, "recomputed_tokens": tokens - reused}
    return ReuseReport("exact", tokens, ttft_s=ttft_s, origins=runs, **{**counts, "prompt_ids": ids, **more})


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 9))))
def test_a_moved_document_stands_where_it_was_put_and_the_others_keep_their_order(
    moves: list[tuple[int, int]],
) -> None:
    visitor = make_visitor("a", "b", "c", "d")
    for at, place in moves:
        before, moved = list(visitor.documents), visitor.documents[at]
        visitor.move_document(moved.key, place)
        assert visitor.documents.index(moved) == min(max(place, 0), 3)
        assert [each for each in visitor.documents if each is not moved] == [
            each for each in before if each is not moved
        ]


def test_only_documents_that_are_on_stand_in_prompts_in_their_order() -> None:
    visitor = make_visitor("a", "b", "c")
    visitor.move_document(visitor.documents[2].key, 0)
    visitor.switch_document(visitor.documents[1].key)
    turn, asked = visitor.ask(" Who? ", beside_full=False)
    system, user = asked["messages"]
    assert system["content"].endswith("News from c.\n\nNews from b.") and "News from a." not in system["content"]
    assert user == {"role": "user", "content": "Who?"}
    assert [each["text"] for each in asked["documents"]] == ["News from c.", "News from b."]
    assert list(turn.names.values()) == ["c", "b"] and turn.other is None


def test_without_documents_there_is_no_system_message() -> None:
    _, asked = Visitor().ask("Who?", beside_full=False)
    assert asked["messages"] == [{"role": "user", "content": "Who?"}] and asked["documents"] == []


def test_a_turn_goes_on_from_those_that_were_answered() -> None:
    visitor = make_visitor()
    for answer, error in (("Anna.", None), ("", "full"), ("Tom.", None)):
        turn, asked = visitor.ask("Who?", beside_full=False)
        turn.reply.text, turn.reply.error, turn.reply.is_done = answer, error, True
    assert [message["content"] for message in asked["messages"]] == ["Who?", "Anna.", "Who?"]


def test_conversations_are_apart_and_have_keys_of_their_own() -> None:
    visitor = make_visitor()
    first, one = visitor.ask("Who?", beside_full=False)
    first.reply.is_done = True
    visitor.begin_conversation()
    visitor.begin_conversation()  # which is the same one: nothing was asked in it
    _, other = visitor.ask("When?", beside_full=True)
    assert len(visitor.conversations) == 2 and one["prompt_cache_key"] != other["prompt_cache_key"]
    assert [message["content"] for message in other["messages"]] == ["When?"]
    visitor.open_conversation(visitor.conversations[0].key)
    assert visitor.conversation.turns == [first] and visitor.conversation.title == "Who?"
    with pytest.raises(ValueError, match="not here"):
        visitor.open_conversation("page-of-another")


def test_the_oldest_conversation_goes_where_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_state, "MOST_CONVERSATIONS", 2)
    visitor = make_visitor()
    for question in ("One?", "Two?", "Three?"):
        visitor.begin_conversation()
        visitor.ask(question, beside_full=False)
    assert [each.title for each in visitor.conversations] == ["Two?", "Three?"]
    assert visitor.conversation.title == "Three?"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("photo.png", encode(b"\x89PNG"), "photo.png: .png files are not read"),
        ("notes.pdf", encode(b"%PDF"), ".pdf files are not read"),
        ("notes.txt", encode(b"\x00\x01\xff\xfe"), "notes.txt holds no text in UTF-8"),
        ("notes.txt", encode("café".encode("latin-1")), "holds no text in UTF-8"),
        ("notes.txt", "no base64 at all", "holds no text in UTF-8"),
        ("notes.txt", encode(b" \n\t "), "notes.txt is empty"),
        ("notes.md", encode(b"a" * (1024**2 + 1)), "notes.md has 1,048,577 bytes; there is room for 1,048,576"),
        ("again.txt", encode(b"News from a."), "again.txt has the same text as a"),
    ],
)
def test_a_bad_file_changes_nothing_and_is_told_by_name(name: str, content: str, said: str) -> None:
    visitor = make_visitor("a")
    with pytest.raises(ValueError, match=re.escape(said)):
        visitor.add_file(name, content)
    assert list_names(visitor) == ["a"]


def test_documents_have_bounds_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_state, "MOST_BYTES", 30)
    visitor = make_visitor("a", "b")
    with pytest.raises(ValueError, match="c has 12 bytes; there is room for 6"):
        visitor.add_document("c", "News from c.")
    monkeypatch.setattr(page_state, "MOST_DOCUMENTS", 2)
    with pytest.raises(ValueError, match="c is one too many; 2 documents fit"):
        visitor.add_document("c", "News.")


def test_a_file_keeps_its_name_without_folders_and_its_text_without_odd_line_ends() -> None:
    visitor = Visitor()
    for name in ("C:\\papers\\one.TXT", "/home/x/two.md", "three"):
        visitor.add_file(name, encode(b"\xef\xbb\xbfline\r\nof " + name[-3:].encode() + b"\r"))
    assert list_names(visitor) == ["one.TXT", "two.md", "three"]
    assert [each.text for each in visitor.documents] == ["line\nof TXT", "line\nof .md", "line\nof ree"]


def test_one_question_at_a_time_and_none_without_words() -> None:
    visitor = make_visitor()
    with pytest.raises(ValueError, match="Write a question"):
        visitor.ask(" \n", beside_full=False)
    visitor.ask("Who?", beside_full=False)
    with pytest.raises(ValueError, match="still being written"):
        visitor.ask("When?", beside_full=False)
    assert len(visitor.conversation.turns) == 1


TEXTS = st.text(st.sampled_from("ab é漢字🙂👩‍🚀\n\ufffd"), max_size=20)


@given(st.lists(TEXTS, max_size=6), st.data())
def test_pieces_of_a_text_join_to_it_and_hold_no_half_characters(texts: list[str], data: st.DataObject) -> None:
    """Tokens are bytes here: the worst there is."""
    token_ids = list("".join(texts).encode())
    cuts = data.draw(st.lists(st.integers(0, len(token_ids)), max_size=8))
    stops = [*sorted(cut for cut in set(cuts) if 0 < cut < len(token_ids)), *([len(token_ids)] if token_ids else [])]
    pieces = list(split_text(lambda ids: bytes(ids).decode(errors="replace"), token_ids, stops))
    assert "".join(pieces) == "".join(texts) and len(pieces) == len(stops)


def test_pieces_of_tokens_join_to_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "News from Velmar.  The mayor is Anna Kelsen — 漢字 🙂, 42 million.\n\nWho?"
    token_ids = tokenizer(text).input_ids
    whole = tokenizer.decode(token_ids)
    for step in (1, 2, 5):
        stops = [*range(step, len(token_ids), step), len(token_ids)]
        assert "".join(split_text(tokenizer.decode, token_ids, stops)) == whole


def make_turn(text: str = HOSTILE) -> Turn:
    runs = (TokenRun(0, 2, "prefix"), TokenRun(2, 3, "identical", "d"), TokenRun(5, 1, "computed", "d"))
    runs += (TokenRun(6, 2, "fuzzy", "e"),)
    counts = {"identical_tokens": 3, "fuzzy_tokens": 2, "recomputed_tokens": 1, "declined": text}
    report = report_of(2, 8, 0.5, *runs, **counts)
    reply = Reply(text, True, None, "length", report, tuple(f"{n}{text}" for n in range(4)))
    turn = Turn(text, {"d": text, "e": "fine"}, reply, Reply(text, True, text))
    times = PrefillTimes()
    turn.full_prefill = times.find("t", report)
    return turn


def test_nothing_that_somebody_wrote_becomes_markup() -> None:
    visitor = Visitor()
    visitor.add_document(HOSTILE, HOSTILE)
    turn = make_turn()
    visitor.conversation.turns.append(turn)
    parts = [
        render_turns([turn]),
        page_lists.render_documents(visitor.documents),
        page_lists.render_conversations(visitor),
        page_lists.render_notice(HOSTILE, is_bad=True),
        page_lists.render_head(HOSTILE, HOSTILE, may_leave=True),
    ]
    for html in parts:
        markup = Markup(html)
        assert not {"script", "img"} & markup.tags and not any(name.startswith("on") for name in markup.attributes)
        assert HOSTILE[:30] in "".join(markup.texts), "titles are shortened"


class Markup(HTMLParser):
    """The tags, the names of attributes, and the texts and values of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_run_is_marked_by_its_origin_and_names_its_document() -> None:
    turn = make_turn("T")
    html = render_turns([turn])
    prompt = html.partition('class="skv-prompt"')[2]
    marks = re.findall(r'<span class="skv-(\w+)" title="([^"]*)">([^<]*)</span>', prompt)
    assert [(origin, text) for origin, _, text in marks] == [
        ("prefix", "0T"),
        ("identical", "1T"),
        ("computed", "2T"),
        ("fuzzy", "3T"),
    ]
    assert [title for _, title, _ in marks] == [
        "exact prefix, 2 tokens: no document",
        "moved, 3 tokens: T",
        "computed, 1 token: T",
        "reworded, 2 tokens: fine",
    ]
    legend = html.partition('class="skv-legend"')[2].partition("</ul>")[0]
    assert all(name in legend for name in ("exact prefix", "moved", "reworded", "computed"))


def test_a_full_prefill_is_measured_where_it_was_and_estimated_where_not() -> None:
    times = PrefillTimes()
    reused = report_of(90, 100, 0.5, compute_ratio=0.1, phases_s={"wait": 0.25})
    guess = times.find("t", reused)
    assert not guess.is_measured and guess.seconds == pytest.approx(2.5), "by the share that was computed"
    times.note("t", report_of(0, 50, 1.0, prompt_ids=(7,) * 50))
    guess = times.find("t", reused)
    assert not guess.is_measured and guess.seconds == pytest.approx(2.0), "by tokens"
    assert times.find("other", reused).seconds != pytest.approx(2.0), "of this tenant alone"
    full = report_of(0, 100, 3.0)
    times.note("t", full)
    assert times.find("t", full) == times.find("t", full)._replace(seconds=3.0, is_measured=True)
    known = times.find("t", reused)
    assert known.is_measured and known.seconds == 3.0, "of the very prompt"
    times.note("t", reused)
    assert times.find("t", reused) == known
