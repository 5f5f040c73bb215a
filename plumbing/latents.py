"""Stable Diffusion's parts, read from disk: texts to states, images to latents and back; and what
a student's latents look like."""
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from plumbing.files import atomic, reading, save_atomic
from plumbing.imagesets import SUFFIXES

try:
    import diffusers
    import peft                     # noqa: F401: sd_distill.py's
    import transformers
    from huggingface_hub.constants import HF_HUB_CACHE
    from safetensors import torch as safetensors
    MISSING = None
except ImportError as e:            # only sd_distill.py needs them
    MISSING = e

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def load_model(name):
    """-> diffusers' pipeline, float32 on the CPU, of a folder or a name on Hugging Face. Raises
    ValueError, naming it, for what is not Stable Diffusion 1.x. Nothing is unpickled."""
    for library in (diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    kind, where = diffusers.StableDiffusionPipeline, name
    how = dict(safety_checker=None, use_safetensors=True)
    if not Path(name).is_dir():
        with reading(name, f"a folder, nor could it be downloaded into {HF_HUB_CACHE}"):
            where = kind.download(name, **how)
    with reading(name, "Stable Diffusion 1.x in diffusers' layout"):
        said = kind.load_config(where)["_class_name"]
        if said != "StableDiffusionPipeline":
            raise ValueError(f"it is a {said}")
        lacking = [part for part in PARTS if not Path(where, part).is_dir()]
        if lacking:                     # transformers would make up a tokenizer of its own
            raise ValueError(f"it lacks {' and '.join(lacking)}")
        pipe = kind.from_pretrained(where, requires_safety_checker=False, **how)
        if len(pipe.tokenizer) != pipe.text_encoder.config.vocab_size:
            raise ValueError("tokenizer and text encoder do not go together")
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"it predicts {pipe.scheduler.config.prediction_type}, not the noise")
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(f"its network takes {pipe.unet.config.in_channels} channels")
    return pipe


def latent_shape(pipe, size):
    """Pixels -> the shape of a latent. Raises ValueError for a size that can't be halved as often
    as the networks halve it."""
    factor = pipe.vae_scale_factor
    step = factor * 2 ** (len(pipe.unet.down_blocks) - 1)
    if size % step:
        raise ValueError(f"--size must be a multiple of {step}, not {size}")
    return pipe.unet.config.in_channels, size // factor, size // factor


def read_text(file):
    with reading(file, "a text in UTF-8"):
        return Path(file).read_text(encoding="utf-8-sig")


def read_prompts(file):
    """-> the lines that are not blank. Raises ValueError or OSError, naming the file."""
    prompts = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: no prompts in it, one a line")
    return prompts


