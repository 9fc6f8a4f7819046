"""Settings, all frozen and checked when made. A mode is a preset of ``ReuseConfig``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast, get_args

from semsharekv_integrations.errors import (
    IN_UTF8,
    check_fields,
    check_lifetime,
    is_name,
    is_number,
    is_path,
    is_share,
    is_whole,
    require,
    take_plain_numbers,
)

Mode = Literal["off", "exact", "identical", "semantic", "paper"]
MODES: tuple[Mode, ...] = get_args(Mode)
ModeSetting = Literal["auto", Mode]
MODE_SETTINGS: tuple[ModeSetting, ...] = ("auto", *MODES)
PROVEN: Mode = "exact"  # the fastest mode that is known to lose less than a point of right answers on real models

Eviction = Literal["value", "lru"]
EVICTIONS: tuple[Eviction, ...] = get_args(Eviction)
BY_MODE: Any = None  # the mode's own value, which ``ReuseConfig.resolve`` fills in
_T = TypeVar("_T")
if TYPE_CHECKING:
    ByMode = Annotated[_T, "or None"]  # whoever reads a resolved config has a value
else:
    ByMode = _T | None  # what pydantic accepts where a framework's class reads a config from a file
_OF_EVERY_MODE = ("mode", "min_prefix_tokens", "embedder", "report_substitutions", "report_origins")  # the first fields
_OF_SOME_MODES = dict.fromkeys(("fuzzy", "min_token_similarity", "guard_facts", "lsh_bits"), ("paper",))


@dataclass(frozen=True)
class ReuseConfig:
    """What may be borrowed, and how much of it is computed again.

    Every setting but the first five is None for the mode's own value, which stands in ``PRESETS``. The dial is
    ``budget``; the others are for experiments.

    Attributes:
        mode: ``off`` reuses nothing, ``exact`` the longest stored prefix, ``identical`` also runs of identical tokens
            anywhere, ``semantic`` also stored sentences for those that say the same, ``paper`` as SemShareKV is
            described. ``auto`` is ``exact``; with ``budget`` or a later setting ``identical``, if the model allows it.
        min_prefix_tokens: a shorter common prefix is computed afresh, at least 1; so is one under 5% of the prompt,
            which would cost more than it saves.
        embedder: a sentence-transformers model (path or hub id) that finds similar texts, or None for the model's own
            input embeddings.
        report_substitutions: whether reports hold the wordings that were read in place of others, in mode ``semantic``.
        report_origins: whether reports say of each token where its KV came from, and hold the prompt's token ids.
        budget: share of the borrowed tokens that is computed again, 0 to 1: more is slower, and nearer to a full
            prefill. It goes to first tokens of runs, at most half of it; to documents that share rare words with the
            question, if they fit; and to what the question attends to.
        min_run_tokens: shortest run of identical tokens that is borrowed, at least 2.
        boundary_tokens: most first tokens of each borrowed run that are computed.
        edit_tokens: as ``boundary_tokens``, for runs that follow changed words within the same text.
        tail_tokens: fewest tokens at the prompt's end that count as the question, at least 1.
        relevance_ratio: share of the borrowed tokens that is computed because their documents or passages share rare
            words with the question (BM25), 0 to 1. Documents are taken whole, best first, down to half the best score;
            unless this is 0, the first may take up to half of the tokens. If they exceed ``budget``, none is taken.
        attention_ratio: in place of ``budget``, share of the borrowed tokens that is computed because the question
            attends to them, 0 to 1, where no document is relevant.
        attention_depth: share of the layers, the first ones, in which the question looks ahead at what it attends to;
            None for all of them on a CPU and 0.15 elsewhere, where starting a layer costs more than what it computes.
        deviation_ratio: as ``attention_ratio``, because they deviate from fresh KV; needs ``full_layers``.
        final_share: what is left of the shares for attention and deviation at the last layer, 0 to 1; they decay
            exponentially with depth.
        full_layers: first layers that are computed for all tokens, after which deviation is measured; different
            tokens can be borrowed only if there is one.
        max_deviation: mean deviation (0 is equal, 2 as if it were not there) of borrowed KV above which the prompt is
            prefilled in full; measured behind ``full_layers``, or half way up on the tokens that are computed anyway.
        max_compute_ratio: a plan predicted to compute more than this share of what the exact prefix leaves is declined.
        fuzzy: whether different tokens are borrowed, in mode ``paper``.
        min_similarity: least similarity (0 to 1) of a stored passage or sentence to one in the prompt, or in mode
            ``paper`` of prompts; None for what the embedder was calibrated to.
        min_token_similarity: least cosine (0 to 1) of two tokens' RoPE'd embeddings for the one to be borrowed.
        guard_facts: whether tokens with digits, names and negations are never borrowed from a different token.
        lsh_bits: bits of the hash that matches tokens of texts above 1,024 tokens; 0 compares all, as in shorter ones.
        rotate_keys: whether borrowed keys are turned from their stored positions to those in the prompt; without it
            only text that keeps its place is borrowed rightly.
        retention_ratio: share of the prompt's KV kept for decoding, averaged over layers, or None for all of it.
        retention_final_share: what the last layer keeps as a multiple of what the first one keeps, above 0.
    """

    mode: ModeSetting = "auto"
    min_prefix_tokens: int = 1
    embedder: str | None = None
    report_substitutions: bool = False
    report_origins: bool = False
    budget: float | None = BY_MODE
    min_run_tokens: ByMode[int] = BY_MODE
    boundary_tokens: ByMode[int] = BY_MODE
    edit_tokens: ByMode[int] = BY_MODE
    tail_tokens: ByMode[int] = BY_MODE
    relevance_ratio: ByMode[float] = BY_MODE
    attention_ratio: float | None = BY_MODE
    attention_depth: float | None = BY_MODE
    deviation_ratio: ByMode[float] = BY_MODE
    final_share: ByMode[float] = BY_MODE
    full_layers: ByMode[int] = BY_MODE
    max_deviation: ByMode[float] = BY_MODE
    max_compute_ratio: ByMode[float] = BY_MODE
    fuzzy: ByMode[bool] = BY_MODE
    min_similarity: float | None = BY_MODE
    min_token_similarity: ByMode[float] = BY_MODE
    guard_facts: ByMode[bool] = BY_MODE
    lsh_bits: ByMode[int] = BY_MODE
    rotate_keys: ByMode[bool] = BY_MODE
    retention_ratio: float | None = BY_MODE
    retention_final_share: ByMode[float] = BY_MODE

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        require(self.mode in MODE_SETTINGS, "reuse.mode", self.mode, " or ".join(map(repr, MODE_SETTINGS)))
        require(is_whole(self.min_prefix_tokens, 1), "reuse.min_prefix_tokens", self.min_prefix_tokens, "1 or more")
        named = isinstance(self.embedder, str) and bool(self.embedder)
        require(self.embedder is None or named, "reuse.embedder", self.embedder, "None or a path or hub id")
        compares = self.embedder is None or self.mode == "semantic"
        require(compares, "reuse.embedder", self.embedder, "None but in mode 'semantic', which alone compares texts")
        fits = isinstance(self.report_substitutions, bool) and self.report_substitutions <= (self.mode == "semantic")
        require(fits, "reuse.report_substitutions", self.report_substitutions, "False, or True in mode 'semantic'")
        told = isinstance(self.report_origins, bool)
        require(told, "reuse.report_origins", self.report_origins, "True or False")
        shared = self.budget is None or (self.attention_ratio is None and self.mode != "paper")
        require(shared, "reuse.budget", self.budget, "None with attention_ratio, and in mode 'paper'")
        accepted = f"None in mode {self.mode!r}"
        check_fields(self, "reuse.", accepted, lambda _: self.is_approximate, *self._list_given())
        if self.is_approximate and self.resolve() is self:
            _check_rules(self)

    @property
    def preferred_mode(self) -> Mode:
        """The mode itself; for ``auto`` what it asks for, whether or not the model supports it."""
        if self.mode != "auto":
            return self.mode
        return "identical" if self._list_given() else PROVEN

    @property
    def is_approximate(self) -> bool:
        """Whether the mode also reuses KV that is no exact prefix; says nothing about the model."""
        return self.preferred_mode not in ("off", "exact")

    @property
    def indexed_run_tokens(self) -> int | None:
        """Length in tokens of the shortest run that the store must find, or None in modes that ask for no runs."""
        borrows_runs = self.is_approximate and self.preferred_mode != "paper"
        return self.resolve().min_run_tokens if borrows_runs else None

    def resolve(self, *, supported: bool = True) -> ReuseConfig:
        """Return a config with the mode's value for every None, and ``auto`` replaced by ``preferred_mode``.

        If the model does not support that mode (``supported`` is False), ``auto`` becomes ``exact``, and only
        ``min_prefix_tokens`` and ``report_origins`` are kept.
        """
        if self.mode == "auto" and not supported:
            kept = {name: getattr(self, name) for name in ("min_prefix_tokens", "report_origins")}
            return ReuseConfig(mode="exact", **kept)
        preset = PRESETS.get(self.preferred_mode, self)
        own = {field.name for field in fields(self) if self._has(field.name)}
        own |= {"budget"} if "attention_ratio" in own else set()  # in whose place it stands
        open_names = [field.name for field in fields(self) if field.name not in own and preset._has(field.name)]
        if not open_names and self.mode != "auto":
            return self
        return replace(self, mode=self.preferred_mode, **{name: getattr(preset, name) for name in open_names})

    def _list_given(self) -> list[str]:
        """Return the names of the settings of approximate reuse that are not None, sorted."""
        return sorted(field.name for field in fields(self)[len(_OF_EVERY_MODE) :] if self._has(field.name))

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None


def _is_part(value: object) -> bool:
    return value is None or (is_share(value) and value != 0)


def _check_rules(rules: ReuseConfig) -> None:
    """Raise ``ValueError`` for the first value of a resolved config that is out of bounds."""
    check = partial(check_fields, rules, "reuse.")
    check("None or 2 or more", lambda value: is_whole(value, 2), "min_run_tokens")
    check("None or 1 or more", lambda value: is_whole(value, 1), "tail_tokens")
    check("None or 0 or more", lambda value: is_whole(value, 0), "boundary_tokens", "edit_tokens", "full_layers")
    check("None or 0 to 1", is_share, "relevance_ratio", "deviation_ratio", "final_share")
    check("None or 0 to 1", is_share, "max_compute_ratio", "min_token_similarity")
    check("None, True or False", lambda value: isinstance(value, bool), "fuzzy", "guard_facts", "rotate_keys")
    check("None or above 0", _is_above_0, "max_deviation", "retention_final_share")
    needed = "1 or more where deviation_ratio is above 0 or fuzzy is on"
    check(needed, lambda value: value > 0 or not (rules.deviation_ratio > 0 or rules.fuzzy), "full_layers")
    check("None or 0 to 1", lambda value: value is None or is_share(value), "budget", "attention_ratio")
    check("None, or above 0 up to 1", _is_part, "attention_depth", "min_similarity", "retention_ratio")
    check("None, 0, or 8 or more", lambda value: value == 0 or is_whole(value, 8), "lsh_bits")
    for name, modes in {**_OF_SOME_MODES, "min_similarity": ("semantic", "paper")}.items():
        fits = rules.mode in modes or getattr(rules, name) == getattr(PRESETS.get(cast(Mode, rules.mode), rules), name)
        require(fits, f"reuse.{name}", getattr(rules, name), f"None but in mode {' or '.join(modes)}")


def _is_above_0(value: Any) -> bool:
    return is_number(value) and value > 0


PRESETS: dict[Mode, ReuseConfig] = {}  # of the modes that reuse KV off the prefix
PRESETS["identical"] = ReuseConfig(
    mode="identical",
    budget=0.3,
    min_run_tokens=16,
    boundary_tokens=16,
    edit_tokens=4,
    tail_tokens=8,
    relevance_ratio=0.12,
    deviation_ratio=0.0,
    final_share=1.0,
    full_layers=0,
    max_deviation=1.0,
    max_compute_ratio=0.75,
    fuzzy=False,
    min_token_similarity=0.5,
    guard_facts=True,
    lsh_bits=256,
    rotate_keys=True,
    retention_final_share=1.0,
)
PRESETS["semantic"] = replace(PRESETS["identical"], mode="semantic")
# SemShareKV (arXiv 2509.24832). Sure: one reference, RoPE'd matching, a full first layer, decay with depth. Not
# confirmed, and so settings: what decays to what, whether keys are turned, how alike a reference must be, how retention
# is spread over layers. Its attention recovery is read as the reason for the decay, and chooses nothing here.
PRESETS["paper"] = replace(
    PRESETS["identical"],
    mode="paper",
    budget=None,
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
)


@dataclass(frozen=True)
class StoreConfig:
    """Where KV is kept, and how much of it.

    Attributes:
        max_bytes: bound on the KV on the model's device. Default 2 GiB.
        host_max_bytes: bound on the KV in host memory, for what the device has no room for; pinned if the model is on
            CUDA. Default 0, none.
        directory: where KV is written as well, to outlive the process, or None. One process at a time may use it.
        disk_max_bytes: bound on the KV files in ``directory``. Default 16 GiB.
        ttl_s: seconds after its last use at which an entry expires, or None to keep it while there is room.
        kv_bits: 8 to keep KV in about half of the bytes of half precision, rounded, not in mode ``exact``; None to keep
            it as it is.
        eviction: ``value`` to give up first what was never reused, then what saves least compute; ``lru`` for what was
            used least recently.
        shared_namespace: a namespace that all requests may read as well, or None. Only calls that name it write to it.
        libraries: folders that ``semsharekv warm`` made with this model. All requests may read them, nothing writes.
        checkpoint_tokens: tokens between two copies of a recurrent model's state, at most. Default 1,024.
    """

    max_bytes: int = 2 * 1024**3
    host_max_bytes: int = 0
    directory: str | PathLike[str] | None = None
    disk_max_bytes: int = 16 * 1024**3
    ttl_s: float | None = None
    kv_bits: int | None = None
    eviction: Eviction = "value"
    shared_namespace: str | None = None
    checkpoint_tokens: int = 1024
    libraries: Sequence[str | PathLike[str]] = ()

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check = partial(check_fields, self, "store.")
        check("0 or more bytes", lambda value: is_whole(value, 0), "max_bytes", "host_max_bytes", "disk_max_bytes")
        check("16 or more tokens", lambda value: is_whole(value, 16), "checkpoint_tokens")
        check_lifetime("store.ttl_s", self.ttl_s)
        check("None or a path", lambda value: value is None or is_path(value), "directory")
        check("None or 8", lambda value: value is None or (is_whole(value, 8) and value == 8), "kv_bits")
        check(" or ".join(map(repr, EVICTIONS)), lambda value: value in EVICTIONS, "eviction")
        check(f"None or a non-empty string{IN_UTF8}", lambda value: value is None or is_name(value), "shared_namespace")
        several = isinstance(self.libraries, Sequence) and not isinstance(self.libraries, str)
        require(several and all(map(is_path, self.libraries)), "store.libraries", self.libraries, "a list of paths")
        object.__setattr__(self, "libraries", tuple(self.libraries))


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
        take_plain_numbers(self)
        check_fields(self, "audit.", "0 to 1", is_share, "sample_ratio", "min_agreement")
        check_fields(self, "audit.", "1 or more", lambda value: is_whole(value, 1), "tokens", "window")


@dataclass(frozen=True)
class EngineConfig:
    """All settings of an engine.

    Attributes:
        reuse: what may be reused.
        store: how much KV is kept.
        audit: how often reuse is checked against a full prefill.
        max_context_tokens: context window in tokens, or None for the model's own.
        max_batch_size: most calls that decode in one forward pass, of those that run at the same time; 1 for each by
            itself. Logits in a batch differ from those of a call by itself by rounding.
        max_calls: most calls that are begun at the same time, and so have KV and a thread; the others wait in line with
            neither. None for 8, or ``max_batch_size`` if that is more.
    """

    reuse: ReuseConfig = field(default_factory=ReuseConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    max_context_tokens: int | None = None
    max_batch_size: int = 8
    max_calls: int | None = None

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        for name, kind in (("reuse", ReuseConfig), ("store", StoreConfig), ("audit", AuditConfig)):
            value = getattr(self, name)
            require(isinstance(value, kind), name, value, f"{'an' if name == 'audit' else 'a'} {kind.__name__}")
        check = partial(check_fields, self, "")
        check("1 or more calls", lambda value: is_whole(value, 1), "max_batch_size")
        check("None or 1 or more calls", lambda value: value is None or is_whole(value, 1), "max_calls")
        check("None or 2 or more tokens", lambda value: value is None or is_whole(value, 2), "max_context_tokens")
        allowed = self.store.kv_bits is None or self.reuse.mode in PRESETS
        require(allowed, "store.kv_bits", self.store.kv_bits, f"None in mode {self.reuse.mode!r}, whose KV is exact")

    @property
    def calls_in_flight(self) -> int:
        """Most calls that are begun at the same time: ``max_calls``, or what stands for None."""
        return max(8, self.max_batch_size) if self.max_calls is None else self.max_calls
