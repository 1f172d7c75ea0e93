"""Members of couplings: which elements of which tensors form blocks together.

A member is a tensor, or a slice of one, reshaped so that its axes are those of blocks (heads, head
size, inputs), and sliced again where only some of those belong to it. Geometry alone is used, and
everything that cannot be meant is refused by the names of both members.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from npscope.counts import nnz_from_sparsity
from npscope.errors import CouplingError, SpecError, about
from npscope.recipes.layout import Layout, meaning
from npscope.recipes.plans import Coupling, Group, Member, Window
from npscope.recipes.scores import scores_of
from npscope.tiling import Tiling, as_orders
from npscope.weights import Tensor, WeightFile

_INDEX = re.compile(r"\d{1,18}", re.ASCII)
_RANGE = re.compile(r"(\d{1,18})?:(\d{1,18})?(?::(\d{1,18}))?", re.ASCII)

_STAR = r"([^./]*)"

_OVERLAP_WORK = 1_000_000
"""Steps that the exact search for a shared element may take; windows from slices need a few."""


class MemberRule(NamedTuple):
    """A member as a recipe writes it.

    `tensor` is a name in which ``*`` stands for what tells the instances of a coupling apart, such
    as the number of a layer: any text without a dot or slash. Its axes are taken as
    ``[out, in, ...]``, however they are stored. `slice` is taken of it first, then comes `reshape`
    (in C order, -1 is the rest), then `take` slices the reshaped one: ``"0:384, :"``, a number
    drops its axis. `block` counts elements (-1 is a whole axis), `order` permutes the axes of the
    grid.
    """

    tensor: str
    block: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    slice: str | None = None
    reshape: tuple[int, ...] | None = None
    take: str | None = None


class CouplingRule(NamedTuple):
    """Members whose blocks are kept or dropped together.

    `amount` is as in a `Pattern`, and `scope` counts blocks of the aligned grid (``()`` is all of
    it). With `across` the blocks of all instances compete in one scope. `layout` says how the
    tensors are stored, where their file does not.
    """

    label: str
    members: tuple[MemberRule, ...]
    amount: int | str
    scope: tuple[int, ...] = ()
    ord: float = 2.0
    across: bool = False
    scores: str | None = None
    layout: Layout = "out-in"


def couple(
    rules: Sequence[CouplingRule], tensors: Mapping[str, Tensor], files: Mapping[str, WeightFile]
) -> list[Coupling]:
    """The couplings that `rules` make of the tensors of a file, by the names that a recipe knows them by.

    SpecError (a ValueError) when a member matches nothing or does not fit, CouplingError, which is
    one, when two do not fit each other.
    """
    couplings = [coupling for rule in rules for coupling in _couplings(rule, tensors, files)]
    owners: dict[str, str] = {}
    for coupling in couplings:
        for tensor in coupling.tensors:
            if tensor.name in owners:
                raise CouplingError(
                    f"tensor {tensor.name!r:.120} is in {owners[tensor.name]} and in {coupling.name}; "
                    "a tensor can be in one coupling, there in several windows"
                )
            owners[tensor.name] = coupling.name
    return couplings


def _couplings(rule: CouplingRule, tensors: Mapping[str, Tensor], files: Mapping[str, WeightFile]) -> list[Coupling]:
    groups = []
    for instance, names in _instances(rule, tensors).items():
        with about(f"{rule.label} ({instance})" if instance else rule.label):
            members = [_member(rule, m, tensors[n], n, files) for m, n in zip(rule.members, names, strict=True)]
            _require_equal_grids(members)
            groups.append((instance, Group(tuple(members), Tiling.scopes(members[0].aligned, rule.scope).tile)))
    if rule.across:
        with about(rule.label):
            return [_coupling(rule, rule.label, [group for _, group in groups])]
    return [_coupling(rule, f"{rule.label} ({i})" if i else rule.label, [group]) for i, group in groups]


def _coupling(rule: CouplingRule, name: str, groups: Sequence[Group]) -> Coupling:
    with about(name):
        _require_separate([member for group in groups for member in group.members])
        grids = [tuple(n // s for n, s in zip(g.members[0].aligned, g.scope, strict=True)) for g in groups]
        for grid, group in zip(grids, groups, strict=True):
            if grid != grids[0]:
                raise CouplingError(
                    f"{_said(group.members[0])} has a grid of scopes {grid}, {_said(groups[0].members[0])} {grids[0]}"
                )
        blocks = sum(group.blocks for group in groups)
        keep = nnz_from_sparsity(rule.amount, blocks) if isinstance(rule.amount, str) else rule.amount
        if not 0 <= keep <= blocks:
            raise SpecError(f"cannot keep {keep} of {blocks} blocks; keep at most {blocks}")
        return Coupling(name, tuple(groups), math.prod(grids[0]), blocks, keep, rule.ord)


def _instances(rule: CouplingRule, tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """For each instance, named by what the stars stand for, the tensor of every member."""
    found: list[dict[str, str]] = []
    for member in rule.members:
        expression = re.compile(_STAR.join(map(re.escape, member.tensor.split("*"))))
        hits = ((name, expression.fullmatch(name)) for name in tensors)
        names = {", ".join(hit.groups()): name for name, hit in hits if hit is not None}
        if not names:
            raise SpecError(f"{rule.label}: {member.tensor!r:.120} matches none of the {len(tensors)} tensors")
        if found and names.keys() != found[0].keys():
            instance = min(names.keys() ^ found[0].keys())
            has, lacks = (member, rule.members[0]) if instance in names else (rule.members[0], member)
            raise CouplingError(
                f"{rule.label}: {has.tensor!r:.120} has an instance {instance!r:.80}, {lacks.tensor!r:.120} has none"
            )
        found.append(names)
    return {instance: [names[instance] for names in found] for instance in found[0]} if found else {}


def _member(
    rule: CouplingRule, member: MemberRule, tensor: Tensor, name: str, files: Mapping[str, WeightFile]
) -> Member:
    with about(f"member {name!r:.120}"):
        if not tensor.is_ranked:
            raise SpecError(f"dtype {tensor.dtype} cannot be pruned")
        if not (tensor.is_float or "*" not in member.tensor):
            raise SpecError(f"dtype {tensor.dtype} is pruned only where a member gives the name in full")
        axes = meaning(tensor, rule.layout) if len(tensor.shape) >= 2 else None
        order = None if axes is None else axes.order
        window = window_of(tensor, member.slice, member.reshape, member.take, order=order)
        if not window.shape or 0 in window.shape:
            raise SpecError(f"the window has shape {window.shape}; needed are axes with elements")
        tiling = Tiling.blocks(window.shape, member.block)
        (aligning,) = as_orders((member.order,), (len(window.shape),))
        if rule.scores is None:
            return Member(window, tiling.tile, aligning)
        return Member(window, tiling.tile, aligning, scores_of(files[rule.scores], rule.scores, tensor, name, axes))


def window_of(
    tensor: Tensor,
    slice: str | None = None,
    reshape: tuple[int, ...] | None = None,
    take: str | None = None,
    order: tuple[int, ...] | None = None,
) -> Window:
    """The window of `tensor` that a slice, a reshape and another slice leave; SpecError when there is none.

    `order` puts the stored axes in another order first.

    >>> window = window_of(Tensor("w", "float32", (12, 8), 384), "4:12", (2, 4, 8), ":, 1")
    >>> window.shape, window.strides, window.offset
    ((2, 8), (32, 1), 40)
    """
    array, origin = _addresses(tensor.shape)
    if order is not None:
        array = array.transpose(order)
    array = _sliced(array, slice, "slice")
    if reshape is not None:
        try:
            array = array.reshape(reshape, copy=False)
        except ValueError:
            raise SpecError(f"shape {array.shape} cannot be reshaped to {reshape} without a copy") from None
    array = _sliced(array, take, "take")
    return Window(tensor, array.shape, array.strides, array.__array_interface__["data"][0] - origin)


def _addresses(shape: tuple[int, ...]) -> tuple[Any, int]:
    """An array of bytes whose addresses count the elements of a C-contiguous `shape`; there is no memory behind it."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    array = np.lib.stride_tricks.as_strided(np.zeros(1, np.int8), shape, strides)
    return array, array.__array_interface__["data"][0]


