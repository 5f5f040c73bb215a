"""The teacher: EDM's loss, sampler and training (Karras et al. 2022, arXiv 2206.00364).

    python edm.py train --out runs/teacher                          # CIFAR-10, downloaded once
    python edm.py train --out runs/teacher --resume --kimg 2000     # goes on, bit for bit
    python edm.py train --out runs/classes --config compact-cond --label-dropout 0.1
    python edm.py sample pretrained/compact_teacher.pt              # 64 images: samples.png
    python edm.py sample runs/teacher/teacher.pt --guide runs/young/teacher.pt --w 2
    python edm.py sample runs/classes/teacher.pt --guide self --w 2
    python edm.py sample edm-cifar10-32x32-uncond-vp                # NVIDIA's official weights

5,000 samples of the shipped teacher, guided, have FD-compact 2.1 to CIFAR-10 (results/fid.txt).
"""
from plumbing.run import check_finite, run_main, tune_cpu, world

import math
import time
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import load_images, save_grid, save_images
from ncsnpp import CONFIGS, EDMPrecond, c_out, per_image
from plumbing.files import reading, save_atomic
from plumbing.loop import Loop, folder, take_up
from plumbing.options import (Parser, count, ending, nonnegative, path, positive, real, share, text,
                              torch_device, torch_seed, validate, whole)
from plumbing.teachers import beside, check_labels, found, load_teacher, student_options
from plumbing.weights import check_form

IMAGE = (3, 32, 32)


# ---------------------------------------------------------------------------- loss and sampler

def edm_loss(D_x, x0, sigma, sigma_data):
    """Denoising loss, EDM Eq. (2) with the weight of Table 1, averaged over pixels: (N,).

    D_x: the denoiser's output for x0 + sigma noise. x0: clean images, float [-1, 1], like D_x
    (N, 3, H, W). sigma: (N, 1, 1, 1).
    """
    weight = c_out(sigma, sigma_data) ** -2                                 # lambda(sigma)
    return (weight * (D_x - x0).square()).mean(dim=(1, 2, 3))


def karras(t, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Noise levels, EDM Eq. (5): t in [0, 1], a tensor -> sigma from sigma_max down to sigma_min,
    in the dtype of t."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + t * (low - high)) ** rho


def grid(steps):
    """The sampler's noise levels for a teacher: a list of steps + 1, falling, the last one 0."""
    t = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    return [*karras(t).tolist(), 0.0]


@torch.no_grad()
def heun(net, z, sigmas, c=None):
    """EDM Algorithm 1, deterministic: standard normal z -> images, both (N, 3, H, W).

    sigmas: noise levels, falling, the last one 0; n of them above 0 take 2 n - 1 evaluations. One,
    sigmas (s, 0), gives x + (0 - s) (x - D) / s = D, and that is a one-step generator.
    """
    sigmas = [float(sigma) for sigma in sigmas]
    x = z * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - net(x, sigma, c)) / sigma                              # dx/dsigma, line 4
        x_next = x + (sigma_next - sigma) * slope                           # Euler's step, line 5
        if sigma_next > 0:                                                  # 2nd order, lines 6-8
            slope_next = (x_next - net(x_next, sigma_next, c)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def student_levels(sigma_init, nfe):
    """The noise levels that a student of `nfe` evaluations sees: a list from sigma_init down, dense
    where it is low."""
    return [sigma_init * (1 - k / nfe) ** 2 for k in range(nfe)]


def few_steps(net, z, levels, c=None):
    """A student's samples from standard normal z, one (N, 3, H, W) for each of its noise levels: it
    denoises a level's noise alone, and at each later level its own output under fresh noise."""
    x = 0.0
    for noise, sigma in zip(z, levels):
        x = net(x + sigma * noise, sigma, c)
    return x


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], rounded."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def sample(net, n, steps=18, levels=None, seed=0, batch=64, labels=None, progress=False):
    """n samples of a denoiser, uint8 (n, 3, 32, 32) on the CPU.

    levels: a student's noise levels, [2.5] for one step; None for a teacher, whose are grid(steps).
    The noise is a stream on the CPU, one a level: neither batch size nor device changes what is
    drawn. labels: int64 (n,); where a class-conditional network gets none, the classes take turns.
    Raises ValueError for labels that the network does not know.
    """
    device = next(net.parameters()).device
    images, c = torch.empty(n, *IMAGE, dtype=torch.uint8), None
    streams = [torch.Generator().manual_seed(seed + (k << 28)) for k in range(len(levels or [0]))]
    if labels is None and net.label_dim:
        labels = torch.arange(n) % net.label_dim
    if labels is not None:
        check_labels(labels, n, net.label_dim, "sample")
        c = F.one_hot(labels, net.label_dim).float().to(device)             # (n, label_dim)
    for start in tqdm(range(0, n, batch), disable=not progress, unit="batch"):
        some = images[start:start + batch]
        z = [torch.randn(some.shape, generator=stream).to(device) for stream in streams]
        part = None if c is None else c[start:start + batch]
        x = few_steps(net, z, levels, part) if levels else heun(net, z[0], grid(steps), part)
        some.copy_(to_uint8(x))
    return images


