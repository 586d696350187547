# SPDX-License-Identifier: Apache-2.0
"""docs/peers.md, and the table of the README."""

import rows

from tables.form import markdown, number, power, size


def works() -> list[str]:
    """The workloads of the peers, in the order of the rows."""
    return list(dict.fromkeys(shape for _, shape, _ in rows.latest("peers")))


def compared(work: str, names: dict[str, str] | None = None) -> str:
    """Every way, or those that are named, on one workload."""
    found = rows.latest("peers")
    ways = list(dict.fromkeys(way for way, shape, _ in found if shape == work))
    names = names or {way: way for way in ways}
    return markdown(
        ("", "time over autograd", "peak, MiB", "error of the gradient"),
        (
            (
                told,
                number(found[way, work, "time over autograd"]),
                size(found[way, work, "peak live tensors"]),
                power(found[way, work, "gradient error"]),
            )
            for way, told in names.items()
        ),
    )


def work(start: str) -> str:
    """The workload whose title begins so."""
    return next(each for each in works() if each.startswith(start))


FIVE = {
    "autograd": "your own loop, plain autograd",
    "torch.utils.checkpoint": "`torch.utils.checkpoint` around each step",
    "diffusers EulerDiscreteScheduler": "a diffusers scheduler, gradients on",
    "k-diffusion sample_euler": "k-diffusion without its `no_grad`",
    "torchdiffeq odeint_adjoint": "torchdiffeq's `odeint_adjoint`",
    "gradsampler store": '**`gs.sample(..., memory="store")`**',
    "gradsampler checkpoint": '**`memory="checkpoint"`**',
}


TABLES = {
    "five": lambda: compared(work("convolutions"), FIVE),
    "perceptron": lambda: compared(work("perceptron 16x64 N=256 euler")),
    "perceptron-sde": lambda: compared(work("perceptron 16x64 N=256 euler_maruyama")),
    "convolutions": lambda: compared(work("convolutions")),
    "unet": lambda: compared(work("UNet2DModel")),
    "video": lambda: compared(work("video latent 1x16x8x60x104 N=20 euler")),
    "video-sde": lambda: compared(work("video latent 1x16x8x60x104 N=20 dpmpp_2m_sde")),
}
