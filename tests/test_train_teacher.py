"""train_teacher.py: a resumed run is the same run bit for bit, Muon moves the network's own
weights, and a teacher of any size notes in its file what its images are."""
import copy
import csv
import io
import math
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
TINY = dict(data="none", width=8, batch=4, warmup_kimg=0.01, save_every=0.008, preview=0,
            device="cpu")
close = torch.testing.assert_close


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
    cfg = TrainConfig(**TINY | dict(kind="ncsn++", width=12, levels=3, depth=2))
    found = configuration(Trainer(cfg, IMAGES).net.state_dict())
    assert found["encoder_type"] == "residual" and found["num_blocks"] == 2
    assert (found["model_channels"], found["channel_mult"]) == (12, [1, 2, 4])
    for options, message in ((dict(levels=6), "multiples of 32"), (dict(width=6), "multiple of 4")):
        with pytest.raises(ValueError, match=message):
            Trainer(TrainConfig(**TINY | options), IMAGES)
    with pytest.raises(ValueError, match="8 x 6 pixels: --size 6"):
        Trainer(TrainConfig(**TINY), IMAGES[:, :, :6])


def test_init_starts_from_other_weights(tmp_path):
    net, path = compact(), str(tmp_path / "a.pt")
    torch.save(net.state_dict(), path)
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    cfg = TrainConfig(**TINY, init=path)
    trainer = Trainer(cfg, images)
    for copied in (trainer.net, trainer.ema):
        assert equal(dict(copied.state_dict()), dict(net.state_dict()))
    cond = Trainer(cfg, images, LABELS % 2)                 # which does not look at its labels yet
    x, c = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0)), torch.eye(2)
    close(cond.ema(x, 0.5, c), net(x, 0.5))
    assert all(p.requires_grad for p in cond.net.parameters())
    with pytest.raises(ValueError, match=r"is for images of \(3, 32, 32\), not of \(3, 8, 8\)"):
        Trainer(cfg, IMAGES)
    for saved, message in ((cond.weights(), "a.pt has 2 classes, none 10"),
                           ({"config": {"sigma_init": 2.5}, "ema": net.state_dict()}, "a student")):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=message):
            Trainer(cfg, images, LABELS)


# ------------------------------------------------------------------------------------- training

def test_training_learns_a_constant_image():
    images = torch.full((4, 1, 8, 8), 200, dtype=torch.uint8)
    trainer = Trainer(TrainConfig(**TINY | dict(lr=2e-2, lr_vectors=1e-2)), images)
    losses = [trainer.step() for _ in range(30)]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:5])


@pytest.mark.parametrize("labels, options", [(None, dict(dropout=0.1)),
                                             (LABELS, dict(label_dropout=0.5))])
def test_resume_is_bit_for_bit(labels, options):
    """And the random numbers of the process that trains stay where they were."""
    cfg = TrainConfig(**TINY, kimg=0.02, decay=0.012, **options)
    before = torch.get_rng_state()
    straight = Trainer(cfg, IMAGES, labels)
    for _ in range(4):
        straight.step()
    assert torch.equal(torch.get_rng_state(), before)
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
    trainer, masks = Trainer(TrainConfig(**TINY, dropout=0.5), IMAGES), []
    forward = trainer.net.forward
    monkeypatch.setattr(trainer.net, "forward",
                        lambda *a: masks.append(torch.rand(4)) or forward(*a))
    trainer.step(), trainer.step()
    assert not torch.equal(*masks)


def test_the_rate_rises_falls_and_decays():
    cfg = TrainConfig(**TINY | dict(kimg=100, warmup_kimg=10, ref_kimg=20, decay=20))
    trainer = Trainer(cfg, IMAGES)
    for kimg, rate in ((0, 0), (5, 0.5), (10, 1), (20, 1), (80, 0.5), (95, 0.25 / math.sqrt(4.75)),
                       (100, 0), (120, 0), (90, 0.5 / math.sqrt(4.5))):
        trainer.seen = 1000 * kimg
        assert trainer.rate() == pytest.approx(rate), kimg
    trainer.step()
    assert trainer.muon.param_groups[0]["lr"] == pytest.approx(cfg.lr * rate)
    assert trainer.adam.param_groups[0]["lr"] == pytest.approx(cfg.lr_vectors * rate)
    trainer.cfg.decay, trainer.cfg.warmup_kimg = 0.0, 0.0
    for trainer.seen, rate in ((0, 1), (100_000, math.sqrt(0.2))):
        assert trainer.rate() == pytest.approx(rate)


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
    images = (torch.arange(10, dtype=torch.uint8) * 20)[:, None, None, None].expand(10, 3, 8, 8)
    cfg = TrainConfig(**TINY | dict(batch=400, label_dropout=0.25))
    x0, _, _, c = Trainer(cfg, images, torch.arange(10)).batch()
    kept = c.sum(1) == 1
    assert torch.equal(c[kept].argmax(1), ((x0[kept, 0, 0, 0] + 1) * 127.5 / 20).round().long())
    assert (c[~kept] == 0).all() and 0.15 < 1 - kept.float().mean() < 0.35
    cfg.label_dropout = 0.0
    assert (Trainer(cfg, images, torch.arange(10)).batch()[3].sum(1) == 1).all()
    cfg.labels = False
    assert Trainer(cfg, images, torch.arange(10)).batch()[3] is None
    for bad, message in ((LABELS[:5], r"\(5,\)"), (LABELS - 1, "from -1"), (None, "no labels")):
        with pytest.raises(ValueError, match=message):
            Trainer(TrainConfig(**TINY, label_dropout=0.1), IMAGES, bad)


