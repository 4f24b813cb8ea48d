"""Lesson 01's recipes: their data, that every arm can be built, and that a run measures what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from minivlp.data.picturebook.world import COLOURS, KINDS
from minivlp.evaluate import accuracy, predict
from minivlp.layers import count_parameters, patchify
from minivlp.lessons import vit as lesson
from minivlp.models.vit import ViT

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = [pytest.param(recipe, id=f"{experiment}-{arm}")
        for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()]  # fmt: skip
CLASSES = {"kind": len(KINDS), "kind and colour": len(KINDS) * len(COLOURS), "swap": 2}
FEW = replace(lesson.MAIN, steps=2, batch_size=16, probe=False, shifts=False, fine_tune=0)


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[tuple]]:
    """`pictures` draws a handful, into a cache of its own; the sets that were asked for are listed."""
    real, asked = lesson.pictures.__wrapped__, []

    @cache
    def draw(split: str, tier: str, n: int, image_size: int) -> object:
        return real(split, tier=tier, n=n, image_size=image_size)

    def pictures(split: str, *, tier: str, n: int, image_size: int = 64) -> object:
        asked.append((split, tier, n, image_size))
        return draw(split, tier, min(n, 600 if (split, image_size) == ("train", 64) else 40), image_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIVLP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(lesson, "pictures", pictures)
        yield asked


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ARMS)
def test_every_arm_can_be_built_for_its_task(recipe):
    with torch.device("meta"):
        model = lesson.build(recipe.model)
    assert model.config == recipe.model
    assert model.head.out_features == CLASSES[recipe.task] == recipe.model.num_classes
    assert recipe.batch_size <= recipe.train_size
    assert recipe.tier in ("easy", "normal")


def test_arms_of_an_experiment_differ_and_kept_models_exist():
    for arms in lesson.EXPERIMENTS.values():
        assert len(set(arms.values())) == len(arms)
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]
    assert lesson.EXPERIMENTS["main"] == {"ViT": lesson.MAIN}


def test_vit_and_cnn_of_the_data_experiment_have_equal_parameters():
    """Equal within 2 %, or the comparison would be one of sizes."""
    with torch.device("meta"):
        arms = lesson.EXPERIMENTS["data"].items()
        sizes = {arm: count_parameters(lesson.build(recipe.model)) for arm, recipe in arms}
    vits = {count for arm, count in sizes.items() if arm.startswith("ViT")}
    cnns = {count for arm, count in sizes.items() if arm.startswith("CNN")}
    assert len(vits) == len(cnns) == 1
    assert abs(vits.pop() / cnns.pop() - 1) < 0.02
    assert {arm.split()[1] for arm in sizes} == {str(size) for size in lesson.DATA_SIZES}


def test_experiments_change_only_what_they_are_about():
    changed = {
        "positions": {"position"}, "positions, swap task": {"position", "fine_tune"}, "pooling": {"pool", "lr"},
        "norm": {"norm", "lr"}, "patch": {"patch_size"}, "shape": {"depth", "width"},
    }  # fmt: skip
    for experiment, names in changed.items():
        recipes = [{**vars(r), **vars(r.model)} for r in lesson.EXPERIMENTS[experiment].values()]
        differing = {name for name in recipes[0] if name != "model" and len({r[name] for r in recipes}) > 1}
        assert differing == names


# --- data ------------------------------------------------------------------------------------------------------------


def patches_of(images: Tensor, side: int) -> list[list[tuple[int, ...]]]:
    """Every picture as its patches, sorted: equal exactly when the patches are the same, wherever they are."""
    return [sorted(map(tuple, picture.tolist())) for picture in patchify(images, side)]


def test_swapped_pictures_consist_of_the_same_patches():
    images = torch.randint(256, (12, 3, 64, 64), dtype=torch.uint8)
    before = images.clone()
    swapped, labels = lesson.swap_halves(images, seed=3)
    assert torch.equal(images, before)
    assert set(labels.tolist()) == {0, 1}
    for side in (16, 8):
        assert patches_of(swapped, side) == patches_of(images, side)
    for picture, original, label in zip(swapped, images, labels, strict=True):
        assert torch.equal(picture, original) == (label == 0)
    (exchanged,) = torch.where(labels == 1)
    upper_lower = torch.cat([images[:, :, 32:], images[:, :, :32]], dim=2)
    assert torch.equal(swapped[exchanged], upper_lower[exchanged])


def test_swapping_follows_its_seed_and_takes_about_half():
    images = torch.zeros(1000, 1, 2, 2)
    first, second = (lesson.swap_halves(images, seed=seed)[1] for seed in (1, 2))
    assert torch.equal(first, lesson.swap_halves(images, seed=1)[1])
    assert not torch.equal(first, second)
    assert 400 < first.sum() < 600


@pytest.mark.parametrize("tier", ["easy", "normal"])
def test_pictures_show_exactly_one_thing(tier):
    data = lesson.pictures("val", tier=tier, n=40)
    assert data.images.shape == (40, 3, 64, 64)
    assert all(len(scene.things) == 1 for scene in data.scenes)


@pytest.mark.parametrize("task", CLASSES)
def test_examples_have_the_labels_of_their_task(task):
    recipe = replace(FEW, task=task)
    images, labels = lesson.examples("test", recipe, n=40)
    assert images.shape == (40, 3, 64, 64) and images.dtype == torch.uint8
    assert labels.shape == (40,) and labels.dtype == torch.int64
    data = lesson.pictures("test", tier="easy", n=40)
    if task == "swap":
        assert [torch.equal(a, b) for a, b in zip(images, data.images, strict=True)] == (labels == 0).tolist()
    else:
        assert torch.equal(images, data.images)
        for label, scene in zip(labels.tolist(), data.scenes, strict=True):
            (thing,) = scene.things
            kind, colour = divmod(label, len(COLOURS)) if task == "kind and colour" else (label, None)
            assert tuple(KINDS)[kind] == thing.kind
            assert colour is None or tuple(COLOURS)[colour] == thing.colour


def test_training_never_sees_a_picture_it_is_tested_on():
    seen = {scene.to_json() for scene in lesson.pictures("train", tier="easy", n=600).scenes}
    for split in ("val", "test"):
        assert not seen & {scene.to_json() for scene in lesson.pictures(split, tier="easy", n=40).scenes}


# --- models ----------------------------------------------------------------------------------------------------------


def test_reading_order_keeps_the_first_positions_and_leaves_the_rest_untrained():
    torch.manual_seed(0)
    model = ViT(lesson.MAIN.model)
    torch.nn.init.normal_(model.embed.pos_embed)  # far from the 0.02 of a fresh table
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bigger = lesson.keep_reading_order(model, 96)
    assert bigger.config == replace(model.config, image_size=96)
    table = bigger.embed.pos_embed
    assert table.shape == (1, 37, 128)
    assert torch.equal(table[:, :17], before["embed.pos_embed"])
    assert 0.015 < table[:, 17:].std() < 0.025
    for name, value in bigger.state_dict().items():
        assert name == "embed.pos_embed" or torch.equal(value, before[name])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bigger(torch.zeros(1, 3, 96, 96))[0].shape == (1, 12)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_follows_its_seed():
    def weights(seed: int) -> list[Tensor]:
        return list(lesson.train(FEW, seed=seed, device=CPU, progress=None)[0].parameters())

    first = weights(1)
    torch.rand(5)
    assert all(map(torch.equal, first, weights(1)))
    assert not all(map(torch.equal, first, weights(2)))


def test_training_lowers_the_loss_and_validates_ten_times():
    model, history = lesson.train(replace(FEW, steps=60, lr=3e-3), seed=0, device=CPU, progress=None)
    assert history.metric_steps == list(range(6, 61, 6))
    first, *_, last = history.smooth(window=10)
    assert abs(first - math.log(12)) < 0.3
    assert last < first - 0.1
    images, labels = lesson.examples("val", FEW, n=500)
    assert history.metrics["val accuracy"][-1] == accuracy(predict(model, images)[0], labels)


def test_resolutions_are_measured_on_the_recipes_own_task():
    recipe = replace(lesson.EXPERIMENTS["positions, swap task"]["1d"], steps=1, batch_size=16, fine_tune=1)
    run = lesson.run(recipe, seed=0, device=CPU)
    names = {f"96 px, {name}{tuned}" for name in ("interpolated", "reading order") for tuned in ("", ", tuned")}
    assert run.metrics.keys() == {"test accuracy", *names}
    images, labels = lesson.examples("test", recipe, n=1000, image_size=96)
    assert images.shape[2:] == (96, 96) and set(labels.tolist()) == {0, 1}
    bigger = lesson.at_resolution(run.model, 96)
    assert run.metrics["96 px, interpolated"] == accuracy(predict(bigger, images)[0], labels)


@pytest.mark.parametrize("experiment", ["data", "labels", "positions, swap task"])
def test_short_runs_of_other_experiments_measure_test_accuracy(experiment):
    *_, recipe = lesson.EXPERIMENTS[experiment].values()
    run = lesson.run(replace(recipe, steps=1, batch_size=8, probe=False), seed=0, device=CPU)
    assert run.metrics.keys() == {"test accuracy"}
    assert run.metrics["test accuracy"] == lesson.test_accuracy(run.model, "test", recipe)
    assert run.history.steps == 1 and not run.model.training


def test_the_main_run_measures_everything_on_prepared_pictures(few):
    few.clear()
    lesson.prepare()
    prepared = set(few)
    few.clear()
    run = lesson.run(replace(lesson.MAIN, steps=2, batch_size=16, fine_tune=1), seed=0, device=CPU)
    assert run.metrics.keys() == {
        "test accuracy", *(f"{fact}, {k} shots" for fact in ("kind", "colour", "place") for k in (5, 25)),
        "heldout_colour", "flipped", "crayon", "chalk",
        *(f"96 px, {name}{tuned}" for name in ("interpolated", "reading order") for tuned in ("", ", tuned")),
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in run.metrics.values())
    assert set(few) <= prepared  # else the recorder's processes would all start to draw the same
    assert run.model.config == lesson.MAIN.model  # measuring has not put the larger model in its place


def test_few_shot_probes_read_the_features():
    """Features that spell out the colour give a perfect probe for it, and none for the kind."""

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))
            sets = [lesson.pictures("train", tier="easy", n=600), lesson.pictures("test", tier="easy", n=40)]
            self.known = {image.numpy().tobytes(): label for data in sets
                          for image, label in zip(data.images, data.labels("colour")[0], strict=True)}  # fmt: skip

        def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            colours = torch.stack([self.known[image.numpy().tobytes()] for image in images])
            return torch.zeros(len(images), 12), {"pooled": torch.nn.functional.one_hot(colours, len(COLOURS)).float()}

    numbers = lesson.few_shot(Oracle(), FEW)
    assert numbers["colour, 5 shots"] == numbers["colour, 25 shots"] == 1.0
    assert numbers["kind, 25 shots"] < 0.5


def test_a_run_that_diverges_is_a_result_at_chance():
    run = lesson.run(replace(FEW, steps=12, lr=1e25, warmup=0.0), seed=0, device=CPU)
    assert run.metrics == {"test accuracy": 1 / 12, "diverged": 1.0}
    assert 0 < run.history.steps < 12


def test_an_interrupted_fine_tuning_is_no_result(monkeypatch):
    fit = lesson.fit

    def interrupted(*args: object, **options: object) -> object:
        history = fit(*args, **options)
        if options["steps"] == 1:
            history.stopped = "stopped by hand"
        return history

    monkeypatch.setattr(lesson, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lesson.run(replace(FEW, fine_tune=1), seed=0, device=CPU)
