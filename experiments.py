"""Every run, table and picture: runs in results/, pictures in figures/, tables as Markdown.

    python experiments.py                               # draws and prints; trains nothing
    python experiments.py --run                         # first runs what results/ lacks: hours
    python experiments.py --run plane_lam images --seeds 1      # of these groups, with one seed
    python experiments.py --gif                         # also figures/toy2d.gif: KL beside SBA 5

A run is one call of toy2d.py or cifar_distill.py in a process of one thread. A run whose result is
there, in whichever group, is not made again. A run that was interrupted goes on. This is the only
command that writes into results/ and figures/ by default.
"""
from plumbing.run import Stop, run_main

import csv
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

import bregman
import cifar_distill
import toy2d
from plane import TARGETS
from plumbing.files import atomic, reading
from plumbing.options import Parser, count, path
from plumbing.plots import plane, pyplot, save_figure

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------- the groups

PLANE = ("modes_covered", "mode_tv", "on_mode", "log_r_error", "ess")
IMAGES = ("to_teacher", "less_kl", "to_data", "precision", "recall", "score", "log_r_std")


@dataclass(frozen=True)
class Group:
    """Runs of one table, in results/GROUP/ROW_seedK. rows is name -> options; "" is an edit of the
    code, whose run is made by hand."""
    title: str
    script: str
    rows: dict
    columns: tuple                          # of COLUMNS below
    common: str = ""                        # options of every row
    seeds: int = 3
    labels: dict = field(default_factory=dict)      # row -> what the table calls it
    named: bool = False                     # only run when named: it needs a GPU, or downloads


EVERY_H = {
    "be": "--h be", "sba_-0.5": "--h sba --lam -0.5", "kl": "--h kl", "lr": "--h lr",
    "sba_0.5": "--h sba --lam 0.5", "ls": "--h ls", "sba_3": "--h sba --lam 3",
    "sba_5": "--h sba --lam 5", "sba_10": "--h sba --lam 10",
}
THREE = {name: EVERY_H[name] for name in ("kl", "sba_5", "be")}

LAMBDAS = (-1, 0, 0.5, 1, 3, 5)
LINES = {       # is it the divergence, the classifier or the batch? label, options, lambdas, colour
    "learned_256": ("learned ratio, batch 256", "", LAMBDAS, "#cb181d"),
    "learned_1024": ("learned ratio, batch 1024", "--batch 1024", LAMBDAS, "#fd8d3c"),
    "exact_256": ("exact ratio, batch 256", "--ratio exact", LAMBDAS, "#08519c"),
    "exact_1024": ("exact ratio, batch 1024", "--ratio exact --batch 1024", (1, 5), "#41b6c4"),
    "level": ("noise levels alone", "--part level", (-1, 1, 5), "#969696"),
    "sample": ("samples alone", "--part sample", (-1, 1, 5), "#238b45"),
}
PLANE_RATIO = {         # how log r is learned, and how far it is believed
    "kl_linear": "--h kl --head linear", "kl_mean": "--h kl --head mean",
    "kl_high": "--h kl --class-min 0.2", "kl_low": "--h kl --class-max 0.5",
    "sba_5_linear": "--h sba --lam 5 --ess 0.95 --head linear",
    "sba_5_mean": "--h sba --lam 5 --ess 0.95 --head mean",
    "sba_5_high": "--h sba --lam 5 --ess 0.95 --class-min 0.2",
    "sba_5_low": "--h sba --lam 5 --ess 0.95 --class-max 0.5",
    "sba_5_clip": "--h sba --lam 5 --ess 0.95 --clip 1",
    "sba_5_exact": "--h sba --lam 5 --ess 0.95 --ratio exact",
}
PLANE_HELP = {
    "sba_5": "--h sba --lam 5", "sba_5_clip_0.5": "--h sba --lam 5 --clip 0.5",
    "sba_5_clip_0.5_exact": "--h sba --lam 5 --clip 0.5 --ratio exact",
    "sba_5_clip_0.2": "--h sba --lam 5 --clip 0.2",
    "sba_5_two_stage": "--h sba --lam 5 --clip 0.2 --norm two-stage",
    "sba_5_ess_0.5": "--h sba --lam 5 --ess 0.5", "sba_5_ess_0.9": "--h sba --lam 5 --ess 0.9",
    "sba_5_ess_0.95": "--h sba --lam 5 --ess 0.95",
    "sba_10_ess_0.95": "--h sba --lam 10 --ess 0.95",
}
PLANE_REST = {
    "kl_grid": "--h kl --target grid25", "be_grid": "--h be --target grid25",
    "kl_uneven": "--h kl --target uneven8", "be_uneven": "--h be --target uneven8",
    "kl_gan": "--h kl --gan 0.3", "kl_free": "--h kl --teacher-free",
    "kl_reward": "--h kl --reward linear",
}
EXERCISES = {           # of exercises.md
    "lecam": ("1: h of Le Cam", ""), "swap": ("2: BE, r upside down", ""),
    "through": ("3: no stop-gradient", ""),
    "stale": ("4: stale fake score", "--h kl --lr-f 1e-4"),
    "clip_0": ("5: log r clipped to 0", "--h sba --lam 5 --clip 0"),
    "lam_20": ("6: λ = 20", "--h sba --lam 20"),
    "learned": ("7: learned ratio", "--h sba --lam 5 --clip 0.5"),
    "exact": ("7: exact ratio", "--h sba --lam 5 --clip 0.5 --ratio exact"),
    "kl_uneven": ("8: a rare mode, KL", "--h kl --target uneven8"),
    "be_uneven": ("8: a rare mode, BE", "--h be --target uneven8"),
    "fine": ("9: small noise alone", "--h kl --sigma-max 0.1"),
    "free": ("10: no teacher", "--h kl --teacher-free"),
}

