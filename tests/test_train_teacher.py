"""train_teacher.py: a resumed run is the same run bit for bit, Muon moves the network's own
weights, and a teacher of any size notes in its file what its images are."""
import copy
import csv
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import train_teacher
from data import save_images
from edm import load_teacher, sample
from ncsnpp import CONFIGS, configuration
from test_edm import equal
from test_ncsnpp import compact
from train_teacher import TrainConfig, Trainer, default_levels, new_network

HERE = Path(train_teacher.__file__).parent
IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 8, 8), np.uint8))
LABELS = torch.arange(40) % 10
TINY = dict(data="none", width=8, batch=4, save_every=0.008, preview=1, device="cpu")
close = torch.testing.assert_close


def tiny(images=IMAGES, labels=None, **options):
    """Return a Trainer whose warm-up is over."""
    trainer = Trainer(TrainConfig(**TINY | options), images, labels)
    trainer.seen = 25_000
    return trainer


# ---------------------------------------------------------------------------------- its network

def test_the_default_network_fits_the_size():
    for size, levels in ((4, 1), (8, 2), (16, 3), (28, 3), (32, 3), (64, 4), (100, 3), (256, 6)):
        assert default_levels(size) == levels, size
    with pytest.raises(ValueError, match="250 x 250 .*--size 128"):
        default_levels(250)
    for size, channels, classes in ((32, 3, 0), (32, 3, 10), (16, 1, 10)):
        expected = CONFIGS["compact"] | dict(resolution=size, channels=channels, label_dim=classes,
                                             attn_resolutions=[size // 4])
        del expected["dropout"]                             # which no tensor says
        net = new_network(TrainConfig(), size, channels, classes)
        assert configuration(net.state_dict()) == expected


def test_the_network_is_an_option():
    found = configuration(tiny(width=12, levels=3, depth=2).net.state_dict())
    assert (found["model_channels"], found["num_blocks"]) == (12, 2)
    assert found["channel_mult"] == [1, 2, 4]
    with pytest.raises(ValueError, match="8 x 6 pixels: --size 6"):
        tiny(IMAGES[:, :, :6])


def test_init_starts_from_other_weights(tmp_path):
    net, path = compact(), str(tmp_path / "a.pt")
    torch.save(net.state_dict(), path)
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    trainer = tiny(images, init=path)
    for copied in (trainer.net, trainer.ema):
        assert equal(dict(copied.state_dict()), dict(net.state_dict()))
    cond = tiny(images, LABELS % 2, init=path)              # which does not look at its labels yet
    x, c = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0)), torch.eye(2)
    close(cond.ema(x, 0.5, c), net(x, 0.5))
    assert all(p.requires_grad for p in cond.net.parameters())
    torch.save(cond.weights(), path)
    for other, labels, message in ((images, LABELS, "for 2 classes .* none has 10 of"),
                                   (IMAGES, LABELS % 2, r"of \(3, 32, 32\), .* of \(3, 8, 8\)")):
        with pytest.raises(ValueError, match=message):
            tiny(other, labels, init=path)


# ------------------------------------------------------------------------------------- training

