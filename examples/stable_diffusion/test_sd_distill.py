"""sd_distill.py on tiny random networks: diffusers' own pipeline, Eq. (4), a problem with a known
answer, runs stopped and taken up again, adapters that others load. Nothing is downloaded."""
import copy
import json
import os
import pickle
import shlex
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")      # before diffusers reads the first
diffusers = pytest.importorskip("diffusers")

import transformers                                                     # noqa: E402
from PIL import Image                                                   # noqa: E402
from safetensors.torch import save_file                                 # noqa: E402

import sd_distill                                                       # noqa: E402
from edm import Guided                                                  # noqa: E402
from latents import embed, load_model                                   # noqa: E402
from sd_distill import SD, Config, SDPrecond, WithoutPrompt             # noqa: E402

torch.set_num_threads(1)        # on a busy machine two that wait for each other are much slower
SCRIPT = Path(sd_distill.__file__)
DDIM = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",      # SD 1.5's own
            clip_sample=False, set_alpha_to_one=False, steps_offset=1)
OURS = dict(device="cpu", amp="no", batch=4, rank=4, wait_kimg=0.0)
ABAR = diffusers.DDIMScheduler(**DDIM).alphas_cumprod
close = torch.testing.assert_close


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def tiny_unet(**how):
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**dict(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")) | how).eval()


def tiny_net(**how):
    return SDPrecond(tiny_unet(**how), ABAR).requires_grad_(False)


def texts(n, seed=5, tokens=77):
    return torch.randn(n, tokens, 32, generator=torch.Generator().manual_seed(seed))


def tiny_pipe():
    """Return a whole pipeline, whose tokenizer knows the alphabet."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2)
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    names = {name: i for i, name in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    tokenizer = transformers.CLIPTokenizer(names, [], model_max_length=77)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1)).eval()
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=encoder, tokenizer=tokenizer, unet=tiny_unet(),
        scheduler=diffusers.DDIMScheduler(**DDIM), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, prompts, and images with captions, as a user has them: the model of variant fp16,
    without the safety checker that it names."""
    place = tmp_path_factory.mktemp("sd")
    tiny_pipe().to(torch.float16).save_pretrained(place / "model", variant="fp16")
    edit(place / "model/model_index.json",
         safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
         feature_extractor=["transformers", "CLIPImageProcessor"])
    (place / "prompts.txt").write_text("a red fox\n\n a house \nthe sea\n")
    (place / "photos").mkdir()
    photos = [("RGB", (0, 100, 200)), ("RGB", (80, 100, 200)), ("L", 90)]
    for i, (mode, colour) in enumerate(photos):
        Image.new(mode, (20, 16 + i), colour).save(place / "photos" / f"{i}.png")
        (place / "photos" / f"{i}.txt").write_text(f"photo {i}\n")
    return place


@pytest.fixture
def command(folder, monkeypatch, tmp_path):
    """A function that runs the script's command in this process, with tiny settings."""
    def run(*more, out="run"):
        tiny = OURS | dict(prompts=folder / "prompts.txt", model=folder / "model", size=16, steps=2,
                           teacher_samples=5, kimg=0.024, eval_every=0.012, preview=1,
                           save_every=0.008, out=out)
        argv = [a for k, v in tiny.items() for a in ("--" + k.replace("_", "-"), str(v))]
        monkeypatch.setattr(sys, "argv", [os.path.relpath(SCRIPT), *argv, *map(str, more)])
        return sd_distill.main(sys.argv[1:])
    monkeypatch.chdir(tmp_path)
    return run


def distiller(net, away=0.03, **options):
    """Return a Distiller whose student and fake network have left the teacher."""
    generator = torch.Generator().manual_seed(1)
    inputs = dict(prompts=texts(3), captions=texts(12, 6),
                  latents=torch.randn(12, 4, 8, 8, generator=generator))
    d = SD(Config(**OURS | options), Guided(net, WithoutPrompt(net, texts(1, 7)), 1.75), inputs)
    with torch.no_grad():
        for p in [*trained(d.fake), *trained(d.G)]:
            p += away * torch.randn(p.shape, generator=generator)
    return d


# --------------------------------------------------------------------------------- the denoiser

def test_noise_levels_are_stable_diffusions():
    net, times = tiny_net(), torch.tensor([0, 1, 625, 998, 999])
    sigma = net.noise_levels(torch.tensor([0, 1, 625, 998, 999, 625.5]) / 999)
    close(sigma[:5], ((1 - ABAR[times]) / ABAR[times]).sqrt(), rtol=1e-4, atol=0)
    seen = []
    net.unet.time_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    net.encode(torch.zeros(8, 4, 8, 8), torch.cat([sigma, torch.tensor([1e-3, 50.0])]), texts(8))
    close(seen[0], torch.tensor([0, 1, 625, 998, 999, 625.5, 0, 999]), rtol=0, atol=5e-3)


def test_denoiser_is_diffusers_own_network():
    net, c = tiny_net(), texts(3)
    x = 3 * torch.randn(3, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    t, middle = torch.tensor([3.0, 400.0, 990.0]), []
    sigma = net.noise_levels(t / 999)[:, None, None, None]
    net.unet.mid_block.register_forward_hook(lambda module, args, out: middle.append(out))
    with torch.no_grad():
        eps = net.unet(x / (1 + sigma ** 2).sqrt(), t, c).sample
        D_x, logits = net(x, sigma, c, return_logits=True)
        close(D_x, x - sigma * eps, rtol=1e-4, atol=1e-3)
        close(logits, middle[0].mean(1), rtol=1e-4, atol=1e-5)
        close(net.encode(x, sigma, c), logits, rtol=0, atol=0)


def test_euler_is_diffusers_ddim():
    """To the last level of its scheduler, which is sigma(0) and not 0."""
    pipe, c, empty = tiny_pipe(), texts(2), texts(1, 7)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(prompt_embeds=c, negative_prompt_embeds=empty.expand(2, -1, -1), latents=z,
                    num_inference_steps=10, guidance_scale=3.0, output_type="latent").images
    net = SDPrecond(pipe.unet, pipe.scheduler.alphas_cumprod)
    teacher = Guided(net, WithoutPrompt(net, empty), 3.0)
    times = torch.tensor([*pipe.scheduler.timesteps.tolist(), 0])
    sigmas = net.noise_levels(times / 999).tolist()
    x = z * (1 + sigmas[0] ** 2) ** 0.5                         # their z has the variance of x_vp
    with torch.no_grad():
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            x = x + (sigma_next - sigma) * (x - teacher(x, sigma, c)) / sigma
    x = x / (1 + sigmas[-1] ** 2) ** 0.5
    close(x, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("full", [False, True])
def test_update_is_eq_4(full):
    """Sample by sample from the scores, with h'' by autograd of h."""
    d = distiller(tiny_net(), h="sba", lam=2.0, norm="batch", ess=0.0, clip=50.0, full=full)
    G, fake, teacher, again = map(copy.deepcopy, (d.G, d.fake, d.teacher, d.generator))
    b = d.sample_batch()
    d.generator.set_state(again.get_state())
    d.step()
    terms, weights = [], []
    for i in range(4):
        z, sigma, c = b.z[i:i + 1], b.sigma[i:i + 1], b.c[i:i + 1]
        x = G(2.5 * z, 2.5, c)
        x_t = (x + sigma * b.noise[i:i + 1]).detach()
        with torch.no_grad():
            D_fake, logits = fake(x_t, sigma, c, return_logits=True)
            s_fake, s_real = ((D - x_t) / sigma ** 2 for D in (D_fake, teacher(x_t, sigma, c)))
        r = (-logits.mean().double()).exp().requires_grad_()
        first, = torch.autograd.grad(d.h.h(r), r, create_graph=True)
        second, = torch.autograd.grad(first, r)
        w_t = sigma * (sigma ** 2 + 1).sqrt()
        terms.append(torch.autograd.grad(x, trained(G), w_t * (s_fake - s_real)))
        weights.append((second * r).item())
    assert max(weights) > 1.001 * min(weights)
    got = [p.grad for p in trained(d.G)]
    assert len(got) == len(terms[0]) and all(g is not None for g in got)
    expected = [sum(w * t[i] for w, t in zip(weights, terms)) / (sum(weights) * x.numel())
                for i in range(len(got))]
    # a bias before a norm has gradient 0: what is left of it is rounding of the others' size
    rounding = 1e-6 * max(e.abs().max().item() for e in expected)
    for g, e in zip(got, expected):
        close(g, e, rtol=5e-3, atol=1e-4 * e.abs().max().item() + rounding)


@pytest.mark.parametrize("full", [False, True])
def test_student_begins_as_the_teacher_which_stays_as_it_was(full):
    net, c, x = tiny_net(), texts(2), torch.ones(2, 4, 8, 8)
    before = copy.deepcopy(dict(net.named_parameters()))
    d = distiller(net, away=0.0, full=full, lr_g=1e-2, lr_f=1e-2)
    start = copy.deepcopy(d.G.state_dict())
    with torch.no_grad():
        for student in (d.G, d.fake, d.ema):
            assert torch.equal(student(x, 2.5, c), net(x, 2.5, c))
    for k, v in d.ema.state_dict().items():
        assert torch.equal(v, start[k])
    for _ in range(5):
        d.step()
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    frozen = {p.data_ptr() for p in net.parameters()}
    for student in (d.G, d.fake, d.ema):                # adapters share the teacher's weights
        shared = [p.data_ptr() in frozen for p in student.parameters()]
        assert sum(shared) == (0 if full else len(frozen))


MEAN, STD = torch.tensor([0.6, -0.6]), torch.tensor([0.5, 1.0])       # of each prompt's latents


def gaussians(k, generator):
    """Return latents (n, 4, 4, 4) for the prompts' numbers k (n,)."""
    z = torch.randn(len(k), 4, 4, 4, generator=generator)
    return MEAN[k].view(-1, 1, 1, 1) + STD[k].view(-1, 1, 1, 1) * z


def toy_teacher(c, steps=500):
    """Return a network trained on the two prompts' Gaussians. Groups of one channel, as a network
    so narrow would have, can't pass on a latent's mean."""
    net = tiny_net(norm_num_groups=4, sample_size=4).requires_grad_(True)
    opt = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=True)
    generator, k = torch.Generator().manual_seed(1), torch.arange(32) % 2
    for i in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * min(1, (i + 1) / 50) * (1 - i / steps)
        x0 = gaussians(k, generator)
        sigma = net.noise_levels(0.75 * torch.rand(32, generator=generator)).view(-1, 1, 1, 1)
        D_x = net(x0 + sigma * torch.randn(x0.shape, generator=generator), sigma, c[k])
        opt.zero_grad()
        ((D_x - x0).square() * (1 + sigma ** -2)).mean().backward()
        opt.step()
    return Guided(net, WithoutPrompt(net, texts(1, 7, 4)), 1.0)


def solved(d):
    """Return whether each prompt's images have its mean and, to a fifth, its standard deviation."""
    c = d.prompts.repeat_interleave(256, 0)
    x = sd_distill.sample(d.ema, c, (4, 4, 4), (2.5, 0.0), d.cfg).view(2, -1)
    return bool(((x.mean(1) - MEAN).abs() < 0.1).all() and ((x.std(1) / STD - 1).abs() < 0.2).all())


def test_student_finds_each_prompts_gaussian():
    c, k = texts(2, 5, 4), torch.arange(400) % 2
    inputs = dict(prompts=c, captions=c[k],
                  latents=gaussians(k, torch.Generator().manual_seed(3)))
    cfg = Config(**OURS | dict(batch=32, rank=8, lr_g=1e-3, lr_f=2e-3, wait_kimg=0.5, t_min=0.1,
                               t_max=0.7, p_mean=0.0, ema_kimg=0.5, norm="batch", ess=0.5))
    d = SD(cfg, toy_teacher(c), inputs)
    assert not solved(d)                                # the teacher's one step is not the answer
    for _ in range(110):
        d.step()
    assert solved(d)


# ------------------------------------------------------------------------------------------- runs

def checkpoint(out="run"):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def test_run_stopped_and_resumed_is_the_same_run(command, folder, monkeypatch, capsys):
    photos = ("--data", folder / "photos")
    assert command(*photos, out="whole") == 0
    assert Path("whole/grid_000000024.png").exists()
    step = SD.step

    def interrupted(self):
        step(self)
        if self.seen == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SD, "step", interrupted)
    assert command(*photos) == 128 + signal.SIGTERM
    monkeypatch.setattr(SD, "step", step)
    _, script, *argv = shlex.split(capsys.readouterr().out.split("to go on: ")[1])
    assert checkpoint()["seen"] == 8 and Path(script).samefile(SCRIPT)
    assert sd_distill.main(argv) == 0                   # what it printed, from the same folder
    whole, resumed = checkpoint("whole"), checkpoint()
    assert whole["seen"] == resumed["seen"] == 24
    for net in ("G", "fake", "ema"):
        assert all(torch.equal(v, resumed[net][k]) for k, v in whole[net].items())


def test_two_processes_are_one(command):
    """Adam's first moments are gradients here, as its beta_1 is 0; the weights themselves differ by
    more than rounding where a gradient does not, since Adam divides by its size."""
    command("--kimg", 0.008)
    tiny = ["two" if word == "run" else word for word in sys.argv]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", *tiny], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = checkpoint(), checkpoint("two")
    for opt in ("opt_g", "opt_f"):
        a, b = ([m["exp_avg"] for m in state[opt]["state"].values()] for state in (one, two))
        largest = max(gradient.abs().max().item() for gradient in a)
        assert len(a) == len(b) > 50 and largest > 0
        for x, y in zip(a, b):
            close(x, y, rtol=0, atol=1e-3 * largest)


def test_sample_and_diffusers_take_the_student(folder, command):
    """The adapter is float32, and computes in diffusers' pipeline what the student does here."""
    command("--lr-g", 0.01, "--amp", "bf16")
    sd_distill.main(["sample", "run", "--prompt", "a fox", "--prompt", "the sea", "-n", "3",
                     "--device", "cpu", "--out", "grid.png"])
    assert Image.open("grid.png").size == (3 * 17 - 1, 2 * 17 - 1)
    _, pipe, student = sd_distill.load_student(Path("run/student.safetensors"), "cpu")
    for k, v in checkpoint()["ema"].items():
        assert v.dtype == torch.float32 and torch.equal(student.state_dict()[k], v)
    theirs = load_model(folder / "model")
    theirs.load_lora_weights("run", weight_name="student.safetensors")
    c, x = embed(pipe, ["a fox"]).float(), torch.randn(1, 4, 8, 8)
    sigma = student.noise_levels(torch.tensor(625 / 999))
    with torch.no_grad():
        eps = theirs.unet(x / (1 + sigma ** 2).sqrt(), 625, c).sample
        close(student(x, sigma, c), x - sigma * eps, rtol=1e-4, atol=1e-4)


def test_whole_networks_are_saved_and_loaded(command):
    command("--full", "--kimg", 0.004, "--lr-g", 1e-5, "--lr-f", 1e-5)
    _, _, student = sd_distill.load_student("run/student.safetensors", "cpu")
    for k, v in checkpoint()["ema"].items():
        assert torch.equal(student.state_dict()[k], v)


def test_inputs_are_latents_and_states(folder, command):
    """Of images and captions, or of the teacher's samples."""
    pipe = load_model(folder / "model")
    command("--kimg", 0.004, "--data", folder / "photos")
    kept = torch.load("run/inputs.pt", weights_only=True)
    for name, words in (("captions", ["photo 0", "photo 1", "photo 2"]),
                        ("prompts", ["a red fox", "a house", "the sea"])):
        close(kept[name], pipe.encode_prompt(words, "cpu", 1, False)[0].half())
    cfg, out, _ = sd_distill.parse(sys.argv[1:])
    _, teacher, _ = sd_distill.load_all(cfg, out)
    close(teacher.weak.empty.half(), pipe.encode_prompt([""], "cpu", 1, False)[0].half())
    with torch.no_grad():                               # the first photo is one colour
        x = torch.tensor([0, 100, 200]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
        posterior = pipe.vae.encode(x).latent_dist
    off = kept["latents"][:1].float() / pipe.vae.config.scaling_factor - posterior.mean
    assert 0.7 < (off / posterior.std).std() < 1.3
    command("--kimg", 0.004, out="own")
    kept = torch.load("own/inputs.pt", weights_only=True)
    assert kept["latents"].shape == (5, 4, 8, 8) and kept["latents"].float().std() > 0.1
    assert torch.equal(kept["captions"], kept["prompts"][[0, 1, 2, 0, 1]])
    Path("own/checkpoint.pt").unlink()                  # begun anew, with other options
    with pytest.raises(ValueError, match="inputs.pt: .*other prompts"):
        command("--guidance", 3, out="own")


# ---------------------------------------------------------------------- what goes wrong by accident

@pytest.mark.parametrize("files, options, said", [
    ({"prompts.txt": b" \n\n"}, [], "prompts.txt: no prompts"),
    ({"prompts.txt": b"\xff\xfe\xfa\x80"}, [], "prompts.txt: .*UTF-8"),
    ({}, ["--data", "photos"], "photos: .*no images"),
    ({"photos/0.png": b"\x89PNG"}, ["--data", "photos"], "0.txt"),
    ({"photos/0.png": b"\x89PNG", "photos/0.txt": b"a fox"}, ["--data", "photos"], "0.png"),
    ({}, ["--size", 18], "--size must be a multiple of 4"),
    ({}, ["--t-min", 0.99], "--t-min must be below"),
    ({"model.safetensors": b""}, ["--model", "model.safetensors"], "a model is a folder"),
    ({}, ["--model", "modle"], "modle: not a folder, nor could it be downloaded"),
])
def test_bad_input_is_named(command, files, options, said):
    for name, content in ({"prompts.txt": b"a fox"} | files).items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=said):
        command("--prompts", "prompts.txt", *options)


class Trap:
    """Makes the file `ran` when it is read from a pickle."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_no_pickle_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "model", "model")
    Path("model/vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    Path("model/vae/diffusion_pytorch_model.fp16.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="not Stable Diffusion 1.x.*vae"):
        load_model("model")
    assert not Path("ran").exists()


@pytest.mark.parametrize("part, changes, said", [
    ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction"), "v_prediction"),
    ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXL"),
    ("tokenizer", None, "tokenizer"),
])
def test_folder_of_another_model(folder, tmp_path, part, changes, said):
    model = shutil.copytree(folder / "model", tmp_path / "model")
    if changes:
        edit(model / part, **changes)
    else:
        shutil.rmtree(model / part)
    with pytest.raises(ValueError, match=f"{model}: not Stable Diffusion 1.x.*{said}"):
        load_model(model)


def test_student_of_another_program(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match="student.safetensors: not a student"):
        sd_distill.main(["sample", str(tmp_path), "--prompt", "a"])
