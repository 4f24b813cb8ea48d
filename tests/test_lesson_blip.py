"""Lesson 07's recipes: pairs from two sources, the losses of a step, captioning and filtering, what is measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lesson_helpers import Oracle, changed, drawn_by_hand, few_pages, fewer, weights
from torch import Tensor, nn
from tower_helpers import close, shake, touched

from minivlp.data import Batches, PairTensors
from minivlp.data.picturebook.describe import ANSWERS, captions
from minivlp.data.picturebook.sample import sample
from minivlp.data.picturebook.understand import caption_facts
from minivlp.data.picturebook.web import WEB_NOISE, web_caption
from minivlp.evaluate import bleu
from minivlp.lessons import albef as lesson05
from minivlp.lessons import blip as lesson
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.lessons.vlmo import changed_tensors
from minivlp.models.albef import TEMPERATURES, MomentumALBEF
from minivlp.models.blip import BLIP, NOTHING_SHARED, BLIPConfig
from minivlp.train import History

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = {(experiment, arm): recipe for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()}
TINY = BLIPConfig(
    image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=2, text_heads=2, mlp_ratio=2, embed_dim=8,
)  # fmt: skip
FEW = lesson.Recipe(
    model=TINY, start="", text_steps=0, human=40, web=80, levels=(1, 4), alpha=0.4, ramp=0.5, momentum=0.9, queue=8,
    smoothing=0.1, steps=4, batch_size=4, captioner="nucleus", filter=True, tune=2, answer=2, everything=True,
)  # fmt: skip
PLAIN = replace(FEW, captioner="", filter=False, answer=0, everything=False)
FULL = 4  # the level of the full captions
CLS, SEP, ENC, DEC = 2, 3, 5, 6
LOSSES = {"itc", "itm", "lm"}


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cached = lesson._web_texts, lesson.sentences, lesson02.asked
    for function in cached:
        function.cache_clear()
    with few_pages(tmp_path_factory, lesson, lesson02, lesson03, lesson05):
        lesson.pairs("train", 400)  # all others are the first of these
        yield
    for function in cached:  # other tests have more pages
        function.cache_clear()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Every test has memories of its own for first words and first models, and captions end soon."""
    monkeypatch.setattr(lesson, "_WORDS", {})
    monkeypatch.setattr(lesson, "_KEPT", {})
    monkeypatch.setattr(lesson, "sentences", few_sentences)
    monkeypatch.setattr(lesson, "LONGEST", 8)
    return lesson._KEPT


all_sentences = lesson.sentences


def few_sentences() -> list[list[str]]:
    return all_sentences(n=60)


@pytest.fixture
def model() -> BLIP:
    return tiny()


