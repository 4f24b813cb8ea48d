"""Lesson 06's recipes: pages for three stages, what each stage trains, the losses of a step, what is measured."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from math import log

import pytest
import torch
import torch.nn.functional as F
from lesson_helpers import Oracle, few_pages, fewer, repeats_to_the_last_digit
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tower_helpers import close, shake

from minivlp.data import PairTensors, PatchCodes
from minivlp.layers import count_parameters, patchify, to_float_pixels
from minivlp.lessons import albef as lesson05
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons import vlmo as lesson
from minivlp.losses import IGNORE, masked_lm_loss
from minivlp.models.vlmo import TwoPictures, VLMo, VLMoConfig
from minivlp.train import History

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = {(experiment, arm): recipe for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()}
TINY = VLMoConfig(width=16, depth=3, heads=2, mlp_ratio=2, codes=12)
FEW = replace(
    lesson.MAIN, model=TINY, before=("image", "text"), pairs=100, unpaired=150, image_steps=2, text_steps=2,
    single_batch=8, steps=4, batch_size=6, tune=2,
)  # fmt: skip
FULL = 4  # the level of the full captions
LOSSES = {"itc", "itc_vl", "itm", "mlm"}


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cached = lesson._codebook, lesson.told, lesson02.asked
    for function in cached:
        function.cache_clear()
    with few_pages(tmp_path_factory, lesson, lesson02, lesson03, lesson05):
        yield
    for function in cached:  # other tests have more pages
        function.cache_clear()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Every test has a memory of its own for the stages before the pairs."""
    monkeypatch.setattr(lesson, "_KEPT", {})
    return lesson._KEPT


@pytest.fixture
def model() -> VLMo:
    return tiny()


def tiny(**changes: object) -> VLMo:
    """A small VLMo whose weights hide nothing."""
    torch.manual_seed(0)
    return shake(VLMo(replace(TINY, **changes)), 0.1)


@pytest.fixture(scope="module")
def drawn(few: None) -> tuple[Tensor, ...]:
    """A batch of three pairs: pages 0 and 1 say the same, page 2 something else."""
    batches = lesson.PairBatches(lesson.pages(FEW, "pairs"), replace(FEW, batch_size=3, levels=(4,)), seed=0)
    *batch, same, noise = batches(1)
    assert torch.equal(same, torch.eye(3, dtype=torch.bool))
    same[0, 1] = same[1, 0] = True
    noise[:, 2] = torch.tensor([0.0, 1.0])  # page 2 gets the first wrong text and the last wrong picture there is
    return *batch, same, noise


@pytest.fixture
def batch(drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in drawn)


def flat(recipe: lesson.Recipe) -> dict[str, object]:
    own = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "model"}
    return own | {f.name: getattr(recipe.model, f.name) for f in fields(recipe.model)}


def changed(recipe: lesson.Recipe, base: lesson.Recipe) -> dict[str, object]:
    """All that is different, and what it is."""
    return {name: value for name, value in flat(recipe).items() if value != flat(base)[name]}


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_each_arm_changes_what_its_name_says_and_nothing_else():
    one, both = {"experts": "one"}, {"before": ("image", "text")}
    expected = {  # compared with SHORT: labels, then text, then 240 steps of pairs
        ("main", "VLMo"): {"steps": 400, "tune": 120, "everything": True},
        ("start", "nothing"): {"before": (), "tune": 120},
        ("start", "image"): {"before": ("image",), "tune": 120},
        ("start", "text"): {"before": ("text",), "tune": 120},
        ("start", "image + text"): both | {"tune": 120},
        ("start", "labels"): {"before": ("labels",), "tune": 120},
        ("start", "labels + text"): {"tune": 120},
        ("equal compute", "nothing"): {"before": (), "steps": 240 + 90 + 110},
        ("equal compute", "image"): {"before": ("image",), "steps": 240 + 110},
        ("equal compute", "text"): {"before": ("text",), "steps": 240 + 90},
        ("order", "text, then image"): {"before": ("text", "image")},
        ("experts", "no VL-FFN"): {"pair_depth": 0},
        ("experts", "one MLP"): one,
        ("experts", "one MLP, labels"): one | {"before": ("labels",)},
        ("attention", "shared"): both | {"pair_depth": 0},
        ("attention", "separate"): both | {"pair_depth": 0, "attention": "separate"},
        ("attention", "shared, wider"): both | {"pair_depth": 0, "mlp_ratio": 5},
        ("negatives", "4 GPUs"): {"gpus": 4},
        ("losses", "ITC alone"): {"itm": False, "mlm": 0.0},
        ("losses", "without ITM"): {"itm": False},
        ("losses", "without MLM"): {"mlm": 0.0},
        ("tuning", "500 steps"): {"steps": 400, "tune": 500},
        ("layer scale", "0.1"): both | {"layer_scale": 0.1},
    }  # fmt: skip
    assert {arm: changed(recipe, lesson.SHORT) for arm, recipe in ARMS.items()} == expected
    assert ARMS["main", "VLMo"] == lesson.MAIN and flat(lesson.SHORT)["before"] == ("labels", "text")
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]


def test_every_arm_can_be_built_from_pages_that_all_arms_share():
    for config in {recipe.model for recipe in ARMS.values()}:
        with torch.device("meta"):
            assert lesson.build(config).config == config
    for recipe in ARMS.values():
        assert set(recipe.before) <= {"image", "labels", "text"} and len(set(recipe.before)) == len(recipe.before)
        assert recipe.pairs + 2 * recipe.unpaired == 20_000  # one set of pictures for all, that of the other lessons
        assert not recipe.batch_size % recipe.gpus and recipe.batch_size <= recipe.pairs


def test_equal_compute_puts_what_the_missing_stages_cost_into_the_last_one(monkeypatch):
    monkeypatch.setattr(lesson, "COST", {"image": 7, "text": 100})
    steps = {before: lesson.longer(*before).steps for before in ((), ("image",), ("text",), ("image", "text"))}
    assert steps == {(): 347, ("image",): 340, ("text",): 247, ("image", "text"): 240}
    assert lesson.longer("text").before == ("text",)


def test_a_recipe_decides_what_the_loss_is_told():
    plain = {"second_itc": True, "itm": True, "mlm": 0.25, "gpus": 1}
    assert lesson.loss_of(FEW).func is lesson.vlmo_loss and lesson.loss_of(FEW).keywords == plain
    for name, value in (("second_itc", False), ("itm", False), ("mlm", 0.0), ("gpus", 4)):
        assert lesson.loss_of(replace(FEW, **{name: value})).keywords == plain | {name: value}


def test_separate_attention_has_its_weights_from_elsewhere_and_no_more_to_multiply():
    def sizes(arm: str) -> tuple[int, int]:
        model = lesson.build(ARMS["attention", arm].model).eval()
        images, ids = torch.zeros(1, 3, 64, 64), torch.full((1, 11), 5)
        # the plain implementation of attention, whose products are counted
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(images, ids, torch.ones_like(ids).bool())
        return count_parameters(model), counter.get_total_flops()

    (shared, flops), (separate, same), (wider, more) = map(sizes, ("shared", "separate", "shared, wider"))
    assert same == flops < more
    assert separate > 1.1 * shared and wider == pytest.approx(separate, rel=1e-3)


# --- pages -----------------------------------------------------------------------------------------------------------


def test_no_page_serves_two_stages(monkeypatch):
    asked = []

    def pairs(split: str, n: int) -> PairTensors:
        asked.append((split, n))
        return PairTensors(torch.arange(n)[:, None], [[str(i)] for i in range(n)], list(range(n)))

    monkeypatch.setattr(lesson, "pairs", pairs)
    recipe = replace(FEW, pairs=3, unpaired=5)
    found = {stage: lesson.pages(recipe, stage) for stage in ("image", "text", "pairs")}
    assert set(asked) == {("train", 13)}
    assert {stage: data.scenes for stage, data in found.items()} == {
        "pairs": [0, 1, 2], "image": [3, 4, 5, 6, 7], "text": [8, 9, 10, 11, 12]}  # fmt: skip
    for data in found.values():  # a picture keeps its captions
        assert data.images[:, 0].tolist() == data.scenes == [int(captions[0]) for captions in data.captions]


