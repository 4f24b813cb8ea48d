"""Our BLIP-2 beside transformers' classes, weight for weight: the same numbers within 1e-5, the same words.

transformers has both stages, but its Q-Former cannot write. ITG is compared with a slow, plain computation in here,
which takes the official weights by their official names and none of our modules.
"""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity_helpers import (
    TOLERANCE,
    assert_close,
    assert_differ,
    edit,
    edit_config,
    edit_file,
    message,
    random_pictures,
    random_texts,
    randomise,
    saved,
)
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from minivlp.generate import beam_search, greedy
from minivlp.layers import count_parameters
from minivlp.losses import IGNORE, masked_lm_loss, next_words
from minivlp.models.blip import led_by
from minivlp.models.blip2 import grounded_mask, joint_mask, query_similarities
from minivlp.models.dual_stream import key_mask
from minivlp.pretrained import CheckpointError, blip2_from_hf, from_hf, preprocess_blip

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

Q, L, S = 4, 9, 17
WORDS, CLS, SEP, DEC = 110, 101, 102, 109  # of the Q-Former, as in BERT; [DEC] is the last
MOUTH_WORDS, PAD, BOS, EOS, IMAGE = 60, 1, 2, 5, 59  # of the language model
# Every field that matters is set. By default the ViT would start with weights of 1e-10, so that no picture would change
# anything, and the queries with zeros, all alike.
VISION = dict(
    hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
    layer_norm_eps=1e-6, initializer_range=0.02,
)  # fmt: skip
QFORMER = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=WORDS,
    max_position_embeddings=16, layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    cross_attention_frequency=2,
)  # fmt: skip
OPT = dict(
    model_type="opt", vocab_size=MOUTH_WORDS, hidden_size=40, word_embed_proj_dim=40, ffn_dim=160, num_hidden_layers=3,
    num_attention_heads=4, max_position_embeddings=32, dropout=0.0, pad_token_id=PAD, bos_token_id=BOS,
    eos_token_id=EOS,
)  # fmt: skip
T5 = dict(
    model_type="t5", vocab_size=MOUTH_WORDS, d_model=40, d_kv=10, d_ff=80, num_layers=2, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
)  # fmt: skip
# name -> options of the picture, of the Q-Former, of the whole
VARIANTS = {
    "plain": ({}, {}, {}),
    "old name of GELU": (dict(hidden_act="gelu_python"), dict(hidden_act="gelu_python"), {}),
    "image eps 0.1": (dict(layer_norm_eps=0.1), {}, {}),  # absurd, so that an ignored eps cannot hide
    "Q-Former eps 0.1": ({}, dict(layer_norm_eps=0.1), {}),
    "one head for the picture": (dict(num_attention_heads=1), {}, {}),
    "eight heads for the queries": ({}, dict(num_attention_heads=8), {}),
    "narrow MLPs": (dict(intermediate_size=48), dict(intermediate_size=64), {}),
    "an MLP of no whole ratio": (dict(intermediate_size=104), {}, {}),  # as ViT-g has: 6144 / 1408
    "no bias for q, k and v": (dict(qkv_bias=False), {}, {}),
    "one block": (dict(num_hidden_layers=1), dict(num_hidden_layers=1), {}),
    "cross-attention in each block": ({}, dict(cross_attention_frequency=1), {}),
    "cross-attention in every third": ({}, dict(cross_attention_frequency=3), {}),
    "equal widths": (dict(hidden_size=32, intermediate_size=128), {}, {}),
    "patch 4": (dict(patch_size=4), {}, {}),
    "large pictures": (dict(image_size=48), {}, {}),
    "one query": ({}, {}, dict(num_query_tokens=1)),
    "small shared space": ({}, {}, dict(image_text_hidden_size=5)),
    "dropout": ({}, dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), {}),  # asleep
}
READING = ("plain", "Q-Former eps 0.1", "eight heads for the queries", "narrow MLPs", "one block",
           "cross-attention in each block", "one query", "dropout")  # fmt: skip
COMPARING = ("plain", "an MLP of no whole ratio", "one query", "small shared space", "dropout")
WRITING = ("image eps 0.1", "an MLP of no whole ratio", "cross-attention in every third", "one query", "dropout")
MOUTHS = {
    "plain": {},
    "one block": dict(num_hidden_layers=1),
    "eight heads": dict(num_attention_heads=8),
    "narrow MLP": dict(ffn_dim=80),
    "as wide as the Q-Former": dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=128),
    "width left out": dict(word_embed_proj_dim=None),
    "longer": dict(max_position_embeddings=50),
    "other ids": dict(bos_token_id=7, eos_token_id=50, pad_token_id=0),
    "dropout": dict(dropout=0.1, attention_dropout=0.1),
}
FRESH = ("temp", "lm_head.dense", "lm_head.norm", "lm_head.decoder.bias")  # of stage 1; of stage 2 nothing


def reference(kind: str, name: str = "plain", *, text=OPT, attention: str | None = None, **options: object):
    """An official class with random weights. Without image token the retrieval class takes the ids as they are."""
    vision, qformer, whole = VARIANTS[name]
    retrieval = kind == "ForImageTextRetrieval"
    config = transformers.Blip2Config(
        vision_config=VISION | vision, qformer_config=QFORMER | dict(use_qformer_text_input=retrieval) | qformer,
        text_config=text, attn_implementation=attention,
        **(dict(num_query_tokens=Q, image_text_hidden_size=20, image_token_index=None if retrieval else IMAGE)
           | whole | options),
    )  # fmt: skip
    theirs = randomise(getattr(transformers, f"Blip2{kind}")(config))
    for name, parameter in theirs.named_parameters():
        if name.endswith(("crossattention.attention.query.weight", "crossattention.output.dense.weight")):
            parameter.data *= 5  # so that a query looks at some patches more than at others, and hears what they say
        if name.endswith("vision_model.post_layernorm.bias"):
            parameter.data *= 20
        if name.endswith("self_attn.qkv.weight"):
            parameter.data *= 3  # and so do the patches among themselves, or their order would hardly count
        if "layer_norm.weight" in name and text["model_type"] == "t5" and "language_model" in name:
            parameter.data += 1  # T5's own kind of LayerNorm
        if name.endswith("language_projection.weight"):
            parameter.data *= 3  # loud enough for the mouth to hear
    theirs.query_tokens.data *= 10
    return theirs


def comparer(name: str = "plain", **options: object):
    return reference("ForImageTextRetrieval", name, **options)


def writer(name: str = "plain", **options: object):
    return reference("ForConditionalGeneration", name, **options)


