"""Peak memory: training and encoding against the size of the corpus, and scoring against the number of pairs.

``training`` trains a tiny student on the same 512 lists for the same steps beside corpora of 10^4, 10^5 and 10^6
documents; the lists' documents are among them, and phrases of all are what its embedding loss reads besides.
``encoding`` encodes such a corpus. ``scoring`` scores 10^4, 10^5 and 10^6 pairs with a tiny random cross-encoder into
a store, pairs streaming in and shards out. Each run is a process of its own; what counts is its peak resident memory
(``ru_maxrss``), reported with what the process needed before it touched the first document.

    python benchmarks/memory.py --json benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from retrieval_kd.artifacts import producers, write_json  # noqa: E402  found by the path above
from retrieval_kd.runs import Shortlist  # noqa: E402

SIZES = (10_000, 100_000, 1_000_000)
LISTS = 512
CANDIDATES = 8
EXTRA_BATCH = 16
WIDTH = 16
WORDS_A_DOCUMENT = 12


def peak() -> float:
    """Return the peak resident memory of this process so far, in MiB."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def word_rows(count: int, seed: int, words: int = WORDS_A_DOCUMENT) -> Iterator[str]:
    """Yield texts over the tiny vocabulary, a block of them in memory at a time."""
    from tiny import WORDS

    rng = np.random.default_rng([seed, count])
    for start in range(0, count, 10_000):
        for row in rng.integers(len(WORDS), size=(min(10_000, count - start), words)):
            yield " ".join(WORDS[i] for i in row)


def doc_id(number: int) -> str:
    return f"d{number:07d}"


