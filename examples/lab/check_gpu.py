r"""Check the package on a GPU that is at hand for a few minutes: right answers first, then waits, time and memory.

    PYTHONPATH=. python examples/lab/check_gpu.py                                # all, an 8B shape in bfloat16
    PYTHONPATH=. python examples/lab/check_gpu.py --sections env correct
    PYTHONPATH=. python examples/lab/check_gpu.py --device cpu --preset tiny --pretend --lengths 600 1000
    PYTHONPATH=. python examples/lab/check_gpu.py --pretend --preset tiny --layers 32 --lengths 1900 --sections waits \
        --scenarios reordered --modes identical --lines

With ``--pretend`` the device is the simulated one of ``tests/support``, on the CPU: it counts waits and launches, and
refuses what CUDA would refuse. Prints what it finds as it goes, and adds the same to ``--out`` as JSON lines. A section
that fails is reported and the next one runs; none begins that ``--seconds`` leave no time for. The exit code is the
number of failed checks, at most 99.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from gpu.checks import Checks, open_out
from gpu.correct import SUPPORT, check_correct, check_families
from gpu.decoding import check_decoding
from gpu.kernels import check_kernels
from gpu.machine import check_machine
from gpu.speed import check_speed, check_tiers, check_without_cudnn
from gpu.subjects import TINY
from gpu.waits import check_waits
from semsharekv_integrations.terminal import HelpFormatter
from shapes import SHAPES
from sized import SIZED

MOST_FAILED = 99  # that an exit code tells


class Section(NamedTuple):
    """A part of the run, and the seconds that must be left for it."""

    run: Callable[[Checks], None]
    needs_s: float


SECTIONS: Mapping[str, Section] = MappingProxyType(
    {
        "env": Section(check_machine, 0),
        "correct": Section(check_correct, 20),
        "waits": Section(check_waits, 30),
        "speed": Section(check_speed, 40),
        "nocudnn": Section(check_without_cudnn, 60),
        "kernels": Section(check_kernels, 40),
        "decode": Section(check_decoding, 40),
        "tiers": Section(check_tiers, 30),
        "families": Section(check_families, 30),
    }
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pretend", action="store_true", help="simulate the device on the CPU")
    parser.add_argument("--preset", choices=(TINY, *SHAPES), default="llama-8b", help="the shape that is timed")
    parser.add_argument("--layers", type=int, default=4, help=f"of preset {TINY}, and with --quick")
    parser.add_argument("--seconds", type=float, default=560, help="that the run may take")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[1000, 5000, 16000, 32000], help="tokens of prompts")
    scenarios = ("next_turn", "reordered", "shared", "reworded_30")
    parser.add_argument("--scenarios", nargs="+", choices=SIZED, default=scenarios)
    modes = ("off", "exact", "identical", "semantic")
    parser.add_argument("--modes", nargs="+", choices=(*modes, "paper"), default=modes)
    parser.add_argument("--quick", action="store_true", help="random weights in section correct, few tokens")
    parser.add_argument("--cases", nargs="+", help="those of section correct, by name, instead of all")
    parser.add_argument("--families", nargs="+", help="architectures of that section, instead of all")
    parser.add_argument("--lines", action="store_true", help="print the lines that wait and launch")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections asked for; returns how many checks failed."""
    options = parse(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if options.pretend:
            sys.path.insert(0, str(SUPPORT))
            from simulated_device import pretended

            stack.enter_context(pretended())
        elif torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
            print("no CUDA device is here; accepted is --device cpu, with --pretend or without", file=sys.stderr)
            return 1
        out = open_out(options.out)
        if out is not None:
            stack.enter_context(out)
        checks = Checks(options, out)
        for name in options.sections:
            checks.run_section(name, *SECTIONS[name])
    print(f"\n{len(checks.failed)} failed: {checks.failed}", flush=True)
    return min(len(checks.failed), MOST_FAILED)


if __name__ == "__main__":
    sys.exit(main())
