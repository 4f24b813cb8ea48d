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
    distilled_contrastive_loss,
    distilled_lm_loss,
    hard_negatives,
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


def test_smoothed_labels_by_hand():
    """Of the target 0.1 is spread over all V words, the right one among them: with V = 4 it keeps 0.925."""
    chance = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    states, labels = chance.log()[None], torch.tensor([[1, 3, IGNORE]])
    loss = masked_lm_loss(nn.Identity(), states, labels, smoothing=0.1)
    one = 0.025 * math.log(0.5) + 0.925 * math.log(0.25) + 0.025 * 2 * math.log(0.125)
    other = 0.025 * sum(math.log(p) for p in (0.1, 0.2, 0.3)) + 0.925 * math.log(0.4)
    close(loss, torch.tensor(-(one + other) / 2))
    plain = masked_lm_loss(nn.Identity(), states, labels)
    close(plain, torch.tensor(-(math.log(0.25) + math.log(0.4)) / 2))
    # A sure and right model pays for it: the least loss is the entropy of the target, and no longer 0.
    sure = torch.tensor([[[0.925, 0.025, 0.025, 0.025]]]).log()
    least = masked_lm_loss(nn.Identity(), sure, torch.tensor([[0]]), smoothing=0.1)
    close(least, torch.tensor(-0.925 * math.log(0.925) - 0.075 * math.log(0.025)))
    surer = torch.tensor([[[1 - 3e-6, 1e-6, 1e-6, 1e-6]]]).log()
    assert masked_lm_loss(nn.Identity(), surer, torch.tensor([[0]]), smoothing=0.1) > least
    nothing = masked_lm_loss(nn.Identity(), states, torch.full_like(labels, IGNORE), smoothing=0.1)
    assert nothing.item() == 0


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
    (plain,) = torch.autograd.grad(contrastive_loss(logits), logits)
    (shared,) = torch.autograd.grad(contrastive_loss(logits, positives), logits)
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


# --- a teacher's opinion ---------------------------------------------------------------------------------------------

# Two pictures among two texts, and among three, the last of which is from a queue. e to the logits, row sums 4, 4 and
# 8, 20 for the student, 2, 4 and 4, 10 for the teacher.
STUDENT_2, TEACHER_2 = torch.tensor([[3.0, 1.0], [2.0, 2.0]]).log(), torch.tensor([[1.0, 1.0], [1.0, 3.0]]).log()
STUDENT_3 = torch.tensor([[6.0, 1.0, 1.0], [12.0, 3.0, 5.0]]).log()
TEACHER_3 = torch.tensor([[1.0, 1.0, 2.0], [2.0, 6.0, 2.0]]).log()


def test_distilled_contrastive_loss_by_hand():
    """At alpha = 0.4: 0.4 * (1/2, 1/2) + 0.6 * (1, 0) = (0.8, 0.2), and so on."""
    loss = distilled_contrastive_loss(STUDENT_2, TEACHER_2, 0.4)
    by_hand = -(0.8 * math.log(3 / 4) + 0.2 * math.log(1 / 4) + 0.1 * math.log(1 / 2) + 0.9 * math.log(1 / 2)) / 2
    assert loss.shape == () and loss.item() == pytest.approx(by_hand, abs=1e-6)

    loss = distilled_contrastive_loss(STUDENT_3, TEACHER_3, 0.4)
    first = 0.7 * math.log(6 / 8) + 0.1 * math.log(1 / 8) + 0.2 * math.log(1 / 8)
    second = 0.08 * math.log(12 / 20) + 0.84 * math.log(3 / 20) + 0.08 * math.log(5 / 20)
    assert loss.item() == pytest.approx(-(first + second) / 2, abs=1e-6)
    own, soft = torch.eye(2, 3), TEACHER_3.softmax(1)
    close(F.cross_entropy(STUDENT_3, 0.4 * soft + 0.6 * own), loss)
    wrong = {
        "the truth stands at the queue's end": F.cross_entropy(STUDENT_3, 0.4 * soft + 0.6 * own.flip(0, 1)),
        "alpha and 1 - alpha exchanged": F.cross_entropy(STUDENT_3, 0.6 * soft + 0.4 * own),
        "the teacher alone": F.cross_entropy(STUDENT_3, soft),
        "the truth alone": F.cross_entropy(STUDENT_3, own),
        "both added": F.cross_entropy(STUDENT_3, 0.4 * soft + own),
        "the teacher's logits as they are": F.cross_entropy(STUDENT_3, 0.4 * TEACHER_3 + 0.6 * own),
        "the teacher chooses along the columns": F.cross_entropy(STUDENT_3, 0.4 * TEACHER_3.softmax(0) + 0.6 * own),
        "student and teacher exchanged": F.cross_entropy(TEACHER_3, 0.4 * STUDENT_3.softmax(1) + 0.6 * own),
        "the sum over the queries": 2 * loss,
    }
    for name, other in wrong.items():
        assert (loss - other).abs() > 0.02, name


