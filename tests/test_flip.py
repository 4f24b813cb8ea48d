"""FLIP: which tokens stay, that removal is exact and saves work, how both towers read, and the usual wrong versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tower_helpers import ENDS, B, L, close, pictures, shake, texts

from minivlp.data.text import DEFAULT_VOCAB_SIZE, Tokenizer
from minivlp.evaluate import recall_at
from minivlp.layers import QuickGELU, count_parameters, patchify
from minivlp.losses import contrastive_loss
from minivlp.models.clip import CLIP, CLIPConfig, CLIPText, causal_mask, clamp_logit_scale
from minivlp.models.flip import (
    FLIP,
    PAPER_SIZES,
    FLIPConfig,
    FLIPText,
    FLIPVision,
    paper_config,
    random_masking,
    sincos_positions,
    text_masking,
)
from minivlp.train import fit, parameter_groups

torch.set_num_threads(1)

# No two sizes alike, so that none can stand in for another.
SMALL = FLIPConfig(
    image_size=16, patch_size=4, image_width=24, image_depth=2, image_heads=2, vocab_size=30, max_text=9,
    text_width=16, text_depth=3, text_heads=4, embed_dim=20,
)  # fmt: skip
N, K = 16, 6
LENGTHS = ENDS + 1
POOLS, POSITIONS = ("mean", "patches", "cls"), ("sincos", "learned")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shaken(config: FLIPConfig = SMALL, std: float = 0.2) -> FLIP:
    return shake(FLIP(config), std)


def masking(ratio: float = 1 - K / N) -> tuple[Tensor, Tensor]:
    """Places that stay, another choice for each picture (B, K), and True at all others (B, N)."""
    return random_masking(torch.rand(B, N), ratio)[:2]


def gather(x: Tensor, keep: Tensor) -> Tensor:
    """Of each row of x (B, N, ...) its own places."""
    return torch.stack([row[places] for row, places in zip(x, keep, strict=True)])


def other_word(ids: Tensor, place: int) -> Tensor:
    """The texts with another word at one place."""
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
    return changed


# --- sizes and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "image", "text", "total"),
    [("B/16", (86, 85_797_888), (53, 53_473_280), 141), ("L/16", (303, 303_300_608), (109, 108_521_472), 414),
     ("H/14", (631, 630_763_520), (334, 333_598_720), 967)],
)  # fmt: skip
def test_published_sizes(name, image, text, total):
    """Millions of parameters of the towers (paper, Table 5); the picture's fixed positions are counted there. The
    published totals are up to 1.1M larger than the towers and one matrix each."""
    with torch.device("meta"):
        model = FLIP(paper_config(name))
    counts = count_parameters(model.vision) + model.vision.pos_embed.numel(), count_parameters(model.text)
    assert counts == (image[1], text[1]) and [round(count / 1e6) for count in counts] == [image[0], text[0]]
    c = model.config
    heads = c.embed_dim * (c.image_width + c.text_width)
    assert count_parameters(model) + model.vision.pos_embed.numel() == sum(counts) + heads + 1  # the temperature
    assert 0 <= total - (sum(counts) + heads) / 1e6 < 1.2
    assert model.vision.pos_embed.shape == (c.grid**2, c.image_width) and c.grid**2 == {"16": 196, "14": 256}[name[2:]]
    assert (c.max_text, c.vocab_size, c.gelu, c.eps) == (32, 30_522, "tanh", 1e-6)
    assert (c.position, c.pool, c.projection) == ("sincos", "mean", "linear") and c.text_width // c.text_heads == 64


@pytest.mark.parametrize("name", ["B/32", "L/14", "H/16", "B", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match=f"no FLIP is called '{name}': choose one of B/16, L/16, H/14"):
        paper_config(name)
    assert set(PAPER_SIZES) == {"B/16", "L/16", "H/14"}


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        (dict(gelu="quick"), "'exact', 'tanh'"),
        (dict(position="2d"), "'sincos', 'learned'"),
        (dict(pool="max"), "'mean', 'patches', 'cls'"),
        (dict(image_tower="resnet"), "'vit'"),
        (dict(projection="none"), "'linear', 'mlp'"),
    ],
)
def test_configs_that_cannot_be(option, choices):
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"^{name}='{value}': choose one of {choices}$"):
        replace(SMALL, **option)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="image_size 18 is not a multiple of patch_size 4"):
        replace(SMALL, image_size=18)
    with pytest.raises(ValueError, match=r"position='sincos' needs an image_width that is a multiple of 4, not 26"):
        replace(SMALL, image_width=26)
    assert FLIP(replace(SMALL, image_width=26, position="learned")).vision.pos_embed.shape == (N, 26)
    with pytest.raises(ValueError, match="width 24 is not a multiple of 5 heads"):
        FLIP(replace(SMALL, image_heads=5))


def test_the_default_is_clips_but_for_what_is_said():
    ours, theirs = FLIPConfig(), CLIPConfig()
    changed = {name for name in vars(theirs) if getattr(ours, name) != getattr(theirs, name)}
    assert changed == {"patch_size", "text_width", "text_depth", "text_heads"}
    assert set(vars(ours)) - set(vars(theirs)) == {"pad_id", "position", "pool"}
    tokenizer = Tokenizer.default()
    assert ours.pad_id == tokenizer.pad_id and ours.vocab_size == tokenizer.vocab_size == DEFAULT_VOCAB_SIZE
    assert ours.grid**2 == 64


# --- which patches stay ----------------------------------------------------------------------------------------------


def test_random_masking_by_hand():
    """The first row in order of its noise: places 1, 3, 0, 2. Two stay."""
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]])
    keep, removed, restore = random_masking(noise, 0.5)
    assert keep.tolist() == [[1, 3], [0, 2]]
    assert removed.tolist() == [[True, False, True, False], [False, True, False, True]]
    assert restore.tolist() == [[2, 0, 3, 1], [0, 3, 1, 2]]  # place 0 stands third among the sorted, place 1 first...
    assert keep.dtype == restore.dtype == torch.long and removed.dtype == torch.bool
    # The most noise instead of the least, ranks instead of places, the sorted places as the way back.
    ranks = noise.argsort(dim=1).argsort(dim=1)
    for wrong in (noise.argsort(dim=1, descending=True)[:, :2], ranks[:, :2]):
        assert wrong.tolist() != keep.tolist()
    assert noise.argsort(dim=1).tolist() != restore.tolist()
    close(noise, torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]]), 0)  # untouched


def test_k_is_the_floor_at_awkward_ratios():
    """Whole percents of N in whole numbers, and thirds; computed with floats alone some would lose a token."""
    cases = [(tokens, percent / 100, tokens * (100 - percent) // 100)
             for tokens in (7, 10, 50, 64, 100, 196) for percent in range(100)]  # fmt: skip
    cases += [(9, 1 / 3, 6), (9, 2 / 3, 3), (49, 1 / 7, 42), (196, 0.5, 98), (196, 0.75, 49), (10, 0.0, 10)]
    cases = [case for case in cases if case[2]]
    assert {(10, 0.9, 1), (100, 0.29, 71), (7, 0.5, 3)} < set(cases)
    for tokens, ratio, expected in cases:
        keep, removed, _ = random_masking(torch.rand(1, tokens), ratio)
        assert keep.shape == (1, expected) and (~removed).sum() == expected, (tokens, ratio)
    wrong: dict[str, Callable[[int, float], int]] = {
        "floats alone": lambda n, r: int(n * (1 - r)),
        "rounded": lambda n, r: round(n * (1 - r)),
        "rounded up": lambda n, r: n - int(n * r),
        "what is removed": lambda n, r: int(n * r),
    }
    for name, formula in wrong.items():
        assert any(formula(tokens, ratio) != expected for tokens, ratio, expected in cases), name


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_kept_and_removed_are_complements_and_restore_brings_them_back(ratio):
    noise = torch.rand(5, 20)
    keep, removed, restore = random_masking(noise, ratio)
    assert keep.shape == (5, round(20 * (1 - ratio))) and removed.shape == restore.shape == (5, 20)
    x = torch.randn(5, 20, 3)
    order = noise.argsort(dim=1)
    for b in range(5):
        gone = removed[b].nonzero()[:, 0]
        assert sorted([*keep[b].tolist(), *gone.tolist()]) == list(range(20))
        assert len(keep[b].unique()) == keep.shape[1]
        if len(gone):
            assert noise[b, keep[b]].max() < noise[b, gone].min()
        assert torch.equal(keep[b], order[b, : keep.shape[1]])
    # MAE's way back: the kept, then anything for the removed; the kept stand at their own places again.
    padded = torch.cat([gather(x, keep), torch.full((5, 20 - keep.shape[1], 3), -9.0)], dim=1)
    back = gather(padded, restore)
    assert torch.equal(back[~removed], x[~removed]) and (back[removed] == -9).all()
    assert torch.equal(gather(gather(x, order), restore), x)
    assert not torch.equal(gather(gather(x, order), order), x)  # the order itself is not the way back


def test_each_row_is_sorted_on_its_own():
    noise = torch.rand(6, N)
    keep, removed, restore = random_masking(noise, 0.5)
    for b in range(6):  # the company does not matter
        for together, alone in zip((keep, removed, restore), random_masking(noise[b : b + 1], 0.5), strict=True):
            assert torch.equal(together[b : b + 1], alone)
    other = noise.clone()
    other[2] = torch.rand(N)
    changed = (random_masking(other, 0.5)[1] != removed).any(dim=1)
    assert changed.tolist() == [False, False, True, False, False, False]
    assert len({tuple(sorted(row.tolist())) for row in keep}) == 6
    shared = random_masking(noise[:1].expand_as(noise), 0.5)[0]  # one choice for the whole batch: the wrong version
    assert len({tuple(sorted(row.tolist())) for row in shared}) == 1


def test_only_the_order_of_the_noise_counts():
    noise = torch.rand(4, N)
    expected = random_masking(noise, 0.4)
    for same_order in (noise.exp() * 7, noise - 3, noise.double(), noise.argsort(dim=1).argsort(dim=1)):
        for a, b in zip(random_masking(same_order, 0.4), expected, strict=True):
            assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_of_another_dtype(dtype):
    """Halves of a float have many equal numbers; even so no place may come twice."""
    noise = torch.rand(4, 200).to(dtype)
    keep, removed, restore = random_masking(noise, 0.75)
    assert keep.dtype == restore.dtype == torch.long and keep.shape == (4, 50)
    assert all(len(row.unique()) == 50 for row in keep) and (removed.sum(dim=1) == 150).all()
    eighths = torch.tensor([[0.5, 0.125, 0.875, 0.25, 0.75, 0.375]])  # exact in all of them
    words = torch.tensor([[True, True, True, True, False, False]])
    for prioritised in (True, False):
        expected = text_masking(eighths, words, 0.5, prioritised=prioritised)
        assert torch.equal(text_masking(eighths.to(dtype), words, 0.5, prioritised=prioritised), expected)


def test_each_place_and_each_pair_stays_equally_often():
    """4 of 10 in 4000 draws: a place with probability 0.4, a pair of places with 4 * 3 / (10 * 9)."""

    def uneven(removed: Tensor) -> tuple[float, float]:
        """How far places and pairs are from it, in deviations; the largest."""
        kept = (~removed).float()
        together = kept.T @ kept / len(kept)  # (10, 10), shares; of single places on the diagonal
        places, pairs = together.diag(), together[~torch.eye(10, dtype=torch.bool)]
        return tuple(
            ((share - p).abs().max() / math.sqrt(p * (1 - p) / len(kept))).item()
            for share, p in ((places, 0.4), (pairs, 12 / 90))
        )

    draws = 4000
    for noise in (torch.rand(draws, 10), torch.randn(draws, 10)):
        assert max(uneven(random_masking(noise, 0.6)[1])) < 4.5
    first = random_masking(torch.arange(10.0).expand(draws, 10), 0.6)[1]  # the first ones, no chance in it
    shared = random_masking(torch.rand(1, 10).expand(draws, 10), 0.6)[1]
    assert uneven(first)[0] > 20 and uneven(shared)[0] > 20
    start = torch.randint(10, (draws, 1))  # four neighbours: each place equally often, but not each pair
    window = (torch.arange(10) - start) % 10 >= 4
    assert uneven(window)[0] < 4.5 < 20 < uneven(window)[1]


@pytest.mark.parametrize("ratio", [1.0, 0.95, 0.999, 1.5, 50, -0.1, -1])
def test_ratios_that_leave_nothing_or_are_none(ratio):
    with pytest.raises(ValueError, match=r"^removing .*% of 16 tokens .*: choose [^.]*$"):
        random_masking(torch.rand(2, N), ratio)
    with pytest.raises(ValueError, match=r"^removing .*% of 16 tokens .*: choose [^.]*$"):
        text_masking(torch.rand(2, N), torch.ones(2, N, dtype=torch.bool), ratio)


def test_the_last_ratio_that_leaves_something():
    assert random_masking(torch.rand(2, N), 0.9375)[0].shape == (2, 1)
    with pytest.raises(ValueError, match="removing 94% of 16 tokens cannot be done: choose a ratio"):
        random_masking(torch.rand(2, N), 0.94)


# --- which words stay ------------------------------------------------------------------------------------------------


def test_text_masking_by_hand():
    """Texts of 4 and of 2 tokens, three of six places stay. The first text has words to remove, the second has room
    for one place of padding, that with the least noise."""
    noise = torch.tensor([[0.9, 0.2, 0.7, 0.4, 0.1, 0.3], [0.5, 0.9, 0.3, 0.8, 0.2, 0.4]])
    words = torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    kept = noise.clone(), words.clone()
    keep = text_masking(noise, words, 0.5)
    assert keep.tolist() == [[0, 1, 3], [0, 1, 4]]
    by_chance = text_masking(noise, words, 0.5, prioritised=False)
    assert by_chance.tolist() == [[0, 4, 1], [0, 4, 2]]
    assert torch.equal(noise, kept[0]) and torch.equal(words, kept[1])  # both untouched
    wrong = {
        "the first token may go": random_masking(noise + ~words, 0.5)[0],
        "words go first": text_masking(noise, ~words, 0.5),
        "the first tokens stay": torch.arange(3).expand(2, 3),
    }
    assert all(other.tolist() != keep.tolist() for other in wrong.values())


@pytest.mark.parametrize("prioritised", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.9])
def test_the_first_token_always_stays_and_stays_first(prioritised, ratio):
    noise = torch.rand(500, 12)
    noise[:, 0] = 0.9999  # it would be removed nearly always
    noise[::7, 5] = 0.0  # and no other comes before it
    words = torch.arange(12) < torch.randint(1, 13, (500, 1))
    keep = text_masking(noise, words, ratio, prioritised=prioritised)
    assert keep.shape == (500, int(12 * (1 - ratio) + 1e-6)) and (keep[:, 0] == 0).all()
    assert all(len(row.unique()) == len(row) for row in keep)
    assert (random_masking(noise, ratio)[0][:, 0] != 0).any()  # removed like the others it would not


def test_padding_goes_first_when_prioritised():
    noise, lengths = torch.rand(2000, 12), torch.randint(1, 13, (2000,))
    noise[::5, 1], noise[::3, 11] = 1 - 2**-24, 0.0  # the largest number of torch.rand and the smallest
    words = torch.arange(12) < lengths[:, None]
    full = lengths.clamp(max=6)  # a text shorter than what stays is kept whole, with padding behind it
    for prioritised in (True, False):
        keep = text_masking(noise, words, 0.5, prioritised=prioritised)
        kept = gather(words, keep)
        if prioritised:
            assert torch.equal(kept.sum(dim=1), full)
            assert torch.equal(kept, torch.arange(6) < full[:, None])  # and words before padding
        else:  # without priority padding takes the places of words
            assert (kept.sum(dim=1) < full).float().mean() > 0.3


def test_each_word_behind_the_first_stays_equally_often():
    """12 places, 9 words, 6 stay: the first token, and 5 of 8 words, or 5 of all 11 other places."""
    words = (torch.arange(12) < 9).expand(4000, 12)
    for prioritised, share in ((True, 5 / 8), (False, 5 / 11)):
        keep = text_masking(torch.rand(4000, 12), words, 0.5, prioritised=prioritised)
        often = torch.zeros(4000, 12).scatter(1, keep, 1.0).mean(dim=0)
        candidates = often[1:9] if prioritised else often[1:]
        assert ((candidates - share).abs() < 4.5 * math.sqrt(share * (1 - share) / 4000)).all()
        assert often[0] == 1 and (not prioritised or not often[9:].any())


# --- positions -------------------------------------------------------------------------------------------------------


def test_sincos_positions_by_hand():
    """Width 8: waves with 1 and 0.01 radians a patch. sin 1 = 0.84147, cos 1 = 0.54030."""
    got = sincos_positions(2, 8)
    start, next_one = [0.0, 0.0, 1.0, 1.0], [0.841471, 0.00999983, 0.540302, 0.99995]
    expected = torch.tensor([start + start, next_one + start, start + next_one, next_one + next_one])
    assert got.shape == (4, 8) and got.dtype == torch.float32
    close(got, expected, 1e-6)
    rows_first = expected[[0, 2, 1, 3]]
    interleaved = expected.unflatten(1, (2, 2, 2)).transpose(2, 3).flatten(1)  # sine, cosine, sine, cosine
    for wrong in (rows_first, interleaved):
        assert (got - wrong).abs().max() > 0.1


def test_sincos_positions_equal_the_formula():
    grid, width = 6, 24
    got = sincos_positions(grid, width)
    for row, column in ((0, 0), (0, 5), (3, 1), (5, 5)):
        expected = []
        for place in (column, row):
            angles = [place / 10_000 ** (k / 6) for k in range(6)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        close(got[grid * row + column], torch.tensor(expected), 1e-6)


def test_the_first_half_is_the_column_and_the_second_the_row():
    table = sincos_positions(5, 24).view(5, 5, 24)  # row, column
    column, row = table[..., :12], table[..., 12:]
    assert torch.equal(column, column[:1].expand_as(column)) and torch.equal(row, row[:, :1].expand_as(row))
    assert torch.pdist(column[0]).min() > 0.1 and torch.pdist(row[:, 0]).min() > 0.1
    assert torch.pdist(table.flatten(0, 1)).min() > 0.1  # no two places alike
    close(table.square().sum(-1), torch.full((5, 5), 12.0))  # a sine and its cosine each


def test_distances_depend_on_the_offset_alone():
    grid = 5
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid))  # row, column
    offsets = (places[:, None] - places).abs()  # (N, N, 2); a wave looks alike to either side

    def spread(table: Tensor) -> float:
        """The largest difference of two distances at the same offset."""
        distance = torch.cdist(table, table, compute_mode="donot_use_mm_for_euclid_dist")
        groups = [distance[(offsets == torch.tensor([dy, dx])).all(-1)] for dy in range(grid) for dx in range(grid)]
        return max((group.max() - group.min()).item() for group in groups)

    table = sincos_positions(grid, 24)
    assert spread(table) < 1e-5
    numbered = places.float() @ torch.randn(2, 24)  # plain coordinates: (1, 1) and (1, -1) are not equally far
    for wrong in (torch.randn(grid**2, 24), table.sin(), table[:, torch.arange(24) % 12 < 6], numbered):
        assert spread(wrong) > 0.1
    far = torch.cdist(table[:1], table)[0]
    assert far[1] < far[2] < far[3] and far[1:].min() == far[1]  # and neighbours are the nearest


def test_fixed_positions_are_not_trained():
    model, learned = FLIP(SMALL), FLIP(replace(SMALL, position="learned"))
    fixed = sincos_positions(4, 24)
    assert torch.equal(model.vision.pos_embed, fixed) and not model.vision.pos_embed.requires_grad
    assert "vision.pos_embed" in dict(model.named_buffers()) and "vision.pos_embed" in model.state_dict()
    assert "vision.pos_embed" not in dict(model.named_parameters())
    assert all(p.data_ptr() != model.vision.pos_embed.data_ptr() for p in model.parameters())
    assert count_parameters(learned) - count_parameters(model) == N * 24
    before = learned.vision.pos_embed.detach().clone()
    images, ids, (keep, _) = pictures(), texts(), masking()
    for one in (model, learned):
        fit(one, lambda step: (images, ids), lambda m, images, ids: contrastive_loss(m(images, ids, keep=keep)[0]),
            steps=3, lr=1e-2, weight_decay=0.5, progress=None)  # fmt: skip
    assert torch.equal(model.vision.pos_embed, fixed)
    assert (learned.vision.pos_embed - before).abs().max() > 1e-3
    assert any(p is learned.vision.pos_embed for group in parameter_groups(learned, 0.2) for p in group["params"])
    assert model.double().vision.pos_embed.dtype == torch.float64  # it follows the model


# --- the image tower -------------------------------------------------------------------------------------------------


def embedded_by_hand(tower: FLIPVision, images: Tensor, keep: Tensor | None = None) -> Tensor:
    """The textbook's order: embed all patches, add all positions, take what is kept, put the class token in front."""
    x = patchify(images, 4) @ tower.patch_embed.proj.weight.T + tower.patch_embed.proj.bias + tower.pos_embed
    x = x if keep is None else gather(x, keep)
    return torch.cat([tower.cls_token.expand(len(images), -1, -1), x], dim=1)


