# SPDX-License-Identifier: Apache-2.0
"""Every gradient of a run against central differences in float64."""

import math

import pytest
import torch

import gradsampler as gs
from support.gradients import check
from support.networks import Net
from support.noises import KINDS, injections, make_noise
from support.problems import normal
from support.runs import ABAR, LEVELS, SOLVERS, TYPICAL, injecting, leaf, levels, taking_levels
from support.strategies import MEMORIES, memories
from support.tiers import once, pairs

FLOW_SOLVERS = taking_levels(gs.solvers.names(flow=True))
FLOW_TYPICAL = [name for name in TYPICAL if name in FLOW_SOLVERS]
TIMES = (0.95, 0.6, 0.35, 0.1)

# Central differences at 1e-5 err by about 1e-10, from the third derivative and from rounding.


@pairs(cheap={"solver": TYPICAL}, solver=SOLVERS, kind=KINDS, memory=MEMORIES)
def test_every_target_at_once(solver, kind, memory):
    z0, upper, shift, net = leaf(normal(2, 3)), leaf(levels(LEVELS[:-1])), leaf(normal(3)), Net()
    options = injecting(solver) | {"solver": solver}
    count = injections(z0.detach(), levels(LEVELS), **options)
    assert count > 0
    noise, tensors = make_noise(kind, count, z0)

    def run():
        sigmas = torch.cat([upper, levels(LEVELS[-1:])])
        cond = {"shift": shift}
        return gs.sample(net, z0, sigmas, noise=noise, cond=cond, memory=memory, **options)

    check(run, z0, upper, shift, net.weight, net.bias, *tensors, whole=True)


@once(cheap={"solver": TYPICAL}, solver=SOLVERS, memory=MEMORIES)
def test_of_a_run_down_to_level_zero(solver, memory):
    # Today's tools give NaN for the gradient to the levels here.
    z0, upper, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), Net()
    options = injecting(solver)

    def run():
        sigmas = torch.cat([upper, torch.zeros(1, dtype=torch.float64)])
        return gs.sample(net, z0, sigmas, solver=solver, memory=memory, **options)

    check(run, z0, upper, net.weight)


@once(cheap={"solver": TYPICAL}, solver=SOLVERS, memory=MEMORIES)
def test_of_the_final_level(solver, memory):
    z0, last, net = normal(2, 3), leaf(levels(LEVELS[-1:])), Net()

    def run():
        sigmas = torch.cat([levels(LEVELS[:-1]), last])
        return gs.sample(net, z0, sigmas, solver=solver, memory=memory, **injecting(solver))

    check(run, last)


@once(cheap={"solver": TYPICAL}, solver=SOLVERS, memory=MEMORIES)
def test_of_a_single_step(solver, memory):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(levels([2.0, 0.4])), Net()
    options = injecting(solver)
    check(
        lambda: gs.sample(net, z0, sigmas, solver=solver, memory=memory, **options),
        z0,
        sigmas,
        net.weight,
    )


@once(cheap={"solver": TYPICAL}, solver=SOLVERS, memory=MEMORIES)
def test_with_the_last_prediction_returned(solver, memory):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), Net()
    options = injecting(solver) | {"solver": solver, "final_denoise": True}
    check(lambda: gs.sample(net, z0, sigmas, memory=memory, **options), z0, sigmas, net.weight)


@pairs(cheap={"solver": TYPICAL}, solver=SOLVERS, prediction=["epsilon", "v"], memory=MEMORIES)
def test_of_every_prediction_kind(solver, prediction, memory):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), leaf(normal(3)), Net()
    options = injecting(solver) | {"solver": solver, "prediction": prediction}
    check(
        lambda: gs.sample(net, z0, sigmas, cond={"shift": shift}, memory=memory, **options),
        z0,
        sigmas,
        shift,
        net.bias,
    )


@pairs(
    cheap={"solver": FLOW_TYPICAL},
    solver=FLOW_SOLVERS,
    first=[0.95, 1.0],
    final=[0.1, 0.0],
    memory=MEMORIES,
)
def test_in_flow_time(solver, first, final, memory):
    z0, shift, net = leaf(normal(2, 3)), leaf(normal(3)), Net()
    inner, upper = leaf(levels(TIMES[1:-1])), levels([first])

    def run():
        times = torch.cat([upper, inner, levels([final])])
        return gs.sample(
            net,
            z0,
            times,
            solver=solver,
            prediction="flow",
            cond={"shift": shift},
            memory=memory,
        )

    check(run, z0, inner, shift, net.weight, net.bias)


