"""cifar_distill.py: the update against Eq. (4), sample by sample; runs that are stopped, moved,
broken and shared; the command line. plumbing/loop.py is tested here, by its largest user."""
import contextlib
import copy
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import bregman
import cifar_distill
import fid
from cifar_distill import Config, Distiller
from data import load_images, save_images
from edm import Guided, load_teacher, sample
from ncsnpp import CONFIGS, EDMPrecond
from plumbing import judge, teachers
from plumbing.files import claim
from plumbing.loop import Loop
from plumbing.teachers import beside, build, shipped
from test_edm import equal, official
from test_ncsnpp import fill

HERE = Path(cifar_distill.__file__).parent
IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 8, 8), np.uint8))
LABELS = torch.arange(40) % 3
TINY = CONFIGS["compact"] | dict(model_channels=4, channel_mult=[1, 1], attn_resolutions=[],
                                 augment_dim=9)
NETS = {"tiny": TINY, "tiny-cond": TINY | dict(label_dim=3)}
close = torch.testing.assert_close


def teacher(name="tiny"):
    """A network of random weights: its update is as exact as a trained one's."""
    return fill(EDMPrecond(**NETS[name])).requires_grad_(False)


def distiller(net=None, images=IMAGES, labels=None, **options):
    """One whose fake network and generator have left the teacher, so that no gap is zero."""
    how = dict(batch=8, wait_kimg=0.0, device="cpu", ess=0.0, norm="batch") | options
    d = Distiller(Config(**how), net or teacher(), images, labels)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*d.fake.parameters(), *d.G.parameters()]:
            p += 0.05 * torch.randn(p.shape, generator=g) * p.abs().mean()
    return d


def before_step(d):
    """-> the random numbers of the next step, and what its networks are before it."""
    twin = copy.deepcopy({"generator": d.generator.get_state(), "G": d.G, "fake": d.fake})
    b = d.draw()
    d.generator.set_state(twin["generator"])
    return b, twin["G"], twin["fake"]


def gradients(net):
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def assert_gradients(net, expected, rtol=2e-5):
    """Of all parameters, to `rtol` of the largest number; map_augment's are None, as no image has
    augmentation labels."""
    named = {k: p for k, p in net.named_parameters() if "augment" not in k}
    size = max(e.abs().max().item() for e in expected if e is not None)
    assert size > 1e-6
    for (name, p), e in zip(named.items(), expected, strict=True):
        close(p.grad, e, rtol=0, atol=rtol * size, msg=lambda m: f"{name}: {m}")


def slope_in_weights(net, x, upstream):
    """The gradient of sum(x * upstream) in the network's weights."""
    params = [p for k, p in net.named_parameters() if "augment" not in k]
    return torch.autograd.grad(x, params, upstream)


# ------------------------------------------------------------------------- the update, in detail

@pytest.mark.parametrize("h, lam, w_t", [
    *((h, 5, "c_out") for h in bregman.TABLE_1),
    ("sba", -1, "c_out"), ("sba", 0, "dmd"), ("sba", 5, "dmd")])
def test_update_is_eq_4(h, lam, w_t):
    """One sample at a time, from the scores, with h'' by autograd of h, in place of log weights of
    a batch and the difference of two networks."""
    d = distiller(h=h, lam=lam, w_t=w_t, clip=50)
    b, G, fake = before_step(d)
    d.step()
    terms, weights = [], []
    for i in range(8):
        sigma = b.sigma[i:i + 1]
        x = G(2.5 * b.z[i:i + 1], 2.5)
        x_t = (x + sigma * b.noise[i]).detach()
        D_fake, l = fake(x_t, sigma, return_logits=True)
        D_real = d.teacher(x_t, sigma)
        s_fake, s_real = ((D - x_t) / sigma ** 2 for D in (D_fake, D_real))
        r = (-l.mean().double()).exp().detach().requires_grad_()
        slope, = torch.autograd.grad(d.h.h(r), r, create_graph=True)
        second = torch.autograd.grad(slope, r)[0] if slope.requires_grad else torch.zeros(())
        w_t_sigma = sigma ** 2 / (x - D_real).abs().mean() if w_t == "dmd" else (
            sigma * (sigma ** 2 + 0.25).sqrt() / 0.5)
        terms.append(slope_in_weights(G, x, -(w_t_sigma * (s_real - s_fake)).detach()))
        weights.append((second * r).item())
    weights = np.array(weights) / np.mean(weights)
    assert_gradients(d.G, [sum(w * t for w, t in zip(weights, each)) / (8 * 192)
                           for each in zip(*terms)], rtol=2e-4)      # a score divides by sigma^2


@pytest.mark.parametrize("name", ["tiny", "tiny-cond"])
def test_with_more_evaluations_the_last_one_learns_and_they_take_turns(name):
    """--nfe 3, image by image: the gradient by hand through the last evaluation alone, and a fake
    network that is told which one it was, in labels after those of the class."""
    classes = LABELS if name == "tiny-cond" else None
    d = distiller(teacher(name), labels=classes, nfe=3)
    assert d.g_sigmas == pytest.approx([2.5, 2.5 * 4 / 9, 2.5 / 9])
    b, G, fake = before_step(d)
    assert b.before.shape == (8, 2, 3, 8, 8) and b.last.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    with counted(d) as count:
        d.step()
    assert count["G encoder forward"] == 3 and count["G encoder backward"] == 1
    assert d.opt_g.param_groups[0]["lr"] == pytest.approx(d.cfg.lr_g / 3)
    total = 0
    for i, last in enumerate(b.last.tolist()):
        noise, x = torch.stack([*b.before[i, :last], b.z[i]])[:, None], torch.zeros(1, 3, 8, 8)
        c = None if classes is None else b.c[i:i + 1]
        for sigma, z in zip(d.g_sigmas, noise):
            x = G(x.detach() + sigma * z, sigma, c)
        sigma, made_by = b.sigma[i].item(), torch.eye(3)[last:last + 1]
        x_t = x + sigma * b.noise[i]
        told = made_by if c is None else torch.cat([c, made_by], 1)
        gap = fake(x_t, sigma, told) - d.teacher(x_t, sigma, c)
        gap = gap * (sigma ** 2 + 0.25) ** 0.5 / (0.5 * sigma)
        terms = slope_in_weights(G, x, gap.detach() / (8 * 192))
        total = terms if i == 0 else [a + b for a, b in zip(total, terms)]
    assert_gradients(d.G, total, rtol=1e-4)


