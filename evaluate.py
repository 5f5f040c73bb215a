"""Is it working? What a run's samples are like, while it runs and when it ends.

Each evaluation draws samples from the averaged generator, measures how far they are from the
teacher's samples and from the data, writes a grid and curve.png, prints a row, and warns of a run
that has gone wrong. The columns of log.csv are explained in results.md.
"""
import json
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import fid
from data import load_images, save_grid
from edm import beside, sample
from plots import curve, side_by_side
from plumbing.loop import atomic, save, world

# The bounds lie between the healthy and the sick runs of results.md; a network much larger than
# these may need others.
STALE, WRONG_SIGN, LOW_ESS, DRIFT, VARIETY, WORSE = 0.6, -0.05, 0.1, 1.5, 0.7, 1.3

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
                   "truck")

PRINTED = {             # column of log.csv -> its head on the console, and how it is written
    "kimg": ("kimg", ".4g"), "to_teacher": ("to teacher", ".4g"), "to_data": ("to data", ".4g"),
    "recall": ("recall", ".3f"), "ess": ("ESS", ".2f"), "loss_score": ("fake loss", ".3f"),
    "minutes": ("minutes", ".1f"),
}


def warning(rows):
    """Return the one warning that fits the last row best, or "" for a healthy run.

    rows: those of log.csv, dictionaries; they count once the generator moves.
    """
    moved = [row for row in rows if "ess" in row]
    if not moved:
        return ""
    row, start, variance = moved[-1], rows[0]["to_data"], max(row["variance"] for row in moved)
    distances = [row["to_data"] for row in moved]
    best, worst = min(distances), max(distances)
    if row["loss_score"] > STALE:           # healthy: about the teacher's own loss on images
        return (f"the fake score's loss is {row['loss_score']:.1f}: it does not follow the "
                "student; try a higher --lr-f or a lower --lr-g")
    if row["log_r"] < WRONG_SIGN:           # its mean under q is KL(q || p), which is not below 0
        return (f"the mean of log r is {row['log_r']:.2f}, and no ratio q/p has one below 0: r is "
                "upside down, or the classifier does not learn")
    drifts = row["log_r"] > DRIFT
    if row["ess"] < (0.5 if drifts else LOW_ESS):
        return (f"the effective sample size is {row['ess']:.0%} of the batch: few samples make the "
                "update; try --ess 0.9 or a smaller --lam")
    if drifts:
        return (f"the mean of log r is {row['log_r']:.1f}: the classifier tells the student's "
                "samples from the teacher's; try a higher --t-max or a lower --lr-g, and in a loop "
                "of your own detach x_t")
    if worst > start and row["to_data"] > start / 2:
        return (f"the student went farther from the data than it began, to {worst:.3g} from "
                f"{start:.3g}: try a lower --lr-g")
    if row["variance"] < VARIETY * variance:
        return (f"the samples lose variety: their variance fell from {variance:.2f} to "
                f"{row['variance']:.2f} of the reference's; try a lower --lr-g or --h be")
    if row["to_data"] > WORSE * best:
        return (f"the distance rises, from {best:.3g} to {row['to_data']:.3g}: try a lower --lr-g "
                "or a higher --t-min")
    return ""


def usual_guidance(cfg):
    """Return whether the teacher is guided as it was for the samples beside its weights."""
    default, names = type(cfg), ("guidance", "guide_low", "guide_high")     # its fields' defaults
    guide = beside(cfg.teacher, cfg.guide, "_young.pt")
    young = beside(cfg.teacher, "own", "_young.pt")
    if (guide and Path(guide).resolve()) != (young and Path(young).resolve()):
        return False
    # without a guide its numbers say nothing
    return not young or all(getattr(cfg, k) == getattr(default, k) for k in names)


