"""What ``SemShareKVLLM`` is made of: its settings, its engine, and how a call's options and documents are found."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from llama_index.core.base.llms.generic_utils import messages_to_prompt as generic_messages_to_prompt
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata, MessageRole
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.tools.types import BaseTool
from llama_index.core.types import PydanticProgramMode
from pydantic import ConfigDict, Field, PrivateAttr, create_model, field_validator, model_validator

from semsharekv_integrations import frameworks
from semsharekv_integrations.config import EngineConfig, ModeSetting
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import require
from semsharekv_integrations.llama_index.documents import (
    MessagesPrompt,
    NodeNotes,
    TextPrompt,
    find_context_parts,
    find_documents,
    name_documents,
)
from semsharekv_integrations.llama_index.messages import read_calls
from semsharekv_integrations.request import OPTION_NAMES, GenerateOptions, Request, check_optional_name

_FIELD_OPTIONS = (*frameworks.SAMPLING_FIELDS, "session", "chat_template_kwargs")
_CALL_OPTIONS = (*OPTION_NAMES, "max_tokens", "parallel_tool_calls")
_ELSEWHERE = ("extra_headers", "parallel_tool_calls")  # the one sent by DocumentContextExtractor, the other for answers
_Fields: Any = create_model("_Fields", __module__=__name__, **frameworks.make_sampling_fields(list[str] | str | None))


class EngineLLM(_Fields, FunctionCallingLLM):
    """An LLM's settings and its engine; the fields are explained at ``SemShareKVLLM``."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field(frozen=True)
    mode: ModeSetting | None = Field(default=None, frozen=True)
    config: EngineConfig | None = Field(default=None, frozen=True)
    device: str | None = Field(default=None, frozen=True)
    dtype: str = Field(default="auto", frozen=True)
    model_kwargs: dict[str, Any] = Field(default_factory=dict, frozen=True, exclude=True, repr=False)
    namespace: str | None = None
    session: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    is_chat_model: bool | None = None
    is_function_calling_model: bool | None = None
    pydantic_program_mode: PydanticProgramMode = PydanticProgramMode.LLM

    _engine: SemShareEngine = PrivateAttr()
    _object_name: str = PrivateAttr(default_factory=frameworks.make_private_name)
    _nodes: NodeNotes = PrivateAttr(default_factory=NodeNotes)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        """Rename ``max_new_tokens``; ``ValueError`` for unknown names. An instance passes unchanged."""
        if not isinstance(values, Mapping):  # an object in another model's field
            return values
        values = _rename_limit(values)
        unknown = sorted(values.keys() - cls.model_fields.keys())
        require(not unknown, "keyword arguments", unknown, f"engine, {', '.join(cls.model_fields)}")
        return values

    @field_validator("config", mode="before")
    @classmethod
    def _check_config(cls, config: Any) -> Any:
        """Refuse other types with ``ValueError``; drop the None values of serialized settings."""
        accepted = config is None or isinstance(config, EngineConfig | Mapping)  # a mapping where it was serialized
        require(accepted, "config", config, "an EngineConfig or None")
        return _drop_none(config)

    @field_validator("mode", mode="before")
    @classmethod
    def _check_mode(cls, mode: Any) -> Any:
        frameworks.check_mode(mode)
        return mode

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _take_name(cls, value: Any) -> Any:
        """Replace a torch device or dtype by its name, so that fields stay serializable; keep None."""
        return value if value is None else str(value).removeprefix("torch.")

    def _check_fields(self) -> None:
        check_optional_name("namespace", self.namespace)
        Request.of("", self._make_options({}, ""))

    def __getstate__(self) -> dict[str, Any]:
        pickle.dumps(self._engine)  # which says so if it cannot be; LlamaIndex would leave it out
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._engine = state["__pydantic_private__"]["_engine"]

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serializes."""
        return "SemShareKVLLM"

    @property
    def engine(self) -> SemShareEngine:
        """The engine underneath, to warm, forget, save or share."""
        return self._engine

    @property
    def kv_namespace(self) -> str:
        """The engine's name for where calls read and leave KV: ``namespace``, or a random one of this object's own."""
        return self.object_name if self.namespace is None else self.namespace

    @property
    def object_name(self) -> str:
        """A random name that this object and its copies alone have; not serialized."""
        return self._object_name

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, with the same engine; ``ValueError`` for an ``update`` that needs another."""
        frameworks.require_same_engine(self, update)
        return super().model_copy(update=update, deep=deep)

    def scoped(self, *, namespace: str | None = None, session: str | None = None) -> Self:
        """Return a copy of this LLM for one tenant or one conversation, with the same engine.

        Chat engines say nothing of their conversation to the LLM, so this is how it gets a name::

            memory = ChatMemoryBuffer.from_defaults(chat_store=store, chat_store_key="alice", llm=llm)
            chat = index.as_chat_engine(llm=llm.scoped(session=memory.chat_store_key), memory=memory)

        Args:
            namespace: whose KV it reads and leaves, or None for that of this object, its private one included.
            session: the conversation's name, or None for that of this object.
        """
        given = {"namespace": namespace, "session": session}
        copy = self.model_copy(update={name: value for name, value in given.items() if value is not None})
        copy._check_fields()
        return copy

    def note(self, nodes: Iterable[BaseNode | NodeWithScore], namespace: str | None = None) -> None:
        """Remember these nodes, whose texts may stand in the next prompts, so that their borders are known there.

        What stands there word for word is then a document with the node's id, in reports and for ``engine.forget``,
        which knows it by the id of the LlamaIndex document that it was cut from as well. ``namespace`` says whose
        prompts; None is this object's.
        """
        self._nodes.add(check_optional_name("namespace", namespace) or self.kv_namespace, nodes)

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex sizes its prompts by; reads configuration and tokenizer, but does not load weights.

        A model that names no context window counts as LlamaIndex's default of 3,900 tokens.
        """
        chats, calls = self.is_chat_model, self.is_function_calling_model
        if chats is None:
            chats = bool(self._engine.tokenizer.chat_template)
        return LLMMetadata(
            context_window=self._engine.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_tokens,
            is_chat_model=chats,
            is_function_calling_model=chats and self.uses_template if calls is None else calls,
            model_name=self.model,
        )

    @property
    def uses_template(self) -> bool:
        """True if messages go through the model's chat template, False if through ``messages_to_prompt``."""
        return self.messages_to_prompt in (None, generic_messages_to_prompt)  # LlamaIndex fills in the generic one

    def to_payload(self) -> dict[str, Any]:
        """Return what observers of each call are told; reads no files, unlike ``metadata``, so no event loop waits."""
        sampling = {name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens", "namespace")}
        mode = self._engine.config.reuse.mode
        return {"class_name": self.class_name(), "model_name": self.model, "mode": mode, **sampling}

    def tokenize(self, text: str) -> list[int]:
        """Return the model's token ids of ``text`` without special tokens; made for ``Settings.tokenizer``."""
        return frameworks.tokenize(self._engine, text)

    def _get_prompt(self, prompt: BasePromptTemplate, **prompt_args: Any) -> str:
        text = TextPrompt(super()._get_prompt(prompt, **prompt_args))
        text.parts = find_context_parts(prompt, prompt_args)
        return text

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        messages = MessagesPrompt(super()._get_messages(prompt, **prompt_args))
        messages.parts = find_context_parts(prompt, prompt_args)
        return messages

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments for ``chat``; ``ValueError`` if a call is forced, but there are no tools.

        ``tool_choice`` counts more than ``tool_required``. ``verbose`` has no effect.
        """
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        messages = [*(chat_history or ()), *([user_msg] if user_msg else ())]
        choice = kwargs.pop("tool_choice", None) or ("any" if tool_required else None)
        require(bool(tools) or choice in (None, "auto", "none"), "tools", list(tools), "at least one to choose from")
        given = {"tools": list(tools), "tool_choice": choice, "parallel_tool_calls": allow_parallel_tool_calls}
        return {"messages": messages, **(given if tools else {}), **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return an answer's tool calls; for none, ``ValueError``, or [] without ``error_on_no_tool_call``."""
        calls = read_calls(response.message)
        require(bool(calls) or not error_on_no_tool_call, "answer", response.message.content, "one with a tool call")
        return [ToolSelection(tool_id=call.id, tool_name=call.name, tool_kwargs=call.arguments) for call in calls]

    def _make_options(self, call: Mapping[str, Any], prompt: str | Sequence[ChatMessage]) -> GenerateOptions:
        """Return the engine's options: fields, overridden by the call, and documents. ``ValueError`` if bad."""
        own = {name: getattr(self, name) for name in _FIELD_OPTIONS} | {"namespace": self.kv_namespace}
        options = own | _read_options(call)
        if "documents" in options:
            options["documents"] = name_documents(options["documents"], prompt)
        else:
            options["documents"] = find_documents(prompt, self._nodes.list_latest(options["namespace"]))
        return frameworks.name_for_engine(options)


def _drop_none(config: Any) -> Any:
    """Return serialized settings without those that are None, their default; return anything else unchanged."""
    if not isinstance(config, Mapping):
        return config
    return {name: _drop_none(value) for name, value in config.items() if value is not None}


def _read_options(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a call sets to non-None, in our names, tools in OpenAI's form; ``ValueError`` for unknown names."""
    unknown = sorted(call.keys() - {*_CALL_OPTIONS, *_ELSEWHERE})
    require(not unknown, "keyword arguments", unknown, ", ".join(_CALL_OPTIONS))
    given = {name: value for name, value in call.items() if value is not None and name not in _ELSEWHERE}
    given = _rename_limit(given)
    if isinstance(given.get("tools"), Sequence):  # else the engine refuses it
        given["tools"] = [
            tool.metadata.to_openai_tool(skip_length_check=True) if isinstance(tool, BaseTool) else tool
            for tool in given["tools"]
        ]
    if "tool_choice" in given:
        given["tool_choice"] = _translate_choice(given["tool_choice"])
    return given


def _rename_limit(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with ``max_new_tokens`` renamed to ``max_tokens``; ``ValueError`` if both are given."""
    limit, known = given.get("max_new_tokens"), given.get("max_tokens")
    require(limit is None or known is None, "max_tokens", known, "nothing beside max_new_tokens")
    renamed = {name: value for name, value in given.items() if name != "max_new_tokens"}
    return renamed if limit is None else renamed | {"max_tokens": limit}


def _translate_choice(choice: Any) -> Any:
    """Return the name in OpenAI's mapping, ``any`` for ``required``, else ``choice``, for the engine to check."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        return name or choice  # which the engine refuses
    return "any" if choice == "required" else choice
