"""The artifact: a folder that is either whole, with a manifest, or does not exist.

Every stage writes a folder whose ``manifest.json`` comes last and by rename. It names the stage, its
resolved configuration, the fingerprints of its inputs, the versions that produced it, the seed, and
the size and sha256 of each file. Running a stage again with the same inputs returns the folder as it
is; a half-finished folder is resumed by the stage's own shards; a folder of another configuration is
built anew, one of another stage is left alone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar

from retrieval_kd import __version__
from retrieval_kd.errors import ArtifactError

MANIFEST = "manifest.json"
PLAN = ".plan.json"
LOCK = ".lock"
FORMAT_VERSION = 1
T = TypeVar("T")
_PRODUCERS = (
    "numpy",
    "torch",
    "transformers",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "faiss-cpu",
    "faiss-gpu",
    "faiss-gpu-cuvs",
    "bm25s",
    "pyarrow",
)


def canonical_json(value: object) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: object) -> str:
    """Return the sha256 (hex) of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def bytes_sha256(content: bytes) -> str:
    """Return the sha256 (hex) of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that appears under its name whole or not at all.

    The bytes go to a hidden sibling, are flushed to disk and renamed; on any error, a full disk
    included, the sibling is removed and ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        fsync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            # That of a write names no file.
            error.filename = str(path)
        raise


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON, atomically; NaN is refused."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: the file is absent or not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); delete it and run the stage again") from None


@dataclass(frozen=True)
class Spec:
    """What a stage is about to make: the identity that decides whether it was made before.

    Attributes:
        stage: The stage's name, such as ``"score"``.
        config: The resolved configuration, JSON-serialisable; everything that changes the output.
        inputs: Name of each input to its fingerprint.
        seed: The seed of every draw the stage makes.
        asked: What a person asked for, plain JSON values: no part of the identity, but what an unfinished folder is
            told by. The configuration, where a stage gives nothing else.
    """

    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Return the sha256 over stage, configuration, inputs and seed."""
        return fingerprint(
            {"stage": self.stage, "config": dict(self.config), "inputs": dict(self.inputs), "seed": self.seed}
        )


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: path relative to the folder, size in bytes, sha256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its manifest."""

    path: Path
    stage: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    seed: int
    fingerprint: str
    summary: Mapping[str, Any]
    files: tuple[FileEntry, ...]

    @classmethod
    def load(cls, folder: Path, stage: str | None = None) -> Artifact:
        """Open a finished artifact; sizes of its files are checked, hashes by :meth:`verify`.

        Raises:
            ArtifactError: no manifest, another stage than asked for, or a file missing or of another size.
        """
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(f"{folder}: no {MANIFEST}, so nothing finished is here; run the stage that makes it")
        raw = read_json(folder / MANIFEST)
        try:
            if raw["format_version"] != FORMAT_VERSION:
                raise ArtifactError(
                    f"{folder / MANIFEST}: format_version {raw['format_version']}, this version reads "
                    f"{FORMAT_VERSION}; build it again"
                )
            artifact = cls(
                path=folder,
                stage=raw["stage"],
                config=raw["config"],
                inputs=raw["inputs"],
                seed=raw["seed"],
                fingerprint=raw["fingerprint"],
                summary=raw["summary"],
                files=tuple(FileEntry(**entry) for entry in raw["files"]),
            )
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / MANIFEST}: not a manifest ({error}); build it again") from None
        if stage is not None and artifact.stage != stage:
            raise ArtifactError(f"{folder}: made by stage {artifact.stage!r}, expected {stage!r}; give another folder")
        for entry in artifact.files:
            file = folder / entry.path
            if not file.is_file():
                raise ArtifactError(f"{file}: named in the manifest but missing; build {folder} again")
            if file.stat().st_size != entry.bytes:
                raise ArtifactError(
                    f"{file}: {file.stat().st_size} bytes, the manifest says {entry.bytes}; build {folder} again"
                )
        return artifact

    def verify(self) -> None:
        """Compare every file's sha256 with the manifest.

        Raises:
            ArtifactError: names the first file whose bytes differ.
        """
        for entry in self.files:
            if file_sha256(self.path / entry.path) != entry.sha256:
                raise ArtifactError(
                    f"{self.path / entry.path}: bytes differ from the manifest's sha256; "
                    f"delete {self.path} and build it again"
                )


def build(
    folder: Path,
    spec: Spec,
    work: Callable[[Path], Mapping[str, Any]],
    whole: Callable[[Artifact], bool] = lambda _: True,
) -> Artifact:
    """Return the artifact at ``folder``, running ``work`` only if it is not there yet.

    ``work(folder)`` writes the stage's files and returns the summary kept in the manifest. It may
    find files of its own earlier, interrupted run (same spec) and go on from them, so whatever it
    writes must be written with :func:`atomic_write`. A folder that the stage made by another spec is emptied first.

    Args:
        folder: Where the artifact lives.
        spec: The identity of what is made.
        work: The stage.
        whole: Tells whether a finished artifact, whose own files are there, may be kept; it is built anew otherwise.

    Raises:
        ArtifactError: another process is building the same folder, or ``folder`` holds files that no
            stage of ours wrote, or another stage than this one (they are left alone).
    """
    # Processes that run the same recipe open what is finished side by side; only building excludes.
    finished = opened(folder, spec)
    if finished is not None and whole(finished):
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        finished = opened(folder, spec)
        if finished is not None and whole(finished):
            return finished
        _prepare(folder, spec)
        summary = work(folder)
        files = [_entry(folder, path) for path in _content(folder)]
        write_json(
            folder / MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "stage": spec.stage,
                "config": dict(spec.config),
                "inputs": dict(spec.inputs),
                "seed": spec.seed,
                "fingerprint": spec.fingerprint,
                "summary": dict(summary),
                "producers": producers(),
                "files": [asdict(entry) for entry in files],
            },
        )
        (folder / PLAN).unlink(missing_ok=True)
    return Artifact.load(folder, spec.stage)


def config_of(folder: Path) -> Mapping[str, Any] | None:
    """Return the configuration of what a folder holds, finished or not; None where that is unknown."""
    finished = _value(folder / MANIFEST, "config", dict)
    return _value(folder / PLAN, "config", dict) if finished is None else finished


def asked_of(plan: Path) -> Mapping[str, Any]:
    """Return what was asked for when an unfinished folder was begun; nothing where its plan is torn or older."""
    return _value(plan, "asked", dict) or {}


def _stage_of(folder: Path) -> str | None:
    return _value(folder / MANIFEST, "stage", str) or _value(folder / PLAN, "stage", str)


def _value(path: Path, key: str, kind: type[T]) -> T | None:
    with contextlib.suppress(ArtifactError, AttributeError):
        value = read_json(path).get(key)
        if isinstance(value, kind):
            return value
    return None


def producers() -> dict[str, str]:
    """Return the versions of everything installed here that can change an artifact's bytes."""
    versions = {"retrieval-kd": __version__, "python": platform.python_version()}
    for name in _PRODUCERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def opened(folder: Path, spec: Spec) -> Artifact | None:
    """Return the artifact at ``folder`` if it is whole and of this spec; otherwise None, and :func:`build` makes it."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        artifact = Artifact.load(folder)
    except ArtifactError:
        return None
    return artifact if artifact.fingerprint == spec.fingerprint else None


def _prepare(folder: Path, spec: Spec) -> None:
    """Keep the shards of an interrupted run of the same spec; clear those of another spec of the same stage."""
    plan = folder / PLAN
    # Of a run killed before its plan was whole; with it the folder would look like a stranger's.
    for half in folder.glob(f".{PLAN}.*.tmp"):
        half.unlink()
    ours = plan.is_file() or _is_ours(folder / MANIFEST)
    leftovers = [path for path in folder.iterdir() if path.name != LOCK]
    if leftovers and not ours:
        raise ArtifactError(
            f"{folder}: not empty and not written by retrieval-kd ({leftovers[0].name}, ...); give an empty folder"
        )
    held = _stage_of(folder)
    if held not in (None, spec.stage):
        raise ArtifactError(
            f"{folder}: holds what stage {held!r} made, which stage {spec.stage!r} would delete; give another folder"
        )
    if plan.is_file() and not (folder / MANIFEST).exists() and _same_plan(plan, spec):
        # A killed run leaves the hidden halves of atomic_write; the manifest would list them.
        for path in folder.rglob(".*.tmp"):
            path.unlink()
        return
    identity = {"stage": spec.stage, "config": dict(spec.config), "asked": dict(spec.asked or spec.config)}
    if leftovers:
        # Nobody's fingerprint: stopped before all is cleared, the folder is ours still and nothing goes on from it.
        write_json(plan, {**identity, "fingerprint": ""})
    # The manifest goes first: from here on the folder counts as unfinished, wherever we are stopped.
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in leftovers:
        if path.name in (PLAN, MANIFEST):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    write_json(plan, {**identity, "fingerprint": spec.fingerprint})


def _is_ours(manifest: Path) -> bool:
    """Tell a manifest of ours, whole or torn, from another tool's: many keep a file of that name."""
    if not manifest.is_file():
        return False
    try:
        raw = read_json(manifest)
    except ArtifactError:
        return True
    return isinstance(raw, dict) and {"stage", "fingerprint", "files"} <= raw.keys()


def _same_plan(plan: Path, spec: Spec) -> bool:
    try:
        return bool(read_json(plan).get("fingerprint") == spec.fingerprint)
    except ArtifactError:
        return False


def _content(folder: Path) -> list[Path]:
    hidden = {MANIFEST, PLAN, LOCK}
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in hidden)


def _entry(folder: Path, path: Path) -> FileEntry:
    return FileEntry(str(path.relative_to(folder)), path.stat().st_size, file_sha256(path))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write in a folder.

    Raises:
        ArtifactError: another process is at it.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(
                f"{folder}: another process is building it; wait for it or give another folder"
            ) from None
        yield
