"""What the learner's own models write about the first pages of the test split, drawn for the README.

    python -m minivlp.lessons.gallery            with the course's reference weights: writes data/captions.png
    python -m minivlp.lessons.gallery mine.png   with the weights that lessons 07 and 08 kept on this machine
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from matplotlib.figure import Figure

from minivlp import DATA, plots
from minivlp.data.picturebook.understand import understand
from minivlp.data.picturebook.web import contradicts
from minivlp.lessons import blip as lesson07
from minivlp.lessons import blip2 as lesson08
from minivlp.lessons.vilt import pairs
from minivlp.train import trained


def captions(n: int = 6, *, own: bool = False) -> dict[str, list[str]]:
    """BLIP's and BLIP-2's captions of the first `n` test pages, by beam search; by the weights kept here if `own`."""
    models = {
        "BLIP": trained("blip", lesson07.build(lesson07.MAIN.model), own=own),
        "BLIP-2": trained("blip2", lesson08.build(lesson08.MAIN.model), own=own),
    }
    images = pairs("test", 1000).images[:n]
    return {name: lesson07.write(model, images, "beam") for name, model in models.items()}


def gallery(n: int = 6, *, own: bool = False) -> Figure:
    """The pages with both captions, each marked false where some fact that it says contradicts the page."""
    data, written = pairs("test", 1000), captions(n, own=own)
    rows = [[(name, texts[i], not contradicts(understand(texts[i]), data.scenes[i])) for name, texts in written.items()]
            for i in range(n)]  # fmt: skip
    return plots.captioned_pictures(data.images[:n], rows, marks=("true", "false"))


def main(arguments: Sequence[str] | None = None) -> None:
    files = list(sys.argv[1:] if arguments is None else arguments)
    plots.use_style()
    path = files[0] if files else DATA / "captions.png"
    gallery(own=bool(files)).savefig(path, dpi=110)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
