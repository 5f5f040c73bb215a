"""plumbing/: options and their errors, files that are whole or absent, signals, processes."""
import contextlib
import csv
import errno
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from plumbing import options, run
from plumbing.files import atomic, claim, reading, save_atomic
from plumbing.health import warning
from plumbing.options import (Parser, count, ending, nonnegative, path, positive, real,
                              same_options, share, text, torch_device, torch_seed, validate, whole)
from plumbing.run import Stop, check_finite, load_generator, run_main

NAN, INF = "nan", "inf"
HERE = Path(__file__).parent.parent


# ----------------------------------------------------------------------------------------- options

@pytest.mark.parametrize("kind, good, bad", [
    (count, {"1": 1, 64.0: 64, "2147483647": 2 ** 31 - 1}, ("0", "-1", 2.5, "1e3", "2147483648")),
    (whole, {"0": 0, "7": 7}, ("-1", "0.5", INF)),
    (torch_seed, {"0": 0, 2 ** 28 - 1: 2 ** 28 - 1}, ("-1", str(2 ** 28), "1.5", "x")),
    (real, {"-3.5": -3.5, "1e300": 1e300}, (NAN, INF, "-inf", "1e999", "five")),
    (positive, {"1e-12": 1e-12, "1e12": 1e12}, ("0", "-1", "1e-13", "1e13", NAN, INF)),
    (nonnegative, {"0": 0.0, "1e12": 1e12}, ("-1e-9", "1e13", NAN, INF)),
    (share, {"0": 0.0, "1": 1.0, "0.25": 0.25}, ("-0.01", "1.01", NAN)),
    (path, {"a/b": Path("a/b")}, ("", "a\0b")),
    (ending(".npz", ".zip"), {"a/b.npz": Path("a/b.npz"), "c.zip": Path("c.zip")},
     ("", "a", "a.png", ".npz", "a.npz/b")),
    (text, {"a/b": "a/b"}, ("", "a\0b")),
    (torch_device, {"cpu": "cpu"}, ("cuda:99", "gpu", "", "meta"))],
    ids=lambda v: getattr(v, "__name__", ""))
def test_types_take_what_is_in_range_and_name_the_option(kind, good, bad, capsys):
    parser = Parser(prog="x.py")
    parser.add("the_value", kind, None, "of a test")
    for given, expected in good.items():
        got = parser.parse_args(["--the-value", str(given)]).the_value if isinstance(
            given, str) else kind(given)
        assert got == expected and type(got) is type(expected)
    for given in bad:
        with pytest.raises(ValueError):
            kind(given)
        if isinstance(given, str):
            with pytest.raises(SystemExit, match="2"):
                parser.parse_args([f"--the-value={given}"])
            said = capsys.readouterr().err
            assert said.startswith("x.py: argument --the-value: ") and said.count("\n") == 1


@dataclass
class Config:
    """A docstring: with a colon."""
    batch: count = 32           # images a step
    kind: Literal["", "one", "two"] = "one"     # one: a thing; two: 50 % of
                                # another
    lr: positive = 1e-3         # the rate
    flip: bool = False          # as a mirror does

    def __post_init__(self):
        validate(self)          # no option's help
        local: int = 3          # nor this
        assert local


def test_fields_are_options_whose_comments_are_their_help(capsys):
    parser = Parser(prog="x.py")
    parser.add_fields(Config)
    got = vars(parser.parse_args("--kind TWO --batch 5 --flip".split()))
    assert got == dict(batch=5, kind="two", lr=1e-3, flip=True)
    assert vars(parser.parse_args(["--no-flip"])) == vars(Config())
    with pytest.raises(SystemExit, match="0"):
        parser.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for line in ("--batch BATCH images a step (32)", "one: a thing; two: 50 % of another (one)",
                 "--lr LR the rate (0.001)", "--no-flip as a mirror does (False)"):
        assert line in said
    assert "nor this" not in said and "no option's" not in said


@pytest.mark.parametrize("args, message", [
    ("--batch 0", "argument --batch: must be a whole number, at least 1, not '0'"),
    ("--kind three", "argument --kind: must be one of '' one two, not 'three'"),
    ("--bat 3", "unrecognized arguments: --bat 3"), ("--batch", "--batch: expected one argument"),
    ("stray", "unrecognized arguments: stray")])
