"""Dataclasses as command lines: fields that are flags, checked and parsed."""

import math
import shlex
import sys
from dataclasses import asdict, field, fields, replace
from typing import get_args, get_origin

from accelerate import PartialState
from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser


def flag(default, help_text: str, **kwargs):
    """A dataclass field that is a flag; `choices` names its values, `repr=False` keeps it out of all that is shown."""
    shown = kwargs.pop("repr", True)
    return field(
        default=default, repr=shown, metadata={"help": help_text.replace("%", "%%"), **kwargs}
    )


def check_types(config) -> None:
    """Raise ValueError, naming the field, where a value is not of its field's type or none of its choices."""
    for option in fields(config):
        value, choices = getattr(config, option.name), option.metadata.get("choices")
        check(config, option.name, _fits(value, option), f"of type {_type_name(option.type)}")
        if choices and value is not None:
            check(config, option.name, value in choices, f"one of {', '.join(choices)}")


def check_numbers(config, **rules: tuple[str, ...]) -> None:
    """Check groups of numeric fields: at_least_one, at_least_zero (finite), above_zero (finite), share (0 <= x < 1).

    None passes: it means that the model, the data or the method decide.
    """
    tests = {
        "at_least_one": (lambda value: value >= 1, "at least 1"),
        "at_least_zero": (lambda value: math.isfinite(value) and value >= 0, "0 or more"),
        "above_zero": (lambda value: math.isfinite(value) and value > 0, "a number above 0"),
        "share": (lambda value: 0 <= value < 1, "0 or more and below 1"),
    }
    for rule, names in rules.items():
        holds, expected = tests[rule]
        for name in names:
            value = getattr(config, name)
            check(config, name, value is None or holds(value), expected)


def check(config, name: str, holds: bool, expected: str) -> None:
    """Raise ValueError, naming the field and its value, unless `holds`."""
    if not holds:
        value = " ".join(repr(getattr(config, name)).split())
        raise ValueError(
            f"{name} must be {expected}, not {value if len(value) < 120 else value[:120] + ' …'}"
        )


def told(config) -> dict:
    """The fields that were given, as plain data; without those that are secret."""
    return {
        option.name: value
        for option in fields(config)
        if option.repr and (value := asdict(config)[option.name]) != option.default
    }


def command(config, module: str) -> str:
    """The command line that repeats a run."""
    parts = [f"accelerate launch --quiet -m {module}"]
    for name, value in told(config).items():
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            parts.append(f"--{name} {shlex.join(value)}")
        else:
            parts.append(f"--{name}={shlex.quote(str(value))}")
    return " ".join(parts)


def with_defaults(config, defaults: dict):
    """The config with what it leaves open (None) taken from `defaults`; names it does not have are passed over."""
    names = {option.name for option in fields(config)}
    return replace(
        config,
        **{
            name: value
            for name, value in defaults.items()
            if name in names and getattr(config, name) is None
        },
    )


def _fits(value, option) -> bool:
    """Whether a value is of a field's type; a whole number will do for a float, None where it is the default."""
    if value is None:  # HfArgumentParser takes the None out of the fields' types
        return option.default is None
    if get_origin(option.type) is list or list[str] in get_args(option.type):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    allowed = get_args(option.type) or (option.type,)
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, (*allowed, int) if float in allowed else allowed)


def _type_name(kind) -> str:
    return str(kind) if get_args(kind) else kind.__name__


class _Parser(HfArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def parse(config_class: type, arguments: list[str] | None = None):
    """A config from a command line; unknown and abbreviated flags and bad values end the program with one sentence."""
    parser = _Parser(
        config_class, allow_abbrev=False, description=config_class.__doc__.splitlines()[0]
    )
    config, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    if unknown:
        name = unknown[0].split("=")[0]
        near = [
            f"--{f.name}"
            for f in fields(config_class)
            if len(name) > 3 and f"--{f.name}".startswith(name)
        ][:3]
        parser.error(
            f"unknown flag {unknown[0]}{'; did you mean ' + ' or '.join(near) + '?' if near else ''}"
        )
    return config


def run_command_line(config_class: type, train) -> None:
    """Train as the command line says; bad input ends in one sentence and exit status 2."""
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
