"""Lesson 05's recipes: the batches with their planted noise, the three losses of a step, what each measurement says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lesson_helpers import Oracle, few_pages, fewer, repeats_to_the_last_digit
from torch import Tensor, nn
from tower_helpers import shake

from minivlp.data import TokenTable
from minivlp.layers import count_parameters
from minivlp.lessons import albef as lesson
from minivlp.lessons import clip as lesson03
from minivlp.lessons import vilt as lesson02
from minivlp.lessons import vit as lesson01
from minivlp.losses import IGNORE, masked_lm_loss
from minivlp.models.albef import ALBEF, TEMPERATURES, ALBEFConfig, MomentumALBEF, belong
from minivlp.models.vlmo import VLMo, VLMoConfig

torch.set_num_threads(1)
CPU = torch.device("cpu")
ARMS = [pytest.param(recipe, id=f"{experiment}-{arm}")
        for experiment, arms in lesson.EXPERIMENTS.items() for arm, recipe in arms.items()]  # fmt: skip
TINY = ALBEFConfig(
    image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1, fusion_depth=2, text_heads=2,
    embed_dim=8,
)  # fmt: skip
FEW = replace(lesson.MAIN, model=TINY, start="", train_size=400, steps=4, batch_size=8, queue=16)
NOISY = replace(FEW, noise=0.5)  # of 400 pages: one ring of 200
B = FEW.batch_size
FULL = 4  # the level of the full captions


@pytest.fixture(scope="module", autouse=True)
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    cached = lesson.pages_to_point_at, lesson.probe_pairs
    for function in cached:
        function.cache_clear()
    with few_pages(tmp_path_factory, lesson, lesson02, lesson03):
        yield
    for function in cached:  # other tests have more pages
        function.cache_clear()


@pytest.fixture(scope="module")
def drawn(few: None) -> tuple[tuple[Tensor, ...], ...]:
    """Two batches of the same pages, made once."""
    batches = lesson.ALBEFBatches(lesson.pairs("train", 400), FEW, seed=0)
    return batches(3), batches(20)


@pytest.fixture
def batch(drawn: tuple[tuple[Tensor, ...], ...]) -> tuple[Tensor, ...]:
    return tuple(t.clone() for t in drawn[0])


@pytest.fixture
def model(drawn: tuple[tuple[Tensor, ...], ...]) -> MomentumALBEF:
    """A student, a teacher that has drifted from it, and a queue with some pairs in it."""
    torch.manual_seed(0)
    model = lesson.begin(FEW)
    with torch.no_grad():
        for weight in model.teacher.parameters():
            weight += 0.1 * torch.randn_like(weight)
    model.queue.push(*unit(2, B, TINY.embed_dim), *drawn[1][5:7])
    return model.train()


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def with_a_twin(batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The batch, but page 1 has captions that say the same as those of page 0."""
    images, ids, mask, hidden, labels, shows, says, noise, alpha = batch
    shows, says = shows.clone(), says.clone()
    shows[1], says[1] = shows[0], says[0]
    return images, ids, mask, hidden, labels, shows, says, noise, alpha


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ARMS)
def test_every_arm_can_be_built_and_its_queue_filled(recipe):
    model = lesson.begin(recipe)
    assert model.student.config == recipe.model and model.momentum == recipe.momentum
    assert recipe.start in ("", *lesson01.CHECKPOINTS) and recipe.batch_size <= recipe.train_size
    assert model.queue.shows.shape == (recipe.queue, len(set(recipe.levels))) and not recipe.queue % recipe.batch_size
    assert recipe.negatives in ("hard", "uniform", "argmax") and recipe.duplicates in ("masked", "wrong")
    assert len(lesson.rings(recipe.train_size, recipe.noise)) == recipe.noise * recipe.train_size / lesson.PLANTED


def test_a_start_from_lesson_01_takes_its_weights_into_student_and_teacher():
    torch.manual_seed(0)
    ours, random = lesson.begin(lesson.MAIN), lesson.begin(replace(lesson.MAIN, start=""))
    experiment, arm = lesson01.CHECKPOINTS[lesson.MAIN.start]
    vit = lesson.trained(lesson.MAIN.start, lesson01.ViT(lesson01.EXPERIMENTS[experiment][arm].model), own=False)
    theirs = vit.encoder.blocks[0].attn.q.weight
    for one in (ours.student, ours.teacher):
        assert torch.equal(one.vision.encoder.blocks[0].attn.q.weight, theirs)
    assert not torch.equal(random.student.vision.encoder.blocks[0].attn.q.weight, theirs)


def test_each_arm_changes_what_its_name_says():
    noise, large = {"noise"}, {"queue"}
    allowed = {  # compared with SHORT, below the line with SMALL
        ("leave one out", "all"): set(), ("leave one out", "without ITC"): {"itc"},
        ("leave one out", "without hard negatives"): {"negatives"}, ("leave one out", "without MoD"): {"alpha"},
        ("changes", "the most similar one"): {"negatives"}, ("changes", "false negatives kept"): {"duplicates"},
        ("queue", "Q = 0"): large, ("queue", "Q = 1,024"): large,
        # -----
        ("noise", "0%, one-hot"): {"alpha"}, ("noise", "0%, MoD"): set(),
        ("noise", "20%, one-hot"): {"alpha"} | noise, ("noise", "20%, MoD"): noise,
        ("noise", "40%, one-hot"): {"alpha"} | noise, ("noise", "40%, MoD"): noise,
        ("queue as large as the corpus", "masked"): large,
        ("queue as large as the corpus", "not masked"): large | {"duplicates"},
    }  # fmt: skip

    def changed(recipe, base):
        return {f.name for f in fields(recipe) if getattr(recipe, f.name) != getattr(base, f.name)}

    arms = {(e, arm): recipe for e, group in lesson.EXPERIMENTS.items() for arm, recipe in group.items()}
    main = arms.pop(("main", "ALBEF"))
    assert main == lesson.MAIN and changed(lesson.SHORT, main) == {"steps", "everything"}
    assert changed(lesson.SMALL, lesson.SHORT) == {"train_size", "itm", "steps"}
    assert arms.keys() == allowed.keys()
    for (experiment, arm), recipe in arms.items():
        base = lesson.SMALL if experiment in ("noise", "queue as large as the corpus") else lesson.SHORT
        assert changed(recipe, base) == allowed[experiment, arm], arm
    values = {
        ("leave one out", "without ITC"): ("itc", False), ("leave one out", "without MoD"): ("alpha", 0.0),
        ("leave one out", "without hard negatives"): ("negatives", "uniform"),
        ("changes", "the most similar one"): ("negatives", "argmax"),
        ("changes", "false negatives kept"): ("duplicates", "wrong"),
        ("queue", "Q = 0"): ("queue", 0), ("queue", "Q = 1,024"): ("queue", 1024),
        ("queue as large as the corpus", "masked"): ("queue", 1024),
        ("queue as large as the corpus", "not masked"): ("duplicates", "wrong"),
        **{("noise", f"{share}%, {name}"): ("noise", share / 100) for share in (0, 20, 40)
           for name in ("one-hot", "MoD")},
    }  # fmt: skip
    for arm, (name, value) in values.items():
        assert getattr(arms[arm], name) == value, arm
    for (_, arm), recipe in arms.items():
        assert (recipe.alpha == 0) == (arm.endswith("one-hot") or arm == "without MoD")
    for experiment, arm in lesson.CHECKPOINTS.values():
        assert arm in lesson.EXPERIMENTS[experiment]


