"""What npscope knows of a dtype: its kind, the dtype of its norms, and what may be done with it.

Dtypes are known by name, so that NumPy, ml_dtypes, CuPy, torch and JAX share one table
and none of them needs to be imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from npscope.errors import KindError


class Kind(NamedTuple):
    """One row of the table: `norm` is the name of the norm's dtype."""

    name: str
    family: Literal["float", "complex", "int", "uint"]
    norm: Literal["float32", "float64"]
    shrinkable: bool

    @property
    def is_complex(self) -> bool:
        """Complex numbers have magnitudes but no order of their own."""
        return self.family == "complex"

    @property
    def is_integer(self) -> bool:
        """Signed or unsigned integer."""
        return self.family in ("int", "uint")

    @property
    def is_wide_integer(self) -> bool:
        """Integers whose magnitudes a float64 cannot tell apart: ranked as integers."""
        return self.name in ("int64", "uint64")

    @property
    def rounds_correctly(self) -> bool:
        """Real and below float64: norms of ord 1, 2 and inf are correctly rounded."""
        return self.norm == "float32" and not self.is_complex


_KINDS = {
    kind.name: kind
    for kind in (
        Kind("float8_e4m3fn", "float", "float32", False),
        Kind("float8_e5m2", "float", "float32", False),
        Kind("float16", "float", "float32", True),
        Kind("bfloat16", "float", "float32", True),
        Kind("float32", "float", "float32", True),
        Kind("float64", "float", "float64", True),
        Kind("complex64", "complex", "float32", True),
        Kind("complex128", "complex", "float64", True),
        Kind("int8", "int", "float32", False),
        Kind("int16", "int", "float32", False),
        Kind("int32", "int", "float64", False),
        Kind("int64", "int", "float64", False),
        Kind("uint8", "uint", "float32", False),
        Kind("uint16", "uint", "float32", False),
        Kind("uint32", "uint", "float64", False),
        Kind("uint64", "uint", "float64", False),
    )
}


def dtype_name(dtype: Any) -> str:
    """The bare name of a dtype of any array library: ``float32``, ``bfloat16``.

    >>> import numpy
    >>> dtype_name(numpy.dtype(">f4"))
    'float32'
    """
    return str(getattr(dtype, "name", dtype)).rpartition(".")[2]


@lru_cache(maxsize=256, typed=True)  # typed: the dtypes of two libraries must not be compared
def kind_of(dtype: Any) -> Kind:
    """The row of `dtype`; KindError names what is served when it is not in the table."""
    kind = _KINDS.get(dtype_name(dtype))
    if kind is None:
        raise KindError(f"dtype {dtype} is not supported; supported are {', '.join(_KINDS)}")
    return kind


def common_norm(kinds: Iterable[Kind]) -> Literal["float32", "float64"]:
    """The dtype in which blocks of these kinds compete: float64 as soon as one of them needs it."""
    return "float64" if any(kind.norm == "float64" for kind in kinds) else "float32"
