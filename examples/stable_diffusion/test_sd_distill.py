"""sd_distill.py on tiny random networks: diffusers' own pipeline, Eq. (4), a problem with a known
answer, runs stopped and taken up again, adapters that others load. Nothing is downloaded."""
import copy
import json
import os
import re
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
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from PIL import Image                                   # noqa: E402
from safetensors.torch import save_file                 # noqa: E402

import latents                                          # noqa: E402
import sd_distill                                       # noqa: E402
from edm import Guided                                  # noqa: E402
from latents import embed, load_model                   # noqa: E402
from sd_distill import SD, Config, SDPrecond, WithoutPrompt     # noqa: E402

torch.set_num_threads(1)        # on a busy machine two that wait for each other are much slower
SCRIPT = Path(sd_distill.__file__)
DDIM = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",      # SD 1.5's own
            clip_sample=False, set_alpha_to_one=False, steps_offset=1)
OURS = dict(device="cpu", amp="no", batch=4, rank=4, wait_kimg=0.0)
close = torch.testing.assert_close


def trained(net):
    return [p for p in net.parameters() if p.requires_grad]


def tiny_unet(seed=0, **how):
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(**dict(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")) | how).eval()


def tiny_net(seed=0, **how):
    abar = diffusers.DDIMScheduler(**DDIM).alphas_cumprod
    return SDPrecond(tiny_unet(seed, **how), abar).requires_grad_(False)


def texts(n, seed=5, tokens=77):
    return torch.randn(n, tokens, 32, generator=torch.Generator().manual_seed(seed))


def tiny_pipe():
    """Return a whole pipeline, whose tokenizer knows the alphabet."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[32, 64], latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2)
    names = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase,
             *(letter + "</w>" for letter in string.ascii_lowercase)]
    tokenizer = transformers.CLIPTokenizer({name: i for i, name in enumerate(names)}, [],
                                           model_max_length=77)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(names), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=0, eos_token_id=1)).eval()
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=encoder, tokenizer=tokenizer, unet=tiny_unet(),
        scheduler=diffusers.DDIMScheduler(**DDIM), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, prompts, and images with captions, as a user has them."""
    place = tmp_path_factory.mktemp("sd")
    tiny_pipe().save_pretrained(place / "model")
    (place / "prompts.txt").write_text("a red fox\n\n a house \nthe sea\n")
    (place / "photos").mkdir()
    for i, size in enumerate([(20, 16), (16, 40), (17, 17)]):
        Image.new("RGB", size, (80 * i, 100, 200)).save(place / "photos" / f"{i}.png")
        (place / "photos" / f"{i}.txt").write_text(f"photo {i}\n")
    return place


@pytest.fixture
def command(folder, monkeypatch, tmp_path):
    """A function that runs the script's command in this process, with tiny settings."""
    def run(*more, out="run"):
        tiny = dict(prompts=folder / "prompts.txt", model=folder / "model", size=16, steps=2,
                    teacher_samples=5, kimg=0.024, batch=4, rank=4, wait_kimg=0, eval_every=0.012,
                    preview=1, save_every=0.008, device="cpu", amp="no", out=out)
        argv = [a for k, v in tiny.items() for a in ("--" + k.replace("_", "-"), str(v))]
        monkeypatch.setattr(sys, "argv", [os.path.relpath(SCRIPT), *argv, *map(str, more)])
        return sd_distill.main(sys.argv[1:])
    monkeypatch.chdir(tmp_path)
    return run


def distiller(net, away=0.03, **options):
    """Return a Distiller whose student and fake network have left the teacher."""
    generator = torch.Generator().manual_seed(1)
    inputs = dict(prompts=texts(3), captions=texts(12, 6), empty=texts(1, 7),
                  latents=torch.randn(12, 4, 8, 8, generator=generator))
    d = SD(Config(**OURS | options), Guided(net, WithoutPrompt(net, inputs["empty"]), 1.75), inputs)
    with torch.no_grad():
        for p in [*trained(d.fake), *trained(d.G)]:
            p += away * torch.randn(p.shape, generator=generator)
    return d


# --------------------------------------------------------------------------------- the denoiser

def test_noise_levels_are_stable_diffusions():
    net, abar = tiny_net(), diffusers.DDIMScheduler(**DDIM).alphas_cumprod
    times = torch.tensor([0, 1, 625, 998, 999])
    sigma = net.noise_levels(times / 999)
    close(sigma, ((1 - abar[times]) / abar[times]).sqrt(), rtol=1e-4, atol=0)
    close(sigma[[0, 2, 4]], torch.tensor([0.0292, 2.50, 14.61]), rtol=2e-3, atol=0)
    seen = []
    net.unet.time_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    between = net.noise_levels(torch.tensor([625.5 / 999]))
    for s in (*sigma, between, torch.tensor(1e-3), torch.tensor(50.0)):
        net.encode(torch.zeros(1, 4, 8, 8), s, texts(1))
    close(torch.cat(seen), torch.tensor([0, 1, 625, 998, 999, 625.5, 0, 999]), rtol=0, atol=5e-3)


@pytest.mark.parametrize("size", [8, 12])
def test_denoiser_is_diffusers_own_network(size):
    net, c = tiny_net(), texts(3)
    x = 3 * torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3.0, 400.0, 990.0])
    sigma = net.noise_levels(t / 999)[:, None, None, None]
    middle = []
    hook = net.unet.mid_block.register_forward_hook(lambda module, args, out: middle.append(out))
    with torch.no_grad():
        eps = net.unet(x / (1 + sigma ** 2).sqrt(), t, c).sample
        hook.remove()
        D_x, logits = net(x, sigma, c, return_logits=True)
        close(D_x, x - sigma * eps, rtol=1e-4, atol=1e-3)
        close(logits, middle[0].mean(1), rtol=1e-4, atol=1e-5)
        close(net.encode(x, sigma, c), logits, rtol=0, atol=0)
    assert logits.shape == (3, size // 2, size // 2)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_euler_is_diffusers_ddim(guidance):
    """To the last level of its scheduler, which is sigma(0) and not 0."""
    pipe, c, empty = tiny_pipe(), texts(2), texts(1, 7)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(prompt_embeds=c, negative_prompt_embeds=empty.expand(2, -1, -1), latents=z,
                    num_inference_steps=10, guidance_scale=guidance, output_type="latent").images
    net = SDPrecond(pipe.unet, pipe.scheduler.alphas_cumprod)
    teacher = Guided(net, WithoutPrompt(net, empty), guidance)
    times = torch.tensor([*pipe.scheduler.timesteps.tolist(), 0])
    assert len(times) == 11
    sigmas = net.noise_levels(times / 999).tolist()
    x = z * (1 + sigmas[0] ** 2) ** 0.5                         # their z has the variance of x_vp
    with torch.no_grad():
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
            x = x + (sigma_next - sigma) * (x - teacher(x, sigma, c)) / sigma
    x = x / (1 + sigmas[-1] ** 2) ** 0.5
    close(x, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (expected - z).abs().max() > 0.1


# ------------------------------------------------------------------------------ one step, in detail

@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_update_is_eq_4(full, checkpointing):
    """Sample by sample from the scores, with h'' by autograd of h; the networks that it is compared
    with are whole copies, without checkpointing."""
    d = distiller(tiny_net(), h="sba", lam=2.0, norm="batch", ess=0.0, clip=50.0, full=full,
                  gradient_checkpointing=checkpointing)
    G, fake, teacher, again = map(copy.deepcopy, (d.G, d.fake, d.teacher, d.generator))
    for alone in (G, fake):
        alone.unet.disable_gradient_checkpointing()
    b = d.sample_batch()
    d.generator.set_state(again.get_state())
    calls = []
    d.G.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *_: calls.append(1))
    d.step()
    assert len(calls) == 1 + checkpointing
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


def test_fake_networks_loss_is_the_same_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        d = distiller(tiny_net(), gradient_checkpointing=checkpointing, gan=0.1)
        d.step()
        gradients.append([p.grad for net in (d.fake, d.G) for p in trained(net)])
    for a, b in zip(*gradients):
        close(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("full", [False, True])
def test_teacher_is_untouched(full):
    net = tiny_net()
    before = copy.deepcopy(dict(net.named_parameters()))
    d = distiller(net, full=full, lr_g=1e-2, lr_f=1e-2)
    start, ema = copy.deepcopy(d.G.state_dict()), copy.deepcopy(d.ema.state_dict())
    for _ in range(20):
        d.step()
    assert len(before) == len(dict(net.named_parameters())) > 100
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    for now, then in ((d.G.state_dict(), start), (d.ema.state_dict(), ema)):
        assert any(not torch.equal(now[k], then[k]) for k in then)
    frozen = {p.data_ptr() for p in net.parameters()}
    for student in (d.G, d.fake, d.ema):
        shared = [p.data_ptr() in frozen for p in student.parameters()]
        assert sum(shared) == (0 if full else len(frozen))
    saved = d.state()["G"]
    assert len(saved) == len(trained(d.G))
    assert all("lora_" in k for k in saved) != full


def test_networks_begin_as_the_teacher():
    net, c, x = tiny_net(), texts(2), torch.ones(2, 4, 8, 8)
    d = distiller(net, away=0.0)
    with torch.no_grad():
        for student in (d.G, d.fake, d.ema):
            assert torch.equal(student(x, 2.5, c), net(x, 2.5, c))
    for k, v in d.G.state_dict().items():
        assert torch.equal(v, d.ema.state_dict()[k])


def test_bf16_keeps_adapters_and_losses_in_float32():
    net = tiny_net()
    net.unet.to(torch.bfloat16)
    d = distiller(net, amp="bf16")
    losses, fake_loss = [], d.fake_loss
    d.fake_loss = lambda *args: losses.append(fake_loss(*args)) or losses[-1]
    d.step()
    assert losses[0].dtype == torch.float32 and losses[0].isfinite()
    assert {p.dtype for p in trained(d.G)} == {torch.float32}
    assert next(d.G.unet.conv_in.parameters()).dtype == torch.bfloat16


# ---------------------------------------------------------------------- a problem with an answer

MEAN, STD = torch.tensor([0.6, -0.6]), torch.tensor([0.5, 1.0])       # of each prompt's latents


def gaussians(k, generator):
    """Return latents (n, 4, 4, 4) for the prompts' numbers k (n,)."""
    z = torch.randn(len(k), 4, 4, 4, generator=generator)
    return MEAN[k].view(-1, 1, 1, 1) + STD[k].view(-1, 1, 1, 1) * z


@pytest.fixture(scope="module")
def toy_teacher():
    """Trained on the two prompts' Gaussians. Groups of one channel, as a network so narrow would
    have, can't pass on a latent's mean."""
    net, c, steps = tiny_net(norm_num_groups=4, sample_size=4), texts(2, 5, 4), 500
    net.requires_grad_(True)
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
    return net.requires_grad_(False), c


def toy_distiller(net, c):
    generator, k = torch.Generator().manual_seed(3), torch.arange(400) % 2
    inputs = dict(prompts=c, captions=c[k], latents=gaussians(k, generator))
    cfg = Config(**OURS | dict(batch=32, rank=8, lr_g=1e-3, lr_f=2e-3, wait_kimg=0.5, t_min=0.1,
                               t_max=0.7, p_mean=0.0, ema_kimg=0.5, norm="batch", ess=0.5))
    return SD(cfg, Guided(net, WithoutPrompt(net, texts(1, 7, 4)), 1.0), inputs)


def toy_errors(d):
    """Return for each prompt how far the mean is off, and by what share the standard deviation."""
    errors = []
    for k in range(2):
        x = sd_distill.sample(d.ema, d.prompts[k:k + 1].repeat(256, 1, 1), (4, 4, 4), (2.5, 0.0),
                              d.cfg)
        errors.append((abs(x.mean() - MEAN[k]).item(), abs(x.std() / STD[k] - 1).item()))
    return errors


def solved(errors):
    return all(mean < 0.1 and std < 0.2 for mean, std in errors)


def test_student_finds_each_prompts_gaussian(toy_teacher):
    d = toy_distiller(*toy_teacher)
    assert not solved(toy_errors(d))                    # the teacher's one step is not the answer
    for _ in range(110):
        d.step()
    errors = toy_errors(d)
    assert solved(errors), errors


def test_student_does_not_with_the_update_turned_round(toy_teacher):
    d = toy_distiller(*toy_teacher)
    scores_and_ratio = d.scores_and_ratio

    def turned(x_t, b):
        scores, log_r = scores_and_ratio(x_t, b)
        return -scores, log_r

    d.scores_and_ratio = turned
    for _ in range(40):
        d.step()
    errors = toy_errors(d)
    assert not solved(errors)
    assert max(mean for mean, _ in errors) > 1          # it has run away


# ------------------------------------------------------------------------------------------- runs

def checkpoint(out="run"):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def weights(state):
    return [v for net in ("G", "fake", "ema") for v in state[net].values()]


def test_run_stopped_and_resumed_is_the_same_run(command, folder, monkeypatch, capsys):
    photos = ("--data", folder / "photos")
    assert command(*photos, out="whole") == 0
    out, err = capsys.readouterr()
    assert "24 images: whole/student.safetensors" in out
    assert re.search("^12 images: variance .*, neighbours .*, log_r .*, ess .*loss", out, re.M)
    for name in ("grid_000000000.png", "grid_000000024.png", "student.safetensors", "log.csv"):
        assert (Path("whole") / name).stat().st_size > 0
    step = SD.step

    def interrupted(self):
        step(self)
        if self.seen == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SD, "step", interrupted)
    assert command(*photos) == 128 + signal.SIGTERM
    monkeypatch.setattr(SD, "step", step)
    python, script, *argv = shlex.split(capsys.readouterr().out.split("to go on: ")[1])
    assert checkpoint()["seen"] == 8
    kept = Path("run/inputs.pt").stat()
    assert python == "python" and Path(script).samefile(SCRIPT) and argv[-1] == "--resume"
    assert sd_distill.main(argv) == 0                   # what it printed, from the same folder
    assert Path("run/inputs.pt").stat().st_mtime_ns == kept.st_mtime_ns      # not computed again
    a, b = checkpoint("whole"), checkpoint()
    assert a["seen"] == b["seen"] == 24
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
    assert any(row["variance"] > 0 for row in b["rows"])


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


def test_sample_and_diffusers_take_the_student(folder, command, capsys):
    """The adapter computes in diffusers' pipeline what the student computes here."""
    command("--lr-g", 0.01)
    sd_distill.main(["sample", "run", "--prompt", "a fox", "--prompt", "the sea", "-n", "3",
                     "--device", "cpu", "--out", "grid.png"])
    assert "6 images, one evaluation each: grid.png" in capsys.readouterr().out
    assert Image.open("grid.png").size == (3 * 17 - 1, 2 * 17 - 1)
    _, pipe, student = sd_distill.load_student(Path("run/student.safetensors"), "cpu")
    for k, v in checkpoint()["ema"].items():
        assert torch.equal(student.state_dict()[k], v)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model")
    c, x = embed(pipe, ["a fox"]).float(), torch.randn(1, 4, 8, 8)
    sigma = student.noise_levels(torch.tensor(625 / 999))
    with torch.no_grad():
        before = x - sigma * theirs.unet(x / (1 + sigma ** 2).sqrt(), 625, c).sample
        theirs.load_lora_weights("run", weight_name="student.safetensors")
        after = x - sigma * theirs.unet(x / (1 + sigma ** 2).sqrt(), 625, c).sample
        close(student(x, sigma, c), after, rtol=1e-4, atol=1e-4)
    assert (before - after).abs().max() > 1e-2


def test_whole_networks(command):
    command("--full", "--kimg", 0.004, "--lr-g", 1e-5, "--lr-f", 1e-5, "--fake-updates", 2)
    sd_distill.main(["sample", "run", "--prompt", "a fox", "--device", "cpu", "--out", "grid.png"])
    assert Path("grid.png").exists()
    assert all("lora_" not in k for k in checkpoint()["G"])


def test_collapse_stops_the_run():
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    assert abs(latents.neighbours(noise)) < 0.05 and latents.neighbours(smooth) > 0.6
    for variance, own, teachers in ((1.0, 0.7, 0.8), (0.2, 0.9, 0.8), (1.0, 0.0, 0.01)):
        latents.check_collapse(8, variance, own, teachers)
    for variance, own, teachers in ((1.0, 0.01, 0.8), (5.0, 0.8, 0.8)):
        with pytest.raises(FloatingPointError, match="after 8 images the student collapsed"):
            latents.check_collapse(8, variance, own, teachers)


# ----------------------------------------------------------------------- prompts, captions, images

def test_inputs_are_latents_and_states(folder, command):
    """Of images and captions, or of the teacher's samples."""
    pipe = load_model(str(folder / "model"))
    command("--kimg", 0.004, "--data", folder / "photos")
    kept = torch.load("run/inputs.pt", weights_only=True)
    close(kept["captions"], embed(pipe, [f"photo {i}" for i in range(3)]))
    close(kept["prompts"], embed(pipe, ["a red fox", "a house", "the sea"]))
    close(kept["empty"], embed(pipe, [""]))
    assert kept["latents"].shape == (3, 4, 8, 8) and kept["prompts"].shape == (3, 77, 32)
    with torch.no_grad():                               # the first photo is one colour
        x = torch.tensor([0, 100, 200]).view(1, 3, 1, 1).expand(1, 3, 16, 16) / 127.5 - 1
        posterior = pipe.vae.encode(x).latent_dist
    off = kept["latents"][:1].float() / pipe.vae.config.scaling_factor - posterior.mean
    assert 0.7 < (off / posterior.std).std() < 1.3
    command("--kimg", 0.004, out="own")
    kept = torch.load("own/inputs.pt", weights_only=True)
    assert kept["latents"].shape == (5, 4, 8, 8) and kept["latents"].float().std() > 0.1
    assert torch.equal(kept["captions"], kept["prompts"][[0, 1, 2, 0, 1]])


def test_images_are_read_as_a_person_sees_them(folder, tmp_path):
    """16-bit grey by its high byte, a transparent image on white, a phone's photo upright."""
    pipe, grey = load_model(str(folder / "model")), torch.arange(256, dtype=torch.uint8)
    plain = Image.fromarray(grey.view(16, 16).numpy())

    def latent(image, name, **how):
        image.save(tmp_path / name, **how)
        return latents.encode(pipe, tmp_path / name, 16, torch.Generator().manual_seed(0))

    expected = latent(plain, "plain.png")
    deep = Image.fromarray((grey.view(16, 16).int() * 256 + 77).to(torch.uint16).numpy())
    assert deep.mode == "I;16"
    assert torch.equal(latent(deep, "deep.png"), expected)
    lying = Image.Exif()
    lying[0x0112] = 6                                   # to be turned by 90 degrees to the right
    assert torch.equal(latent(plain.rotate(90), "phone.png", exif=lying), expected)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert torch.equal(latent(clear, "clear.png"),
                       latent(Image.new("RGB", (16, 16), "white"), "white.png"))
    assert not torch.equal(latent(plain.rotate(90), "turned.png"), expected)


def test_prompts_and_captions(folder, command, tmp_path):
    prompts, photos = tmp_path / "prompts.txt", tmp_path / "photos"
    prompts.write_text(" \n\n")
    with pytest.raises(ValueError, match="prompts.txt: no prompts"):
        command("--prompts", prompts)
    prompts.write_bytes(b"\xff\xfe\xfa\x80")
    with pytest.raises(ValueError, match="prompts.txt: not a text in UTF-8"):
        command("--prompts", prompts)
    with pytest.raises(OSError, match="no such folder: .*photos"):
        command("--data", photos)
    photos.mkdir()
    with pytest.raises(ValueError, match="photos: no images with captions"):
        command("--data", photos)
    (photos / "0.txt").write_text("a fox")
    with pytest.raises(ValueError, match="0.txt has no image"):
        command("--data", photos)
    for name in ("0.png", "1.png"):
        (photos / name).write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="1.png has no caption, .*1.txt"):
        command("--data", photos)
    (photos / "1.png").unlink()
    with pytest.raises((ValueError, OSError), match="0.png"):
        command("--data", photos)


