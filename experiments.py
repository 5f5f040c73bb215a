"""Every run, table and picture: runs in results/, pictures in figures/, tables as Markdown.

    python experiments.py                               # draws and prints; trains nothing
    python experiments.py --run                         # first runs what results/ lacks: hours
    python experiments.py --run plane_lam images --seeds 1      # of these groups, with one seed
    python experiments.py --gif                         # also figures/toy2d.gif: KL beside SBA 5
    python experiments.py --page                        # also figures/play.html, which plays

A run is one call of toy2d.py or cifar_distill.py in a process of one thread. A run whose result is
there, in whichever group, is not made again. A run that was interrupted goes on. This is the only
command that writes into results/ and figures/ by default.
"""
from plumbing.run import run_main

import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import bregman
import cifar_distill
import toy2d
from plane import TARGETS
from plumbing.files import atomic
from plumbing.jobs import run_all
from plumbing.options import Parser, count, path
from plumbing.page import page
from plumbing.pictures import (animate, curves, divergence, dots, label, lambdas, panels,
                               strip, teachers)
from plumbing.plots import save_figure
from plumbing.results import Results, Script, is_held, power, runs_of, tables, values_of

HERE = Path(__file__).parent


# ------------------------------------------------------------------------------------- the groups

TOY = Script("toy2d.py", toy2d.Config, toy2d.parse)
CIFAR = Script("cifar_distill.py", cifar_distill.Config, cifar_distill.parse)

PLANE = ("modes_covered", "mode_tv", "on_mode", "log_r_error", "log_r_low", "ess")
IMAGES = ("to_teacher", "less_kl", "to_data", "precision", "recall", "score")
HELD, UNHELD = (*IMAGES, "tau"), (*IMAGES, "ess", "log_r_std")


@dataclass(frozen=True)
class Group:
    """Runs of one table, in results/GROUP/ROW_seedK. rows is name -> options; "" is an edit of the
    code, whose run is made by hand."""
    title: str
    script: Script
    rows: dict
    columns: tuple                          # keys of plumbing.results.COLUMNS
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

SOME, PARTED = (-1, 0, 0.5, 1, 3, 5), (-1, 1, 5)        # lambdas
LINES = {       # is it the divergence, the classifier or the batch? line -> options, its lambdas
    "learned_256": ("", SOME), "learned_1024": ("--batch 1024", SOME),
    "exact_256": ("--ratio exact", SOME), "exact_1024": ("--ratio exact --batch 1024", (1, 5)),
    "level": ("--part level", PARTED), "sample": ("--part sample", PARTED),
}
BY_LAMBDA = {           # the page's runs: each lambda and LR, three ways
    "-1": "--h be", "-0.5": "--h sba --lam -0.5", "0": "--h kl", "0.5": "--h sba --lam 0.5",
    "1": "--h ls", "3": "--h sba --lam 3", "5": "--h sba --lam 5", "10": "--h sba --lam 10",
    "lr": "--h lr",
}
WAYS = {"learned": "", "exact": "--ratio exact", "uneven": "--target uneven8"}
PAGE = {f"{way}_{row}": f"{own} {options}".strip()
        for way, options in WAYS.items() for row, own in BY_LAMBDA.items()}
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
    "ls_coarse": "--h ls --sigma-min 0.15", "sba_5_coarse": "--h sba --lam 5 --sigma-min 0.15",
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

HEALTH = {              # "Is it working?": two healthy runs, and sick ones; "" is a broken line
    "kl": ("healthy KL", "--h kl"), "sba_5": ("healthy SBA 5", "--h sba --lam 5"),
    "stale": ("stale fake score", "--h kl --lr-f 1e-6"),
    "upside_down": ("SBA 5, r upside down", ""),
    "through": ("KL, no stop-gradient", ""),
    "fine": ("small noise alone", "--h kl --t-min 0 --t-max 0.3"),
    "untempered": ("SBA 5, not held", "--h sba --lam 5 --norm batch --ess 0"),
    "fast": ("rate too high", "--h kl --lr-g 3e-3"),
}
STEPS = {"kl": "--h kl", "kl_nfe_2": "--h kl --nfe 2", "kl_nfe_4": "--h kl --nfe 4"}  # evaluations
GAN = "1e-3"            # w_GAN on images
F_DISTILL = {"lr": "--h lr", "be": "--h be",
             "lr_gan": f"--h lr --gan {GAN}", "be_gan": f"--h be --gan {GAN}"}
