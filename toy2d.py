"""Di-Bregman in the plane: Algorithm 1 with every estimate laid beside the truth.

The teacher is a mixture of Gaussians, so p_sigma and its score are exact at every noise level; the
student's q_sigma is, to Monte Carlo error, a mean of Gaussians around its own samples.

    python toy2d.py --h sba --lam 5             # distil, measure, draw (50 s on one core)
    python toy2d.py --h sba --lam 5 --ratio exact       # the true density ratio, no classifier
    python toy2d.py --all --seeds 5             # every h: figures/toy2d_modes.png and a table
    python toy2d.py --gif                       # the student closing in, KL beside SBA

By default log r is clipped at +-5 and the weights are divided by their batch mean, no more.
"""
import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import bregman

SIGMA_DATA = 0.7                            # standard deviation of every target, per coordinate


# -------------------------------------------------------------------- the teacher, all of it exact

class Mixture:
    """weights (K,), means (K, 2), one standard deviation for all. x is (N, 2), sigma (N, 1)."""

    def __init__(self, weights, means, std):
        self.weights, self.means, self.std = weights, means, std

    def _logits(self, x, sigma):
        variance = self.std ** 2 + sigma ** 2
        square = (x[:, None] - self.means).square().sum(2)                          # (N, K)
        return self.weights.log() - square / (2 * variance) - (2 * math.pi * variance).log()

    def log_p(self, x, sigma):
        """log p_sigma(x): (N,), finite however far x is."""
        return self._logits(x, sigma).logsumexp(1)

    def score(self, x, sigma):
        """grad log p_sigma(x): (N, 2)."""
        nearby = self._logits(x, sigma).softmax(1) @ self.means
        return (nearby - x) / (self.std ** 2 + sigma ** 2)

    def denoise(self, x, sigma):
        """E[x0 | x_sigma = x], by Tweedie's formula: (N, 2)."""
        return x + sigma ** 2 * self.score(x, sigma)

    def sample(self, n, generator):
        """n clean samples, (n, 2)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, 2, generator=generator, device=self.means.device)
        return self.means[k] + self.std * noise

    def tilt(self, a):
        """p*(x) ~ exp(a x) p(x), Eq. (16): a mixture again."""
        gain = self.means @ a + self.std ** 2 * a.square().sum() / 2
        weights = (self.weights.log() + gain).softmax(0)
        return Mixture(weights, self.means + self.std ** 2 * a, self.std)

    def to(self, device):
        return Mixture(self.weights.to(device), self.means.to(device), self.std)


def _ring(weights):
    angle = torch.arange(8) * (2 * math.pi / 8)
    return Mixture(weights, torch.stack([angle.cos(), angle.sin()], 1), 0.05)


TARGETS = {
    "ring8": _ring(torch.full((8,), 1 / 8)),
    "grid25": Mixture(torch.full((25,), 1 / 25),
                      torch.cartesian_prod(*2 * [torch.linspace(-1, 1, 5)]), 0.05),
    "uneven8": _ring(torch.tensor([0.02, 0.04, 0.06, 0.09, 0.12, 0.16, 0.21, 0.30])),
}
REWARDS = {"linear": torch.tensor([1.5, 0.0])}      # R(x) = exp(a x): Appendix G in closed form


# ------------------------------------------------------------------------------------ the networks

def mlp(n_in, n_out, width, activation):
    layers = [nn.Linear(n_in, width), activation()]
    for _ in range(2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, n_out))


class FakeScore(nn.Module):
    """psi and eta in one network: the student's denoiser and the classifier's logit.

    D_fake = D_real + c_out F starts as the teacher's denoiser, copyWeights(phi) for a teacher
    that is a formula; F is all that has to be learned, the gap between two scores.
    """

    def __init__(self, teacher, width, head="linear"):
        super().__init__()
        self.teacher, self.net, self.head = teacher, mlp(3, 3, width, nn.SiLU), head
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, sigma):
        """-> F (N, 2) and the logit l (N,) of p against q at noise level sigma."""
        c_in = (sigma ** 2 + SIGMA_DATA ** 2).rsqrt()
        features = self.net[:-2](torch.cat([c_in * x, sigma.log() / 2], 1))
        y = self.net[-2:](features)
        return y[:, :2], y[:, 2] if self.head == "linear" else features.mean(1)

    @staticmethod
    def c_out(sigma):
        return sigma * SIGMA_DATA * (sigma ** 2 + SIGMA_DATA ** 2).rsqrt()


# ------------------------------------------------------------------------------------- Algorithm 1

@dataclass
class Config:
    h: str = "kl"               # a name of bregman.NAMES
    lam: float = 5.0            # SBA's lambda
    target: str = "ring8"       # a name of TARGETS
    seed: int = 0
    steps: int = 9000
    batch: int = 256
    width: int = 96             # of both networks, three layers each
    lr_g: float = 1e-3          # student's Adam; both rates fall as a cosine
    lr_f: float = 3e-3          # fake score's and classifier's
    ema: float = 0.999          # of the student's weights, which are what is measured
    sigma_init: float = 1.4     # G(eps) starts as the teacher's D(sigma_init eps; sigma_init)
    init_steps: int = 500       # by a regression of so many steps
    sigma_min: float = 0.02     # noise levels, log-uniform
    sigma_max: float = 2.0
    anneal: float = 0.25        # share of the run over which sigma_min falls from 0.5 to its value
    ratio: str = "classifier"   # or "exact": log r from a bank of the student's own samples
    head: str = "linear"        # the logit is an output of its own; "mean": SiDA's, of the features
    class_min: float = 0.0      # the classifier learns at noise levels from this
    class_max: float = 1000.0   # to this
    clip: float = 5.0           # log r within +-clip
    norm: str = "batch"         # weights of batch mean one; "two-stage": f-distill's; "none"
    ess: float = 0.0            # least effective sample size: log weights are scaled down to it
    gan: float = 0.0            # w_GAN, line 13
    teacher_free: bool = False  # Appendix H: the score gap is the classifier's gradient
    reward: str = ""            # Appendix G: a name of REWARDS
    first_order: bool = False   # R_sigma(x) as R(E[x0 | x]), Eq. (25), in place of the exact one
    device: str = "cpu"

    def __post_init__(self):
        bregman.get(self.h, self.lam)
        choices = dict(target=TARGETS, ratio=("classifier", "exact"), reward=("", *REWARDS),
                       norm=("batch", "two-stage", "none"), head=("linear", "mean"))
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} must be one of {' '.join(filter(None, known))}, "
                                 f"not {getattr(self, name)!r}")
        for name in ("steps", "batch", "width", "lr_g", "lr_f", "sigma_min", "sigma_init",
                     "init_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} must be positive")
        if not abs(self.lam) <= 50:
            raise ValueError(f"--lam {self.lam} is beyond +-50: no float32 weight would survive")
        if not self.sigma_min < self.sigma_max < math.inf or not 0 <= self.ema < 1:
            raise ValueError("need sigma-min < sigma-max and 0 <= ema < 1")
        if not self.class_min < self.class_max > self.sigma_min or self.class_min >= self.sigma_max:
            raise ValueError("class-min to class-max must overlap sigma-min to sigma-max")
        if not (self.clip >= 0 and 0 <= self.gan < math.inf and 0 <= self.ess <= 1):
            raise ValueError("--clip and --gan must be at least 0, --ess in [0, 1]")


def exact_log_q(x, sigma, bank):
    """log q_sigma(x), (N,): the mean of N(x; x_i, sigma^2) over the student's samples x_i."""
    square = torch.cdist(x, bank, compute_mode="donot_use_mm_for_euclid_dist").square()
    log_q = (-square / (2 * sigma ** 2)).logsumexp(1) - math.log(len(bank))
    return log_q - (2 * math.pi * sigma[:, 0] ** 2).log()