WRAPPERS = {
    "edm": lambda net, scale: gs.EDM(net, sigma_data=0.7),
    "vp-epsilon": lambda net, scale: gs.VP(net, ABAR, prediction="epsilon"),
    "vp-v": lambda net, scale: gs.VP(net, ABAR, prediction="v"),
    "vp-x0": lambda net, scale: gs.VP(net, ABAR, prediction="x0"),
    "flow": lambda net, scale: gs.Flow(net),
    "guided": lambda net, scale: gs.Guided(net, 1.5, {"shift": None}),
    "guided-edm-learned-scale": lambda net, scale: gs.Guided(gs.EDM(net), scale, {"shift": None}),
    "guided-vp-learned-scale": lambda net, scale: gs.Guided(
        gs.VP(net, ABAR, "v"), scale, {"shift": None}
    ),
}


@pairs(
    wrapper=WRAPPERS,
    solver=["heun", "dpmpp_2m", "euler_ancestral", "res_2mid"],
    memory=MEMORIES,
)
def test_through_every_wrapper(solver, wrapper, memory):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), leaf(normal(3)), Net()
    scale = leaf(torch.tensor(1.7, dtype=torch.float64))
    model = WRAPPERS[wrapper](net, scale)
    learned = [scale] if wrapper.endswith("learned-scale") else []
    options = injecting(solver) | {"solver": solver}
    check(
        lambda: gs.sample(model, z0, sigmas, cond={"shift": shift}, memory=memory, **options),
        z0,
        sigmas,
        shift,
        net.weight,
        net.bias,
        *learned,
    )


@memories
def test_of_a_learned_null_conditioning(memory):
    z0, shift, null, net = leaf(normal(2, 3)), leaf(normal(3)), leaf(normal(3, seed=4)), Net()
    model = gs.Guided(net, 1.5, {"shift": null})
    check(
        lambda: gs.sample(model, z0, levels(LEVELS), cond={"shift": shift}, memory=memory),
        z0,
        shift,
        null,
    )


@memories
def test_of_the_guidance_scale_alone(memory):
    scale, net = leaf(torch.tensor(3.0, dtype=torch.float64)), Net()
    z0, shift = normal(2, 3), normal(3)
    model = gs.Guided(net, scale, {"shift": 0.1 * shift})
    check(lambda: gs.sample(model, z0, levels(LEVELS), cond={"shift": shift}, memory=memory), scale)


@memories
@pytest.mark.parametrize(
    ("solver", "eta"),
    [
        *((name, eta) for name in ("euler_ancestral", "dpmpp_2m_sde") for eta in (0.0, 0.3, 2.5)),
        *(("ddim", eta) for eta in (0.0, 0.3, 1.0)),
    ],
)
def test_of_every_amount_of_noise(solver, eta, memory):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), Net()
    check(lambda: gs.sample(net, z0, sigmas, solver=solver, eta=eta, memory=memory), z0, sigmas)


@memories
@pytest.mark.parametrize(
    "solver",
    [gs.solvers.DPMpp2MSDE(variant="heun"), gs.solvers.DDPM(variance="fixed_large")],
    ids=["dpmpp_2m_sde-heun", "ddpm-fixed_large"],
)
def test_of_solver_variants(solver, memory):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), Net()
    check(lambda: gs.sample(net, z0, sigmas, solver=solver, s_noise=1.3, memory=memory), z0, sigmas)


@memories
def test_with_churn_in_a_window(memory):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), Net()
    churn = gs.Churn(0.8, s_tmin=0.5, s_tmax=2.0, s_noise=0.9)
    assert injections(z0.detach(), sigmas.detach(), churn=churn) == 2
    for kind in KINDS:
        noise, tensors = make_noise(kind, 2, z0)
        check(
            lambda noise=noise: gs.sample(
                net, z0, sigmas, solver="heun", churn=churn, noise=noise, memory=memory
            ),
            z0,
            sigmas,
            *tensors,
        )


@memories
def test_of_given_noise_under_a_mixture(memory):
    z0, net = leaf(normal(2, 3)), Net()
    tensors = [leaf(normal(2, 3, seed=k)) for k in range(3)]
    noise = gs.noise.Mixture(gs.noise.Given(tensors), angle=0.8)
    options = {"solver": "euler_ancestral", "noise": noise, "memory": memory}
    check(lambda: gs.sample(net, z0, levels(LEVELS), **options), z0, *tensors)