RATES = ("1e-5", "3e-5", "1e-4", "3e-4")        # tried with KL: the lowest halves the distance,
RATE = "1e-5"           # so the paper's setting has it
DRAWN = "runs/unguided"         # .zip: 50,000 samples of the teacher that nothing guides, since a
#                                 guided score is no density's; .npz: another 5,000, as features
PAPER = ("--decay-kimg 0 --norm batch --ess 0 --clip 10 --w-t dmd --t-min 0 --p-mean -1.2 "
         f"--p-std 1.2 --batch 64 --guide none --data {DRAWN}.zip --bank {DRAWN}.npz "
         "--eval-every 5 --eval-n 5000")
RATED = f"{PAPER} --lr-g {RATE} --lr-f {RATE}"
PARTS = {f"sba_5_{part}": f"--h sba --lam 5 --part {part}" for part in ("level", "sample")}

GROUPS = {
    "plane_lam": Group("the divergence, the classifier or the batch", TOY, {
        f"{line}_{lam:g}": f"--h sba --lam {lam:g} {options}".strip()
        for line, (options, several) in LINES.items() for lam in several}, PLANE, seeds=5),
    "page": Group("the page's runs", TOY, PAGE, PLANE, seeds=1),
    "every_h": Group("every h on the ring", TOY, EVERY_H | {"srkl": "--h srkl"}, PLANE, seeds=5),
    "plane_ratio": Group("learning the ratio", TOY, PLANE_RATIO, PLANE),
    "plane_help": Group("what helps SBA 5", TOY, PLANE_HELP, PLANE),
    "plane_nfe": Group("students of more evaluations", TOY, STEPS, PLANE),
    "plane_rest": Group("other targets, losses and a reward", TOY, PLANE_REST, PLANE),
    "exercises": Group("the exercises", TOY, {k: v for k, (_, v) in EXERCISES.items()}, PLANE,
                       seeds=1, labels={k: v for k, (v, _) in EXERCISES.items()}),
    "images": Group("16,000 images, weights held", CIFAR,
                    THREE | {"kl_gan": f"--h kl --gan {GAN}"}, HELD,
                    "--kimg 16 --eval-every 2"),
    "images_every_h": Group("6,000 images, weights held", CIFAR, EVERY_H | STEPS, HELD,
                            "--kimg 6 --eval-every 2"),
    "health": Group("is it working?", CIFAR, {k: v for k, (_, v) in HEALTH.items()}, HELD,
                    "--kimg 6 --eval-every 1", seeds=1,
                    labels={k: v for k, (v, _) in HEALTH.items()}),
    "f_distill": Group("f-distill's setting", CIFAR, F_DISTILL, UNHELD,
                       "--kimg 16 --eval-every 2 --norm two-stage --ess 0 --batch 64 "
                       "--teacher pretrained/compact_teacher_cond.pt"),
    "paper_rates": Group("the rate of the paper's setting", CIFAR, {
        f"kl_{rate}": f"--h kl --lr-g {rate} --lr-f {rate}" for rate in RATES},
        UNHELD, f"{PAPER} --kimg 20", seeds=1),
    "paper_setting": Group("the paper's setting, nothing held", CIFAR, THREE, UNHELD,
                           f"{RATED} --kimg 50"),
    "paper_100": Group("the same, 100,000 images", CIFAR,
                       {k: EVERY_H[k] for k in ("kl", "sba_5")}, UNHELD,
                       f"{RATED} --kimg 100"),
    "paper_parts": Group("the same, a part of the weight", CIFAR, PARTS, UNHELD,
                         f"{RATED} --kimg 50", seeds=1),
    "paper_long": Group("the paper's setting, 500,000 images", CIFAR,
                        {k: EVERY_H[k] for k in ("kl", "sba_5")}, UNHELD,
                        f"{RATED} --kimg 500", seeds=2, named=True),
    "paper": Group("the paper's experiment", CIFAR, {k: EVERY_H[k] for k in ("kl", "sba_5")},
                   UNHELD, "--preset paper", seeds=1, named=True),
}


# ----------------------------------------------------------------------------------- the pictures

ABOUT = ("modes_covered", "modes kept, of 8", 8.6), ("mode_tv", "mode weights' TV", 1)