class Distiller:
    """Algorithm 1, an iteration a step(); the line numbers in the comments are the paper's."""

    def __init__(self, cfg):
        self.cfg, self.b = cfg, bregman.get(cfg.h, cfg.lam)
        torch.manual_seed(cfg.seed)
        self.g = torch.Generator(cfg.device).manual_seed(cfg.seed)
        self.teacher = TARGETS[cfg.target].to(cfg.device)
        self.target = self.teacher
        if cfg.reward:
            self.a = REWARDS[cfg.reward].to(cfg.device)
            self.target = self.teacher.tilt(self.a)
        # kinks let the student tear the plane into modes sooner than SiLU does
        self.G = mlp(2, 2, cfg.width, lambda: nn.LeakyReLU(0.1)).to(cfg.device)
        self.fake = FakeScore(self.teacher, cfg.width, cfg.head).to(cfg.device)     # line 1: psi
        self.copy_weights()                                                         # line 1: theta
        self.ema = [p.detach().clone() for p in self.G.parameters()]
        self.opt_g = torch.optim.Adam(self.G.parameters(), betas=(0.0, 0.99), fused=True)
        self.opt_f = torch.optim.Adam(self.fake.parameters(), betas=(0.0, 0.99), fused=True)
        self.done = 0

    def normal(self, n):
        return torch.randn(n, 2, generator=self.g, device=self.cfg.device)

    def sigmas(self, n):
        """Log-uniform noise levels (n, 1), rising: one in each of n equal steps of ln sigma."""
        cfg = self.cfg
        left = max(0.0, 1 - self.done / (cfg.anneal * cfg.steps)) if cfg.anneal else 0.0
        low = cfg.sigma_min * max(1.0, min(0.5, cfg.sigma_max) / cfg.sigma_min) ** left
        u = torch.arange(n, device=cfg.device)[:, None]
        u = (u + torch.rand(n, 1, generator=self.g, device=cfg.device)) / n
        return low * (cfg.sigma_max / low) ** u

    def copy_weights(self):
        """The student's start: a regression to the teacher's denoiser at sigma_init."""
        steps = self.cfg.init_steps
        opt = torch.optim.Adam(self.G.parameters(), fused=True)
        sigma = torch.full((512, 1), self.cfg.sigma_init, device=self.cfg.device)
        for i in range(steps):
            opt.param_groups[0]["lr"] = 2e-3 * (1 - i / steps)
            eps = self.normal(512)
            loss = (self.G(eps) - self.teacher.denoise(sigma * eps, sigma)).square().mean()
            opt.zero_grad()
            loss.backward()
            opt.step()

    def log_r(self, x_t, sigma, logit):
        """log q_sigma / p_sigma at x_t, (N,): line 9, or the truth with --ratio exact."""
        if self.cfg.ratio == "classifier":
            return -logit                                                           # log r = -l
        bank = self.G(self.normal(2048))
        return exact_log_q(x_t, sigma, bank) - self.teacher.log_p(x_t, sigma)

    def reward_term(self, x_t, sigma):
        """log r* = log R_sigma / Z_0 and its gradient, Eq. (36): exact, or by Eq. (25)."""
        if not self.cfg.first_order:
            return (self.target.log_p(x_t, sigma) - self.teacher.log_p(x_t, sigma),
                    self.target.score(x_t, sigma) - self.teacher.score(x_t, sigma))
        gain = self.teacher.means @ self.a + self.teacher.std ** 2 * self.a.square().sum() / 2
        log_z0 = (self.teacher.weights.log() + gain).logsumexp(0)                   # Eq. (28)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_star = self.teacher.denoise(x, sigma) @ self.a - log_z0             # Eq. (25)
            return log_star.detach(), torch.autograd.grad(log_star.sum(), x)[0]

    def generator_gradient(self, x_t, sigma):
        """The gradient of the loss in x_t, (N, 2): Eq. (4) and its variants, w(t) = sigma."""
        cfg = self.cfg
        slope = torch.zeros_like(x_t)                                               # of the logit
        if cfg.teacher_free or cfg.gan:
            with torch.enable_grad():
                x = x_t.detach().requires_grad_()
                F_x, logit = self.fake(x, sigma)
                slope, = torch.autograd.grad(logit.sum(), x)
            F_x, logit = F_x.detach(), logit.detach()
        else:
            F_x, logit = self.fake(x_t, sigma)
        gap = self.fake.c_out(sigma) * F_x / sigma ** 2                             # s_psi - s_phi
        if cfg.teacher_free:
            gap = -slope                                                # grad log r, Eq. (37)
        self.raw_log_r = log_r = self.log_r(x_t, sigma, logit)
        if cfg.norm == "two-stage":
            log_r = bregman.two_stage(log_r)
        log_w = self.b.log_weight(log_r.clamp(-cfg.clip, cfg.clip))
        if cfg.ess:
            log_w = bregman.temper(log_w, cfg.ess) * log_w
        w, self.ess = bregman.batch_weights(log_w)
        scale = log_w.logsumexp(0) - math.log(len(log_w))                           # log of mean w
        if cfg.norm == "none":
            w, scale = log_w.exp(), torch.zeros_like(scale)
        gradient = sigma * w[:, None] * gap                                         # Eq. (4)
        if cfg.reward:                                                  # Eq. (35), sign corrected
            log_star, slope_star = self.reward_term(x_t, sigma)
            w_star = (self.b.log_weight(log_star.clamp(-cfg.clip, cfg.clip)) - scale).exp()
            gradient -= sigma * w_star[:, None] * slope_star
        return gradient - cfg.gan * torch.sigmoid(-logit)[:, None] * slope          # line 13

    def step(self):
        """One pass through lines 3 to 22 -> the losses of the fake score and the classifier."""
        cfg, n = self.cfg, self.cfg.batch
        decay = 0.5 + 0.5 * math.cos(math.pi * self.done / cfg.steps)
        self.opt_g.param_groups[0]["lr"] = cfg.lr_g * max(decay, 0.01)
        self.opt_f.param_groups[0]["lr"] = cfg.lr_f * (0.1 + 0.9 * decay)

        x = self.G(self.normal(n))                                                  # lines 4, 5
        with torch.no_grad():
            sigma = self.sigmas(n)
            x_t = x + sigma * self.normal(n)                                        # line 7
            gradient = self.generator_gradient(x_t, sigma)                          # lines 8 to 13
        self.opt_g.zero_grad()
        x.backward(gradient / n)                        # the surrogate: dL/dx_t dG
        self.opt_g.step()                                                           # line 15

        # One pass serves lines 17 to 22: t'' = t', real and fake with the same noise, as in SiDA.
        x, sigma = x.detach(), self.sigmas(n)
        noise = sigma * self.normal(n)                                              # lines 17, 20
        real = self.teacher.sample(n, self.g)                                       # line 21
        x_t = torch.cat([x + noise, real + noise])
        F_x, logit = self.fake(x_t, sigma.repeat(2, 1))
        residual = (x - self.teacher.denoise(x_t[:n], sigma)) / self.fake.c_out(sigma)
        loss_score = (F_x[:n] - residual).square().mean()                           # line 18
        loss_class = F.softplus(logit[:n]) + F.softplus(-logit[n:])             # line 22, Eq. (5)
        learns = (sigma >= cfg.class_min) & (sigma <= cfg.class_max)
        loss_class = (loss_class * learns[:, 0]).mean()
        self.opt_f.zero_grad()
        (loss_score + loss_class).backward()
        self.opt_f.step()

        self.done += 1
        keep = min(cfg.ema, 1 - 1 / (1 + self.done / 10))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.G.parameters()], 1 - keep)
        return loss_score.detach(), loss_class.detach()

    @torch.no_grad()
    def samples(self, n):
        """The averaged student's: one evaluation each, (n, 2)."""
        return torch.func.functional_call(
            self.G, dict(zip(dict(self.G.named_parameters()), self.ema)), (self.normal(n),))


