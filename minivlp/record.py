"""Reference runs: rerun a lesson's experiments over several seeds and keep curves and final numbers.

    python -m minivlp.record 01_vit --seeds 5

writes `data/recorded/01_vit.json` (and the first seed's main model to `data/checkpoints/`). The notebook draws its own
run against this band and asserts against it; a file whose recipes are no longer the lesson's is refused.

The runs go side by side and share the cores, so seconds are measured apart, one lesson alone, after the runs:

    python -m minivlp.record 01_vit --clock     measures them again on a recorded file and leaves the runs as they are
    python -m minivlp.record --boards           writes data/scoreboard.md and the map's tables from the files alone

A lesson module may define, all optional:

    BOARD      column of `COLUMNS` -> (experiment, arm, metric), or the name of a timing or a fact
    NOTES      column of `COLUMNS` -> a footnote: how it was measured, or why the model cannot do it
    HEADLINE   the sentence on the map with a {} for each number, then one (experiment, arm, metric) for each {}
    SCOREBOARD label -> (experiment, arm, metric), for the list of what the lesson measured
    clock      (device) -> named timings;  facts: () -> named numbers that no run is needed for
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from minivlp import DATA
from minivlp.evaluate import mean_and_spread
from minivlp.train import save_weights, write_atomically


class RecordError(ValueError):
    """A recorded file that is missing, damaged, or made with other recipes than the lesson's."""


def lesson_module(name: str) -> ModuleType:
    """'01_vit' -> the module minivlp.lessons.vit. Raises RecordError if there is none."""
    module = f"minivlp.lessons.{name.split('_', 1)[-1]}"
    unknown = RecordError(f"there is no lesson called {name!r}: write its notebook's name, like 01_vit")
    try:
        lesson = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(str(error.name)):  # a library that the lesson needs is what is missing
            raise
        raise unknown from error
    if name != lesson.NAME:
        raise unknown
    return lesson


def recipes_of(lesson: ModuleType) -> dict[str, dict[str, dict]]:
    """Every recipe of a lesson as plain JSON values, for comparison with a recorded file."""
    plain = {experiment: {arm: asdict(recipe) for arm, recipe in arms.items()}
             for experiment, arms in lesson.EXPERIMENTS.items()}  # fmt: skip
    return json.loads(json.dumps(plain))


