"""Drawings: words fit their boxes, nothing lies over words, colours tell modalities apart, bad input is explained."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from minivlp import diagrams
from minivlp.diagrams import Canvas
from minivlp.lessons.vlmo import MAIN
from minivlp.models.blip import MED, BLIPConfig
from minivlp.models.blip2 import (
    BLIP2,
    BLIP2Speaker,
    Eye,
    QFormer,
    QFormerConfig,
    grounded_mask,
    joint_mask,
    separate_mask,
)
from minivlp.models.lm import DecoderLM, EncoderDecoderLM, LMConfig
from minivlp.models.vit import ViT, ViTConfig
from minivlp.models.vlmo import moves_in_stage_2
from minivlp.plots import use_style


@pytest.fixture(autouse=True)
def style():
    use_style()


GROUND = to_rgb("#F5F5F5")  # of bands
TOKENS = ["query 1", "query 2", "[DEC]", "a", "red", "umbrella"]
MASK = np.tril(np.ones((6, 6), bool))
PAIR, PAIR_GROUPS = ["[CLS]", "a", "cat", "[SEP]", "CLS", "1", "2", "3", "4"], ["text"] * 4 + ["image"] * 5
SAME = np.equal.outer(PAIR_GROUPS, PAIR_GROUPS)
BLOCKS = {"all\n(single stream)": SAME | True, "cross\n(cross-attention)": ~SAME, "separate\n(two encoders)": SAME}

ASKED = ["[CLS] / [DEC]", "a", "red", "[SEP]"]  # the words beside three queries
THERE = torch.ones(1, 4, dtype=torch.bool)
QFORMER = {
    "ITC\n(uni-modal)": separate_mask(THERE, 3)[0, 0].numpy(),
    "ITM\n(bi-directional)": joint_mask(THERE, 3)[0, 0].expand(7, 7).numpy(),
    "ITG\n(multimodal causal)": grounded_mask(4, 3).numpy(),
}

COUNTS = {"human": 2_000, "web": 4_000, "synthetic": 3_998, "web kept": 2_610, "synthetic kept": 2_904,
          "in the end": 7_514}  # fmt: skip
FALSE = {"web": 0.43, "synthetic": 0.31, "web kept": 0.12, "synthetic kept": 0.174, "in the end": 0.1}

DRAWINGS = {
    "legend_strip": diagrams.legend_strip,
    "vit_overview": diagrams.vit_overview,
    "vit_block": diagrams.vit_block,
    "vit_block post": lambda: diagrams.vit_block("post"),
    "norm_placement": diagrams.norm_placement,
    "course_map": diagrams.course_map,
    **{f"course_map {n}": lambda n=n: diagrams.course_map(n) for n in range(1, 9)},
    "family_map": diagrams.family_map,
    "attention_mask": lambda: diagrams.attention_mask(
        MASK,
        TOKENS,
        groups=["image"] * 2 + ["text"] * 4,
        title="A rather long title over a small mask, which must be wrapped",
    ),
    "attention_mask cross": lambda: diagrams.attention_mask(
        np.ones((6, 65), bool), TOKENS, range(65), groups=["text"] * 6, col_groups=["image"] * 65
    ),
    "attention_mask large": lambda: diagrams.attention_mask(np.eye(60, dtype=bool), range(60)),
    "attention_mask tiny": lambda: diagrams.attention_mask([[True]], ["a"]),
    "block_masks": lambda: diagrams.block_masks(BLOCKS, PAIR, PAIR_GROUPS, title="One layer, three architectures"),
    "block_masks large": lambda: diagrams.block_masks(
        {"all": np.ones((57, 57), bool), "own": np.eye(57, dtype=bool)}, range(57)
    ),
    "vilt_overview": diagrams.vilt_overview,
    "vilt_overview words": lambda: diagrams.vilt_overview(
        np.zeros((3, 32, 64), np.uint8), words=("a", "white", "umbrella")
    ),
    "vilt_objectives": diagrams.vilt_objectives,
    "single_and_dual_stream": diagrams.single_and_dual_stream,
    "attention_mask causal": lambda: diagrams.attention_mask(
        np.tril(np.ones((5, 5), bool)), ["[CLS]", "a", "red", "cat", "[SEP]"], groups=["text"] * 5, title="causal mask"
    ),
    "clip_overview": diagrams.clip_overview,
    "clip_overview words": lambda: diagrams.clip_overview(
        np.zeros((3, 32, 64), np.uint8), words=("a", "white", "umbrella")
    ),
    **{f"clip_matrix {n}": lambda n=n: diagrams.clip_matrix(n) for n in (2, 4, 8)},
    "zero_shot_diagram": diagrams.zero_shot_diagram,
    "flip_overview": diagrams.flip_overview,
    "flip_overview words": lambda: diagrams.flip_overview(
        np.zeros((3, 32, 64), np.uint8), keep=range(16), words=("a", "white", "umbrella")
    ),
    "flip_overview whole": lambda: diagrams.flip_overview(keep=range(64)),
    "flip_overview one": lambda: diagrams.flip_overview(keep=[40]),
    "flip_stages": diagrams.flip_stages,
    "four_ways_to_hide": diagrams.four_ways_to_hide,
    "albef_overview": diagrams.albef_overview,
    "albef_overview words": lambda: diagrams.albef_overview(
        np.zeros((3, 32, 64), np.uint8), words=("a", "white", "umbrella")
    ),
    "albef_modes": diagrams.albef_modes,
    "albef_step": diagrams.albef_step,
    "vlmo_block": diagrams.vlmo_block,
    "vlmo_overview": diagrams.vlmo_overview,
    "vlmo_overview words": lambda: diagrams.vlmo_overview(
        np.zeros((3, 32, 64), np.uint8), words=("a", "white", "umbrella")
    ),
    "vlmo_stages": diagrams.vlmo_stages,
    "vlmo_stages large": lambda: diagrams.vlmo_stages(pictures=14_000_000, sentences=800_000_000, pairs=10_000_000),
    "blip_overview": diagrams.blip_overview,
    "blip_overview picture": lambda: diagrams.blip_overview(np.zeros((3, 32, 64), np.uint8)),
    "blip_block": diagrams.blip_block,
    "capfilt": diagrams.capfilt,
    "capfilt counts": lambda: diagrams.capfilt(COUNTS, false=FALSE),
    "capfilt large": lambda: diagrams.capfilt(dict.fromkeys(COUNTS, 129_000_000), false=dict.fromkeys(FALSE, 1.0)),
    "capfilt shares": lambda: diagrams.capfilt(false={"web": 0.43}),
    "blip2_overview": diagrams.blip2_overview,
    "blip2_overview picture": lambda: diagrams.blip2_overview(np.zeros((3, 32, 64), np.uint8)),
    "qformer_block": diagrams.qformer_block,
    "qformer_masks": lambda: diagrams.qformer_masks(QFORMER, 3, ASKED),
    "qformer_masks large": lambda: diagrams.qformer_masks(
        {"ITG": grounded_mask(24, 32).numpy()}, 32, ["word"] * 24, title="At the paper's size"
    ),
}
every_drawing = pytest.mark.parametrize("name", DRAWINGS)


def words(fig: Figure) -> list[Text]:
    return [t for t in fig.findobj(Text) if t.get_text().strip() and t.get_visible()]


def extent(text: Text) -> Bbox:
    """The box of the letters themselves, without the background some have."""
    return Text.get_window_extent(text)


def overlapping(texts: list[Text]) -> list[tuple[str, str]]:
    boxes = [(t.get_text(), extent(t)) for t in texts]
    return [(a, b) for (a, p), (b, q) in itertools.combinations(boxes, 2) if p.overlaps(q)]


@every_drawing
def test_words_lie_inside_the_figure_and_never_on_each_other(name):
    fig = DRAWINGS[name]()
    texts = words(fig)
    assert texts
    outside = [t.get_text() for t in texts if not _contains(fig.bbox, extent(t))]
    assert not outside
    assert not overlapping(texts)


@every_drawing
def test_text_fits_its_box(name):
    fig = DRAWINGS[name]()
    shapes = {p.get_gid(): p for p in fig.findobj(FancyBboxPatch) if p.get_gid()}
    for text in words(fig):
        if text.get_gid():
            assert _contains(shapes[text.get_gid()].get_window_extent(), extent(text)), text.get_text()


@every_drawing
def test_no_arrow_runs_through_words(name):
    fig = DRAWINGS[name]()
    arrows = [line.get_transform().transform_path(Path(line.get_xydata()))
              for line in fig.findobj(Line2D) if line.get_gid() == "arrow"]  # fmt: skip
    crossed = [t.get_text() for t in words(fig) for path in arrows if path.intersects_bbox(extent(t), filled=False)]
    assert not crossed


@every_drawing
def test_readable_at_the_width_of_a_notebook(name):
    fig = DRAWINGS[name]()
    assert fig.get_figwidth() * fig.dpi <= 830
    assert fig.get_figheight() * fig.dpi <= 830
    assert min(t.get_fontsize() for t in words(fig)) >= 8


@every_drawing
def test_every_drawing_is_described_and_the_same_each_time(name):
    assert len(diagrams.alt_text[name.split()[0]].split()) >= 15
    assert _png(DRAWINGS[name]()) == _png(DRAWINGS[name]())


def test_descriptions_belong_to_drawings():
    assert all(callable(getattr(diagrams, name)) for name in diagrams.alt_text)


def test_modalities_differ_in_colour_and_words_stand_out():
    for table in (diagrams.FILLS, diagrams.EDGES, diagrams.STRONG):
        kinds = [k for k in table if k != "pair"]
        for a, b in itertools.combinations(kinds, 2):
            assert np.abs(np.subtract(to_rgb(table[a]), to_rgb(table[b]))).max() > 0.08, (a, b)
    assert min(_contrast(diagrams.INK, fill) for fill in diagrams.FILLS.values()) > 7
    assert min(_contrast(edge, "white") for edge in diagrams.EDGES.values()) > 4
    assert _contrast("white", diagrams.NEW) > 4.5


def test_frozen_is_hatched_shared_has_two_outlines_new_has_a_tag():
    def shapes(**kind):
        c = Canvas(3, 2)
        c.box(0.5, 0.5, 1.5, 0.6, "encoder", **kind)
        return c.fig.findobj(FancyBboxPatch), [t.get_text() for t in words(c.fig)]

    plain, texts = shapes()
    assert len(plain) == 1 and not plain[0].get_hatch() and texts == ["encoder"]
    frozen, _ = shapes(frozen=True)
    assert any(p.get_hatch() for p in frozen)
    shared, _ = shapes(shared=True)
    assert len(shared) == 2 and not any(p.get_hatch() for p in shared)
    new, texts = shapes(new=True)
    assert to_rgb(new[0].get_edgecolor()[:3]) == to_rgb(diagrams.NEW) and "new" in texts


def test_long_words_shrink_or_wrap_and_are_refused_when_they_cannot_fit():
    c = Canvas(4, 2)
    c.box(0.1, 0.1, 1.3, 0.8, "multi-head cross-attention, queries from text", size=12)
    (text,) = words(c.fig)
    assert "\n" in text.get_text() and 8 <= text.get_fontsize() < 12
    with pytest.raises(ValueError, match="make the box larger"):
        c.box(0.1, 1.1, 0.5, 0.2, "multi-head cross-attention")


def test_arrows_find_their_sides():
    c = Canvas(6, 4)
    a, b, above = c.box(0.5, 0.5, 1, 0.5), c.box(3, 0.6, 1, 0.5), c.box(0.7, 3, 1, 0.5)

    def points():
        return [line for line in c.fig.findobj(Line2D) if line.get_gid() == "arrow"][-1].get_xydata()

    c.arrow(a, b, "level")
    (x0, y0), (x1, y1) = points()
    assert x0 == 1.5 and 2.9 < x1 <= 3 and y0 == y1  # level, though the boxes are not equally high up
    c.arrow(b, a)
    assert points()[0][0] == 3
    c.arrow(a, above)
    (x0, y0), (x1, y1) = points()
    assert x0 == x1 and y0 == 1.0 and y1 > 2.85
    c.arrow(a, above, start="left", end="left", bend=True, middle=0.3)
    assert points()[:, 0].min() == pytest.approx(0.2)
    c.arrow(above, b, start="right", end="top", bend=True)
    corners = points()
    assert len(corners) == 3 and all((np.diff(corners, axis=0) == 0).any(axis=1))


def test_overview_shows_the_given_picture():
    red = np.zeros((3, 32, 32), np.uint8)
    red[0] = 255
    assert _png(diagrams.vit_overview(red)) != _png(diagrams.vit_overview())


def boxes(fig: Figure, **look) -> list[str]:
    """The words of the boxes, in the order of drawing, whose outline is green (new=True) or double (shared=True)."""
    outlines = fig.findobj(FancyBboxPatch)
    names = {p.get_gid() for p in outlines if p.get_gid() and to_rgb(p.get_edgecolor()[:3]) == to_rgb(diagrams.NEW)}
    if "shared" in look:  # the inner outline follows its box and has no name
        names = {a.get_gid() for a, b in itertools.pairwise(outlines)
                 if a.get_gid() and not b.get_gid() and b.get_linestyle() == "solid" and not b.get_hatch()}  # fmt: skip
    return [t.get_text() for t in words(fig) if t.get_gid() in names]


def hatched(fig: Figure) -> list[str]:
    """The words of the frozen boxes, in the order of drawing."""
    frozen = {a.get_gid() for a, b in itertools.pairwise(fig.findobj(FancyBboxPatch)) if b.get_hatch()}
    return [" ".join(t.get_text().split()) for t in words(fig) if t.get_gid() in frozen]


def grounds(fig: Figure) -> list[Bbox]:
    """Where the grey grounds lie, in the order of drawing."""
    return [p.get_window_extent() for p in fig.findobj(Rectangle) if to_rgb(p.get_facecolor()[:3]) == GROUND]


def new_frames(fig: Figure) -> list[Bbox]:
    """Where the green dashed frames lie, in the order of drawing."""
    dashed = (p for p in fig.findobj(FancyBboxPatch) if p.get_linestyle() not in ("-", "solid"))
    return [p.get_window_extent() for p in dashed if to_rgb(p.get_edgecolor()[:3]) == to_rgb(diagrams.NEW)]


def test_the_map_names_four_architectures_around_the_common_root():
    fig = diagrams.course_map()
    texts = {t.get_text(): t for t in words(fig)}
    titles = {name: texts[name] for name in ("single stream", "dual stream", "fusion + dual", "dual encoder")}
    homes = {}  # band -> the words of the boxes that lie in it
    for name, title in titles.items():
        (ground,) = [g for g in grounds(fig) if _contains(g, extent(title))]
        inside = [text for text in texts.values() if text.get_gid() and _contains(ground, extent(text))]
        homes[name] = {text.get_text().split("\n")[0] for text in inside}
    assert homes == {
        "single stream": {"02 ViLT"}, "dual stream": {"LXMERT, ViLBERT"}, "dual encoder": {"03 CLIP", "04 FLIP"},
        "fusion + dual": {"05 ALBEF", "06 VLMo", "07 BLIP", "08 BLIP-2"},
    }  # fmt: skip
    assert not any(a.overlaps(b) for a, b in itertools.combinations(grounds(fig), 2))
    assert "LXMERT, ViLBERT\nbuilt in lesson 02 to compare" in texts
    assert all(name in diagrams.alt_text["course_map"].lower() for name in titles)


@pytest.mark.parametrize("number", diagrams.LESSONS)
def test_the_map_marks_one_lesson(number):
    (marked,) = boxes(diagrams.course_map(f"{number}_name"), new=True)
    assert marked.startswith(f"{number} {diagrams.LESSONS[number][0]}\n")


def test_vilt_marks_what_lesson_01_did_not_have():
    new = boxes(diagrams.vilt_overview(), new=True)
    caption = ["[CLS]", "a", "red", "house", "[SEP]"]
    assert new[:12] == ["tokenizer, then a table of words", *caption, *"01234", "LayerNorm"]
    assert new[12:27] == ["0"] * 5 + ["1"] * 10  # one modality type for each word and each patch
    heads = ["pooler: linear, tanh", "ITM", "MLM head", "MLM", "optimal transport of words onto patches"]
    assert [" ".join(text.split()) for text in new[27:]] == [*heads, "WPA, weight 0.1"]


@pytest.mark.parametrize("overview", [diagrams.vilt_overview, diagrams.clip_overview])
def test_overviews_of_two_modalities_show_the_given_picture_and_words(overview):
    red = np.zeros((3, 64, 64), np.uint8)
    red[0] = 255
    fig = overview(red, words=("all", "is", "red"))
    patches = [im.get_array() for im in fig.axes[0].images[1:]]
    assert len(patches) == 9 and all(patch.shape == (21, 21, 3) and (patch == (255, 0, 0)).all() for patch in patches)
    texts = [t.get_text() for t in words(fig)]
    assert "“all is red”" in texts and texts.count("is") == 2  # on its way in and as a final state


def test_half_the_pictures_of_the_second_pass_belong_to_other_texts():
    texts = [t.get_text() for t in words(diagrams.vilt_objectives())]
    numbers = [int(t[-1]) for t in texts if t.startswith("picture ")]
    assert numbers[:4] == [1, 2, 3, 4] and sorted(numbers[4:]) == [1, 2, 3, 4]
    true = [number == k + 1 for k, number in enumerate(numbers[4:])]
    assert sum(true) == 2
    assert [t for t in texts if t.startswith("match")] == [f"match: {'yes' if ok else 'no'}" for ok in true]
    assert [t for t in texts if t in "=≠"] == ["="] * 4 + ["=" if ok else "≠" for ok in true]
    assert sum("[MASK]" in t for t in texts) == 4
    assert boxes(diagrams.vilt_objectives(), shared=True) == ["ViLT", "ViLT"]


def test_lxmert_shares_its_cross_attention_and_nothing_else():
    assert boxes(diagrams.single_and_dual_stream(), shared=True) == ["cross-attention"] * 2


def test_clip_marks_what_lessons_01_and_02_did_not_have():
    new = [" ".join(text.split()) for text in boxes(diagrams.clip_overview(), new=True)]
    causal = "causal blocks: a token looks at itself and those before it"
    to_shared = ["linear D → E, no bias", "normalise: length 1"]
    assert new == ["LayerNorm", causal, "[end]", *to_shared * 2, "times exp(t), t learned", "contrastive loss"]


def test_clip_normalises_the_image_alone_before_the_blocks_and_its_class_token_alone_after_them():
    fig = diagrams.clip_overview()
    blocks = {t.get_text().split(":")[0]: extent(t) for t in words(fig)
              if t.get_text().startswith(("causal blocks", "encoder blocks"))}  # fmt: skip
    middle = blocks["encoder blocks"].y0
    shapes = {p.get_gid(): p.get_window_extent() for p in fig.findobj(FancyBboxPatch) if p.get_gid()}
    norms = [shapes[t.get_gid()] for t in words(fig) if t.get_text() in ("LayerNorm", "LN") and t.get_gid()]
    before, after = [n for n in norms if n.y0 < middle], [n for n in norms if n.y0 > middle]
    assert len(before) == 1 and before[0].x0 > blocks["causal blocks"].x1
    text, image = sorted(after, key=lambda n: n.x0)
    assert text.x1 < image.x0 and text.width > 300 and image.width < 40


def test_flip_marks_what_clip_did_not_have_and_draws_the_rest_as_in_clip():
    new = [" ".join(text.split()) for text in boxes(diagrams.flip_overview(), new=True)]
    positions = ["0", "1", "2", "3", "4", "5", "6", "…", "63"]
    assert new == [
        *positions,
        "blocks, no causal mask: every word looks at every word",
        "[CLS]",
        "mean over all tokens",
    ]
    clip, flip = ({t.get_text() for t in words(draw())} for draw in (diagrams.clip_overview, diagrams.flip_overview))
    shared = {"linear D → E, no bias", "normalise: length 1", "times exp(t), t learned", "contrastive loss", "(B, B)"}
    assert shared <= clip & flip


KEEP = [3, 0, 5, 6, 63, 20, 33]


def holes(fig: Figure) -> list[Rectangle]:
    """What is drawn in the place of a removed patch or token: a dashed outline around nothing."""
    return [p for p in fig.findobj(Rectangle) if p.get_linestyle() not in ("-", "solid") and p.get_fill()]


def test_flip_adds_positions_first_then_makes_holes_then_closes_ranks():
    fig = diagrams.flip_overview(keep=KEEP)
    shapes = {p.get_gid(): p.get_window_extent() for p in fig.findobj(FancyBboxPatch) if p.get_gid()}
    blocks = next(shapes[t.get_gid()] for t in words(fig) if t.get_text() == "encoder blocks\non 1 + 7 tokens")
    squares = [(t.get_text(), shapes[t.get_gid()]) for t in words(fig) if t.get_gid() and shapes[t.get_gid()].width < 40
               and shapes[t.get_gid()].x0 > 300 and shapes[t.get_gid()].y1 < blocks.y0]  # fmt: skip
    by_row = itertools.groupby(sorted(squares, key=lambda s: (round(s[1].y0), s[1].x0)), key=lambda s: round(s[1].y0))
    rows = [list(row) for _, row in by_row]
    every = [*"0123456", "…", "63"]
    kept = ["0", "3", "5", "6", "…", "63"]
    assert [[text for text, _ in row] for row in rows] == [every, every, kept, ["CLS", *kept]]
    places = [{text: round(box.x0) for text, box in row} for row in rows]
    assert places[2].items() <= places[1].items() == places[0].items()  # those that stay stand where they stood
    gaps = np.diff([box.x0 for _, box in rows[3]])
    assert np.ptp(gaps) < 1 and blocks.width < 0.7 * 355  # no holes in what the blocks read, and they read less
    bare = [h for h in holes(fig) if h.get_width() > 0.3]
    assert [round(h.get_window_extent().x0) for h in bare] == [places[1][name] for name in "124"]
    arrows = [line.get_xydata() for line in fig.findobj(Line2D) if line.get_gid() == "arrow"]
    goals = [xy[-1][0] * 100 for xy in arrows if len(xy) == 2 and abs(xy[0][1] * 100 - rows[2][0][1].y1) < 1
             and xy[0][0] > 3.5]  # fmt: skip
    middles = [box.x0 + box.width / 2 for _, box in rows[3][1:]]
    assert len(goals) == 6 and max(min(abs(g - m) for m in middles) for g in goals) < 12


def test_flip_shows_the_picture_with_exactly_the_given_patches():
    fig = diagrams.flip_overview(keep=KEEP)
    frame = max((im.get_extent() for im in fig.axes[0].images), key=lambda e: e[0])  # the picture at the right
    step = (frame[1] - frame[0]) / 8
    cells = {round((frame[3] - h.get_y() - step) / step) * 8 + round((h.get_x() - frame[0]) / step)
             for h in holes(fig) if h.get_width() < 0.3}  # fmt: skip
    assert cells == {*range(64)} - {*KEEP}
    assert "kept: 7 of 64,\nand CLS" in {t.get_text() for t in words(fig)}
    assert len([h for h in holes(diagrams.flip_overview()) if h.get_width() < 0.3]) == 32
    assert not holes(diagrams.flip_overview(keep=range(64)))


def test_flip_reads_fewer_tokens_in_its_first_stage_alone_and_has_the_same_weights_in_all():
    fig = diagrams.flip_stages()
    shapes = {p.get_gid(): p.get_window_extent() for p in fig.findobj(FancyBboxPatch) if p.get_gid()}
    bars = [(t.get_text().split(), shapes[t.get_gid()]) for t in words(fig) if t.get_text().endswith("tokens")]
    assert [text for text, _ in bars] == [["1", "+", n, "tokens"] for n in ("32", "64", "64")]
    first, *others = [box.width for _, box in bars]
    assert all(first / other == pytest.approx(33 / 65, abs=0.01) for other in others)
    assert boxes(fig, new=True) == ["1 + 32\ntokens"]
    assert boxes(fig, shared=True) == ["FLIP: both towers"] * 3
    assert [t.get_text() for t in words(fig)].count("contrastive loss") == 2  # none in use
    right_of_first = bars[1][1].x0
    assert len(holes(fig)) == 32 and all(h.get_window_extent().x1 < right_of_first for h in holes(fig))


def test_of_four_ways_to_hide_one_alone_is_shorter():
    fig = diagrams.four_ways_to_hide()
    texts = words(fig)
    names = ["remove", "mask token", "zero the pixels", "attention mask"]
    heights = {t.get_text(): extent(t).y0 for t in texts if t.get_text() in names}
    assert sorted(heights, key=heights.get, reverse=True) == names
    rows = {name: [t.get_text() for t in sorted(texts, key=lambda t: extent(t).x0)
                   if t.get_gid() is None and t.get_fontsize() == 8 and extent(t).x0 > 120
                   and 0 < y - extent(t).y0 < 75] for name, y in heights.items()}  # fmt: skip
    hidden = [str(i) for i in range(16) if str(i) not in {"1", "3", "4", "6", "9", "10", "12", "15"}]
    assert list(rows.values()) == [[], ["M"] * 8, ["0"] * 8, hidden]
    counts = sorted((t for t in texts if t.get_fontsize() == 12), key=lambda t: -extent(t).y0)
    assert [t.get_text() for t in counts] == ["9", "17", "17", "17"]
    verdicts = [t.get_text() for t in texts if t.get_text().startswith(("no", "yes"))]
    assert [v.split(":")[0].split(",")[0] for v in verdicts] == ["no", "no", "yes"]


def placed(fig: Figure) -> dict[str, list[Bbox]]:
    """Where the boxes lie, by their words, on one line."""
    shapes = {p.get_gid(): p.get_window_extent() for p in fig.findobj(FancyBboxPatch) if p.get_gid()}
    where: dict[str, list[Bbox]] = {}
    for t in words(fig):
        if t.get_gid():
            where.setdefault(" ".join(t.get_text().split()), []).append(shapes[t.get_gid()])
    return where


def joined(fig: Figure, *, look: str = "") -> set[tuple[str, str]]:
    """Which box each arrow leaves and which it reaches, by their words; `look`: "dashed", or a colour. Arrows that
    leave or reach something else are left out."""
    boxes = [(name, box) for name, found in placed(fig).items() for box in found]

    def at(x: float, y: float) -> str | None:  # lines end a little before what they point at
        near = {name for name, b in boxes if b.x0 - 9 < x < b.x1 + 9 and b.y0 - 9 < y < b.y1 + 9}
        return near.pop() if len(near) == 1 else None

    found = set()
    for line in fig.findobj(Line2D):
        dashed, colour = line.get_linestyle() == "--", to_rgb(line.get_color())
        fits = dashed if look == "dashed" else colour == to_rgb(look) if look else True
        if line.get_gid() == "arrow" and fits:
            ends = line.get_transform().transform(line.get_xydata())
            found.add((at(*ends[0]), at(*ends[-1])))
    return {pair for pair in found if None not in pair}


def test_albef_aligns_class_tokens_before_it_fuses_and_the_picture_answers_the_words():
    fig = diagrams.albef_overview()
    arrows, where = joined(fig), placed(fig)
    assert {("linear, length 1", "ITC"), ("batch: B", "ITC"), ("queue: Q earlier pairs", "ITC"),
            ("batch: B", "queue: Q earlier pairs"), ("[CLS]", "linear, length 1"), ("CLS", "linear, length 1"),
            ("[CLS]", "linear D → 2"), ("linear D → 2", "ITM"), ("MLM head", "MLM")} <= arrows  # fmt: skip
    assert ("self-attention: words look at words", "cross-attention: words look at the picture") in arrows
    twin = "the teacher: a twin of all of this without ITM"
    assert joined(fig, look="dashed") == {("text encoder, lower half: words look at words", twin)}
    assert not any(a == twin and "encoder" in b for a, b in arrows)  # the teacher teaches no weights
    (cross,), (itc,), (itm,), (mlm,) = (where[name] for name in (
        "cross-attention: words look at the picture", "ITC", "ITM", "MLM"))  # fmt: skip
    assert itc.y1 < cross.y0 < cross.y1 < min(itm.y0, mlm.y0)
    routes = [line.get_transform().transform(line.get_xydata()) for line in fig.findobj(Line2D)
              if line.get_gid() == "arrow"]  # fmt: skip
    (answer,) = [r for r in routes if abs(r[-1][0] - cross.x0) < 9 and cross.y0 < r[-1][1] < cross.y1]
    (image_encoder,) = where["image encoder: lesson 01's ViT"]
    assert image_encoder.x0 < answer[0][0] < image_encoder.x1 and image_encoder.y1 < answer[0][1] < cross.y0


def test_albef_marks_what_no_earlier_lesson_has():
    fig = diagrams.albef_overview()
    assert [" ".join(text.split()) for text in boxes(fig, new=True)] == [
        "the teacher: a twin of all of this without ITM", "batch: B", "queue: Q earlier pairs", "ITC"
    ]  # fmt: skip
    (frame,) = new_frames(fig)
    inside = {name.split(":")[0].split(",")[0] for name, found in placed(fig).items() if _contains(frame, found[0])}
    assert inside == {"self-attention", "cross-attention", "MLP"}


def test_each_mode_runs_its_halves_and_ends_in_its_loss():
    fig = diagrams.albef_modes()
    titles = sorted((t for t in words(fig) if t.get_text().startswith("“")), key=lambda t: extent(t).x0)
    assert [t.get_text() for t in titles] == ["“text”", "“fusion”", "“multi-modal”"]
    lefts = [extent(t).x0 for t in titles]
    panels: list[set[str]] = [set(), set(), set()]
    for name, found in placed(fig).items():
        for box in found:
            panels[sum(box.x1 > left for left in lefts) - 1].add(name)
    lower, upper = {"lower half", "text states (B, L, D)"}, {"upper half: fusion", "image states", "fused (B, L, D)"}
    assert panels == [
        {"ids (B, L)", "ITC"} | lower,
        {"text states (B, L, D)", "ITM"} | upper,
        {"hidden ids (B, L)", "MLM"} | lower | upper,
    ]
    idle = [extent(t) for t in words(fig) if t.get_text() == "does not run"]
    halves = placed(fig)
    assert len(idle) == 2
    in_text, in_fusion = sorted(idle, key=lambda b: b.x0)
    assert in_text.x1 < lefts[1] < in_fusion.x0 < lefts[2]
    for box, half in ((in_text, "upper half: fusion"), (in_fusion, "lower half")):
        assert halves[half][0].y0 < box.y0 < box.y1 < halves[half][0].y1


def test_the_seven_parts_of_a_step_stand_in_order_and_gradients_reach_the_student_alone():
    fig = diagrams.albef_step()
    shapes, texts = placed(fig), [t for t in words(fig) if t.get_text()[0] in "①②③④⑤⑥⑦"]
    tops = {}
    for t in texts:
        tops.setdefault(t.get_text()[0], []).append(extent(t).y0)
    assert sorted(tops) == list("①②③④⑤⑥⑦") and {k: len(v) for k, v in tops.items() if len(v) > 1} == {"⑥": 2}
    order = [max(tops[k]) for k in "①②③④⑤⑥⑦"]
    assert all(a > b - 1 for a, b in itertools.pairwise(order))
    bands = sorted(grounds(fig), key=lambda b: b.x0)
    teacher, student = ({name for name, found in shapes.items() if any(_contains(band, box) for box in found)}
                        for band in bands)  # fmt: skip
    goals = {"④ ITC": "vectors (B, E) twice", "⑥ ITM": "fusion half, 3 B pairs: B true, 2 B wrong",
             "⑦ MLM": "fusion half, captions with hidden words"}  # fmt: skip
    assert joined(fig, look=diagrams.GRADIENT) == set(goals.items()) and {*goals.values()} <= student
    gradients = [line.get_xydata()[-1][0] for line in fig.findobj(Line2D)
                 if line.get_gid() == "arrow" and to_rgb(line.get_color()) == to_rgb(diagrams.GRADIENT)]  # fmt: skip
    assert sum(100 * x > bands[1].x0 - 9 for x in gradients) == 3  # the fourth is the sample below
    still = joined(fig, look="dashed")
    assert {("queue: Q earlier pairs", "keys: B + Q"), ("scores (M, V)", "⑦ MLM"), ("④ ITC", "⑥ draw wrong partners"),
            ("⑥ draw wrong partners", "fusion half, 3 B pairs: B true, 2 B wrong")} <= still  # fmt: skip
    assert set(hatched(fig)) == teacher | {"⑥ draw wrong partners"}


def is_filled(patch: FancyBboxPatch, kind: str) -> bool:
    return to_rgb(patch.get_facecolor()[:3]) == to_rgb(diagrams.FILLS[kind])


def columns(fig: Figure, titles: list[str]) -> list[dict[str, list[Bbox]]]:
    """`placed`, for each column that begins below one of the titles."""
    lefts = [extent(t).x0 for title in titles for t in words(fig) if " ".join(t.get_text().split()) == title]
    assert len(lefts) == len(titles) and lefts == sorted(lefts)
    found: list[dict[str, list[Bbox]]] = [{} for _ in titles]
    for name, every in placed(fig).items():
        for box in every:
            found[sum(box.x1 > left for left in lefts) - 1].setdefault(name, []).append(box)
    return found


def test_a_multiway_block_shares_all_but_three_experts_which_own_their_layer_norm():
    fig = diagrams.vlmo_block()
    shared = ["LayerNorm", "self-attention: every token looks at every token", "× γ₁, a number for each of the D",
              "× γ₂"]  # fmt: skip
    assert [" ".join(text.split()) for text in boxes(fig, shared=True)] == shared
    assert [" ".join(text.split()) for text in boxes(fig, new=True)] == shared[2:]
    texts = [t for t in words(fig)]
    assert [t.get_text() for t in texts].count("shared") == len(shared)
    shapes = [p for p in fig.findobj(FancyBboxPatch) if p.get_gid()]
    frames = sorted(new_frames(fig), key=lambda b: b.x0)
    arrows = {to_rgb(line.get_color()): line.get_transform().transform(line.get_xydata())
              for line in fig.findobj(Line2D) if line.get_gid() == "arrow"}  # fmt: skip
    for frame, kind, name in zip(frames, ("text", "image", "fused"), ("L-FFN", "V-FFN", "VL-FFN"), strict=True):
        inside = {t.get_text() for t in texts if _contains(frame, extent(t))}
        assert inside == {name, "LayerNorm", "MLP, D → 4 D → D"}
        assert all(is_filled(p, kind) for p in shapes if _contains(frame, p.get_window_extent()))
        route = arrows[to_rgb(diagrams.EDGES[kind])]  # from the tokens to the expert of their kind
        assert frame.x0 < route[-1][0] < frame.x1 and frame.y0 < route[-1][1] < frame.y1
        tokens = [p.get_window_extent() for p in shapes if is_filled(p, kind) and p.get_window_extent().y1 < frame.y0]
        row = [box for box in tokens if abs(box.y1 - route[0][1]) < 20]
        if kind != "fused":
            assert min(b.x0 for b in row) < route[0][0] < max(b.x1 for b in row)
    (last,) = [t for t in texts if t.get_text().startswith("last F blocks only")]
    assert extent(last).x0 > frames[2].x1 and frames[2].y0 < extent(last).y0 < frames[2].y1


def test_vlmo_is_one_stack_used_three_times():
    fig = diagrams.vlmo_overview()
    bands = sorted(grounds(fig), key=lambda b: b.y0)
    titles = ["image encoder", "text encoder", "fusion encoder"]
    used = []
    for column in columns(fig, titles):
        for band in bands:
            inside = [(box.x0, name.split(":")[0]) for name, found in column.items() for box in found
                      if _contains(band, box)]  # fmt: skip
            used.append([name for _, name in sorted(inside) if name != "self-attention"])
            assert len(inside) == len(used[-1]) + 1  # one attention over all of the row
    assert used == [["V-FFN"], ["V-FFN"], ["L-FFN"], ["L-FFN"], ["L-FFN", "V-FFN"], ["VL-FFN"]]
    assert sorted(boxes(fig, new=True)) == sorted(itertools.chain(*used))
    shared = [text.split(":")[0] for text in boxes(fig, shared=True)]
    assert sorted(shared) == sorted([*itertools.chain(*used), *["self-attention"] * 6, *["LayerNorm"] * 3])

    every = [(name.split(":")[0], box) for name, found in placed(fig).items() for box in found]
    equal = [extent(t) for t in words(fig) if t.get_text() == "="]
    assert len(equal) == 7
    for mark in equal:  # whatever it stands between is the same
        level = [(box, name) for name, box in every if box.y0 < (mark.y0 + mark.y1) / 2 < box.y1]
        left = max((pair for pair in level if pair[0].x1 < mark.x0), key=lambda pair: pair[0].x1)
        right = min((pair for pair in level if pair[0].x0 > mark.x1), key=lambda pair: pair[0].x0)
        assert left[1] == right[1]


def test_vlmo_compares_class_tokens_and_reads_pairs_text_first():
    fig = diagrams.vlmo_overview(words=("all", "is", "red"))
    assert {("[I_CLS]", "linear, length 1"), ("[T_CLS]", "linear, length 1"), ("linear, length 1", "ITC"),
            ("[T_CLS]", "pooler, then linear D → 2"), ("pooler, then linear D → 2", "ITM"),
            ("MLM head", "MLM")} <= joined(fig)  # fmt: skip
    image, text, pair = columns(fig, ["image encoder", "text encoder", "fusion encoder"])
    assert {"ITC"} == {name for name in ("ITC", "ITM", "MLM") if name in image | text}
    assert {"ITM", "MLM"} <= set(pair) and "ITC" not in pair
    row = ["[T_CLS]", "all", "is", "red", "[SEP]", "[I_CLS]", "1", "…", "N"]
    for k in range(2):  # on the way in, and as final states
        assert sorted(row, key=lambda name: sorted(pair[name], key=lambda b: b.y0)[k].x0) == row
    assert "[T_CLS]" not in image and "[I_CLS]" not in text
    assert [t.get_text() for t in words(fig)].count("“all is red”") == 2


def test_the_stages_freeze_what_the_code_freezes_and_name_the_courses_data():
    fig = diagrams.vlmo_stages()
    titles = ["1 pictures alone", "2 texts alone", "3 pairs"]
    works = columns(fig, titles)
    parts = {"word embeddings": "embed.text.", "patches, positions": "embed.image.", "last LayerNorm": "norm.",
             "self-attention, its LN, γ": "blocks.0.attn.", "L-FFN": "blocks.0.experts.text.",
             "V-FFN": "blocks.0.experts.image.", "VL-FFN": "blocks.3.experts.pair."}  # fmt: skip
    idle = [{name for name in parts if name not in column} for column in works]
    assert idle == [{"word embeddings", "L-FFN", "VL-FFN"}, {"VL-FFN"}, set()]
    frozen = hatched(fig)
    assert set(frozen) == {name for name in set(parts) - idle[1] if not moves_in_stage_2(parts[name])}
    assert len(set(frozen)) == len(frozen)
    for name in frozen:
        (box,) = works[1][name]
        assert any(p.get_hatch() for p in fig.findobj(FancyBboxPatch) if _contains(p.get_window_extent(), box))
    assert [{name for name in column if name in ("MIM", "ITC", "ITM", "MLM")} for column in works] == [
        {"MIM"}, {"MLM"}, {"ITC", "ITM", "MLM"}
    ]  # fmt: skip
    assert boxes(fig, new=True) == ["VL-FFN"] and len(works[2]["VL-FFN"]) == 1
    texts = {t.get_text() for t in words(fig)}
    assert {f"{MAIN.unpaired:,} pictures, no texts", f"{MAIN.unpaired:,} texts, no pictures",
            f"{MAIN.pairs:,} pictures with texts"} <= texts  # fmt: skip
    others = {t.get_text() for t in words(diagrams.vlmo_stages(pictures=11, sentences=2_222, pairs=3))}
    assert {"11 pictures, no texts", "2,222 texts, no pictures", "3 pictures with texts"} <= others


MODES = ["text encoder", "image-grounded encoder", "image-grounded decoder"]


def fills(fig: Figure, name: str) -> list[tuple[float, float, float]]:
    """The colours of the boxes that bear these words, from left to right."""
    gids = {t.get_gid() for t in words(fig) if " ".join(t.get_text().split()) == name}
    found = [p for p in fig.findobj(FancyBboxPatch) if p.get_gid() in gids]
    return [to_rgb(p.get_facecolor()[:3]) for p in sorted(found, key=lambda p: p.get_window_extent().x0)]


def test_blip_has_one_colour_for_the_same_weights_and_marks_what_lesson_05_has_not():
    fig = diagrams.blip_overview()
    both, causal, cross, ffn = (fills(fig, name) for name in (
        "self-attention, both ways", "causal self-attention", "cross-attention", "FFN"))  # fmt: skip
    assert [len(both), len(causal), len(cross), len(ffn)] == [2, 1, 2, 4]  # the ViT has an FFN, too
    parts = [set(both), set(causal), set(cross), set(ffn[1:])]
    assert all(len(part) == 1 for part in parts) and len(set.union(*parts, {ffn[0]})) == 5
    tables = "words + positions, LayerNorm"
    shared = ["self-attention, both ways"] * 2 + ["cross-attention"] * 2 + ["FFN"] * 3 + [tables] * 3
    assert sorted(" ".join(text.split()) for text in boxes(fig, shared=True)) == sorted(shared)
    assert boxes(fig, new=True) == ["[ENC]", "[DEC]", "causal self-attention", "LM"]


def test_the_three_modes_of_blip_differ_in_what_they_read_ask_and_are_asked():
    fig = diagrams.blip_overview()
    _, *modes = columns(fig, ["ViT", *MODES])
    layers = {"self-attention, both ways", "causal self-attention", "cross-attention", "FFN"}
    order = [sorted(layers & set(mode), key=lambda name, mode=mode: mode[name][0].y0) for mode in modes]
    assert order == [
        ["self-attention, both ways", "FFN"],
        ["self-attention, both ways", "cross-attention", "FFN"],
        ["causal self-attention", "cross-attention", "FFN"],
    ]
    firsts, losses = ([every & set(mode) for mode in modes] for every in (
        {"[CLS]", "[ENC]", "[DEC]"}, {"ITC", "ITM", "LM"}))  # fmt: skip
    assert firsts == [{"[CLS]"}, {"[ENC]"}, {"[DEC]"}] and losses == [{"ITC"}, {"ITM"}, {"LM"}]
    below = {t.get_text(): extent(t) for t in words(fig) if t.get_text() in ("ITC", "ITM", "LM") and not t.get_gid()}
    for name, mode in zip(("ITC", "ITM", "LM"), modes, strict=True):  # said again beneath its column
        assert below[name].y1 < mode["“a red house”"][0].y0 and abs(below[name].x0 - mode["FFN"][0].x0) < 5
    assert {("linear, length 1", "ITC"), ("a vector", "ITC"), ("CLS", "linear, length 1"), ("no", "ITM"),
            ("yes", "ITM"), ("[CLS]", "linear, length 1"), ("[ENC]", "linear D → 2")} <= joined(fig)  # fmt: skip
    rows: dict[int, list[tuple[float, str]]] = {}
    for name in ("[DEC]", "a", "red", "house", "[SEP]"):
        for box in modes[2].get(name, []):
            rows.setdefault(round(box.y0), []).append((box.x0, name))
    read, states, told = ([name for _, name in sorted(rows[y])] for y in sorted(rows))
    assert read == states and told == [*read[1:], "[SEP]"]  # each token tells the next one
    starts = [[x for x, _ in sorted(rows[y])] for y in sorted(rows)]
    assert starts[1] == starts[2]


def test_the_pictures_states_reach_both_cross_attentions_and_no_other_part_of_the_text_transformer():
    fig = diagrams.blip_overview()
    blue = to_rgb(diagrams.EDGES["image"])
    routes = [line.get_transform().transform(line.get_xydata()) for line in fig.findobj(Line2D)
              if line.get_gid() == "arrow" and to_rgb(line.get_color()) == blue]  # fmt: skip
    *path, to_encoder, to_decoder = routes
    assert all(np.abs(a[-1] - b[0]).max() < 1 for a, b in itertools.pairwise(path))  # one line from end to end
    left, right = sorted(placed(fig)["cross-attention"], key=lambda b: b.x0)
    (vit,) = [box for box in placed(fig)["FFN"] if box.x0 < 20]
    assert vit.y1 < path[0][0][1] and path[0][0][0] < left.x0
    for route, side, box in ((to_encoder, left.x1, left), (to_decoder, right.x0, right)):
        assert np.abs(route[0] - path[-1][-1]).max() < 1
        assert abs(route[-1][0] - side) < 10 and box.y0 < route[-1][1] < box.y1
    others = [box for name, found in placed(fig).items() for box in found]
    assert not any(Path(route).intersects_bbox(box, filled=False) for route in path for box in others)


def test_the_drawn_block_shares_what_the_code_shares():
    fig = diagrams.blip_block()
    text = MED(BLIPConfig(image_width=16, text_width=16, text_depth=1, image_heads=2, text_heads=2))
    encoder, decoder = text.encoder[0], text.decoder[0]
    names = ["attn", "norm1", "cross", "mlp", "norm2"]
    same = [name for name in names if getattr(encoder, name) is getattr(decoder, name)]
    drawn = {"tables of words and positions, LayerNorm: once, below the first block": "embed",
             "cross-attention with its output layer: words ask the picture": "cross", "FFN, D → 4 D → D": "mlp",
             "LayerNorm": "norm2"}  # fmt: skip
    shared = [drawn[" ".join(t.split())] for t in boxes(fig, shared=True)]
    assert shared == ["embed", "cross", "norm2", "mlp", "norm2"]  # the first LayerNorm is cross-attention's own
    assert set(shared) - {"embed"} == set(same) and text.decoder_embed is text.embed
    assert encoder.cross.norm is decoder.cross.norm
    assert [t.get_text() for t in words(fig)].count("shared") == len(shared)
    frames = sorted((p.get_window_extent() for p in fig.findobj(FancyBboxPatch)
                     if p.get_linestyle() not in ("-", "solid") and p.get_window_extent().height > 200),
                    key=lambda b: b.x0)  # fmt: skip
    for frame, kind, looks in zip(frames, ("text", "causal"), ("both ways", "back only"), strict=True):
        inside = {name for name, found in placed(fig).items() if any(_contains(frame, box) for box in found)}
        assert inside == {"q", "k", "v", f"attention, looks {looks}", "output layer", "LayerNorm"}
        shapes = [p for p in fig.findobj(FancyBboxPatch) if p.get_gid() and _contains(frame, p.get_window_extent())]
        assert len(shapes) == len(inside) and all(is_filled(p, kind) for p in shapes)
    new = ["[ENC]", "[DEC]", "q", "k", "v", "attention, looks back only", "output layer", "LayerNorm"]
    assert boxes(fig, new=True)[:-1] == new and boxes(fig, new=True)[-1].startswith("key/value cache")


def test_a_block_adds_before_it_normalises_and_its_cache_stands_beside_the_decoder():
    fig = diagrams.blip_block()
    circles = sorted((p.get_window_extent() for p in fig.findobj(Circle)), key=lambda b: (round(b.x0), b.y0))
    order = [name for name, _ in sorted(
        ((name, box) for name, found in placed(fig).items() for box in found if box.x0 < 60 and box.width > 150),
        key=lambda pair: pair[1].y0)]  # fmt: skip
    assert [name.split(",")[0].split(" with")[0] for name in order] == [
        "tables of words and positions", "attention", "output layer", "LayerNorm", "cross-attention", "LayerNorm",
        "FFN", "LayerNorm",
    ]  # fmt: skip
    heights = sorted(box.y0 for box in placed(fig)["LayerNorm"] if box.x0 < 60)
    assert len(circles) == 6
    for stream in (circles[:3], circles[3:]):
        assert all(0 < norm - plus.y1 < 15 for plus, norm in zip(stream, heights, strict=True))
    (cache,) = placed(fig)["key/value cache: k and v of [DEC], a, red"]
    (attention,) = placed(fig)["attention, looks back only"]
    dashed = [line.get_transform().transform(line.get_xydata()) for line in fig.findobj(Line2D)
              if line.get_gid() == "arrow" and line.get_linestyle() == "--"]  # fmt: skip
    into, out = sorted(dashed, key=lambda route: route[0][0])
    (k, v) = (max(placed(fig)[name], key=lambda box: box.x0) for name in "kv")
    assert k.x1 < v.x1 < into[0][0] < into[-1][0] < cache.x0 and v.y0 < into[0][1] < v.y1
    assert abs(out[0][0] - cache.x0) < 1 and abs(out[-1][0] - attention.x1) < 10
    assert attention.y0 < out[-1][1] < attention.y1


def test_capfilt_tunes_two_copies_and_trains_a_new_model_on_what_is_kept():
    fig = diagrams.capfilt()
    short = {name: name.split(",")[0].split(":")[0].split(" =")[0].split(" (")[0] for name in placed(fig)}
    arrows, learns = ({(short[a], short[b]) for a, b in joined(fig, look=look)} for look in ("", "dashed"))
    assert learns == {("human", "② captioner"), ("human", "① BLIP"), ("human", "② filter"), ("web", "① BLIP"),
                      ("D′", "⑤ a new BLIP")}  # fmt: skip
    assert arrows - learns == {("① BLIP", "② captioner"), ("① BLIP", "② filter"), ("web", "② captioner"),
                               ("② captioner", "synthetic"), ("web", "② filter"), ("synthetic", "② filter"),
                               ("② filter", "D′"), ("human", "D′")}  # fmt: skip
    tuned = {short[name]: name.rsplit("with ")[-1] for name in placed(fig) if "with" in name}
    assert tuned == {"② captioner": "LM", "① BLIP": "ITC + ITM + LM", "② filter": "ITC + ITM"}
    assert not any(text in t.get_text() for t in words(fig) for text in ("pairs", "%", "False"))


def test_capfilt_prints_each_number_at_its_own_arrow():
    counts = {"human": 11, "web": 2_222, "synthetic": 333, "web kept": 44, "synthetic kept": 55, "in the end": 110}
    false = {"web": 0.61, "synthetic": 0.62, "web kept": 0.63, "synthetic kept": 0.64, "in the end": 0.65}
    texts = [t.get_text() for t in words(diagrams.capfilt(counts, false=false))]
    assert texts.count("11 pairs") == 3 and "(I_h, T_h)\n11 pairs" in texts
    assert texts.count("2,222 pairs\n61 % false") == 2 and "333 pairs, 62 % false" in texts
    assert {"④ web kept\n44 pairs\n63 % false", "④ synthetic kept\n55 pairs\n64 % false"} <= set(texts)
    fig = diagrams.capfilt(counts, false=false)
    at = {t.get_text(): extent(t) for t in words(fig)}
    end, model = at["110 pairs\n65 % false"], placed(fig)["⑤ a new BLIP, pre-trained on D′"][0]
    data = placed(fig)["D′ = human + web kept + synthetic kept"][0]
    assert data.x1 < end.x0 < end.x1 < model.x0 and model.y0 < end.y1 < model.y1
    some = {t.get_text() for t in words(diagrams.capfilt(false={"web kept": 0.126}))}
    assert "④ web kept\n13 % false" in some and "④ synthetic kept" in some
    assert any("False: contradicts" in " ".join(text.split()) for text in some)


def stages(fig: Figure) -> list[dict[str, list[Bbox]]]:
    """`placed`, above and below the title of the second stage of BLIP-2."""
    (second,) = [extent(t).y1 for t in words(fig) if t.get_text() == "stage 2"]
    found: list[dict[str, list[Bbox]]] = [{}, {}]
    for name, every in placed(fig).items():
        for box in every:
            found[int(box.y0 < second + 25)].setdefault(name, []).append(box)
    return found


def test_blip2_trains_what_lies_on_grey_and_freezes_what_is_hatched_as_the_code_does():
    fig = diagrams.blip2_overview()
    lm = LMConfig(width=16, depth=1, heads=2)
    eye = Eye(ViT(ViTConfig(width=16, depth=2, heads=2)))
    first = BLIP2(QFormerConfig(image_width=16, width=16, depth=2, heads=2), eye)
    second = [BLIP2Speaker(first, mouth(lm)) for mouth in (DecoderLM, EncoderDecoderLM)]
    drawn = {  # where a part lies in the code -> the words of its boxes
        "eye": {"image encoder"}, "ln_vision": {"LayerNorm, ln_vision"},
        "qformer": {"cross-attention, in every 2nd block", "FFN for queries", "FFN for words", "self-attention",
                    "one self-attention for both, ruled by a mask"},
        "itm_head": {"linear D → 2"}, "vision_proj": {"linear, length 1"}, "text_proj": {"linear, length 1"},
        "lm_head": {"LM head"}, "language_proj": {"linear D → D_LM"}, "mouth": {"language model", "encoder", "decoder"},
    }  # fmt: skip
    trains: dict[str, bool] = {}
    for name, parameter in itertools.chain(*(model.named_parameters() for model in (first, *second))):
        part = name.split(".")[0]
        assert trains.setdefault(part, parameter.requires_grad) == parameter.requires_grad, name
    assert set(trains) == set(drawn) | {"temp"}
    frozen = set.union(*(names for part, names in drawn.items() if not trains[part]))
    assert set(hatched(fig)) == frozen and len(hatched(fig)) == 5
    assert [t.get_text() for t in words(fig)].count("frozen") == 5

    assert len(grounds(fig)) == 2 == [t.get_text() for t in words(fig)].count("trained")
    for name in set.union(*drawn.values()):
        for box in placed(fig)[name]:
            on_grey = any(_contains(ground, box) for ground in grounds(fig))
            beside = not any(ground.overlaps(box) for ground in grounds(fig))
            assert beside if name in frozen else on_grey, name


def test_the_stages_of_blip2_differ_in_words_heads_and_mouth_and_the_weights_go_on():
    fig = diagrams.blip2_overview()
    first, second = stages(fig)
    both = {"image encoder", "LayerNorm, ln_vision", "cross-attention, in every 2nd block", "FFN for queries",
            *diagrams.QUERIES}  # fmt: skip
    assert both <= set(first) & set(second)
    assert {"FFN for words", "[CLS]/[DEC]", "ITC", "ITM", "ITG"} <= set(first) - set(second)
    assert {"linear D → D_LM", "language model", "encoder", "decoder", "LM"} <= set(second) - set(first)
    assert len(second["LM"]) == 2 and "LM head" in first
    (attention,) = first["one self-attention for both, ruled by a mask"]
    queries, texts = first["FFN for queries"][0], first["FFN for words"][0]
    assert abs(attention.x0 - queries.x0) < 1 and abs(attention.x1 - texts.x1) < 1  # it lies under both
    (cross,) = first["cross-attention, in every 2nd block"]
    assert cross.x1 < texts.x0  # words have none
    assert boxes(fig, shared=True) == ["one self-attention for both, ruled by a mask"]
    down = [line.get_transform().transform(line.get_xydata()) for line in fig.findobj(Line2D)
            if line.get_gid() == "arrow" and line.get_linestyle() == "--"]  # fmt: skip
    frames = new_frames(fig)
    for route, above, below in zip(
        down, (first["LayerNorm, ln_vision"][0], frames[0]), (second["LayerNorm, ln_vision"][0], frames[1]), strict=True
    ):
        assert abs(route[0][1] - above.y0) < 3 and abs(route[-1][1] - below.y1) < 10
        assert max(above.x0, below.x0) < route[0][0] == route[-1][0] < min(above.x1, below.x1)
    new = [" ".join(text.split()) for text in boxes(fig, new=True)]
    assert set(new) == {*diagrams.QUERIES, "LayerNorm, ln_vision", "linear D → D_LM", "language model", "encoder",
                        "decoder"}  # fmt: skip


def test_queries_ask_the_frozen_eye_words_ask_nobody_and_each_loss_reads_its_own():
    fig = diagrams.blip2_overview()
    arrows = joined(fig)
    attention, cross = "one self-attention for both, ruled by a mask", "cross-attention, in every 2nd block"
    assert {("image encoder", "LayerNorm, ln_vision"), ("LayerNorm, ln_vision", cross), (attention, cross),
            (cross, "FFN for queries"), (attention, "FFN for words")} <= arrows  # fmt: skip
    assert {a for a, b in arrows if b == cross} == {attention, "self-attention", "LayerNorm, ln_vision"}
    assert not any(a == cross and b == "FFN for words" for a, b in arrows)
    into = {loss: {a for a, b in arrows if b == loss} for loss in ("ITC", "ITM", "ITG")}
    assert into == {"ITC": {"linear, length 1"}, "ITM": {"linear D → 2"}, "ITG": {"LM head"}}
    assert {a for a, b in arrows if b == "LM head"} == {"[CLS]/[DEC]", "a", "red", "house"}
    first, _ = stages(fig)
    of_queries, of_text = sorted(first["linear, length 1"], key=lambda box: box.x0)
    states = {name: max(first[name], key=lambda box: box.y0) for name in (*diagrams.QUERIES, "[CLS]/[DEC]", "a")}
    assert ("[CLS]/[DEC]", "linear, length 1") in arrows and ("a", "linear, length 1") not in arrows
    assert first["linear D → 2"][0].x1 < of_queries.x0 < of_queries.x1 < states["[CLS]/[DEC]"].x0 <= of_text.x0
    assert states["1"].x0 <= first["linear D → 2"][0].x0 and of_queries.x1 <= states["Q"].x1 + 1
    beside = {t.get_text(): extent(t).x0 for t in words(fig) if t.get_text() in ("mean", "max")}
    assert first["ITM"][0].x0 < beside["mean"] < first["ITC"][0].x0 < beside["max"] < first["ITC"][0].x1


def test_a_prefix_goes_to_both_mouths_and_neither_is_asked_about_it():
    fig = diagrams.blip2_overview()
    arrows, (_, second) = joined(fig), stages(fig)
    assert {("Q", "linear D → D_LM"), ("linear D → D_LM", "1")} <= arrows
    into = {name: {a for a, b in arrows if b == name} for name in ("language model", "encoder", "decoder")}
    assert into == {"language model": {*diagrams.QUERIES, "[DEC]", "a", "red", "house"},
                    "encoder": {*diagrams.QUERIES, "a", "red"}, "decoder": {"encoder", "[DEC]", "house"}}  # fmt: skip
    out = {name: {b for a, b in arrows if a == name} for name in into}
    assert out == {"language model": {"a", "red", "house", "[SEP]"}, "encoder": {"decoder"},
                   "decoder": {"house", "[SEP]"}}  # fmt: skip
    losses = sorted(second["LM"], key=lambda box: -box.y0)
    for name, loss in zip(("language model", "decoder"), losses, strict=True):
        (mouth,) = second[name]
        told = [(box.x0, word) for word, found in second.items() for box in found
                if box.y0 > mouth.y1 and abs(box.y0 - loss.y0) < 9 and word != "LM" and box.x0 > loss.x1]  # fmt: skip
        read = [(box.x0, word) for word, found in second.items() for box in found
                if box.y1 < mouth.y0 and box.y0 > mouth.y0 - 60 and box.x1 <= mouth.x1 + 1]  # fmt: skip
        read = [word for _, word in sorted(read)]
        read = read[read.index("[DEC]") :]
        assert [word for _, word in sorted(told)] == [*read[1:], "[SEP]"]  # each token tells the next one
    labels = {text: [t for t in words(fig) if t.get_text() == text] for text in ("prefix", "prompt", "text")}
    assert {text: len(found) for text, found in labels.items()} == {"prefix": 2, "prompt": 1, "text": 2}


def test_the_drawn_q_former_shares_and_separates_what_the_code_does():
    fig = diagrams.qformer_block()
    blocks = QFormer(QFormerConfig(image_width=16, width=16, depth=5, heads=2)).blocks
    asking = [i for i, block in enumerate(blocks) if block.cross]
    (said,) = [" ".join(t.get_text().split()) for t in words(fig) if t.get_text().startswith("in every second")]
    assert said == f"in every second block: {', '.join(map(str, asking))}, …"
    parts = {name for name, _ in blocks[0].named_children()}
    assert parts == {"attn", "norm1", "cross", "query_mlp", "query_norm", "mlp", "norm2"}
    shared = ["LayerNorm: once, below the first block",
              "self-attention with its output layer: the mask says who sees whom", "LayerNorm"]  # fmt: skip
    assert [" ".join(text.split()) for text in boxes(fig, shared=True)] == shared
    assert [t.get_text() for t in words(fig)].count("shared") == len(shared)
    assert hatched(fig) == ["image encoder"]
    assert [" ".join(text.split()) for text in boxes(fig, new=True)] == [
        *diagrams.QUERIES, "LayerNorm, ln_vision", "FFN for queries, D → 4 D → D", "LayerNorm"
    ]  # fmt: skip
    (frame,) = new_frames(fig)
    inside = {name for name, found in placed(fig).items() if any(_contains(frame, box) for box in found)}
    cross = "cross-attention: queries ask the picture"
    assert inside == {cross, "LayerNorm"}
    where = placed(fig)
    (for_queries,), (for_words,) = where["FFN for queries, D → 4 D → D"], where["FFN for words, D → 4 D → D"]
    assert frame.x0 < for_queries.x0 < for_queries.x1 < frame.x1 < for_words.x0
    for ffn, kind in ((for_queries, "image"), (for_words, "text")):
        stream = [p for p in fig.findobj(FancyBboxPatch) if p.get_gid() and p.get_window_extent().y1 > ffn.y0 - 1
                  and ffn.x0 - 1 <= p.get_window_extent().x0 <= ffn.x1]  # fmt: skip
        assert len(stream) == 6 and all(is_filled(p, kind) for p in stream)  # FFN, LayerNorm and four states
    arrows = {(a, b) for a, b in joined(fig) if a != b}  # without those between a box and the plus above it
    assert {a for a, b in arrows if b == cross} == {"LayerNorm", "LayerNorm, ln_vision"}
    assert {a for a, b in arrows if b.startswith("FFN for words")} == {"LayerNorm"}  # words pass the picture by
    assert ("image encoder", "LayerNorm, ln_vision") in arrows
    table = "table of words + positions"
    assert {a for a, b in arrows if b == shared[0]} == {*diagrams.QUERIES, table}  # words alone have positions
    assert {a for a, b in arrows if b == table} == {"[CLS]", "a", "red", "house"}


def test_each_part_of_the_q_former_is_added_before_it_is_normalised():
    fig = diagrams.qformer_block()
    circles = [p.get_window_extent() for p in fig.findobj(Circle)]
    (ffn,) = placed(fig)["FFN for words, D → 4 D → D"]
    norms = placed(fig)["LayerNorm"]
    for left, right, n in ((0, ffn.x0 - 1, 3), (ffn.x0 - 1, 1000, 2)):
        stream = sorted((p for p in circles if left < p.x0 < right), key=lambda p: p.y0)
        above = sorted((b for b in norms if b.x0 < stream[0].x0 < b.x1), key=lambda b: b.y0)
        assert len(stream) == len(above) == n
        assert all(0 < norm.y0 - plus.y1 < 15 for plus, norm in zip(stream, above, strict=True))


STRONG = to_rgb(diagrams.STRONG["fused"])


@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_matrix_has_pictures_in_rows_texts_in_columns_and_true_pairs_on_the_diagonal(n):
    fig = diagrams.clip_matrix(n)
    texts = {t.get_text(): extent(t) for t in words(fig)}
    digits = "₁₂₃₄₅₆₇₈"[:n]
    true = [p.get_window_extent() for p in fig.findobj(Rectangle) if to_rgb(p.get_facecolor()[:3]) == STRONG]
    assert len(true) == n
    for cell, digit in zip(sorted(true, key=lambda cell: cell.x0), digits, strict=True):
        row, column = texts[f"I{digit}"], texts[f"T{digit}"]
        assert row.x1 < cell.x0 and cell.y0 < (row.y0 + row.y1) / 2 < cell.y1
        assert column.y0 > cell.y1 and cell.x0 < (column.x0 + column.x1) / 2 < cell.x1
    for a, b in itertools.product(digits, digits) if n <= 4 else ():
        cell, row, column = texts[f"I{a}·T{b}"], texts[f"I{a}"], texts[f"T{b}"]
        assert abs(cell.y0 + cell.y1 - row.y0 - row.y1) < 8 and abs(cell.x0 + cell.x1 - column.x0 - column.x1) < 8


def test_a_row_is_a_pictures_choice_and_a_column_a_texts_and_the_papers_names_stand_with_them():
    fig = diagrams.clip_matrix(4)
    frames = {p.get_edgecolor()[:3]: p.get_window_extent() for p in fig.findobj(Rectangle) if not p.get_fill()}
    row, column = frames[to_rgb(diagrams.EDGES["image"])], frames[to_rgb(diagrams.EDGES["text"])]
    assert row.width > 3 * row.height and row.width > 3 * column.width and column.height > 3 * row.height
    texts = {" ".join(t.get_text().split()): extent(t) for t in words(fig)}
    at_row = texts["softmax along a row: each picture chooses a text"]
    at_column = texts["softmax down a column: each text chooses a picture"]
    assert at_row.x0 > row.x1 and row.y0 < (at_row.y0 + at_row.y1) / 2 < row.y1
    assert at_column.y1 < column.y0 and at_column.x0 < (column.x0 + column.x1) / 2 < at_column.x1
    names = {"called loss_t in the paper's code": ("cross-entropy over axis 1", at_row),
             "called loss_i in the paper's code": ("cross-entropy over axis 0", at_column)}  # fmt: skip
    for name, (loss, softmax) in names.items():  # one below the other
        assert texts[name].y1 < texts[loss].y0 < texts[loss].y1 < softmax.y0
        assert softmax.x0 < (texts[loss].x0 + texts[loss].x1) / 2 < softmax.x1


def test_zero_shot_freezes_both_towers_and_takes_the_highest_share():
    fig = diagrams.zero_shot_diagram()
    assert hatched(fig) == ["text tower", "image tower"]
    texts = {t.get_text(): extent(t) for t in words(fig)}
    assert {f"a picture of a {name}" for name in ("house", "tree", "boat")} <= set(texts)
    shares = {text: float(text.split()[1]) for text in texts if len(text.split()) == 2 and "0." in text}
    assert sum(shares.values()) == pytest.approx(1)
    best = texts[max(shares, key=shares.get)]
    assert 0 < texts["best"].y0 - best.y1 < 12 and texts["best"].x0 < best.x1


def marked(dots: Line2D, xs: list[float], ys: list[float]) -> set[tuple[int, int]]:
    """Rows and columns of the cells with a dot, from the columns' middles `xs` and the rows' `ys`, both ascending."""
    return {(len(ys) - 1 - ys.index(round(y, 4)), xs.index(round(x, 4))) for x, y in dots.get_xydata()}


def test_mask_drawing_marks_exactly_the_allowed_pairs():
    fig = diagrams.attention_mask(MASK, TOKENS, groups=["image"] * 2 + ["text"] * 4)
    (dots,) = [line for line in fig.findobj(Line2D) if line.get_marker() == "o"]
    assert len(dots.get_xdata()) == MASK.sum()
    xs, ys = (sorted(set(np.round(v, 4))) for v in (dots.get_xdata(), dots.get_ydata()))
    assert marked(dots, xs, ys) == set(zip(*map(list, np.nonzero(MASK)), strict=True))
    legend = [t.get_text() for t in words(fig)]
    assert {"looks at image", "looks at text", "crosses over", "may not"} <= set(legend)


@pytest.mark.parametrize(
    ("draw", "masks"),
    [(lambda: diagrams.block_masks(BLOCKS, PAIR, PAIR_GROUPS), BLOCKS),
     (lambda: diagrams.qformer_masks(QFORMER, 3, ASKED), QFORMER)],
    ids=["block_masks", "qformer_masks"],
)  # fmt: skip
def test_masks_side_by_side_mark_exactly_the_allowed_pairs_of_each(draw, masks):
    fig = draw()
    panels = [line for line in fig.findobj(Line2D) if line.get_marker() == "o"]
    ys = sorted(set(np.round(panels[0].get_ydata(), 4)))
    for dots, mask in zip(panels, masks.values(), strict=True):
        xs = sorted(set(np.round(dots.get_xdata(), 4)))
        assert len(dots.get_xdata()) == mask.sum()
        assert marked(dots, xs, ys) == set(zip(*map(list, np.nonzero(mask)), strict=True))
    texts = [t.get_text() for t in words(fig)]
    assert texts.count("a") == 4  # once at the rows, and above the columns of each
    assert set(masks) <= set(texts)


def test_the_q_formers_masks_name_queries_before_words_and_say_who_crosses():
    fig = diagrams.qformer_masks(QFORMER, 3, ASKED)
    edge = {to_rgb(diagrams.EDGES[kind]): kind for kind in ("image", "text")}
    rows = [t for t in words(fig) if t.get_ha() == "right"]
    rows = sorted(rows, key=lambda t: -extent(t).y0)
    assert [t.get_text() for t in rows] == ["query 1", "query 2", "query 3", *ASKED]
    assert [edge[to_rgb(t.get_color())] for t in rows] == ["image"] * 3 + ["text"] * 4
    panels = [np.array(image.get_array())[..., :3] for image in fig.axes[0].images]
    crossing = [np.isclose(cells, STRONG).all(-1) for cells in panels]
    across = np.zeros((7, 7), bool)
    across[3:, :3] = True  # words look at queries
    for seen, expected in zip(crossing, (np.zeros((7, 7), bool), across | across.T, across), strict=True):
        assert (seen == expected).all()
    legend = {t.get_text() for t in words(fig)}
    assert {"looks at queries", "looks at words", "looks across", "may not"} <= legend
    assert not legend & {"looks at image", "looks at text", "crosses over"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagrams.vit_block("middle"), "choose 'pre' or 'post'"),
        (lambda: diagrams.course_map(9), "choose a number from 1 to 8"),
        (lambda: diagrams.vit_overview(np.zeros((3, 30, 30), np.uint8)), "multiples of 4"),
        (lambda: diagrams.attention_mask(np.ones((2, 2)), ["a", "b"]), "must be boolean"),
        (lambda: diagrams.attention_mask(np.ones((2, 2, 2), bool), ["a", "b"]), "must have 2 dimensions"),
        (lambda: diagrams.attention_mask(np.ones((2, 3), bool), ["a", "b"]), "col_labels has 2 entries"),
        (lambda: diagrams.attention_mask(MASK, TOKENS, groups=["image"]), "groups has 1 entries"),
        (lambda: diagrams.attention_mask(MASK, TOKENS, groups=["sound"] * 6), "no modality 'sound'"),
        (lambda: diagrams.attention_mask(MASK[:2], TOKENS[:2], TOKENS, groups=["text"] * 2), "give both"),
        (lambda: diagrams.block_masks({}, PAIR), "masks is empty"),
        (lambda: diagrams.block_masks({"all": SAME, "own": MASK}, PAIR), r"masks\['own'\] has the shape \(6, 6\)"),
        (lambda: diagrams.block_masks({"all": SAME * 1.0}, PAIR), r"masks\['all'\] must be boolean"),
        (lambda: diagrams.block_masks({"all": SAME}, PAIR, ["text"]), "groups has 1 entries"),
        (lambda: diagrams.qformer_masks({}, 3, ASKED), "masks is empty"),
        (lambda: diagrams.qformer_masks(QFORMER, 2, ASKED), r"\(7, 7\): 2 queries and 4 words need \(6, 6\)"),
        (
            lambda: diagrams.qformer_masks({"ITM": joint_mask(THERE, 3)}, 3, ASKED),
            r"masks\['ITM'\] has the shape \(1, ",
        ),
        (lambda: diagrams.qformer_masks({"ITM": np.ones((7, 7))}, 3, ASKED), r"masks\['ITM'\] must be boolean"),
        (lambda: diagrams.blip2_overview(np.zeros((3, 3, 9), np.uint8)), "no 4 x 4 patches: give a larger one"),
        (lambda: diagrams.vilt_overview(words=("a", "house")), "three words"),
        (lambda: diagrams.vilt_overview(np.zeros((3, 2, 9), np.uint8)), "give a larger one"),
        (lambda: diagrams.clip_overview(words=("house",)), "three words"),
        (lambda: diagrams.clip_overview(np.zeros((3, 2, 9), np.uint8)), "give a larger one"),
        (lambda: diagrams.flip_overview(words=("house",)), "three words"),
        (lambda: diagrams.flip_overview(np.zeros((3, 7, 9), np.uint8)), "no 8 x 8 patches: give a larger one"),
        (lambda: diagrams.flip_overview(keep=[]), "one or more different places from 0 to 63"),
        (lambda: diagrams.flip_overview(keep=[1, 1]), "different places"),
        (lambda: diagrams.flip_overview(keep=[64]), "from 0 to 63"),
        (lambda: diagrams.flip_overview(keep=[-1]), "from 0 to 63"),
        (lambda: diagrams.flip_overview(keep=[[1, 2]]), "keep must have 1 dimensions"),
        (lambda: diagrams.albef_overview(words=("house",)), "three words"),
        (lambda: diagrams.albef_overview(np.zeros((3, 3, 9), np.uint8)), "no 4 x 4 patches: give a larger one"),
        (lambda: diagrams.vlmo_overview(words=("house",)), "three words"),
        (lambda: diagrams.vlmo_overview(np.zeros((3, 3, 9), np.uint8)), "no 4 x 4 patches: give a larger one"),
        (lambda: diagrams.vlmo_stages(sentences=0), "sentences=0: give the size of each stage"),
        (lambda: diagrams.blip_overview(np.zeros((3, 3, 9), np.uint8)), "no 4 x 4 patches: give a larger one"),
        (lambda: diagrams.capfilt({}), "counts has nothing: give one number for each of 'human', 'web'"),
        (lambda: diagrams.capfilt({"human": 1}), "counts has 'human': give one number for each"),
        (lambda: diagrams.capfilt({**COUNTS, "kept": 1}), "'kept': give one number for each"),
        (lambda: diagrams.capfilt(COUNTS, false={"human": 0.1}), r"false\['human'\] is 0.1: .* all but 'human'"),
        (lambda: diagrams.capfilt(false={"web": 43}), r"false\['web'\] is 43: give a share from 0 to 1"),
        (lambda: diagrams.clip_matrix(1), "choose n from 2 to 8"),
        (lambda: diagrams.clip_matrix(9), "choose n from 2 to 8"),
        (lambda: diagrams.legend_strip(["sound"]), "no entry 'sound'"),
        (lambda: Canvas(20, 3), "8.2 at most"),
        (lambda: Canvas(3, 3).box(0, 0, 1, 1, modality="sound"), "no modality 'sound'"),
        (lambda: Canvas(3, 3).arrow((1, 1), (1, 1)), "no length"),
        (lambda: Canvas(3, 3).tokens(0, 0, ["a", "b"], ["text"]), "2 tokens have 1 modalities"),
        (lambda: diagrams.Box(0, 0, 1, 1).side("north"), "choose left, right, top or bottom"),
    ],
)
def test_mistakes_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_checks_of_this_file_notice_bad_drawings():
    c = Canvas(4, 1)
    c.note(1, 0.5, "one text")
    c.note(1.2, 0.5, "over another")
    assert overlapping(words(c.fig))
    c.note(3.9, 0.2, "cut at the edge")
    assert not all(_contains(c.fig.bbox, extent(t)) for t in words(c.fig))


def _contains(outer: Bbox, inner: Bbox, slack: float = 0.5) -> bool:
    return (outer.x0 - slack <= inner.x0 and inner.x1 <= outer.x1 + slack
            and outer.y0 - slack <= inner.y0 and inner.y1 <= outer.y1 + slack)  # fmt: skip


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _contrast(a: str, b: str) -> float:
    def light(colour: str) -> float:
        parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
