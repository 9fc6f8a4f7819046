"""The command line: what it prints for people and machines, and how it fails."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.cli import chat
from semsharekv_integrations.cli.main import main

COMMANDS = ("demo", "chat", "serve", "bench", "quality", "warm", "inspect", "clear")
CHAT = ("chat", "--max-new-tokens", "12")
MAYOR = "The mayor of Velmar is Anna Kelsen. Who is the mayor of Velmar?"


def run(*arguments: str) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def widest(text: str) -> int:
    return max(map(len, text.splitlines()), default=0)


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_chat_reuses_the_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "The mayor of Velmar is Anna Kelsen.", "", "Who is the mayor of Velmar?")
    assert run(*CHAT, "--json") == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    report = second["kv_cache"]
    before = first["kv_cache"]["prompt_tokens"] + first["kv_cache"]["output_tokens"] - 1
    assert report["prefix_tokens"] >= before - 1
    assert report["prefix_tokens"] + report["recomputed_tokens"] == report["prompt_tokens"]


def test_chat_for_people_shows_reuse_and_outlives_a_bad_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, MAYOR, "Velmar " * 9000, "/stats", "/reset", "Hello", "/exit")
    assert run("chat", "--max-new-tokens", "40") == 0
    shown = capsys.readouterr().out
    assert "Anna Kelsen." in shown
    assert "context window" in shown
    assert '"requests": 1' in shown
    assert shown.count("prompt tokens reused") == 2
    assert widest(shown) <= 80


def test_chat_for_machines_outlives_a_bad_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    typed(monkeypatch, "Velmar " * 9000, MAYOR, "/stats", "/reset")
    assert run(*CHAT, "--json", "--save", str(tmp_path / "kv")) == 0
    bad, good, stats, reset = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert stats["requests"] == 1 and reset == {"reset": True}, "a line for each line"
    assert "context window" in bad["error"] and good["kv_cache"]["prompt_tokens"] > 0
    assert (tmp_path / "kv").exists()


def test_chat_keeps_its_store_in_the_file_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports = []
    for _ in range(2):
        typed(monkeypatch, "Who is the mayor of Velmar?")
        assert run("chat", "--json", "--max-new-tokens", "4", "--save", str(tmp_path / "kv")) == 0
        reports.append(json.loads(capsys.readouterr().out)["kv_cache"])
    assert reports[0]["prefix_tokens"] == 0
    assert reports[1]["recomputed_tokens"] == 1


class Interrupting:
    """Streams of an engine, in which Ctrl-C comes after some pieces; ``closing`` once more while it ends the answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, after: int, closing: bool = False) -> None:
        self.real, self.after, self.closing, self.times = SemShareEngine.stream, after, closing, 1
        monkeypatch.setattr(SemShareEngine, "stream", lambda engine, *a, **k: self.stream(engine, *a, **k))

    def stream(self, engine: SemShareEngine, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            for number, chunk in enumerate(self.real(engine, *args, **kwargs)):
                if number == self.after and self.times:
                    self.times -= 1
                    raise KeyboardInterrupt
                yield chunk
        except KeyboardInterrupt:
            if self.closing:
                raise KeyboardInterrupt from None
            raise


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(
    as_json: bool, after: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Interrupting(monkeypatch, after=after)
    typed(monkeypatch, MAYOR, MAYOR)
    options = ("--json",) if as_json else ()
    assert run(*CHAT, *options, "--save", str(tmp_path / "kv")) == 0
    shown = capsys.readouterr().out
    if as_json:
        first, second = map(json.loads, shown.splitlines())
        assert first["finish_reason"] == "interrupted" and bool(first["text"]) == bool(after)
        assert second["finish_reason"] in ("stop", "length") and "Anna" in second["text"]
    else:
        assert shown.count("interrupted") == 1 and shown.count("prompt tokens reused") == 1
    assert (tmp_path / "kv").exists()


@pytest.mark.parametrize("leave", ["EOFError", "KeyboardInterrupt", "/exit", "twice", "broken"])
def test_whatever_ends_the_chat_what_it_holds_is_saved(
    leave: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines: list[Any] = [MAYOR, {"EOFError": EOFError, "KeyboardInterrupt": KeyboardInterrupt}.get(leave, leave)]

    def say(*_: Any) -> str:
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    def read_line(*_: Any, **__: Any) -> str:
        return f"{say()}\n"

    monkeypatch.setattr(chat, "_read_line", read_line)
    if leave == "twice":  # the second one while a first one ends the answer

        def answer(conversation: chat.Conversation, text: str, console: Any) -> None:
            conversation.say(text, lambda piece: None)
            raise KeyboardInterrupt

        monkeypatch.setattr(chat, "_answer_on_screen", answer)
    if leave == "broken":
        monkeypatch.setattr(chat, "_answer_on_screen", lambda *_: (_ for _ in ()).throw(OSError("pipe")))
    assert run(*CHAT, "--save", str(tmp_path / "kv")) == (leave == "broken")
    assert (tmp_path / "kv").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ((), 2, "COMMAND; see semsharekv --help"),
        (("fly",), 2, "fly"),
        (("demo", "--mode", "magic"), 2, "see semsharekv demo --help"),
        (("demo", "--documents", "0"), 2, "documents is 0"),
        (("demo", "--runs", "0"), 2, "runs is 0"),
        (("demo", "--port", "80"), 2, "--port is 80; accepted is nothing without --web"),
        (("demo", "--model", "semsharekv/reference", "--dtype", "float99"), 2, "float99"),
        (("demo", "--model", "no/such/folder"), 2, "no/such/folder"),
        (("chat", "--model", "no/such/folder"), 2, "no/such/folder"),
        (("chat", "--max-new-tokens", "0"), 2, "max_new_tokens is 0"),
        (("chat", "--temperature", "-1"), 2, "temperature is -1"),
        (("chat", "--save", "no/such/folder/kv"), 2, "no/such/folder/kv"),
        (("bench", "--model", "no/such/folder", "--groups", "1"), 2, "no/such/folder"),
        (("quality", "--quick", "--model", "no/such/folder"), 2, "no/such/folder"),
        (("quality", "--data", "no/such/file.jsonl"), 1, "no/such/file.jsonl"),
        (("inspect", "no/such/folder"), 2, "no/such/folder"),
        (("clear", "no/such/folder"), 2, "no/such/folder"),
    ],
)
def test_errors_name_the_fault_in_few_words_and_80_columns(
    arguments: tuple[str, ...], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.strip()]
    assert "Traceback" not in captured.err and named in captured.err
    assert widest(captured.err) <= 80
    assert sum(line.startswith("error: ") for line in errors) == 1
    assert all(line.startswith(("error: ", "  ")) for line in errors), "one message, and nothing beside it"


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_a_command_does_in_80_columns(
    command: str, columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run(*filter(None, [command]), "--help") == 0
    shown = capsys.readouterr().out
    _, about, *_ = shown.split("\n\n")
    assert widest(shown) <= 80 and "``" not in shown and not about.startswith(("options:", "positional"))


def test_measurements_fit_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    few = ("--groups", "1", "--questions", "1", "--max-new-tokens", "3", "--policies", "identical", "exact")
    for name in ("quality", "bench"):
        assert run(name, *few, "--scenarios", "text_reordered", "text_edited") == 0
        captured = capsys.readouterr()
        assert widest(captured.out) <= 80 and widest(captured.err) <= 80
        assert "text_reordered" in captured.out and "text_edited" in captured.out


def test_what_is_stored_is_told_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kept_prompts import config_of, opened, reference

    store = opened(config_of(directory=tmp_path))
    labels = {"document_starts": {f"a document with a long name, number {i}": 0 for i in range(9)}, "session": "s" * 99}
    assert store.put(reference((1, 2, 3), "namespace", **labels))
    store.close()
    assert run("inspect", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert widest(shown) <= 80
    whole = shown.replace("\n", "").replace(" ", "")
    assert "s" * 99 in whole and all(f"longname,number{i}" in whole for i in range(9))


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "semsharekv_integrations", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("semsharekv ")
    done = subprocess.run([sys.executable, "-m", "semsharekv_integrations", "fly"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")


def test_nothing_says_to_install_from_an_index_what_is_on_none() -> None:
    root = Path(chat.__file__).parent
    for path in root.rglob("*.py"):
        assert "semsharekv-integrations[" not in path.read_text(encoding="utf-8"), path
