"""The shared blocks: values worked out by hand, and what must and must not depend on what."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.layers import (
    GELUS,
    MLP,
    Attention,
    Block,
    Encoder,
    MLMHead,
    PatchEmbed,
    QuickGELU,
    TextEmbeddings,
    count_parameters,
    init_normal,
    init_xavier,
    patchify,
    take_rows,
    to_float_pixels,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def shaken(module: nn.Module, std: float = 0.2) -> nn.Module:
    """The module with noise on every parameter, so that no zero bias and no unit scale can hide a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return module.eval()


# --- pixels and patches ----------------------------------------------------------------------------------------------


def test_pixels_become_minus_one_to_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    close(to_float_pixels(pixels), torch.tensor([-1.0, -0.6, 1.0]))
    floats = torch.tensor([0.0, 0.2, 255.0])
    assert to_float_pixels(floats) is floats


def test_patchify_by_hand():
    """A 2-channel 4x6 picture whose pixel says where it is: channel, row, column as three digits."""
    c, y, x = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(6), indexing="ij")
    patches = patchify((100 * c + 10 * y + x)[None], 2)
    assert patches.shape == (1, 6, 8)
    assert patches[0].tolist() == [
        [0, 1, 10, 11, 100, 101, 110, 111],
        [2, 3, 12, 13, 102, 103, 112, 113],
        [4, 5, 14, 15, 104, 105, 114, 115],
        [20, 21, 30, 31, 120, 121, 130, 131],
        [22, 23, 32, 33, 122, 123, 132, 133],
        [24, 25, 34, 35, 124, 125, 134, 135],
    ]


def test_patchify_equals_unfold():
    images = torch.randn(2, 3, 24, 16)
    assert torch.equal(patchify(images, 8), F.unfold(images, 8, stride=8).transpose(1, 2))


def test_patchify_keeps_pictures_apart_and_every_pixel_once():
    images = torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8)
    patches = patchify(images, 4)
    for picture, cut in zip(images, patches, strict=True):
        assert sorted(cut.flatten().tolist()) == picture.flatten().tolist()


@pytest.mark.parametrize("shape", [(1, 3, 10, 8), (1, 3, 8, 10)])
def test_patchify_refuses_what_it_cannot_cut(shape):
    with pytest.raises(ValueError, match=f"{shape[2]}x{shape[3]} picture cannot be cut into whole 4x4 patches: resize"):
        patchify(torch.zeros(shape), 4)


def test_patch_embed_is_a_convolution():
    images, embed = torch.randn(2, 3, 32, 48), shaken(PatchEmbed(8, 3, 20))
    kernel = embed.proj.weight.view(20, 3, 8, 8)
    convolved = F.conv2d(images, kernel, embed.proj.bias, stride=8)  # (B, D, 4, 6)
    close(embed(images), convolved.flatten(2).transpose(1, 2), 1e-5)
    # Wrong axis orders of the same weights are no convolution: the comparison above would notice them.
    for wrong in (kernel.transpose(2, 3), embed.proj.weight.view(20, 8, 8, 3).permute(0, 3, 1, 2)):
        other = F.conv2d(images, wrong, embed.proj.bias, stride=8).flatten(2).transpose(1, 2)
        assert (embed(images) - other).abs().max() > 0.1
    assert (embed(images) - convolved.transpose(2, 3).flatten(2).transpose(1, 2)).abs().max() > 0.1


def test_patch_embed_reads_uint8_as_scaled_floats():
    images, embed = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), PatchEmbed(8, 3, 20)
    close(embed(images), embed(images / 127.5 - 1))


def test_patch_embed_without_bias():
    """CLIP's: a black picture of zeros leaves nothing, and what is left is the product alone."""
    images, plain, biased = torch.randn(2, 3, 32, 48), PatchEmbed(8, 3, 20, bias=False), PatchEmbed(8, 3, 20)
    assert plain.proj.bias is None and biased.proj.bias is not None  # a bias unasked
    assert count_parameters(biased) - count_parameters(plain) == 20
    assert not plain(torch.zeros(2, 3, 32, 48)).any() and biased(torch.zeros(2, 3, 32, 48)).any()
    convolved = F.conv2d(images, plain.proj.weight.view(20, 3, 8, 8), stride=8)
    close(plain(images), convolved.flatten(2).transpose(1, 2), 1e-5)


