"""Lesson 02's recipes: their batches and losses, that every arm can be built, that a run measures what it says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cache

import pytest
import torch
from lesson_helpers import few_pages

from minivlp.data import TokenTable
from minivlp.data.picturebook.describe import ANSWERS
from minivlp.data.picturebook.probes import probe
from minivlp.evaluate import cloze_accuracy
from minivlp.layers import count_parameters
from minivlp.lessons import vilt as lesson
from minivlp.lessons import vit as lesson01
from minivlp.models.vilt import ViLT, ViLTConfig

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = [pytest.param(recipe, id=f"{experiment}-{arm}")
        for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()]  # fmt: skip
TINY = ViLTConfig(width=32, depth=2, heads=2)
FEW = replace(lesson.MAIN, model=TINY, start="", train_size=400, steps=4, batch_size=8, first=0.5)


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with few_pages(tmp_path_factory, lesson):
        yield


@pytest.fixture
def model() -> ViLT:
    torch.manual_seed(0)
    return ViLT(TINY).eval()


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ARMS)
def test_every_arm_can_be_built_and_starts_from_a_kept_model(recipe):
    assert recipe.start in ("", *lesson01.CHECKPOINTS)
    assert lesson.begin(recipe).config == recipe.model
    assert recipe.batch_size <= recipe.train_size
    assert bool(recipe.mpp) == recipe.model.patch_colours


def test_a_start_from_lesson_01_takes_its_weights():
    torch.manual_seed(0)
    ours, random = lesson.begin(lesson.MAIN), lesson.begin(replace(lesson.MAIN, start=""))
    experiment, arm = lesson01.CHECKPOINTS[lesson.MAIN.start]
    vit = lesson.trained(lesson.MAIN.start, lesson01.ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
    theirs = vit.encoder.blocks[0].attn.q.weight
    assert torch.equal(ours.encoder.blocks[0].attn.q.weight, theirs)
    assert not torch.equal(random.encoder.blocks[0].attn.q.weight, theirs)


def test_each_arm_changes_one_thing():
    base = replace(lesson.EXPERIMENTS["main"]["ViLT"], retrieval=False, answer=0)  # which only measure more
    allowed = {
        "token masking": {"whole_word"}, "without WPA": {"wpa"}, "without modality types": {"modality_types"},
        "random start": {"start"}, "two encoders": {"attend"}, "masked patches too": {"mpp", "patch_colours"},
        "all losses from step 1": {"first"},
    }  # fmt: skip

    def flat(recipe):
        own = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name != "model"}
        return own | {f.name: getattr(recipe.model, f.name) for f in fields(recipe.model)}

    arms = lesson.EXPERIMENTS["changes"]
    assert arms.keys() == allowed.keys()
    for arm, recipe in arms.items():
        assert {k for k, v in flat(recipe).items() if v != flat(base)[k]} == allowed[arm]
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_depend_on_the_step_alone_and_change_with_it():
    data = lesson.pairs("train", 400)
    one, two = (lesson.ViLTBatches(data, FEW, seed=3) for _ in range(2))
    for step in (3, 0, 2):
        assert all(torch.equal(a, b) for a, b in zip(one(step), two(step), strict=True))
    assert not torch.equal(one(2)[0], one(3)[0])
    assert not torch.equal(one(2)[0], lesson.ViLTBatches(data, FEW, seed=4)(2)[0])


def test_the_first_steps_are_the_cloze_alone_on_pages_with_one_thing():
    data = lesson.pairs("train", 400)
    batches = lesson.ViLTBatches(data, FEW, seed=0)
    assert [len(batches(step)) for step in range(4)] == [5, 5, 7, 7]
    single = {tuple(image.flatten()[:3000:7].tolist()) for image, scene in zip(data.images, data.scenes, strict=True)
              if len(scene.things) == 1}  # fmt: skip
    seen = [tuple(image.flatten()[:3000:7].tolist()) for step in range(2) for image in batches(step)[0]]
    assert set(seen) <= single
    later = [tuple(image.flatten()[:3000:7].tolist()) for step in range(2, 12) for image in batches(step)[0]]
    assert not set(later) <= single


def test_a_batch_hides_words_and_exchanges_half_of_the_pictures():
    data = lesson.pairs("train", 400)
    images, ids, mask, hidden, labels, shown, match = lesson.ViLTBatches(data, FEW, seed=0)(2)
    assert match.sum() == len(match) // 2
    assert [torch.equal(a, b) for a, b in zip(images, shown, strict=True)] == match.bool().tolist()
    asked = labels != -100
    assert asked.any() and torch.equal(labels[asked], ids[asked]) and not (asked & ~mask).any()
    assert torch.equal(hidden[~asked], ids[~asked])


def test_false_partners_are_uniform_and_never_the_own_picture():
    generator = torch.Generator().manual_seed(0)
    taken = torch.zeros(6)
    places = torch.zeros(4)
    for _ in range(3000):
        rows = torch.tensor([0, 1, 2, 5])
        partner, match = lesson.false_partners(rows, 6, generator)
        assert match.sum() == 2 and torch.equal(partner == rows, match == 1)
        places += 1 - match
        taken[partner[0]] += 1
    assert (places / 3000 - 0.5).abs().max() < 0.05
    assert (taken[1:] / 3000 - 0.1).abs().max() < 0.03  # half of the time another one, each of five equally often


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_objective_starts_near_chance_and_has_the_parts_asked_for(model):
    batch = lesson.ViLTBatches(lesson.pairs("train", 400), FEW, seed=0)(2)
    losses = lesson.vilt_loss(model, *batch)
    assert set(losses) == {"mlm", "itm", "wpa"}
    assert abs(losses["mlm"].item() - math.log(340)) < 0.2 and abs(losses["itm"].item() - math.log(2)) < 0.1
    assert set(lesson.vilt_loss(model, *batch, wpa=0.0)) == {"mlm", "itm"}
    assert set(lesson.vilt_loss(model, *batch[:5])) == {"mlm"}
    ten = lesson.vilt_loss(model, *batch, wpa=1.0)["wpa"]
    assert torch.allclose(ten, 10 * losses["wpa"], atol=1e-6)


def test_each_loss_reads_its_own_pass(model):
    """MLM sees hidden words and true pictures; ITM sees whole sentences and the exchanged pictures."""
    batch = list(lesson.ViLTBatches(lesson.pairs("train", 400), FEW, seed=0)(2))
    before = lesson.vilt_loss(model, *batch)

    def changed(k):
        other = list(batch)
        other[k] = 255 - batch[k] if batch[k].dtype == torch.uint8 else torch.where(batch[2], 50, batch[k])
        return {n for n, v in lesson.vilt_loss(model, *other).items() if abs((v - before[n]).item()) > 1e-6}

    assert changed(0) == {"mlm"} and changed(3) == {"mlm"}
    assert changed(5) == {"itm", "wpa"} and changed(1) == {"itm", "wpa"}


def test_masked_patches_ask_for_the_mean_colour_of_a_patch():
    model = ViLT(replace(TINY, patch_colours=True))
    images, ids, mask, *_ = lesson.ViLTBatches(lesson.pairs("train", 400), FEW, seed=0)(2)
    loss = lesson.masked_patch_loss(model, images, ids, mask, generator=torch.Generator().manual_seed(0))
    assert abs(loss.item() - math.log(256)) < 0.3
    loss.backward()
    assert model.embed.mask_patch.grad.abs().max() > 0 and model.mpp_head.decoder.weight.grad.abs().max() > 0
    flat = torch.full_like(images, 37)  # every patch has the mean 37: a head that always says so is right
    with torch.no_grad():
        model.mpp_head.decoder.weight.zero_()
        model.mpp_head.decoder.bias.view(3, 256)[:, 37] = 50.0
    right = lesson.masked_patch_loss(model, flat, ids, mask, generator=torch.Generator().manual_seed(0))
    assert right.item() < 1e-3 < loss.item()


# --- measuring -------------------------------------------------------------------------------------------------------


def test_hidden_words_are_the_nouns_or_colours_of_their_captions():
    for facts in (lesson.NOUNS, lesson.COLOUR_NAMES):
        hidden = lesson.sentences("test", 40, facts)
        captions = [lesson.pairs("test", 40).captions[i][1] for i in hidden.rows.tolist()]
        assert len(captions) > 30
        for caption, answer in zip(captions, hidden.answers, strict=True):
            assert any(facts.get(word) == answer for word in caption.split())
        assert cloze_accuracy(hidden, list(hidden.answers)) == 1.0


def test_guesses_follow_the_picture_they_are_given(model):
    """A model that reads the answer off the pixels is right with true pictures, wrong with shuffled and blank ones."""
    data = lesson.pairs("test", 40)
    whole = {name: name for name in lesson.COLOUR_NAMES if len(lesson.words().encode(name)) == 3}  # of one piece
    hidden = lesson.sentences("test", 40, whole)
    code = {int(data.images[row].long().sum()): answer
            for row, answer in zip(hidden.rows.tolist(), hidden.answers, strict=True)}  # fmt: skip

    class Oracle(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anything = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images, ids, mask, rows):
            tokens = [lesson.words().encode(code.get(int(image.long().sum()), "a"))[1] for image in images]
            states = torch.nn.functional.one_hot(torch.tensor(tokens), 340).float()
            return None, {"text": states[:, None].expand(-1, ids.shape[1], -1)}

        def mlm_head(self, states):
            return states

    found = {p: lesson.guess_words(Oracle(), hidden, data.images, picture=p) for p in ("true", "shuffled", "blank")}
    score = {p: cloze_accuracy(hidden, words) for p, words in found.items()}
    assert score["true"] == 1.0 and score["shuffled"] < 0.5 and score["blank"] == 0.0


def test_another_model_can_be_asked_its_own_way(model):
    """`word_scores` is ViLT's way; a lesson with another model gives its own, which sees what ViLT would see."""
    data, seen = lesson.pairs("test", 40), []

    def scores_of(asked, images, ids, mask):
        assert asked is model and not torch.is_grad_enabled()
        seen.append(images)
        return lesson.word_scores(model, images, ids, mask)

    hidden = lesson.sentences("test", 40, lesson.NOUNS)
    for picture in ("true", "shuffled", "blank"):
        ours = lesson.guess_words(model, hidden, data.images, picture=picture, scores_of=scores_of)
        assert ours == lesson.guess_words(model, hidden, data.images, picture=picture)
    assert torch.equal(seen[0], data.images[hidden.rows]) and torch.equal(seen[1], seen[0].roll(1, dims=0))
    assert (seen[2] == lesson.BLANK).all()
    rows, ids, mask = hidden.rows[:3], hidden.ids[:3], hidden.mask[:3]
    with torch.no_grad():
        _, named = model(data.images[rows], ids, mask, rows=ids.shape[1])
        scores = lesson.word_scores(model, data.images[rows], ids, mask)
    assert scores.shape == (*ids.shape, 340) and torch.equal(scores, model.mlm_head(named["text"]))

    def red(_, images, ids, mask):
        (piece,) = lesson.words().encode("red")[1:-1]
        return torch.nn.functional.one_hot(torch.full_like(ids, piece), 340).float()

    found = lesson.grounding(model, n=40, pictures=("true",), scores_of=red)
    colours = lesson.sentences("test", 40, lesson.COLOUR_NAMES)
    whole = [answer for answer, row in zip(colours.answers, colours.ids, strict=True)
             if (row == lesson.words().mask_id).sum() == 1]  # fmt: skip
    share = whole.count("red") / len(colours.answers)
    assert found == {"noun, true picture": 0.0, "colour, true picture": pytest.approx(share)} and share > 0


