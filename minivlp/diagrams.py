"""Drawings of architectures and attention masks, made from code, in one visual language for the whole course.

Fill colour = modality (image, text, both, neither); hatched = frozen; double outline = shared weights; green outline
and the tag "new" = new in this lesson. Each drawing is a function that returns a `Figure`; `alt_text` tells those who
cannot see it what it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

from minivlp.plots import INK, QUIET, WIDTH, array, inch_axes, new_figure, picture, text_height, text_width, wrap

SMALLEST = 8.0  # points: smaller letters cannot be read in a notebook on GitHub
# "pair" is image and text side by side, which never look at each other: half a box for each. "causal" is text that is
# written, word after word, where reading and writing have weights of their own.
FILLS = {"image": "#CFE5F5", "text": "#FFE3B3", "fused": "#E4D4EE", "neutral": "#EFEFEF", "pair": "#CFE5F5",
         "causal": "#F8CFC9"}  # fmt: skip
EDGES = {"image": "#0072B2", "text": "#B26A00", "fused": "#7B3F98", "neutral": "#6B6B6B", "pair": "#5A6E75",
         "causal": "#A33A2C"}  # fmt: skip
STRONG = {"image": "#3A8FC4", "text": "#E69F00", "fused": "#9A63B5", "neutral": "#7A7A7A"}
NEW = "#007F5C"

alt_text = {
    "legend_strip": "The course's visual language: blue boxes are image, orange text, purple both, grey neither; "
    "hatched is frozen, a double outline is shared weights, a green outline is new in this lesson.",
    "vit_overview": "ViT from bottom to top: a picture is cut into 16 patches, each goes through the same linear "
    "layer, a class token is put in front, positions are added, L encoder blocks follow, and the normalised class "
    "token goes through a linear head to class scores.",
    "vit_block": "One encoder block. In pre-norm, LayerNorm and multi-head attention stand in a branch that is added "
    "to the stream of tokens, then LayerNorm and an MLP in another. In post-norm the order is attention, add, "
    "LayerNorm, MLP, add, LayerNorm.",
    "norm_placement": "Pre-norm and post-norm blocks side by side: in pre-norm the LayerNorms stand inside the "
    "branches and the stream itself is never normalised; in post-norm they stand on the stream after each addition.",
    "course_map": "Four architectures with ViT, which reads pictures alone, as their root. Single stream: ViLT. Dual "
    "stream: LXMERT and ViLBERT, built in lesson 02 to compare. Dual encoder: CLIP and FLIP. Fusion + dual, both "
    "routes in one model: ALBEF, VLMo, BLIP and BLIP-2. Arrows say what each takes from an earlier lesson.",
    "family_map": "Four families by the size of their parts: (a) a large visual embedder, a smaller textual one, "
    "little interaction; (b) two equal embedders and little interaction, as in CLIP; (c) a heavy visual embedder and a "
    "deep interaction; (d) small embedders and nearly everything in the interaction, as in ViLT.",
    "attention_mask": "A table of tokens: a coloured cell means that the token of its row may look at the token of "
    "its column, an empty cell that it may not.",
    "block_masks": "Attention masks over the same tokens side by side, each under its name: a coloured cell means that "
    "the token of its row may look at the token of its column, an empty cell that it may not.",
    "vilt_overview": "ViLT from bottom to top. Left, the caption: word vectors plus positions, then LayerNorm. Right, "
    "the picture: patches through one linear layer, a class token in front, plus positions. Both get a modality type, "
    "0 or 1, are joined, text first, and go through the same encoder blocks and a last LayerNorm. The text's [CLS] "
    "goes through the pooler to ITM, the hidden words to MLM, words and patches to WPA.",
    "vilt_objectives": "Two passes of the same model for each batch. Pass 1 reads true pairs with hidden words and "
    "gives the MLM loss. Pass 2 reads whole texts, half of them with another text's picture, and gives the ITM loss "
    "and the WPA loss. The sum is MLM + ITM + 0.1 times WPA.",
    "single_and_dual_stream": "Three panels. Single stream: one self-attention and one MLP over text and image "
    "together. Dual stream in LXMERT's order: cross-attention with shared weights, then self-attention, then an MLP "
    "for each. Dual encoder: two encoders, whose two vectors meet in a dot product.",
    "clip_overview": "CLIP from bottom to top. Left, the text tower: words between [start] and [end], positions, "
    "causal blocks, LayerNorm; the state of [end] is read. Right, the image tower: patches, class token, positions, a "
    "LayerNorm before the blocks, blocks, LayerNorm on the class token, which is read. Each has its own projection "
    "and ends in a vector of length 1. The vectors of B texts and B pictures meet in a B x B matrix of similarities "
    "times exp(t), from which comes the contrastive loss.",
    "clip_matrix": "A matrix of similarities, a row for each picture and a column for each text, the true pairs marked "
    "on the diagonal. Softmax along a row, axis 1: each picture chooses a text; the paper's code calls this loss_t. "
    "Softmax down a column, axis 0: each text chooses a picture; the paper's code calls this loss_i. The loss is their "
    "mean.",
    "zero_shot_diagram": "Classification without training. The class names house, tree and boat are put into the "
    "sentence a picture of a {label}, and the frozen text tower makes one vector of each. The frozen image tower makes "
    "a vector of the picture. It is compared with the vector of each class, and the most similar class, house, wins.",
    "flip_overview": "FLIP while it trains, from bottom to top. Left, the text tower: words, positions, blocks without "
    "a causal mask, LayerNorm; the first token is read. Right, a picture of 64 patches: one linear layer, fixed "
    "positions, then half of the tokens are removed and the others close ranks behind a class token, so the blocks "
    "read 33 tokens, not 65; LayerNorm, mean over all tokens. No mask token, no decoder, no reconstruction. "
    "Projections, the B x B matrix and the contrastive loss are CLIP's.",
    "flip_stages": "Three stages with the same weights. Training, nearly all of the steps: half of the patches are "
    "removed, the image tower reads 1 + 32 tokens. Unmasked tuning, a few percent of the steps at a small learning "
    "rate: 1 + 64 tokens, the same contrastive loss. Use: whole pictures, 1 + 64 tokens, the cosine of both vectors.",
    "four_ways_to_hide": "Eight of 16 patches hidden in four ways. Removed: the blocks read 9 tokens. A mask token in "
    "their place: 17 tokens and other numbers, for the rest look at it. Pixels set to zero: 17 tokens and other "
    "numbers. An attention mask: 17 tokens, and the tokens that are seen have the same numbers as with removal.",
    "albef_overview": "ALBEF from bottom to top. Left, the image encoder; right, the lower half of the text encoder. "
    "Between them ITC compares the vectors of their class tokens with keys: the teacher's vectors of the batch and "
    "those in a queue of earlier pairs. The teacher is a frozen twin that follows the student. Above the lower half "
    "stands the upper half: blocks of self-attention, cross-attention and an MLP, in which the words ask and the "
    "states of the picture answer. On top of it the class token goes to ITM, the hidden words to MLM.",
    "albef_modes": "The text encoder used in three ways. Text: ids go through the lower half alone, for ITC and for "
    "search by vectors. Fusion: text states that are there already go through the upper half together with a picture's "
    "states, for ITM and for re-ranking. Multi-modal: ids go through both halves, the upper with a picture, for MLM.",
    "albef_step": "One training step in seven numbered parts. At the left, without gradient: 1 the teacher follows the "
    "student, 2 it gives vectors and scores of hidden words, 5 its vectors are pushed into the queue. At the right, "
    "with gradient: 3 the student's states. In the middle the losses: 4 ITC over the keys of batch and queue with soft "
    "targets, 6 ITM over 3 B pairs with wrong partners drawn by ITC's similarities, 7 MLM with soft targets.",
    "vlmo_block": "One Multiway block from bottom to top. Shared by words and patches: LayerNorm, self-attention over "
    "all tokens together, the layer scales gamma_1 and gamma_2. Between them each token goes to one of three experts, "
    "each a LayerNorm and an MLP of its own: words to L-FFN, patches to V-FFN, and in the last F blocks all tokens of "
    "a pair to VL-FFN. What it goes to depends on its kind and on the block alone. Two shortcuts go around.",
    "vlmo_overview": "The same stack of blocks three times, side by side. As image encoder it reads [I_CLS] and the "
    "patches, with V-FFN in every block; as text encoder [T_CLS] and the words, with L-FFN in every block; ITC "
    "compares the two class tokens. As fusion encoder it reads words, then patches in one row: joint attention, L-FFN "
    "for words and V-FFN for patches, and in the last F blocks VL-FFN for all. [T_CLS] goes to ITM, hidden words to "
    "MLM.",
    "vlmo_stages": "Three stages, each with the weights of the one before. Pictures alone: masked image modelling "
    "trains patch embedding, attention and V-FFN. Texts alone: masked language modelling trains word embeddings, "
    "L-FFN, the last LayerNorm and the MLM head; attention and V-FFN are frozen. Pairs: ITC, ITM and MLM train "
    "everything, and VL-FFN for the first time.",
    "blip_overview": "BLIP from bottom to top. Left, a ViT, which looks at a picture once. Beside it one text "
    "transformer in three columns. Text encoder, led by [CLS]: self-attention both ways, FFN; its vector goes to ITC. "
    "Image-grounded encoder, led by [ENC]: the same self-attention, cross-attention to the picture's states, the same "
    "FFN; yes or no goes to ITM. Image-grounded decoder, led by [DEC]: a causal self-attention of its own, the same "
    "cross-attention and FFN; the next words go to LM. The tables of words and positions are shared by all three.",
    "blip_block": "One block from bottom to top, with the encoder's stream at the left and the decoder's at the right. "
    "Each has its own self-attention: q, k, v, output layer and LayerNorm. Both go through the same cross-attention, "
    "which asks a picture's states, the same FFN and the LayerNorms after them; tables of words and positions are the "
    "same too. After each part its input is added, then comes LayerNorm. Beside the decoder a cache keeps the keys and "
    "values of the words before.",
    "capfilt": "CapFilt in five steps. 1: human pairs and web pairs pre-train BLIP. 2: two copies of it are tuned on "
    "the human pairs, a captioner with LM and a filter with ITC and ITM. 3: the captioner writes a synthetic text for "
    "each web picture. 4: the filter keeps or drops web texts and synthetic texts. 5: human pairs, kept web pairs and "
    "kept synthetic pairs pre-train a new model.",
    "blip2_overview": "BLIP-2 in two stages. Stage 1: a picture goes through a frozen image encoder and a trained "
    "LayerNorm to the Q-Former, where learned queries and words share the self-attention, the queries alone have "
    "cross-attention, and each kind has its own FFN. ITM reads the queries, ITC queries and [CLS], ITG the words. "
    "Stage 2: the same without words. The queries' states go through a linear layer and are a prefix for a frozen "
    "language model: decoder-only, which reads prefix and text, or encoder-decoder, whose encoder reads prefix and "
    "prompt and whose decoder writes the text.",
    "qformer_block": "One block of the Q-Former from bottom to top, with the queries' stream at the left and the "
    "words' at the right. Both go through one self-attention and one LayerNorm. Then, in every second block, the "
    "queries alone ask the frozen states of the picture by cross-attention, with a LayerNorm of its own; words pass it "
    "by. Each stream ends in an FFN and a LayerNorm of its own. After each part its input is added.",
    "qformer_masks": "The Q-Former's attention masks side by side, queries before words: a coloured cell means that "
    "the token of its row may look at the token of its column, an empty cell that it may not.",
}


# ---------------------------------------------------------------------------------------------------------------------
# A small vocabulary of shapes


@dataclass(frozen=True)
class Box:
    """A placed shape, in inches: lower left corner, width and height. Arrows find their ends on its sides."""

    x: float
    y: float
    w: float
    h: float

    def side(self, name: str, at: float = 0.5) -> tuple[float, float]:
        """The point at the share `at` of a side: "left", "right", "top" or "bottom"."""
        points = {
            "left": (self.x, self.y + at * self.h), "right": (self.x + self.w, self.y + at * self.h),
            "bottom": (self.x + at * self.w, self.y), "top": (self.x + at * self.w, self.y + self.h),
        }  # fmt: skip
        if name not in points:
            raise ValueError(f"a box has no side {name!r}: choose left, right, top or bottom")
        return points[name]


class Canvas:
    """A white sheet of `width` x `height` inches, origin at the lower left, on which boxes, arrows and words are put.

    Letters have 8 points or more. Text is wrapped and, if need be, shrunk to fit its box; one that still does not fit
    raises ValueError, so that no drawing ever shows cut words.
    """

    def __init__(self, width: float, height: float) -> None:
        if width > WIDTH:
            raise ValueError(f"a canvas {width} inches wide does not fit a notebook: make it {WIDTH} at most")
        self.width, self.height = width, height
        self.fig = new_figure(width, height, layout="none")
        self.ax = inch_axes(self.fig)
        self._boxes = 0

    def box(
        self, x: float, y: float, w: float, h: float, text: str = "", *, modality: str = "neutral", new: bool = False,
        frozen: bool = False, shared: bool = False, size: float = 10, weight: str = "normal", tag: str = "new",
    ) -> Box:  # fmt: skip
        """A module. `modality`: "image", "text", "fused" (both in one), "pair" (both side by side), "causal"
        (text that is written) or "neutral".

        `new`, `frozen` and `shared` look as in the legend; `tag` are the words on a new box.
        """
        if modality not in FILLS:
            raise ValueError(f"there is no modality {modality!r}: choose one of {', '.join(FILLS)}")
        self._boxes += 1
        name, edge = f"box {self._boxes}", NEW if new else EDGES[modality]
        shape = self._outline(x, y, w, h, fill=True, facecolor=FILLS[modality], edgecolor=edge,
                              linewidth=2.4 if new else 1.3, zorder=2, gid=name)  # fmt: skip
        self.ax.add_patch(shape)
        if modality == "pair":
            half = Rectangle((x + w / 2, y), w / 2, h, facecolor=FILLS["text"], edgecolor="none", zorder=2)
            self.ax.add_patch(half)
            half.set_clip_path(shape)
            self.ax.add_patch(self._outline(x, y, w, h, edgecolor=edge, linewidth=2.4 if new else 1.3, zorder=2.05))
        if frozen:  # the hatch has its own paler colour, so that words stay readable
            pale = EDGES[modality] + "50"
            self.ax.add_patch(self._outline(x, y, w, h, hatch="////", edgecolor=pale, linewidth=0, zorder=2.1))
        inset = 0.045 if shared else 0.0
        if shared:
            inner = (x + inset, y + inset, w - 2 * inset, h - 2 * inset)
            self.ax.add_patch(self._outline(*inner, edgecolor=edge, linewidth=1.0, zorder=2.2))
        if text:
            room = (w - 0.08 - 2 * inset, h - 0.04 - 2 * inset)
            lines, size = _fitted(text, *room, size, weight)
            behind = {"facecolor": FILLS[modality], "edgecolor": "none", "pad": 1.0} if frozen else None
            self.ax.text(x + w / 2, y + h / 2, lines, ha="center", va="center", fontsize=size, weight=weight, gid=name,
                         color=INK, zorder=3, linespacing=1.15, bbox=behind, parse_math=False)  # fmt: skip
        if new and tag:
            self.tag(x + w, y + h, tag)
        return Box(x, y, w, h)

    @staticmethod
    def _outline(x: float, y: float, w: float, h: float, *, fill: bool = False, **style: Any) -> FancyBboxPatch:
        return FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.06", fill=fill, **style)

    def tag(self, right: float, y: float, text: str, *, colour: str = NEW) -> None:
        """A small label that sits on a box's upper edge and ends a little before its right corner."""
        w = text_width(text, SMALLEST, "bold") + 0.1
        x = right - w - 0.06
        self.ax.add_patch(Rectangle((x, y - 0.085), w, 0.17, facecolor=colour, edgecolor=colour, zorder=4))
        self.ax.text(x + w / 2, y - 0.005, text, ha="center", va="center", fontsize=SMALLEST, weight="bold",
                     color="white", zorder=5)  # fmt: skip

    def frame(
        self, x: float, y: float, w: float, h: float, label: str = "", *, modality: str = "neutral", new: bool = False,
        corner: str = "top left",
    ) -> Box:  # fmt: skip
        """A dashed outline around things that belong together, for instance the block that is repeated "L x"."""
        edge = NEW if new else EDGES[modality]
        self.ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.08", edgecolor=edge,
                                         facecolor="none", linewidth=1.4, linestyle=(0, (4, 2)), zorder=1))  # fmt: skip
        if label:
            vertical, side = corner.split()
            at = x + (0.09 if side == "left" else w - 0.09), y + (h - 0.06 if vertical == "top" else 0.06)
            self.ax.text(*at, label, ha=side, va=vertical, fontsize=9, weight="bold", color=edge, parse_math=False)
        return Box(x, y, w, h)

    def arrow(
        self, a: Box | tuple[float, float], b: Box | tuple[float, float], label: str | None = None, *,
        start: str | None = None, end: str | None = None, at: tuple[float, float] = (0.5, 0.5),
        bend: bool = False, middle: float = 0.5, dashed: bool = False, colour: str = QUIET, head: bool = True,
        side: str | None = None, width: float | None = None, size: float = SMALLEST,
    ) -> None:  # fmt: skip
        """An arrow from box (or point) `a` to `b`, with a word beside it.

        The sides are found from where the boxes lie unless `start` and `end` name them; `at` says where on each side.
        Arrows between boxes that overlap sideways are exactly upright or level. `bend=True` routes at right angles, and
        `middle` says where a route with two bends turns. `side` ("left", "right", "above", "below") places the label,
        which is wrapped at `width` inches.
        """
        points = _route(a, b, start, end, at, bend, middle)
        style = (0, (4, 2.5)) if dashed else "-"
        (x0, y0), (x1, y1) = points[-2], points[-1]
        length = float(np.hypot(x1 - x0, y1 - y0))
        if length < 1e-6:
            raise ValueError("an arrow has no length: its two ends are the same point")
        if head:  # the line stops inside the arrow head, whose tip alone touches the box
            ux, uy = (x1 - x0) / length, (y1 - y0) / length
            back = (x1 - 0.11 * ux, y1 - 0.11 * uy)
            tip = [(x1, y1), (back[0] - 0.045 * uy, back[1] + 0.045 * ux), (back[0] + 0.045 * uy, back[1] - 0.045 * ux)]
            self.ax.add_patch(Polygon(tip, closed=True, facecolor=colour, edgecolor="none", zorder=1.8))
            points = [*points[:-1], (x1 - 0.08 * ux, y1 - 0.08 * uy)]
        xs, ys = zip(*points, strict=True)
        self.ax.plot(xs, ys, color=colour, linewidth=1.4, linestyle=style, zorder=1.5, gid="arrow",
                     solid_joinstyle="round", solid_capstyle="butt")  # fmt: skip
        if label:
            lengths = [abs(x1 - x0) + abs(y1 - y0) for (x0, y0), (x1, y1) in pairwise(points)]
            k = int(np.argmax(lengths))
            (x0, y0), (x1, y1) = points[k], points[k + 1]
            level = abs(x1 - x0) >= abs(y1 - y0)
            side = side or ("above" if level else "right")
            dx, dy, ha, va = {
                "above": (0, 0.03, "center", "bottom"), "below": (0, -0.04, "center", "top"),
                "right": (0.06, 0, "left", "center"), "left": (-0.06, 0, "right", "center"),
            }[side]  # fmt: skip
            self.ax.text((x0 + x1) / 2 + dx, (y0 + y1) / 2 + dy, wrap(label, width or WIDTH, size), ha=ha, va=va,
                         fontsize=size, color=colour if colour != QUIET else INK, linespacing=1.1, zorder=3,
                         parse_math=False)  # fmt: skip

    def tokens(
        self, x: float, y: float, labels: Sequence[str], modality: str | Sequence[str] = "neutral", *,
        side: float = 0.36, gap: float = 0.06, new: Sequence[int] = (), size: float = 9, width: float | None = None,
    ) -> list[Box]:  # fmt: skip
        """A row of squares, one a token, from `x` to the right. Modalities for all or one each; `new` lists indices.

        `width` makes the squares boxes of that width, for whole words.
        """
        width = width or side
        kinds = [modality] * len(labels) if isinstance(modality, str) else list(modality)
        if len(kinds) != len(labels):
            raise ValueError(f"{len(labels)} tokens have {len(kinds)} modalities: give one for all, or one each")
        return [
            self.box(x + i * (width + gap), y, width, side, label, modality=kind, new=i in new, size=size, tag="")
            for i, (label, kind) in enumerate(zip(labels, kinds, strict=True))
        ]

    def loss(self, x: float, y: float, w: float, text: str, *, h: float = 0.34, new: bool = False) -> Box:
        """A loss: white, with a thick dark outline, so that it is never taken for a module."""
        self._boxes += 1
        name, edge = f"box {self._boxes}", NEW if new else INK
        self.ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=f"round,pad=0,rounding_size={h / 2}", facecolor="white",
                                         edgecolor=edge, linewidth=2.2, zorder=2, gid=name))  # fmt: skip
        lines, size = _fitted(text, w - 0.2, h - 0.06, 9, "bold")
        self.ax.text(x + w / 2, y + h / 2, lines, ha="center", va="center", fontsize=size, weight="bold", color=edge,
                     zorder=3, gid=name, parse_math=False)  # fmt: skip
        if new:
            self.tag(x + w, y + h, "new")
        return Box(x, y, w, h)

    def plus(self, x: float, y: float, *, radius: float = 0.12) -> Box:
        """The place where two things are added, centred at (x, y)."""
        self.ax.add_patch(Circle((x, y), radius, facecolor="white", edgecolor=INK, linewidth=1.3, zorder=2.5))
        arm = 0.6 * radius
        self.ax.plot([x - arm, x + arm], [y, y], color=INK, linewidth=1.3, zorder=2.6)
        self.ax.plot([x, x], [y - arm, y + arm], color=INK, linewidth=1.3, zorder=2.6)
        return Box(x - radius, y - radius, 2 * radius, 2 * radius)

    def note(
        self, x: float, y: float, text: str, *, width: float | None = None, size: float = 9, colour: str = INK,
        ha: str = "left", va: str = "center", weight: str = "normal",
    ) -> None:  # fmt: skip
        """Words without a box, wrapped at `width` inches."""
        self.ax.text(x, y, wrap(text, width or WIDTH, size, weight), ha=ha, va=va, fontsize=max(size, SMALLEST),
                     color=colour, weight=weight, linespacing=1.2, zorder=3, parse_math=False)  # fmt: skip

    def image(self, x: float, y: float, w: float, h: float, pixels: np.ndarray) -> Box:
        """Pixels (rows, columns, 3) in a thin frame of the image's colour."""
        self.ax.imshow(pixels, extent=(x, x + w, y, y + h), aspect="auto", interpolation="nearest", zorder=2)
        self.ax.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=EDGES["image"], linewidth=1.0, zorder=2.5))
        self.ax.set(xlim=(0, self.width), ylim=(0, self.height))
        return Box(x, y, w, h)

    def legend(self, x: float, y: float, items: Sequence[str], *, width: float | None = None) -> float:
        """The legend's entries from (x, y) to the right, in further rows below where `width` inches are full.

        Items: the modalities, "frozen", "shared" and "new". Returns the height used.
        """
        names = {"image": "image", "text": "text", "fused": "both in one", "pair": "both, side by side",
                 "neutral": "neither", "frozen": "frozen", "shared": "shared weights", "new": "new here"}  # fmt: skip
        if unknown := [item for item in items if item not in names]:
            raise ValueError(f"the legend has no entry {unknown[0]!r}: choose from {', '.join(names)}")
        left, row = x, 0
        for item in items:
            length = 0.4 + text_width(names[item], 9)
            if left > x and left + length > x + (width or self.width - x):
                left, row = x, row + 1
            base = y - 0.28 * row
            self.box(left, base, 0.34, 0.18, modality=item if item in FILLS else "neutral", new=item == "new",
                     frozen=item == "frozen", shared=item == "shared", tag="")  # fmt: skip
            self.note(left + 0.4, base + 0.09, names[item])
            left += length + 0.2
        return 0.28 * (row + 1)


