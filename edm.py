"""The teacher: EDM's loss, its sampler, guidance, and weights from files (Karras et al. 2022,
arXiv 2206.00364).

    python edm.py sample pretrained/compact_teacher.pt          # 64 images: runs/samples.png
    python edm.py sample runs/mine/teacher.pt --guide runs/young/teacher.pt --guidance 2
    python edm.py sample runs/classes/teacher.pt --guide self   # guided by itself, without labels
    python edm.py sample edm-cifar10-32x32-uncond-vp            # NVIDIA's, downloaded once
    python edm.py sample pretrained/compact_student.pt          # a student: one evaluation an image
    python edm.py sample bare.pt --sigma-init 2.5               # one whose file does not say so

5,000 samples of pretrained/compact_teacher.pt, guided, have FD-compact 2.1 to CIFAR-10
(results/fid.txt).
train_teacher.py trains a teacher, cifar_distill.py a student.
"""
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import download, save_grid, save_images
from ncsnpp import EDMPrecond, c_out, configuration, per_image
from plumbing import loop
from plumbing.cli import count, nonnegative, parser, positive, real, run_main, torch_device, whole
from plumbing.weights import read_file

HERE = Path(__file__).parent
OFFICIAL = {        # name: sha256 of https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/NAME.pkl
    "edm-cifar10-32x32-uncond-vp":
        "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
    "edm-cifar10-32x32-uncond-ve": "",                          # "": not known
    "edm-cifar10-32x32-cond-vp": "",
    "edm-ffhq-64x64-uncond-vp": "",
    "edm-afhqv2-64x64-uncond-vp": "",
    "edm-imagenet-64x64-cond-adm": "",
}


# ---------------------------------------------------------------------------- loss and sampler

def edm_loss(D_x, x0, sigma, sigma_data):
    """Return the denoising loss of each image (N,): EDM Eq. (2), a mean over pixels, with the
    weight of Table 1.

    D_x: the denoiser's output for x0 + sigma noise. x0: clean images, float [-1, 1], like D_x
    (N, C, H, W). sigma: (N, 1, 1, 1).
    """
    weight = c_out(sigma, sigma_data) ** -2                                 # lambda(sigma)
    return (weight * (D_x - x0).square()).mean(dim=(1, 2, 3))


def half_life_to_beta(images, half_life):
    """Return how much of a running average is kept after `images` more; half_life: in images."""
    return 0.5 ** (images / half_life)


def karras(t, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """Return the noise levels of EDM Eq. (5) for a tensor t in [0, 1], in its dtype: they fall from
    sigma_max at 0 to sigma_min at 1."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + t * (low - high)) ** rho


def grid(steps):
    """Return a teacher's noise levels: a list of steps + 1 numbers that fall, the last one 0."""
    t = torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)
    return [*karras(t).tolist(), 0.0]


@torch.no_grad()
def heun(net, z, sigmas, c=None):
    """Return the images that EDM's Algorithm 1, deterministic, makes of standard normal z, both
    (N, C, H, W).

    sigmas: noise levels that fall, the last one 0; n of them above 0 take 2 n - 1 evaluations. One,
    (s, 0), gives x + (0 - s) (x - D) / s = D: that is a one-step generator.
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


def to_uint8(x):
    """Return float [-1, 1] as uint8 [0, 255], rounded."""
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def image_shape(net):
    """Return (C, H, W) of a network's images."""
    return net.channels, net.resolution, net.resolution


@torch.no_grad()
def sample(net, n, steps=18, sigma_init=None, seed=0, batch=64, labels=None, progress=None):
    """Draw n images from a denoiser: uint8 (n, C, H, W), on the CPU.

    sigma_init: a student's noise level, from which one evaluation makes an image; None for the
    net's own, which load_teacher reads from a student's file. Where there is none, the net is a
    teacher, and draws by `steps` steps of heun(). The noise is one stream on the CPU: neither batch
    size nor device changes what is drawn. labels: int64 (n,); where a class-conditional network
    gets none, the classes take turns. progress: what a progress bar says, None for no bar.
    Raises ValueError for labels that the network does not know.
    """
    device = next(net.parameters()).device
    sigma_init = sigma_init or getattr(net, "sigma_init", None)
    if labels is None and net.label_dim:
        labels = torch.arange(n) % net.label_dim
    c = None
    if labels is not None:
        check_labels(labels, net.label_dim, "sample")
        c = F.one_hot(labels, net.label_dim).float().to(device)             # (n, label_dim)
    stream = torch.Generator().manual_seed(seed)
    images = torch.empty(n, *image_shape(net), dtype=torch.uint8)
    for start in tqdm(range(0, n, batch), progress, disable=progress is None, unit="batch"):
        some = images[start:start + batch]                                  # (B, C, H, W)
        z = torch.randn(some.shape, generator=stream).to(device)
        part = None if c is None else c[start:start + batch]
        if sigma_init:
            x = net(sigma_init * z, sigma_init, part)
        else:
            x = heun(net, z, grid(steps), part)
        some.copy_(to_uint8(x))
    return images


