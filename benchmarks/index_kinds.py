"""Index kinds against raw faiss, hnswlib, usearch and voyager: the same vectors, the same recall, one thread.

Every system builds and saves in a process of its own, then opens, tunes and searches in another. Effort is the
least that finds the target share of the exact ten on one half of the queries; speed and recall are of the other
half, in processor time, which a busy machine changes little. Ours answers with document ids and exact scores,
the others with row numbers.

    python benchmarks/index_kinds.py --vectors /tmp/union --json benchmarks/results/index-real.json
    python benchmarks/index_kinds.py --synthetic 100000 --json benchmarks/results/index-synthetic.json

The peers may live in an environment of their own: ``--peers /tmp/peers/bin/python``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from index_peers import DEPTH, SYSTEMS

from retrieval_kd.artifacts import producers, write_json
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.progress import progress

WORKER = Path(__file__).with_name("index_peers.py")
QUERIES = 2000
CENTRES_PER = 50


def main() -> None:
    arguments = parse_arguments()
    documents, queries, setting = vectors(arguments)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        data = Path(scratch)
        np.save(data / "documents.npy", documents)
        np.save(data / "queries.npy", queries)
        np.save(data / "expected.npy", exact(documents, queries))
        with progress("index kinds", len(arguments.systems), "systems") as advance:
            for name in arguments.systems:
                rows.append(measured(name, data, arguments))
                sys.stdout.write(json.dumps(rows[-1]) + "\n")
                sys.stdout.flush()
                advance(1)
    report = {
        **setting,
        "documents": len(documents),
        "dimension": documents.shape[1],
        "depth": DEPTH,
        "target_recall": arguments.target,
        "command": " ".join(["python", "benchmarks/index_kinds.py", *sys.argv[1:]]),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": producers(),
        "systems": rows,
    }
    if arguments.json is not None:
        write_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vectors", type=Path, help="a folder made by union.py")
    source.add_argument("--synthetic", type=int, help="so many clustered vectors instead")
    parser.add_argument("--dimension", type=int, default=384, help="their width")
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--peers", default=sys.executable, help="the interpreter that has the other libraries")
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--timeout", type=int, default=1800, help="seconds that a system may take for one step")
    parser.add_argument("--scratch", type=Path, help="where indexes are built")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def vectors(arguments: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    if arguments.vectors is not None:
        documents = np.asarray(EncodedCorpus.load(arguments.vectors / "documents").vectors)
        encoded = EncodedCorpus.load(arguments.vectors / "queries")
        spaced = np.linspace(0, len(encoded.ids) - 1, min(arguments.queries, len(encoded.ids))).astype(int)
        names = sorted({query_id.split("/")[0] for query_id in encoded.ids})
        setting = {"vectors": f"{encoded.card.name}: {' + '.join(names)}", "queries": "dev and test, held out"}
        return documents, np.asarray(encoded.vectors[spaced]), setting
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(max(1, arguments.synthetic // CENTRES_PER), arguments.dimension)).astype(np.float32)
    documents = clustered(rng, centres, arguments.synthetic)
    setting = {"vectors": f"synthetic, {len(centres)} clusters", "queries": "drawn around the same centres"}
    return documents, clustered(rng, centres, arguments.queries), setting


def clustered(rng: np.random.Generator, centres: Any, count: int) -> Any:
    """Return unit vectors around the centres, made in blocks."""
    out = np.empty((count, centres.shape[1]), dtype=np.float32)
    for start in range(0, count, 50_000):
        part = out[start : start + 50_000]
        rng.standard_normal(out=part, dtype=np.float32)
        part += centres[rng.integers(len(centres), size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


def exact(documents: Any, queries: Any) -> Any:
    import faiss

    return faiss.knn(queries, documents, DEPTH, metric=faiss.METRIC_INNER_PRODUCT)[1]


def measured(name: str, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    interpreter = sys.executable if name.startswith("retrieval-kd") else arguments.peers
    row: dict[str, Any] = {"name": name}
    with tempfile.TemporaryDirectory(dir=data) as folder:
        for verb in ("build", "search"):
            command = [interpreter, str(WORKER), verb, name, str(data), folder, "--target", str(arguments.target)]
            try:
                done = subprocess.run(
                    command,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=arguments.timeout,
                )
            except subprocess.TimeoutExpired:
                row[verb] = {"failed": f"more than {arguments.timeout} s"}
                break
            except subprocess.CalledProcessError as error:
                row[verb] = {"failed": (error.stderr.strip().splitlines() or ["no message"])[-1]}
                break
            row[verb] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    main()
