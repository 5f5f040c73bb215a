"""Algorithm 1 on CIFAR-10: a diffusion teacher distilled into a one-step generator.

    python cifar_distill.py                             # offline, no GPU: five minutes
    python cifar_distill.py --h sba --lam 5             # any h of bregman.py
    python cifar_distill.py --preset paper              # the paper's experiment: GPU, downloads
    torchrun --nproc_per_node=8 cifar_distill.py --preset paper
    python cifar_distill.py --resume                    # goes on, bit for bit on a CPU
    python cifar_distill.py sample runs/distill/checkpoint.pt -n 64 --out grid.png

A step is: G one forward and one backward; the teacher one forward; the fake network one forward
for score and logits together (no backward through either of these two); its own update one forward
and backward on the same generated images and the encoder's on real ones. The adversarial loss and
--teacher-free add the encoder's backward to its input; gradient accumulation one forward of G.
"""
import argparse
import contextlib
import copy
import csv
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import bregman
import fid
from data import (Parser, atomic, device, load_images, positive, reading, run_main, save_atomic,
                  save_grid, save_images, tune_cpu)
from edm import build, half_life_to_beta, load_teacher, sample, to_uint8

HERE = Path(__file__).parent
SCALE = 2.0 ** 12           # of a loss before fp16 would lose its gradient, taken out again after

PRESETS = {
    "compact": {},                                      # the defaults below: two cores, no network
    "smoke": dict(kimg=0.256, batch=16, wait_kimg=0.064, eval_every=0.128, eval_n=200, preview=16),
    "paper": dict(                                      # Appendix D; SiDA's settings for the rest
        h="sba", lam=5.0, teacher="edm-cifar10-32x32-uncond-vp", data="cifar10", bank="",
        kimg=15_000, batch=256, lr_g=1e-5, lr_f=1e-5, decay_kimg=0, wait_kimg=100, ema_kimg=500,
        p_mean=-1.2, p_std=1.2, norm="batch", w_t="dmd", t_min=0.0, clip=10, ess=0.0, grad_clip=1.0,
        features="inception", eval_every=1000, eval_n=50_000, save_every=250),
}


@dataclass
class Config:
    h: str = "kl"               # a name of bregman.NAMES
    lam: float = 5.0            # SBA's lambda
    teacher: str = "pretrained/compact_teacher.pt"      # what load_teacher takes
    data: str = "pretrained/compact_teacher_samples.zip"    # images for the classifier's p
    bank: str = "pretrained/compact_teacher_samples.zip"    # the teacher's samples, to judge by
    reference: str = "cifar10"  # the data to judge by: what fid.py takes
    cond: bool = False          # a class-conditional teacher
    kimg: float = 16            # thousands of generated images, the run's length
    batch: int = 32             # images a step, over all processes
    accumulate: int = 1         # in so many parts
    lr_g: float = 2e-4          # generator's Adam
    lr_f: float = 4e-4          # fake network's: score and classifier
    decay_kimg: float = 4.0     # both rates fall as 1 / (1 + images / decay_kimg); 0 for constant
    wait_kimg: float = 2.0      # for which the generator waits for the fake network
    sigma_init: float = 2.5     # x = G(sigma_init z, sigma_init)
    t_min: float = 0.15         # the generator's noise levels: from this
    t_max: float = 0.8          # to this share of EDM's grid, from the lowest level up
    w_t: str = "c_out"          # w(t) = sigma^2 / c_out(sigma); "dmd": over |x - D_real|'s mean
    p_mean: float = -0.6        # the fake network's: ln sigma is normal with this mean
    p_std: float = 1.6          # and this standard deviation, to reach where the generator looks
    head: str = "mean"          # log r = -mean of the encoder's last features; "linear": of a
                                # trained 1x1 convolution of them, which starts as that mean
    class_min: float = 0.0      # the classifier learns at noise levels from this
    class_max: float = 1000.0   # to this
    clip: float = 5.0           # log r within +-clip
    norm: str = "level"         # log r less its running mean at its noise level, then weights of
                                # batch mean one; "batch": the latter; "two-stage"; "none"
    ess: float = 0.9            # least effective sample size: log weights are scaled down to it
    gan: float = 0.0            # w_GAN, line 13
    teacher_free: bool = False  # Appendix H: the score gap is the classifier's gradient
    ema_kimg: float = 2.0       # half-life of the generator's average, which is what is judged
    grad_clip: float = 0.0      # bound on each gradient value of the fake network, 0 for none
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    amp: str = "no"             # "bf16" or "fp16": autocast
    tf32: bool = True           # on GPUs that have it
    channels_last: bool = torch.cuda.is_available()     # no gain on CPUs
    compile: bool = False       # torch.compile: minutes first, then faster
    features: str = "compact"   # of the distance: "compact" or "inception", see fid.py
    eval_every: float = 4.0     # kimg between rows of log.csv, grids and curve.png
    eval_n: int = 2000          # samples for a row
    preview: int = 64           # samples in each picture
    save_every: float = 2.0     # kimg between checkpoints

    def __post_init__(self):
        bregman.get(self.h, self.lam)
        for name, known in dict(norm=("level", "batch", "two-stage", "none"),
                                w_t=("c_out", "dmd"), head=("mean", "linear"),
                                amp=("no", "bf16", "fp16"),
                                features=("compact", "inception")).items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {' '.join(known)}, "
                                 f"not {getattr(self, name)!r}")
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{f.name.replace('_', '-')} must be finite, not {value}")
        for name in ("kimg", "batch", "accumulate", "lr_g", "lr_f", "sigma_init", "p_std", "eval_n",
                     "preview", "eval_every", "save_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        for name in ("wait_kimg", "decay_kimg", "clip", "gan", "ema_kimg", "grad_clip"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0")
        if not 0 <= self.class_min < self.class_max:
            raise ValueError("need 0 <= class-min < class-max")
        if not (0 <= self.ess <= 1 and 0 <= self.t_min < self.t_max <= 1):
            raise ValueError("need 0 <= ess <= 1 and 0 <= t-min < t-max <= 1")
        if self.norm == "two-stage" and self.batch < 20:
            raise ValueError("--norm two-stage has 10 bins, and needs --batch 20 at least")
        if self.compile and (self.gan or self.teacher_free):
            raise ValueError("--compile goes with neither --gan nor --teacher-free: compiled "
                             "networks can't be differentiated twice in one step")
        parts = world() * self.accumulate
        if self.batch % parts:
            raise ValueError(f"batch {self.batch} is not divisible into {world()} processes "
                             f"times {self.accumulate} parts")