# --------------------------------------------------------------------------------------- the truth

@torch.no_grad()
def mode_statistics(x, target):
    """Covered modes (at least a quarter of their weight), total variation of the mode weights,
    and the share of samples within 4 standard deviations of a mode."""
    distance, k = torch.cdist(x, target.means).min(1)
    weights = torch.bincount(k, minlength=len(target.means)) / len(x)
    return dict(modes=len(target.means),
                modes_covered=int((weights > target.weights / 4).sum()),
                mode_tv=float((weights - target.weights).abs().sum() / 2),
                on_mode=float((distance < 4 * target.std).float().mean()))


@torch.no_grad()
def measure(d):
    """The result's numbers. The divergences are those of p and q at sigma = the modes' width,
    where q_sigma's estimate needs no bandwidth; log r's error is root-mean-square under q_sigma."""
    bank = d.samples(10000)
    result = mode_statistics(bank, d.target)
    sigma = torch.full((2000, 1), d.target.std, device=bank.device)
    for key, x, sign in (("kl_pq", d.target.sample(2000, d.g), 1), ("kl_qp", d.samples(2000), -1)):
        x_t = x + sigma * d.normal(2000)
        gap = d.target.log_p(x_t, sigma) - exact_log_q(x_t, sigma, bank)
        result[key] = float(sign * gap.mean())
    result["log_r_by_sigma"] = {}
    for level in np.geomspace(d.cfg.sigma_min, d.cfg.sigma_max, 8):
        sigma = torch.full((1000, 1), float(level), device=bank.device)
        x_t = d.samples(1000) + sigma * d.normal(1000)
        exact = exact_log_q(x_t, sigma, bank) - d.teacher.log_p(x_t, sigma)
        error = -d.fake(x_t, sigma)[1] - exact
        result["log_r_by_sigma"][f"{level:.3g}"] = float(error.square().mean().sqrt())
    result["log_r_error"] = float(np.mean(list(result["log_r_by_sigma"].values())))
    return result