# ------------------------------------------------------------------------------------- the model

def same_weights(pipe, original, stored=torch.float32):
    """The weights are float32, and those of the original after a rounding to `stored`."""
    for part in ("unet", "vae", "text_encoder"):
        state = getattr(pipe, part).state_dict()
        for k, v in getattr(original, part).state_dict().items():
            assert state[k].dtype == torch.float32
            assert torch.equal(state[k], v.to(stored).float())


def test_model_in_a_single_file(folder, tmp_path, monkeypatch):
    """Its settings and tokenizer are Hugging Face's, of the cache; without them the command that
    the message has makes a folder, where they can be had. UNet and VAE have diffusers' names here,
    so that its translation of Stable Diffusion's own is left out."""
    monkeypatch.setattr("diffusers.loaders.single_file_model._should_convert_state_dict_to_"
                        "diffusers", lambda *_: False)
    pipe, cache = tiny_pipe(), tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    clip = {f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
            for k, v in pipe.text_encoder.state_dict().items()}
    state = pipe.unet.state_dict() | pipe.vae.state_dict() | clip
    save_file({k: v.half() for k, v in state.items()}, "model.safetensors")
    with pytest.raises(ValueError, match=f"model.safetensors has weights .* {cache}") as e:
        load_model("model.safetensors")
    with pytest.raises(ValueError, match=f"not a file or folder, nor .* {cache}"):
        load_model(latents.NAME)
    place = cache / f"models--{latents.NAME.replace('/', '--')}"
    shutil.copytree(folder / "model", place / "snapshots" / "1")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("1")
    same_weights(load_model("model.safetensors"), pipe, torch.float16)
    python, option, code = shlex.split(re.search('python -c ".*?"', str(e.value))[0])
    exec(code)
    same_weights(load_model("model"), pipe, torch.float16)
    same_weights(load_model(latents.NAME), pipe)


