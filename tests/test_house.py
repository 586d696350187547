# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, what is public, and what importing does."""

import ast
import doctest
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import gradsampler as gs

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------ the rooms and the arrows

# From the roof down. A module uses those of its own floor and of the floors below; "name.*" is a
# package. A new module outside the packages needs a place here.
FLOORS = [
    "__main__",
    "app.*",
    "integrations.*",
    "optimization.* gradient_flow gradient_health iteration decoding.* rewards",
    "comparisons differences",
    "sampling layout",
    "memory.*",
    "policies.*",
    "arguments adaptation",
    "distributed.*",
    "solvers.*",
    "engine.*",
    "flow",
    "ops.*",
    "kernels.*",
    "noise.*",
    "guidance",
    "batching",
    "parameterization schedules models.*",
    "timesteps",
    "coordinates elementary",
    "transforms",
    "contract _checks _uncompiled _version repetition redistribution",
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}

# Rooms that few may enter, however far below; and those which lean on little of ours.
GUESTS = {
    "kernels.*": "ops.backends",
    "ops.library": "ops.*",
    "ops.native": "ops.backends app.cli",
    "models.*": "app.* integrations.diffusers.digits_pipeline",
    "_version": "app.*",
}
ALONE = {"kernels.*": {"contract"}, "models.*": set()}

# Torch is everywhere; what else is used where, and whether only inside functions.
THIRD_PARTY = {
    "engine.*": {"tqdm"},
    "optimization.*": {"tqdm"},
    "models.*": {"safetensors"},
    "solvers.*": {"numpy"},
    "integrations.*": {"numpy", "tqdm"},
    "kernels.*": {"triton"},
}
THIRD_PARTY_IN_FUNCTIONS = {
    "app.*": {"matplotlib"},
    "gradient_health": {"matplotlib"},
    "memory.*": {"checkpoint_schedules"},
    "ops.*": {"triton"},
}


class Import(NamedTuple):
    name: str  # dotted, in full
    in_function: bool


def sources():
    """Every module of the package by its name without ``gradsampler.``, and its file."""
    folders = {"": ROOT / "gradsampler", "kernels.": ROOT / "kernels"}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield (prefix + ".".join(parts)).rstrip("."), path


SOURCES = dict(sources())
MODULES = sorted(name for name in SOURCES if name)


@cache
def tree(name):
    return ast.parse(SOURCES[name].read_text())


def walk(node, in_function=False):
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, (ast.FunctionDef, ast.Lambda))
        yield child, inside
        yield from walk(child, inside)


