"""Middleware for ``langchain.agents.create_agent``: what an agent's state knows of documents reaches its model.

Needs the ``langchain`` package (``pip install -e ".[agents]"``). Knows nothing about prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.messages import BaseMessage, SystemMessage

from semsharekv_integrations.errors import require
from semsharekv_integrations.langchain.arranging import arrange_messages, read_template_variables
from semsharekv_integrations.langchain.base import LocalModel, apply_config
from semsharekv_integrations.langchain.documents import find_documents, find_in_artifacts, name_document


class SemShareKVMiddleware(AgentMiddleware):
    """Hands the documents in an agent's state, and its thread, to a model of this package; others are left alone.

    What a message that is sent carries as an artifact, the model sees by itself. This also finds documents under
    other keys of the state, and in messages that other middleware has trimmed, summarized or edited.

    Args:
        arrange: whether to put documents that stand in a row in one message, the system message too, into the order
            that continues the longest stored prefix. This changes what is sent to the model, not the state. A title
            moves with its document if an empty line parts it from the one before. Put this middleware last.

    Example::

        agent = create_agent(ChatSemShareKV(model="..."), [search], middleware=[SemShareKVMiddleware()])
    """

    def __init__(self, arrange: bool = False) -> None:
        super().__init__()
        require(isinstance(arrange, bool), "arrange", arrange, "True or False")
        self.arrange = arrange

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call ``handler`` with what ``inform_model`` returns, arranged if so asked; return its response."""
        return handler(self._prepare(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """As ``wrap_model_call``, without blocking the event loop."""
        if not self.arrange:
            return await handler(inform_model(request))
        return await handler(await asyncio.to_thread(self._prepare, request))

    def _prepare(self, request: ModelRequest[Any]) -> ModelRequest[Any]:
        informed = inform_model(request)
        return arrange_request(informed) if self.arrange else informed


def inform_model(request: ModelRequest[Any]) -> ModelRequest[Any]:
    """Return the request with documents, session and namespace in its settings; unchanged for other models."""
    if not isinstance(_find_model(request), LocalModel):
        return request
    state: dict[str, Any] = dict(request.state)
    messages: Iterable[Any] = state.pop("messages", ())
    found = [*find_in_artifacts(messages), *map(name_document, find_documents(state))]
    settings = apply_config(None, request.model_settings)
    known = {text: key for key, text in found} | dict(settings.get("tracked_documents") or {})
    return request.override(model_settings={**settings, "tracked_documents": known})


def arrange_request(request: ModelRequest[Any]) -> ModelRequest[Any]:
    """Return a request from ``inform_model`` with its documents arranged in its messages; unchanged for other models.

    Its documents are those that ``inform_model`` found.
    """
    model = _find_model(request)
    if not isinstance(model, LocalModel):
        return request
    settings = request.model_settings
    messages: list[BaseMessage] = [*([request.system_message] if request.system_message else []), *request.messages]
    options = read_template_variables(settings, model) | {
        "namespace": settings.get("namespace") or model.kv_namespace,
        "tools": request.tools,
    }
    arranged: list[Any] = arrange_messages(messages, settings["tracked_documents"], model.engine, **options)
    if request.system_message is None:
        return request.override(messages=arranged)
    first: SystemMessage = arranged[0]
    return request.override(system_message=first, messages=arranged[1:])


def _find_model(request: ModelRequest[Any]) -> object:
    return getattr(request.model, "bound", request.model)
