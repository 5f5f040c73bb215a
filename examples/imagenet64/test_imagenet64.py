"""ADM against recorded outputs of the reference implementation, and Algorithm 1 on a tiny one."""
import copy
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import distill                                                          # noqa: E402
import ncsnpp                                                           # noqa: E402
from cifar_distill import Config, Distiller                             # noqa: E402
from data import save_images                                            # noqa: E402
from edm import load_teacher, sample                                    # noqa: E402
from adm import CONFIGS, ADMPrecond, configuration                      # noqa: E402
from test_ncsnpp import FIXTURE, fill, inputs                           # noqa: E402

torch.set_num_threads(1)
TINY = dict(resolution=8, label_dim=3, model_channels=8, channel_mult=[1, 2], num_blocks=1,
            attn_resolutions=[4], dropout=0.0)
close = torch.testing.assert_close


# ----------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("name", ["small32_adm_cond", "small32_adm_uncond", "imagenet64_adm_cond"])
def test_reference(name):
    case = FIXTURE[name]
    config = case["kwargs"] | {k: case[k] for k in ("resolution", "channels", "label_dim")}
    del config["model_type"]
    with torch.device("cpu" if "D_mean" in case else "meta"):           # or shapes alone
        net = ADMPrecond(**config)
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == case["tensors"]
    assert sum(p.numel() for p in net.parameters()) == case["params"]
    if name == "imagenet64_adm_cond":
        assert CONFIGS["imagenet64-adm"] | dict(channels=3) == config
    del config["dropout"]                                               # which leaves no tensors
    assert configuration(net.state_dict()) == dict(augment_dim=0) | config
    if "D_mean" in case:
        x, sigma = inputs()
        c = torch.eye(net.label_dim)[case["labels"]] if net.label_dim else None
        with torch.no_grad():
            D_x = fill(net)(x, sigma, c)
        close(D_x[:, :, ::8, ::8], torch.tensor(case["D_every8"]), rtol=0, atol=2e-4)
        close(D_x.mean((1, 2, 3)), torch.tensor(case["D_mean"]), rtol=0, atol=2e-4)
        close(D_x.std((1, 2, 3)), torch.tensor(case["D_std"]), rtol=0, atol=2e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_gradients_and_checkpointing(checkpointing):
    """One pass for image and logits equals two, encode() leaves the decoder alone, and gradients
    reach every parameter."""
    net, x, sigma, c = fill(ADMPrecond(**TINY)), *inputs(size=8), torch.eye(3)
    net.gradient_checkpointing, seen = checkpointing, []
    D_x, logits = net(x, sigma, c, return_logits=True)
    for name, module in net.named_modules():
        if isinstance(module, ncsnpp.Conv2d):
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    close(net.encode(x, sigma, c), logits, rtol=0, atol=0)
    assert seen and logits.shape == (3, 4, 4) and all(".enc." in name for name in seen)
    close(net(x, sigma, c), D_x, rtol=0, atol=0)
    (D_x.square().sum() + logits.square().sum()).backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert net(x, sigma, c[[1, 2, 0]]).ne(D_x).any((1, 2, 3)).all()


def test_bf16():
    net, (x, sigma), c = fill(ADMPrecond(**TINY)), inputs(size=8), torch.eye(3)
    reference = net(x, sigma, c)
    with torch.autocast("cpu", torch.bfloat16):
        D_x, logits = net(x, sigma, c, return_logits=True)
    assert D_x.dtype == logits.dtype == torch.float32
    assert (D_x - reference).std() < 0.05 * reference.std()


# ---------------------------------------------------------------------------------- distilling it

def teacher():
    """A tiny network of random weights: its update is as exact as a trained one's."""
    return fill(ADMPrecond(**TINY)).requires_grad_(False)


def pictures(n=60):
    """uint8 images of three classes, which differ in colour."""
    images = torch.randint(0, 60, (n, 3, 8, 8), generator=torch.manual_seed(0))
    labels = torch.arange(n) % 3
    images[torch.arange(n), labels] += 180
    return images.to(torch.uint8), labels


def test_update_is_eq_4_and_line_13():
    """Image by image, from the scores and the ratio: with LR, h''(r) r = 1 / (1 + r) = sigmoid(l)
    of the classifier's logit l, and the adversarial loss is -log sigmoid(l)."""
    cfg = Config(h="lr", batch=8, wait_kimg=0.0, norm="batch", clip=50.0, ess=0.0, gan=0.3,
                 sigma_init=80.0, device="cpu")
    d = Distiller(cfg, teacher(), *pictures())
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():               # the fake score and the generator have left the teacher
        for p in [*d.fake.parameters(), *d.G.parameters()]:
            p += 0.05 * torch.randn(p.shape, generator=g) * p.abs().mean()
    state, G, fake = d.generator.get_state(), copy.deepcopy(d.G), copy.deepcopy(d.fake)
    b = d.sample_batch()
    d.generator.set_state(state)
    d.step()

    params, terms, pushes, weights = list(G.parameters()), [], [], []
    for i in range(8):
        sigma, c = b.sigma[i:i + 1], b.c[i:i + 1]
        x = G(80 * b.z[i:i + 1], 80.0, c)
        x_t = (x + sigma * b.noise[i]).detach().requires_grad_()
        D_fake, logits = fake(x_t, sigma, c, return_logits=True)
        D_real = d.teacher(x_t, sigma, c)
        s_fake, s_real = ((D - x_t) / sigma ** 2 for D in (D_fake, D_real))
        w_t = sigma * (sigma ** 2 + 0.25).sqrt() / 0.5          # sigma^2 / c_out
        push, = torch.autograd.grad(-logits.mean().sigmoid().log(), x_t)
        terms.append(torch.autograd.grad(x, params, (w_t * (s_fake - s_real)).detach(),
                                         retain_graph=True))
        pushes.append(torch.autograd.grad(x, params, push))
        weights.append(logits.mean().sigmoid().item())
    mean = sum(weights) / 8
    for j, p in enumerate(d.G.parameters()):
        expected = sum(w / mean * t[j] / x.numel() + 0.3 * u[j]
                       for w, t, u in zip(weights, terms, pushes)) / 8
        size = max(g.abs().max() for g in (q.grad for q in d.G.parameters()))
        close(p.grad, expected, rtol=0, atol=2e-4 * size.item())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny teacher, images with labels, and a run of 20 steps by the command."""
    folder = tmp_path_factory.mktemp("imagenet")
    torch.save(teacher().state_dict(), folder / "teacher.pt")
    save_images(pictures()[0], folder / "images.zip", pictures()[1])
    assert distill.main(options(folder, "run", 20)) == 0
    return folder


def options(folder, out, steps, **more):
    """The command's options for a small run."""
    how = dict(teacher=folder / "teacher.pt", data=folder / "images.zip", reference=folder /
               "images.zip", out=folder / out, kimg=0.02 * steps, batch=20, lr_g=1e-3, lr_f=1e-3,
               features="compact", eval_n=12, preview=6, device="cpu", amp="no") | more
    return [word for k, v in how.items() for word in ("--" + k.replace("_", "-"), str(v))]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_run_from_start_to_end(files):
    state = checkpoint(files / "run")
    first, last = state["rows"]
    assert last["kimg"] == 0.4 and last["to_data"] != first["to_data"] and state["updates"] == 20
    steps = {int(v["step"]) for v in state["opt_f"]["state"].values()}
    assert steps == {80}                                        # four of the fake score for one
    student = load_teacher(files / "run/student.pt")            # recognised by its tensors
    assert isinstance(student, ADMPrecond) and student.sigma_init == 80
    assert not torch.equal(student.model.out_conv.weight, teacher().model.out_conv.weight)
    images = sample(student, 6, seed=1)
    assert images.shape == (6, 3, 8, 8) and images.float().std() > 1


@pytest.mark.parametrize("more, message", [
    (dict(reference="imagenet-64x64.npz"), "fetch it from https://nvlabs"),
    (dict(teacher="broken.pt"), "broken.pt: model.out_conv.bias is missing")])
def test_bad_input(files, monkeypatch, more, message):
    monkeypatch.chdir(files)
    state = teacher().state_dict()
    del state["model.out_conv.bias"]
    torch.save(state, "broken.pt")
    with pytest.raises((ValueError, OSError), match=message):
        distill.main(options(files, "bad", 4, **more))