def teacher_samples(cfg):
    """Return the file of other samples of the teacher to compare with, or None. Those beside its
    weights serve only for the guidance and the resize with which they were made."""
    found = beside(cfg.teacher, cfg.teacher_samples, f"_{cfg.features}.npz")
    if found and cfg.teacher_samples == "own":
        stored, how = fid.load(found), cfg.resize or "clean"            # None where it has images
        if not usual_guidance(cfg) or stored and stored.resize not in (None, how):
            print(f"{found} was made with another guidance or resize than these options, so "
                  "nothing is compared with it; --teacher-samples names others", file=sys.stderr)
            return None
    return found


class Evaluator:
    """Measures the samples of a Distiller's average against the data and, where there are any,
    against other samples of its teacher. source: what the Distiller's real images were read from.
    seconds: of the run before it was resumed.
    """

    def __init__(self, cfg, out, distiller, source, seconds=0.0):
        self.cfg, self.out, self.d, self.start = cfg, out, distiller, time.monotonic() - seconds
        self.printed, self.resize = False, cfg.resize or "clean"
        self.net = fid.load_net(cfg.features).to(cfg.device)
        self.name, record = fid.NAMES[cfg.features][0], distiller.teacher.record
        reference = cfg.reference
        if reference == "own":
            reference = record.get("data", "cifar10") if cfg.data == "own" else cfg.data
        self.against = Path(reference).stem             # what "to the data" means in this run
        if reference == source != "cifar10":            # then they are read already
            images = distiller.images
        elif reference == record.get("data") != "cifar10":
            images, _ = load_images(reference, size=record.get("size"))
        else:
            images = fid.find(reference, self.net, how=cfg.resize)
        self.data = fid.measure(images, self.net, self.resize)
        self.teacher = None
        if samples := teacher_samples(cfg):
            found = fid.find(samples, self.net, how=cfg.resize)
            self.teacher = fid.measure(found, self.net, self.resize)
        self.floor = self.teachers_own()
        print(textwrap.fill(self.about(), 80), file=sys.stderr)

    def about(self):
        """Return the line that says what is measured against what, and on what it computes."""
        cfg = self.cfg
        data, teacher = (m and (f"{m.n:,} images" if m.n else "stored statistics")
                         for m in (self.data, self.teacher))
        parameters = sum(p.numel() for p in self.d.G.parameters()) / 1e6
        threads = f", {torch.get_num_threads()} threads" if cfg.device == "cpu" else ""
        view = ""
        if cfg.features == "compact" and self.d.images.shape[1:] != (3, 32, 32):
            view = ", a CIFAR-10 classifier's view at 32 x 32 pixels"
        return (f"{self.name} ({self.resize} resize{view}) of {cfg.eval_n:,} samples to "
                f"{self.against} ({data})"
                + (f" and to the teacher's samples ({teacher})" if teacher else "")
                + f"; networks of {parameters:.3g} M parameters on {cfg.device}{threads}")

    def row(self, rows):
        """Return the row of log.csv that comes after `rows`; write a grid and curve.png."""
        cfg, d = self.cfg, self.d
        images = sample(d.ema, cfg.eval_n, sigma_init=cfg.sigma_init,
                        progress=f"drawing {cfg.eval_n:,} samples to measure")
        row = self.compare(fid.measure(images, self.net, self.resize))
        save_grid(images[:cfg.preview], self.out / f"grid_{d.seen:09}.png",
                  classes=d.teacher.label_dim)
        curve(rows + [row | {"kimg": d.seen / 1e3}], self.floor,
              f"{self.name}, {self.resize} resize", self.out / "curve.png", self.against)
        row |= d.averages()
        self.print_row(row)
        if said := warning(rows + [row]):
            tqdm.write(f"after {d.seen} images: {said}", file=sys.stderr)
        return row

    def compare(self, a):
        """Return the distances of a measured set, how much of the first is its bias, and its
        variety beside the teacher's samples or, where there are none, beside the data."""
        reference = self.teacher or self.data
        row = {"to_data": fid.frechet(a.mu, a.sigma, self.data.mu, self.data.sigma),
               "variance": (a.sigma.trace() / reference.sigma.trace()).item()}
        if self.teacher:
            row["to_teacher"] = fid.frechet(a.mu, a.sigma, self.teacher.mu, self.teacher.sigma)
        bias = fid.bias(a, reference)
        if bias is not None:
            row["bias"] = bias
        return row | (fid.variety(a, reference) or {}) | {"is": a.score[0]}

    def print_row(self, row):
        """Print a row of the log as people read it, below its heads if it is the first."""
        minutes = (time.monotonic() - self.start) / 60
        row = {"kimg": self.d.seen / 1e3, "minutes": minutes} | row
        heads = {k: head.replace("data", self.against) for k, (head, _) in PRINTED.items()}
        widths = {k: max(len(heads[k]), 7) for k in PRINTED if k != "to_teacher" or self.teacher}
        if not self.printed:
            tqdm.write("  ".join(f"{heads[k]:>{n}}" for k, n in widths.items()))
        self.printed = True
        tqdm.write("  ".join(f"{format(row[k], PRINTED[k][1]) if k in row else '':>{n}}"
                             for k, n in widths.items()))

    def teachers_own(self):
        """Return the distances of the teacher's samples, which a student can hardly go below: to
        the data, and of one half to the other."""
        if not self.teacher or self.teacher.features is None:       # statistics have no halves
            return {}
        half, other = fid.shuffled(self.teacher.features).tensor_split(2)
        to_data = fid.frechet(self.teacher.mu, self.teacher.sigma, self.data.mu, self.data.sigma)
        return {"to_data": to_data,
                "to_teacher": fid.frechet(*fid.stats(half), *fid.stats(other))}

    def finish(self, rows):
        """Write student.pt, samples.png and result.json, and print what the run came to."""
        cfg, d, n, classes = self.cfg, self.d, self.cfg.preview, self.d.teacher.label_dim
        first, last = rows[0], rows[-1]
        key = "to_teacher" if self.teacher else "to_data"
        save({"config": asdict(cfg), "record": d.teacher.record, "seen": d.seen,
              "ema": d.ema.state_dict()}, self.out / "student.pt")
        sample(d.teacher, n, steps=1)                               # warm before it is timed
        teachers, slow = timed(lambda: sample(d.teacher, n))
        # of the student 8 times as many: n take too little time to measure
        students, fast = timed(lambda: sample(d.ema, 8 * n, sigma_init=cfg.sigma_init))
        slow, fast = slow / n, fast / (8 * n)
        guided = ", guided" if hasattr(d.teacher, "good") else ""
        # fewer pictures than classes are not laid out in rows, beside which names could stand
        named = self.against == "cifar10" and classes == 10 and n >= 10
        side_by_side({f"teacher: 35 evaluations{guided}": teachers,
                      "student: 1 evaluation, same noise": students[:n]},
                     self.out / "samples.png", classes, CIFAR10_CLASSES if named else ())
        result = {"distance": self.name, "resize": self.resize, "reference": self.against,
                  "n": [cfg.eval_n, self.data.n, self.teacher and self.teacher.n],
                  "before": first, "after": last, "teacher": self.floor, "images": d.seen,
                  "seconds": last["seconds"], "seconds_per_image": fast,
                  "teacher_seconds_per_image": slow, "torch": torch.__version__,
                  "threads": torch.get_num_threads(), "processes": world(), "config": asdict(cfg)}
        with atomic(self.out / "result.json") as tmp:
            tmp.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        to = "the teacher's samples" if self.teacher else self.against
        bias = f"of it {last['bias']:.2g} is bias; " if last.get("bias") else ""
        floor = f"the teacher's own is {self.floor[key]:.3g}; " if self.floor else ""
        print(f"{self.name} to {to}: {first[key]:.4g} before, {last[key]:.4g} after {d.seen} "
              f"images\n{bias}{floor}{last['seconds']:.0f} s\n{1e3 * fast:.2g} ms an image, "
              f"{slow / fast:.0f} times faster than the teacher: {self.out}/samples.png")


def timed(f):
    """Return what f() returns, which is on the CPU, and its seconds."""
    start = time.perf_counter()
    return f(), time.perf_counter() - start
