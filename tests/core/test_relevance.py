"""Documents that share rare words with the question come first, and are computed whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.config import ReuseRules
from semsharekv_integrations.core.plan import build_plan
from semsharekv_integrations.core.relevance import relevance
from semsharekv_integrations.kv import Reference, Run

SEGMENTS = ((0, 4), (4, 8), (8, 12))


def asked(token_ids: list[int], num_question: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(token_ids)
    return ids, np.arange(len(ids)) >= len(ids) - num_question


def test_the_rarer_the_shared_word_the_more_relevant() -> None:
    ids, question = asked([1, 2, 3, 9, 1, 2, 4, 9, 1, 5, 6, 9, 1, 2, 3], 3)
    scores = relevance(ids, SEGMENTS, question)
    first, second, third = (scores[start] for start, _ in SEGMENTS)
    assert first > second > third == 0, "all have 1, two have 2, one has 3"
    assert all(len(set(scores[start:stop].tolist())) == 1 for start, stop in SEGMENTS), "a document has one score"
    assert not scores[12:].any(), "the question is no document"


def test_the_words_of_the_question_do_not_make_its_own_passage_relevant() -> None:
    ids, question = asked([1, 2, 3, 4, 5, 6, 7, 8], 2)
    assert not relevance(ids, ((0, 4), (4, 8)), question).any()


@given(st.lists(st.integers(0, 6), min_size=13, max_size=13))
def test_scores_are_never_negative_and_only_inside_segments(token_ids: list[int]) -> None:
    ids, question = asked(token_ids, 1)
    scores = relevance(ids, SEGMENTS, question)
    assert (scores >= 0).all() and not scores[12:].any()
    shares = {tuple(s) for s in SEGMENTS if token_ids[12] in token_ids[slice(*s)]}
    assert {s for s in SEGMENTS if scores[s[0]] > 0} == (shares if len(shares) < 3 else set())


def test_a_plan_has_room_for_what_is_relevant_and_for_no_more() -> None:
    ids, question = asked([1, 2, 3, 9, 1, 2, 4, 9, 1, 5, 6, 9, 3], 1)
    run = Run(0, Reference("r", "n", ids, ()), 0, 12)
    rules = ReuseRules(relevance_ratio=1.0, attention_ratio=0.0, boundary_tokens=0)
    plan = build_plan(ids, None, [run], [], question, rules, 3, SEGMENTS)
    assert plan.relevant_tokens == 4 and plan.relevance is not None
    assert np.flatnonzero(plan.relevance).tolist() == [0, 1, 2, 3]
    assert build_plan(ids, None, [run], [], question, rules, 3).relevant_tokens == 0, "nothing known of documents"
