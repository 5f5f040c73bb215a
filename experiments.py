"""Every run, table and picture: runs in results/, pictures in figures/, tables as Markdown.

    python experiments.py                               # draws and prints; trains nothing
    python experiments.py --run                         # first runs what results/ lacks: hours
    python experiments.py --run plane_lam images --seeds 1      # of these groups, with one seed
    python experiments.py --gif                         # also figures/toy2d.gif: KL beside SBA 5

A run is one call of toy2d.py or cifar_distill.py in a process of one thread. A run whose result is
there, in whichever group, is not made again. A run that was interrupted goes on. This is the only
command that writes into results/ and figures/ by default.
"""
from plumbing.run import run_main

import functools
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

import bregman
import cifar_distill
import toy2d
from plane import TARGETS
from plumbing.files import atomic
from plumbing.jobs import read, run_all
from plumbing.options import Parser, count, path
from plumbing.pictures import animate, curves, dots, label, lambdas, mean_std, panels
from plumbing.plots import save_figure

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
PAGE = {                # the page's runs: every lambda and LR, three ways
    f"{way}_{row}": f"{own} {options}".strip()
    for way, options in (("learned", ""), ("exact", "--ratio exact"), ("uneven", "--target uneven8"))
    for row, own in {"-1": "--h be", "-0.5": EVERY_H["sba_-0.5"], "0": "--h kl", "1": "--h ls",
                     "lr": "--h lr"}.items()
    | {f"{lam:g}": f"--h sba --lam {lam:g}" for lam in (0.5, 3, 5, 10)}.items()}
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
        for line, (_, options, several, _) in LINES.items() for lam in several}, PLANE, seeds=5),
    "page": Group("the page's runs", TOY, PAGE, PLANE, seeds=1),
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
    folder: str                 # GROUP/ROW_seedK, in that of the results
    row: str
    seed: int
    script: str
    options: str                # but the seed; "" for a run that is made by hand

    def config(self):
        return config_of(self.script, self.options) | {"seed": self.seed}

    def identity(self):
        return identity(self.script, self.config())

    def kimg(self):
        return self.config().get("kimg", 0)


def runs_of(names, most=math.inf):
    """All runs of these groups, `most` seeds of each row at most; those of one seed in a row."""
    runs = []
    for name in names:
        group = GROUPS[name]
        for seed in range(min(group.seeds, most)):
            for row, own in group.rows.items():
                options = own and f"{own} {group.common}"
                runs.append(Run(f"{name}/{row}_seed{seed}", row, seed, group.script, options))
    return runs


# ---------------------------------------------------------------------------- runs, and results

class Results:
    """The finished runs in a folder. What was made by hand counts for its own row alone."""

    def __init__(self, folder):
        self.folder, self.found = folder, {}            # identity -> [Done]
        for run in runs_of(GROUPS):
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
        rows = {row: {} for row in GROUPS[name].rows}
        for run in runs_of([name]):
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
            commands[out] = [sys.executable, run.script, *run.options.split(),
                             "--seed", str(run.seed), "--out", str(out), *again]
        return commands


# ------------------------------------------------------------------------------------- the tables

