"""Vector code for contiguous memory: what LLVM vectors are made of, written as Numba intrinsics.

LLVM's vectoriser reaches the bandwidth of memory in plain sums only. What limits the loops of
this package are shuffles inside a vector and, where the hardware does not prefetch (virtual machines), the
latency of memory; neither can be said in Python. So each intrinsic emits the vector instructions
of a `step`, and mostly of the walk around it (`rows`), over which Numba would take longer; LLVM fits them to
the machine (AVX-512, AVX2, NEON), whatever their width. A step also asks for memory that is needed a little
later: measured, 2:4 in place takes 10 ms with that and 16 ms without (256 MiB, two threads), and one burst
for many steps is no help.

Floats are taken as integers: magnitudes of one format order like their bits without the sign.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.jit import intrinsic_of
from npscope.dtypes import Kind

AHEAD = 8192
"""Bytes between what is computed on and what is prefetched; from 4 to 16 KiB the time is flat."""

LINE = 64
"""Bytes of a cache line, and of the vectors used here."""

QUARTER = 128
"""Bits of the parts of which the vectors of AVX2 are made."""

LANES = 16
"""Numbers in one step where float64 sums are formed."""

CHUNK = 64
"""Elements of a long run that are taken in one step: four sums side by side hide the latency of an addition."""

Builder = Any
Value = Any

INT32 = ir.IntType(32)


@dataclass(frozen=True, eq=False)
class Format:
    """A number format: its width, and the bits of infinity (or of the largest finite number where there is none).

    One object each, compared by identity: kernels are found by it.
    """

    name: str
    bits: int
    inf: int
    is_integer: bool = False

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


_INTEGERS = {name: Format(name, bits, 0, True) for bits in (8, 16, 32, 64) for name in (f"int{bits}", f"uint{bits}")}


KEYS = {bits: Format(f"key{bits}", bits, 0) for bits in (8, 16, 32, 64)}
"""Ordered integers that numbers have been turned into, as formats."""


def format_of(kind: Kind) -> Format | None:
    """The format of a dtype of real numbers."""
    return _FORMATS.get(kind.name) or _INTEGERS.get(kind.name)


# --- writing LLVM --------------------------------------------------------------------------------


def vector_of(bits: int, lanes: int) -> ir.VectorType:
    """A type: integers side by side."""
    return ir.VectorType(ir.IntType(bits), lanes)


def splat(vector: ir.VectorType, value: Any) -> ir.Constant:
    """A constant in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def shuffle(b: Builder, v: Value, order: Sequence[int], other: Value = None) -> Value:
    """Lanes of `v`, and of `other` counted on from its end, in this order."""
    indices = ir.Constant(ir.VectorType(INT32, len(order)), list(order))
    return b.shuffle_vector(v, ir.Constant(v.type, ir.Undefined) if other is None else other, indices)