def test_the_table_of_matches_agrees_with_pair_by_pair(model):
    data = lesson.pairs("test", 40)
    texts = [captions[4] for captions in data.captions[:3]]
    ids, mask = TokenTable(data.captions, lesson.words())(torch.arange(3), 4)
    table = lesson.match_table(model, data.images[:3], texts)
    assert torch.allclose(table.diag(), lesson.matching(model, data.images[:3], ids, mask), atol=1e-5)
    assert table.shape == (3, 3) and table.std() > 0


def test_the_covered_share_of_patches_by_hand():
    scene = lesson.pairs("test", 40).scenes[0]
    thing = replace(scene.things[0], x=16.0, y=24.0, side=16.0)  # the box (8, 16, 24, 32)
    covered = lesson.inside(replace(scene, things=(thing,)), 4).view(4, 4)
    expected = torch.zeros(4, 4)
    expected[1, 0] = expected[1, 1] = 0.5
    assert torch.allclose(covered, expected)


def test_plans_carry_each_word_and_nothing_else(model):
    data = lesson.pairs("test", 40)
    ids, mask = lesson.words().encode_batch([captions[1] for captions in data.captions[:5]])
    plans = lesson.word_plans(model, data.images[:5], ids, mask, iterations=100)
    kept = lesson.word_positions(mask)
    assert (plans.sum(2)[~kept] == 0).all()
    assert torch.allclose(plans.sum((1, 2)), torch.ones(5), atol=1e-4)
    numbers = lesson.pointing(model, n=10)
    assert 0 < numbers["noun on its thing"] < 1 and 0 < numbers["spread evenly"] < 0.5


