"""The teacher: EDM's loss, sampler and training (Karras et al. 2022, arXiv 2206.00364).

    python edm.py train --out runs/teacher                      # CIFAR-10, downloaded once
    python edm.py train --out runs/teacher --resume --kimg 2000 # goes on, bit for bit
    python edm.py sample pretrained/compact_teacher.pt --steps 18
    python edm.py sample edm-cifar10-32x32-uncond-vp            # NVIDIA's official weights
"""
import csv
import io
import math
import pickle
import signal
import sys
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tqdm import tqdm

from data import (Parser, atomic, device, download, load_images, positive, reading, run_main,
                  save_atomic, save_grid, save_images, tune_cpu)
from ncsnpp import CONFIGS, EDMPrecond

OFFICIAL = {        # name: sha256 of https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/NAME.pkl
    "edm-cifar10-32x32-uncond-vp":
        "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
    "edm-cifar10-32x32-uncond-ve": None,
    "edm-cifar10-32x32-cond-vp": None,
}


# ---------------------------------------------------------------------------- loss and sampler

def edm_loss(net, x0, sigma, noise, labels=None):
    """Denoising loss, EDM Eq. (2) with the weight of Table 1, averaged over pixels.

    x0: float [-1, 1] (N, 3, H, W). sigma: (N,). noise: standard normal, like x0. Returns (N,).
    """
    sigma_data = EDMPrecond.sigma_data
    weight = (sigma ** 2 + sigma_data ** 2) / (sigma * sigma_data) ** 2         # lambda(sigma)
    D_x = net(x0 + sigma[:, None, None, None] * noise, sigma, labels)
    return weight * (D_x - x0).square().mean(dim=(1, 2, 3))


