"""Passes over memory that do nothing else, as fast as it goes: what the work of kernels is measured by."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from npscope.backends.numba_cpu.jit import kernel
from npscope.backends.numba_cpu.vectors import (
    LINE,
    Builder,
    Value,
    broadcast,
    call,
    load,
    prefetch,
    step,
    store,
    vector_of,
)

_WORDS = LINE // 8
_LINE = vector_of(64, _WORDS)


def _emit_read(b: Builder, words: Value) -> Value:
    prefetch(b, words, LINE)
    return call(b, f"llvm.vector.reduce.xor.v{_WORDS}i64", ir.IntType(64), [load(b, words, _LINE)])


def _emit_change(b: Builder, words: Value, bits: Value) -> None:
    prefetch(b, words, LINE)
    store(b, b.xor(load(b, words, _LINE), broadcast(b, bits, _WORDS)), words)


_read_line, _change_line = step(_emit_read, 2, types.uint64), step(_emit_change, 3)


@kernel
def read(words: Any) -> Any:
    """The exclusive or of all 64-bit words, which costs nothing beside memory."""
    found = words[0]
    for i in range(words.size):
        found ^= words[i]
    return found


@kernel
def read_ahead(words: Any) -> Any:
    """`read` of whole lines, with prefetching, which the machine may not do by itself."""
    found = words[0]
    for i in range(0, words.size - _WORDS + 1, _WORDS):
        found ^= _read_line(words, i)
    return found


@kernel
def change(words: Any, bits: Any) -> None:
    """Every word by an exclusive or with `bits`."""
    for i in range(words.size):
        words[i] ^= bits


@kernel
def compute(numbers: Any, rounds: int) -> None:
    """`rounds` multiplications and additions of every number: arithmetic alone, where they fit the nearest cache."""
    for _ in range(rounds):
        for i in range(numbers.size):
            numbers[i] = numbers[i] * np.float32(0.75) + np.float32(0.5)


@kernel
def change_ahead(words: Any, bits: Any) -> None:
    """`change` of whole lines, with prefetching."""
    for i in range(0, words.size - _WORDS + 1, _WORDS):
        _change_line(words, i, bits)