def test_the_first_pages_are_the_same_however_many_are_drawn():
    """Fine-tuning asks for as many pages as there are pairs: it must get those of stage 3."""
    pairs = lesson.pages(FEW, "pairs")
    alone = lesson.pairs("train", FEW.pairs)
    assert torch.equal(pairs.images, alone.images) and pairs.captions == alone.captions
    assert len(pairs) == 100 and len(lesson.pages(FEW, "image")) == len(lesson.pages(FEW, "text")) == 150


# --- batches ---------------------------------------------------------------------------------------------------------


def batches_of(stage: str, recipe: lesson.Recipe = FEW, *, seed: int = 0) -> Callable[[int], tuple[Tensor, ...]]:
    data = lesson.pages(recipe, stage)
    make = {"image": lesson.ImageBatches, "text": lesson.TextBatches, "pairs": lesson.PairBatches}[stage]
    return make(data.images if stage == "image" else data, recipe, seed=seed)


@pytest.mark.parametrize("stage", ["image", "text", "pairs"])
def test_batches_depend_on_seed_and_step_alone(stage):
    one, two = (batches_of(stage, seed=3) for _ in range(2))
    for step in (3, 0, 2):
        torch.manual_seed(step)
        assert all(torch.equal(a, b) for a, b in zip(one(step), two(step), strict=True))
    chance = {"image": 1, "text": 0, "pairs": 6}[stage]  # covered patches, hidden words, noise
    for other in (one(3), batches_of(stage, seed=4)(2)):
        for k in (0, chance):
            assert one(2)[k].shape != other[k].shape or not torch.equal(one(2)[k], other[k])
    # Everything random is the step's, not only the rows: the same pages come again an epoch later.
    epoch = one.order.steps_per_epoch
    assert not torch.equal(one.order.indices(0), one.order.indices(epoch))


def test_a_batch_of_pictures_has_a_share_of_patches_covered_and_all_their_codes():
    batches = batches_of("image")
    for step in range(3):
        images, hidden, codes = batches(step)
        assert images.shape == (8, 3, 64, 64) and images.dtype == torch.uint8
        assert hidden.shape == codes.shape == (8, 16) and hidden.dtype == torch.bool
        assert (hidden.sum(1) == round(0.4 * 16)).all() and len(hidden.unique(dim=0)) > 1
        rows = batches.order.indices(step)
        assert torch.equal(images, lesson.pages(FEW, "image").images[rows])
    more = batches_of("image", replace(FEW, covered=0.75))
    assert (more(0)[1].sum(1) == 12).all()


def test_codes_are_the_nearest_centres_made_of_the_pictures_of_stage_1():
    images = lesson.pages(FEW, "image").images
    patches = patchify(to_float_pixels(images), 16)
    centres = lesson.patch_codes(FEW).centres
    assert torch.equal(centres, PatchCodes.fit(patches.flatten(0, 1), codes=12).centres) and len(centres) == 12
    distance = (patches[:20, :, None].double() - centres.double()).square().sum(-1)  # (20, N, K)
    own = lesson.codes_of(FEW, images)
    assert own.shape == (150, 16) and len(own.unique()) == 12
    assert torch.allclose(distance.gather(2, own[:20, :, None])[..., 0], distance.min(-1).values, atol=1e-3)
    many = lesson.codes_of(FEW, images.repeat(4, 1, 1, 1))  # more than fit into one part
    assert torch.equal(many, own.repeat(4, 1))
    for step in (0, 5):
        batches = batches_of("image")
        assert torch.equal(batches(step)[2], own[batches.order.indices(step)])


def test_one_codebook_serves_all_recipes_with_the_same_patches(monkeypatch):
    fitted = []
    real = PatchCodes.fit
    monkeypatch.setattr(PatchCodes, "fit", lambda *args, **how: fitted.append(how) or real(*args, **how))
    lesson._codebook.cache_clear()
    images = lesson.pages(FEW, "image").images[:2]
    for more in ({}, {"steps": 9, "image_lr": 1.0, "before": ("image",)}, {"model": replace(TINY, width=32)}):
        lesson.codes_of(replace(FEW, **more), images)
    assert fitted == [{"codes": 12}]
    for more in ({"model": replace(TINY, codes=7)}, {"model": replace(TINY, patch_size=32)}, {"pairs": 90},
                 {"unpaired": 140}):  # fmt: skip
        lesson.codes_of(replace(FEW, **more), images)
    assert [how["codes"] for how in fitted[1:]] == [7, 12, 12, 12]
    lesson._codebook.cache_clear()


def test_a_codebook_is_made_of_no_more_than_2000_pictures(monkeypatch):
    seen = []
    monkeypatch.setattr(PatchCodes, "fit", lambda patches, **_: seen.append(patches.shape))
    monkeypatch.setattr(lesson, "pages", lambda *_: PairTensors(torch.zeros(2_005, 3, 16, 16).byte(), []))
    lesson._codebook.cache_clear()
    lesson.patch_codes(FEW)
    lesson._codebook.cache_clear()
    assert seen == [(2_000, 3 * 16 * 16)]


def test_a_batch_of_texts_asks_for_hidden_words_of_captions_of_all_levels():
    batches, levels = batches_of("text", replace(FEW, text_levels=(1, 1, 2, 4))), Counter()
    for step in range(120):
        hidden, mask, labels = batches(step)
        assert hidden.shape == mask.shape == labels.shape and len(hidden) == 8
        asked = labels != IGNORE
        assert not (asked & ~mask).any()
        ids, rows = torch.where(asked, labels, hidden), batches.order.indices(step)
        fitting = [level for level in (1, 2, 4) if batches.table(rows, level)[0].shape == ids.shape
                   and torch.equal(batches.table(rows, level)[0], ids)]  # fmt: skip
        assert len(fitting) == 1  # the labels restore what was hidden
        levels[fitting[0]] += 1
    assert levels[1] / 120 == pytest.approx(0.5, abs=0.12) and min(levels[2], levels[4]) > 15


@pytest.mark.parametrize(("stage", "field"), [("text", "text_share"), ("pairs", "share")])
def test_as_many_words_are_hidden_as_the_recipe_says(stage, field):
    asked, words = Counter(), 0
    few, many = (batches_of(stage, replace(FEW, **{field: share})) for share in (0.2, 0.6))
    for step in range(30):
        for name, batches in (("few", few), ("many", many)):
            batch = batches(step)
            asked[name] += int((batch[2 if stage == "text" else 4] != IGNORE).sum())
        mask = batch[1 if stage == "text" else 2]
        words += int(mask.sum()) - 2 * len(mask)  # without [CLS] and [SEP]
    assert asked["few"] / words == pytest.approx(0.2, abs=0.06)
    assert asked["many"] / words == pytest.approx(0.6, abs=0.06)
    assert (FEW.text_share, FEW.share) == (0.3, 0.5)


def test_a_batch_of_pairs_has_all_that_a_step_needs():
    data, levels, twins = lesson.pages(FEW, "pairs"), Counter(), 0
    batches = batches_of("pairs", replace(FEW, batch_size=20))
    assert batches.levels == [1, 4]
    for step in range(60):
        images, ids, mask, hidden, labels, same, noise = batches(step)
        rows = batches.order.indices(step)
        assert torch.equal(images, data.images[rows]) and images.dtype == torch.uint8
        asked = labels != IGNORE
        assert asked.any() and torch.equal(labels[asked], ids[asked]) and not (asked & ~mask).any()
        assert torch.equal(hidden[~asked], ids[~asked]) and not torch.equal(hidden, ids)
        (level,) = [k for k in (1, 4) if batches.table(rows, k)[0].shape == ids.shape
                    and torch.equal(batches.table(rows, k)[0], ids)]  # fmt: skip
        assert torch.equal(mask, batches.table(rows, level)[1])
        levels[level] += 1
        said = [lesson03.meaning(data.scenes[i], level) for i in rows.tolist()]
        assert torch.equal(same, torch.tensor([[a == b for a in said] for b in said]))
        twins += int(same.sum()) - len(rows)
        assert noise.shape == (2, 20) and noise.min() >= 0 and noise.max() < 1 and not torch.equal(*noise)
    assert levels[1] / 60 == pytest.approx(2 / 3, abs=0.15) and twins > 10


# --- stages 1 and 2 --------------------------------------------------------------------------------------------------