def test_a_recipe_decides_what_the_loss_is_told():
    plain = {"itc": True, "itm": True, "masked": True, "negatives": "hard", "distil": True}
    changes = {
        (): {}, (("itm", False),): {"itm": False}, (("alpha", 0.0),): {"distil": False},
        (("duplicates", "wrong"),): {"masked": False}, (("negatives", "argmax"),): {"negatives": "argmax"},
        (("itc", False),): {"itc": False, "negatives": "uniform"},  # no similarities to draw by
    }  # fmt: skip
    for changed, expected in changes.items():
        assert lesson.loss_of(replace(FEW, **dict(changed))).keywords == plain | expected


# --- what captions say, and noise ------------------------------------------------------------------------------------


def test_captions_of_equal_meaning_have_equal_numbers_and_levels_share_none():
    data = lesson.pairs("train", 400)
    levels = (0, 1, 4)
    numbers = lesson.sayings(data, levels)
    assert numbers.shape == (400, 3)
    pairs_seen = 0
    for k, level in enumerate(levels):
        meanings = [lesson.meaning(scene, level) for scene in data.scenes]
        for i in range(60):
            for j in range(i):
                assert (meanings[i] == meanings[j]) == (numbers[i, k] == numbers[j, k]).item()
                pairs_seen += meanings[i] == meanings[j]
        assert len(set(meanings)) == len(numbers[:, k].unique())
    assert pairs_seen > 20
    columns = [set(numbers[:, k].tolist()) for k in range(3)]
    assert not columns[0] & columns[1] and not columns[1] & columns[2] and not columns[0] & columns[2]
    assert torch.equal(lesson.sayings(data, (1,)).unique(), torch.arange(len(columns[1])))
    k = next(i for i, scene in enumerate(data.scenes) if len(scene.things) == 1)
    scene = replace(data.scenes[k], things=(replace(data.scenes[k].things[0], x=1.0, y=2.0),))  # only moved
    twins = SimpleNamespace(scenes=[data.scenes[k], scene])
    assert torch.equal(*lesson.sayings(twins, levels))


def test_rings_are_always_the_same_pages_and_no_page_stands_in_two():
    rings = lesson.rings(1000, 0.4)
    assert rings.shape == (2, 200) and len(rings.unique()) == 400 and rings.max() < 1000 and rings.min() >= 0
    torch.manual_seed(9)
    assert torch.equal(rings, lesson.rings(1000, 0.4))
    assert lesson.rings(1000, 0.0).shape == (0, 200)
    assert lesson.rings(12, 0.5, group=3).shape == (2, 3)
    assert not torch.equal(rings.flatten().sort().values, torch.arange(400))  # spread over all pages
    message = "^30 pages cannot be cut into rings of 200: choose another share or size$"
    with pytest.raises(ValueError, match=message):
        lesson.rings(100, 0.3)


def test_planted_noise_passes_captions_on_within_a_ring():
    source = lesson.plant_noise(1000, 0.4)
    assert torch.equal(source.sort().values, torch.arange(1000))  # no caption is lost or doubled
    moved = source != torch.arange(1000)
    rings = lesson.rings(1000, 0.4)
    assert moved.sum() == 400 and moved[rings].all()
    for ring in rings.tolist():
        assert source[ring].tolist() == [ring[-1], *ring[:-1]]
    assert torch.equal(lesson.plant_noise(7, 0.0), torch.arange(7))


# --- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_all_that_a_step_needs(batch):
    images, ids, mask, hidden, labels, shows, says, noise, alpha = batch
    assert images.shape == (B, 3, 64, 64) and images.dtype == torch.uint8
    assert ids.shape == mask.shape == hidden.shape == labels.shape and len(ids) == B
    assert shows.shape == (B, 2) and says.shape == (B,) and noise.shape == (2, B) and alpha.shape == ()
    asked = labels != IGNORE
    assert asked.any() and torch.equal(labels[asked], ids[asked]) and not (asked & ~mask).any()
    assert torch.equal(hidden[~asked], ids[~asked]) and not torch.equal(hidden, ids)
    assert noise.min() >= 0 and noise.max() < 1 and not torch.equal(*noise)
    assert belong(shows, says).diag().all()


def test_batches_depend_on_seed_and_step_alone():
    data = lesson.pairs("train", 400)
    one, two = (lesson.ALBEFBatches(data, FEW, seed=3) for _ in range(2))
    for step in (3, 0, 2):
        torch.manual_seed(step)
        assert all(torch.equal(a, b) for a, b in zip(one(step), two(step), strict=True))
    for other in (one(3), lesson.ALBEFBatches(data, FEW, seed=4)(2)):
        assert not torch.equal(one(2)[0], other[0]) and not torch.equal(one(2)[7], other[7])


def test_batches_take_their_levels_as_often_as_the_recipe_says():
    batches = lesson.ALBEFBatches(lesson.pairs("train", 400), replace(FEW, levels=(4, 1, 1)), seed=0)
    assert batches.levels == [1, 4] and batches.sayings.shape == (400, 2)
    levels = Counter()
    for step in range(150):
        _, ids, _, _, _, shows, says, _, _ = batches(step)
        (column,) = [k for k in range(2) if torch.equal(shows[:, k], says)]
        level = batches.levels[column]
        levels[level] += 1
        rows = batches.order.indices(step)
        assert torch.equal(shows, batches.sayings[rows])
        assert torch.equal(ids, batches.table(rows, level)[0])
    assert levels[1] / 150 == pytest.approx(2 / 3, abs=0.12)
    half = lesson.ALBEFBatches(lesson.pairs("train", 400), replace(FEW, share=0.1), seed=0)
    hidden = [sum((b(step)[4] != IGNORE).sum().item() for step in range(20)) for b in (batches, half)]
    assert hidden[0] > 2.5 * hidden[1] > 0


def test_planted_noise_exchanges_captions_and_training_believes_them():
    data = lesson.pairs("train", 400)
    clean, noisy = (lesson.ALBEFBatches(data, recipe, seed=1) for recipe in (FEW, NOISY))
    source, moved = lesson.plant_noise(400, 0.5), 0
    for step in range(8):
        a, b, rows = clean(step), noisy(step), clean.order.indices(step)
        assert torch.equal(a[0], b[0]) and torch.equal(a[0], data.images[rows])  # the pictures stay
        level = clean.levels[int(torch.where((a[5] == a[6][:, None]).all(0))[0][0])]
        for i, row in enumerate(rows.tolist()):
            caption = data.captions[source[row]][level]
            assert b[1][i][b[2][i]].tolist() == lesson.words().encode(caption)
            assert b[6][i] == noisy.sayings[source[row], clean.levels.index(level)]
            assert torch.equal(b[5][i], noisy.sayings[source[row]])
            moved += int(source[row] != row)
    assert 8 * B * 0.3 < moved < 8 * B * 0.7