def write_collection(folder: Path, documents: int) -> None:
    """Write a BEIR folder and a matrix of document vectors; the lists' documents are spread over the whole corpus."""
    from retrieval_kd.encoders.corpus import write_ids, write_vectors

    with (folder / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(word_rows(documents, 1)):
            file.write(json.dumps({"_id": doc_id(number), "title": "", "text": text}) + "\n")
    with (folder / "queries.jsonl").open("w") as file:
        for number, text in enumerate(word_rows(LISTS, 2, 4)):
            file.write(json.dumps({"_id": f"q{number}", "text": text}) + "\n")
    (folder / "qrels").mkdir()
    rows = [f"q{number}\t{doc_id(number * documents // LISTS)}\t1\n" for number in range(LISTS)]
    (folder / "qrels" / "train.tsv").write_text("".join(["query-id\tcorpus-id\tscore\n", *rows]))
    rng = np.random.default_rng(3)
    blocks = (
        rng.standard_normal((min(10_000, documents - start), WIDTH), dtype=np.float32)
        for start in range(0, documents, 10_000)
    )
    unit = (block / np.linalg.norm(block, axis=1, keepdims=True) for block in blocks)
    write_vectors(folder / "vectors.npy", unit, (documents, WIDTH))
    write_ids(folder / "ids.txt", map(doc_id, range(documents)))


def training(folder: Path, documents: int) -> dict[str, Any]:
    """Train a symmetric student on the same lists beside a corpus of some size."""
    import torch
    from tiny import tiny_encoder

    from retrieval_kd.collections import open_collection
    from retrieval_kd.collections.extra import extra_texts
    from retrieval_kd.encoders.corpus import EncodedCorpus, map_vectors, read_ids
    from retrieval_kd.mining.candidates import CandidateList
    from retrieval_kd.recipes.schema import CollectionSpec, LossSpec, ScheduleSpec, StudentSpec
    from retrieval_kd.students.build import build_student
    from retrieval_kd.training.batches import ExtraTexts, TrainingSet
    from retrieval_kd.training.loop import train
    from retrieval_kd.training.towers import DocumentTower, LiveDocuments

    start = tiny_encoder(width=WIDTH)
    student = build_student(start, StudentSpec(mode="symmetric", layers=(1,)), start.card)
    torch.randn(2, requires_grad=True).sum().backward()
    before = peak()
    collection = open_collection(CollectionSpec(str(folder)))
    corpus = EncodedCorpus(read_ids(folder / "ids.txt"), map_vectors(folder / "vectors.npy"), start.card, "", "")
    places = [(number * documents // LISTS, documents // LISTS // CANDIDATES) for number in range(LISTS)]
    lists = [
        CandidateList(f"q{n}", tuple(doc_id(at + i * gap) for i in range(CANDIDATES)), (1, *[0] * (CANDIDATES - 1)))
        for n, (at, gap) in enumerate(places)
    ]
    rng = np.random.default_rng(4)
    scores = [rng.standard_normal(CANDIDATES).astype(np.float32) for _ in lists]
    targets = start.encode(list(collection.queries().values()), "query")
    schedule = ScheduleSpec(epochs=2, batch_queries=32, checkpoints=2)
    texts = extra_texts(collection, (), phrases=True, most=schedule.steps(LISTS) * EXTRA_BATCH)
    extra = ExtraTexts(texts, start.encode(list(texts.values()), "query"), EXTRA_BATCH)
    data = TrainingSet(lists, collection.queries(), scores, collection.qrels("train"), targets, extra=extra)
    opened = peak()

    def towers(device: torch.device) -> DocumentTower:
        return LiveDocuments(student, collection, corpus, device)

    losses = [LossSpec("listwise_kl"), LossSpec("embedding_regression")]
    started = time.perf_counter()
    train(student, towers, data, None, losses, schedule, 1, folder / "run")
    return {"start_mib": before, "opened_mib": opened, "peak_mib": peak(), "seconds": time.perf_counter() - started}


class Lists:
    """As many pairs as asked for, 2,000 documents of 10,000 a query, made anew whenever they are read."""

    depth = 2_000

    def __init__(self, pairs: int) -> None:
        self._queries = pairs // self.depth

    def __iter__(self) -> Iterator[Shortlist]:
        for number in range(self._queries):
            yield Shortlist(f"q{number}", tuple(doc_id((7 * number + i) % 10_000) for i in range(self.depth)))


def tiny_cross_encoder(folder: Path) -> Path:
    """Write a random cross-encoder of one layer with the tiny tokenizer."""
    import torch
    from tiny import tiny_encoder
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = tiny_encoder().tokenizer_files["tokenizer.json"]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    return folder


def scoring(folder: Path, pairs: int) -> dict[str, Any]:
    """Score pairs of a collection with a tiny random cross-encoder into a score store."""
    from retrieval_kd.collections import open_collection
    from retrieval_kd.recipes.schema import CollectionSpec
    from retrieval_kd.teachers.cross_encoder import CrossEncoder
    from retrieval_kd.teachers.scoring import score_candidates

    teacher = CrossEncoder.load(str(tiny_cross_encoder(folder / "model")), 32)
    teacher.score([("w1 w2", "w3 w4")] * 16)
    before = peak()
    collection = open_collection(CollectionSpec(str(folder)))
    _ = collection.contents([doc_id(0)])
    opened = peak()
    started = time.perf_counter()
    score_candidates(teacher, collection, Lists(pairs), folder / "scores")
    return {"start_mib": before, "opened_mib": opened, "peak_mib": peak(), "seconds": time.perf_counter() - started}


def encoding(folder: Path, documents: int) -> dict[str, Any]:
    """Encode a corpus of some size with a tiny encoder."""
    from tiny import tiny_encoder

    from retrieval_kd.collections import open_collection
    from retrieval_kd.encoders.corpus import encode_corpus
    from retrieval_kd.recipes.schema import CollectionSpec

    encoder = tiny_encoder(width=WIDTH)
    encoder.encode(["w1 w2"], "document")
    before = peak()
    collection = open_collection(CollectionSpec(str(folder)))
    _ = collection.contents([doc_id(0)])
    opened = peak()
    started = time.perf_counter()
    encode_corpus(encoder, collection, folder / "encoded")
    return {"start_mib": before, "opened_mib": opened, "peak_mib": peak(), "seconds": time.perf_counter() - started}


RUNS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "training": training,
    "encoding": encoding,
    "scoring": scoring,
}


def in_a_process(kind: str, size: int) -> dict[str, Any]:
    """Prepare the files of a run and measure it in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_collection(folder, 10_000 if kind == "scoring" else size)
        done = subprocess.run(
            [sys.executable, __file__, "--only", kind, str(size), name], stdout=subprocess.PIPE, text=True, check=True
        )
        return {"size": size, **json.loads(done.stdout.splitlines()[-1])}


def table(report: dict[str, Any]) -> str:
    lines = [f"{'run':<10}{'size':>12}{'start MiB':>12}{'opened MiB':>12}{'peak MiB':>10}{'seconds':>9}"]
    for kind in RUNS:
        lines += [
            f"{kind:<10}{one['size']:>12,}{one['start_mib']:>12.0f}{one['opened_mib']:>12.0f}{one['peak_mib']:>10.0f}"
            f"{one['seconds']:>9.1f}"
            for one in report.get(kind, ())
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="documents of the corpus, or pairs")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        kind, size, folder = arguments.only
        sys.stdout.write(json.dumps(RUNS[kind](Path(folder), int(size))) + "\n")
        return
    report: dict[str, Any] = {"versions": producers()}
    for kind in arguments.runs:
        report[kind] = [in_a_process(kind, size) for size in arguments.sizes]
    sys.stdout.write(table(report))
    if arguments.json is not None:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