def check_labels(labels, label_dim, source):
    """Raise ValueError, naming `source`, unless labels, int64 (n,) or None, are what a network of
    label_dim classes takes."""
    if labels is None or not label_dim:
        raise ValueError(f"{source} has no labels, which the network needs" if label_dim else
                         f"{source} has labels, which an unconditional network does not take")
    if labels.min() < 0 or labels.max() >= label_dim:
        raise ValueError(f"{source}: labels from {labels.min()} to {labels.max()}; the network "
                         f"knows 0 to {label_dim - 1}")


# ------------------------------------------------------------------------------------- guidance

class Guided(nn.Module):
    """A teacher that a weaker one guides: D = D_weak + w (D_good - D_weak), without gradients.

    weak: another network, such as the good one when it was younger (autoguidance, Karras et al.
    2024, arXiv 2406.02507); None for the good one without its label (classifier-free guidance, Ho
    and Salimans 2022, arXiv 2207.12598). guidance: w; 1 changes nothing. low, high: the noise
    levels in [low, high] are guided, at the others D is D_good (Kynkaanniemi et al. 2024, arXiv
    2404.07724). Raises ValueError for networks that don't go together.
    """

    def __init__(self, good, weak, guidance, low=0.0, high=math.inf):
        super().__init__()
        if weak is None and not good.label_dim:
            raise ValueError("only a class-conditional network can be guided by itself")
        if weak is not None and weak.label_dim not in (0, good.label_dim):
            raise ValueError(f"a network of {good.label_dim} classes can't be guided by one of "
                             f"{weak.label_dim}")
        if low > high:
            raise ValueError(f"no noise level lies between {low:g} and {high:g}")
        self.good, self.weak, self.guidance, self.low, self.high = good, weak, guidance, low, high
        self.sigma_data, self.label_dim = good.sigma_data, good.label_dim
        self.record = getattr(good, "record", {})
        self.channels = getattr(good, "channels", None)         # for sample(); Stable Diffusion's
        self.resolution = getattr(good, "resolution", None)     # networks have neither

    @torch.no_grad()
    def forward(self, x, sigma, c=None):
        """Return D_x; the arguments are EDMPrecond's."""
        D_good = self.good(x, sigma, c)                                     # (N, C, H, W)
        sigma = per_image(sigma, x)
        inside = (self.low <= sigma) & (sigma <= self.high)                 # (N or 1, 1, 1, 1)
        if self.guidance == 1 or not inside.any():
            return D_good
        if self.weak is None:
            D_weak = self.good(x, sigma, torch.zeros_like(c))               # no label
        else:
            D_weak = self.weak(x, sigma, c)
        return torch.where(inside, D_weak + self.guidance * (D_good - D_weak), D_good)


def load_guided(teacher, guide="own", guidance=2.0, low=0.3, high=5.0, good=None):
    """Return a teacher on the CPU, guided or not.

    teacher: what load_teacher takes. guide: weaker weights, likewise; "self": the teacher without
    its label; "none"; "own": TEACHER_young.pt, where there is one. guidance, low, high: see Guided.
    good: what load_teacher(teacher) returned, if it was called. Raises ValueError, also for the
    weights of a student, or OSError.
    """
    good = good or load_teacher(teacher)
    path = None if guide == "self" else beside(teacher, guide, "_young.pt")
    weak = load_teacher(path) if path else None
    for name, net in ((teacher, good), (path, weak)):
        if net and net.sigma_init:
            raise ValueError(f"{name} is a student, of one noise level ({net.sigma_init:g}): a "
                             "teacher is needed, which knows them all")
    if weak and image_shape(weak) != image_shape(good):
        raise ValueError(f"{teacher} is for images of {image_shape(good)}, its guide {path} for "
                         f"{image_shape(weak)}")
    return Guided(good, weak, guidance, low, high) if weak or guide == "self" else good


# ----------------------------------------------------------------------------- weights from files