GAN = "1e-3"            # w_GAN on images
F_DISTILL = {"lr": "--h lr", "be": "--h be",
             "lr_gan": f"--h lr --gan {GAN}", "be_gan": f"--h be --gan {GAN}"}
RATES = ("1e-5", "3e-5", "1e-4", "3e-4")        # tried with KL; the lowest that halves the distance
RATE = "3e-5"                                   # goes into the paper's setting
DRAWN = "runs/teacher_50000.zip"        # edm.py sample pretrained/compact_teacher.pt -n 50000
PAPER = ("--decay-kimg 0 --norm batch --ess 0 --clip 10 --w-t dmd --t-min 0 --p-mean -1.2 "
         f"--p-std 1.2 --batch 64 --data {DRAWN} --eval-every 5 --eval-n 5000")
RATED = f"{PAPER} --lr-g {RATE} --lr-f {RATE}"
PARTS = {f"sba_5_{part}": f"--h sba --lam 5 --part {part}" for part in ("level", "sample")}

TOY, CIFAR = "toy2d.py", "cifar_distill.py"
GROUPS = {
    "plane_lam": Group("the divergence, the classifier or the batch", TOY, {
        f"{line}_{lam:g}": f"--h sba --lam {lam:g} {options}".strip()
        for line, (_, options, lambdas, _) in LINES.items() for lam in lambdas}, PLANE, seeds=5),
    "every_h": Group("every h on the ring", TOY, EVERY_H, PLANE, seeds=5),
    "plane_ratio": Group("learning the ratio", TOY, PLANE_RATIO, PLANE),
    "plane_help": Group("what helps SBA 5", TOY, PLANE_HELP, PLANE),
    "plane_rest": Group("other targets, losses and a reward", TOY, PLANE_REST, PLANE),
    "exercises": Group("the exercises", TOY, {k: v for k, (_, v) in EXERCISES.items()}, PLANE,
                       seeds=1, labels={k: v for k, (v, _) in EXERCISES.items()}),
    "images": Group("16,000 images, weights held", CIFAR,
                    THREE | {"kl_gan": f"--h kl --gan {GAN}"}, (*IMAGES, "tau"),
                    "--kimg 16 --eval-every 2"),
    "images_every_h": Group("6,000 images, weights held", CIFAR, EVERY_H, (*IMAGES, "tau"),
                            "--kimg 6 --eval-every 2"),
    "f_distill": Group("f-distill's setting", CIFAR, F_DISTILL, (*IMAGES, "ess"),
                       "--kimg 16 --eval-every 2 --norm two-stage --ess 0 --batch 64 "
                       "--teacher pretrained/compact_teacher_cond.pt"),
    "paper_rates": Group("the rate of the paper's setting", CIFAR, {
        f"kl_{rate}": f"--h kl --lr-g {rate} --lr-f {rate}" for rate in RATES},
        (*IMAGES, "ess"), f"{PAPER} --kimg 20", seeds=1),
    "paper_setting": Group("the paper's setting, nothing held", CIFAR, THREE, (*IMAGES, "ess"),
                           f"{RATED} --kimg 50", seeds=2),
    "paper_parts": Group("the same, a part of the weight", CIFAR, PARTS, (*IMAGES, "ess"),
                         f"{RATED} --kimg 50", seeds=1),
    "paper_long": Group("the paper's setting, 500,000 images", CIFAR,
                        {k: EVERY_H[k] for k in ("kl", "sba_5")}, (*IMAGES, "ess"),
                        f"{RATED} --kimg 500", seeds=2, named=True),
    "paper": Group("the paper's experiment", CIFAR, {k: EVERY_H[k] for k in ("kl", "sba_5")},
                   (*IMAGES, "ess"), "--preset paper", seeds=1, named=True),
}


