"""Compare the updates of toy2d.py with their formulas, sample by sample, and run every option."""
import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy2d
from bregman import batch_weights, factorise
from plane import log_q, mode_statistics
from toy2d import Config, Distiller, compare_ratios, distil

TINY = dict(steps=6, batch=32, width=16, init_steps=5)
TINY_OPTIONS = "--steps 6 --batch 32 --width 16 --init-steps 5".split()
close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def denormals():
    """Give the next test its denormals back, which toy2d.main takes for 0."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def coarse(monkeypatch):
    """Measure with 16 x 16 cells in place of 128 x 128, which test_plane.py tests."""
    monkeypatch.setattr(toy2d, "log_q", lambda G, x_t, sigma, cells=128, splits=2: log_q(
        G, x_t, sigma, max(2, cells // 8), 0))


def prepared(**options):
    """Return a Distiller whose fake network is no longer at its start, and a batch."""
    d = Distiller(Config(**TINY | options))
    g = torch.Generator().manual_seed(5)
    for p in d.fake.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return d, SimpleNamespace(
        z=torch.randn(32, 2, generator=g), sigma=torch.linspace(0.1, 1.5, 32)[:, None],
        noise=torch.randn(32, 2, generator=g))


def scores(d, x_t, sigma):
    """Return s_phi, s_psi and log r, each from its definition."""
    D_fake, logit = d.fake(x_t, sigma)
    return d.teacher.score(x_t, sigma), (D_fake - x_t) / sigma ** 2, -logit


def noised(d, b):
    return d.G(b.z).detach() + b.sigma * b.noise


def field(d, b):
    """Take one step with the batch b. Return the gradient that reached x = G(z), (32, 2), of a sum
    over the 64 numbers of x, where step() takes a mean."""
    seen = []

    def look(module, args, x):
        x.retain_grad()
        seen.append(x)

    b.real, b.sigma_f, b.noise_f = b.z, b.sigma, b.noise
    d.sample_batch = lambda: b
    d.G.register_forward_hook(look)
    d.step()
    return 64 * seen[0].grad


# ------------------------------------------------------------------------------------ Algorithm 1

def test_copy_weights_starts_the_student_at_the_teachers_denoiser():
    d = Distiller(Config())
    z, sigma = d.normal(2000), torch.full((2000, 1), 1.4)
    expected = d.teacher(sigma * z, sigma)
    assert (d.G(z) - expected).square().mean() < 2e-3 * expected.square().mean()
    close(d.fake(z, sigma)[0], d.teacher(z, sigma))         # and the fake score at the teacher's


@pytest.mark.parametrize("h, lam", [("kl", 5.0), ("be", 5.0), ("sba", -2.0)])
def test_update_is_eq_4(h, lam):
    """Compare the gradient in theta with -E[w(t) h''(r) r (s_phi - s_psi) dG/dtheta], summed sample
    by sample from Jacobians."""
    d, b = prepared(h=h, lam=lam, clip=2.0)
    with torch.no_grad():
        s_phi, s_psi, log_r = scores(d, noised(d, b), b.sigma)
    log_w = d.h.log_weight(log_r.clamp(-2, 2))
    w = log_w.exp() / log_w.exp().mean()
    by_hand = [torch.zeros_like(p) for p in d.G.parameters()]
    for i in range(32):
        along = -w[i] * b.sigma[i] * (s_phi[i] - s_psi[i])                          # Eq. (4)
        for j in range(2):
            dG = torch.autograd.grad(d.G(b.z[i:i + 1])[0, j], list(d.G.parameters()))
            for total, g in zip(by_hand, dG):
                total += along[j] * g / 64                  # the mean over samples and coordinates
    field(d, b)
    for p, expected in zip(d.G.parameters(), by_hand):
        close(p.grad, expected, rtol=1e-3, atol=1e-6)
    close(d.logged["ess"], 1 / w.square().mean())


def test_reward_update_is_the_corrected_eq_35():
    d, b = prepared(h="sba", lam=50.0, reward="linear", ess=0.9)
    x_t = noised(d, b)
    with torch.no_grad():
        s_phi, s_psi, log_r = scores(d, x_t, b.sigma)
    x = x_t.clone().requires_grad_()
    log_star = d.target.log_p(x, b.sigma) - d.teacher.log_p(x, b.sigma)
    grad, = torch.autograd.grad(log_star.sum(), x)
    lam = 50 * batch_weights(50 * log_r, 0.9)[2]        # h''(r) r = r^lam, tempered
    assert 0 < lam < 50
    w, w_star = (lam * log_r).exp(), (lam * log_star.detach().clamp(-5, 5)[:, None]).exp()
    expected = -(w * (s_phi - s_psi) + w_star * grad) / w.mean()
    close(field(d, b), b.sigma * expected, rtol=1e-4, atol=1e-5)


def test_teacher_free_update_is_the_corrected_eq_37_and_ignores_the_scores():
    d, b = prepared(teacher_free=True, h="be")
    x = noised(d, b).requires_grad_()
    r = (-d.fake(x, b.sigma)[1]).exp()
    grad, = torch.autograd.grad(r.sum(), x)
    second = 1 / r.detach() ** 2                                        # h'' of h = -log r
    w = second * r.detach()
    assert r.log().abs().max() < 5                                      # nothing is clipped
    close(field(d, b), b.sigma * second * grad / w.mean(), rtol=1e-3, atol=1e-5)


def test_gan_term_is_the_gradient_of_minus_log_D():
    (d, b), (plain, _) = prepared(gan=0.7), prepared()
    x_t = noised(d, b).requires_grad_()
    loss = -torch.sigmoid(d.fake(x_t, b.sigma)[1]).log().sum()
    grad, = torch.autograd.grad(loss, x_t)
    close(field(d, b) - field(plain, b), 0.7 * grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["level", "sample"])
def test_parts_of_the_weight(part):
    """The level's mean is a running one."""
    d, _ = prepared(h="sba", lam=2.0, part=part)
    log_mean, g = torch.zeros(16), torch.Generator().manual_seed(0)
    for d.updates in range(4):
        log_r = torch.linspace(1, -1, 32) + 0.3 * torch.randn(32, generator=g)
        level, sample = factorise(2 * log_r, log_mean, 1 / (1 + d.updates))
        w, *_ = batch_weights(level if part == "level" else sample)
        close(d.weights(log_r[:, None]), w[:, None])


