"""Weights: one registered entry per file."""
