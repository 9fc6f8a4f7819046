"""Middleware for ``langchain.agents.create_agent``: what an agent's state knows of documents reaches its model.

Needs the ``langchain`` package (``pip install -e ".[agents]"``). Knows nothing about prompts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse

from semsharekv_integrations.langchain.base import LocalModel, apply_config
from semsharekv_integrations.langchain.documents import find_documents, find_in_artifacts, name_document


class SemShareKVMiddleware(AgentMiddleware):
    """Hands the documents in an agent's state, and its thread, to a model of this package; others are left alone.

    What a message that is sent carries as an artifact, the model sees by itself. This also finds documents under
    other keys of the state, and in messages that other middleware has trimmed, summarized or edited.

    Example::

        agent = create_agent(ChatSemShareKV(model="..."), [search], middleware=[SemShareKVMiddleware()])
    """

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ModelResponse[Any]:
        """Call ``handler`` with the request that ``inform_model`` returns; return its response."""
        return handler(inform_model(request))

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ModelResponse[Any]:
        """As ``wrap_model_call``, without blocking the event loop."""
        return await handler(inform_model(request))


def inform_model(request: ModelRequest[Any]) -> ModelRequest[Any]:
    """Return the request with documents, session and namespace in its settings; unchanged for other models."""
    if not isinstance(getattr(request.model, "bound", request.model), LocalModel):
        return request
    state: dict[str, Any] = dict(request.state)
    messages: Iterable[Any] = state.pop("messages", ())
    found = [*find_in_artifacts(messages), *map(name_document, find_documents(state))]
    settings = apply_config(None, request.model_settings)
    known = {text: key for key, text in found} | dict(settings.get("tracked_documents") or {})
    return request.override(model_settings={**settings, "tracked_documents": known})