def _fitted(text: str, width: float, height: float, size: float, weight: str) -> tuple[str, float]:
    """The text wrapped, at the largest size up to `size` points at which it fits without breaking a word."""
    while True:
        lines = wrap(text, width, size, weight)
        broken = any(text_width(word, size, weight) > width for word in text.split())
        if not broken and text_height(lines.count("\n") + 1, size) <= height:
            return lines, size
        if size <= SMALLEST:
            raise ValueError(f"the text {text!r} does not fit a box {width:.2f} x {height:.2f} inches inside: "
                             "make the box larger or the text shorter")  # fmt: skip
        size = max(SMALLEST, size - 0.5)


def _route(
    a: Box | tuple[float, float], b: Box | tuple[float, float], start: str | None, end: str | None,
    at: tuple[float, float], bend: bool, middle: float,
) -> list[tuple[float, float]]:  # fmt: skip
    """The corners of an arrow's line."""
    a, b = (p if isinstance(p, Box) else Box(*p, 0, 0) for p in (a, b))
    gap_x = max(b.x - a.x - a.w, a.x - b.x - b.w)
    gap_y = max(b.y - a.y - a.h, a.y - b.y - b.h)
    level = gap_x >= gap_y
    low, high = (max(a.y, b.y), min(a.y + a.h, b.y + b.h)) if level else (max(a.x, b.x), min(a.x + a.w, b.x + b.w))
    facing = not (start or end or bend) and at == (0.5, 0.5) and low <= high  # they overlap: a straight line will do
    if level:
        auto = ("right", "left") if b.x >= a.x else ("left", "right")
    else:
        auto = ("top", "bottom") if b.y >= a.y else ("bottom", "top")
    start, end = start or auto[0], end or auto[1]
    p, q = a.side(start, at[0]), b.side(end, at[1])
    if facing:
        m = (low + high) / 2
        return [(p[0], m), (q[0], m)] if level else [(m, p[1]), (m, q[1])]
    if not bend:
        return [p, q]
    flat = [name in ("left", "right") for name in (start, end)]
    if flat[0] and not flat[1]:
        corners = [(q[0], p[1])]
    elif flat[1] and not flat[0]:
        corners = [(p[0], q[1])]
    elif start == end:  # out and back on the same side: around by `middle` inches
        far = {"left": min(p[0], q[0]) - middle, "right": max(p[0], q[0]) + middle,
               "bottom": min(p[1], q[1]) - middle, "top": max(p[1], q[1]) + middle}[start]  # fmt: skip
        corners = [(far, p[1]), (far, q[1])] if flat[0] else [(p[0], far), (q[0], far)]
    elif flat[0]:
        m = p[0] + middle * (q[0] - p[0])
        corners = [(m, p[1]), (m, q[1])]
    else:
        m = p[1] + middle * (q[1] - p[1])
        corners = [(p[0], m), (q[0], m)]
    return [p, *corners, q]


def legend_strip(items: Sequence[str] = ("image", "text", "fused", "neutral", "frozen", "shared", "new")) -> Figure:
    """What colours, hatches and outlines mean, in one line or two."""
    height = Canvas(WIDTH, 1.0).legend(0.1, 0.5, items, width=WIDTH - 0.2)
    c = Canvas(WIDTH, height + 0.12)
    c.legend(0.1, height - 0.14, items, width=WIDTH - 0.2)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# ViT


def _example_picture() -> np.ndarray:
    """A little picture (64, 64, 3) for drawings that are given none: a house on a meadow, and the sun."""
    y, x = np.mgrid[0:64, 0:64]
    pixels = np.empty((64, 64, 3), np.uint8)
    pixels[:] = (188, 222, 245)
    pixels[y > 44] = (139, 190, 110)
    pixels[(x - 51) ** 2 + (y - 12) ** 2 < 49] = (250, 205, 80)
    pixels[(y > 26) & (y < 54) & (x > 15) & (x < 43)] = (200, 75, 60)
    pixels[(y > 10) & (y <= 26) & (abs(x - 29) < y - 9)] = (95, 65, 60)
    pixels[(y > 38) & (y < 54) & (x > 25) & (x < 34)] = (70, 50, 48)
    return pixels


def vit_overview(image: Any = None) -> Figure:
    """The whole ViT (paper, Fig. 1), drawn for a picture of 4 x 4 patches.

    `image`: the picture to draw, (3, H, W) or PIL, whose sides are multiples of 4; without it a little house.
    """
    pixels = _example_picture() if image is None else picture(image)
    H, W = pixels.shape[:2]
    if H % 4 or W % 4:
        raise ValueError(f"a {H}x{W} picture cannot be drawn as 4 x 4 patches: give one whose sides are multiples of 4")
    c = Canvas(WIDTH, 5.5)
    left, side, gap = 0.1, 0.33, 0.055
    step = side + gap
    shape_x = left + 17 * step + 0.14  # the column of shapes at the right
    wide = 17 * step - gap
    patch_x = [left + (i + 1) * step for i in range(16)]

    # Bottom row: the picture beside its patches in reading order.
    h, w = H // 4, W // 4
    whole = c.image(left, 0.1, 1.05, 1.05, pixels)
    for i, x in enumerate(patch_x):
        r, k = divmod(i, 4)
        patch = c.image(x, 1.55, side, side, pixels[r * h : (r + 1) * h, k * w : (k + 1) * w])
        c.arrow(patch, (x + side / 2, 2.12))
    for k in (0.25, 0.5, 0.75):
        for xs, ys in (((left + 1.05 * k,) * 2, (0.1, 1.15)), ((left, left + 1.05), (0.1 + 1.05 * k,) * 2)):
            c.ax.plot(xs, ys, color="white", linewidth=1, zorder=2.6)
    c.arrow(whole, Box(patch_x[0], 1.55, 16 * step - gap, side), start="right", end="bottom", bend=True, at=(0.5, 0.2))
    c.note(1.9, 0.9, "cut into N patches of P × P pixels, in reading order", width=4.5)
    c.note(shape_x, 0.62, "(3, H, W)")
    c.note(shape_x, 1.55 + side / 2, "(N, 3·P·P)")

    same = "one linear layer, the same for every patch"
    linear = c.box(patch_x[0], 2.12, 16 * step - gap, 0.34, same, modality="image")
    c.note(shape_x, 2.29, "E: (D, 3·P·P), b", size=8)
    row = c.tokens(left, 2.78, ["CLS", *map(str, range(1, 17))], "image", side=side, gap=gap, size=8)
    for box, x in zip(row[1:], patch_x, strict=True):
        c.arrow((x + side / 2, linear.y + linear.h), box)
    c.note(left, 2.29, "class\ntoken", size=8)
    c.arrow((left + side / 2, 2.46), row[0])
    c.note(shape_x, 2.78 + side / 2, "(1 + N, D)")
    places = c.tokens(left, 3.36, [str(i) for i in range(17)], "neutral", side=side, gap=gap, size=8)
    for place, box in zip(places, row, strict=True):
        c.note(place.x + side / 2, (place.y + box.y + side) / 2, "+", ha="center", size=11)
    c.note(shape_x, 3.36 + side / 2, "positions\n(1 + N, D)", size=8)
    every = "L encoder blocks: every token looks at every token"
    blocks = c.box(left, 4.0, wide, 0.5, every, modality="image", size=11)
    for place in places:
        c.arrow(place, blocks)
    c.note(shape_x, 4.25, "(1 + N, D)")
    y = 4.98
    norm = c.box(left, y, 1.15, 0.4, "LayerNorm", modality="image")
    head = c.box(left + 2.55, y, 1.5, 0.4, "head: linear", modality="image")
    scores = c.loss(left + 5.0, y + 0.03, 1.5, "class scores")
    c.arrow((left + side / 2, blocks.y + blocks.h), (left + side / 2, norm.y))
    c.note(left + side / 2 + 0.12, 4.73, "the class token alone", size=8)
    c.arrow(norm, head, "(D)")
    c.arrow(head, scores, "(K)")
    return c.fig


def _block(c: Canvas, x: float, y: float, norm: str, *, accent: bool = False, details: bool = True) -> float:
    """Draw one encoder block upwards from (x, y), x being the stream. Returns the height used."""
    w, h, gap = 2.3, 0.42, 0.22
    attention, mlp = "multi-head attention", "MLP"
    order = ["norm", attention, "+", "norm", mlp, "+"] if norm == "pre" else [attention, "+", "norm", mlp, "+", "norm"]
    c.note(x, y, "z  (T, D)", ha="center", va="bottom")
    below: Box | tuple[float, float] = (x, y + 0.22)
    branch = y + 0.36  # where the shortcut leaves the stream
    level, last_plus = y + 0.22 + 0.32, None
    for item in order:
        if item == "+":
            circle = c.plus(x, level + 0.12)
            c.arrow(below, circle)
            c.arrow((x, branch), circle, start="left", end="left", bend=True, middle=w / 2 + 0.22)
            below, last_plus = circle, circle
            level += 0.24 + gap
            branch = circle.y + circle.h + 0.1
            level += 0.1
            continue
        text = "LayerNorm" if item == "norm" else item
        box = c.box(x - w / 2, level, w, h, text, modality="neutral" if item == "norm" else "image",
                    new=accent and item == "norm", tag="")  # fmt: skip
        c.arrow(below, box)
        if details:
            _details(c, x + w / 2 + 0.3, level + h / 2, item)
        if item == "norm" and norm == "post" and last_plus is not None:
            branch = level + h + 0.1  # after post-norm the shortcut starts at the normalised stream
        below = box
        level += h + gap + (0.1 if item == "norm" and norm == "post" else 0)
    c.arrow(below, (x, level + 0.1))
    c.note(x, level + 0.12, "z′  (T, D)", ha="center", va="bottom")
    return level + 0.3 - y


def _details(c: Canvas, x: float, y: float, item: str) -> None:
    text = {
        "norm": "each token: minus its mean, divided by its standard deviation, times γ, plus β",
        "multi-head attention": "q, k, v: three linear D → D, cut into h heads\n"
        "softmax(q kᵀ / √(D/h)) v in each, joined, linear D → D",
        "MLP": "linear D → 4D, GELU, linear 4D → D; each token alone",
    }[item]
    c.note(x, y, text, width=3.5, size=8.5, colour=QUIET)


def vit_block(norm: str = "pre") -> Figure:
    """One encoder block in detail: "pre" as in ViT (eq. 2-3), or "post" as in BERT."""
    if norm not in ("pre", "post"):
        raise ValueError(f"norm={norm!r}: choose 'pre' or 'post'")
    height = {"pre": 4.95, "post": 5.2}[norm]
    c = Canvas(6.9, height)
    formula = {"pre": "z ← z + MSA(LN(z)),  then  z ← z + MLP(LN(z))",
               "post": "z ← LN(z + MSA(z)),  then  z ← LN(z + MLP(z))"}[norm]  # fmt: skip
    c.note(0.15, height - 0.15, f"{norm}-norm block:  {formula}", weight="bold", size=10)
    _block(c, 1.75, 0.1, norm)
    return c.fig


def norm_placement() -> Figure:
    """Pre-norm (ViT) and post-norm (BERT, the original transformer) beside each other, their LayerNorms marked."""
    c = Canvas(7.2, 5.4)
    for x, norm, title, text in (
        (1.8, "pre", "pre-norm (ViT)", "an open way for the gradient from end to start"),
        (5.4, "post", "post-norm (BERT)", "the gradient must pass every LayerNorm"),
    ):
        c.note(x, 5.26, title, weight="bold", size=11, ha="center")
        c.note(x, 5.02, text, ha="center", colour=QUIET)
        _block(c, x, 0.08, norm, accent=True, details=False)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# ViLT


def _bus(c: Canvas, boxes: Sequence[Box], y: float) -> Box:
    """Collect what leaves the tops of several boxes in one level line at height `y`. Returns the line as a flat box."""
    ends = [box.side("top") for box in boxes]
    for x, top in ends:
        c.arrow((x, top), (x, y), head=False)
    left, right = ends[0][0], ends[-1][0]
    c.arrow((left, y), (right, y), head=False)
    return Box(left, y, right - left, 0)


SIDE, GAP, WORD = 0.31, 0.05, 0.59  # inches: a token's side, the room between two, the width of a token with a word
TEXT_X, IMAGE_X = 0.1, 3.4  # where text and image begin
TEXT_W, IMAGE_W = 5 * (WORD + GAP) - GAP, 10 * (SIDE + GAP) - GAP
SHAPE_X = IMAGE_X + IMAGE_W + GAP + 0.1  # the column of shapes
PATCHES = ("CLS", *map(str, range(1, 10)))


def _words(c: Canvas, y: float, labels: Sequence[str], modality: str = "text", *, new: Sequence[int] = ()) -> list[Box]:
    """Five text tokens at the height `y`; `new` lists indices."""
    return c.tokens(TEXT_X, y, labels, modality, side=SIDE, gap=GAP, width=WORD, size=8.5, new=new)


def _squares(
    c: Canvas, y: float, labels: Sequence[str], modality: str = "image", *, first: int = 0, new: Sequence[int] = ()
) -> list[Box]:
    """Image tokens at the height `y`, ten at most, from the place `first` on; `new` lists indices."""
    return c.tokens(IMAGE_X + first * (SIDE + GAP), y, labels, modality, side=SIDE, gap=GAP, size=8, new=new)


def _row(c: Canvas, y: float, text: Sequence[str], image: Sequence[str], kind: str = "", new: str = "") -> list[Box]:
    """Five text and ten image tokens of one height. `kind`: the modality of all, `new`: whose are new."""
    return [
        *_words(c, y, text, kind or "text", new=range(5 if "text" in new else 0)),
        *_squares(c, y, image, kind or "image", new=range(10 if "image" in new else 0)),
    ]


def _add(c: Canvas, lower: Sequence[Box], upper: Sequence[Box]) -> None:
    for a, b in zip(lower, upper, strict=True):
        c.note(a.x + a.w / 2, (a.y + a.h + b.y) / 2, "+", ha="center", size=11)


