"""The page that plays: page.html, filled with recorded runs of toy2d.py.

A run takes about 50 KB: positions in 16 bits, log r in a byte, both as base64; the curves thinned.
"""
import base64
import json
from pathlib import Path

import numpy as np

from plumbing.files import reading
from plumbing.plane_run import FRAME_SIGMAS
from plumbing.results import power

EXTENT = 4.0            # positions are kept within +-4, in steps of 1e-4
SHOWN = ("modes_covered", "mode_tv", "on_mode", "ess")


def coded(numbers, kind):
    """Whole numbers -> the bytes of an array of that kind, as base64."""
    return base64.b64encode(np.round(numbers).astype(kind).tobytes()).decode()


def counts(x, target):
    """How many samples x (n, 2) are nearest to each mode: (K,). plane.mode_statistics's rule."""
    distance = np.square(x[:, None] - target.means.numpy()).sum(2)
    return np.bincount(distance.argmin(1), minlength=len(target.means)).tolist()


def thinned(history):
    """About 45 of 100 rows, dense where the logarithm of the step is; the first and the last."""
    kept = np.unique(np.geomspace(1, len(history), 60).round().astype(int) - 1)
    keys = ("step", *SHOWN)
    return [{k: round(history[i][k], 4) for k in keys} for i in kept]


def packed(done, targets):
    """A run of toy2d.py -> what the page knows of it."""
    config = done.result["config"]
    with reading(done.folder / "frames.npz", "frames of toy2d.py"):
        frames = dict(np.load(done.folder / "frames.npz"))
        x, log_r = (frames[key].astype(float) for key in ("x", "log_r"))    # (F, n, 2), (F, 3, n)
    log_r = log_r.clip(-config["clip"], config["clip"])         # as training sees it
    low, high = log_r.min(2).round(4), log_r.max(2).round(4)                            # (F, 3)
    share = (log_r - low[..., None]) / np.maximum(high - low, 1e-4)[..., None]
    way = "exact" if config["ratio"] == "exact" else "learned"
    return dict(
        lam=power(config), target=config["target"], exact=way == "exact",
        setting=f"{config['target']}, {way} r",
        x16=coded((x.clip(-EXTENT, EXTENT) + EXTENT) / (2 * EXTENT) * 65535, "<u2"),
        log_r8=coded(share.clip(0, 1) * 255, "u1"), low=low.ravel().tolist(),
        high=high.ravel().tolist(), step=frames["step"].tolist(),
        counts=[counts(frame, targets[config["target"]]) for frame in x],
        history=thinned(done.result["history"]), result={k: done.result[k] for k in SHOWN})


def page(runs, targets):
    """The page's text. runs: a Done of toy2d.py for each lambda and LR in each setting, all with
    frames of the same steps; targets: name -> Mixture. Raises ValueError for bad frames."""
    runs = [packed(done, targets) for done in runs]
    steps = [run.pop("step") for run in runs]
    if any(step != steps[0] for step in steps):
        raise ValueError("the page's runs have frames of different steps")
    shown = {name: dict(weights=t.weights.tolist(), means=t.means.tolist(), std=t.std)
             for name, t in targets.items() if name in {run["target"] for run in runs}}
    data = dict(step=steps[0], sigma=FRAME_SIGMAS, extent=EXTENT, targets=shown, runs=runs)
    text = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    return text.replace("/*DATA*/null", json.dumps(data, separators=(",", ":"), allow_nan=False))