def test_without_a_teachers_say_it_is_one_half_of_the_contrastive_loss():
    logits, teacher = torch.randn(6, 6) * 3, torch.randn(6, 6) * 3
    for positives in (None, groups(0, 1, 0, 2, 1, 0)):
        to_text = distilled_contrastive_loss(logits, teacher, 0.0, positives)
        to_image = distilled_contrastive_loss(logits.T, teacher.T, 0.0, positives)
        close((to_text + to_image) / 2, contrastive_loss(logits, positives))
        assert (to_text - to_image).abs() > 0.01
    longer, opinion = torch.randn(6, 10), torch.randn(6, 10)
    close(distilled_contrastive_loss(longer, opinion, 0.0), F.cross_entropy(longer, torch.arange(6)))


def test_with_the_teachers_say_alone_the_truth_does_not_count():
    logits, teacher = torch.randn(6, 10) * 3, torch.randn(6, 10) * 3
    loss = distilled_contrastive_loss(logits, teacher, 1.0)
    close(loss, -(teacher.softmax(1) * logits.log_softmax(1)).sum(1).mean())
    positives = torch.rand(6, 10) < 0.5
    positives[:, 0] = True
    close(distilled_contrastive_loss(logits, teacher, 1.0, positives), loss)
    assert (distilled_contrastive_loss(logits, teacher, 0.9, positives) - loss).abs() > 0.01
    alpha = torch.tensor(0.3)  # may be a tensor, as that of a ramp
    close(distilled_contrastive_loss(logits, teacher, alpha), distilled_contrastive_loss(logits, teacher, 0.3), 0)


