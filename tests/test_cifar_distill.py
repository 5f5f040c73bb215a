"""cifar_distill.py: the update against Eq. (4), sample by sample, its random numbers, weights and
state. Whole runs are in test_runs.py."""
import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bregman
from cifar_distill import Config, Distiller
from edm import Guided
from ncsnpp import CONFIGS, EDMPrecond
from test_edm import equal
from test_ncsnpp import fill

IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 8, 8), np.uint8))
LABELS = torch.arange(40) % 3
TINY = CONFIGS["compact"] | dict(model_channels=4, channel_mult=[1, 1], attn_resolutions=[])
close = torch.testing.assert_close


def teacher(label_dim=0, resolution=8):
    """A network of random weights: its update is as exact as a trained one's."""
    net = EDMPrecond(**TINY, resolution=resolution, label_dim=label_dim)
    return fill(net).requires_grad_(False)


def distiller(net=None, images=IMAGES, labels=None, amp="no", **options):
    """One whose fake score network and generator have left the teacher, so that no gap is zero."""
    cfg = Config(**dict(batch=8, wait_kimg=0.0, device="cpu", ess=0.0, norm="batch") | options)
    cfg.amp = amp                       # after its check: on a CPU fp16 is refused, but it computes
    d = Distiller(cfg, net or teacher(), images, labels)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*d.fake.parameters(), *d.G.parameters()]:
            p += 0.05 * torch.randn(p.shape, generator=g) * p.abs().mean()
    return d


def before_step(d, batches=None):
    """Return the next step's random numbers (of so many batches), and G and fake as they are."""
    state, nets = d.generator.get_state(), copy.deepcopy((d.G, d.fake))
    drawn = [d.sample_batch() for _ in range(batches or 1)]
    d.generator.set_state(state)
    return drawn if batches else drawn[0], *nets


def parameters(net):
    """All but map_augment's, whose gradients are None: no image has augmentation labels."""
    return [p for name, p in net.named_parameters() if "augment" not in name]


def gradients(net):
    return [p.grad.clone() for p in parameters(net) if p.grad is not None]


def assert_gradients(net, expected, rtol=2e-5):
    """Of all parameters, to `rtol` of the largest number."""
    size = max(e.abs().max().item() for e in expected if e is not None)
    assert size > 1e-6
    for p, e in zip(parameters(net), expected, strict=True):
        close(p.grad, e, rtol=0, atol=rtol * size)


# ------------------------------------------------------------------------- the update, in detail

@pytest.mark.parametrize("h, lam, w_t", [
    ("kl", 0, "c_out"), ("be", -1, "c_out"), ("sba", 5, "c_out"), ("sba", 3, "dmd")])
def test_update_is_eq_4(h, lam, w_t):
    """One sample at a time, from the scores, with the weight r^lam of these h, in place of log
    weights of a batch and the difference of two networks. All networks get the labels to generate.
    """
    d = distiller(teacher(3), labels=LABELS, h=h, lam=lam if h == "sba" else Config.lam, w_t=w_t,
                  clip=50)
    b, G, fake = before_step(d)
    d.step()
    terms, weights = [], []
    for i in range(8):
        sigma, c = b.sigma[i:i + 1], b.c[i:i + 1]
        x = G(2.5 * b.z[i:i + 1], 2.5, c)
        x_t = (x + sigma * b.noise[i]).detach()
        D_fake, l = fake(x_t, sigma, c, return_logits=True)
        D_real = d.teacher(x_t, sigma, c)
        s_fake, s_real = ((D - x_t) / sigma ** 2 for D in (D_fake, D_real))
        w_t_sigma = sigma ** 2 / (x - D_real).abs().mean() if w_t == "dmd" else (
            sigma * (sigma ** 2 + 0.25).sqrt() / 0.5)
        terms.append(torch.autograd.grad(x, parameters(G),
                                         -(w_t_sigma * (s_real - s_fake)).detach()))
        weights.append((-l.mean().double()).exp().item() ** lam)
    weights = np.array(weights) / np.mean(weights)
    assert_gradients(d.G, [sum(w * t for w, t in zip(weights, each)) / (8 * 192)
                           for each in zip(*terms)], rtol=2e-4)      # a score divides by sigma^2


