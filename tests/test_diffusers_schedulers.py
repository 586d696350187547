# SPDX-License-Identifier: Apache-2.0
"""Solvers against the diffusers scheduler of the same method, on the scheduler's own levels."""

import dataclasses
import sys
import warnings

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler import solvers
from support.problems import Mixture, normal

pytestmark = pytest.mark.thorough  # importing diffusers takes seconds


@pytest.fixture(scope="module")
def diffusers():
    """The package; imported late, so that a run without these tests does not wait for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


SHAPE = (2, 2, 3)
MIXTURE = Mixture(6)
Z0 = normal(*SHAPE, seed=1)
NOISES = [normal(*SHAPE, seed=20 + k) for k in range(40)]


def denoise(x, s, coordinates):
    """D of a state in the coordinates of the scheduler."""
    s = torch.as_tensor(s, dtype=torch.float64)
    if coordinates == "flow":
        return MIXTURE.posterior(x, 1 - s, s)
    return MIXTURE.denoise(x, s)


def scheduled(scheduler, coordinates, steps, monkeypatch):
    """The scheduler's own run: its levels and its sample, in VE coordinates or flow time."""
    supply = iter(NOISES)
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, dtype=None, **__: next(supply))
    scheduler.set_timesteps(steps)
    # Their tables are float32, in which the differences of a polynomial's nodes lose digits.
    scheduler.sigmas = scheduler.sigmas.double()
    if scheduler.sigmas[-1] == scheduler.sigmas[-2]:  # a last step that goes nowhere
        scheduler.sigmas[-1] /= 5
    sigmas = scheduler.sigmas.tolist()
    vp = coordinates == "vp"

    def scale(s):
        return (1 + s**2) ** 0.5 if vp else 1.0

    x = sigmas[0] * Z0 / scale(sigmas[0])
    told, s = [], sigmas[0]
    for i, t in enumerate(scheduler.timesteps):
        s = sigmas[i]
        if hasattr(scheduler, "sigmas_interpol") and not scheduler.state_in_first_order:
            back = "Ancestral" in type(scheduler).__name__
            s = float(scheduler.sigmas_interpol[i - back])
        else:
            told.append(s)
        x = x.double()
        if not vp:
            getattr(scheduler, "scale_model_input", lambda *_: None)(x, t)  # they insist
        wide = x * scale(s)
        output = (wide - denoise(wide, s, coordinates)) / s  # epsilon, or the velocity
        x = scheduler.step(output, t, x).prev_sample
    levels = [*dict.fromkeys([*told, sigmas[-1]])]
    return levels, x.double() * scale(levels[-1])


PLUS = {"algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": False}
SDE = {**PLUS, "algorithm_type": "sde-dpmsolver++"}
SA = {"tau_func": lambda t: torch.tensor(1.0), "lower_order_final": False}
UNI = {"solver_order": 3}
BH1 = {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}  # NaN at a final 0

