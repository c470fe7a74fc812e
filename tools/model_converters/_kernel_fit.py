"""A convolution's kernel as the convolution path of ACmix computes it, as nearly as it can.

At head position g, the path (ACmix, CVPR 2022, section 4.2) projects the C inputs to 3 N maps,
``fc`` mixes those to k * k, and a k x k convolution leads to N outputs. ``fc`` is common to all
positions, but the projections are not: with an ``fc`` of full row rank, any k * k maps can be had.
So the path is exactly: for every group of N outputs, any k * k inner maps (1x1), then any k x k
convolution. The group's kernel, a matrix of N * k * k rows (output, tap) and C columns (input), has
rank k * k at most: with 4 heads, 9 of 36. Which outputs form a group is free where the network's
next layers can be permuted.

Kernels are tensors (O, T, I) here: outputs, taps, inputs. Groups are (G, N), indices of outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Factors:
    """Kernels of the groups as an outer times an inner factor.

    Args:
        groups (Tensor): Output channels of every group, shape (G, N).
        outer (Tensor): Shape (G, N, T, R): output, tap, inner map.
        inner (Tensor): Shape (G, R, I): inner map, input.
    """

    groups: Tensor
    outer: Tensor
    inner: Tensor

    def kernel(self) -> Tensor:
        """The kernel (O, T, I) of the two, outputs in their original order."""
        kernel = torch.einsum('gntr,gri->gnti', self.outer, self.inner).flatten(0, 1)
        return kernel[self.groups.flatten().argsort()]

    def balanced(self) -> 'Factors':
        """The same kernels with outer factors of orthonormal columns.

        So inner maps, which the attention path shares, have about the outputs' scale.
        """
        orthonormal, triangle = torch.linalg.qr(self.outer.flatten(1, 2))
        outer = orthonormal.view_as(self.outer)
        return Factors(self.groups, outer, triangle @ self.inner)


@dataclass(frozen=True)
class Statistics:
    """What a least-squares fit of a convolution to wanted outputs needs to know of the data.

    Args:
        patches (Tensor): Covariance of the input's patches, shape (T, I, T, I).
        outputs (Tensor): Covariance of wanted outputs and patches, shape (O, T, I).
    """

    patches: Tensor
    outputs: Tensor

    def pulled_to(self, kernel: Tensor, ridge: float) -> 'Statistics':
        """With a penalty on the squared distance to ``kernel``: data may leave much undetermined.

        Args:
            kernel (Tensor): Shape (O, T, I).
            ridge (float): Weight of the penalty, relative to the inputs' mean variance.
        """
        size = kernel[0].numel()
        patches = self.patches.reshape(size, size)
        ridge = (ridge * patches.diagonal().mean()).clamp_min(1e-12)  # all inputs may be zero
        patches = patches + ridge * torch.eye(size, dtype=patches.dtype)
        return Statistics(patches.view_as(self.patches), self.outputs + ridge * kernel)

    def root(self) -> Tensor:
        """Cholesky factor of the inputs' covariance, the mean over taps; shape (I, I)."""
        return torch.linalg.cholesky(torch.einsum('titj->ij', self.patches) / len(self.patches))

    def best_kernel(self) -> Tensor:
        """The dense kernel of least error, (O, T, I)."""
        size = self.outputs[0].numel()
        cholesky = torch.linalg.cholesky(self.patches.reshape(size, size))
        kernel = torch.cholesky_solve(self.outputs.flatten(1).T, cholesky).T
        return kernel.reshape(self.outputs.shape)

    def excess(self, kernel: Tensor) -> float:
        """Squared error of a kernel, without the part that no kernel can change."""
        through = torch.einsum('oti,tisj->osj', kernel, self.patches)
        return ((through - 2 * self.outputs) * kernel).sum().item()


