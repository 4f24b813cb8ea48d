"""Plots: every valid input draws, words stay apart and inside, mistakes are explained, pictures are reproducible."""

from __future__ import annotations

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Affine2D, Bbox
from PIL import Image

from minivlp import plots

RNG = np.random.default_rng(0)
PICTURES = torch.from_numpy(RNG.integers(0, 256, (24, 3, 16, 16), dtype=np.uint8))
LONG = "a small red umbrella on the snow under a starry night sky while it rains"
CAPTIONS = [LONG, "umbrella", "$1 or $2 of a_b"] * 8
KINDS = "house tree car boat cat dog fish bird balloon flower umbrella ball".split()
STEPS = np.arange(20, 901, 20)
RUNS = 2.4 * np.exp(-STEPS / 200) + 0.05 * RNG.normal(size=(10, len(STEPS)))


def shares(*shape: int) -> np.ndarray:
    return RNG.dirichlet(np.full(np.prod(shape[-2:]), 0.3), shape[:-2]).reshape(shape)


def seeds(labels: list[str], n: int = 5) -> dict[str, list[float]]:
    return {label: list(0.8 + 0.1 * RNG.random(n)) for label in labels}


def scoreboard(**more: object) -> Figure:
    given = {"points": PAID, "groups": FAMILIES, "sizes": PARAMETERS, "size_label": "parameters"}
    return plots.trade_off(**{**given, **more}, xlabel="ms", ylabel="R@1")


def heap(n: int, kind: str = "model") -> Figure:
    """A trade-off of n models that are all alike."""
    names = [f"{kind} {i}" for i in range(n)]
    return plots.trade_off(dict.fromkeys(names, (500, 0.5)), groups=dict.fromkeys(names, "a"), xlabel="x", ylabel="y")


TIMES = {
    "linear patches": {"image embedding": 0.4, "blocks": 12.3},
    "small ResNet": {"image embedding": 8.0, "region features": 20, "blocks": 12.5},
}
RATIOS, COST = [0, 0.25, 0.5, 0.75], [1, 0.78, 0.53, 0.31]
SHOTS = [1, 2, 4, 8, 16, 32]
PROBE = np.linspace(0.3, 0.9, 6)[:, None] + 0.02 * RNG.normal(size=(6, 5))  # (shots, seeds)
BLOCKS = np.array([[0.9, 0.1, 0.02, 0.98], [0.4, 0.6, 1, 0], [0.5, 0.5, 0.5, 0.5]])  # (layers, 4)
CLOUDS = {"before": {"pictures": RNG.normal(size=(40, 2)), "texts": RNG.normal(size=(40, 2)) + 5},
          "after": {"pictures": RNG.normal(size=(40, 2)), "texts": 3 * RNG.normal(size=(40, 2))}}  # fmt: skip
EPOCHS = np.array([1.5, 3, 6])
PANELS = {
    "clean": {"A": (EPOCHS, RNG.random((3, 3))), "B": (EPOCHS, RNG.random((3, 3)))},
    "20 % of the captions exchanged": {k: (EPOCHS, RNG.random((3, 3))) for k in ("B", "A, fit", "B, fit")},
    "40 %": {k: (EPOCHS, RNG.random((3, 3))) for k in ("A", "B", "A, fit", "B, fit")},
}
GALLERIES = {"fusion": [8, 16, 32, 64], "dual": [64, 128, 256, 512, 1000]}
SECONDS = {"fusion": [0.02, 0.07, 0.26, 1.1], "dual": [0.09, 0.11, 0.25, 0.43, 0.9]}
STARTS = {start: seeds(["pictures found", "statements about two pictures"], 3)
          for start in ("nothing", "image", "text", "image + text")}  # fmt: skip
PAID = {"ViLT": (594_904, 0.0), "CLIP": (824, 0.54), "FLIP": (1209, 0.64), "ALBEF": (8401, 0.19), "VLMo": (651, 0.068),
        "BLIP": (409, 0.106), "BLIP-2": (1000, 0.26)}  # fmt: skip
FAMILIES = {"ViT": "no texts", "ViLT": "single stream", **dict.fromkeys(("CLIP", "FLIP"), "dual encoder"),
            **dict.fromkeys(("ALBEF", "VLMo", "BLIP"), "fusion + dual"), "BLIP-2": "bridge"}  # fmt: skip
PARAMETERS = {"ViT": 895_628, "ViLT": 1_023_702, "CLIP": 1_772_033, "FLIP": 968_705, "ALBEF": 1_905_623,
              "VLMo": 1_766_744, "BLIP": 1_641_687, "BLIP-2": 2_600_000}  # fmt: skip
