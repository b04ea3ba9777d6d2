"""The arrows between the rooms, read from the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"retrieval_kd", "index", "serve", "eval", "protos"}
HEAVY = ("torch", "transformers", "sentence_transformers")
ALLOWED = {
    "protos": set(),
    "retrieval_kd": set(),
    "index": {"retrieval_kd"},
    "serve": {"retrieval_kd", "index", "protos"},
    "eval": {"retrieval_kd", "index", "serve"},
}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def _modules(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py"))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_rooms_import_only_downwards(room: str) -> None:
    """Without it a helper borrowed from the wrong room would tie serving to training."""
    modules = _modules(room)
    assert modules
    for path in modules:
        if room == "retrieval_kd" and "cli" in path.relative_to(ROOT).parts:
            continue
        for name in _imports(path):
            top = name.split(".")[0]
            if top in ROOMS - {room}:
                assert top in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"


def test_eval_sees_only_the_client_of_serve() -> None:
    """Without it an evaluation of a remote server would need the server's own dependencies."""
    for path in _modules("eval"):
        for name in _imports(path):
            assert not name.startswith("serve") or name == "serve.client", f"{path.relative_to(ROOT)} imports {name}"


def test_nothing_imports_the_command_line() -> None:
    """Without it the library could not be used without its command line."""
    for room in ROOMS:
        for path in _modules(room):
            if "cli" not in path.relative_to(ROOT).parts:
                assert not any(name.startswith("retrieval_kd.cli") for name in _imports(path)), path


def test_losses_know_nothing_of_ours() -> None:
    """Without it a loss could come to see a model, and could no longer be tested with bare tensors."""
    for path in _modules("retrieval_kd/losses"):
        for name in _imports(path):
            if name.startswith("retrieval_kd"):
                assert name.startswith(("retrieval_kd.losses", "retrieval_kd.errors")), f"{path} imports {name}"


@pytest.mark.parametrize(
    "module",
    [
        "serve.server",
        "serve.client",
        "index.search",
        "index.build",
        "retrieval_kd.encoders.onnx",
        "retrieval_kd.cli.main",
    ],
)
def test_serving_and_help_load_no_torch(module: str) -> None:
    """Without it the serving image would grow by gigabytes and --help would take ten seconds."""
    script = f"import {module}, sys; sys.exit(', '.join(n for n in {HEAVY!r} if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
