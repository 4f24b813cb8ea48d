"""The dual-stream layers: LXMERT's beside transformers' own, ViLBERT's beside its equations, and who reads whom."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from minivlp.layers import MLP, Attention, Block, count_parameters
from minivlp.models.dual_stream import CoAttentionLayer, CrossAttention, LXMERTLayer

torch.set_num_threads(1)

B, L, S, D, HEADS = 2, 5, 7, 16, 4
IMAGE_WIDTH = 24  # ViLBERT's streams have different widths


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def shaken(module: nn.Module, std: float = 0.2) -> nn.Module:
    """The module with noise on every parameter, so that no zero bias and no unit scale can hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module.eval()


def lxmert() -> tuple[LXMERTLayer, Tensor, Tensor]:
    return shaken(LXMERTLayer(D, HEADS)), torch.randn(B, L, D), torch.randn(B, S, D)


def co_attention() -> tuple[CoAttentionLayer, Tensor, Tensor]:
    return shaken(CoAttentionLayer(D, IMAGE_WIDTH, HEADS)), torch.randn(B, L, D), torch.randn(B, S, IMAGE_WIDTH)


BOTH = pytest.mark.parametrize("make", [lxmert, co_attention])


def padding() -> tuple[Tensor, Tensor]:
    """Key masks (B, L) and (B, S): the second pair has two padded tokens in each stream."""
    text, image = torch.ones(B, L, dtype=torch.bool), torch.ones(B, S, dtype=torch.bool)
    text[1, 3:], image[1, 5:] = False, False
    return text, image


# --- LXMERT ----------------------------------------------------------------------------------------------------------


def copy_modules(*pairs: tuple[nn.Module, nn.Module]) -> None:
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict())


def copy_attention(ours: Attention, theirs: nn.Module, output: nn.Module) -> None:
    copy_modules((ours.q, theirs.query), (ours.proj, output.dense))
    for kind in ("weight", "bias"):
        joined = torch.cat([getattr(theirs.key, kind), getattr(theirs.value, kind)])
        getattr(ours.kv, kind).data.copy_(joined)


def copy_block(ours: Block, attention: nn.Module, inter: nn.Module, output: nn.Module) -> None:
    copy_attention(ours.attn, attention.self, attention.output)
    copy_modules(
        (ours.norm1, attention.output.LayerNorm), (ours.mlp.fc1, inter.dense), (ours.mlp.fc2, output.dense),
        (ours.norm2, output.LayerNorm),
    )  # fmt: skip


@pytest.fixture
def reference():
    """The official layer, shaken, and ours with its weights."""
    modeling = pytest.importorskip("transformers.models.lxmert.modeling_lxmert")
    config = modeling.LxmertConfig(hidden_size=D, num_attention_heads=HEADS, intermediate_size=4 * D)
    theirs, ours = shaken(modeling.LxmertXLayer(config)), LXMERTLayer(D, HEADS).eval()
    shared = theirs.visual_attention
    copy_attention(ours.cross.attn, shared.att, shared.output)
    copy_modules((ours.cross.norm, shared.output.LayerNorm))
    copy_block(ours.text_block, theirs.lang_self_att, theirs.lang_inter, theirs.lang_output)
    copy_block(ours.image_block, theirs.visn_self_att, theirs.visn_inter, theirs.visn_output)
    return ours, theirs


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_lxmert_equals_transformers(reference, masked):
    ours, theirs = reference
    text, image = torch.randn(B, L, D), torch.randn(B, S, D)
    masks = padding() if masked else (None, None)
    biases = [None if m is None else (~m)[:, None, None, :] * -1e9 for m in masks]
    new_text, new_image, probabilities = theirs(text, biases[0], image, biases[1], output_attentions=True)
    got_text, got_image, named = ours(text, image, text_mask=masks[0], image_mask=masks[1], need_weights=True)
    for got, expected in ((got_text, new_text), (got_image, new_image), (named["text_to_image"], probabilities)):
        close(got, expected)
    assert count_parameters(ours) == count_parameters(theirs)
    # The comparison means something: the answer depends on both inputs, and on the masks.
    for other in (ours(text.flip(0), image), ours(text, image.flip(0))):
        assert min((other[0] - new_text).abs().max(), (other[1] - new_image).abs().max()) > 0.01
    if masked:
        assert (ours(text, image)[0] - new_text)[1].abs().max() > 0.01