JUDGED = [("web", LONG, True), ("synthetic", "an umbrella", False), ("human", "$1 or $2 of a_b", None)]
ARMS = [f"{p}-norm, {w}" for p in ("pre", "post") for w in ("warm-up", "no warm-up at all")]
PLOTS = {
    "pictures": lambda: plots.picture_grid(
        PICTURES[:16], CAPTIONS[:16], title=LONG * 2, frames=torch.arange(16) % 3 > 0
    ),
    "pictures, few": lambda: plots.picture_grid([Image.new("RGB", (40, 20))], [LONG], frames=["#0072B2"], title=LONG),
    "pictures, floats": lambda: plots.picture_grid(PICTURES.float() / 127.5 - 1),
    "captioned": lambda: plots.captioned_pictures(
        PICTURES[:5], [JUDGED, JUDGED[:1], JUDGED[1:], JUDGED[2:], JUDGED * 2], title=LONG * 2
    ),
    "captioned, one": lambda: plots.captioned_pictures(
        [Image.new("RGB", (40, 20))], [[(LONG, LONG * 3, True), ("", "", False)]], marks=("right", "wrong")
    ),
    "captioned, three columns": lambda: plots.captioned_pictures(
        PICTURES[:3].float() / 127.5 - 1, [JUDGED, [(LONG, LONG, False)], JUDGED[:2]], columns=3
    ),
    "patches": lambda: plots.patch_grid(PICTURES[0], 4),
    "patches, many": lambda: plots.patch_grid(PICTURES[0].numpy().repeat(4, 1).repeat(4, 2), 4),
    "masked": lambda: plots.masked_pictures(
        PICTURES[:9], torch.rand(9, 16).argsort(1)[:, :8], 4, titles=CAPTIONS[:9], title=LONG * 2
    ),
    "masked, mixed": lambda: plots.masked_pictures(
        [Image.new("RGB", (40, 20))] * 3, [None, [0], np.arange(8)], 5, titles=["whole", LONG, "all"], columns=2
    ),
    "masked, none": lambda: plots.masked_pictures(PICTURES[:2].float() / 127.5 - 1, None, 8),
    "filters": lambda: plots.filters(RNG.normal(size=(28, 3, 8, 8)), title="filters"),
    "curves": lambda: plots.curves(
        {"this run": RUNS[0]}, x=STEPS, band=(STEPS, RUNS), hline=(2.48, "ln 12"), title="t"
    ),
    "curves, two": lambda: plots.curves(
        {"train": RUNS[0], "val": list(RUNS[1][::5])}, x={"train": STEPS, "val": STEPS[::5]}, band={"val": RUNS[:, ::5]}
    ),
    "curves, plain": lambda: plots.curves({"accuracy": torch.rand(5, requires_grad=True)}),
    "curves, seconds": lambda: plots.curves(
        {"whole": RUNS[0], "half removed": RUNS[1]},
        x={"whole": 0.2 * STEPS, "half removed": 0.11 * STEPS},
        xlabel="seconds of training",
        ylabel="kinds named right",
        hline=(1 / 12, "chance"),
    ),
    "curves, diverged": lambda: plots.curves({"loss": [2.0, 40.0, float("nan")]}),
    "crossing": lambda: plots.crossing(
        [250, 1000, 4000, 16_000],
        {"ViT": RNG.random((4, 5)), "CNN": RNG.random(4)},
        xlabel="pictures",
        ylabel="accuracy",
    ),
    "crossing, shots": lambda: plots.crossing(
        SHOTS, {"linear probe": PROBE}, xlabel="pictures per class", ylabel="accuracy", hline=(0.62, "zero-shot")
    ),
    "cost": lambda: plots.cost_curve(
        RATIOS,
        {"time": COST, "memory": torch.rand(4, 5)},
        {"time": [1, 0.76, 0.52, 0.28], LONG: [1.0, 0.75, 0.5, 0.25]},
        ylabel="cost, whole pictures = 1",
        title="t",
    ),
    "cost, plain": lambda: plots.cost_curve([0, 1], {"$t$_a": [12_345.0, 8]}, ylabel="milliseconds", xlabel="share"),
    "cost, many": lambda: plots.cost_curve(np.linspace(0, 0.9, 31), {"t": np.linspace(2, 0.1, 31)}, ylabel="time"),
    "bars": lambda: plots.ablation_bars(
        seeds(["none", "1d", "2d"]), ylabel="accuracy", chance=1 / 12, paper={"1d": 0.64}
    ),
    "bars, long labels": lambda: plots.ablation_bars(seeds([*ARMS, LONG]), ylabel="accuracy", chance=1 / 12, title="t"),
    "bars, many": lambda: plots.ablation_bars(seeds(KINDS, 3), ylabel="accuracy", chance=0.08, title="t", start=0.5),
    "bars, one seed": lambda: plots.ablation_bars(seeds(["a", "b"], 1), ylabel="accuracy", start=0.5),
    "grouped": lambda: plots.grouped_bars(STARTS, ylabel="accuracy", chance=0.5, title="t"),
    "grouped, many": lambda: plots.grouped_bars(
        {k: seeds(["a", "b", "c", LONG]) for k in [*KINDS[:6], LONG]}, ylabel="accuracy", chance=0.001
    ),
    "grouped, one seed": lambda: plots.grouped_bars({"$a_b$": {"a": [0.5]}, "d": {"b": [-0.2]}}, ylabel="gain"),
    "growth": lambda: plots.growth(GALLERIES, SECONDS, xlabel="pictures", ylabel="seconds", title="t"),
    "growth, alike": lambda: plots.growth(
        {k: torch.tensor([1, 2, 3, 4, 5]) for k in ("$a_b$", LONG, "c", LONG + "!")},
        {k: [0.5, 1, 1.5, 2 + 0.01 * i, 2.5] for i, k in enumerate(("$a_b$", LONG, "c", LONG + "!"))},
        xlabel="n",
        ylabel="seconds",
    ),
    "growth, flat": lambda: plots.growth({"a": [1, 1_000_000]}, {"a": [3, 3]}, xlabel="n", ylabel="seconds"),
    "growth, steep": lambda: plots.growth({"a": [10, 11]}, {"a": [1e-5, 1e5]}, xlabel="n", ylabel="seconds"),
    "trade-off": lambda: scoreboard(title="t"),
    "trade-off, one size": lambda: plots.trade_off(
        {k: torch.tensor(xy) for k, xy in PAID.items()}, groups=FAMILIES, xlabel="ms", ylabel="R@1"
    ),
    "trade-off, on one spot": lambda: heap(30, "a model, number"),
    "trade-off, long": lambda: plots.trade_off(
        {LONG + "!" * i: (100**i, i % 3) for i in range(7)},
        groups={LONG + "!" * i: LONG + "?" * i for i in range(7)},
        sizes={LONG + "!" * i: 3 for i in range(7)},
        size_label=LONG * 2,
        xlabel="x",
        ylabel="y",
        title=LONG * 3,
    ),
    "trade-off, one": lambda: plots.trade_off(
        {"$a_b$": (3e-4, 2e6)}, groups={"$a_b$": "$g_h$"}, xlabel="x", ylabel="y"
    ),
    "trade-off, wide numbers": lambda: plots.trade_off(
        {"a": (1e9, 1e9), "b": (1e12, 1e9 + 1)}, groups={"a": "c", "b": "d"}, xlabel="x", ylabel="y"
    ),
    "trade-off, a line": lambda: plots.trade_off(
        {f"a model {i}": (1e11 + 1e12 * i, -0.1) for i in range(10)},
        groups={f"a model {i}": "ab"[i % 2] for i in range(10)},
        xlabel="x",
        ylabel="y",
    ),
    "similarity": lambda: plots.similarity_matrix(RNG.normal(size=(4, 4)), CAPTIONS[:4], CAPTIONS[:4], title=LONG),
    "similarity, 16": lambda: plots.similarity_matrix(RNG.normal(size=(16, 16)), CAPTIONS[:16], CAPTIONS[:16]),
    "similarity, 64": lambda: plots.similarity_matrix(torch.randn(64, 64).bfloat16(), range(64), range(64), title="t"),
    "similarity, one row": lambda: plots.similarity_matrix([[0.1, 0.9]], ["x"], ["a", "b"], title="t"),
    "similarity, short labels": lambda: plots.similarity_matrix(
        RNG.normal(size=(8, 8)), None, ["a cat", "a small red car", "four houses", "a dog and a cat on the snow"] * 2
    ),
    "pairs": lambda: plots.picture_text_matrix(RNG.normal(size=(8, 8)), PICTURES[:8], CAPTIONS[:8], title=LONG * 2),
    "pairs, short": lambda: plots.picture_text_matrix(
        np.eye(8) - 0.5, PICTURES[:8].float() / 127.5 - 1, ["a cat", "two small red cats"] * 4, bar="cosine"
    ),
    "pairs, 20": lambda: plots.picture_text_matrix(torch.eye(20), PICTURES[:20], (CAPTIONS * 2)[:20], title="t"),
    "pairs, one picture": lambda: plots.picture_text_matrix(
        [[0.7, 0.2, 0.1]], [Image.new("RGB", (40, 20))], ["house", "tree", "boat"], diagonal=False, bar="probability"
    ),
    "over time": lambda: plots.similarity_over_time(
        RNG.normal(size=(3, 32, 32)), ["start", "step 400", "end, after 2,000 steps of training"], title=LONG
    ),
    "over time, wide": lambda: plots.similarity_over_time(
        [torch.randn(4, 12).bfloat16() * 1000] * 5, [LONG] * 5, axes=("classes", "pictures"), bar="logit"
    ),
    "over time, one": lambda: plots.similarity_over_time([np.eye(3)], ["start"]),
    "ranked": lambda: plots.ranked_pictures(
        [LONG, "umbrella", LONG * 3], PICTURES, torch.arange(15).view(3, 5), truth=[2, 23, [10, 14]], title=LONG * 2
    ),
    "ranked, ten": lambda: plots.ranked_pictures(
        [LONG * 2] * 3, PICTURES, np.arange(24).repeat(2)[:30].reshape(3, 10), truth=[20, 21, 22]
    ),
    "ranked, mixed shapes": lambda: plots.ranked_pictures(
        ["$1 or $2 of a_b"] * 2, [Image.new("RGB", (40, 20)), Image.new("RGB", (20, 40))], [[0, 1], [1, 0]]
    ),
    "partners": lambda: plots.partner_pictures(
        PICTURES,
        [0, 1, 2],
        {"any": [3, 4, 5], "drawn by similarity": torch.tensor([6, 7, 8]), LONG: [9, 9, 9]},
        CAPTIONS,
        title=LONG * 2,
    ),
    "partners, one": lambda: plots.partner_pictures(PICTURES, [0], {"any": [1]}, [LONG * 3] * 24, page="$a_b$"),
    "word maps": lambda: plots.word_maps_on_pictures(
        PICTURES[:7], shares(7, 4, 4), [LONG] * 7, boxes=[(3.5, 2, 9, 16)] * 3 + [None] * 4, title=LONG * 2
    ),
    "word maps, two": lambda: plots.word_maps_on_pictures(
        PICTURES[:3], torch.rand(3, 2, 4, 4), [("Grad-CAM", "attention")] * 3
    ),
    "word maps, one": lambda: plots.word_maps_on_pictures([Image.new("RGB", (40, 20))], np.zeros((1, 2, 4)), ["a"]),
    "clouds": lambda: plots.two_clouds(CLOUDS, lines=5, title=LONG),
    "clouds, three panels": lambda: plots.two_clouds({k: {"a": torch.randn(9, 2)} for k in (LONG, "b", "c")}),
    "clouds, one point": lambda: plots.two_clouds({"t": {"$a$": [[0.5, 0.5]]}}),
    "panels": lambda: plots.curve_panels(
        PANELS, ylabel="share", xlabel="epoch", dashed=["A, fit", "B, fit"], hline=(0.1, "chance"), title=LONG
    ),
    "panels, long": lambda: plots.curve_panels({LONG: {LONG: (STEPS, RUNS), "b": (STEPS, RUNS[0])}}, ylabel="loss"),
    "confusion": lambda: plots.confusion(RNG.integers(0, 90, (12, 12)), KINDS, title="t"),
    "confusion, empty class": lambda: plots.confusion(np.array([[3, 1], [0, 0]]), ["swapped", "as it was"]),
    "overlay": lambda: plots.attention_overlay(PICTURES[0], shares(4, 4, 4), titles=["block 1"] * 4, title="t"),
    "overlay, heads": lambda: plots.attention_overlay(PICTURES[0], shares(4, 4, 4, 4)),
    "overlay, twelve": lambda: plots.attention_overlay(PICTURES[0], shares(12, 8, 8)),
    "overlay, one": lambda: plots.attention_overlay(PICTURES[0], np.zeros((1, 4, 4))),
    "plan": lambda: plots.transport_plan(PICTURES[0], shares(4, 4, 4), ["a", "red", "umbrella", "."]),
    "plan, boxes": lambda: plots.transport_plan(
        PICTURES[0], shares(9, 4, 4) / 9, LONG.split()[:9], boxes=[(3.5, 2, 9, 16)] * 3 + [None] * 6, title=LONG
    ),
    "plan, one": lambda: plots.transport_plan(PICTURES[0], torch.ones(1, 8, 8) / 64, [LONG]),
    "histograms": lambda: plots.histograms(
        {"matching pairs": RNG.normal(0.4, 0.1, 300), "other pairs": torch.rand(40)},
        xlabel="transport distance",
        vline=(0.1, "a threshold"),
        title="t",
    ),
    "histograms, one value": lambda: plots.histograms({"a": [0.5]}, xlabel="distance", bins=5),
    "histograms, four": lambda: plots.histograms({k: RNG.normal(size=50) for k in KINDS[:4]}, xlabel="distance"),
    "times": lambda: plots.stacked_times(TIMES, xlabel="milliseconds a batch", title="t"),
    "times, long": lambda: plots.stacked_times({LONG: {"a": 1234.5}, "b": {"b": 0}, "c": {"a": 3}}, xlabel="ms"),
    "blocks": lambda: plots.block_attention(BLOCKS, even=0.4, title="t"),
    "blocks, twelve": lambda: plots.block_attention(torch.full((12, 4), 0.5)),
    "positions": lambda: plots.position_similarity(RNG.normal(size=(16, 8)), 4, title="t"),
    "positions, 14": lambda: plots.position_similarity(RNG.normal(size=(196, 8)), 14),
    "positions, wide": lambda: plots.position_similarity(RNG.normal(size=(12, 8)), (3, 4)),
    "distance": lambda: plots.attention_distance(
        RNG.uniform(5, 40, (4, 4)), 68, hline=(31, "a head that looks everywhere")
    ),
    "distance, 12": lambda: plots.attention_distance(RNG.uniform(5, 200, (12, 12)), 310, title="t"),
}
every_plot = pytest.mark.parametrize("name", PLOTS)


