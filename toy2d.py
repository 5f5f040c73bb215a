"""Di-Bregman in the plane: Algorithm 1 with every estimate laid beside the truth.

The teacher is a mixture of Gaussians, so p_sigma and its score are exact at every noise level; the
student's q_sigma is known to a hundredth of its logarithm, by cells of the latent plane.

    python toy2d.py                                     # KL: 8 of 8 modes; a minute on one core
    python toy2d.py --h sba --lam 5                     # a weight that rises with r drops modes
    python toy2d.py --h sba --lam 5 --ratio exact       # the true density ratio, no classifier

By default log r is clipped at +-5 and the weights are divided by their batch mean, no more.
"""
from plumbing.run import check_finite, run_main     # first: before torch it can make Ctrl-C quiet

import math
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import bregman
from plane import REWARDS, TARGETS, log_q, mode_statistics
from plumbing.files import claim
from plumbing.options import (Parser, count, evaluations, nonnegative, path, positive, real,
                              row_name, share, torch_device, torch_seed, validate)
from plumbing.plane_run import FRAME_SIGMAS, Film, tell, write


# ------------------------------------------------------------------------------------ the networks

def mlp(n_in, n_out, width, activation):
    """Three hidden layers: (n, n_in) -> (n, n_out)."""
    layers = [nn.Linear(n_in, width), activation()]
    for _ in range(2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, n_out))


class FakeScore(nn.Module):
    """psi and eta in one network: the student's denoiser (fake score) and the classifier's logit.

    D_fake = D_real + c_out F starts as the teacher's denoiser, copyWeights(phi) for a teacher
    that is a formula; F is all that has to be learned, the gap between two scores.
    """
    sigma_data = 0.7                        # standard deviation of the ring, per coordinate

    def __init__(self, teacher, width, head="linear", nfe=1):
        super().__init__()
        self.teacher, self.head, self.nfe = teacher, head, nfe
        net = mlp(2 + nfe, 3, width, nn.SiLU)
        self.encoder, self.decoder = net[:-2], net[-2:]
        nn.init.zeros_(self.decoder[-1].weight)
        nn.init.zeros_(self.decoder[-1].bias)

    def outputs(self, x, sigma, made_by=None):
        """-> F (N, 2) and the logit l (N, 1) of p against q at noise level sigma. With --nfe K, q
        is that of evaluation number made_by (N, 1): as one mixture K kinds of samples can match p
        while none of them does."""
        c_in = (sigma ** 2 + self.sigma_data ** 2).rsqrt()
        which = [(made_by == k).float() for k in range(1, self.nfe)]            # none with K = 1
        # features from before the last SiLU: after it their mean, a head, is hardly below 0
        features = self.encoder(torch.cat([c_in * x, sigma.log() / 2, *which], 1))      # (N, width)
        y = self.decoder(features)
        return y[:, :2], y[:, 2:] if self.head == "linear" else features.mean(1, keepdim=True)

    def forward(self, x, sigma, made_by=None, return_logits=False):
        F_x, logits = self.outputs(x, sigma, made_by)
        D_x = self.teacher(x, sigma) + self.c_out(sigma) * F_x
        return (D_x, logits) if return_logits else D_x

    def encode(self, x, sigma, made_by=None):
        return self.outputs(x, sigma, made_by)[1]

    def c_out(self, sigma):
        return sigma * self.sigma_data * (sigma ** 2 + self.sigma_data ** 2).rsqrt()   # EDM Table 1


# ------------------------------------------------------------------------------------- Algorithm 1

