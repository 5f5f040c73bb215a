"""cifar_distill.py: the update against Eq. (4), sample by sample, its random numbers, weights and
state. Whole runs are in test_runs.py."""
import copy
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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
    how = dict(batch=8, wait_kimg=0.0, device="cpu", ess=0.0, norm="batch") | options
    cfg = Config(**how)
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
    *((h, 5, "c_out") for h in bregman.TABLE_1),
    ("sba", -1, "c_out"), ("sba", 0, "dmd"), ("sba", 3, "dmd")])
def test_update_is_eq_4(h, lam, w_t):
    """One sample at a time, from the scores, with h'' by autograd of h, in place of log weights of
    a batch and the difference of two networks. All networks get the labels to generate."""
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
        r = (-l.mean().double()).exp().detach().requires_grad_()
        first, = torch.autograd.grad(d.h.h(r), r, create_graph=True)
        second = torch.autograd.grad(first, r)[0] if first.requires_grad else torch.zeros(())
        w_t_sigma = sigma ** 2 / (x - D_real).abs().mean() if w_t == "dmd" else (
            sigma * (sigma ** 2 + 0.25).sqrt() / 0.5)
        terms.append(torch.autograd.grad(x, parameters(G),
                                         -(w_t_sigma * (s_real - s_fake)).detach()))
        weights.append((second * r).item())
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
    decoder = {k: p.grad for k, p in d.fake.named_parameters() if ".dec." in k}
    assert set(decoder.values()) == {None}                          # it has no loss


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
    moves = [p.detach() - q for p, q in zip(parameters(fake), start)]
    size = max(m.abs().max() for m in moves).item()
    for p, q, move in zip(parameters(d.fake), start, moves):
        close(p - q, move, rtol=0, atol=1e-4 * size)
    means = d.averages()
    close(means["loss_score"] + means["loss_class"], sum(losses).item() / n, rtol=1e-4, atol=0)
    assert size > 1e-3 and (d.seen, d.updates) == (8, 0 if wait else 1)
    assert torch.equal(d.sample_batch().z, batches[n].z)            # no more was drawn


