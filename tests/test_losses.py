"""The losses: by hand, beside other implementations and an exact solver, and the usual mistakes told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

from minivlp.layers import MLMHead
from minivlp.losses import (
    IGNORE,
    contrastive_loss,
    cosine_cost,
    ipot,
    masked_lm_loss,
    next_words,
    same_texts,
    transport_distance,
    word_patch_alignment,
    word_positions,
)

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# --- hidden words ----------------------------------------------------------------------------------------------------


def hidden_words() -> tuple[MLMHead, Tensor, Tensor]:
    """A head, states (3, 6, 8) and labels (3, 6) with five asked positions, none of them in the last text."""
    labels = torch.full((3, 6), IGNORE)
    labels[0, 1:4], labels[1, 2], labels[1, 5] = torch.tensor([3, 0, 9]), 4, 4
    return MLMHead(8, 10), torch.randn(3, 6, 8, requires_grad=True), labels


def test_masked_lm_loss_is_cross_entropy_at_the_asked_positions():
    head, states, labels = hidden_words()
    loss = masked_lm_loss(head, states, labels)
    full = F.cross_entropy(head(states).transpose(1, 2), labels, ignore_index=IGNORE)
    close(loss, full)
    by_hand = [head(states)[b, i].softmax(0)[labels[b, i]].log() for b, i in (labels != IGNORE).nonzero().tolist()]
    close(loss, -torch.stack(by_hand).mean())
    close(torch.autograd.grad(loss, states)[0], torch.autograd.grad(full, states)[0])
    # Neither the mean over all positions nor the mean over texts.
    everywhere = F.cross_entropy(head(states).transpose(1, 2), labels, ignore_index=IGNORE, reduction="sum") / 18
    per_text = torch.stack([masked_lm_loss(head, states[b : b + 1], labels[b : b + 1]) for b in range(3)]).mean()
    assert min((loss - everywhere).abs(), (loss - per_text).abs()) > 0.01


def test_the_head_sees_the_asked_positions_alone():
    head, states, labels = hidden_words()
    seen = []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    masked_lm_loss(head, states, labels).backward()
    assert len(seen) == 1 and torch.equal(seen[0], states[labels != IGNORE]) and seen[0].shape == (5, 8)
    assert torch.equal(states.grad.abs().amax(-1) > 0, labels != IGNORE)


def test_nothing_asked_costs_nothing():
    head, states, labels = hidden_words()
    loss = masked_lm_loss(head, states, torch.full_like(labels, IGNORE))
    assert loss.item() == 0 and loss.shape == ()
    loss.backward()
    assert not states.grad.any()
    assert F.cross_entropy(torch.zeros(2, 10), torch.full((2,), IGNORE)).isnan()  # PyTorch's own answer


def test_masked_lm_loss_is_float32_under_autocast():
    head, states, labels = hidden_words()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(states).dtype == torch.bfloat16
        loss = masked_lm_loss(head, states, labels)
    assert loss.dtype == torch.float32 and (loss - masked_lm_loss(head, states, labels)).abs() < 0.05


# --- which tokens, which cost ----------------------------------------------------------------------------------------


def test_word_positions_by_hand():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    kept = mask.clone()
    assert word_positions(mask).int().tolist() == [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0]]
    assert torch.equal(mask, kept)  # the input is left alone


def test_cosine_cost_by_hand():
    text = torch.tensor([[[1.0, 0.0], [0.0, 5.0]]])
    image = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [1.0, 1.0]]])
    a = 1 - 0.5**0.5
    close(cosine_cost(text, image), torch.tensor([[[0.0, 1.0, 2.0, a], [1.0, 0.0, 1.0, a]]]))
    words, patches = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    close(cosine_cost(7 * words, 0.1 * patches), cosine_cost(words, patches))  # lengths do not count
    for b in range(2):
        for i in range(3):
            for j in range(4):
                expected = 1 - F.cosine_similarity(words[b, i], patches[b, j], dim=0)
                close(cosine_cost(words, patches)[b, i, j], expected)
    assert cosine_cost(words.bfloat16(), patches.bfloat16()).dtype == torch.float32


# --- transport -------------------------------------------------------------------------------------------------------


def problem(m: int = 5, n: int = 12, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Cost (B, m, n) between random words and patches, and masks without padding."""
    cost = cosine_cost(torch.randn(count, m, 16), torch.randn(count, n, 16))
    return cost, torch.ones(count, m, dtype=torch.bool), torch.ones(count, n, dtype=torch.bool)


