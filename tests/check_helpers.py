"""What the tests of every lesson's checks have in common (`test_checks_vit.py`, `test_checks_vilt.py`)."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minivlp.checks import CheckFailed
from minivlp.checks.core import Slip
from minivlp.notebooks import LESSONS, files

# ------------------------------------------------------------------------------------------------ right and wrong


def passes_with_one_line_and_in_a_second(checks: ModuleType, name: str, answer: Callable, capsys) -> None:
    start = time.perf_counter()
    assert getattr(checks, name)(answer) is None
    assert time.perf_counter() - start < 1
    assert re.fullmatch(rf"✓ {name}: right.*\n", capsys.readouterr().out)


def is_named(checks: ModuleType, name: str, words: str, answer: Callable, capsys) -> None:
    """The check `name` must reject `answer` with a message that matches `words`, and print nothing."""
    with pytest.raises(CheckFailed, match=f"(?is)^{name}: .*{words}") as caught:
        getattr(checks, name)(answer)
    # One mistake must not be taken for two, nor two for one.
    assert ("mistakes at once" in str(caught.value)) == ("2 mistakes" in words)
    assert capsys.readouterr().out == ""


def every_slip_is_seeded(
    checks: ModuleType, known: Mapping[str, Sequence[Slip]], mistakes: Mapping[str, list[tuple[str, Callable]]]
) -> None:
    """A message that no test provokes may be one that cannot come."""
    for name, slips in known.items():
        heard = []
        for _, answer in mistakes[name]:
            with pytest.raises(CheckFailed) as caught:
                getattr(checks, name)(answer)
            heard.append(str(caught.value))
        silent = [slip.message for slip in slips if not any(slip.message in said for said in heard)]
        assert not silent, silent


# ------------------------------------------------------------------------------------------- answers of any kind


def stub(*args, **options):
    raise NotImplementedError()


def crash(*args, **options):
    return args[0].no_such_thing


def torch_complains(*args, **options):
    return torch.zeros(2, dtype=torch.bool).sort().values @ torch.zeros(3, dtype=torch.bool)


# (what the message must say, the function): no check may accept any of these, or stumble over it.
NO_ANSWERS = [
    ("not done yet", stub),
    ("returned None: is the `return` missing", lambda *args, **options: None),
    (r"stopped with AttributeError: .*no_such_thing.*in line \d+: return args\[0\].no_such_thing", crash),
    ("your function stopped with", torch_complains),
    ("could not be called: .*Keep the names", lambda: 1),
    ("must be|return two things", lambda *args, **options: "garbage"),
    ("must be|return two things|should be|wrong shape", lambda *args, **options: [3.5, 4.5]),
    ("must be|wrong shape|return two things", lambda *args, **options: torch.randn(5, 5)),
    ("must be|return two things|not finite", lambda *args, **options: float("inf")),
    ("must be|return two things|should be", lambda *args, **options: True),
    ("torch.Tensor|must be", lambda *args, **options: (1, 2)),
]


def is_explained(checks: ModuleType, name: str, words: str, answer: Callable) -> None:
    with pytest.raises(CheckFailed, match=f"(?s)^{name}: .*({words})"):
        getattr(checks, name)(answer)


def a_value_is_sent_back(checks: ModuleType, name: str) -> None:
    with pytest.raises(CheckFailed, match=f"hand over the function itself, `checks.{name}\\({name}\\)`, not an int"):
        getattr(checks, name)(196)


# -------------------------------------------------------------------------------------------------- good manners


def leaves_global_random_states(checks: ModuleType, name: str, answer: Callable) -> None:
    """Even where the learner's function draws from every global generator."""

    def drawing(*args, **options):
        torch.rand(3), np.random.rand(3), random.random()
        return answer(*args, **options)

    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    try:
        getattr(checks, name)(drawing)
    except CheckFailed:
        assert answer is stub
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def verdict_under_any_global_state(checks: ModuleType, name: str, answer: Callable, capsys) -> str:
    """The line that a right answer earns, which must not depend on the global random state."""
    lines = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        getattr(checks, name)(answer)
        lines.add(capsys.readouterr().out)
    assert len(lines) == 1
    return lines.pop()


# ----------------------------------------------------------------------------------------------------- the lesson


def exercise_cells(lesson: str) -> list[tuple[str, str, str]]:
    """(grade_id, solution, check) of each exercise of a lesson, `01_vit.ipynb`."""
    cells = files.read(LESSONS / lesson).cells
    by_id = {cell.metadata.nbgrader.grade_id: cell.source for cell in cells if "nbgrader" in cell.metadata}
    return [(name, by_id[name], by_id[f"{name}-check"]) for name in sorted(by_id) if not name.endswith("-check")]


def in_lesson(checks: ModuleType, *cells: str) -> None:
    scope = {"torch": torch, "F": F, "nn": nn, "checks": checks}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec"), scope)


def has_an_exercise_for_every_check(lesson: str, names: list[str]) -> None:
    called = [re.fullmatch(r"checks\.(\w+)\((\w+)\)", check).groups() for _, _, check in exercise_cells(lesson)]
    assert all(first == second for first, second in called)
    assert sorted(name for name, _ in called) == names


def solutions_pass(checks: ModuleType, lesson: str, capsys, *, number: int = 5) -> None:
    exercises = exercise_cells(lesson)
    for _, solution, check in exercises:
        in_lesson(checks, solution, check)
    assert capsys.readouterr().out.count("✓") == len(exercises) == number


def is_not_done_without_solutions(checks: ModuleType, lesson: str) -> None:
    exercises = exercise_cells(lesson)
    assert exercises
    for _, solution, check in exercises:
        blank = re.sub(r"(?s)### BEGIN SOLUTION.*### END SOLUTION", "raise NotImplementedError()", solution)
        assert blank != solution
        with pytest.raises(CheckFailed, match="not done yet"):
            in_lesson(checks, blank, check)
