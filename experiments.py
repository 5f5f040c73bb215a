"""The runs of toy2d.py and cifar_distill.py, their tables and their pictures.

    python experiments.py                               # prints the tables, draws the pictures
    python experiments.py --run                         # makes the runs that are missing: hours
    python experiments.py --run plane_lam images        # of these groups
    python experiments.py --collect FOLDER              # keeps runs that were made elsewhere
    python experiments.py --gif --page                  # also figures/ring.gif, course/play.html
    python experiments.py --divergence                  # the table of results/divergence.txt

A run is one call of toy2d.py or cifar_distill.py in a process of one thread, in the folder
runs/GROUP/ROW_seedK. One that was interrupted goes on. A finished run is kept as a line of
results/plane.jsonl or results/images.jsonl, and what the pictures need of it in two .npz. Most of
the .txt records there name the command that printed them.
"""
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import bregman
import plane
import plots
from course.page import page
from plumbing.cli import count, parser, run_main
from plumbing.loop import atomic
from plumbing.results import Group, make, missing_runs, name, read, read_run, rows_of, table, write

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------- the groups

PLANE = ("modes_covered", "mode_tv", "on_mode", "log_r_error", "log_r_low", "ess")
QUALITY = ("precision", "recall", "is")
IMAGES = ("to_teacher", "less_kl", "to_data", *QUALITY)
TEMPERED, AS_IS = (*IMAGES, "tau"), (*IMAGES, "ess", "log_r_std")
INTERVALS = ("to_teacher", "interval", "to_data", "interval_data", *QUALITY, "ess", "log_r_std")

