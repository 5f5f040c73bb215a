"""Algorithm 1 on CIFAR-10: a diffusion teacher distilled into a one-step generator.

    python cifar_distill.py                             # five minutes: FD-compact 13.09 to 0.85
    python cifar_distill.py --h sba --lam 5             # any h of bregman.py
    python cifar_distill.py --preset paper              # the paper's experiment: GPU, downloads
    python cifar_distill.py --resume                    # goes on, bit for bit on a CPU
    python cifar_distill.py sample runs/compact_kl/student.pt -n 64 --out runs/grid.png
"""
from plumbing.run import (all_mean, check_finite, first_process_first, gather, rank, run_main,
                          tune_cpu, world)

import argparse
import copy
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

import bregman
import edm
from data import load_images
from edm import edm_loss, half_life_to_beta, karras, load_guided, student_levels
from ncsnpp import c_out
from plumbing.judge import COLUMNS, Judge
from plumbing.loop import Loop, folder, take_up
from plumbing.options import (Parser, count, evaluations, nonnegative, path, positive, real,
                              row_name, share, text, torch_device, torch_seed, validate)
from plumbing.teachers import beside, check_labels
from plumbing.weights import check_form

HALF = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FREE = ("kimg", "device", "eval_every", "save_every", "gradient_checkpointing")  # may change
SCALE = 2.0 ** 12           # slope() multiplies by it before the backward: fp16 loses what is small


@dataclass
class Config:
    h: Literal[bregman.NAMES] = "kl"    # which row of Table 1
    lam: real = 5.0             # SBA's lambda
    teacher: text = "pretrained/compact_teacher.pt"     # a file, a URL, a name of NVIDIA's
    guide: text = "own"         # what guides the teacher: weaker weights, "self" without label, or
                                # "none"; "own": TEACHER_young.pt, where there is one
    w: real = 2.0               # how much: D_weak + w (D_good - D_weak)
    guide_low: nonnegative = 0.3        # at noise levels from this
    guide_high: nonnegative = 5.0       # to this
    data: text = "own"          # images for the classifier's p; "own": TEACHER_samples.zip
    bank: text = "own"          # other samples of the teacher's to judge by, or their features, or
                                # "none"; "own": TEACHER_compact.npz, where there is one
    reference: text = "cifar10"         # the data to judge by: what fid.py takes
    kimg: positive = 16         # thousands of generated images, the run's length
    batch: count = 32           # images a step, over all processes
    lr_g: positive = 2e-4       # generator's Adam; it is divided by nfe
    lr_f: positive = 4e-4       # fake network's: score and classifier
    decay_kimg: nonnegative = 4.0   # both rates fall as 1 / (1 + kimg / decay_kimg); 0: constant
    wait_kimg: nonnegative = 2.0        # for which the generator waits for the fake network
    sigma_init: positive = 2.5  # x = G(sigma_init z, sigma_init)
    nfe: evaluations = 1        # evaluations of the generator for an image; above 1, --kimg 6
    t_min: share = 0.15         # the generator's noise levels: from this
    t_max: share = 0.8          # to this share of EDM's grid, from the lowest level up
    w_t: Literal["c_out", "dmd"] = "c_out"  # w(t): sigma^2 / c_out, or by DMD's mean |x - D_real|
    p_mean: real = -0.6         # the fake network's: ln sigma is normal with this mean
    p_std: positive = 1.6       # and this standard deviation, to reach where the generator looks
    clip: nonnegative = 5.0     # log r within +-clip
    norm: Literal["level", "batch", "two-stage"] = "level"  # batch: weights of mean one; level: and
                                # log r less its running mean at its noise level; two-stage: and 1/r
                                # of mean one there, as in f-distill
    part: Literal["both", "level", "sample"] = "both"   # the weight, its mean at each noise level,
                                # or what is left within a level
    ess: share = 0.9            # least effective sample size: weights are tempered to it; 0: as is
    gan: nonnegative = 0.0      # w_GAN, line 13: of an image's loss; line 8's is a number's
    teacher_free: bool = False  # Appendix H: the score gap is the classifier's gradient
    ema_kimg: positive = 2.0    # half-life of the generator's average, which is what is judged
    grad_clip: nonnegative = 0.0        # bound on each gradient value of the fake network, 0: none
    seed: torch_seed = 0        # of all random numbers
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"   # cpu, cuda, cuda:1, mps
    amp: Literal["no", "bf16", "fp16"] = "no"   # autocast
    gradient_checkpointing: bool = False    # computes features twice, to keep fewer of them
    features: Literal["compact", "inception"] = "compact"   # of the distance, see fid.py
    eval_every: positive = 4.0  # kimg between rows of log.csv, grids and curve.png
    eval_n: count = 2000        # samples for a row
    preview: count = 64         # samples in each picture
    save_every: positive = 2.0  # kimg between checkpoints

    def __post_init__(self):
        validate(self)
        bregman.get(self.h, self.lam)
        if self.t_min >= self.t_max:
            raise ValueError("--t-min must be below --t-max")
        if self.teacher_free and self.w_t == "dmd":
            raise ValueError("--teacher-free has no D_real, which --w-t dmd needs")
        if self.part != "both" and (self.norm != "batch" or self.batch < 8):
            raise ValueError(f"--part {self.part} goes with --norm batch, and a --batch of at least"
                             " 8, its noise levels")
        if self.eval_n < 6:
            raise ValueError("--eval-n must be at least 6, for precision and recall")
        if self.norm == "two-stage" and self.batch < 20:
            raise ValueError("--norm two-stage has 10 bins, and needs --batch 20 at least")
        if self.batch % world():
            raise ValueError(f"--batch {self.batch} does not divide into {world()} processes")