# ---------------------------------------------------------------------- which run is which result

FREE = ("device", "gradient_checkpointing", "save_every", "preview", "kimg")    # change no number
SAME = {"be": -1.0, "fkl": -1.0, "kl": 0.0, "rkl": 0.0, "ls": 1.0}      # these rows are SBA's


@functools.cache
def config_of(script, options):
    """What a run of these options writes as its config, a dictionary. Raises SystemExit or
    ValueError for options that the script does not take."""
    if script == CIFAR:
        return asdict(cifar_distill.parse(options.split())[0])
    parser = Parser(prog=script)
    parser.add_fields(toy2d.Config)
    return asdict(toy2d.Config(**vars(parser.parse_args(options.split()))))


def power(config):
    """-> lambda of the weight r^lambda, or None for a weight that is no power of r."""
    return config["lam"] if config["h"] == "sba" else SAME.get(config["h"])


def identity(script, config):
    """What decides a run's numbers, as a text: two runs of the same are one. An option that is
    younger than a result had its default there. kimg is apart: a longer run holds the shorter."""
    kind = toy2d.Config if script == TOY else cifar_distill.Config
    config = {f.name: f.default for f in fields(kind)} | config
    lam = power(config)
    config |= dict(h=config["h"] if lam is None else "sba", lam=lam)
    return json.dumps([script, {k: v for k, v in config.items() if k not in FREE}], sort_keys=True)


@dataclass(frozen=True)
class Run:
    group: str
    row: str
    seed: int

    def script(self):
        return GROUPS[self.group].script

    def options(self):
        """The command's options, or "" for a run that is made by hand."""
        group = GROUPS[self.group]
        own = group.rows[self.row]
        return own and f"{own} {group.common} --seed {self.seed}".replace("  ", " ")

    def config(self):
        return config_of(self.script(), self.options())

    def identity(self):
        return identity(self.script(), self.config())

    def kimg(self):
        return self.config().get("kimg", 0)

    def folder(self, results):
        return results / self.group / f"{self.row}_seed{self.seed}"


def runs_of(names, most=math.inf):
    """All runs of these groups, with `most` seeds at most; those of one seed follow each other."""
    return [Run(name, row, seed) for name in names
            for seed in range(min(GROUPS[name].seeds, most)) for row in GROUPS[name].rows]


