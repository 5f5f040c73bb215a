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
from test_ncsnpp import compact, fill

close = torch.testing.assert_close


def equal(a, b):
    """Whether two states are the same, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


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
    assert to_uint8(torch.tensor([-1.1, -1, 0.003, 1, 1.1])).tolist() == [0, 0, 128, 255, 255]
    net.sigma_init = 2.5                                    # as load_teacher sets it
    assert torch.equal(images, sample(net, 3, seed=7))


def test_karras_levels():
    levels = torch.tensor(grid(18), dtype=torch.float64)
    assert len(levels) == 19 and levels[-1] == 0 and (levels.diff() < 0).all()
    close(levels[[0, 17]], torch.tensor([80, 0.002], dtype=torch.float64))
    roots = levels[:18] ** (1 / 7)                          # equal steps of the 7th root
    close(roots.diff(), (roots[1] - roots[0]).expand(17))
    close(karras(torch.tensor([0.0, 1.0]), 1.0, 2.0, rho=1.0), torch.tensor([2.0, 1.0]))


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


def test_sample_depends_on_the_seed_and_the_labels_alone():
    net, labels = compact("compact-cond"), torch.arange(12) % 10
    for how in (dict(steps=2), dict(sigma_init=2.5)):
        images = sample(net, 12, **how)                             # the classes take turns
        parts = sample(net, 12, labels=labels, batch=5, **how)
        assert images.shape == (12, 3, 32, 32) and images.dtype == torch.uint8
        assert (images.int() - parts.int()).abs().max() <= 1        # which round differently
        for other in (dict(seed=8), dict(labels=labels * 0)):
            assert not torch.equal(images, sample(net, 12, **how, **other))
    for other, bad, message in ((net, labels + 1, "0 to 9$"), (compact(), labels, "unconditional")):
        with pytest.raises(ValueError, match=message):
            sample(other, 12, steps=1, labels=bad)


def test_guidance_against_its_formula():
    good, weak, sigma = Gaussian(0.5), Gaussian(1.0), torch.tensor([0.1, 0.5, 2.0, 9.0])
    x = torch.randn(4, 3, 4, 4, generator=torch.manual_seed(0), requires_grad=True)
    D_good, D_weak = good(x, sigma), weak(x, sigma)
    guided = Guided(good, weak, 2.5, low=0.5, high=2.0)
    D_x = guided(x, sigma)
    close(D_x[1:3], (D_good + 1.5 * (D_good - D_weak))[1:3])
    assert torch.equal(D_x[[0, 3]], D_good[[0, 3]]) and not D_x.requires_grad
    assert torch.equal(Guided(good, weak, 1.0)(x, sigma), D_good)
    weak.levels = []
    guided(x, 2.1)
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
    torch.save(EDMPrecond(16, **CONFIGS["compact"]).state_dict(), "small.pt")
    torch.save({"config": {"sigma_init": 2.5}, "ema": compact().state_dict()}, "student.pt")
    assert isinstance(load_guided("compact-cond.pt"), EDMPrecond)       # none lies beside it
    guided = load_guided("compact-cond.pt", "self", 3.0, 0.1, 9.0)
    assert guided.weak is None and (guided.guidance, guided.low, guided.high) == (3.0, 0.1, 9.0)
    torch.save(compact().state_dict(), "compact-cond_young.pt")
    assert load_guided("compact-cond.pt").weak.label_dim == 0
    assert isinstance(load_guided("compact-cond.pt", "none"), EDMPrecond)
    for teacher, guide, message in (
            ("compact.pt", "self", "guided by itself"), ("compact.pt", "compact-cond.pt", "of 10"),
            ("student.pt", "none", "is a student"), ("compact.pt", "student.pt", "is a student"),
            ("small.pt", "compact.pt", r"\(3, 16, 16\), .*32, 32")):
        with pytest.raises(ValueError, match=message):
            load_guided(teacher, guide)


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
            state = dict(vars(module))
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


@pytest.mark.parametrize("key, dump", [("ema", pickle.dump), ("net", torch.save)])
def test_official_format(tmp_path, capsys, key, dump):
    """Of a snapshot, and of a training state with its optimizer."""
    net = fill(EDMPrecond(**CONFIGS["compact-ve"] | dict(label_dim=3, augment_dim=9, dropout=0.1)))
    net.sigma_data = 0.4                                    # which no tensor says
    net.model.map_layer0.bias.data = torch.randn(99)[35:]   # a view of what is stored
    (tmp_path / "edm.pkl").write_bytes(official(net, key, dump, optimizer={"step": torch.ones(1)}))
    loaded = load_teacher(tmp_path / "edm.pkl")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert equal(dict(loaded.state_dict()), dict(net.state_dict()))
    assert loaded.record == dict(sigma_data=0.4, dropout=0.1)
    assert loaded.sigma_data == 0.4 and loaded.sigma_init is None
    assert {block.dropout for block in loaded.modules() if hasattr(block, "dropout")} == {0.1}
    assert capsys.readouterr().err == ""


def test_other_forms_of_the_same_weights(tmp_path, monkeypatch, capsys):
    state = dict(compact().state_dict())
    compiled = {f"module._orig_mod.{k}": v for k, v in state.items()}
    bare = {k.removeprefix("model."): v for k, v in state.items()}
    torch.save({"epoch": 3, "model": compiled}, tmp_path / "compiled")
    torch.save({"ema": bare, "model": {k: v + 1 for k, v in bare.items()}}, tmp_path / "ema")
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "a.safetensors").touch()
    library = types.SimpleNamespace(load_file=lambda path: state)
    monkeypatch.setitem(sys.modules, "safetensors.torch", library)
    for path in tmp_path.iterdir():
        assert equal(dict(load_teacher(path).state_dict()), state), path
        assert "EDM's defaults are taken" in capsys.readouterr().err


class Bomb:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


SICK = compact()
torch.nn.init.constant_(SICK.model.map_layer0.bias, torch.nan)
BOMB, OLD = {"ema": Bomb(os.system, "touch ran")}, io.BytesIO()
torch.save(BOMB, OLD, _use_new_zipfile_serialization=False)
NESTED = pickle.dumps({"ema": Bomb(torch.storage._load_from_bytes, OLD.getvalue())})
DEFAULTS = torch._utils._rebuild_tensor_v2.__defaults__


@pytest.mark.parametrize("blob, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html><body>Sign in", "web page"),
    (official(compact(), "G_ema"), "StyleGAN"),
    (official(type("VPPrecond", (torch.nn.Module,), {})()), "VPPrecond"),     # EDM's baseline
    (b"", "broken"), (official(compact())[:-1], "broken"), (b"PK\x03\x04", "broken"),
    (official(SICK), "model.map_layer0.bias is not of finite"),
    (official(compact(), extra=BOMB), "refused to load .*system"),
    (official(compact(), "net", torch.save, extra=BOMB), "refused to load .*system"),
    (NESTED, "refused to load more than numbers"),
    (b"ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__)stb.", "to alter")
], ids=lambda value: "file" if isinstance(value, bytes) else value)
def test_what_is_no_network_is_named_and_nothing_in_it_runs(tmp_path, monkeypatch, blob, message):
    """Files of torch.save and plain pickles that would run code are in test_hostile.py."""
    monkeypatch.chdir(tmp_path)
    Path("a.pkl").write_bytes(blob)
    with pytest.raises(ValueError, match=f"a.pkl.*{message}"):
        load_teacher("a.pkl")
    assert not Path("ran").exists()
    assert torch._utils._rebuild_tensor_v2.__defaults__ == DEFAULTS


@pytest.mark.parametrize("offset, size, stride", [
    (0, (2, 2), (9, 1)), (2, (3,), (1,)), (3, (4,), (-1,)), (0, (2 ** 20, 2 ** 20), (0, 0))])
def test_a_tensor_is_read_within_its_storage_only(tmp_path, offset, size, stride):
    """Four numbers are stored: torch would hand out whatever lies beyond them."""
    four, net = torch.arange(4.0)._typed_storage(), torch.nn.Module()
    net._buffers["a"] = Bomb(torch._utils._rebuild_tensor_v2, four, offset, size, stride, False,
                             OrderedDict())
    (tmp_path / "a.pkl").write_bytes(official(net))
    with pytest.raises(ValueError, match="a.pkl: .* on 4 stored numbers"):
        read_file(tmp_path / "a.pkl")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder in which edm.main runs in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(edm.loop, "tune_cpu", lambda: None)     # it would stay for the other tests


def test_samples_of_classes_are_written_with_their_labels(here):
    torch.save(compact("compact-cond").state_dict(), "a.pt")
    edm.main("sample a.pt -n 12 --steps 1 --guide self --guide-high 100 --out a.npz".split())
    images, labels = load_images("a.npz")
    assert labels.tolist() == [*range(10), 0, 1]
    guided = Guided(compact("compact-cond"), None, 2.0, 0.3, 100)
    assert (images.int() - sample(guided, 12, steps=1).int()).abs().max() <= 1


def test_students_are_drawn_as_students(here):
    net = compact()
    torch.save(net.state_dict(), "bare.pt")
    torch.save({"config": {"sigma_init": 2.5}, "ema": net.state_dict()}, "student.pt")
    one_step = sample(net, 2, sigma_init=2.5).int()
    for args, same in (("student.pt", True), ("bare.pt --sigma-init 2.5", True),
                       ("bare.pt", False)):
        edm.main(["sample", *args.split(), "-n", "2", "--out", "a.npz"])
        images = load_images("a.npz")[0]
        assert ((images.int() - one_step).abs().max() <= 1) == same
    for args, message in (("student.pt --steps 4", "--steps would change nothing"),
                          ("nowhere.pt", "no such weights"), ("bare.pt --out a.gif", "2")):
        with pytest.raises((ValueError, OSError, SystemExit), match=message):
            edm.main(["sample", *args.split()])