# ------------------------------------------------------------------------------------- guidance

class Guided(nn.Module):
    """A teacher that a weaker one guides: D = D_weak + w (D_good - D_weak), without gradients.

    weak: another network, such as the good one when it was younger (autoguidance, Karras et al.
    2024, arXiv 2406.02507); None for the good one without its label (classifier-free guidance, Ho
    and Salimans 2022, arXiv 2207.12598). low, high: the noise levels in [low, high] are guided, at
    the others D is D_good (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    Raises ValueError for networks that don't go together.
    """

    def __init__(self, good, weak, w, low=0.0, high=math.inf):
        super().__init__()
        if weak is None and not good.label_dim:
            raise ValueError("only a class-conditional network can be guided by itself")
        if weak is not None and weak.label_dim not in (0, good.label_dim):
            raise ValueError(f"a network of {good.label_dim} classes can't be guided by one of "
                             f"{weak.label_dim}")
        if low > high:
            raise ValueError(f"no noise level lies between {low:g} and {high:g}")
        self.good, self.weak, self.w, self.low, self.high = good, weak, w, low, high
        self.sigma_data, self.label_dim = good.sigma_data, good.label_dim

    @torch.no_grad()
    def forward(self, x, sigma, c=None):
        """Arguments as EDMPrecond's, and D_x."""
        D_good = self.good(x, sigma, c)
        sigma = per_image(sigma, x)
        inside = (self.low <= sigma) & (sigma <= self.high)                 # (N or 1, 1, 1, 1)
        if self.w == 1 or not inside.any():
            return D_good
        if self.weak is None:
            D_weak = self.good(x, sigma, torch.zeros_like(c))
        else:
            D_weak = self.weak(x, sigma, c)
        return torch.where(inside, D_weak + self.w * (D_good - D_weak), D_good)


def load_guided(teacher, guide="own", w=2.0, low=0.3, high=5.0):
    """-> Guided, or the teacher alone, on the CPU.

    teacher: what load_teacher takes. guide: weaker weights, likewise; "self": the teacher without
    its label; "none"; "own": TEACHER_young.pt, where there is one. Raises ValueError or OSError.
    """
    weak = guide if guide == "self" else beside(teacher, guide, "_young.pt")
    good = load_teacher(teacher)
    if not weak:
        return good
    return Guided(good, None if weak == "self" else load_teacher(weak), w, low, high)


# ------------------------------------------------------------------------------------- training

@dataclass
class TrainConfig:
    data: text = "cifar10"      # what data.load_images takes: a folder or archive of 32 x 32 images
    config: Literal[tuple(CONFIGS)] = "compact"     # the network, a name of ncsnpp.CONFIGS
    init: str = ""              # what load_teacher takes: start from its weights, to fine-tune
    kimg: positive = 1000.0     # thousands of images to see in all
    batch: count = 64           # images a step
    lr: positive = 1e-2         # Muon's, of matrices, after the warm-up; falls as 1/sqrt beyond
    #                             ref-kimg
    lr_vectors: positive = 1.5e-3       # Adam's, of norms and biases; rises and falls likewise
    warmup_kimg: nonnegative = 25.0     # thousands of images over which it rises from 0
    ref_kimg: positive = 400.0  # thousands of images after which it falls
    decay: nonnegative = 0.0    # the last thousands of images, over which it falls to 0 linearly
    ema_kimg: nonnegative = 50.0        # half-life of the weights' average; at most 5 % of the run
    p_mean: real = -1.2         # ln sigma is normal with this mean
    p_std: positive = 1.2       # and this standard deviation
    label_dropout: share = 0.0  # share of the labels left out, for guidance by itself: 0.1, say
    seed: torch_seed = 0        # of the first weights and all random numbers
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"     # what computes
    amp: Literal["no", "bf16"] = "no"   # bf16 for autocast
    save_every: positive = 20.0 # thousands of images between checkpoints
    preview: whole = 64         # samples in samples.png at each of them, 0 for none

    def __post_init__(self):
        validate(self)
        if self.decay > self.kimg:
            raise ValueError(f"--decay {self.decay:g} is longer than the run, --kimg {self.kimg:g}")
        if self.label_dropout and not CONFIGS[self.config].get("label_dim"):
            raise ValueError(f"--label-dropout: the network {self.config} has no labels")
        if world() > 1:
            raise ValueError("edm.py train is one process: without torchrun")


