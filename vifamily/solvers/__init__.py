"""Solvers: one registered entry per file."""
