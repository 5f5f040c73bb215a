"""Stable Diffusion's parts around its network: read a model from disk, turn texts into the states
that the network reads and images into latents and back, and see whether a student's latents are
noise."""
import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from tqdm import tqdm

from data import SUFFIXES, open_image
from plumbing.loop import atomic, save

try:
    import diffusers
    import peft                     # noqa: F401: sd_distill.py uses it
    import transformers
    from huggingface_hub import constants, snapshot_download
    from safetensors import torch as safetensors
    MISSING = None
except ImportError as e:            # sd_distill.py's main() says what to install
    MISSING = e

NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"        # on Hugging Face
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


@contextlib.contextmanager
def reading(file, what):
    """Turn whatever a library raises inside into a ValueError that names the file."""
    try:
        yield
    except Exception as e:                      # the libraries raise many kinds for a broken file
        if isinstance(e, OSError) and e.filename:           # it names the file itself
            raise
        reason = str(e).strip().splitlines() or [repr(e)]
        raise ValueError(f"{file}: not {what}: {reason[0]}") from e


# ------------------------------------------------------------------------------------- the model

def load_model(name):
    """Return diffusers' pipeline of a Stable Diffusion 1.x model, float32 on the CPU.

    name: a folder in diffusers' layout, a single .safetensors file as web interfaces have them, or
    a name on Hugging Face. Raises ValueError, which names it, for anything else. No pickle is read.
    """
    for library in (diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    how = dict(dtype=torch.float32, requires_safety_checker=False, safety_checker=None,
               feature_extractor=None, image_encoder=None)      # some models lack what they name
    pipe = (load_file if Path(name).is_file() else load_folder)(name, how)
    with reading(name, "Stable Diffusion 1.x"):
        if len(pipe.tokenizer) != pipe.text_encoder.config.vocab_size:
            raise ValueError("its tokenizer and its text encoder do not go together")
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"it predicts {pipe.scheduler.config.prediction_type}, not the noise")
        if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(f"its network takes {pipe.unet.config.in_channels} channels")
    return pipe


def load_folder(name, how):
    """Return the pipeline of a folder in diffusers' layout, or of a name on Hugging Face, which is
    downloaded once. Weights of variant fp16 are taken where there are no others."""
    kind, where = diffusers.StableDiffusionPipeline, Path(name)
    if not where.is_dir():
        with reading(name, "a file or folder, nor could it be downloaded into "
                           f"{constants.HF_HUB_CACHE}"):
            where = Path(kind.download(name, safety_checker=None, use_safetensors=True))
    with reading(name, "Stable Diffusion 1.x in diffusers' layout"):
        class_name = kind.load_config(where)["_class_name"]
        if class_name != "StableDiffusionPipeline":
            raise ValueError(f"it is a {class_name}")
        lacking = [part for part in PARTS if not (where / part).is_dir()]
        if lacking:                     # transformers would make up a tokenizer of its own
            raise ValueError(f"it lacks {' and '.join(lacking)}")
        weights = list((where / "unet").glob("*.safetensors"))
        halved = weights and all(".fp16." in file.name for file in weights)
        return kind.from_pretrained(where, variant="fp16" if halved else None,
                                    use_safetensors=True, **how)


def load_file(name, how):
    """Return the pipeline of a single file. It has weights alone: the settings and the tokenizer
    are those of Stable Diffusion 1.5, 2 MB, downloaded once."""
    if Path(name).suffix != ".safetensors":
        raise ValueError(f"{name}: a model in one file must be a .safetensors; a .ckpt is a "
                         "pickle, which could run code: models are offered in both formats")
    try:
        settings = snapshot_download(NAME, allow_patterns=["*.json", "*.txt"])
    except OSError as e:
        code = ("from diffusers import StableDiffusionPipeline as P; "
                f"P.from_single_file({str(name)!r}).save_pretrained('model')")
        raise ValueError(
            f"{name} has weights alone, and the settings and tokenizer of {NAME} (2 MB) could not "
            f"be downloaded into {constants.HF_HUB_CACHE}. Where there is a network, turn the file "
            f'into a folder with: python -c "{code}"; then take --model model') from e
    with reading(name, "Stable Diffusion 1.x in one file"):
        return diffusers.StableDiffusionPipeline.from_single_file(name, config=settings, **how)


def latent_shape(pipe, size):
    """Return the shape of an image's latent, for `size` pixels on a side. Raises ValueError for a
    size that can't be halved as often as the networks halve it."""
    factor = pipe.vae_scale_factor
    step = factor * 2 ** (len(pipe.unet.down_blocks) - 1)
    if size % step:
        raise ValueError(f"--size must be a multiple of {step}, not {size}")
    return pipe.unet.config.in_channels, size // factor, size // factor


# ------------------------------------------------------------------------------ texts and images

def read_text(file):
    with reading(file, "a text in UTF-8"):
        return Path(file).read_text(encoding="utf-8-sig")


def read_prompts(file):
    """Return the lines of a file that are not blank. Raises ValueError, which names the file."""
    prompts = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: no prompts in it, one a line")
    return prompts


