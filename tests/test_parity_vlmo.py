"""Our VLMo beside BEiT's blocks and beside a second VLMo, written out here: the same numbers within 1e-5.

transformers has no VLMo, but its BEiT is the image route: same block, same layer scale. The rest is written a second
time as the official code has it, functions over a dictionary of weights by their official names: text padded to its
longest, cut from the picture at a fixed place, keys without a bias, queries and values in one matrix.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from parity_helpers import TOLERANCE, assert_close, assert_differ, random_pictures, randomise
from torch import nn

from minivlp.layers import count_parameters
from minivlp.lessons import vlmo as lesson06
from minivlp.losses import IGNORE
from minivlp.models.vlmo import VLMo, VLMoConfig, paper_config, routes
from minivlp.pretrained import rename

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SMALL = dict(
    image_size=32, patch_size=8, vocab_size=50, max_text=12, width=32, depth=4, pair_depth=2, heads=4, layer_scale=0.1,
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "eps 0.1": dict(eps=0.1),  # absurd, so that an ignored eps cannot hide
    "text eps 0.1": dict(text_eps=0.1),
    "narrow MLP": dict(mlp_ratio=2),
    "one head": dict(heads=1),
    "eight heads": dict(heads=8),
    "one block with VL-FFN": dict(pair_depth=1),
    "all but one block with VL-FFN": dict(pair_depth=3),
    "two blocks": dict(depth=2, pair_depth=1),
    "patch 16": dict(patch_size=16),
    "larger pictures": dict(image_size=48),
    "one channel": dict(channels=1),
    "long texts": dict(max_text=40),
    "dropout": dict(dropout=0.1),  # asleep
}
L = 9


def small(name="plain", **options):
    return VLMoConfig(**(SMALL | VARIANTS[name] | options))


def pictures(config, *, seed=0, count=3):
    return random_pictures(config.image_size, config.channels, seed=seed, count=count)


def texts(*, seed=0, lengths=(L, 6, 3)):
    """ids (B, L) with 0 at the padding, and the mask."""
    ids = torch.randint(5, SMALL["vocab_size"], (len(lengths), L), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def assert_all_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- pictures alone: BEiT --------------------------------------------------------------------------------------------

BEIT_NAMES = (
    (r"^embeddings\.cls_token$", "embed.image.cls_token"),
    (r"^embeddings\.position_embeddings$", "embed.image.pos_embed"),
    (r"^embeddings\.mask_token$", "embed.mask_patch"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embed.image.patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"\.attention\.(?:q_proj|attention\.query)\.", ".attn.q."),
    (r"\.attention\.(?:k_proj|attention\.key)\.", ".attn.k."),
    (r"\.attention\.(?:v_proj|attention\.value)\.", ".attn.v."),
    (r"\.attention\.(?:o_proj|output\.dense)\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".experts.image.norm."),
    (r"\.(?:mlp\.fc1|intermediate\.dense)\.", ".experts.image.mlp.fc1."),
    (r"\.(?:mlp\.fc2|output\.dense)\.", ".experts.image.mlp.fc2."),
    (r"\.lambda_([12])$", r".gamma_\1"),
)


def random_scales(model, *names):
    """Layer scales far from 0.1 and from each other: the smaller they are the less of a mistake comes out."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in names:
            parameter.data = 1 + 0.5 * torch.randn(parameter.shape, generator=generator)