def test_an_unusable_option_is_one_line_and_status_2(args, message, capsys):
    parser = Parser(prog="x.py")
    parser.add_fields(Config)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(args.split())
    said = capsys.readouterr().err
    assert said.startswith("x.py: ") and message in said and said.count("\n") == 1


def test_only_process_0_prints_an_error_of_the_options(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        Parser(prog="x.py").parse_args(["--nonsense"])
    assert capsys.readouterr().err == ""


def test_a_configuration_made_in_python_is_read_like_the_command_line():
    assert Config(batch="7", kind="ONE", lr=1) == Config(batch=7, lr=1.0)
    for wrong, message in ((dict(batch=0), "--batch must be a whole number, at least 1, not 0"),
                           (dict(kind="x"), "--kind must be one of"), (dict(lr=math.nan), "--lr")):
        with pytest.raises(ValueError, match=message):
            Config(**wrong)


def test_defaults_in_the_help_and_lists(capsys):
    parser = Parser(prog="x.py")
    parser.add("out", path, None, "the folder, 100 %")
    parser.add("sizes", count, [16, 32], "tried", nargs="+")
    assert parser.parse_args([]).sizes == [16, 32]
    assert parser.parse_args("--sizes 1 2 3".split()).sizes == [1, 2, 3]
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    said = capsys.readouterr().out
    assert "tried (16 32)" in said and re.search("the folder, 100 %$", said, re.M)


def test_a_resumed_run_has_the_same_options():
    old = dict(batch=32, lr=1e-3, kimg=5, out="a")
    same_options("a/checkpoint.pt", old, old | dict(kimg=9), free=("kimg",))
    for new, message in ((dict(lr=2e-3), "--lr was 0.001, is 0.002"), (dict(batch=32.0), "--batch"),
                         (dict(grad_clip=1), "--grad-clip was None, is 1")):
        with pytest.raises(ValueError, match=f"^a/checkpoint.pt is a run of another.*{message}"):
            same_options("a/checkpoint.pt", old, old | new, free=("kimg",))


# ------------------------------------------------------------------------------------------- files

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@contextlib.contextmanager
def child(work):
    """Another process inside `with work():`, from when it is there until it is killed."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with work():
                os.write(write, b"x")
                time.sleep(600)
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 1) == b"x"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)


@contextlib.contextmanager
def writer(target, content):
    with atomic(target) as tmp:
        tmp.write_bytes(content)
        yield


def test_atomic_leaves_the_old_file_or_the_new_one(tmp_path):
    target = tmp_path / "new/a.bin"
    with atomic(target) as tmp:
        assert tmp.suffix == ".bin" and tmp.parent == target.parent     # the suffix tells a format
        tmp.write_bytes(b"one")
        assert not target.exists()
    for error in (ValueError, KeyboardInterrupt, Stop.Now, OSError):
        with pytest.raises(error), atomic(target) as tmp:
            tmp.write_bytes(b"two")
            raise error("no")
        assert target.read_bytes() == b"one"
    with atomic(target) as tmp:
        tmp.write_bytes(b"three")
    assert target.read_bytes() == b"three" and [*target.parent.iterdir()] == [target]
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target, name in (("file/a", "file"), ("folder", "folder"), ("a" * 300, "aaa")):
        with pytest.raises(OSError) as e, atomic(tmp_path / target) as tmp:
            tmp.write_bytes(b"x")
        assert name in str(e.value) and ".part" not in str(e.value).split(" -> ")[-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@forks
def test_what_a_killed_writer_left_goes_with_the_next_write_or_claim(tmp_path):
    for name in ("a[1].bin", "b*.bin", "c.bin"):            # also names that glob would read
        with child(lambda: writer(tmp_path / name, b"half")):
            pass
    assert len([*tmp_path.glob(".*.part.bin")]) == 3
    for left, name in ((2, "a[1].bin"), (1, "b*.bin")):
        with atomic(tmp_path / name) as tmp:
            tmp.write_bytes(b"whole")
        assert len([*tmp_path.glob(".*")]) == left
    with claim(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a[1].bin", "b*.bin"]


@forks
def test_the_temporary_file_of_a_live_writer_stays(tmp_path):
    target = tmp_path / "a.bin"
    with child(lambda: writer(target, b"half")):
        (live,) = tmp_path.glob(".*")
        with claim(tmp_path), atomic(target) as tmp:
            tmp.write_bytes(b"whole")
        assert live.read_bytes() == b"half" and target.read_bytes() == b"whole"


@forks
def test_a_folder_is_one_runs_until_it_ends_or_is_killed(tmp_path):
    folder = tmp_path / "runs/one"
    with child(lambda: claim(folder)):
        with pytest.raises(ValueError, match=f"^another run is writing to {folder}: .* --out$"):
            with claim(folder):
                pass
    for _ in range(2):                                      # killed, and then given back
        with claim(folder) as got:
            assert got == folder and not [*folder.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), claim(tmp_path / "file"):
        pass


@contextlib.contextmanager
def small_disk(size):
    """No file of this process may grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("numbers, needed", [
    (2500, "more than 8,192"),              # buffered until the file is closed
    (50000, "about 250,000"), (500000, "about 2,500,000")])
def test_full_disk(tmp_path, numbers, needed):
    state = {"a": torch.zeros(numbers), "b": [torch.zeros(numbers, dtype=torch.uint8)], "c": 1}
    target = tmp_path / "checkpoint.pt"
    save_atomic({"old": 1}, target)
    with small_disk(2 ** 13):
        with pytest.raises(OSError, match=f"^disk full: {target} needs {needed} bytes"):
            save_atomic(state, target)
        with pytest.raises(OSError, match=f"^disk full: {target} needs more than 8,192 bytes"):
            with atomic(target) as tmp:
                tmp.write_bytes(bytes(2 ** 14))
    assert torch.load(target) == {"old": 1} and [*tmp_path.iterdir()] == [target]
    save_atomic(state, target)
    assert torch.equal(torch.load(target)["a"], state["a"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_at_the_last_moment(tmp_path, monkeypatch, number):
    def full(fd):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="^disk full: .*a.bin needs more than 3 bytes"):
        with atomic(tmp_path / "a.bin") as tmp:
            tmp.write_bytes(b"abc")
    assert not [*tmp_path.iterdir()]


def test_another_error_while_saving_is_no_full_disk(tmp_path):
    class Failing:
        def __reduce__(self):
            raise RuntimeError("the device is gone")
    with pytest.raises(RuntimeError, match="the device is gone"):
        save_atomic({"a": Failing()}, tmp_path / "a.pt")
    assert not [*tmp_path.iterdir()]


def test_reading_names_the_file(tmp_path):
    for error in (KeyError("x"), RuntimeError("bad zip\nand so on"), EOFError()):
        with pytest.raises(ValueError, match="^a.pt: not a checkpoint: .") as e:
            with reading("a.pt", "a checkpoint"):
                raise error
        assert "\n" not in str(e.value)
    for error in (KeyboardInterrupt, Stop.Now, SystemExit):
        with pytest.raises(error), reading("a.pt", "a checkpoint"):
            raise error
    with pytest.raises(FileNotFoundError), reading("a.pt", "a checkpoint"):
        open(tmp_path / "a.pt")


# ----------------------------------------------------------------------------- signals and errors

class Ended(BaseException):
    """In place of the end of this process."""


@pytest.fixture
def ends(monkeypatch):
    def end(status):
        raise Ended(status)
    monkeypatch.setattr(os, "_exit", end)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number, ends):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.agreed("cpu")
        signal.raise_signal(number)
        assert stop.number == number and stop.agreed("cpu")
        with pytest.raises(Ended, match=str(128 + number)):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_one_process_of_several_leaves_the_second_signal_to_torchrun(ends, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with Stop() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM


def test_work_that_can_be_left_is_left_at_the_first_signal(ends):
    done = []
    with Stop() as stop:
        with stop.at_once():
            done.append("undisturbed")
        with stop.at_once():
            signal.raise_signal(signal.SIGINT)
            done.append("after the signal")
        done.append("behind the block")
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGINT)
    assert done == ["undisturbed", "behind the block"] and stop.number == signal.SIGINT


def test_an_error_in_work_that_can_be_left_is_not_hidden():
    with Stop() as stop:
        with pytest.raises(KeyError), stop.at_once():
            raise KeyError
        signal.raise_signal(signal.SIGINT)                  # and the block is over: no Stop.Now
    assert stop.number == signal.SIGINT


@pytest.fixture
def script(monkeypatch, capsys):
    """-> what run_main prints on stderr and its status, for a main that raises or returns."""
    def call(main, environment={}):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["folder/script.py", "--a", "b"])
        with pytest.raises(SystemExit) as e:
            run_main(main)
        return capsys.readouterr().err, e.value.code
    return call