@dataclass
class Config:
    h: Literal[bregman.NAMES] = "kl"    # which row of Table 1
    lam: real = 5.0             # SBA's lambda
    target: Literal[tuple(TARGETS)] = "ring8"   # the teacher: ring8 grid25 uneven8
    seed: torch_seed = 0        # of all random numbers
    steps: count = 9000         # updates of the student
    batch: count = 256          # samples a step
    width: count = 96           # of both networks, three layers each
    lr_g: positive = 1e-3       # student's Adam; both rates fall as a cosine
    lr_f: positive = 3e-3       # fake score's and classifier's
    ema: share = 0.999          # of the student's weights, which are what is measured
    sigma_init: positive = 1.4  # G(z) starts as the teacher's D(sigma_init z; sigma_init)
    nfe: evaluations = 1        # evaluations of the student for a sample
    init_steps: count = 500     # of the regression that brings G there
    sigma_min: positive = 0.02  # the lowest noise level; they are log-uniform
    sigma_max: positive = 2.0   # the highest
    anneal: share = 0.25        # share of the run over which sigma_min falls from 0.5 to its value
    ratio: Literal["classifier", "exact"] = "classifier"    # the source of log r: classifier, exact
    cells: count = 32           # on each axis, of the exact ratio in training
    head: Literal["linear", "mean"] = "linear"  # linear: the logit is an output of its own;
                                # mean: it is the features' mean, as in SiDA
    class_min: nonnegative = 0.0        # the lowest noise level at which the classifier learns
    class_max: positive = 1000.0        # the highest
    clip: nonnegative = 5.0     # log r within +-clip
    norm: Literal["batch", "two-stage"] = "batch"   # batch: weights of mean one; two-stage: and,
                                # before, 1/r of mean one at each noise level, as in f-distill
    part: Literal["both", "level", "sample"] = "both"   # both: the weight; level: its mean at each
                                # noise level; sample: what is left within one
    ess: share = 0.0            # least effective sample size: weights are tempered to it; 0: as is
    gan: nonnegative = 0.0      # w_GAN, line 13
    teacher_free: bool = False  # Appendix H: the score gap is the classifier's gradient
    reward: Literal[("", *REWARDS)] = ""    # linear: tilt the target by R(x) = exp(a x), Appendix G
    device: torch_device = "cpu"        # cpu, cuda, mps

    def __post_init__(self):
        validate(self)
        bregman.get(self.h, self.lam)
        if self.sigma_min >= self.sigma_max or self.ema == 1:
            raise ValueError("need --sigma-min below --sigma-max, and --ema below 1")
        if max(self.class_min, self.sigma_min) >= min(self.class_max, self.sigma_max):
            raise ValueError("--class-min to --class-max must overlap --sigma-min to --sigma-max")
        if not 2 <= self.cells <= 1024:
            raise ValueError(f"--cells must be from 2 to 1024, not {self.cells}")
        if self.nfe > 1 and self.ratio == "exact":
            raise ValueError("--nfe must be 1 for --ratio exact, which knows the density of G(z)")
        if self.part != "both" and (self.norm != "batch" or self.batch < 16):
            raise ValueError(f"--part {self.part} goes with --norm batch, and a --batch of at least"
                             " 16, its noise levels")
        if self.norm == "two-stage" and self.batch < 20:
            raise ValueError("--norm two-stage has 10 bins: --batch must be at least 20")
        if self.reward and (self.part != "both" or self.norm != "batch"):
            raise ValueError("--reward needs --part both and --norm batch: r* is not read by level")


