"""Progress bars: for terminals only, one at a time."""

from __future__ import annotations

import io

import pytest

from retrieval_kd.progress import progress


class Terminal(io.StringIO):
    """A standard error that claims to be a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_only_the_outer_of_two_bars_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it reading a corpus inside a longer step would draw over that step's bar."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress("outer", 2, "steps") as advance:
        with progress("inner", 1, "bytes") as inner:
            inner(1)
        advance(2)
    with progress("later", 1, "steps") as advance:
        advance(1)
    assert "outer" in screen.getvalue()
    assert "later" in screen.getvalue()
    assert "inner" not in screen.getvalue()


def test_nothing_is_drawn_into_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a log file would fill with the escape codes of bars."""
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress("work", 1, "steps") as advance:
        advance(1)
    assert log.getvalue() == ""
