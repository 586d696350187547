# SPDX-License-Identifier: Apache-2.0
"""Which implementations of the fused ops are present, why another is not, and the choice of one.

A backend has the functions of `gradsampler.ops.reference`, with the same arguments.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import Draw
from gradsampler.ops import reference

__all__ = ["Backend", "available", "choose"]


@dataclass(frozen=True)
class Backend:
    """The fused ops of one implementation."""

    name: str
    step_fwd: Callable[..., Any]
    step_bwd: Callable[..., Any]
    adjoint_step: Callable[..., Any]
    leap: Callable[..., Any]
    ancestral_step_fwd: Callable[..., Any]
    ancestral_step_bwd: Callable[..., Any]
    flow_pair_fwd: Callable[..., Any]
    flow_pair_bwd: Callable[..., Any]
    torch_up_to: int = 0  # elements of a `step` that torch's own operations take

    @classmethod
    def of(cls, name: str, *modules: ModuleType) -> "Backend":
        """Collects the functions from the modules that hold them."""
        found = {k: v for module in modules for k, v in vars(module).items()}
        return cls(name, *(found[field] for field in list(cls.__dataclass_fields__)[1:-1]))

    @property
    def writes(self) -> bool:
        """Whether results can be written to memory that is given, and that terms may lie in."""
        return self.name == "cpu"

    def step(
        self,
        terms: Sequence[Tensor],
        coefs: Sequence[Any],
        z0: Tensor | None = None,
        draw: Draw | None = None,
        noise_coef: Any = 0.0,
        *,
        out_dtype: torch.dtype,
        model_scale: float | None = None,
        model_dtype: torch.dtype | None = None,
        **memory: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`step_fwd` as a run needs it: the state, and the model's input where it is asked for.

        Of few elements and without noise by torch's own operations, in which autograd records it
        as well: they start in less time than a kernel. Which it is depends on the terms alone, so
        that the state is the same to the bit whoever asks. ``memory`` is what results are written
        to, of a backend that `writes`.
        """
        if draw is None and self._few(terms, coefs, out_dtype):
            x = _sum(terms, coefs)
            return x, None if model_scale is None else (model_scale * x).to(model_dtype or x.dtype)
        if model_scale is None:
            memory.pop("model_out", None)
            x = self.step_fwd(terms, coefs, z0, draw, noise_coef, out_dtype=out_dtype, **memory)
            return x, None
        both: tuple[Tensor, Tensor] = self.step_fwd(
            terms, coefs, z0, draw, noise_coef, out_dtype=out_dtype, model_scale=model_scale,
            model_dtype=model_dtype, **memory,
        )  # fmt: skip
        return both

    def adjoint(
        self,
        lams: Sequence[Tensor],
        a: Sequence[float],
        g: Tensor | None,
        g_scale: float,
        b: Sequence[float] | None,
        z0: Tensor | None = None,
        draw: Draw | None = None,
        noise_coef: Any = 0.0,
        dz0: Tensor | None = None,
        *,
        mu_dtype: torch.dtype | None = None,
        lam_dtype: torch.dtype,
        **memory: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`adjoint_step` as a run needs it; of few elements and without noise as `step`."""
        terms, factors = (lams, a) if g is None else ([*lams, g], [*a, g_scale])
        alike = mu_dtype in (None, lam_dtype) and (g is None or g.dtype == lam_dtype)
        if draw is not None or not alike or not self._few(lams or terms, factors, lam_dtype):
            result: tuple[Tensor, Tensor | None] = self.adjoint_step(
                lams, a, g, g_scale, b, z0, draw, noise_coef, dz0, mu_dtype=mu_dtype,
                lam_dtype=lam_dtype, **memory,
            )  # fmt: skip
            return result
        lam = _sum(terms, factors)
        if b is None:
            return lam, None
        there = [k for k, c in enumerate(b[:-1]) if c]  # most read the new one alone
        return lam, _sum([lam, *(lams[k] for k in there)], [b[-1], *(b[k] for k in there)])

    def _few(self, terms: Sequence[Tensor], coefs: Sequence[Any], out_dtype: torch.dtype) -> bool:
        if not terms or terms[0].numel() > self.torch_up_to or type(coefs[0]) is not float:
            return False
        for x in terms:
            if x.dtype != out_dtype or not x.is_contiguous():
                return False
        return out_dtype in (torch.float32, torch.float64)


def _sum(terms: Sequence[Tensor], coefs: Sequence[float]) -> Tensor:
    if len(terms) == 2 and coefs[1] == 1.0 and terms[1].is_contiguous():
        return torch.add(terms[1], terms[0], alpha=coefs[0])
    x = terms[0] * coefs[0]
    for k in range(1, len(terms)):
        x.add_(terms[k], alpha=coefs[k])
    return x


_FEW = 2**14  # from there on the time of either way is that of the elements

REFERENCE = Backend.of("reference", reference)


def available() -> dict[str, str]:
    """Every backend with its version, or with the reason why it is absent.

    Example:
        >>> import gradsampler as gs
        >>> gs.backends.available()["reference"].startswith("torch")
        True
    """
    return {name: find()[1] for name, find in _FINDERS.items()}


def present(name: str) -> bool:
    """Whether the backend of that name is here."""
    return _FINDERS[name]()[0] is not None


def choose(name: str | None, device: torch.device) -> Backend:
    """The backend of that name, or the fastest one present for tensors on ``device``.

    On a CPU that is the extension's, on a GPU Triton's, then the extension's; else plain torch.

    Raises:
        ValueError: for an unknown name, an absent backend, or one that cannot serve the device.
    """
    if name is None:
        preferred = ("triton", "cuda") if device.type == "cuda" else (device.type,)
        found = (_FINDERS[each]()[0] for each in preferred if each in _FINDERS)
        fastest = next((each for each in found if each is not None), REFERENCE)
        return _with_few(fastest) if fastest.name == "cpu" else fastest
    backend, facts = _FINDERS[_checks.choice("backend", name, _FINDERS)]()
    if backend is None:
        _checks.fail("backend", "be present", f"'{name}', which is not: {facts}")
    if name in ("cpu", "cuda") and device.type != name:
        _checks.fail("backend", f"serve tensors on {device.type}", f"'{name}'")
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        _checks.fail(
            "backend", "serve tensors on cpu", "'triton'", "set TRITON_INTERPRET=1 to interpret it"
        )
    return backend


def _reference() -> tuple[Backend | None, str]:
    return REFERENCE, f"torch {torch.__version__}"


@cache
def _cpu() -> tuple[Backend | None, str]:
    """The extension on CPU tensors and what it was built with, or None and the reason."""
    # Loaded here, so that importing gradsampler loads no extension.
    from gradsampler.ops import native

    reason = native.available()
    if reason is not None:
        return None, reason
    facts = native.facts()
    return Backend.of("cpu", native), f"{facts['compiler']}, {facts['isa']}"


@cache
def _with_few(backend: Backend) -> Backend:
    return replace(backend, torch_up_to=_FEW)


@cache
def _cuda() -> tuple[Backend | None, str]:
    """The extension on GPU tensors and what it was compiled for, or None and the reason."""
    from gradsampler.ops import native

    reason = native.available()
    archs = native.facts().get("cuda_archs")
    if reason is None and not archs:
        reason = "the extension was built without CUDA, which needs a CUDA torch and nvcc"
    if reason is None and not torch.cuda.is_available():
        reason = f"built for {archs}, but torch finds no GPU"
    if reason is not None:
        return None, reason
    return Backend.of("cuda", native), f"built for {archs}"


@cache
def _triton() -> tuple[Backend | None, str]:
    """The Triton backend and its version, or None and the reason."""
    try:
        import triton

        from gradsampler.kernels import adjoint, ancestral, flow_pair, leap, step
    except ImportError as error:
        return None, f"import failed: {error}"
    backend = Backend.of("triton", step, adjoint, leap, ancestral, flow_pair)
    return backend, f"triton {triton.__version__}"


_FINDERS: dict[str, Callable[[], tuple[Backend | None, str]]] = {
    "reference": _reference,
    "cpu": _cpu,
    "triton": _triton,
    "cuda": _cuda,
}
