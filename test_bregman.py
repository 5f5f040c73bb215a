"""Compare bregman.py with autograd, with quadrature, and with the tables of two papers."""
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bregman import NAMES, batch_weights, factorise, get, two_stage, which_way

F64 = torch.float64
LAMS = (-10, -2.5, -1, -0.5, 0, 0.5, 1, 3, 5, 10)
ROWS = [n for n in NAMES if n != "sba"]
EVERY = [(n, 1.0) for n in ROWS] + [("sba", lam) for lam in LAMS]
every = pytest.mark.parametrize("name, lam", EVERY)
close = torch.testing.assert_close


def derivatives(f, x):
    """Return f, f' and f'' at x (n,), by autograd."""
    x = x.clone().requires_grad_()
    y = f(x)
    d1, = torch.autograd.grad(y.sum(), x, create_graph=True)
    # an affine f has a d1 that does not depend on x, hence allow_unused
    d2, = torch.autograd.grad(d1.sum(), x, allow_unused=True)
    return y.detach(), d1.detach(), torch.zeros_like(x) if d2 is None else d2


# ------------------------------------------------------------------------------------- Table 1

@every
def test_weight_is_r_times_second_derivative_of_h(name, lam):
    b = get(name, lam)
    r = torch.logspace(-3, 3, 61, dtype=F64)
    _, _, d2 = derivatives(b.h, r)
    close(b.weight(r.log()), r * d2, rtol=1e-9, atol=0)
    close(b.log_weight(r.log()), (r * d2).log(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name, lam, table", [
    ("lr", 1, lambda r: r * r.log() - (1 + r) * (1 + r).log()),
    ("kl", 1, lambda r: r * r.log() - r), ("be", 1, lambda r: -r.log()),
    ("ls", 1, lambda r: r ** 2 / 2),
    ("sba", 5, lambda r: (r ** 6 - r) / 30), ("sba", -0.5, lambda r: (r ** 0.5 - r) / -0.25)])
def test_h_is_table_1s(name, lam, table):
    r = torch.logspace(-2, 2, 41, dtype=F64)
    close(get(name, lam).h(r), table(r), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lam, name, times", [(0, "kl", 1), (1, "ls", 1), (-1, "be", 1),
                                              (-0.5, "hellinger", 4)])
@pytest.mark.parametrize("eps, dtype", [(0, F64), (1e-12, F64), (-1e-12, F64),
                                        (1e-6, torch.float32), (-1e-6, torch.float32)])
def test_special_cases_of_sba(lam, name, times, eps, dtype):
    """They are approached from both sides, for h too. As Table 1 writes h, a difference over
    lam (lam + 1), float32 would leave nothing of it."""
    log_r, near, at = torch.linspace(-5, 5, 41, dtype=dtype), get("sba", lam + eps), get(name)
    rtol = 8 * abs(eps) + 1e-13                             # log r is up to 5
    close(near.weight(log_r), times * at.weight(log_r), rtol=rtol, atol=0)
    close(near.divergence(log_r.exp()).double(), times * at.divergence(log_r.double().exp()),
          rtol=rtol, atol=0)


@every
def test_h_is_convex_and_the_divergence_is_eq_2(name, lam):
    b, r = get(name, lam), torch.logspace(-2, 2, 81, dtype=F64)
    r_star = torch.linspace(0.5, 2, 81, dtype=F64)
    h_star, dh_star, d2 = derivatives(b.h, r_star)
    assert (d2 > 0).all()
    close(b.divergence(r, r_star), b.h(r) - h_star - dh_star * (r - r_star))
    r[40] = 1.0
    assert b.divergence(r)[40] == 0 and (b.divergence(r)[torch.arange(81) != 40] > 0).all()


# --------------------------------------------------------------- Theorem 3.1 and Appendices G, H

GRID = torch.linspace(-25, 25, 2001, dtype=F64)
DX = GRID[1] - GRID[0]
NOISE = (0.0, 0.8)


def log_normal(x, mean, variance):
    return -0.5 * (x - mean) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)


