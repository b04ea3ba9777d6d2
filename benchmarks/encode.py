"""Texts encoded per second: retrieval-kd's encoders against ``SentenceTransformer.encode``.

The same model, texts, maximum length and machine; vectors must be equal to 1e-5 or nothing is reported.
The systems take turns in one process, so that a busy machine slows all of them alike, and the ratio is
the median over the rounds of the ratio within a round. sentence-transformers runs as it comes: batches
of 32, sorted by its own measure of length. The last row is a limit, not a system: the fp32 products of the
model's linear layers by torch and nothing else, which whoever gives equal vectors has to compute too.

    python benchmarks/encode.py --collection data/scifact --collection data/msmarco --texts 1000
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retrieval_kd.artifacts import producers, write_json
from retrieval_kd.collections import open_collection
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.onnx import OnnxEncoder
from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.encoders.torch_encoder import TorchEncoder, quiet_transformers
from retrieval_kd.export.onnx_export import Probes, export_encoder
from retrieval_kd.recipes.schema import CollectionSpec, EncoderSpec, ExportSpec

PEER = "sentence-transformers"
LARGEST_DIFFERENCE = 1e-5
PROBES = 20
LIMIT = "limit: fp32 products"
ROWS_AT_ONCE = 512
Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


def main() -> None:
    arguments = parse_arguments()
    spec = EncoderSpec(arguments.model)
    collections = [open_collection(CollectionSpec(path)) for path in arguments.collection]
    texts = mixed_texts(collections, arguments.texts)
    systems = open_systems(spec, texts)
    difference = largest_difference(systems, texts[:: max(1, len(texts) // 100)])
    model = TorchEncoder.load(spec)
    tokens = sum(len(row) for row in model.tokenizer(texts, "document"))
    systems[LIMIT] = products(model, tokens)
    seconds, cpu = measure(systems, texts, arguments.rounds)
    report = {
        "collections": [collection.name for collection in collections],
        "texts": len(texts),
        "tokens": tokens,
        "rounds": arguments.rounds,
        "max_abs_difference": difference,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": producers(),
        "systems": [
            {
                "name": name,
                "texts_per_second": len(texts) / statistics.median(seconds[name]),
                "tokens_per_second": tokens / statistics.median(seconds[name]),
                "cpu_seconds_per_1000_texts": 1000 * statistics.median(cpu[name]) / len(texts),
                "ratio": statistics.median(p / o for p, o in zip(seconds[PEER], seconds[name], strict=True)),
                "cpu_ratio": statistics.median(p / o for p, o in zip(cpu[PEER], cpu[name], strict=True)),
            }
            for name in systems
        ],
    }
    sys.stdout.write(table(report))
    if arguments.json is not None:
        write_json(arguments.json, report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", action="append", required=True, help="a collection; give several to mix them")
    parser.add_argument("--texts", type=int, default=1000, help="texts in all, one in five a query")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system")
    parser.add_argument("--model", default="all-MiniLM-L6-v2", help="a sentence-transformers model")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def mixed_texts(collections: Sequence[Collection], count: int) -> list[str]:
    """Return ``count`` documents and queries of all collections, in an order without any meaning."""
    share = -(-count // len(collections))
    texts: list[str] = []
    for collection in collections:
        queries = list(itertools.islice(collection.queries().values(), share // 5))
        documents = itertools.islice(collection.documents(), share - len(queries))
        texts += [*queries, *(document.content for document in documents)]
    order = np.random.default_rng([0, count]).permutation(len(texts))
    return [texts[i] for i in order[:count]]


def open_systems(spec: EncoderSpec, texts: Sequence[str]) -> dict[str, Encode]:
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        peer = SentenceTransformer(str(resolve_model(spec.model)), device="cpu")
    peer.max_seq_length = spec.max_length
    ours = TorchEncoder.load(spec)
    probes = Probes({}, {str(i): text for i, text in enumerate(texts[:PROBES])}, {})
    with tempfile.TemporaryDirectory() as folder:
        export_encoder(ours, Path(folder), ExportSpec(), probes)
        exported = OnnxEncoder.load(Path(folder))
    return {
        PEER: lambda some: np.asarray(peer.encode(list(some), show_progress_bar=False, normalize_embeddings=True)),
        "retrieval-kd torch": lambda some: ours.encode(some, "document"),
        "retrieval-kd ONNX": lambda some: exported.encode(some, "document"),
    }


def products(model: TorchEncoder, tokens: int) -> Encode:
    """Return what multiplies as many rows as there are tokens by each linear layer's weights, and does nothing else."""
    import torch

    weights = [module.weight.detach() for module in model.modules() if isinstance(module, torch.nn.Linear)]
    layers = [
        (torch.rand(ROWS_AT_ONCE, weight.shape[1]), weight.T, torch.empty(ROWS_AT_ONCE, weight.shape[0]))
        for weight in weights
    ]

    def multiply(texts: Sequence[str]) -> npt.NDArray[np.float32]:
        for _ in range(tokens // ROWS_AT_ONCE):
            for rows, weight, out in layers:
                torch.mm(rows, weight, out=out)
        return np.empty(0, dtype=np.float32)

    return multiply


def largest_difference(systems: dict[str, Encode], texts: Sequence[str]) -> float:
    """Return the largest difference of any vector entry from the peer's; also every system's warm-up."""
    vectors = {name: encode(texts) for name, encode in systems.items()}
    difference = max(float(np.abs(one - vectors[PEER]).max()) for one in vectors.values())
    if not difference <= LARGEST_DIFFERENCE:
        sys.exit(f"the systems' vectors differ by {difference:.3g}, so their speeds cannot be compared")
    return difference


def measure(
    systems: dict[str, Encode], texts: Sequence[str], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return wall and processor seconds of each system in each round; every round starts with another system."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    cpu: dict[str, list[float]] = {name: [] for name in systems}
    names = list(systems)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wall, used = time.perf_counter(), time.process_time()
            systems[name](texts)
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - used)
    return seconds, cpu


def table(report: dict[str, Any]) -> str:
    setting = (
        f"{report['texts']} texts, {report['tokens']} tokens of {' + '.join(report['collections'])}; "
        f"{report['machine']['cores']} cores; median of {report['rounds']} rounds; "
        f"largest difference {report['max_abs_difference']:.1e}"
    )
    lines = [
        setting,
        f"{'system':<24}{'texts/s':>9}{'tokens/s':>10}{'ratio':>8}{'CPU s/1000':>12}{'CPU ratio':>11}",
    ]
    lines += [
        f"{one['name']:<24}{one['texts_per_second']:>9.1f}{one['tokens_per_second']:>10.0f}{one['ratio']:>8.2f}"
        f"{one['cpu_seconds_per_1000_texts']:>12.1f}{one['cpu_ratio']:>11.2f}"
        for one in report["systems"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
