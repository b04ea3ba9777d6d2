"""Rankers that are slow and right, and the fine-tuning of one."""
