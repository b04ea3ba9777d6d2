"""Exact retrieval from the same vectors: retrieval-kd against sentence-transformers' evaluator and BEIR's search.

All three get the same float32 matrices, one thread each, in a process of its own, and give the best 100 (and, with
``--k``, any other number of) documents of each query; two times are taken, search and search with evaluation. The
rankings are compared: the share of queries whose first ten agree in order with ours is printed.

    python benchmarks/exact_search.py --collection DIR --distractors DIR --encoder MODEL --artifacts runs/artifacts
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SYSTEMS = ("retrieval-kd", "sentence-transformers", "BEIR")
Found = Mapping[str, Sequence[str]]


def main() -> None:
    arguments = parse_arguments()
    if arguments.one:
        run_one(arguments)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(arguments, folder)
        rows = [own_process(name, folder, arguments) for name in SYSTEMS]
        rankings = {
            name: json.loads((folder / f"{name}.json").read_text())
            for name, row in zip(SYSTEMS, rows, strict=True)
            if row
        }
    ours = rankings[SYSTEMS[0]]
    sys.stdout.write(
        "| system | search s | evaluated s | peak MB | same first ten | nDCG@10 |\n|---|---:|---:|---:|---:|---:|\n"
    )
    for name, row in zip(SYSTEMS, rows, strict=True):
        if row is None:
            sys.stdout.write(f"| {name} | not installed | | | | |\n")
            continue
        same = sum(rankings[name].get(query, [])[:10] == found[:10] for query, found in ours.items()) / len(ours)
        sys.stdout.write(
            f"| {name} | {row['search_s']:.2f} | {row['evaluated_s']:.2f} | {row['peak_mb']:,.0f} | {same:.1%} | "
            f"{row['ndcg']:.4f} |\n"
        )
    sys.stdout.write(
        f"\n{rows[0]['queries']:,} queries, {rows[0]['documents']:,} documents, k {arguments.k}, one thread.\n"
    )
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps({"k": arguments.k, "systems": dict(zip(SYSTEMS, rows, strict=True))}, indent=2) + "\n"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--distractors", action="append", default=[])
    parser.add_argument("--split", default="test")
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2")
    parser.add_argument("--artifacts", type=Path, default=Path("runs/artifacts"))
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Encode once and lay down what every system reads."""
    import contextlib

    from eval.dense import encoded
    from eval.opening import Opener
    from retrieval_kd.collections import open_collection
    from retrieval_kd.collections.base import split_queries
    from retrieval_kd.recipes.schema import CollectionSpec

    collection = open_collection(CollectionSpec(arguments.collection, tuple(arguments.distractors)))
    with contextlib.ExitStack() as stack:
        encoder = Opener(arguments.artifacts, stack).encoder(arguments.encoder)
        corpus = encoded(encoder, collection, arguments.artifacts)
        queries = split_queries(collection, arguments.split)
        np.save(folder / "queries.npy", encoder.encode(list(queries.values()), "query"))
        np.save(folder / "corpus.npy", corpus.vectors)
    qrels = {query: dict(grades) for query, grades in collection.qrels(arguments.split).items()}
    (folder / "ids.json").write_text(json.dumps({"queries": list(queries), "corpus": corpus.ids, "qrels": qrels}))


