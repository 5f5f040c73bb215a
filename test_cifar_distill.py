"""cifar_distill.py: the update against Eq. (4), passes counted, runs killed and taken up again."""
import contextlib
import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import cifar_distill
import data
import edm
import fid
from cifar_distill import Config, Distiller, one_step
from data import save_images
from edm import load_teacher
from ncsnpp import CONFIGS, EDMPrecond
from test_edm import official
from test_ncsnpp import compact

HERE = Path(cifar_distill.__file__).parent
TEACHER = HERE / Config.teacher
IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 32, 32), np.uint8))
SMALL = dict(kimg=0.032, batch=8, wait_kimg=0.0, eval_every=0.016, eval_n=16, save_every=0.008,
             preview=1)
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def teacher():
    return load_teacher(TEACHER)


def distiller(teacher, images=IMAGES, labels=None, **options):
    """One whose fake network and generator have left the teacher, so that no gap is zero."""
    d = Distiller(Config(**SMALL | dict(device="cpu") | options), copy.deepcopy(teacher), images,
                  labels)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*d.fake.parameters(), *d.G.parameters()]:
            p += 0.02 * p.std().nan_to_num(0) * torch.randn(p.shape, generator=g)
    return d


def gradients(net):
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


# ------------------------------------------------------------------------------ one step, in detail

@pytest.mark.parametrize("h, lam", [("kl", 0), ("sba", 5), ("sba", -1), ("lr", 0), ("be", 0),
                                    ("ls", 0), ("hellinger", 0)])
@pytest.mark.parametrize("w_t", ["c_out", "dmd"])
def test_update_is_eq_4(teacher, h, lam, w_t):
    """Sample by sample from the scores, with h'' by autograd of h, in place of the log weight."""
    d = distiller(teacher, h=h, lam=lam, norm="batch", w_t=w_t, ess=0, clip=50)
    parts = copy.deepcopy(d).draw()
    p, (G, fake) = parts[0], (copy.deepcopy(d.G), copy.deepcopy(d.fake))
    d.step()
    terms, weights = [], []
    for i in range(len(p.z)):
        x = G(2.5 * p.z[i:i + 1], torch.tensor([2.5]))
        sigma = p.sigma[i:i + 1]
        x_t = (x + sigma * p.noise[i]).detach()
        D_fake, l = fake(x_t, sigma, return_logits=True)
        D_real = teacher(x_t, sigma)
        s_fake, s_real = ((D - x_t) / sigma ** 2 for D in (D_fake, D_real))
        r = (-l.mean().double()).exp().detach().requires_grad_()
        slope, = torch.autograd.grad(d.b.h(r), r, create_graph=True)
        second = torch.autograd.grad(slope, r)[0] if slope.requires_grad else torch.zeros(())
        scale = sigma ** 2 / (x - D_real).abs().mean() if w_t == "dmd" else (
            sigma * (sigma ** 2 + 0.25).sqrt() / 0.5)
        term = -(scale * (s_real - s_fake)).detach()            # Eq. (4), no weight
        terms.append(torch.autograd.grad(x, list(G.parameters()), term))
        weights.append((second * r).item())
    weights = np.array(weights) / np.mean(weights)
    for i, got in enumerate(gradients(d.G)):
        expected = sum(w * t[i] for w, t in zip(weights, terms)) / (len(p.z) * 3072)
        close(got, expected, rtol=2e-3, atol=1e-4 * expected.abs().max().item() + 1e-9)


def test_adversarial_update_descends_the_generators_loss(teacher):
    """w_GAN alone: with w_GAN in large numbers the update is the gradient of -log D(x_t)."""
    d = distiller(teacher, gan=1e6)
    p, G, fake = copy.deepcopy(d).draw()[0], copy.deepcopy(d.G), copy.deepcopy(d.fake)
    d.step()
    x = G(2.5 * p.z, torch.full((len(p.z),), 2.5))
    logits = fake.encode(x + p.sigma[:, None, None, None] * p.noise, p.sigma)
    loss = 1e6 * -torch.sigmoid(logits).log().mean()
    for got, expected in zip(gradients(d.G), torch.autograd.grad(loss, list(G.parameters()))):
        close(got, expected, rtol=1e-2, atol=1e-4 * expected.abs().max().item() + 1e-3)


