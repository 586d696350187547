# SPDX-License-Identifier: Apache-2.0
"""What surrounds the arithmetic: threads, instruction sets, empty tensors, errors, the loader."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.utils.data

import gradsampler as gs
from gradsampler import noise
from gradsampler.noise import philox
from gradsampler.ops import native

needs_extension = pytest.mark.skipif(
    native.available() is not None, reason=f"extension: {native.available()}"
)
SINCOS, ROLL = noise.SinCos(), noise.SignedRoll(3)
MIXED = noise.Mixture(ROLL, 0.7, 5)


@pytest.fixture
def restored():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    native.use_isa(native.isas()[0])
    native._module.set_cache_bytes(32 << 20)


def everything(dtype=torch.float32, batch=3, size=50_021):
    """Every output of every op on one set of inputs."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, size)
    x, d, z0, g = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    rows = torch.randn(batch, 2, generator=generator)
    results = []
    for source in (SINCOS, ROLL, MIXED):
        draw = source.draw(z0, 9, 20)
        for coefs in ([0.3, -1.2], rows):
            results.append(native.step_fwd([x, d], coefs, z0, draw, 0.7))
            dz0 = torch.zeros_like(z0)
            dterms, *sums, _ = native.step_bwd(
                g, [x, d], coefs, z0, draw, 0.7, dz0=dz0, clamp=(-1.0, 1.0),
                needs_terms=[True, True], needs_coefs=True, needs_noise_coef=True,
            )  # fmt: skip
            results += [*dterms, *sums, dz0]
        dz0 = torch.zeros_like(z0)
        results += native.adjoint_step(
            [x, d], [0.3, 0.4], g, 0.5, [0.1, 0.2, 0.3], z0, draw, 0.7, dz0,
            mu_dtype=dtype, lam_dtype=dtype,
        )  # fmt: skip
        results.append(dz0)
    row = [1.3, 0.9, 0.6, 0.35, -1.0, -3.5]
    output = torch.cat((d, g), 1)
    results.append(native.ancestral_step_fwd(x, output, z0, row, clamp=(-1.0, 1.0)))
    results += native.ancestral_step_bwd(g, x, output, z0, row, clamp=(-1.0, 1.0))
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64)
    # The pair's normals are float32 whatever the dtype: given ones, where float64 is compared.
    x1 = z0 if dtype == torch.float64 else None
    results += native.flow_pair_fwd(x, t, x1, seed=4)
    results += native.flow_pair_bwd(g, d, x, t, x1, seed=4)
    return results


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_thread_and_many_agree_bit_for_bit(dtype, restored):
    torch.set_num_threads(1)
    alone = everything(dtype)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for one, many in zip(alone, everything(dtype), strict=True):
            assert torch.equal(one, many)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_stores_around_the_cache_change_nothing(dtype, restored):
    plain = everything(dtype, 2, 3001)
    native._module.set_cache_bytes(0)
    for one, other in zip(plain, everything(dtype, 2, 3001), strict=True):
        assert torch.equal(one, other)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_instruction_set_agrees_to_rounding(dtype, restored):
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2**-6)
    best = everything(dtype, 2, 2501)
    for name in native.isas()[1:]:
        native.use_isa(name)
        for one, other in zip(best, everything(dtype, 2, 2501), strict=True):
            # A value at the very edge of the clamp may fall on either side: allow a few.
            far = (one.double() - other.double()).abs() > tolerance * (1 + one.double().abs()) * (
                50 if one.numel() < 8 else 1
            )
            assert far.sum() <= one.numel() * 1e-3, (name, int(far.sum()))


@needs_extension
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0,), (2, 0, 5)])
def test_empty_tensors(shape):
    x = torch.empty(shape)
    draw = SINCOS.draw(x, 1, 2)
    assert native.step_fwd([x], [1.0], x, draw, 1.0).shape == shape
    dterms, dcoefs, dnoise, _ = native.step_bwd(
        x, [x], [1.0], x, draw, 1.0, dz0=torch.empty(shape),
        needs_terms=[True], needs_coefs=True, needs_noise_coef=True,
    )  # fmt: skip
    assert dterms[0].shape == shape
    assert dcoefs.tolist() == [0.0]
    assert dnoise.item() == 0.0


@needs_extension
def test_a_scalar_state_is_one_sample_of_one():
    x = torch.tensor(2.0)
    assert native.step_fwd([x], [1.5], None, None, 0.0).item() == 3.0


