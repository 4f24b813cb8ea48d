"""Our training step beside other people's: `python -m minivlp.bench`, on the CPU in float32.

Every contender of a row gets the same weights, the same batch and the same optimiser, and must first give the same
numbers. They then take turns, each round in another order, so that a slow moment of the machine hits all of them;
times are medians over the rounds, and ratios are medians of the ratios within one round. Where a contender does fewer
operations for the same numbers, its name says so. On a machine with other work, `--cpu-time` gives steadier numbers.

A later lesson adds a `Row` to `ROWS`.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivlp.models.vit import ViT, ViTConfig
from minivlp.pretrained import from_hf

Batch = tuple[Tensor, ...]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Contender:
    """One implementation: `outputs(batch)` is a tensor that all contenders of a row must agree on."""

    name: str
    model: nn.Module
    outputs: Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Row:
    """One comparison. The first contender is the one that the others' times are divided by."""

    name: str  # what --rows selects by
    title: str
    contenders: Callable[[], list[Contender]]
    batch: Callable[[], Batch]
    loss: Callable[[Tensor, Batch], Tensor] | None  # (outputs, batch) -> scalar; None: forward alone, without gradients


# --- ViT -------------------------------------------------------------------------------------------------------------


class TorchViT(nn.Module):
    """The same ViT from torch's own parts, as one would put it together with `nn.TransformerEncoder`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        c = config
        self.patch_embed = nn.Conv2d(c.channels, c.width, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.tokens, c.width))
        layer = nn.TransformerEncoderLayer(
            c.width, c.heads, c.mlp_ratio * c.width, dropout=0.0, activation="gelu", layer_norm_eps=c.eps,
            batch_first=True, norm_first=True,
        )  # fmt: skip
        norm = nn.LayerNorm(c.width, eps=c.eps)
        self.encoder = nn.TransformerEncoder(layer, c.depth, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(c.width, c.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.encoder(x)[:, 0])

    @torch.no_grad()
    def copy_from(self, ours: ViT) -> TorchViT:
        self.patch_embed.weight.copy_(ours.embed.patch_embed.proj.weight.view_as(self.patch_embed.weight))
        self.patch_embed.bias.copy_(ours.embed.patch_embed.proj.bias)
        self.cls_token.copy_(ours.embed.cls_token)
        self.pos_embed.copy_(ours.embed.pos_embed)
        for layer, block in zip(self.encoder.layers, ours.encoder.blocks, strict=True):
            layer.self_attn.in_proj_weight.copy_(torch.cat([block.attn.q.weight, block.attn.kv.weight]))
            layer.self_attn.in_proj_bias.copy_(torch.cat([block.attn.q.bias, block.attn.kv.bias]))
            layer.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
            layer.linear1.load_state_dict(block.mlp.fc1.state_dict())
            layer.linear2.load_state_dict(block.mlp.fc2.state_dict())
            layer.norm1.load_state_dict(block.norm1.state_dict())
            layer.norm2.load_state_dict(block.norm2.state_dict())
        self.encoder.norm.load_state_dict(ours.encoder.norm.state_dict())
        self.head.load_state_dict(ours.head.state_dict())
        return self


def every_token(model: ViT, images: Tensor) -> Tensor:
    """Class scores with all tokens computed in the last block too, as the peers do, although only one is read."""
    tokens, _ = model.encoder(model.embed(images))
    return model.head(model.hidden(tokens[:, 0]))


def vit_contenders(config: ViTConfig) -> list[Contender]:
    """Ours twice, transformers' (if installed) and torch's, all with the weights of the first."""
    theirs = None
    if transformers_installed():
        theirs, ours = transformers_pair(config)
    else:
        ours = ViT(config)
        nn.init.normal_(ours.head.weight, std=0.02)  # a zero head would agree with everything
    short = ViT(ours.config)
    short.load_state_dict(ours.state_dict())
    peer = TorchViT(ours.config).copy_from(ours)
    contenders = [
        Contender("minivlp ViT, every token", ours, lambda batch: every_token(ours, batch[0])),
        Contender("minivlp ViT, last block for the class token alone", short, lambda batch: short(batch[0])[0]),
        Contender("torch.nn.TransformerEncoder", peer, lambda batch: peer(batch[0])),
    ]
    if theirs is not None:
        name = "transformers ViTForImageClassification, sdpa"
        contenders.append(Contender(name, theirs, lambda batch: theirs(batch[0]).logits))
    return contenders


def transformers_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def transformers_pair(config: ViTConfig) -> tuple[nn.Module, ViT]:
    """The official class at the sizes of `config` with random weights, and our model loaded from what it saves."""
    import transformers  # the one place of the package that knows it, and only if it is there

    official = transformers.ViTConfig(
        image_size=config.image_size, patch_size=config.patch_size, num_channels=config.channels,
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=config.mlp_ratio * config.width, num_labels=config.num_classes, layer_norm_eps=config.eps,
        attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.ViTForImageClassification(official)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, from_hf(folder)


def vit_row(patch_size: int, *, training: bool, batch_size: int = 64) -> Row:
    """The course's own ViT (width 128, depth 4) on pictures of 64 pixels."""
    config = ViTConfig(patch_size=patch_size)

    def batch() -> Batch:
        generator = torch.Generator().manual_seed(0)
        side, K = config.image_size, config.num_classes
        images = torch.rand(batch_size, config.channels, side, side, generator=generator) * 2 - 1
        return images, torch.randint(K, (batch_size,), generator=generator)

    step = "training step (forward, backward, AdamW)" if training else "forward in eval mode"
    return Row(
        name=f"vit-p{patch_size}-{'train' if training else 'eval'}",
        title=f"ViT, {step}: {config.image_size} px, patch {patch_size}, width {config.width}, depth {config.depth}, "
        f"batch {batch_size}",
        contenders=lambda: vit_contenders(config),
        batch=batch,
        loss=(lambda logits, batch: F.cross_entropy(logits, batch[1])) if training else None,
    )


