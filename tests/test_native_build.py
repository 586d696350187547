# SPDX-License-Identifier: Apache-2.0
"""What setup.py does where the extension cannot be built."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or not (ROOT / "csrc").exists(),
    reason="setup.py and csrc are not beside the tests",
)


def build(tmp_path, *options, **variables):
    pytest.importorskip("setuptools")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GRADSAMPLER_")}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(
        [sys.executable, *options, "-W", "always", "setup.py", "-q", "build_ext", *folders],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done, tmp_path / "lib" / "gradsampler" / "_native_reason.txt"


@pytest.mark.thorough
def test_a_compile_error_leaves_pure_python_one_warning_and_the_reason(tmp_path):
    done, reason = build(tmp_path, CXX="false", CC="false")
    assert done.returncode == 0, done.stderr
    assert "did not compile" in reason.read_text()
    assert done.stderr.count("installed without its native extension") == 1


def test_a_required_extension_is_an_error(tmp_path):
    done, reason = build(tmp_path, CXX="false", CC="false", GRADSAMPLER_REQUIRE_EXT="1")
    assert done.returncode != 0
    assert not reason.exists()


@pytest.mark.thorough
def test_no_compiler_at_all(tmp_path):
    done, reason = build(tmp_path, CXX="no-such-compiler", PATH="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert reason.read_text() == "no C++ compiler (no-such-compiler) was found\n"


def test_building_nothing_on_request(tmp_path):
    done, reason = build(tmp_path, GRADSAMPLER_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    assert reason.read_text() == "GRADSAMPLER_NO_EXT=1 was set at install\n"


@pytest.mark.thorough
def test_an_isolated_build_finds_the_torch_of_the_active_environment(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    # Like the interpreter that `python -m build` makes: setuptools, and no site-packages.
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (isolated / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    found = {"PYTHONPATH": str(isolated), "CXX": "false", "CC": "false"}
    done, reason = build(tmp_path, "-S", VIRTUAL_ENV=sys.prefix, **found)
    assert done.returncode == 0, done.stderr
    assert "did not compile" in reason.read_text()  # torch was there, the compiler was not