def of_lambda(rows, line):
    """lambda -> {key: a value a seed}, of the runs of one of LINES that have results."""
    found = {lam: f"{line}_{lam:g}" for lam in LINES[line][1]}
    return {lam: {key: values_of(rows, row, key) for key, *_ in ABOUT}
            for lam, row in found.items() if row in rows}


def costs():
    """lambda -> how many times one mode's divergence that of eight with bridges is, by plane.py."""
    lines = (HERE / "results/divergence.txt").read_text().splitlines()
    cells = [line.split("|")[1:-1] for line in lines if re.match(r"\| -?\d", line)]
    rows = [[float(cell.split("±")[0]) for cell in row] for row in cells]
    return {lam: eight / one for lam, _, eight, _, one in rows}


def lambda_picture(rows):
    """Is it the divergence, the classifier or the batch that drops modes?"""
    fig = lambdas({
        "learned r, batch 256": ("#cb181d", "-", of_lambda(rows, "learned_256")),
        "learned r, batch 1024": ("#cb181d", ":", of_lambda(rows, "learned_1024")),
        "exact r, batch 256": ("#2166ac", "-", of_lambda(rows, "exact_256")),
        "exact r, batch 1024": ("#2166ac", ":", of_lambda(rows, "exact_1024"))}, ABOUT[:1], more=1)
    divergence(fig.axes[1], costs())
    return fig


def parts_picture(rows):
    """Which part of the weight drops modes?"""
    both = {lam: p for lam, p in of_lambda(rows, "learned_256").items() if lam in PARTED}
    return lambdas({
        "the whole weight": ("#cb181d", "-", both),
        "between noise levels": ("#969696", "-", of_lambda(rows, "level")),
        "within a noise level": ("#238b45", "-", of_lambda(rows, "sample"))}, ABOUT, bars=True)


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
    return panels([teacher, *shown], 4)


def strip_picture(rows):
    """The README's first picture."""
    rows = {row: rows[row] for row in ("be", "kl", "sba_5") if row in rows}
    weights = {row: bregman.get(*hs).log_weight for row, hs in
               {"be": ("be",), "kl": ("kl",), "sba_5": ("sba", 5.0)}.items() if row in rows}
    def title(row, result):
        return f"{label(row)}: {result['modes_covered']} of 8 modes"
    shown = students(rows, title)
    return strip(weights, list(shown))


def exercises_picture(rows):
    return panels(list(students(rows, lambda row, result: EXERCISES[row][0])), 4)


CURVES = {              # column of log.csv -> a panel's title
    "to_teacher": "distance to the teacher's samples", "to_data": "distance to the data",
    "precision": "precision", "recall": "recall"}
VITAL = {               # and what a panel gives away
    "to_teacher": "distance to the teacher's samples", "variance": "variance, of the teacher's",
    "log_r": "mean of log r (below 0: upside down)", "ess": "effective sample size (low: not held)",
    "loss_score": "fake network's loss (rises: stale)",
    "loss_class": "classifier's loss (near 0: small noise)",
    "grad_g": "gradient of G (high at first: the rate)",
    "grad_f": "fake network's gradient (rises: stale)"}


def curves_picture(rows, titles=CURVES, names={}):
    names = names or {row: f"{label(row)}, held" for row in rows if is_held(rows, row)}
    return curves({row: [done.log for done in seeds.values()] for row, seeds in rows.items()},
                  titles, names)


def unheld_picture(rows):
    return curves_picture(rows, CURVES | {"log_r_std": "std of log r", "ess": "ESS of a batch"})


def health_picture(rows):
    return curves_picture(rows, VITAL, {row: name for row, (name, _) in HEALTH.items()})


def dots_picture(rows):
    points = {}
    for row, seeds in rows.items():
        lam = power(seeds[min(seeds)].result["config"])
        powers = [] if lam is None else [lam * tau for tau in values_of(rows, row, "tau")]
        points[row] = values_of(rows, row, "to_teacher"), powers
    return dots(points, "distance to the teacher's samples")


