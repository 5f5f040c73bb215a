"""Options: a dataclass's fields, whose types are their bounds and whose comments are their help.

    @dataclass
    class Config:
        batch: count = 32           # images a step

        __post_init__ = validate
"""
import argparse
import functools
import inspect
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch

from plumbing.run import rank


# A field's type, or an argument's: reads text or a value, and refuses what is out of range.

class OptionError(argparse.ArgumentTypeError, ValueError):
    """A value that an option does not take."""


def _number(value, kind, allowed, what):
    try:
        number = kind(value)
        if allowed(number) and number == float(value):      # int(2.5) is 2
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise OptionError(f"must be {what}, not {value!r}")


def count(value):
    """An integer of at least 1."""
    return _number(value, int, lambda v: 1 <= v < 2 ** 31, "a whole number, at least 1")


def whole(value):
    """An integer of at least 0."""
    return _number(value, int, lambda v: 0 <= v < 2 ** 31, "a whole number, at least 0")


def evaluations(value):
    """How often a student evaluates its network for a sample."""
    return _number(value, int, lambda v: 1 <= v <= 16, "a whole number from 1 to 16")


def row_name(h, lam):
    """A row of Table 1 as folders and tables call it: kl, sba_5."""
    return f"sba_{lam:g}" if h == "sba" else h


def torch_seed(value):
    """A seed: an integer of 28 bits. A CPU's generator reads 32; with the other four edm.sample
    tells the noise of a student's evaluations apart."""
    return _number(value, int, lambda v: 0 <= v < 2 ** 28, "a whole number from 0 to 2^28 - 1")


def real(value):
    """A finite number."""
    return _number(value, float, math.isfinite, "a finite number")


def positive(value):
    """A finite number above 0."""
    return _number(value, float, lambda v: 1e-12 <= v <= 1e12, "a number from 1e-12 to 1e12")


def nonnegative(value):
    """A finite number of at least 0."""
    return _number(value, float, lambda v: 0 <= v <= 1e12, "a number from 0 to 1e12")


def share(value):
    """A number from 0 to 1."""
    return _number(value, float, lambda v: 0 <= v <= 1, "a number from 0 to 1")


def path(value):
    """A file or folder: an empty name would be the current folder."""
    if not str(value) or "\0" in str(value):
        raise OptionError("must not be empty")
    return Path(value)


def ending(*suffixes):
    """The reader of a file's path that ends in one of these: the suffix says the format."""
    def read(value):
        if path(value).suffix not in suffixes:
            raise OptionError(f"must end in {' or '.join(suffixes)}, not {str(value)!r}")
        return Path(value)
    return read


def text(value):
    """A name that is not empty."""
    path(value)                                 # refuses what it refuses
    return str(value)


def torch_device(name):
    """A torch device that is there and computes."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise OptionError(f"no device {name!r}: {str(e).splitlines()[0]}") from e
    return str(name)


def choice(names, value):
    """One of `names`, in any case."""
    if str(value).lower() not in names:
        raise OptionError(f"must be one of {' '.join(n or repr(n) for n in names)}, not {value!r}")
    return str(value).lower()


def reader(kind):
    """The function that reads a value of a field's type; Literal["a", "b"] is a choice."""
    return functools.partial(choice, get_args(kind)) if get_origin(kind) is Literal else kind


def validate(config):
    """Read every field of a dataclass as its option is read. Raises ValueError, naming it."""
    for f in fields(config):
        try:
            setattr(config, f.name, reader(f.type)(getattr(config, f.name)))
        except ValueError as e:
            raise ValueError(f"{flag(f.name)} {e}") from e
    if getattr(config, "h", "sba") != "sba" and config.lam != type(config).lam:
        raise ValueError(f"--lam is SBA's alone: say --h sba, not {config.h}")


def flag(name):
    return "--" + name.replace("_", "-")


def comments(config):
    """field -> the comment at its line of the dataclass, and on the lines below."""
    found, name = {}, None
    for line in inspect.getsource(config).splitlines():
        code, _, comment = line.partition("#")
        if code.strip():
            field = re.match(r"    (\w+): ", code)
            name = field and field[1]
        if name and comment:
            found[name] = f"{found.get(name, '')} {comment.strip()}".strip()
    return found


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, whose options may be a dataclass's fields."""

    def __init__(self, **how):
        super().__init__(allow_abbrev=False, **how)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if rank() == 0 else None)

    def parse_known_args(self, args=None, namespace=None):
        for arg in args or []:
            if arg.endswith("=--"):             # argparse drops the value, and passes a list
                self.error(f"argument {arg[:-3]}: must not be --")
        return super().parse_known_args(args, namespace)

    def add(self, name, kind, default, help, **how):
        """An option, with its default in its help."""
        values = default if isinstance(default, list) else [default]
        shown = "" if default in (None, "") else f" ({' '.join(map(str, values))})"
        self.add_argument(flag(name), type=reader(kind), default=default,
                          help=help.replace("%", "%%") + shown, **how)

    def add_fields(self, config, default=lambda f: f.default):
        """An option for each field; the comment beside it is its help."""
        said = comments(config)
        for f in fields(config):
            shown = f" ({f.default})" if f.default != "" else ""
            how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
                   else dict(type=reader(f.type), metavar=f.name.upper()))
            self.add_argument(flag(f.name), default=default(f),
                              help=said[f.name].replace("%", "%%") + shown, **how)


def same_options(path, old, new, free):
    """Raises ValueError, naming what differs, unless two dictionaries of options are alike but for
    the free ones: a run that is resumed must be the run that was begun."""
    differ = [f"{flag(k)} was {old.get(k)!r}, is {v!r}" for k, v in new.items()
              if k not in free and (type(old.get(k)) is not type(v) or old[k] != v)]
    if differ:
        raise ValueError(f"{path} is a run of another configuration: {'; '.join(differ)}")