FREE = ("kimg", "decay", "device", "save_every", "preview")     # may change when a run goes on


def half_life_to_beta(images, half_life):
    return 0.5 ** (images / max(half_life, 1e-8))


class Trainer:
    """EDM training; everything that changes is in state(), so that a resumed run is the same run.

    Weights of layers, a convolution's as a matrix (out, in x taps), are learned by Muon (Jordan et
    al. 2024; arXiv 2502.16982), the rest by Adam. After ten minutes of one core the loss on images
    held out was 0.193; with Adam alone it was 0.217 (results/teacher/tries.jsonl, one seed).

    images: uint8 (n, 3, 32, 32). labels: int64 (n,), which an unconditional network ignores.
    Raises ValueError for images and labels that don't fit the network.
    """

    def __init__(self, cfg, images, labels=None):
        if images.shape[1:] != IMAGE:
            raise ValueError(f"{cfg.data}: images of {tuple(images.shape[1:])}, not {IMAGE}")
        self.cfg, self.images, self.labels = cfg, images.to(cfg.device), None
        torch.manual_seed(cfg.seed)
        self.net = EDMPrecond(**CONFIGS[cfg.config]).to(cfg.device).train()
        self.ema = EDMPrecond(**CONFIGS[cfg.config]).to(cfg.device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.net.state_dict())
        if self.net.label_dim:
            check_labels(labels, len(images), self.net.label_dim, cfg.data)
            self.labels = labels.to(cfg.device)
        vectors = [p for p in self.net.parameters() if p.ndim == 1]
        self.matrices = [p for p in self.net.parameters() if p.ndim > 1]
        # torch's Muon takes 2-D parameters alone: views, whose gradients step() sets
        self.flat = [nn.Parameter(p.data.flatten(1)) for p in self.matrices]
        self.muon = torch.optim.Muon(self.flat, cfg.lr, weight_decay=0.0)
        self.adam = torch.optim.Adam(vectors, cfg.lr_vectors, betas=(0.9, 0.99), fused=True)
        self.generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        self.seen, self.loss = 0, math.nan

    def start_from(self, source):
        """Take the weights of another teacher; one without classes gets them, at first without
        effect. Raises ValueError or OSError."""
        state = load_teacher(source).state_dict()
        empty = {k: torch.zeros_like(v) for k, v in self.net.state_dict().items() if "label" in k}
        state = empty | state
        with reading(source, f"a network of the configuration {self.cfg.config}"):
            check_form(self.net.state_dict(), state, "weights")
        self.net.load_state_dict(state)
        self.ema.load_state_dict(state)

    def batch(self):
        """-> x0 with random flips (n, 3, 32, 32), sigma (n, 1, 1, 1), noise like x0, and one-hot
        labels (n, label_dim) or None."""
        n = self.cfg.batch
        how = dict(generator=self.generator, device=self.images.device)
        index = torch.randint(len(self.images), (n,), **how)
        flip = torch.rand(n, 1, 1, 1, **how) < 0.5
        sigma = (self.cfg.p_mean + self.cfg.p_std * torch.randn(n, 1, 1, 1, **how)).exp()
        x0 = self.images[index].float() / 127.5 - 1
        x0 = torch.where(flip, x0.flip(3), x0)
        noise, c = torch.randn(x0.shape, **how), None
        if self.net.label_dim:
            c = F.one_hot(self.labels[index], self.net.label_dim).float()
            c = c * (torch.rand(n, 1, **how) >= self.cfg.label_dropout)     # no label: zeros
        return x0, sigma, noise, c

    def rate(self):
        """The learning rates after self.seen images, as a share of their highest values."""
        cfg, kimg = self.cfg, self.seen / 1e3
        rate = min(1.0, kimg / cfg.warmup_kimg) if cfg.warmup_kimg else 1.0
        rate *= max(1.0, kimg / cfg.ref_kimg) ** -0.5
        if cfg.decay:
            rate *= min(1.0, max(0.0, cfg.kimg - kimg) / cfg.decay)
        return rate

    def step(self):
        """Learn from a batch. Returns its loss; raises FloatingPointError if that is not finite."""
        cfg = self.cfg
        torch.manual_seed(cfg.seed + self.seen)         # dropout's: the same in a resumed run
        x0, sigma, noise, c = self.batch()
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, cfg.amp == "bf16"):
            D_x = self.net(x0 + sigma * noise, sigma, c)
        losses = edm_loss(D_x, x0, sigma, self.net.sigma_data)              # (n,)
        check_finite(f"after {self.seen} images", sigma, loss=losses)
        loss = losses.mean()
        self.net.zero_grad()
        loss.backward()
        for flat, p in zip(self.flat, self.matrices):
            flat.grad = None if p.grad is None else p.grad.flatten(1)
        for opt, lr in ((self.muon, cfg.lr), (self.adam, cfg.lr_vectors)):
            opt.param_groups[0]["lr"] = lr * self.rate()
            opt.step()
        self.seen += cfg.batch
        beta = half_life_to_beta(cfg.batch, min(1e3 * cfg.ema_kimg, 0.05 * self.seen))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - beta)
        beta = half_life_to_beta(cfg.batch, 5e3)            # the loss shown: half-life 5 kimg
        loss = loss.item()
        self.loss = loss if math.isnan(self.loss) else beta * self.loss + (1 - beta) * loss
        return loss

    def state(self):
        """All that a resumed run needs, of tensors and plain values."""
        return {"config": asdict(self.cfg), "seen": self.seen, "loss": self.loss,
                "generator": self.generator.get_state(), "net": self.net.state_dict(),
                "ema": self.ema.state_dict(), "muon": self.muon.state_dict(),
                "adam": self.adam.state_dict()}

    def load(self, state, name):
        """Take up a state(), checked against this one. Raises ValueError, naming the place in the
        file `name`, for anything of another form."""
        take_up(self, state, name, ("net", "ema"), ("muon", "adam"))
        self.loss = state["loss"]


