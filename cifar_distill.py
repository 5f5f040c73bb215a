"""Algorithm 1 on images: a diffusion teacher distilled into a one-step generator.

    python cifar_distill.py                             # four minutes: FD-compact 14.07 to 0.62
    python cifar_distill.py --h sba --lam 5             # any h of bregman.py
    python cifar_distill.py --teacher runs/mine/teacher.pt      # a teacher of train_teacher.py
    python cifar_distill.py --preset paper              # the paper's experiment: GPU, downloads
    python cifar_distill.py --resume                    # goes on, bit for bit on a CPU

The student is drawn by `python edm.py sample runs/compact_kl/student.pt`. toy2d.py has the same
Distiller in the plane, where the truth is known.
"""
import contextlib
import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F

import bregman
from data import load_images
from edm import beside, check_labels, edm_loss, half_life_to_beta, karras, load_guided
from evaluate import Evaluator, usual_guidance
from ncsnpp import c_out
from plumbing.cli import (count, nonnegative, number, parser, positive, real, run_main, share,
                          torch_device, whole)
from plumbing.loop import (all_mean, begin, check_finite, claim, first_process_first, gather,
                           processes, rank, take_up, train, tune_cpu, world)

HALF = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what may change when a run goes on
FREE = ("kimg", "device", "eval_every", "save_every", "gradient_checkpointing")
# gradient() multiplies by this before it differentiates, because fp16 rounds small gradients to 0
SCALE = 2.0 ** 12


@dataclass
class Config:
    """The options of a run. A field's type says which values it takes, and the comment beside it
    is its help."""
    h: Literal[bregman.NAMES] = "kl"    # which row of Table 1
    lam: real = 5.0             # SBA's lambda
    teacher: str = "pretrained/compact_teacher_cond.pt"     # a file of weights, or an official name
    guide: str = "own"          # what guides the teacher: weaker weights, "self" without label, or
                                # "none"; "own": TEACHER_young.pt, where there is one
    guidance: real = 2.0        # how much: D_weak + guidance (D_good - D_weak)
    guide_low: nonnegative = 0.3        # the lowest noise level that is guided
    guide_high: nonnegative = 5.0       # and the highest
    data: str = "own"           # the classifier's real images; "own": TEACHER_samples.zip, or else
                                # the images that the teacher was trained on
    size: whole = 0             # cut and resize them to so many pixels a side; 0: as they are
    teacher_samples: str = "own"        # other samples of the teacher to judge by, or their
                                # features, or "none"; "own": TEACHER_compact.npz, where it exists
    reference: str = "own"      # the images to judge by, as fid.py takes them; "own": --data where
                                # it is given, else what the teacher was trained on
    resize: Literal["", "clean", "tf"] = ""     # how images come to the features' size, see fid.py;
                                # "": clean; a --reference of statistics alone needs it named
    features: Literal["compact", "inception"] = "compact"   # of the distance, see fid.py
    kimg: positive = 16.0       # thousands of generated images, the run's length
    batch: count = 32           # images a step, over all processes
    lr_g: positive = 2e-4       # the generator's Adam
    lr_f: positive = 4e-4       # the fake score network's, and so the classifier's
    fake_updates: number(int, 1, 100, "a whole number from 1 to 100") = 1    # of lines 16 to 22
                                # for one update of the generator
    decay_kimg: nonnegative = 4.0   # both rates fall as 1 / (1 + kimg / decay_kimg); 0: constant
    wait_kimg: nonnegative = 2.0    # for which the generator waits for the fake score network
    sigma_init: positive = 2.5  # x = G(sigma_init z, sigma_init)
    t_min: share = 0.15         # the generator's lowest noise level, as a share of EDM's grid
    t_max: share = 0.8          # and its highest; 0 is the lowest level of the grid, 1 the highest
    w_t: Literal["c_out", "dmd"] = "c_out"  # w(t): sigma^2 / c_out, or sigma^2 / mean |x - D_real|
    p_mean: real = -0.6         # mean of ln sigma, the levels at which the fake score learns
    p_std: positive = 1.6       # and its standard deviation, to reach where the generator looks
    clip: nonnegative = 5.0     # log r within +-clip
    norm: Literal["level", "batch", "two-stage"] = "level"  # batch: divide the weights by their
                                # mean. level: first subtract from log r its running mean at that
                                # noise level. two-stage: first divide 1/r by its mean there, as
                                # f-distill does
    part: Literal["both", "level", "sample"] = "both"   # the weight, its mean at each noise level,
                                # or what is left within a level
    ess: share = 0.9            # least effective sample size: weights are tempered to it; 0: as is
    gan: nonnegative = 0.0      # w_GAN of line 13. That loss is a mean over images, the surrogate
                                # one over all their numbers; step() multiplies by an image's count
    teacher_free: bool = False  # Appendix H: the score gap is the classifier's gradient
    ema_kimg: positive = 2.0    # half-life of the generator's average, which is what is judged
    grad_clip: nonnegative = 0.0    # bound on each gradient value of the fake score's, 0: none
    seed: whole = 0             # of all random numbers
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"     # cpu, cuda, mps
    amp: Literal["no", "bf16", "fp16"] = "no"   # autocast
    gradient_checkpointing: bool = False    # computes features twice, to keep fewer of them
    eval_every: positive = 4.0  # kimg between rows of log.csv, grids and curve.png
    eval_n: number(int, 6, 10 ** 7, "a whole number, at least 6") = 2000     # samples for a row
    preview: count = 64         # samples in each picture
    save_every: positive = 2.0  # kimg between checkpoints

    def __post_init__(self):
        bregman.get(self.h, self.lam)
        if self.h != "sba" and self.lam != Config.lam:
            raise ValueError(f"--lam is SBA's alone: say --h sba, not {self.h}")
        if self.kimg <= self.wait_kimg:
            raise ValueError(f"--kimg {self.kimg:g} ends before the generator moves, for which it "
                             f"waits --wait-kimg {self.wait_kimg:g}")
        if self.t_min >= self.t_max:
            raise ValueError("--t-min must be below --t-max")
        if self.teacher_free and self.w_t == "dmd":
            raise ValueError("--teacher-free has no D_real, which --w-t dmd needs")
        if self.part != "both" and (self.norm != "batch" or self.batch < 8):
            raise ValueError(f"--part {self.part} goes with --norm batch, and a --batch of at least"
                             " 8, one for each slice of noise levels")
        if self.norm == "two-stage" and self.batch < 20:
            raise ValueError("--norm two-stage has 10 bins, and needs --batch 20 at least")
        if self.batch % world():
            raise ValueError(f"--batch {self.batch} does not divide into {world()} processes")
        if self.amp == "fp16" and self.device == "cpu":
            raise ValueError("--amp fp16 is 40 times slower on a CPU: leave it out, or take bf16")