def loss_by_hand(fake, b, x):
    """EDM's weighted denoising loss and two cross entropies, added up sample by sample."""
    total = 0
    for i in range(32):
        s, one = b.sigma_f[i:i + 1], slice(i, i + 1)
        D_x, logit = fake(x[one] + s * b.noise_f[one], s)
        _, real = fake(b.real[one] + s * b.noise_f[one], s)
        weight = (s ** 2 + 0.7 ** 2) / (s * 0.7) ** 2                               # EDM Table 1
        total += (weight * (D_x - x[one]) ** 2).mean() / 32
        total -= ((1 - logit.sigmoid()).log() + real.sigmoid().log()).squeeze() / 32
    return total


@pytest.mark.parametrize("n", [1, 2])
def test_fake_score_learns_edms_loss_and_eq_5(n):
    """Line 22 n times: on the step's batch, of G as it was, and on a fresh one, of G as it is."""
    d, _ = prepared(fake_updates=n)
    twin = copy.deepcopy(d)
    d.opt_f = torch.optim.SGD(d.fake.parameters(), 3e-3)    # Adam would enlarge rounding errors
    d.step()
    for _ in range(n):
        b = twin.sample_batch()
        loss = loss_by_hand(twin.fake, b, twin.G(b.z).detach())
        parameters = list(twin.fake.parameters())
        for p, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
            p.data -= 3e-3 * grad
        twin.G, twin.updates = d.G, d.updates               # step() has moved G, once
    for p, expected in zip(d.fake.parameters(), twin.fake.parameters()):
        close(p, expected, rtol=1e-5, atol=1e-6)
    close(d.logged["loss_score"] + d.logged["loss_class"], loss.detach(), rtol=1e-4, atol=0)
    assert d.updates == 1 and torch.equal(d.generator.get_state(), twin.generator.get_state())