def mixture(x, weights, means, variances, sigma):
    """Return the log density at x of a mixture of normals, diffused to noise level sigma."""
    parts = [math.log(w) + log_normal(x, m, torch.tensor(v + sigma ** 2, dtype=F64))
             for w, m, v in zip(weights, means, variances)]
    return torch.logsumexp(torch.stack(parts), 0)


TEACHER = ([0.35, 0.65], [-1.0, 0.8], [0.81, 0.64])         # weights, means, variances
EXPONENT = 0.5                                              # Appendix G with R(x) = exp(x / 2)
TILT = [w * math.exp(EXPONENT * m + EXPONENT ** 2 * v / 2) for w, m, v in zip(*TEACHER)]
TILTED = ([t / sum(TILT) for t in TILT], [m + EXPONENT * v for _, m, v in zip(*TEACHER)],
          TEACHER[2])


def log_p(x, sigma):
    return mixture(x, *TEACHER, sigma)


def log_q(x, mean, scale, sigma):
    return log_normal(x, mean, scale ** 2 + sigma ** 2)


def log_r_star(x, sigma):
    """Return log R_sigma / Z_0 = log p*_sigma / p_sigma, Eq. (36): the tilted p* is a mixture."""
    return mixture(x, *TILTED, sigma) - mixture(x, *TEACHER, sigma)


