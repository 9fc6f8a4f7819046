"""What the classes for LangChain and for LlamaIndex do alike; knows neither of them.

Their sampling fields come from ``SamplingConfig``, their engines from the same few fields, and what they read and raise
goes through the same functions. Both frameworks build on pydantic, and so may this.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import Any, TypeVar, Unpack, get_type_hints
from uuid import uuid4

from pydantic import Field

from semsharekv_integrations.config import MODE_SETTINGS, EngineConfig, ModeSetting
from semsharekv_integrations.engine import SemShareEngine
from semsharekv_integrations.errors import IN_UTF8, is_utf8, is_whole, require
from semsharekv_integrations.model.loading import merge_arguments
from semsharekv_integrations.report import ReuseReport
from semsharekv_integrations.request import GenerateOptions, Request, check_prompt, make_document_id
from semsharekv_integrations.sampling import SamplingConfig
from semsharekv_integrations.text.prompt import PromptRenderer

T = TypeVar("T")
ENGINE_FIELDS = ("model", "mode", "config", "device", "dtype", "model_kwargs")


def make_sampling_fields(stop: Any) -> dict[str, Any]:
    """Return the fields of ``SamplingConfig`` for pydantic's ``create_model``: types, defaults and descriptions.

    Both frameworks say ``max_tokens`` for ``max_new_tokens``, and None for no ``stop``, whose type is the argument.
    These two fields come last.
    """
    types, docs = get_type_hints(SamplingConfig), describe_fields(SamplingConfig)
    made: dict[str, Any] = {}
    for field in fields(SamplingConfig):
        made[field.name] = types[field.name], Field(default=field.default, description=docs.get(field.name))
    limit, _ = made.pop("max_new_tokens"), made.pop("stop")
    return {**made, "max_tokens": limit, "stop": (stop, Field(default=None, description=docs.get("stop")))}


def describe_fields(config: type) -> dict[str, str]:
    """Return what the docstring of ``config`` says of each attribute, by name, each as one line."""
    section = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


SAMPLING_FIELDS = tuple(make_sampling_fields(Any))  # their names


def name_for_engine(options: Mapping[str, Any]) -> GenerateOptions:
    """Rename ``max_tokens`` to ``max_new_tokens``. Raises ``ValueError`` unless it is 1 or more; checks no more."""
    limit = options["max_tokens"]
    require(is_whole(limit, 1), "max_tokens", limit, "an integer of 1 or more")
    rest = {name: value for name, value in options.items() if name != "max_tokens"}
    return GenerateOptions(**rest, max_new_tokens=limit)  # type: ignore[typeddict-item]


def make_private_name() -> str:
    """Return a new random namespace that nobody guesses, for a model object that was given none."""
    return f"private-{uuid4().hex}"


def check_mode(mode: object) -> None:
    """Raise ``ValueError`` unless ``mode`` is None, ``auto`` or the name of a mode."""
    require(mode in (None, *MODE_SETTINGS), "mode", mode, " or ".join(map(repr, (None, *MODE_SETTINGS))))


def make_engine(
    model: str, mode: ModeSetting | None, config: EngineConfig | None, device: Any, dtype: Any, options: Any
) -> SemShareEngine:
    """Make an engine from a framework's fields; loads nothing yet. A given ``mode`` replaces that of ``config``."""
    config = config or EngineConfig()
    if mode is not None:
        config = replace(config, reuse=replace(config.reuse, mode=mode))
    return SemShareEngine.from_pretrained(model, config, **merge_arguments(device, dtype, options))


def describe_engine(engine: object) -> dict[str, Any]:
    """Return the fields that ``engine`` fills in. Raises ``ValueError`` if it is no ``SemShareEngine``."""
    require(isinstance(engine, SemShareEngine), "engine", type(engine).__name__, "None or a SemShareEngine")
    assert isinstance(engine, SemShareEngine)
    return {"model": engine.name, "mode": engine.config.reuse.mode, "config": engine.config}


def require_agreement(own: Mapping[str, Any], given: Mapping[str, Any], names: Iterable[str] = ENGINE_FIELDS) -> None:
    """Raise ``ValueError`` for the first of ``names`` that is given, not None, and unlike the engine's own."""
    for name in names:
        value = given.get(name)
        accepted = f"{own[name]!r} or nothing" if name in own else "nothing"
        require(value is None or value == own.get(name), name, value, f"{accepted} beside engine=")


