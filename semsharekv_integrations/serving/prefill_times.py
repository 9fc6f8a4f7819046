"""What a full prefill of a prompt takes: measured, or estimated from what others took."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from semsharekv_integrations.report import ReuseReport

_MOST_PROMPTS = 1000


class FullPrefill(NamedTuple):
    """Seconds to the first token behind a full prefill, and how they are known, as the end of a sentence."""

    seconds: float
    source: str
    is_measured: bool = True


def find_seconds(report: ReuseReport) -> float:
    """Return seconds to the first token, without those in line behind other calls."""
    return max(0.0, report.ttft_s - report.phases_s.get("wait", 0.0))


class PrefillTimes:
    """Remembers for each tenant what full prefills took, of each prompt and of the last one."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[bytes, float] = OrderedDict()
        self._last: OrderedDict[str, tuple[int, float]] = OrderedDict()  # tokens and seconds, by tenant

    def note(self, tenant: str, report: ReuseReport) -> None:
        """Remember a call, if it computed its whole prompt."""
        if report.reused_tokens:
            return
        kept: tuple[tuple[OrderedDict, object, object], ...] = (
            (self._prompts, _digest(tenant, report.prompt_ids), find_seconds(report)),
            (self._last, tenant, (report.prompt_tokens, find_seconds(report))),
        )
        for known, key, value in kept:
            known[key] = value
            known.move_to_end(key)
            while len(known) > _MOST_PROMPTS:
                known.popitem(last=False)

    def find(self, tenant: str, report: ReuseReport) -> FullPrefill:
        """Return what a full prefill of the report's prompt took last, or else is estimated to take."""
        if not report.reused_tokens:
            return FullPrefill(find_seconds(report), "this answer's own, as nothing was reused")
        known = self._prompts.get(_digest(tenant, report.prompt_ids)) if report.prompt_ids else None
        if known is not None:
            return FullPrefill(known, "measured when this prompt was last computed in full")
        if tenant in self._last:
            tokens, seconds = self._last[tenant]
            source = f"estimated from the last one, {seconds:.2f} s for {tokens:,} tokens"
            return FullPrefill(seconds * report.prompt_tokens / tokens, source, is_measured=False)
        computed = max(report.compute_ratio, 1 / report.prompt_tokens)
        source = "estimated from the share that was computed"
        return FullPrefill(find_seconds(report) / computed, source, is_measured=False)


def _digest(tenant: str, token_ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(repr((tenant, token_ids)).encode(), digest_size=16).digest()