@pytest.fixture(autouse=True)
def style():
    plots.use_style()


def words(fig: Figure) -> list[Text]:
    """The texts that are drawn. Labels of ticks beyond an axis' limits, or of an axis that is off, are not."""
    FigureCanvasAgg(fig).draw()
    ticks = [(axis, set(axis._update_ticks() if ax.axison else [])) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)]
    hidden = {id(label) for axis, drawn in ticks for t in axis.get_major_ticks() if t not in drawn
              for label in (t.label1, t.label2)}  # fmt: skip
    return [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible() and id(t) not in hidden]


@every_plot
def test_words_lie_inside_the_figure_and_never_on_each_other(name):
    fig = PLOTS[name]()
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in words(fig)]
    outside = [
        text for text, b in boxes if b.x0 < -0.5 or b.y0 < -0.5 or b.x1 > fig.bbox.x1 + 0.5 or b.y1 > fig.bbox.y1 + 0.5
    ]
    assert not outside
    together = [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)]
    assert not together


@every_plot
def test_fits_a_notebook_and_is_white_and_readable(name):
    fig = PLOTS[name]()
    assert isinstance(fig, Figure)
    assert fig.get_figwidth() * fig.dpi <= 900
    assert fig.get_facecolor() == (1, 1, 1, 1)
    assert all(t.get_fontsize() >= 8 for t in words(fig))


def test_the_same_input_gives_the_same_bytes():
    history = {"this run": RUNS[0]}
    assert _png(plots.curves(history, band=RUNS)) == _png(plots.curves(history, band=RUNS))
    grid = [plots.picture_grid(PICTURES, CAPTIONS) for _ in range(2)]
    assert _png(grid[0]) == _png(grid[1])
    assert _png(plots.curves(history)) != _png(plots.curves(history, band=RUNS))


def test_pyplot_keeps_no_figure_which_a_notebook_would_show_twice():
    plots.curves({"loss": [2.0, 1.0]})
    assert not plt.get_fignums()


def test_a_long_caption_pushes_the_next_row_down():
    short = plots.picture_grid(PICTURES[:16], ["one"] * 16).get_figheight()
    long = plots.picture_grid(PICTURES[:16], [LONG] * 16).get_figheight()
    assert long > short + 2 * plots.text_height(3, plots.SMALL)


def test_right_and_wrong_have_a_mark_beside_their_colour():
    fig = plots.picture_grid(PICTURES[:3], frames=[True, False, None])
    marks = [t.get_text() for t in fig.findobj(Text) if t.get_text() in "✓✗" and t.get_text()]
    assert marks == ["✓", "✗"]
    edges = {to_hex(p.get_edgecolor()).upper() for p in fig.findobj(Rectangle) if not p.get_fill()}
    assert edges == {plots.RIGHT.upper(), plots.WRONG.upper()}


def test_each_picture_has_its_own_texts_beside_it_and_verdicts_in_words_and_marks():
    rows = [[("web", f"a web text {LONG} {i}", i % 2 == 0), ("synthetic", f"written {i}", None)] for i in range(5)]
    rows[3].append(("synthetic", "another", np.bool_(False)))
    fig = plots.captioned_pictures(PICTURES[:5], rows)
    ax, texts = fig.axes[0], words(fig)
    places = [image.get_window_extent() for image in ax.images]
    for image, original in zip(ax.images, PICTURES, strict=False):
        np.testing.assert_array_equal(image.get_array(), plots.picture(original))
    assert places[0].y1 == places[1].y1 > places[2].y1 > places[4].y1 and places[0].x0 == places[2].x0 == places[4].x0

    def beside(i: int) -> list[Text]:
        """What stands at the right of a picture, before the next one, in the order of drawing."""
        right = min([p.x0 for p in places if p.x0 > places[i].x1], default=fig.bbox.x1)
        low = max([p.y1 for p in places if p.y1 < places[i].y0], default=0)
        mine = [(Text.get_window_extent(t), t) for t in texts]
        mine = [(b, t) for b, t in mine if places[i].x1 < b.x0 < right and low < b.y0 < places[i].y1]
        assert all(a.y1 > b.y1 - 5 for (a, _), (b, _) in itertools.pairwise(mine))  # from top to bottom
        return [t for _, t in mine]

    for i, row in enumerate(rows):
        said = []
        for label, text, verdict in row:
            said += [label] + ([] if verdict is None else ["✓", "kept"] if verdict else ["✗", "dropped"]) + [text]
        assert [" ".join(t.get_text().split()) for t in beside(i)] == said
    colours = {t.get_text(): t.get_color() for t in texts}
    assert colours["web"] == colours[next(text for text in colours if text.startswith("a web"))] != colours["synthetic"]
    assert colours["written 0"] == colours["synthetic"] and colours["kept"] != colours["dropped"]
    squares = [to_hex(p.get_facecolor()).upper() for p in ax.patches]
    assert squares == [plots.RIGHT.upper(), plots.WRONG.upper()] * 2 + [plots.WRONG.upper(), plots.RIGHT.upper()]


def test_long_texts_push_the_next_row_of_pictures_down():
    def height(text: str) -> float:
        return plots.captioned_pictures(PICTURES[:4], [[("web", text, True)] * 2] * 4).get_figheight()

    assert height(LONG * 3) > height("one") + 4 * plots.text_height(3, plots.SMALL)


def test_colours_of_texts_can_be_read_on_white():
    for colour in (*plots.TEXT_COLOURS, plots.RIGHT, plots.WRONG):
        light = np.dot([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in _rgb(colour)],
                       (0.2126, 0.7152, 0.0722))  # fmt: skip
        assert 1.05 / (light + 0.05) > 4.5, colour


def test_uint8_and_the_models_floats_are_the_same_picture():
    floats = PICTURES[0].float() / 127.5 - 1
    np.testing.assert_array_equal(plots.picture(PICTURES[0]), plots.picture(floats))
    np.testing.assert_array_equal(plots.picture(PICTURES[0]), PICTURES[0].permute(1, 2, 0).numpy())


def test_patches_are_numbered_and_cut_in_reading_order():
    fig = plots.patch_grid(PICTURES[0], 4)
    _, *parts = fig.axes[0].images
    assert len(parts) == 16
    np.testing.assert_array_equal(parts[6].get_array(), plots.picture(PICTURES[0])[4:8, 8:12])
    numbers = sorted((t for t in words(fig) if t.get_text().isdigit()), key=lambda t: int(t.get_text()))
    assert [int(t.get_text()) for t in numbers] == list(range(16))
    left, right, bottom, _ = parts[6].get_extent()
    assert left < numbers[6].get_position()[0] < right and bottom - 0.1 < numbers[6].get_position()[1] < bottom


def striped(image: np.ndarray, P: int) -> set[int]:
    """The patches, numbered in reading order, of which nothing but grey in two shades is left."""
    H, W = image.shape[0] // P, image.shape[1] // P
    parts = image.reshape(H, P, W, P, 3).transpose(0, 2, 1, 3, 4).reshape(H * W, -1, 3)
    return {i for i, part in enumerate(parts) if len(np.unique(part, axis=0)) == 2 and (part == part[:, :1]).all()}


