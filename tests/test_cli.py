# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, writes and returns, also when it is interrupted or killed."""

import json
import math
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from matplotlib import image

import gradsampler
from gradsampler import models
from gradsampler.app import cli
from gradsampler.optimization import journal
from support.tiers import few

NUMBER = r"-?[\d.]+(?:e[+-]?\d+)?"
REPORT = re.compile(
    r"  1\. forward: sample of shape \[1, 2, 2, 8, 8\], requires_grad=True\n"
    r"  2\. anchor z0: shape \[1, 2, 2, 8, 8\], requires_grad=True, noise (\w+)\n"
    rf"  3\. loss and backward: loss {NUMBER}, gradient of shape \[1, 2, 2, 8, 8\]\n"
    rf"  4\. gradient: mean {NUMBER}, max {NUMBER}, min {NUMBER}\n"
    rf"  5\. optimiser update: mean absolute difference {NUMBER}\n"
    rf"  6\. differences: along z0 autograd {NUMBER}, central difference {NUMBER}, off by {NUMBER} "
    rf"where rounding explains {NUMBER}; 4 model calls along x, the worst off by {NUMBER} where "
    rf"rounding explains {NUMBER}\n"
    r"  the gradient arrives\n"
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small networks: two threads wait for each other, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """No test depends on the environment that the suite is started in."""
    monkeypatch.delenv("LEARNABLE_STEP_NOISE", raising=False)


@pytest.fixture
def run(capsys):
    """Runs the command line in this process: (exit status, stdout, stderr)."""

    def call(*argv):
        capsys.readouterr()
        try:
            status = cli.main([str(word) for word in argv])
        except SystemExit as leaving:  # argparse
            status = leaving.code
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a user's module, importable in this process only for the time of the test."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds the current folder
    grad_mode = torch.is_grad_enabled()

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    yield write
    torch.set_grad_enabled(grad_mode)


# ------------------------------------------------------------------ check


def test_check_reports_both_modes(run):
    status, out, err = run("check")
    assert (status, err) == (0, "")
    assert REPORT.findall(out) == ["Off", "SinCos"]
    headings = [line for line in out.splitlines() if not line.startswith(" ")]
    assert len(headings) == 2


def test_check_takes_the_second_mode_alone_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("LEARNABLE_STEP_NOISE", "1")
    status, out, err = run("check")
    assert (status, err) == (0, "")
    assert REPORT.findall(out) == ["SinCos"]
    assert "Off" not in out


@pytest.mark.parametrize("value", ["", "0"], ids=["empty", "0"])
def test_check_reports_both_modes_where_the_variable_is_off(run, monkeypatch, value):
    monkeypatch.setenv("LEARNABLE_STEP_NOISE", value)
    assert REPORT.findall(run("check")[1]) == ["Off", "SinCos"]


def test_check_says_the_same_each_time(run):
    assert run("check") == run("check")


def test_check_is_a_program():
    child = subprocess.run(
        [sys.executable, "-P", "-m", "gradsampler", "check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0
    assert REPORT.findall(child.stdout) == ["Off", "SinCos"]
    assert child.stderr == ""


def test_check_takes_a_denoiser_of_the_user_s_own(run, module):
    name = module(
        "checked_network",
        """
        import torch

        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)
                self.seen = []

            def forward(self, x, sigma):
                self.seen.append((tuple(x.shape), tuple(sigma.shape)))
                return self.layer(x)

        network = Network()
        """,
    )
    status, out, _ = run("check", "--denoiser", f"{name}:network", "--shape", "2,3,6,5")
    assert status == 0
    assert out.count("[2, 3, 6, 5]") == 6  # sample, z0, gradient, in each mode
    assert set(sys.modules[name].network.seen) == {((2, 3, 6, 5), (2,))}


@pytest.mark.parametrize("steps", [1, 3, 11])
def test_check_takes_a_number_of_steps(run, module, steps):
    name = module(
        "checked_levels",
        """
        levels = []

        def denoiser(x, sigma):
            levels.append(float(sigma[0]))
            return 0.5 * x
        """,
    )
    assert run("check", "--denoiser", f"{name}:denoiser", "--steps", steps)[0] == 0
    assert len(set(sys.modules[name].levels)) == steps  # the same levels in both modes


def test_check_finds_a_module_in_the_current_folder(run, module, tmp_path, monkeypatch):
    name = module("checked_here", "def denoiser(x, sigma):\n    return 0.5 * x\n")
    monkeypatch.chdir(tmp_path)
    sys.path.remove(str(tmp_path))
    assert run("check", "--denoiser", f"{name}:denoiser")[0] == 0


DETACHING = {
    "detach": "return 0.5 * x.detach()",
    "no_grad": "with torch.no_grad():\n        return 0.5 * x",
    "numpy": "return torch.as_tensor(0.5 * x.detach().numpy())",
}


@pytest.mark.parametrize("body", DETACHING.values(), ids=DETACHING)
def test_check_names_a_denoiser_that_detaches(run, module, body):
    name = module("checked_broken", f"import torch\ndef denoiser(x, sigma):\n    {body}\n")
    status, out, _ = run("check", "--denoiser", f"{name}:denoiser")
    assert status == 1
    assert out.count("broken: a denoiser that detaches, at step 0 of 4") == 2
    assert "arrives" not in out


def test_check_names_the_step_at_which_a_denoiser_detaches(run, module):
    name = module(
        "checked_late",
        """
        def denoiser(x, sigma):
            return 0.5 * (x.detach() if sigma[0] < 1 else x)
        """,
    )
    status, out, _ = run("check", "--denoiser", f"{name}:denoiser")
    assert status == 1
    # Karras levels of 4 steps: 80, 17.5, 2.52, 0.17; churn raises them by a fifth.
    assert out.count("broken: a denoiser that detaches, at step 3 of 4") == 2


def test_check_names_a_lack_of_grad_mode(run, module):
    name = module(
        "checked_offline",
        """
        import torch

        torch.set_grad_enabled(False)

        def denoiser(x, sigma):
            return 0.5 * x
        """,
    )
    status, out, _ = run("check", "--denoiser", f"{name}:denoiser")
    assert status == 1
    assert out.count("broken: no grad mode") == 2
    assert "arrives" not in out


def test_check_names_the_step_at_which_a_denoiser_gives_nan(run, module):
    name = module(
        "checked_nan",
        """
        def denoiser(x, sigma):
            return x * float("nan") if sigma[0] < 1 else 0.5 * x
        """,
    )
    status, out, err = run("check", "--denoiser", f"{name}:denoiser")
    assert status in (1, 2)
    assert "step 3 of 4" in out + err
    assert "finite" in out + err


BAD_CHECKS = {
    "no such module": (["--denoiser", "no_such_module:f"], "no_such_module"),
    "no such attribute": (["--denoiser", "math:no_such"], "no_such"),
    "no colon": (["--denoiser", "math.sqrt"], "package.module:callable"),
    "not callable": (["--denoiser", "math:pi"], "callable"),
    "letters in the shape": (["--shape", "2,x"], "--shape"),
    "empty shape": (["--shape", ""], "--shape"),
    "no state axis": (["--shape", "4"], "[B, *state]"),
    "no elements": (["--shape", "0,4"], "at least one element"),
    "a negative size": (["--shape", "2,-4"], "shape"),
    "no steps": (["--steps", "0"], "steps must be at least 1"),
    "letters in steps": (["--steps", "x"], "--steps"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_CHECKS.values(), ids=BAD_CHECKS)
def test_check_names_the_option_that_does_not_fit(run, argv, message):
    status, out, err = run("check", *argv)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_check_names_a_denoiser_that_returns_another_shape(run, module):
    name = module("checked_shape", "def denoiser(x, sigma):\n    return x[..., :1]\n")
    status, _, err = run("check", "--denoiser", f"{name}:denoiser")
    assert status == 2
    assert "denoiser" in err
    assert "[1, 2, 2, 8, 8]" in err


@pytest.mark.parametrize("argv", [[], ["chekc"], ["check", "--nose", "off"]], ids=repr)
def test_explains_itself(run, argv):
    status, _, err = run(*argv)
    assert status == 2
    assert "usage: gradsampler" in err


def test_tells_its_version(run):
    assert run("--version") == (0, f"{gradsampler.__version__}\n", "")


# ------------------------------------------------------------------ optimize

SMALL = ("--starts", 2, "--iterations", 3, "--steps", 6)


def written(folder, objective="digit"):
    """The history that a run wrote; beside it there must be a picture and nothing else."""
    assert sorted(p.name for p in folder.iterdir()) == [f"{objective}.json", f"{objective}.png"]
    pixels = image.imread(folder / f"{objective}.png")
    assert pixels.ndim == 3
    assert min(pixels.shape[:2]) >= 200
    assert pixels[..., :3].std() > 0.05, "the picture is blank"
    return json.loads((folder / f"{objective}.json").read_text())


def numbers(content):
    """What two runs with the same settings must share, to the last bit."""
    return [(s["loss"], s["gradient_norm"], s["z0_norm"]) for s in content["history"]]


@pytest.mark.parametrize("noise", ["off", "philox", "signed_roll", "sincos"])
def test_optimize_writes_picture_and_history(run, tmp_path, noise):
    status, out, _ = run("optimize", *SMALL, "--noise", noise, "--out", tmp_path / "out")
    assert status == 0
    content = written(tmp_path / "out")
    assert set(content) >= {"settings", "before", "after", "norms", "history"}
    assert content["gradsampler"] == gradsampler.__version__
    assert content["torch"] == torch.__version__
    assert content["settings"]["objective"] == "digit"
    assert content["settings"]["starts"] in (2, "2")
    assert len(content["history"]) == 3
    assert len(content["norms"]) == 2
    for step in content["history"]:
        assert set(step) == {"loss", "gradient_norm", "z0_norm", "seconds"}
        assert all(math.isfinite(value) for value in step.values())
    assert content["history"][-1]["loss"] < content["history"][0]["loss"]
    assert 0 <= content["before"]["mean p(7)"] < content["after"]["mean p(7)"] <= 1
    assert str(tmp_path / "out" / "digit.png") in out
    assert str(tmp_path / "out" / "digit.json") in out


@pytest.mark.parametrize("solver", ["heun", "ddim", "dpmpp_2m_sde", "euler_ancestral"])
def test_optimize_takes_a_solver(run, tmp_path, solver):
    status, _, err = run("optimize", *SMALL, "--solver", solver, "--out", tmp_path)
    assert status == 0, err
    assert len(written(tmp_path)["history"]) == 3


def test_optimize_gives_the_same_from_both_memories(run, tmp_path):
    histories = []
    for memory in ("store", "checkpoint"):
        out = tmp_path / memory
        assert run("optimize", *SMALL, "--memory", memory, "--out", out)[0] == 0
        histories.append(torch.tensor(numbers(written(out)), dtype=torch.float64))
    assert torch.allclose(*histories, rtol=1e-4, atol=0)


def test_optimize_depends_on_seed_and_digit(run, tmp_path):
    def first(*argv):
        out = tmp_path / "-".join(map(str, argv))
        assert run("optimize", *SMALL, *argv, "--out", out)[0] == 0
        return numbers(written(out))[0]

    seven = first("--seed", 0)
    assert first("--digit", 7) == seven
    assert first("--seed", 1)[2] != seven[2]
    assert first("--digit", 3)[0] != seven[0]


def test_optimize_diverges(run, tmp_path):
    status, out, _ = run("optimize", *SMALL, "--objective", "diverge", "--out", tmp_path)
    assert status == 0
    content = written(tmp_path, "diverge")
    losses = [step["loss"] for step in content["history"]]
    assert losses[0] == 0, "the first sample is the baseline"
    assert losses[-1] > losses[0]
    name = "mean squared difference from the baseline"
    assert content["before"][name] == 0
    assert content["after"][name] > losses[-1]
    assert name in out


@pytest.mark.parametrize("shape", [(8, 8), (31, 20), (16, 16, 4)], ids=str)
def test_optimize_matches_a_picture(run, tmp_path, shape):
    picture = tmp_path / "target.png"
    pixels = torch.zeros(shape)
    pixels[: shape[0] // 2] = 1
    if len(shape) == 3:
        pixels[..., 3:] = 1
        image.imsave(picture, pixels.numpy())
    else:
        image.imsave(picture, pixels.numpy(), cmap="gray", vmin=0, vmax=1)
    argv = ("--objective", "match", "--image", picture, "--out", tmp_path / "out")
    assert run("optimize", *SMALL, *argv)[0] == 0
    content = written(tmp_path / "out", "match")
    name = "mean squared difference from the picture"
    assert content["after"][name] < content["before"][name]
    assert content["history"][0]["loss"] == pytest.approx(content["before"][name], rel=1e-5)


def test_optimize_shows_a_bar_with_loss_and_gradient_norm(run, tmp_path):
    _, _, err = run("optimize", *SMALL, "--out", tmp_path)
    assert "3/3" in err
    assert "loss=" in err
    assert "grad=" in err


@pytest.fixture
def no_work(monkeypatch):
    """Any call of the network is a failure."""

    def called(*args, **kwargs):
        pytest.fail("the sampler was run before the arguments were checked")

    monkeypatch.setattr(models.DigitsNetwork, "forward", called)


def test_optimize_names_a_file_as_folder(run, tmp_path, no_work):
    (tmp_path / "file").write_text("kept")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        status, _, err = run("optimize", *SMALL, "--out", out)
        assert status == 2
        assert "--out must be a folder" in err
        assert str(out) in err
    assert (tmp_path / "file").read_text() == "kept"


BAD_OPTIONS = {
    "solver": (["--solver", "eulr"], "solver must be one of .*did you mean 'euler'"),
    "noise": (["--noise", "sinco"], "--noise must be one of .*did you mean 'sincos'"),
    "memory": (["--memory", "stor"], "memory must be one of .*did you mean 'store'"),
    "objective": (["--objective", "draw"], "--objective"),
    "digit": (["--digit", "12"], "--digit must be one of 0 .. 9, got 12"),
    "starts": (["--starts", "0"], "--starts must be at least 1, got 0"),
    "iterations": (["--iterations", "-1"], "--iterations must be at least 1, got -1"),
    "steps": (["--steps", "0"], "--steps must be at least 1, got 0"),
    "lr": (["--lr", "0"], "lr must be positive, got 0"),
    "no image": (["--objective", "match"], "--image must be given with --objective match"),
    "missing image": (
        ["--objective", "match", "--image", "none.png"],
        "--image must be .*none.png",
    ),
    "not an image": (["--objective", "match", "--image", __file__], "--image must be .*test_cli"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_optimize_names_the_option_that_does_not_fit(run, tmp_path, argv, message):
    status, out, err = run("optimize", *SMALL, *argv, "--out", tmp_path)
    assert status == 2
    assert out == ""
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("argv", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_optimize_names_it_before_it_works(run, tmp_path, argv, message, no_work):
    status, _, err = run("optimize", *SMALL, *argv, "--out", tmp_path)
    assert status == 2
    assert re.search(message, err)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"", b"PK\x03\x04" + bytes(40)],
    ids=["text", "empty", "head of an archive"],
)
def test_optimize_leaves_a_foreign_file_alone(run, tmp_path, content):
    path = tmp_path / "digit.checkpoint"
    path.write_bytes(content)
    status, _, err = run("optimize", *SMALL, "--out", tmp_path)
    assert status == 2
    assert "checkpoint must be" in err
    assert str(path) in err
    assert path.read_bytes() == content


# ------------------------------------------------------------------ interrupted and killed

CHILD = """
import os, signal, sys

import torch
from gradsampler.app import cli
from gradsampler.optimization import journal

torch.set_num_threads(1)
save, left = journal.Journal.save, int(sys.argv[2])


def save_and_die(self, state):
    global left
    save(self, state)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])


signal.signal(signal.SIGINT, signal.default_int_handler)
journal.Journal.save = save_and_die
sys.exit(cli.main(sys.argv[3:]))
"""
RESUMED = ("--starts", 2, "--iterations", 5, "--steps", 6)


def struck(name, saves, *argv):
    """A command whose process gets a real signal after some saves."""
    return subprocess.run(
        [sys.executable, "-P", "-c", CHILD, name, str(saves), *map(str, argv)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    """The numbers of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole")
    assert cli.main(["optimize", *map(str, RESUMED), "--out", str(out)]) == 0
    return json.loads((out / "digit.json").read_text())


@pytest.mark.parametrize(
    ("name", "status"),
    few([("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)], ("SIGINT", 130)),
    ids=["SIGINT", "SIGKILL"],
)
def test_optimize_goes_on_bit_for_bit(run, tmp_path, whole, name, status):
    child = struck(name, 2, "optimize", *RESUMED, "--out", tmp_path)
    assert child.returncode == status, child.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["digit.checkpoint"]
    assert "Traceback" not in child.stderr
    if name == "SIGINT":
        assert "interrupted" in child.stderr
    status, _, err = run("optimize", *RESUMED, "--out", tmp_path)
    assert status == 0
    assert "2/5" in err, "the bar must start where the run stopped"
    content = written(tmp_path)
    assert numbers(content) == numbers(whole)
    assert content["after"] == whole["after"]
    assert content["norms"] == whole["norms"]


def interrupted(run, monkeypatch, *argv):
    """The same command stopped after two steps, in this process."""
    save, left = journal.Journal.save, [2]

    def save_and_stop(self, state):
        save(self, state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(journal.Journal, "save", save_and_stop)
        assert run("optimize", *RESUMED, *argv)[0] == 130


def two_pictures(folder):
    for name, bright in (("one", 0), ("two", 1)):
        pixels = torch.zeros(8, 8)
        pixels[bright::2] = 1
        image.imsave(folder / f"{name}.png", pixels.numpy(), cmap="gray")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param((), ("--digit", 3), id="digit"),
        pytest.param(
            ("--objective", "match", "--image", "one.png"),
            ("--objective", "match", "--image", "two.png"),
            id="image",
        ),
        pytest.param((), ("--seed", 1), id="seed"),
        pytest.param((), ("--lr", 0.2), id="lr"),
        pytest.param((), ("--steps", 7), id="steps"),
        pytest.param((), ("--noise", "sincos"), id="noise"),
        pytest.param((), ("--solver", "heun"), id="solver"),
    ],
)
def test_optimize_does_not_go_on_with_another_run(run, tmp_path, monkeypatch, first, second):
    """Numbers of two runs in one history would be nobody's: refused, and the file kept."""
    monkeypatch.chdir(tmp_path)
    two_pictures(tmp_path)
    out = tmp_path / "out"
    interrupted(run, monkeypatch, *first, "--out", out)
    (path,) = out.iterdir()
    before = path.read_bytes()
    status, _, err = run("optimize", *RESUMED, *second, "--out", out)
    assert status == 2
    assert str(path) in err
    assert path.read_bytes() == before


# ------------------------------------------------------------------ the main job


@pytest.mark.thorough
def test_the_main_job_reaches_what_it_promises(run, tmp_path):
    status, _, _ = run("optimize", "--out", tmp_path)
    assert status == 0
    content = written(tmp_path)
    assert len(content["norms"]) == 16
    assert content["before"]["mean p(7)"] < 0.5
    assert content["after"]["mean p(7)"] >= 0.95
    assert min(content["norms"]) >= 0.95
    assert max(content["norms"]) <= 1.05
    assert content["settings"]["solver"].lower().replace("()", "") in ("res_2ab", "res2ab")
    assert "SignedRoll" in content["settings"]["noise"]
    assert content["settings"]["memory"] == "checkpoint"
    assert content["settings"]["steps"] in (35, "35")


# ------------------------------------------------------------------ plan


ROW = re.compile(r"(store|checkpoint|revolve:\d+) .* (\d+\.\d\d) +(\d+\.\d\d) +yes +(yes|no)")


def test_plan_prints_a_table_of_the_digits_model(run):
    status, out, err = run("plan", "--budget", "1MB", "--steps", 8, "--solver", "heun")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split()[0] == "memory"
    rows = [ROW.fullmatch(line) for line in lines[1:4]]
    assert [row[1] for row in rows] == ["store", "checkpoint", "revolve:12"]
    assert [float(row[2]) for row in rows] == [1.0, 2.0, 2.12]  # 34 calls for 16
    assert [row[4] for row in rows] == ["no", "yes", "yes"]  # 16 times 185 KiB and more
    assert lines[4].startswith("one call: activations 185 KiB, state 4 KiB, forward ")
    assert re.fullmatch("budget 977 KiB; best: (checkpoint|revolve:12)", lines[5])
    assert len(lines) == 6


def test_plan_measures_what_fits(run):
    status, out, err = run("plan", "--budget", "600kB", "--steps", 4, "--measure")
    assert status == 0
    fitting = [ROW.fullmatch(line)[1] for line in out.splitlines()[1:4] if line.endswith("yes")]
    assert fitting == ["checkpoint", "revolve:2"]
    measured = out.splitlines()[6:]
    assert [line.split(": ")[0] for line in measured] == fitting
    for line in measured:
        found, predicted = re.search(r"peak ([\d.]+) KiB, predicted ([\d.]+) KiB; ", line).groups()
        assert float(predicted) == pytest.approx(float(found), rel=0.1)
        assert re.search(r" s, predicted [\d.e-]+ s$", line)
    assert err.count("sampling: 100%") >= 2  # a bar for each


def test_plan_takes_a_denoiser_and_draws(run, module, tmp_path):
    name = module(
        "planned",
        """
        import torch
        calls = []
        def denoiser(x, sigma):
            calls.append(x.shape)
            return torch.tanh(x).cos()
        """,
    )
    picture = tmp_path / "plan.png"
    status, out, err = run(
        "plan", "--denoiser", f"{name}:denoiser", "--shape", "2,300", "--budget", "1GiB",
        "--plot", picture,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert out.splitlines()[-2:] == ["budget 1 GiB; best: store", f"wrote {picture}"]
    assert set(sys.modules[name].calls) == {(2, 300)}
    assert len(sys.modules[name].calls) == 2  # one to warm up, one that counts
    pixels = image.imread(picture)
    assert pixels.shape[:2] == (640, 1024)
    assert pixels.std() > 0.01


def test_plan_says_when_nothing_fits(run):
    status, out, err = run("plan", "--budget", "10kB", "--steps", 3)
    assert (status, err) == (1, "")
    assert "nothing exact fits: take a smaller batch" in out
    assert "gs.memory.Truncated" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "8 gigs"], "budget must be bytes, such as"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--shape", "4,x"], "--shape must be integers separated by commas"),
        (["--shape", "4"], "z0 must have shape [B, *state]"),
        (["--solver", "huen"], "did you mean 'heun'?"),
        (["--denoiser", "nowhere"], "--denoiser must have the form package.module:callable"),
        (["--denoiser", "math:pi"], "denoiser must be callable"),
        (["--denoiser", "math:tau_"], "has no attribute"),
        (["--plot", "/nowhere/plan.png"], "No such file or directory"),
    ],
)
def test_plan_names_the_bad_argument(run, options, message):
    status, _, err = run("plan", "--steps", 3, *options)
    assert status == 2
    assert err.startswith("gradsampler plan: ")
    assert message in err