@dataclass
class Done:
    """A finished run: result.json, log.csv's rows (none in the plane), and what a table shows."""
    folder: Path
    result: dict
    log: list

    def numbers(self):
        return self.log[-1] if self.log else self.result

    def until(self, kimg):
        """The same after so many thousand images, or None if it has no row there."""
        after = [i for i, row in enumerate(self.log, 1) if row["kimg"] >= kimg]
        log = self.log[:after[0]] if after else []
        found = not self.log or log and log[-1]["kimg"] < kimg + self.result["config"]["batch"] / 1e3
        return Done(self.folder, self.result, log) if found else None


def read(folder):
    """-> Done, or None where no result is. Raises ValueError, naming the file, for a broken one."""
    file, log = folder / "result.json", []
    if not file.exists():
        return None
    with reading(file, "a run's result"):
        result = json.loads(file.read_text())
        result["config"]["h"]
    file = folder / "log.csv"
    if file.exists():
        with reading(file, "a run's log"), open(file) as f:
            log = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
            log[-1]["kimg"]
    return Done(folder, result, log)


def finished(results):
    """-> identity -> the finished runs under `results`. What was made by hand is no run's."""
    found = {}
    for run in runs_of(GROUPS):
        done = read(run.folder(results)) if run.options() else None
        if done:
            key = identity(run.script(), done.result["config"])
            found.setdefault(key, []).append(done)
    return found


def look_up(run, found, results):
    """-> the run's Done, from whichever group, or None."""
    if not run.options():
        return read(run.folder(results))
    cut = (done.until(run.kimg()) for done in found.get(run.identity(), []))
    return next((done for done in cut if done), None)


# ------------------------------------------------------------------------------------------ to run