def own_process(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any] | None:
    verb = [
        sys.executable,
        __file__,
        "--collection",
        "-",
        "--one",
        name,
        "--folder",
        str(folder),
        "--k",
        str(arguments.k),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(verb, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        if "ModuleNotFoundError" in done.stderr:
            return None
        raise SystemExit(done.stderr)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def run_one(arguments: argparse.Namespace) -> None:
    ids = json.loads((arguments.folder / "ids.json").read_text())
    queries = np.load(arguments.folder / "queries.npy")
    corpus = np.load(arguments.folder / "corpus.npy", mmap_mode="r")
    search = {"retrieval-kd": ours, "sentence-transformers": sentence_transformers, "BEIR": beir}[arguments.one]
    found, search_s, evaluated_s = search(ids, queries, corpus, arguments.k)
    (arguments.folder / f"{arguments.one}.json").write_text(json.dumps(found))
    row = {
        "search_s": search_s,
        "evaluated_s": evaluated_s,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "queries": len(queries),
        "documents": len(corpus),
        "ndcg": ndcg(found, ids["qrels"]),
    }
    sys.stdout.write(json.dumps(row) + "\n")


def ours(ids: Any, queries: Any, corpus: Any, k: int) -> tuple[Found, float, float]:
    from types import SimpleNamespace

    from eval.measures import evaluate
    from retrieval_kd.exact import exact_search

    start = time.perf_counter()
    run = exact_search(ids["queries"], queries, SimpleNamespace(ids=ids["corpus"], vectors=corpus), k)
    searched = time.perf_counter()
    evaluate(run, ids["qrels"], ["nDCG@10", "RR@10", "R@100", "AP@100"])
    done = time.perf_counter()
    return {query: list(ranking.doc_ids) for query, ranking in run.items()}, searched - start, done - start


def sentence_transformers(ids: Any, queries: Any, corpus: Any, k: int) -> tuple[Found, float, float]:
    """Run the evaluator's own search and measures; only the encoding of queries is replaced by the stored vectors."""
    import torch
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import dot_score

    torch.set_num_threads(1)

    class FromVectors(InformationRetrievalEvaluator):
        took = 0.0

        def embed_inputs(self, *_: Any, **__: Any) -> Any:
            return torch.from_numpy(queries)

        def compute_metrics(self, results: list[object]) -> Any:
            self.took = time.perf_counter() - start
            return super().compute_metrics(results)

        def output_scores(self, scores: Any) -> None:
            pass

    kept: dict[str, list[str]] = {}
    relevant = {query: {doc for doc, grade in grades.items() if grade > 0} for query, grades in ids["qrels"].items()}
    evaluator = FromVectors(
        dict.fromkeys(ids["queries"], "."), dict.fromkeys(ids["corpus"], "."), relevant, map_at_k=[k],
        score_functions={"dot": dot_score}, write_csv=False,
    )  # fmt: skip
    measure = evaluator.compute_metrics

    def keep(results: Any) -> Any:
        kept.update(
            (query, [hit["corpus_id"] for hit in sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))])
            for query, hits in zip(evaluator.queries_ids, results, strict=True)
        )
        return measure(results)

    evaluator.compute_metrics = keep  # type: ignore[method-assign]
    start = time.perf_counter()
    evaluator.compute_all_metrics(None, corpus_embeddings=torch.from_numpy(np.asarray(corpus)))  # type: ignore[arg-type]
    done = time.perf_counter() - start
    return kept, evaluator.took, done


def beir(ids: Any, queries: Any, corpus: Any, k: int) -> tuple[Found, float, float]:
    import torch
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    torch.set_num_threads(1)
    row_of = {doc_id: row for row, doc_id in enumerate(ids["corpus"])}

    class FromVectors:
        def encode_queries(self, texts: Sequence[str], **_: Any) -> Any:
            return torch.from_numpy(queries)

        def encode_corpus(self, documents: Sequence[Mapping[str, str]], **_: Any) -> Any:
            return torch.from_numpy(np.asarray(corpus[[row_of[document["text"]] for document in documents]]))

    searcher = DenseRetrievalExactSearch(FromVectors(), batch_size=128, corpus_chunk_size=50_000)
    start = time.perf_counter()
    results = searcher.search(
        {doc_id: {"title": "", "text": doc_id} for doc_id in ids["corpus"]},
        dict.fromkeys(ids["queries"], "."),
        k,
        "dot",
    )
    searched = time.perf_counter() - start
    EvaluateRetrieval.evaluate(ids["qrels"], results, [10, 100])
    done = time.perf_counter() - start
    ordered = {
        query: [doc for doc, _ in sorted(hits.items(), key=lambda hit: (-hit[1], hit[0]))]
        for query, hits in results.items()
    }
    return ordered, searched, done


def ndcg(found: Found, qrels: Any) -> float:
    from eval.measures import evaluate
    from retrieval_kd.runs import rank

    run = {query: rank(ids, -np.arange(len(ids))) for query, ids in found.items()}
    return evaluate(run, qrels, ["nDCG@10"]).means["nDCG@10"]


if __name__ == "__main__":
    main()