PRESETS = {
    "compact": {},                                      # the defaults above: two cores, no network
    "smoke": dict(kimg=0.256, batch=16, wait_kimg=0.064, eval_every=0.128, eval_n=200, preview=16),
    "paper": dict(                                      # Appendix D; the rest: SiDA, f-distill, DMD
        h="sba", lam=5.0, teacher="edm-cifar10-32x32-uncond-vp", guide="none", data="cifar10",
        kimg=15_000, batch=256, lr_g=1e-5, lr_f=1e-5, decay_kimg=0, wait_kimg=100, ema_kimg=500,
        p_mean=-1.2, p_std=1.2, norm="batch", w_t="dmd", t_min=0.0, clip=10, ess=0.0, grad_clip=1.0,
        features="inception", resize="clean", eval_every=1000, eval_n=50_000, save_every=250),
}


# ------------------------------------------------------------------------------------- Algorithm 1

class Distiller:
    """Algorithm 1; the line numbers are the paper's. p is the teacher's density, q the student's;
    a guided teacher's score is no density's, and p is then that of its samples.

    images: uint8 (N, C, H, W), labels: int64 (N,) if the teacher has classes. flip: whether real
    images may be mirrored. Each process draws the random numbers of the whole batch and takes its
    share, so that their number changes nothing.
    """

    def __init__(self, cfg, teacher, images, labels=None, flip=True):
        self.cfg, self.h, self.flip = cfg, bregman.get(cfg.h, cfg.lam), flip
        big = images.numel() > 2 ** 31      # a large set stays on the CPU, perhaps mapped from disk
        self.images = images if big else images.to(cfg.device)
        self.labels = None if labels is None else labels.to(cfg.device)
        # channels_last is a seventh faster on a CPU
        layout = torch.channels_last if cfg.device == "cpu" else torch.contiguous_format
        self.teacher = teacher.to(cfg.device, memory_format=layout)
        self.teacher.eval().requires_grad_(False)
        self.G, self.fake, self.ema = self.copy_weights()                               # line 1
        self.opt_g, self.opt_f = (
            torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr,
                             betas=(0.0, 0.999), fused=True)
            for net, lr in ((self.G, cfg.lr_g), (self.fake, cfg.lr_f)))
        self.scaler = torch.amp.GradScaler(torch.device(cfg.device).type, enabled=cfg.amp == "fp16")
        # draws random numbers; the student is G
        self.generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        # the batch, sorted by noise level, is cut into slices; each has running means of its own
        self.log_r_mean = torch.zeros(min(10, cfg.batch), device=cfg.device)    # for --norm level
        self.log_w_mean = torch.zeros(min(8, cfg.batch), device=cfg.device)     # log of w's: --part
        self.seen = self.updates = 0            # images, updates of the generator
        self.sums = {}                          # of what was logged since the last row of log.csv

    # the update is a small difference of two networks' outputs, which TF32 would round away
    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def step(self):
        """Take lines 3 to 22 once."""
        cfg, b = self.cfg, self.sample_batch()
        moving = self.seen >= 1e3 * cfg.wait_kimg       # until then G waits for the fake score
        self.set_rates()
        x = self.generate(b, moving)                                    # lines 4, 5  (n, C, H, W)
        if moving:
            x_t = x.detach() + b.sigma * b.noise                                        # line 7
            gap, log_r = self.scores_and_ratio(x_t, b)                                  # lines 8, 9
            w = self.weights(log_r.detach())                                            # line 10
            direction = w * gap                                                         # Eq. (4)
            if cfg.gan:     # -log D, a mean over images; the surrogate's is over all their numbers
                push = self.gradient(F.softplus(log_r), x_t)
                direction = direction + cfg.gan * x_t[0].numel() * push                 # line 13
            surrogate = (x * direction).mean()  # its gradient in x is the direction / x.numel()
            self.descend(self.opt_g, surrogate)                                         # line 15
            self.average_parameters()
        self.descend(self.opt_f, self.fake_loss(x.detach(), b))                 # lines 16 to 22
        for _ in range(cfg.fake_updates - 1):           # DMD2 and f-distill make several
            b = self.sample_batch()
            self.descend(self.opt_f, self.fake_loss(self.generate(b, learn=False), b))
        self.seen += cfg.batch

    def generate(self, b, learn):
        """Return the generator's images (n, C, H, W), with a graph in its weights if it learns."""
        sigma = torch.full_like(b.sigma, self.cfg.sigma_init)
        with torch.set_grad_enabled(learn), self.autocast():
            return self.G(sigma * b.z, sigma, b.c)

    def scores_and_ratio(self, x_t, b):
        """Return w(t) (s_psi - s_phi) (n, C, H, W), and log r (n, 1, 1, 1), whose graph reaches x_t
        where a gradient in it is needed.

        w(t) = sigma^2 / c_out(sigma) makes the first the difference of two networks F. DMD's w(t)
        depends on the image too, not on t alone as Eq. (4) wants.
        """
        cfg, scale = self.cfg, c_out(b.sigma, self.teacher.sigma_data)      # w(t) = sigma^2 / scale
        x_t.requires_grad_(bool(cfg.gan or cfg.teacher_free))
        with torch.set_grad_enabled(x_t.requires_grad), self.autocast():
            D_fake, logits = self.fake(x_t, b.sigma, b.c, return_logits=True)           # line 8
        # l estimates log p/q of the image at each place; their mean has less noise       # line 9
        log_r = -logits.mean((1, 2))[:, None, None, None]
        if cfg.teacher_free:                                    # Eq. (37), its sign corrected
            gap = self.gradient(log_r, x_t) * b.sigma ** 2 / scale
        else:
            with torch.no_grad(), self.autocast():
                D_real = self.teacher(x_t.detach(), b.sigma, b.c)                       # line 8
            if cfg.w_t == "dmd":
                x = x_t.detach() - b.sigma * b.noise                # the generator's image again
                scale = (x - D_real).abs().mean((1, 2, 3), keepdim=True)
            gap = (D_fake - D_real).detach() / scale
        check_finite(f"after {self.seen} images", b.sigma, score_gap=gap, log_r=log_r)
        return gap, log_r

    def weights(self, log_r):
        """Return h''(r) r with batch mean one, (n, 1, 1, 1). log_r: (n, 1, 1, 1).

        The batch is that of all processes, in the order in which sample_batch() drew it. Its noise
        levels rise, so that its slices are levels: --norm and --part rely on it.
        """
        cfg, log_r_all = self.cfg, gather(log_r).flatten()                              # (batch,)
        # running means: a plain mean of the first 50 updates, then one with rate 0.02
        rate = max(0.02, 1 / (1 + self.updates))
        self.log(log_r=log_r_all.mean(), log_r_std=log_r_all.std(correction=0))
        if cfg.norm == "two-stage":
            log_r_all = bregman.two_stage(log_r_all)
        if cfg.norm == "level":
            slices = log_r_all.tensor_split(len(self.log_r_mean))
            self.log_r_mean.lerp_(torch.stack([values.mean() for values in slices]), rate)
            log_r_all = torch.cat([values - mean for values, mean
                                   in zip(slices, self.log_r_mean)])
        log_w = self.h.log_weight(log_r_all.clamp(-cfg.clip, cfg.clip))
        if cfg.part != "both":
            level, within = bregman.factorise(log_w, self.log_w_mean, rate)
            log_w = level if cfg.part == "level" else within
        w, ess, tau = bregman.batch_weights(log_w, cfg.ess)
        self.log(ess=ess, tau=tau)
        return w[rank()::world()].view_as(log_r)

    def fake_loss(self, x, b):
        """Return the loss of lines 16 to 22, of generated images x (n, C, H, W). One pass serves
        score and classifier, so they have one noise level, the paper's t' and t''; real and
        generated images have one noise."""
        noise = b.sigma_f * b.noise_f
        with self.autocast():
            if self.cfg.teacher_free:                           # no score, so no decoder
                D_x, logits = x, self.fake.encode(x + noise, b.sigma_f, b.c)
            else:
                D_x, logits = self.fake(x + noise, b.sigma_f, b.c, return_logits=True)  # line 17
            real_logits = self.fake.encode(b.real + noise, b.sigma_f, b.c_real)         # line 21
        losses = dict(
            loss_score=edm_loss(D_x, x, b.sigma_f, self.fake.sigma_data),               # line 18
            loss_class=(F.softplus(logits) + F.softplus(-real_logits)).mean((1, 2)))    # Eq. (5)
        check_finite(f"after {self.seen} images", b.sigma_f, **losses)
        self.log(**{name: gather(loss.detach()).mean() for name, loss in losses.items()})
        return losses["loss_score"].mean() + losses["loss_class"].mean()                # line 22

    def descend(self, opt, loss):
        """Take one step of Adam on the gradient's mean over processes."""
        cfg, scaler, name = self.cfg, self.scaler, "grad_g" if opt is self.opt_g else "grad_f"
        opt.zero_grad()
        scaler.scale(loss).backward()
        grads = [p.grad for p in opt.param_groups[0]["params"] if p.grad is not None]
        all_mean(grads)
        scaler.unscale_(opt)
        norm = torch.nn.utils.get_total_norm(grads)
        if norm.isfinite():
            self.log(**{name: norm})
        elif cfg.amp != "fp16":                 # with fp16 the scaler skips such a step
            raise FloatingPointError(f"after {self.seen} images: {name} is {norm}; the last "
                                     "checkpoint stays as it was")
        if cfg.grad_clip and opt is self.opt_f:
            torch.nn.utils.clip_grad_value_(self.fake.parameters(), cfg.grad_clip)
        scaler.step(opt)
        scaler.update()

    # ------------------------------------------------------- what the steps above are made of

    def copy_weights(self):
        """Return G, the fake score network and G's average, each the teacher unguided: line 1. They
        stay in evaluation mode, without dropout."""
        teacher = getattr(self.teacher, "good", self.teacher)
        nets = [copy.deepcopy(teacher) for _ in range(3)]
        for net in nets[:2]:
            net.requires_grad_(True)
            net.gradient_checkpointing = self.cfg.gradient_checkpointing
        return nets

    def sample_batch(self):
        """Return this process's share of a step's random numbers.

        z, noise, noise_f and real are (n, C, H, W), the noise levels sigma and sigma_f (n, 1, 1,
        1), the labels c and c_real one-hot (n, label_dim) or None. sigma rises through the batch,
        one in each of `batch` equal steps of the grid, so that every batch has every level and its
        slices are bins of them; weights() counts on that. Labels are drawn evenly: where those of
        the real images are not even, log r is too low by the log of (frequency x classes).
        """
        cfg, n, shape = self.cfg, self.cfg.batch, (self.cfg.batch, *self.images.shape[1:])
        how = dict(generator=self.generator, device=cfg.device)
        t = (torch.arange(n, device=cfg.device) + torch.rand(n, **how)) / n             # line 7
        t = cfg.t_min + (cfg.t_max - cfg.t_min) * t
        index = torch.randint(len(self.images), (n,), **how)                            # line 21
        b = dict(
            z=torch.randn(shape, **how), noise=torch.randn(shape, **how),           # lines 4, 7
            sigma=self.noise_levels(t)[:, None, None, None],
            sigma_f=(cfg.p_mean + cfg.p_std * torch.randn(n, 1, 1, 1, **how)).exp(),    # line 17
            noise_f=torch.randn(shape, **how))
        b |= self.real_batch(index, how)
        mine = {name: value[rank()::world()] for name, value in b.items()}
        return SimpleNamespace(**(dict(c=None, c_real=None) | mine))

    def noise_levels(self, t):
        """Return noise levels (n,) at shares t (n,) of EDM's grid, from the lowest level up."""
        return karras(1 - t)

    def real_batch(self, index, how):
        """Return the real images at `index` (n,), mirrored or not, as `real`; with classes also
        their labels, c_real, and those to generate, c, one-hot (n, label_dim)."""
        n, classes = len(index), self.teacher.label_dim
        flip = torch.rand(n, **how) < 0.5 * self.flip
        real = self.images[index.to(self.images.device)].to(self.cfg.device).float() / 127.5 - 1
        b = dict(real=torch.where(flip[:, None, None, None], real.flip(3), real))
        if classes:
            eye = torch.eye(classes, device=self.cfg.device)
            b |= dict(c=eye[torch.randint(classes, (n,), **how)], c_real=eye[self.labels[index]])
        return b

    def gradient(self, values, x_t):
        """Return the gradient of the sum of `values` in x_t, and keep its graph, since line 13 may
        follow; SCALE, a power of two, changes no digit of it."""
        gradient, = torch.autograd.grad(SCALE * values.sum(), x_t, retain_graph=True)
        return gradient / SCALE

    def set_rates(self):
        """Set both learning rates, which fall once the generator moves."""
        since = max(0, self.seen / 1e3 - self.cfg.wait_kimg)
        fall = 1 / (1 + since / self.cfg.decay_kimg) if self.cfg.decay_kimg else 1
        self.opt_g.param_groups[0]["lr"] = self.cfg.lr_g * fall
        self.opt_f.param_groups[0]["lr"] = self.cfg.lr_f * fall

    @torch.no_grad()
    def average_parameters(self):
        """Count an update, and move the average towards G: its half-life is ema_kimg, or a tenth of
        the images since G first moved, if that is less."""
        self.updates += 1
        moved = self.updates * self.cfg.batch
        beta = half_life_to_beta(self.cfg.batch, min(1e3 * self.cfg.ema_kimg, 0.1 * moved))
        ema, G = (list(net.state_dict().values()) for net in (self.ema, self.G))
        torch._foreach_lerp_(ema, G, 1 - beta)

    def autocast(self):
        device, amp = torch.device(self.cfg.device).type, self.cfg.amp
        return torch.autocast(device, HALF[amp], amp != "no")

    def log(self, **values):
        """Add numbers to the sums of which log.csv gets the means."""
        for name, value in values.items():
            now = torch.stack([value.detach().float(), torch.ones_like(value, dtype=torch.float)])
            self.sums[name] = self.sums.get(name, 0) + now

    def averages(self):
        """Return, as numbers, the means of what was logged since the last row of log.csv. After it
        loop.train empties the sums."""
        return {k: (v[0] / v[1]).item() for k, v in self.sums.items()}

    def state(self):
        """Return all that a resumed run needs."""
        return {"config": asdict(self.cfg), "seen": self.seen, "updates": self.updates,
                "log_r_mean": self.log_r_mean, "log_w_mean": self.log_w_mean, "sums": self.sums,
                "generator": self.generator.get_state(),
                "G": self.G.state_dict(), "fake": self.fake.state_dict(),
                "ema": self.ema.state_dict(), "opt_g": self.opt_g.state_dict(),
                "opt_f": self.opt_f.state_dict(), "scaler": self.scaler.state_dict()}

    def load(self, state, path):
        """Take up a state(). Raises ValueError, which names the file `path`, for another form."""
        take_up(self, state, path, ("G", "fake", "ema", "scaler"), ("opt_g", "opt_f"))
        self.updates = state["updates"]
        self.log_r_mean.copy_(state["log_r_mean"])
        self.log_w_mean.copy_(state["log_w_mean"])
        self.sums = {k: v.to(self.cfg.device) for k, v in state["sums"].items()}