def pictures(theirs, *, seed=0, count=3):
    return random_pictures(theirs.config.vision_config.image_size, seed=seed, count=count)


def texts(*, seed=0, lengths=(L, 6, 3)):
    """For the Q-Former."""
    return random_texts(L, lengths, first=CLS, end=SEP, seed=seed)


def sayings(theirs, *, seed=0, lengths=(L, 6, 3)):
    """For the mouth."""
    text = theirs.config.text_config
    return random_texts(
        L, lengths, first=text.bos_token_id, end=text.eos_token_id, pad=text.pad_token_id, seed=seed
    )  # fmt: skip


def with_places(theirs, ids, mask):
    """ids and mask (B, L) as transformers wants them: first an image token for each query, (B, Q+L)."""
    places = ids.new_full((len(ids), theirs.config.num_query_tokens), theirs.config.image_token_index)
    return dict(input_ids=torch.cat([places, ids], 1), attention_mask=F.pad(mask.long(), (places.shape[1], 0), value=1))


def blocks_of(model, call) -> list[torch.Tensor]:
    """What each block of our Q-Former gives while `call` is running."""
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda module, args, out: states.append(out[0])) for block in model.blocks]
    call()
    for hook in hooks:
        hook.remove()
    return states


# --- the Q-Former ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_queries_alone_equal_transformers(name, tmp_path):
    """The eye, its LayerNorm, and what the queries are after each block."""
    theirs = comparer(name, attention="eager")
    ours = saved(theirs, tmp_path)
    images = pictures(theirs)

    def states(images):
        seen = theirs.vision_model(images).last_hidden_state
        out = theirs.qformer(query_embeds=theirs.query_tokens.expand(3, -1, -1), encoder_hidden_states=seen,
                             output_hidden_states=True, output_attentions=True)  # fmt: skip
        return seen, out

    seen, expected = states(images)
    assert_close(ours.look(images), seen)
    got, past, named = ours.qformer(ours.qformer.queries(3), ours.config.queries, seen, everything=True)
    assert_close(got, expected.last_hidden_state)
    each = blocks_of(ours.qformer, lambda: ours.see(ours.look(images)))
    assert len(each) == len(past) == len(expected.hidden_states) - 1 == ours.config.depth
    assert_close(ours.qformer.queries(3), expected.hidden_states[0])
    for one, other in zip(each, expected.hidden_states[1:], strict=True):
        assert_close(one, other)
    looking = [i for i in range(ours.config.depth) if i % ours.config.cross_every == 0]
    assert list(named) == [f"cross_{i}" for i in looking] and len(expected.cross_attentions) == len(looking)
    for weights, theirs_ in zip(named.values(), expected.cross_attentions, strict=True):
        assert_close(weights, theirs_)
        assert theirs_.std() > 0.005 and theirs_.shape[2:] == seen[0, :, :1].T.expand(ours.config.queries, -1).shape
    # Agreement would be worth nothing if the queries did not depend on the picture, or were all the same.
    for other_images in (pictures(theirs, seed=1), images.roll(8, dims=-1)):
        other_seen, other = states(other_images)
        assert_differ(other_seen, seen)
        for before, after in zip(expected.hidden_states[1:], other.hidden_states[1:], strict=True):
            assert_differ(before, after)
        assert_close(ours.see(ours.look(other_images))[0], other.last_hidden_state)
    for one in range(ours.config.queries - 1):
        assert_differ(expected.last_hidden_state[:, one], expected.last_hidden_state[:, one + 1])


@pytest.mark.parametrize("name", READING)
@torch.no_grad()
def test_words_alone_and_with_queries_equal_transformers(name, tmp_path):
    theirs = comparer(name)
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    c, seen = ours.config, ours.look(images)
    queries = theirs.query_tokens.expand(3, -1, -1)

    def alone(ids):
        return theirs.qformer(query_embeds=theirs.embeddings(input_ids=ids), query_length=0,
                              attention_mask=mask.long(), output_hidden_states=True).hidden_states  # fmt: skip

    def joint(ids, seen):
        return theirs.qformer(
            query_embeds=theirs.embeddings(input_ids=ids, query_embeds=queries), query_length=c.queries,
            attention_mask=F.pad(mask.long(), (c.queries, 0), value=1), encoder_hidden_states=seen,
            output_hidden_states=True,
        ).hidden_states  # fmt: skip

    there = F.pad(mask, (c.queries, 0), value=True)
    x = torch.cat([ours.qformer.queries(3), ours.qformer.embed(ids)], dim=1)
    for expected, start, count, may_look, real in (
        (alone(ids), ours.qformer.embed(ids), 0, key_mask(mask), mask),
        (joint(ids, seen), x, c.queries, joint_mask(mask, c.queries), there),
    ):
        assert_close(start, expected[0])
        each = blocks_of(ours.qformer, lambda: ours.qformer(start, count, seen, mask=may_look))  # noqa: B023
        assert len(each) == len(expected) - 1 == c.depth
        for one, other in zip(each, expected[1:], strict=True):
            assert_close(one[real], other[real])
    # Words alone know nothing of the picture; together each kind hears of the other, and of the picture.
    changed, other_seen = ids.clone(), ours.look(pictures(theirs, seed=1))
    changed[:, 1] = 41
    before, after = joint(ids, seen)[-1], joint(changed, seen)[-1]
    assert_differ(before[:, : c.queries], after[:, : c.queries])
    assert_differ(before[:, : c.queries], joint(ids, other_seen)[-1][:, : c.queries])
    if c.depth > 1:  # in one block nothing gets from the picture by way of a query to a word
        assert_differ(before[:, c.queries], joint(ids, other_seen)[-1][:, c.queries])
    assert_differ(alone(ids)[-1][:, 0], alone(changed)[-1][:, 0])
    assert_differ(alone(ids)[-1][:, 0], before[:, c.queries])
    unpadded = ours.qformer(x, c.queries, seen)[0]  # and padding would be heard
    assert_differ(unpadded[1:, : c.queries], before[1:, : c.queries])


