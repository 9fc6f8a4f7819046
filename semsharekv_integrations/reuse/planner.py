"""From a rendered prompt to its plan: what is stored of it, what is like it, and what has to be computed.

In mode ``semantic`` the plan is for the prompt as it is read: some sentences in the words of stored ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import (
    Mask,
    PrefixMatch,
    Rendered,
    Run,
    Span,
    Substitution,
    count_common_tokens,
    invert,
    substitute,
)
from semsharekv_integrations.report import Stopwatch
from semsharekv_integrations.reuse.matching import FuzzyMatcher
from semsharekv_integrations.reuse.plan import Borrowing, ReusePlan, build_plan, build_prefix_plan, decline_if_costly
from semsharekv_integrations.reuse.rewording import RewordingFinder, find_asked_about
from semsharekv_integrations.store import KVStore

LONGEST_QUESTION_TOKENS = 64
SHORTEST_PREFIX_SHARE = 0.05  # of the prompt: attention behind a prefix needs a mask, which costs more than less saves
NEAREST_CHECKPOINT = 16  # tokens behind the one before: a state takes the bytes of many tokens
MOST_SINGLE_SHARE = 1 / 16  # of a prompt, by passes of a token each: a token by itself costs about 10 in a prompt


class StateRules(NamedTuple):
    """Where a model keeps its state: ``every`` so many tokens at least; ``one_by_one`` tokens go on from there."""

    every: int
    one_by_one: bool


class Scope(NamedTuple):
    """Whose KV a prompt may take, and how long it may become.

    Attributes:
        namespace: whose entries may be borrowed, beside those of the shared one.
        session: whose approximate KV may be continued, or None.
        most_tokens: how many the prompt may have where the model reads stored wordings, or None for any number.
        own_words: ranges of the prompt as it was asked that are read so in any case.
    """

    namespace: str
    session: str | None = None
    most_tokens: int | None = None
    own_words: tuple[Span, ...] = ()


class _Found(NamedTuple):
    """What is stored of a prompt as it is read: its prefix, and runs behind it; why there is no prefix, or None."""

    read: Rendered
    substitutions: Sequence[Substitution]
    question: Mask
    prefix: PrefixMatch | None
    runs: Sequence[Run]
    declined: str | None


class Planner:
    """Plans prefills over one store. What is found there counts as used.

    Args:
        matcher: finds alike tokens, for mode ``paper``; None otherwise.
        finder: finds stored wordings, for mode ``semantic``; None otherwise.
        max_tokens: the longest prompt for which stored KV holds; None is any.
        states: where a model keeps its state, if a prefix can only end there; None if one can end anywhere.
    """

    def __init__(
        self,
        rules: ReuseConfig,
        store: KVStore,
        matcher: FuzzyMatcher | None,
        num_layers: int,
        max_tokens: int | None,
        finder: RewordingFinder | None = None,
        states: StateRules | None = None,
    ) -> None:
        self._states = states
        self._rules = rules.resolve()
        self._store = store
        self._matcher = matcher
        self._finder = finder
        self._num_layers = num_layers
        self._max_tokens = max_tokens

    def plan(self, rendered: Rendered, scope: Scope, suspended: bool, watch: Stopwatch | None = None) -> ReusePlan:
        """Return the plan of one prompt's prefill, timed by ``watch``; the last token is always computed.

        ``suspended`` says whether the audit has put an end to reuse that is not exact (in mode ``exact``, to all).
        """
        watch = watch or Stopwatch()
        token_ids, approximate = rendered.token_ids, self._rules.is_approximate
        stopped = f"audit suspended reuse in namespace {scope.namespace!r}" if suspended else None
        if self._rules.mode == "off":
            return build_prefix_plan(token_ids, None, self._num_layers, None)
        if self._max_tokens is not None and len(token_ids) > self._max_tokens:
            reason = f"beyond {self._max_tokens} tokens the model rotates keys by other frequencies"
            return build_prefix_plan(token_ids, None, self._num_layers, reason)
        if stopped and not approximate:
            return build_prefix_plan(token_ids, None, self._num_layers, stopped)
        if stopped or not approximate:
            scope = scope._replace(session=None) if stopped else scope
            with watch.phase("lookup"):
                prefix, declined = self._find_prefix(rendered, scope)
            return build_prefix_plan(token_ids, prefix, self._num_layers, stopped or declined)
        if self._max_tokens is not None:
            scope = scope._replace(most_tokens=min(self._max_tokens, scope.most_tokens or self._max_tokens))
        return self._plan_approximate(rendered, scope, watch)

    def plan_as_asked(self, rendered: Rendered, scope: Scope, declined: str) -> ReusePlan:
        """Return a plan that takes the prefix of the prompt in its own words, and nothing else, for a reason."""
        prefix, _ = self._find_prefix(rendered, scope, counts=False)
        return build_prefix_plan(rendered.token_ids, prefix, self._num_layers, declined)

    def choose_checkpoints(self, rendered: Rendered, plan: ReusePlan, namespace: str) -> list[int]:
        """Return behind how many tokens of a prompt [T] the model's state is kept, ascending; none if it has none.

        They lie behind each document, before the first, where the prompt parts from a stored one, every so many tokens,
        and before the last token, from where the same prompt and the next turn go on.
        """
        end, found = len(plan.token_ids) - 1, [plan.prefix_tokens]
        if self._states is None:
            return []
        if self._states.one_by_one:
            return [end]
        texts = rendered.segments or rendered.passages
        borders = {end, *(segment.stop for segment in texts), *(segment.start for segment in texts[:1])}
        borders.add(self._store.count_prefix_tokens(plan.token_ids, namespace))
        for border in sorted(border for border in borders if plan.prefix_tokens < border <= end):
            found += range(found[-1] + self._states.every, border, self._states.every)
            if border - found[-1] >= NEAREST_CHECKPOINT or border == end:
                found.append(border)
        return found[1:]

    def _plan_approximate(self, rendered: Rendered, scope: Scope, watch: Stopwatch) -> ReusePlan:
        """Plan with prefix, runs and what else the mode has; with the prefix alone if more saves too little."""
        if self._finder is None:
            with watch.phase("lookup"):
                found = self._look_up(rendered, (), scope)
            matches: list[Borrowing] = []
            if self._matcher is not None:
                with watch.phase("match"):
                    matches = self._matcher.match_prompt(found.read, _mark_open(found), scope.namespace)
            with watch.phase("plan"):
                return self._build(found, matches)
        question = mark_question(rendered, self._rules.tail_tokens)
        scope = scope._replace(own_words=(*scope.own_words, *find_asked_about(rendered, question)))
        plan, found = self._plan_read(rendered, self._find_earlier(rendered, scope), scope, watch)
        with watch.phase("match"):
            wordings = self._find_wordings(rendered, found, scope)
        if len(wordings) == len(found.substitutions):
            return plan
        other, _ = self._plan_read(rendered, wordings, scope, watch, counts=False)
        return min(plan, other, key=lambda either: sum(either.predicted_rows))

    def _plan_read(
        self,
        rendered: Rendered,
        substitutions: Sequence[Substitution],
        scope: Scope,
        watch: Stopwatch,
        counts: bool = True,
    ) -> tuple[ReusePlan, _Found]:
        """Return the plan where ``substitutions`` are made, and what it rests on; undo those that serve nothing.

        ``counts`` is for ``KVStore.find_prefix``.
        """
        while True:
            with watch.phase("lookup"):
                found = self._look_up(rendered, substitutions, scope, counts)
            counts = False
            with watch.phase("plan"):
                plan = self._build(found, [])
                served = plan.served
            if len(served) == len(substitutions):
                return plan, found
            substitutions = served

    def _look_up(
        self, rendered: Rendered, substitutions: Sequence[Substitution], scope: Scope, counts: bool = True
    ) -> _Found:
        """Find what is stored of the prompt where ``substitutions`` are made."""
        read = rendered.substitute(substitutions)
        prefix, declined = self._find_prefix(read, scope, counts)
        start, runs = prefix.num_tokens if prefix else 0, list[Run]()
        if self._rules.indexed_run_tokens is not None:
            stop = len(read.token_ids) - 1
            runs = self._store.find_runs(read.token_ids, scope.namespace, start=start, stop=stop)
        question = mark_question(read, self._rules.tail_tokens)
        question[:start] = False
        return _Found(read, substitutions, question, prefix, runs, declined)

    def _find_prefix(
        self, rendered: Rendered, scope: Scope, counts: bool = True
    ) -> tuple[PrefixMatch | None, str | None]:
        """Return the stored prefix that pays, and None; or None, and why there is none."""
        limit = len(rendered.token_ids) - 1
        match = self._store.find_prefix(
            rendered.token_ids,
            scope.namespace,
            max_tokens=limit,
            session=scope.session,
            at_checkpoint=self._states is not None,
            counts=counts,
        )
        if match is None:
            return None, "no stored prefix"
        if match.num_tokens < self._rules.min_prefix_tokens:
            return None, f"longest stored prefix of {match.num_tokens} tokens is under min_prefix_tokens"
        if match.num_tokens < SHORTEST_PREFIX_SHARE * len(rendered.token_ids):
            return None, f"longest stored prefix of {match.num_tokens} tokens is too short to pay"
        if self._states and self._states.one_by_one and limit - match.num_tokens >= MOST_SINGLE_SHARE * limit:
            return None, f"stored prefix of {match.num_tokens} tokens leaves too many to compute them one by one"
        return match, None

    def _find_earlier(self, rendered: Rendered, scope: Scope) -> list[Substitution]:
        """Return the substitutions that the session made in the beginning of the prompt, to continue from its KV.

        They end where the prompt differs from what was asked then, and where it keeps its own words.
        """
        before = None if scope.session is None else self._store.find_tainted(scope.namespace, scope.session)
        if before is None or not before.substitutions:
            return []
        same = count_common_tokens(before.asked_ids, rendered.token_ids)
        made = invert(before.token_ids, before.substitutions)
        held = takewhile(lambda each: each.stop <= same and not _is_in(each, scope.own_words), made)
        return _fit(held, len(rendered.token_ids), scope.most_tokens)

    def _find_wordings(self, rendered: Rendered, found: _Found, scope: Scope) -> list[Substitution]:
        """Return the substitutions made so far, and those for what no run and no prefix serves; in order."""
        assert self._finder is not None
        made, num_tokens = found.substitutions, len(rendered.token_ids)
        gone = [each._replace(token_ids=np.full(len(each.token_ids), -1)) for each in made]
        places = substitute(np.arange(num_tokens), gone)  # of tokens as they are read, among those asked
        is_open = _mark_open(found)
        open_tokens = np.zeros(num_tokens, dtype=bool)
        open_tokens[places[is_open & (places >= 0)]] = True
        new = self._finder.find(rendered, open_tokens, scope.own_words, scope.namespace)
        return _fit(sorted([*made, *new], key=lambda each: each.start), num_tokens, scope.most_tokens)

    def _build(self, found: _Found, matches: Sequence[Borrowing]) -> ReusePlan:
        """Return the plan over what was found, or over the prefix alone if more saves too little."""
        rules = self._rules
        if self._matcher is not None and not matches:  # then no layer has to be full
            rules = replace(rules, full_layers=0, deviation_ratio=0.0, fuzzy=False)
        texts, ids = list_texts(found.read), found.read.token_ids
        plan = build_plan(ids, found.prefix, found.runs, matches, found.question, rules, self._num_layers, texts)
        return replace(decline_if_costly(plan, self._rules), substitutions=tuple(found.substitutions))


def _is_in(each: Substitution, spans: Sequence[Span]) -> bool:
    return any(each.start < span.stop and span.start < each.stop for span in spans)


def _mark_open(found: _Found) -> Mask:
    """Return a mask [T] of the tokens that no prefix and no run serves, without the question."""
    open_tokens = ~found.question
    open_tokens[: found.prefix.num_tokens if found.prefix else 0] = False
    for run in found.runs:
        open_tokens[run.start : run.start + run.num_tokens] = False
    return open_tokens


def _fit(substitutions: Iterable[Substitution], num_tokens: int, most_tokens: int | None) -> list[Substitution]:
    """Return the substitutions, in order, that let a prompt of ``num_tokens`` become no longer than ``most_tokens``."""
    kept = []
    for each in substitutions:
        if each.growth <= 0 or most_tokens is None or num_tokens + each.growth <= most_tokens:
            kept.append(each)
            num_tokens += each.growth
    return kept


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