# ----------------------------------------------------------------------------------------- a run

def find_data(cfg, record):
    """Return what data.load_images takes for the classifier's real images, and their size or None.

    record: what the teacher's file says of itself. Raises ValueError where the samples beside it
    were drawn with another guidance, and FileNotFoundError where there are none and no record of
    the images that it was trained on; both say what to type.
    """
    if cfg.data != "own":
        return cfg.data, cfg.size or None
    own = beside(cfg.teacher, "own", "_samples.zip")
    if own and usual_guidance(cfg):
        return own, cfg.size or None
    if own:
        raise ValueError(f"{own} was drawn with another guidance than these options: draw samples "
                         "with python edm.py sample and its --guide, and name them by --data")
    if not record.get("data"):
        raise FileNotFoundError("say what --data is: no samples lie beside this teacher. python "
                                f"edm.py sample {cfg.teacher} -n 5000 --out FILE.zip draws some")
    return record["data"], cfg.size or record.get("size")


def load_all(cfg):
    """Return the teacher, where the real images are from, these images, and their labels where the
    teacher has classes. Raises ValueError where they don't go together."""
    with first_process_first():
        teacher = load_guided(cfg.teacher, cfg.guide, cfg.guidance, cfg.guide_low, cfg.guide_high)
        source, size = find_data(cfg, teacher.record)
        images, labels = load_images(source, size=size)
    wanted = (teacher.channels, teacher.resolution, teacher.resolution)
    if tuple(images.shape[1:]) != wanted:
        raise ValueError(f"{source}: images of {tuple(images.shape[1:])}, but the teacher's are "
                         f"{wanted}; --size {wanted[1]} cuts and resizes them")
    if teacher.label_dim:
        check_labels(labels, teacher.label_dim, source)
        if (classes := int(labels.max()) + 1) != teacher.label_dim:
            raise ValueError(f"{source} has {classes} classes, but the teacher has "
                             f"{teacher.label_dim}")
    return teacher, source, images, labels if teacher.label_dim else None