def test_the_teachers_share_grows_in_a_straight_line():
    assert [lesson.ramped(0.4, step, 8) for step in (0, 2, 4, 8, 100)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert lesson.ramped(0.4, 0, 0) == 0.4 and lesson.ramped(0.0, 5, 3) == 0
    recipe = replace(FEW, steps=20, ramp=0.5, alpha=0.4)
    batches = lesson.ALBEFBatches(lesson.pairs("train", 400), recipe, seed=0)
    assert [batches(step)[-1].item() for step in (0, 5, 10, 19)] == pytest.approx([0, 0.2, 0.4, 0.4])
    assert batches(3)[-1].dtype == torch.float32


# --- losses ----------------------------------------------------------------------------------------------------------


def itc_by_hand(query: Tensor, query_t: Tensor, keys: Tensor, temp: float, alpha: float, same: Tensor) -> float:
    """One direction in double precision, a loop over the keys that take part."""
    losses = []
    for i in range(len(query)):
        kept = [j for j in range(len(keys)) if j == i or not same[i, j]]
        log_p = (keys[kept].double() @ query[i].double() / temp).log_softmax(0)
        q = (keys[kept].double() @ query_t[i].double() / temp).softmax(0)
        losses.append(-(alpha * (q * log_p).sum() + (1 - alpha) * log_p[kept.index(i)]).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_itc_is_the_papers_formula_and_leaves_out_who_also_belongs(alpha):
    torch.manual_seed(0)
    vectors, teacher, queue = (tuple(unit(n, 5) for _ in range(2)) for n in (3, 3, 4))
    keys = tuple(torch.cat(pair) for pair in zip(teacher, queue, strict=True))
    same = tuple(torch.eye(3, 7, dtype=torch.bool) for _ in range(2))
    same[0][0, 1], same[0][2, 5], same[1][1, 6] = True, True, True  # in the batch, and in the queue
    temp = torch.tensor(0.2)
    loss, to_text, to_image = lesson.itc_loss(vectors, teacher, keys, temp, torch.tensor(alpha), same)
    by_hand = [itc_by_hand(vectors[0], teacher[0], keys[1], 0.2, alpha, same[0]),
               itc_by_hand(vectors[1], teacher[1], keys[0], 0.2, alpha, same[1])]  # fmt: skip
    assert loss.item() == pytest.approx(sum(by_hand) / 2, abs=1e-5) and abs(by_hand[0] - by_hand[1]) > 0.01
    assert torch.allclose(to_text, vectors[0] @ keys[1].T / 0.2, atol=1e-6)
    assert torch.allclose(to_image, vectors[1] @ keys[0].T / 0.2, atol=1e-6)
    own = (torch.eye(3, 7, dtype=torch.bool),) * 2
    everyone = lesson.itc_loss(vectors, teacher, keys, temp, torch.tensor(alpha), own)[0]
    assert abs(everyone.item() - loss.item()) > 1e-3


def test_itc_learns_from_no_pair_that_is_left_out():
    torch.manual_seed(0)
    query, keys = unit(2, 3, 5), unit(2, 7, 5)
    same = torch.eye(3, 7, dtype=torch.bool).repeat(2, 1, 1)
    same[:, 0, 4] = True
    slopes = []
    for moved in (False, True):
        keys[:, 4] = unit(2, 5) if moved else keys[:, 4]
        for of in (0, 1):  # the left out key moves: for row 0 nothing changes
            leaf = query.clone().requires_grad_()
            lesson.itc_loss(tuple(leaf), tuple(query), tuple(keys), torch.tensor(1.0), torch.tensor(0.4),
                            tuple(same))[0].backward()  # fmt: skip
            slopes.append(leaf.grad[of])
    for of in (0, 1):
        assert torch.allclose(slopes[of][0], slopes[2 + of][0], atol=1e-6)
        assert not torch.allclose(slopes[of][1:], slopes[2 + of][1:], atol=1e-3)


@pytest.mark.parametrize("how", ["hard", "uniform", "argmax"])
def test_wrong_partners_are_drawn_as_often_as_they_should(how):
    similarity = torch.tensor([5.0, 2.0, 1.0, -1.0, 9.0]).expand(5000, 5)
    forbidden = torch.tensor([False, False, False, False, True]).expand(5000, 5)  # the most similar one
    drawn = lesson.wrong_partners(similarity, forbidden, torch.linspace(0, 1 - 1e-6, 5000), how)
    found = torch.bincount(drawn, minlength=5) / 5000
    chance = {"uniform": torch.full((4,), 0.25), "argmax": torch.tensor([1.0, 0, 0, 0])}
    if how == "hard":  # in proportion to the softmax over all five, and 1e-4 for each
        chance["hard"] = similarity[0].softmax(0)[:4] + 1e-4
        chance["hard"] /= chance["hard"].sum()
        assert found[0] > 10 * found[1] > 0 < found[3]
    assert found[4] == 0 and torch.allclose(found[:4], chance[how], atol=2e-3)


def test_each_row_has_its_own_forbidden_partners():
    torch.manual_seed(0)
    forbidden = torch.eye(6, dtype=torch.bool)
    forbidden[0, 1:5] = True
    for how in ("hard", "uniform", "argmax"):
        for _ in range(30):
            drawn = lesson.wrong_partners(20 * torch.randn(6, 6), forbidden, torch.rand(6), how)
            assert drawn[0] == 5 and not forbidden[torch.arange(6), drawn].any()


def test_itm_asks_one_true_pair_and_two_wrong_ones_each(monkeypatch):
    text = torch.arange(3.0)[:, None, None].expand(3, 4, 2)
    image = 10 * torch.arange(3.0)[:, None, None].expand(3, 5, 2)
    mask = torch.arange(4) < torch.tensor([4, 3, 2])[:, None]
    seen = []
    scores = torch.randn(9, 2)

    def match(*args):
        seen.append(args)
        return scores

    other_image, other_text = torch.tensor([1, 2, 0]), torch.tensor([2, 0, 1])
    loss = lesson.itm_loss(SimpleNamespace(match=match), image, text, mask, other_image, other_text)
    ((texts, masks, images),) = seen
    assert texts[:, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 2, 0, 1]
    assert images[:, 0, 0].tolist() == [0, 10, 20, 10, 20, 0, 0, 10, 20]
    assert masks.sum(1).tolist() == [4, 3, 2, 4, 3, 2, 2, 4, 3]  # each text brings its own
    log = scores.log_softmax(1)
    expected = -(log[:3, 1].sum() + log[3:, 0].sum()) / 9
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_itm_teaches_the_same_to_the_last_digit_each_time():
    assert repeats_to_the_last_digit(lesson.itm_loss)


def test_the_teacher_follows_before_it_is_asked(model, batch):
    images, ids, mask, hidden, labels, *_ = batch
    student = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    before = {name: p.clone() for name, p in model.teacher.named_parameters()}
    image, text, scores = lesson.ask_teacher(model, images, ids, mask, hidden, labels, guess=True)
    for name, weight in model.teacher.named_parameters():
        expected = model.momentum * before[name] + (1 - model.momentum) * student[name]
        assert torch.allclose(weight, expected, atol=1e-6) and not torch.equal(weight, before[name]), name
    assert not any(p.grad is not None or p.requires_grad for p in model.teacher.parameters())
    assert not any(t.requires_grad for t in (image, text, scores))
    with torch.no_grad():
        teacher = model.teacher
        assert torch.allclose(image, teacher.encode_image(images), atol=1e-6)
        assert torch.allclose(text, teacher.encode_text(ids), atol=1e-6)
        fused, _ = teacher.text(hidden, mask, teacher.vision(images))
        asked = labels != IGNORE
        assert scores.shape == (asked.sum(), TINY.vocab_size)
        assert torch.allclose(scores, teacher.mlm_head(fused)[asked], atol=1e-5)
    assert lesson.ask_teacher(model, images, ids, mask, hidden, labels, guess=False)[2] is None


SWITCHES = {
    (): {"itc", "itm", "mlm"}, ("itc",): {"itm", "mlm"}, ("itm",): {"itc", "mlm"}, ("itc", "itm"): {"mlm"},
    ("distil",): {"itc", "itm", "mlm"}, ("masked",): {"itc", "itm", "mlm"},
}  # fmt: skip


@pytest.mark.parametrize("off", SWITCHES)
def test_the_objective_has_the_parts_asked_for_and_teaches_the_student_alone(model, batch, off):
    losses = lesson.albef_loss(model, *batch, **dict.fromkeys(off, False))
    assert set(losses) == SWITCHES[off] and all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    idle = {"itc": ("vision_proj", "text_proj", "temp"), "itm": ("itm_head",)}
    idle = tuple(name for part in off for name in idle.get(part, ()))
    for name, p in model.student.named_parameters():
        learns = p.grad is not None and p.grad.abs().max() > 0
        assert learns != name.startswith(idle), name
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not any(b.requires_grad for b in model.queue.buffers())


def test_the_temperature_is_kept_before_it_is_used(model, batch):
    for wild, kept in ((3.0, TEMPERATURES[1]), (-1.0, TEMPERATURES[0])):
        two = deepcopy(model), deepcopy(model)
        for one, value in zip(two, (wild, kept), strict=True):
            with torch.no_grad():
                one.student.temp.fill_(value)
        found = [lesson.albef_loss(one, *batch)["itc"].item() for one in two]
        assert two[0].student.temp.item() == pytest.approx(kept) and found[0] == pytest.approx(found[1])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_itc_compares_with_the_teachers_vectors_and_the_queue(model, batch, masked, alpha):
    batch = with_a_twin((*batch[:-1], torch.tensor(alpha)))
    images, ids, mask, hidden, labels, shows, says, *_ = batch
    other = int((shows[0] == says[0]).nonzero()[0]) ^ 1  # the column of the level that is not read
    with torch.no_grad():
        model.queue.shows[3], model.queue.says[3] = shows[2], says[2]  # of another step, but it says the same
        shows[4, other] = says[5]  # the picture of page 4 also shows what caption 5 says, but not the reverse
        model.queue.shows[5, other] = says[6]
        for place, page in ((3, 2), (5, 6)):  # and they are alike, so that it matters
            model.queue.text[place] = model.student.encode_image(images[page : page + 1])[0]
            model.queue.image[place] = model.student.encode_text(ids[page : page + 1])[0]
    twin = deepcopy(model)
    loss = lesson.albef_loss(model, *batch, masked=masked)["itc"]
    image_t, text_t, _ = lesson.ask_teacher(twin, images, ids, mask, hidden, labels, guess=False)
    image_keys, text_keys = torch.cat([image_t, twin.queue.image]), torch.cat([text_t, twin.queue.text])
    all_says, all_shows = torch.cat([says, twin.queue.says]), torch.cat([shows, twin.queue.shows])
    same = torch.zeros(2, B, B + FEW.queue, dtype=torch.bool)
    for i in range(B):
        for j in range(B + FEW.queue):
            same[0, i, j] = masked and all_says[j] in shows[i]
            same[1, i, j] = masked and says[i] in all_shows[j]
    assert not masked or (same[:, 0, 1].all() and same[:, 1, 0].all() and same[:, 2, B + 3].all())
    assert not masked or (same[:, 4, 5].tolist(), same[:, 6, B + 5].tolist()) == ([True, False], [False, True])
    with torch.no_grad():
        image, text = twin.student.encode_image(images), twin.student.encode_text(ids)
        temp = twin.student.temp.item()
    by_hand = (itc_by_hand(image, image_t, text_keys, temp, alpha, same[0])
               + itc_by_hand(text, text_t, image_keys, temp, alpha, same[1])) / 2  # fmt: skip
    assert loss.item() == pytest.approx(by_hand, abs=1e-4)


def test_masking_matters_where_captions_say_the_same(model, batch):
    twins = with_a_twin(batch)
    found = [lesson.albef_loss(deepcopy(model), *twins, masked=masked)["itc"].item() for masked in (True, False)]
    assert abs(found[0] - found[1]) > 3e-4


def test_without_a_teachers_share_it_is_plain_contrast_and_plain_guessing(model, batch):
    batch = (*batch[:-1], torch.tensor(0.0))
    images, ids, mask, hidden, labels, *_ = batch
    for distil in (True, False):
        one, twin = deepcopy(model), deepcopy(model)
        losses = lesson.albef_loss(one, *batch, masked=False, distil=distil)
        image_t, text_t, _ = lesson.ask_teacher(twin, images, ids, mask, hidden, labels, guess=False)
        student, own = twin.student, torch.arange(B)
        with torch.no_grad():
            image, text = student.encode_image(images), student.encode_text(ids)
            itc = [F.cross_entropy(q @ torch.cat([t, old]).T / student.temp, own) for q, t, old in
                   ((image, text_t, twin.queue.text), (text, image_t, twin.queue.image))]  # fmt: skip
            fused, _ = student.text(hidden, mask, student.vision(images))
            mlm = masked_lm_loss(student.mlm_head, fused, labels)
        assert losses["itc"].item() == pytest.approx(sum(itc).item() / 2, abs=1e-4)
        assert losses["mlm"].item() == pytest.approx(mlm.item(), abs=1e-4)


def test_the_teachers_guesses_count_with_their_share(model, batch):
    images, ids, mask, hidden, labels, *_ = batch
    found = {}
    for alpha in (0.0, 0.5, 1.0):
        found[alpha] = lesson.albef_loss(deepcopy(model), *batch[:-1], torch.tensor(alpha))["mlm"].item()
    twin = deepcopy(model)
    _, _, opinion = lesson.ask_teacher(twin, images, ids, mask, hidden, labels, guess=True)
    with torch.no_grad():
        fused, _ = twin.student.text(hidden, mask, twin.student.vision(images))
        log = twin.student.mlm_head(fused[labels != IGNORE]).log_softmax(-1)
    assert found[1.0] == pytest.approx(-(opinion.softmax(-1) * log).sum(-1).mean().item(), abs=1e-4)
    assert found[0.5] == pytest.approx((found[0.0] + found[1.0]) / 2, abs=1e-4)
    assert abs(found[0.0] - found[1.0]) > 1e-3


def test_each_loss_reads_its_own_part_of_a_batch(model, batch):
    """MLM sees hidden words; ITC and ITM whole sentences; who says the same matters to ITC and ITM alone."""
    names = "images ids mask hidden labels shows says noise alpha".split()
    before = lesson.albef_loss(deepcopy(model), *batch)
    other = {
        "images": 255 - batch[0], "ids": torch.where(batch[2], 50, batch[1]),
        "hidden": torch.where(batch[2], 50, batch[3]), "labels": torch.where(batch[4] != IGNORE, 50, IGNORE),
        "noise": batch[7].flip(0, 1), "alpha": torch.tensor(0.9),
    }  # fmt: skip
    expected = {"images": {"itc", "itm", "mlm"}, "ids": {"itc", "itm"}, "hidden": {"mlm"}, "labels": {"mlm"},
                "noise": {"itm"}, "alpha": {"itc", "mlm"}}  # fmt: skip
    for name, value in other.items():
        changed = [value if k == names.index(name) else t for k, t in enumerate(batch)]
        after = lesson.albef_loss(deepcopy(model), *changed)
        assert {n for n, v in after.items() if abs((v - before[n]).item()) > 1e-6} == expected[name], name


@pytest.mark.parametrize("masked", [True, False])
def test_itm_draws_by_similarity_and_only_if_masked_spares_who_says_the_same(model, batch, masked, monkeypatch):
    seen = []
    real = lesson.wrong_partners

    def draw(similarity, forbidden, noise, how):
        seen.append((similarity, forbidden, noise, how))
        return real(similarity, forbidden, noise, how)

    monkeypatch.setattr(lesson, "wrong_partners", draw)
    twin, batch = deepcopy(model), with_a_twin(batch)
    images, ids, mask, hidden, labels, shows, says, noise, _ = batch
    lesson.albef_loss(model, *batch, negatives="uniform", masked=masked)
    image_t, text_t, _ = lesson.ask_teacher(twin, images, ids, mask, hidden, labels, guess=False)
    with torch.no_grad():
        image, text = twin.student.encode_image(images), twin.student.encode_text(ids)
    belongs = belong(shows, says) if masked else torch.eye(B, dtype=torch.bool)  # the paper: all but the own
    assert belongs[0, 1].item() == belongs[1, 0].item() == masked
    expected = (text @ image_t.T, belongs.T, noise[0]), (image @ text_t.T, belongs, noise[1])
    for (similarity, forbidden, drawn_by, how), (s, f, n) in zip(seen, expected, strict=True):
        assert torch.allclose(similarity, s / twin.student.temp.item(), atol=1e-4)  # of this batch alone
        assert torch.equal(forbidden, f) and torch.equal(drawn_by, n) and how == "uniform"


def test_the_queue_gets_the_teachers_vectors_once_they_were_compared(model, batch, monkeypatch):
    compared = []
    real = lesson.itc_loss

    def compare(vectors, teacher, keys, *rest):
        compared.append((teacher, keys, [k.clone() for k in keys]))
        return real(vectors, teacher, keys, *rest)

    monkeypatch.setattr(lesson, "itc_loss", compare)
    old = model.queue.image.clone(), model.queue.text.clone()
    lesson.albef_loss(model, *batch)
    teacher, keys, before = compared[0]
    for k, (ring, held) in enumerate(((model.queue.image, old[0]), (model.queue.text, old[1]))):
        assert torch.equal(before[k], torch.cat([teacher[k], held])) and torch.equal(before[k], keys[k])
        assert torch.equal(ring[:B], held[:B]) and torch.equal(ring[B:], teacher[k])  # the second half was the oldest
    assert torch.equal(model.queue.shows[B:], batch[5]) and torch.equal(model.queue.says[B:], batch[6])
    lesson.albef_loss(model, *batch)
    _, (image_keys, text_keys), _ = compared[1]
    for k, found in enumerate((image_keys, text_keys)):
        assert ((found[:, None] == teacher[k]).all(-1).sum(0) == 1).all()  # now they are keys of an earlier step
    for off in ("itc", "itm"):  # without them the queue moves on all the same
        start = int(model.queue.next)
        lesson.albef_loss(model, *batch, **{off: False})
        assert int(model.queue.next) == (start + B) % FEW.queue


def test_a_queue_of_nothing_leaves_the_batch(batch):
    torch.manual_seed(0)
    model = lesson.begin(replace(FEW, queue=0))
    losses = lesson.albef_loss(model, *batch)
    assert abs(losses["itc"].item() - torch.tensor(float(B)).log().item()) < 2 and len(model.queue.image) == 0


def test_training_moves_all_three_and_ends_with_a_sane_temperature(monkeypatch):
    counted = []
    monkeypatch.setattr(lesson, "clamp_temperature", lambda student: counted.append(student.temp.item()))
    monkeypatch.setattr(lesson, "validation", lambda recipe: lambda model: {"seen": recipe.queue})
    torch.manual_seed(1)
    model, history = lesson.train(FEW, seed=0, device=CPU, progress=None)
    assert len(counted) == FEW.steps + 1  # at every step, and after the last update
    assert set(history.losses) == {"itc", "itm", "mlm"} and all(len(v) == 4 for v in history.losses.values())
    lesson.minivlp.seed_everything(0)
    start = lesson.begin(FEW)
    for part in ("student", "teacher"):
        ours, theirs = (getattr(m, part).text.embed.word.weight for m in (model, start))
        assert not torch.equal(ours, theirs), part
    assert int(model.queue.next) == 0 and (model.queue.says >= 0).all()  # 4 batches of 8: twice around
    again, _ = lesson.train(FEW, seed=0, device=CPU, progress=None)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


# --- measuring -------------------------------------------------------------------------------------------------------


def full(n: int = 40) -> tuple[Tensor, list[str]]:
    data = lesson.pairs("test", n)
    return data.images, [captions[FULL] for captions in data.captions]


def oracle(similarity: Tensor, odds: Tensor) -> Oracle:
    return Oracle(*full(), similarity, odds)


def test_word_scores_come_from_the_fusion_half(model):
    data = lesson.pairs("test", 40)
    ids, mask = TokenTable(data.captions, lesson.words())(torch.arange(5), 1)
    student = model.student.eval()
    with torch.no_grad():
        scores = lesson.word_scores(student, data.images[:5], ids, mask)
        assert scores.shape == (*ids.shape, TINY.vocab_size)
        fused, _ = student.text.fuse(student.text.read(ids, mask), mask, student.vision(data.images[:5]))
        assert torch.allclose(scores, student.mlm_head(fused), atol=1e-6)
        assert not torch.allclose(scores, lesson.word_scores(student, 255 - data.images[:5], ids, mask), atol=1e-5)


def test_states_and_matching_agree_with_the_model_pair_by_pair(model):
    images, texts = full()
    student = model.student.train()
    image, text, mask = lesson.states(student, images, texts, batch_size=7)
    assert student.training and not image.requires_grad and not text.requires_grad
    assert image.shape == (40, 17, 16) and text.shape == (40, mask.shape[1], 16)
    pictures, of = torch.tensor([3, 0, 39, 3, 5]), torch.tensor([1, 0, 2, 38, 5])
    found = lesson.matching(student, image, text, mask, pictures, of, batch_size=2)
    assert student.training and found.shape == (5,) and found.std() > 0
    for k, (i, t) in enumerate(zip(pictures.tolist(), of.tolist(), strict=True)):
        ids, one = lesson.words().encode_batch([texts[t]])
        with torch.no_grad():
            scores = student(images[i : i + 1], ids, one)["match"][0]
        assert found[k].item() == pytest.approx((scores[1] - scores[0]).item(), abs=1e-5)


def test_all_pairs_have_a_row_for_each_picture():
    torch.manual_seed(0)
    odds = torch.randn(40, 40)
    images, texts = full()
    one = oracle(torch.eye(40), odds)
    assert torch.allclose(lesson.all_pairs(one, images, texts[:7]), odds[:, :7], atol=1e-5)
    assert len(one.asked) == len(set(one.asked)) == 40 * 7


@pytest.mark.parametrize("by_text", [False, True])
def test_re_ranking_asks_the_best_alone(by_text):
    torch.manual_seed(0)
    similarity, odds = torch.randn(2, 40, 40)
    one = oracle(similarity, odds)
    rows, expected = (similarity.T, odds.T) if by_text else (similarity, odds)
    found = lesson.rerank(one, rows, lesson.states(one, *full()), 5, by_text=by_text)
    best = rows.argsort(dim=1, descending=True)[:, :5]
    chosen = torch.zeros_like(rows, dtype=torch.bool).scatter(1, best, True)
    assert torch.allclose(found[chosen], expected[chosen], atol=1e-5)
    assert (found[~chosen] == -100).all() and len(one.asked) == 40 * 5
    wanted = {(b, q) if by_text else (q, b) for q, row in enumerate(best.tolist()) for b in row}
    assert set(one.asked) == wanted


def test_searches_tell_three_ways_and_two_directions_apart():
    n = 40
    similarity = torch.eye(n)
    similarity[: n // 2, n - 1] = 2.0  # half of the pictures find the last text first
    odds = 10 * torch.eye(n)
    odds[0] = 20.0  # fused, every text finds page 0 first
    odds[0, 0] = 30.0
    numbers = lesson.searches(oracle(similarity, odds), n=n, k=1)
    assert numbers["ITC, image to text"] == pytest.approx(0.5)  # rows 20 to 39
    assert numbers["ITC, text to image"] == pytest.approx((n - 1) / n)  # all texts but the last
    assert numbers["ITM, image to text"] == 1.0 and numbers["ITM, text to image"] == pytest.approx(1 / n)
    for way in ("ITC", "ITM", "re-ranked"):
        both = [numbers[f"{way}, {direction}"] for direction in ("image to text", "text to image")]
        assert numbers[way] == pytest.approx(sum(both) / 2)
    # Of the one best by ITC there is nothing to re-rank; with all of them it is ITM's own search.
    assert numbers["re-ranked, image to text"] == numbers["ITC, image to text"]
    more = lesson.searches(oracle(similarity, odds), n=n, k=n, every=False)
    assert more.keys() == {k for k in numbers if not k.startswith("ITM")}
    assert more["re-ranked, image to text"] == 1.0 and more["re-ranked, text to image"] == pytest.approx(1 / n)
    clean = 10 * torch.eye(n)
    assert lesson.searches(oracle(torch.eye(n) + torch.rand(n, n) / 4, clean), n=n, k=2)["re-ranked"] == 1.0


def test_ways_to_search_score_the_same_pairs(model):
    student = model.student.eval()
    ways = lesson.ways_to_search(student, n=40, k=3)
    found = {name: way() for name, way in ways.items()}
    every = lesson.all_pairs(student, *full())
    assert torch.allclose(found["every pair"], every, atol=1e-5)
    similarity = lesson.image_vectors(student, full()[0]) @ lesson.text_vectors(student, full()[1]).T
    assert torch.allclose(found["vectors"], similarity, atol=1e-5)
    asked = found["re-ranked"] != -100
    assert (asked.sum(1) == 3).all() and torch.allclose(found["re-ranked"][asked], every[asked], atol=1e-5)


def test_any_model_that_looks_reads_and_matches_can_be_searched_and_probed():
    """Lesson 06's model has no `vision` and no `text.read`: a single stream does nothing once but the embedding."""
    torch.manual_seed(0)
    single = shake(VLMo(VLMoConfig(width=16, depth=2, heads=2)), 0.1)
    images, texts = full()
    every = lesson.all_pairs(single, images, texts[:9])
    for i, t in ((0, 0), (3, 8), (39, 1)):
        ids, mask = lesson.words().encode_batch([texts[t]])
        with torch.no_grad():
            odds = single.itm_head(single(images[i : i + 1], ids, mask)[0]).diff(dim=1).item()
        assert every[i, t].item() == pytest.approx(odds, abs=1e-4)
    assert every.shape == (40, 9) and every.std() > 0
    similarity = lesson.image_vectors(single, images) @ lesson.text_vectors(single, texts[:9]).T
    found = lesson.rerank(single, similarity, lesson.states(single, images, texts[:9]), 3)
    asked = found != -100
    assert (asked.sum(1) == 3).all() and torch.allclose(found[asked], every[asked], atol=1e-4)
    numbers = lesson.searches(single, n=40, k=5, every=False) | lesson.probes(single, "replaced", n=6)
    assert {"ITC", "re-ranked", "replaced, ITC", "replaced, ITM"} <= numbers.keys()
    assert all(0 <= value <= 1 for value in numbers.values())


def test_partners_are_wrong_texts_drawn_by_similarity():
    similarity = 4 * torch.eye(40) + 4 * torch.eye(40).roll(1, dims=1)  # the own text and that of the next page
    one = oracle(similarity, torch.zeros(40, 40))
    own, following = torch.arange(40), (torch.arange(40) + 1) % 40
    says = lesson.sayings(lesson.pairs("test", 40), [FULL])[:, 0]
    free = says[own] != says[following]
    assert torch.equal(lesson.partners(one, "argmax", n=40)[free], following[free]) and free.sum() > 35
    hard, uniform = (lesson.partners(one, how, n=40) for how in ("hard", "uniform"))
    assert (hard == following).sum() > 15 > 5 > (uniform == following).sum()
    for drawn in (hard, uniform):
        assert (says[drawn] != says).all()
    assert torch.equal(hard, lesson.partners(one, "hard", n=40))
    assert not torch.equal(hard, lesson.partners(one, "hard", n=40, seed=1))
    with torch.no_grad():
        one.temp.fill_(0.1)  # divided by it, the similarities leave no doubt
    assert (lesson.partners(one, "hard", n=40) == following)[free].float().mean() > 0.95


def test_shared_facts_are_counted_over_the_pages_own():
    def thing(kind, colour):
        return SimpleNamespace(kind=kind, colour=colour, size="big")

    def scene(things, place="beach", sky="day", weather="sun"):
        return SimpleNamespace(things=[thing(*t) for t in things], place=place, sky=sky, weather=weather)

    data = SimpleNamespace(scenes=[
        scene([("cat", "red"), ("dog", "blue")]),  # five facts
        scene([("cat", "red")], weather="rain"),  # four, of which three are the first's
        scene([("cat", "blue"), ("dog", "red")], place="farm", sky="night", weather="snow"),  # same words, other pairs
    ])  # fmt: skip
    assert lesson.shared_facts(data, torch.tensor([1, 2, 0])) == pytest.approx((3 / 5 + 0 + 0) / 3)
    assert lesson.shared_facts(data, torch.tensor([2, 0, 0])) == pytest.approx((0 + 3 / 4 + 0) / 3)
    assert lesson.shared_facts(data, torch.tensor([0, 1, 2])) == 1.0


def test_matching_accuracy_counts_true_pairs_and_wrong_ones_alike():
    similarity = 60 * (torch.eye(40) + torch.eye(40).roll(1, dims=1))
    following = torch.eye(40).roll(1, dims=1).bool()
    says = lesson.sayings(lesson.pairs("test", 40), [FULL])[:, 0]
    assert len(says.unique()) == 40  # otherwise the partners are not those of the table below
    odds = torch.full((40, 40), -5.0)
    odds.fill_diagonal_(5.0)
    perfect = lesson.matching_accuracy(oracle(similarity, odds), n=40)
    assert perfect == {"matching, random partners": 1.0, "matching, hard partners": 1.0}
    fooled = odds.masked_fill(following, 5.0)
    found = lesson.matching_accuracy(oracle(similarity, fooled), n=40)
    assert found["matching, hard partners"] == pytest.approx(0.5, abs=0.03) and found["matching, random partners"] > 0.9
    blunt = oracle(torch.zeros(40, 40), fooled)  # a judge that finds all alike
    assert lesson.matching_accuracy(oracle(similarity, fooled), blunt, n=40)["matching, hard partners"] > 0.9
    yes = lesson.matching_accuracy(oracle(similarity, torch.full((40, 40), 5.0)), n=40)
    assert set(yes.values()) == {0.5}
    none = lesson.matching_accuracy(oracle(similarity, torch.zeros(40, 40)), n=40)
    assert set(none.values()) == {0.5}  # even odds are no match


def test_probes_are_answered_by_itc_and_by_itm():
    images, captions = lesson.probe_pairs("replaced", 6)
    right = torch.eye(12)
    half = right.clone()
    half[::2] = 0
    half[torch.arange(0, 12, 2), torch.arange(1, 12, 2)] = 1  # the first picture of each prefers the other caption
    for itc, itm, expected in ((right, -right, (1.0, 0.0)), (half, right, (0.5, 1.0)), (-right, half, (0.0, 0.5))):
        found = lesson.probes(Oracle(images, captions, itc, itm), "replaced", n=6)
        assert found == {"replaced, ITC": expected[0], "replaced, ITM": expected[1]}


def test_the_gap_between_two_clouds_by_hand():
    signs = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]] * 3)  # around their mean at distance 1
    found = lesson.modality_gap(signs, signs + torch.tensor([0.0, 3.0]))
    assert found["distance"] == pytest.approx(3.0) and found["told apart"] == 1.0
    assert lesson.modality_gap(2 * signs, 2 * signs + torch.tensor([0.0, 3.0]))["distance"] == pytest.approx(1.5)
    torch.manual_seed(0)
    image, text = torch.randn(2, 400, 3)
    mixed = lesson.modality_gap(image, text)
    assert mixed["distance"] < 0.2 and mixed["told apart"] == pytest.approx(0.5, abs=0.08)
    # The probe is fitted on the first halves and asked about the second: where these are exchanged, it is wrong.
    up, down = torch.randn(2, 20, 3) / 10 + torch.tensor([1.0, 0, 0]), torch.randn(2, 20, 3) / 10
    crossed = lesson.modality_gap(torch.cat([up[0], down[0]]), torch.cat([down[1], up[1]]))
    assert crossed["told apart"] == 0.0 and crossed["distance"] < 0.2