def test_exactly_the_removed_patches_are_striped_and_the_others_untouched():
    keep = torch.rand(3, 16).argsort(dim=1)[:, :6]  # in the order of the noise, not of the places
    fig = plots.masked_pictures(PICTURES[:3], keep, 4, titles=["a", "b", "c"])
    for image, row, original in zip(fig.axes[0].images, keep.tolist(), PICTURES, strict=False):
        shown, whole = image.get_array(), plots.picture(original)
        assert striped(shown, 4) == {*range(16)} - {*row}
        for i in row:
            place = np.s_[i // 4 * 4 : i // 4 * 4 + 4, i % 4 * 4 : i % 4 * 4 + 4]
            np.testing.assert_array_equal(shown[place], whole[place])
    assert [t.get_text() for t in words(fig)] == ["a", "b", "c"]
    wide = plots.masked_pictures([Image.new("RGB", (40, 20))], [[5]], 10)  # 2 x 4 patches: rows are not columns
    assert striped(wide.axes[0].images[0].get_array(), 10) == {0, 1, 2, 3, 4, 6, 7}


def test_pictures_without_anything_removed_are_whole_and_the_given_ones_stay_as_they_are():
    before = PICTURES[:3].clone()
    mixed = plots.masked_pictures(PICTURES[:3], [None, [0], None], 4).axes[0].images
    for i in (0, 2):
        np.testing.assert_array_equal(mixed[i].get_array(), plots.picture(PICTURES[i]))
    assert striped(mixed[1].get_array(), 4) == {*range(1, 16)}
    whole = plots.masked_pictures(PICTURES[:3], None, 4).axes[0].images
    np.testing.assert_array_equal(whole[1].get_array(), plots.picture(PICTURES[1]))
    assert torch.equal(PICTURES[:3], before)


def test_stripes_are_seen_on_any_plain_colour():
    for grey in (0, 192, 222, 255):
        flat = Image.new("RGB", (16, 16), (grey,) * 3)
        shown = plots.masked_pictures([flat], [[0]], 8).axes[0].images[0].get_array()
        assert striped(shown, 8) == {1, 2, 3} and (shown[:8, :8] == grey).all()


def test_costs_are_joined_means_over_the_removed_share_with_every_number_below():
    runs = np.array([[1.0, 1.0], [0.7, 0.9], [0.5, 0.6], [0.3, 0.4]])
    fig = plots.cost_curve(RATIOS, {"time": runs, "memory": COST}, {"time": [1, 0.76, 0.52, 0.28]}, ylabel="cost")
    ax = fig.axes[0]
    joined = [line for line in ax.lines if line.get_linestyle() == "-"]
    np.testing.assert_allclose(joined[0].get_xydata(), np.stack([RATIOS, runs.mean(1)], 1))
    np.testing.assert_allclose(joined[1].get_ydata(), COST)
    assert sorted(y for line in ax.lines if line.get_marker() == "." for y in line.get_ydata()) == sorted(runs.flat)
    (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert dashed.get_marker() == "None" and dashed.get_color() == joined[0].get_color() != joined[1].get_color()
    np.testing.assert_allclose(dashed.get_ydata(), [1, 0.76, 0.52, 0.28])
    assert ax.get_ylim()[0] == 0  # else a saving looks larger than it is
    places = {name: Text.get_window_extent(t) for t in words(fig) if (name := " ".join(t.get_text().split()))
              in ("time", "memory", "time, cost model", "0 %", "25 %", "50 %", "75 %")}  # fmt: skip
    middle = {name: ((b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2) for name, b in places.items()}
    for name, row in {"time": runs.mean(1), "memory": COST, "time, cost model": [1, 0.76, 0.52, 0.28]}.items():
        boxes = [
            (t.get_text(), Text.get_window_extent(t)) for t in words(fig) if t.get_text().startswith(("0.", "1.0"))
        ]
        found = {text: (b.x0 + b.x1) / 2 for text, b in boxes
                 if b.x0 > places[name].x1 and abs((b.y0 + b.y1) / 2 - middle[name][1]) < 4}  # fmt: skip
        assert list(found) == [f"{v:.2f}" for v in row]
        assert list(found.values()) == pytest.approx([middle[f"{100 * r:g} %"][0] for r in RATIOS], abs=2)


def test_the_band_spans_all_earlier_runs():
    fig = plots.curves({"this run": RUNS[0]}, x=STEPS, band=(STEPS, RUNS))
    (band,) = fig.findobj(PolyCollection)
    y = band.get_paths()[0].vertices[:, 1]
    assert y.min() == pytest.approx(RUNS.min()) and y.max() == pytest.approx(RUNS.max())
    assert any("10 earlier runs" in t.get_text() for t in words(fig))


def test_bars_print_mean_and_sample_deviation_and_every_seed():
    fig = plots.ablation_bars({"a": [0.5, 0.6, 0.7], "b": [0.9]}, ylabel="accuracy")
    texts = [t.get_text() for t in words(fig)]
    assert "0.600\n± 0.100" in texts and "0.900" in texts
    dots = [line for line in fig.axes[0].lines if line.get_marker() == "o"]
    assert [len(d.get_ydata()) for d in dots] == [3, 1]
    assert fig.axes[0].get_ylim()[0] == 0


def test_a_cut_axis_says_so_and_long_labels_lie_flat():
    cut = plots.ablation_bars({"a": [0.9], "b": [0.95]}, ylabel="accuracy", start=0.8)
    assert "starts at 0.8" in cut.axes[0].get_ylabel() and cut.axes[0].get_ylim()[0] == 0.8
    flat = plots.ablation_bars(seeds([LONG, LONG + "!", "short", "d", "e"]), ylabel="accuracy")
    assert flat.axes[0].get_xlabel() == "accuracy" and flat.axes[0].get_ylim()[0] > flat.axes[0].get_ylim()[1]


def test_grouped_bars_are_means_and_each_seed_is_a_dot_on_its_own_bar():
    table = {"nothing": {"found": [0.1, 0.2, 0.3], "told": [0.6, 0.5]}, "image": {"told": [0.7]}}
    fig = plots.grouped_bars(table, ylabel="accuracy", chance=0.5)
    (ax,) = fig.axes
    bars = [bar for group in ax.containers for bar in group if isinstance(bar, Rectangle)]
    assert [bar.get_height() for bar in bars] == pytest.approx([0.2, 0.55, 0.7])
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
    assert -0.5 < spans[0][0] < spans[0][1] < spans[1][0] < spans[1][1] < 0.5 < spans[2][0]
    assert spans[2][0] - 1 == pytest.approx(spans[1][0])  # a place is kept for what a group lacks
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    for line, (left, right), values in zip(dots, spans, ([0.1, 0.2, 0.3], [0.6, 0.5], [0.7]), strict=True):
        assert list(line.get_ydata()) == values
        assert len({*line.get_xdata()}) == len(values) and left < min(line.get_xdata()) <= max(line.get_xdata()) < right
    assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [plots.BLUE, plots.VERMILLION, plots.VERMILLION]
    whiskers = [bar.errorbar for bar in ax.containers if getattr(bar, "errorbar", None)]
    reach = [np.ptp(whisker[2][0].get_segments()[0][:, 1]) / 2 for whisker in whiskers]
    assert reach == pytest.approx([np.std(v, ddof=1) for v in ([0.1, 0.2, 0.3], [0.6, 0.5])])
    legend = ["found", "told", "one seed (whiskers: standard deviation)", "chance 0.5"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == legend
    assert {"0.200", "0.550", "0.700", "nothing", "image"} <= {t.get_text() for t in words(fig)}


def test_bars_of_gains_and_losses_leave_zero_in_both_directions_and_few_have_room_for_numbers():
    fig = plots.grouped_bars({"a": {"b": [0.1]}, "c": {"b": [-0.3]}}, ylabel="gain")
    low, high = fig.axes[0].get_ylim()
    assert low < -0.3 and high > 0.1
    assert "one seed" not in " ".join(t.get_text() for t in words(fig))
    full = plots.grouped_bars({k: seeds(["a", "b", "c", "d", "e"]) for k in KINDS}, ylabel="accuracy")
    assert not full.axes[0].texts


def test_a_slope_is_the_exponent_of_a_power_and_fitted_by_least_squares():
    n = np.array([8, 16, 32, 64])
    assert plots.growth_slope(n, 3e-4 * n**2) == pytest.approx(2)
    assert plots.growth_slope(torch.from_numpy(n), [5.0] * 4) == pytest.approx(0)
    sizes, seconds = GALLERIES["dual"], SECONDS["dual"]
    fitted = np.polyfit(np.log(sizes), np.log(seconds), 1)[0]
    assert plots.growth_slope(sizes, seconds) == pytest.approx(fitted)
    ends = np.log(seconds[-1] / seconds[0]) / np.log(sizes[-1] / sizes[0])
    assert fitted != pytest.approx(ends, rel=1e-3)  # else this test could not tell the two apart


def test_growth_names_each_line_and_its_slope_at_its_end():
    fig = plots.growth(GALLERIES, SECONDS, xlabel="pictures", ylabel="seconds")
    (ax,) = fig.axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    texts = {t.get_text() for t in words(fig)}  # drawn: a label knows its place from then on
    lines, points = ([line for line in ax.lines if (line.get_marker() == "None") == fit] for fit in (True, False))
    labels = {t.get_text().split(":")[0]: t for t in ax.texts}
    for name, line, dots in zip(GALLERIES, lines, points, strict=True):
        np.testing.assert_allclose(dots.get_xydata(), np.stack([GALLERIES[name], SECONDS[name]], 1))
        slope = plots.growth_slope(GALLERIES[name], SECONDS[name])
        assert labels[name].get_text() == f"{name}: slope {slope:.1f}"
        (x0, y0), (x1, y1) = np.log(line.get_xydata())
        assert (y1 - y0) / (x1 - x0) == pytest.approx(slope)
        off = np.log(SECONDS[name]) - y0 - slope * (np.log(GALLERIES[name]) - x0)
        assert off.sum() == pytest.approx(0, abs=1e-9)  # the line goes through the middle of its points
        end, box = line.get_transform().transform(line.get_xydata())[-1], Text.get_window_extent(labels[name])
        assert 0 < box.x0 - end[0] < 15 and box.y0 < end[1] < box.y1
        assert line.get_color() == dots.get_color()
    assert {"8", "64", "1,000", "0.1", "1"} <= texts
    ends = {"a": 12, "b": 10, "c": 11}
    high = plots.growth({k: [1, 10] for k in ends}, {k: [1, v] for k, v in ends.items()}, xlabel="", ylabel="")
    places = {t.get_text()[0]: Text.get_window_extent(t).y0 for t in words(high) if "slope" in t.get_text()}
    assert places["b"] < places["c"] < places["a"]  # those that are pushed apart stay in order


def outlines(fig: Figure) -> list[np.ndarray]:
    """The corners (n, 2) of each mark of a trade-off, in pixels, in the order of drawing."""
    found = []
    for mark in fig.axes[0].collections:
        (path,), (scale,), (middle,) = mark.get_paths(), mark.get_transforms(), mark.get_offsets()
        at = mark.get_offset_transform().transform(middle)
        found.append(np.concatenate(path.to_polygons(Affine2D(scale), closed_only=False)) + at)
    return found


def labels_of(fig: Figure) -> dict[str, Bbox]:
    """The names beside the marks of a trade-off, and where they stand."""
    return {" ".join(t.get_text().split()): Text.get_window_extent(t) for t in words(fig)
            if t in fig.axes[1].texts and t.get_weight() == "bold"}  # fmt: skip


def distance(points: np.ndarray, box: Bbox) -> float:
    """From a box to the nearest of the points, in pixels."""
    return float(np.hypot(*(points - np.clip(points, box.min, box.max)).T).min())


def test_each_name_stands_beside_its_own_mark_and_all_marks_are_whole():
    fig = scoreboard()
    ax, labels = fig.axes[0], labels_of(fig)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear") and not fig.axes[1].lines
    assert list(labels) == [*PAID]  # and no others, though more have a group and a size
    marks = dict(zip([tuple(mark.get_offsets()[0]) for mark in ax.collections], outlines(fig), strict=True))
    assert set(marks) == {*PAID.values()}
    for name, xy in PAID.items():
        away = {at: distance(mark, labels[name]) for at, mark in marks.items()}
        assert min(away, key=away.get) == xy and 1 < away[xy] < 15, name
    inside = ax.get_window_extent()
    for mark in marks.values():
        assert (mark > inside.min).all() and (mark < inside.max).all()
    assert {"0", "0.3", "0.6", "1,000", "100,000"} <= {t.get_text() for t in words(fig)}


def test_areas_are_in_proportion_to_the_sizes_whatever_the_shape_and_groups_share_shape_and_colour():
    fig = scoreboard()
    ax, names = fig.axes[0], {xy: name for name, xy in PAID.items()}
    order = [names[tuple(mark.get_offsets()[0])] for mark in ax.collections]
    assert order == sorted(order, key=PARAMETERS.get, reverse=True)  # a small mark is not hidden by a large one

    def area(corners: np.ndarray) -> float:
        x, y = (corners - corners.mean(axis=0)).T
        return abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2

    ratio = [area(mark) / PARAMETERS[name] for name, mark in zip(order, outlines(fig), strict=True)]
    assert ratio == pytest.approx([ratio[0]] * len(ratio), rel=0.01)
    looks = {name: (to_hex(mark.get_facecolor()[0]), mark.get_paths()[0].vertices.tobytes())
             for name, mark in zip(order, ax.collections, strict=True)}  # fmt: skip
    shown = {kind: {looks[name] for name in PAID if FAMILIES[name] == kind} for kind in FAMILIES.values()}
    assert not shown.pop("no texts") and all(len(look) == 1 for look in shown.values())
    assert [len({*parts}) for parts in zip(*(look for (look,) in shown.values()), strict=True)] == [4, 4]
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == [*shown]
    for handle, (look,) in zip(legend.legend_handles, shown.values(), strict=True):
        shape = handle.get_marker()
        shape = MarkerStyle(shape).get_path().transformed(MarkerStyle(shape).get_transform())
        assert (to_hex(handle.get_color()), shape.vertices.tobytes()) == look
    assert "area of a mark: parameters, 968,705 to 2,600,000" in {t.get_text() for t in words(fig)}
    alike = [area(mark) for mark in outlines(PLOTS["trade-off, one size"]())]
    assert alike == pytest.approx([alike[0]] * 7, rel=0.01) and alike[0] < 0.5 * ratio[0] * PARAMETERS["BLIP-2"]


def test_lines_lead_to_names_without_room_beside_their_mark_and_the_axes_grow_for_many():
    few, many = heap(8), heap(40, "a model, number")
    assert many.get_figheight() > few.get_figheight() == heap(1).get_figheight()
    for fig in (few, many):
        labels, sheet = labels_of(fig), fig.axes[1]
        inside, mark = fig.axes[0].get_window_extent(), np.concatenate(outlines(fig))
        assert len(sheet.lines) == len(labels)
        for line, box in zip(sheet.lines, labels.values(), strict=True):
            start, end = line.get_transform().transform(line.get_xydata())
            assert np.hypot(*(mark - start).T).min() < 3 and distance(end[None], box) < 6
            assert (box.min > inside.min).all() and (box.max < inside.max).all()
    boxes = labels_of(few)
    for line, own in zip(few.axes[1].lines, boxes, strict=True):  # so few need not cross each other out
        way = line.get_transform().transform(np.linspace(*line.get_xydata(), 200))
        assert not [name for name, box in boxes.items() if name != own and distance(way, box) == 0]


@pytest.mark.parametrize("seed", [26, 87, 142])  # where the first free places would let a line go through a label
def test_no_label_is_put_on_the_line_of_another_and_no_line_through_a_label(seed):
    middles, labels = np.random.default_rng(seed).uniform((2, 1), (3, 1.5), (8, 2)), [(0.6, 0.17)] * 8
    found = plots._beside(middles, np.full(8, 0.08), labels, (7.0, 2.9))
    ways = {i: np.linspace(middle, tip, 200) for i, (middle, (_, tip)) in enumerate(zip(middles, found, strict=True))
            if tip is not None}  # fmt: skip
    assert ways
    for i, (box, _) in enumerate(found):
        assert not [k for k, way in ways.items() if k != i and distance(way, Bbox.from_extents(*box)) == 0]


def test_names_of_groups_and_models_are_no_formulas():
    fig = PLOTS["trade-off, one"]()
    plain = [t for t in words(fig) if "$" in t.get_text()]
    assert {t.get_text() for t in plain} == {"$a_b$", "$g_h$"} and not any(t.get_parse_math() for t in plain)


def test_a_level_crosses_curves_over_doubled_numbers_of_shots():
    ax = plots.crossing(SHOTS, {"linear probe": PROBE}, xlabel="", ylabel="", hline=(0.62, "zero-shot")).axes[0]
    assert ax.get_xscale() == "log" and list(ax.get_xticks()) == SHOTS
    assert [list(line.get_ydata()) for line in ax.lines if line.get_linestyle() == "--"] == [[0.62, 0.62]]
    assert {"zero-shot", "linear probe", *map(str, SHOTS)} <= {t.get_text() for t in words(ax.figure)}


def test_pictures_stand_beside_their_rows_and_frames_on_the_diagonal():
    scores = RNG.normal(size=(3, 5))
    fig = plots.picture_text_matrix(scores, PICTURES[:3], KINDS[:5])
    ax = fig.axes[0]
    heat, *shown = ax.images
    np.testing.assert_array_equal(heat.get_array(), scores)
    for r, image in enumerate(shown):
        np.testing.assert_array_equal(image.get_array(), plots.picture(PICTURES[r]))
        left, right, low, high = image.get_extent()
        assert left < right < -0.5 and (low + high) / 2 == pytest.approx(r) and 0.8 < low - high < 1
        box = image.get_window_extent()
        assert box.width == pytest.approx(box.height) and box.x0 > 0
    assert len(shown) == 3
    frames = [p.get_bbox().bounds for p in ax.patches if to_hex(p.get_edgecolor()).upper() == plots.ORANGE]
    assert frames == [(i - 0.5, i - 0.5, 1, 1) for i in range(3)]
    texts = [t.get_text() for t in words(fig)]
    assert {"pictures", "texts", "similarity", *KINDS[:5], *(f"{v:.2f}" for v in scores.flat)} <= set(texts)
    bare = plots.picture_text_matrix(scores, PICTURES[:3], KINDS[:5], numbers=False, diagonal=False)
    assert not [t for t in bare.axes[0].texts if t.get_text()] and not bare.axes[0].patches


def test_cells_print_no_negative_zero():
    texts = [t.get_text() for t in words(plots.similarity_matrix([[-0.001, -0.006], [0.004, 0.25]]))]
    assert {"0.00", "-0.01", "0.25"} <= set(texts) and "-0.00" not in texts


def test_short_texts_over_columns_are_wrapped_and_long_ones_turned():
    def labels(texts: list[str]) -> list[Text]:
        return plots.picture_text_matrix(np.eye(8), PICTURES[:8], texts).axes[0].get_xticklabels()

    upright = labels(["a small red car on the snow"] * 8)
    assert {t.get_rotation() for t in upright} == {0} and upright[0].get_text().count("\n") >= 2
    assert " ".join(upright[0].get_text().split()) == "a small red car on the snow"
    assert {t.get_rotation() for t in labels(["a cat"] * 7 + [LONG])} == {90}
    assert {t.get_rotation() for t in labels(["a cat"] * 7 + ["an unbelievable cat"])} == {90}


def test_matrices_over_time_share_one_scale_and_one_bar():
    matrices = [np.full((4, 4), v) + 0.1 * np.eye(4) for v in (0.0, 0.3, -0.2)]
    fig = plots.similarity_over_time(matrices, ["start", "middle", "end"])
    panels = [ax for ax in fig.axes if ax.images]
    assert len(panels) == 3 and len(fig.axes) == 4
    for ax, m in zip(panels, matrices, strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), m)
        assert ax.images[0].get_clim() == pytest.approx((-0.2, 0.4))
        box = ax.get_window_extent()
        assert box.width == pytest.approx(box.height)
    assert {"start", "middle", "end", "pictures", "texts", "similarity"} <= {t.get_text() for t in words(fig)}


def test_ranked_pictures_stand_in_the_order_of_the_ranking_and_the_true_ones_are_framed():
    order = np.array([[7, 3, 5], [1, 0, 2], [9, 8, 4]])
    fig = plots.ranked_pictures(["one", LONG, "three"], PICTURES, order, truth=[5, [0, 2], 6])
    ax = fig.axes[0]
    assert len(ax.images) == 9
    for image, i in zip(ax.images, order.flat, strict=True):
        np.testing.assert_array_equal(image.get_array(), plots.picture(PICTURES[i]))
    places = [image.get_extent() for image in ax.images]  # (left, right, low, high)
    assert all(a[1] < b[0] and a[2] == b[2] for a, b in itertools.pairwise(places) if a[3] == b[3])
    assert len({place[3] for place in places}) == 3 and places[0][2] > places[3][3] > places[6][3]
    frames = [p for p in ax.patches if not p.get_fill()]
    assert {to_hex(p.get_edgecolor()).upper() for p in frames} == {plots.RIGHT.upper()}
    framed = [np.argmin([abs(p.get_x() - left) + abs(p.get_y() - low) for left, _, low, _ in places]) for p in frames]
    assert framed == [2, 4, 5]
    texts = {t.get_text(): t.get_position()[1] for t in words(fig)}
    missing = [y for text, y in texts.items() if "none of these belongs" in text]
    assert len(missing) == 1 and places[6][2] < missing[0] < places[6][3]
    assert [place for place in ("best: 1", "2", "3") if place in texts] == ["best: 1", "2", "3"]
    (sentence,) = [text for text in texts if text.startswith("a small red")]
    assert "\n" in sentence and " ".join(sentence.split()) == LONG
    bare = plots.ranked_pictures(["one"], PICTURES, order[:1])
    assert not bare.axes[0].patches and not any("belongs" in t.get_text() for t in words(bare))


def test_each_row_shows_a_page_and_its_partners_under_their_headings():
    ways = {"any": [7, 3], "drawn by similarity": [1, 0]}
    names = [f"caption {i}" for i in range(24)]
    fig = plots.partner_pictures(PICTURES, [5, 9], ways, names)
    ax = fig.axes[0]
    order = [5, 7, 1, 9, 3, 0]
    for image, i in zip(ax.images, order, strict=True):
        np.testing.assert_array_equal(image.get_array(), plots.picture(PICTURES[i]))
    texts = {t.get_text(): Text.get_window_extent(t) for t in words(fig)}
    assert set(texts) == {"the page", *ways, *(names[i] for i in order)}
    places = [image.get_window_extent() for image in ax.images]
    for k, (image, i) in enumerate(zip(places, order, strict=True)):  # a caption stands right below its picture
        below, middle = texts[names[i]], (image.x0 + image.x1) / 2
        assert 0 < image.y0 - below.y1 < 15 and abs((below.x0 + below.x1) / 2 - middle) < 2
        above = texts[["the page", *ways][k % 3]]
        assert above.y0 > image.y1 - 1 and abs((above.x0 + above.x1) / 2 - middle) < 2


def test_each_picture_has_its_own_map_and_the_frame_of_its_own_thing():
    maps = np.full((3, 2, 4, 4), 0.01)
    for i in range(3):
        maps[i, :, i, i + 1] = 0.8
    titles = [(f"left {i}", f"right {i}") for i in range(3)]
    fig = plots.word_maps_on_pictures(PICTURES[:3], maps, titles, boxes=[None, (4, 8, 12, 16), None])
    images = fig.axes[0].images
    heats = [im for im in images if im.get_array().shape == (4, 4, 4)]
    peaks = [np.unravel_index(heat.get_array()[..., 3].argmax(), (4, 4)) for heat in heats]
    assert peaks == [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3)]
    whole = [im for im in images if im.get_array().dtype == np.uint8]
    for i, image in enumerate(whole):  # a picture, then the same picture in grey under each of its maps
        np.testing.assert_array_equal(image.get_array(), plots.picture(PICTURES[i]))
        left, right, low, high = image.get_extent()
        own = [heat.get_extent() for heat in heats[2 * i : 2 * i + 2]]
        assert [tuple(place[2:]) for place in own] == [(low, high)] * 2 and right < own[0][0] < own[1][0]
    pale = [im.get_array() for im in images if im.get_array().shape == (16, 16, 3) and im not in whole]
    grey = plots.picture(PICTURES[1]).mean(axis=2) / 255 * 0.5 + 0.5
    np.testing.assert_allclose(pale[2][..., 0], grey)
    frames = [p for p in fig.findobj(Rectangle) if to_hex(p.get_edgecolor()).upper() == plots.BLUE]
    assert len(frames) == 2
    for frame, heat in zip(frames, heats[2:4], strict=True):
        left, right, low, high = heat.get_extent()
        corners = (frame.get_bbox().get_points() - (left, low)) / (right - left, high - low)
        np.testing.assert_allclose(corners, [[0.25, 0], [0.75, 0.5]], atol=1e-9)
    assert {name for pair in titles for name in pair} <= {t.get_text() for t in words(fig)}


def test_clouds_have_one_scale_and_lines_join_true_pairs():
    fig = plots.two_clouds(CLOUDS, lines=3)
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in fig.axes}) == 1
    for ax, parts in zip(fig.axes, CLOUDS.values(), strict=True):
        points = [line for line in ax.lines if line.get_marker() != "None"]
        assert len({line.get_marker() for line in points}) == len({line.get_color() for line in points}) == 2
        for line, xy in zip(points, parts.values(), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), xy)
            assert (np.abs(xy - np.mean([ax.get_xlim(), ax.get_ylim()], axis=1)) < np.diff(ax.get_xlim()) / 2).all()
        joins = [line.get_xydata() for line in ax.lines if line.get_marker() == "None" and len(line.get_xdata())]
        np.testing.assert_array_equal(joins, np.stack([xy[:3] for xy in parts.values()], axis=1))
    assert {"pictures", "texts", "a true pair", "before", "after"} == {t.get_text() for t in words(fig)}


