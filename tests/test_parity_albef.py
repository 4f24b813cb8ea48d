"""Our ALBEF beside other people's parts of it: the same numbers within 1e-5.

transformers has no ALBEF. Its ViT reads the picture, its BERT the words, and the layers in which words ask the picture
are those of BLIP's text model, by the same authors and of the same kind. The heads, the losses and the training step,
which is lesson 05's own, are written out here a second time.
"""

from __future__ import annotations

import copy
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from parity_helpers import TOLERANCE, assert_close, assert_differ, random_pictures, randomise
from torch import nn

from minivlp.layers import count_parameters
from minivlp.lessons import albef as lesson05
from minivlp.losses import IGNORE, distilled_contrastive_loss, distilled_lm_loss, hard_negatives
from minivlp.models.albef import (
    ALBEF,
    ALBEFConfig,
    MomentumALBEF,
    clamp_temperature,
    follow,
    paper_config,
)
from minivlp.pretrained import VIT_NAMES, join_trunk, rename

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

SMALL = dict(
    image_size=32, patch_size=8, image_width=32, image_depth=3, image_heads=4, vocab_size=50, max_text=12,
    text_width=32, text_depth=2, fusion_depth=2, text_heads=4, embed_dim=20,
)  # fmt: skip
VARIANTS = {
    "plain": {},
    "image eps 0.1": dict(image_eps=0.1),  # absurd, so that an ignored eps cannot hide
    "text eps 0.1": dict(text_eps=0.1),
    "narrow MLP": dict(mlp_ratio=2),
    "a wider picture": dict(image_width=48),
    "wider words": dict(text_width=48),
    "one head for the picture": dict(image_heads=1),
    "one head for the words": dict(text_heads=1),
    "eight heads for the words": dict(text_heads=8),
    "one block each": dict(image_depth=1, text_depth=1, fusion_depth=1),
    "a deep upper half": dict(text_depth=1, fusion_depth=4),
    "a deep lower half": dict(text_depth=4, fusion_depth=1),
    "patch 4": dict(patch_size=4),
    "patch 16": dict(patch_size=16),
    "larger pictures": dict(image_size=48),
    "one channel": dict(channels=1),
    "long texts": dict(max_text=40),
    "another vocabulary": dict(vocab_size=70),
    "small shared space": dict(embed_dim=5),
    "large shared space": dict(embed_dim=64),
    "dropout": dict(dropout=0.1),  # asleep
}
L = 9


class Oracle(nn.Module):
    """The same model from other people's parts."""

    def __init__(self, c: ALBEFConfig):
        super().__init__()
        self.config = c
        self.vit = transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=c.image_width, num_hidden_layers=c.image_depth, num_attention_heads=c.image_heads,
                intermediate_size=c.mlp_ratio * c.image_width, image_size=c.image_size, patch_size=c.patch_size,
                num_channels=c.channels, layer_norm_eps=c.image_eps, hidden_dropout_prob=c.dropout,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        bert = dict(
            hidden_size=c.text_width, num_attention_heads=c.text_heads, intermediate_size=c.mlp_ratio * c.text_width,
            vocab_size=c.vocab_size, max_position_embeddings=c.max_text, layer_norm_eps=c.text_eps,
            hidden_dropout_prob=c.dropout, attention_probs_dropout_prob=0.0, pad_token_id=0,
        )  # fmt: skip
        # The lower half and, tied to its word table, the head for hidden words.
        self.bert = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=c.text_depth, **bert))
        # BERT's own layers have cross-attention in decoders only, and for a picture of the words' width only. BLIP's
        # have it wherever `is_decoder` stands in the configuration, and look one way only if called so.
        upper = dict(num_hidden_layers=c.fusion_depth, encoder_hidden_size=c.image_width, is_decoder=True)
        upper |= dict(bos_token_id=1, eos_token_id=2, sep_token_id=2)  # unused; the defaults are outside the vocabulary
        self.fusion = transformers.BlipTextModel(transformers.BlipTextConfig(**bert, **upper), add_pooling_layer=False)
        self.vision_proj = nn.Linear(c.image_width, c.embed_dim)
        self.text_proj = nn.Linear(c.text_width, c.embed_dim)
        self.itm_head = nn.Linear(c.text_width, 2)
        self.temp = nn.Parameter(torch.tensor(c.temperature))

    def look(self, images):
        return self.vit(images).last_hidden_state

    def read(self, ids, mask):
        return self.bert.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def fuse(self, states, mask, image):
        """The fused states (B, L, D) and where words look in each layer, a list of (B, heads, L, S)."""
        fused = self.fusion(
            encoder_embeds=states, attention_mask=mask.long(), encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long), is_decoder=False,
            output_attentions=True,
        )  # fmt: skip
        return fused.last_hidden_state, fused.cross_attentions

    def image_vector(self, image):
        v = self.vision_proj(image[:, 0])
        return v / v.norm(dim=-1, keepdim=True)

    def text_vector(self, states):
        w = self.text_proj(states[:, 0])
        return w / w.norm(dim=-1, keepdim=True)

    def match(self, states, mask, image):
        return self.itm_head(self.fuse(states, mask, image)[0][:, 0])

    def words(self, fused):
        return self.bert.cls(fused)


