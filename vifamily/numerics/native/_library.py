"""Compiling C to a shared library, kept on disk so that the next process finds it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["NoCompilerError", "cache_folder", "load"]

FLAGS = ("-march=native", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_SECONDS = 120
_LONG = 3000
"""Lines from which a source is compiled with less effort: the time of a compiler grows faster than the source."""


class NoCompilerError(Exception):
    """There is no C compiler, or it failed; the message says which."""


def cache_folder() -> Path:
    """Folder of compiled libraries: ``VIFAMILY_CACHE_DIR``, or ``vifamily`` in the user's cache folder."""
    own = os.environ.get("VIFAMILY_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vifamily"


def _compiler() -> str:
    for name in (os.environ.get("CC"), "gcc", "cc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoCompilerError("no C compiler was found (gcc, cc, clang, or the environment variable CC)")


def _processor() -> str:
    """What distinguishes processors that share a home folder: code made for one may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def load(source: str) -> ctypes.CDLL:
    """Compile a C source, or take it from the cache, and load it.

    Args:
        source: The text.

    Returns:
        The library.

    Raises:
        NoCompilerError: If it cannot be compiled here.
    """
    if sys.platform == "win32":
        raise NoCompilerError("compiled steps are made on Linux and macOS only")
    compiler = _compiler()
    address = "\0".join(
        [source, compiler, str(os.stat(compiler).st_mtime_ns), *FLAGS, platform.machine(), _processor()]
    )
    key = hashlib.sha256(address.encode()).hexdigest()[:32]
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{key}.so"
        # code is run only where no one else could have put it
        if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
            raise OSError("others can write to the cache folder")
        if not path.exists():
            _build(compiler, source, path)
        return ctypes.CDLL(str(path))
    except OSError:
        # no place to keep it: compile for this process alone
        with tempfile.TemporaryDirectory() as own:
            path = Path(own) / "step.so"
            _build(compiler, source, path)
            return ctypes.CDLL(str(path))


def _build(compiler: str, source: str, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as own:
        text, made = Path(own) / "step.c", Path(own) / "step.so"
        text.write_text(source, "utf-8")
        effort = "-O3" if source.count("\n") < _LONG else "-O1"
        command = [compiler, effort, *FLAGS, "-o", str(made), str(text), "-lm"]
        code, message = _finished(command)
        if code:
            first = (message.strip().splitlines() or ["no message"])[0]
            raise NoCompilerError(f"the C compiler failed: {first[:200]}")
        os.replace(made, path)  # whole or not at all, whoever else compiles the same


def _finished(command: list[str], seconds: float = _SECONDS) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it said of errors.

    Raises:
        NoCompilerError: If it takes too long; it is ended then, with the processes that it started.
    """
    own_group = hasattr(os, "killpg")
    process = subprocess.Popen(  # noqa: S603 - a compiler that the user has installed
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=own_group
    )
    try:
        _, message = process.communicate(timeout=seconds)
    except BaseException as error:
        # a driver such as gcc leaves the compiler proper running when it is killed alone
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if own_group else process.kill()
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise NoCompilerError(f"the C compiler took more than {seconds:g} seconds") from error
        raise
    return process.returncode, message
