"""Fail unless wheel and sdist in a folder hold what git knows of the package and what comes with it, and no more."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

PACKAGE = "semsharekv_integrations"
MADE = {"PKG-INFO", "pyproject.toml", ".gitignore"}  # which a build adds to an sdist

included = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
listed = subprocess.run(["git", "ls-files", *included], text=True, capture_output=True, check=True)
known = set(listed.stdout.splitlines())
(wheel,), (sdist,) = Path(sys.argv[1]).glob("*.whl"), Path(sys.argv[1]).glob("*.tar.gz")
with zipfile.ZipFile(wheel) as opened:
    in_wheel = {name for name in opened.namelist() if ".dist-info/" not in name}
with tarfile.open(sdist) as opened:
    in_sdist = {member.name.split("/", 1)[1] for member in opened.getmembers() if member.isfile()}
wrong = [
    *(f"{wheel.name} or git alone has {name}" for name in in_wheel ^ {n for n in known if n.startswith(f"{PACKAGE}/")}),
    *(f"{sdist.name} or git alone has {name}" for name in (in_sdist - MADE) ^ known),
]
print("\n".join(sorted(wrong)) or f"{len(in_wheel)} files in the wheel, {len(in_sdist)} in the sdist")
sys.exit(bool(wrong))