def states_by_hand(tower: FLIPVision | FLIPText, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Final states (B, T, D), the blocks spelled out."""
    for block in tower.encoder.blocks:
        x = x + block.attn(block.norm1(x), mask=mask)[0]
        x = x + block.mlp(block.norm2(x))
    return tower.encoder.norm(x)


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_a_kept_patch_has_the_position_of_its_own_place(position):
    tower, images, (keep, removed) = shaken(replace(SMALL, position=position)).vision, pictures(), masking()
    close(tower.embed(images), embedded_by_hand(tower, images))
    got = tower.embed(images, keep)
    close(got, embedded_by_hand(tower, images, keep))
    patches = gather(tower.patch_embed(images), keep)
    positions = tower.pos_embed
    gone = removed.nonzero()[:, 1].view(B, -1)[:, :K]
    wrong = {
        "numbered after dropping": patches + positions[:K],
        "one choice for the whole batch": tower.embed(images, keep[:1].expand_as(keep))[:, 1:],
        "those that were to go": gather(tower.patch_embed(images) + positions, gone),
        "in the order of the picture": tower.embed(images, keep.sort(dim=1).values)[:, 1:],
        "no positions": patches,
        "shifted by the class token": patches + positions.roll(1, 0)[keep],
    }
    for name, other in wrong.items():
        assert (got[:, 1:] - other).abs().max() > 0.1, name


@torch.no_grad()
def test_the_class_token_always_stays_and_has_no_position():
    tower, images = shaken().vision, pictures()
    keeps = (None, torch.arange(1).expand(B, 1), torch.full((B, 1), N - 1), *(masking(r)[0] for r in (0.0, 0.5, 0.9)))
    for keep in keeps:
        x = tower.embed(images, keep)
        assert x.shape == (B, 1 + (N if keep is None else keep.shape[1]), 24)
        assert torch.equal(x[:, 0], tower.cls_token[0].expand(B, -1))
        assert (x[:, 0] - tower.cls_token[0] - tower.pos_embed[0]).abs().max() > 0.1  # as it would be with one
    before = tower(images, keeps[-1])[0]
    tower.cls_token[..., 0] += 1
    assert (tower(images, keeps[-1])[0] - before).abs().amax(-1).min() > 1e-3  # and the others see it


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_image_tower_by_hand(masked):
    images, keep = pictures(), masking()[0] if masked else None
    for pool in POOLS:
        tower = shaken(replace(SMALL, pool=pool, eps=1e-5)).vision
        x = embedded_by_hand(tower, images, keep)
        final = states_by_hand(tower, x)
        blocks = tower(images, keep, everything=True)[1]["block_1"]
        norm = tower.encoder.norm
        features = {"mean": final.mean(1), "patches": final[:, 1:].mean(1), "cls": final[:, 0]}
        expected = features.pop(pool)
        wrong = features | {
            "a LayerNorm before the blocks": states_by_hand(tower, F.layer_norm(x, (24,))).mean(1),
            "the LayerNorm after the mean": norm(blocks.mean(1)),
            "no last LayerNorm": blocks.mean(1),
            "a patch": final[:, 1],
            "the mean over all places": final.sum(1) / (1 + 2 * N),
        }
        for everything in (False, True):
            feature = tower(images, keep, everything=everything)[0]
            close(feature, expected)
            for name, other in wrong.items():
                assert (feature - other).abs().max() > 0.03, (pool, name)


@torch.no_grad()
def test_no_layer_norm_stands_before_the_blocks():
    tower, images, (keep, _) = shaken().vision, pictures(), masking()
    entered = []
    tower.encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    before = tower(images, keep)[0]
    assert torch.equal(entered[0], tower.embed(images, keep))
    norms = {name for name, module in tower.named_modules() if isinstance(module, nn.LayerNorm)}
    assert norms == {"encoder.norm"} | {f"encoder.blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)}
    # So the blocks see how large the tokens are; CLIP's would not.
    for tensor in (tower.patch_embed.proj.weight, tower.patch_embed.proj.bias, tower.cls_token, tower.pos_embed):
        tensor.mul_(10)
    assert (tower(images, keep)[0] - before).abs().max() > 0.05


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_everything_by_name_is_the_same_vector(pool):
    tower, images, (keep, _) = shaken(replace(SMALL, pool=pool)).vision, pictures(), masking()
    for places, kept in ((None, N), (keep, K)):
        T = 1 + kept
        fast, tokens = tower(images, places)
        state, named = tower(images, places, everything=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        blocks = {f"block_{i}": (B, T, 24) for i in range(2)} | {f"attention_{i}": (B, 2, T, T) for i in range(2)}
        assert shapes == blocks | {"embedded": (B, T, 24), "tokens": (B, T, 24)}
        assert state.shape == (B, 24) and set(tokens) == {"tokens"}
        close(fast, state)
        close(named["embedded"], tower.embed(images, places))
        close(named["tokens"], tower.encoder.norm(named["block_1"]))
        rows = 1 if pool == "cls" else T  # the class token alone is computed where nothing else is read
        close(tokens["tokens"], named["tokens"][:, :rows])


@pytest.mark.parametrize("shape", [(B, 3, 16, 24), (B, 3, 8, 32), (B, 1, 16, 16), (3, 16, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_pictures_that_do_not_fit(shape, masked):
    """8x32 pixels are as many patches as 16x16, but other places."""
    keep = masking()[0] if masked else None
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\), got .*: resize them or build the model"):
        FLIP(SMALL).encode_image(torch.zeros(shape), keep)


@torch.no_grad()
def test_uint8_pictures_are_read_as_scaled_floats():
    model, (keep, _) = shaken(), masking()
    images = torch.randint(0, 256, (B, 3, 16, 16), dtype=torch.uint8)
    for places in (None, keep):
        close(model.encode_image(images, places), model.encode_image(images / 127.5 - 1, places))
    assert (model.encode_image(images) - model.encode_image(images.float())).abs().max() > 0.01


@torch.no_grad()
def test_without_keep_all_patches_are_seen_in_training_too():
    model, images = shaken(), pictures()
    everywhere = torch.arange(N).expand(B, N)
    for one in (model.eval(), model.train()):  # what is removed is said from outside, never drawn within
        assert torch.equal(one.encode_image(images), one.encode_image(images))
        close(one.encode_image(images), one.encode_image(images, everywhere))
    close(model.train().encode_image(images), model.eval().encode_image(images))
    assert (model.encode_image(images) - model.encode_image(images, masking()[0])).abs().max() > 0.01


# --- removal is exact ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_removal_equals_hiding_the_removed_tokens_from_all_others():
    """The whole picture goes through the blocks, with the scores of removed keys at minus infinity: the same states of
    the kept tokens after one block and after all, though computed from all tokens."""
    tower, images, (keep, removed) = shaken().vision, pictures(), masking()
    seen = torch.cat([torch.ones(B, 1, dtype=torch.bool), ~removed], dim=1)
    rows = torch.cat([torch.zeros(B, 1, dtype=torch.long), 1 + keep], dim=1)  # the kept ones in the whole sequence
    everyone = tower.embed(images)
    final, masked = tower.encoder(everyone, mask=seen[:, None, None, :], everything=True)
    feature, short = tower(images, keep, everything=True)
    for name in ("block_0", "block_1"):
        close(short[name], gather(masked[name], rows))
    close(short["tokens"], gather(final, rows))
    close(feature, gather(final, rows).mean(1))
    close(tower(images, keep)[0], feature)
    one_layer = tower.encoder.blocks[0](everyone, mask=seen[:, None, None, :])[0]
    close(gather(one_layer, rows), short["block_0"])

    whole = tower.encoder(everyone, everything=True)[1]
    pixels = patchify(images, 4).masked_fill(removed[..., None], 0.0)
    zeroed = tower.patch_embed.proj(pixels) + tower.pos_embed
    token = torch.where(removed[..., None], torch.randn(24), tower.patch_embed(images)) + tower.pos_embed
    cls = tower.cls_token.expand(B, -1, -1)
    wrong = {"nothing hidden": whole}
    for name, x in (("zeroed pixels", zeroed), ("a mask token", token)):
        wrong[name] = tower.encoder(torch.cat([cls, x], dim=1), everything=True)[1]
    for name, states in wrong.items():
        for layer in ("block_0", "block_1"):
            assert (short[layer] - gather(states[layer], rows)).abs().max() > 0.05, (name, layer)
    # Hidden from the others but averaged with them, they would still count.
    assert (feature - final.mean(1)).abs().max() > 0.05


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_the_order_of_what_is_kept_does_not_matter(pool):
    tower, images, (keep, _) = shaken(replace(SMALL, pool=pool)).vision, pictures(), masking()
    orders = torch.stack([torch.randperm(K) for _ in range(B)])
    mixed = keep.gather(1, orders)
    (before, named), (after, mixed_named) = tower(images, keep, everything=True), tower(images, mixed, everything=True)
    close(after, before)
    close(mixed_named["tokens"][:, 1:], gather(named["tokens"][:, 1:], orders))
    close(tower(images, torch.stack([torch.randperm(N) for _ in range(B)]))[0], tower(images)[0])
    numbered = []  # with positions numbered after dropping it would matter
    for places in (keep, mixed):
        x = gather(tower.patch_embed(images), places) + tower.pos_embed[:K]
        x = tower.encoder(torch.cat([tower.cls_token.expand(B, -1, -1), x], dim=1))[0]
        numbered.append(x[:, 0] if pool == "cls" else x.mean(1))
    assert (numbered[0] - numbered[1]).abs().max() > 0.01


def test_what_is_in_removed_patches_changes_nothing():
    tower, images, (keep, removed) = shaken().vision, pictures(), masking()
    gone = removed.view(B, 1, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).expand_as(images)
    assert torch.equal(patchify(gone, 4)[..., 0], removed)
    with torch.no_grad():
        before = tower(images, keep)[0]
        for filling in (torch.randn_like(images), torch.full_like(images, math.nan)):
            assert torch.equal(tower(torch.where(gone, filling, images), keep)[0], before)
        noisy = torch.where(gone, torch.randn_like(images), images)
        assert (tower(noisy)[0] - tower(images)[0]).abs().amax(-1).min() > 1e-3  # seen, it would count
        visible = torch.where(gone, images, torch.randn_like(images))
        assert (tower(visible, keep)[0] - before).abs().amax(-1).min() > 1e-3
    images.requires_grad_()
    weights = torch.randn_like(before)
    (tower(images, keep)[0] * weights).sum().backward()
    assert not images.grad[gone].any() and (images.grad[~gone] != 0).all()


@torch.no_grad()
def test_pictures_of_a_batch_do_not_mix():
    tower, images, (keep, _) = shaken().vision, pictures(), masking()
    before = tower(images, keep)[0]
    for b in range(B):
        close(tower(images[b : b + 1], keep[b : b + 1])[0], before[b : b + 1])
    other = keep.clone()
    other[1] = (keep[1] + 1) % N
    changed = (tower(images, other)[0] - before).abs().amax(-1) > 1e-3
    assert changed.tolist() == [False, True, False]


# --- removal saves work ----------------------------------------------------------------------------------------------


def products(function: Callable[[], object]) -> int:
    """Operations of all matrix products: a multiplication and an addition each."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def tower_products(tokens: int, width: int, depth: int) -> int:
    """Of one sequence: 12 D^2 weights a block, each used once for each token, and two T x T x D products."""
    return depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
@torch.no_grad()
def test_removed_patches_cost_nothing(ratio):
    tower, images, (keep, removed) = shaken().vision, pictures(), masking(ratio)
    kept, entered = keep.shape[1], []
    for module in (tower.patch_embed.proj, *tower.encoder.blocks):
        module.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[1]))
    tower(images, keep)
    assert entered == [kept, 1 + kept, 1 + kept]  # dropped before anything is computed from them

    def count(tokens: int) -> int:
        return B * (2 * tokens * 48 * 24 + tower_products(1 + tokens, 24, 2))

    # `everything` spells the attention out, so that its products are counted too.
    assert products(lambda: tower(images, keep, everything=True)) == count(kept)
    seen = torch.cat([torch.ones(B, 1, dtype=torch.bool), ~removed], dim=1)[:, None, None, :]
    zeroed, cls = images * 0, tower.cls_token.expand(B, -1, -1)
    wrong = {
        "zeroed pixels": lambda: tower(zeroed, everything=True),
        "masked attention": lambda: tower.encoder(tower.embed(images), mask=seen, everything=True),
        "all patches embedded, then dropped": lambda: tower.encoder(
            torch.cat([cls, gather(tower.patch_embed(images), keep)], dim=1), everything=True
        ),
    }
    for name, function in wrong.items():
        late = "then dropped" in name
        assert products(function) == (count(kept) + B * 2 * (N - kept) * 48 * 24 if late else count(N)), name
        assert (products(function) > count(kept)) == (ratio > 0), name


