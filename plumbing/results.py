"""Runs of a script: made, kept a line each in a .jsonl, and put into tables.

A run is named by its script, its options and its seed. So two tables that show the same run share
it, and it is made once. Whoever changes the default of an option writes the old default into the
options of the rows, and of the kept lines, that were made with it.
"""
import csv
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import scipy.stats

from plumbing.loop import Stop, atomic

COLUMNS = {     # key of a run's numbers: the table's head, digits
    "modes_covered": ("modes", 1), "mode_tv": ("mode TV", 3), "on_mode": ("on a mode", 3),
    "log_r_error": ("log r error", 2), "log_r_low": ("at the lowest sigma", 1), "ess": ("ESS", 2),
    "tau": ("tau", 2), "to_teacher": ("to the teacher's samples", 2), "to_data": ("to the data", 2),
    "less_kl": ("minus KL's, same seed", 2), "interval": ("minus KL's, 95 %", 2),
    "interval_data": ("minus KL's, 95 %", 2), "range": ("range over the last half", 2),
    "precision": ("precision", 3), "recall": ("recall", 3),
    "is": ("IS", 2), "log_r_std": ("std of log r", 2),
}
# a difference to KL -> the distance of which it is one
LESS_KL = {"less_kl": "to_teacher", "interval": "to_teacher", "interval_data": "to_data"}
# BE, KL and LS are SBA with these lambdas, so one run
SBA = {"--h be": "--h sba --lam -1", "--h kl": "--h sba --lam 0", "--h ls": "--h sba --lam 1"}


@dataclass(frozen=True)
class Group:
    """The runs of one table. rows: name -> options, or a word for an edit of the code, whose run is
    made by hand."""
    title: str
    script: str
    rows: dict
    columns: tuple                          # keys of COLUMNS
    common: str = ""                        # options of every row
    seeds: int = 3
    labels: dict = field(default_factory=dict)      # row -> what the table calls it
    last: int = 1                           # measurements that are averaged, at a run's end
    named: bool = False                     # only run when named: it needs a GPU, or other data

    def options(self, row):
        own = self.rows[row]
        return f"{own} {self.common}".strip() if own.startswith("--") else own


def name(script, options, seed):
    """Return a run's name, in which the order of its options makes no difference. --kimg is no part
    of it, since a longer run holds the shorter, and BE, KL and LS are called by SBA's lambda."""
    for h, sba in SBA.items():
        options = options.replace(h, sba)
    parts = sorted(part.strip() for part in f" {options}".split(" --") if part)
    return " --".join([script, *(p for p in parts if not p.startswith("kimg ")), f"seed {seed}"])


# ------------------------------------------------------------------------------- kept, a line each

def read(file):
    """Return name -> run of a .jsonl: script, options, seed, numbers, and the rows of its log."""
    kept = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        run = json.loads(line)
        rows = zip(*run["log"].values())
        run["log"] = [{k: v for k, v in zip(run["log"], row) if v is not None} for row in rows]
        kept[name(run["script"], run["options"], run["seed"])] = run
    return kept


def write(kept, file):
    """Write what read() returns. A log is written by columns, which is a third as long."""
    lines = []
    for _, run in sorted(kept.items()):
        keys = dict.fromkeys(k for row in run["log"] for k in row)
        columns = {k: [row.get(k) for row in run["log"]] for k in keys}
        lines.append(json.dumps(run | {"log": columns}, allow_nan=False) + "\n")
    with atomic(file) as tmp:
        tmp.write_text("".join(lines))


def read_run(folder, script, options, seed):
    """Return the run in a folder that has result.json, as read() does. Raises ValueError unless its
    config has these options word by word: --h ls is not --h sba --lam 1."""
    numbers = json.loads((folder / "result.json").read_text())
    config, history = numbers.pop("config"), numbers.pop("history", [])
    for part in f"{options} --seed {seed}".split("--")[1:] if options.startswith("--") else ():
        flag, _, value = part.strip().partition(" ")
        key = flag.replace("-", "_")
        has = str(config.get(key))
        if key != "preset" and not same(has, value or "True"):
            raise ValueError(f"{folder} was run with --{flag} {has}, and not with {value}")
    log = [{k: round(v, 4) for k, v in row.items()} for row in history]         # in the plane
    if (folder / "log.csv").exists():
        with open(folder / "log.csv") as f:
            log = [{k: float(v) for k, v in row.items() if v}
                   for row in csv.DictReader(line for line in f if not line.startswith("#"))]
    elsewhere = ("h", "lam", "seed", "before", "after")         # in the options, or in the log
    numbers = {k: v for k, v in numbers.items() if k not in elsewhere}
    return dict(script=script, options=options, seed=seed, numbers=numbers, log=log)


def same(a, b):
    """Return whether two words are one number, or name one file, in whichever folder."""
    try:
        return float(a) == float(b)
    except ValueError:
        return Path(a).name == Path(b).name


def length(options):
    """Return how many thousand images the options ask for, or None."""
    kimg = re.search(r"--kimg (\S+)", options)
    return float(kimg[1]) if kimg else None


