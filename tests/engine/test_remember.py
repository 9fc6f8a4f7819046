"""Approximate KV: never a reference, never for others, and found again by the session that it belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semsharekv_integrations import ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.kv import LayerKV, Reference, Segment, Span
from semsharekv_integrations.memory import make_references
from semsharekv_integrations.store import KVStore
from semsharekv_integrations.store.records import reference_id
from tiny_models import EngineMaker

DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
}
ANSWER = {"max_new_tokens": 12}


def prompt(start: str, *names: str) -> str:
    return "\n\n".join([start, *(DOCUMENTS[name] for name in names), "Who was affected ?"])


FIRST, SECOND = prompt("Answer in one line .", "flood", "fire"), prompt("You read the news for us .", "fire", "flood")


def layers_of(num_tokens: int) -> tuple[LayerKV, ...]:
    return tuple(LayerKV(torch.randn(1, 2, num_tokens, 4), torch.randn(1, 2, num_tokens, 4)) for _ in range(3))


class TestReferences:
    SEGMENTS = (Segment("a", 2, 8), Segment("b", 8, 14), Segment("c", 15, 20))
    SPANS = {"a": Span(2, 8), "b": Span(8, 14), "c": Span(15, 20)}

    def references(self, exact_tokens: int, session: str | None = None) -> list[Reference]:
        ids = np.arange(30)
        return make_references(ids, layers_of(30), exact_tokens, self.SEGMENTS, "n", self.SPANS, session)

    @pytest.mark.parametrize("exact_tokens", [30, 31, 10**18])
    @pytest.mark.parametrize("session", [None, "s"])
    def test_exact_kv_is_one_reference(self, exact_tokens: int, session: str | None) -> None:
        (whole,) = self.references(exact_tokens, session)
        assert len(whole.token_ids) == 30 and not whole.is_tainted and whole.session == session
        assert whole.segments == self.SEGMENTS and whole.spans == self.SPANS

    @given(
        st.lists(st.tuples(st.integers(0, 29), st.integers(1, 30)), max_size=5),
        st.integers(0, 30),
        st.lists(st.integers(0, 29), max_size=2),
    )
    def test_no_document_is_kept_in_part(
        self, places: list[tuple[int, int]], exact_tokens: int, borrowed_at: list[int]
    ) -> None:
        """Or its beginning would stay without its name, and ``forget`` would not find it."""
        spans = {str(n): Span(start, start + length) for n, (start, length) in enumerate(places)}
        borrowed = {f"b{n}": Span(start, start + 1) for n, start in enumerate(borrowed_at)}
        for found in make_references(np.arange(60), layers_of(60), exact_tokens, (), "n", spans, None, borrowed):
            kept = len(found.token_ids)
            assert all(span.stop <= kept or span.start >= kept for span in spans.values())
            assert all(span.start >= kept for span in borrowed.values()) and kept <= exact_tokens
            assert found.spans == {key: span for key, span in spans.items() if span.stop <= kept}

    def test_without_a_session_only_the_exact_part_stays(self) -> None:
        (part,) = self.references(10)
        assert part.token_ids.tolist() == list(range(8)) and not part.is_tainted
        assert part.segments == self.SEGMENTS[:1], "a text that is cut is none to compare with"
        assert part.spans == {"a": Span(2, 8)}, "and no word of it is kept, or it could not be forgotten"

    def test_a_session_keeps_the_rest_for_itself(self) -> None:
        part, rest = self.references(10, "s")
        assert (len(part.token_ids), part.is_tainted) == (8, False)
        assert (len(rest.token_ids), rest.is_tainted, rest.exact_tokens, rest.session) == (30, True, 10, "s")
        assert rest.segments == self.SEGMENTS[:1] and rest.spans == self.SPANS

    def test_nothing_exact_leaves_nothing_but_the_session(self) -> None:
        assert self.references(0) == []
        (rest,) = self.references(0, "s")
        assert rest.is_tainted and rest.exact_tokens == 0 and rest.segments == ()

    def test_the_exact_part_does_not_hold_the_rest_in_memory_once_it_is_stored(self) -> None:
        (part,), store = self.references(10), KVStore(StoreConfig())
        assert store.put(part)
        kept = store.fetch(part.id, "n")
        assert kept is not None
        for layer in kept.layers:
            for tensor in layer:
                assert tensor.shape[2] == 8
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()

    @given(st.integers(0, 25), st.sampled_from([None, "s"]))
    def test_ids_and_lengths_fit_and_the_store_takes_them(self, exact_tokens: int, session: str | None) -> None:
        ids = np.arange(20)
        found = make_references(ids, layers_of(20), exact_tokens, (Segment("", 0, 20),), "n", {}, session)
        store = KVStore(StoreConfig(), min_run_tokens=4)
        for reference in found:
            assert reference.id == reference_id("n", reference.token_ids)
            assert all(tensor.shape[2] == len(reference.token_ids) for layer in reference.layers for tensor in layer)
            assert store.put(reference)
            store.check()
        assert sum(r.is_tainted for r in found) == int(session is not None and exact_tokens < 20)
        for run in store.find_runs(ids, "n", start=0, stop=20):
            assert run.start + run.num_tokens <= exact_tokens, "nothing approximate is found as a run"


def assert_exact(engine: SemShareEngine, namespace: str = "default") -> None:
    """Every stored reference holds what a full prefill of its tokens gives."""
    adapter = engine._load().adapter
    for reference in engine.store.fetch_all(namespace):
        fresh = adapter.read_layers(adapter.prefill(reference.token_ids).cache)
        for stored, wanted in zip(reference.layers, fresh, strict=True):
            torch.testing.assert_close(stored.keys, wanted.keys, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(stored.values, wanted.values, atol=1e-4, rtol=1e-3)


def tainted(engine: SemShareEngine) -> int:
    engine.store.check()
    return engine.stats()["store_tainted_entries"]  # type: ignore[return-value]


@pytest.fixture(params=["identical", "semantic", "paper"])
def engine(request: pytest.FixtureRequest, make_engine: EngineMaker) -> Iterator[SemShareEngine]:
    """One that has seen ``FIRST``, and borrows from it whatever it costs."""
    rules: dict[str, Any] = {"max_compute_ratio": 1.0, "max_deviation": 100.0}
    if request.param == "paper":
        rules["retention_ratio"] = 1.0
    engine = make_engine(reuse=ReuseConfig(mode=request.param, **rules))
    engine.generate(FIRST, documents=DOCUMENTS, **ANSWER)
    yield engine
    engine.store.check()
    assert_exact(engine)


def borrowed(report: Any) -> int:
    return report.identical_tokens + report.fuzzy_tokens


def test_what_borrowed_leaves_its_exact_part_alone(engine: SemShareEngine) -> None:
    before = {reference.id for reference in engine.store.references()}
    generation = engine.generate(SECOND, documents=DOCUMENTS, **ANSWER)
    assert borrowed(generation.report) > 10 and tainted(engine) == 0
    new = [reference for reference in engine.store.fetch_all() if reference.id not in before]
    rendered = engine._load().renderer.render(SECOND, DOCUMENTS)
    for reference in new:
        assert len(reference.token_ids) < len(rendered.token_ids), "neither all of the prompt, nor the answer"
        assert np.array_equal(reference.token_ids, rendered.token_ids[: len(reference.token_ids)])
        assert all(segment.stop <= len(reference.token_ids) for segment in reference.segments)
    assert len(new) <= 1
    assert_exact(engine)


def test_its_session_continues_from_it(engine: SemShareEngine) -> None:
    first = engine.generate(SECOND, session="s", **ANSWER)
    assert borrowed(first.report) > 10 and tainted(engine) == 1
    num_tokens = first.report.prompt_tokens + len(first.token_ids)
    exact = continued(engine, SECOND, "s").exact_tokens
    assert exact is not None and exact < first.report.prompt_tokens / 2
    turn = SECOND + first.text + "\n\nAnd when was it ?"
    again = engine.generate(turn, session="s", **ANSWER).report
    assert again.prefix_tokens == exact
    assert again.prefix_tokens + again.identical_tokens >= num_tokens - 8, "but for the end, where words join otherwise"
    assert again.compute_ratio < 0.5 and tainted(engine) == 1
    for session in (None, "t"):
        other = engine.generate(turn, session=session, **ANSWER).report
        assert other.prefix_tokens < first.report.prompt_tokens / 2, "what is approximate is for its own session"
    assert_exact(engine)


def continued(engine: SemShareEngine, text: str, session: str | None) -> Reference:
    """What ``session`` would continue ``text`` from."""
    ids = engine._load().renderer.render(text, {}).token_ids
    match = engine.store.find_prefix(ids, "default", max_tokens=len(ids), session=session)
    assert match is not None
    return match.reference


def test_turn_after_turn_stays_tainted(engine: SemShareEngine) -> None:
    text = SECOND
    for turn in range(3):
        generation = engine.generate(text, session="s", **ANSWER)
        text += generation.text + f"\n\nAnd {turn} ?"
        assert tainted(engine) == 1
        assert_exact(engine)
    assert engine.generate(SECOND, session="t", **ANSWER).report.prefix_tokens < 30


def test_namespaces_have_sessions_of_their_own(engine: SemShareEngine) -> None:
    engine.generate(SECOND, session="s", **ANSWER)
    assert engine.generate(SECOND, session="s", namespace="other", **ANSWER).report.reused_tokens == 0


def test_saved_files_hold_nothing_approximate(engine: SemShareEngine, make_engine: EngineMaker, tmp_path: Path) -> None:
    engine.generate(SECOND, session="s", **ANSWER)
    assert tainted(engine) == 1
    entries = engine.stats()["store_entries"]
    assert engine.save(tmp_path / "kv") == entries - 1
    fresh = make_engine(reuse=engine.config.reuse)
    assert fresh.load(tmp_path / "kv") == entries - 1
    assert tainted(fresh) == 0
    assert_exact(fresh)
    ids = {reference.id for reference in fresh.store.references()}
    assert ids == {reference.id for reference in engine.store.references()}


def test_forgetting_and_clearing_drop_it(engine: SemShareEngine) -> None:
    for drop in (
        lambda: engine.forget("fire"),
        lambda: engine.clear("default", session="s"),
        lambda: engine.clear("default"),
        engine.clear,
    ):
        engine.generate(FIRST, documents=DOCUMENTS, **ANSWER)
        engine.generate(SECOND, documents=DOCUMENTS, session="s", **ANSWER)
        assert tainted(engine) == 1
        assert drop() >= 1
        assert tainted(engine) == 0


def test_forgetting_a_document_drops_what_was_borrowed_from_it(engine: SemShareEngine) -> None:
    engine.generate(SECOND, session="s", **ANSWER)  # names no documents
    assert tainted(engine) == 1
    engine.forget("fire")
    assert tainted(engine) == 0


@pytest.mark.parametrize("knows", [True, False])
def test_exact_parts_hold_no_word_of_what_was_borrowed(make_engine: EngineMaker, knows: bool) -> None:
    """The first tokens of what was borrowed are computed, but with them the prompt could not be told from others."""
    rules: dict[str, Any] = {"boundary_tokens": 6, "max_compute_ratio": 1.0, "max_deviation": 100.0}
    engine = make_engine(reuse=ReuseConfig(mode="identical", **rules))
    engine.generate(FIRST, documents=DOCUMENTS, **ANSWER)
    before = {reference.id for reference in engine.store.references()}
    if not knows:
        engine._memory.known.forget()
    assert len(engine.generate(SECOND, **ANSWER).report.sources) >= 1
    (new,) = [reference for reference in engine.store.fetch_all() if reference.id not in before]
    segments = engine._load().renderer.render(SECOND, DOCUMENTS).segments
    assert len(new.token_ids) > 3 and [s for s in segments if s.start < len(new.token_ids)] == []
    engine.forget("fire")
    assert new.id in {reference.id for reference in engine.store.references()}


def test_exact_parts_know_documents_that_were_put_otherwise(make_engine: EngineMaker) -> None:
    """Their lines are broken anew."""
    rules: dict[str, Any] = {"min_run_tokens": 8, "max_compute_ratio": 1.0, "max_deviation": 100.0}
    engine = make_engine(reuse=ReuseConfig(mode="identical", **rules))
    engine.generate(FIRST, **ANSWER)
    at = DOCUMENTS["fire"].index(" ", 40)
    started = f"{DOCUMENTS['fire'][:at]}\n{DOCUMENTS['fire'][at + 1 :]}"
    text = "\n\n".join(["From the news : " + started, DOCUMENTS["flood"], "Who ?"])
    before = {reference.id for reference in engine.store.references()}
    assert borrowed(engine.generate(text, documents={"new": DOCUMENTS["fire"]}, **ANSWER).report) > 5
    (new,) = [reference for reference in engine.store.references() if reference.id not in before]
    assert engine.tokenizer.decode(new.token_ids).strip().endswith("From the news :"), "no word of it is kept"


@pytest.mark.parametrize("mode", ["off", "exact"])
def test_other_modes_taint_nothing(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(mode)
    for text in (FIRST, SECOND, SECOND):
        engine.generate(text, session="s", **ANSWER)
    assert tainted(engine) == 0
    assert_exact(engine)


def test_a_stream_that_ends_early_is_tainted_as_well(engine: SemShareEngine) -> None:
    stream = engine.stream(SECOND, session="s", max_new_tokens=200, temperature=3.0, seed=4)
    next(stream)
    stream.close()
    assert tainted(engine) == 1
    assert engine.generate(SECOND, session="s", **ANSWER).report.recomputed_tokens == 1