def broadcast(b: Builder, scalar: Value, lanes: int) -> Value:
    """A scalar in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    return shuffle(b, b.insert_element(ir.Constant(vector, ir.Undefined), scalar, INT32(0)), [0] * lanes)


def narrow(b: Builder, number: Value, vector: ir.VectorType) -> Value:
    """An int64 in every lane."""
    scalar = number if vector.element.width == 64 else b.trunc(number, vector.element)
    return broadcast(b, scalar, vector.count)


def call(b: Builder, name: str, result: Any, args: Sequence[Value]) -> Value:
    """An intrinsic of LLVM."""
    function = b.module.declare_intrinsic(name, (), ir.FunctionType(result, [a.type for a in args]))
    return b.call(function, args)


def any_of(b: Builder, flags: Value) -> Value:
    """Whether a lane of flags is set."""
    word = ir.IntType(flags.type.count)
    return b.icmp_unsigned("!=", b.bitcast(flags, word), word(0))


def on_floats(b: Builder, name: str, *args: Value) -> Value:
    """An intrinsic of LLVM that makes a vector of floats of others of the same type."""
    vector = args[0].type
    kind = {"float": "f32", "double": "f64"}[str(vector.element)]
    return call(b, f"llvm.{name}.v{vector.count}{kind}", vector, args)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """X * y + z, rounded once."""
    return on_floats(b, "fma", x, y, z)


def _address(context: Any, b: Builder, array_type: Any, array: Value, index: Value) -> Value:
    return b.gep(context.make_array(array_type)(context, b, array).data, [index])


def load(b: Builder, address: Value, vector: ir.VectorType) -> Value:
    """A vector from anywhere in memory."""
    return b.load(b.bitcast(address, vector.as_pointer()), align=max(1, vector.element.width // 8))


def store(b: Builder, value: Value, address: Value) -> None:
    """A vector or a scalar to anywhere in memory."""
    scalar = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    width = scalar.width if isinstance(scalar, ir.IntType) else 32
    b.store(value, b.bitcast(address, value.type.as_pointer()), align=max(1, width // 8))


@cache
def has_only_avx2() -> bool:
    """Whether the machine, whatever Numba is told, has AVX2 and no more; code for either runs on all, if slower.

    It permutes lanes, but does not compress them, and moves few across the halves of a vector.
    """
    try:
        features = llvmlite.binding.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know them
        return False
    return bool(features.get("avx2")) and not features.get("avx512f")


def prefetch(b: Builder, address: Value, length: int, ahead: Value = None) -> None:
    """Ask for `length` bytes that lie `ahead` elements further on (`AHEAD` bytes if not said).

    In the second cache: the nearest is small, and threads may share it. Measured with two that do, norms of 16x1
    took 13.5 ms with the nearest and 10 so, a selection of one block of four 18.6 and 16.9, 2:4 the same.
    """
    byte = ir.IntType(8).as_pointer()
    there = b.bitcast(address, byte) if ahead is None else b.bitcast(b.gep(address, [ahead]), byte)
    for start in range(0, length, LINE):
        at = b.gep(there, [INT32(start + (AHEAD if ahead is None else 0))])
        function = b.module.declare_intrinsic(
            "llvm.prefetch", [at.type], ir.FunctionType(ir.VoidType(), [at.type, INT32, INT32, INT32])
        )
        b.call(function, [at, INT32(0), INT32(2), INT32(1)])


def step(emit: Callable[..., Value], count: int, returns: Any = types.void) -> Any:
    """An intrinsic of `count` positional arguments; ``emit(builder, address, *values)`` writes it.

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

    return intrinsic_of(typing, "step", emit.__doc__, count)


def keys_of(b: Builder, bits: Value, form: Format) -> Value:
    """Magnitudes as ordered integers, of floats below 2 ** (bits - 1); every NaN is the same, the largest."""
    if form.is_integer:
        return all_keys_of(b, bits, form, False)
    top = (1 << (form.bits - 1)) - 1
    size = b.and_(bits, splat(bits.type, top))
    if form.inf + 1 == top:
        return size
    nan = splat(bits.type, form.inf + 1)
    return b.select(b.icmp_unsigned("<", size, nan), size, nan)


def all_keys_of(b: Builder, bits: Value, form: Format, signed: bool) -> Value:
    """The ordered integers of a `Codec`: of magnitudes, or of signed numbers; NaN is all ones. `KEYS` stay."""
    if form in KEYS.values() or form.name.startswith("uint"):
        return bits
    top = 1 << (form.bits - 1)
    if form.is_integer and signed:
        return b.xor(bits, splat(bits.type, top))
    if form.is_integer:
        return b.select(b.icmp_signed("<", bits, splat(bits.type, 0)), b.neg(bits), bits)
    size = b.and_(bits, splat(bits.type, top - 1))
    keys = size
    if signed:
        keys = b.select(b.icmp_signed("<", bits, splat(bits.type, 0)), b.not_(bits), b.or_(bits, splat(bits.type, top)))
        keys = b.select(b.icmp_unsigned("==", size, splat(bits.type, 0)), splat(bits.type, top), keys)
    return b.select(b.icmp_unsigned(">", size, splat(bits.type, form.inf)), splat(bits.type, 2 * top - 1), keys)


def signed_bits_of(b: Builder, keys: Value) -> Value:
    """The bits of signed floats that have these keys, in vectors or not."""
    top = ir.Constant(keys.type, -(1 << (_bits_of(getattr(keys.type, "element", keys.type)) - 1)))
    zero = ir.Constant(keys.type, 0)
    return b.select(b.icmp_signed("<", keys, zero), b.xor(keys, top), b.not_(keys))


Sign = Literal["drop", "any", "keep"]
"""What becomes of the sign of a number that is read: `any` is whatever costs least."""


