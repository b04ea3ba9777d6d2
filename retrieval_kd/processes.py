"""Which of ``torchrun``'s processes this is; read from the environment, without torch."""

from __future__ import annotations

import os


def count() -> int:
    """Return how many processes run the same command; 1 without ``torchrun``."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Return the number of this one among them; 0 speaks and writes for all."""
    return int(os.environ.get("RANK", "0"))
