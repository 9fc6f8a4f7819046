"""What a caller asked for, checked before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from semsharekv_integrations.config import EngineConfig
from semsharekv_integrations.errors import (
    IN_UTF8,
    MOST_NESTED,
    PromptError,
    check_lifetime,
    check_stop,
    count_nesting,
    is_json,
    is_name,
    is_path,
    is_utf8,
    make_plain,
    require,
    show_value,
)
from semsharekv_integrations.kv import UNPLACED, PrefixMatch, Rendered, Span, select_within
from semsharekv_integrations.sampling import SamplingConfig
from semsharekv_integrations.text.chat_template import RENDERING_OPTIONS
from semsharekv_integrations.text.prompt import Prompt, require_room
from semsharekv_integrations.text.tool_format import Tool

_CHOICES = ("auto", "none", "any")
DOCUMENTS = "texts in a list, or texts by id in a dict"
_NAME = f"a non-empty string{IN_UTF8}"
Documents = Sequence[str] | Mapping[str, str]


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every generating method.

    The first eight are explained at ``SamplingConfig``; ``stop`` may also be one string or None. ``namespace`` says
    whose KV may be read and where new KV goes. ``documents`` are texts, or texts by id, that stand in the prompt: the
    report then says how much of each was reused, and ``forget`` knows them. ``session`` names the conversation.

    ``tools`` are functions in OpenAI's form, ``{"type": "function", "function": {"name", "description",
    "parameters"}}`` with a JSON schema for the parameters; the prompt must be messages. ``tool_choice`` is ``auto``
    (the default: the model decides), ``none``, ``any`` (it must call one of them), or the name of the one it must
    call. ``json_schema`` makes the answer JSON of that schema; not where tools may be called. Neither adds properties
    that a schema does not name, unless it mentions ``additionalProperties``. An answer that reaches
    ``max_new_tokens`` first is cut, and its ``finish_reason`` says so.

    ``chat_template_kwargs`` are more variables for the chat template, such as ``enable_thinking``. A text prompt goes
    through no template, so they mean nothing there.
    """

    max_new_tokens: int
    stop: Sequence[str] | str | None
    temperature: float
    top_p: float
    top_k: int | None
    repetition_penalty: float | None
    seed: int | None
    prompt_lookup: bool | int
    namespace: str
    documents: Documents | None
    session: str | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | None
    json_schema: Mapping[str, Any] | None
    chat_template_kwargs: Mapping[str, Any] | None


_OF_SAMPLING = (option.name for option in fields(SamplingConfig))  # ``GenerateOptions`` names them for type checkers
OPTION_NAMES = tuple(dict.fromkeys((*_OF_SAMPLING, *GenerateOptions.__annotations__)))


