"""Vectors of many texts on disk: encoded in resumable shards, merged into one mapped matrix.

A long encoding is the most expensive step that can be interrupted, so it is cut into windows of
``SHARD_SIZE`` texts; a window whose ids are on disk is never encoded again. The finished folder holds
``vectors.npy``, ``ids.txt`` (one id a line) and the encoder's ``card.json``, with rows in ascending id
order: the row number then breaks ties exactly as :func:`retrieval_kd.runs.rank` does.

Windows do not depend on one another, and a vector not on its window, so several processes may encode them: the
folder is the same byte for byte.
"""

from __future__ import annotations

import bisect
import itertools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from retrieval_kd.artifacts import Artifact, Spec, atomic_write, build, fingerprint
from retrieval_kd.collections.base import Collection
from retrieval_kd.encoders.base import Encoder, Vectors
from retrieval_kd.encoders.card import EncoderCard, Side
from retrieval_kd.errors import ArtifactError, DataError
from retrieval_kd.progress import Advance, progress

STAGE = "encode"
VECTORS = "vectors.npy"
IDS = "ids.txt"
SHARD_SIZE = 4096
_BLOCK_ROWS = 16384
# float32 sums of a thousand squares stay within 1e-6 of 1; a vector that was never normalised does not.
_UNIT_TOLERANCE = 1e-3

Precision = Literal["float32", "float16"]

Texts = Iterable[tuple[str, str]]
"""Pairs of id and text, in an order that is the same on every run."""


@dataclass(frozen=True)
class EncodedCorpus:
    """Vectors of texts, by id; documents or queries.

    Attributes:
        ids: Ids in ascending order.
        vectors: float32 ``[len(ids), card.dimension]``, or float16 where that was asked for, mapped from disk, rows in
            the order of ``ids``.
        card: The encoder that made them.
        fingerprint: Identity of the encoding: encoder, texts and side.
        texts_fingerprint: Identity of the texts; for a corpus its ``corpus_fingerprint``.
    """

    ids: list[str]
    vectors: Vectors
    card: EncoderCard
    fingerprint: str
    texts_fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> EncodedCorpus:
        """Open a finished folder, each file's hash checked; the vectors stay on disk until they are used.

        Raises:
            ArtifactError: the folder is not a finished encoding, a file's bytes differ from the manifest, or its files
                disagree.
        """
        artifact = Artifact.load(folder, STAGE)
        # A flipped bit would give a document another's id, or a vector that nobody made.
        artifact.verify()
        ids, vectors, card = read_ids(folder / IDS), map_vectors(folder / VECTORS), EncoderCard.load(folder)
        if vectors.shape != (len(ids), card.dimension):
            raise ArtifactError(
                f"{folder / VECTORS}: shape {vectors.shape}, but {len(ids)} ids and dimension {card.dimension}; "
                "encode again"
            )
        return cls(ids, vectors, card, artifact.fingerprint, artifact.inputs["texts"])

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """Return each id's row; found by bisection where ids ascend, so that a large corpus needs no table."""
        if all(before < after for before, after in itertools.pairwise(self.ids)):
            return _Rows(self.ids)
        return {text_id: row for row, text_id in enumerate(self.ids)}


class _Rows(Mapping[str, int]):
    """Ids in ascending order, as a mapping from id to place."""

    def __init__(self, ids: Sequence[str]) -> None:
        self._ids = ids

    def __getitem__(self, text_id: str) -> int:
        row = bisect.bisect_left(self._ids, text_id)
        if row == len(self._ids) or self._ids[row] != text_id:
            raise KeyError(text_id)
        return row

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


@dataclass(frozen=True)
class Workers:
    """Processes that encode.

    Attributes:
        open: Opens the encoder in a process; picklable, such as a partial of :meth:`OnnxEncoder.load`.
        processes: How many.
    """

    open: Callable[[], Encoder]
    processes: int


def encode_corpus(
    encoder: Encoder,
    collection: Collection,
    folder: Path,
    *,
    precision: Precision = "float32",
    workers: Workers | None = None,
) -> Artifact:
    """Encode every document of a collection; memory holds a window of texts for each process, and all ids.

    Args:
        encoder: The encoder.
        collection: The documents.
        folder: Where the vectors go.
        precision: How they are kept: ``float16`` takes half the disk and keeps three digits.
        workers: Processes that encode in this one's place.

    Raises:
        DataError: no documents, a repeated or unwritable id, or a vector that is not finite or, under
            ``card.normalize``, not of unit length; names the document.
        EncoderMismatch: the encoder does not encode documents.
    """

    def documents() -> Texts:
        return ((document.doc_id, document.content) for document in collection.documents())

    return _encode(encoder, documents, "document", collection.corpus_fingerprint, folder, None, precision, workers)


