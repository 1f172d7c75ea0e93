"""Recipes as files: TOML, or JSON with the same structure, read without running anything.

Numbers stay as they were written, so that a sparsity of 0.29 is 29 of 100. Whatever is not
understood is refused by file and key, with the nearest key that is.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, NoReturn, TypeVar, get_args

from npscope.errors import FormatError, SpecError, about
from npscope.recipes.layout import Axis, Layout, require_axis
from npscope.recipes.members import CouplingRule, MemberRule
from npscope.recipes.pattern import Pattern, as_ord, as_share
from npscope.recipes.recipe import Recipe, Rule, Spread

MAX_BYTES = 4 << 20
"""A longer file is no recipe."""

_TOP = ("rule", "coupling", "names", "scores", "layout")
_WHERE = ("match", "op", "node", "shape")
_AMOUNT = ("keep", "of", "sparsity")
_RULE = (
    *("name", *_WHERE, "skip", "default_skips", "misfit", "axis", "layout", "scores"),
    *("pattern", "block", "scope", *_AMOUNT, "ord", "budget", "min_sparsity", "max_sparsity", "allocation"),
)
_COUPLING = ("name", "member", *_AMOUNT, "scope", "ord", "across", "scores", "layout")
_MEMBER = ("tensor", "slice", "reshape", "take", "block", "order")

_T = TypeVar("_T")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in the file at `path`; paths of scores in it count from its folder.

    A name that ends in ``.json`` is JSON, any other TOML. SpecError (a ValueError) says which key
    cannot be meant, FormatError (one too) that the file is no TOML or JSON, OSError that it cannot
    be read.
    """
    name = os.fsdecode(path)
    with about(f"recipe {name!r}"):
        text = _text(name)
        tables = _json(text) if name.lower().endswith(".json") else _toml(text)
        return replace(parse_recipe(tables, folder=os.path.dirname(name)), path=name)


def recipe_of(
    path: str | None = None,
    *,
    pattern: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    axis: Axis | None = None,
    layout: Layout | None = None,
    scores: str | None = None,
) -> Recipe:
    """The recipe that a command line asks for: the file at `path`, or the shorthand that the rest makes.

    `scores` is the file to rank by wherever a recipe names none. SpecError (a ValueError) when both
    or neither are given, and as `read_recipe`.
    """
    options = {"--pattern": pattern, "--include": include, "--exclude": exclude, "--axis": axis, "--layout": layout}
    given = [option for option, value in options.items() if value not in (None, (), [])]
    if path is not None:
        if given:
            raise SpecError(f"{given[0]} and --recipe cannot both be given; a recipe says it in its rules")
        recipe = read_recipe(path)
    elif pattern is None:
        raise SpecError("nothing says what to do: give --pattern, or a recipe with -r")
    else:
        chosen = "in" if axis is None else axis
        recipe = Recipe.shorthand(Pattern.parse(pattern), include, exclude, chosen, layout or "out-in")
    return recipe if scores is None else recipe.with_scores(scores)


def parse_recipe(tables: Mapping[str, Any], *, folder: str = "") -> Recipe:
    """The recipe that tables as from TOML describe; SpecError (a ValueError) when one cannot be meant.

    >>> parse_recipe({"rule": [{"match": "*.weight", "pattern": "2:4"}]}).rules[0].names
    ('*.weight',)
    """
    top = _Table(tables, "", _TOP, folder)
    top.get_or("scores", _string, "")
    top.get_or("layout", _layout, "out-in")
    shared = {key: tables[key] for key in ("scores", "layout") if key in tables}
    names = top.get_or("names", _names, {})
    rules = [_rule(table, number, shared, folder) for number, table in enumerate(top.get_or("rule", _tables, []), 1)]
    couplings = [
        _coupling(table, number, shared, folder) for number, table in enumerate(top.get_or("coupling", _tables, []), 1)
    ]
    if not rules and not couplings:
        raise SpecError("there is no [[rule]] and no [[coupling]]")
    return Recipe(tuple(rules), tuple(couplings), names)


# --- reading -------------------------------------------------------------------------------------


def _text(path: str) -> str:
    # O_NONBLOCK: opening a FIFO must not wait for somebody to write to it.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise FormatError("this is not a regular file")
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise FormatError(f"more than {MAX_BYTES} bytes are no recipe")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"byte {error.start} is no UTF-8") from None