def test_a_step_costs_what_the_cost_model_says():
    """Forward and backward, the course's own model: nearly half and a quarter of the image tower's work."""
    model, images, ids = FLIP(FLIPConfig()), pictures(2, 64), torch.randint(4, 30, (2, 12))

    def step(ratio: float) -> int:
        keep = random_masking(torch.rand(2, 64), ratio)[0]
        return products(lambda: contrastive_loss(model(images, ids, keep=keep)[0]).backward())

    text = products(lambda: model.encode_text(ids).sum().backward())
    full = step(0.0) - text
    for ratio, share in ((0.5, 0.5), (0.75, 0.25)):
        assert (step(ratio) - text) / full == pytest.approx(share, abs=0.02)
    assert 0.005 < text / full < 0.1  # what removal cannot save: with CLIP's text tower it would be more
    big = FLIP(replace(FLIPConfig(), text_width=128, text_depth=4, text_heads=4))
    assert products(lambda: big.encode_text(ids).sum().backward()) > 4 * text


@torch.no_grad()
def test_removed_words_cost_nothing():
    tower, ids = shaken().text, texts()
    keep = text_masking(torch.rand(B, L), ids != 0, 0.5)
    assert keep.shape == (B, 3)
    entered = []
    for block in tower.encoder.blocks:
        block.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[1]))
    tower(ids, keep)
    assert entered == [3, 3, 3]
    assert products(lambda: tower(ids, keep, everything=True)) == B * tower_products(3, 16, 3)
    assert products(lambda: tower(ids, everything=True)) == B * tower_products(L, 16, 3)


