"""Compare the updates of toy2d.py with their formulas, and run it."""
import copy
import json
import math

import pytest
import torch

import toy2d
from bregman import batch_weights, two_stage
from plane import log_q
from toy2d import Config, Distiller, compare_ratios

TINY = dict(steps=6, batch=32, width=16, init_steps=5)
TINY_OPTIONS = "--steps 6 --batch 32 --width 16 --init-steps 5".split()
close = torch.testing.assert_close


@pytest.fixture
def coarse(monkeypatch):
    """Measure with 16 x 16 cells in place of 128 x 128, which test_plane.py tests, and give the
    next test its denormals back, which toy2d.main takes for 0."""
    monkeypatch.setattr(toy2d, "log_q", lambda G, x_t, sigma, *_: log_q(G, x_t, sigma, 16, 0))
    yield
    torch.set_flush_denormal(False)


def prepared(**options):
    """Return a Distiller whose fake network is no longer at its start, and its next batch."""
    d = Distiller(Config(**TINY | dict(sigma_min=0.1, sigma_max=1.5, anneal=0.0) | options))
    g = torch.Generator().manual_seed(5)
    for p in d.fake.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g)
    return d, d.sample_batch()


@torch.no_grad()
def scores(d, b):
    """Return x_t, s_phi, s_psi and log r of a batch, each from its definition."""
    x_t = d.G(b.z) + b.sigma * b.noise
    D_fake, logit = d.fake(x_t, b.sigma)
    return x_t, d.teacher.score(x_t, b.sigma), (D_fake - x_t) / b.sigma ** 2, -logit


def field(d, b):
    """Take one step with the batch b. Return the gradient that reached x = G(z), (32, 2), of a sum
    over the 64 numbers of x, where step() takes a mean."""
    seen = []

    def look(module, args, x):
        if x.requires_grad:
            x.register_hook(seen.append)

    d.sample_batch = lambda: b
    d.G.register_forward_hook(look)
    d.step()
    return 64 * seen[0]


# ------------------------------------------------------------------------------------ Algorithm 1

def test_copy_weights_starts_the_student_at_the_teachers_denoiser():
    d = Distiller(Config())
    z, sigma = d.normal(2000), torch.full((2000, 1), 1.4)
    expected = d.teacher(sigma * z, sigma)
    assert (d.G(z) - expected).square().mean() < 2e-3 * expected.square().mean()
    close(d.fake(z, sigma)[0], d.teacher(z, sigma))         # and the fake score at the teacher's


@pytest.mark.parametrize("options", [
    dict(h="kl"), dict(h="be"), dict(h="sba", lam=-2.0), dict(h="sba", lam=3.0, ratio="exact")])
def test_update_is_eq_4(options):
    d, b = prepared(clip=2.0, **options)
    x_t, s_phi, s_psi, log_r = scores(d, b)
    if d.cfg.ratio == "exact":                              # with the cells of training
        log_r = (log_q(d.G, x_t, b.sigma, 32, 0) - d.teacher.log_p(x_t, b.sigma))[:, None]
    w = d.h.weight(log_r.clamp(-2, 2))
    w /= w.mean()
    close(field(d, b), -w * b.sigma * (s_phi - s_psi), rtol=1e-4, atol=1e-5)
    close(d.logged["ess"], 1 / w.square().mean())
    assert (d.logged["loss_class"] == 0) == (d.cfg.ratio == "exact")


def test_reward_update_is_the_corrected_eq_35():
    d, b = prepared(h="sba", lam=50.0, reward="linear", ess=0.9)
    x, s_phi, s_psi, log_r = scores(d, b)
    x.requires_grad_()
    log_star = d.target.log_p(x, b.sigma) - d.teacher.log_p(x, b.sigma)
    grad, = torch.autograd.grad(log_star.sum(), x)
    lam = 50 * batch_weights(50 * log_r, 0.9)[2]        # h''(r) r = r^lam, tempered
    assert 0 < lam < 50
    w, w_star = (lam * log_r).exp(), (lam * log_star.detach().clamp(-5, 5)[:, None]).exp()
    expected = -(w * (s_phi - s_psi) + w_star * grad) / w.mean()
    close(field(d, b), b.sigma * expected, rtol=1e-4, atol=1e-5)


def test_teacher_free_update_is_the_corrected_eq_37_and_ignores_the_scores():
    d, b = prepared(teacher_free=True, h="be")
    x = scores(d, b)[0].requires_grad_()
    r = (-d.fake(x, b.sigma)[1]).exp()
    grad, = torch.autograd.grad(r.sum(), x)
    second = 1 / r.detach() ** 2                                        # h'' of h = -log r
    w = second * r.detach()
    assert r.log().abs().max() < 5                                      # nothing is clipped
    close(field(d, b), b.sigma * second * grad / w.mean(), rtol=1e-3, atol=1e-5)


def test_gan_term_is_the_gradient_of_minus_log_D():
    (d, b), (plain, _) = prepared(gan=0.7), prepared()
    x_t = scores(d, b)[0].requires_grad_()
    loss = -torch.sigmoid(d.fake(x_t, b.sigma)[1]).log().sum()
    grad, = torch.autograd.grad(loss, x_t)
    close(field(d, b) - field(plain, b), 0.7 * grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part, norm", [
    ("level", "batch"), ("sample", "batch"), ("both", "two-stage")])