def test_files_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latents, "snapshot_download", lambda *_, **__: "settings")
    Path("model.ckpt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match="model.ckpt: .* must be a .safetensors"):
        load_model("model.ckpt")
    Path("lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match="lfs.safetensors: not Stable Diffusion .*git lfs pull"):
        load_model("lfs.safetensors")


def edited(folder, tmp_path, part, **changes):
    """Return a copy of the model with other entries in a part's configuration."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    file = model / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return model


def test_model_of_variant_fp16(tmp_path):
    pipe = tiny_pipe()
    pipe.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    same_weights(load_model(tmp_path / "half"), pipe)


def test_model_that_names_a_safety_checker_it_comes_without(folder, tmp_path):
    model = edited(folder, tmp_path, "model_index.json",
                   safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
                   feature_extractor=["transformers", "CLIPImageProcessor"],
                   image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    same_weights(load_model(model), tiny_pipe())


@pytest.mark.parametrize("part, changes, said", [
    ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction"), "v_prediction"),
    ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXL"),
    ("vae/config.json", dict(latent_channels=16), ""),
    ("tokenizer", None, "tokenizer"), ("unet/diffusion_pytorch_model.safetensors", None, "unet"),
])
def test_folder_that_is_no_model(folder, tmp_path, part, changes, said):
    model = edited(folder, tmp_path, part if changes else "model_index.json", **changes or {})
    if not changes:
        (model / part).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"{model}: not Stable Diffusion 1.x.*{said}"):
        load_model(model)


# ------------------------------------------------------------------------------- options and files

def test_options(command):
    for said, options in {"--size must be a multiple of 4, not 18": ["--size", 18],
                          "--amp fp16 needs an NVIDIA GPU": ["--amp", "fp16"],
                          "--t-min must be below": ["--t-min", 0.99]}.items():
        with pytest.raises(ValueError, match=said):
            command(*options)


def test_resumed_with_other_prompts(folder, command):
    shutil.copy(folder / "prompts.txt", "prompts.txt")
    tiny = ("--kimg", 0.004, "--prompts", "prompts.txt")
    assert command(*tiny) == 0
    Path("prompts.txt").write_text("another prompt")
    with pytest.raises(ValueError, match="inputs.pt: .*made of other prompts"):
        command("--resume", *tiny)


def test_student_that_is_none(command):
    command("--kimg", 0.004)
    file, sample = Path("run/student.safetensors"), ["sample", "run", "--prompt", "a"]
    metadata = {"config": json.dumps(checkpoint()["config"] | dict(rank=8))}
    save_file(checkpoint()["ema"], file, metadata)
    with pytest.raises(ValueError, match="student.safetensors: not a student .*lora_A"):
        sd_distill.main(sample)
    save_file({"a": torch.zeros(1)}, file)              # an adapter of another program's
    with pytest.raises(ValueError, match="student.safetensors: not a student"):
        sd_distill.main(sample)


def test_without_diffusers_it_says_what_to_install(tmp_path):
    code = ("import sys; sys.modules['diffusers'] = None; import sd_distill;"
            "sd_distill.run_main(sd_distill.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env=dict(os.environ, PYTHONPATH=str(SCRIPT.parent)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    requirements = done.stderr.split("pip install -r ")[1].strip()
    assert (tmp_path / requirements).samefile(SCRIPT.parent / "requirements.txt")