def read_captions(folder):
    """Return [(an image's path, its caption)], sorted by name. Raises ValueError, which names what
    has no partner."""
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
    """Return the text encoder's last states, float16 (n, 77, 768) on the CPU. A text of more than
    77 tokens is cut."""
    states, tokenizer = [], pipe.tokenizer
    for i in range(0, len(texts), 64):
        ids = tokenizer(texts[i:i + 64], padding="max_length", truncation=True,
                        max_length=tokenizer.model_max_length, return_tensors="pt").input_ids
        states.append(pipe.text_encoder(ids.to(pipe.text_encoder.device))[0].half().cpu())
    return torch.cat(states)


@torch.no_grad()
def encode(pipe, file, size, generator, done=None):
    """Return the latent of the middle square of an image file, resized to `size` pixels on a side:
    float16 (1, 4, size / 8, size / 8) on the CPU. done: a set, see data.open_image."""
    square = ImageOps.fit(open_image(file, done).convert("RGB"), (size, size))
    x = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].float() / 127.5 - 1   # [-1, 1]
    latent = pipe.vae.encode(x.to(pipe.vae.device)).latent_dist.sample(generator)
    return (latent * pipe.vae.config.scaling_factor).half().cpu()


@torch.no_grad()
def decode(pipe, latents):
    """Return the images of latents (n, 4, h, w): uint8 (n, 3, 8 h, 8 w) on the CPU, decoded one by
    one to save memory."""
    latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.device)
    x = torch.cat([pipe.vae.decode(latent).sample.cpu() for latent in latents.split(1)])
    return (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------- a run's inputs

def make_inputs(cfg, pipe, draw, prompts, pairs):
    """Return a run's inputs as load_inputs does, computed anew. pairs: of read_captions, or []."""
    pipe.text_encoder.to(cfg.device)
    inputs = {"empty": embed(pipe, [""]), "prompts": embed(pipe, prompts)}
    if pairs:
        generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
        inputs["captions"] = embed(pipe, [caption for _, caption in pairs])
        done = set()
        inputs["latents"] = torch.cat([encode(pipe, file, cfg.size, generator, done)
                                       for file, _ in tqdm(pairs, "images")])
        print(f"{cfg.data}: {len(pairs)} images with captions", *sorted(done), sep=", ")
    else:
        turns = torch.arange(cfg.teacher_samples) % len(prompts)
        inputs["captions"] = inputs["prompts"][turns]
        inputs["latents"] = draw(inputs["captions"], inputs["empty"]).half()
    pipe.text_encoder.to("cpu")
    return inputs


def load_inputs(cfg, pipe, draw, file):
    """Return a run's inputs, computed once and kept in `file`.

    They are a dictionary: the states of the "empty" prompt, of the "prompts" and of the "captions",
    float16 (n, 77, 768), 118 kB each, and a latent for each caption, float16 (n, 4, 64, 64), 33 kB
    each: of the images of cfg.data or, without them, the teacher's own for the prompts in turn.
    draw: a function of the captions' and the empty prompt's states that returns the teacher's
    latents. Raises ValueError if the file was made of other prompts, images or settings.
    """
    prompts = read_prompts(cfg.prompts)
    pairs = read_captions(cfg.data) if cfg.data else []
    texts = json.dumps([prompts, [[f.name, f.stat().st_size, caption] for f, caption in pairs]])
    names = ["model", "size", "seed"] + ([] if pairs else ["guidance", "teacher_samples", "steps"])
    made_of = {name: getattr(cfg, name) for name in names}
    made_of["texts"] = hashlib.sha256(texts.encode()).hexdigest()
    if not file.exists():
        save(make_inputs(cfg, pipe, draw, prompts, pairs) | {"made_of": made_of}, file)
    with reading(file, "the inputs of this run"):
        inputs = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if inputs["made_of"] != made_of:
            raise ValueError("it was made of other prompts, images or settings; begin the run anew")
    return inputs


# ---------------------------------------------------------------------------------- the student

def neighbours(x):
    """Return the correlation of neighbouring values in latents (n, 4, h, w): about 0 for noise."""
    x = x - x.mean((2, 3), keepdim=True)
    return ((x[..., 1:] * x[..., :-1]).mean() / x.square().mean()).item()


def check_collapse(seen, variance, own, teachers):
    """Stop where the student draws noise, as SiD-LSG's users saw it do without any message.

    variance: of its latents, over the teacher's. own, teachers: neighbours() of both. The limits
    are guesses. Raises FloatingPointError.
    """
    if variance > 4 or teachers > 0.2 and own < 0.2 * teachers:
        raise FloatingPointError(
            f"after {seen} images the student collapsed to noise: its latents have {variance:.2g} "
            f"times the teacher's variance, and their neighbours correlate by {own:.2g}, the "
            f"teacher's by {teachers:.2g}; begin anew with lower --lr-g and longer --wait-kimg")


def save_student(net, cfg, file):
    """Write a student's weights and its options; an adapter's have the names that diffusers'
    load_lora_weights takes."""
    tensors = {k.replace(".default", ""): v.contiguous() for k, v in net.state_dict().items()}
    with atomic(file) as tmp:
        tmp.write_bytes(safetensors.save(tensors, {"config": json.dumps(asdict(cfg))}))
