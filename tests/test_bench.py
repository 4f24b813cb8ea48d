"""The benchmark compares like with like: equal numbers, equal training, and a table that says so."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from minivlp import bench
from minivlp.losses import IGNORE, contrastive_loss
from minivlp.models.albef import ALBEFConfig, belong
from minivlp.models.blip import BLIPConfig
from minivlp.models.clip import CLIPConfig
from minivlp.models.flip import FLIPConfig
from minivlp.models.vilt import ViLTConfig
from minivlp.models.vit import ViTConfig
from minivlp.models.vlmo import VLMoConfig

pytest.importorskip("transformers")

torch.set_num_threads(1)

OPEN_CLIP = bench.open_clip_installed()
CONTENDERS = {"tiny-vit": 4, "tiny-vilt": 3, "tiny-clip": 3 + OPEN_CLIP, "tiny-flip-tower-0": 2 + OPEN_CLIP,
              "tiny-flip-tower-75": 4 + OPEN_CLIP, "tiny-flip-train-50": 4 + OPEN_CLIP, "tiny-albef": 3,
              "tiny-vlmo": 3, "tiny-blip": 3}  # fmt: skip


def tiny_vit() -> bench.Row:
    config = ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, num_classes=5)
    batch = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])
    return bench.Row(
        name="tiny-vit",
        title="a tiny ViT",
        contenders=lambda: bench.vit_contenders(config),
        batch=lambda: batch,
        loss=lambda logits, batch: torch.nn.functional.cross_entropy(logits, batch[1]),
    )


def tiny_vilt() -> bench.Row:
    config = ViLTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=2, vocab_size=30, max_text=12)
    return bench.Row(
        name="tiny-vilt",
        title="a tiny ViLT",
        contenders=lambda: bench.vilt_contenders(config),
        batch=lambda: bench.pair_batch(config, batch_size=6, longest=11),
        loss=bench.pair_loss,
    )


def tiny_clip() -> bench.Row:
    config = CLIPConfig(
        image_size=16, patch_size=8, image_width=16, image_depth=2, image_heads=2, vocab_size=30, max_text=11,
        text_width=24, text_depth=3, text_heads=3, embed_dim=20,
    )  # fmt: skip
    return bench.Row(
        name="tiny-clip",
        title="a tiny CLIP",
        contenders=lambda: bench.clip_contenders(config),
        batch=lambda: bench.caption_batch(config, batch_size=6, longest=11),
        loss=lambda outputs, batch: contrastive_loss(outputs[0]),
    )


def tiny_flip(ratio=0.5, *, whole=True) -> bench.Row:
    config = FLIPConfig(
        image_size=32, patch_size=8, image_width=16, image_depth=2, image_heads=2, vocab_size=30, max_text=11,
        text_width=24, text_depth=3, text_heads=3, embed_dim=20,
    )  # fmt: skip
    return bench.Row(
        name=f"tiny-flip-{'train' if whole else 'tower'}-{100 * ratio:.0f}",
        title="a tiny FLIP",
        contenders=lambda: bench.flip_contenders(config, ratio, whole=whole),
        batch=lambda: bench.flip_batch(config, batch_size=6, longest=11),
        loss=bench.flip_loss,
    )


def tiny_albef() -> bench.Row:
    config = ALBEFConfig(
        image_size=16, patch_size=8, image_width=16, image_depth=2, image_heads=2, vocab_size=30, max_text=12,
        text_width=16, text_depth=1, fusion_depth=2, text_heads=4, embed_dim=20,
    )  # fmt: skip
    return replace(
        bench.albef_row(),
        name="tiny-albef",
        title="a tiny ALBEF",
        contenders=lambda: bench.albef_contenders(config, queue=12),
        batch=lambda: bench.albef_batch(config, batch_size=6, longest=11),
    )


def tiny_vlmo() -> bench.Row:
    config = VLMoConfig(
        image_size=16, patch_size=8, vocab_size=30, max_text=12, width=16, depth=3, pair_depth=1, heads=2
    )
    return replace(
        bench.vlmo_row(),
        name="tiny-vlmo",
        title="a tiny VLMo",
        contenders=lambda: bench.vlmo_contenders(config),
        batch=lambda: bench.vlmo_batch(config, batch_size=6, longest=11),
    )


TINY_BLIP = BLIPConfig(
    image_size=16, patch_size=8, image_width=24, image_depth=2, image_heads=2, vocab_size=30, max_text=12,
    text_width=16, text_depth=2, text_heads=4, embed_dim=20,
)  # fmt: skip


def tiny_blip() -> bench.Row:
    return replace(
        bench.blip_row(),
        name="tiny-blip",
        title="a tiny BLIP",
        contenders=lambda: bench.blip_contenders(TINY_BLIP, queue=12),
        batch=lambda: bench.blip_batch(TINY_BLIP, batch_size=6, longest=11),
    )


def tiny_generate() -> bench.Row:
    return replace(
        bench.generate_row(6),
        name="tiny-generate",
        contenders=lambda: bench.generate_contenders(TINY_BLIP, length=8),
        batch=lambda: bench.blip_batch(TINY_BLIP, batch_size=6, longest=8)[:1],
        each=8,
    )


TINY = [tiny_vit, tiny_vilt, tiny_clip, partial(tiny_flip, 0.0, whole=False), partial(tiny_flip, 0.75, whole=False),
        tiny_flip, tiny_albef, tiny_vlmo, tiny_blip]  # fmt: skip


@pytest.fixture(params=TINY, ids=CONTENDERS)
def row(request, monkeypatch):
    torch.manual_seed(0)
    row = request.param()
    monkeypatch.setattr(bench, "ROWS", [row])
    return row


CLASS_TOKENS = ("cls_token", "class_embedding")  # what the contenders call it


def flat(contender: bench.Contender, batch: bench.Batch) -> torch.Tensor:
    """All outputs of a contender in one row of numbers."""
    outputs = contender.outputs(batch)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([output.detach().flatten() for output in outputs])


def test_contenders_take_the_same_training_step(row):
    batch, contenders = row.batch(), row.contenders()
    assert len({id(contender.model) for contender in contenders}) == len(contenders) == CONTENDERS[row.name]
    counts = {sum(p.numel() for p in contender.model.parameters() if p.requires_grad) for contender in contenders}
    assert len(counts) == 1
    before, *_ = [flat(contender, batch) for contender in contenders]  # all of them: asking moves ALBEF's queue on
    for _ in range(3):
        for contender in contenders:
            bench.stepper(row, contender, batch)()
    after = [flat(contender, batch) for contender in contenders]
    assert (after[0] - before).abs().max() > 1e-3  # it did train
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=0, atol=1e-4)


def test_bench_refuses_unequal_contenders(row):
    contenders = row.contenders()
    assert bench.check_equal(row, contenders, row.batch()) < 1e-5
    first = next(p for name, p in contenders[-1].model.named_parameters() if name.endswith(CLASS_TOKENS))
    with torch.no_grad():
        first.add_(torch.randn_like(first))
    with pytest.raises(RuntimeError, match=f"{row.name}: the contenders differ by"):
        bench.check_equal(row, contenders, row.batch())


def test_bench_checks_vectors_not_their_products_alone():
    """Turning pictures and texts alike leaves every logit and the loss as they are."""
    row = tiny_clip()
    contenders = row.contenders()
    model, batch = contenders[1].model, row.batch()
    logits, *vectors = contenders[1].outputs(batch)
    turn = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        for projection in (model.image_projection, model.text_projection):
            projection.weight.copy_(turn @ projection.weight)
    turned, *others = contenders[1].outputs(batch)
    torch.testing.assert_close(turned, logits, rtol=0, atol=1e-5)
    assert all((one - other).abs().max() > 0.1 for one, other in zip(vectors, others, strict=True))
    with pytest.raises(RuntimeError, match="the contenders differ by"):
        bench.check_equal(row, contenders, batch)


@pytest.mark.parametrize("which", [0, 1])
def test_bench_checks_every_output(which):
    """Words and pairs both: a change in either head alone is noticed."""
    row = tiny_vilt()
    contenders = row.contenders()
    head = (contenders[1].model.mlm_head.decoder, contenders[1].model.itm_head)[which]
    with torch.no_grad():
        head.bias.add_(1.0)  # of all scores alike, so that the loss stays the same
    with pytest.raises(RuntimeError, match=r"differ by 1\.0e"):
        bench.check_equal(row, contenders, row.batch())


def shift_bias(model: torch.nn.Module, part: str) -> None:
    """Of the second word or score alone: of all alike it would change no loss."""
    model.get_submodule(part).bias[1] += 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.student.temp.add_(0.01),  # ITC
        lambda model: shift_bias(model, "student.itm_head"),
        lambda model: shift_bias(model, "student.mlm_head.predictions.decoder"),
        lambda model: shift_bias(model, "teacher.mlm_head.predictions.decoder"),
        lambda model: model.queue.image.neg_(),
        lambda model: model.student.text.layers[1].crossattention.self.value.weight.neg_(),
        lambda model: model.teacher.text.bert.embeddings.position_embeddings.weight.neg_(),
    ],
)
@torch.no_grad()
def test_bench_checks_all_of_albefs_step(spoil):
    row = tiny_albef()
    contenders = row.contenders()
    spoil(contenders[-1].model)
    with pytest.raises(RuntimeError, match="the contenders differ by"):
        bench.check_equal(row, contenders, row.batch())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.logit_scale.add_(0.1),
        lambda model: model.logit_vl_scale.add_(0.1),
        lambda model: shift_bias(model, "itm_head"),
        lambda model: shift_bias(model, "mlm_head.predictions.decoder"),
        lambda model: model.blocks[1].layer.attention.v_proj.weight.neg_(),
        lambda model: model.blocks[1].layer.lambda_1.mul_(1.5),
        lambda model: model.blocks[1].layer.mlp.fc2.weight.neg_(),
        lambda model: model.blocks[1].others["text"][1].fc2.weight.neg_(),
        lambda model: model.blocks[2].others["pair"][1].fc2.weight.neg_(),
        lambda model: model.blocks[2].others["text"][0].weight.neg_(),  # the first ITC's last block
        lambda model: model.embed.image.position_embeddings.neg_(),
    ],
)
@torch.no_grad()
def test_bench_checks_all_of_vlmos_step(spoil):
    torch.manual_seed(0)
    row = tiny_vlmo()
    contenders = row.contenders()
    assert bench.check_equal(row, contenders, row.batch()) < 1e-5
    spoil(contenders[-1].model)
    with pytest.raises(RuntimeError, match="the contenders differ by"):
        bench.check_equal(row, contenders, row.batch())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: model.student.temp.add_(0.01),  # ITC
        lambda model: shift_bias(model, "student.itm_head"),
        lambda model: shift_bias(model, "student.lm_head.predictions.decoder"),
        lambda model: model.queue.image.neg_(),
        lambda model: model.student.vision.vit.embeddings.patch_embedding.weight.neg_(),
        lambda model: model.student.text.encoder.encoder.layer[1].crossattention.self.value.weight.neg_(),
        lambda model: model.student.text.encoder.encoder.layer[1].attention.self.value.weight.neg_(),
        lambda model: model.student.text.decoder.encoder.layer[1].attention.self.value.weight.neg_(),
        lambda model: model.teacher.text.encoder.embeddings.position_embeddings.weight.neg_(),
        lambda model: model.teacher.vision.vit.embeddings.patch_embedding.weight.neg_(),
    ],
)
@torch.no_grad()
def test_bench_checks_all_of_blips_step(spoil):
    torch.manual_seed(0)
    row = tiny_blip()
    contenders = row.contenders()
    assert bench.check_equal(row, contenders, row.batch()) < 1e-5
    spoil(contenders[-1].model)
    with pytest.raises(RuntimeError, match="the contenders differ by"):
        bench.check_equal(row, contenders, row.batch())


@torch.no_grad()
def test_pictures_matter_to_all_of_blips_step():
    """With transformers' own starting values they would not, and all pictures look the same."""
    for contender in tiny_blip().contenders():
        batch = bench.blip_batch(TINY_BLIP, batch_size=6, longest=11)
        for model in (contender.model.student, contender.model.teacher):
            assert model.look(batch[0]).std(dim=0).mean() > 0.1, contender.name
        start = {name: value.clone() for name, value in contender.model.state_dict().items()}
        before = contender.outputs(batch)
        contender.model.load_state_dict(start)
        after = contender.outputs((batch[0].roll(1, dims=0), *batch[1:]))
        assert all(abs(one - other) > 1e-4 for one, other in zip(after, before, strict=True)), contender.name


