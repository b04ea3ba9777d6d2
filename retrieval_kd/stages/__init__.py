"""The stages of a distillation, each an artifact named after its recipe and its inputs.

A stage asks for the stages it needs, so asking for the last one runs all of them, and what is already
there is opened. Artifacts lie under one root and are named by a fingerprint of everything that goes
into them: two recipes that share a teacher and candidates share the scores.
"""

from retrieval_kd.stages.workspace import Workspace

__all__ = ["Workspace"]