def test_training_learns_a_constant_image():
    trainer = tiny(torch.full((4, 1, 8, 8), 200, dtype=torch.uint8), lr=2e-2)
    losses = [trainer.step() for _ in range(30)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


def test_resume_is_bit_for_bit(tmp_path):
    """And the random numbers of the process that trains stay where they were."""
    how = dict(labels=LABELS, kimg=25.02, decay=0.012, label_dropout=0.5)
    before = torch.get_rng_state()
    straight, first = tiny(**how), tiny(**how)
    for trainer, steps in ((straight, 4), (first, 2)):
        for _ in range(steps):
            trainer.step()
    assert torch.equal(torch.get_rng_state(), before)
    torch.save(first.state(), tmp_path / "a.pt")
    torch.manual_seed(99)                                   # another process has another state
    second = tiny(**how)
    second.load(torch.load(tmp_path / "a.pt", weights_only=True), "a.pt")
    for _ in range(2):
        second.step()
    assert equal(straight.state(), second.state()) and not equal(first.state(), second.state())


def test_the_rate_rises_falls_and_decays():
    trainer = tiny(kimg=2000, decay=400)
    for kimg, rate in ((0, 0), (5, 0.2), (25, 1), (400, 1), (1600, 0.5), (1900, 0.25 / 4.75 ** 0.5),
                       (2000, 0), (2100, 0), (1800, 0.5 / 4.5 ** 0.5)):
        trainer.seen = 1000 * kimg
        assert trainer.rate() == pytest.approx(rate), kimg
    trainer.step()
    assert trainer.muon.param_groups[0]["lr"] == pytest.approx(1e-2 * rate)
    assert trainer.adam.param_groups[0]["lr"] == pytest.approx(1.5e-3 * rate)
    trainer.cfg.decay = 0.0
    assert trainer.rate() == pytest.approx(4.5 ** -0.5, rel=1e-3)


def test_ema_is_the_average_of_the_weights():
    trainer, name = tiny(), "model.map_layer0.bias"
    for seen, half_life in ((0, 0.2), (25_000, 1250.2), (2_000_000, 50_000)):
        trainer.seen, old = seen, trainer.ema.state_dict()[name] + 1        # far from the weights
        trainer.ema.state_dict()[name].copy_(old)
        trainer.step()
        beta = 0.5 ** (4 / half_life)
        close(trainer.ema.state_dict()[name],
              beta * old + (1 - beta) * trainer.net.state_dict()[name])
    assert not any(p.requires_grad for p in trainer.ema.parameters())   # nor grows a graph


@pytest.mark.parametrize("flip, dropout", [(True, 0.25), (False, 0.0)])
def test_a_batch_is_mirrored_half_the_time_and_keeps_or_drops_its_labels(flip, dropout):
    """The images say their labels themselves, left of a black edge."""
    images = (20 * LABELS + 10).to(torch.uint8).view(40, 1, 1, 1).repeat(1, 1, 4, 4)
    images[..., 2:] = 0
    how = dict(batch=600, flip=flip, label_dropout=dropout)
    x0, sigma, noise, c = tiny(images, LABELS, **how).batch()
    kept, mirrored = c.sum(1) == 1, x0[:, 0, 0, 0] == -1
    close((x0.amax((1, 2, 3))[kept] + 1) * 127.5, 10.0 + 20 * c.argmax(1)[kept])
    assert (c[~kept] == 0).all() and abs(1 - kept.float().mean() - dropout) <= dropout / 4
    assert abs(mirrored.float().mean() - flip / 2) <= flip / 10
    assert (x0[mirrored][..., :2] == -1).all() and (x0[~mirrored][..., 2:] == -1).all()
    assert not torch.equal(noise, tiny(images, LABELS, seed=1, **how).batch()[2])
    assert sigma.shape == (600, 1, 1, 1)
    close(torch.stack([sigma.log().mean(), sigma.log().std()]), torch.tensor([-1.2, 1.2]),
          rtol=0, atol=0.12)                                # EDM's, within two standard errors


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = tiny()
    torch.nn.init.constant_(trainer.net.model.map_layer0.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="after 25000 images.*sigma"):
        trainer.step()


def test_weights_of_layers_are_learned_as_matrices():
    """The views that Muon moves are the network's own weights, after a resume too."""
    trainer, again = tiny(), tiny()
    before = copy.deepcopy(trainer.net.state_dict())
    trainer.step()
    again.load(copy.deepcopy(trainer.state()), "run")
    for t in (trainer, again):
        assert {p.ndim for p in t.matrices} == {2, 4}
        assert all(f.data_ptr() == p.data_ptr() for f, p in zip(t.flat, t.matrices))
    moved = {k for k, v in trainer.net.state_dict().items() if not torch.equal(v, before[k])}
    assert {k for k, p in trainer.net.named_parameters() if p.grad.any()} == moved
    name = "model.dec.8x8_aux_conv.weight"                    # one step of Muon: a rotation
    step = (before[name] - trainer.net.state_dict()[name]).flatten(1)
    values = torch.linalg.svdvals(step / trainer.muon.param_groups[0]["lr"])
    assert 0.6 < values.min() and values.max() < 1.3


# ----------------------------------------------------------------------------------- the command

def in_process(monkeypatch, folder, *args):
    """Run train_teacher.main on a command line, in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_teacher.loop, "tune_cpu", lambda: None)   # for the other tests' sake
    return train_teacher.main([str(a) for a in args])


def test_command_line_trains_and_resumes(tmp_path, monkeypatch, capsys):
    """On grey images with labels; the second half of the run in another process than the first."""
    save_images(IMAGES[:, :1], tmp_path / "images.npz", LABELS % 2)
    run = ("--out", "run", "--data", "images.npz", "--size", 16, "--no-flip", "--width", 8,
           "--batch", 10, "--save-every", 0.02, "--preview", 20)
    words = [sys.executable, HERE / "train_teacher.py", *run, "--kimg", 0.04]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "M parameters, 2 classes; on cpu, 1 threads" in done.stderr
    for bad, message in (((), "add --resume"), (("--resume", "--batch", 8), "--batch was 10, is 8"),
                         (("--decay", 2000), "--decay 2000 is longer"), (("--width", 6), "of 4")):
        with pytest.raises((ValueError, OSError), match=message):
            in_process(monkeypatch, tmp_path, *run, *bad)
    in_process(monkeypatch, tmp_path, *run, "--kimg", 0.08, "--decay", 0.02, "--resume")
    assert capsys.readouterr().out.startswith("80 images")
    assert {p.name for p in (tmp_path / "run").iterdir()} == \
        {"checkpoint.pt", "teacher.pt", "log.csv", "samples.png", ".lock"}
    rows = list(csv.DictReader((tmp_path / "run/log.csv").open()))
    assert [r["kimg"] for r in rows] == ["0", "0.02", "0.04", "0.06", "0.08"]
    assert all(float(r["loss"]) > 0 for r in rows[1:])
    small, full = (torch.load(tmp_path / "run" / name, weights_only=True)
                   for name in ("teacher.pt", "checkpoint.pt"))
    assert set(small) == {"config", "record", "seen", "ema"} and small["seen"] == 80
    assert equal(dict(small["ema"]), dict(full["ema"]))
    net = load_teacher(tmp_path / "run/teacher.pt")
    record = dict(data=str(tmp_path / "images.npz"), size=16, flip=False, dropout=0.0,
                  sigma_data=0.5)
    assert record.items() <= net.record.items() and net.sigma_init is None
    assert sample(net, 4, steps=2).shape == (4, 1, 16, 16)
    assert "EDM's defaults" not in capsys.readouterr().err  # nothing had to be guessed


def test_a_run_in_a_notebook_leaves_the_rest_as_it_was(tmp_path):
    """It takes a text for its folder, runs in a thread, and takes none of the host's noise."""
    save_images(IMAGES, tmp_path / "images.npz", LABELS)
    cfg = TrainConfig(**TINY | dict(data=str(tmp_path / "images.npz"), kimg=0.008, labels=False))
    before = torch.get_rng_state()
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train_teacher.train, cfg, str(tmp_path / "thread")).result() == 0
    assert torch.equal(torch.get_rng_state(), before)
    net = load_teacher(tmp_path / "thread/teacher.pt")
    assert (net.resolution, net.label_dim) == (8, 0)
