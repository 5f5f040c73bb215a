"""Which runs the groups of experiments.py are, which of them have a result, and tables of these.

A group has a title, the script that makes its runs, rows (name -> options), the options common to
its rows, a number of seeds, and columns, keys of COLUMNS.
"""
import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from plumbing.jobs import read
from plumbing.pictures import mean_std


# ---------------------------------------------------------------------- which run is which result

IGNORED = ("device", "gradient_checkpointing", "save_every", "preview", "kimg")     # see identity
SAME = {"be": -1.0, "kl": 0.0, "ls": 1.0}      # these rows are SBA's


@dataclass(frozen=True)
class Script:
    file: str
    config: type                # the dataclass of its options
    parse: Callable             # words of a command line -> such a config, and more


@functools.cache
def config_of(script, options):
    """What a run of these options writes as its config, a dictionary. Raises SystemExit or
    ValueError for options that the script does not take."""
    return asdict(script.parse(options.split())[0])


def power(config):
    """-> lambda of the weight r^lambda, or None for a weight that is no power of r."""
    return config["lam"] if config["h"] == "sba" else SAME.get(config["h"])


def identity(script, config):
    """What decides a run's numbers, as a text: two runs of the same are one. An option that is
    younger than a result had its default there, and one that is gone was off. The options IGNORED
    change a number no more than another machine does, but for kimg: a longer run holds the shorter.
    """
    defaults = {f.name: f.default for f in fields(script.config)}
    config = defaults | {k: v for k, v in config.items() if k in defaults or v}
    lam = power(config)
    config |= dict(h=config["h"] if lam is None else "sba", lam=lam)
    config = {name: value for name, value in config.items() if name not in IGNORED}
    return json.dumps([script.file, config], sort_keys=True)


@dataclass(frozen=True)
class Run:
    folder: str                 # GROUP/ROW_seedK, in that of the results
    row: str
    seed: int
    script: Script
    options: str                # but the seed; "" for a run that is made by hand

    def config(self):
        return config_of(self.script, self.options) | {"seed": self.seed}

    def identity(self):
        return identity(self.script, self.config())

    def kimg(self):
        return self.config().get("kimg", 0)


def runs_of(groups, names=None, most=math.inf):
    """All runs of the groups called `names`, or of all, `most` seeds of each row at most; those of
    one seed in a row. groups: name -> group."""
    runs = []
    for name in groups if names is None else names:
        group = groups[name]
        for seed in range(min(group.seeds, most)):
            for row, own in group.rows.items():
                options = own and f"{own} {group.common}"
                runs.append(Run(f"{name}/{row}_seed{seed}", row, seed, group.script, options))
    return runs


class Results:
    """The finished runs in a folder. What was made by hand counts for its own row alone."""

    def __init__(self, folder, groups):
        self.folder, self.groups, self.found = folder, groups, {}       # found: identity -> [Done]
        for run in runs_of(groups):
            done = read(folder / run.folder) if run.options else None
            if done:
                key = identity(run.script, done.result["config"])
                self.found.setdefault(key, []).append(done)

    def of(self, run):
        """The run's Done, from whichever group, or None."""
        if not run.options:
            return read(self.folder / run.folder)
        cut = [done.until(run.kimg()) for done in self.found.get(run.identity(), [])]
        return next((done for done in cut if done), None)

    def rows(self, name):
        """row -> seed -> Done, for the rows of a group that have results."""
        rows = {row: {} for row in self.groups[name].rows}
        for run in runs_of(self.groups, [name]):
            done = self.of(run)
            if done:
                rows[run.row][run.seed] = done
        return {row: seeds for row, seeds in rows.items() if seeds}

    def missing(self, runs):
        """folder -> command, for what has no result: of runs with one identity the longest."""
        longest = {}
        for run in runs:
            if run.options and not self.of(run):
                other = longest.setdefault(run.identity(), run)
                if run.kimg() > other.kimg():
                    longest[run.identity()] = run
        commands = {}
        for run in longest.values():
            out = self.folder / run.folder
            again = ["--resume"] if (out / "checkpoint.pt").exists() else []
            commands[out] = [sys.executable, run.script.file, *run.options.split(),
                             "--seed", str(run.seed), "--out", str(out), *again]
        return commands


# ------------------------------------------------------------------------------------- the tables

COLUMNS = {     # key of a result: the table's head, digits
    "modes_covered": ("modes", 1), "mode_tv": ("mode TV", 3), "on_mode": ("on a mode", 3),
    "log_r_error": ("log r error", 2), "log_r_low": ("at the lowest sigma", 1), "ess": ("ESS", 2),
    "tau": ("tau", 2),
    "to_teacher": ("to the teacher's samples", 2), "to_data": ("to the data", 2),
    "less_kl": ("minus KL's, same seed", 2), "precision": ("precision", 3), "recall": ("recall", 3),
    "score": ("score", 2), "log_r_std": ("std of log r", 2),
}


def values_of(rows, row, key):
    """A number of a row's runs, one a seed. less_kl compares runs of one seed, which draw the same
    noise."""
    numbers = {seed: done.numbers() for seed, done in rows[row].items()}
    if key == "less_kl":
        key = "to_teacher" if any("to_teacher" in n for n in numbers.values()) else "to_data"
        base = {seed: done.numbers() for seed, done in rows.get("kl", {}).items()}
        return [n[key] - base[seed][key] for seed, n in numbers.items() if seed in base]
    return [n[key] for n in numbers.values() if n.get(key) is not None]


def cell(values, digits):
    if not values:
        return ""
    mean, std = mean_std(values)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if len(values) > 1 else "")


def is_held(rows, row):
    """Whether --ess tempered a row's weights: tau is below 1."""
    return any(tau < 0.995 for tau in values_of(rows, row, "tau"))


def table(group, rows):
    """A group's table, in Markdown; a column that no row has is left out."""
    columns = [k for k in group.columns if any(values_of(rows, row, k) for row in rows)]
    lines = [["options", "seeds", *(COLUMNS[k][0] for k in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row, by_seed in rows.items():
        held = "held" if is_held(rows, row) else ""
        name = [group.labels.get(row), held, group.rows[row] and f"`{group.rows[row]}`"]
        lines.append([", ".join(filter(None, name)), str(len(by_seed)),
                      *(cell(values_of(rows, row, k), COLUMNS[k][1]) for k in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(results):
    """Yield the name and the table of every group with results."""
    for name, group in results.groups.items():
        rows = results.rows(name)
        if rows:
            yield name, table(group, rows)
