"""How good a run's student is, while it runs and when it ends."""
import json
import sys
import time
from dataclasses import asdict

import torch
from tqdm import tqdm

import fid
from data import save_grid
from edm import sample
from plumbing.files import atomic, save_atomic
from plumbing.health import warning
from plumbing.plots import curve, side_by_side
from plumbing.run import world
from plumbing.teachers import beside

COLUMNS = ("to_data", "to_teacher", "variance", "precision", "recall", "density", "coverage",
           "images", "score", "ess", "tau", "log_r", "log_r_std", "loss_score", "loss_class",
           "grad_g", "grad_f")


def timed(f):
    """-> f()'s result, which is on the CPU, and its seconds."""
    start = time.perf_counter()
    return f(), time.perf_counter() - start


class Judge:
    """Measures a run's samples against the data and, where there is a bank, the teacher's."""

    def __init__(self, cfg, out):
        self.cfg, self.out = cfg, out
        self.net = fid.load_net(cfg.features).to(cfg.device)
        self.name = fid.NAMES[cfg.features][0]
        self.data = fid.measure_source(cfg.reference, self.net)
        bank = beside(cfg.teacher, cfg.bank, f"_{cfg.features}.npz")
        self.bank = fid.measure_source(bank, self.net) if bank else None
        self.key = "to_teacher" if self.bank else "to_data"
        self.own = self.teachers_own()

    def row(self, d, rows):
        """A row of log.csv, after these; a grid, and curve.png. It warns of a sick run."""
        images = sample(d.ema, self.cfg.eval_n, levels=d.g_sigmas)
        row = self.compare(fid.measure(images, self.net))
        save_grid(images[:self.cfg.preview], self.out / f"grid_{d.seen:09}.png",
                  classes=d.ema.label_dim)
        curve(rows + [row | {"kimg": d.seen / 1e3}], self.own, self.name, self.out / "curve.png")
        row |= d.averages()
        if said := warning(rows + [row]):
            tqdm.write(f"after {d.seen} images: {said}", file=sys.stderr)
        return row

    def compare(self, a):
        """A set that is measured -> its distances, and its variety beside the bank's or, where
        there is none, the data's: precision and recall, and the share of their variance."""
        reference = self.bank or self.data
        row = {"to_data": fid.frechet(a.mu, a.sigma, self.data.mu, self.data.sigma),
               "variance": (a.sigma.trace() / reference.sigma.trace()).item()}
        if self.bank:
            row["to_teacher"] = fid.frechet(a.mu, a.sigma, self.bank.mu, self.bank.sigma)
        return row | (fid.variety(a, reference) or {}) | {"score": a.score[0]}

    def teachers_own(self):
        """The bank's distances: the floor. To the teacher: one half's to the other."""
        if not self.bank or self.bank.features is None:         # statistics have no halves
            return {}
        half, other = fid.shuffled(self.bank.features).tensor_split(2)
        to_data = fid.frechet(self.bank.mu, self.bank.sigma, self.data.mu, self.data.sigma)
        return {"to_data": to_data,
                "to_teacher": fid.frechet(*fid.stats(half), *fid.stats(other))}

    def finish(self, d, loop):
        """student.pt, samples.png, result.json, and one line."""
        cfg, out, own, key = self.cfg, self.out, self.own, self.key
        n, first, last = cfg.preview, loop.rows[0], loop.rows[-1]
        save_atomic({"config": asdict(cfg), "seen": d.seen, "ema": d.ema.state_dict()},
                    out / "student.pt")
        sample(d.teacher, n, steps=1)                               # warm before it is timed
        teachers, slow = timed(lambda: sample(d.teacher, n))
        # of the student 8 times as many: n take too little time to measure
        students, fast = timed(lambda: sample(d.ema, 8 * n, levels=d.g_sigmas))
        slow, fast = slow / n, fast / (8 * n)
        evaluations = "1 evaluation" if len(d.g_sigmas) == 1 else f"{len(d.g_sigmas)} evaluations"
        guided = ", guided" if hasattr(d.teacher, "good") else ""
        side_by_side({f"teacher: 35 evaluations{guided}": teachers,
                      f"student: {evaluations}, same noise": students[:n]}, out / "samples.png",
                     d.ema.label_dim)
        result = {"distance": self.name, "before": first, "after": last, "teacher": own,
                  "images": d.seen, "seconds": loop.seconds(), "seconds_per_image": fast,
                  "teacher_seconds_per_image": slow, "torch": torch.__version__,
                  "threads": torch.get_num_threads(), "processes": world(), "config": asdict(cfg)}
        with atomic(out / "result.json") as tmp:
            tmp.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
        floor = f"; the teacher's own {own[key]:.3g}" if own else ""
        print(f"{self.name} {key.replace('_', ' ')}: {first[key]:.4g} before, {last[key]:.4g} "
              f"after {d.seen} images in {loop.seconds():.0f} s{floor}; {1e3 * fast:.2g} ms an "
              f"image, {slow / fast:.0f} times faster than the teacher: {out}/samples.png")
