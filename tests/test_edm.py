"""edm.py: the sampler against an exact solution, guidance against its formula, exact resumption;
plumbing/weights.py: loading that runs no code and reads no tensor beyond its end."""
import copy
import csv
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import edm
from data import load_images, save_images
from edm import (Guided, TrainConfig, Trainer, edm_loss, few_steps, grid, heun, karras, load_guided,
                 load_teacher, sample, student_levels)
from ncsnpp import CONFIGS, EDMPrecond
from plumbing import teachers
from plumbing.weights import check_form, check_optimizer, read_weights
from test_ncsnpp import compact

HERE = Path(edm.__file__).parent
IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 32, 32), np.uint8))
TINY = dict(data="none", batch=4, warmup_kimg=0.01, save_every=0.008, preview=0, device="cpu")
close = torch.testing.assert_close


# ----------------------------------------------------------------------------- loss and sampler

class Gaussian(torch.nn.Module):
    """The exact denoiser of data N(0, s^2), with the interface of EDMPrecond."""
    label_dim, sigma_data = 0, 0.5

    def __init__(self, s):
        super().__init__()
        self.s = torch.nn.Parameter(torch.tensor(s, dtype=torch.float64))
        self.levels = []

    def forward(self, x, sigma, c=None):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        self.levels += sigma.flatten().tolist()
        return self.s ** 2 / (self.s ** 2 + sigma ** 2) * x


def test_heun_solves_the_ode_with_second_order():
    """For data N(0, s^2) the ODE scales x by s / sqrt(s^2 + 80^2); Heun's error falls as 1/n^2."""
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = 80 * 0.5 / (0.5 ** 2 + 80 ** 2) ** 0.5
    error = [abs(heun(Gaussian(0.5), z, grid(n)).item() / exact - 1) for n in (18, 36, 72, 144)]
    assert error[0] < 0.06
    assert all(3 < a / b < 5.5 for a, b in zip(error, error[1:])), error


def test_a_one_step_student_is_heun_with_one_level():
    net, z = Gaussian(0.5), torch.randn(2, 3, 4, 4, generator=torch.manual_seed(0)).double()
    close(heun(net, z, (2.5, 0.0)), few_steps(net, [z], [2.5]))
    assert net.levels == [2.5, 2.5]                         # one evaluation each


def test_sample_draws_fresh_noise_at_each_level():
    """Nor does one image's noise repeat another's; the first level's is a one-step student's."""
    class Zero(torch.nn.Linear):
        label_dim = 0

        def forward(self, x, sigma, c=None):
            seen.append(x / sigma)
            return torch.zeros_like(x)

    seen = []
    sample(Zero(1, 1), 3, levels=[2.5, 1.0, 0.5], seed=7)
    first, z = seen[0], torch.cat(seen).flatten(1)
    assert torch.corrcoef(z).fill_diagonal_(0).abs().max() < 0.1            # 3 levels of 3 images
    close(z.std(), torch.ones(()), rtol=0.05, atol=0)
    seen = []
    sample(Zero(1, 1), 3, levels=[2.5], seed=7)
    assert torch.equal(seen[0], first)


def test_a_student_of_k_steps_sees_its_own_output_under_fresh_noise():
    """For data N(0, s^2) each evaluation scales what it sees, so the variances are known."""
    levels, variance = student_levels(2.5, 4), 0.0
    assert student_levels(2.5, 1) == [2.5] and levels == [2.5, 2.5 * 9 / 16, 2.5 / 4, 2.5 / 16]
    z = torch.randn(4, 4000, 1, 1, 1, generator=torch.manual_seed(0), dtype=torch.float64)
    for k, sigma in enumerate(levels):
        variance = (0.25 / (0.25 + sigma ** 2)) ** 2 * (variance + sigma ** 2)
        x = few_steps(Gaussian(0.5), z[:k + 1], levels)
        close(x.var().item(), variance, rtol=0.08, atol=0)


def test_karras_levels():
    levels = torch.tensor(grid(18), dtype=torch.float64)
    assert len(levels) == 19 and levels[-1] == 0 and (levels.diff() < 0).all()
    close(levels[[0, 17]], torch.tensor([80, 0.002], dtype=torch.float64))
    roots = levels[:18] ** (1 / 7)                          # equal steps of the 7th root
    close(roots.diff(), (roots[1] - roots[0]).expand(17))
    t = torch.linspace(0, 1, 18)
    assert karras(t).dtype == torch.float32
    close(karras(t), levels[:18].float(), rtol=1e-4, atol=0)
    close(karras(t[[0, -1]], sigma_min=1.0, sigma_max=2.0, rho=1.0), torch.tensor([2.0, 1.0]))
    assert grid(1) == pytest.approx([80.0, 0.0])