def tiny(**changes: object) -> BLIP:
    """A small BLIP whose weights hide nothing."""
    torch.manual_seed(0)
    return shake(BLIP(replace(TINY, **changes)), 0.1, but="temp")


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Which weights of a model are not what they were, to the last bit."""
    return set(changed_tensors(before, model.state_dict()))


def corpus(recipe: lesson.Recipe = FEW) -> lesson.Corpus:
    return lesson.human_pairs(recipe) + lesson.web_pairs(recipe)


def full(n: int = 40, split: str = "test") -> tuple[Tensor, list[str]]:
    data = lesson.pairs(split, n)
    return data.images[:n], [told[FULL] for told in data.captions[:n]]


def thing(kind: str, colour: str = "red", size: str = "big") -> SimpleNamespace:
    return SimpleNamespace(kind=kind, colour=colour, size=size)


def scene(*things: SimpleNamespace, place: str = "beach", sky: str = "day", weather: str = "clear") -> SimpleNamespace:
    return SimpleNamespace(things=list(things), place=place, sky=sky, weather=weather, style="flat")


def by_hand(scenes: Sequence[object], told: Sequence[tuple[int, str, str, str]]) -> lesson.Corpus:
    """A corpus of (row, text, source, noise)."""
    rows, texts, source, noise = map(list, zip(*told, strict=True))
    pages = PairTensors(torch.arange(len(scenes))[:, None], [[] for _ in scenes], list(scenes))
    return lesson.Corpus(pages, torch.tensor(rows), texts, source, noise)


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_each_arm_changes_what_its_name_says_and_nothing_else():
    base, main, own = lesson.BASE, lesson.MAIN, "model.decoder_own"
    (other,) = {"nucleus sampling": "nucleus", "beam search": "beam"}.keys() & lesson.EXPERIMENTS["CapFilt, changed"]
    both = {"captioner": main.captioner, "filter": True}
    expected = {  # compared with BASE, pre-training on the data as they are
        ("CapFilt", "neither"): {},
        ("CapFilt", "filter"): {"filter": True},
        ("CapFilt", "captioner"): {"captioner": main.captioner},
        ("CapFilt", "both"): both,
        ("CapFilt, changed", other): both | {"captioner": other.split()[0]},
        ("CapFilt, changed", "one model for both"): both | {"apart": False},
        ("CapFilt, changed", "the old model goes on"): both | {"anew": False},
        ("CapFilt, changed", "longer, without CapFilt"): {"steps": 2 * base.steps},
        ("sharing", "everything"): {own: ()},
        ("sharing", "all but cross-attention"): {own: ("cross-attention",)},
        ("sharing", "nothing"): {own: NOTHING_SHARED},
        ("losses", "without ITC"): {"itc": False},
    }  # fmt: skip
    arms = dict(ARMS)
    assert (
        arms.pop(("main", "BLIP")) == main and {arm: changed(recipe, base) for arm, recipe in arms.items()} == expected
    )
    assert {main.captioner, other.split()[0]} == {"beam", "nucleus"}
    # The main run is both, for longer perhaps, and with more questions asked.
    assert both.items() < changed(main, base).items() and main.answer > 0 and main.everything
    assert changed(main, base).keys() - both <= {"steps", "answer", "everything"}
    assert base.itc and base.apart and base.anew and base.model.decoder_own == ("self-attention",)
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]


def test_captioner_and_filter_are_crossed_at_equal_steps():
    arms = lesson.EXPERIMENTS["CapFilt"].values()
    assert {(bool(r.captioner), r.filter) for r in arms} == {(a, b) for a in (False, True) for b in (False, True)}
    assert len({(r.steps, r.batch_size, r.lr, r.tune, r.tune_lr) for r in arms}) == 1


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=", ".join(arm)) for arm, recipe in ARMS.items()])
def test_every_arm_can_be_built_and_its_queue_and_batches_filled(recipe):
    with torch.device("meta"):
        kept = lesson.with_teacher(lesson.build(recipe.model), recipe)
    assert kept.student.config == recipe.model and kept.momentum == recipe.momentum
    assert kept.queue.shows.shape == (recipe.queue, 1) and not recipe.queue % recipe.batch_size
    assert lesson.BLIPBatches.group * recipe.batch_size <= recipe.human  # also when tuned
    assert recipe.captioner in ("", "nucleus", "beam") and recipe.start in lesson01.CHECKPOINTS
    assert recipe.model.text_width == recipe.model.image_width or not recipe.answer  # the decoder asks words, too


def test_a_start_from_lesson_01_takes_its_weights_into_student_and_teacher():
    recipe = replace(lesson.MAIN, text_steps=0)
    ours = lesson.with_teacher(lesson.begin(recipe), recipe)
    experiment, arm = lesson01.CHECKPOINTS[lesson.MAIN.start]
    vit = lesson.trained(lesson.MAIN.start, lesson01.ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
    for one in (ours.student, ours.teacher):
        assert torch.equal(one.vision.encoder.blocks[0].attn.q.weight, vit.encoder.blocks[0].attn.q.weight)
    random = lesson.begin(replace(recipe, start=""))
    assert not torch.equal(random.vision.encoder.blocks[0].attn.q.weight, vit.encoder.blocks[0].attn.q.weight)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_corpora_are_joined_and_chosen_from_pair_by_pair():
    scenes = [scene(), scene(), scene()]
    one = by_hand(scenes, [(2, "a", "human", "clean"), (0, "b", "web", "junk")])
    two = replace(by_hand(scenes, [(1, "c", "synthetic", "")]), pages=one.pages)
    both = one + two
    assert (len(one), len(two), len(both)) == (2, 1, 3) and both.pages is one.pages
    assert both.rows.tolist() == [2, 0, 1] and both.texts == ["a", "b", "c"]
    assert both.source == ["human", "web", "synthetic"] and both.noise == ["clean", "junk", ""]
    some = both.chosen(torch.tensor([True, False, True]))
    assert some.pages is one.pages and some.rows.tolist() == [2, 1] and some.texts == ["a", "c"]
    assert some.source == ["human", "synthetic"] and some.noise == ["clean", ""]
    assert len(both) == 3 and len(both.chosen(torch.zeros(3).bool())) == 0


def test_a_text_is_false_if_it_contradicts_its_own_picture_or_says_nothing():
    scenes = [scene(thing("cat", "red"), thing("ball", "blue")), scene(thing("dog"), thing("dog"), place="city")]
    told = {
        (0, "a red cat"): False, (1, "a red cat"): True, (0, "a blue cat"): True, (0, "a cat on the beach"): False,
        (0, "a cat in the city"): True, (1, "two dogs in the city"): False, (1, "three dogs"): True,
        (1, "a dog"): False, (0, "a red cat and a blue ball"): False, (0, "a red cat and a blue dog"): True,
        (0, "nice pic"): True, (0, "by day"): True, (0, "a cat at night"): True,
    }  # fmt: skip
    made = by_hand(scenes, [(row, text, "web", "") for row, text in told])
    assert made.false().dtype == torch.bool and made.false().tolist() == list(told.values())
    assert made.chosen(torch.tensor([1, 0] * 6 + [1]).bool()).false().tolist() == list(told.values())[::2]


def test_pages_by_hand_come_with_their_captions_and_pages_of_the_web_with_what_was_found():
    pages = lesson.pairs("train", 400)
    human, web, tuning = lesson.human_pairs(FEW), lesson.web_pairs(FEW), lesson.human_pairs(FEW, all_levels=True)
    for made in (human, web, tuning):
        assert len(made.pages) == 120 and torch.equal(made.pages.images, pages.images[:120])
    assert human.rows.tolist() == list(range(40)) and web.rows.tolist() == list(range(40, 120))  # no page twice
    assert human.texts == [pages.captions[row][FEW.levels[row % 2]] for row in range(40)]
    said = list(zip(tuning.rows.tolist(), tuning.texts, strict=True))
    assert sorted(said) == sorted((row, pages.captions[row][level]) for row in range(40) for level in FEW.levels)
    for made, source in ((human, "human"), (tuning, "human"), (web, "web")):
        assert made.source == [source] * len(made) and (source == "web" or made.noise == ["clean"] * len(made))
    for row, text, noise in zip(web.rows.tolist(), web.texts, web.noise, strict=True):
        assert (text, noise) == web_caption(pages.scenes[row], pages.scenes[row + 1])
    three = lesson.human_pairs(replace(FEW, levels=(2, 0, 3)))
    assert three.texts == [pages.captions[row][(2, 0, 3)[row % 3]] for row in range(40)]


def test_nearly_half_of_the_web_is_wrong_or_empty_and_nothing_by_hand_is():
    recipe = replace(FEW, human=100, web=300)
    human, web = lesson.human_pairs(recipe), lesson.web_pairs(recipe)
    noisy = torch.tensor([noise != "clean" for noise in web.noise])
    assert noisy.float().mean().item() == pytest.approx(1 - WEB_NOISE["clean"], abs=0.06)
    assert torch.equal(web.false(), noisy) and not human.false().any()  # what is planted is what can be seen


def test_training_reads_training_pages_alone(monkeypatch, model):
    asked = []
    real = lesson.pairs
    monkeypatch.setattr(lesson, "pairs", lambda split, n: asked.append(split) or real(split, n))
    monkeypatch.setattr(lesson, "validation", lambda _: lambda _: {})
    made = lesson.capfilt(model, FEW, seed=0)
    lesson.second_model(model, FEW, made, seed=0, device=CPU, progress=None)
    assert set(asked) == {"train"} and set(made.data.source) >= {"human"}
    held_out = {image.numpy().tobytes() for split in ("test", "val") for image in real(split, 40).images}
    trained = {image.numpy().tobytes() for image in made.candidates.pages.images}
    assert len(trained) == 120 and not held_out & trained


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_depend_on_seed_and_step_alone():
    data = corpus()
    one, two = (lesson.BLIPBatches(data, FEW, seed=3) for _ in range(2))
    for step in (5, 0, 9, 2):
        torch.manual_seed(step)
        assert all(torch.equal(a, b) for a, b in zip(one(step), two(step), strict=True))
    for other in (one(3), lesson.BLIPBatches(data, FEW, seed=4)(2)):
        assert not torch.equal(one(2)[0], other[0]) and not torch.equal(one(2)[4], other[4])
    # Everything random is the step's, not only the rows: the same pairs come again an epoch later.
    epoch = 4 * one.order.steps_per_epoch
    assert not torch.equal(one(1)[4], one(1 + epoch)[4]) and not torch.equal(one.chosen(1), one.chosen(1 + epoch))


def test_four_batches_are_one_draw_cut_by_length_in_any_order():
    data = corpus()
    batches = lesson.BLIPBatches(data, FEW, seed=0)
    plain = Batches((torch.arange(len(data)),), batch_size=16, seed=0)
    places, epoch = set(), []
    for group in range(plain.steps_per_epoch):
        drawn, parts = plain.indices(group), [batches.chosen(4 * group + place) for place in range(4)]
        assert all(part.shape == (4,) for part in parts)
        assert sorted(torch.cat(parts).tolist()) == sorted(drawn.tolist())
        sizes = [[len(lesson.words().encode(data.texts[i])) for i in part.tolist()] for part in parts]
        ordered = sorted(sizes)
        assert all(max(a) <= min(b) for a, b in pairwise(ordered))
        places.add(tuple(sizes.index(part) for part in ordered))
        epoch += drawn.tolist()
    assert len(places) > 4 and len(epoch) == len(set(epoch))  # short texts do not always come first


def test_little_is_spent_on_padding():
    data = corpus()
    batches, waste = lesson.BLIPBatches(data, FEW, seed=0), {"cut by length": [], "as drawn": []}
    plain = Batches((torch.arange(len(data)),), batch_size=FEW.batch_size, seed=0)
    for step in range(32):
        for name, mask in (("cut by length", batches(step)[2]), ("as drawn", batches.table(plain.indices(step), 0)[1])):
            waste[name].append((~mask).sum().item())
    assert 0 < 2 * sum(waste["cut by length"]) < sum(waste["as drawn"])


def test_a_batch_has_all_that_a_step_needs():
    few = lesson.human_pairs(replace(FEW, human=20))
    data, twins = few + replace(few, rows=few.rows.roll(1)), 0  # every text twice, of two pages
    batches = lesson.BLIPBatches(data, FEW, seed=1)
    for step in range(20):
        images, ids, mask, says, noise, alpha = batches(step)
        chosen = batches.chosen(step).tolist()
        assert images.dtype == torch.uint8 and torch.equal(images, data.pages.images[data.rows[chosen]])
        for k, i in enumerate(chosen):
            assert ids[k][mask[k]].tolist() == lesson.words().encode(data.texts[i])
        assert torch.equal(mask, ids != 0) and mask.any(0).all()
        same = [[data.texts[i] == data.texts[j] for j in chosen] for i in chosen]
        assert (says[:, None] == says).tolist() == same and (says >= 0).all()
        twins += sum(map(sum, same)) - 4
        assert noise.shape == (2, 4) and noise.min() >= 0 and noise.max() < 1 and not torch.equal(*noise)
        assert alpha.shape == () and alpha.dtype == torch.float32
    assert twins > 0 and len(batches.says.unique()) == len(set(data.texts)) < len(data)


def test_the_teachers_share_grows_over_the_steps_of_this_training(monkeypatch):
    batches = lesson.BLIPBatches(corpus(), replace(FEW, steps=20), seed=0)
    assert [batches(step)[-1].item() for step in (0, 5, 10, 19)] == pytest.approx([0, 0.2, 0.4, 0.4])
    seen = []
    monkeypatch.setattr(lesson, "fit", lambda model, batches, *_, **__: seen.append(batches) or History())
    lesson.fit_on(corpus(), tiny(), replace(FEW, steps=20), seed=0, steps=8, lr=0.1, progress=None)
    assert [seen[0](step)[-1].item() for step in (2, 4)] == pytest.approx([0.2, 0.4])


# --- the losses of a step --------------------------------------------------------------------------------------------


@pytest.fixture
def kept() -> MomentumALBEF:
    """A student, a teacher that has drifted from it, and a queue with some vectors in it."""
    torch.manual_seed(0)
    kept = lesson.with_teacher(tiny(temperature=0.3), replace(FEW, queue=6))
    shake(kept.teacher, 0.1)
    kept.queue.says.copy_(torch.arange(1_000, 1_006))
    kept.queue.shows.copy_(kept.queue.says[:, None])
    return kept.train()


@pytest.fixture(scope="module")
def drawn(few: None) -> tuple[Tensor, ...]:
    """A batch of three pairs of different lengths, all of which say something else."""
    batches = lesson.BLIPBatches(corpus(), replace(FEW, batch_size=3), seed=0)
    step = next(step for step in range(99) if len(set(batches(step)[2].sum(1).tolist())) == 3)
    images, ids, mask, _, noise, _ = batches(step)
    return images, ids, mask, torch.tensor([7, 8, 9]), noise, torch.tensor(0.4)


@pytest.fixture
def batch(drawn: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone() for t in drawn]


def loss_of(model: MomentumALBEF, batch: Sequence[Tensor], **how: object) -> dict[str, float]:
    """The losses of a copy, so that the next call finds everything as it was."""
    return {name: loss.item() for name, loss in lesson.blip_loss(deepcopy(model), *batch, **how).items()}


def followed(model: MomentumALBEF) -> MomentumALBEF:
    """A copy whose teacher has moved by the formula."""
    model = deepcopy(model)
    student = dict(model.student.named_parameters())
    with torch.no_grad():
        for name, weight in model.teacher.named_parameters():
            weight.copy_(model.momentum * weight + (1 - model.momentum) * student[name])
    return model


def vectors(model: MomentumALBEF, images: Tensor, ids: Tensor) -> list[list[np.ndarray]]:
    """Of student and teacher, the vectors of pictures and texts."""
    with torch.no_grad():
        return [[v.double().numpy() for v in (one.encode_image(images), one.encode_text(ids))]
                for one in (model.student, model.teacher)]  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def itc_by_hand(model: MomentumALBEF, images: Tensor, ids: Tensor, says: Tensor, alpha: float) -> float:
    """Query by query over the keys that take part; `model` has a teacher that has followed."""
    student, teacher = vectors(model, images, ids)
    queue, temp = [model.queue.image.double().numpy(), model.queue.text.double().numpy()], model.student.temp.item()
    number, total = [*says.tolist(), *model.queue.says.tolist()], 0.0
    for own, other in ((0, 1), (1, 0)):
        keys = np.concatenate([teacher[other], queue[other]])
        for i in range(len(says)):
            there = [j for j in range(len(keys)) if j == i or number[j] != number[i]]
            target = alpha * np.exp(log_softmax(keys[there] @ teacher[own][i] / temp))
            target[there.index(i)] += 1 - alpha
            total -= target @ log_softmax(keys[there] @ student[own][i] / temp)
    return total / (2 * len(says))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_mixes_the_teachers_opinion_with_the_truth_among_batch_and_queue(kept, batch, alpha):
    batch[-1] = torch.tensor(alpha)
    images, ids, _, says, *_ = batch
    says[1] = says[0]  # pages 0 and 1 say the same, and so does one of an earlier step
    kept.queue.says[4] = kept.queue.shows[4] = says[2]
    twin = followed(kept)
    expected = itc_by_hand(twin, images, ids, says, alpha)
    assert loss_of(kept, batch)["itc"] == pytest.approx(expected, abs=1e-5)
    # Each part matters, or this test would see nothing.
    other = deepcopy(twin)
    other.queue.says.fill_(1_000)
    mistakes = {"twins": itc_by_hand(twin, images, ids, torch.arange(3), alpha),
                "queue's twins": itc_by_hand(other, images, ids, says, alpha)}  # fmt: skip
    if alpha:
        mistakes["teacher"] = itc_by_hand(kept, images, ids, says, alpha)
    assert all(abs(wrong - expected) > 1e-4 for wrong in mistakes.values()), (expected, mistakes)


def test_the_teacher_follows_by_the_formula_and_the_queue_gets_its_vectors(kept, batch):
    images, ids, _, says, *_ = batch
    twin, before = followed(kept), weights(kept.teacher)
    old = kept.queue.image.clone(), kept.queue.text.clone()
    lesson.blip_loss(kept, *batch)
    for (name, weight), (_, expected) in zip(kept.teacher.named_parameters(), twin.teacher.named_parameters(),
                                             strict=True):  # fmt: skip
        close(weight, expected, 1e-6)
        assert not torch.equal(weight, before[name]), name
    _, teacher = vectors(twin, images, ids)
    for ring, new, held in zip((kept.queue.image, kept.queue.text), teacher, old, strict=True):
        close(ring[:3].double(), torch.from_numpy(new))
        assert torch.equal(ring[3:], held[3:])
    assert kept.queue.says.tolist() == [*says.tolist(), 1003, 1004, 1005] == kept.queue.shows[:, 0].tolist()


def test_itm_asks_for_one_true_pair_and_two_wrong_ones_each(kept, batch):
    images, ids, mask, says, noise, _ = batch
    says[1] = says[0]  # so page 2 is the only wrong partner of pages 0 and 1, and its own are theirs
    noise[:, 2] = torch.tensor([0.0, 1.0])  # the first wrong text... and the last wrong picture there is
    asked = [(0, 0), (1, 1), (2, 2), (2, 0), (2, 1), (0, 2), (0, 2), (1, 2), (2, 1)]  # (picture, text)
    student, total = kept.student, 0.0
    with torch.no_grad():
        for k, (picture, text) in enumerate(asked):
            words = ids[text][mask[text]][None]
            assert words[0, 0] == CLS
            led = torch.cat([torch.tensor([[ENC]]), words[:, 1:]], dim=1)
            states, _ = student.text.ground(student.text.embed(led), torch.ones_like(led).bool(),
                                            student.look(images[picture][None]))  # fmt: skip
            total -= student.itm_head(states[0, 0]).log_softmax(0)[int(k < 3)].item()
    assert loss_of(kept, batch)["itm"] == pytest.approx(total / 9, abs=1e-5)


def partners_of(kept: MomentumALBEF, batch: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, **how: object):
    """The wrong pictures and texts that a step asks ITM about."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(lesson05, "itm_loss", lambda *args: seen.append(args[-2:]) or torch.zeros(()))
        lesson.blip_loss(deepcopy(kept), *batch, lm=False, **how)
    return [part.tolist() for part in seen[0]]


