"""h and h''(r) r: what one convex function does to diffusion distillation (Di-Bregman, Table 1).

The student's density q is matched to the teacher's p: r = q/p is driven to 1 in the Bregman
divergence of a convex h, at every noise level. By Theorem 3.1 the gradient is the score difference
of VSD and DMD times one number per sample,

    grad D_h(r || 1) = -E[ w(t) h''(r) r (grad log p - grad log q) dG ]             # Eq. (4)

so h enters the training only as the weight h''(r) r. A classifier's logit l, with sigmoid(l) =
p / (p + q), gives log r = -l; ratios and weights are kept as logarithms.

    python bregman.py           # prints Table 1 with numbers, draws runs/weights.png: 2 s

    h = get("sba", lam=5); h.weight(-logits)
"""
from plumbing.run import run_main       # first: before torch it can make Ctrl-C quiet

import math
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from plumbing.options import Parser, path
from plumbing.plots import pyplot, save_figure

Row = namedtuple("Row", "h_text weight_text divergence h log_weight")


def power(log_r, a):
    """(r^a - 1) / a, which is log r at a = 0."""
    if abs(a) > 0.5:        # torch's gradient of expm1(x) is 1 + expm1(x), which loses a small e^x
        return ((a * log_r).exp() - 1) / a
    return torch.expm1(a * log_r) / a if a else log_r


def h_sba(r, lam):
    """Table 1's h; at lam < -1/2 minus (1 - r)/(lam (lam+1)), which is infinite at lam = -1. That
    term is affine, so it changes neither D_h nor h''."""
    if lam < -0.5:
        return power(r.log(), 1 + lam) / lam
    return r * power(r.log(), lam) / (1 + lam)


