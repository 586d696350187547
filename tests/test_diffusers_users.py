# SPDX-License-Identifier: Apache-2.0
"""Pipelines as they are run: half precision, offloading, compiled and quantised denoisers, LoRA,
text encoders, checkpointing inside the model. All against the pipeline's own code."""

import importlib
import importlib.util
import warnings

import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from gradsampler.memory import capacity
from support.pipelines import CASES, apart, diffusers, leaves, own, quiet, stable_diffusion
from support.tiers import few
from support.ways import EMBEDDED, WAYS, farthest, gradients

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


def differentiated(name, pipe, arguments):
    """What the pipeline's own code has a gradient to."""
    named = {k: p for k, p in leaves(pipe, arguments).items() if p.requires_grad}
    if name in EMBEDDED:
        del named["guidance_scale"]
    return named


def agrees(name, pipe, limit=1e-5, ways=WAYS):
    case = CASES[name]
    arguments = case.arguments()
    plain = dict(arguments)
    if name in EMBEDDED:
        plain["guidance_scale"] = plain["guidance_scale"].item()
    sample = own(pipe, plain)
    wanted = gradients(sample, differentiated(name, pipe, arguments))
    for way in ways:
        arguments = case.arguments()
        x = gsd.pipeline(pipe, "checkpoint", way)(**arguments)
        assert torch.equal(x, sample) or (way == "program" and apart(x, sample) < limit)
        found = gradients(x, differentiated(name, pipe, arguments))
        assert farthest(found, wanted) < limit


# ------------------------------------------------------------------ what the denoiser is


def compiled(pipe):
    pipe.unet = torch.compile(pipe.unet.requires_grad_(False), backend="aot_eager")


def compiled_in_place(pipe):
    denoiser(pipe).compile(backend="aot_eager")


def checkpointed(pipe):
    denoiser(pipe).enable_gradient_checkpointing()
    denoiser(pipe).train()


def offloaded(pipe):
    pipe.enable_model_cpu_offload(device="cpu")  # without a device it looks for an accelerator


def hooked(pipe):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload_with_hook(denoiser(pipe), torch.device("cpu"))


def offloaded_in_groups(pipe):
    there = torch.device("cpu")
    denoiser(pipe).enable_group_offload(there, there, "block_level", num_blocks_per_group=1)


def quantised(pipe):
    """Weights of 8 bits in the place of the linear layers, as weight-only quantisation has them."""
    for module in [*denoiser(pipe).modules()]:
        for name, child in module.named_children():
            if type(child) is torch.nn.Linear:
                setattr(module, name, Int8Linear(child))


