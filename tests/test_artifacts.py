"""The artifact contract: whole, or not there at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from retrieval_kd.artifacts import PLAN, Artifact, Spec, atomic_write, build, config_of, fingerprint
from retrieval_kd.errors import ArtifactError


def _write(folder: Path) -> Mapping[str, Any]:
    with atomic_write(folder / "data.txt") as file:
        file.write("hello")
    return {"lines": 1}


def _refuse(folder: Path) -> Mapping[str, Any]:
    raise AssertionError("the stage ran again")


def test_same_inputs_do_nothing(tmp_path: Path) -> None:
    """Without it every run would score a million pairs again."""
    spec = Spec("score", {"depth": 3}, {"corpus": "abc"}, seed=1)
    first = build(tmp_path / "a", spec, _write)
    again = build(tmp_path / "a", spec, _refuse)
    assert again == first
    assert [entry.path for entry in again.files] == ["data.txt"]
    assert again.summary == {"lines": 1}


@pytest.mark.parametrize(
    "other",
    [
        Spec("score", {"depth": 4}, {"corpus": "abc"}, seed=1),
        Spec("score", {"depth": 3}, {"corpus": "abd"}, seed=1),
        Spec("score", {"depth": 3}, {"corpus": "abc"}, seed=2),
    ],
)
def test_any_change_of_identity_builds_anew(tmp_path: Path, other: Spec) -> None:
    """Without it a changed depth would silently return the old scores, and old shards would mix with new."""
    build(tmp_path / "a", Spec("score", {"depth": 3}, {"corpus": "abc"}, seed=1), _write)
    (tmp_path / "a" / "stale.parquet").write_text("old shard")

    def work(folder: Path) -> Mapping[str, Any]:
        assert not (folder / "data.txt").exists()
        assert not (folder / "stale.parquet").exists()
        return {}

    assert build(tmp_path / "a", other, work).fingerprint == other.fingerprint


def test_failed_stage_leaves_no_manifest_and_keeps_its_shards(tmp_path: Path) -> None:
    """Without it a later step would accept half a corpus, or a resumed stage would start over."""
    spec = Spec("encode", {})

    def fail(folder: Path) -> Mapping[str, Any]:
        _write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build(tmp_path / "a", spec, fail)
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        Artifact.load(tmp_path / "a")

    def resume(folder: Path) -> Mapping[str, Any]:
        assert (folder / "data.txt").read_text() == "hello"
        return {}

    assert build(tmp_path / "a", spec, resume).stage == "encode"


def test_kill_between_files_and_manifest_is_unfinished(tmp_path: Path) -> None:
    """Without it a SIGKILL after the last shard could leave a folder that claims to be whole."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from retrieval_kd.artifacts import Spec, atomic_write, build

        def work(folder):
            with atomic_write(folder / "one.txt") as file:
                file.write("1")
            (folder / ".two.txt.tmp-partial").write_text("torn")
            os.kill(os.getpid(), signal.SIGKILL)

        build(Path(sys.argv[1]), Spec("s", {}), work)
        """
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ArtifactError, match="nothing finished"):
        Artifact.load(tmp_path / "a")
    artifact = build(tmp_path / "a", Spec("s", {}), lambda folder: {"kept": (folder / "one.txt").read_text()})
    assert artifact.summary == {"kept": "1"}


def test_kill_while_another_spec_is_cleared_mixes_nothing(tmp_path: Path) -> None:
    """Without it a stage would go on from what an earlier configuration left, and publish that as its own."""
    script = textwrap.dedent(
        """
        import os, sys
        from pathlib import Path
        from sabotage import killed_at
        from retrieval_kd.artifacts import Spec, atomic_write, build

        os.fsync = lambda _: None
        root = Path(sys.argv[1])

        def make(folder, depth):
            def work(target):
                for name in ("a.txt", "b.txt", "c.txt"):
                    if not (target / name).exists():
                        with atomic_write(target / name) as file:
                            file.write(str(depth))
                return {}
            return build(folder, Spec("s", {"depth": depth}), work)

        kills, killed = 0, True
        while killed:
            folder = root / str(kills)
            make(folder, 1)
            killed = killed_at(kills + 1, lambda: make(folder, 2))
            assert {(folder / entry.path).read_text() for entry in make(folder, 2).files} == {"2"}, kills
            kills += 1
        assert kills > 10, kills
        """
    )
    path = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_atomic_write_leaves_the_old_file_on_failure(tmp_path: Path) -> None:
    """Without it an error while writing would leave a torn file under the final name."""
    path = tmp_path / "x.json"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write("new")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.json"]  # noqa: PTH208


def test_torn_and_flipped_files_are_named(tmp_path: Path) -> None:
    """Without it a truncated or rotten file would be read as if it were whole."""
    artifact = build(tmp_path / "a", Spec("s", {}), _write)
    data = tmp_path / "a" / "data.txt"
    data.write_text("hellO")
    with pytest.raises(ArtifactError, match=r"data\.txt: bytes differ"):
        artifact.verify()
    data.write_text("hell")
    with pytest.raises(ArtifactError, match=r"data\.txt: 4 bytes, the manifest says 5"):
        Artifact.load(tmp_path / "a")
    data.unlink()
    with pytest.raises(ArtifactError, match=r"data\.txt: named in the manifest but missing"):
        Artifact.load(tmp_path / "a")


def test_torn_manifest_is_rebuilt_not_trusted(tmp_path: Path) -> None:
    """Without it half a manifest would crash every later command instead of being mended by the stage."""
    spec = Spec("s", {})
    build(tmp_path / "a", spec, _write)
    manifest = tmp_path / "a" / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(ArtifactError, match=r"manifest\.json: not valid JSON"):
        Artifact.load(tmp_path / "a")
    assert build(tmp_path / "a", spec, _write).summary == {"lines": 1}


def test_wrong_stage_and_future_format_are_refused(tmp_path: Path) -> None:
    """Without it an index build would read a score folder, or a new format by old rules."""
    build(tmp_path / "a", Spec("score", {}), _write)
    with pytest.raises(ArtifactError, match="made by stage 'score', expected 'encode'"):
        Artifact.load(tmp_path / "a", "encode")
    manifest = tmp_path / "a" / "manifest.json"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**raw, "format_version": 99}))
    with pytest.raises(ArtifactError, match="format_version 99"):
        Artifact.load(tmp_path / "a")


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    """Without it --out on a home directory would delete it."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not written by retrieval-kd"):
        build(tmp_path, Spec("s", {}), _write)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_with_another_tools_manifest_is_left_alone(tmp_path: Path) -> None:
    """Without it --out on a web application, which has a manifest.json too, would delete it."""
    (tmp_path / "manifest.json").write_text('{"name": "app", "icons": []}')
    (tmp_path / "index.html").write_text("years of work")
    with pytest.raises(ArtifactError, match="not written by retrieval-kd"):
        build(tmp_path, Spec("s", {}), _write)
    assert (tmp_path / "index.html").read_text() == "years of work"
    assert json.loads((tmp_path / "manifest.json").read_text())["name"] == "app"


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_stage_is_left_alone(tmp_path: Path, finished: bool) -> None:
    """Without it a path given for the wrong option would delete an exported model to put vectors in its place."""
    folder, exported = tmp_path / "a", Spec("export", {"opset": 17})

    def fail(target: Path) -> Mapping[str, Any]:
        _write(target)
        raise OSError("disk full")

    with contextlib.nullcontext() if finished else pytest.raises(OSError, match="disk full"):
        build(folder, exported, _write if finished else fail)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ArtifactError, match=r"a: holds what stage 'export' made, which stage 'encode' would delete"):
        build(folder, Spec("encode", {}), _refuse)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert build(folder, exported, _write).summary == {"lines": 1}