def test_the_gap_is_measured_between_the_vectors_that_itc_compares(model):
    student = model.student
    images, texts = full()
    expected = lesson.modality_gap(lesson.image_vectors(student, images), lesson.text_vectors(student, texts))
    assert lesson.gap_of(student, n=40) == expected and expected.keys() == {"distance", "told apart"}


class Looking(nn.Module):
    """Its matching score is a sum of attention weights times numbers that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.rand(2, 3, 6, 5))  # B, heads, L, 1 + P
        self.worth = torch.randn(2, 3, 6, 5)

    def vision(self, images: Tensor) -> Tensor:
        return images.float().flatten(1)[:, :2, None].requires_grad_()

    def text(self, ids: Tensor, mask: Tensor, image: Tensor, *, everything: bool) -> tuple[Tensor, dict[str, Tensor]]:
        assert everything and not image.requires_grad
        weights = self.weights * 1
        score = (weights * self.worth).sum((1, 2, 3))
        return score[:, None, None].expand(2, 6, 1), {"cross_0": torch.zeros(2, 3, 6, 5), "cross_1": weights}

    def itm_head(self, states: Tensor) -> Tensor:
        return torch.cat([-5 * states, states], dim=-1)


def test_grad_cam_is_the_weights_times_what_they_add():
    torch.manual_seed(0)
    one, images = Looking(), torch.zeros(2, 3, 8, 8)
    with torch.no_grad():  # as a caller may be
        maps = lesson.word_maps(one, images, ["a cat", "a dog"], block=1)
        plain = lesson.word_maps(one, images, ["a cat", "a dog"], block=1, gradient=False)
    weights = one.weights.detach()
    assert maps.shape == (2, 6, 4) and not maps.requires_grad
    assert torch.allclose(maps, (weights * one.worth).clamp(min=0).mean(1)[..., 1:], atol=1e-6)  # no class token
    assert torch.allclose(plain, weights.mean(1)[..., 1:], atol=1e-6)
    assert one.weights.grad is None  # looking teaches nothing


def test_maps_of_words_in_a_true_model(model):
    images, texts = full()
    maps = {}
    for gradient in (True, False):
        maps[gradient] = lesson.word_maps(model.student, images[:5], texts[:5], gradient=gradient)
    ids, _ = lesson.words().encode_batch(texts[:5])
    assert maps[True].shape == maps[False].shape == (5, ids.shape[1], 16)
    assert maps[True].min() == 0 < maps[True].max() and maps[False].min() > 0
    assert (maps[False].sum(-1) < 1).all()  # the rest is the class token's
    assert all(p.grad is None for p in model.student.parameters())


def test_pages_to_point_at_have_one_thing_and_its_noun():
    data, at, covered = lesson.pages_to_point_at(5)
    assert len(data.images) == len(at) == len(covered) == 5 and covered.shape == (5, 16)
    ids, _ = lesson.words().encode_batch([captions[1] for captions in data.captions])
    assert at.shape == ids.shape
    for scene, row, chosen, share in zip(data.scenes, ids, at, covered, strict=True):
        assert len(scene.things) == 1
        assert lesson.NOUNS[lesson.words().decode(row[chosen])] == scene.things[0].kind
        assert torch.equal(share, lesson.inside(scene, 4)) and share.sum() > 0


def test_pointing_is_the_share_of_the_nouns_map_on_its_thing(monkeypatch):
    _, at, covered = lesson.pages_to_point_at()
    best = covered.argmax(1)
    hit = F.one_hot(best, 16).float()  # all on the patch that the thing covers most
    miss = torch.where(torch.arange(len(hit))[:, None] % 2 == 0, hit, 0.0)  # no mass at all on every other page

    def maps(of_words: Tensor) -> Tensor:
        """Where the noun stands (n, L): its map, spread over its pieces; elsewhere what does not belong there."""
        wrong = 1 - hit
        return torch.where(at[:, :, None], of_words[:, None], wrong[:, None])

    monkeypatch.setattr(lesson, "word_maps", lambda *_, gradient: maps(hit if gradient else 3 * miss))
    found = lesson.pointing(None)
    even = covered.mean(1)
    most = covered.amax(1)
    assert found["pointing, evenly"] == pytest.approx(even.mean().item(), abs=1e-6)
    assert found["pointing, Grad-CAM"] == pytest.approx(most.mean().item(), abs=1e-5)
    half = torch.where(torch.arange(len(hit)) % 2 == 0, most, even)
    assert found["pointing, attention"] == pytest.approx(half.mean().item(), abs=1e-5)
    assert found["pointing, Grad-CAM"] > 2 * found["pointing, evenly"]


def test_planted_captions_are_learned_by_heart_or_seen_through():
    data, ring = lesson.pairs("train", 400), lesson.rings(400, 0.5)[0]
    source = lesson.plant_noise(400, 0.5)
    texts = [data.captions[i][FULL] for i in ring.tolist()]
    assert len(set(texts)) == 200
    place = {int(page): k for k, page in enumerate(ring)}
    planted = torch.zeros(200, 200)
    for k, page in enumerate(ring.tolist()):
        planted[k, place[int(source[page])]] = 1  # the caption that training showed with this picture
    quarter = planted.where(torch.arange(200)[:, None] < 50, torch.eye(200))
    for similarity, expected in ((planted, (1, 0)), (torch.eye(200), (0, 1)), (quarter, (0.25, 0.75))):
        one = Oracle(data.images[ring], texts, similarity, torch.zeros(1, 1))
        found = lesson.planted_fit(one, NOISY)
        assert found == pytest.approx({"fit to planted": expected[0], "true caption": expected[1]})


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All measurements look at 40 pages, or at 4 probes."""
    monkeypatch.setattr(lesson03, "retrieval", fewer(lesson03.retrieval))
    for name in ("searches", "matching_accuracy", "gap_of"):
        monkeypatch.setattr(lesson, name, fewer(getattr(lesson, name)))
    monkeypatch.setattr(lesson, "probes", fewer(lesson.probes, 4))
    monkeypatch.setattr(lesson, "validation", fewer(lesson.validation))


