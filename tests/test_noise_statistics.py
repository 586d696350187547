# SPDX-License-Identifier: Apache-2.0
"""What each step noise does to the samples: Gaussian data, exact denoiser, so all is known.

Such a run is linear in z0 and the noises. Its weights, read off a run on unit inputs, give the
standard deviation that independent noise would lead to without sampling error; what is left to
the draws is their own error, 0.3 % for a standard deviation and 0.7 % for a kurtosis here.
"""

import math
from functools import cache
from typing import NamedTuple

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from support.problems import Gaussian, normal

DATA = Gaussian(mean=0.0, std=0.5)
Z0 = normal(32, 2048, seed=11, dtype=torch.float32)
Z0 /= Z0.square().mean().sqrt()


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small operations: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Signs(noises.NoiseSource):
    """Random signs of z0 where it stands: SignedRoll without its roll."""

    def at(self, z0, step, num_steps):
        generator = torch.Generator().manual_seed(step)
        return z0 * (2.0 * torch.randint(2, z0.shape, generator=generator) - 1)


SOURCES = {
    "philox": noises.Philox(seed=1),
    "signed-roll": noises.SignedRoll(seed=1),
    "mixture": noises.Mixture(noises.SignedRoll(seed=1), math.pi / 4, seed=2),
    "sincos": noises.SinCos(),
    "signs": Signs(),
}


class Run(NamedTuple):
    """A stochastic run."""

    solver: str
    num_steps: int
    churn: float | None = None

    def sample(self, z0, noise):
        levels = gs.schedules.karras(self.num_steps)
        churn = None if self.churn is None else gs.Churn(self.churn)
        with torch.no_grad():
            return gs.sample(DATA.denoise, z0, levels, solver=self.solver, churn=churn, noise=noise)


# 3.4 over 36 steps raises each level by 9 %, the most that Cosmos does; 40 over 100 by 40 %.
HEUN = {
    "heun-36-churn3.4": Run("heun", 36, 3.4),
    "heun-100-churn5": Run("heun", 100, 5.0),
    "heun-100-churn40": Run("heun", 100, 40.0),
}
RUNS = {
    **HEUN,
    "dpmpp_2m_sde-100": Run("dpmpp_2m_sde", 100),
    "euler_ancestral-60": Run("euler_ancestral", 60),
}
every_run = pytest.mark.parametrize("name", RUNS)


class Statistics(NamedTuple):
    """Of all elements together; the deviation in units of the data's."""

    deviation: float
    kurtosis: float


def statistics(x):
    x = x.double()
    x = x - x.mean()
    variance = x.square().mean()
    return Statistics(variance.sqrt().item() / DATA.std, (x.pow(4).mean() / variance**2).item())


@cache
def of(name, source):
    return statistics(RUNS[name].sample(Z0, SOURCES[source]))


@cache
def independent(name):
    """The deviation under independent noise, from the run's weights."""
    run = RUNS[name]
    z0, *noise = torch.eye(run.num_steps + 1, dtype=torch.float64).unbind()
    weights = run.sample(z0[:, None], noises.Given([e[:, None] for e in noise]))
    return weights.norm().item() / DATA.std


right_sources = pytest.mark.parametrize(
    ("name", "source"),
    [
        *((name, source) for name in RUNS for source in ("philox", "signed-roll")),
        ("heun-36-churn3.4", "mixture"),
    ],
)


@right_sources
def test_samples_are_as_wide_as_under_independent_noise(name, source):
    assert of(name, source).deviation == pytest.approx(independent(name), rel=0.01)


@right_sources
def test_samples_are_gaussian(name, source):
    assert of(name, source).kurtosis == pytest.approx(3.0, rel=0.02)


@every_run
def test_signed_roll_gives_the_statistics_of_philox(name):
    assert of(name, "signed-roll") == pytest.approx(of(name, "philox"), rel=0.02)


@pytest.mark.parametrize("name", [*HEUN, "dpmpp_2m_sde-100"])
@pytest.mark.parametrize("source", ["philox", "signed-roll"])
def test_samples_are_as_wide_as_the_data(name, source):
    assert of(name, source).deviation == pytest.approx(1.0, rel=0.02)


@every_run
def test_sincos_widens_the_samples_several_times(name):
    """Its noise follows z0, so it adds in amplitude: the formula's nature, and no defect here."""
    assert 4.0 < of(name, "sincos").deviation < 8.5


@pytest.mark.parametrize("name", HEUN)
def test_signs_without_the_roll_have_heavy_tails(name):
    """Each element is its z0 times an independent nearly normal number: kurtosis 3 * 3."""
    got = of(name, "signs")
    assert got.deviation == pytest.approx(independent(name), rel=0.02)
    assert 8.0 < got.kurtosis < 9.5


@pytest.mark.parametrize(
    ("source", "spread"),
    [
        pytest.param("philox", math.sqrt(2 / 64), id="philox"),
        pytest.param("signed-roll", math.sqrt(4 / 64), id="signed-roll"),
    ],
)
def test_in_64_dimensions_signed_roll_spreads_the_energies(source, spread):
    """All its noises have the energy of z0, so energies of samples vary sqrt(2) times as much."""
    x = HEUN["heun-36-churn3.4"].sample(
        normal(2048, 64, seed=12, dtype=torch.float32), SOURCES[source]
    )
    energy = x.double().square().mean(1)
    assert (energy.std() / energy.mean()).item() == pytest.approx(spread, rel=0.06)
