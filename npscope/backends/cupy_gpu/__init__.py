"""The CuPy backend: CUDA kernels on device memory.

Operations only queue work on the current stream: nothing is read back but what returns a number or
was asked for by ``config(check=True)``, so that a call can be captured in a CUDA graph. Decisions
(the cut of a scope, the factor of a block) are made in tables on the device and then written; small
problems are decided and written by one launch, those of a proximal step by one a part (`small`). What a
call needs is allocated from CuPy's pool before its first write.
"""

from __future__ import annotations

from npscope.backends.cupy_gpu import small, writing
from npscope.backends.cupy_gpu.guard import guarded

__all__ = [
    "NAME",
    "apply_mask",
    "count_nonzero",
    "element_masks",
    "kth",
    "mask",
    "midpoint",
    "norms",
    "prune",
    "scale",
    "shrink",
    "sum_squares",
    "threshold",
]

NAME = "cupy"

norms = guarded(small.norms)
kth = guarded(small.kth)
midpoint = guarded(small.midpoint)
mask = guarded(small.mask)
element_masks = guarded(small.element_masks)
prune = guarded(small.prune)
threshold = guarded(small.threshold)
apply_mask = guarded(small.apply_mask)
scale = guarded(small.scale)
shrink = guarded(small.shrink)
count_nonzero = guarded(writing.count_nonzero)
sum_squares = guarded(writing.sum_squares)
