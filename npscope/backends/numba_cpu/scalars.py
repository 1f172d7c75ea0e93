"""Operations on numbers that cost nothing to compile: intrinsics for what Numba would compile a function for.

Its `min`, `max` and `.view` are functions in Python, compiled for every combination of types: 20 ms each,
a tenth of the first call of a kernel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from npscope.backends.numba_cpu.jit import intrinsic_of

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
