"""Documents that share rare words with the question come first, and are computed whole."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import Reference, Run
from semsharekv_integrations.reuse.plan import build_plan
from semsharekv_integrations.reuse.selection import MOST_OF_ONE, choose_relevant_tokens, score_documents

SEGMENTS = ((0, 4), (4, 8), (8, 12))


def asked(token_ids: list[int], num_question: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array(token_ids)
    return ids, np.arange(len(ids)) >= len(ids) - num_question


def test_the_rarer_the_shared_word_the_more_relevant() -> None:
    ids, question = asked([1, 2, 3, 9, 1, 2, 4, 9, 1, 5, 6, 9, 1, 2, 3], 3)
    scores = score_documents(ids, SEGMENTS, question)
    first, second, third = (scores[start] for start, _ in SEGMENTS)
    assert first > second > third == 0, "all have 1, two have 2, one has 3"
    assert all(len(set(scores[start:stop].tolist())) == 1 for start, stop in SEGMENTS), "a document has one score"
    assert not scores[12:].any(), "the question is no document"


def test_a_word_counts_more_the_more_often_it_stands_there_but_less_each_time() -> None:
    scores = []
    for times in range(4):
        ids, question = asked([7] * times + [1] * (6 - times) + [2] * 6 + [7], 1)
        scores.append(float(score_documents(ids, ((0, 6), (6, 12)), question)[0]))
    assert 0 == scores[0] < scores[1] < scores[2] < scores[3]
    assert scores[2] - scores[1] > scores[3] - scores[2]


def test_a_word_counts_more_in_a_short_document() -> None:
    ids, question = asked([7, 1, 7, 1, 1, 1, 1, 1, 2, 2, 7], 1)
    scores = score_documents(ids, ((0, 2), (2, 8), (8, 10)), question)
    assert scores[0] > scores[2] > scores[8] == 0


def test_the_words_of_the_question_do_not_make_its_own_passage_relevant() -> None:
    ids, question = asked([1, 2, 3, 4, 5, 6, 7, 8], 2)
    assert not score_documents(ids, ((0, 4), (4, 8)), question).any()


@given(st.lists(st.integers(0, 6), min_size=13, max_size=13))
def test_scores_are_never_negative_and_only_inside_segments(token_ids: list[int]) -> None:
    ids, question = asked(token_ids, 1)
    scores = score_documents(ids, SEGMENTS, question)
    assert (scores >= 0).all() and not scores[12:].any()
    shares = {tuple(s) for s in SEGMENTS if token_ids[12] in token_ids[slice(*s)]}
    assert {s for s in SEGMENTS if scores[s[0]] > 0} == (shares if len(shares) < 3 else set())


def scored(*scores: float) -> np.ndarray:
    return np.repeat(np.array(scores, dtype=np.float32), 4)


def chosen(scores: np.ndarray, ratio: float, eligible: np.ndarray | None = None) -> list[int]:
    everything = np.ones(12, dtype=bool)
    mask = choose_relevant_tokens(scores, SEGMENTS, everything if eligible is None else eligible, ratio)
    return np.flatnonzero(mask).tolist()


def test_documents_are_chosen_whole_and_at_least_one() -> None:
    scores = scored(1.5, 3, 2)
    assert chosen(scores, 0.01) == [4, 5, 6, 7], "the first, though it takes more than its share"
    assert chosen(scores, 0.6) == chosen(scores, 0.01), "the next does not fit"
    assert chosen(scores, 0.7) == [*range(4, 12)]
    assert chosen(scores, 1.0) == [*range(12)]
    assert chosen(scored(1.4, 3, 2), 1.0) == [*range(4, 12)], "less than half as relevant as the best"
    assert chosen(scores, 0.0) == [], "not asked for"
    assert chosen(scored(0, 0, 0), 1.0) == [], "nothing in common"


def test_a_document_that_is_most_of_the_prompt_is_not_chosen() -> None:
    first_two = np.arange(12) < 7
    assert chosen(scored(2, 1, 0), 0.1, first_two) == [], "four of seven"
    assert chosen(scored(2, 1, 0), 0.6, first_two) == [0, 1, 2, 3], "unless that much is allowed"
    assert chosen(scored(1, 2, 0), 0.1, first_two) == [4, 5, 6], "three of seven"


def test_only_what_may_be_chosen_counts() -> None:
    eligible = np.array([True] * 5 + [False] * 3 + [True] * 4)
    assert chosen(scored(1, 3, 2), 0.6, eligible) == [4, 8, 9, 10, 11]
    assert chosen(scored(1, 3, 2), 0.01, eligible) == [4]


@given(st.lists(st.floats(0, 5), min_size=3, max_size=3), st.floats(0, 1), st.integers(0, 2**12 - 1))
def test_no_more_than_the_share_and_one_document(scores: list[float], ratio: float, bits: int) -> None:
    eligible = np.array([bits >> place & 1 for place in range(12)], dtype=bool)
    found = chosen(scored(*scores), ratio, eligible)
    assert eligible[found].all()
    documents = {place // 4 for place in found}
    assert len(found) <= (max(ratio, MOST_OF_ONE) if len(documents) == 1 else ratio) * eligible.sum() + 1e-9
    assert all(scores[place] > 0 for place in documents)


def test_a_plan_computes_what_is_relevant_at_every_layer() -> None:
    ids, question = asked([1, 2, 3, 9, 1, 2, 4, 9, 1, 5, 6, 9, 3], 1)
    run = Run(0, Reference("r", "n", ids, ()), 0, 12)
    rules = ReuseConfig(mode="identical", relevance_ratio=0.01, attention_ratio=0.5, boundary_tokens=0, final_share=0.1)
    plan = build_plan(ids, None, [run], [], question, rules, 3, SEGMENTS)
    assert np.flatnonzero(plan.relevant).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(plan.must).tolist() == [0, 1, 2, 3, 12]
    assert plan.borrowed[:12].all() and not plan.optional[:4].any()
    assert plan.attention_tokens == 0 and plan.predicted_rows == (5, 5, 5), "the other signals are not needed"
    unknown = build_plan(ids, None, [run], [], question, rules, 3)
    assert not unknown.relevant.any() and unknown.attention_tokens == 6, "nothing is known of documents"