def test_the_truth_is_shared_among_all_positives_of_a_query():
    """Query 0 belongs with its own text and with one of the queue: (1/2, 0, 1/2) is its truth."""
    positives = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    loss = distilled_contrastive_loss(STUDENT_3, TEACHER_3, 0.4, positives)
    first = 0.4 * math.log(6 / 8) + 0.1 * math.log(1 / 8) + 0.5 * math.log(1 / 8)  # 0.4 * 1/4 + 0.6 * 1/2, ...
    second = 0.08 * math.log(12 / 20) + 0.84 * math.log(3 / 20) + 0.08 * math.log(5 / 20)
    assert loss.item() == pytest.approx(-(first + second) / 2, abs=1e-6)
    target = 0.4 * TEACHER_3.softmax(1) + 0.6 * positives
    wrong = {
        "not shared out": F.cross_entropy(STUDENT_3, target),
        "the mixture shared out": F.cross_entropy(STUDENT_3, target / target.sum(1, keepdim=True)),
        "its own alone": distilled_contrastive_loss(STUDENT_3, TEACHER_3, 0.4),
    }
    for name, other in wrong.items():
        assert (loss - other).abs() > 0.02, name
    close(distilled_contrastive_loss(STUDENT_3, TEACHER_3, 0.4, positives.float()), loss, 0)
    close(distilled_contrastive_loss(STUDENT_3, TEACHER_3, 0.4, torch.eye(2, 3)),
          distilled_contrastive_loss(STUDENT_3, TEACHER_3, 0.4), 0)  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_ignored_keys_are_as_good_as_absent(alpha):
    logits, teacher = (torch.randn(4, 9) * 3).requires_grad_(), torch.randn(4, 9) * 3
    positives, column = torch.eye(4, 9).bool(), torch.arange(9)
    positives[1, 6] = positives[2, 8] = True
    ignore = (column == 5) | (column == 8)  # the same for all, so that the columns can be left out
    loss = distilled_contrastive_loss(logits, teacher, alpha, positives, ignore=ignore.expand(4, -1))
    kept = (logits[:, ~ignore], teacher[:, ~ignore])
    close(loss, distilled_contrastive_loss(*kept, alpha, positives[:, ~ignore]))  # a positive among them goes as well
    plain = distilled_contrastive_loss(logits, teacher, alpha, ignore=ignore.expand(4, -1))
    close(plain, distilled_contrastive_loss(*kept, alpha))
    gradient = torch.autograd.grad(loss, logits)[0]
    assert not gradient[:, ignore].any() and gradient[:, ~ignore].abs().amax(1).min() > 0
    wild = torch.where(ignore, 900 * torch.rand(4, 9), teacher)  # whatever the teacher thinks of them
    close(distilled_contrastive_loss(logits, wild, alpha, positives, ignore=ignore.expand(4, -1)), loss)
    wrong = {"nothing is ignored": distilled_contrastive_loss(logits, teacher, alpha, positives)}
    if alpha:  # the student cannot follow where it may not look
        masked = logits.masked_fill(ignore, -1e4)
        wrong["by the student alone"] = distilled_contrastive_loss(masked, wild, alpha, positives & ~ignore)
    for name, other in wrong.items():
        assert (loss - other).abs() > 0.05, name


def test_each_query_ignores_its_own():
    logits, teacher = torch.randn(4, 7), torch.randn(4, 7)
    ignore = torch.zeros(4, 7, dtype=torch.bool)
    ignore[0, [1, 5]] = ignore[1, [2, 3]] = ignore[3, [0, 1, 4, 5, 6]] = True  # and none of the third's
    loss = distilled_contrastive_loss(logits, teacher, 0.4, ignore=ignore)
    parts = []
    for b, row in enumerate(~ignore):
        target = 0.4 * teacher[b, row].softmax(0) + 0.6 * (torch.arange(7)[row] == b)
        parts.append(-(target * logits[b, row].log_softmax(0)).sum())
    close(loss, torch.stack(parts).mean())
    close(distilled_contrastive_loss(logits, teacher, 0.4, ignore=torch.zeros_like(ignore)),
          distilled_contrastive_loss(logits, teacher, 0.4), 0)  # fmt: skip


def test_the_teacher_learns_nothing_and_the_student_moves_towards_the_target():
    logits, teacher = (torch.randn(5, 8).requires_grad_() for _ in range(2))
    distilled_contrastive_loss(logits, teacher, 0.4).backward()
    target = 0.4 * teacher.softmax(1) + 0.6 * torch.eye(5, 8)
    assert teacher.grad is None
    close(logits.grad, ((logits.softmax(1) - target) / 5).detach())
    through = torch.autograd.grad(F.cross_entropy(logits, target), teacher)[0]  # without the stop it would learn
    assert through.abs().max() > 1e-3


def test_the_papers_formula_with_kl_has_the_same_gradient():
    """(1 - alpha) CE + alpha KL (paper, 3.3) is less by alpha times the teacher's entropy, which no student moves."""
    logits, teacher, alpha = torch.randn(5, 8).requires_grad_(), torch.randn(5, 8), 0.4
    loss = distilled_contrastive_loss(logits, teacher, alpha)
    q = teacher.softmax(1)
    kl = F.kl_div(logits.log_softmax(1), q, reduction="batchmean")
    papers = (1 - alpha) * F.cross_entropy(logits, torch.arange(5)) + alpha * kl
    entropy = -(q * q.log()).sum(1).mean()
    close(loss - papers, alpha * entropy)
    assert alpha * entropy > 0.5
    close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(papers, logits)[0])


