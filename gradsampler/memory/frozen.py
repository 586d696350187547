# SPDX-License-Identifier: Apache-2.0
"""Networks that are sampled from and not trained."""

import math
from typing import Any

import torch
from torch import Tensor, nn


def freeze(network: nn.Module) -> nn.Module:
    """Freezes the parameters of a network, so that a run keeps nothing for their gradients.

    ``requires_grad_(False)`` is enough for linear layers and the scales of normalisations. But
    torch keeps the input of a convolution even if its weight is frozen (PyTorch issue 133566),
    although the gradient to the input only needs the weight. Convolutions of this network release
    it. The gradients are the same, up to rounding if the layout of that input decided on the
    kernel. There is no effect in a compiled network, or inside an activation checkpoint.

    On selective differentiation: Bhatia and Dangel 2024, "Lowering PyTorch's memory consumption
    for selective differentiation", arXiv 2404.12406.

    Args:
        network: it is changed: its parameters require no gradient, and its convolutions get a
            forward hook, which does nothing if a weight or bias requires one again.

    Returns:
        The same network.

    Example:
        >>> import gradsampler as gs
        >>> from torch import nn
        >>> network = gs.memory.freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU()))
        >>> any(p.requires_grad for p in network.parameters())
        False
    """
    network.requires_grad_(False)
    for module in network.modules():
        hooks = module._forward_hooks.values()
        if isinstance(module, nn.modules.conv._ConvNd) and _forget_input not in hooks:
            module.register_forward_hook(_forget_input)
    return network


def _forget_input(module: nn.Module, args: Any, output: Tensor) -> None:
    """Has the graph of a frozen convolution keep its input's shape alone."""
    if torch.compiler.is_compiling() or type(output.grad_fn).__name__ != "ConvolutionBackward0":
        return
    node: Any = output.grad_fn
    (_, weight, *_) = [parent for parent, _ in node.next_functions]
    if weight is not None:
        return
    try:
        node._raw_saved_input.register_hooks(_shape, _stand_in)
    except RuntimeError:  # hooks around the call have packed it already
        return


def _shape(x: Tensor) -> tuple[torch.Size, Tensor]:
    return x.shape, x.new_full((), math.nan)  # whoever reads an element shows


def _stand_in(packed: tuple[torch.Size, Tensor]) -> Tensor:
    """A tensor of the input's shape, in the memory of one element."""
    shape, element = packed
    return element.expand(shape)
