"""Compare the updates of toy2d.py with their formulas, sample by sample, and run every option."""
import copy
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import toy2d
from bregman import NAMES, batch_weights, factorise
from plane import log_q, mode_statistics
from toy2d import Config, Distiller, compare_ratios, distil

TINY = dict(steps=6, batch=32, width=16, init_steps=5)
TINY_OPTIONS = "--steps 6 --batch 32 --width 16 --init-steps 5".split()
close = torch.testing.assert_close
ROWS = [n for n in NAMES if n != "sba"]


@pytest.fixture(autouse=True)
def threads():
    """Give the next test its own threads and denormals back, which toy2d.main changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.fixture
def coarse(monkeypatch):
    """Measure with 16 x 16 cells in place of 128 x 128, which test_plane.py tests."""
    monkeypatch.setattr(toy2d, "log_q", lambda G, x_t, sigma, cells=128, splits=2: log_q(
        G, x_t, sigma, max(2, cells // 8), 0))


def trained(**options):
    """Return a Distiller after all its steps, and what each of them logged."""
    d = Distiller(Config(**TINY | options))
    return d, [d.step() or dict(d.logged) for _ in range(d.cfg.steps)]


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
    z, sigma = d.normal(2000), torch.full((2000, 1), d.cfg.sigma_init)
    expected = d.teacher(sigma * z, sigma)
    assert (d.G(z) - expected).square().mean() < 2e-3 * expected.square().mean()
    close(d.fake(z, sigma)[0], d.teacher(z, sigma))         # and the fake score at the teacher's


@pytest.mark.parametrize("h, lam", [(n, 5.0) for n in ROWS] + [("sba", 5.0), ("sba", -2.0)])
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
    """Either part has mean one in the batch; the level's mean is a running one."""
    d, _ = prepared(h="sba", lam=2.0, part=part)
    log_mean, g = torch.zeros(16), torch.Generator().manual_seed(0)
    for step in range(4):
        log_r = torch.linspace(1, -1, 32)[:, None] + 0.3 * torch.randn(32, 1, generator=g)
        w = d.weights(log_r)
        parts = dict(zip(("level", "sample"), factorise(2 * log_r[:, 0], log_mean, 1 / (1 + step))))
        close(w, batch_weights(parts[part])[0][:, None])
        close(w.mean(), torch.tensor(1.0))
        d.updates += 1
    by_level = w.view(16, 2)                                # noise levels rise in the batch
    if part == "level":                                     # weight goes where log r is larger
        assert (by_level[:, 0] == by_level[:, 1]).all() and w[:8].mean() > 5 * w[-8:].mean()
    else:
        assert 0.5 < w[:16].mean() / w[16:].mean() < 2


def test_fake_loss_is_edms_and_eq_5():
    """Add up EDM's weighted denoising loss and two cross entropies, sample by sample."""
    d, b = prepared()
    b.sigma_f, b.noise_f, b.real = b.sigma, b.noise, 0.5 * b.z.flip(0)
    x, total = d.G(b.z).detach(), 0
    for i in range(32):
        s, one = b.sigma[i:i + 1], slice(i, i + 1)
        D_x, logit = d.fake(x[one] + s * b.noise[one], s)
        _, real = d.fake(b.real[one] + s * b.noise[one], s)
        weight = (s ** 2 + 0.7 ** 2) / (s * 0.7) ** 2                               # EDM Table 1
        total += (weight * (D_x - x[one]) ** 2).mean() / 32
        total -= ((1 - logit.sigmoid()).log() + real.sigmoid().log()).squeeze() / 32
    close(d.fake_loss(x, b), total, rtol=1e-4, atol=0)


def test_two_fake_updates_by_hand():
    """Line 22 twice: on the step's batch, of G as it was, and on a fresh one, of G as it is now."""
    d, _ = prepared(fake_updates=2)
    other = copy.deepcopy(d)
    d.opt_f = torch.optim.SGD(d.fake.parameters(), 3e-3)    # Adam would enlarge rounding errors
    d.step()
    first = other.sample_batch()
    x = [other.G(first.z).detach()]
    other.G, other.updates = d.G, d.updates                 # step() has moved G, once
    second = other.sample_batch()
    x.append(other.G(second.z).detach())
    opt = torch.optim.SGD(other.fake.parameters(), 3e-3)
    for x, b in zip(x, (first, second)):
        noise = b.sigma_f * b.noise_f
        (D_x, logit), (_, real) = (other.fake(y + noise, b.sigma_f) for y in (x, b.real))
        weight = (b.sigma_f ** 2 + 0.7 ** 2) / (b.sigma_f * 0.7) ** 2               # EDM Table 1
        score = (weight * (D_x - x) ** 2).mean()
        loss = score - (1 - logit.sigmoid()).log().mean() - real.sigmoid().log().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    for p, expected in zip(d.fake.parameters(), other.fake.parameters()):
        close(p, expected, rtol=1e-5, atol=1e-6)
    close(d.logged["loss_score"], score.detach())           # logged are the last update's losses
    assert d.updates == 1 and torch.equal(d.generator.get_state(), other.generator.get_state())


def test_exact_ratio_trains_no_classifier(coarse):
    d, result, _, frames = distil(Config(**TINY, ratio="exact"), bar=False)
    assert result["log_r_error"] is None and result["log_r_error_by_sigma"] == {}
    assert len(result["discretisation_error_by_sigma"]) == 8
    assert (d.fake.net[-1].weight[2] == 0).all() and d.fake.net[-1].bias[2] == 0
    assert (d.fake.net[-1].weight[:2] != 0).any()           # the scores are trained
    assert np.abs(frames["log_r"]).max() > 0.1              # and what is recorded is the truth


