"""The interactive page of the course: page.html, filled with recorded runs of toy2d.py.

`python experiments.py --page` writes it to play.html, which needs no network. A run takes about 50
KB: positions in 16 bits, log r in a byte, both as base64, and the curves thinned.
"""
import base64
import json
from pathlib import Path

import numpy as np

from plots import lam_of, option

SIGMAS = (0.05, 0.3, 1.5)       # toy2d.FRAME_SIGMAS, the noise levels of a frame's log r
EXTENT = 4.0                    # positions are kept within +-4, in steps of 1e-4
SHOWN = ("modes_covered", "mode_tv", "on_mode", "ess")


def coded(numbers, kind):
    """Return whole numbers as the bytes of an array of that kind, in base64."""
    return base64.b64encode(np.round(numbers).astype(kind).tobytes()).decode()


def counts(x, target):
    """Return how many samples x (n, 2) are nearest to each mode, (K,), as in mode_statistics."""
    distance = np.square(x[:, None] - target.means.numpy()).sum(2)                      # (n, K)
    return np.bincount(distance.argmin(1), minlength=len(target.means)).tolist()


def thinned(log):
    """Return about 45 of 100 rows, the first and the last among them, dense where the logarithm of
    the step is."""
    kept = np.unique(np.geomspace(1, len(log), 60).round().astype(int) - 1)
    return [{k: log[i][k] for k in ("step", *SHOWN)} for i in kept]


def packed(run, frames, targets):
    """Return what the page knows of a run. frames: step (F,), x (F, n, 2), log_r (F, 3, n)."""
    target, ratio = option(run, "--target", "ring8"), option(run, "--ratio", "learned")
    x, log_r = (frames[key].astype(float) for key in ("x", "log_r"))
    log_r = log_r.clip(-5, 5)                                   # as training has it
    low, high = log_r.min(2).round(4), log_r.max(2).round(4)                            # (F, 3)
    fraction = (log_r - low[..., None]) / np.maximum(high - low, 1e-4)[..., None]
    return dict(
        lam=lam_of(run), target=target, exact=ratio == "exact", setting=f"{target}, {ratio} r",
        x16=coded((x.clip(-EXTENT, EXTENT) + EXTENT) / (2 * EXTENT) * 65535, "<u2"),
        log_r8=coded(fraction.clip(0, 1) * 255, "u1"), low=low.ravel().tolist(),
        high=high.ravel().tolist(), step=frames["step"].tolist(),
        counts=[counts(frame, targets[target]) for frame in x],
        history=thinned(run["log"]), result={k: run["numbers"][k] for k in SHOWN})


def page(runs, targets):
    """Return the page's text.

    runs: a pair of a run of toy2d.py and its frames for each lambda and LR in each setting, all
    with frames of the same steps, or ValueError is raised. targets: name -> Mixture.
    """
    runs = [packed(run, frames, targets) for run, frames in runs]
    steps = [run.pop("step") for run in runs]
    if any(step != steps[0] for step in steps):
        raise ValueError("the page's runs have frames of different steps")
    used = {name: dict(weights=t.weights.tolist(), means=t.means.tolist(), std=t.std)
            for name, t in targets.items() if name in {run["target"] for run in runs}}
    data = dict(step=steps[0], sigma=SIGMAS, extent=EXTENT, targets=used, runs=runs)
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return text.replace("/*DATA*/null", json.dumps(data, separators=(",", ":"), allow_nan=False))
