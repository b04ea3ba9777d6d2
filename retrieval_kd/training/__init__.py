"""The training loop, its batches, schedule and checkpoints."""
