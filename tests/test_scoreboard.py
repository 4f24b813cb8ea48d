"""The map's tables and the scoreboard: filled from recorded runs alone, with a dash where there is no number."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minivlp import DATA, diagrams, record
from minivlp.lessons import albef, blip, blip2, clip, flip, vilt, vit, vlmo
from minivlp.notebooks import ROOT
from minivlp.record import RecordError

torch.set_num_threads(1)
LESSONS = {"01_vit": vit, "02_vilt": vilt, "03_clip": clip, "04_flip": flip, "05_albef": albef, "06_vlmo": vlmo,
           "07_blip": blip, "08_blip2": blip2}  # fmt: skip
PAGE = """<!-- board --><!-- end -->
| one | <!-- headline 09_toy -->old<!-- end --> | two | <!-- headline 10_next -->old<!-- end --> |
<!-- scoreboard -->
old
<!-- end -->
the rest
"""


@dataclass(frozen=True)
class Recipe:
    steps: int = 3


def toy(name: str = "09_toy", **more: object) -> SimpleNamespace:
    """A lesson without any of the optional parts; `more` adds some."""
    return SimpleNamespace(NAME=name, EXPERIMENTS={"main": {"Toy": Recipe()}, "other": {"arm": Recipe()}}, **more)


FULL = {
    "BOARD": {"parameters": "parameters", "training seconds": "training seconds", "VQA": ("main", "Toy", "answers"),
              "VQA, question alone": ("main", "Toy", "blind"), "R@1 text to image": ("main", "Toy", "found"),
              "order swap": ("other", "arm", "swap"), "zero-shot kind": ("main", "Toy", "never measured")},
    "NOTES": {"training seconds": "scaled up", "R@1 text to image": "few queries", "R@1 image to text": "cannot",
              "attribute swap": "cannot", "zero-shot kind": "not said of a dash that waits"},
    "HEADLINE": ("finds {}, answers {}", ("main", "Toy", "found"), ("main", "Toy", "answers")),
    "SCOREBOARD": {"how it answers": ("main", "Toy", "answers"), "no such arm": ("main", "Other", "answers")},
}  # fmt: skip
METRICS = [{"answers": 0.5, "blind": 0.25, "found": 0.75}, {"answers": 0.7, "blind": 0.25, "found": 0.75}]
TIMINGS = {"timings": {"values": {"training seconds": 61.26}, "threads": 2, "machine": "2 CPU cores"},
           "facts": {"parameters": 1234567}}  # fmt: skip


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that puts a lesson's module and its recorded file into an empty clone."""
    lessons = {}

    def add(lesson: SimpleNamespace, **more: object) -> None:
        lessons[lesson.NAME] = lesson
        runs = {"main": {"Toy": [{"seed": k, "metrics": m} for k, m in enumerate(METRICS)]},
                "other": {"arm": [{"seed": k, "metrics": {"swap": 0.5}} for k in range(3)]}}  # fmt: skip
        content = {"about": {}, "recipes": record.recipes_of(lesson), "runs": runs} | more
        record.write_recorded(lesson.NAME, content)

    monkeypatch.setattr(record, "DATA", tmp_path / "data")
    monkeypatch.setattr(record, "lesson_module", lessons.__getitem__)
    (tmp_path / "notebooks").mkdir()
    add.page = tmp_path / "notebooks" / "README.md"
    add.page.write_text(PAGE, encoding="utf-8")
    return add


