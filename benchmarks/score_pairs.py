"""Pairs per second of our cross-encoder scoring against ``sentence_transformers.CrossEncoder.predict``.

Same model, same pairs, same maximum length, both in float32 with raw logits and their own default
batches (theirs: 32 pairs; ours: a budget of padded tokens). The two take turns in one process, and the
fastest round of each counts, because other work on the machine only ever slows a round down. On a CPU
theirs is torch and ours is the same model's graph under onnxruntime, with as many threads; the seconds
that making the graph takes are in no round. Both sort by length, so the rest of the difference is the
batch: 32 long pairs leave the CPU's caches, 32 short ones do not fill them. They sort by characters, we
by tokens after truncation.

    python benchmarks/score_pairs.py --model FOLDER --collection BEIR_FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retrieval_kd.collections import open_collection
from retrieval_kd.recipes.schema import CollectionSpec
from retrieval_kd.teachers.cross_encoder import CrossEncoder

Scores = npt.NDArray[np.float32]
LARGEST_DIFFERENCE = 1e-4


def real_pairs(collection: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Draw queries and documents of a collection at random: every length it has, in no order."""
    opened = open_collection(CollectionSpec(collection))
    queries = list(opened.queries().values())
    documents = [document.content for document in islice(opened.documents(), 20 * count)]
    draw = np.random.default_rng([seed])
    return [
        (queries[i], documents[j])
        for i, j in zip(draw.integers(len(queries), size=count), draw.integers(len(documents), size=count), strict=True)
    ]


def alternate(sides: dict[str, Callable[[], Scores]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Scores]]:
    """Run the sides in turn; return each one's seconds by round and its last scores."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    scores: dict[str, Scores] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            scores[name] = side()
            seconds[name].append(time.perf_counter() - started)
    return seconds, scores


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="cross-encoder: a local folder or hub id")
    parser.add_argument("--collection", required=True, help="where real pairs come from")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    import sentence_transformers
    import torch

    pairs = real_pairs(options.collection, options.pairs, seed=13)
    ours = CrossEncoder.load(options.model, options.max_length)
    theirs = sentence_transformers.CrossEncoder(
        options.model, max_length=options.max_length, model_kwargs={"dtype": torch.float32}
    )
    sides: dict[str, Callable[[], Scores]] = {
        "sentence-transformers": lambda: theirs.predict(pairs, activation_fn=torch.nn.Identity()),
        "retrieval-kd": lambda: ours.score(pairs),
    }
    theirs.predict(pairs[:32])
    ours.score(pairs[:32])
    seconds, scores = alternate(sides, options.rounds)

    difference = float(np.abs(scores["sentence-transformers"] - scores["retrieval-kd"]).max())
    speed = {name: len(pairs) / min(times) for name, times in seconds.items()}
    ratio = speed["retrieval-kd"] / speed["sentence-transformers"]
    write = sys.stdout.write
    write(f"{len(pairs)} pairs, max length {options.max_length}, {torch.get_num_threads()} threads\n")
    for name, times in seconds.items():
        rounds = ", ".join(f"{len(pairs) / taken:.1f}" for taken in times)
        write(f"{name:24}{speed[name]:8.1f} pairs/s   (rounds: {rounds})\n")
    write(f"{'ratio':24}{ratio:8.2f}\n{'largest difference':24}{difference:.1e}\n")
    if options.json:
        figures = {
            "pairs": len(pairs),
            "max_length": options.max_length,
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "pairs_per_second": speed,
            "ratio": ratio,
            "largest_difference": difference,
        }
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if difference <= LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    sys.exit(main())
