"""faiss without types: its stubs lack or misstate half of what is called here."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import faiss as typed
import numpy as np
import numpy.typing as npt

from index.filters import Mask

faiss: Any = typed


class Selection:
    """Rows that may be ranked, and what faiss needs to see only those."""

    def __init__(self, mask: Mask, by_filter: bool) -> None:
        """Take bool ``[count]``, which is not changed afterwards, and whether a filter had a part in it."""
        self.mask = mask
        self.by_filter = by_filter

    @cached_property
    def count(self) -> int:
        """Return how many rows are selected."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def most(self) -> bool:
        """Return whether more than half are: then it is as cheap to look at all and to drop the others."""
        return 2 * self.count > len(self.mask)

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Return the selected rows, ascending."""
        return np.flatnonzero(self.mask)

    @cached_property
    def selector(self) -> Any:
        """Return the rows as faiss takes them."""
        return faiss.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))
