"""The peers: which there are, the exact versions compared with, and an environment for each."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from vifamily.errors import BenchmarkError, ConfigError

__all__ = ["AUC_PEERS", "LAYER_PEERS", "NPE_PEERS", "PEERS", "Peer", "default_folder", "install", "interpreter"]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library that is compared with.

    Attributes:
        script: The worker that drives it.
        environment: Folder of its environment, or None where this interpreter has it.
        packages: What is installed there, with exact versions.
        bare: What is installed after that without what it asks for, where it asks for more than it uses.
    """

    script: str
    environment: str | None
    packages: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


_JAX = ("jax==0.10.2", "numpyro==0.22.0", "blackjax==1.7.1", "optax==0.2.8")
PEERS: dict[str, Peer] = {
    "numpyro": Peer("numpyro_svi", "jax", _JAX),
    "blackjax": Peer("blackjax_vi", "jax", _JAX),
    "pathfinder": Peer("blackjax_vi", "jax", _JAX),
    "pymc": Peer("pymc_advi", "pymc", ("pymc==5.28.5", "pytensor==2.38.3")),
    "pyro": Peer("pyro_svi", None),
}
"""Peers by name; Pyro is a dependency of this package, so it runs in this interpreter."""

# they ask for torchvision and tensorboard, and their layers use neither
_LAYERS = Peer(
    "bayesian_layers",
    "bnn",
    ("torch==2.13.0", "numpy==2.4.6"),
    ("bayesian-torch==0.5.0", "torchbnn==1.2", "blitz-bayesian-pytorch==0.2.8"),
)
LAYER_PEERS: dict[str, Peer] = {"bayesian_torch": _LAYERS, "torchbnn": _LAYERS, "blitz": _LAYERS}
"""Libraries of layers with random weights, in one environment."""
_SBI = Peer("sbi_npe", "sbi", ("torch==2.13.0", "sbi==0.27.0"))
NPE_PEERS: dict[str, Peer] = {"sbi": _SBI, "sbi_maf": _SBI}
"""Neural posterior estimation of sbi: with the neural spline flow of published tables, and with its own default."""
AUC_PEERS: dict[str, Peer] = {
    # it asks for torchvision, transformers and more; its losses and optimisers use what is named first
    "libauc": Peer(
        "libauc_aucm",
        "libauc",
        ("torch==2.13.0", "numpy==2.4.6", "scipy==1.17.1", "scikit-learn==1.9.1", "tqdm==4.70.1"),
        ("libauc==2.0.1",),
    )
}
"""Losses and optimisers for the area under the curve."""
_ALL = {**PEERS, **LAYER_PEERS, **NPE_PEERS, **AUC_PEERS}


def default_folder() -> Path:
    """Return the folder of the environments in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vifamily" / "peers"


def _python(folder: Path, environment: str) -> Path:
    return folder / environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _complete(folder: Path, peer: Peer) -> bool:
    """Whether the environment holds the exact versions, read from what pip left there, without an import."""
    home = folder / str(peer.environment)
    sites = [*home.glob("lib/python*/site-packages"), home / "Lib" / "site-packages"]
    stems = [package.replace("-", "_").replace("==", "-") for package in (*peer.packages, *peer.bare)]
    return any(all(_present(site, stem) for stem in stems) for site in sites)


def _present(site: Path, stem: str) -> bool:
    """Whether pip noted a package; a build for one kind of device says so behind the version."""
    return (site / f"{stem}.dist-info").is_dir() or any(site.glob(f"{stem}+*.dist-info"))


def interpreter(name: str, folder: Path) -> Path | None:
    """Return the interpreter that runs a peer, or None where it is not installed in the versions compared with.

    Raises:
        ConfigError: If there is no such peer.
    """
    if name not in _ALL:
        raise ConfigError(f"there is no peer {name!r}: choose among {', '.join(_ALL)}, or none.")
    peer = _ALL[name]
    if peer.environment is None:
        return Path(sys.executable)
    python = _python(folder, peer.environment)
    return python if python.exists() and _complete(folder, peer) else None


def install(names: tuple[str, ...], folder: Path) -> None:
    """Create the environments of peers that are not complete; asks the package index that pip is set up for.

    Raises:
        ConfigError: If there is no such peer.
        BenchmarkError: If an environment cannot be made or a package not installed.
    """
    for name in names:
        if interpreter(name, folder) is not None:
            continue
        peer = _ALL[name]
        python = _python(folder, str(peer.environment))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pip = [str(python), "-m", "pip", "install", "--quiet"]
            for command in (
                [sys.executable, "-m", "venv", str(folder / str(peer.environment))],
                [*pip, *peer.packages],
                [*pip, "--no-deps", *peer.bare] if peer.bare else [],
            ):
                if not command:
                    continue
                subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
            raise BenchmarkError(f"the peer {name} could not be installed into {folder}: {' '.join(said)}") from error