def single_of(b: Builder, bits: Value, form: Format, sign: Sign = "drop") -> Value:
    """Floats of at most 32 bits, or small integers, as float32."""
    wide, single = vector_of(32, bits.type.count), ir.VectorType(ir.FloatType(), bits.type.count)
    if form.is_integer:
        number = (b.uitofp if form.name.startswith("u") else b.sitofp)(bits, single)
        return call(b, f"llvm.fabs.v{bits.type.count}f32", single, [number]) if sign == "drop" else number
    if sign != "drop" and form.name == "float32":
        return b.bitcast(bits, single)
    if sign == "keep":
        side = b.lshr(bits, splat(bits.type, form.bits - 1))
        size = b.bitcast(single_of(b, bits, form), wide)
        return b.bitcast(b.or_(size, b.shl(b.zext(side, wide), splat(wide, 31))), single)
    size = b.and_(bits, splat(bits.type, (1 << (form.bits - 1)) - 1))
    if form.bits < 32:
        size = b.zext(size, wide)
    if form.name == "float32":
        return b.bitcast(size, single)
    if form.name == "bfloat16":
        return b.bitcast(b.shl(size, splat(wide, 16)), single)
    # The exponent moves into place and is re-biased by an exact product, which also normalises subnormals.
    exponent = {"float16": 5, "float8_e5m2": 5, "float8_e4m3fn": 4}[form.name]
    moved = b.shl(size, splat(wide, 23 - (form.bits - 1 - exponent)))
    scaled = b.fmul(b.bitcast(moved, single), splat(single, 2.0 ** (128 - 2 ** (exponent - 1))))
    special = b.icmp_unsigned(">" if form.name == "float8_e4m3fn" else ">=", size, splat(wide, form.inf))
    return b.select(special, b.bitcast(b.or_(moved, splat(wide, 0x7F800000)), single), scaled)


def rounded_to(b: Builder, single: Value, form: Format) -> Value:
    """Floats of 16 or 32 bits, rounded to nearest from float32 that is neither NaN nor beyond them."""
    wide = vector_of(32, single.type.count)
    bits, narrow_bits = b.bitcast(single, wide), vector_of(form.bits, wide.count)
    if form.name == "float32":
        return bits
    dropped = {"bfloat16": 16, "float16": 13}[form.name]
    odd = b.and_(b.lshr(bits, splat(wide, dropped)), splat(wide, 1))
    half = b.add(odd, splat(wide, (1 << (dropped - 1)) - 1))
    if form.name == "bfloat16":
        return b.trunc(b.lshr(b.add(bits, half), splat(wide, dropped)), narrow_bits)
    side = b.and_(b.lshr(bits, splat(wide, 16)), splat(wide, 1 << 15))
    size = b.and_(bits, splat(wide, (1 << 31) - 1))
    normal = b.lshr(b.sub(b.add(size, half), splat(wide, 112 << 23)), splat(wide, dropped))
    # A subnormal number is rounded where it belongs by adding 0.5.
    shifted = b.fadd(b.bitcast(size, single.type), splat(single.type, 0.5))
    small = b.sub(b.bitcast(shifted, wide), splat(wide, 126 << 23))
    found = b.select(b.icmp_unsigned("<", size, splat(wide, 113 << 23)), small, normal)
    return b.trunc(b.or_(side, found), narrow_bits)


def planes_of(b: Builder, vectors: list[Value]) -> list[Value]:
    """A power of two of adjacent vectors, dealt out: plane p holds every element at p modulo their number."""
    vector = vectors[0].type
    part = QUARTER // _bits_of(vector.element) if has_only_avx2() else vector.count
    if len(vectors) == 1 or part >= vector.count:
        return _planes_in_parts(b, vectors, vector.count)
    # Parts that follow each other, to the same place in all vectors: no element leaves its part then, which takes AVX2
    # an instruction more each time.
    parts = [shuffle(b, v, range(i, i + part)) for v in vectors for i in range(0, vector.count, part)]
    return _planes_in_parts(b, [side_by_side(b, parts[i :: len(vectors)]) for i in range(len(vectors))], part)