class Int8Linear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantised_by_torchao(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(
            denoiser(pipe).requires_grad_(False), torchao.Int8WeightOnlyConfig(version=2)
        )


KINDS = [
    ("sd15", compiled),
    ("flux", compiled_in_place),
    ("sd15", checkpointed),
    ("flux", checkpointed),
    ("sd15", offloaded),
    ("sd15", hooked),
    ("sd15", offloaded_in_groups),
    ("flux", quantised),
    ("flux", quantised_by_torchao),
]


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile looks at it
@pytest.mark.parametrize(("name", "prepare"), few(KINDS, ("flux", quantised)))
def test_a_denoiser_that_was_prepared_gives_the_same_gradient(name, prepare):
    pipe = CASES[name].build()
    prepare(pipe)
    agrees(name, pipe)


def test_weights_that_backward_could_not_read_are_named():
    pipe = CASES["sd15"].build()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    run = gsd.pipeline(pipe)
    with pytest.raises(ValueError, match=r"the weights of its unet must be there.*float8_e4m3fn"):
        run(**CASES["sd15"].arguments())
    with torch.no_grad():
        assert run(**CASES["sd15"].arguments()).isfinite().all()


@pytest.fixture
def away(monkeypatch):
    """Offloading by accelerate's hooks with NaN in the place of what is on another device."""
    hooks = pytest.importorskip("accelerate.hooks")
    weights: dict[int, torch.Tensor] = {}

    def offload(module):
        for p in module.parameters():
            weights.setdefault(id(p), p.data)
            p.data = torch.full_like(p, torch.nan)
        return module

    def onload(self, module, *args, **kwargs):
        if self.prev_module_hook is not None:
            self.prev_module_hook.offload()
        for p in module.parameters():
            p.data = weights[id(p)]
        return args, kwargs

    monkeypatch.setattr(hooks.CpuOffload, "init_hook", lambda self, module: offload(module))
    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", onload)


@pytest.mark.thorough
@pytest.mark.parametrize("method", WAYS)
@pytest.mark.parametrize("memory", ["auto", "checkpoint"])
@pytest.mark.parametrize("name", ["sd15", "wan"])
def test_backward_finds_weights_that_were_offloaded(away, name, method, memory):
    """Two denoisers that take turns, and a decoder that sends the denoiser away."""
    case = CASES[name]
    arguments = case.arguments() | ({"output_type": "pt"} if name == "sd15" else {})
    found = []
    for offloaded in (False, True):
        pipe = case.build()
        for part in (pipe.vae, *(getattr(pipe, k, None) for k in ("unet", "transformer"))):
            if part is not None:
                part.requires_grad_(False)
        if name == "wan":
            pipe.transformer_2.requires_grad_(False)
        if offloaded:
            pipe.enable_model_cpu_offload(device="cpu")
            assert denoiser(pipe).state_dict().popitem()[1].isnan().all()
        x = gsd.pipeline(pipe, memory if offloaded else "store", method)(**arguments)
        found.append((x, *torch.autograd.grad(x.square().sum(), arguments["latents"])))
        arguments = again(case, arguments)
    for ours, theirs in zip(*found, strict=True):
        assert apart(theirs, ours) < 1e-6


def again(case, arguments):
    return arguments | {"generator": case.arguments()["generator"]}


def test_strategies_that_keep_weights_are_refused_under_offloading(away):
    pipe = CASES["sd15"].build()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r'memory must be "auto".*under enable_model_cpu_offload'):
        gsd.pipeline(pipe, "store")(**CASES["sd15"].arguments())


# ------------------------------------------------------------------ precision


def in_float32(name):
    """Sample and gradients by the pipeline's own code in float32."""
    case = CASES[name]
    pipe, arguments = case.build(), case.arguments()
    plain = dict(arguments)
    if name in EMBEDDED:
        plain["guidance_scale"] = plain["guidance_scale"].item()
    denoiser(pipe).requires_grad_(False)
    sample = own(pipe, plain)
    return sample, gradients(sample, differentiated(name, pipe, arguments))


@pytest.mark.parametrize(
    ("name", "dtype"),
    few([("sd15", "bfloat16"), ("flux", "bfloat16"), ("sd15", "float16")], ("sd15", "bfloat16")),
)
def test_half_precision_is_as_near_to_float32_as_the_pipelines_own(name, dtype):
    """The state between model calls is float32 by program, so that way is the nearer one."""
    case, dtype = CASES[name], getattr(torch, dtype)
    truth, wanted = in_float32(name)
    pipe = case.build().to(dtype)
    denoiser(pipe).requires_grad_(False)

    def arguments():
        given = case.arguments()
        floating = {k for k, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
        return given | {
            k: given[k].detach().to(dtype).requires_grad_() for k in floating if given[k].ndim
        }

    given = arguments()
    plain = dict(given)
    if name in EMBEDDED:
        plain["guidance_scale"] = plain["guidance_scale"].item()
    sample = own(pipe, plain)
    theirs = gradients(sample, differentiated(name, pipe, given))
    off = max(apart(g.float(), wanted[k]) for k, g in theirs.items() if g.ndim)
    for way in WAYS:
        given = arguments()
        x = gsd.pipeline(pipe, "checkpoint", way)(**given)
        assert x.dtype == dtype
        assert apart(x.float(), truth) <= 1.1 * apart(sample.float(), truth)
        for k, g in gradients(x, differentiated(name, pipe, given)).items():
            assert g.dtype == given[k].dtype
            one = 40 * torch.finfo(dtype).eps  # one number, of terms that cancel
            assert apart(g.float(), wanted[k]) <= (1.5 * off if g.ndim else one), (way, k)


@pytest.mark.thorough
@pytest.mark.parametrize("method", WAYS)
def test_autocast_holds_in_backward(method):
    pipe, case = stable_diffusion(), CASES["sd15"]
    pipe.unet.requires_grad_(False)
    arguments = case.arguments()
    with torch.autocast("cpu", torch.bfloat16):
        sample = own(pipe, arguments)
        wanted = gradients(sample, differentiated("sd15", pipe, arguments))
        arguments = case.arguments()
        x = gsd.pipeline(pipe, "checkpoint", method)(**arguments)
    found = gradients(x, differentiated("sd15", pipe, arguments))
    limit = 0.05 if method == "program" else 0.02  # bfloat16 has steps of 0.008
    assert apart(x, sample) < limit
    assert farthest(found, wanted) < limit


# ------------------------------------------------------------------ room


@pytest.mark.parametrize("method", few(WAYS, "program"))
def test_auto_leaves_room_for_the_decoder(method, monkeypatch):
    """Fewer calls are kept where images are asked for."""
    case = CASES["sd15"]
    pipe = case.build()
    denoiser(pipe).requires_grad_(False)
    pipe.vae.requires_grad_(False)
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))

    def made_again(**more):
        calls.clear()
        x = gsd.pipeline(pipe, "auto", method)(**case.arguments(), **more)
        before = len(calls)
        x.square().sum().backward()
        return len(calls) - before

    room = 2**26
    for step in (2**k for k in range(25, 14, -1)):
        room -= step if at(room - step, made_again) == 0 else 0
    monkeypatch.setattr(capacity, "free", lambda device: room)
    assert made_again() == 0
    assert made_again(output_type="pt") > 0


