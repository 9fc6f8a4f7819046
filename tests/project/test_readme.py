"""Every block of the README and of docs/ is run, and every link in them leads somewhere.

Python blocks run here; so do shell commands, but for those that set up, which ``.ci/run`` runs.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

from documentation import ELSEWHERE, PAGES, README, ROOT, find_blocks, find_unrun
from semsharekv_integrations import ReuseReport
from semsharekv_integrations.cli.main import main

LANGUAGES = {"python", "bash", "text"}
ABROAD = {"questions": "https://github.com/"}  # pages that name where what they say comes from
MADE_UP = {"new.md", "examples/lab/results/NAME.md"}
ANSWERS = {"mayor of Velmar?": "Anna Kelsen", "cost in Velmar?": "42 million", "cost in Osteck?": "17 million"}


def find_anchors(page: Path) -> set[str]:
    """What ``#...`` may name on a page, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def find_code(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def cases(language: str) -> list[object]:
    pages = [page for page in PAGES if page.stem not in ELSEWHERE]
    blocks = [(page, name, code) for page in pages for name, code in find_blocks(page) if code not in find_unrun(page)]
    found = [(page, code) for page, name, code in blocks if name == language]
    return [pytest.param(page, code, id=f"{page.stem}-{code.splitlines()[0][:40]}") for page, code in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_names_a_known_language(page: Path) -> None:
    assert {language for language, _ in find_blocks(page)} <= LANGUAGES
    assert page.read_text(encoding="utf-8").count("```") == 2 * len(find_blocks(page)), "a fence is not seen as a block"


@pytest.mark.parametrize(("page", "code"), cases("python"))
def test_python_block_runs_and_answers(page: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, str(page), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    asked = [question for question in ANSWERS if question in code]
    assert asked and all(ANSWERS[question] in printed for question in asked), printed
    if "arm" in code and "reused_tokens" in code:  # what was warmed is shown to be reused
        assert any(map(int, re.findall(r"[,:] (\d+)[)}]", printed))), printed


@pytest.mark.parametrize(("page", "code"), cases("bash"))
def test_shell_block(
    page: Path, code: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.stdin.readline", lambda: "")
    (tmp_path / "articles").mkdir()
    (tmp_path / "articles" / "velmar.txt").write_text("The mayor of Velmar is Anna Kelsen.")
    monkeypatch.chdir(tmp_path)
    for line in filter(str.strip, code.splitlines()):
        program, *arguments = shlex.split(line.split("&&")[-1], comments=True)
        if program.endswith("pytest") and page == README:  # this very run
            return
        assert program in ("semsharekv", ".venv/bin/semsharekv")
        assert main([*arguments, "--json"]) == 0
        if "demo" in arguments:
            assert '"same_as_off": true' in capsys.readouterr().out


def test_setup_commands_begin_alike() -> None:
    setups = [code.strip() for _, code in find_blocks(README) if "pip install" in code]
    assert len(setups) == 2
    assert all("python3 -m venv .venv" in setup and "torch==2.13.0" in setup for setup in setups)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            assert target.startswith(ABROAD.get(page.stem, " ")), "what is needed lies in the repository"
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in find_anchors(file), target


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "CHANGELOG"], ids=lambda page: page.stem)
def test_every_file_that_is_named_is_there(page: Path) -> None:
    for path in re.findall(r"[\w./]+\.(?:py|md|toml|txt)\b", page.read_text(encoding="utf-8")):
        places = (page.parent, ROOT, ROOT / "semsharekv_integrations")
        assert any((place / path).is_file() for place in places) or path in MADE_UP, path


def test_recipes_name_what_is_there() -> None:
    code = "".join(path.read_text() for folder in ("semsharekv_integrations", "tests") for path in find_code(folder))
    words = set(re.findall(r"\w+", code))
    for named in re.findall(r"`([\w.]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        if not named.endswith((".py", ".md", ".toml", ".txt")) and "NAME" not in named:
            assert set(named.split(".")) <= words, named


@pytest.mark.parametrize("module", ["", ".langchain", ".llama_index", ".serving", ".warming"])
def test_the_api_page_has_every_public_name(module: str) -> None:
    """And each of them as what it is where it stands."""
    named = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M)
    public = import_module(f"semsharekv_integrations{module}")
    assert set(public.__all__) <= {path.rpartition(".")[2] for path in named}
    for path in named:
        place, _, name = path.rpartition(".")
        assert getattr(import_module(place), name).__module__ == place, path


def test_the_api_page_has_what_other_pages_show() -> None:
    """It says that all else may change, so what readers are told to import or to catch stands there."""
    named = set(re.findall(r"^::: \S+\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), flags=re.M))
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    imported = re.findall(r"^from semsharekv_integrations\S* import (.+)$", text, flags=re.M)
    shown = {name for names in imported for name in names.split(", ")}
    shown |= set(re.findall(r"^\| `(\w+Error)`", text, flags=re.M)) - {"ValueError"}
    assert len(shown) > 15 and shown <= named


def test_the_guide_has_every_field_of_a_report() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|((?: `\w+`,?)+) \|", guide.partition("| field | meaning |")[2], flags=re.M)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == {field.name for field in fields(ReuseReport)}


def test_every_page_is_reached_from_the_readme() -> None:
    linked, open_pages = {README}, [README]
    while open_pages:
        page = open_pages.pop()
        targets = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        found = {(page.parent / target).resolve() for target in targets} & {page.resolve() for page in PAGES}
        open_pages += found - linked
        linked |= found
    assert {page.resolve() for page in PAGES} <= {page.resolve() for page in linked}
