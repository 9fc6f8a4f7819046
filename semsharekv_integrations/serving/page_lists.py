"""The chat page's head, its conversations, its documents and what it has to say, as HTML; every text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from semsharekv_integrations.serving.page_state import SUFFIXES, Document, Visitor


def render_head(model: str, mode: str, *, may_leave: bool) -> str:
    """Return the page's head; with a way out for visitors who came in by a key."""
    leave = '<a href="logout">Log out</a>' if may_leave else ""
    return (
        f'<header class="skv-head"><h1>semsharekv</h1><p>{escape(model)}{escape(mode)}</p>'
        f'<button type="button" aria-pressed="false">Dark theme</button>{leave}</header>'
    )


def render_notice(text: str, *, is_bad: bool) -> str:
    """Return what the page says about the last thing done; it is read out."""
    role, kind = ("alert", "skv-notice skv-bad") if is_bad else ("status", "skv-notice")
    return f'<p class="{kind}" role="{role}">{escape(text)}</p>' if text else ""


def render_conversations(visitor: Visitor) -> str:
    """Return the conversations, the newest first, and the button for a new one."""
    rows = "".join(
        f'<li><button type="button" class="skv-talk" data-key="{escape(each.key)}" title="{escape(each.title)}" '
        f'aria-current="{str(each is visitor.conversation).lower()}">{escape(each.title)}</button></li>'
        for each in reversed(visitor.conversations)
    )
    return (
        '<nav class="skv-side" aria-label="Conversations"><h2>Conversations<span></span>'
        f'<button type="button" class="skv-plain" data-key="">New</button></h2><ul>{rows}</ul></nav>'
    )


def render_documents(documents: Sequence[Document]) -> str:
    """Return the list of documents, and where to drop more."""
    num_on = sum(each.is_on for each in documents)
    rows = "".join(_render_document(each, place, len(documents)) for place, each in enumerate(documents))
    listed = f'<ol class="skv-list">{rows}</ol>' if documents else '<p class="skv-none">None yet.</p>'
    kinds = ",".join(SUFFIXES)
    return (
        '<section class="skv-side" aria-label="Documents">'
        f"<h2>Documents<span>{num_on} of {len(documents)} in the prompt, in this order</span></h2>{listed}"
        f'<label class="skv-drop"><input class="skv-hide" type="file" multiple accept="{kinds},text/plain">'
        "<b>Upload</b> .txt or .md files, or drop them here</label></section>"
    )


def _render_document(document: Document, place: int, total: int) -> str:
    name, words = escape(document.name), len(document.text.split())
    buttons = "".join(
        f'<button type="button" data-do="{what}" aria-label="{label}" title="{label}"'
        f' aria-disabled="{str(is_idle).lower()}">{sign}</button>'
        for what, label, sign, is_idle in (
            ("up", f"Move {name} up", "↑", place == 0),
            ("down", f"Move {name} down", "↓", place == total - 1),
            ("remove", f"Remove {name}", "✕", False),
        )
    )
    return (
        f'<li class="skv-doc{"" if document.is_on else " skv-out"}" data-key="{document.key}">'
        '<span class="skv-grip" title="Drag to another place" aria-hidden="true">⠿</span>'
        f'<button type="button" role="switch" data-do="switch" aria-checked="{str(document.is_on).lower()}" '
        f'aria-label="Use {name}"></button>'
        f'<span class="skv-name" title="{name}">{name}<small>{words:,} words</small></span>{buttons}</li>'
    )