@pytest.mark.parametrize("itc", [True, False])
def test_wrong_partners_are_drawn_by_similarity_or_without_itc_evenly(kept, monkeypatch, itc):
    batches = lesson.BLIPBatches(corpus(), replace(FEW, batch_size=6), seed=0)
    images, ids, mask, *_ = batches(2)
    says = torch.tensor([1, 2, 1, 3, 4, 5])
    student, teacher = vectors(followed(kept), images, ids)
    counted = set()
    for k in range(12):
        noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(k))
        other_image, other_text = partners_of(
            kept, (images, ids, mask, says, noise, torch.tensor(0.4)), monkeypatch, itc=itc
        )
        for found, own, other, row in ((other_image, 1, 0, noise[0]), (other_text, 0, 1, noise[1])):
            similarity = student[own] @ teacher[other].T / kept.student.temp.item()
            chance = np.exp(np.stack([log_softmax(line) for line in similarity])) + 1e-4 if itc else np.ones((6, 6))
            assert found == drawn_by_hand(chance, says.tolist(), row.tolist())
            assert all(says[j] != says[i] for i, j in enumerate(found))
            counted |= set(enumerate(found))
    assert len(counted) > 18  # and not always the same ones


def test_lm_learns_each_next_word_and_the_end_from_dec_on(kept, batch):
    images, ids, mask, *_ = batch
    student, costs = kept.student, []
    with torch.no_grad():
        for b in range(3):
            words = ids[b][mask[b]].tolist()  # alone, so that nothing is padded
            assert words[0] == CLS and words[-1] == SEP
            image = student.look(images[b][None])
            for t in range(1, len(words)):
                states, _ = student.text.decode(torch.tensor([[DEC, *words[1:t]]]), image)
                log_p = student.lm_head(states[0, -1]).log_softmax(0)
                costs.append((-log_p[words[t]].item(), -log_p.mean().item()))
    right, any_ = np.mean(costs, axis=0)
    assert len(costs) == mask.sum() - 3 and abs(right - any_) > 5e-4
    for smoothing in (0.5, 0.1, 0.0):
        expected = (1 - smoothing) * right + smoothing * any_
        assert loss_of(kept, batch, smoothing=smoothing)["lm"] == pytest.approx(expected, abs=1e-5)


def test_padding_changes_no_loss(kept, batch):
    images, ids, mask, *rest = batch
    longer = [torch.cat([t, t.new_zeros(3, 4)], dim=1) for t in (ids, mask)]
    assert loss_of(kept, (images, *longer, *rest)) == pytest.approx(loss_of(kept, batch), abs=1e-5)


SWITCHES = [{}, {"itc": False}, {"itm": False}, {"lm": False}, {"itc": False, "itm": False}]


@pytest.mark.parametrize("off", SWITCHES)
def test_pictures_are_seen_once_and_the_teacher_is_asked_for_itc_alone(kept, batch, off):
    seen = {"student": 0, "teacher": 0}
    for name in seen:
        getattr(kept, name).vision.register_forward_hook(lambda *_, name=name: seen.update({name: seen[name] + 1}))
    before, queue = weights(kept.teacher), weights(kept.queue)
    with torch.no_grad():
        kept.student.temp.fill_(3.0)
    losses = lesson.blip_loss(kept, *batch, **off)
    itc = "itc" not in off
    assert losses.keys() == LOSSES - off.keys() and all(loss.ndim == 0 for loss in losses.values())
    assert seen == {"student": 1, "teacher": int(itc)}
    assert bool(moved(kept.teacher, before)) == bool(moved(kept.queue, queue)) == itc
    assert kept.student.temp.item() == pytest.approx(TEMPERATURES[1] if itc else 3.0)


def test_switching_one_loss_off_leaves_the_others(kept, batch):
    everything = loss_of(kept, batch)
    for name in ("itm", "lm"):
        assert loss_of(kept, batch, **{name: False}) == {n: v for n, v in everything.items() if n != name}
    without = loss_of(kept, batch, itc=False)
    assert without.keys() == {"itm", "lm"} and without["lm"] == everything["lm"]


