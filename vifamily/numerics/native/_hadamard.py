"""C source of the Walsh-Hadamard transform of the rows of a matrix, for the processor's own vectors."""

from __future__ import annotations

__all__ = ["SMALLEST", "hadamard_source"]

SMALLEST = 16
"""Sizes below one vector of the widest processor are not handled."""
_LARGEST_RADIX = 4
"""Sixteen vectors at a time: what the registers of the widest processors hold."""

_HEAD = """
#include <stddef.h>
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define INLINE static inline __attribute__((always_inline))
"""

# clang has no __builtin_shuffle, and makes a shuffle of the loop by itself
_TYPE = """
#define LANES_T (BYTES / (int)sizeof(T))
typedef T V_T __attribute__((vector_size(BYTES)));
typedef T U_T __attribute__((vector_size(BYTES), aligned(sizeof(T)), may_alias));
typedef I M_T __attribute__((vector_size(BYTES)));
INLINE V_T lanes_T(V_T v, const int step) {
    M_T to; V_T sign;
    for (int i = 0; i < LANES_T; i++) { to[i] = i ^ step; sign[i] = (i & step) ? -1 : 1; }
#if defined(__clang__)
    V_T other;
    for (int i = 0; i < LANES_T; i++) other[i] = v[i ^ step];
#else
    V_T other = __builtin_shuffle(v, to);
#endif
    return v * sign + other;
}
INLINE V_T inner_T(V_T v) {
    v = lanes_T(v, 1);
    v = lanes_T(v, 2);
    if (LANES_T > 4) v = lanes_T(v, 4 % LANES_T);
    if (LANES_T > 8) v = lanes_T(v, 8 % LANES_T);
    return v;
}
"""

_ENTRY = """
void hadamard_T(const T *from, T *to, ptrdiff_t rows, int power, double scale) {
    int lanes = 0;
    while ((1 << lanes) < LANES_T) lanes++;
    const ptrdiff_t size = (ptrdiff_t)1 << power;
    const int vectors = power - lanes, first = vectors < RADIX ? vectors : RADIX;
    for (ptrdiff_t row = 0; row < rows; row++) {
        const T *x = from + row * size;
        T *y = to + row * size;
        switch (first) { FIRST }
        int done = lanes + first, left = vectors - first;
        while (left) {
            /* passes as equal as they can be */
            const int passes = (left + RADIX - 1) / RADIX, now = (left + passes - 1) / passes;
            const ptrdiff_t stride = (ptrdiff_t)1 << done;
            switch (now) { NEXT }
            done += now;
            left -= now;
        }
    }
}
"""


def _butterflies(power: int) -> str:
    """All sums and differences of ``2^power`` vectors in variables of their own, which stay in registers."""
    count = 2**power
    pairs = [(i, i + step) for bit in range(power) for step in (2**bit,) for i in range(count) if not i & step]
    return " ".join(f"{{ V_T d = a{i} - a{j}; a{i} += a{j}; a{j} = d; }}" for i, j in pairs)


def _passes(power: int) -> str:
    """The first pass, over neighbours and within vectors, and a later one over vectors ``stride`` apart."""
    count = 2**power
    each = range(count)
    load = " ".join(f"V_T a{i} = inner_T(*(const U_T *)(x + n + {i} * LANES_T) * factor);" for i in each)
    store = " ".join(f"*(U_T *)(y + n + {i} * LANES_T) = a{i};" for i in each)
    again = " ".join(f"V_T a{i} = *(const U_T *)(y + m + {i} * stride);" for i in each)
    back = " ".join(f"*(U_T *)(y + m + {i} * stride) = a{i};" for i in each)
    flies = _butterflies(power)
    return f"""
static void first{power}_T(const T *x, T *y, ptrdiff_t size, T factor) {{
    for (ptrdiff_t n = 0; n < size; n += {count} * LANES_T) {{ {load} {flies} {store} }}
}}
static void next{power}_T(T *y, ptrdiff_t size, ptrdiff_t stride) {{
    for (ptrdiff_t n = 0; n < size; n += {count} * stride)
        for (ptrdiff_t m = n; m < n + stride; m += LANES_T) {{ {again} {flies} {back} }}
}}
"""


def hadamard_source() -> str:
    """The source: ``hadamard_float`` and ``hadamard_double``, out of place, row by row so that a row stays in cache.

    Each takes the rows, where to write them, their number, the power of two of their length, and a factor. The first
    pass does the lowest bits inside of vectors and the next four over neighbouring ones; every later pass does up to
    four bits more.

    Example:
        >>> "void hadamard_float(" in hadamard_source()
        True
    """
    powers = range(_LARGEST_RADIX + 1)
    first = " ".join(f"case {p}: first{p}_T(x, y, size, (T)scale); break;" for p in powers)
    following = " ".join(f"case {p}: next{p}_T(y, size, stride); break;" for p in powers[1:])
    entry = _ENTRY.replace("FIRST", first).replace("NEXT", following).replace("RADIX", str(_LARGEST_RADIX))
    text = _TYPE + "".join(_passes(p) for p in powers) + entry
    parts = [_named(text, "float", "int"), _named(text, "double", "long long")]
    return _HEAD + "\n".join(parts)


def _named(text: str, kind: str, index: str) -> str:
    """One copy of the text for a type of number, with the type in its names."""
    defines = f"#define T {kind}\n#define I {index}\n"
    return defines + text.replace("_T", f"_{kind}") + "#undef T\n#undef I\n"
