"""Measures, systems, latency and reports: where a team decides what to ship."""