@pytest.mark.parametrize("name", COMPARING)
@torch.no_grad()
def test_comparing_and_matching_equal_transformers(name, tmp_path):
    theirs = comparer(name)
    ours = saved(theirs, tmp_path)
    assert (ours.fresh, ours.labels, ours.training) == (FRESH, (), False)
    c = ours.config
    assert (c.dec_id, c.sep_id, c.pad_id, c.queries) == (DEC, SEP, 0, theirs.config.num_query_tokens)
    images, (ids, mask) = pictures(theirs), texts()

    def both(images, ids):
        """Cosines of all pictures with all texts, both ways, and scores of each picture with its own text."""
        given = dict(pixel_values=images, input_ids=ids, attention_mask=mask.long())
        cosines = theirs(**given, use_image_text_matching_head=False)
        match = theirs(**given, use_image_text_matching_head=True)
        return cosines.logits_per_image, cosines.logits_per_text, match.logits_per_image

    def ours_both(images, ids):
        named = ours(images, ids, mask)
        best = query_similarities(named["query vectors"], named["text vector"]).amax(dim=2)
        return best, best.T, named["match"]

    expected, got = both(images, ids), ours_both(images, ids)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    assert_close(query_similarities(ours.encode_image(images), ours.encode_text(ids)).amax(dim=2), expected[0])
    # Agreement would be worth nothing if the scores did not depend on all that goes in.
    changed = ids.clone()
    changed[:, 1] = 41
    for new_images, new_ids in ((pictures(theirs, seed=1), ids), (images.roll(8, dims=-1), ids), (images, changed)):
        now = both(new_images, new_ids)
        for one, other, before in zip(ours_both(new_images, new_ids), now, expected, strict=True):
            assert_close(one, other)
            assert_differ(other, before)
    assert expected[0].std() > 0.01 and expected[2].std() > 0.01
    if name == "plain":  # another reading of Q scores is not the official one
        similarities = query_similarities(ours.encode_image(images), ours.encode_text(ids))
        assert_differ(similarities.mean(dim=2), expected[0])
        assert_differ(similarities[:, :, 0], expected[0])
        assert similarities.argmax(dim=2).unique().numel() > 1


@torch.no_grad()
def test_image_tokens_before_the_text_change_nothing(tmp_path):
    """What transformers' processor puts before the words, once for each query, its class takes off again."""
    theirs = comparer(image_token_index=IMAGE)
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    named = ours(images, ids, mask)
    given = dict(pixel_values=images, **with_places(theirs, ids, mask))
    assert_close(named["match"], theirs(**given, use_image_text_matching_head=True).logits_per_image)
    best = query_similarities(named["query vectors"], named["text vector"]).amax(dim=2)
    assert_close(best, theirs(**given).logits_per_image)


# --- ITG, against a slow computation ---------------------------------------------------------------------------------


def unilm(i: int, j: int) -> bool:
    """May token i look at token j? The first Q are queries."""
    return j < Q if i < Q else j <= i


def by_hand(theirs, head, image, ids, *, may_look=unilm, first: int = 0):
    """ITG in one pass over queries and words, token by token and head by head, in double precision: scores (B, L, V).

    `theirs` gives the Q-Former's weights, `head` the four of the head that writes; image (B, S, D') are the frozen
    states, ids (B, L) begin with [DEC]. The position of a word counts from `first`.
    """
    W = {name: tensor.double() for name, tensor in theirs.state_dict().items()}
    head = {name: tensor.double() for name, tensor in head.items()}
    c = theirs.config.qformer_config
    per_head = c.hidden_size // c.num_attention_heads

    def linear(x, name):
        return x @ W[f"{name}.weight"].T + W[f"{name}.bias"]

    def norm(x, weight, bias):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + c.layer_norm_eps).sqrt() * weight + bias

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def attend(name, asking, answering, allowed):
        """One token at a time; `allowed[i]` are the places that token i may look at. Then the sum and its LayerNorm."""
        q, k, v = linear(asking, f"{name}.attention.query"), *(linear(answering, f"{name}.attention.{part}")
                                                               for part in ("key", "value"))  # fmt: skip
        rows = []
        for i, places in enumerate(allowed):
            parts = []
            for h in range(c.num_attention_heads):
                own = slice(h * per_head, (h + 1) * per_head)
                weights = (k[places, own] @ q[i, own] / math.sqrt(per_head)).exp()
                parts.append((weights / weights.sum()) @ v[places, own])
            rows.append(torch.cat(parts))
        answer = linear(torch.stack(rows), f"{name}.output.dense")
        return norm(asking + answer, W[f"{name}.output.LayerNorm.weight"], W[f"{name}.output.LayerNorm.bias"])

    def mlp(x, layer, end):
        y = linear(gelu(linear(x, f"{layer}.intermediate{end}.dense")), f"{layer}.output{end}.dense")
        return norm(x + y, W[f"{layer}.output{end}.LayerNorm.weight"], W[f"{layer}.output{end}.LayerNorm.bias"])

    scores = []
    for picture, text in zip(image.double(), ids.tolist(), strict=True):
        words = [W["embeddings.word_embeddings.weight"][word] + W["embeddings.position_embeddings.weight"][first + t]
                 for t, word in enumerate(text)]  # fmt: skip
        x = torch.cat([W["query_tokens"][0], torch.stack(words)])
        x = norm(x, W["qformer.layernorm.weight"], W["qformer.layernorm.bias"])
        allowed = [[j for j in range(len(x)) if may_look(i, j)] for i in range(len(x))]
        for number in range(c.num_hidden_layers):
            layer = f"qformer.encoder.layer.{number}"
            x = attend(f"{layer}.attention", x, x, allowed)
            queries, words = x[:Q], x[Q:]
            if number % c.cross_attention_frequency == 0:
                queries = attend(f"{layer}.crossattention", queries, picture, [list(range(len(picture)))] * Q)
            x = torch.cat([mlp(queries, layer, "_query"), mlp(words, layer, "")])
        y = gelu(x[Q:] @ head["dense.weight"].T + head["dense.bias"])
        y = norm(y, head["norm.weight"], head["norm.bias"])
        scores.append(y @ W["embeddings.word_embeddings.weight"].T + head["decoder.bias"])
    return torch.stack(scores).float()


def with_a_head(theirs, tmp_path):
    """Ours, with random weights where the file has none, and these."""
    ours = saved(theirs, tmp_path)
    randomise(ours.lm_head)
    ours.lm_head.decoder.weight.data.copy_(theirs.embeddings.word_embeddings.weight)  # which is tied
    return ours, {name: t for name, t in ours.lm_head.state_dict().items() if name != "decoder.weight"}