def karras_grid(steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The sampler's noise levels, EDM Eq. (5): (steps + 1,), falling, the last one 0."""
    i = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + i * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun(net, z, steps=18, labels=None):
    """EDM Algorithm 1, deterministic: standard normal z -> images; 2 steps - 1 evaluations."""
    sigmas = karras_grid(steps).tolist()
    x = z * sigmas[0]
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        slope = (x - net(x, sigma, labels)) / sigma                             # dx/dsigma
        x_next = x + (sigma_next - sigma) * slope
        if sigma_next > 0:                                                      # 2nd order
            slope_next = (x_next - net(x_next, sigma_next, labels)) / sigma_next
            x_next = x + (sigma_next - sigma) * (slope + slope_next) / 2
        x = x_next
    return x


def to_uint8(x):
    """float [-1, 1] -> uint8 [0, 255], rounded."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def sample(net, n, steps=18, seed=0, batch=64, labels=None, progress=False):
    """n samples, uint8 (n, 3, 32, 32) on the CPU; from one stream of noise on the CPU, so that
    neither batch size nor device changes what is drawn. labels: int64 (n,); where a
    class-conditional network gets none, the classes take turns."""
    device = next(net.parameters()).device
    generator, images = torch.Generator().manual_seed(seed), []
    if net.label_dim and labels is None:
        labels = torch.arange(n) % net.label_dim
    for start in tqdm(range(0, n, batch), disable=not progress, unit="batch"):
        size = min(batch, n - start)
        z = torch.randn(size, 3, 32, 32, generator=generator).to(device)
        c = None
        if net.label_dim:
            c = torch.eye(net.label_dim, device=device)[labels[start:start + size]]
        images.append(to_uint8(heun(net, z, steps, c)).cpu())
    return torch.cat(images)


# -------------------------------------------------------------------------------------- loading

class Call:
    """A function that a pickle may call but, as it takes no state, not alter."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        raise pickle.UnpicklingError("refused to alter a function")


class Record(dict):
    """What stands in for every object of a foreign pickle: data, never code."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        self.update(state if isinstance(state, dict) else {})


def _persistent(meta, *_):
    record = Record()
    record.update(meta["state"])        # its "module_src" is Python source: left alone
    return record


class SafeUnpickler(pickle.Unpickler):
    """Reads EDM's official pickles without running what they carry.

    They embed Python source for their classes. Here every class becomes a Record, tensors are
    rebuilt by torch, their bytes read with weights_only, and any other name is refused.
    """
    ADMITTED = {
        "collections.OrderedDict": OrderedDict,
        "dnnlib.util.EasyDict": Record,
        "numpy.dtype": Record,
        "numpy.core.multiarray.scalar": Record,
        "numpy._core.multiarray.scalar": Record,
        "torch.nn.modules.container.ModuleDict": Record,
        "torch._utils._rebuild_parameter": Call(lambda tensor, *_: tensor),
        "torch._utils._rebuild_tensor_v2": Call(torch._utils._rebuild_tensor_v2),
        "torch.storage._load_from_bytes": Call(lambda blob: torch.load(
            io.BytesIO(blob), map_location="cpu", weights_only=True)),
        "torch_utils.persistence._reconstruct_persistent_obj": Call(_persistent),
    }

    def find_class(self, module, name):
        try:
            return self.ADMITTED[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}") from None


def flatten(record, prefix=""):
    """The state dict of a pickled module: parameters and buffers, by walking its parts."""
    state = {}
    for kind in ("_parameters", "_buffers"):
        state |= {prefix + k: v for k, v in record.get(kind, {}).items() if v is not None}
    for name, part in record.get("_modules", {}).items():
        if part is not None:
            state |= flatten(part, f"{prefix}{name}.")
    return state


def read_weights(path):
    """-> state dict of an official EDM pickle, of our own checkpoint (its EMA), or of a bare state
    dict saved by torch. Raises ValueError, naming the file, if it is none of them."""
    with reading(path, "a checkpoint"), open(path, "rb") as f:
        if f.read(2) == b"PK":                                      # torch.save's zip
            stored = torch.load(path, map_location="cpu", weights_only=True)
            return dict(stored.get("ema", stored))
        f.seek(0)
        return flatten(SafeUnpickler(f).load()["ema"])


def build(state, path="the checkpoint"):
    """The network whose names and shapes are those of `state`, with its weights, in eval mode.
    Raises ValueError, naming the first difference to the nearest configuration, if none is."""
    state = {k: v for k, v in state.items() if torch.is_tensor(v)}
    shapes = {k: tuple(v.shape) for k, v in state.items()}
    nearest = None
    for name, config in CONFIGS.items():
        with torch.device("meta"):
            expected = {k: tuple(v.shape) for k, v in EDMPrecond(**config).state_dict().items()}
        wrong = [k for k in sorted(expected | shapes) if expected.get(k) != shapes.get(k)]
        if not wrong:
            net = EDMPrecond(**config)
            net.load_state_dict(state)
            return net.float().eval().requires_grad_(False)
        if nearest is None or len(wrong) < nearest[0]:
            k = wrong[0]
            nearest = len(wrong), f"{name}, in which {k} is {expected.get(k)}, not {shapes.get(k)}"
    raise ValueError(f"{path}: no known configuration has these tensors; nearest is {nearest[1]}")


def load_teacher(source):
    """-> EDMPrecond in eval mode, without gradients, on the CPU.

    source: a path, a URL, or a name of OFFICIAL; NVIDIA's pickles and our checkpoints alike. The
    configuration is recognised by names and shapes. Raises ValueError or OSError.
    """
    source = str(source)
    if source in OFFICIAL:
        source = f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{source}.pkl"
    if "://" in source:
        name = source.rsplit("/", 1)[1].removesuffix(".pkl")
        source = download(source, OFFICIAL.get(name))
    elif not Path(source).is_file():
        raise FileNotFoundError(f"no such checkpoint: {source} (or one of {', '.join(OFFICIAL)})")
    return build(read_weights(source), source)


# ------------------------------------------------------------------------------------- training

@dataclass
class TrainConfig:
    data: str = "cifar10"       # what data.load_images takes
    config: str = "compact"     # a name of ncsnpp.CONFIGS
    init: str = ""              # what load_teacher takes: start from its weights, to fine-tune
    kimg: float = 1000          # thousands of images to see in all
    batch: int = 64
    lr: float = 1.5e-3          # Adam's, after the warm-up; falls as 1/sqrt beyond ref_kimg
    ref_kimg: float = 400.0     # images after which the learning rate falls
    warmup_kimg: float = 25.0   # images over which it rises from 0
    ema_kimg: float = 50.0      # half-life of the weights' average, at most 5 % of the run so far
    p_mean: float = -1.2        # ln sigma is normal with this mean
    p_std: float = 1.2          # and this standard deviation
    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    amp: str = "no"             # "bf16" for autocast
    save_every: float = 20.0    # kimg between checkpoints
    preview: int = 64           # samples in samples.png at each of them, 0 for none

    def __post_init__(self):
        if self.config not in CONFIGS:
            raise ValueError(f"unknown config {self.config!r}, not one of {' '.join(CONFIGS)}")
        if self.amp not in ("no", "bf16"):
            raise ValueError(f"amp is no or bf16, not {self.amp!r}")
        if min(self.kimg, self.batch, self.lr, self.save_every) <= 0 or self.preview < 0:
            raise ValueError("kimg, batch, lr and save-every must be positive, preview at least 0")


def half_life_to_beta(images, half_life):
    return 0.5 ** (images / max(half_life, 1e-8))


class Trainer:
    """EDM training; everything that changes is in state(), so that a resumed run is the same run.

    The schedule never looks at the run's end: `--resume --kimg MORE` goes on as if it had always
    been asked for more.
    """

    def __init__(self, cfg, images, labels=None):
        if images.shape[1:] != (3, 32, 32):
            raise ValueError(f"{cfg.data}: images of {tuple(images.shape[1:])}, not (3, 32, 32)")
        if CONFIGS[cfg.config].get("label_dim") and labels is None:
            raise ValueError(f"{cfg.data} has no labels, which {cfg.config} needs")
        self.cfg, self.images, self.labels = cfg, images, labels
        torch.manual_seed(cfg.seed)
        self.net = EDMPrecond(**CONFIGS[cfg.config])
        if cfg.init:
            with reading(cfg.init, f"a network of the configuration {cfg.config}"):
                self.net.load_state_dict(load_teacher(cfg.init).state_dict())
        self.net.to(cfg.device).train()
        self.ema = EDMPrecond(**CONFIGS[cfg.config]).to(cfg.device).eval().requires_grad_(False)
        self.ema.load_state_dict(self.net.state_dict())
        self.opt = torch.optim.Adam(self.net.parameters(), betas=(0.9, 0.99), fused=True)
        self.generator = torch.Generator().manual_seed(cfg.seed)
        self.seen, self.loss, self.seconds = 0, float("nan"), 0.0

    def state(self):
        return {"config": asdict(self.cfg), "net": self.net.state_dict(),
                "ema": self.ema.state_dict(), "opt": self.opt.state_dict(),
                "generator": self.generator.get_state(), "torch": torch.get_rng_state(),
                "seen": self.seen, "loss": self.loss, "seconds": self.seconds}

    def load(self, state):
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.opt.load_state_dict(state["opt"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch"])                 # dropout's
        self.seen, self.loss, self.seconds = state["seen"], state["loss"], state["seconds"]

    def batch(self):
        """x0 with random flips, sigma, noise, one-hot labels; drawn on the CPU, so that a seed
        means the same on every device."""
        cfg, g = self.cfg, self.generator
        index = torch.randint(len(self.images), (cfg.batch,), generator=g)
        flip = torch.rand(cfg.batch, generator=g) < 0.5
        sigma = (cfg.p_mean + cfg.p_std * torch.randn(cfg.batch, generator=g)).exp()
        x0 = self.images[index].float() / 127.5 - 1
        x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
        noise = torch.randn(x0.shape, generator=g)
        labels = None
        if self.net.label_dim:
            labels = torch.eye(self.net.label_dim)[self.labels[index]].to(cfg.device)
        return x0.to(cfg.device), sigma.to(cfg.device), noise.to(cfg.device), labels

    def step(self):
        cfg = self.cfg
        rate = min(1.0, self.seen / (1e3 * cfg.warmup_kimg + 1e-8))
        rate *= max(1.0, self.seen / (1e3 * cfg.ref_kimg)) ** -0.5
        for group in self.opt.param_groups:
            group["lr"] = cfg.lr * rate
        x0, sigma, noise, labels = self.batch()
        with torch.autocast(torch.device(cfg.device).type, torch.bfloat16, cfg.amp == "bf16"):
            losses = edm_loss(self.net, x0, sigma, noise, labels)
        loss = losses.mean()
        if not loss.isfinite():
            worst = losses.nan_to_num(torch.inf).argmax()
            raise FloatingPointError(f"loss is {loss.item()} after {self.seen} images, "
                                     f"worst at sigma = {sigma[worst].item():.4g}")
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.seen += cfg.batch
        beta = half_life_to_beta(cfg.batch, min(1e3 * cfg.ema_kimg, 0.05 * self.seen))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - beta)
        beta = half_life_to_beta(cfg.batch, 5e3)            # the loss shown: half-life 5 kimg
        loss = loss.item()
        self.loss = loss if math.isnan(self.loss) else beta * self.loss + (1 - beta) * loss
        return loss


def read_run(path, cfg):
    """The state in a run's checkpoint, if it is a run of `cfg`; ValueError names what differs."""
    with reading(path, "a checkpoint of edm.py train"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = state["config"]
    for f in fields(cfg):
        if f.name not in ("kimg", "data", "init", "device", "save_every", "preview"):
            if old.get(f.name) != getattr(cfg, f.name):
                raise ValueError(f"{path} was trained with --{f.name.replace('_', '-')} "
                                 f"{old.get(f.name)}, not {getattr(cfg, f.name)}")
    return state


def train(cfg, out, resume=False):
    """Train until cfg.kimg. As it goes it writes, to the folder `out`, checkpoint.pt (all that
    --resume needs), teacher.pt (the averaged weights alone), log.csv and samples.png.

    SIGINT and SIGTERM save and end it between two steps. Returns the exit status. Raises
    ValueError, OSError, or FloatingPointError for a loss that is not finite.
    """
    out = Path(out)
    path, log = out / "checkpoint.pt", out / "log.csv"
    state = read_run(path, cfg) if resume else None
    if path.exists() and not resume:
        raise ValueError(f"{path} holds a run already: add --resume, or take another --out")
    trainer = Trainer(cfg, *load_images(cfg.data))
    if resume:
        trainer.load(state)
    before, start, saved = trainer.seconds, time.time(), -1
    rows = list(csv.reader(log.open())) if resume and log.exists() else []
    rows = [r for r in rows[1:] if float(r[0]) * 1000 <= trainer.seen]

    def write_log():
        with atomic(log) as tmp, open(tmp, "w", newline="") as f:
            csv.writer(f).writerows([["kimg", "seconds", "loss"], *rows])

    def save():
        trainer.seconds = before + time.time() - start
        rows.append([f"{trainer.seen / 1000:g}", f"{trainer.seconds:.0f}", f"{trainer.loss:.5f}"])
        save_atomic(trainer.state(), path)
        save_atomic({"config": asdict(cfg), "seen": trainer.seen, "ema": trainer.ema.state_dict()},
                    out / "teacher.pt")
        write_log()
        if cfg.preview:
            save_grid(sample(trainer.ema, cfg.preview), out / "samples.png")
        return trainer.seen

    write_log()                                 # a folder that can't be written fails here
    stop = []                                   # a signal asks, the loop answers between steps
    handlers = {s: signal.signal(s, lambda number, frame: stop.append(number))
                for s in (signal.SIGINT, signal.SIGTERM)}
    with tqdm(total=cfg.kimg * 1000, initial=trainer.seen, unit="img", unit_scale=True) as bar:
        while trainer.seen < cfg.kimg * 1000 and not stop:
            trainer.step()
            bar.update(cfg.batch)
            bar.set_postfix(loss=f"{trainer.loss:.4f}")
            if trainer.seen % round(1000 * cfg.save_every) < cfg.batch:
                saved = save()
    if saved != trainer.seen:
        save()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if stop:
        flags = " ".join(sys.argv[1:]) + ("" if resume else " --resume")
        print(f"stopped after {trainer.seen} images; to go on: python edm.py {flags}")
        return 128 + stop[0]
    print(f"{trainer.seen} images, loss {trainer.loss:.4f}, {trainer.seconds:.0f} s: {path}")
    return 0


def main(argv):
    parser = Parser(prog="edm.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train", help="train a teacher")
    p.add_argument("--out", required=True, help="the run's folder")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    for f in fields(TrainConfig):
        p.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                       type=device if f.name == "device" else f.type)
    p = commands.add_parser("sample", help="draw images from a teacher")
    p.add_argument("checkpoint", help="a file, a URL, or a name of NVIDIA's")
    p.add_argument("-n", type=positive, default=64, help="how many")
    p.add_argument("--steps", type=positive, default=18, help="2 steps - 1 evaluations an image")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch", type=positive, default=64)
    p.add_argument("--device", type=device, default=TrainConfig.device)
    p.add_argument("--out", default="samples.png", help=".npz or .zip, else a grid as PNG")
    args = parser.parse_args(argv)
    tune_cpu()
    if args.command == "train":
        cfg = {f.name: getattr(args, f.name) for f in fields(TrainConfig)}
        return train(TrainConfig(**cfg), args.out, args.resume)

    net, start = load_teacher(args.checkpoint).to(args.device), time.time()
    images = sample(net, args.n, args.steps, args.seed, args.batch, progress=True)
    if args.out.endswith((".npz", ".zip")):
        save_images(images, args.out)
    else:
        save_grid(images, args.out)
    print(f"{args.n} images, {2 * args.steps - 1} evaluations each, "
          f"in {time.time() - start:.1f} s: {args.out}")


if __name__ == "__main__":
    run_main(main)