def test_probe_pictures_and_captions_belong_together():
    images, captions = lesson.probe_pairs("attribute_swap", 2)
    assert images.shape == (4, 3, 64, 64) and images.dtype == torch.uint8
    made = [probe(index, "attribute_swap") for index in range(2)]
    assert captions == tuple(text for p in made for text in (p.caption_a, p.caption_b))
    assert not torch.equal(images[0], images[1])


def test_a_probe_is_scored_with_each_picture_and_each_caption(model, monkeypatch):
    """A model that knows the right pairs by heart passes every probe, one that has them backwards none."""
    images, captions = lesson.probe_pairs("replaced", 5)
    texts = {tuple(lesson.words().encode(text)): k for k, text in enumerate(captions)}
    pixels = {int(image.long().sum()): k for k, image in enumerate(images)}

    def knowing(sign):
        def matching(_, shown, ids, mask):
            own = [texts[tuple(row[kept].tolist())] for row, kept in zip(ids, mask, strict=True)]
            seen = [pixels[int(image.long().sum())] for image in shown]
            return torch.tensor([sign if a == b else -sign for a, b in zip(own, seen, strict=True)])

        return matching

    for sign, expected in ((1.0, 1.0), (-1.0, 0.0)):
        monkeypatch.setattr(lesson, "matching", knowing(sign))
        assert set(lesson.probe_accuracy(model, "replaced", n=5).values()) == {expected}