@torch.no_grad()
def test_only_the_token_that_is_read_is_computed_in_the_last_block():
    model, images, ids = shaken(), pictures(), texts()
    by_class = shaken(replace(SMALL, pool="cls")).vision
    assert products(lambda: model.text(ids)) < products(lambda: model.text(ids, everything=True)) * 0.85
    # Counted without the attention, which one of the two computes in one fused step.
    used = []
    for tower in (by_class, model.vision):
        hook = tower.encoder.blocks[-1].mlp.register_forward_pre_hook(lambda _, x: used.append(x[0].shape[1]))
        tower(images)
        hook.remove()
    assert used == [1, 1 + N]  # a mean needs them all


# --- the text tower --------------------------------------------------------------------------------------------------


def text_by_hand(tower: FLIPText, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """Final states (B, L or K, D): words and positions, then what is kept, then blocks in which nobody sees padding."""
    x, words = tower.word.weight[ids] + tower.position.weight[: ids.shape[1]], ids != 0
    if keep is not None:
        x, words = gather(x, keep), gather(words, keep)
    return states_by_hand(tower, x, words[:, None, None, :])


@torch.no_grad()
def test_the_text_is_read_at_its_first_token_and_the_usual_mistakes_are_told_apart():
    model, ids = shaken(), texts()
    tower, rows, words = model.text, torch.arange(B), (ids != 0)[:, None, None, :]
    states, x = text_by_hand(tower, ids), tower.embed(ids)
    real = (ids != 0)[..., None]
    theirs = CLIPText(SMALL)
    theirs.load_state_dict(tower.state_dict())
    wrong = {
        "at the end": states[rows, ENDS],
        "last position": states[:, -1],
        "mean over the words": (states * real).sum(1) / real.sum(1),
        "causal": states_by_hand(tower, x, causal_mask(L))[:, 0],
        "causal, without padding": states_by_hand(tower, x, causal_mask(L) & words)[:, 0],
        "CLIP's": theirs(ids)[0],
        "no last LayerNorm": tower(ids, everything=True)[1]["block_2"][:, 0],
        "no positions": states_by_hand(tower, tower.word(ids), words)[:, 0],
    }
    padding_seen = states_by_hand(tower, x)[:, 0]  # as in the released code
    for everything in (False, True):
        state = tower(ids, everything=everything)[0]
        close(state, states[:, 0])
        for name, other in wrong.items():
            assert (state - other).abs().max() > 0.05, name
        apart = (state - padding_seen).abs().amax(-1)
        assert apart[0] < 1e-5 and apart[1:].min() > 0.01  # the first text has no padding


@torch.no_grad()
def test_everything_by_name_is_the_same_text():
    model, ids = shaken(), texts()
    keep = text_masking(torch.rand(B, L), ids != 0, 0.5)
    for places, kept in ((None, L), (keep, 3)):
        fast, nothing = model.text(ids, places)
        state, named = model.text(ids, places, everything=True)
        shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        blocks = {f"block_{i}": (B, kept, 16) for i in range(3)} | {
            f"attention_{i}": (B, 4, kept, kept) for i in range(3)
        }
        assert shapes == blocks | {"text": (B, kept, 16)} and nothing == {}
        close(fast, state)
        close(state, named["text"][:, 0])
        close(named["text"], text_by_hand(model.text, ids, places))
        seen = gather(ids != 0, places) if places is not None else ids != 0
        for i in range(3):
            weights = named[f"attention_{i}"].transpose(2, 3).transpose(1, 2)  # (B, key, heads, asker)
            assert not weights[~seen].any() and weights[seen].min() > 0  # padding is not seen, all words are


def test_the_fast_path_has_the_same_gradients():
    for pool in POOLS:
        model, images, ids = shaken(replace(SMALL, pool=pool)), pictures(), texts()
        keeps = masking()[0], text_masking(torch.rand(B, L), ids != 0, 0.5)
        for tower, inputs, keep in ((model.vision, images, keeps[0]), (model.text, ids, keeps[1])):
            weights, gradients = torch.randn_like(tower(inputs, keep)[0]), []
            for everything in (False, True):
                tower.zero_grad()
                (tower(inputs, keep, everything=everything)[0] * weights).sum().backward()
                gradients.append([p.grad.clone() for p in tower.parameters()])
            for fast, full in zip(*gradients, strict=True):
                torch.testing.assert_close(fast, full, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_later_word_changes_the_first_token():
    model, ids = shaken(), texts()
    theirs = CLIPText(SMALL)
    theirs.load_state_dict(model.text.state_dict())
    before, causal = (tower(ids, everything=True)[1] for tower in (model.text, theirs))
    for place in range(1, 3):  # words of all three texts
        changed = other_word(ids, place)
        after = model.text(changed, everything=True)[1]["text"]
        difference = (after - before["text"]).abs().amax(-1)[ids != 0]
        assert (difference > 1e-4).all()  # every word, before it and behind it
        if place == 1:  # in CLIP's tower the first one does not notice
            assert torch.equal(theirs(changed, everything=True)[1]["text"][:, 0], causal["text"][:, 0])


@pytest.mark.parametrize("everything", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(everything):
    model, ids = shaken(), texts()
    run = partial(model.text, everything=everything)
    before = run(ids)[0]
    close(run(F.pad(ids, (0, 2)))[0], before)
    for b, length in enumerate(LENGTHS):  # nor does the company
        close(run(ids[b : b + 1, :length])[0], before[b : b + 1])
    filled = run(ids.masked_fill(ids == 0, 7))[0]
    assert (filled - before).abs().amax(-1)[1:].min() > 1e-3  # words at those places do count
    model.text.word.weight[0] += 1
    close(run(ids)[0], before, 0)
    other = FLIP(replace(SMALL, pad_id=1)).eval()
    other.load_state_dict(model.state_dict())
    assert (other.text(ids)[0] - before).abs().amax(-1)[1:].min() > 1e-3  # with another pad_id 0 is a word
    close(other.text(ids.masked_fill(ids == 0, 1))[0], before)


@torch.no_grad()
def test_kept_words_have_the_positions_of_their_own_places():
    model, ids = shaken(), texts()
    ids[1:] = torch.randint(4, 30, (2, L))  # no padding, so that position is all there is to get wrong
    keep = torch.tensor([[0, 3, 5], [0, 6, 2], [0, 4, 3]])
    tower, state = model.text, model.text(ids, keep)[0]
    close(state, text_by_hand(tower, ids, keep)[:, 0])
    close(tower(ids, keep, everything=True)[0], state)
    close(tower(ids, keep[:, [0, 2, 1]])[0], state)  # in any order behind the first
    wrong = {
        "numbered after dropping": tower(gather(ids, keep))[0],
        "one choice for the whole batch": tower(ids, keep[:1].expand_as(keep))[0],
        "nothing removed": tower(ids)[0],
        "replaced as in BERT": tower(torch.full_like(ids, 4).scatter(1, keep, gather(ids, keep)))[0],
    }
    for name, other in wrong.items():
        assert (state - other).abs().max() > 0.05, name


@torch.no_grad()
def test_removing_words_is_exact():
    model, ids = shaken(), texts()
    keep = text_masking(torch.rand(B, L), ids != 0, 0.5)
    gone = torch.ones(B, L, dtype=torch.bool).scatter(1, keep, False)
    tower, state = model.text, model.text(ids, keep)[0]
    seen = ~gone & (ids != 0)
    hidden = tower.encoder(tower.embed(ids), mask=seen[:, None, None, :])[0]
    close(state, hidden[:, 0])
    assert (state - tower(ids)[0]).abs().amax(-1)[:2].min() > 1e-3  # 7 and 4 tokens lose some
    close(state[2], tower(ids)[0][2])  # all 3 of the third stay
    for filling in (5, 29):  # what stood there does not matter
        close(tower(torch.where(gone & (ids != 0), filling, ids), keep)[0], state, 0)
    assert (tower(torch.where(gone, ids, 5), keep)[0] - state).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_padding_among_the_kept_is_not_read():
    """Where a text is shorter than what stays it is read whole, and the rest of its row is padding."""
    model, ids = shaken(), texts()
    keep = text_masking(torch.rand(B, L), ids != 0, 1 / L)  # 6 of 7 stay; the texts have 7, 4 and 3 tokens
    assert keep.shape == (B, 6) and (gather(ids, keep) == 0).any(dim=1).tolist() == [False, True, True]
    state = model.text(ids, keep)[0]
    close(state[1:], model.text(ids)[0][1:])
    mixed = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 5, 1, 4, 2, 3], [0, 6, 5, 1, 2, 3]])  # padding before words
    close(model.text(ids, mixed)[0][1:], state[1:])
    x = gather(model.text.embed(ids), mixed)
    for mask in (None, (ids != 0)[:, None, None, :6]):  # no mask, and one that was not taken along
        assert (states_by_hand(model.text, x, mask)[:, 0] - state)[1:].abs().amax(-1).min() > 0.01