def test_transformers_blip_shares_what_blip_shares():
    reader, writer, ours = bench.transformers_blip(TINY_BLIP)
    encoder = dict(reader.text_encoder.named_parameters())
    own = {name.split(".", 3)[3] for name, p in writer.text_decoder.bert.named_parameters() if p is not encoder[name]}
    assert own and all(name.startswith("attention.") for name in own) and "attention.output.LayerNorm.bias" in own
    theirs = {id(p): p.numel() for p in [*reader.parameters(), *writer.parameters()]}
    assert sum(theirs.values()) + 1 == sum(p.numel() for p in ours.parameters())  # and the temperature


@torch.inference_mode()
def test_all_write_the_same_words():
    torch.manual_seed(0)
    row = tiny_generate()
    contenders, batch = row.contenders(), row.batch()
    texts = [contender.outputs(batch) for contender in contenders]
    assert len(texts) == 3 and all(text.shape == (6, 8) and torch.equal(text, texts[0]) for text in texts)
    assert len(set(map(tuple, texts[0].tolist()))) > 3 and texts[0].unique().numel() > 6
    assert not (texts[0] == TINY_BLIP.sep_id).any()  # none ends before its time
    assert bench.check_equal(row, contenders, batch) == 0
    rows, ours = [], contenders[0].model  # the second contender's as well
    ours.text.decoder[0].mlp.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    for contender in contenders[:2]:
        contender.outputs(batch)
    assert rows == [1] * 8 + [*range(1, 9)]


