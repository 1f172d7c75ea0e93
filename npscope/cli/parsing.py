"""How arguments are read: argparse, where what is wrong is raised and a value may begin with a dash."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any, NoReturn

from npscope.cli.terminal import print_text
from npscope.errors import SpecError

Argument = tuple[tuple[str, ...], dict[str, Any]]
"""What `argparse.ArgumentParser.add_argument` is called with."""


def argument(*names: str, **settings: Any) -> Argument:
    """An option, or an operand that is named after where it is kept."""
    return names, settings


def flag(name: str, help: str) -> Argument:
    """An option without a value."""
    return argument(name, action="store_true", help=help)


def whole_number(least: int, most: float = inf) -> Callable[[str], int]:
    """What reads a number of that range."""

    def read(text: str) -> int:
        with suppress(ValueError):
            if least <= (number := int(text)) <= most:
                return number
        limits = f"from {least} on" if most == inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number {limits}")

    return read


class Parser(argparse.ArgumentParser):
    """A parser that leaves to its caller what is said of an error, and when the process ends."""

    def __init__(self, **settings: Any) -> None:
        layout = partial(argparse.HelpFormatter, max_help_position=28)
        super().__init__(add_help=False, allow_abbrev=False, formatter_class=layout, **settings)
        self.add_argument("-h", "--help", action="help", help="Show this message and exit.")

    def print_help(self, file: object = None) -> None:
        """Write the help to standard output; argparse would hide that nobody reads it."""
        print_text(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Raise SpecError."""
        raise SpecError(f"{message} (npscope --help)")


class CommandParser(Parser):
    """A parser of the arguments of one command; what stands behind an option with a value is that value.

    argparse alone would take ``--include -x`` for two options.
    """

    def __init__(self, *, arguments: Iterable[Argument], **settings: Any) -> None:
        super().__init__(**settings)
        actions = [self.add_argument(*names, **details) for names, details in arguments]
        operands = [str(action.metavar) for action in actions if not action.option_strings]
        self.usage = " ".join((self.prog, "[OPTIONS]", *operands))
        self._valued = {name for action in actions if action.nargs is None for name in action.option_strings}
        self._known = {"-h", "--help"}.union(*(action.option_strings for action in actions))

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse does, with values that begin with a dash, and wrong options told before what is missing."""
        return super().parse_known_args(list(self._joined(args or ())), namespace)

    def _joined(self, words: Iterable[str]) -> Iterator[str]:
        """The words, but an option and its value as one."""
        rest = iter(words)
        for word in rest:
            name = word.partition("=")[0]
            if word == "--":
                yield word
                yield from rest
            elif word in self._valued:
                value = next(rest, None)
                yield word if value is None else f"{word}={value}"
            elif word.startswith("-") and word != "-" and not self._known & {name, word[:2]}:
                self.error(f"no such option: {name}")
            else:
                yield word

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """As argparse does, but the only word is the value: Python 3.11 would drop a value ``--``."""
        if action.nargs is None and len(arg_strings) == 1:
            value = self._get_value(action, arg_strings[0])
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)
