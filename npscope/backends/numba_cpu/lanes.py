"""Vector code for contiguous memory: a few LLVM vectors at a time, written as Numba intrinsics.

LLVM's vectoriser reaches the bandwidth of memory in plain sums only. What limits the loops here
are shuffles inside a vector and, where the hardware does not prefetch (virtual machines), the
latency of memory; neither can be said in Python. So each intrinsic emits the vector instructions
for one step of a loop; LLVM fits them to the machine (AVX-512, AVX2, NEON), whatever their width.
The step also asks for memory that is needed a little later: measured, 2:4 in place takes 10 ms with
that and 16 ms without (256 MiB, two threads), and one burst for many steps is no help.

Floats are taken as integers: magnitudes of one format order like their bits without the sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from npscope.dtypes import Kind

AHEAD = 4096
"""Bytes between what is computed on and what is prefetched; from 4 KiB on the time is flat."""

LINE = 64
"""Bytes of a cache line, and of the vectors used here."""

LANES = 16
"""Numbers in one step where float64 sums are formed."""

MAX_GROUP = 16
"""Largest scope that is ranked inside a vector: the work grows with the square of it."""

Builder = Any
Value = Any

_INT32 = ir.IntType(32)


@dataclass(frozen=True)
class Format:
    """A float format: its width, and the bits of infinity (or of the largest finite number where there is none)."""

    name: str
    bits: int
    inf: int

    @property
    def lanes(self) -> int:
        """Numbers in a line."""
        return 8 * LINE // self.bits


_FORMATS = {
    f.name: f
    for f in (
        Format("float64", 64, 0x7FF0000000000000),
        Format("float32", 32, 0x7F800000),
        Format("float16", 16, 0x7C00),
        Format("bfloat16", 16, 0x7F80),
        Format("float8_e5m2", 8, 0x7C),
        Format("float8_e4m3fn", 8, 0x7E),
    )
}


_INTEGERS = {name: Format(name, bits, 0) for bits in (8, 16) for name in (f"int{bits}", f"uint{bits}")}


def number_format(kind: Kind) -> Format | None:
    """The format in which norms read a dtype: that of a real part for complex numbers, and small integers as well."""
    name = {"complex64": "float32", "complex128": "float64"}.get(kind.name, kind.name)
    return _FORMATS.get(name) or _INTEGERS.get(name)


def format_of(kind: Kind) -> Format | None:
    """The float format of a dtype, if it is one."""
    return _FORMATS.get(kind.name)


# --- writing LLVM --------------------------------------------------------------------------------


def _vector(bits: int, lanes: int) -> ir.VectorType:
    return ir.VectorType(ir.IntType(bits), lanes)


def _splat(vector: ir.VectorType, value: Any) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _shuffle(b: Builder, v: Value, order: Sequence[int], other: Value = None) -> Value:
    indices = ir.Constant(ir.VectorType(_INT32, len(order)), list(order))
    return b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined) if other is None else other, indices)


def _broadcast(b: Builder, scalar: Value, lanes: int) -> Value:
    vector = ir.VectorType(scalar.type, lanes)
    return _shuffle(b, b.insert_element(ir.Constant(vector, ir.Undefined), scalar, _INT32(0)), [0] * lanes)


def _call(b: Builder, name: str, result: Any, args: Sequence[Value]) -> Value:
    function = b.module.declare_intrinsic(name, (), ir.FunctionType(result, [a.type for a in args]))
    return b.call(function, args)


def _address(context: Any, b: Builder, array_type: Any, array: Value, index: Value) -> Value:
    return b.gep(context.make_array(array_type)(context, b, array).data, [index])


def _load(b: Builder, address: Value, vector: ir.VectorType) -> Value:
    return b.load(b.bitcast(address, vector.as_pointer()), align=max(1, vector.element.width // 8))


def _store(b: Builder, value: Value, address: Value) -> None:
    scalar = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    width = scalar.width if isinstance(scalar, ir.IntType) else 32
    b.store(value, b.bitcast(address, value.type.as_pointer()), align=max(1, width // 8))


def _prefetch(b: Builder, address: Value, length: int, ahead: Value = None) -> None:
    """Ask for `length` bytes that lie `ahead` elements further on (`AHEAD` bytes if not said)."""
    byte = ir.IntType(8).as_pointer()
    there = b.bitcast(address, byte) if ahead is None else b.bitcast(b.gep(address, [ahead]), byte)
    for start in range(0, length, LINE):
        at = b.gep(there, [_INT32(start + (AHEAD if ahead is None else 0))])
        function = b.module.declare_intrinsic(
            "llvm.prefetch", [at.type], ir.FunctionType(ir.VoidType(), [at.type, _INT32, _INT32, _INT32])
        )
        b.call(function, [at, _INT32(0), _INT32(3), _INT32(1)])


def _emitter(returns: Any, emit: Callable[..., Value]) -> Any:
    """An intrinsic of positional arguments; ``emit(builder, address, *values)`` writes it.

    Every array argument is followed by an index, and the pair reaches `emit` as one address.
    """

    def typing(typing_context: Any, *args: Any) -> tuple[Any, Callable[..., Value]]:
        def generate(context: Any, b: Builder, signature: Any, values: Sequence[Value]) -> Value:
            merged: list[Value] = []
            i = 0
            while i < len(values):
                if isinstance(signature.args[i], types.Array):
                    merged.append(_address(context, b, signature.args[i], values[i], values[i + 1]))
                    i += 2
                else:
                    merged.append(values[i])
                    i += 1
            result = emit(b, *merged)
            return context.get_dummy_value() if result is None else result

        return returns(*args), generate

    return typing


def _keys(b: Builder, bits: Value, form: Format) -> Value:
    """Magnitudes as ordered integers below 2 ** (bits - 1); every NaN is the same, the largest."""
    top = (1 << (form.bits - 1)) - 1
    size = b.and_(bits, _splat(bits.type, top))
    if form.inf + 1 == top:
        return size
    nan = _splat(bits.type, form.inf + 1)
    return b.select(b.icmp_unsigned("<", size, nan), size, nan)


def _single(b: Builder, bits: Value, form: Format, signed: bool = False) -> Value:
    """The magnitudes of floats of at most 32 bits as float32; `signed`: with their sign if that is cheaper."""
    wide, single = _vector(32, bits.type.count), ir.VectorType(ir.FloatType(), bits.type.count)
    if form.name in _INTEGERS:
        number = (b.uitofp if form.name.startswith("u") else b.sitofp)(bits, single)
        return number if signed else _call(b, f"llvm.fabs.v{bits.type.count}f32", single, [number])
    if signed and form.name == "float32":
        return b.bitcast(bits, single)
    size = b.and_(bits, _splat(bits.type, (1 << (form.bits - 1)) - 1))
    if form.bits < 32:
        size = b.zext(size, wide)
    if form.name == "float32":
        return b.bitcast(size, single)
    if form.name == "bfloat16":
        return b.bitcast(b.shl(size, _splat(wide, 16)), single)
    # The exponent moves into place and is re-biased by an exact product, which also normalises subnormals.
    exponent = {"float16": 5, "float8_e5m2": 5, "float8_e4m3fn": 4}[form.name]
    moved = b.shl(size, _splat(wide, 23 - (form.bits - 1 - exponent)))
    scaled = b.fmul(b.bitcast(moved, single), _splat(single, 2.0 ** (128 - 2 ** (exponent - 1))))
    special = b.icmp_unsigned(">" if form.name == "float8_e4m3fn" else ">=", size, _splat(wide, form.inf))
    return b.select(special, b.bitcast(b.or_(moved, _splat(wide, 0x7F800000)), single), scaled)


def _ranks(b: Builder, keys: Value, n: int) -> Value:
    """How many of its group of n adjacent lanes rank before each lane: a larger key, or an equal one earlier."""
    vector = keys.type
    doubled = b.shl(keys, _splat(vector, 1))
    ranks = _splat(vector, 0)
    for distance in range(1, n):
        places = [i % n + distance for i in range(vector.count)]
        rivals = _shuffle(b, doubled, [i - i % n + p % n for i, p in enumerate(places)])
        # An earlier rival wins ties: half a unit more.
        rivals = b.or_(rivals, ir.Constant(vector, [int(p >= n) for p in places]))
        ranks = b.add(ranks, b.zext(b.icmp_unsigned(">", rivals, doubled), vector))
    return ranks


def _narrow(b: Builder, count: Value, vector: ir.VectorType) -> Value:
    """An int64 in every lane."""
    scalar = count if vector.element.width == 64 else b.trunc(count, vector.element)
    return _broadcast(b, scalar, vector.count)


# --- selection -----------------------------------------------------------------------------------


def group_lanes(form: Format, n: int) -> int:
    """Lanes of a vector that holds whole groups of n."""
    return n * max(1, form.lanes // n)


@cache
def prune_groups(form: Format, n: int) -> Any:
    """``(source, i, target, j, k)``: write `group_lanes` numbers, the k first-ranked of each n and zeros."""
    lanes = group_lanes(form, n)

    def emit(b: Builder, source: Value, target: Value, k: Value) -> None:
        _prefetch(b, source, lanes * form.bits // 8)
        bits = _load(b, source, _vector(form.bits, lanes))
        ranks = _ranks(b, _keys(b, bits, form), n)
        kept = b.icmp_unsigned("<", ranks, _narrow(b, k, bits.type))
        _store(b, b.select(kept, bits, _splat(bits.type, 0)), target)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 5))


@cache
def keep_from(form: Format) -> Any:
    """``(source, i, target, j, limit)``: write a line of numbers, +0.0 for those whose magnitude's key is below it."""

    def emit(b: Builder, source: Value, target: Value, limit: Value) -> None:
        _prefetch(b, source, LINE)
        bits = _load(b, source, _vector(form.bits, form.lanes))
        word = bits.type.element
        least = limit if form.bits == 64 else b.trunc(limit, word)
        nan = word(form.inf + 1)  # every key above infinity is that of NaN
        least = b.select(b.icmp_unsigned("<", least, nan), least, nan)
        kept = b.icmp_unsigned(">=", _keys(b, bits, form), _broadcast(b, least, form.lanes))
        _store(b, b.select(kept, bits, _splat(bits.type, 0)), target)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 5))