@torch.no_grad()
def test_lxmert_is_its_equations():
    layer, text, image = lxmert()
    t = layer.cross.norm(text + layer.cross.attn(text, image)[0])
    i = layer.cross.norm(image + layer.cross.attn(image, text)[0])
    expected = layer.text_block(t)[0], layer.image_block(i)[0]
    got = layer(text, image)[:2]
    close(got[0], expected[0])
    close(got[1], expected[1])
    # Not these: one direction after the other, self-attention first, each stream with the other's block.
    late = layer.image_block(layer.cross(image, t)[0])[0]
    first_text, first_image = layer.text_block(text)[0], layer.image_block(image)[0]
    self_first = layer.cross(first_text, first_image)[0], layer.cross(first_image, first_text)[0]
    swapped = layer.image_block(t)[0], layer.text_block(i)[0]
    assert (late - got[1]).abs().max() > 0.01
    for wrong in (self_first, swapped):
        assert min((a - b).abs().max() for a, b in zip(wrong, got, strict=True)) > 0.01


def test_lxmert_has_one_cross_attention_for_both_directions():
    layer, text, image = lxmert()
    calls = []
    layer.cross.attn.register_forward_hook(lambda module, inputs, _: calls.append(inputs))
    layer(text, image)
    assert len(calls) == 2  # the same module twice, each time with the old states
    assert calls[0][0] is text and calls[0][1] is image and calls[1][0] is image and calls[1][1] is text
    cross = 4 * (D * D + D) + 2 * D  # q, k, v, output; LayerNorm
    block = cross + (4 * D * D + 4 * D) + (4 * D * D + D) + 2 * D
    assert count_parameters(layer) == cross + 2 * block


# --- cross-attention alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_cross_attention_takes_what_was_kept_of_the_context(masked):
    """The same numbers, when keys and values of the context come ready."""
    cross = shaken(CrossAttention(D, HEADS, context_width=IMAGE_WIDTH))
    x, image = torch.randn(B, L, D), torch.randn(B, S, IMAGE_WIDTH)
    mask = padding()[1] if masked else None
    expected, weights = cross(x, image, mask=mask, need_weights=True)
    kept = cross.attn.keys_values(image)
    got, named = cross(x, kept, mask=mask, need_weights=True)
    close(got, expected)
    close(named, weights)
    close(cross(x, kept, mask=mask)[0], expected)
    close(expected, cross.norm(x + cross.attn(x, image, mask=None if mask is None else mask[:, None, None])[0]))
    for other in (cross(x, cross.attn.keys_values(image.flip(0)), mask=mask), cross(x.flip(0), kept, mask=mask)):
        assert (other[0] - expected).abs().max() > 0.01


# --- ViLBERT ---------------------------------------------------------------------------------------------------------


def test_co_attention_has_weights_of_its_own_for_each_direction():
    """At one width it is LXMERT's layer with a second cross-attention and without self-attention."""
    layer, shared = CoAttentionLayer(D, D, HEADS), LXMERTLayer(D, HEADS)
    cross = 4 * (D * D + D) + 2 * D
    mlp = (4 * D * D + 4 * D) + (4 * D * D + D) + 2 * D
    assert count_parameters(layer) == 2 * cross + 2 * mlp
    assert count_parameters(shared) == count_parameters(layer) - cross + 2 * cross
    tensors = {id(p) for p in layer.text_cross.parameters()} & {id(p) for p in layer.image_cross.parameters()}
    assert not tensors


def answer(attn: Attention, x: Tensor, context: Tensor) -> Tensor:
    """Attention spelled out, head by head, with separate matrices for keys and values."""
    d = x.shape[-1] // attn.heads
    (w_k, w_v), (b_k, b_v) = attn.kv.weight.chunk(2), attn.kv.bias.chunk(2)
    parts = []
    for h in range(attn.heads):
        rows = slice(h * d, (h + 1) * d)
        query = x @ attn.q.weight[rows].T + attn.q.bias[rows]
        key, value = (context @ w[rows].T + b[rows] for w, b in ((w_k, b_k), (w_v, b_v)))
        parts.append((query @ key.transpose(1, 2) / math.sqrt(d)).softmax(-1) @ value)
    return torch.cat(parts, dim=-1) @ attn.proj.weight.T + attn.proj.bias


@torch.no_grad()
def test_co_attention_is_its_equations():
    layer, text, image = co_attention()
    t = layer.text_cross.norm(text + answer(layer.text_cross.attn, text, image))
    i = layer.image_cross.norm(image + answer(layer.image_cross.attn, image, text))
    new_text, new_image, _ = layer(text, image)
    close(new_text, layer.text_norm(t + layer.text_mlp(t)))
    close(new_image, layer.image_norm(i + layer.image_mlp(i)))
    # The image reads the old text, not the new one.
    i = layer.image_cross.norm(image + answer(layer.image_cross.attn, image, t))
    assert (new_image - layer.image_norm(i + layer.image_mlp(i))).abs().max() > 0.01


