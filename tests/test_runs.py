"""Whole runs of cifar_distill.py: stopped, of every kind, by two processes; and options that are
refused. What a run says is in test_evaluate.py, what must not be lost in test_hostile.py."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import cifar_distill
import edm
import evaluate
import fid
import train_teacher
from cifar_distill import Distiller
from data import save_images
from edm import load_teacher, sample
from ncsnpp import EDMPrecond
from plumbing.loop import load, rank, save
from test_cifar_distill import IMAGES, LABELS, TINY, close, distiller, gradients, teacher
from test_edm import equal, official
from test_ncsnpp import fill

HERE = Path(cifar_distill.__file__).parent
RUN = dict(kimg=0.012, batch=2, wait_kimg=0.002, eval_every=0.008, eval_n=8, save_every=0.004,
           preview=1, device="cpu", h="sba", norm="level", teacher="tiny.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with weights and images of 32 x 32, in which the tests run."""
    folder = tmp_path_factory.mktemp("files")
    images = torch.from_numpy(np.random.RandomState(1).randint(0, 256, (24, 3, 32, 32), np.uint8))
    save_images(images, folder / "tiny_samples.zip")
    save_images(images[..., :16, :16], folder / "small.npz")
    save_images(images, folder / "labelled.npz", torch.arange(24) % 3)
    save_images(images, folder / "classes.npz", torch.arange(24) % 5)
    (folder / "file").touch()
    torch.save(teacher(0, 32).state_dict(), folder / "tiny.pt")
    torch.save(teacher(3, 32).state_dict(), folder / "tiny-cond.pt")
    measured = fid.measure(images, fid.load_net())
    fid.save(measured, folder / "tiny_compact.npz")
    fid.save(fid.Measured(measured.mu, measured.sigma), folder / "statistics.npz")
    return folder


@pytest.fixture
def here(files, monkeypatch):
    """In that folder, with pictures left out."""
    monkeypatch.setattr(cifar_distill, "tune_cpu", lambda: None)    # it would stay for other tests
    monkeypatch.setattr(evaluate, "curve", lambda *a: None)
    monkeypatch.setattr(evaluate, "side_by_side", lambda *a, **k: None)
    monkeypatch.chdir(files)
    return files


def flags(out, **options):
    """A command line: RUN with other options."""
    return [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}")
            for k, v in (RUN | dict(out=out) | options).items()]


def start(out, *more, **options):
    return cifar_distill.main([*flags(out, **options), *more])


def saved(out):
    return torch.load(Path(out) / "checkpoint.pt", weights_only=True)


def same_run(a, b):
    """Compare all that two runs saved, but for the time and the options."""
    def compared(state):
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]]
        return {k: v for k, v in state.items() if k not in ("seconds", "config")} | {"rows": rows}
    return equal(compared(saved(a)), compared(saved(b)))


@pytest.fixture
def whole(here):
    """A run that nothing interrupts."""
    if not (here / "whole").exists():
        assert start("whole") == 0
    return here / "whole"


