"""One convex function h gives every sample of a diffusion distillation one weight, h''(r) r.

The student's density q is matched to the teacher's p: at every noise level their ratio r = q/p is
driven to 1 in the Bregman divergence of h. By Theorem 3.1 of Di-Bregman (arXiv 2510.16983) the
gradient is the score difference of VSD and DMD times one number per sample,

    grad D_h(r || 1) = -E[ w(t) h''(r) r (grad log p - grad log q) dG ]             # Eq. (4)

so h enters the training only as the weight h''(r) r. A classifier's logit l, with sigmoid(l) =
p / (p + q), gives log r = -l. Ratios and weights are kept as logarithms, which do not overflow.

    python bregman.py           # prints Table 1, with each weight at r = 0.5, 1 and 2

    h = get("sba", lam=5)
    w, ess, tau = batch_weights(h.log_weight(-logits))      # weights of batch mean one

This file needs torch and nothing else, so that you can copy it into your own project.
"""
import math
from collections import namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Row = namedtuple("Row", "h_text weight_text divergence h log_weight")


# ------------------------------------------------------------------------------------- Table 1

def power(log_r, a):
    """Return (r^a - 1) / a, which is log r at a = 0."""
    # expm1 is exact where a log r is small, which matters for a small a. Its gradient in torch is
    # 1 + expm1(x), which rounds a small e^x to 0, so a large a takes exp.
    if abs(a) > 0.5:
        return ((a * log_r).exp() - 1) / a
    return torch.expm1(a * log_r) / a if a else log_r


def h_sba(r, lam):
    """Return SBA's h of Table 1; for lam < -1/2 without its part (1 - r)/(lam (lam+1)).

    That part is infinite at lam = -1. It is affine, so it changes neither D_h nor h''.
    """
    if lam < -0.5:
        return power(r.log(), 1 + lam) / lam
    return r * power(r.log(), lam) / (1 + lam)


# A row has three texts: h(r), the weight h''(r) r, and the f-divergence that D_h(r || 1) is. Then
# it has two functions: h of (r, lam), and log(h''(r) r) of (log_r, lam). Add a row, and every
# script takes it.
#
# The names are the paper's, which spells out none of them. In work on density ratios LR is logistic
# regression (`lr` is no learning rate here), LS is least squares, and SBA is scaled Basu's power
# divergence (Sugiyama et al. 2012; Kim et al. 2025, arXiv 2505.19601, Table 2). BE is probably
# Burg's entropy, as optimisation calls -log r; its Bregman divergence is Itakura's and Saito's.
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
    # f-distill (arXiv 2502.15681, Table 1) has three more
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
    """One row of Table 1. Its methods take and return tensors of any shape, dtype and device."""
    name: str           # in lower case
    lam: float          # SBA's lambda; the other rows do not use it

    def h(self, r):
        """Return the convex function h(r) of r = q/p > 0. Table 1, column 2."""
        return TABLE_1[self.name].h(r, self.lam)

    def log_weight(self, log_r):
        """Return log(h''(r) r) of log r = -l, finite wherever log r is. Table 1, column 4."""
        return TABLE_1[self.name].log_weight(log_r, self.lam)

    def weight(self, log_r):
        """Return the weight h''(r) r of log r, as Eq. (4) has it. Table 1, columns 3 and 4."""
        return self.log_weight(log_r).exp()

    def divergence(self, r, r_star=1.0):
        """Return h(r) - h(r*) - h'(r*) (r - r*) >= 0; its mean under p is D_h(r || r*).  Eq. (2)"""
        r_star = torch.as_tensor(r_star, dtype=r.dtype, device=r.device).detach().requires_grad_()
        with torch.enable_grad():
            h_star = self.h(r_star)
            dh_star, = torch.autograd.grad(h_star.sum(), r_star)
        return self.h(r) - h_star.detach() - dh_star * (r - r_star.detach())


def get(name, lam=5.0):
    """Return the Bregman divergence of a row's name, one of NAMES, in upper or lower case.

    lam: SBA's lambda, from -50 to 50. Raises ValueError for an unknown name or another lam.
    """
    if str(name).lower() not in TABLE_1:
        raise ValueError(f"unknown h {name!r}, not one of {' '.join(NAMES)}")
    if not -50 <= lam <= 50:
        raise ValueError(f"lam must be a number from -50 to 50, not {lam}")
    return Bregman(str(name).lower(), float(lam))


def row_name(h, lam):
    """Return a row's name in folders and tables: "kl", "sba_5"."""
    return f"sba_{lam:g}" if h == "sba" else h


