# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines by each way, against plain autograd through the pipelines' own code."""

import inspect
import weakref

import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from support import tables, ways
from support.pipelines import BETAS, CASES, apart, diffusers, leaves, own, quiet, stable_diffusion
from support.tiers import few
from support.ways import EMBEDDED, WAYS, farthest, gradients

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

CHEAP = ("ddpm", "flux")


def compare(ours, theirs, limit=1e-5):
    assert farthest(ours, theirs) < limit


def again(case, arguments):
    """The same arguments with a generator that starts anew."""
    return arguments | {"generator": case.arguments()["generator"]}


# ------------------------------------------------------------------ pipelines


@pytest.mark.parametrize("name", few(CASES, *CHEAP))
def test_a_pipeline_has_the_sample_and_the_gradients_of_its_own_code(name):
    found = ways.pipeline(name)
    assert found.method == CASES[name].method
    assert {"steps", "calls"} <= set(found.errors)
    for way, error in found.errors.items():
        assert error.sample == 0 or (way == "program" and error.sample < 1e-5)
        assert error.gradient < 1e-5
    tables.check(tables.PIPELINES, tables.pipeline(name, found))


@pytest.mark.thorough
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_gradient_to_an_embedded_guidance_scale(name):
    """Upstream has none: the embedding is put into the model's arguments here, by a hook."""
    case = CASES[name]
    pipe, arguments = case.build(), case.arguments()
    scale = arguments["guidance_scale"]

    def embedded(module, args, kwargs):
        if name == "flux":
            return args, kwargs | {"guidance": scale.expand(1)}
        width = module.config.time_cond_proj_dim
        w = pipe.get_guidance_scale_embedding((scale - 1).expand(1), embedding_dim=width)
        return args, kwargs | {"timestep_cond": w}

    network = pipe.transformer if name == "flux" else pipe.unet
    hook = network.register_forward_pre_hook(embedded, with_kwargs=True)
    sample = own(pipe, arguments | {"guidance_scale": scale.item()})
    wanted = torch.autograd.grad(sample.square().mean(), scale)[0]
    assert wanted.norm() > 0
    hook.remove()
    for way in WAYS:
        x = gsd.pipeline(pipe, memory="checkpoint", method=way)(**again(case, arguments))
        (gradient,) = torch.autograd.grad(x.square().mean(), scale)
        assert apart(gradient, wanted) < 1e-4  # through sines of a thousand times the scale


def test_the_pipeline_is_left_as_its_own_call_leaves_it():
    case = CASES["sd15"]
    pipe, plain = case.build(), case.build()
    with torch.no_grad():
        own(plain, case.arguments())
    before = dict(vars(pipe.scheduler))
    x = gsd.pipeline(pipe)(**case.arguments())
    assert x.requires_grad
    assert vars(pipe.scheduler).keys() == before.keys()
    assert all(value is before[name] for name, value in vars(pipe.scheduler).items())
    assert pipe.scheduler.ets == []
    own_state = {k: v for k, v in vars(plain).items() if k not in plain.components}
    ours = {k: v for k, v in vars(pipe).items() if k not in pipe.components}
    assert ours.keys() == own_state.keys()
    assert pipe.num_timesteps == plain.num_timesteps
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


@pytest.mark.thorough
def test_a_pipeline_that_keeps_a_graph_in_its_scheduler_runs_again():
    """After a run with gradients, upstream's scheduler cannot be copied by deepcopy."""
    pipe = stable_diffusion(diffusers.UniPCMultistepScheduler(**BETAS))
    case = CASES["sd15"]
    sample = own(pipe, case.arguments())
    assert any(x is not None and x.requires_grad for x in pipe.scheduler.model_outputs)
    for way in WAYS:
        arguments = case.arguments()
        x = gsd.pipeline(pipe, memory="checkpoint", method=way)(**arguments)
        assert apart(x, sample) < 1e-5
        (gradient,) = torch.autograd.grad(x.sum(), arguments["latents"])
        assert gradient.isfinite().all()


# ------------------------------------------------------------------ memory


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["program", "steps"])
@pytest.mark.parametrize("memory", ["store", "revolve:2", "offload", "auto"])
def test_every_strategy_gives_the_same_gradient(method, memory):
    pipe = stable_diffusion(diffusers.UniPCMultistepScheduler(**BETAS))
    case = CASES["sd15"]
    arguments = case.arguments()
    named = leaves(pipe, arguments)
    wanted = gradients(gsd.pipeline(pipe, "checkpoint", "calls")(**arguments), named)
    x = gsd.pipeline(pipe, memory, method)(**again(case, arguments))
    compare(gradients(x, named), wanted)