def test_a_curve_has_one_look_in_all_panels_and_spans_its_seeds():
    fig = plots.curve_panels(PANELS, ylabel="share", dashed=["A, fit", "B, fit"])
    assert [" ".join(ax.get_title("left").split()) for ax in fig.axes] == [*PANELS]
    looks: dict[str, set] = {}
    for ax, lines in zip(fig.axes, PANELS.values(), strict=True):
        names = [name for name in ("A", "B", "A, fit", "B, fit") if name in lines]
        for name, line, band in zip(names, ax.lines, ax.collections, strict=True):
            xs, runs = lines[name]
            np.testing.assert_allclose(line.get_xydata(), np.stack([xs, runs.mean(axis=0)], axis=1))
            y = band.get_paths()[0].vertices[:, 1]
            assert (y.min(), y.max()) == pytest.approx((runs.min(), runs.max()))
            looks.setdefault(name, set()).add((line.get_color(), line.get_linestyle()))
    assert {name: [*look] for name, look in looks.items()} == {
        "A": [(plots.BLUE, "-")], "B": [(plots.VERMILLION, "-")],
        "A, fit": [(plots.BLUE, "--")], "B, fit": [(plots.VERMILLION, "--")],
    }  # fmt: skip
    assert len({ax.get_ylim() for ax in fig.axes}) == 1


