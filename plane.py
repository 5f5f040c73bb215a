"""The plane, where the truth is known: teachers that are formulas, and any student's density.

A mixture of Gaussians stays one under noise, so p_sigma and its score are exact at every noise
level. q_sigma of a student x = G(z) is known by cells of the latent plane, to a hundredth of its
logarithm (tests/test_plane.py holds it to brute force).

    python plane.py         # what lambda asks for, eight modes with bridges or one; a minute
"""
from plumbing.run import run_main       # first: before torch it can make Ctrl-C quiet

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import bregman
from plumbing.options import Parser


# -------------------------------------------------------------------- the teacher, all of it exact

class Mixture:
    """weights (K,), means (K, 2), one standard deviation for all. x is (N, 2), sigma (N, 1)."""

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = weights, means, std

    def _log_terms(self, x, sigma):
        """log of each Gaussian's term in p_sigma(x): (N, K)."""
        variance = self.std ** 2 + sigma ** 2
        square = (x[:, None] - self.means).square().sum(2)                          # (N, K)
        return self.weights.log() - square / (2 * variance) - (2 * math.pi * variance).log()

    def log_p(self, x, sigma):
        """log p_sigma(x): (N,), finite however far x is."""
        return self._log_terms(x, sigma).logsumexp(1)

    def score(self, x, sigma):
        """grad log p_sigma(x): (N, 2)."""
        nearby = self._log_terms(x, sigma).softmax(1) @ self.means
        return (nearby - x) / (self.std ** 2 + sigma ** 2)

    def __call__(self, x, sigma):
        """The denoiser D(x; sigma) = E[x0 | x_sigma = x], by Tweedie's formula: (N, 2)."""
        return x + sigma ** 2 * self.score(x, sigma)

    def sample(self, n, generator):
        """n clean samples, (n, 2)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, device=self.means.device)
        return self.means[k] + self.std * noise

    def tilt(self, a):
        """p*(x) ~ R(x) p(x), Eq. (16), for a reward R(x) = exp(a x): a mixture again. a: (2,)."""
        weights = (self.weights.log() + self.means @ a).softmax(0)
        return Mixture(weights, self.means + self.std ** 2 * a, self.std)

    def log_r_star(self, a, x, sigma):
        """log r* = log R_sigma(x) / Z_0 = log p*_sigma / p_sigma, (N,), and its gradient, (N, 2).
        Eq. (36), without the first-order R_sigma(x) = R(E[x0 | x]) of Eq. (25)"""
        tilted = self.tilt(a)
        return (tilted.log_p(x, sigma) - self.log_p(x, sigma),
                tilted.score(x, sigma) - self.score(x, sigma))

    def to(self, device):
        return Mixture(self.weights.to(device), self.means.to(device), self.std)


def _ring(weights):
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(weights, torch.stack([angle.cos(), angle.sin()], 1), 0.05)


_LINE = torch.linspace(-1, 1, 5)

TARGETS = {
    "ring8": _ring(torch.full((8,), 1 / 8)),
    "grid25": Mixture(torch.full((25,), 1 / 25), torch.cartesian_prod(_LINE, _LINE), 0.05),
    "uneven8": _ring(torch.tensor([0.02, 0.04, 0.06, 0.09, 0.12, 0.16, 0.21, 0.30])),
}
REWARDS = {"linear": torch.tensor([1.5, 0.0])}      # R(x) = exp(a x): Appendix G in closed form


# ----------------------------------------------------------------------------- the exact ratio

def normal_cells(n):
    """-> mean and standard deviation, (n,) each and float64, of a standard normal between two
    neighbours of the edges that cut the line into n cells of equal probability. The variance is a
    small difference, hence float64."""
    edge = torch.special.ndtri(torch.linspace(0, 1, n + 1, dtype=torch.float64))
    density = (-edge ** 2 / 2).exp() / math.sqrt(2 * math.pi)
    m = -n * density.diff()
    return m, (1 - n * (edge * density).nan_to_num().diff() - m ** 2).sqrt()


@torch.no_grad()
def log_q(G, x_t, sigma, cells=128, splits=2):
    """log q_sigma(x_t), (N,), of any student x = G(z), z ~ N(0, I) in the plane.

    The plane of z is cut into cells x cells of equal probability. A cell's image is taken for a
    Gaussian. Its mean and covariance C, those of four points' images, m +- s on each axis, are
    exact where G is linear: q_sigma is nearly the mean over cells of N(mean, sigma^2 I + C). A cell
    whose image is wider than half the least sigma, a bridge's, is cut in four, `splits` times.
    x_t: (N, 2), sigma: (N, 1). Raises ValueError for a student that does not map the plane to the
    plane, for other shapes, and for cells below 2 or, after all splits, beyond 1024 on an axis.
    """
    if cells not in range(2, 1024 // 2 ** splits + 1):
        raise ValueError(f"cells must be from 2 to {1024 // 2 ** splits}, not {cells}")
    if x_t.shape[1:] != (2,) or sigma.shape != (len(x_t), 1):
        raise ValueError("x_t must be (N, 2) and sigma (N, 1), not "
                         f"{tuple(x_t.shape)} and {tuple(sigma.shape)}")
    try:
        shape = tuple(G(x_t.new_zeros(1, 2)).shape)
    except RuntimeError as error:
        raise ValueError(f"a student of the plane takes (N, 2): {error}") from error
    if shape != (1, 2):
        raise ValueError(f"a student of the plane gives (N, 2), not {shape} for (1, 2)")
    corner = torch.cartesian_prod(*2 * [torch.tensor([-1, 1])])                 # (4, 2)
    cell, parts = torch.cartesian_prod(*2 * [torch.arange(cells)]), []          # (K, 2)
    for split in range(splits + 1):
        n = cells * 2 ** split
        m, s = normal_cells(n)                      # m +- s have a cell's mean and variance
        z = (m[cell] + corner[:, None] * s[cell]).to(x_t).view(-1, 2)
        x = torch.cat([G(some) for some in z.split(2 ** 18)]).view(4, len(cell), 2)
        mean = x.mean(0)                                                        # (K, 2)
        dx, dy = (x - mean).unbind(2)                                           # (4, K)
        xx, xy, yy = dx.square().mean(0), (dx * dy).mean(0), dy.square().mean(0)        # C
        wide = (4 * (xx + yy) > sigma.min() ** 2) & (split < splits)
        part = torch.stack([*mean.T, xx, xy, yy, torch.full_like(xx, -2 * math.log(n))])
        parts.append(part[:, ~wide])
        cell = (2 * cell[wide.cpu(), None] + (corner > 0)).view(-1, 2)
    mean_x, mean_y, xx, xy, yy, log_mass = torch.cat(parts, 1)                  # (K,) each
    det_C = (xx * yy - xy ** 2).clamp(min=0)
    found, rows = [], max(1, 2 ** 22 // len(xx))                # 2^22 pairs at a time
    for some, var in zip(x_t.split(rows), (sigma ** 2).split(rows)):
        dx, dy = some[:, :1] - mean_x, some[:, 1:] - mean_y                     # (rows, K)
        det = var ** 2 + var * (xx + yy) + det_C                # of sigma^2 I + C
        square = ((var + yy) * dx ** 2 - 2 * xy * dx * dy + (var + xx) * dy ** 2) / det
        found.append((log_mass - square / 2 - det.log() / 2).logsumexp(1))
    return torch.cat(found) - math.log(2 * math.pi)


# ----------------------------------------------------------------------------- the divergence

@torch.no_grad()
def log_ratios(G, target, sigma, n, generator):
    """log r of a student x = G(z) at n samples of q_sigma, then at n of p_sigma: (2n,)."""
    x = torch.cat([G(torch.randn(n, 2, generator=generator)), target.sample(n, generator)])
    x_t = x + sigma * torch.randn(2 * n, 2, generator=generator)
    level = torch.full((2 * n, 1), sigma)
    return log_q(G, x_t, level) - target.log_p(x_t, level)


def divergence(h, log_r, clip=5.0):
    """D_h(r || 1) from log_ratios, (2n,), of an h whose weight h''(r) r stays as it is where log r
    leaves +-clip.

    D_h is the integral of p B(r), and B(r) that of (r - s) h''(s) ds from s = 1 to r. The samples'
    density is (p + q)/2, of which p is 2/(1 + r): bridges, where p has nothing, are seen too.
    """
    log_r = log_r.double()[:, None]
    u = log_r * torch.linspace(0, 1, 1001, dtype=torch.float64) ** 2    # s = e^u  (2n, 1001)
    left = log_r.sigmoid() - (u + F.logsigmoid(-log_r)).exp()           # (r - s) / (1 + r)
    return 2 * torch.trapezoid(left * h.weight(u.clamp(-clip, clip)), u).mean().item()


# ---------------------------------------------------------------------------------------- samples

@torch.no_grad()
def mode_statistics(x, target):
    """Covered modes (more than a quarter of their weight), total variation of the mode weights,
    and the share of samples within 4 standard deviations of a mode."""
    distance, k = torch.cdist(x, target.means).min(1)
    weights = torch.bincount(k, minlength=len(target.means)) / len(x)
    return dict(modes=len(target.means),
                modes_covered=int((weights > target.weights / 4).sum()),
                mode_tv=float((weights - target.weights).abs().sum() / 2),
                on_mode=float((distance < 4 * target.std).float().mean()))


# ------------------------------------------------------------------- what does lambda ask for?

def main(argv):
    Parser(prog="plane.py", description=__doc__.splitlines()[0]).parse_args(argv)
    from toy2d import mlp                                               # which imports this file
    ring = TARGETS["ring8"]
    student = torch.load(Path(__file__).parent / "fixtures/students.pt", weights_only=True)["kl"]
    eight = mlp(2, 2, student["config"]["width"], lambda: nn.LeakyReLU(0.1))
    eight.load_state_dict(student["weights"])
    levels = torch.logspace(math.log10(0.02), math.log10(2), 13)
    log_r = [[[log_ratios(G, ring, sigma, 500, g) for sigma in levels.tolist()]
              for g in (torch.Generator().manual_seed(seed) for seed in range(3))]
             for G in (eight, lambda z: ring.means[0] + ring.std * z)]
    print("| lam | KL's eight modes, sigma = 0.02 | all levels | one mode, sigma = 0.02 "
          f"| all levels |\n|{'---|' * 5}")
    for lam in (-1, 0, 0.5, 1, 3, 5):
        h, cells = bregman.get("sba", lam), []
        for draws in log_r:
            D = torch.tensor([[divergence(h, at) for at in draw] for draw in draws])    # (3, 13)
            every = torch.trapezoid(levels * D, dim=1) / (len(levels) - 1)      # w(t) = sigma
            cells += [f"{x.mean():.2g} ± {x.std():.1g}" for x in (D[:, 0], every)]
        print(f"| {lam:g} | {' | '.join(cells)} |")
    print("\nD_h(r || 1) with log r clipped at +-5, by the exact ruler, from 500 samples of q and "
          "500 of p a level,\nmean and standard deviation of 3 draws. All levels: the log-uniform "
          "mean of sigma D_h, sigma from 0.02 to 2.")


if __name__ == "__main__":
    run_main(main)
