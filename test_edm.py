"""edm.py: the sampler against an exact solution, exact resumption, loading that runs no code."""
import csv
import io
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
from edm import TrainConfig, Trainer, edm_loss, heun, karras_grid, load_teacher, sample
from ncsnpp import CONFIGS, EDMPrecond
from test_ncsnpp import compact, fill

HERE = Path(edm.__file__).parent
IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 32, 32), np.uint8))
TINY = dict(data="none", batch=4, warmup_kimg=0.01, save_every=0.008, preview=0)
close = torch.testing.assert_close


# ----------------------------------------------------------------------------- loss and sampler

class Gaussian(torch.nn.Module):
    """The exact denoiser of data N(0, s^2), with the interface of EDMPrecond."""
    label_dim = 0

    def __init__(self, s):
        super().__init__()
        self.s = torch.nn.Parameter(torch.tensor(s, dtype=torch.float64))

    def forward(self, x, sigma, labels=None):
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1, 1)
        return self.s ** 2 / (self.s ** 2 + sigma ** 2) * x


def test_heun_solves_the_ode_with_second_order():
    """For data N(0, s^2) the ODE scales x by s / sqrt(s^2 + 80^2); Heun's error falls as 1/n^2."""
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    exact = 80 * 0.5 / (0.5 ** 2 + 80 ** 2) ** 0.5
    error = [abs(heun(Gaussian(0.5), z, steps).item() / exact - 1) for steps in (18, 36, 72, 144)]
    assert error[0] < 0.06
    assert all(3 < a / b < 5.5 for a, b in zip(error, error[1:])), error


def test_karras_grid():
    grid = karras_grid(18)
    assert len(grid) == 19 and grid[-1] == 0 and (grid.diff() < 0).all()
    close(grid[[0, 17]], torch.tensor([80, 0.002], dtype=torch.float64))
    close((grid[:18] ** (1 / 7)).diff(), (grid[1] ** (1 / 7) - grid[0] ** (1 / 7)).expand(17))


def test_loss_of_the_exact_denoiser():
    """E[lambda (D - x0)^2] = lambda sigma^2 s^2 / (s^2 + sigma^2): 1 for s = sigma_data."""
    g = torch.Generator().manual_seed(0)
    x0 = 0.5 * torch.randn(64, 3, 32, 32, generator=g, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=g, dtype=torch.float64)
    for sigma in (0.01, 0.5, 30):
        losses = edm_loss(Gaussian(0.5), x0, torch.full((64,), sigma, dtype=torch.float64), noise)
        close(losses.mean().item(), 1.0, rtol=0.015, atol=0)        # 196608 squared normals: 0.3 %


def test_sample_depends_on_the_seed_alone():
    net = compact()
    images = sample(net, 5, steps=3, seed=7)
    assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, sample(net, 5, steps=3, seed=7))
    for batch in (1, 2, 3):                                 # other batches round differently
        other = sample(net, 5, steps=3, seed=7, batch=batch)
        assert (images.int() - other.int()).abs().max() <= 1
    assert (images.int() - sample(net, 8, steps=3, seed=7)[:5].int()).abs().max() <= 1
    assert not torch.equal(images, sample(net, 5, steps=3, seed=8))


def test_sample_of_a_conditional_network_takes_the_labels():
    net = fill(EDMPrecond(**CONFIGS["compact"] | dict(label_dim=10)))
    turns = sample(net, 3, steps=2)
    assert torch.equal(turns, sample(net, 3, steps=2, labels=torch.arange(3)))
    assert not torch.equal(turns, sample(net, 3, steps=2, labels=torch.zeros(3, dtype=torch.int64)))


# ------------------------------------------------------------------------------------- training

