"""minivlp: vision-language models from ViT to BLIP-2, each written from scratch, trained in a minute and verified."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import torch

__version__ = "0.1.0"

CACHE = Path(os.environ.get("MINIVLP_CACHE") or Path.home() / ".cache" / "minivlp")  # drawn pages, kept models
DATA = Path(__file__).resolve().parent.parent / "data"  # recorded runs and reference checkpoints of the clone


def pick_device() -> torch.device:
    """CUDA if there is one, else the CPU. Apple's MPS only with MINIVLP_MPS=1 and after a self-test against the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("MINIVLP_MPS") == "1" and torch.backends.mps.is_available():
        from minivlp.train import self_test

        difference = self_test(torch.device("mps"))
        print(f"MPS self-test: gradients differ from the CPU's by {difference:.1e}", end="; ")
        print("using MPS" if difference < 1e-3 else "too much, using the CPU")
        return torch.device("mps" if difference < 1e-3 else "cpu")
    return torch.device("cpu")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), so that a run can be made again on the same machine."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def setup(seed: int = 0) -> torch.device:
    """What each notebook calls first: pick the device, seed every generator, set the plot style."""
    from minivlp.plots import use_style

    seed_everything(seed)
    use_style()
    device = pick_device()
    print(f"minivlp {__version__} on {device.type}, seed {seed}")
    return device