def test_weights_of_a_first_batch(part, norm):
    """Of which the running means at each level are the batch's own."""
    d, _ = prepared(h="sba", lam=2.0, part=part, norm=norm)
    log_r = torch.linspace(1, -1, 32)
    w = (2 * log_r).exp()
    level = w.view(16, 2).mean(1).repeat_interleave(2)
    both = (2 * two_stage(log_r)).exp()
    expected = {"level": level, "sample": w / level, "both": both}[part]
    close(d.weights(log_r[:, None])[:, 0], expected / expected.mean())


def loss_by_hand(fake, b, x):
    """EDM's weighted denoising loss and two cross entropies."""
    s, noise = b.sigma_f, b.sigma_f * b.noise_f
    D_x, logit = fake(x + noise, s)
    _, real = fake(b.real + noise, s)
    weight = (s ** 2 + 0.7 ** 2) / (s * 0.7) ** 2                                   # EDM Table 1
    cross_entropies = -(1 - logit.sigmoid()).log() - real.sigmoid().log()
    return (weight * (D_x - x) ** 2).mean() + cross_entropies.mean()


def test_fake_score_learns_edms_loss_and_eq_5():
    """Line 22 twice: on the step's batch, of G as it was, and on a fresh one, of G as it is."""
    d, _ = prepared(fake_updates=2)
    twin = copy.deepcopy(d)
    d.opt_f = torch.optim.SGD(d.fake.parameters(), 3e-3)    # Adam would enlarge rounding errors
    d.step()
    for _ in range(2):
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


def test_average_follows_the_student():
    d, _ = prepared()
    start = copy.deepcopy(d.ema)
    d.step()
    assert (d.G[0].weight != start[0].weight).any()
    close(d.ema[0].weight, start[0].weight.lerp(d.G[0].weight.detach(), 10 / 11))


@pytest.mark.parametrize("low, high, first", [(0.02, 2, 0.5), (0.02, 0.1, 0.1), (0.6, 2, 0.6)])
def test_noise_levels_rise_within_their_range(low, high, first):
    """One in each of n equal steps of ln sigma. --anneal: the lowest comes down from 0.5."""
    d = Distiller(Config(**TINY, sigma_min=low, sigma_max=high))
    for d.updates, lowest in ((0, first), (d.cfg.steps, low)):
        step = math.log(high / lowest) / 32
        place = (d.noise_levels(32)[:, 0] / lowest).log() - step * torch.arange(32)
        assert (place > -1e-5).all() and (place < step + 1e-5).all()


# -------------------------------------------------------------------------------- what is measured

def test_classifier_is_judged_on_the_student_that_it_learns_from():
    """That is not the averaged one, which lies elsewhere."""
    d, _ = prepared()
    for p in d.ema.parameters():
        p.add_(1.0)
    state, sigma = d.generator.get_state(), torch.full((50, 1), 0.02)
    found = compare_ratios(d, 0.02, 50)
    d.generator.set_state(state)
    x_t = (d.G(d.normal(50)) + sigma * d.normal(50)).detach()
    exact, half = (log_q(d.G, x_t, sigma, cells) for cells in (128, 64))
    learned = -d.fake(x_t, sigma)[1][:, 0].detach()
    close(found, (exact - d.teacher.log_p(x_t, sigma), learned, exact - half), rtol=1e-3, atol=1e-4)


def test_measured_divergences_of_a_student_that_is_known(monkeypatch):
    """Take G(z) = A z + b, without an average: both divergences by quadrature on a grid."""
    monkeypatch.setattr(toy2d, "log_q", lambda G, x_t, sigma, *_: log_q(G, x_t, sigma, 64, 0))
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


@pytest.mark.parametrize("option", [
    dict(lr_g=1e-4), dict(lr_f=1e-4), dict(batch=16), dict(init_steps=6), dict(target="grid25"),
    dict(fake_updates=2), dict(seed=1)])
def test_an_option_changes_the_student(option):
    one, other = (Distiller(Config(**TINY | options)) for options in ({}, option))
    for _ in range(3):
        one.step()
        other.step()
    assert not torch.equal(one.ema(torch.ones(1, 2)), other.ema(torch.ones(1, 2)))


def test_a_loss_that_is_not_finite_is_named():
    d = Distiller(Config(**TINY))
    d.fake.net[-1].bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1: score_gap .* sigma"):
        d.step()


# ------------------------------------------------------------------------------------ command line

@pytest.mark.parametrize("args, name", [(["--h", "SBA", "--lam", "5"], "toy2d_sba_5"),
                                        (["--ratio", "exact"], "toy2d_kl")])
def test_a_run_is_the_same_again_bit_for_bit(tmp_path, monkeypatch, capsys, coarse, args, name):
    monkeypatch.chdir(tmp_path)
    toy2d.main([*args, *TINY_OPTIONS])
    toy2d.main([*args, *TINY_OPTIONS, "--out", "again"])
    first, again = tmp_path / "runs" / name, tmp_path / "again"
    for file in ("samples.npy", "frames.npz", "picture.png"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (first, again))
    assert a | dict(seconds=0) == b | dict(seconds=0)
    assert (a["log_r_error"] is None) == ("exact" in args) and len(a["history"]) == 6
    assert f"{a['modes_covered']} of 8 modes" in capsys.readouterr().out


@pytest.mark.parametrize("args, word", [
    ("--h sba --lam 1e9", "lam"), ("--lam 10", "--h sba"), ("--sigma-min 3", "--sigma-max"),
    ("--part level --reward linear", "--part"), ("--ratio exact --gan 1", "--gan"),
    ("--out file/x", "file")])
def test_bad_input_is_refused_before_the_run(tmp_path, monkeypatch, coarse, args, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match=word):
        toy2d.main([*TINY_OPTIONS, *args.split()])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
