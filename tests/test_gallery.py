"""The README's strip: what the kept weights of lessons 07 and 08 write, and that it is drawn from them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from minivlp import DATA
from minivlp.lessons import gallery

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def written() -> dict[str, list[str]]:
    return gallery.captions(3)


def test_both_models_write_about_each_page(written):
    assert list(written) == ["BLIP", "BLIP-2"]
    for texts in written.values():
        assert len(texts) == 3 and all(len(text.split()) > 2 for text in texts) and len(set(texts)) > 1


def test_each_caption_is_drawn_with_its_verdict(written, monkeypatch):
    drawn = {}
    monkeypatch.setattr(gallery, "captions", lambda n, own: {"BLIP": ["a yellow ball"], "BLIP-2": ["a yellow cat"]})
    monkeypatch.setattr(
        gallery.plots, "captioned_pictures", lambda images, rows, marks: drawn.update(rows=rows, n=len(images))
    )
    gallery.gallery(1)
    assert drawn == {"n": 1, "rows": [[("BLIP", "a yellow ball", True), ("BLIP-2", "a yellow cat", False)]]}


def test_ones_own_weights_are_asked_for_only_with_a_file(monkeypatch, tmp_path):
    asked = []

    class Figure:
        def savefig(self, path, dpi):
            asked[-1] = (asked[-1], str(path))

    monkeypatch.setattr(gallery, "gallery", lambda *, own: asked.append(own) or Figure())
    gallery.main([])
    gallery.main([str(tmp_path / "mine.png")])
    assert asked == [(False, str(DATA / "captions.png")), (True, str(tmp_path / "mine.png"))]


def test_the_strip_is_there_and_small():
    path = DATA / "captions.png"
    assert path.stat().st_size < 300_000
    with Image.open(path) as picture:
        assert picture.width > 800
