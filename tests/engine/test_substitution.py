"""Mode ``semantic`` through the engine: sentences of a prompt that are read in the words of stored ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import reworded_news as news
from semsharekv_integrations import EngineConfig, Generation, ReuseConfig, SemShareEngine, StoreConfig
from semsharekv_integrations.reuse.planner import Scope
from tiny_models import EngineMaker

RULES: dict[str, Any] = {"max_compute_ratio": 1.0, "max_deviation": 1e9, "min_similarity": 0.01}
TOKENS = {"max_new_tokens": 4}
READ = {"flood": news.join_stored()["flood"], "fire": news.join_stored()["fire"]} | {
    "vote": news.join_reworded()["vote"]
}


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Knows which of the news say the same, whatever the real one thinks of them."""
    monkeypatch.setattr("semsharekv_integrations.reuse.rewording.say_the_same", news.say_the_same)
    return monkeypatch


@pytest.fixture
def engine(make_engine: EngineMaker) -> SemShareEngine:
    return filled(make_engine)


def filled(make_engine: EngineMaker, mode: str = "semantic", start: str = "You read the news .", **config: Any) -> Any:
    """An engine that has seen the news in their stored words, or as in ``texts``, behind another system line."""
    texts = config.pop("texts", news.join_stored())
    reuse = ReuseConfig(mode=mode, **{**(RULES if mode == "semantic" else {}), **config.pop("rules", {})})  # type: ignore[arg-type]
    made = make_engine(reuse=reuse, **config)
    made.generate(news.ask(texts, "Who was it ?", start=start), documents=texts, **{**TOKENS, "max_new_tokens": 2})
    return made


def call(engine: SemShareEngine, texts: dict[str, str] | None = None, *said: str, **options: Any) -> Generation:
    texts = news.join_reworded() if texts is None else texts
    return engine.generate(news.ask(texts, *said), documents=texts, **{**TOKENS, **options})


def counts(generation: Generation) -> tuple[int, ...]:
    report = generation.report
    return report.prefix_tokens, report.identical_tokens, report.fuzzy_tokens, report.recomputed_tokens


def test_the_model_reads_the_stored_words_but_not_where_the_question_points(make_engine: EngineMaker) -> None:
    engine = filled(make_engine, rules={"report_substitutions": True})
    report = call(engine).report
    assert {(each.asked.strip(), each.read.strip()) for each in report.substitutions} == {
        (news.OTHER_WORDS[news.STORED[key][1]], news.STORED[key][1]) for key in ("flood", "fire")
    }
    assert 0 < report.fuzzy_tokens <= report.substituted_tokens
    assert report.to_dict()["substitutions"][0].keys() == {"asked", "read"}
    asked = {"question": "How long will repairs to the town hall of Prorna take ?"}
    other = call(engine, None, asked["question"]).report
    assert news.STORED["flood"][1] not in {each.read.strip() for each in other.substitutions}
    assert any(each.read.strip() == news.STORED["vote"][1] for each in other.substitutions)


def test_the_counts_add_up_to_what_was_asked(engine: SemShareEngine, make_engine: EngineMaker) -> None:
    generation = call(engine)
    texts, report = news.join_reworded(), generation.report
    asked = engine._load().renderer.render(news.ask(texts), texts)
    assert sum(counts(generation)) == report.prompt_tokens == len(asked.token_ids)
    assert sum(source.tokens for source in report.sources) == report.reused_tokens
    assert report.substituted_tokens > 20 and not report.substitutions
    used = {use.document_id: (use.tokens, use.reused_tokens) for use in report.documents}
    assert {key: tokens for key, (tokens, _) in used.items()} == {
        s.document_id: s.stop - s.start for s in asked.segments
    }
    assert all(0 < used[key][1] <= used[key][0] for key in ("flood", "fire"))
    before = filled(make_engine).stats()["prompt_tokens"]
    assert engine.stats()["prompt_tokens"] == before + generation.report.prompt_tokens


def test_what_is_read_has_the_ids_and_where_all_is_computed_the_kv_of_a_full_prefill(engine: SemShareEngine) -> None:
    runtime = engine._load()
    asked = news.join_reworded()
    plan = runtime.planner.plan(runtime.renderer.render(news.ask(asked), asked), Scope("default"), False)
    read = runtime.renderer.render(news.ask(READ), READ).token_ids
    assert plan.substitutions and np.array_equal(plan.token_ids, read)
    assert plan.borrowed[plan.substituted].all(), "one run each"
    everything = np.arange(len(read)) >= plan.prefix_tokens
    assert runtime._selective is not None
    outcome = runtime._selective.run(replace(plan, must=everything, attention_tokens=0))
    wanted = runtime.adapter.prefill(read)
    torch.testing.assert_close(outcome.prefill.logits, wanted.logits, atol=1e-4, rtol=1e-3)
    assert outcome.exact_tokens == plan.substituted_spans[0].start, "what follows is not what was asked"


