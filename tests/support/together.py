# SPDX-License-Identifier: Apache-2.0
"""One sample that two ranks compute together: context parallelism."""

import copy
import warnings
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradsampler as gs
from gradsampler.memory import capacity
from support.cases import Cases
from support.problems import normal
from support.runs import leaf

F64 = torch.float64
SIGMAS = gs.schedules.karras(4, sigma_min=0.1, sigma_max=5.0)
STRATEGIES = ["store", "checkpoint", "auto", "revolve:2", gs.memory.Truncated(2)]
case = CASES = Cases()
run = CASES.run


class Gathered(torch.autograd.Function):
    """Rows of all ranks; backward gives each rank the cotangent of its own, as diffusers does."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, g):
        return g.chunk(dist.get_world_size(), 1)[dist.get_rank()]


class Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class Unsummed(Total):
    """A sum over the ranks whose backward forgets that all of them have read it."""

    @staticmethod
    def backward(ctx, g):
        return g


class Mixer(nn.Module):
    """Tokens [B, T, C] that see one another's mean; with ``split`` each rank has some of them."""

    total = Total

    def __init__(self, split=False):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.mean = nn.Linear(3, 3, dtype=F64), nn.Linear(3, 3, dtype=F64)
        self.split = split

    def forward(self, x, sigma, shift):
        count = x.shape[1]
        x = x + 0.1 * shift + 0.01 * sigma[:, None, None]
        if self.split:
            x = x.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        total = x.sum(1, keepdim=True)
        if self.split:
            total = self.total.apply(total)
        x = torch.tanh(self.token(x) + self.mean(total / count))
        return Gathered.apply(x) if self.split else x


def gradients(denoiser, parameters, memory):
    z0 = normal(2, 6, 3).requires_grad_()
    shift = normal(2, 6, 3, seed=1).requires_grad_()
    sigmas = SIGMAS.clone().requires_grad_()
    options = {"cond": {"shift": shift}, "memory": memory, "solver": "euler_ancestral"}
    x = gs.sample(denoiser, z0, sigmas, **options)
    return torch.autograd.grad(x.square().sum(), [z0, shift, sigmas, *parameters])


@case
def gradients_are_those_of_one_device():
    for memory in STRATEGIES:
        plain, parallel = Mixer(), Mixer(split=True)
        together = gs.distributed.replicated(parallel)
        expected = gradients(plain, plain.parameters(), memory)
        found = gradients(together, parallel.parameters(), memory)
        alone = gradients(parallel, parallel.parameters(), memory)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
        if memory != "truncated":
            assert not torch.allclose(alone[-1], expected[-1], rtol=1e-3)  # what it is for


@case
def weights_may_be_sharded_over_the_same_ranks():
    """FSDP2 sums the shares itself, where it does not divide; frozen weights need no sum."""
    from torch.distributed.fsdp import fully_shard

    for memory in ("store", "checkpoint", "auto"):
        plain, network = Mixer(), Mixer(split=True)
        fully_shard(network.token), fully_shard(network)
        together = gs.distributed.replicated(network)
        with pytest.raises(ValueError, match="set_gradient_divide_factor"):
            gradients(together, [], memory)
        network.set_gradient_divide_factor(1.0)
        network.token.set_gradient_divide_factor(1.0)
        z0 = normal(2, 6, 3)
        for module in (plain, together):
            x = gs.sample(module, z0, SIGMAS, cond={"shift": z0}, memory=memory)
            x.square().sum().backward()
        for p, q in zip(network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-11, atol=1e-12)
        frozen = Mixer(split=True).requires_grad_(False)
        fully_shard(frozen)
        expected = gradients(plain, [], memory)
        found = gradients(gs.distributed.replicated(frozen), [], memory)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@case
def ranks_agree():
    """A network that ranks compute together has them decide alike as well."""
    count = []

    class Odd(Mixer):
        def forward(self, x, sigma, shift):
            count.append(1)
            odd = dist.get_rank() == 1 and len(count) == 7
            return super().forward(x, sigma, shift) * (1 + float(odd))

    together = gs.distributed.replicated(Odd(split=True))
    with pytest.raises(gs.ReplayError):
        gradients(together, [], "checkpoint")


@case
def the_check_passes_on_all_ranks():
    """Central differences agree with the summed gradient."""
    cond = {"shift": normal(2, 6, 3, seed=1)}
    z0 = normal(2, 6, 3).requires_grad_()
    parallel = Mixer(split=True)
    report = gs.check(gs.distributed.replicated(parallel), z0, SIGMAS, cond=cond)
    assert report.passed, str(report)


@case
def the_check_finds_a_wrong_backward_on_all_ranks():
    """The run goes through, its gradient is wrong; and so is one whose shares nobody has summed."""
    cond = {"shift": normal(2, 6, 3, seed=1)}
    wrong = Mixer(split=True)
    wrong.total = Unsummed
    for network in (gs.distributed.replicated(wrong), Mixer(split=True)):
        z0 = normal(2, 6, 3).requires_grad_()
        report = gs.check(network, z0, SIGMAS, cond=cond)
        assert not report.passed
        assert "differ" in str(report), str(report)