def at(free, made_again):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "free", lambda device: free)
        return made_again()


def test_room_for_a_loss_is_measured_on_the_latents():
    case, seen = CASES["sd15"], []
    pipe = case.build()

    def loss(latents):
        seen.append(latents.shape)
        return latents.square().sum()

    run = gsd.pipeline(pipe, gs.memory.Auto(after=loss), "steps")
    for _ in range(2):
        assert run(**case.arguments()).requires_grad
    assert seen == [(1, 4, 8, 8)]
    with pytest.raises(ValueError, match="Auto: after must be bytes where the pipeline runs"):
        gsd.pipeline(pipe, gs.memory.Auto(after=loss), "calls")(**case.arguments())


# ------------------------------------------------------------------ what is trained


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_lora_weights_get_the_gradient_of_the_pipelines_own_code(name):
    peft = pytest.importorskip("peft")
    pipe = CASES[name].build()
    networks = [pipe.transformer_2] if name == "wan" else []
    torch.manual_seed(2)
    for network in [denoiser(pipe), *networks]:
        network.requires_grad_(False)
        config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
        network.add_adapter(config)
    arguments = CASES[name].arguments()
    learned = [k for k in differentiated(name, pipe, arguments) if "lora" in k]
    assert len(learned) >= 4
    agrees(name, pipe)


@pytest.mark.thorough
def test_a_prompt_in_words_reaches_the_text_encoder():
    """Its embeddings are what textual inversion trains."""
    transformers = pytest.importorskip("transformers")
    letters = [chr(k) for k in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {name: k for k, name in enumerate(names)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    torch.manual_seed(0)
    encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(names),
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
        )
    )
    parts = stable_diffusion().components | {"tokenizer": tokenizer, "text_encoder": encoder}
    del parts["image_encoder"]
    pipe = quiet(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    words = encoder.get_input_embeddings().weight
    named = {"latents": latents, "words": words}
    call = {"prompt": "a cat", "num_inference_steps": 3, "guidance_scale": 4.0, "latents": latents}
    sample = own(pipe, call)
    wanted = gradients(sample, named)
    assert (wanted["words"] != 0).any(1).sum() == 6  # of the tokens of the prompts
    for way in WAYS:
        x = gsd.pipeline(pipe, "checkpoint", way)(**call)
        assert apart(x, sample) < 1e-5
        assert farthest(gradients(x, named), wanted) < 1e-5


# ------------------------------------------------------------------ what is installed


def test_the_error_names_the_extra_where_diffusers_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "gradsampler\[diffusers\]"'):
        importlib.reload(gsd)
