"""The demo's calls as lines of at most 80 columns, and what they came to as a sentence. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

from semsharekv_integrations.demo.flow import Call

COLUMNS = 80
_FIGURES = "  tokens  reused computed  with    off  same"
_ROOM = COLUMNS - len(_FIGURES)
HEADER = f"{'answer':<{_ROOM}}{_FIGURES}"


def begin_line(answer: str) -> str:
    """What is known of a call when the model has answered."""
    return f"{shorten_text(answer, _ROOM):<{_ROOM}}"


def end_line(call: Call) -> str:
    """The rest, known when all runs are done."""
    tokens, computed = call.report["prompt_tokens"], call.report["recomputed_tokens"]
    counts = f"{tokens:>8,} {tokens - computed:>7,} {computed:>8,}"
    same = "yes" if call.same_as_off else "no"
    return f"{counts} {_seconds(call.ttft_s):>5} {_seconds(call.off_ttft_s):>6} {same:>5}"


def shorten_text(text: str, room: int) -> str:
    """The text on one line, cut after a word where that leaves most of the room in use, else anywhere."""
    whole = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(whole) <= room:
        return whole
    cut = shorten(whole, room, placeholder="…")
    return cut if len(cut) > room // 2 else f"{whole[: room - 1]}…"


def sentence(calls: Sequence[Call]) -> str:
    """What anybody may repeat."""
    tokens, computed = (sum(call.report[name] for call in calls) for name in ("prompt_tokens", "recomputed_tokens"))
    same, number = sum(call.same_as_off for call in calls), len(calls)
    said = (
        f"Over {number} calls the model read {tokens:,} prompt tokens, computed {computed:,} of them, and the answers "
        f"were those of a full prefill in {same} of {number}."
    )
    seconds, full = sum(call.ttft_s for call in calls), sum(call.off_ttft_s for call in calls)
    if round(full / seconds, 1) <= 1:
        return said
    return f"{said} First tokens came {full / seconds:.1f} times as fast: {seconds:.1f} s in place of {full:.1f} s."


def _seconds(seconds: float) -> str:
    """In five columns at most."""
    return f"{seconds:.2f}" if seconds < 99.995 else f"{min(seconds, 99999):.0f}"
