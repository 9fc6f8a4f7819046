"""Versions: what pyproject.toml allows, what the tests run on, and that the two agree."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from semsharekv_integrations import versions

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EARLIER = {"torch"}  # its oldest version ran the checks of docs/gpu.md


def read_pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert all(len(requirement.specifier) == 1 for requirement in requirements)
    return {
        canonicalize_name(requirement.name): Version(next(iter(requirement.specifier)).version)
        for requirement in requirements
    }


def direct_requirements() -> list[Requirement]:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"].values()]
    groups += [[line for line in PROJECT["dependency-groups"][name] if isinstance(line, str)] for name in ("test",)]
    found = [Requirement(line) for group in groups for line in group]
    return [requirement for requirement in found if requirement.name != PROJECT["project"]["name"]]


REQUIREMENTS = direct_requirements()
CLIENTS = [Requirement(line) for line in PROJECT["dependency-groups"]["clients"] if "semsharekv" not in line]
CONSTRAINTS, FLOORS = read_pins("constraints.txt"), read_pins("floors.txt")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_every_requirement_is_bounded_and_tested_at_both_ends(requirement: Requirement) -> None:
    name = canonicalize_name(requirement.name)
    operators = {specifier.operator: Version(specifier.version) for specifier in requirement.specifier}
    assert set(operators) in ({">=", "<"}, {"=="}), "a floor and a cap, or one version"
    assert CONSTRAINTS[name] in requirement.specifier
    least = operators.get(">=", operators.get("=="))
    assert FLOORS[name] == least or name in EARLIER
    assert FLOORS[name] in requirement.specifier


@pytest.mark.parametrize("requirement", CLIENTS, ids=str)
def test_every_client_of_a_server_is_bounded_and_pinned(requirement: Requirement) -> None:
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}
    assert CONSTRAINTS[canonicalize_name(requirement.name)] in requirement.specifier


def test_transformers_is_capped_at_the_newest_minor_that_was_tested() -> None:
    (requirement,) = [found for found in REQUIREMENTS if found.name == "transformers"]
    (cap,) = [Version(found.version) for found in requirement.specifier if found.operator == "<"]
    tested = CONSTRAINTS["transformers"]
    assert (cap.major, cap.minor) == (tested.major, tested.minor + 1)


@pytest.mark.parametrize("end", ["_OLDEST", "_NEWEST"])
def test_the_engine_takes_the_versions_of_transformers_that_the_tests_ran_on(end: str) -> None:
    tested = {"_OLDEST": FLOORS, "_NEWEST": CONSTRAINTS}[end]["transformers"]
    assert getattr(versions, end) == tested.release[:2]


def test_both_commands_of_the_readme_install_the_constrained_versions() -> None:
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    installs = [part for command in commands for part in command.split("&&") if "-e " in part]
    assert len(installs) == 2 and all("-c constraints.txt" in install for install in installs)