def test_exact_ratio_is_the_truth_in_training():
    d, b = prepared(ratio="exact")
    x_t = noised(d, b)
    _, log_r = d.scores_and_ratio(x_t, b)
    close(log_r, d.exact_log_r(d.G, x_t, b.sigma, 32, splits=0))
    assert (log_r - d.exact_log_r(d.G, x_t, b.sigma, 128)).abs().max() < 0.1


# -------------------------------------------------------------------------------- what is measured

def test_classifier_is_judged_on_the_student_that_it_learns_from():
    """That is not the averaged one, which lies elsewhere."""
    d, _ = prepared()
    for p in d.ema:
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
    d.ema = [p.detach() for p in d.G.parameters()]
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
    (a, ra, sa, fa), (b, rb, sb, fb), (c, *_) = [
        distil(Config(**TINY, seed=s), frames=4, points=20, bar=False) for s in (3, 3, 4)]
    assert all(torch.equal(x, y) for x, y in zip(a.ema, b.ema)) and torch.equal(sa, sb)
    assert not torch.equal(a.ema[0], c.ema[0])
    assert ra | dict(seconds=0) == rb | dict(seconds=0)
    assert all((fa[k] == fb[k]).all() for k in fa)
    assert len(ra["history"]) == 6 and sa.shape == (6 * 32,)
    assert fa["step"].tolist() == [1, 2, 4, 6]              # up from 1, 1.8, 3.3, 6
    assert fa["x"].shape == (4, 20, 2) and fa["log_r"].shape == (4, 3, 20)


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
    d = Distiller(Config(**TINY))
    d.fake.net[-1].bias.data[2] = math.inf
    with pytest.raises(FloatingPointError, match="step 1: log_r is inf at sigma = "):
        d.step()


# ----------------------------------------------------------------------------------------- options

@pytest.fixture(scope="module")
def plain():
    return trained(h="ls")[0].ema


OPTIONS = [
    dict(h="sba", lam=10), dict(ratio="exact"), dict(gan=0.5), dict(teacher_free=True),
    dict(reward="linear"), dict(norm="two-stage"), dict(part="level"), dict(part="sample"),
    dict(clip=0.0), dict(target="grid25"), dict(anneal=0.0), dict(lr_g=2e-3), dict(lr_f=1e-3),
    dict(fake_updates=2), dict(ema=0.2), dict(sigma_init=1.0), dict(sigma_min=0.1),
    dict(sigma_max=1.0), dict(init_steps=6), dict(batch=33), dict(seed=1)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_and_changes_the_student(options, plain):
    d, logged = trained(**dict(h="ls") | options)
    for name in ("log_r", "ess", "loss_score", "loss_class"):
        assert all(step[name].isfinite().all() for step in logged)
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(d.ema, plain))


def test_ess_keeps_the_effective_sample_size():
    """A new classifier's log r is small, so it takes a large lambda to spread the weights."""
    free, tempered = (trained(h="sba", lam=50, ess=least)[1] for least in (0.0, 0.999))
    assert min(step["ess"] for step in free) < 0.998
    assert min(step["ess"] for step in tempered) >= 0.9989


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
    assert set("h lam seed modes modes_covered mode_tv on_mode kl_pq kl_qp log_r_error ess seconds"
               .split()) <= set(result)
    assert result["h"] == name.split("_")[1] and result["config"]["steps"] == 6
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    samples = np.load(folder / "samples.npy")
    assert samples.shape == (3000, 2) and np.isfinite(samples).all()
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith(f"{result['modes_covered']} of 8 modes, TV {result['mode_tv']:.3f}")


def test_help_lists_choices_and_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        toy2d.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"--h {{{','.join(NAMES)}}} the row of Table 1 (kl)" in said
    assert "--part {both,level,sample} both: the whole weight; level: its mean" in said
    assert "--fake-updates FAKE_UPDATES updates of fake score" in said and "runs/toy2d_H" in said


@pytest.mark.parametrize("args, message", [
    ("--h kll", "--h.*kll"), ("--lam nan", "--lam"), ("--h sba --lam 1e9", "lam .* -50 to 50"),
    ("--lam 10", "add --h sba"), ("--norm two-stage --batch 19", "--norm two-stage .*--batch"),
    ("--steps -1", "--steps"), ("--out file/x", "file"), ("--part level --reward linear", "choose"),
    ("--target ring9", "--target.*ring9"), ("--sigma-min 3", "--sigma-min"), ("--ess 2", "--ess"),
    ("--part level --batch 15", "--part .*--batch"), ("--part level --norm two-stage", "choose"),
    ("--fake-updates 0", "--fake-updates.* from 1 to 100, not '0'"), ("--bach 3", "--bach"),
    ("--fake-updates 101", "--fake-updates"), ("--ratio exact --gan 1", "--gan.*--ratio")])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises((SystemExit, ValueError, OSError)) as e:
        toy2d.main([*TINY_OPTIONS, *args.split()])
    said = capsys.readouterr().err if e.type is SystemExit else f"toy2d.py: {e.value}"
    assert re.fullmatch(f"toy2d.py: .*{message}.*", said.strip()), said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_input_ends_with_status_2(tmp_path):
    done = subprocess.run([sys.executable, toy2d.__file__, "--sigma-min", "3"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == "toy2d.py: --sigma-min must be below --sigma-max\n"
