"""Our BLIP beside transformers' classes, weight for weight: the same numbers within 1e-5, the same words.

transformers has no class with all of BLIP: one reads and matches, one writes. Neither knows of shared weights, so that
a model of ours that shares is compared with the two of them after their weights were made equal where BLIP ties them.
"""

from __future__ import annotations

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
    randomise,
    saved,
)
from PIL import Image
from safetensors.torch import load_file

from minivlp.generate import beam_search, discourage, greedy, keep_nucleus
from minivlp.layers import count_parameters
from minivlp.losses import IGNORE, masked_lm_loss
from minivlp.models.blip import BLIP, NOTHING_SHARED, BLIPConfig, led_by
from minivlp.pretrained import BLIP_NAMES, BLIP_UNUSED, blip_from_hf, from_hf, preprocess_blip, rename

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

WORDS, L, S = 50, 9, 17
CLS, SEP, DEC, ENC = 2, 3, 48, 49
END_BIAS = 2.0
# Every field that matters is set: the class's own defaults differ from the official models (eight heads, other eps),
# and its ViT would start with weights of 1e-10, so that no picture would change anything.
TEXT = dict(
    hidden_size=32, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=WORDS,
    max_position_embeddings=16, layer_norm_eps=1e-12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    pad_token_id=0, bos_token_id=DEC, sep_token_id=SEP, eos_token_id=4, is_decoder=True, initializer_range=0.02,
)  # fmt: skip
VISION = dict(
    hidden_size=24, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8,
    layer_norm_eps=1e-6, attention_dropout=0.0, initializer_range=0.02,
)  # fmt: skip
# name -> options of both towers, of the text, of the picture, of the whole
VARIANTS = {
    "plain": ({}, {}, {}, {}),
    "old name of GELU": (dict(hidden_act="gelu_python"), {}, {}, {}),
    "image eps 0.1": ({}, {}, dict(layer_norm_eps=0.1), {}),  # absurd, so that an ignored eps cannot hide
    "text eps 0.1": ({}, dict(layer_norm_eps=0.1), {}, {}),
    "one head for the picture": ({}, {}, dict(num_attention_heads=1), {}),
    "one head for the words": ({}, dict(num_attention_heads=1), {}, {}),
    "eight heads for the words": ({}, dict(num_attention_heads=8), {}, {}),
    "narrow MLP": ({}, dict(intermediate_size=64), dict(intermediate_size=48), {}),
    "one block": (dict(num_hidden_layers=1), {}, {}, {}),
    "a deep text": ({}, dict(num_hidden_layers=5), {}, {}),
    "equal widths": ({}, {}, dict(hidden_size=32, intermediate_size=128), {}),
    "patch 4": ({}, {}, dict(patch_size=4), {}),
    "large pictures": ({}, {}, dict(image_size=48), {}),
    "long texts": ({}, dict(max_position_embeddings=60), {}, {}),
    "small shared space": ({}, {}, {}, dict(image_text_hidden_size=5)),
    "dropout": ({}, dict(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1), {}, {}),  # asleep
    "other ids": ({}, dict(bos_token_id=30, sep_token_id=6, pad_token_id=0), {}, {}),
}
FRESH = {
    "ForConditionalGeneration": ("text.embed", "text.encoder", "vision_proj", "text_proj", "temp", "itm_head"),
    "ForImageTextRetrieval": ("text.decoder", "text.decoder_embed", "temp", "lm_head"),
    "ForQuestionAnswering": ("vision_proj", "text_proj", "temp", "itm_head"),
}


def reference(kind: str, name: str = "plain", *, attention: str | None = None, **text: object):
    """An official class with random weights."""
    both, words, vision, options = VARIANTS[name]
    config = transformers.BlipConfig(
        text_config=TEXT | both | words | text, vision_config=VISION | both | vision,
        **(dict(image_text_hidden_size=20) | options), attn_implementation=attention,
    )  # fmt: skip
    theirs = randomise(getattr(transformers, f"Blip{kind}")(config))
    for name, parameter in theirs.named_parameters():
        if name.endswith("crossattention.self.query.weight"):
            parameter.data *= 5  # so that a word looks at some patches more than at others
        if name.endswith("crossattention.output.dense.weight"):
            parameter.data *= 5  # and hears what they say
        if name.endswith("self_attn.qkv.weight"):
            parameter.data *= 3  # and so do the patches among themselves, or their order would hardly count
    return theirs


