"""Operations on numbers that cost nothing to compile: intrinsics for what Numba would compile a function for.

Its `min`, `max` and `.view` are functions in Python, compiled for every combination of types: 20 ms each,
a tenth of the first call of a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from npscope.backends.numba_cpu.jit import intrinsic_of
from npscope.backends.numba_cpu.vectors import (
    INT32,
    Format,
    all_keys_of,
    rounded_to,
    signed_bits_of,
    single_of,
    vector_of,
)

SAFE_LEAST = 1e-280
"""A sum of squares of float64 from here to infinity lost nothing to under- or overflow."""

_FLOAT_OF = {types.uint32: types.float32, types.uint64: types.float64}
_BITS_OF = {number: bits for bits, number in _FLOAT_OF.items()}
_LLVM = {
    types.uint32: ir.IntType(32),
    types.uint64: ir.IntType(64),
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
}


def _bitcast(name: str, result_of: dict[Any, Any], doc: str) -> Any:
    def typed(typing_context: Any, number: Any) -> Any:
        result = result_of.get(number)
        if result is None:
            return None

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.bitcast(values[0], _LLVM[result])

        return result(number), generate

    return intrinsic_of(typed, name, doc, 1)


def _or_zero(typing_context: Any, number: Any, kept: Any) -> Any:
    if not isinstance(number, types.Number) or not isinstance(kept, types.Boolean):
        return None

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        raw, kept = values
        word = ir.IntType(context.get_abi_sizeof(raw.type) * 8)
        # What LLVM knows nothing about: else it branches around the load of the number, as often mistaken as not.
        unknown = ir.InlineAsm(ir.FunctionType(word, [word]), "", "=r,0", side_effect=False)
        return builder.select(
            kept, builder.bitcast(builder.call(unknown, [builder.bitcast(raw, word)]), raw.type), raw.type(0)
        )

    return number(number, kept), generate


or_zero = intrinsic_of(_or_zero, "or_zero", "``or_zero(number, kept)``: the number, or 0 unless `kept`; no branch.", 2)


def _choice(name: str, extreme: str, doc: str) -> Any:
    def typed(typing_context: Any, a: Any, b: Any) -> Any:
        common: Any = typing_context.unify_types(types.unliteral(a), types.unliteral(b))
        if common not in types.integer_domain:
            return None

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            word = values[0].type
            intrinsic_name = f"llvm.{'s' if common.signed else 'u'}{extreme}.i{common.bitwidth}"
            function = builder.module.declare_intrinsic(intrinsic_name, (), ir.FunctionType(word, [word, word]))
            return builder.call(function, values)

        return common(common, common), generate

    return intrinsic_of(typed, name, doc, 2)


bits_of = _bitcast("bits_of", _BITS_OF, "The bits of a float32 or float64, as an unsigned integer of its width.")
float_of = _bitcast("float_of", _FLOAT_OF, "The float32 or float64 of these bits, an unsigned integer of its width.")
least = _choice("least", "min", "The smaller of two integers.")
greatest = _choice("greatest", "max", "The larger of two integers.")


# --- ordered integers as numbers -----------------------------------------------------------------


def _on_keys(name: str, argument: Any, result: Any, emit: Callable[..., Any], doc: str) -> Any:
    """An intrinsic of a number and an array of keys, of which it only knows how wide they are."""

    def typed(typing_context: Any, number: Any, keys: Any) -> tuple[Any, Callable[..., Any]]:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return emit(builder, values[0], keys.dtype.bitwidth)

        return result(argument, keys), generate

    return intrinsic_of(typed, name, doc, 2)


def emit_float_of_key(b: Any, key: Any, form: Format) -> Any:
    """`float_of_signed_key`, for code that LLVM is given."""
    if form.bits == 64:
        return b.bitcast(signed_bits_of(b, key), ir.DoubleType())
    word = b.trunc(key, ir.IntType(form.bits))
    bits = b.bitcast(signed_bits_of(b, word), vector_of(form.bits, 1))
    return b.fpext(b.extract_element(single_of(b, bits, form, "keep"), INT32(0)), ir.DoubleType())


def emit_key_near_float(b: Any, number: Any, form: Format) -> Any:
    """The key of the float near a number, as `emit_float_of_key`; of one that is beyond them or NaN, any."""
    if form.bits == 64:
        bits = b.bitcast(number, vector_of(64, 1))
    else:
        single = b.bitcast(b.fptrunc(number, ir.FloatType()), ir.VectorType(ir.FloatType(), 1))
        bits = rounded_to(b, single, form)
    key = b.extract_element(all_keys_of(b, bits, form, True), INT32(0))
    return key if form.bits == 64 else b.zext(key, ir.IntType(64))


def numbers_within(signed: Format | None) -> tuple[float, float]:
    """The least number that has a key, and a bound of them: of `signed` floats, or where keys are their own numbers."""
    if signed is None:
        return 0.0, 1.8e19
    largest = {"float16": 65504.0, "bfloat16": 2.0**128 - 2.0**120}.get(signed.name)
    return (-np.finfo(np.float64).max, np.inf) if largest is None else (-largest, largest)


def _key_at(b: Any, number: Any, bits: int, signed: Format | None) -> Any:
    word, (first, beyond) = ir.IntType(64), numbers_within(signed)
    near = b.fptoui(number, word) if signed is None else emit_key_near_float(b, number, signed)
    last, zero = word((1 << bits) - 1), word(0)
    near = b.select(b.icmp_unsigned("<", near, last), near, last)
    near = b.select(b.fcmp_ordered(">=", number, number.type(beyond)), last, near)
    return b.select(b.fcmp_ordered(">=", number, number.type(first)), near, zero)


number_of_key = _on_keys(
    "number_of_key", types.uint64, types.float64, lambda b, key, bits: b.uitofp(key, ir.DoubleType()),
    "``number_of_key(key, keys)``: the key as a float64.",
)  # fmt: skip
key_at = _on_keys(
    "key_at", types.float64, types.uint64, lambda b, number, bits: _key_at(b, number, bits, None),
    "``key_at(number, keys)``: the last key up to a number; the first or the last of all for numbers beyond, or NaN.",
)  # fmt: skip


@cache
def float_of_signed_key(form: Format) -> Any:
    """``float_of_key(key, keys)``: the float of this format that it is the key of, as a float64."""
    return _on_keys(
        "float_of_key", types.uint64, types.float64, lambda b, key, bits: emit_float_of_key(b, key, form),
        "``float_of_key(key, keys)``: see `float_of_signed_key`.",
    )  # fmt: skip


@cache
def signed_key_at(form: Format) -> Any:
    """``key_at(number, keys)``: the key of the float of this format near a number; else as `key_at`."""
    return _on_keys(
        "key_at", types.float64, types.uint64, lambda b, number, bits: _key_at(b, number, bits, form),
        "``key_at(number, keys)``: see `signed_key_at`.",
    )  # fmt: skip