# ------------------------------------------------------------------- one process among how many

def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


def gather(values):
    """Each process's share (n,) of a global batch -> all of it (n world,), in the batch's order."""
    if world() == 1:
        return values
    shares = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(shares, values.contiguous())
    return torch.stack(shares, 1).flatten()


# ----------------------------------------------------------------------------- the fake network

def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


class FakeLoss(nn.Module):
    """Lines 17 to 22 in one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, net, low, high):
        super().__init__()
        self.net, self.low, self.high = net, low, high

    def forward(self, x, real, sigma, noise, labels=None, real_labels=None, score=True):
        """-> denoising loss (N,) and classifier's loss (N,), both on the images x, real (N, ...)
        under the same noise."""
        s = sigma[:, None, None, None]
        if score:
            D_x, logits = self.net(x + s * noise, sigma, labels, return_logits=True)
            weight = (sigma ** 2 + self.net.sigma_data ** 2) / (sigma * self.net.sigma_data) ** 2
            loss_score = weight * (D_x - x).square().mean((1, 2, 3))                    # line 18
        else:
            logits, loss_score = self.net.encode(x + s * noise, sigma, labels), 0 * sigma
        real_logits = self.net.encode(real + s * noise, sigma, real_labels)             # line 21
        loss_class = F.softplus(logits) + F.softplus(-real_logits)              # line 22, Eq. (5)
        return loss_score, loss_class.mean((1, 2)) * (sigma >= self.low) * (sigma <= self.high)


# ---------------------------------------------------------------------------------- Algorithm 1

class Distiller:
    """Algorithm 1, an iteration a step(); the line numbers in the comments are the paper's.

    All that changes is in state(). Random numbers are drawn on the CPU for the global batch, so
    that a seed means the same on every device and any number of processes.
    """

    def __init__(self, cfg, teacher, images, labels=None):
        self.cfg, self.b = cfg, bregman.get(cfg.h, cfg.lam)
        if tuple(images.shape[1:]) != (3, 32, 32):
            raise ValueError(f"{cfg.data}: images of {tuple(images.shape[1:])}, not (3, 32, 32)")
        if bool(teacher.label_dim) != cfg.cond:
            raise ValueError(f"{cfg.teacher} is {'' if teacher.label_dim else 'not '}class-"
                             f"conditional: {'add' if teacher.label_dim else 'leave out'} --cond")
        if cfg.cond and labels is None:
            raise ValueError(f"{cfg.data} has no labels, which --cond needs")
        if cfg.cond and labels.max() >= teacher.label_dim:
            raise ValueError(f"{cfg.data} has more classes than {cfg.teacher}")
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = cfg.tf32
        self.images, self.labels = images.to(cfg.device), labels
        form = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.teacher = teacher.to(cfg.device, memory_format=form).eval().requires_grad_(False)

        self.G, self.fake, self.ema = (copy.deepcopy(self.teacher) for _ in range(3))   # line 1
        if cfg.head == "linear":
            c = [*self.fake.model.enc.values()][-1].conv1.out_channels
            self.fake.head = nn.Conv2d(c, 1, 1, device=cfg.device)
            nn.init.constant_(self.fake.head.weight, 1 / c)
            nn.init.zeros_(self.fake.head.bias)
        for net in (self.G, self.fake):                         # in eval mode, all: no dropout
            net.requires_grad_(True)
            if net.model.map_augment is not None:               # there are no augmentation labels
                net.model.map_augment.requires_grad_(False)
        adam = dict(betas=(0.0, 0.999), fused=True)
        self.opt_g = torch.optim.Adam(trained(self.G), cfg.lr_g, **adam)
        self.opt_f = torch.optim.Adam(trained(self.fake), cfg.lr_f, **adam)
        kind = torch.device(cfg.device).type
        scaled = cfg.amp == "fp16"
        self.scaler_g, self.scaler_f = (torch.amp.GradScaler(kind, enabled=scaled) for _ in "gf")
        dtype = torch.float16 if scaled else torch.bfloat16
        self.autocast = lambda: torch.autocast(kind, dtype, cfg.amp != "no")
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.seen, self.sums = 0, {}            # images so far; what happened since the last row
        self.level, self.moves = torch.zeros(min(10, cfg.batch), device=cfg.device), 0
        if cfg.compile:
            for net in (self.G, self.fake, self.teacher, self.ema):
                net.compile()
            self.fake.encode = torch.compile(self.fake.encode)
        self.G_step, self.fake_loss = self.G, FakeLoss(
            self.fake, cfg.class_min, cfg.class_max)
        if world() > 1:
            ids = [torch.device(cfg.device).index] if kind == "cuda" else None
            self.G_step = DistributedDataParallel(self.G, ids, broadcast_buffers=False)
            self.fake_loss = DistributedDataParallel(
                self.fake_loss, ids, broadcast_buffers=False,
                find_unused_parameters=cfg.teacher_free)        # the decoder has no loss then

    def state(self):
        return {"config": asdict(self.cfg), "seen": self.seen,
                "level": self.level, "moves": self.moves,
                "sums": self.sums, "generator": self.generator.get_state(),
                "G": self.G.state_dict(), "fake": self.fake.state_dict(),
                "ema": self.ema.state_dict(),
                "opt_g": self.opt_g.state_dict(), "opt_f": self.opt_f.state_dict(),
                "scaler_g": self.scaler_g.state_dict(), "scaler_f": self.scaler_f.state_dict()}

    def load(self, state):
        for name in ("G", "fake", "ema", "opt_g", "opt_f", "scaler_g", "scaler_f"):
            getattr(self, name).load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        self.seen, self.moves = state["seen"], state["moves"]
        self.level = state["level"].to(self.cfg.device)
        self.sums = {k: v.to(self.cfg.device) for k, v in state["sums"].items()}

    def draw(self):
        """-> a step's random numbers, as namespaces: one per part of this process's share.

        sigma: sorted, one in each of `batch` equal steps of the grid, EDM Eq. (5).
        """
        cfg, g, n = self.cfg, self.generator, self.cfg.batch
        t = (torch.arange(n) + torch.rand(n, generator=g)) / n                          # line 7
        t = cfg.t_min + (cfg.t_max - cfg.t_min) * t
        low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
        index = torch.randint(len(self.images), (n,), generator=g)                      # line 21
        d = dict(z=torch.randn(n, 3, 32, 32, generator=g),                              # line 4
                 sigma=(low + t * (high - low)) ** 7, noise=torch.randn(n, 3, 32, 32, generator=g),
                 sigma_f=(cfg.p_mean + cfg.p_std * torch.randn(n, generator=g)).exp(),  # line 17
                 noise_f=torch.randn(n, 3, 32, 32, generator=g), index=index,
                 flip=torch.rand(n, generator=g) < 0.5)
        if cfg.cond:
            d["c"] = torch.eye(10)[torch.randint(10, (n,), generator=g)]
            d["c_real"] = torch.eye(10)[self.labels[index]]
        mine = [v[rank()::world()].to(cfg.device).chunk(cfg.accumulate) for v in d.values()]
        parts = [SimpleNamespace(c=None, c_real=None) for _ in range(cfg.accumulate)]
        for name, chunks in zip(d, mine):
            for part, chunk in zip(parts, chunks):
                setattr(part, name, chunk)
        return parts

    def real(self, p):
        x = self.images[p.index].float() / 127.5 - 1
        return torch.where(p.flip[:, None, None, None], x.flip(3), x)

    def generate(self, G, p):
        """x = G(sigma_init z), float [-1, 1] (N, 3, 32, 32).  Line 5"""
        sigma = torch.full((len(p.z),), self.cfg.sigma_init, device=p.z.device)
        with self.autocast():
            return G(self.cfg.sigma_init * p.z, sigma, p.c)

    def compare(self, x, p):
        """Lines 7 to 9 -> the descent direction of Eq. (4) without its weight, (N, 3, 32, 32), the
        adversarial loss's gradient or 0, and log r (N,).

        With w(t) = sigma^2 / c_out(sigma) it is the difference of the two networks' outputs. DMD
        has |x - D_real|'s mean over pixels in c_out's place, which depends on the image, not on t
        alone as Eq. (4) wants.
        """
        cfg, sigma = self.cfg, p.sigma[:, None, None, None]
        x_t = (x + sigma * p.noise).requires_grad_(cfg.teacher_free or cfg.gan > 0)     # line 7
        with torch.set_grad_enabled(x_t.requires_grad), self.autocast():                # line 8
            if cfg.teacher_free:
                logits = self.fake.encode(x_t, p.sigma, p.c)
            else:
                D_fake, logits = self.fake(x_t, p.sigma, p.c, return_logits=True)
            logit, adversarial = logits.float().mean((1, 2)), 0
            if cfg.gan:                                                                 # line 13
                loss = F.softplus(-logits.float()).mean((1, 2)).sum()
                adversarial, = torch.autograd.grad(loss * SCALE, x_t, retain_graph=cfg.teacher_free)
                adversarial = adversarial / SCALE
            if cfg.teacher_free:
                slope, = torch.autograd.grad(logit.sum() * SCALE, x_t)
                slope = slope / SCALE
        c_out = sigma * 0.5 / (sigma ** 2 + 0.25).sqrt()
        if cfg.teacher_free:                    # Eq. (37), sign corrected: grad log r = -slope
            return -slope * sigma ** 2 / c_out, adversarial, -logit.detach()
        with torch.no_grad(), self.autocast():
            D_real = self.teacher(x_t.detach(), p.sigma, p.c)                           # line 8
        size = c_out
        if cfg.w_t == "dmd":
            size = (x - D_real).abs().mean((1, 2, 3), keepdim=True)
        return (D_fake.detach() - D_real) / size, adversarial, -logit.detach()          # line 9

    def weigh(self, log_r):
        """log r (B,) of the global batch, sorted by noise level -> the weights h''(r) r (B,), and
        their effective sample size and tempering as averages() wants them."""
        cfg = self.cfg
        if cfg.norm == "two-stage":
            log_r = bregman.two_stage(log_r)
        if cfg.norm == "level":
            bins = log_r.tensor_split(len(self.level))
            rate = max(0.02, 1 / (1 + self.moves))
            self.level += rate * (torch.stack([b.mean() for b in bins]) - self.level)
            log_r = torch.cat([b - level for b, level in zip(bins, self.level)])
        log_w = self.b.log_weight(log_r.clamp(-cfg.clip, cfg.clip))
        tau = bregman.temper(log_w, cfg.ess) if cfg.ess else torch.ones((), device=log_w.device)
        w, ess = bregman.batch_weights(tau * log_w)
        if cfg.norm == "none":
            w = (tau * log_w).exp()
        return w, dict(ess=ess, tau=tau)

    def update_generator(self, parts, xs):
        """Lines 6 to 15, on images xs with their graph, or (with accumulation) without."""
        with torch.no_grad():
            gaps, adversarial, log_r = zip(*map(self.compare, (x.detach() for x in xs), parts))
            size = gather(torch.cat([gap.abs().mean((1, 2, 3)) for gap in gaps]))
            log_r, sigma = gather(torch.cat(log_r)), gather(torch.cat([p.sigma for p in parts]))
            self.check(sigma, log_r=log_r, score_gap=size)
            w, seen = self.weigh(log_r)                                                 # line 10
            self.check(sigma, weight=w)
        ws = w[rank()::world()].chunk(len(parts))
        self.opt_g.zero_grad()
        for i, (p, x, gap, a, w_i) in enumerate(zip(parts, xs, gaps, adversarial, ws)):
            last = i == len(parts) - 1
            with self.sync(self.G_step, last):
                if not x.requires_grad:
                    x = self.generate(self.G_step, p)
                gradient = w_i[:, None, None, None] * gap + self.cfg.gan * a * gap[0].numel()
                surrogate = (x * gradient).mean() / len(parts)      # its gradient is Eq. (4)'s
                self.scaler_g.scale(surrogate).backward()
        self.scaler_g.unscale_(self.opt_g)
        seen["grad_g"] = self.gradient_norm("generator", self.G)
        self.scaler_g.step(self.opt_g)                                                  # line 15
        self.scaler_g.update()
        self.moves += 1
        return seen | dict(log_r=log_r.mean(), log_r_std=log_r.std())

    def update_fake(self, parts, xs):
        """Lines 16 to 22: one pass serves both, with t'' = t', as in SiDA."""
        self.opt_f.zero_grad()
        losses = []
        for i, (p, x) in enumerate(zip(parts, xs)):
            with self.sync(self.fake_loss, i == len(parts) - 1), self.autocast():
                each = self.fake_loss(x, self.real(p), p.sigma_f, p.noise_f, p.c, p.c_real,
                                      score=not self.cfg.teacher_free)
                self.scaler_f.scale(sum(l.mean() for l in each) / len(parts)).backward()
            losses.append(torch.stack(each).detach())
        score, classifier = (gather(l) for l in torch.cat(losses, 1))
        sigma = gather(torch.cat([p.sigma_f for p in parts]))
        self.check(sigma, loss_score=score, loss_class=classifier)
        self.scaler_f.unscale_(self.opt_f)
        norm = self.gradient_norm("fake network", self.fake)
        if self.cfg.grad_clip:
            torch.nn.utils.clip_grad_value_(self.fake.parameters(), self.cfg.grad_clip)
        self.scaler_f.step(self.opt_f)
        self.scaler_f.update()
        return dict(loss_score=score.mean(), loss_class=classifier.mean(), grad_f=norm)

    def step(self):
        parts = self.draw()
        since = self.seen - 1e3 * self.cfg.wait_kimg
        moving = since >= 0
        if self.cfg.decay_kimg:
            rate = 1 / (1 + max(0, since) / (1e3 * self.cfg.decay_kimg))
            self.opt_g.param_groups[0]["lr"] = self.cfg.lr_g * rate
            self.opt_f.param_groups[0]["lr"] = self.cfg.lr_f * rate
        with torch.set_grad_enabled(moving and len(parts) == 1):
            xs = [self.generate(self.G_step, p) for p in parts]                         # lines 4, 5
        seen = self.update_generator(parts, xs) if moving else {}
        seen |= self.update_fake(parts, [x.detach() for x in xs])
        self.seen += self.cfg.batch
        if moving:
            life = min(1e3 * self.cfg.ema_kimg, 0.1 * (since + self.cfg.batch))
            beta = half_life_to_beta(self.cfg.batch, life)
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.parameters()), list(self.G.parameters()),
                                     1 - beta)
        for name, value in seen.items():
            value = torch.stack([value.detach().float(), torch.ones_like(value)])
            self.sums[name] = self.sums.get(name, 0) + value

    def averages(self):
        """-> the means over the steps since the last call, as numbers."""
        means = {k: (v[0] / v[1]).item() for k, v in self.sums.items()}
        self.sums = {}
        return means

    def check(self, sigma, **named):
        """Stop on the first of the named values (B,) that is not finite, or beyond any use."""
        values = torch.stack(list(named.values()))
        bad = ~(values.abs() < 1e8)
        if bad.any():
            which, i = bad.nonzero()[0].tolist()
            raise FloatingPointError(f"after {self.seen} images: {list(named)[which]} is "
                                     f"{values[which, i].item():g} at sigma = {sigma[i].item():.4g}"
                                     "; the last checkpoint stays as it was")

    def gradient_norm(self, what, net):
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained(net) if p.grad is not None])
        if not norm.isfinite() and self.cfg.amp != "fp16":      # whose scaler skips such a step
            raise FloatingPointError(f"after {self.seen} images: the {what}'s gradient is "
                                     f"{norm.item():g}; the last checkpoint stays as it was")
        return norm

    def sync(self, net, last):
        """DistributedDataParallel averages gradients with the last part of a batch only."""
        return contextlib.nullcontext() if last or world() == 1 else net.no_sync()


