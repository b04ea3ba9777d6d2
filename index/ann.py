"""faiss without types: its stubs lack or misstate half of what is called here."""

from __future__ import annotations

from typing import Any

import faiss as typed
import numpy as np

from index.filters import Mask

faiss: Any = typed


def selector(mask: Mask) -> Any:
    """Return what lets faiss see only the rows whose bit is set."""
    return faiss.IDSelectorBitmap(np.packbits(mask, bitorder="little"))
