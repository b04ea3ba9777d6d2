"""What each process of a ``torchrun`` does: one step of every case, a whole run, and the run of a stage."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import tiny_collection_folder, tiny_encoder_folder, tiny_overrides
from training_jobs import Job, cases
from typer.testing import CliRunner

from retrieval_kd.cli.main import app
from retrieval_kd.training.machine import Machine


def main(folder: Path) -> None:
    machine = Machine()
    assert machine.processes == 2
    told = {"é": [0.1 + 0.2, -1.0, None, True], "steps": 24}
    assert machine.agree(told if machine.main else {}) == told
    assert machine.agree(machine.main) is True
    found: dict[str, torch.Tensor] = {}
    for case in cases():
        loss, gradients = case.step()
        found[f"{case.label}|loss"] = torch.tensor(loss, dtype=torch.float64)
        found.update({f"{case.label}|{name}": gradient for name, gradient in gradients.items()})
    job = Job("symmetric")
    job.student.double()
    job.run(folder / "run")
    found.update({f"run|{name}": tensor for name, tensor in job.student.state_dict().items()})
    if machine.main:
        tiny_collection_folder(folder / "tiny-collection")
        tiny_encoder_folder(folder / "tiny-encoder")
    machine.wait()
    overrides = [part for one in tiny_overrides(folder, "symmetric") for part in ("--set", one)]
    arguments = ["train", "margin_mse", *overrides, "--artifacts", str(folder / "artifacts"), "--json"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    (folder / f"stdout-{machine.index}.json").write_text(done.stdout)
    # The other process may still be reading what this one takes away.
    machine.wait()
    if machine.main:
        # A manifest alone does not make a student whole.
        (stage,) = folder.glob("artifacts/train-*")
        (stage / "card.json").unlink()
    machine.wait()
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    (folder / f"stdout-again-{machine.index}.json").write_text(again.stdout)
    # Every process must come to the same weights, not the first alone.
    save_file(found, folder / f"process-{machine.index}.safetensors")
    machine.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
