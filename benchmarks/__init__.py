"""Measurements. Each script is a command of its own: ``python -m benchmarks.step --help``."""