class DocumentNotes(dict[str, str]):
    """Texts by id as a framework found them: those that do not stand in the prompt are left out.

    Args:
        texts: by id.
        required: the ids that the caller gave, whose texts must stand in the prompt.
        groups: further names, each with the ids of the texts that it is a name of.
    """

    def __init__(
        self,
        texts: Mapping[str, str],
        required: Collection[str] = (),
        groups: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(texts)
        self.required = frozenset(required)
        self.groups = dict(groups or {})


@dataclass(frozen=True)
class Request:
    """One checked call.

    Attributes:
        required: the ids of ``documents`` that must stand in the prompt.
        groups: further names of documents: see ``DocumentNotes``.
    """

    prompt: Prompt
    sampling: SamplingConfig
    namespace: str
    documents: dict[str, str]
    session: str | None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    json_schema: Mapping[str, Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, options: GenerateOptions) -> Request:
        """Check the options, not the prompt, and make the request. Raises ``ValueError`` that names the option."""
        unknown = sorted(options.keys() - set(OPTION_NAMES))
        require(not unknown, "options", unknown, ", ".join(OPTION_NAMES))
        rest = dict(options)
        namespace = check_namespace(rest.pop("namespace", "default"))
        session = check_optional_name("session", rest.pop("session", None))
        given = rest.pop("documents", None)
        documents = {} if given is None else read_documents(given, f"None, {DOCUMENTS}")
        noted = given if isinstance(given, DocumentNotes) else DocumentNotes({}, documents)
        tools = _check_tools(rest.pop("tools", None))
        choice = _check_choice(rest.pop("tool_choice", None), tools)
        schema = _check_schema(rest.pop("json_schema", None), tools, choice)
        variables = _check_variables(rest.pop("chat_template_kwargs", None))
        sampling = SamplingConfig(stop=_stop_strings(rest.pop("stop", None)), **rest)  # type: ignore[arg-type]
        asked = (prompt, sampling, namespace, documents, session, tools, choice, schema, variables)
        return cls(*asked, noted.required, noted.groups)

    @property
    def may_call(self) -> bool:
        """Whether the answer may hold tool calls: tools were given, and ``tool_choice`` is not ``none``."""
        return bool(self.tools) and self.tool_choice != "none"

    def rename_documents(self, ids: Mapping[str, str]) -> Request:
        """Return a copy in which the documents have new ids: ``ids`` maps old to new; those not in it keep theirs."""
        documents = {ids.get(key, key): text for key, text in self.documents.items()}
        groups = {name: [ids.get(key, key) for key in keys] for name, keys in self.groups.items()}
        required = frozenset(ids.get(key, key) for key in self.required)
        return replace(self, documents=documents, required=required, groups=groups)

    def require_documents(self, rendered: Rendered) -> None:
        """Raise ``ValueError`` for the first document in ``required`` that does not stand in the prompt."""
        there = {segment.document_id for segment in rendered.segments} | rendered.unplaced.keys()
        for key in sorted(self.required - there):
            field, accepted = f"documents[{show_value(key)}]", "text that stands in the prompt word for word"
            require(False, field, self.documents[key], accepted)

    def fit_window(self, prompt_tokens: int, context_window: int | None) -> Request:
        """Return a copy with ``max_new_tokens`` cut to the room behind the prompt; the request itself without a window.

        Raises:
            ContextWindowError: if there is no room.
            ValueError: if ``max_new_tokens`` was set to more than the whole window.
        """
        if context_window is None:
            return self
        require_room(prompt_tokens, context_window)
        limit = self.sampling.max_new_tokens
        accepted = f"1 to {context_window}, the model's context window; what of it the prompt leaves is used"
        require(limit <= context_window or limit == SamplingConfig.max_new_tokens, "max_new_tokens", limit, accepted)
        room = context_window - prompt_tokens
        return replace(self, sampling=replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, room)))

    def find_document_spans(self, rendered: Rendered, prefix: PrefixMatch | None) -> dict[str, Span]:
        """Return every document that an entry of this prompt is forgotten with, and where it stands, by id.

        Those that stand whole in the reused prefix are here too. A further name has the place of the first document
        that it is a name of.
        """
        inherited = select_within(prefix.reference.spans, prefix.num_tokens) if prefix else {}
        unplaced = {key: Span(UNPLACED, before + 1) for key, before in rendered.unplaced.items()}
        own = unplaced | {segment.document_id: Span(segment.start, segment.stop) for segment in rendered.segments}
        named = {
            name: min((own[key] for key in keys if key in own), key=lambda span: span.stop)
            for name, keys in self.groups.items()
            if any(key in own for key in keys)
        }
        return inherited | named | own


def _stop_strings(stop: object) -> tuple[str, ...]:
    """Return None, one string or a sequence of them as a tuple. Raises ``ValueError`` for anything else."""
    if stop is None:
        return ()
    several = isinstance(stop, Sequence) and not isinstance(stop, (bytes, bytearray))
    require(several, "stop", stop, "None, a string or a sequence of strings")
    return check_stop((stop,) if isinstance(stop, str) else tuple(stop), "None, or ")  # type: ignore[arg-type]


def _check_tools(tools: object) -> tuple[Tool, ...]:
    """Return copies with descriptions and parameters filled in, () for None. Raises ``ValueError`` for bad tools."""
    if tools is None:
        return ()
    a_list = isinstance(tools, Sequence) and not isinstance(tools, (str, bytes))
    require(a_list and bool(tools), "tools", tools, "None or a list of at least one tool")
    found = tuple(_check_tool(f"tools[{index}]", tool) for index, tool in enumerate(cast(Sequence[Any], tools)))
    names = [tool["function"]["name"] for tool in found]
    require(len(set(names)) == len(names), "tools", names, "tools of different names")
    return found


