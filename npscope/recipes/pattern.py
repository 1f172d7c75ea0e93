"""A pattern of sparsity, as it is written: which blocks compete, and how many survive.

A pattern has one size per block and per scope when it runs along an axis of a tensor, two when
it tiles a matrix. ``N:M`` keeps N of M, as hardware counts; after ``@`` stands the share that
is *pruned*.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Self

from npscope.counts import nnz_from_sparsity
from npscope.errors import SpecError

_NUMBER = r"\d+(?:\.\d*)?(?:e-?\d{1,2})?|\.\d+|\d+/\d+"
_N_OF_M = re.compile(r"(\d{1,9}):(\d{1,9})", re.ASCII)
_TILE_AT_SHARE = re.compile(r"([\dx]+)@(.+)", re.ASCII)
_SIZES = re.compile(r"(-1|\d{1,9})(?:x(-1|\d{1,9}))?", re.ASCII)
_SHARE = re.compile(_NUMBER, re.ASCII | re.IGNORECASE)
_WAYS = 'write "2:4", "4x4@0.5" or "block=1x16 scope=1x8 keep=4"'


@dataclass(frozen=True)
class Pattern:
    """Which blocks compete and how many survive.

    `block` counts elements and `scope` blocks, with -1 for a whole axis; `scope` None is the
    whole tensor. `amount` is the number of blocks to keep in a scope, or as a str the share of
    them to prune, which stays as it was written so that it is exact. `ord` is the norm that ranks.
    """

    block: tuple[int, ...]
    scope: tuple[int, ...] | None
    amount: int | str
    ord: float = 2.0

    @classmethod
    def parse(cls, text: str) -> Self:
        """The pattern that `text` writes; SpecError (a ValueError) says what is wrong with it.

        >>> Pattern.parse("2:4")
        Pattern(block=(1,), scope=(4,), amount=2, ord=2.0)
        >>> Pattern.parse("4x4@0.5")
        Pattern(block=(4, 4), scope=None, amount='0.5', ord=2.0)
        >>> Pattern.parse("block=1x16 scope=1x8 keep=4 ord=1").amount
        4
        """
        try:
            if n_of_m := _N_OF_M.fullmatch(text.strip()):
                keep, blocks = int(n_of_m[1]), int(n_of_m[2])
                return cls((1,), _sizes("scope", str(blocks)), _keep(keep, blocks))
            if tile := _TILE_AT_SHARE.fullmatch(text.strip()):
                return cls(_sizes("block", tile[1]), None, as_share(tile[2]))
            return cls._from_fields(_fields(text))
        except SpecError as error:
            raise SpecError(f"pattern {text!r:.80}: {error}") from None

    def keep_of(self, blocks: int) -> int:
        """How many of the `blocks` of a scope survive; SpecError when there are too few."""
        if isinstance(self.amount, str):
            return nnz_from_sparsity(self.amount, blocks)
        return _keep(self.amount, blocks)

    @classmethod
    def _from_fields(cls, fields: dict[str, str]) -> Self:
        if "block" not in fields:
            raise SpecError(f"the block size is missing; {_WAYS}")
        block = _sizes("block", fields["block"])
        scope = _sizes("scope", fields["scope"]) if "scope" in fields else None
        if scope is not None and len(scope) != len(block):
            raise SpecError(f"block has {len(block)} sizes and scope {len(scope)}; give as many to both")
        if ("keep" in fields) == ("sparsity" in fields):
            raise SpecError("give either keep= or sparsity=")
        ord = as_ord(fields.get("ord", "2"))
        if "sparsity" in fields:
            return cls(block, scope, as_share(fields["sparsity"]), ord)
        if not re.fullmatch(r"\d{1,18}", fields["keep"], re.ASCII):
            raise SpecError(f"keep={fields['keep']!r:.40} is not a whole number of blocks")
        total = None if scope is None or -1 in scope else math.prod(scope)
        return cls(block, scope, _keep(int(fields["keep"]), total), ord)


def _fields(text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals:
            raise SpecError(f"{word!r:.40} is no pattern; {_WAYS}")
        if key not in ("block", "scope", "keep", "sparsity", "ord"):
            raise SpecError(f"{key!r:.40} is unknown; known are block, scope, keep, sparsity, ord")
        if key in fields:
            raise SpecError(f"{key} is given twice")
        fields[key] = value
    return fields


def _sizes(what: str, text: str) -> tuple[int, ...]:
    match = _SIZES.fullmatch(text)
    if not match:
        raise SpecError(f"{what} {text!r:.40} is not one size or two like 4x4; -1 is a whole axis")
    sizes = tuple(int(size) for size in match.groups() if size is not None)
    if 0 in sizes:
        raise SpecError(f"{what} {text} holds the size 0; sizes are at least 1, or -1 for a whole axis")
    return sizes


def _keep(keep: int, blocks: int | None) -> int:
    if blocks is not None and keep > blocks:
        raise SpecError(f"cannot keep {keep} of {blocks} blocks; keep at most {blocks}")
    return keep


def as_share(text: str) -> str:
    """`text` if it writes a share in [0, 1], such as ``0.5`` or ``1/3``; SpecError if not."""
    # The grammar first: an exact fraction of 1e-999999999 would not fit in memory.
    if len(text) > 40 or not _SHARE.fullmatch(text):
        raise SpecError(f"sparsity {text!r:.40} is not a number in [0, 1], such as 0.5 or 1/3")
    nnz_from_sparsity(text, 1)
    return text


def as_ord(text: str) -> float:
    """The order of a norm that `text` writes: ``inf`` or a positive number; SpecError if it is none."""
    if text.lower() == "inf":
        return math.inf
    if not re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text, re.ASCII) or float(text) == 0:
        raise SpecError(f"ord={text!r:.40} is not 1, 2, inf or another positive number")
    return float(text)