def writer(**options: object):
    """A captioner with opinions: its words follow from what was said and seen, and some of its texts end."""
    theirs = reference("ForConditionalGeneration", **options)
    theirs.text_decoder.bert.embeddings.word_embeddings.weight.data *= 5
    theirs.text_decoder.cls.predictions.bias.data[SEP] = END_BIAS
    return theirs


def pictures(theirs, *, seed=0, count=3):
    return random_pictures(theirs.config.vision_config.image_size, seed=seed, count=count)


def texts(*, seed=0, lengths=(L, 6, 3), first=CLS):
    """ids (B, L) with [SEP] at the end and 0 as padding, and the mask."""
    ids = torch.randint(7, 40, (len(lengths), L), generator=torch.Generator().manual_seed(seed))
    position, last = torch.arange(L), torch.tensor(lengths)[:, None] - 1
    ids = ids.masked_fill(position == last, SEP).masked_fill(position > last, 0)
    ids[:, 0] = first
    return ids, position <= last


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_writing_equals_transformers(name, tmp_path):
    theirs = reference("ForConditionalGeneration", name)
    ours = saved(theirs, tmp_path)
    c, text = ours.config, theirs.config.text_config
    assert (ours.fresh, ours.labels, ours.training) == (FRESH["ForConditionalGeneration"], (), False)
    assert c.decoder_own == NOTHING_SHARED
    assert (c.dec_id, c.enc_id, c.sep_id, c.pad_id) == (text.bos_token_id, text.bos_token_id + 1, text.sep_token_id, 0)
    images, (ids, mask) = pictures(theirs), texts(first=c.dec_id)

    def logits(images, ids, mask=mask):
        return theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits

    expected = logits(images, ids)
    states = theirs.vision_model(images).last_hidden_state
    assert_close(ours.look(images), states)
    written = ours.lm_head(ours.write(ids, ours.look(images)))
    assert_close(written[mask], expected[mask])
    assert_close(ours.lm_head(ours.write(ids, states)), theirs(pixel_values=images, input_ids=ids).logits)
    # Agreement would be worth nothing if the words did not depend on all that goes in.
    other, changed = pictures(theirs, seed=1), ids.clone()
    changed[:, 1] = 41
    assert_differ(theirs.vision_model(other).last_hidden_state, states)
    for new_images, new_ids in ((other, ids), (images.roll(8, dims=-1), ids), (images, changed)):
        now = logits(new_images, new_ids)
        assert_differ(now[:, 1], expected[:, 1])
        assert_close(ours.lm_head(ours.write(new_ids, ours.look(new_images)))[mask], now[mask])
    assert_close(logits(images, changed)[:, 0], expected[:, 0])  # and not on what follows
    assert expected[:, 0].std() > 0.05 and not torch.allclose(expected[0, 0], expected[1, 0], atol=100 * TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_writing_equals_transformers(smoothing, tmp_path):
    """Position t tells token t + 1, padding is not asked for, and 0.1 of the target is spread over all words."""
    theirs = writer(label_smoothing=smoothing)
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts(first=DEC)
    labels = ids.masked_fill(~mask, IGNORE)
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    states = ours.write(ids, ours.look(images))
    loss = masked_lm_loss(ours.lm_head, states[:, :-1], labels[:, 1:], smoothing=smoothing)
    assert_close(loss, expected)
    wrong = {
        "other smoothing": masked_lm_loss(ours.lm_head, states[:, :-1], labels[:, 1:], smoothing=0.1 - smoothing),
        "padding asked for": masked_lm_loss(ours.lm_head, states[:, :-1], ids[:, 1:], smoothing=smoothing),
        "no shift": masked_lm_loss(ours.lm_head, states, labels, smoothing=smoothing),
        "[CLS] first": masked_lm_loss(
            ours.lm_head, ours.text.decode(led_by(ids, CLS), ours.look(images))[0][:, :-1], labels[:, 1:],
            smoothing=smoothing,
        ),
    }  # fmt: skip
    for name, other in wrong.items():
        assert (other - expected).abs() > 100 * TOLERANCE, name
    # The same gradients: of the tied table, of the picture's patches, and of a cross-attention in between.
    expected.backward()
    loss.backward()
    bert, text = theirs.text_decoder.bert, ours.text
    table = bert.embeddings.word_embeddings.weight.grad
    not_padding = torch.arange(WORDS) != 0  # whose vector never learns in transformers as something that is read
    assert table[7:].abs().max() > 1e-3
    assert_close(text.decoder_embed.word.weight.grad[not_padding], table[not_padding])
    assert ours.lm_head.decoder.weight is text.decoder_embed.word.weight
    kernel = theirs.vision_model.embeddings.patch_embedding.weight.grad
    assert kernel.abs().max() > 1e-3
    assert_close(ours.vision.embed.patch_embed.proj.weight.grad, kernel.flatten(1))
    cross = bert.encoder.layer[1].crossattention
    assert_close(text.decoder[1].cross.attn.q.weight.grad, cross.self.query.weight.grad)
    assert_close(
        text.decoder[1].cross.attn.kv.weight.grad,
        torch.cat([cross.self.key.weight.grad, cross.self.value.weight.grad]),
    )
    assert_close(ours.lm_head.decoder.bias.grad, theirs.text_decoder.cls.predictions.bias.grad)


def written(theirs, images, *, longest: int, **options: object) -> list[list[int]]:
    """What transformers writes, as our functions give it: without the first token, filled up with the end."""
    ids = theirs.generate(pixel_values=images, max_new_tokens=longest, do_sample=False, **options)
    texts = []
    for row in ids[:, 1:].tolist():
        words = row[: row.index(SEP)] if SEP in row else row
        texts.append(words + [SEP] * (ids.shape[1] - 1 - len(words)))
    return texts


@pytest.mark.parametrize("shortest", [0, 5])
@torch.no_grad()
def test_greedy_writing_equals_transformers_word_by_word(shortest, tmp_path):
    theirs = writer()
    ours = saved(theirs, tmp_path)
    images = pictures(theirs, count=12)
    first = torch.full((12,), DEC)
    expected = written(theirs, images, longest=12, num_beams=1, min_new_tokens=shortest)
    for cache in (True, False):
        speaker = ours.speaker(ours.look(images), cache=cache)
        assert greedy(speaker, first, end=SEP, longest=12, shortest=shortest).tolist() == expected
    lengths = [text.index(SEP) if SEP in text else 12 for text in expected]
    assert len(set(map(tuple, expected))) > 6 and min(lengths) >= shortest and len(set(lengths)) > 2
    assert len({word for text in expected for word in text}) > 8


@pytest.mark.parametrize("beams", [2, 3])
@pytest.mark.parametrize(("longest", "shortest", "penalty"), [(12, 5, 1.0), (12, 0, 1.0), (6, 2, 0.0), (12, 0, 2.0)])
@torch.no_grad()
def test_beam_search_equals_transformers_word_by_word(beams, longest, shortest, penalty, tmp_path):
    """Official captions: 3 beams, 5 to 20 words."""
    theirs = writer()
    ours = saved(theirs, tmp_path)
    images = pictures(theirs, count=12)
    options = dict(longest=longest, length_penalty=penalty)
    expected = written(theirs, images, num_beams=beams, min_new_tokens=shortest, **options)
    first = torch.full((12,), DEC)
    for cache in (True, False):
        speaker = ours.speaker(ours.look(images), copies=beams, cache=cache)
        found = beam_search(speaker, first, end=SEP, beams=beams, shortest=shortest, **options)
        assert found.tolist() == expected
    assert len(set(map(tuple, expected))) > 6
    one = greedy(ours.speaker(ours.look(images)), first, end=SEP, longest=longest, shortest=shortest)
    assert one.tolist() != expected  # which is not what greedy finds


def test_what_nucleus_sampling_draws_from_equals_transformers():
    scores = 4 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    texts = torch.randint(30, (50, 6), generator=torch.Generator().manual_seed(1))
    for p in (0.1, 0.5, 0.9, 0.99):
        assert torch.equal(keep_nucleus(scores, p), transformers.TopPLogitsWarper(p)(None, scores))
    for penalty in (1.0, 1.1, 2.0):
        official = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(discourage(scores, texts, penalty), official(texts, scores.clone()))


# --- comparing and matching ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_comparing_and_matching_equal_transformers(name, tmp_path):
    theirs = reference("ForImageTextRetrieval", name)
    ours = saved(theirs, tmp_path)
    c = ours.config
    assert (ours.fresh, ours.labels, ours.training) == (FRESH["ForImageTextRetrieval"], (), False)
    assert (c.dec_id, c.enc_id) == (theirs.config.text_config.bos_token_id, theirs.config.text_config.bos_token_id + 1)
    images, (ids, mask) = pictures(theirs), texts()

    def both(images, ids, mask=mask):
        """Cosines of all pictures with all texts, and scores of each picture with its own text, led by [ENC]."""
        options = dict(pixel_values=images, attention_mask=mask.long())
        cosines = theirs(input_ids=ids, use_itm_head=False, **options).itm_score
        return cosines, theirs(input_ids=led_by(ids, c.enc_id), **options).itm_score

    def ours_both(images, ids, mask=mask):
        named = ours(images, ids, mask)
        return named["image vector"] @ named["text vector"].T, named["match"]

    expected, got = both(images, ids), ours_both(images, ids)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    assert_close(ours.encode_image(images) @ ours.encode_text(ids).T, expected[0])
    # All states, not those of the first token alone.
    image = ours.look(images)
    led = led_by(ids, c.enc_id)
    asked = dict(encoder_hidden_states=image, encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long))
    states = theirs.text_encoder(input_ids=led, attention_mask=mask.long(), **asked).last_hidden_state
    assert_close(ours.text.ground(ours.read(ids), mask, image)[0][mask], states[mask])
    # Agreement would be worth nothing if the scores did not depend on all that goes in.
    changed = ids.clone()
    changed[:, 1] = 41
    for new_images, new_ids in ((pictures(theirs, seed=1), ids), (images.roll(8, dims=-1), ids), (images, changed)):
        now = both(new_images, new_ids)
        for one, other, before in zip(ours_both(new_images, new_ids), now, expected, strict=True):
            assert_close(one, other)
            assert_differ(other, before)
    assert expected[0].std() > 0.01 and expected[1].std() > 0.01
    # [CLS] in the place of [ENC], as transformers' class takes it: other scores.
    as_it_comes = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).itm_score
    assert_differ(as_it_comes, expected[1])
    assert_close(ours.match(ours.text.embed(ids), mask, image), as_it_comes)


