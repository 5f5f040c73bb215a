"""The pictures of experiments.py, 12 inches wide: letters of 17 points stay legible at 900 pixels.

A row is a setting that was run with several seeds; rows are dictionaries, name -> something.
"""
import math

import numpy as np
import torch

from plumbing.files import atomic
from plumbing.plots import plane, pyplot

COLOUR = {"kl": "#000000", "sba_5": "#cb181d", "be": "#2166ac", "lr": "#1b7837"}
OTHER = "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f"


def label(row):
    """kl_gan -> KL gan"""
    first, *rest = row.split("_")
    return " ".join([first.upper(), *rest])


def mean_std(values):
    """Mean and standard deviation (over n - 1; 0 for one) along the first axis."""
    values = np.asarray(values, dtype=float)
    return values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0 * values[0]


def grid_of_axes(n, columns, height):
    """-> a figure and its first n axes; `height` is a row's, in inches."""
    rows = math.ceil(max(1, n) / columns)
    fig, axes = pyplot().subplots(rows, columns, figsize=(12, height * rows), squeeze=False,
                                  layout="constrained")
    for ax in axes.flat[n:]:
        ax.axis("off")
    return fig, axes.flat[:n]


def lambdas(rows, about, bars=False, more=0):
    """What runs gave against lambda, a panel for each of `about`, (key, title, upper limit), as
    lines or as bars, and `more` empty panels. rows: label -> (colour, line style, {lambda: {key: a
    value a seed}}). A bar of one standard deviation stands where there is more than one seed."""
    fig, (axes,) = pyplot().subplots(1, len(about) + more, figsize=(12, 6.5), squeeze=False,
                                     layout="constrained")
    rows = {text: row for text, row in rows.items() if row[2]}
    ticks = sorted({lam for *_, points in rows.values() for lam in points})
    for ax, (key, title, top) in zip(axes, about):
        for i, (text, (colour, line, points)) in enumerate(rows.items()):
            seeds = [len(p[key]) for p in points.values()]
            several = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else f"{seeds[0]}"
            aside, x = i - (len(rows) - 1) / 2, np.array([ticks.index(lam) for lam in points])
            mean, std = np.array([mean_std(p[key]) for p in points.values()]).T
            std[np.array(seeds) == 1] = np.nan
            style = dict(yerr=std, color=colour, capsize=6, label=f"{text} (seeds: {several})")
            if bars:
                ax.bar(x + 0.25 * aside, mean, 0.25, **style)
            else:
                ax.errorbar(x + 0.08 * aside, mean, marker="o", ms=11, ls=line, **style)
        ax.set_xticks(range(len(ticks)), [f"{lam:g}" for lam in ticks])
        ax.set(xlabel="λ of the weight $r^λ$", ylim=(0, top), title=title)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def divergence(ax, costs):
    """costs: lambda -> the divergence of eight modes over that of one."""
    ax.plot(range(len(costs)), list(costs.values()), "s-", color="black", ms=11)
    ax.axhline(1, color="#777777", ls="--")
    ax.set_xticks(range(len(costs)), [f"{lam:g}" for lam in costs])
    ax.set(yscale="log", xlabel="λ of the weight $r^λ$")
    ax.set_title("divergence of eight modes / of one")
    ax.text(0, 1e4, "above 1: one mode costs less", va="bottom")
    ax.text(len(costs) - 1, 0.02, "below 1: eight cost less", va="top", ha="right")


def panels(students, columns):
    """Samples in the plane, a panel each: (title, x (N, 2), the target)."""
    fig, axes = grid_of_axes(len(students), columns, 12 / columns + 0.4)
    for ax, (title, x, target) in zip(axes, students):
        plane(ax, x, target)
        ax.set_title(title, fontsize=17)
    return fig


def strip(weights, students):
    """What h does, in one row: the weight against log r, then the samples that it led to. weights:
    row -> its log weight, a function of log r; students: (title, x (N, 2), the target), a row's
    each."""
    fig, (axes,) = pyplot().subplots(1, 1 + len(students), figsize=(12, 4.1), squeeze=False,
                                     width_ratios=[1.25] + [1] * len(students),
                                     layout="constrained")
    log_r = torch.linspace(-2, 2, 201, dtype=torch.float64)
    axes[0].axvspan(0, 2, color="#f4e9e4")
    axes[0].text(1, 0.022, "q > p:\ntoo many\nsamples", ha="center", va="center", fontsize=17)
    for row, log_weight in weights.items():
        axes[0].plot(log_r, log_weight(log_r).exp(), color=COLOUR[row], lw=4, label=label(row))
    axes[0].set(yscale="log", ylim=(3e-3, 3e3), xlabel="log r = log q/p", title="weight h''(r) r")
    axes[0].legend(loc="upper left", fontsize=14)
    for (title, x, target), row, ax in zip(students, weights, axes[1:]):
        plane(ax, x, target)
        ax.set_title(title, fontsize=17, color=COLOUR[row])
    return fig