ROWS: list[Row] = [vit_row(patch_size, training=training) for training in (True, False) for patch_size in (16, 8)]


# --- running ---------------------------------------------------------------------------------------------------------


def check_equal(row: Row, contenders: Sequence[Contender], batch: Batch, *, tolerance: float = 1e-4) -> float:
    """The largest difference of any contender's outputs and loss from the first one's; RuntimeError above tolerance."""
    with torch.no_grad():
        outputs = [contender.outputs(batch) for contender in contenders]
        worst = max((o - outputs[0]).abs().max().item() for o in outputs)
        if row.loss is not None:
            losses = [row.loss(o, batch).item() for o in outputs]
            worst = max(worst, *(abs(loss - losses[0]) for loss in losses))
    if not worst <= tolerance:
        raise RuntimeError(f"{row.name}: the contenders differ by {worst:.1e}, their times mean nothing")
    return worst


def stepper(row: Row, contender: Contender, batch: Batch) -> Callable[[], None]:
    """What is timed: one training step, or one forward pass."""
    if row.loss is None:
        contender.model.eval()

        def forward() -> None:
            with torch.inference_mode():
                contender.outputs(batch)

        return forward

    contender.model.train()
    optimizer = torch.optim.AdamW(contender.model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        row.loss(contender.outputs(batch), batch).backward()
        optimizer.step()

    return step


def race(
    row: Row, *, rounds: int = 15, seconds: float = 0.2, clock: Clock = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of one step, name -> one number per round. In a round each contender runs for about `seconds`."""
    torch.manual_seed(0)
    batch, contenders = row.batch(), row.contenders()
    check_equal(row, contenders, batch)
    steps = {contender.name: stepper(row, contender, batch) for contender in contenders}
    for step in steps.values():  # warm-up: allocator, thread pool, optimiser state
        step()
        step()
    first = next(iter(steps.values()))
    repeats = max(1, round(seconds / timed(first, 2, clock)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            times[name].append(timed(steps[name], repeats, clock))
        order = order[1:] + order[:1]
    return times


def timed(step: Callable[[], None], repeats: int, clock: Clock) -> float:
    """Seconds of one of `repeats` calls, with the garbage collector held back."""
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(repeats):
            step()
        return (clock() - start) / repeats
    finally:
        gc.enable()


def report(row: Row, times: dict[str, list[float]], batch_size: int) -> str:
    """A table: median milliseconds, items a second, and time divided by the first contender's, round by round."""
    names = list(times)
    width = max(map(len, names))
    lines = [row.title, f"  {'':{width}}  {'ms':>7}  {'pictures/s':>10}  {'time / first':>12}"]
    for name in names:
        median = statistics.median(times[name])
        ratio = statistics.median(own / first for own, first in zip(times[name], times[names[0]], strict=True))
        lines.append(f"  {name:{width}}  {1e3 * median:7.1f}  {batch_size / median:10.0f}  {ratio:12.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m minivlp.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--rows", nargs="+", default=[""], metavar="NAME", help="only rows whose name contains a NAME")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds of one thread, on a busy machine")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if any(name in row.name for name in options.rows)]
    if not rows:
        parser.error(f"no row is called {' '.join(options.rows)}: there are {', '.join(row.name for row in ROWS)}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least one is needed")
    if options.cpu_time and options.threads not in (None, 1):
        parser.error("--cpu-time counts one thread: a second one that waits would be counted as working")
    if options.cpu_time:
        options.threads = 1
    if options.threads:
        torch.set_num_threads(options.threads)
    threads, kind = torch.get_num_threads(), "CPU time" if options.cpu_time else "wall-clock time"
    print(f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)}, float32, {options.rounds} rounds, {kind}")
    if not transformers_installed():
        print("transformers is not installed and left out: pip install transformers to compare with it")
    clock = time.process_time if options.cpu_time else time.perf_counter
    for row in rows:
        times = race(row, rounds=options.rounds, clock=clock)
        print(f"\n{report(row, times, len(row.batch()[0]))}", flush=True)


if __name__ == "__main__":
    main()
