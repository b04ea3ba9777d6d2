"""Where the pieces of a service lie: the index store and the query encoder of a run's folder."""

from __future__ import annotations

from pathlib import Path

from retrieval_kd.errors import ServeError


def served_folder(store: Path, encoder: Path | None) -> tuple[Path, Path]:
    """Return index store and query encoder; a run's folder has both.

    Raises:
        ServeError: ``store`` is not a run's folder and no encoder was named.
    """
    index = store / "index" if (store / "index").is_dir() else store
    if encoder is not None:
        return index, encoder
    if index != store and (store / "encoder").is_dir():
        return index, store / "encoder"
    raise ServeError(
        f"{store}: not a run's folder, so the query encoder is unknown; name it with --encoder (encoder= in --system)"
    )
