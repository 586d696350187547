# SPDX-License-Identifier: Apache-2.0
"""Rewards of images and the regularisers of their noise, against closed forms and differences."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.rewards import Aesthetic, CLIPScore, Reward, Weighted, preprocessed


def pictures(batch=2, height=20, width=14):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


def clip():
    """A tiny CLIP with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPConfig, CLIPModel
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, "num_attention_heads": 2, "vocab_size": 20, "eos_token_id": 19},
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    return CLIPModel(config).double().eval().requires_grad_(False)


TOKENS = {"input_ids": torch.tensor([[1, 5, 7, 19]]), "attention_mask": torch.ones(1, 4).long()}


def assert_gradient_is_that_of_a_difference(reward, images):
    images = images.requires_grad_()
    scores = reward(images)
    assert scores.shape == (len(images),)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        ahead, behind = reward(images + step * direction), reward(images - step * direction)
    wanted = (ahead - behind).sum() / (2 * step)
    assert torch.allclose((gradient * direction).sum(), wanted, rtol=1e-5)


@pytest.mark.thorough
def test_clip_score_is_the_cosine_of_image_and_text():
    model, images = clip(), pictures()
    reward = CLIPScore(model, TOKENS, scale=100.0)
    assert isinstance(reward, Reward)
    output = model(pixel_values=preprocessed(images, 8), **TOKENS)
    cosine = output.logits_per_image[:, 0] / model.logit_scale.exp()
    assert torch.allclose(reward(images), 100 * cosine)
    assert_gradient_is_that_of_a_difference(reward, images)


@pytest.mark.thorough
def test_the_aesthetic_score_reads_the_normalised_embedding():
    model, images = clip(), pictures()
    head = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 1)).double()
    reward = Aesthetic(model, head)
    embedding = model(pixel_values=preprocessed(images, 8), **TOKENS).image_embeds
    assert torch.allclose(reward(images), head(embedding)[:, 0])
    assert_gradient_is_that_of_a_difference(reward, images)


def test_preprocessing_is_that_of_clip():
    """The shorter side resized, the middle, and the colours of the training images."""
    flat = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).view(1, 3, 1, 1).expand(1, 3, 30, 40)
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    seen = preprocessed(flat, 12)
    assert seen.shape == (1, 3, 12, 12)
    assert np.allclose(seen.mean((0, 2, 3)), (np.array([0.1, 0.5, 0.9]) - mean) / std)
    # A ramp along the longer side stays a ramp, and its middle stays the middle.
    ramp = torch.linspace(0, 1, 48, dtype=torch.float64).expand(1, 3, 24, 48)
    row = preprocessed(ramp, 12, mean=(0.5,) * 3, std=(1.0,) * 3)[0, 0, 6]
    assert abs(float(row.mean())) < 1e-3
    assert np.allclose(np.diff(row), 2 / 47, rtol=0.05)


def test_a_sum_of_rewards():
    images = pictures()
    bright, even = (lambda x: x.mean((1, 2, 3))), (lambda x: -x.std((1, 2, 3)))
    reward = Weighted([(bright, 2.0), (even, 0.5)])
    assert torch.allclose(reward(images), 2 * bright(images) + 0.5 * even(images))
    assert_gradient_is_that_of_a_difference(reward, images)


def test_arguments_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"images must have shape \[B, 3, H, W\]"):
        preprocessed(torch.zeros(2, 4, 8, 8), 8)
    with pytest.raises(ValueError, match="Weighted: parts must hold at least one reward"):
        Weighted([])
    with pytest.raises(TypeError, match=r"Weighted: parts\[0\] must begin with a callable"):
        Weighted([("clip", 1.0)])
    with pytest.raises(ValueError, match="CLIPScore: tokens must hold input_ids"):
        CLIPScore(None, {})


# ------------------------------------------------------------------ regularisers


def noise(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_probability_is_the_two_bounds_in_a_known_order():
    """By numpy, with the orders of the elements taken from the same generator."""
    z0, k = 1.3 * noise(2, 3, 40), 5
    penalty = gs.regularizers.Probability(weight=0.7, size=k, orders=3, seed=4)(z0)
    generator = torch.Generator().manual_seed(4)
    total = []
    for _ in range(3):
        order = torch.randperm(120, generator=generator).numpy()
        for sample in z0.flatten(1).numpy():
            vectors = sample[order].reshape(24, k)
            mean = np.linalg.norm(vectors.mean(0))
            moment = np.linalg.norm(vectors.T @ vectors / 24 - np.eye(k), 2)
            beyond = max(math.sqrt(1 + moment) - 1 - math.sqrt(k / 24), 0)
            total.append(min(math.log(2) - 24 * mean**2 / (2 * k), 0))
            total[-1] += min(math.log(2) - 24 * beyond**2 / 2, 0)
    assert penalty.item() == pytest.approx(-0.7 * np.mean(total))


def test_probability_sees_what_the_norm_does_not():
    """A picture has the norm of noise and is none."""
    penalty = gs.regularizers.Probability()
    good = noise(1, 4, 32, 32)
    smooth = torch.ones(1, 4, 32, 32, dtype=torch.float64)
    spread = good * torch.linspace(0.2, 1.8, 32).view(1, 1, 32, 1)
    chi = gs.regularizers.ChiNorm()
    assert abs(float(chi(smooth))) < 1
    assert float(penalty(good)) < 0.1
    assert float(penalty(smooth)) > 100
    assert float(penalty(1.2 * spread)) > 1


def test_the_gradient_of_probability():
    z0 = (1.4 * noise(1, 64)).requires_grad_()
    assert torch.autograd.gradcheck(gs.regularizers.Probability(size=2, orders=2), z0)


def test_the_sphere_is_where_noise_lies():
    z0 = 3 * noise(2, 4, 8)
    projected = gs.regularizers.Sphere()(z0)
    assert torch.allclose(projected.square().mean((1, 2)), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(projected[0] / projected[0].norm(), z0[0] / z0[0].norm())


def test_a_projection_follows_each_update():
    levels = gs.schedules.karras(4)
    z0 = noise(1, 16).requires_grad_()
    found = gs.optimize(
        lambda x, sigma: 0.5 * x,
        z0,
        levels,
        lambda x: x.sum(),
        steps=5,
        lr=0.5,
        projection=gs.regularizers.Sphere(),
    )
    assert torch.allclose(found.z0.square().mean(), torch.ones((), dtype=torch.float64))
    assert found.history[-1].loss < found.history[0].loss
    with pytest.raises(TypeError, match=r"projection must be callable as projection\(z0\)"):
        gs.optimize(lambda x, s: x, z0, levels, lambda x: x.sum(), projection=1.0)