def saved_bytes(pipe, run):
    """What autograd keeps of a run, parameters aside."""
    parameters = {p.data_ptr() for p in pipe.unet.parameters()}
    kept = weakref.WeakSet()

    class Saved:
        def __init__(self, x):
            self.x = x.detach()  # a result would keep its own graph alive
            kept.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.x):
        result = run()
    assert result.requires_grad
    storages = {each.x.untyped_storage() for each in kept if each.x.data_ptr() not in parameters}
    return sum({x.data_ptr(): x.nbytes() for x in storages}.values())


@pytest.mark.thorough
def test_a_recomputed_call_keeps_its_inputs_alone():
    case = CASES["sd15"]
    pipe = case.build()

    def kept(memory):
        return saved_bytes(pipe, lambda: gsd.pipeline(pipe, memory, "calls")(**case.arguments()))

    state = 4 * 4 * 8 * 8  # bytes; guided, a model's input is two states
    turns = 6
    assert kept("checkpoint") < turns * 8 * state
    assert kept("store") > 20 * kept("checkpoint")


def test_calls_refuses_a_strategy_that_has_to_know_the_program():
    case = CASES["sd15"]
    with pytest.raises(ValueError, match=r"memory must be .*got 'revolve:2'; method='steps'"):
        gsd.pipeline(case.build(), "revolve:2", "calls")(**case.arguments())


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize(
    "noise", [gs.noise.SignedRoll(seed=3), gs.noise.SinCos(), gs.noise.Philox(seed=4)], ids=type
)
@pytest.mark.parametrize("method", WAYS)
def test_noise_takes_the_place_of_the_draws(monkeypatch, noise, method):
    case = CASES["ddpm"]
    pipe, arguments = case.build(), case.arguments()
    z0 = arguments["latents"]
    x = gsd.pipeline(pipe, "checkpoint", method)(**arguments, noise=noise)
    (gradient,) = torch.autograd.grad(x.square().mean(), z0)
    steps = iter(range(3))  # there is no noise at the last

    def randn(shape, **_):
        return noise.at(z0, next(steps), 4)

    monkeypatch.setattr(inspect.getmodule(type(pipe.scheduler)), "randn_tensor", randn)
    sample = own(pipe, arguments)
    assert list(steps) == []
    (wanted,) = torch.autograd.grad(sample.square().mean(), z0)
    assert apart(x, sample) < 1e-5
    assert apart(gradient, wanted) < 1e-5


@pytest.mark.thorough
@pytest.mark.parametrize("method", WAYS)
def test_a_scheduler_that_draws_twice_a_step_gets_two_noises(monkeypatch, method):
    case = CASES["cogvideox"]
    pipe, arguments = case.build(), case.arguments()
    z0, noise = arguments["latents"], gs.noise.SignedRoll(seed=1)
    x = gsd.pipeline(pipe, "checkpoint", method)(**arguments, noise=noise)
    (gradient,) = torch.autograd.grad(x.square().mean(), z0)
    drawn = iter([(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)])

    def randn(shape, **_):
        step, draw = next(drawn)
        return noise.at(z0, step, 4, draw)

    monkeypatch.setattr(inspect.getmodule(type(pipe.scheduler)), "randn_tensor", randn)
    sample = own(pipe, arguments)
    assert list(drawn) == []
    assert apart(x, sample) < 1e-5
    assert apart(gradient, torch.autograd.grad(sample.square().mean(), z0)[0]) < 1e-5


@pytest.mark.thorough
def test_given_noises_get_their_gradient():
    case = CASES["ddpm"]
    pipe, arguments = case.build(), case.arguments()
    shape = arguments["latents"].shape
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    noises = [x.requires_grad_() for x in noises]
    found = {}
    for method in ("program", "steps"):
        x = gsd.pipeline(pipe, "checkpoint", method)(**arguments, noise=gs.noise.Given(noises))
        found[method] = torch.autograd.grad(x.square().mean(), noises)
    for a, b in zip(found["program"], found["steps"], strict=True):
        assert apart(a, b) < 1e-5