def test_the_fake_networks_new_labels_change_nothing_until_they_are_trained():
    x, sigma = torch.randn(4, 3, 8, 8, generator=torch.manual_seed(0)), torch.full((4,), 0.7)
    for name, c in (("tiny", None), ("tiny-cond", torch.eye(3)[[0, 1, 2, 0]])):
        net = teacher(name)
        expected = net(x, sigma, c, return_logits=True)
        net.add_labels(2)
        made_by = torch.eye(2)[[0, 1, 0, 1]]
        told = made_by if c is None else torch.cat([c, made_by], 1)
        close(net(x, sigma, told, return_logits=True), expected, rtol=1e-4, atol=1e-5)
        net.model.map_label.weight.data[:, -1] = 1.0            # the second evaluation's
        changed = net(x, sigma, told) - expected[0]
        assert (changed[1::2] != 0).all() and changed[::2].abs().max() < 1e-5


def test_adversarial_update_is_the_gradient_of_minus_log_D():
    """Where the fake score is the teacher's, Eq. (4) is zero, and line 13 alone is left."""
    d = distiller(gan=0.3)
    d.teacher.load_state_dict(d.fake.state_dict())
    b, G, fake = before_step(d)
    d.step()
    params = [p for k, p in G.named_parameters() if "augment" not in k]
    logits = fake.encode(G(2.5 * b.z, 2.5) + b.sigma * b.noise, b.sigma)
    loss = -0.3 * torch.sigmoid(logits.mean((1, 2))).log().mean()
    assert_gradients(d.G, torch.autograd.grad(loss, params))


def test_teacher_free_update_is_eq_37_with_its_sign_corrected():
    """And never a look at the teacher."""
    d = distiller(h="sba", lam=2, teacher_free=True)
    b, G, fake = before_step(d)
    d.teacher.forward = None
    d.step()
    x = G(2.5 * b.z, 2.5)
    x_t = (x + b.sigma * b.noise).detach().requires_grad_()
    log_r = -fake.encode(x_t, b.sigma).mean((1, 2))
    slope, = torch.autograd.grad(log_r.sum(), x_t)
    w = log_r.detach().clamp(-5, 5).mul(2).softmax(0)               # h'' grad r = r^lam grad log r
    w_t = b.sigma * (b.sigma ** 2 + 0.25).sqrt() / 0.5
    assert_gradients(d.G, slope_in_weights(G, x, w[:, None, None, None] * w_t * slope / 192))
    decoder = {k: p.grad for k, p in d.fake.named_parameters() if ".dec." in k}
    assert set(decoder.values()) == {None}                          # it has no loss


def test_fake_network_learns_edms_loss_and_eq_5():
    """Lines 16 to 22, one image at a time, with torch's own binary cross-entropy."""
    d = distiller()
    b, G, fake = before_step(d)
    d.step()
    total = 0
    for i in range(8):
        s, noise = b.sigma_f[i].item(), b.sigma_f[i] * b.noise_f[i]
        x = G(2.5 * b.z[i:i + 1], 2.5).detach()
        D_x, l = fake(x + noise, s, return_logits=True)
        l_real = fake.encode(b.real[i:i + 1] + noise, s)
        total += (s ** 2 + 0.5 ** 2) / (s * 0.5) ** 2 * (D_x - x).square().mean() / 8
        for logits, label in ((l, 0.0), (l_real, 1.0)):             # 1 for real: l = log p/q
            total += F.binary_cross_entropy_with_logits(
                logits, torch.full_like(logits, label)) / 8
    params = [p for k, p in fake.named_parameters() if "augment" not in k]
    assert_gradients(d.fake, torch.autograd.grad(total, params), rtol=1e-4)
    means = d.averages()
    close(means["loss_score"] + means["loss_class"], total.item(), rtol=1e-4, atol=0)


@contextlib.contextmanager
def counted(d):
    """Passes of each network through the first convolution (encoder) and the last (decoder)."""
    count, hooks = {}, []

    def add(key):
        def hook(*_):
            count[key] = count.get(key, 0) + 1
        return hook
    for name, net in (("G", d.G), ("teacher", d.teacher), ("fake", d.fake)):
        for part, layer in (("encoder", net.model.enc["32x32_conv"]),
                            ("decoder", list(net.model.dec.values())[-1])):
            hooks.append(layer.register_forward_hook(add(f"{name} {part} forward")))
            hooks.append(layer.register_full_backward_hook(add(f"{name} {part} backward")))
    with warnings.catch_warnings():                 # the image needs no gradient: that is known
        warnings.filterwarnings("ignore", message="Full backward hook")
        yield count
    for hook in hooks:
        hook.remove()


PASSES = {"G encoder forward": 1, "G decoder forward": 1, "G encoder backward": 1,
          "G decoder backward": 1, "teacher encoder forward": 1, "teacher decoder forward": 1,
          "fake encoder forward": 3, "fake decoder forward": 2, "fake encoder backward": 2,
          "fake decoder backward": 1}
WAITING = {"G encoder backward": 0, "G decoder backward": 0, "teacher encoder forward": 0,
           "teacher decoder forward": 0, "fake encoder forward": 2, "fake decoder forward": 1}
NO_TEACHER = {"fake encoder backward": 3, "fake decoder forward": 1, "fake decoder backward": 0,
              "teacher encoder forward": 0, "teacher decoder forward": 0}


@pytest.mark.parametrize("options, other", [
    ({}, {}), (dict(norm="two-stage", batch=20), {}), (dict(norm="level"), {}),
    (dict(gan=1e-3), {"fake encoder backward": 3}), (dict(wait_kimg=1.0), WAITING),
    (dict(teacher_free=True), NO_TEACHER)])