def curves(logs, titles, names={}):
    """Runs on images: mean over seeds, and a band of one standard deviation, against images seen.
    logs: row -> the rows of log.csv of each seed; titles: column -> title, of which those are drawn
    that some run has; names: row -> its name, if not its label."""
    from matplotlib.ticker import LogLocator
    titles = {k: title for k, title in titles.items()
              if any(k in log[-1] for seeds in logs.values() for log in seeds)}
    fig, axes = grid_of_axes(len(titles), 2, 4.5)
    for ax, (key, title) in zip(axes, titles.items()):
        for i, (row, seeds) in enumerate(logs.items()):
            series = [[(r["kimg"], r[key]) for r in log if key in r] for log in seeds]
            n = min(map(len, series))
            if n:
                x = [kimg for kimg, _ in series[0][:n]]
                mean, std = mean_std([[value for _, value in s[:n]] for s in series])
                colour = COLOUR.get(row, OTHER[i % 7])
                ax.plot(x, mean, "o-", color=colour, label=names.get(row, label(row)))
                ax.fill_between(x, mean - std, mean + std, color=colour, alpha=0.2, lw=0)
        ax.set(xlabel="generated images (thousands)", title=title)
        if key.startswith("to_"):
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter("")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center",
               ncols=2 if len(logs) == 4 else 3)
    return fig


def dots(rows, title):
    """A dot a seed, a bar their mean; below, the same against the power of r that weighed samples.
    rows: row -> (a value a seed, the power of each seed, or nothing for a weight that is none)."""
    fig, (top, low) = pyplot().subplots(2, 1, figsize=(12, 12), layout="constrained")
    for i, (row, (values, powers)) in enumerate(rows.items()):
        style = dict(color=COLOUR.get(row, OTHER[i % 7]), ls="", marker="o", ms=14, alpha=0.7)
        top.plot([i] * len(values), values, **style)
        top.plot([i - 0.3, i + 0.3], [np.mean(values)] * 2, color=style["color"])
        if powers:
            low.plot(powers, values, **style, label=label(row))
    top.set_xticks(range(len(rows)), [label(row).replace(" ", "\n") for row in rows])
    top.set_ylabel(title)
    low.set(xlabel="τλ, the power of r that weighed the samples", ylabel=title)
    if low.lines:
        low.legend(ncols=2)
    return fig


def teachers(learning, guided):
    """What training and guidance do to a teacher's samples. learning: rows of results/teacher's
    curve_compact.jsonl, guided: of its guidance.jsonl, one for each w."""
    fig, axes = pyplot().subplots(2, 2, figsize=(12, 10), layout="constrained")
    learning = sorted(learning, key=lambda r: r["seen"])
    guided = sorted(guided, key=lambda r: r["w"])
    seen, w = [r["seen"] / 1e6 for r in learning], [r["w"] for r in guided]
    for ax, key, title in zip(axes[0], ("fd_compact", "is_compact"), ("FD-compact", "IS-compact")):
        values = [r[key] for r in learning]
        ax.plot(seen, values, "o-", ms=11, color="#000000")
        for r, x, y in zip(learning, seen, values):
            if r["decayed"]:
                ax.plot(x, y, "*", ms=26, color="#cb181d", label="after the rate fell to 0")
        ax.set(xlabel="images seen (millions)", title=f"{title}, not guided")
    axes[0, 0].legend()
    axes[1, 0].plot(w, [r["fd"] for r in guided], "o-", ms=11, color="#000000")
    axes[1, 0].set(xlabel="w (1: not guided)", title="FD-compact, guided")
    recall, precision = ([r[key] for r in guided] for key in ("recall", "precision"))
    axes[1, 1].plot(recall, precision, "o-", ms=11, color="#000000")
    for at, x, y in zip(w, recall, precision):
        axes[1, 1].annotate(f"w = {at:g}", (x, y), (9, 9), textcoords="offset points")
    axes[1, 1].set(xlabel="recall", ylabel="precision", title="what guidance trades")
    axes[1, 1].margins(0.35)
    return fig


def animate(films, target, file):
    """Students on their way, side by side. films: title -> frames.npz, as a dictionary."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    fig, axes = pyplot().subplots(1, len(films), figsize=(9, 5), layout="constrained")

    def frame(i):
        for ax, (title, shots) in zip(axes, films.items()):
            j = min(i, len(shots["step"]) - 1)                  # the last one stays a while
            ax.clear()
            plane(ax, shots["x"][j].astype(np.float32), target, size=14)
            ax.set_title(f"{title}, step {shots['step'][j]}")
    movie = FuncAnimation(fig, frame, frames=8 + max(len(s["step"]) for s in films.values()))
    with atomic(file) as tmp:
        movie.save(tmp, PillowWriter(fps=6), dpi=90)
    pyplot().close(fig)
