"""Turns of a conversation as HTML: answers, and the prompt's tokens coloured by where their KV came from.

Everything that a visitor or a model wrote is escaped. Knows nothing about Gradio.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from semsharekv_integrations.report import Origin, ReuseReport
from semsharekv_integrations.serving.page_state import Reply, Turn
from semsharekv_integrations.serving.prefill_times import FullPrefill, find_seconds

_CUT = "\ufffd"  # stands for bytes that make no character


class Kind(NamedTuple):
    """How tokens of one origin are shown: a word, and what it means."""

    name: str
    meaning: str


KINDS: Mapping[Origin, Kind] = {
    "prefix": Kind("exact prefix", "stored at this very place; not computed"),
    "identical": Kind("moved", "the same words, stored at another place; not computed at every layer"),
    "fuzzy": Kind("reworded", "read in the words of a stored text that says the same"),
    "computed": Kind("computed", "new, or what the answer hangs on"),
}
_OUTSIDE = "no document"
_FINISHED = {"length": "cut: it reached the most tokens", "cancelled": "stopped"}


def split_text(decode: Callable[[list[int]], str], token_ids: Sequence[int], stops: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens up to each of ``stops`` from the one before; together they are that of all.

    A character whose bytes stand in tokens of two pieces is part of the later one. Ascending ``stops`` end at the last
    token. Each piece is decoded behind the one before, as tokenizers write a text's first word in another way.
    """
    anchor, told, last = 0, 0, 0  # tokens from which on is decoded; characters behind it that are told; the stop before
    for stop in stops:
        text = decode(list(token_ids[anchor:stop]))
        whole = text if stop == len(token_ids) else text.rstrip(_CUT)
        yield whole[told:]
        told = max(told, len(whole))
        if whole == text:
            anchor, last = last, stop
            told = len(decode(list(token_ids[anchor:stop])))


def render_turns(turns: Sequence[Turn]) -> str:
    """Return the conversation."""
    if turns:
        return f'<div role="log" aria-label="Conversation">{"".join(map(_render_turn, turns))}</div>'
    return (
        '<div class="skv-empty"><p>Nothing asked yet.</p><p>Add documents, write a question below and press Enter. '
        "Ask again with the documents in another order to see what is computed, and what is not.</p></div>"
    )


def _render_turn(turn: Turn) -> str:
    replies = [_render_reply(turn.reply, "With reuse", is_other=False)]
    if turn.other is not None:
        replies.append(_render_reply(turn.other, "Full prefill (off)", is_other=True))
        replies.append(_compare(turn.reply, turn.other))
    panel = _render_panel(turn) if turn.reply.report is not None else ""
    return (
        f'<article class="skv-turn"><div class="skv-said"><h3 class="skv-asked">{escape(turn.question)}</h3>'
        f'<div class="skv-answers{" skv-two" if turn.other else ""}">{"".join(replies)}</div></div>{panel}</article>'
    )


def _render_reply(reply: Reply, title: str, *, is_other: bool) -> str:
    kind = "skv-answer skv-off" if is_other else "skv-answer"
    report, status = reply.report, ""
    if reply.error is not None:
        status = f'<p class="skv-error" role="alert">{escape(reply.error)}</p>'
    elif report is not None:
        status = (
            f"<p><b>{find_seconds(report):.2f} s</b> to the first token, {report.output_tokens:,} tokens in all</p>"
        )
    if reply.finish_reason in _FINISHED:
        status += f'<p class="skv-note">{_FINISHED[reply.finish_reason]}</p>'
    waits = "" if reply.is_done else '<span class="skv-caret" role="img" aria-label="still being written"></span>'
    mode = f'<span class="skv-mode">mode {report.mode}</span>' if report and not is_other else ""
    return (
        f'<section class="{kind}" aria-label="{title}"><h4>{title}{mode}</h4>'
        f'<div class="skv-text">{escape(reply.text)}{waits}</div>{status}</section>'
    )


def _compare(reply: Reply, other: Reply) -> str:
    if reply.report is None or other.report is None:
        return ""
    same = reply.text == other.text
    word = "Both answers are the same." if same else "The answers differ."
    return f'<p class="skv-same" data-same="{str(same).lower()}">{word}</p>'


