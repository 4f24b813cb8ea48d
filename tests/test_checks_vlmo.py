"""The checks of lesson 06 accept right answers, written in several ways, and name each mistake they should know."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import check_helpers as helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.checks import CheckFailed
from minivlp.checks import vlmo as checks
from minivlp.data import PatchCodes
from minivlp.lessons.vlmo import out_of_reach
from minivlp.models.vlmo import MoMEBlock, VLMo, VLMoConfig, moves_in_stage_2, shares

torch.set_num_threads(1)
torch.zeros((), requires_grad=True).backward(torch.ones(()))  # PyTorch loads a lot at the first such call: not timed

LESSON = "06_vlmo.ipynb"

# ---------------------------------------------------------------------------------------------- right answers


def route_slices(x, L, experts, last, *, split=lambda x, L: (x[:, :L], x[:, L:]), words="text", picture="image",
                 join=lambda words, picture: torch.cat([words, picture], dim=1), pair=lambda x, own, pair: pair(x),
                 top=lambda last: last):  # fmt: skip
    """Right by default; the options make the wrong ones."""

    def own(x):
        left, right = split(x, L)
        return join(experts[words](left), experts[picture](right))

    return pair(x, own, experts["pair"]) if top(last) else own(x)


def route_where(x, L, experts, last):
    """All tokens through both experts, and then the right answer of the two."""
    if last:
        return experts["pair"](x)
    words = (torch.arange(x.shape[1]) < L)[:, None]
    return torch.where(words, experts["text"](x), experts["image"](x))


def route_in_place(x, text_length, experts, last):
    y = torch.zeros_like(x)
    for name, places in ({"pair": slice(None)} if last else
                         {"image": slice(text_length, None), "text": slice(text_length)}).items():  # fmt: skip
        y[:, places] = experts[name](x[:, places])
    return y


def route_one_by_one(x, text_length, experts, last):
    """Token after token."""
    names = ["pair" if last else "text" if t < text_length else "image" for t in range(x.shape[1])]
    return torch.stack([experts[name](x[:, t]) for t, name in enumerate(names)], dim=1)


def route_flat(x, text_length, experts, last):
    """The batch's words in one list, its patches in another, chosen by a mask."""
    if last:
        return experts["pair"](x.flatten(0, 1)).view_as(x)
    words = (torch.arange(x.shape[1]) < text_length).expand(x.shape[:2])
    y = x.clone()
    y[words], y[~words] = experts["text"](x[words]), experts["image"](x[~words])
    return y


def route_package(x, text_length, experts, last):
    """The lesson's own cut."""
    T = x.shape[1]
    along = [("pair", T)] if last else [("text", text_length), ("image", T - text_length)]
    return torch.cat([experts[name](part) for name, part in shares(x, along)], dim=1)


def code_square(patches, centres, *, table=lambda p, c: c.square().sum(-1) - 2 * p @ c.T,
                choose=lambda table: table.argmin(dim=-1)):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    return choose(table(patches, centres))


def code_cdist(patches, centres):
    return torch.cdist(patches, centres.expand(len(patches), -1, -1)).argmin(-1)


def code_difference(patches, centres):
    return ((patches.unsqueeze(2) - centres) ** 2).mean(3).min(dim=2).indices


def code_topk(patches, centres):
    """The largest of minus the distance."""
    return (-(patches[..., None, :] - centres).norm(dim=-1)).topk(1).indices.squeeze(-1)


def code_loop(patches, centres):
    codes = torch.zeros(patches.shape[:2], dtype=torch.long)
    for b, picture in enumerate(patches):
        for n, patch in enumerate(picture):
            codes[b, n] = min(range(len(centres)), key=lambda k: float((patch - centres[k]).square().sum()))
    return codes


def code_package(patches, centres):
    return PatchCodes(centres)(patches)


STARTS = ("embed.text.", "embed.types.", "mlm_head.", "norm.")


def stage_list(names, *, starts=STARTS, inside=(".experts.text.",)):
    """Right by default; the options make the wrong ones."""
    return [name for name in names if name.startswith(starts) or any(part in name for part in inside)]


def stage_set(names):
    return {name for name in names if moves_in_stage_2(name)}


def stage_words(names):
    """By the words between the dots."""
    chosen = []
    for name in names:
        match name.split("."):
            case ["mlm_head" | "norm", *_] | ["embed", "text" | "types", *_] | ["blocks", _, "experts", "text", *_]:
                chosen.append(name)
    return tuple(chosen)


def stage_pattern(names):
    """All names, without those that a pattern finds, backwards."""
    frozen = r"blocks\.\d+\.(gamma|norm1|attn|experts\.(image|pair))|embed\.(image|mask)|(itc|logit|itm|mim|pooler)"
    return [name for name in reversed(names) if not re.match(frozen, name)]


def partners_gpu(same, gpus, *, holder=lambda B, gpus: torch.arange(B) // (B // gpus), wrong=torch.logical_not,
                 local=lambda gpu: gpu[:, None] == gpu, join=torch.logical_and):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    return join(wrong(same), local(holder(len(same), gpus)))


def partners_blocks(same, gpus):
    """Squares along the diagonal."""
    per = len(same) // gpus
    return torch.block_diag(*[~same[i : i + per, i : i + per] for i in range(0, len(same), per)]).bool()


def partners_loop(same, gpus):
    B, table = len(same), torch.zeros_like(same)
    for i in range(B):
        for j in range(B):
            table[i, j] = not same[i, j] and i * gpus // B == j * gpus // B
    return table


def partners_kron(same, gpus):
    per = len(same) // gpus
    return torch.kron(torch.eye(gpus), torch.ones(per, per)).bool() > same