# --- attention -------------------------------------------------------------------------------------------------------


def attention_by_loop(attn: Attention, x: Tensor, context: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Vaswani et al., eq. 1, one query, one key and one head at a time; weights (B, heads, T, S)."""
    B, T, D = x.shape
    S, d = context.shape[1], D // attn.heads
    w_k, w_v = attn.kv.weight[:D], attn.kv.weight[D:]
    b_k, b_v = attn.kv.bias[:D], attn.kv.bias[D:]
    answer, weights = torch.zeros(B, T, D), torch.zeros(B, attn.heads, T, S)
    for b in range(B):
        for h in range(attn.heads):
            part = slice(h * d, (h + 1) * d)
            for t in range(T):
                query = attn.q.weight[part] @ x[b, t] + attn.q.bias[part]
                scores = []
                for s in range(S):
                    key = w_k[part] @ context[b, s] + b_k[part]
                    allowed = mask is None or bool(mask.expand(B, attn.heads, T, S)[b, h, t, s])
                    scores.append((query @ key).item() / math.sqrt(d) if allowed else -math.inf)
                exponentials = [math.exp(score - max(scores)) for score in scores]
                for s in range(S):
                    weights[b, h, t, s] = exponentials[s] / sum(exponentials)
                    answer[b, t, part] += weights[b, h, t, s] * (w_v[part] @ context[b, s] + b_v[part])
    return answer @ attn.proj.weight.T + attn.proj.bias, weights


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_attention_equals_the_loop(heads, kind, masked):
    attn = shaken(Attention(8, heads, context_width=12 if kind == "cross" else None), std=0.5)
    x = torch.randn(2, 5, 8)
    context = torch.randn(2, 3, 12) if kind == "cross" else None
    S = 5 if context is None else 3
    mask = (torch.rand(2, 1, 5, S) < 0.5) | (torch.arange(S) == 0) if masked else None
    expected, weights = attention_by_loop(attn, x, x if context is None else context, mask)
    fused, nothing = attn(x, context, mask=mask)
    spelled_out, named = attn(x, context, mask=mask, need_weights=True)
    assert nothing is None and fused.shape == (2, 5, 8) and named.shape == (2, heads, 5, S)
    close(fused, expected, 1e-5)
    close(spelled_out, expected, 1e-5)
    close(named, weights, 1e-5)
    close(named.sum(-1), torch.ones(2, heads, 5))


@torch.no_grad()
def test_attention_by_hand():
    """Two tokens, one head, width 1, all projections the identity: softmax of products, then a weighted mean."""
    attn = Attention(1, 1)
    for linear, values in ((attn.q, [1.0]), (attn.kv, [1.0, 1.0]), (attn.proj, [1.0])):
        linear.weight.copy_(torch.tensor(values)[:, None])
        linear.bias.zero_()
    y, weights = attn(torch.tensor([[[0.0], [1.0]]]), need_weights=True)
    e = math.e / (1 + math.e)  # token 1 compares itself (1*1) with token 0 (1*0); token 0 finds all equal
    close(weights[0, 0], torch.tensor([[0.5, 0.5], [1 - e, e]]))
    close(y[0, :, 0], torch.tensor([0.5, e]))


@torch.no_grad()
def test_scale_is_per_head():
    """Doubling the heads halves d: scores grow by sqrt(2) beside a model that would divide by sqrt(D)."""
    attn, x = shaken(Attention(8, 4), std=0.5), torch.randn(1, 4, 8)
    weights = attn(x, need_weights=True)[1]
    q, k = (t.view(1, 4, 4, 2).transpose(1, 2) for t in (attn.q(x), attn.kv(x)[..., :8]))
    products = q @ k.transpose(-2, -1)
    close(weights, (products / 2**0.5).softmax(-1))
    assert (weights - (products / 8**0.5).softmax(-1)).abs().max() > 0.01


@pytest.mark.parametrize("need_weights", [False, True])
@torch.no_grad()
def test_mask_true_means_may_look(need_weights):
    attn, x = shaken(Attention(8, 2), std=0.5), torch.randn(1, 4, 8)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 3] = False  # nobody may look at token 3
    before = attn(x, mask=mask, need_weights=need_weights)[0]
    hidden, seen = x.clone(), x.clone()
    hidden[0, 3] += 1
    seen[0, 2] += 1
    close(attn(hidden, mask=mask, need_weights=need_weights)[0][0, :3], before[0, :3])
    change = (attn(seen, mask=mask, need_weights=need_weights)[0] - before).abs().amax(-1)[0]
    assert (change > 1e-3).all()  # every token, token 3 included, sees token 2
    unmasked = [attn(t, need_weights=need_weights)[0][0, :3] for t in (hidden, x)]
    assert (unmasked[0] - unmasked[1]).abs().max() > 1e-3


@torch.no_grad()
def test_context_answers_and_x_asks():
    attn, x, context = shaken(Attention(8, 2, context_width=6), std=0.5), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    y = attn(x, context)[0]
    assert y.shape == (2, 5, 8)
    close(attn(x, context.flip(1))[0], y, 1e-5)  # the order of what is looked at does not matter
    close(attn(x.flip(1), context)[0], y.flip(1), 1e-5)  # each token asks for itself
    assert (attn(x, context + 1)[0] - y).abs().max() > 1e-2
    assert (attn(x, context.roll(1, 0))[0] - y).abs().max() > 1e-2  # pictures of a batch do not mix


@torch.no_grad()
def test_keys_and_values_by_hand():
    """Keys come from the first half of `kv`, values from the second, and head h has numbers h * d to (h + 1) * d."""
    attn, context = shaken(Attention(8, 2, context_width=6), std=0.5), torch.randn(2, 3, 6)
    keys, values = attn.keys_values(context)
    assert keys.shape == values.shape == (2, 2, 3, 4)
    for h in range(2):
        for t, first in ((keys, 0), (values, 8)):
            rows = slice(first + 4 * h, first + 4 * (h + 1))
            close(t[:, h], context @ attn.kv.weight[rows].T + attn.kv.bias[rows], 1e-5)
    t = torch.arange(24.0).view(1, 3, 8)
    assert attn.split(t)[0, 1].tolist() == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 21, 22, 23]]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["self", "cross"])
@torch.no_grad()
def test_kept_keys_and_values_are_as_good_as_the_context(kind, need_weights):
    attn = shaken(Attention(8, 2, context_width=6 if kind == "cross" else None), std=0.5)
    x = torch.randn(2, 5, 8)
    context = torch.randn(2, 3, 6) if kind == "cross" else x
    mask = torch.rand(2, 1, 5, context.shape[1]) < 0.6
    mask[..., 0] = True
    for seen in (None, mask):
        expected, weights = attn(x, context, mask=seen, need_weights=need_weights)
        kept, asked = attn.keys_values(context), []
        hook = attn.kv.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        y, named = attn(x, kept, mask=seen, need_weights=need_weights)
        rows = [attn(x[:, [t]], kept, mask=None if seen is None else seen[:, :, [t]])[0] for t in range(5)]
        hook.remove()
        assert not asked  # they are not computed again
        close(y, expected, 1e-5)
        close(torch.cat(rows, dim=1), expected, 1e-5)
        assert named is None if not need_weights else torch.allclose(named, weights)
    # Kept of two parts and joined: as if they had been one.
    parts = [attn.keys_values(part) for part in (context[:, :1], context[:, 1:])]
    close(attn(x, tuple(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))[0], attn(x, context)[0], 1e-5)
    assert (attn(x, attn.keys_values(context.flip(0)))[0] - attn(x, context)[0]).abs().max() > 0.01


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        Attention(10, 4)


# --- MLP, block, encoder ---------------------------------------------------------------------------------------------


def test_quick_gelu_by_hand():
    """x / (1 + e^(-1.702 x)): at 1 that is 1 / (1 + 0.18232), at 2 2 / (1 + 0.03324), at -1 the first minus 1."""
    got = QuickGELU()(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
    close(got, torch.tensor([[-0.1542042, 0.0], [0.8457958, 1.9356586]]))
    x = torch.linspace(-6, 6, 1001)
    apart = (QuickGELU()(x) - F.gelu(x)).abs().max()
    assert 0.01 < apart < 0.03  # near the exact one, and not the same
    assert (QuickGELU()(x) - F.silu(x)).abs().max() > 0.05  # which has no 1.702


def test_gelus_by_name():
    x = torch.linspace(-4, 4, 101)
    expected = {"exact": F.gelu(x), "tanh": F.gelu(x, approximate="tanh"), "quick": x * torch.sigmoid(1.702 * x),
                "relu": x.clamp(min=0)}  # fmt: skip
    assert set(GELUS) == set(expected)
    for name, values in expected.items():
        close(GELUS[name]()(x), values, 1e-7)
        block, encoder = Block(8, 2, gelu=name), Encoder(8, 2, 2, gelu=name)
        for mlp in (MLP(8, gelu=name), block.mlp, *(one.mlp for one in encoder.blocks)):
            close(mlp.act(x), values, 1e-7)
    assert (expected["exact"] - expected["tanh"]).abs().max() > 1e-4
    close(MLP(8).act(x), expected["exact"], 1e-7)  # unasked


@pytest.mark.parametrize(("gelu", "expected"), [("exact", 0.8413447), ("tanh", 0.8411920), ("quick", 0.8457958)])
@torch.no_grad()
def test_mlp_by_hand(gelu, expected):
    """Width 1, hidden 2: 3 * GELU(1) - 1 * GELU(0) + 0.5, where GELU(1) is 0.84134 exactly, 0.84119 in tanh form and
    0.84580 in OpenAI's."""
    mlp = MLP(1, ratio=2, gelu=gelu)
    mlp.fc1.weight.copy_(torch.tensor([[1.0], [2.0]]))
    mlp.fc1.bias.copy_(torch.tensor([0.0, -2.0]))
    mlp.fc2.weight.copy_(torch.tensor([[3.0, -1.0]]))
    mlp.fc2.bias.fill_(0.5)
    close(mlp(torch.ones(1, 1)), torch.tensor([[3 * expected + 0.5]]))


def layer_norm(layer: nn.LayerNorm, z: Tensor, eps: float = 0.1) -> Tensor:
    """LayerNorm spelled out; an eps this large would show if it were ignored."""
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("need_weights", [False, True])
@torch.no_grad()
def test_block_is_its_equation(norm, need_weights):
    block, x = shaken(Block(8, 2, norm=norm, mlp_ratio=3, eps=0.1)), torch.randn(2, 5, 8)
    if norm == "pre":
        z = x + block.attn(layer_norm(block.norm1, x))[0]
        expected = z + block.mlp(layer_norm(block.norm2, z))
    else:
        z = layer_norm(block.norm1, x + block.attn(x)[0])
        expected = layer_norm(block.norm2, z + block.mlp(z))
    y, weights = block(x, need_weights=need_weights)
    close(y, expected, 1e-5)
    assert (weights is not None) == need_weights
    assert block.mlp.fc1.weight.shape == (24, 8)


@torch.no_grad()
def test_pre_norm_never_normalises_the_stream():
    block, x = Block(8, 2), torch.randn(1, 5, 8)
    for layer in (block.attn.proj, block.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    assert torch.equal(block(x)[0], x)
    post = Block(8, 2, norm="post")
    post.load_state_dict(block.state_dict())
    assert not torch.allclose(post(x)[0], x, atol=0.01)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_rows_gives_the_same_numbers_and_gradients(norm, need_weights):
    encoder, x = shaken(Encoder(8, 3, 2, norm=norm)), torch.randn(2, 6, 8)
    grads = []
    for rows in (None, 1):
        encoder.zero_grad()
        states, named = encoder(x, rows=rows, everything=need_weights)
        assert states.shape == (2, rows or 6, 8)
        states[:, 0].square().sum().backward()
        grads.append((states[:, 0].detach(), [p.grad.clone() for p in encoder.parameters()]))
        if need_weights:
            assert named["attention_1"].shape == (2, 2, 6, 6)
            assert named["attention_2"].shape == (2, 2, rows or 6, 6)
    close(grads[0][0], grads[1][0], 1e-5)
    for full, short in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(full, short, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_rows_obeys_a_mask():
    block, x = shaken(Block(8, 2)), torch.randn(1, 5, 8)
    mask = torch.tensor([True, True, False, True, False]).view(1, 1, 1, 5)  # a padding mask: the same for each asker
    close(block(x, mask=mask, rows=1)[0], block(x, mask=mask)[0][:, :1])
    assert (block(x, rows=1)[0] - block(x, mask=mask, rows=1)[0]).abs().max() > 1e-3


def test_take_rows_by_hand():
    x = torch.arange(12).view(3, 4, 1)  # sequence b, place t: 4b + t
    assert torch.equal(take_rows(x, None), x)
    assert take_rows(x, 2)[..., 0].tolist() == [[0, 1], [4, 5], [8, 9]]
    assert take_rows(x, torch.tensor([2, 0, 3]))[..., 0].tolist() == [[2], [4], [11]]
    assert take_rows(x, torch.tensor([1, 1, 1])).shape == (3, 1, 1)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", ["no", "padding", "causal"])
def test_a_row_of_each_sequence_gives_the_same_numbers_and_gradients(norm, need_weights, masked):
    block, x = shaken(Block(8, 2, norm=norm)), torch.randn(3, 5, 8)
    rows, each, places = torch.tensor([4, 0, 2]), torch.arange(3), torch.arange(5)
    full_mask = short_mask = None
    if masked == "padding":  # (B, 1, 1, T), the same for each asker: fits the one row as it is
        full_mask = short_mask = (places < torch.tensor([5, 3, 4])[:, None])[:, None, None]
    if masked == "causal":  # of (T, T) each sequence needs the line of its own row
        full_mask = torch.ones(5, 5, dtype=torch.bool).tril()
        short_mask = full_mask[rows][:, None, None]
    full, full_weights = block(x, mask=full_mask, need_weights=need_weights)
    target = torch.randn(3, 8)
    gradients = [torch.autograd.grad((full[each, rows] * target).sum(), list(block.parameters()))]
    short, weights = block(x, mask=short_mask, rows=rows, need_weights=need_weights)
    assert short.shape == (3, 1, 8)
    close(short[:, 0], full[each, rows], 1e-5)
    gradients.append(torch.autograd.grad((short[:, 0] * target).sum(), list(block.parameters())))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (weights is not None) == need_weights
    if need_weights:
        assert weights.shape == (3, 2, 1, 5)
        close(weights[:, :, 0], full_weights[each, :, rows], 1e-5)
    # The row of the first sequence, taken from all of them, would be another.
    assert (full[each, rows] - full[:, rows[0]])[1:].abs().amax(-1).min() > 0.1


@torch.no_grad()
def test_encoder_is_the_blocks_one_after_another():
    encoder, x = shaken(Encoder(8, 3, 2)), torch.randn(2, 4, 8)
    states, named = encoder(x, everything=True)
    assert set(named) == {f"{kind}_{i}" for kind in ("block", "attention") for i in range(3)}
    z = x
    for i, block in enumerate(encoder.blocks):
        z = block(z)[0]
        close(named[f"block_{i}"], z, 1e-5)
    close(states, encoder.norm(z), 1e-5)
    close(encoder(x)[0], states, 1e-5)
    assert encoder(x)[1] == {}


@torch.no_grad()
def test_encoder_passes_its_mask_to_every_block():
    encoder, x = shaken(Encoder(8, 3, 2)), torch.randn(1, 4, 8)
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    later = x.clone()
    later[0, 3, 0] += 1  # one number of it: LayerNorm would not see a constant added to all
    close(encoder(later, mask=causal)[0][0, :3], encoder(x, mask=causal)[0][0, :3], 1e-5)
    assert (encoder(later)[0] - encoder(x)[0])[0, :3].abs().max() > 1e-3


def test_post_norm_has_no_last_norm():
    assert isinstance(Encoder(8, 1, 2).norm, nn.LayerNorm)
    assert isinstance(Encoder(8, 1, 2, norm="post").norm, nn.Identity)


def test_tokens_are_equal_before_the_encoder():
    """Without positions a block treats its tokens as a set: permuting the input permutes the output."""
    encoder, x, order = shaken(Encoder(8, 2, 2)), torch.randn(2, 6, 8), torch.randperm(6)
    with torch.no_grad():
        close(encoder(x[:, order])[0], encoder(x)[0][:, order], 1e-5)
        assert (encoder(x[:, order])[0] - encoder(x)[0]).abs().max() > 0.1


def test_dropout_stands_where_the_paper_has_it():
    """After the attention's output and after both MLP layers; none on q, k, v or on the attention weights."""
    block = Block(8, 2, dropout=0.5).train()
    seen = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Dropout | nn.GELU) or name in ("attn.proj", "mlp.fc2"):
            module.register_forward_hook(lambda _, __, out, name=name: seen.append(name))
    block(torch.randn(1, 4, 8))
    assert seen == ["attn.proj", "attn.dropout", "mlp.act", "mlp.dropout", "mlp.fc2", "mlp.dropout"]
    assert {m.p for m in block.modules() if isinstance(m, nn.Dropout)} == {0.5}
    x = torch.randn(1, 4, 8)
    attn = Attention(8, 2, dropout=0.5).train()
    attn.dropout.eval()
    close(attn(x)[0], attn(x)[0])  # nothing else in it is random


@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_dropout_rests_in_eval_mode(part):
    block, x = Block(8, 2, dropout=0.5), torch.randn(1, 40, 8)
    module = getattr(block, part)
    run = (lambda: module(x)[0]) if part == "attn" else (lambda: module(x))
    with torch.no_grad():
        share = (run() == 0).float().mean()
        assert 0.3 < share < 0.7
        block.eval()
        assert (run() == 0).float().mean() < 0.01
        close(run(), run())


# --- words in and out ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_embeddings_are_word_plus_position_then_norm():
    embed, ids = shaken(TextEmbeddings(20, 6, 8, eps=0.1)), torch.tensor([[3, 5, 3, 0], [19, 3, 1, 1]])
    y = embed(ids)
    assert y.shape == (2, 4, 8)
    for b in range(2):
        for i in range(4):
            close(y[b, i], layer_norm(embed.norm, embed.word.weight[ids[b, i]] + embed.position.weight[i]), 1e-5)
    # The position added after the norm, or a norm of each part, would be other numbers.
    late = layer_norm(embed.norm, embed.word(ids)) + embed.position.weight[:4]
    assert (y - late).abs().max() > 0.1
    assert (y[0, 0] - y[0, 2]).abs().max() > 0.1  # the same word at two places
    close(embed(ids[:, :2]), y[:, :2])  # a shorter text uses the first positions
    assert count_parameters(embed) == (20 + 6) * 8 + 2 * 8  # no segment table


def test_text_embeddings_refuse_too_long_a_text():
    embed = TextEmbeddings(20, 6, 8)
    assert embed(torch.ones(2, 6, dtype=torch.long)).shape == (2, 6, 8)
    with pytest.raises(ValueError, match=r"a text of 7 tokens does not fit 6 positions: cut it with encode_batch"):
        embed(torch.ones(2, 7, dtype=torch.long))


@torch.no_grad()
def test_text_embeddings_can_start_in_the_middle():
    embed, ids = shaken(TextEmbeddings(20, 6, 8)), torch.randint(20, (2, 6))
    whole = embed(ids)
    for first in range(6):
        close(embed(ids[:, first:], first=first), whole[:, first:])
        close(embed(ids[:, first : first + 1], first=first), whole[:, first : first + 1])
    assert (embed(ids[:, 2:])[:, 0] - whole[:, 2]).abs().amax(-1).min() > 0.1  # the place counts
    with pytest.raises(ValueError, match=r"a text of 7 tokens does not fit 6 positions"):
        embed(ids[:, :2], first=5)
    assert embed(ids[:, :1], first=5).shape == (2, 1, 8)


def test_text_embeddings_drop_out_last():
    embed, ids = TextEmbeddings(20, 6, 64, dropout=0.5), torch.randint(20, (4, 6))
    kept = embed.train()(ids)
    share = (kept == 0).float().mean().item()
    assert 0.4 < share < 0.6
    close(kept[kept != 0], 2 * embed.eval()(ids)[kept != 0])  # whole numbers behind the norm, scaled up
    assert embed.norm.eps == 1e-12 and TextEmbeddings(20, 6, 8, eps=1e-6).norm.eps == 1e-6


@torch.no_grad()
def test_mlm_head_is_its_equation():
    head, x = shaken(MLMHead(8, 20, eps=0.1)), torch.randn(2, 5, 8)
    hidden = x @ head.dense.weight.T + head.dense.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = layer_norm(head.norm, gelu) @ head.decoder.weight.T + head.decoder.bias
    close(head(x), expected, 1e-5)
    close(head(x[0, :3]), expected[0, :3], 1e-5)  # of any number of states
    other_order = F.gelu(layer_norm(head.norm, hidden)) @ head.decoder.weight.T + head.decoder.bias
    assert (expected - other_order).abs().max() > 0.1
    assert count_parameters(head) == (8 * 8 + 8) + 2 * 8 + (20 * 8 + 20) and head.decoder.bias is not None


def xavier(matrix: Tensor) -> bool:
    """Uniform within sqrt(6 / (rows + columns)), as far as can be told from this many numbers."""
    bound = math.sqrt(6 / sum(matrix.shape))
    return 0.98 * bound < matrix.abs().max() <= bound and abs(matrix.std() / (bound / 3**0.5) - 1) < 0.05


def test_init_xavier_knows_each_matrix():
    """Keys and values lie in one tensor and are two matrices, with a fan-out each; also where another tower answers."""
    cross = Attention(48, 2, context_width=80)
    model = nn.ModuleDict({"patches": PatchEmbed(8, 3, 48), "encoder": Encoder(48, 2, 2), "cross": cross,
                           "head": nn.Linear(48, 100, bias=False)})  # fmt: skip
    shaken(model, std=3.0)
    init_xavier(model)
    seen = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            matrices = module.weight.chunk(2) if name.endswith("kv") else [module.weight]
            assert all(map(xavier, matrices)), name
            assert module.bias is None or not module.bias.any(), name
            assert module.weight.requires_grad, name  # though it was set without a graph
            seen += len(matrices)
    assert seen == 1 + 2 * 6 + 4 + 1
    # Taken as one matrix, keys and values would start too small; other rules would start elsewhere.
    for wrong in (nn.init.xavier_uniform_, nn.init.kaiming_uniform_, nn.init.xavier_normal_):
        wrong(cross.kv.weight)
        assert not any(map(xavier, cross.kv.weight.chunk(2)))


def test_init_xavier_leaves_all_else_alone():
    """Tables of words, norms and bare tokens are no matrices of this kind: their owners set them."""
    model = nn.ModuleList([nn.Embedding(30, 20), nn.LayerNorm(20), Encoder(20, 1, 2)])
    model.token = nn.Parameter(torch.randn(20))
    shaken(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init_xavier(model)
    linear = {f"{name}." for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, value in model.state_dict().items():
        touched = any(name.startswith(prefix) for prefix in linear)
        assert torch.equal(value, before[name]) != touched, name


def test_init_normal_sets_every_kind_of_parameter():
    model = nn.ModuleList([nn.Linear(100, 50), nn.Embedding(100, 50), nn.LayerNorm(50), nn.Linear(100, 50, bias=False)])
    for std in (0.02, 0.5):
        shaken(model, std=3.0)
        init_normal(model, **({} if std == 0.02 else {"std": std}))  # 0.02 is what it does unasked
        for i in (0, 1, 3):
            assert model[i].weight.std().item() == pytest.approx(std, rel=0.05)
            assert abs(model[i].weight.mean().item()) < 0.05 * std
            assert model[i].weight.abs().max() > 3 * std  # normal, neither uniform nor cut at two deviations
        assert not model[0].bias.any() and not model[2].bias.any() and (model[2].weight == 1).all()


def test_init_normal_with_another_deviation_for_matrices():
    """`matrices` is about linear layers alone: the table keeps the other one, asked for or not."""
    model = nn.ModuleList([nn.Linear(100, 50), nn.Embedding(100, 50), nn.LayerNorm(50), nn.Linear(100, 50, bias=False)])
    for options, table in (({}, 0.02), ({"std": 0.1}, 0.1)):
        shaken(model, std=3.0)
        init_normal(model, matrices=0.5, **options)
        for i, expected in ((0, 0.5), (1, table), (3, 0.5)):
            assert model[i].weight.std().item() == pytest.approx(expected, rel=0.05)
        assert not model[0].bias.any() and not model[2].bias.any() and (model[2].weight == 1).all()
    init_normal(model, matrices=0.0)  # a number like any other, not a way to say nothing
    assert not model[0].weight.any() and model[1].weight.any()


def test_init_normal_leaves_bare_parameters_alone():
    """A class token or a position table is no module: its owner sets it."""
    model = nn.Module()
    model.token, model.inner = nn.Parameter(torch.full((3,), 7.0)), nn.Sequential(nn.Linear(3, 3))
    init_normal(model)
    assert (model.token == 7).all() and not model.inner[0].bias.any()
    assert model.inner[0].weight.requires_grad  # though it was set without a graph


def test_count_parameters_counts_shared_ones_once():
    layer = nn.Linear(3, 2)
    assert count_parameters(layer) == 8
    assert count_parameters(nn.ModuleList([layer, layer, nn.Linear(1, 1)])) == 10
