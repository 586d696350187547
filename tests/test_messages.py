# SPDX-License-Identifier: Apache-2.0
"""What a run says to tensors and outputs of unusual kinds, and which of them it takes."""

import copy
import inspect
import pickle
import re
import warnings
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch

import gradsampler as gs
from gradsampler import solvers
from gradsampler.integrations import _reverse
from gradsampler.ops import backends
from support.problems import normal
from support.runs import levels

SIGMAS = levels([3.0, 1.5, 0.6])
MEMORIES = ["store", "checkpoint", "revolve:1"]
memories = pytest.mark.parametrize("memory", MEMORIES)
CHURN = gs.Churn(1.0)
E5M2 = torch.float8_e5m2


def inferred(*shape):
    with torch.inference_mode():
        return normal(*shape) + 0


class Calls:
    def __init__(self, inner=lambda x, sigma, **cond: torch.tanh(x)):
        self.count, self.inner = 0, inner

    def __call__(self, x, sigma, **cond):
        self.count += 1
        return self.inner(x, sigma, **cond)


def gradient(denoiser, wanted=(), z0=None, **options):
    z0 = (normal(2, 4) if z0 is None else z0).detach().clone().requires_grad_()
    x = gs.sample(denoiser, z0, SIGMAS, **options)
    return torch.autograd.grad(x.square().sum(), [z0, *wanted])


# ------------------------------------------------------------------ what a denoiser returns


@dataclass
class UNetOutput:
    sample: torch.Tensor


class ModelOutput(OrderedDict):
    """As transformers and diffusers have it: a dict whose values are attributes too."""

    def __getattr__(self, name):
        return self[name] if name in self else super().__getattribute__(name)


RETURNED = {
    "object": (lambda x: UNetOutput(x), "got UNetOutput with .sample [2, 4]; return its .sample"),
    "dict object": (
        lambda x: ModelOutput(sample=x),
        "got ModelOutput with .sample [2, 4]; return its .sample",
    ),
    "tuple": (
        lambda x: (x, x[:1], None),
        "got tuple of tensor [2, 4], tensor [1, 4], NoneType; return one of these, as out[0]",
    ),
    "list": (lambda x: [x], "got list of tensor [2, 4]; return one of these"),
    "dict": (lambda x: {"x": x}, "got dict of 'x': tensor [2, 4]; return one of its values"),
    "None": (lambda x: None, "got NoneType"),
    "text": (lambda x: "x", "got str"),
    "float8": (lambda x: x.to(E5M2), "got torch.float8_e5m2; call .to(torch.bfloat16)"),
    "sparse": (lambda x: x.to_sparse(), "must be dense, got torch.sparse_coo; call .to_dense()"),
    "meta": (lambda x: x.to("meta"), "must be on cpu, got meta"),
}


@memories
@pytest.mark.parametrize(("made", "words"), RETURNED.values(), ids=RETURNED)
def test_what_a_denoiser_returned_is_named_with_the_way_out(made, words, memory):
    with pytest.raises((TypeError, ValueError)) as caught:
        gradient(lambda x, sigma: made(0.5 * x), memory=memory)
    assert str(caught.value).startswith("denoiser: the output at step 0 must ")
    assert words in str(caught.value)


# ------------------------------------------------------------------ tensors of unusual kinds

REFUSED = {
    "z0 on meta": (
        {"z0": torch.zeros(2, 4, device="meta")},
        "z0 must hold values, got a tensor on the device meta",
    ),
    "sparse z0": ({"z0": normal(2, 4).to_sparse()}, "z0 must be dense, got torch.sparse_coo"),
    "float8 z0": ({"z0": normal(2, 4).to(E5M2)}, "z0 must have a dtype of 16 bits or more, got"),
    "float8 state": ({"state_dtype": E5M2}, "state_dtype must be a floating-point dtype of 16"),
    "cond on meta": (
        {"cond": {"c": [{"d": torch.zeros(3, device="meta")}]}},
        "cond['c'][0]['d'] must hold values, got a tensor on the device meta",
    ),
    "float8 cond that requires grad": (
        {"cond": {"c": torch.ones(4).to(E5M2).requires_grad_()}},
        "cond['c'] must have 16 bits or more to require grad, got torch.float8_e5m2; its gradient",
    ),
}


@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
@memories
def test_what_a_run_cannot_take_is_refused_before_any_call(options, words, memory):
    denoiser = Calls()
    z0 = options.get("z0", normal(2, 4)).detach().requires_grad_()
    rest = {k: v for k, v in options.items() if k != "z0"}
    with pytest.raises(ValueError, match=re.escape(words)):
        gs.sample(denoiser, z0, SIGMAS, memory=memory, **rest)
    assert denoiser.count == 0


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (normal(2, 4).to(E5M2), "Given: tensors[0] must have a dtype of 16 bits"),
        (normal(2, 4).to_sparse(), "Given: tensors[0] must be dense"),
    ],
)
def test_given_noise_of_an_unusual_kind(tensor, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        gs.noise.Given([tensor])


def half(x, sigma):
    return 0.5 * x


def scaled(x, sigma, c):
    return torch.tanh(x) * c


@memories
def test_conditioning_made_in_inference_mode_is_taken(memory):
    """As ComfyUI makes it. The gradient is that of an ordinary tensor of the values."""
    c = inferred(4)
    want = gradient(scaled, memory=memory, cond={"c": c.clone()})
    assert torch.equal(gradient(scaled, memory=memory, cond={"c": c})[0], want[0])


@memories
def test_noise_and_z0_made_in_inference_mode_are_taken(memory):
    tensors = [inferred(2, 4), inferred(2, 4)]
    (got,) = gradient(
        half, z0=inferred(2, 4), memory=memory, noise=gs.noise.Given(tensors), churn=CHURN
    )
    noise = gs.noise.Given([x.clone() for x in tensors])
    (want,) = gradient(half, z0=normal(2, 4), memory=memory, noise=noise, churn=CHURN)
    assert torch.equal(got, want)
    with torch.inference_mode():
        gs.sample(half, normal(2, 4), SIGMAS, memory=memory, noise=noise, churn=CHURN)


@memories
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("sparse", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr])
def test_sparse_conditioning_is_taken_and_receives_its_gradient(sparse, memory):
    dense = normal(4, 4).requires_grad_()
    matrix = sparse(dense.detach()).requires_grad_()

    def mixed(x, sigma, c):
        return torch.tanh((c @ x.T).T)

    want = gradient(mixed, [dense], memory=memory, cond={"c": dense})
    got = gradient(mixed, [matrix], memory=memory, cond={"c": matrix})
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to_dense(), b, rtol=1e-12, atol=1e-12)