def _sliced(array: Any, text: str | None, what: str) -> Any:
    if text is None:
        return array
    words = [word.strip() for word in text.split(",")]
    if len(words) > array.ndim:
        raise SpecError(f"{what} {text!r:.80} has {len(words)} axes, {array.shape} has {array.ndim}")
    return array[tuple(_part(word, length, what) for word, length in zip(words, array.shape, strict=False))]


def _part(word: str, length: int, what: str) -> slice | int:
    if _INDEX.fullmatch(word):
        if int(word) >= length:
            raise SpecError(f"{what}: there is no index {word} in an axis of {length}")
        return int(word)
    if not (found := _RANGE.fullmatch(word)):
        raise SpecError(f'{what}: {word!r:.40} is not a range such as ":", "0:384" or "::2", or an index')
    start, stop, step = (
        int(part) if part else default for part, default in zip(found.groups(), (0, length, 1), strict=True)
    )
    if not (start < stop <= length and step):
        raise SpecError(f"{what}: {word} is no range within an axis of {length}")
    return slice(start, stop, step)


def _require_equal_grids(members: Sequence[Member]) -> None:
    """CouplingError naming two members whose grids differ."""
    for member in members[1:]:
        if member.aligned != members[0].aligned:
            raise CouplingError(
                f"{_said(member)} has a grid {member.aligned}, {_said(members[0])} has {members[0].aligned}; "
                "block, reshape or order can make them agree"
            )


def _require_separate(members: Sequence[Member]) -> None:
    """CouplingError naming two members that share an element."""
    before: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        others = before[member.window.tensor.name]
        for other in others:
            if _meet(member.window, other.window):
                raise CouplingError(f"{_said(other)} and {_said(member)} share an element")
        others.append(member)


def _meet(a: Window, b: Window) -> bool:
    base, _ = _addresses((1,))
    first, second = (np.lib.stride_tricks.as_strided(_moved(base, w.offset), w.shape, w.strides) for w in (a, b))
    try:
        return np.shares_memory(first, second, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]  # NumPy's stubs know two of its values
    except np.exceptions.TooHardError:
        return True  # undecided: refused, as an overlap is


def _moved(base: Any, offset: int) -> Any:
    """The first element of `base` moved by `offset` elements that are never touched."""
    return np.lib.stride_tricks.as_strided(base, (offset + 1,), (1,))[offset:]


def _said(member: Member) -> str:
    return f"member {member.window.tensor.name!r:.120} {member.window.shape} in blocks of {member.block}"