def cells(table: str, model: str) -> dict[str, str]:
    """heading -> cell of the model's row."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[0].strip("*") == model]
    return dict(zip(rows[0], row, strict=True))


# --- the board -------------------------------------------------------------------------------------------------------


def test_a_row_has_the_recorded_numbers_and_says_what_they_are(world):
    world(toy(**FULL), **TIMINGS)
    table = record.board()
    assert cells(table, "Toy") == {
        "model": "**Toy**", "seeds": "2 to 3", "parameters": "1,234,567", "training seconds": "61<sup>2</sup>",
        "R@1 text→image": "0.750 ± 0.000<sup>3</sup>", "R@1 image→text": "–<sup>4</sup>", "zero-shot kind": "–",
        "VQA": "0.600 ± 0.141", "attribute swap": "–<sup>4</sup>", "order swap": "0.500 ± 0.000",
        "ms for 1,000 x 1,000 pairs": "–",
    }  # fmt: skip
    notes = dict(re.findall(r"<sup>(\d)</sup> (.*?)(?:<br>)?$", table, flags=re.M))
    assert notes.pop("1").startswith("Not chance: Toy tuned on the questions alone")
    assert notes == {"2": "scaled up", "3": "few queries", "4": "cannot"}
    assert table.endswith("Times of Toy: 2 CPU cores.")


def test_chance_stands_first_with_the_baseline_of_the_questions(world):
    world(toy(**FULL))
    assert record.board().splitlines()[2].startswith("| chance |")
    row = cells(record.board(), "chance")
    assert [row[k] for k in ("R@1 text→image", "R@1 image→text", "zero-shot kind", "attribute swap", "order swap")] == [
        "0.001", "0.001", "0.083", "0.5", "0.5"]  # fmt: skip
    assert row["VQA"] == "0.250 ± 0.000<sup>1</sup>" and row["parameters"] == row["training seconds"] == "–"


def test_what_is_missing_is_a_dash_without_a_claim(world):
    world(toy(**FULL))  # a file from before there were timings
    row = cells(record.board(), "Toy")
    assert row["parameters"] == row["training seconds"] == "–"
    assert "scaled up" not in record.board() and "Times of" not in record.board()
    world(toy())
    assert set(cells(record.board(), "Toy").values()) == {"**Toy**", "–"}
    assert cells(record.board(), "chance")["VQA"] == "–"
    assert "<sup>" not in record.board()


def test_models_come_in_the_courses_order(world):
    world(toy("10_next"))
    world(toy(**FULL))
    assert [line.split(" | ")[2] for line in record.scoreboard().splitlines()[2:]] == ["0.600 ± 0.141", "–"]
    assert record.board().count("**Toy**") == 2
    assert list(record.recorded_lessons()) == ["09_toy", "10_next"]


def test_rows_hold_the_means_behind_the_board_and_none_for_each_dash(world):
    world(toy(**FULL), **TIMINGS)
    world(toy("10_next"))
    toys, nothing = record.board_rows()
    assert toys == {
        "model": "Toy", "parameters": 1234567, "training seconds": 61.26, "R@1 text to image": 0.75,
        "R@1 image to text": None, "zero-shot kind": None, "VQA": pytest.approx(0.6), "attribute swap": None,
        "order swap": 0.5, "ms for 1,000 x 1,000 pairs": None,
    }  # fmt: skip
    assert nothing == {"model": "Toy", **dict.fromkeys(record.COLUMNS)}
    world(toy(**FULL))  # a file from before there were timings
    assert record.board_rows()[0]["parameters"] is None


# --- the pages -------------------------------------------------------------------------------------------------------


def test_pages_are_filled_between_their_marks_and_nowhere_else(world):
    world(toy(**FULL), **TIMINGS)
    assert [path.name for path in record.write_boards()] == ["scoreboard.md", "README.md"]
    page = world.page.read_text(encoding="utf-8")
    headline = "<!-- headline 09_toy -->finds 0.750 ± 0.000, answers 0.600 ± 0.141<!-- end -->"
    assert page == (
        f"<!-- board -->\n{record.board()}\n<!-- end -->\n"
        f"| one | {headline} | two | <!-- headline 10_next -->to come<!-- end --> |\n"
        f"<!-- scoreboard -->\n{record.scoreboard()}\n<!-- end -->\nthe rest\n"
    )
    assert record.board() in (record.DATA / "scoreboard.md").read_text(encoding="utf-8")
    record.write_boards()
    assert world.page.read_text(encoding="utf-8") == page


def test_a_headline_with_a_number_missing_is_to_come(world):
    world(toy(HEADLINE=("finds {}, names {}", ("main", "Toy", "found"), ("main", "Toy", "never measured"))))
    assert record.headline("09_toy") == "to come"
    world(toy())
    assert record.headline("09_toy") == "to come" == record.headline("10_next")


@pytest.mark.parametrize(
    ("old", "new", "mark"),
    [("<!-- board -->", "", "board"), ("<!-- board --><!-- end -->", "<!-- board -->", "board"),
     ("<!-- scoreboard -->", "", "scoreboard"), ("old\n<!-- end -->", "old", "scoreboard"),
     ("<!-- headline 09_toy -->", "", "headline 09_toy"),
     ("-->old<!-- end --> | two", "-->old | two", "headline 09_toy")],
)  # fmt: skip
def test_a_lost_mark_is_named_and_nothing_is_written(old, new, mark, world):
    world(toy(**FULL))
    assert PAGE.count(old) == 1
    world.page.write_text(PAGE.replace(old, new), encoding="utf-8")
    message = f"README.md has lost its marks <!-- {mark} --> and <!-- end -->: put them back"
    with pytest.raises(RecordError, match=f"^{re.escape(message)}$"):
        record.write_boards()
    assert world.page.read_text(encoding="utf-8") == PAGE.replace(old, new)
    assert not (record.DATA / "scoreboard.md").exists()


def test_the_boards_are_written_without_running_anything(world, monkeypatch, capsys):
    for name in ("record", "clock", "one_run"):
        monkeypatch.setattr(record, name, lambda *_, **__: pytest.fail("ran something"))
    world(toy(**FULL))
    assert record.main(["--boards"]) == 0
    assert capsys.readouterr().out == "wrote data/scoreboard.md, notebooks/README.md\n"
    assert "0.600 ± 0.141" in world.page.read_text(encoding="utf-8")
    world.page.write_text("no marks here", encoding="utf-8")
    assert record.main(["--boards"]) == 1
    assert "has lost its marks" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--clock"], ["01_vit", "--boards"]])
def test_a_command_without_a_meaning_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        record.main(arguments)
    assert "name the lessons to record, for instance 01_vit, or give --boards alone" in capsys.readouterr().err


# --- the files of the clone ------------------------------------------------------------------------------------------


def test_the_pages_of_the_clone_hold_the_recorded_numbers():
    again = "run `python -m minivlp.record --boards`"
    assert (DATA / "scoreboard.md").read_text(encoding="utf-8") == record.board_page(), again
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert record.filled(page) == page, again
    edited = page.replace("0.998 ± 0.002", "0.999 ± 0.002")
    assert edited != page == record.filled(edited)  # a number changed by hand would be red above


def test_the_rows_of_the_clone_are_the_numbers_of_its_board():
    rows, table = record.board_rows(), record.board()
    assert [row["model"] for row in rows] == re.findall(r"^\| \*\*(.+?)\*\*", table, flags=re.M)
    for row in rows:
        printed = cells(table, row["model"])
        for key, heading in record.COLUMNS.items():
            text = re.sub("<sup>.*?</sup>", "", printed[heading]).split(" ±")[0]
            shown = None if text == record.DASH else float(text.replace(",", ""))
            assert row[key] == pytest.approx(shown, abs=0.5 if row[key] and row[key] >= 10 else 0.00051)


def test_the_map_has_a_row_for_every_lesson():
    page = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    marks = re.findall(r"<!-- headline (\w+) -->", page)
    assert [mark[:2] for mark in marks] == list(diagrams.LESSONS)
    for line, (number, (name, *_)) in zip(
        [line for line in page.splitlines() if "<!-- headline" in line], diagrams.LESSONS.items(), strict=True
    ):
        assert number in line.split("|")[1] and line.split("|")[2].strip().strip("*") == name


@pytest.mark.parametrize("name", LESSONS)
def test_every_source_of_a_lesson_exists(name):
    lesson = LESSONS[name]
    assert lesson.BOARD.keys() <= {*record.COLUMNS, record.ALONE} and lesson.NOTES.keys() <= record.COLUMNS.keys()
    assert lesson.BOARD.keys() | lesson.NOTES.keys() >= record.COLUMNS.keys()  # a dash for good is explained
    template, *sources = lesson.HEADLINE
    assert template.count("{}") == len(sources)
    named = {source for source in lesson.BOARD.values() if isinstance(source, str)}
    assert named - lesson.facts().keys() <= {"training seconds", "ms for 1,000 x 1,000 pairs"}
    sources += [*lesson.SCOREBOARD.values(), *(source for source in lesson.BOARD.values() if source not in named)]
    for experiment, arm, _ in sources:
        assert arm in lesson.EXPERIMENTS[experiment]
    if record.recorded_file(name).exists():
        recorded = record.load(name)
        assert all(record.number(recorded, source) != record.DASH for source in sources)
        assert json.dumps(recorded.facts) in ("{}", json.dumps(lesson.facts()))


@pytest.mark.parametrize("name", LESSONS)
def test_no_label_of_a_table_comes_twice(name):
    """Python keeps the last of two equal keys without a word, and ruff does not mind either."""
    tree = ast.parse(Path(LESSONS[name].__file__).read_text(encoding="utf-8"))
    for table in (node for node in ast.walk(tree) if isinstance(node, ast.Dict)):
        labels = Counter(key.value for key in table.keys if isinstance(key, ast.Constant))
        assert not [label for label, count in labels.items() if count > 1]


# --- the lessons' clocks ---------------------------------------------------------------------------------------------


# Lessons whose parts take turns are timed in another way: see the tests of their own.
CLOCKS = [name for name, lesson in LESSONS.items()
          if hasattr(lesson, "CLOCK_STEPS") and not hasattr(lesson, "take_turns")]  # fmt: skip


@pytest.mark.parametrize("name", CLOCKS)
def test_a_clock_scales_a_few_steps_of_the_main_recipe_to_all(name, monkeypatch):
    lesson, main = LESSONS[name], LESSONS[name].MAIN
    steps = []

    def fit(model: object, batches: object, loss: object, *, evaluate: object = None, **options: object) -> object:
        assert evaluate is None and (options["lr"], options["weight_decay"]) == (main.lr, main.weight_decay)
        for step in range(options["steps"]):
            batches(step)
        return SimpleNamespace(seconds=2.0, stopped=stopped)

    class Steps:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __call__(self, step: int) -> tuple:
            steps.append(step)
            return ()

    stopped = ""
    monkeypatch.setattr(lesson, "fit", fit)
    monkeypatch.setattr(lesson, "Batches", Steps, raising=False)  # where a lesson has them
    pages = SimpleNamespace(images=torch.zeros(1000, 1), captions=[("short", "full")] * 1000, scenes=[])
    if lesson is vit:
        monkeypatch.setattr(lesson, "examples", lambda *_, **__: ())
    else:
        monkeypatch.setattr(lesson, "ViLTBatches" if lesson is vilt else "CLIPBatches", Steps)
        monkeypatch.setattr(lesson, "pairs", lambda *_: pages)
        monkeypatch.setattr(lesson, "begin", lambda _: torch.nn.Linear(1, 1))
        asked = []
        if lesson is vilt:
            monkeypatch.setattr(lesson, "match_table", lambda _, images, texts: asked.append((len(images), texts)))
        else:
            monkeypatch.setattr(lesson, "retrieval", asked.append)
    found = lesson.clock(torch.device("cpu"))
    assert found["training seconds"] == pytest.approx(2.0 * main.steps / len(steps))
    assert set(found) == {source for source in lesson.BOARD.values() if isinstance(source, str)} - {"parameters"}
    if lesson is vit:
        assert steps == list(range(60))
    elif lesson is clip:
        assert steps == list(range(40)) and len(asked) == 2  # once to warm up
        clocks = iter([10.0, 10.5])
        monkeypatch.setattr(lesson.time, "perf_counter", lambda: next(clocks))
        assert lesson.clock(torch.device("cpu"))["ms for 1,000 x 1,000 pairs"] == pytest.approx(500)
    else:
        assert len(steps) == 40 and {b - a for a, b in pairwise(steps)} <= {main.steps // 40, -(-main.steps // 40)}
        share = sum(step < main.first * main.steps for step in steps) / 40
        assert share == pytest.approx(main.first, abs=0.03)  # both phases, with their shares
        assert asked[-1] == (250, ["full"] * 4)
        clocks = iter([10.0, 10.5])
        monkeypatch.setattr(lesson.time, "perf_counter", lambda: next(clocks))
        assert lesson.clock(torch.device("cpu"))["ms for 1,000 x 1,000 pairs"] == pytest.approx(500 * 1000)
    stopped = "stopped by hand"
    with pytest.raises(KeyboardInterrupt):
        lesson.clock(torch.device("cpu"))
