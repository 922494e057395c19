"""Errors of the user: each says what, where, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecsysError(Exception):
    """A mistake that the user can mend; the command prints the message and exits with 2."""


class ConfigError(RecsysError):
    """A configuration key or value that cannot be meant."""


class DataError(RecsysError):
    """A log, item table or vector file that cannot be read as the schema says."""


class BundleError(RecsysError):
    """A bundle or prepared dataset that is damaged, foreign or does not match itself."""


class QueryError(RecsysError):
    """A question that the recommender cannot answer as it was put."""


def as_exception(error: BaseException) -> Exception:
    """The error as whoever waits for another thread's work may be given it.

    What is no Exception (a panic of Polars, a SystemExit in a library) would end the waiting
    thread too.
    """
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a phrase that names the known name nearest to `name`, or lists what is known."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(sorted(known)[:20])}."
