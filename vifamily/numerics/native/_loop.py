"""A pure step function traced once and run many times inside one C loop.

The one place that uses torch's tracer (``make_fx``), which is not a stable interface: whatever goes wrong in tracing,
translating or compiling comes back as a reason in words, and the caller goes on with torch.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vifamily.numerics.native._library import NoCompilerError, load
from vifamily.numerics.native._operations import C_TYPES, PREAMBLE, UnsupportedError
from vifamily.numerics.native._translate import Array, Translator, _strides

__all__ = ["CompiledLoop", "compile_loop"]

_MOST_NODES = 5000

_RUN = """
int64_t run(int64_t count, void** carried, const char** sliced, void** fixed, void** constants, char** outputs,
            char** rows, int64_t phase, int64_t every, void* work) {{
  struct W* const w = (struct W*)work;
  for (int64_t t = 0; t < count; t++) {{
    double bad = 0;
    step(w, t, carried, sliced, fixed, constants, outputs, &bad);
    if (bad != 0) return t;
{commit}
    if (every && (phase + t + 1) % every == 0)
      watch(w, carried, constants, rows, (phase + t + 1) / every - phase / every - 1);
  }}
  return count;
}}
"""


def trace(function: Callable[..., Any], examples: Sequence[Tensor]) -> fx.GraphModule:
    """Trace a pure function to a graph of small operations.

    Raises:
        UnsupportedError: If it cannot be traced: values decide what is run, or the tracer is not there.
    """
    try:
        from torch._decomp import core_aten_decompositions, get_decompositions
        from torch.fx.experimental.proxy_tensor import make_fx

        aten = torch.ops.aten
        further = [aten._softmax, aten._log_softmax, aten.elu, aten.gelu, aten.leaky_relu]
        table = {**core_aten_decompositions(), **get_decompositions(further)}
        module: fx.GraphModule = make_fx(function, decomposition_table=table)(*examples)
        if any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in module.graph.nodes):
            pure = torch.func.functionalize(module, remove="mutations")
            module = make_fx(pure, decomposition_table=table)(*examples)
    except UnsupportedError:
        raise
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        if "tracing" in said[0] and "value" in said[0]:
            raise UnsupportedError("Python control flow that depends on values") from error
        raise UnsupportedError(f"it cannot be traced ({type(error).__name__}: {said[0][:160]})") from error
    if len(module.graph.nodes) > _MOST_NODES:
        raise UnsupportedError(f"a step of {len(module.graph.nodes)} operations (at most {_MOST_NODES} are compiled)")
    module.graph.eliminate_dead_code()
    return module


@dataclasses.dataclass
class CompiledLoop:
    """Steps compiled into one loop; made by :func:`compile_loop`.

    Attributes:
        nodes: Operations in the traced step.
    """

    nodes: int
    _run: Any
    _fixed: list[Tensor]
    _constants: list[Tensor]
    _outputs: list[tuple[tuple[int, ...], torch.dtype]]
    _rows: list[tuple[tuple[int, ...], torch.dtype]]
    _work: Tensor

    def __post_init__(self) -> None:
        self._pointers = _pointers(self._constants)
        self._fixed_pointers = _pointers(self._fixed)
        self._work_pointer = self._work.data_ptr()

    def __call__(
        self, carried: Sequence[Tensor], sliced: Sequence[Tensor], *, count: int, phase: int = 0, every: int = 0
    ) -> tuple[int, list[Tensor], list[Tensor]]:
        """Take steps; the carried tensors are changed in place.

        Args:
            carried: State, contiguous, of the shapes that the loop was compiled for.
            sliced: Per-step inputs, ``(count, ...)``, contiguous.
            count: Number of steps.
            phase: Steps taken since the last multiple of ``every`` that counts.
            every: Steps between two evaluations of the watched function, or 0 for none.

        Returns:
            The number of steps taken, fewer than ``count`` where the next one gave a number that is not finite (the
            carried state is then the one before it); the outputs of each step ``(count, ...)``; the watched values
            ``(evaluations, ...)``.
        """
        outputs = [torch.empty((count, *shape), dtype=kind) for shape, kind in self._outputs]
        times = (phase + count) // every - phase // every if every else 0
        rows = [torch.empty((times, *shape), dtype=kind) for shape, kind in self._rows]
        taken = self._run(
            count, _pointers(carried), _pointers(sliced), self._fixed_pointers, self._pointers,
            _pointers(outputs), _pointers(rows), phase, every, self._work_pointer,
        )  # fmt: skip
        return int(taken), outputs, rows


def _pointers(tensors: Sequence[Tensor]) -> Any:
    return _pointer_type(len(tensors))(*[t.data_ptr() for t in tensors])


@functools.lru_cache(maxsize=64)
def _pointer_type(count: int) -> Any:
    return ctypes.c_void_p * max(1, count)


def _inputs(base: str, tensors: Sequence[Tensor], *, step: bool = False) -> list[Array]:
    out = []
    for number, tensor in enumerate(tensors):
        if tensor.dtype not in C_TYPES:
            raise UnsupportedError(f"numbers of type {tensor.dtype}")
        kind = C_TYPES[tensor.dtype]
        place = (
            f"{base}[{number}] + t * INT64_C({tensor.numel() * tensor.element_size()})" if step else f"{base}[{number}]"
        )
        out.append(Array(f"((const {kind}*)({place}))", kind, tuple(tensor.shape), _strides(tensor.shape)))
    return out


def compile_loop(
    step: Callable[..., tuple[Sequence[Tensor], Sequence[Tensor]]],
    *,
    carried: Sequence[Tensor],
    sliced: Sequence[Tensor],
    fixed: Sequence[Tensor] = (),
    watch: Callable[..., Sequence[Tensor]] | None = None,
) -> CompiledLoop | str:
    """Trace a step once and compile a loop of it.

    ``step(*carried, *sliced, *fixed)`` returns the new carried tensors and per-step outputs; ``watch(*carried)``
    returns what is recorded every few steps. Both must be pure functions of small operations on the CPU.

    Args:
        step: The step.
        carried: An example of the state.
        sliced: An example of one step's inputs.
        fixed: Tensors that stay where they are; they may be overwritten between calls.
        watch: What is recorded every few steps, or None.

    Returns:
        The loop, or why there is none, in words.

    Example:
        >>> start = torch.zeros(2, dtype=torch.float64)
        >>> loop = compile_loop(lambda x, e: ((x + e,), (x.sum(),)), carried=[start], sliced=[start])
        >>> isinstance(loop, str) or loop([start], [torch.ones(3, 2, dtype=torch.float64)], count=3)[1][0].tolist()
        [0.0, 2.0, 4.0]
    """
    try:
        return _compiled(step, list(carried), list(sliced), list(fixed), watch)
    except (UnsupportedError, NoCompilerError) as error:
        return str(error)
    except Exception as error:  # the tracer's graphs change from release to release: never an error of the fit
        return f"{type(error).__name__} while compiling: {(str(error).splitlines() or [''])[0][:160]}"


def _compiled(
    step: Callable[..., Any], carried: list[Tensor], sliced: list[Tensor], fixed: list[Tensor],
    watch: Callable[..., Any] | None,
) -> CompiledLoop:  # fmt: skip
    everything = [*carried, *sliced, *fixed]
    if any(t.device.type != "cpu" for t in everything):
        raise UnsupportedError("steps are compiled for the CPU only")
    counts: list[int] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        new, out = step(*inputs)
        counts[:] = [len(new), len(out)]
        return [*new, *out]

    module = trace(flat, [t.detach().clone() for t in everything])
    constants: list[Tensor] = []
    writer = Translator("b", constants)
    inputs = [*_inputs("carried", carried), *_inputs("sliced", sliced, step=True), *_inputs("fixed", fixed)]
    results = writer.run(module, inputs)
    commit = []
    for number, (value, like) in enumerate(zip(results[: len(carried)], carried, strict=False)):
        if tuple(value.shape) != tuple(like.shape) or value.kind != C_TYPES[like.dtype]:
            raise UnsupportedError("a step that changes the shape or type of its state")
        new = writer.store(value, writer.buffer(value.kind, value.shape))
        _check(writer, new)
        commit.append(f"memcpy(carried[{number}], {new.base}, {like.numel() * like.element_size()});")
    outputs = _write_outputs(writer, results[len(carried) :], "outputs", "t", check=True)
    watcher, rows = _watcher(watch, carried, constants)
    source = "\n".join([
        PREAMBLE, "struct W {", *writer.fields, *watcher.fields, "char end; };",
        "static void step(struct W* const w, const int64_t t, void** carried, const char** sliced, void** fixed,",
        "  void** constants, char** outputs, double* bad) {", *writer.lines, "}",
        "static void watch(struct W* const w, void** carried, void** constants, char** rows, const int64_t t) {",
        *watcher.lines, "}", _RUN.format(commit="\n".join(commit)),
        "int64_t size(void) { return sizeof(struct W); }",
    ])  # fmt: skip
    library = load(source)
    library.run.restype = library.size.restype = ctypes.c_int64
    library.run.argtypes = [ctypes.c_int64, *[ctypes.c_void_p] * 6, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    work = torch.zeros(int(library.size()) + 64, dtype=torch.uint8)
    work = work[-work.data_ptr() % 64 :]
    return CompiledLoop(len(module.graph.nodes), library.run, fixed, constants, outputs, rows, work)


def _watcher(
    watch: Callable[..., Any] | None, carried: list[Tensor], constants: list[Tensor]
) -> tuple[Translator, list[tuple[tuple[int, ...], torch.dtype]]]:
    writer = Translator("r", constants)
    if watch is None:
        return writer, []
    module = trace(lambda *state: list(watch(*state)), [t.detach().clone() for t in carried])
    results = writer.run(module, _inputs("carried", carried))
    return writer, _write_outputs(writer, results, "rows", "t", check=False)


def _check(writer: Translator, value: Array) -> None:
    """Note a number that is not finite: only those are not zero when multiplied by zero."""
    if value.kind not in ("double", "float"):
        return
    name = writer._fresh()
    writer.lines.append(f"double {name} = 0;")
    body = lambda i: writer.lines.append(f"{name} += {value.at(i)} * 0.0;")  # noqa: E731
    writer._nest(value.shape, body, f"omp simd reduction(+:{name})")
    writer.lines.append(f"if ({name} != {name}) *bad = 1;")


def _write_outputs(
    writer: Translator, values: Sequence[Any], base: str, row: str, *, check: bool
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    types = {c: kind for kind, c in C_TYPES.items()}
    out = []
    for number, value in enumerate(values):
        shape, dtype = tuple(value.shape), types[value.kind]
        size = int(torch.Size(shape).numel())
        place = f"(({value.kind}*)({base}[{number}]) + {row} * {size})"
        into = writer.store(value, Array(place, value.kind, shape, _strides(shape)))
        if check:
            _check(writer, into)
        out.append((shape, dtype))
    return out