def raising(error):
    def main(argv):
        raise error
    return main


@pytest.mark.parametrize("error, line", [
    (ValueError("--lam is\n  nothing"), "--lam is nothing"),
    (FileNotFoundError(2, "No such file", "a.pt"), "No such file: a.pt"),
    (FloatingPointError("step 3: nan"), "step 3: nan"),
    (MemoryError(), "not enough memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto"),
     "not enough memory for these settings: CUDA out of memory. Tried"),
    (RuntimeError("[enforce fail at alloc.cpp:1] err == 0. you tried to allocate 9000 bytes. Code"),
     "not enough memory for these settings: 9,000 bytes more")], ids=repr)
def test_what_a_user_can_cause_is_one_line_and_status_2(script, error, line):
    assert script(raising(error)) == (f"script.py: {line}\n", 2)


def test_a_bug_keeps_its_traceback_and_a_result_its_status(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    for bug in (RuntimeError("shapes cannot be multiplied"), KeyError("x"), AssertionError()):
        with pytest.raises(type(bug)):
            run_main(raising(bug))
    assert script(lambda argv: None) == ("", None) and script(lambda argv: 130) == ("", 130)
    assert script(lambda argv: sys.exit(argv == ["--a", "b"]))[1] is True


@pytest.mark.parametrize("how, quiet", [(["x.py"], True), (["elsewhere/x.py"], False),
                                        (["-c", "exec(open('x.py').read())"], False)])
def test_only_a_script_of_the_project_ends_at_once_while_it_loads(how, quiet, tmp_path):
    """Not whoever imports it: Ctrl-C would end an interactive session."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(Path(run.__file__).parent, tmp_path / "plumbing")
    code = "import signal, plumbing.run; print(signal.getsignal(2) == signal.SIG_DFL)"
    for script in ("x.py", "elsewhere/x.py"):
        (tmp_path / script).write_text(code)
    ran = subprocess.run([sys.executable, *how], cwd=tmp_path, capture_output=True, text=True,
                         env=os.environ | {"PYTHONPATH": str(tmp_path)},
                         # a shell's job in the background inherits that SIGINT is ignored
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert ran.stdout == f"{quiet}\n", ran.stderr


def test_ctrl_c_ends_at_once_without_a_word(monkeypatch, ends, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(Ended, match="130"):
        run_main(raising(KeyboardInterrupt()))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("environment, line", [
    (dict(RANK="0"), "the environment's RANK=0 contradict"),
    (dict(WORLD_SIZE="2"), "the environment's WORLD_SIZE=2 contradict"),
    (dict(RANK="2", WORLD_SIZE="2"), "the environment's RANK=2, WORLD_SIZE=2 contradict"),
    (dict(RANK="-1", WORLD_SIZE="2"), "RANK=-1, WORLD_SIZE=2 contradict"),
    (dict(RANK="one", WORLD_SIZE="2"), "RANK=one, WORLD_SIZE=2 contradict"),
    (dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost"),
     "RANK=1, WORLD_SIZE=2 need MASTER_PORT LOCAL_RANK beside them")])
def test_variables_of_torchrun_that_do_not_fit_are_named(script, environment, line):
    ran = []
    said, status = script(ran.append, environment)
    assert status == 2 and not ran and said.count("\n") == 1
    assert said.startswith("script.py: ") and line in said
    assert said.endswith(": start several processes with torchrun, or unset them\n")


def test_one_process_started_by_torchrun_is_one_process(script):
    assert script(lambda argv: 7, dict(RANK="0", WORLD_SIZE="1")) == ("", 7)


def test_before_the_processes_meet_only_one_prints(script):
    torchrun = dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="1")
    for rank, said in (("0", "script.py: no\n"), ("1", "")):
        assert script(raising(ValueError("no")), torchrun | dict(RANK=rank)) == (said, 2)


# --------------------------------------------------------------------------- numbers and processes

def test_check_finite_names_the_step_the_value_and_the_noise_level():
    sigma, fine = torch.tensor([0.1, 0.25, 3.0]).view(3, 1, 1, 1), torch.ones(3, 1, 2, 2)
    check_finite("step 4", sigma, gap=fine, log_r=1e7 * fine, loss=torch.zeros(3))
    for value, shown in ((math.nan, "nan"), (-math.inf, "inf"), (4e9, "1e.09")):
        bad = fine.clone()
        bad[1, 0, 1, 0] = value
        with pytest.raises(FloatingPointError, match=f"^step 4: log_r is {shown} at sigma = 0.25"):
            check_finite("step 4", sigma, gap=fine, log_r=bad)
    with pytest.raises(FloatingPointError, match="loss is nan at sigma = 3"):
        check_finite("step 4", sigma, loss=torch.tensor([0, 0, math.nan]))


def test_generators_state_is_taken_up_or_the_noise_starts_from_the_seed(capsys):
    old, new = torch.Generator().manual_seed(3), torch.Generator()
    torch.randn(5, generator=old)
    load_generator(new, old.get_state(), seed=0)
    assert torch.equal(torch.randn(5, generator=new), torch.randn(5, generator=old))
    load_generator(new, torch.zeros(16, dtype=torch.uint8), seed=9)     # as a GPU's are
    assert "from seed 9" in capsys.readouterr().err
    assert torch.equal(torch.randn(5, generator=new),
                       torch.randn(5, generator=torch.Generator().manual_seed(9)))


TWO = """
import sys
from plumbing.run import all_mean, gather, processes, rank, run_main, world
import torch

def main(argv):
    with processes("cpu"):
        batch = torch.arange(12.0).view(6, 2)
        assert torch.equal(gather(batch[rank()::world()]), batch)
        a, b = torch.full((2, 3), 1.0 + rank()), torch.tensor(10.0 * rank())
        all_mean([a, b])
        assert (a == 1.5).all() and b == 5, (a, b)
        if rank() == 1:
            raise ValueError("only here")

run_main(main)
"""


def test_two_processes(tmp_path):
    """A batch is put together in its order, means are taken over both, and the process in which
    an error is raised says so."""
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    top = Path(options.__file__).resolve().parents[1]
    ran = [subprocess.Popen([sys.executable, "two.py"], cwd=tmp_path, text=True,
                            stderr=subprocess.PIPE, env=os.environ | dict(
        PYTHONPATH=str(top), RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2", OMP_NUM_THREADS="1",
        MASTER_ADDR="localhost", MASTER_PORT=str(port))) for r in range(2)]
    (_, first), (_, second) = (p.communicate() for p in ran)
    assert ran[0].returncode == 0, first
    assert ran[1].returncode == 2 and second.splitlines()[-1] == "two.py: only here (process 1)"
    assert "Traceback" not in first + second


# ----------------------------------------------------------------------------------------- health

WELL = dict(ess=0.9, log_r=0.4, variance=0.9, to_data=3.0, loss_score=0.2)


@pytest.mark.parametrize("sick, words", [
    ({}, ""), (dict(log_r=-0.5), "upside down"), (dict(ess=0.04), "4% of the batch"),
    (dict(ess=0.4), ""), (dict(ess=0.4, log_r=2.5), "40% of the batch"),
    (dict(log_r=2.5), "tells the student's samples"), (dict(variance=0.5), "from 0.90 to 0.50"),
    (dict(to_data=4.5), "the distance rises, from 3 to 4.5"), (dict(to_data=21), "to 21 from 20"),
    (dict(loss_score=0.7, log_r=-0.5), "does not follow the student")])
def test_a_sick_run_is_told_in_one_sentence(sick, words):
    """And only while it is sick, and once the generator moves."""
    start = dict(variance=0.2, to_data=20.0)
    said = warning([start, WELL, WELL | sick])
    assert words in said and bool(said) == bool(words) and "\n" not in said
    assert not warning([start]) and not warning([start, WELL | sick, WELL])


@pytest.mark.parametrize("run, words", [
    ("stale", "--lr-f"), ("upside_down", "upside down"), ("through", "detach"), ("fine", "--t-max"),
    ("untempered", "--lam"), ("fast", "a lower --lr-g"), ("kl", ""), ("sba_5", ""), ("other", "")])
def test_the_recorded_runs_are_told_right(run, words):
    """Each sick run of results/health in its last row; the healthy ones, and all others of one
    evaluation, are told nothing in any row. Those of more do go astray (results.md)."""
    folders = [HERE / f"results/health/{run}_seed0"]
    if run == "other":
        folders = [folder for name in ("images", "images_every_h", "f_distill")
                   for folder in (HERE / "results" / name).iterdir() if "nfe" not in folder.name]
    assert folders
    for folder in folders:
        with open(folder / "log.csv") as f:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
        said = [warning(rows[:i]) for i in range(1, len(rows) + 1)]
        assert words in said[-1] if words else not any(said), (folder, said)
