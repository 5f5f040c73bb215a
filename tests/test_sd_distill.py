"""sd_distill.py on tiny random networks: diffusers' own pipeline, Eq. (4), a problem with a known
answer, runs killed and taken up again, adapters that others load. Nothing is downloaded."""
import copy
import json
import os
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"                      # before diffusers reads it
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors import safe_open                       # noqa: E402
from safetensors.torch import save_file                 # noqa: E402

import sd_distill                                       # noqa: E402
from edm import Guided                                  # noqa: E402
from plumbing.latents import embed, load_model          # noqa: E402
from sd_distill import SD, Config, SDPrecond, WithoutPrompt     # noqa: E402

HERE = Path(sd_distill.__file__).parent
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
    """A whole pipeline, whose tokenizer knows the alphabet."""
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
    from PIL import Image
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
    """-> a function that runs the script's command in this process, with tiny settings."""
    def run(*more, data=False, out="run"):
        tiny = dict(prompts=folder / "prompts.txt", model=folder / "model", size=16, bank=5,
                    steps=2, kimg=0.024, batch=4, rank=4, wait_kimg=0, eval_every=0.012, preview=1,
                    save_every=0.008, device="cpu", amp="no", out=out)
        if data:
            tiny["data"] = folder / "photos"
        argv = [a for k, v in tiny.items() for a in ("--" + k.replace("_", "-"), str(v))]
        monkeypatch.setattr(sys, "argv", ["sd_distill.py", *argv, *map(str, more)])
        return sd_distill.main(sys.argv[1:])
    monkeypatch.chdir(tmp_path)
    return run


def distiller(net, n=12, seed=1, **options):
    """A Distiller whose student and fake network have left the teacher."""
    generator = torch.Generator().manual_seed(seed)
    inputs = dict(prompts=texts(3), captions=texts(n, 6), empty=texts(1, 7),
                  latents=torch.randn(n, 4, 8, 8, generator=generator))
    teacher = Guided(net, WithoutPrompt(net, inputs["empty"]), options.get("w", 1.75))
    d = SD(Config(**OURS | options), teacher, inputs)
    with torch.no_grad():
        for p in [*trained(d.fake), *trained(d.G)]:
            p += 0.03 * torch.randn(p.shape, generator=generator)
    return d


# --------------------------------------------------------------------------------- the denoiser

def test_noise_levels_are_stable_diffusions():
    net, abar = tiny_net(), diffusers.DDIMScheduler(**DDIM).alphas_cumprod
    times = torch.tensor([0, 1, 625, 998, 999])
    sigma = net.levels(times / 999)
    close(sigma, ((1 - abar[times]) / abar[times]).sqrt(), rtol=1e-4, atol=0)
    close(sigma[[0, 2, 4]], torch.tensor([0.0292, 2.50, 14.61]), rtol=2e-3, atol=0)
    seen = []
    net.unet.time_proj.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    between = net.levels(torch.tensor([625.5 / 999]))
    for s in (*sigma, between, torch.tensor(1e-3), torch.tensor(50.0)):
        net.encode(torch.zeros(1, 4, 8, 8), s, texts(1))
    close(torch.cat(seen), torch.tensor([0, 1, 625, 998, 999, 625.5, 0, 999]), rtol=0, atol=5e-3)


@pytest.mark.parametrize("size", [8, 12])
def test_denoiser_is_diffusers_own_network(size):
    net, c = tiny_net(), texts(3)
    x = 3 * torch.randn(3, 4, size, size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3.0, 400.0, 990.0])
    sigma = net.levels(t / 999)[:, None, None, None]
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


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_euler_is_diffusers_ddim(w):
    """To the last level of its scheduler, which is sigma(0) and not 0."""
    pipe, c, empty = tiny_pipe(), texts(2), texts(1, 7)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(prompt_embeds=c, negative_prompt_embeds=empty.expand(2, -1, -1), latents=z,
                    num_inference_steps=10, guidance_scale=w, output_type="latent").images
    net = SDPrecond(pipe.unet, pipe.scheduler.alphas_cumprod)
    teacher = Guided(net, WithoutPrompt(net, empty), w)
    times = torch.tensor([*pipe.scheduler.timesteps.tolist(), 0])
    assert len(times) == 11
    sigmas = net.levels(times / 999).tolist()
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
    """Sample by sample from the scores, with h'' by autograd of h; the networks that it is held
    against are whole copies, without checkpointing."""
    net = tiny_net()
    d = distiller(net, h="sba", lam=2.0, norm="batch", ess=0.0, clip=50.0, full=full,
                  gradient_checkpointing=checkpointing)
    G, fake, teacher, again = map(copy.deepcopy, (d.G, d.fake, d.teacher, d.generator))
    for alone in (G, fake):
        alone.unet.disable_gradient_checkpointing()
    b = d.draw()
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
        slope, = torch.autograd.grad(d.h.h(r), r, create_graph=True)
        second, = torch.autograd.grad(slope, r)
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
    net, c = tiny_net(), texts(2)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    d = SD(Config(**OURS), Guided(net, WithoutPrompt(net, texts(1)), 1.75),
           dict(prompts=c, captions=c, latents=x))
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
    """Prompts' numbers k (n,) -> latents (n, 4, 4, 4)."""
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
        sigma = net.levels(0.75 * torch.rand(32, generator=generator)).view(-1, 1, 1, 1)
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
    """-> for each prompt, how far the mean is off, and by what share the standard deviation."""
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
    compare = d.compare

    def turned(x_t, b):
        gap, slope, log_r = compare(x_t, b)
        return -gap, slope, log_r

    d.compare = turned
    for _ in range(40):
        d.step()
    errors = toy_errors(d)
    assert not solved(errors)
    assert max(mean for mean, _ in errors) > 1          # it has run away