def no_opinion(linear: nn.Linear) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def test_masked_patches_are_guessed_among_all_codes(model):
    images, hidden, codes = batches_of("image")(0)
    loss = lesson.image_loss(model, images, hidden, codes)["mim"]
    states = model.image_states(images, hidden=hidden)
    by_hand = [-model.mim_head(states[b, 1 + n]).log_softmax(-1)[codes[b, n]].item()
               for b in range(8) for n in range(16) if hidden[b, n]]  # fmt: skip
    assert len(by_hand) == 8 * 6 and loss.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    no_opinion(model.mim_head)
    assert lesson.image_loss(model, images, hidden, codes)["mim"].item() == pytest.approx(log(12), abs=1e-5)


def test_masked_image_modelling_asks_about_covered_patches_and_sees_the_others_alone(model):
    images, hidden, codes = batches_of("image")(0)
    pixels = hidden.view(8, 1, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3)  # (8, 1, 64, 64)

    def loss(images: Tensor = images, codes: Tensor = codes) -> float:
        return lesson.image_loss(model, images, hidden, codes)["mim"].item()

    assert loss(codes=torch.where(hidden, codes, 0)) == loss()
    assert loss(codes=torch.where(hidden, 0, codes)) != loss()
    assert loss(torch.where(pixels, 255 - images, images)) == loss()
    assert abs(loss(torch.where(pixels, images, 255 - images)) - loss()) > 1e-4


def learning(loss: Tensor, model: VLMo) -> set[str]:
    """The names of all parameters that the loss pulls at."""
    named = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss, tuple(named.values()), retain_graph=True, allow_unused=True)
    return {name for name, slope in zip(named, slopes, strict=True) if slope is not None and slope.abs().max() > 0}


def test_masked_language_modelling_sees_no_picture(model):
    hidden, mask, labels = batches_of("text")(2)
    loss = lesson.text_loss(model, hidden, mask, labels)["mlm"]
    states = model.text_states(hidden, mask)
    by_hand = [-model.mlm_head(states[b, t]).log_softmax(-1)[labels[b, t]].item()
               for b in range(8) for t in range(labels.shape[1]) if labels[b, t] != IGNORE]  # fmt: skip
    assert len(by_hand) > 5 and loss.item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)
    pulled = learning(loss, model)
    assert not [name for name in pulled if "image" in name or ".pair." in name or "mask_patch" in name]
    assert {"embed.text.word.weight", "blocks.2.experts.text.mlp.fc1.weight", "blocks.0.attn.q.weight"} <= pulled
    no_opinion(model.mlm_head.decoder)
    assert lesson.text_loss(model, hidden, mask, labels)["mlm"].item() == pytest.approx(log(340), abs=1e-4)


# --- stage 3: wrong partners -----------------------------------------------------------------------------------------


def test_one_gpu_forbids_true_partners_alone():
    torch.manual_seed(0)
    for _ in range(5):
        same = torch.rand(6, 6) < 0.3
        same |= torch.eye(6, dtype=torch.bool)
        same[:, 0] = False  # no row is full
        assert torch.equal(lesson.out_of_reach(same, 1), same)


def test_on_more_gpus_only_the_own_part_can_be_wrong():
    own = torch.eye(4, dtype=torch.bool)
    assert lesson.out_of_reach(own, 2).int().tolist() == [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]]
    four = lesson.out_of_reach(torch.eye(8, dtype=torch.bool), 4)
    for i in range(8):
        assert (~four[i]).nonzero().flatten().tolist() == [i ^ 1]  # the other one of each two
    # Alone on a GPU, or with nobody but a twin: anywhere, but for those that belong.
    assert torch.equal(lesson.out_of_reach(own, 4), own)
    twins = own.clone()
    twins[2, 3] = True
    assert lesson.out_of_reach(twins, 2)[2].tolist() == [False, False, True, True]
    assert lesson.out_of_reach(twins, 2)[3].tolist() == [True, True, False, True]


@pytest.mark.parametrize("gpus", [1, 2, 4])
def test_a_true_partner_is_never_in_reach(gpus):
    torch.manual_seed(gpus)
    for _ in range(20):
        same = (torch.rand(8, 8) < 0.4) | torch.eye(8, dtype=torch.bool)
        forbidden = lesson.out_of_reach(same, gpus)
        assert (forbidden | ~same).all()
        assert (forbidden.all(1) == same.all(1)).all()  # whoever has a wrong partner at all can have one


@pytest.mark.parametrize("gpus", [1, 2])
def test_pictures_draw_texts_and_texts_draw_pictures(gpus, model, monkeypatch):
    batch = batches_of("pairs", replace(FEW, batch_size=4))(0)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 1] = True  # text 1 is true of picture 0, but picture 1 does not fit text 0
    seen = []
    real = lesson.hard_negatives

    def draw(*args: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(lesson, "hard_negatives", draw)
    used = []
    monkeypatch.setattr(lesson, "itm_loss", lambda *args: used.append(args) or torch.zeros(()))
    images, ids, mask, _, _, _, noise = batch
    lesson.vlmo_loss(model, *batch[:5], same, noise, gpus=gpus)
    with torch.no_grad():
        logits = model.logit_scale.exp() * model.encode_image(images) @ model.encode_text(ids).T
    own = lesson.out_of_reach(same, gpus), lesson.out_of_reach(same.T, gpus)
    assert own[0][0, 1] and own[1][1, 0] and (gpus > 1 or not own[0][1, 0])
    for (similarity, forbidden, drawn_by), s, f, n in zip(seen, (logits, logits.T), own, noise, strict=True):
        close(similarity, s, 1e-4)
        assert torch.equal(forbidden, f) and torch.equal(drawn_by, n)
    ((_, image, text, masks, other_image, other_text),) = used
    close(image, model.look(images))
    close(text, model.read(ids, mask))
    assert torch.equal(masks, mask)
    assert torch.equal(other_text, real(*seen[0])) and torch.equal(other_image, real(*seen[1]))


def test_itm_asks_one_true_pair_and_two_wrong_ones_each():
    text = torch.arange(3.0)[:, None, None].expand(3, 4, 2)
    image = 10 * torch.arange(3.0)[:, None, None].expand(3, 5, 2)
    mask = torch.arange(4) < torch.tensor([4, 3, 2])[:, None]
    seen, scores = [], torch.randn(9, 2)

    class Matching:
        def match(self, *args: Tensor) -> Tensor:
            seen.append(args)
            return scores

    loss = lesson.itm_loss(Matching(), image, text, mask, torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1]))
    ((texts, masks, images),) = seen
    assert texts[:, 0, 0].tolist() == [0, 1, 2, 2, 0, 1, 0, 1, 2]
    assert images[:, 0, 0].tolist() == [0, 10, 20, 0, 10, 20, 10, 20, 0]
    assert masks.sum(1).tolist() == [4, 3, 2, 2, 4, 3, 4, 3, 2]  # each text brings its own
    log_p = scores.log_softmax(1)
    assert loss.item() == pytest.approx(-(log_p[:3, 1].sum() + log_p[3:, 0].sum()).item() / 9, abs=1e-6)


def test_itm_teaches_the_same_to_the_last_digit_each_time():
    assert repeats_to_the_last_digit(lesson.itm_loss)


# --- stage 3: the objective ------------------------------------------------------------------------------------------


def itc_by_hand(image: Tensor, text: Tensor, scale: float, same: Tensor) -> float:
    """Both directions in double precision, row by row; who says the same shares the target."""
    total = 0.0
    for query, keys, belongs in ((image, text, same), (text, image, same.T)):
        for i in range(len(query)):
            log_p = (scale * keys.double() @ query[i].double()).log_softmax(0)
            total -= log_p[belongs[i]].mean().item() / (2 * len(query))
    return total