LAYER_NAMES = (
    (r"\.attention\.self\.query\.", ".attn.q."),
    (r"\.attention\.self\.key\.", ".attn.k."),
    (r"\.attention\.self\.value\.", ".attn.v."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.crossattention\.self\.query\.", ".cross.attn.q."),
    (r"\.crossattention\.self\.key\.", ".cross.attn.k."),
    (r"\.crossattention\.self\.value\.", ".cross.attn.v."),
    (r"\.crossattention\.output\.dense\.", ".cross.attn.proj."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross.norm."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.output\.LayerNorm\.", ".norm2."),
)
TEXT_NAMES = (
    (r"^bert\.bert\.embeddings\.word_embeddings\.", "text.embed.word."),
    (r"^bert\.bert\.embeddings\.position_embeddings\.", "text.embed.position."),
    (r"^bert\.bert\.embeddings\.token_type_embeddings\.", "text.embed.segment."),
    (r"^bert\.bert\.embeddings\.LayerNorm\.", "text.embed.norm."),
    (r"^bert\.bert\.encoder\.layer\.", "text.text_blocks."),
    (r"^fusion\.encoder\.layer\.", "text.fusion_blocks."),
    (r"^bert\.cls\.predictions\.transform\.dense\.", "mlm_head.dense."),
    (r"^bert\.cls\.predictions\.transform\.LayerNorm\.", "mlm_head.norm."),
    (r"^bert\.cls\.predictions\.decoder\.", "mlm_head.decoder."),
    *LAYER_NAMES,
)
# The other name of the decoder's bias; BLIP's own embeddings, since its layers are given states.
UNUSED = (r"^bert\.cls\.predictions\.bias$", r"^fusion\.embeddings\.", r"position_ids$", r"token_type_ids$")


def under_our_names(theirs, tensors):
    """Tensors of an `Oracle` by its names, weights or gradients -> by the names of our ALBEF, and the segments."""
    c, vit = theirs.config, {}
    for name in [name for name in tensors if name.startswith("vit.")]:
        vit[name] = tensors.pop(name)
    vit = join_trunk(rename(vit, VIT_NAMES), {}, width=c.image_width, depth=c.image_depth, patches="embed.patch_embed")
    ours = rename(tensors, TEXT_NAMES, drop=UNUSED) | {f"vision.{name}": tensor for name, tensor in vit.items()}
    for name in [name for name in ours if ".attn.k." in name]:
        ours[name.replace(".k.", ".kv.")] = torch.cat([ours.pop(name), ours.pop(name.replace(".k.", ".v."))])
    return ours, ours.pop("text.embed.segment.weight")


def as_ours(theirs):
    """The weights of an `Oracle` as those of our ALBEF; the segment vector of all words goes into their positions."""
    weights, segments = under_our_names(theirs, dict(theirs.state_dict()))
    weights["text.embed.position.weight"] = weights["text.embed.position.weight"] + segments[0]
    return weights


def copy_weights(ours, theirs):
    """Into our ALBEF, or into a teacher, which has no matching head."""
    weights = as_ours(theirs)
    if not hasattr(ours, "itm_head"):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("itm_head.")}
    ours.load_state_dict(weights)


def gradients(theirs):
    """Those of an `Oracle` by the names of our ALBEF, and that of the segment vectors."""
    named = theirs.named_parameters(remove_duplicate=False)
    return under_our_names(theirs, {name: p.grad for name, p in named if p.grad is not None})


def pair(name="plain", **options):
    """An `Oracle` with random weights and our ALBEF with the same."""
    c = ALBEFConfig(**(SMALL | VARIANTS[name] | options))
    theirs, ours = randomise(Oracle(c)), ALBEF(c).eval()
    theirs.temp.data.fill_(c.temperature)
    for layer in theirs.fusion.encoder.layer:  # so that a word looks at some patches and not at all of them alike
        layer.crossattention.self.query.weight.data *= 5
    copy_weights(ours, theirs)
    return theirs, ours


def pictures(model, *, seed=0, count=3):
    return random_pictures(model.config.image_size, model.config.channels, seed=seed, count=count)