def test_texts_that_do_not_fit():
    model = FLIP(SMALL)
    assert model.text(torch.full((2, 9), 5))[0].shape == (2, 16)  # no end-of-text is needed
    with pytest.raises(ValueError, match="a text of 10 tokens does not fit 9 positions: cut it with encode_batch"):
        model.encode_text(torch.full((2, 10), 5), torch.zeros(2, 1, dtype=torch.long))


# --- both towers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["linear", "mlp"])
@torch.no_grad()
def test_vectors_and_logits(projection):
    model, images, ids = shaken(replace(SMALL, projection=projection)), pictures(), texts()
    keep, text_keep = masking()[0], text_masking(torch.rand(B, L), ids != 0, 0.5)
    assert isinstance(model, CLIP) and type(model.vision) is FLIPVision and type(model.text) is FLIPText
    model.logit_scale.fill_(1.7)
    for options in ({}, dict(keep=keep), dict(text_keep=text_keep), dict(keep=keep, text_keep=text_keep)):
        logits, named = model(images, ids, **options)
        assert set(named) == {"image", "text"} and logits.shape == (B, B) and logits.dtype == torch.float32
        raw = {"image": model.image_projection(model.vision(images, options.get("keep"))[0]),
               "text": model.text_projection(model.text(ids, options.get("text_keep"))[0])}  # fmt: skip
        for name, vectors in raw.items():
            close(named[name], vectors / vectors.square().sum(-1, keepdim=True).sqrt())
            assert (vectors.norm(dim=-1) - 1).abs().max() > 0.1  # it is not so by itself
        close(named["image"], model.encode_image(images, options.get("keep")))
        close(named["text"], model.encode_text(ids, options.get("text_keep")))
        close(logits, math.exp(1.7) * named["image"] @ named["text"].T)
        close(logits, model.compare(named["image"], named["text"]), 0)
    whole, short = model(images, ids)[0], model(images, ids, keep=keep, text_keep=text_keep)[0]
    assert (whole - short).abs().max() > 0.05
    assert model(images, ids[:2], keep=keep, text_keep=text_keep[:2])[0].shape == (B, 2)


