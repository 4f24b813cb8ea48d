"""BLIP: what encoder and decoder share, who sees whom in the three modes, and writing token by token."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tower_helpers
from torch import Tensor, nn
from tower_helpers import B, L, apart, close, differs, pictures, spoken, texts, touched

from minivlp.data.text import DEFAULT_VOCAB_SIZE, SPECIAL_TOKENS
from minivlp.layers import MLP, Block, count_parameters
from minivlp.models.albef import FusionBlock, MomentumALBEF, follow, start_from_vit
from minivlp.models.blip import (
    BLIP,
    MED_PARTS,
    NOTHING_SHARED,
    BLIPConfig,
    MEDBlock,
    led_by,
    paper_config,
    teacher_of,
    untied,
)
from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import CheckpointError, load_weights, save_weights

torch.set_num_threads(1)

# No two sizes alike, so that none can stand in for another.
SMALL = BLIPConfig(
    image_size=16, patch_size=4, image_width=24, image_depth=2, image_heads=2, vocab_size=30, max_text=9,
    text_width=16, text_depth=3, text_heads=4, mlp_ratio=3, embed_dim=20,
)  # fmt: skip
S, D, DEPTH, HEADS = 17, SMALL.text_width, SMALL.text_depth, SMALL.text_heads  # a class token and 16 patches
CLS, ENC, DEC = 2, SMALL.enc_id, SMALL.dec_id

# What belongs to what in a block, and in the embeddings: written down once more by hand.
ATTENTION = ("q.weight", "q.bias", "kv.weight", "kv.bias", "proj.weight", "proj.bias")
NORM = ("weight", "bias")
OWN = {
    "self-attention": {f"attn.{name}" for name in ATTENTION} | {f"norm1.{name}" for name in NORM},
    "cross-attention": {f"cross.attn.{name}" for name in ATTENTION} | {f"cross.norm.{name}" for name in NORM},
    "feed-forward": {f"mlp.{fc}.{name}" for fc in ("fc1", "fc2") for name in NORM} | {f"norm2.{n}" for n in NORM},
}
TABLES = {"word.weight", "position.weight", "norm.weight", "norm.bias"}
ALL_SETS = [own for count in range(5) for own in combinations(NOTHING_SHARED, count)]
CHOICES = [(), ("self-attention",), ("cross-attention",), NOTHING_SHARED]  # the paper's Table 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def shake(module: nn.Module, std: float = 0.2) -> nn.Module:
    return tower_helpers.shake(module, std, but="temp")  # which must stay positive


def shaken(config: BLIPConfig = SMALL, **options: object) -> BLIP:
    return shake(BLIP(replace(config, **options)))


def read() -> tuple[Tensor, Tensor]:
    """Ids and mask of three texts, two of them padded."""
    ids = texts()
    return ids, ids != 0


def other_word(ids: Tensor, place: int) -> Tensor:
    """The texts with another word at one place."""
    changed = ids.clone()
    changed[:, place] = torch.where(ids[:, place] == 9, 10, 9)
    return changed


def states(count: int = B, length: int = S) -> Tensor:
    """What a picture may say, (B, S, D')."""
    return torch.randn(count, length, SMALL.image_width)


def modes(model: BLIP) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """The three uses of the one text transformer: (ids, mask, a picture's states) -> states (B, 1 or L, D)."""
    return {
        "encode": lambda ids, mask, image: model.text.encode(ids, mask),
        "ground": lambda ids, mask, image: model.text.ground(model.read(ids), mask, image)[0],
        "write": lambda ids, mask, image: model.write(ids, image),
    }


# --- sizes and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "parameters", "published"),
    [((), 224.1, 224), (("self-attention",), 252.4, 252), (("cross-attention",), 252.4, 252),
     (NOTHING_SHARED, 361.3, 361)],
)  # fmt: skip
def test_published_sizes(own, parameters, published):
    """Millions of parameters, as in the paper's Table 3: what is shared counts once."""
    with torch.device("meta"):
        model = BLIP(replace(paper_config(), decoder_own=own))
    assert round(count_parameters(model) / 1e6, 1) == parameters
    assert int(parameters) == published
    attention = 4 * (768 * 768 + 768) + 2 * 768  # with output projection and LayerNorm
    feed_forward = 2 * 4 * 768 * 768 + 5 * 768 + 2 * 768
    embeddings = (30_524 + 512 + 2) * 768
    parts = {"self-attention": 12 * attention, "cross-attention": 12 * attention, "feed-forward": 12 * feed_forward,
             "embeddings": embeddings}  # fmt: skip
    assert count_parameters(model.text) == sum(parts.values()) + sum(parts[part] for part in own)
    assert count_parameters(model.vision) == 85_798_656  # ViT-B/16
    assert model.lm_head.decoder.weight is model.text.decoder_embed.word.weight


