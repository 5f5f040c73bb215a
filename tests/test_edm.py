"""edm.py: the sampler against an exact solution, guidance against its formula, and files of weights
that are read for what they are, without running what they carry."""
import io
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import edm
from data import load_images
from edm import (Guided, edm_loss, grid, heun, karras, load_guided, load_teacher, sample,
                 to_uint8)
from ncsnpp import CONFIGS, EDMPrecond
from plumbing.weights import read_file
from test_ncsnpp import compact, config_of, fill

HERE = Path(edm.__file__).parent
close = torch.testing.assert_close


def equal(a, b):
    """Whether two states are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def grey():
    """A conditional network for 28 x 28 pixels and one channel."""
    return fill(EDMPrecond(**config_of("small28_grey_ddpmpp")))


# ----------------------------------------------------------------------------- loss and sampler

class Gaussian(torch.nn.Module):
    """The exact denoiser of data N(0, s^2), with the interface of EDMPrecond."""
    label_dim, sigma_data, channels, resolution = 0, 0.5, 3, 4

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


def test_a_student_takes_one_evaluation_from_one_stream_of_noise():
    net = Gaussian(0.5)
    images = sample(net, 3, sigma_init=2.5, seed=7)
    assert net.levels == [2.5]
    z = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(images, to_uint8(0.25 / (0.25 + 2.5 ** 2) * 2.5 * z))
    close(heun(net, z.double(), (2.5, 0.0)), 0.25 / (0.25 + 2.5 ** 2) * 2.5 * z.double())
    assert to_uint8(torch.tensor([-1.1, -1, 0.003, 1, 1.1])).tolist() == [0, 0, 128, 255, 255]
    net.sigma_init = 2.5                                    # as load_teacher sets it
    assert torch.equal(images, sample(net, 3, seed=7))


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
    for how in (dict(steps=3), dict(sigma_init=2.5)):
        images, other, parts = (sample(net, 5, seed=seed, batch=n, **how)
                                for seed, n in ((7, 64), (8, 64), (7, 2)))
        assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
        assert (images.int() - parts.int()).abs().max() <= 1        # which round differently
        assert not torch.equal(images, other)


def test_sample_of_a_conditional_network_takes_the_labels():
    net = grey()
    turns, labels = sample(net, 12, steps=1), torch.arange(12) % 10
    assert turns.shape == (12, 1, 28, 28)
    parts = sample(net, 12, steps=1, labels=labels, batch=5)
    assert (turns.int() - parts.int()).abs().max() <= 1
    assert not torch.equal(turns, sample(net, 12, steps=1, labels=labels * 0))
    for other, bad, message in ((net, labels - 1, "from -1"), (net, labels + 1, "0 to 9$"),
                                (compact(), labels, "unconditional")):
        with pytest.raises(ValueError, match=message):
            sample(other, 12, steps=1, labels=bad)


# ------------------------------------------------------------------------------------- guidance

def test_guidance_against_its_formula():
    good, weak, sigma = Gaussian(0.5), Gaussian(1.0), torch.tensor([0.1, 0.5, 2.0, 9.0])
    x = torch.randn(4, 3, 4, 4, generator=torch.manual_seed(0), requires_grad=True)
    D_good, D_weak = good(x, sigma), weak(x, sigma)
    guided = Guided(good, weak, 2.5, low=0.5, high=2.0)
    D_x = guided(x, sigma)
    close(D_x[1:3], (D_good + 1.5 * (D_good - D_weak))[1:3])
    assert torch.equal(D_x[[0, 3]], D_good[[0, 3]]) and not torch.equal(D_x[1:3], D_good[1:3])
    assert torch.equal(Guided(good, weak, 1.0)(x, sigma), D_good)
    assert not D_x.requires_grad and D_good.requires_grad
    assert (guided.sigma_data, guided.label_dim) == (0.5, 0)
    weak.levels = []
    for sigma in (0.4, 2.1, torch.tensor([0.1, 0.4, 2.1, 9.0]).reshape(4, 1, 1, 1)):
        guided(x, sigma)
    assert weak.levels == []                                # it need not compute outside


def test_a_network_guided_by_itself_without_its_label():
    net, x, c = compact("compact-cond"), torch.ones(2, 3, 32, 32), torch.eye(10)[:2]
    with torch.no_grad():
        D_good, D_weak = net(x, 0.5, c), net(x, 0.5, torch.zeros(2, 10))
    assert not torch.equal(D_good, D_weak)
    close(Guided(net, None, 3.0)(x, 0.5, c), 3 * D_good - 2 * D_weak)


def test_load_guided(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("compact", "compact-cond"):
        torch.save(compact(name).state_dict(), f"{name}.pt")
    torch.save(grey().state_dict(), "grey.pt")
    torch.save({"config": {"sigma_init": 2.5}, "ema": compact().state_dict()}, "student.pt")
    assert isinstance(load_guided("compact.pt", "none"), EDMPrecond)
    assert isinstance(load_guided("compact.pt"), EDMPrecond)        # none lies beside it
    guided = load_guided("compact-cond.pt", "self", 3.0, 0.1, 9.0)
    assert guided.weak is None and (guided.guidance, guided.low, guided.high) == (3.0, 0.1, 9.0)
    torch.save(compact().state_dict(), "compact-cond_young.pt")
    guided = load_guided("compact-cond.pt")
    assert (guided.good.label_dim, guided.weak.label_dim, guided.guidance) == (10, 0, 2.0)
    for teacher, guide, low, message in (
            ("compact.pt", "self", 0, "guided by itself"),
            ("compact.pt", "compact-cond.pt", 0, "0 classes .* one of 10"),
            ("compact.pt", "compact.pt", 6, "between 6 and 5"),
            ("student.pt", "none", 0, "student.pt is a student"),
            ("compact.pt", "student.pt", 0, "student.pt is a student"),
            ("grey.pt", "compact.pt", 0, r"\(1, 28, 28\), .*32, 32")):
        with pytest.raises(ValueError, match=message):
            load_guided(teacher, guide, low=low)


# ----------------------------------------------------------------------------- files of weights

def official(net, key="ema", dump=pickle.dump, **extra):
    """Return the bytes of `net` as EDM's code writes it: a dictionary in which each module is a
    record of its class's source, name and state, and tensors are as torch pickles them."""
    def reconstruct(meta):
        raise AssertionError("the record's code would have run")

    reconstruct.__module__ = "torch_utils.persistence"
    reconstruct.__qualname__ = reconstruct.__name__ = "_reconstruct_persistent_obj"
    EasyDict = type("EasyDict", (dict,), {"__module__": "dnnlib.util"})
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    fakes = {name: types.ModuleType(name) for name in names}
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = reconstruct
    fakes["dnnlib.util"].EasyDict = EasyDict

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
        if module is None or not isinstance(module, torch.nn.ModuleDict):
            return module and Persistent(module)
        plain = torch.nn.ModuleDict()
        plain._modules.update((k, record(m)) for k, m in module._modules.items())
        return plain

    if key == "ema":
        extra |= dict(loss_fn=EasyDict(P_mean=np.float64(-1.2)), augment_pipe=None)
    blob = io.BytesIO()
    with mock.patch.dict(sys.modules, fakes):
        dump({key: record(net), **extra}, blob)
    return blob.getvalue()


