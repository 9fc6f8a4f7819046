"""The application: OpenAI's routes over one engine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, aclosing, asynccontextmanager
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from semsharekv_integrations import __version__
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import require
from semsharekv_integrations.metrics import EngineCollector
from semsharekv_integrations.report import GenerationChunk
from semsharekv_integrations.serving.answers import Events, Form, format_event
from semsharekv_integrations.serving.documents import list_all_documents, stands_in_library
from semsharekv_integrations.serving.gates import Gate
from semsharekv_integrations.serving.hosting import Host, wait_for
from semsharekv_integrations.serving.problems import ServingError, add_handlers, describe_error, make_body, name_prompt
from semsharekv_integrations.serving.schemas import ChatBody, CompletionBody, DocumentBody
from semsharekv_integrations.serving.settings import ServerConfig

_BEARER = HTTPBearer(auto_error=False, description="one of the keys that the server was started with")


def create_app(
    engine: SemShareEngine,
    config: ServerConfig | None = None,
    on_failure: Callable[[], None] = lambda: None,
    documents: Mapping[str, str] | None = None,
) -> FastAPI:
    """Make the application. It loads the model when it starts, and closes the engine's store when it ends.

    Args:
        engine: what answers.
        config: who may call, and how much.
        on_failure: called, in another thread, if the model cannot be loaded; ``app.state.host.failure`` says why.
        documents: texts by name that every visitor of the chat page begins with.
    """
    require(config is None or isinstance(config, ServerConfig), "config", config, "a ServerConfig or None")
    config = ServerConfig() if config is None else config
    host = Host(engine, config, on_failure)

    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        async with host.run(), AsyncExitStack() as stack:
            for each in inner:
                await stack.enter_async_context(each.router.lifespan_context(each))
            yield

    inner = list[FastAPI]()
    app = FastAPI(title="semsharekv", version=__version__, lifespan=run)
    app.state.host = host
    app.add_middleware(Gate, config=config)
    if config.cors_origins:
        every = ["*"]  # OpenAI's own client sends headers of its own
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=every, allow_headers=every)
    add_handlers(app)
    _add_answers(app, host)
    _add_documents(app, host)
    _add_facts(app, host)
    if config.page:
        inner += _add_page(app, host, documents)  # which takes all paths that are left, so it comes last
    return app


def _find_tenant(
    request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
) -> str:
    """Return the caller's namespace; raise ``ServingError`` if its key is wrong or missing."""
    host: Host = request.app.state.host
    tenant = host.config.find_tenant(credentials.credentials if credentials else None)
    if tenant is None:
        raise ServingError(401, "invalid_api_key", "the API key is missing or wrong; send Authorization: Bearer KEY")
    return tenant


Tenant = Annotated[str, Depends(_find_tenant)]


def _add_answers(app: FastAPI, host: Host) -> None:
    """Add the routes that generate."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody, tenant: Tenant) -> Response:
        """Answer messages."""
        form = Form(is_chat=True, model=host.model, one_call=body.parallel_tool_calls is False)
        return await _answer(host, request, body, tenant, form)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody, tenant: Tenant) -> Response:
        """Continue a text."""
        return await _answer(host, request, body, tenant, Form(is_chat=False, model=host.model))


async def _answer(host: Host, request: Request, body: ChatBody | CompletionBody, tenant: str, form: Form) -> Response:
    prompt, options = host.read_body(body, tenant)
    with name_prompt(body.prompt_field), ExitStack() as place:
        place.enter_context(host.take_place())
        if not body.stream:
            generation = await wait_for(request, host.engine.agenerate(prompt, **options))
            return JSONResponse(form.describe_whole(generation))
        chunks = host.engine.astream(prompt, **options)
        first = await wait_for(request, anext(chunks))  # so that what is refused has a status of its own
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return _EventResponse(form.begin(with_usage=with_usage), first, chunks, place.pop_all())


class _EventResponse(StreamingResponse):
    """An answer as events. Once it is sent, or its caller has left, the call has ended and its place is free."""

    def __init__(
        self,
        events: Events,
        first: GenerationChunk,
        chunks: AsyncGenerator[GenerationChunk, None],
        place: AbstractContextManager[Any],
    ) -> None:
        told = _tell(events, first, chunks)
        super().__init__(told, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._chunks, self._place = chunks, place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a caller may leave before the first of them is made."""
        with self._place:
            async with aclosing(self._chunks):
                await super().__call__(scope, receive, send)


