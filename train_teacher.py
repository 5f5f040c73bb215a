"""How a teacher is trained: EDM's loss on a set of images of any size, by Muon and Adam.

    python train_teacher.py --data photos --size 32 --out runs/mine     # a folder of photos
    python train_teacher.py --data photos --size 32 --out runs/mine --resume --kimg 2000
    python train_teacher.py --no-labels --kimg 3000 --decay 600 --out runs/teacher      # CIFAR-10
    python train_teacher.py --data course/digits.npz --size 16 --no-flip --kimg 60 --decay 20 \\
        --out runs/digits                                   # two to four minutes on one core
    python train_teacher.py --init pretrained/compact_teacher.pt --lr 6e-3 --label-dropout 0.1 \\
        --kimg 1000 --decay 400 --out runs/classes          # from the weights of another teacher

The folder then holds teacher.pt, which edm.py draws from and cifar_distill.py distils:

    python cifar_distill.py --teacher runs/mine/teacher.pt
"""
import copy
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from data import load_images, save_grid
from edm import edm_loss, half_life_to_beta, image_shape, load_guided, network, sample
from ncsnpp import CONFIGS, EDMPrecond
from plumbing import loop
from plumbing.cli import (count, nonnegative, parser, positive, run_main, share, torch_device,
                          whole)


@dataclass
class TrainConfig:
    data: str = "cifar10"       # what data.load_images takes: a folder or an archive of images
    size: whole = 0             # pixels a side, to which the images' middle squares are resized;
                                # 0: as they are
    labels: bool = True         # learn the classes, where the images have labels
    flip: bool = True           # mirror half of the images; not for digits or text
    init: str = ""              # what load_teacher takes: start from its weights, to fine-tune, and
                                # from its width and levels
    width: count = 16           # channels of the network's first level
    levels: whole = 0           # of the network, each of half the size; 0: three, or as many as
                                # reach 8 pixels a side
    kimg: positive = 1000.0     # thousands of images to see in all
    batch: count = 64           # images a step
    lr: positive = 1e-2         # the highest learning rate of Muon, which learns the matrices
    decay: nonnegative = 0.0    # the last thousands of images, over which it falls to 0 linearly
    label_dropout: share = 0.0  # fraction of labels left out, for guidance by itself: 0.1, say
    seed: whole = 0             # of the first weights and all random numbers
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"   # what computes
    amp: Literal["no", "bf16"] = "no"   # bf16 for autocast
    save_every: positive = 20.0 # thousands of images between checkpoints
    preview: count = 64         # samples in samples.png at each of them

    def __post_init__(self):
        if self.width % 4:
            raise ValueError(f"--width must be a multiple of 4, not {self.width}")
        if self.decay > self.kimg:
            raise ValueError(f"--decay {self.decay:g} is longer than the run, --kimg {self.kimg:g}")
        if loop.world() > 1:
            raise ValueError("train_teacher.py is one process: without torchrun")


ADAM_LR = 1.5e-3        # the highest of Adam, which learns norms and biases
FREE = ("kimg", "decay", "device", "save_every", "preview")     # may change when a run goes on


# ---------------------------------------------------------------------------------- its network

