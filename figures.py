"""The experiments: runs what is missing in results/, draws and tabulates what is there.

    python figures.py                   # figures/*.png, the README's tables: seconds, no training
    python figures.py --run             # first whatever results/ lacks: some 3 hours on two cores
    python figures.py --run --preset paper --seeds 1            # the paper's: FID, on a GPU

A run is one call of cifar_distill.py or toy2d.py with the options below, one per core (or one at a
time on a GPU). A run with a result.json is skipped, an interrupted one goes on.
"""
import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import toy2d
from data import Parser, atomic, positive, run_main

HERE = Path(__file__).parent
LONG = ("kl", "sba_5", "be", "sba_10")  # Figure 1 has the first two
LENGTH = {True: 16, False: 6}           # thousands of images for these, and for all the others
EVERY_H = {                             # the paper's Figures 1, 4 and 5; two rows have two names
    "kl": "--h kl", "sba_5": "--h sba --lam 5", "be": "--h sba --lam -1",
    "sba_10": "--h sba --lam 10", "lr": "--h lr", "ls": "--h sba --lam 1",
    "sba_3": "--h sba --lam 3", "sba_0.5": "--h sba --lam 0.5",
}
LABEL = {"be": "BE, SBA -1", "lr": "LR", "kl": "KL", "sba_0.5": "SBA 0.5", "ls": "LS, SBA 1",
         "sba_3": "SBA 3", "sba_5": "SBA 5", "sba_10": "SBA 10"}
COLOUR = {"kl": "#000000", "sba_0.5": "#fdae61", "ls": "#f16913", "sba_3": "#d7301f",
          "sba_5": "#cb181d", "sba_10": "#67000d", "be": "#2166ac", "lr": "#1b7837"}
PLAIN = {                               # weights as the paper has them: nothing holds them
    "sba_5_plain": "--h sba --lam 5 --norm batch --clip 10 --ess 0",
    "be_plain": "--h sba --lam -1 --norm batch --clip 10 --ess 0",
}
RATIO = {                               # how log r is learned, and how far it is believed
    "sba_5_head": "--h sba --lam 5 --head linear",
    "sba_5_high": "--h sba --lam 5 --class-min 0.2",
    "sba_5_low": "--h sba --lam 5 --class-max 0.5",
    "sba_5_clip": "--h sba --lam 5 --clip 1",
}
MATTERED = {
    "kl_dmd": "--h kl --w-t dmd", "kl_dmd_0.25": "--h kl --w-t dmd --t-min 0.25",
    "kl_dmd_0": "--h kl --w-t dmd --t-min 0", "kl_0": "--h kl --t-min 0",
}
PLANE_RATIO = {                         # the same in the plane, where log r is known
    "kl_head": "--h kl --head linear", "kl_mean": "--h kl --head mean",
    "kl_high": "--h kl --class-min 0.2", "kl_low": "--h kl --class-max 0.5",
    "sba_5_head": "--h sba --lam 5 --ess 0.95 --head linear",
    "sba_5_mean": "--h sba --lam 5 --ess 0.95 --head mean",
    "sba_5_high": "--h sba --lam 5 --ess 0.95 --class-min 0.2",
    "sba_5_low": "--h sba --lam 5 --ess 0.95 --class-max 0.5",
    "sba_5_clip": "--h sba --lam 5 --ess 0.95 --clip 1",
    "sba_5_exact": "--h sba --lam 5 --ess 0.95 --ratio exact",
}
PLANE_HELP = {                          # what keeps SBA 5 from dropping modes
    "sba_5": "--h sba --lam 5", "sba_5_clip_0.5": "--h sba --lam 5 --clip 0.5",
    "sba_5_clip_0.2": "--h sba --lam 5 --clip 0.2",
    "sba_5_two_stage": "--h sba --lam 5 --clip 0.2 --norm two-stage",
    "sba_5_near": "--h sba --lam 5 --clip 0.5 --sigma-init 0.3",
    "sba_5_coarse": "--h sba --lam 5 --clip 0.5 --sigma-min 0.1",
    "sba_5_slow": "--h sba --lam 5 --clip 0.5 --lr-g 3e-4",
    "sba_5_exact_clip": "--h sba --lam 5 --clip 0.5 --ratio exact",
    "sba_5_ess_0.5": "--h sba --lam 5 --ess 0.5", "sba_5_ess_0.9": "--h sba --lam 5 --ess 0.9",
    "sba_10_ess": "--h sba --lam 10 --ess 0.95",
}
PLANE_REST = {                          # other targets, the adversarial loss, a reward
    "kl_grid": "--h kl --target grid25", "be_grid": "--h be --target grid25",
    "kl_uneven": "--h kl --target uneven8", "be_uneven": "--h be --target uneven8",
    "kl_gan": "--h kl --gan 0.3", "kl_free": "--h kl --teacher-free",
    "kl_reward": "--h kl --reward linear",
}
EXERCISES = {                           # of exercises.md: title, options; "" is an edit of the code
    "exercise_lecam": ("1: h of Le Cam", ""),
    "exercise_swap": ("2: BE, r upside down", ""),
    "exercise_through": ("3: no stop-gradient", ""),
    "exercise_stale": ("4: stale fake score", "--h kl --lr-f 1e-4"),
    "exercise_clip_0": ("5: log r clipped to 0", "--h sba --lam 5 --clip 0"),
    "exercise_lam_20": ("6: lambda = 20", "--h sba --lam 20"),
    "sba_5_clip_0.5": ("7: learned ratio", "--h sba --lam 5 --clip 0.5"),
    "sba_5_exact_clip": ("7: exact ratio", "--h sba --lam 5 --clip 0.5 --ratio exact"),
    "kl_uneven": ("8: a rare mode, KL", "--h kl --target uneven8"),
    "be_uneven": ("8: a rare mode, BE", "--h be --target uneven8"),
    "exercise_fine": ("9: small noise alone", "--h kl --sigma-max 0.1"),
    "kl_free": ("10: no teacher", "--h kl --teacher-free"),
}
IMAGES = EVERY_H | PLAIN | RATIO | MATTERED
PLANE = PLANE_RATIO | PLANE_HELP | PLANE_REST | {k: v for k, (_, v) in EXERCISES.items()}


