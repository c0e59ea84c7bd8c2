"""Measurements for whoever wonders what a step costs: ``python -m benchmarks --help``."""
