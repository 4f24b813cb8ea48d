"""What can be wrong with data: an error when nothing usable is left, a warning when the good rows are kept."""

from __future__ import annotations


class DataError(ValueError):
    """The data cannot be used; the message says in one sentence what to do."""


class DataWarning(UserWarning):
    """Some of the data was left out or made again; the message counts it and names the first cases."""