# ----------------------------------------------------------------------------------- the runs

def jobs(preset, seeds, out):
    """-> a list of (folder, command line, thousands of images or 0): the compact preset has every
    run of the experiments, the others every h alone."""
    found, compact = [], preset == "compact"
    for seed in range(seeds):
        for name, options in (IMAGES if compact else EVERY_H).items():
            folder = out / preset / f"{name}_seed{seed}"
            kimg = LENGTH[name in LONG] if compact else 0
            length = ["--kimg", str(kimg), "--eval-every", "2"] if compact else []
            found.append((folder, ["cifar_distill.py", "--preset", preset, *options.split(),
                                   *length, "--seed", str(seed), "--out", str(folder)], kimg))
        for name, options in (PLANE if compact else {}).items():
            if not options or name.startswith("exercise") and seed:
                continue
            folder = out / "plane" / f"{name}_seed{seed}"
            found.append((folder, ["toy2d.py", *options.split(), "--seed", str(seed),
                                   "--out", str(folder), "--figures", str(folder)], 0))
    return found


def finished(folder, kimg):
    """Whether a run's result is there, after that many thousand images at least."""
    path = folder / "result.json"
    return path.exists() and json.loads(path.read_text()).get("images", 0) >= 1e3 * kimg


def run(job):
    """Run one job, or go on with it, unless its result is there. -> whether it is now."""
    folder, command, kimg = job
    if finished(folder, kimg):
        return True
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "checkpoint.pt").exists():
        command = [*command, "--resume"]
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run([sys.executable, *command], cwd=HERE, stdout=log, stderr=log,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        last = (folder / "log.txt").read_text().replace("\r", "\n").strip().splitlines()[-1:]
        print(f"{folder} failed: {' '.join(last)}", file=sys.stderr)
    return code == 0


# --------------------------------------------------------------------------------- their results

def read(out, name):
    """-> the finished runs of that name under `out`: {seed: (result, rows of log.csv)}, where a
    run in the plane has no rows."""
    found = {}
    for path in sorted(out.glob(f"{name}_seed*/result.json")):
        rows = []
        if path.with_name("log.csv").exists():
            with open(path.with_name("log.csv")) as f:
                rows = [{k: float(v) for k, v in r.items() if v} for r in csv.DictReader(f)]
        found[int(path.parent.name.rpartition("_seed")[2])] = json.loads(path.read_text()), rows
    return found


def at(rows, kimg):
    """The row at that length: runs are compared after as many images."""
    return min(rows, key=lambda r: abs(r["kimg"] - kimg))


def exists(runs, key):
    """Whether any run has that column of log.csv."""
    return any(key in rows[-1] for by_seed in runs.values() for _, rows in by_seed.values())


def mean_std(values, digits=2):
    values = np.array(list(values), dtype=float)
    if len(values) < 2:
        return "".join(f"{v:.{digits}f}" for v in values)
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def shortest(runs, names):
    """The length that all runs of these names have reached, in thousands of images."""
    return min(rows[-1]["kimg"] for name in names for _, rows in runs[name].values())


def images_table(runs, names, kimg, key):
    """Runs on images after `kimg` thousand of them. The last column compares runs of one seed,
    which draw the same noise; ESS and tau (see Config.ess) are means over the last stretch."""
    base = {seed: at(rows, kimg)[key] for seed, (_, rows) in runs["kl"].items()}
    table = []
    for name in names:
        rows = {seed: at(rows, kimg) for seed, (_, rows) in runs[name].items()}
        if rows:
            table.append(
                [f"`{IMAGES[name]}`", len(rows)]
                + [mean_std(r[k] for r in rows.values() if k in r)
                   for k in ("to_teacher", "to_data", "score", "log_r_std", "ess", "tau")]
                + [mean_std(r[key] - base[seed] for seed, r in rows.items() if seed in base)])
    return markdown(["options", "seeds", "to the teacher's samples", "to the data", "score",
                     "std of log r", "ESS", "tau",
                     f"{key.replace('_', ' ')}, less KL's of the same seed"], table)


def plane_table(out, names):
    table = []
    for name in names:
        results = [result for result, _ in read(out / "plane", name).values()]
        if results:
            options = f"`{PLANE[name]}`" if PLANE[name] else EXERCISES[name][0]
            table.append([options, len(results)]
                         + [mean_std((r[k] for r in results), digits) for k, digits in (
                             ("modes_covered", 1), ("mode_tv", 3), ("on_mode", 3),
                             ("log_r_error", 2), ("ess", 2))])
    return markdown(["options", "seeds", "modes", "mode TV", "on a mode", "log r error", "ESS"],
                    table)


def tables(runs, out, key):
    """-> every table of the README that is made of results: (title, Markdown)."""
    long, short = shortest(runs, LONG), shortest(runs, EVERY_H)
    yield f"after {1e3 * long:,.0f} images", images_table(runs, LONG, long, key)
    for title, names in (("every h", EVERY_H), ("weights that nothing holds", PLAIN),
                         ("the density ratio", RATIO), ("what mattered", MATTERED)):
        yield f"after {1e3 * short:,.0f} images, {title}", images_table(runs, names, short, key)
    for title, names in (("the density ratio", PLANE_RATIO), ("what helps", PLANE_HELP),
                         ("the rest", PLANE_REST), ("the exercises", EXERCISES)):
        yield f"in the plane, {title}", plane_table(out, names)


# ----------------------------------------------------------------------------------- pictures

def pyplot():
    plt = toy2d.pyplot()
    plt.rcParams.update({"font.size": 17, "axes.titlesize": 18, "lines.linewidth": 3})
    return plt


def curves(ax, runs, names, key, title, upto):
    """Mean over seeds, and a band of one standard deviation, against images seen."""
    for name in names:
        series = [[(r["kimg"], r[key]) for r in rows if r["kimg"] <= upto and key in r]
                  for _, rows in runs[name].values()]
        series = [s for s in series if s]
        if not series:
            continue
        n = min(map(len, series))
        y = np.array([[v for _, v in s[:n]] for s in series])                   # (seeds, n)
        x = [kimg for kimg, _ in series[0][:n]]
        ax.plot(x, y.mean(0), "o-", color=COLOUR[name], label=LABEL[name])
        ax.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=COLOUR[name],
                        alpha=0.2, lw=0)
    ax.set(xlabel="generated images (thousands)", title=title)
    ax.grid(alpha=0.3)


