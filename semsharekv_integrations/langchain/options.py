"""What a model's fields and a single call may set of the engine's options, and how one is laid over the other.

Knows nothing about prompts, messages or loading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self
from uuid import uuid4

from langchain_core.messages import BaseMessage
from pydantic import BaseModel, Field, model_validator

from semsharekv_integrations.checks import require
from semsharekv_integrations.langchain.calls import configured
from semsharekv_integrations.langchain.documents import in_artifacts, in_marked_blocks, with_found
from semsharekv_integrations.request import GenerateOptions, Request, checked_name_or_none

_OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "stop_sequences": "stop",
}
_ONE_MEANING: dict[str, tuple[Any, ...]] = {
    "stream": (True, False),  # BaseChatModel decides by it whether to stream, and hands it on
    "stream_usage": (True, False),  # usage is reported in any case
    "stream_options": ({"include_usage": True}, {"include_usage": False}),
    "n": (1,),
    "logprobs": (False,),
}


class SamplingFields(BaseModel):
    """Options that a model has as fields and that every call may set anew. Unknown names are refused."""

    temperature: float = 0.0
    """0 is greedy; above, logits are divided by it. Default 0."""

    top_p: float = 1.0
    """Share of probability mass kept, above 0 up to 1. Default 1."""

    top_k: int | None = None
    """Number of likeliest tokens kept, or None for the model's own default."""

    repetition_penalty: float | None = None
    """Above 1 discourages tokens seen before; None for the model's own default."""

    seed: int | None = None
    """Seed of each call's own random generator, or None for a fresh one."""

    max_tokens: int = 256
    """Most tokens to generate, at least 1; also taken as ``max_new_tokens``, ``max_completion_tokens`` or
    ``num_predict``. Default 256."""

    stop: list[str] | None = None
    """Strings that end the text and are not part of it, also taken as ``stop_sequences``; a call's own replace them."""

    namespace: str | None = None
    """Whose KV may be read, and where new KV goes: a tenant's name, or None for this model object and its copies alone.

    ``configurable["namespace"]`` of a call's config goes before it, and the call's own ``namespace`` before both.
    """

    private_namespace: str = Field(
        default_factory=lambda: f"private-{uuid4().hex}", frozen=True, exclude=True, repr=False
    )
    """What ``namespace`` None stands for. A field, since LangChain rebuilds models from their fields."""

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):  # an instance in another model's field
            return values
        values = under_own_names(values)
        unknown = sorted(values.keys() - cls.model_fields.keys())
        require(not unknown, "keyword arguments", unknown, ", ".join(cls.model_fields))
        return values

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        checked_name_or_none("namespace", self.namespace)
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "1 or more")
        Request.of("", self._sampling_options())
        return self

    def _sampling_options(self) -> GenerateOptions:
        return GenerateOptions(
            max_new_tokens=self.max_tokens,
            stop=self.stop,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            namespace=self.kv_namespace,
        )

    @property
    def kv_namespace(self) -> str:
        """The engine's namespace of calls that name none, to warm, forget or clear."""
        return self.private_namespace if self.namespace is None else self.namespace


class CallOptions(SamplingFields):
    """What one call sets."""

    documents: Any = None
    """Texts that stand in the prompt: texts or LangChain documents in a list, or texts by id."""

    session: str | None = None
    """Name of the conversation; by default the ``thread_id`` or ``session_id`` that LangChain runs the call under."""

    tracked_documents: dict[str, str] = {}
    """Ids by text of documents that may stand in the prompt; those that do not are left out."""

    @classmethod
    def of(cls, fields: SamplingFields, stop: Sequence[str] | None, call: Mapping[str, Any]) -> Self:
        """The model's fields, overridden by what the call sets to anything but None.

        Raises:
            ValueError: naming the option, its value and what is accepted.
        """
        given = under_own_names({"stop": stop, **configured(None, call)})
        given = _with_effect({name: value for name, value in given.items() if value is not None})
        shared = cls.model_fields.keys() & type(fields).model_fields.keys()
        return cls(**{**{name: getattr(fields, name) for name in shared}, **given})

    def for_engine(self, contents: Sequence[str], messages: Sequence[BaseMessage] = ()) -> GenerateOptions:
        """As keyword arguments of the engine's methods.

        Args:
            contents: the prompt's text, or that of its messages, in which documents are looked for.
            messages: what the prompt was made of, which may tell where documents are.
        """
        tracked = [(key, text) for text, key in self.tracked_documents.items()]
        found = [*in_artifacts(messages), *tracked]
        documents = with_found(self.documents, found, in_marked_blocks(messages), contents)
        known = GenerateOptions(documents=documents, session=self.session)
        return self._sampling_options() | known | self.engine_options()

    def engine_options(self) -> GenerateOptions:
        """What else the engine is told; nothing, but for those that know of more."""
        return GenerateOptions()


def under_own_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with what other models call otherwise under its one name here."""
    renamed = dict(values)
    for other, name in _OTHER_NAMES.items():
        given, known = renamed.pop(other, None), renamed.get(name)
        if given is not None:
            require(known in (None, given), other, given, f"{known}, as {name} says, or only one of them")
            renamed[name] = given
    return renamed


def _with_effect(given: Mapping[str, Any]) -> dict[str, Any]:
    """Without what other models are told that has one possible meaning here.

    Raises:
        ValueError: if it is told with another meaning.
    """
    for name, accepted in _ONE_MEANING.items():
        value = given.get(name, accepted[0])
        require(value in accepted, name, value, " or ".join(map(repr, accepted)))
    return {name: value for name, value in given.items() if name not in _ONE_MEANING}
