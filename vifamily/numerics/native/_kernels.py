"""What happens between compiled steps, in C as well: balanced noise and the judgement of a stage.

Each function gives the numbers of its counterpart in Python and is only quicker. Nothing is compiled for their sake
alone: they are used where the steps of a fit are compiled.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vifamily.numerics.native._library import NoCompilerError, load

__all__ = ["Kernels", "kernels"]

# The Mersenne twister (Matsumoto and Nishimura 1998) as torch seeds it, with 32 bits. Its words are read at increasing
# positions and only those that are read are tempered: of the 930 bits that a coordinate is scrambled with, the first
# 2^m points depend on 30 + 30 m at most.
_SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef struct { uint32_t state[624]; int64_t base; } Twister;
static void begin(Twister* t, uint32_t seed) {
  t->state[0] = seed;
  for (uint32_t i = 1; i < 624; i++)
    t->state[i] = 1812433253u * (t->state[i - 1] ^ (t->state[i - 1] >> 30)) + i;
  t->base = -624;
}
static inline uint32_t mixed(uint32_t u, uint32_t v, uint32_t m) {
  return m ^ (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ ((v & 1u) ? 0x9908b0dfu : 0u);
}
static void twist(Twister* t) {
  uint32_t* const s = t->state;
  for (int i = 0; i < 227; i++) s[i] = mixed(s[i], s[i + 1], s[i + 397]);
  for (int i = 227; i < 454; i++) s[i] = mixed(s[i], s[i + 1], s[i - 227]);
  for (int i = 454; i < 623; i++) s[i] = mixed(s[i], s[i + 1], s[i - 227]);
  s[623] = mixed(s[623], s[0], s[396]);
  t->base += 624;
}
static inline uint32_t bit_at(Twister* t, int64_t position) {
  while (position >= t->base + 624) twist(t);
  uint32_t y = t->state[position - t->base];
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  y ^= y >> 18;
  return y & 1u;
}
/* out (sequence, point, coordinate); directions (coordinate, direction), only their leading bits count;
   work (bits + 1, size) */
void sobol(const int64_t* seeds, int64_t sequences, int64_t size, int64_t count, int64_t bits,
           const int64_t* directions, uint32_t* work, double* out) {
  Twister twister;
  uint32_t* const now = work + bits * size;
  for (int64_t n = 0; n < sequences; n++) {
    begin(&twister, (uint32_t)seeds[n]);
    for (int64_t c = 0; c < size; c++) {
      now[c] = 0;
      for (int64_t j = 0; j < 30; j++) now[c] |= bit_at(&twister, 30 * c + j) << j;
    }
    for (int64_t c = 0; c < size; c++) {
      uint32_t column[30];
      for (int64_t j = 0; j < bits; j++) column[j] = 1u << (29 - j);
      for (int64_t i = 1; i < 30; i++)
        for (int64_t j = 0; j < bits && j < i; j++)
          column[j] |= bit_at(&twister, 30 * size + 900 * c + 30 * i + j) << (29 - i);
      for (int64_t d = 0; d < bits; d++) {
        uint32_t scrambled = 0;
        for (int64_t j = 0; j < bits; j++)
          if ((directions[c * bits + d] >> (29 - j)) & 1) scrambled ^= column[j];
        work[d * size + c] = scrambled;
      }
    }
    for (int64_t p = 0; p < count; p++) {
      double* const row = out + (n * count + p) * size;
      if (p) {
        const uint32_t* const change = work + __builtin_ctzll((uint64_t)p) * size;
        for (int64_t c = 0; c < size; c++) { now[c] ^= change[c]; row[c] = (int32_t)now[c] * 0x1p-30; }
      } else
        for (int64_t c = 0; c < size; c++) row[c] = (float)((int32_t)now[c] * 0x1p-30);
    }
  }
}
/* split R-hat of the last 2 half[k] rows, the largest over columns; ends: all half[k] and 2 half[k], increasing; which:
   twice the number of the window that each belongs to, plus one for a whole window; work (4 + windows, columns) */
void rhat(const double* chain, int64_t rows, int64_t columns, const int64_t* half, int64_t windows, const int64_t* ends,
          const int64_t* which, const double* still, double* work, double* out) {
  double *const total = work, *const square = total + columns, *const high = square + columns,
         *const low = high + columns, *const late = low + columns;
  const double* const last = chain + (rows - 1) * columns;
  for (int64_t c = 0; c < 4 * columns; c++) work[c] = 0;
  int64_t m = 0;
  for (int64_t e = 0; e < 2 * windows; e++) {
    for (; m < ends[e]; m++) {
      const double* const row = last - m * columns;
      for (int64_t c = 0; c < columns; c++) {
        const double x = row[c] - last[c];
        total[c] += x;
        square[c] += x * x;
        high[c] = x > high[c] ? x : high[c];
        low[c] = x < low[c] ? x : low[c];
      }
    }
    const int64_t k = which[e] / 2;
    double* const mine = late + k * columns;
    if (which[e] % 2 == 0) { memcpy(mine, total, sizeof(double) * columns); continue; }
    const double h = (double)half[k];
    double worst = 1;
    int any = 0;
    for (int64_t c = 0; c < columns; c++) {
      const double early = total[c] - mine[c];
      double spread = square[c] - (mine[c] * mine[c] + early * early) / h;
      spread = spread > 0 ? spread : (spread == spread ? 0 : spread);
      const double apart = (mine[c] - early) / h;
      const double ratio = sqrt((h - 1) / h + 0.5 * apart * apart / (spread * (0.5 / (h - 1))));
      const double found = high[c] - low[c] >= still[c] && ratio == ratio ? ratio : 1;
      worst = any && worst > found ? worst : found;
      any = 1;
    }
    out[k] = worst;
  }
}
/* Monte-Carlo errors of the means of columns; the halves of a column lie centred in work (2 half), and their
   autocovariances are summed as far as Geyer's sequence goes, which is rarely far */
void errors(const double* chain, int64_t rows, int64_t columns, double* work, double* out) {
  const int64_t half = rows / 2;
  const double n = (double)half;
  double *const a = work, *const b = work + half;
  for (int64_t c = 0; c < columns; c++) {
    double mean = 0, first = 0, second = 0, level = 0, square = 0;
    for (int64_t i = 0; i < rows; i++) {
      const double x = chain[i * columns + c];
      mean += x;
      level = fabs(x) > level ? fabs(x) : level;
    }
    mean /= (double)rows;
    for (int64_t i = 0; i < rows; i++) { const double x = chain[i * columns + c] - mean; square += x * x; }
    for (int64_t i = 0; i < half; i++) {
      a[i] = chain[(rows - 2 * half + i) * columns + c] - mean;
      b[i] = chain[(rows - half + i) * columns + c] - mean;
      first += a[i];
      second += b[i];
    }
    first /= n;
    second /= n;
    for (int64_t i = 0; i < half; i++) { a[i] -= first; b[i] -= second; }
    double within = 0, total = 0, sum = 0, least = INFINITY, pair = 0;
    for (int64_t lag = 0; lag < half - half % 2; lag++) {
      double product = 0;
#pragma omp simd reduction(+:product)
      for (int64_t i = 0; i < half - lag; i++) product += a[i] * a[i + lag] + b[i] * b[i + lag];
      const double covariance = 0.5 * product / (n - 1);
      if (lag == 0) {
        within = covariance;
        total = (n - 1) / n * within + 0.5 * (first - second) * (first - second);
      }
      const double correlation = lag == 0 ? 1 : 1 - (within - covariance) / total;
      if (lag % 2 == 0) { pair = correlation; continue; }
      pair += correlation;
      if (!(pair > 0)) break;
      least = pair < least ? pair : least;
      sum += least;
    }
    const double shortest = 1 / log10(2 * n), tau = 2 * sum - 1;
    double size = 2 * n / (tau > shortest ? tau : shortest);
    if (total <= 1e-28 * level * level) size = 2 * n;
    out[c] = sqrt(square / (double)(rows - 1) / size);
    if (mean - mean != 0) out[c] = NAN;
  }
}
"""


