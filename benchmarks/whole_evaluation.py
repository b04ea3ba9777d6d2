"""From texts to figures: ``rkd eval`` against sentence-transformers' evaluator and BEIR's, encoding included.

Each loads the same model, encodes every document and query, compares them exactly and measures, one thread, in a
process of its own that starts from nothing. ``exact_search.py`` measures the search alone.

    python benchmarks/whole_evaluation.py --collection DIR --json docs/evaluation/whole.json
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
from collections.abc import Callable, Mapping
from pathlib import Path

SYSTEMS = ("retrieval-kd", "sentence-transformers", "BEIR")
K = 100
Qrels = Mapping[str, Mapping[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        sys.stdout.write(json.dumps(run_one(arguments)) + "\n")
        return
    rows = {name: own_process(name, arguments) for name in SYSTEMS}
    sys.stdout.write("| system | seconds | CPU s | peak MB | nDCG@10 |\n|---|---:|---:|---:|---:|\n")
    for name, row in rows.items():
        sys.stdout.write(
            f"| {name} | {row['seconds']:.0f} | {row['cpu_s']:.0f} | {row['peak_mb']:,.0f} | {row['ndcg']:.4f} |\n"
        )
    if arguments.json is not None:
        command = " ".join(["python", "benchmarks/whole_evaluation.py", *sys.argv[1:]])
        arguments.json.write_text(json.dumps({"command": command, "systems": rows}, indent=2) + "\n")


def own_process(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    verb = [sys.executable, __file__, "--collection", arguments.collection, "--split", arguments.split]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [*verb, "--model", arguments.model, "--one", name], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr}")
    row: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return row


def run_one(arguments: argparse.Namespace) -> dict[str, float]:
    from retrieval_kd.collections import open_collection
    from retrieval_kd.collections.base import split_queries
    from retrieval_kd.encoders.resolve import resolve_model
    from retrieval_kd.recipes.schema import CollectionSpec

    collection = open_collection(CollectionSpec(arguments.collection))
    queries = split_queries(collection, arguments.split)
    qrels = {query: dict(grades) for query, grades in collection.qrels(arguments.split).items()}
    start, used = time.perf_counter(), time.process_time()
    if arguments.one == SYSTEMS[0]:
        figure = ours(arguments)
    else:
        documents = {document.doc_id: document.content for document in collection.documents()}
        peers: Mapping[str, Callable[..., float]] = {SYSTEMS[1]: sentence_transformers, SYSTEMS[2]: beir}
        figure = peers[arguments.one](str(resolve_model(arguments.model)), documents, queries, qrels)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_s": time.process_time() - used,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
        "queries": len(queries),
        "ndcg": figure,
    }


def ours(arguments: argparse.Namespace) -> float:
    from eval.specs import SystemSpec
    from eval.suite import Setup, run_suite

    setup = Setup(split=arguments.split, measures=("nDCG@10", "RR@10", "R@100", "AP@100"), depth=K, timed=0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        systems = [SystemSpec("model", arguments.model)]
        (report,) = run_suite([arguments.collection], systems, setup, folder / "cache", folder / "report", "benchmark")
    return float(report["systems"][0]["nDCG@10"])


def sentence_transformers(model: str, documents: Mapping[str, str], queries: Mapping[str, str], qrels: Qrels) -> float:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    torch.set_num_threads(1)
    relevant = {query: {doc for doc, grade in grades.items() if grade > 0} for query, grades in qrels.items()}
    evaluator = InformationRetrievalEvaluator(
        dict(queries), dict(documents), relevant, map_at_k=[K], name="here", write_csv=False, batch_size=32
    )
    return float(evaluator(SentenceTransformer(model, device="cpu"))["here_cosine_ndcg@10"])


def beir(model: str, documents: Mapping[str, str], queries: Mapping[str, str], qrels: Qrels) -> float:
    import torch
    from beir.retrieval.evaluation import EvaluateRetrieval
    from beir.retrieval.models import SentenceBERT
    from beir.retrieval.search.dense import DenseRetrievalExactSearch

    torch.set_num_threads(1)
    searcher = DenseRetrievalExactSearch(SentenceBERT(model), batch_size=32)
    corpus = {doc_id: {"title": "", "text": text} for doc_id, text in documents.items()}
    results = searcher.search(corpus, dict(queries), K, "cos_sim")
    ndcg, *_ = EvaluateRetrieval.evaluate({query: dict(grades) for query, grades in qrels.items()}, results, [10, K])
    return float(ndcg["NDCG@10"])


if __name__ == "__main__":
    main()