def texts(*, seed=0, lengths=(L, 6, 3)):
    """ids (B, L) with 0 at the padding, and the mask."""
    ids = torch.randint(5, SMALL["vocab_size"], (len(lengths), L), generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    return ids * mask, mask


def outputs(ours, images, ids, mask):
    """All that our model can say about pairs, by name."""
    named = ours(images, ids, mask)
    fused, cross = ours.text(ids, mask, named["image"], everything=True)
    return named | cross | {"fused": fused, "words": ours.mlm_head(fused)}


def expected_outputs(theirs, images, ids, mask):
    image, text = theirs.look(images), theirs.read(ids, mask)
    fused, cross = theirs.fuse(text, mask, image)
    return {
        "image": image, "text": text, "image vector": theirs.image_vector(image),
        "text vector": theirs.text_vector(text), "match": theirs.itm_head(fused[:, 0]), "fused": fused,
        "words": theirs.words(fused),
    } | {f"cross_{i}": weights for i, weights in enumerate(cross)}  # fmt: skip


def assert_all_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_equals_other_peoples_parts(name):
    theirs, ours = pair(name)
    c = ours.config
    images, (ids, mask) = pictures(ours), texts()
    expected, found = expected_outputs(theirs, images, ids, mask), outputs(ours, images, ids, mask)
    assert_all_close(found, expected)

    # Read then fuse is the whole, to the last bit; so is the shorter way to the class token, up to rounding.
    image, text = found["image"], found["text"]
    assert torch.equal(ours.text.fuse(text, mask, image, everything=True)[0], found["fused"])
    assert_close(ours.text.fuse(text, mask, image)[0], found["fused"])
    assert_close(ours.text(ids, mask, image, rows=1)[0], expected["fused"][:, :1])
    for i in range(c.fusion_depth):
        weights = found[f"cross_{i}"]
        assert weights.shape == (3, c.text_heads, L, (c.image_size // c.patch_size) ** 2 + 1)
        assert_close(weights.sum(dim=-1), torch.ones(3, c.text_heads, L))
        assert (weights.max() - weights.min()) > 0.01  # far from uniform, or other weights would look alike
    for vector in ("image vector", "text vector"):
        assert_close(found[vector].norm(dim=-1), torch.ones(3))

    # Agreement would be worth nothing if the outputs did not depend on all that goes in.
    other_ids = torch.where(mask, texts(seed=1)[0], 0)
    fewer = mask & (torch.arange(L) < 2)
    for changed, touched in (
        ((pictures(ours, seed=1), ids, mask), ("image", "image vector")),
        ((images.roll(c.patch_size, dims=-1), ids, mask), ("image", "image vector")),
        ((images, other_ids, mask), ("text", "text vector")),
        ((images, ids, fewer), ("text", "text vector")),
    ):
        other = expected_outputs(theirs, *changed)
        for output in ("image", "image vector", "text", "text vector"):
            if output in touched:
                assert_differ(other[output], expected[output])
            else:  # picture and words know nothing of each other before they are fused
                assert torch.equal(other[output], expected[output])
        for output in ("fused", "match", "words", "cross_0"):
            assert_differ(other[output], expected[output])
        assert_all_close(outputs(ours, *changed), other)


@torch.no_grad()
def test_nobody_reads_the_padding():
    theirs, ours = pair()
    images, (ids, mask) = pictures(ours), texts()
    found = outputs(ours, images, torch.where(mask, ids, 7), mask)
    expected = expected_outputs(theirs, images, ids, mask)
    for name in ("match", "text vector"):
        assert_close(found[name], expected[name])
    for name in ("text", "fused", "words"):
        assert_close(found[name][mask], expected[name][mask])
        assert (found[name] - expected[name])[~mask].abs().max() > 0.1  # where the padding was put it shows
    for b, n in enumerate(mask.sum(dim=1)):  # alone and without padding
        alone = expected_outputs(theirs, images[b : b + 1], ids[b : b + 1, :n], mask[b : b + 1, :n])
        assert_close(found["fused"][b, :n], alone["fused"][0])
        assert_close(found["match"][b], alone["match"][0])


def test_the_word_table_is_tied_in_both():
    theirs, ours = pair()
    assert ours.mlm_head.decoder.weight is ours.text.embed.word.weight
    assert theirs.bert.cls.predictions.decoder.weight is theirs.bert.bert.embeddings.word_embeddings.weight


def test_gradients_equal():
    theirs, ours = pair("a wider picture")
    images, (ids, mask) = pictures(ours), texts()
    generator = torch.Generator().manual_seed(3)
    found, expected = outputs(ours, images, ids, mask), expected_outputs(theirs, images, ids, mask)
    for name in ("image vector", "text vector", "match", "words"):
        weight = torch.randn(expected[name].shape, generator=generator)
        if name == "words":  # what stands at the padding is asked by no loss
            weight = weight * mask[..., None]
        for output in (found, expected):
            (output[name] * weight).mean().backward(retain_graph=True)
    expected = assert_same_gradients(ours, theirs)
    assert ours.temp.grad is None and expected.keys() == {name for name, _ in ours.named_parameters()} - {"temp"}


def assert_same_gradients(ours, theirs, *, scale=1.0):
    """The same for every parameter, within 1e-5 of the largest number or, where that is smaller than 1, of 1."""
    expected, segments = gradients(theirs)
    expected.pop("mlm_head.decoder.weight")  # the word table under its second name
    # Every word has the first of the segment vectors, whose work its position has taken over.
    pairs = {name: (ours.get_parameter(name).grad, gradient) for name, gradient in expected.items()}
    pairs["the segment"] = expected["text.embed.position.weight"].sum(dim=0), segments[0]
    for name, (own, gradient) in pairs.items():
        largest = gradient.abs().max().item()
        assert largest > 1e-5, name  # there is something that could be wrong
        torch.testing.assert_close(
            own, gradient, rtol=0, atol=TOLERANCE * scale * max(1, largest),
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
    assert not segments[1].any()
    return expected


# Common mistakes, each made in our model.
def forward_of(block, forward):
    block.forward = MethodType(forward, block)


def cross_attention_forgotten(ours, theirs):
    forward_of(ours.text.fusion_blocks[1].cross, lambda self, x, image, **how: (x, None))


def cross_attention_first(ours, theirs):
    def forward(self, x, image, *, mask=None, rows=None, need_weights=False):
        x, weights = self.cross(x, image, need_weights=need_weights)
        x = self.norm1(x + self.attn(x, mask=mask)[0])
        return self.norm2(x + self.mlp(x))[:, :rows], weights

    forward_of(ours.text.fusion_blocks[0], forward)


def cross_attention_after_the_mlp(ours, theirs):
    def forward(self, x, image, *, mask=None, rows=None, need_weights=False):
        x = self.norm1(x + self.attn(x, mask=mask)[0])
        x, weights = self.cross(self.norm2(x + self.mlp(x)), image, need_weights=need_weights)
        return x[:, :rows], weights

    forward_of(ours.text.fusion_blocks[0], forward)


def pre_norm_above(ours, theirs):
    def forward(self, x, image, *, mask=None, rows=None, need_weights=False):
        x = x + self.attn(self.norm1(x), mask=mask)[0]
        answer, weights = self.cross.attn(self.cross.norm(x), image, need_weights=need_weights)
        x = x + answer
        return (x + self.mlp(self.norm2(x)))[:, :rows], weights

    for block in ours.text.fusion_blocks:
        forward_of(block, forward)


def pre_norm_below(ours, theirs):
    for block in ours.text.text_blocks:
        block.norm_first = True


def post_norm_in_the_picture(ours, theirs):
    for block in ours.vision.encoder.blocks:
        block.norm_first = False


def no_norm_after_the_picture(ours, theirs):
    ours.vision.encoder.norm = nn.Identity()


def patches_without_class_token(ours, theirs):
    right = ours.text.fuse
    ours.text.fuse = lambda states, mask, image, **how: right(states, mask, image[:, 1:], **how)


def padding_seen_below(ours, theirs):
    right = ours.text.read
    ours.text.read = lambda ids, mask: right(ids, torch.ones_like(mask))


def padding_seen_above(ours, theirs):
    right = ours.text.fuse
    ours.text.fuse = lambda states, mask, image, **how: right(states, torch.ones_like(mask), image, **how)


def words_look_back_only(ours, theirs):
    right = ours.text.text_blocks[0].attn.forward

    def forward(self, x, context=None, *, mask=None, need_weights=False):
        return right(x, context, mask=mask & torch.ones(L, L, dtype=torch.bool).tril(), need_weights=need_weights)

    forward_of(ours.text.text_blocks[0].attn, forward)


def keys_and_values(ours, theirs):
    kv = ours.text.fusion_blocks[0].cross.attn.kv
    kv.weight.copy_(kv.weight.roll(32, dims=0))


def heads_of_the_cross_attention(ours, theirs):
    ours.text.fusion_blocks[1].cross.attn.heads = 8


def norms(ours, theirs):
    block = ours.text.fusion_blocks[0]
    block.norm1, block.cross.norm = block.cross.norm, block.norm1


def eps_of_the_cross_attention(ours, theirs):
    ours.text.fusion_blocks[0].cross.norm.eps = 0.1


def eps_of_the_words(ours, theirs):
    ours.text.embed.norm.eps = 1e-3


def eps_of_the_guesses(ours, theirs):
    ours.mlm_head.norm.eps = 1e-3


def eps_of_the_picture(ours, theirs):
    ours.vision.encoder.norm.eps = 0.1


def tanh_gelu(ours, theirs):
    for block in ours.text.fusion_blocks:
        block.mlp.act = nn.GELU(approximate="tanh")


def no_token_types(ours, theirs):
    ours.text.embed.position.weight.sub_(theirs.bert.bert.embeddings.token_type_embeddings.weight[0])


def the_other_token_type(ours, theirs):
    first, second = theirs.bert.bert.embeddings.token_type_embeddings.weight
    ours.text.embed.position.weight.add_(second - first)


def halves_exchanged(ours, theirs):
    lower, upper = ours.text.text_blocks, ours.text.fusion_blocks
    for block, other in zip(lower, upper, strict=True):
        block.attn, other.attn = other.attn, block.attn


def vectors_not_of_length_1(ours, theirs):
    ours.image_vector = lambda states: ours.vision_proj(states[:, 0])


def vectors_of_all_tokens(ours, theirs):
    ours.text_vector = lambda states: F.normalize(ours.text_proj(states.mean(dim=1)), dim=-1)


def matching_before_fusion(ours, theirs):
    ours.match = lambda states, mask, image: ours.itm_head(states[:, 0])


def scores_exchanged(ours, theirs):
    for tensor in ours.itm_head.parameters():
        tensor.copy_(tensor.flip(0))


def no_bias_of_the_decoder(ours, theirs):
    ours.mlm_head.decoder.bias.zero_()


WRONG = {  # the mistake -> the outputs that it must change, and no others
    cross_attention_forgotten: "match fused words",
    cross_attention_first: "match fused words",
    cross_attention_after_the_mlp: "match fused words",
    pre_norm_above: "match fused words",
    pre_norm_below: "text text_vector match fused words",
    post_norm_in_the_picture: "image image_vector match fused words",
    no_norm_after_the_picture: "image image_vector match fused words",
    patches_without_class_token: "match fused words",
    padding_seen_below: "text text_vector match fused words",
    padding_seen_above: "match fused words",
    words_look_back_only: "text text_vector match fused words",
    keys_and_values: "match fused words",
    heads_of_the_cross_attention: "match fused words",
    norms: "match fused words",
    eps_of_the_cross_attention: "match fused words",
    eps_of_the_words: "text text_vector match fused words",
    eps_of_the_guesses: "words",
    eps_of_the_picture: "image image_vector match fused words",
    tanh_gelu: "match fused words",
    no_token_types: "text text_vector match fused words",
    the_other_token_type: "text text_vector match fused words",
    halves_exchanged: "text text_vector match fused words",
    vectors_not_of_length_1: "image_vector",
    vectors_of_all_tokens: "text_vector",
    matching_before_fusion: "match",
    scores_exchanged: "match",
    no_bias_of_the_decoder: "words",
}


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
@torch.no_grad()
def test_the_tolerance_would_notice(spoil):
    """The comparison rejects the mistakes it is there for, and finds them where they are."""
    theirs, ours = pair()
    images, (ids, mask) = pictures(ours), texts()
    expected = expected_outputs(theirs, images, ids, mask)
    assert_all_close(outputs(ours, images, ids, mask), expected)
    spoil(ours, theirs)
    named = ours(images, ids, mask)
    named["fused"] = ours.text.fuse(named["text"], mask, named["image"])[0]
    named["words"] = ours.mlm_head(named["fused"])
    off = {name: (named[name] - expected[name]).abs().max().item() for name in named}
    wrong = {name.replace(" ", "_") for name, distance in off.items() if distance > 5 * TOLERANCE}
    assert wrong == set(WRONG[spoil].split()), off


@torch.no_grad()
def test_guesses_of_the_text_half_alone_are_others():
    """What is often told, that the masked words are guessed without the picture, is another function."""
    theirs, ours = pair()
    images, (ids, mask) = pictures(ours), texts()
    right = theirs.words(theirs.fuse(theirs.read(ids, mask), mask, theirs.look(images))[0])
    assert_differ(ours.mlm_head(ours.text.read(ids, mask)), right)
    assert_close(ours.mlm_head(ours.text(ids, mask, ours.vision(images))[0]), right)


# --- the losses ------------------------------------------------------------------------------------------------------

ALPHAS = (0.0, 0.25, 0.4, 1.0)


def random_logits(B, M, *, seed=0, scale=5.0):
    return scale * torch.randn(B, M, generator=torch.Generator().manual_seed(seed))


def row_losses(logits, teacher, truths, alpha, allowed):
    """Row by row in float64: what ours should be, what the paper writes, and the teacher's entropy, each a mean.

    `truths` are the rows' lists of right columns, `allowed` those of the columns that take part.
    """
    own, paper, entropy = [], [], []
    for row, teacher_row, right, columns in zip(logits.double(), teacher.double(), truths, allowed, strict=True):
        log_p = row[columns] - torch.logsumexp(row[columns], dim=0)
        q = torch.exp(teacher_row[columns] - torch.logsumexp(teacher_row[columns], dim=0))
        right = [columns.index(column) for column in right if column in columns]
        hard = -sum(log_p[column] for column in right) / len(right)
        own.append((1 - alpha) * hard - alpha * (q * log_p).sum())
        paper.append((1 - alpha) * hard + alpha * (q * (q.log() - log_p)).sum())
        entropy.append(-(q * q.log()).sum())
    return tuple(torch.stack(values).mean() for values in (own, paper, entropy))


B, M = 4, 12
EVERY = [list(range(M))] * B
CASES = {  # right columns and columns that take part, of each row
    "one key is right": ([[0], [1], [2], [3]], EVERY),
    "several keys are right": ([[0, 2], [1], [0, 2, 11], [3, 7]], EVERY),
    "some keys take no part": ([[0], [1, 9], [2], [3]], [[*range(8)], [1, 9], [2, 3, 4], [*range(M)]]),
    "a right key takes no part": ([[0, 5], [1], [2], [3]], [[0, 1, 2, 3, 4, 6], *EVERY[1:]]),
}


def as_masks(right, allowed):
    positives, ignore = torch.zeros(B, M, dtype=torch.bool), torch.ones(B, M, dtype=torch.bool)
    for b in range(B):
        positives[b, right[b]], ignore[b, allowed[b]] = True, False
    return positives, ignore


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("case", CASES)
def test_distilled_contrastive_loss_equals_the_formula(case, alpha):
    right, allowed = CASES[case]
    positives, ignore = as_masks(right, allowed)
    one = case == "one key is right"
    logits, teacher = random_logits(B, M).requires_grad_(), random_logits(B, M, seed=1).requires_grad_()
    loss = distilled_contrastive_loss(
        logits, teacher, alpha, None if one else positives, ignore=ignore if ignore.any() else None
    )
    own, paper, entropy = row_losses(logits, teacher, right, alpha, allowed)
    assert_close(loss, own.float())

    # The paper's form has another value, by the teacher's entropy, and the same gradient.
    assert_close(loss - paper.float(), alpha * entropy.float())
    assert entropy > 0.01
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (papers,) = torch.autograd.grad(paper, logits)
    assert gradient.abs().max() > 0.01 and not gradient[ignore].any()
    assert_close(gradient, papers)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)  # the teacher is not taught
    if one:  # saying it as `positives` is the same
        assert_close(distilled_contrastive_loss(logits, teacher, alpha, positives), loss)

    # Each part matters, where there is one.
    with torch.no_grad():
        for wrong in (0.0, 1.0):
            other = distilled_contrastive_loss(logits, teacher, wrong, positives, ignore=ignore)
            assert ((other - loss).abs() > 0.01) == (wrong != alpha)
        if not one:
            first = distilled_contrastive_loss(logits, teacher, alpha, ignore=ignore)
            assert ((first - loss).abs() > 0.01) == (alpha < 1 and case != "a right key takes no part")
        if ignore.any():
            everything = distilled_contrastive_loss(logits, teacher, alpha, positives)
            assert (everything - loss).abs() > 0.01


def test_alpha_may_be_a_tensor():
    logits, teacher = random_logits(B, M), random_logits(B, M, seed=1)
    one, other = (distilled_contrastive_loss(logits, teacher, alpha) for alpha in (0.4, torch.tensor(0.4)))
    assert torch.equal(one, other)


WRONG_TARGETS = {
    "alpha = 1": lambda q, truth: q,
    "no teacher": lambda q, truth: truth,
    "weights exchanged": lambda q, truth: 0.6 * q + 0.4 * truth,
    "the teacher's choice alone": lambda q, truth: 0.4 * F.one_hot(q.argmax(dim=1), M) + 0.6 * truth,
    "positives at the queue's end": lambda q, truth: 0.4 * q + 0.6 * truth.roll(M - B, dims=1),
    "everything soft": lambda q, truth: 0.4 * q + 0.6 / M,
    "a target that sums to more than 1": lambda q, truth: q + truth,
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_other_targets_are_noticed(name):
    logits, teacher = random_logits(B, M).requires_grad_(), random_logits(B, M, seed=1)
    wrong = F.cross_entropy(logits, WRONG_TARGETS[name](teacher.softmax(dim=1), torch.eye(B, M)))
    right = distilled_contrastive_loss(logits, teacher, 0.4)
    assert_close(right, row_losses(logits, teacher, CASES["one key is right"][0], 0.4, EVERY)[0].float())
    assert (wrong - right).abs() > 0.01
    gradient, other = (torch.autograd.grad(loss, logits)[0] for loss in (right, wrong))
    assert (gradient - other).abs().max() > 0.01


def word_case():
    """States, labels of which five are asked, a head and the teacher's scores there."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, L, 16, generator=generator).requires_grad_()
    labels = torch.full((3, L), IGNORE)
    labels[[0, 0, 1, 2, 2], [1, 4, 7, 2, 8]] = torch.tensor([11, 3, 5, 5, 0])
    weight = torch.randn(20, 16, generator=generator)
    teacher = (3 * torch.randn(5, 20, generator=generator)).requires_grad_()
    return states, labels, lambda rows: rows @ weight.T, teacher


@pytest.mark.parametrize("alpha", ALPHAS)
def test_distilled_lm_loss_equals_the_formula(alpha):
    states, labels, head, teacher = word_case()
    places = [(b, i) for b in range(3) for i in range(L) if labels[b, i] != IGNORE]
    scores = torch.stack([head(states[b, i]) for b, i in places])
    everything = [list(range(20))] * 5
    own, paper, entropy = row_losses(scores, teacher, [[int(labels[place])] for place in places], alpha, everything)
    loss = distilled_lm_loss(head, states, labels, teacher, alpha)
    assert_close(loss, own.float())
    assert_close(loss - paper.float(), alpha * entropy.float())
    (gradient,) = torch.autograd.grad(loss, states, retain_graph=True)
    (papers,) = torch.autograd.grad(paper, states)
    assert_close(gradient, papers)
    assert torch.equal(gradient.abs().amax(dim=2) > 0, labels != IGNORE)  # nothing else is asked
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)

    # Usual wrong versions: other mixtures, the teacher's rows in another order, a mean over all positions.
    with torch.no_grad():
        hard = F.cross_entropy(scores, labels[labels != IGNORE])
        assert ((hard - loss).abs() > 0.01) == (alpha > 0)
        assert ((distilled_lm_loss(head, states, labels, teacher, 1.0) - loss).abs() > 0.01) == (alpha < 1)
        assert ((distilled_lm_loss(head, states, labels, teacher.flip(0), alpha) - loss).abs() > 0.01) == (alpha > 0)
        assert (loss * 5 / labels.numel() - loss).abs() > 0.01


@pytest.mark.parametrize("scale", [1.0, 5.0, 200.0])
def test_hard_negatives_are_drawn_with_the_chances_of_the_formula(scale):
    """The chances are BLIP's: softmax over the batch, 1e-4 more for each, none for those of the same group."""
    similarity = random_logits(5, 5, scale=scale)
    forbidden = torch.eye(5, dtype=torch.bool)
    forbidden[0, 3] = forbidden[3, 0] = True
    chances = similarity.double().softmax(dim=1) + 1e-4
    for i, j in forbidden.nonzero().tolist():
        chances[i, j] = 0
    chances = chances / chances.sum(dim=1, keepdim=True)
    # Over all noise, evenly spread, every column comes as often as its chance says.
    n = 50_000
    noise = ((torch.arange(n) + 0.5) / n).repeat_interleave(5)
    draws = hard_negatives(similarity.repeat(n, 1), forbidden.repeat(n, 1), noise).view(n, 5)
    shares = F.one_hot(draws, 5).double().mean(dim=0)
    torch.testing.assert_close(shares, chances, rtol=0, atol=3e-5)
    assert not shares[forbidden].any()

    # Usual wrong versions: the nearest one, any one, the pair itself among them.
    nearest = F.one_hot(similarity.masked_fill(forbidden, -torch.inf).argmax(dim=1), 5)
    evenly = (~forbidden) / (~forbidden).sum(dim=1, keepdim=True)
    assert (nearest - chances).abs().max() > 0.01
    assert (evenly - chances).abs().max() > 0.01
    assert (similarity.softmax(dim=1) - chances).abs().max() > 0.01
    if scale == 200:
        without = similarity.softmax(dim=1).masked_fill(forbidden, 0)
        assert (without / without.sum(dim=1, keepdim=True) - chances).nan_to_num().abs().max() > 9e-5
        # Where the official code stops, since nothing is left to draw from:
        alone = torch.diag(torch.full((5,), scale))
        assert alone.softmax(dim=1).masked_fill(forbidden, 0).sum() == 0
        drawn = hard_negatives(alone, forbidden, torch.full((5,), 0.5))
        assert not forbidden[torch.arange(5), drawn].any()


# --- the whole step --------------------------------------------------------------------------------------------------

MOMENTUM, QUEUE = 0.9, 8
PAIRS = 4


def step_batch(model, *, seed=0):
    """Pictures, texts, the same with words hidden, and the wrong partners, given by hand."""
    ids, mask = texts(seed=seed, lengths=(L, 6, 4, 7))
    labels = torch.full_like(ids, IGNORE)
    for place in ((0, 2), (0, 4), (1, 1), (3, 3), (3, 6)):  # one text is left whole
        labels[place] = ids[place]
    return dict(
        images=pictures(model, seed=seed, count=PAIRS), ids=ids, mask=mask, labels=labels,
        hidden=torch.where(labels != IGNORE, 4, ids),
        wrong_image=torch.tensor([1, 2, 3, 0]), wrong_text=torch.tensor([2, 0, 3, 1]),
        shows=torch.stack([torch.arange(PAIRS), torch.arange(PAIRS) + 10], dim=1) + 100 * seed,
        says=torch.arange(PAIRS) + 100 * seed,
    )  # fmt: skip


def trained_pair(**options):
    """Student and teacher as two `Oracle`s and a queue, and the same as our `MomentumALBEF`."""
    torch.manual_seed(0)  # our queue starts with random vectors
    student, ours = pair("a wider picture", **options)
    teacher = copy.deepcopy(student).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for weight in teacher.parameters():  # it has lived for a while: it is not the student
        weight += 0.05 * torch.randn(weight.shape, generator=generator) * (weight.ndim > 0)
    model = MomentumALBEF(ours, queue_size=QUEUE, momentum=MOMENTUM, captions=2).eval()
    copy_weights(model.teacher, teacher)
    queue = {"image": model.queue.image.T.clone(), "text": model.queue.text.T.clone(), "next": 0}  # (E, Q), as there
    return model, (student, teacher, queue)


def their_step(student, teacher, queue, batch, alpha):
    """The three losses, written out with the `Oracle`; the queue (E, Q) and the teacher move on."""
    images, ids, mask, labels = (batch[name] for name in ("images", "ids", "mask", "labels"))
    asked = labels != IGNORE
    with torch.no_grad():
        student.temp.data = student.temp.data.clamp(0.001, 0.5)
        for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
            old.copy_(MOMENTUM * old + (1 - MOMENTUM) * new)
        image_t, text_t = teacher.look(images), teacher.read(ids, mask)
        v_t, w_t = teacher.image_vector(image_t), teacher.text_vector(text_t)
        image_keys, text_keys = torch.cat([v_t.T, queue["image"]], 1), torch.cat([w_t.T, queue["text"]], 1)  # (E, B+Q)
        soft_t2i, soft_i2t = (torch.softmax(x / student.temp, 1) for x in (w_t @ image_keys, v_t @ text_keys))
        truth = torch.zeros_like(soft_i2t).fill_diagonal_(1)
        fused_t, _ = teacher.fuse(teacher.read(batch["hidden"], mask), mask, image_t)
        soft_words = torch.softmax(teacher.words(fused_t), dim=-1)[asked]

    image, text = student.look(images), student.read(ids, mask)
    v, w = student.image_vector(image), student.text_vector(text)
    i2t, t2i = v @ text_keys / student.temp, w @ image_keys / student.temp
    itc_i2t = -(F.log_softmax(i2t, dim=1) * (alpha * soft_i2t + (1 - alpha) * truth)).sum(dim=1).mean()
    itc_t2i = -(F.log_softmax(t2i, dim=1) * (alpha * soft_t2i + (1 - alpha) * truth)).sum(dim=1).mean()

    own = torch.arange(PAIRS)
    batch["to judge by"] = {"wrong_image": t2i[:, :PAIRS], "wrong_text": i2t[:, :PAIRS]}
    right = student.match(text, mask, image)
    other_image = student.match(text, mask, image[batch["wrong_image"]])
    other_text = student.match(text[batch["wrong_text"]], mask[batch["wrong_text"]], image)
    itm = -torch.cat([right.log_softmax(1)[:, 1], other_image.log_softmax(1)[:, 0], other_text.log_softmax(1)[:, 0]])
    assert itm.shape == (3 * PAIRS,)

    fused, _ = student.fuse(student.read(batch["hidden"], mask), mask, image)
    log_words = torch.log_softmax(student.words(fused), dim=-1)[asked]
    hard = -log_words[torch.arange(len(log_words)), labels[asked]].mean()
    mlm = (1 - alpha) * hard - alpha * (soft_words * log_words).sum(dim=-1).mean()

    for name, keys in (("image", v_t), ("text", w_t)):
        queue[name][:, queue["next"] + own] = keys.T
    queue["next"] = (queue["next"] + PAIRS) % QUEUE
    return {"itc": (itc_i2t + itc_t2i) / 2, "itm": itm.mean(), "mlm": mlm}


def lesson_step(model, batch, alpha, monkeypatch, **options):
    """The same as lesson 05 trains it, but that the wrong partners are given. Each noise says which are asked for."""
    batch["judged by"] = {}

    def given(similarity, forbidden, noise, how):
        which = ("wrong_image", "wrong_text")[int(noise[0])]
        assert how == "hard" and torch.equal(forbidden, torch.eye(PAIRS, dtype=torch.bool))
        batch["judged by"][which] = similarity
        return batch[which]

    monkeypatch.setattr(lesson05, "wrong_partners", given)
    inputs = (batch[name] for name in ("images", "ids", "mask", "hidden", "labels", "shows", "says"))
    noise = torch.tensor([0.0, 1.0])[:, None].expand(-1, PAIRS)
    return lesson05.albef_loss(model, *inputs, noise, torch.tensor(alpha), **options)


def composed_step(model, batch, alpha, wrong=""):
    """The same from parts of the package, with room for one mistake."""
    student, teacher, queue = model.student, model.teacher, model.queue
    images, ids, mask, labels, hidden = (batch[name] for name in ("images", "ids", "mask", "labels", "hidden"))
    asked = labels != IGNORE
    if wrong != "temperature not clamped":
        clamp_temperature(student)
    if wrong not in ("no EMA", "EMA after the teacher was asked"):
        follow(teacher, student, model.momentum)
    image, text = student.vision(images), student.text.read(ids, mask)
    v, w = student.image_vector(image), student.text_vector(text)
    with torch.no_grad():
        image_t, text_t = teacher.vision(images), teacher.text.read(ids, mask)
        v_t, w_t = teacher.image_vector(image_t), teacher.text_vector(text_t)
        image_seen = image if wrong == "the teacher is shown the student's picture" else image_t
        fused_t, _ = teacher.text(ids if wrong == "the teacher reads all words" else hidden, mask, image_seen)
        scores_t = teacher.mlm_head(teacher.text.read(hidden, mask) if wrong == "teacher without picture" else fused_t)
    if wrong == "EMA after the teacher was asked":
        follow(teacher, student, model.momentum)
    if wrong == "pushed before the loss":
        queue.push(v_t, w_t, batch["shows"], batch["says"])

    v_key, w_key = v_t, w_t
    if wrong == "keys of the student":
        v_key, w_key = v.detach(), w.detach()
    if wrong == "gradient through the keys":  # the same numbers
        v_key, w_key = v_t + (v - v.detach()), w_t + (w - w.detach())
    image_keys, text_keys = torch.cat([v_key, queue.image]), torch.cat([w_key, queue.text])
    if wrong == "no queue":
        image_keys, text_keys = v_key, w_key
    temp = student.temp
    i2t, t2i = v @ text_keys.T / temp, w @ image_keys.T / temp
    i2t_t, t2i_t = v_t @ text_keys.T / temp, w_t @ image_keys.T / temp
    if wrong == "the teacher compares the student's vectors":
        i2t_t, t2i_t = i2t, t2i
    if wrong == "multiplied by the temperature":
        i2t, t2i, i2t_t, t2i_t = (x * temp**2 for x in (i2t, t2i, i2t_t, t2i_t))
    positives = torch.eye(PAIRS, len(text_keys)).roll(QUEUE * (wrong == "positives at the queue's end"), dims=1)
    alpha_itc = 1.0 if wrong == "alpha = 1" else alpha
    directions = [distilled_contrastive_loss(i2t, i2t_t, alpha_itc, positives),
                  distilled_contrastive_loss(t2i, t2i_t, alpha_itc, positives)]  # fmt: skip
    itc = directions[0] if wrong == "one direction" else sum(directions) / (1 if wrong == "a sum, not a mean" else 2)

    if wrong == "matching with hidden words":
        text = student.text.read(hidden, mask)
    image_of, text_of = batch["wrong_image"], batch["wrong_text"]
    texts_ = torch.cat([text, text, text[text_of]])
    masks = torch.cat([mask, mask, mask if wrong == "masks left behind" else mask[text_of]])
    match_labels = torch.tensor([1] * PAIRS + [0] * 2 * PAIRS)
    scores = student.match(texts_, masks, torch.cat([image, image[image_of], image]))
    if wrong == "labels exchanged":
        match_labels = 1 - match_labels
    rows = 2 * PAIRS if wrong == "one wrong partner each" else None
    itm = F.cross_entropy(scores[:rows], match_labels[:rows])

    fused, _ = student.text(ids if wrong == "nothing hidden" else hidden, mask, image)
    if wrong == "MLM on the text half alone":
        fused = student.text.read(hidden, mask)
    alpha_mlm = 1.0 if wrong == "alpha = 1" else alpha
    mlm = distilled_lm_loss(student.mlm_head, fused, labels, scores_t[asked], alpha_mlm)

    if wrong == "the student's vectors in the queue":
        v_t, w_t = v, w
    if wrong != "pushed before the loss":
        queue.push(v_t, w_t, batch["shows"], batch["says"])
    return {"itc": itc, "itm": itm, "mlm": mlm}


def both_steps(step, model, official, batch, alpha):
    """One `step` of ours and one of theirs with its gradients -> the losses of both, by name."""
    for side in (model, official[0]):
        side.zero_grad()
    found, expected = step(model, batch, alpha), their_step(*official, batch, alpha)
    for losses in (found, expected):
        sum(losses.values()).backward()
    return found, expected


def largest_difference(ours, theirs, *, relative=False):
    """Over all tensors of two dictionaries, of those in the first."""
    return max(
        ((ours[name] - theirs[name]).abs().max() / (theirs[name].abs().max() if relative else 1)).item()
        for name in ours
    )


@pytest.mark.parametrize("temperature", [0.07, 0.6, 0.0005])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_whole_steps_equal(alpha, temperature, monkeypatch):
    """Five of the lesson's steps in a row: the losses, what they teach, the similarities to draw wrong partners by, the
    teacher that follows and the queue that goes round."""
    model, official = trained_pair(temperature=temperature)
    student, teacher, queue = official
    seen = []
    for step in range(5):
        batch = step_batch(model.student, seed=step)
        # Nothing repeats, so that masking has nothing to do; without a share of it the teacher need not be asked.
        options = dict(masked=step % 2 == 1, distil=alpha > 0 or step % 2 == 0)
        found, expected = both_steps(
            partial(lesson_step, monkeypatch=monkeypatch, **options), model, official, batch, alpha
        )
        assert found.keys() == expected.keys() == {"itc", "itm", "mlm"}
        scale = max(1.0, 0.01 / student.temp.item())  # a cold softmax magnifies every rounding
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=TOLERANCE * scale)
        for which, similarity in batch["to judge by"].items():
            assert_close(batch["judged by"][which] * student.temp, similarity * student.temp)
        learned = assert_same_gradients(model.student, student, scale=scale)
        assert learned.keys() == {name for name, _ in model.student.named_parameters()}
        assert all(weight.grad is None for weight in model.teacher.parameters())
        assert_close(model.queue.image.T, queue["image"])
        assert_close(model.queue.text.T, queue["text"])
        ring = [100 * (step - step % 2), 100 * (step - 1 + step % 2)]  # the steps that stand in its two halves
        for start, first in zip((0, PAIRS), ring, strict=True):
            half = slice(start, start + PAIRS)
            assert model.queue.says[half].tolist() == ([-2] * PAIRS if first < 0 else [first + i for i in range(PAIRS)])
            assert model.queue.shows[half].tolist() == [[-1, -1] if first < 0 else [first + i, first + i + 10]
                                                        for i in range(PAIRS)]  # fmt: skip
        assert int(model.queue.next) == queue["next"] == PAIRS * (step + 1) % QUEUE
        own = dict(model.teacher.named_parameters())
        assert largest_difference(own, as_ours(teacher)) <= TOLERANCE
        seen.append({name: loss.item() for name, loss in expected.items()})
        with torch.no_grad():  # learn something, the same on both sides
            for weight in student.parameters():
                if weight.grad is not None:
                    weight -= 0.02 / scale * weight.grad
        copy_weights(model.student, student)
    for name in ("itc", "itm", "mlm"):
        assert len({round(losses[name], 5) for losses in seen}) == 5  # not five times the same


WRONG_STEPS = {  # the mistake -> what it changes in the first step beside the gradients
    "no EMA": "itc mlm queue teacher",
    "EMA after the teacher was asked": "itc mlm queue",
    "keys of the student": "itc",
    "gradient through the keys": "",
    "pushed before the loss": "itc",
    "no queue": "itc",
    "positives at the queue's end": "itc",
    "alpha = 1": "itc mlm",
    "the teacher compares the student's vectors": "itc",
    "multiplied by the temperature": "itc",
    "temperature not clamped": "itc teacher",  # whose own temperature, which nobody asks for, follows
    "one direction": "itc",
    "a sum, not a mean": "itc",
    "the student's vectors in the queue": "queue",
    "one wrong partner each": "itm",
    "labels exchanged": "itm",
    "matching with hidden words": "itm",
    "masks left behind": "itm",
    "MLM on the text half alone": "mlm",
    "nothing hidden": "mlm",
    "the teacher reads all words": "mlm",
    "the teacher is shown the student's picture": "mlm",
    "teacher without picture": "mlm",
}


@pytest.mark.parametrize("wrong", ["", *WRONG_STEPS])
def test_a_wrong_step_is_noticed(wrong):
    """Each mistake changes what it is about, and with the gradients nothing else; without one all is equal."""
    model, official = trained_pair(temperature=0.6 if wrong == "temperature not clamped" else 0.07)
    student, teacher, queue = official
    found, expected = both_steps(partial(composed_step, wrong=wrong), model, official, step_batch(model.student), 0.4)
    off = {name: (found[name] - expected[name]).abs().item() for name in expected}
    off["queue"] = max((getattr(model.queue, name).T - queue[name]).abs().max().item() for name in ("image", "text"))
    off["teacher"] = largest_difference(dict(model.teacher.named_parameters()), as_ours(teacher))
    own = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in model.student.named_parameters()}
    off["gradients"] = largest_difference(own, gradients(student)[0], relative=True)
    wrong_ones = {name for name, distance in off.items() if distance > 100 * TOLERANCE}
    without_gradients = wrong in ("", "the student's vectors in the queue")
    assert wrong_ones == set(WRONG_STEPS.get(wrong, "").split()) | (set() if without_gradients else {"gradients"}), off


# --- full size -------------------------------------------------------------------------------------------------------


def test_every_tensor_at_full_size():
    """The paper's sizes (3.1): 85.8 million parameters for the picture, 123.7 million for words, fusion and guesses."""
    c = paper_config()
    with torch.device("meta"):
        theirs, ours = Oracle(c), ALBEF(c)
    weights, own = as_ours(theirs), ours.state_dict()
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: own[name].shape for name in own}
    words = nn.ModuleList([ours.text, ours.mlm_head])  # the shared table counts once
    assert f"{count_parameters(ours.vision) / 1e6:.1f}" == "85.8"
    assert f"{count_parameters(words) / 1e6:.1f}" == "123.7"
    segments, unused = 2 * 768, count_parameters(theirs.fusion.embeddings)
    assert count_parameters(ours) == count_parameters(theirs) - segments - unused
    # What the numbers mean: without cross-attention it would be BERT-base, and the picture a ViT-B/16 without a head.
    cross = 6 * (4 * (768 * 768 + 768) + 2 * 768)
    assert sum(count_parameters(block.cross) for block in ours.text.fusion_blocks) == cross
    bert = transformers.BertConfig()
    with torch.device("meta"):
        whole = transformers.BertForMaskedLM(bert)
    assert count_parameters(words) == count_parameters(whole) + cross - segments
