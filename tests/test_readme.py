"""Every block of the README is run: Python here, shell commands here or, for setting up, by ``.ci/run``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from semsharekv_integrations.cli.main import main

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
PYTHON_BLOCKS = [code for language, code in BLOCKS if language == "python"]
ANSWERS = {"mayor of Velmar?": "Anna Kelsen", "cost in Velmar?": "42 million", "cost in Osteck?": "17 million"}
SHELL_BLOCKS = [code for language, code in BLOCKS if language == "bash"]


def test_only_known_languages() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}


@pytest.mark.parametrize("code", PYTHON_BLOCKS, ids=lambda code: code.split("\n")[0][:40])
def test_python_block_runs_and_answers(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    asked = [question for question in ANSWERS if question in code]
    assert asked and all(ANSWERS[question] in printed for question in asked), printed


@pytest.mark.parametrize("code", SHELL_BLOCKS, ids=lambda code: code.split("\n")[0][:40])
def test_shell_block(code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = code.strip().split("&&")[-1].split("#")[0].strip()
    program, *arguments = shlex.split(command)
    if program.endswith("pytest"):  # this very run
        return
    assert program in ("semsharekv", ".venv/bin/semsharekv")
    monkeypatch.setattr("sys.stdin.readline", lambda: "")
    assert main([*arguments, "--json"]) == 0
    if "demo" in arguments:
        assert '"same_as_off": true' in capsys.readouterr().out


def test_setup_commands_begin_alike() -> None:
    setups = [code.strip() for code in SHELL_BLOCKS if "pip install" in code]
    assert len(setups) == 2
    assert all("python3 -m venv .venv" in setup and "torch==2.13.0" in setup for setup in setups)
