"""The command line of a script that takes what ``semsharekv bench`` takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from semsharekv_integrations.lab import command
from semsharekv_integrations.lab.policies import POLICIES, Policy
from semsharekv_integrations.lab.texts import TEXTS
from semsharekv_integrations.terminal import HelpFormatter


def parse_arguments(
    description: str,
    arguments: Sequence[str] | None,
    policies: Mapping[str, Policy] = POLICIES,
    scenarios: Sequence[str] = TEXTS,
    more: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> argparse.Namespace:
    """Parse ``arguments``, by default those of this process.

    ``description`` stands above their help; ``more`` adds those that the script takes besides.
    """
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    command.add_arguments(parser, policies, scenarios)
    more(parser)
    parser.description = description
    parser.set_defaults(program=f"python {Path(sys.argv[0]).as_posix()}")
    return parser.parse_args(arguments)