class Kernels:
    """The functions, loaded; see :func:`kernels`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._sobol, self._rhat, self._errors = library.sobol, library.rhat, library.errors
        self._sobol.argtypes = [pointer, number, number, number, number, pointer, pointer, pointer]
        self._rhat.argtypes = [pointer, number, number, pointer, number, pointer, pointer, pointer, pointer, pointer]
        self._errors.argtypes = [pointer, number, number, pointer, pointer]
        self._sobol.restype = self._rhat.restype = self._errors.restype = None

    def sobol(self, seeds: Sequence[int], directions: Tensor, count: int) -> Tensor:
        """Scrambled Sobol sequences, as :func:`vifamily.rng.scrambled_sobol` makes them.

        Args:
            seeds: Seeds of the scramblings.
            directions: Direction numbers ``(coordinate, direction)``, as many as points of each sequence need.
            count: Points of each sequence.
        """
        size, bits = directions.shape
        start = torch.tensor(seeds, dtype=torch.int64)
        work = torch.empty((bits + 1) * size, dtype=torch.int32)
        out = torch.empty(len(seeds) * count, size, dtype=torch.float64)
        self._sobol(start.data_ptr(), len(seeds), size, count, bits, directions.data_ptr(), work.data_ptr(),
                    out.data_ptr())  # fmt: skip
        return out

    def worst_rhat(self, chain: np.ndarray, widths: Sequence[int], still: np.ndarray) -> np.ndarray:
        """Largest split R-hat of several windows, as the stopping rule has it.

        Args:
            chain: ``(row, quantity)``.
            widths: Numbers of rows.
            still: Range below which a quantity counts as not moving, ``(quantity,)``.
        """
        windows, addresses = len(widths), _ends(tuple(widths))[1]
        rows, columns = chain.shape
        held = np.ascontiguousarray(chain)
        # what is read by column and the result follow what is worked in
        work = np.empty((5 + windows) * columns + windows)
        work[-columns - windows : -windows] = still
        base = work.ctypes.data
        half, ends, which = addresses
        place = base + 8 * (4 + windows) * columns
        self._rhat(held.ctypes.data, rows, columns, half, windows, ends, which, place, base, place + 8 * columns)
        return work[-windows:]

    def mcse(self, chain: np.ndarray) -> np.ndarray:
        """Monte-Carlo error of the mean of each column, as :func:`vifamily.numerics.mcse.mcse` has it.

        Args:
            chain: ``(row, quantity)``, eight rows or more.
        """
        rows, columns = chain.shape
        held = np.ascontiguousarray(chain)
        work, out = np.empty(rows), np.empty(columns)
        self._errors(held.ctypes.data, rows, columns, work.ctypes.data, out.ctypes.data)
        return out


@functools.lru_cache(maxsize=256)
def _ends(widths: tuple[int, ...]) -> tuple[list[np.ndarray], list[int]]:
    """Half widths; where half and whole windows end, counted from the last row; which one ends there; addresses."""
    half = np.array(widths, dtype=np.int64) // 2
    ends = np.stack([half, 2 * half], axis=1).reshape(-1)
    order = np.argsort(ends, kind="stable")
    arrays = [half, np.ascontiguousarray(ends[order]), order.astype(np.int64)]
    return arrays, [array.ctypes.data for array in arrays]


@functools.lru_cache(maxsize=1)
def kernels() -> Kernels | None:
    """Compile and load the functions, once for a process; None where that fails or torch's engine has changed."""
    try:
        found = Kernels(load(_SOURCE))
    except NoCompilerError:
        return None
    # the noise of a fit must not depend on whether there is a compiler, and the engine's numbers are torch's to change
    engine = torch.quasirandom.SobolEngine(3, scramble=True, seed=5)
    expected = engine.draw(100, dtype=torch.float64)
    directions = torch.quasirandom.SobolEngine(3).sobolstate[:, :7].contiguous()
    return found if torch.equal(found.sobol([5], directions, 100), expected) else None