def test_adversarial_update_is_the_gradient_of_minus_log_D():
    """Where the fake score is the teacher's, Eq. (4) is zero, and line 13 alone is left."""
    d = distiller(gan=0.3)
    d.teacher.load_state_dict(d.fake.state_dict())
    b, G, fake = before_step(d)
    d.step()
    logits = fake.encode(G(2.5 * b.z, 2.5) + b.sigma * b.noise, b.sigma)
    loss = -0.3 * torch.sigmoid(logits.mean((1, 2))).log().mean()
    assert_gradients(d.G, torch.autograd.grad(loss, parameters(G)))


def test_teacher_free_update_is_eq_37_with_its_sign_corrected():
    """And never a look at the teacher."""
    d = distiller(h="sba", lam=2, teacher_free=True)
    b, G, fake = before_step(d)
    d.teacher.forward = None
    d.step()
    x = G(2.5 * b.z, 2.5)
    x_t = (x + b.sigma * b.noise).detach().requires_grad_()
    log_r = -fake.encode(x_t, b.sigma).mean((1, 2))
    grad, = torch.autograd.grad(log_r.sum(), x_t)
    w = log_r.detach().clamp(-5, 5).mul(2).softmax(0)               # h'' grad r = r^lam grad log r
    w_t = b.sigma * (b.sigma ** 2 + 0.25).sqrt() / 0.5
    expected = torch.autograd.grad(x, parameters(G), w[:, None, None, None] * w_t * grad / 192)
    assert_gradients(d.G, expected)


def loss_by_hand(fake, b, x):
    """EDM's loss and Eq. (5) of images x, one at a time, with torch's own cross-entropy."""
    total = 0
    for i in range(8):
        s, noise = b.sigma_f[i].item(), b.sigma_f[i] * b.noise_f[i]
        D_x, l = fake(x[i:i + 1] + noise, s, b.c[i:i + 1], return_logits=True)
        l_real = fake.encode(b.real[i:i + 1] + noise, s, b.c_real[i:i + 1])
        total += (s ** 2 + 0.5 ** 2) / (s * 0.5) ** 2 * (D_x - x[i]).square().mean() / 8
        for logits, label in ((l, 0.0), (l_real, 1.0)):             # 1 for real: l = log p/q
            total += F.binary_cross_entropy_with_logits(
                logits, torch.full_like(logits, label)) / 8
    return total


@pytest.mark.parametrize("n, wait", [(1, 0.0), (2, 0.0), (3, 1.0)])
def test_fake_score_learns_edms_loss_and_eq_5(n, wait):
    """Lines 16 to 22, N times by --fake-updates N, by a twin of the network and of its Adam: the
    first on the step's own images, each later one on new images of the generator as it is then."""
    d = distiller(teacher(3), labels=LABELS, fake_updates=n, lr_f=0.1, wait_kimg=wait)
    batches, G, fake = before_step(d, n + 1)
    adam = torch.optim.Adam(parameters(fake), 0.1, betas=(0.0, 0.999), eps=1.0)
    d.opt_f.param_groups[0]["eps"] = 1.0    # else Adam makes the sign of rounding an update
    start = [p.detach().clone() for p in parameters(fake)]
    d.step()
    losses = []
    for i, b in enumerate(batches[:n]):
        x = (d.G if i else G)(2.5 * b.z, 2.5, b.c).detach()
        losses.append(loss_by_hand(fake, b, x))
        adam.zero_grad()
        losses[-1].backward()
        adam.step()
    size = max((p - q).abs().max() for p, q in zip(parameters(fake), start)).item()
    for p, expected in zip(parameters(d.fake), parameters(fake), strict=True):
        close(p, expected, rtol=0, atol=1e-4 * size)
    means = d.averages()
    close(means["loss_score"] + means["loss_class"], sum(losses).item() / n, rtol=1e-4, atol=0)
    assert size > 1e-3 and (d.seen, d.updates) == (8, 0 if wait else 1)
    assert torch.equal(d.sample_batch().z, batches[n].z)            # no more was drawn


@pytest.mark.parametrize("amp, error", [("bf16", 0.2), ("fp16", 0.03)])
def test_autocast_gives_the_same_update(amp, error):
    """Up to rounding, which the score gap, a difference, magnifies. fp16's scale is out of the
    gradients again."""
    exact, rounded = distiller(), distiller(amp=amp)
    exact.step()
    rounded.step()
    for net in ("G", "fake"):
        a, b = (torch.cat([g.flatten() for g in gradients(getattr(d, net))])
                for d in (exact, rounded))
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b).norm() < error * a.norm()


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, again = (distiller(gradient_checkpointing=on, gan=0.1) for on in (False, True))
    entered = []
    again.G.model.enc["8x8_block0"].register_forward_pre_hook(lambda *_: entered.append(1))
    plain.step()
    again.step()
    assert len(entered) == 2                        # and once more in the backward pass
    for net in ("G", "fake"):
        for a, b in zip(*(gradients(getattr(d, net)) for d in (plain, again)), strict=True):
            close(b, a, rtol=1e-5, atol=1e-8)


