"""Lesson 04's recipes: one main run and the experiments around it, each a small change to one recipe.

The notebook trains some of these live; `python -m minivlp.record 04_flip` runs all of them over several seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import LongTensor, Tensor, nn

import minivlp
from minivlp.bench import take_turns
from minivlp.evaluate import recall_at
from minivlp.layers import Encoder, count_parameters, init_xavier, patchify, to_float_pixels
from minivlp.lessons import clip as lesson03
from minivlp.lessons.clip import CLIPBatches, image_vectors, retrieval, text_vectors, validation, zero_shot_kind
from minivlp.lessons.vilt import pairs
from minivlp.lessons.vit import Run
from minivlp.losses import contrastive_loss
from minivlp.models.clip import clamp_logit_scale
from minivlp.models.flip import FLIP, FLIPConfig, keep_count, random_masking, sincos_positions, text_masking
from minivlp.train import History, TrainingDiverged, evaluating, fit, train_step

NAME = "04_flip"
# name of the kept weights -> (experiment, arm), of the first seed
CHECKPOINTS = {"flip": ("main", "FLIP")}


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: FLIPConfig = field(default_factory=FLIPConfig)
    mask: float = 0.5  # share of the patches that training leaves out
    sampling: str = "each"  # every picture its own patches, or "shared": one choice for the whole batch
    text_mask: float = 0.0  # share of a text's tokens that training leaves out
    text_rule: str = "prioritised"  # padding first, or "random"
    reconstruct: float = 0.0  # weight of MAE's loss on the patches left out
    tune: int = 40  # steps of unmasked tuning after the run
    tune_lr: float = 5e-5
    train_size: int = 20_000
    steps: int = 560
    batch_size: int = 64
    lr: float = 7e-4
    weight_decay: float = 0.1
    warmup: float = 0.1
    levels: tuple[int, ...] = (1, 4, 4)  # which of the five captions; one level a batch, so that lengths agree
    duplicates: str = "wrong"  # as in lesson 03
    probes: bool = False  # also measure what lesson 03 measured


MAIN = Recipe(probes=True)


def flip(**changes: object) -> FLIPConfig:
    return replace(MAIN.model, **changes)


# The step of the whole picture takes so many times as long as that with this share left out, rounded: what "equal
# seconds" below rests on. `clock` measures it again, and the lesson prints both.
SAVED = {0.5: 1.85, 0.75: 3.0}
WHOLE = replace(MAIN, mask=0.0, steps=200, tune=20, probes=False)  # for the comparisons
HALF, QUARTER = replace(WHOLE, mask=0.5), replace(WHOLE, mask=0.75)


def scaled(recipe: Recipe, times: int) -> Recipe:
    """A batch `times` as large for as many samples in all, the rate by the paper's linear rule."""
    return replace(recipe, batch_size=recipe.batch_size * times, lr=recipe.lr * times, steps=recipe.steps // times,
                   tune=recipe.tune // times)  # fmt: skip


def longer(recipe: Recipe) -> Recipe:
    """As many more steps as the removed patches pay for."""
    return replace(recipe, steps=round(recipe.steps * SAVED[recipe.mask]))


# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"FLIP": MAIN},
    "equal steps": {"0 %": WHOLE, "50 %": HALF, "75 %": QUARTER},  # and equal samples: the batches are equal
    "equal samples, larger batch": {"50 %": scaled(HALF, 2), "75 %": scaled(QUARTER, 4)},
    "equal seconds": {"50 %": longer(HALF), "75 %": longer(QUARTER)},
    "equal seconds, larger batch": {"50 %": scaled(longer(HALF), 2), "75 %": scaled(longer(QUARTER), 4)},
    "changes": {
        "with reconstruction": replace(HALF, reconstruct=0.1),
        "one choice for a batch": replace(HALF, sampling="shared"),
        "class token read": replace(HALF, model=flip(pool="cls")),
        "learned positions": replace(HALF, model=flip(position="learned")),
        "half the text, prioritised": replace(HALF, text_mask=0.5),
        "half the text, random": replace(HALF, text_mask=0.5, text_rule="random"),
    },
}