@torch.no_grad()
def test_writing_in_stage_1_equals_a_slow_computation(tmp_path):
    """Two passes of ours, the queries first, then the words with the queries' keys and values, are one pass there."""
    theirs = comparer()
    ours, head = with_a_head(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    image, led = theirs.vision_model(images).last_hidden_state, led_by(ids, DEC)
    expected = by_hand(theirs, head, image, led)
    assert_close(ours.lm_head(ours.write(ids, ours.see(ours.look(images))[1])), expected)
    assert_close(ours(images, ids, mask)["next"], expected)
    # In one pass under the mask, and word by word as `generate` asks.
    x = torch.cat([ours.qformer.queries(3), ours.qformer.embed(led)], dim=1)
    assert_close(ours.lm_head(ours.qformer(x, Q, image, mask=grounded_mask(L, Q))[0][:, Q:]), expected)
    speaker = ours.speaker(image)
    for t in range(L):
        assert_close(speaker(led[:, t]), expected[:, t])
    # The words depend on the picture and on what was said before, and on nothing that comes later.
    changed = led.clone()
    changed[:, 4] = 41
    other = by_hand(theirs, head, image, changed)
    assert_differ(other[:, 4:], expected[:, 4:])
    assert torch.equal(other[:, :4], expected[:, :4])
    assert_differ(by_hand(theirs, head, image.flip(0), led)[::2, 0], expected[::2, 0])
    # Each of these mistakes would be seen.
    wrong = {
        "queries read the words": by_hand(theirs, head, image, led, may_look=lambda i, j: i < Q or j <= i),
        "words see what follows": by_hand(theirs, head, image, led, may_look=lambda i, j: j < Q or i >= Q),
        "words do not see the queries": by_hand(theirs, head, image, led, may_look=lambda i, j: j <= i
                                                and (i < Q) == (j < Q)),
        "queries in a row": by_hand(theirs, head, image, led, may_look=lambda i, j: j <= i),
        "queries take positions": by_hand(theirs, head, image, led, first=Q),
        "[CLS] first": by_hand(theirs, head, image, ids),
    }  # fmt: skip
    for scores in wrong.values():
        assert_differ(scores[:, 1:], expected[:, 1:])


@torch.no_grad()
def test_without_its_own_starting_values_nothing_would_be_compared():
    """The traps of the default configuration: a ViT of 1e-10, and queries of zeros, which stay alike.

    Zeros alone would hide the first trap: their LayerNorm blows up the tiny rest that the pictures differ by.
    """
    vision = {name: value for name, value in VISION.items() if name != "initializer_range"}
    config = transformers.Blip2Config(vision_config=vision, qformer_config=QFORMER, num_query_tokens=Q, text_config=OPT,
                                      image_token_index=IMAGE)  # fmt: skip
    theirs = transformers.Blip2ForConditionalGeneration(config).eval()

    def both():
        return (theirs.get_image_features(pictures(theirs, seed=seed)) for seed in (0, 1))

    one, other = both()
    seen = one.vision_outputs.last_hidden_state - other.vision_outputs.last_hidden_state
    assert seen.abs().max() < TOLERANCE
    assert torch.equal(one.pooler_output[:, :1].expand(-1, Q, -1), one.pooler_output)
    nn.init.normal_(theirs.query_tokens, std=0.02)
    one, other = both()
    assert (one.pooler_output - other.pooler_output).abs().max() < TOLERANCE


# --- stage 2 with an OPT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mouth"), [*((name, "plain") for name in WRITING), *(("plain", mouth) for mouth in MOUTHS)]
)
@torch.no_grad()
def test_writing_with_a_mouth_equals_transformers(name, mouth, tmp_path):
    theirs = writer(name, text=OPT | MOUTHS[mouth])
    ours = saved(theirs, tmp_path)
    text, c = theirs.config.text_config, ours.mouth.config
    assert (ours.fresh, ours.labels, ours.training) == ((), (), False)
    assert (c.dec_id, c.sep_id, c.pad_id) == (text.bos_token_id, text.eos_token_id, text.pad_token_id)
    assert (ours.config.dec_id, ours.config.sep_id, ours.config.pad_id) == (c.dec_id, c.sep_id, c.pad_id)
    assert c.max_text == text.max_position_embeddings == len(ours.mouth.position.weight)
    images, (ids, mask) = pictures(theirs), sayings(theirs)

    def logits(images, ids):
        out = theirs(pixel_values=images, **with_places(theirs, ids, mask))
        return out.language_model_outputs.logits[:, -L:]

    def ours_logits(images, ids):
        return ours.mouth.lm_head(ours.write(ids, ours.look(images)))

    expected = logits(images, ids)
    assert_close(ours_logits(images, ids)[mask], expected[mask])
    features = theirs.get_image_features(images)
    assert_close(ours.look(images), features.vision_outputs.last_hidden_state)
    assert_close(ours.prefix(ours.look(images)), features.pooler_output)
    # Agreement would be worth nothing if the words did not depend on all that goes in.
    changed = ids.clone()
    changed[:, 1] = 41
    for new_images, new_ids in ((pictures(theirs, seed=1), ids), (images.roll(8, dims=-1), ids), (images, changed)):
        now = logits(new_images, new_ids)
        assert_differ(now[:, 1], expected[:, 1])
        assert_close(ours_logits(new_images, new_ids)[mask], now[mask])
    assert_close(logits(images, changed)[:, 0], expected[:, 0])  # and not on what follows
    assert expected[:, 0].std() > 0.05 and not torch.allclose(expected[0, 0], expected[1, 0], atol=100 * TOLERANCE)


def test_the_loss_of_stage_2_equals_transformers(tmp_path):
    """On the text alone: neither the queries' places nor padding are asked for; gradients reach the queries."""
    theirs = writer()
    ours = saved(theirs, tmp_path).train()
    images, (ids, mask) = pictures(theirs), sayings(theirs)
    given = with_places(theirs, ids, mask)
    labels = F.pad(ids.masked_fill(~mask, IGNORE), (Q, 0), value=IGNORE)
    labels[:, Q] = IGNORE  # the first token is given, not asked for
    expected = theirs(pixel_values=images, labels=labels, **given).loss
    states = ours.write(ids, ours.look(images))
    loss = masked_lm_loss(ours.mouth.lm_head, states, next_words(ids, mask))
    assert_close(loss, expected)
    asked = F.pad(ids.masked_fill(~mask, IGNORE), (Q, 0), value=IGNORE)
    wrong = {
        "the first token asked for": theirs(pixel_values=images, labels=asked, **given).loss,
        "padding asked for": masked_lm_loss(ours.mouth.lm_head, states, next_words(ids, torch.ones_like(mask))),
        "no shift": masked_lm_loss(ours.mouth.lm_head, states, ids.masked_fill(~mask, IGNORE)),
        "the queries' places asked for": theirs(pixel_values=images, labels=given["input_ids"], **given).loss,
    }
    for name, other in wrong.items():
        assert (other - expected).abs() > 100 * TOLERANCE, name
    expected.backward()
    loss.backward()
    pairs = {
        "queries": (ours.qformer.query_tokens, theirs.query_tokens),
        "projection": (ours.language_proj.weight, theirs.language_projection.weight),
        "ln_vision": (ours.ln_vision.weight, theirs.vision_model.post_layernorm.weight),
        "queries' MLP": (ours.qformer.blocks[1].query_mlp.fc1.weight,
                         theirs.qformer.encoder.layer[1].intermediate_query.dense.weight),
        "cross-attention": (ours.qformer.blocks[2].cross.attn.q.weight,
                            theirs.qformer.encoder.layer[2].crossattention.attention.query.weight),
        "embeddings' LayerNorm": (ours.qformer.embed.norm.weight, theirs.qformer.layernorm.weight),
    }  # fmt: skip
    for name, (own, official) in pairs.items():
        assert official.grad.abs().max() > 1e-3, name
        assert_close(own.grad, official.grad)
    for part in (ours.eye, ours.mouth):
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())
    trained = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert all(ours.get_parameter(name).grad is not None for name in trained)