CASES = {
    "euler": ("EulerDiscreteScheduler", {}, "ve", {}),
    "heun": ("HeunDiscreteScheduler", {}, "ve", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}, "ve", {}),
    "lms": ("LMSDiscreteScheduler", {}, "ve", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, "ve", {}),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}, "ve", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", PLUS, "vp", {}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE, "vp", {}),
    "dpmpp_2m_sde-heun": (
        "DPMSolverMultistepScheduler",
        {**SDE, "solver_type": "heun"},
        "vp",
        {"variant": "heun"},
    ),
    "dpmpp_3m_sde": (
        "DPMSolverMultistepScheduler",
        {**PLUS, "solver_order": 3, "solver_type": "heun"},
        "vp",
        {"eta": 0.0},
    ),
    "uni_pc-order2": ("UniPCMultistepScheduler", BH1, "vp", {"order": 2}),
    "uni_pc": ("UniPCMultistepScheduler", {**UNI, **BH1}, "vp", {}),
    "uni_pc_bh2-order2": ("UniPCMultistepScheduler", {}, "vp", {"order": 2}),
    "uni_pc_bh2": ("UniPCMultistepScheduler", UNI, "vp", {}),
    "deis-order2": ("DEISMultistepScheduler", {}, "vp", {"variable": "log_rho", "order": 2}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}, "vp", {"variable": "log_rho"}),
    "sa_solver-order2": (
        "SASolverScheduler",
        SA,
        "vp",
        {"predictor_order": 2, "corrector_order": 2, "simple_order_2": True},
    ),
    "sa_solver": (
        "SASolverScheduler",
        {**SA, "predictor_order": 3, "corrector_order": 4},
        "vp",
        {"simple_order_2": True},
    ),
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CASES |= {
    "euler-flow": ("FlowMatchEulerDiscreteScheduler", {}, "flow", {}),
    "heun-flow": ("FlowMatchHeunDiscreteScheduler", {}, "flow", {}),
    "dpmpp_2m-flow": ("DPMSolverMultistepScheduler", {**PLUS, **FLOW}, "flow", {}),
    "dpmpp_2m_sde-flow": ("DPMSolverMultistepScheduler", {**SDE, **FLOW}, "flow", {}),
    "uni_pc_bh2-flow": ("UniPCMultistepScheduler", {**UNI, **FLOW}, "flow", {}),
    "deis-flow": (
        "DEISMultistepScheduler",
        {"solver_order": 3, **FLOW},
        "flow",
        {"variable": "log_rho"},
    ),
    "sa_solver-flow": (
        "SASolverScheduler",
        {**SA, **FLOW, "predictor_order": 3, "corrector_order": 3},
        "flow",
        {"corrector_order": 3, "simple_order_2": True},
    ),
}


def agrees(solver, levels, expected, flow=False):
    prediction = "flow" if flow else "epsilon"
    model = MIXTURE.velocity if flow else MIXTURE.epsilon
    program, _ = gs.arguments.record(model, levels, solver=solver, prediction=prediction)
    count = len(program.noises)
    noise = noises.Given(NOISES[:count]) if count else None
    got = gs.sample(model, Z0, levels, solver=solver, prediction=prediction, noise=noise)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_agrees_with_the_scheduler(diffusers, name, case, monkeypatch):
    kind, config, coordinates, options = case
    scheduler = getattr(diffusers, kind)(**config)
    levels, expected = scheduled(scheduler, coordinates, 16, monkeypatch)
    solver = dataclasses.replace(solvers.resolve(name.split("-")[0]), **options)
    agrees(solver, levels, expected, coordinates == "flow")


def test_agrees_with_the_ipndm_scheduler(diffusers):
    """Its states are alpha x0 + beta e with tables of its own; it returns no level 0."""
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(8)
    scheduler.alphas, scheduler.betas = scheduler.alphas.double(), scheduler.betas.double()
    levels = (scheduler.betas / scheduler.alphas).tolist()[1:-1]
    scheduler.set_begin_index(1)
    x = levels[0] * Z0
    for i, s in enumerate(levels[:-1], start=1):
        a, t = scheduler.alphas[i], scheduler.timesteps[i]
        clean = denoise(x, s, "ve")
        noise = (x - clean) / s
        v = a * noise - a * s * clean
        x = scheduler.step(v, t, a * x).prev_sample / scheduler.alphas[i + 1]
    agrees(solvers.IPNDM(), levels, x)


def test_agrees_with_the_flow_lcm_scheduler(diffusers, monkeypatch):
    scheduler, supply = diffusers.FlowMatchLCMScheduler(), iter(NOISES)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(supply))
    scheduler.set_timesteps(6)
    levels, x = scheduler.sigmas.tolist(), Z0 * scheduler.sigmas[0].item()
    for s, t in zip(levels, scheduler.timesteps, strict=False):
        velocity = (x - denoise(x, s, "flow")) / s
        x = scheduler.step(velocity, t, x.double()).prev_sample
    agrees(solvers.Consistency(), levels, x.double(), flow=True)