def test_passes_of_a_step(options, other):
    """Those that bench.py counts on, and no pass more."""
    d = distiller(**options)
    with counted(d) as count:
        d.step()
    assert count == {k: v for k, v in (PASSES | other).items() if v}


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
        d.descend(d.opt_g, factor * x.mean(), "generator")
        assert equal(dict(d.G.state_dict()), dict(G)) != moved
        assert ("grad_g" in d.sums) == moved
    assert d.scaler.get_scale() == scale / 2
    assert 0 < d.averages()["grad_g"] < 1e6


@pytest.mark.parametrize("options", [{}, dict(gan=0.1, amp="bf16"), dict(teacher_free=True)])
def test_gradient_checkpointing_gives_the_same_gradients(options):
    plain, again = (distiller(gradient_checkpointing=on, **options) for on in (False, True))
    entered = []
    again.G.model.enc["32x32_block0"].register_forward_pre_hook(lambda *_: entered.append(1))
    again.step()
    plain.step()
    assert len(entered) == 2                        # and once more in the backward pass
    for net in ("G", "fake"):
        for a, b in zip(*(gradients(getattr(d, net)) for d in (plain, again)), strict=True):
            close(b, a, rtol=1e-5, atol=1e-8)
    assert again.G.gradient_checkpointing and not again.teacher.gradient_checkpointing


def test_no_tf32():
    torch.backends.cudnn.allow_tf32 = True
    distiller()
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_generator_waits_and_rates_fall():
    d = distiller(wait_kimg=0.016, decay_kimg=0.016, lr_g=1e-3, lr_f=3e-3)
    start, rates = copy.deepcopy(dict(d.G.state_dict())), []
    for still in (True, True, False, False):
        d.step()
        assert equal(dict(d.G.state_dict()), start) == still
        rates += [(d.opt_g.param_groups[0]["lr"], d.opt_f.param_groups[0]["lr"])]
    close(torch.tensor(rates), torch.tensor([[1e-3, 3e-3]]) / torch.tensor(
        [1, 1, 1, 1.5])[:, None])
    assert d.seen == 32 and d.moves == 2


def test_average_has_its_half_life_and_holds_no_graph():
    """A graph through the average would grow with every step. The half-life is ema_kimg, at most a
    tenth of the images since the generator moves: at first the average follows at once."""
    d = distiller(ema_kimg=0.004)
    for life in (0.8, 1.6):
        ema = copy.deepcopy(d.ema.model.map_layer0.weight)
        d.step()
        close(d.ema.model.map_layer0.weight,
              ema.lerp(d.G.model.map_layer0.weight, 1 - 0.5 ** (8 / life)).detach())
    d.moves = 1000
    ema = copy.deepcopy(d.ema.model.map_layer0.weight)
    d.step()
    close(d.ema.model.map_layer0.weight, (ema + 3 * d.G.model.map_layer0.weight).detach() / 4)
    assert not any(p.requires_grad for p in d.ema.parameters())


# ----------------------------------------------------------------------------- random numbers

@pytest.mark.parametrize("t_min, t_max", [(0.0, 0.8), (0.15, 1.0)])
def test_noise_levels(t_min, t_max):
    """One in each of `batch` equal steps of a share of EDM's grid, rising; the fake network's are
    log-normal."""
    d = distiller(batch=4000, images=IMAGES[..., :2, :2], t_min=t_min, t_max=t_max, p_mean=-0.6,
                  p_std=1.6)
    b = d.draw()
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    u = (b.sigma.flatten() ** (1 / 7) - low) / (high - low)
    assert b.sigma.shape == b.sigma_f.shape == (4000, 1, 1, 1) and (u.diff() > 0).all()
    close(u, torch.linspace(t_min, t_max, 4000), rtol=0, atol=3e-4)
    logs = b.sigma_f.log().flatten()
    close(torch.stack([logs.mean(), logs.std()]), torch.tensor([-0.6, 1.6]), rtol=0, atol=0.08)
    assert not torch.equal(d.draw().z, b.z)


def test_images_keep_their_labels_and_are_flipped_half_the_time():
    """The images say their labels themselves, left of a black edge."""
    images = (10 * LABELS + 10).to(torch.uint8).view(40, 1, 1, 1).repeat(1, 3, 2, 2)
    images[..., 1] = 0
    d = distiller(teacher("tiny-cond"), images, LABELS, batch=600)
    b = d.draw()
    assert b.c.shape == b.c_real.shape == (600, 3) and (b.c.sum(1) == 1).all()
    brightest = (b.real.amax((1, 2, 3)) + 1) * 127.5
    close(brightest, 10.0 + 10 * b.c_real.argmax(1))
    assert 200 < (b.real[:, 0, 0, 0] < b.real[:, 0, 0, 1]).sum() < 400
    assert b.c.mean(0).min() > 0.25 and not torch.equal(b.c, b.c_real)


def test_class_conditional_step_hands_each_network_its_labels():
    """Each network's first argument goes with the labels of that argument."""
    net, asked = teacher("tiny-cond"), {}
    d = distiller(net, labels=LABELS)

    def spy(name, f):
        def call(x, sigma, c=None, **more):
            asked.setdefault(name, []).append(c)
            return f(x, sigma, c, **more)
        return call
    for name in ("G", "fake", "teacher"):
        setattr(getattr(d, name), "forward", spy(name, getattr(d, name).forward))
    d.fake.encode = spy("encode", d.fake.encode)
    b, *_ = before_step(d)
    d.step()
    assert {k: len(v) for k, v in asked.items()} == dict(G=1, fake=2, teacher=1, encode=1)
    for name, labels in asked.items():
        for c in labels:
            assert torch.equal(c, b.c_real if name == "encode" else b.c)
    assert d.G.model.map_label.weight.grad.abs().max() > 0