def train(cfg, out, resume=False):
    """Train until cfg.kimg, in the folder `out`: checkpoint.pt (all that --resume needs), log.csv
    and samples.png as it goes, and teacher.pt (the averaged weights alone) when it ends.

    SIGINT and SIGTERM save and end it between two steps. Returns the exit status. Raises
    ValueError, OSError, or FloatingPointError for a loss that is not finite.
    """
    with folder(cfg, out, resume, FREE, ["loss"]) as state:
        trainer = Trainer(cfg, *load_images(cfg.data))
        if resume:
            trainer.load(state, str(out / "checkpoint.pt"))
        elif cfg.init:
            trainer.start_from(cfg.init)

        def evaluate():
            if not trainer.seen:
                return {}
            if cfg.preview:
                save_grid(sample(trainer.ema, cfg.preview), out / "samples.png",
                          classes=trainer.net.label_dim)
            return {"loss": trainer.loss}

        status = Loop(trainer, cfg, out, ["loss"], evaluate, cfg.save_every, state).run()
        save_atomic({k: trainer.state()[k] for k in ("config", "seen", "ema")}, out / "teacher.pt")
    print(f"{trainer.seen} images, loss {trainer.loss:.4f}: {out / 'teacher.pt'}")
    return status


def parse(argv):
    parser = Parser(prog="edm.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="train a teacher")
    p.add_argument("--out", type=path, required=True, help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    p.add_fields(TrainConfig)
    p = commands.add_parser("sample", help="draw images from a teacher")
    p.add_argument("checkpoint", type=text, help="a file, a URL, or a name of NVIDIA's")
    p.add_argument("-n", type=count, default=64, help="how many images (64)")
    p.add("steps", count, 18, "Heun's; each but the last evaluates the network twice")
    p.add("guide", text, "own", "weaker weights that guide it, self: without its labels, none, or "
          "own: TEACHER_young.pt, where there is one")
    p.add("w", real, 2.0, "the guidance: 1 is none")
    p.add("guide_low", nonnegative, 0.3, "the lowest noise level that is guided")
    p.add("guide_high", nonnegative, 5.0, "and the highest")
    p.add("seed", torch_seed, 0, "of the noise")
    p.add("batch", count, 64, "images at a time")
    p.add("device", torch_device, TrainConfig.device, "what computes")
    p.add("out", ending(".png", ".npz", ".zip"), "runs/samples.png", "a grid, or a set of images")
    return parser.parse_args(argv)


def main(argv):
    args = parse(argv)
    tune_cpu()
    if args.command == "train":
        cfg = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
        return train(cfg, args.out, args.resume)

    net = load_guided(args.checkpoint, args.guide, args.w, args.guide_low, args.guide_high)
    net, student = net.to(args.device), student_options(found(args.checkpoint))
    levels = student_levels(*student) if student else None
    start = time.monotonic()
    labels = torch.arange(args.n) % net.label_dim if net.label_dim else None    # they take turns
    images = sample(net, args.n, args.steps, levels, args.seed, args.batch, labels, progress=True)
    if args.out.suffix in (".npz", ".zip"):
        save_images(images, args.out, labels)
    else:
        save_grid(images, args.out, classes=net.label_dim)
    evaluations = len(levels) if levels else 2 * args.steps - 1
    print(f"{args.n} images of {evaluations} evaluation{'s' * (evaluations > 1)} each, "
          f"in {time.monotonic() - start:.1f} s: {args.out}")


if __name__ == "__main__":
    run_main(main)
