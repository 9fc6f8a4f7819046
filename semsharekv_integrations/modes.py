"""The modes: which KV each borrows, and how much of that it computes again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from semsharekv_integrations.checks import is_number, is_share, is_whole, require, take_plain_numbers

Mode = Literal["off", "exact", "identical", "semantic", "paper"]
MODES: tuple[Mode, ...] = get_args(Mode)
ModeSetting = Literal["auto", Mode]
MODE_SETTINGS: tuple[ModeSetting, ...] = ("auto", *MODES)
FASTEST: Mode = "identical"  # of the modes that meet the quality bar on the committed results: what ``auto`` asks for


@dataclass(frozen=True)
class ReuseRules:
    """What decides which KV is borrowed and how much of it is computed again, with a value for every setting.

    Attributes:
        min_run_tokens: shortest run of identical tokens that is borrowed, at least 2.
        boundary_tokens: first tokens of each borrowed run that are computed.
        edit_tokens: as ``boundary_tokens``, for runs that follow changed words within the same text.
        tail_tokens: fewest tokens at the prompt's end that count as the question, at least 1.
        relevance_ratio: share of the borrowed tokens that is computed at every layer because their documents or
            passages share rare words with the question, 0 to 1; whole documents, those that share most first, and
            none that shares less than half as much as the first. Unless this is 0, the first of them may be up to half
            of the borrowed tokens.
        attention_ratio: where no document is relevant, share of the borrowed tokens that is computed because the
            question attends to them, 0 to 1.
        deviation_ratio: likewise, because they deviate from fresh KV; needs ``full_layers``.
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
    relevance_ratio: float = 0.12
    attention_ratio: float = 0.05
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
        take_plain_numbers(self)
        for name, least in (("min_run_tokens", 2), ("boundary_tokens", 0), ("edit_tokens", 0), ("full_layers", 0)):
            require(
                is_whole(getattr(self, name), least), f"reuse.{name}", getattr(self, name), f"None or {least} or more"
            )
        require(is_whole(self.tail_tokens, 1), "reuse.tail_tokens", self.tail_tokens, "None or 1 or more")
        for name in (
            "attention_ratio",
            "relevance_ratio",
            "deviation_ratio",
            "final_share",
            "max_compute_ratio",
            "min_token_similarity",
        ):
            require(is_share(getattr(self, name)), f"reuse.{name}", getattr(self, name), "None or 0 to 1")
        for name in ("fuzzy", "guard_facts", "rotate_keys"):
            require(isinstance(getattr(self, name), bool), f"reuse.{name}", getattr(self, name), "None, True or False")
        for name in ("max_deviation", "retention_final_share"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, f"reuse.{name}", value, "None or above 0")
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
        require(bits == 0 or is_whole(bits, 8), "reuse.lsh_bits", bits, "None, 0, or 8 or more")

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
    # readers think not; turning favours it), how alike a reference must be, how retention is spread over layers. Not
    # settings: the distance behind 0.8 (``paper_similarity``) and which tokens retention keeps (``core.retention``).
    # Its attention recovery is read as the reason for the decay, and chooses nothing here.
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
