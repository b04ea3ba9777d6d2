"""Training speed: retrieval-kd's loop against ``SentenceTransformerTrainer``, listwise KL over lists of eight.

The same student, texts, lists, teacher scores, order of batches, loss (``DistillKLDivLoss``, both temperatures .05),
optimiser, learning rate and number of steps, on the same machine and threads; the final losses have to agree or nothing
is reported. The systems take turns, a process of their own each time, and the ratio is the median over the rounds of
the ratio within a round: work beside it on the machine slows both; processor seconds are reported too. Only the
training itself is timed, tokenising and one checkpoint at the end included; importing and loading are not.

``symmetric`` trains one tower for both sides. ``asymmetric`` trains a query tower against the document vectors of the
larger encoder: the peer is a ``Router`` whose frozen document side runs at every step, ours looks the vectors up;
the seconds in which they were encoded, once for all trainings, are reported beside it.

    python benchmarks/train.py --collection data/msmarco-12k --json benchmarks/results/train.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, SequentialSampler

from retrieval_kd.artifacts import producers, write_json
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import Collection, training_queries
from retrieval_kd.encoders.corpus import EncodedCorpus, encode_texts
from retrieval_kd.encoders.torch_encoder import TorchEncoder, quiet_transformers
from retrieval_kd.mining.candidates import CandidateList
from retrieval_kd.recipes.schema import CollectionSpec, EncoderSpec, LossSpec, ScheduleSpec, StudentSpec
from retrieval_kd.students.build import build_student
from retrieval_kd.training.batches import TrainingSet, epoch_batches
from retrieval_kd.training.loop import train
from retrieval_kd.training.towers import DocumentTower, FrozenDocuments, LiveDocuments

OURS = "retrieval-kd"
PEER = "sentence-transformers"
MODES = ("symmetric", "asymmetric")
CANDIDATES = 8
TEMPERATURE = 0.05
SEED = 7
MAX_LENGTH = 256
# Losses of single steps differ by rounding, amplified over the steps; a wrong loss or order differs by far more.
LARGEST_DIFFERENCE = 0.02


class Setting:
    """What both systems train on: real queries with their positive and seven other positives' documents."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.collection = open_collection(CollectionSpec(arguments.collection))
        self.start = TorchEncoder.load(EncoderSpec(arguments.model, max_length=MAX_LENGTH))
        self.schedule = ScheduleSpec(
            epochs=1, batch_queries=arguments.batch, learning_rate=1e-4, warmup=0.0, evaluations=1, checkpoints=1
        )
        self.qrels = self.collection.qrels("train")
        self.texts = judged_queries(self.collection, arguments.steps * arguments.batch)
        positives = [best_document(self.qrels[query_id]) for query_id in self.texts]
        pool = sorted(set(positives))
        rng = np.random.default_rng([SEED])
        self.lists = [
            CandidateList(query_id, (positive, *_others(pool, positive, rng)), (1, *[0] * (CANDIDATES - 1)))
            for query_id, positive in zip(self.texts, positives, strict=True)
        ]
        self.corpus = EncodedCorpus.load(Path(arguments.work) / "documents")
        queries = EncodedCorpus.load(Path(arguments.work) / "queries")
        self.targets = queries.vectors[[queries.row_of[query_id] for query_id in self.texts]]
        self.scores = [
            np.asarray(self.corpus.vectors[[self.corpus.row_of[d] for d in item.doc_ids]] @ vector, np.float32)
            for item, vector in zip(self.lists, self.targets, strict=True)
        ]

    def student(self, mode: str) -> TorchEncoder:
        """Build the student that both systems start from."""
        return build_student(self.start, StudentSpec(mode=mode, layers=(0, 2, 5)), self.start.card)  # type: ignore[arg-type]


def judged_queries(collection: Collection, count: int) -> dict[str, str]:
    """Return the first ``count`` train queries that have a relevant document."""
    qrels = collection.qrels("train")
    judged = ((query_id, text) for query_id, text in training_queries(collection).items() if qrels.get(query_id))
    return dict(itertools.islice(judged, count))


def best_document(grades: Mapping[str, int]) -> str:
    return max(grades, key=grades.__getitem__)