def _caption(
    c: Canvas, words: Sequence[str], ends: tuple[str, str], *, new: bool = False
) -> tuple[list[str], list[Box]]:
    """The lower end of a text tower: three words between `ends` become tokens, and positions are added.

    Returns the labels of the five tokens, and the boxes of their positions, whose upper edge is at 3.19 inches.
    """
    if len(words) != 3:
        raise ValueError(f"words has {len(words)} entries: give the caption in three words, for example a red house")
    labels = [ends[0], *map(str, words), ends[1]]
    caption = c.box(TEXT_X, 1.24, TEXT_W, SIDE, f"“{' '.join(map(str, words))}”", modality="text")
    table = c.box(TEXT_X, 1.78, TEXT_W, 0.32, "tokenizer, then a table of words", modality="text", new=new,
                  tag="", size=9)  # fmt: skip
    c.arrow(caption, table)
    tokens = _words(c, 2.34, labels, new=range(5 * new))
    for box in tokens:
        c.arrow((box.x + box.w / 2, table.y + table.h), box)
    places = _words(c, 2.88, "01234", "neutral", new=range(5 * new))
    _add(c, tokens, places)
    return labels, places


def _text_and_image(
    c: Canvas, image: Any, words: Sequence[str], ends: tuple[str, str], *, new: str = ""
) -> tuple[list[str], list[Box]]:
    """The lower end of a model for both: three words and 3 x 3 patches become tokens, and positions are added.

    `ends` stand before and behind the words; `new` may name "text". Returns the labels of the text tokens, and the
    boxes of the positions, five of the text and ten of the image, whose upper edge is at 3.19 inches.
    """
    pixels = _example_picture() if image is None else picture(image)
    h, w = pixels.shape[0] // 3, pixels.shape[1] // 3  # pixels of a patch; what does not fit, two at most, is left out
    if not h or not w:
        raise ValueError(f"a {pixels.shape[0]}x{pixels.shape[1]} picture has no 3 x 3 patches: give a larger one")
    pixels = pixels[: 3 * h, : 3 * w]
    labels, text_places = _caption(c, words, ends, new="text" in new)

    whole = c.image(IMAGE_X + SIDE + GAP, 0.08, 0.9 * min(1, w / h), 0.9 * min(1, h / w), pixels)
    y = 1.24
    cut = [c.image(IMAGE_X + (i + 1) * (SIDE + GAP), y, SIDE, SIDE,
                   pixels[i // 3 * h : (i // 3 + 1) * h, i % 3 * w : (i % 3 + 1) * w]) for i in range(9)]  # fmt: skip
    c.arrow(whole, cut[4], start="right", end="bottom", bend=True)
    c.note(cut[4].x + SIDE, 0.53, "cut into patches,\nas in lesson 01")
    y = 1.78
    linear = c.box(cut[0].x, y, IMAGE_W - SIDE - GAP, 0.32, "one linear layer for all patches", modality="image",
                   size=9.5)  # fmt: skip
    for patch in cut:
        c.arrow(patch, (patch.x + SIDE / 2, y))
    tokens = _squares(c, 2.34, PATCHES)
    for box in tokens[1:]:
        c.arrow((box.x + box.w / 2, linear.y + linear.h), box)
    c.note(IMAGE_X - 0.02, 1.94, "class\ntoken", size=8)
    c.arrow((tokens[0].x + SIDE / 2, 2.1), tokens[0])
    y = 2.88
    places = _squares(c, y, "0123456789", "neutral")
    _add(c, tokens, places)
    c.note(SHAPE_X, y + SIDE / 2, "+ positions", size=8.5)
    return labels, text_places + places


def _symbols(c: Canvas, x: float, top: float, symbols: Sequence[str]) -> None:
    for i, symbol in enumerate(symbols):
        c.note(x, top - 0.16 * i, symbol, size=8.5, colour=QUIET)


def vilt_overview(image: Any = None, *, words: Sequence[str] = ("a", "red", "house")) -> Figure:
    """The whole ViLT (paper, Fig. 3, eq. 1-5) for three words and a picture of 3 x 3 patches; new parts are green.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house. `words`: its caption in three words.
    """
    c = Canvas(WIDTH, 8.05)
    labels, places = _text_and_image(c, image, words, ("[CLS]", "[SEP]"), new="text")

    # LayerNorm for the text alone, then the modality type.
    y = 3.42
    norm = c.box(TEXT_X, y, TEXT_W, 0.3, "LayerNorm", new=True, tag="", size=9)
    for place in places[:5]:
        c.arrow(place, norm)
    c.note(SHAPE_X, y + 0.15, "LayerNorm:\ntext alone", size=8.5)
    y = 3.96
    types = _row(c, y, "0" * 5, "1" * 10, "neutral", new="text image")
    _add(c, [Box(t.x, norm.y, t.w, norm.h) for t in types[:5]], types[:5])
    _add(c, [Box(t.x, norm.y, t.w, norm.h) for t in types[5:]], types[5:])
    for place in places[5:]:
        x = place.x + SIDE / 2
        c.arrow((x, place.y + SIDE), (x, norm.y + norm.h), head=False)
    c.note(SHAPE_X, y + SIDE / 2, "+ modality\ntype: 0 or 1", size=8.5)

    # One stream for both.
    full = IMAGE_X + IMAGE_W - TEXT_X
    y = 4.52
    blocks = c.box(TEXT_X, y, full, 0.5, "encoder blocks of lesson 01 (pre-norm): every token looks at every token",
                   modality="fused", size=10.5)  # fmt: skip
    for box in types:
        c.arrow(box, blocks)
    c.note(SHAPE_X, y + 0.25, "joined, text first\n(B, L+1+N, D)", size=8.5)
    last = c.box(TEXT_X, 5.17, full, 0.28, "LayerNorm", size=9)
    y = 5.63
    states = _row(c, y, labels, PATCHES, "fused")
    for box in states:
        c.arrow((box.x + box.w / 2, blocks.y + blocks.h), (box.x + box.w / 2, last.y), head=False)
        c.arrow((box.x + box.w / 2, last.y + last.h), box)
    c.note(SHAPE_X, y + SIDE / 2, "text (B, L, D)\nimage (B, 1+N, D)", size=8)

    # The heads.
    y, top = 6.7, 7.6
    pooler = c.box(TEXT_X, y, 1.15, 0.5, "pooler: linear, tanh", modality="fused", new=True, size=9)
    c.arrow((states[0].x + WORD / 2, states[0].y + SIDE), (states[0].x + WORD / 2, y))
    itm = c.loss(TEXT_X, top, 1.15, "ITM", new=True)
    c.arrow(pooler, itm, "linear (B, 2)", side="right")
    spoken, seen = _bus(c, states[1:4], 6.18), _bus(c, states[6:], 6.32)
    mlm_head = c.box(1.55, y, 1.55, 0.5, "MLM head", modality="fused", new=True, size=9)
    c.arrow((2.05, spoken.y), (2.05, y), "hidden words", side="right")
    mlm = c.loss(1.55, top, 1.55, "MLM", new=True)
    c.arrow(mlm_head, mlm, "scores (M, V)", side="right")
    wpa_head = c.box(3.4, y, 2.9, 0.5, "optimal transport of words onto patches", modality="fused", new=True, size=9)
    c.arrow((spoken.x + spoken.w, spoken.y), (IMAGE_X + SIDE + GAP / 2, y), start="right", end="bottom", bend=True)
    c.arrow((4.9, seen.y), (4.9, y))
    wpa = c.loss(3.4, top, 2.9, "WPA, weight 0.1", new=True)
    c.arrow(wpa_head, wpa, "distance (B)", side="right")
    symbols = ("B pairs", "L text tokens", "N patches", "D numbers a token", "M hidden words", "V words in the table")
    _symbols(c, 6.6, 7.88, symbols)
    return c.fig


def vilt_objectives() -> Figure:
    """The two passes of a ViLT training batch (official code): one for MLM, one for ITM and WPA."""
    c = Canvas(WIDTH, 5.6)
    whole = ("a red house", "two small fish", "a cat on a tree", "a blue boat")
    hidden = ("a [MASK] house", "two small [MASK]", "a [MASK] on a tree", "a blue [MASK]")
    total = c.loss(2.3, 5.18, WIDTH - 4.6, "loss = MLM + ITM + 0.1 · WPA")
    for left, title, texts, pictures, answers in (
        (0.1, "pass 1: true pairs, words hidden", hidden, "1234", ("red", "fish", "cat", "boat")),
        (4.3, "pass 2: whole texts, half the pictures swapped", whole, "1432", ("yes", "no", "yes", "no")),
    ):
        second = texts is whole
        for k, (text, number, answer) in enumerate(zip(texts, pictures, answers, strict=True)):
            y, true = 1.62 - 0.4 * k, int(number) == k + 1
            c.box(left + 0.1, y, 1.5, 0.31, text, modality="text", size=9)
            c.note(left + 1.74, y + 0.155, "=" if true else "≠", ha="center", size=12, weight="bold")
            c.box(left + 1.88, y, 0.9, 0.31, f"picture {number}", modality="image", size=9)
            c.note(left + 2.86, y + 0.155, f"{'match' if second else 'word'}: {answer}", size=8.5)
        inputs = c.frame(left, 0.32, 3.8, 1.98, title)
        model = c.box(left, 2.68, 3.8, 0.42, "ViLT", modality="fused", shared=True, size=11)
        c.arrow(inputs, model)
        if not second:
            heads = [("MLM head, at the hidden words", "MLM", 0.6, 2.6)]
        else:
            heads = [("pooled [CLS], 2 scores", "ITM", 0.0, 1.8), ("words onto patches", "WPA", 2.0, 1.8)]
        for words, name, x, w in heads:
            head = c.box(left + x, 3.42, w, 0.42, words, modality="fused", size=9)
            c.arrow((left + x + w / 2, model.y + model.h), head)
            loss = c.loss(left + x, 4.14, w, name)
            c.arrow(head, loss)
            c.arrow(loss, total, start="top", end="bottom", bend=True, at=(0.5, 0.5))
    c.note(0.1, 0.14, "The double outline: both passes use the same weights.", size=8.5, colour=QUIET)
    return c.fig


def single_and_dual_stream() -> Figure:
    """Three ways in which L text and S image tokens can meet: single stream, dual stream (LXMERT), dual encoder.

    Shortcuts and LayerNorms are left out.
    """
    c = Canvas(WIDTH, 4.95)
    w, gap = 1.13, 0.2
    both = 2 * w + gap
    single, dual, encoders = (0.1 + k * 2.78 for k in range(3))
    for x, title, names, cost in (
        (single, "single stream", "one layer of ViLT or UNITER", "(L + S)² scores,\neach row one softmax"),
        (dual, "dual stream", "one layer of LXMERT", "2·L·S + L² + S² scores"),
        (encoders, "dual encoder", "CLIP, whole", "L² + S² scores in each layer,\nnone between the two"),
    ):
        c.note(x + both / 2, 4.8, title, ha="center", weight="bold", size=11)
        c.note(x + both / 2, 4.58, names, ha="center", colour=QUIET)
        c.note(x + both / 2, 0.5, cost, ha="center", size=8.5, width=both)
    below = "A double outline: the same weights. Shortcuts and LayerNorms are left out."
    c.note(single, 0.12, below, size=8.5, colour=QUIET)

    def two(x: float, y: float, h: float, text: str, image: str, **look: Any) -> list[Box]:
        """A box for the text and one for the image beside it."""
        kinds = {"modality": "fused"} if look else {}
        return [c.box(x + k * (w + gap), y, w, h, words, size=9, **({"modality": kind} | kinds), **look)
                for k, (kind, words) in enumerate((("text", text), ("image", image)))]  # fmt: skip

    def up(*rows: Sequence[Box]) -> None:
        for lower, upper in pairwise(rows):
            for a, b in zip(lower, upper, strict=True):
                c.arrow(a, b)

    low, high = 0.78, 4.08
    attention = c.box(single, 1.7, both, 0.6, "self-attention over [text; image]", modality="fused")
    mlp = c.box(single, 2.92, both, 0.45, "MLP", modality="fused")
    up(two(single, low, 0.3, "text (L, D)", "image (S, D)"), [attention] * 2)
    c.arrow(attention, mlp)
    up([mlp] * 2, two(single, high, 0.3, "text′ (L, D)", "image′ (S, D)"))

    inputs = two(dual, low, 0.3, "text (L, D)", "image (S, D)")
    cross = two(dual, 1.7, 0.5, "cross-attention", "cross-attention", shared=True)
    up(cross, two(dual, 2.58, 0.42, "self-attention", "self-attention"), two(dual, 3.35, 0.42, "MLP", "MLP"),
       two(dual, high, 0.3, "text′ (L, D)", "image′ (S, D)"))  # fmt: skip
    for k, (outer, inner) in enumerate(((0.3, 0.7), (0.7, 0.3))):
        c.arrow(inputs[k], cross[k], start="top", end="bottom", at=(outer, outer))
        c.arrow(inputs[1 - k], cross[k], start="top", end="bottom", at=(outer, inner))
        c.note(cross[k].x + outer * w + (0.1 if k else -0.1), 1.38, "q", ha="center")
    c.note(dual + both / 2, 1.6, "k, v", ha="center")

    dot = c.box(encoders, high, both, 0.3, "dot product: one number", size=9)
    up(two(encoders, low, 0.3, "text (L, D)", "image (S, D)"), two(encoders, 1.7, 1.3, "text encoder", "image encoder"),
       two(encoders, 3.35, 0.3, "vector (D)", "vector (D)"), [dot] * 2)  # fmt: skip
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# CLIP


def _similarities(
    c: Canvas, left: float, top: float, n: int, cell: tuple[float, float], *, new: bool = False, named: bool = False
) -> tuple[Box, list[Box], list[Box]]:
    """A matrix of n pictures (rows) and n texts (columns), its diagonal marked, whose upper left corner is at
    (left, top) and whose cells are `cell` inches wide and high; `named` says in each what it compares.

    Returns the matrix, the boxes of the pictures at its left and those of the texts above it.
    """
    w, h = cell
    low = [str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")) for i in range(1, n + 1)]
    whole = c.box(left - 0.04, top - n * h - 0.04, n * w + 0.08, n * h + 0.08, modality="fused", new=new, tag="")
    for r in range(n):
        for k in range(n):
            x, y, same = left + k * w, top - (r + 1) * h, r == k
            c.ax.add_patch(Rectangle((x, y), w, h, facecolor=(STRONG if same else FILLS)["fused"], edgecolor="white",
                                     linewidth=1.0, zorder=2.3))  # fmt: skip
            if named:
                c.note(x + w / 2, y + h / 2, f"I{low[r]}·T{low[k]}", ha="center", weight="bold" if same else "normal",
                       size=8.5, colour="white" if same else INK)  # fmt: skip
            elif same:  # a second sign beside the colour
                c.ax.plot(x + w / 2, y + h / 2, "o", color="white", markersize=14 * min(h, w), zorder=2.5)
    rows = [c.box(left - 0.47, top - (r + 1) * h + 0.025, 0.35, h - 0.05, f"I{low[r]}", modality="image", size=8.5)
            for r in range(n)]  # fmt: skip
    columns = [c.box(left + k * w + 0.025, top + 0.12, w - 0.05, 0.25, f"T{low[k]}", modality="text", size=8.5)
               for k in range(n)]  # fmt: skip
    return whole, rows, columns


HEAD_W, HEAD_H = 2.05, 0.38  # inches: the boxes between a tower and the shared space


def _shared_space(c: Canvas, y: float, text_x: float, text: Box, image: Box, *, new: bool = False) -> None:
    """The upper end of a dual encoder, from `y` to 2.54 inches above it: projections and the matrix of similarities.

    `text` and `image` are what is read from the towers; the text's own boxes begin at `text_x`.
    """
    # Each its own way into the shared space.
    w, h, ends = HEAD_W, HEAD_H, []
    for x, state, kind in ((text_x, text, "text"), (IMAGE_X, image, "image")):
        head = c.box(x, y, w, h, "linear D → E, no bias", modality=kind, new=new, size=9)
        c.arrow(state, head)
        unit = c.box(x, y + h + 0.2, w, h, "normalise: length 1", modality=kind, new=new, size=9)
        c.arrow(head, unit)
        ends.append(unit)
    c.note(SHAPE_X, y + h / 2, "projection\n(B, E) each", size=8.5)
    c.note(SHAPE_X, y + 1.5 * h + 0.2, "(B, E) each", size=8.5)

    # Where B texts and B pictures meet.
    matrix, rows, columns = _similarities(c, 4.22, y + 2.17, 4, (0.38, 0.255), new=new)
    c.arrow((rows[-1].x + rows[-1].w / 2, ends[1].y + h), rows[-1])
    c.arrow(ends[0], columns[0], start="top", end="left", bend=True)
    c.note(rows[0].x - 0.08, matrix.y + matrix.h / 2, "B pictures", size=8.5, ha="right")
    c.note(rows[0].x - 0.08, y + 2.27, "B texts", size=8.5, ha="right")
    scale = c.box(6.4, y + 1.13, 1.7, h, "times exp(t), t learned", new=new, size=9)
    c.arrow(scale, matrix)
    loss = c.loss(6.4, y + 1.76, 1.7, "contrastive loss", h=h, new=new)
    c.arrow(matrix, loss, "(B, B)")


def clip_overview(image: Any = None, *, words: Sequence[str] = ("a", "red", "house")) -> Figure:
    """The whole CLIP with a ViT (paper, 2.3-2.5) for three words and a picture of 3 x 3 patches; new parts are green.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house. `words`: its caption in three words.
    """
    c = Canvas(WIDTH, 8.28)
    labels, places = _text_and_image(c, image, words, ("[start]", "[end]"))
    marks = "[start] and [end] say where a text begins and ends. In our vocabulary they are [CLS] and [SEP]."
    c.note(TEXT_X, 0.7, marks, width=TEXT_W, size=8.5, colour=QUIET)

    # Two towers that never look at each other.
    y = 3.42
    norm = c.box(IMAGE_X, y, IMAGE_W, 0.3, "LayerNorm", new=True, tag="", size=9)
    c.note(SHAPE_X, y + 0.15, "LayerNorm:\nimage alone", size=8.5)
    y = 3.96
    causal = c.box(TEXT_X, y, TEXT_W, 0.5, "causal blocks:\na token looks at itself and those before it",
                   modality="text", new=True, tag="")  # fmt: skip
    blocks = c.box(IMAGE_X, y, IMAGE_W, 0.5, "encoder blocks:\nevery token looks at every token", modality="image")
    for place in places:
        c.arrow(place, causal if place.x < IMAGE_X else norm)
    for place in places[5:]:
        c.arrow((place.x + SIDE / 2, norm.y + norm.h), (place.x + SIDE / 2, y))
    c.note(SHAPE_X, y + 0.25, "(B, L, D) and\n(B, 1+N, D)", size=8.5)
    y = 4.66
    c.box(TEXT_X, y, TEXT_W, 0.28, "LayerNorm", size=9)
    c.box(IMAGE_X, y, SIDE, 0.28, "LN", size=8)
    c.note(SHAPE_X, y + 0.14, "LayerNorm:\ntext, CLS", size=8.5)
    y = 5.14
    states = [*_words(c, y, labels, new=[4]), *_squares(c, y, PATCHES)]
    for k, box in enumerate(states):
        x = box.x + box.w / 2
        if k < 6:
            c.arrow((x, blocks.y + blocks.h), (x, 4.66), head=False)
        c.arrow((x, 4.94 if k < 6 else blocks.y + blocks.h), box)
    c.note(SHAPE_X, y + SIDE / 2, "read: [end], CLS\n(B, D) each", size=8.5)

    _shared_space(c, 5.7, TEXT_X + TEXT_W - HEAD_W, states[4], states[5], new=True)
    _symbols(c, TEXT_X, 8.12, ("B pairs", "L text tokens", "N patches", "D numbers a token", "E shared numbers"))
    return c.fig


def clip_matrix(n: int = 4) -> Figure:
    """The matrix of similarities of n pictures and n texts and its two softmaxes (paper, 2.3 and Fig. 3), 2 <= n <= 8.

    With pictures in rows, axis 0 runs over the pictures: what the paper's pseudo-code calls `loss_i` lets each text
    choose a picture.
    """
    if not 2 <= n <= 8:
        raise ValueError(f"a matrix of {n} pairs cannot be drawn here: choose n from 2 to 8")
    c = Canvas(WIDTH, 5.15)
    w, h = min(0.78, 3.2 / n), min(0.55, 2.3 / n)
    left, top = 1.2, 4.2
    matrix, *_ = _similarities(c, left, top, n, (w, h), named=n <= 4)
    right, foot = matrix.x + matrix.w, matrix.y
    c.arrow((left, 4.78), (left + n * w, 4.78), "axis 1: the texts", size=9)
    c.arrow((0.55, top), (0.55, top - n * h))
    c.ax.text(0.36, top - n * h / 2, "axis 0: the pictures", rotation=90, ha="center", va="center", fontsize=9)

    r, k = 1, min(2, n - 1)  # one row and one column stand for all
    row, column = (left, top - (r + 1) * h, n * w, h), (left + k * w, top - n * h, w, n * h)
    for (x, y, wide, high), kind in ((row, "image"), (column, "text")):
        c.ax.add_patch(Rectangle((x, y), wide, high, fill=False, edgecolor=EDGES[kind], linewidth=2.4, zorder=2.8))
    x, wide = 5.2, 2.9
    along = c.box(x, top - (r + 0.5) * h - 0.28, wide, 0.56, "softmax along a row:\neach picture chooses a text",
                  modality="image", size=9.5)  # fmt: skip
    c.arrow((right, top - (r + 0.5) * h), along)
    down = c.box(1.2, 0.95, 3.2, 0.56, "softmax down a column:\neach text chooses a picture", modality="text",
                 size=9.5)  # fmt: skip
    c.arrow((left + (k + 0.5) * w, foot), (left + (k + 0.5) * w, down.y + down.h))
    of_rows = c.loss(x, 1.9, wide, "cross-entropy over axis 1")
    c.arrow(along, of_rows, "true text: the diagonal", side="right")
    of_columns = c.loss(1.2, 0.3, 3.2, "cross-entropy over axis 0")
    c.arrow(down, of_columns, "true picture: the diagonal", side="right")
    mean = c.loss(x, 0.3, wide, "loss = their mean")
    c.arrow(of_rows, mean, "called loss_t in the paper's code", side="right", width=1.3)
    c.arrow(of_columns, mean)
    c.note(1.2, 0.12, "called loss_i in the paper's code", size=8)
    c.note(x, 4.72, f"each cell: cosine times exp(t)\npurple: the {n} true pairs\npale: {n * n - n} wrong pairs")
    return c.fig


def zero_shot_diagram() -> Figure:
    """How CLIP classifies pictures into classes that it was never trained for (paper, Fig. 1 (2)-(3) and 3.1.2)."""
    c = Canvas(WIDTH, 4.0)
    names, shares = ("house", "tree", "boat"), ("0.93", "0.05", "0.02")
    h, ys = 0.42, (2.95, 2.3, 1.65)
    for x, title in ((0.1, "K classes"), (1.3, "a picture of a {label}"), (5.2, "K vectors"), (7.1, "softmax")):
        c.note(x, 3.75, title, weight="bold")
    text = c.box(3.65, ys[-1], 1.15, ys[0] + h - ys[-1], "text tower", modality="text", frozen=True)
    vision = c.box(3.65, 0.45, 1.15, 0.7, "image tower", modality="image", frozen=True)
    compare = c.box(6.0, ys[-1], 0.8, ys[0] + h - ys[-1], "cosine times exp(t)", modality="fused", size=9.5)
    for i, (name, share, y) in enumerate(zip(names, shares, ys, strict=True)):
        label = c.box(0.1, y, 0.85, h, name, modality="text")
        sentence = c.box(1.3, y, 2.0, h, f"a picture of a {name}", modality="text")
        vector = c.box(5.2, y, 0.45, h, f"T{'₁₂₃'[i]}", modality="text")
        score = c.box(7.1, y, 1.0, h, f"{name}  {share}", modality="fused", size=9.5, weight="normal" if i else "bold")
        for a, b in ((label, sentence), (sentence, text), (text, vector), (vector, compare), (compare, score)):
            c.arrow(a, b)
        if i == 0:
            c.tag(score.x + score.w, score.y + score.h, "best", colour=EDGES["fused"])
    whole = c.image(1.85, 0.35, 0.9, 0.9, _example_picture())
    vector = c.box(5.2, 0.8 - h / 2, 0.45, h, "I", modality="image")
    c.arrow(whole, vision)
    c.arrow(vision, vector)
    c.arrow(vector, compare, start="right", end="bottom", bend=True)
    c.note(0.1, 0.8, "one picture", weight="bold")
    once = "Made once, the K vectors are the weights of a linear classifier."
    c.note(6.55, 0.8, once, width=1.6, size=8.5, colour=QUIET)
    c.note(0.1, 0.12, "Hatched: frozen. Nothing is trained, and the classes can be any words. The numbers are made up.",
           size=8.5, colour=QUIET)  # fmt: skip
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# FLIP


def _cut(pixels: np.ndarray, grid: int) -> np.ndarray:
    """The picture (H, W, 3) without the few pixels that do not fill `grid` x `grid` patches."""
    h, w = pixels.shape[0] // grid, pixels.shape[1] // grid
    if not h or not w:
        raise ValueError(f"a {pixels.shape[0]}x{pixels.shape[1]} picture has no {grid} x {grid} patches: "
                         "give a larger one")  # fmt: skip
    return pixels[: grid * h, : grid * w]


def _some_patches(grid: int, share: float, seed: int) -> list[int]:
    """Places of `grid` x `grid` patches, numbered from 0 in reading order, of which `share` were kept at random."""
    return sorted(np.random.default_rng(seed).permutation(grid**2)[: int(grid**2 * share)].tolist())


def _hidden(c: Canvas, x: float, y: float, w: float, h: float, how: str, label: str = "") -> None:
    """What stands in the place of a hidden patch or token: nothing ("hole"), M ("mask"), black ("zero") or itself,
    pale, where nobody may look ("pale")."""
    dashed = (0, (2, 1.6))
    face, edge, style, ink, word = {
        "hole": ("white", "#B5B5B5", dashed, INK, ""),
        "mask": (FILLS["neutral"], EDGES["neutral"], "-", INK, "M"),
        "zero": ("#1A1A1A", EDGES["image"], "-", "white", "0"),
        "pale": ("#FFFFFFC8", "#7A7A7A", dashed, QUIET, label),
    }[how]
    c.ax.add_patch(Rectangle((x, y), w, h, facecolor=face, edgecolor=edge, linewidth=0.9, linestyle=style, zorder=2.7))
    if word:
        c.note(x + w / 2, y + h / 2, word, ha="center", size=SMALLEST, colour=ink)


def _patched(
    c: Canvas, x: float, y: float, size: float, pixels: np.ndarray, grid: int, keep: Sequence[int] | None = None,
    how: str = "hole",
) -> Box:  # fmt: skip
    """A picture, its longer side `size` inches, cut into `grid` x `grid` patches, of which only `keep` are shown."""
    pixels = _cut(pixels, grid)
    H, W = pixels.shape[:2]
    box = c.image(x, y, size * W / max(H, W), size * H / max(H, W), pixels)
    w, h = box.w / grid, box.h / grid
    for i in range(1, grid):
        for xs, ys in (((x + i * w,) * 2, (y, y + box.h)), ((x, x + box.w), (y + i * h,) * 2)):
            c.ax.plot(xs, ys, color="white", linewidth=1, zorder=2.6)
    for i in range(grid**2 if keep is not None else 0):
        if i not in keep:
            _hidden(c, x + i % grid * w, y + box.h - (i // grid + 1) * h, w, h, how)
    return box


def flip_overview(image: Any = None, *, keep: Any = None, words: Sequence[str] = ("a", "red", "house")) -> Figure:
    """The whole FLIP (paper, 3; released code) for three words and a picture of 8 x 8 patches, while it trains; what
    CLIP does not have is green.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house. `keep` (K,): the places of the patches
    that stay, from 0 to 63 in reading order, as a row of `random_masking` has them; without it 32 of them. `words`: the
    caption in three words. Of the 64 tokens the first seven and the last are drawn.
    """
    N, shown = 64, [*range(7), 63]  # a place for "…" is left between them
    kept = array(_some_patches(8, 0.5, 39) if keep is None else keep, "keep", ndim=1).tolist()
    if not kept or sorted(set(kept)) != sorted(kept) or not set(kept) <= {*range(N)}:
        raise ValueError(f"keep must be one or more different places from 0 to {N - 1}, of 8 x 8 patches, not {kept}")
    c = Canvas(WIDTH, 8.28)
    labels, text_places = _caption(c, words, ("[CLS]", "[SEP]"))

    # The picture, all of it: tokens and positions.
    pixels = _example_picture() if image is None else picture(image)
    whole = _patched(c, IMAGE_X + SIDE + GAP, 0.06, 1.0, pixels, 8)
    c.note(whole.x + 1.2, 0.82, "cut into N = 64 patches, numbered from 0 to 63")
    first = "A token gets its position before any token is removed: one that stays knows its place in the picture."
    c.note(whole.x + 1.2, 0.4, first, width=3.1, size=8.5, colour=QUIET)
    green = "Green: not in CLIP. The text stays whole; of each picture, other patches are removed at every step."
    c.note(TEXT_X, 0.7, green, width=TEXT_W, size=8.5, colour=QUIET)
    names = [*map(str, shown[:-1]), "…", "63"]
    linear = c.box(IMAGE_X + SIDE + GAP, 1.24, IMAGE_W - SIDE - GAP, 0.32, "one linear layer for all patches",
                   modality="image", size=9.5)  # fmt: skip
    c.arrow(whole, linear)
    tokens = _squares(c, 1.76, names, first=1)
    for box in tokens:
        c.arrow((box.x + SIDE / 2, linear.y + linear.h), box)
    places = _squares(c, 2.28, names, "neutral", first=1, new=range(9))
    _add(c, tokens, places)
    c.note(SHAPE_X, 1.76 + SIDE / 2, "(B, N, D)", size=8.5)
    c.note(SHAPE_X, 2.28 + SIDE / 2, "+ positions:\nfixed waves", size=8.5)

    # Removal: holes first, then the ranks are closed.
    y_long, y_short = 2.84, 3.5
    c.frame(IMAGE_X - 0.08, y_long - 0.12, IMAGE_W + 0.16, y_short + SIDE + 0.22 - y_long, new=True)
    rest = [i for i in kept if i not in shown]
    whose = [i if i in kept else None for i in shown[:-1]] + [rest or None, 63 if 63 in kept else None]
    early = [i for i in shown[:-1] if i in kept]
    own = early[:4]  # so many get a square of their own, the others share the one with the dots
    dots = bool(rest) or len(early) > len(own)
    short = ["CLS", *map(str, own), *["…"] * dots, *["63"] * (63 in kept)]
    row = _squares(c, y_short, short)
    for place, name, i in zip(places, names, whose, strict=True):
        x = place.x
        if i is None:
            _hidden(c, x, y_long, SIDE, SIDE, "hole")
            continue
        state = c.box(x, y_long, SIDE, SIDE, name, modality="image", size=8)
        c.arrow(place, state)
        goal = row[short.index(name)] if name in short else row[short.index("…")]
        c.arrow(state, goal, start="top", end="bottom")
    c.note(IMAGE_X - 0.02, 3.08, "class\ntoken", size=8)
    c.arrow((row[0].x + SIDE / 2, 3.24), row[0])

    # Two towers that never look at each other.
    y = 4.0
    wide = max(row[-1].x + SIDE - IMAGE_X, HEAD_W)
    text = c.box(TEXT_X, y, TEXT_W, 0.46, "blocks, no causal mask:\nevery word looks at every word", modality="text",
                 new=True, tag="", size=9.5)  # fmt: skip
    blocks = c.box(IMAGE_X, y, wide, 0.46, f"encoder blocks\non 1 + {len(kept)} tokens", modality="image", size=9.5)
    for box in text_places:
        c.arrow(box, text)
    for box in row:
        c.arrow(box, blocks)
    norms = [
        c.box(TEXT_X, 4.64, TEXT_W, 0.28, "LayerNorm", size=9),
        c.box(IMAGE_X, 4.64, wide, 0.28, "LayerNorm", size=9),
    ]
    states = _words(c, 5.12, labels, new=[0])
    mean = c.box(IMAGE_X, 5.12, wide, SIDE, "mean over all tokens", modality="image", new=True, tag="", size=9.5)
    for box in [*states, *row]:
        x = box.x + box.w / 2
        c.arrow((x, y + 0.46), (x, norms[0].y), head=False)
        c.arrow((x, norms[0].y + 0.28), (x, 5.12))
    _shared_space(c, 5.7, TEXT_X, states[0], mean)

    # What the picture looks like now, and what is not there.
    c.note(6.02, y_short + SIDE / 2, "(B, 1+K, D)", size=8.5)
    c.note(SHAPE_X, y_long + SIDE / 2, "removal, only\nin training", size=8.5, colour=NEW, weight="bold")
    c.note(SHAPE_X, y_short + SIDE / 2, f"kept: {len(kept)} of {N},\nand CLS", size=8.5)
    _patched(c, 7.1, 4.0, 1.0, pixels, 8, kept)
    c.note(6.05, 4.5, "No mask token.\nNo decoder.\nNothing is\nreconstructed.", size=8.5, colour=NEW)
    c.note(6.05, 5.3, "LayerNorm after the blocks, of all tokens; none before them, unlike in CLIP", size=8.5, width=2)
    _symbols(c, 1.35, 7.85, ("B pairs", "L text tokens", "N patches, K kept", "D numbers a token", "E shared numbers"))
    return c.fig


def flip_stages() -> Figure:
    """FLIP's three stages (paper, 3): training on masked pictures, unmasked tuning, and use on whole pictures.

    The image tower's sequences are drawn to scale, for 64 patches of which training keeps 32.
    """
    c = Canvas(WIDTH, 4.5)
    w, keep = 2.45, _some_patches(8, 0.5, 39)
    models = []
    for k, (title, length, rate) in enumerate((
        ("1  training, masked", "nearly all of the steps", "full learning rate, large batches"),
        ("2  unmasked tuning", "a few % of the steps", "learning rate 10 to 100 times smaller"),
        ("3  use", "no more steps", "search, naming: as with any CLIP"),
    )):  # fmt: skip
        x, masked = 0.1 + k * (w + 0.325), k == 0
        c.note(x, 4.36, title, weight="bold", size=11)
        c.note(x, 4.12, length)
        c.note(x, 3.92, rate, size=8.5, colour=QUIET)
        tokens = 33 if masked else 65
        seen = _patched(c, x, 0.36, 1.0, _example_picture(), 8, keep if masked else None)
        text = c.box(x + 1.45, 0.71, 1.0, 0.3, "a red house", modality="text", size=9)
        sequence = c.box(x, 1.62, 1.4 * tokens / 65, 0.46, f"1 + {tokens - 1} tokens", modality="image", new=masked,
                         tag="", size=9.5)  # fmt: skip
        c.arrow(seen, sequence)
        model = c.box(x, 2.4, w, 0.46, "FLIP: both towers", modality="pair", shared=True, size=10.5)
        models.append(model)
        for part in (sequence, text):
            c.arrow(part, model)
        if k < 2:
            c.arrow(model, c.loss(x, 3.2, w, "contrastive loss"))
        else:
            c.arrow(model, c.box(x, 3.2, w, 0.34, "cosine of picture and text", modality="fused", size=9.5))
    for a, b in pairwise(models):
        c.arrow(a, b)
    c.note(0.1, 0.14, "Double outline: the same weights, handed on. The blue bars are as long as what the image tower "
           "reads.", size=8.5, colour=QUIET)  # fmt: skip
    return c.fig


def four_ways_to_hide() -> Figure:
    """Half the patches of a picture hidden in four ways: what the blocks then read, and whether the numbers agree.

    Removal is FLIP's (paper, 3) and MAE's; a mask token is BERT's and BEiT's. An attention mask gives the patches that
    are seen the same states as removal does, at the full price.
    """
    c = Canvas(WIDTH, 5.5)
    keep, side, gap = (1, 3, 4, 6, 9, 10, 12, 15), 0.26, 0.03
    left, step = 1.3, side + gap
    count, same = left + 17 * step + 0.25, left + 17 * step + 0.62
    c.note(0.1, 5.34, "the picture", weight="bold")
    c.note(left, 5.34, "what the blocks read", weight="bold")
    c.note(count, 5.34, "tokens", weight="bold", ha="center")
    c.note(same, 5.34, "same numbers?", weight="bold")
    for k, (name, what, how, verdict) in enumerate((
        ("remove", "FLIP, and MAE's encoder: the sequence gets shorter, and so does the work", "hole",
         "the numbers to match"),
        ("mask token", "BEiT's patches, BERT's words: a learned vector stands in", "mask", "no: the others\nlook at M"),
        ("zero the pixels", "black patches are patches too", "zero", "no: the others\nlook at black"),
        ("attention mask", "computed in every block, but nobody may look at them", "pale",
         "yes, at the tokens that are seen"),
    )):  # fmt: skip
        y = 4.07 - k * 1.22
        _patched(c, 0.1, y, 1.02, _example_picture(), 4, keep, how)
        c.note(left, y + 0.93, name, weight="bold", size=10, colour=NEW if k == 0 else INK)
        c.note(left, y + 0.72, what, size=8.5, colour=QUIET)
        read = [i for i in range(16) if k or i in keep]
        for place, i in enumerate([-1, *read]):
            x = left + place * step
            if i < 0 or i in keep:
                c.box(x, y + 0.22, side, side, str(i) if i >= 0 else "C", modality="image", size=8)
            else:
                _hidden(c, x, y + 0.22, side, side, how, str(i))
        c.note(count, y + 0.22 + side / 2, str(1 + len(read)), ha="center", size=12, weight="bold")
        c.note(same, y + 0.22 + side / 2, verdict, width=WIDTH - same - 0.08, size=8.5)
    below = "C is the class token. A block computes every token that it reads: 17 are the work of a whole picture."
    c.note(0.1, 0.16, below, size=8.5, colour=QUIET)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# ALBEF


def albef_overview(image: Any = None, *, words: Sequence[str] = ("a", "red", "house")) -> Figure:
    """The whole ALBEF (paper, Fig. 1) for three words and a picture; what no earlier lesson has is green.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house. `words`: its caption in three words. As
    in the paper the picture stands at the left, so that ITC lies between the two class tokens.
    """
    if len(words) != 3:
        raise ValueError(f"words has {len(words)} entries: give the caption in three words, for example a red house")
    c = Canvas(WIDTH, 8.28)
    labels, patches = ["[CLS]", *map(str, words), "[SEP]"], ["CLS", "1", "2", "3", "…", "N"]
    left, right, middle = 0.1, WIDTH - 0.1 - TEXT_W, 2.62  # where image, text and what lies between them begin
    wide = len(patches) * (SIDE + GAP) - GAP

    # Two encoders that never look at each other.
    seen = _patched(c, left, 0.1, 0.85, _example_picture() if image is None else picture(image), 4)
    said = c.box(right, 0.4, TEXT_W, SIDE, f"“{' '.join(map(str, words))}”", modality="text")
    encoders = (
        c.box(left, 1.9, wide, 0.62, "image encoder:\nlesson 01's ViT", modality="image"),
        c.box(right, 1.9, TEXT_W, 0.62, "text encoder, lower half:\nwords look at words", modality="text"),
    )
    states = []
    for x, names, kind, source, encoder in zip(
        (left, right), (patches, labels), ("image", "text"), (seen, said), encoders, strict=True
    ):
        size = {"side": SIDE, "gap": GAP, "width": WORD if kind == "text" else SIDE, "size": 8}
        tokens = c.tokens(x, 1.3, names, kind, **size)
        c.arrow(source, Box(x, tokens[0].y, tokens[-1].x + tokens[-1].w - x, SIDE))
        states.append(c.tokens(x, 2.9, names, kind, **size))
        for token, state in zip(tokens, states[-1], strict=True):
            c.arrow(token, encoder)
            c.arrow((state.x + state.w / 2, encoder.y + encoder.h), state)
    c.note(left + 0.5, 1.13, "patches, class token, positions", size=8)
    c.note(right, 1.0, "words, positions,\nLayerNorm", size=8)
    pictured = c.frame(left - 0.07, 2.82, wide + 0.14, 0.62, modality="image")

    # The teacher and its keys, between the encoders.
    teacher = c.box(middle, 0.26, 2.0, 0.62, "the teacher: a twin of all of this without ITM", new=True,
                    frozen=True, size=9)  # fmt: skip
    c.arrow(seen, teacher)
    c.arrow(said, teacher)
    now = c.box(middle, 2.1, 0.56, 0.42, "batch: B", new=True, tag="", size=9)
    queue = c.box(middle + 0.98, 2.1, 1.02, 0.42, "queue: Q earlier pairs", new=True, tag="", size=9)
    c.arrow((now.x + 0.28, teacher.y + teacher.h), now, "vectors\n(B, E)", side="right")
    c.arrow(now, queue, "push")
    c.arrow(encoders[1], (4.3, teacher.y + teacher.h), "follows:\nEMA", start="left", end="top", bend=True,
            at=(0.12, 0.5), dashed=True, side="left")  # fmt: skip

    # ITC compares class tokens, and nothing else.
    y, h = 2.9, 0.48
    to_image = c.box(2.42, y, 0.62, h, "linear, length 1", modality="image", size=8.5)
    to_text = c.box(4.15, y, 0.62, h, "linear, length 1", modality="text", size=8.5)
    itc = c.loss(3.22, y + 0.02, 0.76, "ITC", h=h - 0.04, new=True)
    c.arrow(states[0][0], to_image, start="top", end="left", bend=True, at=(0.5, 0.83))
    c.arrow(states[1][0], to_text)
    c.arrow(to_image, itc)
    c.arrow(to_text, itc)
    c.arrow(now, itc, start="top", end="bottom", at=(0.8, 0.3))
    c.arrow(queue, itc, start="top", end="bottom", at=(0.2, 0.7))
    c.note(3.51, 2.64, "keys", size=8, ha="center")
    goal = (
        "Each picture chooses among B + Q texts, each text among B + Q pictures. Target: α · the teacher's choice + "
        "(1 − α) · the true one."
    )
    c.note(1.45, 3.94, goal, width=3.2, size=8.5, colour=NEW)

    # The upper half: words ask, the picture answers.
    c.frame(right - 0.07, 3.68, TEXT_W + 0.14, 2.16, modality="fused", new=True)
    attention = c.box(right, 3.85, TEXT_W, 0.4, "self-attention: words look at words", modality="text", size=9.5)
    cross = c.box(right, 4.55, TEXT_W, 0.4, "cross-attention: words look at the picture", modality="fused", size=9.5)
    mlp = c.box(right, 5.25, TEXT_W, 0.4, "MLP, each word by itself", modality="fused", size=9.5)
    for state in states[1]:
        c.arrow(state, attention)
    c.arrow(attention, cross, "ask: queries", side="right")
    c.arrow(cross, mlp)
    c.arrow(pictured, cross, "answers: keys and values", start="top", end="left", bend=True, at=(0.5, 0.5))
    c.note(right - 0.15, 5.6, "text encoder, upper half:", ha="right", weight="bold", colour=NEW)
    c.note(right - 0.15, 5.4, "fusion blocks, post-norm", ha="right", colour=NEW)
    fused = c.tokens(right, 6.1, labels, "fused", side=SIDE, gap=GAP, width=WORD, size=8)
    for state in fused:
        c.arrow((state.x + state.w / 2, mlp.y + mlp.h), state)
    c.note(right - 0.15, 6.1 + SIDE / 2, "words that have seen\nthe picture (B, L, D)", size=8.5, ha="right")

    # Two heads on the fused words.
    itm_head = c.box(right, 6.92, 1.25, 0.42, "linear D → 2", modality="fused", size=9)
    c.arrow((fused[0].x + WORD / 2, fused[0].y + SIDE), (fused[0].x + WORD / 2, itm_head.y))
    bus = _bus(c, fused[1:4], 6.6)
    mlm_head = c.box(right + 1.45, 6.92, TEXT_W - 1.45, 0.42, "MLM head", modality="fused", size=9)
    c.arrow((bus.x + bus.w / 2 + 0.2, bus.y), (bus.x + bus.w / 2 + 0.2, mlm_head.y), "hidden words", side="right")
    c.arrow(itm_head, c.loss(right, 7.66, 1.25, "ITM"), "(3 B, 2)", side="right")
    c.arrow(mlm_head, c.loss(right + 1.45, 7.66, TEXT_W - 1.45, "MLM"), "(M, V)", side="right")
    for y, name, text in (
        (7.88, "ITC", "comes before anything is fused, and compares nothing but the two class tokens."),
        (7.42, "ITM", "has B true pairs and 2 B wrong ones: to each text a picture, to each picture a text, drawn by "
         "ITC's similarities. Only the upper half runs again."),
        (6.8, "MLM", "hides words; the caption then goes through both halves. The teacher's guess is α of the target."),
    ):  # fmt: skip
        c.note(left, y, name, weight="bold", va="top")
        c.note(left + 0.42, y, text, width=4.2, size=8.5, va="top")
    green = "Green: in no earlier lesson. The heads of ITM and MLM are as in lesson 02."
    c.note(left, 8.12, green, size=8.5, colour=NEW)
    _symbols(c, left, 6.1, ("B pairs", "L text tokens", "N patches", "D numbers a token", "E shared numbers",
                            "M hidden words", "V words in the table"))  # fmt: skip
    return c.fig


def albef_modes() -> Figure:
    """The three ways to run ALBEF's text encoder (official code): "text", "fusion" and "multi-modal"."""
    c = Canvas(WIDTH, 5.5)
    w, half, beside = 2.45, 1.42, 0.9
    for k, (title, call, ids, what) in enumerate((
        ("text", "text.read(ids, mask)", "ids (B, L)", "no picture is needed: one vector a text, made once"),
        ("fusion", "text.fuse(states, mask, image)", "", "text states that are there already, with any picture"),
        ("multi-modal", "text(hidden, mask, image)", "hidden ids (B, L)",
         "both halves, one after the other: the numbers are those of read, then fuse"),
    )):  # fmt: skip
        x = 0.1 + k * (w + 0.325)
        lower, upper = k != 1, k > 0
        c.note(x, 5.32, f"“{title}”", weight="bold", size=11)
        c.note(x, 5.08, call, size=8.5, colour=QUIET)
        c.note(x, 0.3, what, size=8.5, width=w)
        y_in, y_low, y_mid, y_up, y_out, y_loss = 0.68, 1.36, 2.22, 2.88, 3.74, 4.44
        if lower:
            low = c.box(x, y_low, half, 0.54, "lower half", modality="text")
            c.arrow(c.box(x, y_in, half, 0.36, ids, modality="text", size=9), low)
        else:
            _hidden(c, x, y_low, half, 0.54, "pale", "does not run")
        middle = c.box(x, y_mid, half, 0.36, "text states (B, L, D)", modality="text", size=8.5)
        if lower:
            c.arrow(low, middle)
        if upper:
            up = c.box(x, y_up, half, 0.54, "upper half:\nfusion", modality="fused")
            c.arrow(middle, up)
            seen = c.box(x + w - beside + 0.08, y_up, beside - 0.08, 0.54, "image states", modality="image", size=9)
            c.arrow(seen, up)
            out = c.box(x, y_out, half, 0.36, "fused (B, L, D)", modality="fused", size=9)
            c.arrow(up, out)
            head = c.loss(x, y_loss, half, "MLM" if lower else "ITM")
            c.arrow(out, head, "at hidden words" if lower else "of [CLS]", side="right")
            if not lower:
                c.note(x + half + 0.1, y_loss + 0.17, "and\nre-ranking", size=8.5)
        else:
            _hidden(c, x, y_up, half, 0.54, "pale", "does not run")
            loss = c.loss(x + w - beside + 0.2, y_mid, beside - 0.2, "ITC")
            c.arrow(middle, loss)
            c.note(loss.x + loss.w / 2, y_mid - 0.28, "of [CLS],\nand search", size=8.5, ha="center")
    return c.fig


GRADIENT = "#C04A00"


def albef_step() -> Figure:
    """One training step of ALBEF in the order in which it runs (paper, 3.2 and 3.3; official code), from top to bottom.

    Hatched boxes and dashed arrows let no gradient through; where one flows back, a second arrow says so.
    """
    c = Canvas(WIDTH, 7.3)
    left, right, w = 0.2, 5.7, 2.3
    for x, colour, title in ((0.1, QUIET, "teacher and queue: no gradient"), (5.6, GRADIENT, "student: gradients")):
        c.ax.add_patch(Rectangle((x, 0.55), 2.5, 6.65, facecolor="#F5F5F5", edgecolor="none", zorder=0))
        c.note(x + 1.25, 7.04, title, weight="bold", ha="center", colour=colour)

    # 1 to 3: who reads the batch.
    twin = c.box(left, 6.25, w, 0.5, "① the teacher follows: m · its weights + (1 − m) · the student's",
                 frozen=True, new=True, tag="", size=9)  # fmt: skip
    student = c.box(right, 6.25, w, 0.5, "student: its weights after the last step", size=9)
    c.arrow(student, twin, "EMA", dashed=True)
    batch = c.box(3.0, 5.3, 2.2, 0.62, "batch: B pictures, B captions, and these with hidden words", modality="pair",
                  size=9)  # fmt: skip
    asks = c.box(left, 5.36, w, 0.5, "② the teacher reads the batch", frozen=True, new=True, tag="", size=9)
    reads = c.box(right, 5.36, w, 0.5, "③ the student reads the batch", modality="pair", size=9)
    for a, b in ((batch, asks), (batch, reads), (twin, asks), (student, reads)):
        c.arrow(a, b)

    # 4 and 5: ITC, then the queue moves on.
    scores = c.box(left, 4.35, 0.95, 0.5, "scores (M, V)", frozen=True, size=9)
    vectors_t = c.box(left + 1.1, 4.35, w - 1.1, 0.5, "vectors\n(B, E) twice", frozen=True, size=9)
    queue = c.box(left + 1.1, 3.35, w - 1.1, 0.5, "queue: Q earlier pairs", frozen=True, new=True, tag="", size=9)
    keys = c.box(3.0, 3.35, 0.75, 1.5, "keys:\nB + Q", new=True, tag="", size=9)
    itc = c.loss(4.2, 4.4, 1.0, "④ ITC", h=0.4)
    vectors = c.box(right, 4.35, 1.1, 0.5, "vectors\n(B, E) twice", modality="pair", size=9)
    states = c.box(right + 1.25, 4.35, w - 1.25, 0.5, "states\n(B, …, D)", modality="pair", size=9)
    for a, b in ((asks, scores), (asks, vectors_t), (reads, vectors), (reads, states)):
        c.arrow(a, b)
    c.arrow(vectors_t, queue, "⑤ push, after ④", side="left")
    for a in (vectors_t, queue):
        c.arrow(a, keys, dashed=True)
    c.arrow((keys.x + keys.w, itc.y + 0.2), itc, dashed=True)
    c.note(4.7, 4.9, "soft targets", size=8, ha="center", va="bottom")

    def meet(source: Box, loss: Box) -> None:
        """Forward from the student to a loss, and the gradient back."""
        middle = loss.y + loss.h / 2
        c.arrow((source.x, middle + 0.08), (loss.x + loss.w, middle + 0.08))
        c.arrow((loss.x + loss.w, middle - 0.08), (source.x, middle - 0.08), colour=GRADIENT)

    meet(vectors, itc)

    # 6: wrong partners, then ITM. 7: MLM.
    draw = c.box(4.0, 3.3, 1.3, 0.62, "⑥ draw wrong partners", new=True, tag="", frozen=True, size=9)
    c.arrow((4.65, itc.y), (4.65, draw.y + draw.h), "similarities\n(B, B)", dashed=True, side="left")
    three = c.box(right, 2.3, 1.75, 0.62, "fusion half, 3 B pairs: B true, 2 B wrong", modality="fused", size=9)
    c.arrow(draw, three, start="right", end="top", bend=True, at=(0.5, 0.25), dashed=True)
    c.arrow((7.2, states.y), (7.2, three.y + three.h))
    itm = c.loss(4.2, 2.41, 1.0, "⑥ ITM", h=0.4)
    meet(three, itm)
    hidden = c.box(right, 1.1, w, 0.62, "fusion half, captions with hidden words", modality="fused", size=9)
    c.arrow((7.75, states.y), (7.75, hidden.y + hidden.h))
    mlm = c.loss(4.2, 1.21, 1.0, "⑦ MLM", h=0.4)
    meet(hidden, mlm)
    c.arrow(scores, mlm, "soft targets", start="bottom", end="left", bend=True, at=(0.5, 0.5), dashed=True)
    c.note(right, 0.82, "and back to all of its weights", size=8.5, colour=GRADIENT)
    c.note(3.9, 0.72, "loss = ITC + ITM + MLM", weight="bold", ha="center")

    for x, dashed, colour, text in (
        (0.1, False, QUIET, "forward"), (1.4, True, QUIET, "forward, nothing flows back"),
        (4.3, False, GRADIENT, "gradient"),
    ):  # fmt: skip
        c.arrow((x, 0.22), (x + 0.4, 0.22), dashed=dashed, colour=colour)
        c.note(x + 0.48, 0.22, text, size=8.5)
    c.note(5.6, 0.22, "Hatched: no gradient. Green: new here.", size=8.5, colour=QUIET)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# VLMo

EXPERTS = {"text": "L-FFN", "image": "V-FFN", "fused": "VL-FFN"}  # modality -> the paper's name of its expert


def _ragged(c: Canvas, box: Box, labels: Sequence[str], modality: str, *, new: int = 0) -> list[Box]:
    """A row of tokens that fills `box`, each as wide as its word needs. `new`: how many of the first are."""
    needs = [text_width(label, SMALLEST) + 0.09 for label in labels]
    more = (box.w - GAP * (len(labels) - 1) - sum(needs)) / len(labels)
    starts = np.cumsum([box.x, *(need + more + GAP for need in needs)])
    return [c.box(float(x), box.y, need + more, box.h, label, modality=modality, size=SMALLEST, new=i < new,
                  tag="")
            for i, (x, label, need) in enumerate(zip(starts, labels, needs, strict=False))]  # fmt: skip


def _tagged(
    c: Canvas, x: float, y: float, w: float, h: float, text: str, *, end: float | None = None, **look: Any
) -> Box:
    """A box with a grey tag that says "frozen" or "shared"; `end`: where the tag ends, without it at the right."""
    box = c.box(x, y, w, h, text, tag="", size=9.5, **look)
    c.tag(x + w if end is None else end, y + h, "frozen" if look.get("frozen") else "shared", colour=EDGES["neutral"])
    return box


def vlmo_block() -> Figure:
    """One Multiway block (paper, Fig. 1, eq. 2-3): shared attention, then for each token the expert of its kind.

    The third expert is drawn although only the last F blocks have it.
    """
    c = Canvas(WIDTH, 7.8)
    left, w, gap = 0.62, 1.72, 0.3
    places = [left + k * (w + gap) for k in range(3)]  # of L-FFN, V-FFN, VL-FFN
    wide, third, notes = 2 * w + gap, places[2], places[2] + w + 0.17
    middle = left + wide / 2  # the stream of tokens
    around = wide / 2 - 0.12 + 0.25  # how far the shortcuts go around

    def tokens(y: float) -> list[Box]:
        """All tokens of a pair: words in the first expert's place, patches in the second's."""
        halves = [Box(x, y, w, 0.28) for x in places[:2]]
        _ragged(c, halves[0], ("[T_CLS]", "red", "house"), "text")
        _ragged(c, halves[1], ("[I_CLS]", "1", "2", "…", "N"), "image")
        return halves

    # Shared: what treats every token alike.
    stream = _bus(c, tokens(0.3), 0.76)
    c.note(third, 0.44, "x: words, then patches; one of them may be missing", width=2.4, size=8.5)
    below: Box | tuple[float, float] = (middle, stream.y)
    for y, h, text, new in (
        (1.2, 0.36, "LayerNorm", False), (1.78, 0.44, "self-attention: every token looks at every token", False),
        (2.44, 0.36, "× γ₁, a number for each of the D", True),
    ):  # fmt: skip
        box = _tagged(c, left, y, wide, h, text, shared=True, new=new)
        c.arrow(below, box)
        below = box
    first = c.plus(middle, 3.12)
    c.arrow(below, first)
    c.arrow((middle, 0.94), first, start="left", end="left", bend=True, middle=around)
    for y, text in (
        (1.38, "the same weights, whatever a token is"), (2.0, "joint: here words and patches see each other"),
        (2.62, "γ₁ and γ₂: layer scale, learned"),
    ):  # fmt: skip
        c.note(third, y, text, width=2.4, size=8.5)

    # The switch: where a token goes is known before anything is computed.
    c.arrow(first, (middle, 3.66), head=False)
    states = tokens(3.74)
    every = c.frame(left - 0.08, 3.66, wide + 0.16, 0.44)
    experts = []
    for x, (kind, name) in zip(places, EXPERTS.items(), strict=True):
        c.frame(x - 0.08, 4.72, w + 0.16, 1.42, name, new=True)
        norm = c.box(x, 4.86, w, 0.34, "LayerNorm", modality=kind, size=9.5)
        mlp = c.box(x, 5.42, w, 0.42, "MLP, D → 4 D → D", modality=kind, size=9.5)
        c.arrow(norm, mlp)
        experts.append((norm, mlp))
    for state, (norm, _), kind, name in zip(states, experts, ("text", "image"), ("words", "patches"), strict=False):
        c.arrow((state.x + w / 2, every.y + every.h), norm, colour=EDGES[kind])
        c.note(state.x + w / 2 + 0.08, 4.4, name, size=8.5, colour=EDGES[kind])
    c.arrow(every, experts[2][0], start="right", end="bottom", bend=True, colour=EDGES["fused"])
    c.note(third + w / 2 + 0.08, 4.4, "all of a pair", size=8.5, colour=EDGES["fused"])
    c.note(third + w / 2 + 0.08, 3.88, "the switch is no gate: a token's kind and the block decide", width=2.4,
           size=8.5, colour=NEW)  # fmt: skip
    c.note(notes, 5.44, "last F blocks only; for pairs, instead of the other two", width=WIDTH - notes - 0.08,
           size=8.5, colour=EDGES["fused"])  # fmt: skip

    # Together again.
    bus = _bus(c, [mlp for _, mlp in experts], 6.26)
    scale = _tagged(c, left, 6.44, wide, 0.36, "× γ₂", shared=True, new=True)
    c.arrow((middle, bus.y), scale)
    second = c.plus(middle, 7.08)
    c.arrow(scale, second)
    c.arrow((middle, 3.44), second, start="left", end="left", bend=True, middle=around)
    c.arrow(second, (middle, 7.42))
    tokens(7.42)
    c.note(third, 6.62, "h = x + γ₁ · MSA(LN(x))\ny = h + γ₂ · FFN(LN(h))", size=8.5)
    c.note(third, 7.56, "y: every token in its old place", size=8.5)
    c.note(third, 7.08, "Green: in no earlier lesson.", size=8.5, colour=NEW)
    return c.fig


def vlmo_overview(image: Any = None, *, words: Sequence[str] = ("a", "red", "house")) -> Figure:
    """The whole VLMo (paper, Fig. 1) in its three uses: the same blocks read a picture, a text, or a pair.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house. `words`: its caption in three words.
    """
    if len(words) != 3:
        raise ValueError(f"words has {len(words)} entries: give the caption in three words, for example a red house")
    c = Canvas(WIDTH, 8.25)
    pixels = _example_picture() if image is None else picture(image)
    labels = {"text": ["[T_CLS]", *map(str, words), "[SEP]"], "image": ["[I_CLS]", "1", "…", "N"]}
    sizes, gap = {"text": 2.34, "image": 1.2}, 0.24
    y_in, low, high, top, y_out, y_head, y_loss = 1.56, 2.12, 3.6, 5.14, 5.68, 6.46, 7.2

    # The blocks lie on two bands, for they are the same in all three columns.
    for y, name in ((low, "blocks below"), (high, "last F blocks")):
        c.ax.add_patch(Rectangle((0.08, y), WIDTH - 0.16, 1.36, facecolor="#F5F5F5", edgecolor="none", zorder=0))
        c.ax.text(0.23, y + 0.68, name, rotation=90, ha="center", va="center", fontsize=9, weight="bold")

    x, columns = 0.42, []
    for title, what, kinds in (
        ("image encoder", "a picture alone", ("image",)), ("text encoder", "a text alone", ("text",)),
        ("fusion encoder", "a pair: text before image, in one row", ("text", "image")),
    ):  # fmt: skip
        parts, at = {}, x  # kind -> what it takes of the column
        for kind in kinds:
            parts[kind] = Box(at, y_in, sizes[kind], 0.28)
            at += sizes[kind] + GAP
        whole = Box(x, y_in, at - GAP - x, 0.28)
        c.note(x, 8.08, title, weight="bold", size=11)
        c.note(x, 7.84, what, size=8.5, colour=QUIET)
        every = "self-attention" + ": words and patches see each other" * (len(kinds) == 2)
        attention = [c.box(x, y + 0.15, whole.w, 0.36, every, shared=True, size=9) for y in (low, high)]
        norm = c.box(x, top, whole.w, 0.28, "LayerNorm", shared=True, size=8.5)
        for kind, part in parts.items():
            if kind == "image":
                source = _patched(c, part.x + part.w / 2 - 0.38, 0.46, 0.76, pixels, 4)
            else:
                source = c.box(part.x, 0.68, part.w, 0.31, f"“{' '.join(map(str, words))}”", modality="text", size=9)
                c.note(part.x, 1.28, "embedded as\nin lesson 02", size=8)
            c.arrow(source, part)
            for token in _ragged(c, part, labels[kind], kind):
                c.arrow(token, attention[0])
        for y, here, after in zip((low, high), attention, (attention[1], norm), strict=True):
            together = len(kinds) == 2 and y == high
            for kind, part in ({"fused": whole} if together else parts).items():
                expert = c.box(part.x, y + 0.83, part.w, 0.36, EXPERTS[kind], modality=kind, shared=True, new=True,
                               tag="", size=9.5)  # fmt: skip
                c.arrow(here, expert)
                c.arrow(expert, after)
        states = []
        for kind, part in parts.items():
            look = "fused" if len(kinds) == 2 else kind
            states += _ragged(c, Box(part.x, y_out, part.w, part.h), labels[kind], look)
        for state in states:
            c.arrow((state.x + state.w / 2, norm.y + norm.h), state)
        columns.append((whole, states))
        x = at - GAP + gap
    for (whole, _), levels in zip(columns, ((), (low + 1.01,)), strict=False):
        for y in (low + 0.33, high + 0.33, top + 0.14, *levels):
            c.note(whole.x + whole.w + gap / 2, y, "=", ha="center", size=11, weight="bold")

    # What is read, and the losses.
    (pictured, image_states), (said, text_states), (paired, pair_states) = columns
    itc = c.loss((pictured.x + said.x + 0.72) / 2 - 0.38, y_loss, 0.76, "ITC")
    for whole, states, kind, side in ((pictured, image_states, "image", "left"), (said, text_states, "text", "right")):
        unit = c.box(whole.x, y_head, 0.72, 0.46, "linear, length 1", modality=kind, size=8.5)
        c.arrow((states[0].x + states[0].w / 2, y_out + 0.28), (states[0].x + states[0].w / 2, y_head))
        c.arrow(unit, itc, start="top", end=side, bend=True)
    second = "ITC compares class tokens. The official code has a second one, behind VL-FFN."
    c.note(said.x + 0.84, y_head + 0.42, second, width=1.5, size=8.5)
    x = paired.x
    itm_head = c.box(x, y_head, 1.35, 0.46, "pooler, then\nlinear D → 2", modality="fused", size=9)
    mlm_head = c.box(x + 1.55, y_head, 1.3, 0.46, "MLM head", modality="fused", size=9)
    c.arrow(pair_states[0], itm_head)
    bus = _bus(c, pair_states[1:4], y_out + 0.4)
    c.arrow((x + 1.65, bus.y), (x + 1.65, y_head), "hidden words", side="right")
    c.arrow(itm_head, c.loss(x, y_loss, 1.35, "ITM"), "(3 B, 2)", side="right")
    c.arrow(mlm_head, c.loss(x + 1.55, y_loss, 1.3, "MLM"), "(M, V)", side="right")
    c.note(0.1, 0.22, "Double outline, and =: what has one name at one height is the same module in all three columns. "
           "The LayerNorms inside the blocks, γ and the shortcuts are left out. Green: in no earlier lesson.",
           width=WIDTH - 0.2, size=8.5, colour=QUIET)  # fmt: skip
    return c.fig


def vlmo_stages(*, pictures: int = 9_500, sentences: int = 9_500, pairs: int = 1_000) -> Figure:
    """VLMo's three stages (paper, 3.3; official code): pictures alone, texts alone, pairs; and what each trains.

    The three numbers say how much data each stage has. The defaults are the course's own.
    """
    if wrong := {name: n for name, n in (("pictures", pictures), ("sentences", sentences), ("pairs", pairs)) if n < 1}:
        raise ValueError(f"{next(iter(wrong))}={next(iter(wrong.values()))}: give the size of each stage, 1 or more")
    c = Canvas(WIDTH, 6.15)
    w, gap, room = 2.3, 0.44, 0.06
    shown = [i for i in range(16) if i not in (5, 6, 7, 9, 10, 11)]  # 40 % of the patches are covered, in a block
    half, third = (w - room) / 2, (w - 2 * room) / 3
    parts = {  # name -> words, modality, and where it lies in a column
        "words": ("word embeddings", "text", Box(0, 1.66, half, 0.44)),
        "patches": ("patches, positions", "image", Box(half + room, 1.66, half, 0.44)),
        "attention": ("self-attention, its LN, γ", "neutral", Box(0, 2.4, w, 0.4)),
        **{name: (name, kind, Box(k * (third + room), 3.1, third, 0.4)) for k, (kind, name) in
           enumerate(EXPERTS.items())},
        "norm": ("last LayerNorm", "neutral", Box(0, 3.8, w, 0.3)),
    }  # fmt: skip
    models: list[Box] = []
    for k, (title, data, task, works, frozen, head, losses) in enumerate((
        ("1  pictures alone", f"{pictures:,} pictures, no texts", "Which code has each covered patch?",
         ("patches", "attention", "V-FFN", "norm"), (), "MIM head", ("MIM",)),
        ("2  texts alone", f"{sentences:,} texts, no pictures", "Which word is hidden?",
         ("words", "attention", "L-FFN", "norm"), ("patches", "attention", "V-FFN"), "MLM head", ("MLM",)),
        ("3  pairs", f"{pairs:,} pictures with texts", "Everything trains.", tuple(parts), (), "heads of the three",
         ("ITC", "ITM", "MLM")),
    )):  # fmt: skip
        x = 0.2 + k * (w + gap)
        c.note(x, 5.98, title, weight="bold", size=11)
        c.note(x, 5.73, data)
        c.note(x, 5.51, task, size=8.5, colour=QUIET)
        place = {name: Box(x + at.x, at.y, at.w, at.h) for name, (_, _, at) in parts.items()}
        for name, (text, kind, _) in parts.items():
            box = place[name]
            if name in works or name in frozen:
                c.box(box.x, box.y, box.w, box.h, text, modality=kind, frozen=name in frozen, new=name == "VL-FFN",
                      size=9)  # fmt: skip
            else:
                _hidden(c, box.x, box.y, box.w, box.h, "pale", text)
        models.append(c.frame(x - 0.1, 1.56, w + 0.2, 2.64))
        if "words" in works:
            said = "a [MASK] house" if k == 1 else "a red house"
            c.arrow(c.box(x, 0.82, half, 0.34, said, modality="text", size=9), place["words"])
        if "patches" in works:
            seen = _patched(c, x + half + room + half / 2 - 0.42, 0.42, 0.84, _example_picture(), 4,
                            None if k else shown, "mask")  # fmt: skip
            c.arrow(seen, place["patches"])
        for name in works:
            if name in ("words", "patches"):
                c.arrow(place[name], place["attention"])
            elif name in EXPERTS.values():
                c.arrow(place["attention"], place[name])
                c.arrow(place[name], place["norm"])
        top = c.box(x, 4.4, w, 0.32, head, modality=("image", "text", "fused")[k], size=9)
        c.arrow(place["norm"], top)
        each = (w - room * (len(losses) - 1)) / len(losses)
        for i, name in enumerate(losses):
            c.arrow(top, c.loss(x + i * (each + room), 4.92, each, name))
    for a, b in pairwise(models):
        c.arrow(a, b)
    c.note(0.1, 0.16, "Hatched: frozen. Dotted: takes no part. Level arrows: the weights go on. MIM: masked image "
           "modelling, M where a patch is covered.", size=8.5, colour=QUIET)  # fmt: skip
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# BLIP


def blip_overview(image: Any = None) -> Figure:
    """The whole BLIP (paper, Fig. 2): a ViT, and one text transformer in three modes; what ALBEF has not is green.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house.
    """
    c = Canvas(WIDTH, 8.28)
    w, h = 2.04, 0.42
    y_say, y_in, y_embed, y_attn, y_cross, y_ffn = 1.62, 2.14, 2.64, 3.3, 3.98, 4.66
    y_states, y_head, y_out, y_loss, y_name = 5.48, 6.04, 6.68, 7.2, 8.08
    bus, low, high = 1.48, y_attn - 0.14, y_ffn + h + 0.14  # below everything; where the blocks begin and end
    modes = (  # name, what it does, x, first token, modality of its states, its loss, what that asks, what comes out
        ("text encoder", "a text alone", 1.38, "[CLS]", "text", "ITC",
         "whose text, whose picture?", "Teacher, queue as in lesson 05\nOut: vectors (B, E), for search"),
        ("image-grounded encoder", "a text read with a picture", 3.66, "[ENC]", "fused", "ITM",
         "does the text fit?", "B true pairs and 2 B wrong ones\nOut: scores (3 B, 2), to re-rank"),
        ("image-grounded decoder", "a text written about a picture", 6.06, "[DEC]", "fused", "LM",
         "which word is next?", "Told from the words before it\nOut: scores (B, L, V), to write"),
    )  # fmt: skip

    # The picture, once for all.
    x, wide = 0.1, 0.98
    for left, right in ((x - 0.06, x + wide + 0.06), (modes[0][2] - 0.06, WIDTH - 0.04)):
        ground = Rectangle((left, low), right - left, high - low, facecolor="#F5F5F5", edgecolor="none", zorder=0)
        c.ax.add_patch(ground)
    seen = _patched(c, x + 0.09, y_say - 0.5, 0.8, _example_picture() if image is None else picture(image), 4)
    tokens = _ragged(c, Box(x, y_in, wide, 0.28), ("CLS", "1", "…", "N"), "image")
    c.arrow(seen, Box(x, tokens[0].y, wide, 0.28))
    looks = c.box(x, y_attn, wide, h, "self-attention", modality="image", size=9)
    each = c.box(x, y_ffn, wide, h, "FFN", modality="image", size=9.5)
    for token in tokens:
        c.arrow(token, looks)
    c.arrow(looks, each)
    states = _ragged(c, Box(x, y_states, wide, 0.28), ("CLS", "1", "…", "N"), "image")
    for state in states:
        c.arrow((state.x + state.w / 2, each.y + h), state)
    c.note(x, y_name, "ViT", weight="bold", size=10)
    c.note(x, y_name - 0.22, "looks once", size=8.5, colour=QUIET)
    unit = c.box(x, y_head, wide, h, "linear,\nlength 1", modality="image", size=8.5)
    c.arrow((states[0].x + states[0].w / 2, y_states + 0.28), (states[0].x + states[0].w / 2, y_head))
    whole = c.frame(x - 0.06, y_states - 0.07, wide + 0.12, 0.42, modality="image")

    # One text transformer, three times.
    crosses = []
    for name, what, x, first, kind, objective, question, out in modes:
        written = objective == "LM"
        labels = [first, "a", "red", "house"] + ["[SEP]"] * (not written)
        c.note(x, y_name, name, weight="bold", size=10)
        c.note(x, y_name - 0.22, what, size=8.5, colour=QUIET)
        said = c.box(x, y_say, w, 0.28, "“a red house”", modality="text", size=9)
        embed = c.box(x, y_embed, w, 0.34, "words + positions, LayerNorm", shared=True, size=8.5)
        tokens = _ragged(c, Box(x, y_in, w, 0.28), labels, "text", new=first != "[CLS]")
        c.arrow(said, Box(x, y_in, w, 0.28))
        for token in tokens:
            c.arrow(token, embed)
        way = "causal self-attention" if written else "self-attention, both ways"
        attention = c.box(x, y_attn, w, h, way, modality="causal" if written else "text", shared=not written,
                          new=written, tag="", size=9.5)  # fmt: skip
        ffn = c.box(x, y_ffn, w, h, "FFN", shared=True, size=9.5)
        c.arrow(embed, attention)
        if objective == "ITC":
            c.arrow(attention, ffn)
            c.note(x + w / 2 + 0.1, y_cross + h / 2, "no picture:\npassed by", size=8.5, colour=QUIET)
        else:
            crosses.append(c.box(x, y_cross, w, h, "cross-attention", modality="fused", shared=True, size=9.5))
            c.arrow(attention, crosses[-1])
            c.arrow(crosses[-1], ffn)
        done = _ragged(c, Box(x, y_states, w, 0.28), labels, kind)
        for state in done:
            c.arrow((state.x + state.w / 2, ffn.y + h), state)
        heads = {"ITC": "linear, length 1", "ITM": "linear D → 2", "LM": "LM head: D → V"}
        if written:
            head = c.box(x, y_head, w, h, heads[objective], modality=kind, size=9)
            following = [c.box(state.x, y_out, state.w, 0.28, word, modality="text", size=SMALLEST)
                         for state, word in zip(done, [*labels[1:], "[SEP]"], strict=True)]  # fmt: skip
            loss = c.loss(x, y_loss, w, objective, new=True)
            for state, word in zip(done, following, strict=True):
                c.arrow(state, head)
                c.arrow((word.x + word.w / 2, head.y + h), word)
                c.arrow(word, loss)
        else:
            head = c.box(x, y_head, 1.2, h, heads[objective], modality=kind, size=9)
            c.arrow(done[0], head)
            answers = ("a vector",) if objective == "ITC" else ("no", "yes")
            loss = c.loss(x, y_loss, 1.2, objective)
            for answer in _ragged(c, Box(x, y_out, 1.2, 0.28), answers, kind):
                c.arrow(head, answer)
                c.arrow(answer, loss)
            if objective == "ITC":
                c.arrow(unit, loss, start="top", end="left", bend=True)
        c.note(x, 1.0, objective, weight="bold")
        c.note(x + 0.36, 1.0, question, size=8.5)
        c.note(x, 0.73, out, size=8.5)

    # The picture's states go below the texts, and up between the two that ask them.
    between = (crosses[0].x + w + crosses[1].x) / 2
    level = y_cross + h / 2
    down = whole.x + whole.w + 0.11
    corners = ((down, whole.y + whole.h / 2), (down, bus), (between, bus), (between, level))
    for a, b in pairwise((whole.side("right"), *corners)):
        c.arrow(a, b, head=False, colour=EDGES["image"])
    for cross, side in zip(crosses, ("right", "left"), strict=True):
        c.arrow((between, level), cross.side(side), colour=EDGES["image"])
    for x, levels in ((3.54, (y_embed + 0.17, y_attn + h / 2, y_ffn + h / 2)),
                      (between, (y_ffn + h / 2,))):  # fmt: skip
        for y in levels:
            c.note(x, y, "=", ha="center", size=11, weight="bold")
    c.note(modes[0][2], bus - 0.17, "the picture's states (B, 1+N, D'): keys and values", size=8.5,
           colour=EDGES["image"])  # fmt: skip
    c.note(0.1, 0.22, "Same name and colour in the grey, double outline and =: the very same weights. The grey is "
           "repeated in every block; its LayerNorms and shortcuts are left out.", width=WIDTH - 0.2, size=8.5,
           colour=QUIET)  # fmt: skip
    c.note(0.1, 0.82, "Green: not in\nlesson 05.", size=8.5, colour=NEW)
    return c.fig


def _add_and_norm(
    c: Canvas, x: float, below: float, module: Box, norm: Box, *, leave: float, side: str, around: float
) -> None:
    """A stream of tokens at `x` from the height `below` through a module, to which it is added, into a LayerNorm. The
    shortcut leaves it at the height `leave` and goes around that `side`, `around` inches away."""
    plus = c.plus(x, (module.y + module.h + norm.y) / 2)
    c.arrow((x, below), (x, module.y))
    c.arrow((x, module.y + module.h), plus)
    c.arrow(plus, (x, norm.y))
    c.arrow((x, leave), plus, start=side, end=side, bend=True, middle=around)


def blip_block() -> Figure:
    """One block of BLIP's text transformer, post-norm (paper, 3.1; official code): the encoder's stream at the left,
    the decoder's at the right; a box across both is one module for both."""
    c = Canvas(WIDTH, 8.2)
    left, w, gap, aside = 0.46, 2.02, 1.86, 0.26
    right, wide = left + w + gap, 2 * w + gap
    notes = left + wide + 0.4
    room = WIDTH - 0.08 - notes
    streams, centre = (left + w / 2, right + w / 2), left + wide / 2

    def shared(y: float, h: float, text: str, modality: str = "neutral") -> Box:
        return _tagged(c, left, y, wide, h, text, end=right + 0.12, modality=modality, shared=True)

    # Before the first block: the same tables for both.
    tables = shared(0.68, 0.36, "tables of words and positions, LayerNorm: once, below the first block")
    for x, first in ((left, "[ENC]"), (right, "[DEC]")):
        for token in _ragged(c, Box(x, 0.12, w, 0.28), (first, "a", "red", "house"), "text", new=True):
            c.arrow(token, tables)

    # Self-attention is each one's own, with its output layer and its LayerNorm.
    leave, fan, top = 1.46, 1.62, 4.38
    kept: list[Box] = []
    for x, inner, name, kind, looks in (
        (left, "right", "encoder: own", "text", "both ways"), (right, "left", "decoder: own", "causal", "back only"),
    ):  # fmt: skip
        new, middle = kind == "causal", x + w / 2
        look = {"modality": kind, "new": new, "tag": "", "size": 9.5}
        c.frame(x - 0.13 - aside * new, 1.3, w + 0.26 + aside, top - 1.3, name, modality=kind, new=new)
        parts = c.tokens(x, 1.8, "qkv", kind, side=0.3, width=0.56, gap=0.17, size=9.5, new=range(3 * new))
        attention = c.box(x, 2.4, w, 0.36, f"attention, looks {looks}", **look)
        out = c.box(x, 2.98, w, 0.3, "output layer", **look)
        plus = c.plus(middle, 3.56)
        norm = c.box(x, 3.8, w, 0.28, "LayerNorm", **look)
        c.arrow((middle, tables.y + tables.h), (middle, fan), head=False)
        for part in parts:
            c.arrow((middle, fan), part, start="right", end="bottom", bend=True)
            c.arrow(part, attention)
        for a, b in ((attention, out), (out, plus), (plus, norm)):
            c.arrow(a, b)
        c.arrow((middle, leave), plus, start=inner, end=inner, bend=True, middle=w / 2 + 0.06)
        kept = parts[1:]

    # While it writes, the decoder reads the newest word alone; keys and values of those before are kept.
    both = c.frame(kept[0].x - 0.06, 1.74, kept[1].x + kept[1].w - kept[0].x + 0.12, 0.42, modality="causal")
    cache = c.box(notes, 1.76, room, 1.0, "key/value cache:\nk and v of\n[DEC], a, red", new=True, size=9)
    c.arrow((both.x + both.w, 1.95), (cache.x, 1.95), dashed=True)
    c.arrow((cache.x, 2.58), (right + w, 2.58), dashed=True)
    for y, text in (
        (1.36, "Dashed: while it writes, the newest word alone is read, here house."),
        (3.3, "Own: q, k, v, output layer and LayerNorm."),
        (4.94, "Passed by when [CLS] leads the text. Here in every block, in lesson 05 in the last ones alone."),
        (6.42, "One FFN for all three modes."),
        (7.26, "Post-norm: add, then LayerNorm."),
    ):  # fmt: skip
        c.note(notes, y, text, width=room, size=8.5)
    c.note(notes, 7.76, "Green:\nnot in lesson 05.", size=8.5, colour=NEW)

    # From here on one module for both.
    cross = shared(4.74, 0.4, "cross-attention with its output layer: words ask the picture", "fused")
    first = shared(5.66, 0.28, "LayerNorm", "fused")
    ffn = shared(6.24, 0.36, "FFN, D → 4 D → D")
    second = shared(7.12, 0.28, "LayerNorm")
    for below, module, norm, leave in ((4.08, cross, first, 4.54), (first.y + first.h, ffn, second, 6.08)):
        for x, side in zip(streams, ("left", "right"), strict=True):
            _add_and_norm(c, x, below, module, norm, leave=leave, side=side, around=w / 2 + 0.06)
    for x, first_token in ((left, "[ENC]"), (right, "[DEC]")):
        for token in _ragged(c, Box(x, 7.62, w, 0.28), (first_token, "a", "red", "house"), "fused"):
            c.arrow((token.x + token.w / 2, second.y + second.h), token)

    # What is asked.
    seen = _patched(c, centre - 0.36, 2.2, 0.72, _example_picture(), 4)
    states = c.box(centre - 0.46, 3.3, 0.92, 0.5, "states\n(B, 1+N, D')", modality="image", size=8.5)
    c.arrow(seen, states, "ViT", side="right")
    c.arrow(states, cross, "k, v", side="right")
    return c.fig


FLOWS = ("human", "web", "synthetic", "web kept", "synthetic kept", "in the end")  # the sets of pairs of CapFilt


def capfilt(counts: Mapping[str, int] | None = None, *, false: Mapping[str, float] | None = None) -> Figure:
    """CapFilt (paper, 3.3, Fig. 3) in five steps: how BLIP writes and filters texts for its own training.

    `counts`: how many pairs each of `FLOWS` has, and `false`: which share of them is false, of all but "human", or of
    some. Both stand at the arrows. Without them the arrows bear names alone.
    """
    if counts is not None and set(counts) != {*FLOWS}:
        raise ValueError(f"counts has {', '.join(map(repr, counts)) or 'nothing'}: give one number for each of "
                         f"{', '.join(map(repr, FLOWS))}")  # fmt: skip
    for name, share in (false or {}).items():
        if name not in FLOWS[1:] or not 0 <= share <= 1:
            raise ValueError(f"false[{name!r}] is {share}: give a share from 0 to 1, of all but 'human'")

    def numbers(name: str) -> list[str]:
        """What is known of a set of pairs."""
        size = [f"{int(counts[name]):,} pairs"] if counts is not None else []
        return size + ([f"{100 * false[name]:.0f} % false"] if name in (false or {}) else [])

    def told(x: float, y: float, words: str, name: str = "", *, join: str = "\n") -> None:
        """At the point (x, y) of a level arrow: above it what passes, and below it how many."""
        c.note(x, y + 0.05, words, size=8.5, ha="center", va="bottom")
        if name and numbers(name):
            c.note(x, y - 0.06, join.join(numbers(name)), size=8.5, ha="center", va="top")

    def beside(x: float, y: float, words: str, name: str) -> None:
        """The same at the right of an upright arrow."""
        c.note(x + 0.08, y, "\n".join([words, *numbers(name)]), size=8.5)

    c = Canvas(WIDTH, 6.9)
    x, w, h, gap = 2.5, 2.1, 1.0, 0.66  # the column of models
    y_last, y_filter = 0.62, 2.42
    y_first = y_filter + h + gap
    y_captioner = y_first + h + gap
    height = y_captioner + h - y_filter
    human = c.box(0.1, y_filter, 1.2, height, "human\n(I_h, T_h)", modality="pair", weight="bold")
    web = c.box(5.72, y_filter + 0.5, 1.0, height - 0.84, "web\n(I_w, T_w)", modality="pair", weight="bold")
    captioner, first, judge = (
        c.box(x, y, w, h, words, modality="fused") for y, words in (
            (y_captioner, "② captioner:\na copy of ①, tuned\nwith LM"),
            (y_first, "① BLIP, pre-trained\non D = human + web with\nITC + ITM + LM"),
            (y_filter, "② filter:\na copy of ①, tuned\nwith ITC + ITM"),
        )
    )  # fmt: skip
    written = c.box(7.08, y_first - 0.15, 1.04, h + 0.3, "synthetic\n(I_w, T_s)", modality="pair", weight="bold")
    data = c.box(1.9, y_last, 3.3, 0.72, "D′ = human + web kept\n+ synthetic kept", modality="pair", weight="bold")
    last = c.box(WIDTH - 1.4, y_last, 1.3, 0.72, "⑤ a new BLIP, pre-trained on D′", modality="fused")

    # What models learn from.
    for model in (captioner, first, judge):
        c.arrow(human, model, dashed=True)
        told((human.x + human.w + x) / 2, model.y + h / 2, "(I_h, T_h)", "human")
    c.arrow(web, first, dashed=True)
    c.arrow(data, last, dashed=True)
    between = (x + w + web.x) / 2
    told(between, y_first + h / 2, "(I_w, T_w)", "web")
    told((data.x + data.w + last.x) / 2, y_last + 0.36, "in the end", "in the end")
    for copy in (captioner, judge):
        c.arrow(first, copy, "weights", colour=EDGES["fused"], side="right", size=8.5)

    # What goes through them.
    c.arrow((web.x, y_captioner + 0.36), (x + w, y_captioner + 0.36))
    told(between, y_captioner + 0.36, "I_w alone")
    c.arrow(captioner, written, start="right", end="top", bend=True, at=(0.84, 0.5))
    told((x + w + written.x) / 2, captioner.y + 0.84 * h, "③ writes T_s")
    c.arrow((web.x, y_filter + 0.78), (x + w, y_filter + 0.78))
    told(between, y_filter + 0.78, "(I_w, T_w)", "web")
    c.arrow(written, judge, start="bottom", end="right", bend=True, at=(0.5, 0.16))
    told(6.2, y_filter + 0.16 * h, "(I_w, T_s)", "synthetic", join=", ")
    for at, name in ((x + 0.2, "web kept"), (x + 1.6, "synthetic kept")):
        c.arrow((at, judge.y), (at, data.y + data.h))
        beside(at, (judge.y + data.y + data.h) / 2, f"④ {name}", name)
    c.arrow(human, data, start="bottom", end="left", bend=True)
    beside(human.x + human.w / 2, 1.88, "(I_h, T_h)", "human")
    note = (
        "Dashed: a model learns from it. Solid: it goes through. I: pictures, T: texts; h: by hand, w: as found on the "
        "web, s: synthetic." + " False: contradicts its picture or says nothing of it." * bool(false)
    )
    c.note(0.1, 0.24, note, width=WIDTH - 0.2, size=8.5, colour=QUIET)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# BLIP-2

QUERIES = ("1", "2", "…", "Q")


def blip2_overview(image: Any = None) -> Figure:
    """The whole BLIP-2 (paper, Fig. 1-3), stage 1 above stage 2: what is frozen is hatched, what is trained lies on
    grey, what no earlier lesson has is green.

    `image`: the picture to draw, (3, H, W) or PIL; without it a little house.
    """
    c = Canvas(WIDTH, 8.28)
    x, w, words_x, words_w = 2.38, 1.34, 3.86, 1.95  # the queries' half of the Q-Former, and the words'
    pixels = _example_picture() if image is None else picture(image)

    def trained(bottom: float, top: float, right: float) -> None:
        c.ax.add_patch(Rectangle((1.1, bottom), right - 1.1, top - bottom, facecolor="#F5F5F5", edgecolor="none",
                                 zorder=0))  # fmt: skip
        c.note(1.42, top - 0.18, "trained", weight="bold")

    def former(y: float, words: Sequence[str] = ()) -> tuple[Box, Box, list[list[Box]]]:
        """From the picture to the states of the queries and, if there are `words`, of these; the tokens lie at the
        height `y`. Returns ln_vision, the frame around the Q-Former's blocks, and the states."""
        wide = words_x + words_w - x if words else w
        looks = "one self-attention for both, ruled by a mask" if words else "self-attention"
        attention = c.box(x, y + 0.5, wide, 0.34, looks, shared=bool(words), size=9.5)
        cross = c.box(x, y + 1.08, w, 0.42, "cross-attention, in every 2nd block", modality="image", size=9)
        states = []
        for left, room, names, kind, below, what in (
            (x, w, QUERIES, "image", cross, "queries"), (words_x, words_w, words, "text", attention, "words"),
        )[: 1 + bool(words)]:  # fmt: skip
            ffn = c.box(left, y + 1.74, room, 0.34, f"FFN for {what}", modality=kind, size=9.5)
            c.arrow(below, ffn)
            for token in _ragged(c, Box(left, y, room, 0.28), names, kind, new=4 * (kind == "image")):
                c.arrow(token, attention)
            states.append(_ragged(c, Box(left, y + 2.34, room, 0.28), names, kind))
            for state in states[-1]:
                c.arrow((state.x + state.w / 2, ffn.y + ffn.h), state)
        c.arrow(attention, cross)
        frame = c.frame(x - 0.13, y + 0.4, wide + 0.26, 1.78, new=True)
        c.note(x - 0.2, y + 1.91, "Q-Former", weight="bold", colour=NEW, ha="right")
        c.note(x - 0.2, y + 0.14, "queries,\nlearned", size=8.5, colour=NEW, ha="right")
        c.note(x - 0.2, y + 2.48, "(B, Q, D)", size=8.5, ha="right")
        level = cross.y + cross.h / 2
        eye = _tagged(c, 0.1, level - 0.3, 0.86, 0.6, "image encoder", modality="image", frozen=True)
        norm = c.box(1.2, level - 0.24, 0.8, 0.48, "LayerNorm, ln_vision", modality="image", new=True, tag="", size=9)
        c.arrow(_patched(c, 0.13, y - 0.08, 0.8, pixels, 4), eye)
        c.arrow(eye, norm)
        c.arrow(norm, cross)
        return norm, frame, states

    # Stage 1: queries and words.
    trained(3.84, 8.18, words_x + words_w + 0.17)
    norm, blocks, (asked, said) = former(4.14, ("[CLS]/[DEC]", "a", "red", "house"))
    c.note(0.1, 8.08, "stage 1", weight="bold", size=11)
    c.note(0.1, 7.86, "Queries learn to see what words tell. No language model yet.", width=0.96, size=8.5,
           colour=QUIET, va="top")  # fmt: skip
    y, top = 7.06, 7.72
    match = c.box(x, y, 0.62, 0.4, "linear\nD → 2", modality="image", size=8.5)
    seen = c.box(x + 0.72, y, 0.62, 0.4, "linear, length 1", modality="image", size=8.5)
    told = c.box(words_x, y, 0.6, 0.4, "linear, length 1", modality="text", size=8.5)
    head = c.box(words_x + 0.7, y, words_w - 0.7, 0.4, "LM head", modality="text", size=9)
    row = Box(x, asked[0].y, w, asked[0].h)
    c.arrow(row, match)
    c.arrow(row, seen)
    c.arrow(said[0], told)
    for state in said:
        c.arrow(state, head)
    itc = c.loss(seen.x, top, told.x + told.w - seen.x, "ITC")
    c.arrow(match, c.loss(x, top, 0.62, "ITM"), "mean", side="right")
    c.arrow(seen, itc, "max", side="right")
    c.arrow(told, itc)
    c.arrow(head, c.loss(head.x, top, head.w, "ITG"))
    aside = words_x + words_w + 0.27
    for y, name, text in (
        (7.9, "ITC", "Queries see queries, words see words. The query most like [CLS] counts. No teacher, no queue."),
        (6.76, "ITM", "All see all. Each query says whether text and picture match; the mean counts."),
        (5.8, "ITG", "BLIP's LM: [DEC] leads the text. Words see all queries and the words before them, queries see "
         "no words."),
    ):  # fmt: skip
        c.note(aside, y, name, weight="bold", va="top")
        c.note(aside, y - 0.2, text, width=WIDTH - 0.06 - aside, size=8.5, va="top")
    c.note(aside, 4.34, "loss = ITC + ITM + ITG", weight="bold")

    # Stage 2: queries alone, and what they say to one of two language models.
    trained(0.36, 3.62, 4.74)
    norm_2, blocks_2, (asked,) = former(0.62)
    c.note(0.1, 3.54, "stage 2", weight="bold", size=11)
    c.note(0.1, 3.32, "Queries learn to speak to a language model.", width=0.96, size=8.5, colour=QUIET, va="top")
    for a, b, at in ((norm, norm_2, 1.3), (blocks, blocks_2, x - 0.06)):
        c.arrow((at, a.y), (at, b.y + b.h), dashed=True)
    c.note(x - 0.14, 3.73, "weights go on", size=8.5, ha="right")
    linear = c.box(3.92, asked[0].y - 0.11, 0.74, 0.5, "linear\nD → D_LM", modality="neutral", new=True, tag="", size=9)
    c.arrow(asked[-1], linear)
    left, right, prefix_w = 4.92, WIDTH - 0.08, 0.88
    for y, title, prompt, written, start, tag in (  # tag: where the writer's ends, beside what it writes
        (2.26, "decoder-only, as OPT", (), ("[DEC]", "a", "red", "house"), left, left + 0.76),
        (0.46, "encoder-decoder, as T5", ("a", "red"), ("[DEC]", "house"), 6.74, 7.72),
    ):  # fmt: skip
        c.note(left, y + 1.48, title, weight="bold")
        prefix = _ragged(c, Box(left, y, prefix_w, 0.28), QUERIES, "image")
        c.arrow(linear, prefix[0], start="right", end="left", bend=True, middle=0.6)
        c.note(left, y - 0.11, "prefix", size=8.5)
        text_x = start if prompt else left + prefix_w + GAP
        text = _ragged(c, Box(text_x, y, right - text_x, 0.28), written, "text")
        c.note(text_x, y - 0.11, "text", size=8.5)
        writes = _tagged(c, start, y + 0.47, right - start, 0.36, "decoder" if prompt else "language model",
                         end=tag, modality="causal", frozen=True, new=True)  # fmt: skip
        reads = writes
        if prompt:
            there = Box(left + prefix_w + GAP, y, 0.55, 0.28)
            c.note(there.x, y - 0.11, "prompt", size=8.5)
            reads = _tagged(c, left, writes.y, there.x + there.w - left, writes.h, "encoder", modality="text",
                            frozen=True, new=True)  # fmt: skip
            prefix += _ragged(c, there, prompt, "text")
            c.arrow(reads, writes)
        for token in prefix:
            c.arrow(token, reads)
        following = [c.box(token.x, y + 1.02, token.w, 0.28, word, modality="text", size=SMALLEST)
                     for token, word in zip(text, [*written[1:], "[SEP]"], strict=True)]  # fmt: skip
        for token, word in zip(text, following, strict=True):
            c.arrow(token, writes)
            c.arrow((word.x + word.w / 2, writes.y + writes.h), word)
        out = c.frame(text_x - 0.05, y + 0.97, right - text_x + 0.1, 0.38)
        c.arrow(out, c.loss(left, y + 1.0, 0.62, "LM", h=0.32))
    below = "Gradients pass through the frozen language model to the prefix. Not drawn: the blocks' LayerNorms, "
    c.note(0.1, 0.14, below + "shortcuts. Green: in no earlier lesson.", size=8, colour=QUIET)
    return c.fig


def qformer_block() -> Figure:
    """One block of the Q-Former, post-norm (paper, 3.1, Fig. 2; official code): the queries' stream at the left, the
    words' at the right; a box across both is one module for both."""
    c = Canvas(WIDTH, 7.5)
    left, w, gap = 0.46, 2.3, 1.3
    right, wide = left + w + gap, 2 * w + gap
    notes = left + wide + 0.36
    queries, words = left + w / 2, right + w / 2  # where the streams go up
    sides = ((queries, "left"), (words, "right"))

    def both(y: float, h: float, text: str) -> Box:
        return _tagged(c, left, y, wide, h, text, shared=True)

    # Below the first block: words have positions, queries have none.
    first = both(1.2, 0.28, "LayerNorm: once, below the first block")
    table = c.box(right, 0.66, w, 0.32, "table of words + positions", modality="text", size=9)
    for token in _ragged(c, Box(left, 0.12, w, 0.28), QUERIES, "image", new=4):
        c.arrow(token, first)
    for token in _ragged(c, Box(right, 0.12, w, 0.28), ("[CLS]", "a", "red", "house"), "text"):
        c.arrow(token, table)
    c.arrow(table, (words, first.y))

    # One self-attention for both.
    attention = both(1.96, 0.42, "self-attention with its output layer: the mask says who sees whom")
    norm = both(2.84, 0.28, "LayerNorm")
    for x, side in sides:
        _add_and_norm(c, x, 1.48, attention, norm, leave=1.74, side=side, around=w / 2 + 0.06)

    # The queries alone ask the picture.
    frame = c.frame(left - 0.28, 3.36, w + 0.42, 1.68, new=True)
    cross = c.box(left, 3.74, w, 0.42, "cross-attention:\nqueries ask the picture", modality="image", size=9)
    asked = c.box(left, 4.62, w, 0.28, "LayerNorm", modality="image", size=9.5)
    _add_and_norm(c, queries, 3.12, cross, asked, leave=3.54, side="left", around=w / 2 + 0.06)
    seen = c.box(3.2, 3.74, 0.8, 0.42, "LayerNorm, ln_vision", modality="image", new=True, tag="", size=8.5)
    eye = _tagged(c, 4.2, 3.66, 0.84, 0.58, "image encoder", end=4.78, modality="image", frozen=True)
    c.arrow(_patched(c, 4.58, 4.5, 0.54, _example_picture(), 4), eye)
    c.arrow(eye, seen)
    c.arrow(seen, cross)
    c.note(3.06, 3.5, "keys, values: (B, 1+N, D')", size=8.5)
    c.note(frame.x + frame.w + 0.1, 4.78, "in every second block: 0, 2, 4, …", width=1.5, weight="bold", colour=NEW)
    c.note(words + 0.1, 3.95, "No word asks the picture. What words know of it, queries tell them.", width=1.3,
           size=8.5)  # fmt: skip

    # An FFN for each kind.
    for (x, side), below, kind, what, labels in zip(
        sides, (asked.y + asked.h, norm.y + norm.h), ("image", "text"), ("queries", "words"),
        (QUERIES, ("[CLS]", "a", "red", "house")), strict=True,
    ):  # fmt: skip
        look = {"modality": kind, "new": kind == "image", "tag": "", "size": 9.5}
        ffn = c.box(x - w / 2, 5.44, w, 0.4, f"FFN for {what}, D → 4 D → D", **look)
        last = c.box(x - w / 2, 6.3, w, 0.28, "LayerNorm", **look)
        _add_and_norm(c, x, below, ffn, last, leave=5.24, side=side, around=w / 2 + 0.06)
        for token in _ragged(c, Box(x - w / 2, 6.92, w, 0.28), labels, kind):
            c.arrow((token.x + token.w / 2, last.y + last.h), token)
    for y, text in (
        (0.5, "Queries are learned, the same for every picture, and have no positions."),
        (2.17, "Shared: the same q, k, v, output layer and LayerNorm."),
        (5.64, "Two FFNs, as VLMo's experts (lesson 06), and their LayerNorms."),
        (6.44, "Post-norm: add, then LayerNorm."),
    ):  # fmt: skip
        c.note(notes, y, text, width=WIDTH - 0.06 - notes, size=8.5)
    c.note(notes, 7.06, "Green:\nnot in lesson 07.", size=8.5, colour=NEW)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# Maps of the course

LESSONS = {  # number -> name, what it is, the modality of its colour
    "01": ("ViT", "image encoder", "image"),
    "02": ("ViLT", "single stream", "fused"),
    "03": ("CLIP", "dual encoder", "pair"),
    "04": ("FLIP", "dual encoder", "pair"),
    "05": ("ALBEF", "dual + fusion", "fused"),
    "06": ("VLMo", "one network with experts", "fused"),
    "07": ("BLIP", "understanding + generation", "fused"),
    "08": ("BLIP-2", "frozen parts + Q-Former", "fused"),
}


def course_map(highlight: str | int | None = None) -> Figure:
    """The eight models by architecture, and what each takes from earlier ones.

    `highlight`, a lesson's number or name ("01_vit"), marks it "you are here" and its incoming arrows.
    """
    here = None
    if highlight is not None:
        here = f"{highlight:02d}" if isinstance(highlight, int) else str(highlight)[:2]
        if here not in LESSONS:
            raise ValueError(f"there is no lesson {highlight!r}: choose a number from 1 to 8")
    c = Canvas(WIDTH, 6.2)
    right = WIDTH - 0.1
    for x, y, end, h, title, what in (
        (2.2, 4.7, 4.62, 1.42, "single stream", "one network for both"),
        (4.76, 4.7, right, 1.42, "dual stream", "two networks that look at each other"),
        (2.2, 1.55, right, 3.02, "fusion + dual", "both routes in one model"),
        (2.2, 0.08, right, 1.34, "dual encoder", "two networks, compared at the end"),
    ):
        c.ax.add_patch(Rectangle((x, y), end - x, h, facecolor="#F5F5F5", edgecolor="none", zorder=0))
        c.note(end - 0.1, y + h - 0.15, title, weight="bold", colour=QUIET, ha="right")
        c.note(end - 0.1, y + h - 0.33, what, size=SMALLEST, colour=QUIET, ha="right")
    w, h = 1.45, 0.75
    places = {
        "01": (0.15, 2.25), "02": (2.35, 4.85), "05": (2.35, 1.9), "03": (2.35, 0.25), "06": (4.5, 3.33),
        "07": (4.5, 1.9), "04": (4.5, 0.25), "08": (6.55, 1.9),
    }  # fmt: skip
    boxes = {}
    for number, (x, y) in places.items():
        name, family, modality = LESSONS[number]
        words = f"{number}  {name}\n{family}"
        boxes[number] = c.box(x, y, w, h, words, modality=modality, size=9.5, new=number == here, tag="you are here")
    streams = c.box(4.95, 4.85, 3.0, h, "LXMERT, ViLBERT\nbuilt in lesson 02 to compare", modality="fused", size=9.5)

    def reuse(a: str, b: str, what: str, **route: Any) -> None:
        c.arrow(boxes[a], boxes[b], what, colour=NEW if b == here else QUIET, **route)

    reuse("01", "02", "patches, blocks", start="top", end="left", bend=True, at=(0.2, 0.5), width=0.8)
    reuse("01", "03", "the image tower", start="bottom", end="left", bend=True, at=(0.2, 0.5), width=0.8)
    c.arrow(boxes["02"], streams, "compared", dashed=True)
    reuse("02", "05", "ITM, MLM", at=(0.2, 0.2))
    reuse("03", "05", "contrast (ITC)", at=(0.2, 0.2))
    reuse("03", "04", "fewer patches", width=0.7)
    reuse("02", "06", "one stream", start="bottom", end="left", bend=True, at=(0.85, 0.75))
    reuse("05", "06", "hard negatives", start="right", end="left", bend=True, at=(0.75, 0.25), side="right", width=0.7)
    reuse("05", "07", "ITC, ITM", at=(0.4, 0.4), side="below")
    reuse("07", "08", "ITC, ITM, LM", side="above", width=0.55)
    return c.fig


def family_map() -> Figure:
    """Four families by how large their parts are (ViLT, Fig. 2): the higher a box, the more it computes."""
    c = Canvas(WIDTH, 3.85)
    panels = (  # heights of visual embedder, textual embedder and interaction, in inches
        ("(a)  VE > TE > MI", 1.25, 0.8, 0.4, "VSE++, SCAN", ""),
        ("(b)  VE = TE > MI", 1.05, 1.05, 0.4, "CLIP, FLIP", "lessons 03, 04"),
        ("(c)  VE > MI > TE", 1.25, 0.4, 0.8, "ViLBERT, UNITER, LXMERT", ""),
        ("(d)  MI > VE = TE", 0.4, 0.4, 1.25, "ViLT", "lesson 02"),
    )
    w, floor = 0.88, 0.95
    for k, (title, ve, te, mi, names, lessons) in enumerate(panels):
        x = 0.12 + k * 2.06
        c.note(x + w + 0.05, 3.68, title, weight="bold", size=10, ha="center")
        ceiling = floor + max(ve, te) + 0.3
        image = c.box(x, floor, w, ve, "visual embedder", modality="image", size=9)
        text = c.box(x + w + 0.1, floor, w, te, "textual embedder", modality="text", size=9)
        both = c.box(x, ceiling, 2 * w + 0.1, mi, "modality interaction", modality="fused", size=9)
        for part in (image, text):
            c.arrow(part, both)
        c.note(x + w + 0.05, 0.75, names, size=8.5, ha="center")
        if lessons:
            c.note(x + w + 0.05, 0.56, lessons, size=8.5, ha="center", weight="bold")
    later = (
        "ALBEF, VLMo, BLIP and BLIP-2 came after this figure: large embedders and a deep interaction, with a second, "
        "dual route for search."
    )
    c.note(0.12, 0.22, later, width=WIDTH - 0.24, colour=QUIET)
    return c.fig


# ---------------------------------------------------------------------------------------------------------------------
# Attention masks


def attention_mask(
    mask: Any, row_labels: Sequence[str], col_labels: Sequence[str] | None = None, *,
    groups: Sequence[str] | None = None, col_groups: Sequence[str] | None = None, title: str | None = None,
) -> Figure:  # fmt: skip
    """Who may look at whom: mask (T, S) boolean, True = the row's token may look at the column's.

    `groups` gives the modality of each row ("image", "text", "fused", "neutral"), `col_groups` of each column; in
    self-attention, where T = S, labels and groups of the columns are those of the rows. A cell has the colour of the
    modality it reads, and purple where it crosses from image to text or back.
    """
    return _masks({"": mask}, row_labels, col_labels, groups=groups, col_groups=col_groups, title=title)


def block_masks(
    masks: Mapping[str, Any], row_labels: Sequence[str], groups: Sequence[str] | None = None, *,
    title: str | None = None,
) -> Figure:  # fmt: skip
    """Several masks over the same tokens side by side, for instance those of a single stream, of cross-attention and of
    two encoders: the name of each -> (T, T) boolean, True = the row's token may look at the column's.

    `row_labels` and `groups` have one entry a token, as in `attention_mask`.
    """
    return _masks(masks, row_labels, groups=groups, title=title)


def qformer_masks(masks: Mapping[str, Any], queries: int, words: Sequence[str], *, title: str | None = None) -> Figure:
    """BLIP-2's masks (paper, Fig. 2) side by side: the name of each -> (T, T) boolean, True = the row's token may look
    at the column's. T = Q+L: first the `queries`, then the `words`, one for each token."""
    T = queries + len(words)
    for name, mask in masks.items():
        if np.shape(mask) != (T, T):
            raise ValueError(f"masks[{name!r}] has the shape {tuple(np.shape(mask))}: {queries} queries and "
                             f"{len(words)} words need ({T}, {T})")  # fmt: skip
    labels = [f"query {i + 1}" for i in range(queries)] + [str(word) for word in words]
    return _masks(masks, labels, groups=["image"] * queries + ["text"] * len(words), title=title,
                  words={"image": "looks at queries", "text": "looks at words", "fused": "looks across"})  # fmt: skip


def _masks(
    masks: Mapping[str, Any], row_labels: Sequence[str], col_labels: Sequence[str] | None = None, *,
    groups: Sequence[str] | None = None, col_groups: Sequence[str] | None = None, title: str | None = None,
    words: Mapping[str, str] | None = None,
) -> Figure:  # fmt: skip
    """Masks (T, S) of the same tokens in a row, each under its name. `words`: what the legend calls a modality."""
    if not masks:
        raise ValueError("there is nothing to draw: masks is empty")
    checked: dict[str, np.ndarray] = {}
    for key, mask in masks.items():
        name = f"masks[{key!r}]" if key else "mask"
        m = checked[key] = array(mask, name, ndim=2)
        if m.dtype != bool:
            raise ValueError(f"{name} must be boolean (True = may look), not {m.dtype}: write mask.bool() or mask == 0")
        T, S = next(iter(checked.values())).shape
        if m.shape != (T, S):
            raise ValueError(f"{name} has the shape {m.shape}, the first ({T}, {S}): give masks of the same tokens")
    col_labels = row_labels if col_labels is None else col_labels
    col_groups = groups if col_groups is None and T == S else col_groups
    for name, values, n in (("row_labels", row_labels, T), ("col_labels", col_labels, S),
                            ("groups", groups, T), ("col_groups", col_groups, S)):  # fmt: skip
        if values is not None and len(values) != n:
            raise ValueError(f"{name} has {len(values)} entries for a mask of shape {(T, S)}: give {n}")
    if (groups is None) != (col_groups is None):
        raise ValueError("rows or columns have no modalities: give both groups and col_groups, or neither")
    rows, columns = groups or ["neutral"] * T, col_groups or ["neutral"] * S
    if unknown := [g for g in (*rows, *columns) if g not in STRONG]:
        raise ValueError(f"there is no modality {unknown[0]!r}: choose one of {', '.join(STRONG)}")

    row_labels, col_labels = [str(label) for label in row_labels], [str(label) for label in col_labels]
    words = {"image": "looks at image", "text": "looks at text", "fused": "crosses over", "neutral": "may look",
             **(words or {})}  # fmt: skip
    used = {_reads(rows[r], columns[k]) for m in checked.values() for r, k in zip(*np.nonzero(m), strict=True)}
    legend = [(STRONG[kind], words[kind]) for kind in STRONG if kind in used]
    legend += [("white", "may not")] * (not all(m.all() for m in checked.values()))

    size, between, n = 9.0, 0.3, len(checked)
    beside = 0.5 + max(text_width(label, size) for label in row_labels)
    cell = min(0.4, max(5.8 / T, 0.1), (WIDTH - beside - 0.15 - (n - 1) * between) / (n * S))
    turned = any(text_width(label, size) > cell - 0.04 for label in col_labels)
    above = 0.5 + (max(text_width(label, size) for label in col_labels) if turned else 0.1)
    panel = max(S * cell, 0.7)
    width = round(beside + n * panel + (n - 1) * between + 0.15, 6)
    width = max(width, 0.1 + sum(text_width(word, size) + 0.4 for _, word in legend))
    heading = wrap(title, width - 0.16, 11, "bold") if title else ""
    head = text_height(heading.count("\n") + 1, 11) + 0.1 if title else 0.05
    names = [wrap(key, panel + between - 0.1, 10, "bold") for key in checked]
    named = text_height(max(name.count("\n") + 1 for name in names), 10) + 0.05 if any(names) else 0.0
    foot = 0.36
    c = Canvas(width, foot + T * cell + above + named + head)
    top = foot + T * cell
    for i, (name, m) in enumerate(zip(names, checked.values(), strict=True)):
        left = beside + i * (panel + between)
        _cells(c, m, rows, columns, left, top, cell)
        c.note(left, top + above + named - 0.03, name, size=10, weight="bold", va="top")
        step = 1 + int(0.15 / cell)  # rather leave labels out than print one over another
        for r in range(0, T if i == 0 else 0, step):
            c.ax.text(left - 0.07, top - (r + 0.5) * cell, row_labels[r], ha="right", va="center", fontsize=size,
                      color=EDGES[rows[r]], parse_math=False)  # fmt: skip
        for k in range(0, S, step):
            c.ax.text(left + (k + 0.5) * cell, top + 0.06, col_labels[k], ha="center", va="bottom", fontsize=size,
                      rotation=90 if turned else 0, color=EDGES[columns[k]], parse_math=False)  # fmt: skip
    c.ax.text(0.12, (foot + top) / 2, "who looks", rotation=90, ha="center", va="center", fontsize=9, weight="bold")
    c.note(beside, top + above - 0.12, "at whom", weight="bold")
    c.note(0.08, c.height - 0.06, heading, size=11, weight="bold", va="top")
    x = 0.08
    for colour, word in legend:
        c.ax.add_patch(Rectangle((x, 0.08), 0.16, 0.16, facecolor=colour, edgecolor="#C8C8C8", linewidth=0.7))
        c.note(x + 0.22, 0.16, word)
        x += text_width(word, size) + 0.4
    return c.fig


def _reads(row: str, column: str) -> str:
    """The colour of a cell: what is read, or "fused" where image and text meet."""
    return "fused" if {row, column} == {"image", "text"} else column


def _cells(
    c: Canvas, m: np.ndarray, rows: Sequence[str], columns: Sequence[str], left: float, top: float, cell: float
) -> None:
    """Draw one mask (T, S), whose upper left corner is at (left, top), in square cells of `cell` inches."""
    T, S = m.shape
    right, foot = left + S * cell, top - T * cell
    cells = [STRONG[_reads(rows[r], columns[k])] if m[r, k] else "white" for r in range(T) for k in range(S)]
    c.ax.imshow(to_rgba_array(cells).reshape(T, S, 4), extent=(left, right, foot, top), aspect="auto",
                interpolation="nearest")  # fmt: skip
    c.ax.set(xlim=(0, c.width), ylim=(0, c.height))
    c.ax.vlines(left + np.arange(S + 1) * cell, foot, top, color="#C8C8C8", linewidth=0.7)
    c.ax.hlines(foot + np.arange(T + 1) * cell, left, right, color="#C8C8C8", linewidth=0.7)
    if cell >= 0.2:  # a second sign beside the colour
        r, k = np.nonzero(m)
        c.ax.plot(left + (k + 0.5) * cell, top - (r + 0.5) * cell, "o", color="white", markersize=14 * cell, zorder=2.5)
    for r in range(1, T):  # a strong line where the modality changes
        if rows[r] != rows[r - 1]:
            c.ax.plot([left, right], [top - r * cell] * 2, color=INK, linewidth=1.6, zorder=3)
    for k in range(1, S):
        if columns[k] != columns[k - 1]:
            c.ax.plot([left + k * cell] * 2, [foot, top], color=INK, linewidth=1.6, zorder=3)
