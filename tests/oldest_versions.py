# SPDX-License-Identifier: Apache-2.0
"""The oldest versions that pyproject.toml promises, as pip takes them; for ``make test-oldest``.

Without arguments all of them (torch==2.11 numpy==1.26 ...), else those of the named packages.
"""

import re
import sys
import tomllib
from pathlib import Path

ELSEWHERE = ("ruff", "mypy")  # they look at the code and do not run it


def oldest(requirement: str) -> tuple[str, str]:
    """Name and lowest of ``name>=lowest,<2; marker``."""
    return re.match(r"([\w-]+)\s*>=\s*([\w.]+)", requirement).groups()


def versions() -> list[str]:
    """Of what the build, the package and its tests need."""
    told = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    project, build = told["project"], told["build-system"]["requires"]
    extras = project["optional-dependencies"]
    named = [*build, *project["dependencies"]]
    for each in extras["test"]:  # of which one is another extra of ours
        inner = re.fullmatch(r"gradsampler\[(\w+)\]", each)
        named += extras[inner[1]] if inner else [each]
    lowest: dict[str, str] = {}
    for each in named:  # an extra may ask for a newer one than the package alone
        name, version = oldest(each)
        lowest[name] = max(
            lowest.get(name, "0"), version, key=lambda v: [int(part) for part in v.split(".")]
        )
    return [f"{name}=={version}" for name, version in lowest.items() if name not in ELSEWHERE]


if __name__ == "__main__":
    wanted = sys.argv[1:]
    print(*(each for each in versions() if not wanted or each.split("==")[0] in wanted))