def test_exact_ratio_is_the_truth_and_trains_no_classifier():
    d, b = prepared(ratio="exact")
    x_t, before = noised(d, b), d.fake.net[-1].weight.detach().clone()
    _, log_r = d.scores_and_ratio(x_t, b)
    exact = log_q(d.G, x_t, b.sigma) - d.teacher.log_p(x_t, b.sigma)
    assert (log_r - exact[:, None]).abs().max() < 0.1
    d.step()
    same = (d.fake.net[-1].weight == before).all(1)
    assert same.tolist() == [False, False, True]            # the score's two rows, and the logit's


# -------------------------------------------------------------------------------- what is measured

def test_classifier_is_judged_on_the_student_that_it_learns_from():
    """That is not the averaged one, which lies elsewhere."""
    d, _ = prepared()
    for p in d.ema.parameters():
        p.add_(1.0)
    state, sigma = d.generator.get_state(), torch.full((50, 1), 0.02)
    with torch.no_grad():
        x_t = d.G(d.normal(50)) + sigma * d.normal(50)
        exact, half = (log_q(d.G, x_t, sigma, cells) for cells in (128, 64))
        learned = -d.fake(x_t, sigma)[1][:, 0]
    d.generator.set_state(state)
    for got, expected in zip(compare_ratios(d, 0.02, 50),
                             (exact - d.teacher.log_p(x_t, sigma), learned, exact - half)):
        close(got, expected, rtol=1e-3, atol=1e-4)
        assert got.std() > 1e-3
    assert (d.samples(500).mean(0) - d.G(d.normal(500)).mean(0)).abs().min() > 0.3


def test_measured_divergences_of_a_student_that_is_known(monkeypatch):
    """Take G(z) = A z + b, without an average: both divergences by quadrature on a grid."""
    monkeypatch.setattr(toy2d, "log_q", lambda G, x_t, sigma, cells=64, splits=0: log_q(
        G, x_t, sigma, 64, splits))
    d = Distiller(Config(**TINY))
    d.G = torch.nn.Linear(2, 2)
    d.G.weight.data, d.G.bias.data = 0.5 * torch.eye(2), torch.tensor([0.2, 0.0])
    d.ema = d.G
    result = toy2d.measure(d)
    edge = torch.linspace(-3, 3, 241, dtype=torch.float64)
    grid, sigma = torch.cartesian_prod(edge, edge), torch.full((241 ** 2, 1), 0.05)
    log_p = d.target.log_p(grid, sigma)
    variance = 0.5 ** 2 + 0.05 ** 2
    square = (grid - torch.tensor([0.2, 0.0])).square().sum(1)
    normal = -square / (2 * variance) - math.log(2 * math.pi * variance)
    for key, a, b in (("kl_pq", log_p, normal), ("kl_qp", normal, log_p)):
        truth, gap = (a.exp() * (a - b)).sum() * 0.025 ** 2, a - b
        spread = ((a.exp() * gap ** 2).sum() * 0.025 ** 2 - truth ** 2).sqrt()
        close(result[key], truth.item(), rtol=0, atol=4 * spread.item() / 1000 ** 0.5 + 0.02)


def test_seeds_reproduce_bit_for_bit(coarse):
    (_, ra, sa, fa), (_, rb, sb, fb), (_, rc, *_) = [
        distil(Config(**TINY | dict(steps=40), seed=s)) for s in (3, 3, 4)]
    assert ra | dict(seconds=0) == rb | dict(seconds=0) and torch.equal(sa, sb)
    assert all((fa[k] == fb[k]).all() for k in fa) and ra["kl_pq"] != rc["kl_pq"]
    assert len(ra["history"]) == 40 and sa.shape == (40 * 32,)
    steps = fa["step"].tolist()                             # dense where the logarithm is: 1.2^i
    assert steps[:6] == [1, 2, 3, 4, 5, 6] and steps[-3:] == [30, 35, 40]
    assert fa["x"].shape == (len(steps), 200, 2) and fa["log_r"].shape == (len(steps), 3, 200)