def load_teacher(source):
    """Return the denoiser in a file, a teacher's or a student's, in eval mode, without gradients,
    float32 on the CPU.

    source: the path of a pickle of EDM's code or of what torch.save or safetensors wrote, or one of
    OFFICIAL. The network is recognised by its tensors. Its attribute `record` is the dictionary of
    what the file says of itself, `sigma_init` the noise level of a student, None of a teacher.
    Raises ValueError, which says what is wrong, or OSError.
    """
    path = Path(shipped(source))
    if str(source) in OFFICIAL and not path.exists():
        path = download(f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{source}.pkl",
                        OFFICIAL[source])
    if not path.is_file():
        raise FileNotFoundError(f"no such weights: {source} (or one of {', '.join(OFFICIAL)})")
    state, record = read_file(path)
    try:
        with torch.random.fork_rng(devices=[]):     # it draws first weights, for nothing
            net = network(state, record)
        for name, v in state.items():
            if not (v.is_floating_point() and v.isfinite().all()):
                raise ValueError(f"{name} is not of finite real numbers")
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    net.load_state_dict(state)
    net.record, net.sigma_init = record, record.get("sigma_init")
    if "sigma_data" not in record and loop.rank() == 0:
        print(f"{path} does not say its sigma_data and dropout: EDM's defaults are taken",
              file=sys.stderr)
    return net.eval().requires_grad_(False)


def network(state, record, **changes):
    """Return the network with the tensors' names and shapes, its weights not loaded.

    record: has dropout and sigma_data, which the tensors do not say. changes: keywords in place of
    those found. Raises ValueError, which names a tensor, where no network has them.
    """
    kind, recognise = EDMPrecond, configuration
    if "model.out_conv.weight" in state:                    # ADM, of EDM's ImageNet-64
        sys.path.append(str(HERE / "examples/imagenet64"))
        import adm
        kind, recognise = adm.ADMPrecond, adm.configuration
    known = {k: record[k] for k in ("dropout", "sigma_data") if k in record}
    return kind(**recognise(state) | known | changes)


def shipped(name):
    """Return the path `name` or, where nothing is there, the one of that name in this project."""
    return str(HERE / name) if not Path(name).exists() and (HERE / name).exists() else str(name)


def beside(teacher, name, ending):
    """Return the path `name`, or None for "none". "own" is TEACHER + ending, beside the weights
    TEACHER.pt, and None where there is none."""
    if name != "own":
        return None if name == "none" else shipped(name)
    own = shipped(str(teacher)).removesuffix(".pt") + ending
    return own if Path(own).exists() else None


# ----------------------------------------------------------------------------------- the command

@dataclass
class SampleConfig:
    sigma_init: positive = None     # a student's noise level, where its file does not say it
    steps: count = 18           # of a teacher's sampler; each but the last evaluates it twice
    guide: str = "own"          # weaker weights that guide a teacher, self: without its labels,
                                # none, or own: TEACHER_young.pt, where there is one
    guidance: real = 2.0        # how much the teacher is guided: 1 is not at all
    guide_low: nonnegative = 0.3        # the lowest noise level that is guided
    guide_high: nonnegative = 5.0       # and the highest
    seed: whole = 0             # of the noise
    batch: count = 64           # images at a time
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"   # what computes
    out: Path = Path("runs/samples.png")    # a grid, .png, or a set of images, .npz or .zip


def main(argv):
    p = parser("edm.py", "Draw images from a teacher or a student.", SampleConfig)
    p.add_argument("command", choices=["sample"])
    p.add_argument("weights", help="a file, or a name of NVIDIA's: " + ", ".join(OFFICIAL))
    p.add_argument("-n", type=count, default=64, help="how many images (64)")
    given = vars(p.parse_args(argv))                            # only what was typed
    n, weights = given.pop("n"), given.pop("weights")
    del given["command"]
    cfg = SampleConfig(**given)
    if cfg.out.suffix not in (".png", ".npz", ".zip"):
        p.error(f"--out must end in .png, .npz or .zip, not {cfg.out}")

    loop.tune_cpu()
    net = load_teacher(weights)
    sigma_init = cfg.sigma_init or net.sigma_init
    of_teachers = ("steps", "guide", "guidance", "guide_low", "guide_high")
    idle = ["--" + name.replace("_", "-") for name in of_teachers if name in given]
    if sigma_init and idle:
        raise ValueError(f"{weights} is drawn as a student, by one evaluation, in which "
                         f"{', '.join(idle)} would change nothing")
    if not sigma_init:
        net = load_guided(weights, cfg.guide, cfg.guidance, cfg.guide_low, cfg.guide_high, net)
    net, start = net.to(cfg.device), time.monotonic()
    labels = torch.arange(n) % net.label_dim if net.label_dim else None         # they take turns
    images = sample(net, n, cfg.steps, sigma_init, cfg.seed, cfg.batch, labels, "images")
    if cfg.out.suffix == ".png":
        save_grid(images, cfg.out, classes=net.label_dim)
    else:
        save_images(images, cfg.out, labels)
    kind = (f"1 evaluation each, as a student from noise {sigma_init:g}" if sigma_init else
            f"{2 * cfg.steps - 1} evaluations each, as a teacher")
    print(f"{n} images of {kind}, in {time.monotonic() - start:.1f} s: {cfg.out}")


if __name__ == "__main__":
    run_main(main)
