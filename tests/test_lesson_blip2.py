"""Lesson 08's recipes: the frozen parts, the losses of both stages, what each stage starts from, what is measured."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, fields, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lesson_helpers import Fitted, Oracle, changed, drawn_by_hand, few_pages, fewer, weights
from torch import Tensor, nn
from tower_helpers import close, digest, shake

from minivlp import record
from minivlp.data import PairTensors
from minivlp.data.picturebook.describe import ANSWERS
from minivlp.data.picturebook.understand import caption_facts
from minivlp.data.picturebook.world import KINDS
from minivlp.evaluate import bleu
from minivlp.lessons import albef as lesson05
from minivlp.lessons import blip as lesson07
from minivlp.lessons import blip2 as lesson
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons.vlmo import changed_tensors
from minivlp.models.albef import TEMPERATURES
from minivlp.models.blip2 import BLIP2, BLIP2Speaker, Eye, QFormerConfig
from minivlp.models.clip import CLIP
from minivlp.models.lm import DecoderLM, EncoderDecoderLM, LMConfig
from minivlp.models.vit import ViT, ViTConfig
from minivlp.train import History

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = {(experiment, arm): recipe for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()}
TINY = QFormerConfig(image_width=16, queries=3, width=16, depth=3, heads=2, mlp_ratio=2, embed_dim=8)
FEW = lesson.Recipe(
    model=TINY, pages=60, steps=4, second=4, second_pages=40, batch_size=4, everything=True,
)  # fmt: skip
PLAIN = replace(FEW, everything=False)
FULL = 4  # the level of the full captions
CLS, SEP, DEC = 2, 3, 6
LOSSES = {"itc", "itm", "itg"}
MOUTHS = {"mouth": DecoderLM, "mouth_worse": DecoderLM, "mouth_prefix": EncoderDecoderLM}
real_eye_of, real_ready_made = lesson.eye_of, lesson.ready_made


@cache
def small_eye(name: str) -> Eye:
    """In the place of `eye_of`: one small eye for each name."""
    torch.manual_seed(sum(map(ord, name)))
    return Eye(shake(ViT(ViTConfig(image_size=64, patch_size=16, width=16, depth=2, heads=2, num_classes=5)), 0.1))


def small_part(name: str) -> nn.Module:
    """In the place of `ready_made`: small mouths, and words for a small Q-Former."""
    torch.manual_seed(sum(map(ord, name)))
    if name == "qformer_words":
        return shake(BLIP2(TINY, None), 0.1, but="temp")
    return shake(MOUTHS[name](LMConfig(width=12, depth=1, heads=2, mlp_ratio=2)), 0.3)


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cached = lesson.features, lesson02.asked
    for function in cached:
        function.cache_clear()
    with few_pages(tmp_path_factory, lesson, lesson02, lesson03, lesson05, lesson07), pytest.MonkeyPatch.context() as m:
        m.setattr(lesson, "eye_of", small_eye)
        m.setattr(lesson, "ready_made", small_part)
        yield
    for function in cached:  # other tests have more pages, and other eyes
        function.cache_clear()


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Every test has a memory of its own for first stages, and captions end soon."""
    monkeypatch.setattr(lesson, "_FIRST", {})
    monkeypatch.setattr(lesson07, "LONGEST", 8)
    return lesson._FIRST


def tiny(**changes: object) -> BLIP2:
    """A small stage 1 whose weights hide nothing."""
    torch.manual_seed(0)
    return shake(BLIP2(replace(TINY, **changes), deepcopy(small_eye("clip"))), 0.3, but="temp")


@pytest.fixture
def model() -> BLIP2:
    return tiny(temperature=0.3)


