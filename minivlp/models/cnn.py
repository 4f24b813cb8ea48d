"""A small residual network (He et al. 2016, arXiv:1512.03385): what ViT is measured against, and an image tower."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import to_float_pixels


@dataclass(frozen=True)
class ResNetConfig:
    """Shape of a `SmallResNet`. The defaults have as many parameters as the course's small ViT, within 2 %."""

    channels: int = 3
    widths: tuple[int, ...] = (36, 72, 144)  # channels of each stage; every stage after the first halves the sides
    blocks: int = 2  # residual blocks a stage
    num_classes: int = 12


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut: (B, C, H, W) -> (B, C', H/stride, W/stride)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SmallResNet(nn.Module):
    """4x4 stem with stride 4 -> stages of residual blocks -> average over the picture -> linear head."""

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__()
        self.config = c = config
        self.stem = nn.Conv2d(c.channels, c.widths[0], 4, 4)
        inputs = (c.widths[0], *c.widths)
        self.stages = nn.Sequential(*(
            ResidualBlock(inputs[i] if b == 0 else width, width, 2 if b == 0 and i > 0 else 1)
            for i, width in enumerate(c.widths) for b in range(c.blocks)
        ))  # fmt: skip
        self.head = nn.Linear(c.widths[-1], c.num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """images (B, C, H, W) -> class scores (B, K), {"pooled": (B, D), "map": the last feature map (B, D, h, w)}."""
        features = self.stages(self.stem(to_float_pixels(images)))
        pooled = features.mean(dim=(2, 3))
        return self.head(pooled), {"pooled": pooled, "map": features}