def test_what_is_kept_is_said_by_name():
    """Two tensors of places look alike: the places of patches must not be taken for those of words."""
    with pytest.raises(TypeError, match="positional"):
        FLIP(SMALL)(pictures(), texts(), masking()[0])


@pytest.mark.parametrize("options", [{}, dict(pool="patches", position="learned"), dict(pool="cls", projection="mlp")])
def test_every_parameter_learns(options):
    """None of what CLIP hands down is left over, and the fixed positions are no parameter."""
    model, ids = shaken(replace(SMALL, gelu="tanh", **options), std=0.1), texts()
    keep, text_keep = masking()[0], text_masking(torch.rand(B, L), ids != 0, 1 / L)
    contrastive_loss(model(pictures(), ids, keep=keep, text_keep=text_keep)[0]).backward()
    for name, parameter in model.named_parameters():
        if not name.endswith("attn.kv.bias"):  # its key half cancels in the softmax
            assert parameter.grad.abs().max() > 1e-6, name
    used = torch.zeros(L, dtype=torch.bool)
    used[gather(torch.arange(L).expand(B, L), text_keep)[gather(ids != 0, text_keep)]] = True
    assert torch.equal(model.text.position.weight.grad.abs().amax(-1) > 0, F.pad(used, (0, 2)))
    if model.config.position == "learned":
        seen = torch.zeros(N, dtype=torch.bool).index_fill(0, keep.flatten(), True)
        assert torch.equal(model.vision.pos_embed.grad.abs().amax(-1) > 0, seen) and not seen.all()