def speaking(kind: str = "mouth") -> BLIP2Speaker:
    """A small stage 2 whose weights hide nothing."""
    return shake(BLIP2Speaker(tiny(), small_part(kind)), 0.2)


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Which weights of a model are not what they were, to the last bit."""
    return set(changed_tensors(before, model.state_dict()))


def full(n: int = 40, split: str = "test") -> tuple[Tensor, list[str]]:
    data = lesson.pairs(split, n)
    return data.images[:n], [told[FULL] for told in data.captions[:n]]


# --- recipes ---------------------------------------------------------------------------------------------------------


def test_each_arm_changes_what_its_name_says_and_nothing_else():
    base, main = lesson.BASE, lesson.MAIN
    random, fewer_pages = {"steps": 0, "words": ""}, {"second_pages": 500}
    expected = {
        ("losses", "all three"): {},
        ("losses", "without ITC"): {"itc": False},
        ("losses", "without ITM"): {"itm": False},
        ("losses", "without ITG"): {"itg": False},
        ("500 pages in stage 2", "after stage 1"): fewer_pages,
        ("500 pages in stage 2", "random Q-Former"): fewer_pages | random,
        ("mouth", "encoder-decoder"): {"mouth": "mouth_prefix"},
        ("mouth", "encoder-decoder, random Q-Former"): {"mouth": "mouth_prefix"} | random,
        ("mouth", "stopped early"): {"mouth": "mouth_worse"},
        ("stage 2 alone", "equal steps"): random,
        ("stage 2 alone", "equal steps, after texts"): {"steps": 0},
        ("stage 2 alone", "equal computation"): random | {"second": base.second + lesson.STAGE1_IN_STAGE2 * base.steps},
        ("eye", "ViT of lesson 01"): {"eye": "vit_normal"},
        ("eye", "BLIP of lesson 07"): {"eye": "blip"},
        ("queries", "1"): {"model.queries": 1},
        ("queries", "4"): {"model.queries": 4},
        ("queries", "16"): {"model.queries": 16},
        ("end to end", "at the same rate"): {"end_to_end": 1.0},
        ("end to end", "eye and mouth at a tenth of the rate"): {"end_to_end": 0.1},
        ("Q-Former", "cross-attention in every block"): {"model.cross_every": 1},
        ("Q-Former", "words start at random"): {"words": ""},
    }
    arms = dict(ARMS)
    assert arms.pop(("main", "BLIP-2")) == main and changed(main, base).keys() <= {"steps", "second", "everything"}
    assert main.everything and not base.everything and main.steps >= base.steps and main.second >= base.second
    assert {arm: changed(recipe, base) for arm, recipe in arms.items()} == expected
    assert base.itc and base.itm and base.itg and base.words and base.second_pages == base.pages > 500
    assert (base.eye, base.mouth, base.model) == ("clip", "mouth", QFormerConfig())
    assert 1 < base.model.queries < 16 and base.model.cross_every > 1  # so that the arms lie around it
    assert isinstance(lesson.STAGE1_IN_STAGE2, int) and lesson.STAGE1_IN_STAGE2 > 1


def test_recipes_survive_json_and_no_two_are_alike():
    plain = record.recipes_of(lesson)
    assert plain == json.loads(json.dumps(plain)) and plain.keys() == lesson.EXPERIMENTS.keys()
    for (experiment, arm), recipe in ARMS.items():
        made = plain[experiment][arm]
        again = lesson.Recipe(**made | {"model": QFormerConfig(**made["model"]), "levels": tuple(made["levels"])})
        assert again == recipe and asdict(again) == asdict(recipe)
    assert len(set(ARMS.values())) == len(ARMS)


def test_the_lesson_names_what_there_is():
    assert record.lesson_module(lesson.NAME) is lesson
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]
    template, *sources = lesson.HEADLINE
    named = {source for source in lesson.BOARD.values() if isinstance(source, str)}
    sources += [*lesson.SCOREBOARD.values(), *(s for s in lesson.BOARD.values() if s not in named)]
    assert template.count("{}") == len(lesson.HEADLINE) - 1
    assert {source[:2] for source in sources} == {("main", "BLIP-2")}
    assert lesson.BOARD.keys() <= {*record.COLUMNS, record.ALONE} and lesson.NOTES.keys() <= record.COLUMNS.keys()
    assert lesson.BOARD.keys() | lesson.NOTES.keys() >= record.COLUMNS.keys()


@pytest.mark.parametrize("recipe", [pytest.param(recipe, id=", ".join(arm)) for arm, recipe in ARMS.items()])
def test_every_arm_fits_its_eye_its_words_and_its_mouth(recipe):
    model = BLIP2(recipe.model, eye := real_eye_of(recipe.eye))
    states = eye(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert states.shape[2] == recipe.model.image_width
    if recipe.words:
        lesson.start_from_words(model, real_ready_made(recipe.words))
    mouth = real_ready_made(recipe.mouth)
    ids = torch.tensor([[DEC, 20, 21, SEP]])
    prompt = {"prompt": ids[:, 1:3], "prompt_mask": ids[:, 1:3] > 0} if mouth.has_encoder else {}
    scores = mouth.lm_head(BLIP2Speaker(model, mouth).write(ids, model.ln_vision(states), **prompt))
    assert scores.shape == (1, 4, len(lesson.words())) and scores.isfinite().all()
    assert recipe.model.vocab_size == mouth.config.vocab_size == len(lesson.words())
    assert max(recipe.model.queries + lesson07.LONGEST + 1, 0) <= mouth.config.max_text
    assert recipe.second_pages <= recipe.pages and 4 * recipe.batch_size <= recipe.second_pages * len(recipe.levels)


# --- the frozen parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("clip", CLIP), ("vit_normal", ViT), ("blip", lesson07.BLIP)])
def test_an_eye_is_the_kept_image_encoder_without_its_last_block(name, kind):
    config = {"clip": lesson03.MAIN.model, "blip": lesson07.MAIN.model, "vit_normal": None}[name]
    if config is None:
        experiment, arm = lesson.lesson01.CHECKPOINTS[name]
        config = lesson.lesson01.EXPERIMENTS[experiment][arm].model
    kept = lesson.trained(name, kind(config), own=False)
    tower, eye, images = getattr(kept, "vision", kept), real_eye_of(name), full(3)[0]
    with torch.no_grad():
        x = tower.embed(images)
        states = [x := block(x)[0] for block in tower.encoder.blocks]
    assert torch.equal(eye(images), states[-2]) and not torch.allclose(states[-2], states[-1], atol=0.1)
    assert not any(p.requires_grad for p in eye.parameters()) and not eye.training and eye is real_eye_of(name)


def test_the_frozen_states_are_those_that_looking_each_time_gives(monkeypatch):
    lesson.features.cache_clear()
    images, looked = lesson.pairs("train", 60).images, []
    monkeypatch.setattr(lesson, "eye_of", lambda name: looked.append(name) or small_eye(name))
    found = {name: lesson.features(name, "train", 60) for name in ("clip", "blip")}
    assert looked == ["clip", "blip"] and lesson.features("clip", "train", 60) is found["clip"] and len(looked) == 2
    for name, held in found.items():
        assert held.shape == (60, 17, 16) and not held.requires_grad
        close(held, small_eye(name)(images))
        close(held[[7, 3]], small_eye(name)(images[[7, 3]]))
    assert not torch.allclose(found["clip"], found["blip"], atol=0.1)
    assert not torch.allclose(lesson.features("clip", "test", 40), found["clip"][:40], atol=0.1)


def test_many_pages_are_looked_at_in_their_order(monkeypatch):
    pages = torch.arange(600.0)[:, None]
    monkeypatch.setattr(lesson, "pairs", lambda split, n: PairTensors(pages[:n], [["a"]] * n))
    monkeypatch.setattr(lesson, "eye_of", lambda name: lambda part: part + 1000)
    lesson.features.cache_clear()
    assert torch.equal(lesson.features("any", "train", 600), pages + 1000)
    lesson.features.cache_clear()


def test_a_new_model_leaves_the_eye_that_all_share_where_it_is(monkeypatch):
    """A machine with an accelerator: what is moved there must not take along the eye that looks at pages on the CPU."""
    own = deepcopy(small_eye("clip"))
    monkeypatch.setattr(lesson, "eye_of", lambda name: own)
    for make in (lambda: lesson.begin(replace(FEW, words=""), device=torch.device("meta")),
                 lambda: lesson.both_stages(FEW)[1].to("meta")):  # fmt: skip
        assert {p.device.type for p in make().parameters()} == {"meta"}
        assert {p.device.type for p in own.parameters()} == {"cpu"}


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_every_page_comes_with_a_caption_of_each_level():
    data = lesson.pairs("train", 60)
    for pages, levels in ((60, (1, 4)), (20, (1, 4)), (7, (0, 2, 3))):
        made = lesson.corpus(replace(FEW, levels=levels), pages)
        assert list(zip(made.rows.tolist(), made.texts, strict=True)) == [
            (row, data.captions[row][level]) for row in range(pages) for level in levels
        ]
        assert len(made.pages) == 60 and len(made.source) == len(made.noise) == len(made)


@pytest.mark.parametrize("pages", [None, 20])
def test_a_batch_has_the_eyes_states_of_the_pages_that_its_texts_tell_of(pages):
    recipe = replace(FEW, eye="blip")
    one, two = (lesson.batches(recipe, seed=3, pages=pages) for _ in range(2))
    data, seen, states = lesson.corpus(recipe, pages or 60), set(), small_eye("blip")(lesson.pairs("train", 60).images)
    for step in range(30):
        torch.manual_seed(step)
        image, ids, mask, says, noise = one(step)
        assert all(torch.equal(a, b) for a, b in zip(two(step), (image, ids, mask, says, noise), strict=True))
        chosen = one.chosen(step).tolist()
        close(image, states[data.rows[chosen]])
        for k, i in enumerate(chosen):
            assert ids[k][mask[k]].tolist() == lesson.words().encode(data.texts[i])
        same = [[data.texts[i] == data.texts[j] for j in chosen] for i in chosen]
        assert (says[:, None] == says).tolist() == same and torch.equal(mask, ids != 0)
        assert noise.shape == (2, 4) and noise.min() >= 0 and noise.max() < 1
        seen |= {int(row) for row in data.rows[chosen]}
    assert seen <= set(range(pages or 60)) and len(seen) > 0.9 * (pages or 60)
    other = lesson.batches(recipe, seed=4, pages=pages)
    assert not torch.equal(other(0)[4], one(0)[4]) and not torch.equal(one(1)[4], one(0)[4])
    assert one.order.batch_size == 4 * FEW.batch_size


def test_whatever_is_given_in_the_place_of_pictures_changes_nothing_else():
    made = lesson.corpus(FEW, 60)
    plain = lesson07.PairBatches(made, batch_size=4, seed=1)
    numbered = lesson07.PairBatches(made, batch_size=4, seed=1, images=torch.arange(60.0)[:, None])
    for step in range(8):
        images, *rest = plain(step)
        number, *others = numbered(step)
        assert torch.equal(images, made.pages.images[number[:, 0].long()]) and images.dtype == torch.uint8
        assert all(torch.equal(a, b) for a, b in zip(rest, others, strict=True))
        assert torch.equal(number[:, 0].long(), made.rows[plain.chosen(step)])


# --- stage 1: the losses of a step -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(few: None) -> tuple[Tensor, ...]:
    """A batch of three pairs of different lengths, all of which say something else."""
    batches = lesson.batches(replace(FEW, batch_size=3), seed=0)
    step = next(step for step in range(99) if len(set(batches(step)[2].sum(1).tolist())) == 3)
    image, ids, mask, _, noise = batches(step)
    return image, ids, mask, torch.tensor([7, 8, 9]), noise


@pytest.fixture
def batch(drawn: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.clone() for t in drawn]


def loss_of(model: BLIP2, batch: Sequence[Tensor], **how: object) -> dict[str, float]:
    return {name: loss.item() for name, loss in lesson.stage1_loss(deepcopy(model), *batch, **how).items()}


def table_by_hand(model: BLIP2, image: Tensor, ids: Tensor, mask: Tensor) -> np.ndarray:
    """The cosine of each query of each picture with each text, (B, B, Q), all seen and read alone."""
    vectors = []
    with torch.no_grad():
        for b in range(len(ids)):
            queries, text = model.see(model.ln_vision(image[b][None]))[0][0], ids[b][mask[b]][None]
            said = model.qformer(model.qformer.embed(text), 0)[0][0, 0]
            vectors.append((model.vision_proj(queries).double().numpy(), model.text_proj(said).double().numpy()))
    return np.array([[[q @ text / np.linalg.norm(q) / np.linalg.norm(text) for q in queries]
                      for _, text in vectors] for queries, _ in vectors])  # fmt: skip


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def itc_by_hand(logits: np.ndarray, says: list[int], smoothing: float) -> float:
    """Picture by picture and text by text over the whole batch."""
    B, total = len(says), 0.0
    for lines in (logits, logits.T):
        for i, line in enumerate(lines):
            target = np.array([float(other == says[i]) for other in says])
            target = (1 - smoothing) * target / target.sum() + smoothing / B
            total -= target @ log_softmax(line)
    return total / (2 * B)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_itc_compares_each_text_with_the_query_that_fits_best(model, batch, smoothing):
    image, ids, mask, says, _ = batch
    table, temp = table_by_hand(model, image, ids, mask), model.temp.item()
    for numbers in ([7, 8, 9], [7, 7, 9]):
        says.copy_(torch.tensor(numbers))
        expected = itc_by_hand(table.max(axis=2) / temp, numbers, smoothing)
        assert loss_of(model, batch, smoothing=smoothing)["itc"] == pytest.approx(expected, abs=1e-5)
        # Each part matters, or this test would see nothing.
        wrong = [itc_by_hand(table.mean(axis=2) / temp, numbers, smoothing),
                 itc_by_hand(table.max(axis=2), numbers, smoothing),
                 itc_by_hand(table.max(axis=2) / temp, numbers, 0.1 - smoothing)]  # fmt: skip
        wrong += [itc_by_hand(table.max(axis=2) / temp, [7, 8, 9], smoothing)] if numbers[1] == 7 else []
        assert all(abs(one - expected) > 1e-3 for one in wrong), (expected, wrong)


def test_itm_asks_for_one_true_pair_and_two_wrong_ones_each(model, batch):
    image, ids, mask, says, noise = batch
    says[1] = says[0]  # so page 2 is the only wrong partner of pages 0 and 1, and its own are theirs
    noise[:, 2] = torch.tensor([0.0, 1.0])  # the first wrong picture there is, and the last wrong text
    asked = [(0, 0), (1, 1), (2, 2), (2, 0), (2, 1), (0, 2), (0, 2), (1, 2), (2, 1)]  # (picture, text)
    total = 0.0
    with torch.no_grad():
        for k, (picture, text) in enumerate(asked):
            words = ids[text][mask[text]][None]
            assert words[0, 0] == CLS
            x = torch.cat([model.qformer.queries(1), model.qformer.embed(words)], dim=1)
            queries = model.qformer(x, 3, model.ln_vision(image[picture][None]))[0][0, :3]
            total -= model.itm_head(queries).mean(0).log_softmax(0)[int(k < 3)].item()
    assert loss_of(model, batch)["itm"] == pytest.approx(total / 9, abs=1e-5)


@pytest.mark.parametrize("itc", [True, False])
def test_wrong_partners_are_drawn_by_the_best_query_or_without_itc_evenly(model, monkeypatch, itc):
    image, ids, mask, *_ = lesson.batches(replace(FEW, batch_size=6), seed=0)(2)
    says, counted, seen = torch.tensor([1, 2, 1, 3, 4, 5]), set(), []
    similarity = table_by_hand(model, image, ids, mask).max(axis=2) / model.temp.item()
    monkeypatch.setattr(lesson05, "itm_loss", lambda *args: seen.append(args[-2:]) or torch.zeros(()))
    for k in range(12):
        noise = torch.rand(2, 6, generator=torch.Generator().manual_seed(k))
        lesson.stage1_loss(model, image, ids, mask, says, noise, itc=itc, itg=False)
        for found, table, row in zip(seen.pop(), (similarity.T, similarity), noise, strict=True):
            chance = np.exp(np.stack([log_softmax(line) for line in table])) + 1e-4 if itc else np.ones((6, 6))
            assert found.tolist() == drawn_by_hand(chance, says.tolist(), row.tolist())
            assert all(says[j] != says[i] for i, j in enumerate(found.tolist()))
            counted |= set(enumerate(found.tolist()))
    assert len(counted) > 18  # and not always the same ones


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_itg_learns_each_next_word_and_the_end_from_dec_on_about_the_picture(model, batch, smoothing):
    image, ids, mask, *_ = batch
    costs = []
    with torch.no_grad():
        for b in range(3):
            words = ids[b][mask[b]].tolist()  # alone, so that nothing is padded
            assert words[0] == CLS and words[-1] == SEP
            read, L = model.qformer.embed(torch.tensor([[DEC, *words[1:-1]]])), len(words) - 1
            sees = torch.ones(3 + L, 3 + L).tril().bool()  # each word the words before it, and all queries
            sees[:3, :3] = True  # queries see queries alone
            x = torch.cat([model.qformer.queries(1), read], dim=1)
            states = model.qformer(x, 3, model.ln_vision(image[b][None]), mask=sees)[0][0, 3:]
            for state, word in zip(states, words[1:], strict=True):
                log_p = model.lm_head(state).log_softmax(0)
                costs.append((-log_p[word].item(), -log_p.mean().item()))
    right, any_ = np.mean(costs, axis=0)
    assert len(costs) == mask.sum() - 3 and abs(right - any_) > 5e-3
    expected = (1 - smoothing) * right + smoothing * any_
    assert loss_of(model, batch, smoothing=smoothing)["itg"] == pytest.approx(expected, abs=1e-5)


def test_padding_changes_no_loss(model, batch):
    image, ids, mask, *rest = batch
    longer = [torch.cat([t, t.new_zeros(3, 4)], dim=1) for t in (ids, mask)]
    assert loss_of(model, (image, *longer, *rest)) == pytest.approx(loss_of(model, batch), abs=1e-5)


def test_pictures_give_the_losses_of_the_eyes_states(model, batch):
    images, rest = lesson.pairs("train", 60).images[:3], batch[1:]
    with torch.no_grad():
        states = model.eye(images)
    assert loss_of(model, (images, *rest)) == pytest.approx(loss_of(model, (states, *rest)), abs=1e-5)
    assert abs(loss_of(model, (images, *rest))["itg"] - loss_of(model, batch)["itg"]) > 1e-3


@pytest.mark.parametrize("off", [{}, {"itc": False}, {"itm": False}, {"itg": False}, {"itc": False, "itm": False}])
def test_switching_one_loss_off_leaves_the_others(model, batch, monkeypatch, off):
    everything, seen, asked = loss_of(model, batch), [], []
    see, see_all = model.see, model.eye.forward
    monkeypatch.setattr(model, "see", lambda image: seen.append(1) or see(image))
    monkeypatch.setattr(model.eye, "forward", lambda images: asked.append(1) or see_all(images))
    losses = lesson.stage1_loss(model, *batch, **off)
    assert losses.keys() == LOSSES - off.keys() and all(loss.ndim == 0 for loss in losses.values())
    assert seen == [1] and not asked  # the queries pass once, and the frozen states are at hand
    for name in losses.keys() - ({"itm"} if "itc" in off else set()):  # whose partners are others
        assert losses[name].item() == pytest.approx(everything[name], abs=1e-6)


@pytest.mark.parametrize("itc", [True, False])
def test_the_temperature_stays_in_its_bounds_where_it_is_used(model, batch, itc):
    for value, kept in ((3.0, TEMPERATURES[1]), (1e-5, TEMPERATURES[0]), (0.2, 0.2)):
        with torch.no_grad():
            model.temp.fill_(value)
        losses = lesson.stage1_loss(model, *batch, itc=itc)
        assert model.temp.item() == pytest.approx(kept if itc else value) and all(v.isfinite() for v in losses.values())


# What one loss alone teaches, and of what is shared, which losses teach it. Blocks 0 and 2 see the picture. What the
# queries make of it in the last block comes too late for a word that is written.
TAUGHT = {
    "vision_proj.weight": {"itc"}, "text_proj.weight": {"itc"}, "temp": {"itc"}, "itm_head.weight": {"itm"},
    "lm_head.dense.weight": {"itg"}, "lm_head.norm.weight": {"itg"}, "lm_head.decoder.bias": {"itg"},
    "ln_vision.weight": LOSSES, "qformer.query_tokens": LOSSES, "qformer.embed.word.weight": LOSSES,
    "qformer.blocks.0.attn.q.weight": LOSSES, "qformer.blocks.0.cross.attn.q.weight": LOSSES,
    "qformer.blocks.1.query_mlp.fc1.weight": LOSSES, "qformer.blocks.1.mlp.fc1.weight": LOSSES,
    "qformer.blocks.2.cross.attn.q.weight": {"itc", "itm"}, "qformer.blocks.2.query_mlp.fc1.weight": {"itc", "itm"},
    "qformer.blocks.2.mlp.fc1.weight": {"itc", "itg"}, "qformer.blocks.2.attn.q.weight": LOSSES,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_each_loss_teaches_its_own_part_and_never_the_eye(model, batch, name):
    images = lesson.pairs("train", 60).images[:3]
    lesson.stage1_loss(model.train(), images, *batch[1:])[name].backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert not [n for n in found if n.startswith("eye.")] and not model.eye.training
    for part, of in TAUGHT.items():
        assert (part in found) == (name in of), part


def test_each_loss_reads_its_own_part_of_a_batch(model, batch):
    names, (image, ids, mask, _, noise) = "image ids mask says noise".split(), batch
    noise.zero_()  # the first wrong partner there is
    other = {"image": image.flip(0), "ids": torch.where(mask, 50, ids), "says": torch.tensor([7, 7, 9]),
             "noise": 1 - noise}  # fmt: skip
    expected = {"image": LOSSES, "ids": LOSSES, "says": {"itc", "itm"}, "noise": {"itm"}}
    before = loss_of(model, batch)
    for name, value in other.items():
        after = loss_of(model, [value if n == name else t for n, t in zip(names, batch, strict=True)])
        assert {n for n, v in after.items() if abs(v - before[n]) > 1e-6} == expected[name], name


# --- what stage 1 starts from ----------------------------------------------------------------------------------------

WORDS = re.compile(r"qformer\.embed\..*|lm_head\..*|qformer\.blocks\.\d+\.(attn|norm1|mlp|norm2)\..*")


def from_words(name: str) -> str:
    """Where a weight of a new Q-Former comes from in a model of words, "" if it stays as it is."""
    name = name.replace(".query_mlp.", ".mlp.").replace(".query_norm.", ".norm2.")
    return name if WORDS.fullmatch(name) else ""


@pytest.mark.parametrize("changes", [{}, {"queries": 5}, {"cross_every": 1}])
def test_words_that_were_read_and_written_alone_are_taken_over_and_the_rest_stays_new(changes):
    words, model = small_part("qformer_words"), BLIP2(replace(TINY, **changes), small_eye("clip"))
    before, read = weights(model), weights(words)
    lesson.start_from_words(model, words)
    taken = set()
    for name, value in model.state_dict().items():
        source = from_words(name)
        assert torch.equal(value, read[source] if source else before[name]), name
        taken |= {source} - {""}
    new = {name for name in before if not from_words(name)}
    assert taken == {name for name in read if WORDS.fullmatch(name)} and not moved(words, read)
    assert {name.split(".")[0] for name in new} == {"ln_vision", "vision_proj", "text_proj", "itm_head", "temp", "eye",
                                                    "qformer"}  # fmt: skip
    assert all(".cross." in name or "query_tokens" in name for name in new if name.startswith("qformer."))
    assert model.lm_head.decoder.weight is model.qformer.embed.word.weight
    with torch.no_grad():
        for p in words.parameters():
            p.zero_()  # nothing is shared with it
    assert model.qformer.blocks[0].mlp.fc1.weight.abs().max() > 0


def test_queries_start_with_the_mlps_of_words(model):
    before = weights(model)
    lesson.start_queries(model)
    for name in moved(model, before):
        assert ".query_mlp." in name or ".query_norm." in name
    for block in model.qformer.blocks:
        assert torch.equal(block.query_mlp.fc1.weight, block.mlp.fc1.weight)
        assert torch.equal(block.query_norm.bias, block.norm2.bias)
        assert block.query_mlp.fc1.weight is not block.mlp.fc1.weight  # and go their own ways


def test_a_q_former_begins_with_words_if_the_recipe_says_so():
    random = {seed: lesson.begin(replace(FEW, words=""), seed=seed) for seed in (1, 2)}
    for seed, model in random.items():
        torch.manual_seed(9)
        before = weights(model)
        lesson.start_from_words(model, small_part("qformer_words"))
        told = lesson.begin(FEW, seed=seed)
        assert moved(told, before) and not moved(told, weights(model)) and told.config == TINY
        assert digest(told.eye) == digest(small_eye("clip"))
    apart = moved(random[1], weights(random[2]))
    assert "qformer.query_tokens" in apart and not [name for name in apart if from_words(name)]
    assert digest(lesson.begin(replace(FEW, eye="blip")).eye) == digest(small_eye("blip"))


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Fitted:
    calls = Fitted()
    monkeypatch.setattr(lesson, "fit", calls)
    return calls


def first_of(recipe: lesson.Recipe, seed: int = 0, **how: object) -> BLIP2:
    return lesson.stage1(recipe, seed=seed, device=CPU, **{"progress": None} | how)[0]


def test_stage_1_gets_the_recipes_numbers_and_losses(fitted, monkeypatch):
    monkeypatch.setattr(lesson, "validation1", lambda recipe: ("watch", recipe))
    recipe = replace(FEW, weight_decay=0.3, warmup=0.2, lr=0.5, steps=9, smoothing=0.25, itm=False)
    model = first_of(recipe, 5, progress="stage 1", times=2)
    (one,) = fitted
    assert one.model is model and changed_tensors(one.start, weights(lesson.begin(recipe, seed=5))) == []
    assert (one.steps, one.lr, one.weight_decay, one.warmup, one.progress) == (9, 0.5, 0.3, 0.2, "stage 1")
    assert one.loss.func is lesson.stage1_loss
    assert one.loss.keywords == {"itc": True, "itm": False, "itg": True, "smoothing": 0.25}
    assert one.evaluate == ("watch", recipe) and one.evaluate_every == 5
    assert all(torch.equal(a, b) for a, b in zip(one.batches(3), lesson.batches(recipe, seed=5)(3), strict=True))
    for name in ("itc", "itg"):
        first_of(replace(recipe, **{name: False}))
        assert fitted[-1].loss.keywords[name] is False and fitted[-1].loss.keywords["itm"] is False


LATER = {"mouth": "mouth_prefix", "second": 9, "second_pages": 30, "second_lr": 0.5, "everything": False}
EARLY = {"model": replace(TINY, queries=2), "eye": "blip", "pages": 50, "levels": (4,), "words": "", "itc": False,
         "itm": False, "itg": False, "smoothing": 0.2, "steps": 5, "batch_size": 2, "lr": 1.0, "weight_decay": 0.9,
         "warmup": 0.9, "end_to_end": 0.5}  # fmt: skip


def test_a_first_stage_is_remembered_by_all_that_it_depends_on(fitted):
    first = first_of(FEW)
    assert len(fitted) == 1 and {f.name for f in fields(FEW)} == {*LATER, *EARLY}
    for name, value in LATER.items():
        assert getattr(FEW, name) != value and first_of(replace(FEW, **{name: value})) is first, name
    assert len(fitted) == 1
    for name, value in EARLY.items():
        assert getattr(FEW, name) != value and first_of(replace(FEW, **{name: value})) is not first, name
    assert first_of(FEW, 1) is not first and first_of(FEW, times=1) is not first
    assert len(fitted) == 1 + len(EARLY) + 2 and len({id(one.model) for one in fitted}) == len(fitted)


def test_only_the_newest_few_are_remembered(fitted, nothing_kept):
    kept = [first_of(FEW, seed) for seed in range(17)]
    assert len(nothing_kept) == 16 and len(fitted) == 17
    assert first_of(FEW, 16) is kept[16] and first_of(FEW, 1) is kept[1] and len(fitted) == 17
    assert first_of(FEW, 0) is not kept[0] and len(fitted) == 18


def test_without_steps_a_first_stage_is_a_new_q_former(fitted):
    recipe = replace(FEW, steps=0, words="")
    model, history = lesson.stage1(recipe, seed=3, device=CPU, progress=None)
    assert not fitted and history == History() and not moved(model, weights(lesson.begin(recipe, seed=3)))
    assert first_of(recipe, 3) is model


def test_a_seed_fixes_both_stages_whatever_was_drawn_before(monkeypatch):
    for name in ("validation1", "validation2"):
        monkeypatch.setattr(lesson, name, lambda _: lambda _: {})
    found = []
    for state, seed in ((1, 3), (2, 3), (3, 4)):
        lesson._FIRST.clear()
        torch.manual_seed(state)
        first = first_of(PLAIN, seed)
        torch.manual_seed(state)
        found.append((weights(first), weights(lesson.stage2(first, PLAIN, seed=seed, progress=None)[0])))
    for same, again, other in zip(*found, strict=True):
        assert not changed_tensors(same, again) and changed_tensors(same, other)


@pytest.mark.parametrize("recipe", [PLAIN, replace(PLAIN, words="", itm=False)])
def test_stage_1_trains_the_q_former_and_leaves_the_eye(recipe, monkeypatch):
    monkeypatch.setattr(lesson, "validation1", lambda recipe: lambda model: {"seen": model.temp.item()})
    eye = digest(small_eye("clip"))
    model, history = lesson.stage1(replace(recipe, lr=0.01), seed=0, device=CPU, progress=None, times=2)
    names = {name.split(".")[0] for name in moved(model, weights(lesson.begin(recipe, seed=0)))}
    heads = {"ln_vision", "qformer", "vision_proj", "text_proj", "temp", "lm_head"}
    assert names == heads | ({"itm_head"} if recipe.itm else set())
    assert digest(model.eye) == eye == digest(small_eye("clip"))
    assert history.steps == 4 and history.metric_steps == [2, 4]
    assert history.losses.keys() == (LOSSES if recipe.itm else LOSSES - {"itm"})


def test_the_temperature_is_sane_after_the_last_update(monkeypatch):
    monkeypatch.setattr(lesson, "fit", lambda model, *_, **__: model.temp.data.fill_(9.0) and History())
    assert first_of(FEW).temp.item() == pytest.approx(TEMPERATURES[1])


def test_stage_2_gets_the_recipes_numbers_and_pages(fitted, monkeypatch, model):
    monkeypatch.setattr(lesson, "validation2", lambda recipe: ("watch", recipe))
    recipe = replace(FEW, weight_decay=0.3, warmup=0.2, second_lr=0.5, second=9, mouth="mouth_prefix")
    second, _ = lesson.stage2(model, recipe, seed=5, progress="stage 2", times=2)
    (one,) = fitted
    assert one.model is second and one.loss is lesson.stage2_loss
    assert (one.steps, one.lr, one.weight_decay, one.warmup, one.progress) == (9, 0.5, 0.3, 0.2, "stage 2")
    assert one.evaluate == ("watch", recipe) and one.evaluate_every == 5
    expected = lesson.batches(recipe, seed=6, pages=recipe.second_pages)
    assert all(torch.equal(a, b) for a, b in zip(one.batches(3), expected(3), strict=True))
    assert one.batches.rows.max() == recipe.second_pages - 1
    assert digest(second.mouth) == digest(small_part("mouth_prefix"))
    begun = {name: value for name, value in one.start.items() if name.startswith("qformer.")}
    assert begun and all(torch.equal(value, model.state_dict()[name]) for name, value in begun.items())


@pytest.mark.parametrize("mouth", MOUTHS)
def test_stage_2_trains_a_copy_and_leaves_eye_mouth_and_first_stage(mouth, monkeypatch, model):
    monkeypatch.setattr(lesson, "validation2", lambda recipe: lambda model: {"seen": 1.0})
    before = weights(model)
    second, history = lesson.stage2(model, replace(PLAIN, mouth=mouth), seed=0, progress=None, times=2)
    assert not moved(model, before) and second.eye is model.eye
    assert digest(second.mouth) == digest(small_part(mouth)) and type(second.mouth) is MOUTHS[mouth]
    learned = {name for name, p in second.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in learned} == {"ln_vision", "qformer", "language_proj"}
    kept = {name for name in learned & before.keys() if torch.equal(second.state_dict()[name], before[name])}
    assert not kept and history.losses.keys() == {"lm"} and history.metric_steps == [2, 4]
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.startswith("eye."))


@pytest.mark.parametrize("stage", [1, 2])
def test_half_a_training_is_no_result(fitted, nothing_kept, model, stage):
    train = {1: lambda **how: lesson.stage1(FEW, seed=0, device=CPU, **how),
             2: lambda **how: lesson.stage2(model, FEW, seed=0, **how)}[stage]  # fmt: skip
    fitted.stop_next = True
    with pytest.raises(KeyboardInterrupt):
        train(progress=None)
    assert len(fitted) == 1 and not nothing_kept
    fitted.stop_next = True
    _, history = train(progress="BLIP-2")  # before eyes: what there is may be looked at, but is not remembered
    assert history.stopped == "by hand" and len(fitted) == 2 and not nothing_kept
    _, history = train(progress="BLIP-2")
    assert not history.stopped and len(fitted) == 3 and len(nothing_kept) == int(stage == 1)


@pytest.mark.parametrize(("name", "steps"), [("stage1_loss", 0), ("stage2_loss", 4)])
def test_ctrl_c_in_the_middle_of_a_step_ends_the_run(monkeypatch, name, steps):
    calls = []

    def interrupted(*args: object, **how: object) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **how)

    real = getattr(lesson, name)
    monkeypatch.setattr(lesson, name, interrupted)
    for function in ("validation1", "validation2"):
        monkeypatch.setattr(lesson, function, lambda _: lambda _: {})
    monkeypatch.setattr(lesson, "measure1", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        lesson.run(FEW, seed=0, device=CPU)
    assert len(calls) == 3 and len(lesson._FIRST) == int(steps > 0)


# --- stage 2: the loss of a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.99, 1 - 2**-24])
def test_a_text_is_cut_so_that_each_word_is_in_one_part_and_one_is_left(share):
    lengths = [1, 2, 7, 16, 3]  # words
    shares = torch.tensor([share, 0.5, share, 0.25, share])
    ids = torch.zeros(5, 18, dtype=torch.long)
    for b, n in enumerate(lengths):
        ids[b, : n + 2] = torch.tensor([CLS, *range(100 * b + 10, 100 * b + 10 + n), SEP])
    before = ids.clone()
    read, there, written, asked = lesson.cut(ids, ids != 0, shares)
    heads = [int(s * n) for s, n in zip(shares.tolist(), lengths, strict=True)]
    assert torch.equal(ids, before) and heads[1] == 1 and heads[3] == 4
    assert read.shape == there.shape == (5, max(heads)) and written.shape == asked.shape
    assert written.shape[1] == max(n - head for n, head in zip(lengths, heads, strict=True)) + 2
    for b, (n, head) in enumerate(zip(lengths, heads, strict=True)):
        told = ids[b, 1 : n + 1].tolist()
        assert head < n and read[b].tolist() == told[:head] + [0] * (read.shape[1] - head)
        end = [*told[head:], SEP]  # after the place where [DEC] will stand
        assert written[b, 1:].tolist() == end + [0] * (written.shape[1] - 1 - len(end))
        assert there[b].tolist() == [place < head for place in range(read.shape[1])]
        assert asked[b].tolist() == [place <= len(end) for place in range(written.shape[1])]


def test_a_text_that_is_not_cut_is_written_whole():
    ids = torch.tensor([[CLS, 20, SEP, 0], [CLS, 21, 22, SEP]])
    read, there, written, asked = lesson.cut(ids, ids != 0, torch.zeros(2))
    assert read.tolist() == [[0], [0]] and not there.any()
    assert torch.equal(written[:, 1:], ids[:, 1:]) and torch.equal(asked, ids != 0)
    for words in range(1, 161):  # the largest share there is, of any number of words, leaves one
        ids = torch.tensor([[CLS, *range(10, 10 + words), SEP]])
        *_, written, asked = lesson.cut(ids, ids > 0, torch.tensor([1 - 2**-24]))
        assert asked.sum() == 3 and written[0, 1:].tolist() == [9 + words, SEP]


def second_loss(model: BLIP2Speaker, batch: Sequence[Tensor]) -> float:
    losses = lesson.stage2_loss(model, *batch)
    assert losses.keys() == {"lm"} and losses["lm"].ndim == 0
    return losses["lm"].item()


def lm_by_hand(model: BLIP2Speaker, batch: Sequence[Tensor], shares: Sequence[float]) -> float:
    """Text by text, word by word: each from [DEC] on, after the picture's prefix and what is read of the text."""
    image, ids, mask, *_ = batch
    costs = []
    with torch.no_grad():
        for b, share in enumerate(shares):
            told = ids[b][mask[b]].tolist()[1:]
            head = int(share * (len(told) - 1)) if model.mouth.has_encoder else 0
            prefix = model.prefix(model.ln_vision(image[b][None]))
            prompt = {"prompt": torch.tensor([told[:head]])} if head else {}
            written = [DEC]
            for word in told[head:]:
                states = model.mouth.write(torch.tensor([written]), prefix, **prompt)
                costs.append(-model.mouth.lm_head(states[0, -1]).log_softmax(0)[word].item())
                written.append(word)
            assert word == SEP
    return float(np.mean(costs))


