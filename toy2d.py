"""Algorithm 1 of Di-Bregman in the plane, where every estimate can be laid beside the truth.

The teacher is a mixture of Gaussians, so its score is exact at every noise level, and the student's
density comes from plane.log_q. A run tells which modes the choice of h keeps, and how far the
classifier's log r is from the true one. It takes a minute on one core.

    python toy2d.py                                     # KL keeps 8.0 of 8 modes (three seeds)
    python toy2d.py --h sba --lam 5                     # 1.3: the weight r^5 loses modes
    python toy2d.py --h sba --lam 5 --ratio exact       # 2.7: with the true ratio, no classifier

Samples, numbers and a picture go to runs/toy2d_H. --help lists all options and their choices.
"""
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import bregman
from plane import REWARDS, TARGETS, log_q, mode_statistics
from plots import plane_run
from plumbing.cli import count, nonnegative, parser, positive, real, run_main, share, whole
from plumbing.loop import atomic, check_finite, claim


# ------------------------------------------------------------------------------------ the networks

def mlp(n_in, n_out, width, activation):
    """Return a network of three hidden layers: (n, n_in) to (n, n_out)."""
    return nn.Sequential(nn.Linear(n_in, width), activation, nn.Linear(width, width), activation,
                         nn.Linear(width, width), activation, nn.Linear(width, n_out))


class FakeScore(nn.Module):
    """The student's denoiser psi, which gives the fake score, and the classifier eta: one network.

    D_fake = D_real + c_out F, where F is two outputs of the network, which start at 0: so it begins
    as the teacher's denoiser, as line 1 wants, and F has to learn only the difference of the two.
    """
    sigma_data = 0.7                        # standard deviation of the ring on each axis

    def __init__(self, teacher, width):
        super().__init__()
        self.teacher, self.net = teacher, mlp(3, 3, width, nn.SiLU())
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, sigma):
        """Return the denoised sample D_fake, (n, 2), and the logit l of p against q, (n, 1)."""
        c_in = (sigma ** 2 + self.sigma_data ** 2).rsqrt()                          # EDM, Table 1
        y = self.net(torch.cat([c_in * x, sigma.log() / 2], 1))     # EDM has / 4     (n, 3)
        return self.teacher(x, sigma) + self.c_out(sigma) * y[:, :2], y[:, 2:]

    def c_out(self, sigma):
        """Return the scale of F at noise levels sigma, (n, 1)."""
        return sigma * self.sigma_data * (sigma ** 2 + self.sigma_data ** 2).rsqrt()


# ------------------------------------------------------------------------------------- Algorithm 1

@dataclass
class Config:
    h: Literal[bregman.NAMES] = "kl"    # the row of Table 1
    lam: real = 5.0             # SBA's lambda
    target: Literal[tuple(TARGETS)] = "ring8"   # the teacher, a mixture of Gaussians
    seed: whole = 0             # of all random numbers
    steps: count = 9000         # updates of the generator
    batch: count = 256          # samples a step
    width: count = 96           # of both networks, which have three hidden layers each
    lr_g: positive = 1e-3       # the generator's learning rate; both rates fall as a cosine
    lr_f: positive = 3e-3       # the learning rate of fake score and classifier
    fake_updates: count = 1     # updates of fake score and classifier for each of the generator
    init_steps: count = 500     # of the regression that brings G to the teacher's denoiser
    sigma_min: positive = 0.02  # the lowest noise level; they are log-uniform
    sigma_max: positive = 2.0   # the highest noise level
    anneal: share = 0.25        # fraction of the run in which sigma_min falls from 0.5 to its value
    ratio: Literal["classifier", "exact"] = "classifier"    # where log r comes from
    clip: nonnegative = 5.0     # log r is kept within +-clip
    norm: Literal["batch", "two-stage"] = "batch"   # batch: weights of mean one; two-stage: 1/r
                                # is first divided by its mean at each noise level, as in f-distill
    part: Literal["both", "level", "sample"] = "both"   # both: the whole weight; level: its mean at
                                # each noise level; sample: what is left within a level
    ess: share = 0.0            # weights are tempered to this effective sample size; 0: as they are
    gan: nonnegative = 0.0      # w_GAN, the weight of line 13
    teacher_free: bool = False  # Appendix H: the score difference is the classifier's gradient
    reward: Literal[("", *REWARDS)] = ""    # Appendix G: linear tilts the target by exp(a x)

    def __post_init__(self):
        bregman.get(self.h, self.lam)
        if self.h != "sba" and self.lam != Config.lam:
            raise ValueError(f"--lam is SBA's alone: add --h sba, this is {self.h}")
        if self.sigma_min >= self.sigma_max:
            raise ValueError("--sigma-min must be below --sigma-max")
        if (self.norm != "batch") + (self.part != "both") + (self.reward != "") > 1:
            raise ValueError("choose one of --norm two-stage, --part and --reward")
        if self.gan and (self.ratio == "exact" or self.reward):
            raise ValueError("--gan needs --ratio classifier, and no --reward, which it opposes")