class Convolutions(TorchDispatchMode):
    """Counts convolutions, and backward ones by what they are made for: x, weight, bias."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if "convolution" in f.name():
            self.count[f.name(), *(args[-1] if "backward" in f.name() else ())] += 1
        return f(*args, **kwargs or {})

    def of(self, f):
        """Return the Counter of f()."""
        self.count = Counter()
        with self:
            f()
        return self.count


PASSES = {"both": 2, "forward": 2, "encoder": 1}        # what bench.py counts on


@pytest.mark.parametrize("options, passes", [
    ({}, PASSES), (dict(norm="two-stage", batch=20), PASSES), (dict(norm="level"), PASSES),
    (dict(gan=1e-3), PASSES | {"in x": 1}), (dict(wait_kimg=1), dict(forward=1, both=1, encoder=1)),
    (dict(teacher_free=True), {"both": 1, "forward": 1, "encoder": 2, "in x": 1}),
    (dict(fake_updates=2), dict(both=3, forward=3, encoder=2))])
def test_passes_of_a_step(options, passes):
    """Of a network and of its encoder, forward, or backward in the weights, or backward in x
    alone; and no pass more."""
    d, counter = distiller(**options), Convolutions()
    x, sigma = torch.randn(8, 3, 8, 8), torch.ones(8, 1, 1, 1)
    x_t = x.clone().requires_grad_()
    logits = d.fake.encode(x_t, sigma).sum()
    cost = {"forward": counter.of(lambda: d.teacher(x, sigma)),
            "both": counter.of(lambda: d.G(x, sigma).sum().backward()),
            "encoder": counter.of(lambda: d.fake.encode(x, sigma).sum().backward()),
            "in x": counter.of(lambda: torch.autograd.grad(logits, x_t))}
    assert all(cost.values())
    expected = sum((cost[name] for name, k in passes.items() for _ in range(k)), Counter())
    assert counter.of(d.step) == expected


@pytest.mark.parametrize("amp, error", [("bf16", 0.2), ("fp16", 0.03)])
def test_autocast_gives_the_same_update(amp, error):
    """Up to rounding, which the score gap, a difference, magnifies. fp16's scale is out of the
    gradients again."""
    exact, rounded = distiller(), distiller(amp=amp)
    for d in (exact, rounded):
        d.step()
    for net in ("G", "fake"):
        a, b = (torch.cat([g.flatten() for g in gradients(getattr(d, net))])
                for d in (exact, rounded))
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b).norm() < error * a.norm()


def test_fp16_skips_a_step_that_overflows_and_logs_no_infinite_norm():
    d = distiller(amp="fp16")
    G, scale = copy.deepcopy(d.G.state_dict()), d.scaler.get_scale()
    for factor, moved in ((1e30, False), (1.0, True)):
        with d.autocast():
            x = d.G(torch.ones(8, 3, 8, 8), 2.5)
        d.descend(d.opt_g, factor * x.mean())
        assert equal(dict(d.G.state_dict()), dict(G)) != moved
        assert ("grad_g" in d.sums) == moved
    assert d.scaler.get_scale() == scale / 2
    assert 0 < d.averages()["grad_g"] < 1e6


@pytest.mark.parametrize("options", [{}, dict(gan=0.1, amp="bf16"), dict(teacher_free=True)])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    plain, again = (distiller(gradient_checkpointing=on, **options) for on in (False, True))
    entered = []
    again.G.model.enc["8x8_block0"].register_forward_pre_hook(lambda *_: entered.append(1))
    again.step()
    plain.step()
    assert len(entered) == 2                        # and once more in the backward pass
    for net in ("G", "fake"):
        for a, b in zip(*(gradients(getattr(d, net)) for d in (plain, again)), strict=True):
            close(b, a, rtol=1e-5, atol=1e-8)
    assert again.G.gradient_checkpointing and not again.teacher.gradient_checkpointing


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
    for life in (0.8, 1.6):
        ema = copy.deepcopy(d.ema.model.map_layer0.weight)
        d.step()
        close(d.ema.model.map_layer0.weight,
              ema.lerp(d.G.model.map_layer0.weight, 1 - 0.5 ** (8 / life)).detach())
    d.updates = 1000
    ema = copy.deepcopy(d.ema.model.map_layer0.weight)
    d.step()
    close(d.ema.model.map_layer0.weight, (ema + 3 * d.G.model.map_layer0.weight).detach() / 4)
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
    assert not torch.equal(d.sample_batch().z, b.z)


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


def test_a_guided_teacher_guides_the_gap_and_nothing_else():
    weak = distiller().fake
    d = distiller(Guided(teacher(), weak, 3.0, 0.5, 2.0))
    b, G, fake = before_step(d)
    assert not isinstance(d.G, Guided) and d.teacher.good is not d.G
    x_t = G(2.5 * b.z, 2.5).detach() + b.sigma * b.noise
    gap, log_r = d.scores_and_ratio(x_t, b)
    with torch.no_grad():
        good, bad = teacher()(x_t, b.sigma), weak(x_t, b.sigma)
        inside = (b.sigma >= 0.5) & (b.sigma <= 2)
        D_real = torch.where(inside, 3 * good - 2 * bad, good)
        expected = (fake(x_t, b.sigma) - D_real) * (b.sigma ** 2 + 0.25).sqrt() / b.sigma / 0.5
    assert inside.any() and not inside.all() and not log_r.requires_grad
    close(gap, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --------------------------------------------------------------------------------- the weights

def f_distills(r):
    """In its words: p/q within [0.1, 20], over its mean in a bin. It is BE's weight itself."""
    u = (1 / r).clamp(0.1, 20).view(10, 4)
    return (u / u.mean(1, keepdim=True)).flatten()


def level_mean(w):
    return w.view(8, 5).mean(1, keepdim=True).expand(8, 5).flatten()