def test_distilled_contrastive_loss_is_float32():
    logits, teacher = torch.randn(6, 9).bfloat16() * 20, torch.randn(6, 9).bfloat16() * 20
    expected = distilled_contrastive_loss(logits.float(), teacher.float(), 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distilled_contrastive_loss(logits, teacher, 0.4)
    assert loss.dtype == torch.float32
    close(loss, expected)
    ignore = torch.arange(9) > 6
    sure = distilled_contrastive_loss(1000 * torch.eye(6, 9), 1000 * torch.eye(6, 9), 0.4, ignore=ignore.expand(6, -1))
    assert sure.item() == 0  # at the lowest temperature too: neither infinite nor not a number


def test_distilled_lm_loss_by_hand():
    """Two texts, three places asked, three words: the student's odds are 6:1:1, 2:2:4 and 1:3:4, eighths all."""
    odds = torch.full((2, 3, 3), 9.0)
    odds[0, 1:], odds[1, 0] = torch.tensor([[6.0, 1.0, 1.0], [2.0, 2.0, 4.0]]), torch.tensor([1.0, 3.0, 4.0])
    labels = torch.tensor([[IGNORE, 0, 2], [1, IGNORE, IGNORE]])
    teacher = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [1.0, 2.0, 1.0]]).log()
    loss, moved = (distilled_lm_loss(nn.Identity(), odds.log(), labels, t, 0.4) for t in (teacher, teacher.roll(1, 0)))
    first = 0.8 * math.log(6 / 8) + 0.1 * math.log(1 / 8) + 0.1 * math.log(1 / 8)  # 0.4 * (1/2, 1/4, 1/4) + 0.6 * own
    second = 0.1 * math.log(2 / 8) + 0.1 * math.log(2 / 8) + 0.8 * math.log(4 / 8)
    third = 0.1 * math.log(1 / 8) + 0.8 * math.log(3 / 8) + 0.1 * math.log(4 / 8)
    assert loss.shape == () and loss.item() == pytest.approx(-(first + second + third) / 3, abs=1e-6)
    scores, own = odds.log()[labels != IGNORE], torch.eye(3)[[0, 2, 1]]
    wrong = {
        "the mean over all positions": loss / 2,
        "the mean over texts": ((first + second) / -2 - third) / 2,
        "alpha and 1 - alpha exchanged": F.cross_entropy(scores, 0.6 * teacher.softmax(1) + 0.4 * own),
        "the truth alone": F.cross_entropy(scores, own),
        "the teacher alone": F.cross_entropy(scores, teacher.softmax(1)),
        "the teacher's scores as they are": F.cross_entropy(scores, 0.4 * teacher + 0.6 * own),
        "the teacher's words in another order": moved,
    }
    for name, other in wrong.items():
        assert abs(loss - other) > 0.02, name


def test_the_teachers_words_are_taken_in_reading_order():
    """Text after text, from the left: what `teacher_states[asked]` gives. Places first would mix the texts up."""
    head, states, labels = hidden_words()
    opinion, asked = torch.randn(3, 6, 10), labels != IGNORE
    loss = distilled_lm_loss(head, states, labels, opinion[asked], 0.7)
    target = 0.7 * opinion.softmax(-1)
    target[asked] += 0.3 * F.one_hot(labels[asked], 10)
    each = -(target * head(states).log_softmax(-1)).sum(-1)  # (3, 6)
    close(loss, each[asked].mean())
    mixed = distilled_lm_loss(head, states, labels, opinion.transpose(0, 1)[asked.T], 0.7)
    assert (mixed - loss).abs() > 0.01