def cheapest(cost: Tensor) -> float:
    """The exact optimum of one problem (m, n), by linear programming: the plan's sums are the only constraints."""
    m, n = cost.shape
    sums = [np.kron(np.eye(m)[i], np.ones(n)) for i in range(m)] + [np.kron(np.ones(m), np.eye(n)[j]) for j in range(n)]
    totals = [1 / m] * m + [1 / n] * n
    return linprog(cost.double().numpy().ravel(), A_eq=np.array(sums), b_eq=totals).fun


def uniter(cost: Tensor, *, beta: float = 0.5, iterations: int = 50, inner: int = 1) -> Tensor:
    """IPOT the way the papers write it, one problem (m, n) in double precision: T is (n, m), patches first."""
    C = cost.detach().double().numpy()
    m, n = C.shape
    sigma, T, A = np.full(m, 1 / m), np.ones((n, m)), np.exp(-C.T / beta)
    for _ in range(iterations):
        Q = A * T
        for _ in range(inner):
            delta = 1 / (n * (Q @ sigma))
            sigma = 1 / (m * (Q.T @ delta))
        T = np.diag(delta) @ Q @ np.diag(sigma)
    return torch.from_numpy(T.T)  # (m, n)


@pytest.mark.parametrize(("m", "n"), [(5, 12), (12, 5), (9, 16), (1, 4), (4, 1)])
@pytest.mark.parametrize("iterations", [1, 5, 50])
def test_ipot_equals_the_papers_algorithm(m, n, iterations):
    cost, words, patches = problem(m, n)
    plan = ipot(cost, words, patches, iterations=iterations)
    close(plan[0].double(), uniter(cost[0], iterations=iterations))
    if min(m, n) > 1:  # and not with another beta, another kernel or the roles exchanged
        wrong = [
            uniter(cost[0], beta=1.0, iterations=iterations),
            uniter(1 - cost[0], iterations=iterations),
            uniter(cost[0].T, iterations=iterations).T,  # ends with the patches' sums exact
            uniter(cost[0], iterations=iterations, inner=5) if iterations == 1 else uniter(cost[0], iterations=2),
        ]
        for other in wrong:
            assert (plan[0] - other).abs().max() > 1e-5


def test_ipot_by_hand():
    """Two words, two patches, cost 0 on the diagonal and 1 off it: after k rounds off / diagonal = e^(-k / beta)."""
    cost, words = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.ones(1, 2, dtype=torch.bool)
    for beta in (0.5, 1.0):
        for k in (1, 2, 3):
            plan = ipot(cost, words, words, beta=beta, iterations=k)
            ratio = math.exp(-k / beta)
            on, off = 0.5 / (1 + ratio), 0.5 * ratio / (1 + ratio)
            close(plan, torch.tensor([[[on, off], [off, on]]]))
            close(transport_distance(cost, plan), torch.tensor([2 * off]))


def test_the_same_vectors_in_another_order_cost_nothing():
    vectors = torch.eye(6)[None]
    order = torch.randperm(6)
    everything = torch.ones(1, 6, dtype=torch.bool)
    cost = cosine_cost(vectors, vectors[:, order])
    plan = ipot(cost, everything, everything)
    close(plan[0], torch.eye(6)[:, order] / 6)
    assert transport_distance(cost, plan).item() == pytest.approx(0, abs=1e-6)
    assert transport_distance(cost, torch.full_like(plan, 1 / 36)).item() > 0.8  # spread evenly it would cost