@torch.no_grad()
def test_where_words_look_equals_transformers(tmp_path):
    theirs = reference("ForImageTextRetrieval", attention="eager")
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts(first=ENC)
    image = ours.look(images)
    expected = theirs.text_encoder(
        input_ids=ids, attention_mask=mask.long(), encoder_hidden_states=image, output_attentions=True,
        encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long),
    ).cross_attentions  # fmt: skip
    named = ours.text.ground(ours.read(ids), mask, image, everything=True)[1]
    assert list(named) == [f"cross_{i}" for i in range(3)] and len(expected) == 3
    for weights, theirs_ in zip(named.values(), expected, strict=True):
        assert_close(weights, theirs_)
        assert theirs_.std() > 0.005 and theirs_.shape == (3, 4, L, S)


@torch.no_grad()
def test_a_question_and_its_answer_equal_transformers(tmp_path):
    """The class for questions has both halves: the encoder reads the question, the decoder asks what it made of it.

    transformers 5.24 loses the question's padding mask on its way into the cross-attention, so that it is asked one
    question at a time.
    """
    theirs = reference("ForQuestionAnswering", "equal widths")
    ours = saved(theirs, tmp_path)
    assert ours.fresh == FRESH["ForQuestionAnswering"]
    images, (questions, mask) = pictures(theirs), texts(first=ENC)
    answers = texts(seed=1, first=DEC)[0][:, :5]
    image, answered = ours.look(images), []
    for b, length in enumerate(mask.sum(1)):
        asked = questions[b : b + 1, :length]
        read = theirs.text_encoder(input_ids=asked, encoder_hidden_states=image[b : b + 1]).last_hidden_state
        answered.append(theirs.text_decoder(input_ids=answers[b : b + 1], encoder_hidden_states=read).logits)
    expected = torch.cat(answered)
    states = ours.text.ground(ours.read(questions), mask, image)[0]
    assert_close(ours.lm_head(ours.write(answers, states, context_mask=mask)), expected)
    assert_differ(ours.lm_head(ours.write(answers, states))[1:], expected[1:])
    assert_differ(ours.lm_head(ours.write(answers, states.flip(0), context_mask=mask.flip(0)))[::2], expected[::2])


