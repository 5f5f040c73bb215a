"""toy2d.py: the truth against autograd, one update by hand, every option, every bad input."""
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import toy2d
from bregman import NAMES, batch_weights
from toy2d import TARGETS, Config, Distiller, Mixture, distil, exact_log_q, mode_statistics

F64 = torch.float64
TINY = dict(steps=6, batch=32, width=16, init_steps=5)
TINY_OPTIONS = ("--steps", 6, "--batch", 32, "--width", 16, "--init-steps", 5)
close = torch.testing.assert_close


def double(target):
    t = TARGETS[target]
    return Mixture(t.weights.double() / t.weights.double().sum(), t.means.double(), t.std)


# ----------------------------------------------------------------------------------- the teacher

@pytest.mark.parametrize("target", TARGETS)
def test_score_is_the_gradient_of_log_p(target):
    teacher, g = double(target), torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=g, dtype=F64).requires_grad_()
    for level in (0.0, 0.02, 0.5, 40.0):
        sigma = torch.full((200, 1), level, dtype=F64)
        slope, = torch.autograd.grad(teacher.log_p(x, sigma).sum(), x)
        close(teacher.score(x, sigma), slope, rtol=1e-9, atol=1e-9)
        close(teacher.denoise(x, sigma), x + level ** 2 * slope)


@pytest.mark.parametrize("target", TARGETS)
def test_p_sigma_is_a_density_of_mass_one(target):
    edge = torch.linspace(-4, 4, 801, dtype=F64)
    grid = torch.cartesian_prod(edge, edge)
    for level in (0.0, 0.5):
        sigma = torch.full((len(grid), 1), level, dtype=F64)
        mass = double(target).log_p(grid, sigma).exp().sum() * 0.01 ** 2
        close(mass.item(), 1.0, rtol=1e-6, atol=0)


def test_far_from_all_modes_everything_is_finite():
    x = torch.tensor([[1e4, -1e4], [1e8, 0.0], [0.0, -300.0]])
    for level in (0.0, 0.02, 80.0):
        sigma = torch.full((3, 1), level)
        teacher = TARGETS["ring8"]
        assert teacher.log_p(x, sigma).isfinite().all() and teacher.score(x, sigma).isfinite().all()
    assert exact_log_q(x, torch.full((3, 1), 0.02), torch.zeros(5, 2)).isfinite().all()


def test_samples_have_the_mixtures_weights_and_width():
    t = TARGETS["uneven8"]
    x = t.sample(100000, torch.Generator().manual_seed(0))
    distance, k = torch.cdist(x, t.means).min(1)
    close(torch.bincount(k) / 1e5, t.weights, rtol=0, atol=0.005)       # 3 sigma of a binomial
    close((distance.square().mean() / 2).sqrt().item(), t.std, rtol=0.01, atol=0)
    stats = mode_statistics(x, t)
    assert stats["modes_covered"] == 8 and stats["mode_tv"] < 0.01 and stats["on_mode"] > 0.999


def test_mode_statistics_of_a_student_that_drops_modes():
    t = TARGETS["ring8"]
    stats = mode_statistics(t.means[:2].repeat(50, 1), t)
    assert stats == dict(modes=8, modes_covered=2, mode_tv=0.75, on_mode=1.0)
    assert mode_statistics(torch.zeros(10, 2), t)["on_mode"] == 0


