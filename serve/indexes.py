"""The index being served and how another version takes its place.

A new version is opened beside the old one, must answer its own stored probe queries, and is then swapped
in by one assignment. A request holds the version it began with until its answer is made, so no answer
mixes two, and the old version is closed when the last of them lets go. Whatever fails before the swap
leaves the old version serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from retrieval_kd.encoders.base import Vectors
from retrieval_kd.encoders.card import EncoderCard
from retrieval_kd.errors import ArtifactError, RkdError, ServeError
from retrieval_kd.runs import Ranking
from serve.errors import MovedError, NotReadyError, PreconditionError, StoreError, UnknownError
from serve.metrics import Metrics

T = TypeVar("T")
_log = logging.getLogger(__name__)
VERSION = "dense.retrieval/index_version"
UNREADABLE = "unreadable"
# A client asks three times, and the pointer is looked at every two seconds.
_MOVED_SECONDS = 1.0


class DocumentSearcher(Protocol):
    """An index version, opened; every method may be called by several threads at once."""

    @property
    def card(self) -> EncoderCard:
        """Return the document encoder's identity."""

    @property
    def version(self) -> str:
        """Return the version's name."""

    @property
    def kind(self) -> str:
        """Return how the index is searched."""

    @property
    def count(self) -> int:
        """Return the number of documents that can be found."""

    @property
    def updates(self) -> int:
        """Return how many documents were added or replaced since the build."""

    @property
    def dimension(self) -> int:
        """Return the vector width."""

    @property
    def effort(self) -> Any:
        """Return how hard the index looks unless a search says otherwise, a frozen dataclass."""

    @property
    def field_types(self) -> dict[str, str]:
        """Return what each stored field holds, by name."""

    def snapshot(self) -> DocumentSearcher:
        """Return a view that sees nothing of later changes; good as long as the version is open."""

    def search(
        self,
        vectors: Vectors,
        k: int,
        *,
        exact: bool = False,
        filter: Any = None,  # noqa: A002  the field's own word
        effort: Any = None,
    ) -> list[Ranking]:
        """Return the best ``k`` documents that match for each row."""

    def fields(self, doc_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the named stored fields of each document; an unknown name is a DataError."""

    def upsert(self, ids: Sequence[str], vectors: Vectors, fields: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Add documents or replace them; durable and visible on return."""

    def delete(self, ids: Sequence[str]) -> None:
        """Remove documents; durable and no longer found on return."""

    def check_query_encoder(self, card: EncoderCard) -> None:
        """Refuse an encoder of another space."""

    def self_test(self) -> None:
        """Answer the stored probe queries and raise if an answer is not the stored one."""

    def close(self) -> None:
        """Let go of the version's files."""


@dataclass(frozen=True)
class VersionSummary:
    """What a store says about one of its versions without opening it; of one it cannot read, the name alone."""

    version: str
    created_at: str = ""
    kind: str = UNREADABLE
    count: int = 0
    dimension: int = 0


class IndexSource(Protocol):
    """Where versions come from."""

    def current(self) -> str:
        """Return the name of the version that shall be served."""

    def names(self) -> list[str]:
        """Return the name of every version, oldest first, sound or not."""

    def versions(self) -> list[VersionSummary]:
        """Return every version, oldest first; one that cannot be read is marked, and hides none of the others."""

    def open(self, version: str) -> DocumentSearcher:
        """Open a version after checking its bytes."""

    def select(self, version: str) -> None:
        """Make a version the one that shall be served."""


class StoreSource:
    """An index store on disk."""

    def __init__(self, path: Path) -> None:
        """Name the store's folder."""
        from index.store import IndexStore

        self._store = IndexStore(path)

    def current(self) -> str:
        """Return the name in ``CURRENT``."""
        return self._store.current().name

    def names(self) -> list[str]:
        """Return the names of the versions' folders."""
        return [folder.name for folder in self._store.versions()]

    def versions(self) -> list[VersionSummary]:
        """Return what the manifests say."""
        return [_summary(folder) for folder in self._store.versions()]

    def open(self, version: str) -> DocumentSearcher:
        """Check every byte of a version and map it."""
        from index.search import Searcher

        folders = {folder.name: folder for folder in self._store.versions()}
        return Searcher.open(folders[version])

    def select(self, version: str) -> None:
        """Move ``CURRENT``."""
        self._store.publish_existing(version)


def _summary(folder: Path) -> VersionSummary:
    from index.manifest import IndexManifest

    try:
        manifest = IndexManifest.load(folder)
    except (RkdError, OSError) as error:
        _log.warning("index version %s cannot be read: %s", folder.name, error)
        return VersionSummary(folder.name)
    content = manifest.content
    return VersionSummary(folder.name, manifest.created_at, content.index.kind, content.count, content.dimension)


class IndexHandle:
    """An opened version and the number of its users; the last one to let go closes it."""

    def __init__(self, searcher: DocumentSearcher) -> None:
        """Begin with one user, the caller."""
        self.searcher = searcher
        self._users = 1
        self._lock = threading.Lock()

    def acquire(self) -> None:
        """Count one more user; only who holds the handle may call it."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """Count one user less, from any thread."""
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            self.searcher.close()


@dataclass(frozen=True)
class _Opened:
    """A version that has passed its test, and its counts, made where reading files holds up nobody."""

    searcher: DocumentSearcher
    count: int
    updates: int


class IndexHost:
    """Holds the version being served, and replaces it."""

    def __init__(self, source: IndexSource, card: EncoderCard, metrics: Metrics) -> None:
        """Serve nothing yet.

        Args:
            source: Where versions come from.
            card: The encoder whose vectors will search.
            metrics: Counts swaps and failures.
        """
        self._source = source
        self._card = card
        self._metrics = metrics
        self._handle: IndexHandle | None = None
        self._swapping = asyncio.Lock()
        self._refused = ""

    @property
    def searcher(self) -> DocumentSearcher:
        """Return the version being served, to be used before the next await.

        Raises:
            NotReadyError: there is none.
        """
        return self._serving().searcher

    @contextlib.contextmanager
    def hold(self) -> Iterator[IndexHandle]:
        """Keep the version being served open until the block ends, whatever replaces it meanwhile.

        Raises:
            NotReadyError: there is none.
        """
        handle = self._serving()
        handle.acquire()
        try:
            yield handle
        finally:
            handle.release()

    def close(self) -> None:
        """Stop serving; the version is closed once its last user lets go."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.release()

    async def versions(self) -> list[VersionSummary]:
        """Return every version of the store, oldest first."""
        return await asyncio.to_thread(self._source.versions)

    async def follow(self, again: bool = False) -> str:
        """Serve the store's current version and return its name.

        Args:
            again: Whether to try a version once more that has failed before.

        Raises:
            RkdError: it cannot be opened, has another encoder's space, or fails its test; the version
                that was served stays.
        """
        async with self._swapping:
            version = await asyncio.to_thread(self._source.current)
            if self._handle is not None and version == self._handle.searcher.version:
                searcher = self._handle.searcher
                # Other processes change it, too, and a page of several workers shows the lowest count.
                self._metrics.documents(*await asyncio.to_thread(_counts, searcher))
                return version
            if version == self._refused and not again:
                raise NotReadyError(f"index version {version} was refused before; publish a sound one")
            self._swap(await self._open(version))
            return version

    async def publish(self, version: str) -> tuple[str, str]:
        """Make a version current in the store and serve it; empty names the store's current one.

        Returns:
            The names of the version served now and of the one before.

        Raises:
            UnknownError: the store has no such version.
            StoreError: the store's pointer cannot be moved.
            RkdError: as :meth:`follow`; in every case the version that was served stays.
        """
        async with self._swapping:
            return await self._publish(version or await asyncio.to_thread(self._source.current))

    async def rollback(self) -> tuple[str, str]:
        """Publish the newest version that is older than the one being served; see :meth:`publish`."""
        async with self._swapping:
            served = self._serving().searcher.version
            older = [name for name in await asyncio.to_thread(self._source.names) if name < served]
            if not older:
                raise UnknownError(VERSION, "", f"no version is older than {served}; publish another one by name")
            return await self._publish(older[-1])

    async def write(self, work: Callable[[DocumentSearcher], None]) -> tuple[str, int]:
        """Change documents of the version being served; no other version takes its place meanwhile.

        Returns:
            The version's name and how many documents can be found from now on.

        Raises:
            MovedError: another version is current, and the server is about to serve it.
            PreconditionError: another version is current, and the server has refused it.
            StoreError: the change cannot be written.
        """

        def change(searcher: DocumentSearcher) -> tuple[int, int]:
            work(searcher)
            return _counts(searcher)

        async with self._swapping:
            with self.hold() as handle:
                searcher = handle.searcher
                try:
                    count, updates = await _to_its_end(_in_thread(change, searcher))
                except ArtifactError as error:
                    raise await self._unwritten(searcher.version, error) from error
                self._metrics.documents(count, updates)
                return searcher.version, count

    async def _unwritten(self, served: str, error: ArtifactError) -> ServeError:
        """Return what a remote caller can do about a change that was refused."""
        try:
            current = await asyncio.to_thread(self._source.current)
        except ArtifactError:
            return StoreError(str(error))
        if current == served:
            return StoreError(str(error))
        if current == self._refused:
            return PreconditionError(
                "index",
                f"index version {current} is current, but the server refused it and serves {served}, so nothing can be "
                f"written; publish {served} to go on with it, or a sound version",
            )
        return MovedError(
            f"index version {current} has just become current, and the server is about to serve it instead of "
            f"{served}; nothing was written, so send it again in a moment",
            _MOVED_SECONDS,
        )

    async def _publish(self, version: str) -> tuple[str, str]:
        before = self._serving().searcher.version
        known = await asyncio.to_thread(self._source.names)
        if version not in known:
            raise UnknownError(VERSION, version, f"no index version {version!r}; there are {', '.join(known)}")
        opened = await self._open(version) if version != before else None
        selecting = _in_thread(self._source.select, version)
        try:
            await _to_its_end(selecting)
        except ArtifactError as error:
            raise StoreError(str(error)) from error
        finally:
            # Where the pointer has moved the version is served, whether or not its caller has waited for it.
            if opened is not None and selecting.exception() is None:
                self._swap(opened)
            elif opened is not None:
                opened.searcher.close()
        return version, before

    async def _open(self, version: str) -> _Opened:
        def work() -> _Opened:
            searcher = self._source.open(version)
            try:
                searcher.check_query_encoder(self._card)
                searcher.self_test()
                return _Opened(searcher, *_counts(searcher))
            except BaseException:
                searcher.close()
                raise

        # Not the search pool: checking the bytes of a large version takes seconds, and searches go on meanwhile.
        opening = asyncio.ensure_future(asyncio.to_thread(work))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unused)
            raise
        except Exception as error:
            # What the machine lacks for a moment, a descriptor or memory, says nothing about the version.
            if not isinstance(error, OSError | MemoryError):
                self._refused = version
            self._metrics.index_refused()
            _log.error("index version %s was refused: %s", version, error)
            if isinstance(error, RkdError):
                raise
            raise ArtifactError(f"index version {version} cannot be opened ({error}); build it again") from error

    def _swap(self, opened: _Opened) -> None:
        before, self._handle = self._handle, IndexHandle(opened.searcher)
        self._refused = ""
        self._metrics.index(opened.searcher.version, opened.count, opened.updates)
        _log.info("serving index version %s", opened.searcher.version)
        if before is not None:
            before.release()

    def _serving(self) -> IndexHandle:
        if self._handle is None:
            raise NotReadyError("no index is loaded; wait until the server's health is SERVING")
        return self._handle