# --- data ------------------------------------------------------------------------------------------------------------


class FLIPBatches(CLIPBatches):
    """Lesson 03's pairs, and for each the random numbers that decide what is looked at."""

    def __call__(self, step: int) -> tuple[Tensor, LongTensor, Tensor, Tensor]:
        """-> images (B, C, H, W), ids (B, L), noise (B, N) for the patches and (B, L) for the words, all in [0, 1)."""
        images, ids, *_ = super().__call__(step)
        generator = self.generator(-1 - step)  # another stream than the one that chose the captions
        patches = torch.rand(len(ids), self.recipe.model.grid**2, generator=generator)
        return images, ids, patches, torch.rand(ids.shape, generator=generator)


# --- training --------------------------------------------------------------------------------------------------------


def flip_loss(
    model: FLIP, images: Tensor, ids: Tensor, noise: Tensor, text_noise: Tensor, *, mask: float = 0.0,
    text_mask: float = 0.0, prioritised: bool = True, shared: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """CLIP's loss for one batch of `FLIPBatches`, seen in parts: `mask` of the patches and `text_mask` of the words are
    left out. `shared` leaves out the same patches of all pictures."""
    noise = noise[:1].expand_as(noise) if shared else noise
    keep = random_masking(noise, mask)[0] if mask else None
    words = ids != model.config.pad_id
    text_keep = text_masking(text_noise, words, text_mask, prioritised=prioritised) if text_mask else None
    logits, _ = model(images, ids, keep=keep, text_keep=text_keep)
    return {"contrastive": contrastive_loss(logits)}


class MAEDecoder(nn.Module):
    """What FLIP tried and left out (paper, Table 1f): paint the removed patches from the kept ones, as MAE does.

    The kept tokens and a **mask token** for each removed one, put back in order, go through a small transformer.
    """

    def __init__(self, config: FLIPConfig, *, width: int = 64, depth: int = 1, heads: int = 2) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.image_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(config.grid, width))
        self.encoder = Encoder(width, depth, heads, eps=config.eps)
        self.head = nn.Linear(width, config.channels * config.patch_size**2)
        init_xavier(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, restore: Tensor) -> Tensor:
        """tokens (B, 1+K, D) of the kept patches, restore (B, N) -> pixels of all patches (B, N, C*P*P)."""
        x = self.embed(tokens)
        holes = self.mask_token.expand(len(x), restore.shape[1] - (x.shape[1] - 1), -1)  # (B, N-K, width)
        patches = torch.cat([x[:, 1:], holes], dim=1).take_along_dim(restore[..., None], dim=1) + self.pos_embed
        x, _ = self.encoder(torch.cat([x[:, :1], patches], dim=1))
        return self.head(x[:, 1:])


def reconstruction_loss(pixels: Tensor, images: Tensor, removed: Tensor, patch_size: int) -> Tensor:
    """Mean squared error at the removed patches (B, N) alone, each target brought to mean 0 and spread 1 (MAE)."""
    target = patchify(to_float_pixels(images), patch_size)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (pixels - target).square().mean(dim=-1)[removed].mean()


def painting_loss(
    model: FLIP, images: Tensor, ids: Tensor, noise: Tensor, *_: Tensor, mask: float, weight: float
) -> dict[str, Tensor]:
    """`flip_loss` and, from the same pass over the picture, MAE's loss."""
    keep, removed, restore = random_masking(noise, mask)
    pooled, named = model.vision(images, keep)
    image = F.normalize(model.image_projection(pooled).float(), dim=-1)
    painted = reconstruction_loss(model.decoder(named["tokens"], restore), images, removed, model.config.patch_size)
    return {"contrastive": contrastive_loss(model.compare(image, model.encode_text(ids))), "pixels": weight * painted}


