"""What a call reused and what it cost: the report that every generation carries."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from semsharekv_integrations.config import Mode
from semsharekv_integrations.errors import is_number, require, show_value

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
Origin = Literal["prefix", "identical", "fuzzy", "computed"]  # the four counts of a report


@dataclass(frozen=True)
class SourceUse:
    """How many prompt tokens took their KV from one stored reference."""

    reference_id: str
    tokens: int


@dataclass(frozen=True)
class DocumentUse:
    """How many tokens of one of the caller's documents stand in the prompt, and how many came from the store."""

    document_id: str
    tokens: int
    reused_tokens: int


@dataclass(frozen=True)
class Rewording:
    """A sentence of the prompt as it was asked, and the stored one that the model read in its place."""

    asked: str
    read: str


@dataclass(frozen=True)
class TokenRun:
    """Consecutive tokens of the prompt whose KV has one origin, and that stand in one document or in none.

    Attributes:
        start: the first of them, counted from 0.
        tokens: how many they are.
        origin: which of the report's four counts they are in.
        document_id: the caller's document that they stand in, the shortest if several do, or None.
    """

    start: int
    tokens: int
    origin: Origin
    document_id: str | None = None


@dataclass(frozen=True)
class AuditResult:
    """How the first tokens of an answer behind reused KV compare with those behind a full prefill.

    Attributes:
        agrees: whether the most likely token was the same at every one of them.
        kl_divergence: in nats, full to reused, averaged over them.
        tokens: how many were compared.
    """

    agrees: bool
    kl_divergence: float
    tokens: int


@dataclass(frozen=True)
class ReuseReport:
    """What one call reused. The four token counts from ``prefix_tokens`` on add up to ``prompt_tokens``.

    Attributes:
        mode: the mode that the call ran in.
        prompt_tokens: tokens of the prompt as it was asked, special tokens included. Where the model read a stored
            sentence instead, each counts as what stands at the same share of that one.
        prefix_tokens: tokens whose KV was taken from the exact stored prefix.
        identical_tokens: tokens whose KV was taken from runs of identical tokens elsewhere, or from what the same
            session left that is not exact.
        fuzzy_tokens: tokens whose KV was taken from what is alike: stored sentences that were read in place of the
            prompt's own, or, in mode ``paper``, tokens matched by similarity, the same or different ones.
        recomputed_tokens: tokens whose KV was computed at every layer in this call.
        compute_ratio: token-layers computed over tokens of the prompt times layers, 0 to 1.
        deviation: mean deviation of borrowed KV from fresh KV (0 is equal), where it was measured.
        sources: the stored references used.
        documents: the caller's documents found in the prompt.
        declined: why nothing, or nothing but the prefix, was reused though the mode allows it, or None.
        audit: the outcome of the audit, if this call was drawn for one.
        phases_s: seconds by phase, in the order of the flow. CUDA devices are waited for at the end of the prefill, of
            decoding and of what follows.
        ttft_s: seconds from the call to the first new token, model loading excluded.
        decode_s: seconds of decoding, first token included.
        output_tokens: tokens generated, the end-of-sequence token included.
        kv_bytes: bytes of the prompt's KV after prefill.
        kv_retained_bytes: bytes of it that were kept for decoding.
        kv_retained_ratio: the latter over the former, 0 to 1.
        arranged_tokens: how many ``prefix_tokens`` are owed to ``arrange``: the prompt would not have them with its
            documents in the order that was given. Where documents begin and end, a token or two may be miscounted.
        substituted_tokens: how many tokens the model read in a stored wording, computed again or not.
        substitutions: these wordings, if ``ReuseConfig.report_substitutions`` is on.
        origins: where each token's KV came from, first to last, if ``ReuseConfig.report_origins`` is on. They add up to
            ``prompt_tokens``, and for each origin to its count.
        prompt_ids: token ids of the prompt as it was asked, likewise.
        drafted_tokens: tokens of drafts (``SamplingConfig.prompt_lookup``) that the model verified.
        accepted_tokens: those of them that are in the answer; each saved a pass.
    """

    mode: Mode
    prompt_tokens: int
    prefix_tokens: int = 0
    identical_tokens: int = 0
    fuzzy_tokens: int = 0
    recomputed_tokens: int = 0
    compute_ratio: float = 1.0
    deviation: float | None = None
    sources: tuple[SourceUse, ...] = ()
    documents: tuple[DocumentUse, ...] = ()
    declined: str | None = None
    audit: AuditResult | None = None
    phases_s: dict[str, float] = field(default_factory=dict)
    ttft_s: float = 0.0
    decode_s: float = 0.0
    output_tokens: int = 0
    kv_bytes: int = 0
    kv_retained_bytes: int = 0
    kv_retained_ratio: float = 1.0
    arranged_tokens: int = 0
    substituted_tokens: int = 0
    substitutions: tuple[Rewording, ...] = ()
    origins: tuple[TokenRun, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def reused_tokens(self) -> int:
        """Prompt tokens whose KV was not computed, or not at every layer, in this call."""
        return self.prefix_tokens + self.identical_tokens + self.fuzzy_tokens

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict of plain dicts, lists, numbers, strings and None, fit for JSON."""
        plain = asdict(self)
        return plain | {name: list(value) for name, value in plain.items() if isinstance(value, tuple)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ReuseReport:
        """Return the report that ``to_dict`` returned ``plain`` of, also if it went through JSON meanwhile.

        Raises:
            ValueError: naming the field, if ``plain`` is no such thing.
        """
        try:
            parts = {name: tuple(kind(**each) for each in plain.get(name, ())) for name, kind in _PARTS.items()}
            audit = plain.get("audit")
            rest = {"prompt_ids": tuple(plain.get("prompt_ids", ()))}
            found = cls(**{**plain, **parts, **rest, "audit": None if audit is None else AuditResult(**audit)})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"report is {show_value(plain)}: {error}; accepted is what to_dict returns") from None
        require(isinstance(found.phases_s, Mapping), "report.phases_s", found.phases_s, "seconds by phase")
        _require_numbers("report.phases_s", found.phases_s)
        parts_of = {"": (found,), **{f".{name}": getattr(found, name) for name in _PARTS}}
        for name, records in parts_of.items():
            for record in records:
                numbers = {each.name for each in fields(record) if each.type in ("int", "float")}
                _require_numbers(f"report{name}", {key: getattr(record, key) for key in numbers})
        return found


def _require_numbers(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        require(is_number(value), f"{name}.{key}", value, "a number")


_PARTS: dict[str, type] = {
    "sources": SourceUse,
    "documents": DocumentUse,
    "substitutions": Rewording,
    "origins": TokenRun,
}


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model asks for.

    Attributes:
        id: what the tool's result refers to.
        name: of one of the tools that were given.
        arguments: by name, as JSON has them.
    """

    id: str
    name: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, name: str, arguments: dict[str, Any]) -> ToolCall:
        """Make a tool call with a new random id."""
        return cls(f"call_{secrets.token_hex(12)}", name, arguments)


