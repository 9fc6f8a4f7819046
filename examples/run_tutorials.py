"""Runs the cells of tutorials in this process, and writes what they print into the notebooks.

    python examples/run_tutorials.py                    # all of them, on the model that `semsharekv demo` takes
    python examples/run_tutorials.py examples/tutorials/1-*.ipynb

Do this after a change of a tutorial, or of what it prints. The tests run the same cells and compare. A tutorial has no
magics, and shows nothing but what it prints, so that a kernel would show the same.
``examples/tutorials/README.md`` says what to install.
"""

import argparse
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers

FOLDER = Path(__file__).parent / "tutorials"
_TIMES = re.compile(r" *\d+\.\d+ s\b| *\d+\.\d+ times\b")


def find_tutorials() -> list[Path]:
    """Return the notebooks, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def read_tutorial(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def get_code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run_cells(path: Path) -> Iterator[str]:
    """Run the code cells in order, in the notebook's folder and in one namespace; yield what each of them prints."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(get_code_cells(read_tutorial(path)), 1):
        code = compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec")
        with chdir(path.parent), redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        yield printed.getvalue()


def read_outputs(notebook: dict[str, Any]) -> list[str]:
    """Return what each code cell of the notebook shows."""
    cells = get_code_cells(notebook)
    return ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells]


def mask_times(printed: str) -> str:
    """Return the text without seconds and what is made of them, which differ from run to run."""
    return _TIMES.sub(" (time)", printed)


def describe_machine() -> dict[str, str]:
    """Return what answers may depend on: rounding differs between processors, and so, at a near tie, does a word."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return {"cpu": cpu, "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def write_outputs(path: Path, printed: Sequence[str]) -> None:
    """Write what the code cells printed into the notebook, and the machine that they ran on."""
    notebook = read_tutorial(path)
    for number, (cell, text) in enumerate(zip(get_code_cells(notebook), printed, strict=True), 1):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"], cell["execution_count"] = ([stream] if text else []), number
    notebook["metadata"]["executed_with"] = describe_machine()
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tutorials", nargs="*", type=Path, metavar="NOTEBOOK", help="default: all of them")
    args = parser.parse_args()
    if "SEMSHAREKV_MODEL" in os.environ:
        parser.error("SEMSHAREKV_MODEL is set; what the notebooks show comes from the demo's model")
    torch.set_num_threads(1)  # as in the tests
    for path in args.tutorials or find_tutorials():
        printed = []
        for text in run_cells(path.resolve()):
            print(text, end="", flush=True)
            printed.append(text)
        write_outputs(path, printed)


if __name__ == "__main__":
    main()
