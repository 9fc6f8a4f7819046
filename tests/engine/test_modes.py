"""Modes that reuse KV off the prefix, through the engine: what they find, what they promise, and what they report."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods import zero_kv
from semsharekv_integrations import EngineConfig, ReuseConfig, ReuseReport, SemShareEngine
from semsharekv_integrations.reuse.planner import Scope
from shapes import UNGUARDED
from tiny_models import EngineMaker, make_model

NARROW = {"mixtral": {"intermediate_size": 48}}
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "phi3", "mixtral")
MODES = ("identical", "semantic", "paper")
EAGER: dict[str, Any] = {  # whatever it costs
    "min_run_tokens": 8,
    "max_compute_ratio": 1.0,
    "max_deviation": 100.0,
    "relevance_ratio": 0.0,
}
TOKENS = {"max_new_tokens": 6}
DOCUMENTS = {
    "flood": "A flood hit the old town of Prorna in May , and the mayor said that many people were affected .",
    "fire": "The report from Velmar names a fire at the bridge , which was closed on Monday for repairs .",
    "vote": "Reporters said that the council will vote on a new school , as the costs have risen since June .",
}
STRANGE = "7 7 3 = x\n\n" + "( ) ; 8 1 0 q z # 5 2 " * 3 + "\n\n@ 9 ?"


@cache
def model_of(architecture: str, vocab_size: int) -> PreTrainedModel:
    return make_model(architecture, vocab_size, **NARROW.get(architecture, {}))


def standing_in(text: str) -> dict[str, str]:
    return {name: document for name, document in DOCUMENTS.items() if document in text}


def chat(start: str, names: Sequence[str], question: str = "Who was affected ?") -> list[dict[str, str]]:
    content = "\n\n".join([*(DOCUMENTS[name] for name in names), question])
    return [{"role": "system", "content": start}, {"role": "user", "content": content}]


FIRST = chat("Answer in one line .", ["flood", "fire", "vote"])
SECOND = chat("You read the news for us and reply .", ["vote", "flood", "fire"])


def of(mode: str, **rules: Any) -> ReuseConfig:
    """Settings of ``mode`` that fit every tiny model: those with sliding windows can keep all KV alone."""
    if mode != "paper":
        rules = {name: value for name, value in rules.items() if name not in ("min_token_similarity", "guard_facts")}
    if mode == "identical":
        rules.pop("min_similarity", None)
    if mode == "paper":
        rules = {"retention_ratio": 1.0, **rules}
    return ReuseConfig(mode=mode, **rules)  # type: ignore[arg-type]


def assert_counts(report: ReuseReport) -> None:
    counts = report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens, report.recomputed_tokens
    assert sum(counts) == report.prompt_tokens and min(counts) >= 0, counts
    assert report.recomputed_tokens >= 1
    assert 0 < report.compute_ratio <= 1
    assert sum(source.tokens for source in report.sources) == report.reused_tokens
    assert sum(document.reused_tokens for document in report.documents) <= report.reused_tokens


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return model_of(request.param, len(tokenizer))


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def test_an_unchanged_prompt_gets_the_same_answer(make_engine: EngineMaker, model, mode: str) -> None:
    engine = make_engine(model=model, reuse=of(mode))
    wanted = make_engine("off", model).generate(FIRST, **TOKENS).token_ids
    for times in range(3):
        generation = engine.generate(FIRST, **TOKENS)
        assert generation.token_ids == wanted
        assert_counts(generation.report)
        assert generation.report.prefix_tokens == (generation.report.prompt_tokens - 1 if times else 0)
        assert generation.report.mode == mode and generation.report.kv_retained_ratio == 1
        engine.store.check()


def test_reordered_documents_are_found(make_engine: EngineMaker, model, mode: str) -> None:
    engine = make_engine(model=model, reuse=of(mode, max_deviation=100.0, max_compute_ratio=1.0))
    engine.generate(FIRST, **TOKENS)
    (kept,) = engine.store.fetch_all()
    report = engine.generate(SECOND, documents=DOCUMENTS, **TOKENS).report
    assert_counts(report)
    reused, other = report.identical_tokens, report.fuzzy_tokens
    if mode == "paper":
        reused, other = other, reused
    documents = sum(document.tokens for document in report.documents)
    assert reused > documents / 3 and other == 0
    assert [source.reference_id for source in report.sources] == [kept.id]
    assert report.declined is None and report.compute_ratio < 1
    assert {document.document_id for document in report.documents} == set(DOCUMENTS)
    untouched = [document.document_id for document in report.documents if not document.reused_tokens]
    assert len(untouched) <= (mode != "paper"), "but for the one that the question is about"
    engine.store.check()


def test_moved_tokens_have_their_exact_kv_at_the_first_layer(make_engine: EngineMaker, model) -> None:
    """It depends on the token and its position alone: what was borrowed elsewhere must have been turned rightly."""
    engine = make_engine(model=model, reuse=of("identical", **EAGER))
    engine.generate(FIRST, **TOKENS)
    parts = engine._load()
    rendered = parts.renderer.render(SECOND, {})
    plan = parts.planner.plan(rendered, Scope("default"), False)
    assert any((borrowing.targets != borrowing.sources).any() for borrowing in plan.borrowings)
    assert parts._selective is not None
    outcome = parts._selective.run(plan)
    assert not outcome.computed[plan.borrowed].all()
    found, wanted = outcome.prefill.cache.layers[0], parts.adapter.prefill(rendered.token_ids).cache.layers[0]
    torch.testing.assert_close(found.keys, wanted.keys, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.values, wanted.values, atol=1e-4, rtol=1e-3)


def test_nothing_in_common_is_a_full_prefill(make_engine: EngineMaker, model, mode: str) -> None:
    engine = make_engine(model=model, reuse=of(mode))
    engine.generate("\n\n".join(DOCUMENTS.values()), **TOKENS)
    generation = engine.generate(STRANGE, **TOKENS)
    report = generation.report
    assert report.identical_tokens == report.fuzzy_tokens == 0 and report.declined
    assert report.prefix_tokens <= 1, "the start token"
    assert generation.token_ids == make_engine("off", model).generate(STRANGE, **TOKENS).token_ids
    assert_counts(report)


def test_short_runs_are_left_alone(make_engine: EngineMaker) -> None:
    reused = []
    for min_run_tokens in (8, 12, 400):
        engine = make_engine(reuse=of("identical", **{**EAGER, "min_run_tokens": min_run_tokens}))
        engine.generate(FIRST, **TOKENS)
        text = DOCUMENTS["flood"]
        words = text.split()
        prompt = f"{text[::-1][:40]}\n\n{text}\n\nNow {' '.join(words[:9])} x\n\nAnd what is it ?"
        reused.append(engine.generate(prompt, **TOKENS).report.identical_tokens)
    assert reused[0] > reused[1] > reused[2] == 0


def reports_and_texts(generations: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(g.text, g.token_ids, g.finish_reason, g.report.sources, g.report.compute_ratio) for g in generations]


async def test_every_way_to_call_agrees(make_engine: EngineMaker, mode: str) -> None:
    """Also on what was reused: a stream, a batch, a task and a plain call run the same flow."""
    prompts = [FIRST, SECOND, FIRST, STRANGE]

    def fresh() -> SemShareEngine:
        return make_engine(reuse=of(mode))

    one = fresh()
    wanted = reports_and_texts([one.generate(prompt, **TOKENS) for prompt in prompts])
    batch = reports_and_texts(fresh().generate_batch(prompts, **TOKENS))
    for found, expected in zip(batch, wanted, strict=True):  # but for the ids of sources, whose answers go on meanwhile
        assert (*found[:3], found[4]) == (*expected[:3], expected[4])
    other, streamed = fresh(), []
    for prompt in prompts:
        *chunks, last = other.stream(prompt, **TOKENS)
        assert last.generation is not None and not any(chunk.generation for chunk in chunks)
        assert "".join(chunk.text for chunk in [*chunks, last]) == last.generation.text
        streamed.append(last.generation)
    assert reports_and_texts(streamed) == wanted
    another = fresh()
    assert reports_and_texts([await another.agenerate(prompt, **TOKENS) for prompt in prompts]) == wanted


def test_stats_count_what_reports_say(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=of(mode))
    reports = [engine.generate(prompt, **TOKENS).report for prompt in (FIRST, SECOND, FIRST)]
    assert engine.stats()["reused_tokens"] == sum(report.reused_tokens for report in reports)
    assert engine.stats()["prompt_tokens"] == sum(report.prompt_tokens for report in reports)


def test_namespaces_never_share(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=of(mode, max_deviation=100.0, max_compute_ratio=1.0))
    engine.generate(FIRST, namespace="a", **TOKENS)
    engine.warm(DOCUMENTS, namespace="a")
    other = engine.generate(SECOND, namespace="b", **TOKENS).report
    assert other.reused_tokens == 0 and other.declined and not other.sources
    mine = engine.generate(SECOND, namespace="a", **TOKENS).report
    assert mine.identical_tokens + mine.fuzzy_tokens > 0
    foreign = {reference.id for reference in engine.store.references("b")}
    assert foreign and not foreign & {source.reference_id for source in mine.sources}
    engine.clear("a")
    assert engine.generate(FIRST, namespace="a", **TOKENS).report.reused_tokens == 0


def test_warmed_documents_are_found_anywhere(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=of("identical", **EAGER))
    assert engine.warm(DOCUMENTS) == 3
    report = engine.generate(FIRST, documents=DOCUMENTS, **TOKENS).report
    assert all(document.reused_tokens > document.tokens / 3 for document in report.documents)
    assert len(report.sources) == 3
    assert engine.forget("fire") >= 1
    report = engine.generate(SECOND, documents=DOCUMENTS, **TOKENS).report
    used = {document.document_id: document.reused_tokens for document in report.documents}
    assert used["fire"] == 0 < used["vote"]


REWORDED = {name: DOCUMENTS[name].replace(" ,", "").replace("said that", "said") for name in ("flood", "vote")}


def test_reworded_documents_are_found_by_what_they_say_alone(make_engine: EngineMaker) -> None:
    prompt = "\n\n".join(["Look at it .", *REWORDED.values(), "Why so ?"])
    rules: dict[str, Any] = {
        "min_run_tokens": 20,
        "attention_ratio": 0.0,
        "max_compute_ratio": 1.0,
        "max_deviation": 100.0,
    }
    found = {}
    for name in ("identical", "semantic"):
        more = {"min_similarity": 0.3} if name == "semantic" else {}
        engine = make_engine(reuse=of(name, **rules, **more))
        engine.generate(FIRST, documents=DOCUMENTS, **TOKENS)
        found[name] = engine.generate(prompt, documents=REWORDED, **TOKENS).report
        assert_counts(found[name])
    assert found["identical"].reused_tokens <= 1 < found["semantic"].fuzzy_tokens


def pieces() -> st.SearchStrategy[str]:
    """Documents whole, cut and edited, repeated lines, blanks and nothing at all."""
    whole = st.sampled_from(list(DOCUMENTS.values()))
    cut = st.tuples(whole, st.integers(0, 60), st.integers(0, 40)).map(lambda t: t[0][t[1] : t[1] + t[2]])
    edited = st.tuples(whole, st.sampled_from(["7", "not", "Velmar", "\n\n", "é"]), st.integers(0, 80)).map(
        lambda t: t[0][: t[2]] + t[1] + t[0][t[2] :]
    )
    return st.one_of(whole, cut, edited, st.sampled_from(["", "\n\n", "- - - - " * 4, "Who ?", " "]))


prompts = st.lists(pieces(), max_size=6).map("\n\n".join)
calls = st.lists(
    st.tuples(prompts, st.booleans(), st.sampled_from([None, "s", "t"]), st.sampled_from(["a", "b"])),
    min_size=2,
    max_size=4,
)  # text, whether as a chat, session, namespace


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=20)
@given(calls, st.floats(0.3, 1), st.sampled_from([0.05, 100.0]), st.sampled_from([2, 8]), st.booleans())
def test_any_prompts_in_any_order(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mode: str,
    drawn: list[tuple[str, bool, str | None, str]],
    max_compute_ratio: float,
    max_deviation: float,
    min_run_tokens: int,
    loose: bool,
) -> None:
    rules: dict[str, Any] = {"max_compute_ratio": max_compute_ratio, "max_deviation": max_deviation}
    rules |= {"min_run_tokens": min_run_tokens}
    if loose:
        rules |= {"min_similarity": 0.01, "min_token_similarity": 0.0, "guard_facts": False}
    engine = SemShareEngine(llama, tokenizer, EngineConfig(of(mode, **rules)))
    for text, as_chat, session, namespace in drawn:
        prompt: Any = [{"role": "user", "content": text}] if as_chat or not text.strip() else text
        generation = engine.generate(
            prompt, max_new_tokens=2, session=session, namespace=namespace, documents=standing_in(text)
        )
        assert_counts(generation.report)
        engine.store.check()


def test_threads_get_what_one_after_another_gets(make_engine: EngineMaker) -> None:
    """Each prompt in a namespace of its own, warmed alike, so that what is stored does not depend on the order."""
    names = list(DOCUMENTS)
    asked = [chat(f"Line {n} .", [names[n % 3], names[(n + 1) % 3]], f"What about {n} ?") for n in range(8)]
    serial, shared = (make_engine(reuse=of("identical", **EAGER)) for _ in range(2))
    for engine in (serial, shared):
        for n in range(len(asked)):
            engine.warm(DOCUMENTS, namespace=f"n{n}")
    call = lambda engine, n: engine.generate(  # noqa: E731
        asked[n], namespace=f"n{n}", documents=standing_in(str(asked[n])), **TOKENS
    )
    wanted = [call(serial, n) for n in range(len(asked))]
    assert all(generation.report.identical_tokens > 0 for generation in wanted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: call(shared, n), range(len(asked))))
    assert reports_and_texts(found) == reports_and_texts(wanted)
    shared.store.check()
    assert shared.model.config._attn_implementation == "sdpa"


def test_threads_on_one_namespace_keep_the_store_sound(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=of(mode))
    asked = [chat(f"Line {n % 3} .", list(DOCUMENTS)[n % 3 :], f"What is {n % 2} ?") for n in range(9)]
    with ThreadPoolExecutor(4) as pool:
        for generation in pool.map(lambda prompt: engine.generate(prompt, **TOKENS), asked):
            assert_counts(generation.report)
    engine.store.check()


class TestFallback:
    """Borrowed KV that turns out too far from fresh KV is given up."""

    @pytest.fixture
    def careful(self, make_engine: EngineMaker) -> SemShareEngine:
        return make_engine(reuse=of("semantic", max_deviation=1e-6))

    def test_it_ends_as_a_full_prefill(self, careful: SemShareEngine, make_engine: EngineMaker) -> None:
        careful.generate(FIRST, **TOKENS)
        generation = careful.generate(SECOND, **TOKENS)
        report = generation.report
        assert generation.token_ids == make_engine("off").generate(SECOND, **TOKENS).token_ids
        assert "max_deviation" in (report.declined or "") and (report.deviation or 0) > 1e-6
        assert report.identical_tokens == report.fuzzy_tokens == 0
        assert report.recomputed_tokens == report.prompt_tokens - report.prefix_tokens
        assert_counts(report)

    def test_all_of_it_is_exact_and_stored(self, careful: SemShareEngine) -> None:
        careful.generate(FIRST, **TOKENS)
        careful.generate(SECOND, session="s", **TOKENS)
        assert careful.stats()["store_tainted_entries"] == 0
        again = careful.generate(SECOND, **TOKENS).report
        assert again.prefix_tokens == again.prompt_tokens - 1

    def test_what_is_stored_may_even_be_zeros(self, make_engine: EngineMaker, model) -> None:
        """Without full layers too. Prefixes are taken on trust, so none is reused here."""
        wanted = make_engine("off", model).generate(SECOND, **TOKENS).token_ids
        rules = {"min_run_tokens": 8, "max_compute_ratio": 1.0, "min_prefix_tokens": 999}
        for max_deviation in (None, UNGUARDED):
            engine = make_engine(model=model, reuse=of("identical", max_deviation=max_deviation, **rules))
            engine.generate(FIRST, **TOKENS)
            stored = engine.store.fetch_all()
            engine.clear()
            assert all(engine.store.put(zero_kv(reference)) for reference in stored)
            generation = engine.generate(SECOND, documents=DOCUMENTS, **TOKENS)
            report = generation.report
            assert_counts(report)
            if max_deviation is None:
                assert generation.token_ids == wanted
                assert report.reused_tokens == 0 and report.compute_ratio == 1
                assert "max_deviation" in (report.declined or "") and (report.deviation or 0) > 1
                assert not report.sources and engine.stats()["store_tainted_entries"] == 0
            else:
                assert report.identical_tokens > 0 and report.declined is None, "or the guard had nothing to do"


def test_every_phase_is_timed_under_its_name(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=of("semantic", **EAGER | {"attention_ratio": 0.1}))
    first = engine.generate(FIRST, **TOKENS).report
    assert list(first.phases_s) == ["render", "lookup", "plan", "match", "forward", "decode", "remember", "audit"]
    again = engine.generate(SECOND, **TOKENS).report
    assert {"gather", "attend"} == again.phases_s.keys() - first.phases_s.keys()
    assert all(seconds >= 0 for seconds in again.phases_s.values()) and again.ttft_s > 0
    exact = make_engine("exact").generate(FIRST, **TOKENS).report
    assert list(exact.phases_s) == ["render", "lookup", "forward", "decode", "remember", "audit"]