def opinions(theirs):
    """A mouth whose words follow from what was said and seen, and some of whose texts end."""
    theirs.language_model.model.decoder.embed_tokens.weight.data *= 2
    return theirs


def written(theirs, images, *, longest: int, prompt=None, **options: object) -> list[list[int]]:
    """What transformers writes, as our functions give it: without what was given, filled up with the end."""
    start = torch.full((len(images), 1), BOS) if prompt is None else prompt
    given = with_places(theirs, start, torch.ones_like(start))
    ids = theirs.generate(pixel_values=images, max_new_tokens=longest, do_sample=False, eos_token_id=EOS,
                          pad_token_id=EOS, **given, **options)[:, given["input_ids"].shape[1] :]  # fmt: skip
    return ids.tolist()


@pytest.mark.parametrize(("shortest", "prompted"), [(0, False), (5, False), (0, True)])
@torch.no_grad()
def test_greedy_writing_equals_transformers_word_by_word(shortest, prompted, tmp_path):
    theirs = opinions(writer())
    ours = saved(theirs, tmp_path)
    images = pictures(theirs, count=12)
    prompt = torch.tensor([[BOS, 8, 30, 12]]).expand(12, -1) if prompted else None
    expected = written(theirs, images, longest=12, prompt=prompt, min_new_tokens=shortest)
    first = torch.full((12,), BOS) if prompt is None else prompt[:, -1]
    speaker = ours.speaker(ours.look(images), prompt=prompt)
    assert greedy(speaker, first, end=EOS, longest=12, shortest=shortest).tolist() == expected
    lengths = [text.index(EOS) if EOS in text else 12 for text in expected]
    assert len(set(map(tuple, expected))) > 6 and min(lengths) >= shortest
    assert len({word for text in expected for word in text}) > 8
    if prompted or shortest:
        assert expected != written(theirs, images, longest=12)
    else:
        assert len(set(lengths)) > 1


@torch.no_grad()
def test_each_written_score_equals_the_one_of_the_whole_text(tmp_path):
    """The keys and values that are kept: a prefix, and then token by token."""
    theirs = writer()
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), sayings(theirs, lengths=(L, L, L))
    expected = theirs(pixel_values=images, **with_places(theirs, ids, mask)).logits[:, -L:]
    speaker = ours.speaker(ours.look(images))
    for t in range(L):
        assert_close(speaker(ids[:, t]), expected[:, t])


@pytest.mark.parametrize("penalty", [0.0, 1.0])
@torch.no_grad()
def test_beam_search_equals_transformers_word_by_word(penalty, tmp_path):
    theirs = opinions(writer())
    ours = saved(theirs, tmp_path)
    images, first = pictures(theirs, count=8), torch.full((8,), BOS)
    expected = written(theirs, images, longest=8, num_beams=3, length_penalty=penalty)
    speaker = ours.speaker(ours.look(images), copies=3)
    found = beam_search(speaker, first, end=EOS, longest=8, beams=3, length_penalty=penalty)
    assert found.tolist() == expected
    assert expected != greedy(ours.speaker(ours.look(images)), first, end=EOS, longest=8).tolist()


# --- stage 2 with a T5 -----------------------------------------------------------------------------------------------


class T5Mouth(nn.Module):
    """transformers' own T5, as `BLIP2Speaker` wants a mouth."""

    def __init__(self, t5) -> None:
        super().__init__()
        self.t5, self.lm_head, self.config = t5, t5.lm_head, SimpleNamespace(width=t5.config.d_model)

    def write(self, ids, prefix, *, prompt, prompt_mask):
        read = torch.cat([prefix, self.t5.get_input_embeddings()(prompt)], dim=1)
        there = F.pad(prompt_mask.long(), (prefix.shape[1], 0), value=1)
        states = self.t5.encoder(inputs_embeds=read, attention_mask=there).last_hidden_state
        states = self.t5.decoder(input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=there)
        return states.last_hidden_state * self.t5.config.d_model**-0.5  # of a model that is tied


@torch.no_grad()
def test_a_mouth_of_the_other_kind_equals_transformers(tmp_path):
    """The encoder reads what the queries say and a prompt, the decoder writes: eye, Q-Former and projection are ours,
    the T5 is theirs."""
    theirs = writer(text=T5)
    theirs.save_pretrained(tmp_path)
    assert "is of type 't5'" in message(tmp_path)
    ours = from_hf(tmp_path, mouth=T5Mouth(theirs.language_model))
    assert (ours.fresh, ours.labels, ours.training) == ((), (), False)
    assert not any(p.requires_grad for p in ours.mouth.parameters())
    images, (prompt, mask) = pictures(theirs), random_texts(L, (L, 6, 3), first=8, end=1)
    answer = random_texts(5, (5, 5, 5), first=0, end=1, seed=1)[0]

    def both(images, prompt, answer):
        out = theirs(pixel_values=images, decoder_input_ids=answer, **with_places(theirs, prompt, mask))
        return out.logits, ours.mouth.lm_head(
            ours.write(answer, ours.look(images), prompt=prompt, prompt_mask=mask)
        )  # fmt: skip

    expected, got = both(images, prompt, answer)
    assert_close(got, expected)
    changed, other_answer = prompt.clone(), answer.clone()
    changed[:, 1], other_answer[:, 1] = 41, 41
    for inputs in ((pictures(theirs, seed=1), prompt, answer), (images.roll(8, dims=-1), prompt, answer),
                   (images, changed, answer), (images, prompt, other_answer)):  # fmt: skip
        now, got = both(*inputs)
        assert_close(got, now)
        assert_differ(now[:, 2], expected[:, 2])


