"""What must hold whatever happens: a file runs no code, and nothing that was saved is lost.

What was once 1,264 attacks (results.md has their figures). A run that is ended by a signal goes on
bit for bit: test_runs.py has that, and edm.py's pickles are in test_edm.py.
"""
import contextlib
import io
import os
import pickle
import resource
import signal
import time

import numpy as np
import pytest
import torch

import fid
import plots
import toy2d
import train_teacher
from data import save_grid, save_images
from plumbing.loop import atomic, begin, claim, load, save
from test_cifar_distill import Config, distiller
from test_edm import Bomb, official
from test_ncsnpp import compact
from test_runs import files, here, same_run, saved, start, whole     # noqa: F401

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


# ----------------------------------------------------------------------------- no code is run

def bombs(touch):
    """Return name -> (the option that reads it, its bytes): each would make the file `touch`."""
    bomb = {"ema": Bomb(os.system, f"touch {touch}")}

    def written(write):
        blob = io.BytesIO()
        write(blob)
        return blob.getvalue()
    array = np.array([bomb], dtype=object)
    zeros = np.zeros((1, 3, 32, 32), np.uint8)
    torch_file = written(lambda f: torch.save(bomb, f))
    old = written(lambda f: torch.save(bomb, f, _use_new_zipfile_serialization=False))
    return {
        "a.pkl": ("teacher", pickle.dumps(bomb)), "torch.pt": ("teacher", torch_file),
        "old.pt": ("teacher", old), "official.pkl": ("teacher", official(compact(), extra=bomb)),
        "guide.pt": ("guide", torch_file), "run/checkpoint.pt": ("out", torch_file),
        "images.npy": ("data", written(lambda f: np.save(f, array))),
        "images.npz": ("data", written(lambda f: np.savez(f, images=array))),
        "labels.npz": ("data", written(lambda f: np.savez(f, images=zeros, labels=array))),
        "statistics.npz": ("reference", written(lambda f: np.savez(f, mu=zeros, sigma=array))),
        "features.npz": ("teacher_samples", written(lambda f: np.savez(f, features=array)))}