def test_loss_of_the_exact_denoiser():
    """E[lambda (D - x0)^2] = lambda sigma^2 s^2 / (s^2 + sigma^2): 1 for s = sigma_data."""
    g = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(64, 3, 32, 32, generator=g, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    for level in (0.01, 0.5, 30):
        sigma = torch.full((64, 1, 1, 1), level, dtype=torch.float64)
        losses = edm_loss(Gaussian(0.5)(x0 + sigma * noise, sigma), x0, sigma, 0.5)
        assert losses.shape == (64,)
        close(losses.mean().item(), 1.0, rtol=0.015, atol=0)        # 196608 squared normals: 0.3 %


def test_sample_depends_on_the_seed_alone():
    net = compact()
    images = sample(net, 5, steps=3, seed=7)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    for batch in (1, 2):                                    # other batches round differently
        for how in (dict(steps=3), dict(levels=[2.5, 0.6])):
            whole, other = (sample(net, 5, seed=7, batch=n, **how) for n in (64, batch))
            assert (whole.int() - other.int()).abs().max() <= 1
    assert not torch.equal(images, sample(net, 5, steps=3, seed=8))


def test_sample_of_a_conditional_network_takes_the_labels():
    net = compact("compact-cond")
    turns, labels = sample(net, 12, steps=1), torch.arange(12) % 10
    assert torch.equal(turns, sample(net, 12, steps=1, labels=labels))
    assert not torch.equal(turns, sample(net, 12, steps=1, labels=labels * 0))
    for bad in (labels - 1, labels + 1, labels[:11], labels.float()):
        with pytest.raises(ValueError, match="labels"):
            sample(net, 12, steps=1, labels=bad)
    with pytest.raises(ValueError, match="unconditional"):
        sample(compact(), 12, steps=1, labels=labels)


# ------------------------------------------------------------------------------------- guidance

def test_guidance_against_its_formula():
    good, weak = Gaussian(0.5), Gaussian(1.0)
    x, sigma = torch.randn(4, 3, 4, 4, generator=torch.manual_seed(0)), \
        torch.tensor([0.1, 0.5, 2.0, 9.0])
    x.requires_grad_()
    D_good, D_weak = good(x, sigma), weak(x, sigma)
    guided = Guided(good, weak, 2.5, low=0.5, high=2.0)
    D_x = guided(x, sigma)
    close(D_x[1:3], (D_good + 1.5 * (D_good - D_weak))[1:3])
    assert torch.equal(D_x[[0, 3]], D_good[[0, 3]]) and not torch.equal(D_x[1:3], D_good[1:3])
    assert torch.equal(Guided(good, weak, 1.0)(x, sigma), D_good)
    assert not D_x.requires_grad and D_good.requires_grad
    close(guided(x, 0.5), D_good.new_tensor(2.5) * good(x, 0.5) - 1.5 * weak(x, 0.5))
    assert (guided.sigma_data, guided.label_dim) == (0.5, 0)


def test_the_weak_network_rests_outside_the_interval():
    good, weak, x = Gaussian(0.5), Gaussian(1.0), torch.ones(2, 3, 4, 4)
    guided = Guided(good, weak, 2.0, low=0.5, high=2.0)
    for sigma in (0.4, 2.1, torch.tensor([0.4, 2.1]), torch.tensor([[[[0.1]]], [[[0.2]]]])):
        guided(x, sigma)
    assert weak.levels == [] and len(good.levels) == 6
    guided(x, torch.tensor([0.4, 1.0]))
    assert weak.levels == pytest.approx([0.4, 1.0])


def test_a_network_guided_by_itself_without_its_label():
    net, x, c = compact("compact-cond"), torch.ones(2, 3, 32, 32), torch.eye(10)[:2]
    with torch.no_grad():
        D_good, D_weak = net(x, 0.5, c), net(x, 0.5, torch.zeros(2, 10))
    assert not torch.equal(D_good, D_weak)
    close(Guided(net, None, 3.0)(x, 0.5, c), 3 * D_good - 2 * D_weak)


def test_networks_that_do_not_go_together():
    plain, classes = compact(), compact("compact-cond")
    with pytest.raises(ValueError, match="guided by itself"):
        Guided(plain, None, 2.0)
    with pytest.raises(ValueError, match="0 classes .* one of 10"):
        Guided(plain, classes, 2.0)
    with pytest.raises(ValueError, match="between 2 and 1"):
        Guided(plain, plain, 2.0, low=2.0, high=1.0)
    Guided(classes, plain, 2.0)(torch.ones(2, 3, 32, 32), 0.5, torch.eye(10)[:2])


def test_load_guided(tmp_path):
    for name in ("compact", "compact-cond"):
        torch.save(compact(name).state_dict(), tmp_path / name)
    assert isinstance(load_guided(tmp_path / "compact", "none", 2.0), EDMPrecond)
    assert isinstance(load_guided(tmp_path / "compact"), EDMPrecond)        # none lies beside it
    guided = load_guided(tmp_path / "compact-cond", "self", 3.0, 0.1, 9.0)
    assert guided.weak is None and (guided.w, guided.low, guided.high) == (3.0, 0.1, 9.0)
    guided = load_guided(tmp_path / "compact-cond", tmp_path / "compact", 2.0)
    assert (guided.good.label_dim, guided.weak.label_dim) == (10, 0)
    with pytest.raises(ValueError, match="guided by itself"):
        load_guided(tmp_path / "compact", "self", 2.0)


# ------------------------------------------------------------------------------------- training

def test_training_learns_a_constant_image():
    images = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    trainer = Trainer(TrainConfig(**TINY | dict(lr=2e-2, lr_vectors=1e-2)), images)
    losses = [trainer.step() for _ in range(30)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def equal(a, b):
    """Whether two states are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("config, dropout", [("compact", 0.1), ("compact-cond", 0.0)])
def test_resume_is_bit_for_bit(monkeypatch, config, dropout):
    monkeypatch.setitem(edm.CONFIGS, config, CONFIGS[config] | dict(dropout=dropout))
    cond = config == "compact-cond"
    cfg = TrainConfig(**TINY, config=config, kimg=0.02, decay=0.012, label_dropout=0.5 * cond)
    labels = torch.arange(40) % 10
    straight = Trainer(cfg, IMAGES, labels)
    for _ in range(4):
        straight.step()
    first = Trainer(cfg, IMAGES, labels)
    for _ in range(2):
        first.step()
    blob = io.BytesIO()
    torch.save(first.state(), blob)
    blob.seek(0)
    torch.manual_seed(99)                                   # another process has another state
    second = Trainer(cfg, IMAGES, labels)
    second.load(torch.load(blob, weights_only=True), "blob")
    for _ in range(2):
        second.step()
    assert equal(straight.state(), second.state()) and not equal(first.state(), second.state())


def test_dropout_differs_from_step_to_step(monkeypatch):
    """Otherwise its random numbers would be bit for bit the same for the wrong reason."""
    monkeypatch.setitem(edm.CONFIGS, "compact", CONFIGS["compact"] | dict(dropout=0.5))
    trainer, masks = Trainer(TrainConfig(**TINY), IMAGES), []
    monkeypatch.setattr(edm, "check_finite", lambda *_, **__: masks.append(torch.rand(4)))
    trainer.step(), trainer.step()
    assert not torch.equal(*masks)


def test_the_rate_rises_falls_and_decays():
    cfg = TrainConfig(**TINY | dict(lr=2.0, kimg=100, warmup_kimg=10, ref_kimg=20, decay=20))
    trainer = Trainer(cfg, IMAGES)
    for kimg, rate in ((0, 0.0), (5, 1.0), (10, 2.0), (20, 2.0), (80, 1.0),
                       (90, 1 / math.sqrt(4.5)), (95, 0.5 / math.sqrt(4.75)), (100, 0.0),
                       (120, 0.0)):
        trainer.seen = 1000 * kimg
        assert 2 * trainer.rate() == pytest.approx(rate), kimg
    trainer.seen = 90_000
    trainer.step()
    assert trainer.muon.param_groups[0]["lr"] == pytest.approx(1 / math.sqrt(4.5))
    assert trainer.adam.param_groups[0]["lr"] == pytest.approx(1.5e-3 / 2 / math.sqrt(4.5))
    trainer.cfg.decay, trainer.cfg.warmup_kimg = 0.0, 0.0
    trainer.seen = 100_000
    assert trainer.rate() == pytest.approx(1 / math.sqrt(5))
    trainer.seen = 0
    assert trainer.rate() == 1.0


def test_ema_is_the_average_of_the_weights():
    trainer = Trainer(TrainConfig(**TINY | dict(ema_kimg=0.1)), IMAGES)
    name, expected = "model.map_layer0.bias", None
    for _ in range(3):
        old = trainer.ema.state_dict()[name].clone()
        trainer.step()
        beta = 0.5 ** (4 / min(100, 0.05 * trainer.seen))
        expected = beta * old + (1 - beta) * trainer.net.state_dict()[name]
        close(trainer.ema.state_dict()[name], expected)
    assert not any(p.requires_grad for p in trainer.ema.parameters())   # nor grows a graph


def test_labels_belong_to_their_images_and_are_dropped_now_and_then():
    images = (torch.arange(10, dtype=torch.uint8) * 20)[:, None, None, None].expand(10, 3, 32, 32)
    cfg = TrainConfig(**TINY | dict(batch=400, config="compact-cond", label_dropout=0.25))
    x0, _, _, c = Trainer(cfg, images, torch.arange(10)).batch()
    kept = c.sum(1) == 1
    assert torch.equal(c[kept].argmax(1), ((x0[kept, 0, 0, 0] + 1) * 127.5 / 20).round().long())
    assert (c[~kept] == 0).all() and 0.15 < 1 - kept.float().mean() < 0.35
    cfg.label_dropout = 0.0
    assert (Trainer(cfg, images, torch.arange(10)).batch()[3].sum(1) == 1).all()


def test_labels_are_checked():
    cfg, labels = TrainConfig(**TINY, config="compact-cond"), torch.arange(40)
    for bad, message in ((None, "none has no labels"), (labels, "from 0 to 39"),
                         (labels % 10 - 1, "from -1 to 8"), (labels[:5], r"\(5,\)"),
                         ((labels % 10).float(), "float32")):
        with pytest.raises(ValueError, match=message):
            Trainer(cfg, IMAGES, bad)
    assert Trainer(TrainConfig(**TINY), IMAGES, labels).batch()[3] is None


def test_init_starts_from_other_weights(tmp_path):
    net, path = compact(), str(tmp_path / "a.pt")
    torch.save(net.state_dict(), path)
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    trainer.start_from(path)
    for copied in (trainer.net, trainer.ema):
        assert equal(dict(copied.state_dict()), dict(net.state_dict()))
    with pytest.raises(ValueError, match="a.pt: not a network of the configuration compact-ve"):
        Trainer(TrainConfig(**TINY, config="compact-ve"), IMAGES).start_from(path)
    labels = torch.arange(len(IMAGES)) % 10
    cond = Trainer(TrainConfig(**TINY, config="compact-cond"), IMAGES, labels)
    cond.start_from(path)                           # which does not look at its labels yet
    x, c = torch.randn(2, *IMAGES.shape[1:], generator=torch.manual_seed(0)), torch.eye(10)[:2]
    close(cond.ema(x, 0.5, c), net(x, 0.5))


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    torch.nn.init.constant_(trainer.net.model.map_layer0.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="after 0 images.*sigma"):
        trainer.step()


def test_a_run_that_moved_to_another_kind_of_device_says_so(capsys):
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    trainer.step()
    state = trainer.state() | {"generator": torch.zeros(16, dtype=torch.uint8)}     # CUDA's size
    other = Trainer(TrainConfig(**TINY), IMAGES)
    other.load(state, "a.pt")
    expected = torch.Generator().manual_seed(0 + 4)
    assert torch.equal(other.generator.get_state(), expected.get_state())
    assert len(capsys.readouterr().err.splitlines()) == 1


# ----------------------------------------------------------------------------------- the command

def run(*args, cwd):
    return subprocess.run([sys.executable, HERE / "edm.py", *map(str, args)], cwd=cwd,
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run of four steps through the command line."""
    folder = tmp_path_factory.mktemp("run")
    save_images(IMAGES, folder / "images.npz")
    done = run("train", "--out", "run", "--data", "images.npz", "--kimg", 0.04, "--batch", 10,
               "--save-every", 0.02, "--preview", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def in_process(monkeypatch, folder, *args):
    """edm.main on a command line, in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(edm, "tune_cpu", lambda: None)      # it would stay for the other tests
    return edm.main([str(a) for a in args])


def test_command_line_trains_resumes_and_samples(teacher_run, monkeypatch, capsys):
    assert {p.name for p in (teacher_run / "run").iterdir()} == \
        {"checkpoint.pt", "teacher.pt", "log.csv", "samples.png"}
    in_process(monkeypatch, teacher_run, "train", "--out", "run", "--data", "images.npz", "--kimg",
               0.08, "--batch", 10, "--save-every", 0.02, "--preview", 0, "--decay", 0.02,
               "--resume")
    assert capsys.readouterr().out.startswith("80 images")
    rows = list(csv.DictReader((teacher_run / "run/log.csv").open()))
    assert [r["kimg"] for r in rows] == ["0", "0.02", "0.04", "0.06", "0.08"]
    assert all(float(r["loss"]) > 0 for r in rows[1:])
    small, full = (torch.load(teacher_run / "run" / name, weights_only=True)
                   for name in ("teacher.pt", "checkpoint.pt"))
    assert set(small) == {"config", "seen", "ema"} and small["seen"] == 80
    assert equal(dict(small["ema"]), dict(full["ema"]))
    in_process(monkeypatch, teacher_run, "sample", "run/checkpoint.pt", "-n", 3, "--steps", 2,
               "--guide", "run/teacher.pt", "--guide-low", 1, "--out", "a.npz")
    assert load_images(teacher_run / "a.npz")[0].shape == (3, 3, 32, 32)


def test_samples_of_classes_are_written_with_their_labels(tmp_path, monkeypatch):
    torch.save(compact("compact-cond").state_dict(), tmp_path / "a.pt")
    in_process(monkeypatch, tmp_path, "sample", "a.pt", "-n", 12, "--steps", 1, "--guide", "self",
               "--guide-high", 100, "--out", "a.npz")
    images, labels = load_images(tmp_path / "a.npz")
    assert labels.tolist() == [*range(10), 0, 1]
    guided = Guided(compact("compact-cond"), None, 2.0, 0.3, 100)
    assert (images.int() - sample(guided, 12, steps=1).int()).abs().max() <= 1


def test_a_signal_saves_and_says_how_to_go_on(teacher_run):
    process = subprocess.Popen(
        [sys.executable, HERE / "edm.py", "train", "--out", "a run", "--data", "images.npz",
         "--batch", "2", "--save-every", "0.002", "--preview", "0"], cwd=teacher_run, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (teacher_run / "a run/checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in stderr, stderr
    assert "--out 'a run'" in stdout and "--resume" in stdout
    load_teacher(teacher_run / "a run/checkpoint.pt")


def test_command_line_errors(teacher_run, monkeypatch, capsys):
    save_images(IMAGES[:, :, :16, :16], teacher_run / "small.npz")
    blob = (teacher_run / "run/checkpoint.pt").read_bytes()
    (teacher_run / "half.pt").write_bytes(blob[:50000])
    (teacher_run / "file").touch()
    (teacher_run / "other").mkdir()
    train = ("train", "--out", "other", "--data", "images.npz")
    again = ("train", "--out", "run", "--data", "images.npz")
    checkpoint = ("sample", "run/checkpoint.pt")
    for args, message in (
            (("train", "--out", "x", "--data", "nowhere"), "nowhere"),
            (("train", "--out", "x", "--data", "small.npz"), "(3, 16, 16)"),
            (("train", "--out", "file/x", "--data", "images.npz"), "file/x"),
            ((*train, "--config", "huge"), "--config"), ((*train, "--kimg", "0"), "--kimg"),
            ((*train, "--lr", "nan"), "--lr"), ((*train, "--batch", "2.5"), "--batch"),
            ((*train, "--device", "cuda:7"), "no device"), ((*train, "--amp", "int3"), "--amp"),
            ((*train, "--kimg", "1", "--decay", "2"), "--decay"),
            ((*train, "--label-dropout", "0.1"), "--label-dropout"),
            ((*train, "--config", "cond-vp"), "no labels"), ((*train, "--resume"), "other"),
            (again, "--resume"), ((*again, "--resume", "--batch", "8"), "--batch was 10, is 8"),
            (("train", "--out", "run", "--data", "small.npz", "--resume", "--batch", "10"),
             "--data was 'images.npz', is 'small.npz'"),
            ((*again, "--batch", "10", "--resume", "--init", "file"), "--init was '', is 'file'"),
            (("sample", "nowhere.pt"), "nowhere.pt"), (("sample", "half.pt"), "half.pt"),
            (("sample", "small.npz"), "small.npz"), (("sample", "file"), "file"),
            ((*checkpoint, "-n", "0"), "-n"), ((*checkpoint, "--guide", "self"), "itself"),
            ((*checkpoint, "--guide", "no.pt"), "no.pt"),
            ((*checkpoint, "-n", "1", "--steps", "1", "--out", "file/a.png"), "file")):
        with pytest.raises((ValueError, OSError, SystemExit)) as error:
            in_process(monkeypatch, teacher_run, *args)
        said = capsys.readouterr().err if error.type is SystemExit else str(error.value)
        assert message in said, (args, said)
    assert list((teacher_run / "other").iterdir()) == []
    done = run("sample", "nowhere.pt", cwd=teacher_run)
    assert done.returncode == 2 and done.stderr.startswith("edm.py: no such checkpoint: nowhere.pt")
    assert len(done.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------- loading

def official(net, **extra):
    """`net` as NVIDIA's checkpoints hold one: top level a dictionary with `ema`; each module a
    record of its class's source, name and state, tensors as torch pickles them."""
    def reconstruct(meta):
        raise AssertionError("the record's code would have run")
    modules = {name: types.ModuleType(name) for name in
               ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", \
        "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    modules["dnnlib.util"].EasyDict = EasyDict

    class Persistent:
        def __init__(self, module):
            state = {k: v for k, v in vars(module).items() if not k.startswith("_")}
            state["_parameters"] = OrderedDict(module._parameters)
            state["_buffers"] = OrderedDict(module._buffers)
            state["_modules"] = OrderedDict((k, record(m)) for k, m in module._modules.items())
            self.meta = EasyDict(type="class", version=6, module_src="raise SystemExit('ran')",
                                 class_name=type(module).__name__, state=state)

        def __reduce__(self):
            return reconstruct, (self.meta,), None

    def record(module):
        if module is None:
            return None
        if isinstance(module, torch.nn.ModuleDict):
            copy = torch.nn.ModuleDict()
            copy._modules.update((k, record(m)) for k, m in module._modules.items())
            return copy
        return Persistent(module)

    old = {k: sys.modules.get(k) for k in modules}
    sys.modules.update(modules)
    try:
        return pickle.dumps(dict(ema=record(net), loss_fn=EasyDict(P_mean=np.float64(-1.2)),
                                 augment_pipe=None, dataset_kwargs=EasyDict(path="x"), **extra))
    finally:
        for k, m in old.items():
            sys.modules.pop(k) if m is None else sys.modules.update({k: m})


@pytest.mark.parametrize("name", ["compact", "compact-ve"])
def test_official_format(tmp_path, name):
    net = compact(name)
    blob = official(net)
    assert b"torch_utils.persistence" in blob and b"_load_from_bytes" in blob
    (tmp_path / "edm.pkl").write_bytes(blob)
    loaded = load_teacher(tmp_path / "edm.pkl")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert equal(dict(loaded.state_dict()), dict(net.state_dict()))


def test_official_names_urls_and_checksums(tmp_path, monkeypatch):
    """By name, a URL and a file in the cache are asked for, with the checksum of OFFICIAL."""
    name, asked = "edm-cifar10-32x32-uncond-vp", []
    (tmp_path / "a.pkl").write_bytes(official(compact()))

    def download(url, sha256=None, apart=False):
        asked.append((url, sha256, apart))
        return tmp_path / "a.pkl"

    monkeypatch.setattr(teachers, "download", download)
    load_teacher(name)
    load_teacher(f"https://elsewhere.example/{name}.pkl")
    load_teacher("https://elsewhere.example/mine.pt")
    assert asked == [(f"https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/{name}.pkl",
                      teachers.OFFICIAL[name], False),
                     (f"https://elsewhere.example/{name}.pkl", teachers.OFFICIAL[name], False),
                     ("https://elsewhere.example/mine.pt", None, True)]
    assert teachers.OFFICIAL[name].startswith("4d5dcc1f")


def test_own_checkpoints_bare_state_dicts_and_half_precision(tmp_path, teacher_run):
    trained = torch.load(teacher_run / "run/checkpoint.pt", weights_only=True)["ema"]
    torch.save(trained, tmp_path / "bare.pt")
    torch.save({"ema": {k: v.half() for k, v in trained.items()}}, tmp_path / "half.pt")
    for path in (teacher_run / "run/checkpoint.pt", tmp_path / "bare.pt"):
        assert equal(dict(load_teacher(path).state_dict()), dict(trained))
    half = load_teacher(tmp_path / "half.pt").state_dict()
    assert equal(dict(half), {k: v.half().float() for k, v in trained.items()})


NAME = "model.enc.8x8_block0.conv1.weight"


@pytest.mark.parametrize("change, message", [
    ({NAME: torch.zeros(64, 64, 5, 5)}, rf"compact, in which {NAME} is \(64, 64, 3, 3\), not "
                                        r"\(64, 64, 5, 5\)"),
    ({NAME: torch.full((64, 64, 3, 3), torch.nan)}, f"{NAME} holds a number that is not finite"),
    ({NAME: torch.full((64, 64, 3, 3), torch.inf)}, f"{NAME} holds a number that is not finite"),
    ({NAME: torch.zeros(64, 64, 3, 3).to_sparse()}, f"{NAME} is a tensor of another kind"),
    ({NAME: torch.zeros(64, 64, 3, 3, device="meta")}, f"{NAME} is a tensor of another kind"),
    ({NAME: torch.zeros(64, 64, 3, 3, dtype=torch.int64)}, f"{NAME} is int64"),
    ({NAME: [1.0]}, f"{NAME} is of type list"),
    ({3: torch.zeros(3)}, "the name of a tensor is 3"),
    ({"model.extra": torch.zeros(3)}, "compact, in which model.extra is None"),
])
def test_weights_that_are_no_network(tmp_path, change, message):
    torch.save({"ema": compact().state_dict() | change}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt: .*{message}"):
        load_teacher(tmp_path / "a.pt")


DEFAULTS = torch._utils._rebuild_tensor_v2.__defaults__


class Bomb:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def saved(obj):
    blob = io.BytesIO()
    torch.save(obj, blob, _use_new_zipfile_serialization=False)
    return blob.getvalue()


def claiming(offset, size, stride):
    """An official checkpoint of one tensor, which says that it lies so on four stored numbers."""
    four = torch.storage.TypedStorage(wrap_storage=torch.arange(4.0).untyped_storage(),
                                      dtype=torch.float32, _internal=True)
    tensor = Bomb(torch._utils._rebuild_tensor_v2, four, offset, size, stride, False, OrderedDict())
    net = torch.nn.Module()
    net.register_buffer("a", torch.zeros(1))
    net._buffers["a"] = tensor
    return official(net)


def hostile(touch):
    """name: (file, what the refusal names); each would create the file `touch` if it ran."""
    system, evaluate = f"touch {touch}", f"open({str(touch)!r}, 'w')"
    alter = (b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__)stb.")
    return {
        "os.system": (pickle.dumps({"ema": Bomb(os.system, system)}), "system"),
        "eval": (pickle.dumps({"ema": Bomb(eval, evaluate)}), "builtins.eval"),
        "protocol 0": (pickle.dumps({"ema": Bomb(eval, evaluate)}, protocol=0), "eval"),
        "in the state": (official(compact(), extra=Bomb(os.system, system)), "system"),
        "nested": (pickle.dumps({"ema": Bomb(torch.storage._load_from_bytes,
                                             saved(Bomb(os.system, system)))}), "system"),
        "torch.save": (saved({"ema": Bomb(os.system, system)}), ""),
        "attribute": (pickle.dumps({"ema": Bomb(getattr, "x", "join")}), "builtins.getattr"),
        "alters a function": (alter, "alter"),
        "not a module": (pickle.dumps({"ema": [1, 2]}), ""),
        "beyond its storage": (claiming(0, (2 ** 30,), (1,)), r"\(1073741824,\) on 4 stored"),
        "by its stride": (claiming(0, (2, 2), (9, 1)), "on 4 stored"),
        "by its offset": (claiming(2, (3,), (1,)), "on 4 stored"),
        "before its storage": (claiming(3, (4,), (-1,)), "on 4 stored"),
        "overlapping": (claiming(0, (2 ** 20, 2 ** 20), (0, 0)), "on 4 stored"),
        "no storage": (pickle.dumps({"ema": Bomb(torch._utils._rebuild_tensor_v2, 3, 0, (1,), (1,),
                                                 False, OrderedDict())}), "without a storage"),
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_files_run_nothing(tmp_path, name):
    blob, message = hostile(tmp_path / "it ran")[name]
    (tmp_path / "bad.pkl").write_bytes(blob)
    with pytest.raises(ValueError, match=f"bad.pkl: .*{message}") as error:
        load_teacher(tmp_path / "bad.pkl")
    assert "weights_only" not in str(error.value) and "BytesIO" not in str(error.value)
    assert not (tmp_path / "it ran").exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == DEFAULTS


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    blob = io.BytesIO()
    torch.save({"ema": Bomb(os.system, f"touch {tmp_path / 'it ran'}")}, blob)
    (tmp_path / "bad.pt").write_bytes(blob.getvalue())
    with pytest.raises(ValueError, match="bad.pt: .*refused to load .*system"):
        load_teacher(tmp_path / "bad.pt")
    assert not (tmp_path / "it ran").exists()


def test_a_tensor_within_its_storage_is_read(tmp_path):
    (tmp_path / "a.pkl").write_bytes(claiming(1, (3,), (1,)))
    assert read_weights(tmp_path / "a.pkl")["a"].tolist() == [1.0, 2.0, 3.0]


def test_truncated_files(tmp_path):
    blob = official(compact())
    for size in (0, 1, 50, len(blob) // 2, len(blob) - 1):
        (tmp_path / "half.pkl").write_bytes(blob[:size])
        with pytest.raises(ValueError, match="half.pkl"):
            load_teacher(tmp_path / "half.pkl")


# ------------------------------------------------------------------------- checkpoints are checked

def test_check_form():
    expected = {"a": [torch.zeros(2), 1.0], "b": {"c": "x"}, "d": (1, None)}
    check_form(expected, copy.deepcopy(expected), "it")
    for got, message in (
            ({**expected, "a": [torch.zeros(3), 1.0]}, r"it.a.0 is float32 \(3,\), not .*\(2,\)"),
            ({**expected, "a": [torch.zeros(2).double(), 1.0]}, "it.a.0 is float64"),
            ({**expected, "a": [torch.full((2,), torch.nan), 1.0]}, "it.a.0 .*not finite"),
            ({**expected, "a": [torch.zeros(2).to_sparse(), 1.0]}, "it.a.0 is a tensor of another"),
            ({**expected, "a": [[0, 0], 1.0]}, "it.a.0 is of type list"),
            ({**expected, "a": [torch.zeros(2), 1]}, "it.a.1 is of type int, not of type float"),
            ({**expected, "a": [torch.zeros(2)]}, "it.a has length 1, not 2"),
            ({**expected, "b": {}}, "it.b lacks c"), ({**expected, "b": 3}, "it.b is of type int"),
            ({**expected, "b": {"c": "y", 7: 0}}, "it.b should not have 7"),
            ({**expected, "d": [1, None]}, "it.d is of type list, not of type tuple")):
        with pytest.raises(ValueError, match=message):
            check_form(expected, got, "it")
    check_form({"b": {}, "a": []}, expected, "it", exact=False)
    with pytest.raises(ValueError, match="it lacks e"):
        check_form({"e": {}}, expected, "it", exact=False)


def test_an_optimizer_that_does_not_fit_its_parameters_is_refused():
    """torch itself takes these; its fused kernel would then read beyond the smaller tensors."""
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    trainer.step()
    good = trainer.adam.state_dict()
    check_optimizer(trainer.adam, copy.deepcopy(good), "opt")
    partial = copy.deepcopy(good)
    del partial["state"][5]                     # a parameter that had no gradient yet
    check_optimizer(trainer.adam, partial, "opt")
    shape = good["state"][3]["exp_avg"].shape
    for place, key, value, message in (
            ("state", (3, "exp_avg"), torch.zeros(1), r"opt.state.3.exp_avg is float32 \(1,\)"),
            ("state", (3, "exp_avg_sq"), torch.zeros(shape).double(), "3.exp_avg_sq is float64"),
            ("state", (3, "exp_avg"), torch.zeros(()).expand(shape),
             "3.exp_avg is a tensor of another"),
            ("state", (3, "step"), torch.zeros(2), "opt.state.3.step"),
            ("state", (3, "step"), 1.0, "opt.state.3.step"),
            ("state", (3, "max_exp_avg_sq"), torch.zeros(1), "should not have max_exp_avg_sq"),
            ("state", (999,), {}, "opt.state.999"), ("state", (3,), {}, "opt.state.3 lacks step"),
            ("param_groups", (0, "params"), [0, 0], "opt.param_groups.0.params"),
            ("param_groups", (0, "betas"), (0.9, 9.0), "opt.param_groups.0.betas"),
            ("param_groups", (0, "amsgrad"), True, "opt.param_groups.0.amsgrad"),
            ("param_groups", (0, "lr"), torch.zeros(3), "opt.param_groups.0.lr")):
        bad = copy.deepcopy(good)
        inner = bad[place]
        for k in key[:-1]:
            inner = inner[k]
        inner[key[-1]] = value
        with pytest.raises(ValueError, match=message):
            check_optimizer(trainer.adam, bad, "opt")
    for bad in (3, {}, {"state": [], "param_groups": []}, good | {"more": 1}):
        with pytest.raises(ValueError, match="opt is not an optimizer's state"):
            check_optimizer(trainer.adam, bad, "opt")
    muon, bad = trainer.muon, copy.deepcopy(trainer.muon.state_dict())
    check_optimizer(muon, copy.deepcopy(bad), "muon")
    bad["state"][3]["momentum_buffer"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"muon.state.3.momentum_buffer is float32 \(1,\)"):
        check_optimizer(muon, bad, "muon")


def test_weights_of_layers_are_learned_as_matrices():
    """The views that Muon moves are the network's own weights, after a resume too."""
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    trainer.seen = 1000
    before = copy.deepcopy(trainer.net.state_dict())
    trainer.step()
    again = Trainer(TrainConfig(**TINY), IMAGES)
    again.load(copy.deepcopy(trainer.state()), "run")
    for t in (trainer, again):
        assert {p.ndim for p in t.matrices} == {2, 4}
        assert all(f.data_ptr() == p.data_ptr() for f, p in zip(t.flat, t.matrices))
    moved = {k for k, v in trainer.net.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k, p in trainer.net.named_parameters() if p.grad.any()} == moved
    name = "model.dec.32x32_aux_conv.weight"                    # one step of Muon: a rotation
    step = (before[name] - trainer.net.state_dict()[name]).flatten(1)
    values = torch.linalg.svdvals(step / trainer.muon.param_groups[0]["lr"])
    assert 0.6 < values.min() and values.max() < 1.3


def test_a_broken_checkpoint_is_not_resumed(teacher_run, monkeypatch):
    state = torch.load(teacher_run / "run/checkpoint.pt", weights_only=True)
    (teacher_run / "broken").mkdir()
    path = teacher_run / "broken/checkpoint.pt"
    bias = "model.map_layer0.bias"
    for change, message in (({"seen": "many"}, "seen"), ({"rows": [3]}, "rows"),
                            ({"rows": [{"kimg": "a", "seconds": 1.0}]}, "rows"),
                            ({"net": {}}, "net lacks"), ({"adam": {}}, "adam"),
                            ({"ema": state["ema"] | {bias: torch.zeros(3)}}, f"ema.{bias}"),
                            ({"config": 3}, "no run"), ({"extra": 3}, "extra")):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=f"broken/checkpoint.pt: .*{message}"):
            in_process(monkeypatch, teacher_run, "train", "--out", "broken", "--data",
                       "images.npz", "--batch", 10, "--resume")