def test_the_default_is_the_papers_and_fits_the_courses_vocabulary():
    c, special = BLIPConfig(), dict(zip(SPECIAL_TOKENS, range(7), strict=True))
    assert c.vocab_size == DEFAULT_VOCAB_SIZE and c.decoder_own == ("self-attention",)
    assert (c.pad_id, c.sep_id, c.enc_id, c.dec_id) == tuple(special[t] for t in ("[PAD]", "[SEP]", "[ENC]", "[DEC]"))
    assert c.image_config() == ViTConfig()  # so that lesson 01's ViT can be taken over
    paper = paper_config()
    assert (paper.vocab_size, paper.pad_id, paper.sep_id, paper.dec_id, paper.enc_id) == (
        30_524,
        0,
        102,
        30_522,
        30_523,
    )
    assert (paper.image_size, paper.patch_size, paper.image_width, paper.image_depth) == (224, 16, 768, 12)
    assert (paper.text_width, paper.text_depth, paper.text_heads, paper.image_heads) == (768, 12, 12, 12)
    assert (paper.embed_dim, paper.temperature, paper.decoder_own) == (256, 0.07, ("self-attention",))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(image_size=18), "image_size 18 is not a multiple of patch_size 4"),
        (dict(image_heads=5), "image_width 24 is not a multiple of image_heads 5"),
        (dict(text_heads=3), "text_width 16 is not a multiple of text_heads 3"),
        (dict(temperature=0.0), "temperature=0.0: choose a positive one, similarities are divided by it"),
        (dict(temperature=float("nan")), "temperature=nan: choose a positive one, similarities are divided by it"),
        (dict(decoder_own=("attention",)),
         "decoder_own has 'attention': choose among self-attention, cross-attention, feed-forward, embeddings"),
        (dict(decoder_own=("self-attention", "heads")),
         "decoder_own has 'heads': choose among self-attention, cross-attention, feed-forward, embeddings"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(option, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SMALL, **option)


def test_options_arrive_everywhere():
    options = dict(mlp_ratio=5, dropout=0.3, image_eps=0.5, text_eps=0.25, temperature=0.2)
    model = BLIP(replace(SMALL, decoder_own=NOTHING_SHARED, **options))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    eps = {part: {m.eps for m in module.modules() if isinstance(m, nn.LayerNorm)}
           for part, module in model.named_children()}  # fmt: skip
    assert eps["vision"] == {0.5} and eps["text"] == eps["lm_head"] == {0.25}
    assert {m.fc1.out_features / m.fc1.in_features for m in model.modules() if isinstance(m, MLP)} == {5}
    assert [m.heads for m in model.vision.modules() if hasattr(m, "heads")] == [2] * 2
    assert [m.heads for m in model.text.modules() if hasattr(m, "heads")] == [4] * 2 * 2 * DEPTH
    assert model.temp.item() == pytest.approx(0.2) and model.vision_proj.weight.shape == (20, 24)
    assert not dict(model.named_buffers())  # which no teacher would follow


def test_texts_and_pictures_that_do_not_fit():
    model = BLIP(SMALL)
    for run in (model.encode_text, lambda ids: model.write(ids, states())):
        with pytest.raises(ValueError, match="a text of 10 tokens does not fit 9 positions"):
            run(torch.ones(B, 10, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected pictures \(B, 3, 16, 16\), got \(3, 3, 20, 20\)"):
        model.look(pictures(size=20))


@torch.no_grad()
def test_dropout_is_at_work_in_training_alone():
    model, images, (ids, mask) = shaken(dropout=0.3), pictures(), read()
    one, two = model(images, ids, mask), model(images, ids, mask)
    assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = model.train()(images, ids, mask), model(images, ids, mask)
    assert all(apart(one[name], two[name]) for name in one)


# --- what is shared --------------------------------------------------------------------------------------------------


def shared_names(model: BLIP) -> tuple[set[str], set[str]]:
    """Of the decoder's blocks and embeddings: the names that are the encoder's own parameter, and the others. A name
    without a number is shared in all blocks, or in none."""
    shared, own = set(), set()
    for ours, theirs in zip(model.text.decoder, model.text.encoder, strict=True):
        parameters = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            same = parameter is parameters[name]
            assert same == (parameter.data_ptr() == parameters[name].data_ptr()), name
            (shared if same else own).add(name)
    tables = dict(model.text.embed.named_parameters())
    for name, parameter in model.text.decoder_embed.named_parameters():
        (shared if parameter is tables[name] else own).add(name)
    return shared, own


@pytest.mark.parametrize("decoder_own", ALL_SETS, ids=" ".join)
def test_exactly_what_is_asked_for_is_not_shared(decoder_own):
    model = BLIP(replace(SMALL, decoder_own=decoder_own))
    parts = OWN | {"embeddings": TABLES}
    shared, own = shared_names(model)
    assert own == set().union(*(parts[part] for part in decoder_own))
    assert shared == set().union(*parts.values()) - own
    # Blocks share with the one of their own place alone, and no further parts are one by mistake.
    blocks = DEPTH * sum(count_parameters(model.text.encoder[0].get_submodule(name)) for part in decoder_own
                         for name in MED_PARTS.get(part, ()))  # fmt: skip
    tables = count_parameters(model.text.embed) * ("embeddings" in decoder_own)
    alone = count_parameters(nn.ModuleList([model.text.embed, model.text.encoder]))
    assert count_parameters(model.text) == alone + blocks + tables
    assert alone == DEPTH * count_parameters(MEDBlock(D, HEADS, context_width=24, mlp_ratio=3)) + sum(
        p.numel() for p in model.text.embed.parameters()
    )
    # Reading and writing have one table, and the output a bias of its own.
    assert model.lm_head.decoder.weight is model.text.decoder_embed.word.weight
    assert model.lm_head.decoder.bias.shape == (SMALL.vocab_size,)


def test_by_default_the_whole_self_attention_is_the_decoders_own():
    """With its output projection and its LayerNorm, which an unsharing of q, k and v alone would leave shared."""
    _, own = shared_names(BLIP(SMALL))
    assert own == {"attn.q.weight", "attn.q.bias", "attn.kv.weight", "attn.kv.bias", "attn.proj.weight",
                   "attn.proj.bias", "norm1.weight", "norm1.bias"}  # fmt: skip
    assert set(MED_PARTS) == set(OWN) and set(NOTHING_SHARED) == {*OWN, "embeddings"}


@pytest.mark.parametrize("decoder_own", CHOICES, ids=" ".join)
@torch.no_grad()
def test_another_part_changes_who_uses_it(decoder_own):
    """Each part of the encoder's blocks, changed: does the decoder write other things? And the other way round."""
    ids, mask = read()
    image = states()
    for i in range(DEPTH):
        for part, names in MED_PARTS.items():
            for side in ("encoder", "decoder"):
                model = shaken(decoder_own=decoder_own)
                runs = modes(model)
                before = {name: run(ids, mask, image) for name, run in runs.items()}
                for name in names:
                    shake(getattr(getattr(model.text, side)[i], name))
                changed = {name: apart(run(ids, mask, image), before[name]) for name, run in runs.items()}
                encoder = side == "encoder" or part not in decoder_own
                decoder = side == "decoder" or part not in decoder_own
                assert changed == {"encode": encoder and part != "cross-attention", "ground": encoder,
                                   "write": decoder}, (i, part, side)  # fmt: skip
    for side, reads, writes in (("embed", True, False), ("decoder_embed", False, True)):
        model = shaken(decoder_own=decoder_own)
        runs = modes(model)
        before = {name: run(ids, mask, image) for name, run in runs.items()}
        shake(getattr(model.text, side))
        changed = [apart(run(ids, mask, image), before[name]) for name, run in runs.items()]
        shared = "embeddings" not in decoder_own
        assert changed == [reads or shared, reads or shared, writes or shared], side


@torch.no_grad()
def test_a_shared_decoder_is_the_encoder_with_a_mask():
    """A mask has no weights. With everything shared, writing is grounded reading in which nobody sees what follows."""
    model, (ids, mask), image = shaken(decoder_own=()), read(), states()
    ids = led_by(ids, DEC)
    written = model.text.decode(ids, image)[0]
    for t in range(1, L + 1):
        x = model.text.embed(ids[:, :t])
        for block in model.text.encoder[:-1]:
            whole = [block(x[:, : s + 1], image)[0][:, s] for s in range(t)]  # each token with those before it
            x = torch.stack(whole, dim=1)
        close(model.text.encoder[-1](x, image)[0][:, -1], written[:, t - 1])
    assert apart(model.text.ground(model.text.embed(ids), torch.ones_like(mask), image)[0], written)


@torch.no_grad()
def test_weights_travel_and_what_was_shared_still_is(tmp_path: Path):
    for decoder_own in CHOICES:
        model, other = shaken(decoder_own=decoder_own), BLIP(replace(SMALL, decoder_own=decoder_own)).eval()
        before = {id(p) for p in other.parameters()}
        save_weights(model, tmp_path / "blip.safetensors")
        load_weights(other, tmp_path / "blip.safetensors")
        assert {id(p) for p in other.parameters()} == before and shared_names(other) == shared_names(model)
        assert other.lm_head.decoder.weight is other.text.decoder_embed.word.weight
        images, (ids, mask) = pictures(), read()
        named, expected = other(images, ids, mask), model(images, ids, mask)
        assert all(torch.equal(named[name], expected[name]) for name in expected)
    with pytest.raises(CheckpointError, match="decoder_own="):  # nothing shared into everything shared
        load_weights(BLIP(replace(SMALL, decoder_own=())), tmp_path / "blip.safetensors")


def test_training_moves_what_is_shared_once_for_both():
    model, (ids, _), image = shaken(), read(), states()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = deepcopy(dict(model.named_parameters()))
    (model.write(ids, image) * torch.randn(B, L, D)).sum().backward()
    optimizer.step()
    assert shared_names(model) == shared_names(BLIP(SMALL))
    encoder = model.text.encoder[0]
    for name, moved in (("attn.q.weight", False), ("norm1.weight", False), ("mlp.fc1.weight", True),
                        ("cross.attn.q.weight", True), ("norm2.bias", True)):  # fmt: skip
        assert torch.equal(encoder.get_parameter(name), kept[f"text.encoder.0.{name}"]) != moved, name


@torch.no_grad()
def test_untied_writes_the_same_and_shares_nothing():
    for decoder_own in CHOICES:
        model, images, (ids, mask) = shaken(decoder_own=decoder_own), pictures(), read()
        kept = deepcopy(model.state_dict())
        apart_ = untied(model).eval()
        assert apart_.config == replace(model.config, decoder_own=NOTHING_SHARED) and not shared_names(apart_)[0]
        assert not {p.data_ptr() for p in apart_.parameters()} & {p.data_ptr() for p in model.parameters()}
        expected, named = model(images, ids, mask), apart_(images, ids, mask)
        assert all(torch.equal(named[name], expected[name]) for name in expected)
        # What happens to its decoder from now on is no matter of its encoder, nor of the model it came from.
        shake(apart_.text.decoder)
        shake(apart_.text.decoder_embed)
        after = apart_(images, ids, mask)
        same = [name for name in expected if torch.equal(after[name], expected[name])]
        assert same == ["image", "image vector", "text vector", "match"] and apart(after["next"], expected["next"])
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        assert all(p.requires_grad for p in apart_.parameters())


# --- one block -------------------------------------------------------------------------------------------------------


def a_block() -> tuple[MEDBlock, Tensor, Tensor]:
    return shake(MEDBlock(D, HEADS, context_width=24)), torch.randn(B, L, D), states()


@pytest.mark.parametrize("rows", [None, 1, 3])
@torch.no_grad()
def test_a_block_is_berts_and_with_a_picture_albefs(rows):
    block, x, image = a_block()
    keys = (texts() != 0)[:, None, None, :]
    bert, albef = Block(D, HEADS, eps=1e-12, norm="post"), FusionBlock(D, HEADS, context_width=24)
    albef.load_state_dict(block.state_dict())
    bert.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("cross.")})
    alone, kept, nothing = block(x, mask=keys, rows=rows)
    close(alone, bert(x, mask=keys, rows=rows)[0])
    assert nothing is None and [tuple(t.shape) for t in kept] == [(B, HEADS, L, D // HEADS)] * 2
    together, kept, weights = block(x, image, mask=keys, rows=rows, need_weights=True)
    expected, expected_weights = albef(x, image, mask=keys, rows=rows, need_weights=True)
    close(together, expected)
    close(weights, expected_weights)
    assert apart(together, alone) and kept[0].shape[2] == L  # of all tokens, whatever `rows` says
    for kept_part, theirs in zip(kept, block.attn.keys_values(x), strict=True):
        close(kept_part, theirs, 0)


@torch.no_grad()
def test_a_block_goes_on_where_it_stopped():
    block, x, image = a_block()
    causal = torch.ones(L, L, dtype=torch.bool).tril()
    whole, (keys, values), _ = block(x, image, mask=causal)
    for cut in (1, 3, L - 1):
        first, past, _ = block(x[:, :cut], image, mask=causal[:cut, :cut])
        rest, (k, v), _ = block(x[:, cut:], block.cross.attn.keys_values(image), mask=causal[cut:], past=past)
        close(torch.cat([first, rest], dim=1), whole)
        close(k, keys)
        close(v, values)
        forgotten = block(x[:, cut:], image, mask=causal[cut:, cut:])[0]
        assert apart(forgotten, whole[:, cut:])


# --- the three modes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_whole_pass_is_its_parts():
    model, images, (ids, mask) = shaken(), pictures(), read()
    named = model(images, ids, mask)
    shapes = {"image": (B, S, 24), "image vector": (B, 20), "text vector": (B, 20), "match": (B, 2), "next": (B, L, 30)}
    assert {name: tuple(t.shape) for name, t in named.items()} == shapes
    image = model.look(images)
    close(named["image"], image, 0)
    close(named["image vector"], F.normalize(model.vision_proj(image[:, 0]), dim=-1))
    close(named["image vector"], model.encode_image(images))
    first = model.text.encode(ids, mask)[:, 0]
    close(named["text vector"], F.normalize(model.text_proj(first), dim=-1))
    enc, dec = ids.clone(), ids.clone()
    enc[:, 0], dec[:, 0] = ENC, DEC
    close(named["match"], model.itm_head(model.text.ground(model.text.embed(enc), mask, image)[0][:, 0]))
    close(named["next"], model.lm_head(model.text.decode(dec, image)[0]))
    # Whose picture and whose words: one of each exchanged in the batch.
    other = images.clone()
    other[1] = images[0]
    after = model(other, ids, mask)
    assert all(differs(after[name], named[name]) == [False, name != "text vector", False] for name in named)
    after = model(images, torch.where(torch.arange(B)[:, None] == 2, other_word(ids, 1), ids), mask)
    assert all(differs(after[name], named[name]) == [False, False, "image" not in name] for name in named)


def test_led_by():
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    kept = ids.clone()
    assert led_by(ids, 5).tolist() == [[5, 7, 8, 3], [5, 9, 3, 0]]
    assert torch.equal(ids, kept)


@torch.no_grad()
def test_enc_and_dec_take_the_first_place_and_nothing_gets_longer():
    model, (ids, mask), image = shaken(), read(), states()
    seen = []
    for table in (model.text.embed, model.text.decoder_embed):
        assert table is model.text.embed
    model.text.embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    for run in modes(model).values():
        run(ids, mask, image)
    assert [s[:, 0].tolist() for s in seen] == [[token] * B for token in (CLS, ENC, DEC)]
    assert all(torch.equal(s[:, 1:], ids[:, 1:]) for s in seen) and [s.shape[1] for s in seen] == [L] * 3
    for first in (CLS, 9):  # whatever stood there before
        close(model.match(model.read(led_by(ids, first)), mask, image), model.match(model.read(ids), mask, image), 0)
        close(model.write(led_by(ids, first), image), model.write(ids, image), 0)
    # Which one it is matters.
    match = model.match(model.read(ids), mask, image)
    assert apart(model.match(model.text.embed(ids), mask, image), match)  # [CLS], a common mistake
    longer = F.pad(ids, (1, 0), value=ENC), F.pad(mask, (1, 0), value=True)  # put before instead
    assert apart(model.match(model.text.embed(longer[0]), longer[1], image), match)
    assert apart(model.text.decode(ids, image)[0], model.write(ids, image))


def test_no_picture_reaches_the_text_encoder():
    model, images, (ids, _) = shaken(), pictures().requires_grad_(), read()
    image = model.look(images)
    vector = model.encode_text(ids)
    assert torch.autograd.grad(vector.sum(), images, allow_unused=True) == (None,)
    # ITC: both vectors, and nothing that looks at a picture while reading or writes learns from it.
    (model.image_vector(image) @ vector.T / model.temp * torch.randn(B, B)).sum().backward()
    names = touched(model)
    for part in ("cross", "decoder", "itm_head", "lm_head"):
        assert all(p.grad is None for name, p in model.named_parameters() if part in name.split(".")), part
    assert names == {name for name, p in model.named_parameters() if p.grad is not None}
    assert {"temp", "vision_proj.weight", "text_proj.weight", "text.embed.word.weight"} <= names
    assert {f"text.encoder.{i}.{name}" for i in range(DEPTH) for name in OWN["self-attention"] | OWN["feed-forward"]
            } <= names  # fmt: skip


def test_what_matching_and_writing_teach():
    model, images, (ids, mask) = shaken(), pictures(), read()
    image = model.look(images)
    scores = model.match(model.read(ids), mask, image)
    (scores * torch.randn_like(scores)).sum().backward(retain_graph=True)
    match = touched(model)
    model.zero_grad(set_to_none=True)
    scores = model.lm_head(model.write(ids, image))
    (scores * torch.randn_like(scores)).sum().backward()
    write = touched(model)
    vision = {name for name, _ in model.named_parameters() if name.startswith("vision.")}
    tables = {f"text.embed.{name}" for name in TABLES}
    both = vision | tables | {f"text.encoder.{i}.{name}" for i in range(DEPTH)
                              for name in OWN["cross-attention"] | OWN["feed-forward"]}  # fmt: skip
    reads = {f"text.encoder.{i}.{name}" for i in range(DEPTH) for name in OWN["self-attention"]}
    heads = {name for name, _ in model.named_parameters() if name.startswith("lm_head.")}
    assert match == both | reads | {"itm_head.weight", "itm_head.bias"}
    assert write == both | heads | {name.replace("encoder", "decoder") for name in reads}
    assert match | write | {"temp", *(f"{side}_proj.{n}" for side in ("text", "vision") for n in NORM)} == {
        name for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("decoder_own", CHOICES, ids=" ".join)
@torch.no_grad()
def test_the_decoder_sees_no_word_that_follows_and_the_encoder_all(decoder_own):
    model, image = shaken(decoder_own=decoder_own), states()
    ids, mask = torch.randint(7, 30, (B, L)), torch.ones(B, L, dtype=torch.bool)
    written, grounded = model.write(ids, image), model.text.ground(model.read(ids), mask, image)[0]
    for t in range(1, L):
        changed = other_word(ids, t)
        changed[:, t] = (ids[:, t] - 6) % 20 + 7
        after = model.write(changed, image)
        close(after[:, :t], written[:, :t], 1e-6)
        assert all(apart(after[:, s], written[:, s], 1e-3) for s in range(t, L)), t
        after = model.text.ground(model.read(changed), mask, image)[0]
        assert all(apart(after[:, s], grounded[:, s], 1e-3) for s in range(L)), t
        assert apart(model.encode_text(changed), model.encode_text(ids), 1e-3), t


@torch.no_grad()
def test_every_mode_but_the_first_reads_all_of_its_own_picture():
    model, (ids, mask), image = shaken(), read(), states()
    runs = modes(model)
    before = {name: run(ids, mask, image) for name, run in runs.items()}
    for place in range(S):
        changed = image.clone()
        changed[1, place] += torch.randn(24)
        for name, run in runs.items():
            expected = [False, name != "encode", False]
            assert differs(run(ids, mask, changed), before[name]) == expected, (name, place)
    # In every block.
    for blocks, name in ((model.text.encoder, "ground"), (model.text.decoder, "write")):
        for block in blocks:
            hook = block.cross.register_forward_pre_hook(lambda _, inputs: (inputs[0], 0 * image))
            assert apart(runs[name](ids, mask, image), before[name])
            hook.remove()


@torch.no_grad()
def test_padding_changes_nothing():
    model, (ids, mask), image = shaken(), read(), states()
    filled = torch.where(mask, ids, 11)
    for name, run in modes(model).items():
        before = run(ids, mask, image)
        real = mask[:, : before.shape[1]]
        assert torch.equal(run(filled, mask, image)[real], before[real]), name
        longer = run(F.pad(ids, (0, 2), value=11), F.pad(mask, (0, 2)), image)[:, : real.shape[1]]
        close(longer[real], before[real])
        for b, length in enumerate(mask.sum(1)):  # nor does the company
            alone = run(ids[b : b + 1, :length], mask[b : b + 1, :length], image[b : b + 1])
            close(alone[0], before[b, :length])
        seen = run(filled, torch.ones_like(mask), image)  # words at those places would count, but to a writer
        assert differs(seen[:, :1], before[:, :1]) == [False, name != "write", name != "write"], name
    assert differs(model.encode_text(filled), model.encode_text(ids)) == [False, True, True]  # it looks for pad_id


def test_padding_may_have_another_id():
    model, (ids, _) = shaken(pad_id=29), read()
    ids = ids.clamp(max=28)
    with torch.no_grad():
        close(model.encode_text(ids.masked_fill(ids == 0, 29))[2], model.encode_text(ids[2:, :3])[0])


@torch.no_grad()
def test_rows_and_everything_give_the_same_numbers():
    model, (ids, mask), image = shaken(), read(), states()
    x, entered = model.read(ids), []
    for block in model.text.encoder:
        block.mlp.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].shape[1]))
    everyone, nothing = model.text.ground(x, mask, image)
    assert everyone.shape == (B, L, D) and nothing == {}
    for rows in (1, 3):
        entered.clear()
        some = model.text.ground(x, mask, image, rows=rows)[0]
        close(some, everyone[:, :rows])
        assert entered == [L, L, rows]  # less work in the last block alone
    entered.clear()
    close(model.match(x, mask, image), model.itm_head(everyone[:, 0]))
    first = model.text.encode(ids, mask)
    assert first.shape == (B, 1, D) and entered == 2 * [L, L, 1]
    y = model.text.embed(ids)
    for block in model.text.encoder:
        y = block(y, mask=mask[:, None, None, :])[0]
    close(first, y[:, :1])
    states_, named = model.text.ground(x, mask, image, everything=True)
    close(states_, everyone)
    assert {name: tuple(w.shape) for name, w in named.items()} == {f"cross_{i}": (B, HEADS, L, S) for i in range(DEPTH)}
    y = x
    for i, block in enumerate(model.text.encoder):
        y, _, weights = block(y, image, mask=mask[:, None, None, :], need_weights=True)
        close(named[f"cross_{i}"], weights)
        close(weights.sum(-1), torch.ones(B, HEADS, L))


# --- writing token by token ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_decoding_goes_on_where_it_stopped():
    model, (ids, _), image = shaken(), read(), states()
    whole = model.write(ids, image)
    ids = led_by(ids, DEC)
    asked = [block.cross.attn.keys_values(image) for block in model.text.decoder]
    close(model.text.decode(ids, asked)[0], whole)
    for cuts in ([1] * L, [3, 1, 2, 1], [2, 5]):
        past, got = None, []
        for part in ids.split(cuts, dim=1):
            now, past = model.text.decode(part, asked, past=past)
            got.append(now)
        close(torch.cat(got, dim=1), whole)
        assert len(past) == DEPTH and all(k.shape == v.shape == (B, HEADS, L, D // HEADS) for k, v in past)
    _, past = model.text.decode(ids[:, :3], image)
    assert apart(model.text.decode(ids[:, 3:], image)[0], whole[:, 3:])  # without what came before
    assert not torch.equal(model.text.decode(ids[:, 3:4], image, past=past)[0], whole[:, :1])
    with pytest.raises(ValueError, match="a text of 10 tokens does not fit 9 positions"):
        model.text.decode(ids, image, past=past)


@torch.no_grad()
def test_a_padded_context_is_not_read():
    """A question's states are padded, as a picture's never are."""
    model, (ids, mask), context = shaken(), read(), states(length=L)
    before = model.write(ids, context, context_mask=mask)
    changed = torch.where(mask[..., None], context, 9.0)
    assert torch.equal(model.write(ids, changed, context_mask=mask), before)
    assert differs(model.write(ids, changed), before) == [False, True, True]
    for b, length in enumerate(mask.sum(1)):
        close(model.write(ids[b : b + 1], context[b : b + 1, :length])[0], before[b])


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_a_speaker_says_what_the_decoder_says(cache):
    model, (ids, mask), context = shaken(), read(), states(length=L)
    ids = led_by(ids, DEC)
    close(spoken(model.speaker(context, cache=cache), ids), model.lm_head(model.write(ids, context)))
    expected = model.lm_head(model.write(ids, context, context_mask=mask))
    close(spoken(model.speaker(context, context_mask=mask, cache=cache), ids), expected)
    assert apart(expected[1:], model.lm_head(model.write(ids, context))[1:])


@torch.no_grad()
def test_a_speaker_with_a_cache_computes_one_row_a_token():
    model, (ids, _), image = shaken(), read(), states()
    for cache, expected in ((True, [1, 1, 1]), (False, [1, 2, 3])):
        rows, asked = [], []
        hooks = [
            model.text.decoder[0].mlp.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0].shape[1])),
            model.text.decoder[0].cross.attn.kv.register_forward_pre_hook(lambda _, x, asked=asked: asked.append(1)),
        ]
        spoken(model.speaker(image, cache=cache), ids[:, :3])
        for hook in hooks:
            hook.remove()
        assert rows == expected and len(asked) == 1  # the picture is turned into keys and values once


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_a_speaker_writes_several_texts_about_each_picture(cache):
    model, image = shaken(), states(2, L)
    mask = torch.arange(L) < torch.tensor([L, 3])[:, None]
    ids = torch.randint(7, 30, (6, 4))
    ids[:, 0] = DEC
    got = spoken(model.speaker(image, context_mask=mask, copies=3, cache=cache), ids)
    picture = torch.tensor([0, 0, 0, 1, 1, 1])  # those of one next to each other
    expected = model.lm_head(model.write(ids, image[picture], context_mask=mask[picture]))
    close(got, expected)
    turns = picture[[0, 3, 1, 4, 2, 5]]  # one text about each picture, then again
    wrong = model.lm_head(model.write(ids, image[turns], context_mask=mask[turns]))
    assert differs(wrong, expected) == [False, True, False, False, True, False]