def require_same_engine(model: object, update: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` if ``update`` would give a copy of ``model`` fields that its engine was not made of."""
    for name in ENGINE_FIELDS:
        own = getattr(model, name)
        value = (update or {}).get(name, own)
        require(value == own, name, value, f"{own!r}, since a copy has the same engine; make a new one for another")


def count_prompt_tokens(
    engine: SemShareEngine, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerateOptions]
) -> int:
    """Return how many tokens the prompt of a call has, 0 for no messages; loads no weights. Errors: ``generate``'s."""
    if not messages:
        return 0
    request = Request.of(check_prompt(messages), options)
    variables = request.chat_template_kwargs
    rendered = PromptRenderer(engine.tokenizer).render(messages, {}, tools=request.tools, template_kwargs=variables)
    return len(rendered.token_ids)


def tokenize(engine: SemShareEngine, text: str) -> list[int]:
    """Return token ids, without special tokens; loads no weights. Raises ``ValueError`` for lone surrogates."""
    require(is_utf8(text), "text", text, f"a text{IN_UTF8}")
    return list(engine.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def merge_turns(turns: Iterable[dict[str, Any]], roles: Collection[str] | None = None) -> list[dict[str, Any]]:
    """Join consecutive turns of one role by an empty line, since many templates refuse them. Changes given turns.

    Turns that hold more than ``role`` and ``content``, such as tool calls, or a role not in ``roles``, stay apart.
    """
    merged: list[dict[str, Any]] = []
    said: list[list[str]] = []  # by turn, since to append to a text copies it
    for turn in turns:
        last = merged[-1] if merged else {}
        plain = last.keys() == turn.keys() == {"role", "content"}
        if plain and last["role"] == turn["role"] and (roles is None or turn["role"] in roles):
            said[-1].append(turn["content"])
        else:
            merged.append(turn)
            said.append([])
    for turn, more in zip(merged, said, strict=True):
        if more:
            turn["content"] = "\n\n".join([turn["content"], *more])
    return merged


def collect_texts(named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return texts by id. Raises ``ValueError`` if two different texts have one id."""
    texts: dict[str, Any] = {}
    for key, text in named:
        require(texts.get(key, text) == text, "documents", f"two texts with the id {key!r}", "one text for each id")
        texts[key] = text
    return texts


def arrange_items(
    engine: SemShareEngine, items: Sequence[T], named: Sequence[tuple[str, str]], **options: Any
) -> list[T]:
    """Return ``items``, of which ``named`` has ids and texts, as ``engine.arrange`` orders them with these options.

    Blank and repeated texts are not arranged: they follow the others, unless the given order stays.
    """
    texts: dict[str, str] = {}
    first: dict[str, int] = {}  # of each text, where it stands first
    for index, (key, text) in enumerate(named):
        if text.strip() and text not in first:
            texts[make_document_id(text) if key in texts else key] = text
            first[text] = index
    found = list(engine.arrange(texts, **options).values())
    if found == list(texts.values()):
        return list(items)
    order = [first[text] for text in found]
    return [items[index] for index in (*order, *sorted(set(range(len(items))) - set(order)))]


def is_json_text(text: str) -> bool:
    """Return whether ``text`` is JSON, whole and not too deep to be read."""
    with suppress(ValueError, RecursionError):
        json.loads(text)
        return True
    return False


def parse_arguments(arguments: Any) -> dict[str, Any] | None:
    """Return a tool call's arguments, given as a mapping or JSON text of one ("" is {}); None for anything else."""
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}", strict=False)
    return dict(arguments) if isinstance(arguments, Mapping) else None


def make_function_id(name: object) -> str:
    """Return the call id that stands for a function's name, in old histories that bind results to calls by name."""
    return f"function-{name}"


def count_tokens(report: ReuseReport) -> dict[str, int]:
    """Return the number of tokens of prompt, answer and both, under OpenAI's names."""
    counts = {"prompt_tokens": report.prompt_tokens, "completion_tokens": report.output_tokens}
    return {**counts, "total_tokens": sum(counts.values())}


@contextmanager
def translate_errors(
    kinds: type[Exception] | tuple[type[Exception], ...], translate: Callable[[Exception], Exception]
) -> Iterator[None]:
    """Replace an error of these kinds that the block raises by what ``translate`` makes of it; others pass."""
    try:
        yield
    except kinds as error:
        raise translate(error) from error
