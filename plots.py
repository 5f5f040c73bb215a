"""The pictures made with matplotlib: what each one shows, and how it is drawn.

The pictures are 10 inches wide, with letters of 17 points, so that they can be read from the last
row of a lecture. Nothing here changes matplotlib's settings for the program that imports it: the
style holds while a picture is made, and a figure is made without pyplot, so that a notebook's own
pictures go on as before.

In the pictures of experiments.py a row is a setting that was run with several seeds. `rows` maps
its name to its runs, a dictionary each: "options", as on the command line; "seed"; "numbers", what
the tables show; "log", the rows of log.csv; and, where they were kept, "samples" (n, 2). A row's
name begins with that of its divergence, such as sba_5 in sba_5_gan, which gives its colour.
"""
import math
from collections import Counter

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import bregman
from data import sheet
from plane import TARGETS
from plumbing.loop import atomic
from plumbing.results import tempered, values

STYLE = {"font.size": 17, "axes.titlesize": 18, "lines.linewidth": 3, "axes.grid": True,
         "grid.alpha": 0.3}
style = matplotlib.rc_context(STYLE)            # the decorator of every function that draws

RED, GREY, TEAL, PINK, ORANGE = "#cb181d", "#777777", "#01665e", "#c51b7d", "#ff7f0e"
COLOUR = {      # of a divergence, the same in every picture
    "sba_10": "#67000d", "sba_5": RED, "sba_3": "#ef6548", "ls": "#e08214", "sba_0.5": "#d9b830",
    "kl": "#000000", "sba_-0.5": "#4393c3", "be": "#2166ac", "lr": "#1b7837", "srkl": "#8c6d31",
    "jeffreys": "#762a83", "hellinger": "#4393c3"}     # as SBA -1/2: both weights go as r^(-1/2)
WORDS = {       # the rest of a row's name -> what pictures say
    "gan": "adversarial loss", "level": "weight between levels", "sample": "weight within a level",
    "1e-5": "rate 1e-5", "3e-5": "rate 3e-5", "1e-4": "rate 1e-4", "3e-4": "rate 3e-4",
    "x1": "fake score's rate × 1", "x3": "fake score's rate × 3",
    "x10": "fake score's rate × 10", "x30": "fake score's rate × 30",
    "x3_fall": "rate × 3, falling", "fake3": "rate × 1, 3 updates"}
DASHES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (6, 2, 1, 2, 1, 2)), "v"),
          ((0, (1, 1)), "P")]       # what tells rows of one divergence apart


def figure(rows, columns, size, **more):
    """Return a figure of `size`, in inches, and its axes, (rows, columns)."""
    fig = Figure(figsize=size, layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **more)


def grid_of_axes(n, columns, height):
    """Return a figure 10 inches wide and its first n axes; `height` is a row's, in inches."""
    rows = math.ceil(max(1, n) / columns)
    fig, axes = figure(rows, columns, (10, height * rows))
    fig.get_layout_engine().set(h_pad=0.1)                      # between a legend and a title
    for ax in axes.flat[n:]:
        ax.axis("off")
    return fig, axes.flat[:n]


@style
def save_figure(fig, path, dpi=75):
    """Write a figure to a file whose suffix says the format."""
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=dpi)


def split(row):
    """Return a row's divergence, a key of COLOUR, and the rest of its name: "sba_5", "gan"."""
    h = next((h for h in COLOUR if f"{row}_".startswith(f"{h}_")), row)
    return h, row[len(h) + 1:]


def label(row):
    """Return a row's name as pictures write it: "KL, adversarial loss" for kl_gan."""
    h, rest = split(row)
    first, *lam = h.split("_")
    return " ".join([first.upper(), *lam]) + (f", {WORDS.get(rest, rest)}" if rest else "")


def option(run, flag, default):
    """Return the word after a flag in a run's options."""
    words = run["options"].split()
    return words[words.index(flag) + 1] if flag in words else default


def mean_std(numbers):
    """Return mean and standard deviation (over n - 1; 0 for one) along the first axis."""
    numbers = np.asarray(numbers, dtype=float)
    return numbers.mean(0), numbers.std(0, ddof=1) if len(numbers) > 1 else 0 * numbers[0]


# ------------------------------------------------------------------------------- Table 1's weights

