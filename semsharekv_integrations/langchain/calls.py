"""What LangChain knows of a call beside its prompt, handed on to the model: tenant, conversation and documents.

A ``RunnableConfig`` reaches ``invoke`` and ``stream``, but not what a model implements below them; here it becomes
keyword arguments on the way. Knows nothing about messages or the engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import RunnableConfig, ensure_config

from semsharekv_integrations.langchain.tracking import tracked_documents

_SESSION_NAMES = ("thread_id", "session_id")  # LangGraph's, and RunnableWithMessageHistory's


def configured(config: RunnableConfig | None, call: Mapping[str, Any]) -> dict[str, Any]:
    """``call`` with the ``session`` and ``namespace`` that ``config`` names, unless it sets them itself.

    The session is ``configurable``'s ``thread_id``, else its ``session_id``; the namespace its ``namespace``. Without
    a config it is that of the chain around the call, if any.
    """
    known = ensure_config(config).get("configurable", {})
    session = next((known[name] for name in _SESSION_NAMES if known.get(name) is not None), None)
    found = {"session": None if session is None else str(session), "namespace": known.get("namespace")}
    wanted = {name: value for name, value in found.items() if value is not None and call.get(name) is None}
    return {**call, **wanted}


class ConfiguredCalls(BaseLanguageModel):
    """Entry points that carry a call's configuration on; to be mixed in before LangChain's own class."""

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As in the base class; ``configurable`` may name ``thread_id`` and ``namespace``."""
        return super().invoke(input, config, **configured(config, kwargs))  # type: ignore[safe-super]

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ``invoke``, without blocking the event loop."""
        return await super().ainvoke(input, config, **configured(config, kwargs))

    def stream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[Any]:
        """As ``invoke``, in pieces."""
        return super().stream(input, config, **self._tracked(ensure_config(config), configured(config, kwargs)))

    def astream(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> AsyncIterator[Any]:
        """As ``stream``, without blocking the event loop."""
        return super().astream(input, config, **self._tracked(ensure_config(config), configured(config, kwargs)))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As in the base class; ``configurable`` may name ``thread_id`` and ``namespace``."""
        known = self._tracked(ensure_config(config), configured(config, kwargs))
        return super().stream_events(input, config, **known)

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        """As ``stream_events``, without blocking the event loop."""
        known = self._tracked(ensure_config(config), configured(config, kwargs))
        return super().astream_events(input, config, **known)

    def _tracked(self, config: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
        """``call`` with what a ``DocumentTracker`` knows of the run, if there is one."""
        callbacks: Callbacks = config.get("callbacks")
        texts = tracked_documents(callbacks, self.callbacks)
        return {**call, "tracked_documents": texts} if texts else dict(call)