def gradient(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def numeric_gradient(b, mean, scale, sigma, target=None):
    """Return d/d(mean, scale) of D_h(r || target), Eq. (3) or (32), by quadrature and autograd."""
    mean, scale = mean.clone().requires_grad_(), scale.clone().requires_grad_()
    r = (log_q(GRID, mean, scale, sigma) - log_p(GRID, sigma)).exp()
    r_star = torch.ones_like(GRID) if target is None else target(GRID, sigma).exp()
    inside = r.detach() > 1e-300            # elsewhere r has underflowed to 0
    integrand = log_p(GRID, sigma)[inside].exp() * b.divergence(r[inside], r_star[inside])
    return torch.stack(torch.autograd.grad(integrand.sum() * DX, (mean, scale)))


def expectation(field, mean, scale, sigma):
    """Return E_eps,n[field(x_sigma) dG/d(mean, scale)] for G(eps) = mean + scale eps, by quadrature
    over eps and the noise n of x_sigma = G(eps) + sigma n: nothing is integrated by hand."""
    eps = torch.linspace(-14, 14, 281, dtype=F64)[:, None]
    n = eps.T if sigma else torch.zeros(1, 1, dtype=F64)
    step = 0.1 / math.sqrt(2 * math.pi)
    weight = step * torch.exp(-eps ** 2 / 2) * (step * torch.exp(-n ** 2 / 2) if sigma else 1)
    value = field(mean + scale * eps + sigma * n) * weight
    return torch.stack([value.sum(), (value * eps).sum()])


# h for which the integrals converge with this pair: r^6 p decays, as the student is the narrower
CONVERGE = [(n, 1.0) for n in ROWS] + [("sba", v) for v in (-1, -0.5, 0.5, 3, 5)]
quadrature = pytest.mark.parametrize("name, lam", CONVERGE)
noise_levels = pytest.mark.parametrize("sigma", NOISE)
MEAN, SCALE = torch.tensor(0.3, dtype=F64), torch.tensor(0.65, dtype=F64)


def log_r(x, sigma):
    return log_q(x, MEAN, SCALE, sigma) - log_p(x, sigma)


def eq_4(b, sigma):
    def field(x):
        score_p = gradient(lambda x: log_p(x, sigma), x)
        score_q = gradient(lambda x: log_q(x, MEAN, SCALE, sigma), x)
        return -b.weight(log_r(x, sigma)) * (score_p - score_q)                     # Eq. (4)
    return expectation(field, MEAN, SCALE, sigma)


@noise_levels
@quadrature
def test_theorem_3_1_and_erratum_eq_35(name, lam, sigma):
    """Eq. (4) is right. In Eq. (35) the reward term adds to the gradient: its sign is wrong."""
    b = get(name, lam)
    without = eq_4(b, sigma)
    close(without, numeric_gradient(b, MEAN, SCALE, sigma), rtol=1e-6, atol=1e-12)

    def reward(x):
        log_star = log_r_star(x, sigma)         # h''(r*) grad r* = h''(r*) r* grad log r*
        return b.weight(log_star) * gradient(lambda x: log_r_star(x, sigma), x)

    term = expectation(reward, MEAN, SCALE, sigma)
    numeric = numeric_gradient(b, MEAN, SCALE, sigma, log_r_star)
    close(without - term, numeric, rtol=1e-6, atol=1e-12)                           # corrected
    assert (without + term - numeric).norm() > 0.1 * numeric.norm()                 # as printed


@quadrature
def test_erratum_normaliser(name, lam):
    """Appendix G says that Z_0 doesn't matter. It does: only KL's gradient ignores it."""
    b = get(name, lam)
    right = numeric_gradient(b, MEAN, SCALE, 0.5, log_r_star)
    unnormalised = numeric_gradient(b, MEAN, SCALE, 0.5, lambda x, s: log_r_star(x, s) + 1)
    same = (right - unnormalised).norm() < 1e-9 * right.norm()
    assert same == (name == "kl")


@noise_levels
@quadrature
def test_erratum_eq_37(name, lam, sigma):
    """Without a teacher the gradient is +E[h''(r) grad_x r dG]; the printed minus is wrong."""
    b = get(name, lam)

    def field(x):
        r, grad_r = log_r(x, sigma).exp(), gradient(lambda x: log_r(x, sigma).exp(), x)
        return b.weight(r.log()) / r * grad_r                                       # h''(r) grad r

    numeric = numeric_gradient(b, MEAN, SCALE, sigma)
    corrected = expectation(field, MEAN, SCALE, sigma)
    close(corrected, numeric, rtol=1e-6, atol=1e-12)
    assert (-corrected - numeric).norm() > numeric.norm()


# -------------------------------------------------------------------- numbers, batches, bad input

@every
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_finite_and_right_in_log_space(name, lam, dtype):
    """|log r| up to 80: log_weight always, and finite at 200; weight wherever it fits the dtype."""
    log_r = torch.cat([torch.linspace(-80, 80, 321), torch.tensor([-1e-6, 0, 1e-6])]).to(dtype)
    b, x = get(name, lam), log_r.double()
    # the paper's Table 1 and, where it has a row, f-distill's, whose u is 1/r
    true = {"lr": -torch.log1p(x.exp()), "kl": 0 * x, "be": -x, "ls": x, "sba": lam * x,
            "srkl": -torch.log1p((-x).exp()), "hellinger": -x / 2 - math.log(4),
            "jeffreys": torch.log1p((-x).exp())}[name]
    got = b.log_weight(log_r)
    assert got.dtype == dtype and got.isfinite().all()
    assert b.log_weight(torch.tensor([-200, 200], dtype=dtype)).isfinite().all()    # r: 0 and inf
    # tolerances: a few roundings of the dtype, in a log weight of size up to 800
    close(got.double(), true, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    fits = (true < math.log(torch.finfo(dtype).max)) & (true > math.log(torch.finfo(dtype).tiny))
    weight = b.weight(log_r)
    assert weight.dtype == dtype and weight[fits].isfinite().all() and (weight >= 0).all()
    error = (weight[fits].double().log() - true[fits]).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (1 + true[fits].abs())).all()


def test_names_in_any_case_and_the_errors():
    assert get("SBA", 5) == get("sba", 5.0)
    for name, lam, word in (("rkl", 1, "rkl"), ("sba", math.nan, "lam"), ("sba", 50.001, "lam")):
        with pytest.raises(ValueError, match=word):
            get(name, lam)


def test_batch_weights_have_mean_one_and_survive_any_scale():
    log_w = torch.tensor([[0.0, 1.0], [-2.0, 3.0]])
    for shift in (0, -1e3, 1e3):                            # exp alone would give 0 or inf
        w, _, tau = batch_weights(log_w + shift)
        close(w, log_w.exp() / log_w.exp().mean())
        assert tau == 1


@pytest.mark.parametrize("spread, least", [(0.0, 1.0), (0.1, 0.5), (5.0, 0.5), (50.0, 0.5),
                                           (50.0, 1.0)])
def test_ess_is_the_least_effective_sample_size(spread, least):
    log_w = spread * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    w, ess, tau = batch_weights(log_w, least)
    by_hand = (tau * log_w).double().exp()
    close(w.double(), by_hand / by_hand.mean(), rtol=1e-4, atol=0)
    close(ess.double(), by_hand.mean() ** 2 / by_hand.square().mean(), rtol=1e-4, atol=0)
    assert ess >= least and 0 <= tau <= 1 and (tau == 1) == (spread < 1)    # nothing to do
    if tau < 1:                                 # the next step of tau would be too far
        assert batch_weights((tau + 0.011) * log_w)[1] < least


def test_two_stage_makes_the_mean_ratio_one_in_every_bin():
    log_r = torch.linspace(-2, 2, 40)
    u = (-two_stage(log_r, bins=4)).exp()
    close(u.view(4, 10).mean(1), torch.ones(4))
    # u is kept in [0.1, 20], then both are divided by the mean, 10.05
    far = two_stage(torch.tensor([-50.0, 50.0]), bins=1)
    close(far, (10.05 / torch.tensor([20, 0.1])).log())


# ------------------------------------------------------------ which samples, which noise levels

def test_factorise_keeps_the_running_mean_of_w():
    """E[w] by its recursion in float64, over batches whose weights differ by e^500."""
    g = torch.Generator().manual_seed(0)
    log_mean, mean = torch.zeros(5), torch.zeros(5, dtype=F64)
    for step in range(60):
        rate = max(0.1, 1 / (1 + step))
        log_w = torch.empty(43).uniform_(-250, 250, generator=g)    # 43: the bins differ in size
        level, sample = factorise(log_w, log_mean, rate)
        now = torch.stack([w.mean() for w in log_w.double().exp().tensor_split(5)])
        mean = (1 - rate) * mean + rate * now
        close(log_mean.double(), mean.log(), rtol=1e-6, atol=1e-4)
        close(level, torch.cat([m.expand(n) for m, n in zip(log_mean, (9, 9, 9, 8, 8))]))
        close(level + sample, log_w, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("reader, verdict", [
    (lambda l: -l, "right"),
    (lambda l: (1 / l.sigmoid() - 1).log(), "right"),               # (1 - D) / D
    (lambda l: l, "upside down"),
    (lambda l: l.exp().clamp(0.1, 20).log(), "upside down: .* 1.2"),    # FastGen's, clamped
    (lambda l: l / 0, "biased"),
    (lambda l: -l[:, None], "biased: .*71, 1")])
def test_which_way(reader, verdict):
    assert re.match(verdict, which_way(reader))


# ---------------------------------------------------------------------------------- the file alone

HERE = Path(__file__).resolve().parent


def test_the_file_alone_prints_table_1(tmp_path):
    shutil.copy(HERE / "bregman.py", tmp_path)
    done = subprocess.run([sys.executable, "bregman.py"], cwd=tmp_path, text=True,
                          capture_output=True)
    assert [row.split()[0] for row in done.stdout.splitlines()[1:]] == list(NAMES), done.stderr
    assert " 0.0312       1      32   power" in done.stdout         # SBA 5 at r = 0.5, 1, 2


@pytest.mark.parametrize("name", ["bregman", "plane"])
def test_import_loads_torch_alone_and_changes_nothing(name):
    """In a fresh process: what it loads of the project, and signals, threads and denormals."""
    code = f"""
import signal, sys, torch
def state():
    handlers = [signal.getsignal(s) for s in signal.valid_signals()]
    return handlers, torch.get_num_threads(), (torch.tensor(1e-40) * 1).item() > 0
before = state()
import {name}
assert state() == before and state()[2], "the process is not as it was"
files = [str(getattr(m, "__file__", "")) for m in list(sys.modules.values())]
# a virtual environment may lie in the folder, and torch in it
print(*[f for f in files if f.startswith({str(HERE)!r}) and "site-packages" not in f])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True)
    assert done.stdout == f"{HERE / name}.py\n", done.stderr
