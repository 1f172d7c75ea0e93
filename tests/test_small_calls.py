"""A call on a small array costs what its kernel costs and a little Python: counted in calls, since clocks waver."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

import npscope
from npscope import BlockSpec, ScopeSpec
from npscope.axes import array_namespace
from npscope.operands import is_cupy

MOST_CALLS = 190
"""Functions, built-in ones included, that a warm call may enter; they take about 0.1 us each."""

MOST_ADDED = 60
"""What the method of a spec may enter beyond the function."""


def calls_of(function: Callable[[], object]) -> int:
    """How many functions `function` enters when it is warm."""
    entered = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal entered
        entered += event in ("call", "c_call")

    for _ in range(3):
        function()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return entered


def small() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_small_prune_enters_few_functions(in_place):
    x = small()
    out = x if in_place else None
    with npscope.use_backend("numba"):
        assert calls_of(lambda: npscope.keep_largest(x, 2, (1, 1), (1, 4), out=out)) <= MOST_CALLS


@pytest.mark.parametrize("shape", [(), (1, 1), (64, 1), (64, 16)])
def test_equal_counts_are_one(shape):
    x, counts = small(), np.full(shape, 2)
    with npscope.use_backend("numba"):
        expected = npscope.keep_largest(x, 2, (1, 1), (1, 4))
        assert np.array_equal(npscope.keep_largest(x, counts, (1, 1), (1, 4)), expected)
        assert calls_of(lambda: npscope.keep_largest(x, counts, (1, 1), (1, 4))) <= MOST_CALLS


def test_small_norms_enter_few_functions():
    x = small()
    with npscope.use_backend("numba"):
        assert calls_of(lambda: npscope.block_norms(x, (4, 4))) <= MOST_CALLS


def test_a_spec_built_once_adds_little():
    x = small()
    spec = ScopeSpec(BlockSpec(x, (1, 1)), (1, 4))
    with npscope.use_backend("numba"):
        function = calls_of(lambda: npscope.keep_largest(x, 2, (1, 1), (1, 4), out=x))
        assert calls_of(lambda: spec.hard_threshold(nnz=2)) <= function + MOST_ADDED


@pytest.mark.parametrize("wrong", [True, 1.0, "1"])
def test_what_is_remembered_of_integers_serves_nothing_that_equals_them(wrong):
    x = np.ones((4, 4), dtype=np.float32)
    npscope.keep_largest(x, 1, (1, 1), (1, 4))
    for nnz, block, scope in ((wrong, (1, 1), (1, 4)), (1, (wrong, 1), (1, 4)), (1, (1, 1), (wrong, 4))):
        with pytest.raises(npscope.KindError):
            npscope.keep_largest(x, nnz, block, scope)


def test_the_namespace_of_an_array_is_its_own_not_that_of_its_type():
    """A type may serve several namespaces."""
    spaces = [ModuleType(name) for name in ("one", "another")]

    class Foreign:
        def __init__(self, space: ModuleType) -> None:
            self.space = space

        def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
            return self.space

    for space in (*spaces, *spaces):
        assert array_namespace(Foreign(space)) is space
        assert not is_cupy(Foreign(space))


@pytest.mark.parametrize(("module", "name", "found"), [("cupy", "ndarray", True), ("cupy", "matrix", False)])
def test_arrays_of_cupy_are_told_by_the_module_and_name_of_their_type(module, name, found):
    """Now, not when a type was first seen."""
    kind = type("Other", (), {})
    assert not is_cupy(kind())
    kind.__module__, kind.__name__ = module, name
    assert is_cupy(kind()) is found


def test_what_is_remembered_of_a_call_keeps_no_array_alive():
    x = small()
    alive = [weakref.ref(a) for a in (x, npscope.keep_largest(x, 2, (1, 1), (1, 4)), npscope.block_norms(x, (4, 4)))]
    npscope.keep_largest(x, np.full((64, 16), 2), (1, 1), (1, 4), out=x)
    del x
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_arrays_that_look_alike_but_lie_otherwise_are_told_apart(backend):
    """Same shape, strides and dtype: only flags, alignment or byte order differ between these."""
    plain = small()
    expected = npscope.keep_largest(plain, 2, (1, 1), (1, 4))
    read_only = plain.copy()
    read_only.flags.writeable = False
    memory = np.zeros(plain.nbytes + 1, dtype=np.uint8)
    unaligned = memory[1:].view(np.float32).reshape(plain.shape)
    unaligned[...] = plain
    swapped = plain.astype(">f4")
    for x in (plain, read_only, unaligned, swapped, plain):
        result = npscope.keep_largest(x, 2, (1, 1), (1, 4))
        assert result.dtype == x.dtype
        np.testing.assert_array_equal(result, expected)


def test_few_work_arrays_are_kept():
    loans = pytest.importorskip("npscope.backends.numba_cpu.loans")
    made = []

    class Arrays:
        def __init__(self, nbytes):
            self.nbytes = nbytes
            made.append(self)

    held = [loans.Loan(Arrays, 100) for _ in range(loans.KEPT_EACH + 3)]
    assert len(made) == len(held)
    held.clear()
    again = [loans.Loan(Arrays, 100) for _ in range(loans.KEPT_EACH + 1)]
    assert len(made) == loans.KEPT_EACH + 3 + 1  # the kept ones, and one more
    assert len({id(loan.work) for loan in again}) == len(again)
    del again
    large = loans.Loan(Arrays, loans.KEPT_BYTES + 1)
    work = large.work
    del large
    assert loans.Loan(Arrays, loans.KEPT_BYTES + 1).work is not work