def test_teacher_free_update_descends_along_the_classifiers_slope(teacher):
    """Eq. (37) with its sign corrected, and never a look at the teacher."""
    d = distiller(teacher, h="sba", lam=2, teacher_free=True, norm="batch", ess=0)
    p, G, fake = copy.deepcopy(d).draw()[0], copy.deepcopy(d.G), copy.deepcopy(d.fake)
    d.teacher.forward = None
    d.step()
    x = G(2.5 * p.z, torch.full((len(p.z),), 2.5))
    x_t = (x + p.sigma[:, None, None, None] * p.noise).detach().requires_grad_()
    log_r = -fake.encode(x_t, p.sigma).mean((1, 2))
    slope, = torch.autograd.grad(log_r.sum(), x_t)
    w = (2 * log_r.detach()).softmax(0)                         # h'' grad r = r^lam grad log r
    w_t = p.sigma * (p.sigma ** 2 + 0.25).sqrt() / 0.5
    upstream = (w * w_t)[:, None, None, None] * slope / 3072
    wanted = torch.autograd.grad(x, list(G.parameters()), upstream)
    for got, expected in zip(gradients(d.G), wanted):
        close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-9)


@contextlib.contextmanager
def counted(d):
    """Passes of each network through the first convolution (encoder) and the last (decoder)."""
    count, hooks = {}, []

    def add(key):
        def hook(*_):
            count[key] = count.get(key, 0) + 1
        return hook
    for name, net in (("G", d.G), ("teacher", d.teacher), ("fake", d.fake)):
        for part, layer in (("encoder", net.model.enc["32x32_conv"]),
                            ("decoder", list(net.model.dec.values())[-1])):
            hooks.append(layer.register_forward_hook(add(f"{name} {part} forward")))
            hooks.append(layer.register_full_backward_hook(add(f"{name} {part} backward")))
    with warnings.catch_warnings():                 # the image needs no gradient: that is known
        warnings.filterwarnings("ignore", message="Full backward hook")
        yield count
    for hook in hooks:
        hook.remove()


PASSES = {"G encoder forward": 1, "G decoder forward": 1, "G encoder backward": 1,
          "G decoder backward": 1, "teacher encoder forward": 1, "teacher decoder forward": 1,
          "fake encoder forward": 3, "fake decoder forward": 2, "fake encoder backward": 2,
          "fake decoder backward": 1}


@pytest.mark.parametrize("options, other", [
    ({}, {}), (dict(h="sba"), {}), (dict(norm="two-stage", batch=20), {}),
    (dict(gan=1e-3), {"fake encoder backward": 3}),
    (dict(accumulate=2), {k: 2 * v for k, v in PASSES.items()}
     | {"G encoder forward": 4, "G decoder forward": 4}),
    (dict(teacher_free=True), {"fake encoder backward": 3, "fake decoder forward": 0,
                               "fake decoder backward": 0, "teacher encoder forward": 0,
                               "teacher decoder forward": 0}),
    (dict(wait_kimg=1.0), {"G encoder backward": 0, "G decoder backward": 0,
                           "teacher encoder forward": 0, "teacher decoder forward": 0,
                           "fake encoder forward": 2, "fake decoder forward": 1})])
def test_passes_of_a_step(teacher, options, other):
    """What the docstring promises, and no pass more."""
    d = distiller(teacher, **options)
    with counted(d) as count:
        d.step()
    assert count == {k: v for k, v in (PASSES | other).items() if v}


def test_parts_of_a_batch_add_up_to_it(teacher):
    whole, parts = (distiller(teacher, h="sba", lam=5, accumulate=n) for n in (1, 4))
    whole.step()
    parts.step()
    for net in ("G", "fake"):
        for a, b in zip(gradients(getattr(whole, net)), gradients(getattr(parts, net))):
            close(a, b, rtol=1e-4, atol=1e-5)