def test_distilled_lm_loss_between_truth_and_teacher():
    head, states, labels = hidden_words()
    teacher, inputs = torch.randn(5, 10) * 3, (states, *head.parameters())
    asked = labels != IGNORE
    soft = F.cross_entropy(head(states[asked]), teacher.softmax(1))
    for alpha, expected in ((0.0, masked_lm_loss(head, states, labels)), (1.0, soft)):
        loss = distilled_lm_loss(head, states, labels, teacher, alpha)
        close(loss, expected)
        gradients = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (loss, expected))
        for ours, theirs in zip(*gradients, strict=True):
            close(ours, theirs)
    other = labels.masked_fill(asked, 7)
    close(distilled_lm_loss(head, states, other, teacher, 1.0), soft)  # the teacher alone does not ask for the word
    assert (distilled_lm_loss(head, states, other, teacher, 0.0) - masked_lm_loss(head, states, labels)).abs() > 0.01
    middle = distilled_lm_loss(head, states, labels, teacher, torch.tensor(0.25))
    close(middle, 0.75 * masked_lm_loss(head, states, labels) + 0.25 * soft)


def test_the_teacher_of_words_learns_nothing_and_the_head_sees_the_asked_positions_alone():
    head, states, labels = hidden_words()
    teacher, seen = torch.randn(5, 10, requires_grad=True), []
    head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    distilled_lm_loss(head, states, labels, teacher, 0.4).backward()
    assert teacher.grad is None and min(p.grad.abs().max() for p in head.parameters()) > 1e-4
    assert torch.equal(states.grad.abs().amax(-1) > 0, labels != IGNORE)
    assert len(seen) == 1 and torch.equal(seen[0], states[labels != IGNORE])
    target = 0.4 * teacher.softmax(1) + 0.6 * F.one_hot(labels[labels != IGNORE], 10)
    through = torch.autograd.grad(F.cross_entropy(head(states[labels != IGNORE]), target), teacher)[0]
    assert through.abs().max() > 1e-3  # without the stop it would


def test_nothing_asked_costs_nothing_with_a_teacher_too():
    head, states, labels = hidden_words()
    loss = distilled_lm_loss(head, states, torch.full_like(labels, IGNORE), torch.zeros(0, 10), 0.4)
    assert loss.item() == 0 and loss.shape == ()
    loss.backward()
    assert states.grad is not None and not states.grad.any()
    assert F.cross_entropy(torch.zeros(0, 10), torch.zeros(0, 10)).isnan()  # PyTorch's own answer


