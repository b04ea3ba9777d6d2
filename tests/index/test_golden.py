"""Every format on disk, as it was written once: today's program must read it, and still write it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from index_helpers import KINDS
from make_golden import GOLDEN, answers, build, encode

from index.manifest import IndexManifest
from index.search import Searcher
from index.store import IndexStore
from index.verify import verify
from retrieval_kd.encoders.corpus import EncodedCorpus

# What the library writes into these may change with its release; that they are still read is what counts.
LIBRARY = {"ann.faiss", "probes.npz", "manifest.json"}


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    # Reading makes lock files, and the golden ones stay as they are.
    return Path(shutil.copytree(GOLDEN / "stores" / request.param, tmp_path / "store"))


@pytest.mark.parametrize(("store", "kind"), [(kind, kind) for kind in KINDS], indirect=["store"])
def test_old_versions_are_still_read(store: Path, kind: str) -> None:
    """A release that cannot open yesterday's index takes every server down at once."""
    verify(store)
    with Searcher.open(store) as searcher:
        searcher.self_test()
    for found, expected in zip(answers(store), json.loads((GOLDEN / "answers.json").read_text())[kind], strict=True):
        assert found["doc_ids"] == expected["doc_ids"]
        assert found["fields"] == expected["fields"]
        np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["exact", "exact-float16", "exact-sq8"])
def test_what_is_written_is_what_was_written(kind: str, tmp_path: Path) -> None:
    """A format that changes without a new version number is found out by whoever goes back a release."""
    build(kind, tmp_path)
    old, new = IndexStore(GOLDEN / "stores" / kind).current(), IndexStore(tmp_path).current()
    names = {path.name for path in old.iterdir()}
    assert {path.name for path in new.iterdir()} == names
    for name in names - LIBRARY:
        assert (old / name).read_bytes() == (new / name).read_bytes(), name
    logs = [next((root / "updates").glob("*.log")) for root in (GOLDEN / "stores" / kind, tmp_path)]
    newest = tmp_path / "updates" / f"{new.name}.log"
    assert logs[0].read_bytes() == newest.read_bytes()
    assert IndexManifest.load(old).content.fingerprint == IndexManifest.load(new).content.fingerprint
    assert set(json.loads((old / "manifest.json").read_text())) == set(json.loads((new / "manifest.json").read_text()))


def test_encoded_corpora_are_still_read_and_written(tmp_path: Path) -> None:
    """Hours of encoding must survive an update of the program."""
    corpus = EncodedCorpus.load(GOLDEN / "encoded")
    assert corpus.ids == ["a\r", "b", "ü"]
    assert corpus.vectors[:, 0].tolist() == [3, 9, 5]
    encode(tmp_path / "encoded")
    for name in ("vectors.npy", "ids.txt", "card.json"):
        assert (tmp_path / "encoded" / name).read_bytes() == (GOLDEN / "encoded" / name).read_bytes()
