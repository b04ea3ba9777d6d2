"""One index library at work in a process of its own: build and save, or open, tune and search.

Run by ``index_kinds.py``, also under another interpreter: it imports numpy and the one library, nothing of ours
unless the system is ours. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Search = Callable[[Any, int], Any]
"""float32 ``[n, d]`` and an effort to int64 ``[n, 10]``."""

DEPTH = 10
LINKS, CONSTRUCTION = 16, 100
OURS = ("exact", "fastscan", "ivf", "ivf-pq", "ivf-rabitq", "hnsw", "hnsw-sq8")
EFFORTS = (10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("build", "search"))
    parser.add_argument("system", choices=sorted(SYSTEMS))
    parser.add_argument("data", type=Path, help="documents.npy, queries.npy, expected.npy")
    parser.add_argument("folder", type=Path, help="where the index is kept")
    parser.add_argument("--target", type=float, default=0.99)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    build, opener, efforts = SYSTEMS[arguments.system]
    if arguments.verb == "build":
        documents = np.load(arguments.data / "documents.npy", mmap_mode="r")
        with tempfile.TemporaryDirectory() as scratch:
            # So that imports are not timed.
            build(arguments.data, Path(scratch), documents[:1000])
        peak_mib()
        wall, cpu = time.perf_counter(), time.process_time()
        build(arguments.data, arguments.folder, documents)
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file() and keeps(path))
        report = {**spent, "bytes_per_vector": size / len(documents), "peak_mib": peak_mib()}
    else:
        report = searched(arguments, opener, efforts)
        report["peak_mib"] = peak_mib()
    sys.stdout.write(json.dumps(report) + "\n")


def keeps(path: Path) -> bool:
    """Return whether a file belongs to the index; ours also keeps its probes and locks beside it."""
    return not path.name.startswith(".")


def searched(
    arguments: argparse.Namespace, opener: Callable[[Path], Search], efforts: tuple[int, ...]
) -> dict[str, Any]:
    """Tune on one half of the queries, measure on the other, one query at a time and all together."""
    queries, expected = np.load(arguments.data / "queries.npy"), np.load(arguments.data / "expected.npy")
    with_imports = opener(arguments.folder)
    del with_imports
    peak_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    search = opener(arguments.folder)
    opened = {"open_ms": 1000 * (time.perf_counter() - wall), "open_cpu_ms": 1000 * (time.process_time() - cpu)}
    tuning, held = slice(0, None, 2), slice(1, None, 2)
    # voyager reads past the strides of an array that is not contiguous.
    first = np.ascontiguousarray(queries[tuning])
    reached = ((effort, recall(search(first, effort), expected[tuning])) for effort in efforts)
    effort = next((effort for effort, share in reached if share >= arguments.target), None)
    if effort is None:
        return {**opened, "effort": None, "recall": recall(search(first, efforts[-1]), expected[tuning])}
    asked = np.ascontiguousarray(queries[held])
    alone, together = [], []
    for _ in range(arguments.rounds):
        cpu = time.process_time()
        rows = [search(query[None], effort)[0] for query in asked]
        alone.append((time.process_time() - cpu) / len(asked))
        cpu = time.process_time()
        for start in range(0, len(asked), 64):
            search(asked[start : start + 64], effort)
        together.append((time.process_time() - cpu) / len(asked))
    return {
        **opened,
        "effort": effort,
        "recall": recall(np.stack(rows), expected[held]),
        "queries": len(asked),
        "cpu_us_alone": 1e6 * min(alone),
        "cpu_us_in_64": 1e6 * min(together),
        "per_cpu_second_alone": 1 / min(alone),
        "per_cpu_second_in_64": 1 / min(together),
    }


def recall(found: Any, expected: Any) -> float:
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, expected, strict=True))
    return hits / expected.size


def peak_mib() -> float:
    """Return the most resident memory since the last call, mapped files included, above what there was then."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) / 1024 - _resident[0]
    _resident[0] = int(status["VmRSS"].split()[0]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


_resident = [0.0]


def ours(kind: str) -> tuple[Any, Any, tuple[int, ...]]:
    def build(data: Path, folder: Path, documents: Any) -> None:
        from index.build import build_index
        from retrieval_kd.artifacts import fingerprint
        from retrieval_kd.encoders.card import EncoderCard
        from retrieval_kd.encoders.corpus import EncodedCorpus
        from retrieval_kd.recipes.schema import IndexSpec

        dimension = documents.shape[1]
        card = EncoderCard("e", "bert", 1, 1, "mean", False, (dimension,), 32, "", "", "dot", "t", "w")
        ids = [f"{row:09d}" for row in range(len(documents))]
        corpus = EncodedCorpus(ids, documents, card, fingerprint(str(data)), fingerprint(len(ids)))
        build_index(corpus, IndexSpec(kind, neighbours=LINKS, ef_construction=CONSTRUCTION), folder)

    def opener(folder: Path) -> Search:
        from index.kinds import Effort
        from index.search import Searcher

        searcher = Searcher.open(folder, check="sizes")

        def search(queries: Any, effort: int) -> Any:
            how = Effort(
                ef_search=effort, probes=effort, oversample=10 if kind.startswith("ivf") else max(1, effort // 10)
            )
            return np.asarray([[int(i) for i in r.doc_ids] for r in searcher.search(queries, DEPTH, effort=how)])

        return search

    return build, opener, (1,) if kind == "exact" else EFFORTS


def raw_faiss(description: str, refine: bool = False) -> tuple[Any, Any, tuple[int, ...]]:
    def build(data: Path, folder: Path, documents: Any) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        lists = max(1, round(4 * len(documents) ** 0.5))
        index = faiss.index_factory(documents.shape[1], description.format(lists=lists), faiss.METRIC_INNER_PRODUCT)
        if "HNSW" in description:
            index.hnsw.efConstruction = CONSTRUCTION
        whole = np.ascontiguousarray(documents)
        index.train(whole[:: max(1, len(whole) // 65536)])
        index.add(whole)
        faiss.write_index(index, str(folder / "index.faiss"))

    def opener(folder: Path) -> Search:
        import faiss

        faiss.omp_set_num_threads(1)
        index = faiss.read_index(str(folder / "index.faiss"))

        def search(queries: Any, effort: int) -> Any:
            if refine:
                parameters = faiss.IndexRefineSearchParameters(k_factor=max(1.0, effort / DEPTH))
            elif "HNSW" in description:
                parameters = faiss.SearchParametersHNSW(efSearch=effort)
            elif "IVF" in description:
                parameters = faiss.SearchParametersIVF(nprobe=effort)
            else:
                parameters = None
            return index.search(queries, DEPTH, params=parameters)[1]

        return search

    return build, opener, (1,) if description == "Flat" else EFFORTS


def build_hnswlib(data: Path, folder: Path, documents: Any) -> None:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=documents.shape[1])
    index.init_index(max_elements=len(documents), ef_construction=CONSTRUCTION, M=LINKS)
    index.set_num_threads(1)
    index.add_items(np.ascontiguousarray(documents))
    index.save_index(str(folder / "index.bin"))
    (folder / "shape.json").write_text(json.dumps(documents.shape))


def open_hnswlib(folder: Path) -> Search:
    import hnswlib

    count, dimension = json.loads((folder / "shape.json").read_text())
    index = hnswlib.Index(space="ip", dim=dimension)
    index.load_index(str(folder / "index.bin"), max_elements=count)
    index.set_num_threads(1)

    def search(queries: Any, effort: int) -> Any:
        index.set_ef(effort)
        return index.knn_query(queries, k=DEPTH)[0].astype(np.int64)

    return search


def build_usearch(data: Path, folder: Path, documents: Any) -> None:
    from usearch.index import Index

    index = Index(ndim=documents.shape[1], metric="ip", dtype="f32", connectivity=LINKS, expansion_add=CONSTRUCTION)
    index.add(np.arange(len(documents)), np.ascontiguousarray(documents), threads=1)
    index.save(str(folder / "index.usearch"))


def open_usearch(folder: Path) -> Search:
    from usearch.index import Index

    index = Index.restore(str(folder / "index.usearch"), view=True)

    def search(queries: Any, effort: int) -> Any:
        index.expansion_search = effort
        return np.asarray(index.search(queries, DEPTH, threads=1).keys).reshape(len(queries), DEPTH).astype(np.int64)

    return search


def build_voyager(data: Path, folder: Path, documents: Any) -> None:
    import voyager

    index = voyager.Index(voyager.Space.InnerProduct, documents.shape[1], LINKS, CONSTRUCTION)
    index.add_items(np.array(documents), num_threads=1)
    index.save(str(folder / "index.voy"))


def open_voyager(folder: Path) -> Search:
    import voyager

    index = voyager.Index.load(str(folder / "index.voy"))

    def search(queries: Any, effort: int) -> Any:
        return index.query(queries, DEPTH, num_threads=1, query_ef=effort)[0].astype(np.int64)

    return search


SYSTEMS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    **{
        f"retrieval-kd {kind}": ours(kind)
        for kind in ("exact", "fastscan", "ivf", "ivf-pq", "ivf-rabitq", "hnsw", "hnsw-sq8")
    },
    "faiss Flat": raw_faiss("Flat"),
    "faiss HNSW": raw_faiss(f"HNSW{LINKS}"),
    "faiss IVF": raw_faiss("IVF{lists},Flat"),
    "faiss PQ4fs + refine": raw_faiss("PQ96x4fs,RFlat", refine=True),
    "hnswlib": (build_hnswlib, open_hnswlib, EFFORTS),
    "usearch": (build_usearch, open_usearch, EFFORTS),
    "voyager": (build_voyager, open_voyager, EFFORTS),
}


if __name__ == "__main__":
    main()
