"""Lesson 04's recipes: what is left out, the protocols, that a run measures what it says, what a step costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from lesson_helpers import few_pages

from minivlp.layers import count_parameters, patchify, to_float_pixels
from minivlp.lessons import clip as lesson03
from minivlp.lessons import flip as lesson
from minivlp.losses import contrastive_loss
from minivlp.models.flip import FLIP, FLIPConfig, paper_config, random_masking

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = [pytest.param(recipe, id=f"{experiment}-{arm}")
        for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()]  # fmt: skip
TINY = FLIPConfig(image_width=32, image_depth=2, image_heads=2, text_width=32, embed_dim=16)
FEW = replace(lesson.MAIN, model=TINY, train_size=400, steps=2, tune=2, batch_size=8)


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_pages(tmp_path_factory, lesson, lesson03):
        yield


@pytest.fixture
def model() -> FLIP:
    torch.manual_seed(0)
    return FLIP(TINY).eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    return lesson.FLIPBatches(lesson.pairs("train", 400), FEW, seed=0)(0)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ARMS)
def test_every_arm_can_be_built_and_starts_at_random(recipe):
    torch.manual_seed(0)
    model = lesson.begin(recipe)
    torch.manual_seed(1)
    other = lesson.begin(recipe)
    assert model.config == recipe.model and recipe.batch_size <= recipe.train_size
    for name, weight in model.vision.named_parameters():
        if weight.ndim == 2 and "norm" not in name:
            assert not torch.equal(weight, dict(other.vision.named_parameters())[name]), name  # nothing was loaded


def test_each_arm_changes_what_its_name_says():
    more = {"steps"}
    larger = {"batch_size", "lr", "steps", "tune"}  # as many samples in both parts of the run
    allowed = {
        ("equal steps", "0 %"): {"mask"}, ("equal steps", "50 %"): set(), ("equal steps", "75 %"): {"mask"},
        ("equal samples, larger batch", "50 %"): larger, ("equal samples, larger batch", "75 %"): larger | {"mask"},
        ("equal seconds", "50 %"): more, ("equal seconds", "75 %"): more | {"mask"},
        ("equal seconds, larger batch", "50 %"): larger, ("equal seconds, larger batch", "75 %"): larger | {"mask"},
        ("changes", "with reconstruction"): {"reconstruct"}, ("changes", "one choice for a batch"): {"sampling"},
        ("changes", "class token read"): {"pool"}, ("changes", "learned positions"): {"position"},
        ("changes", "half the text, prioritised"): {"text_mask"},
        ("changes", "half the text, random"): {"text_mask", "text_rule"},
    }  # fmt: skip

    def flat(recipe):
        own = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "model"}
        return own | {f.name: getattr(recipe.model, f.name) for f in fields(recipe.model)}

    arms = {(e, arm): recipe for e, group in lesson.EXPERIMENTS.items() for arm, recipe in group.items()}
    main = arms.pop(("main", "FLIP"))
    base = arms["equal steps", "50 %"]
    assert base == replace(main, steps=base.steps, tune=base.tune, probes=False)
    assert arms.keys() == allowed.keys()
    for arm, recipe in arms.items():
        assert {k for k, v in flat(recipe).items() if v != flat(base)[k]} == allowed[arm], arm
        assert arm[1] not in ("0 %", "50 %", "75 %") or f"{recipe.mask * 100:.0f} %" == arm[1]


def test_the_protocols_hold_equal_what_they_say():
    arms = lesson.EXPERIMENTS
    samples = lesson.WHOLE.steps * lesson.WHOLE.batch_size
    for group in ("equal steps", "equal samples, larger batch"):
        assert {r.steps * r.batch_size for r in arms[group].values()} == {samples}
    for group in ("equal seconds", "equal seconds, larger batch"):
        for r in arms[group].values():
            assert r.steps * r.batch_size / lesson.SAVED[r.mask] == pytest.approx(samples, rel=0.01)
    for r in (r for group in arms for r in arms[group].values() if group.startswith("equal")):
        assert r.lr / r.batch_size == lesson.WHOLE.lr / 64  # the paper's linear rule
        assert r.tune * r.batch_size == lesson.WHOLE.tune * 64
    assert arms["equal samples, larger batch"]["50 %"].batch_size == 128
    assert arms["equal samples, larger batch"]["75 %"].batch_size == 256


# --- batches and objectives ------------------------------------------------------------------------------------------


def test_batches_depend_on_the_step_alone_and_every_picture_has_its_own_noise():
    data = lesson.pairs("train", 400)
    one, two = (lesson.FLIPBatches(data, FEW, seed=3) for _ in range(2))
    for step in (3, 0, 2):
        assert all(torch.equal(a, b) for a, b in zip(one(step), two(step), strict=True))
    images, ids, noise, text_noise = one(2)
    assert noise.shape == (8, 64) and text_noise.shape == ids.shape
    assert len({tuple(row.tolist()) for row in noise}) == 8
    assert not torch.equal(noise, one(3)[2]) and not torch.equal(noise, lesson.FLIPBatches(data, FEW, seed=4)(2)[2])
    assert torch.equal(images, lesson03.CLIPBatches(data, FEW, seed=3)(2)[0])  # lesson 03's pairs, in its order


def test_the_loss_is_clips_on_what_is_left(model, batch):
    images, ids, noise, _ = batch
    keep = random_masking(noise, 0.5)[0]
    expected = contrastive_loss(model.compare(model.encode_image(images, keep), model.encode_text(ids)))
    found = lesson.flip_loss(model, *batch, mask=0.5)["contrastive"]
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    whole = lesson.flip_loss(model, *batch)["contrastive"]
    assert whole.item() == pytest.approx(contrastive_loss(model(images, ids)[0]).item(), abs=1e-6)
    losses = {whole.item(), found.item()}
    losses |= {lesson.flip_loss(model, *batch, **o)["contrastive"].item() for o in
               ({"mask": 0.75}, {"mask": 0.5, "shared": True}, {"mask": 0.5, "text_mask": 0.5},
                {"mask": 0.5, "text_mask": 0.5, "prioritised": False})}  # fmt: skip
    assert len(losses) == 6  # every option changes what is seen


def test_a_shared_choice_removes_the_same_patches_of_all(model, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(model, "encode_image", lambda images, keep: seen.append(keep) or torch.zeros(len(images), 16))
    lesson.flip_loss(model, *batch, mask=0.5, shared=True)
    lesson.flip_loss(model, *batch, mask=0.5)
    shared, each = (keep.sort(dim=1).values for keep in seen)
    assert (shared == shared[0]).all() and not (each == each[0]).all()


def test_reconstruction_is_counted_at_the_removed_patches_alone(batch):
    images, _, noise, _ = batch
    _, removed, _ = random_masking(noise, 0.75)
    target = patchify(to_float_pixels(images), 8)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    assert lesson.reconstruction_loss(target, images, removed, 8).item() == pytest.approx(0, abs=1e-6)
    spoilt = torch.where(removed[..., None], target, 100.0)  # wrong where the picture was seen
    assert lesson.reconstruction_loss(spoilt, images, removed, 8).item() == pytest.approx(0, abs=1e-6)
    wrong = torch.where(removed[..., None], target + 2, target)
    assert lesson.reconstruction_loss(wrong, images, removed, 8).item() == pytest.approx(4, abs=1e-4)


def test_the_decoder_puts_tokens_back_in_their_places(model, batch):
    torch.manual_seed(0)
    noise = batch[2]
    decoder = lesson.MAEDecoder(TINY).eval()
    _, removed, restore = random_masking(noise, 0.5)
    tokens = torch.randn(8, 33, 32)
    pixels = decoder(tokens, restore)
    assert pixels.shape == (8, 64, 192)
    # The same kept tokens listed in another order, with the order that restores it: the same painting.
    order = torch.randperm(32)
    shuffle = noise.argsort(1)
    other = torch.cat([shuffle[:, :32][:, order], shuffle[:, 32:]], dim=1).argsort(1)
    again = decoder(torch.cat([tokens[:, :1], tokens[:, 1:][:, order]], dim=1), other)
    assert torch.allclose(pixels, again, atol=1e-5)
    assert not torch.allclose(pixels, decoder(tokens, other), atol=1e-2)
    with torch.no_grad():
        decoder.mask_token.add_(torch.randn(64))
    moved = (decoder(tokens, restore) - pixels).abs().amax(-1)
    assert moved[removed].min() > moved[~removed].median()


def test_painting_encodes_each_picture_once_and_teaches_the_tower(monkeypatch):
    torch.manual_seed(0)
    recipe = replace(FEW, reconstruct=0.1)
    model = lesson.begin(recipe)
    passes = []
    real = type(model.vision).forward
    monkeypatch.setattr(type(model.vision), "forward", lambda self, *a, **k: passes.append(1) or real(self, *a, **k))
    batch = lesson.FLIPBatches(lesson.pairs("train", 400), recipe, seed=0)(0)
    losses = lesson.loss_of(recipe)(model, *batch)
    assert len(passes) == 1 and losses.keys() == {"contrastive", "pixels"}
    plain = lesson.flip_loss(model, *batch, mask=0.5)["contrastive"]
    assert losses["contrastive"].item() == pytest.approx(plain.item(), abs=1e-6)
    slope = torch.autograd.grad(losses["pixels"], model.vision.patch_embed.proj.weight)[0]
    assert slope.abs().max() > 0
    ten = lesson.loss_of(replace(recipe, reconstruct=1.0))(model, *batch)["pixels"]
    assert ten.item() == pytest.approx(10 * losses["pixels"].item(), rel=1e-5)


def test_tuning_goes_on_with_new_pairs_and_whole_pictures(model, monkeypatch):
    asked, losses = [], []
    real = lesson.fit

    def fit(model, batches, loss_fn, **options):
        losses.append((loss_fn, options["lr"], options["steps"]))
        return real(model, lambda step: asked.append(step) or batches(step), loss_fn, **options)

    batches = lesson.FLIPBatches
    seen = []

    class Batches(batches):
        def __call__(self, step):
            seen.append(step)
            return super().__call__(step)

    monkeypatch.setattr(lesson, "FLIPBatches", Batches)
    monkeypatch.setattr(lesson, "fit", fit)
    lesson.tune(model, FEW, seed=0, progress=None)
    assert asked == [0, 1] and seen == [FEW.steps, FEW.steps + 1]
    assert losses == [(lesson.flip_loss, FEW.tune_lr, FEW.tune)]  # whose default leaves nothing out


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 4])
def test_views_share_no_patch_and_show_all(parts):
    views = lesson.views(5, 64, parts)
    assert [view.shape for view in views] == [(5, 64 // parts)] * parts
    together = torch.cat(views, dim=1)
    assert torch.equal(together.sort(dim=1).values, torch.arange(64).expand(5, 64))
    assert not torch.equal(together[0], together[1])


def test_a_view_of_everything_is_the_whole_picture(model):
    images = lesson.pairs("test", 1000).images[:6]
    everything = torch.stack([torch.randperm(64) for _ in images])
    whole = lesson.image_vectors(model, images)
    assert torch.allclose(lesson.view_vectors(model, images, everything, batch_size=4), whole, atol=1e-5)
    assert not torch.allclose(lesson.view_vectors(model, images, everything[:, :16]), whole, atol=1e-3)


def test_both_ways_is_the_mean_of_both_searches():
    image = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.5], [1.0, 0.9]]), dim=-1)
    # Each picture finds its text; both texts lie nearer to picture 0.
    assert lesson.both_ways(image, text) == pytest.approx((1.0 + 0.5) / 2)


def test_a_run_reports_every_number_of_the_scoreboard(monkeypatch):
    probes, search = lesson03.probe_accuracy, lesson03.retrieval
    monkeypatch.setattr(lesson03, "probe_accuracy", lambda model, kind: probes(model, kind, n=4))

    def few(model, split="test", **o):
        return search(model, split, **o | {"n": 40})

    for module in (lesson, lesson03):
        monkeypatch.setattr(module, "retrieval", few)
    parts = lesson.seen_in_parts
    monkeypatch.setattr(lesson, "seen_in_parts", lambda model, mask: parts(model, mask, n=40))
    run = lesson.run(FEW, seed=0, device=CPU)
    wanted = (*lesson.SCOREBOARD.values(), *lesson.BOARD.values(), *lesson.HEADLINE[1:])
    assert {source[2] for source in wanted if isinstance(source, tuple)} <= run.metrics.keys()
    assert all(0 <= value <= 1 for name, value in run.metrics.items() if name != "exp(t)")
    assert len(run.history.losses["contrastive"]) == 2
    short = lesson.run(replace(FEW, mask=0.0, probes=False), seed=0, device=CPU).metrics.keys()
    assert "R@1" in short and "R@1, masked, not tuned" not in short and "attribute_swap" not in short


# --- costs -----------------------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_matrices():
    def matrices(tokens, width):  # q, k, v, output; scores and their use; MLP
        return 4 * tokens * width * width + 2 * tokens * tokens * width + 2 * 4 * tokens * width * width

    assert lesson.multiply_adds(65, 128, 4) == 4 * matrices(65, 128)
    image, text = lesson.pair_cost(FLIPConfig(), 0.5)
    assert image == 4 * matrices(33, 128) + 32 * 192 * 128
    assert text == 2 * matrices(32, 64)


def test_the_reckoning_gives_the_papers_table_1a():
    image, text = lesson.pair_cost(paper_config("L/16"))
    assert text / image == pytest.approx(0.044, abs=1e-3)
    assert [round(lesson.reckoned_time(r, text / image), 2) for r in (0.0, 0.5, 0.75)] == [1.0, 0.52, 0.28]
    exact = [(lesson.pair_cost(paper_config("L/16"), r)[0] + text) / (image + text) for r in (0.5, 0.75)]
    assert [round(share, 2) for share in exact] == [0.52, 0.28]


def test_a_clock_counts_both_parts_of_the_main_run(monkeypatch):
    asked = []

    def turns(steps, **_):
        asked.append(list(steps))
        return {name: [2.0 * (i + 1)] * 3 for i, name in enumerate(steps)}

    for name in ("timed_steps", "timed_tower"):
        monkeypatch.setattr(lesson, name, lambda *_, **__: None)
    monkeypatch.setattr(lesson, "take_turns", turns)
    monkeypatch.setattr(lesson, "retrieval", lambda *_: None)
    found = lesson.clock(CPU)
    names = asked[0]
    seconds = {name: 2.0 * (i + 1) for i, name in enumerate(names)}
    a_step = {name: s if name.startswith("tower") else s / 3 for name, s in seconds.items()}
    assert found["training seconds"] == pytest.approx(
        lesson.MAIN.steps * a_step["step, 50%"] + lesson.MAIN.tune * a_step["step, 0%"]
    )
    assert found["ms, tower, 75%"] == pytest.approx(1000 * a_step["tower, 75%"])
    assert found["ms, larger batch, 75 %"] == pytest.approx(1000 * a_step["larger batch, 75 %"])
    assert found["ms for 1,000 x 1,000 pairs"] == pytest.approx(2000)
    assert {source for source in lesson.BOARD.values() if isinstance(source, str)} <= {*found, *lesson.facts()}


def test_what_is_timed_is_a_training_step(batch):
    recipe = replace(FEW, mask=0.5)
    torch.manual_seed(5)
    steps, tower = lesson.timed_steps(recipe, [batch, batch], device=CPU), lesson.timed_tower(recipe, batch, device=CPU)
    models = [cell.cell_contents for cell in steps.__closure__ if isinstance(cell.cell_contents, FLIP)]
    before = models[0].vision.patch_embed.proj.weight.clone()
    steps()
    assert not torch.equal(models[0].vision.patch_embed.proj.weight, before)
    tower()
    (vision,) = [c.cell_contents for c in tower.__closure__ if isinstance(c.cell_contents, torch.nn.Module)]
    assert vision.patch_embed.proj.weight.grad is not None


def test_the_model_has_the_size_that_the_lesson_prints():
    with torch.device("meta"):
        assert count_parameters(FLIP(lesson.MAIN.model)) == lesson.facts()["parameters"] == 968_705
