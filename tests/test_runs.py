"""Whole runs of cifar_distill.py: resumed, stopped, of every kind, by two processes; and options
that are refused. What a run says is in test_evaluate.py, what must not be lost in test_hostile.py.
"""
import json
import os
import shlex
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
from cifar_distill import Config, Distiller
from data import save_images
from edm import load_teacher, sample
from ncsnpp import EDMPrecond
from plumbing.loop import load, rank, save, train
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


def without(state, *keys):
    """A state without what differs between two equal runs, and without `keys`."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]]
    return {k: v for k, v in (state | {"rows": rows}).items()
            if k not in ("seconds", "config", *keys)}


def same_run(a, b):
    return equal(without(saved(a)), without(saved(b)))


@pytest.fixture
def whole(here):
    """A run that nothing interrupts."""
    if not (here / "whole").exists():
        assert start("whole") == 0
    return here / "whole"


def test_resume_is_the_same_run_bit_for_bit(whole):
    assert start("halves", kimg=0.004) == 0
    assert start("halves", "--resume") == 0
    state, expected = saved("halves"), saved(whole)
    assert [row["kimg"] for row in state["rows"]] == [0, 0.004, 0.008, 0.012]
    assert equal(without(state, "rows", "sums"), without(expected, "rows", "sums"))


def test_sigterm_ends_a_process_and_the_command_that_it_prints_goes_on(here, tmp_path, monkeypatch):
    """From another folder than the project's, into one with a blank in its name. The resumed run
    is an unbroken one, bit for bit."""
    script = os.path.relpath(HERE / "cifar_distill.py", tmp_path)
    given = flags("a run", kimg=1000, teacher=here / "tiny.pt")
    process = subprocess.Popen([sys.executable, script, *given], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "a run/checkpoint.pt").exists():
        time.sleep(0.01)
    process.terminate()
    out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, err
    seen = saved(tmp_path / "a run")["seen"]
    said, command = out.splitlines()[-1].split("to go on: ")
    assert said == f"stopped after {seen} images; "
    assert shlex.split(command) == ["python", script, *given, "--resume"]
    end = f" --kimg={(seen + 4) / 1e3}"
    subprocess.run(command.replace("python", sys.executable, 1) + end, shell=True, cwd=tmp_path,
                   check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    torch.set_flush_denormal(True)                  # as tune_cpu() does
    status = cifar_distill.main([*given, "--out=unbroken", end.strip()])
    torch.set_flush_denormal(False)
    assert status == 0 and same_run("a run", "unbroken")


def test_nothing_due_is_saved_twice_and_rows_after_the_save_are_kept(here):
    """Steps, saves and rows of a loop, in order. The checkpoint comes before the evaluation."""
    events = []

    class Trainer:
        seen = 0

        def step(self):
            self.seen += 10
            events.append(self.seen)

        def state(self):
            events.append("save")
            return {}
    cfg = Config(kimg=0.04, batch=10, save_every=0.02, wait_kimg=0, device="cpu")
    rows, status = train(Trainer(), cfg, here, lambda rows: events.append("row") or {}, 0.02, {})
    assert status == 0 and [row["kimg"] for row in rows] == [0, 0.02, 0.04]
    assert events == ["row", 10, 20, "save", "row", 30, 40, "save", "row", "save"]


@pytest.mark.parametrize("options", [
    dict(teacher="tiny-cond.pt", data="labelled.npz", teacher_samples="labelled.npz", gan=1e-3),
    dict(guide="tiny.pt", guide_low=0.1, guide_high=10, amp="bf16", data="tiny_samples.zip"),
    dict(teacher_samples="statistics.npz", reference="statistics.npz", data="labelled.npz"),
    dict(teacher="tiny-cond.pt", data="labelled.npz", teacher_samples="none", guide="self"),
    dict(batch=1, kimg=0.002, wait_kimg=0, teacher_samples="none"),
    dict(teacher_free=True, part="level", norm="batch", batch=8, gradient_checkpointing=True)])
def test_every_kind_of_run(here, capsys, options):
    """One image a step leaves no NaN, either."""
    out = "kind-" + "-".join(map(str, options))
    assert start(out, **(dict(kimg=0.004) | options)) == 0
    assert f"after {max(2, options.get('batch', 4))} images" in capsys.readouterr().out
    json.loads((here / out / "result.json").read_text(), parse_constant=pytest.fail)
    assert "nan" not in (here / out / "log.csv").read_text()
    compared = options.get("teacher_samples") != "none" and "guide" not in options
    assert ("to_teacher" in saved(out)["rows"][-1]) == compared


def test_paper_preset_on_an_official_file(here, tmp_path, monkeypatch, capsys):
    """Weights in NVIDIA's format under the official name, two steps. Their map_augment, which no
    image uses, stays as it is."""
    net = fill(EDMPrecond(**TINY | dict(augment_dim=9)))
    (tmp_path / "edm.pkl").write_bytes(official(net))
    monkeypatch.setattr(edm, "download", lambda url, sha256="": tmp_path / "edm.pkl")
    out = tmp_path / "run"
    assert cifar_distill.main([
        "--preset", "paper", "--batch", "2", "--kimg", "0.004", "--wait-kimg", "0.002",
        "--features", "compact", "--eval-n", "6", "--preview", "1", "--device", "cpu",
        "--data", "tiny_samples.zip", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["images"] == 4 and result["config"]["lr_g"] == 1e-5
    name = "model.map_augment.weight"
    assert torch.equal(saved(out)["G"][name], net.state_dict()[name])


def test_a_grey_teacher_of_ones_own_that_was_trained_without_flips(here, monkeypatch, capsys):
    """train_teacher.py on 16 x 16 grey images with their labels; then its student, from its file
    alone, is trained on the same images, unmirrored, and drawn."""
    g = np.random.RandomState(2)
    np.savez("digits.npz", images=g.randint(0, 256, (30, 1, 16, 16), np.uint8),
             labels=np.arange(30) % 2)
    assert not train_teacher.main(["--data", "digits.npz", "--no-flip", "--out", "mine",
                                   "--kimg", "0.016", "--batch", "8", "--device", "cpu"])
    made, f = [], Distiller.__init__
    monkeypatch.setattr(Distiller, "__init__", lambda d, *a: made.append(d) or f(d, *a))
    assert start("grey", teacher="mine/teacher.pt", kimg=0.004) == 0
    d, = made
    assert d.flip is False and d.images.shape == (30, 1, 16, 16) and d.teacher.label_dim == 2
    assert torch.equal(d.labels, torch.arange(30) % 2)
    assert "FD-compact to digits: " in capsys.readouterr().out
    student = load_teacher("grey/student.pt")
    images = sample(student, 4)
    assert images.shape == (4, 1, 16, 16) and images.float().std() > 1
    assert torch.equal(images, sample(d.ema, 4, sigma_init=2.5)) and student.record["flip"] is False


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
            state = {k: d.state()[k] for k in ("G", "fake", "sums", "log_r_mean")}
            state["grads"] = gradients(d.G) + gradients(d.fake)
            if rank() == 0:
                save(state, folder / f"{norm}.pt")
        return load_all(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar_distill, "load_all", steps_first)
        patch.setattr(evaluate, "curve", lambda *a: None)
        patch.setattr(evaluate, "side_by_side", lambda *a, **k: None)
        assert start(folder / "run", kimg=0.004) == 0


def test_two_processes_are_one(here, tmp_path):
    """The same batch: gradients, weights and statistics as in one process, then a whole run."""
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
        for key in ("G", "fake"):
            close(dict(two[key]), dict(one[key]), rtol=0, atol=1e-6)
        close(two["log_r_mean"], one["log_r_mean"], rtol=1e-4, atol=1e-6)
        close(two["sums"], one["sums"], rtol=rtol, atol=1e-5)
    one, two = (saved(tmp_path / n / "run") for n in "12")
    assert json.loads((tmp_path / "2/run/result.json").read_text())["processes"] == 2
    assert torch.equal(one["generator"], two["generator"]) and two["seen"] == 4
    close(two["rows"][0]["to_teacher"], one["rows"][0]["to_teacher"])
    assert len(two["rows"]) == len(one["rows"])


# ------------------------------------------------------------------------------------ bad input

def refused(capsys, reason, call):
    """Check that call() ends with one line that has the reason, and, of options, status 2."""
    with pytest.raises((ValueError, OSError, SystemExit)) as e:
        call()
    error = capsys.readouterr().err if e.type is SystemExit else str(e.value)
    assert reason in error and len(error.splitlines()) == 1, error
    assert e.type is not SystemExit or e.value.code == 2


def test_bad_options_are_one_line(here, whole, capsys):
    def bad(reason, *more, out="bad", **options):
        capsys.readouterr()
        refused(capsys, reason, lambda: start(out, *more, **options))
        assert out != "bad" or not any((here / "bad").glob("[!.]*"))
    bad("lam must be a number from -50 to 50", h="sba", lam=51)
    bad("--lam is SBA's alone: say --h sba, not kl", h="kl", lam=3)
    bad("--kimg 2 ends before the generator moves, for which it waits --wait-kimg 2", kimg=2,
        wait_kimg=2)
    bad("--teacher-free has no D_real", "--teacher-free", w_t="dmd")
    bad("--norm two-stage", norm="two-stage")
    bad("--part level goes with --norm batch", part="level")
    bad("--batch of at least 8", part="level", norm="batch", batch=7)
    bad("--t-min must be below --t-max", t_min=0.9)
    for n in (0, 101):
        bad("--fake-updates: must be a whole number from 1 to 100", fake_updates=n)
    bad("--amp fp16 is 40 times slower on a CPU", amp="fp16")
    bad("unrecognized arguments: --nfe=2", nfe=2)
    bad("none.pt", teacher="none.pt")
    bad("small.npz: images of (3, 16, 16), but the teacher's are (3, 32, 32); --size 32",
        data="small.npz")
    bad("none.npz", data="none.npz")
    bad("none.npz", teacher_samples="none.npz")
    bad("edm.py sample tiny-cond.pt -n 5000", teacher="tiny-cond.pt")
    bad("tiny_samples.zip has no labels", teacher="tiny-cond.pt", data="tiny_samples.zip")
    bad("classes.npz: labels from 0 to 4", teacher="tiny-cond.pt", data="classes.npz")
    bad("class-conditional", guide="self", data="labelled.npz")
    bad("nothing to resume", "--resume")
    bad("whole/checkpoint.pt exists: add --resume", out="whole")
    bad("--lam was 5.0, is 3.0; --ess was 0.9, is 0.8", "--resume", out="whole", ess=0.8, lam=3)
    bad("whole/student.pt is a student, of one noise level (2.5)", teacher="whole/student.pt",
        data="labelled.npz")
    bad("whole/student.pt is a student", guide="whole/student.pt", data="labelled.npz")
    (here / "file").write_text("in the way")
    bad("file", out="file/run")


if __name__ == "__main__":              # one of the two of test_two_processes_are_one
    steps_and_a_run(Path(sys.argv[1]))
