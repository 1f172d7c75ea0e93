"""Elements that lie apart in a file are read as they are, in few calls where they lie close."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npscope.weights import Tensor, strided


class Counting:
    """A file of one tensor that counts how often it is read, and how many bytes."""

    def __init__(self, values: np.ndarray) -> None:
        self.raw, self.calls, self.nbytes = values.tobytes(), 0, 0

    def read(self, tensor: Tensor, start: int, into: memoryview) -> None:
        assert 0 <= start <= start + into.nbytes <= len(self.raw)
        self.calls += 1
        self.nbytes += into.nbytes
        into[:] = self.raw[start : start + into.nbytes]


def columns(values: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, Counting]:
    file, found = Counting(values), np.empty((values.shape[0], stop - start), values.dtype)
    tensor = Tensor("a", values.dtype.name, values.shape, values.nbytes)
    strided.StridedReader().read(file, tensor, start, (values.shape[1], 1), found)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, values[:, start:stop])
    return found, file


def test_columns_of_short_rows_are_read_many_rows_at_a_time() -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(4096, 256)
    _, file = columns(values, 3, 19)
    assert file.calls <= math.ceil(values.nbytes / strided._SPAN_BYTES)


def test_columns_of_long_rows_are_read_alone() -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(8, 1 << 17)
    found, file = columns(values, 3, 19)
    assert (file.calls, file.nbytes) == (8, found.nbytes)


def test_whole_rows_are_one_call() -> None:
    values = np.arange(1 << 20, dtype=np.float32).reshape(8, 1 << 17)
    assert columns(values, 0, 1 << 17)[1].calls == 1


@given(data=st.data())
@pytest.mark.parametrize("gap", [0, 8, 1000])
def test_any_window_is_read_as_it_is(data: st.DataObject, gap: int) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    strides: list[int] = []
    for axis in reversed(range(len(shape))):
        strides.insert(0, strided.span(shape[axis + 1 :], strides) + data.draw(st.integers(0, 3)))
    offset = data.draw(st.integers(0, 3))
    values = np.arange(offset + strided.span(shape, strides), dtype=np.int16)
    expected = np.lib.stride_tricks.as_strided(values[offset:], shape, [2 * stride for stride in strides])
    found = np.empty(shape, np.int16)
    tensor = Tensor("a", "int16", values.shape, values.nbytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strided, "_GAP_BYTES", gap)
        patch.setattr(strided, "_SPAN_BYTES", data.draw(st.integers(1, 60)))
        strided.StridedReader().read(Counting(values), tensor, offset, strides, found)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)
