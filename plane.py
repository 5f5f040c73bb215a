"""In the plane the truth is known: teachers that are formulas, and the density of any student.

A mixture of Gaussians stays a mixture of Gaussians under noise, so p_sigma and its score are exact
at every noise level. The density q_sigma of a student x = G(z) is computed from small cells of the
latent plane: in every case tried against brute force, the root-mean-square error of log q_sigma is
0.006 or less (results.md). So the ratio r = q/p, which a classifier has to learn, is known here,
and so is the divergence that the training lowers.

    ring = TARGETS["ring8"]
    log_r = log_q(G, x_t, sigma) - ring.log_p(x_t, sigma)       # x_t (N, 2), sigma (N, 1)
"""
import math

import torch
import torch.nn.functional as F


# ------------------------------------------------------------------------------------ the teacher

class Mixture:
    """A teacher: K Gaussians in the plane, with one standard deviation `std` for all of them.

    weights: (K,), means: (K, 2). Its methods take points x (N, 2) and noise levels sigma (N, 1).
    """

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = weights, means, std

    def _log_terms(self, x, sigma):
        """Return the logarithm of each Gaussian's term in p_sigma(x), (N, K)."""
        variance = self.std ** 2 + sigma ** 2
        square = (x[:, None] - self.means).square().sum(2)                          # (N, K)
        return self.weights.log() - square / (2 * variance) - (2 * math.pi * variance).log()

    def log_p(self, x, sigma):
        """Return log p_sigma(x), (N,), which is finite however far away x is."""
        return self._log_terms(x, sigma).logsumexp(1)

    def score(self, x, sigma):
        """Return the score, grad log p_sigma(x), (N, 2)."""
        nearby = self._log_terms(x, sigma).softmax(1) @ self.means      # mean of modes  (N, 2)
        return (nearby - x) / (self.std ** 2 + sigma ** 2)

    def __call__(self, x, sigma):
        """Return the denoised D(x; sigma) = E[x0 | x_sigma = x], by Tweedie's formula, (N, 2)."""
        return x + sigma ** 2 * self.score(x, sigma)

    def sample(self, n, generator):
        """Return n samples without noise, (n, 2). generator: torch's source of random numbers."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        return self.means[k] + self.std * torch.randn(n, 2, generator=generator)

    def tilt(self, a):
        """Return p* of Eq. (16), proportional to R p, which is a mixture too.

        R(x) = exp(a . x) is the reward, a: (2,).
        """
        # each weight also has the factor exp(std^2 |a|^2 / 2), which the softmax takes out
        weights = (self.weights.log() + self.means @ a).softmax(0)
        return Mixture(weights, self.means + self.std ** 2 * a, self.std)

    def log_r_star(self, a, x, sigma):
        """Return log r* = log p*_sigma / p_sigma, (N,), and its gradient in x, (N, 2).  Eq. (36)

        It is exact, where the paper's Eq. (25) takes R(E[x0 | x]) for E[R(x0) | x].
        """
        tilted = self.tilt(a)
        return (tilted.log_p(x, sigma) - self.log_p(x, sigma),
                tilted.score(x, sigma) - self.score(x, sigma))


def _ring(weights):
    """Return eight Gaussians on the unit circle."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(weights, torch.stack([angle.cos(), angle.sin()], 1), 0.05)


_LINE = torch.linspace(-1, 1, 5)

TARGETS = {
    "ring8": _ring(torch.full((8,), 1 / 8)),
    "grid25": Mixture(torch.full((25,), 1 / 25), torch.cartesian_prod(_LINE, _LINE), 0.05),
    "uneven8": _ring(torch.tensor([0.02, 0.04, 0.06, 0.09, 0.12, 0.16, 0.21, 0.30])),
}
REWARDS = {"linear": torch.tensor([1.5, 0.0])}      # a of R(x) = exp(a x), for Appendix G


# ---------------------------------------------------------------------- the density of a student

def normal_cells(n):
    """Return the mean and the standard deviation of each of n cells of the line, (n,) each.

    The cells have equal probability under the standard normal. The results are float64, since the
    variance is a small difference of large numbers.
    """
    # On a cell (a, b) E z = n (phi(a) - phi(b)) and E z^2 = 1 - n (b phi(b) - a phi(a)). At both
    # ends of the line a phi(a) is 0, but the computer finds infinity times 0, which is nan.
    edge = torch.special.ndtri(torch.linspace(0, 1, n + 1, dtype=torch.float64))
    density = (-edge ** 2 / 2).exp() / math.sqrt(2 * math.pi)
    m = -n * density.diff()
    return m, (1 - n * (edge * density).nan_to_num().diff() - m ** 2).sqrt()