def _check_tool(field: str, tool: object) -> Tool:
    """Return a copy with description and parameters filled in. Raises ``ValueError`` if it is not in OpenAI's form."""
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
    require(isinstance(function, Mapping), field, tool, form)
    function = dict(cast(Mapping[str, Any], function))
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    named = isinstance(name, str) and bool(name) and name not in _CHOICES
    require(named, f"{field}.function.name", name, f"a non-empty string other than {', '.join(_CHOICES)}")
    described = description is None or isinstance(description, str)
    require(described, f"{field}.function.description", description, "None or a string")
    kinds = parameters.get("type", "object") if isinstance(parameters, Mapping) else "object" if not parameters else ""
    of_object = kinds == "object" or (isinstance(kinds, list) and "object" in kinds)
    require(of_object, f"{field}.function.parameters", parameters, "None or the JSON schema of an object")
    _check_nesting(f"{field}.function.parameters", parameters)
    require(is_json(function), f"{field}.function", function, f"what JSON can hold{IN_UTF8}")
    schema: dict[str, Any] = {"properties": {}, **(parameters or {}), "type": "object"}
    return {"type": "function", "function": function | {"description": description or "", "parameters": schema}}


def _check_choice(choice: object, tools: Sequence[Tool]) -> str:
    """Return ``choice``, ``auto`` for None. Raises ``ValueError`` if it is no choice, or calls a tool not given."""
    names = [tool["function"]["name"] for tool in tools]
    accepted = (*_CHOICES, *names) if tools else ("auto", "none")
    require(choice is None or choice in accepted, "tool_choice", choice, ", ".join(("None", *accepted)))
    return "auto" if choice is None else str(choice)


def _check_schema(schema: object, tools: Sequence[Tool], choice: str) -> Mapping[str, Any] | None:
    """Return ``schema`` as given. Raises ``ValueError`` if it is no mapping, too deep, or beside callable tools."""
    if schema is None:
        return None
    require(isinstance(schema, Mapping), "json_schema", schema, "None or a JSON schema as a mapping")
    _check_nesting("json_schema", schema)
    require(is_json(schema), "json_schema", schema, f"None or a JSON schema, in what JSON can hold{IN_UTF8}")
    require(not tools or choice == "none", "json_schema", schema, "None with tools, unless tool_choice is 'none'")
    return schema  # type: ignore[return-value]


def _check_nesting(field: str, value: object) -> None:
    accepted = f"None or up to {MOST_NESTED} mappings and lists in each other"
    require(count_nesting(value) <= MOST_NESTED, field, value, accepted)


def _check_variables(variables: object) -> dict[str, Any]:
    """Return variables for the chat template as a dict, {} for None. Raises ``ValueError`` for names rendering sets."""
    if variables is None:
        return {}
    named = isinstance(variables, Mapping) and all(isinstance(name, str) and name.isidentifier() for name in variables)
    require(named, "chat_template_kwargs", variables, "None or values by name, such as {'enable_thinking': False}")
    _check_nesting("chat_template_kwargs", variables)
    found = dict(cast(Mapping[str, Any], variables))
    taken = sorted(found.keys() & RENDERING_OPTIONS)
    require(not taken, "chat_template_kwargs", taken, "names other than those that rendering sets itself")
    return found


def check_prompt(prompt: object) -> Prompt:
    """Return the prompt as given, if it is text or a sequence. Does not check that its items are messages.

    Raises:
        PromptError: if it is neither, empty, or holds text with lone surrogates.
    """
    if not isinstance(prompt, (str, Sequence)) or isinstance(prompt, (bytes, bytearray)) or len(prompt) == 0:
        raise PromptError(
            f"prompt is {show_value(prompt)}; accepted is text that is not empty, or a sequence of messages"
        )
    level: list[Any] = [prompt]
    for _ in range(MOST_NESTED):
        if not all(is_utf8(text) for text in level if isinstance(text, str)):
            raise PromptError(f"prompt is {show_value(prompt)}; accepted is text{IN_UTF8}")
        mappings = [part for part in level if isinstance(part, Mapping)]
        lists = [part for part in level if isinstance(part, Sequence) and not isinstance(part, (str, bytes))]
        level = [part for mapping in mappings for part in mapping.values()] + [part for each in lists for part in each]
    return cast(Prompt, prompt)