class Distiller:
    """Algorithm 1, with the paper's line numbers. p is the teacher's density, q the student's.

    cifar_distill.py has the same methods: what is exact here is estimated there.
    """

    def __init__(self, cfg):
        self.cfg, self.h = cfg, bregman.get(cfg.h, cfg.lam)
        torch.manual_seed(cfg.seed)                             # of the networks' first weights
        self.generator = torch.Generator().manual_seed(cfg.seed)    # not the student, G
        self.teacher = self.target = TARGETS[cfg.target]
        if cfg.reward:
            self.a = REWARDS[cfg.reward]
            self.target = self.teacher.tilt(self.a)
        self.G, self.fake = self.copy_weights()                                         # line 1
        self.ema = copy.deepcopy(self.G).requires_grad_(False)      # averages G, and is measured
        self.opt_g = torch.optim.Adam(self.G.parameters(), betas=(0.0, 0.99), fused=True)
        self.opt_f = torch.optim.Adam(self.fake.parameters(), betas=(0.0, 0.99), fused=True)
        self.log_w_mean = torch.zeros(16)   # log E[w | sigma], a running mean, for --part
        self.updates = 0                    # of the generator
        self.logged = {}                    # numbers of the last step, for the run's history

    def step(self):
        """Take lines 3 to 22 once."""
        cfg, b = self.cfg, self.sample_batch()
        self.set_rates()
        x = self.G(b.z)                                                 # lines 4, 5  (n, 2)
        x_t = x.detach() + b.sigma * b.noise                                            # line 7
        gap, log_r = self.scores_and_ratio(x_t, b)  # w(t) (s_psi - s_phi), log r    # lines 8, 9
        w = self.weights(log_r.detach())            # h''(r) r, of batch mean one       # line 10
        direction = w * gap                                                             # Eq. (4)
        if cfg.gan:                                 # -log of p / (p + q)               # line 13
            direction = direction + cfg.gan * self.gradient(F.softplus(log_r), x_t)
        if cfg.reward:                              # its sign: README, Errata          # Eq. (35)
            direction = direction - self.reward_term(log_r.detach(), x_t, b)
        surrogate = (x * direction).mean()          # its gradient is direction / x.numel()
        self.descend(self.opt_g, surrogate)                                             # line 15
        self.average_parameters()
        self.descend(self.opt_f, self.fake_loss(x.detach(), b))                 # lines 16 to 22
        for _ in range(cfg.fake_updates - 1):       # DMD2 and f-distill make several
            b = self.sample_batch()
            self.descend(self.opt_f, self.fake_loss(self.G(b.z).detach(), b))

    def scores_and_ratio(self, x_t, b):
        """Return w(t) (s_psi - s_phi), (n, 2), and log r, (n, 1), with a graph if line 13 or
        --teacher-free takes its gradient.

        A score is (D - x_t) / sigma^2, and w(t) = sigma.
        """
        needs_grad = bool(self.cfg.gan or self.cfg.teacher_free)
        x_t.requires_grad_(needs_grad)
        with torch.set_grad_enabled(needs_grad):
            D_fake, logits = self.fake(x_t, b.sigma)                                    # line 8
        log_r = -logits                                         # l = log p/q           # line 9
        if self.cfg.teacher_free:       # Eq. (37), its sign corrected: s_psi - s_phi is grad log r
            gap = b.sigma * self.gradient(log_r, x_t)
        else:
            gap = (D_fake - self.teacher(x_t, b.sigma)).detach() / b.sigma              # line 8
        if self.cfg.ratio == "exact":                           # the truth in line 9's place
            log_r = self.exact_log_r(x_t.detach(), b.sigma, cells=32, splits=0)     # coarse: fast
        check_finite(f"step {self.updates + 1}", b.sigma, score_gap=gap, log_r=log_r)
        return gap, log_r

    def weights(self, log_r):
        """Return h''(r) r over its mean in the batch, (n, 1). log_r: (n, 1).

        --norm two-stage and --part take equal slices of the batch for noise levels, so these must
        rise in the batch: see noise_levels().
        """
        cfg, log_r = self.cfg, log_r.flatten()                                          # (n,)
        self.logged["log_r"] = log_r
        if cfg.norm == "two-stage":
            log_r = bregman.two_stage(log_r)
        log_w = self.log_weights(log_r)
        if cfg.part != "both":
            rate = max(0.02, 1 / (1 + self.updates))
            by_level, within = bregman.factorise(log_w, self.log_w_mean, rate)
            log_w = by_level if cfg.part == "level" else within
        w, self.logged["ess"], _ = bregman.batch_weights(log_w, cfg.ess)
        return w[:, None]

    def fake_loss(self, x, b):
        """Return the loss of lines 16 to 22. Score and classifier have one noise level, the paper's
        t' and t'', and real and generated samples have one noise.

        Line 18 is EDM's denoising loss, whose weight is 1 / c_out^2. It trains the shared layers
        even with --teacher-free, where nothing uses the score (cifar_distill.py leaves it out).
        """
        noise = b.sigma_f * b.noise_f
        D_x, logits = self.fake(x + noise, b.sigma_f)                                   # line 17
        _, real_logits = self.fake(b.real + noise, b.sigma_f)                           # line 21
        loss_class = (F.softplus(logits) + F.softplus(-real_logits))[:, 0]              # Eq. (5)
        losses = dict(
            loss_score=((D_x - x) / self.fake.c_out(b.sigma_f)).square().mean(1),       # line 18
            loss_class=loss_class * self.needs_classifier())
        check_finite(f"step {self.updates}", b.sigma_f, **losses)
        losses = {name: values.mean() for name, values in losses.items()}
        self.logged |= {name: loss.detach() for name, loss in losses.items()}
        return losses["loss_score"] + losses["loss_class"]                              # line 22

    def descend(self, opt, loss):
        """Take one step of Adam."""
        opt.zero_grad()
        loss.backward()
        opt.step()

    # ------------------------------------------------------- what the steps above are made of

    def copy_weights(self):
        """Return G and the fake network, which begin near the teacher's denoiser: line 1.

        A regression brings G(z) to the teacher's D(sigma z; sigma) at sigma = 1.4. G is piecewise
        linear, so it can tear the plane into modes.
        """
        cfg = self.cfg
        G = mlp(2, 2, cfg.width, nn.LeakyReLU(0.1))
        opt = torch.optim.Adam(G.parameters(), fused=True)
        sigma = torch.full((512, 1), 1.4)
        for i in range(cfg.init_steps):
            opt.param_groups[0]["lr"] = 2e-3 * (1 - i / cfg.init_steps)
            z = self.normal(512)
            self.descend(opt, (G(z) - self.teacher(sigma * z, sigma)).square().mean())
        return G, FakeScore(self.teacher, cfg.width)

    def sample_batch(self):
        """Return the random numbers of a step: (n, 2) each, noise levels (n, 1)."""
        n = self.cfg.batch
        return SimpleNamespace(
            z=self.normal(n), sigma=self.noise_levels(n), noise=self.normal(n),         # lines 4, 7
            sigma_f=self.noise_levels(n), noise_f=self.normal(n),                       # line 17
            real=self.teacher.sample(n, self.generator))                                # line 21

    def normal(self, n):
        """Return standard normal noise, (n, 2)."""
        return torch.randn(n, 2, generator=self.generator)

    def noise_levels(self, n):
        """Return log-uniform noise levels, (n, 1), one in each of n equal steps of ln sigma.

        They rise, and weights() counts on that: if you draw them at random, sort them.
        """
        cfg = self.cfg
        # left: what is left of the anneal, from 1 to 0; high: where the lowest level begins
        left = max(0.0, 1 - self.updates / (cfg.anneal * cfg.steps)) if cfg.anneal else 0.0
        high = max(cfg.sigma_min, min(0.5, cfg.sigma_max))
        low = cfg.sigma_min * (high / cfg.sigma_min) ** left        # falls from high to sigma_min
        u = (torch.arange(n)[:, None] + torch.rand(n, 1, generator=self.generator)) / n
        return low * (cfg.sigma_max / low) ** u

    def log_weights(self, log_r):
        """Return log(h''(r) r) of log r within +-clip."""
        return self.h.log_weight(log_r.clamp(-self.cfg.clip, self.cfg.clip))

    def gradient(self, values, x_t):
        """Return the gradient of each sample's value, (n, 1), in its x_t, (n, 2)."""
        return torch.autograd.grad(values.sum(), x_t, retain_graph=True)[0]

    def reward_term(self, log_r, x_t, b):
        """Return w(t) h''(r*) grad r*, (n, 2), over the mean that weights() divides by.  Eq. (35)

        h''(r*) grad r* is the weight of r* times grad log r*, tempered as the weights of r are.
        """
        log_w = self.log_weights(log_r.flatten())                                       # (n,)
        _, _, tau = bregman.batch_weights(log_w, self.cfg.ess)
        log_mean = (tau * log_w).logsumexp(0) - math.log(len(log_w))
        log_r_star, grad = self.teacher.log_r_star(self.a, x_t, b.sigma)
        w_star = (tau * self.log_weights(log_r_star) - log_mean).exp()
        return b.sigma * w_star[:, None] * grad

    def set_rates(self):
        """Let the rates fall as a cosine, to a hundredth of lr_g and a tenth of lr_f."""
        fall = 0.5 + 0.5 * math.cos(math.pi * self.updates / self.cfg.steps)
        self.opt_g.param_groups[0]["lr"] = self.cfg.lr_g * max(fall, 0.01)
        self.opt_f.param_groups[0]["lr"] = self.cfg.lr_f * (0.1 + 0.9 * fall)

    @torch.no_grad()
    def average_parameters(self):
        """Count an update, and move the average towards G. It reaches back over about a tenth of
        the updates so far, and over 1000 at most."""
        self.updates += 1
        beta = min(0.999, 1 - 1 / (1 + self.updates / 10))
        torch._foreach_lerp_([*self.ema.parameters()], [*self.G.parameters()], 1 - beta)

    def samples(self, n):
        """Return n samples of the averaged student, (n, 2)."""
        return self.ema(self.normal(n))

    def exact_log_r(self, x_t, sigma, cells=128, splits=2):
        """Return the true log q_sigma / p_sigma at x_t, (n, 1)."""
        return (log_q(self.G, x_t, sigma, cells, splits) - self.teacher.log_p(x_t, sigma))[:, None]

    def needs_classifier(self):
        """Return whether the update uses the classifier at all."""
        return self.cfg.ratio == "classifier" or self.cfg.teacher_free