def measure(conv: nn.Conv2d, x: Tensor, wanted: Tensor) -> Statistics:
    """Statistics for a convolution of this one's geometry, and any bias, that leads to ``wanted``.

    Args:
        conv (nn.Conv2d): Undilated, in one group.
        x (Tensor): Its input, shape (B, I, H, W).
        wanted (Tensor): The outputs to reach, (B, O, H', W').
    """
    inputs, outputs, taps = x.size(1), wanted.size(1), conv.weight[0, 0].numel()
    second = torch.zeros(taps * inputs + outputs, taps * inputs, dtype=torch.float64)
    first = torch.zeros(taps * inputs + outputs, dtype=torch.float64)
    for batch, target in zip(x.split(16), wanted.split(16), strict=True):
        patches = F.unfold(batch, conv.kernel_size, 1, conv.padding, conv.stride)
        patches = patches.unflatten(1, (inputs, taps)).permute(2, 1, 0, 3).flatten(2).flatten(0, 1)
        rows = torch.cat([patches, target.transpose(0, 1).flatten(1)])
        second += rows @ patches.T
        first += rows.sum(1)
    count = wanted.numel() / outputs
    second = second / count - torch.outer(first, first[: taps * inputs]) / count**2
    patches, cross = second.split([taps * inputs, outputs])
    return Statistics(
        patches.reshape(taps, inputs, taps, inputs), cross.reshape(outputs, taps, inputs)
    )


def energy_beyond(kernel: Tensor, groups: Tensor, rank: int) -> float:
    """Share of a kernel's energy that groups of that rank leave out, at least (Eckart-Young)."""
    energies = spectra(kernel, groups) ** 2
    return (energies[:, rank:].sum() / energies.sum().clamp_min(1e-300)).item()


def spectra(kernel: Tensor, groups: Tensor) -> Tensor:
    """Singular values of every group's kernel, (G, min(N * T, I)), largest first."""
    return torch.linalg.svdvals(kernel[groups].flatten(1, 2))


def truncate(kernel: Tensor, groups: Tensor, rank: int) -> Factors:
    """The nearest kernel (Frobenius norm) whose groups have that rank at most.

    Args:
        kernel (Tensor): Shape (O, T, I).
        groups (Tensor): Shape (G, N).
        rank (int): Inner maps R of a group. Where a kernel has fewer inputs, the others are zero.
    """
    blocks = kernel[groups]
    left, values, right = torch.linalg.svd(blocks.flatten(1, 2), full_matrices=False)
    missing = max(rank - values.size(1), 0)
    outer = F.pad(left[..., :rank], (0, missing))
    inner = F.pad(values[:, :rank, None] * right[:, :rank], (0, 0, 0, missing))
    return Factors(groups, outer.view(*blocks.shape[:3], rank), inner)


def group_outputs(
    kernel: Tensor, size: int, rank: int, generator: torch.Generator, sweeps: int = 2
) -> Tensor:
    """Groups of output channels whose kernels are near to matrices of low rank together.

    From groups in the channels' order, members are swapped between two groups while it lowers the
    energy beyond the rank. Every round pairs the groups at random and takes the best of a pair's
    swaps, if it is one.

    Args:
        kernel (Tensor): Shape (O, T, I), with O a multiple of ``size``.
        size (int): Channels of a group, N.
        rank (int): Rank of a group's kernel, R.
        generator (torch.Generator): Source of the pairing.
        sweeps (int): How often a group meets each other group, on average. Default: 2.

    Returns:
        Tensor: Shape (O / N, N).
    """
    outputs, taps, _ = kernel.shape
    flat = kernel.flatten(0, 1)
    gram = (flat @ flat.T).view(outputs, taps, outputs, taps).transpose(1, 2).contiguous()

    def kept(groups: Tensor) -> Tensor:
        """Energy within the rank: the largest eigenvalues of the groups' Gram matrices."""
        blocks = gram[groups[:, :, None], groups[:, None]].transpose(2, 3)
        return torch.linalg.eigvalsh(blocks.flatten(3, 4).flatten(1, 2))[:, -rank:].sum(-1)

    groups = torch.arange(outputs).view(-1, size)
    energies = kept(groups)
    half = len(groups) // 2
    first, second = torch.meshgrid(torch.arange(size), torch.arange(size), indexing='ij')
    first, second, swap = first.flatten(), second.flatten(), torch.arange(size**2)
    for _ in range(sweeps * len(groups) if half else 0):
        pairs = torch.randperm(len(groups), generator=generator)[: 2 * half].view(2, half)
        candidates = groups[pairs][:, :, None].repeat(1, 1, size**2, 1)
        left, right = candidates
        left[:, swap, first], right[:, swap, second] = (
            right[:, swap, second],
            left[:, swap, first],
        )
        new = kept(candidates.flatten(0, 2)).view(2, half, -1)
        total, best = new.sum(0).max(1)
        better = total > energies[pairs].sum(0) * (1 + 1e-9)
        rows, best = better.nonzero()[:, 0], best[better]
        groups[pairs[:, rows]] = candidates[:, rows, best]
        energies[pairs[:, rows]] = new[:, rows, best]
    return groups