def test_tilted_teacher_is_the_reward_times_the_teacher():
    """Eq. (16) and (19) on a grid: p* ~ R p, and R_sigma = E[R(x0) | x] by Gauss quadrature."""
    t, a = double("uneven8"), torch.tensor([1.5, -0.4], dtype=F64)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    zero = torch.zeros(50, 1, dtype=F64)
    gap = t.tilt(a).log_p(x, zero) - t.log_p(x, zero) - x @ a
    close(gap, gap[:1].expand(50))                                      # the constant is -log Z_0
    edge = torch.linspace(-1.5, 1.5, 601, dtype=F64)
    x0 = torch.cartesian_prod(edge, edge)
    log_z0 = -gap[0]
    for at in x[:5]:
        log_joint = t.log_p(x0, torch.zeros(len(x0), 1, dtype=F64)) \
            - (x0 - at).square().sum(1) / (2 * 0.3 ** 2)                # sigma = 0.3
        expected = (log_joint + x0 @ a).logsumexp(0) - log_joint.logsumexp(0)
        sigma = torch.full((1, 1), 0.3, dtype=F64)
        log_r_star = t.tilt(a).log_p(at[None], sigma) - t.log_p(at[None], sigma)
        close(log_r_star[0], expected - log_z0, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------- the ratio

def test_exact_ratio_of_a_gaussian_student():
    """A student N(m, s^2) has q_sigma = N(m, s^2 + sigma^2); the bank's estimate agrees."""
    g = torch.Generator().manual_seed(0)
    mean, s, level = torch.tensor([0.3, -0.2], dtype=F64), 0.5, 0.4
    bank = mean + s * torch.randn(200000, 2, generator=g, dtype=F64)
    x = mean + torch.randn(20, 2, generator=g, dtype=F64) * math.hypot(s, level)
    variance = s ** 2 + level ** 2
    exact = -(x - mean).square().sum(1) / (2 * variance) - math.log(2 * math.pi * variance)
    estimate = exact_log_q(x, torch.full((20, 1), level, dtype=F64), bank)
    close(estimate, exact, rtol=0, atol=0.03)                           # Monte Carlo, 3 sigma


# ------------------------------------------------------------------------------------ Algorithm 1

def test_copy_weights_starts_the_student_at_the_teachers_denoiser():
    d = Distiller(Config())
    eps = d.normal(2000)
    sigma = torch.full((2000, 1), d.cfg.sigma_init)
    expected = d.teacher.denoise(sigma * eps, sigma)
    assert (d.G(eps) - expected).square().mean() < 2e-3 * expected.square().mean()
    F_x, _ = d.fake(eps, sigma)                         # and the fake score at the teacher's
    assert (F_x == 0).all()


def prepared(**options):
    """A Distiller whose fake network is no longer at its start, a batch, and its noise."""
    d = Distiller(Config(**TINY | options))
    g = torch.Generator().manual_seed(5)
    for p in d.fake.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    eps, sigma = torch.randn(32, 2, generator=g), torch.linspace(0.1, 1.5, 32)[:, None]
    noise = torch.randn(32, 2, generator=g)
    return d, eps, sigma, noise


def scores(d, x_t, sigma):
    """s_phi, s_psi and log r, each from its definition."""
    F_x, logit = d.fake(x_t, sigma)
    D_fake = d.teacher.denoise(x_t, sigma) + d.fake.c_out(sigma) * F_x
    return d.teacher.score(x_t, sigma), (D_fake - x_t) / sigma ** 2, -logit


@pytest.mark.parametrize("h, lam", [(n, 1.0) for n in NAMES if n != "sba"] + [("sba", 5.0)])
def test_update_is_eq_4(h, lam):
    """The gradient that reaches theta, against -E[h''(r) r (s_phi - s_psi) w dG/dtheta] summed
    sample by sample from Jacobians."""
    d, eps, sigma, noise = prepared(h=h, lam=lam, clip=2.0)
    x = d.G(eps)
    x_t = x + sigma * noise
    with torch.no_grad():
        gradient = d.generator_gradient(x_t, sigma)
        s_phi, s_psi, log_r = scores(d, x_t, sigma)
    d.opt_g.zero_grad()
    x.backward(gradient / 32)
    w, ess = batch_weights(d.b.log_weight(log_r.clamp(-2, 2)))
    close(d.ess, ess)
    for name, p in d.G.named_parameters():
        by_hand = torch.zeros_like(p)
        for i in range(32):
            field = -w[i] * sigma[i] * (s_phi[i] - s_psi[i])
            for j in range(2):
                dG, = torch.autograd.grad(d.G(eps[i:i + 1])[0, j], p)
                by_hand += field[j] * dG / 32
        close(p.grad, by_hand, rtol=1e-3, atol=1e-6)


def test_reward_update_is_the_corrected_eq_35():
    d, eps, sigma, noise = prepared(h="ls", reward="linear", norm="none")
    x_t = d.G(eps).detach() + sigma * noise
    with torch.no_grad():
        gradient = d.generator_gradient(x_t, sigma)
        s_phi, s_psi, log_r = scores(d, x_t, sigma)
    x = x_t.clone().requires_grad_()
    log_star = d.target.log_p(x, sigma) - d.teacher.log_p(x, sigma)
    slope, = torch.autograd.grad(log_star.sum(), x)
    w, w_star = log_r.clamp(-5, 5).exp(), log_star.detach().exp()       # LS: h''(r) r = r
    expected = -(w[:, None] * (s_phi - s_psi) + w_star[:, None] * slope)
    close(gradient, sigma * expected, rtol=1e-4, atol=1e-5)


def test_first_order_reward_is_eq_25():
    d, eps, sigma, noise = prepared(reward="linear", first_order=True)
    x = (eps * 0.5).requires_grad_()
    log_star, slope = d.reward_term(x, sigma)
    z0 = (d.teacher.sample(400000, d.g) @ d.a).exp().mean()             # Eq. (31)
    expected = d.teacher.denoise(x, sigma) @ d.a - z0.log()
    close(log_star, expected.detach(), rtol=0, atol=0.01)
    by_autograd, = torch.autograd.grad(expected.sum(), x)
    close(slope, by_autograd)
    exact, _ = Distiller(Config(**TINY, reward="linear")).reward_term(x.detach(), sigma)
    assert (log_star - exact).abs().max() > 0.05                        # it is an approximation


def test_teacher_free_update_is_the_corrected_eq_37_and_ignores_the_scores():
    d, eps, sigma, noise = prepared(teacher_free=True, h="be", norm="none")
    x_t = d.G(eps).detach() + sigma * noise
    with torch.no_grad():
        gradient = d.generator_gradient(x_t, sigma)
    x = x_t.clone().requires_grad_()
    r = (-d.fake(x, sigma)[1]).exp()
    slope, = torch.autograd.grad(r.sum(), x)
    second = 1 / r.detach() ** 2                                        # h'' of h = -log r
    close(gradient, sigma * second[:, None] * slope, rtol=1e-3, atol=1e-5)


def test_gan_term_is_the_gradient_of_minus_log_D():
    d, eps, sigma, noise = prepared(gan=0.7)
    x_t = (d.G(eps).detach() + sigma * noise).requires_grad_()
    gradient = d.generator_gradient(x_t.detach(), sigma)
    plain, *_ = prepared()
    loss = -torch.sigmoid(d.fake(x_t, sigma)[1]).log().sum()
    slope, = torch.autograd.grad(loss, x_t)
    close(gradient - plain.generator_gradient(x_t.detach(), sigma), 0.7 * slope,
          rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, dict(h="sba", lam=10), dict(ratio="exact"), dict(gan=0.5), dict(teacher_free=True),
    dict(reward="linear"), dict(reward="linear", first_order=True), dict(norm="two-stage"),
    dict(norm="none"), dict(clip=0.0), dict(target="grid25"), dict(target="uneven8"),
    dict(anneal=0.0), dict(head="mean"), dict(class_min=0.3), dict(class_max=0.3)], ids=str)
