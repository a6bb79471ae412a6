"""Named problems with known answers: one registered entry per file."""