def test_training_learns_a_constant_image():
    images = torch.full((4, 3, 32, 32), 200, dtype=torch.uint8)
    trainer = Trainer(TrainConfig(**TINY | dict(batch=8, lr=3e-3)), images)
    losses = [trainer.step() for _ in range(40)]
    assert np.mean(losses[-15:]) < 0.75 * np.mean(losses[:5])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_resume_is_bit_for_bit(monkeypatch, dropout):
    monkeypatch.setitem(edm.CONFIGS, "compact", CONFIGS["compact"] | dict(dropout=dropout))
    whole = Trainer(TrainConfig(**TINY), IMAGES)
    for _ in range(4):
        whole.step()
    first = Trainer(TrainConfig(**TINY), IMAGES)
    for _ in range(2):
        first.step()
    blob = io.BytesIO()
    torch.save(first.state(), blob)
    blob.seek(0)
    torch.manual_seed(99)                                   # another process has another state
    second = Trainer(TrainConfig(**TINY), IMAGES)
    second.load(torch.load(blob, weights_only=True))
    for _ in range(2):
        second.step()
    a, b = whole.state(), second.state()
    for part in ("net", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    assert a["seen"] == b["seen"] and a["loss"] == b["loss"]


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


def test_init_starts_from_other_weights(tmp_path):
    net = compact()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    trainer = Trainer(TrainConfig(**TINY, init=str(tmp_path / "a.pt")), IMAGES)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in trainer.ema.state_dict().items())
    with pytest.raises(ValueError, match="a.pt: not a network of the configuration compact-ve"):
        Trainer(TrainConfig(**TINY, init=str(tmp_path / "a.pt"), config="compact-ve"), IMAGES)


def run(*args, cwd, **kwargs):
    return subprocess.run([sys.executable, HERE / "edm.py", *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory):
    """A run of four steps through the command line."""
    folder = tmp_path_factory.mktemp("run")
    save_images(IMAGES, folder / "images.npz")
    done = run("train", "--out", "run", "--data", "images.npz", "--kimg", 0.04, "--batch", 10,
               "--save-every", 0.02, "--preview", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_command_line_trains_resumes_and_samples(teacher_run, tmp_path):
    assert {p.name for p in (teacher_run / "run").iterdir()} == \
        {"checkpoint.pt", "teacher.pt", "log.csv", "samples.png"}
    rows = list(csv.DictReader((teacher_run / "run/log.csv").open()))
    assert [r["kimg"] for r in rows] == ["0.02", "0.04"] and float(rows[1]["loss"]) > 0
    done = run("train", "--out", "run", "--data", "images.npz", "--kimg", 0.08, "--batch", 10,
               "--save-every", 0.02, "--preview", 2, "--resume", cwd=teacher_run)
    assert done.returncode == 0 and done.stdout.startswith("80 images"), done.stderr
    done = run("sample", "run/checkpoint.pt", "-n", 3, "--steps", 2, "--out", "a.npz",
               cwd=teacher_run)
    assert done.returncode == 0 and load_images(teacher_run / "a.npz")[0].shape == (3, 3, 32, 32)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(teacher_run, number):
    out = f"signal{number}"
    process = subprocess.Popen(
        [sys.executable, HERE / "edm.py", "train", "--out", out, "--data", "images.npz", "--batch",
         "2", "--save-every", "0.002", "--preview", "0"], cwd=teacher_run, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (teacher_run / out / "checkpoint.pt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in stderr, stderr
    assert "--resume" in stdout
    load_teacher(teacher_run / out / "checkpoint.pt")


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    torch.nn.init.constant_(trainer.net.model.map_layer0.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="after 0 images.*sigma"):
        trainer.step()


def test_command_line_errors(teacher_run):
    save_images(IMAGES[:, :, :16, :16], teacher_run / "small.npz")
    np.savez(teacher_run / "weights.npz", a=np.zeros(3))
    (teacher_run / "half.pt").write_bytes((teacher_run / "run/checkpoint.pt").read_bytes()[:50000])
    (teacher_run / "file").touch()
    train = ("train", "--out", "other", "--data", "images.npz")
    again = ("train", "--out", "run", "--data", "images.npz")
    for args, message in (
            (("train", "--out", "x", "--data", "nowhere"), "nowhere"),
            (("train", "--out", "x", "--data", "small.npz"), "(3, 16, 16)"),
            (("train", "--out", "file/x", "--data", "images.npz"), "file/x"),
            ((*train, "--config", "huge"), "huge"), ((*train, "--kimg", "0"), "positive"),
            ((*train, "--device", "cuda:7"), "no device"), ((*train, "--amp", "int3"), "int3"),
            ((*train, "--config", "cond-vp"), "no labels"), ((*train, "--resume"), "other"),
            (again, "--resume"), ((*again, "--resume", "--batch", "8"), "--batch 10, not 8"),
            (("sample", "nowhere.pt"), "nowhere.pt"), (("sample", "half.pt"), "half.pt"),
            (("sample", "weights.npz"), "weights.npz"), (("sample", "file"), "file"),
            (("sample", "run/checkpoint.pt", "-n", "0"), "-n"),
            (("sample", "run/checkpoint.pt", "-n", "1", "--steps", "1", "--out", "file/a.png"),
             "file")):
        if message == "other":
            (teacher_run / "other").mkdir()
        done = run(*args, cwd=teacher_run)
        assert done.returncode == 2 and message in done.stderr, (args, done.stderr)
        errors = [line for line in done.stderr.splitlines() if "batch/s" not in line and "it/s"
                  not in line and line]
        assert len(errors) == 1 and errors[0].startswith("edm.py"), (args, done.stderr)
    assert not (teacher_run / "x").exists() and list((teacher_run / "other").iterdir()) == []


# -------------------------------------------------------------------------------------- loading

def official(net, **extra):
    """`net` as NVIDIA's checkpoints hold one: top level a dictionary with `ema`; each module a
    record of its class's source, name and state, tensors as torch pickles them."""
    def reconstruct(meta):
        raise AssertionError("the record's code would have run")
    modules = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib"),
               "torch_utils.persistence": types.ModuleType("torch_utils.persistence"),
               "dnnlib.util": types.ModuleType("dnnlib.util")}
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
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x, 0.5), net(x, 0.5))


def test_official_names_urls_and_checksums(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "edm-cifar10-32x32-uncond-vp.pkl").write_bytes(official(compact()))
    url = (tmp_path / "edm-cifar10-32x32-uncond-vp.pkl").as_uri()
    with pytest.raises(ValueError, match="sha256 is .*, expected 4d5dcc1f"):
        load_teacher(url)
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setitem(edm.OFFICIAL, "edm-cifar10-32x32-uncond-vp", None)
    load_teacher(url)
    load_teacher("edm-cifar10-32x32-uncond-vp")             # found in the cache, under its name


def test_own_checkpoints_and_bare_state_dicts(tmp_path, teacher_run):
    trained = torch.load(teacher_run / "run/checkpoint.pt", weights_only=True)
    loaded = load_teacher(teacher_run / "run/checkpoint.pt").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in trained["ema"].items())
    small = load_teacher(teacher_run / "run/teacher.pt").state_dict()
    assert all(torch.equal(small[k], v) for k, v in loaded.items())
    torch.save(trained["ema"], tmp_path / "bare.pt")
    load_teacher(tmp_path / "bare.pt")


