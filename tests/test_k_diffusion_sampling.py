# SPDX-License-Identifier: Apache-2.0
"""The drop-in's sampling functions against what k-diffusion's own give, recorded in tables.

Gradients are compared with autograd through k-diffusion's code where that is right, and with
differences of its samples where it is NaN, detached or, for LMS, another number.
"""

import inspect
import json
from itertools import pairwise

import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.k_diffusion as K
from gradsampler import noise as noises
from support import k_diffusion_gradients as recorded
from support import k_diffusion_table as table
from support.problems import Gaussian, normal

ROWS = json.loads(recorded.FILE.read_text())
SIGNATURES = json.loads(recorded.SIGNATURES.read_text())
OWN = {"memory", "z0", "noise_sampler"}  # arguments that are added, by keyword alone
NOT_HERE = {"DPMSolver", "PIDStepSizeController"}  # the loops behind two functions


def label(row):
    options = (f"{k}={v}" for k, v in row["options"].items())
    return "-".join([row["function"], *options, f"to-{row['levels'][-1]}"])


rows = pytest.mark.parametrize("row", ROWS, ids=map(label, ROWS))


@pytest.fixture(autouse=True)
def double():
    """Numbers in double precision, as where the tables were made."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(kept)


def ours(row, wanted, **more):
    """The sample of one row, with noise from the table in order."""
    name = row["function"]
    function, supply = getattr(K.sampling, f"sample_{name}"), iter(table.NOISES)
    if "s_tmin" in row["options"]:  # noise is drawn where none is injected, too
        with table.drawn(table.NOISES):
            return recorded.called(function, name, row["options"], *wanted, memory="store")
    if name not in ("lms", "dpmpp_2m"):
        more = {"noise_sampler": lambda sigma, sigma_next: next(supply), **more}
    return recorded.called(function, name, row["options"], *wanted, **more)


def close(got, expected, tolerance=1e-9):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def leaves(row):
    own = row["function"] in recorded.OWN_LEVELS
    return recorded.leaves([row["levels"][0], row["levels"][-1]] if own else row["levels"])


@rows
def test_samples_and_gradients(row):
    wanted = leaves(row)
    x = ours(row, wanted)
    close(x, row["result"])
    gradients = torch.autograd.grad((x * recorded.WEIGHTS).sum(), wanted)
    for got, name in zip(gradients, ("dx", "dgain", "dshift"), strict=False):
        close(got, row[name])
    dsigmas = gradients[3]
    assert torch.isfinite(dsigmas).all()
    if row["function"] == "dpm_adaptive":
        return  # by differences in the next test: its levels are chosen anew
    close(dsigmas[: len(row["quotients"])], row["quotients"], 1e-7)
    if row["dsigmas"] is not None and row["function"] != "lms":
        # At a final 0 most change to another formula there, and have no derivative.
        count = len(row["levels"] if row["function"] in ("euler", "heun") else row["quotients"])
        close(dsigmas[:count], row["dsigmas"][:count])


def test_the_gradient_of_the_adaptive_one_to_its_ends():
    """Of the first level, with those in between as they are: the sample of fixed steps."""
    (row,) = [row for row in ROWS if row["options"] == {"order": 2, "rtol": 0.02}]
    wanted, found = leaves(row), []
    x = ours(row, wanted, callback=lambda info: found.append(float(info["sigma"])))
    (dsigmas,) = torch.autograd.grad((x * recorded.WEIGHTS).sum(), wanted[3])
    levels = sorted({10.0, *found}, reverse=True)

    def fixed(first):
        state, gain, shift, _ = recorded.leaves(levels)
        sigmas, solver = [first, *levels[1:]], gs.solvers.DPMAdaptive(order=2)
        program = solver.program(torch.tensor(sigmas), denoise(gain, shift), started=True)
        with torch.no_grad():
            sample = gs.integrate(program, denoise(gain, shift), state, start=state)
        return float((sample * recorded.WEIGHTS).sum())

    def denoise(gain, shift):
        return lambda x, sigma: recorded.model(gain)(x, sigma, shift=shift)

    assert fixed(10.0) == pytest.approx((x * recorded.WEIGHTS).sum().item(), rel=1e-9)
    slope = (fixed(10.001) - fixed(9.999)) / 2e-3
    assert dsigmas[0].item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    "memory", ["store", "checkpoint", "offload", "revolve:2", pytest.param("auto", id="auto")]
)
@pytest.mark.parametrize("name", ["heun", "dpmpp_sde", "dpm_fast", "dpm_adaptive"])
def test_every_strategy_gives_the_same(name, memory):
    row = [row for row in ROWS if row["function"] == name][-2]
    wanted = leaves(row)
    x = ours(row, wanted, memory=memory)
    close(x, row["result"])
    for got, key in zip(
        torch.autograd.grad((x * recorded.WEIGHTS).sum(), wanted[:3]),
        ("dx", "dgain", "dshift"),
        strict=True,
    ):
        close(got, row[key])


@rows
def test_what_a_noise_sampler_and_a_callback_are_told(row):
    watched = recorded.Watched()
    more = {"noise_sampler": watched.noise} if row["asked"] else {}
    with table.drawn(table.NOISES), torch.no_grad():
        name = row["function"]
        function = getattr(K.sampling, f"sample_{name}")
        recorded.called(
            function, name, row["options"], *leaves(row), callback=watched.callback, **more
        )
    expected = row["asked"]
    if row["options"].get("eta", 1.0) == 0.0 or name in recorded.OWN_LEVELS:
        # Where nothing is injected nothing is asked for: without eta, and in the last step.
        expected = expected[:-1] if "eta" in row["options"] else []
    assert len(watched.asked) == len(expected)
    for got, wanted in zip(watched.asked, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-12)
    assert len(watched.told) == len(row["told"])
    for got, wanted in zip(watched.told, row["told"], strict=True):
        assert got == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_names_arguments_and_defaults(name):
    if name in NOT_HERE:
        assert not hasattr(K.sampling, name)
        return
    home = K.sampling if hasattr(K.sampling, name) else K.external
    value, theirs = getattr(home, name), SIGNATURES[name]
    if isinstance(theirs, list):
        theirs, value = {"": theirs}, {"": value}
    else:
        value = {method: getattr(value, method) for method in theirs}
    for method, parameters in theirs.items():
        own = inspect.signature(value[method]).parameters.values()
        plain = [p.name for p in own if p.kind != inspect.Parameter.KEYWORD_ONLY]
        found = recorded.signature(value[method])
        assert [p for p in found if p[0] in plain] == parameters, method
        assert {p[0] for p in found} - set(plain) <= OWN


def test_they_are_found_where_k_diffusion_has_them():
    from gradsampler.integrations.k_diffusion import external, sampling
    from gradsampler.integrations.k_diffusion.sampling import sample_euler

    assert K.sampling is sampling
    assert K.external is external
    assert K.sample_euler is sampling.sample_euler is sample_euler


@pytest.mark.thorough
@pytest.mark.skipif(not table.installed(), reason="k-diffusion is not installed")
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_the_tables_are_what_the_package_computes():
    found = json.loads(json.dumps(recorded.rows(table.sampling())))
    assert len(found) == len(ROWS)
    for got, row in zip(found, ROWS, strict=True):
        assert got["function"] == row["function"]
        for key in ("result", "dx", "dgain", "dshift"):
            close(torch.tensor(got[key]), row[key], 1e-12)
    signatures = recorded.signatures(table.sampling()) | recorded.signatures(table.external())
    assert json.loads(json.dumps(signatures)) == SIGNATURES


# Random numbers.

GAUSSIAN = Gaussian(0.3, 0.5)
X = 5.0 * normal(2, 3)
SIGMAS = torch.tensor([5.0, 2.0, 0.8, 0.3, 0.0], dtype=torch.float64)


def test_the_same_seed_gives_the_sample_of_a_loop():
    """A loop in the order of k-diffusion's: Euler's method with ancestral noise."""
    torch.manual_seed(4)
    x = X
    for s, t in pairwise(SIGMAS):
        up = torch.minimum(t, (t**2 * (s**2 - t**2) / s**2) ** 0.5)
        down = (t**2 - up**2) ** 0.5
        x = x + (down - s) * (x - GAUSSIAN.denoise(x, s.expand(2))) / s
        if t > 0:
            x = x + up * torch.randn_like(x)
    after = torch.get_rng_state()
    torch.manual_seed(4)
    got = K.sample_euler_ancestral(GAUSSIAN.denoise, X, SIGMAS)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_churn_draws_in_every_step_as_k_diffusion_does(dtype):
    """Also at levels outside of its window, so that what is drawn after them is the same."""
    start, levels = X.to(dtype), SIGMAS.to(dtype)
    window = {"s_churn": 1.0, "s_tmin": 0.8, "s_tmax": 2.0, "s_noise": 1.1}
    torch.manual_seed(4)
    x = start
    for k, (s, t) in enumerate(pairwise(levels)):
        noise, raised = torch.randn_like(x), s * 1.25 if k in (1, 2) else s
        x = x + noise * 1.1 * (raised**2 - s**2) ** 0.5
        x = x + (t - raised) * (x - GAUSSIAN.denoise(x, raised.expand(2))) / raised
    after = torch.get_rng_state()
    torch.manual_seed(4)
    got = K.sample_euler(GAUSSIAN.denoise, start, levels, **window)
    torch.testing.assert_close(got, x, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), after)


def by_a_tree(seed, s, t):
    torchsde = pytest.importorskip("torchsde")
    tree = torchsde.BrownianTree(SIGMAS[3], torch.zeros_like(X), SIGMAS[0], entropy=seed)
    return -tree(t, s) / (s - t) ** 0.5


@pytest.mark.parametrize("memory", ["checkpoint", "revolve:2"])
def test_the_sde_samplers_draw_from_a_brownian_tree(memory):
    """Its seed is the first draw; asked again for a noise, it gives the same."""
    torch.manual_seed(4)
    seed = int(torch.randint(0, 2**63 - 1, []))
    after = torch.get_rng_state()
    given = noises.Given([by_a_tree(seed, s, t) for s, t in pairwise(SIGMAS[:4])])
    x, sigmas = X.clone().requires_grad_(), SIGMAS.clone().requires_grad_()
    expected = gs.sample(
        GAUSSIAN.denoise, X, sigmas, start=x, solver="dpmpp_2m_sde", noise=given, memory="store"
    )
    slopes = torch.autograd.grad(expected.square().sum(), [x, sigmas])
    torch.manual_seed(4)
    got = K.sample_dpmpp_2m_sde(GAUSSIAN.denoise, x, sigmas, memory=memory)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), [x, sigmas]), slopes, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_tree_for_each_sample():
    pytest.importorskip("torchsde")
    sampler = K.sampling.BrownianTreeNoiseSampler(X, SIGMAS[3], SIGMAS[0], seed=[7, 8])
    one = sampler(SIGMAS[0], SIGMAS[1])
    alone = K.sampling.BrownianTreeNoiseSampler(X[1:], SIGMAS[3], SIGMAS[0], seed=8)
    torch.testing.assert_close(one[1:], alone(SIGMAS[0], SIGMAS[1]))
    assert not torch.equal(one[0], one[1])
    with pytest.raises(ValueError, match="seed must be a number, or one for each of 2 samples"):
        K.sampling.BrownianTreeNoiseSampler(X, SIGMAS[3], SIGMAS[0], seed=[7])


def test_without_torchsde_the_message_names_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchsde", None)
    with pytest.raises(ImportError, match=r"pip install torchsde.*noise\.SignedRoll"):
        K.sample_dpmpp_3m_sde(GAUSSIAN.denoise, X, SIGMAS)
    x = K.sample_dpmpp_3m_sde(GAUSSIAN.denoise, X, SIGMAS, noise_sampler=noises.Philox(3))
    assert torch.isfinite(x).all()


@pytest.mark.parametrize("function", ["sample_dpmpp_sde", "sample_dpm_fast", "sample_euler"])
def test_noise_that_is_made_of_x(function):
    """The gradient to x goes through the noise as well; by differences along a direction."""
    direction, weights = normal(2, 3, seed=8), normal(2, 3, seed=9)
    ends = (0.1, 5.0, 8) if function == "sample_dpm_fast" else (SIGMAS,)
    more = {"sample_dpm_fast": {"eta": 0.8}, "sample_euler": {"s_churn": 1.0}}.get(function, {})

    def sample(x):
        noise = noises.SignedRoll(seed=5)
        return getattr(K, function)(GAUSSIAN.denoise, x, *ends, noise_sampler=noise, **more)

    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad((sample(x) * weights).sum(), x)
    with torch.no_grad():
        ahead, behind = (sample(X + h * direction) * weights for h in (1e-5, -1e-5))
    slope = (ahead - behind).sum().item() / 2e-5
    assert (dx * direction).sum().item() == pytest.approx(slope, rel=1e-6)
    silent = getattr(K, function)(GAUSSIAN.denoise, x, *ends, noise_sampler=noises.Off(), **more)
    (plain,) = torch.autograd.grad((silent * weights).sum(), x)
    assert (dx - plain).norm() > 0.1 * plain.norm()


def test_noise_that_is_made_of_a_given_z0():
    """For a run that does not start from noise alone."""
    z0 = normal(2, 3, seed=11).requires_grad_()
    start = normal(2, 3, seed=12) + 5.0 * normal(2, 3, seed=13)
    x = K.sample_euler_ancestral(
        GAUSSIAN.denoise, start, SIGMAS, noise_sampler=noises.SignedRoll(2), z0=z0
    )
    expected = gs.sample(
        GAUSSIAN.denoise,
        z0,
        SIGMAS,
        start=start,
        solver="euler_ancestral",
        noise=noises.SignedRoll(2),
    )
    assert torch.equal(x, expected)
    assert torch.autograd.grad(x.sum(), z0)[0].norm() > 0


def test_eta_and_s_noise_learn():
    eta = torch.tensor(0.7, requires_grad=True)
    s_noise = torch.tensor(0.9, requires_grad=True)

    def sample(eta, s_noise):
        supply = iter(table.NOISES)
        x = K.sample_dpm_2_ancestral(
            GAUSSIAN.denoise,
            table.Z0 * 5,
            SIGMAS,
            eta=eta,
            s_noise=s_noise,
            noise_sampler=lambda s, t: next(supply),
        )
        return (x * recorded.WEIGHTS).sum()

    got = torch.autograd.grad(sample(eta, s_noise), [eta, s_noise])
    for k, slope in enumerate(got):
        moved = [[0.7, 0.9], [0.7, 0.9]]
        moved[0][k] += 1e-5
        moved[1][k] -= 1e-5
        ahead, behind = (sample(*each) for each in moved)
        assert slope.item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-7)


def test_churn_learns():
    """Both its amounts, by differences; at the last level but one it is outside of its window."""

    def sample(s_churn, s_noise):
        supply = iter(table.NOISES)
        x = K.sample_heun(
            GAUSSIAN.denoise,
            table.Z0 * 5,
            SIGMAS,
            s_churn=s_churn,
            s_tmin=0.5,
            s_noise=s_noise,
            noise_sampler=lambda s, t: next(supply),
        )
        return (x * recorded.WEIGHTS).sum()

    amounts = [torch.tensor(v, requires_grad=True) for v in (0.8, 1.1)]
    for k, slope in enumerate(torch.autograd.grad(sample(*amounts), amounts)):
        ahead, behind = ([0.8, 1.1], [0.8, 1.1])
        ahead[k], behind[k] = ahead[k] + 1e-5, behind[k] - 1e-5
        quotient = (sample(*ahead) - sample(*behind)).item() / 2e-5
        assert slope.item() == pytest.approx(quotient, rel=1e-7)


@pytest.mark.parametrize("name", ["dpmpp_2m", "euler_ancestral", "heun"])
def test_levels_of_each_sample(name):
    """Each sample of the batch as alone; a sampler of noise is asked with both their levels."""
    sigmas = torch.stack([SIGMAS, 0.8 * SIGMAS], 1)
    asked = []

    def sampler(s, t):
        asked.append((s.tolist(), t.tolist()))
        return normal(2, 3, seed=len(asked))

    function = getattr(K, f"sample_{name}")
    more = {"noise_sampler": sampler} if "ancestral" in name else {}
    x = function(GAUSSIAN.denoise, X, sigmas, **more)
    assert asked[:1] == ([([5.0, 4.0], [2.0, 1.6])] if more else [])
    for k in range(2):
        supply = iter(normal(2, 3, seed=n)[k : k + 1] for n in range(1, 5))
        alone = {"noise_sampler": lambda s, t, supply=supply: next(supply)} if more else {}
        expected = function(GAUSSIAN.denoise, X[k : k + 1], sigmas[:, k], **alone)
        torch.testing.assert_close(x[k : k + 1], expected, rtol=1e-12, atol=1e-12)


# What the model is called with.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_model_is_called_in_the_dtype_of_x(dtype):
    """Whatever that of its parameters: a wrapper casts for its network."""
    layer = torch.nn.Linear(3, 3, dtype=torch.bfloat16)
    seen = []

    def model(x, sigma, **given):
        seen.append((x.dtype, sigma.dtype, tuple(sigma.shape), sigma.is_contiguous()))
        return x / 2 + 0 * layer(x.to(torch.bfloat16)).to(x.dtype)

    x = X.to(dtype).requires_grad_()
    got = K.sample_heun(model, x, SIGMAS.float())
    got.float().sum().backward()
    assert got.dtype == x.grad.dtype == dtype
    assert set(seen) == {(dtype, dtype, (2,), True)}


def test_a_wrapped_network_reads_as_gradsampler_has_it():
    """With guidance: the weight in the coefficients, which may learn."""
    scale = torch.tensor(1.5, requires_grad=True)

    def network(x, sigma, shift):
        return GAUSSIAN.denoise(x, sigma) + shift

    guided = gs.Guided(network, scale, {"shift": 0.0})
    x = K.sample_dpmpp_2m(guided, X, SIGMAS, {"shift": 0.1})
    expected = gs.sample(guided, X, SIGMAS, start=X, solver="dpmpp_2m", cond={"shift": 0.1})
    assert torch.equal(x, expected)
    assert torch.autograd.grad(x.sum(), scale)[0] != 0


def test_nothing_is_recorded_without_grad_mode():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not K.sample_lms(GAUSSIAN.denoise, x, SIGMAS).requires_grad


def test_a_bar_is_shown_unless_it_is_disabled(capsys):
    K.sample_euler(GAUSSIAN.denoise, X, SIGMAS, disable=False)
    assert "4/4" in capsys.readouterr().err
    K.sample_euler(GAUSSIAN.denoise, X, SIGMAS, disable=True)
    K.sample_euler(GAUSSIAN.denoise, X, SIGMAS)  # no terminal
    assert capsys.readouterr().err == ""


def test_a_callback_can_end_a_run():
    class Ended(Exception):
        pass

    def callback(info):
        if info["i"] == 1:
            raise Ended

    with pytest.raises(Ended):
        K.sample_dpmpp_2m(GAUSSIAN.denoise, X, SIGMAS, callback=callback)


def test_the_adaptive_one_counts_its_steps():
    (row,) = [row for row in ROWS if row["options"].get("h_init") == 3.0]
    x, info = ours(row, leaves(row), return_info=True)
    assert info == {k: int(row["told"][-1][k]) for k in ("steps", "nfe", "n_accept", "n_reject")}
    assert info["n_reject"] > 0
    close(x, row["result"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: K.sample_euler(3, X, SIGMAS), "model must be callable as model(x, sigma"),
        (lambda: K.sample_euler(never, X[0], SIGMAS), "x must have shape [B, *state]"),
        (lambda: K.sample_euler(never, X, SIGMAS.tolist()), "sigmas must be a torch.Tensor"),
        (lambda: K.sample_lms(never, X, SIGMAS.flip(0)), "sigmas must"),
        (lambda: K.sample_dpmpp_2m(never, X, SIGMAS[:-1].flip(0)), "sigmas must decrease strictly"),
        (
            lambda: K.sample_euler(never, X, SIGMAS.flip(0)[1:, None].expand(4, 2)),
            "sigmas[:, 0] must decrease strictly",
        ),
        (lambda: K.sample_lms(never, X, SIGMAS, order=5), "lms: order must be at most 4"),
        (
            lambda: K.sample_euler(never, X, SIGMAS, [3]),
            "extra_args must be a dict or None, got list",
        ),
        (lambda: K.sample_euler(never, X, SIGMAS, callback=3), "callback must be callable"),
        (
            lambda: K.sample_euler_ancestral(never, X, SIGMAS, noise_sampler=3),
            "noise_sampler must be callable as noise_sampler(sigma, sigma_next)",
        ),
        (
            lambda: K.sample_euler_ancestral(
                GAUSSIAN.denoise, X, SIGMAS, noise_sampler=lambda s, t: X[:1]
            ),
            "what draw returns at step 0 must have shape [2, 3]",
        ),
        (
            lambda: K.sample_dpmpp_sde(never, X, SIGMAS[:, None].expand(5, 2)),
            "noise_sampler must be given where levels are [N+1, B], got None",
        ),
        (
            lambda: K.sample_dpmpp_2m_sde(never, X, SIGMAS, solver_type="euler"),
            "solver_type must be one of heun, midpoint",
        ),
        (lambda: K.sample_dpm_fast(never, X, 0.0, 5.0, 9), "sigma_min must be a number above 0"),
        (lambda: K.sample_dpm_fast(never, X, 0.1, 5.0, 0), "n must be at least 1"),
        (
            lambda: K.sample_dpm_fast(never, X, 5.0, 0.1, 9, eta=1.0),
            "eta must be 0 where the levels rise",
        ),
        (
            lambda: K.sample_dpm_adaptive(never, X, 5.0, 0.1),
            "sigma_max must be above sigma_min = 5.0",
        ),
        (lambda: K.sample_dpm_adaptive(never, X, 0.1, 5.0, order=4), "order must be 2 or 3"),
        (
            lambda: K.sample_euler_ancestral(never, X, SIGMAS, z0=X[:1]),
            "z0 must have shape [2, 3]",
        ),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value)


def never(x, sigma):
    raise AssertionError("called")