def distil(cfg, snapshots=0, bar=True):
    """Run cfg.steps of Algorithm 1 -> (the Distiller, result, history, log r seen, snapshots).
    Raises FloatingPointError, naming the step, when a loss is no longer finite."""
    start, d = time.time(), Distiller(cfg)
    history, seen, frames = [], [], []
    every = max(1, cfg.steps // 100)
    shots = set(np.unique(np.geomspace(1, cfg.steps, snapshots).astype(int))) if snapshots else ()
    for i in (progress := tqdm(range(1, cfg.steps + 1), disable=not bar, unit="step")):
        loss_score, loss_class = d.step()
        if i % every == 0:
            if not (loss_score + loss_class).isfinite():
                raise FloatingPointError(f"step {i}: the fake network's loss is {loss_score:g} "
                                         f"(score), {loss_class:g} (classifier)")
            stats = mode_statistics(d.samples(2000), d.target)
            history.append(dict(step=i, ess=float(d.ess), loss_score=float(loss_score),
                                loss_class=float(loss_class), **stats))
            seen.append(d.raw_log_r.detach().cpu())
            progress.set_postfix(modes=stats["modes_covered"], tv=f"{stats['mode_tv']:.2f}",
                                 on_mode=f"{stats['on_mode']:.2f}")
        if i in shots:
            frames.append((i, d.samples(2000).cpu()))
    result = dict(h=cfg.h.lower(), lam=cfg.lam, seed=cfg.seed) | measure(d)
    result |= dict(seconds=time.time() - start, ess=float(np.mean([r["ess"] for r in history])),
                   config=asdict(cfg))
    return d, result, history, torch.cat(seen), frames


# ------------------------------------------------------------------------------- output and figures

def write(path, save):
    """save(temporary path), then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(suffix=path.suffix, dir=path.parent)
    os.close(fd)
    try:
        os.chmod(tmp, 0o644)
        save(tmp)
        os.replace(tmp, path)
    finally:
        Path(tmp).unlink(missing_ok=True)


def write_result(folder, d, result):
    """samples.npy and, last, result.json. -> the samples, (3000, 2)."""
    x = d.samples(3000).cpu().numpy()
    write(folder / "samples.npy", lambda tmp: np.save(tmp, x.astype(np.float16)))
    write(folder / "result.json", lambda tmp: Path(tmp).write_text(json.dumps(result, indent=1)))
    return x


def name_of(h, lam):
    return f"SBA {lam:g}" if h == "sba" else h.upper()


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 15, "axes.titlesize": 16})
    return plt


def draw_samples(ax, x, target, size=2):
    """Samples over the density that they should have."""
    edge = torch.linspace(-1.6, 1.6, 200)
    grid = torch.cartesian_prod(edge, edge)
    density = target.log_p(grid, torch.zeros(len(grid), 1)).exp().sqrt().view(200, 200).T
    ax.imshow(density.numpy(), origin="lower", extent=(-1.6, 1.6, -1.6, 1.6), cmap="Blues")
    ax.scatter(x[:, 0], x[:, 1], s=size, color="#cb181d", alpha=0.5, linewidths=0)
    ax.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])


@torch.no_grad()
def figure(d, result, history, seen, path):
    """Samples, the weight where training used it, log r against the truth, and the curves."""
    plt = pyplot()
    fig, axes = plt.subplots(2, 2, figsize=(13, 12), layout="constrained")
    ax = axes[0, 0]
    target = d.target.to("cpu")
    draw_samples(ax, d.samples(4000).cpu(), target)
    ax.set_title(f"{name_of(result['h'], result['lam'])}: {result['modes_covered']} of "
                 f"{result['modes']} modes, TV {result['mode_tv']:.3f}, "
                 f"{result['on_mode']:.0%} on a mode")

    ax = axes[0, 1]
    ax.hist(seen.clamp(-8, 8).numpy(), 80, density=True, color="#bdbdbd")
    ax.set(xlabel="log r seen in training", ylabel="density", yscale="log")
    other, log_r = ax.twinx(), torch.linspace(-8, 8, 321)
    other.plot(log_r, d.b.weight(log_r.clamp(-d.cfg.clip, d.cfg.clip)), color="#cb181d", lw=3)
    other.set(yscale="log")
    other.set_ylabel("weight h''(r) r, clipped", color="#cb181d")
    ax.set_title("the weight, and where training used it")

    ax, bank = axes[1, 0], d.samples(10000)
    for level, colour in ((0.05, "#08519c"), (0.3, "#3182bd"), (1.5, "#9ecae1")):
        sigma = torch.full((700, 1), level, device=bank.device)
        x_t = d.samples(700) + sigma * d.normal(700)
        exact = exact_log_q(x_t, sigma, bank) - d.teacher.log_p(x_t, sigma)
        ax.scatter(exact.cpu(), -d.fake(x_t, sigma)[1].cpu(), s=9, color=colour,
                   label=f"sigma = {level:g}")
    ax.axline((0, 0), slope=1, color="black", lw=1)
    ax.set(xlim=(-4, 8), ylim=(-4, 8), xlabel="exact log r", ylabel="the classifier's log r")
    ax.legend(markerscale=3)
    ax.set_title(f"log r: root-mean-square error {result['log_r_error']:.2f}")

    ax, steps = axes[1, 1], [r["step"] for r in history]
    for key, label in (("mode_tv", "mode weights' TV"), ("on_mode", "share on a mode"),
                       ("ess", "effective sample size")):
        ax.plot(steps, [r[key] for r in history], lw=2.5, label=label)
    ax.set(xlabel="step", ylim=(0, 1.02))
    ax.legend()
    write(path, lambda tmp: fig.savefig(tmp, dpi=75))
    plt.close(fig)


SWEEP = [("be", 0), ("sba", -0.5), ("kl", 0), ("lr", 0),           # BE is SBA -1, and LS is SBA 1
         ("sba", 0.5), ("ls", 0), ("sba", 3), ("sba", 5), ("sba", 10)]


def _job(cfg, out):
    """One run of the sweep, in a process of its own; skipped where its result exists."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    folder = out / f"{cfg.target}_{cfg.h}_{cfg.lam:g}_{cfg.seed}"
    if (folder / "result.json").exists():
        result = json.loads((folder / "result.json").read_text())
        if result["config"] == asdict(cfg):
            return result, np.load(folder / "samples.npy").astype(np.float32)
    d, result, *_ = distil(cfg, bar=False)
    return result, write_result(folder, d, result)


def sweep(cfg, seeds, out, figures):
    """Every h, `seeds` times: a table with mean +- std, and the first seed's samples."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context
    configs = [Config(**asdict(cfg) | dict(h=h, lam=lam, seed=seed))
               for h, lam in SWEEP for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        jobs = pool.map(_job, configs, [out] * len(configs))
        done = list(tqdm(jobs, total=len(configs), unit="run"))
    lines = ["| h | modes | mode TV | on a mode | KL(p‖q) | KL(q‖p) | log r error | ESS | s |",
             "|" + "---|" * 9]
    plt = pyplot()
    fig, axes = plt.subplots(2, 5, figsize=(20, 9), layout="constrained")
    x = TARGETS[cfg.target].sample(3000, torch.Generator().manual_seed(0))
    draw_samples(axes[0, 0], x, TARGETS[cfg.target], size=3)
    axes[0, 0].set_title("the teacher itself", fontsize=24)
    for i, ((h, lam), ax) in enumerate(zip(SWEEP, axes.flat[1:])):
        runs = [r for r, _ in done[i * seeds:(i + 1) * seeds]]
        cells = [name_of(h, lam)]
        for key, digits in (("modes_covered", 1), ("mode_tv", 3), ("on_mode", 3), ("kl_pq", 2),
                            ("kl_qp", 2), ("log_r_error", 2), ("ess", 2), ("seconds", 0)):
            values = np.array([r[key] for r in runs], dtype=float)
            cells.append(f"{values.mean():.{digits}f} ± {values.std():.{digits}f}")
        lines.append("| " + " | ".join(cells) + " |")
        draw_samples(ax, done[i * seeds][1], TARGETS[cfg.target], size=3)
        ax.set_title(f"{name_of(h, lam)}: {runs[0]['modes_covered']} of {runs[0]['modes']}",
                     fontsize=24)
    write(figures / "toy2d_modes.png", lambda tmp: fig.savefig(tmp, dpi=60))
    write(out / "table.md", lambda tmp: Path(tmp).write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))


def animate(cfg, figures):
    """The student on its way, KL beside SBA with cfg.lam."""
    plt = pyplot()
    from matplotlib.animation import FuncAnimation, PillowWriter
    runs = [distil(Config(**asdict(cfg) | dict(h=h)), snapshots=40)[-1] for h in ("kl", "sba")]
    fig, axes = plt.subplots(1, 2, figsize=(9, 5), layout="constrained")

    def frame(i):
        for ax, name, frames in zip(axes, ("KL", f"SBA {cfg.lam:g}"), runs):
            step, x = frames[min(i, len(frames) - 1)]
            ax.clear()
            draw_samples(ax, x, TARGETS[cfg.target])
            ax.set_title(f"{name}, step {step}")
    movie = FuncAnimation(fig, frame, frames=len(runs[0]) + 8)
    write(figures / "toy2d.gif", lambda tmp: movie.save(tmp, PillowWriter(fps=6), dpi=60))
    plt.close(fig)


def parse(argv):
    """-> the command line's arguments, and its Config's fields as a dictionary."""
    parser = argparse.ArgumentParser(prog="toy2d.py", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"toy2d.py: {message}\n")
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=" ", **kind)
    parser.add_argument("--out", type=Path, default=Path("runs/toy2d"), help="for result.json")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="for the pictures")
    parser.add_argument("--all", action="store_true", help="every h: a table and a picture")
    parser.add_argument("--seeds", type=int, default=5, help="runs for each h of --all")
    parser.add_argument("--gif", action="store_true", help="KL beside SBA, as an animation")
    args = parser.parse_args(argv)
    return args, {f.name: getattr(args, f.name) for f in fields(Config)}


def main(argv):
    args, chosen = parse(argv)
    torch.set_num_threads(1)                # the matrices are small: a second thread only waits
    torch.set_flush_denormal(True)
    try:
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, not {args.seeds}")
        try:
            torch.empty(1, device=args.device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f"no device {args.device!r}: {str(e).splitlines()[0]}") from e
        cfg = Config(**chosen)
        for folder in (args.out, args.figures):         # fail now, not after the training
            write(folder / ".writable", lambda tmp: None)
            (folder / ".writable").unlink(missing_ok=True)
        if args.all:
            return sweep(cfg, args.seeds, args.out, args.figures)
        if args.gif:
            return animate(cfg, args.figures)
        d, result, history, seen, _ = distil(cfg)
        picture = args.figures / f"toy2d_{cfg.h.lower()}_{cfg.lam:g}.png"
        figure(d, result, history, seen, picture)
        write_result(args.out, d, result)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f"toy2d.py: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    errors = ", ".join(f"{e:.2f} at {level}" for level, e in result["log_r_by_sigma"].items())
    print(f"the classifier's error in log r, root-mean-square, by sigma: {errors}")
    print(f"{result['modes_covered']} of {result['modes']} modes, TV {result['mode_tv']:.3f}, "
          f"on a mode {result['on_mode']:.3f}, KL(p|q) {result['kl_pq']:.3f}, "
          f"KL(q|p) {result['kl_qp']:.3f}, {result['seconds']:.0f} s: {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
