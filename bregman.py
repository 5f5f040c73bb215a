"""h and h''(r) r: what one convex function does to diffusion distillation (Di-Bregman, Table 1).

The student's density q is matched to the teacher's p by driving r = q/p to 1 in the Bregman
divergence of a convex h, at every noise level. By Theorem 3.1 its gradient is the score
difference of VSD and DMD times one number per sample,

    grad D_h(r || 1) = -E[ w(t) h''(r) r (grad log p - grad log q) dG ]             # Eq. (4)

so h enters the training only as the weight h''(r) r. A classifier's logit l, with sigmoid(l) =
p / (p + q), gives log r = -l; ratios and weights stay logarithms here as long as they can.

    python bregman.py                   # prints Table 1, writes figures/weights.png (2 s, laptop)

    b = get("sba", lam=5); b.weight(-logits)
"""
import argparse
import math
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

Row = namedtuple("Row", "h_text weight_text divergence h log_weight")


def _h_sba(r, lam):
    """Divides by 0 at lam 0 and -1: there the limits, up to an affine term, are KL's and BE's."""
    if lam == -1:
        return -r.log()
    if lam == 0:
        return torch.special.xlogy(r, r)
    return (r.pow(1 + lam) - r) / (lam * (lam + 1))


TABLE_1 = {  # name: h, h''(r) r, the f-divergence that D_h(r || 1) is, both as code       Table 1
    "lr": Row("r log r - (1+r) log(1+r)", "1/(1+r)", "Jensen-Shannon (x 2)",
              lambda r, lam: torch.special.xlogy(r, r) - (1 + r) * torch.log1p(r),
              lambda log_r, lam: F.logsigmoid(-log_r)),
    "kl": Row("r log r - r", "1", "reverse KL, KL(q||p)",
              lambda r, lam: torch.special.xlogy(r, r) - r,
              lambda log_r, lam: torch.zeros_like(log_r)),
    "be": Row("-log r", "1/r", "forward KL, KL(p||q)",
              lambda r, lam: -r.log(),
              lambda log_r, lam: -log_r),
    "ls": Row("r^2/2", "r", "Pearson chi2(q||p) / 2",
              lambda r, lam: r.square() / 2,
              lambda log_r, lam: log_r),
    "sba": Row("(r^(1+lam) - r)/(lam (lam+1))", "r^lam", "power (alpha) divergence",
               _h_sba,
               lambda log_r, lam: lam * log_r),
    # and those of f-distill (arXiv 2502.15681, Table 1) that are not among them
    "srkl": Row("(1+r) log(1+r) - r", "r/(1+r)", "softened reverse KL, 2 KL((p+q)/2||p)",
                lambda r, lam: (1 + r) * torch.log1p(r) - r,
                lambda log_r, lam: F.logsigmoid(log_r)),
    "hellinger": Row("-sqrt r", "1/(4 sqrt r)", "squared Hellinger, 1 - int sqrt(pq)",
                     lambda r, lam: -r.sqrt(),
                     lambda log_r, lam: -0.5 * log_r - math.log(4)),
    "jeffreys": Row("(r-1) log r - r", "1 + 1/r", "Jeffreys, KL(p||q) + KL(q||p)",
                    lambda r, lam: (r - 1) * r.log() - r,
                    lambda log_r, lam: torch.logaddexp(torch.zeros_like(log_r), -log_r)),
}
TABLE_1 |= {"rkl": TABLE_1["kl"], "fkl": TABLE_1["be"], "js": TABLE_1["lr"]}    # f-distill's names
NAMES = tuple(TABLE_1)


@dataclass(frozen=True)
class Bregman:
    """One row of Table 1. Every method maps torch tensors of any shape, float dtype and device."""
    name: str           # lower case
    lam: float          # SBA's lambda; the other rows have none

    def h(self, r):
        """The convex function, for r = q/p > 0. Table 1, column 2."""
        return TABLE_1[self.name].h(r, self.lam)

    def log_weight(self, log_r):
        """log(h''(r) r) of log r = -l: finite wherever log r is. Table 1, column 4."""
        return TABLE_1[self.name].log_weight(log_r, self.lam)

    def weight(self, log_r):
        """h''(r) r of log r, the weight in Eq. (4), Theorem 3.1. Table 1, columns 3 and 4."""
        return self.log_weight(log_r).exp()

    def divergence(self, r, r_star=1.0):
        """h(r) - h(r*) - h'(r*) (r - r*), >= 0: D_h(r || r*) is its mean under p.  Eq. (2), (3)"""
        r_star = torch.as_tensor(r_star, dtype=r.dtype, device=r.device).detach().requires_grad_()
        with torch.enable_grad():
            h_star = self.h(r_star)
            slope, = torch.autograd.grad(h_star.sum(), r_star)
        return self.h(r) - h_star.detach() - slope * (r - r_star.detach())