class Distiller:
    """Algorithm 1; the line numbers are the paper's. p is the teacher's density, q the student's.
    cifar_distill.py has the same methods; what is exact here is estimated there."""

    def __init__(self, cfg):
        self.cfg, self.h = cfg, bregman.get(cfg.h, cfg.lam)
        torch.manual_seed(cfg.seed)
        self.generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        self.teacher = self.target = TARGETS[cfg.target].to(cfg.device)
        if cfg.reward:
            self.a = REWARDS[cfg.reward].to(cfg.device)
            self.target = self.teacher.tilt(self.a)
        self.g_sigmas = [cfg.sigma_init * (1 - k / cfg.nfe) ** 2 for k in range(cfg.nfe)]
        self.G, self.fake = self.copy_weights()                                         # line 1
        self.ema = [p.detach().clone() for p in self.G.parameters()]
        self.opt_g = torch.optim.Adam(self.G.parameters(), betas=(0.0, 0.99), fused=True)
        self.opt_f = torch.optim.Adam(self.fake.parameters(), betas=(0.0, 0.99), fused=True)
        self.level = torch.zeros(16, device=cfg.device)         # log of w's mean by noise level
        self.moves = 0                                          # updates of the student
        self.logged = {}                                        # by the last step

    def step(self):
        """Lines 3 to 22, once."""
        b = self.draw()
        self.set_rates()
        x = self.G(self.start(b))                                       # lines 4, 5  (n, 2)
        x_t = x.detach() + b.sigma * b.noise                                            # line 7
        gap, slope, log_r = self.compare(x_t, b)    # w(t) (s_psi - s_phi), 0, log r    # lines 8, 9
        w = self.weigh(log_r)                       # h''(r) r, of batch mean one       # line 10
        if self.cfg.reward:                                             # Eq. (35), sign corrected
            slope = slope - self.reward_slope(x_t, b)
        surrogate = (x * (w * gap + slope)).mean()      # its gradient is Eq. (4)'s + line 13's
        self.descend(self.opt_g, surrogate)                                             # line 15
        self.average_weights()
        self.descend(self.opt_f, self.fake_loss(x.detach(), b))                   # lines 16 to 22

    @torch.no_grad()
    def start(self, b, G=None):
        """-> what G sees: z (n, 2). With --nfe K it sees its noise level as well, (n, 3). b.last
        (n, 1) says which evaluation is a sample's last, from 0 to K - 1; those before it, of noise
        b.before (K - 1, n, 2), are not learned from. G: another network than self.G."""
        if self.cfg.nfe == 1:
            return b.z
        for k, (noise, sigma) in enumerate(zip((*b.before, b.z), self.g_sigmas)):
            x = (G or self.G)(u) if k else 0.0
            now = (x + sigma * noise) / math.hypot(sigma, FakeScore.sigma_data)
            now = F.pad(now, (0, 1), value=sigma)
            u = torch.where(b.last >= k, now, u) if k else now
        return u

    def compare(self, x_t, b):
        """-> w(t) (s_psi - s_phi) and the adversarial loss's gradient, or 0, both (n, 2), and log r
        (n, 1). w(t) = sigma."""
        cfg, needs_slope = self.cfg, bool(self.cfg.gan or self.cfg.teacher_free)
        slope = 0
        x_t.requires_grad_(needs_slope)
        with torch.set_grad_enabled(needs_slope):
            D_fake, logits = self.fake(x_t, b.sigma, b.last, return_logits=True)        # line 8
        log_r = -logits                                         # l = log p/q           # line 9
        if cfg.gan:                                             # -log D                  line 13
            slope = cfg.gan * self.slope(F.softplus(log_r), x_t)
        if cfg.teacher_free:                                    # Eq. (37), its sign corrected
            gap = self.slope(log_r, x_t) * b.sigma
        else:
            gap = (D_fake - self.teacher(x_t, b.sigma)).detach() / b.sigma              # line 8
        if cfg.ratio == "exact":                                # the truth in line 9's place
            log_r = self.log_r(self.G, x_t.detach(), b.sigma, cfg.cells, splits=0)
        check_finite(f"step {self.moves + 1}", b.sigma, score_gap=gap, log_r=log_r)
        return gap, slope, log_r.detach()

    def weigh(self, log_r):
        """-> h''(r) r with batch mean one, (n, 1). Noise levels rise in the batch, so that its
        slices are levels."""
        cfg, every = self.cfg, log_r.flatten()                                          # (n,)
        self.logged["log_r"] = every
        if cfg.norm == "two-stage":
            every = bregman.two_stage(every)
        log_w = self.h.log_weight(every.clamp(-cfg.clip, cfg.clip))
        if cfg.part != "both":
            level, within = bregman.split(log_w, self.level, max(0.02, 1 / (1 + self.moves)))
            log_w = level if cfg.part == "level" else within
        w, self.logged["ess"], self.tau = bregman.batch_weights(log_w, cfg.ess)
        # log of the mean that they were divided by, which reward_slope() divides by too
        self.scale = (self.tau * log_w).logsumexp(0) - math.log(len(log_w))
        return w.view_as(log_r)

    def fake_loss(self, x, b):
        """Lines 16 to 22 in one pass: t'' = t', real and generated samples under one noise."""
        cfg, noise = self.cfg, b.sigma_f * b.noise_f
        D_x, logits = self.fake(x + noise, b.sigma_f, b.last, return_logits=True)       # line 17
        real_logits = self.fake.encode(b.real + noise, b.sigma_f, b.last)               # line 21
        score = ((D_x - x) / self.fake.c_out(b.sigma_f)).square().mean(1)               # line 18
        classifier = (F.softplus(logits) + F.softplus(-real_logits))[:, 0]              # Eq. (5)
        learns = (b.sigma_f >= cfg.class_min) & (b.sigma_f <= cfg.class_max)
        classifier = classifier * learns[:, 0] * self.needs_classifier()
        check_finite(f"step {self.moves}", b.sigma_f, loss_score=score, loss_class=classifier)
        self.logged |= dict(loss_score=score.mean().detach(), loss_class=classifier.mean().detach())
        return score.mean() + classifier.mean()                                         # line 22

    def descend(self, opt, loss):
        """One step of Adam."""
        opt.zero_grad()
        loss.backward()
        opt.step()

    # ------------------------------------------------------- what the steps above are made of

    def copy_weights(self):
        """Line 1 -> G and the fake network. G starts as a regression to the teacher's denoiser at
        sigma_init. It is linear in pieces, so it can tear the plane into modes."""
        cfg = self.cfg
        G = mlp(2 + (cfg.nfe > 1), 2, cfg.width, lambda: nn.LeakyReLU(0.1)).to(cfg.device)
        fake = FakeScore(self.teacher, cfg.width, cfg.head, cfg.nfe).to(cfg.device)
        opt = torch.optim.Adam(G.parameters(), fused=True)
        for i in range(cfg.init_steps):
            opt.param_groups[0]["lr"] = 2e-3 * (1 - i / cfg.init_steps)
            u = self.start(self.latents(512), self.teachers_denoiser)
            self.descend(opt, (G(u) - self.teachers_denoiser(u)).square().mean())
        return G, fake

    def teachers_denoiser(self, u):
        """What G starts as: D at what it sees, u (n, 2), or (n, 3) with its noise level."""
        if self.cfg.nfe == 1:
            sigma = torch.full_like(u[:, :1], self.cfg.sigma_init)
            return self.teacher(sigma * u, sigma)
        sigma = u[:, 2:]
        return self.teacher((sigma ** 2 + FakeScore.sigma_data ** 2).sqrt() * u[:, :2], sigma)

    def normal(self, *shape):
        """Standard normal, (*shape, 2)."""
        return torch.randn(*shape, 2, generator=self.generator, device=self.cfg.device)

    def latents(self, n, last=None):
        """-> noise for n samples whose last evaluation is number `last`, or 0 to K - 1 in turn."""
        turns = torch.arange(n, device=self.cfg.device)[:, None] % self.cfg.nfe
        return SimpleNamespace(z=self.normal(n), before=self.normal(self.cfg.nfe - 1, n),
                               last=turns if last is None else torch.full_like(turns, last))

    def draw(self):
        """-> a step's random numbers."""
        n = self.cfg.batch
        return SimpleNamespace(**vars(self.latents(n)), sigma=self.sigmas(n), noise=self.normal(n),
                               sigma_f=self.sigmas(n), noise_f=self.normal(n),
                               real=self.teacher.sample(n, self.generator))

    def sigmas(self, n):
        """Log-uniform noise levels (n, 1), rising: one in each of n equal steps of ln sigma."""
        cfg = self.cfg
        left = max(0.0, 1 - self.moves / (cfg.anneal * cfg.steps)) if cfg.anneal else 0.0
        high = max(cfg.sigma_min, min(0.5, cfg.sigma_max))
        low = cfg.sigma_min * (high / cfg.sigma_min) ** left        # falls from high to sigma_min
        u = torch.arange(n, device=cfg.device)[:, None]
        u = (u + torch.rand(n, 1, generator=self.generator, device=cfg.device)) / n
        return low * (cfg.sigma_max / low) ** u

    def slope(self, values, x_t):
        """The gradient of their sum in x_t."""
        return torch.autograd.grad(values.sum(), x_t, retain_graph=True)[0]

    def set_rates(self):
        fall = 0.5 + 0.5 * math.cos(math.pi * self.moves / self.cfg.steps)
        self.opt_g.param_groups[0]["lr"] = self.cfg.lr_g * max(fall, 0.01)
        self.opt_f.param_groups[0]["lr"] = self.cfg.lr_f * (0.1 + 0.9 * fall)

    @torch.no_grad()
    def average_weights(self):
        self.moves += 1
        beta = min(self.cfg.ema, 1 - 1 / (1 + self.moves / 10))     # over the last tenth at first
        torch._foreach_lerp_(self.ema, list(self.G.parameters()), 1 - beta)

    def needs_classifier(self):
        return self.cfg.ratio == "classifier" or bool(self.cfg.gan or self.cfg.teacher_free)

    def log_r(self, G, x_t, sigma, cells=128, splits=2):
        """log q_sigma / p_sigma at x_t, (N, 1), of a student G: the truth."""
        return (log_q(G, x_t, sigma, cells, splits) - self.teacher.log_p(x_t, sigma))[:, None]

    def averaged(self, u):
        """The student that is measured: G with averaged weights."""
        names = [name for name, _ in self.G.named_parameters()]
        return torch.func.functional_call(self.G, dict(zip(names, self.ema)), (u,))

    @torch.no_grad()
    def samples(self, n):
        """The averaged student's, (n, 2)."""
        return self.averaged(self.start(self.latents(n, self.cfg.nfe - 1), self.averaged))

    def reward_slope(self, x_t, b):
        """w(t) h''(r*) grad r*, (n, 2), in units of the weights' batch mean.  Eq. (35)"""
        log_star, gradient = self.teacher.log_r_star(self.a, x_t, b.sigma)
        log_w = self.h.log_weight(log_star.clamp(-self.cfg.clip, self.cfg.clip))
        return b.sigma * (self.tau * log_w - self.scale).exp()[:, None] * gradient


