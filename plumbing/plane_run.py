"""What a run of toy2d.py leaves behind: its frames, its folder, its words."""
import json
from types import SimpleNamespace

import numpy as np
import torch

from plumbing.files import atomic
from plumbing.options import row_name
from plumbing.pictures import label
from plumbing.plots import plane_run

FRAME_SIGMAS = (0.05, 0.3, 1.5)


class Film:
    """At `frames` steps of a run: `points` samples, of the same noise each time, float16 (points,
    2), and their log r as training would see it at FRAME_SIGMAS, (3, points)."""

    def __init__(self, cfg, frames, points):
        steps = np.geomspace(max(1, cfg.steps / 1000), cfg.steps, frames)
        self.steps, self.x, self.log_r = np.unique(np.ceil(steps.round(6)).astype(int)), [], []
        g = torch.Generator(cfg.device).manual_seed(cfg.seed)
        z, self.noise, *before = torch.randn(cfg.nfe + 1, points, 2, generator=g, device=cfg.device)
        last = torch.full_like(z[:, :1], cfg.nfe - 1, dtype=torch.long)
        self.latents = SimpleNamespace(z=z, before=before, last=last)

    @torch.no_grad()
    def look(self, d, step):
        if step not in self.steps:
            return
        log_r = []
        for level in FRAME_SIGMAS:
            sigma = torch.full_like(self.noise[:, :1], level)
            x_t = d.G(d.start(self.latents)) + sigma * self.noise
            log_r.append(d.log_r(d.G, x_t, sigma, d.cfg.cells, splits=0) if d.cfg.ratio == "exact"
                         else -d.fake.encode(x_t, sigma, self.latents.last))
        self.x.append(d.averaged(d.start(self.latents, d.averaged)).half().cpu().numpy())
        self.log_r.append(torch.cat(log_r, 1).T.half().cpu().numpy())

    def arrays(self):
        return dict(step=self.steps, x=np.array(self.x), log_r=np.array(self.log_r))


def write(folder, d, result, seen, frames, scatter):
    """picture.png, samples.npy (3000, 2), frames.npz and, last, result.json."""
    name, clip = label(row_name(d.cfg.h, d.cfg.lam)), d.cfg.clip
    plane_run(name, d.samples(4000).cpu(), d.target.to("cpu"), result, seen,
              lambda log_r: d.h.weight(log_r.clamp(-clip, clip)), scatter, folder / "picture.png")
    with atomic(folder / "samples.npy") as tmp:
        np.save(tmp, d.samples(3000).cpu().numpy().astype(np.float16))
    with atomic(folder / "frames.npz") as tmp:
        np.savez_compressed(tmp, **frames)
    with atomic(folder / "result.json") as tmp:
        tmp.write_text(json.dumps(result, allow_nan=False) + "\n")


def tell(result, folder):
    """A run's numbers on standard output."""
    by_level = lambda errors: ", ".join(f"{e:.2g} at {s}" for s, e in errors.items())   # noqa: E731
    if result["log_r_by_sigma"]:
        print("the classifier's error in log r, root-mean-square, by sigma: "
              + by_level(result["log_r_by_sigma"]))
        print(f"half the ruler's cells change the truth by: {by_level(result['ruler_by_sigma'])}")
    divergences = ""
    if result["kl_pq"] is not None:
        divergences = f"KL(p|q) {result['kl_pq']:.3f}, KL(q|p) {result['kl_qp']:.3f}, "
    print(f"{result['modes_covered']} of {result['modes']} modes, TV {result['mode_tv']:.3f}, "
          f"on a mode {result['on_mode']:.3f}, {divergences}{result['seconds']:.0f} s")
    print(f"{folder}/picture.png: red where samples are, blue where they should be")
