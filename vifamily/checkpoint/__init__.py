"""Resume and save: tensors as safetensors, everything else as JSON; pickle is never read and nothing is evaluated."""

from __future__ import annotations

from vifamily.checkpoint._families import (
    describe_family,
    describe_latent,
    rebuild_family,
    rebuild_latent,
    restore_family,
)
from vifamily.checkpoint._files import SCHEMA, field, prepare, read, read_if_any, write

__all__ = [
    "SCHEMA",
    "describe_family",
    "describe_latent",
    "field",
    "prepare",
    "read",
    "read_if_any",
    "rebuild_family",
    "rebuild_latent",
    "restore_family",
    "write",
]
