"""Train the 8x8 digits denoiser and classifier that ship with the package, and judge them.

    python examples/train_digits.py --out gradsampler/models

needs scikit-learn, for the data and for the support vector machine that reads the samples.
The result is a function of the seed, the step count and the thread count.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gradsampler.models import digits
from gradsampler.models.digits import DigitsClassifier, DigitsNetwork

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
LABEL_DROPOUT = 0.1
EMA_DECAY = 0.995
Model = TypeVar("Model", bound=nn.Module)


def read_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[N, 1, 8, 8]`` on the data scale and int64 labels: 80 % train, 20 % held out."""
    data = load_digits()
    train, held = train_test_split(
        range(len(data.target)), test_size=0.2, random_state=0, stratify=data.target
    )
    images = digits.from_pixels(torch.tensor(data.images, dtype=torch.float32)[:, None] / 16)
    labels = torch.tensor(data.target, dtype=torch.int64)
    return images[train], labels[train], images[held], labels[held]


def denoise(network: DigitsNetwork, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """The preconditioned denoiser D of Karras et al. 2022 (eq. 7, Table 1); sigma is ``[B]``."""
    s, d = sigma.view(-1, 1, 1, 1), network.sigma_data
    norm = (s**2 + d**2).sqrt()
    out: Tensor = network(x / norm, sigma.log() / 4, label)
    return (d / norm) ** 2 * x + s * d / norm * out


def draw_sigma(count: int) -> Tensor:
    """Training noise levels ``[count]``: half log-normal (Table 1), half log-uniform."""
    # The log-normal half alone would hardly visit the ends of the range.
    normal = (1.2 * torch.randn(count // 2) - 1.2).exp()
    span = math.log(SIGMA_MAX / SIGMA_MIN)
    uniform = SIGMA_MIN * (span * torch.rand(count - count // 2)).exp()
    return torch.cat([normal.clamp(SIGMA_MIN, SIGMA_MAX), uniform])


def denoiser_loss(network: DigitsNetwork, images: Tensor, label: Tensor, sigma: Tensor) -> Tensor:
    """The weighted denoising error (eq. 8, lambda of Table 1), averaged over batch and pixels."""
    d, s = network.sigma_data, sigma.view(-1, 1, 1, 1)
    denoised = denoise(network, images + s * torch.randn_like(images), sigma, label)
    weight = (s**2 + d**2) / (s * d) ** 2
    return (weight * (denoised - images) ** 2).mean()


def train(module: Model, loss: Callable[[], Tensor], steps: int) -> Model:
    """Minimise by AdamW under a cosine schedule; return the moving average of the iterates."""
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        value = loss()
        optimiser.zero_grad()
        torch.autograd.backward(value)
        optimiser.step()
        schedule.step()
        average.update_parameters(module)
        if step % 1000 == 0:
            print(f"step {step}: loss {value.item():.4f}", flush=True)
    module.load_state_dict(average.module.state_dict())
    return module.eval()


def train_denoiser(images: Tensor, labels: Tensor, steps: int) -> DigitsNetwork:
    """Train on all noise levels, dropping one label in ten for classifier-free guidance."""
    network = DigitsNetwork()

    def loss() -> Tensor:
        index = torch.randint(len(images), (512,))
        label = labels[index].masked_fill(torch.rand(512) < LABEL_DROPOUT, digits.NULL_CLASS)
        return denoiser_loss(network, images[index], label, draw_sigma(512))

    return train(network, loss, steps)


def train_classifier(images: Tensor, labels: Tensor, steps: int) -> DigitsClassifier:
    """Train under light noise, of a standard deviation uniform in [0, 0.75]."""
    classifier = DigitsClassifier()

    def loss() -> Tensor:
        index = torch.randint(len(images), (256,))
        noise = 0.75 * torch.rand(256, 1, 1, 1) * torch.randn(256, 1, 8, 8)
        return F.cross_entropy(classifier(images[index] + noise), labels[index])

    return train(classifier, loss, steps)


def draw(network: DigitsNetwork, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Heun's deterministic sampler in 18 steps (Karras et al. 2022, Algorithm 1, eq. 5)."""
    ramp = torch.linspace(0, 1, 18)
    ends = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    sigmas = torch.cat([(ends[0] + ramp * (ends[1] - ends[0])) ** RHO, torch.zeros(1)])
    x = SIGMA_MAX * torch.randn(len(labels), 1, 8, 8, generator=generator)
    for now, then in pairwise(sigmas):
        slope = (x - denoise(network, x, now.expand(len(x)), labels)) / now
        ahead = x + (then - now) * slope
        if then > 0:
            second = (ahead - denoise(network, ahead, then.expand(len(x)), labels)) / then
            ahead = x + (then - now) * (slope + second) / 2
        x = ahead
    return x


def spread(images: Tensor, labels: Tensor) -> float:
    """Root mean square, over classes and pixels, of the standard deviation within a class."""
    variances = [images[labels == c].var(0).mean() for c in range(digits.CLASSES)]
    return torch.stack(variances).mean().sqrt().item()


@torch.no_grad()
def evaluate_denoiser(network: DigitsNetwork, data: tuple[Tensor, ...], seed: int) -> None:
    """Print how 1,000 samples are read, how near the training set they lie, and their spread."""
    train, train_labels, held, held_labels = data
    torch.manual_seed(seed)
    for s in (0.002, 0.02, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 80.0):
        seen = denoiser_loss(network, train, train_labels, torch.full((len(train),), s))
        unseen = denoiser_loss(network, held, held_labels, torch.full((len(held),), s))
        print(f"loss at sigma {s}: training digits {seen:.4f}, held-out digits {unseen:.4f}")
    labels = torch.arange(digits.CLASSES).repeat_interleave(100)
    samples = draw(network, labels, torch.Generator().manual_seed(seed))
    # 0.001 is the customary gamma for pixel values in 0..16, hence 0.064 on the data scale.
    reader = SVC(gamma=0.064).fit(train.flatten(1).numpy(), train_labels.numpy())
    score = reader.score(held.flatten(1).numpy(), held_labels.numpy())
    print(f"held-out digits read as their class: {score:.4f}")
    right = torch.tensor(reader.predict(samples.flatten(1).numpy())) == labels
    print(f"samples read as their class: {right.float().mean().item():.4f}")
    print("  per class:", *(f"{k:.2f}" for k in right.view(digits.CLASSES, -1).float().mean(1)))
    near = [torch.cdist(x.flatten(1), train.flatten(1)).amin(1).mean() for x in (samples, held)]
    print("mean distance to the nearest training digit:", end=" ")
    print("samples {:.3f}, held-out digits {:.3f}".format(*near))
    wide = spread(samples, labels), spread(train, train_labels)
    print("spread within a class: samples {:.4f}, training digits {:.4f}".format(*wide))


@torch.no_grad()
def evaluate_classifier(classifier: DigitsClassifier, images: Tensor, labels: Tensor) -> None:
    """Print accuracy and log loss on held-out digits, clean and under noise."""
    for sigma in (0.0, 0.25, 0.5):
        logits = classifier(images + sigma * torch.randn_like(images))
        accuracy = (logits.argmax(1) == labels).float().mean().item()
        loss = F.cross_entropy(logits, labels)
        print(f"classifier at sigma {sigma}: accuracy {accuracy:.4f}, log loss {loss:.4f}")


def main() -> None:
    """Train both networks, write their weights, and judge what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=digits.NETWORK_WEIGHTS.parent)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    data = read_data()
    print(f"standard deviation of the training data: {data[0].std().item():.4f}")
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    network = train_denoiser(data[0], data[1], args.steps)
    classifier = train_classifier(data[0], data[1], 2000)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    paths = args.out / digits.NETWORK_WEIGHTS.name, args.out / digits.CLASSIFIER_WEIGHTS.name
    for module, path in zip((network, classifier), paths, strict=True):
        tensors = {name: value.half() for name, value in module.state_dict().items()}
        save_file(tensors, path, metadata={"sigma_data": str(network.sigma_data)})
    evaluate_denoiser(digits.load_network(paths[0]), data, args.seed + 1)
    evaluate_classifier(digits.load_classifier(paths[1]), data[2], data[3])


if __name__ == "__main__":
    main()
