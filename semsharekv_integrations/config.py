"""Settings, all frozen and checked when made: an error names the field, the value and what is accepted."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from math import isfinite
from typing import Any, Literal, get_args

Mode = Literal["off", "exact", "identical", "semantic", "paper"]
MODES: tuple[Mode, ...] = get_args(Mode)


def require(ok: bool, name: str, value: object, accepted: str) -> None:
    """Raise ``ValueError`` with field, value and what is accepted, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; accepted is {accepted}")


def check_lifetime(name: str, ttl_s: object) -> None:
    """Raise ``ValueError`` unless ``ttl_s`` is None or a positive number of seconds."""
    accepted = ttl_s is None or (is_number(ttl_s) and ttl_s > 0)  # type: ignore[operator]
    require(accepted, name, ttl_s, "None or a positive number of seconds")


def is_whole(value: object, least: int) -> bool:
    """Whether ``value`` is an integer, and at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> bool:
    """Whether ``value`` is an integer or a float, and neither infinite nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def is_share(value: object) -> bool:
    """Whether ``value`` is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1  # type: ignore[operator]


@dataclass(frozen=True)
class ReuseRules:
    """What decides which KV is borrowed and how much of it is computed again, with a value for every setting.

    Attributes:
        min_run_tokens: shortest run of identical tokens that is borrowed, at least 2.
        boundary_tokens: first tokens of each borrowed run that are computed.
        edit_tokens: as ``boundary_tokens``, for runs that follow changed words within the same text.
        tail_tokens: fewest tokens at the prompt's end that count as the question, at least 1.
        attention_ratio: share of the borrowed tokens that is computed because the question attends to them, 0 to 1.
        relevance_ratio: share of the borrowed tokens that is computed at every layer because their documents or
            passages share rare words with the question, 0 to 1; whole documents, those that share most first. Unless
            this is 0, the first of them may be up to half of the borrowed tokens.
        deviation_ratio: share of the borrowed tokens that is computed because they deviate from fresh KV, 0 to 1;
            needs ``full_layers``.
        final_share: what is left of the shares for attention and deviation at the last layer, 0 to 1; they decay
            exponentially with depth.
        full_layers: first layers that are computed for all tokens, after which deviation is measured; different
            tokens can be borrowed only if there is one.
        max_deviation: mean deviation (0 is equal, 2 as if it were not there) of borrowed KV above which the prompt is
            prefilled in full; measured behind ``full_layers``, or half way up on the tokens that are computed anyway.
        max_compute_ratio: a plan predicted to compute more than this share of what the exact prefix leaves is declined.
        fuzzy: whether different tokens and short runs of similar texts are borrowed.
        min_similarity: least similarity (0 to 1) of a stored text to one in the prompt for fuzzy borrowing; None for
            what the embedder was calibrated to.
        min_token_similarity: least cosine (0 to 1) of two tokens' RoPE'd embeddings for the one to be borrowed.
        guard_facts: whether tokens with digits, names and negations are never borrowed from a different token.
        lsh_bits: bits of the locality-sensitive hash that matches tokens of texts longer than 1,024 tokens, or 0 to
            compare them all; shorter texts are always compared in full, which is exact and faster there.
        rotate_keys: whether borrowed keys are turned from their stored positions to those in the prompt; without it
            only text that keeps its place is borrowed rightly.
        retention_ratio: share of the prompt's KV kept for decoding, averaged over layers, or None for all of it.
        retention_final_share: what the last layer keeps as a multiple of what the first one keeps, above 0.
    """

    min_run_tokens: int = 16
    boundary_tokens: int = 2
    edit_tokens: int = 4
    tail_tokens: int = 8
    attention_ratio: float = 0.05
    relevance_ratio: float = 0.12
    deviation_ratio: float = 0.0
    final_share: float = 0.7
    full_layers: int = 0
    max_deviation: float = 1.0
    max_compute_ratio: float = 0.75
    fuzzy: bool = False
    min_similarity: float | None = None
    min_token_similarity: float = 0.5
    guard_facts: bool = True
    lsh_bits: int = 256
    rotate_keys: bool = True
    retention_ratio: float | None = None
    retention_final_share: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("min_run_tokens", 2), ("boundary_tokens", 0), ("edit_tokens", 0), ("full_layers", 0)):
            require(is_whole(getattr(self, name), least), f"reuse.{name}", getattr(self, name), f"{least} or more")
        require(is_whole(self.tail_tokens, 1), "reuse.tail_tokens", self.tail_tokens, "1 or more")
        for name in (
            "attention_ratio",
            "relevance_ratio",
            "deviation_ratio",
            "final_share",
            "max_compute_ratio",
            "min_token_similarity",
        ):
            require(is_share(getattr(self, name)), f"reuse.{name}", getattr(self, name), "0 to 1")
        for name in ("fuzzy", "guard_facts", "rotate_keys"):
            require(isinstance(getattr(self, name), bool), f"reuse.{name}", getattr(self, name), "True or False")
        for name in ("max_deviation", "retention_final_share"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, f"reuse.{name}", value, "above 0")
        needs_layer = self.deviation_ratio > 0 or self.fuzzy
        require(
            not needs_layer or self.full_layers > 0,
            "reuse.full_layers",
            self.full_layers,
            "1 or more where deviation_ratio is above 0 or fuzzy is on",
        )
        for name in ("min_similarity", "retention_ratio"):
            value = getattr(self, name)
            require(
                value is None or (is_share(value) and value > 0), f"reuse.{name}", value, "None, or above 0 up to 1"
            )
        bits = self.lsh_bits
        require(bits == 0 or is_whole(bits, 8), "reuse.lsh_bits", bits, "0 or 8 or more")

    def for_identical_tokens(self) -> ReuseRules:
        """The rules where no different token is borrowed: no full layers, and so no deviation to choose by."""
        return replace(self, full_layers=0, deviation_ratio=0.0, fuzzy=False) if self.fuzzy else self


MODE_RULES: dict[Mode, ReuseRules] = {
    "identical": ReuseRules(),
    "semantic": ReuseRules(
        fuzzy=True,
        full_layers=1,
        deviation_ratio=0.15,
        min_token_similarity=0.2,
    ),
    # SemShareKV (arXiv 2509.24832). Sure: one reference, RoPE'd matching, a full first layer, decay with depth. Not
    # confirmed against the paper, and therefore settings: how much decays to what, whether keys are turned (most
    # readers think not; turning favours it), the distance behind 0.8, how retention is spread over layers and tokens.
    "paper": ReuseRules(
        fuzzy=True,
        full_layers=1,
        boundary_tokens=0,
        edit_tokens=0,
        attention_ratio=0.0,
        relevance_ratio=0.0,
        deviation_ratio=0.4,
        final_share=0.25,
        min_similarity=0.8,
        min_token_similarity=0.0,
        guard_facts=False,
        max_deviation=10.0,
        max_compute_ratio=1.0,
        retention_ratio=0.58,
        retention_final_share=0.25,
    ),
}


@dataclass(frozen=True)
class ReuseConfig:
    """What may be reused.

    Every setting but the first three is None for the mode's own value: see ``ReuseRules``, which explains them, and
    ``MODE_RULES``.

    Attributes:
        mode: ``off`` reuses nothing, ``exact`` the longest stored prefix, ``identical`` also runs of identical tokens
            anywhere, ``semantic`` also similar tokens of similar texts, ``paper`` as SemShareKV is described.
        min_prefix_tokens: a shorter common prefix is computed afresh, at least 1.
        embedder: a sentence-transformers model (path or hub id) that finds similar texts, or None for the model's own
            input embeddings.
    """

    mode: Mode = "exact"
    min_prefix_tokens: int = 1
    embedder: str | None = None
    min_run_tokens: int | None = None
    boundary_tokens: int | None = None
    edit_tokens: int | None = None
    tail_tokens: int | None = None
    attention_ratio: float | None = None
    relevance_ratio: float | None = None
    deviation_ratio: float | None = None
    final_share: float | None = None
    full_layers: int | None = None
    max_deviation: float | None = None
    max_compute_ratio: float | None = None
    fuzzy: bool | None = None
    min_similarity: float | None = None
    min_token_similarity: float | None = None
    guard_facts: bool | None = None
    lsh_bits: int | None = None
    rotate_keys: bool | None = None
    retention_ratio: float | None = None
    retention_final_share: float | None = None

    def __post_init__(self) -> None:
        require(self.mode in MODES, "reuse.mode", self.mode, " or ".join(map(repr, MODES)))
        require(is_whole(self.min_prefix_tokens, 1), "reuse.min_prefix_tokens", self.min_prefix_tokens, "1 or more")
        named = isinstance(self.embedder, str) and bool(self.embedder)
        require(self.embedder is None or named, "reuse.embedder", self.embedder, "None or a path or hub id")
        compares = self.embedder is None or self.mode == "semantic"
        require(compares, "reuse.embedder", self.embedder, "None but in mode 'semantic', which alone compares texts")
        given = sorted(self._given())
        require(self.is_approximate or not given, "reuse", ", ".join(given), f"nothing of it in mode {self.mode!r}")
        _ = self.rules

    @property
    def is_approximate(self) -> bool:
        """Whether KV is reused off the prefix."""
        return self.mode in MODE_RULES

    @property
    def rules(self) -> ReuseRules:
        """The mode's rules with what was given here."""
        return replace(MODE_RULES.get(self.mode, ReuseRules()), **self._given())

    @property
    def indexed_run_tokens(self) -> int | None:
        """Shortest run of identical tokens that the store must find, or None where none is asked for."""
        return self.rules.min_run_tokens if self.mode in ("identical", "semantic") else None

    def _given(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(ReuseRules)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class StoreConfig:
    """How much KV is kept.

    Attributes:
        max_bytes: bound on the KV bytes of all entries together, on the model's device. Default 2 GiB.
        ttl_s: seconds after its last use at which an entry expires, or None to keep it while there is room.
    """

    max_bytes: int = 2 * 1024**3
    ttl_s: float | None = None

    def __post_init__(self) -> None:
        require(is_whole(self.max_bytes, 0), "store.max_bytes", self.max_bytes, "0 or more bytes")
        check_lifetime("store.ttl_s", self.ttl_s)


@dataclass(frozen=True)
class AuditConfig:
    """Rerun a share of the prompts that reused KV as full prefills, and compare.

    Attributes:
        sample_ratio: share of reusing prompts that are rerun, 0 to 1. Costs one full prefill each.
        min_agreement: reuse is suspended for a namespace when its rolling top-1 agreement falls below this, 0 to 1.
        tokens: how many first tokens of the answer are compared, at least 1; a call agrees if all of them do.
        window: number of latest audits that the rolling agreement is taken over; it needs a full window to suspend.
    """

    sample_ratio: float = 0.0
    min_agreement: float = 0.9
    tokens: int = 8
    window: int = 20

    def __post_init__(self) -> None:
        require(
            is_number(self.sample_ratio) and 0 <= self.sample_ratio <= 1,
            "audit.sample_ratio",
            self.sample_ratio,
            "0 to 1",
        )
        require(
            is_number(self.min_agreement) and 0 <= self.min_agreement <= 1,
            "audit.min_agreement",
            self.min_agreement,
            "0 to 1",
        )
        require(is_whole(self.tokens, 1), "audit.tokens", self.tokens, "1 or more")
        require(is_whole(self.window, 1), "audit.window", self.window, "1 or more")


@dataclass(frozen=True)
class EngineConfig:
    """All settings of an engine.

    Attributes:
        reuse: what may be reused.
        store: how much KV is kept.
        audit: how often reuse is checked against a full prefill.
        max_context_tokens: context window in tokens, or None for the model's own.
    """

    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    max_context_tokens: int | None = None

    def __post_init__(self) -> None:
        limit = self.max_context_tokens
        require(limit is None or is_whole(limit, 2), "max_context_tokens", limit, "None or 2 or more tokens")


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen, in transformers' terms.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        stop: strings that end the text; they are not part of it.
        temperature: 0 is greedy; above, logits are divided by it.
        top_p: share of probability mass kept, above 0 up to 1.
        top_k: number of likeliest tokens kept, or None for the model's own default.
        repetition_penalty: above 1 discourages tokens seen before; None for the model's own default.
        seed: seed of this call's own random generator, or None for a fresh one.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        require(is_whole(self.max_new_tokens, 1), "max_new_tokens", self.max_new_tokens, "1 or more")
        require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings")
        require(is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        require(self.top_k is None or is_whole(self.top_k, 1), "top_k", self.top_k, "None or 1 or more")
        penalty = self.repetition_penalty
        require(
            penalty is None or (is_number(penalty) and penalty > 0), "repetition_penalty", penalty, "None or above 0"
        )
        seed_fits = self.seed is None or (is_whole(self.seed, 0) and self.seed < 2**63)
        require(seed_fits, "seed", self.seed, "None or an integer from 0 to 2**63 - 1")