def test_trained_head_starts_as_the_mean_and_leaves_it(teacher):
    mean, linear = distiller(teacher), distiller(teacher, head="linear")
    linear.fake.load_state_dict(mean.fake.state_dict(), strict=False)
    x, sigma = torch.randn(3, 3, 32, 32), torch.tensor([0.1, 1.0, 10.0])
    nn.init.constant_(linear.fake.head.weight, 1 / linear.fake.head.in_channels)
    nn.init.zeros_(linear.fake.head.bias)
    with torch.no_grad():
        close(linear.fake.encode(x, sigma), mean.fake.encode(x, sigma), rtol=1e-4, atol=1e-5)
        close(linear.fake(x, sigma, return_logits=True)[1], linear.fake.encode(x, sigma))
    fresh = Distiller(Config(**SMALL, device="cpu", head="linear"), copy.deepcopy(teacher), IMAGES)
    assert (fresh.fake.head.weight == 1 / fresh.fake.head.in_channels).all()
    fresh.step()
    assert (fresh.fake.head.weight != 1 / fresh.fake.head.in_channels).all()


def test_classifier_learns_at_its_noise_levels_alone(teacher):
    """Outside of them its loss is nothing, inside it is what it was, and so is the score's."""
    every, some = distiller(teacher), distiller(teacher, class_min=0.3, class_max=2)
    p, = every.draw()
    x, real = torch.randn(2, 8, 3, 32, 32)
    p.sigma_f = torch.tensor([0.01, 0.1, 0.29, 0.3, 1, 2, 2.1, 50])
    with torch.no_grad():
        (score, loss), (score_too, masked) = (
            d.fake_loss(x, real, p.sigma_f, p.noise_f) for d in (every, some))
    inside = torch.tensor([False, False, False, True, True, True, False, False])
    close(masked, loss * inside)
    close(score_too, score)


@pytest.mark.parametrize("amp, error", [("bf16", 0.5), ("fp16", 0.1)])
def test_autocast_gives_the_same_update(teacher, amp, error):
    """Up to rounding, which the score gap, a small difference, magnifies to tens of per cent with
    bf16 and a few with fp16. fp16's loss scale is out of the gradients again."""
    exact, rounded = distiller(teacher, batch=2), distiller(teacher, batch=2, amp=amp)
    p, _ = *exact.draw(), rounded.draw()            # of both, to keep them in step
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) / 2
    with torch.no_grad():
        gap, rough = (d.compare(x, p)[0] for d in (exact, rounded))
    assert 0 < (rough - gap).norm() < error * gap.norm()
    for d in (exact, rounded):
        d.step()
    for net in ("G", "fake"):
        a, b = (torch.cat([g.flatten() for g in gradients(getattr(d, net))])
                for d in (exact, rounded))
        assert torch.cosine_similarity(a, b, 0) > 1 - error / 2
        close(b.norm(), a.norm(), rtol=0.1, atol=0)


def test_generator_waits(teacher):
    cfg = Config(**SMALL | dict(wait_kimg=0.016, device="cpu"))
    d = Distiller(cfg, copy.deepcopy(teacher), IMAGES)
    start = [p.clone() for p in d.G.parameters()]
    for still in (True, True, False):
        d.step()
        assert all(torch.equal(a, b) for a, b in zip(start, d.G.parameters())) == still


def test_class_conditional_step():
    teacher = compact("compact-cond").requires_grad_(False)
    labels = torch.arange(40) % 10
    d = distiller(teacher, labels=labels, cond=True)
    p = copy.deepcopy(d).draw()[0]
    assert p.c.shape == p.c_real.shape == (8, 10)
    assert torch.equal(p.c_real.argmax(1), labels[p.index])
    d.step()
    with pytest.raises(ValueError, match="--cond"):
        Distiller(Config(**SMALL, device="cpu"), copy.deepcopy(teacher), IMAGES, labels)
    with pytest.raises(ValueError, match="no labels"):
        Distiller(Config(**SMALL, device="cpu", cond=True), copy.deepcopy(teacher), IMAGES)


@pytest.mark.parametrize("t_min, t_max", [(0.0, 0.8), (0.15, 0.8)])
def test_noise_levels_are_a_share_of_edms_grid(teacher, t_min, t_max):
    d = distiller(teacher, batch=1000, t_min=t_min, t_max=t_max)
    sigma = torch.cat([d.draw()[0].sigma for _ in range(2)])
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    u = (sigma ** (1 / 7) - low) / (high - low)
    assert (sigma[:1000].diff() > 0).all()
    close(u.sort()[0], torch.linspace(t_min, t_max, 2000), rtol=0, atol=2e-3)