def test_confusion_colours_shares_of_the_row_and_prints_counts():
    fig = plots.confusion(np.array([[30, 10], [0, 5]]), ["cat", "dog"])
    np.testing.assert_allclose(fig.axes[0].images[0].get_array(), [[0.75, 0.25], [0, 1]])
    texts = [t.get_text() for t in words(fig)]
    assert {"30", "10", "5", "true", "predicted"} <= set(texts) and "0" not in texts


def test_position_maps_stand_where_their_patch_is():
    pos = np.eye(6)  # each position is like itself alone: the map of patch (r, c) has one bright cell, at (r, c)
    fig = plots.position_similarity(pos, (2, 3))
    sheet = fig.axes[0].images[0].get_array()
    bright = list(zip(*np.nonzero(np.ma.filled(sheet, 0) == 1), strict=True))
    assert [(int(y), int(x)) for y, x in bright] == [(r * 3 + r, c * 4 + c) for r in range(2) for c in range(3)]


def test_overlay_is_strongest_where_attention_is():
    maps = np.full((1, 4, 4), 0.01)
    maps[0, 2, 1] = 0.85
    fig = plots.attention_overlay(PICTURES[0], maps)
    heat = next(im for im in fig.axes[0].images if im.get_array().shape == (4, 4, 4)).get_array()
    assert np.unravel_index(heat[..., 3].argmax(), (4, 4)) == (2, 1)
    assert any("max 0.85" in t.get_text() for t in words(fig))


