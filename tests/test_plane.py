"""Compare plane.py's teachers with autograd and quadrature, its log_q with brute force.

fixtures/students.pt has two students that toy2d.py trained (the averaged weights, rounded to
float16), and log q_sigma by brute force at 512 points of each at each noise level. To make it anew,
in ten minutes on one core:

    python -m tests.test_plane
"""
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad
from torch import nn

import bregman
import experiments
import plane
from plane import TARGETS, Mixture, divergence, log_q, log_ratios, mode_statistics
from toy2d import Config, distil, mlp

F64 = torch.float64
close = torch.testing.assert_close
FIXTURE = Path(__file__).resolve().parents[1] / "fixtures/students.pt"
LEVELS = (0.02, 0.05, 0.2)                          # sigma at which brute force was done
COARSE = 1024                                       # its latents on each axis, to begin with


# ------------------------------------------------------------------------------ by brute force

@torch.no_grad()
def brute_force(G, x_t, sigma, n):
    """Return log q_sigma(x_t), (N,): the log mean of N(x_t; G(z), sigma^2 I) over n x n latents z,
    medians of cells of equal probability."""
    z = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n).float()
    found = torch.full((len(x_t), 1), -math.inf)
    for rows in z.split(max(1, 2 ** 16 // n)):
        x = G(torch.cartesian_prod(rows, z))
        # |x_t - x|^2 by differences: expanded, it would cancel where it is small
        square = (x_t[:, :1] - x[:, 0]).square_() + (x_t[:, 1:] - x[:, 1]).square_()
        part = square.mul_(-0.5 / sigma ** 2).logsumexp(1, keepdim=True)
        found = torch.logaddexp(found, part)
    return found[:, 0] - math.log(2 * math.pi * sigma ** 2 * n ** 2)


def rebuild(student):
    G = mlp(2, 2, student["config"]["width"], nn.LeakyReLU(0.1))
    G.load_state_dict(student["weights"])           # float16 to float32 is exact
    return G


def make():
    """Train the two students and write the fixture."""
    students = {}
    for h in ("kl", "be"):
        cfg = Config(h=h, seed=0)
        weights = {k: v.half() for k, v in distil(cfg)[0].ema.state_dict().items()}
        print(h)
        students[h] = with_truth(dict(config=asdict(cfg), weights=weights))
    torch.save(students, FIXTURE)


def with_truth(student):
    """Return it with its densities by brute force: at each point with twice the latents on an axis,
    until that changes little. The few points where it always does are left out. Print how far off
    log_q is, root mean square and at most."""
    G, found = rebuild(student), dict(x_t=[], log_q=[])
    for s in LEVELS:
        z, noise = torch.randn(2, 512, 2, generator=torch.Generator().manual_seed(1))
        x, n = G(z).detach() + s * noise, 2 * COARSE
        coarse, fine = (brute_force(G, x, s, m) for m in (COARSE, n))
        while (open := (fine - coarse).abs() > 0.01).any() and n < 8 * COARSE:
            n, coarse[open] = 2 * n, fine[open]
            fine[open] = brute_force(G, x[open], s, n)
        x, fine = x[~open], fine[~open]
        print(f"{s}: {len(x)} of 512 points settle with at most {n} latents on an axis")
        for cells, splits in ((128, 2), (64, 2), (128, 0), (32, 0)):
            off = log_q(G, x, torch.full((len(x), 1), s), cells, splits) - fine
            print(f"{s}: {cells} cells, {splits} splits: {off.square().mean().sqrt():.4f}, "
                  f"{off.abs().max():.2f}", flush=True)
        found["x_t"].append(x)
        found["log_q"].append(fine)
    return student | found


# ----------------------------------------------------------------------- the student's density

def students():
    return {h: (rebuild(s), s) for h, s in torch.load(FIXTURE, weights_only=True).items()}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("h", ["kl", "be"])
def test_log_q_is_that_of_brute_force(h, level):
    G, fixture = students()[h]
    x_t, truth = (fixture[key][LEVELS.index(level)] for key in ("x_t", "log_q"))
    assert len(x_t) >= 500
    rms = []
    for how in ((128, 2), (64, 2), (32, 2), (32, 0)):       # cells, splits; the last: in training
        off = log_q(G, x_t, torch.full((len(x_t), 1), level), *how) - truth
        rms.append(off.square().mean().sqrt().item())
    assert rms[0] < 0.02 and rms == sorted(rms) and rms[-1] < 0.25


@pytest.mark.parametrize("level", [0.1, 0.5, 5.0])
def test_log_q_of_a_linear_student(level):
    """x = A z + b has q_sigma = N(b, A A^T + sigma^2 I)."""
    A = torch.tensor([[0.6, -0.3], [0.2, 0.1]], dtype=F64)
    b = torch.tensor([0.3, -0.2], dtype=F64)
    covariance = A @ A.T + level ** 2 * torch.eye(2, dtype=F64)
    exact = torch.distributions.MultivariateNormal(b, covariance)
    noise = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    noise = noise[noise.norm(dim=1) < 2]            # beyond, cells are wider than sigma
    x_t = b + noise @ torch.linalg.cholesky(covariance).T
    got = log_q(lambda z: z @ A.T + b, x_t, torch.full((len(x_t), 1), level, dtype=F64))
    close(got, exact.log_prob(x_t), rtol=0, atol=0.01)


def test_far_away_everything_is_finite_and_alike_for_any_number_of_points():
    (G, _), teacher = students()["kl"], TARGETS["ring8"]
    x_t = torch.tensor([[0.1, 0.9], [1e4, -1e4], [1e8, 0.0], [0.0, -300.0]])
    sigma = torch.tensor([[0.02], [0.02], [2.0], [80.0]])
    found = log_q(G, x_t, sigma, 64)
    for values in (teacher.log_p(x_t, sigma), teacher.score(x_t, sigma), found):
        assert values.isfinite().all()
    many = log_q(G, x_t.repeat(300, 1), sigma.repeat(300, 1), 64)   # more than one piece of 2^22
    close(many, found.repeat(300))


# ------------------------------------------------------------------------------- the divergence

@pytest.mark.parametrize("name", bregman.NAMES)
def test_divergence_is_the_integral_of_the_clipped_weight(name):
    """Compare with B(r) / ((1 + r) / 2), B by adaptive quadrature of (r - s) h''(s)."""
    h, clip = bregman.get(name, 2.0), 3.0

    def second(s):                                  # h''(s): the weight over s
        return h.weight(torch.tensor(math.log(s), dtype=F64).clamp(-clip, clip)).item() / s
    for log_r in (-7.0, -2.0, 0.4, 2.5, 7.0, 30.0):
        r = math.exp(log_r)
        B, _ = quad(lambda s: (r - s) * second(s), 1, r, points=[math.exp(-clip), math.exp(clip)]
                    if abs(log_r) > clip else None, epsrel=1e-9, limit=200)
        got = divergence(h, torch.tensor([log_r], dtype=F64), clip)
        close(got, 2 * B / (1 + r), rtol=1e-4 if abs(log_r) < clip else 1e-3, atol=0)


def test_divergence_of_two_gaussians():
    """KL both ways, in closed form."""
    p, a, b = Mixture(torch.ones(1), torch.zeros(1, 2), 0.5), 0.8, torch.tensor([0.3, -0.2])
    log_r = log_ratios(lambda z: a * z + b, p, 0.4, 4000, torch.Generator().manual_seed(0))
    u, v = a ** 2 + 0.4 ** 2, 0.5 ** 2 + 0.4 ** 2                       # variances of q and p
    shift = b.square().sum().item() / 2
    reverse = math.log(v / u) + u / v - 1 + shift / v                   # KL(q || p)
    forward = math.log(u / v) + v / u - 1 + shift / u
    close(divergence(bregman.get("kl"), log_r, 50.0), reverse, rtol=0.1, atol=0)
    close(divergence(bregman.get("be"), log_r, 50.0), forward, rtol=0.1, atol=0)


def test_table_of_what_lambda_asks_for(monkeypatch, capsys):
    """At lam = 1 D_h is (r - 1)^2 / (1 + r), with r = 2 everywhere for the eight, 4 for the one."""
    monkeypatch.setattr(plane, "log_ratios", lambda G, target, sigma, n, g: torch.full(
        (2,), math.log(2 if isinstance(G, nn.Module) else 4)))
    experiments.divergence_table()
    row, = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |"))
    got = [float(cell.split("±")[0]) for cell in row.split("|")[2:-1]]
    mean = 1.98 / math.log(100)                     # of sigma over all levels
    assert got == pytest.approx([1 / 3, mean / 3, 1.8, 1.8 * mean], rel=0.05)


# --------------------------------------------------------------------------------- the teachers

def double(target):
    t = TARGETS[target]
    return Mixture(t.weights.double() / t.weights.double().sum(), t.means.double(), t.std)


@pytest.mark.parametrize("target", TARGETS)
def test_score_is_the_gradient_of_log_p(target):
    teacher, g = double(target), torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=g, dtype=F64).requires_grad_()
    for level in (0.0, 0.02, 0.5, 40.0):
        sigma = torch.full((200, 1), level, dtype=F64)
        score, = torch.autograd.grad(teacher.log_p(x, sigma).sum(), x)
        close(teacher.score(x, sigma), score, rtol=1e-9, atol=1e-9)
        close(teacher(x, sigma), x + level ** 2 * score)                # Tweedie


@pytest.mark.parametrize("target", TARGETS)
def test_densities_have_mass_one(target):
    edge = torch.linspace(-4, 4, 201)
    grid = torch.cartesian_prod(edge, edge)
    for level in (0.05, 0.5):
        log_p = TARGETS[target].log_p(grid, torch.full((len(grid), 1), level))
        close(log_p.exp().sum().item() * 0.04 ** 2, 1.0, rtol=1e-4, atol=0)


def test_samples_have_the_mixtures_weights_and_width():
    t = TARGETS["uneven8"]
    x = t.sample(100000, torch.Generator().manual_seed(0))
    distance, k = torch.cdist(x, t.means).min(1)
    close(torch.bincount(k) / 1e5, t.weights, rtol=0, atol=0.005)       # 3 sigma of a binomial
    close((distance.square().mean() / 2).sqrt().item(), t.std, rtol=0.01, atol=0)
    assert mode_statistics(x, t)["mode_tv"] < 0.01
    two = mode_statistics(t.means[:2].repeat(50, 1), TARGETS["ring8"])
    assert two == dict(modes=8, modes_covered=2, mode_tv=0.75, on_mode=1.0)
    assert mode_statistics(torch.zeros(10, 2), t)["on_mode"] == 0


def test_tilted_teacher_is_the_reward_times_the_teacher():
    """Eq. (36) on a grid: R_sigma = E[R(x0) | x], over Z_0 = E[R(x0)]."""
    t, a, sigma = double("uneven8"), torch.tensor([1.5, -0.4], dtype=F64), 0.3
    edge = torch.linspace(-1.5, 1.5, 301, dtype=F64)
    x0 = torch.cartesian_prod(edge, edge)
    log_p0 = t.log_p(x0, torch.zeros(len(x0), 1, dtype=F64))
    log_z0 = (log_p0 + x0 @ a).logsumexp(0) - log_p0.logsumexp(0)
    for x in torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64):
        log_joint = log_p0 - (x0 - x).square().sum(1) / (2 * sigma ** 2)
        log_r = (log_joint + x0 @ a).logsumexp(0) - log_joint.logsumexp(0)
        log_r_star, _ = t.log_r_star(a, x[None], torch.full((1, 1), sigma, dtype=F64))
        close(log_r_star[0], log_r - log_z0, rtol=1e-6, atol=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make()
