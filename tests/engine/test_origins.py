"""``ReuseConfig.report_origins``: where each token's KV came from agrees with the report's counts, in every mode."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

import reworded_news as news
from semsharekv_integrations import Generation, ReuseConfig, ReuseReport, SemShareEngine
from tiny_models import EngineMaker

MODES = ("off", "exact", "identical", "semantic", "paper", "auto")
APPROXIMATE = ("identical", "semantic", "paper")
TOKENS = {"max_new_tokens": 4}
TEXTS = news.join_stored()


@pytest.fixture(autouse=True)
def judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semsharekv_integrations.reuse.rewording.say_the_same", news.say_the_same)


def settings_of(mode: str, **rules: Any) -> ReuseConfig:
    eager: dict[str, Any] = {"max_compute_ratio": 1.0, "max_deviation": 1e9} if mode in APPROXIMATE else {}
    eager |= {"min_similarity": 0.01} if mode in ("semantic", "paper") else {}
    return ReuseConfig(**{"mode": mode, "report_origins": True, **eager, **rules})


def ask(engine: SemShareEngine, texts: dict[str, str], *said: str, **options: Any) -> Generation:
    start = options.pop("start", "Answer in one line .")
    return engine.generate(news.ask(texts, *said, start=start), documents=texts, **{**TOKENS, **options})


def check(report: ReuseReport) -> ReuseReport:
    """The runs lie end to end, add up to the prompt and to each of its counts, and stand in its documents."""
    counted: Counter[str] = Counter()
    in_documents: Counter[str] = Counter()
    reused: Counter[str] = Counter()
    end = 0
    for run in report.origins:
        assert run.start == end and run.tokens > 0
        end += run.tokens
        counted[run.origin] += run.tokens
        if run.document_id is not None:
            in_documents[run.document_id] += run.tokens
            reused[run.document_id] += run.tokens * (run.origin != "computed")
    assert end == report.prompt_tokens == len(report.prompt_ids)
    wanted = {
        "prefix": report.prefix_tokens,
        "identical": report.identical_tokens,
        "fuzzy": report.fuzzy_tokens,
        "computed": report.recomputed_tokens,
    }
    assert counted == Counter({name: count for name, count in wanted.items() if count})
    assert [(use.document_id, use.tokens, use.reused_tokens) for use in report.documents] == [
        (use.document_id, in_documents[use.document_id], reused[use.document_id]) for use in report.documents
    ]
    told = report.to_dict()
    assert all(each.keys() == {"start", "tokens", "origin", "document_id"} for each in told["origins"])
    return report


@pytest.mark.parametrize("mode", MODES)
def test_origins_agree_with_the_counts(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=settings_of(mode))
    told = [ask(engine, TEXTS), ask(engine, TEXTS), ask(engine, dict(reversed(TEXTS.items())), start="You read .")]
    told.append(ask(engine, news.join_reworded(), start="And now ."))
    reports = [check(each.report) for each in told]
    assert {run.origin for run in reports[0].origins} == {"computed"}
    seen = {run.origin for report in reports for run in report.origins}
    wanted = {"identical": {"prefix", "identical"}, "semantic": {"prefix", "identical", "fuzzy"}}
    wanted |= {"off": set(), "exact": {"prefix"}, "auto": {"prefix"}, "paper": {"prefix", "fuzzy"}}
    assert seen - {"computed"} >= wanted[mode]


@pytest.mark.parametrize("mode", MODES)
def test_the_text_of_a_run_is_that_of_its_document(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=settings_of(mode))
    ask(engine, TEXTS)
    report = check(ask(engine, dict(reversed(TEXTS.items())), start="You read .").report)
    for key, text in TEXTS.items():
        ids = [
            i for run in report.origins if run.document_id == key for i in report.prompt_ids[run.start :][: run.tokens]
        ]
        assert engine.tokenizer.decode(ids).split() == text.split()


@pytest.mark.parametrize("mode", MODES)
def test_they_agree_in_sessions_streams_batches_and_arranged_prompts(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=settings_of(mode))
    first = ask(engine, TEXTS, session="one")
    check(first.report)
    again = dict(reversed(TEXTS.items()))
    other = ask(engine, again, start="You read .", session="two")  # approximate, and gone on from
    turns = ask(engine, again, news.QUESTION, other.text or "Yes .", "And why ?", start="You read .", session="two")
    assert check(turns.report).prompt_tokens > check(other.report).prompt_tokens
    prompts = [news.ask(TEXTS, question, start="All .") for question in ("Who ?", "When ?")]
    for generation in engine.generate_batch(prompts, documents=TEXTS, **TOKENS):
        check(generation.report)
    *_, last = engine.stream(prompts[0], **TOKENS)
    assert last.generation is not None
    check(last.generation.report)
    arranged = engine.arrange(again)
    check(ask(engine, arranged, "What ?").report)


@pytest.mark.parametrize("mode", APPROXIMATE)
@pytest.mark.parametrize("rules", [{"max_compute_ratio": 0.0}, {"max_deviation": 1e-9}])
def test_they_agree_where_reuse_is_declined(make_engine: EngineMaker, mode: str, rules: dict[str, float]) -> None:
    engine = make_engine(reuse=settings_of(mode, **rules))
    ask(engine, TEXTS)
    report = check(ask(engine, news.join_reworded(), start="You read .").report)
    assert report.declined


@pytest.mark.parametrize("mode", APPROXIMATE)
def test_they_agree_where_audits_suspend_reuse(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=settings_of(mode))
    engine.auditor.suspends = lambda namespace: True  # type: ignore[method-assign]
    for _ in range(2):
        report = check(ask(engine, TEXTS).report)
    assert {run.origin for run in report.origins} == {"prefix", "computed"}


def test_a_document_in_another_has_its_own_tokens(make_engine: EngineMaker) -> None:
    engine = make_engine(reuse=settings_of("exact"))
    outer = TEXTS["flood"]
    inner = outer[outer.index("The mayor") :]
    report = engine.generate(f"Read .\n\n{outer}\n\nWho ?", documents={"outer": outer, "inner": inner}, **TOKENS).report
    tokens: Counter[str | None] = Counter()
    for run in report.origins:
        tokens[run.document_id] += run.tokens
    stated = {use.document_id: use.tokens for use in report.documents}
    assert tokens["inner"] == stated["inner"] and tokens["outer"] == stated["outer"] - stated["inner"] > 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_told_unasked(make_engine: EngineMaker, mode: str) -> None:
    engine = make_engine(reuse=settings_of(mode, report_origins=False))
    ask(engine, TEXTS)
    report = ask(engine, TEXTS).report
    assert report.origins == () and report.prompt_ids == ()


def test_auto_tells_them_where_the_model_allows_no_more_than_exact() -> None:
    assert ReuseConfig(budget=0.3, report_origins=True).resolve(supported=False).report_origins