@pytest.mark.parametrize("options, by_hand", [
    (dict(h="be", norm="two-stage"), f_distills),
    (dict(h="sba", lam=3, clip=1), lambda r: r.clamp(1 / np.e, np.e) ** 3),
    (dict(h="sba", lam=2, part="level"), lambda r: level_mean(r ** 2)),
    (dict(h="sba", lam=2, part="sample"), lambda r: r ** 2 / level_mean(r ** 2))], ids=str)
def test_weights_of_a_first_batch(options, by_hand):
    """Of which the running means at each level are the batch's own."""
    log_r = torch.linspace(-4, 4, 40)[torch.randperm(40, generator=torch.manual_seed(0))]
    w = distiller(batch=40, **options).weights(log_r[:, None, None, None])
    expected = by_hand(log_r.double().exp())
    assert w.shape == (40, 1, 1, 1)
    close(w.flatten().double(), expected / expected.mean(), rtol=1e-4, atol=0)


def test_level_takes_out_what_depends_on_the_noise_alone():
    """A classifier that is off by something at every noise level: the weights don't see it."""
    d, off = distiller(h="sba", lam=2, norm="level", batch=40), torch.linspace(3, -1, 10)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        log_r = 0.1 * torch.randn(40, generator=g)
        w = d.weights((log_r + off.repeat_interleave(4))[:, None, None, None])
        d.updates += 1
    close(d.log_r_mean, off, rtol=0, atol=0.05)
    close(w.flatten(), 40 * (2 * log_r).softmax(0), rtol=0.15, atol=0)
    close(d.averages()["log_r"], 1.0, rtol=0, atol=0.01)    # logged as the classifier says it


def test_weights_are_tempered():
    log_r = torch.tensor([-2.0, 0.1, 0.5, 3.0])
    d = distiller(h="sba", lam=3, batch=4, ess=0.9)
    w = d.weights(log_r[:, None, None, None]).flatten()
    tau = d.averages()["tau"]
    assert 0 < tau < 1 and w.sum() ** 2 / (4 * w.square().sum()) >= 0.9
    close(w, 4 * (3 * tau * log_r).softmax(0))


# --------------------------------------------------------------------------------- when it breaks

def test_nan_is_named_with_its_noise_level():
    """That of the first bad sample, in the generator's half of a step and in the other."""
    d = distiller()
    b, G, _ = before_step(d)
    d.seen = 64
    x_t = G(2.5 * b.z, 2.5).detach() + b.sigma * b.noise
    x_t[3] = torch.nan
    with pytest.raises(FloatingPointError, match=f"after 64 images: score_gap is nan at sigma = "
                                                 f"{re.escape(f'{b.sigma[3].item():.4g}')}$"):
        d.scores_and_ratio(x_t, b)
    b.real[5] = torch.inf
    with pytest.raises(FloatingPointError, match=f"loss_class is nan at sigma = "
                                                 f"{re.escape(f'{b.sigma_f[5].item():.4g}')}$"):
        d.fake_loss(torch.zeros_like(b.real), b)


def test_infinite_gradient_stops_the_step_before_the_weights_change():
    d = distiller()
    before = copy.deepcopy(dict(d.G.state_dict()))
    d.scores_and_ratio = lambda x, b: (torch.full_like(x, torch.inf), torch.zeros(8, 1, 1, 1))
    with pytest.raises(FloatingPointError, match="after 0 images: grad_g is (inf|nan)"):
        d.step()
    assert equal(dict(d.G.state_dict()), before)


# ------------------------------------------------------------------------------------ its state

@pytest.mark.parametrize("options", [
    dict(norm="level", h="sba", wait_kimg=0.008), dict(part="sample", h="be", fake_updates=2),
    dict(amp="fp16", gan=0.1), dict(norm="two-stage", batch=20, grad_clip=1e-3)])
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
    assert not equal(whole.state()["G"], first.state()["G"])
    assert whole.averages() == second.averages()


def test_a_pickled_distiller_goes_on_alike():
    d = distiller(h="sba", norm="level")
    d.step()
    other = pickle.loads(pickle.dumps(d))
    d.step(), other.step()
    assert equal(d.state(), other.state())
