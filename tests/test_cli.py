"""The command line: what it prints for people and machines, and how it fails."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from semsharekv_integrations.cli import main
from semsharekv_integrations.demo import NUM_CALLS


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_demo_shows_prefix_reuse_and_equal_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--mode", "exact", "--json") == 0
    calls = json.loads(capsys.readouterr().out)
    assert len(calls) == NUM_CALLS
    assert all(call["same_as_off"] for call in calls)
    scenarios = {call["scenario"] for call in calls}
    for scenario in scenarios:
        assert all(call["right"] for call in calls if call["scenario"] == scenario and "ummar" not in call["question"])
        first, *later = [call["report"] for call in calls if call["scenario"] == scenario]
        assert first["prefix_tokens"] < first["prompt_tokens"] / 2
        assert all(report["prefix_tokens"] > report["prompt_tokens"] / 2 for report in later)
    assert len(scenarios) == 3


def test_demo_reuses_documents_in_another_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--json") == 0
    calls = json.loads(capsys.readouterr().out)
    assert all(call["same_as_off"] and call["report"]["mode"] == "identical" for call in calls)
    first, moved, again = [call["report"] for call in calls if "LangChain" in call["scenario"]]
    assert first["identical_tokens"] == 0
    assert moved["identical_tokens"] > moved["prompt_tokens"] / 3 > moved["prefix_tokens"]
    assert again["prefix_tokens"] > again["prompt_tokens"] / 2, "the first order is back"


def test_demo_table_names_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo") == 0
    shown = capsys.readouterr().out
    assert "LangChain" in shown
    assert "LlamaIndex" in shown
    assert f"{NUM_CALLS} of {NUM_CALLS} answers equal a full prefill's" in shown


def test_demo_in_mode_off_reuses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--mode", "off", "--json") == 0
    assert all(call["report"]["prefix_tokens"] == 0 for call in json.loads(capsys.readouterr().out))


def test_chat_reuses_the_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The mayor of Velmar is Anna Kelsen.\nWho is the mayor of Velmar?\n"))
    assert run("chat", "--json", "--max-new-tokens", "12") == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    report = second["kv_cache"]
    before = first["kv_cache"]["prompt_tokens"] + first["kv_cache"]["output_tokens"] - 1
    assert report["prefix_tokens"] >= before - 1
    assert report["prefix_tokens"] + report["recomputed_tokens"] == report["prompt_tokens"]


def test_chat_for_people_shows_reuse_and_outlives_a_bad_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    too_long = "Velmar " * 9000
    lines = [
        "The mayor of Velmar is Anna Kelsen. Who is the mayor of Velmar?",
        too_long,
        "/stats",
        "/reset",
        "Hello",
        "/exit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert run("chat", "--max-new-tokens", "12") == 0
    shown = capsys.readouterr().out
    assert "In Velmar, the mayor was Anna Kelsen." in shown
    assert "context window" in shown
    assert '"requests": 1' in shown
    assert shown.count("prompt tokens reused") == 2


def test_chat_keeps_its_store_in_the_file_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("Who is the mayor of Velmar?\n"))
        assert run("chat", "--json", "--max-new-tokens", "4", "--save", str(tmp_path / "kv")) == 0
        reports.append(json.loads(capsys.readouterr().out)["kv_cache"])
    assert reports[0]["prefix_tokens"] == 0
    assert reports[1]["recomputed_tokens"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ((), 2, "COMMAND"),
        (("fly",), 2, "fly"),
        (("demo", "--mode", "magic"), 2, "magic"),
        (("demo", "--documents", "0"), 2, "count is 0"),
        (("demo", "--dtype", "float99"), 2, "float99"),
        (("demo", "--model", "no/such/folder"), 1, "no/such/folder"),
    ],
)
def test_errors_are_one_line_that_names_the_fault(
    arguments: tuple[str, ...], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert named in captured.err