def test_the_objective_by_hand(model, batch):
    images, ids, mask, hidden, labels, same, _ = batch
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_vl_scale.fill_(1.0)
    losses = lesson.vlmo_loss(model, *batch)
    assert losses.keys() == LOSSES and all(loss.ndim == 0 for loss in losses.values())
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(ids)
        first = itc_by_hand(image, text, torch.tensor(2.0).exp().item(), same)
        looked = model.towers(model.look(images), "image")["itc_vl"], model.towers(model.read(ids, mask), "text", mask)
        second = itc_by_hand(looked[0], looked[1]["itc_vl"], torch.tensor(1.0).exp().item(), same)
        # Pages 0 and 1 say the same, so page 2 is their only wrong partner; the noise of page 2 says which of them.
        asked = [(0, 0), (1, 1), (2, 2), (0, 2), (1, 2), (2, 0), (2, 0), (2, 1), (1, 2)]  # (picture, text)
        pictures, texts = map(list, zip(*asked, strict=True))
        log_p = model.itm_head(model(images[pictures], ids[texts], mask[texts])[0]).log_softmax(-1)
        itm = -(log_p[:3, 1].sum() + log_p[3:, 0].sum()).item() / 9
        mlm = masked_lm_loss(model.mlm_head, model(images, hidden, mask)[1]["text"], labels).item()
    expected = {"itc": first / 2, "itc_vl": second / 2, "itm": itm, "mlm": 0.25 * mlm}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, abs=1e-5)
    plain = itc_by_hand(image, text, torch.tensor(2.0).exp().item(), torch.eye(3, dtype=torch.bool))
    assert abs(plain - first) > 1e-3 < abs(first - second)  # a hundred times what is let pass above


def test_each_switch_changes_exactly_its_own_part(model):
    batch = batches_of("pairs", replace(FEW, batch_size=8))(4)

    def found(**how: object) -> dict[str, float]:
        return {name: loss.item() for name, loss in lesson.vlmo_loss(model, *batch, **how).items()}

    plain = found()
    for how, dropped in (({"itm": False}, "itm"), ({"mlm": 0.0}, "mlm"), ({"second_itc": False}, "itc_vl")):
        expected = {name: value for name, value in plain.items() if name != dropped}
        if dropped == "itc_vl":
            expected["itc"] *= 2  # it is no mean of two any more
        assert found(**how) == pytest.approx(expected, abs=1e-6)
    assert found(mlm=1.0) == pytest.approx(plain | {"mlm": 4 * plain["mlm"]}, abs=1e-5)
    spread = found(gpus=4)
    assert spread == plain | {"itm": spread["itm"]} and spread["itm"] != plain["itm"]


def test_without_vl_ffn_there_is_no_second_itc(batch):
    images, ids, *_, same, _ = batch
    model = tiny(pair_depth=0)
    losses = lesson.vlmo_loss(model, *batch)
    assert losses.keys() == LOSSES - {"itc_vl"}
    with torch.no_grad():
        vectors = model.encode_image(images), model.encode_text(ids)
    by_hand = itc_by_hand(*vectors, model.logit_scale.exp().item(), same)
    assert losses["itc"].item() == pytest.approx(by_hand, abs=1e-5)


def test_each_loss_reads_its_own_part_of_a_batch(model):
    """MLM sees hidden words, ITC and ITM whole sentences; who says the same matters to targets and wrong partners."""
    batch = batches_of("pairs", replace(FEW, batch_size=8))(4)
    names = "images ids mask hidden labels same noise".split()
    images, ids, mask, hidden, labels, same, noise = batch
    alike = torch.eye(8, dtype=torch.bool)
    alike[0, 1:7] = alike[1:7, 0] = True
    assert not torch.equal(alike, same)
    other = {
        "images": 255 - images, "ids": torch.where(mask, 50, ids), "hidden": torch.where(mask, 50, hidden),
        "labels": torch.where(labels != IGNORE, 50, labels), "noise": noise.flip(0, 1), "same": alike,
    }  # fmt: skip
    expected = {"images": LOSSES, "ids": LOSSES - {"mlm"}, "hidden": {"mlm"}, "labels": {"mlm"}, "noise": {"itm"},
                "same": LOSSES - {"mlm"}}  # fmt: skip
    before = lesson.vlmo_loss(model, *batch)
    for name, value in other.items():
        after = lesson.vlmo_loss(model, *[value if n == name else t for n, t in zip(names, batch, strict=True)])
        assert {n for n, v in after.items() if abs((v - before[n]).item()) > 1e-6} == expected[name], name


EXPERTS = {"itc": {"image", "text"}, "itc_vl": {"image", "text", "pair"}, "itm": {"image", "text", "pair"},
           "mlm": {"image", "text", "pair"}}  # fmt: skip


def test_which_experts_each_loss_teaches(model, batch):
    losses = lesson.vlmo_loss(model, *batch)
    for name, loss in losses.items():
        pulled = learning(loss, model)
        experts = {part.split(".")[3] for part in pulled if ".experts." in part}
        assert experts == EXPERTS[name], name
        at_the_top = {part.split(".")[3] for part in pulled if part.startswith("blocks.2.experts.")}
        assert at_the_top == ({"image", "text"} if name == "itc" else {"pair"}), name
        assert "blocks.0.attn.q.weight" in pulled
        for head, own in {"itc_image_proj": "itc", "itc_vl_text_proj": "itc_vl", "logit_scale": "itc",
                          "logit_vl_scale": "itc_vl", "itm_head": "itm", "mlm_head": "mlm"}.items():  # fmt: skip
            assert any(part.startswith(f"{head}.") or part == head for part in pulled) == (own == name), (head, name)


def test_the_strength_of_each_pull_is_the_norm_of_its_gradient(model, batch):
    losses = lesson.vlmo_loss(model, *batch)
    found = lesson.gradient_norms(model, losses)
    assert found.keys() == LOSSES
    for name, loss in losses.items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        squares = dict.fromkeys(("attention", "image", "text", "pair"), 0.0)
        for path, parameter in model.named_parameters():
            if path.startswith("blocks.") and parameter.grad is not None:
                expert = path.split(".")[3] if ".experts." in path else "attention"
                squares[expert] += parameter.grad.double().square().sum().item()
        assert found[name] == pytest.approx({part: square**0.5 for part, square in squares.items()}, rel=1e-4), name
    assert found["itc"]["pair"] == 0.0 < found["itc_vl"]["pair"]
    lesson.freeze_for(model, "text", ("image",))
    frozen = lesson.gradient_norms(model, lesson.vlmo_loss(model, *batch))
    for name in LOSSES:
        assert frozen[name] == pytest.approx({"attention": 0, "image": 0, "pair": 0, "text": found[name]["text"]})


@pytest.mark.parametrize("experts", ["modality", "one"])
def test_the_parts_hold_every_parameter_of_the_blocks_once(experts):
    model = tiny(experts=experts)
    held = [id(p) for own in lesson.parts_of(model).values() for p in own]
    assert len(held) == len(set(held)) and set(held) == {id(p) for p in model.blocks.parameters()}


# --- what a stage may train ------------------------------------------------------------------------------------------

HEADS = ("embed.", "norm.", "pooler.", "itc_", "logit_", "itm_head.", "mlm_head.", "mim_head.", "blocks.")


def free(model: VLMo, stage: str, before: Sequence[str]) -> set[str]:
    lesson.freeze_for(model, stage, before)
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def named(model: VLMo, *beginnings: str) -> set[str]:
    """The parameters of all that is listed, without regard to the block's number."""
    found = {name for name, _ in model.named_parameters()
             if re.sub(r"^blocks\.\d+\.", "", name).startswith(beginnings)}  # fmt: skip
    assert found
    return found


def test_the_second_stage_trains_what_the_first_one_does_not_need():
    for changes in ({}, {"attention": "separate"}, {"pair_depth": 0}):
        model = tiny(**changes)
        everything = {name for name, _ in model.named_parameters()}
        assert all(name.startswith(HEADS) for name in everything)
        own_attention = ("attn.of.text.",) if "attention" in changes else ()
        text = named(model, "embed.text.", "embed.types.", "mlm_head.", "norm.", "experts.text.", *own_attention)
        own_attention = ("attn.of.image.",) if "attention" in changes else ()
        image = named(model, "embed.image.", "embed.types.", "embed.mask_patch", "mim_head.", "norm.",
                      "experts.image.", *own_attention)  # fmt: skip
        for stage in ("image", "text", "pairs"):
            assert free(model, stage, ()) == everything
        for before in (("image",), ("labels",)):
            assert free(model, "text", before) == text
        assert free(model, "image", ("text",)) == image
        assert not [name for name in text | image if ".attn.q" in name or "gamma" in name or "norm1" in name]
        for before in ((), ("labels",), ("image", "text")):
            assert free(model, "pairs", before) == everything


def test_one_mlp_for_all_is_trained_in_stage_2_as_well():
    model = tiny(experts="one")
    shared = model.blocks[0].experts["text"]
    assert shared is model.blocks[0].experts["image"]
    for stage, before in (("text", "image"), ("image", "text")):
        lesson.freeze_for(model, stage, (before,))
        assert all(p.requires_grad for p in shared.parameters())
        assert not model.blocks[0].attn.q.weight.requires_grad


