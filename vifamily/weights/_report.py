"""What a conversion did to the layers of a network."""

from __future__ import annotations

import dataclasses

__all__ = ["ConversionReport", "ConvertedLayer"]


@dataclasses.dataclass(frozen=True)
class ConvertedLayer:
    """One layer with parameters of its own.

    Attributes:
        name: Full name in the network.
        kind: Class of the layer.
        parameters: Number of its own parameters.
        latent: Number of latent coordinates that stand for them; 0 where it was skipped.
        skipped: Why it was skipped, or empty.
    """

    name: str
    kind: str
    parameters: int
    latent: int
    skipped: str = ""


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of each layer; prints as a table.

    Attributes:
        rows: One for each layer with parameters.
        parameters: Parameters of the given network.
        latent: Latent coordinates in all.
        point: Parameters that are estimated as points.
    """

    rows: tuple[ConvertedLayer, ...]
    parameters: int
    latent: int
    point: int

    @property
    def converted(self) -> dict[str, int]:
        """Converted layers, with their numbers of latent coordinates."""
        return {row.name: row.latent for row in self.rows if not row.skipped}

    @property
    def skipped(self) -> dict[str, str]:
        """Skipped layers, with the reasons."""
        return {row.name: row.skipped for row in self.rows if row.skipped}

    def __str__(self) -> str:
        """Return the table."""
        lines = [("layer", "kind", "parameters", "latent", "")]
        lines += [(r.name, r.kind, str(r.parameters), str(r.latent), r.skipped) for r in self.rows]
        lines.append(("all", "", str(self.parameters), str(self.latent), f"{self.point} point parameters"))
        wide = [max(len(line[i]) for line in lines) for i in range(4)]
        left = (str.ljust, str.ljust, str.rjust, str.rjust)
        text = ["  ".join([*(f(v, w) for f, v, w in zip(left, ln, wide, strict=False)), ln[4]]) for ln in lines]
        return "\n".join([line.rstrip() for line in text] + ["Evaluated in eval mode: dropout off, statistics fixed."])