@pytest.mark.parametrize("name, key, dump", [
    ("compact-ve", "ema", pickle.dump), ("grey", "ema", pickle.dump), ("grey", "net", torch.save)])
def test_official_format(tmp_path, capsys, name, key, dump):
    """Of a snapshot, and of a training state with its optimizer."""
    net = grey() if name == "grey" else compact(name)
    net.sigma_data = 0.4                                    # which no tensor says
    blob = official(net, key, dump, optimizer_state={"step": torch.tensor(1), "lr": 0.1})
    assert b"torch_utils.persistence" in blob and (key == "net" or b"_load_from_bytes" in blob)
    (tmp_path / "edm.pkl").write_bytes(blob)
    loaded = load_teacher(tmp_path / "edm.pkl")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert equal(dict(loaded.state_dict()), dict(net.state_dict()))
    assert loaded.record == dict(sigma_data=0.4, dropout=0.1 if name == "grey" else 0.0)
    assert loaded.sigma_data == 0.4 and loaded.sigma_init is None
    assert {block.dropout for block in loaded.modules() if hasattr(block, "dropout")} == {
        loaded.record["dropout"]}
    assert capsys.readouterr().err == ""


def test_official_names_and_checksums(tmp_path, monkeypatch):
    """By name a file in the cache is asked for, with the checksum of OFFICIAL."""
    (tmp_path / "a.pkl").write_bytes(official(compact()))
    asked = []
    monkeypatch.setattr(edm, "download", lambda *a: asked.append(a) or tmp_path / "a.pkl")
    for name in ("edm-cifar10-32x32-uncond-vp", "edm-imagenet-64x64-cond-adm"):
        load_teacher(name)
    assert [url.rsplit("/", 1)[1] for url, _ in asked] == \
        ["edm-cifar10-32x32-uncond-vp.pkl", "edm-imagenet-64x64-cond-adm.pkl"]
    assert asked[0][1].startswith("4d5dcc1f") and asked[1][1] == ""
    (tmp_path / "a.pkl").write_bytes(official(compact())[:900_000])
    with pytest.raises(ValueError, match="a.pkl: broken"):
        load_teacher("edm-imagenet-64x64-cond-adm")