def test_a_stage_moves_what_it_may_and_leaves_the_rest_to_the_last_bit():
    recipe = replace(FEW, weight_decay=0.5)  # which must not pull at frozen weights either
    image, text = lesson.before_pairs(recipe, seed=0, device=CPU)
    assert (image.name, text.name) == ("image", "text")
    lesson.minivlp.seed_everything(0)
    fresh = lesson.build(TINY)
    start = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    attention = {"norm1.", "attn.", "gamma_1", "gamma_2"}
    seen = named(fresh, "embed.image.", "embed.types.", "embed.mask_patch", "norm.", "mim_head.", "experts.image.",
                 *attention)  # fmt: skip
    assert set(lesson.changed_tensors(start, image.weights)) == seen
    spoken = named(fresh, "embed.text.", "embed.types.", "norm.", "mlm_head.", "experts.text.")
    assert set(lesson.changed_tensors(image.weights, text.weights)) == spoken
    # Of two tables only the rows in use move: the type of words, and positions up to the longest text.
    (types, positions) = (text.weights[k] - image.weights[k] for k in ("embed.types.weight",
                                                                       "embed.text.position.weight"))  # fmt: skip
    assert types[0].any() and not types[1:].any()
    longest = max(batches_of("text", recipe)(step)[0].shape[1] for step in range(2))
    assert positions[:longest].any(1).all() and not positions[longest:].any()

    text, image = lesson.before_pairs(replace(recipe, before=("text", "image")), seed=0, device=CPU)
    assert set(lesson.changed_tensors(start, text.weights)) == spoken | named(fresh, *attention)
    assert set(lesson.changed_tensors(text.weights, image.weights)) == seen - named(fresh, *attention)


def test_changed_tensors_differ_in_any_bit():
    before = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.arange(4.0)}
    after = {name: tensor.clone() for name, tensor in before.items()}
    assert lesson.changed_tensors(before, after) == []
    after["c"][3] += 1e-6
    after["a"][0] = 1e-30
    assert lesson.changed_tensors(before, after) == ["a", "c"]


# --- the stages, one after the other ---------------------------------------------------------------------------------


class Fitted(list):
    """In the place of `fit_stage`: nothing is trained, but listed, and the word table says how many came before.
    `stop_next` ends the next stage as if by hand."""

    stop_next = False

    def __call__(self, model: VLMo, stage: str, recipe: lesson.Recipe, *, seed: int, **_: object) -> History:
        self.append((stage, recipe, seed))
        with torch.no_grad():
            model.embed.text.word.weight[0] = len(self)
        stopped, self.stop_next = self.stop_next, False
        return History(stopped="by hand" if stopped else "")


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Fitted:
    calls = Fitted()
    monkeypatch.setattr(lesson, "fit_stage", calls)
    return calls


LATER = {"steps": 9, "batch_size": 5, "lr": 1.0, "levels": (4,), "share": 0.1, "second_itc": False, "itm": False,
         "mlm": 0.0, "gpus": 2, "tune": 0, "everything": False}  # fmt: skip # what only stage 3 and the measuring read


def test_stages_are_remembered_by_all_that_they_depend_on(fitted):
    first = lesson.before_pairs(FEW, seed=0, device=CPU)
    assert [stage for stage, *_ in fitted] == ["image", "text"] == [stage.name for stage in first]
    assert {f.name for f in fields(FEW)} == {*LATER, *lesson.ALONE}
    for name, value in LATER.items():
        assert getattr(FEW, name) != value
        assert lesson.before_pairs(replace(FEW, **{name: value}), seed=0, device=CPU) is first
    assert len(fitted) == 2
    early = {"model": replace(TINY, layer_scale=0.5), "before": ("text",), "pairs": 90, "unpaired": 140,
             "image_steps": 1, "text_steps": 1, "single_batch": 7, "image_lr": 0.1, "text_lr": 0.1, "covered": 0.3,
             "text_share": 0.2, "text_levels": (1,), "weight_decay": 0.1, "warmup": 0.0}  # fmt: skip
    assert early.keys() == set(lesson.ALONE)
    others = [(replace(FEW, **{name: value}), 0) for name, value in early.items() if getattr(FEW, name) != value]
    assert len(others) == len(early)
    for other, seed in (*others, (FEW, 1)):
        lesson.before_pairs(FEW, seed=0, device=CPU)  # not forgotten meanwhile
        before = len(fitted)
        lesson.before_pairs(other, seed=seed, device=CPU)
        assert fitted[before:] == [(stage, other, seed) for stage in other.before]


def test_only_the_newest_few_are_remembered(fitted, nothing_kept):
    kept = [lesson.before_pairs(FEW, seed=seed, device=CPU) for seed in range(9)]
    assert len(nothing_kept) == 8 and len(fitted) == 18
    assert lesson.before_pairs(FEW, seed=8, device=CPU) is kept[8] and lesson.before_pairs(FEW, seed=1, device=CPU)
    assert len(fitted) == 18
    assert lesson.before_pairs(FEW, seed=0, device=CPU) is not kept[0] and len(fitted) == 20


def test_a_stage_that_was_stopped_is_not_remembered_and_ends_the_run(fitted, nothing_kept):
    fitted.stop_next = True
    model, history, done = lesson.train(FEW, seed=0, device=CPU, progress=None)
    assert [stage for stage, *_ in fitted] == ["image"] == [stage.name for stage in done]
    assert history.stopped == "by hand" and history is done[0].history and not nothing_kept
    assert torch.equal(model.embed.text.word.weight, done[0].weights["embed.text.word.weight"])
    fitted.stop_next = True
    run = lesson.run(FEW, seed=0, device=CPU)
    assert run.history.stopped == "by hand" and run.metrics == {}
    lesson.before_pairs(FEW, seed=0, device=CPU)
    assert [stage for stage, *_ in fitted] == ["image", "image", "image", "text"]


def test_each_stage_keeps_weights_of_its_own(fitted):
    image, text = lesson.before_pairs(FEW, seed=0, device=CPU)
    words = [stage.weights["embed.text.word.weight"][0, 0].item() for stage in (image, text)]
    assert words == [1.0, 2.0]
    model, done = lesson.begin(FEW, seed=0, device=CPU)
    assert done[-1] is text
    with torch.no_grad():
        model.embed.text.word.weight.zero_()  # stage 3 trains a copy
    assert text.weights["embed.text.word.weight"][0, 0] == 2.0


def test_the_last_stage_begins_where_the_one_before_it_ended():
    model, done = lesson.begin(FEW, seed=0, device=CPU)
    assert lesson.changed_tensors(done[-1].weights, model.state_dict()) == [] and len(done[0].weights) == len(
        model.state_dict()
    )
    assert len(done[0].history.losses["mim"]) == FEW.image_steps and len(done[1].history.losses["mlm"]) == 2
    fresh, none = lesson.begin(replace(FEW, before=()), seed=0, device=CPU)
    lesson.minivlp.seed_everything(0)
    assert none == [] and lesson.changed_tensors(lesson.build(TINY).state_dict(), fresh.state_dict()) == []
    other, _ = lesson.begin(replace(FEW, before=()), seed=1, device=CPU)
    assert len(lesson.changed_tensors(fresh.state_dict(), other.state_dict())) > 20