# -------------------------------------------------------------------------------------- judging

def one_step(net, n, sigma_init=2.5, seed=0, batch=64):
    """n samples with one evaluation each, uint8 (n, 3, 32, 32) on the CPU; the classes take turns.
    From the noise of edm.sample with this seed, so that two grids can be laid side by side."""
    where, images = next(net.parameters()).device, []
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, n, batch):
        size = min(batch, n - start)
        z = torch.randn(size, 3, 32, 32, generator=generator).to(where)
        c = None
        if net.label_dim:
            c = torch.eye(net.label_dim, device=where)[torch.arange(start, start + size)
                                                       % net.label_dim]
        with torch.no_grad():
            sigma = torch.full((size,), sigma_init, device=where)
            images.append(to_uint8(net(sigma_init * z, sigma, c)).cpu())
    return torch.cat(images)


class Judge:
    """Measures samples against the data and, where there is a bank, the teacher's samples."""

    def __init__(self, cfg, net, bank=None):
        self.cfg, self.net = cfg, net.to(cfg.device)
        self.data = fid.measure_source(cfg.reference, self.net)
        self.bank = None if bank is None else fid.measure(bank, self.net)

    def __call__(self, G):
        """-> a row's distances, and the first samples."""
        images = one_step(G, self.cfg.eval_n, self.cfg.sigma_init)
        m = fid.measure(images, self.net)
        row = {"to_data": fid.frechet(m.mu, m.sigma, self.data.mu, self.data.sigma)}
        if self.bank:
            row["to_teacher"] = fid.frechet(m.mu, m.sigma, self.bank.mu, self.bank.sigma)
        return row | {"score": m.score[0]}, images[:self.cfg.preview]

    def teachers_own(self):
        """The same distances for the bank itself: the floor. To the teacher: half against half."""
        if not self.bank:
            return {}
        (mu1, s1), (mu2, s2) = (half.stats() for half in self.bank.halves)
        to_data = fid.frechet(self.bank.mu, self.bank.sigma, self.data.mu, self.data.sigma)
        return {"to_data": to_data, "to_teacher": fid.frechet(mu1, s1, mu2, s2),
                "score": self.bank.score[0]}


