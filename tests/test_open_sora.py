# SPDX-License-Identifier: Apache-2.0
"""The Open-Sora drop-in against its arithmetic, written out here as plain loops in float64."""

import enum
import math
import re
import runpy
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsampler as gs
from gradsampler.integrations import open_sora
from support.problems import normal

ROOT = Path(__file__).parent.parent
EXACT = {"rtol": 1e-9, "atol": 1e-9}
STEPS = 14  # guidance oscillates from step 10 on
TIMES = [3 * u / (1 + 2 * u) for u in (1 - i / STEPS for i in range(STEPS + 1))]
SHAPE = (2, 3, 3, 4, 2)  # B, C, T, H, W
PATCH = 2
memories = pytest.mark.parametrize("memory", sorted(set(gs.memory.names()) - {"reversible"}))


def leaf(x):
    return x.detach().clone().requires_grad_()


def pack_by_index(x, p=PATCH):
    """The token of each patch, its place and its channels counted one by one."""
    b, c, t, h, w = x.shape
    out = torch.zeros(b, t * (h // p) * (w // p), c * p * p, dtype=x.dtype)
    for i in range(b):
        for k in range(c):
            for f in range(t):
                for y in range(h):
                    for z in range(w):
                        token = (f * (h // p) + y // p) * (w // p) + z // p
                        out[i, token, (k * p + y % p) * p + z % p] = x[i, k, f, y, z]
    return out


# The loop.


class Velocity(nn.Module):
    """A curved field that couples neighbours and uses all that Open-Sora hands to its network."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.7, -0.4], dtype=torch.float64))

    def forward(self, img, timesteps, guidance, txt, cond=None, flow_shift=None):
        def column(c):
            return c.view(-1, *[1] * (img.ndim - 1))

        hidden = self.gain[0] * img + self.gain[1] * img.roll(1, dims=1) + column(txt)
        if cond is not None:
            channels = -1 if img.ndim == 3 else 1
            size = img.shape[channels]
            hidden = hidden + 0.3 * cond.narrow(channels, 0, 1)
            hidden = hidden + 0.5 * cond.narrow(channels, cond.shape[channels] - size, size)
        return torch.tanh(hidden) * torch.cos(column(timesteps)) + 0.02 * column(guidance)


class Case:
    """One setting of the loop, with fresh leaves for everything that takes a gradient."""

    def __init__(self, packed, image=True, reference=True):
        video = normal(*SHAPE, seed=1)
        self.packed = packed
        self.z = leaf(pack_by_index(video) if packed else video)
        self.copies = 3 if image else 2
        self.txt = leaf(normal(self.copies * SHAPE[0], seed=2))
        self.times = leaf(torch.tensor(TIMES, dtype=torch.float64))
        self.guidance = leaf(torch.tensor(4.1, dtype=torch.float64))
        self.guidance_img = leaf(torch.tensor(2.3, dtype=torch.float64)) if image else None
        self.masks = self.masked_ref = None
        if reference:
            self.masks = (normal(SHAPE[0], 1, *SHAPE[2:], seed=3) > 0).double()
            self.masked_ref = leaf(normal(*SHAPE, seed=4) * self.masks)
        self.model = Velocity()

    def leaves(self):
        named = [self.z, self.txt, self.times, self.guidance, self.guidance_img, self.masked_ref]
        return [x for x in named if x is not None] + list(self.model.parameters())

    def dropped_in(self, **options):
        img = self.z.repeat(self.copies, *[1] * (self.z.ndim - 1))
        return open_sora.denoise(
            self.model,
            img=img,
            txt=self.txt,
            timesteps=self.times,
            guidance=self.guidance,
            guidance_img=self.guidance_img,
            masks=self.masks,
            masked_ref=self.masked_ref,
            sigma_min=1e-5,
            flow_shift=None,
            patch_size=PATCH,
            **options,
        )

    def frame_scale(self, image, i):
        """The image guidance of each frame at step i, in the shape that multiplies the state."""
        last = image + (1 - image) * i / len(TIMES[1:])
        frames = [1 + (last - 1) * f / (SHAPE[2] - 1) for f in range(SHAPE[2])]
        if not self.packed:
            return torch.stack(frames).view(1, 1, -1, 1, 1)
        tokens = (SHAPE[3] // PATCH) * (SHAPE[4] // PATCH)
        return torch.stack([s for s in frames for _ in range(tokens)]).view(1, -1, 1)

    def by_hand(self, text_osci=False, image_osci=False, scale_temporal_osci=False):
        """Open-Sora's loop, with a call of its own for each copy."""
        n, cond = SHAPE[0], [None] * self.copies
        if self.masked_ref is not None:
            both = torch.cat((self.masks, self.masked_ref), dim=1)
            both = pack_by_index(both) if self.packed else both
            cond = [both, both, torch.zeros_like(both)][: self.copies]
        x = self.z
        for i in range(len(self.times) - 1):
            now, then = self.times[i], self.times[i + 1]
            v = [
                self.model(
                    img=x,
                    timesteps=now.expand(n),
                    guidance=self.guidance.expand(n),
                    txt=self.txt[k * n : (k + 1) * n],
                    cond=cond[k],
                )
                for k in range(self.copies)
            ]
            odd = i in (11, 13)
            text = 1.0 if odd and text_osci else self.guidance
            if self.guidance_img is None:
                x = x + (then - now) * (v[1] + text * (v[0] - v[1]))
                continue
            image = 1.0 if odd and image_osci else self.guidance_img
            if scale_temporal_osci and image > 1:
                image = self.frame_scale(image, i)
            x = x + (then - now) * (v[2] + image * (v[1] - v[2]) + text * (v[0] - v[1]))
        return x


def assert_matches(case, memory="checkpoint", **options):
    got = case.dropped_in(memory=memory, **options)
    expected = case.by_hand(**options)
    torch.testing.assert_close(got, expected, **EXACT)
    weight = normal(*expected.shape, seed=9)
    wanted = torch.autograd.grad((expected * weight).sum(), case.leaves(), retain_graph=True)
    gradients = torch.autograd.grad((got * weight).sum(), case.leaves())
    for x, y in zip(gradients, wanted, strict=True):
        assert y.any()
        torch.testing.assert_close(x, y, **EXACT)


OSCILLATION = {
    "steady": {},
    "text": {"text_osci": True},
    "image": {"image_osci": True},
    "temporal": {"scale_temporal_osci": True},
    "all": {"text_osci": True, "image_osci": True, "scale_temporal_osci": True},
}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("options", OSCILLATION.values(), ids=OSCILLATION)
def test_loop_under_text_and_image_guidance(options, packed):
    assert_matches(Case(packed), **options)


@memories
@pytest.mark.parametrize("name", ["steady", "all"])
def test_every_memory_strategy_gives_the_same(name, memory):
    assert_matches(Case(packed=True), memory=memory, **OSCILLATION[name])


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("text_osci", [False, True])
def test_loop_under_text_guidance_alone(text_osci, reference, packed):
    assert_matches(Case(packed, image=False, reference=reference), text_osci=text_osci)


def test_loop_under_image_guidance_without_a_reference():
    assert_matches(Case(packed=True, reference=False), image_osci=True)


def test_an_image_guidance_of_at_most_one_does_not_rise_over_the_frames():
    case = Case(packed=True)
    case.guidance_img = leaf(torch.tensor(0.6, dtype=torch.float64))
    assert_matches(case, scale_temporal_osci=True)


def test_one_frame_has_no_image_guidance_to_rise():
    # The first frame's scale is 1, so the copy without reference drops out.
    z, ref = normal(1, 4, 12), torch.ones(1, 3, 1, 4, 4, dtype=torch.float64)
    arguments = {
        "img": z.repeat(3, 1, 1),
        "txt": normal(3, seed=2),
        "timesteps": TIMES,
        "guidance": 3.0,
        "masks": ref[:, :1],
        "masked_ref": ref,
    }
    rising = open_sora.denoise(Velocity(), guidance_img=5.0, scale_temporal_osci=True, **arguments)
    torch.testing.assert_close(
        rising, open_sora.denoise(Velocity(), guidance_img=1.0, **arguments), **EXACT
    )


class SamplingMethod(enum.Enum):
    """The shape of Open-Sora's own."""

    I2V = "i2v"
    DISTILLED = "distill"


@pytest.mark.parametrize("method", ["distill", SamplingMethod.DISTILLED])
@memories
def test_distilled_loop(method, memory):
    model, z, txt = Velocity(), leaf(normal(2, 4, 5)), leaf(normal(2, seed=2))
    got = open_sora.denoise(
        model, img=z, txt=txt, timesteps=TIMES, guidance=3.3, method=method, memory=memory
    )
    x = z
    told = torch.full((2,), 3.3, dtype=torch.float64)
    for now, then in pairwise(TIMES):
        time = torch.full((2,), now, dtype=torch.float64)
        x = x + (then - now) * model(img=x, timesteps=time, guidance=told, txt=txt)
    torch.testing.assert_close(got, x, **EXACT)
    wanted = torch.autograd.grad(x.square().sum(), (z, txt, *model.parameters()))
    gradients = torch.autograd.grad(got.square().sum(), (z, txt, *model.parameters()))
    for got_one, wanted_one in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got_one, wanted_one, **EXACT)


def test_the_enum_of_the_guided_method_is_taken():
    options = {"img": normal(2, 4, 5), "timesteps": TIMES, "guidance": 2.0, "txt": normal(2)}
    by_enum = open_sora.denoise(Velocity(), method=SamplingMethod.I2V, **options)
    assert torch.equal(by_enum, open_sora.denoise(Velocity(), method="i2v", **options))


def test_the_run_starts_from_img_wherever_the_times_start():
    z = normal(1, 3, 2)
    x = open_sora.denoise(
        lambda img, **_: img, img=z, timesteps=[0.6, 0.2], guidance=1.0, method="distill"
    )
    torch.testing.assert_close(x, z - 0.4 * z, **EXACT)


def test_the_network_is_called_once_a_step_on_all_copies_in_its_own_dtype():
    seen = []

    def model(img, timesteps, guidance, txt, cond):
        seen.append((tuple(img.shape), tuple(cond.shape), timesteps, guidance))
        assert torch.equal(img[:1], img[1:2])
        assert torch.equal(img[:1], img[2:])
        assert torch.equal(cond[0], cond[1])
        assert not cond[2].any()
        return 0.1 * img * txt

    ref = torch.ones(1, 2, 1, 4, 4, dtype=torch.bfloat16)
    x = open_sora.denoise(
        model,
        img=torch.zeros(3, 4, 8, dtype=torch.bfloat16),
        txt=torch.ones(3, 1, 1, dtype=torch.bfloat16),
        timesteps=[1.0, 0.7, 0.0],
        guidance=4.0,
        guidance_img=2.0,
        masks=ref[:, :1],
        masked_ref=ref,
    )
    assert x.shape == (1, 4, 8)
    assert x.dtype == torch.bfloat16
    assert [s[:2] for s in seen] == [((3, 4, 8), (3, 4, 12))] * 2
    for (_, _, timesteps, guidance), now in zip(seen, [1.0, 0.7], strict=True):
        assert torch.equal(timesteps, torch.full((3,), now, dtype=torch.bfloat16))
        assert torch.equal(guidance, torch.full((3,), 4.0, dtype=torch.bfloat16))


def test_a_callback_sees_times_and_clean_samples():
    steps = []
    z = normal(1, 2, 2)
    open_sora.denoise(
        lambda img, **_: img,
        img=z,
        timesteps=[1.0, 0.5, 0.0],
        guidance=1.0,
        method="distill",
        callback=steps.append,
    )
    assert [(s.step, s.num_steps, s.sigma) for s in steps] == [(0, 2, 1.0), (1, 2, 0.5)]
    torch.testing.assert_close(steps[1].x, 0.5 * z, **EXACT)
    torch.testing.assert_close(steps[1].denoised, 0.25 * z, **EXACT)  # x - t v


@memories
@pytest.mark.parametrize("broken", ["no_grad", "detach"])
def test_a_network_that_detaches_is_diagnosed(broken, memory):
    def model(img, **_):
        if broken == "detach":
            return 0.5 * img.detach()
        with torch.no_grad():
            return 0.5 * img

    z = leaf(normal(1, 2, 2))
    with pytest.warns(gs.GradientWarning, match="detaches at step 0"):
        open_sora.denoise(
            model, img=z, timesteps=TIMES, guidance=1.0, method="distill", memory=memory
        )


# Times.


def test_shift_of_a_resolution_clamped():
    # 1 + 2 clamp((H W / 4 - 256^2) / (1024^2 - 256^2), 0, 1), by hand.
    shift = open_sora.get_res_lin_function(clamp=True)
    span = 1024**2 - 256**2
    for pixels in (256**2, 300**2, 640**2, 1000**2, 1024**2):
        expected = 1 + 2 * Fraction(pixels - 256**2, span)
        assert shift(pixels) == pytest.approx(float(expected), rel=1e-14)
    assert shift(0) == shift(256) == shift(256**2) == 1.0
    assert shift(1024**2) == shift(4 * 1024**2) == 3.0


def test_shift_of_a_resolution_as_upstream_has_it():
    shift = open_sora.get_res_lin_function()
    for tokens in (64, 256, 576, 2304, 4096, 9216):
        expected = 1 + 2 * Fraction(tokens - 256, 4096 - 256)
        assert shift(tokens) == pytest.approx(float(expected), rel=1e-14)
    for ends in ((256, 1, 4096, 3), (256, 1.0, 4096, 1.5), (100, 0.5, 7000, 1.15)):
        m = (ends[3] - ends[1]) / (ends[2] - ends[0])
        b = ends[1] - m * ends[0]
        shift = open_sora.get_res_lin_function(*ends)
        assert all(shift(x) == m * x + b for x in range(0, 10_000, 7)), "not to the bit"


def test_a_drop_in_keeps_the_times_it_had():
    """The lines of train.py, with numbers of its resolutions, and in their place ours."""
    for shape in ((1, 16, 1, 128, 96), (4, 16, 33, 32, 32), (2, 16, 5, 16, 16)):
        x0 = torch.zeros(shape)
        alpha = (3 - 1) / (4096 - 256) * (shape[-1] * shape[-2] // 4) + (
            1 - (3 - 1) / (4096 - 256) * 256
        )
        alpha *= math.sqrt(shape[-3])
        torch.manual_seed(0)
        t = torch.sigmoid(torch.randn(shape[0]))
        t = alpha * t / (1 + (alpha - 1) * t)
        torch.manual_seed(0)
        torch.testing.assert_close(open_sora.sample_timesteps(x0), t, rtol=3e-7, atol=0)
        torch.manual_seed(0)
        batch, *_ = open_sora.prepare_inputs(x0)
        torch.testing.assert_close(batch["timesteps"], t, rtol=3e-7, atol=0)


@pytest.mark.parametrize("clamp", [True, False])
def test_shift_between_ends_of_the_callers(clamp):
    shift = open_sora.get_res_lin_function(100, 2, 200, 1.5, clamp=clamp)
    assert [shift(x) for x in (100, 150, 200)] == [2.0, 1.75, 1.5]
    assert shift(300) == (1.5 if clamp else 1.0)
    assert shift(50) == (2.0 if clamp else 2.25)


def test_time_shift_is_upstreams():
    t = torch.linspace(1, 0, 51, dtype=torch.float64)
    for alpha in (0.5, 1.0, math.sqrt(5), 3.0, 17.2):
        expected = [alpha * u / (1 + (alpha - 1) * u) for u in t.tolist()]
        assert open_sora.time_shift(alpha, t).tolist() == pytest.approx(expected, rel=1e-13)


def test_times_of_upstreams_schedule_are_taken():
    # In float32 upstream's formula may round the first time to just above 1.
    alpha, t = 1.7, torch.linspace(1, 0, 31)
    times = (alpha * t / (1 + (alpha - 1) * t)).tolist()
    times[0] = 1.0000001192092896
    x = open_sora.denoise(
        lambda img, **_: img, img=normal(1, 2, 2), timesteps=times, guidance=1.0, method="distill"
    )
    assert x.isfinite().all()


@pytest.mark.parametrize(
    ("clamp", "shape", "shift"),
    [
        (True, (4, 33, 96, 96), math.sqrt(33)),
        (False, (4, 33, 96, 96), (1 + 2 * (2304 - 256) / 3840) * math.sqrt(33)),
        (True, (4, 1, 2048, 1024), (1 + 2 * (2**19 - 2**16) / (2**20 - 2**16))),
        (False, (4, 1, 16, 16), 1 + 2 * (64 - 256) / 3840),
    ],
)
def test_distribution_of_the_times(clamp, shape, shift):
    # A view without memory of its own: only shape and dtype count.
    x0 = torch.zeros((), dtype=torch.float64).expand(4000, *shape)
    t = open_sora.sample_timesteps(x0, clamp=clamp, seed=1)
    logits = torch.log(t / (1 - t)).numpy()
    assert stats.kstest(logits, stats.norm(loc=math.log(shift)).cdf).pvalue > 1e-3


# The batch.


def test_the_worked_example():
    # 16 clips of 17 frames, 256x256: 5 latent frames of 32x32, 2x2 patches of 16 channels.
    frames, side = (17 - 1) // 4 + 1, 256 // 8
    video = torch.zeros(16, 16, frames, side, side)
    shift = open_sora.get_res_lin_function()(side * side // 4) * math.sqrt(frames)
    assert round(shift, 2) == 2.24
    assert open_sora.get_res_lin_function(clamp=True)(side * side // 4) == 1.0
    torch.manual_seed(3)
    inputs, x0, x1, target = open_sora.prepare_inputs(video)
    assert x0.shape == x1.shape == target.shape == inputs["img"].shape == (16, 1280, 64)
    torch.manual_seed(3)
    normals, noise = torch.randn(16), torch.randn(16, 1280, 64)
    u = torch.sigmoid(normals.double())
    t = shift * u / (1 + (shift - 1) * u)
    torch.testing.assert_close(inputs["timesteps"].double(), t, rtol=1e-6, atol=0)
    assert torch.equal(x1, noise)
    expected = (1 - (1 - 1e-5) * (1 - t))[:, None, None] * noise.double()
    torch.testing.assert_close(inputs["img"].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(inputs["guidance"], torch.full((16,), 4.0))


def test_pack_by_index():
    x = normal(2, 3, 2, 4, 6)
    for p in (1, 2):
        assert torch.equal(open_sora.pack(x, p), pack_by_index(x, p))


@pytest.mark.parametrize("form", ["unpacked", "packs", "packed"])
def test_batch_against_upstreams_arithmetic(form):
    video = normal(*SHAPE, seed=1)
    x0 = leaf(pack_by_index(video) if form == "packed" else video)
    t = leaf(torch.tensor([0.25, 0.8], dtype=torch.float64))
    tokens = x0 if form != "packs" else pack_by_index(x0)
    noise = leaf(normal(*tokens.shape, seed=2))
    inputs, kept, x1, target = open_sora.prepare_inputs(
        x0,
        {"txt": 1},
        t=t,
        x1=noise,
        sigma_min=0.02,
        guidance=7.0,
        patch_size=None if form == "unpacked" else PATCH,
    )
    r = (1 - t).view(-1, *[1] * (tokens.ndim - 1))
    expected = r * tokens + (1 - 0.98 * r) * noise, 0.98 * noise - tokens
    for got, wanted in zip((inputs["img"], target), expected, strict=True):
        torch.testing.assert_close(got, wanted, **EXACT)
    assert x1 is noise
    assert torch.equal(kept, tokens)
    assert inputs["guidance"].tolist() == [7.0, 7.0]
    assert set(inputs) == {"txt", "img", "timesteps", "guidance"}
    wanted = torch.autograd.grad(sum(x.sin().sum() for x in expected), (x0, t, noise))
    got = torch.autograd.grad((inputs["img"].sin() + target.sin()).sum(), (x0, t, noise))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


class Calls(TorchDispatchMode):
    """The names of all ops called inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_pair_is_one_op():
    latents, t = torch.zeros(2, 8, 4), torch.tensor([0.2, 0.9])
    with Calls() as calls:
        open_sora.prepare_inputs(latents, t=t, x1=torch.ones(2, 8, 4))
    assert calls.names.count("gradsampler::flow_pair") == 1
    assert not {"aten::mul.Tensor", "aten::add.Tensor", "aten::sub.Tensor"} & set(calls.names)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_bfloat16_batch_is_drawn_in_float32_and_cast(seed):
    video = torch.zeros(3, 4, 2, 4, 4)
    torch.manual_seed(8)
    wide = open_sora.prepare_inputs(video, seed=seed)
    torch.manual_seed(8)
    narrow = open_sora.prepare_inputs(video.bfloat16(), seed=seed)
    assert torch.equal(narrow.x1, wide.x1.bfloat16())
    assert torch.equal(narrow.inputs["timesteps"], wide.inputs["timesteps"].bfloat16())
    assert {x.dtype for x in narrow.inputs.values()} == {torch.bfloat16}


def test_packed_latents_get_the_times_of_their_shape():
    video = torch.zeros(4, 4, 5, 8, 8)
    unpacked = open_sora.prepare_inputs(video, seed=2)
    packed = open_sora.prepare_inputs(open_sora.pack(video), latent_shape=(5, 8, 8), seed=2)
    assert torch.equal(packed.inputs["timesteps"], unpacked.inputs["timesteps"])
    assert torch.equal(packed.inputs["img"], unpacked.inputs["img"])


# Errors, each before any call of the model.


def refused(**changed):
    def never(**_):
        raise AssertionError("the model was called")

    options = {"img": normal(6, 2, 12), "timesteps": [1.0, 0.0], "guidance": 2.0} | changed
    open_sora.denoise(never, **options)


REF = torch.ones(2, 3, 1, 4, 4, dtype=torch.float64)
GUIDED = {"guidance_img": 2.0}

ERRORS = {
    "method": ({"method": "i2i"}, "method must be one of distill, i2v, got 'i2i'"),
    "distilled reference": ({"method": "distill", **GUIDED}, "method must be 'i2v' with guidance"),
    "copies": ({"img": normal(5, 2, 12), **GUIDED}, "img must hold 3 copies of a batch"),
    "guidance": ({"guidance": math.nan}, "guidance must be a finite number, got nan"),
    "guidance type": ({"guidance": "4"}, "guidance must be a real number, got str"),
    "guidance shape": ({"guidance": torch.ones(6)}, r"guidance must have shape \[\]"),
    "guidance_img": ({"guidance_img": math.inf}, "guidance_img must be a finite number"),
    "rising times": ({"timesteps": [0.0, 1.0]}, r"timesteps must decrease strictly within \[0, 1"),
    "large times": ({"timesteps": [1000.0, 0.0]}, r"timesteps must decrease strictly within"),
    "nan times": ({"timesteps": [1.0, math.nan]}, r"timesteps\[1\] must be a finite number"),
    "one time": ({"timesteps": [1.0]}, r"timesteps must have shape \[N\+1\]"),
    "masks alone": ({"masks": REF[:, :1], **GUIDED}, "masked_ref must be given with masks"),
    "reference alone": ({"masked_ref": REF, **GUIDED}, "masks must be given with masked_ref"),
    "reference batch": (
        {"masks": REF[:1, :1], "masked_ref": REF[:1], **GUIDED},
        r"masked_ref must have shape \[2, C, T, H, W\], got \[1, 3, 1, 4, 4\]",
    ),
    "masks shape": (
        {"masks": REF, "masked_ref": REF, **GUIDED},
        r"masks must have shape \[2, 1, 1, 4, 4\]",
    ),
    "tokens": (
        {"masks": REF[:, :1], "masked_ref": REF, **GUIDED},
        r"img must hold \[B, 4, D\] as masked_ref does, got \[2, 2, 12\]",
    ),
    "frames unknown": (
        {"scale_temporal_osci": True, **GUIDED},
        "masked_ref must be given with scale_temporal_osci",
    ),
    "memory": ({"memory": "all"}, "memory must be one of auto, checkpoint"),
}


@pytest.mark.parametrize(("changed", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_of_denoise(changed, message):
    with pytest.raises((ValueError, TypeError), match=message):
        refused(**changed)


def test_an_output_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"output must have shape \[4, 2, 3\], got \[2, 2, 3\]"):
        open_sora.denoise(
            lambda img, **_: img[:2], img=normal(4, 2, 3), timesteps=[1.0, 0.0], guidance=2.0
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_sora.time_shift(-1.0, torch.ones(1)), "shift must be above 0"),
        (lambda: open_sora.get_res_lin_function(5, 1, 5, 3), "x2 must be above x1 = 5.0, got 5.0"),
        (lambda: open_sora.get_res_lin_function()("big"), "must be a real number, got str"),
        (lambda: open_sora.pack(torch.ones(1, 4, 1, 3, 4)), "H and W multiples of 2"),
        (lambda: open_sora.sample_timesteps(torch.ones(2, 8, 4)), "latent_shape must be given"),
        (
            lambda: open_sora.sample_timesteps(torch.ones(2, 7, 4), (2, 4, 4)),
            r"latent_shape must fit x0 of \[2, 7, 4\]",
        ),
        (
            lambda: open_sora.sample_timesteps(torch.ones(2, 1, 2, 4, 4), (4, 4)),
            r"latent_shape must be \(T, H, W\)",
        ),
        (lambda: open_sora.prepare_inputs(torch.ones(2, 4)), r"x0 must have shape \[B, C, T, H, W"),
        (
            lambda: open_sora.prepare_inputs(torch.ones(2, 1, 2, 4, 4), guidance=None),
            "guidance must be a real number",
        ),
    ],
)
def test_errors_of_training(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# Documents and the example.


def test_the_page_runs():
    page = (ROOT / "docs" / "open-sora.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert snippets
    torch.manual_seed(0)
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/open-sora.md", "exec"), names)
    assert names["gradient"].shape == names["z"].shape
    assert names["gradient"].any()


def test_the_page_names_what_there_is():
    page = (ROOT / "docs" / "open-sora.md").read_text()
    named = set(re.findall(r"open_sora\.(\w+)", page))
    assert {"denoise", "prepare_inputs"} <= named <= set(open_sora.__all__)


def test_the_example_trains_samples_and_draws(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        example = runpy.run_path(str(ROOT / "examples" / "train_flow_digits.py"))
        lines = []
        for _ in range(2):
            options = ["--steps", "3", "--samples", "10", "--threads", "1"]
            example["main"]([*options, "--out", str(tmp_path)])
            lines.append(capsys.readouterr().out.splitlines())
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "flow_digits.png").read_bytes().startswith(b"\x89PNG")
    read = [line for line in lines[0] if "are read as their class" in line]
    assert [line.split(":")[0] for line in read] == ["euler", "heun", "dpmpp_2m"]
    assert lines[0][1:] == lines[1][1:]  # the first tells the seconds
