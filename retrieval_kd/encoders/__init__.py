"""Encoders, their identity card, and the corpus encoded once."""
