"""JSON as headers and indices need it: one object, no key twice, no number that is not one."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NoReturn

from npscope.errors import FormatError

MAX_COUNT = 1 << 63
"""What every size, offset and product of sizes stays below."""


def parse_object(raw: bytes, what: str, *, parse_float: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """The JSON object in `raw`; FormatError, in which the text is called `what`, for anything else.

    Integers are counts below `MAX_COUNT`. Other numbers are refused unless `parse_float` takes them.
    """

    def refuse(text: str) -> NoReturn:
        raise FormatError(f"{what} holds {text:.40}, where only whole numbers can stand")

    def count(text: str) -> int:
        # Before int(): thousands of digits would cost quadratic time.
        if text.startswith("-") or len(text) > 19 or int(text) >= MAX_COUNT:
            raise FormatError(f"{what} holds the number {text:.40}, which is no size or offset")
        return int(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{what} holds the key {twice!r:.120} twice")
        return found

    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=count,
            parse_float=parse_float or refuse,
            parse_constant=refuse,
        )
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply") from None
    except FormatError:
        raise
    except ValueError as error:  # not UTF-8, or not JSON
        raise FormatError(f"{what} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{what} is no JSON object")
    return found