def test_the_plan_lies_where_its_mass_is_and_the_box_where_the_thing_is():
    plan = np.full((2, 4, 4), 0.01)
    plan[1, 2, 1] = 0.345
    fig = plots.transport_plan(PICTURES[0], plan, ["a", "dog"], boxes=[None, (4, 8, 12, 16)])
    _, heat = [im for im in fig.axes[0].images if im.get_array().shape == (4, 4, 4)]
    assert np.unravel_index(heat.get_array()[..., 3].argmax(), (4, 4)) == (2, 1)
    left, right, bottom, top = heat.get_extent()
    frames = [p for p in fig.findobj(Rectangle) if not p.get_fill()]
    assert {to_hex(p.get_edgecolor()).upper() for p in frames} == {"#FFFFFF", plots.BLUE}
    for frame in frames:  # the lower half of the picture, its second and third quarter from the left
        corners = (frame.get_bbox().get_points() - (left, bottom)) / (right - left, top - bottom)
        np.testing.assert_allclose(corners, [[0.25, 0], [0.75, 0.5]], atol=1e-9)
    texts = [t.get_text() for t in words(fig)]
    assert "dog\nmax 0.345" in texts and any("Blue frame" in t for t in texts)
    bare = plots.transport_plan(PICTURES[0], plan, ["a", "dog"], boxes=[None, None])
    assert not any("Blue frame" in t.get_text() for t in words(bare))


def test_histograms_share_their_bins_and_each_adds_up_to_one():
    groups = {"near": [0.1, 0.2, 0.2, 0.3], "far": [0.9, 1.1]}
    ax = plots.histograms(groups, xlabel="distance", bins=10).axes[0]
    filled = [[b for b in bars if isinstance(b, Rectangle)] for bars in ax.containers]
    assert [sum(b.get_height() for b in bars) for bars in filled] == pytest.approx([1, 1])
    edges = [[b.get_x() for b in bars] for bars in filled]
    assert len(edges[0]) == 10 and edges[0] == edges[1]
    assert [edges[0][0], filled[0][-1].get_x() + filled[0][-1].get_width()] == pytest.approx([0.1, 1.1])
    assert {"near: mean 0.2 (n = 4)", "far: mean 1 (n = 2)"} <= {t.get_text() for t in words(ax.figure)}


def test_stacked_times_put_parts_end_to_end_and_print_the_total():
    fig = plots.stacked_times(TIMES, xlabel="ms")
    image, blocks, regions = fig.axes[0].containers
    spans = [[(b.get_x(), b.get_width()) for b in bars] for bars in (image, blocks, regions)]
    np.testing.assert_allclose(spans, [[(0, 0.4), (0, 8)], [(0.4, 12.3), (8, 12.5)], [(12.7, 0), (20.5, 20)]])
    texts = [t.get_text() for t in words(fig)]
    assert {"12.7", "40.5", "12.3", "20", *TIMES, "image embedding", "blocks", "region features"} <= set(texts)
    assert "0.4" not in texts and "0" not in {t.get_text() for t in fig.axes[0].texts}  # too short to hold a number
    low, high = fig.axes[0].get_ylim()
    assert low > high  # the first row is the upper one


def test_shares_of_attention_stand_in_two_panels_that_are_full_to_the_top():
    fig = plots.block_attention(BLOCKS, even=0.4)
    for ax, who, columns in zip(fig.axes, ("text", "image"), (BLOCKS[:, :2], BLOCKS[:, 2:]), strict=True):
        assert ax.get_title("left").startswith(who)
        at_text, at_image = ax.containers
        np.testing.assert_allclose([b.get_height() for b in at_text], columns[:, 0])
        np.testing.assert_allclose([(b.get_y(), b.get_height()) for b in at_image], columns)
        assert to_hex(at_text[0].get_facecolor()).upper() == plots.ORANGE
        (level,) = ax.lines
        assert list(level.get_ydata()) == [0.4, 0.4]
    assert not plots.block_attention(BLOCKS).axes[0].lines


@pytest.mark.parametrize("text", [LONG, "Donaudampfschifffahrtsgesellschaftskapitän", "", "a\nb c", "$x$ _y_"])
def test_wrapped_lines_fit_and_keep_every_letter(text):
    lines = plots.wrap(text, 1.0, 9).split("\n")
    assert all(plots.text_width(line, 9) <= 1.0 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())


def test_measured_text_is_never_narrower_than_drawn():
    fig = plots.new_figure(8, 2)
    for size, weight in itertools.product((8, 9, 11), ("normal", "bold")):
        for string in (LONG, "multi-head attention", "z ← z + MSA(LN(z))"):
            drawn = fig.text(0, 0, string, fontsize=size, weight=weight).get_window_extent()
            assert drawn.width <= 100 * plots.text_width(string, size, weight) + 0.5
            assert drawn.height <= 100 * plots.text_height(1, size)


