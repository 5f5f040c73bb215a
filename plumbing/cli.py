"""Command lines from dataclasses: a field is an option, its type says which values it takes, and
the comment beside it is its help."""
import argparse
import inspect
import math
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.distributed as dist

from plumbing.loop import rank


def number(kind, low, high, what):
    """Return a reader of options, and so a field's type: a finite number from low to high."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value
    return read


count = number(int, 1, 2 ** 31 - 1, "a whole number, at least 1")
whole = number(int, 0, 2 ** 31 - 1, "a whole number, at least 0")      # a seed, too
positive = number(float, 1e-12, 1e12, "a number above 0")
nonnegative = number(float, 0, 1e12, "a number, at least 0")
share = number(float, 0, 1, "a number from 0 to 1")
real = number(float, -math.inf, math.inf, "a number")


def torch_device(name):
    """Return the name of a torch device, if it is there and computes. (It is not called device: in
    a dataclass, `device: device = "cpu"` would take the default for the type.)"""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise argparse.ArgumentTypeError(f"no device {name!r}: {str(e).splitlines()[0]}") from e
    return name


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line; of several processes, the first one prints it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n" if rank() == 0 else None)


def parser(prog, text, config=None):
    """Return a Parser with an option for each field of the dataclass `config`.

    What it parses holds only the options that were given, so that the dataclass's own defaults,
    or a preset's, stand for the others.
    """
    p = Parser(prog, description=text, allow_abbrev=False,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    source = inspect.getsource(config) if config else ""
    comments = dict(re.findall(r"^    (\w+): .*?# (.*(?:\n {20,}# .*)*)", source, re.M))
    for f in fields(config) if config else ():
        how = dict(type=f.type, metavar=f.name.upper())
        if f.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif get_origin(f.type) is Literal:
            how = dict(type=str.lower, choices=get_args(f.type))
        words = re.sub(r"\s+#\s*", " ", comments[f.name]).replace("%", "%%")
        shown = "" if f.default in ("", None) else f" ({f.default})"
        p.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                       help=words + shown, **how)
    return p


def run_main(main):
    """Run a script's main(argv); what a user can cause is one line on standard error, status 2."""
    for stream in (sys.stdout, sys.stderr):         # a console without ± prints ? in its place
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, MemoryError) as e:
        named = isinstance(e, OSError) and e.filename and e.strerror        # without '[Errno 2]'
        reason = f"{e.strerror}: {e.filename}" if named else " ".join(str(e).split())
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or "can't allocate memory" in str(e)):
            raise
        reason = f"not enough memory, try a smaller --batch: {str(e).splitlines()[0]}"
    # before the processes are connected all fail alike, so the first one says it
    if rank() == 0 or dist.is_initialized():
        print(f"{Path(sys.argv[0]).name}: {reason or 'not enough memory'}", file=sys.stderr)
    if dist.is_initialized():                       # left open, it may abort a process that ends
        dist.destroy_process_group()
    sys.exit(2)
