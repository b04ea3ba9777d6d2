"""Every command and snippet of the README, run on a tiny collection."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_overrides
from typer.testing import CliRunner

from retrieval_kd.cli.main import app

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    """Return the README's rkd commands, comments and optional parts removed, verbs written a | b spelled out."""
    found = []
    for language, block in BLOCKS:
        for line in block.splitlines() if language == "bash" else ():
            command = line.split("  #")[0].strip()
            if not command.startswith("rkd "):
                continue
            command = re.sub(r"\s*\[[^]]*\]", "", command)
            verbs = re.match(r"rkd ((?:\w+ \| )+\w+) (.*)", command)
            found += [f"rkd {verb} {verbs[2]}" for verb in verbs[1].split(" | ")] if verbs else [command]
    return found


@pytest.fixture(scope="module")
def served(tiny: Path) -> Iterator[str]:
    """Serve a finished run of the tiny collection; yield its address."""
    from retrieval_kd.cli.pipeline import serving

    run(tiny, "rkd run margin_mse", tiny_overrides(tiny, "asymmetric"), "run-readme")
    with serving(tiny / "run-readme" / "index", tiny / "run-readme" / "encoder") as target:
        yield target


def run(tiny: Path, command: str, overrides: list[str], out: str = "") -> str:
    """Run a command in this process and return what it printed."""
    arguments = shlex.split(command)[1:]
    if overrides:
        arguments += ["--artifacts", str(tiny / "artifacts")]
        arguments += [word for override in overrides for word in ("--set", override)]
    done = CliRunner().invoke(app, arguments + (["--out", str(tiny / out)] if out else []), catch_exceptions=False)
    assert done.exit_code == 0, f"{command}: {done.output}"
    return done.output


def test_commands_were_found() -> None:
    """Without it a changed code fence would leave nothing tested and the tests below green."""
    assert len(commands()) == 19
    assert [language for language, _ in BLOCKS].count("python") == 1


@pytest.mark.parametrize("command", commands())
def test_commands_run(tiny: Path, served: str, tmp_path: Path, command: str) -> None:
    """Without it the README would promise what the command line has long called otherwise."""
    finished = tiny / "run-readme"
    if command.startswith("rkd serve"):
        return  # `served` has run it: it blocks
    named = {
        "DIR": tiny / "tiny-collection",
        "MODEL": finished / "teacher",
        "RECIPE": "leaf",
        "STORE": finished / "index" if "build" not in command else tmp_path / "store",
        "HOST:PORT": served,
        "FILE.trec": next((finished / "runs").glob("bm25*")),
    }
    spoken = command.replace("127.0.0.1:50051", served)
    spoken = re.sub(r"runs/(margin_mse-asymmetric|demo)\b", str(finished), spoken)
    for word, value in named.items():
        spoken = re.sub(rf"(?<![\w.]){re.escape(word)}(?![\w.])", str(value), spoken)
    spoken = spoken.replace("eval report RUN RUN", f"eval report {finished} {finished}")
    spoken = spoken.replace("--out report", f"--out {tmp_path / 'report'}")
    verb = spoken.split()[1]
    overrides: list[str] = []
    if verb in ("run", "mine", "teach", "score", "train", "export"):
        mode = "symmetric" if "symmetric" in command else "asymmetric"
        overrides = tiny_overrides(tiny, mode)
    if "teacher.model" in command:
        overrides = [override for override in overrides if not override.startswith("teacher.fine_tune")]
    if "msmarco" in command:
        spoken += " --split test"
    assert run(tiny, spoken, overrides, f"out-{spoken.split()[2]}" if verb == "run" else "")


def test_the_python_snippet_runs(served: str) -> None:
    """Without it the first thing a user pastes could fail."""
    snippet = next(block for language, block in BLOCKS if language == "python")
    snippet = snippet.replace("127.0.0.1:50051", served)
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 5
