# SPDX-License-Identifier: Apache-2.0
"""The sdist and the wheel of dist/, installed in an empty environment of each Python that is here.

    make test-dist                               # of those on the PATH
    make test-dist PYTHONS="python3.11 /opt/python3.13/bin/python"

The sdist is built by pip, as an index would serve it; the wheel goes where its tag fits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
USE = """
import torch, gradsampler as gs
from gradsampler import models
network = models.load_network()
z0 = torch.randn(2, 1, 8, 8, requires_grad=True)
denoiser = gs.EDM(network, network.sigma_data)
x = gs.sample(denoiser, z0, gs.schedules.karras(8), churn=gs.Churn(2.0), memory="checkpoint")
assert torch.autograd.grad(models.load_classifier()(x)[:, 7].sum(), z0)[0].abs().sum() > 0
assert gs.backends.available()["cpu"].startswith(("gcc", "clang")), gs.backends.available()
print(gs.__version__, gs.__file__)
"""


def python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def run(*command: str | Path, **options: object) -> str:
    """What a command prints; its errors are ours."""
    done = subprocess.run(
        [*map(str, command)], check=False, text=True, capture_output=True, **options
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def used(environment: Path) -> str:
    """Runs the package from a folder without the repository; where it was imported from."""
    with tempfile.TemporaryDirectory() as empty:
        told = run(python(environment), "-P", "-W", "error", "-c", USE, cwd=empty)
        run(environment / "bin" / "gradsampler", "doctor", cwd=empty)
    assert str(environment) in told, told
    return told.split()[0]


def tag(interpreter: str) -> str:
    return run(interpreter, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])")


def check(interpreter: str, torch: str, folder: Path) -> None:
    """Both files, in an environment of their own."""
    version = tag(interpreter)
    environment = folder / version
    shutil.rmtree(environment, ignore_errors=True)
    run(interpreter, "-m", "venv", environment)
    install = (python(environment), "-m", "pip", "install", "--quiet")
    run(*install, torch)
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    required = os.environ | {"GRADSAMPLER_REQUIRE_EXT": "1"}
    run(*install, sdist, env=required)
    print(f"{version}: sdist works, version {used(environment)}", flush=True)
    for wheel in (ROOT / "dist").glob(f"*-{version}-*.whl"):
        run(*install, "--force-reinstall", "--no-deps", wheel)
        print(f"{version}: {wheel.name} works, version {used(environment)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*")
    parser.add_argument("--torch", default="torch")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "installed")
    arguments = parser.parse_args()
    asked = arguments.pythons or [f"python3.{minor}" for minor in (11, 12, 13)]
    found = [path for name in asked if (path := shutil.which(name))]
    if not found:
        sys.exit(f"none of {', '.join(asked)} is here")
    for interpreter in found:
        check(interpreter, arguments.torch, arguments.folder.resolve())


if __name__ == "__main__":
    main()
