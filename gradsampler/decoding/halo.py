# SPDX-License-Identifier: Apache-2.0
"""A stack of convolutions by tiles, and yet the function of the whole image, to rounding.

A convolution reads its neighbourhood: a tile with a halo as wide as the field of view has right
values in its core. What joins the tiles are the group normalisations, whose statistics are means
over the image. They are gathered first, one normalisation after the other, since each needs those
before. The gradient is that of a function with constraints: with s_k the statistics, S_k what a
tile adds to them and l the loss,

    lambda_k = dl/ds_k + sum over j > k of lambda_j dS_j/ds_k,

a sum over tiles again, from the last normalisation to the first. Then the gradient of the input is
that of ``l + sum_k lambda_k S_k`` at fixed s, tile by tile. No pass holds the activations of more
than one tile; with K normalisations there are K + 1 passes in either direction.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gradsampler import _checks
from gradsampler.engine import graph
from gradsampler.engine.substitution import Call, replanted, stand_in

__all__ = ["Normalized", "Piece", "exact_tiles", "field_of_view"]


class Piece(NamedTuple):
    """A part of a decoder, which is called with the output of the part before."""

    name: str
    module: nn.Module


class Sums(NamedTuple):
    """What a tile adds to the statistics of a normalisation, or all of them."""

    moments: Tensor  # [2, G] float64, of the elements of a group and of their squares
    elements: int  # of a group

    def __add__(self, other: "Sums") -> "Sums":  # type: ignore[override]
        return Sums(self.moments + other.moments, self.elements + other.elements)


class Tile(NamedTuple):
    """A rectangle with a halo, in pixels of the input."""

    core: tuple[slice, slice]
    padded: tuple[slice, slice]

    def inner(self, scale: int) -> tuple[slice, slice]:
        """The core within the padded tile, in pixels ``scale`` times as fine."""
        return _pair(
            slice((c.start - p.start) * scale, (c.stop - p.start) * scale)
            for c, p in zip(self.core, self.padded, strict=True)
        )

    def scaled(self, scale: int) -> tuple[slice, slice]:
        """The core within the image, in pixels ``scale`` times as fine."""
        return _pair(slice(c.start * scale, c.stop * scale) for c in self.core)


def _pair(slices: Iterator[slice]) -> tuple[slice, slice]:
    rows, columns = slices
    return rows, columns


def _tiles(height: int, width: int, size: int, halo: int) -> list[Tile]:
    """Covers a rectangle with tiles of ``size``, smaller at its end."""

    def spans(length: int) -> list[tuple[slice, slice]]:
        found = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            wide = slice(max(0, start - halo), min(length, stop + halo))
            found.append((slice(start, stop), wide))
        return found

    return [
        Tile((y, x), (wide_y, wide_x))
        for (y, wide_y), (x, wide_x) in product(spans(height), spans(width))
    ]


Core = tuple[slice, slice]


def _moments(x: Tensor, groups: int, core: Core) -> Tensor:
    """[2, G] float64: sums over the core of x [1, C, h, w], of a group's elements and squares.

    A variance is a small difference of such sums. One group at a time, for the copy in float64.
    """
    parts = [part[(..., *core)].double() for part in x.chunk(groups, 1)]
    return torch.stack([torch.stack([part.sum(), part.square().sum()]) for part in parts], 1)


class Normalized(torch.autograd.Function):
    """A group normalisation by statistics that are given, and the core's part of those.

    Of the activations it keeps its input alone, as torch's own does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [1, C, h, w]
        given: Tensor,  # [2, G] float64: means and mean squares
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        core: Core,
    ) -> tuple[Tensor, Tensor]:
        """The result [1, C, h, w], and the moments [2, G]."""
        ctx.save_for_backward(x, given, weight)
        ctx.eps, ctx.core = eps, core
        y = Normalized._standard(x, given, eps)
        if weight is not None and bias is not None:
            y.mul_(weight[:, None, None]).add_(bias[:, None, None])
        return y.to(x.dtype), _moments(x, given.shape[1], core)

    @staticmethod
    def _standard(x: Tensor, given: Tensor, eps: float) -> Tensor:
        """x less the mean and over the deviation, in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mean, spread = (each.to(wide)[:, None] for each in _mean_and_spread(given, eps))
        grouped = x.reshape(given.shape[1], -1).to(wide)
        return (grouped - mean).mul_(spread).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, added: Tensor) -> tuple[Tensor | None, ...]:
        """Cotangents of x, of the given statistics, and of weight and bias."""
        x, given, weight = ctx.saved_tensors
        needs, groups = ctx.needs_input_grad, given.shape[1]
        dx = dgiven = dweight = dbias = None
        g = g.to(torch.promote_types(x.dtype, torch.float32))
        if needs[2] or needs[3]:
            dweight = (g * Normalized._standard(x, given, ctx.eps)).sum((0, 2, 3))
            dbias = g.sum((0, 2, 3))
        if weight is not None:
            g = g * weight[:, None, None]
        mean, spread = _mean_and_spread(given, ctx.eps)
        if needs[1]:
            flat = g.reshape(groups, -1)
            standard = Normalized._standard(x, given, ctx.eps).view(groups, -1)
            along = standard.mul_(flat).sum(1).double()
            square = -0.5 * along * spread**2  # y = (x - m) r with r = (q - m^2 + eps)^(-1/2)
            dgiven = torch.stack([-flat.sum(1).double() * spread - 2 * mean * square, square])
        if needs[0]:
            spread = spread.to(g.dtype)[:, None]
            dx = (g.reshape(groups, -1) * spread).view(x.shape)
            first, second = added.to(g.dtype).repeat_interleave(x.shape[1] // groups, 1)
            inner = (..., *ctx.core)
            dx[inner] += first[:, None, None] + 2 * second[:, None, None] * x[inner]
            dx = dx.to(x.dtype)
        return dx, dgiven, dweight, dbias, None, None


def _mean_and_spread(given: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[G] means, and reciprocal deviations."""
    mean, square = given
    return mean, torch.rsqrt((square - mean.square()).clamp_min(0) + eps)


