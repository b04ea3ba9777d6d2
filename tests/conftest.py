"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real collections and models beside the project, or skip."""
    if not SHARED.is_dir():
        pytest.skip("the real collections and models in ../shared are not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root with a tiny collection and encoder, where tests share artifacts as users do."""
    from tiny import tiny_collection_folder, tiny_encoder_folder

    root = tmp_path_factory.mktemp("tiny")
    tiny_collection_folder(root / "tiny-collection")
    tiny_encoder_folder(root / "tiny-encoder")
    return root
