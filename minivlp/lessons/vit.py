"""Lesson 01's recipes: one main run and the experiments around it, each a small change to the main recipe.

The notebook trains some of these live; `python -m minivlp.record 01_vit` runs all of them over several seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minivlp
from minivlp.data import Batches, PairTensors, load_pairs, to_tensors
from minivlp.data.picturebook.world import COLOURS, KINDS
from minivlp.evaluate import accuracy, k_per_class, predict, ridge_probe
from minivlp.models.cnn import ResNetConfig, SmallResNet
from minivlp.models.vit import ViT, ViTConfig, at_resolution
from minivlp.train import History, TrainingDiverged, fit

NAME = "01_vit"
# name of the kept weights -> (experiment, arm), of the first seed; later lessons start from them
CHECKPOINTS = {"vit": ("main", "ViT"), "vit_kind_and_colour": ("labels", "kind and colour"),
               "vit_normal": ("labels", "kind and colour, normal pages")}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All that fixes a run but its seed."""

    model: ViTConfig | ResNetConfig = field(default_factory=ViTConfig)
    tier: str = "easy"
    task: str = "kind"  # "kind" of the object; "kind and colour"; "swap": are the picture's two halves exchanged?
    train_size: int = 12_000
    steps: int = 600
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    probe: bool = False  # also fit few-shot classifiers to the frozen features
    shifts: bool = False  # also test on pages unlike the training pages
    fine_tune: int = 0  # steps at 96 pixels after the run, with and without interpolated positions


@dataclass
class Run:
    """What `run` returns: the trained model, its curves, and the numbers measured on the test split."""

    model: nn.Module
    history: History
    metrics: dict[str, float]


MAIN = Recipe(probe=True, shifts=True, fine_tune=100)
SHORT = replace(
    MAIN, tier="normal", train_size=6_000, steps=400, probe=False, shifts=False, fine_tune=0
)  # for the comparisons
SWAP = replace(SHORT, tier="easy", steps=500, task="swap", model=replace(MAIN.model, num_classes=2))
RATES = (3e-4, 1e-3, 3e-3)
LOW_RATES = (1e-4, 3e-4, 1e-3)
DATA_SIZES = (500, 2000, 8000)
SHIFTS = ("heldout_colour", "flipped", "crayon", "chalk")


def vit(**changes: object) -> ViTConfig:
    return replace(MAIN.model, **changes)


KIND_AND_COLOUR = replace(
    MAIN, shifts=False, fine_tune=0, task="kind and colour", model=vit(num_classes=len(KINDS) * len(COLOURS))
)

# experiment -> arm -> recipe
EXPERIMENTS: dict[str, dict[str, Recipe]] = {
    "main": {"ViT": MAIN},
    "positions": {kind: replace(SHORT, model=vit(position=kind)) for kind in ("none", "1d", "2d")},
    "labels": {
        "kind and colour": KIND_AND_COLOUR,
        # pages as the later lessons have them, seen long enough: what the models with language start from
        "kind and colour, normal pages": replace(
            KIND_AND_COLOUR, tier="normal", train_size=8_000, steps=1500, probe=False
        ),
    },
    "pooling": {
        f"{pool} {lr:.0e}": replace(SHORT, model=vit(pool=pool), lr=lr) for pool in ("cls", "mean") for lr in RATES
    },
    # deeper and thinner than the rest: with four blocks almost anything trains
    "norm": {
        f"{norm} {lr:.0e}": replace(SHORT, tier="easy", steps=240, model=vit(norm=norm, depth=12, width=64), lr=lr)
        for norm in ("pre", "post")
        for lr in LOW_RATES
    },
    "shape": {
        "4 blocks, width 128": SHORT,
        "8 blocks, width 128": replace(SHORT, model=vit(depth=8)),
        "4 blocks, width 180": replace(SHORT, model=vit(width=180)),
    },
    "data": {
        f"{name} {size}": replace(SHORT, model=model, train_size=size)
        for name, model in (("ViT", ViTConfig()), ("CNN", ResNetConfig()))
        for size in DATA_SIZES
    },
    "positions, swap task": {
        kind: replace(SWAP, model=replace(SWAP.model, position=kind), fine_tune=50 if kind == "1d" else 0)
        for kind in ("none", "1d", "2d")
    },
    "patch": {f"P={p}": replace(SHORT, steps=150, model=vit(patch_size=p)) for p in (16, 8, 4)},
}