# --------------------------------------------------------------------------------------- the truth

@torch.no_grad()
def compare_ratios(d, sigma, n):
    """Return the exact and the classifier's log r at n samples of q_sigma, (n,) each, and the
    discretisation error of the first: what it changes with half as many cells on an axis.

    q is the student that the classifier learns from, not the averaged one.
    """
    sigma = torch.full((n, 1), float(sigma))
    x_t = d.G(d.normal(n)) + sigma * d.normal(n)
    exact, learned = d.exact_log_r(x_t, sigma), -d.fake(x_t, sigma)[1]
    coarse = d.exact_log_r(x_t, sigma, cells=64)
    return exact[:, 0], learned[:, 0], (exact - coarse)[:, 0]


@torch.no_grad()
def measure(d):
    """Return a run's numbers: modes, both KL divergences of p and q at sigma = the modes' width,
    and root-mean-square errors of log r by noise level."""
    result = mode_statistics(d.samples(10000), d.target)
    sigma = torch.full((1000, 1), d.target.std)
    for key, x, sign in (("kl_pq", d.target.sample(1000, d.generator), 1),
                         ("kl_qp", d.samples(1000), -1)):
        x_t = x + sigma * d.normal(1000)
        minus_log_r = d.target.log_p(x_t, sigma) - log_q(d.ema, x_t, sigma)
        result[key] = float(sign * minus_log_r.mean())
    of_classifier, of_cells = {}, {}
    for sigma in np.geomspace(d.cfg.sigma_min, d.cfg.sigma_max, 8):
        exact, learned, change = compare_ratios(d, sigma, 500)
        of_cells[f"{sigma:.3g}"] = float(change.square().mean().sqrt())
        if d.needs_classifier():
            of_classifier[f"{sigma:.3g}"] = float((learned - exact).square().mean().sqrt())
    # a median, since the error at the lowest noise level would decide a mean
    median = float(np.median(list(of_classifier.values()))) if of_classifier else None
    return result | dict(log_r_error=median, log_r_error_by_sigma=of_classifier,
                         discretisation_error_by_sigma=of_cells)


