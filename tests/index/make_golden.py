"""Write ``golden/``: one small store of every kind and an encoded corpus, as the current formats have them.

Run it only when a format changes on purpose, with its version number: what is there must stay readable.

    PYTHONPATH=.:tests:tests/index python tests/index/make_golden.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from index_helpers import KINDS, Documents, clustered, corpus

from index.build import build_index
from index.search import Searcher
from retrieval_kd.artifacts import write_json
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_texts

GOLDEN = Path(__file__).parent / "golden"
ASKED = clustered(7, 3, 8)
FIELDS = {
    f"d{i:02d}": {
        "title": f"title {i}",
        "year": 1990 + i,
        "price": i / 4,
        "open": i % 2 == 0,
        "tags": ["ä", "b"][: i % 3],
        "other": {"i": i} if i % 5 else i,
    }
    for i in range(40)
}
NAMES = ["title", "year", "price", "open", "tags", "other"]


class Encoder:
    """Vectors without a model."""

    card = EncoderCard("golden", "bert", 1, 1, "mean", False, (8,), 32, "", "", "dot", "t", "w")

    def encode(self, texts: list[str], side: str) -> np.ndarray:
        return np.asarray([[len(text), ord(text[0]), 1, 2, 3, 4, 5, 6] for text in texts], dtype=np.float32)


def documents() -> EncodedCorpus:
    return corpus(clustered(1, 40, 8), ids=list(FIELDS))


def build(kind: str, folder: Path) -> None:
    """Build a store whose version has fields, folded updates and a log."""
    collection = Documents(FIELDS)
    owned = collection.owned(documents())
    build_index(owned, KINDS[kind], folder, collection=collection, fields=NAMES)
    with Searcher.open(folder) as searcher:
        searcher.upsert(["d03", "e"], clustered(5, 2, 8), [{"title": "new"}, {"year": 7}])
        searcher.delete(["d04"])
    build_index(owned, KINDS[kind], folder, collection=collection, fields=NAMES)
    with Searcher.open(folder) as searcher:
        searcher.upsert(["f"], clustered(6, 1, 8), [{"tags": ["z"], "price": 0.5}])


def answers(folder: Path) -> list[dict[str, object]]:
    with Searcher.open(folder) as searcher:
        return [
            {
                "doc_ids": list(ranking.doc_ids),
                "scores": [float(score) for score in ranking.scores],
                "fields": searcher.fields(ranking.doc_ids, NAMES),
            }
            for ranking in searcher.search(ASKED, 5)
        ]


def encode(folder: Path) -> None:
    encode_texts(Encoder(), {"b": "two words", "a\r": "one", "ü": "three"}, "document", folder)


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    expected = {}
    for kind in KINDS:
        build(kind, GOLDEN / "stores" / kind)
        first, *_ = sorted((GOLDEN / "stores" / kind / "versions").iterdir())
        shutil.rmtree(first)
        (GOLDEN / "stores" / kind / "updates" / f"{first.name}.log").unlink()
        expected[kind] = answers(GOLDEN / "stores" / kind)
    for lock in GOLDEN.rglob(".lock"):
        lock.unlink()
    encode(GOLDEN / "encoded")
    (GOLDEN / "encoded" / ".lock").unlink()
    write_json(GOLDEN / "answers.json", json.loads(json.dumps(expected)))


if __name__ == "__main__":
    main()
