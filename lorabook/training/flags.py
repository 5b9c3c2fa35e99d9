"""Dataclasses as command lines: fields that are flags, checked by their types, and parsed."""

import math
import shlex
import sys
from dataclasses import field, fields
from functools import cache
from types import NoneType
from typing import Annotated, ClassVar, Literal, get_args, get_origin, get_type_hints

from accelerate import PartialState
from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser

RULES = {
    "at least 1": lambda value: value >= 1,
    "0 or more": lambda value: math.isfinite(value) and value >= 0,
    "a number above 0": lambda value: math.isfinite(value) and value > 0,
    "0 or more and below 1": lambda value: 0 <= value < 1,
    "0 or more and below 2 ** 32": lambda value: 0 <= value < 2**32,
}
Count = Annotated[int, "at least 1"]
CountOrZero = Annotated[int, "0 or more"]
Amount = Annotated[float, "0 or more"]
Positive = Annotated[float, "a number above 0"]
Share = Annotated[float, "0 or more and below 1"]
Seed = Annotated[int, "0 or more and below 2 ** 32"]
type_hints = cache(get_type_hints)


def flag(default, help_text: str, *, secret: bool = False):
    """A dataclass field that is a flag; a secret one is not shown and not written."""
    help_text = help_text.replace("%", "%%")  # argparse formats it
    return field(default=default, repr=not secret, metadata={"help": help_text})


def check_fields(config) -> None:
    """Check each field by its type: a plain one, a `Literal`, or a range of those above.

    None passes where it is the default: then the model, the data or the method decide.
    """
    hints = type_hints(type(config), include_extras=True)
    for option in fields(config):
        value = getattr(config, option.name)
        expected = _expected(value, hints[option.name])
        if expected and not (value is None and option.default is None):
            shown = " ".join(repr(value).split())
            shown = shown if len(shown) < 120 else f"{shown[:120]} …"
            raise ValueError(f"{option.name} must be {expected}, not {shown}")


def _expected(value, hint) -> str | None:
    """What a value of this type must be, or None where `value` is that."""
    if NoneType in get_args(hint):
        hint = next(kind for kind in get_args(hint) if kind is not NoneType)
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else f"one of {', '.join(get_args(hint))}"
    kind, rule = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    if kind == list[str]:
        fits = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    elif isinstance(value, bool):
        fits = kind is bool
    else:
        fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits:
        return f"of type {kind if kind == list[str] else kind.__name__}"
    return rule if rule and not RULES[rule](value) else None


class Flags:
    """What a dataclass of flags can say of itself."""

    method: ClassVar[str]  # the module of its command line

    @property
    def settings(self) -> dict:
        """The fields that were given, as plain data; never a secret one."""
        return {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.repr and getattr(self, option.name) != option.default
        }

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        words = [f"accelerate launch --quiet -m lorabook.training.{self.method}"]
        for name, value in self.settings.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
            elif isinstance(value, list):
                words.append(f"--{name} {shlex.join(value)}")
            else:
                words.append(f"--{name}={shlex.quote(str(value))}")
        return " ".join(words)


class _Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parse(config_class: type, arguments: list[str] | None = None):
    """A config from a command line; a bad one ends the program with one sentence and status 2."""
    summary = config_class.__doc__.splitlines()[0]
    parser = _Parser(config_class, allow_abbrev=False, description=summary)
    config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        name = unknown[0].split("=")[0]
        names = [f"--{option.name}" for option in fields(config_class)]
        longer = [known for known in names if len(name) > 3 and known.startswith(name)][:3]
        hint = f"; did you mean {' or '.join(longer)}?" if longer else ""
        parser.error(f"unknown flag {unknown[0]}{hint}")
    return config


def run_command_line(config_class: type, train) -> None:
    """Train as the command line says; bad input ends in one sentence and status 2."""
    try:
        run = train(parse(config_class))
    except (ValueError, OSError, FloatingPointError, DatasetsError) as error:
        print(f"error: {' '.join(str(error).split())[:400]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted before the first step; nothing was written", file=sys.stderr)
        sys.exit(130)
    if PartialState().is_main_process:
        print(run)
    if not run.finished:
        sys.exit(130)