@dataclass(frozen=True)
class Generation:
    """The outcome of one call.

    Attributes:
        text: the new text, without stop strings, special tokens and tool calls.
        token_ids: every token sampled, the end-of-sequence token and those of a stop string included.
        finish_reason: ``stop`` (end of sequence, stop string, or whole JSON of the schema that was asked for),
            ``tool_calls`` (the same, with tool calls), ``length``, or ``cancelled`` by the consumer.
        report: what was reused and what it cost.
        tool_calls: what the model asks for; at ``length`` those that were complete.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    report: ReuseReport
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of text or a tool call as it is generated; the last one, perhaps empty, carries the whole generation."""

    text: str
    generation: Generation | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether it carries no text, tool call or generation."""
        return not (self.text or self.tool_calls or self.generation)


def is_told(chunk: GenerationChunk) -> bool:
    """Return whether a reader of the answer's pieces is told of ``chunk``: it is not empty."""
    return not chunk.is_empty


def is_last(chunk: GenerationChunk) -> bool:
    """Return whether ``chunk`` carries the whole generation."""
    return chunk.generation is not None


def take_last(chunks: Iterable[GenerationChunk]) -> Generation:
    """Read all chunks and return the generation that the last one carries."""
    *_, last = chunks
    assert last.generation is not None, "the last chunk carries the generation"
    return last.generation


class Stopwatch:
    """Seconds by phase and in all; one for each call, in one thread at a time."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.phases_s: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        """Seconds since this stopwatch was made."""
        return time.perf_counter() - self.started

    def count_before(self, name: str, seconds: float) -> None:
        """Add seconds that passed before this stopwatch was made, both to the phase ``name`` and to ``elapsed_s``."""
        self.started -= seconds
        self.phases_s[name] = self.phases_s.get(name, 0.0) + seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that the block takes to the phase ``name``, even if it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.phases_s[name] = self.phases_s.get(name, 0.0) + time.perf_counter() - began
