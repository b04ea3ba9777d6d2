"""Ids are read from the bytes of the mapped file, without arrow's own objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from index.ids import IDS, DocumentIds, write_ids
from index.kinds import Effort
from retrieval_kd.errors import ArtifactError
from retrieval_kd.recipes.schema import IndexSpec


@given(ids=st.sets(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1), min_size=1))
def test_every_row_gives_its_id(tmp_path_factory: pytest.TempPathFactory, ids: set[str]) -> None:
    """Without it an id of other than one-byte letters would be cut, and every id behind it shifted."""
    path = tmp_path_factory.mktemp("ids") / IDS
    write_ids(path, sorted(ids))
    opened = DocumentIds.open(path)
    assert [opened[row] for row in range(len(opened))] == list(opened) == sorted(ids)
    assert opened.rows(sorted(ids)) == list(range(len(ids)))
    assert opened.at(np.arange(len(ids))[::-1]) == sorted(ids)[::-1]
    assert opened.at(np.arange(0)) == []


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_has_no_id(tmp_path: Path, row: int) -> None:
    """Without it a row below 0, which stands for nothing found, would be answered with an empty id."""
    write_ids(tmp_path / IDS, ["a", "b"])
    with pytest.raises(IndexError):
        DocumentIds.open(tmp_path / IDS)[row]
    with pytest.raises(IndexError):
        DocumentIds.open(tmp_path / IDS).at(np.array([0, row]))


def test_a_file_of_other_columns_is_refused(tmp_path: Path) -> None:
    """Without it 32-bit offsets would be read as 64-bit ones, and ids be any bytes."""
    batch = pa.record_batch([pa.array(["a", "b"], pa.string())], names=["id"])
    with pa.OSFile(str(tmp_path / IDS), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ArtifactError, match=r"not a file of ids .*build the index again"):
        DocumentIds.open(tmp_path / IDS)


@pytest.mark.parametrize(("ef_search", "width"), [(4, 10), (20, 20), (256, 42)])
def test_a_graph_proposes_what_is_wanted_and_room_for_ties(ef_search: int, width: int) -> None:
    """Without it a walk of small effort would be widened in secret, or one of large effort carry all it has seen."""
    assert Effort(ef_search, 1, 1).width(IndexSpec("hnsw"), 10) == width