@memories
def test_float8_conditioning_is_taken_as_data(memory):
    c = normal(4).to(E5M2)

    def cast(x, sigma, c):
        return torch.tanh(x) * c.to(x.dtype)

    got = gradient(cast, memory=memory, cond={"c": c})
    assert torch.equal(got[0], gradient(scaled, memory=memory, cond={"c": c.double()})[0])


# ------------------------------------------------------------------ noise of the user's own


class Own(gs.noise.NoiseSource):
    def __init__(self, made):
        self.made = made

    def at(self, z0, step, num_steps):
        return self.made(z0) if step else torch.zeros_like(z0)


NOISES = {
    "shape": (lambda z0: z0[:, :2], "have shape [2, 4], got [2, 2]"),
    "shape that would broadcast": (lambda z0: z0[:1], "have shape [2, 4], got [1, 4]"),
    "integers": (lambda z0: z0.long(), "have a floating-point dtype, got torch.int64"),
    "bool": (lambda z0: z0 > 0, "have a floating-point dtype, got torch.bool"),
    "complex": (lambda z0: z0 + 0j, "have a floating-point dtype, got torch.complex128"),
    "None": (lambda z0: None, "be a torch.Tensor, got NoneType"),
    "number": (lambda z0: 1.0, "be a torch.Tensor, got float"),
    "array": (lambda z0: z0.detach().numpy(), "be a torch.Tensor, got ndarray"),
    "meta": (lambda z0: z0.to("meta"), "be on cpu, got meta"),
}
CPU_BACKENDS = [name for name in ("reference", "cpu") if backends.present(name)]


@memories
@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("made", "words"), NOISES.values(), ids=NOISES)
def test_noise_of_the_user_s_own_is_checked_alike_everywhere(made, words, backend, memory):
    denoiser = Calls()
    options = {"noise": Own(made), "churn": CHURN, "memory": memory, "backend": backend}
    with pytest.raises((TypeError, ValueError)) as caught:
        gradient(denoiser, **options)
    assert str(caught.value) == f"noise=Own: what at returns at step 1 must {words}"
    assert denoiser.count == 1, "the noise of step 1 must be checked before its model call"


# ------------------------------------------------------------------ warnings between processes


def exceptions():
    named = {
        name: value
        for name, value in vars(gs).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    return {**named, "GuidanceWarning": _reverse.GuidanceWarning}


@pytest.mark.parametrize("name", exceptions())
def test_an_exception_is_the_same_after_a_pickle(name):
    kind = exceptions()[name]
    made = kind(3) if issubclass(kind, gs.GradientWarning) else kind("what happened")
    for other in (pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert type(other) is kind
        assert str(other) == str(made)
        assert vars(other) == vars(made)


def test_a_warning_of_another_process_can_be_shown_again():
    made = pickle.loads(pickle.dumps(gs.GradientWarning(7)))
    with pytest.warns(gs.GradientWarning, match="detaches at step 7: no gradient"):
        warnings.warn(made, stacklevel=1)


# ------------------------------------------------------------------ names that are nearly right

MEANT = {
    "eulr": "euler",
    "Heun": "heun",
    "euler a": "euler_ancestral",
    "sample_euler_ancestral": "euler_ancestral",
    "dpm++ 2m": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerDiscreteScheduler": "euler",
    "KDPM2AncestralDiscreteScheduler": "dpm_2_ancestral",
    "DDIMScheduler": "ddim",
    "plms": "ipndm",
    "unipc": "uni_pc",
    "UniPCMultistepScheduler": "uni_pc",
    "res2ab": "res_2ab",
}


@pytest.mark.parametrize(("got", "meant"), MEANT.items())
def test_the_nearest_solver_is_suggested(got, meant):
    with pytest.raises(ValueError, match=rf"got '.*'; did you mean '{meant}'\?$"):
        gs.sample(torch.mul, normal(2, 4), SIGMAS, solver=got)


@pytest.mark.parametrize("got", ["tcd", "x", ""])
def test_nothing_is_suggested_where_nothing_is_near(got):
    with pytest.raises(ValueError, match=rf"^solver must be one of .*, got '{got}'$"):
        gs.sample(torch.mul, normal(2, 4), SIGMAS, solver=got)


def test_only_solvers_that_are_here_are_suggested(monkeypatch):
    monkeypatch.setattr(solvers, "_REGISTRY", {"heun": gs.solvers.Heun, "heunpp2": gs.solvers.Heun})
    for got in ("unipc", "UniPCMultistepScheduler", "eulera"):
        with pytest.raises(ValueError, match=rf"one of heun, heunpp2, got '{got}'$"):
            gs.sample(torch.mul, normal(2, 4), SIGMAS, solver=got)