def alternate(start: Factors, statistics: Statistics, sweeps: int = 6, steps: int = 6) -> Factors:
    """Lower the error of a factorised kernel on data by alternating least squares.

    Outer factors are solved for exactly, inner ones by some steps of conjugate gradients from where
    they are, all groups at once; neither can raise the error.

    Args:
        start (Factors): Where to begin.
        statistics (Statistics): Of the data.
        sweeps (int): Times that both are solved for. Default: 6.
        steps (int): Of conjugate gradients. Default: 6.
    """
    taps, inputs = statistics.patches.shape[:2]
    wanted = statistics.outputs[start.groups]
    # In coordinates in which the input is white on average over taps, conjugate gradients are fast.
    root = statistics.root()

    def whiten(rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(root.T, rows, upper=True, left=False)

    patches = whiten(statistics.patches.flatten(0, 2)).reshape(taps, inputs, -1)
    patches = whiten(patches.transpose(1, 2)).transpose(1, 2).reshape(taps * inputs, -1)
    wanted = whiten(wanted.flatten(0, 2)).reshape(wanted.shape)
    factors = Factors(start.groups, start.outer, start.inner @ root)
    for _ in range(sweeps):
        factors = Factors(start.groups, _best_outer(factors.inner, patches, wanted), factors.inner)
        factors = factors.balanced()
        inner = _better_inner(factors.outer, factors.inner, patches, wanted, steps)
        factors = Factors(start.groups, factors.outer, inner)
    inner = torch.linalg.solve_triangular(root, factors.inner, upper=False, left=False)
    return Factors(start.groups, factors.outer, inner)


def _best_outer(inner: Tensor, patches: Tensor, wanted: Tensor) -> Tensor:
    """Outer factors of least error with these inner ones."""
    groups, rank, inputs = inner.shape
    taps = wanted.size(2)
    moments = inner.new_empty(groups, taps, rank, taps, rank)
    for tap, rows in enumerate(patches.view(taps, inputs, taps, inputs)):
        seen = inner.flatten(0, 1) @ rows.flatten(1)
        seen = seen.view(groups, rank * taps, inputs) @ inner.transpose(1, 2)
        moments[:, tap] = seen.view(groups, rank, taps, rank)
    moments = moments.flatten(3, 4).flatten(1, 2)
    # Inner maps that are zero or equal leave the outer ones undetermined.
    jitter = 1e-12 * moments.diagonal(dim1=1, dim2=2).mean(1)
    moments.diagonal(dim1=1, dim2=2).add_(jitter[:, None].clamp_min(1e-300))
    right = torch.einsum('gnti,gri->gtrn', wanted, inner).flatten(1, 2)
    outer = torch.cholesky_solve(right, torch.linalg.cholesky(moments))
    return outer.transpose(1, 2).reshape(*wanted.shape[:3], rank)


def _better_inner(
    outer: Tensor, inner: Tensor, patches: Tensor, wanted: Tensor, steps: int
) -> Tensor:
    """Inner factors nearer to the least error with these outer ones."""

    def normal(inner: Tensor) -> Tensor:
        kernel = torch.einsum('gntr,gri->gnti', outer, inner)
        through = (kernel.flatten(2).flatten(0, 1) @ patches).view_as(kernel)
        return torch.einsum('gntr,gnti->gri', outer, through)

    residual = torch.einsum('gntr,gnti->gri', outer, wanted) - normal(inner)
    direction, squares = residual, (residual**2).sum((1, 2), keepdim=True)
    for _ in range(steps):
        step = normal(direction)
        curvature = (direction * step).sum((1, 2), keepdim=True)
        length = squares / curvature.clamp_min(1e-300)
        inner = inner + length * direction
        residual = residual - length * step
        before, squares = squares, (residual**2).sum((1, 2), keepdim=True)
        direction = residual + squares / before.clamp_min(1e-300) * direction
    return inner