# A row: h(r), h''(r) r and the f-divergence that D_h(r || 1) is, in words; h(r, lam) and
# log(h''(r) r) of (log_r, lam), as code. A new row needs no other line.                  Table 1
TABLE_1 = {
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
               h_sba,
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


def get(name, lam=5.0):
    """The Bregman divergence `name`, one of NAMES in any case; lam, in [-50, 50], is SBA's alone.

    Raises ValueError for an unknown name, or a lam out of that range.
    """
    if str(name).lower() not in TABLE_1:
        raise ValueError(f"unknown h {name!r}, not one of {' '.join(NAMES)}")
    if not -50 <= lam <= 50:
        raise ValueError(f"lam must be a number from -50 to 50, not {lam}")
    return Bregman(str(name).lower(), float(lam))


# ----------------------------------------------------------------- from log weights to a batch's

def batch_weights(log_w, ess=0.0):
    """Log weights of any shape, n in all -> weights of batch mean one, shaped alike; their
    effective sample size; and tau, the power to which they were raised.

    The effective sample size is a share of n (Kish 1965): 1 where all weights are equal, 1/n where
    one sample takes everything. tau is the largest of 0, 0.01, ..., 1 that keeps it at `ess` or
    above, as in sequential Monte Carlo's adaptive tempering (Jasra et al. 2011): SBA's lambda
    becomes tau lambda, KL stays KL.
    """
    flat, tau = log_w.flatten(), torch.ones((), device=log_w.device)
    if ess:
        powers = torch.linspace(0, 1, 101, device=log_w.device)
        w = (powers[:, None] * flat).softmax(1)                                     # (101, n)
        share = 1 / (len(flat) * w.square().sum(1))
        tau = powers[share >= min(ess, 1 - 1e-4)].max()     # tau = 0 gives 1, but for rounding
    w = len(flat) * (tau * flat).softmax(0).view_as(log_w)  # exp(tau log_w) over its mean
    return w, 1 / w.square().mean(), tau


def two_stage(log_r, bins=10):
    """f-distill's first stage: u = 1/r in [0.1, 20], over its mean in its noise level's bin.
    log_r: (n,), sorted by noise level, so that bins are slices. Returns -log of that u, (n,); the
    second stage is batch_weights."""
    u = (-log_r).exp().clamp(0.1, 20)
    return torch.cat([(part.mean() / part).log() for part in u.tensor_split(bins)])


def split(log_w, log_mean, rate):
    """A weight has two parts: w = E[w | sigma] times w / E[w | sigma], how much a noise level
    counts and how much a sample counts within its level.

    log_w: (n,), sorted by noise level. log_mean: (bins,), log E[w | sigma] of an equal slice each;
    this batch moves the running mean by `rate`, in (0, 1], in place. Returns the logarithms of both
    parts, (n,) each.
    """
    bins = log_w.tensor_split(len(log_mean))
    now = torch.stack([part.logsumexp(0) - math.log(len(part)) for part in bins])   # (bins,)
    kept = log_mean + math.log1p(-rate) if rate < 1 else torch.full_like(now, -math.inf)
    log_mean.copy_(torch.logaddexp(kept, now + math.log(rate)))     # (1 - rate) mean + rate now
    level = torch.cat([mean.expand(len(part)) for mean, part in zip(log_mean, bins)])
    return level, log_w - level


def which_way(log_ratio):
    """Which way is r? Says how your function reads the ratio: "right", "upside down" or "biased".

    log_ratio: maps the logits l (n,) of a classifier, sigmoid(l) = p / (p + q), to log r = log q/p.
    It is tried on p = N(0, 1) and q = N(1, 1), whose log r at x is x - 1/2. In FastGen's f-distill
    r is p/q: there SBA's weight is r^-lam. In a loop like DMD2's, whose logit is high for real
    images, log r is -logit: BE's weight is get("be").weight(-logit). A clamp makes a bias.
    """
    log_r = torch.linspace(-3, 4, 71) - 0.5
    got = torch.as_tensor(log_ratio(-log_r))
    if got.shape != log_r.shape:
        return f"biased: {tuple(got.shape)} for 71 samples, not one number each"
    off, turned = ((got - sign * log_r).abs().max().item() for sign in (1, -1))
    error = min(off, turned)
    biased = "" if error < 0.01 else f"off by up to {error:.2g} between log r = -3.5 and 3.5"
    if turned < off:
        return f"upside down: log p/q, under which SBA's weight is r^-lam; {biased}".rstrip("; ")
    return f"biased: {biased}" if biased else "right"


# ------------------------------------------------------------------------------------- Table 1

def print_table():
    """Table 1, with h''(r) r at r = 0.5, 1 and 2; SBA at lam = 5, the paper's choice."""
    print(f"{'name':<10}{'h(r)':<29}{'weight':<13}{'r=0.5':>8}{'r=1':>8}{'r=2':>8}   D_h(r||1)")
    for name, row in TABLE_1.items():
        at = get(name, lam=5).weight(torch.tensor([0.5, 1.0, 2.0]).log()).tolist()
        numbers = "".join(f"{w:8.3g}" for w in at)
        print(f"{name:<10}{row.h_text:<29}{row.weight_text:<13}{numbers}   {row.divergence}")


CURVES = [  # label, name, lam, colour; the label's log r, its height over the curve
    ("SBA 10", "sba", 10, "#67000d", 0.55, 1), ("SBA 5", "sba", 5, "#cb181d", 1.13, 1),
    ("SBA 3", "sba", 3, "#ef6548", 1.85, 1), ("LS, SBA 1", "ls", 1, "#e08214", 2.4, 1),
    ("KL, SBA 0", "kl", 1, "#000000", 2.6, 1), ("LR, JS", "lr", 1, "#1b7837", 0.85, 1),
    ("BE, fKL, SBA -1", "be", 1, "#2166ac", -2, 0.53),
    ("softened rKL", "srkl", 1, "#8c6d31", -2.2, 0.55),
    ("Jeffreys", "jeffreys", 1, "#762a83", -0.85, 1.65),
    ("Hellinger", "hellinger", 1, "#4393c3", 1.5, 0.62)]


def plot(path):
    """Write h''(r) r against log r, one labelled curve a row of Table 1, to a PNG at `path`."""
    log_r = torch.linspace(-3.2, 3.2, 641, dtype=torch.float64)
    fig, ax = pyplot().subplots(figsize=(12, 7.5), layout="constrained")
    ax.axvspan(0, 3.2, color="#f4e9e4")
    for label, name, lam, colour, at, above in CURVES:
        weight = get(name, lam).weight
        ax.plot(log_r, weight(log_r), color=colour)
        ax.text(at, above * weight(torch.tensor(float(at))), label, color=colour, weight="bold",
                ha="center", va="center", bbox=dict(fc="white", ec="none", alpha=0.8, pad=1))
    ax.text(-1.6, 320, "q < p: the student\nputs too little here", ha="center", va="center")
    ax.text(2.45, 0.006, "q > p: the student\nputs too much here", ha="center", va="center")
    ax.set(yscale="log", ylim=(2e-3, 1e3), xlim=(-3.2, 3.2), xlabel="log r = log q/p = -logit",
           ylabel="weight  h''(r) r")
    save_figure(fig, path)


def main(argv):
    parser = Parser(prog="bregman.py", description=__doc__.splitlines()[0])
    parser.add("out", path, "runs/weights.png", "where the picture goes")
    out = parser.parse_args(argv).out
    print_table()
    plot(out)
    print(f"\nwrote {out}: a weight that rises with log r listens to where q is too large")


if __name__ == "__main__":
    run_main(main)