# row of the scoreboard -> (experiment, arm, metric)
SCOREBOARD = {
    "kind of the object, 1,000 test pages (chance 0.083)": ("main", "ViT", "test accuracy"),
    "... in colours withheld from each kind": ("main", "ViT", "heldout_colour"),
    "... drawn in crayon": ("main", "ViT", "crayon"),
    "... drawn in chalk": ("main", "ViT", "chalk"),
    "colour, 25 shots on frozen features, trained on kind (chance 0.1)": ("main", "ViT", "colour, 25 shots"),
    "... trained on kind and colour": ("labels", "kind and colour", "colour, 25 shots"),
    "exchanged halves, with positions (chance 0.5)": ("positions, swap task", "1d", "test accuracy"),
    "... without": ("positions, swap task", "none", "test accuracy"),
}

# what stands on the course's map, and the model's row on the board: see `minivlp.record`
HEADLINE = ("names the thing on a test page: {}, chance 0.083", ("main", "ViT", "test accuracy"))
BOARD = {"parameters": "parameters", "training seconds": "training seconds"}
CLOCK_STEPS = 60
NOTES = {
    "training seconds": f"ViT: measured over {CLOCK_STEPS} steps without evaluation, scaled to all {MAIN.steps}.",
    **dict.fromkeys(
        ("R@1 text to image", "R@1 image to text", "zero-shot kind", "VQA", "attribute swap", "order swap",
         "ms for 1,000 x 1,000 pairs"),
        "ViT reads no text.",
    ),
}  # fmt: skip


def build(config: ViTConfig | ResNetConfig) -> nn.Module:
    return ViT(config) if isinstance(config, ViTConfig) else SmallResNet(config)


@lru_cache(maxsize=8)
def pictures(split: str, *, tier: str, n: int, image_size: int = 64) -> PairTensors:
    """`n` pictures with exactly one thing in them, in memory. On the easy tier that is all of them."""
    drawn = n if tier == "easy" else 3 * n  # about two in five pictures of the normal tier show one thing
    data = to_tensors(load_pairs("picturebook", split, tier=tier, n=drawn, image_size=image_size))
    single = [i for i, scene in enumerate(data.scenes) if len(scene.things) == 1]
    return data.subset(single[:n])


