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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
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
    width = value.type.element.width if hasattr(value.type.element, "width") else 32
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


# --- norms ---------------------------------------------------------------------------------------

CHUNK = 64
"""Elements of a long run that are summed in one step."""


def blocks_per_step(run: int) -> int:
    """Blocks whose sums are formed side by side, for blocks with `run` adjacent elements."""
    return LANES if run in (1, 2, 4, 8) else 1


@cache
def add_terms(form: Format, run: int, blocks: int, square: bool, first: bool) -> Any:
    """``(source, i, sums, j, ahead)``: add |x| or |x| ** 2 of `run` adjacent elements a block to float64 sums.

    Serves 1 or `LANES` adjacent blocks; `first` overwrites the sums.
    """

    def emit(b: Builder, source: Value, sums: Value, ahead: Value) -> None:
        _prefetch(b, source, blocks * run * form.bits // 8, ahead)
        if blocks == 1:
            total = _fold(b, lambda *at: _terms(b, _read_single(form, square)(*at), square), b.fadd, source, run)
            b.store(total if first else b.fadd(b.load(sums), total), sums)
            return
        at = b.bitcast(sums, ir.VectorType(ir.DoubleType(), LANES).as_pointer())
        total = _sums_of_runs(b, source, form, run, square, None if first else b.load(at, align=8))
        b.store(total, at, align=8)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 5))


@cache
def round_terms(form: Format, run: int, square: bool, first: bool) -> Any:
    """``(source, i, sums, j, norms, k, ahead)``: the last `add_terms` of `LANES` blocks, and `round_norms`, at once.

    The slow square roots then run beside the loads.
    """

    def emit(b: Builder, source: Value, sums: Value, norms: Value, ahead: Value) -> Value:
        _prefetch(b, source, LANES * run * form.bits // 8, ahead)
        at = b.bitcast(sums, ir.VectorType(ir.DoubleType(), LANES).as_pointer())
        total = _sums_of_runs(b, source, form, run, square, None if first else b.load(at, align=8))
        return _round(b, total, sums, norms, square)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.boolean(*args), emit), 7))


def _read_single(form: Format, signed: bool) -> Callable[..., Value]:
    def read(b: Builder, source: Value, e: int, count: int) -> Value:
        return _single(b, _load(b, b.gep(source, [_INT32(e)]), _vector(form.bits, count)), form, signed)

    return read


def _terms(b: Builder, single: Value, square: bool) -> Value:
    wide = b.fpext(single, ir.VectorType(ir.DoubleType(), single.type.count))
    return b.fmul(wide, wide) if square else wide


def _sums_of_runs(b: Builder, source: Value, form: Format, run: int, square: bool, total: Value | None) -> Value:
    """The sums of `LANES` runs, added to `total`: by planes, the first elements of all runs, the second, ..."""
    read = _read_single(form, square)
    planes = _planes(b, [read(b, source, v * LANES, LANES) for v in range(run)])
    for plane in planes:
        wide = b.fpext(plane, ir.VectorType(ir.DoubleType(), LANES))
        if total is None:
            total = b.fmul(wide, wide) if square else wide
        elif square:
            # A product of two float32 is exact in float64, so that this rounds once, as the sum would.
            total = _call(b, f"llvm.fma.v{LANES}f64", wide.type, [wide, wide, total])
        else:
            total = b.fadd(total, wide)
    return total


def _planes(b: Builder, vectors: list[Value]) -> list[Value]:
    """A power of two of adjacent vectors, dealt out: plane p holds every element at p modulo their number."""
    if len(vectors) == 1:
        return vectors
    even, odd = range(0, 2 * LANES, 2), range(1, 2 * LANES, 2)
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    evens = _planes(b, [_shuffle(b, x, even, y) for x, y in pairs])
    odds = _planes(b, [_shuffle(b, x, odd, y) for x, y in pairs])
    return [plane for both in zip(evens, odds, strict=True) for plane in both]


def _fold(b: Builder, read: Callable[..., Value], join: Callable[..., Value], source: Value, run: int) -> Value:
    """All of a run of up to `CHUNK` elements joined into one number: by lanes, then by halves."""
    whole = [read(b, source, e, LANES) for e in range(0, run - LANES + 1, LANES)]
    rest = run % LANES
    result = None
    if whole:
        while len(whole) > 1:
            whole = [join(x, y) for x, y in zip(whole[::2], whole[1::2], strict=False)] + (
                whole[-1:] if len(whole) % 2 else []
            )
        v = whole[0]
        while v.type.count > 1:
            half = v.type.count // 2
            v = join(_shuffle(b, v, range(half)), _shuffle(b, v, range(half, 2 * half)))
        result = b.extract_element(v, _INT32(0))
    if rest:
        v = read(b, source, run - rest, rest)
        while v.type.count > 1:
            half, odd = divmod(v.type.count, 2)
            joined = join(_shuffle(b, v, range(half)), _shuffle(b, v, range(half, 2 * half)))
            if odd:
                one = b.extract_element(v, _INT32(2 * half))
                result = one if result is None else join(result, one)
            v = joined
        one = b.extract_element(v, _INT32(0))
        result = one if result is None else join(result, one)
    return result