def test_a_guided_teacher_guides_the_gap_and_nothing_else():
    weak = distiller().fake
    d = distiller(Guided(teacher(), weak, 3.0, 0.5, 2.0))
    b, G, fake = before_step(d)
    assert not isinstance(d.G, Guided) and d.teacher.good is not d.G
    x_t = G(2.5 * b.z, 2.5).detach() + b.sigma * b.noise
    gap, slope, _ = d.compare(x_t, b)
    with torch.no_grad():
        good, bad = teacher()(x_t, b.sigma), weak(x_t, b.sigma)
        inside = (b.sigma >= 0.5) & (b.sigma <= 2)
        D_real = torch.where(inside, 3 * good - 2 * bad, good)
        expected = (fake(x_t, b.sigma) - D_real) * (b.sigma ** 2 + 0.25).sqrt() / b.sigma / 0.5
    assert inside.any() and not inside.all() and slope == 0
    close(gap, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


# --------------------------------------------------------------------------------- the weights

def test_two_stage_is_f_distills():
    """Against its words: ratio p/q in [0.1, 20], over its bin's mean, weights over the batch's."""
    d = distiller(h="be", norm="two-stage", batch=40)
    log_r = torch.linspace(-4, 4, 40).roll(7)
    u = np.clip(np.exp(-log_r.numpy()), 0.1, 20).reshape(10, 4)
    u = (u / u.mean(1, keepdims=True)).flatten()        # BE's weight is u itself
    w = d.weigh(log_r[:, None, None, None])
    close(w.flatten(), torch.from_numpy(u / u.mean()).float())
    assert w.shape == (40, 1, 1, 1)


def test_level_takes_out_what_depends_on_the_noise_alone():
    """A classifier that is off by something at every noise level: the weights don't see it."""
    d, off = distiller(h="sba", lam=2, norm="level", batch=40), torch.linspace(3, -1, 10)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        log_r = 0.1 * torch.randn(40, generator=g)
        w = d.weigh((log_r + off.repeat_interleave(4))[:, None, None, None])
        d.moves += 1
    close(d.level, off, rtol=0, atol=0.05)
    close(w.flatten(), 40 * (2 * log_r).softmax(0), rtol=0.15, atol=0)
    means = d.averages()
    close(means["log_r"], 1.0, rtol=0, atol=0.01)       # logged as the classifier says it


def test_batch_clips_and_tempers():
    log_r = torch.tensor([-2.0, 0.1, 0.5, 3.0])
    clipped = (3 * log_r.clamp(-1, 1)).exp()
    w = distiller(h="sba", lam=3, clip=1, batch=4).weigh(log_r[:, None, None, None])
    close(w.flatten(), clipped / clipped.mean())
    d = distiller(h="sba", lam=3, clip=1, batch=4, ess=0.9)
    w = d.weigh(log_r[:, None, None, None]).flatten()
    tau = d.averages()["tau"]
    assert 0 < tau < 1 and w.sum() ** 2 / (4 * w.square().sum()) >= 0.9
    close(w, clipped ** tau / (clipped ** tau).mean())


@pytest.mark.parametrize("part", ["level", "sample"])
def test_part_is_one_factor_of_the_weight(part):
    """w = E[w | sigma] times the rest, by bins of the batch: on the first batch its running mean
    is the batch's own."""
    d = distiller(h="sba", lam=2, batch=40, part=part)
    log_r = torch.randn(40, generator=torch.Generator().manual_seed(0))
    w = (2 * log_r.double()).exp().view(8, 5)
    level = w.mean(1, keepdim=True).expand(8, 5)
    expected = (level if part == "level" else w / level).flatten()
    got = d.weigh(log_r[:, None, None, None]).flatten().double()
    close(got, expected / expected.mean(), rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------- when it breaks

@pytest.mark.parametrize("where", ["fake", "teacher", "G"])
def test_nan_stops_the_step(where):
    d = distiller(h="sba")
    with torch.no_grad():
        getattr(d, where).model.map_layer0.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="after 0 images: score_gap is nan at sigma = "):
        d.step()


def test_nan_is_named_with_its_noise_level():
    """That of the first bad sample, in the generator's half of a step and in the other."""
    d = distiller()
    b, G, _ = before_step(d)
    d.seen = 64
    x_t = G(2.5 * b.z, 2.5).detach() + b.sigma * b.noise
    x_t[3] = torch.nan
    with pytest.raises(FloatingPointError, match=f"after 64 images: score_gap is nan at sigma = "
                                                 f"{re.escape(f'{b.sigma[3].item():.4g}')}$"):
        d.compare(x_t, b)
    b.real[5] = torch.inf
    with pytest.raises(FloatingPointError, match=f"loss_class is nan at sigma = "
                                                 f"{re.escape(f'{b.sigma_f[5].item():.4g}')}$"):
        d.fake_loss(torch.zeros_like(b.real), b)


def test_infinite_gradient_stops_the_step_before_the_weights_change():
    d = distiller()
    compare, before = d.compare, copy.deepcopy(dict(d.G.state_dict()))
    d.compare = lambda x, b: (compare(x, b)[0], torch.full_like(x, torch.inf), compare(x, b)[2])
    with pytest.raises(FloatingPointError, match="the generator's gradient is"):
        d.step()
    assert equal(dict(d.G.state_dict()), before)


# ------------------------------------------------------------------------------------ its state

@pytest.mark.parametrize("options", [
    dict(norm="level", h="sba", wait_kimg=0.008), dict(part="sample", h="be"),
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


def test_a_run_that_moved_to_another_kind_of_device_says_so(capsys):
    """The state of a GPU's generator has 16 bytes."""
    d, other = distiller(), distiller(seed=5)
    d.step()
    other.load(d.state() | {"generator": torch.zeros(16, dtype=torch.uint8)}, "a.pt")
    said, = capsys.readouterr().err.splitlines()
    assert "seed 13" in said and "another kind of device" in said
    expected = torch.Generator().manual_seed(5 + 8)
    assert torch.equal(other.generator.get_state(), expected.get_state())
    assert equal(dict(other.G.state_dict()), dict(d.G.state_dict()))


# ----------------------------------------------------------------------------------- whole runs

RUN = dict(kimg=0.012, batch=2, wait_kimg=0.002, eval_every=0.008, eval_n=8, save_every=0.004,
           preview=1, device="cpu", h="sba", norm="level")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with weights and images of 32 x 32, in which the tests run."""
    folder = tmp_path_factory.mktemp("files")
    images = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (24, 3, 32, 32), np.uint8))
    save_images(images, folder / "tiny_samples.zip")
    save_images(images[..., :16, :16], folder / "small.npz")
    save_images(images, folder / "labelled.npz", torch.arange(24) % 3)
    save_images(images, folder / "classes.npz", torch.arange(24) % 5)
    for name in NETS:
        torch.save(teacher(name).state_dict(), folder / f"{name}.pt")
    measured = fid.measure(images, fid.load_net())
    fid.save(measured, folder / "tiny_compact.npz")
    fid.save(fid.Measured(measured.mu, measured.sigma), folder / "statistics.npz")
    return folder


@pytest.fixture
def here(files, monkeypatch):
    """In that folder, with the tiny networks known, and pictures left out."""
    monkeypatch.setattr(teachers, "CONFIGS", NETS)
    monkeypatch.setattr(cifar_distill, "tune_cpu", lambda: None)    # it would stay for other tests
    monkeypatch.setattr(judge, "curve", lambda *a: None)
    monkeypatch.setattr(judge, "side_by_side", lambda *a: None)
    monkeypatch.chdir(files)
    return files


def flags(out, **options):
    """A command line: RUN with other options."""
    given = RUN | dict(teacher="tiny.pt", out=out) | options
    return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in given.items()]


def start(out, *more, **options):
    return cifar_distill.main([*flags(out, **options), *more])


def saved(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def without(state, *keys):
    """A state without what differs between two equal runs, and without `keys`."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]]
    return {k: v for k, v in (state | {"rows": rows}).items()
            if k not in ("seconds", "config", *keys)}


def same_run(a, b):
    return equal(without(saved(a)), without(saved(b)))


@pytest.fixture
def whole(here):
    """A run that nothing interrupts."""
    if not (here / "whole").exists():
        assert start("whole") == 0
    return here / "whole"


def test_a_run_from_start_to_end(here, monkeypatch, capsys):
    """With pictures, by the command line, and what it writes."""
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(teachers, "CONFIGS", NETS)
    monkeypatch.setattr(cifar_distill, "tune_cpu", lambda: None)
    assert start("end", eval_n=9, preview=4) == 0
    out = capsys.readouterr().out
    assert out.startswith("FD-compact to teacher: ") and out.count("\n") == 1
    result = json.loads((here / "end/result.json").read_text())
    assert result["images"] == 12 and result["distance"] == "FD-compact"
    assert result["seconds_per_image"] > 0 and result["processes"] == 1
    with open("end/log.csv") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["kimg"]) for r in rows] == [0, 0.008, 0.012]
    assert set(rows[0]) == {"kimg", "seconds", *cifar_distill.COLUMNS}
    assert all(np.isfinite(float(v)) for v in rows[-1].values())
    assert float(rows[-1]["images"]) == 9 and 0 < float(rows[-1]["ess"]) <= 1
    for picture in ("samples.png", "curve.png", "grid_000000000.png", "grid_000000012.png"):
        assert min(Image.open(here / "end" / picture).size) > 90
    net = build(saved("end")["ema"])
    wanted = sample(net, 5, levels=[2.5], seed=3)
    for name in ("student.pt", "checkpoint.pt"):
        assert cifar_distill.main(["sample", f"end/{name}", "-n", "5", "--seed", "3", "--out",
                                   "five.npz", "--device", "cpu"]) is None
        assert torch.equal(load_images("five.npz")[0], wanted)
    assert set(torch.load("end/student.pt", weights_only=True)) == {"config", "seen", "ema"}
    cifar_distill.main(["sample", "end/student.pt", "-n", "5", "--out", "grid.png"])
    assert Image.open("grid.png").size == (3 * (5 * 33 + 3 * 33 - 1), 3 * 32)


def test_the_distances_are_those_of_fid(whole):
    """The last row, by fid.py on the student's samples."""
    images = sample(load_teacher(whole / "student.pt"), 8, levels=[2.5])
    net = fid.load_net()
    row, bank = saved(whole)["rows"][-1], fid.measure(load_images("tiny_samples.zip")[0], net)
    a = fid.measure(images, net)
    close(row["to_teacher"], fid.frechet(a.mu, a.sigma, bank.mu, bank.sigma), rtol=1e-4, atol=1e-6)
    reference = fid.measure_source("cifar10", net)
    close(row["to_data"], fid.frechet(a.mu, a.sigma, reference.mu, reference.sigma), rtol=1e-4,
          atol=1e-6)
    own = json.loads((whole / "result.json").read_text())["teacher"]
    halves = fid.shuffled(fid.load("tiny_compact.npz").features).split(12)
    close(own["to_teacher"], fid.frechet(*fid.stats(halves[0]), *fid.stats(halves[1])), rtol=1e-4,
          atol=1e-6)


def test_resume_is_the_same_run_bit_for_bit(whole):
    assert start("halves", kimg=0.004) == 0
    assert start("halves", "--resume") == 0
    state, expected = saved("halves"), saved(whole)
    assert [row["kimg"] for row in state["rows"]] == [0, 0.004, 0.008, 0.012]
    assert equal(without(state, "rows", "sums"), without(expected, "rows", "sums"))


def raise_in(monkeypatch, owner, name, at, number):
    """The at-th call of owner.name gets a signal before it does anything. -> the calls' count."""
    f, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(0)
        if len(calls) == at:
            signal.raise_signal(number)
        result = f(*args, **kwargs)
        calls[-1] = 1                           # it came to its end
        return result
    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(whole, monkeypatch, capsys, number):
    """In the fourth step, after which an evaluation would be due, which is left out."""
    out = f"a run {int(number)}"
    raise_in(monkeypatch, Distiller, "step", 4, number)
    monkeypatch.setattr(sys, "argv", ["cifar_distill.py", *flags(out)])
    assert start(out) == 128 + number
    said = capsys.readouterr().out
    assert said.startswith("stopped after 8 images; to go on: python cifar_distill.py ")
    command = shlex.split(said.split("cifar_distill.py ")[1])
    assert f"--out={out}" in command and command[-1] == "--resume"
    assert saved(out)["seen"] == 8 and len(saved(out)["rows"]) == 1
    assert cifar_distill.main(command) == 0
    assert same_run(whole, out)


def test_a_signal_in_an_evaluation_leaves_it(whole, monkeypatch, capsys):
    """The checkpoint is written before; the resumed run evaluates anew."""
    calls = raise_in(monkeypatch, fid, "measure", 2, signal.SIGTERM)    # in row 1
    assert start("leave") == 128 + signal.SIGTERM
    assert calls == [1, 0] and "stopped after 8 images" in capsys.readouterr().out
    assert saved("leave")["seen"] == 8 and len(saved("leave")["rows"]) == 1
    assert start("leave", "--resume") == 0
    assert same_run(whole, "leave")


@pytest.mark.parametrize("at", [1, 3])
def test_a_signal_in_the_first_and_the_last_evaluation(whole, monkeypatch, capsys, at):
    calls = raise_in(monkeypatch, fid, "measure", at, signal.SIGTERM)
    out = f"evaluation{at}"
    assert start(out) == 128 + signal.SIGTERM
    assert calls[-1] == 0 and len(calls) == at and not Path(out, "result.json").exists()
    assert saved(out)["seen"] == (0 if at == 1 else 12)
    assert start(out, "--resume") == 0
    assert same_run(whole, out) and Path(out, "result.json").exists()


def test_a_second_signal_ends_it_at_once(here, monkeypatch):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)
    monkeypatch.setattr(os, "_exit", end)
    raise_in(monkeypatch, Distiller, "step", 4, signal.SIGTERM)
    raise_in(monkeypatch, Distiller, "fake_loss", 4, signal.SIGINT)
    with pytest.raises(Ended, match=str(128 + signal.SIGINT)):
        start("twice")
    assert saved("twice")["seen"] == 4