async def _tell(
    events: Events, first: GenerationChunk, chunks: AsyncGenerator[GenerationChunk, None]
) -> AsyncIterator[str]:
    """Yield the events of an answer. An error on the way is the last one."""
    try:
        for event in events.tell(first):
            yield event
        async for chunk in chunks:
            for event in events.tell(chunk):
                yield event
    except Exception as error:
        yield format_event(make_body(describe_error(error)))


def _add_documents(app: FastAPI, host: Host) -> None:
    """Add the routes that warm, list and forget documents; each within the caller's tenant."""

    @app.post("/v1/documents")
    async def warm(body: DocumentBody, tenant: Tenant) -> dict[str, Any]:
        """Compute and keep the KV of a text before prompts contain it."""
        host.require_loaded()
        with name_prompt("text"), host.take_place():
            labels: dict[str, Any] = {"namespace": tenant, "pinned": body.pinned, "ttl_s": body.ttl_s}
            stored = await run_in_threadpool(partial(host.engine.warm, {body.id: body.text}, **labels))
        return {"id": body.id, "object": "document", "stored": bool(stored)}

    @app.get("/v1/documents")
    async def show(tenant: Tenant) -> dict[str, Any]:
        """List the documents that stored KV is known by."""
        host.require_loaded()
        found = await run_in_threadpool(lambda: list_all_documents(host.engine.store, tenant))
        return {"object": "list", "data": found}

    @app.delete("/v1/documents/{document_id:path}")
    async def forget(document_id: str, tenant: Tenant) -> dict[str, Any]:
        """Drop all KV that a document stands in."""
        host.require_loaded()
        dropped = await run_in_threadpool(partial(host.engine.forget, document_id, namespace=tenant))
        if not dropped:
            if await run_in_threadpool(lambda: stands_in_library(host.engine.store, document_id)):
                raise ServingError(
                    409, "document_in_library", f"document {document_id!r} is in a library, and stays", "id"
                )
            raise ServingError(404, "document_not_found", f"document {document_id!r} is not stored", "id")
        return {"id": document_id, "object": "document", "deleted": True, "entries": dropped}


def has_page() -> bool:
    """Whether what the chat page needs is installed."""
    return find_spec("gradio") is not None


def _add_page(app: FastAPI, host: Host, documents: Mapping[str, str] | None) -> list[FastAPI]:
    """Add the chat page, or where the extra ``web`` is missing, what to install. Return what runs beside ``app``."""
    if not has_page():

        @app.get("/", response_class=PlainTextResponse)
        async def explain() -> str:
            """How to get the chat page; needs no key."""
            return 'The chat page needs gradio: pip install -e ".[web]"\n'

        return []
    from semsharekv_integrations.serving.page import make_page

    page, entrance = make_page(host, documents)
    app.router.default = entrance  # no mount, which would also take what a route refuses, such as other methods
    return [page]


def _add_facts(app: FastAPI, host: Host) -> None:
    """Add the routes that tell of the server itself."""
    registry, collector = CollectorRegistry(), EngineCollector(host.engine)
    registry.register(collector)
    host.on_full_engine = collector.add_calls

    @app.get("/health")
    async def check() -> dict[str, str]:
        """Whether the model is loaded; needs no key."""
        host.require_loaded()
        return {"status": "ok"}

    def describe() -> dict[str, Any]:
        return {"id": host.model, "object": "model", "created": 0, "owned_by": "semsharekv"}

    @app.get("/v1/models")
    async def models(_: Tenant) -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, _: Tenant) -> dict[str, Any]:
        """The model, if it has this name."""
        if name != host.model:
            raise ServingError(404, "model_not_found", f"model is {name!r}; accepted is {host.model!r}", "model")
        return describe()

    @app.get("/metrics")
    async def metrics(_: Tenant) -> Response:
        """Counts and distributions for Prometheus, of all tenants together."""
        told = await run_in_threadpool(partial(generate_latest, registry))
        return Response(told, media_type=CONTENT_TYPE_LATEST)
