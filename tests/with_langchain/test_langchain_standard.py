"""LangChain's own suites for chat models. The tiny model is random, so only contracts are tested, not meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.langchain import ChatSemShareKV


class TestUnit(ChatModelUnitTests):
    """By name: whatever constructs a model here must not load it."""

    @pytest.fixture(autouse=True)
    def _saved_model(self, tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        llama.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        self.path = str(tmp_path)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatSemShareKV

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.path}


class TestIntegration(ChatModelIntegrationTests):
    """Without tools, structured output and images, which the model does not take."""

    @pytest.fixture(autouse=True)
    def _engine(self, make_engine: Callable[..., SemShareEngine]) -> None:
        self.engine = make_engine()

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatSemShareKV

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "max_tokens": 20}

    @property
    def supports_model_override(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatSemShareKV(engine=self.engine, max_tokens=5)
        chat.invoke("What happened in Prorna ?")
        if not stream:
            return chat.invoke("What happened in Prorna ?")
        first, *rest = chat.stream("What happened in Prorna ?")
        return first.__add__(rest)  # type: ignore[return-value]