PRESETS = {
    "compact": {},                                      # the defaults above: two cores, no network
    "smoke": dict(kimg=0.256, batch=16, wait_kimg=0.064, eval_every=0.128, eval_n=200, preview=16),
    "paper": dict(                                      # Appendix D; the rest: SiDA, f-distill, DMD
        h="sba", lam=5.0, teacher="edm-cifar10-32x32-uncond-vp", guide="none", data="cifar10",
        kimg=15_000, batch=256, lr_g=1e-5, lr_f=1e-5, decay_kimg=0, wait_kimg=100, ema_kimg=500,
        p_mean=-1.2, p_std=1.2, norm="batch", w_t="dmd", t_min=0.0, clip=10, ess=0.0, grad_clip=1.0,
        features="inception", eval_every=1000, eval_n=50_000, save_every=250),
}


# ------------------------------------------------------------------------------------- Algorithm 1

class Distiller:
    """Algorithm 1; the line numbers are the paper's. p is the teacher's density, q the student's;
    a guided teacher's score is no density's, and p is then that of its samples.

    images: uint8 (N, C, H, W), labels: int64 (N,) if the teacher has classes. Each process draws
    the random numbers of the whole batch and takes its share, so that their number changes nothing.
    """

    def __init__(self, cfg, teacher, images, labels=None):
        self.cfg, self.h = cfg, bregman.get(cfg.h, cfg.lam)
        torch.backends.cudnn.allow_tf32 = False     # the update is a small difference of networks
        self.images = images.to(cfg.device)
        self.labels = None if labels is None else labels.to(cfg.device)
        layout = torch.channels_last if cfg.device == "cpu" else torch.contiguous_format
        self.teacher = teacher.to(cfg.device, memory_format=layout)     # a seventh faster on a CPU
        self.teacher.eval().requires_grad_(False)
        self.G, self.fake, self.ema = self.copy_weights()                               # line 1
        self.opt_g, self.opt_f = (
            torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr,
                             betas=(0.0, 0.999), fused=True)
            for net, lr in ((self.G, cfg.lr_g), (self.fake, cfg.lr_f)))
        kind = torch.device(cfg.device).type
        self.autocast = lambda: torch.autocast(kind, HALF[cfg.amp], cfg.amp != "no")
        self.scaler = torch.amp.GradScaler(kind, enabled=cfg.amp == "fp16")
        self.generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        bins = min(8 if cfg.part != "both" else 10, cfg.batch)      # 10 as in f-distill
        self.level = torch.zeros(bins, device=cfg.device)  # running mean at each noise level: of
        #                                       log r with --norm level, of the weight with --part
        self.g_sigmas = student_levels(cfg.sigma_init, cfg.nfe)   # the noise levels that G sees
        self.seen = self.moves = 0                              # images, updates of the generator
        self.sums = {}                      # of what was logged since the last row: Loop empties it

    def step(self):
        """Lines 3 to 22, once."""
        cfg, b = self.cfg, self.draw()
        moving = self.seen >= 1e3 * cfg.wait_kimg       # until then G waits for the fake network
        self.set_rates()
        with torch.set_grad_enabled(moving), self.autocast():
            x = self.G(*self.start(b), b.c)                             # lines 4, 5  (n, C, H, W)
        if moving:
            x_t = x.detach() + b.sigma * b.noise                                        # line 7
            gap, slope, log_r = self.compare(x_t, b)                                    # lines 8, 9
            w = self.weigh(log_r)                                                       # line 10
            surrogate = (x * (w * gap + slope)).mean()      # its gradient is Eq. (4)'s + line 13's
            self.descend(self.opt_g, surrogate, "generator")                            # line 15
            self.average_weights()
        self.descend(self.opt_f, self.fake_loss(x.detach(), b), "fake network")   # lines 16 to 22
        self.seen += cfg.batch

    @torch.no_grad()
    def start(self, b):
        """-> what the generator sees, and its noise level: (sigma_init z, sigma_init). With --nfe K
        b.last (n,) says which evaluation is an image's last, from 0 to K - 1; those before it, of
        noise b.before (n, K - 1, C, H, W), are not learned from."""
        x = torch.zeros_like(b.z)
        for k, sigma in enumerate(self.g_sigmas[:-1]):
            more = b.last > k
            c = None if b.c is None else b.c[more]
            x[more] = self.G(x[more] + sigma * b.before[more, k], sigma, c)
        sigma = torch.tensor(self.g_sigmas, device=x.device)[b.last][:, None, None, None]
        return x + sigma * b.z, sigma

    def told(self, b, c):
        """-> labels for the fake network: the images' own, c (n, label_dim) or None, and with --nfe
        K, one-hot, which evaluation made the generated ones, since as one mixture K kinds of images
        can match p while none of them does."""
        if self.cfg.nfe == 1:
            return c
        made_by = F.one_hot(b.last, self.cfg.nfe).float()
        return made_by if c is None else torch.cat([c, made_by], 1)

    def compare(self, x_t, b):
        """-> w(t) (s_psi - s_phi) and the adversarial loss's gradient, or 0, both (n, C, H, W), and
        log r (n, 1, 1, 1). w(t) = sigma^2 / c_out(sigma) makes the first the difference of two
        networks F; DMD's depends on the image too, not on t alone as Eq. (4) wants."""
        cfg, needs_slope = self.cfg, bool(self.cfg.gan or self.cfg.teacher_free)
        size, slope, c = c_out(b.sigma, self.teacher.sigma_data), 0, self.told(b, b.c)
        x_t.requires_grad_(needs_slope)
        with torch.set_grad_enabled(needs_slope), self.autocast():
            D_fake, logits = self.fake(x_t, b.sigma, c, return_logits=True)             # line 8
        log_r = -logits.mean((1, 2))[:, None, None, None]   # l = log p/q of an image   # line 9
        if cfg.gan:                     # -log D of an image; step's mean is over numbers  line 13
            slope = cfg.gan * x_t[0].numel() * self.slope(F.softplus(log_r), x_t)
        if cfg.teacher_free:                                    # Eq. (37), its sign corrected
            gap = self.slope(log_r, x_t) * b.sigma ** 2 / size
        else:
            with torch.no_grad(), self.autocast():
                D_real = self.teacher(x_t.detach(), b.sigma, b.c)                       # line 8
            if cfg.w_t == "dmd":
                x = x_t - b.sigma * b.noise
                size = (x - D_real).abs().mean((1, 2, 3), keepdim=True)
            gap = (D_fake - D_real).detach() / size
        check_finite(f"after {self.seen} images", b.sigma, score_gap=gap, log_r=log_r)
        return gap, slope, log_r.detach()

    def weigh(self, log_r):
        """-> h''(r) r with batch mean one, (n, 1, 1, 1). The batch is that of all processes, in
        which noise levels rise, so that its slices are levels."""
        cfg, every = self.cfg, gather(log_r).flatten()                                  # (B,)
        rate = max(0.02, 1 / (1 + self.moves))
        self.log(log_r=every.mean(), log_r_std=every.std(correction=0))
        if cfg.norm == "two-stage":
            every = bregman.two_stage(every)
        if cfg.norm == "level":
            bins = every.tensor_split(len(self.level))
            self.level.lerp_(torch.stack([part.mean() for part in bins]), rate)
            every = torch.cat([part - mean for part, mean in zip(bins, self.level)])
        log_w = self.h.log_weight(every.clamp(-cfg.clip, cfg.clip))
        if cfg.part != "both":
            level, within = bregman.split(log_w, self.level, rate)
            log_w = level if cfg.part == "level" else within
        w, ess, tau = bregman.batch_weights(log_w, cfg.ess)
        self.log(ess=ess, tau=tau)
        return w[rank()::world()].view_as(log_r)

    def fake_loss(self, x, b):
        """Lines 16 to 22 in one pass: t'' = t', real and generated images under one noise."""
        noise, c, c_real = b.sigma_f * b.noise_f, self.told(b, b.c), self.told(b, b.c_real)
        with self.autocast():
            if self.cfg.teacher_free:                           # no score, so no decoder
                D_x, logits = x, self.fake.encode(x + noise, b.sigma_f, c)
            else:
                D_x, logits = self.fake(x + noise, b.sigma_f, c, return_logits=True)    # line 17
            real_logits = self.fake.encode(b.real + noise, b.sigma_f, c_real)           # line 21
        score = edm_loss(D_x, x, b.sigma_f, self.fake.sigma_data)                       # line 18
        classifier = (F.softplus(logits) + F.softplus(-real_logits)).mean((1, 2))       # Eq. (5)
        check_finite(f"after {self.seen} images", b.sigma_f, loss_score=score,
                     loss_class=classifier)
        self.log(loss_score=gather(score.detach()).mean(),
                 loss_class=gather(classifier.detach()).mean())
        return score.mean() + classifier.mean()                                         # line 22

    def descend(self, opt, loss, what):
        """One step of Adam on the gradient's mean over processes."""
        cfg, scaler = self.cfg, self.scaler
        opt.zero_grad()
        scaler.scale(loss).backward()
        grads = [p.grad for p in opt.param_groups[0]["params"] if p.grad is not None]
        all_mean(grads)
        scaler.unscale_(opt)
        norm = torch.nn.utils.get_total_norm(grads)
        if norm.isfinite():
            self.log(**{"grad_g" if opt is self.opt_g else "grad_f": norm})
        elif cfg.amp != "fp16":                                 # whose scaler skips this step
            raise FloatingPointError(f"after {self.seen} images: the {what}'s gradient is {norm}; "
                                     "the last checkpoint stays as it was")
        if cfg.grad_clip and opt is self.opt_f:
            torch.nn.utils.clip_grad_value_(self.fake.parameters(), cfg.grad_clip)
        scaler.step(opt)
        scaler.update()

    # ------------------------------------------------------- what the steps above are made of

    def copy_weights(self):
        """Line 1 -> G, the fake network and G's average, all of them the teacher unguided. They
        stay in eval mode: no dropout."""
        teacher = getattr(self.teacher, "good", self.teacher)
        nets = [copy.deepcopy(teacher) for _ in range(3)]
        for net in nets[:2]:
            net.requires_grad_(True)
            net.gradient_checkpointing = self.cfg.gradient_checkpointing
        if self.cfg.nfe > 1:
            nets[1].add_labels(self.cfg.nfe)                    # see told()
        return nets

    def draw(self):
        """-> this process's share of a step's random numbers; noise levels are (n, 1, 1, 1), those
        of line 7 rising, one in each of `batch` equal steps of the grid."""
        cfg, n = self.cfg, self.cfg.batch
        kind = dict(generator=self.generator, device=cfg.device)
        shape = (n, *self.images.shape[1:])
        t = (torch.arange(n, device=cfg.device) + torch.rand(n, **kind)) / n            # line 7
        t = cfg.t_min + (cfg.t_max - cfg.t_min) * t
        index = torch.randint(len(self.images), (n,), **kind)                           # line 21
        b = dict(z=torch.randn(shape, **kind), noise=torch.randn(shape, **kind),        # line 4
                 sigma=self.levels(t)[:, None, None, None])
        sigma_f = (cfg.p_mean + cfg.p_std * torch.randn(n, **kind)).exp()               # line 17
        b |= dict(sigma_f=sigma_f[:, None, None, None], noise_f=torch.randn(shape, **kind))
        b |= self.pick(index, kind)
        b["before"] = torch.randn(n, cfg.nfe - 1, *shape[1:], **kind)
        b["last"] = torch.arange(n, device=cfg.device) % cfg.nfe        # the evaluations take turns
        mine = {name: value[rank()::world()] for name, value in b.items()}
        return SimpleNamespace(**(dict(c=None, c_real=None) | mine))

    def levels(self, t):
        """Shares of EDM's grid, from the lowest level up, (n,) -> noise levels (n,)."""
        return karras(1 - t)

    def pick(self, index, kind):
        """-> the real images at `index` (n,), flipped or not, and with classes their labels and
        those to generate, one-hot (n, label_dim)."""
        n, classes = len(index), self.teacher.label_dim
        real, flip = self.images[index].float() / 127.5 - 1, torch.rand(n, **kind) < 0.5
        b = dict(real=torch.where(flip[:, None, None, None], real.flip(3), real))
        if classes:
            eye = torch.eye(classes, device=self.cfg.device)
            b |= dict(c=eye[torch.randint(classes, (n,), **kind)], c_real=eye[self.labels[index]])
        return b

    def slope(self, values, x_t):
        """The gradient of their sum in x_t; small ones survive fp16."""
        gradient, = torch.autograd.grad(SCALE * values.sum(), x_t, retain_graph=True)
        return gradient / SCALE

    def set_rates(self):
        since = max(0, self.seen / 1e3 - self.cfg.wait_kimg)
        fall = 1 / (1 + since / self.cfg.decay_kimg) if self.cfg.decay_kimg else 1
        # the fake network follows K kinds of images, so that the generator must wait for it
        self.opt_g.param_groups[0]["lr"] = self.cfg.lr_g * fall / self.cfg.nfe
        self.opt_f.param_groups[0]["lr"] = self.cfg.lr_f * fall

    @torch.no_grad()
    def average_weights(self):
        self.moves += 1
        moved = self.moves * self.cfg.batch
        beta = half_life_to_beta(self.cfg.batch, min(1e3 * self.cfg.ema_kimg, 0.1 * moved))
        ema, G = (list(net.state_dict().values()) for net in (self.ema, self.G))
        torch._foreach_lerp_(ema, G, 1 - beta)

    def log(self, **values):
        for name, value in values.items():
            now = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float)])
            self.sums[name] = self.sums.get(name, 0) + now

    def averages(self):
        """-> the means of what was logged since the last row, as numbers."""
        return {k: (v[0] / v[1]).item() for k, v in self.sums.items()}

    def state(self):
        """All that a resumed run needs."""
        return {"config": asdict(self.cfg), "seen": self.seen, "moves": self.moves,
                "level": self.level, "sums": self.sums, "generator": self.generator.get_state(),
                "G": self.G.state_dict(), "fake": self.fake.state_dict(),
                "ema": self.ema.state_dict(), "opt_g": self.opt_g.state_dict(),
                "opt_f": self.opt_f.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state, name):
        """Take up a state(), checked against this one. Raises ValueError, naming the place in the
        file `name`, for anything of another form."""
        sums = state.get("sums") if isinstance(state.get("sums"), dict) else {}
        check_form({k: torch.zeros(2) for k in sums}, state.get("sums"), f"{name}: sums")
        take_up(self, state, name, ("G", "fake", "ema"), ("opt_g", "opt_f"))
        self.scaler.load_state_dict(state["scaler"])
        self.moves, self.level = state["moves"], state["level"].to(self.cfg.device)
        self.sums = {k: v.to(self.cfg.device) for k, v in sums.items()}