def test_half_of_the_images_are_mirrored_or_none():
    image = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    for flip, low, high in ((True, 0.4, 0.6), (False, 0, 0)):
        x0, *_ = Trainer(TrainConfig(**TINY | dict(batch=400, flip=flip)), image).batch()
        mirrored = (x0 == (image / 127.5 - 1).flip(3)).all((1, 2, 3))
        assert torch.equal(x0[~mirrored], (image / 127.5 - 1).expand(400, 1, 8, 8)[~mirrored])
        assert low <= mirrored.float().mean() <= high


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    torch.nn.init.constant_(trainer.net.model.map_layer0.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="after 0 images.*sigma"):
        trainer.step()


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
    name = "model.dec.8x8_aux_conv.weight"                    # one step of Muon: a rotation
    step = (before[name] - trainer.net.state_dict()[name]).flatten(1)
    values = torch.linalg.svdvals(step / trainer.muon.param_groups[0]["lr"])
    assert 0.6 < values.min() and values.max() < 1.3


def test_moments_of_another_shape_are_refused():
    """torch itself takes these; its fused kernel would then read beyond the smaller tensors."""
    trainer = Trainer(TrainConfig(**TINY), IMAGES)
    trainer.step()
    for optimizer, moment in (("adam", "exp_avg"), ("muon", "momentum_buffer")):
        state = copy.deepcopy(trainer.state())
        state[optimizer]["state"][3][moment] = torch.zeros(1)
        with pytest.raises(ValueError, match=rf"a.pt: .*{optimizer}: {moment} is \(1,\)"):
            Trainer(TrainConfig(**TINY), IMAGES).load(state, "a.pt")


# ----------------------------------------------------------------------------------- the command

RUN = ("--data", "images.npz", "--size", "16", "--no-flip", "--width", 8, "--batch", 10,
       "--save-every", 0.02, "--preview", 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with grey images and labels, and a run of four steps through the command line."""
    folder = tmp_path_factory.mktemp("run")
    save_images(IMAGES[:, :1], folder / "images.npz", LABELS % 2)
    words = [sys.executable, HERE / "train_teacher.py", "--out", "run", *RUN, "--kimg", 0.04]
    done = subprocess.run(list(map(str, words)), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "M parameters, 2 classes; on cpu, 1 threads" in done.stderr
    return folder


def in_process(monkeypatch, folder, *args):
    """Run train_teacher.main on a command line, in `folder`."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(train_teacher.loop, "tune_cpu", lambda: None)   # for the other tests' sake
    return train_teacher.main([str(a) for a in args])


def test_command_line_trains_and_resumes(folder, monkeypatch, capsys):
    assert {p.name for p in (folder / "run").iterdir()} == \
        {"checkpoint.pt", "teacher.pt", "log.csv", "samples.png", ".lock"}
    in_process(monkeypatch, folder, "--out", "run", *RUN, "--kimg", 0.08, "--decay", 0.02,
               "--resume")
    assert capsys.readouterr().out.startswith("80 images")
    rows = list(csv.DictReader((folder / "run/log.csv").open()))
    assert [r["kimg"] for r in rows] == ["0", "0.02", "0.04", "0.06", "0.08"]
    assert all(float(r["loss"]) > 0 for r in rows[1:])
    small, full = (torch.load(folder / "run" / name, weights_only=True)
                   for name in ("teacher.pt", "checkpoint.pt"))
    assert set(small) == {"config", "record", "seen", "ema"} and small["seen"] == 80
    assert equal(dict(small["ema"]), dict(full["ema"]))
    for name in ("teacher.pt", "checkpoint.pt"):
        net = load_teacher(folder / "run" / name)
        record = dict(data=str(folder / "images.npz"), size=16, channels=1, flip=False,
                      dropout=0.0, sigma_data=0.5)
        assert record.items() <= net.record.items() and net.sigma_init is None
        assert sample(net, 4, steps=2).shape == (4, 1, 16, 16)
    assert capsys.readouterr().err == ""                    # nothing had to be guessed


def test_a_run_in_a_notebook_leaves_the_rest_as_it_was(folder):
    """It takes a text for its folder, runs in a thread, and takes none of the host's noise."""
    cfg = TrainConfig(**TINY | dict(data=str(folder / "images.npz"), kimg=0.008))
    before = torch.get_rng_state()
    with ThreadPoolExecutor() as pool:
        assert pool.submit(train_teacher.train, cfg, str(folder / "thread")).result() == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert load_teacher(folder / "thread/teacher.pt").resolution == 8


def test_command_line_errors(folder, monkeypatch, capsys):
    (folder / "file").touch()
    (folder / "other").mkdir()
    state = torch.load(folder / "run/checkpoint.pt", weights_only=True)
    (folder / "broken").mkdir()
    torch.save(state | {"net": {}}, folder / "broken/checkpoint.pt")
    new, again = ("--out", "other", *RUN), ("--out", "run", *RUN)
    for args, message in (
            (("--out", "x", "--data", "nowhere"), "nowhere"),
            (("--out", "file/x", "--data", "images.npz"), "file"),
            ((*new, "--kimg", "0"), "--kimg"), ((*new, "--resume"), "other"),
            ((*new, "--kimg", "1", "--decay", "2"), "--decay"),
            ((*new, "--no-labels", "--label-dropout", "0.1"), "--label-dropout"),
            (again, "--resume"), ((*again, "--resume", "--batch", "8"), "--batch was 10, is 8"),
            (("--out", "broken", *RUN, "--resume"), "broken/checkpoint.pt: not a checkpoint")):
        with pytest.raises((ValueError, OSError, SystemExit)) as error:
            in_process(monkeypatch, folder, *args)
        said = capsys.readouterr().err if error.type is SystemExit else str(error.value)
        assert message in said, (args, said)
    assert [p.name for p in (folder / "other").iterdir()] == [".lock"]
