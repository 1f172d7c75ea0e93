"""What importing npscope loads, and which module may import which."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import npscope

ROOT = Path(npscope.__file__).parent

LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "dtypes": {"errors"},
    "tiling": {"errors"},
    "memory": set(),
    "axes": {"errors", "tiling"},
    "options": {"errors", "tiling"},
    "operands": {"errors", "dtypes", "memory", "axes", "options", "tiling"},
    "counts": {"errors", "axes", "operands", "options", "tiling"},
    "backends": {"errors", "dtypes", "tiling", "options", "memory", "axes"},
    "namespace": {"backends", "operands", "counts", "options", "axes", "tiling", "dtypes", "errors"},
    "view": {"operands", "memory", "tiling", "dtypes", "errors"},
    "block": {"view", "namespace", "backends", "operands", "memory", "axes", "tiling", "dtypes", "errors"},
    "scope": {"block", "view", "namespace", "backends", "operands", "counts", "axes", "tiling", "dtypes", "errors"},
    "clock": {"options", "backends"},
    "bench": {"clock", "namespace", "options", "axes", "dtypes", "errors"},
    "weights": {"errors"},
    "pattern": {"counts", "errors"},
    "plans": {"weights"},
    "slabs": {"weights", "errors"},
    "layout": {"pattern", "plans", "weights", "errors"},
    "allocation": {"counts", "errors"},
    "scores": {"plans", "weights", "errors"},
    "members": {"layout", "scores", "plans", "counts", "tiling", "weights", "errors"},
    "recipe": {"layout", "allocation", "members", "scores", "pattern", "plans", "counts", "weights", "errors"},
    "recipe_file": {"recipe", "members", "layout", "pattern", "errors"},
    "coupled": {"scores", "plans", "weights", "block", "scope"},
    "planning": {"recipe", "coupled", "members", "allocation", "plans", "weights", "errors"},
    "ranked": {"scores", "plans", "slabs", "weights"},
    "marks": {"slabs"},
    "narrowing": {"slabs"},
    "limits": {"plans", "ranked", "narrowing", "slabs", "namespace"},
    "dropping": {"limits", "marks", "coupled", "plans", "ranked", "slabs", "namespace", "block", "errors"},
    "masks": {"plans", "slabs", "weights", "errors"},
    "pruning": {
        *(
            "dropping",
            "marks",
            "masks",
            "limits",
            "ranked",
            "planning",
            "coupled",
            "recipe",
            "scores",
            "plans",
            "slabs",
            "weights",
        ),
        *("block", "errors"),
    },
    "occupancy": {"slabs", "weights", "options", "backends"},
    "inspection": {"layout", "occupancy", "slabs", "weights", "errors"},
    "verification": {"planning", "coupled", "recipe", "plans", "occupancy", "slabs", "weights", "errors"},
    "comparison": {"slabs", "weights"},
    "storage": {"weights"},
    "export": {"recipe", "planning", "plans", "verification", "storage", "slabs", "weights", "errors"},
}
"""For each module the modules of npscope that it may import; others may import all. A package counts as one, but for
those in `OPEN`, whose modules are layers themselves."""

OPEN = ("recipes", "streaming")

TOP = {"cli", "__main__", "__init__"}
"""What nothing else may import."""

STANDARD = {"numpy", "npscope", *sys.stdlib_module_names}

HEAVY = {
    "numba": ("backends/numba_cpu",),
    "llvmlite": ("backends/numba_cpu",),
    "cupy": ("backends/cupy_gpu",),
    "rich": ("cli", "viz"),
    "matplotlib": ("viz",),
    "dask": ("dask",),
    "torch": (),
    "jax": (),
    "scipy": (),
    "onnx": (),
    "onnxruntime": (),
    "google": (),
}
"""Where a library that is slow or may be missing may be imported at all."""


def modules() -> dict[str, ast.Module]:
    return {str(p.relative_to(ROOT).with_suffix("")): ast.parse(p.read_text()) for p in sorted(ROOT.rglob("*.py"))}


MODULES = modules()


def imported(name: str, tree: ast.AST) -> set[str]:
    """Dotted names of everything that `tree` imports, inside functions too; types only needed by a checker aside."""
    package = ["npscope", *name.split("/")[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{a.name}" for a in node.names} if module == "npscope" else {module}
            if module != "npscope" and module.startswith("npscope"):
                found |= {
                    f"{module}.{a.name}" for a in node.names if f"{module}.{a.name}".replace(".", "/")[8:] in MODULES
                }
    return found


def layer(name: str) -> str:
    """The row of the table that a module belongs to: its own name, or that of its package."""
    first, *rest = name.split("/")
    return rest[0] if first in OPEN and rest else first


@pytest.mark.parametrize("name", MODULES)
def test_layers_point_downwards(name):
    own = layer(name)
    below = {layer(n[8:].replace(".", "/")) for n in imported(name, MODULES[name]) if n.startswith("npscope.")} - {
        own,
        *OPEN,
    }
    if own not in TOP:
        assert not below & TOP, f"{name} imports {below & TOP}"
    if own in LAYERS:
        assert below <= LAYERS[own], f"{name} imports {below - LAYERS[own]}, which its layer does not allow"


def test_the_table_has_no_cycles_and_no_ghosts():
    known = {layer(m) for m in MODULES}
    assert set(LAYERS) <= known, f"no such module: {set(LAYERS) - known}"
    done: set[str] = set()
    while len(done) < len(LAYERS):
        ready = {m for m, below in LAYERS.items() if m not in done and below <= done}
        assert ready, f"a cycle among {set(LAYERS) - done}"
        done |= ready


@pytest.mark.parametrize("name", MODULES)
def test_heavy_libraries_stay_where_they_belong(name):
    for n in imported(name, MODULES[name]):
        places = HEAVY.get(n.split(".")[0])
        assert places is None or name.startswith(places), f"{name} imports {n}"


@pytest.mark.parametrize("name", MODULES)
def test_no_banned_numba_options(name):
    """No threading layer, no disk cache, no blanket fastmath, at any decorator."""
    if not name.startswith("backends/numba_cpu"):
        return
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.keyword) and node.arg in ("parallel", "cache", "fastmath"):
            assert not (isinstance(node.value, ast.Constant) and node.value.value is True), (
                f"{name}:{node.value.lineno}"
            )
        assert not (isinstance(node, ast.Attribute) and node.attr == "prange")


@pytest.mark.parametrize("name", MODULES)
def test_no_assert_checks_input_and_nothing_is_evaluated(name):
    for node in ast.walk(MODULES[name]):
        assert not isinstance(node, ast.Assert), f"{name}:{node.lineno} asserts"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{name}:{node.lineno}"
    assert "pickle" not in imported(name, MODULES[name])


LAZY = (
    "numba",
    "llvmlite",
    "array_api_compat",
    "ml_dtypes",
    "rich",
    "cupy",
    "torch",
    "jax",
    "safetensors",
    "onnx",
)


def fresh(code: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", ["npscope", "npscope.cli"])
def test_import_loads_numpy_and_the_standard_library_only(name):
    before = set(fresh("import numpy, sys; print(*{m.split('.')[0] for m in sys.modules})"))
    after = set(fresh(f"import {name}, sys; print(*{{m.split('.')[0] for m in sys.modules}})"))
    foreign = {m for m in after - before if m not in STANDARD}
    assert not foreign, foreign
    assert not after & set(LAZY)


def test_objects_and_small_checks_load_nothing_more():
    code = "import npscope as n, numpy, sys; n.BlockSpec(numpy.ones((4, 4)), (2, 2)); n.nnz_from_sparsity(0.5, 4)"
    assert not set(fresh(f"{code}; print(*{{m.split('.')[0] for m in sys.modules}})")) & set(LAZY)


def test_public_names_are_what_they_say():
    assert set(npscope.__all__) <= set(dir(npscope))
    for name in npscope.__all__:
        thing = getattr(npscope, name)
        assert name.startswith("__") or (thing.__doc__ and thing.__module__.startswith("npscope")), name


def test_the_readme_says_where_every_module_is() -> None:
    """Packages by their folders, and the modules of those that it lists in full."""
    design = (ROOT.parent / "README.md").read_text().split("## Design")[1]
    said = set(re.findall(r"`([a-z_]+/?)`", design))
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert {name for name in said if name.endswith("/")} == packages | {"bench/"}
    modules = {path.stem for folder in (".", "recipes", "streaming") for path in (ROOT / folder).glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} <= said