@cache
def imports(name):
    """What a module imports. ``from package import module`` counts as that module."""
    found = []
    for node, inside in walk(tree(name)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                known = full.removeprefix("gradsampler.") in SOURCES
                found.append(Import(full if known else node.module, inside))
    return found


def room(name):
    """The key of a module in the tables."""
    return name if name in FLOOR else f"{name.split('.')[0]}.*"


def ours(name):
    """The modules of ours that a module imports."""
    return {
        each.name.removeprefix("gradsampler.")
        for each in imports(name)
        if each.name.startswith("gradsampler.")
    } | {"" for each in imports(name) if each.name == "gradsampler"}


def matches(name, rules):
    return not {name, room(name)}.isdisjoint(rules.split())


def allowed(importer, imported):
    here, there = room(importer), room(imported)
    if here == there:
        return True
    if there not in ALONE.get(here, {there}) or FLOOR[there] < FLOOR[here]:
        return False
    return all(
        matches(importer, guests) for host, guests in GUESTS.items() if matches(imported, host)
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_what_its_floor_may(name):
    assert room(name) in FLOOR, f"{name} is new: give it a place in FLOORS"
    assert "" not in ours(name), "import modules, not the public package"
    wrong = sorted(each for each in ours(name) if not allowed(name, each))
    assert wrong == []


def test_the_table_names_no_module_that_is_gone():
    rooms = {room(name) for name in MODULES}
    assert set(FLOOR) == rooms
    assert {*THIRD_PARTY, *THIRD_PARTY_IN_FUNCTIONS, *ALONE} <= rooms
    named = {*GUESTS, *(guest for guests in GUESTS.values() for guest in guests.split())}
    assert named <= {*rooms, *MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_no_function_hides_a_module(name):
    """``gradsampler.a.b`` is the module of that path, and not what a package calls the same."""
    found = gs
    if name.startswith("kernels"):
        pytest.importorskip("triton")
    module = importlib.import_module(f"gradsampler.{name}") if name != "__main__" else None
    for part in name.split(".") if module else ():
        found = getattr(found, part)
    assert module is None or found is module


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_the_packages_that_it_may(name):
    key = room(name)
    anywhere = {"torch"} | THIRD_PARTY.get(key, set())
    inside = anywhere | THIRD_PARTY_IN_FUNCTIONS.get(key, set())
    for each in imports(name):
        top = each.name.split(".")[0]
        if top in sys.stdlib_module_names or top == "gradsampler":
            continue
        assert top in (inside if each.in_function else anywhere), each


def listed():
    """The files in DESIGN.md's list of the house, by their path in the package."""
    block = (
        (ROOT / "DESIGN.md").read_text().split("\n    gradsampler/\n")[1].split("\n    kernels/")[0]
    )
    folder = ""
    for line in block.splitlines():
        if head := re.match(r" {6}(\S+)", line):
            folder = head[1] if head[1].endswith("/") else ""
        yield from (folder + name for name in re.findall(r"\w+\.py\b", line))


def test_the_list_in_the_design_is_the_tree():
    package = ROOT / "gradsampler"
    tree = [str(path.relative_to(package)) for path in package.rglob("*.py")]
    inside = [path for path in tree if "/" not in path or not path.endswith("__init__.py")]
    assert sorted(listed()) == sorted(inside)


def test_the_arrows_form_no_circle():
    """Imports inside functions included: who needs one to break a circle has one."""
    graph = {name: {each for each in ours(name) if each in SOURCES} for name in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_the_rules_can_be_broken():
    """The test of the tests: arrows that must not be allowed."""
    for importer, imported in [
        ("noise.sources", "sampling"),
        ("solvers.euler", "memory.store"),
        ("sampling", "optimization.optimize"),
        ("sampling", "models.digits"),
        ("kernels.step", "noise.sources"),
        ("kernels.step", "_checks"),
        ("models.digits", "_checks"),
        ("contract", "noise.philox"),
        ("integrations.cosmos", "app.demo"),
        ("engine.adjoint", "memory"),
        ("engine.adjoint", "ops.library"),
        ("sampling", "kernels.step"),
        ("parameterization", "noise"),
    ]:
        assert not allowed(importer, imported), (importer, imported)
    for importer, imported in [
        ("noise.sources", "noise.philox"),
        ("solvers.euler", "solvers.base"),
        ("sampling", "memory"),
        ("memory", "memory.store"),
        ("kernels.step", "kernels.launch"),
        ("kernels.launch", "contract"),
        ("app.demo", "optimization.optimize"),
    ]:
        assert allowed(importer, imported), (importer, imported)


@pytest.mark.parametrize("folder", ["gradsampler", "kernels", "tests", "examples", "benchmarks"])
def test_no_file_is_called_utils(folder):
    assert not list((ROOT / folder).rglob("util*.py"))
    assert not list((ROOT / folder).rglob("helper*.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda p: p.stem)
def test_no_test_module_imports_another(path):
    """What they share lies in tests/support/."""
    named = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    parts = {part for name in named for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_") or part == "conftest"}


CITED = re.compile(r"(?<![\w.*/<-])((?:\w[\w-]*/)*\w+\.(?:md|py|h|cpp|cu|cuh))\b")
OURS = [*ROOT.glob("*.md"), *(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels").glob("*.py")]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_files_that_are_named_exist(path):
    folders = ("gradsampler", "kernels", "csrc", "tests", "benchmarks", "examples", "docs")
    tree = {p.name for folder in folders for p in (ROOT / folder).rglob("*.*")}
    tree |= {p.name for p in ROOT.iterdir()}
    assert {
        name for name in CITED.findall(path.read_text()) if Path(name).name not in tree
    } == set()


# ------------------------------------------------------------------ what is public

PUBLIC = [
    "EDM",
    "VP",
    "Churn",
    "Flow",
    "GradientWarning",
    "Guided",
    "Monitor",
    "MonitoredCall",
    "NoiseWarning",
    "NonFiniteError",
    "OptimizeResult",
    "OptimizeStep",
    "ReplayError",
    "StepInfo",
    "__version__",
    "backends",
    "check",
    "decode",
    "distributed",
    "health",
    "integrate",
    "iterate",
    "memory",
    "noise",
    "ops",
    "optimize",
    "policies",
    "regularizers",
    "rewards",
    "sample",
    "schedules",
    "solvers",
]


def test_the_public_surface_is_chosen():
    assert gs.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_exist_and_explain_themselves(name):
    value = getattr(gs, name)
    assert name == "__version__" or inspect.getdoc(value)


def test_nothing_else_looks_public():
    modules = {name.split(".")[0] for name in MODULES}
    extra = {name for name in vars(gs) if not name.startswith("_")} - set(PUBLIC) - modules
    assert extra == set()


@pytest.mark.parametrize("name", [m for m in MODULES if m != "__main__" and "kernels" not in m])
def test_what_a_module_lists_is_there(name):
    module = importlib.import_module(f"gradsampler.{name}")
    for each in getattr(module, "__all__", ()):
        assert hasattr(module, each), each


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_public_definition_has_a_docstring(name):
    bare = [] if ast.get_docstring(tree(name)) else ["the module"]
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            bare += [] if ast.get_docstring(node) else [node.name]
    assert bare == []


@pytest.mark.parametrize("name", [m for m in sorted(SOURCES) if m != "__main__"])
def test_the_examples_in_docstrings_run(name):
    if name.startswith("kernels"):
        pytest.importorskip("triton")
    module = importlib.import_module(f"gradsampler.{name}".rstrip("."))
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner()
    for test in finder.find(module, module.__name__):
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_the_calls_that_users_type_have_an_example():
    for call in (gs.sample, gs.optimize, gs.ops.step, gs.EDM, gs.schedules.karras):
        assert ">>>" in inspect.getdoc(call)


# ------------------------------------------------------------------ what importing does


def python(code, *options, cwd=None):
    """Runs code in an interpreter of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-P", *options, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment,
    )


def test_importing_prints_nothing_and_loads_nothing_heavy():
    heavy = ["matplotlib", "sklearn", "scipy", "triton", "PIL", "gradsampler.kernels"]
    heavy += ["gradsampler.ops.native", "gradsampler._C"]
    child = python(
        "import sys, torch; before = set(sys.modules); state = torch.get_rng_state()\n"
        "import gradsampler, gradsampler.app.cli\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
        f"loaded = [m for m in {heavy} if m in set(sys.modules) - before]\n"
        "assert not loaded, loaded",
        "-W",
        "error",
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_the_kernels_lie_at_the_top():
    pytest.importorskip("triton")
    module = importlib.import_module("gradsampler.kernels.launch")
    assert Path(module.__file__).samefile(ROOT / "kernels" / "launch.py")


LOOK = (
    "import importlib.util; spec = importlib.util.find_spec('kernels')\n"
    "import kernels; print(spec.origin, getattr(kernels, '__file__', None))"
)


def test_the_folder_of_the_kernels_is_no_package():
    """Who looks for a package ``kernels`` from the repository's root finds a folder."""
    child = python("import sys; sys.path.insert(0, '')\n" + LOOK, cwd=ROOT)
    assert (child.returncode, child.stdout, child.stderr) == (0, "None None\n", "")


def test_the_folder_of_the_kernels_hides_no_package(tmp_path):
    real = tmp_path / "kernels" / "__init__.py"
    real.parent.mkdir()
    real.touch()
    child = python(
        f"import sys; sys.path[:] = ['', {str(tmp_path)!r}, *sys.path]\n{LOOK}", cwd=ROOT
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, f"{real} {real}\n", "")


@pytest.mark.thorough
@pytest.mark.parametrize("safe", [True, False], ids=["-P", "plain"])
@pytest.mark.parametrize("installed", [True, False], ids=["installed", "bare"])
def test_transformers_looks_for_a_package_of_that_name(installed, safe):
    """Without the site's .pth files there is no editable install of ours."""
    options = ["-P"] * safe + ["-S"] * (not installed)
    found = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path += {found if not installed else []}\n"
        "from transformers import CLIPTextModel\n"
        "from transformers.utils import is_kernels_available\n"
        "import importlib.metadata as metadata\n"
        "assert is_kernels_available() <= ('kernels' in metadata.packages_distributions())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    command = [sys.executable, *options, "-c", code]
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr) == (0, "")


# ------------------------------------------------------------------ the package


@cache
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version_is_told_everywhere():
    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "gradsampler._version.__version__"
    }
    assert importlib.metadata.version("gradsampler") == gs.__version__
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [h for h in headings if h.strip("[]").lower() != "unreleased"]
    assert re.match(r"\[?([\w.]+)\]?", released[0])[1] == gs.__version__


def test_every_package_is_installed():
    packages = {f"gradsampler.{n}".rstrip(".") for n, p in SOURCES.items() if p.stem == "__init__"}
    assert set(project()["tool"]["setuptools"]["packages"]) == packages


def test_what_lies_beside_the_modules_is_installed():
    data = project()["tool"]["setuptools"]["package-data"]
    for folder in {path.parent for path in SOURCES.values()}:
        package = ".".join(folder.relative_to(ROOT).parts)
        for path in folder.iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc", ".so"):
                patterns = data.get(package, ())
                assert any(path.match(pattern) for pattern in patterns), path


def test_third_party_packages_are_declared():
    declared = {
        re.match(r"[\w-]+", d)[0].replace("-", "_") for d in project()["project"]["dependencies"]
    }
    used = {each.name.split(".")[0] for name in SOURCES for each in imports(name)}
    used -= {*sys.stdlib_module_names, "gradsampler", "triton"}
    assert used <= declared