@pytest.mark.parametrize("mouth", ["mouth", "mouth_prefix"])
def test_a_mouth_learns_nothing_and_is_asked_for_each_word_of_the_text_alone(mouth, batch):
    model = speaking(mouth)
    batch[4][0] = torch.tensor([0.0, 0.6, 0.3])  # nothing is read of the first text, if at all
    expected = lm_by_hand(model, batch, [0.0, 0.6, 0.3])
    assert second_loss(model, batch) == pytest.approx(expected, abs=1e-5)
    if mouth == "mouth_prefix":
        assert abs(lm_by_hand(model, batch, [0.3, 0.6, 0.3]) - expected) > 1e-3
    longer = [torch.cat([t, t.new_zeros(3, 4)], dim=1) for t in batch[1:3]]
    assert second_loss(model, (batch[0], *longer, *batch[3:])) == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        images = lesson.pairs("train", 60).images[:3]
        states = model.eye(images)
    looked = second_loss(model, (images, *batch[1:]))
    assert looked == pytest.approx(second_loss(model, (states, *batch[1:])), abs=1e-5) and abs(looked - expected) > 1e-3


@pytest.mark.parametrize("mouth", ["mouth", "mouth_prefix"])
def test_the_prefix_is_taught_through_the_mouth(mouth, batch):
    model = speaking(mouth).train()
    images = lesson.pairs("train", 60).images[:3]
    lesson.stage2_loss(model, images, *batch[1:])["lm"].backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert found and not [name for name in found if name.startswith(("eye.", "mouth."))]
    assert {"ln_vision.weight", "qformer.query_tokens", "qformer.blocks.2.cross.attn.q.weight",
            "qformer.blocks.2.query_mlp.fc1.weight", "language_proj.weight", "language_proj.bias"} <= found  # fmt: skip