def read_captions(folder):
    """-> [(image's path, caption)], by name. Raises ValueError, naming what has no partner."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    files = sorted(f for f in Path(folder).rglob("*") if f.is_file())
    images = {f.with_suffix(""): f for f in files if f.suffix.lower() in SUFFIXES}
    texts = {f.with_suffix(""): f for f in files if f.suffix.lower() == ".txt"}
    if images.keys() - texts.keys():
        alone = min(images.keys() - texts.keys())
        raise ValueError(f"{images[alone]} has no caption, {alone}.txt")
    if texts.keys() - images.keys():
        raise ValueError(f"{texts[min(texts.keys() - images.keys())]} has no image beside it "
                         f"({', '.join(SUFFIXES)})")
    if not images:
        raise ValueError(f"{folder}: no images with captions in it")
    return [(images[stem], read_text(texts[stem]).strip()) for stem in images]


@torch.no_grad()
def embed(pipe, texts):
    """-> the text encoder's last states, float16 (n, 77, 768) on the CPU. What is longer than 77
    tokens is cut."""
    states, tokenizer = [], pipe.tokenizer
    for i in range(0, len(texts), 64):
        ids = tokenizer(texts[i:i + 64], padding="max_length", truncation=True,
                        max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        states.append(pipe.text_encoder(ids.to(pipe.text_encoder.device))[0].half().cpu())
    return torch.cat(states)


@torch.no_grad()
def encode(pipe, file, size, generator):
    """-> the latent of the middle square of an image file: float16 (1, 4, size / 8, size / 8)."""
    with reading(file, "a usable image"), Image.open(file) as image:
        x = np.array(ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size)))
    x = torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1
    latent = pipe.vae.encode(x.to(pipe.vae.device)).latent_dist.sample(generator)
    return (latent * pipe.vae.config.scaling_factor).half().cpu()


@torch.no_grad()
def decode(pipe, latents):
    """Latents (n, 4, h, w) -> images uint8 (n, 3, 8 h, 8 w), one by one for the memory."""
    latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.device)
    x = torch.cat([pipe.vae.decode(latent).sample.cpu() for latent in latents.split(1)])
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def make_inputs(cfg, pipe, draw, prompts, pairs):
    """-> the states of the empty prompt, of the prompts and of the captions, and a latent for each
    caption: of `pairs` or, if there are none, the teacher's for the prompts in turn."""
    pipe.text_encoder.to(cfg.device)
    inputs = {"empty": embed(pipe, [""]), "prompts": embed(pipe, prompts)}
    if pairs:
        generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        inputs["captions"] = embed(pipe, [caption for _, caption in pairs])
        latents = [encode(pipe, file, cfg.size, generator) for file, _ in tqdm(pairs, "images")]
        inputs["latents"] = torch.cat(latents)
    else:
        print(f"drawing {cfg.bank} samples of the teacher, once")
        inputs["captions"] = inputs["prompts"][torch.arange(cfg.bank) % len(prompts)]
        inputs["latents"] = draw(inputs["captions"], inputs["empty"]).half()
    pipe.text_encoder.to("cpu")
    return inputs


def load_inputs(cfg, pipe, draw, file):
    """-> make_inputs' dictionary, made once and kept in `file`: 118 kB a text, 33 kB a latent.

    draw: states of prompts and of the empty one -> the teacher's latents. Raises ValueError if the
    file was made of other prompts, images or settings.
    """
    prompts = read_prompts(cfg.prompts)
    pairs = read_captions(cfg.data) if cfg.data else []
    told = json.dumps([prompts, [[f.name, f.stat().st_size, caption] for f, caption in pairs]])
    names = ("model", "size", "seed") if pairs else ("model", "size", "seed", "w", "bank", "steps")
    of = {name: getattr(cfg, name) for name in names}
    of["texts"] = hashlib.sha256(told.encode()).hexdigest()
    if not file.exists():
        save_atomic(make_inputs(cfg, pipe, draw, prompts, pairs) | {"of": of}, file)
    with reading(file, "the inputs of this run"):
        inputs = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if inputs["of"] != of:
            raise ValueError("it was made of other prompts, images or settings")
    return inputs


def neighbours(x):
    """The correlation of neighbours in latents (n, 4, h, w): about 0 for noise."""
    x = x - x.mean((2, 3), keepdim=True)
    return ((x[..., 1:] * x[..., :-1]).mean() / x.square().mean()).item()


def check_collapse(seen, variance, own, teachers):
    """Raises FloatingPointError where the student draws noise, as SiD-LSG's users saw it do without
    a word. variance: of its latents, over the teacher's. own, teachers: neighbours() of both."""
    if variance > 4 or teachers > 0.2 and own < 0.2 * teachers:
        raise FloatingPointError(
            f"after {seen} images the student collapsed to noise: its latents have {variance:.2g} "
            f"times the teacher's variance, and their neighbours correlate by {own:.2g}, the "
            f"teacher's by {teachers:.2g}; begin anew with lower --lr-g and longer --wait-kimg")


def save_student(net, cfg, file):
    """The weights, an adapter's as diffusers' load_lora_weights takes them, with the options."""
    tensors = {k.replace(".default", ""): v.contiguous() for k, v in net.state_dict().items()}
    with atomic(file) as tmp:
        tmp.write_bytes(safetensors.save(tensors, {"config": json.dumps(asdict(cfg))}))