def test_other_forms_of_the_same_weights(tmp_path, monkeypatch, capsys):
    state = dict(compact().state_dict())
    bare = {k.removeprefix("model."): v for k, v in state.items()}
    forms = {"state_dict": {"state_dict": state},
             "compiled": {"epoch": 3, "model": {f"module._orig_mod.{k}": v
                                                for k, v in state.items()}},
             "ema": {"ema": bare, "model": {k: v + 1 for k, v in bare.items()}}}
    for name, form in forms.items():
        torch.save(form, tmp_path / name)
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "a.safetensors").touch()
    library = types.SimpleNamespace(load_file=lambda path: state)
    monkeypatch.setitem(sys.modules, "safetensors.torch", library)
    for path in tmp_path.iterdir():
        assert equal(dict(load_teacher(path).state_dict()), state), path
        assert "EDM's defaults are taken" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)         # not installed
    with pytest.raises(ValueError, match="a.safetensors: pip install safetensors"):
        load_teacher(tmp_path / "a.safetensors")


def test_what_a_file_says_of_itself(tmp_path, capsys):
    state = compact().state_dict()
    torch.save({"ema": state, "seen": 4, "config": {"data": "photos", "sigma_init": 1.5},
                "record": {"data": "/photos", "flip": False, "sigma_data": 0.4}}, tmp_path / "a.pt")
    net = load_teacher(tmp_path / "a.pt")
    assert (net.sigma_init, net.sigma_data) == (1.5, 0.4)
    assert net.record == dict(data="/photos", sigma_init=1.5, flip=False, sigma_data=0.4, dropout=0)
    assert load_teacher(HERE / "pretrained/compact_student.pt").sigma_init == 2.5
    assert load_teacher(HERE / "pretrained/compact_teacher.pt").sigma_init is None
    assert capsys.readouterr().err == ""


class Bomb:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


BASELINE = official(type("VPPrecond", (torch.nn.Module,), {})())      # of EDM's baselines


@pytest.mark.parametrize("blob, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html><body>Sign in", "is a web page: download"),
    (official(compact(), "G_ema"), "a StyleGAN, .* take a diffusion teacher, such as edm-ffhq"),
    (BASELINE, "behind VPPrecond, .*--precond=edm"),
    (b"", "a: broken, or no file"), (b"PK\x03\x04", "a: broken, or it holds more"),
    (official(compact())[:-1], "a: broken, or no file")])
def test_files_that_are_something_else(tmp_path, blob, message):
    (tmp_path / "a").write_bytes(blob)
    with pytest.raises(ValueError, match=message):
        load_teacher(tmp_path / "a")


@pytest.mark.parametrize("change, message", [
    (torch.full((64, 64, 3, 3), torch.nan), "is not of finite"),
    (torch.zeros(64, 64, 3, 3).long(), "is not of finite"), ([1.0], "is missing")])