CURVES = [  # label, name, lam; the label's log r, its height over the curve
    ("SBA 10", "sba", 10, 0.4, 1), ("SBA 5", "sba", 5, 1.13, 1), ("SBA 3", "sba", 3, 1.85, 1),
    ("LS, SBA 1", "ls", 1, 2.4, 1), ("KL, SBA 0", "kl", 1, -2.1, 1.4), ("LR, JS", "lr", 1, 0.85, 1),
    ("BE, fKL, SBA -1", "be", 1, -2, 0.5), ("softened rKL", "srkl", 1, -2.2, 0.5),
    ("Jeffreys", "jeffreys", 1, -0.85, 1.75), ("Hellinger", "hellinger", 1, 1.5, 0.55)]


@style
def weights():
    """h''(r) r against log r, one labelled curve for each row of Table 1."""
    log_r = torch.linspace(-3.2, 3.2, 641, dtype=torch.float64)
    fig, ((ax,),) = figure(1, 1, (10, 6.5))
    ax.axvspan(0, 3.2, color="#f4e9e4")
    for text, name, lam, at, above in CURVES:
        weight, colour = bregman.get(name, lam).weight, COLOUR[bregman.row_name(name, lam)]
        ax.plot(log_r, weight(log_r), color=colour)
        ax.text(at, above * weight(torch.tensor(float(at))), text, color=colour, weight="bold",
                ha="center", va="center", bbox=dict(fc="white", ec="none", alpha=0.8, pad=1))
    ax.text(-1.6, 320, "q < p: the student\nputs too little here", ha="center", va="center")
    ax.text(2.25, 0.006, "q > p: the student\nputs too much here", ha="center", va="center")
    ax.set(yscale="log", ylim=(2e-3, 1e3), xlim=(-3.2, 3.2), xlabel="log r = log q/p = -logit",
           ylabel="weight  h''(r) r")
    return fig


# -------------------------------------------------------------------------- what a run itself draws

