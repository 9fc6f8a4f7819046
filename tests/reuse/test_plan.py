"""The plan, without a model: what it borrows, what it computes, what it will cost, and when it is declined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations.config import ReuseConfig
from semsharekv_integrations.kv import LayerKV, PrefixMatch, Reference, Run, Span
from semsharekv_integrations.reuse.plan import (
    PROJECTION_SHARE,
    Borrowing,
    ReusePlan,
    build_plan,
    build_prefix_plan,
    decline_if_costly,
)

NUM_TOKENS, NUM_LAYERS, TAIL = 60, 5, 5
RULES = ReuseConfig(
    mode="identical", boundary_tokens=2, edit_tokens=4, attention_ratio=0.2, deviation_ratio=0.1, full_layers=1
)


def reference(name: str, num_tokens: int = 200) -> Reference:
    layer = LayerKV(torch.zeros(1, 1, num_tokens, 1), torch.zeros(1, 1, num_tokens, 1))
    return Reference(name, "n", np.arange(num_tokens), (layer,))


ONE, OTHER = reference("one"), reference("other")


def tail(num_tokens: int = NUM_TOKENS) -> np.ndarray:
    return np.arange(num_tokens) >= num_tokens - TAIL


def plan_of(
    runs: Sequence[Run],
    matches: Sequence[Borrowing] = (),
    rules: ReuseConfig = RULES,
    prefix_tokens: int = 0,
    prefix_of: Reference = ONE,
) -> ReusePlan:
    prefix = PrefixMatch(prefix_of, prefix_tokens) if prefix_tokens else None
    return build_plan(np.arange(NUM_TOKENS), prefix, runs, list(matches), tail(), rules, NUM_LAYERS)


def computed(plan: ReusePlan) -> list[int]:
    return np.flatnonzero(plan.must).tolist()


def fuzzy(targets: Sequence[int], source: Reference = OTHER) -> Borrowing:
    return Borrowing(source, np.array(targets), np.array(targets) + 7, np.ones(len(targets), dtype=bool))


def test_what_has_no_source_and_the_question_is_computed() -> None:
    plan = plan_of([Run(10, ONE, 30, 20)], [fuzzy(range(40, 50))], replace(RULES, boundary_tokens=0))
    assert computed(plan) == [*range(10), *range(30, 40), *range(50, 60)]
    assert np.flatnonzero(plan.fuzzy).tolist() == list(range(40, 50))
    assert np.flatnonzero(plan.borrowed).tolist() == [*range(10, 30), *range(40, 50)]


def test_the_question_is_computed_inside_of_runs() -> None:
    plan = plan_of([Run(0, ONE, 30, 60)], rules=replace(RULES, boundary_tokens=0))
    assert computed(plan) == list(range(NUM_TOKENS - TAIL, NUM_TOKENS))


@pytest.mark.parametrize("boundary_tokens", [0, 1, 3, 99])
def test_the_first_tokens_of_every_run_are_computed(boundary_tokens: int) -> None:
    plan = plan_of([Run(5, ONE, 0, 20), Run(30, OTHER, 9, 8)], rules=replace(RULES, boundary_tokens=boundary_tokens))
    first, second = min(boundary_tokens, 20), min(boundary_tokens, 8)
    wanted = {*range(5 + first), *range(25, 30 + second), *range(38, 60)}
    assert set(computed(plan)) == wanted


class TestEdits:
    """Behind changed words of one text more is computed than where a text begins."""

    def first_computed(self, last: Run, run: Run, **options: object) -> int:
        """How many first tokens of ``run`` are computed behind ``last``."""
        plan = plan_of([last, run], **options)  # type: ignore[arg-type]
        return int(plan.must[run.start : run.start + run.num_tokens].sum())

    @pytest.mark.parametrize(("gap", "source_gap"), [(1, 1), (3, 1), (1, 4), (2, 0), (0, 2), (16, 16)])
    def test_words_changed_put_in_or_left_out(self, gap: int, source_gap: int) -> None:
        last = Run(3, ONE, 20, 12)
        assert self.first_computed(last, Run(15 + gap, ONE, 32 + source_gap, 15)) == RULES.edit_tokens

    def test_another_text_is_no_edit(self) -> None:
        assert self.first_computed(Run(3, ONE, 20, 12), Run(17, OTHER, 34, 15)) == RULES.boundary_tokens

    @pytest.mark.parametrize("source_start", [0, 31, 32 + 17, 150])
    def test_another_place_of_the_same_text_is_no_edit(self, source_start: int) -> None:
        assert self.first_computed(Run(3, ONE, 20, 12), Run(16, ONE, source_start, 15)) == RULES.boundary_tokens

    def test_many_new_words_are_no_edit(self) -> None:
        assert self.first_computed(Run(3, ONE, 20, 12), Run(15 + 17, ONE, 33, 15)) == RULES.boundary_tokens

    def test_the_prefix_is_a_text_as_well(self) -> None:
        """A prompt asked again with a word changed: the prefix ends at the word, a run begins behind it."""
        edited, other = (plan_of([Run(22, source, 21, 20)], prefix_tokens=20) for source in (ONE, OTHER))
        assert int(edited.must[22:42].sum()) == RULES.edit_tokens
        assert int(other.must[22:42].sum()) == RULES.boundary_tokens


def test_nothing_of_the_prefix_is_computed_even_if_it_reaches_into_the_question() -> None:
    assert computed(plan_of([], prefix_tokens=58)) == [58, 59]


def test_nothing_of_the_prefix_is_computed() -> None:
    plan = plan_of([Run(30, ONE, 0, 20)], prefix_tokens=20)
    assert not plan.must[:20].any() and plan.must[20:30].all()
    assert plan.prefix_tokens == 20


@pytest.mark.parametrize(
    ("rules", "attention", "deviation"),
    [
        ({"attention_ratio": 0.0, "deviation_ratio": 0.0}, 0, 0),
        ({"attention_ratio": 0.2, "deviation_ratio": 0.0}, 8, 0),
        ({"attention_ratio": 0.21, "deviation_ratio": 1.0}, 9, 40),
    ],
)
def test_budgets_are_shares_of_what_is_optional(rules: dict[str, float], attention: int, deviation: int) -> None:
    plan = plan_of([Run(8, ONE, 30, 42)], rules=replace(RULES, **rules))  # 40 of them behind the boundary
    assert int(plan.optional.sum()) == 40
    assert (plan.attention_tokens, plan.deviation_tokens) == (attention, deviation)


def spend(budget: float, lengths: Sequence[int]) -> tuple[int, int]:
    """How many borrowed tokens ``budget`` computes again, and how many there are, for runs of these lengths."""
    starts = np.cumsum([0, *lengths])
    runs = [
        Run(int(start) + n, OTHER, 90, length) for n, (start, length) in enumerate(zip(starts, lengths, strict=False))
    ]
    plan = plan_of(runs, rules=ReuseConfig(mode="identical", budget=budget))
    borrowed = plan.borrowed & ~plan.question
    return int((borrowed & plan.must).sum()) + plan.attention_tokens, int(borrowed.sum())


@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.integers(1, 12), min_size=1, max_size=4))
def test_a_budget_is_the_share_of_borrowed_tokens_that_is_computed_again(
    one: float, other: float, lengths: list[int]
) -> None:
    (less, borrowed), (more, _) = spend(min(one, other), lengths), spend(max(one, other), lengths)
    assert less <= more, "more is never less"
    for budget, spent in ((min(one, other), less), (max(one, other), more)):
        assert budget * borrowed <= spent < budget * borrowed + 1 + len(lengths), "each run's first tokens are rounded"
    assert spend(0.0, lengths)[0] == 0 and spend(1.0, lengths) == (borrowed, borrowed)


def test_first_tokens_of_runs_take_at_most_half_of_the_budget() -> None:
    runs = [Run(0, OTHER, 90, 20), Run(21, ONE, 90, 20)]
    for budget, first in ((0.2, 2), (0.4, 4), (1.0, 10)):
        plan = plan_of(runs, rules=ReuseConfig(mode="identical", budget=budget))
        assert plan.must[:first].all() and not plan.must[first:20].any() and plan.attention_tokens == 40 * budget / 2
    assert plan_of(runs, rules=ReuseConfig(mode="identical", budget=1.0, boundary_tokens=3)).attention_tokens == 34


def test_a_document_is_computed_whole_only_if_the_budget_has_room_for_it() -> None:
    token_ids, question = np.arange(NUM_TOKENS), tail()
    token_ids[-1] = token_ids[25]  # which makes the second document the one that the question is about
    runs, documents = [Run(0, OTHER, 90, 20), Run(21, ONE, 90, 20)], [(0, 20), (20, 41)]
    for budget, is_whole in ((0.2, False), (0.4, False), (0.7, True), (1.0, True)):
        rules = ReuseConfig(mode="identical", budget=budget, relevance_ratio=0.5, boundary_tokens=2)
        plan = build_plan(token_ids, None, runs, [], question, rules, NUM_LAYERS, documents)
        assert bool(plan.must[21:41].all()) is bool(plan.relevant.any()) is is_whole
        spent = int((plan.borrowed & plan.must).sum()) + plan.attention_tokens
        assert spent == np.ceil(budget * 40), "whatever it goes to"


def test_as_many_documents_are_computed_whole_as_the_budget_has_room_for() -> None:
    token_ids, question = np.arange(NUM_TOKENS), tail()
    token_ids[-2:] = token_ids[[5, 25]]  # which makes the first and the third document what the question is about
    runs, documents = [Run(0, OTHER, 90, 40)], [(0, 10), (10, 20), (20, 30), (30, 40)]
    for budget, whole in ((0.2, 0), (0.3, 1), (0.4, 1), (0.5, 2), (0.8, 2)):
        rules = ReuseConfig(mode="identical", budget=budget, relevance_ratio=0.6, boundary_tokens=0)
        plan = build_plan(token_ids, None, runs, [], question, rules, NUM_LAYERS, documents)
        assert sum(bool(plan.must[start:stop].all()) for start, stop in documents) == whole
        assert int((plan.borrowed & plan.must).sum()) + plan.attention_tokens == np.ceil(budget * 40)


def test_full_layers_compute_all_that_is_behind_the_prefix() -> None:
    plan = plan_of([Run(25, ONE, 0, 30)], prefix_tokens=20, rules=replace(RULES, full_layers=2))
    assert plan.predicted_rows[:2] == (40, 40) and plan.predicted_rows[2] < 40
    assert plan_of([Run(25, ONE, 0, 30)], rules=replace(RULES, full_layers=99)).predicted_rows == (60,) * NUM_LAYERS


def test_the_predicted_ratio_counts_rows_the_look_ahead_and_the_measuring() -> None:
    plan = plan_of([Run(10, ONE, 30, 40)])
    rows = sum(plan.predicted_rows) + TAIL * NUM_LAYERS + PROJECTION_SHARE * NUM_TOKENS
    assert plan.predicted_compute_ratio == pytest.approx(rows / (NUM_TOKENS * NUM_LAYERS))
    blind = plan_of([Run(10, ONE, 30, 40)], rules=ReuseConfig(mode="identical", attention_ratio=0.0))
    assert blind.measured_layer == 3, "half way up"
    rows = sum(blind.predicted_rows) + PROJECTION_SHARE * blind.predicted_rows[2]
    assert blind.predicted_compute_ratio == pytest.approx(rows / (NUM_TOKENS * NUM_LAYERS))
    everywhere = plan_of(
        [Run(10, ONE, 30, 40)], rules=ReuseConfig(mode="identical", attention_ratio=0.0, full_layers=99)
    )
    assert everywhere.predicted_compute_ratio == 1.0, "nothing is left to measure for"


def test_plans_that_borrow_nothing_measure_nothing() -> None:
    nothing = build_prefix_plan(np.arange(10), None, 3, None)
    assert nothing.predicted_compute_ratio == 1.0
    assert build_prefix_plan(np.arange(10), PrefixMatch(ONE, 4), 3, None).predicted_compute_ratio == 0.6


class TestWorthwhile:
    def test_plans_that_save_enough_are_kept(self) -> None:
        plan = plan_of([Run(10, ONE, 30, 45)], rules=ReuseConfig(mode="identical"))
        assert decline_if_costly(plan, ReuseConfig(mode="identical")) is plan and plan.declined is None

    def test_nothing_found_is_a_reason(self) -> None:
        declined = decline_if_costly(plan_of([], prefix_tokens=20), ReuseConfig(mode="identical"))
        assert declined.declined == "nothing similar enough is stored"
        assert declined.prefix_tokens == 20 and not declined.borrowings
        assert computed(declined) == list(range(20, 60))

    def test_too_little_saved_is_a_reason(self) -> None:
        plan = plan_of([Run(50, ONE, 30, 6)], rules=ReuseConfig(mode="identical"), prefix_tokens=20)
        declined = decline_if_costly(plan, ReuseConfig(mode="identical"))
        assert not declined.borrowings and declined.prefix_tokens == 20
        assert "max_compute_ratio" in (declined.declined or "") and "%" in (declined.declined or "")

    def test_the_bound_is_on_what_the_prefix_leaves(self) -> None:
        """Behind a long prefix little is left to compute anyway; borrowing must save a share of that little."""
        rules = ReuseConfig(mode="identical", attention_ratio=0.0, boundary_tokens=0, max_compute_ratio=0.53)
        half = [Run(40, ONE, 100, 10)]
        kept = plan_of(half, rules=rules, prefix_tokens=40)
        rows = 10 * NUM_LAYERS + PROJECTION_SHARE * 10
        assert kept.predicted_compute_ratio == pytest.approx(rows / (NUM_TOKENS * NUM_LAYERS)), "0.525 of 20 / 60"
        assert decline_if_costly(kept, rules) is kept
        assert decline_if_costly(kept, replace(rules, max_compute_ratio=0.52)).declined


class TestDocumentSpans:
    """What borrowed KV may come from, and where that begins."""

    ONE, OTHER = (replace(source, document_starts={source.id: 3}) for source in (ONE, OTHER))

    def test_every_source_counts(self) -> None:
        assert plan_of([Run(10, self.ONE, 30, 8)], [fuzzy([30, 33], self.OTHER)]).find_document_spans() == {
            "one": Span(10, 11),
            "other": Span(30, 31),
        }
        assert plan_of([]).find_document_spans() == {}

    def test_what_stands_behind_in_a_source_has_no_part_in_its_kv(self) -> None:
        source = replace(self.ONE, document_starts={"before": 3, "within": 34, "behind": 38})
        spans = plan_of([Run(10, source, 30, 8)]).find_document_spans()
        assert spans == {"before": Span(10, 11), "within": Span(14, 15)}

    def test_the_first_token_counts(self) -> None:
        runs = [Run(10, self.ONE, 30, 8), Run(20, self.OTHER, 9, 8), Run(30, self.ONE, 60, 8)]
        assert plan_of(runs, [fuzzy([25, 26], self.OTHER)]).find_document_spans() == {
            "one": Span(10, 11),
            "other": Span(20, 21),
        }


def test_a_plan_prints_counts_and_no_text() -> None:
    plan = build_plan(
        np.arange(NUM_TOKENS) + 7_654_000,
        PrefixMatch(ONE, 10),
        [Run(20, ONE, 0, 12)],
        [fuzzy(range(40, 44))],
        tail(),
        RULES,
        NUM_LAYERS,
    )
    text = str(plan)
    assert "60 tokens: 10 prefix, 12 identical, 4 fuzzy" in text and "declined: None" in text
    assert f"compute ratio {plan.predicted_compute_ratio:.3f}" in text
    assert "7654" not in text and "array" not in text, "no token is in the logs"


@st.composite
def plans(draw: st.DrawFn) -> ReusePlan:
    """Runs and fuzzy matches in any number, behind a prefix or not, under any budgets."""
    prefix_tokens = draw(st.integers(0, 30))
    position, runs, matches = prefix_tokens, [], []
    while position < NUM_TOKENS - 1:
        position += draw(st.integers(0, 9))
        length = min(draw(st.integers(1, 15)), NUM_TOKENS - 1 - position)
        if length <= 0:
            break
        kind = draw(st.sampled_from(["one", "other", "fuzzy"]))
        if kind == "fuzzy":
            free = [n for n in range(position, position + length) if n < NUM_TOKENS - TAIL]
            matches += [fuzzy(free)] if free else []
        else:
            runs.append(Run(position, ONE if kind == "one" else OTHER, draw(st.integers(0, 100)), length))
        position += length
    full_layers = draw(st.integers(1, NUM_LAYERS + 1))
    rules = ReuseConfig(
        boundary_tokens=draw(st.integers(0, 5)),
        edit_tokens=draw(st.integers(0, 9)),
        **{draw(st.sampled_from(["budget", "attention_ratio"])): draw(st.floats(0, 1))},
        deviation_ratio=draw(st.floats(0, 1)),
        final_share=draw(st.floats(0, 1)),
        full_layers=full_layers,
    )
    return plan_of(runs, matches, rules, prefix_tokens)


@given(plans())
def test_every_token_has_one_origin(plan: ReusePlan) -> None:
    prefix = np.arange(NUM_TOKENS) < plan.prefix_tokens
    origins = np.stack([prefix, plan.optional, plan.must])
    assert (origins.sum(0) == 1).all(), "in the prefix, borrowed or computed"
    identical, similar = plan.optional & ~plan.fuzzy, plan.optional & plan.fuzzy
    assert sum(map(np.sum, (prefix, identical, similar, plan.must))) == NUM_TOKENS
    assert plan.must[-TAIL:][~prefix[-TAIL:]].all(), "the question"


@given(plans())
def test_predicted_rows_are_nested_and_within_bounds(plan: ReusePlan) -> None:
    rows, behind = plan.predicted_rows, NUM_TOKENS - plan.prefix_tokens
    assert len(rows) == NUM_LAYERS
    assert all(later <= earlier for earlier, later in pairwise(rows)), "no token comes back"
    assert all(int(plan.must.sum()) <= count <= behind for count in rows)
    assert plan.predicted_compute_ratio >= sum(rows) / (NUM_TOKENS * NUM_LAYERS) - 1e-9


@given(plans(), st.floats(0, 1))
def test_declined_plans_borrow_nothing_but_the_prefix(plan: ReusePlan, bound: float) -> None:
    kept = decline_if_costly(plan, replace(RULES, max_compute_ratio=bound))
    left = 1 - plan.prefix_tokens / NUM_TOKENS
    if kept.declined is None:
        assert kept is plan and plan.predicted_compute_ratio <= bound * left + 1e-9
    else:
        assert not kept.borrowings and kept.prefix is plan.prefix
        assert kept.predicted_compute_ratio == pytest.approx(left)