def test_where_nothing_says_the_same_it_is_mode_identical(make_engine: EngineMaker, judge: pytest.MonkeyPatch) -> None:
    judge.setattr("semsharekv_integrations.reuse.rewording.say_the_same", lambda asked, stored: False)
    found = [call(filled(make_engine, mode)) for mode in ("semantic", "identical")]
    (semantic, identical) = found
    assert semantic.token_ids == identical.token_ids and counts(semantic) == counts(identical)
    assert semantic.report.substituted_tokens == semantic.report.fuzzy_tokens == 0


def test_sentences_that_stand_word_for_word_keep_their_words(engine: SemShareEngine) -> None:
    report = call(engine, news.join_stored()).report
    assert report.substituted_tokens == 0 and report.identical_tokens > 0


@pytest.mark.parametrize("mode", ["off", "exact", "identical", "paper"])
def test_no_other_mode_reads_other_words(make_engine: EngineMaker, mode: str) -> None:
    engine = filled(make_engine, mode, rules={"retention_ratio": 1.0} if mode == "paper" else {})
    assert call(engine).report.substituted_tokens == 0


def test_what_follows_is_never_exact_for_others(engine: SemShareEngine, make_engine: EngineMaker) -> None:
    first = call(engine, session="s")
    assert first.report.substituted_tokens
    (tainted,) = (e.reference for e in engine.store._entries.by_key.values() if e.reference.is_tainted)
    read = engine._load().renderer.render(news.ask(READ), READ)
    assert np.array_equal(tainted.token_ids[: len(read.token_ids)], read.token_ids)
    asked = engine._load().renderer.render(news.ask(news.join_reworded()), {}).token_ids
    assert np.array_equal(tainted.asked_ids[: len(asked)], asked)
    starts = [substitution.start for substitution in tainted.substitutions]
    assert (tainted.exact_tokens or 0) <= min(starts)
    limit = min(starts)
    for session in (None, "t"):
        assert call(engine, READ, session=session).report.prefix_tokens <= limit
        for reference in engine.store.references():
            assert not reference.is_tainted and not reference.substitutions
    engine.store.check()


def test_the_same_words_in_place_are_reused_as_they_stand_but_count_as_approximate(make_engine: EngineMaker) -> None:
    """Behind the same beginning, the prompt as it is read continues the stored prefix."""
    engine = filled(make_engine, start="Answer in one line .")
    report = call(engine, session="s").report
    read = engine._load().renderer.render(news.ask(READ), READ)
    first = next(segment.start for segment in read.segments)
    assert report.prefix_tokens < first + 40 < report.reused_tokens
    assert sum(counts(call(engine))) == report.prompt_tokens


class TestSession:
    FOLLOW_UP = "Why ?"

    def say(self, engine: SemShareEngine, answer: str, question: str, session: str | None = "s") -> Generation:
        return call(engine, None, news.QUESTION, answer, question, session=session)

    def test_it_goes_on_behind_what_was_read(self, engine: SemShareEngine) -> None:
        first = call(engine, session="s")
        second = self.say(engine, first.text, self.FOLLOW_UP)
        assert second.report.substituted_tokens == first.report.substituted_tokens
        assert second.report.reused_tokens >= first.report.prompt_tokens - 4
        assert sum(counts(second)) == second.report.prompt_tokens
        other = self.say(engine, first.text, self.FOLLOW_UP, session="t")
        assert other.report.reused_tokens < second.report.reused_tokens

    def test_it_goes_on_by_what_it_has_read_whatever_is_stored_by_now(
        self, engine: SemShareEngine, judge: pytest.MonkeyPatch
    ) -> None:
        first = call(engine, session="s")
        judge.setattr("semsharekv_integrations.reuse.rewording.say_the_same", lambda asked, stored: False)
        second = self.say(engine, first.text, self.FOLLOW_UP)
        assert second.report.substituted_tokens == first.report.substituted_tokens
        assert second.report.reused_tokens >= first.report.prompt_tokens - 4
        assert self.say(engine, first.text, self.FOLLOW_UP, session="t").report.substituted_tokens == 0

    def test_it_goes_on_once_more(self, engine: SemShareEngine) -> None:
        first = call(engine, session="s")
        second = self.say(engine, first.text, self.FOLLOW_UP)
        said = (news.QUESTION, first.text, self.FOLLOW_UP, second.text, "Why then ?")
        third = call(engine, None, *said, session="s")
        assert third.report.reused_tokens >= second.report.prompt_tokens - 4
        assert third.report.substituted_tokens == first.report.substituted_tokens

    def test_a_question_about_other_words_ends_it_there(self, make_engine: EngineMaker) -> None:
        engine = filled(make_engine, rules={"report_substitutions": True})
        first = call(engine, session="s")
        second = self.say(engine, first.text, "How long will repairs to the town hall of Prorna take ?")
        told = {each.read.strip() for each in second.report.substitutions}
        assert news.STORED["flood"][1] not in told

    def test_a_change_within_it_ends_it_there(self, engine: SemShareEngine) -> None:
        call(engine, session="s")
        texts = news.join_reworded()
        texts["flood"] = texts["flood"].replace("Help was on the way", "Help came at once")
        report = call(engine, texts, session="s").report
        start = engine._load().renderer.render(news.ask(texts), texts).segments[0].start
        assert report.prefix_tokens <= start + 30
        assert sum(counts(call(engine, texts, session="s"))) > 0


