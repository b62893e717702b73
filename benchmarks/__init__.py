"""Benchmarks: how fast rounds are, against other ways to train the same clients; see ``bench.py``."""