# --- sharing ---------------------------------------------------------------------------------------------------------


def ours_with(config: BLIPConfig, *theirs) -> BLIP:
    """A BLIP of ours with the weights of official models, as far as they have them: the official names -> ours, one
    after the other."""
    model = BLIP(config).eval()
    own = model.state_dict()
    for official in theirs:
        for name, tensor in rename(official.state_dict(), BLIP_NAMES, drop=BLIP_UNUSED).items():
            own_name = name.replace(".qkv.", ".q.").replace(".k.", ".kv.").replace(".v.", ".kv.")
            target, half = own[own_name], len(own[own_name]) // 2
            if ".qkv." in name:
                third = len(tensor) // 3
                own[own_name].copy_(tensor[:third])
                own[name.replace(".qkv.", ".kv.")].copy_(tensor[third:])
            elif ".k." in name or ".v." in name:
                target[half * (".v." in name) :][:half].copy_(tensor)
            else:
                target.copy_(tensor.reshape(target.shape))
    return model


def tie(reader, captioner) -> None:
    """The official rule: of the decoder all is the encoder's, but what has `attention` at that place of its name (its
    self-attention with output and LayerNorm; `crossattention` is another name)."""
    encoder = dict(reader.text_encoder.named_parameters())
    for name, parameter in captioner.text_decoder.bert.named_parameters():
        if "/attention" not in name.replace(".", "/"):
            parameter.data = encoder[name].data.clone()
    captioner.vision_model.load_state_dict(reader.vision_model.state_dict())