def variance_preserving(scheduler, steps, monkeypatch, **options):
    """A run of a scheduler that knows its timesteps alone: its levels, and its sample."""
    supply, module = iter(NOISES), sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(supply))
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    alphas = scheduler.alphas_cumprod[scheduler.timesteps]
    levels = ((1 - alphas) / alphas).sqrt().tolist()
    x = levels[0] * Z0 * alphas[0].sqrt()
    for s, a, t in zip(levels, alphas, scheduler.timesteps, strict=True):
        wide = x.double() / a.sqrt()
        epsilon = (wide - denoise(wide, s, "vp")) / s
        x = scheduler.step(epsilon, t, x.double(), **options).prev_sample
    return [*levels, 0.0], x.double()


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_agrees_with_the_ddim_scheduler(diffusers, eta, monkeypatch):
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    levels, expected = variance_preserving(scheduler, 8, monkeypatch, eta=eta)
    agrees(solvers.DDIM(eta=eta), levels, expected)


def test_agrees_with_the_ddpm_scheduler(diffusers, monkeypatch):
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    agrees(solvers.DDPM(), *variance_preserving(scheduler, 8, monkeypatch))


def test_agrees_with_the_lcm_scheduler(diffusers, monkeypatch):
    """Its boundary scalings are 0 and 1 to 1e-7 at these timesteps."""
    scheduler = diffusers.LCMScheduler(clip_sample=False)
    agrees(solvers.Consistency(), *variance_preserving(scheduler, 4, monkeypatch))


def test_agrees_with_the_scheduler_of_consistency_models(diffusers, monkeypatch):
    scheduler, supply = diffusers.CMStochasticIterativeScheduler(clip_denoised=False), iter(NOISES)
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(supply))
    scheduler.set_timesteps(5)
    scheduler.sigmas = scheduler.sigmas.double()
    levels, x = scheduler.sigmas.tolist(), scheduler.sigmas[0] * Z0
    for s, t in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, t)
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition(s)
        x = scheduler.step((denoise(x, s, "ve") - c_skip * x) / c_out, t, x).prev_sample
    agrees(solvers.Consistency(sigma_min=0.002), levels, x)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_sde_scheduler(diffusers):
    """Which is k-diffusion's dpmpp_sde: given independent noises, so is ours."""
    scheduler, supply = diffusers.DPMSolverSDEScheduler(), iter(NOISES)
    scheduler.set_timesteps(6)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.noise_sampler = lambda s, t: next(supply)
    levels, x = list(dict.fromkeys(scheduler.sigmas.tolist())), scheduler.sigmas[0] * Z0
    for i, t in enumerate(scheduler.timesteps):
        s = scheduler.sigmas[i] if scheduler.state_in_first_order else scheduler.mid_point_sigma
        x = scheduler.step((x - denoise(x, s, "ve")) / s, t, x).prev_sample
    agrees(solvers.DPMppSDE(independent=True), levels, x)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_the_single_step_scheduler(diffusers):
    """Two of its steps are one of ours, if the level between is the geometric mean."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(9)
    sigmas = gs.schedules.exponential(8, 0.03, 12.0)  # its own levels repeat the last
    scheduler.sigmas, steps = sigmas, scheduler.timesteps[:8]
    x = sigmas[0] * Z0 / (1 + sigmas[0] ** 2).sqrt()
    for s, t in zip(sigmas, steps, strict=False):
        wide = x * (1 + s**2).sqrt()
        x = scheduler.step((wide - denoise(wide, s, "vp")) / s, t, x).prev_sample
    expected = x * (1 + sigmas[-1] ** 2).sqrt()
    agrees(solvers.DPMpp2SAncestral(eta=0.0), sigmas[::2].tolist(), expected)