def test_what_is_watched_depends_on_the_recipe(model, monkeypatch):
    seen = []
    real = lesson03.retrieval
    monkeypatch.setattr(lesson03, "retrieval", lambda one, split, n: seen.append((one, split)) or real(one, split, n=n))
    always = {"val R@1", "teacher's val R@1", "temperature"}
    planted = {"fit to planted", "true caption"}
    for recipe, more in ((FEW, {"val matching"}), (replace(NOISY, itm=False), planted)):
        numbers = lesson.validation(recipe, n=40)(model)
        assert numbers.keys() == always | more
        assert all(0 <= value <= 1 for value in numbers.values())
    assert [split for _, split in seen] == ["val"] * 4 and seen[0][0] is model.student and seen[1][0] is model.teacher
    assert numbers["temperature"] == pytest.approx(0.07)


def test_validation_matching_is_even_for_a_model_that_always_agrees():
    data = lesson.pairs("val", 40)
    texts = [captions[FULL] for captions in data.captions]

    def watched(odds: Tensor) -> float:
        one = Oracle(data.images, texts, torch.eye(40), odds)
        return lesson.validation(FEW, n=40)(SimpleNamespace(student=one, teacher=one))["val matching"]

    assert watched(torch.full((40, 40), 2.0)) == 0.5 == watched(torch.full((40, 40), -2.0))
    assert watched(4 * torch.eye(40) - 2) == 1.0