def test_gelu_eps_and_mlp_ratio_follow_the_config_in_both_towers():
    model = FLIP(replace(SMALL, gelu="tanh", eps=0.5, mlp_ratio=3))
    blocks = [*model.vision.encoder.blocks, *model.text.encoder.blocks]
    assert {block.mlp.act.approximate for block in blocks} == {"tanh"}
    assert {block.mlp.act.approximate for block in FLIP(SMALL).vision.encoder.blocks} == {"none"}
    assert not any(isinstance(module, QuickGELU) for module in model.modules())
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {0.5}
    assert [block.mlp.fc1.out_features for block in blocks] == [72] * 2 + [48] * 3
    assert [block.attn.heads for block in blocks] == [2] * 2 + [4] * 3
    without = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m.bias is None}
    assert without == {"image_projection", "text_projection"}  # the patches have one, unlike CLIP's


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_state_dict_makes_the_same_model(position):
    model = shaken(replace(SMALL, position=position))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other = FLIP(model.config).eval()
    images, ids, (keep, _) = pictures(), texts(), masking()
    before = other(images, ids, keep=keep)[0]
    other.load_state_dict(state)
    close(other(images, ids, keep=keep)[0], model(images, ids, keep=keep)[0], 0)
    assert (other(images, ids, keep=keep)[0] - before).abs().max() > 0.05
    assert state["vision.pos_embed"].shape == (N, 24)
    clip = CLIP(CLIPConfig(**{name: getattr(SMALL, name) for name in vars(CLIPConfig())}))  # of the same sizes
    with pytest.raises(RuntimeError, match="norm_pre"):  # its image tower is another one
        other.load_state_dict(clip.state_dict())


