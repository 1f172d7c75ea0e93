"""npscope: which parts of an array survive.

An N-d array is cut into blocks, the grid of blocks into scopes; inside each scope the
blocks compete by norm: `nnz` of them are kept, or all are shrunk by a threshold.

Importing npscope loads NumPy and the standard library only; Numba and array libraries
are loaded by the first call that needs them.
"""

from npscope.block import BlockCoupling, BlockSpec, SparseBlock
from npscope.counts import nnz_from_sparsity
from npscope.errors import (
    ConvergenceError,
    CouplingError,
    FileError,
    FormatError,
    KindError,
    NpscopeError,
    SpecError,
)
from npscope.namespace import (
    block_mask,
    block_norms,
    hard_threshold,
    keep_largest,
    kth_largest,
    mid_kth_largest,
    namespace,
    soft_threshold,
    topk_mask,
)
from npscope.options import config, use_backend
from npscope.scope import ScopeCoupling, ScopeSpec, SparseScope
from npscope.view import View

__version__ = "0.1.0"

__all__ = [
    "BlockCoupling",
    "BlockSpec",
    "ConvergenceError",
    "CouplingError",
    "FileError",
    "FormatError",
    "KindError",
    "NpscopeError",
    "ScopeCoupling",
    "ScopeSpec",
    "SparseBlock",
    "SparseScope",
    "SpecError",
    "View",
    "__version__",
    "block_mask",
    "block_norms",
    "config",
    "hard_threshold",
    "keep_largest",
    "kth_largest",
    "mid_kth_largest",
    "namespace",
    "nnz_from_sparsity",
    "soft_threshold",
    "topk_mask",
    "use_backend",
]
