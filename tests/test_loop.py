"""plumbing/loop.py: signals, runs that are stopped and go on, and several processes. That files
are whole or absent is in test_hostile.py."""
import csv
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from plumbing import loop
from plumbing.loop import Stop, begin, check_finite, claim, take_up, train

TOP = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number, processes", [(signal.SIGINT, "1"), (signal.SIGTERM, "2")])
def test_the_first_signal_asks_and_the_second_ends(number, processes, monkeypatch):
    """But not one process of several, to which torchrun hands on what it has already."""
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    with Stop() as stop:
        assert not stop.agreed("cpu")
        signal.raise_signal(number)
        assert stop.number == number and stop.agreed("cpu") and not ends
        monkeypatch.setenv("WORLD_SIZE", processes)
        signal.raise_signal(number)
        assert ends == [128 + number] * (processes == "1")


# ------------------------------------------------------------------------------------------ a run

@dataclass
class Config:
    batch: int = 4
    kimg: float = 0.024
    save_every: float = 0.008
    device: str = "cpu"
    seed: int = 0
    wait_kimg: float = 0.0


class Trainer:
    """A line, fitted by fused Adam to noisy points."""

    def __init__(self, cfg):
        self.cfg, self.seen, self.sums = cfg, 0, {}
        torch.manual_seed(0)
        self.net = torch.nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        self.opt = torch.optim.Adam(self.net.parameters(), 0.1, fused=True)
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


@pytest.mark.parametrize("at", [3, 4])                  # in a step, in the evaluation after two
def test_a_run_that_a_signal_stops_goes_on_bit_for_bit(at, tmp_path):
    """And its log has the rows of an unbroken one. The command it prints is in test_runs.py."""
    calls = []

    def act(trainer):
        calls.append(trainer)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)
    rows, status, trainer = run(tmp_path / "run", act=act)
    assert status == 128 + signal.SIGTERM and trainer.seen == 8 and len(rows) == 1
    assert (calls[-1] is None) == (at == 4)
    rows, expected = (run(tmp_path / name, resume=name == "run")[0] for name in ("run", "whole"))
    assert [row["kimg"] for row in rows] == [0, 0.008, 0.016, 0.024]
    assert [row | {"seconds": 0} for row in rows] == [row | {"seconds": 0} for row in expected]
    assert run(tmp_path / "run", resume=True)[0] == rows            # nothing is left to do
    with open(tmp_path / "run/log.csv") as f:
        assert f.readline() == "# a note\n"
        logged = [float(row["weight"]) for row in csv.DictReader(f)]
    assert logged == pytest.approx([row["weight"] for row in rows], rel=1e-5)


def test_a_long_run_says_so_once_the_generator_moves(tmp_path, monkeypatch, capsys):
    """By the first ten of its own steps: 5 that wait are quicker, and 10 are left after them."""
    clock = [0.0]
    monkeypatch.setattr(loop.time, "time", lambda: clock[0])

    def act(trainer):
        clock[0] += 0 if trainer is None else 400 if trainer.seen >= 20 else 100
    run(tmp_path, act=act, kimg=0.1, wait_kimg=0.02)
    assert "about 1.1 hours are left" in capsys.readouterr().err


def test_the_checkpoint_is_written_before_the_evaluation(tmp_path):
    def act(trainer):
        if trainer is None and (tmp_path / "checkpoint.pt").exists():
            raise FloatingPointError("in the evaluation")
    with pytest.raises(FloatingPointError):
        run(tmp_path, act=act, save_every=1)
    assert loop.load(tmp_path / "checkpoint.pt")["seen"] == 8


def test_a_run_goes_on_on_another_kind_of_device(capsys):
    """Its moments get the parameters' layout there, and its noise starts anew, from the seed."""
    trainer, other = Trainer(Config(seed=5)), Trainer(Config(seed=5))
    trainer.step()
    state = trainer.state() | {"generator": torch.zeros(16, dtype=torch.uint8)}     # as a GPU's
    moments = state["opt"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].contiguous()
    take_up(other, state, "a.pt", ["net"], ["opt"])
    taken = other.opt.state[other.net.weight]["exp_avg"]
    assert torch.equal(taken, moments["exp_avg"])
    assert taken.stride() == other.net.weight.stride() != moments["exp_avg"].stride()
    assert "noise goes on anew" in capsys.readouterr().err
    assert torch.equal(torch.randn(5, generator=other.generator),
                       torch.randn(5, generator=torch.Generator().manual_seed(5 + 4)))


@pytest.mark.parametrize("value, shown", [(math.nan, "nan"), (-math.inf, "inf"), (4e9, "1e.09")])
def test_check_finite_names_the_step_the_value_and_the_noise_level(value, shown):
    sigma, fine = torch.tensor([0.1, 0.25, 3.0]).view(3, 1, 1, 1), torch.ones(3, 1, 2, 2)
    check_finite("step 4", sigma, gap=fine, log_r=1e7 * fine, loss=torch.zeros(3))
    bad = fine.clone()
    bad[1, 0, 1, 0] = value
    with pytest.raises(FloatingPointError, match=f"^step 4: log_r is {shown} at sigma = 0.25"):
        check_finite("step 4", sigma, gap=fine, log_r=bad)


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