def test_grad_clip_bounds_each_number_of_the_fake_scores_gradient_alone():
    d = distiller(grad_clip=1e-6)
    d.step()
    G, fake = (max(g.abs().max().item() for g in gradients(net)) for net in (d.G, d.fake))
    assert G > 1e-4 and fake == pytest.approx(1e-6)


def test_generator_waits_and_rates_fall():
    d = distiller(wait_kimg=0.016, decay_kimg=0.016, lr_g=1e-3, lr_f=3e-3)
    start, rates = copy.deepcopy(dict(d.G.state_dict())), []
    for still in (True, True, False, False):
        d.step()
        assert equal(dict(d.G.state_dict()), start) == still
        rates += [(d.opt_g.param_groups[0]["lr"], d.opt_f.param_groups[0]["lr"])]
    close(torch.tensor(rates), torch.tensor([[1e-3, 3e-3]]) / torch.tensor(
        [1, 1, 1, 1.5])[:, None])
    assert d.seen == 32 and d.updates == 2


def test_average_has_its_half_life_and_holds_no_graph():
    """A graph through the average would grow with every step. The half-life is ema_kimg, at most a
    tenth of the images since the generator moves: at first the average follows at once."""
    d = distiller(ema_kimg=0.004)
    for d.updates, life in ((0, 0.8), (1, 1.6), (1000, 4.0)):
        ema = copy.deepcopy(d.ema.model.map_layer0.weight)
        d.step()
        close(d.ema.model.map_layer0.weight,
              ema.lerp(d.G.model.map_layer0.weight, 1 - 0.5 ** (8 / life)).detach())
    assert not any(p.requires_grad for p in d.ema.parameters())


# ----------------------------------------------------------------------------- random numbers

@pytest.mark.parametrize("t_min, t_max", [(0.0, 0.8), (0.15, 1.0)])
def test_noise_levels(t_min, t_max):
    """One in each of `batch` equal steps of a share of EDM's grid, rising; those of the fake score
    network are log-normal."""
    d = distiller(batch=4000, images=IMAGES[..., :2, :2], t_min=t_min, t_max=t_max, p_mean=-0.6,
                  p_std=1.6)
    b = d.sample_batch()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    u = (b.sigma.flatten() ** (1 / 7) - low) / (high - low)
    assert b.sigma.shape == b.sigma_f.shape == (4000, 1, 1, 1) and (u.diff() > 0).all()
    close(u, torch.linspace(t_min, t_max, 4000), rtol=0, atol=3e-4)
    logs = b.sigma_f.log().flatten()
    close(torch.stack([logs.mean(), logs.std()]), torch.tensor([-0.6, 1.6]), rtol=0, atol=0.08)


@pytest.mark.parametrize("flip", [True, False])
def test_images_keep_their_labels_and_are_mirrored_half_the_time_or_never(flip):
    """The images say their labels themselves, left of a black edge."""
    images = (10 * LABELS + 10).to(torch.uint8).view(40, 1, 1, 1).repeat(1, 3, 2, 2)
    images[..., 1] = 0
    d = distiller(teacher(3), images, LABELS, batch=600)
    d.flip = flip
    b = d.sample_batch()
    assert b.c.shape == b.c_real.shape == (600, 3) and (b.c.sum(1) == 1).all()
    brightest = (b.real.amax((1, 2, 3)) + 1) * 127.5
    close(brightest, 10.0 + 10 * b.c_real.argmax(1))
    mirrored = (b.real[:, 0, 0, 0] < b.real[:, 0, 0, 1]).sum()
    assert 200 < mirrored < 400 if flip else mirrored == 0
    assert b.c.mean(0).min() > 0.25 and not torch.equal(b.c, b.c_real)


def test_networks_start_at_the_unguided_teacher():
    d = distiller(Guided(teacher(), distiller().fake, 3.0, 0.5, 2.0))
    assert isinstance(d.teacher, Guided) and d.teacher.good is not d.G
    assert equal(dict(d.ema.state_dict()), dict(teacher().state_dict()))