def test_sigterm_ends_a_process_and_the_command_that_it_prints_goes_on(here, tmp_path, monkeypatch):
    """As an unbroken run does, bit for bit; from another folder than the project's, into one with a
    blank in its name."""
    script = os.path.relpath(HERE / "cifar_distill.py", tmp_path)
    given = flags("a run", kimg=1000, teacher=here / "tiny.pt")
    process = subprocess.Popen([sys.executable, script, *given], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "a run/checkpoint.pt").exists():
        time.sleep(0.01)
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    command = out.strip().split("to go on: ")[1].replace("python", sys.executable, 1)
    end = f"--kimg={(saved(tmp_path / 'a run')['seen'] + 4) / 1e3}"
    subprocess.run(f"{command} {end}", shell=True, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    torch.set_flush_denormal(True)                  # as tune_cpu() does
    status = cifar_distill.main([*given, "--out=unbroken", end])
    torch.set_flush_denormal(False)
    assert status == 0 and same_run("a run", "unbroken")


@pytest.mark.parametrize("options", [
    dict(teacher="tiny-cond.pt", data="labelled.npz", teacher_samples="labelled.npz", gan=1e-3),
    dict(guide="tiny.pt", guide_low=0.1, guide_high=10, amp="bf16", data="tiny_samples.zip"),
    dict(teacher_samples="statistics.npz", reference="statistics.npz", data="labelled.npz"),
    dict(teacher="tiny-cond.pt", data="labelled.npz", teacher_samples="none", guide="self"),
    dict(batch=1, kimg=0.002, wait_kimg=0, teacher_samples="none"),
    dict(teacher_free=True, part="level", norm="batch", batch=8, gradient_checkpointing=True)])
def test_every_kind_of_run(here, options):
    """One image a step leaves no NaN, either."""
    out = "kind-" + "-".join(map(str, options))
    assert start(out, **(dict(kimg=0.004) | options)) == 0
    json.loads((here / out / "result.json").read_text(), parse_constant=pytest.fail)
    assert "nan" not in (here / out / "log.csv").read_text()


def test_paper_preset_on_an_official_file(here, tmp_path, monkeypatch):
    """Weights in NVIDIA's format, with their map_augment, under the official name."""
    net = fill(EDMPrecond(**TINY | dict(augment_dim=9)))
    (tmp_path / "edm.pkl").write_bytes(official(net))
    monkeypatch.setattr(edm, "download", lambda url, sha256="": tmp_path / "edm.pkl")
    assert start("paper", "--preset=paper", teacher="edm-cifar10-32x32-uncond-vp", norm="batch",
                 data="tiny_samples.zip", features="compact", kimg=0.004) == 0
    assert saved("paper")["seen"] == 4 and saved("paper")["config"]["lr_g"] == 1e-5


def test_a_grey_teacher_of_ones_own_that_was_trained_without_flips(here, monkeypatch):
    """Its student, from its file alone, is trained on the same images, unmirrored."""
    g = np.random.RandomState(2)
    np.savez("digits.npz", images=g.randint(0, 256, (30, 1, 16, 16), np.uint8),
             labels=np.arange(30) % 2)
    assert not train_teacher.main(["--data", "digits.npz", "--no-flip", "--out", "mine",
                                   "--kimg", "0.016", "--batch", "8", "--device", "cpu"])
    made, f = [], Distiller.__init__
    monkeypatch.setattr(Distiller, "__init__", lambda d, *a: made.append(d) or f(d, *a))
    assert start("grey", teacher="mine/teacher.pt", kimg=0.004) == 0
    d, = made
    assert d.flip is False and torch.equal(d.labels, torch.arange(30) % 2)
    student = load_teacher("grey/student.pt")
    assert sample(student, 4).shape == (4, 1, 16, 16) and student.record["flip"] is False


# ------------------------------------------------------------------------------- two processes

def steps_and_a_run(folder):
    """Take three steps of two Distillers, one of them in half precision, and save what they came
    to; then a whole run. All in the group of processes that the run has joined."""
    load_all = cifar_distill.load_all

    def steps_first(cfg):
        for norm, more in (("level", {}), ("two-stage", dict(amp="fp16", gan=0.1, fake_updates=2))):
            d = distiller(teacher(3), IMAGES, LABELS, h="sba", norm=norm, batch=20, **more)
            for opt in (d.opt_g, d.opt_f):
                opt.param_groups[0]["eps"] = 1.0    # else Adam makes the sign of rounding a step
            for _ in range(3):
                d.step()
            state = {k: d.state()[k] for k in ("sums", "log_r_mean")}
            state["grads"] = gradients(d.G) + gradients(d.fake)
            if rank() == 0:
                save(state, folder / f"{norm}.pt")
        return load_all(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar_distill, "load_all", steps_first)
        assert start(folder / "run", kimg=0.004) == 0


def test_two_processes_are_one(here, tmp_path):
    """The same batch: gradients and statistics as in one process, then a whole run."""
    steps_and_a_run(tmp_path / "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run([*launch, __file__, tmp_path / "2"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("FD-compact to the teacher's samples: ") == 1
    for norm, rtol in (("level", 1e-4), ("two-stage", 1e-2)):       # fp16 rounds the second
        one, two = (load(tmp_path / n / f"{norm}.pt") for n in "12")
        size = max(g.abs().max() for g in one["grads"]).item()
        for a, b in zip(one["grads"], two["grads"], strict=True):
            close(b, a, rtol=0, atol=rtol * size)
        close(two["log_r_mean"], one["log_r_mean"], rtol=1e-4, atol=1e-6)
        close(two["sums"], one["sums"], rtol=rtol, atol=1e-5)
    one, two = (saved(tmp_path / n / "run") for n in "12")
    assert json.loads((tmp_path / "2/run/result.json").read_text())["processes"] == 2
    assert torch.equal(one["generator"], two["generator"]) and two["seen"] == 4


# ------------------------------------------------------------------------------------ bad input

@pytest.mark.parametrize("options, message", [
    (dict(lam=51), "lam must be a number from -50 to 50"),
    (dict(h="kl", lam=3), "--lam is SBA's alone"),
    (dict(kimg=2, wait_kimg=2), "before the generator moves"),
    (dict(t_min=0.8), "--t-min must be below --t-max"),
    (dict(teacher_free=True, w_t="dmd"), "--teacher-free has no D_real"),
    (dict(part="level"), "--part level goes with"),
    (dict(norm="two-stage"), "needs --batch 20"),
    (dict(fake_updates=0), "from 1 to 100"),
    (dict(fake_updates=101), "from 1 to 100"),
    (dict(amp="fp16"), "slower on a CPU"),
    (dict(teacher="none.pt"), "none.pt"),
    (dict(data="small.npz"), "--size 32"),
    (dict(teacher="tiny-cond.pt"), "edm.py sample tiny-cond.pt -n 5000"),
    (dict(teacher="tiny-cond.pt", data="tiny_samples.zip"), "tiny_samples.zip has no labels"),
    (dict(teacher="tiny-cond.pt", data="classes.npz"), "classes.npz: labels from 0 to 4"),
    (dict(guide="self", data="labelled.npz"), "class-conditional"),
    (dict(teacher="whole/student.pt", data="labelled.npz"), "whole/student.pt is a student"),
    (dict(resume=True), "nothing to resume"),
    (dict(out="whole"), "whole/checkpoint.pt exists: add --resume"),
    (dict(out="whole", resume=True, lam=3), "--lam was 5.0, is 3.0"),
    (dict(out="file/run"), "file")])
def test_bad_options_are_one_line_and_nothing_is_written(whole, capsys, options, message):
    with pytest.raises((ValueError, OSError, SystemExit)) as e:
        start(**dict(out="bad") | options)
    line = capsys.readouterr().err if e.type is SystemExit else str(e.value)
    assert message in line and len(line.splitlines()) == 1
    assert not any(Path("bad").glob("[!.]*"))


if __name__ == "__main__":              # one of the two of test_two_processes_are_one
    steps_and_a_run(Path(sys.argv[1]))
