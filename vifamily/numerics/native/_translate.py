"""From a traced graph of torch operations on small arrays to the body of a C function.

Shapes are known, so every operation becomes plain loops over a workspace; views are strides, parts of the graph that
depend on constants alone are evaluated beforehand, and a chain of elementwise operations becomes one loop.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vifamily.numerics.native._operations import C_TYPES, ELEMENTWISE, UnsupportedError, literal

__all__ = ["Array", "Translator"]

_MOST_FOLDED = 10_000_000
_ALIASES = {"alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous"}
_VIEWS = {"view", "_unsafe_view", "reshape", "expand", "permute", "t", "transpose", "unsqueeze", "squeeze", "slice",
          "select", "diagonal"}  # fmt: skip
_REDUCTIONS = {"sum": ("0", "{a} + {x}"), "mean": ("0", "{a} + {x}"), "prod": ("1", "{a} * {x}"),
               "amax": ("-INFINITY", "({x} > {a} || {x} != {x}) ? {x} : {a}"),
               "amin": ("INFINITY", "({x} < {a} || {x} != {x}) ? {x} : {a}"),
               "any": ("0", "({a}) || ({x})"), "all": ("1", "({a}) && ({x})")}  # fmt: skip
_FILLED = {"full_like": 1, "new_full": 2, "zeros_like": None, "ones_like": None, "new_zeros": None, "new_ones": None,
           "empty_like": None, "new_empty": None}  # fmt: skip
"""Operations whose result depends on a shape alone; where the number stands among the arguments, or None for 0 or 1."""


@dataclasses.dataclass
class Array:
    """Numbers in memory: a C pointer, and where each index lies."""

    base: str
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    constant: Tensor | None = None

    def at(self, index: Sequence[str]) -> str:
        """C expression of the number at an index, with broadcasting from the left."""
        own = index[len(index) - len(self.shape) :] if self.shape else ()
        parts = [
            i if s == 1 else f"{s} * ({i})"
            for i, s, n in zip(own, self.strides, self.shape, strict=True)
            if s and n > 1 and i != "0"
        ]
        if self.offset or not parts:
            parts.append(str(self.offset))
        return f"{self.base}[{' + '.join(parts)}]"

    @property
    def size(self) -> int:
        """Number of numbers."""
        return math.prod(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether the numbers lie in order without gaps."""
        wanted = _strides(self.shape)
        return all(n == 1 or s == w for n, s, w in zip(self.shape, self.strides, wanted, strict=True))