def timed(f):
    """-> f()'s result, which is on the CPU, and its seconds."""
    start = time.perf_counter()
    return f(), time.perf_counter() - start


# --------------------------------------------------------------------------------------- a run

# what a resumed run may change
FREE = ("kimg", "device", "compile", "tf32", "eval_every", "save_every")
ROW = ("kimg", "seconds", "to_data", "to_teacher", "score", "ess", "tau", "log_r", "log_r_std",
       "loss_score", "loss_class", "grad_g", "grad_f")


def read_run(path, cfg=None):
    """A run's checkpoint, if it is a run of `cfg`; ValueError names the fields that differ."""
    with reading(path, "a checkpoint of cifar_distill.py"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["config"]
        state["G"], state["ema"], state["fake"], state["rows"]
    new = asdict(cfg) if cfg else {}
    differ = [f"{k} was {old.get(k)!r}, is {v!r}" for k, v in new.items()
              if k not in FREE and old.get(k) != v]
    if differ:
        raise ValueError(f"{path} is a run of another configuration: {'; '.join(differ)}")
    return state


def load_all(cfg):
    """-> teacher, images, labels, the judge's network, bank. What can't be had is named at once."""
    def find(name):             # what is shipped is found from every folder
        return HERE / name if name.startswith("pretrained/") else name
    wanted = [lambda: load_teacher(find(cfg.teacher)), lambda: load_images(find(cfg.data)),
              lambda: fid.load_net(cfg.features),
              lambda: load_images(find(cfg.bank))[0] if cfg.bank else None]
    got, missing = [], []
    if rank() > 0:
        dist.barrier()          # process 0 downloads
    for load in wanted:
        try:
            got.append(load())
        except OSError as e:
            missing.append(str(e))
    if world() > 1 and rank() == 0:
        dist.barrier()
    if missing:
        raise OSError("; ".join(dict.fromkeys(missing)))
    teacher, (images, labels), net, bank = got
    return teacher, images, labels, net, bank


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 15, "axes.titlesize": 16})
    return plt


