"""What masked image modelling needs: patches covered in blocks, and a number for what each patch shows."""

from __future__ import annotations

import math

import torch
from torch import LongTensor, Tensor

from minivlp.data.errors import DataError


def hide_blocks(
    B: int, grid: int, *, generator: torch.Generator, share: float = 0.4, smallest: int = 2, aspect: float = 0.3
) -> Tensor:
    """Cover a `share` of each picture's grid * grid patches in rectangles (BEiT, algorithm 1): (B, N), True = covered.

    A rectangle has `smallest` patches or more (BEiT: 16 of 196), as many as are still wanted at most, and its sides in
    a ratio between `aspect` and 1 / `aspect`. Neighbours vanish together, so that a patch cannot be guessed from the
    next one. Every picture has the same number of covered patches. Raises DataError if the share leaves none or all.
    """
    wanted = round(share * grid * grid)
    if not 0 < wanted < grid * grid:
        raise DataError(f"share={share} covers {wanted} of {grid * grid} patches: choose one that leaves some of both")
    covered = torch.zeros(B, grid, grid, dtype=torch.bool)
    for picture in covered:
        while (missing := wanted - int(picture.sum())) > 0:
            size, ratio, top, left = torch.rand(4, generator=generator).tolist()
            area = min(smallest, missing) + size * max(0, missing - smallest)
            ratio = math.exp((2 * ratio - 1) * math.log(1 / aspect))  # as often wide as high
            high, wide = (min(grid, max(1, round(math.sqrt(a)))) for a in (area * ratio, area / ratio))
            top, left = int(top * (grid - high + 1)), int(left * (grid - wide + 1))
            new = torch.zeros_like(picture)
            new[top : top + high, left : left + wide] = True
            new &= ~picture
            if int(new.sum()) > missing:  # the last rectangle is cut to what is wanted
                new.view(-1)[new.view(-1).nonzero()[missing:, 0]] = False
            picture |= new
    return covered.flatten(1)


class PatchCodes:
    """A number for each patch, the nearest of K typical ones: k-means, a small stand-in for BEiT's discrete tokenizer.

    `centres` (K, P*P*C). BEiT takes the 8,192 codes of a trained discrete VAE, which also sees a patch's surroundings.
    """

    def __init__(self, centres: Tensor) -> None:
        self.centres = centres

    @classmethod
    def fit(cls, patches: Tensor, *, codes: int = 128, rounds: int = 10, seed: int = 0):
        """patches (M, P*P*C), floats. Each round: every patch to its nearest centre, every centre to its patches' mean
        (Lloyd). It starts from patches drawn at random; a centre that loses all its patches stays where it is. Raises
        DataError if there are fewer patches than codes."""
        if len(patches) < codes:
            raise DataError(f"{len(patches)} patches cannot be sorted into {codes} kinds: give more, or fewer codes")
        chosen = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))[:codes]
        sorter = cls(patches[chosen].clone())
        for _ in range(rounds):
            own = sorter(patches)
            count = torch.bincount(own, minlength=codes)
            total = torch.zeros_like(sorter.centres).index_add_(0, own, patches)
            sorter.centres = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], sorter.centres)
        return sorter

    def __call__(self, patches: Tensor) -> LongTensor:
        """patches (..., P*P*C) -> numbers (...) of the nearest centres."""
        # |p - c|^2 without the term |p|^2, which is the same for all centres
        return (self.centres.square().sum(1) - 2 * patches @ self.centres.T).argmin(dim=-1)
