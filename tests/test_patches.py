"""Covered patches: as many as asked, in rectangles, by the generator alone. Codes: k-means, step by step."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from minivlp.data import DataError, PatchCodes, hide_blocks

torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- covering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.4, 0.75, 0.9])
@pytest.mark.parametrize("grid", [4, 8, 14])
def test_every_picture_has_as_many_covered_patches_as_asked(grid, share):
    covered = hide_blocks(40, grid, generator=generator(), share=share)
    assert covered.shape == (40, grid * grid) and covered.dtype == torch.bool
    assert covered.sum(1).tolist() == [round(share * grid * grid)] * 40
    assert len({tuple(row.tolist()) for row in covered}) > 20  # each picture its own


def test_beits_own_numbers():
    """75 of 196 patches, rectangles of 16 or more (BEiT, 2.3)."""
    covered = hide_blocks(10, 14, generator=generator(), share=75 / 196, smallest=16)
    assert covered.sum(1).tolist() == [75] * 10


def sides(covered: Tensor) -> tuple[int, int] | None:
    """Height and width of one rectangle (grid, grid), None if it is none."""
    rows, columns = covered.any(1).nonzero()[:, 0], covered.any(0).nonzero()[:, 0]
    high, wide = (int(x.max() - x.min()) + 1 for x in (rows, columns))
    return (high, wide) if high * wide == int(covered.sum()) else None


def test_patches_are_covered_in_rectangles():
    """With `smallest` as large as what is asked for there is one rectangle, if it has that many patches exactly."""
    covered = hide_blocks(400, 8, generator=generator(), share=12 / 64, smallest=12).view(400, 8, 8)
    shapes = [shape for shape in map(sides, covered) if shape]
    assert len(shapes) > 150  # the others needed a rest
    assert {(2, 6), (3, 4), (4, 3), (6, 2)} >= set(shapes) and len(set(shapes)) >= 2
    assert {(a, b) for a, b in shapes} == {(b, a) for a, b in shapes}  # as often wide as high, so that both come
    wide = sum(b > a for a, b in shapes) / len(shapes)
    assert 0.35 < wide < 0.65


@pytest.mark.parametrize("aspect", [0.3, 1.0])
def test_the_sides_have_a_ratio_within_the_bounds(aspect):
    """By hand from the same four numbers: size, ratio, top, left. Rounding to whole patches is all that is added."""
    covered = hide_blocks(200, 14, generator=generator(), share=16 / 196, smallest=16, aspect=aspect)
    draws, rectangles = generator(), 0
    for picture in covered.view(200, 14, 14):
        missing, own = 16, torch.zeros(14, 14, dtype=torch.bool)
        while missing > 0:
            size, ratio, top, left = torch.rand(4, generator=draws).tolist()
            area = 16 if missing == 16 else min(16, missing) + size * max(0, missing - 16)
            ratio = aspect ** (1 - 2 * ratio)
            high, wide = max(1, round((area * ratio) ** 0.5)), max(1, round((area / ratio) ** 0.5))
            high, wide = min(14, high), min(14, wide)
            y, x = int(top * (15 - high)), int(left * (15 - wide))
            for place in [(r, c) for r in range(y, y + high) for c in range(x, x + wide)]:
                if missing and not own[place]:
                    own[place], missing = True, missing - 1
            rectangles += 1
            if area == 16:
                assert aspect * 0.5 < high / wide < 2 / aspect
                assert aspect < 1 or high == wide == 4
        assert torch.equal(picture, own)
    assert rectangles >= 200


def neighbours_alike(covered: Tensor, grid: int) -> float:
    """Of the neighbours of covered patches, the share that is covered too."""
    covered = covered.view(-1, grid, grid)
    both = (covered[:, 1:] & covered[:, :-1]).sum() + (covered[:, :, 1:] & covered[:, :, :-1]).sum()
    either = (covered[:, 1:] | covered[:, :-1]).sum() + (covered[:, :, 1:] | covered[:, :, :-1]).sum()
    return (both / either).item()


@pytest.mark.parametrize(("grid", "smallest"), [(8, 2), (8, 8), (14, 16)])
def test_neighbours_are_covered_together(grid, smallest):
    covered = hide_blocks(300, grid, generator=generator(), smallest=smallest)
    n = int(covered[0].sum())
    at_random = torch.rand(300, grid * grid, generator=generator()).argsort(dim=1) < n
    together, by_chance = neighbours_alike(covered, grid), neighbours_alike(at_random, grid)
    assert by_chance == pytest.approx(0.25, abs=0.02)  # 0.4 * 0.4 / (1 - 0.6 * 0.6)
    assert together > by_chance + 0.15
    # Every patch can be covered, but the corners, which few rectangles reach, less often than the middle.
    often = covered.float().mean(0).view(grid, grid)
    middle = often[grid // 4 : -(grid // 4), grid // 4 : -(grid // 4)]
    assert often.min() > 0.02 and often.max() < 0.8 and often[[0, 0, -1, -1], [0, -1, 0, -1]].max() < middle.min()


def test_the_generator_alone_decides():
    torch.manual_seed(1)
    first = hide_blocks(5, 8, generator=generator(3))
    state = torch.get_rng_state()
    assert torch.equal(first, hide_blocks(5, 8, generator=generator(3)))
    assert torch.equal(torch.get_rng_state(), state)  # nor is the global one touched
    assert not torch.equal(first, hide_blocks(5, 8, generator=generator(4)))
    going_on = generator(3)
    hide_blocks(5, 8, generator=going_on)
    assert not torch.equal(first, hide_blocks(5, 8, generator=going_on))
    assert torch.equal(first[:2], hide_blocks(2, 8, generator=generator(3)))


@pytest.mark.parametrize(("share", "n"), [(0.0, 0), (0.03, 0), (1.0, 16), (0.98, 16), (1.5, 24), (-0.5, -8)])
def test_a_share_must_leave_something_of_both(share, n):
    with pytest.raises(
        DataError, match=rf"^share={share} covers {n} of 16 patches: choose one that leaves some of both$"
    ):
        hide_blocks(2, 4, generator=generator(), share=share)


@pytest.mark.parametrize("n", [1, 15])
def test_one_patch_and_all_but_one(n):
    covered = hide_blocks(50, 4, generator=generator(), share=n / 16)
    assert covered.sum(1).tolist() == [n] * 50
    assert len({tuple(row.tolist()) for row in covered}) > 8


# --- codes -----------------------------------------------------------------------------------------------------------


def clouds(apart: float = 5.0, count: int = 50) -> tuple[Tensor, Tensor]:
    """Points around 6 places, (6 * count, 4), and the number of each one's place."""
    places = apart * torch.randn(6, 4, generator=generator(5))
    own = torch.arange(6).repeat_interleave(count)
    return places[own] + 0.1 * torch.randn(len(own), 4, generator=generator(6)), own