def test_a_run_reports_every_number_of_the_scoreboard(small_tests):
    run = lesson.run(FEW, seed=0, device=CPU)
    wanted = (*lesson.SCOREBOARD.values(), *lesson.BOARD.values(), *lesson.HEADLINE[1:])
    assert {source[2] for source in wanted if isinstance(source, tuple)} <= run.metrics.keys()
    assert all(0 <= value <= 1 for name, value in run.metrics.items() if name != "distance")
    assert run.metrics["R@1"] == pytest.approx(
        (run.metrics["R@1 text to image"] + run.metrics["R@1 image to text"]) / 2
    )
    assert isinstance(run.model, ALBEF) and hasattr(run.model, "itm_head")  # the student, not the teacher
    assert len(run.history.losses["itm"]) == 4


def test_a_shorter_recipe_is_measured_with_less(small_tests):
    short = lesson.run(replace(FEW, everything=False), seed=0, device=CPU).metrics.keys()
    assert {"R@1", "teacher's R@1", "re-ranked", "ITM", "attribute_swap, ITM", "pointing, Grad-CAM", "distance",
            "colour, true picture"} <= short  # fmt: skip
    extra = {"colour, shuffled picture", "order_swap, ITM", "zero-shot kind", "re-ranked, 1,000", "fit to planted"}
    assert not extra & short
    noisy = lesson.run(replace(NOISY, everything=False, itm=False), seed=0, device=CPU)
    assert {"fit to planted", "true caption", "R@1"} <= noisy.metrics.keys()
    assert not {"ITM", "pointing, Grad-CAM", "matching, hard partners"} & noisy.metrics.keys()  # all of them ask ITM
    assert set(noisy.history.losses) == {"itc", "mlm"}