@dataclass(frozen=True)
class Recorded:
    """A lesson's recorded runs. `runs[experiment][arm]` is a list with one entry a seed: metrics, curves, steps.

    `timings` were measured alone with all threads on `clocked`, a machine in words; both, and `facts`, may be empty.
    """

    about: dict
    runs: dict[str, dict[str, list[dict]]]
    timings: dict[str, float] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    clocked: str = ""

    def values(self, experiment: str, arm: str, metric: str) -> list[float]:
        """One number a seed."""
        return [run["metrics"][metric] for run in self.runs[experiment][arm]]

    def summary(self, experiment: str, arm: str, metric: str = "test accuracy") -> str:
        """Mean ± standard deviation over the seeds, as text."""
        mean, spread = mean_and_spread(self.values(experiment, arm, metric))
        return f"{mean:.3f} ± {spread:.3f}"

    def table(self, experiment: str, metric: str) -> dict[str, list[float]]:
        """arm -> one number a seed, for the bar plots."""
        return {arm: self.values(experiment, arm, metric) for arm in self.runs[experiment]}

    def curves(self, experiment: str, arm: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps (n,) and one curve a seed (seeds, n) of a validation metric or a smoothed loss.

        A run that diverged ends early: NaN from there on.
        """
        curves = [run["curves"].get(name, {"steps": [], "values": []}) for run in self.runs[experiment][arm]]
        steps = max((curve["steps"] for curve in curves), key=len)
        if not steps:
            raise KeyError(name)
        rows = [curve["values"] + [math.nan] * (len(steps) - len(curve["values"])) for curve in curves]
        return np.array(steps), np.array(rows)


def recorded_file(name: str) -> Path:
    return DATA / "recorded" / f"{name}.json"


def write_recorded(name: str, content: dict) -> Path:
    path = recorded_file(name)
    text = json.dumps(content, separators=(",", ":")) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def load(name: str) -> Recorded:
    """The recorded runs of a lesson. Raises RecordError if they are missing, damaged or out of date."""
    path = recorded_file(name)
    again = f"run `python -m minivlp.record {name}` to make it again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about, recorded, runs = content["about"], content["recipes"], content["runs"]
        timings = content.get("timings", {"values": {}, "machine": ""})
        alone = timings["values"], content.get("facts", {}), timings["machine"]
    except FileNotFoundError as error:
        raise RecordError(f"{path.name} is missing from data/recorded: {again}") from error
    except (ValueError, KeyError, TypeError) as error:  # no text, no JSON, other JSON
        raise RecordError(f"{path.name} is damaged: {again}") from error
    current = recipes_of(lesson_module(name))
    changed = [f"{e}/{a}" for e in current.keys() | recorded.keys()
               for a in current.get(e, {}).keys() | recorded.get(e, {}).keys()
               if current.get(e, {}).get(a) != recorded.get(e, {}).get(a)]  # fmt: skip
    if changed:
        raise RecordError(f"{path.name} was recorded with other recipes ({', '.join(sorted(changed)[:5])}): {again}")
    return Recorded(about, runs, *alone)


def one_run(name: str, experiment: str, arm: str, seed: int, threads: int, scratch: Path) -> Path:
    """Run one arm with one seed and keep its numbers in `scratch`, so that an interrupted recording goes on."""
    lesson = lesson_module(name)
    recipe = lesson.EXPERIMENTS[experiment][arm]
    plain = json.loads(json.dumps(asdict(recipe)))
    path = scratch / f"{experiment}.{arm}.{seed}.json".replace(" ", "_").replace("/", "-")
    to_keep = [scratch / f"{weights}.safetensors" for weights, source in lesson.CHECKPOINTS.items()
               if source == (experiment, arm) and seed == 0]  # fmt: skip
    done = path.exists() and json.loads(path.read_text())["recipe"] == plain
    if done and all(weights.exists() for weights in to_keep):
        return path
    torch.set_num_threads(threads)
    run = lesson.run(recipe, seed=seed, device=torch.device("cpu"), progress=None)
    if run.history.stopped:  # `fit` turns Ctrl-C into a short run, which is no result
        raise KeyboardInterrupt
    h, window = run.history, 20
    curves = {}
    for loss, values in h.losses.items():
        joined = h.began.get(loss, h.steps - len(values))  # a loss may join later than the others
        steps = list(range(joined + window, joined + len(values) + 1, window))
        curves[loss] = {"steps": steps, "values": h.smooth(loss, window)}
    curves |= {metric: {"steps": h.measured_at.get(metric, h.metric_steps), "values": values}
               for metric, values in h.metrics.items()}  # fmt: skip
    for curve in curves.values():
        curve["values"] = [round(v, 4) for v in curve["values"]]
    metrics = {metric: round(value, 4) for metric, value in run.metrics.items()}
    for weights in to_keep:
        save_weights(run.model, weights, dtype=torch.float16, recipe=json.dumps(plain))
    content = {"recipe": plain, "run": {"seed": seed, "metrics": metrics, "curves": curves}}
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content)))
    return path


def run_all(
    name: str, todo: list[tuple[str, str, int]], *, jobs: int, threads: int, scratch: Path
) -> Iterator[tuple[tuple[str, str, int], Path]]:
    """Do every (experiment, arm, seed) of `todo`; yield it with the file of its numbers, in the order of finishing."""
    if jobs == 1:
        before = torch.get_num_threads()
        try:
            yield from ((task, one_run(name, *task, threads, scratch)) for task in todo)
        finally:
            torch.set_num_threads(before)
        return
    # Fresh processes: a fork of one whose torch has used its threads may hang. Ctrl-C ends them on the spot, which
    # their files survive, instead of being taken by `fit` for the wish to see a short run measured.
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    )
    try:
        futures = {pool.submit(one_run, name, *task, threads, scratch): task for task in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def record(name: str, *, seeds: int = 5, ablation_seeds: int = 3, jobs: int | None = None) -> Path:
    """Run everything the lesson lists (main run: `seeds` seeds, the others `ablation_seeds`) and write the file.

    `jobs` runs go side by side on the CPU, sharing its cores, so their wall-clock times are never recorded: `clock`
    measures some at the end. With `jobs=1` they go one after the other in this process. After Ctrl-C or an error call
    it again: it goes on from there.
    """
    lesson = lesson_module(name)
    cores = os.cpu_count() or 2
    jobs = jobs or cores
    threads = max(1, cores // jobs)
    scratch = Path("build") / "record" / name
    scratch.mkdir(parents=True, exist_ok=True)
    todo = [(e, a, s) for e, arms in lesson.EXPERIMENTS.items() for a in arms
            for s in range(seeds if e == "main" else ablation_seeds)]  # fmt: skip
    lesson.prepare()  # draw the pictures once, before the processes would all start to
    runs: dict[str, dict[str, list]] = {e: {a: [] for a in arms} for e, arms in lesson.EXPERIMENTS.items()}
    for done, ((e, a, s), path) in enumerate(run_all(name, todo, jobs=jobs, threads=threads, scratch=scratch), 1):
        run = json.loads(path.read_text())["run"]
        runs[e][a].append(run)
        print(f"[{done}/{len(todo)}] {e} / {a}, seed {s}: {run['metrics']}", flush=True)
    for arms in runs.values():
        for arm in arms.values():
            arm.sort(key=lambda run: run["seed"])
    packages = ("torch", "numpy", "datasets", "pillow")
    about = {
        "made": date.today().isoformat(),
        "command": f"python -m minivlp.record {name} --seeds {seeds} --ablation-seeds {ablation_seeds}",
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {threads} thread(s) a run",
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }
    path = write_recorded(name, {"about": about, "recipes": recipes_of(lesson), "runs": runs})
    for checkpoint in lesson.CHECKPOINTS:
        weights = (scratch / f"{checkpoint}.safetensors").read_bytes()
        write_atomically(DATA / "checkpoints" / f"{checkpoint}.safetensors", partial(Path.write_bytes, data=weights))
    if hasattr(lesson, "clock") or hasattr(lesson, "facts"):
        clock(name)
    return path


def clock(name: str) -> Path:
    """Measure the lesson's timings, alone and with all threads, and its facts; put both into its recorded file.

    The runs in the file stay as they are. Raises RecordError if the file cannot be used or there is nothing to measure.
    """
    lesson = lesson_module(name)
    if not (hasattr(lesson, "clock") or hasattr(lesson, "facts")):
        raise RecordError(f"{name} has nothing to measure: give its module a function `clock` or `facts`")
    load(name)  # refuses a file that the numbers would not belong to
    content = json.loads(recorded_file(name).read_text(encoding="utf-8"))
    if hasattr(lesson, "facts"):
        content["facts"] = dict(lesson.facts())
    if hasattr(lesson, "clock"):
        lesson.prepare()
        threads, before = os.cpu_count() or 2, torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            values = {what: round(value, 3) for what, value in lesson.clock(torch.device("cpu")).items()}
        finally:
            torch.set_num_threads(before)
        machine = f"{threads} CPU cores, {platform.machine()}, {threads} thread(s), torch {version('torch')}"
        content["timings"] = {"values": values, "threads": threads, "machine": machine}
        print(f"alone, with {threads} thread(s): {values}", flush=True)
    return write_recorded(name, content)


COLUMNS = {  # of the board: key -> heading
    "parameters": "parameters",
    "training seconds": "training seconds",
    "R@1 text to image": "R@1 text→image",
    "R@1 image to text": "R@1 image→text",
    "zero-shot kind": "zero-shot kind",
    "VQA": "VQA",
    "attribute swap": "attribute swap",
    "order swap": "order swap",
    "ms for 1,000 x 1,000 pairs": "ms for 1,000 x 1,000 pairs",
}
CHANCE = {"R@1 text to image": "0.001", "R@1 image to text": "0.001", "zero-shot kind": "0.083",
          "attribute swap": "0.5", "order swap": "0.5"}  # fmt: skip
ALONE = "VQA, question alone"  # what `BOARD` calls the baseline that stands where chance would
DASH = "–"

Source = str | tuple[str, str, str]


def recorded_lessons() -> dict[str, tuple[ModuleType, Recorded]]:
    """name -> module and recorded runs, of every file in data/recorded, in the course's order."""
    names = sorted(path.stem for path in (DATA / "recorded").glob("*.json"))
    return {name: (lesson_module(name), load(name)) for name in names}


def model_name(lesson: ModuleType) -> str:
    """The main run has one arm, which bears the model's name."""
    return next(iter(lesson.EXPERIMENTS["main"]))


def mean_of(recorded: Recorded, source: Source | None) -> float | None:
    """A recorded number, None if there is none (yet): the mean of a metric over the seeds, or a timing, or a fact."""
    if isinstance(source, str):
        return {**recorded.facts, **recorded.timings}.get(source)
    try:
        values = recorded.values(*source) if source is not None else []
    except KeyError:
        return None
    return mean_and_spread(values)[0] if values else None


def number(recorded: Recorded, source: Source | None) -> str:
    """The number of `mean_of` as text, a dash if there is none: that of a metric with its standard deviation."""
    value = mean_of(recorded, source)
    if value is None:
        return DASH
    if isinstance(source, str):
        return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
    return recorded.summary(*source)


def seeds_of(recorded: Recorded, sources: list[Source]) -> str:
    """How many seeds the numbers are means of: "5", or "3 to 5" where they differ."""
    found = {len(recorded.runs[s[0]][s[1]]) for s in sources if not isinstance(s, str) and number(recorded, s) != DASH}
    return " to ".join(map(str, sorted({min(found), max(found)}))) if found else DASH


def board() -> str:
    """One row a model, after a row of chance levels, as a Markdown table with its footnotes."""
    lessons = recorded_lessons()
    notes: dict[str, int] = {}

    def noted(cell: str, note: str) -> str:
        return f"{cell}<sup>{notes.setdefault(note, len(notes) + 1)}</sup>" if note else cell

    rows = []
    chance = dict(CHANCE)
    for lesson, recorded in lessons.values():
        sources = getattr(lesson, "BOARD", {})
        asked = number(recorded, sources.get(ALONE))
        if asked != DASH and "VQA" not in chance:
            alone = f"Not chance: {model_name(lesson)} tuned on the questions alone, without pictures."
            chance["VQA"] = noted(asked, alone)
    rows.append(["chance", DASH, *(chance.get(key, DASH) for key in COLUMNS)])
    for lesson, recorded in lessons.values():
        sources, remarks = getattr(lesson, "BOARD", {}), getattr(lesson, "NOTES", {})
        cells = []
        for key in COLUMNS:
            cell = number(recorded, sources.get(key))
            # A dash with a source waits for its number: how that is measured does not explain it.
            cells.append(cell if cell == DASH and key in sources else noted(cell, remarks.get(key, "")))
        seeds = seeds_of(recorded, [sources[key] for key in COLUMNS if key in sources])
        rows.append([f"**{model_name(lesson)}**", seeds, *cells])
    lines = ["| model | seeds | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    machines = {}
    for lesson, recorded in lessons.values():
        if recorded.clocked:
            machines.setdefault(recorded.clocked, []).append(model_name(lesson))
    below = [f"<sup>{n}</sup> {note}" for note, n in notes.items()]
    below += [f"Times of {', '.join(names)}: {machine}." for machine, names in machines.items()]
    return "\n".join([*lines, "", "<br>\n".join(below)] if below else lines)


def board_rows() -> list[dict[str, str | float | None]]:
    """The numbers of `board` for tables and plots of one's own: for each model its name as "model", and under each key
    of `COLUMNS` the mean, unrounded, or None where the board has a dash."""
    return [{"model": model_name(lesson),
             **{key: mean_of(recorded, getattr(lesson, "BOARD", {}).get(key)) for key in COLUMNS}}
            for lesson, recorded in recorded_lessons().values()]  # fmt: skip


def headline(name: str) -> str:
    """The lesson's headline result in words with its recorded numbers; "to come" as long as one of them is missing."""
    try:
        lesson, recorded = recorded_lessons()[name]
        template, *sources = lesson.HEADLINE
    except (KeyError, AttributeError):
        return "to come"
    numbers = [number(recorded, source) for source in sources]
    return "to come" if DASH in numbers else template.format(*numbers)


def scoreboard() -> str:
    """The recorded headline numbers of every lesson as a Markdown table."""
    lines = ["| lesson | what is measured | mean ± standard deviation | seeds |", "|---|---|---|---|"]
    for name, (lesson, recorded) in recorded_lessons().items():
        for label, source in getattr(lesson, "SCOREBOARD", {}).items():
            lines.append(f"| {name} | {label} | {number(recorded, source)} | {seeds_of(recorded, [source])} |")
    return "\n".join(lines)


def between_marks(text: str, mark: str, content: str, page: str) -> str:
    """The text with `content` between <!-- mark --> and the next <!-- end -->. Raises RecordError if they are gone."""
    before, begin, rest = text.partition(f"<!-- {mark} -->")
    old, end, after = rest.partition("<!-- end -->")
    if not begin or not end or "<!--" in old:  # the end that was found belongs to another mark
        raise RecordError(f"{page} has lost its marks <!-- {mark} --> and <!-- end -->: put them back")
    return before + begin + content + end + after


def filled(text: str, page: str = "README.md") -> str:
    """A page with all that is recorded put between its marks: the board, the scoreboard and a headline a lesson."""
    text = between_marks(text, "board", f"\n{board()}\n", page)
    text = between_marks(text, "scoreboard", f"\n{scoreboard()}\n", page)
    for name in sorted({*re.findall(r"<!-- headline (\w+) -->", text), *recorded_lessons()}):
        text = between_marks(text, f"headline {name}", headline(name), page)
    return text


def board_page() -> str:
    """What data/scoreboard.md says."""
    words = (
        "All models of the course on the same test split of the picture book (normal tier). Mean ± standard "
        "deviation over seeds, from the runs in [recorded](recorded); a dash where there is no number. This page is "
        "written by `python -m minivlp.record --boards`, so do not edit it."
    )
    return f"# Scoreboard\n\n{words}\n\n{board()}\n"


def write_boards() -> list[Path]:
    """Write data/scoreboard.md and fill notebooks/README.md, where there is one, from the recorded files; runs nothing.

    Raises RecordError if a file cannot be used or the page has lost a mark; then neither page is changed.
    """
    texts = {DATA / "scoreboard.md": board_page()}
    if (page := DATA.parent / "notebooks" / "README.md").exists():
        texts[page] = filled(page.read_text(encoding="utf-8"), page.name)
    for path, text in texts.items():
        write_atomically(path, partial(Path.write_text, data=text, encoding="utf-8"))
    return list(texts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m minivlp.record", description=__doc__.splitlines()[0])
    parser.add_argument("lesson", nargs="*", help="for instance 01_vit")
    parser.add_argument("--seeds", type=int, default=5, help="of the main run")
    parser.add_argument("--ablation-seeds", type=int, default=3, help="of every other arm")
    parser.add_argument("--jobs", type=int, help="runs side by side; default: one a core")
    parser.add_argument("--clock", action="store_true", help="only measure the timings again, alone; keep the runs")
    parser.add_argument("--boards", action="store_true", help="only write the pages with the recorded numbers")
    options = parser.parse_args(arguments)
    if bool(options.lesson) == options.boards:
        parser.error("name the lessons to record, for instance 01_vit, or give --boards alone")
    try:
        for name in options.lesson:
            if options.clock:
                path = clock(name)
            else:
                path = record(name, seeds=options.seeds, ablation_seeds=options.ablation_seeds, jobs=options.jobs)
            write_boards()
            print("wrote", path.name)
        if options.boards:
            print("wrote", ", ".join(f"{path.parent.name}/{path.name}" for path in write_boards()))
    except RecordError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "" if options.clock else f"; finished runs are kept in build/record/{name} and will not be repeated"
        print(f"stopped{kept}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
