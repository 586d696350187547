# SPDX-License-Identifier: Apache-2.0
"""The drop-in's denoisers and schedules against k-diffusion's own, recorded in a table."""

import json

import pytest
import torch

import gradsampler.integrations.k_diffusion as K
from support import k_diffusion_denoisers as recorded
from support import k_diffusion_table as table

TABLE = json.loads(recorded.FILE.read_text())
KINDS = [name for name in TABLE if name != "schedules"]


def near(got, expected, tolerance):
    torch.testing.assert_close(
        torch.tensor(got), torch.tensor(expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
def test_denoisers_with_their_gradients(kind):
    """To rounding: of float64, and of the float32 that timesteps and two tables have."""
    got = recorded.row(recorded.denoisers(K.external)[kind])
    assert got.keys() == TABLE[kind].keys()
    tolerance = 1e-5 if kind.startswith("OpenAI") else 1e-12
    for name, value in got.items():
        near(value, TABLE[kind][name], 1e-5 if name == "get_sigmas" else tolerance)


@pytest.mark.parametrize("kind", ["DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser"])
def test_a_denoiser_at_level_0_has_a_gradient(kind):
    sigma = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    d = recorded.denoisers(K.external)[kind](recorded.X, sigma, cond=0.1)
    torch.testing.assert_close(d, recorded.X)
    assert torch.isfinite(torch.autograd.grad(d.sum(), sigma)[0]).all()


def test_denoisers_are_modules_with_the_same_state():
    denoiser = recorded.denoisers(K.external)["DiscreteVDDPMDenoiser"]
    assert isinstance(denoiser, K.external.DiscreteSchedule)
    assert set(denoiser.state_dict()) == {"sigmas", "log_sigmas"}
    assert denoiser.inner_model is dict(denoiser.named_children())["inner_model"]


def test_schedules_and_what_is_made_of_levels():
    got = recorded.schedules(K.sampling)
    assert got.keys() == TABLE["schedules"].keys()
    for name, value in got.items():
        near(value, TABLE["schedules"][name], 1e-6)  # float32, and quadrature to 1e-4 of it


@pytest.mark.parametrize("name", [name for name in recorded.SCHEDULES if "vp" not in name])
def test_the_ends_of_a_schedule_learn(name):
    function = getattr(K.sampling, name)
    ends = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.03, 14.6)]
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    levels = function(5, *ends)
    torch.testing.assert_close(levels.float(), function(5, 0.03, 14.6), rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((levels.double() * weights).sum(), ends)
    for k, slope in enumerate(got):
        values = []
        for sign in (1, -1):
            moved = [torch.tensor(v, dtype=torch.float64) for v in (0.03, 14.6)]
            moved[k] *= 1 + sign * 1e-2
            values.append((function(5, *moved).double() * weights).sum().item())
        expected = (values[0] - values[1]) / (2e-2 * (0.03, 14.6)[k])
        assert slope.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ancestral_step_to_level_0_has_a_gradient(dtype):
    s, t = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (5.0, 0.0))
    down, up = K.sampling.get_ancestral_step(s, t)
    assert (down.item(), up, down.dtype) == (0.0, 0.0, dtype)
    assert torch.autograd.grad(down, t)[0].item() == 1.0
    down, up = K.sampling.get_ancestral_step(s, torch.tensor(2.0, dtype=dtype), eta=0.5)
    assert down.dtype == up.dtype == dtype
    assert torch.autograd.grad(up, s)[0] > 0


def test_multistep_coefficients_learn():
    """Adams and Bashforth's of the second order, by hand: h (1 + r/2) and -h r/2, r = h/h'."""
    t = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64, requires_grad=True)
    first, second = (K.sampling.linear_multistep_coeff(2, t, 1, j) for j in (0, 1))
    assert first.item() == pytest.approx(-1 * 1.25)
    assert second.item() == pytest.approx(0.25)
    # d/dt0 of -h^2/(2 h') with h = t2 - t1, h' = t1 - t0, is -h^2/(2 h'^2)
    assert torch.autograd.grad(second, t)[0][0].item() == pytest.approx(-1 / 8)
    with pytest.raises(ValueError, match="order must be at most 1 at step 0, got 2"):
        K.sampling.linear_multistep_coeff(2, t, 0, 0)


def test_more_axes_than_x_has_are_refused():
    with pytest.raises(ValueError, match="x must have at most 2 axes, got 3"):
        K.sampling.to_d(torch.zeros(2, 3), torch.zeros(2, 1, 1), torch.zeros(2, 3))


@pytest.mark.skipif(not table.installed(), reason="k-diffusion is not installed")
def test_the_table_is_what_the_package_computes():
    found = json.loads(json.dumps(recorded.rows(table.sampling(), table.external())))
    assert found.keys() == TABLE.keys()
    for kind, values in found.items():
        for name, value in values.items():
            near(value, TABLE[kind][name], 1e-6)