def dots(ax, runs, names, key, title, kimg):
    """The h of `names` after `kimg` thousand images: a dot a seed, a bar their mean."""
    names = [n for n in LABEL if n in names]
    for i, name in enumerate(names):
        values = [at(rows, kimg)[key] for _, rows in runs[name].values()]
        ax.plot([i] * len(values), values, "o", ms=12, alpha=0.7, color=COLOUR[name])
        if values:
            ax.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color=COLOUR[name])
    ax.set(title=f"after {1e3 * kimg:,.0f} images", ylabel=title, xticks=range(len(names)))
    ax.set_xticklabels([LABEL[n].replace(", ", "\n").replace("SBA ", "SBA\n") for n in names],
                       fontsize=14)
    ax.grid(alpha=0.3)


def draw(runs, preset, key, distance, figures):
    """The paper's Figure 1; its Figures 4 and 5; and why they look as they do."""
    plt = pyplot()
    score = "IS" if distance == "FID" else "IS-compact"
    titles = {"to_teacher": f"{distance} to the teacher's samples",
              "to_data": f"{distance} to CIFAR-10", "score": score}
    long, short = shortest(runs, LONG), shortest(runs, EVERY_H)
    fig, axes = plt.subplots(1, 3, figsize=(19, 6), layout="constrained")
    for ax, what in zip(axes, titles):
        if exists(runs, what):                      # there may be no samples of the teacher
            curves(ax, runs, LONG[:3], what, titles[what], long)
            ax.set(yscale="linear" if what == "score" else "log", xlim=(0, None))
    axes[1].legend()
    save(fig, figures / f"{preset}_curves.png")

    fig, axes = plt.subplots(1, 3, figsize=(24, 7.5), layout="constrained",
                             width_ratios=(8, 5, 5))
    dots(axes[0], runs, EVERY_H, key, titles[key], short)
    for ax, what in zip(axes[1:], (key, "score")):
        dots(ax, runs, LONG, what, titles[what], long)
    save(fig, figures / f"{preset}_every_h.png")

    fig, ax = plt.subplots(figsize=(11, 7), layout="constrained")
    for name in LONG:
        for i, (result, rows) in enumerate(runs[name].values()):
            row = at(rows, long)
            power = 0 if name == "kl" else row["tau"] * result["config"]["lam"]
            ax.plot(power, row[key], "o", ms=15, alpha=0.7, color=COLOUR[name],
                    label=None if i else LABEL[name])
    ax.set(xlabel="tau lambda, the power of r that weighed the samples", ylabel=titles[key],
           title=f"after {1e3 * long:,.0f} images; a dot a seed")
    ax.grid(alpha=0.3)
    ax.legend()
    save(fig, figures / f"{preset}_power.png")


