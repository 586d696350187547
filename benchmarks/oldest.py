# SPDX-License-Identifier: Apache-2.0
"""Whether the oldest versions that pyproject.toml promises do, in the environment that runs this.

    make test-oldest

In a copy of the tree: the extension is built against that torch, with CUDA where nvcc is; the quick
tests run, and all of the kernels'; and every variant of the kernels that these launched by Triton's
interpreter is compiled for GPUs that need not be here. What fails stops it; else rows are appended.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import rows

ROOT = Path(__file__).parents[1]
TREE = Path(sys.prefix) / "tree"
ARCHS = "8.0;9.0;10.0"
KERNELS = ("step", "ancestral", "flow_pair", "leap")


def run(*command: str, **environment: str) -> str:
    """Runs Python in the copy of the tree; its output, which is shown as well."""
    print("$", *command, flush=True)
    process = subprocess.Popen(
        [sys.executable, "-P", *command], cwd=TREE, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    return "".join(lines)


def copied() -> None:
    """All files that git knows or does not ignore, so that the build here stays."""
    shutil.rmtree(TREE, ignore_errors=True)
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)


def built() -> list[str]:
    """Builds the extension; the GPU architectures that are in it."""
    run(
        "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--editable", ".",
        GRADSAMPLER_REQUIRE_EXT="1", TORCH_CUDA_ARCH_LIST=ARCHS,
    )  # fmt: skip
    found = run("-c", "from gradsampler.ops import native; print(native.facts()['cuda_archs'])")
    return [arch for arch in found.strip().split(";") if arch]


def passed(*options: str) -> int:
    """Runs tests, which record what they launch; the number that passed."""
    told = run("-m", "pytest", "-q", "-n", "2", *options, GRADSAMPLER_VARIANTS="build/variants")
    return int(re.findall(r"(\d+) passed", told)[-1])


def main() -> None:
    start = time.perf_counter()
    copied()
    archs = built()
    figures = {"architectures in the extension": len(archs)}
    figures["quick tests passed"] = passed("-m", "not thorough and not slow")
    kernels = [f"tests/test_kernel_{name}.py" for name in KERNELS]
    figures["thorough tests of the kernels passed"] = passed("-m", "thorough", *kernels)
    told = run("tests/compile_variants.py", "build/variants", PYTHONPATH="tests")
    (compiled, wanted) = re.findall(r"(\d+) of (\d+) compiled", told)[0]
    assert compiled == wanted
    figures["kernel variants compiled, of all architectures"] = int(compiled)
    figures["seconds"] = round(time.perf_counter() - start)
    table = [
        rows.row("oldest versions", "make test-oldest", "", "", name, "1", (float(value),) * 3)
        for name, value in figures.items()
    ]
    for name, value in figures.items():
        print(f"{name}: {value}")
    print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
