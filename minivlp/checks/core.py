"""What every check needs: call a learner's function safely, look at what comes back, find the mistake that explains it.

A check is a function of an `Attempt` that returns what it found right ("right for 7 cases"):

    @check
    def double(attempt: Attempt) -> str:
        x = torch.tensor([1.0, 2.0])
        attempt.compare(attempt.tensor(attempt(x), (2,)), 2 * x, [("this is the square, not the double", x**2)])
        return "right for 1 case"
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor


class CheckFailed(AssertionError):
    """An answer is wrong. The message names the probable mistake; its first line says the essential."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter and Colab show instead of the stack: the learner should read the sentence, not our frames."""
        return [f"{type(self).__name__}: {self}"]


class Slip(NamedTuple):
    """One way to go wrong: set `knob` of a reference to `value`, and say `message` when that explains the answer."""

    knob: str
    value: Any
    message: str


class Attempt:
    """A learner's function on trial. Calling it calls the function; all that goes wrong becomes a `CheckFailed`."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = name
        self.function = function

    def fail(self, message: str) -> NoReturn:
        raise CheckFailed(f"{self.name}: {message}")

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The function's answer. Fails when it raises, returns None, is not written yet or changes its input."""
        before = copy.deepcopy([arg if isinstance(arg, (Tensor, list)) else None for arg in args])
        try:
            answer = self.function(*args, **options)
        except Exception as error:
            # The stub of a student edition raises without a text; torch's "not implemented for 'Long'" has one.
            if isinstance(error, NotImplementedError) and not str(error):
                message = "not done yet. Write your answer in the cell above, run that cell, then this one."
                raise CheckFailed(f"{self.name}: {message}") from None
            raise CheckFailed(f"{self.name}: {_describe(error, self.function)}") from error
        for position, (arg, old) in enumerate(zip(args, before, strict=True)):
            if not _same(arg, old):
                self.fail(
                    f"your function changed its input `{self._argument(position)}` in place, and the caller still "
                    "needs it. Work on a copy (`.clone()`) or make a new tensor."
                )
        if answer is None:
            self.fail("your function returned None: is the `return` missing?")
        return answer

    def _argument(self, position: int) -> str:
        try:
            return list(inspect.signature(self.function).parameters)[position]
        except (IndexError, TypeError, ValueError):
            return f"argument {position + 1}"

    def tensor(
        self,
        answer: Any,
        shape: Sequence[int],
        *,
        symbols: str = "",
        what: str = "the answer",
        dtype: torch.dtype = torch.float32,
        shapes: Mapping[tuple[int, ...], str] | None = None,
    ) -> Tensor:
        """`answer` as a tensor without gradient, after its type, shape, dtype and finiteness have been checked.

        `symbols` names the shape in letters, "(B, D)". `shapes` says what a certain wrong shape tells.
        """
        if not isinstance(answer, Tensor):
            kind = f"a tuple of {len(answer)}" if isinstance(answer, tuple) else _a(type(answer).__name__)
            self.fail(f"{what} must be a torch.Tensor, but yours is {kind}.")
        shape, got = tuple(shape), tuple(answer.shape)
        if got != shape:
            hint = (shapes or {}).get(got, "")
            wanted = f"{symbols} = {shape}" if symbols else f"{shape}"
            self.fail(f"{what} has the wrong shape: expected {wanted}, got {got}. {hint}".rstrip())
        if answer.dtype != dtype:
            wanted = str(dtype).removeprefix("torch.")
            convert = ".float()" if dtype == torch.float32 else ".bool()" if dtype == torch.bool else f".to({dtype})"
            self.fail(f"{what} must be of dtype {wanted}, yours is {str(answer.dtype).removeprefix('torch.')}: "
                      f"compute in {wanted}, or convert with `{convert}`.")  # fmt: skip
        if dtype.is_floating_point and not answer.isfinite().all():
            kind = "NaN (0/0, or a value that was never set)" if answer.isnan().any() else "infinity (a division by 0)"
            self.fail(f"{what} holds {kind}.")
        return answer.detach().cpu()

    def compare(
        self,
        answer: Tensor,
        expected: Tensor,
        mistakes: Iterable[tuple[str, Tensor]] = (),
        *,
        atol: float = 1e-5,
        rtol: float = 1e-4,
        detail: str = "",
    ) -> None:
        """Fail unless `answer` equals `expected`, with the first of the `mistakes` that gives the same numbers.

        `detail` is what the message ends in, by default the place where both differ most.
        """
        if torch.allclose(answer, expected, rtol=rtol, atol=atol):
            return
        for message, wrong in mistakes:
            if wrong.shape == answer.shape and torch.allclose(answer, wrong.to(answer), rtol=rtol, atol=atol):
                self.fail(f"{message}\n{detail}".rstrip())
        factor = (answer * expected).sum() / (expected * expected).sum()
        if factor.abs() > 1e-3 and torch.allclose(answer, factor * expected, rtol=rtol, atol=atol):
            self.fail(f"every number is {factor:.4g} times as large as it should be.\n{detail}".rstrip())
        gap = (answer - expected).abs()
        place = [int(i) for i in np.unravel_index(int(gap.argmax()), gap.shape)]
        self.fail(
            "the numbers are wrong, and not in a way that this check knows.\n"
            f"{detail or f'At {place}: expected {expected[tuple(place)]:.4f}, got {answer[tuple(place)]:.4f}.'}"
        )

    def repeatable(self, run: Callable[[int], Sequence[Tensor]], *, drawn: str) -> None:
        """Fail unless `run(seed)`, the answer to a generator with that seed, depends on the seed and on nothing else.

        `drawn` names what is drawn, for the message.
        """
        reseed(1)
        first = run(0)
        reseed(2)  # an answer that draws from the global generator now gets other numbers
        if not all(map(torch.equal, first, run(0))):
            self.fail(
                "two calls with equally seeded generators gave different answers: some random numbers ignore "
                "`generator`. Pass `generator=generator` to every torch.rand, torch.randint and torch.randperm."
            )
        if any(map(torch.equal, first, run(1))):
            self.fail(f"generators with different seeds gave the same choice: {drawn} must be drawn from `generator`.")

    def learnable(self, output: Tensor, name: str) -> None:
        """Fail unless `output`, computed from a parameter `name` that asks for a gradient, hands one back to it."""
        if not output.requires_grad:
            self.fail(
                f"no gradient reaches `{name}`, so it could never be learned. Use it as it is: no .data, .detach(), "
                ".item(), no torch.no_grad()."
            )


