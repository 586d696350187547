# SPDX-License-Identifier: Apache-2.0
"""The shipped digits networks: their files, their behaviour, and how good they are."""

import re
from functools import cache
from importlib import resources

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

import gradsampler as gs
from gradsampler import models
from support.problems import normal

FOLDER = resources.files("gradsampler.models")
WEIGHTS = ("digits.safetensors", "digits_classifier.safetensors")
LOADERS = {"network": models.load_network, "classifier": models.load_classifier}
loaders = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small networks: two threads wait for each other, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def digits():
    """The card's split: training images and labels, held-out images and labels."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=360, stratify=labels, random_state=0)
    training, held_out, training_labels, held_out_labels = map(torch.as_tensor, split)

    def images(pixels):
        return (pixels / 8 - 1).view(-1, 1, 8, 8).float()

    return images(training), training_labels, images(held_out), held_out_labels


def denoiser():
    network = models.load_network()
    return gs.EDM(network, network.sigma_data)


# ------------------------------------------------------------------ the files


def test_weights_lie_in_the_package_and_are_small():
    sizes = [len(FOLDER.joinpath(name).read_bytes()) for name in WEIGHTS]
    assert 0 < sum(sizes) <= 2e6
    shipped = {p.name for p in FOLDER.iterdir() if p.name.endswith(".safetensors")}
    assert shipped == set(WEIGHTS)


@pytest.mark.parametrize(
    "said",
    [
        "Optical Recognition of Handwritten Digits",
        "CC BY 4.0",
        "examples/train_digits.py",
        "support vector machine",
        "97|99",
        "limits",
    ],
)
def test_the_card_tells_of(said):
    card = FOLDER.joinpath("CARD.md").read_text()
    for heading in ("## Training", "## Quality"):
        assert heading in card
    assert re.search(said, card)


def test_the_card_gives_the_true_sizes():
    card = FOLDER.joinpath("CARD.md").read_text()
    for name, load in zip(WEIGHTS, LOADERS.values(), strict=True):
        (row,) = [line for line in card.splitlines() if line.startswith(f"| `{name}`")]
        count = sum(p.numel() for p in load().parameters())
        assert f"{count:,}" in row
        assert f"{len(FOLDER.joinpath(name).read_bytes()):,}" in row


# ------------------------------------------------------------------ loading


@loaders
def test_loads_frozen_in_eval_mode_and_float32(load):
    model = load()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@loaders
def test_loading_draws_no_random_numbers(load):
    state = torch.get_rng_state()
    load()
    assert torch.equal(torch.get_rng_state(), state)


@loaders
def test_each_load_is_a_model_of_its_own(load):
    one, other = load(), load()
    with torch.no_grad():
        next(one.parameters()).zero_()
    assert next(other.parameters()).abs().sum() > 0
    assert next(load().parameters()).abs().sum() > 0


def test_pixels_go_there_and_back():
    pixels = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    assert torch.allclose(models.to_pixels(models.from_pixels(pixels)), pixels, atol=1e-6)
    assert models.to_pixels(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 0.5, 1, 1]


# ------------------------------------------------------------------ dtypes and labels

# Against float64: float32 has 24 bits, bfloat16 8, and some ten layers add their roundings.
TOLERANCE = {torch.float64: 0.0, torch.float32: 1e-5, torch.bfloat16: 0.05}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).split(".")[1])


@dtypes
def test_network_runs_in(dtype):
    x, noise, label = normal(6, 1, 8, 8), torch.linspace(-1.5, 1, 6).double(), torch.arange(6)
    out = models.load_network().to(dtype)(x.to(dtype), noise.to(dtype), label)
    # The embedding's angles reach 16 |noise|; in bfloat16 compare with the level it was told.
    exact = models.load_network().double()(x, noise.to(dtype).double(), label)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert (out.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@dtypes
def test_classifier_runs_in(dtype):
    x = normal(6, 1, 8, 8)
    exact = models.load_classifier().double()(x)
    logits = models.load_classifier().to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    assert logits.shape == (6, 10)
    assert (logits.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@dtypes
def test_samples_in(dtype):
    network = models.load_network().to(dtype)
    z0 = normal(2, 1, 8, 8).to(dtype)
    x = gs.sample(gs.EDM(network, network.sigma_data), z0, gs.schedules.karras(4), solver="heun")
    assert x.dtype == dtype
    assert bool(torch.isfinite(x).all())


@pytest.mark.parametrize("label", [-1, 11, 100])
def test_refuses_a_label_out_of_range(label):
    x, noise = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=rf"label must lie in 0\.\.10, got .*{label}"):
        models.load_network()(x, noise, torch.tensor([0, label]))


def test_no_label_is_the_null_class():
    network, x, noise = models.load_network(), normal(3, 1, 8, 8).float(), torch.zeros(3)
    assert models.NULL_CLASS == 10
    null = network(x, noise, torch.full((3,), models.NULL_CLASS))
    assert torch.equal(network(x, noise), null)
    assert (network(x, noise, torch.tensor([0, 1, 2])) - null).abs().max() > 1e-2


def test_samples_of_a_batch_do_not_see_each_other():
    network = models.load_network().double()
    x, noise, label = normal(5, 1, 8, 8), torch.linspace(-1, 1, 5).double(), torch.arange(5)
    together = network(x, noise, label)
    for i in range(5):
        alone = network(x[i : i + 1], noise[i : i + 1], label[i : i + 1])
        assert torch.allclose(alone[0], together[i], rtol=1e-12, atol=1e-12)


def test_gradients_of_the_network_are_right():
    network = models.load_network().double()
    x = normal(1, 1, 8, 8).requires_grad_()
    noise = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([4])
    assert torch.autograd.gradcheck(
        lambda x, noise: network(x, noise, label), (x, noise), fast_mode=True
    )


# ------------------------------------------------------------------ what it has learnt


def test_denoiser_leaves_an_image_almost_without_noise_alone():
    _, _, images, labels = digits()
    noisy = images + 0.002 * normal(*images.shape).float()
    out = denoiser()(noisy, torch.full((len(images),), 0.002), label=labels)
    assert (out - noisy).square().mean().sqrt() < 0.004


def test_denoiser_gives_the_mean_of_the_data_where_all_is_noise():
    images, labels, _, _ = digits()
    z = normal(200, 1, 8, 8, seed=2).float()
    sigma = torch.full((200,), 80.0)
    out = denoiser()(80 * z, sigma)
    assert (out - images.mean(0)).square().mean().sqrt() < 0.1
    for digit in range(10):
        out = denoiser()(80 * z, sigma, label=torch.full((200,), digit))
        mean = images[labels == digit].mean(0)
        assert (out - mean).square().mean().sqrt() < 0.1
        assert (out - images.mean(0)).square().mean().sqrt() > 0.15


@pytest.mark.parametrize(("sigma", "left"), [(0.1, 0.7), (0.5, 0.3), (2.0, 0.05)])
def test_denoiser_removes_noise_from_held_out_digits(sigma, left):
    _, _, images, labels = digits()
    noisy = images + sigma * normal(*images.shape, seed=3).float()
    out = denoiser()(noisy, torch.full((len(images),), sigma), label=labels)
    assert (out - images).square().mean() < left * (noisy - images).square().mean()


def test_classifier_reads_held_out_digits():
    _, _, images, labels = digits()
    read = models.load_classifier()(images).argmax(1)
    assert (read == labels).double().mean() >= 0.97


@cache
def machine():
    """A reader that saw only real training digits; it shares nothing with the shipped networks."""
    images, labels, _, _ = digits()
    return SVC(gamma=0.064).fit(images.flatten(1).numpy(), labels.numpy())


def test_the_reader_reads_held_out_digits():
    _, _, images, labels = digits()
    assert machine().score(images.flatten(1).numpy(), labels.numpy()) >= 0.97


def test_conditional_samples_are_read_as_their_class():
    labels = torch.arange(10).repeat_interleave(20)
    x = gs.sample(
        denoiser(),
        normal(200, 1, 8, 8, seed=11).float(),
        gs.schedules.karras(18, final="zero"),
        solver="heun",
        cond={"label": labels},
    )
    read = torch.as_tensor(machine().predict(x.flatten(1).numpy()))
    assert (read == labels).double().mean() >= 0.95
    for digit in range(10):
        own = x[labels == digit]
        assert (read[labels == digit] == digit).double().mean() >= 0.8
        images = digits()[0][digits()[1] == digit]
        # Varied as the data is: a model that gives one image a class would pass the reader.
        assert 0.7 < own.std(0).mean() / images.std(0).mean() < 1.3