def partners_package(same, gpus):
    return ~out_of_reach(same, gpus)


def block_plain(x, mask, text_length, parts):
    h = x + parts.gamma_1 * parts.attn(parts.norm1(x), mask)
    if parts.last:
        norm, mlp = parts.experts["pair"]
        return h + parts.gamma_2 * mlp(norm(h))
    sides = zip(("text", "image"), (h[:, :text_length], h[:, text_length:]), strict=True)
    y = [mlp(norm(side)) for (norm, mlp), side in ((parts.experts[name], side) for name, side in sides)]
    return h + parts.gamma_2 * torch.cat(y, dim=1)


def block_sides(x, mask, text_length, parts):
    """The second sum for each side alone, and everything by keyword."""
    x = torch.addcmul(x, parts.attn(parts.norm1(x), mask=mask), parts.gamma_1)
    who = [("pair", x)] if parts.last else [("text", x[:, :text_length]), ("image", x[:, text_length:])]
    done = []
    for name, h in who:
        norm, mlp = parts.experts[name]
        done.append(h + mlp(norm(h)) * parts.gamma_2)
    return torch.cat(done, 1)


def block_where(x, mask, text_length, parts):
    h = parts.attn(parts.norm1(x), mask) * parts.gamma_1 + x
    y = {name: mlp(norm(h)) for name, (norm, mlp) in parts.experts.items()}
    words = torch.arange(x.shape[1])[:, None] < text_length
    return h + parts.gamma_2 * (y["pair"] if parts.last else torch.where(words, y["text"], y["image"]))


def block_route(x, mask, text_length, parts):
    """With the first exercise's answer."""
    experts = {name: lambda h, norm=norm, mlp=mlp: mlp(norm(h)) for name, (norm, mlp) in parts.experts.items()}
    h = x + parts.gamma_1 * parts.attn(parts.norm1(x), mask)
    return h + parts.gamma_2 * route_slices(h, text_length, experts, parts.last)


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Attend(Called):
    """`attn` of the check, called as a block of the package calls its own."""

    def forward(self, x, context, *, mask, need_weights):
        return self.function(x, mask[:, 0, 0]), None


def block_package(x, mask, text_length, parts):
    """The lesson's own block around the check's parts."""
    block = MoMEBlock(VLMoConfig(width=x.shape[2], heads=1), pair=True)
    block.norm1, block.attn = Called(parts.norm1), Attend(parts.attn)
    for name, (norm, mlp) in parts.experts.items():
        block.experts[name].norm, block.experts[name].mlp = Called(norm), Called(mlp)
    for name in ("gamma_1", "gamma_2"):
        delattr(block, name)
        setattr(block, name, getattr(parts, name))
    T = x.shape[1]
    along = [("pair", T)] if parts.last else [("text", text_length), ("image", T - text_length)]
    return block(x, along, mask=mask[:, None, None])[0]


RIGHT = [
    ("route", route_slices),
    ("route", route_where),
    ("route", route_in_place),
    ("route", route_one_by_one),
    ("route", route_flat),
    ("route", route_package),
    ("nearest_code", code_square),
    ("nearest_code", code_cdist),
    ("nearest_code", code_difference),
    ("nearest_code", code_topk),
    ("nearest_code", code_loop),
    ("nearest_code", code_package),
    ("trainable_in_stage_two", stage_list),
    ("trainable_in_stage_two", stage_set),
    ("trainable_in_stage_two", stage_words),
    ("trainable_in_stage_two", stage_pattern),
    ("allowed_partners", partners_gpu),
    ("allowed_partners", partners_blocks),
    ("allowed_partners", partners_loop),
    ("allowed_partners", partners_kron),
    ("allowed_partners", partners_package),
    ("multiway_block", block_plain),
    ("multiway_block", block_sides),
    ("multiway_block", block_where),
    ("multiway_block", block_route),
    ("multiway_block", block_package),
]
NAMES = sorted({name for name, _ in RIGHT})


@pytest.mark.parametrize(("name", "answer"), RIGHT, ids=[f.__name__ for _, f in RIGHT])
def test_a_right_answer_passes_with_one_line_and_in_a_second(name, answer, capsys):
    helpers.passes_with_one_line_and_in_a_second(checks, name, answer, capsys)


@pytest.mark.parametrize("attention", ["shared", "separate"])
def test_the_names_of_every_kind_of_vlmo_are_sorted_as_the_package_does(attention):
    """The package's rule is the definition; the check has a pattern of its own, for one attention."""
    model = VLMo(VLMoConfig(8, 4, 1, 5, 4, width=4, depth=3, heads=1, mlp_ratio=1, codes=3, attention=attention))
    names = [name for name, _ in model.named_parameters()]
    rule = {name for name in names if moves_in_stage_2(name)} - {name for name in names if ".attn.of.text." in name}
    assert rule == {name for name in names if re.search(checks._TRAINED, name)}
    assert len(rule) == 13 + 3 * 6


# --------------------------------------------------------------------------------------------- seeded mistakes


def routes(**options) -> Callable:
    return lambda *args: route_slices(*args, **options)


def cuts(move: int) -> Callable:
    """The cut some tokens further on."""
    return routes(split=lambda x, L: (x[:, : L + move], x[:, L + move :]))


def tops(pair: Callable) -> Callable:
    """Something else in the last F blocks, of x, the own experts and the one for pairs."""
    return routes(pair=pair)


def both(combine: Callable) -> Callable:
    """`combine` of what both experts say about all tokens."""
    return routes(split=lambda x, L: (x, x), join=combine)


def rows(change: Callable) -> Callable:
    """`change` of the right answer and text_length."""
    return lambda x, L, experts, last: change(route_slices(x, L, experts, last), L)


