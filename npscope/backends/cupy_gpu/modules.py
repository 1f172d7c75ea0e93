"""CUDA sources as compiled modules: one for each file and set of macros, compiled when first launched.

CuPy compiles through NVRTC for the card at hand and keeps the result on disk. `variants` lists every
module that this backend can ask for, so that a machine without a GPU can compile them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import cupy
import numpy as np

OPTIONS = ("-std=c++17", "--fmad=false")
"""Contracted multiply-adds would round differently from one compiler to the next."""

THREADS = 256
"""Threads of every thread block."""

MAX_GRID = 1 << 20
"""Thread blocks of a launch at most: kernels stride over what is left."""

DTYPES = (
    "float32", "float64", "float16", "bfloat16", "complex64", "complex128", "int8", "int16", "int32", "int64",
    "uint8", "uint16", "uint32", "uint64", "bool",
)  # fmt: skip
"""The numbers of dtypes in elements.cuh are places in this list; the next one stands for any of them."""

ANY = len(DTYPES)

FAST = ("float32", "float16", "bfloat16")
"""Dtypes with kernels of their own; what serves any dtype looks it up for every element."""

GROUPS = (2, 4, 8, 16)
RUNS = (1, 2, 4, 8, 16, 32, 64, 128)
METRIC_ROWS = (1, 2, 4)
ROW_KEYS = (1, 4, 8, 32)


def element_of(names: set[str]) -> int:
    """The ELEMENT macro of a module that reads arrays of these dtypes."""
    return DTYPES.index(min(names)) if len(names) == 1 and names <= {*FAST, "float64"} else ANY


@cache
def source_of(file: str) -> str:
    """The text of a CUDA source with what it includes, each file once."""
    seen: set[str] = set()

    def text(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        content = (Path(__file__).parent / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return re.sub(r'#include "(\S+)"\n', lambda match: text(match[1]), content)

    return text(file)


Macros = tuple[tuple[str, int], ...]


@cache
def _kernel(file: str, macros: Macros, name: str) -> Any:
    return _module(file, macros).get_function(name)


@cache
def _module(file: str, macros: Macros) -> Any:
    return cupy.RawModule(code=source_of(file), options=(*OPTIONS, *(f"-D{key}={value}" for key, value in macros)))


def launch(file: str, name: str, grid: int | tuple[int, int], args: tuple[Any, ...], **macros: int) -> None:
    """Run a kernel on the current stream: `grid` thread blocks of `THREADS`."""
    blocks = grid if isinstance(grid, tuple) else (min(grid, MAX_GRID),)
    given = tuple(as_bytes(a) if type(a) is np.ndarray else a for a in args)
    kernel(file, name, **macros)(blocks, (THREADS,), given)


def kernel(file: str, name: str, **macros: int) -> Any:
    """A kernel, to be called with the grid, the threads of a thread block and its arguments."""
    return _kernel(file, tuple(sorted(macros.items())), name)


def as_bytes(struct: np.ndarray) -> np.ndarray:
    """A struct as CuPy takes it at once: named fields it asks for a description of them, 20 us each."""
    return struct.view(_bytes(struct.itemsize))


@cache
def _bytes(size: int) -> np.dtype:
    return np.dtype(f"V{size}")


def has_launched() -> bool:
    """Whether this process, or the one that it was forked from, has run a kernel."""
    return _kernel.cache_info().currsize > 0


def blocks_for(threads: int) -> int:
    """Thread blocks that have this many threads."""
    return max(1, -(-threads // THREADS))


def variants() -> Iterator[tuple[str, dict[str, int]]]:
    """Every (file, macros) that operations launch."""
    fast = [DTYPES.index(name) for name in FAST]
    yield "upload.cu", {}
    for element in (*fast, DTYPES.index("float64"), ANY):
        for lanes in (1, 32, 256):
            yield "norms.cu", {"ELEMENT": element, "LANES": lanes}
            yield "shrinkage.cu", {"ELEMENT": element, "LANES": lanes}
        for bits in (32, 64):
            if (element, bits) == (DTYPES.index("float64"), 32):
                continue
            yield "writing.cu", {"ELEMENT": element, "KEY_BITS": bits}
            for dense in (0, 1) if is_dense_pair(element, bits) else (0,):
                yield "selection.cu", {"ELEMENT": element, "KEY_BITS": bits, "DENSE": dense}
                for keys in ROW_KEYS:
                    if not dense or keys % vector_of(element) == 0:
                        yield "rows.cu", {"ELEMENT": element, "KEY_BITS": bits, "DENSE": dense, "KEYS": keys}
    for element in fast:
        for group in GROUPS:
            yield "groups.cu", {"ELEMENT": element, "GROUP": group}
        for run in RUNS:
            yield "tiles.cu", {"ELEMENT": element, "RUN": run}
    for lanes in (1, 32, 256):
        for bits in (32, 64):
            yield "small_scopes.cu", {"KEY_BITS": bits, "LANES": lanes}
        for metric in (0, 1) if lanes > 1 else (0,):
            yield "small_blocks.cu", {"METRIC": metric, "LANES": lanes}
    for run, rows in product(RUNS[2:], METRIC_ROWS):
        yield "metric_tiles.cu", {"ELEMENT": DTYPES.index("float32"), "RUN": run, "ROWS": rows}


def vector_of(element: int) -> int:
    """Elements of 16 bytes."""
    return {"float32": 4, "float64": 2}.get(DTYPES[element], 8)


DENSE_PAIRS = {*((DTYPES.index(name), 32) for name in FAST), (DTYPES.index("float64"), 64)}


def is_dense_pair(element: int, bits: int) -> bool:
    """Whether keys of this width can be read from arrays of this dtype 16 bytes at a time."""
    return (element, bits) in DENSE_PAIRS