# --------------------------------------------------------------------------------------- runs

def checkpoint(out="run"):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def weights(state):
    return [v for net in ("G", "fake", "ema") for v in state[net].values()]


def test_run_stopped_and_resumed_is_the_same_run(command, monkeypatch, capsys):
    assert command(data=True, out="whole") == 0
    assert "24 images: whole/student.safetensors" in capsys.readouterr().out
    for name in ("grid_000000000.png", "grid_000000024.png", "student.safetensors", "log.csv"):
        assert (Path("whole") / name).stat().st_size > 0
    step = SD.step

    def interrupted(self):
        step(self)
        if self.seen == 8:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(SD, "step", interrupted)
    assert command(data=True) == 128 + signal.SIGTERM
    monkeypatch.setattr(SD, "step", step)
    said = capsys.readouterr().out
    assert "stopped after 8 images" in said and said.rstrip().endswith("--resume")
    assert checkpoint()["seen"] == 8
    kept = Path("run/inputs.pt").stat()
    assert command("--resume", data=True) == 0
    assert Path("run/inputs.pt").stat().st_mtime_ns == kept.st_mtime_ns      # not computed again
    a, b = checkpoint("whole"), checkpoint()
    assert a["seen"] == b["seen"] == 24
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))
    assert any(row["variance"] > 0 for row in b["rows"])


def test_inputs_are_latents_and_states(folder, command):
    """Of images and captions, or of the teacher's samples."""
    pipe = load_model(str(folder / "model"))
    command("--kimg", 0.004, data=True)
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


def test_sample_and_diffusers_take_the_student(folder, command, capsys):
    """The adapter computes in diffusers' pipeline what the student computes here."""
    from PIL import Image
    command("--lr-g", 0.01)
    sd_distill.main(["sample", "run", "--prompt", "a fox", "--prompt", "the sea", "-n", "3",
                     "--device", "cpu", "--out", "grid.png"])
    assert "6 images, one evaluation each: grid.png" in capsys.readouterr().out
    assert Image.open("grid.png").size == (3 * 17 - 1, 2 * 17 - 1)
    _, pipe, student = sd_distill.load_student(Path("run/student.safetensors"), "cpu", "")
    assert torch.equal(torch.stack([v.sum() for v in student.state_dict().values()]),
                       torch.stack([v.sum() for v in checkpoint()["ema"].values()]))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder / "model")
    c, x = embed(pipe, ["a fox"]).float(), torch.randn(1, 4, 8, 8)
    sigma = student.levels(torch.tensor(625 / 999))
    with torch.no_grad():
        before = x - sigma * theirs.unet(x / (1 + sigma ** 2).sqrt(), 625, c).sample
        theirs.load_lora_weights("run", weight_name="student.safetensors")
        after = x - sigma * theirs.unet(x / (1 + sigma ** 2).sqrt(), 625, c).sample
        close(student(x, sigma, c), after, rtol=1e-4, atol=1e-4)
    assert (before - after).abs().max() > 1e-2


def test_whole_networks(command, capsys):
    command("--full", "--kimg", 0.004, "--lr-g", 1e-5, "--lr-f", 1e-5)
    sd_distill.main(["sample", "run", "--prompt", "a fox", "--device", "cpu", "--out", "grid.png"])
    assert Path("grid.png").exists()
    state = checkpoint()
    assert all("lora_" not in k for k in state["G"])


def test_two_processes_are_one(folder, command, tmp_path):
    command("--kimg", 0.008)
    tiny = sys.argv[1:]
    tiny[tiny.index("run")] = "two"
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--standalone", str(HERE / "sd_distill.py"), *tiny],
                          env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for a, b in zip(weights(checkpoint()), weights(checkpoint("two")), strict=True):
        close(a, b, rtol=1e-3, atol=3e-5)


def test_collapse_stops_the_run():
    noise = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    assert abs(sd_distill.neighbours(noise)) < 0.05 and sd_distill.neighbours(smooth) > 0.6
    for variance, own, teachers in ((1.0, 0.7, 0.8), (0.2, 0.9, 0.8), (1.0, 0.0, 0.01)):
        sd_distill.check_collapse(8, variance, own, teachers)
    for variance, own, teachers in ((1.0, 0.01, 0.8), (5.0, 0.8, 0.8)):
        with pytest.raises(FloatingPointError, match="after 8 images the student collapsed"):
            sd_distill.check_collapse(8, variance, own, teachers)