class _Reached(Exception):
    """Ends a pass at the normalisation that was asked for."""


class _NoImage(Exception):
    """A normalisation of something else than [1, C, h, w], such as an attention's tokens."""


class _Stack:
    """Pieces whose group normalisations take statistics that are given."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        modules = [m for piece in pieces for m in piece.module.modules()]
        self.norms = [m for m in modules if isinstance(m, nn.GroupNorm)]
        self.parameters = [p for piece in pieces for p in piece.module.parameters()]
        calls: dict[nn.Module, Call] = dict.fromkeys(self.norms, self._normalized)
        self._modules = [
            stand_in(piece.module, self._normalized)
            if piece.module in calls
            else replanted(piece.module, calls)
            for piece in pieces
        ]
        self._given: Sequence[Tensor] = ()
        self._gathered: list[Sums] = []
        self._tile: Tile | None = None
        self._stop: int | None = None
        self._width = 1

    def run(
        self,
        x: Tensor,
        given: Sequence[Tensor],
        tile: Tile | None = None,
        stop: int | None = None,
    ) -> tuple[Tensor, list[Sums]]:
        """Runs on a tile; the core of its output, and the sums over it at each normalisation.

        Args:
            x: [1, C, h, w] the padded tile.
            given: [2, G] means and mean squares of the normalisations, at least before ``stop``.
            tile: which one it is; None takes all of x for its core.
            stop: ends at this normalisation, after its sums; the output is empty then.
        """
        self._given, self._gathered, self._tile, self._stop = given, [], tile, stop
        self._width = x.shape[-1]
        try:
            for module in self._modules:
                x = module(x)
        except _Reached:
            return x.new_empty(0), self._gathered
        return x[(..., *self._core(x))], self._gathered

    def _core(self, x: Tensor) -> tuple[slice, slice]:
        if self._tile is None:
            return slice(None), slice(None)
        return self._tile.inner(x.shape[-1] // self._width)

    def _normalized(self, module: nn.GroupNorm, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise _NoImage
        k, core, groups = len(self._gathered), self._core(x), module.num_groups
        elements = x[(..., *core)].numel() // groups
        if k == self._stop:
            self._gathered.append(Sums(_moments(x, groups, core), elements))
            raise _Reached
        affine = module.weight, module.bias
        y, moments = Normalized.apply(x, self._given[k], *affine, module.eps, core)
        self._gathered.append(Sums(moments, elements))
        result: Tensor = y
        return result


class _Image:
    """One image under a stack: its statistics, its output and its gradient by tiles."""

    def __init__(self, stack: _Stack, plan: Sequence[Tile]) -> None:
        self._stack, self._plan = stack, plan
        self._given: list[Tensor] = []
        self._elements: list[int] = []

    @torch.no_grad()
    def output(self, x: Tensor) -> Tensor:
        """[1, C', sH, sW], of x [1, C, H, W]."""
        for k in range(len(self._stack.norms)):
            parts = [self._run(x, tile, self._given, stop=k)[1] for tile in self._plan]
            if any(len(part) <= k for part in parts):
                break  # not all of the normalisations are called
            total = parts[0][k]
            for part in parts[1:]:
                total = total + part[k]
            self._given.append(total.moments / total.elements)
            self._elements.append(total.elements)
        whole: Tensor | None = None
        for tile in self._plan:
            core, _ = self._run(x, tile, self._given)
            if whole is None:
                scale = core.shape[-1] // (tile.core[1].stop - tile.core[1].start)
                height, width = x.shape[-2] * scale, x.shape[-1] * scale
                whole = core.new_empty(1, core.shape[1], height, width)
            whole[(..., *tile.scaled(scale))] = core
        assert whole is not None
        return whole

    def _run(
        self, x: Tensor, tile: Tile, given: Sequence[Tensor], stop: int | None = None
    ) -> tuple[Tensor, list[Sums]]:
        return self._stack.run(x[(..., *tile.padded)], given, tile, stop)

    def pulled(self, x: Tensor, g: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
        """Cotangents of x [1, C, H, W] and of the parameters ``wanted``, from the output's g."""
        count = len(self._given)
        lam: list[Tensor] = [torch.zeros_like(s) for s in self._given]
        for k in reversed(range(count)):
            learned = self._given[k].clone().requires_grad_()
            given = [*self._given[:k], learned, *self._given[k + 1 :]]
            for tile in self._plan:
                with torch.enable_grad():
                    found = self._run(x, tile, given)
                (part,) = self._vjp(tile, found, g, lam, [learned], since=k + 1)
                lam[k] += 0 if part is None else part
        dx = torch.zeros_like(x)
        sums = [torch.zeros_like(p) for p in wanted]
        for tile in self._plan:
            leaf = graph.input_of(x[(..., *tile.padded)].clone())
            with torch.enable_grad():
                found = self._stack.run(leaf, self._given, tile)
            first, *rest = self._vjp(tile, found, g, lam, [leaf, *wanted])
            del found
            totals = zip((dx[(..., *tile.padded)], *sums), (first, *rest), strict=True)
            for total, part in totals:
                total += 0 if part is None else part
        return [dx, *sums]

    def _vjp(
        self,
        tile: Tile,
        found: tuple[Tensor, Sequence[Sums]],
        g: Tensor,
        lam: Sequence[Tensor],
        inputs: Sequence[Tensor],
        since: int = 0,
    ) -> Sequence[Tensor | None]:
        """Pulls back the cotangents of a tile's output and of the statistics from ``since`` on."""
        core, sums = found
        scale = core.shape[-1] // (tile.core[1].stop - tile.core[1].start)
        pairs = [(core, g[(..., *tile.scaled(scale))])]
        for k in range(since, len(self._given)):
            pairs.append((sums[k].moments, lam[k] / self._elements[k]))
        pairs = [pair for pair in pairs if pair[0].requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, cotangents, allow_unused=True)


class _Tiled(torch.autograd.Function):
    """The pieces on a batch of images, without a graph."""

    @staticmethod
    def forward(
        ctx: Any, stack: _Stack, plan: Sequence[Tile], x: Tensor, *parameters: Tensor
    ) -> Tensor:
        """The whole output, with the activations of one tile at a time."""
        ctx.stack, ctx.images = stack, [_Image(stack, plan) for _ in x]
        ctx.save_for_backward(x, *parameters)
        parts = zip(ctx.images, x.detach().split(1), strict=True)
        return torch.cat([image.output(part) for image, part in parts])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Cotangents of the images and of the parameters."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a decode by tiles must be differentiated once, got create_graph=True"
            )
        x, *parameters = ctx.saved_tensors
        _, *needs = graph.wanted(ctx)
        wanted = [p for p, need in zip(parameters, needs, strict=True) if need]
        parts = [
            image.pulled(each, dy, wanted)
            for image, each, dy in zip(ctx.images, x.split(1), g.split(1), strict=True)
        ]
        dx = torch.cat([part[0] for part in parts])
        sums = iter([sum(each[1:], each[0]) for each in list(zip(*parts, strict=True))[1:]])
        return None, None, dx, *(next(sums) if need else None for need in needs)


def exact_tiles(pieces: Sequence[Piece], x: Tensor, size: int) -> Tensor:
    """Runs the pieces one after the other on images, tile by tile.

    Args:
        pieces: convolutions of stride 1, group normalisations, what acts on each pixel alone, and
            magnifications by a whole number.
        x: [B, C, H, W].
        size: of a tile without its halo, in pixels of x.

    Returns:
        [B, C', sH, sW]; gradients reach x and the parameters of the pieces.

    Raises:
        ValueError: naming a piece that reads the whole image.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU()]
        >>> pieces = [Piece(str(k), layer) for k, layer in enumerate(layers)]
        >>> x = torch.randn(1, 2, 9, 8)
        >>> torch.allclose(exact_tiles(pieces, x, 4), nn.Sequential(*layers)(x), atol=1e-5)
        True
    """
    stack = _Stack(pieces)
    plan = _tiles(x.shape[-2], x.shape[-1], size, field_of_view(pieces, x))
    output: Tensor = _Tiled.apply(stack, plan, x, *stack.parameters)
    return output


def field_of_view(pieces: Sequence[Piece], x: Tensor) -> int:
    """How far from a pixel of the input the output still depends on it, statistics aside.

    Args:
        pieces: the parts.
        x: [B, C, H, W] gives channels, dtype and device.

    Raises:
        ValueError: naming a part that reads the whole image.
    """
    reach = _reach(pieces, x)
    if reach is not None:
        return reach
    small = x[:1, :, :8, :8].detach()
    for piece in pieces:
        if _reach([piece], small, widths=(17,)) is None:
            _checks.fail(
                f"memory='halo': {piece.name}",
                "read the neighbourhood of a pixel alone",
                f"a {type(piece.module).__name__}, which reads the whole image",
                "memory='blocks' decodes the whole image block by block",
            )
        with torch.no_grad():
            small = piece.module(small)
    _checks.fail("memory='halo': the pieces", "read at most 32 pixels around one", "more")


@torch.enable_grad()
def _reach(pieces: Sequence[Piece], x: Tensor, widths: Sequence[int] = (17, 33, 65)) -> int | None:
    """The field of view, found by differentiation; None where it goes beyond all that is tried."""
    stack = _Stack(pieces)
    given = [
        torch.stack([x.new_zeros(m.num_groups), x.new_ones(m.num_groups)]).double()
        for m in stack.norms
    ]
    generator = torch.Generator().manual_seed(0)
    for width in widths:
        noise = torch.randn(1, x.shape[1], width, width, generator=generator)
        probe = graph.input_of(noise.to(x.device, x.dtype))
        try:
            y, _ = stack.run(probe, given)
        except _NoImage:
            return None
        scale, middle = y.shape[-1] // width, width // 2
        span = slice(middle * scale, (middle + 1) * scale)
        block = y[..., span, span]
        weights = torch.randn(block.shape, generator=generator).to(block)
        (gradient,) = torch.autograd.grad((block * weights).sum(), probe)
        reach = int((gradient[0] != 0).any(0).nonzero().sub(middle).abs().max())
        if reach < middle:
            return reach
    return None
