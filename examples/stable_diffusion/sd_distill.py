"""Algorithm 1 on Stable Diffusion 1.5: text to image in one step (the paper's Figures 2 and 3).

    pip install -r requirements.txt -r examples/stable_diffusion/requirements.txt
    cd examples/stable_diffusion
    python sd_distill.py --prompts prompts.txt --data photos    # photos/1.jpg and photos/1.txt, ...
    python sd_distill.py --prompts prompts.txt                  # p: the teacher's own samples
    torchrun --nproc_per_node=8 sd_distill.py --prompts prompts.txt --data photos --batch 64
    python sd_distill.py --prompts prompts.txt --resume         # goes on
    python sd_distill.py sample runs/sd_kl --prompt "a red fox in the snow" --out grid.png

A latent diffusion model that predicts the noise is EDM's denoiser in other coordinates (SDPrecond),
so that cifar_distill.py's Distiller runs on it as it is. Its tests use tiny networks: it has not
been run on Stable Diffusion's weights, and how good its images are is not known.
"""
import contextlib
import copy
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from tqdm import tqdm

try:
    import diffusers                                                        # noqa: F401
    from peft import LoraConfig
    from safetensors import safe_open
except ModuleNotFoundError as e:
    print(f"sd_distill.py: {e}: pip install -r {Path(__file__).parent}/requirements.txt",
          file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))            # the project

import bregman                                                              # noqa: E402
import cifar_distill                                                        # noqa: E402
from data import save_grid                                                  # noqa: E402
from edm import Guided, heun                                                # noqa: E402
from latents import (NAME, decode, embed, latent_shape, load_inputs,        # noqa: E402
                     load_model, reading, save_student)
from ncsnpp import per_image                                                # noqa: E402
from plots import side_by_side                                              # noqa: E402
from plumbing.cli import (count, nonnegative, parser, positive, real, run_main,     # noqa: E402
                          share, torch_device, whole)
from plumbing.loop import (begin, claim, first_process_first, processes, rank,      # noqa: E402
                           train, tune_cpu, world)


@dataclass
class Config:
    h: Literal[bregman.NAMES] = "kl"    # which row of Table 1
    lam: real = 5.0             # SBA's lambda
    prompts: str = "prompts.txt"        # a file with a prompt a line
    data: str = ""              # images with captions, a.jpg with a.txt, for the classifier's p;
                                # without it: the teacher's own samples
    model: str = NAME           # a folder in diffusers' layout, or a name on Hugging Face
    guidance: real = 1.75       # of the teacher, 1 for none: DMD2's
    full: bool = False          # train whole networks, not adapters; DMD2's rates for it are 1e-5
    rank: count = 64            # of the adapters
    size: count = 512           # pixels on a side
    teacher_samples: count = 1000       # how many are drawn where there is no --data
    steps: count = 25           # of the teacher's sampler: 2 steps - 1 evaluations, each guided
    kimg: positive = 20         # thousands of generated images, the run's length
    batch: count = 8            # images a step, over all processes
    lr_g: positive = 1e-4       # rate of the generator's Adam
    lr_f: positive = 1e-4       # rate of the fake network's: score and classifier
    fake_updates: count = 1     # of the fake network for one of the generator; DMD2: 10
    wait_kimg: nonnegative = 1.0        # for which the generator waits for the fake network
    sigma_init: positive = 2.5  # x = G(sigma_init z, sigma_init, c): t = 625, as SiD-LSG
    t_min: share = 0.02         # the generator's noise levels: from this
    t_max: share = 0.98         # to this share of the teacher's times, as DMD2
    p_mean: real = 0.5          # the fake network's: ln sigma is normal with this mean
    p_std: positive = 1.2       # and this standard deviation, as Stable Diffusion's own levels
    clip: nonnegative = 5.0     # log r within +-clip
    norm: Literal["level", "batch"] = "level"   # log r is centred at its noise level, or left as is
    ess: share = 0.9            # least effective sample size: weights are tempered to it; 0: as is
    gan: nonnegative = 0.0      # w_GAN, line 13
    ema_kimg: positive = 1.0    # half-life of the generator's average, which is what is shown
    seed: whole = 0             # of all random numbers
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"     # cpu, cuda, cuda:1
    amp: Literal["no", "bf16", "fp16"] = "fp16" if torch.cuda.is_available() else "no"  # autocast,
                                # and the precision of weights that are not trained
    eval_every: positive = 0.5  # kimg between rows of log.csv and grids
    preview: count = 4          # samples in each grid, of the first prompts
    save_every: positive = 1.0  # kimg between checkpoints

    # Options of cifar_distill.py that have one value here, and its checks of the others.
    part, w_t, teacher_free, decay_kimg, grad_clip = "both", "c_out", False, 0.0, 0.0
    __post_init__ = cifar_distill.Config.__post_init__