# ---------------------------------------------------------------------------------- bad input

def edited(folder, tmp_path, part, **changes):
    """A copy of the model with another entry in a part's configuration."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    file = model / part
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return model


@pytest.mark.parametrize("part, changes, said", [
    ("scheduler/scheduler_config.json", dict(prediction_type="v_prediction"), "v_prediction"),
    ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXL"),
    ("model_index.json", dict(tokenizer=[None, None]), "tokenizer"),
    ("vae/config.json", dict(latent_channels=16), ""),
])
def test_model_that_is_none(folder, command, tmp_path, part, changes, said):
    model = edited(folder, tmp_path, part, **changes)
    with pytest.raises(ValueError, match=f"{model}: not Stable Diffusion 1.x.*{said}"):
        command("--model", model)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler",
                                  "unet/diffusion_pytorch_model.safetensors", "model_index.json"])
def test_model_with_a_part_missing(folder, command, tmp_path, part):
    model = edited(folder, tmp_path, "model_index.json")
    gone = model / part
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    with pytest.raises(ValueError, match=f"{model}: not Stable Diffusion 1.x.*{part[-10:]}"):
        command("--model", model)


def test_model_that_is_nowhere(command):
    with pytest.raises(ValueError, match="no/such: not a folder, nor .* downloaded into /"):
        command("--model", "no/such")


def test_prompts_and_captions(folder, command, tmp_path):
    empty, photos = tmp_path / "empty.txt", tmp_path / "photos"
    empty.write_text(" \n\n")
    with pytest.raises(ValueError, match="empty.txt: no prompts"):
        command("--prompts", empty)
    with pytest.raises(OSError, match="nowhere.txt"):
        command("--prompts", "nowhere.txt")
    empty.write_bytes(b"\xff\xfe\xfa\x80")
    with pytest.raises(ValueError, match="empty.txt: not a text in UTF-8"):
        command("--prompts", empty)
    with pytest.raises(OSError, match="no such folder: nowhere"):
        command("--data", "nowhere")
    photos.mkdir()
    with pytest.raises(ValueError, match="photos: no images with captions"):
        command("--data", photos)
    shutil.copy(folder / "photos" / "0.png", photos)
    with pytest.raises(ValueError, match="0.png has no caption, .*0.txt"):
        command("--data", photos)
    for name in ("0.txt", "alone.txt"):
        (photos / name).write_text("a fox")
    with pytest.raises(ValueError, match="alone.txt has no image"):
        command("--data", photos)
    (photos / "alone.txt").unlink()
    (photos / "0.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="0.png: not a usable image"):
        command("--data", photos)


def test_options(command):
    for said, options in {"--size must be a multiple of 4, not 18": ["--size", 18],
                          "--amp fp16 needs an NVIDIA GPU": ["--amp", "fp16"],
                          "--t-min must be below": ["--t-min", 0.99]}.items():
        with pytest.raises(ValueError, match=said):
            command(*options)


def test_resumed_with_something_else(folder, command, tmp_path):
    assert command("--kimg", 0.004) == 0
    with pytest.raises(FileExistsError, match="add --resume"):
        command("--kimg", 0.004)
    with pytest.raises(ValueError, match="--rank was 4, is 8"):
        command("--resume", "--rank", 8)
    state, other = checkpoint(), tmp_path / "other.txt"
    state["config"]["rank"] = 8                         # its adapters are of rank 4
    torch.save(state, "run/checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt: state.G\.\S*lora_A\S* is .* not"):
        command("--resume", "--rank", 8)
    other.write_text("another prompt")
    state["config"] |= dict(rank=4, prompts=str(other))
    torch.save(state, "run/checkpoint.pt")
    with pytest.raises(ValueError, match="inputs.pt: .*made of other prompts"):
        command("--resume", "--prompts", other)


def test_student_that_is_none(command):
    command("--kimg", 0.004)
    file = Path("run/student.safetensors")
    sample = ["sample", "run", "--prompt", "a fox", "--device", "cpu"]
    with safe_open(file, "pt") as f:
        tensors, cfg = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])
    metadata = {"config": json.dumps(cfg | {"rank": 8})}
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match="student.safetensors.*lora_A"):
        sd_distill.main(sample)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="student.safetensors: not a student"):
        sd_distill.main(sample)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="student.safetensors: not a student"):
        sd_distill.main(sample)
    file.unlink()
    with pytest.raises(ValueError, match="student.safetensors: .*No such file"):
        sd_distill.main(sample)


def test_without_diffusers_it_says_what_to_install():
    code = ("import sys; sys.modules['diffusers'] = None; import sd_distill;"
            "from plumbing.run import run_main; run_main(sd_distill.main)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "pip install -r requirements-sd.txt" in done.stderr
