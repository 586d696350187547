# SPDX-License-Identifier: Apache-2.0
"""Every op of the gradsampler namespace: opcheck, one graph under compile, second derivatives."""

import math

import pytest
import torch

import gradsampler as gs
from gradsampler.contract import Draw
from gradsampler.ops import backends, library
from support.tiers import few, pairs

OPS = torch.ops.gradsampler
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("reference", "triton", DEVICE) if backends.present(name)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)


def leaf(*shape, seed=0):
    return normal(*shape, seed=seed).requires_grad_()


def draws(z0):
    offset = gs.noise.SignedRoll(3).draw(z0, 2, 5).offset
    return {
        "none": None,
        "sincos": gs.noise.SinCos().draw(z0, 2, 5),
        "signed_roll": Draw(2, 2, seed=2**63 + 5, offset=offset),
        "philox": gs.noise.Philox(7).draw(z0, 2, 5),
        "mixture": gs.noise.Mixture(gs.noise.SinCos(), 0.5).draw(z0, 2, 5),
        "given": Draw(3, 2, given=leaf(*z0.shape, seed=11)),
    }


def step_arguments(kind, backend, learned):
    z0 = leaf(2, 5, seed=9)
    words, wave, given = library.lowered(draws(z0)[kind])
    terms = [leaf(2, 5, seed=1), leaf(2, 5, seed=2)]
    numbers, coefs = ([], leaf(2, 2, seed=3)) if learned else ([0.5, -1.5], None)
    amount = leaf(seed=4) if learned and words else None
    number = 0.7 if words and amount is None else 0.0
    z0 = z0 if words else None
    rest = (z0, given, number, amount, words, wave, torch.float64, backend)
    return (terms, numbers, coefs, *rest)


@pairs(
    kind=["none", "sincos", "signed_roll", "philox", "mixture", "given"],
    learned=["floats", "tensors"],
    backend=BACKENDS,
)
def test_opcheck_step(kind, learned, backend):
    torch.library.opcheck(OPS.step.default, step_arguments(kind, backend, learned == "tensors"))