@pytest.mark.parametrize("part", ["vision_model.embeddings.patch_embedding.weight",
                                  "text_decoder.bert.encoder.layer.1.crossattention.self.value.weight",
                                  "text_decoder.bert.encoder.layer.1.attention.self.value.weight",
                                  "text_decoder.cls.predictions.transform.dense.weight"])  # fmt: skip
@torch.no_grad()
def test_bench_refuses_other_words(part):
    torch.manual_seed(0)
    row = tiny_generate()
    contenders = row.contenders()
    contenders[-1].model.get_parameter(part).neg_()
    with pytest.raises(RuntimeError, match="tiny-generate: the contenders differ by"):
        bench.check_equal(row, contenders, row.batch())


def test_tokens_are_counted(monkeypatch, capsys):
    row = tiny_generate()
    lines = bench.report(row, {"one": [0.5, 0.5], "other": [1.0, 1.0]}, 6).splitlines()
    assert lines[1].split() == ["ms", "tokens/s", "time", "/", "first"]
    assert lines[2].split() == ["one", "500.0", "96", "1.00"] and lines[3].split() == ["other", "1000.0", "48", "2.00"]
    assert "pictures/s" in bench.report(tiny_blip(), {"one": [0.5]}, 6)
    monkeypatch.setattr(bench, "ROWS", [row])
    bench.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert "tokens/s" in out and "BlipForConditionalGeneration" in out
    monkeypatch.setattr(bench, "transformers_installed", lambda: False)
    bench.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert "tokens/s" in out and "BlipForConditionalGeneration" not in out


