"""Shared by the tests of the lessons' recipes: a few pages in the place of many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import pytest

from minivlp.data import load_pairs, to_tensors


@contextmanager
def few_pages(tmp_path_factory: pytest.TempPathFactory, *lessons: ModuleType) -> Iterator[None]:
    """Within: `pairs` and `single_things` of the lessons, where they have them, draw 400 (or 40) pages of their split,
    into a cache of their own."""

    @cache
    def pairs(split: str, n: int) -> object:
        return to_tensors(load_pairs("picturebook", split, tier="normal", n=min(n, 400 if split == "train" else 40),
                                     progress=False))  # fmt: skip

    @cache
    def single_things(split: str, *, n: int = 1000, tier: str = "easy") -> object:
        drawn = 800 if split == "train" else 40
        data = to_tensors(load_pairs("picturebook", split, tier="easy", n=drawn, progress=False))
        return data.subset([i for i, scene in enumerate(data.scenes) if len(scene.things) == 1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIVLP_CACHE", str(tmp_path_factory.mktemp("cache")))
        for lesson in lessons:
            for function in (pairs, single_things):
                if hasattr(lesson, function.__name__):
                    patch.setattr(lesson, function.__name__, function)
        yield