@pairs(kind=["none", "signed_roll", "given"], backend=BACKENDS)
def test_opcheck_step_out(kind, backend):
    *arguments, dtype, _ = step_arguments(kind, backend, False)
    terms, *rest = arguments
    rest = [x.detach() if isinstance(x, torch.Tensor) else x for x in rest]
    out = torch.empty(2, 5, dtype=dtype, device=DEVICE)
    terms = [x.detach() for x in terms]
    torch.library.opcheck(OPS.step_out.default, (terms, *rest, out, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_step_backward(backend):
    terms, *rest, _, _ = step_arguments("sincos", backend, True)
    detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in rest]
    needs = [True, False, True, True, False, True]
    arguments = (normal(2, 5), [x.detach() for x in terms], *detached, needs, backend)
    torch.library.opcheck(OPS.step_backward.default, arguments)


@pairs(by=["value", "tensor"], clamp=[[], [-0.5, 0.5]], backend=BACKENDS)
def test_opcheck_ancestral_step(by, clamp, backend):
    rows = normal(2, 6, seed=5)
    coefs = (rows[0].tolist(), None) if by == "value" else ([], rows)
    nonzero = torch.tensor([1.0, 0.0], dtype=torch.float64, device=DEVICE)
    inputs = (leaf(2, 3, 4), leaf(2, 6, 4, seed=1), leaf(2, 3, 4, seed=2))
    rest = (*coefs, nonzero, clamp)
    torch.library.opcheck(OPS.ancestral_step.default, (*inputs, *rest, backend))
    detached = [x.detach() for x in inputs]
    needs = [True, True, False]
    arguments = (normal(2, 3, 4), *detached, *rest, needs, backend)
    torch.library.opcheck(OPS.ancestral_step_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_flow_pair(backend):
    inputs = (leaf(2, 5), leaf(2, seed=1), leaf(2, 5, seed=2))
    torch.library.opcheck(OPS.flow_pair.default, (*inputs, 1e-3, backend))
    detached = [x.detach() for x in inputs]
    cotangents = (normal(2, 5, seed=3), normal(2, 5, seed=4))
    needs = [True, True, True]
    torch.library.opcheck(
        OPS.flow_pair_backward.default, (*cotangents, *detached, 1e-3, needs, backend)
    )


@pairs(shape=[(2, 3, 4), (2, 1, 1), (4,)], backend=BACKENDS)
def test_opcheck_reparameterize(shape, backend):
    nonzero = torch.tensor([0.5, 0.0], dtype=torch.float64, device=DEVICE).requires_grad_()
    inputs = (leaf(2, 3, 4), leaf(*shape, seed=1), leaf(2, 3, 4, seed=2), nonzero)
    torch.library.opcheck(OPS.reparameterize.default, (*inputs, backend))
    torch.library.opcheck(OPS.reparameterize.default, (*inputs[:3], None, backend))
    detached = [x.detach() for x in inputs]
    for needs in ([True] * 4, [False, True, False, False]):
        arguments = (normal(2, 3, 4), *detached, needs, backend)
        torch.library.opcheck(OPS.reparameterize_backward.default, arguments)


def test_every_op_of_the_namespace_is_checked_above():
    defined = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
               if name.startswith("gradsampler::")}  # fmt: skip
    checked = {"step", "ancestral_step", "reparameterize", "flow_pair"}
    assert defined == checked | {f"{name}_backward" for name in checked} | {"step_out"}


COMPILED = [name for name in BACKENDS if name != "triton"]
slowly = few(BACKENDS, *COMPILED)  # a gradcheck in Triton's interpreter takes seconds


@pytest.mark.parametrize("backend", slowly)
@pytest.mark.parametrize("kind", ["sincos", "signed_roll", "mixture", "given"])
def test_gradients_and_their_gradients(kind, backend):
    z0 = leaf(2, 4, seed=9)
    source = {
        "sincos": gs.noise.SinCos(),
        "signed_roll": gs.noise.SignedRoll(3),
        "mixture": gs.noise.Mixture(gs.noise.SinCos(), 0.4),
        "given": gs.noise.Given([leaf(2, 4, seed=k) for k in range(3)]),
    }[kind]
    x, y, coefs, amount = leaf(2, 4), leaf(2, 4, seed=1), leaf(2, 2, seed=2), leaf(seed=3)

    def run(x, y, coefs, z0, amount, *given):
        return gs.ops.step([x, y], coefs, z0, source, 2, 3, amount, backend=backend)

    inputs = (x, y, coefs, z0, amount, *source.tensors)
    assert torch.autograd.gradcheck(run, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, inputs[:5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_by_hand(backend):
    # L = sum (c x)^3, so that dL/dx = 3 c^3 x^2 and d(dL/dx)/dx = 6 c^3 x.
    x = leaf(2, 3)
    y = gs.ops.step([x], [0.5], backend=backend)
    (first,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 3 * 0.125 * x**2)
    torch.testing.assert_close(second, 6 * 0.125 * x)


@pytest.mark.parametrize("backend", slowly)
def test_ancestral_gradients_and_their_gradients(backend):
    coefs = [1.1, 0.4, 0.6, 0.3, -0.5, -1.5]
    inputs = (leaf(2, 2, 3), leaf(2, 4, 3, seed=1), leaf(2, 2, 3, seed=2))

    def run(x, output, noise):
        return gs.ops.ancestral_step(x, output, coefs, noise, clamp=(-0.6, 0.6), backend=backend)

    assert torch.autograd.gradcheck(run, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (3,), (1, 3)], ids=str)
def test_reparameterize_gradients_and_their_gradients(shape, backend):
    inputs = (leaf(2, 3), leaf(*shape, seed=1), leaf(2, 3, seed=2), leaf(2, seed=3))

    def run(mean, log_variance, noise, nonzero):
        return gs.ops.reparameterize(mean, log_variance, noise, nonzero=nonzero, backend=backend)

    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", slowly)
def test_flow_pair_gradients_and_their_gradients(backend):
    inputs = (leaf(2, 4), leaf(2, seed=1), leaf(2, 4, seed=2))

    def run(x0, t, x1):
        x_t, _, v = gs.ops.flow_pair(x0, t, x1, sigma_min=0.1, backend=backend)
        return x_t, v

    assert torch.autograd.gradcheck(run, inputs)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_forward_and_backward(backend):
    x, z0 = leaf(2, 6), leaf(2, 6, seed=1)

    def run(x, z0):
        y = gs.ops.step([x, x.sin()], [0.5, 2.0], z0, gs.noise.SinCos(), 2, 5, 0.3, backend=backend)
        y = gs.ops.reparameterize(y, x.cos(), z0, backend=backend)
        return y.square().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(x, z0), (x, z0))
    got = torch.autograd.grad(compiled(x, z0), (x, z0))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_step_on_fake_tensors_has_shape_and_dtype():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(2, 3, dtype=torch.bfloat16)
        y = gs.ops.step([x], [1.0], out_dtype=torch.float32)
        assert (y.shape, y.dtype) == ((2, 3), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_output_is_left_unwritten(backend):
    # torch.empty is filled with NaN here, so a place that a kernel skips is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        x, z0 = leaf(2, 3, 7), leaf(2, 3, 7, seed=1)
        y = gs.ops.step([x], [0.5], z0, gs.noise.SignedRoll(1), 0, 1, 0.2, backend=backend)
        gradients = torch.autograd.grad(y.sum(), (x, z0))
        assert all(bool(g.isfinite().all()) for g in (y, *gradients))
        assert math.isclose(gradients[0].sum().item(), 0.5 * x.numel())
    finally:
        torch.use_deterministic_algorithms(False)