def _render_panel(turn: Turn) -> str:
    """Return what one answer reused: in numbers, and token by token if the report says so."""
    report = turn.reply.report
    assert report is not None, "an answer that has ended has a report"
    share = 100 * report.reused_tokens // report.prompt_tokens
    asks_why = report.declined is not None and report.recomputed_tokens > 1
    parts = [
        f'<p class="skv-big"><b data-reused="{report.reused_tokens}">{report.reused_tokens:,}</b> '
        f"<em>of {report.prompt_tokens:,} prompt tokens reused</em> <span>{share}%</span></p>",
        _render_bar(report),
        _render_times(report, turn.full_prefill) if turn.full_prefill else "",
        f'<p class="skv-note">Nothing more is reused: {escape(str(report.declined))}.</p>' if asks_why else "",
        _render_legend(report),
        _render_prompt(report, turn.reply.pieces, turn.names),
        _render_documents(report, turn.names),
    ]
    return f'<aside class="skv-panel" aria-label="What was reused">{"".join(parts)}</aside>'


def _count(report: ReuseReport) -> dict[Origin, int]:
    return {
        "prefix": report.prefix_tokens,
        "identical": report.identical_tokens,
        "fuzzy": report.fuzzy_tokens,
        "computed": report.recomputed_tokens,
    }


def _render_bar(report: ReuseReport) -> str:
    counts = _count(report)
    said = ", ".join(f"{count:,} {KINDS[origin].name}" for origin, count in counts.items() if count)
    parts = "".join(
        f'<i class="skv-{origin}" style="flex-grow:{count}"></i>' for origin, count in counts.items() if count
    )
    return f'<div class="skv-bar" role="img" aria-label="{said}">{parts}</div>'


def _render_times(report: ReuseReport, full: FullPrefill) -> str:
    """Return two bars: seconds to the first token, and those of a full prefill."""
    seconds = find_seconds(report)
    most = max(seconds, full.seconds, 1e-9)
    rows = (("this answer", seconds, ""), ("full prefill", full.seconds, " skv-full"))
    bars = "".join(
        f'<div class="skv-time"><span>{name}</span><i class="skv-track{kind}">'
        f'<i style="width:{value / most:.1%}"></i></i><b>{value:.2f} s</b></div>'
        for name, value, kind in rows
    )
    how = "measured" if full.is_measured else "estimated"
    return (
        f'<div class="skv-times" data-full="{how}"><p>Seconds to the first token</p>{bars}'
        f'<p class="skv-note">Full prefill: {escape(full.source)}.</p></div>'
    )


def _render_legend(report: ReuseReport) -> str:
    counts = _count(report)
    return (
        '<ul class="skv-legend" aria-label="Legend">'
        + "".join(
            f'<li title="{kind.meaning}"><span class="skv-{origin}">{kind.name}</span> {counts[origin]:,}</li>'
            for origin, kind in KINDS.items()
        )
        + "</ul>"
    )


def _render_prompt(report: ReuseReport, pieces: Sequence[str], names: Mapping[str, str]) -> str:
    """Return the prompt, each run of tokens marked by its origin; its title names origin, tokens and document."""
    if not report.origins:
        return '<p class="skv-note">Tokens are shown with ReuseConfig(report_origins=True).</p>'
    marks = []
    for run, piece in zip(report.origins, pieces, strict=True):
        where = names.get(run.document_id or "", _OUTSIDE)
        title = f"{KINDS[run.origin].name}, {run.tokens:,} token{'s' if run.tokens > 1 else ''}: {where}"
        marks.append(f'<span class="skv-{run.origin}" title="{escape(title)}">{escape(piece)}</span>')
    return (
        '<div class="skv-prompt" tabindex="0" role="region" aria-label="The prompt as the model read it">'
        f"{''.join(marks)}</div>"
    )


def _render_documents(report: ReuseReport, names: Mapping[str, str]) -> str:
    """Return a table that says of each document what the colours say; for those who do not see or hover."""
    counts: defaultdict[str, Counter[Origin]] = defaultdict(Counter)
    for run in report.origins:
        counts[names.get(run.document_id or "", _OUTSIDE)][run.origin] += run.tokens
    if not counts:
        return ""
    head = "".join(f'<th scope="col">{kind.name}</th>' for kind in KINDS.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>' + "".join(f"<td>{found[o]:,}</td>" for o in KINDS) + "</tr>"
        for name, found in counts.items()
    )
    return (
        '<div class="skv-scroll" tabindex="0" role="region" aria-label="Tokens by document">'
        f'<table><caption>Tokens by document</caption><tr><th scope="col">document</th>{head}</tr>{rows}</table></div>'
    )