# --- common mistakes -------------------------------------------------------------------------------------------------


# Each breaks one thing of the loaded model; the last number says of which stage.
def no_norm_on_the_picture(ours):
    ours.ln_vision = nn.Identity()


def other_eps_of_the_picture(ours):
    ours.ln_vision.eps = 1e-2


def the_eye_stops_earlier(ours):
    del ours.eye.tower.encoder.blocks[-1]


def no_class_token(ours):
    ours.eye.register_forward_hook(lambda module, inputs, output: output[:, 1:])


def other_heads(ours):
    ours.qformer.blocks[1].attn.heads = 8


def keys_and_values(ours):
    kv = ours.qformer.blocks[0].cross.attn.kv.weight
    kv.copy_(kv.roll(32, dims=0))


def no_cross_attention_at_the_end(ours):
    ours.qformer.blocks[2].cross = None


def one_norm_for_the_other(ours):
    block = ours.qformer.blocks[0]
    block.norm1, block.query_norm = block.query_norm, block.norm1


def queries_in_another_order(ours):
    ours.qformer.query_tokens.copy_(ours.qformer.query_tokens.flip(1))


def queries_without_norm(ours):
    ours.qformer.queries = lambda batch: ours.qformer.query_tokens.expand(batch, -1, -1)


def one_mlp_for_both(ours):
    for block in ours.qformer.blocks:
        block.mlp, block.norm2 = block.query_mlp, block.query_norm


def queries_take_positions(ours):
    embed = ours.qformer.embed
    embed.position.weight.copy_(embed.position.weight.roll(-Q, dims=0))


def padding_is_read(ours):
    ours.config.__dict__["pad_id"] = -1


def opt_positions_from_the_first_row(ours):
    ours.mouth.position.weight.copy_(ours.mouth.position.weight.roll(2, dims=0))


def a_gelu_in_the_mouth(ours):
    for block in ours.mouth.blocks:
        block.mlp.act = nn.GELU()


def post_norm_in_the_mouth(ours):
    block = ours.mouth.blocks[0]
    block.norm1, block.norm2 = block.norm2, block.norm1


def no_last_norm_in_the_mouth(ours):
    ours.mouth.norm = nn.Identity()


def another_projection(ours):
    ours.language_proj.bias.zero_()


BOTH_STAGES = (
    no_norm_on_the_picture, other_eps_of_the_picture, the_eye_stops_earlier, no_class_token, other_heads,
    keys_and_values, no_cross_attention_at_the_end, one_norm_for_the_other, queries_without_norm,
)  # fmt: skip
STAGE_1 = (one_mlp_for_both, queries_take_positions, padding_is_read)
STAGE_2 = (
    opt_positions_from_the_first_row, a_gelu_in_the_mouth, post_norm_in_the_mouth, no_last_norm_in_the_mouth,
    another_projection, queries_in_another_order,
)  # fmt: skip


@pytest.mark.parametrize("spoil", BOTH_STAGES + STAGE_1)
@torch.no_grad()
def test_the_tolerance_would_notice_in_stage_1(spoil, tmp_path):
    theirs = comparer()
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts()
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits_per_image

    def best():
        return query_similarities(ours.encode_image(images), ours.encode_text(ids)).amax(dim=2)

    assert_close(best(), expected)
    spoil(ours)
    assert (best() - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("spoil", BOTH_STAGES + STAGE_2)
@torch.no_grad()
def test_the_tolerance_would_notice_in_stage_2(spoil, tmp_path):
    theirs = writer()
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), sayings(theirs)
    expected = theirs(pixel_values=images, **with_places(theirs, ids, mask)).logits[:, -L:]
    assert_close(ours.mouth.lm_head(ours.write(ids, ours.look(images)))[mask], expected[mask])
    spoil(ours)
    wrong = (ours.mouth.lm_head(ours.write(ids, ours.look(images))) - expected)[mask]
    assert wrong.abs().max() > 10 * TOLERANCE


# --- what is read ----------------------------------------------------------------------------------------------------


def fresh(name: str) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in FRESH)