def print_table():
    """Print Table 1, with h''(r) r at r = 0.5, 1 and 2. SBA has lam = 5, the paper's choice."""
    print(f"{'name':<10}{'h(r)':<31}{'weight':<13}{'r=0.5':>8}{'r=1':>8}{'r=2':>8}   D_h(r||1)")
    for name, row in TABLE_1.items():
        w = get(name, lam=5).weight(torch.tensor([0.5, 1.0, 2.0]).log())
        numbers = "".join(f"{number:8.3g}" for number in w.tolist())
        print(f"{name:<10}{row.h_text:<31}{row.weight_text:<13}{numbers}   {row.divergence}")


# ------------------------------------------------------------------------ the weights of a batch

def batch_weights(log_w, ess=0.0):
    """Return the weights of a batch, of mean one, their effective sample size, and tau.

    log_w: n log weights in any shape, which the weights keep. The effective sample size is a
    fraction of n (Kish 1965): 1 where all weights are equal, 1/n where one sample has all of it.
    Where it would fall below the argument `ess` (0: never), the weights are tempered: they are
    raised to the power tau, the largest of 0, 0.01, ..., 1 that keeps it, as in adaptive sequential
    Monte Carlo (Jasra et al. 2011). SBA's lambda becomes tau lambda, and KL stays KL.
    """
    flat, tau = log_w.flatten(), torch.ones((), device=log_w.device)                # (n,)
    if ess:
        powers = torch.linspace(0, 1, 101, device=log_w.device)
        ess = min(ess, 1 - 1e-4)                # which tau = 0 reaches, whatever is rounded
        w = (powers[:, None] * flat).softmax(1)                                     # (101, n)
        fraction = 1 / (len(flat) * w.square().sum(1))                              # (101,)
        tau = powers[fraction >= ess].max()
    w = len(flat) * (tau * flat).softmax(0).view_as(log_w)  # exp(tau log_w) over its mean
    return w, 1 / w.square().mean(), tau                    # (mean w)^2 / mean w^2, as mean w = 1


def two_stage(log_r, bins=10):
    """Return f-distill's normalised log r, (n,): the first of its two stages.

    log_r: (n,), sorted by noise level, so that equal slices are bins of levels. The ratio u = 1/r
    is kept in [0.1, 20] and divided by its mean in its bin; the result is -log u. The second stage
    is batch_weights.
    """
    u = (-log_r).exp().clamp(0.1, 20)
    return torch.cat([(part.mean() / part).log() for part in u.tensor_split(bins)])


def factorise(log_w, log_mean, rate):
    """Return the logs of a weight's two factors, E[w | sigma] and w / E[w | sigma], (n,) each.

    The first says how much a noise level counts, the second how much a sample counts within its
    level; --part of the scripts keeps one of them. log_w: (n,), sorted by noise level, so that
    equal slices are bins of levels. log_mean: (bins,), log E[w | sigma] as a running mean, which
    this batch moves in place by `rate`, in (0, 1]; with rate = 1 it begins anew.
    """
    bins = log_w.tensor_split(len(log_mean))
    now = torch.stack([part.logsumexp(0) - math.log(len(part)) for part in bins])   # (bins,)
    kept = log_mean + math.log1p(-rate) if rate < 1 else torch.full_like(now, -math.inf)
    log_mean.copy_(torch.logaddexp(kept, now + math.log(rate)))     # (1 - rate) mean + rate now
    by_level = torch.cat([mean.expand(len(part)) for mean, part in zip(log_mean, bins)])
    return by_level, log_w - by_level


# --------------------------------------------------------------------------------- which way is r?

def which_way(log_ratio):
    """Say how your code reads the ratio: "right", "upside down" or "biased", and by how much.

    log_ratio: your function from the logits l (n,) of a classifier, sigmoid(l) = p / (p + q), to
    log r = log q/p. It is tried on p = N(0, 1) and q = N(1, 1), whose log r at x is x - 1/2.

    In FastGen's f-distill r is p/q, so that SBA's weight is r^-lam there. In a loop like DMD2's,
    whose logit is high for real images, log r is -logit, and BE's weight is
    get("be").weight(-logit). A clamp of the logit makes the ratio biased.
    """
    log_r = torch.linspace(-3, 4, 71) - 0.5
    got = torch.as_tensor(log_ratio(-log_r))
    if got.shape != log_r.shape:
        return f"biased: {tuple(got.shape)} for 71 samples, not one number each"
    as_is, turned = ((got - sign * log_r).abs().max().item() for sign in (1, -1))
    error = min(as_is, turned)
    biased = "" if error < 0.01 else f"off by up to {error:.2g} between log r = -3.5 and 3.5"
    if turned < as_is:
        return f"upside down: log p/q, under which SBA's weight is r^-lam; {biased}".rstrip("; ")
    return f"biased: {biased}" if biased else "right"


if __name__ == "__main__":
    print_table()
