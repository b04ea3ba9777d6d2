"""Names of models: folders, the packaged one, the hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrieval_kd.encoders.resolve import resolve_model
from retrieval_kd.errors import ArtifactError, RecipeError
from retrieval_kd.recipes.schema import DEFAULT_ENCODER


def test_folder_comes_as_it_is(tmp_path: Path) -> None:
    """A local model must never be looked up elsewhere."""
    assert resolve_model(str(tmp_path)) == tmp_path


def test_default_encoder_is_the_published_one() -> None:
    """Without this, results would depend on which copy happens to be installed."""
    assert (resolve_model(DEFAULT_ENCODER) / "modules.json").is_file()


def test_tampered_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights under the known name would be taken for the known model."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"other")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ArtifactError, match="not the published weights"):
        resolve_model(DEFAULT_ENCODER)


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ImportError's trace tells a user nothing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install"):
        resolve_model(DEFAULT_ENCODER)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere-at-all"])
def test_missing_folder_is_not_asked_of_the_hub(name: str) -> None:
    """A mistyped path must fail at once and not after network time-outs."""
    with pytest.raises(RecipeError, match="no such folder"):
        resolve_model(name)


def test_file_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weights file given for its folder must not become a hub id."""
    (tmp_path / "weights").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no such folder"):
        resolve_model("weights")


@pytest.mark.parametrize("failure", [OSError("Name or service not known\nlong trace"), ValueError("bad id")])
def test_hub_failure_is_one_line(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own errors fill a screen."""
    import huggingface_hub

    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(RecipeError, match="neither a folder here nor to be had from the hub") as caught:
        resolve_model("someone/model")
    assert "\n" not in str(caught.value)


def test_hub_folder_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of other formats must not be downloaded beside the ones that are read."""
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("someone/model") == tmp_path
    assert asked["name"] == "someone/model"
    assert "*.bin" not in asked["patterns"]