def swap_halves(images: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Exchange the upper and lower half of a random half of the pictures: (images, 1 where exchanged).

    Both versions consist of exactly the same patches, so only a model that knows where a patch was can tell.
    """
    swapped = torch.rand(len(images), generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(
        swapped[:, None, None, None], images.roll(images.shape[-2] // 2, dims=-2), images
    ), swapped.long()


def examples(split: str, recipe: Recipe, *, n: int, image_size: int = 64) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, side, side) uint8 and labels (n,) for the recipe's task."""
    data = pictures(split, tier=recipe.tier, n=n, image_size=image_size)
    if recipe.task == "swap":
        return swap_halves(data.images, seed=len(split))
    kind = data.labels("kind")[0]
    return data.images, kind if recipe.task == "kind" else kind * len(COLOURS) + data.labels("colour")[0]


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Softmax cross-entropy of class scores (B, K) with labels (B,)."""
    return F.cross_entropy(model(images)[0], labels)


def validation(recipe: Recipe) -> Callable[[nn.Module], dict[str, float]]:
    """A function of the model: its accuracy on 500 pictures of the validation split."""
    images, labels = examples("val", recipe, n=500)
    return lambda model: {"val accuracy": accuracy(predict(model, images)[0], labels)}


def train(
    recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = "ViT"
) -> tuple[nn.Module, History]:
    """One run of a recipe: build, batch, fit. The seed fixes the weights and the order of the pictures."""
    minivlp.seed_everything(seed)
    model = build(recipe.model).to(device)
    batches = Batches(examples("train", recipe, n=recipe.train_size), batch_size=recipe.batch_size, seed=seed)
    history = fit(
        model, batches, classification_loss, steps=recipe.steps, lr=recipe.lr, weight_decay=recipe.weight_decay,
        warmup=recipe.warmup, evaluate=validation(recipe), evaluate_every=max(1, recipe.steps // 10), progress=progress,
    )  # fmt: skip
    return model, history


def run(recipe: Recipe, *, seed: int, device: torch.device, progress: str | None = None) -> Run:
    """Train, then measure on the test split: what the recorder keeps of one arm and seed."""
    try:
        model, history = train(recipe, seed=seed, device=device, progress=progress)
    except TrainingDiverged as error:  # a result like any other: chance accuracy and a curve that ends early
        return Run(error.model, error.history, {"test accuracy": 1 / recipe.model.num_classes, "diverged": 1.0})
    metrics = {"test accuracy": test_accuracy(model, "test", recipe)}
    if recipe.probe:
        metrics |= few_shot(model, recipe)
    if recipe.shifts:
        metrics |= shifts(model, recipe)
    if recipe.fine_tune:
        metrics |= resolutions(model, recipe, seed=seed)
    return Run(model, history, metrics)


def test_accuracy(model: nn.Module, split: str, recipe: Recipe) -> float:
    images, labels = examples(split, recipe, n=1000)
    return accuracy(predict(model, images)[0], labels)


def shifts(model: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Accuracy on pictures that training never showed the like of: withheld colours, other ways of drawing."""
    return {split: test_accuracy(model, split, recipe) for split in SHIFTS}


def few_shot(model: nn.Module, recipe: Recipe, *, shots: tuple[int, ...] = (5, 25)) -> dict[str, float]:
    """k-shot accuracy of facts the model was not trained on, read off its frozen features in closed form."""
    train_set, test_set = (
        pictures(s, tier=recipe.tier, n=n) for s, n in (("train", recipe.train_size), ("test", 1000))
    )
    _, train_features = predict(model, train_set.images[:4000])
    _, test_features = predict(model, test_set.images)
    numbers = {}
    for fact in ("kind", "colour", "place"):
        labels, names = train_set.labels(fact)
        for k in shots:
            chosen = k_per_class(labels[:4000], k)
            scores = ridge_probe(train_features[chosen], labels[chosen], test_features, classes=len(names))
            numbers[f"{fact}, {k} shots"] = accuracy(scores, test_set.labels(fact)[0])
    return numbers


def keep_reading_order(model: ViT, image_size: int) -> ViT:
    """The mistake to compare with: at a new resolution keep the positions in reading order, leave others untrained."""
    resized = at_resolution(model, image_size)
    old = model.embed.pos_embed.data
    with torch.no_grad():
        resized.embed.pos_embed.normal_(std=0.02)
        resized.embed.pos_embed[:, : old.shape[1]] = old
    return resized


def resolutions(model: ViT, recipe: Recipe, *, seed: int, image_size: int = 96) -> dict[str, float]:
    """Accuracy on larger pictures, with positions interpolated or not, before and after a little fine-tuning."""
    images, labels = examples("test", recipe, n=1000, image_size=image_size)
    numbers = {}
    for name, resize in (("interpolated", at_resolution), ("reading order", keep_reading_order)):
        bigger = resize(model, image_size)
        numbers[f"{image_size} px, {name}"] = accuracy(predict(bigger, images)[0], labels)
        larger = examples("train", recipe, n=4000, image_size=image_size)
        batches = Batches(larger, batch_size=recipe.batch_size, seed=seed)
        if fit(bigger, batches, classification_loss, steps=recipe.fine_tune, lr=recipe.lr / 2, progress=None).stopped:
            raise KeyboardInterrupt  # half a fine-tuning is no result
        numbers[f"{image_size} px, {name}, tuned"] = accuracy(predict(bigger, images)[0], labels)
    return numbers


def prepare() -> None:
    """Draw every picture set the experiments use, once, so that runs side by side find them in the cache."""
    for arms in EXPERIMENTS.values():
        for recipe in arms.values():
            for split, n in (("train", recipe.train_size), ("val", 500), ("test", 1000)):
                pictures(split, tier=recipe.tier, n=n)
            for split in SHIFTS if recipe.shifts else ():
                pictures(split, tier=recipe.tier, n=1000)
            for split, n in (("train", 4000), ("test", 1000)) if recipe.fine_tune else ():
                pictures(split, tier=recipe.tier, n=n, image_size=96)


def facts() -> dict[str, float]:
    """Numbers that no run is needed for."""
    return {"parameters": sum(p.numel() for p in build(MAIN.model).parameters())}


def clock(device: torch.device) -> dict[str, float]:
    """Seconds that the main recipe trains, without evaluation: measured over `CLOCK_STEPS` steps, scaled to all."""
    minivlp.seed_everything(0)
    batches = Batches(examples("train", MAIN, n=MAIN.train_size), batch_size=MAIN.batch_size, seed=0)
    history = fit(
        build(MAIN.model).to(device), batches, classification_loss, steps=CLOCK_STEPS, lr=MAIN.lr,
        weight_decay=MAIN.weight_decay, warmup=MAIN.warmup, progress=None,
    )  # fmt: skip
    if history.stopped:
        raise KeyboardInterrupt  # half a measurement is none
    return {"training seconds": history.seconds * MAIN.steps / CLOCK_STEPS}