def test_one_word_goes_everywhere():
    cost, words, patches = problem(1, 7)
    plan = ipot(cost, words, patches)
    close(plan, torch.full((1, 1, 7), 1 / 7))
    close(transport_distance(cost, plan), cost.mean(dim=(1, 2)))


def test_more_iterations_come_nearer_to_the_exact_optimum():
    """At 5 words and 12 patches: about 4 % too dear after 5 rounds, 1 % after 10, below 0.1 % after 50."""
    cost, words, patches = problem(count=6)
    optimum = torch.tensor([cheapest(one) for one in cost])
    excess = {}
    for k, low, high in ((1, 0.1, 0.4), (5, 0.02, 0.08), (10, 0, 0.03), (50, -1e-4, 0.001), (1000, -1e-4, 1e-4)):
        excess[k] = transport_distance(cost, ipot(cost, words, patches, iterations=k)) / optimum - 1
        assert ((low < excess[k]) & (excess[k] < high)).all(), (k, excess[k])
    for fewer, more in ((1, 5), (5, 10), (10, 50)):
        assert (excess[more] < excess[fewer]).all()


def test_sums_of_the_plan():
    """Those over patches are exact by the last step, those over words nearly."""
    cost, words, patches = problem(count=6)
    plan = ipot(cost, words, patches)
    assert plan.min() >= 0
    close(plan.sum(2), torch.full((6, 5), 1 / 5), 1e-6)
    close(plan.sum(1), torch.full((6, 12), 1 / 12), 1e-3)
    assert (ipot(cost, words, patches, iterations=5).sum(1) - 1 / 12).abs().max() > 1e-4
    close(ipot(cost, words, patches, iterations=1000).sum(1), torch.full((6, 12), 1 / 12), 1e-5)