def two_halves(*, tied: bool):
    torch.manual_seed(0)
    reader, captioner = reference("ForImageTextRetrieval"), reference("ForConditionalGeneration")
    for parameter in captioner.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    captioner.vision_model.load_state_dict(reader.vision_model.state_dict())
    if tied:
        tie(reader, captioner)
    return reader, captioner


def shape_of(theirs, tmp_path) -> BLIPConfig:
    return saved(theirs, tmp_path).config


@pytest.mark.parametrize("decoder_own", [("self-attention",), NOTHING_SHARED])
@torch.no_grad()
def test_one_model_that_shares_equals_two_that_were_tied(decoder_own, tmp_path):
    shares = decoder_own != NOTHING_SHARED
    reader, captioner = two_halves(tied=shares)
    config = BLIPConfig(**(vars(shape_of(reader, tmp_path)) | dict(decoder_own=decoder_own)))
    ours = ours_with(config, reader, captioner)
    assert (ours.text.encoder[1].mlp is ours.text.decoder[1].mlp) == shares
    images, (ids, mask) = pictures(reader), texts()
    named = ours(images, ids, mask)
    options = dict(pixel_values=images, attention_mask=mask.long())
    itm = reader(input_ids=led_by(ids, ENC), **options).itm_score
    itc = reader(input_ids=ids, use_itm_head=False, **options).itm_score
    words = captioner(input_ids=led_by(ids, DEC), **options).logits
    assert_close(named["match"], itm)
    assert_close(named["image vector"] @ named["text vector"].T, itc)
    assert_close(named["next"][mask], words[mask])
    # Where the halves are different, a model that shares cannot be both.
    if shares:
        reader, captioner = two_halves(tied=False)
        wrong = ours_with(config, reader, captioner)(images, ids, mask)
        assert_differ(wrong["match"], reader(input_ids=led_by(ids, ENC), **options).itm_score)


def test_the_official_rule_ties_what_ours_shares():
    """By the names of the official code: what its rule leaves out is what our decoder has for itself."""
    reader, captioner = two_halves(tied=True)
    encoder = dict(reader.text_encoder.named_parameters())
    own = {name for name, p in captioner.text_decoder.bert.named_parameters() if not torch.equal(p, encoder[name])}
    self_attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    assert {name.split(".", 3)[3] for name in own} == {
        f"attention.{part}.{kind}" for part in self_attention for kind in ("weight", "bias")
    }
    alone = sum(p.numel() for p in captioner.text_decoder.bert.parameters() if p.ndim) - sum(
        p.numel() for name, p in captioner.text_decoder.bert.named_parameters() if name in own
    )
    blip = BLIP(BLIPConfig(text_width=32, text_depth=3, text_heads=4, vocab_size=WORDS, max_text=16, image_width=24,
                           image_heads=2))  # fmt: skip
    shared = {id(p) for p in blip.text.encoder.parameters()} | {id(p) for p in blip.text.embed.parameters()}
    both = [p for p in [*blip.text.decoder.parameters(), *blip.text.decoder_embed.parameters()] if id(p) in shared]
    assert sum({id(p): p.numel() for p in both}.values()) == alone


# --- common mistakes -------------------------------------------------------------------------------------------------


# Each breaks one thing of the loaded model.
def other_eps(ours):
    ours.lm_head.norm.eps = 1e-3


def other_eps_of_the_picture(ours):
    ours.vision.encoder.norm.eps = 1e-3


def other_heads(ours):
    ours.text.decoder[1].attn.heads = 8


def tanh_gelu(ours):
    for block in ours.text.decoder:
        block.mlp.act = torch.nn.GELU(approximate="tanh")


def keys_and_values(ours):
    kv = ours.text.decoder[0].cross.attn.kv.weight
    kv.copy_(kv.roll(32, dims=0))


