"""The site: every block on it is run or says why not, every option and name is there, every question is answered."""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from documentation import ELSEWHERE, PAGES, ROOT, TO_SUBMIT, find_blocks, find_unrun
from semsharekv_integrations import SemShareEngine
from semsharekv_integrations.cli.main import COMMANDS
from semsharekv_integrations.explaining import ADVICE

DOCS = ROOT / "docs"
RUN = {"python", "bash"}
NAMING = ("documents", "how_it_works", "questions", "troubleshooting")  # pages that name what is in code
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DATA = {".safetensors", ".xz", ".sqlite", ".json", ".jsonl", ".jinja", ".png", ".js", ".csv", ".svg", ".txt", ".ipynb"}
OF_PIP = {"--group"}
FOREIGN = {"thread_id", "session_id", "chat_store_key", "cache_control", "past_key_values"}  # of other packages
FOREIGN |= {"SummarizationMiddleware", "FunctionAgent"}
ENDING = re.compile(r"^\[.+?\]\(https://github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/\d+\)", flags=re.MULTILINE)


def list_places() -> dict[str, Path]:
    """Where the site has each page, and where that lies."""
    sys.path.insert(0, str(DOCS))
    try:
        shown = import_module("site_pages").list_pages()
    finally:
        sys.path.remove(str(DOCS))
    return {place: ROOT / path for path, place in sorted(shown.items()) if path.endswith(".md")}


def list_options() -> dict[str, set[str]]:
    """The options of each command."""
    found = {}
    for name, command in COMMANDS.items():
        parser = argparse.ArgumentParser()
        getattr(import_module(f"semsharekv_integrations.{command.module}"), command.add_arguments)(parser)
        found[name] = set(parser._option_string_actions) | {"--version"}
    return found


def find_code(page: Path) -> list[str]:
    """What a page shows as code, within its sentences and in blocks of shell commands."""
    text = page.read_text(encoding="utf-8")
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))
    lines = [line for language, code in find_blocks(page) if language == "bash" for line in code.splitlines()]
    return [" ".join(each.split()) for each in [*spans, *lines]]


def list_nav(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in list_nav(part)]  # type: ignore[attr-defined]


def split_questions() -> dict[str, str]:
    _, *parts = re.split(r"^### ", (DOCS / "questions.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    alone = [re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts]
    return {question: answer for question, _, answer in (part.partition("\n") for part in alone)}


@pytest.mark.parametrize("page", list_places().values(), ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    unrun = find_unrun(page)
    assert all(len(reason.split()) > 3 for reason in unrun.values()), "a reason is a sentence"
    for language, code in find_blocks(page):
        ran = page in PAGES or page.stem in ELSEWHERE
        assert language not in RUN or ran or code in unrun, code
    assert not re.search(r"^[ \t]+```", page.read_text(encoding="utf-8"), flags=re.MULTILINE), "a block in a list"


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=lambda page: page.stem)
def test_every_option_is_there(page: Path) -> None:
    known = list_options()
    scripts = "".join(path.read_text() for path in (ROOT / "examples").rglob("*.py"))
    of_scripts = set(re.findall(r'"(--[a-z][a-z-]+)"', scripts))
    for code in find_code(page):
        command = re.search(r"(?:^|\s|/)semsharekv ([a-z]+)\b", code)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", code.rpartition("&&")[2]))
        if command:
            assert named <= known[command[1]], code
        elif code.startswith("--"):
            assert named <= set.union(of_scripts, OF_PIP, *known.values()), code


@pytest.mark.parametrize("name", NAMING)
def test_every_name_is_there(name: str) -> None:
    folders = (ROOT / "semsharekv_integrations").rglob("*.py")
    words = set(re.findall(r"\w+", "".join(path.read_text() for path in folders))) | FOREIGN
    words |= set(SemShareEngine.from_pretrained("semsharekv/reference").stats())
    for code in find_code(DOCS / f"{name}.md"):
        for word in re.findall(r"(?<![\w/.-])[A-Za-z]\w*(?:_\w+|[a-z][A-Z]\w*)(?![\w/])", code):
            assert word in words, f"{word} in `{code}`"


def test_every_reason_to_decline_has_a_row() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    table = page.partition("| `declined` begins with |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)) == set(ADVICE)


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    own = {path.relative_to(DOCS).as_posix() for path in PAGES if path.is_relative_to(DOCS)}
    assert own <= set(list_nav(nav))
    first = [page for entry in nav for page in entry.values()]
    assert {"index.md", "questions.md", "troubleshooting.md"} <= {page for page in first if isinstance(page, str)}


def test_twenty_questions_of_users_are_answered() -> None:
    questions = split_questions()
    assert len(questions) >= 20 and all(question.endswith("?") for question in questions)


@pytest.mark.parametrize("question", split_questions())
def test_an_answer_names_its_source_and_leads_on(question: str) -> None:
    text = split_questions()[question]
    assert ENDING.findall(text), "no thread in which this was asked"
    answer = ENDING.sub("", text)
    assert re.search(r"\]\((?!https?:)[^)]+\)", answer), "leads nowhere"
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", answer)
    assert 5 <= len(plain.split()) <= 80, "an answer is one to three sentences"


def test_every_page_has_an_address_of_its_own() -> None:
    addresses = [re.sub(r"(^|/)index$", r"\1", page.removesuffix(".md")) for page in list_places()]
    assert len({address.rstrip("/") for address in addresses}) == len(addresses)


@pytest.mark.parametrize("page", TO_SUBMIT, ids=lambda page: page.stem)
def test_a_text_to_submit_runs_from_top_to_bottom(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = find_blocks(page)
    assert [code.strip() for language, code in blocks if language == "bash"] == [f"pip install -U {PROJECT['name']}"]
    exec(compile("".join(code for language, code in blocks if language == "python"), str(page), "exec"), {})
    printed = capsys.readouterr().out
    assert "Anna Kelsen" in printed and "42 million" in printed
    reused = re.findall(r"(\d+) (?:of \d+ tokens reused|tokens moved)", printed)
    assert reused and int(reused[-1]) > 0


def test_rows_to_submit_name_public_classes() -> None:
    rows = yaml.safe_load((DOCS / "integrations" / "langchain.yaml").read_text(encoding="utf-8"))["python"]
    classes = import_module("semsharekv_integrations.langchain")
    for row in [row for group in rows.values() for row in group]:
        assert (
            hasattr(classes, row["name"]) and row["pypi"] == PROJECT["name"] and row["docs_url"].startswith("https://")
        )


def test_every_file_of_data_has_a_licence() -> None:
    page = (DOCS / "licences.md").read_text(encoding="utf-8")
    names = ("semsharekv_integrations", "docs", "examples", "tests")
    folders = [ROOT / name for name in names]
    paths = [path for path in re.findall(r"`([\w./-]+/[\w./-]+)`", page) if not path.startswith("semsharekv/")]
    named = [next(place / path for place in (ROOT, ROOT / names[0]) if (place / path).exists()) for path in paths]
    found = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix in DATA]
    assert len(found) > 20
    for path in found:
        assert any(path.is_relative_to(place) for place in named), path
