"""A first stage: a source of candidates and its run over the queries of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from retrieval_kd.runs import Run


class FirstStage:
    """One source; nothing is ranked before its run is asked for."""

    def __init__(self, name: str, fingerprint: str, rank: Callable[[], Run]) -> None:
        """Name a source.

        Args:
            name: What reports call it.
            fingerprint: Identity of what ranks.
            rank: Makes or reads the run.
        """
        self.name = name
        self.fingerprint = fingerprint
        self._rank = rank

    @cached_property
    def run(self) -> Run:
        """Return each query's ranking."""
        return self._rank()