@pytest.mark.parametrize("mouth", ["mouth", "mouth_prefix"])
def test_what_a_batch_decides_in_stage_2(mouth, batch):
    model, (image, ids, mask, says, noise) = speaking(mouth), batch
    before = second_loss(model, batch)
    half = torch.stack([1 - noise[0], noise[1]])
    other = {"image": (image.flip(0), ids, mask, says, noise), "ids": (image, torch.where(mask, 50, ids), mask, says,
             noise), "says": (image, ids, mask, says * 0, noise), "partners": (image, ids, mask, says, torch.stack([
             noise[0], 1 - noise[1]])), "cut": (image, ids, mask, says, half)}  # fmt: skip
    found = {name for name, those in other.items() if abs(second_loss(model, those) - before) > 1e-6}
    assert found == {"image", "ids"} | ({"cut"} if model.mouth.has_encoder else set())


# --- measuring stage 1 -----------------------------------------------------------------------------------------------


class Queries(Oracle):
    """An oracle with several vectors a picture: ITC's similarity is (N, M, Q), that of each query."""

    def __init__(self, images: Tensor, texts: Sequence[str], similarity: Tensor, odds: Tensor | None = None) -> None:
        super().__init__(images, texts, similarity, torch.zeros(similarity.shape[:2]) if odds is None else odds)
        self.config = SimpleNamespace(queries=similarity.shape[2])

    def encode_image(self, images: Tensor) -> Tensor:
        return super().encode_image(images).transpose(1, 2)  # (B, Q, M)