# --------------------------------------------------------------------------------- the weights

def test_two_stage_is_f_distills(teacher):
    """Against its words: ratio p/q in [0.1, 20], over its bin's mean, weights over the batch's."""
    d = distiller(teacher, h="be", norm="two-stage", ess=0, batch=40)
    log_r = torch.linspace(-4, 4, 40).roll(7)
    u = np.clip(np.exp(-log_r.numpy()), 0.1, 20).reshape(10, 4)
    u = (u / u.mean(1, keepdims=True)).flatten()        # BE's weight is u itself
    close(d.weigh(log_r)[0], torch.from_numpy(u / u.mean()).float())


def test_level_takes_out_what_depends_on_the_noise_alone(teacher):
    """A classifier that is off by something at every noise level: the weights don't see it."""
    d, off = distiller(teacher, h="sba", lam=2, ess=0, batch=40), torch.linspace(3, -1, 10)
    g = torch.Generator().manual_seed(0)
    for _ in range(300):
        log_r = 0.1 * torch.randn(40, generator=g)
        w = d.weigh(log_r + off.repeat_interleave(4))[0]
        d.moves += 1
    close(d.level, off, rtol=0, atol=0.05)
    close(w, 40 * (2 * log_r).softmax(0), rtol=0.15, atol=0)


def test_weights_without_normalisation(teacher):
    d = distiller(teacher, h="sba", lam=3, norm="none", ess=0, clip=1)
    log_r = torch.tensor([-2.0, 0.1, 0.5, 3.0])
    close(d.weigh(log_r)[0], (3 * log_r.clamp(-1, 1)).exp())


# --------------------------------------------------------------------------------- when it breaks

@pytest.mark.parametrize("h", ["kl", "sba"])
@pytest.mark.parametrize("where, what", [("fake", "log_r"), ("teacher", "score_gap"),
                                         ("G", "log_r")])
def test_nan_stops_the_step_and_names_it(teacher, where, what, h):
    d = distiller(teacher, h=h)
    with torch.no_grad():
        next(getattr(d, where).parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=rf"after 0 images: {what} is nan at sigma = "):
        d.step()


def test_infinite_gradient_stops_the_step_before_the_weights_change(teacher):
    d = distiller(teacher, gan=1.0)
    compare, before = d.compare, copy.deepcopy(d.G.state_dict())
    d.compare = lambda x, p: (compare(x, p)[0], torch.full_like(x, torch.inf), compare(x, p)[2])
    with pytest.raises(FloatingPointError, match="generator's gradient is"):
        d.step()
    assert all(torch.equal(v, before[k]) for k, v in d.G.state_dict().items())


def test_averages_hold_no_graph(teacher):
    """A graph through the average would grow with every step."""
    d = distiller(teacher)
    d.step()
    assert not any(p.requires_grad for p in d.ema.parameters())


def test_exploding_weight_stops_the_step(teacher):
    d = distiller(teacher, h="sba", lam=50, norm="none", ess=0)
    d.compare = lambda x, p: (x, 0, torch.full((len(x),), 4.0))
    with pytest.raises(FloatingPointError, match="weight is"):
        d.step()


# ----------------------------------------------------------------------------------- whole runs

def command(*args):
    return [sys.executable, str(HERE / "cifar_distill.py"), *map(str, args)]


