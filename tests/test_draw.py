"""The picture book's pictures, tested by what can be seen in them and never by exact pixels."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import pytest
from PIL import Image

from minivlp.data.picturebook import draw as module
from minivlp.data.picturebook.draw import FIGURES, draw, draw_many
from minivlp.data.picturebook.sample import sample
from minivlp.data.picturebook.world import COLOURS, KINDS, PLACES, SKIES, STYLES, WEATHERS, Scene, Thing

SIDE = 36.0


def scene_of(
    *, kind="cat", colour="red", place="meadow", sky="day", weather="clear", style="plain", side=SIDE
) -> Scene:
    thing = Thing(kind, colour, "big", 32.0, 34.0, side)
    return Scene(0, 0, "train", "easy", place, sky, weather, (thing,), style)


def pixels(scene: Scene, **options) -> np.ndarray:
    return np.asarray(draw(scene, **options), dtype=np.float32)


@lru_cache(maxsize=256)
def nothing(place: str, sky: str, weather: str, style: str) -> np.ndarray:
    """The same picture without its things."""
    return pixels(replace(scene_of(place=place, sky=sky, weather=weather, style=style), things=()))


def changed(scene: Scene, by: float = 40) -> np.ndarray:
    """Where the things of a scene change its picture plainly: bool (64, 64)."""
    empty = nothing(scene.place, scene.sky, scene.weather, scene.style)
    return np.abs(pixels(scene) - empty).max(axis=2) > by


def inside(thing: Thing, grow: float = 0.0) -> np.ndarray:
    """The pixels whose centres lie in a thing's box: bool (64, 64)."""
    left, top, right, bottom = thing.box
    at = np.arange(64) + 0.5
    columns, rows = (at > left - grow) & (at < right + grow), (at > top - grow) & (at < bottom + grow)
    return rows[:, None] & columns[None, :]


def test_every_kind_has_a_figure_that_fills_its_box():
    assert tuple(FIGURES) == KINDS
    for kind in KINDS:
        points = np.concatenate([shape.points for shape in FIGURES[kind]])
        assert np.abs(points).max() <= 1.02, kind
        # In its longer direction a figure reaches from edge to edge.
        assert np.ptp(points, axis=0).max() >= 1.75, kind
        assert np.ptp(points, axis=0).min() >= 1.2, kind


def test_a_picture_is_drawn_alike_each_time():
    for index, split in enumerate(("train", "crayon", "chalk")):
        scene = sample(index, split=split, tier="hard")
        assert np.array_equal(pixels(scene), pixels(scene))


@pytest.mark.parametrize("style", STYLES)
def test_the_picture_is_the_same_at_every_size(style):
    scene = replace(sample(5, tier="normal"), style=style)

    def coarse(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((16, 16), Image.Resampling.BOX), dtype=np.float32)

    usual = coarse(draw(scene))
    for size in (32, 64, 96, 128):
        picture = draw(scene, size=size)
        assert picture.mode == "RGB"
        assert picture.size == (size, size)
        assert np.abs(coarse(picture) - usual).mean() < 6


def test_a_size_that_shows_nothing_is_refused():
    with pytest.raises(ValueError, match="give 8 or more"):
        draw(sample(0), size=4)


def test_weather_differs_from_picture_to_picture():
    first = scene_of(weather="rain")
    assert np.abs(pixels(first) - pixels(replace(first, index=1))).mean() > 1


# ---- everything that a caption names can be seen ----


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sky", SKIES)
def test_every_colour_stands_out_from_every_background(style, sky):
    for place, colour in product(PLACES, COLOURS):
        scene = scene_of(kind="umbrella", colour=colour, place=place, sky=sky, style=style)
        box = inside(scene.things[0])
        assert changed(scene)[box].mean() > 0.25, (colour, place)
        # Whatever its own colour, the figure has light and dark right beside each other: outline and halo, or chalk.
        light = pixels(scene).mean(axis=2)[box]
        assert np.percentile(light, 95) - np.percentile(light, 5) > 60, (colour, place)