def run(cfg, out, resume=False):
    """Distil, into the folder `out`. Returns the exit status: 0, or 128 + a signal's number."""
    out = Path(out)
    state = begin(cfg, out, resume, FREE)
    with claim(out) if rank() == 0 else contextlib.nullcontext(), processes(cfg.device):
        teacher, source, images, labels = load_all(cfg)
        d = Distiller(cfg, teacher, images, labels, teacher.record.get("flip", True))
        if state:
            d.load(state, out / "checkpoint.pt")
        before = state.get("seconds", 0.0)
        evaluator = Evaluator(cfg, out, d, source, before) if rank() == 0 else None
        rows, status = train(d, cfg, out, evaluator and evaluator.row, cfg.eval_every, state,
                             evaluator and evaluator.about())
        if evaluator and not status:
            evaluator.finish(rows)
    return status


# ------------------------------------------------------------------------------------ command line

def parse(argv):
    """Return the Config, the output folder, and whether to resume."""
    p = parser("cifar_distill.py", __doc__, Config)
    p.add_argument("--preset", choices=PRESETS, default="compact",
                   help="the settings to begin with (compact)")
    p.add_argument("--out", type=Path, help="the run's folder (runs/PRESET_H)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    args = vars(p.parse_args(argv))
    preset, out, resume = args.pop("preset"), args.pop("out"), args.pop("resume")
    chosen = PRESETS[preset] | args
    if world() > 1 and chosen.get("device", Config.device) == "cuda":
        chosen["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    cfg = Config(**chosen)
    return cfg, out or Path("runs") / f"{preset}_{bregman.row_name(cfg.h, cfg.lam)}", resume


def main(argv):
    tune_cpu()
    return run(*parse(argv))


if __name__ == "__main__":
    run_main(main)