def padded_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Three problems in one batch of 7 x 14: words 1 to m and patches 1 to n, other tokens around them."""
    cost = problem(7, 14, 3)[0]
    words = torch.stack([(torch.arange(7) > 0) & (torch.arange(7) <= m) for m in (5, 3, 1)])
    patches = torch.stack([(torch.arange(14) > 0) & (torch.arange(14) <= n) for n in (13, 6, 9)])
    return cost, words, patches


def test_padding_gets_nothing_and_changes_nothing():
    cost, words, patches = padded_problem()
    plan = ipot(cost, words, patches)
    both = words[:, :, None] & patches[:, None, :]
    assert not plan[~both].any() and plan[both].min() > 0
    close(plan.sum(dim=(1, 2)), torch.ones(3))
    distance = transport_distance(cost, plan)
    for b, (m, n) in enumerate(((5, 13), (3, 6), (1, 9))):
        alone = cost[b : b + 1, 1 : m + 1, 1 : n + 1]
        single = ipot(alone, words[b : b + 1, 1 : m + 1], patches[b : b + 1, 1 : n + 1])
        close(plan[b : b + 1, 1 : m + 1, 1 : n + 1], single)
        close(distance[b : b + 1], transport_distance(alone, single))
        close(plan[b, 1 : m + 1, 1 : n + 1].double(), uniter(alone[0]))
    wild = torch.where(both, cost, 1e4 * torch.rand_like(cost))
    assert torch.equal(ipot(wild, words, patches), plan)  # whatever the padding costs


def test_a_cost_of_zero_at_padding_is_not_enough():
    """The usual mistake: the cost masked with 0, the kernel not. Padding is then free of charge and takes most."""
    cost, words, patches = padded_problem()
    both = words[:, :, None] & patches[:, None, :]
    distance = transport_distance(cost, ipot(cost, words, patches))
    for b in range(3):
        careless = uniter(cost[b] * both[b])
        assert careless[~both[b]].sum() > 0.2
        assert abs((careless * cost[b] * both[b]).sum() - distance[b]) > 0.1


def test_no_gradient_flows_through_the_plan():
    cost, words, patches = padded_problem()
    cost.requires_grad_()
    plan = ipot(cost, words, patches, iterations=5)
    assert not plan.requires_grad
    transport_distance(cost, plan).sum().backward()
    assert torch.equal(cost.grad, plan)  # the gradient is the plan itself
    # With a gradient through the rounds as well it would be another one, from a graph five times as deep. (Near the
    # optimum the two agree, since there no small change of the plan changes what it costs.)
    through = ipot.__wrapped__(cost, words, patches, iterations=5)
    close(through.detach(), plan)
    gradient = torch.autograd.grad(transport_distance(cost, through).sum(), cost)[0]
    assert (gradient - plan).abs().max() > 0.01


# --- word-patch alignment --------------------------------------------------------------------------------------------


def pairs() -> dict[str, Tensor]:
    """Four pairs: texts of 7, 6, 4 and 3 tokens with [CLS] and [SEP], pictures of a class token and 9 patches."""
    text_mask = torch.arange(7) < torch.tensor([7, 6, 4, 3])[:, None]
    return dict(
        text=torch.randn(4, 7, 16), image=torch.randn(4, 10, 16), words=word_positions(text_mask),
        patches=(torch.arange(10) > 0).expand(4, -1), match=torch.tensor([1, 0, 1, 1]),
    )  # fmt: skip


def test_alignment_adds_matching_pairs_and_subtracts_the_others():
    batch = pairs()
    loss, distance = word_patch_alignment(**batch)
    assert loss.shape == () and distance.shape == (4,) and distance.min() > 0
    for b in range(4):
        w, p = batch["words"][b], batch["patches"][b]
        cost = cosine_cost(batch["text"][b : b + 1, w], batch["image"][b : b + 1, p])[0]
        close(distance[b].double(), (uniter(cost) * cost.double()).sum())
    close(loss, (distance[0] - distance[1] + distance[2] + distance[3]) / 4)
    # Not the difference of the two means, not the sum, not the matching pairs alone.
    for wrong in (distance[[0, 2, 3]].mean() - distance[1], 4 * loss, distance[[0, 2, 3]].sum() / 4):
        assert (loss - wrong).abs() > 0.05
    for match in (batch["match"].float(), batch["match"].bool()):
        close(word_patch_alignment(**batch | {"match": match})[0], loss)
    nobody = word_patch_alignment(**batch | {"match": torch.zeros(4)})
    close(nobody[0], -distance.mean())  # below 0: no minimum there


def test_iterations_arrive():
    batch = pairs()
    few, many = (word_patch_alignment(**batch, iterations=k)[1] for k in (2, 200))
    assert (few[:3] - many[:3]).min() > 0.001  # the last text has one word, and one plan


def test_ends_of_the_text_and_the_class_token_take_no_part():
    batch = pairs()
    distance = word_patch_alignment(**batch)[1]
    moved = {name: batch[name].clone() for name in ("text", "image")}
    moved["text"][~batch["words"]] += torch.randn(16)
    moved["image"][:, 0] += torch.randn(16)
    close(word_patch_alignment(**batch | moved)[1], distance)
    # If they did, the numbers would be others.
    with_ends = torch.arange(7) < torch.tensor([7, 6, 4, 3])[:, None]
    with_class = torch.ones(4, 10, dtype=torch.bool)
    for wrong in ({"words": with_ends}, {"patches": with_class}):
        assert (word_patch_alignment(**batch | wrong)[1] - distance).abs().max() > 0.01


def test_a_step_down_brings_matching_pairs_together_and_drives_others_apart():
    batch = pairs()
    text = nn.Parameter(batch["text"])
    loss, before = word_patch_alignment(**batch | {"text": text})
    loss.backward()
    assert torch.equal(text.grad.abs().amax(-1) > 0, batch["words"])
    after = word_patch_alignment(**batch | {"text": text.detach() - 2 * text.grad})[1]
    assert ((after < before) == batch["match"].bool()).all()


def test_alignment_is_float32_under_autocast():
    batch = pairs()
    loss, distance = word_patch_alignment(**batch)
    half = {name: batch[name].bfloat16() for name in ("text", "image")}
    rounded = word_patch_alignment(**batch | {name: value.float() for name, value in half.items()})[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Without a guard of its own the cost is a product in half precision, and two digits are what is left of it.
        coarse = cosine_cost(batch["text"], batch["image"])
        got, distances = word_patch_alignment(**batch)
        from_half = word_patch_alignment(**batch | half)[1]
        plan = ipot(coarse, batch["words"], batch["patches"])
    assert got.dtype == distances.dtype == from_half.dtype == plan.dtype == torch.float32
    close(got, loss)
    close(distances, distance)
    close(from_half, rounded)
    close(plan, ipot(coarse.float(), batch["words"], batch["patches"]))
    assert (coarse.float() - cosine_cost(batch["text"], batch["image"])).abs().max() > 1e-4


# --- contrast --------------------------------------------------------------------------------------------------------

# e to the logits of three pairs. The rows add up to 8, 20 and 20, the columns to 30, 6 and 12: the pictures choose
# their texts with 6/8, 3/20 and 6/20, the texts their pictures with 6/30, 3/6 and 6/12.
ODDS = torch.tensor([[6.0, 1.0, 1.0], [12.0, 3.0, 5.0], [12.0, 2.0, 6.0]])
TO_TEXT = -(math.log(6 / 8) + math.log(3 / 20) + math.log(6 / 20)) / 3  # 1.1296
TO_IMAGE = -(math.log(6 / 30) + math.log(3 / 6) + math.log(6 / 12)) / 3  # 0.9986


def test_contrastive_loss_by_hand():
    loss = contrastive_loss(ODDS.log())
    assert loss.shape == () and loss.item() == pytest.approx((TO_TEXT + TO_IMAGE) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(1.0641, abs=1e-4)
    whole = -(math.log(6 / 48) + math.log(3 / 48) + math.log(6 / 48)) / 3  # one softmax over all nine
    sigmoid = F.binary_cross_entropy_with_logits(ODDS.log(), torch.eye(3)).item()
    for wrong in (TO_TEXT, TO_IMAGE, TO_TEXT + TO_IMAGE, whole, sigmoid, (TO_TEXT + TO_IMAGE) * 3 / 2):
        assert abs(loss.item() - wrong) > 0.04


def test_contrastive_loss_gradient():
    """(p_row + p_column - 2 I) / 2B: what is chosen wrongly goes down, the pair goes up, and the whole stays level."""
    logits = torch.randn(5, 5, requires_grad=True)
    contrastive_loss(logits).backward()
    expected = (logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(5)) / 10
    close(logits.grad, expected.detach())
    assert torch.equal(logits.grad < 0, torch.eye(5).bool())
    assert logits.grad.sum().abs() < 1e-6


@pytest.mark.parametrize("count", [1, 2, 64])
def test_logits_that_say_nothing_cost_ln_b(count):
    for constant in (0.0, 14.3, -3.0):
        logits = torch.full((count, count), constant)
        for positives in (None, torch.eye(count).bool()):
            assert contrastive_loss(logits, positives).item() == pytest.approx(math.log(count), abs=1e-5)


def test_contrastive_loss_from_none_to_perfect():
    """Chosen rightly it costs nothing; chosen wrongly with the same sureness it costs as much as the scale."""
    right = 20 * torch.eye(4)
    assert contrastive_loss(right).item() == pytest.approx(0, abs=1e-6)
    assert contrastive_loss(right.roll(1, 0)).item() == pytest.approx(20, abs=1e-3)
    assert contrastive_loss(right + 1000).item() == pytest.approx(0, abs=1e-6)  # only differences count


def groups(*names: int) -> Tensor:
    """Positives of pairs that belong together when their number is the same: (B, B)."""
    number = torch.tensor(names)
    return number[:, None] == number


@pytest.mark.parametrize("positives", [None, groups(0, 1, 0, 2, 1, 0)])
def test_pictures_and_texts_may_change_places(positives):
    logits = torch.randn(6, 6) * 3
    close(contrastive_loss(logits.T, positives), contrastive_loss(logits, positives))
    skew = torch.rand(6, 6) < 0.5
    skew.fill_diagonal_(True)
    close(contrastive_loss(logits.T, skew.T), contrastive_loss(logits, skew))
    assert (contrastive_loss(logits, skew.T) - contrastive_loss(logits, skew)).abs() > 0.01


def test_the_order_of_the_pairs_does_not_count():
    logits, order, positives = torch.randn(6, 6) * 3, torch.tensor([3, 0, 5, 1, 2, 4]), groups(0, 1, 0, 2, 1, 0)
    close(contrastive_loss(logits[order][:, order]), contrastive_loss(logits))
    shuffled = positives[order][:, order]
    close(contrastive_loss(logits[order][:, order], shuffled), contrastive_loss(logits, positives))
    assert (contrastive_loss(logits[order]) - contrastive_loss(logits)).abs() > 0.1  # pictures alone: other pairs


def test_no_repeats_is_the_plain_loss():
    logits = (torch.randn(6, 6) * 3).requires_grad_()
    plain = contrastive_loss(logits)
    for positives in (torch.eye(6).bool(), torch.eye(6)):
        shared = contrastive_loss(logits, positives)
        close(shared, plain)
        close(torch.autograd.grad(shared, logits, retain_graph=True)[0],
              torch.autograd.grad(plain, logits, retain_graph=True)[0])  # fmt: skip


def test_shared_targets_by_hand():
    """Picture 0 belongs with texts 0 and 1, picture 1 with text 1 alone: each direction has its own shares."""
    positives = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]]).bool()
    to_text = -((math.log(6 / 8) + math.log(1 / 8)) / 2 + math.log(3 / 20) + math.log(6 / 20)) / 3
    to_image = -(math.log(6 / 30) + (math.log(1 / 6) + math.log(3 / 6)) / 2 + math.log(6 / 12)) / 3
    logits = ODDS.log()
    loss = contrastive_loss(logits, positives)
    assert loss.item() == pytest.approx((to_text + to_image) / 2, abs=1e-6)
    p = positives.float()
    rows, columns = p / p.sum(1, keepdim=True), p / p.sum(0, keepdim=True)
    ours = F.cross_entropy(logits, rows), F.cross_entropy(logits.T, columns.T)
    close(sum(ours) / 2, loss)
    wrong = {
        "one direction": ours[0],
        "not shared out": (F.cross_entropy(logits, p) + F.cross_entropy(logits.T, p.T)) / 2,
        "rows' shares in the columns": (ours[0] + F.cross_entropy(logits.T, rows.T)) / 2,
        "columns' shares in the rows": (F.cross_entropy(logits, columns) + ours[1]) / 2,
        "not transposed": (ours[0] + F.cross_entropy(logits.T, rows)) / 2,
        "the diagonal alone": contrastive_loss(logits),
    }
    for name, other in wrong.items():
        assert (loss - other).abs() > 0.02, name


def test_two_pairs_with_one_caption_are_not_pushed_apart():
    """Pairs 0 and 1 have the same text. Plain, picture 0 is driven from text 1 for ever, though it is its own text."""
    positives, logits = groups(0, 0, 1), torch.zeros(3, 3, requires_grad=True)
    plain, = torch.autograd.grad(contrastive_loss(logits), logits)
    shared, = torch.autograd.grad(contrastive_loss(logits, positives), logits)
    assert plain[0, 1] > 0.05 and plain[1, 0] > 0.05  # a step down lowers these scores
    assert shared[0, 1] < -0.05 and shared[1, 0] < -0.05  # and raises them
    close(shared[0, 1], shared[0, 0])
    assert (shared[~positives] > 0.05).all()
    # When all that belongs together scores alike and high, nothing is left to do; plain it goes on pulling.
    done = (30.0 * positives).requires_grad_()
    assert torch.autograd.grad(contrastive_loss(done, positives), done)[0].abs().max() < 1e-6
    assert torch.autograd.grad(contrastive_loss(done), done)[0][0, 1] > 0.1


def test_the_floor_with_repeats_is_the_entropy_of_the_targets():
    """Two of three pairs choose between two equal captions: 2/3 ln 2 is as low as it gets, not 0."""
    positives = groups(0, 0, 1)
    floor = 2 / 3 * math.log(2)
    assert contrastive_loss(40.0 * positives, positives).item() == pytest.approx(floor, abs=1e-5)
    assert contrastive_loss(40 * torch.eye(3), positives).item() > floor + 1  # sure of one of the two costs more


def test_contrastive_loss_is_float32():
    logits = torch.randn(6, 6).bfloat16() * 20
    for positives in (None, groups(0, 1, 0, 2, 1, 0)):
        loss = contrastive_loss(logits, positives)
        assert loss.dtype == torch.float32
        close(loss, contrastive_loss(logits.float(), positives))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(contrastive_loss(logits, positives), loss)


# --- which texts are the same, which word comes next -----------------------------------------------------------------


def test_same_texts_by_hand():
    ids = torch.tensor([
        [2, 5, 6, 3, 0],
        [2, 5, 6, 7, 3],  # longer
        [2, 6, 5, 3, 0],  # the same words in another order
        [2, 5, 6, 3, 0],  # the first again
        [2, 5, 3, 0, 0],  # the beginning of the first
    ])  # fmt: skip
    same = same_texts(ids)
    assert same.dtype == torch.bool and same.shape == (5, 5)
    assert [tuple(pair) for pair in same.nonzero().tolist()] == [(0, 0), (0, 3), (1, 1), (2, 2), (3, 0), (3, 3), (4, 4)]
    assert same_texts(ids[:1]).tolist() == [[True]]


def test_same_texts_are_positives():
    ids, logits = torch.tensor([[4, 3], [5, 3], [4, 3]]), torch.randn(3, 3)
    close(contrastive_loss(logits, same_texts(ids)), contrastive_loss(logits, groups(0, 1, 0)))
    close(contrastive_loss(logits, same_texts(torch.tensor([[4], [5], [6]]))), contrastive_loss(logits))


def test_next_words_by_hand():
    ids = torch.tensor([[2, 8, 9, 7, 3], [2, 8, 3, 0, 0], [2, 3, 0, 0, 0]])
    mask, kept = ids > 0, ids.clone()
    labels = next_words(ids, mask)
    X = IGNORE
    assert labels.tolist() == [[8, 9, 7, 3, X], [8, 3, X, X, X], [3, X, X, X, X]]  # the end is a word to foretell too
    assert torch.equal(ids, kept) and labels.dtype == ids.dtype
    assert next_words(ids, torch.ones_like(mask))[2].tolist() == [3, 0, 0, 0, X]  # without a mask padding is asked
    assert next_words(ids[:, :1], mask[:, :1]).tolist() == [[X]] * 3


def test_next_words_teach_a_model_that_reads_from_the_left():
    """A head that knows which token follows each costs nothing; one that repeats the token itself costs much."""
    ids = torch.tensor([[2, 8, 9, 7, 3], [2, 8, 9, 3, 0]])
    follows = {2: 8, 8: 9, 9: 7, 7: 3}
    table = torch.zeros(10, 10)
    for one, after in follows.items():
        table[one, after] = 30
    labels, states = next_words(ids, ids > 0), F.one_hot(ids, 10).float()
    assert masked_lm_loss(lambda x: x @ table, states[:1], labels[:1]).item() == pytest.approx(0, abs=1e-6)
    # In the second text 9 is followed by 3: one word of three is foretold wrongly, with a sureness of 30.
    assert masked_lm_loss(lambda x: x @ table, states[1:], labels[1:]).item() == pytest.approx(10, abs=1e-3)
    assert masked_lm_loss(lambda x: 30 * x, states, labels).item() > 20