def test_weights_that_are_no_network(tmp_path, change, message):
    name = "model.enc.8x8_block0.conv1.weight"
    torch.save({"ema": compact().state_dict() | {name: change}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt: {name} {message}"):
        load_teacher(tmp_path / "a.pt")


# ------------------------------------------------------------------------- no foreign code is run

DEFAULTS = torch._utils._rebuild_tensor_v2.__defaults__


def hostile(touch):
    """Return name: (file, what the refusal names); each would create the file `touch` if it ran.
    Files of torch.save and plain pickles are in test_hostile.py."""
    bomb, old = {"ema": Bomb(os.system, f"touch {touch}")}, io.BytesIO()
    torch.save(bomb, old, _use_new_zipfile_serialization=False)
    nested = {"ema": Bomb(torch.storage._load_from_bytes, old.getvalue())}
    return {
        "in the state": (official(compact(), extra=bomb), "refused to load .*system"),
        "in a training state": (official(compact(), "net", torch.save, extra=bomb), "refused"),
        "nested": (pickle.dumps(nested), "refused to load more than numbers"),
        "alters a function": (b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00"
                              b"__defaults__)stb.", "refused to alter"),
    }


@pytest.mark.parametrize("name", hostile("x"))
def test_hostile_files_run_nothing(tmp_path, name):
    blob, message = hostile(tmp_path / "ran")[name]
    (tmp_path / "bad.pkl").write_bytes(blob)
    with pytest.raises(ValueError, match=f"bad.pkl: .*{message}"):
        load_teacher(tmp_path / "bad.pkl")
    assert not (tmp_path / "ran").exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == DEFAULTS


@pytest.mark.parametrize("offset, size, stride, read", [
    (1, (3,), (1,), [1.0, 2.0, 3.0]),
    (0, (2, 2), (9, 1), None), (2, (3,), (1,), None), (3, (4,), (-1,), None),
    (0, (2 ** 20, 2 ** 20), (0, 0), None)])
def test_a_tensor_is_read_within_its_storage_only(tmp_path, offset, size, stride, read):
    """Four numbers are stored: torch would hand out whatever lies beyond them."""
    four = torch.storage.TypedStorage(wrap_storage=torch.arange(4.0).untyped_storage(),
                                      dtype=torch.float32, _internal=True)
    net = torch.nn.Module()
    net.register_buffer("a", torch.zeros(1))
    net._buffers["a"] = Bomb(torch._utils._rebuild_tensor_v2, four, offset, size, stride, False,
                             OrderedDict())
    (tmp_path / "a.pkl").write_bytes(official(net))
    if read:
        assert read_file(tmp_path / "a.pkl")[0]["a"].tolist() == read
    else:
        with pytest.raises(ValueError, match="a.pkl: .* on 4 stored numbers"):
            read_file(tmp_path / "a.pkl")


# ----------------------------------------------------------------------------------- the command

def in_process(monkeypatch, folder, *args):
    """Run edm.main on a command line, in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(edm.loop, "tune_cpu", lambda: None)     # it would stay for the other tests
    return edm.main([str(a) for a in args])


def test_samples_of_classes_are_written_with_their_labels(tmp_path, monkeypatch):
    torch.save(compact("compact-cond").state_dict(), tmp_path / "a.pt")
    in_process(monkeypatch, tmp_path, "sample", "a.pt", "-n", 12, "--steps", 1, "--guide", "self",
               "--guide-high", 100, "--out", "a.npz")
    images, labels = load_images(tmp_path / "a.npz")
    assert labels.tolist() == [*range(10), 0, 1]
    guided = Guided(compact("compact-cond"), None, 2.0, 0.3, 100)
    assert (images.int() - sample(guided, 12, steps=1).int()).abs().max() <= 1


def test_students_are_drawn_as_students(tmp_path, monkeypatch, capsys):
    net = compact()
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    torch.save({"config": {"sigma_init": 2.5}, "ema": net.state_dict()}, tmp_path / "student.pt")
    for weights, more, said in (("student.pt", (), "of 1 evaluation each"),
                                ("bare.pt", ("--sigma-init", 2.5), "of 1 evaluation each"),
                                ("bare.pt", (), "of 35 evaluations each, as a teacher")):
        in_process(monkeypatch, tmp_path, "sample", weights, "-n", 2, "--out", "a.npz", *more)
        assert said in capsys.readouterr().out
        images, same = load_images(tmp_path / "a.npz")[0], sample(net, 2, sigma_init=2.5)
        assert ((images.int() - same.int()).abs().max() <= 1) == ("1 evaluation" in said)
    with pytest.raises(ValueError, match="--steps, --guide would change nothing"):
        in_process(monkeypatch, tmp_path, "sample", "student.pt", "--steps", 4, "--guide", "none")


def test_command_line_errors(tmp_path, monkeypatch, capsys):
    for args, message in ((("nowhere.pt",), "no such weights: nowhere.pt"),
                          (("a.pt", "--out", "a.gif"), "--out must end in .png,")):
        with pytest.raises((OSError, SystemExit)) as error:
            in_process(monkeypatch, tmp_path, "sample", *args)
        assert message in capsys.readouterr().err + str(error.value)