def test_it_learns():
    """In 300 small steps the student moves from the denoiser's blur to the modes."""
    d = Distiller(Config(steps=300, batch=128, width=48))
    before = mode_statistics(d.samples(2000), d.target)["on_mode"]
    for _ in range(300):
        d.step()
    stats = mode_statistics(d.samples(2000), d.target)
    assert stats["on_mode"] > before + 0.1 and stats["modes_covered"] >= 6


def test_a_loss_that_is_not_finite_is_named():
    d = Distiller(Config(**TINY))
    d.fake.net[-1].bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1: score_gap is nan at sigma = 0."):
        d.step()


# ----------------------------------------------------------------------------------------- options

OPTIONS = [
    dict(h="sba", lam=10), dict(ratio="exact"), dict(gan=0.5), dict(teacher_free=True),
    dict(reward="linear"), dict(norm="two-stage"), dict(part="level"), dict(part="sample"),
    dict(clip=0.0), dict(target="grid25"), dict(lr_g=2e-3), dict(lr_f=1e-3), dict(sigma_min=0.1),
    dict(sigma_max=1.0), dict(init_steps=6), dict(batch=33), dict(fake_updates=2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_and_changes_the_student(options):
    d, plain = (Distiller(Config(**TINY | dict(h="ls") | some)) for some in (options, {}))
    for _ in range(6):
        d.step()
        plain.step()
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert d.ema(z).isfinite().all() and (d.ema(z) != plain.ema(z)).any()


@pytest.mark.parametrize("options", [{}, dict(sigma_max=0.1), dict(sigma_min=0.6), dict(anneal=0)])
def test_noise_levels_rise_within_their_range(options):
    d = Distiller(Config(**TINY | options))
    lowest = []
    for d.updates in (0, 1, d.cfg.steps):
        sigma = d.noise_levels(32)[:, 0]
        assert (sigma.diff() >= 0).all()
        assert d.cfg.sigma_min * 0.999 < sigma[0] and sigma[-1] < d.cfg.sigma_max * 1.001
        lowest.append(sigma[0].item())
    if not options:                                 # --anneal: sigma_min comes down from 0.5
        assert lowest[0] > 0.49 and lowest[0] > lowest[1] > lowest[2] and lowest[2] < 0.03


# ------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize("args, name", [(["--h", "SBA", "--lam", "5"], "toy2d_sba_5"),
                                        (["--ratio", "exact"], "toy2d_kl")])
def test_command_line(tmp_path, monkeypatch, capsys, coarse, args, name):
    monkeypatch.chdir(tmp_path)
    toy2d.main([*args, *TINY_OPTIONS])
    folder = tmp_path / "runs" / name
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == [
        "frames.npz", "picture.png", "result.json", "samples.npy"]
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    result = json.loads((folder / "result.json").read_text())
    assert result["config"]["steps"] == 6 and (result["log_r_error"] is None) == ("exact" in args)
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert np.isfinite(np.load(folder / "samples.npy")).sum() == 6000
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith(f"{result['modes_covered']} of 8 modes, TV {result['mode_tv']:.3f}")


@pytest.mark.parametrize("args, message", [
    ("--h sba --lam 1e9", "lam .* -50 to 50"), ("--lam 10", "add --h sba"),
    ("--sigma-min 3", "--sigma-min"), ("--part level --reward linear", "choose"),
    ("--ratio exact --gan 1", "--gan.*--ratio"), ("--gan 1 --reward linear", "no --reward"),
    ("--out file/x", "file")])
def test_bad_input_is_refused_before_the_run(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match=message):
        toy2d.main([*TINY_OPTIONS, *args.split()])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


