"""The chat page: what stands where, and what each event changes. Needs the extra ``web``.

Gradio carries events and HTML between browser and server, and keeps each visitor's state. Nothing here is computed: see
``page_asking`` for answers, ``highlight`` and ``page_lists`` for what they look like.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from importlib.resources import files
from typing import Any

import gradio as gr
from fastapi import FastAPI

from semsharekv_integrations.serving.entrance import TENANT, Entrance
from semsharekv_integrations.serving.highlight import render_turns
from semsharekv_integrations.serving.hosting import Host
from semsharekv_integrations.serving.page_asking import Asker
from semsharekv_integrations.serving.page_lists import (
    render_conversations,
    render_documents,
    render_head,
    render_notice,
)
from semsharekv_integrations.serving.page_state import MOST_DOCUMENT_BYTES, Visitor
from semsharekv_integrations.serving.problems import ServingError, describe_error

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
_MOST_VISITORS = 500  # whose state is kept, the latest
_FONTS = {
    "font": ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
    "font_mono": ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
}


def make_page(host: Host, documents: Mapping[str, str] | None = None) -> tuple[FastAPI, Entrance]:
    """Return the page as an application of its own, whose lifespan must run, and what lets visitors on to it.

    ``documents`` are texts by name that every visitor begins with.
    """
    visitor = Visitor()
    for name, text in (documents or {}).items():
        visitor.add_document(name, text)
    app, style = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), _read_asset("page.css")
    blocks = _lay_out(host, visitor)
    blocks.max_threads = host.config.max_requests + 40  # events under way: answers, and what takes no time
    blocks.state_session_capacity = _MOST_VISITORS
    blocks.queue(default_concurrency_limit=None, api_open=False)
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", **_FONTS)
    gr.mount_gradio_app(
        app,
        blocks,
        "/",
        auth_dependency=lambda request: request.scope.get(TENANT),
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        css=style,
    )
    return app, Entrance(app, host, style)


def _read_asset(name: str) -> str:
    return files("semsharekv_integrations.serving").joinpath("web", name).read_text(encoding="utf-8")


def _make_part(value: str, script: str | None = None, **options: Any) -> gr.HTML:
    """Return a part of the page that is HTML of ours, with a script from ``web`` that runs once."""
    code = _read_asset(script) if script else None
    return gr.HTML(value, js_on_load=code, apply_default_css=False, elem_classes="skv-page", padding=False, **options)


class _Parts:
    """The components that events change."""

    def __init__(self, host: Host, visitor: Visitor) -> None:
        mode = f" · mode {host.engine.config.reuse.preferred_mode}"
        self.state = gr.State(visitor)
        self.head = _make_part(render_head(host.model, mode, may_leave=bool(host.config.api_keys)), "head.js")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=340, elem_classes="skv-left"):
                self.talks = _make_part(render_conversations(visitor), "talks.js")
                self.documents = _make_part(render_documents(visitor.documents), "documents.js")
                with gr.Accordion("Paste a text", open=False):
                    self.name = gr.Textbox(label="Name", max_lines=1, placeholder="What to call it")
                    self.text = gr.Textbox(label="Text", lines=6, max_lines=12)
                    self.add = gr.Button("Add document", size="sm")
            with gr.Column(scale=4, min_width=320):
                self.talk = _make_part(render_turns([]), "talk.js")
                with gr.Column(elem_classes="skv-ask"):
                    self.notice = _make_part("")
                    placeholder = "Ask about the documents (Enter sends)"
                    self.question = gr.Textbox(label="Question", max_lines=6, placeholder=placeholder, autofocus=True)
                    with gr.Row():
                        self.beside = gr.Checkbox(label="Also ask with off, side by side", scale=3, min_width=120)
                        self.stop = gr.Button("Stop", interactive=False, size="md", scale=0, min_width=68)
                        self.send = gr.Button("Ask", variant="primary", size="md", scale=0, min_width=68)


def _lay_out(host: Host, visitor: Visitor) -> gr.Blocks:
    asker = Asker(host)
    with gr.Blocks(title="semsharekv", analytics_enabled=False, fill_width=True) as blocks:
        parts = _Parts(host, visitor)
        _add_documents(blocks, parts)
        _add_conversations(parts, asker)
    return blocks


def _change(visitor: Visitor, request: gr.Request, act: Callable[[Visitor], str | None]) -> str:
    """Have ``act`` change what the visitor has; return as HTML what there is to say, or why it could not be done."""
    try:
        _admit(visitor, request)
        return render_notice(act(visitor) or "", is_bad=False)
    except Exception as error:  # else Gradio would log its message, which may hold what a visitor wrote
        return render_notice(str(describe_error(error)), is_bad=True)


def _admit(visitor: Visitor, request: gr.Request) -> str:
    """Return the tenant that a request comes from. ``ServingError`` if the visitor is another one's."""
    tenant = str(request.username)
    if visitor.tenant not in (None, tenant):
        raise ServingError(403, "wrong_visitor", "this page belongs to another key; reload it")
    visitor.tenant = tenant
    return tenant


