"""The benchmark compares like with like: equal numbers, equal training, and a table that says so."""

from __future__ import annotations

import pytest
import torch

from minivlp import bench
from minivlp.losses import IGNORE, contrastive_loss
from minivlp.models.clip import CLIPConfig
from minivlp.models.vilt import ViLTConfig
from minivlp.models.vit import ViTConfig

pytest.importorskip("transformers")

torch.set_num_threads(1)

CONTENDERS = {"tiny-vit": 4, "tiny-vilt": 3, "tiny-clip": 3 + bench.open_clip_installed()}


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


@pytest.fixture(params=[tiny_vit, tiny_vilt, tiny_clip], ids=CONTENDERS)
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
    before = flat(contenders[0], batch)
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
    assert row.title in lines and len(lines) == 1 + 1 + 1 + 1 + CONTENDERS[row.name]
    assert lines[4].split()[-1] == "1.00" and "every token" in lines[4]
    with pytest.raises(SystemExit):
        bench.main(["--rows", "nothing"])
    assert f"there are {row.name}" in capsys.readouterr().err


def test_bench_runs_without_transformers(row, monkeypatch, capsys):
    monkeypatch.setattr(bench, "transformers_installed", lambda: False)
    bench.main(["--rounds", "1"])
    out = capsys.readouterr().out
    assert "transformers is not installed" in out and out.count("transformers") == 2  # that sentence has it twice
    assert len(out.splitlines()) == 2 + 1 + 1 + 1 + CONTENDERS[row.name] - 1


def test_the_rows():
    names = [row.name for row in bench.ROWS]
    assert len(set(names)) == len(names) and {"vit-p16-train", "vilt-train", "clip-train"} <= set(names)