def cost(patches: Tensor, sorter: PatchCodes) -> float:
    """The mean squared distance from the nearest centre."""
    return ((patches[:, None] - sorter.centres) ** 2).sum(-1).amin(1).mean().item()


def test_a_code_is_the_nearest_centre():
    centres = torch.randn(7, 5, generator=generator())
    patches = torch.randn(3, 11, 5, generator=generator(1))
    got = PatchCodes(centres)(patches)
    assert got.shape == (3, 11) and got.dtype == torch.long
    for b in range(3):
        for n in range(11):
            distances = [sum((float(patches[b, n, i]) - float(c[i])) ** 2 for i in range(5)) for c in centres]
            assert got[b, n] == distances.index(min(distances))
    # By length alone, or by product alone, it would be others.
    assert (got != (patches @ centres.T).argmax(-1)).any() and (got != (2 * patches @ centres.T).argmin(-1)).any()
    assert torch.equal(PatchCodes(centres)(centres), torch.arange(7))


def test_a_round_never_raises_the_distance():
    patches = torch.rand(400, 6, generator=generator())
    costs = [cost(patches, PatchCodes.fit(patches, codes=12, rounds=rounds)) for rounds in range(12)]
    assert all(after <= before + 1e-6 for before, after in pairwise(costs))
    assert costs[-1] < 0.8 * costs[0] and costs[1] < 0.95 * costs[0]


def test_it_starts_from_patches_and_moves_to_their_means():
    patches = torch.rand(60, 3, generator=generator())
    start = PatchCodes.fit(patches, codes=5, rounds=0).centres
    places = (patches[:, None] == start).all(-1)  # (60, 5)
    assert places.sum(0).tolist() == [1] * 5  # five patches, no two alike
    own = torch.cdist(patches, start).argmin(1)
    means = torch.stack([patches[own == k].mean(0) for k in range(5)])
    torch.testing.assert_close(PatchCodes.fit(patches, codes=5, rounds=1).centres, means)
    # Until nothing moves any more, each centre is the mean of its own.
    sorter = PatchCodes.fit(patches, codes=5, rounds=60)
    own = sorter(patches)
    torch.testing.assert_close(sorter.centres, torch.stack([patches[own == k].mean(0) for k in range(5)]))


def test_clouds_are_told_apart():
    patches, own = clouds()
    best = min(cost(patches, PatchCodes.fit(patches, codes=6, seed=seed)) for seed in range(10))
    assert best < 2 * 4 * 0.01  # four numbers of variance 0.01 each
    codes = next(c for seed in range(10) if cost(patches, c := PatchCodes.fit(patches, codes=6, seed=seed)) == best)
    found = codes(patches)
    assert len({(int(a), int(b)) for a, b in zip(own, found, strict=True)}) == 6 == len(found.unique())


def test_a_centre_without_patches_stays_where_it_is():
    """Twelve patches of two kinds for three centres: two start alike, and the second of them never is the nearest."""
    patches = torch.tensor([[1.0, 2.0], [4.0, 4.0]]).repeat(6, 1)  # neither is zero
    for seed in range(5):
        sorter = PatchCodes.fit(patches, codes=3, seed=seed)
        assert sorter.centres.isfinite().all()
        assert {tuple(c) for c in sorter.centres.tolist()} == {(1.0, 2.0), (4.0, 4.0)}
        assert len(sorter(patches).unique()) == 2


def test_the_seed_alone_decides():
    patches = torch.rand(100, 4, generator=generator())
    torch.manual_seed(0)
    first, again = (PatchCodes.fit(patches, codes=8, seed=2).centres for _ in range(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(first, again) and torch.equal(first, PatchCodes.fit(patches, codes=8, seed=2).centres)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, PatchCodes.fit(patches, codes=8, seed=3).centres)


def test_the_patches_are_not_touched():
    patches = torch.rand(30, 4, generator=generator())
    before = patches.clone()
    sorter = PatchCodes.fit(patches, codes=4)
    sorter.centres += 1
    assert torch.equal(patches, before)
    start = PatchCodes.fit(patches, codes=4, rounds=0)
    start.centres += 1
    assert torch.equal(patches, before)


def test_too_few_patches():
    with pytest.raises(DataError, match=r"^7 patches cannot be sorted into 8 kinds: give more, or fewer codes$"):
        PatchCodes.fit(torch.rand(7, 3), codes=8)
    assert PatchCodes.fit(torch.rand(8, 3), codes=8).centres.shape == (8, 3)  # just enough