def test_nothing_due_is_saved_twice_and_rows_after_the_save_are_kept(here, monkeypatch):
    """Steps, saves and rows of a loop, in order. The checkpoint comes before the evaluation."""
    events = []

    class Counter:
        seen = 0

        def step(self):
            self.seen += 10
            events.append(self.seen)

        def state(self):
            events.append("save")
            return {}
    cfg, trainer = Config(kimg=0.04, batch=10, save_every=0.02, device="cpu"), Counter()
    (here / "loop").mkdir()
    loop = Loop(trainer, cfg, here / "loop", [], lambda: events.append("row") or {}, 0.02, {})
    assert loop.run() == 0
    assert events == ["row", 10, 20, "save", "row", 30, 40, "save", "row", "save"]


def test_two_runs_in_one_folder(here):
    with claim(Path("busy")):
        with pytest.raises(ValueError, match="another run is writing to busy.*--out"):
            start("busy")


def test_one_image_a_step_leaves_no_nan(here):
    """And no bank, no data of its own, a waiting time longer than the run."""
    assert start("one", batch=1, kimg=0.002, wait_kimg=0, bank="none",
                 data="tiny_samples.zip") == 0
    assert start("wait", kimg=0.004, wait_kimg=1) == 0
    for out in ("one", "wait"):
        text = (here / out / "result.json").read_text()
        assert "NaN" not in text and "Infinity" not in text
        assert "nan" not in (here / out / "log.csv").read_text()
    assert "to_teacher" not in saved("one")["rows"][-1]