@pytest.mark.parametrize("cache", [True, False])
@torch.no_grad()
def test_a_speaker_can_go_on_with_other_texts(cache):
    model, image = shaken(), states(2)
    ids, more = torch.randint(7, 30, (6, 3)), torch.randint(7, 30, (6, 2))
    speaker = model.speaker(image, copies=3, cache=cache)
    spoken(speaker, ids)
    rows = torch.tensor([2, 0, 0, 4, 4, 3])
    speaker.reorder(rows)
    whole = torch.cat([ids[rows], more], dim=1)
    picture = image.repeat_interleave(3, dim=0)
    expected = model.lm_head(model.text.decode(whole, picture)[0])[:, 3:]
    close(spoken(speaker, more), expected)
    wrong = model.lm_head(model.text.decode(torch.cat([ids, more], dim=1), picture)[0])[:, 3:]
    assert differs(wrong, expected) == [True, True, True, True, False, True]


# --- the teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder_own", CHOICES, ids=" ".join)
def test_the_teacher_is_what_itc_asks(decoder_own):
    student, images, (ids, _) = shaken(decoder_own=decoder_own), pictures(), read()
    student.encode_text(ids).sum().backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    teacher = teacher_of(student)
    own, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    lacks = ("cross", "decoder", "decoder_embed", "itm_head", "lm_head")
    assert theirs.keys() == {name for name in own if not set(name.split(".")) & set(lacks)}
    assert {name.split(".")[0] for name in theirs} == {"vision", "text", "vision_proj", "text_proj", "temp"}
    for name, weight in theirs.items():
        assert torch.equal(weight, own[name]) and not weight.requires_grad and weight.grad is None, name
        assert weight.data_ptr() != own[name].data_ptr(), name
    with torch.no_grad():
        close(teacher.image_vector(teacher.look(images)), student.encode_image(images), 1e-6)
        close(teacher.encode_text(ids), student.encode_text(ids), 1e-6)
    # And the student is as it was.
    assert all(p.requires_grad and p.grad is gradients[name] for name, p in student.named_parameters())
    assert shared_names(student) == shared_names(BLIP(student.config))
    assert student(images, ids, ids != 0)["next"].shape == (B, L, 30)


