"""Reports in plain sentences: what was reused and why no more was, and what would have made more of it reusable.

Says nothing that the report does not know. Knows the settings, and no engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.report import DocumentUse, ReuseReport

_MOST_NAMED = 12  # documents in one line, and lines of documents
_MOST_BORDERS = 6
_AFTER = ("decode", "remember", "audit", "retain")  # phases behind the first token
_SHOWN_S = 0.0005
# How the reasons in ``ReuseReport.declined`` begin; why that is, and what would help.
ADVICE = {
    "audit suspended reuse": "Audits of this namespace disagreed too often. Use mode 'exact', or clear the namespace "
    "once you know why.",
    "beyond": "The model turns keys by other frequencies in prompts of that length. A shorter prompt is reused.",
    "no stored prefix": "No stored prompt of this namespace begins as this one does. The same beginning again is "
    "reused; so are arranged documents (engine.arrange).",
    "longest stored prefix": "So short a beginning costs more than it saves. Put what changes from call to call at "
    "the prompt's end.",
    "stored prefix of": "This model goes on token by token, which takes longer than computing the prompt at once.",
    "nothing similar enough": "No stored text of this namespace shares enough with what stands behind the reused "
    "beginning, if there is one. Documents that stand there can be warmed (engine.warm) or named (documents=).",
    "predicted to compute": "Too little of the prompt is stored for a selective pass to be faster than a whole one.",
    "deviation of": "What was stored is too far from what this prompt would compute, so all of it was computed.",
}


def explain_report(report: ReuseReport | Mapping[str, Any], reuse: ReuseConfig) -> str:
    """Return what a report says in plain sentences, a line each. ``reuse`` has the settings that the call ran with.

    Raises:
        ValueError: for a mapping that is no report, as ``ReuseReport.to_dict`` makes them.
    """
    kind = isinstance(report, ReuseReport | Mapping)
    require(kind, "report", report, "a ReuseReport, or what its to_dict returns")
    told = report if isinstance(report, ReuseReport) else ReuseReport.from_dict(report)
    return "\n".join(_yield_lines(told, reuse.resolve()))


def _yield_lines(report: ReuseReport, reuse: ReuseConfig) -> Iterator[str]:
    yield _tell_shares(report)
    if report.declined is not None:
        yield _tell_declined(report.declined)
    yield from _tell_documents(report, reuse)
    yield from _tell_borders(report)
    yield from _tell_budget(report, reuse)
    yield from _tell_rest(report)
    yield _tell_time(report)


def _tell_shares(report: ReuseReport) -> str:
    if report.mode == "off":
        return f"Mode 'off' reuses nothing: all {report.prompt_tokens} tokens of the prompt were computed."
    parts = {
        "as the beginning of a stored prompt, exactly": report.prefix_tokens,
        "from the same text elsewhere": report.identical_tokens,
        "from text that is alike": report.fuzzy_tokens,
    }
    whence = ", ".join(f"{count} {where}" for where, count in parts.items() if count)
    said = (
        f"Mode {report.mode!r} took {report.reused_tokens} of the prompt's {report.prompt_tokens} tokens from the store"
    )
    return (
        f"{said}{f': {whence}' if whence else ''}. {report.recomputed_tokens} were computed at every layer: in all "
        f"{report.compute_ratio:.0%} of a full prefill's work."
    )


def _tell_declined(declined: str) -> str:
    advice = next((text for start, text in ADVICE.items() if declined.startswith(start)), "")
    return f"More was not reused because: {declined}. {advice}".rstrip()


def _tell_documents(report: ReuseReport, reuse: ReuseConfig) -> Iterator[str]:
    """Yield a line for the documents of which nothing was reused, by reason, and one for each of the others."""
    unused: dict[str, list[str]] = {}
    for use in report.documents:
        if not use.reused_tokens:
            unused.setdefault(_find_reason(use, report, reuse), []).append(repr(use.document_id))
    for reason, names in unused.items():
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        yield f"Nothing of {', '.join(names[:_MOST_NAMED])}{more} came from the store. {reason}".rstrip()
    used = sorted(
        (use for use in report.documents if use.reused_tokens), key=lambda use: use.reused_tokens / use.tokens
    )
    for use in used[:_MOST_NAMED]:
        yield f"Document {use.document_id!r}: {use.reused_tokens} of its {use.tokens} tokens came from the store."
    if len(used) > _MOST_NAMED:
        yield f"As much or more of {len(used) - _MOST_NAMED} other documents did."


def _find_reason(use: DocumentUse, report: ReuseReport, reuse: ReuseConfig) -> str:
    """Return why nothing of a document was reused, as far as that is known, and what would change it."""
    least = reuse.indexed_run_tokens
    if report.mode == "exact":
        return (
            "Mode 'exact' goes as far as the prompt begins as a stored one does. Behind other text, modes from "
            "'identical' on reuse a document that is stored."
        )
    if report.mode == "off" or report.declined is not None:
        return ""
    if least is not None and use.tokens < least:
        return f"It has {use.tokens} tokens; runs are borrowed from min_run_tokens on, {least}."
    return (
        "Either it is not stored in these words for this namespace (a first prompt with it stores it, or engine.warm), "
        "or all of it was computed again, as happens to what the question is about."
    )


def _tell_borders(report: ReuseReport) -> Iterator[str]:
    """Yield where what is exact ends, and where reuse begins and ends behind it, if the report has origins."""
    if not report.origins:
        return
    if 0 < report.prefix_tokens < report.prompt_tokens:
        at = next(run for run in report.origins if run.start + run.tokens > report.prefix_tokens)
        where = f"in document {at.document_id!r}" if at.document_id is not None else "outside of the documents"
        yield f"The exact beginning ends at token {report.prefix_tokens}, {where}."
    turns = [(one, two) for one, two in pairwise(report.origins) if one.origin != two.origin]
    if turns:
        shown = ", ".join(f"{two.start} ({one.origin} to {two.origin})" for one, two in turns[:_MOST_BORDERS])
        more = len(turns) - _MOST_BORDERS
        yield f"Borders are at tokens {shown}{f', and {more} more' if more > 0 else ''}."


def _tell_budget(report: ReuseReport, reuse: ReuseConfig) -> Iterator[str]:
    if not report.identical_tokens + report.fuzzy_tokens:
        return
    if reuse.budget is not None:
        yield (
            f"The budget of {reuse.budget:g} is the share of borrowed tokens that was computed again: where borrowed "
            "runs begin, in documents that the question is about, and where the question attends. More of it is nearer "
            "to a full prefill; less is faster."
        )
    yield "Their KV is approximate: it was computed behind other text. Mode 'exact' reuses none of it."


def _tell_rest(report: ReuseReport) -> Iterator[str]:
    if report.arranged_tokens:
        yield f"{report.arranged_tokens} tokens are exact because the documents were arranged."
    if report.substituted_tokens:
        yield f"{report.substituted_tokens} tokens were read in a stored wording that says the same."
    if report.deviation is not None:
        yield f"Borrowed KV deviated from fresh KV by {report.deviation:.3f} on average (0 is equal)."
    if report.audit is not None:
        agreed = "the same first tokens" if report.audit.agrees else "other first tokens"
        yield f"An audit found {agreed} behind a full prefill (KL {report.audit.kl_divergence:.4f} nats)."
    if report.kv_retained_ratio < 1:
        yield f"Decoding kept {report.kv_retained_ratio:.0%} of the prompt's KV."


def _tell_time(report: ReuseReport) -> str:
    slow = sorted(report.phases_s.items(), key=lambda phase: -phase[1])
    before = [f"{name} {seconds:.3f} s" for name, seconds in slow if name not in _AFTER and seconds >= _SHOWN_S]
    shown = f" ({', '.join(before[:4])})" if before else ""
    return f"The first token came after {report.ttft_s:.3f} s{shown}; the answer has {report.output_tokens} tokens."