# --------------------------------------------------------------------------------------- the truth

@torch.no_grad()
def compare_ratios(d, level, n):
    """-> exact and learned log r under q_sigma of the student that the classifier follows, and the
    ruler's own error, what half as many cells on an axis change in the first: (n,) each."""
    sigma = torch.full((n, 1), float(level), device=d.cfg.device)
    x_t = d.G(d.normal(n)) + sigma * d.normal(n)
    exact, learned = d.log_r(d.G, x_t, sigma), -d.fake.encode(x_t, sigma)
    return exact[:, 0], learned[:, 0], (exact - d.log_r(d.G, x_t, sigma, 64))[:, 0]


@torch.no_grad()
def measure(d):
    """The result's numbers. The divergences are those of p and q at sigma = the modes' width; the
    classifier's error in log r, root-mean-square by noise level, has the ruler's own beside it."""
    result = mode_statistics(d.samples(10000), d.target) | dict(
        kl_pq=None, kl_qp=None, log_r_by_sigma={}, ruler_by_sigma={}, log_r_error=None)
    if d.cfg.nfe > 1:                       # the ruler knows the density of G(z) alone
        return result
    sigma = torch.full((1000, 1), d.target.std, device=d.cfg.device)
    for key, x, sign in (("kl_pq", d.target.sample(1000, d.generator), 1),
                         ("kl_qp", d.samples(1000), -1)):
        x_t = x + sigma * d.normal(1000)
        gap = d.target.log_p(x_t, sigma) - log_q(d.averaged, x_t, sigma)
        result[key] = float(sign * gap.mean())
    for level in np.geomspace(d.cfg.sigma_min, d.cfg.sigma_max, 8):
        key, (exact, learned, off) = f"{level:.3g}", compare_ratios(d, level, 500)
        result["ruler_by_sigma"][key] = float(off.square().mean().sqrt())
        if d.needs_classifier():
            result["log_r_by_sigma"][key] = float((learned - exact).square().mean().sqrt())
    if d.needs_classifier():                        # a median, which no single level decides
        result["log_r_error"] = float(np.median(list(result["log_r_by_sigma"].values())))
    return result