def test_the_palette_can_be_told_apart():
    assert len(set(plots.CYCLE)) == 7
    greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(_rgb, (plots.BLUE, plots.VERMILLION, plots.ORANGE))]
    assert np.diff(sorted(greys)).min() > 0.04  # in a grey print as well


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.picture_grid([]), "no pictures to show"),
        (lambda: plots.picture_grid(PICTURES[0]), "must have 4 dimensions"),
        (lambda: plots.picture_grid(PICTURES.permute(0, 2, 3, 1)), r"shape \(3, H, W\)"),
        (lambda: plots.picture_grid(PICTURES.float()), "uint8, or floats in"),
        (lambda: plots.picture_grid(PICTURES, ["one"]), "captions has 1 entries for 24 pictures"),
        (lambda: plots.picture_grid(PICTURES, frames=[True]), "frames has 1 entries for 24 pictures"),
        (lambda: plots.captioned_pictures(PICTURES, [JUDGED]), "rows has 1 entries for 24 pictures"),
        (lambda: plots.captioned_pictures(PICTURES[:2], [JUDGED, []]), r"rows\[1\] must be one text or more"),
        (lambda: plots.captioned_pictures(PICTURES[:1], [[("a", "b")]]), "each as .label, text, verdict."),
        (lambda: plots.captioned_pictures(PICTURES[:9], [JUDGED] * 9, columns=9), "no room for the marks"),
        (lambda: plots.patch_grid(PICTURES[0], 5), "cannot be cut into whole 5x5 patches"),
        (lambda: plots.masked_pictures(PICTURES[:1], None, 5), "cannot be cut into whole 5x5 patches"),
        (lambda: plots.masked_pictures(PICTURES[:2], [[0]], 4), "keep has 1 entries for 2 pictures"),
        (lambda: plots.masked_pictures(PICTURES[:1], [[16]], 4), r"keep\[0\] must be places from 0 to 15"),
        (lambda: plots.masked_pictures(PICTURES[:1], [[-1]], 4), "must be places from 0 to 15"),
        (lambda: plots.masked_pictures(PICTURES[:1], [[0.5]], 4), "must be places from 0 to 15"),
        (lambda: plots.masked_pictures(PICTURES[:1], torch.ones(1, 16) > 0, 4), "must be places from 0 to 15"),
        (lambda: plots.masked_pictures(PICTURES[:1], [[]], 4), "at least one, of 16 patches"),
        (lambda: plots.masked_pictures(PICTURES[:1], [0], 4), r"keep\[0\] must have 1 dimensions"),
        (lambda: plots.masked_pictures(PICTURES[:1], None, 4, titles=["a", "b"]), "captions has 2 entries"),
        (lambda: plots.cost_curve([0, 50], {"a": [1, 2]}, ylabel=""), "shares from 0 to 1"),
        (lambda: plots.cost_curve([0.5, 0], {"a": [1, 2]}, ylabel=""), "ascending"),
        (lambda: plots.cost_curve([0], {"a": [1]}, ylabel=""), "two or more"),
        (lambda: plots.cost_curve([0, 0.5], {}, ylabel=""), "measured is empty"),
        (lambda: plots.cost_curve([0, 0.5], {"a": [1]}, ylabel=""), r"measured\['a'\] has 1 entries for 2 ratios"),
        (lambda: plots.cost_curve([0, 0.5], {"a": [1, 2]}, {"b": [1]}, ylabel=""), r"model\['b'\] has 1 entries"),
        (lambda: plots.cost_curve([0, 0.5], {"a": [1, np.nan]}, ylabel=""), "must be finite numbers"),
        (lambda: plots.filters(np.zeros((4, 48))), "must have 4 dimensions"),
        (lambda: plots.filters(np.zeros((4, 1, 8, 8))), r"shape \(n, 3, P, P\)"),
        (lambda: plots.curves({}), "history is empty"),
        (lambda: plots.curves({"a": RUNS}), "must have 1 dimensions"),
        (lambda: plots.curves({"a": RUNS[0]}, x=[1, 2]), "45 entries for 2 positions"),
        (lambda: plots.curves({"a": RUNS[0]}, band=RUNS[:, :5]), "5 entries for 45 positions"),
        (lambda: plots.curves({"a": RUNS[0]}, band={"b": RUNS}), "'b' belongs to no curve"),
        (lambda: plots.crossing([0, 1], {"a": [1, 2]}, xlabel="", ylabel=""), "logx=False"),
        (lambda: plots.crossing([1, 2], {"a": [1, 2, 3]}, xlabel="", ylabel=""), "3 entries for 2 values of x"),
        (lambda: plots.ablation_bars({}, ylabel=""), "groups is empty"),
        (lambda: plots.ablation_bars({"a": []}, ylabel=""), "give at least one seed"),
        (lambda: plots.ablation_bars({"a": [1.0]}, ylabel="", paper={"b": 1.0}), "'b' is not among the groups"),
        (lambda: plots.grouped_bars({}, ylabel=""), "at least one group"),
        (lambda: plots.grouped_bars({"a": {"b": [1]}, "c": {}}, ylabel=""), "each group at least one series"),
        (lambda: plots.grouped_bars({"a": {"b": []}}, ylabel=""), r"table\['a'\]\['b'\] must be finite numbers"),
        (lambda: plots.grouped_bars({"a": {"b": [np.nan]}}, ylabel=""), "one a seed, at least one"),
        (lambda: plots.growth({}, {}, xlabel="", ylabel=""), "seconds is empty"),
        (lambda: plots.growth({"a": [1, 2]}, {"b": [1, 2]}, xlabel="", ylabel=""), "'a' is not in both"),
        (
            lambda: plots.growth({"a": [1, 2]}, {"a": [1]}, xlabel="", ylabel=""),
            "'a': seconds has 1 entries for 2 sizes",
        ),
        (lambda: plots.growth_slope([1, 2], [0, 1]), "finite numbers > 0"),
        (lambda: plots.growth_slope([-1, 2], [1, 1]), "finite numbers > 0"),
        (lambda: plots.growth_slope([1, 2], [1, np.inf]), "leave out the sizes that failed"),
        (lambda: plots.growth_slope([2, 2], [1, 1]), r"two different sizes or more, not \[2.0\]"),
        (lambda: plots.growth_slope([[1, 2]], [1, 1]), "sizes must have 1 dimensions"),
        (lambda: plots.trade_off({}, groups={}, xlabel="", ylabel=""), "points is empty"),
        (lambda: scoreboard(points={"GIT": (1, 2)}), "groups has no entry for 'GIT': give one for each name in points"),
        (lambda: scoreboard(sizes={"CLIP": 3}), "sizes has no entry for 'ViLT'"),
        (lambda: scoreboard(sizes=None), "sizes and size_label belong together"),
        (lambda: scoreboard(size_label=None), "give both or neither"),
        (lambda: scoreboard(sizes=PARAMETERS | {"FLIP": 0}), "sizes must be finite numbers > 0"),
        (lambda: scoreboard(sizes=PARAMETERS | {"FLIP": None}), "sizes must be finite numbers > 0"),
        (lambda: scoreboard(points={"ViT": (None, 0.5)}), r"points\['ViT'\] must be two finite .* not \(None, 0.5\)"),
        (lambda: scoreboard(points={"ViT": (0, 0.5)}), "with x > 0, not .0, 0.5.: leave out a name without numbers"),
        (lambda: scoreboard(points={"ViT": (1, 2, 3)}), r"points\['ViT'\] must be two finite numbers"),
        (lambda: scoreboard(points={"ViT": 3}), r"points\['ViT'\] must have 1 dimensions"),
        (lambda: plots.similarity_matrix(np.zeros(4)), "must have 2 dimensions"),
        (lambda: plots.similarity_matrix(np.zeros((2, 3)), ["a"]), "row_labels has 1 entries for 2 rows"),
        (lambda: plots.picture_text_matrix(np.zeros(4), PICTURES, CAPTIONS), "scores must have 2 dimensions"),
        (lambda: plots.picture_text_matrix(np.eye(3), PICTURES, ["a"] * 3), "images has 24 entries for 3 rows"),
        (lambda: plots.picture_text_matrix(np.eye(24), PICTURES, ["a"]), "texts has 1 entries for 24 columns"),
        (lambda: plots.similarity_over_time([], []), "matrices is empty"),
        (lambda: plots.similarity_over_time([np.eye(2)], []), "titles has 0 entries for 1 matrices"),
        (lambda: plots.similarity_over_time([np.eye(2), np.eye(3)], ["a", "b"]), r"\[1\] has the shape \(3, 3\)"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [1, 2]), "rankings must have 2 dimensions"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [[1], [2]]), "rankings has 2 entries for 1 queries"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [[1]], truth=[1, 2]), "truth has 2 entries for 1 queries"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [range(11)]), "the best 1 to 10"),
        (lambda: plots.ranked_pictures([], PICTURES, np.zeros((0, 3), int)), "one query at least"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [[24]]), "indices from 0 to 23, of 24 pictures"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [[-1]]), "indices from 0 to 23"),
        (lambda: plots.ranked_pictures(["a"], PICTURES, [[0.5]]), "indices from 0 to 23"),
        (lambda: plots.picture_grid(PICTURES, columns=8, headings=["a"]), "headings has 1 entries for 8 columns"),
        (lambda: plots.partner_pictures(PICTURES, [0], {}, CAPTIONS), "one name at least"),
        (lambda: plots.partner_pictures(PICTURES, [0], {"the page": [1]}, CAPTIONS), "none of them 'the page'"),
        (lambda: plots.partner_pictures(PICTURES, [0], {"any": [1, 2]}, CAPTIONS), "2 entries for 1 pages"),
        (lambda: plots.partner_pictures(PICTURES, [0], {"any": [24]}, CAPTIONS), "'any' must be indices from 0 to 23"),
        (lambda: plots.partner_pictures(PICTURES, [-1], {"any": [1]}, CAPTIONS), "must be indices from 0 to 23"),
        (lambda: plots.partner_pictures(PICTURES, [0], {"any": [1]}, ["a"]), "captions has 1 entries for 24 pictures"),
        (lambda: plots.word_maps_on_pictures(PICTURES[:2], np.ones((2, 16)), ["a"] * 2), "3 or 4 dimensions"),
        (lambda: plots.word_maps_on_pictures(PICTURES[:2], np.ones((3, 4, 4)), ["a"] * 2), "3 entries for 2 pictures"),
        (lambda: plots.word_maps_on_pictures(PICTURES[:1], -np.ones((1, 4, 4)), ["a"]), "clamp them first"),
        (
            lambda: plots.word_maps_on_pictures(PICTURES[:1], np.ones((1, 2, 4, 4)), ["ab"]),
            r"titles\[0\] has 1 entries for 2 maps of a picture",
        ),
        (
            lambda: plots.word_maps_on_pictures(PICTURES[:1], np.ones((1, 4, 4)), ["a"], boxes=[(9, 0, 3, 4)]),
            r"boxes\[0\] is \(9, 0, 3, 4\)",
        ),
        (lambda: plots.two_clouds({}), "at least one panel"),
        (lambda: plots.two_clouds({"a": {"b": np.ones((3, 3))}}), r"points of shape \(N, 2\), not \(3, 3\)"),
        (lambda: plots.two_clouds({"a": {"b": [[0, np.nan]]}}), "must be finite points"),
        (lambda: plots.two_clouds({"a": {"b": [[0, 1]]}, "c": {"d": [[0, 1]]}}), "give b in each"),
        (lambda: plots.two_clouds({"a": {"b": [[0, 1]]}}, lines=1), "not of one length"),
        (lambda: plots.curve_panels({}, ylabel=""), "at least one panel"),
        (lambda: plots.curve_panels({"a": {"b": ([1], [1])}}, ylabel="", dashed=["c"]), "'c', which is no curve"),
        (lambda: plots.curve_panels({"a": {"b": ([1, 2], [[1]])}}, ylabel=""), "1 entries for 2 positions"),
        (lambda: plots.confusion(np.zeros((2, 3)), ["a", "b"]), r"shape \(2, 2\)"),
        (lambda: plots.attention_overlay(PICTURES[0], np.zeros((4, 4))), "3 or 4 dimensions"),
        (lambda: plots.attention_overlay(PICTURES[0], np.zeros((2, 4, 4)), titles=["a"]), "titles has 1 entries"),
        (lambda: plots.attention_overlay(PICTURES[0], np.zeros((1, 16, 4, 4))), "show 12 at most"),
        (lambda: plots.transport_plan(PICTURES[0], np.zeros((2, 16)), ["a", "b"]), "must have 3 dimensions"),
        (lambda: plots.transport_plan(PICTURES[0], np.zeros((0, 4, 4)), []), "plan has no words"),
        (lambda: plots.transport_plan(PICTURES[0], np.zeros((2, 4, 4)), ["a"]), "words has 1 entries for 2 maps"),
        (lambda: plots.transport_plan(PICTURES[0], np.zeros((1, 4, 4)), ["a"], boxes=[]), "boxes has 0 entries"),
        (
            lambda: plots.transport_plan(PICTURES[0], np.zeros((1, 4, 4)), ["a"], boxes=[(9, 0, 3, 4)]),
            r"boxes\[0\] is \(9, 0, 3, 4\): give \(left, top, right, bottom\)",
        ),
        (lambda: plots.histograms({}, xlabel=""), "groups is empty"),
        (lambda: plots.histograms({"a": []}, xlabel=""), r"groups\['a'\] must be finite numbers, at least one"),
        (lambda: plots.histograms({"a": [1, float("nan")]}, xlabel=""), "must be finite numbers"),
        (lambda: plots.stacked_times({}, xlabel=""), "at least one row"),
        (lambda: plots.stacked_times({"a": {}}, xlabel=""), "each row at least one part"),
        (lambda: plots.stacked_times({"a": {"b": -1}}, xlabel=""), r"rows\['a'\]\['b'\] is -1"),
        (lambda: plots.block_attention(np.ones((3, 2))), r"shape \(layers, 4\)"),
        (lambda: plots.block_attention([[0.5, 0.5, 0.5, 0.4]]), "image tokens look at in layer 1 adds up to 0.9"),
        (lambda: plots.position_similarity(np.zeros((17, 8)), 4), "leave out the class token"),
        (lambda: plots.position_similarity(np.zeros((20, 8)), 4), "20 rows for 4 x 4 patches"),
        (lambda: plots.attention_distance(np.zeros(4), 60), "must have 2 dimensions"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _rgb(colour: str) -> tuple[float, float, float]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
