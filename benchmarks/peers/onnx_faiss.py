"""What the ONNX peers serve: the same ONNX file as retrieval-kd, padded batches, raw faiss (HNSW, 64 candidates).

It imports nothing of retrieval-kd: peers live in their own environments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

TOP_K = 10


class Pipeline:
    """Tokenizer, encoder and index, one thread each."""

    def __init__(self, world: Path) -> None:
        faiss.omp_set_num_threads(1)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        model = str(world / "encoder" / "model.onnx")
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(world / "encoder" / "tokenizer.json"))
        self._tokenizer.enable_truncation(256)
        self._tokenizer.enable_padding()
        self._index = faiss.read_index(str(world / "hnsw.faiss"))
        self._ids = (world / "ids.txt").read_text().splitlines()

    def search(self, texts: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Return the best documents for each text."""
        rows = self._tokenizer.encode_batch(list(texts))
        feed = {
            "input_ids": np.array([row.ids for row in rows], dtype=np.int64),
            "attention_mask": np.array([row.attention_mask for row in rows], dtype=np.int64),
        }
        return self.nearest(self._session.run(["sentence_embedding"], feed)[0])

    def nearest(self, vectors: np.ndarray) -> list[list[tuple[str, float]]]:
        """Return the best documents for each vector."""
        scores, found = self._index.search(vectors, TOP_K)
        return [
            [(self._ids[i], float(score)) for i, score in zip(row, line, strict=True)]
            for row, line in zip(found.tolist(), scores.tolist(), strict=True)
        ]