def _add_documents(blocks: gr.Blocks, parts: _Parts) -> None:
    """Have the list of documents do what it is told. Events change no part but their own: they may overlap."""
    several = {**_QUIET, "trigger_mode": "multiple", "concurrency_id": "documents", "concurrency_limit": 1}  # in order

    async def greet(visitor: Visitor) -> str:
        return render_documents(visitor.documents)

    async def change(visitor: Visitor, event: gr.EventData, request: gr.Request) -> tuple[str, str]:
        told = _change(visitor, request, lambda known: _change_document(known, event._data))
        return render_documents(visitor.documents), told

    async def upload(visitor: Visitor, event: gr.EventData, request: gr.Request) -> tuple[str, str]:
        told = _change(visitor, request, lambda known: _upload_file(known, event._data))
        return render_documents(visitor.documents), told

    async def paste(visitor: Visitor, name: str, text: str, request: gr.Request) -> tuple[Any, ...]:
        num_before = len(visitor.documents)
        told = _change(visitor, request, lambda known: f"{known.add_document(name, text).name} is added.")
        emptied = ("", "") if len(visitor.documents) > num_before else (gr.skip(), gr.skip())
        return render_documents(visitor.documents), told, *emptied

    changed = [parts.documents, parts.notice]
    blocks.load(greet, [parts.state], [parts.documents], **_QUIET)
    parts.documents.change_document(change, [parts.state], changed, **several)
    parts.documents.upload_file(upload, [parts.state], changed, **several)
    pasted = [parts.state, parts.name, parts.text]
    parts.add.click(paste, pasted, [*changed, parts.name, parts.text], **_QUIET)


def _change_document(visitor: Visitor, event: Mapping[str, Any]) -> str:
    key, what = str(event.get("key")), event.get("what")
    document = visitor.find_document(key)
    place = visitor.documents.index(document)
    if what == "switch":
        visitor.switch_document(key)
        return f"{document.name} is {'in' if document.is_on else 'out of'} the prompt."
    if what == "remove":
        visitor.remove_document(key)
        return f"{document.name} is removed."
    wanted = event.get("place", 0) if what == "place" else place + (1 if what == "down" else -1)
    visitor.move_document(key, int(wanted))
    return f"{document.name} is now number {visitor.documents.index(document) + 1} of {len(visitor.documents)}."


def _upload_file(visitor: Visitor, event: Mapping[str, Any]) -> str:
    name, content = str(event.get("name")), event.get("content")
    if not isinstance(content, str):
        raise ValueError(f"{name} is larger than the {MOST_DOCUMENT_BYTES:,} bytes that a document may have.")
    return f"{visitor.add_file(name, content).name} is added."


def _show_conversation(visitor: Visitor, event: Mapping[str, Any]) -> None:
    key = str(event.get("key") or "")
    if key:
        visitor.open_conversation(key)
    else:
        visitor.begin_conversation()


def _add_conversations(parts: _Parts, asker: Asker) -> None:
    """Have questions asked, answers stopped, and conversations shown."""

    async def ask(visitor: Visitor, question: str, beside: bool, request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        try:
            tenant = _admit(visitor, request)
            turn, asked = visitor.ask(question, beside_full=beside)
        except Exception as error:  # see ``_change``
            yield {parts.notice: render_notice(str(describe_error(error)), is_bad=True)}
            return
        began = {parts.talks: render_conversations(visitor), parts.notice: "", parts.question: ""}
        yield {parts.talk: _render_shown(visitor), parts.stop: gr.Button(interactive=True), **began}
        async with aclosing(asker.answer(turn, asked, tenant)) as steps:
            async for _ in steps:
                yield {parts.talk: _render_shown(visitor)}
        yield {parts.stop: gr.Button(interactive=False)}

    async def show(visitor: Visitor, event: gr.EventData, request: gr.Request) -> tuple[str, ...]:
        told = _change(visitor, request, lambda known: _show_conversation(known, event._data))
        return render_conversations(visitor), _render_shown(visitor), told

    async def refresh(visitor: Visitor) -> str:
        return _render_shown(visitor)

    async def stop(visitor: Visitor, request: gr.Request) -> str:
        return _change(visitor, request, lambda known: known.stop_answers())

    asking = gr.on(
        [parts.question.submit, parts.send.click],
        ask,
        [parts.state, parts.question, parts.beside],
        [parts.talks, parts.talk, parts.notice, parts.question, parts.stop],
        trigger_mode="once",
        **_QUIET,
    )
    asking.then(refresh, [parts.state], [parts.talk], **_QUIET)  # what overlapped may have been shown last
    parts.stop.click(stop, [parts.state], [parts.notice], **_QUIET)
    shown = [parts.talks, parts.talk, parts.notice]
    showing = parts.talks.show_conversation(show, [parts.state], shown, trigger_mode="multiple", **_QUIET)
    showing.then(refresh, [parts.state], [parts.talk], **_QUIET)


def _render_shown(visitor: Visitor) -> str:
    return render_turns(visitor.conversation.turns)
