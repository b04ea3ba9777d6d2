"""The optional dependencies that ``pyproject.toml`` promises, against what the modules import."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from retrieval_kd import artifacts

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OURS = {"retrieval_kd", "index", "serve", "eval", "protos"}
DISTRIBUTIONS = {"Stemmer": "pystemmer", "yaml": "pyyaml", "grpc_health": "grpcio-health-checking"}
# Torch comes with the train extra and pyserini with its own; each system that needs one says so. MTEB is brought by
# whoever evaluates in it, and markupsafe is a part of jinja2.
BROUGHT = {"torch", "pyserini", "mteb", "markupsafe"}


def names(extra: str) -> set[str]:
    """Return the distributions that an extra installs, ``""`` what is always installed."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {re.split(r"[^\w-]", line)[0].lower() for line in lines}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_an_evaluation_needs_the_eval_extra_alone(runtime: str) -> None:
    """Without it ``rkd eval beir --bm25`` would ask for torch and all of training, for want of two small packages."""
    installed = names("") | names(runtime) | names("eval")
    for path in (ROOT / "retrieval_kd" / "mining" / "bm25.py", *sorted((ROOT / "eval").rglob("*.py"))):
        for module in set(imported(path)) - OURS - BROUGHT - sys.stdlib_module_names:
            needed = DISTRIBUTIONS.get(module, module.replace("_", "-")).lower()
            assert needed in installed, f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_a_manifest_names_the_version_of_whatever_computed(runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it an artifact made on a GPU would not say which FAISS or ONNX Runtime made it."""
    monkeypatch.setattr(artifacts.importlib.metadata, "version", lambda name: f"{name} 1")
    assert {f"{name} 1" for name in names(runtime)} <= set(artifacts.producers().values())
