"""What the page on serving shows works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from running_server import Serve
from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.cli.main import _make_parser

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def find_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.enable_socket
def test_the_client_of_the_page_gets_right_answers(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(SemShareEngine.from_pretrained("semsharekv/reference"), api_keys=(), model="semsharekv/reference")
    server.wait_until_loaded()
    (code,) = find_blocks("python")
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    first, second = capsys.readouterr().out.splitlines()
    assert "Anna Kelsen" in first and "42 million" in second
    assert "(0 of " in first and "(0 of " not in second


def test_the_commands_of_the_page_are_understood() -> None:
    for block in find_blocks("bash"):
        program, *arguments = shlex.split(block.split("#")[0])
        assert program == "semsharekv" and _make_parser().parse_args(arguments).command in ("serve", "demo")


def test_every_option_of_the_page_is_there() -> None:
    known = [_make_parser().parse_args([command]) for command in ("serve", "demo")]
    for option in set(re.findall(r"--([a-z][a-z-]+)", PAGE)):
        assert any(hasattr(each, option.replace("-", "_")) for each in known), option