EVERY_H = {
    "be": "--h be", "sba_-0.5": "--h sba --lam -0.5", "kl": "--h kl", "lr": "--h lr",
    "sba_0.5": "--h sba --lam 0.5", "ls": "--h ls", "sba_3": "--h sba --lam 3",
    "sba_5": "--h sba --lam 5", "sba_10": "--h sba --lam 10",
}
TWO = {row: EVERY_H[row] for row in ("kl", "sba_5")}
THREE = TWO | {"be": EVERY_H["be"]}
LAMBDAS, PARTED = (-1, 0, 0.5, 1, 3, 5), (-1, 1, 5)
LINES = {       # is it the divergence, the classifier or the batch? line -> options, its lambdas
    "learned_256": ("", LAMBDAS), "learned_1024": ("--batch 1024", LAMBDAS),
    "exact_256": ("--ratio exact", LAMBDAS), "exact_1024": ("--ratio exact --batch 1024", (1, 5)),
    "level": ("--part level", PARTED), "sample": ("--part sample", PARTED),
}
WAYS = {"learned": "", "exact": "--ratio exact", "uneven": "--target uneven8"}      # the page's
PLANE_RATIO = {         # what a better log r does for tempered weights
    "sba_5": "--h sba --lam 5 --ess 0.95", "sba_5_clip": "--h sba --lam 5 --ess 0.95 --clip 1",
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
EXERCISES = {           # of course/exercises.md; a word without -- is an edit of the code
    "lecam": ("1: h of Le Cam", "lecam"), "swap": ("2: BE, r upside down", "swap"),
    "through": ("3: no stop-gradient", "through"),
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
KERNEL = {              # exercise 11: where log r comes from, and the scores
    "kl": ("learned", "--h kl"), "kl_exact": ("exact", "--h kl --ratio exact"),
    "drift_kl": ("KL, log r and scores from kernels", "drift_kl"),
    "sba_5": ("learned", "--h sba --lam 5"),
    "sba_5_exact": ("exact", "--h sba --lam 5 --ratio exact"),
    "sba_5_kernel": ("SBA 5, log r from kernels", "sba_5_kernel"),
    "drift_sba_5": ("SBA 5, log r and scores from kernels", "drift_sba_5"),
}
UPDATES = {             # exercise 12
    "stale": "--h kl --lr-f 1e-4", "stale_2": "--h kl --lr-f 1e-4 --fake-updates 2",
    "stale_5": "--h kl --lr-f 1e-4 --fake-updates 5", "rate_5": "--h kl --lr-f 5e-4",
    "kl": "--h kl", "kl_2": "--h kl --fake-updates 2", "sba_5": "--h sba --lam 5",
    "sba_5_2": "--h sba --lam 5 --fake-updates 2",
}
HEALTH = {              # "Is it working?": two healthy runs, and sick ones
    "kl": ("healthy KL", "--h kl"), "sba_5": ("healthy SBA 5", "--h sba --lam 5"),
    "kl_stale": ("stale fake score", "--h kl --lr-f 1e-6"),
    "sba_5_upside_down": ("SBA 5, r upside down", "upside_down"),
    "kl_through": ("KL, no stop-gradient", "through"),
    "kl_fine": ("small noise alone", "--h kl --t-min 0 --t-max 0.3"),
    "sba_5_untempered": ("SBA 5, not tempered", "--h sba --lam 5 --norm batch --ess 0"),
    "kl_fast": ("rate too high", "--h kl --lr-g 3e-3"),
}
UNCONDITIONAL = "--teacher pretrained/compact_teacher.pt"
CONDITIONAL = "--teacher pretrained/compact_teacher_cond.pt"
GAN = "1e-3"            # w_GAN on images
FOUR = THREE | {"kl_gan": f"--h kl --gan {GAN}"}
FIVE = THREE | {"lr": "--h lr", "ls": "--h sba --lam 1"}     # as LS was run: see read_run()
TRIED = {               # in place of the bare command's settings
    "kl": "--h kl", "fake2": "--h kl --fake-updates 2 --lr-f 2e-4",
    "batch16": "--h kl --batch 16", "batch16_decay2": "--h kl --batch 16 --decay-kimg 2",
    "batch16_rate": "--h kl --batch 16 --lr-g 1.4e-4 --lr-f 2.8e-4",
    "batch64": "--h kl --batch 64", "wait1": "--h kl --wait-kimg 1",
    "decay8": "--h kl --decay-kimg 8", "ema1": "--h kl --ema-kimg 1",
    "lr_g_3e-4": "--h kl --lr-g 3e-4",
}
F_DISTILL = {"lr": "--h lr", "be": "--h be",
             "lr_gan": f"--h lr --gan {GAN}", "be_gan": f"--h be --gan {GAN}"}
# Rates tried with KL. RATE is the lowest that halves the distance; all four do.
RATES = ("1e-5", "3e-5", "1e-4", "3e-4")
RATE = "1e-5"
SETTING = (f"{UNCONDITIONAL} --norm batch --ess 0 --clip 10 --w-t dmd --t-min 0 --p-mean -1.2 "
           "--p-std 1.2 --batch 64 --guide none --eval-n 5000 "
           "--teacher-samples runs/unguided.npz")       # 5,000 unguided ones, as features
PAPER = f"{SETTING} --decay-kimg 0 --eval-every 5 --data runs/unguided.zip"      # 50,000 others
RATED = f"{PAPER} --lr-g {RATE} --lr-f {RATE}"
REAL = f"{SETTING} --data runs/cifar10_jpeg.npz"
SETTLED = f"{REAL} --eval-every 2.5 --lr-g 3e-5 --lr-f 9e-5 --decay-kimg 10"
PARTS = {f"sba_5_{part}": f"--h sba --lam 5 --part {part}" for part in ("level", "sample")}
SETTLE = {              # rates of generator and fake score, and whether they fall
    "kl_x1": "--h kl --lr-g 1e-5 --lr-f 1e-5 --decay-kimg 0",
    "kl_x3": "--h kl --lr-g 1e-5 --lr-f 3e-5 --decay-kimg 0",
    "kl_x10": "--h kl --lr-g 1e-5 --lr-f 1e-4 --decay-kimg 0",
    "kl_x30": "--h kl --lr-g 1e-5 --lr-f 3e-4 --decay-kimg 0",
    "kl_fake3": "--h kl --lr-g 1e-5 --lr-f 1e-5 --decay-kimg 0 --fake-updates 3",
    "kl_x3_fall": "--h kl --lr-g 3e-5 --lr-f 9e-5 --decay-kimg 10",
}

TOY, CIFAR = "toy2d.py", "cifar_distill.py"
FILES = {TOY: "results/plane.jsonl", CIFAR: "results/images.jsonl"}
GROUPS = {
    "plane_lam": Group("the divergence, the classifier or the batch", TOY, {
        f"{line}_{lam:g}": f"--h sba --lam {lam:g} {options}".strip()
        for line, (options, several) in LINES.items() for lam in several}, PLANE),
    "page": Group("the interactive page's runs", TOY, {
        f"{way}_{row}": f"{options} {own}".strip()
        for way, own in WAYS.items() for row, options in EVERY_H.items()}, PLANE, seeds=1),
    "every_h": Group("every h on the ring", TOY, EVERY_H | {"srkl": "--h srkl"}, PLANE),
    "plane_ratio": Group("the ratio, with tempered weights", TOY, PLANE_RATIO, PLANE),
    "plane_help": Group("what helps SBA 5", TOY, PLANE_HELP, PLANE),
    "plane_rest": Group("other targets, losses and a reward", TOY, PLANE_REST, PLANE),
    "exercises": Group("the exercises", TOY, {k: v for k, (_, v) in EXERCISES.items()}, PLANE,
                       seeds=1, labels={k: v for k, (v, _) in EXERCISES.items()}),
    "kernel": Group("kernels in place of networks", TOY, {k: v for k, (_, v) in KERNEL.items()},
                    PLANE, labels={k: v for k, (v, _) in KERNEL.items()}),
    "fake_updates": Group("updates of the fake score for one", TOY, UPDATES, PLANE),
    "bare": Group("the conditional teacher, 16,000 images, weights tempered", CIFAR, FOUR, TEMPERED,
                  f"{CONDITIONAL} --kimg 16 --eval-every 2"),
    "bare_tried": Group("what else was tried", CIFAR, TRIED, TEMPERED,
                        f"{CONDITIONAL} --kimg 16 --eval-every 2"),
    "images": Group("16,000 images, weights tempered", CIFAR, FOUR, TEMPERED,
                    f"{UNCONDITIONAL} --kimg 16 --eval-every 2"),
    "images_every_h": Group("6,000 images, weights tempered", CIFAR, EVERY_H, TEMPERED,
                            f"{UNCONDITIONAL} --kimg 6 --eval-every 2"),
    "health": Group("is it working?", CIFAR, {k: v for k, (_, v) in HEALTH.items()}, TEMPERED,
                    f"{UNCONDITIONAL} --kimg 6 --eval-every 1", seeds=1,
                    labels={k: v for k, (v, _) in HEALTH.items()}),
    "f_distill": Group("f-distill's setting", CIFAR, F_DISTILL, AS_IS,
                       f"{CONDITIONAL} --kimg 16 --eval-every 2 --norm two-stage --ess 0 "
                       "--batch 64"),
    "paper_rates": Group("the rate of the paper's setting", CIFAR, {
        f"kl_{rate}": f"--h kl --lr-g {rate} --lr-f {rate}" for rate in RATES},
        AS_IS, f"{PAPER} --kimg 20", seeds=1),
    "paper_setting": Group("the paper's setting, nothing tempered", CIFAR, THREE, AS_IS,
                           f"{RATED} --kimg 50"),
    "paper_100": Group("the same, 100,000 images", CIFAR, TWO, AS_IS, f"{RATED} --kimg 100"),
    "paper_parts": Group("the same, a part of the weight", CIFAR, TWO | PARTS, AS_IS,
                         f"{RATED} --kimg 50", seeds=1),
    "settle": Group("which rates settle, real images for p", CIFAR, SETTLE,
                    ("to_teacher", "to_data", "range", *QUALITY, "log_r_std"),
                    f"{REAL} --eval-every 5 --kimg 50", seeds=2, named=True),
    "settle_10": Group("the fake score's rate ten times the generator's", CIFAR, THREE, AS_IS,
                       f"{REAL} --eval-every 5 --kimg 50 --lr-g 1e-5 --lr-f 1e-4 --decay-kimg 0",
                       seeds=2, named=True),
    "settled": Group("rates that settle, means of the last five measurements", CIFAR, FIVE,
                     INTERVALS, f"{SETTLED} --kimg 50", seeds=5, last=5, named=True),
    "settled_30": Group("the same, 30,000 images, also with parts of the weight", CIFAR,
                        FIVE | PARTS | {"sba_5_slow": "slow_classifier"}, INTERVALS,
                        f"{SETTLED} --kimg 30", last=5, named=True,
                        labels={"sba_5_slow": "SBA 5, slow classifier"}),
    "paper": Group("the paper's experiment", CIFAR, TWO, AS_IS, "--preset paper", seeds=1,
                   named=True),
}


# -------------------------------------------------------------------------- what is kept, and read

COPIES = {      # file in figures/ -> the run that draws it, by group and row, and its name there
    "toy2d_kl.png": ("every_h", "kl", "picture.png"),
    "toy2d_sba_5.png": ("every_h", "sba_5", "picture.png"),
    "cifar.png": ("bare", "kl", "samples.png"),
    "cifar_kl.png": ("images", "kl", "samples.png"),
    "cifar_sba_5.png": ("images", "sba_5", "samples.png"),
}


def name_of(group, row, seed=0):
    return name(GROUPS[group].script, GROUPS[group].options(row), seed)


def arrays(file):
    """Return the arrays of an .npz in results/, or nothing where there is none."""
    return dict(np.load(HERE / "results" / file)) if (HERE / "results" / file).exists() else {}


def read_all():
    """Return name -> run of all that results/ keeps."""
    return {key: run for file in FILES.values() for key, run in read(HERE / file).items()}


def collect(folder):
    """Keep the finished runs in folder/GROUP/ROW_seedK: a line each, and what pictures need. Of
    two runs of one name the longer stays. Returns how many runs were there."""
    runs, frames, samples, n = read_all(), arrays("page_frames.npz"), arrays("samples.npz"), 0
    framed = {name_of("page", row) for row in GROUPS["page"].rows}
    sampled = {name_of(group, row) for group in ("every_h", "exercises")
               for row in GROUPS[group].rows}
    for group, row, seed in ((g, r, k) for g in GROUPS for r in GROUPS[g].rows
                             for k in range(GROUPS[g].seeds)):
        place, key = folder / group / f"{row}_seed{seed}", name_of(group, row, seed)
        if not (place / "result.json").exists():
            continue
        run, n = read_run(place, GROUPS[group].script, GROUPS[group].options(row), seed), n + 1
        if key in runs and len(runs[key]["log"]) > len(run["log"]):
            continue
        runs[key] = run
        if key in framed:
            frames |= {f"{key} {k}": v for k, v in np.load(place / "frames.npz").items()}
        if key in sampled:
            samples[key] = np.load(place / "samples.npy")
        for picture, (its_group, its_row, source) in COPIES.items():
            if key == name_of(its_group, its_row):
                shutil.copyfile(place / source, HERE / "figures" / picture)
    for script, file in FILES.items():
        write({key: run for key, run in runs.items() if run["script"] == script}, HERE / file)
    for file, some in (("page_frames.npz", frames), ("samples.npz", samples)):
        with atomic(HERE / "results" / file) as tmp:
            np.savez_compressed(tmp, **some)
    return n


def all_rows():
    """Return group -> row -> runs, with "samples" (n, 2) where they were kept."""
    runs = read_all()
    for key, x in arrays("samples.npz").items():
        runs[key]["samples"] = x
    return {key: rows_of(runs, group) for key, group in GROUPS.items()}


# ----------------------------------------------------------------------------------- the pictures

def costs():
    """Return lambda -> D_h of eight modes with bridges / D_h of one mode."""
    lines = (HERE / "results/divergence.txt").read_text().splitlines()
    cells = [line.split("|")[1:-1] for line in lines if re.match(r"\| -?\d", line)]
    rows = [[float(cell.split("±")[0]) for cell in row] for row in cells]
    return {lam: eight / one for lam, _, eight, _, one in rows}


def untempered(rows):
    return plots.curves(rows, plots.UNTEMPERED)


PICTURES = {        # file in figures/ -> group, what draws it
    "toy2d_modes": ("every_h", plots.students),
    "plane_lam": ("plane_lam", lambda rows: plots.plane_lam(rows, costs())),
    "exercises": ("exercises", lambda rows: plots.students(rows, GROUPS["exercises"].labels)),
    "images": ("images", lambda rows: plots.curves(rows, since=4)),
    "images_every_h": ("images_every_h", plots.distance_by_lam), "health": ("health", plots.health),
    "f_distill": ("f_distill", lambda rows: plots.curves(rows, since=4)),
    "paper_rates": ("paper_rates", plots.curves), "paper_setting": ("paper_setting", untempered),
    "paper_100": ("paper_100", untempered), "paper_parts": ("paper_parts", untempered),
    "settle": ("settle", lambda rows: plots.curves(rows, plots.TO, since=10)),
    "settled": ("settled", untempered),
}


def draw(rows):
    """Write every picture whose group has runs, and those that need none."""
    figures = {file: picture(rows[group]) for file, (group, picture) in PICTURES.items()
               if rows[group]}
    figures["weights"] = plots.weights()
    for file, figure in figures.items():
        plots.save_figure(figure, HERE / f"figures/{file}.png", dpi=120)


def film(frames, row):
    """Return step, x and log_r of a row of the page, of seed 0."""
    return {k: frames[f"{name_of('page', row)} {k}"] for k in ("step", "x", "log_r")}


def draw_ring():
    """Write the README's animation of the ring."""
    frames = arrays("page_frames.npz")
    films = {row: film(frames, f"learned_{row}") for row in ("be", "kl", "sba_5")}
    plots.ring(films, HERE / "figures/ring.gif")


def write_page(rows):
    """Write the interactive page."""
    frames = arrays("page_frames.npz")
    runs = [(rows["page"][row][0], film(frames, row)) for row in GROUPS["page"].rows]
    with atomic(HERE / "course/play.html") as tmp:
        tmp.write_text(page(runs, plane.TARGETS), encoding="utf-8")


# ---------------------------------------------------------------------------------- the divergence

def divergence_table():
    """Print D_h of two students of the ring, KL's eight modes with bridges and exactly one mode,
    for h of several lambdas: which of them does the divergence itself prefer?"""
    from toy2d import mlp
    ring, student = plane.TARGETS["ring8"], torch.load(HERE / "fixtures/students.pt")["kl"]
    eight = mlp(2, 2, student["config"]["width"], torch.nn.LeakyReLU(0.1))
    eight.load_state_dict(student["weights"])
    levels = torch.logspace(math.log10(0.02), math.log10(2), 13)
    log_r = [[[plane.log_ratios(G, ring, sigma, 500, g) for sigma in levels.tolist()]
              for g in (torch.Generator().manual_seed(seed) for seed in range(3))]
             for G in (eight, lambda z: ring.means[0] + ring.std * z)]
    print("| lam | KL's eight modes, sigma = 0.02 | all levels | one mode, sigma = 0.02 "
          f"| all levels |\n|{'---|' * 5}")
    for lam in LAMBDAS:
        h, cells = bregman.get("sba", lam), []
        for draws in log_r:
            D = torch.tensor([[plane.divergence(h, at) for at in draw] for draw in draws])
            every = torch.trapezoid(levels * D, dim=1) / (len(levels) - 1)      # w(t) = sigma
            cells += [f"{x.mean():.2g} ± {x.std():.1g}" for x in (D[:, 0], every)]
        print(f"| {lam:g} | {' | '.join(cells)} |")
    print("\nD_h(r || 1) with log r clipped at +-5, by plane.log_q, from 500 samples of q and 500\n"
          "of p a level, mean and standard deviation of 3 draws. All levels: the log-uniform mean\n"
          "of sigma D_h, sigma from 0.02 to 2.")


def main(argv):
    p = parser("experiments.py", __doc__)
    p.add_argument("--run", nargs="*", choices=GROUPS, metavar="GROUP",
                   help=f"make what is missing of these groups, or of all: {' '.join(GROUPS)}")
    p.add_argument("--collect", type=Path, metavar="FOLDER",
                   help="keep the finished runs in FOLDER/GROUP/ROW_seedK")
    p.add_argument("--jobs", type=count, help="runs at a time (one for each core, or one on a GPU)",
                   default=1 if torch.cuda.is_available() else os.cpu_count())
    p.add_argument("--gif", action="store_true", help="also draw figures/ring.gif")
    p.add_argument("--page", action="store_true", help="also write course/play.html")
    p.add_argument("--divergence", action="store_true",
                   help="print the divergence of two students for each lambda, and no more")
    args = p.parse_args(argv)
    if args.divergence:
        return divergence_table()
    status = 0
    if args.run is not None:
        names = args.run or [k for k, group in GROUPS.items() if not group.named]
        status = make(missing_runs(read_all(), GROUPS, names, HERE / "runs"), HERE, args.jobs)
    if args.collect or args.run is not None:
        folder = args.collect or HERE / "runs"
        print(f"{collect(folder)} runs of {folder} are in results/", file=sys.stderr)
    if status > 1:
        return status
    rows = all_rows()
    draw(rows)
    if args.gif:
        draw_ring()
    if args.page:
        write_page(rows)
    print("mean ± standard deviation (over n - 1) of the seeds")
    for key, group in GROUPS.items():
        if rows[key]:
            command = f"{group.script} {group.common}".strip()
            print(f"\n{key}: {group.title}, by {command}\n\n{table(group, rows[key])}", end="")
    return status


if __name__ == "__main__":
    run_main(main)
