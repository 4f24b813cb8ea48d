"""Shared by the tests of the models from CLIP on: inputs, and weights that hide nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

B, L = 3, 7  # texts, and their tokens with padding
EOT = 3
ENDS = torch.tensor([6, 3, 2])  # where the texts end


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def shake(model: nn.Module, std: float = 0.2, *, but: str = "") -> nn.Module:
    """The model with noise on every parameter, so that no zero bias and no unit gain can hide a mistake; only one whose
    last name is `but` stays."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] != but:
                parameter.add_(std * torch.randn_like(parameter))
    return model.eval()


def differs(a: Tensor, b: Tensor, least: float = 1e-4) -> list[bool]:
    """Which entries of a batch differ."""
    return ((a - b).abs().flatten(1).amax(1) > least).tolist()


def apart(a: Tensor, b: Tensor, least: float = 0.01) -> bool:
    """Whether no entry of a batch is alike."""
    return all(differs(a, b, least))


def touched(model: nn.Module) -> set[str]:
    """The names of the parameters that got a gradient, tied ones once."""
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-7}


def pictures(count: int = B, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size) * 2 - 1


def texts() -> Tensor:
    """Ids of three texts of 7, 4 and 3 tokens: 2, words from 4 up, the end 3, and 0 as padding. Nearly all ids are
    larger than that of the end, as in our vocabulary."""
    ids, places = torch.randint(4, 30, (B, L)), torch.arange(L)
    ids = ids.masked_fill(places > ENDS[:, None], 0).masked_fill(places == ENDS[:, None], EOT)
    ids[:, 0] = 2
    return ids


def digest(module: nn.Module) -> str:
    """A hash of all weights and buffers: what is frozen keeps it to the last bit."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    return found.hexdigest()


def spoken(speaker: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """What a speaker thinks of the next token after each of ids (B, T): (B, T, V)."""
    return torch.stack([speaker(ids[:, t]) for t in range(ids.shape[1])], dim=1)


class Anew:
    """A decoder for `minivlp.generate` that keeps nothing but the texts, and reads them from the beginning at each
    step: `write` gives the scores of ids (B, T), (B, T, V)."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        self.write, self.ids = write, None

    def __call__(self, tokens: Tensor) -> Tensor:
        self.ids = tokens[:, None] if self.ids is None else torch.cat([self.ids, tokens[:, None]], dim=1)
        return self.write(self.ids)[:, -1]

    def reorder(self, rows: Tensor) -> None:
        self.ids = self.ids[rows]
