"""The small residual network: its shapes, its start, its shortcuts, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from minivlp.layers import count_parameters, to_float_pixels
from minivlp.models.cnn import ResidualBlock, ResNetConfig, SmallResNet
from minivlp.models.vit import ViT, ViTConfig

torch.set_num_threads(1)
SMALL = ResNetConfig(widths=(4, 6), blocks=2, num_classes=5)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_it_has_as_many_parameters_as_the_small_vit():
    cnn, vit = count_parameters(SmallResNet(ResNetConfig())), count_parameters(ViT(ViTConfig()))
    assert abs(cnn / vit - 1) < 0.02


@pytest.mark.parametrize(("side", "left"), [(64, 4), (96, 6), (32, 2)])
def test_shapes_at_any_resolution(side, left):
    scores, named = SmallResNet(ResNetConfig(num_classes=7)).eval()(torch.randn(2, 3, side, side))
    assert scores.shape == (2, 7)
    assert named["map"].shape == (2, 144, left, left)  # stem / 4, then two halvings
    torch.testing.assert_close(named["pooled"], named["map"].mean((2, 3)))


def test_the_depth_is_as_configured():
    model = SmallResNet(ResNetConfig(widths=(4, 6, 8), blocks=3))
    assert len(model.stages) == 9
    halving = [i for i, block in enumerate(model.stages) if block.conv1.stride == (2, 2)]
    assert halving == [3, 6]


def test_the_first_loss_is_ln_k():
    model = SmallResNet(SMALL)
    scores, _ = model(torch.randn(4, 3, 16, 16))
    assert F.cross_entropy(scores, torch.arange(4)).item() == pytest.approx(math.log(5))


def test_stored_pixels_and_floats_give_the_same_scores():
    model = SmallResNet(SMALL).eval()
    torch.nn.init.normal_(model.head.weight)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    scores = model(images)[0]
    torch.testing.assert_close(scores, model(to_float_pixels(images))[0], rtol=0, atol=0)
    assert not torch.allclose(scores[0], scores[1])


def test_a_block_adds_to_its_input():
    block = ResidualBlock(4, 4, 1).eval()
    torch.nn.init.zeros_(block.norm2.weight)  # the two convolutions say nothing
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(block(x), F.relu(x), rtol=0, atol=0)
    widening = ResidualBlock(4, 6, 2).eval()
    torch.nn.init.zeros_(widening.norm2.weight)
    torch.testing.assert_close(widening(x), F.relu(F.conv2d(x, widening.shortcut.weight, stride=2)))


def test_a_block_by_hand():
    block, x = ResidualBlock(3, 3, 1).train(), torch.randn(4, 3, 5, 5)

    def normalise(y: torch.Tensor) -> torch.Tensor:
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, correction=0)
        return (y - mean) / (variance + 1e-5).sqrt()

    inner = F.relu(normalise(F.conv2d(x, block.conv1.weight, padding=1)))
    expected = F.relu(x + normalise(F.conv2d(inner, block.conv2.weight, padding=1)))
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_and_a_batch_can_be_over_fitted():
    model = SmallResNet(ResNetConfig(widths=(16, 24), blocks=1, num_classes=5))
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images)[0], labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
