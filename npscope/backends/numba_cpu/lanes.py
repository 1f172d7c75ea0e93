"""Formulas on vectors: Python's operators write the instructions of LLVM.

A formula that Numba compiles is typed operation by operation, and made a vector by LLVM's vectoriser, if it does;
that takes ten times as long as to write the vector code itself.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from npscope.backends.numba_cpu.vectors import Builder, Value, call, fma, on_floats, splat


class Lanes:
    """A vector of floats, or of truth values, on which operators work as on NumPy's arrays.

    Comparisons with NaN are false, and its own `is_nan` true.
    """

    __slots__ = ("b", "value")

    def __init__(self, b: Builder, value: Value) -> None:
        self.b, self.value = b, value

    def _of(self, other: Lanes | float) -> Value:
        return other.value if isinstance(other, Lanes) else splat(self.value.type, other)

    def _new(self, value: Value) -> Lanes:
        return Lanes(self.b, value)

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fadd(self.value, self._of(other)))

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fsub(self.value, self._of(other)))

    def __rsub__(self, other: float) -> Lanes:
        return self._new(self.b.fsub(self._of(other), self.value))

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fmul(self.value, self._of(other)))

    def __truediv__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fdiv(self.value, self._of(other)))

    def __rtruediv__(self, other: float) -> Lanes:
        return self._new(self.b.fdiv(self._of(other), self.value))

    __radd__, __rmul__ = __add__, __mul__

    def __lt__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fcmp_ordered("<", self.value, self._of(other)))

    def __le__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fcmp_ordered("<=", self.value, self._of(other)))

    def __gt__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fcmp_ordered(">", self.value, self._of(other)))

    def __ge__(self, other: Lanes | float) -> Lanes:
        return self._new(self.b.fcmp_ordered(">=", self.value, self._of(other)))

    def __and__(self, other: Lanes) -> Lanes:
        return self._new(self.b.and_(self.value, other.value))

    def __or__(self, other: Lanes) -> Lanes:
        return self._new(self.b.or_(self.value, other.value))

    def __invert__(self) -> Lanes:
        return self._new(self.b.not_(self.value))

    def is_equal(self, other: Lanes | float) -> Lanes:
        """Where they are the same number; 0.0 and -0.0 are."""
        return self._new(self.b.fcmp_ordered("==", self.value, self._of(other)))

    def is_nan(self) -> Lanes:
        """Where they are NaN."""
        return self._new(self.b.fcmp_unordered("uno", self.value, self.value))

    def root(self) -> Lanes:
        """Their square roots."""
        return self._new(on_floats(self.b, "sqrt", self.value))

    def size(self) -> Lanes:
        """Their magnitudes."""
        return self._new(on_floats(self.b, "fabs", self.value))

    def to(self, element: ir.Type) -> Lanes:
        """As floats of another width, rounded."""
        vector = ir.VectorType(element, self.value.type.count)
        if vector == self.value.type:
            return self
        wider = isinstance(element, ir.DoubleType)
        return self._new((self.b.fpext if wider else self.b.fptrunc)(self.value, vector))

    def times_plus(self, other: Lanes, more: Lanes) -> Lanes:
        """``self * other + more``, rounded once."""
        return self._new(fma(self.b, self.value, other.value, more.value))

    def count(self) -> Value:
        """How many truth values are true, as an int64."""
        word, lanes = ir.IntType(64), self.value.type.count
        bits = self.b.bitcast(self.value, ir.IntType(lanes))
        return self.b.zext(call(self.b, f"llvm.ctpop.i{lanes}", bits.type, [bits]), word)


def choose(condition: Lanes, yes: Lanes | float, no: Lanes | float) -> Lanes:
    """The first where the condition holds, else the second; one of them at least is a vector."""
    like: Any = yes if isinstance(yes, Lanes) else no
    return Lanes(like.b, like.b.select(condition.value, like._of(yes), like._of(no)))