def cell_images(G, like, least_sigma, cells, splits):
    """Return the Gaussians that log_q, below, makes of the cells, (6, K): mean x and y, covariance
    xx, xy and yy, log mass. like: a tensor of G's dtype and device."""
    corner = torch.tensor([[-1, -1], [-1, 1], [1, -1], [1, 1]])
    cell = torch.cartesian_prod(torch.arange(cells), torch.arange(cells))       # (K, 2), indices
    parts = []
    for split in range(splits + 1):
        # 1. Four points of each cell, m +- s on each axis, which have its mean and its variance.
        n = cells * 2 ** split                                                  # cells on an axis
        m, s = normal_cells(n)
        z = (m[cell] + corner[:, None] * s[cell]).to(like).view(-1, 2)          # (4 K, 2)
        x = torch.cat([G(some) for some in z.split(2 ** 18)]).view(4, len(cell), 2)

        # 2. The Gaussian of its image: the mean and the covariance C of the points' images.
        mean = x.mean(0)                                                        # (K, 2)
        dx, dy = (x - mean).unbind(2)                                           # (4, K)
        xx, xy, yy = dx.square().mean(0), (dx * dy).mean(0), dy.square().mean(0)
        log_mass = torch.full_like(xx, -2 * math.log(n))
        gaussian = torch.stack([*mean.T, xx, xy, yy, log_mass])                 # (6, K)

        # 3. Cut a cell into four if its image is wide beside the noise, sqrt(xx + yy) > sigma / 2.
        wide = (4 * (xx + yy) > least_sigma ** 2) & (split < splits)
        parts.append(gaussian[:, ~wide])
        cell = (2 * cell[wide.cpu(), None] + (corner > 0)).view(-1, 2)
    return torch.cat(parts, 1)


@torch.no_grad()
def log_q(G, x_t, sigma, cells=128, splits=2):
    """Return log q_sigma(x_t), (N,), of any student x = G(z), z ~ N(0, I), of the plane.

    The plane of z is cut into cells x cells of equal probability, and the image of each is taken
    for a Gaussian. Its mean and covariance C, from the images of four points, are exact where G is
    linear. So q_sigma is nearly the mean over all cells, by their mass, of N(mean, sigma^2 I + C).
    A cell whose image is wider than half the least sigma, as on a bridge between two modes, is cut
    into four, up to `splits` times.
    x_t: (N, 2), sigma: (N, 1).
    """
    mean_x, mean_y, xx, xy, yy, log_mass = cell_images(G, x_t, sigma.min(), cells, splits)  # (K,)
    det_C = (xx * yy - xy ** 2).clamp(min=0)

    # 4. The mixture of these Gaussians under noise, at 2^22 pairs of x_t and a cell at a time.
    found, rows = [], max(1, 2 ** 22 // len(xx))
    for some, var in zip(x_t.split(rows), (sigma ** 2).split(rows)):
        dx, dy = some[:, :1] - mean_x, some[:, 1:] - mean_y                     # (rows, K)
        det = var ** 2 + var * (xx + yy) + det_C                # of var I + C, where var is sigma^2
        square = ((var + yy) * dx ** 2 - 2 * xy * dx * dy + (var + xx) * dy ** 2) / det
        found.append((log_mass - square / 2 - det.log() / 2).logsumexp(1))
    return torch.cat(found) - math.log(2 * math.pi)


# ----------------------------------------------------------------------------- the divergence

@torch.no_grad()
def log_ratios(G, target, sigma, n, generator):
    """Return log r of a student x = G(z), (2n,): at n samples of q_sigma, then at n of p_sigma.
    sigma: a number."""
    x = torch.cat([G(torch.randn(n, 2, generator=generator)), target.sample(n, generator)])
    x_t = x + sigma * torch.randn(2 * n, 2, generator=generator)
    sigma = torch.full((2 * n, 1), sigma)
    return log_q(G, x_t, sigma) - target.log_p(x_t, sigma)


def divergence(h, log_r, clip=5.0):
    """Return D_h(r || 1), a number, from log_ratios, (2n,).

    h: a bregman.Bregman. As in training, its weight h''(r) r stays constant where log r is beyond
    +-clip. D_h is the integral of p B(r), where B(r) is the integral of (r - s) h''(s) ds from s =
    1 to r. With s = e^u, h''(s) ds is weight(u) du. The samples have the density (p + q)/2, so that
    the bridges between modes, where p has nothing, are seen too; p is 2/(1 + r) times that. So D_h
    is twice the mean of the integral of (r - s)/(1 + r) weight(u) du from u = 0 to log r.
    """
    log_r = log_r.double()[:, None]
    u = log_r * torch.linspace(0, 1, 1001, dtype=torch.float64) ** 2    # denser at 0  (2n, 1001)
    factor = log_r.sigmoid() - (u + F.logsigmoid(-log_r)).exp()         # (r - s) / (1 + r)
    return 2 * torch.trapezoid(factor * h.weight(u.clamp(-clip, clip)), u).mean().item()


# ---------------------------------------------------------------------------------------- samples

@torch.no_grad()
def mode_statistics(x, target):
    """Return how samples x (N, 2) are spread over the modes of a target, as a dictionary.

    modes_covered: how many modes have more than a quarter of the samples that the target gives
    them. mode_tv: total variation of the modes' weights, 0 to 1. on_mode: the fraction of samples
    within 4 standard deviations of a mode.
    """
    distance, k = torch.cdist(x, target.means).min(1)
    weights = torch.bincount(k, minlength=len(target.means)) / len(x)
    return dict(modes=len(target.means),
                modes_covered=int((weights > target.weights / 4).sum()),
                mode_tv=float((weights - target.weights).abs().sum() / 2),
                on_mode=float((distance < 4 * target.std).float().mean()))
