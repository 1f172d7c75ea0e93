"""The functions as callers of NumPy see them: out=, layouts, byte order, alignment, types, backends, devices."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import oracles as o
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import FINITE, NAN_BITS, Problem, dtype, hostile, layouts, place, problems, same_bits

import npscope

WRITERS = {
    "keep_largest": lambda p, x, **kw: npscope.keep_largest(x, p.count // 2, p.block, p.scope, **kw),
    "hard_threshold": lambda p, x, **kw: npscope.hard_threshold(x, 0.7, p.block, **kw),
    "soft_threshold": lambda p, x, **kw: npscope.soft_threshold(x, 0.7, p.block, **kw),
    "conditioned": lambda p, x, **kw: npscope.soft_threshold(x, 0.7, p.block, conditioner=metric(x), **kw),
}
DTYPES = ("float32", "float16", "bfloat16")
writers = pytest.mark.parametrize("writer", WRITERS)


def metric(x: np.ndarray) -> np.ndarray:
    return np.linspace(0.5, 2, max(x.size, 1), dtype=np.float32)[: x.size].reshape(x.shape)


def assert_agree(writer: str, got: np.ndarray, expected: np.ndarray) -> None:
    """Selections agree bit for bit; shrunk values have the same zeros and NaN and differ by 1 ulp at most."""
    if writer in ("keep_largest", "hard_threshold"):
        assert same_bits(got, expected)
        return
    with np.errstate(invalid="ignore"):
        kept = np.asarray((expected == 0) | (expected != expected))
    assert same_bits(got[kept], expected[kept])
    signed = np.dtype(f"i{expected.itemsize}")
    distance = np.ascontiguousarray(got).view(signed).astype("i8") - np.ascontiguousarray(expected).view(signed)
    assert (np.abs(distance[~kept]) <= 1).all()


# --- out= ----------------------------------------------------------------------------------------


@writers
@given(data=st.data())
def test_out_none_new_and_itself_agree_in_any_layout(backend, writer, data):
    p = data.draw(problems(DTYPES, kinds=("normal", "two_valued", "nan_payloads", "signed_zeros"), max_axes=4))
    operation, before = WRITERS[writer], p.x.copy()
    expected = operation(p, p.x)
    assert same_bits(p.x, before), "a pure function must not write its argument"
    assert not np.shares_memory(expected, p.x)
    source = place(p.x, data.draw(layouts(p.x.ndim)))
    result = operation(p, source.view)
    assert_agree(writer, result, expected)
    target = place(np.zeros_like(p.x), data.draw(layouts(p.x.ndim)), fill=3)
    assert operation(p, source.view, out=target.view) is target.view
    assert_agree(writer, target.view, expected)
    assert operation(p, source.view, out=source.view) is source.view
    assert_agree(writer, source.view, expected)
    for placed, fill in ((source, 1), (target, 3)):
        assert (placed.base[~placed.visited] == fill).all(), "only visited cells change"


@pytest.mark.parametrize("orders", ["CCF", "CFC", "CFF", "FCC", "FCF", "FFC"])
@pytest.mark.parametrize("block", [(1, 4), (4, 1), (2, 4), (4, 8)])
def test_out_in_another_memory_order(backend, block, orders):
    """Elements, metric and result each in C or Fortran order: the element order of one must not serve another."""
    x = np.asarray(hostile("normal", (8, 8), "float32", 15), order=orders[0])
    h = np.asarray(metric(x.copy("C")), order=orders[1])
    expected = npscope.soft_threshold(x, 0.7, block, conditioner=h)
    out = np.zeros((8, 8), dtype=np.float32, order=orders[2])
    assert npscope.soft_threshold(x, 0.7, block, conditioner=h, out=out) is out
    assert np.array_equal(out, expected)
    assert_agree("conditioned", out, npscope.soft_threshold(x.copy("C"), 0.7, block, conditioner=h.copy("C")))


@given(data=st.data())
def test_norms_and_masks_of_any_layout(backend, data):
    p = data.draw(problems(("float32", "bfloat16", "int16"), max_axes=4))
    view = place(p.x, data.draw(layouts(p.x.ndim))).view
    norms = npscope.block_norms(p.x, p.block)
    assert same_bits(npscope.block_norms(view, p.block), norms)
    out = place(np.zeros_like(norms), data.draw(layouts(norms.ndim)))
    assert npscope.block_norms(view, p.block, out=out.view) is out.view
    assert same_bits(out.view, norms)
    assert (out.base[~out.visited] == 1).all()
    nnz = p.count // 2
    assert same_bits(npscope.block_mask(view, nnz, p.block, p.scope), npscope.block_mask(p.x, nnz, p.block, p.scope))


@given(data=st.data())
def test_signed_ranking_of_any_layout(backend, data):
    x = hostile(data.draw(st.sampled_from(FINITE)), (2, 3, 4), "float32", data.draw(st.integers(0, 999)))
    view = place(x, data.draw(layouts(3))).view
    for axis in (None, 0, 1, -1):
        n = x.size if axis is None else x.shape[axis]
        k = data.draw(st.integers(1, n))
        assert same_bits(npscope.topk_mask(view, k, axis), o.topk_mask(x, k, axis))
        assert same_bits(npscope.kth_largest(view, k, axis), o.kth_largest(x, k, axis))


def test_float64_layouts_give_equal_masks_when_norms_are_apart(backend, rng):
    x = rng.permutation(np.arange(1.0, 193.0)).reshape(8, 24)
    expected = npscope.block_mask(x, 5, (2, 3), (2, -1))
    for view in (np.asfortranarray(x), np.ascontiguousarray(x.T).T, x[::-1].copy()[::-1], np.repeat(x, 2, 1)[:, ::2]):
        assert same_bits(npscope.block_mask(view, 5, (2, 3), (2, -1)), expected)


# --- byte order, alignment, read-only ------------------------------------------------------------


def misaligned(x: np.ndarray) -> np.ndarray:
    raw = np.zeros(x.nbytes + 1, dtype=np.uint8)
    result = raw[1:].view(x.dtype).reshape(x.shape)
    result[...] = x
    assert not result.flags.aligned or x.itemsize == 1
    return result


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *((name, "big-endian") for name in ("float16", "float32", "complex64", "int64")),
        *(("float32", form) for form in ("unaligned", "both", "unaligned transposed")),
    ],
)
def test_foreign_memory_gives_the_same_result(backend, name, form):
    x = hostile("normal", (6, 8), name, 21)
    y = x.astype(x.dtype.newbyteorder(">")) if form in ("big-endian", "both") else x
    y = misaligned(y) if form in ("unaligned", "both") else y
    y = misaligned(y.T.copy()).T if form == "unaligned transposed" else y
    expected = npscope.keep_largest(x, 3, (2, 1), (1, -1))
    got = npscope.keep_largest(y, 3, (2, 1), (1, -1))
    assert got.dtype == y.dtype
    assert np.array_equal(got, expected)
    assert npscope.block_norms(y, (2, 2)).dtype.isnative
    norms = npscope.block_norms(y, (2, 2))
    np.testing.assert_allclose(norms, npscope.block_norms(x, (2, 2)), rtol=2e-15 if norms.dtype == "f8" else 0)
    assert np.array_equal(npscope.block_mask(y, 3, (2, 1), (1, -1)), npscope.block_mask(x, 3, (2, 1), (1, -1)))
    assert npscope.keep_largest(y, 3, (2, 1), (1, -1), out=y) is y
    assert np.array_equal(y, expected)


@pytest.mark.parametrize("name", ["float32", "complex128"])
def test_shrinkage_of_foreign_memory(backend, name):
    x = hostile("normal", (6, 8), name, 22)
    h = metric(x.real)
    expected = npscope.soft_threshold(x, 0.5, (2, 2), conditioner=h)
    y = misaligned(x.astype(x.dtype.newbyteorder(">")))
    got = npscope.soft_threshold(y, np.asarray(0.5, ">f4"), (2, 2), conditioner=misaligned(h.astype(">f4")), out=y)
    assert got is y
    assert same_bits(y.astype(x.dtype), expected)


@pytest.mark.parametrize("name", ["float32", "int64", "float16"])
def test_signed_ranking_of_foreign_memory(backend, name):
    x = hostile("normal", (4, 9), name, 23)
    y = misaligned(x.astype(x.dtype.newbyteorder(">")))
    assert same_bits(npscope.topk_mask(y, 4), npscope.topk_mask(x, 4))
    assert npscope.kth_largest(y, 4).tolist() == npscope.kth_largest(x, 4).tolist()
    assert npscope.kth_largest(y, 4).dtype == y.dtype


def test_nan_bits_survive_a_swap(backend):
    x = np.asarray(NAN_BITS["float32"], dtype=np.uint32).astype(">u4").view(">f4").reshape(1, 4)
    assert same_bits(npscope.keep_largest(x, 4, (), (1, -1)), x)
    assert same_bits(npscope.keep_largest(x, 3, (), (1, -1))[:, :3], x[:, :3])


def test_large_foreign_arrays(backend, rng):
    """Longer than the 1 MiB slab in which foreign memory is translated."""
    x = rng.standard_normal((8, 50_000)).astype(np.float32)
    y = x.astype(">f4")
    assert np.array_equal(npscope.block_norms(y, (8, -1)), npscope.block_norms(x, (8, -1)))
    assert np.array_equal(npscope.keep_largest(y, 1000, (4, 4), (-1,)), npscope.keep_largest(x, 1000, (4, 4), (-1,)))


@writers
def test_read_only_input_works_and_read_only_out_does_not(backend, writer):
    p = problems_example()
    p.x.flags.writeable = False
    result = WRITERS[writer](p, p.x)
    assert result.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        WRITERS[writer](p, p.x, out=p.x)


def problems_example() -> Problem:
    return Problem(hostile("normal", (4, 6), "float32", 3), (2, 1), (1, -1), 6, (2, 6))


def test_memory_maps(backend, tmp_path):
    path = tmp_path / "x.npy"
    x = hostile("normal", (6, 8), "float32", 4)
    np.save(path, x)
    mapped = np.load(path, mmap_mode="r+")
    expected = npscope.keep_largest(x, 2, (), (1, 4))
    assert same_bits(npscope.keep_largest(mapped, 2, (), (1, 4)), expected)
    npscope.keep_largest(mapped, 2, (), (1, 4), out=mapped)
    mapped.flush()
    assert same_bits(np.load(path), expected)


# --- overlap -------------------------------------------------------------------------------------


@writers
@pytest.mark.parametrize("shift", [1, -1, 3])
def test_partial_overlap_is_refused(backend, writer, shift):
    p = problems_example()
    base = np.resize(p.x, (4, 12)).astype(np.float32)
    x, out = base[:, 3:9], base[:, 3 + shift : 9 + shift]
    before = base.copy()
    with pytest.raises(ValueError, match="overlap"):
        WRITERS[writer](p, x, out=out)
    assert same_bits(base, before)


def test_interleaved_windows_are_no_overlap(backend):
    base = hostile("normal", (4, 12), "float32", 6)
    x, out = base[:, ::2], base[:, 1::2]
    expected = npscope.keep_largest(x.copy(), 2, (), (1, -1))
    assert same_bits(npscope.keep_largest(x, 2, (), (1, -1), out=out), expected)


READERS = {
    "keep_largest": lambda x, other, **kw: npscope.keep_largest(x, 2, (), (1, -1), scores=other, **kw),
    "hard_threshold": lambda x, other, **kw: npscope.hard_threshold(x, 1.5, (1, 2), scores=other, **kw),
    "soft_threshold": lambda x, other, **kw: npscope.soft_threshold(x, 0.5, (1, 2), conditioner=other, **kw),
}


@pytest.mark.parametrize("start", [2, 1, 0])
@pytest.mark.parametrize("reader", READERS)
def test_out_must_not_be_what_is_read(backend, reader, start):
    """Scores and conditioners may not share memory with an `out` that is not `x`, not even as the same window."""
    x = hostile("normal", (2, 4), "float32", 16)
    base = np.ones((2, 6), dtype=np.float32)
    other, out = base[:, :4], base[:, start : start + 4]
    with pytest.raises(npscope.SpecError, match="conditioner" if reader == "soft_threshold" else "scores"):
        READERS[reader](x, other, out=out)
    assert (base == 1).all()


@pytest.mark.parametrize("reader", READERS)
def test_out_scores_and_conditioner_may_all_be_x(backend, reader):
    x = np.abs(hostile("normal", (2, 4), "float32", 17)) + np.float32(0.1)
    expected = READERS[reader](x, x.copy())
    for other in (lambda y: y, lambda y: y[:]):
        y = x.copy()
        assert READERS[reader](y, other(y), out=y) is y
        assert same_bits(y, expected)


def test_one_array_may_be_data_scores_and_conditioner(backend):
    x = np.abs(hostile("normal", (4, 8), "float32", 8)) + np.float32(0.1)
    expected = npscope.keep_largest(x, 2, (), (1, 4))
    shrunk = npscope.soft_threshold(x, 0.2, (1, 2), conditioner=x.copy())
    assert same_bits(npscope.soft_threshold(x, 0.2, (1, 2), conditioner=x), shrunk)
    y = x.copy()
    assert same_bits(npscope.soft_threshold(y, 0.2, (1, 2), conditioner=y, out=y), shrunk)
    assert same_bits(npscope.keep_largest(x, 2, (), (1, 4), scores=x, out=x), expected)


# --- shape, type, memory -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1), (1,) * 33, (1,) * 64])
def test_odd_shapes(xp, shape):
    x = np.full(shape, -2.0, dtype=np.float32)
    block, scope = (1,) * len(shape), ()
    blocks = 1  # per scope: the whole grid, but for empty axes
    assert xp.call(npscope.block_norms, x, block).shape == shape
    kept = xp.call(npscope.keep_largest, x, blocks, block, scope)
    assert same_bits(kept, x)
    assert xp.call(npscope.block_mask, x, 0, block, scope).shape == shape
    assert xp.call(npscope.soft_threshold, x, 1.0, block).sum() == (-1 if x.size else 0)
    assert xp.call(npscope.hard_threshold, x, 3.0, block).sum() == 0


def test_complex_arrays_of_as_many_axes_as_there_are(backend):
    x = np.full((1500,) + (1,) * 63, 3 + 4j, dtype=np.complex64)
    one, whole = (1,) * 64, (-1,) * 64
    assert (npscope.block_norms(x, one) == 5).all()
    assert np.count_nonzero(npscope.keep_largest(x, 700, one, whole)) == 700
    assert (npscope.soft_threshold(x, 5, one) == 0).all()
    assert (npscope.hard_threshold(x, 6, one) == 0).all()


@pytest.mark.sampled(2)
def test_results_are_plain_arrays_in_native_order_where_new(backend, any_dtype):
    x = hostile("normal", (4, 6), any_dtype.name, 2)
    assert type(npscope.block_norms(x, (2, 2))) is np.ndarray
    assert npscope.block_mask(x, 1, (2, 2), (1, 1)).dtype == np.bool_
    assert npscope.keep_largest(x, 1, (2, 2), (1, 1)).dtype == any_dtype


def with_peak(call, *arguments):
    """What a call returns, and the most bytes that were allocated meanwhile."""
    tracemalloc.start()
    try:
        return call(*arguments), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", ["2:4", "rows", "soft"])
def test_no_hidden_copies(case):
    """In place on 32 MiB the Numba backend allocates what the blocks need, nothing of the size of the array."""
    x = np.ones((2048, 4096), dtype=np.float32)
    run = {
        "2:4": lambda a: npscope.keep_largest(a, 2, (1, 1), (1, 4), out=a),
        "rows": lambda a: npscope.keep_largest(a, 1024, (1, -1), (-1, -1), out=a),
        "soft": lambda a: npscope.soft_threshold(a, 0.5, (1, 64), out=a),
    }[case]
    with npscope.use_backend("numba"), npscope.config(threads=2):
        run(np.ones((4, 4096), dtype=np.float32) if case != "rows" else x.copy())  # compiles
        _, peak = with_peak(run, x)
    assert peak < 4 << 20


@pytest.mark.parametrize("case", ["hard", "soft", "conditioned"])
def test_the_workspace_of_single_elements_is_fixed(case):
    """16 Mi blocks of one float64: 8 MiB a thread, where numbers for every block would take 128 MiB each."""
    x = np.ones((4096, 4096))
    h = {"conditioner": np.ones(x.shape, dtype=np.float32)} if case == "conditioned" else {}
    function = npscope.hard_threshold if case == "hard" else npscope.soft_threshold
    small = {k: v[:64] for k, v in h.items()}
    with npscope.use_backend("numba"), npscope.config(threads=2):
        function(x[:64].copy(), 0.5, (1, 1), **small, out=np.ones((64, 4096)))
        _, peak = with_peak(lambda: function(x, 0.5, (1, 1), **h, out=x))
    assert peak <= (2 * 8 + 1) << 20
    assert (x == (1.0 if case == "hard" else 0.5)).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_are_copied_by_several_threads(order):
    """Into the new array that is then cut, whatever the order of memory of either."""
    x = np.asarray(np.random.default_rng(0).standard_normal((3, 1500, 600), dtype=np.float32), order=order)
    with npscope.use_backend("reference"):
        expected = npscope.keep_largest(x, 5000, (1, 4, 4), ())
    with npscope.use_backend("numba"), npscope.config(threads=3):
        assert same_bits(npscope.keep_largest(x, 5000, (1, 4, 4), ()), expected)
        for out in (np.empty_like(x, order="C"), np.empty_like(x, order="F")):
            npscope.keep_largest(x, 5000, (1, 4, 4), (), out=out)
            assert same_bits(out, expected)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("float32", (1 << 16) + 1),
        *(
            pytest.param(name, n, marks=pytest.mark.slow)
            for name in ("float32", "float64", "float8_e5m2")
            for n in (1 << 15, 1 << 16, 1 << 17)
        ),
    ],
)
def test_long_columns_take_little_memory_whatever_is_done(monkeypatch, name, n):
    """Keys and masks of 16 of them side by side, which fill a line, would be up to 18 MiB."""
    monkeypatch.setattr("npscope.backends.numba_cpu.scope_strips.WIDE_ELEMENTS", 0)
    x = np.random.default_rng(0).permutation(n * 19).reshape(n, 19).astype(np.float64)
    x = (x % 251 if name == "float8_e5m2" else x).astype(dtype(name))
    out = np.empty_like(x, order="F")
    with npscope.use_backend("reference"):
        expected = npscope.keep_largest(x, n // 3, (1, 1), (-1, 1))
    calls = {
        "in place": lambda a: npscope.keep_largest(a, n // 3, (1, 1), (-1, 1), out=a),
        "to another order": lambda a: npscope.keep_largest(a, n // 3, (1, 1), (-1, 1), out=out),
        "mask": lambda a: npscope.block_mask(a, n // 3, (1, 1), (-1, 1)),
        "k-th": lambda a: npscope.kth_largest(a, n // 3, axis=0),
    }
    with npscope.use_backend("numba"), npscope.config(threads=1):
        for what, call in calls.items():
            call(x.copy())  # compiles
            given = x.copy()
            found, peak = with_peak(call, given)
            assert peak <= (8 << 20) + (2 * x.size if what == "mask" else 0), what
            if what == "k-th":
                assert np.array_equal(found, np.sort(np.abs(x), axis=0)[-(n // 3)])
            else:
                assert np.array_equal(found, expected != 0 if what == "mask" else expected)


def test_long_columns_of_blocks_take_little_memory():
    """And a coupling of such columns with rows of others does not take what they would take."""
    x = np.random.default_rng(0).standard_normal((2 << 17, 17)).astype(np.float32)
    rows, columns = np.ones((64, 131040), np.float32), np.ones((16, 64), np.float32)
    parts = [(columns, (1, 1)), (rows.T, (2, 1))]
    scope = npscope.ScopeCoupling([npscope.ScopeSpec(npscope.BlockSpec(a, block), (-1, 1)) for a, block in parts])
    calls = (lambda: npscope.keep_largest(x, 9, (2, 1), (-1, 1), out=x), lambda: scope.hard_threshold(9))
    with npscope.use_backend("numba"), npscope.config(threads=1):
        for call in calls:
            call()  # compiles
            _, peak = with_peak(call)
            assert peak <= 9 << 20


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize("case", ["prune", "k-th"])
def test_work_arrays_of_couplings_stay_within_8_mib_a_thread(name, case):
    """Blocks of two elements of two arrays, in small scopes: their norms are formed pass by pass."""
    arrays = np.ones((2, 1024, 4096), dtype=name)
    block = npscope.BlockCoupling([npscope.BlockSpec(array, (1, 1)) for array in arrays])
    scope = npscope.ScopeSpec(block, (1, 256))
    call = (lambda: scope.hard_threshold(nnz=9)) if case == "prune" else (lambda: scope.kth_largest(nnz=9))
    with npscope.use_backend("numba"), npscope.config(threads=2):
        call()
        call()  # compiles what zeros need, too
        _, peak = with_peak(call)
    assert peak <= 16 << 20


def test_element_masks_take_little_more_than_their_bytes():
    """One byte an element, and the norms of the blocks."""
    x = np.ones((2048, 4096), dtype=np.float32)
    with npscope.use_backend("numba"), npscope.config(threads=2):
        masks = npscope.ScopeSpec(npscope.BlockSpec(x, (8, 8)), ()).get_masks
        masks(100)  # compiles
        found, peak = with_peak(lambda: masks(100))
    assert sum(int(mask.sum()) for mask in found.values()) == 6400
    assert peak <= 1.5 * x.size


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_what_a_thread_finds_of_a_large_scope_takes_8_mib(monkeypatch, rng, name):
    """Also while the keys that lie between the limits, which a small sample leaves many of, are looked through."""
    monkeypatch.setattr("npscope.backends.numba_cpu.large_scopes.SAMPLE", 1)
    x = rng.standard_normal(1 << 23).astype(name)
    with npscope.use_backend("numba"), npscope.config(threads=1):
        npscope.kth_largest(x, x.size // 2)  # compiles
        found, peak = with_peak(lambda: npscope.kth_largest(x, x.size // 2))
    assert found == np.partition(x, x.size // 2)[x.size // 2]
    assert peak <= 8 << 20


def test_foreign_memory_is_not_copied_whole(rng):
    x = np.ones((1024, 8192), dtype=">f4")
    with npscope.use_backend("numba"), npscope.config(threads=2):
        npscope.keep_largest(x[:8], 2, (1, 1), (1, 4))
        _, peak = with_peak(lambda: npscope.keep_largest(x, 2, (1, 1), (1, 4), out=x))
    assert peak < 6 << 20


@pytest.mark.parametrize("name", ["complex64", "complex128", "float64"])
def test_large_scopes_keep_nothing_of_single_elements(monkeypatch, name):
    """Wherever these lie: but for the work arrays of a thread, and those are small here."""
    monkeypatch.setattr(pytest.importorskip("npscope.backends.numba_cpu.large_scopes"), "FOUND_BYTES", 1 << 19)
    x = np.random.default_rng(3).standard_normal((1024, 4096)).astype(name)[:, ::2]
    with npscope.use_backend("numba"), npscope.config(threads=2):
        npscope.keep_largest(x[:200], 20, (1, 1), (-1, -1))
        _, peak = with_peak(lambda: npscope.keep_largest(x, x.size // 2, (1, 1), (-1, -1), out=x))
    assert np.count_nonzero(x) == x.size // 2
    assert peak < 4 << 20


# --- backends and namespaces ---------------------------------------------------------------------

MEMBERS = {
    "block_mask",
    "block_norms",
    "hard_threshold",
    "keep_largest",
    "kth_largest",
    "mid_kth_largest",
    "nnz_from_sparsity",
    "soft_threshold",
    "topk_mask",
}


def test_namespaces_list_and_serve_the_functions():
    x = hostile("normal", (4, 8), "float32", 1)
    for served in (npscope.namespace(x), npscope.namespace("reference"), npscope.namespace("numba")):
        assert set(dir(served)) >= MEMBERS
        assert same_bits(served.keep_largest(x, 2, (), (1, 4)), npscope.keep_largest(x, 2, (), (1, 4)))
    assert npscope.namespace(x).name == "numba"
    assert npscope.namespace("reference").name == "reference"


def test_use_backend_never_moves_or_falls_back():
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray(np.ones((2, 4), dtype=np.float32))
    with npscope.use_backend("numba"), pytest.raises(TypeError, match="numba"):
        npscope.block_norms(x, (1, 2))
    with npscope.use_backend("cupy"), pytest.raises(TypeError, match="cupy"):
        npscope.block_norms(np.ones(3), (1,))
    with npscope.use_backend("reference"):
        assert type(npscope.block_norms(x, (1, 2))) is type(x)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
@pytest.mark.parametrize("name", ["reference", "numba"])
def test_namespaces_can_be_copied_and_pickled(name, again):
    other, x = again(npscope.namespace(name)), hostile("normal", (4, 8), "float32", 1)
    assert other == npscope.namespace(name)
    assert same_bits(other.block_norms(x, (1, 4)), npscope.block_norms(x, (1, 4)))
    assert not hasattr(other, "no_such_function")


def test_contexts_nest_and_end():
    x = np.ones(3)
    with npscope.use_backend("reference"):
        with npscope.use_backend("numba"):
            assert npscope.namespace(x).name == "numba"
        assert npscope.namespace(x).name == "reference"
    assert npscope.namespace(x).name == "numba"


def test_nothing_is_transferred():
    """The second device of array-api-strict refuses every implicit move."""
    strict = pytest.importorskip("array_api_strict")
    device = strict.Device("device1")
    x = strict.asarray(np.asarray([[1.0, -4.0, 3.0, 2.0]], dtype=np.float32), device=device)
    results = [
        npscope.block_norms(x, (1, 2)),
        npscope.keep_largest(x, 2, (1, 1), (1, 4)),
        npscope.block_mask(x, 2, (1, 1), (1, 4)),
        npscope.soft_threshold(x, 1.0, (1, 2)),
        npscope.soft_threshold(x, 1.0, (1, 2), conditioner=strict.ones_like(x)),
        npscope.hard_threshold(x, 2.5, (1, 1)),
        npscope.kth_largest(x, 2),
        npscope.mid_kth_largest(x, 2),
        npscope.topk_mask(x, 2),
    ]
    assert [r.device for r in results] == [device] * len(results)


def test_immutable_arrays_are_served_and_refused_in_place(jax_arrays):
    x, served = hostile("normal", (4, 8), "float32", 12), jax_arrays.call
    assert same_bits(served(npscope.block_norms, x, (1, 2)), o.block_norms(x, (1, 2)))
    assert same_bits(served(npscope.keep_largest, x, 2, (), (1, 4)), o.keep_largest(o.one(x, (), (1, 4)), 2)[0][0])
    assert same_bits(served(npscope.topk_mask, x, 3), o.topk_mask(x, 3))
    assert same_bits(served(npscope.kth_largest, x, 3), o.kth_largest(x, 3))
    assert same_bits(served(npscope.hard_threshold, x, 0.5, ()), o.hard_threshold_blocks(x, 0.5, ()))
    assert served(npscope.soft_threshold, x, 0.5, (1, 2), conditioner=np.ones_like(x)).shape == x.shape
    given_ = jax_arrays.asarray(x)
    with pytest.raises(TypeError, match="immutable"):
        npscope.keep_largest(given_, 2, (), (1, 4), out=given_)
    with pytest.raises(TypeError, match="immutable"):
        npscope.BlockSpec(given_, ()).hard_threshold(0.5)


@pytest.mark.parametrize("other", ["device", "numpy"])
def test_mixed_devices_and_libraries_are_refused(other):
    strict = pytest.importorskip("array_api_strict")
    x = strict.asarray(np.ones((2, 4), dtype=np.float32), device=strict.Device("device1"))
    y = np.ones((2, 4), dtype=np.float32)
    y = y if other == "numpy" else strict.asarray(y)
    with pytest.raises(TypeError, match=r"(?s)scores.*x|x.*scores"):
        npscope.keep_largest(x, 2, (), (1, -1), scores=y)
    with pytest.raises(TypeError, match=r"(?s)conditioner.*x|x.*conditioner"):
        npscope.soft_threshold(x, 0.5, (1, 2), conditioner=y)


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_environment_chooses_the_backend():
    done = run("import npscope, numpy; print(npscope.namespace(numpy.ones(3)).name)", NPSCOPE_BACKEND="reference")
    assert done.stdout.strip() == "reference", done.stderr


BAD_THREADS = ("0", "-1", "abc", "1000000000", "1.5", "", " 2 ", "2 ", "+2", "1_0", "\u0662", "\u00b2", "9" * 5000)
BAD_ENVIRONMENT = f"""
import os
threads = {BAD_THREADS!a}
bad = [('NPSCOPE_BACKEND', 'fortran'), *(('NPSCOPE_NUM_THREADS', v) for v in threads)]
os.environ.update(bad)
import numpy, npscope
for name in dict(bad):
    del os.environ[name]