def run(*args, **kwargs):
    return subprocess.run(command(*args), capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_images(IMAGES, folder / "images.npz")
    save_images(IMAGES[:, :, :16, :16], folder / "small.npz")
    return folder


def options(files, out, **more):
    o = SMALL | dict(data=files / "images.npz", bank=files / "images.npz", h="sba", lam=5) | more
    return [f"--{k.replace('_', '-')}={v}" for k, v in o.items()] + ["--out", str(out)]


def states_equal(a, b):
    a, b = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (a, b))

    def same(x, y):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            return all(same(x[k], y[k]) for k in x if k not in ("config", "seconds"))
        if isinstance(x, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        return torch.equal(x, y) if torch.is_tensor(x) else x == y
    return same(a, b)


@pytest.fixture(scope="module")
def whole(files):
    """A run that nothing interrupts."""
    out = files / "whole"
    done = run(*options(files, out))
    assert done.returncode == 0, done.stderr
    return out


def test_smoke_preset_end_to_end(tmp_path):
    start = time.time()
    done = run("--preset", "smoke", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert time.time() - start < 120
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["images"] == 256 and result["distance"] == "FD-compact"
    assert result["teacher_seconds_per_image"] > 20 * result["seconds_per_image"]
    assert "FD-compact to the teacher's samples" in done.stdout and done.stdout.count("\n") == 1
    with open(tmp_path / "run/log.csv") as f:
        rows = list(csv.DictReader(f))
    assert [float(r["kimg"]) for r in rows] == [0, 0.128, 0.256]
    assert all(float(rows[-1][k]) > 0 for k in cifar_distill.ROW if k not in ("log_r",))
    for picture in ("samples.png", "curve.png", "grid_000000256.png"):
        assert min(Image.open(tmp_path / "run" / picture).size) > 190
    done = run("sample", tmp_path / "run/checkpoint.pt", "-n", 5, "--out", tmp_path / "s.npz")
    assert done.returncode == 0, done.stderr
    images = data.load_images(tmp_path / "s.npz")[0]
    net = edm.build(torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["ema"])
    assert torch.equal(images, one_step(net, 5))


def test_resume_is_the_same_run_bit_for_bit(files, whole):
    out = files / "halves"
    assert run(*options(files, out, kimg=0.016)).returncode == 0
    done = run(*options(files, out), "--resume")
    assert done.returncode == 0, done.stderr
    assert states_equal(whole, out)
    assert (whole / "log.csv").read_text().splitlines()[0] == ",".join(cifar_distill.ROW)


def wait_for(path, seconds=60):
    start = time.time()
    while not path.exists():
        assert time.time() - start < seconds, f"no {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_interrupted_run_goes_on(files, whole, number):
    out = files / f"signal{int(number)}"
    args = options(files, out, kimg=50)
    p = subprocess.Popen(command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "checkpoint.pt")
    p.send_signal(number)
    out_text, _ = p.communicate(timeout=60)
    seen = torch.load(out / "checkpoint.pt", weights_only=True)["seen"]
    assert seen >= 8
    if number != signal.SIGKILL:
        assert p.returncode == 128 + number
        assert "--resume" in out_text and f"stopped after {seen} images" in out_text
    target = max(seen, 32)
    assert run(*options(files, out, kimg=target / 1000), "--resume").returncode == 0
    if target == 32:
        assert states_equal(whole, out)


def test_two_processes_are_one(files):
    """The same global batch: weights, statistics and gradients as in one process. The step is
    taken by SGD-like small rates, so that Adam does not blow up rounding into its sign."""
    script = files / "step.py"
    script.write_text("""
import copy, datetime, sys, torch, torch.distributed as dist
from test_cifar_distill import TEACHER, distiller
from cifar_distill import rank, world
from edm import load_teacher
if world() > 1:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
torch.set_num_threads(1)
d = distiller(load_teacher(TEACHER), h="sba", lam=5, norm=sys.argv[2], gan=float(sys.argv[3]),
              batch=20)
d.opt_g.param_groups[0]["eps"] = d.opt_f.param_groups[0]["eps"] = 1.0
for _ in range(3):
    d.step()
if rank() == 0:
    torch.save({"G": d.G.state_dict(), "fake": d.fake.state_dict(), "sums": d.sums,
                "grads": [p.grad for p in d.G.parameters()]}, sys.argv[1])
if world() > 1:
    dist.destroy_process_group()
""")
    for norm, gan in (("level", 0), ("two-stage", 1e-3)):
        results = []
        for n in (1, 2):
            path = files / f"state{n}.pt"
            launch = [sys.executable] + (["-m", "torch.distributed.run", "--nproc_per_node=2",
                                          "--master_port=29511"] if n == 2 else [])
            done = subprocess.run([*launch, script, path, norm, str(gan)], capture_output=True,
                                  text=True, cwd=HERE, env=os.environ | {"PYTHONPATH": str(HERE)})
            assert done.returncode == 0, done.stderr
            results.append(torch.load(path, weights_only=True))
        one, two = results
        for key in ("G", "fake"):
            for name in one[key]:
                close(two[key][name], one[key][name], rtol=0, atol=1e-5)
        for a, b in zip(one["grads"], two["grads"]):
            close(b, a, rtol=1e-3, atol=1e-5)
        for name in one["sums"]:
            close(two["sums"][name], one["sums"][name], rtol=1e-4, atol=1e-5)


def test_torchrun_runs_the_command(files):
    out = files / "torchrun"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--master_port=29512", HERE / "cifar_distill.py",
                           *options(files, out, kimg=0.016)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "result.json").read_text())["processes"] == 2


