"""The CuPy backend: CUDA kernels on device memory.

Operations only queue work on the current stream: nothing is read back but what returns an integer or
was asked for by ``config(check=True)``, so that a call can be captured in a CUDA graph. Small decisions
(the cut of a scope, the factor of a block) are made in tables on the device and then written. What a
call needs is allocated from CuPy's pool before its first write.
"""

from __future__ import annotations

from npscope.backends.cupy_gpu import norms as _norms
from npscope.backends.cupy_gpu import selection, shrinkage, writing
from npscope.backends.cupy_gpu.guard import guarded

__all__ = [
    "NAME",
    "apply_mask",
    "count_nonzero",
    "kth",
    "mask",
    "norms",
    "prune",
    "scale",
    "shrink",
    "threshold",
]

NAME = "cupy"

norms = guarded(_norms.norms)
kth = guarded(selection.kth)
mask = guarded(writing.mask)
prune = guarded(writing.prune)
threshold = guarded(writing.threshold)
apply_mask = guarded(writing.apply_mask)
scale = guarded(writing.scale)
shrink = guarded(shrinkage.shrink)
count_nonzero = guarded(writing.count_nonzero)