def default_levels(size):
    """Return the number of levels for images of this size, of which each is half the one before:
    three, or more until one is 8 pixels a side, but none below 4. Raises ValueError for a size that
    can't be halved so often."""
    sides = [size]
    while sides[-1] % 2 == 0 and sides[-1] >= 8 and (len(sides) < 3 or sides[-1] > 8):
        sides.append(sides[-1] // 2)
    if sides[-1] > 32:                          # attention there would compare all pixels with all
        raise ValueError(f"images of {size} x {size} can't be halved to 32 pixels a side or fewer: "
                         f"try --size {2 ** (size.bit_length() - 1)}")
    return len(sides)


def new_network(cfg, size, channels, classes):
    """Return a new network for images of this size: channels double from level to level, up to four
    times the first level's, and there is attention at the lowest."""
    levels = cfg.levels or default_levels(size)
    return EDMPrecond(**CONFIGS["compact"] | dict(
        resolution=size, channels=channels, label_dim=classes, model_channels=cfg.width,
        channel_mult=[min(2 ** i, 4) for i in range(levels)],
        attn_resolutions=[size >> levels - 1]))


def further_network(cfg, shape, classes):
    """Return a copy of the network in the file cfg.init. One without classes gets them: the new
    layer is 0, so that they have no effect at first."""
    old = load_guided(cfg.init, guide="none")
    if image_shape(old) != shape or old.label_dim not in (0, classes):
        raise ValueError(f"--init: {cfg.init} is for {old.label_dim or 'no'} classes of images of "
                         f"{image_shape(old)}, but {cfg.data} has {classes or 'no'} of {shape}")
    state = old.state_dict()
    net = network(state, old.record, dropout=0.0, label_dim=classes)
    new = {k: torch.zeros_like(v) for k, v in net.state_dict().items() if k not in state}
    net.load_state_dict(state | new)
    return net


# ------------------------------------------------------------------------------------- training

class Trainer:
    """EDM training; everything that changes is in state(), so that a resumed run is the same run.

    The weights of layers are learned by Muon (Jordan et al. 2024; arXiv 2502.16982), the rest by
    Adam. After ten minutes of one core the loss on images that were left out was 0.193; with Adam
    alone it was 0.217 (results/teacher.jsonl, one seed).

    images: uint8 (n, C, H, W). labels: int64 (n,), or None; there are as many classes as the
    highest label says. Raises ValueError for images that don't fit the network.
    """

    def __init__(self, cfg, images, labels=None):
        _, channels, height, width = images.shape
        if height != width:
            raise ValueError(f"{cfg.data}: images of {width} x {height} pixels: --size "
                             f"{min(width, height)} takes their middle squares")
        classes = int(labels.max()) + 1 if cfg.labels and labels is not None else 0
        self.cfg, self.images = cfg, images.to(cfg.device)
        self.labels = labels.to(cfg.device) if classes else None
        with torch.random.fork_rng(devices=[]):     # the caller's random numbers stay as they are
            torch.default_generator.manual_seed(cfg.seed)
            net = (further_network(cfg, tuple(images.shape[1:]), classes) if cfg.init else
                   new_network(cfg, height, channels, classes))
        self.net = net.to(cfg.device).train()
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        vectors = [p for p in self.net.parameters() if p.ndim == 1]
        self.matrices = [p for p in self.net.parameters() if p.ndim > 1]
        # Muon makes a rotation of a matrix's update, so it takes 2-D weights alone; but a
        # convolution's weight (out, in, 3, 3) is a matrix too, (out, in x 9), which multiplies each
        # patch of the image. Muon gets 2-D views, which share the memory of the weights: as it
        # moves a view, the network moves.
        self.flat = [nn.Parameter(p.data.flatten(1)) for p in self.matrices]
        self.muon = torch.optim.Muon(self.flat, cfg.lr, weight_decay=0.0)
        self.adam = torch.optim.Adam(vectors, ADAM_LR, betas=(0.9, 0.99), fused=True)
        self.generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        self.seen, self.loss = 0, math.nan

    def batch(self):
        """Draw images x0, half of them mirrored if cfg.flip (n, C, H, W), noise levels sigma
        (n, 1, 1, 1), noise like x0, and one-hot labels (n, label_dim) or None."""
        n = self.cfg.batch
        how = dict(generator=self.generator, device=self.images.device)
        index = torch.randint(len(self.images), (n,), **how)
        flip = torch.rand(n, 1, 1, 1, **how) < 0.5
        sigma = (-1.2 + 1.2 * torch.randn(n, 1, 1, 1, **how)).exp()         # EDM, Table 1
        x0 = self.images[index].float() / 127.5 - 1
        if self.cfg.flip:
            x0 = torch.where(flip, x0.flip(3), x0)
        noise, c = torch.randn(x0.shape, **how), None
        if self.net.label_dim:
            c = F.one_hot(self.labels[index], self.net.label_dim).float()
            c = c * (torch.rand(n, 1, **how) >= self.cfg.label_dropout)     # no label: zeros
        return x0, sigma, noise, c

    def rate(self):
        """Return the learning rates after self.seen images, as a fraction of their highest."""
        kimg = self.seen / 1e3
        rate = min(1.0, kimg / 25)                          # a warm-up of 25,000 images,
        rate *= max(1.0, kimg / 400) ** -0.5                # a fall as 1/sqrt from 400,000 on,
        if self.cfg.decay:                                  # and one to 0 at the end
            rate *= min(1.0, max(0.0, self.cfg.kimg - kimg) / self.cfg.decay)
        return rate

    def step(self):
        """Learn from a batch. Returns its loss; raises FloatingPointError if that is not finite."""
        cfg = self.cfg
        x0, sigma, noise, c = self.batch()
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, cfg.amp == "bf16"):
            D_x = self.net(x0 + sigma * noise, sigma, c)
        losses = edm_loss(D_x, x0, sigma, self.net.sigma_data)              # (n,)
        loop.check_finite(f"after {self.seen} images", sigma, loss=losses)
        loss = losses.mean()
        self.net.zero_grad()
        loss.backward()
        for flat, p in zip(self.flat, self.matrices):
            flat.grad = None if p.grad is None else p.grad.flatten(1)
        for opt, lr in ((self.muon, cfg.lr), (self.adam, ADAM_LR)):
            opt.param_groups[0]["lr"] = lr * self.rate()
            opt.step()
        self.seen += cfg.batch
        # The average's half-life is 50,000 images, or 5 % of those seen so far.
        beta = half_life_to_beta(cfg.batch, min(50e3, 0.05 * self.seen))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - beta)
        beta = half_life_to_beta(cfg.batch, 5e3)            # the loss shown: half-life 5 kimg
        loss = loss.item()
        self.loss = loss if math.isnan(self.loss) else beta * self.loss + (1 - beta) * loss
        return loss

    def weights(self):
        """Return what teacher.pt is: the averaged weights, and what they do not say themselves."""
        cfg, path = self.cfg, Path(self.cfg.data)
        record = dict(data=str(path.resolve()) if path.exists() else cfg.data,
                      size=self.net.resolution, flip=cfg.flip, dropout=0.0,
                      sigma_data=self.net.sigma_data)
        return {"config": asdict(cfg), "record": record, "seen": self.seen,
                "ema": self.ema.state_dict()}

    def state(self):
        """Return all that a resumed run needs, of tensors and plain values."""
        return self.weights() | {
            "loss": self.loss, "generator": self.generator.get_state(),
            "net": self.net.state_dict(), "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict()}

    def load(self, state, name):
        """Take up a state(). Raises ValueError, naming the file `name`, for another network's."""
        loop.take_up(self, state, name, ("net", "ema"), ("muon", "adam"))
        self.loss = state["loss"]


def train(cfg, out, resume=False):
    """Train until cfg.kimg, in the folder `out`: checkpoint.pt (all that --resume needs), log.csv
    and samples.png as it goes, and teacher.pt (the averaged weights alone) when it ends.

    SIGINT and SIGTERM save and end it between two steps. Returns the exit status. Raises
    ValueError, OSError, or FloatingPointError for a loss that is not finite.
    """
    state = loop.begin(cfg, out, resume, FREE)
    with loop.claim(out) as out:
        trainer = Trainer(cfg, *load_images(cfg.data, size=cfg.size or None))
        if resume:
            trainer.load(state, out / "checkpoint.pt")
        parameters = sum(p.numel() for p in trainer.net.parameters()) / 1e6
        print(f"a network of {parameters:.2f} M parameters, {trainer.net.label_dim or 'no'} "
              f"classes; on {cfg.device}, {torch.get_num_threads()} threads", file=sys.stderr)

        def evaluate(rows):
            if not trainer.seen:
                return {}
            save_grid(sample(trainer.ema, cfg.preview), out / "samples.png",
                      classes=trainer.net.label_dim)
            return {"loss": trainer.loss}

        _, status = loop.train(trainer, cfg, out, evaluate, cfg.save_every, state)
        loop.save(trainer.weights(), out / "teacher.pt")
    print(f"{trainer.seen} images, loss {trainer.loss:.4f}: {out / 'teacher.pt'}")
    return status


def main(argv):
    p = parser("train_teacher.py", "Train a teacher on a set of images.", TrainConfig)
    p.add_argument("--out", type=Path, required=True, help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    given = vars(p.parse_args(argv))
    out, resume = given.pop("out"), given.pop("resume")
    cfg = TrainConfig(**given)
    loop.tune_cpu()
    return train(cfg, out, resume)


if __name__ == "__main__":
    run_main(main)