def distil(cfg, frames=24, points=200, bar=True):
    """Run cfg.steps of Algorithm 1 -> the Distiller, its result, the log r seen in training, and
    `frames` snapshots of `points` samples, as a dictionary of arrays: step, x and log_r.
    Raises FloatingPointError, naming step and noise level, for what is no longer finite."""
    start, d = time.time(), Distiller(cfg)
    history, seen, every = [], [], max(1, cfg.steps // 100)
    film = Film(cfg, frames, points)
    progress = tqdm(range(1, cfg.steps + 1), disable=not bar, unit="step")
    for i in progress:
        d.step()
        if i % every == 0:
            stats = mode_statistics(d.samples(2000), d.target)
            history.append(dict(step=i, **stats) | {k: float(d.logged[k]) for k in (
                "ess", "loss_score", "loss_class")})
            seen.append(d.logged["log_r"].cpu())
            progress.set_postfix(modes=stats["modes_covered"], tv=f"{stats['mode_tv']:.2f}",
                                 on_mode=f"{stats['on_mode']:.2f}")
        film.look(d, i)
    result = dict(h=cfg.h, lam=cfg.lam, seed=cfg.seed) | measure(d)
    result |= dict(ess=float(np.mean([r["ess"] for r in history])), seconds=time.time() - start,
                   config=asdict(cfg), history=history)
    return d, result, torch.cat(seen), film.arrays()


def parse(argv):
    """-> Config, output folder."""
    parser = Parser(prog="toy2d.py", description=__doc__.splitlines()[0])
    parser.add_fields(Config)
    parser.add("out", path, None, "the run's folder (runs/toy2d_H)")
    args = vars(parser.parse_args(argv))
    out, cfg = args.pop("out"), Config(**args)
    return cfg, out or path(f"runs/toy2d_{row_name(cfg.h, cfg.lam)}")


def main(argv):
    cfg, out = parse(argv)
    torch.set_num_threads(1)                # the matrices are small: a second thread only waits
    torch.set_flush_denormal(True)
    with claim(out) as folder:              # fails now, not after the training
        d, result, seen, frames = distil(cfg)
        scatter = {s: [v.cpu() for v in compare_ratios(d, s, 700)[:2]] for s in FRAME_SIGMAS
                   if d.needs_classifier() and cfg.nfe == 1}
        write(folder, d, result, seen, frames, scatter)
    tell(result, folder)


if __name__ == "__main__":
    run_main(main)