def test_distilled_lm_loss_is_float32():
    head, states, labels = hidden_words()
    teacher = torch.randn(5, 10).bfloat16()
    expected = distilled_lm_loss(lambda x: head(x).bfloat16().float(), states, labels, teacher.float(), 0.4)
    close(distilled_lm_loss(lambda x: head(x).bfloat16(), states, labels, teacher, 0.4), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distilled_lm_loss(head, states, labels, teacher, 0.4)
    assert loss.dtype == torch.float32
    assert (loss - distilled_lm_loss(head, states, labels, teacher.float(), 0.4)).abs() < 0.05


# --- hard negatives --------------------------------------------------------------------------------------------------

# Five pictures and five texts. Texts 0 and 2 belong to the same picture, so each of them is forbidden to the other.
SIMILARITY = torch.tensor([
    [3.0, 2.0, 2.5, 1.0, 1.5],
    [0.5, 4.0, 1.0, 0.0, 2.0],
    [2.5, 1.0, 3.0, 2.5, 2.0],
    [1.0, 1.0, 1.0, 2.0, 1.0],
    [-1.0, 2.0, 0.0, 1.0, 3.0],
])  # fmt: skip
FORBIDDEN = groups(0, 1, 0, 2, 3)
SURE = 50 * torch.eye(5)  # a model that has no doubt: every softmax is a one and four numbers below 1e-21


def drawn(draws: int, *, noise: Tensor | None = None) -> Tensor:
    """How often each row of `SIMILARITY` draws each column, (5, 5)."""
    counts = torch.zeros(5, 5)
    for b in range(5):
        rows = (t[b].expand(draws, -1) for t in (SIMILARITY, FORBIDDEN))
        columns = hard_negatives(*rows, torch.rand(draws) if noise is None else noise)
        counts[b] = torch.bincount(columns, minlength=5)
    return counts


def chances(similarity: Tensor, forbidden: Tensor = FORBIDDEN, floor: float = 0.0) -> Tensor:
    """Softmax with the forbidden ones taken out, and the rest stretched to 1."""
    chance = (similarity.softmax(1) + floor).masked_fill(forbidden, 0)
    return chance / chance.sum(1, keepdim=True)


def test_hard_negatives_by_hand():
    """One row with the shares 0, 1/2, 1/8, 3/8 (nearly, for the 1e-4): the noise 0.3 falls into the first of them."""
    similarity = torch.tensor([8.0, 4.0, 1.0, 3.0]).log().expand(6, -1)
    forbidden = torch.tensor([True, False, False, False]).expand(6, -1)
    noise = torch.tensor([0.0, 0.3, 0.49, 0.51, 0.61, 0.7])
    columns = hard_negatives(similarity, forbidden, noise)
    assert columns.tolist() == [1, 1, 1, 2, 2, 3] and columns.dtype == torch.long and columns.shape == (6,)


def test_hard_negatives_are_drawn_by_softmax_without_the_forbidden():
    """20,000 draws a row against the documented chances, chi-square with at most 3 degrees of freedom."""
    draws = 20_000
    counts = drawn(draws)
    assert not counts[FORBIDDEN].any() and (counts.sum(1) == draws).all()

    def misfit(expected: Tensor) -> float:
        """The largest chi-square of a row."""
        expected = draws * expected
        each = (counts - expected) ** 2 / expected.clamp(min=1e-9)
        return each.masked_fill(FORBIDDEN, 0).sum(1).max().item()

    assert misfit(chances(SIMILARITY)) < 20 and misfit(chances(SIMILARITY, floor=1e-4)) < 20
    even = (~FORBIDDEN) / (~FORBIDDEN).sum(1, keepdim=True)
    easy = chances(-SIMILARITY)
    hardest = F.one_hot(SIMILARITY.masked_fill(FORBIDDEN, -99).argmax(1), 5).float()
    wrong = {
        "evenly": even,
        "the easiest": easy,
        "the hardest": hardest,
        "not yet divided by the temperature": chances(0.1 * SIMILARITY),
        "along the columns": chances(SIMILARITY.T),
        "in proportion, without exp": chances(SIMILARITY.clamp(min=0.1).log()),
    }
    for name, expected in wrong.items():
        assert misfit(expected) > 200, name


def test_evenly_spread_noise_gives_each_column_its_share():
    """Without chance: of 100,000 equal steps of noise each column gets its own share, up to one at each end."""
    steps = 100_000
    counts = drawn(steps, noise=(torch.arange(steps) + 0.5) / steps)
    assert (counts - steps * chances(SIMILARITY, floor=1e-4)).abs().max() <= 1.1
    assert (counts - steps * chances(SIMILARITY)).abs().max() > 10  # the small chance of each is there as well
    # Where the model is nearly sure and leaves a thousandth or two for all others, it is much of the choice.
    sure = SIMILARITY + 6 * torch.eye(5)
    assert (chances(sure, floor=1e-4) - chances(sure)).abs().max() > 0.05


@pytest.mark.parametrize("similarity", [SIMILARITY, SURE, 0 * SURE, -SURE, 900 * SIMILARITY, SURE.roll(2, 1)])
def test_the_forbidden_are_never_drawn(similarity):
    """Not by noise at the very ends either, where rounding lurks, and wherever the forbidden ones stand."""
    forbidden = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 1], [0, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    rows = torch.arange(5)
    for forbid in (forbidden.bool(), FORBIDDEN):
        for end, side in ((0.0, 0), (1e-9, 0), (0.999_999_9, -1), (1 - 2**-24, -1), (1.0, -1)):  # 1.0: rounded up
            columns = hard_negatives(similarity, forbid, torch.full((5,), end))
            assert not forbid[rows, columns].any()
            # The two ends always give the first and the last that is allowed.
            assert columns.tolist() == [(~row).nonzero()[side].item() for row in forbid]
        for _ in range(200):
            assert not forbid[rows, hard_negatives(similarity, forbid, torch.rand(5))].any()
    edges = (similarity.softmax(1) + 1e-4).masked_fill(forbidden.bool(), 0).cumsum(1)
    wrong = {
        "the edge itself counts": torch.searchsorted(edges, torch.zeros(5, 1)),
        "rounded up to the end": torch.searchsorted(edges, edges[:, -1:].clone(), right=True).clamp(max=4),
    }
    for name, columns in wrong.items():
        assert forbidden[rows, columns[:, 0]].any(), name


def test_a_sure_model_still_draws_all_others():
    """Every similarity but that of the pair is as good as zero: then all wrong partners are equally likely."""
    eye, noise = torch.eye(5).bool(), (torch.arange(4) + 0.5) / 4
    for b in range(5):
        columns = hard_negatives(SURE[b].expand(4, -1), eye[b].expand(4, -1), noise)
        assert columns.tolist() == [j for j in range(5) if j != b]
    for similarity in (10 * SURE, 10 * SURE + 1e-4):  # the small chance comes after the softmax; before it is no help
        nothing = similarity.softmax(1).masked_fill(eye, 0)
        with pytest.raises(RuntimeError, match="invalid multinomial distribution"):
            torch.multinomial(nothing, 1)
        assert not hard_negatives(similarity, eye, torch.rand(5)).eq(torch.arange(5)).any()


def test_hard_negatives_are_drawn_and_not_picked():
    """The most similar one is drawn most often, but by no means always: another may teach more."""
    hardest = SIMILARITY.masked_fill(FORBIDDEN, -99).argmax(1)
    share = drawn(2000)[torch.arange(5), hardest] / 2000
    assert (share < 0.9).all() and (share > 0.2).all()
    close(share, chances(SIMILARITY)[torch.arange(5), hardest], 0.05)
    assert (drawn(2000) > 0)[~FORBIDDEN].all()


def test_hard_negatives_depend_on_the_noise_alone():
    noise = torch.rand(5)
    before = SIMILARITY.clone(), FORBIDDEN.clone(), noise.clone()
    torch.manual_seed(1)
    columns = hard_negatives(SIMILARITY, FORBIDDEN, noise)
    state = torch.get_rng_state()
    assert torch.equal(hard_negatives(SIMILARITY, FORBIDDEN, noise), columns)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn in there
    assert all(torch.equal(a, b) for a, b in zip((SIMILARITY, FORBIDDEN, noise), before, strict=True))
    for b in range(5):  # each row by itself
        close(hard_negatives(SIMILARITY[b : b + 1], FORBIDDEN[b : b + 1], noise[b : b + 1]), columns[b : b + 1], 0)
    close(hard_negatives(SIMILARITY + 100, FORBIDDEN, noise), columns, 0)
    assert len({tuple(hard_negatives(SIMILARITY, FORBIDDEN, torch.rand(5)).tolist()) for _ in range(20)}) > 5


def test_hard_negatives_give_no_gradient_and_take_half_precision():
    similarity = SIMILARITY.clone().requires_grad_()
    noise = torch.rand(5)
    columns = hard_negatives(similarity, FORBIDDEN, noise)
    assert not columns.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = hard_negatives(SIMILARITY.bfloat16(), FORBIDDEN, noise)  # its numbers are exact in bfloat16
    assert torch.equal(halved, columns)


def test_a_row_without_a_wrong_partner():
    message = "^a row has no wrong partner left: use a larger batch, or batches without repetitions$"
    with pytest.raises(ValueError, match=message):
        hard_negatives(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.rand(1))
    forbidden = FORBIDDEN.clone()
    forbidden[3] = True
    with pytest.raises(ValueError, match=message):
        hard_negatives(SIMILARITY, forbidden, torch.rand(5))
    forbidden[3, 1] = False
    assert hard_negatives(SIMILARITY, forbidden, torch.rand(5))[3] == 1