def draw_curve(rows, own, name, path):
    """The distances against images seen, with the teacher's own as lines."""
    plt = pyplot()
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for key, label, colour in (("to_teacher", "teacher's samples", "#cb181d"),
                               ("to_data", "CIFAR-10", "#2171b5")):
        points = [(r["kimg"], r[key]) for r in rows if r.get(key) is not None]
        if points:
            ax.plot(*zip(*points), "o-", color=colour, lw=2, label=f"to {label}")
        if own.get(key):
            ax.axhline(own[key], color=colour, ls=":", lw=2)
    ax.set(xlabel="generated images (thousands)", ylabel=name, yscale="log")
    ax.legend(title="dotted: the teacher's own")
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


def draw_samples(teacher, student, path):
    """Two grids, from the same noise."""
    plt, side = pyplot(), math.isqrt(len(teacher))
    fig, axes = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
    for ax, images, title in ((axes[0], teacher, "teacher: 35 evaluations"),
                              (axes[1], student, "student: 1 evaluation, same noise")):
        grid = images[:side ** 2].view(side, side, 3, 32, 32).permute(0, 3, 1, 4, 2)
        grid = grid.reshape(side * 32, side * 32, 3)
        ax.imshow(grid.numpy(), interpolation="nearest")
        ax.set(title=title, xticks=[], yticks=[])
    with atomic(path) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


