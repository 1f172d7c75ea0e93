"""Masks of a pruned file: which elements were kept, in a file of their own.

A mask file is a safetensors file. For each pruned tensor it holds a tensor of the same name, U8
of shape ``[ceil(n / 8)]`` for n elements: element i of the tensor as it is stored, in row-major
order, is bit ``i % 8`` of byte ``i // 8``, counted from the least significant. 1 is kept. The bits
behind the last element are 0. Its ``__metadata__`` holds

- ``npscope.mask``: the version of this layout, ``1``;
- ``recipe``: SHA-256 of what was asked for, in exact numbers (`recipe_hash`). It tells recipes apart, not
  masks: weights do not enter it, and scores by their names and not by their numbers;
- ``tensors``: a JSON object, name to ``{"shape": [...], "pattern": "keep 2 of 4, axis 1 (in)"}``, and
  ``"fortran": true`` of an array in Fortran order, whose shape and bits are those of its transpose.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from npscope.errors import FormatError, SpecError, about
from npscope.recipes.plans import Budget, Coupling, Decision, Member, Plan, Scores, Skip, parts_of
from npscope.streaming.slabs import Array
from npscope.weights import Tensor, WeightFile, open_weights
from npscope.weights.new_safetensors import NewSafetensors, create, is_begun
from npscope.weights.output import Target, exists, require_free
from npscope.weights.packed import Packed
from npscope.weights.safetensors import open_safetensors

VERSION = "1"

CHUNK_ELEMENTS = 1 << 20
"""Elements that are masked at a time; a multiple of 8."""


# --- writing -------------------------------------------------------------------------------------


def mask_target(path: str | os.PathLike[str], decisions: Sequence[Decision], *, force: bool) -> Target:
    """The place at `path` for the mask file of these decisions.

    SpecError (a ValueError) when a file is there that may not be replaced; without `force` the very
    mask that is to come may stay there, as far as that can be told now.
    """
    place = Target.of(path, force=force, keep_equal=True)
    if place.mode is not None and not force and not is_begun(place.path, *_contents(decisions)):
        raise exists(place.path)
    return place


@contextmanager
def mask_file(target: Target, decisions: Sequence[Decision]) -> Iterator[MaskWriter]:
    """Context with the writer of the mask file of these decisions, which is at `target` when it is published."""
    with create(target, *_contents(decisions)) as file:
        yield MaskWriter(file)


def _contents(decisions: Sequence[Decision]) -> tuple[list[Tensor], dict[str, str]]:
    """Tensors and metadata of a mask file."""
    parts = {part.tensor.name: part for decision in decisions for part in parts_of(decision)}
    described = {
        name: {"shape": list(part.tensor.shape), "pattern": f"{part.pattern}, {part.along}"}
        | ({"fortran": True} if part.tensor.fortran else {})
        for name, part in sorted(parts.items())
    }
    metadata = {"npscope.mask": VERSION, "recipe": recipe_hash(decisions), "tensors": json.dumps(described)}
    return [_packed(part.tensor) for part in parts.values()], metadata


def recipe_hash(decisions: Sequence[Decision]) -> str:
    """SHA-256, in hex, of what is asked for: which tensors, cut how, how many blocks survive.

    However a recipe is written, the same numbers give the same hash. Neither weights nor scores are
    read for it: of a file of scores it holds which tensor ranks, and along which axis.
    """
    asked = [_numbers(decision) for decision in decisions if not isinstance(decision, Skip)]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def _numbers(decision: Plan | Budget | Coupling) -> list[Any]:
    if isinstance(decision, Budget):
        return [decision.keep, decision.bounds, [_geometry(plan) for plan in decision.plans]]
    if isinstance(decision, Coupling):
        groups = [[group.scope, [_member(member) for member in group.members]] for group in decision.groups]
        return [decision.keep, decision.ord, groups]
    return [decision.keep, _geometry(decision)]


def _geometry(plan: Plan) -> list[Any]:
    return [plan.tensor.name, plan.shape, plan.order, plan.block, plan.scope, plan.ord, _ranks(plan.scores)]


def _member(member: Member) -> list[Any]:
    window = member.window
    place = [window.tensor.name, window.shape, window.strides, window.offset]
    return [*place, member.block, member.order, _ranks(member.scores)]


def _ranks(scores: Scores | None) -> list[Any] | None:
    return None if scores is None else [scores.tensor.name, scores.along]


def _packed(tensor: Tensor) -> Tensor:
    """The mask of `tensor`, as a tensor."""
    size = -(-math.prod(tensor.shape) // 8)
    return Tensor(tensor.name, "uint8", (size,), size)


class MaskWriter:
    """Packs masks into a mask file, tensor by tensor, each in pieces in the order of its bytes."""

    def __init__(self, file: NewSafetensors) -> None:
        self._file = file
        self._done = 0  # elements of the tensor at work
        self._rest = np.empty(0, np.bool_)  # those that do not fill a byte yet

    def add(self, tensor: Tensor, kept: Array) -> None:
        """Take the mask of the next elements of a tensor, bool with one axis, in the order of its bytes."""
        self._done += kept.size
        complete = self._done == math.prod(tensor.shape)
        bits = np.concatenate([self._rest, kept]) if self._rest.size else kept
        ready = bits.size if complete else bits.size // 8 * 8
        if ready:
            self._file.append(tensor.name, np.packbits(bits[:ready], bitorder="little").data)
        self._rest = bits[ready:].copy()
        self._done = 0 if complete else self._done

    def publish(self) -> None:
        """Put the file, which is complete, in its place."""
        self._file.publish()

    def withdraw(self) -> None:
        """Take it away again, if none was there before."""
        self._file.withdraw()


# --- applying ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Masked:
    """One tensor that a mask was applied to: elements that it drops, and those of them that were not zero before."""

    tensor: Tensor
    dropped: int
    changed: int


def apply_mask(
    source: str | os.PathLike[str],
    mask: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    force: bool = False,
) -> list[Masked]:
    """Write a copy of the weights in `source` to `target` in which what `mask` does not keep is +0.0.

    Parameters
    ----------
    source
        A weight file of any format; it is only read.
    mask
        A mask file, as ``npscope prune --mask-out`` writes it.
    target
        Place for the result.
    force
        Replace an existing `target`.

    Raises
    ------
    SpecError
        (a ValueError) the mask does not fit the file: a name is missing, or a shape differs.
    FormatError
        (a ValueError) one of the files is damaged, or `mask` is no mask file.
    FileError, OSError
        Reading or writing failed; there is no output then.
    """
    with open_weights(source) as weights, open_safetensors(mask) as bits:
        for path in weights.places(target):
            require_free(path, "output", {"mask": bits.files()})
        place = weights.target(target, force=force)
        with about(f"mask {os.fsdecode(mask)!r}"):
            _check(bits, weights)
        done = []
        with weights.successor(place) as writer:
            for tensor in weights.tensors.values():
                if tensor.name not in bits.tensors:
                    writer.copy(tensor)
                    continue
                dropped = changed = 0
                for kept, values in _chunks(weights, tensor, bits):
                    units = values.reshape(kept.size, -1)
                    dropped += kept.size - int(np.count_nonzero(kept))
                    changed += int(np.count_nonzero(units[~kept].any(axis=1)))
                    units[~kept] = 0
                    writer.write(tensor, values.view(np.uint8).data)
                done.append(Masked(tensor, dropped, changed))
            bits.check_unchanged()
        return done


def _chunks(weights: WeightFile, tensor: Tensor, bits: Packed) -> Iterator[tuple[Array, Array]]:
    """(mask, values) of a tensor, chunk by chunk; the values are words, as few for an element as can be."""
    size = math.prod(tensor.shape)
    itemsize = tensor.nbytes // size if size else 1
    word = math.gcd(itemsize, 8)
    packed = bits.tensors[tensor.name]
    for start in range(0, size, CHUNK_ELEMENTS):
        count = min(CHUNK_ELEMENTS, size - start)
        raw = np.empty(count * itemsize, np.uint8)
        weights.read(tensor, start * itemsize, raw.data)
        some = np.empty(-(-count // 8), np.uint8)
        bits.read(packed, start // 8, some.data)
        kept = np.unpackbits(some, count=count, bitorder="little").view(np.bool_)
        yield kept, raw.view(f"<u{word}")


def _check(bits: Packed, weights: WeightFile) -> None:
    """FormatError for what is no mask file, SpecError for one of another file of weights."""
    if bits.metadata.get("npscope.mask") != VERSION:
        raise FormatError(f"this is no mask file of version {VERSION}; `npscope prune --mask-out` writes one")
    shapes = _shapes(bits.metadata.get("tensors", ""))
    if shapes.keys() != bits.tensors.keys():
        raise FormatError("__metadata__ does not describe the tensors that are there")
    for name, packed in bits.tensors.items():
        with about(f"tensor {name!r:.120}"):
            tensor = weights.tensors.get(name)
            if tensor is None:
                raise SpecError("the file of weights has none of this name")
            shape, fortran = shapes[name]
            if tensor.shape != shape:
                raise SpecError(f"the mask has shape {list(shape)}, the tensor {list(tensor.shape)}")
            if tensor.fortran != fortran:
                raise SpecError(
                    "one of mask and tensor is in Fortran order and the other is not; prune this file itself"
                )
            size = math.prod(tensor.shape)
            if (packed.dtype, packed.shape) != ("uint8", (-(-size // 8),)):
                raise FormatError(f"{packed.dtype} of shape {list(packed.shape)} cannot be the mask of {size} elements")
            if size and tensor.nbytes % size:
                raise SpecError(f"dtype {tensor.dtype} packs several elements in a byte; they cannot be masked")
            if size % 8:
                last = bytearray(1)
                bits.read(packed, packed.nbytes - 1, memoryview(last))
                if last[0] >> size % 8:
                    raise FormatError("bits behind the last element are set")


def _shapes(text: str) -> Mapping[str, tuple[tuple[int, ...], bool]]:
    """The shapes of all tensors, and whether they are in Fortran order, from the metadata of a mask file."""
    try:
        described = json.loads(text)
        return {
            name: (tuple(map(_length, fields["shape"])), fields.get("fortran", False) is True)
            for name, fields in described.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError("__metadata__ lacks a JSON object of tensors with their shapes") from None


def _length(value: object) -> int:
    if type(value) is not int or value < 0:  # type() and not isinstance(): True is an int
        raise ValueError(value)
    return value