@style
def curve(rows, own, name, path, against="the data"):
    """The distances of a run against images seen, with the teacher's own as dotted lines. rows: of
    log.csv; own: the teacher's distances; name: of the distance; against: the data's name."""
    fig, ((ax,),) = figure(1, 1, (9, 6))
    for key, to, colour in (("to_teacher", "the teacher's samples", PINK),
                            ("to_data", against, TEAL)):
        points = [(row["kimg"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            kimg, distance = zip(*points)
            ax.plot(kimg, distance, "o-", color=colour, label=f"to {to}")
        if own.get(key):
            ax.axhline(own[key], color=colour, ls=":", lw=2)
    ax.set(xlabel="generated images (thousands)", ylabel=name, yscale="log")
    ax.legend(title="dotted: the teacher's own")
    save_figure(fig, path)


@style
def side_by_side(images, path, classes=0, names=()):
    """Sheets of images beside each other. images: title -> uint8 (N, C, H, W); classes: of images
    that take turns, a row each (data.sheet); names: of the rows, written at the left."""
    sheets = {title: sheet(x, math.isqrt(len(x)), classes) for title, x in images.items()}
    height, width = next(iter(sheets.values())).shape[:2]
    wide = 6.5 * math.sqrt(width / height)                      # of equal area, in any shape
    fig, axes = figure(1, len(images), (len(images) * wide + 1.5 * bool(names),
                                        wide * height / width + 0.5))
    for ax, (title, picture) in zip(axes.flat, sheets.items()):
        ax.imshow(picture, interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
        ax.grid(False)
    if names:
        axes[0, 0].set_yticks((np.arange(len(names)) + 0.5) * (height + 1) / len(names) - 1, names)
        axes[0, 0].tick_params(length=0)
    save_figure(fig, path, dpi=100)


def plane(ax, x, target, size=2):
    """Samples x (n, 2) over the density that they should have, exp(target.log_p)."""
    edge = torch.linspace(-1.6, 1.6, 200)
    points = torch.cartesian_prod(edge, edge)                                   # (40000, 2)
    density = target.log_p(points, torch.zeros(len(points), 1)).exp().sqrt().view(200, 200).T
    ax.imshow(density.numpy(), origin="lower", extent=(-1.6, 1.6, -1.6, 1.6), cmap="Blues")
    ax.scatter(x[:, 0], x[:, 1], s=size, color=RED, alpha=0.5, linewidths=0)
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])
    ax.grid(False)


@style
def plane_run(row, x, target, result, seen, weight, scatter, path):
    """One run in the plane: samples, the weight where training used it, log r against the truth,
    and the curves. row: its divergence; seen: log r, (n,); weight(log_r): h''(r) r; scatter:
    sigma -> exact and learned log r, (n,) each, or nothing."""
    fig, axes = figure(2, 2, (10, 9.8))
    ax, log_r, colour = axes[0, 0], torch.linspace(-8, 8, 321), COLOUR.get(row, GREY)
    plane(ax, x, target)
    ax.set_title(f"{label(row)}: {result['modes_covered']} of {result['modes']} modes,\n"
                 f"{result['on_mode']:.0%} of samples on a mode")

    ax = axes[0, 1]
    ax.hist(seen.clamp(-8, 8).numpy(), 80, density=True, color="#bdbdbd")
    ax.set(xlabel="log r seen in training", ylabel="density", yscale="log",
           title="log r (grey), and\nthe weight that it had")
    other = ax.twinx()
    other.plot(log_r, weight(log_r), color=colour)
    other.set(yscale="log")
    other.set_ylabel("weight h''(r) r", color=colour)
    other.grid(False)

    ax = axes[1, 0]
    for colour, (sigma, (exact, learned)) in zip((PINK, GREY, TEAL), scatter.items()):
        ax.scatter(exact, learned, s=9, alpha=0.6, color=colour, label=f"σ = {sigma:g}")
    ax.axline((0, 0), slope=1, color="black", lw=1)
    ax.set(xlim=(-4, 8), ylim=(-4, 8), xlabel="exact log r", ylabel="the classifier's log r",
           title="no classifier")
    if scatter:
        ax.set_title(f"error of log r: {result['log_r_error']:.2f}\n(median of noise levels)")
        ax.legend(markerscale=4)

    ax, steps = axes[1, 1], [row["step"] for row in result["history"]]
    for key, text, colour, dashes in (("mode_tv", "mode TV", "#d94801", "-"),      # as the page has
                                      ("on_mode", "on a mode", "#08519c", "--"),
                                      ("ess", "ESS", "#222222", ":")):
        ax.plot(steps, [row[key] for row in result["history"]], color=colour, ls=dashes, label=text)
    ax.set(xlabel="step", ylim=(0, 1.02), title=f"training\n(mode TV {result['mode_tv']:.3f})")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    save_figure(fig, path, dpi=120)


# ------------------------------------------------------------------------------ runs in the plane

@style
def plane_lam(rows, costs):
    """Is it the divergence, the classifier or the batch that drops modes? The left panel has the
    modes kept against lambda, mean and standard deviation over seeds. The right one has costs:
    lambda -> the divergence of eight modes with bridges over that of one."""
    fig, (left, right) = grid_of_axes(2, 2, 6)
    lams = list(costs)
    for i, (line, text, colour, dashes) in enumerate((
            ("learned_256", "learned r, batch 256", PINK, "-"),
            ("learned_1024", "learned r, batch 1024", PINK, ":"),
            ("exact_256", "exact r, batch 256", TEAL, "-"),
            ("exact_1024", "exact r, batch 1024", TEAL, ":"))):
        of_line = {float(row.rpartition("_")[2]): mean_std(values(runs, "modes_covered"))
                   for row, runs in rows.items() if row.startswith(f"{line}_")}
        x = [lams.index(lam) + 0.08 * (i - 1.5) for lam in of_line]     # beside each other
        if x:
            mean, std = np.transpose(list(of_line.values()))
            left.errorbar(x, mean, std, marker="o", ms=11, ls=dashes, color=colour, capsize=6,
                          label=text)
    left.set(ylim=(0, 8.6), title="modes kept, of 8")
    right.plot(range(len(lams)), list(costs.values()), "s-", color="black", ms=11)
    right.axhline(1, color=GREY, ls="--")
    right.set(yscale="log", title="divergence of eight modes / of one")
    right.text(0, 1e4, "above 1: one mode costs less", va="bottom")
    right.text(len(lams) - 1, 0.02, "below 1: eight cost less", va="top", ha="right")
    for ax in (left, right):
        ax.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
        ax.set(xlabel="λ of the weight $r^λ$")
    fig.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


@style
def students(rows, names=None):
    """Samples of each row's first run, over the density that they should have. names: row -> title;
    without it the titles count modes of the ring, and the teacher's samples come first."""
    ring, panels = TARGETS["ring8"], []
    if names is None:
        panels.append(("the teacher", ring.sample(3000, torch.Generator().manual_seed(0)), ring))
    for row, (run, *_) in rows.items():
        if "samples" in run:
            title = names[row] if names else f"{label(row)}: {run['numbers']['modes_covered']} of 8"
            target = TARGETS[option(run, "--target", "ring8")]
            panels.append((title, run["samples"].astype(np.float32), target))
    fig, axes = grid_of_axes(len(panels), 4, 2.9)
    for ax, (title, x, target) in zip(axes, panels):
        plane(ax, x, target, size=4)
        ax.set_title(title, fontsize=16)
    return fig


@style
def ring(films, path):
    """Students on their way, as a GIF, the README's first picture: for each row its weight against
    log r, and below its samples, with a cross on each mode that is lost. films: row -> frames of
    toy2d.py on the ring, "step" (F,) and "x" (F, n, 2)."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    target, hs = TARGETS["ring8"], {"be": ("be",), "kl": ("kl",), "sba_5": ("sba", 5.0)}
    fig, (top, low) = figure(2, len(films), (9, 5.4), height_ratios=[1, 1.75])
    steps = next(iter(films.values()))["step"]                  # the same in all films
    log_r = torch.linspace(-2, 2, 201, dtype=torch.float64)
    for ax, row in zip(top, films):
        ax.axvspan(0, 2, color="#f4e9e4")
        ax.plot(log_r, bregman.get(*hs[row]).weight(log_r), color=COLOUR[row], lw=4)
        ax.set(yscale="log", ylim=(3e-3, 3e3), xticks=[-1, 1], yticks=[1e-2, 1, 1e2],
               xticklabels=["q < p", "q > p"], xlabel="log r")
        ax.set_title(label(row), color=COLOUR[row])
    top[0].set_ylabel("weight\nh''(r) r")

    def frame(i):
        j = min(i, len(steps) - 1)                              # the last one stays a while
        for ax, shots in zip(low, films.values()):
            x = torch.from_numpy(shots["x"][j].astype(np.float32))
            share = torch.bincount(torch.cdist(x, target.means).argmin(1), minlength=8) / len(x)
            lost = target.means[share <= target.weights / 4]    # plane.mode_statistics's rule
            ax.clear()
            plane(ax, x, target, size=14)
            ax.plot(lost[:, 0], lost[:, 1], "kx", ms=13, mew=4)
            ax.set_xlabel(f"{8 - len(lost)} of 8 modes")
        low[0].set_ylabel(f"step {steps[j]}")
    frame(-1)
    for _ in range(10):                         # until the layout has settled, which then stays
        fig.draw_without_rendering()
    fig.set_layout_engine("none")
    movie = FuncAnimation(fig, frame, frames=10 + len(steps))
    with atomic(path) as tmp:
        movie.save(tmp, PillowWriter(fps=5), dpi=90)


# --------------------------------------------------------------------------------- runs on images

TO = {                  # column of log.csv -> a panel's title
    "to_teacher": "distance to the teacher's samples", "to_data": "distance to the data"}
DISTANCES = TO | {"precision": "precision", "recall": "recall"}
UNTEMPERED = DISTANCES | {"log_r_std": "std of log r", "ess": "ESS of a batch"}
FAULTS = {      # the column that gives a fault away: its name, the faulty row, what to see
    "loss_score": ("loss of the fake score", "kl_stale", "stale fake score:\nthe loss rises"),
    "log_r": ("mean of log r", "sba_5_upside_down", "r upside down:\nlog r is below 0"),
    "variance": ("variance / teacher's", "kl_through", "no stop-gradient:\nvariance stays low"),
    "loss_class": ("loss of the classifier", "kl_fine", "small noise alone:\nthe loss falls to 0"),
    "ess": ("effective sample size", "sba_5_untempered", "not tempered:\nlow from the first"),
    "grad_g": ("gradient of G", "kl_fast", "rate too high:\nhigh at first")}


def series(seeds, key, since=0):
    """Return the thousands of images (n,), from `since` on, and mean and standard deviation over
    seeds (n,) of a column of their logs, until the shortest ends."""
    logs = [[(row["kimg"], row[key]) for row in run["log"] if key in row and row["kimg"] >= since]
            for run in seeds]
    n = min(map(len, logs))
    return [kimg for kimg, _ in logs[0][:n]], *mean_std([[v for _, v in log[:n]] for log in logs])


@style
def curves(rows, titles=DISTANCES, since=0):
    """Runs on images: mean over seeds, and a band of one standard deviation, against images seen. A
    divergence has its colour, and what else the rows differ in has a line and a shade of its own,
    or, where all rows are of one divergence, a colour that no divergence has.

    titles: column -> title, of which those are drawn that some run has; since: of so many thousand
    images."""
    titles = {key: title for key, title in titles.items()
              if any(key in run["log"][-1] for runs in rows.values() for run in runs)}
    rests = [rest for rest, _ in Counter(split(row)[1] for row in rows).most_common()]
    alone = len({split(row)[0] for row in rows}) == 1
    fig, axes = grid_of_axes(len(titles), 2, 4)
    for ax, (key, title) in zip(axes, titles.items()):
        for row, runs in rows.items():
            h, rest = split(row)
            i = rests.index(rest)
            colour, alpha = COLOUR.get(h, GREY), 0.85 ** i
            if alone:
                colour, alpha = matplotlib.colormaps["plasma"](0.9 * i / len(rows)), 1
            dashes, marker = DASHES[i % len(DASHES)]
            x, mean, std = series(runs, key, since)
            ax.plot(x, mean, color=colour, ls=dashes, marker=marker, ms=8, alpha=alpha,
                    label=label(row) + ", tempered" * tempered(runs))
            ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.set(xlabel="generated images (thousands)", title=title)
        if key.startswith("to_"):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center",
               ncols=3 if len(rows) == 3 else 2)
    return fig


@style
def health(rows):
    """Healthy runs, and in each panel the faulty one that its column gives away, others in grey."""
    fig, axes = grid_of_axes(len(FAULTS), 2, 4.2)
    for ax, (key, (name, faulty, title)) in zip(axes, FAULTS.items()):
        for row, (run,) in rows.items():
            h, rest = split(row)
            x, y, _ = series([run], key)
            if not rest:
                ax.plot(x, y, color=COLOUR[h], label=f"{label(row)}, healthy")
            elif row == faulty:
                ax.plot(x, y, color=COLOUR[h], ls="--", marker="s", ms=10,
                        label="with the fault in the title")
            else:
                ax.plot(x, y, color="#bbbbbb", lw=1.5, zorder=1, label="other faults")
        ax.set(xlabel="generated images (thousands)", ylabel=name, title=title)
    lines, texts = axes[0].get_legend_handles_labels()
    legend = dict(zip(texts, lines))                            # a text once
    fig.legend(legend.values(), legend.keys(), loc="outside upper center", ncols=2)
    return fig


def lam_of(run):
    """Return lambda of the weight r^lambda of a run, or None for a weight that is no power of r."""
    h = option(run, "--h", "kl")
    return float(option(run, "--lam", 5)) if h == "sba" else {"be": -1, "kl": 0, "ls": 1}.get(h)


@style
def distance_by_lam(rows):
    """The distance to the teacher's samples, a dot a seed, and a bar their mean; below, the same
    against the power of r that weighed the samples."""
    fig, ((top,), (low,)) = figure(2, 1, (10, 11))
    for i, (row, runs) in enumerate(rows.items()):
        lam, distance = lam_of(runs[0]), values(runs, "to_teacher")
        dots = dict(color=COLOUR.get(row, GREY), ls="", marker="o", ms=14, alpha=0.8)
        top.plot([i] * len(distance), distance, **dots)
        top.plot([i - 0.3, i + 0.3], [np.mean(distance)] * 2, color=dots["color"])
        if lam is not None:
            low.plot([lam * tau for tau in values(runs, "tau")], distance, label=label(row), **dots)
    title = "distance to the teacher's samples"
    top.set_xticks(range(len(rows)), [label(row).replace(" ", "\n") for row in rows])
    top.set(ylabel=title, title="a dot: a seed; a bar: their mean")
    low.set(xlabel="τλ, the power of r in the weight", ylabel=title)
    if low.lines:
        low.legend(ncols=2, markerscale=0.8)
    return fig