# ------------------------------------------------------------------------------------------- a run

FRAME_SIGMAS = (0.05, 0.3, 1.5)         # noise levels at which a frame keeps log r


@torch.no_grad()
def frame(d, z, noise):
    """Return samples of the averaged student for fixed latents z, (n, 2), and log r as training has
    it at FRAME_SIGMAS, (3, n), both in float16."""
    log_r = []
    for sigma in FRAME_SIGMAS:
        sigma = torch.full_like(z[:, :1], sigma)
        x_t = d.G(z) + sigma * noise
        log_r.append(d.exact_log_r(x_t, sigma, cells=32, splits=0)
                     if d.cfg.ratio == "exact" else -d.fake(x_t, sigma)[1])
    return d.ema(z).half().numpy(), torch.cat(log_r, 1).T.half().numpy()


def distil(cfg):
    """Run Algorithm 1. Return the Distiller, the result, log r as training had it, (N,), and up to
    24 frames of 200 samples: step (F,), x (F, 200, 2) and log_r (F, 3, 200).

    Raises FloatingPointError, naming step and noise level, for what is no longer finite.
    """
    start, d = time.time(), Distiller(cfg)
    history, seen, every = [], [], max(1, cfg.steps // 100)
    # rounded, since ceil would lift 9000.0000001 to a step that never comes
    framed = np.geomspace(max(1, cfg.steps / 1000), cfg.steps, 24).round(6)
    framed, frames = np.unique(np.ceil(framed).astype(int)), []         # steps that have a frame
    z, noise = torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(cfg.seed))
    progress = tqdm(range(1, cfg.steps + 1), unit="step")
    for i in progress:
        d.step()
        if i % every == 0:
            stats = mode_statistics(d.samples(2000), d.target)
            logged = {k: float(d.logged[k]) for k in ("ess", "loss_score", "loss_class")}
            history.append(dict(step=i) | stats | logged)
            seen.append(d.logged["log_r"])
            progress.set_postfix(modes=stats["modes_covered"], tv=f"{stats['mode_tv']:.2f}",
                                 on_mode=f"{stats['on_mode']:.2f}")
        if i in framed:
            frames.append(frame(d, z, noise))
    result = dict(h=cfg.h, lam=cfg.lam, seed=cfg.seed) | measure(d)
    result |= dict(ess=float(np.mean([row["ess"] for row in history])), config=asdict(cfg),
                   seconds=time.time() - start, history=history)
    frames = dict(step=framed, x=np.array([x for x, _ in frames]),
                  log_r=np.array([log_r for _, log_r in frames]))
    return d, result, torch.cat(seen), frames