for name, value in bad:
    os.environ[name] = value
    for size in (64, 512):
        try:
            npscope.block_norms(numpy.ones((size, size), 'f4'), (1, 1))
        except ValueError as error:
            print(ascii(value), size, name in str(error))
    del os.environ[name]
"""


def test_bad_environment_raises_at_first_use_not_at_import():
    done = run(BAD_ENVIRONMENT)
    values = ["fortran", *BAD_THREADS]
    assert done.stdout.splitlines() == [f"{v!a} {size} True" for v in values for size in (64, 512)], done.stderr


@pytest.mark.parametrize("threads", [0, -1, 10**9])
def test_bad_thread_counts(threads):
    with pytest.raises(ValueError, match="threads"), npscope.config(threads=threads):
        pass


@pytest.mark.parametrize("check", ["no", 1, 0.0, np.True_])
def test_check_is_a_bool(check):
    with pytest.raises(npscope.KindError, match="check"), npscope.config(check=check):
        pass


@pytest.mark.parametrize("threads", [True, 2.0, "2"])
def test_thread_counts_are_integers(threads):
    with pytest.raises(TypeError, match="threads"), npscope.config(threads=threads):
        pass


def test_unknown_backend():
    with pytest.raises(ValueError, match="fortran"), npscope.use_backend("fortran"):
        pass
    with pytest.raises(ValueError, match="fortran"):
        npscope.namespace("fortran")


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_without_infinity_still_ranks(backend, name):
    x = np.asarray([[0.5, -448 if name == "float8_e4m3fn" else -57344, 2, 1]], dtype=dtype(name))
    assert npscope.keep_largest(x, 2, (), (1, 4)).astype(float).tolist() == [[0, float(x[0, 1]), 2, 0]]


@pytest.mark.parametrize(
    ("block", "scope", "keep"), [((1, 1), (1, 4), 2), ((1, 1), (1, 64), 20), ((2, 4), (1, 8), 3), ((1, 1), (), 200_000)]
)
def test_masks_of_a_view_are_those_of_the_array_and_lie_as_it_does(rng, block, scope, keep):
    plain = rng.integers(-9000, 9000, (512, 640)).astype(np.float32)  # so that some are equal
    view = np.asfortranarray(plain)
    spec, other = (npscope.ScopeSpec(npscope.BlockSpec(a, block), scope) for a in (plain, view))
    expected, found = (npscope.block_mask(a, keep, block, scope) for a in (plain, view))
    np.testing.assert_array_equal(found, expected)
    assert expected.flags.c_contiguous
    assert found.flags.f_contiguous
    elements, same = spec.get_masks(keep)[spec.specs()[0]], other.get_masks(keep)[other.specs()[0]]
    np.testing.assert_array_equal(same, elements)
    np.testing.assert_array_equal(elements, np.repeat(np.repeat(expected, block[0], 0), block[1], 1))
    assert elements.dtype == same.dtype == np.bool_


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_norms_of_a_view_lie_as_it_does(backend, rng, axes, name):
    plain = rng.standard_normal((8, 6, 10)).astype(name)
    view, block = plain.transpose(axes), tuple((2, 3, 5)[axis] for axis in axes)
    expected = npscope.block_norms(plain, (2, 3, 5)).transpose(axes)
    found = npscope.block_norms(view, block)
    assert same_bits(found, expected)
    assert found.strides == expected.strides
    for out in (np.empty(found.shape, name), np.empty_like(found), np.empty((*found.shape, 2), name)[..., 1]):
        assert npscope.block_norms(view, block, out=out) is out
        assert same_bits(out, expected)