def exercises(out, figures):
    """The students of exercises.md, from the samples.npy beside each result."""
    plt = pyplot()
    found = {name: read(out / "plane", name) for name in EXERCISES}
    if not all(found.values()):
        return
    fig, axes = plt.subplots(2, 6, figsize=(23, 8.3), layout="constrained")
    for name, ax in zip(EXERCISES, axes.flat):
        x = np.load(out / "plane" / f"{name}_seed0" / "samples.npy").astype(np.float32)
        target = toy2d.TARGETS[found[name][0][0]["config"]["target"]]
        toy2d.draw_samples(ax, x, target, size=3)
        ax.set_title(EXERCISES[name][0], fontsize=22)
    save(fig, figures / "exercises.png")


def save(fig, path):
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=75)
    pyplot().close(fig)


def main(argv):
    parser = Parser(prog="figures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="first run what is missing")
    parser.add_argument("--preset", choices=("compact", "smoke", "paper"), default="compact")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--jobs", type=positive, help="runs at a time (cores; 1 on a GPU)",
                        default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--figures", type=Path, default=HERE / "figures")
    args = parser.parse_args(argv)
    results, figures = args.results.resolve(), args.figures.resolve()
    complete = True
    if args.run:
        with ThreadPoolExecutor(args.jobs) as pool:
            complete = all(list(pool.map(run, jobs(args.preset, args.seeds, results))))
    runs = {name: read(results / args.preset, name) for name in IMAGES}
    if not runs["kl"]:
        raise FileNotFoundError(f"no finished run kl_seed0 in {results}/{args.preset}: "
                                "--run makes it")
    first = runs["kl"][min(runs["kl"])][0]
    key = "to_teacher" if "to_teacher" in first["after"] else "to_data"
    figures.mkdir(parents=True, exist_ok=True)
    draw(runs, args.preset, key, first["distance"], figures)
    exercises(results, figures)
    print(f"{first['distance']}; mean ± standard deviation (over n) of the seeds")
    for title, table in tables(runs, results, key):
        print(f"\n{title}:\n\n{table}", end="")
    return 0 if complete else 1


if __name__ == "__main__":
    run_main(main)