def beit_pair(name="plain", **options):
    """BEiT with random weights, and our VLMo whose image route has the same; all else in it is random."""
    c = small(name, **options)
    theirs = transformers.BeitModel(
        transformers.BeitConfig(
            hidden_size=c.width, num_hidden_layers=c.depth, num_attention_heads=c.heads,
            intermediate_size=c.mlp_ratio * c.width, image_size=c.image_size, patch_size=c.patch_size,
            num_channels=c.channels, layer_norm_eps=c.eps, layer_scale_init_value=0.1, use_mask_token=True,
            use_absolute_position_embeddings=True, use_relative_position_bias=False,
            use_shared_relative_position_bias=False, use_mean_pooling=False, hidden_dropout_prob=c.dropout,
            attention_probs_dropout_prob=0.0, drop_path_rate=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    randomise(theirs)
    random_scales(theirs, "lambda_1", "lambda_2")
    for key, value in theirs.named_parameters():
        if re.search(r"\.(q_proj|query)\.weight$", key):
            value.data *= 5  # so that a patch looks at some others and not at all of them alike
    weights = rename(theirs.state_dict(), BEIT_NAMES)
    ours = randomise(VLMo(c))
    for key in [key for key in weights if ".attn.k." in key]:
        block = key.rpartition("k.weight")[0]
        weights[f"{block}kv.weight"] = torch.cat([weights.pop(key), weights.pop(f"{block}v.weight")])
        bias = weights.pop(f"{block}v.bias")
        weights[f"{block}kv.bias"] = torch.cat([torch.zeros_like(bias), bias])  # BEiT's keys have none
    kernel = "embed.image.patch_embed.proj.weight"
    weights[kernel] = weights[kernel].flatten(1)
    weights["embed.mask_patch"] = weights["embed.mask_patch"].flatten()
    weights["embed.image.pos_embed"] = weights["embed.image.pos_embed"] - ours.embed.types.weight[1].detach()
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    elsewhere = (r"\.experts\.(text|pair)\.", r"^(embed\.text|embed\.types|pooler|itc_|logit_|itm_|mlm_|mim_)")
    assert not [key for key in missing if not any(re.search(pattern, key) for pattern in elsewhere)]
    return theirs, ours


def states_by_block(model, images):
    """Our image route: what goes in, after each block, and the final states."""
    x = model.embed.look(images)
    last, named = model.run(x, routes(model.config, 0, x.shape[1]), everything=True)
    return [x, *(named[f"block_{i}"] for i in range(model.config.depth)), model.norm(last)]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_image_route_is_beit(name):
    theirs, ours = beit_pair(name)
    images, others = pictures(ours.config), pictures(ours.config, seed=1)
    for shown in (images, others):
        out = theirs(shown, output_hidden_states=True)
        expected = [*out.hidden_states, out.last_hidden_state]
        found = states_by_block(ours, shown)
        assert len(found) == len(expected) == ours.config.depth + 2
        for own, other in zip(found, expected, strict=True):
            assert_close(own, other)
        assert_close(ours.image_states(shown), out.last_hidden_state)
        assert_close(ours.image_states(shown, rows=1), out.last_hidden_state[:, :1])
        for before, after in pairwise(expected):  # each block does something
            assert_differ(before, after)
    # Agreement would be worth nothing if the picture did not matter, to the class token too.
    for shown in (others, images.roll(ours.config.patch_size, dims=-1)):
        assert_differ(theirs(shown).last_hidden_state[:, 0], theirs(images).last_hidden_state[:, 0])


@torch.no_grad()
def test_covered_patches_are_beits():
    theirs, ours = beit_pair()
    images, hidden = pictures(ours.config), torch.zeros(3, 16, dtype=torch.bool)
    hidden[0, 3], hidden[1, [0, 4, 5]], hidden[2, 8:] = True, True, True
    expected = theirs(images, bool_masked_pos=hidden).last_hidden_state
    assert_close(ours.image_states(images, hidden=hidden), expected)
    assert_differ(expected, theirs(images).last_hidden_state)


@torch.no_grad()
def test_a_bias_of_the_keys_changes_nothing():
    """BEiT and VLMo have none, ours has one: the same number for all keys of a question, which softmax takes out."""
    theirs, ours = beit_pair()
    images = pictures(ours.config)
    expected = theirs(images).last_hidden_state
    for block in ours.blocks:
        assert not block.attn.kv.bias[:32].any() and block.attn.kv.bias[32:].any()
        block.attn.kv.bias[:32] += torch.randn(32)
    assert_close(ours.image_states(images), expected)
    ours.blocks[0].attn.kv.bias[32:] += torch.randn(32)  # that of the values does
    assert_differ(ours.image_states(images), expected)


def scales_exchanged(model):
    for block in model.blocks:
        block.gamma_1, block.gamma_2 = block.gamma_2, block.gamma_1


def no_scales(model):
    for block in model.blocks:
        block.gamma_1 = block.gamma_2 = None


def keys_and_values(model):
    kv = model.blocks[1].attn.kv
    kv.weight.copy_(kv.weight.roll(32, dims=0))


def words_expert(model):
    model.blocks[1].experts["image"] = model.blocks[1].experts["text"]


def pairs_expert(model):
    model.blocks[3].experts["image"] = model.blocks[3].experts["pair"]


def shared_second_norm(model):
    model.blocks[1].experts["image"].norm = model.blocks[1].experts["text"].norm


def norms_exchanged(model):
    block = model.blocks[1]
    block.norm1, block.experts["image"].norm = block.experts["image"].norm, block.norm1


def tanh_gelu(model):
    for block in model.blocks:
        for expert in block.experts.values():
            expert.mlp.act = nn.GELU(approximate="tanh")


def other_heads(model):
    model.blocks[1].attn.heads = 8


def no_last_norm(model):
    model.norm = nn.Identity()


def no_type(model):
    model.embed.types.weight.zero_()


@pytest.mark.parametrize(
    "spoil",
    [scales_exchanged, no_scales, keys_and_values, words_expert, pairs_expert, shared_second_norm, norms_exchanged,
     tanh_gelu, other_heads, no_last_norm, no_type],
    ids=lambda spoil: spoil.__name__,
)  # fmt: skip
@torch.no_grad()
def test_beit_would_notice(spoil):
    theirs, ours = beit_pair()
    images = pictures(ours.config)
    expected = theirs(images).last_hidden_state
    assert_close(ours.image_states(images), expected)
    spoil(ours)
    assert (ours.image_states(images) - expected).abs().max() > 5 * TOLERANCE


# --- everything: the official code, written a second time ------------------------------------------------------------

_EXPERTS = {"imag": "image", "text": "text", "vl": "pair"}
_NAMES = (
    (r"^transformer\.cls_token$", "embed.image.cls_token"),
    (r"^transformer\.pos_embed$", "embed.image.pos_embed"),
    (r"^transformer\.patch_embed\.proj\.", "embed.image.patch_embed.proj."),
    (r"^transformer\.norm\.", "norm."),
    (r"^transformer\.blocks\.", "blocks."),
    *((rf"\.norm2_{theirs}\.", f".experts.{ours}.norm.") for theirs, ours in _EXPERTS.items()),
    *((rf"\.mlp_{theirs}\.", f".experts.{ours}.mlp.") for theirs, ours in _EXPERTS.items()),
    (r"^text_embeddings\.word_embeddings\.", "embed.text.word."),
    (r"^text_embeddings\.position_embeddings\.", "embed.text.position."),
    (r"^text_embeddings\.token_type_embeddings\.", "embed.text.segment."),
    (r"^text_embeddings\.LayerNorm\.", "embed.text.norm."),
    (r"^token_type_embeddings\.", "embed.types."),
    (r"^pooler\.dense\.", "pooler."),
    (r"^(itc_\w+_proj)\.fc\.", r"\1."),
    (r"^itm_score\.fc\.", "itm_head."),
    (r"^mlm_score\.transform\.dense\.", "mlm_head.dense."),
    (r"^mlm_score\.transform\.LayerNorm\.", "mlm_head.norm."),
    (r"^mlm_score\.decoder\.", "mlm_head.decoder."),
    (r"^mlm_score\.bias$", "mlm_head.decoder.bias"),
)


def official_shapes(c):
    """The official state dict with absolute positions, name -> shape."""
    D, H, P = c.width, c.mlp_ratio * c.width, c.patch_size
    shapes = {
        "transformer.cls_token": (1, 1, D), "transformer.pos_embed": (1, (c.image_size // P) ** 2 + 1, D),
        "transformer.patch_embed.proj.weight": (D, c.channels, P, P), "transformer.patch_embed.proj.bias": (D,),
        "text_embeddings.word_embeddings.weight": (c.vocab_size, D),
        "text_embeddings.position_embeddings.weight": (c.max_text, D),
        "text_embeddings.token_type_embeddings.weight": (2, D), "token_type_embeddings.weight": (2, D),
        "logit_scale": (), "logit_vl_scale": (), "mlm_score.decoder.weight": (c.vocab_size, D),
        "mlm_score.bias": (c.vocab_size,), "itm_score.fc.weight": (2, D), "itm_score.fc.bias": (2,),
    }  # fmt: skip
    shapes |= {f"itc_{name}_proj.fc.weight": (D, D) for name in ("text", "image", "vl_text", "vl_image")}
    norms, dense = ["transformer.norm", "text_embeddings.LayerNorm", "mlm_score.transform.LayerNorm"], {}
    dense |= {"pooler.dense": (D, D), "mlm_score.transform.dense": (D, D)}
    for i in range(c.depth):
        block = f"transformer.blocks.{i}"
        kinds = ("imag", "text", "vl") if i >= c.depth - c.pair_depth else ("imag", "text")
        names = ("gamma_1", "gamma_2", "attn.q_bias", "attn.v_bias")
        shapes |= {f"{block}.attn.qkv.weight": (3 * D, D)} | {f"{block}.{name}": (D,) for name in names}
        dense |= {f"{block}.attn.proj": (D, D)} | {f"{block}.mlp_{kind}.fc1": (H, D) for kind in kinds}
        dense |= {f"{block}.mlp_{kind}.fc2": (D, H) for kind in kinds}
        norms += [f"{block}.norm1", *(f"{block}.norm2_{kind}" for kind in kinds)]
    shapes |= {f"{name}.{part}": (D,) for name in norms for part in ("weight", "bias")}
    return shapes | {f"{name}.{part}": shape[: 2 if part == "weight" else 1]
                     for name, shape in dense.items() for part in ("weight", "bias")}  # fmt: skip


def official_weights(c):
    """Large random ones: nothing is near 0, 1 or its neighbour, and no layer scale small enough to hide a mistake."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for name, shape in official_shapes(c).items():
        noise = torch.randn(shape, generator=generator)
        if name.startswith("logit"):
            noise = 2.5 + 0.3 * noise.sign()
        elif "gamma" in name:
            noise = 1 + 0.5 * noise
        elif "norm" in name.lower():
            noise = 0.2 * noise + name.endswith("weight")
        else:
            noise = noise * (0.3 if "embed" in name or "token" in name else 0.15)
        if name.endswith("qkv.weight"):
            noise[: c.width] *= 3  # so that a token looks at some others and not at all of them alike
        weights[name] = noise.requires_grad_()
    return weights


def to_ours(weights):
    """An official state dict, or the gradients of one, by our names, and the segments' (2, D)."""
    ours = rename(dict(weights), _NAMES)
    for name in [name for name in ours if name.endswith("qkv.weight")]:
        block = name.removesuffix("qkv.weight")
        q, k, v = ours.pop(name).chunk(3)
        bias = ours.pop(f"{block}v_bias")
        ours |= {f"{block}q.weight": q, f"{block}kv.weight": torch.cat([k, v]),
                 f"{block}q.bias": ours.pop(f"{block}q_bias"),
                 f"{block}kv.bias": torch.cat([torch.zeros_like(bias), bias])}  # fmt: skip
    kernel = "embed.image.patch_embed.proj.weight"
    ours[kernel] = ours[kernel].flatten(1)
    return ours, ours.pop("embed.text.segment.weight")


def load_official(model, weights):
    """The segment vector of all words goes into their positions; what stage 1 alone needs has no place in the file."""
    ours, segments = to_ours({name: tensor.detach() for name, tensor in weights.items()})
    ours["embed.text.position.weight"] = ours["embed.text.position.weight"] + segments[0]
    missing, unexpected = model.load_state_dict(ours, strict=False)
    assert set(missing) == {"embed.mask_patch", "mim_head.weight", "mim_head.bias"} and not unexpected


def pair(name="plain", **options):
    """Official weights and our model with the same."""
    c = small(name, **options)
    weights, model = official_weights(c), VLMo(c).eval()
    load_official(model, weights)
    return weights, model


def layer_norm(w, name, x, eps):
    centred = x - x.mean(dim=-1, keepdim=True)
    x = centred / torch.sqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def dense(w, name, x):
    return x @ w[f"{name}.weight"].transpose(0, 1) + w[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def attention(w, name, x, mask, heads):
    rows, length, D = x.shape
    bias = torch.cat([w[f"{name}.q_bias"], torch.zeros(D), w[f"{name}.v_bias"]])
    qkv = (x @ w[f"{name}.qkv.weight"].transpose(0, 1) + bias).reshape(rows, length, 3, heads, D // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = (q * (D // heads) ** -0.5) @ k.transpose(-2, -1)
    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return dense(w, f"{name}.proj", (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(rows, length, D))


def multiway(w, c, i, x, mask, kind):
    """Block i. `kind` is "imag" or "text" for one modality, "vl" for both or, in the second ITC, for one."""
    name = f"transformer.blocks.{i}"

    def expert(part, kind):
        hidden = layer_norm(w, f"{name}.norm2_{kind}", part, c.eps)
        return dense(w, f"{name}.mlp_{kind}.fc2", gelu(dense(w, f"{name}.mlp_{kind}.fc1", hidden)))

    x = x + w[f"{name}.gamma_1"] * attention(w, f"{name}.attn", layer_norm(w, f"{name}.norm1", x, c.eps), mask, c.heads)
    if kind == "vl" and i < c.depth - c.pair_depth:
        words, patches = x[:, : c.max_text], x[:, c.max_text :]
        change = torch.cat([expert(words, "text"), expert(patches, "imag")], dim=1)
    else:
        change = expert(x, kind)
    return x + w[f"{name}.gamma_2"] * change


def embed_image(w, c, images):
    name = "transformer.patch_embed.proj"
    x = F.conv2d(images, w[f"{name}.weight"], w[f"{name}.bias"], stride=c.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([w["transformer.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["transformer.pos_embed"]
    return x + w["token_type_embeddings.weight"][1], torch.ones(x.shape[:2], dtype=torch.bool)


def embed_text(w, c, ids, mask):
    """Always as long as the longest text can be."""
    ids, mask = (F.pad(x, (0, c.max_text - x.shape[1])) for x in (ids, mask))
    x = w["text_embeddings.word_embeddings.weight"][ids] + w["text_embeddings.position_embeddings.weight"]
    x = x + w["text_embeddings.token_type_embeddings.weight"][0]
    return layer_norm(w, "text_embeddings.LayerNorm", x, c.text_eps) + w["token_type_embeddings.weight"][0], mask


def infer_one(w, c, x, mask, kind):
    """One modality: final states, and the vectors of both ITCs."""
    side, low, last = {"imag": "image", "text": "text"}[kind], c.depth - c.pair_depth, partial(layer_norm, eps=c.eps)
    hidden = [x]
    for i in range(c.depth):
        hidden.append(multiway(w, c, i, hidden[-1], mask, kind))
    other = hidden[low]
    for i in range(low, c.depth):
        other = multiway(w, c, i, other, mask, "vl")
    states, other = (last(w, "transformer.norm", y) for y in (hidden[-1], other))
    vectors = []
    for name, y in (("itc", states), ("itc_vl", other)):
        vector = y[:, 0] @ w[f"{name}_{side}_proj.fc.weight"].transpose(0, 1)
        vectors.append(vector / vector.norm(dim=-1, keepdim=True))
    return states, *vectors


def infer_pair(w, c, images, ids, mask):
    """Pooled, states of the words, states of the picture."""
    text, mask = embed_text(w, c, ids, mask)
    image, seen = embed_image(w, c, images)
    x, mask = torch.cat([text, image], dim=1), torch.cat([mask, seen], dim=1)
    for i in range(c.depth):
        x = multiway(w, c, i, x, mask, "vl")
    x = layer_norm(w, "transformer.norm", x, c.eps)
    return torch.tanh(dense(w, "pooler.dense", x[:, 0])), x[:, : c.max_text], x[:, c.max_text :]


def guess_words(w, c, states):
    x = gelu(dense(w, "mlm_score.transform.dense", states))
    x = layer_norm(w, "mlm_score.transform.LayerNorm", x, c.text_eps)
    return x @ w["mlm_score.decoder.weight"].transpose(0, 1) + w["mlm_score.bias"]


def expected_outputs(w, c, images, ids, mask):
    image, image_itc, image_vl = infer_one(w, c, *embed_image(w, c, images), "imag")
    text, text_itc, text_vl = infer_one(w, c, *embed_text(w, c, ids, mask), "text")
    pooled, words, patches = infer_pair(w, c, images, ids, mask)
    n = ids.shape[1]
    return {
        "image": image, "text": text[:, :n], "image_itc": image_itc, "image_vl": image_vl, "text_itc": text_itc,
        "text_vl": text_vl, "pooled": pooled, "fused_text": words[:, :n], "fused_image": patches,
        "match": dense(w, "itm_score.fc", pooled), "words": guess_words(w, c, words[:, :n]),
    }  # fmt: skip


def outputs(model, images, ids, mask):
    image, text = model.look(images), model.read(ids, mask)
    pictures_, texts_ = model.towers(image, "image"), model.towers(text, "text", mask)
    pooled, named = model(images, ids, mask)
    return {
        "image": model.image_states(images), "text": model.text_states(ids, mask), "image_itc": pictures_["itc"],
        "image_vl": pictures_["itc_vl"], "text_itc": texts_["itc"], "text_vl": texts_["itc_vl"], "pooled": pooled,
        "fused_text": named["text"], "fused_image": named["image"], "match": model.match(text, mask, image),
        "words": model.mlm_head(named["text"]),
    }  # fmt: skip


def at_words(named, mask):
    """Without what stands at the padding, which has another length there."""
    return named | {name: named[name][mask] for name in ("text", "fused_text", "words")}


IMAGE, TEXT = {"image", "image_itc", "image_vl"}, {"text", "text_itc", "text_vl"}
FUSED = {"pooled", "fused_text", "fused_image", "match", "words"}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_the_official_code(name):
    w, ours = pair(name)
    c = ours.config
    images, (ids, mask) = pictures(c), texts()
    expected = expected_outputs(w, c, images, ids, mask)
    assert_all_close(at_words(outputs(ours, images, ids, mask), mask), at_words(expected, mask))
    assert_close(ours.encode_image(images), expected["image_itc"])
    assert_close(ours.encode_text(ids), expected["text_itc"])

    # Agreement would be worth nothing if the outputs did not depend on all that goes in.
    for changed, touched in (
        ((pictures(c, seed=1), ids, mask), IMAGE),
        ((images.roll(c.patch_size, dims=-1), ids, mask), IMAGE),
        ((images, torch.where(mask, texts(seed=1)[0], 0), mask), TEXT),
        ((images, ids, mask & (torch.arange(L) < 2)), TEXT),
    ):
        other = expected_outputs(w, c, *changed)
        for output in IMAGE | TEXT | FUSED:
            if output in touched | FUSED:
                assert_differ(other[output], expected[output])
            else:  # picture and words know nothing of each other before they are fused
                assert torch.equal(other[output], expected[output])
        assert_all_close(at_words(outputs(ours, *changed), changed[2]), at_words(other, changed[2]))


@torch.no_grad()
def test_trimmed_text_is_padded_text():
    """The official code must be given texts of one length, where it cuts; ours may be given any."""
    w, ours = pair()
    images, (ids, mask) = pictures(ours.config), texts()
    expected = at_words(expected_outputs(w, ours.config, images, ids, mask), mask)
    for n in (0, 1, 3):
        padded, seen = F.pad(ids, (0, n), value=7), F.pad(mask, (0, n))
        assert_all_close(at_words(outputs(ours, images, padded, seen), seen), expected)
    for b, n in enumerate(mask.sum(dim=1)):
        alone = outputs(ours, images[b : b + 1], ids[b : b + 1, :n], mask[b : b + 1, :n])
        for name in ("pooled", "text_itc", "text_vl", "match"):
            assert_close(alone[name][0], expected[name][b])


# Common mistakes, each made in our model.
def other_routes(change):
    """Block i's route is what `change(i, text, image)` says, in pairs alone."""

    def spoil(model):
        right = model.run

        def run(self, x, along, *, start=0, **how):
            if len({name for name, _ in along[0]}) == 2:
                (_, text), (_, image) = along[0]
                along = [change(i, text, image) for i in range(len(along))]
            return right(x, along, start=start, **how)

        model.run = MethodType(run, model)

    return spoil


def vl_ffn_everywhere(model):
    for block in list(model.blocks)[:2]:
        block.experts["pair"] = model.blocks[2].experts["pair"]
    other_routes(lambda i, text, image: [("pair", text + image)])(model)


vl_ffn_nowhere = other_routes(lambda i, text, image: [("text", text), ("image", image)])
vl_ffn_in_the_last_block_alone = other_routes(
    lambda i, text, image: [("pair", text + image)] if i == 3 else [("text", text), ("image", image)]
)
experts_exchanged_below = other_routes(
    lambda i, text, image: [("pair", text + image)] if i > 1 else [("image", text), ("text", image)]
)
cut_at_another_place = other_routes(
    lambda i, text, image: [("pair", text + image)] if i > 1 else [("text", text + 1), ("image", image - 1)]
)


def late_fusion(model):
    """Words and patches do not meet in the lower blocks."""
    for block in list(model.blocks)[:2]:
        right = block.forward

        def forward(self, x, route, *, mask=None, right=right, **how):
            if len(route) == 2:
                text = torch.arange(x.shape[1]) < route[0][1]
                mask = mask & (text[:, None] == text[None])
            return right(x, route, mask=mask, **how)

        block.forward = MethodType(forward, block)


def pooled_at_the_pictures_class_token(model):
    right = model.fuse

    def fuse(text, image, mask=None, **how):
        named = right(text, image, mask)[1]
        return torch.tanh(model.pooler(named["image"][:, 0])), named

    model.fuse = fuse


def padding_seen_in_pairs(model):
    right = model.fuse
    model.fuse = lambda text, image, mask=None, **how: right(text, image, None, **how)


def attention_norm_of_one_block(model):
    model.blocks[1].norm1.eps = 0.1


def vision_expert_in_the_second_itc(model):
    model.blocks[3].experts["pair"] = model.blocks[3].experts["image"]


def projections_exchanged(model):
    model.itc_text_proj, model.itc_vl_text_proj = model.itc_vl_text_proj, model.itc_text_proj


def types_exchanged(model):
    types = model.embed.types.weight
    types.copy_(types.flip(0))


def scores_exchanged(model):
    for tensor in model.itm_head.parameters():
        tensor.copy_(tensor.flip(0))


def tied_decoder(model):
    model.mlm_head.decoder.weight.copy_(model.embed.text.word.weight)


WRONG = {  # the mistake -> the outputs that it must change, and no others
    vl_ffn_everywhere: FUSED,
    vl_ffn_nowhere: FUSED,
    vl_ffn_in_the_last_block_alone: FUSED,
    experts_exchanged_below: FUSED,
    cut_at_another_place: FUSED,
    late_fusion: FUSED,
    pooled_at_the_pictures_class_token: {"pooled", "match"},
    padding_seen_in_pairs: FUSED,
    attention_norm_of_one_block: IMAGE | TEXT | FUSED,
    vision_expert_in_the_second_itc: {"image_vl", "text_vl"} | FUSED,
    projections_exchanged: {"text_itc", "text_vl"},
    scales_exchanged: IMAGE | TEXT | FUSED,
    no_scales: IMAGE | TEXT | FUSED,
    keys_and_values: IMAGE | TEXT | FUSED,
    words_expert: IMAGE | FUSED,
    pairs_expert: {"image", "image_itc"},
    shared_second_norm: IMAGE | FUSED,
    tanh_gelu: IMAGE | TEXT | FUSED,
    other_heads: IMAGE | TEXT | FUSED,
    no_last_norm: IMAGE | TEXT | FUSED,
    no_type: IMAGE | TEXT | FUSED,
    types_exchanged: IMAGE | TEXT | FUSED,
    scores_exchanged: {"match"},
    tied_decoder: {"words"},
}
NAMES = {mistake: name for name, mistake in list(globals().items()) if callable(mistake)}


@pytest.mark.parametrize("spoil", WRONG, ids=NAMES.get)
@torch.no_grad()
def test_the_tolerance_would_notice(spoil):
    """The comparison rejects the mistakes it is there for, and finds them where they are."""
    w, ours = pair()
    images, (ids, mask) = pictures(ours.config), texts()
    expected = at_words(expected_outputs(w, ours.config, images, ids, mask), mask)
    spoil(ours)
    found = at_words(outputs(ours, images, ids, mask), mask)
    off = {name: (found[name] - expected[name]).abs().max().item() for name in expected}
    assert {name for name, distance in off.items() if distance > 5 * TOLERANCE} == WRONG[spoil], off


# --- the losses of stage 3 -------------------------------------------------------------------------------------------

PAIRS = 4
OTHER_TEXT, OTHER_IMAGE = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 3, 0])


def step_batch(c, *, seed=0):
    """Pictures, texts, the same with words hidden."""
    ids, mask = texts(seed=seed, lengths=(L, 6, 4, 7))
    labels = torch.full_like(ids, IGNORE)
    for place in ((0, 2), (0, 4), (1, 1), (3, 3), (3, 6)):  # one text is left whole
        labels[place] = ids[place]
    return pictures(c, seed=seed, count=PAIRS), ids, mask, torch.where(labels != IGNORE, 4, ids), labels


def their_losses(w, c, images, ids, mask, hidden, labels):
    """The official losses with the wrong partners given, and the similarities to draw them by."""
    losses, own = {}, torch.arange(PAIRS)
    image, text = (
        infer_one(w, c, *embed_image(w, c, images), "imag"),
        infer_one(w, c, *embed_text(w, c, ids, mask), "text"),
    )
    for name, scale, v, t in (
        ("itc", "logit_scale", image[1], text[1]), ("itc_vl", "logit_vl_scale", image[2], text[2])
    ):  # fmt: skip
        per_image = w[scale].exp() * v @ t.T
        chances = per_image.log_softmax(1)[own, own] + per_image.T.log_softmax(1)[own, own]
        losses[name] = -chances.mean() / 2 / 2  # two directions, two ITCs
        if name == "itc":
            similarity = per_image.detach()
    right, wrong_image, wrong_text = (
        dense(w, "itm_score.fc", infer_pair(w, c, *triple)[0]).log_softmax(dim=1)
        for triple in (
            (images, ids, mask),
            (images[OTHER_IMAGE], ids, mask),
            (images, ids[OTHER_TEXT], mask[OTHER_TEXT]),
        )
    )
    losses["itm"] = -torch.cat([right[:, 1], wrong_image[:, 0], wrong_text[:, 0]]).mean()
    scores = guess_words(w, c, infer_pair(w, c, images, hidden, mask)[1][:, :L])
    asked = labels != IGNORE
    losses["mlm"] = -0.25 * scores[asked].log_softmax(-1)[torch.arange(int(asked.sum())), labels[asked]].mean()
    return losses, similarity


def lesson_losses(model, batch, monkeypatch, **options):
    """The lesson's own, but that the wrong partners are given. Each noise says which are asked for."""
    asked_by = {}

    def given(similarity, forbidden, noise):
        which = ("text", "image")[int(noise[0])]
        assert torch.equal(forbidden, torch.eye(PAIRS, dtype=torch.bool))
        asked_by[which] = similarity
        return {"text": OTHER_TEXT, "image": OTHER_IMAGE}[which]

    monkeypatch.setattr(lesson06, "hard_negatives", given)
    noise = torch.tensor([0.0, 1.0])[:, None].expand(-1, PAIRS)
    losses = lesson06.vlmo_loss(model, *batch, torch.eye(PAIRS, dtype=torch.bool), noise, **options)
    return losses, asked_by


@pytest.mark.parametrize("name", ["plain", "one block with VL-FFN", "eps 0.1"])
def test_losses_and_gradients_equal(name, monkeypatch):
    """All losses of a step, the similarities to draw wrong partners by, and what every parameter is taught."""
    w, ours = pair(name)
    seen = []
    for seed in range(2):
        batch = step_batch(ours.config, seed=seed)
        for side in (*w.values(), *ours.parameters()):
            side.grad = None
        expected, similarity = their_losses(w, ours.config, *batch)
        found, asked_by = lesson_losses(ours, batch, monkeypatch)
        assert_all_close(found, expected)
        assert_close(asked_by["text"], similarity)
        assert_close(asked_by["image"], similarity.T)
        for losses in (expected, found):
            sum(losses.values()).backward()
        assert_same_gradients(ours, w)
        seen.append({which: loss.item() for which, loss in expected.items()})
    assert all(abs(seen[0][loss] - seen[1][loss]) > 10 * TOLERANCE for loss in seen[0]), seen


def assert_same_gradients(ours, w):
    """The same for every parameter, within 1e-5 of the largest number or, where that is smaller than 1, of 1."""
    expected, segments = to_ours({name: tensor.grad for name, tensor in w.items()})
    own = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert own.keys() == expected.keys()
    own["segment"], expected["segment"] = own["embed.text.position.weight"].sum(0), segments[0]
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert largest > 1e-5, name  # there is something that could be wrong
        torch.testing.assert_close(
            own[name], gradient, rtol=0, atol=TOLERANCE * max(1, largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@torch.no_grad()
def test_each_loss_can_be_left_out(monkeypatch):
    w, ours = pair()
    batch = step_batch(ours.config)
    expected, _ = their_losses(w, ours.config, *batch)
    for options, names in ((dict(itm=False), {"itc", "itc_vl", "mlm"}), (dict(mlm=0.0), {"itc", "itc_vl", "itm"})):
        found, _ = lesson_losses(ours, batch, monkeypatch, **options)
        assert_all_close(found, {name: expected[name] for name in found})
        assert found.keys() == names
    found, _ = lesson_losses(ours, batch, monkeypatch, second_itc=False, mlm=1.0)
    assert_all_close(found, {"itc": 2 * expected["itc"], "itm": expected["itm"], "mlm": 4 * expected["mlm"]})


WRONG_STEPS = {  # the mistake -> the losses that it changes
    "partners exchanged": "itm",
    "own words as the wrong ones": "itm",
    "masks left behind": "itm",
    "nothing hidden": "mlm",
    "one scale for both": "itc_vl",
    "the first vectors twice": "itc_vl",
}


@pytest.mark.parametrize("wrong", WRONG_STEPS)
@torch.no_grad()
def test_a_wrong_step_is_noticed(wrong, monkeypatch):
    w, ours = pair()
    images, ids, mask, hidden, labels = batch = step_batch(ours.config)
    expected, _ = their_losses(w, ours.config, *batch)
    if wrong == "partners exchanged":
        for name, other in (("OTHER_TEXT", OTHER_IMAGE), ("OTHER_IMAGE", OTHER_TEXT)):
            monkeypatch.setitem(globals(), name, other)
    if wrong == "own words as the wrong ones":
        monkeypatch.setitem(globals(), "OTHER_TEXT", torch.arange(PAIRS))
    if wrong == "masks left behind":
        right = ours.match
        ours.match = lambda text, _, image: right(text, mask.repeat(3, 1), image)
    if wrong == "nothing hidden":
        hidden = ids
    if wrong == "one scale for both":
        ours.logit_vl_scale.copy_(ours.logit_scale + 0.5)
    if wrong == "the first vectors twice":
        towers = ours.towers
        ours.towers = lambda *inputs: dict.fromkeys(("itc", "itc_vl"), towers(*inputs)["itc"])
    found, _ = lesson_losses(ours, (images, ids, mask, hidden, labels), monkeypatch)
    off = {name: (found[name] - expected[name]).abs().item() for name in expected}
    assert {name for name, distance in off.items() if distance > 100 * TOLERANCE} == {WRONG_STEPS[wrong]}, off


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "millions"), [("base", 175), ("large", 561)])
def test_every_tensor_at_full_size(name, millions):
    """Every tensor of an official file has its place. What is counted there: blocks, patches and the word table."""
    c = paper_config(name)
    with torch.device("meta"):
        weights, model = {key: torch.empty(shape) for key, shape in official_shapes(c).items()}, VLMo(c)
        ours, _ = to_ours(weights)
    own = model.state_dict()
    rest = {"embed.mask_patch", "mim_head.weight", "mim_head.bias"}
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in own.items() if key not in rest
    }
    counted = ("transformer.blocks.", "transformer.patch_embed", "transformer.norm", "text_embeddings.word_embeddings")
    assert sum(v.numel() for k, v in weights.items() if k.startswith(counted)) // 10**6 == millions
    keys, segments = c.depth * c.width, 2 * c.width
    extra = sum(own[key].numel() for key in rest)
    assert count_parameters(model) == sum(v.numel() for v in weights.values()) + keys - segments + extra