@pytest.mark.parametrize("decoder_own", CHOICES, ids=" ".join)
def test_the_teacher_follows_by_the_formula(decoder_own):
    student = shaken(decoder_own=decoder_own)
    teacher = shake(teacher_of(student), 1.0)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    own = {name: p.detach().clone() for name, p in student.named_parameters()}
    follow(teacher, student, 0.3)
    for name, weight in teacher.named_parameters():
        close(weight, 0.3 * before[name] + 0.7 * own[name], 1e-6)
        assert not weight.requires_grad and ((weight - own[name]).abs().max() > 0.01) == (name != "temp"), name
    assert all(torch.equal(p, own[name]) for name, p in student.named_parameters())  # never the other way round


def test_albefs_frame_holds_student_and_teacher():
    student = shaken()
    teacher = teacher_of(student)
    model = MomentumALBEF(student, queue_size=12, momentum=0.9, captions=2, teacher=teacher)
    assert model.student is student and model.teacher is teacher and model.queue.image.shape == (12, 20)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in student.parameters()}
    assert not {name for name in model.teacher.state_dict() if "decoder" in name or "cross" in name}


# --- starting values -------------------------------------------------------------------------------------------------


def test_initial_values():
    model = BLIP(BLIPConfig(decoder_own=NOTHING_SHARED))
    table = model.text.decoder_embed.word.weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            wide = isinstance(module, nn.Linear) and module.weight is not table
            std = 0.02 * (6**0.5 if wide else 1)  # 768 / 128 = 6
            assert module.weight.std().item() == pytest.approx(std, rel=4.5 / (2 * module.weight.numel()) ** 0.5), name
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    for parameter in (model.vision.embed.cls_token, model.vision.embed.pos_embed):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.temp.item() == pytest.approx(0.07)