@pytest.mark.parametrize("kind", KINDS)
def test_the_main_area_has_the_colour_of_the_caption(kind):
    for colour, rgb in COLOURS.items():
        for side, share in ((38.0, 0.14), (20.0, 0.07)):
            scene = scene_of(kind=kind, colour=colour, place="sea", side=side)
            near = np.linalg.norm(pixels(scene) - rgb, axis=2) < 36
            assert near[inside(scene.things[0])].mean() > share, (colour, side)


@pytest.mark.parametrize("style", ["crayon", "chalk"])
def test_colours_are_told_apart_in_every_style(style):
    # By the mean of the middle of a ball, wherever it lies: the nearest of the ten means is its own colour's.
    def middle(colour: str, place: str) -> np.ndarray:
        return pixels(scene_of(kind="tree", colour=colour, place=place, style=style))[24:34, 22:42].mean(axis=(0, 1))

    means = {colour: middle(colour, "meadow") for colour in COLOURS}
    for colour, place in product(COLOURS, PLACES):
        seen = middle(colour, place)
        assert min(means, key=lambda other: np.abs(means[other] - seen).sum()) == colour, place


def test_kinds_have_their_own_silhouettes():
    shapes = {kind: changed(scene_of(kind=kind, place="snow"), by=60) for kind in KINDS}
    for one, other in combinations(KINDS, 2):
        union = (shapes[one] | shapes[other]).sum()
        assert (shapes[one] & shapes[other]).sum() / union < 0.85, (one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_stays_within_its_box(kind):
    # The outline and the halo may reach over it a little.
    scene = scene_of(kind=kind)
    assert not changed(scene, by=0)[~inside(scene.things[0], grow=3)].any()


@pytest.mark.parametrize("style", STYLES)
def test_places_skies_and_weathers_look_different(style):
    seen = {key: nothing(*key, style) for key in product(PLACES, SKIES, WEATHERS)}
    for one, other in combinations(seen, 2):
        if sum(a != b for a, b in zip(one, other, strict=True)) == 1:  # one fact changed
            assert np.abs(seen[one] - seen[other]).mean() > 2.5, (one, other)


def test_styles_look_different():
    for index in range(12):
        scene = sample(index, tier="normal")
        pictures = [pixels(replace(scene, style=style)) for style in STYLES]
        for one, other in combinations(pictures, 2):
            assert np.abs(one - other).mean() > 8


def test_things_are_brighter_or_more_colourful_than_backgrounds():
    def saturation(picture: np.ndarray) -> float:
        return float((picture.max(axis=2) - picture.min(axis=2)).mean())

    vivid = [colour for colour in COLOURS if colour not in ("black", "white", "brown", "pink")]
    things = np.mean([np.ptp(COLOURS[colour]) for colour in vivid])
    assert things > 1.8 * np.mean([saturation(nothing(place, "day", "clear", "plain")) for place in PLACES])


# ---- many at once ----


def test_many_pictures_come_as_png_files_in_order():
    scenes = [sample(index, split=("train", "crayon")[index % 2]) for index in range(12)]
    files = draw_many(scenes, size=32, progress=False)
    assert len(files) == 12
    for scene, file in zip(scenes, files, strict=True):
        picture = Image.open(io.BytesIO(file))
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), np.asarray(draw(scene, size=32)))
    assert draw_many([]) == []


def test_processes_draw_the_same_pictures():
    scenes = [sample(index, tier="hard") for index in range(60)]
    assert draw_many(scenes, workers=2, progress=False) == draw_many(scenes, workers=1, progress=False)


def test_without_processes_the_pictures_are_drawn_here(monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("no semaphores here")

    monkeypatch.setattr(module, "ProcessPoolExecutor", refuse)
    scenes = [sample(index) for index in range(4)]
    assert draw_many(scenes, workers=2, progress=False) == draw_many(scenes, workers=1, progress=False)


def test_the_progress_bar_leaves_nothing_behind_and_can_be_silent(capsys):
    draw_many([sample(0)], progress=False)
    assert capsys.readouterr() == ("", "")
    draw_many([sample(0)], progress=True)
    assert "drawing" in capsys.readouterr().err
