# SPDX-License-Identifier: Apache-2.0
"""The build of the optional extension; all else about the package is in pyproject.toml.

The extension is built where torch and a C++ compiler are present, with CUDA where torch has it and
nvcc is there. Otherwise the install is pure Python and the reason is kept beside the package.
GRADSAMPLER_REQUIRE_EXT=1 turns that into an error; GRADSAMPLER_NO_EXT=1 builds nothing.
GRADSAMPLER_CXXFLAGS is added to compiler and linker, for sanitizers.
"""

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
REQUIRED = os.environ.get("GRADSAMPLER_REQUIRE_EXT") == "1"
# The oldest torch whose stable ABI the ops use: one build serves it and all later ones.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"


class NotBuiltError(Exception):
    """Why there is no extension."""


def _import_torch():
    """torch; in an isolated build that of the environment which asked for the build.

    pip shares its interpreter with the build; `python -m build` makes another and passes on only
    the name of an activated environment. Its packages come last on sys.path: the isolated
    setuptools keeps its precedence. torch is no build requirement, because that would fetch a
    second torch, and another one; which one compiles does not matter to the stable ABI.
    """
    try:
        import torch
    except ImportError:
        prefixes = [os.environ.get("VIRTUAL_ENV", ""), sys.prefix, sys.base_prefix]
        for prefix in filter(None, prefixes):
            paths = sysconfig.get_paths(vars={"base": prefix, "platbase": prefix})
            for folder in (paths["purelib"], paths["platlib"]):
                site.addsitedir(folder)  # obeys .pth files, as that environment does
        try:
            import torch
        except ImportError as error:
            raise NotBuiltError(
                f"torch cannot be imported ({error}); in an isolated build, activate the "
                "environment that has it or pass --no-isolation"
            ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        raise NotBuiltError(f"torch must be at least 2.11, got {torch.__version__}")
    return torch


def _files(*patterns):
    return sorted(str(p.relative_to(HERE)) for pattern in patterns for p in HERE.glob(pattern))


def _toolkit(torch):
    """The folder of the CUDA toolkit, or None: under a CUDA torch with nvcc only."""
    if torch.version.cuda is None:
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named is None:
        # torch takes the folder above that of nvcc, which may be a script that runs another one.
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        command = [nvcc, "-dryrun", "-E", "-x", "cu", os.devnull]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        except OSError:
            return None
        top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
        named = os.path.realpath(top[1]) if top else os.path.dirname(os.path.dirname(nvcc))
    return Path(named) if (Path(named) / "bin" / "nvcc").exists() else None


def _cudart(torch, toolkit):
    """The CUDA runtime to link: torch's own where a wheel brought it, by its path.

    Such a wheel has no libcudart.so, which -lcudart would look for, and toolkits differ in whether
    lib64 is there.
    """
    major = torch.version.cuda.split(".")[0]
    packages = Path(torch.__file__).parents[1]
    found = sorted(packages.glob(f"nvidia/*/lib/libcudart.so.{major}"))
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        found += [toolkit / folder / "libcudart.so", toolkit / folder / f"libcudart.so.{major}"]
    return next((str(path) for path in found if path.exists()), None)


def _extension(torch):
    toolkit = _toolkit(torch)
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # read as the next line imports it
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    archs = toolkit and os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS)
    extra = os.environ.get("GRADSAMPLER_CXXFLAGS", "").split()
    facts = [f'-DGS_BUILD_TORCH="{torch.__version__}"', f'-DGS_CUDA_ARCHS="{archs or ""}"']
    host = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math"]
    host += ["-fvisibility=hidden", "-g0"]
    flags = {"cxx": [*host, TARGET, *facts, *extra]}
    files = _files("csrc/schemas.cpp", "csrc/ops.cpp", "csrc/bindings.cpp", "csrc/cpu/*.cpp")
    kind = CppExtension
    if archs:
        kind = CUDAExtension
        files += _files("csrc/ops_cuda.cpp", "csrc/cuda/*.cu")
        flags["cxx"] += ["-DUSE_CUDA", "-DGS_WITH_CUDA"]
        flags["nvcc"] = ["-std=c++20", "-O3", "-DUSE_CUDA", TARGET]
    extension = kind("gradsampler._C", files, extra_compile_args=flags, extra_link_args=extra)
    runtime = archs and _cudart(torch, toolkit)
    if runtime:
        extension.libraries.remove("cudart")
        extension.extra_objects.append(runtime)
    return extension


def _builder(torch):
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Goes on without the extension where it does not compile."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                if REQUIRED:
                    raise
                _give_up(
                    self,
                    f"the extension did not compile ({_first_line(error)}); "
                    "`pip install -v` shows the compiler's own words",
                )
            else:
                _reason_file(self).unlink(missing_ok=True)

    if shutil.which("ninja") is None:  # an environment's own, where its folder is not on the PATH
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    return Build.with_options(use_ninja=shutil.which("ninja") is not None)


class NoBuild(build_ext):
    """Records why there is nothing to build."""

    reason = ""

    def run(self):
        """Builds nothing."""
        _give_up(self, self.reason)


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason_file(command):
    folder = HERE if command.inplace else Path(command.build_lib)
    return folder / "gradsampler" / "_native_reason.txt"


def _give_up(command, reason):
    command.extensions = []
    path = _reason_file(command)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reason + "\n", encoding="utf-8")
    warnings.warn(
        f"gradsampler is installed without its native extension: {reason}. "
        "Everything works, more slowly; `gradsampler doctor` repeats this.",
        stacklevel=2,
    )


def _no_build(reason):
    NoBuild.reason = reason
    # A name without sources, so that setuptools runs the command at all.
    return {"ext_modules": [Extension("gradsampler._C", [])], "cmdclass": {"build_ext": NoBuild}}


def _arguments():
    if os.environ.get("GRADSAMPLER_NO_EXT") == "1":
        return _no_build("GRADSAMPLER_NO_EXT=1 was set at install")
    try:
        torch = _import_torch()
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None and shutil.which("g++") is None:
            raise NotBuiltError(f"no C++ compiler ({compiler}) was found")
        return {"ext_modules": [_extension(torch)], "cmdclass": {"build_ext": _builder(torch)}}
    except NotBuiltError as error:
        if REQUIRED:
            raise
        return _no_build(str(error))


setup(**_arguments())