def test_a_clock_counts_single_steps_and_whole_searches(monkeypatch):
    asked = []

    def turns(steps, **_):
        asked.append(list(steps))
        return {name: [2.0 * (i + 1)] * 3 for i, name in enumerate(steps)}

    monkeypatch.setattr(lesson, "take_turns", turns)
    monkeypatch.setattr(lesson, "ways_to_search", lambda _, n=128, k=16: dict.fromkeys(
        ("vectors", "every pair", "re-ranked"), (n, k)))  # fmt: skip
    found = lesson.clock(CPU)
    assert asked == [["step, three losses", "step, without ITM", "step, without MoD"],
                     ["search, vectors", "search, every pair", "search, re-ranked"], [""]]  # fmt: skip
    steps = lesson.CLOCK_STEPS // 4
    assert found["ms, step, without ITM"] == pytest.approx(4000 / steps)
    assert found["ms, search, every pair"] == pytest.approx(4000)
    assert found["training seconds"] == pytest.approx(lesson.MAIN.steps * 2.0 / steps)
    assert found["ms for 1,000 x 1,000 pairs"] == pytest.approx(2000)
    assert {source for source in lesson.BOARD.values() if isinstance(source, str)} <= {*found, *lesson.facts()}


def test_what_is_timed_is_a_training_step(model, batch):
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-3)
    before = deepcopy(model.state_dict())
    lesson.take_steps(model, optimizer, lesson.loss_of(FEW), [batch, batch])
    for name in ("student.vision.embed.patch_embed.proj.weight", "teacher.vision_proj.weight", "queue.image"):
        if name in before:
            assert not torch.equal(model.state_dict()[name], before[name]), name
    assert "teacher.vision_proj.weight" in before and optimizer.state[model.student.temp]["step"] == 2


def test_all_pictures_are_drawn_once_before_runs_go_side_by_side(monkeypatch):
    drawn = set()
    monkeypatch.setattr(lesson, "pairs", lambda split, n: drawn.add((split, n)))
    monkeypatch.setattr(lesson, "probe_pairs", lambda kind: drawn.add(kind))
    monkeypatch.setattr(lesson03, "single_things", lambda split, *, n, tier: drawn.add(("single", split, n, tier)))
    lesson.prepare()
    assert {("train", r.args[0].train_size) if hasattr(r, "args") else ("train", r.values[0].train_size)
            for r in ARMS} <= drawn  # fmt: skip
    assert {("val", 300), ("test", 1000), ("single", "test", 400, "normal"), "attribute_swap", "order_swap"} <= drawn


def test_the_model_has_the_size_that_the_lesson_prints():
    with torch.device("meta"):
        assert count_parameters(ALBEF(lesson.MAIN.model)) == lesson.facts()["parameters"] == 1_905_623