def route_image_first(x, L, experts, last):
    """As if the picture stood first."""
    S = x.shape[1] - L
    own = torch.cat([experts["image"](x[:, :S]), experts["text"](x[:, S:])], dim=1)
    return experts["pair"](x) if last else own


def route_changing(x, text_length, experts, last):
    x[:, :text_length] = experts["text"](x[:, :text_length])
    return x


def codes_by(table: Callable) -> Callable:
    """The lowest of another table, of patches and centres."""
    return lambda *args: code_square(*args, table=table)


def chooses(choose: Callable) -> Callable:
    """Another choice from the right table (B, N, K)."""
    return lambda *args: code_square(*args, choose=choose)


def codes(change: Callable) -> Callable:
    """`change` of the right codes (B, N)."""
    return lambda *args: change(code_square(*args))


def apart(patches: Tensor, centres: Tensor) -> Tensor:
    return patches[:, :, None] - centres


def code_in_place(patches, centres):
    patches -= patches.mean(-1, keepdim=True)
    return code_square(patches, centres)


def names_in(pattern: str, flag: bool = True) -> Callable:
    """The right names, and those in which the pattern is found as well, or, without `flag`, not."""

    def stage(names):
        right = set(stage_list(names))
        return [name for name in names if (flag if re.search(pattern, name) else name in right)]

    return stage


def lists(change: Callable) -> Callable:
    """`change` of the right list."""
    return lambda names: change(stage_list(names))


def stage_without_top(names):
    """L-FFN only below the blocks that have a VL-FFN."""
    top = {name.split(".")[1] for name in names if ".experts.pair." in name}
    return [name for name in stage_list(names) if not (name.startswith("blocks") and name.split(".")[1] in top)]


def stage_in_place(names):
    for name in [name for name in names if name not in stage_list(names)]:
        names.remove(name)
    return names


def holds(holder: Callable) -> Callable:
    """Another GPU for each row, of its number i, B and gpus."""
    return lambda *args: partners_gpu(*args, holder=lambda B, gpus: holder(torch.arange(B), B, gpus))


def partners(**options) -> Callable:
    return lambda *args: partners_gpu(*args, **options)