def start(run, folder):
    """Start a run, or go on with it. -> its process, which gets no signal of the terminal's."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, run.script(), *run.options().split(), "--out", str(folder)]
    if (folder / "checkpoint.pt").exists():
        command.append("--resume")
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def missing(runs, results):
    """The runs to make: of those with one identity the longest, and none that has a result."""
    found, jobs = finished(results), {}
    for run in runs:
        if run.options() and not look_up(run, found, results):
            other = jobs.get(run.identity())
            if other is None or run.kimg() > other.kimg():
                jobs[run.identity()] = run
    return list(jobs.values())


def run_all(runs, results, at_once):
    """Make these runs. -> exit status: 0; 1 where one failed; 128 + the signal that stopped all."""
    waiting, running, failed, told = list(runs), {}, 0, False
    if hasattr(os, "nice"):
        os.nice(19)                         # so that who runs them can go on working
    with Stop() as stop:
        while running or waiting and not stop.number:
            while waiting and len(running) < at_once and not stop.number:
                run = waiting.pop(0)
                running[run] = start(run, run.folder(results))
            if stop.number and not told:
                told = True
                for process in running.values():
                    process.terminate()     # on images it saves first
            time.sleep(0.1)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                failed += not ended(run, running.pop(run).returncode, results, told)
                print(f"{len(runs) - len(waiting) - len(running)} of {len(runs)} runs",
                      file=sys.stderr, flush=True)
    if stop.number:
        print("stopped; the same command goes on", file=sys.stderr)
    return 128 + stop.number if stop.number else min(failed, 1)


def ended(run, code, results, told):
    """Whether the run went well; one that failed by itself is told in a line."""
    folder = run.folder(results)
    if code and not told:
        lines = (folder / "log.txt").read_text().replace("\r", "\n").strip().splitlines()
        print(f"{folder} failed: {lines[-1] if lines else f'status {code}'}", file=sys.stderr)
    return code == 0


# ------------------------------------------------------------------------------------- the tables

COLUMNS = {     # key of a result: the table's head, digits
    "modes_covered": ("modes", 1), "mode_tv": ("mode TV", 3), "on_mode": ("on a mode", 3),
    "log_r_error": ("log r error", 2), "ess": ("ESS", 2), "tau": ("tau", 2),
    "to_teacher": ("to the teacher's samples", 2), "to_data": ("to the data", 2),
    "less_kl": ("less KL's, same seed", 2), "precision": ("precision", 3), "recall": ("recall", 3),
    "score": ("score", 2), "log_r_std": ("std of log r", 2),
}


def collect(name, found, results):
    """-> row -> seed -> Done, for the rows of a group that have results."""
    rows = {}
    for run in runs_of([name]):
        done = look_up(run, found, results)
        if done:
            rows.setdefault(run.row, {})[run.seed] = done
    return {row: rows[row] for row in GROUPS[name].rows if row in rows}


def values_of(rows, row, key):
    """A number of a row's runs, one a seed. less_kl compares runs of one seed, which draw the same
    noise."""
    numbers = {seed: done.numbers() for seed, done in rows[row].items()}
    if key == "less_kl":
        key = "to_teacher" if any("to_teacher" in n for n in numbers.values()) else "to_data"
        base = {seed: done.numbers() for seed, done in rows.get("kl", {}).items()}
        return [n[key] - base[seed][key] for seed, n in numbers.items() if seed in base]
    return [n[key] for n in numbers.values() if n.get(key) is not None]


def mean_std(values):
    """Mean and standard deviation (over n - 1; 0 for one) along the first axis."""
    values = np.asarray(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]


def cell(values, digits):
    if not values:
        return ""
    mean, std = mean_std(values)
    return f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if len(values) > 1 else "")


def table(group, rows):
    """A group's table, in Markdown; a column that no row has is left out."""
    columns = [k for k in group.columns if any(values_of(rows, row, k) for row in rows)]
    lines = [["options", "seeds", *(COLUMNS[k][0] for k in columns)]]
    lines.append(["---"] * len(lines[0]))
    for row, by_seed in rows.items():
        name = [group.labels.get(row), group.rows[row] and f"`{group.rows[row]}`"]
        lines.append([", ".join(filter(None, name)), str(len(by_seed)),
                      *(cell(values_of(rows, row, k), COLUMNS[k][1]) for k in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables(results):
    """-> (group's name, its table) of every group with results."""
    found = finished(results)
    for name, group in GROUPS.items():
        rows = collect(name, found, results)
        if rows:
            yield name, table(group, rows)


# ----------------------------------------------------------------------------------- the pictures

COLOUR = {"kl": "#000000", "sba_5": "#cb181d", "be": "#2166ac", "lr": "#1b7837"}


def label(row):
    """kl_gan -> KL gan"""
    first, *rest = row.split("_")
    return " ".join([first.upper(), *rest])


def lambda_picture(rows):
    """Modes kept, and how evenly, against lambda: a line a ratio and batch; below, parts apart."""
    fig, axes = pyplot().subplots(2, 2, figsize=(12, 11), layout="constrained")
    for column, (key, title, top) in zip(axes.T, (("modes_covered", "modes kept, of 8", 8.6),
                                                  ("mode_tv", "mode weights' TV", 1))):
        for i, (line, (text, _, lambdas, colour)) in enumerate(LINES.items()):
            lambdas = [lam for lam in lambdas if f"{line}_{lam:g}" in rows]
            if not lambdas:
                continue
            points = [values_of(rows, f"{line}_{lam:g}", key) for lam in lambdas]
            mean, std = zip(*map(mean_std, points))
            at = np.array([LAMBDAS.index(lam) for lam in lambdas])
            style = dict(color=colour, label=text, capsize=6)
            if line in ("learned_256", "level", "sample"):
                where = 0.27 * (0 if line == "learned_256" else i - 3)
                shown = [j for j, lam in enumerate(lambdas) if lam in LINES["level"][2]]
                style["label"] = "both parts" if line == "learned_256" else text
                column[1].bar(at[shown] + where, np.array(mean)[shown], 0.27,
                              yerr=np.array(std)[shown], **style)
            if i < 4:
                column[0].errorbar(at + 0.06 * (i - 1.5), mean, std, marker="o", ms=10,
                                   **style | dict(label=text))
        for ax, shown in zip(column, (LAMBDAS, LINES["level"][2])):
            ax.set_xticks([LAMBDAS.index(lam) for lam in shown], [f"{lam:g}" for lam in shown])
            ax.set(xlabel="λ of the weight $r^λ$", ylim=(0, top), title=title)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
               title="the weight, or one part of it (learned ratio, batch 256)")
    return fig


def panels(students, columns):
    """Samples in the plane: (title, x (N, 2), target) in a grid."""
    height = math.ceil(len(students) / columns)
    fig, axes = pyplot().subplots(height, columns, squeeze=False, layout="constrained",
                                  figsize=(12, 12 * height / columns + 0.4 * height))
    for ax in axes.flat[len(students):]:
        ax.axis("off")
    for ax, (title, x, target) in zip(axes.flat, students):
        plane(ax, x, target)
        ax.set_title(title, fontsize=17)
    return fig


def students(rows, title):
    """-> (title(row, result), samples, target) of each row's first seed."""
    for row, by_seed in rows.items():
        done = by_seed[min(by_seed)]
        if (done.folder / "samples.npy").exists():
            x = np.load(done.folder / "samples.npy").astype(np.float32)
            yield title(row, done.result), x, TARGETS[done.result["config"]["target"]]


def modes_picture(rows):
    ring = TARGETS["ring8"]
    teacher = "the teacher", ring.sample(3000, torch.Generator().manual_seed(0)), ring
    return panels([teacher, *students(rows, lambda row, r: f"{label(row)}: {r['modes_covered']}")], 5)


def exercises_picture(rows):
    return panels(list(students(rows, lambda row, r: EXERCISES[row][0])), 4)


def curves(rows):
    """Runs on images: mean over seeds, a band of one standard deviation, against images seen."""
    logs = {row: [done.log for done in by_seed.values()] for row, by_seed in rows.items()}
    keys = [k for k in ("to_teacher", "to_data", "score", "precision", "recall", "log_r_std")
            if any(k in log[-1] for many in logs.values() for log in many)]
    height = math.ceil(len(keys) / 2)
    fig, axes = pyplot().subplots(height, 2, figsize=(12, 4.5 * height), squeeze=False,
                                  layout="constrained")
    for ax, key in zip(axes.flat, keys):
        for i, (row, many) in enumerate(logs.items()):
            series = [[(r["kimg"], r[key]) for r in log if key in r] for log in many]
            n = min(map(len, series))
            if n:
                x = [kimg for kimg, _ in series[0][:n]]
                mean, std = mean_std([[value for _, value in s[:n]] for s in series])
                colour = COLOUR.get(row, f"C{i}")
                ax.plot(x, mean, "o-", color=colour, label=label(row))
                ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.set(xlabel="generated images (thousands)", title=COLUMNS[key][0],
               yscale="log" if key in ("to_teacher", "to_data") else "linear")
    for ax in axes.flat[len(keys):]:
        ax.axis("off")
    axes.flat[0].legend()
    return fig


def dots(rows):
    """Each h on images, a dot a seed; and the same against the power of r that the weights had."""
    fig, (top, low) = pyplot().subplots(2, 1, figsize=(12, 12), layout="constrained")
    for i, (row, by_seed) in enumerate(rows.items()):
        key = "to_teacher" if values_of(rows, row, "to_teacher") else "to_data"
        style = dict(ls="", marker="o", ms=14, alpha=0.7, color=COLOUR.get(row, f"C{i}"))
        values = values_of(rows, row, key)
        top.plot([i] * len(values), values, **style)
        top.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color=style["color"])
        lam = power(next(iter(by_seed.values())).result["config"])
        if lam is not None:
            tau = values_of(rows, row, "tau")
            low.plot(lam * np.array(tau), values, **style, label=label(row))
    top.set_xticks(range(len(rows)), [label(row).replace(" ", "\n") for row in rows])
    top.set_ylabel(f"distance {COLUMNS[key][0]}")
    low.set(xlabel="τλ, the power of r that weighed the samples", ylabel=top.get_ylabel())
    low.legend(ncols=2)
    return fig


PICTURES = {        # in figures/: its group, and what draws it
    "plane_lam.png": ("plane_lam", lambda_picture), "toy2d_modes.png": ("every_h", modes_picture),
    "exercises.png": ("exercises", exercises_picture), "images.png": ("images", curves),
    "images_every_h.png": ("images_every_h", dots), "f_distill.png": ("f_distill", curves),
    "paper_rates.png": ("paper_rates", curves), "paper_setting.png": ("paper_setting", curves),
    "paper_parts.png": ("paper_parts", curves), "paper_long.png": ("paper_long", curves),
    "paper.png": ("paper", curves),
}
COPIES = {          # pictures that a run draws itself
    "toy2d_kl.png": ("every_h", "kl", "picture.png"),
    "toy2d_sba_5.png": ("every_h", "sba_5", "picture.png"),
    "cifar_kl.png": ("images", "kl", "samples.png"),
    "cifar_sba_5.png": ("images", "sba_5", "samples.png"),
}


def draw(groups, figures):
    """Write every picture whose group, in name -> rows, has results."""
    bregman.plot(figures / "weights.png")
    for file, (name, picture) in PICTURES.items():
        if groups[name]:
            save_figure(picture(groups[name]), figures / file, dpi=100)
    for file, (name, row, source) in COPIES.items():
        done = groups[name].get(row, {}).get(0)
        if done and (done.folder / source).exists():
            with atomic(figures / file) as tmp:
                shutil.copyfile(done.folder / source, tmp)


def animate(rows, file):
    """The students of seed 0 on their way, KL beside SBA 5, from frames.npz."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    films = {}
    for row in ("kl", "sba_5"):
        shots = rows.get(row, {}).get(0)
        if not shots or not (shots.folder / "frames.npz").exists():
            raise FileNotFoundError(f"--gif: no frames of every_h's {row}: --run every_h makes them")
        films[label(row)] = dict(np.load(shots.folder / "frames.npz"))
    fig, axes = pyplot().subplots(1, 2, figsize=(9, 5), layout="constrained")

    def frame(i):
        for ax, (name, shots) in zip(axes, films.items()):
            i = min(i, len(shots["step"]) - 1)
            ax.clear()
            plane(ax, shots["x"][i].astype(np.float32), TARGETS["ring8"], size=12)
            ax.set_title(f"{name}, step {shots['step'][i]}")
    longest = max(len(shots["step"]) for shots in films.values())
    movie = FuncAnimation(fig, frame, frames=longest + 8)       # the last one stays a while
    with atomic(file) as tmp:
        movie.save(tmp, PillowWriter(fps=6), dpi=60)
    pyplot().close(fig)


def main(argv):
    parser = Parser(prog="experiments.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="*", choices=GROUPS, metavar="GROUP", default=None,
                        help=f"first run what is missing of these, or of all: {' '.join(GROUPS)}")
    parser.add("seeds", count, None, "runs of a row, at most (those of the group)")
    parser.add("jobs", count, 1 if torch.cuda.is_available() else os.cpu_count(),
               "runs at a time")
    parser.add_argument("--gif", action="store_true", help="also the animation, of every_h's runs")
    parser.add("results", path, None, "where runs are (results)")
    parser.add("figures", path, None, "where pictures go (figures)")
    args = parser.parse_args(argv)
    results, figures = ((given or HERE / name).resolve() for given, name in (
        (args.results, "results"), (args.figures, "figures")))
    status = 0
    if args.run is not None:
        names = args.run or [name for name, group in GROUPS.items() if not group.named]
        jobs = missing(runs_of(names, args.seeds or math.inf), results)
        status = run_all(jobs, results, args.jobs)
        if status > 1:
            return status
    found = finished(results)
    groups = {name: collect(name, found, results) for name in GROUPS}
    if not status and not any(groups.values()):
        raise FileNotFoundError(f"no results in {results}: --run makes them")
    draw(groups, figures)
    if args.gif:
        animate(groups["every_h"], figures / "toy2d.gif")
    print("mean ± standard deviation (over n - 1) of the seeds")
    for name, rows in groups.items():
        if rows:
            group = GROUPS[name]
            print(f"\n{name}: {group.title} ({group.script} {group.common})".replace(" )", ")"))
            print(f"\n{table(group, rows)}", end="")
    return status


if __name__ == "__main__":
    run_main(main)
