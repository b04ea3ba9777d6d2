"""What the server benchmarks serve: a student of three layers over the documents of ``benchmarks/union.py``.

The student keeps three layers of the documents' encoder and is not trained: its rankings mean nothing, its speed is
that of a trained one. Writes ``OUT/encoder``, ``OUT/model`` (the same student in sentence-transformers' layout),
``OUT/store`` (the index, fastscan), ``OUT/hnsw.faiss`` and ``OUT/ids.txt`` (the same vectors for peers) and
``OUT/queries.txt``.

    nice python benchmarks/serving_world.py --union /tmp/union --collection data/msmarco --out /tmp/world
"""

from __future__ import annotations

import argparse
from pathlib import Path

import faiss
import numpy as np

from index.build import build_index
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import split_queries
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import CollectionSpec, EncoderSpec, ExportSpec, IndexSpec, StudentSpec
from retrieval_kd.students.build import build_student

QUERIES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--union", type=Path, required=True, help="what benchmarks/union.py wrote")
    parser.add_argument("--collection", required=True, help="whose test queries are asked")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    corpus = EncodedCorpus.load(arguments.union / "documents")
    teacher = TorchEncoder.load(EncoderSpec())
    student = build_student(teacher, StudentSpec(), corpus.card)
    collection = open_collection(CollectionSpec(arguments.collection))
    queries = {key: text for split in collection.splits() for key, text in split_queries(collection, split).items()}
    texts = [" ".join(text.split()) for text in list(queries.values())[:QUERIES]]
    (out / "queries.txt").write_text("\n".join(texts) + "\n")
    student.save(out / "model")
    export_encoder(student, out / "encoder", ExportSpec(), Probes({"0": texts[0], "1": texts[1]}, {}, {}))
    held_out = EncodedCorpus.load(arguments.union / "queries")
    build_index(corpus, IndexSpec("fastscan"), out / "store", student.card, queries=held_out)
    (out / "ids.txt").write_text("\n".join(corpus.ids) + "\n")
    graph = faiss.IndexHNSWFlat(corpus.card.dimension, 32, faiss.METRIC_INNER_PRODUCT)
    graph.add(np.asarray(corpus.vectors, dtype=np.float32))
    graph.hnsw.efSearch = 64
    faiss.write_index(graph, str(out / "hnsw.faiss"))


if __name__ == "__main__":
    main()