@cache
def add_largest(form: Format, run: int, blocks: int, first: bool) -> Any:
    """``(source, i, tops, j, ahead)``: the bits, as uint32, of the largest magnitude as float32; NaN the largest.

    As `add_terms`, with the larger of two numbers in place of their sum.
    """

    def read(b: Builder, source: Value, e: int, count: int) -> Value:
        return b.bitcast(_read_single(form, False)(b, source, e, count), _vector(32, count))

    def emit(b: Builder, source: Value, tops: Value, ahead: Value) -> None:
        def larger(x: Value, y: Value) -> Value:
            return b.select(b.icmp_unsigned(">", x, y), x, y)

        _prefetch(b, source, blocks * run * form.bits // 8, ahead)
        if blocks == 1:
            top = _fold(b, read, larger, source, run)
            at = b.bitcast(tops, _INT32.as_pointer())
            b.store(top if first else larger(top, b.load(at)), at)
            return
        top = None if first else _load(b, tops, _vector(32, LANES))
        for plane in _planes(b, [read(b, source, v * LANES, LANES) for v in range(run)]):
            top = plane if top is None else larger(top, plane)
        _store(b, top, tops)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.void(*args), emit), 5))


ROUNDING_BORDER, ROUNDING_MASK = 1 << 28, (1 << 29) - 1
"""A float64 lies halfway between two normal float32 where its low 29 bits are the first number."""

DOUBT = 1 << 12
"""Units in the last place of float64 by which a norm may be off: sums of up to 2048 steps."""


@cache
def round_norms(square: bool) -> Any:
    """``(sums, j, norms, i)``: `LANES` sums to float32 norms, and to float64 ones in their place.

    True if the rounding of any of them is in doubt, or its format is not that of normal numbers.
    """

    def emit(b: Builder, sums: Value, norms: Value) -> Value:
        at = b.bitcast(sums, ir.VectorType(ir.DoubleType(), LANES).as_pointer())
        return _round(b, b.load(at, align=8), sums, norms, square)

    return intrinsic(_with_arguments(_emitter(lambda *args: types.boolean(*args), emit), 4))


def _round(b: Builder, wide: Value, sums: Value, norms: Value, square: bool) -> Value:
    double, single, bits = wide.type, ir.VectorType(ir.FloatType(), LANES), _vector(64, LANES)
    if square:
        wide = _call(b, f"llvm.sqrt.v{LANES}f64", double, [wide])
    b.store(wide, b.bitcast(sums, double.as_pointer()), align=8)
    b.store(b.fptrunc(wide, single), b.bitcast(norms, single.as_pointer()), align=4)
    raw = b.bitcast(wide, bits)
    offset = b.and_(b.add(raw, _splat(bits, DOUBT - ROUNDING_BORDER)), _splat(bits, ROUNDING_MASK))
    near = b.icmp_unsigned("<", offset, _splat(bits, 2 * DOUBT))
    # Zero is sure; subnormal float32, NaN and what float32 cannot hold are for the scalar code.
    least, most = 0x3810000000000000, 0x47EFFFFFE0000000
    odd = b.icmp_unsigned(">", b.sub(raw, _splat(bits, least)), _splat(bits, most - least))
    odd = b.and_(odd, b.icmp_unsigned("!=", raw, _splat(bits, 0)))
    doubtful = b.bitcast(b.or_(near, odd), ir.IntType(LANES))
    return b.icmp_unsigned("!=", doubtful, ir.IntType(LANES)(0))


# --- writing -------------------------------------------------------------------------------------


def runs_per_line(form: Format, run: int) -> int:
    """Blocks whose runs fill a line together; 1 where they do not."""
    return form.lanes // run if form.lanes % run == 0 else 1


@cache
def drop_runs(form: Format, run: int, blocks: int) -> Any:
    """``(target, i, mask, j)``: zero the runs (up to `CHUNK` elements) of adjacent blocks whose mask is False."""
    count = run * blocks

    def emit(b: Builder, target: Value, mask: Value) -> None:
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
        7: lambda context, a, b, c, d, e, f, g: typing(context, a, b, c, d, e, f, g),
    }
    return forms[count]