def by_one_of(best: Tensor, low: float = -3.0) -> Tensor:
    """A table of three queries (N, M, 3), of which one has what `best` (N, M) says and the others far less: it is never
    the same one, so that no mean and no fixed query will do."""
    who = (torch.arange(best.shape[0])[:, None] + torch.arange(best.shape[1])) % 3
    table = low - torch.rand(*best.shape, 3, generator=torch.Generator().manual_seed(0))
    return table.scatter(2, who[:, :, None], best[:, :, None].float())


def test_similarities_are_those_of_each_query_with_each_text(model):
    images, texts = full(5)
    ids, mask = lesson.words().encode_batch(texts[:4])
    with torch.no_grad():
        expected = table_by_hand(model, model.eye(images[:4]), ids, mask)
    found = lesson.similarities(model.train(), images, texts[:4])
    assert found.shape == (5, 4, 3) and model.training and not found.requires_grad
    close(found[:4].double(), torch.from_numpy(expected))
    assert found.std() > 0.05
    assert lesson.full_captions("test", 40) == full()[1] and lesson.full_captions("val", 40) == full(split="val")[1]


def test_a_search_by_the_best_query_is_re_ranked_by_itm_plus_the_cosine():
    following = torch.eye(40).roll(1, dims=1)  # the text of the next page
    similarity = 0.9 * torch.eye(40) + 0.5 * following
    odds = torch.full((40, 40), 50.0)  # of pairs that are never asked for
    odds[(torch.eye(40) + following + following.T).bool()] = 0.0
    odds += torch.eye(40) + 1.2 * following  # ITM alone prefers the wrong one, by less than the cosines differ
    images, texts = full()

    def search(best: Tensor, odds: Tensor, k: int = 2) -> list[float]:
        found = lesson.search(Queries(images, texts, by_one_of(best), odds), n=40, k=k)
        assert found.keys() == {"R@1 by ITC, 40", "R@1 re-ranked, 40"}
        return [found["R@1 by ITC, 40"], found["R@1 re-ranked, 40"]]

    assert search(similarity, odds) == [1.0, 1.0]
    assert search(similarity, odds + 0.4 * following) == [1.0, 0.0]  # by more
    # A picture that suits all texts wins all searches for pictures, and spoils no search for a text.
    proud = similarity.clone()
    proud[0] += 2
    assert search(proud, torch.zeros(40, 40), k=1) == pytest.approx([(1 + 1 / 40) / 2] * 2)


def test_preference_compares_the_own_caption_with_the_page_befores():
    odds = torch.full((40, 40), -5.0).fill_diagonal_(-4.0)  # all unlikely, the own ones a little less so
    half = odds.clone()
    half[:20] = -half[:20]
    before = torch.eye(40).roll(-1, dims=1).bool()
    for table, expected in ((odds, 1.0), (-odds, 0.0), (torch.zeros(40, 40), 0.0), (half, 0.5),
                            (odds.masked_fill(before, -3.0), 0.0)):  # fmt: skip
        for split in ("test", "val"):
            oracle = Queries(*full(split=split), torch.eye(40)[:, :, None], table)
            assert lesson.preference(oracle, split, n=40) == expected


def test_what_is_watched_in_stage_1_is_measured_on_validation_pages(monkeypatch):
    data, seen = lesson.pairs("val", 40), []
    texts = [told[FULL] if i < 10 else "a red cat" for i, told in enumerate(data.captions)]
    monkeypatch.setattr(lesson, "write", lambda _, images, how: seen.append((
        how, torch.equal(images, data.images))) or texts)  # fmt: skip
    similarity = torch.eye(40)
    similarity[:20] = similarity[:20].roll(1, dims=1)
    oracle = Queries(*full(split="val"), by_one_of(similarity), torch.eye(40))
    found = lesson.validation1(FEW, n=40)(oracle)
    colours = caption_facts(texts, data.scenes)["colours, precision"]
    assert seen == [("greedy", True)] and 0 < colours < 1
    assert found.keys() == {"val R@1", "val matching", "val colours, Q-Former"}
    assert found["val matching"] == 1.0 and found["val colours, Q-Former"] == colours
    assert found["val R@1"] == pytest.approx(0.5, abs=0.02)
    for loss, name in (("itc", "val R@1"), ("itm", "val matching"), ("itg", "val colours, Q-Former")):
        assert lesson.validation1(replace(FEW, **{loss: False}), n=40)(oracle).keys() == found.keys() - {name}


def test_stage_1_is_measured_by_what_it_has_learned(monkeypatch):
    monkeypatch.setattr(lesson, "preference", lambda _: 0.75)
    monkeypatch.setattr(lesson, "search", lambda _: {"R@1 re-ranked": 0.25})
    seen = []
    monkeypatch.setattr(lesson, "write", lambda _, images, how: seen.append((how, len(images))) or full()[1])
    oracle = Queries(*full(), by_one_of(torch.eye(40)))
    found = lesson.measure1(oracle, FEW)
    assert seen == [("beam", 40)] and found["R@1"] == found["R@10 text to image"] == 1.0 and found["matching"] == 0.75
    assert found["Q-Former: colours, precision"] == found["Q-Former: BLEU"] == 1.0
    assert found["R@1 re-ranked"] == 0.25
    for loss, gone in (("itc", {"R@1 re-ranked"} | {n for n in found if n.startswith("R@")}),
                       ("itm", {"R@1 re-ranked", "matching"}),
                       ("itg", {n for n in found if n.startswith("Q-Former: ")})):  # fmt: skip
        assert lesson.measure1(oracle, replace(FEW, **{loss: False})).keys() == found.keys() - gone, loss


def test_winners_are_the_queries_that_say_most_of_their_own_caption():
    table = torch.full((40, 40, 3), 9.0)  # whatever is said of others' captions
    table[range(40), range(40)] = torch.tensor([0.1, -0.5, 0.3])
    table[range(10), range(10), 1] = 0.4
    assert lesson.winners(Queries(*full(), table), n=40).tolist() == pytest.approx([0, 0.25, 0.75])
    assert lesson.winners(Queries(*full(), table), n=20).tolist() == pytest.approx([0, 0.5, 0.5])
    table[..., 0] = 1.0
    assert lesson.winners(Queries(*full(), table), n=40).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("vectors", "expected"), [
    ([[1.0, 0], [1, 0], [1, 0]], 1.0), ([[1.0, 0], [0, 1]], 0.0), ([[1.0, 0], [-1, 0]], -1.0),
    ([[1.0, 0], [0, 1], [1, 0]], 1 / 3), ([[1.0, 0], [0.6, 0.8]], 0.6), ([[1.0, 0]], None),
])  # fmt: skip
def test_likeness_is_the_mean_cosine_of_two_queries(vectors, expected):
    one = nn.Linear(1, 1)
    one.encode_image = lambda images: torch.tensor(vectors).expand(len(images), -1, -1)
    found = lesson.query_likeness(one, n=40)
    assert np.isnan(found) if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(("at", "name"), [(-1, 2), (0, 0)])