@pytest.mark.parametrize("name", bombs("x"))
def test_no_file_runs_code(here, tmp_path, name):
    """And the line says which file it was."""
    option, blob = bombs(tmp_path / "ran")[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(blob)
    given = {"data": "labelled.npz", "out": tmp_path / "new"} | {
        option: path.parent if option == "out" else path}
    with pytest.raises((ValueError, OSError), match=path.name) as e:
        start(given.pop("out"), *["--resume"] * (option == "out"), kimg=0.004, **given)
    assert len(str(e.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------- nothing is lost

IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (64, 3, 32, 32), np.uint8))
ROWS, MEASURED = [dict(kimg=0, to_data=1.0)], fid.Measured(torch.zeros(128), torch.ones(128, 128))
WRITERS = {
    "checkpoint.pt": lambda path: save({"a": IMAGES}, path),
    "a.npz": lambda path: save_images(IMAGES, path),
    "a.zip": lambda path: save_images(IMAGES, path),
    "a.png": lambda path: save_grid(IMAGES, path),
    "s.npz": lambda path: fid.save(MEASURED, path),
    "curve.png": lambda path: plots.curve(ROWS, {}, "FID", path)}


@contextlib.contextmanager
def small_disk(size):
    """Let no file of this process grow beyond `size` bytes: writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, name):
    path, write = tmp_path / name, WRITERS[name]
    path.write_bytes(b"old")
    with small_disk(2 ** 12), pytest.raises(OSError) as e:
        write(path)
    assert e.value.filename == str(path)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    write(path)
    assert path.stat().st_size > 2 ** 12


def test_a_file_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for target, name in (("file/a", "file"), ("folder", "folder"), ("a" * 300, "aaa")):
        with pytest.raises(OSError) as e, atomic(tmp_path / target) as tmp:
            tmp.write_bytes(b"x")
        assert name in e.value.filename and ".part" not in e.value.filename
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@contextlib.contextmanager
def child(work):
    """Another process that does work(), until it is killed."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def until(condition):
    """Wait for it, at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.0005)


@forks
def test_a_writer_that_is_killed_leaves_a_whole_file(tmp_path):
    """Ten times, while it writes: the file beside is there. The next save takes its place."""
    path, kept = tmp_path / "a.pt", []

    def write():
        for i in range(10 ** 6):
            save({"a": torch.full((300_000,), float(i)), "i": i}, path)
    for _ in range(10):
        with child(write):
            until(lambda: path.exists() and len([*tmp_path.iterdir()]) == 2)
        state = load(path)
        assert (state["a"] == state["i"]).all()
        kept.append(len([*tmp_path.iterdir()]))
    assert max(kept) == 2                               # some were killed in the middle
    save({"i": -1}, path)
    assert load(path) == {"i": -1} and [*tmp_path.iterdir()] == [path]


@forks
def test_a_run_that_is_killed_while_it_saves_goes_on_bit_for_bit(whole, tmp_path):
    """Twice, at its first and at its next save; what it leaves beside is taken away."""
    out, part = tmp_path / "killed", tmp_path / "killed/.checkpoint.part.pt"
    for again in ([], ["--resume"]):
        with child(lambda: start(out, *again, save_every=0.002)):
            until(part.exists)
            until(lambda: not part.exists() or again)
            until(part.exists)
    assert 2 <= saved(out)["seen"] < 12 and not (out / "result.json").exists()
    assert start(out, "--resume") == 0 and same_run(whole, out) and not part.exists()


@forks
def test_a_folder_is_one_runs_until_it_is_killed(here, tmp_path):
    folder = tmp_path / "runs/a"

    def hold():
        with claim(folder):
            (folder / "held").touch()
            time.sleep(600)
    with child(hold):
        until((folder / "held").exists)
        message = f"another run is writing to {folder}: choose another --out"
        for call in (lambda: start(folder), lambda: train_teacher.main(["--out", str(folder)]),
                     lambda: toy2d.main(["--out", str(folder)])):
            with pytest.raises(ValueError, match=message):
                call()
    with claim(folder) as mine:
        assert mine == folder


# ------------------------------------------------------------------- checkpoints are what they say

def broken(change):
    """Return a checkpoint's bytes after change(its state)."""
    d = distiller()
    d.step()
    state = {"rows": [], "seconds": 0.0} | d.state()
    blob = io.BytesIO()
    torch.save(change(state) or state, blob)
    return blob.getvalue()


CHECKPOINTS = {
    "another shape of moments": (           # torch would read beyond their end
        lambda s: s["opt_g"]["state"][0].update(exp_avg=torch.zeros(3)), "opt_g: exp_avg"),
    "other weights": (lambda s: s["G"].update({"model.map_layer0.bias": torch.zeros(3)}), "map_"),
    "no run's": (lambda s: {"ema": s["ema"]}, "not a run's checkpoint"),
    "of another script": (lambda s: s.update(config={"data": "cifar10"}), "another configuration")}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, name):
    """In a line that names the file and what is wrong."""
    change, message = CHECKPOINTS[name]
    (tmp_path / "checkpoint.pt").write_bytes(broken(change))
    cfg = Config(batch=8, wait_kimg=0.0, device="cpu", ess=0.0, norm="batch")
    with pytest.raises(ValueError, match=f"checkpoint.pt.*{message}") as e:
        distiller().load(begin(cfg, tmp_path, True, ()), tmp_path / "checkpoint.pt")
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize("size", [0, 1, 50, 5000, -1])
def test_a_torn_checkpoint_is_refused(tmp_path, size):
    (tmp_path / "checkpoint.pt").write_bytes(broken(lambda s: None)[:size])
    with pytest.raises(ValueError, match="checkpoint.pt: broken"):
        begin(Config(), tmp_path, True, ())