def write(folder, d, result, seen, frames):
    """Write picture.png, samples.npy (3000, 2), frames.npz and result.json to a run's folder."""
    scatter = {s: compare_ratios(d, s, 700)[:2] for s in FRAME_SIGMAS if d.needs_classifier()}
    plane_run(bregman.row_name(d.cfg.h, d.cfg.lam), d.samples(4000), d.target, result, seen,
              lambda log_r: d.log_weights(log_r).exp(), scatter, folder / "picture.png")
    with atomic(folder / "samples.npy") as tmp:
        np.save(tmp, d.samples(3000).numpy().astype(np.float16))
    with atomic(folder / "frames.npz") as tmp:
        np.savez_compressed(tmp, **frames)
    with atomic(folder / "result.json") as tmp:
        tmp.write_text(json.dumps(result, allow_nan=False) + "\n")


def parse(argv):
    """Return the Config and the output folder that a command line asks for."""
    p = parser("toy2d.py", __doc__, Config)
    p.add_argument("--out", type=Path, metavar="FOLDER", help="the run's folder (runs/toy2d_H)")
    args = vars(p.parse_args(argv))
    out, cfg = args.pop("out"), Config(**args)
    return cfg, out or Path(f"runs/toy2d_{bregman.row_name(cfg.h, cfg.lam)}")


def main(argv):
    cfg, out = parse(argv)
    torch.set_num_threads(1)                # the matrices are small: a second thread only waits
    torch.set_flush_denormal(True)
    with claim(out):                        # before the training, in case one can't write there
        d, result, seen, frames = distil(cfg)
        write(out, d, result, seen, frames)
    if errors := result["log_r_error_by_sigma"].items():
        print("the classifier's root-mean-square error in log r: "
              + ", ".join(f"{error:.2g} at sigma {sigma}" for sigma, error in errors))
    print(f"{result['modes_covered']} of {result['modes']} modes, TV {result['mode_tv']:.3f}, "
          f"on a mode {result['on_mode']:.3f}, KL(p|q) {result['kl_pq']:.3f}, "
          f"KL(q|p) {result['kl_qp']:.3f}, {result['seconds']:.0f} s")
    print(f"{out}/picture.png: red where samples are, blue where they should be")


if __name__ == "__main__":
    run_main(main)