def write_csv(rows, path):
    with atomic(path) as tmp, open(tmp, "w", newline="") as f:
        writer = csv.DictWriter(f, ROW)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" for k, v in row.items() if v is not None} for row in rows)


def run(cfg, out, resume=False):
    """Distil; files under `out`, by process 0 alone. -> exit status."""
    path, main = out / "checkpoint.pt", rank() == 0
    state = None
    if resume:
        if not path.exists():
            raise FileNotFoundError(f"nothing to resume: no {path}")
        state = read_run(path, cfg)
    elif path.exists():
        raise FileExistsError(f"{path} exists: add --resume to go on, or choose another --out")
    if main:
        write_csv(state["rows"] if state else [], out / "log.csv")      # a full disk shows here
    teacher, images, labels, net, bank = load_all(cfg)
    d = Distiller(cfg, teacher, images, labels)
    judge = Judge(cfg, net, bank) if main else None
    own = judge.teachers_own() if main else {}
    name = "FID" if cfg.features == "inception" else "FD-compact"
    rows, before, start, saved = [], 0.0, time.time(), -1
    if state:
        d.load(state)
        rows, before, saved = state["rows"], state["seconds"], d.seen

    def seconds():
        return before + time.time() - start

    def evaluate():
        if not main:
            return
        distances, grid = judge(d.ema)
        rows.append({"kimg": d.seen / 1e3, "seconds": seconds()} | distances | d.averages())
        write_csv(rows, out / "log.csv")
        save_grid(grid, out / f"grid_{d.seen:09}.png")
        draw_curve(rows, own, name, out / "curve.png")

    def save():
        if main:
            save_atomic(d.state() | {"rows": rows, "seconds": seconds()}, path)
        return d.seen

    if not rows:
        evaluate()
    stop = []                                   # a signal asks, the loop answers between steps
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    key = "to_teacher" if bank is not None else "to_data"
    with tqdm(total=round(cfg.kimg * 1e3), initial=d.seen, unit="img", disable=not main,
              smoothing=0.1) as bar:
        while d.seen < cfg.kimg * 1e3 and not agreed(stop, cfg.device):
            d.step()
            bar.update(cfg.batch)
            if d.seen % max(1, round(1e3 * cfg.eval_every)) < cfg.batch:
                evaluate()
            if main:
                bar.set_postfix_str(f"{name} {rows[-1][key]:.3g}", refresh=False)
            if d.seen % max(1, round(1e3 * cfg.save_every)) < cfg.batch:
                saved = save()
    if main and round(rows[-1]["kimg"] * 1e3) != d.seen and not stop:
        evaluate()
    if saved != d.seen:
        save()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stop:
        if main:
            launcher = "python" if world() == 1 else f"torchrun --nproc_per_node={world()}"
            flags = shlex.join([a for a in sys.argv[1:] if a != "--resume"] + ["--resume"])
            print(f"stopped after {d.seen} images; to go on: {launcher} cifar_distill.py {flags}")
        return 128 + stop[0]
    return finish(cfg, out, d, rows, own, name, seconds()) if main else 0