@case
def diffusers_context_parallelism():
    """A tiny Flux, Ulysses over two ranks; bare it is refused."""
    pytest.importorskip("diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import FluxTransformer2DModel

        torch.manual_seed(0)
        plain = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=[4, 4, 8],
        ).requires_grad_(False)
        parallel = cut(copy.deepcopy(plain))
        text, pooled = normal(1, 8, 32, seed=1).float(), normal(1, 32, seed=2).float()
        ids = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4], -1)

        def denoiser(network):
            def called(x, t, text):
                return network(
                    hidden_states=x,
                    timestep=t,
                    encoder_hidden_states=text,
                    pooled_projections=pooled,
                    txt_ids=torch.zeros(8, 3),
                    img_ids=ids,
                    return_dict=False,
                )[0]

            return called

        found = {}
        for name, network in (
            ("plain", plain),
            ("parallel", gs.distributed.replicated(parallel)),
        ):
            for memory in ("store", "checkpoint", "auto"):
                z0 = normal(1, 16, 4).float().requires_grad_()
                cond = {"text": text.clone().requires_grad_()}
                x = gs.sample(
                    denoiser(network),
                    z0,
                    gs.schedules.flow(3),
                    prediction="flow",
                    cond=cond,
                    memory=memory,
                )
                x.square().sum().backward()
                found[name, memory] = x.detach(), z0.grad, cond["text"].grad
        for memory in ("store", "checkpoint", "auto"):
            pairs = zip(found["plain", memory], found["parallel", memory], strict=True)
            for expected, got in pairs:
                assert (got - expected).norm() < 1e-5 * expected.norm()
        with pytest.raises(ValueError, match="replicated"):
            gs.sample(denoiser(parallel), z0, gs.schedules.flow(3), prediction="flow", cond=cond)


def cut(network):
    """A transformer of diffusers whose tokens lie on two ranks."""
    from diffusers import ContextParallelConfig

    network.set_attention_backend("native")
    with patch("torch.accelerator.device_count", lambda: 1):  # none at all, it divides by that
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return network


@case
def diffusers_pipelines_sum_without_being_asked():
    """Flux in all three ways, and as a denoiser: the gradients are those of one device."""
    pytest.importorskip("diffusers")
    warnings.simplefilter("ignore")
    from gradsampler.integrations import diffusers as gsd
    from support import pipelines

    flux = pipelines.CASES["flux"]

    def found(pipe, **options):
        arguments = flux.arguments()
        for seed, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
            arguments[name] = leaf(normal(1, 8, 8, seed=seed).float())  # as many for each rank
        x = gsd.pipeline(pipe, **options)(**arguments)
        return [
            x,
            *torch.autograd.grad(
                x.square().sum(), [arguments[n] for n in ("latents", "prompt_embeds")]
            ),
        ]

    def alike(got, expected):
        for x, y in zip(got, expected, strict=True):
            assert (x - y).norm() < 1e-5 * y.norm()

    plain, parallel = flux.build(), flux.build()
    cut(parallel.transformer)
    for method, memory in (
        ("program", "store"),
        ("program", "checkpoint"),
        ("program", "revolve:2"),
        ("steps", "checkpoint"),
        ("calls", "store"),
        ("calls", "checkpoint"),
        ("calls", "auto"),
    ):
        options = {"method": method, "memory": memory}
        alike(found(parallel, **options), found(plain, **options))
    # Where only one rank has room, neither may repeat calls that the other keeps.
    real, capacity.free = capacity.free, lambda device: [2**40, 0][dist.get_rank()]
    try:
        got = found(parallel, method="calls", memory="auto")
    finally:
        capacity.free = real
    alike(got, found(plain, method="calls", memory="store"))

    gradients = []
    for pipe in (plain, parallel):
        denoiser = gsd.denoiser_from(pipe.transformer, pipe.scheduler, time_scale=1.0)
        z0, text = leaf(normal(1, 4, 16).float()), leaf(normal(1, 8, 8, seed=1).float())
        cond = {
            "encoder_hidden_states": text,
            "pooled_projections": normal(1, 8, seed=2).float(),
            "txt_ids": torch.zeros(8, 3),
            "img_ids": torch.stack([torch.zeros(4), torch.arange(4) // 2, torch.arange(4) % 2], -1),
            "guidance": torch.ones(1),
        }
        x = gs.sample(denoiser, z0, SIGMAS, cond=cond)
        gradients.append([x, *torch.autograd.grad(x.square().sum(), [z0, text])])
    alike(gradients[1], gradients[0])


@case
def dtensors_run_by_their_parts():
    """Each rank runs its part, with the step noise that a DTensor's placements give it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    options = {"solver": "euler_ancestral", "memory": "checkpoint"}
    whole = normal(3, 5, 4).requires_grad_()  # fewer elements than any op has a block of

    def denoiser(x, sigma):
        return 0.5 * x - 0.01 * x * x

    source = gs.noise.SignedRoll(3)
    expected = gs.sample(denoiser, whole, SIGMAS, noise=source, **options)
    expected.square().sum().backward()
    replicated = gs.distributed.replicated(nn.Linear(4, 4, dtype=F64))
    with pytest.raises(ValueError, match="replicated: each tensor must be a plain one"):
        replicated(distribute_tensor(whole.detach(), mesh, [Shard(0)]).requires_grad_())
    for dim in (0, 1, 2):
        z0 = distribute_tensor(whole.detach(), mesh, [Shard(dim)]).requires_grad_()
        noise = gs.noise.Sharded.of(source, z0)
        x = gs.sample(denoiser, z0.to_local(), SIGMAS, noise=noise, **options)
        own = distribute_tensor(expected.detach(), mesh, [Shard(dim)]).to_local()
        assert torch.equal(x, own)
        x.square().sum().backward()
        torch.testing.assert_close(z0.grad.full_tensor(), whole.grad, rtol=1e-12, atol=1e-12)
    alike = distribute_tensor(whole.detach(), mesh, [Replicate()])
    assert gs.noise.Sharded.of(source, alike) is source
    grid = init_device_mesh("cpu", (1, 2))
    twice = distribute_tensor(whole.detach(), grid, [Shard(0), Shard(1)])
    with pytest.raises(ValueError, match=r"z0 must be cut along one axis at most"):
        gs.noise.Sharded.of(source, twice)