# --------------------------------------------------------------------------------- the weights

def level_mean(w):
    return w.view(8, 5).mean(1, keepdim=True).expand(8, 5).flatten()


@pytest.mark.parametrize("options, by_hand", [
    (dict(h="be", norm="two-stage"), lambda r: (-bregman.two_stage(r.log())).exp()),
    (dict(h="sba", lam=3, clip=1), lambda r: r.clamp(1 / np.e, np.e) ** 3),
    (dict(h="sba", lam=3, ess=1.0), torch.ones_like),
    (dict(h="sba", lam=2, part="level"), lambda r: level_mean(r ** 2)),
    (dict(h="sba", lam=2, part="sample"), lambda r: r ** 2 / level_mean(r ** 2))], ids=str)
def test_weights_of_a_first_batch(options, by_hand):
    """Of which the running means at each level are the batch's own."""
    log_r = torch.linspace(-4, 4, 40)[torch.randperm(40, generator=torch.manual_seed(0))]
    w = distiller(batch=40, **options).weights(log_r[:, None, None, None])
    expected = by_hand(log_r.double().exp())
    assert w.shape == (40, 1, 1, 1)
    close(w.flatten().double(), expected / expected.mean(), rtol=1e-4, atol=0)


def test_level_centres_log_r_at_each_noise_level_by_a_running_mean():
    """A classifier that is off by something at every noise level: the weights don't see it."""
    d, g = distiller(h="sba", lam=2, norm="level", batch=40), torch.Generator().manual_seed(0)
    batches = torch.linspace(3, -1, 10).repeat_interleave(4) + torch.randn(2, 40, generator=g)
    for d.updates, log_r in enumerate(batches):
        w = d.weights(log_r[:, None, None, None])
    mean = batches.mean(0).view(10, 4).mean(1).repeat_interleave(4)
    close(w.flatten(), 40 * (2 * (log_r - mean)).softmax(0))
    close(d.averages()["log_r"], batches.mean().item())     # logged as the classifier says it


# --------------------------------------------------------------------------------- when it breaks

def test_nan_is_named_with_its_noise_level():
    """That of the first bad sample, in the generator's half of a step and in the other."""
    d = distiller()
    b, x_t = d.sample_batch(), torch.ones(8, 3, 8, 8)
    x_t[3] = torch.nan
    b.real[5] = torch.inf
    with pytest.raises(FloatingPointError, match=f"score_gap .* {b.sigma[3].item():.4g}$"):
        d.scores_and_ratio(x_t, b)
    with pytest.raises(FloatingPointError, match=f"loss_class .* {b.sigma_f[5].item():.4g}$"):
        d.fake_loss(torch.zeros_like(b.real), b)


@pytest.mark.parametrize("amp", ["no", "fp16"])
def test_infinite_gradient_changes_no_weight(amp):
    """It stops the run, but for fp16, whose scaler skips the step and tries a smaller scale."""
    d = distiller(amp=amp)
    before, scale = copy.deepcopy(dict(d.G.state_dict())), d.scaler.get_scale()
    stops = pytest.raises(FloatingPointError, match="after 0 images: grad_g")
    with stops if amp == "no" else contextlib.nullcontext():
        d.descend(d.opt_g, torch.inf * d.G(torch.ones(8, 3, 8, 8), 2.5).mean())
    assert equal(dict(d.G.state_dict()), before) and "grad_g" not in d.sums
    assert amp == "no" or d.scaler.get_scale() == scale / 2


# ------------------------------------------------------------------------------------ its state

@pytest.mark.parametrize("options", [
    dict(norm="level", h="sba", wait_kimg=0.008), dict(part="sample", h="be", fake_updates=2),
    dict(amp="fp16", gan=0.1)])
def test_state_is_all_that_a_run_needs(options, tmp_path):
    """Two steps, a file, two more: bit for bit four steps."""
    whole, first, second = (distiller(**options) for _ in range(3))
    for _ in range(2):
        whole.step(), first.step()
    torch.save(first.state(), tmp_path / "a.pt")
    second.load(torch.load(tmp_path / "a.pt", weights_only=True), "a.pt")
    for _ in range(2):
        whole.step(), second.step()
    assert equal(whole.state(), second.state())
    assert whole.averages() == second.averages()
