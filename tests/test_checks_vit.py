"""The checks of lesson 01 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

from collections.abc import Callable

import check_helpers as helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minivlp.checks import CheckFailed
from minivlp.checks import vit as checks
from minivlp.checks.core import Attempt, Slip, variants

LESSON = "01_vit.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def length_by_floor(height, width, patch_size, class_token=True):
    return (height // patch_size) * (width // patch_size) + (1 if class_token else 0)


def length_by_counting(height, width, patch_size, class_token=True):
    return len([0 for _ in range(0, height, patch_size) for _ in range(0, width, patch_size)]) + class_token


def length_numpy(height, width, patch_size, class_token=True):
    return np.int64(height * width // patch_size**2) + np.int64(class_token)


def pool_norm_first(x, norm):
    return norm(x)[:, 1:].mean(dim=1)


def pool_slice_first(x, norm):
    patches = norm(x[:, 1:])
    return patches.sum(1) / patches.shape[1]


def rollout_matrix(maps):
    eye = torch.eye(maps[0].shape[-1])
    total = eye
    for a in maps:
        step = a.mean(1) + eye
        total = step / step.sum(-1, keepdim=True) @ total
    return total[:, 0, 1:]


def rollout_vector(maps):
    """Downwards from the class token, and with (A + I) / 2, which is the same since the rows of A sum to 1."""
    row = torch.zeros(len(maps[0]), maps[0].shape[-1])
    row[:, 0] = 1
    for a in reversed(maps):
        row = 0.5 * row + 0.5 * torch.einsum("bt,bhts->bs", row, a) / a.shape[1]
    return row[:, 1:]


def sincos_torch(grid, width, *, start=0, scale=1.0, divisor=4, offset=0, sign=-1, order="cr", base=1e4, omega=None):
    quarter = width // 4
    if omega is None:
        omega = base ** (sign * (torch.arange(quarter) + offset) / (width / divisor))
    c = (torch.arange(grid).repeat(grid) + start)[:, None] * scale * omega
    r = (torch.arange(grid).repeat_interleave(grid) + start)[:, None] * scale * omega
    first, second = (c, r) if order == "cr" else (r, c)
    return torch.cat([first.sin(), first.cos(), second.sin(), second.cos()], 1)


def sincos_numpy_as_in_mae(grid, width):
    columns, rows = np.meshgrid(np.arange(grid, dtype=np.float64), np.arange(grid, dtype=np.float64))
    omega = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4.0))
    halves = [np.einsum("m,d->md", places.reshape(-1), omega) for places in (columns, rows)]
    return torch.from_numpy(np.concatenate([f(half) for half in halves for f in (np.sin, np.cos)], axis=1)).float()


def masking(
    tokens, mask_token, generator, *, rate=0.5, shares=(0.8, 0.1), choice=(1, 1), fates=(1, 1), donors="own", seed=None,
    one_draw=False,
):  # fmt: skip
    """Right by default; the options make the wrong ones. `choice` and `fates` switch (per picture, per place)."""
    B, N, _ = tokens.shape
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    chosen_by = torch.rand(B if choice[0] else 1, N if choice[1] else 1, generator=generator).expand(B, N)
    fate = torch.rand(B if fates[0] else 1, N if fates[1] else 1, generator=generator).expand(B, N)
    fate = chosen_by if one_draw else fate
    chosen = chosen_by < rate
    place = torch.randint(N, (B, N), generator=generator)
    others = {
        "own": lambda: tokens[torch.arange(B)[:, None], place],
        "any": lambda: tokens[torch.randint(B, (B, N), generator=generator), place],
        "same place": lambda: tokens[torch.randperm(B, generator=generator)],
        "shared": lambda: tokens[:, torch.randperm(N, generator=generator)],
        "neighbour": lambda: tokens.roll(1, dims=1),
        "one": lambda: tokens[torch.arange(B)[:, None], place[:, :1]].expand_as(tokens),
        "zeros": lambda: torch.zeros_like(tokens),
        "noise": lambda: torch.randn(tokens.shape, generator=generator),
    }[donors]()
    masked = chosen & (fate < shares[0])
    moved = chosen & (fate >= shares[0]) & (fate < sum(shares))
    corrupted = torch.where(masked[..., None], mask_token, torch.where(moved[..., None], others, tokens))
    return corrupted, chosen.clone()


def masking_exact_halves(tokens, mask_token, generator):
    """Exactly half of the patches, and exactly 80/10/10 of these, by ranks; filled in by index into a copy."""
    B, N, _ = tokens.shape
    rank = torch.rand(B, N, generator=generator).argsort(1).argsort(1)
    chosen = rank < N // 2
    fate = torch.rand(B, N, generator=generator)
    corrupted = tokens.clone()
    corrupted[chosen & (fate < 0.8)] = mask_token
    picture, place = torch.nonzero(chosen & (fate >= 0.8) & (fate < 0.9), as_tuple=True)
    corrupted[picture, place] = tokens[picture, torch.randint(N, place.shape, generator=generator)]
    return corrupted, chosen


def masking_arithmetic(tokens, mask_token, generator):
    """Mixes by adding, which rounds, and draws three roles at once."""
    B, N, _ = tokens.shape
    chosen = torch.rand(B, N, generator=generator) < 0.5
    fate = torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), B * N, replacement=True, generator=generator).view(B, N)
    donor = torch.rand(B, N, generator=generator).argsort(1)
    m, e = ((chosen & (fate == kind))[..., None].float() for kind in (0, 1))
    others = tokens.gather(1, donor[..., None].expand_as(tokens))
    return tokens + m * (mask_token - tokens) + e * (others - tokens), chosen


RIGHT = [
    ("sequence_length", length_by_floor),
    ("sequence_length", length_by_counting),
    ("sequence_length", length_numpy),
    ("mean_pool", pool_norm_first),
    ("mean_pool", pool_slice_first),
    ("attention_rollout", rollout_matrix),
    ("attention_rollout", rollout_vector),
    ("sincos_2d", sincos_torch),
    ("sincos_2d", sincos_numpy_as_in_mae),
    ("mask_patches", masking),
    ("mask_patches", masking_exact_halves),
    ("mask_patches", masking_arithmetic),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


# --------------------------------------------------------------------------------------------- seeded mistakes


def lengths(formula: Callable) -> Callable:
    def answer(height, width, patch_size, class_token=True):
        return formula(height, width, patch_size, class_token)

    return answer


def rolls(*, residual=1.0, heads="mean", rows="rows", path="left", read=lambda total: total[:, 0, 1:]):
    def answer(maps):
        eye = torch.eye(maps[0].shape[-1])
        total = None
        for a in maps:
            step = {"mean": a.mean(1), "sum": a.sum(1), "max": a.amax(1)}[heads] + residual * eye
            if rows:
                step = step / step.sum(-1 if rows == "rows" else -2, keepdim=True)
            if total is None or path == "last":
                total = step
            else:
                total = {"left": step @ total, "right": total @ step, "elementwise": step * total}[path]
        return read(total)

    return answer


def sincos_in_a_row(grid, width):
    omega = 10_000.0 ** (-torch.arange(width // 2) / (width / 2))
    angle = torch.arange(grid * grid)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], 1)


def sincos_interleaved(grid, width):
    code = sincos_torch(grid, width).view(grid * grid, 2, 2, width // 4)
    return code.transpose(2, 3).reshape(grid * grid, width)


def sincos_parts(*order):
    def answer(grid, width):
        parts = sincos_torch(grid, width).chunk(4, dim=1)
        return torch.cat([parts[i] for i in order], 1)

    return answer


def sincos_with(frequencies: Callable) -> Callable:
    """`frequencies` of i = 0 .. D/4 - 1 and D/4."""
    return lambda grid, width: sincos_torch(grid, width, omega=frequencies(torch.arange(width // 4), width // 4))


def sincos_raster_in_both_halves(grid, width):
    omega = 1e4 ** (-torch.arange(width // 4) / (width / 4))
    angle = torch.arange(grid * grid)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()] * 2, 1)


def sincos_down_the_columns(grid, width):
    """The right codes in the wrong raster order."""
    return sincos_torch(grid, width).view(grid, grid, width).transpose(0, 1).reshape(grid * grid, width)


def masks(**options) -> Callable:
    return lambda tokens, mask_token, generator: masking(tokens, mask_token, generator, **options)


def mask_in_place(tokens, mask_token, generator):
    corrupted, chosen = masking(tokens, mask_token, generator)
    tokens.copy_(corrupted)
    return tokens, chosen


def mask_forgets_the_kept(tokens, mask_token, generator):
    corrupted, _ = masking(tokens, mask_token, generator)
    return corrupted, (corrupted != tokens).any(-1)


def mask_unchosen_too(tokens, mask_token, generator):
    corrupted, chosen = masking(tokens, mask_token, generator)
    return corrupted, chosen & (torch.rand(chosen.shape, generator=generator) < 0.5)


def mask_fates_from_elsewhere(tokens, mask_token, generator):
    """The choice comes from the generator, the fates do not."""
    chosen = torch.rand(tokens.shape[:2], generator=generator) < 0.5
    fate = torch.rand(tokens.shape[:2])
    others = tokens[torch.arange(len(tokens))[:, None], torch.randint(tokens.shape[1], tokens.shape[:2])]
    corrupted = torch.where((chosen & (fate < 0.8))[..., None], mask_token, tokens)
    return torch.where((chosen & (fate >= 0.9))[..., None], others, corrupted), chosen


def mask_numpy(tokens, mask_token, generator):
    return masking(tokens, mask_token, torch.Generator().manual_seed(int(np.random.randint(1000))))


def mask_without_gradient(tokens, mask_token, generator):
    return masking(tokens, mask_token.detach(), generator)


def after(change: Callable) -> Callable:
    """A right masking whose two answers are changed at the end."""
    return lambda tokens, mask_token, generator: change(*masking(tokens, mask_token, generator))


MISTAKES = {
    "sequence_length": [
        ("2 mistakes.*size of a patch in pixels.*class token is missing", lengths(lambda h, w, p, t: p * p)),
        ("size of a patch in pixels", lengths(lambda h, w, p, t: p * p + t)),
        ("numbers one patch holds", lengths(lambda h, w, p, t: 3 * p * p + t)),
        ("class token is missing", lengths(lambda h, w, p, t: (h // p) * (w // p))),
        (r"one side only \(the height\)", lengths(lambda h, w, p, t: h // p + t)),
        (r"one side only \(the width\)", lengths(lambda h, w, p, t: w // p + t)),
        ("2 mistakes.*one side only.*class token is missing", lengths(lambda h, w, p, t: h // p)),
        ("divide the area by P squared", lengths(lambda h, w, p, t: h * w // p + t)),
        ("every pixel a token", lengths(lambda h, w, p, t: h * w + t)),
        ("height twice", lengths(lambda h, w, p, t: (h // p) ** 2 + t)),
        ("width twice", lengths(lambda h, w, p, t: (w // p) ** 2 + t)),
        ("rows times columns", lengths(lambda h, w, p, t: h // p + w // p + t)),
        ("class_token=False is ignored", lengths(lambda h, w, p, t: (h // p) * (w // p) + 1)),
        ("when it should not be", lengths(lambda h, w, p, t: (h // p) * (w // p) + (not t))),
        ("counted twice", lengths(lambda h, w, p, t: (h // p) * (w // p) + 2 * t)),
        ("you return a float", lengths(lambda h, w, p, t: (h / p) * (w / p) + t)),
        ("is not finite", lengths(lambda h, w, p, t: float("nan"))),
        (r"sequence_length\(224, 224, 16\) should be 197, yours is 5", lengths(lambda h, w, p, t: 5)),
        (r"should be 197, yours is 197\.01", lengths(lambda h, w, p, t: (h // p) * (w // p) + t + 0.01)),
        ("of type str", lengths(lambda h, w, p, t: "197")),
        ("of type Tensor", lengths(lambda h, w, p, t: torch.tensor(197))),
    ],
    "mean_pool": [
        ("mean over all tokens: the class token", lambda x, norm: norm(x).mean(1)),
        ("average first", lambda x, norm: norm(x[:, 1:].mean(1))),
        ("class token itself", lambda x, norm: norm(x)[:, 0]),
        ("the sum, not the mean", lambda x, norm: norm(x)[:, 1:].sum(1)),
        ("largest value", lambda x, norm: norm(x)[:, 1:].amax(1)),
        ("`norm` was never applied", lambda x, norm: x[:, 1:].mean(1)),
        ("left out the last token", lambda x, norm: norm(x)[:, :-1].mean(1)),
        ("learned scale and shift", lambda x, norm: F.layer_norm(x, x.shape[-1:])[:, 1:].mean(1)),
        ("one too many", lambda x, norm: norm(x)[:, 1:].sum(1) / x.shape[1]),
        ("2 mistakes.*class token.*never applied", lambda x, norm: x.mean(1)),
        ("2 mistakes.*class token.*average first", lambda x, norm: norm(x.mean(1))),
        ("the D numbers of each token", lambda x, norm: norm(x)[:, 1:].mean(-1)),
        ("pictures of the batch", lambda x, norm: norm(x)[:, 1:].mean(0)),
        ("keepdim", lambda x, norm: norm(x)[:, 1:].mean(1, keepdim=True)),
        ("Nothing has been averaged", lambda x, norm: norm(x)[:, 1:]),
        ("over everything", lambda x, norm: norm(x)[:, 1:].mean()),
        ("input `x` in place", lambda x, norm: x.copy_(norm(x))[:, 1:].mean(1)),
        ("2 times as large", lambda x, norm: 2 * pool_norm_first(x, norm)),
        ("float64", lambda x, norm: pool_norm_first(x, norm).double()),
        ("holds NaN", lambda x, norm: pool_norm_first(x, norm) * float("nan")),
        ("holds infinity", lambda x, norm: 1 / torch.zeros(len(x), x.shape[-1])),
    ],
    "attention_rollout": [
        ("identity is missing", rolls(residual=0.0)),
        ("rows are not normalised", rolls(rows="")),
        ("wrong order", rolls(path="right")),
        ("normalise the columns", rolls(rows="columns")),
        ("element by element", rolls(path="elementwise")),
        ("first layer alone", lambda maps: rollout_matrix(maps[:1])),
        ("one head only", lambda maps: rollout_matrix([a[:, :1] for a in maps])),
        ("add the heads up", rolls(heads="sum")),
        ("largest value over the heads", rolls(heads="max")),
        ("class token's column", rolls(read=lambda total: total[:, 1:, 0])),
        ("last layer alone", rolls(path="last")),
        ("weight on itself", rolls(read=lambda total: total[:, 0])),
        ("the whole table", rolls(read=lambda total: total)),
        ("dropped the last patch", rolls(read=lambda total: total[:, 0, :-1])),
        ("average the patches' rows", rolls(read=lambda total: total[:, 1:, 1:].mean(1))),
        ("divide by the sum at the end", rolls(read=lambda t: t[:, 0, 1:] / t[:, 0, 1:].sum(-1, keepdim=True))),
        ("2 mistakes.*identity is missing.*wrong order", rolls(residual=0.0, path="right")),
        ("2 mistakes.*identity is missing.*last layer alone", lambda maps: maps[-1].mean(1)[:, 0, 1:]),
        ("average the layers", lambda maps: sum(rolls(path="last")([a]) for a in maps) / len(maps)),
        ("heads have not been averaged", lambda maps: maps[-1][:, :, 0, 1:]),
        ("input `maps` in place", lambda maps: rollout_matrix([a.mul_(0.5) for a in maps])),
        ("input `maps` in place", lambda maps: rollout_matrix([maps.pop(0) for _ in range(len(maps))])),
    ],
    "sincos_2d": [
        ("in one row, 0, 1, 2", sincos_in_a_row),
        ("rows and columns are swapped", lambda grid, width: sincos_torch(grid, width, order="rc")),
        ("rows and columns are swapped", sincos_down_the_columns),
        ("in one row, 0, 1, 2", sincos_raster_in_both_halves),
        ("grow linearly. They must fall geometrically, each", sincos_with(lambda i, n: i / 10_000)),
        ("fall linearly", sincos_with(lambda i, n: 1 - i / n)),
        ("grow linearly: 0, 1, 2", sincos_with(lambda i, n: i)),
        ("grow linearly: 1, 2, 3", sincos_with(lambda i, n: i + 1)),
        ("1/3, ... are not geometric", sincos_with(lambda i, n: 1 / (i + 1))),
        ("sines and cosines alternate", sincos_interleaved),
        ("cosines are missing", sincos_parts(0, 0, 2, 2)),
        ("sines are missing", sincos_parts(1, 1, 3, 3)),
        ("sine and cosine are swapped", sincos_parts(1, 0, 3, 2)),
        ("both sines, then both cosines", sincos_parts(0, 2, 1, 3)),
        ("the row is missing", sincos_parts(0, 1, 0, 1)),
        ("the column is missing", sincos_parts(2, 3, 2, 3)),
        ("yours from 1", lambda grid, width: sincos_torch(grid, width, start=1)),
        ("scaled the coordinates", lambda grid, width: sincos_torch(grid, width, scale=1 / grid)),
        ("scaled the coordinates", lambda grid, width: sincos_torch(grid, width, scale=1 / (grid - 1))),
        (r"exponent is i / \(width / 2\)", lambda grid, width: sincos_torch(grid, width, divisor=2)),
        ("exponent is i / width", lambda grid, width: sincos_torch(grid, width, divisor=1)),
        ("leave out the factor 2", lambda grid, width: sincos_torch(grid, width, divisor=8)),
        ("big_vision", lambda grid, width: sincos_torch(grid, width, divisor=width / (width // 4 - 1))),
        ("Yours starts at 1", lambda grid, width: sincos_torch(grid, width, offset=1)),
        ("the wrong sign", lambda grid, width: sincos_torch(grid, width, sign=1)),
        ("2 mistakes.*swapped.*yours starts at 1", lambda g, w: sincos_torch(g, w, order="rc", offset=1)),
        ("not in a way that this check knows", lambda grid, width: sincos_torch(grid, width, base=1e3)),
        ("one row too many", lambda grid, width: torch.zeros(1 + grid * grid, width)),
        ("Half of the numbers", lambda grid, width: sincos_torch(grid, width)[:, : width // 2]),
        ("dtype float32, yours is float64", lambda grid, width: sincos_torch(grid, width).double()),
    ],
    "mask_patches": [
        ("you choose every patch", masks(rate=1.1)),
        (r"every chosen patch \(100 %\) becomes", masks(shares=(1.1, 0.0))),
        ("random numbers of their own", masks(one_draw=True)),
        ("all pictures of the batch have the same", masks(choice=(0, 1))),
        ("leaves out the patches that are kept", mask_forgets_the_kept),
        ("input `tokens` in place", mask_in_place),
        ("80% are masked, 20% exchanged, 0% kept", masks(shares=(0.8, 0.2))),
        ("10% are masked, 79% exchanged", masks(shares=(0.1, 0.8))),
        ("you choose 15% of the patches", masks(rate=0.15)),
        ("`chosen` is False everywhere", masks(rate=-1)),
        ("same place from another picture", masks(donors="same place")),
        ("from another picture. Stay", masks(donors="any")),
        ("from the same place in every picture", masks(donors="shared")),
        ("from the same place in every picture", masks(donors="neighbour")),
        ("become the same patch", masks(donors="one")),
        ("are zeros", masks(donors="zeros")),
        ("neither a patch of the input nor `mask_token`", masks(donors="noise")),
        ("within a picture all chosen patches meet", masks(fates=(1, 0))),
        ("same place meet the same fate", masks(fates=(0, 1))),
        ("ignore `generator`", lambda tokens, mask_token, generator: masking(tokens, mask_token, None)),
        ("ignore `generator`", mask_fates_from_elsewhere),
        ("ignore `generator`", mask_numpy),
        ("different seeds gave the same choice", masks(seed=3)),
        ("are not in `chosen`", mask_unchosen_too),
        ("wrong way round", after(lambda corrupted, chosen: (corrupted, ~chosen))),
        ("no gradient reaches `mask_token`", mask_without_gradient),
        ("are swapped", after(lambda corrupted, chosen: (chosen, corrupted))),
        ("return two things", after(lambda corrupted, chosen: corrupted)),
        ("`chosen` must be of dtype bool", after(lambda corrupted, chosen: (corrupted, chosen.float()))),
        ("a yes or no for each patch", after(lambda corrupted, chosen: (corrupted, chosen[:, :32]))),
    ],
}
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "sequence_length": checks._LENGTH_SLIPS,
        "mean_pool": checks._POOL_SLIPS,
        "attention_rollout": checks._ROLLOUT_SLIPS,
        "sincos_2d": checks._SINCOS_SLIPS,
    }
    helpers.every_slip_is_seeded(checks, known, MISTAKES)


# ------------------------------------------------------------------------------------------ answers of any kind


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("words", "answer"), helpers.NO_ANSWERS)
def test_what_is_no_answer_is_explained(name, words, answer):
    helpers.is_explained(checks, name, words, answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_instead_of_a_function_is_sent_back(name):
    helpers.a_value_is_sent_back(checks, name)


@pytest.mark.parametrize("name", ["mean_pool", "attention_rollout", "sincos_2d", "mask_patches"])
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    noise = {
        "mean_pool": lambda x, norm: torch.randn(len(x), x.shape[-1]),
        "attention_rollout": lambda maps: torch.rand(len(maps[0]), maps[0].shape[-1] - 1),
        "sincos_2d": lambda grid, width: torch.randn(grid * grid, width),
        "mask_patches": lambda t, m, g: (torch.randn(t.shape), torch.rand(t.shape[:2]) < 0.5),
    }[name]
    with pytest.raises(CheckFailed, match=r"not in a way that this check knows|neither a patch"):
        getattr(checks, name)(noise)


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize(("name", "answer"), [*RIGHT[::2], ("mask_patches", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    helpers.leaves_global_random_states(checks, name, answer)


def test_the_verdict_does_not_depend_on_the_global_state(capsys):
    verdict = helpers.verdict_under_any_global_state(checks, "mask_patches", masking, capsys)
    assert "50% chosen, of these 80% masked, 10% exchanged, 10% kept" in verdict


def test_checks_run_where_gradients_are_off():
    with torch.no_grad():
        for name, answer in RIGHT:
            getattr(checks, name)(answer)


def test_jupyter_shows_the_sentence_alone():
    interactive = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell()
    result = interactive.run_cell(
        "from minivlp.checks import vit as checks\nchecks.mean_pool(lambda x, norm: norm(x).mean(1))", silent=True
    )
    assert isinstance(result.error_in_exec, CheckFailed)
    shown = result.error_in_exec._render_traceback_()
    assert len(shown) == 1 and shown[0].startswith("CheckFailed: mean_pool: this equals the mean over all tokens")


def test_variants_takes_slips_alone_before_it_pairs_them():
    slips = [Slip("a", 2, "A."), Slip("a", 3, "AA."), Slip("b", 5, "B.")]
    made = [(message, int(value)) for message, value in variants(lambda a=1, b=1: torch.tensor(a * b), slips)]
    assert made[:3] == [("A.", 2), ("AA.", 3), ("B.", 5)]
    assert made[3:] == [("2 mistakes at once. (1) A. (2) B.", 10), ("2 mistakes at once. (1) AA. (2) B.", 15)]


def test_a_failure_is_an_assertion_and_names_the_exercise():
    assert issubclass(CheckFailed, AssertionError)
    with pytest.raises(AssertionError, match=r"^double: no\.$"):
        Attempt("double", abs).fail("no.")


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
