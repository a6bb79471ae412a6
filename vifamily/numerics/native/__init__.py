"""Loops of small steps as compiled C, from functions written in torch; see :func:`compile_loop`."""

from vifamily.numerics.native._kernels import Kernels, kernels
from vifamily.numerics.native._loop import CompiledLoop, compile_loop
from vifamily.numerics.native._operations import UnsupportedError

__all__ = ["CompiledLoop", "Kernels", "UnsupportedError", "compile_loop", "kernels"]
