"""What the tests of parity with official multimodal classes have in common (`test_parity_vilt.py`, ...)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minivlp.pretrained import CheckpointError, from_hf

TOLERANCE = 1e-5


def randomise(model):
    """Every parameter drawn anew, so that nothing stays zero, one or equal to its neighbour by chance.

    Matrices get std 0.1, so that attention is far from uniform in a model this narrow.
    """
    generator = torch.Generator().manual_seed(0)
    norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.LayerNorm)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = id(parameter) in norms
        parameter.data = 1 + 0.1 * noise if is_norm else noise * (0.1 if parameter.ndim > 1 else 0.02)
    return model.eval()


def saved(theirs, folder: Path):
    """Our model, by way of the files that the official one writes."""
    theirs.save_pretrained(folder)
    return from_hf(folder)


def random_pictures(side: int, channels: int = 3, *, seed: int = 0, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side, generator=generator).clamp(-1, 1)


def random_texts(
    length: int, lengths: tuple[int, ...], *, first: int, end: int, pad: int = 0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """ids (B, `length`) of texts of these `lengths`, from `first` to `end` and then `pad`, and the mask."""
    ids = torch.randint(7, 40, (len(lengths), length), generator=torch.Generator().manual_seed(seed))
    position, last = torch.arange(length), torch.tensor(lengths)[:, None] - 1
    ids = ids.masked_fill(position == last, end).masked_fill(position > last, pad)
    ids[:, 0] = first
    return ids, position <= last


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def assert_differ(one: Tensor, other: Tensor) -> None:
    """No item of the batch stays as it was: (B, ...) twice."""
    assert ((one - other).abs().flatten(1).amax(dim=1) > 100 * TOLERANCE).all()


def edit_file(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Set tensors of a saved model, or with None take them out."""
    weights = load_file(folder / "model.safetensors") | changes
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(theirs, folder: Path, changes: dict[str, Tensor | None]) -> None:
    theirs.save_pretrained(folder)
    edit_file(folder, changes)


def edit_config(folder: Path, *part: str, **changes) -> None:
    """Set keys of config.json, or of a `part` of it: edit_config(folder, "text_config", hidden_size=3)."""
    file = folder / "config.json"
    config = edited = json.loads(file.read_text())
    for key in part:
        edited = edited[key]
    edited.update(changes)
    file.write_text(json.dumps(config))


def message(folder: Path, **options) -> str:
    """The one-line CheckpointError that `from_hf` must raise."""
    with pytest.raises(CheckpointError) as caught:
        from_hf(folder, **options)
    text = str(caught.value)
    assert "\n" not in text and ":" in text and 20 < len(text) < 500, text
    return text