class Cubic(gs.noise.NoiseSource):
    """A source of a user's own: only its definition, nothing about its gradient."""

    def at(self, z0, step, num_steps):
        return z0**3 / 5 + (step + 1) / num_steps * z0.flip(-1)


@memories
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m_sde"])
def test_of_a_noise_of_ones_own(solver, memory):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(levels(LEVELS)), Net()
    options = injecting(solver) | {"solver": solver, "noise": Cubic(), "memory": memory}
    check(lambda: gs.sample(net, z0, sigmas, **options), z0, sigmas)


class Scaled(gs.noise.NoiseSource):
    """A source that declares a tensor, with the inherited transpose."""

    def __init__(self, amount):
        self.amount = amount

    @property
    def tensors(self):
        return (self.amount,)

    def at(self, z0, step, num_steps):
        return self.amount**2 * z0.flip(-1) * (step + 1)


@memories
def test_of_the_tensors_that_a_noise_of_ones_own_declares(memory):
    z0, amount, net = leaf(normal(2, 3)), leaf(normal(3, seed=4)), Net()
    options = {"noise": Scaled(amount), "solver": "euler_ancestral", "memory": memory}
    check(lambda: gs.sample(net, z0, levels(LEVELS), **options), z0, amount)


@memories
@pytest.mark.parametrize("solver", ["euler", "res_2mid", "dpmpp_2m"])
def test_to_levels_that_the_denoiser_does_not_look_at(solver, memory):
    z0, sigmas = leaf(normal(2, 3)), leaf(levels(LEVELS))
    check(
        lambda: gs.sample(lambda x, sigma: torch.tanh(x), z0, sigmas, solver=solver, memory=memory),
        z0,
        sigmas,
    )


@memories
@pytest.mark.parametrize("shape", [(1, 2), (3, 1, 2), (2, 1, 2, 2), (1, 2, 1, 1, 2)], ids=str)
def test_of_states_of_any_rank(shape, memory):
    z0, net = leaf(normal(*shape)), Net(size=shape[-1])
    options = {"solver": "heun", "churn": gs.Churn(1.0), "memory": memory}
    check(lambda: gs.sample(net, z0, levels(LEVELS), **options), z0, net.weight)


@memories
def test_of_one_element_states_with_independent_noise(memory):
    z0, sigmas = leaf(normal(3, 1)), leaf(levels(LEVELS))
    options = {"solver": "dpmpp_2m_sde", "noise": gs.noise.Philox(), "memory": memory}
    check(lambda: gs.sample(lambda x, s: torch.sin(x), z0, sigmas, **options), z0, sigmas)


@memories
def test_with_a_denoiser_that_takes_a_gradient_itself(memory):
    # Guidance by an energy: the prediction contains the gradient of a scalar by the state.
    z0, weight = leaf(normal(2, 3)), leaf(normal(3, seed=3))

    def denoiser(x, sigma):
        with torch.enable_grad():
            energy = (torch.sin(x) * weight).sum()
            (slope,) = torch.autograd.grad(energy, x, create_graph=True)
        return torch.tanh(x) - 0.1 * slope

    check(lambda: gs.sample(denoiser, z0, levels(LEVELS), solver="heun", memory=memory), z0, weight)


@memories
def test_with_a_denoiser_that_checkpoints_itself(memory):
    z0, net = leaf(normal(2, 3)), Net()

    def denoiser(x, sigma):
        return torch.utils.checkpoint.checkpoint(net, x, sigma, use_reentrant=False)

    check(
        lambda: gs.sample(denoiser, z0, levels(LEVELS), solver="heun", memory=memory),
        z0,
        net.weight,
    )


@memories
def test_with_a_denoiser_that_is_its_own_input(memory):
    z0, sigmas = leaf(normal(2, 3)), leaf(levels(LEVELS))
    options = {"prediction": "epsilon", "solver": "heun", "memory": memory}
    check(lambda: gs.sample(lambda x, sigma: x, z0, sigmas, **options), z0, sigmas)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.variable = 2.0
        return x * ctx.variable

    @staticmethod
    def backward(ctx, g):
        return g * ctx.variable


@memories
def test_with_an_autograd_function_that_has_attributes_of_its_own(memory):
    # Autograd's node for a leaf has an attribute of the same name.
    z0, weight = leaf(normal(2, 3)), leaf(normal(3, seed=3))

    def denoiser(x, sigma):
        return Doubled.apply(torch.tanh(x) * weight)

    check(lambda: gs.sample(denoiser, z0, levels(LEVELS), memory=memory), z0, weight)


