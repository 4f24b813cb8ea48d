"""Lesson 03's recipes: their batches and objectives, that every arm can be built, that a run measures what it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from lesson_helpers import few_pages

from minivlp.data.picturebook.claims import with_article
from minivlp.data.picturebook.world import KINDS
from minivlp.evaluate import recall_at
from minivlp.layers import count_parameters
from minivlp.lessons import clip as lesson
from minivlp.lessons import vit as lesson01
from minivlp.models.clip import CLIP, CLIPConfig

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = [pytest.param(recipe, id=f"{experiment}-{arm}")
        for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()]  # fmt: skip
TINY = CLIPConfig(image_width=32, image_depth=2, image_heads=2, text_width=32, text_depth=2, text_heads=2, embed_dim=16)
FEW = replace(lesson.MAIN, model=TINY, start="", train_size=400, steps=2, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_pages(tmp_path_factory, lesson):
        yield


@pytest.fixture
def model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(TINY).eval()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ARMS)
def test_every_arm_can_be_built_and_starts_from_a_kept_model(recipe):
    assert recipe.start in ("", *lesson01.CHECKPOINTS)
    model = lesson.begin(recipe)
    assert model.config == recipe.model
    assert recipe.batch_size <= recipe.train_size


def test_each_arm_changes_one_thing():
    allowed = {
        "contrastive": set(), "which words": {"objective"}, "word after word": {"objective"},
        "a tutorial's loss": {"objective"}, "exp(t) = 1, fixed": {"logit_scale", "learn_scale"},
        "1/0.07, fixed": {"learn_scale"}, "learned, not clamped": {"clamp"}, "with a hidden layer": {"projection"},
        "ViT, random start": {"start"}, "residual network, random start": {"start", "image_tower"},
        "shared targets": {"duplicates"}, "left out of a batch": {"duplicates"}, "B = 16": {"batch_size", "steps"},
        "B = 256": {"batch_size", "steps"}, "500 pairs": {"train_size"}, "2,000 pairs": {"train_size"},
    }  # fmt: skip

    def flat(recipe):
        own = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "model"}
        return own | {f.name: getattr(recipe.model, f.name) for f in fields(recipe.model)}

    arms = {arm: recipe for group in lesson.EXPERIMENTS.values() for arm, recipe in group.items()}
    del arms["CLIP"]
    base = arms["contrastive"]
    assert base == replace(lesson.MAIN, steps=base.steps)
    assert arms.keys() == allowed.keys()
    for arm, recipe in arms.items():
        assert {k for k, v in flat(recipe).items() if v != flat(base)[k]} == allowed[arm], arm
    for batch in lesson.EXPERIMENTS["batch"].values():
        assert abs(batch.steps * batch.batch_size / (base.steps * base.batch_size) - 1) < 0.05
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]


def test_a_start_from_lesson_01_takes_its_weights():
    ours, random = lesson.begin(lesson.MAIN), lesson.begin(replace(lesson.MAIN, start=""))
    experiment, arm = lesson01.CHECKPOINTS[lesson.MAIN.start]
    vit = lesson.trained(lesson.MAIN.start, lesson01.ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
    theirs = vit.encoder.blocks[0].attn.q.weight
    assert torch.equal(ours.vision.encoder.blocks[0].attn.q.weight, theirs)
    assert not torch.equal(random.vision.encoder.blocks[0].attn.q.weight, theirs)


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_depend_on_the_step_alone_and_change_with_it():
    data = lesson.pairs("train", 400)
    one, two = (lesson.CLIPBatches(data, FEW, seed=3) for _ in range(2))
    for step in (3, 0, 2):
        assert all(torch.equal(a, b) for a, b in zip(one(step), two(step), strict=True))
    assert not torch.equal(one(2)[0], one(3)[0])
    assert not torch.equal(one(2)[0], lesson.CLIPBatches(data, FEW, seed=4)(2)[0])


def test_captions_mean_the_same_whatever_their_words():
    data = lesson.pairs("train", 400)
    two = (scene for scene in data.scenes if len(scene.things) == 2)
    one = next(scene for scene in two if scene.things[0].kind != scene.things[1].kind)
    other = replace(one, things=one.things[::-1], place="sea" if one.place != "sea" else "city")
    assert lesson.meaning(one, 1) == lesson.meaning(other, 1) and lesson.meaning(one, 4) != lesson.meaning(other, 4)
    bigger = {"small": "big", "big": "small"}.get(one.things[0].size, "big")
    resized = replace(one, things=(replace(one.things[0], size=bigger), one.things[1]))
    assert [lesson.meaning(one, k) == lesson.meaning(resized, k) for k in (0, 1, 2)] == [True, True, False]
    colour = next(c for c in ("red", "blue") if c != one.things[0].colour)
    painted = replace(one, things=(replace(one.things[0], colour=colour), one.things[1]))
    assert [lesson.meaning(one, k) == lesson.meaning(painted, k) for k in (0, 1)] == [True, False]


def test_batches_without_duplicates_have_none_and_keep_pictures_with_their_captions():
    data = lesson.pairs("train", 400)
    recipe = replace(FEW, batch_size=32, levels=(0,))
    plain, unique = (lesson.CLIPBatches(data, replace(recipe, duplicates=d), seed=0) for d in ("wrong", "unique"))
    assert all(lesson.same(plain(step)[3]).sum() > 32 for step in range(3))
    own = {int(image.long().sum()): captions[0] for image, captions in zip(data.images, data.captions, strict=True)}
    for step in range(3):
        images, ids, mask, meanings = unique(step)
        assert 8 < len(images) == len(ids) <= 32
        assert torch.equal(lesson.same(meanings), torch.eye(len(ids), dtype=torch.bool))
        for image, row, kept in zip(images, ids, mask, strict=True):
            assert lesson.words().encode(own[int(image.long().sum())]) == row[kept].tolist()


# --- objectives ------------------------------------------------------------------------------------------------------


def test_shared_targets_matter_for_other_words_of_the_same_meaning_alone(model):
    """Word for word equal texts have one vector, so that the plain loss has the same gradient as shared targets."""
    images = lesson.pairs("train", 400).images[:3]
    meanings = torch.tensor([0, 1, 0])
    for texts, differ in ((["a red cat", "a dog", "a red kitten"], True), (["a red cat", "a dog", "a red cat"], False)):
        ids, mask = lesson.words().encode_batch(texts)
        losses = [lesson.clip_loss(model, images, ids, mask, meanings, shared=s)["contrastive"] for s in (True, False)]
        for weight in (model.text_projection.weight, model.image_projection.weight):
            shared, plain = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses)
            assert torch.allclose(shared, plain, atol=1e-6) != differ


def test_the_tutorials_loss_depends_on_lengths_and_teaches_its_own_targets(model, monkeypatch):
    images = lesson.pairs("train", 400).images[:4]
    ids, mask = lesson.words().encode_batch(["a red cat", "a dog", "two boats", "a house"])
    batch = images, ids, mask, torch.arange(4)

    def slope():
        return torch.autograd.grad(lesson.tutorial_loss(model, *batch)["contrastive"], model.text_projection.weight)[0]

    before = [loss(model, *batch)["contrastive"].item() for loss in (lesson.clip_loss, lesson.tutorial_loss)]
    through = slope()
    real = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: real(self, dim).detach())
    held = slope()
    monkeypatch.undo()
    assert not torch.allclose(through, held, atol=1e-3)
    with torch.no_grad():
        model.image_projection.weight.mul_(3)
    after = [loss(model, *batch)["contrastive"].item() for loss in (lesson.clip_loss, lesson.tutorial_loss)]
    assert after[0] == pytest.approx(before[0], abs=1e-5) and abs(after[1] - before[1]) > 0.01


def test_the_bag_of_words_counts_each_word_of_the_caption_once_and_no_special_token():
    torch.manual_seed(0)
    model = lesson.WordPredictor(TINY)
    ids, mask = lesson.words().encode_batch(["a cat and a dog"])
    image = lesson.pairs("train", 400).images[:1]
    log = model(image).log_softmax(-1)[0]
    own = set(lesson.words().encode("a cat and a dog")[1:-1])
    expected = -sum(log[i] for i in own) / len(own)
    assert lesson.words_loss(model, image, ids, mask)["words"].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_captioner_sees_the_picture_and_earlier_words_alone():
    torch.manual_seed(0)
    model = lesson.Captioner(TINY).eval()
    images = lesson.pairs("train", 400).images[:2]
    ids, mask = lesson.words().encode_batch(["a red cat on the beach", "a dog"])
    states = model(images, ids)
    other = ids.clone()
    other[:, 3] = 50
    moved = (model(images, other) - states).abs().amax(-1)
    assert moved[:, :3].max() < 1e-5 < moved[:, 3:].max()
    assert (model(255 - images, ids) - states).abs().amax(-1).min() > 1e-5
    loss = lesson.caption_loss(model, images, ids, mask)["caption"]
    log = model.head(states).log_softmax(-1)
    by_hand = [-log[b, i, ids[b, i + 1]] for b in range(2) for i in range(int(mask[b].sum()) - 1)]
    assert loss.item() == pytest.approx((sum(by_hand) / len(by_hand)).item(), abs=1e-5)


# --- measuring -------------------------------------------------------------------------------------------------------


def test_vectors_do_not_depend_on_the_batch(model):
    data = lesson.pairs("test", 40)
    texts = [captions[4] for captions in data.captions]
    for vectors, items in ((lesson.text_vectors, texts), (lesson.image_vectors, data.images)):
        assert torch.allclose(vectors(model, items), vectors(model, items, batch_size=3), atol=1e-5)


def test_the_ensemble_is_one_of_vectors_not_of_probabilities(model):
    templates, names = ("{}", "a picture of {}"), ("a cat", "two dogs")
    found = lesson.class_vectors(model, names, templates)
    each = torch.stack([lesson.text_vectors(model, [t.format(name) for t in templates]) for name in names])
    assert torch.allclose(found, F.normalize(each.mean(1), dim=-1), atol=1e-6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(2), atol=1e-6)
    assert not torch.allclose(each.mean(1).norm(dim=-1), torch.ones(2), atol=1e-3)  # the second length matters


def test_names_are_scored_by_every_kind_of_model(model):
    torch.manual_seed(0)
    images = lesson.single_things("test").images[:3]
    assert torch.allclose(lesson.named_by(model, images), lesson.image_vectors(model, images)
                          @ lesson.class_vectors(model, [with_article(kind) for kind in KINDS]).T)  # fmt: skip
    words = lesson.WordPredictor(TINY).eval()
    cottage = [lesson.words().encode(kind)[1:-1] for kind in KINDS]
    with torch.no_grad():
        log = words(images).log_softmax(-1)
    assert torch.allclose(lesson.named_by(words, images)[:, 2], log[:, cottage[2]].mean(1), atol=1e-6)
    captioner = lesson.Captioner(TINY).eval()
    scores = lesson.named_by(captioner, images)
    ids, mask = lesson.words().encode_batch([f"a picture of {with_article(KINDS[5])}"])
    with torch.no_grad():
        loss = lesson.caption_loss(captioner, images[1:2], ids, mask)["caption"]
    assert scores[1, 5].item() == pytest.approx(-loss.item() * (ids.shape[1] - 1), abs=1e-4)


def test_retrieval_looks_both_ways(model, monkeypatch):
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.95, 0.5, 0.2], [0.1, 0.6, 0.3]])
    monkeypatch.setattr(lesson, "image_vectors", lambda *_: scores)
    monkeypatch.setattr(lesson, "text_vectors", lambda *_: torch.eye(3))
    found, own = lesson.retrieval(model, n=3), torch.arange(3)
    assert found["R@1 image to text"] == recall_at(scores, own, 1) == pytest.approx(1 / 3)
    assert found["R@1 text to image"] == recall_at(scores.T, own, 1) == pytest.approx(1 / 3)
    assert found["R@5 text to image"] == 1.0


def test_a_run_reports_every_number_of_the_scoreboard(monkeypatch):
    probes = lesson.probe_accuracy
    monkeypatch.setattr(lesson, "probe_accuracy", lambda model, kind: probes(model, kind, n=4))
    search = lesson.retrieval
    monkeypatch.setattr(lesson, "retrieval", lambda model, split="test", **o: search(model, split, **o | {"n": 40}))
    run = lesson.run(FEW, seed=0, device=CPU)
    wanted = (*lesson.SCOREBOARD.values(), *lesson.BOARD.values(), *lesson.HEADLINE[1:])
    sources = [source for source in wanted if isinstance(source, tuple)]
    assert {metric for _, _, metric in sources} <= run.metrics.keys()
    assert all(0 <= value <= 1 for name, value in run.metrics.items() if name != "exp(t)")
    assert len(run.history.losses["contrastive"]) == 2
    for objective in ("words", "caption"):
        run = lesson.run(replace(FEW, objective=objective), seed=0, device=CPU)
        assert run.metrics.keys() == {"zero-shot kind"}


def test_the_model_has_the_size_that_the_lesson_prints():
    with torch.device("meta"):
        assert count_parameters(CLIP(lesson.MAIN.model)) == 1_772_033