def check(body: Callable[[Attempt], str]) -> Callable[[Callable[..., Any]], None]:
    """Make a check out of `body`: it takes the learner's function, prints one line, or raises `CheckFailed`."""

    @functools.wraps(body)
    def checked(answer: Callable[..., Any]) -> None:
        name = body.__name__
        if not callable(answer):
            raise CheckFailed(
                f"{name}: hand over the function itself, `checks.{name}({name})`, not {_a(type(answer).__name__)}."
            )
        with undisturbed():
            verdict = body(Attempt(name, answer))
        print(f"✓ {name}: {verdict}")

    checked.__annotations__ = {"answer": Callable[..., Any], "return": None}
    return checked


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever happens inside, the global random states are as before; tensors are made on the CPU."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def reseed(seed: int) -> None:
    """Set the global generators, inside `undisturbed`. The CPU's alone: no GPU state is touched."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)


def variants(build: Callable[..., Tensor], slips: Sequence[Slip], *, at_once: int = 2) -> Iterator[tuple[str, Tensor]]:
    """What comes out of each slip alone, then of two at once: pairs (message, `build(**slips)`) for `compare`."""
    for count in range(1, at_once + 1):
        for made in itertools.combinations(slips, count):
            knobs = {slip.knob: slip.value for slip in made}
            if len(knobs) == count:
                numbered = " ".join(f"({number}) {slip.message}" for number, slip in enumerate(made, start=1))
                message = made[0].message if count == 1 else f"{count} mistakes at once. {numbered}"
                yield message, build(**knobs)


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _same(now: Any, before: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(now, before)
    if isinstance(before, list):
        return len(now) == len(before) and all(map(_same, now, before))
    return True


def _describe(error: Exception, function: Callable[..., Any]) -> str:
    """The exception in one line, with the line of the learner's own code where it happened."""
    text = (str(error).strip().splitlines() or ["(no message)"])[0]
    code = getattr(function, "__code__", None)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    stopped = f"your function stopped with {type(error).__name__}: {text}"
    if frames:
        return f"{stopped}\nin line {frames[-1].lineno}: {frames[-1].line}"
    if isinstance(error, TypeError):
        return f"your function could not be called: {text}. Keep the names and the order of its arguments."
    return stopped