COLUMNS = {     # key of a result: the table's head, digits
    "modes_covered": ("modes", 1), "mode_tv": ("mode TV", 3), "on_mode": ("on a mode", 3),
    "log_r_error": ("log r error", 2), "ess": ("ESS", 2), "tau": ("tau", 2),
    "to_teacher": ("to the teacher's samples", 2), "to_data": ("to the data", 2),
    "less_kl": ("less KL's, same seed", 2), "precision": ("precision", 3), "recall": ("recall", 3),
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
    """-> (group, its table) of every group with results."""
    for name in GROUPS:
        rows = results.rows(name)
        if rows:
            yield name, table(GROUPS[name], rows)


# ----------------------------------------------------------------------------------- the pictures

def lambda_picture(rows):
    """Is it the divergence, the classifier or the batch that drops modes? Below, parts apart."""
    about = ("modes_covered", "modes kept, of 8", 8.6), ("mode_tv", "mode weights' TV", 1)

    def points(line, several):
        found = {lam: f"{line}_{lam:g}" for lam in several}
        return {lam: {key: values_of(rows, row, key) for key, *_ in about}
                for lam, row in found.items() if row in rows}
    lines = {text: (colour, points(line, several))
             for line, (text, options, several, colour) in LINES.items() if "part" not in options}
    bars = {"both" if line == "learned_256" else LINES[line][0]:
            (LINES[line][3], points(line, LINES["level"][2]))
            for line in ("learned_256", "level", "sample")}
    return lambdas(lines, bars, about)


def students(rows, title):
    """-> (title(row, result), samples, target) of each row's first seed."""
    for row, seeds in rows.items():
        done = seeds[min(seeds)]
        if (done.folder / "samples.npy").exists():
            x = np.load(done.folder / "samples.npy").astype(np.float32)
            yield title(row, done.result), x, TARGETS[done.result["config"]["target"]]


def modes_picture(rows):
    ring = TARGETS["ring8"]
    teacher = "the teacher", ring.sample(3000, torch.Generator().manual_seed(0)), ring
    shown = students(rows, lambda row, result: f"{label(row)}: {result['modes_covered']} of 8")
    return panels([teacher, *shown], 5)


def exercises_picture(rows):
    return panels(list(students(rows, lambda row, result: EXERCISES[row][0])), 4)


def curves_picture(rows):
    keys = ("to_teacher", "to_data", "score", "precision", "recall", "log_r_std")
    return curves({row: [done.log for done in seeds.values()] for row, seeds in rows.items()},
                  {key: "distance " * key.startswith("to_") + COLUMNS[key][0] for key in keys})


def dots_picture(rows):
    points = {}
    for row, seeds in rows.items():
        lam = power(seeds[min(seeds)].result["config"])
        powers = [] if lam is None else [lam * tau for tau in values_of(rows, row, "tau")]
        points[row] = values_of(rows, row, "to_teacher"), powers
    return dots(points, "distance to the teacher's samples")


PICTURES = {        # group -> file in figures/, what draws it; most groups on images have curves
    "plane_lam": ("plane_lam", lambda_picture), "every_h": ("toy2d_modes", modes_picture),
    "exercises": ("exercises", exercises_picture),
} | {name: (name, curves_picture) for name, group in GROUPS.items() if group.script == CIFAR}
PICTURES["images_every_h"] = "images_every_h", dots_picture
COPIES = {          # pictures that a run draws itself
    "toy2d_kl.png": ("every_h", "kl", "picture.png"),
    "toy2d_sba_5.png": ("every_h", "sba_5", "picture.png"),
    "cifar_kl.png": ("images", "kl", "samples.png"),
    "cifar_sba_5.png": ("images", "sba_5", "samples.png"),
}


def draw(results, figures):
    """Write every picture whose group has results."""
    bregman.plot(figures / "weights.png")
    for name, (file, picture) in PICTURES.items():
        rows = results.rows(name)
        if rows:
            save_figure(picture(rows), figures / f"{file}.png", dpi=100)
    for file, (name, row, source) in COPIES.items():
        done = results.rows(name).get(row, {}).get(0)
        if done and (done.folder / source).exists():
            with atomic(figures / file) as tmp:
                shutil.copyfile(done.folder / source, tmp)


def draw_gif(results, figures):
    """KL beside SBA 5, of seed 0."""
    films, rows = {}, results.rows("every_h")
    for row in ("kl", "sba_5"):
        done = rows.get(row, {}).get(0)
        if not done or not (done.folder / "frames.npz").exists():
            raise FileNotFoundError(f"--gif: no frames of {row}: --run every_h makes them")
        films[label(row)] = dict(np.load(done.folder / "frames.npz"))
    animate(films, TARGETS["ring8"], figures / "toy2d.gif")


def main(argv):
    parser = Parser(prog="experiments.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="*", choices=GROUPS, metavar="GROUP", default=None,
                        help=f"first run what is missing of these, or of all: {' '.join(GROUPS)}")
    parser.add("seeds", count, None, "at most so many runs of a row (as many as its group has)")
    parser.add("jobs", count, 1 if torch.cuda.is_available() else os.cpu_count(), "runs at a time")
    parser.add_argument("--gif", action="store_true", help="also figures/toy2d.gif, KL and SBA 5")
    parser.add("results", path, None, "where runs are (results)")
    parser.add("figures", path, None, "where pictures go (figures)")
    args = parser.parse_args(argv)
    folder, figures = args.results or HERE / "results", args.figures or HERE / "figures"
    results, status = Results(folder.resolve()), 0
    if args.run is not None:
        names = args.run or [name for name, group in GROUPS.items() if not group.named]
        runs = runs_of(names, args.seeds or math.inf)
        status = run_all(results.missing(runs), HERE, args.jobs)
        results = Results(folder.resolve())
    if status > 1 or (status and not results.found):
        return status
    if not results.found:
        raise FileNotFoundError(f"no results in {folder}: --run makes them")
    draw(results, figures)
    if args.gif:
        draw_gif(results, figures)
    print("mean ± standard deviation (over n - 1) of the seeds")
    for name, text in tables(results):
        group = GROUPS[name]
        command = f"{group.script} {group.common}".strip()
        print(f"\n{name}: {group.title}, by {command}\n\n{text}", end="")
    return status


if __name__ == "__main__":
    run_main(main)