@pytest.mark.thorough
def test_a_list_of_generators_draws_by_sample():
    case = CASES["ddpm"]
    pipe, arguments = case.build(), case.arguments()

    def generators():
        return [torch.Generator().manual_seed(k) for k in (5, 6)]

    sample = own(pipe, arguments | {"generator": generators()})
    for method in WAYS:
        x = gsd.pipeline(pipe, "checkpoint", method)(**arguments | {"generator": generators()})
        assert apart(x, sample) < 1e-5
        (ours,) = torch.autograd.grad(x.square().mean(), arguments["latents"])
        (wanted,) = torch.autograd.grad(
            sample.square().mean(), arguments["latents"], retain_graph=True
        )
        assert apart(ours, wanted) < 1e-5


@pytest.mark.parametrize("method", WAYS)
def test_the_generator_ends_where_the_pipeline_leaves_it(method):
    case = CASES["ddpm"]
    pipe, arguments = case.build(), case.arguments()
    own(pipe, arguments)
    wanted = arguments["generator"].get_state()
    arguments = case.arguments()
    x = gsd.pipeline(pipe, "checkpoint", method)(**arguments)
    assert torch.equal(arguments["generator"].get_state(), wanted)
    x.sum().backward()
    assert torch.equal(arguments["generator"].get_state(), wanted)
    gsd.explain(pipe, **arguments)
    assert torch.equal(arguments["generator"].get_state(), wanted)


# ------------------------------------------------------------------ what goes which way


@pytest.mark.thorough
def test_a_callback_goes_to_calls_and_does_what_it_does_upstream():
    case = CASES["sd15"]
    pipe, arguments = case.build(), case.arguments()

    def shrink(pipe, step, timestep, tensors):
        pipe._guidance_scale = pipe.guidance_scale * 0.9
        return {"latents": tensors["latents"] * 0.9}

    arguments["callback_on_step_end"] = shrink
    sample = own(pipe, arguments)
    run = gsd.pipeline(pipe, "checkpoint")
    x = run(**again(case, arguments))
    assert run.explanation.method == "calls"
    assert "callback_on_step_end" in run.explanation.against["program"]
    assert torch.equal(x, sample)
    named = leaves(pipe, arguments)
    compare(gradients(x, named), gradients(sample, named))


@pytest.mark.thorough
def test_inpainting_that_blends_the_state_goes_by_steps():
    base = stable_diffusion()
    pipe = quiet(
        diffusers.StableDiffusionInpaintPipeline(
            **{k: v for k, v in base.components.items() if k != "image_encoder"},
            requires_safety_checker=False,
        )
    )
    case = CASES["sd15"]
    generator = torch.Generator().manual_seed(3)
    arguments = case.arguments() | {
        "image": torch.rand(1, 3, 16, 16, generator=generator),
        "mask_image": (torch.rand(1, 1, 16, 16, generator=generator) > 0.5).float(),
        "height": 16,
        "width": 16,
    }
    sample = own(pipe, arguments)
    named = {k: v for k, v in leaves(pipe, arguments).items() if "." not in k}
    wanted = gradients(sample, named)
    run = gsd.pipeline(pipe, "checkpoint")
    x = run(**again(case, arguments))
    assert run.explanation.method == "steps"
    assert "changes the state" in run.explanation.against["program"]
    assert torch.equal(x, sample)
    compare(gradients(x, named), wanted)


@pytest.mark.thorough
def test_a_controlnet_is_part_of_the_denoiser():
    base = stable_diffusion()
    torch.manual_seed(1)
    # The image is twice as large as the latents here, in Stable Diffusion eight times.
    controlnet = diffusers.ControlNetModel.from_unet(
        base.unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 16)
    )
    with torch.no_grad():
        zeros = (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block)
        for block in (*zeros, controlnet.controlnet_cond_embedding.conv_out):
            block.weight.normal_(std=0.5)
    components = {k: v for k, v in base.components.items() if k != "image_encoder"}
    pipe = quiet(
        diffusers.StableDiffusionControlNetPipeline(
            **components, controlnet=controlnet, requires_safety_checker=False
        )
    )
    case = CASES["sd15"]
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    arguments = case.arguments() | {"image": image.requires_grad_()}
    sample = own(pipe, arguments)
    named = leaves(pipe, arguments)
    named |= {f"controlnet.{k}": p for k, p in controlnet.named_parameters()}
    wanted = gradients(sample, named)
    assert wanted["image"].norm() > 0
    for way in WAYS:
        x = gsd.pipeline(pipe, "checkpoint", way)(**again(case, arguments))
        assert apart(x, sample) < 1e-5
        compare(gradients(x, named), wanted)


