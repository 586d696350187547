# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing of one call: its activations are dropped and computed again in backward.

`torch.utils.checkpoint` replays torch's default generators alone, and believes that the second call
did what the first one did. Here the generators that the function holds are replayed as well, and
the second call's outputs are compared with the first one's, as for the model calls of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradsampler import _checks, transforms
from gradsampler.engine import graph
from gradsampler.engine.agreement import Agreement
from gradsampler.engine.circumstances import Circumstances
from gradsampler.engine.parts import Seen
from gradsampler.engine.program import Evaluation, Slot
from gradsampler.engine.replay import Sketch, changed
from gradsampler.repetition import ReplayError

__all__ = ["recomputed"]

_CALL = Evaluation(Slot("x"), (), c_in=0, c_noise=0, sigma=0, denoised=(), step=0)  # the only one


def recomputed(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    roots: Sequence[object] = (),
    name: str = "the model",
    agreement: Agreement | None = None,
) -> Any:
    """``function(*args, **kwargs)``, which backward calls once more.

    Gradients reach the tensors among the arguments, in nested lists, tuples and dicts too, and all
    leaves that the function uses, such as parameters.

    Args:
        function: called once here, in grad mode, and once in each backward.
        args, kwargs: its arguments; must stay as they are until backward.
        roots: what it is made of, where its generators and buffers are looked for; without any,
            the function and its arguments.
        name: what errors call the function.
        agreement: with the ranks that make the same call, all of which raise an error of one.

    Returns:
        What the function returns: a tensor, or a structure of tensors known to torch's pytrees.

    Raises:
        TypeError: the function returns tensors in a structure that is not known.
        ReplayError: in backward, where the second call returned something else.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.5], requires_grad=True)
        >>> y = recomputed(lambda x: x.exp().sin(), [x])
        >>> torch.allclose(torch.autograd.grad(y, x)[0], x.exp() * x.exp().cos())
        True
    """
    if not torch.is_grad_enabled():
        return function(*args, **(kwargs or {}))
    transforms.refuse(f"{name}: memory", "another strategy")
    seen = roots or (function, args, kwargs)
    call = _Call(function, args, kwargs or {}, seen, name, agreement or Agreement())
    return call.connected()


class _Call:
    """A call that is made twice. It holds no tensor: autograd has the inputs, and frees them."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        roots: Sequence[object],
        name: str,
        agreement: Agreement,
    ) -> None:
        leaves, self._structure = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self._places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
        self._tensors: list[Tensor] = [leaves[k] for k in self._places]
        self._constants = [None if isinstance(x, Tensor) else x for x in leaves]
        self._function, self._name = function, name
        device = self._tensors[0].device if self._tensors else torch.get_default_device()
        self._agreement = agreement
        self._circumstances = Circumstances(device, Seen(*roots), agreement=agreement)

    def connected(self) -> Any:
        """Makes the call for the first time and puts it into the autograd graph."""
        since = graph.mark()
        inputs, self._tensors = self._tensors, []
        fresh = [graph.input_of(x, differentiated=x.requires_grad) for x in inputs]
        result = self._circumstances.captured(_CALL, partial(self._made, fresh))
        self._circumstances.finish()
        flat, structure = pytree.tree_flatten(result)
        places = [k for k, x in enumerate(flat) if isinstance(x, Tensor)]
        outputs: list[Tensor] = [flat[k] for k in places]
        self._floating = [k for k, x in enumerate(outputs) if x.dtype.is_floating_point]
        if not self._floating:
            what = f"{self._name}: what it returns"
            _checks.fail_type(what, "hold floating tensors that torch's pytrees find", result)
        found = graph.reached(outputs, since)
        self.outer = found.outer
        own = {id(graph.leaf_of(x)) for x in fresh}
        leaves = [leaf for key, leaf in found.leaves.items() if key not in own]
        self.count = len(inputs)
        self._sketches = self._sketched(outputs)
        detached = [x.detach() for x in outputs]
        del result, outputs, fresh, found
        for k in places:
            flat[k] = None
        connected = _Connection.apply(self, detached, *inputs, *leaves)
        for k, x in zip(places, connected, strict=True):
            flat[k] = x
        return pytree.tree_unflatten(flat, structure)

    def _made(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._constants)
        for k, x in zip(self._places, tensors, strict=True):
            leaves[k] = x
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with torch.enable_grad():
            return self._function(*args, **kwargs)

    def _sketched(self, outputs: Sequence[Tensor]) -> list[Sketch]:
        precisions = self._circumstances.precisions
        return [Sketch.summed(outputs[k], precisions) for k in self._floating]

    def pulled(
        self, cotangents: Sequence[Tensor | None], tensors: Sequence[Tensor], wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Makes the call once more and pulls cotangents of its outputs back to ``tensors``."""
        inputs, leaves = tensors[: self.count], list(tensors[self.count :])
        fresh = [
            graph.input_of(x, differentiated=need)
            for x, need in zip(inputs, wanted[: self.count], strict=True)
        ]
        flat = self._circumstances.again(_CALL, lambda: pytree.tree_leaves(self._made(fresh)))
        outputs = [x for x in flat if isinstance(x, Tensor)]
        pairs_of_sketches = zip(self._sketches, self._sketched(outputs), strict=True)
        other = changed(list(pairs_of_sketches))
        pairs = [
            (output, g.to(output.dtype))
            for output, g in zip(outputs, cotangents, strict=True)
            if g is not None and output.requires_grad
        ]
        asked = [k for k, need in enumerate(wanted) if need]
        gradients: list[Tensor | None] = [None] * len(tensors)
        if pairs and asked:
            every = [*fresh, *leaves]
            with graph.without_hooks(leaves), self._circumstances.drawing_nothing(_CALL):
                pulled = torch.autograd.grad(
                    [output for output, _ in pairs],
                    [every[k] for k in asked],
                    [g for _, g in pairs],
                    allow_unused=True,
                    retain_graph=self.outer,
                )
            for k, gradient in zip(asked, pulled, strict=True):
                gradients[k] = gradient
        failure = next(iter(self._circumstances.failures.values()), None)
        if self._agreement.any(any(other) or failure is not None):
            raise failure or ReplayError(
                f"{self._name} must return the same when it is called again, got another output; "
                "does it draw from a generator that is not seen in it, as numpy's, or were weights "
                "or inputs changed since? memory='store' calls it once"
                f"{self._agreement.elsewhere(any(other))}"
            )
        return gradients


class _Connection(torch.autograd.Function):
    """Puts a finished call into the autograd graph."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, outputs: list[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """The call's outputs; ``tensors`` are its inputs and the leaves that it uses."""
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.dtype.is_floating_point))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Cotangents of the inputs and leaves."""
        for g in cotangents:
            transforms.refuse("memory", "another strategy", g)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a call that keeps no activations must be differentiated once, got "
                "create_graph=True; memory='store' has a gradient of the gradient"
            )
        wanted = graph.wanted(ctx)
        return None, None, *ctx.call.pulled(cotangents, ctx.saved_tensors, wanted)