def test_blip_batch():
    """What the row says of its batch: texts of 8 to 14 tokens, no two alike, and noise for both directions."""
    images, ids, mask, says, noise, alpha = bench.blip_batch(BLIPConfig(), batch_size=32, longest=14)
    assert images.shape == (32, 3, 64, 64) and ids.shape == mask.shape == (32, 14) and not ids[~mask].any()
    assert mask.sum(1).max() == 14 and mask.sum(1).min() == 8
    assert says.tolist() == [*range(32)] and noise.shape == (2, 32) and alpha.item() == pytest.approx(0.4)


def test_the_short_way_of_blip_computes_less():
    """Of a text's 11 words the last block updates one for ITC, of the teacher too, and in ITM's three pairs one each;
    for LM all."""
    row, seen = tiny_blip(), []
    for contender in row.contenders()[:2]:
        model = contender.model
        for last in (model.teacher.text.encoder[-1].mlp, model.student.text.encoder[-1].mlp):
            last.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[:2])))
        contender.outputs(row.batch())
    assert seen == [(6, 11), (6, 11), (18, 11), (6, 11), (6, 1), (6, 1), (18, 1), (6, 11)]


def test_vlmo_batch():
    """What the row says of its batch: lesson 05's pairs, each text with one picture, and noise for both directions."""
    images, ids, mask, hidden, labels, same, noise = bench.vlmo_batch(VLMoConfig(), batch_size=16, longest=14)
    assert images.shape == (16, 3, 64, 64) and ids.shape == mask.shape == (16, 14) and not ids[~mask].any()
    asked = labels != IGNORE
    assert torch.equal(labels[asked], ids[asked]) and (hidden[asked] == 4).all()
    assert torch.equal(hidden[~asked], ids[~asked])
    assert torch.equal(same, torch.eye(16, dtype=torch.bool)) and noise.shape == (2, 16)