def test_bfloat16_autocast_is_finite_and_close():
    model, images, ids = FLIP(SMALL).eval(), pictures(), texts()
    keep, text_keep = masking()[0], text_masking(torch.rand(B, L), ids != 0, 0.5)
    expected, named = model(images, ids, keep=keep, text_keep=text_keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, halved = model(images, ids, keep=keep, text_keep=text_keep)
    assert {t.dtype for t in (logits, *halved.values())} == {torch.float32}
    contrastive_loss(logits).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters()) and logits.isfinite().all()
    for name, vectors in named.items():
        close(halved[name].norm(dim=-1), torch.ones(B))
        assert 1e-5 < (halved[name] - vectors).abs().max() < 0.02  # half precision was at work, and does no harm
    close(logits, expected, 0.2)
    close(logits, model.compare(halved["image"], halved["text"]), 0)  # the logits themselves are not halved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_masking_follows_the_noise_to_the_gpu():
    model, images, ids = shaken(), pictures(), texts()
    noise, text_noise = torch.rand(B, N), torch.rand(B, L)
    keep, text_keep = random_masking(noise, 0.5)[0], text_masking(text_noise, ids != 0, 0.5)
    expected = model(images, ids, keep=keep, text_keep=text_keep)[0]
    places = random_masking(noise.cuda(), 0.5)
    words = text_masking(text_noise.cuda(), (ids != 0).cuda(), 0.5)
    assert all(t.is_cuda for t in (*places, words))
    for ours, theirs in zip((*places, words), (*random_masking(noise, 0.5), text_keep), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    model.cuda()
    assert model.vision.pos_embed.is_cuda
    close(model(images.cuda(), ids.cuda(), keep=places[0], text_keep=words)[0].cpu(), expected, 1e-3)


# --- starting values -------------------------------------------------------------------------------------------------

# Widths for which no two of the documented bounds are alike.
WIDE = FLIPConfig(patch_size=16, image_width=96, image_depth=2, text_width=160, embed_dim=64, position="learned")


def spread(weight: Tensor, std: float, name: str = "") -> None:
    """The deviation of independent numbers, within four times its own error."""
    assert weight.std().item() == pytest.approx(std, rel=4 / (2 * weight.numel()) ** 0.5), name
    assert abs(weight.mean().item()) < 4 * std / weight.numel() ** 0.5, name


@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_initial_values(projection):
    model = FLIP(replace(WIDE, projection=projection))
    matrices = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for matrix in module.weight.chunk(2) if name.endswith("kv") else [module.weight]:
                bound = math.sqrt(6 / sum(matrix.shape))  # Xavier, of the patches on the flattened view
                assert 0.98 * bound < matrix.abs().max() <= bound, name
                spread(matrix, bound / 3**0.5, name)  # of uniform numbers
                matrices += 1
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    assert matrices == 1 + (2 + 2) * 6 + (2 if projection == "linear" else 4)
    vision, text = model.vision, model.text
    tables = {"words": text.word.weight, "positions": text.position.weight, "class token": vision.cls_token,
              "patches' positions": vision.pos_embed}  # fmt: skip
    for name, table in tables.items():
        spread(table, 0.02, name)
    assert text.word.weight.abs().max() > 0.06  # normal, neither uniform nor cut at two deviations
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    # CLIP's own start would be another: it goes by width and depth.
    assert 96**-0.5 / 0.02 > 4 and (96 * 4) ** -0.5 / (math.sqrt(6 / 192) / 3**0.5) < 0.6


def test_same_seed_same_model():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(FLIP(SMALL).state_dict())
    fixed = {"vision.pos_embed", "logit_scale"}
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        constant = name in fixed or name.endswith("bias") or ".norm" in name
        assert torch.equal(value, models[2][name]) == constant, name


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_first_loss_is_near_chance_and_no_nearer(masked):
    """B = 64, ln B = 4.159. As in CLIP the cosines are multiplied by 14.3 and not quite equal: the loss lies above
    ln B by about 14.3^2 (s_row^2 + s_column^2) / 4, between 0.1 and 0.34 in eight seeds."""
    model, images, ids = FLIP(FLIPConfig()).eval(), pictures(64, 64), torch.randint(7, 340, (64, 12))
    ids[:, 0] = 2
    ids = ids.masked_fill(torch.arange(12) > (5 + torch.arange(64) % 7)[:, None], 0)
    keep = random_masking(torch.rand(64, 64), 0.5)[0] if masked else None
    logits, named = model(images, ids, keep=keep)
    raw = model.image_projection(model.vision(images, keep)[0]) @ model.text_projection(model.text(ids)[0]).T
    cosine = named["image"] @ named["text"].T
    low, high = math.log(64) + 0.03, math.log(64) + 0.6
    loss = contrastive_loss(logits).item()
    assert low < loss < high
    bend = (logits.var(dim=1).mean() + logits.var(dim=0).mean()).item() / 4
    assert loss == pytest.approx(math.log(64) + bend, abs=0.15)
    for wrong in (cosine, 0.07 * cosine, 100 * cosine, raw, raw / 0.07):
        assert not low < contrastive_loss(wrong).item() < high


# --- learning --------------------------------------------------------------------------------------------------------


def test_eight_pairs_can_be_learnt_by_heart_from_half_of_each_picture():
    """Other halves at each step, and measured on whole pictures, as always."""
    model, images, ids = FLIP(SMALL), pictures(8), torch.randint(4, 30, (8, 6))
    halves = torch.rand(80, 8, N)

    def measure() -> tuple[float, float, float]:
        with torch.no_grad():
            logits, _ = model.eval()(images, ids)
        own = torch.arange(8)
        return contrastive_loss(logits).item(), recall_at(logits, own, 1), recall_at(logits.T, own, 1)

    def loss(model: FLIP, images: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        return contrastive_loss(model(images, ids, keep=random_masking(noise, 0.5)[0])[0])

    before, *recall = measure()
    assert before > 1.5 and max(recall) < 0.6
    fit(model, lambda step: (images, ids, halves[step % 80]), loss, steps=80, lr=3e-3,
        after_step=[clamp_logit_scale], progress=None)  # fmt: skip
    after, *recall = measure()
    assert after < 0.3 and recall == [1, 1]