class TestForgetting:
    @pytest.mark.parametrize("key", ["flood", "fire"])
    def test_a_document_whose_words_were_read_takes_them_along(self, engine: SemShareEngine, key: str) -> None:
        """The prompt gives its documents other names: those of the stored ones must count."""
        texts = {f"my {name}": text for name, text in news.join_reworded().items()}
        assert call(engine, texts, session="s").report.substituted_tokens
        assert engine.stats()["store_tainted_entries"] == 1
        engine.forget(key)
        assert engine.stats()["store_tainted_entries"] == 0
        assert call(engine, texts, session="s").report.substituted_tokens == 0

    def test_words_that_the_prefix_has_without_the_whole_document_count_too(self, make_engine: EngineMaker) -> None:
        engine = filled(make_engine, start="Answer in one line .", rules={"min_run_tokens": 200})
        first, second, _ = news.STORED["flood"]
        text = " ".join([first, news.OTHER_WORDS[second], "Nothing else is known of it so far ."])
        texts = {"mine": text, "other": "Schools in the north will open again soon , as their heads said ."}
        assert call(engine, texts, "Will schools open in the north ?", session="s").report.fuzzy_tokens
        assert engine.stats()["store_tainted_entries"] == 1
        engine.forget("flood")
        assert engine.stats()["store_tainted_entries"] == 0

    def test_one_that_was_asked_in_other_words_does_too(self, engine: SemShareEngine) -> None:
        texts = {f"my {name}": text for name, text in news.join_reworded().items()}
        call(engine, texts, session="s")
        engine.forget("my flood")
        assert engine.stats()["store_tainted_entries"] == 0

    def test_its_text_counts_where_it_was_not_named(self, engine: SemShareEngine) -> None:
        texts = news.join_reworded()
        named = {key: text for key, text in texts.items() if key != "flood"}
        engine.generate(news.ask(texts), documents={**named, "mine": texts["flood"]}, session="s", **TOKENS)
        tainted = next(e for e in engine.store._entries.by_key.values() if e.reference.is_tainted)
        tainted.reference = tainted.reference.labelled({})  # as of an entry that names nobody
        form = engine._load().renderer.tokenize(texts["flood"])
        assert engine.store.forget("default", document_id="x", tokens=[form], text_of=engine._load().renderer.decode)
        assert engine.stats()["store_tainted_entries"] == 0


def test_the_prompt_as_it_is_read_never_outgrows_the_window(make_engine: EngineMaker) -> None:
    texts = news.join_reworded()
    full = call(make_engine("off"), news.join_stored()).report
    token_bytes, asked = full.kv_bytes // full.prompt_tokens, full.prompt_tokens
    grown = call(filled(make_engine, texts=texts), news.join_stored()).report.kv_bytes // token_bytes
    assert grown > asked, "else this shows nothing"
    for window in range(asked + 1, grown + 4):
        tight = filled(make_engine, texts=texts, max_context_tokens=window)
        report = call(tight, news.join_stored(), max_new_tokens=2).report
        read = report.kv_bytes // token_bytes
        assert read + report.output_tokens <= window and read <= max(asked, window - 2)


def test_kv_that_deviates_is_given_up_with_the_words(make_engine: EngineMaker) -> None:
    for rules in ({}, {"full_layers": 1}):
        engine = filled(make_engine, rules={"max_deviation": 1e-9, "report_substitutions": True, **rules})
        generation = call(engine)
        wanted = call(make_engine("off"))
        report = generation.report
        assert generation.token_ids == wanted.token_ids and report.prompt_tokens == wanted.report.prompt_tokens
        assert report.substituted_tokens == report.fuzzy_tokens == report.identical_tokens == 0
        assert not report.substitutions and "max_deviation" in str(report.declined)
        assert sum(counts(generation)) == report.prompt_tokens


def test_a_plan_that_is_declined_reads_what_was_asked(make_engine: EngineMaker) -> None:
    engine = filled(make_engine, rules={"max_compute_ratio": 0.01})
    generation = call(engine)
    assert generation.report.substituted_tokens == 0 and "max_compute_ratio" in str(generation.report.declined)
    assert generation.token_ids == call(make_engine("off")).token_ids


