"""plumbing/cli.py: options from a dataclass, and errors in one line."""
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from plumbing.cli import count, parser, positive, real, run_main, share, torch_device

TOP = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    """A docstring: with a colon."""
    batch: count = 32           # images a step
    kind: Literal["one", "two"] = "one"     # one: a thing; two: 50 % of
                                # another
    flip: bool = False          # as a mirror does
    out: str = ""               # the folder


@pytest.mark.parametrize("kind, good, bad", [
    (count, {"1": 1, "2147483647": 2 ** 31 - 1}, ("0", "-1", "2.5", "1e3", "2147483648")),
    (real, {"-3.5": -3.5, "1e300": 1e300}, ("nan", "inf", "-inf", "1e999", "five")),
    (positive, {"1e-12": 1e-12, "1e12": 1e12}, ("0", "-1", "nan", "inf")),
    (share, {"0": 0.0, "1": 1.0, "0.25": 0.25}, ("-0.01", "1.01", "nan")),
    (torch_device, {"cpu": "cpu"}, ("cuda:99", "gpu", "", "meta"))])
def test_types_take_what_is_in_range_and_name_the_option(kind, good, bad, capsys):
    p = parser("x.py", "")
    p.add_argument("--the-value", type=kind)
    for given, expected in good.items():
        got = p.parse_args([f"--the-value={given}"]).the_value
        assert got == expected and type(got) is type(expected)
    for given in bad:
        with pytest.raises(SystemExit, match="2"):
            p.parse_args([f"--the-value={given}"])
        said = capsys.readouterr().err
        assert said.startswith("x.py: argument --the-value: ") and said.count("\n") == 1


def test_an_old_python_is_named_in_one_line():
    code = "import sys; sys.version_info = (3, 10); import toy2d"
    said = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert said.returncode and "Python 3.11" in said.stderr and said.stderr.count("\n") == 1


def test_fields_are_options_whose_comments_are_their_help(capsys):
    p = parser("x.py", "It does a thing.", Config)
    given = vars(p.parse_args("--kind TWO --batch 5 --flip".split()))
    assert given == dict(batch=5, kind="two", flip=True)        # what was not given is not there
    assert vars(p.parse_args(["--no-flip"])) == dict(flip=False)
    for args, status in (("--bat=3", "2"), ("--kind=three", "2"), ("--help", "0")):
        with pytest.raises(SystemExit, match=status):
            p.parse_args([args])
    said = " ".join(capsys.readouterr().out.split())
    assert "--batch BATCH images a step (32)" in said
    assert "--kind {one,two} one: a thing; two: 50 % of another (one)" in said
    assert said.endswith("--out OUT the folder")


@pytest.fixture
def script(monkeypatch, capsys):
    """Return what run_main prints on standard error and its status, for a main that raises."""
    def call(error):
        def main(argv):
            if error is not None:
                raise error
        monkeypatch.setattr(sys, "argv", ["folder/script.py"])
        with pytest.raises(SystemExit) as e:
            run_main(main)
        return capsys.readouterr().err, e.value.code
    return call


@pytest.mark.parametrize("error, line", [
    (ValueError("--lam is\n  nothing"), "--lam is nothing"),
    (FileNotFoundError(2, "No such file", "a.pt"), "No such file: a.pt"),
    (FloatingPointError("step 3: nan"), "step 3: nan"), (MemoryError(), "not enough memory"),
    (torch.OutOfMemoryError("Tried\nto"), "not enough memory, try a smaller --batch: Tried"),
    (RuntimeError("can't allocate memory"),
     "not enough memory, try a smaller --batch: can't allocate memory")], ids=repr)
def test_what_a_user_can_cause_is_one_line_and_status_2(script, error, line):
    assert script(error) == (f"script.py: {line}\n", 2)


def test_a_bug_keeps_its_traceback_and_ctrl_c_its_status(script, monkeypatch):
    with pytest.raises(RuntimeError):
        script(RuntimeError("shapes cannot be multiplied"))
    assert script(None) == ("", None) and script(KeyboardInterrupt()) == ("", 130)
    monkeypatch.setenv("RANK", "1")     # before they are connected all fail alike, and one prints
    assert script(ValueError("no")) == ("", 2)


def test_a_console_without_a_character_loses_only_that():
    code = ("from plumbing.cli import run_main\ndef main(argv):\n    print('1 ± 2 \u2016 3')\n"
            "    raise ValueError('λ is 0')\nrun_main(main)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True,
                         env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert ran.returncode == 2 and ran.stdout.decode("cp1252").strip() == "1 ± 2 ? 3"
    assert ran.stderr.decode("cp1252").endswith(": ? is 0" + os.linesep)