@dataclasses.dataclass
class _Lazy:
    """An elementwise result that is computed where it is read."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[..., str]
    operands: list[Any]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    out, step = [], 1
    for n in reversed(shape):
        out.append(step)
        step *= n
    return tuple(reversed(out))


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(target._schema.name).removeprefix("aten::") if hasattr(target, "_schema") else str(target)


class Translator:
    """Writes the body of a C function.

    Args:
        prefix: First letters of the names of the buffers, distinct for each function that shares a workspace.
        constants: Collects the tensors that the graph holds; pointers to them are passed to the function.
    """

    def __init__(self, prefix: str, constants: list[Tensor]) -> None:
        self.prefix, self.constants = prefix, constants
        self.lines: list[str] = []
        self.fields: list[str] = []
        self.values: dict[fx.Node, Any] = {}
        self._count = 0

    # -- building blocks -----------------------------------------------------------------------------------------------
    def _fresh(self) -> str:
        self._count += 1
        return f"{self.prefix}{self._count}"

    def buffer(self, kind: str, shape: Sequence[int]) -> Array:
        """Reserve an array in the workspace."""
        name = self._fresh()
        self.fields.append(f"{kind} {name}[{max(1, math.prod(shape))}] __attribute__((aligned(64)));")
        return Array(f"w->{name}", kind, tuple(shape), _strides(shape))

    def constant(self, tensor: Tensor) -> Array:
        """Refer to a tensor that does not change."""
        kind = _kind(tensor.dtype)
        number = next((k for k, known in enumerate(self.constants) if _same(known, tensor)), len(self.constants))
        if number == len(self.constants):
            self.constants.append(tensor.detach())
        base = f"((const {kind}*)constants[{number}])"
        return Array(base, kind, tuple(tensor.shape), tuple(tensor.stride()), 0, tensor.detach())

    def _nest(self, shape: Sequence[int], body: Callable[[list[str]], None], pragma: str = "omp simd") -> None:
        """Write loops over a shape around a body, the last one vectorised."""
        index, opened = [], 0
        long = [k for k, n in enumerate(shape) if n != 1]
        for k, n in enumerate(shape):
            if n == 1:
                index.append("0")
                continue
            variable = self._fresh()
            if pragma and k == long[-1] and n >= 4:
                self.lines.append(f"#pragma {pragma}")
            self.lines.append(f"for (int64_t {variable} = 0; {variable} < {n}; {variable}++) {{")
            index.append(variable)
            opened += 1
        body(index)
        self.lines.append("}" * opened)

    def _read(self, value: Any, index: list[str], seen: dict[int, str]) -> str:
        """C expression of an operand at an index; what is computed on the way is written before it."""
        if isinstance(value, Array):
            return value.at(index)
        if not isinstance(value, _Lazy):
            return literal(value)
        if id(value) not in seen:
            inner = [None if v is None else self._read(v, index, seen) for v in value.operands]
            name = self._fresh()
            self.lines.append(f"const {value.kind} {name} = {value.make(value.kind, *inner)};")
            seen[id(value)] = name
        return seen[id(value)]

    def store(self, value: Any, into: Array | None = None) -> Array:
        """Compute a value into memory, contiguous unless a place is given."""
        out = self.buffer(value.kind, value.shape) if into is None else into

        def body(index: list[str]) -> None:
            self.lines.append(f"{out.at(index)} = {self._read(value, index, {})};")

        self._nest(value.shape, body)
        return out

    def _array(self, value: Any) -> Array:
        return value if isinstance(value, Array) else self.store(value)

    # -- the graph -----------------------------------------------------------------------------------------------------
    def run(self, module: fx.GraphModule, inputs: Sequence[Array]) -> list[Any]:
        """Translate a graph whose placeholders are the inputs; return its outputs."""
        left = list(inputs)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = left.pop(0)
            elif node.op == "get_attr":
                self.values[node] = self.constant(getattr(module, str(node.target)))
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                out: list[Any] = fx.map_arg(list(node.args[0]), lambda n: self.values[n])
                return out
        raise UnsupportedError("a graph without an output")

    def _call(self, node: fx.Node) -> Any:
        args: tuple[Any, ...] = fx.map_arg(node.args, lambda n: self.values[n])
        kwargs: dict[str, Any] = fx.map_arg(node.kwargs, lambda n: self.values[n])
        if node.target is operator.getitem:
            return args[0][args[1]]
        name = _name(node)
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            raise UnsupportedError(f"random numbers drawn by the model or the family (aten.{name})")
        if name == "_linalg_check_errors":
            return None  # a factor that does not exist is NaN, which stops the loop
        folded = self._folded(node, args, kwargs)
        if folded is not None:
            return folded
        if name in _ALIASES:
            return args[0]
        if name in _VIEWS:
            return self._view(name, node, args, kwargs)
        value = node.meta.get("val")
        kind, shape = (_kind(value.dtype), tuple(value.shape)) if isinstance(value, Tensor) else ("", ())
        if name in _FILLED:
            where = _FILLED[name]
            number = float(name in ("ones_like", "new_ones")) if where is None else args[where]
            return self.constant(torch.full(shape, number, dtype=node.meta["val"].dtype))
        if name in ELEMENTWISE:
            return self._elementwise(name, node, kind, shape, args, kwargs)
        if name in _REDUCTIONS:
            return self._reduce(name, kind, shape, args, kwargs)
        special = getattr(self, f"_op_{name}", None)
        if special is None:
            raise UnsupportedError(f"the operation aten.{name}")
        return special(kind, shape, *args, **kwargs)

    def _folded(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        leaves: list[Any] = []
        fx.map_arg((node.args, node.kwargs), lambda n: leaves.append(self.values[n]))
        if not all(isinstance(v, Array) and v.constant is not None for v in leaves):
            return None
        target: Any = node.target
        with torch.no_grad():
            out = target(*fx.map_arg(node.args, self._tensor_of), **fx.map_arg(node.kwargs, self._tensor_of))
        if isinstance(out, (tuple, list)):
            return [self.constant(part) for part in out]
        if not isinstance(out, Tensor) or out.numel() > _MOST_FOLDED:
            raise UnsupportedError(f"the operation aten.{_name(node)} on constants")
        return self.constant(out)

    def _tensor_of(self, node: fx.Node) -> Tensor:
        held: Tensor = self.values[node].constant
        return held

    def _elementwise(
        self, name: str, node: fx.Node, kind: str, shape: tuple[int, ...], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        extra = [kwargs[key] for key in ("alpha", "value") if key in kwargs]
        if name in ("clamp",):
            args = (args[0], args[1] if len(args) > 1 else kwargs.get("min"),
                    args[2] if len(args) > 2 else kwargs.get("max"))  # fmt: skip
        if name in ("_to_copy", "clone"):
            args = args[:1]
        if name == "div" and kwargs.get("rounding_mode"):
            raise UnsupportedError("division with rounding")
        operands = [*args, *extra]
        for k, v in enumerate(operands):
            if isinstance(v, _Lazy) and v.shape != shape:
                operands[k] = self.store(v)
        if name == "pow" and isinstance(operands[1], Array):
            make: Callable[..., str] = lambda kind, a, b: f"pow{'f' if kind == 'float' else ''}({a}, {b})"  # noqa: E731
        elif name == "_to_copy" and node.meta["val"].dtype is torch.bool:
            make = lambda kind, a: f"(({a}) != 0)"  # noqa: E731
        else:
            make = ELEMENTWISE[name]
        lazy = _Lazy(kind, shape, make, operands)
        return lazy if self._read_once(node, shape) else self.store(lazy)

    def _read_once(self, node: fx.Node, shape: tuple[int, ...]) -> bool:
        if len(node.users) != 1:
            return False
        user = next(iter(node.users))
        if user.op != "call_function" or user.target is operator.getitem:
            return False
        name = _name(user)
        value = user.meta.get("val")
        if name in ELEMENTWISE:
            return isinstance(value, Tensor) and tuple(value.shape) == shape
        return name in _REDUCTIONS

    def _view(self, name: str, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Array:
        value = node.meta["val"]
        source = self._array(args[0])
        shape = tuple(value.shape)
        if name in ("view", "_unsafe_view", "reshape"):
            if not source.contiguous:
                source = self.store(source)
            return dataclasses.replace(source, shape=shape, strides=_strides(shape), constant=None)
        # the same view of a tensor whose numbers are their own positions shows strides and offset
        span = sum((n - 1) * s for n, s in zip(source.shape, source.strides, strict=True)) + 1
        stand_in = torch.empty(0).set_(torch.UntypedStorage(4 * max(span, 1)), 0, source.shape, source.strides)
        target: Any = node.target
        seen = target(stand_in, *fx.map_arg(node.args[1:], lambda n: None), **kwargs)
        offset = source.offset + seen.storage_offset()
        return dataclasses.replace(source, shape=shape, strides=tuple(seen.stride()), offset=offset, constant=None)

    # -- reductions ----------------------------------------------------------------------------------------------------
    def _reduce(self, name: str, kind: str, shape: tuple[int, ...], args: Any, kwargs: dict[str, Any]) -> Array:
        source = args[0]
        rank = len(source.shape)
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if isinstance(dims, int):
            dims = [dims]
        over = {d % rank for d in dims} if dims else set(range(rank))
        out = self.buffer(kind, shape)
        kept = [k for k in range(rank) if k not in over]
        start, formula = _REDUCTIONS[name]
        keep = len(shape) == rank and rank > 0

        def each(index: list[str]) -> None:
            total = self._fresh()
            self.lines.append(f"{kind} {total} = {start};")

            def add(inner: list[str]) -> None:
                where = [""] * rank
                for k, i in zip(kept, index, strict=True):
                    where[k] = i
                for k, i in zip(sorted(over), inner, strict=True):
                    where[k] = i
                item = self._read(source, where, {})
                self.lines.append(f"{total} = {formula.format(a=total, x=f'({item})')};")

            simd = f"omp simd reduction(+:{total})" if name in ("sum", "mean") else ""
            self._nest([source.shape[k] for k in sorted(over)], add, simd)
            place = ["0"] * rank if keep else list(index)
            if keep:
                for k, i in zip(kept, index, strict=True):
                    place[k] = i
            count = math.prod(source.shape[k] for k in over)
            self.lines.append(f"{out.at(place)} = {total}{f' / {count}' if name == 'mean' else ''};")

        self._nest([source.shape[k] for k in kept], each, "")
        return out

    def _op_linalg_vector_norm(
        self, kind: str, shape: tuple[int, ...], source: Any, order: float = 2, dim: Any = None, *_: Any, **__: Any
    ) -> Array:
        if order != 2:
            raise UnsupportedError(f"a norm of order {order}")
        square = _Lazy(kind, tuple(source.shape), ELEMENTWISE["square"], [source])
        total = self._reduce("sum", kind, shape, (square, dim), {})
        return self.store(_Lazy(kind, shape, ELEMENTWISE["sqrt"], [total]))

    # -- products ------------------------------------------------------------------------------------------------------
    def _op_mm(self, kind: str, shape: tuple[int, ...], a: Any, b: Any) -> Array:
        out = self.buffer(kind, shape)
        self._product(out, self._array(a), self._array(b))
        return out

    def _op_bmm(self, kind: str, shape: tuple[int, ...], a: Any, b: Any) -> Array:
        out, a, b = self.buffer(kind, shape), self._array(a), self._array(b)
        for r in range(shape[0]):
            self._product(*(_sub(v, r) for v in (out, a, b)))
        return out

    def _op_addmm(self, kind: str, shape: tuple[int, ...], c: Any, a: Any, b: Any, **scales: Any) -> Array:
        if any(scale != 1 for scale in scales.values()):
            raise UnsupportedError("addmm with factors")
        c, product = self._array(c), self._op_mm(kind, shape, a, b)
        return self.store(_Lazy(kind, shape, ELEMENTWISE["add"], [product, c]))

    def _op_mv(self, kind: str, shape: tuple[int, ...], a: Any, b: Any) -> Array:
        out, a, b = self.buffer(kind, shape), self._array(a), self._array(b)
        column = dataclasses.replace(b, shape=(*b.shape, 1), strides=(*b.strides, 1))
        self._product(dataclasses.replace(out, shape=(*shape, 1), strides=(1, 1)), a, column)
        return out

    def _op_dot(self, kind: str, shape: tuple[int, ...], a: Any, b: Any) -> Array:
        return self._reduce("sum", kind, shape, (_Lazy(kind, a.shape, ELEMENTWISE["mul"], [a, b]),), {})

    def _product(self, out: Array, a: Array, b: Array) -> None:
        """Matrix product: the longer side of the result is the inner, vectorised loop."""
        if out.shape[1] < out.shape[0]:
            out, a, b = _turned(out), _turned(b), _turned(a)
        (rows, inner), columns = a.shape, b.shape[1]
        if b.strides[1] != 1 and columns > 1 and b.size > 64:
            b = self.constant(b.constant.contiguous()) if b.constant is not None else self.store(b)
        i, k, j = (self._fresh() for _ in range(3))
        write = self.lines.append
        write(f"for (int64_t {i} = 0; {i} < {rows}; {i}++) {{")
        write(f"for (int64_t {j} = 0; {j} < {columns}; {j}++) {out.at([i, j])} = 0;")
        blocks, rest = divmod(inner, 4)
        for start, count, step in ((0, blocks, 4), (4 * blocks, rest, 1)):
            if not count:
                continue
            write(f"for (int64_t {k} = {start}; {k} < {start + count * step}; {k} += {step}) {{")
            factors = [self._fresh() for _ in range(step)]
            for q, factor in enumerate(factors):
                write(f"const {out.kind} {factor} = {a.at([i, f'({k} + {q})'])};")
            terms = " + ".join(f"{factor} * {b.at([f'({k} + {q})', j])}" for q, factor in enumerate(factors))
            write("#pragma omp simd")
            write(f"for (int64_t {j} = 0; {j} < {columns}; {j}++) {out.at([i, j])} += {terms};")
            write("}")
        write("}")

    # -- putting together and taking apart -----------------------------------------------------------------------------
    def _op_cat(self, kind: str, shape: tuple[int, ...], parts: Sequence[Any], dim: int = 0) -> Array:
        out, dim, start = self.buffer(kind, shape), dim % len(shape), 0
        for part in parts:
            if math.prod(part.shape) == 0:
                continue
            place = dataclasses.replace(out, shape=part.shape, offset=start * out.strides[dim])
            self.store(part, place)
            start += part.shape[dim]
        return out

    def _op_constant_pad_nd(
        self, kind: str, shape: tuple[int, ...], source: Any, pad: Sequence[int], number: float = 0
    ) -> Array:
        source, pad = self._array(source), list(pad)
        for k in range(len(pad) // 2):  # padding by less than nothing cuts off
            dim = len(shape) - 1 - k
            low, high = -min(0, pad[2 * k]), -min(0, pad[2 * k + 1])
            short = tuple(n - low - high if j == dim else n for j, n in enumerate(source.shape))
            source = dataclasses.replace(
                source, shape=short, offset=source.offset + low * source.strides[dim], constant=None
            )
            pad[2 * k] = max(0, pad[2 * k])
        out = self.buffer(kind, shape)
        self._nest(shape, lambda i: self.lines.append(f"{out.at(i)} = {literal(number)};"))
        before = [0] * len(shape)
        for k in range(len(pad) // 2):
            before[len(shape) - 1 - k] = pad[2 * k]
        offset = sum(p * s for p, s in zip(before, out.strides, strict=True))
        self.store(source, dataclasses.replace(out, shape=tuple(source.shape), offset=offset))
        return out

    def _op_slice_scatter(
        self, kind: str, shape: tuple[int, ...], base: Any, part: Any, dim: int = 0, start: int | None = None,
        end: int | None = None, step: int = 1,
    ) -> Array:  # fmt: skip
        out = self.store(base)
        dim = dim % len(shape)
        first = range(shape[dim])[slice(start, end, step)]
        strides = tuple(s * step if k == dim else s for k, s in enumerate(out.strides))
        if len(first):
            place = dataclasses.replace(out, shape=part.shape, strides=strides, offset=first[0] * out.strides[dim])
            self.store(part, place)
        return out

    def _op_select_scatter(
        self, kind: str, shape: tuple[int, ...], base: Any, part: Any, dim: int, index: int
    ) -> Array:
        out, dim = self.store(base), dim % len(shape)
        strides = tuple(s for k, s in enumerate(out.strides) if k != dim)
        offset = (index % shape[dim]) * out.strides[dim]
        self.store(part, dataclasses.replace(out, shape=part.shape, strides=strides, offset=offset))
        return out

    def _op_diagonal_scatter(
        self, kind: str, shape: tuple[int, ...], base: Any, part: Any, offset: int = 0, dim1: int = 0, dim2: int = 1
    ) -> Array:
        out, (one, two) = self.store(base), (dim1 % len(shape), dim2 % len(shape))
        strides = [s for k, s in enumerate(out.strides) if k not in (one, two)]
        start = offset * out.strides[two] if offset >= 0 else -offset * out.strides[one]
        strides.append(out.strides[one] + out.strides[two])
        self.store(part, dataclasses.replace(out, shape=tuple(part.shape), strides=tuple(strides), offset=start))
        return out

    def _op_split_with_sizes(
        self, kind: str, shape: tuple[int, ...], source: Any, sizes: Sequence[int], dim: int = 0
    ) -> list[Array]:
        held, out, start = self._array(source), [], 0
        dim = dim % len(held.shape)
        for size in sizes:
            small = (*held.shape[:dim], size, *held.shape[dim + 1 :])
            offset = held.offset + start * held.strides[dim]
            out.append(dataclasses.replace(held, shape=small, offset=offset, constant=None))
            start += size
        return out

    def _op_split(self, kind: str, shape: tuple[int, ...], source: Any, size: int, dim: int = 0) -> list[Array]:
        whole = source.shape[dim]
        sizes = [min(size, whole - start) for start in range(0, whole, size)]
        return self._op_split_with_sizes(kind, shape, source, sizes, dim)

    def _op_unbind(self, kind: str, shape: tuple[int, ...], source: Any, dim: int = 0) -> list[Array]:
        parts = self._op_split(kind, shape, source, 1, dim)
        dim = dim % len(source.shape)
        return [
            dataclasses.replace(p, shape=(*p.shape[:dim], *p.shape[dim + 1 :]),
                                strides=(*p.strides[:dim], *p.strides[dim + 1 :]))
            for p in parts
        ]  # fmt: skip

    # -- indices -------------------------------------------------------------------------------------------------------
    def _positions(self, source: Array, indices: Sequence[Any]) -> tuple[tuple[int, ...], Callable[..., list[str]]]:
        """Shape of ``source[indices]``, and a map from an index there to one in the source."""
        given = [k for k, v in enumerate(indices) if v is not None]
        tensors = {k: self._array(indices[k]) for k in given}
        if any(t.kind == "uint8_t" for t in tensors.values()):
            raise UnsupportedError("an index by a mask")
        common = tuple(torch.broadcast_shapes(*(t.shape for t in tensors.values())))
        adjacent = given == list(range(given[0], given[-1] + 1))
        front = given[0] if adjacent else 0
        others = [k for k in range(len(source.shape)) if k not in given]
        shape = [source.shape[k] for k in others]
        shape[front:front] = list(common)

        def where(index: list[str]) -> list[str]:
            shared = index[front : front + len(common)]
            rest = [*index[:front], *index[front + len(common) :]]
            out = [""] * len(source.shape)
            for k, i in zip(others, rest, strict=True):
                out[k] = i
            for k in given:
                name, n = self._fresh(), source.shape[k]
                self.lines.append(f"int64_t {name} = {tensors[k].at(shared)}; {name} += {name} < 0 ? {n} : 0;")
                # what lies outside stays inside the array: the first steps are compared with torch's
                self.lines.append(f"{name} = {name} < 0 ? 0 : {name} >= {n} ? {n - 1} : {name};")
                out[k] = name
            return out

        return tuple(shape), where

    def _op_index(self, kind: str, shape: tuple[int, ...], source: Any, indices: Sequence[Any]) -> Array:
        held = self._array(source)
        _, where = self._positions(held, indices)
        out = self.buffer(kind, shape)
        self._nest(shape, lambda i: self.lines.append(f"{out.at(i)} = {held.at(where(i))};"), "")
        return out

    def _op_index_select(self, kind: str, shape: tuple[int, ...], source: Any, dim: int, index: Any) -> Array:
        return self._op_index(kind, shape, source, [None] * (dim % len(source.shape)) + [index])

    def _op_index_put(
        self, kind: str, shape: tuple[int, ...], source: Any, indices: Sequence[Any], values: Any,
        accumulate: bool = False,  # noqa: FBT001, FBT002 - aten's own order
    ) -> Array:  # fmt: skip
        out, new = self.store(source), self._array(values)
        inner, where = self._positions(out, indices)
        sign = "+=" if accumulate else "="
        self._nest(inner, lambda i: self.lines.append(f"{out.at(where(i))} {sign} {new.at(i)};"), "")
        return out

    def _op_flip(self, kind: str, shape: tuple[int, ...], source: Any, dims: Sequence[int]) -> Array:
        held, out, turned = self._array(source), self.buffer(kind, shape), {d % len(shape) for d in dims}

        def body(i: list[str]) -> None:
            where = [f"({shape[k] - 1} - {v})" if k in turned else v for k, v in enumerate(i)]
            self.lines.append(f"{out.at(i)} = {held.at(where)};")

        self._nest(shape, body, "")
        return out

    def _op_gather(self, kind: str, shape: tuple[int, ...], source: Any, dim: int, index: Any, **_: Any) -> Array:
        held, positions, out = self._array(source), self._array(index), self.buffer(kind, shape)
        dim = dim % max(1, len(shape))

        def body(i: list[str]) -> None:
            self.lines.append(f"{out.at(i)} = {held.at(self._along(i, dim, positions.at(i), held.shape[dim]))};")

        self._nest(shape, body, "")
        return out

    def _op_scatter_add(self, kind: str, shape: tuple[int, ...], source: Any, dim: int, index: Any, new: Any) -> Array:
        out, positions, new = self.store(source), self._array(index), self._array(new)
        dim = dim % max(1, len(shape))

        def body(i: list[str]) -> None:
            self.lines.append(f"{out.at(self._along(i, dim, positions.at(i), shape[dim]))} += {new.at(i)};")

        self._nest(positions.shape, body, "")
        return out

    def _along(self, index: list[str], dim: int, position: str, size: int) -> list[str]:
        name = self._fresh()
        self.lines.append(
            f"int64_t {name} = {position}; {name} = {name} < 0 ? 0 : {name} >= {size} ? {size - 1} : {name};"
        )
        return [name if k == dim else v for k, v in enumerate(index)]

    def _op_cumsum(self, kind: str, shape: tuple[int, ...], source: Any, dim: int, **_: Any) -> Array:
        held, out, dim = self._array(source), self.buffer(kind, shape), dim % len(shape)

        def body(index: list[str]) -> None:
            before = list(index)
            before[dim] = f"({index[dim]} - 1)"
            first = f"{index[dim]} == 0 ? 0 : " if index[dim] != "0" else "0 * "
            self.lines.append(f"{out.at(index)} = {held.at(index)} + ({first}{out.at(before)});")

        self._nest(shape, body, "")
        return out

    def _triangle(self, sign: str, kind: str, shape: tuple[int, ...], source: Any, diagonal: int = 0) -> Array:
        held, out = self._array(source), self.buffer(kind, shape)

        def body(i: list[str]) -> None:
            self.lines.append(f"{out.at(i)} = {i[-1]} {sign} {i[-2]} + {diagonal} ? {held.at(i)} : 0;")

        self._nest(shape, body)
        return out

    def _op_tril(self, *args: Any) -> Array:
        return self._triangle("<=", *args)

    def _op_triu(self, *args: Any) -> Array:
        return self._triangle(">=", *args)

    def _op_repeat(self, kind: str, shape: tuple[int, ...], source: Any, times: Sequence[int]) -> Array:
        held, out = self._array(source), self.buffer(kind, shape)
        lead = len(shape) - len(held.shape)

        def body(i: list[str]) -> None:
            where = [f"({v} % {n})" if n > 1 else "0" for v, n in zip(i[lead:], held.shape, strict=True)]
            self.lines.append(f"{out.at(i)} = {held.at(where)};")

        self._nest(shape, body, "")
        return out

    def _op_linalg_solve_triangular(
        self, kind: str, shape: tuple[int, ...], matrix: Any, right: Any, *, upper: bool, left: bool = True,
        unitriangular: bool = False,
    ) -> Array:  # fmt: skip
        a, out = self._array(matrix), self.buffer(kind, shape)
        b = self._array(right)
        self.store(b, out) if tuple(b.shape) == shape else self._nest(
            shape, lambda i: self.lines.append(f"{out.at(i)} = {b.at(i)};")
        )

        def solve(a: Array, x: Array) -> None:
            if len(x.shape) > 2:
                for r in range(x.shape[0]):
                    solve(_sub(a, 0 if a.shape[0] == 1 else r) if len(a.shape) == len(x.shape) else a, _sub(x, r))
            elif left:
                self._solve(a, x, upper=upper, unit=unitriangular)
            else:
                self._solve(_turned(a), _turned(x), upper=not upper, unit=unitriangular)

        solve(a, out)
        return out

    def _solve(self, a: Array, x: Array, *, upper: bool, unit: bool) -> None:
        """Forward or backward substitution in place."""
        n, columns = x.shape
        i, k, j = (self._fresh() for _ in range(3))
        row, inner = (f"({n - 1} - {i})", f"({n - 1} - {k})") if upper else (i, k)
        write = self.lines.append
        write(f"for (int64_t {i} = 0; {i} < {n}; {i}++) {{")
        write(f"for (int64_t {k} = 0; {k} < {i}; {k}++) for (int64_t {j} = 0; {j} < {columns}; {j}++)")
        write(f"{x.at([row, j])} -= {a.at([row, inner])} * {x.at([inner, j])};")
        if not unit:
            write(f"for (int64_t {j} = 0; {j} < {columns}; {j}++) {x.at([row, j])} /= {a.at([row, row])};")
        write("}")

    def _op_linalg_cholesky_ex(self, kind: str, shape: tuple[int, ...], matrix: Any, **options: Any) -> list[Any]:
        held = self._array(matrix)
        if options.get("upper") or len(held.shape) != 2:
            raise UnsupportedError("a Cholesky factor of several matrices at once, or an upper one")
        n, out = held.shape[0], self.buffer(held.kind, held.shape)
        self._nest(held.shape, lambda i: self.lines.append(f"{out.at(i)} = 0;"))
        i, j, k, s = (self._fresh() for _ in range(4))
        write = self.lines.append
        write(f"for (int64_t {j} = 0; {j} < {n}; {j}++) for (int64_t {i} = {j}; {i} < {n}; {i}++) {{")
        write(f"double {s} = {held.at([i, j])};")
        write(f"for (int64_t {k} = 0; {k} < {j}; {k}++) {s} -= {out.at([i, k])} * {out.at([j, k])};")
        # a matrix that is not positive definite gives NaN, which stops the loop
        write(f"{out.at([i, j])} = {i} == {j} ? sqrt({s}) : {s} / {out.at([j, j])};")
        write("}")
        return [out, self.constant(torch.zeros((), dtype=torch.int32))]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _kind(dtype: torch.dtype) -> str:
    if dtype not in C_TYPES:
        raise UnsupportedError(f"numbers of type {dtype}")
    return C_TYPES[dtype]


def _sub(value: Array, number: int) -> Array:
    held = None if value.constant is None else value.constant[number]
    offset = value.offset + number * value.strides[0]
    return dataclasses.replace(value, shape=value.shape[1:], strides=value.strides[1:], offset=offset, constant=held)


def _turned(value: Array) -> Array:
    held = None if value.constant is None else value.constant.T
    return dataclasses.replace(value, shape=value.shape[::-1], strides=value.strides[::-1], constant=held)