def test_questions_keep_their_pictures_and_answers(model):
    q = lesson.asked("test", 40)
    assert len(q.rows) == len(q.texts) == len(q.types) == len(q.answers) == len(q.ids)
    assert q.answers.max() < len(ANSWERS) and q.rows.max() < 40
    truth = lesson.answered_right(q.answers.clone(), q)
    assert set(truth.values()) == {1.0} and truth.keys() == {"all", *q.types}
    none = lesson.answered_right(q.answers + 1, q)
    assert set(none.values()) == {0.0}


def test_fine_tuning_for_questions_leaves_the_model_alone_and_can_hide_pictures(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tuned, history = lesson.learn_to_answer(model, FEW, seed=0, steps=2, pages=40, progress=None)
    assert history.steps == 2 and tuned.answer_head[-1].out_features == len(ANSWERS)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(tuned.encoder.blocks[0].attn.q.weight, model.encoder.blocks[0].attn.q.weight)
    blank = lesson.answers_of(tuned, n=40, blank=True)
    q = lesson.asked("test", 40)
    same = {}
    for text, answer in zip(q.texts, blank.tolist(), strict=True):  # without a picture, one question has one answer
        assert same.setdefault(text, answer) == answer


def test_a_run_reports_every_number_of_the_scoreboard(monkeypatch):
    monkeypatch.setattr(lesson, "asked", cache(lambda split, n: lesson_asked(split, min(n, 40))))
    monkeypatch.setattr(lesson, "probe_pairs", cache(lambda kind, n: real_probes(kind, 4)))
    probes, search = lesson.probe_accuracy, lesson.retrieval
    monkeypatch.setattr(lesson, "probe_accuracy", lambda model, kind: probes(model, kind, n=4))
    monkeypatch.setattr(lesson, "retrieval", lambda model: search(model, queries=2, gallery=10))
    run = lesson.run(replace(FEW, answer=1), seed=0, device=CPU)
    wanted = {"noun, true picture", "colour, shuffled picture", "colour, blank picture", "matching, level 4", "VQA",
              "VQA, question alone", "R@1 text to image", "R@1 image to text", "zero-shot kind", "attribute_swap",
              "order_swap", "noun on its thing"}  # fmt: skip
    assert wanted <= run.metrics.keys()
    assert all(0 <= value <= 1 for value in run.metrics.values())
    assert [len(run.history.losses[name]) for name in ("mlm", "itm", "wpa")] == [4, 2, 2]


lesson_asked, real_probes = lesson.asked, lesson.probe_pairs.__wrapped__


def test_the_model_has_the_size_that_the_lesson_prints():
    with torch.device("meta"):
        assert count_parameters(ViLT(ViLTConfig())) == 1_023_702