def test_albef_batch():
    """What the row says of its batch: texts of 8 to 14 tokens, half of the words hidden, and no two alike."""
    images, ids, mask, hidden, labels, shows, says, noise, alpha = bench.albef_batch(
        ALBEFConfig(), batch_size=32, longest=14
    )
    assert images.shape == (32, 3, 64, 64) and ids.shape == (32, 14) and not ids[~mask].any()
    lengths = mask.sum(1)
    assert lengths.max() == 14 and lengths.min() == 8
    asked = labels != IGNORE
    assert 0.3 < asked[mask].float().mean() < 0.6 and not asked[:, 0].any()
    assert (hidden[asked] == 4).all() and torch.equal(labels[asked], ids[asked])
    assert torch.equal(hidden[~asked], ids[~asked])
    assert torch.equal(belong(shows, says), torch.eye(32, dtype=torch.bool)) and shows.unique().numel() == 64
    assert noise.shape == (2, 32) and alpha.item() == pytest.approx(0.4)


def test_pair_batch():
    """What the row says of its batch: padding, hidden words, and half of the pairs with another picture."""
    images, hidden_ids, labels, other_images, ids, mask, match = bench.pair_batch(
        ViLTConfig(), batch_size=64, longest=14
    )
    lengths = mask.sum(1)
    assert ids.shape == (64, 14) and lengths.max() == 14 and lengths.min() >= 8 and not ids[~mask].any()
    asked = labels != IGNORE
    assert 0.05 < asked[mask].float().mean() < 0.2 and not asked[:, 0].any()
    assert (hidden_ids[asked] == 4).all() and torch.equal(labels[asked], ids[asked])
    assert torch.equal(hidden_ids[~asked], ids[~asked])
    same = (images == other_images).flatten(1).all(1)
    assert torch.equal(same, match == 1) and match.sum() == 32


def test_caption_batch():
    """What the row says of its batch: each text ends once, after 8 to 14 tokens, and nothing but padding follows."""
    images, ids = bench.caption_batch(CLIPConfig(), batch_size=64, longest=14)
    assert images.shape == (64, 3, 64, 64) and ids.shape == (64, 14) and (ids == 3).sum(1).eq(1).all()
    lengths = (ids == 3).int().argmax(dim=1) + 1
    assert lengths[0] == lengths.max() == 14 and lengths.min() == 8
    assert torch.equal(ids != 0, torch.arange(14) < lengths[:, None])