def test_two_builders_of_one_folder(tmp_path: Path) -> None:
    """Without it two processes would interleave shards in one folder."""

    def nested(folder: Path) -> Mapping[str, Any]:
        build(folder, Spec("s", {}), _write)
        return {}

    with pytest.raises(ArtifactError, match="another process is building it"):
        build(tmp_path / "a", Spec("s", {}), nested)


def test_fingerprint_ignores_key_order_and_refuses_nan() -> None:
    """Without it the same recipe written in another order would be distilled twice."""
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        fingerprint(float("nan"))


def test_the_configuration_of_a_half_finished_folder_is_known(tmp_path: Path) -> None:
    """Without it a killed run that is started again with another recipe could not say what was changed."""
    folder = tmp_path / "a"

    def fail(_: Path) -> Mapping[str, Any]:
        raise OSError("disk full")

    assert config_of(folder) is None
    with pytest.raises(OSError, match="disk full"):
        build(folder, Spec("s", {"epochs": 2}), fail)
    assert config_of(folder) == {"epochs": 2}
    build(folder, Spec("s", {"epochs": 3}), _write)
    assert config_of(folder) == {"epochs": 3}
    (folder / "manifest.json").write_text("[1]")
    assert config_of(folder) is None
    (folder / PLAN).write_text("{")
    assert config_of(folder) is None