def _others(pool: list[str], positive: str, rng: np.random.Generator) -> list[str]:
    drawn = [pool[i] for i in rng.choice(len(pool), size=CANDIDATES, replace=False)]
    return [doc_id for doc_id in drawn if doc_id != positive][: CANDIDATES - 1]


def train_ours(setting: Setting, mode: str, folder: Path) -> dict[str, Any]:
    """Train with the loop of this package; a metrics file, TensorBoard and one checkpoint are part of it."""
    student = setting.student(mode)

    def documents(device: torch.device) -> DocumentTower:
        if mode == "asymmetric":
            return FrozenDocuments(setting.corpus, device)
        return LiveDocuments(student, setting.collection, setting.corpus, device)

    loss = LossSpec(
        "listwise_kl",
        options={"student_temperature": TEMPERATURE, "teacher_temperature": TEMPERATURE, "square_temperature": True},
    )
    data = TrainingSet(setting.lists, setting.texts, setting.scores, setting.qrels, setting.targets)
    started, used = time.perf_counter(), time.process_time()
    train(student, documents, data, None, [loss], setting.schedule, SEED, folder)
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {**spent, "losses": [row["loss"] for row in rows]}


def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Give the peer's trainer its batches in the order of the rows; at module level, for its checkpoint pickles it."""
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def train_peer(setting: Setting, mode: str, folder: Path) -> dict[str, Any]:
    """Train with sentence-transformers: its trainer, its loss, the batches in our order."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss
    from sentence_transformers.sentence_transformer.modules import Router

    setting.student(mode).save(folder / "student")
    columns = ["query", *(f"document_{i}" for i in range(CANDIDATES))]
    with quiet_transformers():
        model = SentenceTransformer(str(folder / "student"), device="cpu")
        if mode == "asymmetric":
            # Its trainer puts the frozen side into training mode too, so that side must have no dropout either.
            everything = StudentSpec(mode="symmetric", layers=tuple(range(setting.start.card.layers)))
            build_student(setting.start, everything, setting.start.card).save(folder / "start")
            frozen = SentenceTransformer(str(folder / "start"), device="cpu").requires_grad_(False)
            router = Router.for_query_document(query_modules=list(model), document_modules=list(frozen))
            model = SentenceTransformer(modules=[router], device="cpu")
    model.max_seq_length = MAX_LENGTH
    contents = setting.collection.contents(list({d for item in setting.lists for d in item.doc_ids}))
    order = np.concatenate(list(epoch_batches(len(setting.lists), setting.schedule.batch_queries, SEED, 0)))
    rows = [setting.lists[i] for i in order]
    dataset = Dataset.from_dict(
        {
            "query": [setting.texts[item.query_id] for item in rows],
            **{column: [contents[item.doc_ids[i]] for item in rows] for i, column in enumerate(columns[1:])},
            "label": [setting.scores[i].tolist() for i in order],
        }
    )

    schedule = setting.schedule
    arguments = Arguments(
        output_dir=str(folder / "peer"),
        num_train_epochs=schedule.epochs,
        per_device_train_batch_size=schedule.batch_queries,
        learning_rate=schedule.learning_rate,
        warmup_steps=0,
        lr_scheduler_type="linear",
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.clip,
        optim="adamw_torch_fused",
        batch_sampler=in_order,
        router_mapping={column: "query" if column == "query" else "document" for column in columns}
        if mode == "asymmetric"
        else {},
        logging_steps=1,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    loss = DistillKLDivLoss(model, temperature=TEMPERATURE)
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss)
    started, used = time.perf_counter(), time.process_time()
    trainer.train()
    spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    return {**spent, "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def in_a_process(arguments: argparse.Namespace, system: str, mode: str) -> dict[str, Any]:
    """Run one system once in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--collection", arguments.collection, "--model", arguments.model]
        command += ["--steps", str(arguments.steps), "--batch", str(arguments.batch), "--work", arguments.work]
        done = subprocess.run(
            [*command, "--only", system, mode, str(result)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr.decode()[-4000:])
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def encode_once(arguments: argparse.Namespace) -> float:
    """Encode the lists' documents and the queries with the larger encoder; return the seconds the documents took."""
    collection = open_collection(CollectionSpec(arguments.collection))
    start = TorchEncoder.load(EncoderSpec(arguments.model, max_length=MAX_LENGTH))
    queries = judged_queries(collection, arguments.steps * arguments.batch)
    qrels = collection.qrels("train")
    documents = collection.contents(list(dict.fromkeys(best_document(qrels[query_id]) for query_id in queries)))
    started = time.perf_counter()
    encode_texts(start, documents, "document", Path(arguments.work) / "documents")
    seconds = time.perf_counter() - started
    encode_texts(start, queries, "query", Path(arguments.work) / "queries")
    return seconds


def measured(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    """Let the systems take turns in one mode."""
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], PEER: []}
    for turn in range(arguments.rounds):
        for system in (OURS, PEER) if turn % 2 else (PEER, OURS):
            runs[system].append(in_a_process(arguments, system, mode))
    final = {system: float(np.mean(some[0]["losses"][-arguments.steps // 5 :])) for system, some in runs.items()}
    if not abs(final[OURS] - final[PEER]) <= LARGEST_DIFFERENCE * final[PEER]:
        losses = {system: some[0]["losses"] for system, some in runs.items()}
        sys.exit(f"{mode}: the losses are {losses}, so the systems did not train the same and cannot be compared")
    lists = arguments.steps * arguments.batch
    ratios = {
        unit: [peer[unit] / ours[unit] for ours, peer in zip(runs[OURS], runs[PEER], strict=True)]
        for unit in ("seconds", "cpu_seconds")
    }
    return {
        "mode": mode,
        "ratio": statistics.median(ratios["seconds"]),
        "cpu_ratio": statistics.median(ratios["cpu_seconds"]),
        "ratios": ratios,
        "systems": {
            system: {
                "lists_per_second": lists / statistics.median(run["seconds"] for run in some),
                "seconds": [run["seconds"] for run in some],
                "cpu_seconds": [run["cpu_seconds"] for run in some],
                "first_loss": some[0]["losses"][0],
                "final_loss": final[system],
            }
            for system, some in runs.items()
        },
    }


def table(report: Mapping[str, Any]) -> str:
    setting = (
        f"{report['steps']} steps of {report['batch']} lists of {CANDIDATES} of {report['collection']}; student of 3 "
        f"layers of {report['model']}; {report['machine']['threads']} threads; median of {report['rounds']} rounds; "
        f"the lists' documents encoded once in {report['encoding_seconds']:.1f} s"
    )
    heads = f"{'mode':<12}{'system':<24}{'lists/s':>9}{'first loss':>12}{'final loss':>12}{'ratio':>8}{'CPU ratio':>11}"
    lines = [setting, heads]
    for mode in report["modes"]:
        for system, one in mode["systems"].items():
            ratio, cpu = (mode["ratio"], mode["cpu_ratio"]) if system == OURS else (1.0, 1.0)
            lines.append(
                f"{mode['mode']:<12}{system:<24}{one['lists_per_second']:>9.2f}{one['first_loss']:>12.6f}"
                f"{one['final_loss']:>12.6f}{ratio:>8.2f}{cpu:>11.2f}"
            )
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", required=True, help="a collection with judged train queries")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="the encoder that the student is cut from")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each run")
    parser.add_argument("--batch", type=int, default=16, help="lists in a batch")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system in each mode")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--work", default="", help="where the encoded corpus is kept; a temporary folder when empty")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.only:
        system, mode, result = arguments.only
        run = train_ours if system == OURS else train_peer
        write_json(Path(result), run(Setting(arguments), mode, Path(result).parent))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or folder
        encoding_seconds = encode_once(arguments)
        report = {
            "collection": Path(arguments.collection).name,
            "model": arguments.model,
            "steps": arguments.steps,
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "encoding_seconds": encoding_seconds,
            "machine": {
                "cpu": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
            },
            "versions": producers(),
            "modes": [measured(arguments, mode) for mode in arguments.modes],
        }
    sys.stdout.write(table(report))
    if arguments.json is not None:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
