"""A training run in its folder: steps, rows of log.csv, checkpoint.pt, signals, --resume."""
import contextlib
import csv
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from plumbing.files import atomic, claim, save_atomic
from plumbing.options import same_options
from plumbing.run import Stop, load_generator, processes, rank, world
from plumbing.weights import check_form, check_optimizer, read_checkpoint


def read_run(path, cfg, free, columns):
    """The state in a run's checkpoint. Raises ValueError if it is none, or one of a run whose
    options, but for the free ones, are not those of `cfg`."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    state = read_checkpoint(path, "a run's checkpoint")
    check_form({"config": {}, "rows": [], "seconds": 0.0}, state, str(path), exact=False)
    for row in state["rows"]:
        check_form({}, row, f"{path}: rows", exact=False)
        names = {"kimg", "seconds"} | set(columns) & set(row)
        check_form(dict.fromkeys(names, 0.0), row, f"{path}: rows")
    same_options(path, state["config"], asdict(cfg), free)
    return state


def take_up(trainer, state, name, nets, optimizers):
    """Load what a run saved into `trainer`, whose state() it is to have the form of. nets and
    optimizers: names of attributes. Raises ValueError, naming the place in the file `name`."""
    state = {k: v for k, v in state.items() if k not in ("rows", "seconds")}
    elsewhere = {k: state.get(k) for k in ("config", "generator", "sums", *optimizers)
                 if k in trainer.state()}
    check_form(trainer.state() | elsewhere, state, f"{name}: state")
    for key in ("seen", "moves"):
        if state.get(key, 0) < 0:
            raise ValueError(f"{name}: {key} is {state[key]}")
    for key in optimizers:
        check_optimizer(getattr(trainer, key), state[key], f"{name}: {key}")
    for key in (*nets, *optimizers):
        getattr(trainer, key).load_state_dict(state[key])
    for key in optimizers:      # fused Adam counts on moments that lie in memory as their parameter
        for p, moments in getattr(trainer, key).state.items():
            moments |= {k: torch.empty_like(p).copy_(v) for k, v in moments.items()
                        if v.shape == p.shape}
    trainer.seen = state["seen"]
    load_generator(trainer.generator, state["generator"], trainer.cfg.seed + trainer.seen, name)


@contextlib.contextmanager
def folder(cfg, out, resume, free, columns):
    """Hold the run's folder and join the other processes; yields the state to go on from, or {}."""
    path = out / "checkpoint.pt"
    state = read_run(path, cfg, free, columns) if resume else {}
    if path.exists() and not resume:
        raise FileExistsError(f"{path} exists: add --resume to go on, or choose another --out")
    with claim(out) if rank() == 0 else contextlib.nullcontext(), processes(cfg.device):
        yield state


class Loop:
    """Steps a trainer until it has seen cfg.kimg thousand images.

    trainer: has seen, step() and state(); a row empties its sums. evaluate(): draws what it likes
    and returns a row of log.csv, a dictionary with some of `columns`; it may be left at any point
    by a signal, so it changes nothing else. Files are written by process 0 alone.
    """

    def __init__(self, trainer, cfg, out, columns, evaluate, every, state):
        self.trainer, self.cfg, self.out = trainer, cfg, out
        self.columns, self.evaluate, self.every = ("kimg", "seconds", *columns), evaluate, every
        self.rows, self.before = state.get("rows", []), state.get("seconds", 0.0)
        self.start, self.saved = time.time(), state and (trainer.seen, len(self.rows))
        if rank() == 0:
            self.write_csv()                            # a folder that can't be written fails here

    def seconds(self):
        return self.before + time.time() - self.start

    def write_csv(self):
        with atomic(self.out / "log.csv") as tmp, open(tmp, "w", newline="") as f:
            writer = csv.DictWriter(f, self.columns)
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in self.rows)

    def add_row(self):
        if self.rows and round(1e3 * self.rows[-1]["kimg"]) == self.trainer.seen:
            return                                      # a resumed run has it already
        row = {name: float(value) for name, value in self.evaluate().items()}
        self.rows.append({"kimg": self.trainer.seen / 1e3, "seconds": self.seconds()} | row)
        self.trainer.sums = {}
        self.write_csv()

    def save(self):
        if self.saved != (self.trainer.seen, len(self.rows)):
            save_atomic(self.trainer.state() | {"rows": self.rows, "seconds": self.seconds()},
                        self.out / "checkpoint.pt")
            self.saved = self.trainer.seen, len(self.rows)

    def run(self):
        """-> 0, or 128 + the number of the signal that stopped it, with the command to go on."""
        trainer, end, main = self.trainer, 1e3 * self.cfg.kimg, rank() == 0

        def due(every):
            return trainer.seen % max(1, round(1e3 * every)) < self.cfg.batch or trainer.seen >= end

        bar = tqdm(total=round(end), initial=trainer.seen, unit="img", disable=not main,
                   smoothing=0.1)
        with Stop() as stop, bar:
            while True:
                if main and due(self.every) and not stop.number:
                    with stop.at_once():                # it takes minutes, and nothing is lost
                        self.add_row()
                if trainer.seen >= end or stop.agreed(self.cfg.device):
                    break
                trainer.step()
                bar.update(self.cfg.batch)
                if main and due(self.cfg.save_every):   # before the evaluation
                    self.save()
            if main:
                self.save()
        if stop.number and main:
            launcher = "python" if world() == 1 else f"torchrun --nproc_per_node={world()}"
            flags = [a for a in sys.argv[1:] if a != "--resume"] + ["--resume"]
            print(f"stopped after {trainer.seen} images; to go on: {launcher} "
                  f"{Path(sys.argv[0]).name} {shlex.join(flags)}")
        return stop.number and 128 + stop.number
