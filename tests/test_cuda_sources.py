"""Every CUDA source compiles, in every variant that an operation may ask for: without a GPU, through NVRTC or nvcc."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import npscope
import npscope.backends

FOLDER = Path(npscope.__file__).parent / "backends" / "cupy_gpu"
ARCHITECTURE = "sm_90"

Compiler = Callable[[str, tuple[str, ...]], str]
"""From source and options to the errors and warnings."""


@cache
def modules() -> ModuleType:
    """The module that knows the variants; CuPy, which it only needs to load them, is stood in for."""
    path = FOLDER / "modules.py"
    spec = importlib.util.spec_from_file_location("npscope_cuda_modules", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    absent = importlib.util.find_spec("cupy") is None
    if absent:
        sys.modules["cupy"] = ModuleType("cupy")
    try:
        spec.loader.exec_module(module)
    finally:
        if absent:
            del sys.modules["cupy"]
    return module


@cache
def backend(name: str) -> ModuleType:
    """A module of the backend, for what it shares with CUDA; where there is no CuPy, an empty one stands in for it."""
    package, absent = "npscope.backends.cupy_gpu", importlib.util.find_spec("cupy") is None
    if not absent:
        return importlib.import_module(f"{package}.{name}")
    sys.modules["cupy"] = ModuleType("cupy")
    try:
        return importlib.import_module(f"{package}.{name}")
    finally:
        for loaded in [m for m in sys.modules if m == "cupy" or m.startswith(package)]:
            del sys.modules[loaded]
        del npscope.backends.cupy_gpu


def nvrtc_library() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob("**/libnvrtc.so.*")):
            if "alt" not in path.name:
                return ctypes.CDLL(str(path))
    return None


def nvrtc_compiler(library: ctypes.CDLL) -> Compiler:
    def run(source: str, options: tuple[str, ...]) -> str:
        program = ctypes.c_void_p()
        assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"npscope.cu", 0, None, None) == 0
        given = [o.encode() for o in (f"-arch={ARCHITECTURE}", *options)]
        failed = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        library.nvrtcDestroyProgram(ctypes.byref(program))
        text = log.value.decode()
        return text or "no log" if failed else text

    return run


def nvcc_compiler(nvcc: str) -> Compiler:
    def run(source: str, options: tuple[str, ...]) -> str:
        command = [nvcc, f"-arch={ARCHITECTURE}", "-cubin", "-x", "cu", "-o", "/dev/null", *options, "-"]
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=300, check=False)
        return done.stderr + ("" if done.returncode == 0 else f"nvcc exits with {done.returncode}")

    return run


@pytest.fixture(scope="module")
def compiler() -> Compiler:
    library, nvcc = nvrtc_library(), shutil.which("nvcc")
    if library is not None:
        return nvrtc_compiler(library)
    if nvcc is not None:
        return nvcc_compiler(nvcc)
    reason = "neither NVRTC (the wheel nvidia-cuda-nvrtc, in the extra `test`) nor nvcc is here"
    if sys.platform == "linux" and platform.machine() == "x86_64":
        pytest.fail(reason)
    pytest.skip(reason)


VARIANTS = [(file, tuple(sorted(macros.items()))) for file, macros in modules().variants()]
FEW = [next(v for v in VARIANTS if v[0] == file) for file in dict(VARIANTS)]


def test_every_launched_kernel_is_in_its_file():
    """Names in Python are kernels in CUDA: a misspelt one would only be found on a card."""
    launched = set()
    for path in FOLDER.glob("*.py"):
        launched |= set(re.findall(r'(?:launch|kernel)\(\s*"(\w+\.cu)",\s*"(\w+)"', path.read_text()))
    assert len(launched) > 10
    for file, name in launched:
        assert re.search(rf"__global__ void (__launch_bounds__\(.*\) )?{name}\(", (FOLDER / file).read_text()), (
            file,
            name,
        )


def test_every_kernel_is_launched():
    python = "".join(path.read_text() for path in FOLDER.glob("*.py"))
    for path in FOLDER.glob("*.cu"):
        for name in re.findall(r"__global__ void (?:__launch_bounds__\(.*?\) )?(\w+)\(", path.read_text()):
            assert f'"{name}"' in python, f"{name} of {path.name} is launched by nothing"


def test_where_a_field_starts_is_known_or_an_error():
    word_of, layout = backend("operands").word_of, np.dtype([("a", "i4"), ("b", "f8"), ("c", "i4")], align=True)
    outer = np.dtype([("first", "i8"), ("inner", layout)], align=True)
    assert (word_of(layout, "b"), word_of(outer, "inner", "b")) == (1, 2)
    for names in (("d",), ("inner", "d"), ("first", "b")):
        with pytest.raises(KeyError):
            word_of(outer, *names)
    with pytest.raises(KeyError, match="border"):
        word_of(np.dtype([("a", "i4"), ("b", "i4")]), "b")


# --- what Python and CUDA both state ---------------------------------------------------------------

WRONG = "python_says_otherwise"

FIRST_FIELDS = {"ranks": "scope_rank"}
"""Arrays of Python that are single fields in CUDA, one after the other."""


def layout_of(name: str, layout: np.dtype) -> list[str]:
    """That a struct of CUDA lies like one of Python: its size, and where each field starts."""
    assert layout.fields
    starts = {FIRST_FIELDS.get(field, field): start for field, (_, start, *_) in layout.fields.items()}
    places = [f"(unsigned long long)&(({name}*)0)->{field} == {start}" for field, start in starts.items()]
    return [f"sizeof({name}) == {layout.itemsize}", *places]


def equal(module: ModuleType, *names: str) -> list[str]:
    """That constants of a module have the same name and value in CUDA."""
    return [f"{name} == {getattr(module, name)}" for name in names]


def shared_facts() -> dict[str, list[str]]:
    """What the launches of a source take for granted, as conditions in CUDA."""
    small, selection, norms = backend("small"), backend("selection"), backend("norms")
    operands, shrinkage, writing = backend("operands"), backend("shrinkage"), backend("writing")
    orders = [f"{name} == {norms.ORDERS[ord]}" for name, ord in (("ONE", 1), ("TWO", 2), ("LARGEST", math.inf))]
    leaves = [*layout_of("Leaf", operands.LEAF), *layout_of("Numbers", operands.NUMBERS)]
    tasks = (
        "KTH", "MIDPOINT", "BLOCK_MASK", "ELEMENT_MASK", "PRUNE", "NORMS", "THRESHOLD", "SHRINK", "SHRINK_IN_METRIC",
        "APPLY_MASK", "SCALE", "SOFTEN",
    )  # fmt: skip
    problem = [
        *layout_of("Problem", small.PROBLEM), *layout_of("Part", small.PART), *layout_of("Leaf", small.LEAF),
        *layout_of("Numbers", small.NUMBERS), *layout_of("Measure", norms.MEASURE),
        *layout_of("Limits", shrinkage.LIMITS), *equal(small, "MOST_LEAVES", *tasks), *equal(norms, "LARGEST", "POWER"),
        f"MAX_LOOPS == {small.MOST_LOOPS}", f"THREADS == {small.THREADS}", *orders,
    ]  # fmt: skip
    low, high = importlib.import_module("npscope.backends").CONDITIONER_RANGE
    return {
        "small_scopes.cu": [*problem, f"MOST_KEYS == {small.MOST_BLOCKS}"],
        "small_blocks.cu": problem,
        "norms.cu": [
            *leaves, *layout_of("Leaves", operands.LEAVES), *layout_of("Measure", norms.MEASURE), *orders,
            *equal(norms, "LARGEST", "POWER", "NORM", "FACTOR"), f"THREADS == {modules().THREADS}",
        ],
        "selection.cu": [
            *leaves, *layout_of("Source", selection.SOURCE), *layout_of("Sources", selection.SOURCES),
            *equal(selection, "MAGNITUDE", "SIGNED", "INTEGER", "BINS", "TILE", "THREADS"),
            f"sizeof(Search) == {selection.SEARCH_BYTES}", f"PASSES == {selection.PASSES[32]}",
        ],
        "writing.cu": [
            *leaves, *layout_of("Decision", writing.DECISION), *equal(writing, "BY_RANK", "BY_THRESHOLD", "BY_MASK")
        ],
        "shrinkage.cu": [
            *leaves, *layout_of("Limits", shrinkage.LIMITS), f"LEAST_METRIC == {low}", f"LARGEST_METRIC == {high}"
        ],
        "tiles.cu": [*layout_of("Matrix", norms.MATRIX), *orders],
        "upload.cu": [f"sizeof(Bytes) == {operands.UPLOAD}"],
    }  # fmt: skip


def objections(compiler: Compiler, file: str, macros: tuple[tuple[str, object], ...], facts: list[str]) -> str:
    """What a compiler says to a variant of a source with these conditions at its end.

    Where a field starts is a constant expression to few versions of NVRTC, but a constant to the optimiser of each:
    what holds is left out, and what does not is a wrong instruction.
    """
    conditions = "".join(f'\n    if (!({fact})) asm volatile("{WRONG}_{i};");' for i, fact in enumerate(facts))
    options = (*modules().OPTIONS, *(f"-D{key}={value}" for key, value in macros))
    return compiler(f"{modules().source_of(file)}\n__global__ void conditions() {{{conditions}\n}}", options).strip()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("file", "macros"),
    [pytest.param(*v, marks=() if v in FEW else pytest.mark.slow) for v in VARIANTS],
    ids=lambda part: part if isinstance(part, str) else "-".join(f"{k}={v}" for k, v in part),
)
def test_compiles_and_agrees_with_python(compiler, file, macros):
    facts = shared_facts().get(file, []) if (file, macros) in FEW else []  # they are the same in every variant
    assert objections(compiler, file, macros, facts) == "", dict(enumerate(facts))


def test_what_python_and_cuda_disagree_on_is_found(compiler):
    wrong = [f"sizeof(Bytes) == {backend('operands').UPLOAD + 1}", "(unsigned long long)&((Bytes*)0)->bytes == 8"]
    assert objections(compiler, "upload.cu", (), wrong).count(WRONG) == len(wrong)


def test_dtypes_have_the_numbers_that_python_gives_them():
    numbers = dict(re.findall(r"#define ([A-Z]+\d*) (\d+)\n", (FOLDER / "elements.cuh").read_text()))
    for code, name in enumerate((*modules().DTYPES, "any")):
        assert numbers[name.upper()] == str(code)