def test_another_configuration_is_refused_by_name(tmp_path):
    state = compact().state_dict()
    state["model.enc.8x8_block0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    torch.save({"ema": state}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"compact, in which model.enc.8x8_block0.conv1.weight "
                                         r"is \(64, 64, 3, 3\), not \(64, 64, 5, 5\)"):
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
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_files_run_nothing(tmp_path, name):
    blob, message = hostile(tmp_path / "it ran")[name]
    (tmp_path / "bad.pkl").write_bytes(blob)
    with pytest.raises(ValueError, match=f"bad.pkl.*{message}"):
        load_teacher(tmp_path / "bad.pkl")
    blob = io.BytesIO()
    torch.save({"ema": Bomb(os.system, f"touch {tmp_path / 'it ran'}")}, blob)
    (tmp_path / "bad.pt").write_bytes(blob.getvalue())
    with pytest.raises(ValueError, match="bad.pt"):
        load_teacher(tmp_path / "bad.pt")
    assert not (tmp_path / "it ran").exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == DEFAULTS


def test_truncated_files(tmp_path):
    blob = official(compact())
    for size in (0, 1, 50, len(blob) // 2, len(blob) - 1):
        (tmp_path / "half.pkl").write_bytes(blob[:size])
        with pytest.raises(ValueError, match="half.pkl"):
            load_teacher(tmp_path / "half.pkl")