def check_namespace(namespace: object) -> str:
    """Return the namespace as ``check_name`` does."""
    return check_name("namespace", namespace)


def check_name(field: str, name: object) -> str:
    """Return ``name`` as a plain string. Raises ``ValueError`` unless it is a non-empty string fit for UTF-8."""
    require(is_name(name), field, name, _NAME)
    return make_plain(cast(str, name))


def check_optional_name(field: str, name: object) -> str | None:
    """Return None for None, else what ``check_name`` does."""
    require(name is None or is_name(name), field, name, f"None or {_NAME}")
    return None if name is None else make_plain(cast(str, name))


def read_documents(documents: object, accepted: str = DOCUMENTS) -> dict[str, str]:
    """Return texts by id, a digest if given none. Raises ``ValueError`` for a bad id or type, or a blank text."""
    if isinstance(documents, Mapping):
        for key in documents:
            require(is_name(key), "documents", key, f"ids that are non-empty strings{IN_UTF8}")
        return {make_plain(key): check_text(f"documents[{show_value(key)}]", text) for key, text in documents.items()}
    a_list = isinstance(documents, Sequence) and not isinstance(documents, (str, bytes, bytearray))
    require(a_list, "documents", documents, accepted)
    return {make_document_id(text): text for text in cast(Sequence[Any], documents)}


def check_text(field: str, text: object) -> str:
    """Return the text as a plain string. Raises ``ValueError`` unless it is text fit for UTF-8 that is not blank."""
    accepted = isinstance(text, str) and bool(text.strip()) and is_utf8(text)
    require(accepted, field, text, f"a text that is not blank{IN_UTF8}")
    return make_plain(cast(str, text))


def make_document_id(text: object) -> str:
    """Return 12 hexadecimal digits of the stripped text's digest. Raises ``ValueError`` if it is no text or blank."""
    require(isinstance(text, str), "documents", text, DOCUMENTS)
    check_text("documents", text)
    return hashlib.blake2b(str(text).strip().encode(), digest_size=6).hexdigest()


def check_config(config: object) -> EngineConfig:
    """Return the settings, the default ones for None. Raises ``ValueError`` for anything but an ``EngineConfig``."""
    require(config is None or isinstance(config, EngineConfig), "config", config, "an EngineConfig or None")
    return cast(EngineConfig, config) if config is not None else EngineConfig()


def check_path(path: object) -> Path:
    """Return the path. Raises ``ValueError`` unless ``is_path``; does not look for the file."""
    require(is_path(path), "path", path, "the path of a file")
    return Path(cast(Any, path))


def check_prompts(prompts: object) -> Iterable[Prompt]:
    """Return the prompts, unchecked. Raises ``ValueError`` unless they are iterable, and no text or mapping."""
    several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, Mapping))
    require(several, "prompts", prompts, "a list of prompts, each text or a sequence of messages")
    return cast(Iterable[Prompt], prompts)


def check_scope(namespace: object, session: object) -> tuple[str | None, str | None]:
    """Return both names, each maybe None. Raises ``ValueError`` for a bad name, or a session without namespace."""
    require(session is None or namespace is not None, "namespace", namespace, "a string where a session is given")
    return check_optional_name("namespace", namespace), check_optional_name("session", session)


def check_warming(documents: object, pinned: object, ttl_s: object, progress: object) -> None:
    """Raise ``ValueError`` if ``documents`` is None or another argument is bad. Does not check the documents."""
    require(documents is not None, "documents", documents, DOCUMENTS)
    check_lifetime("ttl_s", ttl_s)
    for name, value in (("pinned", pinned), ("progress", progress)):
        require(isinstance(value, bool), name, value, "True or False")
