"""What each process of a ``torchrun`` does: one step of every case, a whole run, and the run of a stage."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_jobs import Job, cases, one_step

from retrieval_kd.training.machine import Machine


def main(folder: Path) -> None:
    machine = Machine()
    assert machine.processes == 2
    found: dict[str, torch.Tensor] = {}
    for label, losses, mode, sizes, cached in cases():
        loss, gradients = one_step(losses, mode, sizes=sizes, gradient_cache=cached)
        found[f"{label}|loss"] = torch.tensor(loss, dtype=torch.float64)
        found.update({f"{label}|{name}": gradient for name, gradient in gradients.items()})
    job = Job("symmetric")
    job.student.double()
    job.run(folder / "run")
    found.update({f"run|{name}": tensor for name, tensor in job.student.state_dict().items()})
    # Every process must come to the same weights, not the first alone.
    save_file(found, folder / f"process-{machine.index}.safetensors")
    machine.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
