"""Loop nests in memory: an int64 array of two rows, the sizes (at least 1) of the loops and the steps between turns.

Every kernel asks where an index lies. As functions in Python these two took a tenth of a second of its compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from npscope.backends.numba_cpu.jit import intrinsic_of

_INT = ir.IntType(64)

NEST = types.Array(types.int64, 2, "C")
"""The type of a nest."""


def _on_nest(name: str, doc: str, count: int, emit: Callable[..., Any]) -> Any:
    """An intrinsic whose last argument is a nest: ``emit(builder, loops, size_of, step_of, *others)`` writes it."""

    def typed(typing_context: Any, *args: Any) -> Any:
        nest = args[-1]
        if not isinstance(nest, types.Array) or (nest.dtype, nest.ndim, nest.layout) != (NEST.dtype, 2, "C"):
            return None
        if not all(isinstance(arg, types.Integer) for arg in args[:-1]):
            return None

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            array = context.make_array(nest)(context, builder, values[-1])
            loops = builder.extract_value(array.shape, 1)

            def size_of(d: Any) -> Any:
                return builder.load(builder.gep(array.data, [d]))

            def step_of(d: Any) -> Any:
                return size_of(builder.add(loops, d))

            return emit(builder, loops, size_of, step_of, *values[:-1])

        return types.int64(*[types.int64] * (count - 1), nest), generate

    return intrinsic_of(typed, name, doc, count)


def short_loop(b: Any, count: Any, body: Callable[[Any], None]) -> None:
    """``body(0 .. count - 1)`` as a loop that LLVM leaves one: unrolled, they were half of a kernel's machine code."""
    before, turn, after = b.block, b.append_basic_block("turn"), b.append_basic_block("after")
    b.cbranch(b.icmp_signed(">", count, _INT(0)), turn, after)
    b.position_at_end(turn)
    index = b.phi(_INT)
    index.add_incoming(_INT(0), before)
    body(index)
    following = b.add(index, _INT(1))
    index.add_incoming(following, b.block)
    back = b.cbranch(b.icmp_signed("<", following, count), turn, after)
    advice = b.module.add_metadata(["llvm.loop.unroll.disable"])
    loop = ir.values.MDValue(b.module, [advice], name=str(len(b.module.metadata)))
    loop.operands = (loop, *loop.operands)  # LLVM tells loops by nodes that hold themselves
    back.set_metadata("llvm.loop", loop)
    b.position_at_end(after)


def place_in(b: Any, nest: Any, loops: Any, index: Any) -> Any:
    """`place`, for code that LLVM is given: `nest` is the address of a table of so many loops."""
    return _emit_place(
        b, loops, lambda d: b.load(b.gep(nest, [d])), lambda d: b.load(b.gep(nest, [b.add(loops, d)])), index
    )


def length_in(b: Any, nest: Any, loops: Any) -> Any:
    """`length_of`, as `place_in`."""
    return _emit_length(b, loops, lambda d: b.load(b.gep(nest, [d])), None)


def _emit_place(b: Any, loops: Any, size_of: Any, step_of: Any, index: Any) -> Any:
    i, offset = cgutils.alloca_once_value(b, index), cgutils.alloca_once_value(b, _INT(0))
    inner = b.sub(loops, _INT(1))

    def take(turn: Any) -> None:  # the innermost loop first
        d = b.sub(inner, turn)
        outer = b.sdiv(b.load(i), size_of(d))
        turn = b.sub(b.load(i), b.mul(outer, size_of(d)))
        b.store(b.add(b.load(offset), b.mul(turn, step_of(d))), offset)
        b.store(outer, i)

    short_loop(b, inner, take)
    return b.add(b.load(offset), b.mul(b.load(i), step_of(_INT(0))))


def _emit_length(b: Any, loops: Any, size_of: Any, step_of: Any) -> Any:
    total = cgutils.alloca_once_value(b, _INT(1))
    short_loop(b, loops, lambda d: b.store(b.mul(b.load(total), size_of(d)), total))
    return b.load(total)


place = _on_nest("place", "``place(i, nest)``: where turn `i` of a nest lies, from its start.", 2, _emit_place)
length_of = _on_nest("length_of", "``length_of(nest)``: how many turns a nest makes.", 1, _emit_length)