def _toml(text: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text, parse_float=_decimal)
    except RecursionError:
        raise FormatError("the file is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"no TOML: {error}") from None


def _json(text: str) -> dict[str, Any]:
    try:
        tables = json.loads(text, parse_float=_decimal, parse_constant=_refuse, object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError("the file is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:
        raise FormatError(f"no JSON: {error}") from None
    if not isinstance(tables, dict):
        raise FormatError("a recipe is a JSON object")
    return tables


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise FormatError(f"{text:.40} is no number of a size that can be held") from None


def _refuse(text: str) -> NoReturn:
    raise FormatError(f"{text} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise FormatError(f"the key {twice!r:.80} stands twice in one object")
    return table


class _Table:
    """A table whose keys are known, and are read by what they must be."""

    def __init__(self, table: Mapping[str, Any], label: str, known: Iterable[str], folder: str) -> None:
        self.label = label
        self._table, self._folder = table, folder
        for key in table:
            if key not in known:
                raise SpecError(
                    f"{self.at()}unknown key {key!r:.80}{_meant(key, known)} (known are {', '.join(known)})"
                )

    def get(self, key: str, read: Callable[[Any], _T]) -> _T | None:
        """What `read` makes of the value; None where there is none."""
        if key not in self._table:
            return None
        with about(f"{self.at()}{key}"):
            return read(self._table[key])

    def get_or(self, key: str, read: Callable[[Any], _T], default: Any) -> _T:
        """What `read` makes of the value, or of `default` where there is none."""
        with about(f"{self.at()}{key}"):
            return read(self._table.get(key, default))

    def together(self, *keys: str) -> None:
        """SpecError when more than one of `keys` is given."""
        given = [key for key in keys if key in self._table]
        if len(given) > 1:
            raise SpecError(f"{self.at()}{' and '.join(given)} cannot both be given")

    def alone(self, key: str, *others: str) -> None:
        """SpecError when one of `others` is given without `key`."""
        for other in others:
            if other in self._table and key not in self._table:
                raise SpecError(f"{self.at()}{other} needs {key}")

    def path(self, value: Any) -> str:
        """A path, counted from the folder of the recipe."""
        return os.path.join(self._folder, _string(value))

    def __contains__(self, key: str) -> bool:
        return key in self._table

    def at(self) -> str:
        """The beginning of a message about the table."""
        return f"{self.label}: " if self.label else ""


# --- rules ---------------------------------------------------------------------------------------


def _rule(table: Mapping[str, Any], number: int, shared: Mapping[str, Any], folder: str) -> Rule:
    keys = _Table(table, _label("rule", table, f"rule {number}"), _RULE, folder)
    where: dict[str, Any] = {
        "label": keys.label,
        "names": keys.get("match", _strings) or (),
        "op": keys.get("op", _string),
        "node": keys.get("node", _string),
        "shape": keys.get("shape", _lengths),
    }
    if keys.get_or("skip", _bool, False):
        for key in table:
            if key not in (*_WHERE, "name", "skip"):
                raise SpecError(f"{keys.label}: {key} says how to prune, and skip = true not to")
        return Rule(**where)
    keys = _Table({**shared, **table}, keys.label, _RULE, folder)
    spread, pattern = _spread(keys), _pattern(keys)
    axis, layout = keys.get_or("axis", _axis, "in"), keys.get_or("layout", _layout, "out-in")
    with about(f"{keys.label}: axis"):
        require_axis(pattern, axis)
    return Rule(
        **where,
        pattern=pattern,
        axis=axis,
        layout=layout,
        spread=spread,
        bounds=(keys.get_or("min_sparsity", _share, "0"), keys.get_or("max_sparsity", _share, "1")),
        scores=keys.get("scores", keys.path),
        misfit=keys.get_or("misfit", _misfit, "error"),
        default_skips=keys.get_or("default_skips", _bool, True),
    )


def _label(kind: str, table: Mapping[str, Any], unnamed: str) -> str:
    """What messages call a table: by its name if it has one."""
    if "name" not in table:
        return unnamed
    with about(f"{unnamed}: name"):
        return f"{kind} {_string(table['name'])!r:.80}"


def _spread(keys: _Table) -> Spread:
    keys.together("budget", "allocation", "keep")
    keys.together("budget", "sparsity")
    keys.alone("sparsity", "allocation")
    keys.alone("budget", "min_sparsity", "max_sparsity")
    if "budget" in keys:
        return "budget"
    return keys.get("allocation", _allocation) or "each"


def _pattern(keys: _Table) -> Pattern:
    """The pattern that a rule writes as one text, or key by key."""
    ord = keys.get_or("ord", _ord, 2)
    for key in ("block", "scope", *_AMOUNT, "budget", "allocation"):
        keys.together("pattern", key)
    written = keys.get("pattern", lambda value: Pattern.parse(_string(value)))
    if written is not None:
        return replace(written, ord=ord) if "ord" in keys else written
    block = keys.get_or("block", _sizes, 1)
    keys.together("scope", "of")
    of = keys.get("of", _size)
    scope = keys.get("scope", _sizes) if of is None else (1,) * (len(block) - 1) + (of,)
    if len(block) > 2:
        raise SpecError(f"{keys.at()}block has {len(block)} sizes; it has one along an axis, or two on [out, fan-in]")
    if scope is not None and len(scope) != len(block):
        raise SpecError(f"{keys.at()}block has {len(block)} sizes and scope {len(scope)}; give as many to both")
    amount: int | str | None = keys.get("budget", _share)
    if amount is None:
        amount = _amount(keys)
    if isinstance(amount, int) and scope is not None and -1 not in scope and amount > math.prod(scope):
        raise SpecError(f"{keys.at()}cannot keep {amount} of {math.prod(scope)} blocks")
    return Pattern(block, scope, amount, ord)


def _amount(keys: _Table) -> int | str:
    keys.together("keep", "sparsity")
    keep = keys.get("keep", _count)
    amount: int | str | None = keys.get("sparsity", _share) if keep is None else keep
    if amount is None:
        raise SpecError(f"{keys.at()}nothing says how much to keep: give keep or sparsity, or skip = true")
    return amount


def _coupling(table: Mapping[str, Any], number: int, shared: Mapping[str, Any], folder: str) -> CouplingRule:
    label = _label("coupling", table, f"coupling {number}")
    keys = _Table({**shared, **table}, label, _COUPLING, folder)
    members = [_member(member, i, label, folder) for i, member in enumerate(keys.get_or("member", _tables, []), 1)]
    if not members:
        raise SpecError(f"{label}: there is no [[coupling.member]]")
    keys.together("scope", "of")
    of = keys.get("of", _size)
    return CouplingRule(
        label=label,
        members=tuple(members),
        amount=_amount(keys),
        scope=(of,) if of is not None else keys.get("scope", _sizes) or (),
        ord=keys.get_or("ord", _ord, 2),
        across=keys.get_or("across", _bool, False),
        layout=keys.get_or("layout", _layout, "out-in"),
        scores=keys.get("scores", keys.path),
    )


def _member(table: Mapping[str, Any], number: int, label: str, folder: str) -> MemberRule:
    keys = _Table(table, f"{label}, member {number}", _MEMBER, folder)
    if "tensor" not in keys:
        raise SpecError(f"{keys.label}: tensor is missing, the name of the tensor")
    return MemberRule(
        tensor=keys.get_or("tensor", _string, ""),
        block=keys.get("block", _sizes) or (),
        order=keys.get("order", _ints) or (),
        slice=keys.get("slice", _string),
        reshape=keys.get("reshape", _sizes),
        take=keys.get("take", _string),
    )


# --- values --------------------------------------------------------------------------------------


def _names(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise SpecError("must be a table of strings: the name in the file = the name in the recipe")
    return dict(value)


def _tables(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise SpecError("must be a list of tables: write [[rule]] or [[coupling]], with two brackets")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise SpecError(f"must be a string, not {_shown(value)}")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise SpecError(f"must be a string or a list of strings, not {_shown(value)}")
    return tuple(value)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"must be true or false, not {_shown(value)}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise SpecError(f"must be a whole number of blocks, not {_shown(value)}")
    return value


def _share(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise SpecError(f"must be a share of blocks to prune in [0, 1], not {_shown(value)}")
    return as_share(str(value).lower().replace("e+", "e"))


def _ord(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        raise SpecError(f"must be 1, 2, inf or another positive number, not {_shown(value)}")
    return as_ord("inf" if value == Decimal("inf") else str(value))


def _ints(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise SpecError(f"must be a list of whole numbers, not {_shown(value)}")
    return tuple(value)


def _lengths(value: Any) -> tuple[int, ...]:
    """Lengths of axes, -1 for any."""
    lengths = _ints(value)
    if any(length < -1 for length in lengths):
        raise SpecError(f"must be lengths of axes, -1 for any, not {_shown(value)}")
    return lengths


def _sizes(value: Any) -> tuple[int, ...]:
    """``4``, ``[4, -1]`` or ``"4x-1"``."""
    if isinstance(value, str):
        if not re.fullmatch(r"(-1|\d{1,18})(x(-1|\d{1,18}))*", value, re.ASCII):
            raise SpecError(f'must be sizes like [4, 4] or "4x4", not {_shown(value)}')
        value = [int(size) for size in value.split("x")]
    sizes = _ints([value] if type(value) is int else value)
    if not sizes or any(size < -1 or size == 0 for size in sizes):
        raise SpecError(f"must be sizes of at least 1, or -1 for a whole axis, not {_shown(value)}")
    return sizes


def _size(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise SpecError(f"must be a number of blocks, at least 1, not {_shown(value)}")
    return value


def _allocation(value: Any) -> Spread:
    return _one_of(value, ("uniform", "erk", "lamp"))


def _misfit(value: Any) -> Literal["error", "skip"]:
    return _one_of(value, ("error", "skip"))


def _layout(value: Any) -> Layout:
    return _one_of(value, get_args(Layout))


def _axis(value: Any) -> Axis:
    return value if type(value) is int else _one_of(value, ("in", "fan-in", "last"), " or a number")


def _one_of(value: Any, allowed: tuple[_T, ...], more: str = "") -> _T:
    for choice in allowed:
        if value == choice and type(value) is type(choice):
            return choice
    raise SpecError(f"must be {', '.join(map(str, allowed))}{more}, not {_shown(value)}{_meant(value, allowed)}")


def _meant(value: Any, allowed: Iterable[Any]) -> str:
    import difflib

    near = difflib.get_close_matches(str(value), list(map(str, allowed)), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {value!r:.60}" if not isinstance(value, Decimal) else f"the number {value}"
