"""The real vectors that index and server benchmarks share: several collections as one corpus, encoded once.

Writes three artifacts, each resumed where a killed run stopped: ``OUT/encoder`` (the exported encoder),
``OUT/documents`` (vectors of every document) and ``OUT/queries`` (vectors of every query of dev and test,
which nothing was tuned on). Each collection is encoded once, into ``--artifacts``, which ``rkd run`` and ``rkd eval``
share.

    nice python benchmarks/union.py --out /tmp/union --collection data/msmarco --collection data/scifact
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.dense import encoded
from retrieval_kd.artifacts import MANIFEST, Spec, build
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import Collection, split_queries
from retrieval_kd.encoders.corpus import IDS, VECTORS, EncodedCorpus, encode_texts, write_ids, write_vectors
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import CollectionSpec, EncoderSpec, ExportSpec

HELD_OUT = ("dev", "test")
PROBES = 20


def main() -> None:
    arguments = parse_arguments()
    first, *others = arguments.collection
    collections = [open_collection(CollectionSpec(path)) for path in arguments.collection]
    queries = held_out_queries(collections)
    encoder = open_encoder(arguments.model, arguments.out / "encoder", queries, arguments.threads)
    corpus = encoded(encoder, open_collection(CollectionSpec(first, tuple(others))), arguments.artifacts)
    keep(corpus, arguments.out / "documents")
    encode_texts(encoder, queries, "query", arguments.out / "queries")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", action="append", required=True, help="a collection; give several to join them")
    parser.add_argument("--out", type=Path, required=True, help="where encoder, documents and queries go")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a sentence-transformers model")
    parser.add_argument("--artifacts", type=Path, default=Path("runs/artifacts"), help="where vectors are kept")
    parser.add_argument("--threads", type=int, help="threads of the encoder; one for each core by default")
    return parser.parse_args()


def keep(corpus: EncodedCorpus, folder: Path) -> None:
    """Write a joined corpus as one encoding, which is what the benchmarks open."""
    spec = Spec("encode", {}, {"encoder": corpus.card.fingerprint, "texts": corpus.texts_fingerprint})

    def work(target: Path) -> Mapping[str, Any]:
        write_vectors(target / VECTORS, [corpus.vectors], (len(corpus.ids), corpus.card.dimension))
        write_ids(target / IDS, corpus.ids)
        corpus.card.save(target)
        return {"texts": len(corpus.ids)}

    build(folder, spec, work)


def held_out_queries(collections: list[Collection]) -> dict[str, str]:
    """Return the queries of dev and test of every collection, under ``COLLECTION/ID``."""
    return {
        f"{collection.name}/{query_id}": text
        for collection in collections
        for split in HELD_OUT
        if split in collection.splits()
        for query_id, text in split_queries(collection, split).items()
    }


def open_encoder(model: str, folder: Path, texts: dict[str, str], threads: int | None) -> OnnxEncoder:
    if not (folder / MANIFEST).exists():
        probes = Probes(dict(list(texts.items())[:PROBES]), {}, {})
        export_encoder(TorchEncoder.load(EncoderSpec(model)), folder, ExportSpec(), probes)
    return OnnxEncoder.load(folder, threads)


if __name__ == "__main__":
    main()