def test_labels_are_the_kept_weights_of_lesson_01(monkeypatch):
    recipe, taken = replace(lesson.MAIN, before=("labels",)), []
    real = lesson.trained
    monkeypatch.setattr(lesson, "trained", lambda name, vit, **how: taken.append((name, how)) or real(name, vit, **how))
    model, (labels,) = lesson.begin(recipe, seed=0, device=CPU)
    assert labels.name == "labels" and labels.history == History()
    assert taken == [("vit_normal", {"own": False})]  # the course's own, so that everybody starts from the same
    experiment, arm = lesson01.CHECKPOINTS["vit_normal"]
    vit = lesson.trained("vit_normal", lesson01.ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
    for ours, theirs in zip(model.blocks, vit.encoder.blocks, strict=True):
        assert torch.equal(ours.attn.q.weight, theirs.attn.q.weight)
        assert torch.equal(ours.experts["image"].mlp.fc1.weight, theirs.mlp.fc1.weight)
    lesson.minivlp.seed_everything(0)
    start = lesson.build(recipe.model)
    from_vit = named(start, "embed.image.", "norm.", "norm1.", "attn.", "experts.image.")
    assert set(lesson.changed_tensors(start.state_dict(), model.state_dict())) == from_vit


def test_each_stage_is_trained_with_its_own_batches_loss_and_rate(monkeypatch, model):
    seen = []
    monkeypatch.setattr(lesson, "fit", lambda *args, **how: seen.append((args, how)) or History())
    recipe = replace(FEW, image_lr=0.3, text_lr=0.2, lr=0.1, image_steps=3, text_steps=5, steps=7, warmup=0.25)
    for stage in ("image", "text", "pairs"):
        lesson.fit_stage(model, stage, recipe, seed=4, progress="VLMo")
    (image, text, pairs) = seen
    for (args, how), kind, lr, steps in ((image, lesson.ImageBatches, 0.3, 3), (text, lesson.TextBatches, 0.2, 5),
                                         (pairs, lesson.PairBatches, 0.1, 7)):  # fmt: skip
        assert args[0] is model and type(args[1]) is kind and args[1].seed == 4 and args[1].recipe == recipe
        assert (how["lr"], how["steps"], how["warmup"], how["weight_decay"]) == (lr, steps, 0.25, recipe.weight_decay)
        assert how["betas"] == (0.9, 0.98)  # paper, 4: of all stages
    assert [args[2] for args, _ in seen[:2]] == [lesson.image_loss, lesson.text_loss]
    assert pairs[0][2].func is lesson.vlmo_loss
    assert [how["progress"] for _, how in seen] == ["VLMo, image", "VLMo, text", "VLMo, pairs"]
    assert "evaluate" not in image[1] and "evaluate" not in text[1] and pairs[1]["evaluate_every"] == 2
    assert torch.equal(image[0][1].images, lesson.pages(recipe, "image").images)
    assert torch.equal(text[0][1].images, lesson.pages(recipe, "text").images)
    assert torch.equal(pairs[0][1].images, lesson.pages(recipe, "pairs").images)


def test_a_run_is_the_same_again_whether_its_stages_are_remembered_or_not(monkeypatch, nothing_kept):
    monkeypatch.setattr(lesson, "validation", lambda recipe: lambda model: {"seen": model.logit_scale.item()})
    recipe = replace(FEW, steps=3)
    first, history, done = lesson.train(recipe, seed=0, device=CPU, progress=None)
    assert history.losses.keys() == LOSSES and history.steps == 3 and history.metric_steps == [1, 2, 3]
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert not torch.equal(first.blocks[0].attn.q.weight, done[-1].weights["blocks.0.attn.q.weight"])
    kept, *_ = lesson.train(recipe, seed=0, device=CPU, progress=None)
    nothing_kept.clear()
    again, *_ = lesson.train(recipe, seed=0, device=CPU, progress=None)
    other, *_ = lesson.train(recipe, seed=1, device=CPU, progress=None)
    assert lesson.changed_tensors(first.state_dict(), kept.state_dict()) == []
    assert lesson.changed_tensors(first.state_dict(), again.state_dict()) == []
    assert "blocks.2.experts.pair.mlp.fc1.weight" in lesson.changed_tensors(first.state_dict(), other.state_dict())


# --- measuring -------------------------------------------------------------------------------------------------------


def full(split: str = "test", n: int = 40) -> tuple[Tensor, list[str]]:
    data = lesson.pairs(split, n)
    return data.images, [captions[FULL] for captions in data.captions]


def test_preference_compares_the_own_caption_with_a_wrong_one():
    similarity = 60 * (torch.eye(40) + torch.eye(40).roll(1, dims=1))  # the own text and that of the next page
    odds = torch.full((40, 40), -5.0).fill_diagonal_(-4.0)  # all unlikely, the own ones a little less so
    fooled = odds.masked_fill(torch.eye(40).roll(1, dims=1).bool(), -3.0)
    for table, hard, random in ((odds, 1.0, 1.0), (-odds, 0.0, 0.0), (torch.zeros(40, 40), 0.0, 0.0)):
        one = Oracle(*full(), similarity, table)
        assert lesson.preference(one, how="hard", n=40) == hard and lesson.preference(one, n=40) == random
    one = Oracle(*full(), similarity, fooled)
    assert lesson.preference(one, how="hard", n=40) < 0.1 and lesson.preference(one, n=40) > 0.9
    half = odds.clone()
    half[:20] = -half[:20]
    assert lesson.preference(Oracle(*full("val"), similarity, half), "val", n=40) == 0.5


def test_attention_adds_up_and_is_even_where_nothing_is_asked(model):
    found = lesson.attention_of(model, n=10)
    assert found.keys() == {f"block {i}, {name}" for i in range(3) for name in lesson.LOOKS}
    for i in range(3):
        for side in ("text", "image"):
            assert sum(found[f"block {i}, {side} at {at}"] for at in ("text", "image")) == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        for block in model.blocks:
            nn.init.zeros_(block.attn.q.weight)
            nn.init.zeros_(block.attn.q.bias)
    lengths = [len(lesson.words().encode(text)) for text in full()[1][:10]]
    even = lesson.attention_of(model, n=10)
    data = lesson.pairs("test", 10)
    assert len(data) == 10
    of_words = sum(L * L / (L + 17) for L in lengths) / sum(lengths)  # each word of a text counts alike
    of_patches = sum(L / (L + 17) for L in lengths) / len(lengths)
    for i in range(3):
        assert even[f"block {i}, text at text"] == pytest.approx(of_words, abs=1e-5)
        assert even[f"block {i}, image at image"] == pytest.approx(1 - of_patches, abs=1e-5)


def test_picture_accuracy_counts_covered_patches_alone():
    images = full("val")[0]
    codes = lesson.codes_of(FEW, images)
    seen = []

    class Knowing(nn.Module):
        def __init__(self, right: Tensor) -> None:
            super().__init__()
            self.anything, self.right = nn.Parameter(torch.zeros(1)), right

        def image_states(self, images: Tensor, *, hidden: Tensor) -> Tensor:
            assert not self.training and not torch.is_grad_enabled()
            seen.append(hidden)
            guesses = torch.where(self.right, codes, (codes + 1) % 12)
            return F.pad(F.one_hot(guesses, 12).float(), (0, 0, 1, 0))  # a class token first

        def mim_head(self, states: Tensor) -> Tensor:
            return states

    everywhere = torch.ones_like(codes).bool()
    assert lesson.picture_accuracy(Knowing(everywhere), FEW, n=40) == 1.0
    hidden = seen[0]
    assert hidden.shape == (40, 16) and (hidden.sum(1) == 6).all()
    assert lesson.picture_accuracy(Knowing(~hidden), FEW, n=40) == 0.0
    some = everywhere & (torch.arange(40) < 10)[:, None]
    assert lesson.picture_accuracy(Knowing(some), FEW, n=40) == pytest.approx(0.25)
    assert all(torch.equal(hidden, other) for other in seen)  # always the same question
    lesson.picture_accuracy(Knowing(everywhere), replace(FEW, covered=0.5), n=40)
    assert (seen[-1].sum(1) == 8).all()


def test_answers_are_read_from_frozen_states(monkeypatch):
    """A model whose states know the answers, of pairs alone, or of the question alone."""
    q = {split: lesson02.asked(split, n) for split, n in (("train", FEW.pairs), ("test", 500))}
    pages = {split: lesson.pairs(split, FEW.pairs if split == "train" else 40).images for split in q}
    answers = {}
    for split, asked in q.items():
        for row, ids, mask, answer in zip(asked.rows.tolist(), asked.ids, asked.mask, asked.answers, strict=True):
            answers[pages[split][row].numpy().tobytes(), tuple(ids[mask].tolist())] = int(answer)

    class Knowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anything = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor, ids: Tensor, mask: Tensor, *, rows: int) -> tuple[Tensor, dict]:
            assert rows == 1 and not self.training and not torch.is_grad_enabled()
            found = [answers[image.numpy().tobytes(), tuple(row[kept].tolist())]
                     for image, row, kept in zip(images, ids, mask, strict=True)]  # fmt: skip
            return F.one_hot(torch.tensor(found), len(lesson.ANSWERS)).float(), {}

        def image_states(self, images: Tensor, *, rows: int) -> Tensor:
            return torch.zeros(len(images), 1, 3)

        def text_states(self, ids: Tensor, mask: Tensor, *, rows: int) -> Tensor:
            assert torch.equal(mask, ids != 0)
            return torch.ones(len(ids), 1, 3)

    found = lesson.frozen_answers(Knowing(), FEW)
    most = (q["test"].answers == q["train"].answers.mode().values).float().mean().item()
    assert list(found) == ["the question alone", "two class tokens", "the pooled pair"]
    assert [right["all"] for right in found.values()] == pytest.approx([most, most, 1.0], abs=0.02) and most < 0.5
    assert all(right.keys() == {"all", *q["test"].types} for right in found.values())

    seen = []
    monkeypatch.setattr(lesson, "ridge_probe", lambda train, answers, test, *, classes, l2: seen.append(
        (train, answers, test)) or F.one_hot(q["test"].answers, classes))  # fmt: skip
    model = tiny()
    assert all(set(right.values()) == {1.0} for right in lesson.frozen_answers(model, FEW).values())
    with torch.no_grad():
        rows = slice(3, 6)
        batch = pages["test"][q["test"].rows[rows]], q["test"].ids[rows], q["test"].mask[rows]
        image, text = model.image_states(batch[0])[:, 0], model.text_states(*batch[1:])[:, 0]
        expected = text, torch.cat([image, text], dim=1), model(*batch)[0]
    for (train, answers, test), states in zip(seen, expected, strict=True):
        assert torch.equal(answers, q["train"].answers) and train.shape == (len(answers), states.shape[1])
        close(test[rows], states)


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def test_statements_bring_their_two_pictures_their_words_and_their_truth():
    batches = lesson.StatementBatches("test", 40, batch_size=6, seed=2)
    found = lesson.told("test", 40)
    pages = lesson.pairs("test", 40).images
    assert len(batches.truth) == len(found) > 60
    rows = torch.tensor([5, 0, 11, 5])
    left, right, ids, mask, truth = batches.chosen(rows)
    for k, row in enumerate(rows.tolist()):
        assert torch.equal(left[k], pages[found[row].left]) and torch.equal(right[k], pages[found[row].right])
        assert ids[k][mask[k]].tolist() == lesson.words().encode(found[row].text)
        assert truth[k].item() == found[row].truth
    assert torch.equal(mask, ids != 0) and mask.any(0).all()  # as long as the longest, no longer
    assert truth.dtype == torch.long and {s.truth for s in found} == {True, False}
    drawn = [lesson.StatementBatches("test", 40, batch_size=6, seed=seed)(3) for seed in (2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(batches(3), drawn[0], strict=True))
    assert len(drawn[0][4]) == 6 and not torch.equal(batches(3)[0], drawn[1][0])


class Reader(nn.Module):
    """Judges statements by a rule, given both pages' numbers and the words."""

    def __init__(self, rule: Callable[[int, int, str], bool]) -> None:
        super().__init__()
        self.anything, self.rule, self.asked = nn.Parameter(torch.zeros(1)), rule, []
        self.pages = {image.numpy().tobytes(): i for i, image in enumerate(lesson.pairs("test", 40).images)}

    def forward(self, left: Tensor, right: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        assert not self.training and torch.equal(mask, ids != 0)
        told = [(self.pages[a.numpy().tobytes()], self.pages[b.numpy().tobytes()], tuple(row[kept].tolist()))
                for a, b, row, kept in zip(left, right, ids, mask, strict=True)]  # fmt: skip
        self.asked += told
        return F.one_hot(torch.tensor([int(self.rule(*one)) for one in told]), 2)


def test_statements_are_judged_one_by_one():
    truth = {(s.left, s.right, tuple(lesson.words().encode(s.text))): s.truth for s in lesson.told("test", 40)}
    knowing = Reader(lambda *told: truth[told])
    assert lesson.statements_right(knowing, n=40, batch_size=7) == 1.0
    assert len(knowing.asked) == len(lesson.told("test", 40)) and set(knowing.asked) == truth.keys()
    assert lesson.statements_right(Reader(lambda *told: not truth[told]), n=40) == 0.0
    blind = lesson.statements_right(Reader(lambda left, right, text: sum(text) % 2 == 0), n=40)
    assert blind == 0.5  # each text comes twice, true once


def test_the_loss_of_a_statement_is_the_surprise_at_its_truth(model):
    torch.manual_seed(0)
    both = shake(TwoPictures(model), 0.05)
    left, right, ids, mask, truth = batch = lesson.StatementBatches("test", 40, batch_size=5)(0)
    with torch.no_grad():
        log_p = both(left, right, ids, mask).log_softmax(-1)
    by_hand = -sum(log_p[k, t].item() for k, t in enumerate(truth.tolist())) / 5
    assert lesson.statement_loss(both, *batch).item() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("task", [lesson.two_pictures, lesson.questions])
def test_tuning_leaves_the_model_alone_and_is_the_same_again(task, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lesson.freeze_for(model, "text", ("image",))
    tuned, again, other = (task(model, FEW, seed=seed) for seed in (0, 0, 1))
    assert lesson.changed_tensors(before, model.state_dict()) == []
    assert lesson.changed_tensors(tuned.state_dict(), again.state_dict()) == []
    assert lesson.changed_tensors(tuned.state_dict(), other.state_dict()) and not tuned.training
    inner = tuned.vlmo if task is lesson.two_pictures else tuned
    assert type(inner) is VLMo and type(tuned) is (TwoPictures if task is lesson.two_pictures else VLMo)
    for name in ("blocks.0.attn.q.weight", "blocks.2.experts.pair.mlp.fc1.weight", "embed.text.word.weight"):
        assert not torch.equal(inner.state_dict()[name], before[name])
        close(inner.state_dict()[name], before[name], 0.01)  # it goes on from there: two steps at half the rate


def test_tuning_reads_the_pages_of_stage_3_at_half_the_rate(monkeypatch, model):
    seen = []
    monkeypatch.setattr(lesson, "fit", lambda model, batches, loss, **how: seen.append((batches, how)) or History())
    lesson.two_pictures(model, replace(FEW, lr=0.5), seed=3)
    ((batches, how),) = seen
    assert torch.equal(batches.images, lesson.pairs("train", FEW.pairs).images)
    assert batches.order.batch_size == FEW.batch_size and batches.order.seed == 3
    assert (how["lr"], how["steps"], how["weight_decay"]) == (0.25, FEW.tune, FEW.weight_decay)

    asked = []
    monkeypatch.setattr(lesson02, "learn_to_answer", lambda *args, **how: asked.append((args, how)) or (None, None))
    for blank in (False, True):
        lesson.questions(model, replace(FEW, lr=0.5), seed=3, blank=blank)
        (args, how) = asked.pop()
        assert args[0] is model and (args[1].train_size, args[1].lr, 2 * args[1].batch_size) == (100, 0.25, 6)
        assert how == {"seed": 3, "steps": FEW.tune, "blank": blank, "pages": 100, "progress": None}


def test_half_a_tuning_is_no_result(monkeypatch, model):
    monkeypatch.setattr(lesson, "fit", lambda *_, **__: History(stopped="by hand"))
    with pytest.raises(KeyboardInterrupt):
        lesson.two_pictures(model, FEW, seed=0)
    assert isinstance(lesson.two_pictures(model, FEW, seed=0, progress="shown"), TwoPictures)  # somebody watches


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All measurements look at 40 pages, or at 4 probes."""
    for module, names in ((lesson03, ("retrieval", "zero_shot_kind")), (lesson05, ("searches",)),
                          (lesson, ("preference", "attention_of", "statements_right", "validation"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, fewer(getattr(module, name)))
    monkeypatch.setattr(lesson02, "grounding", fewer(lesson02.grounding))
    monkeypatch.setattr(lesson05, "probes", fewer(lesson05.probes, 4))


def wanted(*arm: str) -> set[str]:
    """The numbers of an arm that the list, the board and the headline name."""
    sources = [source for source in (*lesson.SCOREBOARD.values(), *lesson.BOARD.values(), *lesson.HEADLINE[1:])
               if isinstance(source, tuple)]  # fmt: skip
    assert {source[:2] for source in sources} == {("main", "VLMo"), ("tuning", "500 steps")}
    return {metric for *of, metric in sources if tuple(of) == arm}


def test_a_run_reports_every_number_of_the_scoreboard_and_the_curves_of_all_stages(small_tests):
    run = lesson.run(FEW, seed=0, device=CPU)
    assert wanted("main", "VLMo") <= run.metrics.keys()
    assert all(0 <= value <= 1 for value in run.metrics.values())
    assert run.metrics["R@1"] == pytest.approx(
        (run.metrics["R@1 text to image"] + run.metrics["R@1 image to text"]) / 2
    )
    assert type(run.model) is VLMo and run.model.config == TINY and run.model.answer_head is None
    h = run.history
    assert {name: len(values) for name, values in h.losses.items()} == {
        "itc": 4, "itc_vl": 4, "itm": 4, "mlm": 4, "image: mim": 2, "text: mlm": 2}  # fmt: skip
    assert h.began == {"image: mim": 0, "text: mlm": 0} and h.steps == FEW.steps
    stages = lesson.before_pairs(FEW, seed=0, device=CPU)
    assert h.losses["image: mim"] == stages[0].history.losses["mim"]
    assert h.losses["text: mlm"] == stages[1].history.losses["mlm"] != h.losses["mlm"][:2]
    assert set(stages[1].history.losses) == {"mlm"} and not stages[1].history.began  # what is remembered stays
    assert {"block 2, text at image", "val matching", "val colour"} <= run.metrics.keys() | h.metrics.keys()


def test_a_shorter_recipe_is_measured_with_less(small_tests, monkeypatch):
    tuned = []
    monkeypatch.setattr(lesson, "two_pictures", lambda *_, **__: tuned.append("two pictures"))
    monkeypatch.setattr(lesson, "statements_right", lambda _: 0.5)
    monkeypatch.setattr(lesson, "questions", lambda *_, blank, **__: tuned.append(blank) or blank)
    monkeypatch.setattr(lesson02, "answers_of", lambda model, *, blank: (model, blank))
    monkeypatch.setattr(lesson02, "answered_right", lambda found, q: {
        (False, False): {"all": 0.25}, (True, True): {"all": 0.125}}[found])  # fmt: skip # asked as it was tuned
    short = replace(FEW, everything=False, tune=0, before=())
    plain = lesson.run(short, seed=0, device=CPU)
    assert {"R@1", "R@1 image to text", "colour, true picture", "matching, random partners", "matching, hard partners",
            "replaced, ITM", "attribute_swap, ITM"} <= plain.metrics.keys()  # fmt: skip
    extra = {"colour, shuffled picture", "order_swap, ITM", "count, ITM", "zero-shot kind", "re-ranked", "VQA",
             "block 0, text at text", "two pictures", "VQA, question alone"}  # fmt: skip
    assert not extra & plain.metrics.keys() and tuned == [] and plain.history.began == {}
    alone = lesson.run(replace(short, itm=False, mlm=0.0, tune=2), seed=0, device=CPU)
    assert tuned == ["two pictures", False, True] and wanted("tuning", "500 steps") <= alone.metrics.keys()
    assert [alone.metrics[name] for name in ("two pictures", "VQA", "VQA, question alone")] == [0.5, 0.25, 0.125]
    assert not {"colour, true picture", "matching, random partners", "replaced, ITM"} & alone.metrics.keys()
    assert set(alone.history.losses) == {"itc", "itc_vl"} and set(alone.history.metrics) == {"val R@1"}


def test_what_is_watched_is_measured_on_validation_pages(model, monkeypatch):
    seen = []
    monkeypatch.setattr(lesson03, "retrieval", lambda _, split, n: seen.append((split, n)) or {
        "R@1 text to image": 0.5, "R@1 image to text": 0.25})  # fmt: skip
    monkeypatch.setattr(lesson, "preference", lambda _, split, n: seen.append((split, n)) or 0.75)
    monkeypatch.setattr(lesson02, "grounding", lambda _, split, n, pictures: seen.append((split, n)) or {
        "noun, true picture": 0.1, "colour, true picture": 0.2})  # fmt: skip
    expected = {"val R@1": 0.375, "val matching": 0.75, "val colour": 0.2}
    assert lesson.validation(FEW, n=30)(model) == expected and set(seen) == {("val", 30)}
    assert lesson.validation(replace(FEW, itm=False))(model).keys() == expected.keys() - {"val matching"}
    assert lesson.validation(replace(FEW, mlm=0.0))(model).keys() == expected.keys() - {"val colour"}


# --- clock and pages -------------------------------------------------------------------------------------------------


def test_both_ways_to_search_score_every_pair(model):
    images, texts = full()
    ways = lesson.ways_to_search(model, "fusion", (3, 5)) | lesson.ways_to_search(model, "dual", (7,))
    assert list(ways) == ["fusion, 3", "fusion, 5", "dual, 7"]
    for n in (3, 5):
        found = ways[f"fusion, {n}"]()
        assert found.shape == (n, n)
        close(found, lesson05.all_pairs(model, images[:n], texts[:n]))
    vectors = lesson03.image_vectors(model, images[:7]), lesson03.text_vectors(model, texts[:7])
    close(ways["dual, 7"](), vectors[0] @ vectors[1].T)
    sizes = {way: list(lesson.ways_to_search(model, way, lesson.GALLERIES[way])) for way in ("fusion", "dual")}
    assert sizes["dual"][-1] == "dual, 1000" and sizes["fusion"][-1] == "fusion, 64"


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[str, ...]], tuple[dict[str, float], list[list[str]]]]:
    """What the clock says of a main recipe with these stages, and what took turns: the k-th of them for 2 k seconds."""

    def clock(before: tuple[str, ...]) -> tuple[dict[str, float], list[list[str]]]:
        asked = []

        def turns(ways: dict[str, Callable], **_: object) -> dict[str, list[float]]:
            asked.append(list(ways))
            next(iter(ways.values()))()
            return {name: [2.0 * (k + 1), 2.0 * (k + 1), 99.0] for k, name in enumerate(ways)}

        monkeypatch.setattr(lesson, "take_turns", turns)
        monkeypatch.setattr(lesson, "CLOCK_STEPS", 2)
        monkeypatch.setattr(lesson, "MAIN", replace(FEW, before=before, image_steps=100, text_steps=10, steps=1))
        return lesson.clock(CPU), asked

    return clock


def test_a_clock_counts_single_steps_and_whole_searches(clocked):
    found, asked = clocked(("image", "text"))
    searches = [f"{way}, {n}" for way in ("fusion", "dual") for n in lesson.GALLERIES[way]]
    assert asked == [["image", "text", "pairs"], searches]
    steps = {f"ms, step, {name}": 1000 * value for name, value in (("image", 1), ("text", 2), ("pairs", 3))}
    assert found == pytest.approx(steps | {f"seconds, {name}": 2 * (k + 1) for k, name in enumerate(searches)} | {
        "training seconds": 100 * 1 + 10 * 2 + 1 * 3, "ms for 1,000 x 1,000 pairs": 2000 * len(searches)})  # fmt: skip
    assert {source for source in lesson.BOARD.values() if isinstance(source, str)} <= {*found, *lesson.facts()}


def test_training_seconds_are_those_of_the_stages_that_the_main_run_has(clocked):
    assert clocked(("labels", "text"))[0]["training seconds"] == pytest.approx(10 * 2 + 1 * 3)


def test_all_pictures_are_drawn_once_before_runs_go_side_by_side(monkeypatch):
    drawn = set()
    monkeypatch.setattr(lesson, "pairs", lambda split, n: drawn.add((split, n)))
    monkeypatch.setattr(lesson, "probe_pairs", lambda kind: drawn.add(kind))
    monkeypatch.setattr(lesson03, "single_things", lambda split, *, n, tier: drawn.add(("single", split, n, tier)))
    lesson.prepare()
    sizes = {("train", 20_000), ("train", 1_000)}
    for split, functions in {
        "val": (lesson.validation, lesson.picture_accuracy),
        "test": (lesson.preference, lesson.attention_of, lesson.statements_right, lesson03.retrieval,
                 lesson02.grounding, lesson02.answers_of),
    }.items():  # fmt: skip
        sizes |= {(split, inspect.signature(function).parameters["n"].default) for function in functions}
    assert sizes | {("test", 100), ("single", "test", 400, "normal"), *lesson.PROBES} <= drawn


def test_the_model_has_the_size_that_the_lesson_prints():
    with torch.device("meta"):
        assert count_parameters(VLMo(lesson.MAIN.model)) == lesson.facts()["parameters"] == 1_766_744