def encode_texts(encoder: Encoder, texts: Mapping[str, str], side: Side, folder: Path) -> EncodedCorpus:
    """Encode texts by id, or open the folder where the same encoder has encoded the same texts before.

    Raises:
        DataError: as :func:`encode_corpus`.
        EncoderMismatch: the encoder does not encode that side.
    """
    _encode(encoder, lambda: sorted(texts.items()), side, fingerprint(dict(texts)), folder, len(texts))
    return EncodedCorpus.load(folder)


def read_ids(path: Path) -> list[str]:
    """Read a file of ids, one a line.

    Raises:
        ArtifactError: the file is missing, not UTF-8, or ends within a line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot read the ids ({error}); build {path.parent} again") from None
    # Only "\n" ends an id: universal newlines and splitlines would cut ids that hold "\r" or U+2028.
    *ids, rest = text.split("\n")
    if rest:
        raise ArtifactError(f"{path}: the last line is torn; build {path.parent} again")
    return ids


def write_ids(path: Path, ids: Iterable[str]) -> None:
    """Write ids one a line, atomically.

    Raises:
        DataError: an id is empty, holds a line break, or is not valid Unicode; names it.
    """
    with atomic_write(path, "wb") as file:
        for text_id in ids:
            if not text_id or "\n" in text_id:
                raise DataError(f"id {text_id!r}: empty or with a line break; give the text another id")
            try:
                file.write(text_id.encode("utf-8") + b"\n")
            except UnicodeEncodeError:
                raise DataError(f"id {text_id!r}: not valid Unicode; give the text another id") from None


def map_vectors(path: Path) -> Vectors:
    """Open a ``.npy`` matrix of float32 or float16 without reading it.

    Raises:
        ArtifactError: the file is missing, torn, or not such a matrix.
    """
    try:
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot map the vectors ({error}); build {path.parent} again") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.name not in get_args(Precision):
        raise ArtifactError(f"{path}: not a matrix of float32 or float16; build {path.parent} again")
    return vectors


def write_vectors(
    path: Path, blocks: Iterable[Vectors], shape: tuple[int, int], precision: Precision = "float32"
) -> None:
    """Write blocks of rows as one ``.npy`` matrix, atomically and one block in memory at a time."""
    dtype = np.dtype(precision).newbyteorder("<")
    with atomic_write(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype=dtype).data)


def _encode(
    encoder: Encoder,
    texts: Callable[[], Texts],
    side: Side,
    texts_fingerprint: str,
    folder: Path,
    total: int | None,
    precision: Precision = "float32",
    workers: Workers | None = None,
) -> Artifact:
    card = encoder.card
    card.prefix(side)
    spec = Spec(
        STAGE,
        config={
            "side": side,
            "shard_size": SHARD_SIZE,
            **({} if precision == "float32" else {"precision": precision}),
        },
        # The space changes no vector but stands in the card that is saved beside them.
        inputs={"encoder": card.fingerprint, "space": card.space_fingerprint, "texts": texts_fingerprint},
    )

    def work(target: Path) -> Mapping[str, Any]:
        if not (target / IDS).exists():
            with progress(f"encode with {card.name}", total, "texts") as advance:
                jobs = _missing(texts(), target, side, precision, advance)
                if workers is None:
                    for job in jobs:
                        advance(job.run(encoder))
                else:
                    _run_in_processes(jobs, workers, advance)
            shards = len(list(target.glob("ids-*.txt")))
            if shards == 0:
                raise DataError("no texts to encode; the collection is empty")
            _merge(target, shards, card.dimension, precision)
        _remove_shards(target)
        card.save(target)
        return {"texts": len(read_ids(target / IDS)), "dimension": card.dimension}

    return build(folder, spec, work)


@dataclass(frozen=True)
class _Job:
    """A shard to be made."""

    folder: Path
    number: int
    window: list[tuple[str, str]]
    side: Side
    precision: Precision

    def run(self, encoder: Encoder) -> int:
        """Encode the window, write it, and return how many texts it has."""
        ids = [text_id for text_id, _ in self.window]
        vectors = encoder.encode([text for _, text in self.window], self.side)
        check_vectors(vectors, ids, encoder.card)
        vectors_file, ids_file = _shard(self.folder, self.number)
        write_vectors(vectors_file, [vectors], vectors.shape, self.precision)
        # The ids come last: a shard with ids is a finished one.
        write_ids(ids_file, ids)
        return len(ids)


def _missing(texts: Texts, folder: Path, side: Side, precision: Precision, advance: Advance) -> Iterator[_Job]:
    """Yield what an earlier run has not finished."""
    for number, window in enumerate(_windows(texts)):
        ids_file = _shard(folder, number)[1]
        if not ids_file.exists():
            yield _Job(folder, number, window, side, precision)
            continue
        if read_ids(ids_file) != [text_id for text_id, _ in window]:
            raise DataError(
                f"{ids_file}: holds other ids than the texts at its place, so their order is not fixed; "
                f"delete {folder} and encode again"
            )
        advance(len(window))


def _run_in_processes(jobs: Iterator[_Job], workers: Workers, advance: Advance) -> None:
    """Run jobs in processes of their own, one job waiting for each at most."""
    # Not forked: onnxruntime and OpenMP have threads that a fork would leave behind.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers.processes, context, _open_worker, (workers.open,)) as pool:
        running: set[Future[int]] = set()
        try:
            for job in jobs:
                running.add(pool.submit(_run_in_worker, job))
                if len(running) >= 2 * workers.processes:
                    running = _advanced(running, FIRST_COMPLETED, advance)
            _advanced(running, ALL_COMPLETED, advance)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _advanced(running: set[Future[int]], until: str, advance: Advance) -> set[Future[int]]:
    done, running = wait(running, return_when=until)
    for future in done:
        advance(future.result())
    return running


_worker: Encoder | None = None


def _open_worker(open_encoder: Callable[[], Encoder]) -> None:
    global _worker
    _worker = open_encoder()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        # A pool's processes wait for work for ever when their parent is killed.
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run_in_worker(job: _Job) -> int:
    assert _worker is not None
    return job.run(_worker)


def _windows(texts: Texts) -> Iterator[list[tuple[str, str]]]:
    stream = iter(texts)
    while window := list(itertools.islice(stream, SHARD_SIZE)):
        yield window


def _shard(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"vectors-{number:05d}.npy", folder / f"ids-{number:05d}.txt"


def check_vectors(vectors: Vectors, ids: Sequence[str], card: EncoderCard) -> None:
    """Refuse vectors that are not what a card promises.

    Raises:
        DataError: another shape or dtype, or a vector that is not finite or, under ``card.normalize``, not of unit
            length; names the text.
    """
    if vectors.shape != (len(ids), card.dimension) or vectors.dtype != np.float32:
        raise DataError(
            f"encoder {card.name!r} gave {vectors.dtype} {vectors.shape} for {len(ids)} texts of dimension "
            f"{card.dimension}; export it again"
        )
    norms = np.linalg.norm(vectors, axis=1)
    for bad, what in (
        (~np.isfinite(norms), "not finite"),
        (card.normalize & (np.abs(norms - 1) > _UNIT_TOLERANCE), "not of unit length, which the card promises"),
    ):
        if bad.any():
            row = int(np.argmax(bad))
            raise DataError(
                f"text {ids[row]!r}: its vector is {what} (length {norms[row]}); export encoder {card.name!r} again"
            )


def _merge(folder: Path, shards: int, dimension: int, precision: Precision) -> None:
    """Write all shards as one matrix in ascending id order; the ids come last and mark it finished."""
    ids = [text_id for number in range(shards) for text_id in read_ids(_shard(folder, number)[1])]
    order = np.asarray(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
    ids = [ids[i] for i in order]
    for before, after in itertools.pairwise(ids):
        if before == after:
            raise DataError(f"id {after!r} occurs twice; give each text an id of its own")
    write_vectors(folder / VECTORS, _gather(folder, order, dimension), (len(ids), dimension), precision)
    write_ids(folder / IDS, ids)


def _gather(folder: Path, order: npt.NDArray[np.int64], dimension: int) -> Iterator[Vectors]:
    """Yield blocks of rows in a new order, one shard open at a time (a large corpus has more than we may open)."""
    for start in range(0, len(order), _BLOCK_ROWS):
        rows = order[start : start + _BLOCK_ROWS]
        block = np.empty((len(rows), dimension), dtype=np.float32)
        shard_of = rows // SHARD_SIZE
        for number in np.unique(shard_of):
            mine = shard_of == number
            block[mine] = map_vectors(_shard(folder, int(number))[0])[rows[mine] % SHARD_SIZE]
        yield block


def _remove_shards(folder: Path) -> None:
    for pattern in ("ids-*.txt", "vectors-*.npy"):
        for path in folder.glob(pattern):
            path.unlink()