def test_flip_batch():
    """What the row says of its batch: texts of 8 to 14 tokens, and noise that open_clip's PatchDropout draws itself."""
    images, ids, noise = bench.flip_batch(FLIPConfig(), batch_size=64, longest=14)
    assert images.shape == (64, 3, 64, 64) and ids.shape == (64, 14) and noise.shape == (64, 64)
    lengths = (ids != 0).sum(1)
    assert lengths.max() == 14 and lengths.min() == 8
    assert torch.equal(ids != 0, torch.arange(14) < lengths[:, None])
    torch.manual_seed(bench.NOISE_SEED)
    assert torch.equal(torch.randn(64, 64), -noise) and len(noise.argmin(dim=1).unique()) > 20


@pytest.mark.parametrize("whole", [False, True])
def test_bench_notices_another_choice_of_patches(whole):
    """All contenders look at the same patches: those with the most noise would give other numbers."""
    row = tiny_flip(0.5, whole=whole)
    images, ids, noise = row.batch()
    contenders = row.contenders()
    assert bench.check_equal(row, contenders, (images, ids, noise)) < 1e-5
    outputs = contenders[0].outputs
    spoilt = replace(contenders[0], outputs=lambda batch: outputs((*batch[:2], -batch[2])))
    with pytest.raises(RuntimeError, match="the contenders differ by"):
        bench.check_equal(row, [spoilt, *contenders[1:]], (images, ids, noise))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_only_a_mask_in_the_attention_computes_all_tokens(ratio):
    """Of 1 + 16 tokens the others compute 1 + 16 * (1 - ratio); two embed all patches nevertheless."""
    row, tokens, embedded = tiny_flip(ratio, whole=False), {}, {}
    for contender in row.contenders():
        sizes = tokens.setdefault(contender.name, [])
        for module in contender.model.modules():
            if isinstance(module, torch.nn.Linear) and module.out_features == 64:  # the wide layer of each MLP
                module.register_forward_hook(lambda module, inputs, output, sizes=sizes: sizes.append(output.shape[1]))
        if hasattr(contender.model, "patch_embed"):
            contender.model.patch_embed.proj.register_forward_hook(
                lambda module, inputs, output, name=contender.name: embedded.update({name: output.shape[1]})
            )
        contender.outputs(row.batch())
    K = round(16 * (1 - ratio))
    for name, sizes in tokens.items():
        assert sizes == 2 * [17 if "mask in the attention" in name else 1 + K], name
    assert list(embedded.values()) == ([K, 16, 16] if ratio else [16])


def test_a_row_can_leave_the_optimizer_out():
    row = replace(tiny_flip(0.5, whole=False), update=False)
    contender, batch = row.contenders()[0], row.batch()
    before = {name: p.detach().clone() for name, p in contender.model.named_parameters()}
    bench.stepper(row, contender, batch)()
    assert all(torch.equal(p, before[name]) for name, p in contender.model.named_parameters())
    assert all(p.grad.abs().max() > 0 for p in contender.model.parameters())
    bench.stepper(replace(row, update=True), contender, batch)()
    assert not any(torch.equal(p, before[name]) for name, p in contender.model.named_parameters())


def test_take_turns():
    """Each round has another order, each step fills its time, and a slow start does not count."""
    now, calls = 0.0, []

    def step(name: str, seconds: float) -> None:
        nonlocal now
        first = name not in calls
        calls.append(name)
        now += 100.0 if first else seconds

    costs = {"slow": 0.5, "fast": 0.125, "slower than a turn": 2.0}
    steps = {name: partial(step, name, seconds) for name, seconds in costs.items()}
    times = bench.take_turns(steps, rounds=4, seconds=1.0, clock=lambda: now)
    assert times == {name: [seconds] * 4 for name, seconds in costs.items()}
    slow, fast, slower = ["slow"] * 2, ["fast"] * 8, ["slower than a turn"]
    turns = [*slow, *fast, *slower, *fast, *slower, *slow, *slower, *slow, *fast, *slow, *fast, *slower]
    assert calls[-len(turns) :] == turns
    assert sorted(calls[: -len(turns)]) == sorted(4 * list(costs))  # warm-up