def test_every_way_to_call_reads_the_same(make_engine: EngineMaker, tmp_path: Any) -> None:
    wanted = call(filled(make_engine))
    engine = filled(make_engine)
    texts = news.join_reworded()
    *_, last = engine.stream(news.ask(texts), documents=texts, **TOKENS)
    assert last.generation.token_ids == wanted.token_ids and counts(last.generation) == counts(wanted)
    batch = filled(make_engine).generate_batch([news.ask(texts)] * 2, documents=texts, **TOKENS)
    assert [each.token_ids for each in batch] == [wanted.token_ids] * 2
    stored = filled(make_engine)
    stored.save(tmp_path / "kv")
    loaded = make_engine(reuse=stored.config.reuse)
    loaded.load(tmp_path / "kv")
    assert counts(call(loaded)) == counts(wanted)
    warmed = make_engine(reuse=stored.config.reuse)
    warmed.warm(news.join_stored())
    assert call(warmed).report.substituted_tokens == wanted.report.substituted_tokens
    retained = filled(make_engine, rules={"retention_ratio": 0.5})
    assert call(retained).report.kv_retained_ratio < 1


def test_a_shared_namespace_lends_its_words_and_others_do_not(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=ReuseConfig(mode="semantic", **RULES), store=StoreConfig(shared_namespace="all"))
    stored = news.join_stored()
    engine.generate(news.ask(stored), documents=stored, namespace="a", **TOKENS)
    assert call(engine, namespace="b").report.substituted_tokens == 0
    engine.generate(news.ask(stored), documents=stored, namespace="all", **TOKENS)
    engine.clear("b")
    assert call(engine, namespace="b").report.substituted_tokens > 0


def test_a_directory_holds_only_what_is_exact(make_engine: EngineMaker, tmp_path: Any) -> None:
    store = StoreConfig(directory=tmp_path / "kv")
    engine = filled(make_engine, store=store)
    first = call(engine, session="s")
    engine.close()
    again = make_engine(reuse=engine.config.reuse, store=store)
    second = call(again, session="s")
    assert second.report.substituted_tokens == first.report.substituted_tokens
    assert all(not reference.substitutions for reference in again.store.references())
    again.store.check()


def test_an_audit_compares_with_what_was_asked(make_engine: EngineMaker) -> None:
    from semsharekv_integrations import AuditConfig

    engine = filled(make_engine, audit=AuditConfig(sample_ratio=1.0, tokens=2, min_agreement=0.0))
    texts, seen = news.join_reworded(), []
    compute = engine._load().adapter.compute_logits
    engine._load().adapter.compute_logits = lambda ids, *rest: seen.append(ids) or compute(ids, *rest)  # type: ignore[method-assign, func-returns-value]
    assert call(engine).report.audit is not None
    assert np.array_equal(seen[-1], engine._load().renderer.render(news.ask(texts), texts).token_ids)


def test_plain_passages_are_read_so_too_but_not_what_speaks_to_the_model(make_engine: EngineMaker) -> None:
    order = "Use what is told here and write one line about it , as the news would have it , please ."
    others = {"asked": "Write one line about it , please , with what is told here , as the news would have it ."}
    engine = make_engine(reuse=ReuseConfig(mode="semantic", report_substitutions=True, **RULES))
    engine.generate("\n\n".join([order, *news.join_stored().values(), "Who was it ?"]), **TOKENS)
    prompt = "\n\n".join([others["asked"], *news.join_reworded().values(), news.QUESTION])
    with pytest.MonkeyPatch.context() as patch:
        same = lambda a, b: news.say_the_same(a, b) or (a, b) == (others["asked"], order)  # noqa: E731
        patch.setattr("semsharekv_integrations.reuse.rewording.say_the_same", same)
        report = engine.generate(prompt, **TOKENS).report
    assert {each.read.strip() for each in report.substitutions} == {news.STORED[k][1] for k in ("flood", "fire")}


def test_a_single_document_keeps_its_words(make_engine: EngineMaker) -> None:
    engine = filled(make_engine)
    text = {"flood": news.join_reworded()["flood"]}
    assert call(engine, text, "Who said so ?").report.substituted_tokens == 0


def test_the_switch_is_for_this_mode_alone() -> None:
    with pytest.raises(ValueError, match="report_substitutions is True; accepted is False, or True in mode 'semantic'"):
        EngineConfig(reuse=ReuseConfig(mode="identical", report_substitutions=True))
    for name, value in {"min_token_similarity": 0.3, "guard_facts": False, "lsh_bits": 64}.items():
        with pytest.raises(ValueError, match=rf"reuse.{name} is .*; accepted is None but in mode paper"):
            ReuseConfig(mode="semantic", **{name: value})