def get(name, lam=1.0):
    """The Bregman divergence called `name`, of NAMES in any case; lam, finite, is SBA's alone.

    Raises ValueError for an unknown name or a lam that is not finite.
    """
    if str(name).lower() not in TABLE_1:
        raise ValueError(f"unknown h {name!r}, not one of {' '.join(NAMES)}")
    if not math.isfinite(lam):
        raise ValueError(f"lam must be finite, not {lam}")
    return Bregman(str(name).lower(), float(lam))


def batch_weights(log_weight):
    """Weights with batch mean one, of log weights of any shape (n samples in all).

    Returns the weights, shaped alike, and their effective sample size as a fraction of n in
    (0, 1]: 1 where all are equal, 1/n where one sample takes everything (Kish 1965).
    """
    w = log_weight.numel() * log_weight.flatten().softmax(0).view_as(log_weight)
    return w, 1 / w.square().mean()


def two_stage(log_r, bins=10):
    """f-distill's first stage: u = 1/r in [0.1, 20], over its mean in its noise level's bin.
    log_r: (n,), sorted by noise level, so that bins are slices. Returns log r anew; the second
    stage is batch_weights."""
    u = (-log_r.clamp(-10, 10)).exp().clamp(0.1, 20)
    return torch.cat([(part.mean() / part).log() for part in u.tensor_split(bins)])


def temper(log_weight, least):
    """The largest tau in [0, 1], to 0.01, at which batch_weights(tau log_weight) has an effective
    sample size of at least `least`, in [0, 1]: adaptive tempering, as sequential Monte Carlo has
    it (Jasra et al. 2011). SBA's lambda becomes tau lambda, KL stays KL. log_weight: (n,)."""
    tau = torch.linspace(0, 1, 101, device=log_weight.device)
    w = (tau[:, None] * log_weight).softmax(1)                              # (101, n)
    ess = 1 / (log_weight.numel() * w.square().sum(1))
    return tau[ess >= min(least, 1 - 1e-4)].max()


def print_table():
    """Table 1, with h''(r) r at r = 0.5, 1 and 2; SBA at lam = 5, the paper's choice."""
    print(f"{'name':<10}{'h(r)':<29}{'weight':<13}{'r=0.5':>8}{'r=1':>8}{'r=2':>8}   D_h(r||1)")
    for name, row in TABLE_1.items():
        at = get(name, lam=5).weight(torch.tensor([0.5, 1.0, 2.0]).log()).tolist()
        numbers = "".join(f"{w:8.3g}" for w in at)
        print(f"{name:<10}{row.h_text:<29}{row.weight_text:<13}{numbers}   {row.divergence}")


def plot(path):
    """Write h''(r) r against log r, one labelled curve a row of Table 1, to a PNG at `path`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    curves = [  # label, name, lam, colour; log r of the label, its height over the curve
        ("SBA 10", "sba", 10, "#67000d", 0.55, 1), ("SBA 5", "sba", 5, "#cb181d", 1.13, 1),
        ("SBA 3", "sba", 3, "#ef6548", 1.85, 1), ("LS, SBA 1", "ls", 1, "#e08214", 2.4, 1),
        ("KL, SBA 0", "kl", 1, "#000000", 2.6, 1), ("LR, JS", "lr", 1, "#1b7837", 0.85, 1),
        ("BE, fKL, SBA -1", "be", 1, "#2166ac", -2, 0.53),
        ("softened rKL", "srkl", 1, "#8c6d31", -2.2, 0.55),
        ("Jeffreys", "jeffreys", 1, "#762a83", -0.85, 1.65),
        ("Hellinger", "hellinger", 1, "#4393c3", 1.5, 0.62)]
    log_r = torch.linspace(-3.2, 3.2, 641, dtype=torch.float64)
    plt.rcParams.update({"font.size": 17})
    fig, ax = plt.subplots(figsize=(12, 7.5), layout="constrained")
    ax.axvspan(0, 3.2, color="#f4e9e4")
    for label, name, lam, colour, at, above in curves:
        b = get(name, lam)
        ax.plot(log_r, b.weight(log_r), color=colour, lw=3)
        ax.text(at, above * b.weight(torch.tensor(float(at))), label, color=colour, weight="bold",
                ha="center", va="center", bbox=dict(fc="white", ec="none", alpha=0.8, pad=1))
    ax.text(-1.6, 320, "q < p: the student\nputs too little here", ha="center", va="center")
    ax.text(2.45, 0.006, "q > p: the student\nputs too much here", ha="center", va="center")
    ax.set(yscale="log", ylim=(2e-3, 1e3), xlim=(-3.2, 3.2), xlabel="log r = log q/p = -logit",
           ylabel="weight  h''(r) r")
    ax.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=100)
    plt.close(fig)


def main(argv):
    parser = argparse.ArgumentParser(prog="bregman.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("figures/weights.png"))
    out = parser.parse_args(argv).out
    print_table()
    try:
        plot(out)
    except (OSError, ValueError) as e:              # no such place, or no such format
        print(f"bregman.py: {e}", file=sys.stderr)
        return 2
    print(f"\nwrote {out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