def agreed(stop, where):
    """Whether any process was asked to stop: all leave the loop at the same step."""
    if world() > 1:
        flag = torch.tensor(float(stop[0] if stop else 0), device=where)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        stop[:] = [int(flag)] if flag else []
    return bool(stop)


def finish(cfg, out, d, rows, own, name, seconds):
    """samples.png, result.json, and one line."""
    n, many = cfg.preview, 8 * cfg.preview
    sample(d.teacher, n, steps=18 if cfg.compile else 1)            # both networks warm
    teachers, slow = timed(lambda: sample(d.teacher, n))
    students, fast = timed(lambda: one_step(d.ema, many, cfg.sigma_init))
    slow, fast = slow / n, fast / many
    draw_samples(teachers, students, out / "samples.png")
    result = {"distance": name, "before": rows[0], "after": rows[-1], "teacher": own,
              "images": d.seen, "seconds": seconds, "seconds_per_image": fast,
              "teacher_seconds_per_image": slow, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "processes": world(), "config": asdict(cfg)}
    with atomic(out / "result.json") as tmp:
        tmp.write_text(json.dumps(result, indent=1) + "\n")
    key, what = (("to_teacher", "the teacher's samples") if own else ("to_data", "the data"))
    floor = f"; the teacher's own {own[key]:.3g}" if own else ""
    print(f"{name} to {what}: {rows[0][key]:.4g} before, {rows[-1][key]:.4g} after {d.seen} "
          f"images in {seconds:.0f} s{floor}; {1e3 * fast:.2g} ms an image, {slow / fast:.0f} "
          f"times faster than the teacher: {out}/samples.png")
    return 0


