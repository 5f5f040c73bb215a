"""Stable Diffusion's parts around its network: read a model from disk, turn texts into the states
that the network reads and images into latents and back."""
import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import torch as safetensors
from tqdm import tqdm

from data import SUFFIXES, from_pillow, middle_square, open_image
from edm import to_uint8
from plumbing.loop import atomic, save

NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"        # on Hugging Face


@contextlib.contextmanager
def reading(file, what):
    """Turn whatever a library raises inside into a ValueError that names the file."""
    try:
        yield
    except Exception as e:                      # the libraries raise many kinds for a broken file
        if isinstance(e, OSError) and e.filename:           # it names the file itself
            raise
        reason = " ".join(str(e).split()) or repr(e)
        raise ValueError(f"{file}: not {what}: {reason[:300]}") from e


# ------------------------------------------------------------------------------------- the model

def load_model(name):
    """Return diffusers' pipeline of a Stable Diffusion 1.x model, float32 on the CPU.

    name: a folder in diffusers' layout, or a name on Hugging Face, which is downloaded once.
    Weights of variant fp16 are taken where there are no others. Raises ValueError, which names it,
    for anything else. No pickle is read.
    """
    for library in (diffusers.utils, transformers.utils):
        library.logging.set_verbosity_error()
        library.logging.disable_progress_bar()
    kind, folder = diffusers.StableDiffusionPipeline, Path(name)
    if folder.is_file():
        raise ValueError(f"{name}: a model is a folder; the README says how a file becomes one")
    if not folder.is_dir():
        with reading(name, "a folder, nor could it be downloaded"):
            folder = Path(kind.download(name, safety_checker=None, use_safetensors=True))
    with reading(name, "Stable Diffusion 1.x in diffusers' layout"):
        class_name = kind.load_config(folder)["_class_name"]
        if class_name != "StableDiffusionPipeline":
            raise ValueError(f"it is a {class_name}")
        weights = list((folder / "unet").glob("*.safetensors"))
        halved = weights and all(".fp16." in file.name for file in weights)
        pipe = kind.from_pretrained(        # without what some models name and do not have
            folder, variant="fp16" if halved else None, use_safetensors=True, dtype=torch.float32,
            requires_safety_checker=False, safety_checker=None, feature_extractor=None,
            image_encoder=None)
        if len(pipe.tokenizer) != pipe.text_encoder.config.vocab_size:
            raise ValueError("its tokenizer and its text encoder do not go together")
        if pipe.scheduler.config.prediction_type != "epsilon":
            raise ValueError(f"it predicts {pipe.scheduler.config.prediction_type}, not the noise")
    return pipe


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
    """Return [(an image's path, its caption)], sorted by name. Raises ValueError where there are no
    images, and OSError, which names the caption that an image lacks."""
    images = sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in SUFFIXES)
    if not images:
        raise ValueError(f"{folder}: no such folder, or no images in it ({', '.join(SUFFIXES)})")
    return [(file, read_text(file.with_suffix(".txt")).strip()) for file in images]


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
def encode(pipe, file, size, generator, done):
    """Return the latent of the middle square of an image file, resized to `size` pixels on a side:
    float16 (1, 4, size / 8, size / 8) on the CPU. done: a set, see data.open_image."""
    square = from_pillow(middle_square(open_image(file, done), size, done).convert("RGB"))
    x = torch.from_numpy(square.copy())[None].float() / 127.5 - 1                      # [-1, 1]
    latent = pipe.vae.encode(x.to(pipe.vae.device)).latent_dist.sample(generator)
    return (latent * pipe.vae.config.scaling_factor).half().cpu()


@torch.no_grad()
def decode(pipe, latents):
    """Return the images of latents (n, 4, h, w): uint8 (n, 3, 8 h, 8 w) on the CPU, decoded one by
    one to save memory."""
    latents = (latents / pipe.vae.config.scaling_factor).to(pipe.vae.device)
    x = torch.cat([pipe.vae.decode(latent).sample.cpu() for latent in latents.split(1)])
    return to_uint8(x)


# ------------------------------------------------------------------------------- a run's inputs

def make_inputs(cfg, pipe, draw, prompts, pairs):
    """Return a run's inputs as load_inputs does, computed anew. pairs: of read_captions, or []."""
    pipe.text_encoder.to(cfg.device)
    inputs = {"prompts": embed(pipe, prompts)}
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
        inputs["latents"] = draw(inputs["captions"]).half()
    pipe.text_encoder.to("cpu")
    return inputs


def load_inputs(cfg, pipe, draw, file):
    """Return a run's inputs, computed once and kept in `file`.

    They are a dictionary: the states of the "prompts" and of the "captions", float16 (n, 77, 768),
    118 kB each, and a latent for each caption, float16 (n, 4, 64, 64), 33 kB each: of the images of
    cfg.data or, without them, the teacher's own for the prompts in turn. draw: a function of the
    captions' states that returns the teacher's latents. Raises ValueError if the file was made of
    other prompts, images or settings.
    """
    prompts = read_prompts(cfg.prompts)
    pairs = read_captions(cfg.data) if cfg.data else []
    names = ("model", "size", "seed", "guidance", "teacher_samples", "steps")
    made_of = {name: getattr(cfg, name) for name in names}
    made_of["prompts"] = prompts
    made_of["data"] = [(image.name, image.stat().st_size, caption) for image, caption in pairs]
    if not file.exists():
        save(make_inputs(cfg, pipe, draw, prompts, pairs) | {"made_of": made_of}, file)
    with reading(file, "the inputs of this run"):
        inputs = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        if inputs["made_of"] != made_of:
            raise ValueError("it was made of other prompts, images or settings; begin anew, in "
                             "another --out")
    return inputs


# ---------------------------------------------------------------------------------- the student

def save_student(net, cfg, file):
    """Write a student's weights and its options; an adapter's have the names that diffusers'
    load_lora_weights takes."""
    tensors = {k.replace(".default", ""): v.contiguous() for k, v in net.state_dict().items()}
    with atomic(file) as tmp:
        tmp.write_bytes(safetensors.save(tensors, {"config": json.dumps(asdict(cfg))}))
