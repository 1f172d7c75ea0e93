"""The libraries and backends that every test of the functions runs on, and the Hypothesis profiles.

A library that is not here is skipped with its reason, never silently: a run without a GPU
shows "no CUDA device".
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from strategies import ALL_DTYPES, COMPLEX, INTEGERS, dtype

import npscope
from npscope.backends import reference

_SHARED = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("fast", max_examples=10, derandomize=True, **_SHARED)
settings.register_profile("slow", max_examples=1000, **_SHARED)

OPERATIONS = (
    *("norms", "kth", "midpoint", "mask", "element_masks", "prune", "threshold", "apply_mask", "scale", "shrink"),
    *("count_nonzero", "sum_squares"),
)
STANDARD = ("float32", "float64", *COMPLEX, *INTEGERS)


def wants_slow(config: pytest.Config) -> bool:
    """Whether the run was asked for the tests marked slow (``pytest -m slow``)."""
    return "slow" in config.option.markexpr and "not slow" not in config.option.markexpr


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("slow" if wants_slow(config) else "fast")
    gc.set_threshold(100_000, 50, 1000)  # compiling makes millions of objects that stay: looking at them is a tenth
    # What runs in the background of a shell ignores SIGINT, and hands that on: tests that interrupt would not end.
    for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


COMPILING = ("backends_agree", "functions", "kernel_borders", "limits", "norms", "selection", "shrinkage")
"""Tests of these compile the same kernels for the same dtypes: half of the time of a run. So one process takes them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One file after another to the processes of pytest-xdist, those of `COMPILING` together."""
    scheduler = importlib.import_module("xdist.scheduler").LoadFileScheduling

    class OneProcessCompiles(scheduler):  # type: ignore[misc, valid-type]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "compiling" if file in {f"tests/test_{name}.py" for name in COMPILING} else file

    return OneProcessCompiles(config, log)


def mark_all_but_a_sample(items: list[pytest.Item]) -> None:
    """Mark slow all but one of n cases of every test marked ``sampled(n)``, whose names have the smallest checksums."""
    cases: dict[str, list[tuple[int, pytest.Item]]] = {}
    for item in items:
        if item.get_closest_marker("sampled") is not None and item.get_closest_marker("slow") is None:
            cases.setdefault(item.nodeid.partition("[")[0], []).append((zlib.crc32(item.nodeid.encode()), item))
    for found in cases.values():
        marker = found[0][1].get_closest_marker("sampled")
        assert marker is not None
        for _, item in sorted(found, key=lambda pair: pair[0])[-(-len(found) // marker.args[0]) :]:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)  # before pytest picks tests by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_all_but_a_sample(items)
    if not wants_slow(config):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with pytest -m slow"))


@dataclass(frozen=True)
class Library:
    """An array library under one backend: how NumPy arrays get in and out, and what it has."""

    name: str
    asarray: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]
    dtypes: tuple[str, ...] = ALL_DTYPES
    backend: str | None = None
    way: Callable[[], AbstractContextManager[None]] = nullcontext

    def __repr__(self) -> str:
        return self.name

    @contextmanager
    def context(self) -> Iterator[None]:
        """Its backend, and the way that its arrays go in it."""
        with self.way(), npscope.use_backend(self.backend) if self.backend else nullcontext():
            yield

    def require(self, name: str) -> None:
        """Skip where the library has no such dtype."""
        if name not in self.dtypes:
            pytest.skip(f"{self.name} has no {name}")

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function` on this library's arrays, and its result as NumPy."""
        given = [self.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        named = {k: self.asarray(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
        result = function(*given, **named)
        assert type(result) is type(given[0]), f"{type(given[0])} in, {type(result)} out"
        return self.to_numpy(result)


def _numpy(backend: str) -> Library:
    return Library(backend, lambda x: x, lambda x: x, backend=backend)


def _strict() -> Library:
    strict = pytest.importorskip("array_api_strict")
    return Library("array-api-strict", strict.asarray, np.asarray, STANDARD)


def _torch() -> Library:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    served = tuple(n for n in STANDARD if n not in ("uint16", "uint32", "uint64"))
    return Library("torch", lambda x: torch.asarray(x.copy()), lambda x: x.numpy(), (*served, "float16"))


def _jax() -> Library:
    jax = pytest.importorskip("jax", reason="jax is not installed")
    jax.config.update("jax_enable_x64", True)
    return Library("jax", jax.numpy.asarray, np.asarray)


@contextmanager
def _as_large() -> Iterator[None]:
    """CuPy arrays of every size go the way of large ones."""
    small = importlib.import_module("npscope.backends.cupy_gpu.small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small, "MOST_ELEMENTS", 0)
        yield


def _cupy(way: Callable[[], AbstractContextManager[None]] = nullcontext) -> Library:
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("no CUDA device (and CuPy is not installed)")
    cupy = importlib.import_module("cupy")
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            pytest.skip("no CUDA device")
    except cupy.cuda.runtime.CUDARuntimeError:
        pytest.skip("no CUDA device")

    def asarray(x: np.ndarray) -> Any:
        """`cupy.asarray`, which loses the sign of a float16 zero that has no axes."""
        return cupy.asarray(x.reshape(1)).reshape(()) if x.ndim == 0 else cupy.asarray(x)

    return Library("cupy", asarray, cupy.asnumpy, (*STANDARD, "float16", *_halves_of(cupy)), "cupy", way)


def _halves_of(cupy: Any) -> tuple[str, ...]:
    """Bfloat16, where this CuPy holds it."""
    try:
        cupy.asnumpy(cupy.asarray(np.ones(2, dtype("bfloat16"))))
    except (TypeError, ValueError, KeyError):
        return ()
    return ("bfloat16",)


_LIBRARIES: dict[str, Callable[[], Library]] = {
    "reference": lambda: _numpy("reference"),
    "numba": lambda: _numpy("numba"),
    "array-api-strict": _strict,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
    "cupy, as large": lambda: _cupy(_as_large),
}


@contextmanager
def no_reference(backend: str | None) -> Iterator[None]:
    """Under "numba" and "cupy" the operations of the reference backend raise: nothing may fall back to it."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the {backend} backend fell back to the reference")

    with pytest.MonkeyPatch.context() as patch:
        if backend in ("numba", "cupy"):
            for name in OPERATIONS:
                patch.setattr(reference, name, refuse)
        yield


def parameters() -> list[Any]:
    """JAX compiles every operation for every shape, minutes in all: its full matrix is left to the slow runs."""
    return [pytest.param(name, marks=pytest.mark.slow) if name == "jax" else name for name in _LIBRARIES]


@pytest.fixture(params=parameters())
def xp(request: pytest.FixtureRequest) -> Iterator[Library]:
    """Every array library, the backend it needs switched on."""
    library = _LIBRARIES[request.param]()
    with library.context(), no_reference(library.backend):
        yield library


@pytest.fixture(scope="module")
def jax_arrays() -> Library:
    """JAX for the few tests that must not wait for a slow run."""
    return _jax()


@pytest.fixture(params=["reference", "numba"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backends of NumPy arrays: for promises about memory, strides and in-place work."""
    with npscope.use_backend(request.param), no_reference(request.param):
        yield request.param


@pytest.fixture(params=["cupy", "cupy, as large"])
def cupy_arrays(request: pytest.FixtureRequest) -> Iterator[Library]:
    """CuPy for what only concerns device memory; small arrays also by the path of large ones."""
    library = _LIBRARIES[request.param]()
    with library.way():
        yield library


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers, the same in every run."""
    return np.random.default_rng(20260101)


@pytest.fixture(params=ALL_DTYPES)
def any_dtype(request: pytest.FixtureRequest) -> np.dtype:
    """Every supported dtype."""
    return dtype(request.param)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The reference backend, for tests of files whose many small arrays are not worth a kernel."""
    with npscope.use_backend("reference"):
        yield


@pytest.fixture
def small_as_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small arrays, too, are worked off line by line by kernels of their own, as large ones are everywhere."""
    operands = pytest.importorskip("npscope.backends.numba_cpu.operands")
    monkeypatch.setattr(operands, "SHAPED_ELEMENTS", 0)
    operands.placement.cache_clear()
    yield
    operands.placement.cache_clear()
