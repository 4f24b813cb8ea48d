"""Instant feedback on the exercises, one module per lesson (`minivlp.checks.vit` for `notebooks/01_vit.ipynb`).

A check takes the learner's function, tries it, and either prints one line or raises `CheckFailed` with the probable
mistake in plain words. It knows that mistake because it also computes the usual wrong answers and compares. Checks
draw from their own generators: the state of torch's, NumPy's and Python's random numbers is the same afterwards.
"""

from __future__ import annotations

from minivlp.checks.core import CheckFailed

__all__ = ["CheckFailed"]