def test_a_query_looks_where_its_attention_falls(model, at, name):
    images, seen = full(4)[0], []
    cross = model.qformer.blocks[name].cross
    hook = cross.register_forward_hook(lambda *call: seen.append(call[-1][1]))
    found = lesson.query_maps(model, images, block=at)
    hook.remove()
    assert found.shape == (4, 3, 16) and (found.sum(-1) < 1).all() and not found.requires_grad
    (weights_of,) = seen
    close(found, weights_of.mean(dim=1)[..., 1:])  # without the class token
    assert found.std(0).max() > 1e-3 and found.std(1).max() > 1e-3
    with torch.no_grad():  # who asks nothing looks everywhere
        cross.attn.q.weight.zero_()
        cross.attn.q.bias.zero_()
    close(lesson.query_maps(model, images, block=at), torch.full((4, 3, 16), 1 / 17))


def test_a_blinded_q_former_sees_no_difference_between_pictures(model, monkeypatch):
    before, seen, real = weights(model), [], lesson.similarities
    monkeypatch.setattr(lesson, "similarities", lambda *args: seen.append((args, real(*args))) or seen[0][1])
    found = lesson.blinded(model, n=40)
    ((blind, images, texts), table) = seen[0]
    assert blind is not model and not moved(model, before) and (len(images), texts) == (40, full()[1])
    close(table, table[:1].expand_as(table))
    assert real(model, images, texts).std(0).max() > 0.01 and table.std(1).max() > 0.01  # it still reads
    with torch.no_grad():
        for block in model.qformer.blocks:
            if block.cross:
                block.cross.forward = lambda q, *_, norm=block.cross.norm, **__: (norm(q), None)
        close(table, real(model, images, texts))
    assert found == lesson03.mean_recall(lesson03.recalls(table.amax(dim=2)))
    seen[:] = [(None, by_one_of(torch.eye(40)))]
    assert lesson.blinded(model, n=40) == 1.0


def test_gaps_are_those_of_the_query_that_wins():
    pictures = by_one_of(torch.eye(40) + 0.1)
    found = lesson.gaps(Queries(*full(), pictures), n=40)
    best = pictures[range(40), range(40)].argmax(1)
    won = torch.stack([pictures[i, :, q] for i, q in enumerate(best)])
    expected = lesson05.modality_gap(won, torch.eye(40))
    assert found == pytest.approx({f"gap, {name}": value for name, value in expected.items()})
    mean = lesson05.modality_gap(pictures.mean(2), torch.eye(40))
    assert abs(mean["distance"] - expected["distance"]) > 0.1


def test_probes_are_decided_by_the_best_query_and_by_itm():
    images, texts = lesson02.probe_pairs("replaced", 4)
    own = torch.eye(8)
    odds, best = own.clone(), own.clone()
    odds[0, 1], odds[3, 2], odds[4, 5] = 2.0, 2.0, 2.0  # three pictures prefer the other's caption
    best[2, 3] = 2.0
    odds[1, 5] = best[1, 5] = best[6, 2] = 9.0  # captions of other probes are never asked for
    found = lesson.probe_numbers(Queries(images, texts, by_one_of(best), odds), "replaced", n=4)
    assert found == {"replaced, ITC": 7 / 8, "replaced, ITM": 5 / 8}