def _counts(searcher: DocumentSearcher) -> tuple[int, int]:
    """Return the documents that can be found, and how many of them are not in the build."""
    return searcher.count, searcher.updates


def _in_thread(work: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
    """Begin work in a thread; not as a task, for a loop that ends cancels those and waits for none of their threads."""
    return asyncio.get_running_loop().run_in_executor(None, work, *arguments)


async def _to_its_end(work: asyncio.Future[T]) -> T:
    """Wait for what a thread does, which cannot be stopped, however often the caller is cancelled meanwhile.

    What the caller holds for the thread, a lock or a version, it then lets go of when the thread has done with it.
    Nobody else hears of a failure after the caller has left, so it is logged.
    """
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if (error := work.exception()) is not None:
            _log.error("what a caller who has left had begun failed: %s", error)
        raise asyncio.CancelledError
    return work.result()


def _close_unused(opening: asyncio.Future[_Opened]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().searcher.close()


async def watch(host: IndexHost, seconds: float, reload: asyncio.Event) -> None:
    """Follow the store's pointer for ever: every ``seconds``, and at once when ``reload`` is set."""
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(reload.wait(), seconds)
        again = reload.is_set()
        reload.clear()
        try:
            await host.follow(again)
        except NotReadyError:
            continue
        except Exception as error:  # noqa: BLE001  whoever stopped following would serve one version for ever
            _log.error("the index that is served stays: %s", error or type(error).__name__)