def test_same_seed_same_model():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(BLIP(SMALL).state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name
        constant = name == "temp" or name.endswith("bias") or "norm" in name
        assert torch.equal(value, models[2][name]) == constant, name


def trained_vit(**options: object) -> ViT:
    return shake(ViT(replace(SMALL.image_config(), num_classes=5, **options)))


@torch.no_grad()
def test_start_from_vit():
    model, vit, images = shaken(), trained_vit(), pictures()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start_from_vit(model, vit)
    close(model.look(images), vit.encoder(vit.embed(images))[0], 0)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) != name.startswith("vision.") for name in after)
    kept = {name: value.clone() for name, value in after.items()}
    shake(vit)  # by value
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(width=48), "width=48 where this BLIP needs 24"),
        (dict(depth=3), "depth=3 where this BLIP needs 2"),
        (dict(heads=4), "heads=4 where this BLIP needs 2"),
        (dict(patch_size=8), "patch_size=8 where this BLIP needs 4"),
        (dict(pool="mean"), "pool='mean' where this BLIP needs 'cls'"),
    ],
)
def test_start_from_vit_refuses_what_does_not_fit(option, message):
    model = BLIP(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^the ViT has {message}: build both alike$"):
        start_from_vit(model, trained_vit(**option))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # none taken


@torch.no_grad()
def test_bfloat16_autocast_is_finite_and_close():
    model, images, (ids, mask) = shaken(), pictures(), read()
    expected = model(images, ids, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        named = model(images, ids, mask)
    for name in expected:
        assert named[name].isfinite().all() and (named[name] - expected[name]).abs().mean() < 0.1, name
    assert named["image vector"].dtype == named["text vector"].dtype == torch.float32
