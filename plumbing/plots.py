"""The style of every picture, and those that a run draws."""
import math
from pathlib import Path

import torch

from data import sheet
from plumbing.files import atomic


def pyplot():
    """matplotlib's pyplot without a screen, in letters that the last row can read."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 17, "axes.titlesize": 18, "lines.linewidth": 3,
                         "axes.grid": True, "grid.alpha": 0.3})
    return plt


def save_figure(fig, path, dpi=75):
    """Write a figure to a file whose suffix says the format, and close it. Raises ValueError."""
    if not Path(path).suffix:
        raise ValueError(f"{path}: the suffix says a picture's format, and there is none (.png)")
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=dpi)
    pyplot().close(fig)


def curve(rows, own, name, path):
    """The distances against images seen, with the teacher's own as lines."""
    fig, ax = pyplot().subplots(figsize=(9, 6), layout="constrained")
    for key, label, colour in (("to_teacher", "teacher's samples", "#cb181d"),
                               ("to_data", "data", "#2171b5")):
        points = [(r["kimg"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            kimg, distance = zip(*points)
            ax.plot(kimg, distance, "o-", color=colour, label=f"to the {label}")
        if own.get(key):
            ax.axhline(own[key], color=colour, ls=":", lw=2)
    ax.set(xlabel="generated images (thousands)", ylabel=name, yscale="log")
    ax.legend(title="dotted: the teacher's own")
    save_figure(fig, path)


def side_by_side(images, path, classes=0):
    """title -> images uint8 (N, 3, H, W): their sheets beside each other; classes: see sheet."""
    fig, axes = pyplot().subplots(1, len(images), figsize=(6.5 * len(images), 7),
                                  layout="constrained")
    for ax, (title, x) in zip(axes, images.items()):
        ax.imshow(sheet(x, math.isqrt(len(x)), classes), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
        ax.grid(False)
    save_figure(fig, path, dpi=100)


def plane(ax, x, target, size=2):
    """Samples x (N, 2) over the density that they should have, exp(target.log_p)."""
    edge = torch.linspace(-1.6, 1.6, 200)
    grid = torch.cartesian_prod(edge, edge)
    density = target.log_p(grid, torch.zeros(len(grid), 1)).exp().sqrt().view(200, 200).T
    ax.imshow(density.numpy(), origin="lower", extent=(-1.6, 1.6, -1.6, 1.6), cmap="Blues")
    ax.scatter(x[:, 0], x[:, 1], s=size, color="#cb181d", alpha=0.5, linewidths=0)
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])
    ax.grid(False)


def plane_run(title, x, target, result, seen, weight, scatter, path):
    """One run in the plane: samples, the weight where training used it, log r against the truth,
    and the curves. seen: log r, (n,); weight(log_r): h''(r) r; scatter: sigma -> exact and learned
    log r, (n,) each, or nothing."""
    fig, axes = pyplot().subplots(2, 2, figsize=(13, 12), layout="constrained")
    ax, log_r = axes[0, 0], torch.linspace(-8, 8, 321)
    plane(ax, x, target)
    ax.set_title(f"{title}: {result['modes_covered']} of {result['modes']} modes, "
                 f"TV {result['mode_tv']:.3f}, {result['on_mode']:.0%} on a mode", fontsize=16)

    ax = axes[0, 1]
    ax.hist(seen.clamp(-8, 8).numpy(), 80, density=True, color="#bdbdbd")
    ax.set(xlabel="log r seen in training", ylabel="density", yscale="log",
           title="the weight, and where training used it")
    other = ax.twinx()
    other.plot(log_r, weight(log_r), color="#cb181d")
    other.set(yscale="log")
    other.set_ylabel("weight h''(r) r, log r clipped", color="#cb181d")
    other.grid(False)

    ax, colours = axes[1, 0], ("#2166ac", "#ff7f0e", "#1b7837")
    for colour, (sigma, (exact, learned)) in zip(colours, scatter.items()):
        ax.scatter(exact, learned, s=9, alpha=0.6, color=colour, label=f"sigma = {sigma:g}")
    ax.axline((0, 0), slope=1, color="black", lw=1)
    ax.set(xlim=(-4, 8), ylim=(-4, 8), xlabel="exact log r", ylabel="the classifier's log r",
           title="log r: nothing to compare")
    if scatter:
        ax.set_title(f"log r, off by {result['log_r_error']:.2f} (median of levels)")
        ax.legend(markerscale=3)

    ax, steps = axes[1, 1], [r["step"] for r in result["history"]]
    for key, label in (("mode_tv", "mode weights' TV"), ("on_mode", "share on a mode"),
                       ("ess", "effective sample size")):
        ax.plot(steps, [r[key] for r in result["history"]], label=label)
    ax.set(xlabel="step", ylim=(0, 1.02), title="on the way")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower right", ncols=3)
    save_figure(fig, path)
