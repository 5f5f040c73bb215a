"""train_teacher.py: a resumed run is the same run bit for bit, Muon moves the network's own
weights, and a teacher of any size notes in its file what its images are."""
import subprocess
import sys

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

IMAGES = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (40, 3, 8, 8), np.uint8))
LABELS = torch.arange(40) % 10
TINY = dict(data="none", width=8, batch=4, save_every=0.008, preview=1, device="cpu")
close = torch.testing.assert_close


def tiny(images=IMAGES, labels=None, **options):
    """Return a Trainer whose warm-up is over."""
    trainer = Trainer(TrainConfig(**TINY | options), images, labels)
    trainer.seen = 25_000
    return trainer


def test_the_default_network_fits_the_size():
    for size, levels in ((4, 1), (8, 2), (16, 3), (28, 3), (32, 3), (64, 4), (100, 3), (256, 6)):
        assert default_levels(size) == levels, size
    found = configuration(new_network(TrainConfig(levels=2), 16, 1, 10).state_dict())
    assert found | dict(dropout=0.0) == CONFIGS["compact"] | dict(
        resolution=16, channels=1, label_dim=10, channel_mult=[1, 2], attn_resolutions=[8])
    assert Trainer(TrainConfig(**TINY, labels=False), IMAGES, LABELS).net.label_dim == 0
    for shape, message in ((40, 3, 250, 250), "--size 128"), ((40, 3, 8, 6), "--size 6"):
        with pytest.raises(ValueError, match=message):
            tiny(torch.zeros(shape))


def test_init_starts_from_other_weights(tmp_path):
    """Classes that they do not know have no effect at first."""
    net, path = compact(), str(tmp_path / "a.pt")
    torch.save(net.state_dict(), path)
    images = torch.zeros(40, 3, 32, 32, dtype=torch.uint8)
    trainer, cond = tiny(images, init=path), tiny(images, LABELS % 2, init=path)
    assert equal(trainer.net.state_dict(), net.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(0))
    close(cond.ema(x, 0.5, torch.eye(2)), net(x, 0.5))
    assert all(p.requires_grad for p in cond.net.parameters())
    with pytest.raises(ValueError, match=r"of \(3, 32, 32\), .* of \(3, 8, 8\)"):
        tiny(IMAGES, init=path)


@pytest.mark.parametrize("flip, dropout", [(True, 0.25), (False, 0.0)])
def test_a_batch_is_mirrored_half_the_time_and_keeps_or_drops_its_labels(flip, dropout):
    """The images say their labels themselves, left of a black edge."""
    images = (20 * LABELS + 10).to(torch.uint8).view(40, 1, 1, 1).repeat(1, 1, 4, 4)
    images[..., 2:] = 0
    x0, sigma, _, c = tiny(images, LABELS, batch=600, flip=flip, label_dropout=dropout).batch()
    kept, mirrored = c.sum(1) == 1, x0[:, 0, 0, 0] == -1
    close((x0.amax((1, 2, 3))[kept] + 1) * 127.5, 10.0 + 20 * c.argmax(1)[kept])
    assert (c[~kept] == 0).all() and abs(1 - kept.float().mean() - dropout) <= dropout / 4
    assert abs(mirrored.float().mean() - flip / 2) <= flip / 10
    assert (x0[mirrored][..., :2] == -1).all() and (x0[~mirrored][..., 2:] == -1).all()
    close(torch.stack([sigma.log().mean(), sigma.log().std()]), torch.tensor([-1.2, 1.2]),
          rtol=0, atol=0.12)                                # EDM's, within two standard errors


def test_a_step_has_edms_loss_and_stops_where_it_is_not_finite():
    """EDM Eq. (2) with the weight of Table 1, 1 / sigma^2 + 1 / sigma_data^2."""
    trainer, (x0, sigma, noise, _) = tiny(), tiny().batch()
    D_x = trainer.net(x0 + sigma * noise, sigma)
    expected = ((1 / sigma ** 2 + 1 / 0.5 ** 2) * (D_x - x0) ** 2).mean()
    assert trainer.step() == pytest.approx(expected.item(), rel=1e-5)
    torch.nn.init.constant_(trainer.net.model.map_layer0.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="after 25004 images.*sigma"):
        trainer.step()


def test_weights_of_layers_are_learned_as_matrices():
    """One step of Muon is a rotation, down the gradient; the weights are the network's own."""
    trainer = tiny()
    before = {k: p.detach().clone() for k, p in trainer.net.named_parameters()}
    trainer.step()
    after = dict(trainer.net.named_parameters())
    assert all(p.grad.any() != torch.equal(p, before[name]) for name, p in after.items())
    name = "model.dec.8x8_aux_conv.weight"                  # (3, 8, 3, 3)
    step = (before[name] - after[name]).flatten(1) / trainer.muon.param_groups[0]["lr"]
    assert (step * after[name].grad.flatten(1)).sum() > 0
    values = torch.linalg.svdvals(step)
    assert 0.6 < values.min() and values.max() < 1.3


def test_the_rate_rises_falls_and_decays():
    trainer = tiny(kimg=2000, decay=400)
    for kimg, rate in ((0, 0), (5, 0.2), (25, 1), (400, 1), (1600, 0.5), (1900, 0.25 / 4.75 ** 0.5),
                       (2000, 0), (2100, 0), (1800, 0.5 / 4.5 ** 0.5)):
        trainer.seen = 1000 * kimg
        assert trainer.rate() == pytest.approx(rate), kimg
    trainer.step()
    assert trainer.muon.param_groups[0]["lr"] == pytest.approx(1e-2 * rate)
    assert trainer.adam.param_groups[0]["lr"] == pytest.approx(1.5e-3 * rate)


def test_ema_is_the_average_of_the_weights():
    trainer = tiny()
    ema, weights = (net.model.map_layer0.bias for net in (trainer.ema, trainer.net))
    for seen, half_life in ((0, 0.2), (25_000, 1250.2), (2_000_000, 50_000)):
        trainer.seen, old = seen, ema + 1                   # far from the weights
        ema.copy_(old)
        trainer.step()
        beta = 0.5 ** (4 / half_life)
        close(ema, beta * old + (1 - beta) * weights)


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


def test_command_line_trains_and_resumes(tmp_path, monkeypatch, capsys):
    """On grey images with labels; the second half of the run in another process than the first."""
    save_images(IMAGES[:, :1], tmp_path / "images.npz", LABELS % 2)
    run = ("--out run --data images.npz --size 16 --no-flip --width 8 --batch 10 "
           "--save-every 0.02 --preview 20").split()
    done = subprocess.run([sys.executable, train_teacher.__file__, *run, "--kimg", "0.04"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_teacher.loop, "tune_cpu", lambda: None)   # for the other tests' sake
    for bad, message in (("--resume --batch 8", "was 10, is 8"), ("--decay 2000", "is longer"),
                         ("--width 6", "of 4"), ("--resume --out typo", "nothing to resume")):
        with pytest.raises((ValueError, OSError), match=message):
            train_teacher.main([*run, *bad.split()])
    assert not (tmp_path / "typo").exists()
    train_teacher.main([*run, *"--kimg 0.08 --decay 0.02 --resume".split()])
    assert capsys.readouterr().out.startswith("80 images")
    net = load_teacher("run/teacher.pt")
    record = dict(data=str(tmp_path / "images.npz"), size=16, flip=False, sigma_data=0.5)
    assert record.items() <= net.record.items() and net.sigma_init is None
    assert sample(net, 4, steps=2).shape == (4, 1, 16, 16)