def find_run(kept, group, row, seed):
    """Return the run of a group's row, until the row's --kimg, or None. Its numbers are all that
    tables and pictures show, among them those of its log's last row, or means of its last rows, and
    the range of the distance to the data over the last half."""
    options = group.options(row)
    run, kimg = kept.get(name(group.script, options, seed)), length(options)
    if not run:
        return None
    log, numbers = run["log"], run["numbers"]
    if kimg:
        long_enough = [i for i, line in enumerate(log) if line["kimg"] >= kimg]
        if not long_enough:
            return None
        log = log[:long_enough[0] + 1]
    if errors := numbers.get("log_r_error_by_sigma"):
        numbers = numbers | {"log_r_low": errors[min(errors, key=float)]}
    last = log[-group.last:]
    ends = {k: statistics.fmean(line[k] for line in last) for k in last[-1]} if log else {}
    if "to_data" in ends:
        late = [line["to_data"] for line in log if line["kimg"] >= log[-1]["kimg"] / 2]
        ends["range"] = max(late) - min(late)
    return run | {"log": log, "numbers": ends | numbers}


def rows_of(kept, group):
    """Return row -> runs, one a seed, for the rows of a group that have some."""
    rows = {row: [find_run(kept, group, row, seed) for seed in range(group.seeds)]
            for row in group.rows}
    return {row: [run for run in runs if run] for row, runs in rows.items() if any(runs)}


# ------------------------------------------------------------------------------------------ made

def missing_runs(kept, groups, names, folder):
    """Return folder -> command, for what no run is kept of. Of runs with one name, keep the
    longest. Within a group all runs of seed 0 come before those of seed 1."""
    runs = {}
    for group_name in names:
        group = groups[group_name]
        for seed in range(group.seeds):
            for row in group.rows:
                options = group.options(row)
                if options.startswith("--") and not find_run(kept, group, row, seed):
                    run = (length(options) or 0, f"{group_name}/{row}_seed{seed}",
                           [group.script, *options.split(), "--seed", str(seed)])
                    key = name(group.script, options, seed)
                    runs[key] = max(runs.get(key, run), run, key=lambda run: run[0])
    commands = {}
    for _, place, words in runs.values():
        out = folder / place
        again = ["--resume"] if (out / "checkpoint.pt").exists() else []
        commands[out] = [sys.executable, *words, "--out", str(out), *again]
    return commands


def make(commands, cwd, at_once):
    """Run folder -> command, `at_once` of them at a time, of one thread each; its output goes to
    folder/log.txt. For one that fails its last line is printed, and the others go on. A signal is
    handed on once, so that a run can save, and no other run is then begun. Returns an exit status:
    0; 1 where one failed; 128 + the signal's number."""
    waiting, running, failed, handed_on = dict(commands), {}, 0, False
    with Stop() as stop:
        while running or waiting and not stop.number:
            while waiting and len(running) < at_once and not stop.number:
                folder = next(iter(waiting))
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / "log.txt", "w") as log:
                    running[folder] = subprocess.Popen(
                        waiting.pop(folder), cwd=cwd, stdin=subprocess.DEVNULL, stdout=log,
                        stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
                        start_new_session=True)         # without the terminal's signals
            if stop.number and not handed_on:
                handed_on = True
                for process in running.values():
                    process.terminate()
            time.sleep(0.1)
            for folder in [f for f, process in running.items() if process.poll() is not None]:
                code, said = running.pop(folder).returncode, f"{folder} is done"
                if code:
                    lines = (folder / "log.txt").read_text(errors="replace").split("\n")
                    last = ([line for line in lines if line.strip()] or ["no word"])[-1]
                    said = f"{folder} failed: {last}"
                if not handed_on:
                    failed += bool(code)
                    print(said, file=sys.stderr, flush=True)
    if stop.number:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    return min(failed, 1)


# ---------------------------------------------------------------------------------------- tables

def values(runs, key, base=()):
    """Return a number of each run that has it. Those of LESS_KL are a distance minus that of KL's
    run, in `base`, with the same seed, which draws the same noise."""
    numbers = [run["numbers"] for run in runs]
    if distance := LESS_KL.get(key):
        kl = {run["seed"]: run["numbers"].get(distance) for run in base}
        numbers = [{key: run["numbers"][distance] - kl[run["seed"]]} for run in runs
                   if kl.get(run["seed"]) is not None]
    return [n[key] for n in numbers if n.get(key) is not None]


def tempered(runs):
    """Return whether --ess raised the weights of some run to a power tau below 1."""
    return any(tau < 0.995 for tau in values(runs, "tau"))


def cell(numbers, digits, interval=False):
    """Return mean ± standard deviation (over n - 1) in so many digits, or the 95 % interval of the
    mean by Student's t."""
    n = len(numbers)
    if n < 2:
        return f"{numbers[0]:.{digits}f}" if n else ""
    mean, std = sum(numbers) / n, statistics.stdev(numbers)
    if interval:
        half = scipy.stats.t.ppf(0.975, n - 1) * std / math.sqrt(n)
        return f"{mean - half:.{digits}f} to {mean + half:.{digits}f}"
    return f"{mean:.{digits}f} ± {std:.{digits}f}"


def table(group, rows):
    """Return a group's table in Markdown; a column that no row has is left out."""
    cells = {row: {k: values(runs, k, rows.get("kl", ())) for k in group.columns}
             for row, runs in rows.items()}
    columns = [k for k in group.columns if any(numbers[k] for numbers in cells.values())]
    lines = [["options", "seeds", *(COLUMNS[k][0] for k in columns)], ["---"] * (2 + len(columns))]
    for row, runs in rows.items():
        options = f"`{group.rows[row]}`" if group.rows[row].startswith("--") else ""
        first = [group.labels.get(row), "tempered" if tempered(runs) else "", options]
        lines.append([", ".join(filter(None, first)), str(len(runs)),
                      *(cell(cells[row][k], COLUMNS[k][1], "interval" in k) for k in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