PICTURES = {        # file in figures/ -> group, what draws it; most groups on images have curves
    name: (name, curves_picture if group.columns == HELD else unheld_picture)
    for name, group in GROUPS.items() if group.script == CIFAR
} | {
    "strip": ("every_h", strip_picture), "toy2d_modes": ("every_h", modes_picture),
    "plane_lam": ("plane_lam", lambda_picture), "plane_parts": ("plane_lam", parts_picture),
    "exercises": ("exercises", exercises_picture),
    "images_every_h": ("images_every_h", dots_picture), "health": ("health", health_picture),
    "paper_rates": ("paper_rates", curves_picture),
}
COPIES = {          # pictures that a run draws itself
    "toy2d_kl.png": ("every_h", "kl", "picture.png"),
    "toy2d_sba_5.png": ("every_h", "sba_5", "picture.png"),
    "cifar_kl.png": ("images", "kl", "samples.png"),
    "cifar_sba_5.png": ("images", "sba_5", "samples.png"),
}


def draw(results, figures):
    """Write every picture whose group has results."""
    bregman.plot(figures / "weights.png")
    for file, (name, picture) in PICTURES.items():
        rows = results.rows(name)
        if rows:
            save_figure(picture(rows), figures / f"{file}.png", dpi=100)
    for file, (name, row, source) in COPIES.items():
        done = results.rows(name).get(row, {}).get(0)
        if done and (done.folder / source).exists():
            with atomic(figures / file) as tmp:
                shutil.copyfile(done.folder / source, tmp)


def draw_teachers(folder, figures):
    """The compact teacher's samples while it learned, and guided at noise levels 0.3 to 2."""
    if folder.exists():
        learning, tries = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                           for name in ("curve_compact.jsonl", "guidance.jsonl"))
        guided = [row for row in tries if row["tag"] == "final" and (
            row["weak"] == "none" or (row["low"], row["high"]) == (0.3, 2.0))]
        save_figure(teachers(learning, guided), figures / "teachers.png", dpi=100)


def filmed(results, group, names, option):
    """-> row -> Done, of seed 0, of the rows called `names`. Raises FileNotFoundError for one
    without frames."""
    rows = {row: seeds.get(0) for row, seeds in results.rows(group).items()}
    for row in names:
        if not rows.get(row) or not (rows[row].folder / "frames.npz").exists():
            raise FileNotFoundError(f"{option}: no frames of {row}: --run {group} makes them")
    return {row: rows[row] for row in names}


def draw_gif(results, figures):
    """KL beside SBA 5, of seed 0."""
    done = filmed(results, "every_h", ("kl", "sba_5"), "--gif")
    films = {label(row): dict(np.load(run.folder / "frames.npz")) for row, run in done.items()}
    animate(films, TARGETS["ring8"], figures / "toy2d.gif")


def draw_page(results, figures):
    """The page that plays, of seed 0."""
    text = page(filmed(results, "page", PAGE, "--page").values(), TARGETS)
    with atomic(figures / "play.html") as tmp:
        tmp.write_text(text, encoding="utf-8")


def main(argv):
    parser = Parser(prog="experiments.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="*", choices=GROUPS, metavar="GROUP", default=None,
                        help=f"first run what is missing of these, or of all: {' '.join(GROUPS)}")
    parser.add("seeds", count, None, "at most so many runs of a row (as many as its group has)")
    parser.add("jobs", count, 1 if torch.cuda.is_available() else os.cpu_count(), "runs at a time")
    parser.add_argument("--gif", action="store_true", help="also figures/toy2d.gif, KL and SBA 5")
    parser.add_argument("--page", action="store_true", help="also figures/play.html")
    parser.add("results", path, None, "where runs are (results)")
    parser.add("figures", path, None, "where pictures go (figures)")
    args = parser.parse_args(argv)
    folder, figures = args.results or HERE / "results", args.figures or HERE / "figures"
    results, status = Results(folder.resolve(), GROUPS), 0
    if args.run is not None:
        names = args.run or [name for name, group in GROUPS.items() if not group.named]
        runs = runs_of(GROUPS, names, args.seeds or math.inf)
        status = run_all(results.missing(runs), HERE, args.jobs)
        results = Results(folder.resolve(), GROUPS)
    if status > 1 or (status and not results.found):
        return status
    if not results.found:
        raise FileNotFoundError(f"no results in {folder}: --run makes them")
    draw(results, figures)
    draw_teachers(folder / "teacher", figures)
    if args.gif:
        draw_gif(results, figures)
    if args.page:
        draw_page(results, figures)
    print("mean ± standard deviation (over n - 1) of the seeds")
    for name, text in tables(results):
        group = GROUPS[name]
        command = f"{group.script.file} {group.common}".strip()
        print(f"\n{name}: {group.title}, by {command}\n\n{text}", end="")
    return status


if __name__ == "__main__":
    run_main(main)
