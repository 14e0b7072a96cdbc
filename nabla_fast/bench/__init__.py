"""Benchmarks: each checks its result before it prints a time."""