def test_the_short_way_of_albef_computes_less():
    """Of the words the last block updates one in ITM's three pairs each; for MLM, of teacher and student, all."""
    row, seen = tiny_albef(), []
    for contender in row.contenders()[:2]:
        model = contender.model
        for last in (model.teacher.text.fusion_blocks[-1].mlp, model.student.text.fusion_blocks[-1].mlp):
            last.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
        contender.outputs(row.batch())
    assert seen == [(6, 11), (18, 11), (6, 11), (6, 11), (18, 1), (6, 11)]


def test_the_short_way_of_vlmo_computes_less():
    """Of a picture's 5 tokens and a text's 11 the last block updates one each for both ITCs, and of ITM's three pairs
    one each; for MLM all words, and no patch."""
    row, seen = tiny_vlmo(), []
    for contender in row.contenders():
        last = contender.model.blocks[-1]
        wide = [m for m in last.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 64]
        assert len(wide) == 3
        for layer in wide:
            layer.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[:2])))
        contender.outputs(row.batch())
    everything = [(6, 5), (6, 5), (6, 11), (6, 11), (18, 16), (6, 16)]
    assert seen == [*everything, *[(6, 1)] * 4, (18, 1), (6, 11), *everything]


def test_the_short_way_of_clip_computes_less():
    """Of 1 + N tokens of a picture and L of a text the last blocks update one each."""
    row, seen = tiny_clip(), []
    for contender in row.contenders()[:2]:
        for tower in (contender.model.vision, contender.model.text):
            last = tower.encoder.blocks[-1].mlp
            last.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
        contender.outputs(row.batch())
    assert seen == [5, 11, 1, 1]


def test_the_short_way_computes_less():
    """`rows=` leaves tokens out of the last block: of L + 1 + N only L words for the MLM pass and one for matching."""
    row, seen = tiny_vilt(), {}
    for contender in row.contenders()[:2]:
        last = contender.model.encoder.blocks[-1].mlp
        sizes = seen.setdefault(contender.name, [])
        last.register_forward_hook(lambda module, inputs, output, sizes=sizes: sizes.append(output.shape[1]))
        contender.outputs(row.batch())
    assert list(seen.values()) == [[16, 16], [11, 1]]


def test_bench_prints_its_table(row, capsys):
    threads = torch.get_num_threads()
    try:
        bench.main(["--rounds", "1", "--rows", "tin", "--cpu-time"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert row.title in lines and len(lines) == 1 + 1 + 1 + 1 + CONTENDERS[row.name] + bool(row.note)
    assert not row.note or lines[-1] == f"  {row.note}"
    assert lines[4].split()[-1] == "1.00" and row.contenders()[0].name in lines[4]
    with pytest.raises(SystemExit):
        bench.main(["--rows", "nothing"])
    assert f"there are {row.name}" in capsys.readouterr().err


def test_bench_runs_without_transformers(row, monkeypatch, capsys):
    monkeypatch.setattr(bench, "transformers_installed", lambda: False)
    bench.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert "transformers is not installed" in out and out.count("transformers") == 2  # that sentence has it twice
    assert len(out.splitlines()) == 2 + 1 + 1 + 1 + CONTENDERS[row.name] - 1 + bool(row.note)


def test_the_rows():
    names = [row.name for row in bench.ROWS]
    trained = {f"{name}-train" for name in ("vit-p16", "vilt", "clip", "albef", "vlmo", "blip")}
    assert len(set(names)) == len(names) and trained | {"blip-generate-1", "blip-generate-32"} <= set(names)
    flips = {f"flip-{part}-{percent}": part == "train" for part in ("tower", "train") for percent in (0, 50, 75)}
    assert {row.name: row.update for row in bench.ROWS if "flip" in row.name} == flips