HEADS = {"vision_proj.": "itc", "text_proj.": "itc", "temp": "itc", "itm_head.": "itm", "lm_head.dense": "lm",
         "lm_head.norm": "lm", "text.decoder.0.attn.": "lm", "text.decoder.0.norm1.": "lm"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_teaches_its_own_part_of_the_student_and_never_the_teacher(kept, batch, name):
    kept.teacher.requires_grad_(True)  # it must not even be asked
    lesson.blip_loss(kept, *batch)[name].backward()
    assert all(p.grad is None for p in kept.teacher.parameters())
    pulled = {n for n, p in kept.student.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    for head, own in HEADS.items():
        found = {n for n in dict(kept.student.named_parameters()) if n.startswith(head)}
        assert found and (bool(found & pulled) == (own == name)), head
    shared = {"vision.encoder.blocks.0.attn.q.weight": LOSSES, "text.embed.word.weight": LOSSES,
              "text.encoder.0.mlp.fc1.weight": LOSSES, "text.encoder.0.attn.q.weight": {"itc", "itm"},
              "text.encoder.0.cross.attn.q.weight": {"itm", "lm"}}  # fmt: skip
    for part, of in shared.items():
        assert (part in pulled) == (name in of), part


def test_each_loss_reads_its_own_part_of_a_batch(kept, batch):
    """The teacher's share and its queue touch ITC alone: neither ITM nor LM is distilled."""
    names = "images ids mask says noise alpha".split()
    images, ids, mask, _, noise, _ = batch
    other = {"images": 255 - images, "ids": torch.where(mask, 50, ids), "says": torch.tensor([7, 7, 9]),
             "noise": 1 - noise, "alpha": torch.tensor(0.9)}  # fmt: skip
    expected = {"images": LOSSES, "ids": LOSSES, "says": {"itc", "itm"}, "noise": {"itm"}, "alpha": {"itc"}}
    before = loss_of(kept, batch)
    for name, value in other.items():
        after = loss_of(kept, [value if n == name else t for n, t in zip(names, batch, strict=True)])
        assert {n for n, v in after.items() if abs(v - before[n]) > 1e-6} == expected[name], name
    kept.queue.image.copy_(kept.queue.image.flip(1))
    after = loss_of(kept, batch)
    assert {n for n, v in after.items() if abs(v - before[n]) > 1e-6} == {"itc"}


# --- training --------------------------------------------------------------------------------------------------------


class Fitted(list):
    """In the place of `fit`: nothing is trained, but listed, and the first word says how many came before.
    `stop_next` ends the next one as if by hand."""

    stop_next = False

    def __call__(self, model: nn.Module, batches: Callable, loss: Callable, **how: object) -> History:
        student = getattr(model, "student", model)
        queue = model.queue.image.clone() if student is not model else None
        self.append(SimpleNamespace(
            model=student, start=weights(student), queue=queue, batches=batches, loss=loss, **how
        ))  # fmt: skip
        with torch.no_grad():
            student.text.embed.word.weight[0] = len(self)
        stopped, self.stop_next = self.stop_next, False
        return History(stopped="by hand" if stopped else "")


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Fitted:
    calls = Fitted()
    monkeypatch.setattr(lesson, "fit", calls)
    return calls


def test_a_training_gets_the_recipes_numbers_and_the_losses_asked_for(fitted, model):
    recipe = replace(FEW, weight_decay=0.3, warmup=0.2, smoothing=0.25, batch_size=8)
    data = corpus(recipe)
    lesson.fit_on(data, model, recipe, seed=5, steps=9, lr=0.01, progress="BLIP", times=2, lm=False)
    lesson.fit_on(data, model, recipe, seed=5, steps=9, lr=0.01, progress=None)
    one, plain = fitted
    assert one.model is model and one.batches.seed == 5 and len(one.batches.rows) == len(data)
    assert (one.steps, one.lr, one.weight_decay, one.warmup, one.progress) == (9, 0.01, 0.3, 0.2, "BLIP")
    assert one.loss.func is lesson.blip_loss and one.loss.keywords == {"lm": False, "smoothing": 0.25}
    assert one.evaluate_every == 4 and not hasattr(plain, "evaluate") and plain.loss.keywords == {"smoothing": 0.25}
    assert one.batches.order.batch_size == 4 * 8 and one.batches.recipe == replace(recipe, steps=9)
    assert len(one.queue) == recipe.queue


def test_training_keeps_the_temperature_sane_and_all_parts_move(monkeypatch):
    monkeypatch.setattr(lesson, "validation", lambda recipe: lambda model: {"seen": model.student.temp.item()})
    recipe = replace(PLAIN, lr=0.01)
    first, history = lesson.pretrain(corpus(), recipe, seed=0, device=CPU, progress=None)
    assert history.losses.keys() == LOSSES and history.steps == 4 and history.metric_steps == [2, 4]
    assert moved(first, weights(lesson.begin(recipe, seed=0))) >= {
        "text.decoder.0.attn.q.weight",
        "itm_head.weight",
        "temp",
    }
    again, _ = lesson.pretrain(corpus(), recipe, seed=0, device=CPU, progress=None)
    other, _ = lesson.pretrain(corpus(), recipe, seed=1, device=CPU, progress=None)
    assert not moved(again, weights(first)) and moved(other, weights(first))
    monkeypatch.setattr(lesson, "fit", lambda model, *_, **__: model.student.temp.data.fill_(9.0) and History())
    wild = tiny()
    lesson.fit_on(corpus(), wild, recipe, seed=0, steps=1, lr=1.0, progress=None)
    assert wild.temp.item() == pytest.approx(TEMPERATURES[1])


@pytest.mark.parametrize("how", ["captioner", "filter"])
def test_tuning_is_of_a_copy_on_the_pages_by_hand_with_the_losses_of_its_task(fitted, model, how):
    before = weights(model)
    tune = {"captioner": lesson.captioner_of, "filter": lesson.filter_of}[how]
    tuned = tune(model, replace(FEW, tune=7, tune_lr=0.3), seed=2)
    (one,) = fitted
    assert one.model is tuned is not model and not moved(model, before)
    assert changed_tensors(one.start, before) == []  # it goes on from there
    flags = {"captioner": {"itc": False, "itm": False, "smoothing": 0.0}, "filter": {"lm": False, "smoothing": 0.1}}
    assert one.loss.keywords == flags[how] and (one.steps, one.lr, one.batches.seed) == (7, 0.3, 2)
    human = lesson.human_pairs(FEW, all_levels=True)
    assert torch.equal(one.batches.rows, human.rows) and torch.equal(one.batches.table.ids, lesson.BLIPBatches(
        human, FEW, seed=0).table.ids)  # fmt: skip


# --- words without pictures ------------------------------------------------------------------------------------------

WORDS = replace(FEW, text_steps=3, text_lr=0.01)


def test_first_words_are_of_pages_that_nobody_has_drawn():
    scenes, texts = lesson.pairs("train", 400).scenes, few_sentences()
    largest = max(recipe.human + recipe.web for recipe in ARMS.values())
    first = inspect.signature(all_sentences.__wrapped__).parameters["first"].default
    assert len(texts) == 60 and first >= max(largest, 20_000) and scenes[0].index == 0
    assert texts[7] == captions(sample(first + 7, split="train", tier="normal", seed=0))
    for split in ("train", "val", "test"):
        drawn = {text for of_page in lesson.pairs(split, 40).captions for text in of_page[FULL:]}
        assert not drawn & {of_page[FULL] for of_page in texts}


def test_a_batch_of_words_depends_on_seed_and_step_and_has_captions_of_one_level():
    one, two, other = (lesson.TextBatches(FEW, seed=seed) for seed in (3, 3, 4))
    told, levels = few_sentences(), {3: [], 4: []}
    for batches, step in ((batches, step) for batches in (one, other) for step in (9, *range(24))):
        torch.manual_seed(step)
        ids, mask = batches(step)
        assert len(ids) == FEW.batch_size and torch.equal(mask, ids != 0) and mask.any(0).all()
        if batches is one:
            assert all(torch.equal(a, b) for a, b in zip((ids, mask), two(step), strict=True))
        read = {tuple(row[there].tolist()) for row, there in zip(ids, mask, strict=True)}
        of = [{tuple(lesson.words().encode(told[i][level])) for i in batches.order.indices(step).tolist()}
              for level in range(5)]  # fmt: skip
        assert read in of
        levels[batches.seed].append(of.index(read))
    assert set(levels[3]) == set(levels[4]) == {1, 2, 3, 4} and levels[3] != levels[4]
    assert not torch.equal(one.order.indices(0), other.order.indices(0))


def test_words_alone_are_learned_without_eyes(model):
    ids, mask = lesson.TextBatches(FEW, seed=0)(1)
    costs = []
    for row, there in zip(ids, mask, strict=True):
        told = row[there].tolist()
        with torch.no_grad():
            states, _ = model.text.decode(torch.tensor([[DEC, *told[1:-1]]]), None)
            log_p = model.lm_head(states[0]).log_softmax(-1)
        costs += [(0.9 * -log_p[t, token] - 0.1 * log_p[t].mean()).item() for t, token in enumerate(told[1:])]
    loss = lesson.words_loss(model, ids, mask)
    assert loss.item() == pytest.approx(sum(costs) / len(costs), abs=1e-5)
    loss.backward()
    pulled = touched(model)
    assert {"text.encoder.0.mlp.fc1.weight", "text.decoder.1.attn.q.weight", "lm_head.dense.weight"} <= pulled
    assert not [name for name in pulled if "cross" in name or name.startswith(("vision", "itm", "text_proj", "temp"))]


@pytest.mark.parametrize("own", [("self-attention",), NOTHING_SHARED], ids=["default", "nothing shared"])
def test_encoder_and_decoder_begin_with_the_same_words_and_pictures_are_left_alone(own):
    recipe = replace(WORDS, model=replace(TINY, decoder_own=own))
    bare, told = lesson.begin(replace(recipe, text_steps=0), seed=1), lesson.begin(recipe, seed=1)
    found = moved(told, weights(bare))
    assert not [name for name in found if not name.startswith(("text.", "lm_head."))]
    assert {"text.encoder.0.attn.q.weight", "text.decoder.1.attn.q.weight", "lm_head.dense.weight"} <= found
    of = told.text.state_dict()
    assert all(torch.equal(value, of[name.replace("decoder_embed", "embed").replace("decoder", "encoder")])
               for name, value in of.items())  # fmt: skip
    assert told.lm_head.decoder.weight is told.text.decoder_embed.word.weight


def test_first_words_are_the_same_whether_they_are_remembered_or_not(monkeypatch):
    model, fits = lesson.begin(WORDS, seed=0), []
    first = weights(model)
    real = lesson.fit
    monkeypatch.setattr(lesson, "fit", lambda *args, **how: fits.append(how) or real(*args, **how))
    again = lesson.begin(WORDS, seed=0)
    assert not fits and not moved(again, first)
    with torch.no_grad():
        for parameter in (*model.parameters(), *again.parameters()):
            parameter.zero_()  # what is remembered is nobody's
    assert not moved(lesson.begin(WORDS, seed=0), first) and not fits
    assert moved(lesson.begin(WORDS, seed=1), first) and len(fits) == 1
    lesson._WORDS.clear()
    assert not moved(lesson.begin(WORDS, seed=0), first) and len(fits) == 2


def test_first_words_are_remembered_by_all_that_they_depend_on(fitted):
    lesson.begin(WORDS, seed=0)
    (one,) = fitted
    assert type(one.batches) is lesson.TextBatches and one.batches.seed == 0 and one.loss is lesson.words_loss
    assert (one.steps, one.lr, one.weight_decay, one.progress) == (3, 0.01, WORDS.weight_decay, None)
    others = {"human": 30, "steps": 9, "lr": 1.0, "itc": False, "captioner": "beam", "tune": 1, "queue": 4}
    for name, value in others.items():
        lesson.begin(replace(WORDS, **{name: value}), seed=0)
    assert len(fitted) == 1
    early = {"model": replace(TINY, decoder_own=()), "text_steps": 4, "text_lr": 0.1, "batch_size": 2,
             "weight_decay": 0.9}  # fmt: skip
    for name, value in early.items():
        before = len(fitted)
        lesson.begin(replace(WORDS, **{name: value}), seed=0)
        assert len(fitted) == before + 1, name


def test_first_words_that_were_stopped_are_none(fitted):
    for progress in (None, "BLIP"):
        fitted.stop_next = True
        with pytest.raises(KeyboardInterrupt):
            lesson.begin(WORDS, seed=0, progress=progress)
    assert not lesson._WORDS and [one.progress for one in fitted] == [None, "BLIP, words alone"]


# --- CapFilt ---------------------------------------------------------------------------------------------------------


def lm_names(model: BLIP) -> set[str]:
    """What LM alone teaches, ITC and ITM never."""
    return {n for n in model.state_dict() if n.startswith(("text.decoder.", "lm_head."))
            and not any(part in n for part in (".cross.", ".mlp.", ".norm2.", "decoder.weight"))}  # fmt: skip


def test_captioner_and_filter_are_two_models_of_one_checkpoint(model):
    before = weights(model)
    made = lesson.capfilt(model, FEW, seed=0)
    captioner, judge = made.captioner, made.filter
    assert len({id(one) for one in (model, captioner, judge)}) == 3 and not moved(model, before)
    match = {n for n in before if n.startswith(("itm_head.", "vision_proj.", "text_proj."))}
    lm = lm_names(model)
    # To the last bit: what a task does not ask for is still the checkpoint's.
    assert lm <= moved(captioner, before) and not match & moved(captioner, before)
    assert match <= moved(judge, before) and not lm & moved(judge, before)
    assert len(lm) > 10 and len(match) == 6
    one = lesson.capfilt(model, replace(FEW, apart=False), seed=0)
    assert one.captioner is one.filter is not model and lm | match <= moved(one.filter, before)
    assert not moved(model, before)


def judging(values: Sequence[float] | None, seen: list) -> Callable:
    """In the place of `judged`: the odds are `values`, again and again."""

    def judge(model: BLIP, candidates: lesson.Corpus) -> Tensor:
        seen.append((model, candidates))
        return torch.tensor([values[i % len(values)] for i in range(len(candidates))])

    return judge


def test_what_the_filter_finds_more_likely_than_not_is_kept(fitted, monkeypatch, model):
    seen = []
    values = [2.0, -1.0, 0.0, 1e-6, -1e-6]
    monkeypatch.setattr(lesson, "judged", judging(values, seen))
    monkeypatch.setattr(lesson, "write", lambda _, images, *__, **___: [f"text {i}" for i in range(len(images))])
    made = lesson.capfilt(model, FEW, seed=0)
    ((judge, candidates),) = seen
    assert judge is made.filter and candidates is made.candidates
    assert candidates.source == ["web"] * 80 + ["synthetic"] * 80 and "human" not in candidates.source
    kept = [values[i % 5] > 0 for i in range(160)]
    assert made.kept.tolist() == kept and made.odds.tolist() == pytest.approx([values[i % 5] for i in range(160)])
    human, passed = lesson.human_pairs(FEW), candidates.chosen(torch.tensor(kept))
    expected = human + passed
    assert made.data.texts == expected.texts and torch.equal(made.data.rows, expected.rows)
    assert made.data.source == ["human"] * 40 + ["web"] * 32 + ["synthetic"] * 32


def test_the_pairs_by_hand_are_never_filtered(fitted, monkeypatch, model):
    monkeypatch.setattr(lesson, "judged", judging([-9.0], []))
    made = lesson.capfilt(model, replace(FEW, captioner=""), seed=0)
    human = lesson.human_pairs(FEW)
    assert not made.kept.any() and made.data.texts == human.texts and torch.equal(made.data.rows, human.rows)


def test_the_captioner_writes_about_the_pages_of_the_web_alone(fitted, monkeypatch, model):
    seen = []

    def write(*args: object, seed: int) -> list[str]:
        seen.append((*args, seed))
        return ["" if i == 3 else f"text {i}" for i in range(len(args[1]))]

    monkeypatch.setattr(lesson, "write", write)
    made = lesson.capfilt(model, replace(FEW, filter=False, captioner="beam"), seed=6)
    ((captioner, images, how, seed),) = seen
    assert captioner is made.captioner and (how, seed) == ("beam", 6)
    assert torch.equal(images, lesson.pairs("train", 400).images[40:120])
    synthetic = made.candidates.chosen(torch.tensor([s == "synthetic" for s in made.candidates.source]))
    assert synthetic.rows.tolist() == [row for row in range(40, 120) if row != 43]  # nothing said, nothing learned
    assert synthetic.texts == [f"text {row - 40}" for row in synthetic.rows.tolist()] and set(synthetic.noise) == {""}
    assert made.filter is None and made.kept.all() and len(made.data) == 40 + 80 + 79


@pytest.mark.parametrize(("arm", "tuned"), [("captioner", ["lm"]), ("filter", ["itc itm"]),
                                            ("both", ["lm", "itc itm"]), ("one", ["itc itm lm"])])  # fmt: skip
def test_only_what_is_asked_for_is_tuned(fitted, monkeypatch, model, arm, tuned):
    monkeypatch.setattr(lesson, "judged", judging([1.0], []))
    monkeypatch.setattr(lesson, "write", lambda _, images, *__, **___: ["a cat"] * len(images))
    recipe = {"captioner": replace(FEW, filter=False), "filter": replace(FEW, captioner=""), "both": FEW,
              "one": replace(FEW, apart=False)}[arm]  # fmt: skip
    made = lesson.capfilt(model, recipe, seed=0)
    assert [" ".join(sorted(n for n in LOSSES if one.loss.keywords.get(n, True))) for one in fitted] == tuned
    assert (made.captioner is not None, made.filter is not None) == (bool(recipe.captioner), recipe.filter)
    sources = {"filter": {"web"}}.get(arm, {"web", "synthetic"})
    assert set(made.candidates.source) == sources and set(made.data.source) == sources | {"human"}


def test_one_model_for_both_learns_as_two_do(fitted, monkeypatch, model):
    """Nothing but the number of models differs: both write without smoothing, both judge by ITC and ITM."""
    monkeypatch.setattr(lesson, "judged", judging([1.0], []))
    monkeypatch.setattr(lesson, "write", lambda _, images, *__, **___: ["a cat"] * len(images))
    for recipe in (FEW, replace(FEW, apart=False)):
        lesson.capfilt(model, recipe, seed=0)
    captioner, _, both = fitted
    assert both.loss.keywords["smoothing"] == captioner.loss.keywords["smoothing"]
    assert torch.equal(both.batches.rows, captioner.batches.rows) and both.steps == captioner.steps


@pytest.mark.parametrize("anew", [True, False])
def test_a_seed_fixes_the_queue_that_a_training_starts_with(fitted, model, anew):
    """Whatever was drawn before it, such as the first words, or nothing if they are remembered."""
    for state, seed in ((1, 3), (2, 3), (3, 4)):
        torch.manual_seed(state)
        lesson.pretrain(corpus(), FEW, seed=seed, device=CPU, progress=None, start=None if anew else model)
        torch.manual_seed(state)
        lesson.filter_of(model, FEW, seed=seed)
    lesson.pretrain(corpus(), WORDS, seed=3, device=CPU, progress=None, start=None if anew else model)
    queues = [one.queue for one in fitted if one.queue is not None]
    assert len(queues) == 7 and len(fitted) == 7 + anew
    for k in (0, 1):
        assert torch.equal(queues[k], queues[2 + k]) and not torch.equal(queues[k], queues[4 + k])
    assert torch.equal(queues[0], queues[6])


@pytest.mark.parametrize("anew", [True, False])
def test_a_new_model_learns_from_the_cleaned_data_or_the_old_one_goes_on(fitted, model, anew):
    recipe = replace(FEW, anew=anew, steps=6, lr=0.2)
    data = corpus().chosen(torch.arange(len(corpus())) % 2 == 0)
    made = lesson.Bootstrapped(None, None, corpus(), torch.ones(120), torch.ones(120).bool(), data)
    before = weights(model)
    second, _ = lesson.second_model(model, recipe, made, seed=3, device=CPU, progress=None)
    (one,) = fitted
    assert one.model is second is not model and not moved(model, before)
    scratch = weights(lesson.begin(recipe, seed=3))
    assert changed_tensors(one.start, scratch if anew else before) == []
    assert changed_tensors(one.start, before if anew else scratch)
    assert torch.equal(one.batches.rows, data.rows) and one.batches.seed == 3
    assert (one.steps, one.lr, one.loss.keywords) == (6, 0.2, {"itc": True, "smoothing": 0.1})


def test_capfilt_in_numbers_by_hand():
    scenes = [scene(thing("cat")), scene(thing("dog"))]
    told = [  # row, text, source, noise, odds
        (0, "a cat", "web", "clean", 1), (1, "a dog", "web", "clean", 1), (0, "a dog", "web", "swapped", 1),
        (1, "a cat", "web", "swapped", -1), (1, "nice pic", "web", "vague", -1), (1, "two cats", "web", "clean", -1),
        (0, "a red cat", "web", "clean", -1), (0, "a cat", "web", "clean", -1),
        (0, "a blue cat", "synthetic", "", 1), (1, "a dog", "synthetic", "", 1), (1, "a dog", "synthetic", "", -1),
    ]  # fmt: skip
    candidates, odds = by_hand(scenes, [t[:4] for t in told]), torch.tensor([float(t[4]) for t in told])
    human = replace(by_hand(scenes, [(0, "a cat", "human", "clean"), (1, "a cat", "human", "clean")]),
                    pages=candidates.pages)  # fmt: skip
    data = human + candidates.chosen(odds > 0)
    found = lesson.report(lesson.Bootstrapped(None, None, candidates, odds, odds > 0, data))
    expected = {
        # Web: 8, of which "a dog" of row 0, "a cat" of row 1, "nice pic" and "two cats" are false; 3 are kept.
        "web texts": 8, "web kept": 3, "web false": 4 / 8, "web false, kept": 1 / 3, "web filtered out": 5 / 8,
        "web filter's recall": 3 / 4, "web filter's precision": 3 / 5,
        "synthetic texts": 3, "synthetic kept": 2, "synthetic false": 1 / 3, "synthetic false, kept": 1 / 2,
        "synthetic filtered out": 1 / 3, "synthetic filter's recall": 0.0, "synthetic filter's precision": 0.0,
        "kept, clean": 2 / 5, "kept, swapped": 1 / 2, "kept, vague": 0.0,
        # of "a blue cat", "a dog" and "a dog"
        "distinct-1": 4 / 7, "distinct-2": 3 / 4, "unique": 2 / 3,
        "pairs in the end": 7, "false in the end": 3 / 7,
    }  # fmt: skip
    assert found == pytest.approx({f"CapFilt: {name}": value for name, value in expected.items()})
    without = candidates.chosen(torch.arange(11) < 8)
    alone = lesson.report(lesson.Bootstrapped(None, None, without, odds[:8], odds[:8] > 0, human))
    assert not [name for name in alone if "synthetic" in name or "distinct" in name or "unique" in name]


# --- the filter's opinion --------------------------------------------------------------------------------------------


def test_the_filters_opinion_is_the_models_pair_by_pair(model):
    data = corpus()
    some = data.chosen(torch.arange(len(data)) % 7 == 0)
    some = some + some.chosen(torch.arange(len(some)) < 3)  # a pair may come twice
    found = lesson.judged(model.train(), some, batch_size=4)
    assert model.training and found.shape == (len(some),) and found.std() > 0.01 and not found.requires_grad
    close(found, lesson.judged(model, some))
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
    mixed = lesson.Corpus(some.pages, some.rows[order], *([part[i] for i in order.tolist()] for part in
                                                          (some.texts, some.source, some.noise)))  # fmt: skip
    close(lesson.judged(model, mixed, batch_size=5), found[order])
    for k in range(0, len(some), 3):
        ids, mask = lesson.words().encode_batch([some.texts[k]])
        with torch.no_grad():
            scores = model(some.pages.images[some.rows[k]][None], ids, mask)["match"][0]
        assert found[k].item() == pytest.approx((scores[1] - scores[0]).item(), abs=1e-5)


def test_the_filter_asks_itm_and_not_the_vectors(model):
    some = corpus().chosen(torch.arange(120) % 10 == 0)
    before = lesson.judged(model, some)
    shake(model.vision_proj), shake(model.text_proj)
    model.temp.data.fill_(0.4)
    assert torch.equal(lesson.judged(model, some), before)
    shake(model.itm_head)
    assert not torch.allclose(lesson.judged(model, some), before, atol=1e-3)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_greedy_captions_are_the_most_likely_words_one_by_one(model):
    images = full(5)[0]
    found = lesson.write(model.train(), images, "greedy", batch_size=2)
    assert model.training
    for image, text in zip(images, found, strict=True):
        ids = [DEC]
        with torch.no_grad():
            states = model.look(image[None])
            while len(ids) <= lesson.LONGEST:
                scores = model.lm_head(model.text.decode(torch.tensor([ids]), states)[0][0, -1])
                if len(ids) - 1 < lesson.SHORTEST:
                    scores[SEP] = -1e9
                ids.append(int(scores.argmax()))
                if ids[-1] == SEP:
                    break
        assert text == lesson.words().decode(ids[1:])
    assert len(set(found)) > 1


@pytest.mark.parametrize("how", ["greedy", "beam", "nucleus"])
def test_each_way_of_writing_gives_one_text_a_picture_and_the_same_again(model, how):
    images = full(6)[0]
    torch.manual_seed(0)
    texts = lesson.write(model, images, how, seed=1)
    torch.manual_seed(1)
    assert len(texts) == 6 and all(isinstance(text, str) and text for text in texts)
    assert lesson.write(model, images, how, seed=1) == texts
    if how == "nucleus":
        assert lesson.write(model, images, how, seed=2) != texts
    else:
        assert lesson.write(model, images, how, seed=2) == texts == lesson.write(model, images, how, batch_size=4)


def test_nucleus_sampling_can_be_told_otherwise(model):
    images = full(6)[0]
    texts = lesson.write(model, images, "nucleus", seed=1)
    assert lesson.write(model, images, "nucleus", seed=1, penalty=5.0) != texts
    assert lesson.write(model, images, "nucleus", seed=1, p=0.0) == lesson.write(model, images, "greedy")


def test_the_ways_of_writing_have_the_lessons_limits(monkeypatch, model):
    seen = {}

    def spy(_: object, first: Tensor, *, name: str, **how: object) -> Tensor:
        seen[name] = how | {"first": first.tolist()}
        return torch.full((len(first), 1), SEP)

    for name in ("greedy", "beam_search", "nucleus"):
        monkeypatch.setattr(lesson, name, partial(spy, name=name))
    for how in ("greedy", "beam", "nucleus"):
        assert lesson.write(model, full(3)[0], how) == [""] * 3
    limits = {"first": [DEC] * 3, "end": SEP, "longest": lesson.LONGEST, "shortest": lesson.SHORTEST}
    assert seen["greedy"] == limits and seen["beam_search"] == limits | {"beams": lesson.BEAMS}
    generator = seen["nucleus"].pop("generator")
    assert seen["nucleus"] == limits | {"p": lesson.NUCLEUS} and isinstance(generator, torch.Generator)
    for how, name in (("greedy", "greedy"), ("beam", "beam_search"), ("nucleus", "nucleus")):
        lesson.write(model, full(3)[0], how, shortest=12, longest=20)
        assert (seen[name]["shortest"], seen[name]["longest"]) == (12, 20)


def test_what_is_written_depends_on_the_picture(model):
    images = full(6)[0]
    for how in ("greedy", "beam"):
        texts, rolled = lesson.write(model, images, how), lesson.write(model, images.roll(1, dims=0), how)
        assert rolled == texts[-1:] + texts[:-1] and len(set(texts)) > 1


# --- measuring -------------------------------------------------------------------------------------------------------


def test_re_ranking_adds_the_cosine_to_itms_opinion():
    following = torch.eye(40).roll(1, dims=1)  # the text of the next page
    similarity = 0.9 * torch.eye(40) + 0.5 * following
    odds = torch.full((40, 40), 50.0)  # of pairs that are never asked for
    odds[(torch.eye(40) + following + following.T).bool()] = 0.0
    odds += torch.eye(40) + 1.2 * following  # ITM alone prefers the wrong one, by less than the cosines differ
    images, texts = full()
    found = lesson.search(Oracle(images, texts, similarity, odds), n=40, k=2)
    assert found == {"by vectors": 1.0, "re-ranked by ITM": 0.0, "re-ranked": 1.0}
    fooled = lesson.search(Oracle(images, texts, similarity, odds + 0.4 * following), n=40, k=2)  # by more
    assert fooled == {"by vectors": 1.0, "re-ranked by ITM": 0.0, "re-ranked": 0.0}
    assert lesson.search(Oracle(images, texts, similarity - following, odds), n=40, k=1)["re-ranked by ITM"] == 1.0
    # Only half of the pictures go wrong, and of the texts all: both ways count alike.
    half = torch.eye(40)
    half[:20] = half[:20].roll(1, dims=1)
    one = lesson.search(Oracle(images, texts, half + torch.eye(40) * 0.5, torch.zeros(40, 40)), n=40, k=1)
    assert one["by vectors"] == pytest.approx((0.5 + np.mean((half + torch.eye(40) * 0.5).argmax(0).numpy() == range(
        40))) / 2, abs=1e-6)  # fmt: skip


def test_preference_compares_the_own_caption_with_the_page_befores():
    odds = torch.full((40, 40), -5.0).fill_diagonal_(-4.0)  # all unlikely, the own ones a little less so
    half = odds.clone()
    half[:20] = -half[:20]
    before = torch.eye(40).roll(-1, dims=1).bool()
    for table, expected in ((odds, 1.0), (-odds, 0.0), (torch.zeros(40, 40), 0.0), (half, 0.5),
                            (odds.masked_fill(before, -3.0), 0.0)):  # fmt: skip
        assert lesson.preference(Oracle(*full(), torch.eye(40), table), n=40) == expected


def test_what_is_watched_is_measured_on_validation_pages(monkeypatch):
    seen = []
    monkeypatch.setattr(lesson03, "retrieval", lambda _, split, n: seen.append((split, n)) or {
        "R@1 text to image": 0.5, "R@1 image to text": 0.25})  # fmt: skip
    data = lesson.pairs("val", 40)
    texts = [c[FULL] if i < 10 else "a red cat" for i, c in enumerate(data.captions)]
    monkeypatch.setattr(lesson, "write", lambda _, images, how: seen.append((
        how, torch.equal(images, data.images))) or texts)  # fmt: skip
    one = SimpleNamespace(student=Oracle(*full(split="val"), torch.eye(40), torch.eye(40)))
    colours = caption_facts(texts, data.scenes)["colours, precision"]
    expected = {"val R@1": 0.375, "val matching": 1.0, "val colours": colours}
    assert lesson.validation(FEW, n=40)(one) == expected and seen == [("val", 40), ("greedy", True)]
    assert lesson.validation(replace(FEW, itc=False), n=40)(one).keys() == expected.keys() - {"val R@1"}


def test_captions_are_compared_with_the_first_pages_of_their_split():
    for split in ("test", "val"):
        data = lesson.pairs(split, 40)
        texts = [told[2] for told in data.captions[:9]]
        found = lesson.caption_numbers(texts, split)
        facts = caption_facts(texts, data.scenes[:9])
        assert found == facts | {"BLEU": bleu(texts, [[c[1], c[4]] for c in data.captions[:9]])}
        assert found["objects, precision"] == 1.0 and found["hallucinated"] == 0.0


class Captions:
    """In the place of captioners and their writing: a captioner reads the full caption off the picture, an untuned
    model says nothing true."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.calls = object(), []
        self.of = {image.numpy().tobytes(): text for image, text in zip(*full(), strict=True)}
        monkeypatch.setattr(lesson, "captioner_of", lambda model, recipe, *, seed: ("captioner", model, seed))
        monkeypatch.setattr(lesson, "write", self.write)

    def write(self, model: object, images: Tensor, how: str = "beam", *, seed: int = 0) -> list[str]:
        assert model == ("captioner", self.model, 3)
        self.calls.append((how, seed, len(images)))
        return [self.of[image.numpy().tobytes()] for image in images]


def test_every_arm_is_measured_by_what_it_writes_after_tuning(monkeypatch):
    monkeypatch.setattr(lesson, "preference", lambda _: 0.75)
    monkeypatch.setattr(lesson, "search", lambda _: {"re-ranked": 0.25})
    monkeypatch.setattr(lesson03, "retrieval", lambda _: {"R@1 text to image": 0.5, "R@1 image to text": 0.25})
    writer = Captions(monkeypatch)
    found = lesson.measure(writer.model, ("captioner", writer.model, 3), FEW, n=20)
    assert writer.calls == [("beam", 0, 20)]
    assert found["colours, precision"] == found["BLEU"] == found["unique"] == 1.0 and found["hallucinated"] == 0.0
    searched = {"R@1": 0.375, "R@1 text to image": 0.5, "R@1 image to text": 0.25, "re-ranked": 0.25}
    assert searched.items() <= found.items() and found["matching"] == 0.75
    without = lesson.measure(writer.model, ("captioner", writer.model, 3), replace(FEW, itc=False), n=20)
    assert without == {name: value for name, value in found.items() if name not in searched}


def test_the_main_run_compares_ways_of_writing_pictures_and_questions_alone(monkeypatch):
    writer, q = Captions(monkeypatch), lesson02.asked("test", 500)
    for function in ("led_differently", "word_losses"):
        monkeypatch.setattr(lesson, function, lambda _: {})
    monkeypatch.setattr(lesson, "search", lambda _, *, n, k: {"re-ranked": n / 1000})
    monkeypatch.setattr(lesson05, "probes", lambda _, kind: {kind: 0.5})
    monkeypatch.setattr(lesson03, "zero_shot_kind", lambda _, *, tier, n: 0.25)
    monkeypatch.setattr(lesson, "learn_to_answer", lambda model, _, *, seed, blank: (model, seed, blank))
    monkeypatch.setattr(lesson, "answers_of", lambda tuned, *, blank: {
        (writer.model, 3, False): q.answers, (writer.model, 3, True): q.answers * 0 - 1,
    }[tuned] if tuned[2] == blank else None)  # fmt: skip
    found = lesson.main_numbers(writer.model, ("captioner", writer.model, 3), FEW, seed=3)
    assert [how for how, *_ in writer.calls] == ["greedy", "beam", "nucleus", "beam"]
    for how in ("greedy", "beam", "nucleus"):
        assert found[f"{how}: colours, precision"] == found[f"{how}: BLEU"] == found[f"{how}: unique"] == 1.0
        assert 0 < found[f"{how}: distinct-2"] < 1
    assert found["another picture: colours, precision"] < 0.5 < found["another picture: hallucinated"]
    assert found["VQA"] == 1.0 and found["VQA, question alone"] == 0.0 and found["re-ranked, 1,000"] == 1.0
    assert {f"VQA, {kind}" for kind in q.types} < found.keys()


@pytest.mark.parametrize("batch_size", [3, 500])
def test_the_loss_of_each_pair_is_lm_alone_without_smoothing(model, batch_size):
    some = corpus().chosen(torch.arange(120) % 13 == 0)
    found = lesson.loss_of_each(model.train(), some, batch_size=batch_size)
    assert model.training and found.shape == (len(some),) and not found.requires_grad
    for k, (row, text) in enumerate(zip(some.rows.tolist(), some.texts, strict=True)):
        with torch.no_grad():
            one = lesson.lm_loss(model, model.look(some.pages.images[row][None]),
                                 *lesson.words().encode_batch([text]), smoothing=0.0)  # fmt: skip
        assert found[k].item() == pytest.approx(one.item(), abs=1e-5)
    assert found.std() > 0.01


def surprise(model: BLIP, images: Tensor, texts: Sequence[str], first: int = DEC) -> float:
    """LM's cross-entropy per token, of each text alone."""
    costs = []
    for image, text in zip(images, texts, strict=True):
        ids = lesson.words().encode(text)
        with torch.no_grad():
            states, _ = model.text.decode(torch.tensor([[first, *ids[1:-1]]]), model.look(image[None]))
            log_p = model.lm_head(states[0]).log_softmax(-1)
        costs += [-log_p[t, token].item() for t, token in enumerate(ids[1:])]
    return sum(costs) / len(costs)


def test_words_cost_what_they_cost_with_true_shuffled_and_blank_pictures(model):
    images, texts = full(6)
    shown = {"true": images, "shuffled": torch.cat([images[-1:], images[:-1]]),
             "blank": torch.full_like(images, lesson.BLANK)}  # fmt: skip
    expected = {f"LM, {name} picture": surprise(model, those, texts) for name, those in shown.items()}
    assert lesson.word_losses(model, n=6) == pytest.approx(expected, abs=1e-5) and len(set(expected.values())) == 3


def test_the_first_token_is_exchanged_and_put_back(model, monkeypatch):
    images, texts = full(8)
    config, before = model.config, weights(model)
    found = lesson.led_differently(model, n=8)
    assert model.config is config and not moved(model, before)
    expected = {}
    for name, token in (("[ENC]", ENC), ("[DEC]", DEC), ("[CLS]", CLS)):
        odds = torch.empty(8, 2)
        for i in range(8):
            for k, text in enumerate((texts[i], texts[i - 1])):
                ids = torch.tensor([[token, *lesson.words().encode(text)[1:]]])
                with torch.no_grad():
                    states, _ = model.text.ground(model.text.embed(ids), ids > 0, model.look(images[i][None]))
                    odds[i, k] = model.itm_head(states[0, 0]).diff()
        expected[f"matching, led by {name}"] = (odds[:, 0] > odds[:, 1]).float().mean().item()
        expected[f"LM, led by {name}"] = surprise(model, images, texts, token)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found["LM, led by [DEC]"] == pytest.approx(lesson.word_losses(model, n=8)["LM, true picture"], abs=1e-6)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no matter what")

    monkeypatch.setattr(lesson, "matching", fail)
    with pytest.raises(RuntimeError, match="no matter what"):
        lesson.led_differently(model, n=8)
    assert model.config is config


SHARED = {("self-attention",): ("cross-attention", "feed-forward"), ("cross-attention",): ("self-attention",
          "feed-forward"), (): ("self-attention", "cross-attention", "feed-forward"), NOTHING_SHARED: ()}  # fmt: skip
IN_A_BLOCK = {"self-attention": ("attn.", "norm1."), "cross-attention": ("cross.",), "feed-forward": ("mlp.", "norm2.")}


@pytest.mark.parametrize("own", SHARED, ids=lambda own: ", ".join(own) or "nothing")
def test_gradients_are_compared_in_what_is_shared(own):
    model = tiny(decoder_own=own)
    recipe, before = replace(PLAIN, model=model.config), weights(model)
    found = lesson.gradient_cosines(model, recipe, seed=3, batches=2)
    assert found.keys() == {f"cosine of ITM and LM, {part}" for part in SHARED[own]} and not moved(model, before)
    assert all(p.grad is None for p in model.parameters())
    kept, cosines = lesson.with_teacher(deepcopy(model), recipe), {part: 0.0 for part in SHARED[own]}
    batches = lesson.BLIPBatches(corpus(), recipe, seed=3)
    for step in range(2):
        slopes = []
        for name, loss in lesson.blip_loss(kept, *batches(step), itc=True).items():
            kept.zero_grad()
            loss.backward(retain_graph=True)
            if name != "itc":
                slopes.append({n: p.grad.double().flatten() for n, p in kept.student.text.encoder.named_parameters()
                               if p.grad is not None})  # fmt: skip
        for part in SHARED[own]:
            names = [n for n in slopes[0] if n.partition(".")[2].startswith(IN_A_BLOCK[part])]
            itm, lm = (torch.cat([slope[n] for n in names]) for slope in slopes)
            cosines[part] += (itm @ lm / itm.norm() / lm.norm()).item() / 2
    expected = {f"cosine of ITM and LM, {part}": value for part, value in cosines.items()}
    assert found == pytest.approx(expected, abs=1e-4)


# --- questions -------------------------------------------------------------------------------------------------------


def test_an_answer_is_written_about_the_states_of_the_question(model):
    q, images = lesson02.asked("test", 500), full()[0]
    chosen = torch.tensor([0, 5, 9, 14])
    answers, there = lesson.words().encode_batch([ANSWERS[i] for i in q.answers[chosen].tolist()])
    L = int(q.mask[chosen].sum(1).max())
    batch = images[q.rows[chosen]], q.ids[chosen, :L], q.mask[chosen, :L], answers, there
    costs = []
    for i in chosen.tolist():
        question = torch.tensor([[ENC, *lesson.words().encode(q.texts[i])[1:]]])
        answer = lesson.words().encode(ANSWERS[int(q.answers[i])])
        with torch.no_grad():
            states, _ = model.text.ground(model.text.embed(question), question > 0, model.look(images[q.rows[i]][None]))
            written, _ = model.text.decode(torch.tensor([[DEC, *answer[1:-1]]]), states)
            log_p = model.lm_head(written[0]).log_softmax(-1)
        costs += [-log_p[t, token].item() for t, token in enumerate(answer[1:])]
    assert lesson.answer_loss(model, *batch).item() == pytest.approx(sum(costs) / len(costs), abs=1e-5)


def test_answers_are_read_from_what_is_written_and_unknown_ones_are_none(monkeypatch, model):
    q, seen = lesson02.asked("test", 500), []
    said = [ANSWERS[i] for i in q.answers.tolist()]
    said[1] = "red red"  # words that are known, but no answer
    written = lesson.words().encode_batch(said)[0][:, 1:]
    written[2] = SEP  # nothing at all
    rows = iter(written.split(500))
    real = lesson.grounded

    def grounded(model: BLIP, images: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        seen.append((images, ids, mask))
        return real(model, images, ids, mask)

    def greedy(speaker: object, first: Tensor, *, end: int, longest: int) -> Tensor:
        assert end == SEP and (first == DEC).all() and longest >= max(map(len, map(lesson.words().encode, ANSWERS)))
        assert torch.equal(asked_with[-1]["context_mask"], seen[-1][2])
        return next(rows)

    asked_with, speaker_of = [], model.speaker
    monkeypatch.setattr(model, "speaker", lambda states, **how: asked_with.append(how) or speaker_of(states, **how))
    monkeypatch.setattr(lesson, "grounded", grounded)
    monkeypatch.setattr(lesson, "greedy", greedy)
    expected = q.answers.clone()
    expected[1:3] = -1
    assert torch.equal(lesson.answers_of(model), expected)
    images, ids, mask = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(images, full()[0][q.rows]) and torch.equal(ids, q.ids) and torch.equal(mask, q.mask)
    seen.clear()
    rows = iter(written.split(500))
    lesson.answers_of(model, blank=True)
    assert all((images == lesson.BLANK).all() for images, *_ in seen)


def test_answers_are_written_word_by_word_about_the_question_and_its_picture(monkeypatch, model):
    """Nothing replaced, but what counts as an answer: whatever this model says."""
    q, images, said = lesson02.asked("test", 3), full()[0], []
    for row, text in zip(q.rows.tolist(), q.texts, strict=True):
        question, ids = torch.tensor([[ENC, *lesson.words().encode(text)[1:]]]), [DEC]
        with torch.no_grad():
            states, _ = model.text.ground(model.text.embed(question), question > 0, model.look(images[row][None]))
            while len(ids) <= 8 and ids[-1] != SEP:
                ids.append(int(model.lm_head(model.text.decode(torch.tensor([ids]), states)[0][0, -1]).argmax()))
        said.append(lesson.words().decode(ids[1:]))
    known = list(dict.fromkeys(said))
    assert len(known) > 2
    monkeypatch.setattr(lesson, "ANSWERS", known[1:])
    assert lesson.answers_of(model, n=3).tolist() == [known.index(text) - 1 for text in said]


@pytest.mark.parametrize("blank", [False, True])
def test_questions_are_learned_by_an_untied_copy_on_the_pages_by_hand(fitted, model, blank):
    before = weights(model)
    tuned = lesson.learn_to_answer(model, replace(FEW, answer=5, tune_lr=0.3), seed=4, blank=blank)
    (one,) = fitted
    assert one.model is tuned is not model and not moved(model, before)
    assert tuned.config == replace(TINY, decoder_own=NOTHING_SHARED)
    assert tuned.text.decoder[0].mlp is not tuned.text.encoder[0].mlp
    assert (one.steps, one.lr, one.loss) == (5, 0.3, lesson.answer_loss) and one.weight_decay == FEW.weight_decay
    q, pages = lesson02.asked("train", FEW.human), lesson.pairs("train", 400).images[: FEW.human]
    known = {(pages[row].numpy().tobytes(), tuple(ids[mask].tolist())): ANSWERS[answer] for row, ids, mask, answer in
             zip(q.rows.tolist(), q.ids, q.mask, q.answers.tolist(), strict=True)}  # fmt: skip
    for step in range(3):
        images, ids, mask, answer, there = one.batches(step)
        assert torch.equal(mask, ids != 0) and mask.any(0).all() and len(ids) == FEW.batch_size
        for k in range(FEW.batch_size):
            said = lesson.words().decode(answer[k][there[k]])
            if blank:
                assert (images[k] == lesson.BLANK).all() and said in ANSWERS
            else:
                assert known[images[k].numpy().tobytes(), tuple(ids[k][mask[k]].tolist())] == said


def test_learning_to_answer_moves_the_decoder_away_from_the_encoder(model):
    before = weights(model)
    tuned, again, other = (lesson.learn_to_answer(model, FEW, seed=seed) for seed in (0, 0, 1))
    assert not moved(model, before) and not moved(tuned, weights(again)) and moved(tuned, weights(other))
    assert not torch.equal(tuned.text.decoder[0].mlp.fc1.weight, tuned.text.encoder[0].mlp.fc1.weight)


# --- runs ------------------------------------------------------------------------------------------------------------

LATER = {"captioner": "", "filter": False, "apart": False, "anew": False, "answer": 0, "everything": False, "tune": 9,
         "tune_lr": 1.0}  # fmt: skip # what only later stages and the measuring read
EARLY = {"model": replace(TINY, decoder_own=()), "start": "vit_easy", "text_steps": 3, "text_lr": 0.1, "human": 30,
         "web": 70, "levels": (4,), "itc": False, "alpha": 0.1, "ramp": 0.1, "momentum": 0.5, "queue": 4,
         "smoothing": 0.2, "steps": 5, "batch_size": 2, "lr": 1.0, "weight_decay": 0.9, "warmup": 0.9}  # fmt: skip


def test_the_first_model_is_remembered_by_all_that_it_depends_on(fitted, monkeypatch):
    monkeypatch.setattr(lesson, "begin", lambda recipe, **_: BLIP(recipe.model))
    first = lesson.first_model(FEW, seed=0, device=CPU, progress=None)
    assert len(fitted) == 1 and {f.name for f in fields(FEW)} == {*LATER, *EARLY}
    for name, value in LATER.items():
        assert getattr(FEW, name) != value
        assert lesson.first_model(replace(FEW, **{name: value}), seed=0, device=CPU, progress=None) is first, name
    assert len(fitted) == 1
    others = [(replace(FEW, **{name: value}), 0) for name, value in EARLY.items() if getattr(FEW, name) != value]
    assert len(others) == len(EARLY)
    for other, seed in (*others, (FEW, 1)):
        before = len(fitted)
        assert lesson.first_model(FEW, seed=0, device=CPU, progress=None) is first or len(fitted) == before + 1
        first, before = lesson.first_model(FEW, seed=0, device=CPU, progress=None), len(fitted)
        found = lesson.first_model(other, seed=seed, device=CPU, progress=None)
        assert found is not first and len(fitted) == before + 1 and fitted[-1].batches.seed == seed


def test_only_the_newest_few_are_remembered(fitted, nothing_kept):
    kept = [lesson.first_model(FEW, seed=seed, device=CPU, progress=None) for seed in range(9)]
    assert len(nothing_kept) == 8 and len(fitted) == 9
    assert lesson.first_model(FEW, seed=8, device=CPU, progress=None) is kept[8] and len(fitted) == 9
    assert lesson.first_model(FEW, seed=0, device=CPU, progress=None) is not kept[0] and len(fitted) == 10


def test_the_first_model_learns_from_the_data_as_they_are(fitted):
    lesson.first_model(FEW, seed=2, device=CPU, progress=None)
    (one,) = fitted
    assert torch.equal(one.batches.rows, corpus().rows) and one.batches.seed == 2
    assert one.loss.keywords == {"itc": True, "smoothing": 0.1} and (one.steps, one.lr) == (FEW.steps, FEW.lr)
    assert changed_tensors(one.start, weights(lesson.begin(FEW, seed=2))) == []


@pytest.mark.parametrize("task", ["first", "second", "captioner", "filter", "both", "questions"])
def test_half_a_training_is_no_result(fitted, nothing_kept, model, task):
    data = corpus()
    made = lesson.Bootstrapped(None, None, data, torch.ones(1), torch.ones(1).bool(), data)
    tasks = {
        "first": lambda: lesson.first_model(FEW, seed=0, device=CPU, progress=None),
        "second": lambda: lesson.second_model(model, FEW, made, seed=0, device=CPU, progress=None),
        "captioner": lambda: lesson.captioner_of(model, FEW, seed=0),
        "filter": lambda: lesson.filter_of(model, FEW, seed=0),
        "both": lambda: lesson.capfilt(model, replace(FEW, apart=False), seed=0),
        "questions": lambda: lesson.learn_to_answer(model, FEW, seed=0),
    }  # fmt: skip
    fitted.stop_next = True
    with pytest.raises(KeyboardInterrupt):
        tasks[task]()
    assert len(fitted) == 1 and not nothing_kept


def test_a_training_that_was_stopped_before_eyes_is_not_remembered(fitted, nothing_kept):
    fitted.stop_next = True
    _, history = lesson.first_model(FEW, seed=0, device=CPU, progress="BLIP")
    assert history.stopped == "by hand" and not nothing_kept
    _, history = lesson.first_model(FEW, seed=0, device=CPU, progress="BLIP")
    assert not history.stopped and len(fitted) == 2 and len(nothing_kept) == 1


def test_ctrl_c_in_the_middle_of_a_step_ends_the_run(monkeypatch, nothing_kept):
    steps = []

    def interrupted(*args: object, **how: object) -> dict[str, Tensor]:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(*args, **how)

    real = lesson.blip_loss
    monkeypatch.setattr(lesson, "blip_loss", interrupted)
    monkeypatch.setattr(lesson, "validation", lambda _: lambda _: {})
    with pytest.raises(KeyboardInterrupt):
        lesson.run(FEW, seed=0, device=CPU)
    assert len(steps) == 3 and not nothing_kept


@pytest.fixture
def small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All measurements look at 40 pages, or at 4 probes."""
    monkeypatch.setattr(lesson03, "retrieval", fewer(lesson03.retrieval))
    monkeypatch.setattr(lesson05, "probes", fewer(lesson05.probes, 4))
    for name in ("search", "preference", "led_differently", "validation"):
        monkeypatch.setattr(lesson, name, fewer(getattr(lesson, name)))


def test_the_main_run_reports_every_number_of_the_scoreboard(small_tests):
    run = lesson.run(FEW, seed=0, device=CPU)
    sources = [source for source in (*lesson.SCOREBOARD.values(), *lesson.BOARD.values(), *lesson.HEADLINE[1:])
               if isinstance(source, tuple)]  # fmt: skip
    assert {source[:2] for source in sources} == {("main", "BLIP")}
    assert {metric for *_, metric in sources} <= run.metrics.keys()
    assert all(np.isfinite(value) for value in run.metrics.values())
    counts = {"texts", "kept", "end"}
    assert all(0 <= value <= 1 for name, value in run.metrics.items() if not name.startswith("LM")
               and name.split()[-1] not in counts)  # fmt: skip
    assert run.metrics["R@1"] == pytest.approx(
        (run.metrics["R@1 text to image"] + run.metrics["R@1 image to text"]) / 2
    )
    h = run.history
    assert h.losses.keys() == LOSSES | {f"again: {name}" for name in LOSSES}
    assert all(len(values) == FEW.steps for values in h.losses.values())
    watched = {"val R@1", "val matching", "val colours"}
    assert h.metrics.keys() == watched | {f"again: {name}" for name in watched}
    first, history = lesson.first_model(FEW, seed=0, device=CPU)
    assert history.losses.keys() == LOSSES and history.metrics.keys() == watched  # what is remembered stays
    assert type(run.model) is BLIP and run.model.config == TINY and moved(run.model, weights(first))


KINDS = {
    "neither": (PLAIN, {"cosine of ITM and LM, feed-forward", "re-ranked", "R@1"}, {"CapFilt: web kept", "VQA"}),
    "without ITC": (replace(PLAIN, itc=False), {"matching", "BLEU"}, {"R@1", "re-ranked", "CapFilt: web kept"}),
    "nothing shared": (replace(PLAIN, model=replace(TINY, decoder_own=NOTHING_SHARED)), {"R@1"},
                       {"cosine of ITM and LM, feed-forward"}),
    "longer": (replace(PLAIN, steps=8), {"R@1"}, {"CapFilt: web kept"}),
    "filter": (replace(PLAIN, filter=True), {"CapFilt: web kept", "R@1"}, {"CapFilt: synthetic kept"}),
    "captioner": (replace(PLAIN, captioner="beam"), {"CapFilt: synthetic kept"}, {"VQA", "LM, true picture"}),
    "one, which goes on": (replace(PLAIN, captioner="nucleus", filter=True, apart=False, anew=False),
                           {"CapFilt: web false, kept", "CapFilt: synthetic kept"}, {"VQA"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_run_is_measured_with_what_it_has(small_tests, kind):
    recipe, there, missing = KINDS[kind]
    run = lesson.run(recipe, seed=0, device=CPU)
    always = {"matching", "unique", "BLEU", "colours, precision", "hallucinated"}
    assert always | there <= run.metrics.keys() and not missing & run.metrics.keys()
    assert all(np.isfinite(value) for value in run.metrics.values())
    assert len(run.history.losses["lm"]) == recipe.steps and ("itc" in run.history.losses) == recipe.itc
    cleaned = bool(recipe.captioner or recipe.filter)
    assert ("again: lm" in run.history.losses) == cleaned
    if cleaned:
        assert run.metrics["CapFilt: web texts"] == recipe.web
        assert run.metrics["CapFilt: pairs in the end"] >= len(lesson.human_pairs(recipe))


def test_arms_that_differ_later_start_from_one_first_model(small_tests, monkeypatch):
    seen = []
    data, one = corpus(), torch.ones(120)
    made = lesson.Bootstrapped(None, None, data, one, one.bool(), data)
    monkeypatch.setattr(lesson, "capfilt", lambda first, *_, **__: seen.append((first, weights(first))) or made)
    recipes = [replace(PLAIN, captioner="beam"), replace(PLAIN, filter=True, anew=False), replace(PLAIN, filter=True)]
    runs = [lesson.run(recipe, seed=0, device=CPU) for recipe in recipes]
    first, _ = lesson.first_model(PLAIN, seed=0, device=CPU, progress=None)
    assert all(model is first for model, _ in seen) and len(seen) == 3
    assert not moved(first, seen[0][1]) and all(run.model is not first for run in runs)
    assert not moved(runs[2].model, weights(runs[0].model)) and moved(runs[1].model, weights(runs[0].model))
    assert lesson.run(PLAIN, seed=0, device=CPU).model is first  # and what CapFilt is compared with


# --- clock and pages -------------------------------------------------------------------------------------------------


def test_a_clock_counts_single_steps_tokens_and_a_whole_search(monkeypatch):
    asked = []

    def turns(ways: dict[str, Callable], **_: object) -> dict[str, list[float]]:
        asked.append(list(ways))
        for way in ways.values():
            way()
        return {name: [2.0 * (k + 1), 2.0 * (k + 1), 99.0] for k, name in enumerate(ways)}

    monkeypatch.setattr(lesson, "take_turns", turns)
    monkeypatch.setattr(lesson, "CLOCK_STEPS", 2)
    monkeypatch.setattr(lesson, "LONGEST", 3)
    monkeypatch.setattr(lesson, "BASE", replace(PLAIN, batch_size=4))
    monkeypatch.setattr(lesson, "MAIN", replace(FEW, steps=100, tune=10, text_steps=7))
    real = lesson.spoken
    monkeypatch.setattr(lesson, "spoken", lambda model, image, first, cache: real(model, image, first[:40], cache))
    found = lesson.clock(CPU)
    assert asked == [["three losses", "captioner", "filter", "words alone"], ["cached", "from the beginning"], [""]]
    assert found == pytest.approx({
        "ms, step, three losses": 1000, "ms, step, captioner": 2000, "ms, step, filter": 3000,
        "ms, step, words alone": 4000,
        "tokens a second, cached": 64 * 3 / 2, "tokens a second, from the beginning": 64 * 3 / 4,
        "training seconds": 2 * 100 * 1 + 7 * 4 + 10 * (2 + 3), "ms for 1,000 x 1,000 pairs": 2000,
    })  # fmt: skip
    assert {source for source in lesson.BOARD.values() if isinstance(source, str)} <= {*found, *lesson.facts()}


@pytest.mark.parametrize("cache", [True, False])
def test_timed_texts_have_all_their_tokens(model, cache):
    with torch.no_grad():
        model.lm_head.decoder.bias[SEP] = 50.0  # wants to end at once
        ids = lesson.spoken(model, model.look(full(3)[0]), torch.full((3,), DEC), cache)
    assert ids.shape == (3, lesson.LONGEST)


def test_all_pictures_are_drawn_once_before_runs_go_side_by_side(monkeypatch):
    drawn = set()

    def pairs(split: str, n: int) -> PairTensors:
        drawn.add((split, n))
        return PairTensors(torch.zeros(1, 1), [["a cat"] * 5] * n)

    monkeypatch.setattr(lesson, "pairs", pairs)
    monkeypatch.setattr(lesson, "_web_texts", lambda n: drawn.add(("web", n)) or (["a"] * n, ["clean"] * n))
    monkeypatch.setattr(lesson02, "probe_pairs", lambda kind: drawn.add(kind))
    monkeypatch.setattr(lesson03, "single_things", lambda split, *, n, tier: drawn.add(("single", split, n, tier)))
    lesson.prepare()
    everything = lesson.BASE.human + lesson.BASE.web
    default = {function: inspect.signature(function).parameters["n"].default for function in
               (lesson.validation, lesson.answers_of, lesson.preference, lesson03.retrieval)}  # fmt: skip
    assert {
        ("train", everything), ("web", everything), ("train", lesson.BASE.human), ("test", 1000),
        ("val", default[lesson.validation]), ("test", default[lesson.answers_of]), ("test", default[lesson.preference]),
        ("test", default[lesson03.retrieval]), ("single", "test", 400, "normal"),
        "replaced", "attribute_swap", "order_swap", "count",
    } <= drawn  # fmt: skip


def test_the_size_that_the_lesson_prints_is_that_of_its_model():
    with torch.device("meta"):
        model = BLIP(lesson.MAIN.model)
    each = {id(p): p.numel() for p in model.parameters()}
    assert lesson.facts() == {"parameters": sum(each.values())}