def test_every_option_runs_and_changes_the_student(options):
    base = dict(h="ls") | options
    d, result, history, seen, _ = distil(Config(**TINY | base), bar=False)
    assert all(math.isfinite(result[k]) for k in ("kl_pq", "kl_qp", "log_r_error", "mode_tv"))
    assert len(history) == 6 and seen.isfinite().all()
    if options:
        other, *_ = distil(Config(**TINY | dict(h="ls")), bar=False)
        assert any((a != b).any() for a, b in zip(d.ema, other.ema))


def test_ess_holds_the_effective_sample_size():
    """A new classifier's log r is small, so it takes a large lambda to spread the weights."""
    free, held = (distil(Config(**TINY | dict(h="sba", lam=50, ess=e)), bar=False)[2]
                  for e in (0.0, 0.999))
    assert min(row["ess"] for row in free) < 0.998
    assert all(row["ess"] >= 0.9989 for row in held)


@pytest.mark.parametrize("options", [{}, dict(sigma_max=0.1), dict(sigma_min=0.6), dict(anneal=0)])
def test_noise_levels_rise_within_their_range(options):
    d = Distiller(Config(**TINY | options))
    for d.done in (0, 1, d.cfg.steps):
        sigma = d.sigmas(32)[:, 0]
        assert (sigma.diff() >= 0).all()
        assert d.cfg.sigma_min * 0.999 < sigma[0] and sigma[-1] < d.cfg.sigma_max * 1.001


