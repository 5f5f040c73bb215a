"""plumbing/loop.py: files that are whole or absent, runs that are stopped and go on, processes."""
import contextlib
import csv
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from plumbing import loop
from plumbing.loop import Stop, atomic, begin, check_finite, claim, save, take_up, train

TOP = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------ files

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


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target, name in (("file/a", "file"), ("folder", "folder"), ("a" * 300, "aaa")):
        with pytest.raises(OSError) as e, atomic(tmp_path / target) as tmp:
            tmp.write_bytes(b"x")
        assert name in e.value.filename and ".part" not in e.value.filename
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@contextlib.contextmanager
def small_disk(size):
    """Let no file of this process grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path):
    target = tmp_path / "checkpoint.pt"
    save({"old": 1}, target)
    with small_disk(2 ** 13), pytest.raises(OSError) as e:
        save({"a": torch.zeros(9000)}, target)
    assert e.value.filename == str(target)
    assert loop.load(target) == {"old": 1} and [*tmp_path.iterdir()] == [target]


# ---------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_first_signal_asks_and_the_second_ends(number, processes, monkeypatch):
    """But not one process of several, to which torchrun hands on what it has already."""
    ends, before = [], signal.getsignal(number)
    monkeypatch.setattr(os, "_exit", ends.append)
    with Stop() as stop:
        assert not stop.agreed("cpu")
        signal.raise_signal(number)
        assert stop.number == number and stop.agreed("cpu") and not ends
        monkeypatch.setenv("WORLD_SIZE", processes)
        signal.raise_signal(number)
        assert ends == [128 + number] * (processes == "1")
    assert signal.getsignal(number) is before


def test_in_a_thread_it_does_nothing():
    seen = []

    def work():
        with Stop() as stop:
            seen.append(stop.agreed("cpu"))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


# ------------------------------------------------------------------------------------------ a run

@dataclass
class Config:
    batch: int = 4
    lr: float = 0.1
    kimg: float = 0.024
    save_every: float = 0.008
    device: str = "cpu"
    seed: int = 0


class Trainer:
    """A line, fitted by fused Adam to noisy points."""

    def __init__(self, cfg):
        self.cfg, self.seen, self.sums = cfg, 0, {}
        torch.manual_seed(0)
        self.net = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.opt = torch.optim.Adam(self.net.parameters(), cfg.lr, fused=True)
        self.generator = torch.Generator().manual_seed(cfg.seed)

    def step(self):
        loss = self.net(torch.randn(self.cfg.batch, 2, 2, 2, generator=self.generator)).exp().mean()
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.seen += self.cfg.batch
        self.sums["loss"] = self.sums.get("loss", 0) + loss.item()

    def state(self):
        return {"config": asdict(self.cfg), "seen": self.seen, "sums": dict(self.sums),
                "net": self.net.state_dict(), "opt": self.opt.state_dict(),
                "generator": self.generator.get_state()}


def run(out, resume=False, act=lambda trainer: None, **options):
    """Train in a folder and return rows, status and the trainer. act: is called before each step
    with the trainer, and in each evaluation with None."""
    cfg = Config(**options)
    with claim(out):
        state, trainer = begin(cfg, out, resume, free=("kimg",)), Trainer(cfg)
        if state:
            take_up(trainer, state, out / "checkpoint.pt", ["net"], ["opt"])
            trainer.sums = state["sums"]
        step = trainer.step
        trainer.step = lambda: (act(trainer), step())

        def evaluate(rows):
            act(None)
            return {"loss": trainer.sums.get("loss", 0), "weight": trainer.net.weight.sum().item()}
        return *train(trainer, cfg, out, evaluate, 0.008, state, "a note"), trainer


def test_a_run_writes_its_log_and_goes_on_bit_for_bit(tmp_path):
    rows, status, whole = run(tmp_path / "whole")
    assert status == 0 and [row["kimg"] for row in rows] == [0, 0.008, 0.016, 0.024]
    with open(tmp_path / "whole/log.csv") as f:
        assert f.readline() == "# a note\n"
        logged = [float(row["weight"]) for row in csv.DictReader(f)]
    assert logged == pytest.approx([row["weight"] for row in rows], rel=1e-5)
    run(tmp_path / "parts", kimg=0.012)
    again, status, parts = run(tmp_path / "parts", resume=True)
    assert status == 0 and torch.equal(parts.net.weight, whole.net.weight)
    assert [row["kimg"] for row in again] == [0, 0.008, 0.012, 0.016, 0.024]
    assert [row["weight"] for row in again[:2] + again[3:]] == [row["weight"] for row in rows]
    assert again[2]["loss"] + again[3]["loss"] == pytest.approx(rows[2]["loss"])    # since a row
    assert run(tmp_path / "parts", resume=True)[0] == again         # nothing is left to do


@pytest.mark.parametrize("at", [3, 4])                  # in a step, in the evaluation after two
def test_a_signal_saves_and_prints_the_command_to_go_on(at, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--out", "a b", "--resume"])
    calls = []

    def act(trainer):
        calls.append(trainer)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
    rows, status, trainer = run(tmp_path / "run", act=act)
    assert status == 128 + signal.SIGTERM and trainer.seen == 8 and len(rows) == 1
    assert (calls[-1] is None) == (at == 4)
    assert capsys.readouterr().out == (
        "stopped after 8 images; to go on: python x.py --out 'a b' --resume\n")
    rows, expected = (run(tmp_path / name, resume=name == "run")[0] for name in ("run", "whole"))
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]


def test_an_error_in_a_step_leaves_the_last_checkpoint(tmp_path):
    def act(trainer):
        if trainer and trainer.seen == 12:
            raise FloatingPointError("step 3")
    with pytest.raises(FloatingPointError):
        run(tmp_path, act=act)
    assert loop.load(tmp_path / "checkpoint.pt")["seen"] == 8


def test_moments_keep_their_values_and_get_the_parameters_layout():
    trainer, other = Trainer(Config()), Trainer(Config())
    trainer.step()
    state = trainer.state()
    moments = state["opt"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].contiguous()
    take_up(other, state, "a.pt", ["net"], ["opt"])
    taken = other.opt.state[other.net.weight]["exp_avg"]
    assert torch.equal(taken, moments["exp_avg"])
    assert taken.stride() == other.net.weight.stride() != moments["exp_avg"].stride()


@pytest.mark.parametrize("name, value", [
    ("exp_avg", torch.zeros(1)), ("exp_avg_sq", torch.zeros(3, 2, 2, 3)), ("step", torch.zeros(3)),
    ("exp_avg", "text")])
def test_a_crafted_state_of_an_optimiser_is_refused(name, value):
    trainer = Trainer(Config())
    trainer.step()
    state = trainer.state()
    state["opt"]["state"][0][name] = value
    with pytest.raises(ValueError, match=f"^a.pt: not a checkpoint of such a run: .*({name}|str)"):
        take_up(Trainer(Config()), state, "a.pt", ["net"], ["opt"])


def test_on_another_kind_of_device_the_noise_starts_from_the_seed(capsys):
    trainer = Trainer(Config(seed=5))
    trainer.step()
    state = trainer.state() | {"generator": torch.zeros(16, dtype=torch.uint8)}     # as a GPU's
    take_up(trainer, state, "a.pt", ["net"], ["opt"])
    assert "noise goes on anew" in capsys.readouterr().err
    assert torch.equal(torch.randn(5, generator=trainer.generator),
                       torch.randn(5, generator=torch.Generator().manual_seed(5 + 4)))


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


# -------------------------------------------------------------------------------------- processes

TWO = """
import os, signal, torch
from plumbing.cli import run_main
from plumbing.loop import *
from plumbing.loop import first_process_first

def main(argv):
    with processes("cpu"), Stop() as stop:
        with first_process_first():
            assert os.path.exists("came") == (rank() == 1)
            open("came", "w").close()
        assert not stop.agreed("cpu")
        if rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        assert stop.agreed("cpu") and stop.number == signal.SIGTERM
        if rank() == 1:
            raise ValueError("only here")

run_main(main)
"""


def test_two_processes(tmp_path):
    """The first may download alone, a signal to one stops both, and the process in which an error
    is raised says so. That they share a batch is in test_runs.py."""
    (tmp_path / "two.py").write_text(TWO)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    ran = [subprocess.Popen([sys.executable, "two.py"], cwd=tmp_path, text=True,
                            stderr=subprocess.PIPE, env=os.environ | dict(
        PYTHONPATH=str(TOP), RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2",
        MASTER_ADDR="localhost", MASTER_PORT=str(port))) for r in range(2)]
    (_, first), (_, second) = (p.communicate(timeout=120) for p in ran)
    assert ran[0].returncode == 0, first
    assert ran[1].returncode == 2 and second.splitlines()[-1] == "two.py: only here"
    assert "Traceback" not in first + second
