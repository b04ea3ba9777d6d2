"""Distillation losses: pure functions over tensors, composed by the recipe."""
