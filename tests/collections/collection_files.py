"""Small collections on disk for the tests of this room."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

DOCUMENTS = {"d1": ("Cats", "purr a lot"), "d2": ("", "dogs bark"), "d3": ("Bird", "")}
QUERIES = {"q1": "what purrs", "q2": "what barks"}


def write_beir(
    folder: Path,
    documents: Mapping[str, tuple[str, str]] = DOCUMENTS,
    queries: Mapping[str, str] = QUERIES,
    qrels: Mapping[str, Sequence[tuple[str, str, int]]] = {"test": [("q1", "d1", 1)], "train": [("q2", "d2", 2)]},
) -> Path:
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": i, "title": t, "text": b}) + "\n" for i, (t, b) in documents.items())
    )
    (folder / "queries.jsonl").write_text("".join(json.dumps({"_id": i, "text": t}) + "\n" for i, t in queries.items()))
    for split, rows in qrels.items():
        lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{g}" for q, d, g in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_msmarco(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "collection.tsv").write_text("0\tcats purr\n7\tdogs bark\n")
    (folder / "queries.train.tsv").write_text("1\twhat purrs\n")
    (folder / "queries.dev.tsv").write_text("2\twhat barks\n")
    (folder / "queries.dev.small.tsv").write_text("2\twhat barks\n")
    (folder / "queries.eval.tsv").write_text("9\tnever judged\n")
    (folder / "qrels.train.tsv").write_text("1\t0\t0\t1\n")
    (folder / "qrels.dev.tsv").write_text("2 0 7 1\n")
    return folder