def test_paper_preset_on_an_official_file(tmp_path, monkeypatch, capsys):
    """Random weights of the official shape, in the official format, a few steps at batch 2."""
    torch.manual_seed(0)
    net = EDMPrecond(**CONFIGS["uncond-vp"]).requires_grad_(False)
    (tmp_path / "edm-cifar10-32x32-uncond-vp.pkl").write_bytes(official(net))
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path))
    monkeypatch.setitem(edm.OFFICIAL, "edm-cifar10-32x32-uncond-vp", None)
    save_images(IMAGES, tmp_path / "images.npz")
    code = cifar_distill.main(["--preset", "paper", "--batch", "2", "--kimg", "0.004",
                               "--wait-kimg", "0.002", "--features", "compact", "--eval-n", "4",
                               "--preview", "1", "--device", "cpu", "--data",
                               f"{tmp_path}/images.npz", "--out", f"{tmp_path}/run"])
    assert code == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["images"] == 4 and result["config"]["lr_g"] == 1e-5
    assert "to the data" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ bad input

def test_bad_input_is_one_line(files, whole, tmp_path, monkeypatch, capsys):
    def bad(reason, *args):
        monkeypatch.setattr(sys, "argv", ["cifar_distill.py", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            data.run_main(cifar_distill.main)
        error = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and reason in error, error
    good = options(files, tmp_path / "x")
    bad("invalid choice", "--preset", "huge")
    bad("unknown h", *good, "--h", "kll")
    bad("lam", *good, "--lam", "nan")
    bad("batch", *good, "--batch", "0")
    bad("divisible", *good, "--batch", "9", "--accumulate", "2")
    bad("lr-g", *good, "--lr-g", "0")
    bad("finite", *good, "--lr-f", "inf")
    bad("norm", *good, "--norm", "layer")
    bad("two-stage", *good, "--norm", "two-stage")
    bad("t-min", *good, "--t-min", "0.9")
    bad("--compile", *good, "--compile", "--gan", "1")
    bad("no such checkpoint", *good, "--teacher", tmp_path / "none.pt")
    bad("images.npz", *good, "--teacher", files / "images.npz")
    bad("(3, 16, 16)", *good, "--data", files / "small.npz")
    bad("no such file", *good, "--data", files / "none.npz")
    bad("no device", *good, "--device", "cuda:77")
    bad("nothing to resume", *good, "--resume")
    bad("lam was 5.0, is 3.0", *options(files, whole, lam=3), "--resume")
    bad("exists", *options(files, whole))
    bad("--cond", *good, "--cond")
    bad("checkpoint of cifar_distill", "sample", TEACHER)
    (tmp_path / "file").write_text("in the way")
    bad("file", *options(files, tmp_path / "file/run"))
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "checkpoint.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:5000])
    bad("torn/checkpoint.pt", *options(files, torn), "--resume")


def test_paper_preset_without_network_names_every_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(OSError) as e:
        cifar_distill.main(["--preset", "paper", "--out", str(tmp_path / "run")])
    for name in ("edm-cifar10-32x32-uncond-vp.pkl", "cifar-10-binary.tar.gz", "pt_inception"):
        assert f"put it at {tmp_path}/{name}" in str(e.value)


def test_full_disk_leaves_the_last_checkpoint(files, whole, tmp_path, monkeypatch):
    """The write fails half-way; the checkpoint before it stays whole, and nothing else is left."""
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((whole / "checkpoint.pt").read_bytes())

    def full(obj, f):
        Path(f).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(f))
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        data.save_atomic({}, path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert path.read_bytes() == (whole / "checkpoint.pt").read_bytes()