@pytest.mark.thorough
def test_dropout_draws_the_same_again():
    pipe = stable_diffusion(dropout=0.3)
    pipe.unet.train()
    case = CASES["sd15"]
    arguments = case.arguments()
    torch.manual_seed(9)
    sample = own(pipe, arguments)
    named = leaves(pipe, arguments)
    wanted = gradients(sample, named)
    for way in WAYS:
        torch.manual_seed(9)
        x = gsd.pipeline(pipe, "checkpoint", way)(**again(case, arguments))
        torch.manual_seed(0)  # between forward and backward
        compare(gradients(x, named), wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("method", WAYS)
def test_a_generator_that_the_model_holds_is_replayed(method):
    """`torch.utils.checkpoint` gives a wrong gradient here, without an error."""
    base, case, held = stable_diffusion(), CASES["sd15"], torch.Generator()

    class Drawing(type(base.unet)):
        def forward(self, x, *args, **kwargs):
            scale = 1 + torch.rand(x.shape, generator=held)
            return super().forward(x * scale, *args, **kwargs)

    base.unet.__class__ = Drawing
    arguments = case.arguments()
    held.manual_seed(3)
    sample = own(base, arguments)
    wanted = torch.autograd.grad(sample.square().mean(), arguments["latents"])[0]
    held.manual_seed(3)
    x = gsd.pipeline(base, "checkpoint", method)(**again(case, arguments))
    (gradient,) = torch.autograd.grad(x.square().mean(), arguments["latents"])
    assert apart(gradient, wanted) < 1e-5


@pytest.mark.parametrize("method", WAYS)
def test_a_model_that_changed_is_found_out(method):
    case = CASES["ddpm"]
    pipe = case.build()
    x = gsd.pipeline(pipe, "checkpoint", method)(**case.arguments())
    with torch.no_grad():
        pipe.unet.conv_out.weight.data.mul_(2)  # past the counter that autograd looks at
    with pytest.raises(gs.ReplayError, match="must return the same"):
        x.sum().backward()


# ------------------------------------------------------------------ at the door


def test_an_argument_that_does_not_fit_is_named():
    case = CASES["sd15"]
    pipe = case.build()
    with pytest.raises(ValueError, match=r"method must be one of auto, calls.*got 'programm'"):
        gsd.pipeline(pipe, method="programm")
    with pytest.raises(ValueError, match="memory must be one of"):
        gsd.pipeline(pipe, memory="everything")
    with pytest.raises(TypeError, match="pipe must be a diffusers pipeline"):
        gsd.pipeline(pipe.unet)
    run = gsd.pipeline(pipe)
    with pytest.raises(TypeError, match=r"noise must be a gradsampler\.noise object"):
        run(**case.arguments(), noise="signed_roll")
    with pytest.raises(ValueError, match='output_type must be "latent" or "pt"'):
        run(**case.arguments(), output_type="pil")
    case = CASES["ddpm"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'guidance'"):
        gsd.pipeline(case.build())(**case.arguments(), guidance=3.0)


def test_a_way_that_a_call_cannot_go_is_an_error_that_says_why():
    case = CASES["ddim"]
    pipe, arguments = case.build(), case.arguments()
    before = arguments["generator"].get_state()
    with pytest.raises(ValueError, match=r"got 'program'; DDIMScheduler has clip_sample=True"):
        gsd.pipeline(pipe, method="program")(**arguments)
    assert torch.equal(arguments["generator"].get_state(), before)


def test_explain_prints_the_way_and_what_stands_against_the_better_one():
    case = CASES["ddim"]
    text = str(gsd.explain(case.build(), **case.arguments()))
    assert text.startswith("method: steps\nnot program: DDIMScheduler has clip_sample=True")


@pytest.mark.thorough
def test_images_come_with_a_gradient_too():
    case = CASES["sd15"]
    pipe, arguments = case.build(), case.arguments()
    call = inspect.unwrap(type(pipe).__call__)
    wanted = call(pipe, **arguments, output_type="pt", return_dict=False)[0]
    for way in WAYS:
        again_ = again(case, arguments)
        image = gsd.pipeline(pipe, "checkpoint", way)(**again_, output_type="pt")
        assert image.shape == (1, 3, 16, 16)
        assert apart(image, wanted) < 1e-5
        assert torch.autograd.grad(image.sum(), arguments["latents"])[0].norm() > 0


@pytest.mark.thorough
def test_nothing_is_kept_without_gradients():
    case = CASES["sd15"]
    pipe, arguments = case.build(), case.arguments()
    with torch.no_grad():
        sample = own(pipe, arguments)
        for way in WAYS:
            x = gsd.pipeline(pipe, method=way)(**again(case, arguments))
            assert not x.requires_grad
            assert apart(x, sample) < 1e-5