def _planes_in_parts(b: Builder, vectors: list[Value], part: int) -> list[Value]:
    """As `planes_of`, in each of the parts of so many elements of which vectors are made."""
    if len(vectors) == 1:
        return vectors
    count = vectors[0].type.count
    starts = [start for first in range(0, count, part) for start in (first, first + count)]
    evens, odds = (
        [
            shuffle(b, x, [start + i for start in starts for i in range(side, part, 2)], y)
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        for side in (0, 1)
    )
    planes = _planes_in_parts(b, evens, part), _planes_in_parts(b, odds, part)
    return [plane for both in zip(*planes, strict=True) for plane in both]


def side_by_side(b: Builder, vectors: Sequence[Value]) -> Value:
    """A power of two of vectors as one."""
    while len(vectors) > 1:
        order = range(2 * vectors[0].type.count)
        vectors = [shuffle(b, x, order, y) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _bits_of(element: Any) -> int:
    """The width of a scalar type."""
    return {"float": 32, "double": 64}.get(str(element)) or int(element.width)


def _size_of(place: Value) -> int:
    """Bytes of what an address points to."""
    return _bits_of(place.type.pointee) // 8


def spare_room(b: Builder, count: int, place: Value) -> Value:
    """Room on the stack for so many numbers like that at an address.

    It is not cleared: what Numba's own way to make it writes with each call was a thirteenth of dropping blocks.
    """
    with b.goto_entry_block():
        return b.bitcast(b.alloca(ir.ArrayType(place.type.pointee, count)), place.type)


def copy_at(b: Builder, source: Value, count: Value, target: Value) -> None:
    """`copy_numbers`, between addresses."""
    if source.type != target.type:
        raise TypeError(f"numbers are copied as memory, from {source.type} not to {target.type}")
    cgutils.raw_memcpy(b, target, source, count, _size_of(source))


def copy_rows(
    b: Builder, source: Value, step: Value, target: Value, distance: Value, rows: Value, count: Value, length: int,
    *, back: bool = False,
) -> None:  # fmt: skip
    """The first `count` of `length` numbers of rows that lie `step` apart, to rows that lie `distance` apart.

    Behind them, zeros are written up to the end of a line, or nothing if rows are copied `back`. By masks, for a call
    of `memcpy` would have the caller store all vectors that it keeps in registers.
    """
    bits = 8 * _size_of(source)
    lanes = min(length, 8 * LINE // bits)
    vector, masks = vector_of(bits, lanes), [first_lanes(b, count, lanes, i) for i in range(0, length, lanes)]
    with cgutils.for_range(b, rows) as row:
        here, there = b.gep(source, [b.mul(row.index, step)]), b.gep(target, [b.mul(row.index, distance)])
        for i, mask in enumerate(masks):
            x, y = (b.gep(at, [INT32(i * lanes)]) for at in (here, there))
            if back:
                store_masked(b, load(b, x, vector), y, mask)
            else:
                store(b, load_masked(b, x, vector, mask), y)


def first_lanes(b: Builder, count: Value, lanes: int, start: int = 0) -> Value:
    """Whether each lane, counted from `start` on, is one of the first `count`."""
    border = broadcast(b, b.trunc(count, INT32), lanes)
    return b.icmp_signed("<", ir.Constant(border.type, list(range(start, start + lanes))), border)


def load_masked(b: Builder, address: Value, vector: ir.VectorType, mask: Value) -> Value:
    """Integers from memory where the mask is true, else zeros."""
    place = b.bitcast(address, vector.as_pointer())
    return _masked(b, "load", vector, vector, [place, INT32(max(1, vector.element.width // 8)), mask, splat(vector, 0)])


def store_masked(b: Builder, value: Value, address: Value, mask: Value) -> None:
    """Integers to memory where the mask is true."""
    vector, place = value.type, b.bitcast(address, value.type.as_pointer())
    _masked(b, "store", vector, ir.VoidType(), [value, place, INT32(max(1, vector.element.width // 8)), mask])


def _masked(b: Builder, name: str, vector: Any, result: Any, args: Sequence[Value]) -> Value:
    name = f"llvm.masked.{name}.v{vector.count}i{vector.element.width}.p0"
    return b.call(b.module.declare_intrinsic(name, (), ir.FunctionType(result, [a.type for a in args])), args)


copy_numbers = step(copy_at, 5)
"""``copy_numbers(source, i, count, target, j)``: `count` numbers of one type from an array to another."""