@needs_extension
def test_outputs_are_written_whole():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for result in everything(size=2049):
            assert not result.isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": [torch.ones(4, 16), torch.ones(4, 8)]},
         r"step: terms\[1\] must have shape \[4, 16\], got \[4, 8\]"),
        ({"coefs": [1.0]}, "step: coefs must hold 2 numbers, got 1"),
        ({"coefs": torch.ones(3)}, r"step: coefs must have shape \[2\] or \[4, 2\], got \[3\]"),
        ({"coefs": torch.ones(5, 2)}, r"coefs must have shape \[2\] or \[4, 2\], got \[5, 2\]"),
        ({"z0": torch.ones(4, 8)}, r"step: z0 must have shape \[4, 16\], got \[4, 8\]"),
        ({"z0": None}, "step: z0 must be a tensor for noise kind 1, got None"),
        ({"z0": torch.ones(4, 16, dtype=torch.int32)},
         "step: z0 must have dtype float64, float32, bfloat16 or float16, got Int"),
        ({"out": torch.ones(1, 16).expand(4, 16)}, "step: out must have no stride of 0"),
    ],
)  # fmt: skip
def test_errors_name_argument_expected_and_got(change, message):
    call = {
        "terms": [torch.ones(4, 16)] * 2,
        "coefs": [1.0, 2.0],
        "z0": torch.ones(4, 16),
        "noise_coef": 1.0,
        "out": None,
    } | change
    draw = SINCOS.draw(torch.ones(4, 16), 1, 2)
    with pytest.raises(RuntimeError, match=message):
        native.step_fwd(
            call["terms"], call["coefs"], call["z0"], draw, call["noise_coef"], out=call["out"]
        )


@needs_extension
def test_signed_roll_refuses_to_overwrite_its_source():
    z0 = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="out must not share memory with z0"):
        native.step_fwd([z0], [1.0], z0, ROLL.draw(z0, 1, 2), 1.0, out=z0)


@needs_extension
def test_forked_workers_compute_the_same():
    code = (
        "import os, torch\n"
        "from gradsampler import noise\nfrom gradsampler.ops import native\n"
        "z = torch.randn(2, 70000); d = noise.SinCos().draw(z, 3, 9)\n"
        "f = lambda: native.step_fwd([z], [0.5], z, d, 1.0)\n"
        "want = f()\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    torch.set_num_threads(1)\n"
        "    os._exit(0 if torch.equal(f(), want) else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], timeout=60, check=False)
    assert done.returncode == 0


class Steps(torch.utils.data.Dataset):
    """Each item is a step that is large enough for threads, and its gradient."""

    def __len__(self):
        return 6

    def __getitem__(self, k):
        z0 = torch.full((2, 70_000), k / 3).requires_grad_()
        x = gs.ops.step([z0], [0.5], z0, MIXED, 3, 9, 0.7, backend="cpu")
        (gradient,) = torch.autograd.grad(x.square().sum(), z0)
        return torch.stack((x.detach(), gradient))


@needs_extension
def test_workers_of_a_data_loader_compute_the_same(restored):
    torch.set_num_threads(2)
    expected = torch.stack([Steps()[k] for k in range(6)])
    loader = torch.utils.data.DataLoader(
        Steps(), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), expected)


@needs_extension
def test_two_threads_call_at_once():
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: everything(size=5001), range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@needs_extension
def test_facts_name_the_build():
    facts = native.facts()
    assert {"compiler", "torch", "isa", "threads", "cuda_archs"} <= set(facts)
    assert facts["isa"] == native.isas()[0]
    assert native.isas()[-1] == "default"


def test_availability_is_none_or_one_reason():
    reason = native.available()
    assert reason is None or (isinstance(reason, str) and reason and "\n" not in reason.strip())


@needs_extension
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    size = 2**31 + 4099
    x = torch.zeros(1, size, dtype=torch.bfloat16)
    x[0, -1] = 3.0
    draw = noise.Philox(5).draw(x, 2, 9)
    native.step_fwd([x], [2.0], None, draw, 1.0, out=x)
    block = torch.tensor([(size - 1) // 4])
    words = philox.philox4x32(
        (block & 0xFFFFFFFF, block >> 32, torch.full_like(block, 2), torch.zeros_like(block)), 5
    )
    lane = (size - 1) % 4
    u, w = (float(words[k]) * 2.0**-32 for k in (lane // 2 * 2, lane // 2 * 2 + 1))
    wave = (math.cos, math.sin)[lane % 2](2 * math.pi * w)
    expected = 6.0 + math.sqrt(-2 * math.log(u)) * wave
    assert x[0, -1].item() == pytest.approx(expected, abs=0.03)
