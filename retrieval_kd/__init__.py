"""retrieval-kd: from a slow, accurate ranker to a fast search service.

This package is the distillation library and the contracts that the rooms beside it share
(``index``, ``serve``, ``eval``). Importing it imports neither torch nor any model library.
"""

__version__ = "0.1.0"
