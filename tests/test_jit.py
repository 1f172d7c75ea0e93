"""What kernels are made of: functions called at their address, loop nests, exact sums."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import dtype, same_bits

numba = pytest.importorskip("numba")

from llvmlite import ir  # noqa: E402
from numba import types  # noqa: E402

from npscope.backends.numba_cpu import (  # noqa: E402
    conditioned,
    doubts,
    lines,
    shrinkage,
    strips,
    totals,
    vector_norms,
    vector_selection,
    vector_shrinkage,
    vectors,
)
from npscope.backends.numba_cpu.exact import EXACT_WORDS, add_exactly, round_exactly  # noqa: E402
from npscope.backends.numba_cpu.jit import (  # noqa: E402
    address_of,
    array_of,
    caller,
    inner,
    inner_any_order,
    kernel,
    standalone,
)
from npscope.backends.numba_cpu.nests import length_of, place  # noqa: E402
from npscope.backends.numba_cpu.operands import Competitors  # noqa: E402
from npscope.backends.numba_cpu.rows import Runs  # noqa: E402
from npscope.dtypes import kind_of  # noqa: E402
from npscope.tiling import Leaf, array_cut  # noqa: E402


@standalone
def total_of(numbers, scale):
    """The sum of all numbers, times `scale`."""
    total = 0.0
    for i in range(numbers.size):
        total += numbers[i]
    return total * scale


@standalone
def set_first(numbers, i, value):
    if i < 0:
        raise ValueError("below")
    numbers[i] = value


@kernel
def twice_the_total(numbers):
    return total_of(numbers, 2)


@kernel
def set_through(numbers, i, value):
    set_first(numbers, i, value)


def test_a_standalone_function_serves_every_type_that_it_is_called_with():
    for name in ("float32", "float64", "int32"):
        assert twice_the_total(np.arange(5, dtype=name)) == 20.0
    strided = np.arange(10.0)[::2]
    assert twice_the_total(strided) == 40.0


def test_what_a_standalone_function_raises_reaches_python():
    numbers = np.zeros(2)
    set_through(numbers, 1, 3.0)
    assert numbers.tolist() == [0.0, 3.0]
    with pytest.raises(ValueError, match="below"):
        set_through(numbers, -1, 3.0)


def test_code_with_an_address_in_it_is_never_kept_on_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))

    @numba.njit(cache=True)
    def cached(numbers):
        return total_of(numbers, 2)

    with pytest.warns(numba.core.errors.NumbaWarning, match="dynamic globals"):
        assert cached(np.ones(3)) == 6.0
    assert not list(tmp_path.rglob("*.nbc"))


@pytest.fixture
def collection():
    """Garbage collection is left as it was."""
    was = gc.isenabled()
    yield
    (gc.enable if was else gc.disable)()


def watched(look):
    """A function that `look` is told of once it is compiled: a float stays what it is, all else is an error."""

    def same(x):
        return x

    @numba.extending.overload(same)
    def typed(x):
        look()
        return (lambda x: x) if isinstance(x, types.Float) else None

    return same


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_functions_are_compiled(enabled, collection):
    """And then as before, whether compilation ends well or not. Functions of others are compiled as ever."""
    (gc.enable if enabled else gc.disable)()
    for compiler, expected in ((kernel, False), (numba.njit, enabled)):
        seen = set()
        same = watched(lambda seen=seen: seen.add(gc.isenabled()))
        compiled = compiler(lambda x, same=same: same(x) + 1)
        assert compiled(1.0) == 2.0
        assert gc.isenabled() is enabled
        with pytest.raises(numba.TypingError):
            compiled("")
        assert gc.isenabled() is enabled
        assert seen == {expected}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_a_function_is_compiled_collects_garbage(collection):
    gc.enable()
    read, write = os.pipe()
    children = []

    def fork_once():
        if not children:
            with warnings.catch_warnings():  # from Python 3.12 on there is one where other threads are
                warnings.simplefilter("ignore", DeprecationWarning)
                children.append(os.fork())
            if children == [0]:
                os.write(write, b"1" if gc.isenabled() else b"0")
                os._exit(0)

    same = watched(fork_once)
    compiled = kernel(lambda x: same(x))
    assert compiled(3.0) == 3.0
    os.waitpid(children[0], 0)
    assert os.read(read, 1) == b"1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_forked_while_another_thread_compiles_can_compile():
    """It waits until the other is done: a lock that it held in the child would never be free."""
    compiling = threading.Event()

    def take_long():
        compiling.set()
        time.sleep(0.2)

    same = watched(take_long)
    other = threading.Thread(target=kernel(lambda x: same(x)), args=(3.0,))
    other.start()
    compiling.wait()
    with warnings.catch_warnings():  # from Python 3.12 on there is one where other threads are
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if kernel(lambda x: x + 1)(2.0) == 3.0 else 1)
    other.join()
    assert os.waitpid(child, 0)[1] == 0


def test_a_caller_calls_what_is_at_the_address():
    call = caller(2, types.float64)

    @kernel
    def through(address, numbers, scale):
        return call(address, numbers, scale)

    arguments = array_of(np.float64), types.int64
    address = address_of(total_of, *arguments, result=types.float64)
    assert through(address, np.arange(4.0), 10) == 60.0
    assert address_of(total_of, *arguments, result=types.float64) == address
    with pytest.raises(TypeError, match="returns float64, not none"):
        address_of(total_of, *arguments)


@kernel
def places_of(nest, out):
    for i in range(out.size):
        out[i] = place(i, nest)
    return length_of(nest)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(-100, 100)), min_size=1, max_size=4))
def test_places_are_those_of_nested_loops(loops):
    nest = np.array(loops, dtype=np.int64).T.copy()
    expected = [
        sum(turn * step for turn, (_, step) in zip(turns, loops, strict=True))
        for turns in itertools.product(*(range(size) for size, _ in loops))
    ]
    out = np.empty(len(expected), dtype=np.int64)
    assert places_of(nest, out) == len(expected)
    assert out.tolist() == expected


@kernel
def exact_root(numbers, below, square, sums):
    sums[:] = 0
    for x in numbers:
        add_exactly(sums, 0, x, square)
    return round_exactly(sums, 0, below, square)


LARGEST = float(np.finfo(np.float32).max)
TERMS = st.one_of(
    st.sampled_from([0.0, 2.0**-149, 2.0**-126, 1.0, 2.0**-24, 2.0**100, LARGEST]),
    st.floats(0, width=32, allow_infinity=False),
    st.floats(0.5, 1, width=32),
)


@given(st.lists(TERMS, min_size=1, max_size=12), st.booleans())
def test_exact_sums_round_as_fractions_do(terms, square):
    exact = sum(Fraction(x) ** (2 if square else 1) for x in terms)
    numbers, sums = np.array(terms, dtype=np.float32), np.empty(EXACT_WORDS, dtype=np.int64)
    # The float32 at or below the sum, or its root: what rounds to more is stepped back from.
    below = np.float32(min(float(exact) ** (0.5 if square else 1), LARGEST))
    while Fraction(float(below)) ** (2 if square else 1) > exact:
        below = np.nextafter(below, np.float32(0))
    above = 2.0**128 if below == LARGEST else float(np.nextafter(below, np.float32(np.inf)))
    middle = (Fraction(float(below)) + Fraction(above)) / 2
    side = exact - middle ** (2 if square else 1)
    up = side > 0 or (side == 0 and below.view(np.uint32) & 1)
    expected = np.float32(np.inf if up and above > LARGEST else above if up else below)
    assert exact_root(numbers, below, square, sums) == expected
    units = sum(int(np.uint64(word)) << (64 * i) for i, word in enumerate(sums.view(np.uint64)))
    assert units == exact * 2 ** (300 if square else 150)


LARGEST_OF = {"float32": 2.0**127, "float16": 2.0**15, "bfloat16": 2.0**127}


@pytest.mark.parametrize("run", [1, 4, 5, 16])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
def test_products_by_factors_of_two_float32(rng, name, run):
    """They are those of more precision, rounded once; in a case of a million, or below 2 ** -100, the neighbour."""
    form, single = (vectors.format_of(kind_of(dtype(n))) for n in (name, "float32"))
    weigh = vector_shrinkage.weigh_strip(form, single, run, True)
    blocks = (1 << 14) // run
    count = blocks * run
    grid, elements = np.asarray([[blocks], [run]]), np.asarray([[run], [1]])

    @kernel
    def weigh_all(x, h, grid, elements, mus):
        weigh(x, 0, grid, 0, 1, elements, 0, 1, h, 0, grid, 0, 1, elements, 0, 1, 0, blocks, run, mus, 0)

    owner = np.arange(count) // run
    mu = np.exp2(rng.choice([0.4, 1.0], owner[-1] + 17) * rng.uniform(-140, 94, owner[-1] + 17))
    mu[::7], mu[3::7] = 0.0, np.inf
    m = mu[owner].astype(np.longdouble)
    h = np.maximum(np.exp2(rng.uniform(-40, 40, count)), np.where(m < np.inf, m, 0) * 2.0**-81).astype(np.float32)
    with np.errstate(under="ignore"):
        x = (rng.standard_normal(count) * LARGEST_OF[name] ** rng.uniform(-1, 0.9, count)).astype(dtype(name))
    x[5::9] = -0.0
    x[m == 0] = np.nan
    high = mu.astype(np.float32)
    with np.errstate(invalid="ignore"):
        low = (mu - high).astype(np.float32)
    got = x.copy()
    weigh_all(got.view(f"u{got.itemsize}"), h, grid, elements, np.stack([high, low], 1).view(np.float64).ravel())
    with np.errstate(invalid="ignore"):
        exact = np.where(m < np.inf, x * (h / (h + m)), np.longdouble(0.0))
    stays, expected = m == 0, exact.astype(np.float32).astype(x.dtype)
    assert same_bits(got[stays], x[stays])
    got, expected, exact = got[~stays], expected[~stays], exact[~stays]
    places, others = (a.view(f"i{x.itemsize}").astype(np.int64) for a in (got, expected))
    differ = places != others
    assert (np.abs(places - others) <= 1).all()
    assert (differ & (np.abs(exact) > 2.0**-100)).sum() <= 1


def unaligned(x):
    place = np.empty(x.nbytes + 1, dtype=np.uint8)[1:].view(x.dtype).reshape(x.shape)
    place[...] = x
    return place


def read_only(x):
    y = x.copy()
    y.flags.writeable = False
    return y


LAYOUTS = {
    "C": np.copy,
    "F": np.asfortranarray,
    "negative": lambda x: x[::-1, ::-1],
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "foreign": lambda x: x.astype(x.dtype.newbyteorder()),
    "unaligned": unaligned,
    "read-only": read_only,
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["float16", "float64", "complex64", "int8", "uint64"])
def test_leaves_have_the_types_for_which_the_code_is_that_they_are_given_to(layout, name):
    """Nothing else checks what is called at an address."""
    x, h = np.ones((2, 6, 8), dtype=name), np.ones((6, 8), dtype=np.float32 if name == "complex64" else name)
    cut, _, _ = array_cut((6, 8), (2, 4), ())
    changed = LAYOUTS[layout]
    part = tuple(Leaf(changed(leaf) if layout != "read-only" else leaf, cut) for leaf in x)
    metric = shrinkage.Metric(tuple(Leaf(changed(h), cut) for _ in part))
    both = Competitors.of(part)
    for operands in (both.leaves, shrinkage._weights(both, metric)):
        for some in (operands, operands[:1]):
            _, readings = shrinkage._chain(some)
            leaves = conditioned.chained([(*x.where, x.size) for x in some])
            assert numba.typeof(leaves) == conditioned.type_of_chain(readings)
            assert [x.raw[0].ctypes.data for x in some] == [x.buffer.ctypes.data for x in some]


def test_what_a_sum_in_any_order_adds_up_is_computed_as_written():
    """The first caller of a function decides how it is compiled, if it does not itself."""

    @inner
    def difference(x, square):
        return x * x - square  # 0.0, but for a square that is not rounded

    @inner_any_order
    def total_of(numbers, squares):
        total = 0.0
        for i in range(numbers.size):
            total += difference(numbers[i], squares[i])
        return total

    @kernel
    def total(numbers, squares):
        return total_of(numbers, squares)

    numbers = 1 + np.arange(1, 100) * 2.0**-40
    assert total(numbers, numbers * numbers) == 0.0


@pytest.mark.parametrize("by_table", [False, True])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_chosen_keys_are_put_side_by_side(rng, monkeypatch, width, by_table):
    """Whatever the machine can: the code for each kind runs on all."""
    monkeypatch.setattr(vector_selection, "has_only_avx2", lambda: by_table)
    survey_strip, lanes = vector_selection.survey_strip.__wrapped__(vectors.KEYS[width], False, True), 512 // width

    @kernel
    def collect(keys, low, high, found):
        return survey_strip(keys, 0, strips.LINE, 0, 1, 0, keys.size, low, high, low, found, 0, True)

    for most in (4, 200):  # nearly all of them, or few
        keys = rng.integers(0, most, 64 * lanes).astype(f"u{width // 8}")
        found = np.zeros(keys.size + lanes, dtype=keys.dtype)
        expected = keys[(keys >= 1) & (keys <= 3)]
        above, inside, equal = collect(keys, np.uint64(1), np.uint64(3), found)
        assert (above, inside, equal) == ((keys > 3).sum(), expected.size, (keys == 1).sum())
        np.testing.assert_array_equal(found[:inside], expected)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("count", [2, 4, 8, 16])
@pytest.mark.parametrize("name", ["uint8", "uint16", "uint32", "uint64", "float32", "float64"])
def test_planes_are_every_so_many_th_element(monkeypatch, name, count, in_parts):
    monkeypatch.setattr(vectors, "has_only_avx2", lambda: in_parts)
    dtype = np.dtype(name)
    lanes = vectors.LINE // dtype.itemsize

    def deal(b, numbers, out):
        places = [b.gep(numbers, [vectors.INT32(i * lanes)]) for i in range(count)]
        lines = [b.bitcast(vectors.load(b, place, bits), line) for place in places]
        for i, plane in enumerate(vectors.planes_of(b, lines)):
            vectors.store(b, plane, b.gep(out, [vectors.INT32(i * lanes)]))

    scalars = {"float32": ir.FloatType(), "float64": ir.DoubleType()}
    bits = vectors.vector_of(8 * dtype.itemsize, lanes)
    line = ir.VectorType(scalars.get(name) or bits.element, lanes)
    step = vectors.step(deal, 4)

    @kernel
    def run(numbers, out):
        step(numbers, 0, out, 0)

    numbers = np.arange(count * lanes).astype(dtype)
    out = np.zeros_like(numbers)
    run(numbers, out)
    np.testing.assert_array_equal(out.reshape(count, lanes), numbers.reshape(lanes, count).T)


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("n", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_groups_of_keys_are_ranked_with_ties_and_nan(rng, width, n, sizes):
    """The keys that leave the highest bit free, and all ones; or any keys."""
    step, groups = vector_selection.mark_groups(width, n, sizes), vector_selection.groups_per_line(width, n)
    dtype = np.dtype(f"u{width // 8}")
    ones, top = np.iinfo(dtype).max, np.iinfo(dtype).max >> 1
    choice = [0, 1, 2, top - 1, ones] + ([] if sizes else [top, top + 1, ones - 1])

    @kernel
    def mark(keys, keep, mask):
        step(keys, 0, keep, 0, mask, 0)

    for _ in range(50):
        keys, keep = rng.choice(np.asarray(choice, dtype=dtype), (groups, n)), rng.integers(0, n + 1, groups)
        mask = np.zeros((groups, n), dtype=bool)
        mark(keys.reshape(-1), keep, mask.reshape(-1))
        order = np.argsort(ones - keys, axis=1, kind="stable")
        expected = np.zeros_like(mask)
        for row, first, kept in zip(expected, order, keep, strict=True):
            row[first[:kept]] = True
        np.testing.assert_array_equal(mask, expected)


def _measuring(measure):
    @kernel
    def norms_of(words, grid, elements, blocks, sums, norms, making):
        measure(
            words, 0, grid, 0, 1, elements, 0, elements.shape[1], 0, blocks, sums, 0, norms, 0, making, 0
        )  # fmt: skip

    return norms_of


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("name", "run"),
    [("float32", n) for n in (4, 5, 8, 9, 12, 16)]
    + [(name, n) for name in ("float16", "float64") for n in (4, 12, 16)],
)
def test_sums_of_short_runs_are_those_of_their_blocks(rng, monkeypatch, name, run, rows, narrow):
    """Whatever the machine can. Of small integers all sums are exact."""
    monkeypatch.setattr(totals, "has_only_avx2", lambda: narrow)
    form, blocks = vectors.format_of(kind_of(dtype(name))), 2 * vectors.LANES + 5
    numbers = rng.integers(-9, 10, (rows, blocks, run)).astype(name)
    grid = np.asarray([[blocks], [run]], dtype=np.int64)
    elements = np.asarray([[rows, run], [blocks * run, 1]], dtype=np.int64)
    elements = np.ascontiguousarray(elements[:, 1:]) if rows == 1 else elements
    buffers = lines.NormBuffers(blocks, 8 if form.bits == 64 else 4)
    for code, expected in (
        (totals.TWO, np.sqrt((numbers.astype(np.float64) ** 2).sum(axis=(0, 2)))),
        (totals.ONE, np.abs(numbers.astype(np.float64)).sum(axis=(0, 2))),
    ):
        norms_of = _measuring(vector_norms.measure_strip.__wrapped__(form, Runs(run, False, rows == 1), code))
        norms_of(numbers.reshape(-1).view(f"u{form.bits // 8}"), grid, elements, blocks, *buffers.all)
        np.testing.assert_array_equal(buffers.sums[:blocks], expected)
        np.testing.assert_array_equal(buffers.norms[:blocks], expected.astype(buffers.norms.dtype))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_the_ends_of_words_are_found_at_any_place(rng, width):
    words = rng.integers(9, 1 << width - 1, 150, dtype=f"u{width // 8}")
    for start, stop in ((0, 1), (0, 150), (3, 35), (7, 140)):
        for changed in (start, stop - 1, (start + stop) // 2):
            own = words.copy()
            own[changed] = 5
            assert conditioned.ends_of(own, start, stop) == (5, own[start:stop].max())
            own[changed] = np.iinfo(own.dtype).max
            assert conditioned.ends_of(own, start, stop) == (own[start:stop].min(), own[changed])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("doubt", [3, doubts.MOST_DOUBT])
def test_one_root_that_may_be_rounded_wrong_is_seen_among_any(monkeypatch, narrow, doubt):
    monkeypatch.setattr(doubts, "has_only_avx2", lambda: narrow)

    def take_all(b, numbers, doubt):
        roots, lanes = doubts.Roots(b, doubt), ir.VectorType(ir.DoubleType(), vectors.LANES)
        for i in range(2):
            place = b.gep(numbers, [vectors.INT32(i * vectors.LANES)])
            roots.take(b.load(b.bitcast(place, lanes.as_pointer()), align=8))
        return b.zext(roots.are_unsure(), ir.IntType(64))

    step = vectors.step(take_all, 3, types.int64)

    @kernel
    def are_unsure(numbers, doubt):
        return step(numbers, 0, doubt)

    sure = np.asarray([0.0, np.inf, np.nan, 1.0, 2.0**128, 2.0**-149, 3.0, 0.1])
    for lane in range(2 * vectors.LANES):
        numbers = np.resize(sure, 2 * vectors.LANES)
        assert not are_unsure(numbers, doubt)
        for units in (-doubt - 1, -doubt, 0, doubt - 1, doubt):
            numbers[lane : lane + 1] = np.asarray([(1 << 62) + doubts.ROUNDING_BORDER + units]).view(np.float64)
            assert are_unsure(numbers, doubt) == (-doubt <= units < doubt)


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("name", ["float16", "float32", "float64", "int32"])
def test_a_survey_counts_and_collects_keys_between_any_limits(rng, name, signed, crowded):
    """Limits need not be keys of numbers."""
    form, bits = vectors.format_of(kind_of(dtype(name))), np.dtype(f"u{dtype(name).itemsize}")
    top, ones = 1 << (form.bits - 1), (1 << form.bits) - 1
    special = [0, 1, top, top + 1, form.inf, form.inf + 1, form.inf + top, form.inf + top + 1, top - 1, ones]
    numbers = rng.choice(np.asarray(special, dtype=bits), 150)
    numbers[::3] = rng.integers(0, ones, 50, dtype=bits, endpoint=True)
    read = strips.reader_address(strips.line_reader(form, signed), bits, bits)
    look = strips.surveyor_address(strips.line_surveyor(form, signed, crowded), bits, bits)
    grid, elements = np.asarray([[150], [1]], dtype=np.int64), np.asarray([[1], [0]], dtype=np.int64)
    where, scratch = (numbers.view(np.uint8), 0, grid, elements), strips.Scratch(150, 0, bits, 0).all

    @kernel
    def survey(where, low, high, crowd, found, end, stores, scratch):
        return strips.call_surveyor(look, 0, where, 0, 150, low, high, crowd, found, end, stores, scratch)

    keys = np.zeros(150 + vectors.LINE, dtype=bits)
    strips.read_blocks(read, where, 0, 150, 150, keys, scratch)
    keys = keys[:150].astype(object)
    borders = [0, top, form.inf, form.inf + top, top - 1 - form.inf, ones]
    limits = sorted({k + d for k in borders for d in (-2, -1, 0, 1) if 0 <= k + d <= ones})
    for low, high in itertools.combinations_with_replacement(limits, 2):
        found, crowd = np.zeros(300, dtype=bits), int(keys[7])
        within = [k for k in keys if low <= k <= high]
        for stores in (False, True):
            above, inside, equal = survey(
                where, np.uint64(low), np.uint64(high), np.uint64(crowd), found, 3, stores, scratch
            )
            assert (above, inside) == (sum(keys > high), len(within))
            assert not crowded or equal == sum(keys == crowd)
        assert found[3 : 3 + len(within)].tolist() == within


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("limit", [0, 5, -1])
@pytest.mark.parametrize("equal", [0, 1])
@pytest.mark.parametrize("width", [8, 32, 64])
def test_a_cut_keeps_what_is_above_its_limit_or_equal_if_it_says_so(rng, width, marks, limit, equal):
    """-1: all ones, in 64 bits, as a search gives that keeps nothing."""
    cut, dtype = strips.cutter(vectors.KEYS[width], False, marks), np.dtype(f"u{width // 8}")
    keys = rng.choice(np.asarray([0, 4, 5, 6, np.iinfo(dtype).max], dtype=dtype), 139)
    target = np.zeros(139, dtype=bool) if marks else np.arange(100, 239, dtype=dtype)
    before = target.copy()
    address = strips.cutter_address(cut, keys.dtype, target.dtype)
    grid, elements = np.asarray([[139], [1]], dtype=np.int64), np.asarray([[1], [0]], dtype=np.int64)

    @kernel
    def run(address, source, target, limit, equal):
        strips.call_cutter(address, source, target, 0, 139, limit, equal)

    run(address, (keys, 0, grid, elements), (target, 0, grid, elements), np.uint64(limit & (2**64 - 1)), equal)
    limit &= np.iinfo(dtype).max
    kept = (keys > limit) | ((keys == limit) & bool(equal))
    np.testing.assert_array_equal(target, kept if marks else np.where(kept, before, 0))
