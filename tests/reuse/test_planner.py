"""From a rendered prompt to its plan: what the question is, what is found in the store, and what forbids reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from semsharekv_integrations import ReuseConfig, StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference, Rendered, Segment, TokenIds
from semsharekv_integrations.reuse.matching import FuzzyMatcher, list_segments
from semsharekv_integrations.reuse.plan import ReusePlan
from semsharekv_integrations.reuse.planner import LONGEST_QUESTION_TOKENS, Planner, Scope, mark_question
from semsharekv_integrations.reuse.rewording import RewordingFinder
from semsharekv_integrations.reuse.similarity import PooledEmbedder, SegmentIndex
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.records import reference_id
from semsharekv_integrations.text.prompt import Prompt, PromptRenderer

NUM_LAYERS, TAIL, VOCAB, WIDTH = 8, 4, 5000, 64
DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
}
QUESTION = "Who closed the bridge ?"
EMBEDDINGS = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    return PromptRenderer(tokenizer)


def text_of(renderer: PromptRenderer, rendered: Rendered, mask: np.ndarray) -> str:
    return renderer._decode(rendered.token_ids[mask].tolist(), keep_special=True)


class TestQuestion:
    def question(self, renderer: PromptRenderer, prompt: Prompt, documents: Mapping[str, str]) -> str:
        rendered = renderer.render(prompt, documents)
        return text_of(renderer, rendered, mark_question(rendered, TAIL))

    @pytest.mark.parametrize("before", [True, False])
    def test_known_documents_leave_the_rest_of_the_last_turn(self, renderer: PromptRenderer, before: bool) -> None:
        parts = ["Read this :", *DOCUMENTS.values()]
        content = " ".join([QUESTION, *parts] if before else [*parts, QUESTION])
        messages = [{"role": "user", "content": "Earlier ."}, {"role": "assistant", "content": "Yes ."}]
        found = self.question(renderer, [*messages, {"role": "user", "content": content}], DOCUMENTS)
        assert QUESTION in found and "Read this :" in found
        assert "Earlier" not in found and "Yes" not in found
        assert not any(word in found for word in ("flood", "mayor", "repairs", "Velmar"))

    def test_without_documents_it_is_the_last_passage(self, renderer: PromptRenderer) -> None:
        content = "\n\n".join([QUESTION.replace("Who", "When"), *DOCUMENTS.values(), QUESTION])
        chat: Prompt = [{"role": "system", "content": "Be brief ."}, {"role": "user", "content": content}]
        for prompt in (chat, content):
            found = self.question(renderer, prompt, {})
            assert QUESTION in found and "When" not in found and "fire" not in found and "flood" not in found

    def test_a_plain_prompt_with_documents_has_no_turn(self, renderer: PromptRenderer) -> None:
        content = "\n\n".join(["First a line .", *DOCUMENTS.values(), "And then : " + QUESTION])
        found = self.question(renderer, content, DOCUMENTS)
        assert found.strip().endswith(QUESTION) and "First" not in found and "repairs" not in found

    def test_what_stands_behind_the_turn_belongs_to_it(self, renderer: PromptRenderer) -> None:
        found = self.question(renderer, [{"role": "user", "content": QUESTION}], {})
        assert QUESTION in found and found.endswith("<|assistant|>")

    @given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 400), st.data())
    def test_the_tail_is_always_in_and_the_rest_is_bounded(
        self, num_tokens: int, tail_tokens: int, start: int, data: st.DataObject
    ) -> None:
        spans = data.draw(st.lists(st.tuples(st.integers(0, num_tokens), st.integers(1, 90)), max_size=4))
        segments = [Segment(str(n), a, min(num_tokens, a + b)) for n, (a, b) in enumerate(spans) if a < num_tokens]
        start = min(start, num_tokens - 1)
        turn = data.draw(st.sampled_from([None, (start, num_tokens)]))
        passages = [Segment("", start, num_tokens)] if data.draw(st.booleans()) else []
        question = mark_question(Rendered(np.arange(num_tokens), segments, passages, turn), tail_tokens)
        assert question[-tail_tokens:].all()
        assert question.sum() <= LONGEST_QUESTION_TOKENS + min(tail_tokens, num_tokens)
        inside = np.zeros(num_tokens, dtype=bool)
        for segment in segments:
            inside[segment.start : segment.stop] = True
        rest = max(0, num_tokens - tail_tokens)
        assert not (question & inside)[:rest].any(), "documents are no question"
        if turn or passages:
            assert not question[: min(rest, start)].any()


class Fixture:
    """A planner over a store with one reference in namespace ``a``, without a model."""

    def __init__(self, renderer: PromptRenderer, mode: str, max_tokens: int | None = None, **rules: Any) -> None:
        self.config = ReuseConfig(mode=mode, **rules)  # type: ignore[arg-type]
        self.store = KVStore(StoreConfig(), min_run_tokens=self.config.indexed_run_tokens)
        self.renderer = renderer
        matcher, finder, rules = None, None, self.config.resolve()
        if rules.fuzzy:
            frequencies = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
            embed = lambda ids: EMBEDDINGS[torch.from_numpy(ids)]  # noqa: E731
            matcher = FuzzyMatcher(self.store, embed, renderer.split_pieces, frequencies, rules)
        if mode == "semantic":
            index = SegmentIndex(PooledEmbedder(EMBEDDINGS))
            finder = RewordingFinder(self.store, index, renderer.split_pieces, rules.min_similarity)
        self.planner = Planner(self.config, self.store, matcher, NUM_LAYERS, max_tokens, finder)

    def keep(self, rendered: Rendered, namespace: str = "a", **labels: Any) -> Reference:
        ids: TokenIds = rendered.token_ids
        layers = tuple(LayerKV(torch.zeros(1, 1, len(ids), 2), torch.zeros(1, 1, len(ids), 2)) for _ in range(2))
        kept = Reference(reference_id(namespace, ids), namespace, ids, layers, segments=tuple(list_segments(rendered)))
        kept = replace(kept, **labels)
        assert self.store.put(kept)
        return kept

    def prompt(self, start: str = "Read this .", names: tuple[str, ...] = ("flood", "fire")) -> Rendered:
        text = "\n\n".join([start, *(DOCUMENTS[name] for name in names), QUESTION])
        return self.renderer.render(text, DOCUMENTS)

    def plan(
        self, rendered: Rendered, namespace: str = "a", session: str | None = None, suspended: bool = False
    ) -> ReusePlan:
        return self.planner.plan(rendered, Scope(namespace, session), suspended)


APPROXIMATE = ("identical", "semantic", "paper")
EAGER: dict[str, Any] = {"max_compute_ratio": 1.0, "attention_ratio": 0.0}


@pytest.mark.parametrize("mode", ["off", "exact", *APPROXIMATE])
def test_an_empty_store_plans_a_full_prefill(renderer: PromptRenderer, mode: str) -> None:
    fixture = Fixture(renderer, mode)
    plan = fixture.plan(fixture.prompt())
    assert plan.must.all() and not plan.borrowings and plan.prefix is None
    assert (plan.declined is None) == (mode == "off")


@pytest.mark.parametrize("mode", APPROXIMATE)
def test_documents_behind_a_changed_line_are_found(renderer: PromptRenderer, mode: str) -> None:
    fixture = Fixture(renderer, mode, **EAGER)
    kept = fixture.keep(fixture.prompt("Another line than before ."))
    rendered = fixture.prompt("Read this .", ("fire", "flood"))
    plan = fixture.plan(rendered)
    assert plan.declined is None and {b.reference.id for b in plan.borrowings} == {kept.id}
    assert plan.prefix_tokens <= 2
    for borrowing in plan.borrowings:
        if mode != "paper":
            assert np.array_equal(rendered.token_ids[borrowing.targets], kept.token_ids[borrowing.sources])
        assert (borrowing.fuzzy == (mode == "paper")).all()
    assert plan.borrowed[rendered.segments[0].start + 2 : rendered.segments[0].stop].all()
    assert plan.question[-1] and plan.must[-1]


def test_the_papers_reference_is_the_most_alike_of_all_stored_prompts_however_old(renderer: PromptRenderer) -> None:
    fixture = Fixture(renderer, "paper", **EAGER)
    kept = fixture.keep(fixture.prompt("Another line than before ."))
    for number in range(20):
        fixture.keep(renderer.render(f"Read this .\n\n{number} flags were raised in Osteck by {number} sailors .", {}))
    plan = fixture.plan(fixture.prompt("Read this .", ("fire", "flood")))
    assert [borrowing.reference.id for borrowing in plan.borrowings] == [kept.id]


@pytest.mark.parametrize("mode", ["exact", *APPROXIMATE])
def test_other_namespaces_are_not_read(renderer: PromptRenderer, mode: str) -> None:
    fixture = Fixture(renderer, mode, **(EAGER if mode != "exact" else {}))
    fixture.keep(fixture.prompt("Another line than before ."))
    fixture.keep(fixture.prompt())
    plan = fixture.plan(fixture.prompt(), namespace="b")
    assert plan.must.all() and not plan.borrowings and plan.prefix is None and plan.declined


@pytest.mark.parametrize("mode", APPROXIMATE)
def test_a_suspension_leaves_the_exact_prefix(renderer: PromptRenderer, mode: str) -> None:
    fixture = Fixture(renderer, mode, **EAGER)
    first = fixture.prompt()
    fixture.keep(first)
    rendered = fixture.prompt(names=("flood", "flood", "fire"))
    shared = int((first.token_ids == rendered.token_ids[: len(first.token_ids)]).argmin())
    assert fixture.plan(rendered).borrowings
    plan = fixture.plan(rendered, suspended=True)
    assert not plan.borrowings and "audit suspended reuse in namespace 'a'" in (plan.declined or "")
    assert plan.prefix_tokens == shared > 10 and plan.must[shared:].all()


def test_a_suspension_in_mode_exact_leaves_nothing(renderer: PromptRenderer) -> None:
    fixture = Fixture(renderer, "exact")
    fixture.keep(fixture.prompt())
    assert fixture.plan(fixture.prompt()).prefix
    plan = fixture.plan(fixture.prompt(), suspended=True)
    assert plan.prefix is None and plan.must.all() and "suspended" in (plan.declined or "")


@pytest.mark.parametrize("mode", ["exact", *APPROXIMATE])
def test_mode_off_and_long_prompts_reuse_nothing(renderer: PromptRenderer, mode: str) -> None:
    size = len(Fixture(renderer, "off").prompt().token_ids)
    for max_tokens, reused in ((size, True), (size - 1, False)):
        fixture = Fixture(renderer, mode, max_tokens)
        fixture.keep(fixture.prompt())
        plan = fixture.plan(fixture.prompt())
        assert (plan.prefix is not None) == reused
        assert reused or f"beyond {size - 1} tokens" in (plan.declined or "")
    off = Fixture(renderer, "off")
    off.keep(off.prompt())
    assert off.plan(off.prompt()).must.all()


@pytest.mark.parametrize("mode", ["exact", *APPROXIMATE])
def test_the_last_token_is_always_computed(renderer: PromptRenderer, mode: str) -> None:
    fixture = Fixture(renderer, mode)
    rendered = fixture.prompt()
    fixture.keep(rendered)
    plan = fixture.plan(rendered)
    assert plan.prefix_tokens == len(rendered.token_ids) - 1 and plan.must.sum() == 1 and plan.must[-1]


@pytest.mark.parametrize("mode", APPROXIMATE)
def test_only_its_own_session_continues_approximate_kv(renderer: PromptRenderer, mode: str) -> None:
    fixture = Fixture(renderer, mode)
    rendered = fixture.prompt()
    kept = fixture.keep(rendered, session="s", exact_tokens=3, segments=())
    prefix = fixture.plan(rendered, session="s").prefix
    assert prefix and (prefix.reference.id, prefix.num_tokens) == (kept.id, len(rendered.token_ids) - 1)
    for session, suspended in ((None, False), ("t", False), ("s", True)):
        plan = fixture.plan(rendered, session=session, suspended=suspended)
        assert plan.prefix is None and not plan.borrowings, (session, suspended)


def test_guarded_tokens_are_borrowed_from_the_same_token_alone(renderer: PromptRenderer) -> None:
    """A number or name takes nothing from another one, though its place in the text is the same."""
    stored = "The bill was 7 crowns and the mayor of Prorna said that nothing else was to be paid by the town ."
    edited = stored.replace("7", "9").replace("Prorna", "Velmar").replace("nothing", "little").replace("said", "told")
    for guarded in (True, False):
        rules: dict[str, Any] = {**EAGER, "min_similarity": 0.01, "min_token_similarity": 0.0, "min_run_tokens": 99}
        fixture = Fixture(renderer, "paper", **rules, guard_facts=guarded)
        kept = fixture.keep(renderer.render(f"Old .\n\n{stored}\n\nWhat ?", {}))
        rendered = renderer.render(f"New line .\n\n{edited}\n\nWhat about it now ?", {})
        plan = fixture.plan(rendered)
        pairs = [
            (rendered.token_ids[target], kept.token_ids[source])
            for borrowing in plan.borrowings
            for target, source in zip(borrowing.targets, borrowing.sources, strict=True)
        ]
        different = [renderer.decode(np.array([one])).strip() for one, other in pairs if one != other]
        assert pairs and ("9" in different) != guarded
        assert any(word in different for word in ("told", "little")), "others may be"