def test_heads_must_divide_both_widths():
    with pytest.raises(ValueError, match="width 18 is not a multiple of 4 heads"):
        CoAttentionLayer(16, 18, 4)
    with pytest.raises(ValueError, match="width 18 is not a multiple of 4 heads"):
        CoAttentionLayer(18, 16, 4)


# --- both ------------------------------------------------------------------------------------------------------------


@BOTH
@torch.no_grad()
def test_shapes_and_weights(make):
    layer, text, image = make()
    new_text, new_image, nothing = layer(text, image)
    assert new_text.shape == text.shape and new_image.shape == image.shape and nothing == {}
    text_mask, image_mask = padding()
    masked = layer(text, image, text_mask=text_mask, image_mask=image_mask)
    again = layer(text, image, text_mask=text_mask, image_mask=image_mask, need_weights=True)
    close(again[0], masked[0])
    close(again[1], masked[1])
    sizes = {"text": (L, text_mask), "image": (S, image_mask)}
    expected = ["text_to_image", "image_to_text"] + (["text_to_text", "image_to_image"] if make is lxmert else [])
    assert sorted(again[2]) == sorted(expected)
    for name, weights in again[2].items():
        (asking, _), (answering, mask) = (sizes[side] for side in name.split("_to_"))
        assert weights.shape == (B, HEADS, asking, answering)
        close(weights.sum(-1), torch.ones(B, HEADS, asking))
        assert not weights[~mask[:, None, None, :].expand_as(weights)].any()
        assert weights[mask[:, None, None, :].expand_as(weights)].min() > 0


@BOTH
@pytest.mark.parametrize("side", ["text", "image"])
@torch.no_grad()
def test_padding_is_not_read(make, side):
    layer, text, image = make()
    text_mask, image_mask = padding()

    def run(text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        new_text, new_image, _ = layer(text, image, text_mask=text_mask, image_mask=image_mask)
        return new_text[text_mask], new_image[image_mask]  # what may be read

    before = run(text, image)
    for padded in (True, False):
        changed = {"text": text.clone(), "image": image.clone()}
        changed[side][1, -1 if padded else 1] += torch.randn(changed[side].shape[-1])
        after = run(**changed)
        other = (after[1] - before[1]) if side == "text" else (after[0] - before[0])
        if padded:
            assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])
        else:
            assert other.abs().max() > 0.01


@BOTH
@torch.no_grad()
def test_a_padded_pair_equals_the_pair_alone(make):
    layer, text, image = make()
    text_mask, image_mask = padding()
    new_text, new_image, _ = layer(text, image, text_mask=text_mask, image_mask=image_mask)
    alone = layer(text[1:, :3], image[1:, :5])
    close(new_text[1:, :3], alone[0])
    close(new_image[1:, :5], alone[1])
    # With the two masks exchanged it is another thing (they fit by shape where L = S).
    short = image[:, :L]
    right = layer(text, short, text_mask=text_mask, image_mask=image_mask[:, :L])
    wrong = layer(text, short, text_mask=image_mask[:, :L], image_mask=text_mask)
    assert (right[0] - wrong[0])[1, :3].abs().max() > 0.01


@BOTH
def test_gradients_reach_both_inputs_and_every_parameter(make):
    layer, text, image = make()
    text.requires_grad_()
    image.requires_grad_()
    new_text, new_image, _ = layer(text, image)
    weight = torch.randn_like(new_text)  # a plain sum or sum of squares hardly moves behind a LayerNorm
    from_text = torch.autograd.grad((new_text * weight).sum(), (text, image), retain_graph=True)
    from_image = torch.autograd.grad((new_image * torch.randn_like(new_image)).sum(), (text, image), retain_graph=True)
    assert min(g.abs().max() for g in (*from_text, *from_image)) > 1e-3
    ((new_text * weight).sum() + (new_image * torch.randn_like(new_image)).sum()).backward()
    for name, parameter in layer.named_parameters():
        if not name.endswith("kv.bias"):  # its key half cancels in the softmax
            assert parameter.grad.abs().max() > 1e-4, name


@BOTH
def test_options_arrive_everywhere(make):
    options = dict(mlp_ratio=3, dropout=0.3, eps=0.5)
    layer = LXMERTLayer(D, HEADS, **options) if make is lxmert else CoAttentionLayer(D, IMAGE_WIDTH, HEADS, **options)
    norms = [m for m in layer.modules() if isinstance(m, nn.LayerNorm)]
    assert {m.eps for m in norms} == {0.5} and {m.p for m in layer.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert all(m.fc1.out_features == 3 * m.fc1.in_features for m in layer.modules() if isinstance(m, MLP))