# The same tensor in two roles: its gradient is the sum over the roles, once.


@memories
def test_of_a_tensor_twice_in_cond(memory):
    z0, shift = leaf(normal(2, 3)), leaf(normal(3, seed=3))

    def denoiser(x, sigma, a, b):
        return torch.tanh(x * a) + b[0]

    check(
        lambda: gs.sample(
            denoiser, z0, levels(LEVELS), cond={"a": shift, "b": [shift]}, memory=memory
        ),
        z0,
        shift,
    )


@memories
def test_of_a_tensor_in_cond_and_in_the_denoiser(memory):
    z0, shift = leaf(normal(2, 3)), leaf(normal(3, seed=3))

    def denoiser(x, sigma, a):
        return torch.tanh(x * a) + torch.cos(shift)

    check(
        lambda: gs.sample(denoiser, z0, levels(LEVELS), cond={"a": shift}, memory=memory),
        z0,
        shift,
    )


@memories
def test_of_a_parameter_handed_over_in_cond(memory):
    z0, net = leaf(normal(2, 3)), Net()
    cond = {"shift": net.bias}
    check(lambda: gs.sample(net, z0, levels(LEVELS), cond=cond, memory=memory), z0, net.bias)


@memories
def test_of_one_tensor_given_at_every_step(memory):
    z0, tensor, net = leaf(normal(2, 3)), leaf(normal(2, 3, seed=3)), Net()
    options = {"solver": "euler_ancestral", "noise": gs.noise.Given([tensor] * 3)}
    check(
        lambda: gs.sample(net, z0, levels(LEVELS), memory=memory, **options),
        z0,
        tensor,
    )


@memories
def test_of_z0_in_every_role(memory):
    z0, net = leaf(normal(2, 3)), Net()

    def denoiser(x, sigma, anchor):
        return net(x, sigma) + 0.1 * anchor * z0

    check(
        lambda: gs.sample(
            denoiser,
            z0,
            levels(LEVELS),
            solver="euler_ancestral",
            noise=gs.noise.Given([z0, z0, 0.5 * z0]),
            cond={"anchor": z0},
            memory=memory,
        ),
        z0,
    )


# Against a loop in plain torch.


def churned_euler(net, z0, sigmas, noises, s_churn):
    """EDM's algorithm 2 without its second-order correction, literally."""
    steps = len(sigmas) - 1
    x = sigmas[0] * z0
    for i in range(steps):
        gamma = min(s_churn / steps, math.sqrt(2) - 1)
        hat = sigmas[i] + gamma * sigmas[i]
        x = x + torch.sqrt(hat**2 - sigmas[i] ** 2) * noises[i](z0)
        slope = (x - net(x, hat.expand(len(x)))) / hat
        x = x + (sigmas[i + 1] - hat) * slope
    return x


def sincos(i, steps, g=0.1, r=0.1, a=0.1, b=0.05):
    return lambda z0: (
        z0 * (1 + g * i / steps) + a * torch.sin(z0 * r * i + i) + b * torch.cos(z0 * r * i)
    )


@memories
def test_of_sincos_noise_against_a_loop(memory):
    steps, net = 40, Net()
    values = gs.schedules.karras(steps, sigma_max=8.0)
    noises = [sincos(i, steps) for i in range(steps)]
    inputs = [leaf(normal(2, 3)), leaf(values), *net.parameters()]
    expected = churned_euler(net, inputs[0], inputs[1], noises, s_churn=10.0)
    wanted = torch.autograd.grad(expected.sin().sum(), inputs)
    got = gs.sample(
        net,
        inputs[0],
        inputs[1],
        churn=gs.Churn(10.0),
        noise=gs.noise.SinCos(),
        memory=memory,
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    for g, w in zip(torch.autograd.grad(got.sin().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10 * w.norm().item())


@memories
def test_that_z0_keeps_a_gradient_through_many_steps_of_noise(memory):
    # Independent noise drowns it; noise made of z0 carries it.
    z0 = leaf(normal(2, 8))
    size = {}
    for name, noise in [("roll", gs.noise.SignedRoll()), ("independent", gs.noise.Philox())]:
        x = gs.sample(
            lambda x, s: x / (1 + 4 * s.view(-1, 1) ** 2),  # exact for data of deviation 1/2
            z0,
            gs.schedules.karras(30, final="zero"),
            solver="euler_ancestral",
            noise=noise,
            memory=memory,
        )
        size[name] = torch.autograd.grad(x.sum(), z0)[0].norm().item()
    assert size["roll"] > 50 * size["independent"]
