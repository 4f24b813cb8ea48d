"""Shared by the tests of the lessons' recipes: a few pages in the place of many, and a model that knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from minivlp.data import load_pairs, to_tensors
from minivlp.lessons.vilt import words
from minivlp.train import History


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


def flat(recipe: object) -> dict[str, object]:
    """All that a recipe fixes, that of its model by names that begin with "model."."""
    own = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "model"}
    return own | {f"model.{f.name}": getattr(recipe.model, f.name) for f in fields(recipe.model)}


def changed(recipe: object, base: object) -> dict[str, object]:
    """All that is different in a recipe, and what it is."""
    return {name: value for name, value in flat(recipe).items() if value != flat(base)[name]}


def fewer(function: Callable, n: int = 40, **fixed: int) -> Callable:
    """The function with `n` pages, whatever it is asked for."""
    return lambda *args, **options: function(*args, **options | {"n": n} | fixed)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights and buffers as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Fitted(list):
    """In the place of `fit`: nothing is trained, but listed, and the first trained weight says how many came before.
    `stop_next` ends the next one as if by hand."""

    stop_next = False

    def __call__(self, model: nn.Module, batches: Callable, loss: Callable, **how: object) -> History:
        self.append(SimpleNamespace(model=model, start=weights(model), batches=batches, loss=loss, **how))
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = 100 + len(self)
        stopped, self.stop_next = self.stop_next, False
        return History(stopped="by hand" if stopped else "")


def drawn_by_hand(chance: np.ndarray, says: Sequence[int], noise: Sequence[float]) -> list[int]:
    """Wrong partners: who is hit by `noise` if all who say something else lie on a line, each as long as its chance."""
    found = []
    for i, point in enumerate(noise):
        others = [j for j in range(len(says)) if says[j] != says[i]]
        edges = np.cumsum([chance[i, j] for j in others])
        found.append(others[int((edges <= point * edges[-1]).sum())])
    return found


class Oracle(nn.Module):
    """Knows its pictures and texts by heart: ITC's similarity is `similarity` (N, M), ITM's log odds are `odds`."""

    def __init__(self, images: Tensor, texts: Sequence[str], similarity: Tensor, odds: Tensor) -> None:
        super().__init__()
        self.similarity, self.odds = similarity.float(), odds.float()
        self.pages = {bytes(image.numpy().tobytes()): i for i, image in enumerate(images)}
        self.sentences = {tuple(words().encode(text)): i for i, text in enumerate(texts)}
        assert len(self.pages) == len(images) and len(self.sentences) == len(texts)
        self.temp = nn.Parameter(torch.tensor(1.0))
        self.asked: list[tuple[int, int]] = []

    def page(self, images: Tensor) -> Tensor:
        return torch.tensor([self.pages[image.numpy().tobytes()] for image in images])

    def sentence(self, ids: Tensor) -> Tensor:
        return torch.tensor([self.sentences[tuple(i for i in row if i)] for row in ids.tolist()])

    def look(self, images: Tensor) -> Tensor:
        return self.page(images)[:, None, None].float()

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        assert torch.equal(mask, ids != 0)
        return self.sentence(ids)[:, None, None].expand(*ids.shape, 1).float()

    def encode_image(self, images: Tensor) -> Tensor:
        return self.similarity[self.page(images)]

    def encode_text(self, ids: Tensor) -> Tensor:
        return torch.eye(self.similarity.shape[1])[self.sentence(ids)]

    def match(self, states: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        assert not self.training and states.shape[:2] == mask.shape and mask[:, 0].all()
        i, t = image[:, 0, 0].long(), states[:, 0, 0].long()
        self.asked += zip(i.tolist(), t.tolist(), strict=True)
        odds = self.odds[i, t]
        return torch.stack([0.7 * odds, 1.7 * odds], dim=1)  # whose difference are the odds


def repeats_to_the_last_digit(itm_loss: Callable) -> bool:
    """Is the gradient of the states of pictures and texts the same each time, although two threads sum it up?"""
    torch.manual_seed(0)
    image, text = (torch.randn(32, length, 128, requires_grad=True) for length in (17, 20))
    mask, other = torch.ones(32, 20, dtype=torch.bool), torch.randint(0, 4, (2, 32))  # few are chosen, and often
    weight = torch.randn(2, 96, 128)

    def match(words: Tensor, mask: Tensor, pictures: Tensor) -> Tensor:
        read, seen = (weight[i] * states.mean(dim=1) for i, states in enumerate((words, pictures)))
        return torch.stack([read.sum(dim=1), (read * seen).sum(dim=1)], dim=1)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad(itm_loss(SimpleNamespace(match=match), image, text, mask, *other), (image, text))
                 for _ in range(100)]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for again in found for a, b in zip(again, found[0], strict=True))