# ----------------------------------------------------------------------------------------- a run

def load_all(cfg):
    """-> teacher, images, labels."""
    with first_process_first():
        teacher = load_guided(cfg.teacher, cfg.guide, cfg.w, cfg.guide_low, cfg.guide_high)
        data = beside(cfg.teacher, cfg.data, "_samples.zip", needed=True)
        images, labels = load_images(data)
    asked, own = ([vars(c)[k] for k in ("guide", "w", "guide_low", "guide_high")]
                  for c in (cfg, Config()))
    if cfg.data == "own" and asked != own and rank() == 0:
        print("the teacher's own --data and --bank are of another guidance", file=sys.stderr)
    if tuple(images.shape[1:]) != (3, 32, 32):
        raise ValueError(f"{data}: images of {tuple(images.shape[1:])}, not (3, 32, 32)")
    if teacher.label_dim:
        check_labels(labels, len(images), teacher.label_dim, data)
    return teacher, images, labels


def run(cfg, out, resume=False):
    """Distil, into the folder `out`. -> exit status."""
    with folder(cfg, out, resume, FREE, COLUMNS) as state:
        d = Distiller(cfg, *load_all(cfg))
        if state:
            d.load(state, str(out / "checkpoint.pt"))
        judge = Judge(cfg, out) if rank() == 0 else None
        loop = Loop(d, cfg, out, COLUMNS, lambda: judge.row(d, loop.rows), cfg.eval_every, state)
        status = loop.run()
        if judge and not status:
            judge.finish(d, loop)
    return status


# ------------------------------------------------------------------------------------ command line

def parse(argv):
    """-> Config, output folder, resume."""
    parser = Parser(prog="cifar_distill.py", description=__doc__.splitlines()[0])
    parser.add("preset", Literal[tuple(PRESETS)], "compact", "the settings to begin with")
    parser.add("out", path, None, "the run's folder (runs/PRESET_H)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_fields(Config, default=lambda f: argparse.SUPPRESS)
    args = vars(parser.parse_args(argv))
    preset, out, resume = args.pop("preset"), args.pop("out"), args.pop("resume")
    chosen = PRESETS[preset] | args
    if world() > 1 and chosen.get("device", Config.device) == "cuda":
        chosen["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    cfg = Config(**chosen)
    return cfg, out or Path("runs") / f"{preset}_{row_name(cfg.h, cfg.lam)}", resume


def main(argv):
    tune_cpu()
    if argv[:1] == ["sample"]:                              # edm.py draws from both
        return edm.main(argv)
    return run(*parse(argv))


if __name__ == "__main__":
    run_main(main)
