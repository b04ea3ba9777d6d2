"""The encoder that serves: an exported graph under onnxruntime, without torch.

A text's vector is the same bits alone and in any batch. Batches hold texts of exactly one length, so
nothing is padded, and the exported graph has no operator whose order of summation depends on the number
of rows (see :mod:`retrieval_kd.encoders.torch_encoder`). Where the card allows one text a call, each goes
alone. fp16 runs on a GPU, whose kernels depend on the batch: it alone promises no bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from retrieval_kd.artifacts import Artifact
from retrieval_kd.batching import equal_length_batches
from retrieval_kd.encoders.base import TextTokenizer, Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.errors import ArtifactError

STAGE = "export"
MODEL = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
OUTPUT = "sentence_embedding"
BATCH_TOKENS = 1024
CPU = "CPUExecutionProvider"
GPU = "CUDAExecutionProvider"
_ERRORS_ONLY = 3


class OnnxEncoder:
    """Turns texts into vectors; calls from several threads at once are allowed."""

    def __init__(self, session: onnxruntime.InferenceSession, tokenizer: TextTokenizer, card: EncoderCard) -> None:
        """Join a session, its tokenizer and its identity; :meth:`load` reads all three from a folder."""
        self._session = session
        self._tokenizer = tokenizer
        self._card = card

    @property
    def card(self) -> EncoderCard:
        """Return the encoder's identity."""
        return self._card

    @classmethod
    def load(cls, folder: Path, threads: int | None = None) -> OnnxEncoder:
        """Open an exported encoder after comparing every file with the manifest.

        Args:
            folder: A finished artifact of stage ``export``.
            threads: Threads of one call; one for each core when None.

        Raises:
            ArtifactError: not such a folder, a file whose bytes differ from the manifest, a graph that
                onnxruntime cannot run, or one of a precision this machine has no device for; names the file.
        """
        Artifact.load(folder, STAGE).verify()
        card = EncoderCard.load(folder)
        provider = CPU
        if card.precision == "fp16":
            provider = GPU
            if GPU not in onnxruntime.get_available_providers():
                raise ArtifactError(
                    f"{folder}: fp16 is for a GPU and onnxruntime has none here; install retrieval-kd[gpu] on a "
                    "machine with one, or export fp32"
                )
        return cls(open_session(folder / MODEL, threads, provider), TextTokenizer.load(folder, card), card)

    def encode(self, texts: Sequence[str], side: Side, on_rows: Callable[[int], object] | None = None) -> Vectors:
        """Return float32 ``[len(texts), card.dimension]``, rows in the order of ``texts``.

        Args:
            texts: What to encode; longer than ``card.max_length`` tokens is cut.
            side: Whether they are queries or documents.
            on_rows: Called with the number of texts done since the last call, for a progress bar.

        Raises:
            EncoderMismatch: the encoder does not encode that side.
        """
        return self.run(self.tokenize(texts, side), on_rows)

    def tokenize(self, texts: Sequence[str], side: Side) -> list[list[int]]:
        """Return the token ids of each text, prefix and special tokens included."""
        return self._tokenizer(texts, side)

    def run(self, rows: Sequence[Sequence[int]], on_rows: Callable[[int], object] | None = None) -> Vectors:
        """Return float32 ``[len(rows), card.dimension]``, a row's bits not depending on its company."""
        if len(rows) == 1:
            # Arranging the batches of one query takes longer than a static encoder does.
            vectors = self._encoded(rows)
            if on_rows is not None:
                on_rows(1)
            return vectors
        vectors = np.empty((len(rows), self._card.dimension), dtype=np.float32)
        for batch in equal_length_batches([len(row) for row in rows], BATCH_TOKENS, self._card.max_batch):
            vectors[batch] = self._encoded([rows[i] for i in batch])
            if on_rows is not None:
                on_rows(len(batch))
        return vectors

    def _encoded(self, rows: Sequence[Sequence[int]]) -> Vectors:
        """Return the vectors of rows of one length."""
        ids = np.array(rows, dtype=np.int64)
        (vectors,) = self._session.run([OUTPUT], {INPUTS[0]: ids, INPUTS[1]: np.ones_like(ids)})
        return np.asarray(vectors, dtype=np.float32)


def open_session(model: Path | bytes, threads: int | None = None, provider: str = CPU) -> onnxruntime.InferenceSession:
    """Open an ONNX graph.

    Args:
        model: The graph's file or bytes.
        threads: Threads of one call; one for each core when None.
        provider: Where onnxruntime runs it.

    Raises:
        ArtifactError: onnxruntime cannot run the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or os.cpu_count() or 1
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # Idle threads that spin doubled the CPU time of a query on two shared cores and made it no faster.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # The arena keeps the largest block of every length it has seen; throughput is the same without it.
    options.enable_cpu_mem_arena = False
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=[provider])
    except Exception as error:  # noqa: BLE001  onnxruntime's errors share no base of their own
        where = "the exported graph" if isinstance(model, bytes) else str(model)
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{where}: onnxruntime cannot run it ({reason}); export the encoder again") from None
