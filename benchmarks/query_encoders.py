"""Milliseconds for one 12-token query on one core: what each student and precision buys.

All encoders take turns in one process, so that a busy machine slows all of them alike. In its turn an encoder answers
fifty queries in a row, for a server has no other encoder that would take the caches from it; a ratio is the median of
those of processor times within a turn. What is timed is text to vector, tokenizer included. Students are cut and not
trained: speed does not depend on the weights.

    python benchmarks/query_encoders.py --json benchmarks/results/query_encoders.json
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from retrieval_kd.artifacts import producers, write_json
from retrieval_kd.encoders.base import TOKENIZER
from retrieval_kd.encoders.corpus import EncodedCorpus
from retrieval_kd.encoders.onnx import MODEL, OnnxEncoder
from retrieval_kd.encoders.static import ARCHITECTURE, StaticBody, without_special_tokens
from retrieval_kd.encoders.torch_encoder import TorchEncoder
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import EncoderSpec, ExportSpec, StudentSpec
from retrieval_kd.students.build import build_student

QUERY_TOKENS = 12
TEXTS = [
    "what is the best way to learn about dense retrieval",
    "how long does it take to boil an egg at home",
    "average cost of replacing a kitchen floor in new york",
    "which planet is the largest in the whole solar system",
]
BASELINE = "6 layers, fp32"
IN_A_ROW = 50


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as root:
        encoders = open_encoders(Path(root))
        sizes = {name: (Path(root) / name / MODEL).stat().st_size for name in encoders}
    queries = exact_queries(encoders[BASELINE])
    wall, cpu = measure(encoders, queries, arguments.turns)
    report = {
        "query_tokens": QUERY_TOKENS,
        "queries": len(queries),
        "turns": arguments.turns,
        "in_a_row": IN_A_ROW,
        "threads": 1,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": producers(),
        "encoders": [
            {
                "name": name,
                "parameters": encoder.card.parameters,
                "model_bytes": sizes[name],
                "wall_ms_p50": 1e3 * statistics.median(wall[name]),
                "wall_ms_p99": 1e3 * float(np.percentile(wall[name], 99)),
                "cpu_ms_p50": 1e3 * statistics.median(cpu[name]),
                "ratio": statistics.median(b / o for b, o in zip(cpu[BASELINE], cpu[name], strict=True)),
            }
            for name, encoder in encoders.items()
        ],
    }
    sys.stdout.write(table(report))
    if arguments.json is not None:
        arguments.json.parent.mkdir(exist_ok=True)
        write_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8, help="turns of each encoder, of fifty queries each")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def open_encoders(root: Path) -> dict[str, OnnxEncoder]:
    """Cut and export each encoder; gates are wide open, for untrained students have no quality to lose."""
    start = TorchEncoder.load(EncoderSpec())
    cuts = {
        BASELINE: (StudentSpec(layers=(0, 1, 2, 3, 4, 5)), "fp32"),
        "3 layers, fp32": (StudentSpec(layers=(0, 2, 5)), "fp32"),
        "3 layers, int8-dynamic": (StudentSpec(layers=(0, 2, 5)), "int8-dynamic"),
        "3 layers, int8-static": (StudentSpec(layers=(0, 2, 5)), "int8-static"),
    }
    ids = [str(i) for i in range(len(TEXTS))]
    corpus = EncodedCorpus(ids, start.encode(TEXTS, "document"), start.card, "", "")
    probes = Probes(dict(zip(ids, TEXTS, strict=True)), {}, {i: {i: 1} for i in ids}, corpus)
    students = {name: (build_student(start, spec, start.card), precision) for name, (spec, precision) in cuts.items()}
    students["static"] = (static(start), "fp32")
    encoders = {}
    for name, (student, precision) in students.items():
        gate = ExportSpec(precision=precision, max_ndcg_loss=0.99)  # type: ignore[arg-type]
        export_encoder(student, root / name, gate, probes, TEXTS)
        encoders[name] = OnnxEncoder.load(root / name, threads=1)
    return encoders


def static(start: TorchEncoder) -> TorchEncoder:
    """Return a table of the same vocabulary and width; encoding every token for it would take longer than the rest."""
    tokens = Tokenizer.from_buffer(start.tokenizer_files[TOKENIZER]).get_vocab_size()
    table = torch.randn(tokens, start.card.dimension, generator=torch.Generator().manual_seed(0))
    files = {TOKENIZER: without_special_tokens(start.tokenizer_files[TOKENIZER], start.card.max_length)}
    card = replace(start.card, name="static", architecture=ARCHITECTURE, layers=0).in_space_of(start.card, "query")
    encoder = TorchEncoder(StaticBody(table, torch.ones(tokens)), None, files, card)
    encoder.refresh_card()
    return encoder


def exact_queries(encoder: OnnxEncoder) -> list[str]:
    """Return the texts that have the length that is reported, special tokens included."""
    rows = encoder.tokenize(TEXTS, "query")
    queries = [text for text, row in zip(TEXTS, rows, strict=True) if len(row) == QUERY_TOKENS]
    if not queries:
        sys.exit(f"no text has {QUERY_TOKENS} tokens: {[len(row) for row in rows]}")
    return queries


def measure(
    encoders: dict[str, OnnxEncoder], queries: list[str], turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return wall and processor seconds of each query; every turn starts with another encoder."""
    wall: dict[str, list[float]] = {name: [] for name in encoders}
    cpu: dict[str, list[float]] = {name: [] for name in encoders}
    names = list(encoders)
    for encoder in encoders.values():
        encoder.encode(queries, "query")
    for turn in range(turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for number in range(IN_A_ROW):
                text = [queries[number % len(queries)]]
                started, used = time.perf_counter(), time.process_time()
                encoders[name].encode(text, "query")
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - used)
    return wall, cpu


def table(report: dict[str, Any]) -> str:
    setting = (
        f"one query of {report['query_tokens']} tokens, {report['threads']} thread, "
        f"{report['turns']} turns of {report['in_a_row']}, {report['machine']['cores']} cores"
    )
    lines = [
        setting,
        f"{'encoder':<24}{'weights':>12}{'MB':>8}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>9}{'ratio':>8}",
    ]
    lines += [
        f"{one['name']:<24}{one['parameters']:>12,}{one['model_bytes'] / 1e6:>8.1f}{one['wall_ms_p50']:>9.3f}"
        f"{one['wall_ms_p99']:>9.3f}{one['cpu_ms_p50']:>9.3f}{one['ratio']:>8.2f}"
        for one in report["encoders"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