def tables(change: Callable) -> Callable:
    """`change` of the right table (B, B) and the number of rows on a GPU."""
    return lambda same, gpus: change(partners_gpu(same, gpus), len(same) // gpus)


def partners_in_place(same, gpus):
    same.logical_not_()
    return same & partners_gpu(~same, gpus)


def block_by_hand(
    x, mask, L, parts, *, attend=lambda p, x, mask, L: p.attn(p.norm1(x), mask),
    first=lambda p, x, y: x + p.gamma_1 * y, second=lambda p, x, h, e: h + p.gamma_2 * e,
    expert=lambda p, name, t: p.experts[name][1](p.experts[name][0](t)), reads=lambda p, x, y, h: h, **who,
):  # fmt: skip
    """Right by default; the options make the wrong ones."""
    y = attend(parts, x, mask, L)
    h = first(parts, x, y)
    experts = {name: (lambda t, name=name: expert(parts, name, t)) for name in parts.experts}
    e = route_slices(reads(parts, x, y, h), L, experts, parts.last, **who)
    return second(parts, x, h, e)


def blocks(**options) -> Callable:
    return lambda *args: block_by_hand(*args, **options)


def attends(attend: Callable) -> Callable:
    """Another attention, of the parts, x, mask and text_length."""
    return blocks(attend=attend)


def masks(change: Callable) -> Callable:
    """Another mask, of the right one and text_length."""
    return attends(lambda p, x, mask, L: p.attn(p.norm1(x), change(mask.clone(), L)))


def late_fusion(p, x, mask, L):
    x = p.norm1(x)
    return torch.cat([p.attn(x[:, :L], mask[:, :L]), p.attn(x[:, L:], mask[:, L:])], dim=1)


def picks(choose: Callable) -> Callable:
    """The LayerNorm of another part in front of an expert's MLP: `choose` of the expert's name, in the last blocks or
    not."""
    return blocks(expert=lambda p, name, t: p.experts[name][1](choose(p, name)(t)))


def norm_of(p, name: str) -> Callable:
    return p.experts[name][0]


def scaled(**gammas: Callable) -> Callable:
    """Other layer scales, of the parts."""

    def block(x, mask, L, parts):
        other = {name: value(parts) for name, value in gammas.items()}
        return block_by_hand(x, mask, L, SimpleNamespace(**vars(parts) | other))

    return block


def one(parts):
    return torch.ones_like(parts.gamma_1)


def own_norms(p, h: Tensor, L: int) -> Tensor:
    """Every token through the LayerNorm of its expert."""
    if p.last:
        return norm_of(p, "pair")(h)
    return torch.cat([norm_of(p, "text")(h[:, :L]), norm_of(p, "image")(h[:, L:])], dim=1)


def own_mlps(p, h: Tensor, L: int) -> Tensor:
    return route_slices(h, L, {name: mlp for name, (_, mlp) in p.experts.items()}, p.last)


def block_post(x, mask, L, p):
    h = p.norm1(x + p.gamma_1 * p.attn(x, mask))
    return own_norms(p, h + p.gamma_2 * own_mlps(p, h, L), L)


def block_norm_behind(x, mask, L, p):
    h = x + p.gamma_1 * p.norm1(p.attn(x, mask))
    return h + p.gamma_2 * own_norms(p, own_mlps(p, h, L), L)


def block_no_norms(x, mask, L, p):
    h = x + p.gamma_1 * p.attn(x, mask)
    return h + p.gamma_2 * own_mlps(p, h, L)


def block_stream(x, mask, L, p, *, second=True, first=True):
    """The stream is overwritten by what was normalised."""
    n = p.norm1(x)
    h = (n if first else x) + p.gamma_1 * p.attn(n, mask)
    n = own_norms(p, h, L)
    return (n if second else h) + p.gamma_2 * own_mlps(p, n, L)


def block_inside(x, mask, L, p, *, first=True, second=True):
    """The layer scales at what is read."""
    n = p.norm1(x)
    h = x + (p.attn(p.gamma_1 * n, mask) if first else p.gamma_1 * p.attn(n, mask))
    n = own_norms(p, h, L)
    return h + (own_mlps(p, p.gamma_2 * n, L) if second else p.gamma_2 * own_mlps(p, n, L))


def block_norms_in_the_last(x, mask, L, p):
    """VL-FFN's MLP behind the LayerNorms of the others."""
    h = x + p.gamma_1 * p.attn(p.norm1(x), mask)
    n = torch.cat([norm_of(p, "text")(h[:, :L]), norm_of(p, "image")(h[:, L:])], dim=1)
    return h + p.gamma_2 * own_mlps(p, n, L)


def block_image_first(x, mask, L, p):
    S = x.shape[1] - L
    return block_by_hand(x, mask, L, p, split=lambda h, L: (h[:, :S], h[:, S:]), words="image", picture="text")


def block_in_place(x, mask, L, p):
    x += p.gamma_1 * p.attn(p.norm1(x), mask)
    return x


def whole(change: Callable) -> Callable:
    """`change` of the right answer (B, T, D) and text_length."""
    return lambda x, mask, L, p: change(block_plain(x, mask, L, p), L)


def detached(name: str) -> Callable:
    """Right numbers, but one of the parts is cut off."""

    def block(x, mask, L, p):
        return block_plain(x, mask, L, SimpleNamespace(**vars(p) | {name: getattr(p, name).detach()}))

    return block


# What a route and a whole block can both get wrong: (words, options of `route_slices`).
WHO = [
    ("experts are swapped", {"words": "image", "picture": "text"}),
    ('every token goes to "pair" in every block', {"top": lambda last: True}),
    ('all tokens go to "text"', {"picture": "text"}),
    ('all tokens go to "image"', {"words": "image"}),
    ("`last` is not used", {"top": lambda last: False}),
    ("`last` is the wrong way round", {"top": lambda last: not last}),
    ('then through "pair"', {"pair": lambda x, own, pair: pair(own(x))}),
    ('"pair" is added', {"pair": lambda x, own, pair: own(x) + pair(x)}),
    ("one token too late", {"split": lambda x, L: (x[:, : L + 1], x[:, L + 1 :])}),
    ("one token too early", {"split": lambda x, L: (x[:, : L - 1], x[:, L - 1 :])}),
    ("wrong order behind their experts", {"join": lambda words, picture: torch.cat([picture, words], dim=1)}),
    ("both experts, and their answers are added", {"split": lambda x, L: (x, x), "join": torch.add}),
    ("both experts, and their answers are averaged", {
        "split": lambda x, L: (x, x), "join": lambda words, picture: (words + picture) / 2}),
]  # fmt: skip


def only(side: str) -> Callable:
    """In the last F blocks VL-FFN for one side alone, of a route's x, experts and text_length."""

    def mixed(x, L, experts):
        left = experts["pair" if side == "words" else "text"](x[:, :L])
        return torch.cat([left, experts["pair" if side == "picture" else "image"](x[:, L:])], dim=1)

    return mixed


def route_only(side: str) -> Callable:
    return lambda x, L, experts, last: only(side)(x, L, experts) if last else route_slices(x, L, experts, last)


def block_only(side: str) -> Callable:
    def block(x, mask, L, p):
        if not p.last:
            return block_plain(x, mask, L, p)
        experts = {name: (lambda t, name=name: p.experts[name][1](norm_of(p, name)(t))) for name in p.experts}
        h = x + p.gamma_1 * p.attn(p.norm1(x), mask)
        return h + p.gamma_2 * only(side)(h, L, experts)

    return block


MISTAKES = {
    "route": [
        *((words, routes(**options)) for words, options in WHO),
        ("only the words go to", route_only("words")),
        ("only the picture's tokens go to", route_only("picture")),
        ("you cut as if the picture stood first", route_image_first),
        (r"one token too late.*\[I_CLS\].*last = False, token 4 of row 0 .the picture's class token.", cuts(1)),
        (r"text_length = 4 of 8 tokens and last = False, token 3 of row 0 .a word.", cuts(-1)),
        ("last = True, token 0 of row 0", routes(top=lambda last: False)),
        ("you cut the batch, not the row", routes(split=lambda x, L: (x[:L], x[L:]), join=lambda *s: torch.cat(s))),
        ("you add x", lambda x, *rest: x + route_slices(x, *rest)),
        ("2 mistakes.*swapped.*`last` is not used", routes(words="image", picture="text", top=lambda last: False)),
        ("2 mistakes.*swapped.*too late", routes(
            words="image", picture="text", split=lambda x, L: (x[:, : L + 1], x[:, L + 1 :]))),
        ("no gradient reaches `x`", rows(lambda y, L: y.detach())),
        (r"\(5, 4, 3\). One side is missing, or you added both", routes(join=torch.add)),
        (r"\(5, 4, 3\). One side is missing", rows(lambda y, L: y[:, :L])),
        ("along the batch", routes(join=lambda *sides: torch.cat(sides))),
        ("along the numbers of a token", routes(join=lambda *sides: torch.cat(sides, dim=2))),
        ("You stacked the two sides", routes(join=lambda *sides: torch.stack(sides))),
        ("You stacked the two sides", routes(join=lambda *sides: torch.stack(sides, dim=1))),
        ("Every token is there twice", both(lambda *sides: torch.cat(sides, dim=1))),
        ("Keep the pairs of the batch apart", rows(lambda y, L: y.flatten(0, 1))),
        ("The batch comes first", rows(lambda y, L: y.transpose(0, 1))),
        ("changed its input `x` in place", route_changing),
        ("stopped with KeyError: 'words'", routes(words="words")),
        ("float64", rows(lambda y, L: y.double())),
        ("but yours is a tuple of 2", routes(join=lambda *sides: sides)),
        ("every number is 2 times", rows(lambda y, L: 2 * y)),
        ("not in a way that this check knows", rows(lambda y, L: y**2)),
        ("not in a way that this check knows", routes(split=lambda x, L: (x[:, ::2], x[:, 1::2]))),
    ],
    "nearest_code": [
        (r"largest dot product.*Patch \d+ of picture 0: your centre \d is at a distance of", codes_by(
            lambda p, c: -p @ c.T)),
        (r"largest dot product.*you need .c.\^2", codes_by(
            lambda p, c: p.square().sum(-1, keepdim=True) - 2 * p @ c.T)),
        ("the largest cosine", codes_by(lambda p, c: -F.cosine_similarity(p[:, :, None], c, dim=-1))),
        ("or bring the centres to length 1", codes_by(lambda p, c: torch.cdist(p, F.normalize(c, dim=-1)))),
        ("factor 2 is missing", codes_by(lambda p, c: c.square().sum(-1) - p @ c.T)),
        ("a sign is wrong", codes_by(lambda p, c: c.square().sum(-1) + 2 * p @ c.T)),
        ("where its square belongs", codes_by(lambda p, c: c.norm(dim=-1) - 2 * p @ c.T)),
        ("a mean of squares for", codes_by(lambda p, c: c.square().mean(-1) - 2 * p @ c.T)),
        ("absolute differences", codes_by(lambda p, c: apart(p, c).abs().sum(-1))),
        ("absolute differences", codes_by(lambda p, c: torch.cdist(p, c, p=1))),
        ("largest of the differences", codes_by(lambda p, c: torch.cdist(p, c, p=float("inf")))),
        (r"with their signs, and they cancel. Square each one first\.\n", codes_by(lambda p, c: apart(p, c).sum(-1))),
        ("Square each one first, not the sum", codes_by(lambda p, c: apart(p, c).sum(-1) ** 2)),
        ("the patches play no part", codes_by(lambda p, c: c.norm(dim=-1).expand(*p.shape[:2], -1))),
        (r"the \*farthest\* centre", chooses(lambda table: table.argmax(-1))),
        ("second nearest", chooses(lambda table: table.argsort(-1)[..., 1])),
        ("all patches of a picture get the same code", chooses(
            lambda table: table.sum(1).argmin(-1)[:, None].expand(table.shape[:2]))),
        ("all pictures get the same codes", chooses(lambda table: table.sum(0).argmin(-1).expand(table.shape[:2]))),
        ("the codes of the first one", codes(lambda own: own[:1].expand_as(own))),
        ("2 mistakes.*largest cosine.*farthest", codes_by(
            lambda p, c: F.normalize(p, dim=-1) @ F.normalize(c, dim=-1).T)),
        (r"\(2, 9\). The wrong axis: this is the nearest patch", chooses(lambda table: table.argmin(1))),
        (r"\(15, 9\). The wrong axis: you choose among the pictures", chooses(lambda table: table.argmin(0))),
        (r"\(2, 15, 9\). Are these the distances", chooses(lambda table: table)),
        ("Are these the centres themselves", lambda patches, centres: centres[code_square(patches, centres)]),
        ("Drop the last dimension", codes(lambda own: own[..., None])),
        ("one code for a picture", codes(lambda own: own[:, 0])),
        ("a number for each centre", lambda patches, centres: code_square(centres[None], centres)[0]),
        ("one row of codes for all pictures", codes(lambda own: own[0])),
        ("Keep the pictures apart", codes(torch.flatten)),
        ("Transposed", codes(torch.t)),
        ("argmin needs a `dim`", chooses(torch.argmin)),
        ("these are the distances to the nearest centres", lambda p, c: torch.cdist(p, c).amin(-1)),
        ("these are the distances to the nearest centres", lambda p, c: torch.cdist(p, c).square().amin(-1)),
        ("these are fractions", codes(torch.Tensor.float)),
        ("one too large. Codes count from 0", codes(lambda own: own + 1)),
        ("number of a centre, 0 to 8; yours reach from -9", codes(lambda own: own - 9)),
        ("dtype int64, yours is int32", codes(torch.Tensor.int)),
        ("but yours is a tuple of 2", lambda p, c: torch.cdist(p, c).min(-1)),
        ("but yours is a list", codes(torch.Tensor.tolist)),
        ("in place", code_in_place),
        ("not in a way that this check knows.*Patch", codes(lambda own: own.flip(1))),
    ],
    "trainable_in_stage_two": [
        ("all parameters are trained", lambda names: names),
        ("nothing is trained", lambda names: []),
        ("these are the frozen ones", lambda names: sorted(set(names) - set(stage_list(names)))),
        ('names with "text" in them', lambda names: [name for name in names if "text" in name]),
        (r"attention is trained. Pictures.*Too many: `blocks.0.attn.q.weight` and \d+ more", names_in(r"\.attn\.")),
        ("attention is trained, and its LayerNorm", names_in(r"\.attn\.|\.norm1\.")),
        ("share in a block is trained", names_in(r"\.attn\.|\.norm1\.|\.gamma_")),
        ("`norm1` is trained", names_in(r"\.norm1\.")),
        ("layer scales, `gamma_1` and `gamma_2`, are trained", names_in(r"gamma")),
        ("`norm1` and the layer scales", names_in(r"gamma|norm1")),
        ("V-FFN is trained. No word", names_in(r"experts\.image")),
        ("V-FFN's MLP is trained", names_in(r"experts\.image\.mlp")),
        ("V-FFN's LayerNorm is trained", names_in(r"experts\.image\.norm")),
        ("VL-FFN is trained", names_in(r"experts\.pair")),
        ("VL-FFN's MLP is trained", names_in(r"experts\.pair\.mlp")),
        ("VL-FFN's LayerNorm is trained", names_in(r"experts\.pair\.norm")),
        ("all three experts are trained", lambda names: stage_list(names, inside=(".experts.",))),
        ("LayerNorms of all three experts", lambda names: stage_list(names, inside=(".experts.text.", "norm."))),
        ("LayerNorms of the blocks are all trained", lambda names: stage_list(
            names, inside=(".experts.text.", "norm"))),
        (r"L-FFN is missing. It is what.*Missing: `blocks.0.experts.text.norm.weight` and", names_in(
            r"experts\.text", False)),
        ("L-FFN's MLP is missing", names_in(r"experts\.text\.mlp", False)),
        ("L-FFN's own LayerNorm is missing", names_in(r"experts\.text\.norm", False)),
        ("L-FFN of the last F blocks is missing", stage_without_top),
        ("only the first block's L-FFN", lambda names: stage_list(names, inside=("blocks.0.experts.text.",))),
        ("may have two digits", names_in(r"blocks\.\d\d\.experts\.text", False)),
        ("the last LayerNorm, `norm`, is missing", lambda names: stage_list(names, starts=STARTS[:3])),
        ("the embeddings are missing", lambda names: stage_list(names, starts=STARTS[2:])),
        ("embeddings of the words, `embed.text`, are missing", lambda names: stage_list(names, starts=STARTS[1:])),
        ("only the table of words", lambda names: stage_list(names, starts=("embed.text.word", *STARTS[1:]))),
        ("`embed.text.norm`, is missing", names_in(r"embed\.text\.norm", False)),
        ("the types, `embed.types`, are missing", names_in(r"^embed\.types", False)),
        ("`embed.image` and `embed.mask_patch`", lambda names: stage_list(names, starts=("embed.", *STARTS))),
        ("embeddings of pictures, `embed.image`, are trained", names_in(r"^embed\.image")),
        ("`embed.mask_patch` is trained", names_in(r"mask_patch")),
        ("the MLM head is missing", names_in(r"mlm_head", False)),
        ("only the output layer", names_in(r"mlm_head\.(dense|norm)", False)),
        ("ITC's projections of texts", lambda names: stage_list(names, inside=(".experts.text.", "text_proj"))),
        ("heads of ITM and MIM", lambda names: stage_list(names, inside=(".experts.text.", "_head."))),
        ("the pooler is trained", names_in("pooler")),
        ("all heads are trained", names_in(r"^(itc|itm|mim|pooler|logit)")),
        ("2 mistakes.*attention is trained.*the pooler is trained", names_in(r"\.attn\.|pooler")),
        ("2 mistakes.*V-FFN is trained.*the last LayerNorm", lambda names: stage_list(
            names, starts=STARTS[:3], inside=(".experts.text.", ".experts.image."))),
        ("`embed.text` is none of the names", lambda names: ["embed.text"]),
        ("`embed.types.weight` is in your list twice", lists(lambda own: [*own, own[4]])),
        ("list .or a set. of names, but yours is of type dict", lists(lambda own: dict.fromkeys(own, True))),
        ("but yours is of type str", lists(" ".join)),
        ("but yours is of type generator", lists(lambda own: (name for name in own))),
        ("holds one of type bool", lambda names: [moves_in_stage_2(name) for name in names]),
        ("input `names` in place", stage_in_place),
        ("not in a way that this check knows.*Missing: .*Too many: ", lambda names: names[: len(names) // 2]),
    ],
    "allowed_partners": [
        ("you mark what is forbidden", lambda *args: ~partners_gpu(*args)),
        ("you mark what is forbidden", out_of_reach),
        ("you forbid the diagonal alone", partners(wrong=lambda same: ~torch.eye(len(same), dtype=torch.bool))),
        ("`same` is not used", partners(wrong=torch.ones_like)),
        ("the diagonal is allowed", partners(wrong=lambda same: ~same | torch.eye(len(same), dtype=torch.bool))),
        ("`same` is transposed", partners(wrong=lambda same: ~same.T)),
        (r"that are \*right\* are allowed", partners(wrong=lambda same: same)),
        (r"`gpus` is not used.*With B = 12 and gpus = 3, picture 0 is on GPU 0 and text \d on GPU 1", partners(
            local=lambda gpu: torch.ones(len(gpu), len(gpu), dtype=torch.bool))),
        ("deal the rows out in turn", holds(lambda i, B, gpus: i % gpus)),
        ("you compare places within a GPU", holds(lambda i, B, gpus: i % (B // gpus))),
        ("divide by the number of GPUs", holds(lambda i, B, gpus: i // gpus)),
        (r"only texts of \*other\* GPUs", partners(local=lambda gpu: gpu[:, None] != gpu)),
        ("the texts of the first GPU", partners(local=lambda gpu: (gpu == 0).expand(len(gpu), -1))),
        (r"is enough for you \(or\)", partners(join=torch.logical_or)),
        ("right and on the same GPU", partners(join=lambda wrong, local: ~(~wrong & local))),
        ("2 mistakes.*the diagonal alone.*in turn", partners(
            wrong=lambda same: ~torch.eye(len(same), dtype=torch.bool),
            holder=lambda B, gpus: torch.arange(B) % gpus)),
        (r"\(4, 4\). That is the table of one GPU", tables(lambda table, per: table[:per, :per])),
        (r"\(3, 4, 4\). That is a table for each GPU", tables(lambda table, per: torch.stack(
            [table[i : i + per, i : i + per] for i in range(0, len(table), per)]))),
        ("texts of other GPUs have columns", tables(lambda table, per: table[:, :per])),
        ("one answer for each text", tables(lambda table, per: table.any(1))),
        ("Return a table", tables(lambda table, per: table.any())),
        ("dtype bool, yours is float32.*`.bool..`", tables(lambda table, per: table.float())),
        ("dtype bool, yours is int64", tables(lambda table, per: table.long())),
        ("but yours is a list", tables(lambda table, per: table.tolist())),
        ("input `same` in place", partners_in_place),
        ("stopped with TypeError|stopped with RuntimeError", lambda same, gpus: -same),
        ("not in a way that this check knows.*yours says False", tables(lambda table, per: table.flip(0))),
    ],
    "multiway_block": [
        *((words, blocks(**options)) for words, options in WHO),
        ("only the words go to", block_only("words")),
        ("only the picture's tokens go to", block_only("picture")),
        ("you cut as if the picture stood first", block_image_first),
        ("LayerNorms come after the sums", block_post),
        ("you normalise what attention and the MLP give", block_norm_behind),
        ("`norm1` is missing", attends(lambda p, x, mask, L: p.attn(x, mask))),
        ("the experts' LayerNorms are missing", picks(lambda p, name: lambda t: t)),
        ("all LayerNorms are missing", block_no_norms),
        (r"add attention's answer to norm1\(x\)", lambda *args: block_stream(*args, second=False)),
        (r"add the expert's answer to norm\(h\)", lambda *args: block_stream(*args, first=False)),
        ("the stream itself is normalised, twice", block_stream),
        ("the layer scales are forgotten", scaled(gamma_1=one, gamma_2=one)),
        ("`gamma_1` is forgotten", scaled(gamma_1=one)),
        ("`gamma_2` is forgotten", scaled(gamma_2=one)),
        ("`gamma_1` and `gamma_2` are exchanged", scaled(
            gamma_1=lambda p: p.gamma_2, gamma_2=lambda p: p.gamma_1)),
        ("you use `gamma_1` twice", scaled(gamma_2=lambda p: p.gamma_1)),
        ("you use `gamma_2` twice", scaled(gamma_1=lambda p: p.gamma_2)),
        ("the layer scales stand at the stream", blocks(
            first=lambda p, x, y: p.gamma_1 * x + y, second=lambda p, x, h, e: p.gamma_2 * h + e)),
        ("`gamma_1` stands at x", blocks(first=lambda p, x, y: p.gamma_1 * x + y)),
        ("`gamma_2` stands at h", blocks(second=lambda p, x, h, e: p.gamma_2 * h + e)),
        ("before the whole sums", blocks(
            first=lambda p, x, y: p.gamma_1 * (x + y), second=lambda p, x, h, e: p.gamma_2 * (h + e))),
        ("`gamma_1` stands before the whole sum", blocks(first=lambda p, x, y: p.gamma_1 * (x + y))),
        ("`gamma_2` stands before the whole sum", blocks(second=lambda p, x, h, e: p.gamma_2 * (h + e))),
        ("layer scales are applied to what", block_inside),
        ("`gamma_1` is applied to what", lambda *args: block_inside(*args, second=False)),
        ("`gamma_2` is applied to what", lambda *args: block_inside(*args, first=False)),
        ('one LayerNorm, that of "text"', picks(lambda p, name: norm_of(p, "text"))),
        ('the picture\'s tokens go through the LayerNorm of "text"', picks(
            lambda p, name: norm_of(p, "text" if name == "image" else name))),
        ('one LayerNorm, that of "image"', picks(lambda p, name: norm_of(p, "image"))),
        ('the words go through the LayerNorm of "image"', picks(
            lambda p, name: norm_of(p, "image" if name == "text" else name))),
        ('one LayerNorm, that of "pair"', picks(lambda p, name: norm_of(p, "pair"))),
        ("`norm1` is used twice", picks(lambda p, name: p.norm1)),
        ("are exchanged, but not their MLPs", picks(
            lambda p, name: norm_of(p, {"text": "image", "image": "text"}.get(name, name)))),
        ('the MLP is that of "pair"', block_norms_in_the_last),
        ("the MLP reads x", blocks(reads=lambda p, x, y, h: x)),
        ("the MLP reads attention's answer alone", blocks(reads=lambda p, x, y, h: y)),
        ("is added to x, and what attention", blocks(second=lambda p, x, h, e: x + p.gamma_2 * e)),
        ("the first sum is missing", blocks(first=lambda p, x, y: p.gamma_1 * y)),
        ("the second sum is missing", blocks(second=lambda p, x, h, e: p.gamma_2 * e)),
        ("both sums are missing", blocks(
            first=lambda p, x, y: p.gamma_1 * y, second=lambda p, x, h, e: p.gamma_2 * e)),
        ("late fusion.*text_length = 3 of 6 tokens and last = False, token 0", attends(late_fusion)),
        ("attention is missing", blocks(first=lambda p, x, y: x)),
        ("`mask` is not used", attends(lambda p, x, mask, L: p.attn(p.norm1(x)))),
        ("the mask is the wrong way round", masks(lambda mask, L: ~mask)),
        ("what attention tells the padding to 0", attends(
            lambda p, x, mask, L: p.attn(p.norm1(x), mask) * mask[..., None])),
        ("the picture is masked", masks(lambda mask, L: mask & (torch.arange(mask.shape[1]) < L))),
        ("the words are masked", masks(lambda mask, L: mask & (torch.arange(mask.shape[1]) >= L))),
        ("2 mistakes.*`gamma_2` is forgotten.*late fusion", lambda x, mask, L, p: block_by_hand(
            x, mask, L, SimpleNamespace(**vars(p) | {"gamma_2": one(p)}), attend=late_fusion)),
        ("2 mistakes.*come after the sums.*the layer scales are forgotten", lambda x, mask, L, p: block_post(
            x, mask, L, SimpleNamespace(**vars(p) | {"gamma_1": one(p), "gamma_2": one(p)}))),
        (r"`attn` got tokens \(2, 6, 6\) and a mask \(2, 1, 1, 6\)", masks(lambda mask, L: mask[:, None, None])),
        ("stopped with AttributeError: .*norm2", lambda x, mask, L, p: p.norm2(x)),
        ("stopped with TypeError", lambda x, mask, L, p: p.experts["text"](x)),
        ("no gradient reaches `x`", whole(lambda y, L: y.detach())),
        ("no gradient reaches `parts.gamma_1`", detached("gamma_1")),
        ("no gradient reaches `parts.gamma_2`", detached("gamma_2")),
        (r"\(2, 3, 6\). One side is missing", whole(lambda y, L: y[:, :L])),
        ("one token of each row", whole(lambda y, L: y[:, 0])),
        ("The batch comes first", whole(lambda y, L: y.transpose(0, 1))),
        ("changed its input `x` in place", block_in_place),
        ("float64", whole(lambda y, L: y.double())),
        ("but yours is a tuple of 2", whole(lambda y, L: (y, None))),
        ("every number is 2 times", whole(lambda y, L: 2 * y)),
        ("not in a way that this check knows", whole(lambda y, L: y**2)),
    ],
}  # fmt: skip
CASES = [(name, words, answer) for name, cases in MISTAKES.items() for words, answer in cases]


@pytest.mark.parametrize(("name", "words", "answer"), CASES, ids=[f"{name}: {words}" for name, words, _ in CASES])
def test_a_seeded_mistake_is_named(name, words, answer, capsys):
    helpers.is_named(checks, name, words, answer, capsys)


def test_every_slip_that_a_check_knows_is_seeded_here():
    known = {
        "route": checks._ROUTE_SLIPS,
        "nearest_code": checks._CODE_SLIPS,
        "trainable_in_stage_two": checks._STAGE_SLIPS,
        "allowed_partners": checks._PARTNER_SLIPS,
        "multiway_block": checks._BLOCK_SLIPS,
    }
    helpers.every_slip_is_seeded(checks, known, MISTAKES)


# ------------------------------------------------------------------------------------------ answers of any kind


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("words", "answer"), helpers.NO_ANSWERS)
def test_what_is_no_answer_is_explained(name, words, answer):
    helpers.is_explained(checks, name, words, answer)


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_instead_of_a_function_is_sent_back(name):
    helpers.a_value_is_sent_back(checks, name)


NOISE = {
    "route": rows(lambda y, L: torch.randn_like(y)),
    "nearest_code": codes(lambda own: torch.randint_like(own, 5)),
    "trainable_in_stage_two": lambda names: [name for name in names if torch.rand(()) < 0.3],
    "allowed_partners": tables(lambda table, per: torch.rand(table.shape) < 0.3),
    "multiway_block": whole(lambda y, L: torch.randn_like(y)),
}


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_of_the_right_shape_do_not_pass(name):
    """Type and shape right, content noise: the last resort of a check."""
    with pytest.raises(CheckFailed, match="not in a way that this check knows"):
        getattr(checks, name)(NOISE[name])


# ------------------------------------------------------------------------------------------------ good manners


@pytest.mark.parametrize(("name", "answer"), [*RIGHT[::5], ("multiway_block", helpers.stub)])
def test_global_random_states_are_left_as_they_were(name, answer):
    checks._names.cache_clear()  # building a model draws
    helpers.leaves_global_random_states(checks, name, answer)


@pytest.mark.parametrize(("name", "answer"), RIGHT[::5])
def test_the_verdict_does_not_depend_on_the_global_state(name, answer, capsys):
    helpers.verdict_under_any_global_state(checks, name, answer, capsys)


def test_checks_run_where_gradients_are_off():
    with torch.no_grad():
        for name, answer in RIGHT:
            getattr(checks, name)(answer)


def test_a_verdict_says_how_much_was_compared(capsys):
    for name, answer, said in (("nearest_code", code_square, "83 patches and up to 12 codes"),
                               ("trainable_in_stage_two", stage_list, r"3 models, 141 of \d+ names"),
                               ("allowed_partners", partners_gpu, "4 batches, on 1 to 4 GPUs")):  # fmt: skip
        getattr(checks, name)(answer)
        assert re.search(said, capsys.readouterr().out)


# ------------------------------------------------------------------------------------------------- the lesson


def test_the_lesson_has_an_exercise_for_every_check():
    helpers.has_an_exercise_for_every_check(LESSON, NAMES)


def test_the_lessons_own_solutions_pass(capsys):
    helpers.solutions_pass(checks, LESSON, capsys)


def test_without_its_solution_an_exercise_is_not_done_yet():
    helpers.is_not_done_without_solutions(checks, LESSON)