def build(config: FLIPConfig) -> FLIP:
    return FLIP(config)


def begin(recipe: Recipe) -> FLIP:
    """A new model at random, as in the paper: no part of it is trained before."""
    model = build(recipe.model)
    if recipe.reconstruct:
        model.decoder = MAEDecoder(recipe.model)
    return model


def loss_of(recipe: Recipe) -> Callable:
    """`fit` wants a function of the model and the batch."""
    if recipe.reconstruct:
        return partial(painting_loss, mask=recipe.mask, weight=recipe.reconstruct)
    return partial(flip_loss, mask=recipe.mask, text_mask=recipe.text_mask, shared=recipe.sampling == "shared",
                   prioritised=recipe.text_rule == "prioritised")  # fmt: skip


def train(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "FLIP") -> tuple[FLIP, History]:
    """The first part of a run, masked: build, batch, fit. The seed fixes weights, pairs and what is left out."""
    minivlp.seed_everything(seed)
    model = begin(recipe).to(device)
    history = fit(
        model, FLIPBatches(pairs("train", recipe.train_size), recipe, seed=seed), loss_of(recipe), steps=recipe.steps,
        lr=recipe.lr, weight_decay=recipe.weight_decay, warmup=recipe.warmup, betas=(0.9, 0.95),
        after_step=[clamp_logit_scale], evaluate=validation(), evaluate_every=max(1, recipe.steps // 5),
        progress=progress,
    )  # fmt: skip
    return model, history


def tune(model: FLIP, recipe: Recipe, *, seed: int, progress: str | None = "unmasked tuning") -> History:
    """The second part, in place: unmasked tuning (paper, Table 1e), the same loss on whole pictures at a small rate."""
    batches = FLIPBatches(pairs("train", recipe.train_size), recipe, seed=seed)
    history = fit(
        model, lambda step: batches(recipe.steps + step), flip_loss, steps=recipe.tune, lr=recipe.tune_lr,
        weight_decay=recipe.weight_decay, warmup=0.2, betas=(0.9, 0.95), after_step=[clamp_logit_scale],
        progress=progress,
    )  # fmt: skip
    if history.stopped:
        raise KeyboardInterrupt  # half a tuning is no result
    return history


# --- measuring -------------------------------------------------------------------------------------------------------


def views(n: int, patches: int, parts: int, *, seed: int = 0) -> list[Tensor]:
    """`parts` choices of patches (n, K) for each of n pictures, which share no patch and leave at most a rest out."""
    noise = torch.rand(n, patches, generator=torch.Generator().manual_seed(seed))
    return list(random_masking(noise, 0.0)[0][:, : patches // parts * parts].chunk(parts, dim=1))


def view_vectors(model: FLIP, images: Tensor, keep: Tensor, *, batch_size: int = 250) -> Tensor:
    """Pictures (N, C, H, W) of which the patches keep (N, K) are seen -> vectors of length 1 (N, E), on the CPU."""
    device = next(model.parameters()).device
    with evaluating(model):
        parts = zip(images.split(batch_size), keep.split(batch_size), strict=True)
        return torch.cat([model.encode_image(x.to(device), k.to(device)).float().cpu() for x, k in parts])


def both_ways(image: Tensor, text: Tensor) -> float:
    """R@1 of N vectors each, the mean of both directions."""
    scores, own = image @ text.T, torch.arange(len(image))
    return (recall_at(scores, own, 1) + recall_at(scores.T, own, 1)) / 2


def seen_in_parts(model: FLIP, mask: float, split: str = "test", *, n: int = 1000) -> dict[str, float]:
    """R@1 with masked pictures, with all complementary views of each put together, with whole ones (Table 1d)."""
    data = pairs(split, n)
    text = text_vectors(model, [captions[4] for captions in data.captions])
    numbers = {"R@1, whole": both_ways(image_vectors(model, data.images), text)}
    if mask:
        keeps = views(n, model.config.grid**2, round(1 / (1 - mask)))
        each = [view_vectors(model, data.images, keep) for keep in keeps]
        numbers["R@1, masked"] = both_ways(each[0], text)
        numbers["R@1, all views"] = both_ways(F.normalize(sum(each), dim=-1), text)
    return numbers


def measure(model: FLIP, *, everything: bool = False) -> dict[str, float]:
    """What a run is measured by, on whole pictures; `everything` that lesson 03 measured, or two numbers."""
    found = lesson03.measure(model) if everything else retrieval(model) | {"zero-shot kind": zero_shot_kind(model)}
    return found | {"R@1": (found["R@1 text to image"] + found["R@1 image to text"]) / 2}


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Train, measure, tune, measure again on the test split: what the recorder keeps of one arm and seed."""
    try:
        model, history = train(recipe, seed=seed, device=device, progress=progress)
    except TrainingDiverged as error:  # a result like any other: the weights of the last good step
        return Run(error.model, error.history, measure(error.model) | {"diverged": 1.0})
    metrics = {f"{name}, not tuned": value for name, value in seen_in_parts(model, recipe.mask).items()}
    tune(model, recipe, seed=seed, progress=progress)
    return Run(model, history, metrics | measure(model, everything=recipe.probes))


# --- what a step costs -----------------------------------------------------------------------------------------------


def multiply_adds(tokens: int, width: int, depth: int) -> int:
    """Multiply-adds of `depth` blocks for a sequence of T tokens: 12 T D^2 in the matrices, 2 T^2 D in attention."""
    return depth * (12 * tokens * width**2 + 2 * tokens**2 * width)


def pair_cost(config: FLIPConfig, ratio: float = 0.0, *, text: int = 32) -> tuple[int, int]:
    """Multiply-adds for one picture, of which the share `ratio` is left out, and for one text of `text` tokens."""
    kept = keep_count(config.grid**2, ratio)
    image = multiply_adds(1 + kept, config.image_width, config.image_depth)
    image += kept * config.channels * config.patch_size**2 * config.image_width  # the patches' embedding
    return image, multiply_adds(text, config.text_width, config.text_depth)


def reckoned_time(ratio: float, text_share: float) -> float:
    """The paper's reckoning: time with `ratio` of the patches left out over time without, ((1 - r) + rho) / (1 + rho),
    if the picture's cost grows with its tokens. rho = `text_share` is the text's cost over the whole picture's."""
    return (1 - ratio + text_share) / (1 + text_share)


def timed_steps(recipe: Recipe, batches: Sequence[tuple[Tensor, ...]], *, device: torch.device) -> Callable[[], None]:
    """A function that takes one training step of a new model with each of the batches."""
    minivlp.seed_everything(0)
    model = begin(recipe).to(device).train()
    ready = [[t.to(device) for t in batch] for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type != "mps")
    loss = loss_of(recipe)

    def steps() -> None:
        for batch in ready:
            train_step(model, optimizer, loss, batch, clip=1.0)  # reads the loss, so a GPU has finished

    return steps


def timed_tower(recipe: Recipe, batch: tuple[Tensor, ...], *, device: torch.device) -> Callable[[], None]:
    """A function that runs the image tower alone, forward and backward, on one batch."""
    minivlp.seed_everything(0)
    vision = begin(recipe).vision.to(device).train()
    images, _, noise, _ = (t.to(device) for t in batch)

    def step() -> None:
        keep = random_masking(noise, recipe.mask)[0] if recipe.mask else None
        vision.zero_grad(set_to_none=True)
        vision(images, keep)[0].sum().backward()
        vision.cls_token.grad[0, 0, 0].item()  # a GPU is asked to finish

    return step


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    pairs("train", MAIN.train_size)
    lesson03.prepare()


# --- the scoreboard --------------------------------------------------------------------------------------------------

# row of the list of what the lesson measured -> (experiment, arm, metric)
SCOREBOARD = {
    "the picture of a full caption, among 1,000 (R@1, chance 0.001)": ("main", "FLIP", "R@1 text to image"),
    "the full caption of a picture, among 1,000 (R@1, chance 0.001)": ("main", "FLIP", "R@1 image to text"),
    "... before the unmasked tuning, both directions": ("main", "FLIP", "R@1, whole, not tuned"),
    "... with half of each picture left out at the test, too": ("main", "FLIP", "R@1, masked, not tuned"),
    "kind by its name, easy pages (chance 0.083)": ("main", "FLIP", "zero-shot kind"),
    "colour and kind, one of 120 names": ("main", "FLIP", "colour and kind"),
    "captions with exchanged attributes (chance 0.5)": ("main", "FLIP", "attribute_swap"),
    "captions with exchanged order (chance 0.5)": ("main", "FLIP", "order_swap"),
    "captions with another count (chance 0.5)": ("main", "FLIP", "count"),
}
# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = (
    "trained on half of each picture, finds that of a caption among 1,000: {}, chance 0.001",
    ("main", "FLIP", "R@1 text to image"),
)
BOARD = {
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": ("main", "FLIP", "R@1 text to image"),
    "R@1 image to text": ("main", "FLIP", "R@1 image to text"),
    "zero-shot kind": ("main", "FLIP", "normal tier"),
    "attribute swap": ("main", "FLIP", "attribute_swap"),
    "order swap": ("main", "FLIP", "order_swap"),
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
NOTES = {
    "training seconds": "FLIP: the steps of the main run times the seconds of one, alternated with those of the other "
    "recipes; both parts, masked and unmasked, are in it. Nothing was trained before.",
    "VQA": "FLIP chooses among given texts; it has no head for answers.",
}


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    image, text = pair_cost(MAIN.model)
    return {"parameters": count_parameters(FLIP(MAIN.model)), "text cost over picture cost": text / image}


RATIOS = (0.0, 0.25, 0.5, 0.75)


def clock(device: torch.device) -> dict[str, float]:
    """What is measured alone on the machine, all recipes in turn: milliseconds of a step and of the tower at each of
    `RATIOS` with the comparisons' batch, of a step of the larger batches, "training seconds" of the main recipe, and
    "ms for 1,000 x 1,000 pairs"."""
    data = pairs("train", MAIN.train_size)
    trained = {f"step, {ratio:.0%}": replace(WHOLE, mask=ratio) for ratio in RATIOS}
    trained |= {f"larger batch, {arm}": recipe for arm, recipe in EXPERIMENTS["equal samples, larger batch"].items()}
    trained |= {f"changes, {arm}": recipe for arm, recipe in EXPERIMENTS["changes"].items()}
    ready = {}
    for B in {recipe.batch_size for recipe in trained.values()}:
        draw = FLIPBatches(data, replace(WHOLE, batch_size=B), seed=0)
        ready[B] = [draw(step) for step in range(3)]
    steps = {name: timed_steps(r, ready[r.batch_size], device=device) for name, r in trained.items()}
    steps |= {f"tower, {ratio:.0%}": timed_tower(replace(WHOLE, mask=ratio), ready[WHOLE.batch_size][0], device=device)
              for ratio in RATIOS}  # fmt: skip
    seconds = {name: statistics.median(values) / (3 if name in trained else 1)
               for name, values in take_turns(steps, rounds=5).items()}  # fmt: skip
    model = begin(MAIN).to(device)
    retrieval(model)  # the first call of a shape is slower
    pairs_ms = take_turns({"": lambda: retrieval(model)}, rounds=3)[""]
    return {f"ms, {name}": 1000 * value for name, value in seconds.items()} | {
        "training seconds": MAIN.steps * seconds[f"step, {MAIN.mask:.0%}"] + MAIN.tune * seconds["step, 0%"],
        "ms for 1,000 x 1,000 pairs": 1000 * statistics.median(pairs_ms),
    }