def norms(ours):
    block = ours.text.decoder[0]
    block.norm1, block.cross.norm = block.cross.norm, block.norm1


def no_norm_after_the_picture(ours):
    ours.vision.encoder.norm = torch.nn.Identity()


def positions_reversed(ours):
    weight = ours.text.decoder_embed.position.weight
    weight.copy_(weight.flip(0))


def the_encoders_self_attention(ours):
    ours.text.decoder[0].attn = ours.text.encoder[0].attn


def cls_leads(ours):
    object.__setattr__(ours.config, "dec_id", CLS)


def nobody_asks_the_picture(ours):
    for block in ours.text.decoder:
        block.cross.attn.proj.weight.zero_()


def no_class_token(ours):
    ours.vision.register_forward_hook(lambda module, inputs, output: output[:, 1:])


WRONG = (
    other_eps, other_eps_of_the_picture, other_heads, tanh_gelu, keys_and_values, norms, no_norm_after_the_picture,
    positions_reversed, the_encoders_self_attention, cls_leads, nobody_asks_the_picture, no_class_token,
)  # fmt: skip


@pytest.mark.parametrize("spoil", WRONG)
@torch.no_grad()
def test_the_tolerance_would_notice(spoil, tmp_path):
    theirs = reference("ForConditionalGeneration")
    ours = saved(theirs, tmp_path)
    images, (ids, mask) = pictures(theirs), texts(first=DEC)
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits
    assert_close(ours.lm_head(ours.write(ids, ours.look(images)))[mask], expected[mask])
    spoil(ours)
    wrong = (ours.lm_head(ours.write(ids, ours.look(images))) - expected)[mask]
    assert wrong.abs().max() > 10 * TOLERANCE


@torch.no_grad()
def test_without_its_own_starting_deviation_the_picture_would_not_matter():
    """The trap of the default configuration: a ViT of 1e-10 gives every picture the same states."""
    vision = {name: value for name, value in VISION.items() if name != "initializer_range"}
    config = transformers.BlipConfig(text_config=TEXT, vision_config=vision)
    theirs = transformers.BlipForConditionalGeneration(config).eval()
    ids, _ = texts(first=DEC)
    one, other = (theirs(pixel_values=pictures(theirs, seed=seed), input_ids=ids).logits for seed in (0, 1))
    assert (one - other).abs().max() < TOLERANCE


def inside(name: str, parts: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FRESH)
@torch.no_grad()
def test_what_the_checkpoint_lacks_is_fresh_and_named(kind, tmp_path):
    theirs = reference(kind)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(saved(theirs, tmp_path))
    assert not models[0].training and models[0].fresh == models[1].fresh == FRESH[kind]
    own, other = (model.state_dict() for model in models)
    for name in own:
        random = inside(name, FRESH[kind]) and "norm" not in name and name.endswith("weight")
        assert torch.equal(own[name], other[name]) != random, name
    assert models[0].temp.item() == pytest.approx(0.07)
    assert models[0].lm_head.decoder.weight is models[0].text.decoder_embed.word.weight


@torch.no_grad()
def test_every_tensor_has_a_place_of_its_own(tmp_path):
    """Each tensor of the file, changed alone, changes one tensor of ours (a tied table two names of one)."""
    for kind in ("ForConditionalGeneration", "ForImageTextRetrieval"):
        theirs = reference(kind, "one block")
        torch.manual_seed(0)
        before = {name: t.clone() for name, t in saved(theirs, tmp_path).state_dict().items()}
        weights, seen = load_file(tmp_path / "model.safetensors"), set()
        for name, tensor in weights.items():
            torch.manual_seed(0)
            after = blip_from_hf(theirs.config.to_dict(), weights | {name: tensor + 1}, None).state_dict()
            changed = {own for own in after if not torch.equal(after[own], before[own])}
            tied = {"text.decoder_embed.word.weight", "lm_head.decoder.weight"}
            assert len(changed) == 1 or changed == tied or (".qkv." in name and len(changed) == 2), name
            seen |= changed
        assert seen == {name for name in before if not inside(name, FRESH[kind])}


