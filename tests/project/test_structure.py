"""The layout's rules: who may import whom, what an import may load, and how long things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import semsharekv_integrations

ROOT = Path(semsharekv_integrations.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.parts)
# From the top down. A module may import from lower layers and from its own.
LAYERS = (
    {"langchain", "llama_index", "metrics", "serving", "warming", "cli", "terminal", "__main__"},
    {"frameworks"},
    {"engine"},
    {"memory", "explaining"},
    {"last_report", "runtime"},
    {"call", "states"},
    {"arranging"},
    {"model", "request"},
    {"reuse"},
    {"text", "audit"},
    {"store"},
    {"concurrency"},
    {"kv", "logs"},
    {"report"},
    {"config", "sampling"},
    {"versions", "world"},
    {"errors"},
)
LAB = {"lab"}  # measures; imported by no other part
MOST_OF_LAB = 0.1  # of the package's lines
FRAMEWORKS = ("torch", "transformers", "langchain_core", "llama_index", "safetensors", "numpy")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MOST_FUNCTION_LINES = 400, 60, 40


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, runtime_only: bool = False) -> Iterator[str]:
    """Dotted names that a file imports, at any depth; without those for type checking alone if so asked."""
    nodes: list[ast.AST] = [parse(path)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if isinstance(node, ast.If) and checking and runtime_only:
            nodes += node.orelse
        else:
            nodes += ast.iter_child_nodes(node)


def parts_imported(path: Path) -> set[str]:
    dotted = [name.split(".") for name in imports(path) if name.startswith("semsharekv_integrations")]
    # a public name taken from the package itself stands for the module that defines it
    return {semsharekv_integrations._MODULE_OF.get(names[1], names[1]) for names in dotted if len(names) > 1}


def test_every_module_has_one_layer() -> None:
    names = [name for layer in (*LAYERS, LAB) for name in layer]
    assert sorted(names) == sorted({name_of(path) for path in FILES} - {"__init__"})


@pytest.mark.parametrize("path", [path for path in FILES if path != ROOT / "__init__.py"], ids=lambda p: p.stem)
def test_arrows_point_down_only(path: Path) -> None:
    name = name_of(path)
    for other in parts_imported(path) - {name}:
        if other == "__version__":
            assert level(name) == 0, f"{name} imports {other}"
        elif name not in LAB:
            assert other not in LAB, f"{name} imports {other}"
            assert level(name) < level(other) or level(name) == level(other) == 0, f"{name} imports {other}"


def test_the_lab_is_a_tenth_at_most() -> None:
    """What only we run stands in ``examples/lab``."""
    lines = {path: len(path.read_text().splitlines()) for path in FILES}
    assert sum(count for path, count in lines.items() if name_of(path) in LAB) <= MOST_OF_LAB * sum(lines.values())


def test_frameworks_do_not_import_each_other() -> None:
    for path in FILES:
        for one, other in (("langchain", "llama_index"), ("llama_index", "langchain")):
            if name_of(path) == one:
                assert other not in parts_imported(path)


def test_model_and_text_alone_know_transformers() -> None:
    for path in FILES:
        found = [name for name in imports(path, runtime_only=True) if name.split(".")[0] == "transformers"]
        assert name_of(path) in {"model", "text", "versions"} | LAB or not found, path


def test_the_core_needs_no_framework() -> None:
    top = LAYERS[0] | LAB
    for path in FILES:
        if name_of(path) not in top:
            assert not any(n.startswith(("langchain", "llama_index", "typer", "rich")) for n in imports(path)), path


def test_importing_the_package_loads_no_framework() -> None:
    code = f"import sys, semsharekv_integrations as s; dir(s); print([m for m in {FRAMEWORKS} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    for name in semsharekv_integrations.__all__:
        assert getattr(semsharekv_integrations, name).__name__ == name
    assert set(semsharekv_integrations.__all__) == set(semsharekv_integrations._MODULE_OF)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = semsharekv_integrations.nothing


def test_files_and_functions_stay_short() -> None:
    lengths = []
    for path in FILES:
        tree = parse(path)
        assert ast.get_docstring(tree) or not path.read_text().strip(), f"{path} has no docstring"
        if name_of(path) not in LAB:
            assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append((node.end_lineno or 0) - node.lineno + 1)
                assert lengths[-1] <= MAX_FUNCTION_LINES, f"{path}: {node.name}"
    assert sorted(lengths)[int(len(lengths) * 0.9)] <= MOST_FUNCTION_LINES