def test_classifier_learns_at_its_noise_levels_alone():
    d = Distiller(Config(**TINY))
    d.cfg.class_min, d.cfg.class_max = 100.0, 200.0
    before = d.fake.net[-1].weight[2].clone()
    _, loss_class = d.step()
    assert loss_class == 0 and torch.equal(d.fake.net[-1].weight[2], before)
    _, loss_class = Distiller(Config(**TINY)).step()
    assert abs(loss_class - 2 * math.log(2)) < 0.01


def test_mean_head_is_the_mean_of_what_the_scores_are_read_from():
    fake = Distiller(Config(**TINY, head="mean")).fake
    x, sigma = torch.randn(5, 2), torch.full((5, 1), 0.4)
    seen = []
    fake.net[-2].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    _, logit = fake(x, sigma)
    close(logit, seen[0].mean(1))


def test_seeds_reproduce_bit_for_bit():
    (a, ra, *_), (b, rb, *_), (c, *_) = [distil(Config(**TINY, seed=s), bar=False)
                                         for s in (3, 3, 4)]
    assert all(torch.equal(x, y) for x, y in zip(a.ema, b.ema))
    assert not torch.equal(a.ema[0], c.ema[0])
    assert {k: v for k, v in ra.items() if k != "seconds"} == \
        {k: v for k, v in rb.items() if k != "seconds"}


def test_it_learns():
    """In 400 small steps the student moves from the denoiser's blur towards the modes."""
    cfg = Config(steps=400, batch=128, width=48)
    before = mode_statistics(Distiller(cfg).samples(2000), TARGETS["ring8"])["on_mode"]
    _, result, *_ = distil(cfg, bar=False)
    assert result["on_mode"] > before + 0.15 and result["modes_covered"] >= 6


# --------------------------------------------------------------------------------- command line

def run(*args, cwd):
    return subprocess.run([sys.executable, toy2d.__file__, *map(str, args)], cwd=cwd,
                          capture_output=True, text=True)


def test_command_line(tmp_path):
    done = run("--h", "SBA", "--lam", 5, *TINY_OPTIONS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/toy2d/result.json").read_text())
    assert set("h lam seed modes modes_covered mode_tv on_mode kl_pq kl_qp log_r_error seconds"
               .split()) <= set(result)
    assert result["h"] == "sba" and result["lam"] == 5
    assert (tmp_path / "figures/toy2d_sba_5.png").read_bytes().startswith(b"\x89PNG")
    assert "of 8 modes" in done.stdout.splitlines()[-1]


def test_all_and_gif(tmp_path):
    done = run("--all", "--seeds", 2, *TINY_OPTIONS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 11 and all("±" in row for row in rows[2:])
    assert (tmp_path / "figures/toy2d_modes.png").exists()
    results = [json.loads(p.read_text()) for p in tmp_path.glob("runs/toy2d/ring8_kl_0_*/*.json")]
    assert f"{np.mean([r['mode_tv'] for r in results]):.3f} ±" in rows[4]
    done = run("--gif", *TINY_OPTIONS, cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "figures/toy2d.gif").exists(), done.stderr


@pytest.mark.parametrize("args, message", [
    (("--h", "kll"), "kll"), (("--lam", "nan"), "finite"), (("--lam", "1e9"), "beyond"),
    (("--steps", "-1"), "--steps"), (("--device", "cuda:9"), "cuda:9"),
    (("--out", "file/x"), "file"), (("--figures", "file"), "file"),
    (("--target", "ring9"), "ring8 grid25 uneven8"), (("--norm", "x"), "two-stage"),
    (("--batch", "many"), "many"), (("--seeds", "0", "--all"), "--seeds"),
    (("--sigma-min", "3"), "sigma-min"), (("--clip", "-1"), "--clip"), (("--ess", "2"), "--ess"),
    (("--head", "x"), "linear mean"), (("--class-min", "1", "--class-max", "1"), "overlap"),
    (("--class-min", "5"), "overlap"), (("--class-max", "0.01"), "overlap")])
def test_bad_input_is_one_line_and_status_2(tmp_path, args, message):
    (tmp_path / "file").touch()
    done = run("--steps", 2, *args, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("toy2d.py")
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("*.png"))


def test_a_loss_that_is_not_finite_is_named(monkeypatch):
    monkeypatch.setattr(Distiller, "step", lambda self: (torch.tensor(math.nan), torch.tensor(1.0)))
    with pytest.raises(FloatingPointError, match="step 1.*nan"):
        distil(Config(**TINY), bar=False)