@torch.no_grad()
def test_old_files(tmp_path):
    """Position numbers, both names of the output's bias, the tied table twice, half precision: all harmless."""
    theirs = reference("ForConditionalGeneration")
    bias, table = theirs.text_decoder.cls.predictions.bias, theirs.text_decoder.bert.embeddings.word_embeddings.weight
    extra = {"text_decoder.bert.embeddings.position_ids": torch.arange(16)[None],
             "text_decoder.cls.predictions.decoder.bias": bias.detach().clone(),
             "text_decoder.cls.predictions.decoder.weight": table.detach().clone()}  # fmt: skip
    edit(theirs, tmp_path, extra)
    images, (ids, mask) = pictures(theirs), texts(first=DEC)
    ours = from_hf(tmp_path)
    assert_close(
        ours.lm_head(ours.write(ids, ours.look(images)))[mask],
        theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits[mask],
    )
    edit_config(tmp_path, "vision_config", image_size=[32, 32])
    assert from_hf(tmp_path).config == ours.config
    half = saved(theirs.half(), tmp_path)
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    theirs = theirs.float()
    assert_close(
        half.lm_head(half.write(ids, half.look(images)))[mask],
        theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits[mask],
    )


def test_what_a_config_leaves_out_is_the_classes_default():
    """transformers' own defaults, not those of the official models: eight heads for words, eps 1e-5 for pictures."""
    config = transformers.BlipConfig().to_dict()
    with torch.device("meta"):
        weights = transformers.BlipForImageTextRetrieval(transformers.BlipConfig()).state_dict()
        ours = blip_from_hf(config, weights, None).config
        bare = blip_from_hf(dict(model_type="blip"), weights, None).config
    assert ours == bare and (ours.text_heads, ours.image_heads, ours.image_eps, ours.text_eps) == (8, 12, 1e-5, 1e-12)
    assert (ours.dec_id, ours.enc_id, ours.sep_id, ours.pad_id, ours.vocab_size) == (30522, 30523, 102, 0, 30524)


@pytest.mark.parametrize(
    ("kind", "missing"), [("ForConditionalGeneration", 223_971_644), ("ForImageTextRetrieval", 223_744_258)]
)
def test_every_tensor_at_full_size(kind, missing):
    """All names and shapes of the default configuration, ViT-B/16 and BERT-base at 384 pixels, find their place."""
    with torch.device("meta"):
        theirs = getattr(transformers, f"Blip{kind}")(transformers.BlipConfig())
        weights = {name: t for name, t in theirs.state_dict().items() if "predictions.decoder." not in name}  # tied
        ours = blip_from_hf(theirs.config.to_dict(), weights, None)
    assert ours.fresh == FRESH[kind] and count_parameters(theirs) == missing
    assert round(missing / 1e6) == 224 and round(count_parameters(ours) / 1e6) == 362
    assert ours.vision.embed.pos_embed.shape == (1, 577, 768)


# --- what can be wrong -----------------------------------------------------------------------------------------------