@pytest.mark.parametrize("options", [
    dict(teacher="tiny-cond.pt", data="labelled.npz", bank="labelled.npz", gan=1e-3),
    dict(guide="tiny.pt", guide_low=0.1, guide_high=10, amp="bf16"),
    dict(bank="statistics.npz", reference="statistics.npz", amp="fp16", data="labelled.npz"),
    dict(teacher="tiny-cond.pt", data="labelled.npz", bank="none", guide="self"),
    dict(teacher_free=True, part="level", norm="batch", batch=8, gradient_checkpointing=True)])
def test_every_kind_of_run(here, capsys, options):
    out = "kind-" + "-".join(map(str, options))
    assert start(out, kimg=0.004, **options) == 0
    assert f"after {options.get('batch', 4)} images" in capsys.readouterr().out
    json.loads((here / out / "result.json").read_text(), parse_constant=pytest.fail)


def test_paper_preset_on_an_official_file(here, tmp_path, monkeypatch, capsys):
    """Weights in NVIDIA's format under the official name, two steps. Their map_augment, which no
    image uses, stays as it is."""
    net = teacher()
    (tmp_path / "edm.pkl").write_bytes(official(net))
    monkeypatch.setattr(teachers, "download", lambda url, sha256, apart: tmp_path / "edm.pkl")
    out = tmp_path / "run"
    assert cifar_distill.main([
        "--preset", "paper", "--batch", "2", "--kimg", "0.004", "--wait-kimg", "0.002",
        "--features", "compact", "--eval-n", "6", "--preview", "1", "--device", "cpu",
        "--data", "tiny_samples.zip", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["images"] == 4 and result["config"]["lr_g"] == 1e-5
    assert "FD-compact to data: " in capsys.readouterr().out
    name = "model.map_augment.weight"
    assert torch.equal(saved(out)["G"][name], net.state_dict()[name])


TORCHRUN = """
import sys
import torch
sys.path[:0] = sys.argv[1:3]
from test_cifar_distill import IMAGES, LABELS, NETS, distiller, gradients, teacher
import cifar_distill
from plumbing import judge, teachers
from plumbing.run import rank
torch.set_num_threads(1)
teachers.CONFIGS = NETS
judge.curve = judge.side_by_side = lambda *a: None
load_all = cifar_distill.load_all

def steps_first(cfg):
    for norm, gan in (("level", 0.0), ("two-stage", 0.1)):
        d = distiller(teacher("tiny-cond"), IMAGES, LABELS, h="sba", norm=norm, gan=gan, batch=20,
                      amp="fp16" if gan else "no")
        for opt in (d.opt_g, d.opt_f):
            opt.param_groups[0]["eps"] = 1.0    # else Adam makes the sign of rounding a step
        for _ in range(3):
            d.step()
        state = {k: d.state()[k] for k in ("G", "fake", "sums", "level")}
        state["grads"] = gradients(d.G) + gradients(d.fake)
        if rank() == 0:
            torch.save(state, f"{sys.argv[3]}_{norm}.pt")
    return load_all(cfg)

cifar_distill.load_all = steps_first
sys.exit(cifar_distill.main(sys.argv[4:]))
"""


def test_two_processes_are_one(here, tmp_path):
    """The same batch: gradients, weights and statistics as in one process, then a whole run."""
    (tmp_path / "script.py").write_text(TORCHRUN)
    for n in (1, 2):
        launch = [] if n == 1 else ["-m", "torch.distributed.run", "--nproc_per_node=2",
                                    "--standalone"]
        done = subprocess.run(
            [sys.executable, *launch, tmp_path / "script.py", HERE, HERE / "tests",
             tmp_path / str(n), *flags(tmp_path / f"run{n}", kimg=0.004)], capture_output=True,
            text=True, cwd=here, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("FD-compact to teacher") == 1
    for norm, rtol in (("level", 1e-4), ("two-stage", 1e-2)):       # fp16 rounds the second
        one, two = (torch.load(tmp_path / f"{n}_{norm}.pt", weights_only=True) for n in (1, 2))
        for a, b in zip(one["grads"], two["grads"], strict=True):
            size = max(g.abs().max() for g in one["grads"]).item()
            close(b, a, rtol=0, atol=rtol * size)
        for key in ("G", "fake"):
            for name in one[key]:
                close(two[key][name], one[key][name], rtol=0, atol=1e-6)
        close(two["level"], one["level"], rtol=1e-4, atol=1e-6)
        for name in one["sums"]:
            close(two["sums"][name], one["sums"][name], rtol=rtol, atol=1e-5)
    one, two = (saved(tmp_path / f"run{n}") for n in (1, 2))
    assert json.loads((tmp_path / "run2/result.json").read_text())["processes"] == 2
    assert torch.equal(one["generator"], two["generator"]) and two["seen"] == 4
    close(two["rows"][0]["to_teacher"], one["rows"][0]["to_teacher"])
    assert len(two["rows"]) == len(one["rows"])


# ------------------------------------------------------------------------------------ bad input

def test_the_users_own_path_goes_first(tmp_path, monkeypatch):
    """pretrained/... is the user's file where there is one, else the one that comes with the
    project; samples lie beside the weights that are taken."""
    name = "pretrained/compact_teacher.pt"
    own, ending = "pretrained/compact_teacher_samples.zip", "_samples.zip"
    monkeypatch.chdir(tmp_path)
    assert shipped(name) == str(HERE / name) and shipped("none.pt") == "none.pt"
    assert beside(name, "own", ending) == str(HERE / own) == beside("other.pt", own, ending)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / name).touch()
    assert shipped(name) == name and beside(name, "mine.zip", ending) == "mine.zip"
    assert beside(name, "own", ending) == beside(name, "none", ending) == ""
    with pytest.raises(FileNotFoundError, match=f"no {own}: draw it by edm.py sample {name} -n"):
        beside(name, "own", ending, needed=True)
    (tmp_path / own).touch()
    assert beside(name, "own", ending) == own


def test_younger_weights_beside_the_teachers_guide_it(here, capsys):
    """What lies beside TEACHER.pt is found by its name, and "none" leaves it."""
    for name in ("led.pt", "led_young.pt"):
        torch.save(EDMPrecond(**TINY).state_dict(), name)
    shutil.copy("tiny_samples.zip", "led_samples.zip")
    cifar_distill.load_all(Config(teacher="led.pt"))
    assert not capsys.readouterr().err
    guided, images, _ = cifar_distill.load_all(Config(teacher="led.pt", w=1.5, guide_high=9.0))
    assert "of another guidance" in capsys.readouterr().err
    assert isinstance(guided, Guided) and (guided.w, guided.high) == (1.5, 9.0)
    young = torch.load("led_young.pt", weights_only=True)
    assert equal(dict(guided.weak.state_dict()), dict(young)) and len(images) == 24
    plain, _, _ = cifar_distill.load_all(Config(teacher="led.pt", guide="none"))
    assert isinstance(plain, EDMPrecond)


def test_bad_options_are_one_line(here, whole, capsys):
    def bad(reason, *more, out="bad", **options):
        with pytest.raises((ValueError, OSError, SystemExit)) as e:
            start(out, *more, **options)
        error = capsys.readouterr().err if e.type is SystemExit else str(e.value)
        assert reason in error and len(error.splitlines()) == 1, error
        assert e.type is not SystemExit or e.value.code == 2
        assert not (here / "bad").exists() or not any((here / "bad").iterdir())
    bad("--preset", "--preset=huge")
    bad("argument --h: must be one of", h="kll")
    bad("--lam", lam="nan")
    bad("lam must be a number from -50 to 50", h="sba", lam=51)
    bad("--lam is SBA's alone: say --h sba, not kl", h="kl", lam=3)
    bad("--teacher-free has no D_real", "--teacher-free", w_t="dmd")
    bad("--batch", batch=0)
    bad("--lr-g", lr_g=0)
    bad("--lr-f", lr_f="inf")
    bad("--norm", norm="layer")
    bad("--norm two-stage", norm="two-stage")
    bad("--part level goes with --norm batch", part="level")
    bad("--batch of at least 8", part="level", norm="batch", batch=7)
    bad("--eval-n must be at least 6", eval_n=5)
    bad("--t-min must be below --t-max", t_min=0.9)
    bad("--ess", ess=1.1)
    bad("--nfe: must be a whole number from 1 to 16", nfe=17)
    bad("--seed", seed=-1)
    bad("unrecognized arguments: --accumulate=2", accumulate=2)
    bad("no device", device="cuda:77")
    for empty in ("h", "teacher", "data", "bank", "reference", "out", "device", "kimg", "amp"):
        bad(f"--{empty}", **{empty: ""})
    bad("no such checkpoint", teacher="none.pt")
    bad("labelled.npz", teacher="labelled.npz")
    bad("small.npz: images of (3, 16, 16)", data="small.npz")
    bad("none.npz", data="none.npz")
    bad("none.npz", bank="none.npz")
    bad("no tiny-cond_samples.zip: draw it by edm.py sample", teacher="tiny-cond.pt")
    bad("tiny_samples.zip has no labels", teacher="tiny-cond.pt", data="tiny_samples.zip")
    bad("classes.npz: labels from 0 to 4", teacher="tiny-cond.pt", data="classes.npz")
    bad("class-conditional", guide="self")
    bad("nothing to resume", "--resume")
    bad("whole/checkpoint.pt exists: add --resume", out="whole")
    bad("--lam was 5.0, is 3.0; --ess was 0.9, is 0.8", "--resume", out="whole", ess=0.8, lam=3)
    (here / "file").write_text("in the way")
    bad("file", out="file/run")


def test_bad_students_are_one_line(here, whole, capsys):
    def bad(reason, *args):
        with pytest.raises((ValueError, OSError, SystemExit)) as e:
            cifar_distill.main(["sample", *args])
        error = capsys.readouterr().err if e.type is SystemExit else str(e.value)
        assert reason in error and len(error.splitlines()) == 1, error
    student = torch.load(whole / "student.pt", weights_only=True)
    torch.save(student | {"config": {"sigma_init": "far"}}, "broken.pt")
    bad("broken.pt: not a student: sigma_init or nfe must be", "broken.pt")
    torch.save(student | {"config": {"sigma_init": 2.5, "nfe": 10 ** 9}}, "broken.pt")
    bad("broken.pt: not a student: sigma_init or nfe must be", "broken.pt")
    torch.save(student | {"ema": dict(list(student["ema"].items())[1:])}, "broken.pt")
    bad("broken.pt: no known configuration", "broken.pt")
    torch.save({"config": {"sigma_init": 2.5}}, "broken.pt")
    bad("broken.pt: config is", "broken.pt")
    bad("none.pt", "none.pt")
    bad("checkpoint", "")
    bad("-n", str(whole / "student.pt"), "-n", "0")
    bad("--out", str(whole / "student.pt"), "--out", "")


BIAS = "model.map_layer0.bias"


@pytest.mark.parametrize("key, value, message", [
    ("seen", "many", "seen"), ("seen", -8, "seen is -8"), ("moves", -1, "moves is -1"),
    ("rows", [3], "rows"), ("rows", [{"kimg": "a", "seconds": 1.0}], "rows"),
    ("rows", {}, "rows"), ("seconds", "1", "seconds"), ("level", torch.zeros(3), "level"),
    ("level", None, "lacks level"), ("G", {}, "G lacks"), ("generator", "x", "generator"),
    ("sums", 3, "sums"), ("sums", {"ess": torch.zeros(3)}, "sums.ess"), ("sums", [0], "sums"),
    ("config", 3, "no run"), ("config", {}, "--h was None"), ("scaler", {"a": 1}, "scaler"),
    ("config", {"h": torch.zeros(2)}, "--h was"), ("opt_g", {}, "opt_g"), ("more", 1, "more"),
    ("opt_g.state.1.exp_avg", torch.zeros(3), "opt_g.state.1.exp_avg"),
    ("opt_f.state.1", 1, "opt_f.state.1"), (f"ema.{BIAS}", torch.zeros(3), f"ema.{BIAS}"),
    (f"fake.{BIAS}", torch.full((16,), torch.nan), f"fake.{BIAS}"), ("generator", None, "lacks")])
def test_a_broken_checkpoint_is_not_resumed(whole, key, value, message):
    """None takes a key out."""
    state = saved(whole)
    *above, last = [int(k) if k.isdigit() else k for k in key.split(".", 3)]
    if key.startswith(("ema", "fake")):
        above, last = [key.split(".")[0]], BIAS
    inner = state
    for k in above:
        inner = inner[k]
    inner[last] = value
    if value is None:
        del inner[last]
    Path("broken").mkdir(exist_ok=True)
    torch.save(state, "broken/checkpoint.pt")
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        start("broken", "--resume")
    assert len(str(e.value).splitlines()) == 1
    assert "checkpoint" in str(e.value)


def test_a_checkpoint_of_another_layout_goes_on_alike():
    """A GPU's networks lie otherwise in memory than a CPU's, and so do Adam's moments of them."""
    a, b = distiller(), distiller()
    a.step()
    state = copy.deepcopy(a.state())
    moved = 0
    for opt in (state["opt_g"], state["opt_f"]):
        for moments in opt["state"].values():
            for key, value in moments.items():
                moments[key] = value.contiguous()
                moved += moments[key].stride() != value.stride()
    b.load(state, "it")
    for d in (a, b):
        d.step()
    assert moved > 0
    for net in ("G", "fake", "ema"):
        close(dict(vars(a)[net].state_dict()), dict(vars(b)[net].state_dict()), rtol=0, atol=0)


def test_a_torn_checkpoint_is_not_resumed(whole):
    Path("torn").mkdir()
    Path("torn/checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="torn/checkpoint.pt"):
        start("torn", "--resume")


def test_help_tells_every_option_with_its_default(monkeypatch):
    parsers = []
    monkeypatch.setattr(cifar_distill.Parser, "parse_args",
                        lambda parser, argv: parsers.append(parser) or sys.exit())
    with pytest.raises(SystemExit):
        cifar_distill.main([])
    assert all(re.search("[a-z]{2}", action.help) for action in parsers[0]._actions)
    assert all(action.option_strings[-1] in parsers[0].format_help()
               for action in parsers[0]._actions)
    said = {action.dest: action.help for action in parsers[0]._actions}
    for f in fields(Config):
        assert f.default == "" or f"({f.default})" in said[f.name], f.name
    assert "(compact)" in said["preset"] and {"out", "resume"} < set(said)
