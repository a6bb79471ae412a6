"""C expressions for elementwise operations of a traced graph."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["C_TYPES", "ELEMENTWISE", "PREAMBLE", "UnsupportedError", "literal"]

C_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.uint8: "uint8_t",
    torch.bool: "uint8_t",
}


class UnsupportedError(Exception):
    """The graph holds something that is not translated; the message says what."""


def literal(value: object) -> str:
    """Write a Python number as C."""
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int):
        return f"INT64_C({value})"
    if isinstance(value, float):
        if math.isnan(value):
            return "NAN"
        if math.isinf(value):
            return "INFINITY" if value > 0 else "(-INFINITY)"
        return f"({value!r})"
    raise UnsupportedError(f"the constant {value!r}")


PREAMBLE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__)
/* glibc holds vector versions of these, accurate to four units of the last place */
#define VECTOR(name) extern double name(double) __attribute__((simd("notinbranch"), const));
#define VECTORF(name) extern float name(float) __attribute__((simd("notinbranch"), const));
VECTOR(exp) VECTOR(log) VECTOR(sin) VECTOR(cos) VECTORF(expf) VECTORF(logf)
#if __GLIBC_PREREQ(2, 35)
VECTOR(log1p) VECTOR(expm1) VECTOR(tanh) VECTOR(erf) VECTORF(log1pf) VECTORF(tanhf)
#endif
#endif
static double digamma(double x) {
  double out = 0.0;
  if (x <= 0.0) {
    if (x == floor(x)) return NAN;
    out = -M_PI / tan(M_PI * x);
    x = 1.0 - x;
  }
  while (x < 10.0) { out -= 1.0 / x; x += 1.0; }
  const double r = 1.0 / (x * x);
  return out + log(x) - 0.5 / x
    - r * (1.0 / 12 - r * (1.0 / 120 - r * (1.0 / 252 - r * (1.0 / 240 - r * (1.0 / 132 - r * (691.0 / 32760))))));
}
"""


def _function(name: str) -> Callable[..., str]:
    def make(kind: str, *a: str) -> str:
        return f"{name}{'f' if kind == 'float' else ''}({', '.join(f'({kind})({v})' for v in a)})"

    return make


def _binary(sign: str) -> Callable[..., str]:
    return lambda kind, a, b: f"(({kind})({a}) {sign} ({kind})({b}))"


def _scaled(sign: str) -> Callable[..., str]:
    def make(kind: str, a: str, b: str, alpha: str | None = None) -> str:
        other = f"({kind})({b})" if alpha is None else f"({kind})({alpha}) * ({kind})({b})"
        return f"(({kind})({a}) {sign} {other})"

    return make


def _compare(sign: str) -> Callable[..., str]:
    return lambda kind, a, b: f"(({a}) {sign} ({b}))"


def _power(kind: str, a: str, b: str) -> str:
    plain = b.strip("()")
    if plain in ("INT64_C2", "2.0", "INT64_C(2"):
        return f"(({kind})({a}) * ({kind})({a}))"
    if plain == "0.5":
        return _function("sqrt")(kind, a)
    if plain in ("1.0", "INT64_C(1"):
        return f"({kind})({a})"
    if plain in ("-1.0", "INT64_C(-1"):
        return f"(1 / ({kind})({a}))"
    return _function("pow")(kind, a, b)


def _clamp(kind: str, a: str, low: str | None = None, high: str | None = None) -> str:
    out = f"({kind})({a})"
    # a NaN compares as false and stays
    if low is not None:
        out = f"({out} < ({kind})({low}) ? ({kind})({low}) : {out})"
    if high is not None:
        out = f"({out} > ({kind})({high}) ? ({kind})({high}) : {out})"
    return out


def _extreme(sign: str) -> Callable[..., str]:
    return lambda kind, a, b: f"(({a}) != ({a}) || ({a}) {sign} ({b}) ? ({kind})({a}) : ({kind})({b}))"


def _remainder(kind: str, a: str, b: str) -> str:
    if kind in ("double", "float"):
        return f"(({a}) - ({b}) * floor(({a}) / ({b})))"
    return f"(((({a}) % ({b})) + ({b})) % ({b}))"


ELEMENTWISE: dict[str, Callable[..., str]] = {
    "add": _scaled("+"),
    "sub": _scaled("-"),
    "rsub": lambda kind, a, b, alpha="1": f"(({kind})({b}) - ({kind})({alpha}) * ({kind})({a}))",
    "mul": _binary("*"),
    "div": _binary("/"),
    "neg": lambda kind, a: f"(-({kind})({a}))",
    "reciprocal": lambda kind, a: f"(1 / ({kind})({a}))",
    "rsqrt": lambda kind, a: f"(1 / {_function('sqrt')(kind, a)})",
    "square": lambda kind, a: f"(({a}) * ({a}))",
    "sigmoid": lambda kind, a: f"(1 / (1 + {_function('exp')(kind, f'-({a})')}))",
    "relu": lambda kind, a: _clamp(kind, a, "0"),
    "sign": lambda kind, a: f"({kind})((({a}) > 0) - (({a}) < 0))",
    "sgn": lambda kind, a: f"({kind})((({a}) > 0) - (({a}) < 0))",
    "abs": _function("fabs"),
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": lambda kind, a, low: _clamp(kind, a, low),
    "clamp_max": lambda kind, a, high: _clamp(kind, a, None, high),
    "maximum": _extreme(">"),
    "minimum": _extreme("<"),
    "where": lambda kind, c, a, b: f"(({c}) ? ({kind})({a}) : ({kind})({b}))",
    "eq": _compare("=="),
    "ne": _compare("!="),
    "lt": _compare("<"),
    "le": _compare("<="),
    "gt": _compare(">"),
    "ge": _compare(">="),
    "logical_not": lambda kind, a: f"(!({a}))",
    "bitwise_not": lambda kind, a: f"(!({a}))" if kind == "uint8_t" else f"(~({a}))",
    "logical_and": _compare("&&"),
    "logical_or": _compare("||"),
    "bitwise_and": _compare("&"),
    "bitwise_or": _compare("|"),
    "isnan": lambda kind, a: f"(({a}) != ({a}))",
    "isinf": lambda kind, a: f"(fabs({a}) == INFINITY)",
    "isfinite": lambda kind, a: f"(fabs({a}) < INFINITY)",
    "digamma": lambda kind, a: f"({kind})digamma({a})",
    "_to_copy": lambda kind, a: f"({kind})({a})",
    "clone": lambda kind, a: f"({kind})({a})",
    "fill": lambda kind, a, b: f"({kind})({b})",
    "addcmul": lambda kind, a, b, c, value="1": f"(({a}) + ({value}) * ({b}) * ({c}))",
    "addcdiv": lambda kind, a, b, c, value="1": f"(({a}) + ({value}) * (({b}) / ({c})))",
    "lerp": lambda kind, a, b, w: f"(({a}) + ({w}) * (({b}) - ({a})))",
    "atan2": _function("atan2"),
    "round": _function("nearbyint"),
    "copy": lambda kind, a, b: f"({kind})({b})",
    "remainder": _remainder,
}  # fmt: skip
_LIBRARY = (
    "exp log log1p expm1 sqrt sin cos tan tanh sinh cosh asin acos atan asinh acosh atanh "
    "erf erfc lgamma floor ceil trunc exp2 log2 log10 hypot copysign"
)
ELEMENTWISE.update({name: _function(name) for name in _LIBRARY.split()})