# --------------------------------------------------------------------------------- the denoiser

def interpolate(x, xs, ys):
    """Return y at x between the points (xs, ys), where xs rise; beyond an end y is the end's."""
    i = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    inside = ((x - xs[i - 1]) / (xs[i] - xs[i - 1])).clamp(0, 1)
    return ys[i - 1].lerp(ys[i], inside)


class SDPrecond(nn.Module):
    """Stable Diffusion as EDM's denoiser: D(x; sigma, c) = x - sigma eps(x_vp, t, c), with
    x_vp = x / sqrt(1 + sigma^2) and sigma(t) = sqrt((1 - abar_t) / abar_t), from 0.029 (t = 0) to
    14.6 (t = 999).

    unet: diffusers' UNet2DConditionModel, which predicts the noise eps. abar: its scheduler's
    alphas_cumprod, (1000,). ln sigma is linear between two times.
    """
    sigma_data = 1.0                # of latents, which Stable Diffusion scales to that
    label_dim = 0                   # no classes: c is a text

    def __init__(self, unet, abar):
        super().__init__()
        self.unet, abar = unet, abar.double()
        log_sigma = ((1 - abar) / abar).log() / 2
        self.register_buffer("log_sigma", log_sigma.float(), persistent=False)
        self.register_buffer("times", torch.arange(len(abar)).float(), persistent=False)

    def noise_levels(self, t):
        """Return the noise levels (n,) of times t (n,), shares of the last one, in [0, 1]."""
        return interpolate(t * self.times[-1], self.times, self.log_sigma).exp()

    def _encode(self, x, sigma, c):
        """Return the middle block's features, the skips, and the embedding of the time."""
        unet = self.unet
        t = interpolate(sigma.log(), self.log_sigma, self.times).flatten().expand(len(x))
        emb = unet.time_embedding(unet.time_proj(t))                        # (N, 1280)
        h = unet.conv_in(x * (1 + sigma ** 2).rsqrt())                      # (N, 320, 64, 64)
        skips = [h]
        for block in unet.down_blocks:
            h, more = block(h, emb, encoder_hidden_states=c)    # some blocks do not read it
            skips += more
        return unet.mid_block(h, emb, encoder_hidden_states=c), skips, emb

    def _decode(self, h, skips, emb, c):
        """Return the predicted noise, (N, 4, 64, 64)."""
        for block in self.unet.up_blocks:
            n = len(block.resnets)
            h = block(h, tuple(skips[-n:]), emb, encoder_hidden_states=c)
            skips = skips[:-n]
        return self.unet.conv_out(self.unet.conv_act(self.unet.conv_norm_out(h)))

    def forward(self, x, sigma, c, return_logits=False):
        """Return D_x, float32 (N, 4, 64, 64), and with return_logits the logits of encode(), too.

        x: latents plus noise, float (N, 4, 64, 64). sigma: > 0, a number, (N,) or (N, 1, 1, 1).
        c: the text encoder's last states (N, 77, 768).
        """
        x, sigma = x.float(), per_image(sigma, x)
        h, skips, emb = self._encode(x, sigma, c)
        D_x = x - sigma * self._decode(h, skips, emb, c).float()
        return (D_x, h.float().mean(1)) if return_logits else D_x

    def encode(self, x, sigma, c):
        """Return the classifier's logits l, float32 (N, 8, 8): the channel mean of the middle
        block's features. sigmoid(l) = p / (p + q), so log r = -l. Arguments as forward's."""
        h, _, _ = self._encode(x.float(), per_image(sigma, x), c)
        return h.float().mean(1)

    def state_dict(self, **how):
        """Return the adapter alone, where there is one: the other weights are the teacher's."""
        state = super().state_dict(**how)
        return {k: v for k, v in state.items() if "lora_" in k} or state

    def load_state_dict(self, state):
        """Take what state_dict() returned. Raises RuntimeError for tensors of another network."""
        super().load_state_dict(super().state_dict() | state)


class WithoutPrompt(nn.Module):
    """The weak network of classifier-free guidance: it reads the empty prompt (1, 77, 768)."""
    label_dim = 0

    def __init__(self, net, empty):
        super().__init__()
        self.net = net
        self.register_buffer("empty", empty.float(), persistent=False)

    def forward(self, x, sigma, c):
        return self.net(x, sigma, self.empty.expand(len(x), -1, -1))


