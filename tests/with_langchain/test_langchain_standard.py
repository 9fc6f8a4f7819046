"""LangChain's own suites for chat models, nothing left out but what the model does not take: images, audio and PDF.

The model knows the suite's questions on tools and formats by heart: contracts are tested, not understanding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rote_model import rote_tokenizer, trained_model
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


@pytest.fixture(scope="session")
def rote(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    knowing_tools = rote_tokenizer(tokenizer)
    return trained_model(knowing_tools), knowing_tools


class TestIntegration(ChatModelIntegrationTests):
    """In the default mode."""

    @pytest.fixture(autouse=True)
    def _engine(self, rote: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
        self.engine = SemShareEngine(*rote)

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatSemShareKV

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"engine": self.engine, "max_tokens": 120}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatSemShareKV(engine=self.engine, max_tokens=5)
        prompt = "What happened in Prorna ? " * 4
        chat.invoke(prompt)
        if not stream:
            return chat.invoke(prompt)
        first, *rest = chat.stream(prompt)
        return first.__add__(rest)  # type: ignore[return-value]