# ------------------------------------------------------------------------------------ command line

def parse(argv):
    """-> Config, output folder, resume."""
    parser = Parser(prog="cifar_distill.py", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="compact")
    parser.add_argument("--out", type=Path, help="the run's folder (runs/PRESET_H)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for f in fields(Config):
        how = dict(type=device if f.name == "device" else f.type)
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else how
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **how)
    args = vars(parser.parse_args(argv))
    preset, out, resume = args.pop("preset"), args.pop("out"), args.pop("resume")
    chosen = PRESETS[preset] | args
    if preset == "paper" and chosen.get("cond") and "teacher" not in args:
        chosen["teacher"] = "edm-cifar10-32x32-cond-vp"
    if world() > 1 and chosen.get("device", Config.device) == "cuda":
        try:
            chosen["device"] = device(f"cuda:{os.environ['LOCAL_RANK']}")
        except argparse.ArgumentTypeError as e:
            raise ValueError(f"one process per GPU: {e}") from e
    cfg = Config(**chosen)
    h = f"{cfg.h.lower()}{cfg.lam:g}" if cfg.h.lower() == "sba" else cfg.h.lower()
    return cfg, out or Path("runs") / f"{preset}_{h}", resume


def main(argv):
    tune_cpu()
    if argv[:1] == ["sample"]:
        parser = Parser(prog="cifar_distill.py sample", description="Draw from a student.")
        parser.add_argument("checkpoint")
        parser.add_argument("-n", type=positive, default=64, help="how many")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", type=device, default=Config.device)
        parser.add_argument("--out", default="samples.png", help=".npz or .zip, else a grid as PNG")
        args = parser.parse_args(argv[1:])
        state = read_run(args.checkpoint)
        net = build(state["ema"], args.checkpoint).to(args.device)
        images = one_step(net, args.n, state["config"]["sigma_init"], args.seed)
        save = save_images if args.out.endswith((".npz", ".zip")) else save_grid
        save(images, args.out)
        return 0

    cfg, out, resume = parse(argv)
    if world() > 1:
        kind = torch.device(cfg.device).type
        if kind == "cuda":
            torch.cuda.set_device(cfg.device)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        return run(cfg, out, resume)
    finally:
        if world() > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run_main(main)