def start_from(net, cfg):
    """Return a network to train that computes what `net` does.

    Its adapter, (rank x inputs) and (outputs x rank) beside each layer, begins at zero; all its
    other weights are those of `net`, not copies. Trained weights are float32. All layers of the
    blocks have adapters, as in LCM-LoRA (arXiv 2311.05556).
    """
    if cfg.full:
        return copy.deepcopy(net).float().requires_grad_(True)
    net = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    torch.manual_seed(cfg.seed)                             # the same adapter in all processes
    layers = [name for name, layer in net.unet.named_modules()
              if "_block" in name and isinstance(layer, (nn.Linear, nn.Conv2d))]
    net.unet.add_adapter(LoraConfig(r=cfg.rank, lora_alpha=cfg.rank, target_modules=layers))
    for p in net.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return net.eval()


class SD(cifar_distill.Distiller):
    """Algorithm 1 on latents. inputs: a dictionary, of latents.load_inputs.

    Each network has its own adapter in its own modules. One UNet whose adapters are switched would
    be a trap: peft takes the gradients of those that rest.
    """

    def __init__(self, cfg, teacher, inputs):
        super().__init__(cfg, teacher, inputs["latents"])
        self.prompts, self.captions = inputs["prompts"], inputs["captions"]     # (N, 77, 768)

    def copy_weights(self):
        """Return G, the fake network and G's average: the teacher, not guided.  Line 1"""
        return [start_from(self.teacher.good, self.cfg) for _ in range(3)]

    def noise_levels(self, t):
        return self.teacher.good.noise_levels(t)

    def real_batch(self, index, kind):
        """Return the real latents at `index` (n,), their captions, and prompts to generate."""
        prompt = torch.randint(len(self.prompts), (len(index),), **kind)
        real = self.images[index.to(self.images.device)].to(self.cfg.device).float()
        return dict(real=real, c=self.states(self.prompts, prompt),
                    c_real=self.states(self.captions, index))

    def states(self, texts, index):
        """Return the states of some texts. All, 118 kB a text, are too many for a GPU: they stay
        in a file."""
        return texts[index.cpu()].to(self.cfg.device).float()

    def sample_batch(self):
        """Return a step's random numbers, the fake network's noise levels within the teacher's."""
        b = super().sample_batch()
        ends = torch.tensor([0.0, 1.0], device=self.cfg.device)
        b.sigma_f.clamp_(*self.noise_levels(ends).tolist())
        return b


@torch.no_grad()
def sample(net, c, shape, sigmas, cfg, seed=0):
    """Return a latent for each text's states c (n, 77, 768): float32 (n, *shape) on the CPU.
    sigmas: the noise levels of edm.heun."""
    generator, latents = torch.Generator().manual_seed(seed), []
    for part in tqdm(c.split(cfg.batch), "sampling", delay=5, leave=False, unit="batch"):
        z = torch.randn(len(part), *shape, generator=generator).to(cfg.device)
        with torch.autocast(z.device.type, cifar_distill.HALF[cfg.amp], cfg.amp != "no"):
            latents.append(heun(net, z, sigmas, part.to(cfg.device).float()).cpu())
    return torch.cat(latents)


def grid(net, steps):
    """Return the sampler's noise levels for a teacher: falling, at equal steps of t, and 0."""
    return [*net.noise_levels(torch.linspace(1, 0, steps, device=net.times.device)).tolist(), 0.0]


# ----------------------------------------------------------------------------------------- a run

def load_all(cfg, out):
    """Return the pipeline, the guided teacher, and the run's inputs, kept in the folder `out`."""
    with first_process_first():
        pipe = load_model(cfg.model)
        shape = latent_shape(pipe, cfg.size)
        pipe.vae.to(cfg.device)
        net = SDPrecond(pipe.unet.to(cifar_distill.HALF[cfg.amp]), pipe.scheduler.alphas_cumprod)
        net.eval().requires_grad_(False)
        teacher = Guided(net, WithoutPrompt(net, embed(pipe, [""])), cfg.guidance).to(cfg.device)

        def draw(c):
            return sample(teacher, c, shape, grid(net, cfg.steps), cfg, cfg.seed + 1)

        return pipe, teacher, load_inputs(cfg, pipe, draw, out / "inputs.pt")


