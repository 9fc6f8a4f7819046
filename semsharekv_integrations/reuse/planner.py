"""From a rendered prompt to its plan: what is stored of it, what is like it, and what has to be computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import Mask, PrefixMatch, Rendered, Run
from semsharekv_integrations.report import Stopwatch
from semsharekv_integrations.reuse.matching import FuzzyMatcher
from semsharekv_integrations.reuse.plan import Borrowing, ReusePlan, build_plan, build_prefix_plan, decline_if_costly
from semsharekv_integrations.store import KVStore

LONGEST_QUESTION_TOKENS = 64
SHORTEST_PREFIX_SHARE = 0.05  # of the prompt: attention behind a prefix needs a mask, which costs more than less saves


class Planner:
    """Plans prefills over one store, with fuzzy matches unless ``matcher`` is None. What is found there counts as used.

    ``max_tokens`` is the longest prompt for which stored KV holds; None is any.
    """

    def __init__(
        self, rules: ReuseConfig, store: KVStore, matcher: FuzzyMatcher | None, num_layers: int, max_tokens: int | None
    ) -> None:
        self._rules = rules.resolve()
        self._store = store
        self._matcher = matcher
        self._num_layers = num_layers
        self._max_tokens = max_tokens

    def plan(
        self, rendered: Rendered, namespace: str, session: str | None, suspended: bool, watch: Stopwatch | None = None
    ) -> ReusePlan:
        """Return the plan of one prompt's prefill, timed by ``watch``; the last token is always computed.

        Args:
            namespace: whose entries may be borrowed, beside those of the shared one.
            session: whose approximate KV may be continued.
            suspended: whether the audit has put an end to reuse that is not exact (in mode ``exact``, to all).
        """
        watch = watch or Stopwatch()
        token_ids, approximate = rendered.token_ids, self._rules.is_approximate
        stopped = f"audit suspended reuse in namespace {namespace!r}" if suspended else None
        if self._rules.mode == "off":
            return build_prefix_plan(token_ids, None, self._num_layers, None)
        if self._max_tokens is not None and len(token_ids) > self._max_tokens:
            reason = f"beyond {self._max_tokens} tokens the model rotates keys by other frequencies"
            return build_prefix_plan(token_ids, None, self._num_layers, reason)
        if stopped and not approximate:
            return build_prefix_plan(token_ids, None, self._num_layers, stopped)
        with watch.phase("lookup"):
            prefix, declined = self._find_prefix(rendered, namespace, None if suspended else session)
        if stopped or not approximate:
            return build_prefix_plan(token_ids, prefix, self._num_layers, stopped or declined)
        return self._plan_approximate(rendered, namespace, prefix, watch)

    def _find_prefix(
        self, rendered: Rendered, namespace: str, session: str | None
    ) -> tuple[PrefixMatch | None, str | None]:
        """Return the stored prefix that pays, and None; or None, and why there is none."""
        limit = len(rendered.token_ids) - 1
        match = self._store.find_prefix(rendered.token_ids, namespace, max_tokens=limit, session=session)
        if match is None:
            return None, "no stored prefix"
        if match.num_tokens < self._rules.min_prefix_tokens:
            return None, f"longest stored prefix of {match.num_tokens} tokens is under min_prefix_tokens"
        if match.num_tokens < SHORTEST_PREFIX_SHARE * len(rendered.token_ids):
            return None, f"longest stored prefix of {match.num_tokens} tokens is too short to pay"
        return match, None

    def _plan_approximate(
        self, rendered: Rendered, namespace: str, prefix: PrefixMatch | None, watch: Stopwatch
    ) -> ReusePlan:
        """Plan with the prefix, identical runs and fuzzy matches; with the prefix alone if more saves too little."""
        token_ids, start = rendered.token_ids, prefix.num_tokens if prefix else 0
        runs: list[Run] = []
        if self._rules.indexed_run_tokens is not None:
            with watch.phase("lookup"):
                runs = self._store.find_runs(token_ids, namespace, start=start, stop=len(token_ids) - 1)
        question = mark_question(rendered, self._rules.tail_tokens)
        question[:start] = False
        matches: list[Borrowing] = []
        if self._matcher is not None:
            open_tokens = ~question
            open_tokens[:start] = False
            for run in runs:
                open_tokens[run.start : run.start + run.num_tokens] = False
            find = self._matcher.match_prompt if self._rules.mode == "paper" else self._matcher.match_segments
            with watch.phase("match"):
                matches = find(rendered, open_tokens, namespace)

        def build(matches: Sequence[Borrowing]) -> ReusePlan:
            rules = self._rules if matches else self._rules.drop_fuzzy()
            texts = list_texts(rendered)
            return build_plan(token_ids, prefix, runs, matches, question, rules, self._num_layers, texts)

        with watch.phase("plan"):
            plan = build(matches)
            if matches and runs:  # without matches no full layers are needed, which may be cheaper
                plan = min(plan, build([]), key=lambda either: either.predicted_compute_ratio)
            return decline_if_costly(plan, self._rules)


def list_texts(rendered: Rendered) -> list[tuple[int, int]]:
    """Return what may be relevant to the question, as (start, stop): documents, or passages where none are known."""
    return [(segment.start, segment.stop) for segment in rendered.segments or rendered.passages]


def mark_question(rendered: Rendered, tail_tokens: int) -> Mask:
    """Return a mask [T] of what the answer hangs on: the last user turn outside of documents, else the last passage.

    At most its last ``LONGEST_QUESTION_TOKENS`` are marked, and always the prompt's last ``tail_tokens``.
    """
    num_tokens = len(rendered.token_ids)
    question = np.zeros(num_tokens, dtype=bool)
    start, stop = rendered.question or (0, num_tokens)
    if rendered.question is None or not rendered.segments:  # the last passage of the turn, or of the prompt
        start = max([start, *(passage.start for passage in rendered.passages if passage.start < stop)])
    question[start:] = True
    for segment in rendered.segments:
        question[segment.start : segment.stop] = False
    question[np.flatnonzero(question)[:-LONGEST_QUESTION_TOKENS]] = False
    question[max(0, num_tokens - tail_tokens) :] = True
    return question