def groups_per_line(width: int, n: int) -> int:
    """Groups of n numbers of `width` bits that a vector holds."""
    return max(1, 8 * LINE // width // n)


@cache
def mark_groups(width: int, n: int) -> Any:
    """``(keys, i, keep, s, mask, j)``: mask of the `keep[s]` first-ranked of n keys, for `groups_per_line` groups."""
    groups = groups_per_line(width, n)
    vector, few = _vector(width, n * groups), _vector(64, groups)

    def emit(b: Builder, keys: Value, keep: Value, mask: Value) -> None:
        own = _load(b, keys, vector)
        ranks = _splat(vector, 0)
        for distance in range(1, n):
            places = [i % n + distance for i in range(vector.count)]
            rivals = _shuffle(b, own, [i - i % n + p % n for i, p in enumerate(places)])
            ties = b.and_(
                b.icmp_unsigned("==", rivals, own), ir.Constant(_vector(1, vector.count), [p >= n for p in places])
            )
            ranks = b.add(ranks, b.zext(b.or_(b.icmp_unsigned(">", rivals, own), ties), vector))
        counts = _load(b, keep, few)
        counts = counts if width == 64 else b.trunc(counts, _vector(width, groups))
        kept = b.icmp_unsigned("<", ranks, _shuffle(b, counts, [i // n for i in range(vector.count)]))
        _store(b, b.zext(kept, _vector(8, vector.count)), mask)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 6))


@cache
def collect(width: int) -> Any:
    """``(keys, i, found, j, low, span)``: append the keys of a line with ``key - low <= span``; how many those are.

    Without a branch: one that is rarely taken costs more in mistakes than the stores do.
    """
    vector = _vector(width, 8 * LINE // width)

    def emit(b: Builder, keys: Value, found: Value, low: Value, span: Value) -> Value:
        own = _load(b, keys, vector)
        offset = b.sub(own, _broadcast(b, low, vector.count))
        inside = b.icmp_unsigned("<=", offset, _broadcast(b, span, vector.count))
        function = b.module.declare_intrinsic(
            f"llvm.experimental.vector.compress.v{vector.count}i{width}",
            (),
            ir.FunctionType(vector, [vector, inside.type, vector]),
        )
        _store(b, b.call(function, [own, inside, ir.Constant(vector, ir.Undefined)]), found)
        bits = b.bitcast(inside, ir.IntType(vector.count))
        return b.zext(_call(b, f"llvm.ctpop.i{vector.count}", bits.type, [bits]), ir.IntType(64))

    return intrinsic(_with_arguments(_emitter(lambda *args: types.int64(*args), emit), 6))


# --- norms ---------------------------------------------------------------------------------------

CHUNK = 64
"""Elements of a long run that are taken in one step: four sums side by side hide the latency of an addition."""

PARTIAL = 8
"""Lanes in which float64 sums of long runs are formed."""

INF, ONE, TWO = 0, 1, 2
"""What is made of magnitudes: the largest, their sum, the sum of their squares."""


def takes_many(run: int) -> bool:
    """Whether blocks with `run` adjacent elements are summed side by side, a lane for each."""
    return run in (1, 2, 4, 8)


def _larger(b: Builder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_unsigned(">", x, y), x, y)


def _read_single(form: Format, signed: bool) -> Callable[..., Value]:
    """``read(builder, source, e, count)``: `count` elements at `e`, as `_single`."""

    def read(b: Builder, source: Value, e: int, count: int) -> Value:
        return _single(b, _load(b, b.gep(source, [_INT32(e)]), _vector(form.bits, count)), form, signed)

    return read


def _read(b: Builder, source: Value, e: int, count: int, form: Format, code: int) -> Value:
    """`count` elements at `e` as float32 or float64, in integers; magnitudes, or what has the same squares."""
    if form.bits == 64:
        bits = _load(b, b.gep(source, [_INT32(e)]), _vector(64, count))
        return b.and_(bits, _splat(bits.type, (1 << 63) - 1))
    return b.bitcast(_read_single(form, code == TWO)(b, source, e, count), _vector(32, count))


def _planes(b: Builder, vectors: list[Value]) -> list[Value]:
    """A power of two of adjacent vectors, dealt out: plane p holds every element at p modulo their number."""
    if len(vectors) == 1:
        return vectors
    count = 2 * vectors[0].type.count
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    evens = _planes(b, [_shuffle(b, x, range(0, count, 2), y) for x, y in pairs])
    odds = _planes(b, [_shuffle(b, x, range(1, count, 2), y) for x, y in pairs])
    return [plane for both in zip(evens, odds, strict=True) for plane in both]


def _two_sum(b: Builder, x: Value, y: Value) -> tuple[Value, Value]:
    """(s, e) with s the rounded sum and s + e exact (Knuth 1969)."""
    s = b.fadd(x, y)
    t = b.fsub(s, x)
    return s, b.fadd(b.fsub(x, b.fsub(s, t)), b.fsub(y, t))


class _Total:
    """The lanes of a sum or a maximum while vectors are taken in.

    Magnitudes of float32 are summed in float64; those of float64 with what is lost, in a second number.
    """

    def __init__(self, b: Builder, form: Format, code: int, blocks: int) -> None:
        """For so many blocks side by side, or for one in many lanes where that is 0."""
        self.b, self.code, self.compensates = b, code, form.bits == 64 and code != INF
        if code == INF:
            start = _splat(_vector(max(32, form.bits), blocks or LANES), 0)
        else:
            start = _splat(ir.VectorType(ir.DoubleType(), blocks or PARTIAL), 0.0)
        self.type: Any = start.type
        self.places = [cgutils.alloca_once_value(b, start) for _ in range(2 if self.compensates else 1)]

    @property
    def values(self) -> list[Value]:
        return [self.b.load(place) for place in self.places]

    @values.setter
    def values(self, values: Sequence[Value]) -> None:
        for value, place in zip(values, self.places, strict=True):
            self.b.store(value, place)

    def take(self, bits: Value) -> None:
        """Take in numbers, as `_read` gives them: as many as there are lanes, or twice as many."""
        b = self.b
        if self.code == INF:
            self.values = [_larger(b, self.values[0], bits)]
            return
        scalar = ir.FloatType() if bits.type.element.width == 32 else ir.DoubleType()
        numbers = b.bitcast(bits, ir.VectorType(scalar, bits.type.count))
        for start in range(0, bits.type.count, self.type.count):
            whole = bits.type.count == self.type.count
            part = numbers if whole else _shuffle(b, numbers, range(start, start + self.type.count))
            wide = b.fpext(part, self.type) if bits.type.element.width == 32 else part
            if self.compensates:
                self.join([b.fmul(wide, wide) if self.code == TWO else wide])
            elif self.code == TWO:
                # A product of two float32 is exact in float64, so that this rounds once, as the sum would.
                self.values = [_call(b, f"llvm.fma.v{self.type.count}f64", self.type, [wide, wide, self.values[0]])]
            else:
                self.join([wide])

    def join(self, other: Sequence[Value]) -> None:
        """Take in the lanes of another total, or numbers that nothing was lost of."""
        self.values = _joined(self.b, self.code, self.values, other)


def _joined(b: Builder, code: int, x: Sequence[Value], y: Sequence[Value]) -> list[Value]:
    """Two totals as one."""
    if code == INF:
        return [_larger(b, x[0], y[0])]
    if len(x) == 1:
        return [b.fadd(x[0], y[0])]
    total, lost = _two_sum(b, x[0], y[0])
    for more in (x[1], *y[1:]):
        lost = b.fadd(lost, more)
    return [total, lost]


class _Least:
    """The least magnitude that is not zero, of all float32 that go into sums: as the largest of their negated bits."""

    def __init__(self, b: Builder, place: Value, first: bool) -> None:
        self.b = b
        self.place = b.bitcast(place, _vector(32, LANES).as_pointer())
        start = _splat(_vector(32, LANES), 0) if first else b.load(self.place, align=4)
        self.most = cgutils.alloca_once_value(b, start)

    def take(self, bits: Value) -> None:
        if bits.type.count < LANES:
            bits = _shuffle(self.b, bits, [min(i, bits.type.count) for i in range(LANES)], _splat(bits.type, 0))
        self.b.store(_larger(self.b, self.b.load(self.most), self.b.neg(bits)), self.most)

    def leave(self) -> None:
        self.b.store(self.b.load(self.most), self.place, align=4)


def parts_of(form: Format) -> int:
    """Places of 8 bytes for the total of one block in many lanes."""
    return PARTIAL * max(1, form.bits // 32)


@cache
def add_run(form: Format, run: int, long: bool, first: bool, code: int) -> Any:
    """``(source, i, count, size, totals, j, more, k, ahead)``: take in a run of each of `count` adjacent blocks.

    Runs have `size` elements; they are `long`, with `run` elements that do not fill a vector, or `size` is the
    constant `run`. Sums in float64, or maxima as bits (NaN the largest), are left in `totals`: one number a block
    where `takes_many(run)`, else `parts_of(form)`. `first` overwrites them. Sums of float32 magnitudes use
    `LANES` numbers in `more` for their least ones, and sums of float64 what was lost where `takes_many`.
    """
    many = takes_many(run) and not long

    def emit(b: Builder, source: Value, count: Value, size: Value, totals: Value, more: Value, ahead: Value) -> None:
        least = _Least(b, more, first) if code == ONE and form.bits <= 32 else None

        def number(n: int) -> Value:
            return ir.Constant(size.type, n)

        def read(at: Value, length: int) -> list[Value]:
            _prefetch(b, at, length * form.bits // 8, ahead)
            found = [_read(b, at, e, LANES, form, code) for e in range(0, length - LANES + 1, LANES)]
            if length % LANES:
                bits = _read(b, at, length - length % LANES, length % LANES, form, code)
                padded = [min(i, length % LANES) for i in range(LANES)]
                found.append(_shuffle(b, bits, padded, _splat(bits.type, 0)))
            return found

        def take(totals: Sequence[_Total], vectors: Sequence[Value]) -> None:
            for i, bits in enumerate(vectors):
                totals[i % len(totals)].take(bits)
                if least is not None:
                    least.take(bits)

        def add(at: Value, block: Value, blocks: int) -> None:
            total = _Total(b, form, code, blocks)
            entry = block if many else b.mul(block, number(parts_of(form)))
            words = b.bitcast(totals, total.type.element.as_pointer() if many else ir.DoubleType().as_pointer())
            words = [b.gep(words, [entry])]
            if total.compensates:
                lost = b.bitcast(more, ir.DoubleType().as_pointer())
                words.append(b.gep(lost, [entry]) if many else b.gep(words[0], [number(PARTIAL)]))
            places = [b.bitcast(word, total.type.as_pointer()) for word in words]
            if not first:
                total.values = [b.load(place, align=4) for place in places]
            if blocks:
                _prefetch(b, at, blocks * run * form.bits // 8, ahead)
                take([total], _planes(b, [_read(b, at, v * blocks, blocks, form, code) for v in range(run)]))
            elif long:
                others = [_Total(b, form, code, 0) for _ in range(CHUNK // LANES)]
                chunks, vectors = b.udiv(size, number(CHUNK)), b.udiv(size, number(LANES))
                with cgutils.for_range(b, chunks) as loop:
                    take(others, read(b.gep(at, [b.mul(loop.index, number(CHUNK))]), CHUNK))
                with cgutils.for_range_slice(b, b.mul(chunks, number(CHUNK // LANES)), vectors, number(1)) as (v, _):
                    take([total], read(b.gep(at, [b.mul(v, number(LANES))]), LANES))
                for other in others:
                    total.join(other.values)
                take([total], read(b.gep(at, [b.mul(vectors, number(LANES))]), run) if run else [])
            else:
                take([total], read(at, run))
            for value, place in zip(total.values, places, strict=True):
                b.store(value, place, align=4)

        done = number(0)
        for blocks in (LANES, 1) if many else (0,):
            step = number(blocks or 1)
            stop = b.mul(b.udiv(count, step), step)
            with cgutils.for_range_slice(b, done, stop, step) as (block, _):
                add(b.gep(source, [b.mul(block, size)]), block, blocks)
            done = stop
        if least is not None:
            least.leave()

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 9))


def _folded(b: Builder, form: Format, code: int, source: Value) -> list[Value]:
    """The totals of `LANES` blocks that are in many lanes each, a lane for each: a tree of cheap shuffles."""
    total = _Total(b, form, code, 0)
    words = b.bitcast(source, ir.DoubleType().as_pointer())
    blocks = [
        [
            b.load(
                b.bitcast(b.gep(words, [_INT32(i * parts_of(form) + k * PARTIAL)]), total.type.as_pointer()), align=4
            )
            for k in range(len(total.places))
        ]
        for i in range(LANES)
    ]
    if code == INF:
        low, high = range(PARTIAL), range(PARTIAL, 2 * PARTIAL)
        blocks = [[_larger(b, _shuffle(b, v, low), _shuffle(b, v, high))] for (v,) in blocks]
    # Inside the parts of 16 bytes of which vectors are made, then whole parts: the order comes out right.
    if code == INF and form.bits <= 32:
        orders = [[0, 2, 8, 10, 4, 6, 12, 14]] * 2 + [[0, 1, 2, 3, 8, 9, 10, 11]]
        strides = [1, 1, 4]
    else:
        orders = [[0, 8, 2, 10, 4, 12, 6, 14]] + [[0, 1, 4, 5, 8, 9, 12, 13]] * 2
        strides = [1, 2, 2]
    for order, stride in zip(orders, strides, strict=True):
        further = [i + stride for i in order]
        blocks = [
            _joined(
                b,
                code,
                [_shuffle(b, p, order, q) for p, q in zip(x, y, strict=True)],
                [_shuffle(b, p, further, q) for p, q in zip(x, y, strict=True)],
            )
            for x, y in zip(blocks[::2], blocks[1::2], strict=True)
        ]
    return [_shuffle(b, p, range(LANES), q) for p, q in zip(*blocks, strict=True)]


ROUNDING_BORDER, ROUNDING_MASK = 1 << 28, (1 << 29) - 1
"""A float64 lies halfway between two normal float32 where its low 29 bits are the first number."""

DOUBT = 1 << 16
"""Units in the last place of float64 by which a norm may be off: each addition in sequence adds one at most.

One norm in 4096 is in doubt without need, and settled by a few nanoseconds an element.
"""

EXACT_SPAN = 2.0**29
"""A float64 sum of float32 magnitudes is exact if it is at most this times the least of them that is not zero.

That one is 2**e or more, so that all are multiples of 2 ** (e - 23), and the sum is below 2 ** (e + 30):
53 bits hold it and every sum on the way.
"""


SAFE_LEAST = 1e-280
"""A sum of squares of float64 from here to infinity lost nothing to under- or overflow."""


@cache
def finish_totals(form: Format, code: int, many: bool) -> Any:
    """``(totals, i, more, j, sums, k, norms, l)``: what `add_run` found for `LANES` blocks, to norms.

    To float32, or float64 if the elements are that, and except for maxima to float64 in `sums`. Returns a bit for
    each block whose rounding is in doubt, or whose norm is no normal number of float32, or whose squares may have
    left the range of float64.
    """

    def emit(b: Builder, totals: Value, more: Value, sums: Value, norms: Value) -> Value:
        double, single = ir.VectorType(ir.DoubleType(), LANES), ir.VectorType(ir.FloatType(), LANES)
        bits = _vector(64, LANES)
        if not many:
            found = _folded(b, form, code, totals)
        else:
            places = [totals, more] if form.bits == 64 else [totals]
            found = [b.load(b.bitcast(place, double.as_pointer()), align=8) for place in places]
        if code == INF:
            _store(b, found[0], norms)
            return ir.Constant(ir.IntType(64), 0)
        wide = found[0]
        doubtful = ir.Constant(ir.VectorType(ir.IntType(1), LANES), [0] * LANES)
        if form.bits == 64:
            # What was lost of an infinite sum is NaN.
            finite = b.fcmp_ordered("<", wide, _splat(double, math.inf))
            if code == TWO:
                doubtful = b.or_(
                    b.fcmp_ordered("<", wide, _splat(double, SAFE_LEAST)),
                    b.fcmp_ordered("==", wide, _splat(double, math.inf)),
                )
            wide = b.select(finite, b.fadd(wide, found[1]), wide)
        if code == TWO:
            wide = _call(b, f"llvm.sqrt.v{LANES}f64", double, [wide])
        _store(b, wide, sums)
        if form.bits == 64:
            _store(b, wide, norms)
            return b.zext(b.bitcast(doubtful, ir.IntType(LANES)), ir.IntType(64))
        _store(b, b.fptrunc(wide, single), norms)
        raw = b.bitcast(wide, bits)
        offset = b.and_(b.add(raw, _splat(bits, DOUBT - ROUNDING_BORDER)), _splat(bits, ROUNDING_MASK))
        near = b.icmp_unsigned("<", offset, _splat(bits, 2 * DOUBT))
        # Zero is sure; subnormal float32, NaN and what float32 cannot hold are for the scalar code.
        low, high = 0x3810000000000000, 0x47EFFFFFE0000000
        odd = b.icmp_unsigned(">", b.sub(raw, _splat(bits, low)), _splat(bits, high - low))
        odd = b.and_(odd, b.icmp_unsigned("!=", raw, _splat(bits, 0)))
        doubtful = b.or_(near, odd)
        if code == ONE:
            most = _call(b, f"llvm.vector.reduce.umax.v{LANES}i32", _INT32, [_load(b, more, _vector(32, LANES))])
            least = b.fpext(b.bitcast(b.neg(most), ir.FloatType()), ir.DoubleType())
            span = b.fmul(least, ir.DoubleType()(EXACT_SPAN))
            doubtful = b.and_(doubtful, b.not_(b.fcmp_ordered("<=", wide, _broadcast(b, span, LANES))))
        return b.zext(b.bitcast(doubtful, ir.IntType(LANES)), ir.IntType(64))

    return intrinsic(_with_arguments(_emitter(lambda *args: types.int64(*args), emit), 8))


# --- writing -------------------------------------------------------------------------------------


def runs_per_line(form: Format, run: int) -> int:
    """Blocks whose runs fill a line together; 1 where they do not."""
    return form.lanes // run if form.lanes % run == 0 else 1


@cache
def drop_runs(form: Format, run: int, blocks: int) -> Any:
    """``(target, i, mask, j)``: zero the runs (up to `CHUNK` elements) of adjacent blocks whose mask is False."""
    count = run * blocks

    def emit(b: Builder, target: Value, mask: Value) -> None:
        _prefetch(b, target, count * form.bits // 8)
        few = b.icmp_unsigned("!=", _load(b, mask, _vector(8, blocks)), _splat(_vector(8, blocks), 0))
        kept = _shuffle(b, few, [i // run for i in range(count)])
        bits = _load(b, target, _vector(form.bits, count))
        _store(b, b.select(kept, bits, _splat(bits.type, 0)), target)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 4))


@cache
def scale_runs(form: Format, run: int, blocks: int) -> Any:
    """``(target, i, factors, j)``: multiply runs of float32 by float64 factors; 0 writes +0.0, 1 keeps the bits."""
    count = run * blocks
    double, single = ir.VectorType(ir.DoubleType(), count), ir.VectorType(ir.FloatType(), count)

    def emit(b: Builder, target: Value, factors: Value) -> None:
        few = b.load(b.bitcast(factors, ir.VectorType(ir.DoubleType(), blocks).as_pointer()), align=8)
        factor = _shuffle(b, few, [i // run for i in range(count)])
        _prefetch(b, target, count * 4)
        bits = _load(b, target, _vector(32, count))
        product = b.fptrunc(b.fmul(b.fpext(b.bitcast(bits, single), double), factor), single)
        scaled = b.select(b.fcmp_ordered("==", factor, _splat(double, 1.0)), bits, b.bitcast(product, bits.type))
        zero = b.fcmp_ordered("==", factor, _splat(double, 0.0))
        _store(b, b.select(zero, _splat(bits.type, 0), scaled), target)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 4))


def _with_arguments(typing: Any, count: int) -> Any:
    """A function of a fixed number of arguments, which `intrinsic` asks for."""
    forms = {
        3: lambda context, a, b, c: typing(context, a, b, c),
        4: lambda context, a, b, c, d: typing(context, a, b, c, d),
        5: lambda context, a, b, c, d, e: typing(context, a, b, c, d, e),
        6: lambda context, a, b, c, d, e, f: typing(context, a, b, c, d, e, f),
        7: lambda context, a, b, c, d, e, f, g: typing(context, a, b, c, d, e, f, g),
        8: lambda context, a, b, c, d, e, f, g, h: typing(context, a, b, c, d, e, f, g, h),
        9: lambda context, a, b, c, d, e, f, g, h, i: typing(context, a, b, c, d, e, f, g, h, i),
    }
    return forms[count]