def test_kinds_are_named_by_the_best_query():
    data = lesson03.single_things("test", n=400, tier="normal")
    kinds = data.labels("kind")[0]
    texts = [f"a picture of {lesson.with_article(kind)}" for kind in KINDS]
    seen = [lesson03.TEMPLATES[0].format(lesson.with_article(kind)) for kind in KINDS]
    best = torch.eye(12)[kinds]
    best[: len(kinds) // 2] = best[: len(kinds) // 2].roll(1, dims=1)
    oracle = Queries(data.images, seen, by_one_of(best))
    assert len(texts) == 12 and lesson.zero_shot_kind(oracle) == pytest.approx(1 - (len(kinds) // 2) / len(kinds))


# --- measuring stage 2 -----------------------------------------------------------------------------------------------


def test_prefixes_are_what_the_mouth_is_given_of_each_picture():
    model, images = speaking().train(), full(5)[0]
    found = lesson.prefixes(model, images, batch_size=2)
    assert found.shape == (5, 3, 12) and model.training and not found.requires_grad and found.std(0).max() > 0.01
    with torch.no_grad():
        close(found, torch.cat([model.prefix(model.look(image[None])) for image in images]))


def said_by_hand(model: BLIP2Speaker, text: str, prefix: Tensor | None) -> str:
    """The answer to one question, word by word, each time read from the beginning."""
    asked, mouth = lesson.words().encode(text)[1:-1], model.mouth
    written, start = [], [DEC] if mouth.has_encoder else [DEC, *asked]
    prompt = {"prompt": torch.tensor([asked])} if mouth.has_encoder else {}
    with torch.no_grad():
        while len(written) < 8 and SEP not in written:
            states = mouth.write(torch.tensor([[*start, *written]]), prefix, **prompt)
            written.append(int(mouth.lm_head(states[0, -1]).argmax()))
    return lesson.words().decode(written)


CHANGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "own": lambda p: p, "another": lambda p: p.roll(1, dims=0), "none": lambda p: None,
}  # fmt: skip


@pytest.mark.parametrize("mouth", ["mouth", "mouth_prefix"])
@pytest.mark.parametrize("change", CHANGES)
def test_answers_are_written_about_the_question_and_what_is_left_of_its_picture(monkeypatch, mouth, change):
    model, q = speaking(mouth), lesson02.asked("test", 3)
    shake(model.mouth, 0.5)  # so that it says more than one thing
    with torch.no_grad():
        held = torch.cat([model.prefix(model.look(image[None])) for image in lesson.pairs("test", 3).images])
    held = CHANGES[change](held)
    said = [said_by_hand(model, text, None if held is None else held[row][None])
            for row, text in zip(q.rows.tolist(), q.texts, strict=True)]  # fmt: skip
    known = list(dict.fromkeys(said))
    assert len(known) > 2
    monkeypatch.setattr(lesson, "ANSWERS", known[1:])  # the first thing that is said is no answer
    expected = [known.index(text) - 1 for text in said]
    how = {} if change == "own" else {"prefix": CHANGES[change]}
    assert lesson.answers_of(model, n=3, **how).tolist() == expected and -1 in expected


def test_answers_are_numbered_and_of_the_pages_of_their_split(monkeypatch):
    model, seen = speaking(), []
    for split in ("test", "val"):
        q = lesson02.asked(split, 5)
        said = [ANSWERS[i] for i in q.answers.tolist()]
        said[1] = "red red"

        def answer(mouth: nn.Module, prompts: list, *, prefix: Tensor, said: list[str] = said) -> list[str]:
            seen.append((mouth, len(prompts), prefix))
            return said

        monkeypatch.setattr(lesson, "answers_after", answer)
        expected = q.answers.clone()
        expected[1] = -1
        assert torch.equal(lesson.answers_of(model, split, n=5), expected)
        mouth, count, prefix = seen.pop()
        assert mouth is model.mouth and count == len(q.texts)
        close(prefix, lesson.prefixes(model, lesson.pairs(split, 5).images)[q.rows])


def test_what_is_watched_in_stage_2_is_measured_on_validation_pages(monkeypatch):
    data, seen, model = lesson.pairs("val", 40), [], object()
    texts = [told[FULL] if i < 10 else "a red cat" for i, told in enumerate(data.captions)]
    monkeypatch.setattr(lesson, "write", lambda *args: seen.append(args) or texts)
    answers = lesson02.asked("val", 7).answers
    monkeypatch.setattr(lesson, "answers_of", lambda m, split, n: answers.clone().index_fill_(
        0, torch.arange(len(answers) // 2), -1) if (m, split, n) == (model, "val", 7) else None)  # fmt: skip
    facts = caption_facts(texts, data.scenes)
    assert lesson.validation2(FEW, n=40, asked_of=7)(model) == pytest.approx({
        "val colours": facts["colours, precision"], "val objects": facts["objects, recall"],
        "val VQA": 1 - (len(answers) // 2) / len(answers),
    })  # fmt: skip
    ((written_by, images, how),) = seen
    assert written_by is model and torch.equal(images, data.images) and how == "greedy"


def test_stage_2_is_measured_by_its_captions_and_answers(monkeypatch):
    data, seen = lesson.pairs("test", 40), []
    texts = [told[FULL] if i % 2 else "a red cat" for i, told in enumerate(data.captions[:30])]
    monkeypatch.setattr(lesson, "write", lambda _, images, how: seen.append((images, how)) or texts)
    answers = lesson02.asked("test", 200).answers
    monkeypatch.setattr(lesson, "answers_of", lambda _, n: answers.roll(0 if n == 200 else 1))
    found = lesson.measure2(object(), FEW, n=30)
    ((images, how),) = seen
    assert torch.equal(images, data.images[:30]) and how == "beam"
    expected = caption_facts(texts, data.scenes[:30]) | {
        "BLEU": bleu(texts, [[told[1], told[4]] for told in data.captions[:30]]), "VQA, 200 pages": 1.0,
        "unique": len(set(texts)) / 30,
    }  # fmt: skip
    assert found == pytest.approx(expected) and 0 < found["unique"] < 1


def test_a_majority_is_right_as_often_as_the_commonest_answer_of_each_type():
    q, right = lesson02.asked("test", 500), 0
    for kind in sorted(set(q.types)):
        said = [a for a, t in zip(q.answers.tolist(), q.types, strict=True) if t == kind]
        right += max(map(said.count, said))
    assert lesson.majority() == pytest.approx(right / len(q.types)) and right < len(q.types)
    assert lesson.majority("val", n=40) != lesson.majority()


def test_controls_take_the_picture_away_in_three_ways(monkeypatch):
    model, q, described = speaking(), lesson02.asked("test", 500), []
    (images, texts), own = full(), torch.arange(40.0)[:, None, None] + 1
    of = {image.numpy().tobytes(): text for image, text in zip(images, texts, strict=True)}
    monkeypatch.setattr(lesson, "write", lambda _, images, how: [of[i.numpy().tobytes()] for i in images])
    real = lesson.caption_numbers
    monkeypatch.setattr(lesson, "caption_numbers", lambda texts: described.append(texts) or real(texts))

    def answers_of(_: nn.Module, *, prefix: Callable) -> Tensor:
        """Right where the own picture is shown; without any, the first half; with zeros, nothing."""
        shown = prefix(own)
        there = torch.arange(len(q.rows)) < len(q.rows) // 2 if shown is None else (shown == own)[q.rows, 0, 0]
        return torch.where(there, q.answers, -1)

    monkeypatch.setattr(lesson, "answers_of", answers_of)
    found = lesson.controls(model, n=40)
    assert described[0] == texts[-1:] + texts[:-1] and found["another picture: colours, precision"] < 0.5
    half = lesson02.answered_right(torch.where(torch.arange(len(q.rows)) < len(q.rows) // 2, q.answers, -1), q)
    for name, expected in (("VQA", dict.fromkeys(half, 1.0)), ("VQA, another picture", dict.fromkeys(half, 0.0)),
                           ("VQA, zeros", dict.fromkeys(half, 0.0)), ("VQA, question alone", half)):  # fmt: skip
        for kind, value in expected.items():
            assert found[name if kind == "all" else f"{name}, {kind}"] == pytest.approx(value), (name, kind)
    assert found["VQA, most common answer of the type"] == lesson.majority()
    written = []
    with torch.no_grad():
        while len(written) < lesson07.LONGEST and SEP not in written:
            states = model.mouth.write(torch.tensor([[DEC, *written]]), torch.zeros(1, 3, 12))
            written.append(int(model.mouth.lm_head(states[0, -1]).argmax()))
    assert described[1] == [lesson.words().decode(written)] * 40 and len(described) == 2
    assert {f"zeros: {name}" for name in real(texts)} <= found.keys()


def test_a_fingerprint_shows_the_smallest_change(model):
    found = lesson.weights_hash(model)
    assert re.fullmatch(r"[0-9a-f]{12}", found) and found == lesson.weights_hash(deepcopy(model).train())
    one, two = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert lesson.weights_hash(one) == lesson.weights_hash(two)
    two.running_mean[1] = 1e-30  # buffers, too
    assert lesson.weights_hash(one) != lesson.weights_hash(two)
    other = nn.Module()
    other.scale, other.shift = one.bias, one.weight  # the same numbers by other names
    another = nn.Module()
    another.scale, another.shifted = one.bias, one.weight
    assert lesson.weights_hash(other) != lesson.weights_hash(another)
    with torch.no_grad():
        weight = model.qformer.blocks[1].query_mlp.fc2.bias
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert lesson.weights_hash(model) != found


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All measurements look at few pages, or at 4 probes."""
    small = {"preference": 40, "search": 40, "controls": 10, "winners": 40, "gaps": 40, "blinded": 40, "measure2": 10,
             "query_likeness": 40, "probe_numbers": 4, "validation1": 10}  # fmt: skip
    for name, n in small.items():
        monkeypatch.setattr(lesson, name, fewer(getattr(lesson, name), n))
    monkeypatch.setattr(lesson, "validation2", fewer(lesson.validation2, 10, asked_of=5))
    real = lesson.asked
    monkeypatch.setattr(lesson, "asked", lambda split, n: real(split, min(n, 5)))  # questions about five pages


def test_the_main_run_reports_every_number_that_was_recorded(small_tests):
    run = lesson.run(FEW, seed=0, device=CPU)
    sources = [source for source in (*lesson.SCOREBOARD.values(), *lesson.BOARD.values(), *lesson.HEADLINE[1:])
               if isinstance(source, tuple)]  # fmt: skip
    assert {metric for *_, metric in sources} <= run.metrics.keys()
    shares = {name: value for name, value in run.metrics.items()
              if name not in ("trainable, stage 2", "gap, distance", "likeness of queries")}  # fmt: skip
    assert all(np.isfinite(value) for value in run.metrics.values()) and all(0 <= v <= 1 for v in shares.values())
    assert run.metrics["trainable, stage 2"] == sum(
        p.numel() for name, p in run.model.named_parameters() if not name.startswith(("eye.", "mouth."))
    )
    wins = [run.metrics[f"wins, query {i}"] for i in (1, 2, 3)]
    assert wins == sorted(wins, reverse=True) and sum(wins) == pytest.approx(1) and "wins, query 4" not in run.metrics
    h, watched1 = run.history, {"val R@1", "val matching", "val colours, Q-Former"}
    watched2 = {f"stage 2: val {name}" for name in ("colours", "objects", "VQA")}
    assert h.losses.keys() == LOSSES | {"stage 2: lm"} and h.metrics.keys() == watched1 | watched2
    assert h.began == {"stage 2: lm": 0} and h.metric_steps == [1, 2, 3, 4]
    assert h.measured_at == {key: [1, 2, 3, 4] for key in watched2} and all(len(v) == 4 for v in h.losses.values())
    assert type(run.model) is BLIP2Speaker and type(run.model.mouth) is DecoderLM
    first, history = lesson.stage1(FEW, seed=0, device=CPU, progress=None)
    assert history.losses.keys() == LOSSES and history.metrics.keys() == watched1  # what is remembered stays
    assert run.model.eye is first.eye and run.model.qformer is not first.qformer
    if record.recorded_file(lesson.NAME).exists():
        recorded = record.load(lesson.NAME).runs["main"]["BLIP-2"][0]
        names = {name.replace(", 40", ", 256") for name in run.metrics}
        kinds = {f"VQA{which}, {kind}" for which in ("", ", another picture", ", zeros", ", question alone")
                 for kind in lesson02.asked("test", 40).types}  # fmt: skip # five pages may lack one
        assert names | kinds | {f"wins, query {i}" for i in range(1, 9)} == recorded["metrics"].keys()
        assert {*h.losses, *h.metrics} <= recorded["curves"].keys()


KINDS_OF_RUN = {
    "all three": (PLAIN, {"R@1", "matching", "R@1 re-ranked, 40", "Q-Former: BLEU"}, {"VQA", "wins, query 1"}),
    "without ITC": (replace(PLAIN, itc=False), {"matching", "Q-Former: BLEU"}, {"R@1", "R@1 re-ranked, 40"}),
    "without ITM": (replace(PLAIN, itm=False), {"R@1", "Q-Former: BLEU"}, {"matching", "R@1 re-ranked, 40"}),
    "without ITG": (replace(PLAIN, itg=False), {"R@1", "matching"}, {"Q-Former: BLEU"}),
    "one query": (replace(PLAIN, model=replace(TINY, queries=1)), {"R@1", "matching"}, {"likeness of queries"}),
    "stage 2 alone": (replace(PLAIN, steps=0, words=""), set(), {"R@1", "matching", "Q-Former: BLEU", "VQA"}),
    "encoder-decoder": (replace(PLAIN, mouth="mouth_prefix"), {"R@1", "matching"}, {"VQA"}),
    "end to end": (replace(PLAIN, end_to_end=0.5), {"R@1", "matching", "comprehension"}, {"VQA"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF_RUN)
def test_each_kind_of_run_is_measured_with_what_it_has(small_tests, kind):
    recipe, there, missing = KINDS_OF_RUN[kind]
    run = lesson.run(recipe, seed=0, device=CPU)
    always = {"colours, precision", "BLEU", "unique", "VQA, 200 pages", "trainable, stage 2", "hallucinated"}
    assert always | there <= run.metrics.keys() and not missing & run.metrics.keys()
    assert all(np.isfinite(value) for value in run.metrics.values())
    assert len(run.history.losses["stage 2: lm"]) == recipe.second
    own = {name for name in LOSSES if recipe.steps and getattr(recipe, name)}
    assert run.history.losses.keys() == own | {"stage 2: lm"} and ("comprehension" in run.metrics) == (
        kind == "end to end") == (digest(run.model.eye) != digest(small_eye("clip")))  # fmt: skip


def test_arms_that_differ_in_stage_2_alone_go_on_from_one_first_stage(monkeypatch):
    seen, fits, real = [], [], lesson.fit
    monkeypatch.setattr(lesson, "fit", lambda *args, **how: fits.append(args) or real(*args, **how))
    monkeypatch.setattr(lesson, "stage2", lambda first, *_, **__: seen.append((first, weights(first))) or (
        nn.Linear(1, 1), History()))  # fmt: skip
    for name in ("measure1", "measure2"):
        monkeypatch.setattr(lesson, name, lambda *_: {})
    monkeypatch.setattr(lesson, "validation1", lambda _: lambda _: {})
    arms = [PLAIN, replace(PLAIN, mouth="mouth_prefix"), replace(PLAIN, second_pages=20), replace(PLAIN, itm=False)]
    for recipe in arms:
        lesson.run(recipe, seed=0, device=CPU)
    (one, before), (two, _), (three, after), (other, _) = seen
    assert one is two is three is not other and len(fits) == 2 and not changed_tensors(before, after)


# --- sizes, clock and pages ------------------------------------------------------------------------------------------


@pytest.fixture
def real_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(lesson, "eye_of", real_eye_of)
    monkeypatch.setattr(lesson, "ready_made", real_ready_made)
    monkeypatch.setattr(lesson, "gaps", fewer(lesson.gaps, 40))
    monkeypatch.setattr(lesson, "BASE", replace(lesson.BASE, pages=60, batch_size=4))
    lesson.features.cache_clear()
    yield
    lesson.features.cache_clear()


def test_the_sizes_that_the_lesson_prints_are_those_of_its_models(real_parts):
    first, second = lesson.both_stages()
    counted = {}
    for stage, model, frozen in (("stage 1", first, ("eye.",)), ("stage 2", second, ("eye.", "mouth."))):
        each = {id(p): (name, p.numel()) for name, p in model.named_parameters()}.values()  # tied ones once
        counted[f"all, {stage}"] = sum(n for _, n in each)
        counted[f"trained, {stage}"] = sum(n for name, n in each if not name.startswith(frozen))
        assert 0 < counted[f"trained, {stage}"] < counted[f"all, {stage}"]
    found = lesson.facts()
    assert {name: n for name, n in found.items() if "parameters" in name or name in counted} == counted | {
        "parameters": counted["all, stage 2"]}  # fmt: skip
    kept = lesson.build(lesson.MAIN.model)
    assert {n: t.shape for n, t in kept.state_dict().items()} == {n: t.shape for n, t in second.state_dict().items()}


def test_a_seed_fixes_a_new_model_whether_its_eye_was_asked_for_before_or_not(real_parts):
    """The first run of a process builds the eye, which draws random numbers; the second finds it in the cache."""
    for recipe in (lesson.BASE, replace(lesson.BASE, eye="blip", words="")):
        real_eye_of.cache_clear()
        first, second = (weights(lesson.begin(recipe, seed=3)) for _ in range(2))
        assert not changed_tensors(first, second)
        assert changed_tensors(first, weights(lesson.begin(recipe, seed=4)))


def test_operations_are_counted_of_what_the_lesson_compares_and_gaps_of_new_models(real_parts, monkeypatch):
    counted, begun = [], []

    def count(model: nn.Module, loss: Callable, data: object) -> int:
        counted.append((type(model), loss, data(0)[0].ndim, all(p.requires_grad for p in model.eye.parameters())))
        return len(counted)

    monkeypatch.setattr(lesson, "operations", count)
    monkeypatch.setattr(lesson, "begin", lambda recipe, *, seed: begun.append(recipe) or seed)
    monkeypatch.setattr(lesson, "gaps", lambda seed: {"gap": 10.0 + seed**2})
    found = lesson.facts()
    ways = [(3, False), (4, False), (4, True)]
    assert counted == [(BLIP2, lesson.stage1_loss, *way) for way in ways] + [
        (BLIP2Speaker, lesson.stage2_loss, *way) for way in ways]  # fmt: skip
    names = [f"{stage}{how}" for stage in ("stage 1", "stage 2") for how in ("", ", looking each time", ", end to end")]
    assert [found[f"operations, step, {name}"] for name in names] == [1, 2, 3, 4, 5, 6]
    assert found["before training: gap"] == 10 + (0 + 1 + 4 + 9 + 16) / 5 and begun == [lesson.MAIN] * 5


def test_operations_are_two_for_each_product_there_and_back():
    """B rows by (K, N): 2BKN there, as much for the weights' gradient, and again for the inputs' where it is asked."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Tensor:
            x = self.outer(self.inner(x))[:, None]  # one head
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model, B, T = Attending().eval(), 3, 4
    before, how = weights(model), lambda m, x: {"loss": m(x).sum() * (1.0 if m.training else float("nan"))}
    inner, outer, attention = 2 * B * T * 5 * 7, 2 * B * T * 7 * 7, 2 * B * T * T * 7 * 2
    found = lesson.operations(model, how, lambda step: (torch.randn(B, T, 5),))
    assert found == 2 * inner + 3 * outer + 3 * attention
    assert not moved(model, before) and all(p.grad is None for p in model.parameters()) and not model.training
    lengths = lambda step: (torch.randn(B, T if step % 2 else 3 * T, 5),)  # noqa: E731
    linear = lambda m, x: {"loss": m.inner(x).sum()}  # noqa: E731
    assert lesson.operations(model, linear, lengths) == 2 * 2 * inner  # the mean over batches


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_eye_and_mouth_take_a_share_of_each_update_as_at_a_share_of_the_rate(batch, stage, share):
    """AdamW itself is asked, with a group of its own for what shall be slower."""
    model = lesson.thawed({1: tiny(temperature=0.3), 2: speaking()}[stage]).train()
    loss = {1: lesson.stage1_loss, 2: lesson.stage2_loss}[stage]
    images = lesson.pairs("train", 60).images[:3]
    ours, theirs = deepcopy(model), deepcopy(model)
    slow = lambda name: name.startswith(("eye.", "mouth."))  # noqa: E731
    groups = [{"params": [p for n, p in theirs.named_parameters() if slow(n) == is_slow], "lr": rate}
              for is_slow, rate in ((True, share * 1e-2), (False, 1e-2))]  # fmt: skip
    (hook,) = lesson.slower(ours, share)
    optimizers = torch.optim.AdamW(ours.parameters(), lr=1e-2), torch.optim.AdamW(groups)
    for step in range(3):
        for one, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            sum(loss(one, images, *batch[1:]).values()).backward()
            optimizer.step()
        hook(ours, step)
    for (name, a), b, start in zip(ours.named_parameters(), theirs.parameters(), model.parameters(), strict=True):
        if not name.endswith(("attn.kv.bias", "attn.qkv.bias")):  # of keys: gradients of rounding alone
            close(a - start, b - start, atol=2e-4)
    assert moved(ours, weights(model)) >= {n for n in ours.state_dict() if slow(n) and n.endswith("weight")
                                           and ("fc1" in n or "fc2" in n)}  # fmt: skip


def test_a_run_from_end_to_end_changes_eye_and_mouth_of_its_own_alone(monkeypatch):
    shares, real = [], lesson.slower
    monkeypatch.setattr(lesson, "slower", lambda model, x: shares.append((type(model), x)) or real(model, x))
    for name in ("validation1", "validation2"):
        monkeypatch.setattr(lesson, name, lambda _: lambda _: {})
    recipe, mouths = replace(PLAIN, end_to_end=0.5), []
    monkeypatch.setattr(lesson, "ready_made", lambda name: mouths.append(part := small_part(name)) or part)
    assert lesson.batches(recipe, seed=0)(0)[0].ndim == 4 and lesson.batches(PLAIN, seed=0)(0)[0].ndim == 3
    first, _ = lesson.stage1(recipe, seed=0, device=CPU, progress=None)
    kept = weights(first)
    assert digest(first.eye) != digest(small_eye("clip"))
    second, _ = lesson.stage2(first, recipe, seed=0, progress=None)
    assert shares == [(BLIP2, 0.5), (BLIP2Speaker, 0.5)] and not moved(first, kept)
    assert digest(second.eye) != digest(first.eye)
    assert digest(second.mouth) != digest(mouths[-1]) == digest(small_part("mouth"))
    lesson.stage2(lesson.stage1(PLAIN, seed=0, device=CPU, progress=None)[0], PLAIN, seed=0, progress=None)
    assert [share for _, share in shares[2:]] == [0.0, 0.0] and real(second, 0.0) == []  # frozen: nothing to hold back


@pytest.mark.parametrize("stage", [1, 2])
def test_a_thawed_model_sees_the_same_and_is_trained_from_end_to_end(stage, batch):
    model = {1: tiny(temperature=0.3), 2: speaking()}[stage]
    loss = {1: lesson.stage1_loss, 2: lesson.stage2_loss}[stage]
    before, images = weights(model), lesson.pairs("train", 60).images[:3]
    free = lesson.thawed(model).train()
    assert free is not model and not moved(free, before) and free.eye is not model.eye and free.eye.training
    losses, expected = loss(free, images, *batch[1:]), loss(model, images, *batch[1:])
    for name, value in losses.items():
        close(value, expected[name])
    sum(losses.values()).backward()
    quiet = {name for name, p in free.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert all(p.requires_grad for p in free.parameters())
    assert not [name for name in quiet if name.startswith(("eye.", "ln_vision.", "mouth."))
                and not name.endswith(("attn.kv.bias", "attn.qkv.bias"))]  # fmt: skip
    assert not any(p.requires_grad for p in model.eye.parameters()) and not moved(model, before)
    assert type(model.eye) is Eye and not model.train().eye.training  # the first one stays frozen


def test_a_clock_counts_single_steps_and_a_whole_search(monkeypatch):
    sources = {source for source in lesson.BOARD.values() if isinstance(source, str)}
    asked, trained, searched = [], [], []

    def turns(ways: dict[str, Callable], **_: object) -> dict[str, list[float]]:
        asked.append(list(ways))
        for way in ways.values():
            way()
        return {name: [2.0 * (k + 1), 2.0 * (k + 1), 99.0] for k, name in enumerate(ways)}

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable, ready: list) -> None:
        images, names = {batch[0].ndim for batch in ready}, loss(model, *ready[0]).keys()
        inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
        eyes = sum(id(p) in inside for p in model.eye.parameters())
        trained.append((len(ready), images, set(names), bool(eyes), model.training))

    monkeypatch.setattr(lesson, "take_turns", turns)
    monkeypatch.setattr(lesson05, "take_steps", step)
    monkeypatch.setattr(lesson, "CLOCK_STEPS", 2)
    monkeypatch.setattr(lesson, "BASE", PLAIN)
    monkeypatch.setattr(lesson, "both_stages", lambda real=lesson.both_stages: real(PLAIN))
    monkeypatch.setattr(lesson, "MAIN", replace(FEW, steps=100, second=10))
    monkeypatch.setattr(lesson, "similarities", lambda _, images, texts: searched.append((
        len(images), len(texts))) or torch.zeros(1, 1, 1))  # fmt: skip
    found = lesson.clock(CPU)
    stages = [f"{stage}{how}" for stage in ("stage 1", "stage 2") for how in
              ("", ", looking each time", ", end to end")]  # fmt: skip
    names = [*stages, "stage 1 without ITC", "stage 1 without ITM", "stage 1 without ITG"]
    assert asked == [names, [""]] and searched == [(40, 40)]
    states, pixels = {3}, {4}
    assert trained == [
        *[(2, shown, losses, free, True) for losses in (LOSSES, {"lm"})
          for shown, free in ((states, False), (pixels, False), (pixels, True))],
        *[(2, states, LOSSES - {name}, False, True) for name in ("itc", "itm", "itg")],
    ]  # fmt: skip
    assert found == pytest.approx({f"ms, step, {name}": 1000.0 * (k + 1) for k, name in enumerate(names)} | {
        "training seconds": 100 * 1 + 10 * 4, "ms for 1,000 x 1,000 pairs": 2000})  # fmt: skip
    assert sources == {"parameters", "training seconds", "ms for 1,000 x 1,000 pairs"} <= {*found, "parameters"}


def test_all_pictures_are_drawn_once_before_runs_go_side_by_side(monkeypatch):
    drawn = set()
    monkeypatch.setattr(lesson, "pairs", lambda split, n: drawn.add((split, n)))
    monkeypatch.setattr(lesson02, "probe_pairs", lambda kind: drawn.add(kind))
    monkeypatch.setattr(lesson03, "single_things", lambda split, *, n, tier: drawn.add(("single", split, n, tier)))
    lesson.prepare()

    def default(function: Callable, name: str = "n") -> int:
        return inspect.signature(function).parameters[name].default

    singles = default(lesson.zero_shot_kind)
    assert {
        ("train", lesson.BASE.pages), ("test", 1000), ("test", 200), ("single", "test", singles, "normal"),
        ("val", default(lesson.validation1)), ("val", default(lesson.validation2)),
        ("val", default(lesson.validation2, "asked_of")), ("test", default(lesson.preference)),
        ("test", default(lesson.answers_of)), "replaced", "attribute_swap", "order_swap", "count",
    } <= drawn  # fmt: skip
    assert {recipe.pages for recipe in ARMS.values()} == {lesson.BASE.pages}