class Evaluator:
    """Draws images of the first prompts by teacher and student, from the same noise."""

    def __init__(self, d, pipe, out):
        self.d, self.pipe, self.out = d, pipe, out
        self.c = d.prompts[torch.arange(d.cfg.preview) % len(d.prompts)]
        self.theirs = self.sample(d.teacher, grid(d.teacher.good, d.cfg.steps))

    def sample(self, net, sigmas):
        return sample(net, self.c, self.d.images.shape[1:], sigmas, self.d.cfg)

    def row(self, rows):
        """Return a row of log.csv; write a grid and the student as it is now."""
        d, theirs = self.d, self.theirs
        mine = self.sample(d.ema, (d.cfg.sigma_init, 0.0))
        row = {"variance": (mine.var() / theirs.var()).item()} | d.averages()
        shown = {"teacher": decode(self.pipe, theirs), "student, one step": decode(self.pipe, mine)}
        side_by_side(shown, self.out / f"grid_{d.seen:09}.png")
        tqdm.write(f"{d.seen} images: " + ", ".join(f"{k} {v:.3g}" for k, v in row.items()))
        save_student(d.ema, d.cfg, self.out / "student.safetensors")
        return row


def run(cfg, out, resume=False):
    """Distil, into the folder `out`; return the exit status."""
    out = Path(out)
    state = begin(cfg, out, resume, cifar_distill.FREE)
    with claim(out) if rank() == 0 else contextlib.nullcontext(), processes(cfg.device):
        pipe, teacher, inputs = load_all(cfg, out)
        d = SD(cfg, teacher, inputs)
        if state:
            d.load(state, out / "checkpoint.pt")
        evaluate = Evaluator(d, pipe, out).row if rank() == 0 else None
        _, status = train(d, cfg, out, evaluate, cfg.eval_every, state)
    return status


def load_student(file, device):
    """Return a student's Config, pipeline and network. Raises ValueError, which names the file."""
    with reading(file, "a student of sd_distill.py"), safe_open(file, "pt") as f:
        cfg = Config(**json.loads(f.metadata()["config"]) | {"device": device, "amp": "no"})
        tensors = {k: f.get_tensor(k) for k in f.keys()}
    pipe = load_model(cfg.model)
    net = SDPrecond(pipe.unet, pipe.scheduler.alphas_cumprod).eval().requires_grad_(False)
    net = start_from(net, cfg)
    names = {k.replace(".default", ""): k for k in net.state_dict()}
    with reading(file, f"a student of {cfg.model}"):
        net.load_state_dict({names.get(k, k): v for k, v in tensors.items()})
    return cfg, pipe, net.to(device)


# ------------------------------------------------------------------------------------ command line

def parse(argv):
    """Return a run's Config, its folder, and whether it goes on."""
    p = parser("sd_distill.py", __doc__, Config)
    p.add_argument("--out", type=Path, help="the run's folder (runs/sd_H)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out")
    args = vars(p.parse_args(argv))
    out, resume = args.pop("out"), args.pop("resume")
    if world() > 1 and args.get("device", Config.device) == "cuda":
        args["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    cfg = Config(**args)
    return cfg, out or Path("runs") / f"sd_{bregman.row_name(cfg.h, cfg.lam)}", resume


def draw(argv):
    """The command `sample`."""
    p = parser("sd_distill.py sample", "Draw images from a student.")
    p.add_argument("run", type=Path, help="a run's folder")
    p.add_argument("--prompt", action="append", required=True, help="what to draw")
    p.add_argument("-n", type=count, default=4, help="images for each prompt (4)")
    p.add_argument("--seed", type=whole, default=0, help="of the noise (0)")
    p.add_argument("--device", type=torch_device, default=Config.device, help="what computes")
    p.add_argument("--out", type=Path, default=Path("runs/sd_samples.png"),
                   help="a PNG with a row for each prompt (runs/sd_samples.png)")
    args = p.parse_args(argv)
    cfg, pipe, net = load_student(args.run / "student.safetensors", args.device)
    c = embed(pipe, args.prompt).repeat_interleave(args.n, 0)
    latents = sample(net, c, latent_shape(pipe, cfg.size), (cfg.sigma_init, 0.0), cfg, args.seed)
    save_grid(decode(pipe, latents), args.out, columns=args.n, scale=1)
    print(f"{len(c)} images, one evaluation each: {args.out}")


def main(argv):
    tune_cpu()
    return draw(argv[1:]) if argv[:1] == ["sample"] else run(*parse(argv))


if __name__ == "__main__":
    run_main(main)