@torch.no_grad()
def test_what_the_checkpoint_lacks_is_fresh_and_named(tmp_path):
    theirs, models = comparer(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(saved(theirs, tmp_path))
    own, other = (model.state_dict() for model in models)
    for name in own:
        assert torch.equal(own[name], other[name]) != (name == "lm_head.dense.weight"), name
    assert models[0].fresh == models[1].fresh == FRESH and models[0].temp.item() == pytest.approx(0.07)
    assert models[0].lm_head.decoder.weight is models[0].qformer.embed.word.weight
    assert_close(models[0].lm_head.decoder.weight, theirs.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("make", [comparer, writer])
@torch.no_grad()
def test_every_tensor_has_a_place_of_its_own(make, tmp_path):
    """Each tensor of the file, changed alone, changes one tensor of ours (a tied table two names of one)."""
    theirs = make("one block", text=OPT | dict(num_hidden_layers=1))
    torch.manual_seed(0)
    before = {name: t.clone() for name, t in saved(theirs, tmp_path).state_dict().items()}
    weights, seen = load_file(tmp_path / "model.safetensors"), set()
    for name, tensor in weights.items():
        torch.manual_seed(0)
        after = blip2_from_hf(theirs.config.to_dict(), weights | {name: tensor + 1}, None).state_dict()
        changed = {own for own in after if not torch.equal(after[own], before[own])}
        tied = ({"qformer.embed.word.weight", "lm_head.decoder.weight"}, {"mouth.word.weight", "mouth.lm_head.weight"})
        assert len(changed) == 1 or changed in tied or (".qkv." in name and len(changed) == 2), name
        seen |= changed
    assert seen == {name for name in before if make is writer or not fresh(name)}


@torch.no_grad()
def test_old_files(tmp_path):
    """Position numbers, the tied table twice, half precision, shards, a square as two sides, no class named."""
    theirs = comparer()
    edit(theirs, tmp_path, {"embeddings.position_ids": torch.arange(16)[None]})
    images, (ids, mask) = pictures(theirs), texts()
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits_per_image
    edit_config(tmp_path, "vision_config", image_size=[32, 32])
    edit_config(tmp_path, architectures=None)
    ours = from_hf(tmp_path)
    assert_close(query_similarities(ours.encode_image(images), ours.encode_text(ids)).amax(dim=2), expected)
    theirs = writer()
    table = theirs.language_model.model.decoder.embed_tokens.weight
    edit(theirs, tmp_path, {"language_model.lm_head.weight": table.detach().clone()})
    images, (ids, mask) = pictures(theirs), sayings(theirs)
    places = with_places(theirs, ids, mask)

    def assert_the_same(ours):
        expected = theirs(pixel_values=images, **places).logits[:, -L:]
        assert {p.dtype for p in ours.parameters()} == {torch.float32}
        assert_close(ours.mouth.lm_head(ours.write(ids, ours.look(images)))[mask], expected[mask])

    assert_the_same(from_hf(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert_the_same(from_hf(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    half = saved(theirs.half(), tmp_path)
    theirs = theirs.float()
    assert_the_same(half)


@torch.no_grad()
def test_the_bare_class_is_stage_2_too(tmp_path):
    theirs = reference("Model")
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), sayings(theirs)
    expected = theirs(pixel_values=images, **with_places(theirs, ids, mask)).logits[:, -L:]
    assert_close(ours.mouth.lm_head(ours.write(ids, ours.look(images)))[mask], expected[mask])


@torch.no_grad()
def test_a_mouth_of_ones_own_takes_the_place_of_the_files(tmp_path):
    """Here the file's own OPT, with other numbers: the prefix is the same, the words are not."""
    theirs = writer()
    ours = saved(theirs, tmp_path)
    for p in (mouth := from_hf(tmp_path).mouth).parameters():
        p += 0.1
    other = from_hf(tmp_path, mouth=mouth)
    image = ours.look(pictures(theirs))
    ids, _ = sayings(theirs)
    assert other.mouth is mouth and other.config == ours.config
    assert_close(other.prefix(image), ours.prefix(image))
    assert_differ(mouth.lm_head(other.write(ids, image)), ours.mouth.lm_head(ours.write(ids, image)))


def test_what_a_config_leaves_out_is_the_classes_default():
    """ViT-g, BERT-base, 32 queries and the smallest OPT. Only that there are words in stage 1 has to be said (and, to
    make it quicker, that there is one block of the ViT in stage 2)."""
    bare, short = dict(model_type="blip-2"), dict(vision_config=dict(num_hidden_layers=1))
    reads = dict(qformer_config=dict(use_qformer_text_input=True))
    with torch.device("meta"):
        theirs = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(**reads))
        ours = blip2_from_hf(theirs.config.to_dict(), theirs.state_dict(), None)
        also = blip2_from_hf(bare | reads, theirs.state_dict(), None)
        c = ours.config
        assert c == also.config and (c.image_width, c.queries, c.width, c.depth, c.heads) == (1408, 32, 768, 12, 12)
        assert (c.image_eps, c.eps, c.cross_every, c.embed_dim, c.vocab_size) == (1e-6, 1e-12, 2, 256, 30522)
        del theirs, ours, also
        theirs = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**short))
        weights = {name: t for name, t in theirs.state_dict().items() if "lm_head" not in name}  # tied
        ours, also = (blip2_from_hf(config, weights, None) for config in (theirs.config.to_dict(), bare | short))
    assert ours.mouth.config == also.mouth.config and ours.config == also.config
    c = ours.mouth.config
    assert (c.width, c.depth, c.heads, c.max_text, c.vocab_size, c.act) == (768, 12, 12, 2048, 50272, "relu")
    assert (c.pad_id, c.sep_id, c.dec_id, c.eps, c.dropout) == (1, 2, 2, 1e-5, 0.1)


def test_every_tensor_at_full_size():
    """All names and shapes of ViT-g, the Q-Former and OPT-2.7b find their place; the paper's numbers."""
    opt = dict(model_type="opt", hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240, num_hidden_layers=32,
               num_attention_heads=32, vocab_size=50304, eos_token_id=50118)  # fmt: skip
    words = dict(use_qformer_text_input=True, vocab_size=30523)
    with torch.device("meta"):
        theirs = transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(text_config=opt))
        weights = {name: t for name, t in theirs.state_dict().items() if "lm_head" not in name}
        ours = blip2_from_hf(theirs.config.to_dict(), weights, None)
        reader = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(qformer_config=words))
        first = blip2_from_hf(reader.config.to_dict(), reader.state_dict(), None)
    skipped = 2 * 2560  # the rows of OPT's position table that are never used
    assert count_parameters(ours) == count_parameters(theirs) - skipped
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert round(trained / 1e6) == 107 and ours.mouth.config.sep_id == 50118  # the paper: 107M of 3.1B + ViT
    assert round(count_parameters(ours.eye) / 1e6) == 986 and first.fresh == FRESH
    head = 768 * 768 + 3 * 768 + 30523  # what stage 1 has and the file has not
    assert count_parameters(first) == count_parameters(reader) + head + 1
    trained = sum(p.numel() for p in first.parameters() if p.requires_grad)
    assert round(trained / 1e6) == 187  # the paper: 188M
    assert first.config.dec_id == 30522 and first.config.sep_id == 102


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An official model of each stage, as it saves itself."""
    made = {make: tmp_path_factory.mktemp(make.__name__) for make in (comparer, writer)}
    for make, folder in made.items():
        make().save_pretrained(folder)
    return made


M, E = "language_model.model.decoder.", "qformer.encoder.layer."


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (comparer, {"vision_model.post_layernorm.bias": None}, "lacks ln_vision.bias"),
        (comparer, {"query_tokens": None}, "lacks qformer.query_tokens"),
        (comparer, {"query_tokens": torch.zeros(1, 8, 32)}, "qformer.query_tokens has shape (1, 8, 32)"),
        (comparer, {"embeddings.word_embeddings.weight": None},
         "lacks lm_head.decoder.weight, qformer.embed.word.weight"),
        (comparer, {"itm_head.bias": None}, "lacks itm_head.bias"),
        (comparer, {"vision_projection.weight": torch.zeros(9, 32)}, "vision_proj.weight has shape (9, 32)"),
        (comparer, {f"{E}1.intermediate.dense.bias": None}, "lacks qformer.blocks.1.mlp.fc1.bias"),
        (comparer, {f"{E}1.crossattention.output.dense.bias": torch.zeros(32)}, "no place for"),
        (comparer, {f"{E}2.crossattention.attention.key.weight": torch.zeros(32, 9)},
         "parts of qformer.blocks.2.cross.attn.kv.weight"),
        (comparer, {"vision_model.encoder.layers.1.self_attn.qkv.weight": torch.zeros(70, 24)},
         "lacks eye.tower.encoder.blocks.1.attn.kv.weight"),
        (comparer, {"vision_model.encoder.layers.1.mlp.fc1.weight": torch.zeros(95, 24)},
         "mlp.fc1.weight has shape (95, 24)"),
        (comparer, {"language_projection.bias": torch.zeros(40)}, "both stage 1's heads and stage 2's"),
        (writer, {"language_projection.weight": None}, "lacks language_proj.weight"),
        (writer, {f"{E}1.output_query.LayerNorm.weight": None}, "lacks qformer.blocks.1.query_norm.weight"),
        (writer, {f"{E}1.output.dense.bias": torch.zeros(32)}, "no place for"),  # words in stage 2
        (writer, {f"{M}embed_positions.weight": torch.zeros(32, 40)}, "mouth.position.weight has shape (30, 40)"),
        (writer, {f"{M}embed_positions.weight": torch.tensor(0.0)}, "mouth.position.weight has shape ()"),
        (writer, {f"{M}embed_tokens.weight": None}, "lacks mouth.lm_head.weight, mouth.word.weight"),
        (writer, {f"{M}final_layer_norm.weight": None}, "lacks mouth.norm.weight"),
        (writer, {f"{M}layers.1.final_layer_norm.weight": None}, "lacks mouth.blocks.1.norm2.weight"),
        (writer, {f"{M}layers.1.self_attn.v_proj.bias": None}, "lacks mouth.blocks.1.attn.kv.bias"),
        (writer, {f"{M}layers.3.fc1.bias": torch.zeros(160)}, "no place for"),
        (writer, {"language_model.lm_head.weight": torch.zeros(60, 40)}, "two different word tables"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(make, changes, words, folders, tmp_path):
    shutil.copytree(folders[make], tmp_path, dirs_exist_ok=True)
    edit_file(tmp_path, changes)
    assert words in message(tmp_path)


@pytest.mark.parametrize(
    ("make", "part", "config", "words"),
    [
        (comparer, ["vision_config"], {"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        (comparer, ["vision_config"], {"image_size": 33}, "impossible model"),
        (comparer, ["vision_config"], {"image_size": [32, 64]}, "only square"),
        (comparer, ["vision_config"], {"num_attention_heads": 5}, "impossible model"),
        (comparer, ["vision_config"], {"num_hidden_layers": 4}, "lacks eye.tower.encoder.blocks.3."),
        (comparer, ["vision_config"], {"intermediate_size": 0}, "whole number"),
        (comparer, ["qformer_config"], {"hidden_act": "gelu_new"}, "'gelu_new'"),
        (comparer, ["qformer_config"], {"use_qformer_text_input": False}, "use_qformer_text_input is false"),
        (comparer, ["qformer_config"], {"vocab_size": 111}, "has shape"),
        (comparer, ["qformer_config"], {"vocab_size": 102}, "not both among its 102 tokens"),
        (comparer, ["qformer_config"], {"vocab_size": "many"}, "whole number"),
        (comparer, ["qformer_config"], {"pad_token_id": None}, "whole number"),
        (comparer, ["qformer_config"], {"num_attention_heads": 5}, "impossible model"),
        (comparer, ["qformer_config"], {"intermediate_size": 33}, "no whole multiple"),
        (comparer, ["qformer_config"], {"cross_attention_frequency": 0}, "whole number >= 1"),
        (comparer, ["qformer_config"], {"cross_attention_frequency": 4}, "no place for"),
        (comparer, ["qformer_config"], {"max_position_embeddings": 40}, "qformer.embed.position.weight has shape"),
        (comparer, [], {"qformer_config": [1]}, "qformer_config in config.json is no JSON object"),
        (comparer, [], {"num_query_tokens": 5}, "qformer.query_tokens has shape (1, 4, 32)"),
        (comparer, [], {"num_query_tokens": 0}, "whole number >= 1"),
        (writer, ["text_config"], {"model_type": "llama"}, "is of type 'llama' where we have a place for an OPT"),
        (writer, ["text_config"], {"activation_function": "gelu"}, "activation_function 'gelu' where ours has 'relu'"),
        (writer, ["text_config"], {"do_layer_norm_before": False}, "do_layer_norm_before False"),
        (writer, ["text_config"], {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
        (writer, ["text_config"], {"enable_bias": False}, "enable_bias False"),
        (writer, ["text_config"], {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        (writer, ["text_config"], {"word_embed_proj_dim": 20}, "word_embed_proj_dim 20 where ours has 40"),
        (writer, ["text_config"], {"ffn_dim": 100}, "no whole multiple of hidden_size 40"),
        (writer, ["text_config"], {"num_attention_heads": 7}, "impossible model"),
        (writer, ["text_config"], {"eos_token_id": 60}, "not all among its 60 tokens"),
        (writer, ["text_config"], {"eos_token_id": [5, 6]}, "whole number"),
        (writer, ["text_config"], {"max_position_embeddings": 34}, "mouth.position.weight has shape (32, 40)"),
        (writer, ["text_config"], {"num_hidden_layers": 4}, "lacks mouth.blocks.3."),
        (writer, ["text_config"], {"dropout": 2}, "impossible model"),
    ],
)
def test_config_we_cannot_build(make, part, config, words, folders, tmp_path):
    shutil.copytree(folders[make], tmp_path, dirs_exist_ok=True)
    edit_config(tmp_path, *part, **config)
    assert words in message(tmp_path)


def test_requests_that_make_no_sense(folders, tmp_path):
    assert "no classifier" in message(folders[comparer], num_classes=5)
    assert "does not write: leave mouth out" in message(folders[comparer], mouth=nn.Identity())
    narrow = nn.Identity()
    narrow.config = SimpleNamespace(width=20)
    assert "reads vectors of 20 numbers, and its projection gives 40" in message(folders[writer], mouth=narrow)
    transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**QFORMER)).save_pretrained(tmp_path)
    assert "'blip_2_qformer'" in message(tmp_path)
    edit_config(tmp_path, model_type="blip-2")
    assert "neither stage 1's heads nor stage 2's language model" in message(tmp_path)
    edit_config(tmp_path, model_type="blip")
    with pytest.raises(CheckpointError, match="'blip', which has no mouth: leave mouth out"):
        from_hf(tmp_path, mouth=nn.Identity())


# --- pictures for official weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(500, 375), (64, 90), (224, 224)])
def test_preprocess_blip_at_another_size_is_that_of_blip2(shape):
    processor = getattr(transformers, "BlipImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no BlipImageProcessorPil")
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = processor(size=dict(height=224, width=224))(images=image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(preprocess_blip(image, size=224), expected, rtol=0, atol=1e-6)