D = "text_decoder."


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("ForConditionalGeneration", {"vision_model.post_layernorm.bias": None}, "lacks vision.encoder.norm.bias"),
        ("ForConditionalGeneration", {f"{D}bert.embeddings.word_embeddings.weight": None},
         "lacks lm_head.decoder.weight, text.decoder_embed.word.weight"),
        ("ForConditionalGeneration", {f"{D}cls.predictions.bias": None}, "lacks lm_head.decoder.bias"),
        ("ForConditionalGeneration", {f"{D}cls.predictions.decoder.bias": torch.ones(WORDS)},
         "lm_head.decoder.bias' twice"),
        ("ForConditionalGeneration", {f"{D}cls.predictions.decoder.weight": torch.zeros(WORDS, 32)},
         "two different word tables"),
        ("ForConditionalGeneration", {f"{D}bert.encoder.layer.1.crossattention.self.key.weight": torch.zeros(32, 9)},
         "parts of text.decoder.1.cross.attn.kv.weight"),
        ("ForConditionalGeneration", {f"{D}bert.encoder.layer.1.crossattention.output.dense.bias": None},
         "lacks text.decoder.1.cross.attn.proj.bias"),
        ("ForConditionalGeneration", {f"{D}bert.encoder.layer.3.output.dense.bias": torch.zeros(32)}, "no place for"),
        ("ForConditionalGeneration", {"vision_model.encoder.layers.1.self_attn.qkv.weight": torch.zeros(70, 24)},
         "lacks vision.encoder.blocks.1.attn.kv.weight"),
        ("ForConditionalGeneration", {"vision_model.encoder.layers.1.self_attn.qkv.weight": torch.zeros(69, 24)},
         "attn.q.weight has shape (23, 24)"),
        ("ForConditionalGeneration", {"vision_model.encoder.layers.1.self_attn.qkv.weight": torch.tensor(0.0)},
         "lacks vision.encoder.blocks.1.attn.kv.weight"),
        ("ForConditionalGeneration", {"vision_model.embeddings.patch_embedding.weight": torch.zeros(3)},
         "has shape (3,)"),
        ("ForImageTextRetrieval", {"itm_head.bias": None}, "lacks itm_head.bias"),
        ("ForImageTextRetrieval", {"text_proj.weight": torch.zeros(9, 32)}, "text_proj.weight has shape (9, 32)"),
        ("ForImageTextRetrieval", {"text_encoder.embeddings.LayerNorm.bias": None}, "lacks text.embed.norm.bias"),
        ("ForImageTextRetrieval", {"text_encoder.pooler.dense.weight": torch.zeros(32, 32)}, "no place for"),
        ("Model", {}, "neither BLIP's text encoder nor its decoder"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(kind, changes, words, tmp_path):
    if kind == "Model":
        config = transformers.BlipConfig(text_config=TEXT, vision_config=VISION)
        theirs = transformers.BlipModel(config)
    else:
        theirs = reference(kind)
    edit(theirs, tmp_path, changes)
    assert words in message(tmp_path)


@pytest.mark.parametrize(
    ("part", "config", "words"),
    [
        (["text_config"], {"hidden_act": "gelu_new"}, "'gelu_new'"),
        (["vision_config"], {"hidden_act": "quick_gelu"}, "'quick_gelu'"),
        (["text_config"], {"vocab_size": 51}, "has shape"),
        (["text_config"], {"vocab_size": "many"}, "whole number"),
        (["text_config"], {"bos_token_id": 49}, "not all among its 50 tokens"),  # no place left for [ENC]
        (["text_config"], {"sep_token_id": 102}, "not all among its 50 tokens"),
        (["text_config"], {"pad_token_id": None}, "whole number"),
        (["text_config"], {"max_position_embeddings": 40}, "text.decoder_embed.position.weight has shape"),
        (["text_config"], {"intermediate_size": 96}, "3 in its text tower and 4 in its image tower"),
        (["text_config"], {"intermediate_size": 33}, "no whole multiple"),
        (["text_config"], {"num_attention_heads": 5}, "impossible model"),
        (["text_config"], {"hidden_dropout_prob": 1.5}, "impossible model"),
        (["text_config"], {"layer_norm_eps": None}, "a number >= 0"),
        (["text_config"], {"num_hidden_layers": 4}, "lacks text.decoder.3."),
        (["vision_config"], {"image_size": 33}, "impossible model"),
        (["vision_config"], {"image_size": [32, 64]}, "only square"),
        (["vision_config"], {"num_attention_heads": 5}, "impossible model"),
        ([], {"text_config": [1]}, "text_config in config.json is no JSON object"),
    ],
)
def test_config_we_cannot_build(part, config, words, tmp_path):
    reference("ForConditionalGeneration").save_pretrained(tmp_path)
    edit_config(tmp_path, *part, **config)
    assert words in message(tmp_path)


def test_nobody_classifies(tmp_path):
    reference("ForConditionalGeneration").save_pretrained(tmp_path)
    assert "no classifier" in message(tmp_path, num_classes=5)


@torch.no_grad()
def test_a_file_of_both_kinds_leaves_nothing_but_the_temperature_fresh(tmp_path):
    """As one's own script might write it."""
    reader, captioner = two_halves(tied=False)
    captioner.save_pretrained(tmp_path)
    edit_file(tmp_path, {name: t.clone() for name, t in reader.state_dict().items() if "vision_model" not in name})
    ours = from_hf(tmp_path)
    assert ours.fresh == ("temp",)
    images, (ids, mask) = pictures(reader), texts()
    named, options = ours(images, ids, mask), dict(pixel_values=images, attention_mask=mask.long())
    assert_close(named["match"], reader(input_ids=led_by(ids, ENC), **options).itm_score)
    assert_close(named["next"][mask], captioner(input_ids=led_by(ids, DEC), **options).logits[mask])
    expected = F.normalize(reader.vision_proj(reader.vision_model(images).last_hidden_state[:, 0]), dim=-1)
    assert_close(named["image vector"], expected)


# --- pictures for official weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(500, 375), (64, 90), (384, 384), (31, 300)])
def test_preprocess_blip_equals_the_official_one(shape):
    processor = getattr(transformers, "BlipImageProcessorPil", None)
    if processor is None:
        pytest.skip("this transformers has no BlipImageProcessorPil")
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = processor()(images=image, return_tensors="pt").pixel_values[0]
    got = preprocess_blip(image)
    assert got.shape == (3, 384, 384) and preprocess_blip(image, size=64).shape == (3, 64, 64)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
