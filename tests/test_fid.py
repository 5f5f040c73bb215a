"""fid.py against recorded Inception outputs (fixtures/), closed forms, Pillow, SciPy's sqrtm, NumPy
and brute force."""
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import data
import fid
from plumbing.features import Inception, read_net, train_classifier

TOP = Path(__file__).parent.parent
FIXTURE = json.loads((TOP / "fixtures/inception.json").read_text())
MU, SIGMA = np.zeros(128), np.eye(128)
close = torch.testing.assert_close


def fill(net):
    """Set every tensor from RandomState(its place in the sorted state dict): the fixture's rule."""
    state = net.state_dict()
    for place, name in enumerate(sorted(state)):
        if name.endswith("num_batches_tracked"):
            continue
        v = np.random.RandomState(place).standard_normal(tuple(state[name].shape))
        if name.endswith("running_var"):
            v = 1 + 0.1 * np.abs(v)
        elif name.endswith("bn.weight"):
            v = 1 + 0.1 * v
        else:
            v *= np.sqrt(2 / np.prod(v.shape[1:])) if v.ndim >= 2 else 0.1
        state[name].copy_(torch.from_numpy(v))
    return state


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The network with the fixture's weights, read as the public file of these names is."""
    state = {k: v for k, v in fill(Inception()).items() if not k.endswith("num_batches_tracked")}
    assert {k: list(v.shape) for k, v in state.items()} == FIXTURE["tensors"]
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return read_net("inception", path)


@pytest.fixture(scope="module")
def compact():
    return fid.load_net()


def textures(n, seed=0, size=32):
    """Images with structure at several scales, of no dataset: smoothed noise, tinted."""
    g = torch.Generator().manual_seed(seed)
    x = sum(torch.nn.functional.interpolate(torch.randn(n, 3, s, s, generator=g), size=size,
                                            mode="bilinear") for s in (2, 4, 8, 16))
    return (x * 40 + 128).round().clamp(0, 255).to(torch.uint8)


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def measured(features):
    return fid.Measured(*fid.stats(features), len(features), features=features)


@pytest.mark.parametrize("how, key", [("tf", "tf_bilinear"), ("clean", "pil_bicubic")])
def test_inception_outputs(inception, how, key):
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    features, logits = fid.extract(torch.from_numpy(images), inception, how)
    expected = FIXTURE[key]
    close(features[:, ::64], torch.tensor(expected["pool_every64"]), rtol=0, atol=2e-6)
    close(features.mean(1), torch.tensor(expected["pool_mean"]), rtol=0, atol=1e-6)
    close(features.std(1, correction=0), torch.tensor(expected["pool_std"]), rtol=1e-3, atol=0)
    close(logits[:, ::63], torch.tensor(expected["logits_unbiased_every63"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, 512])
def test_clean_resize_is_pillows(size):
    image = textures(1, size=size)[0]
    expected = np.stack([np.asarray(Image.fromarray(c.astype(np.float32)).resize(
        (299, 299), Image.Resampling.BICUBIC)) for c in image.numpy()]).clip(0, 255)
    close(fid.resize(image[None].float(), 299)[0], torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_tf_resize_is_bilinear_without_half_pixels():
    image, at = textures(1).float(), np.arange(299) * 32 / 299
    A = np.stack([np.interp(at, np.arange(32), row) for row in np.eye(32)], axis=1)
    A = torch.from_numpy(A).float()                             # (299, 32)
    close(fid.resize(image, 299, "tf"), A @ image @ A.T, rtol=0, atol=1e-3)


def test_grey_and_floats_are_what_a_saved_rgb_file_would_be(compact):
    x = textures(4, size=40)[:, :1, :28]
    expected = fid.extract(x.expand(-1, 3, -1, -1), compact)
    noisy = x + torch.linspace(-0.4, 0.4, x.numel()).view(x.shape)
    noisy[x == 255] += 50
    close(fid.extract(noisy, compact), expected)
    with pytest.raises(ValueError, match=r"\[0, 255\]"):
        fid.extract(x / 127.5 - 1, compact)


def random_stats(d, seed, n=None):
    x = normal(n or 4 * d, d, seed).double()
    return fid.stats(x @ normal(d, d, seed + 100).double() / d ** 0.5 + seed)


def test_stats_are_numpys():
    x = np.random.RandomState(0).standard_normal((5000, 7)) + 3         # more than one part
    mu, sigma = fid.stats(torch.from_numpy(x))
    close(mu, torch.from_numpy(x.mean(0)))
    close(sigma, torch.from_numpy(np.cov(x.T)))
    with pytest.raises(ValueError, match="at least 2"):
        fid.stats(torch.zeros(1, 7))


@pytest.mark.parametrize("n, rel", [(256, 1e-8), (10, 1e-6)])             # of 10 it is singular
def test_frechet_is_scipys_sqrtm(n, rel):
    (mu1, s1), (mu2, s2) = random_stats(64, 0, n), random_stats(64, 10)
    root = np.trace(scipy.linalg.sqrtm((s1 @ s2).numpy())).real
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert fid.frechet(mu1, s1, mu2, s2) == pytest.approx(expected.item(), rel=rel)
    assert fid.frechet(mu2, s2, mu1, s1) == pytest.approx(expected.item(), rel=rel)


def test_frechet_of_a_set_and_itself():
    for n in (10, 64, 65, 1000):
        mu, sigma = random_stats(64, 3, n)
        assert abs(fid.frechet(mu, sigma, mu, sigma)) < 1e-6
        rounded = sigma.float().double()                    # negative eigenvalues are rounding
        assert fid.frechet(mu, rounded, mu, rounded) < 1e-2 * rounded.trace()
    with pytest.raises(ValueError, match="eigenvalue -"):
        fid.frechet(mu, sigma, mu, sigma - sigma.trace() / 64 * torch.eye(64))


def test_bias_is_what_more_images_take_away():
    """A set against many images of its own kind: the truth is near 0. Two classes take turns."""
    few, many = (measured(normal(n, 32, seed=n) + torch.arange(n)[:, None] % 2)
                 for n in (600, 12_000))
    value = fid.frechet(few.mu, few.sigma, many.mu, many.sigma)
    assert fid.bias(few, many) == pytest.approx(value, rel=0.2)
    assert fid.bias(measured(normal(64, 32)), many) is None


def test_inception_score_is_its_definition():
    logits = normal(103, 7).double() * 2
    p = fid.shuffled(logits).softmax(1).numpy()
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean())
              for part in np.array_split(p, 4)]
    assert fid.inception_score(logits, 4) == pytest.approx((np.mean(scores), np.std(scores)))
    for classes in (torch.arange(5000) // 500, torch.arange(5000) % 10):    # sorted, in turn
        assert fid.inception_score(torch.eye(10)[classes] * 1e4)[0] == pytest.approx(10, rel=0.02)


# ------------------------------------------------------------------------------ precision, recall

def brute_force(real, generated, k=3, k_coverage=5):
    """Return the papers' formulas, sample by sample, in float64."""
    real, generated = real.double().numpy(), generated.double().numpy()
    gap = lambda x, y: np.linalg.norm(x - y, axis=-1)               # noqa: E731
    ball = lambda x, k: [np.sort(gap(x[i], np.delete(x, i, 0)))[k - 1]       # noqa: E731
                         for i in range(len(x))]
    r, r5, g = ball(real, k), ball(real, k_coverage), ball(generated, k)
    pairs = [(gap(x, real) <= r5).sum() for x in generated]
    return {"precision": np.mean([(gap(x, real) <= r).any() for x in generated]),
            "recall": np.mean([(gap(x, generated) <= g).any() for x in real]),
            "density": np.mean(pairs) / k_coverage,
            "coverage": np.mean([gap(x, generated).min() <= s for x, s in zip(real, r5)])}


def test_precision_and_recall_are_brute_forces(monkeypatch):
    monkeypatch.setattr(fid, "CELLS", 7 * 50)                   # 7 rows a time
    spread = normal(50, 3) + 20, normal(83, 3, seed=1) * 0.7 + 20.5
    centres = torch.tensor([999.0, 1001.0]).repeat(100)[:, None]
    tight = [normal(200, 8, seed).double() * 1e-4 + centres for seed in (0, 1)]     # far from 0
    for sets, k in ((spread, (1, 2)), (tight, (3, 5))):
        got = fid.precision_recall(*sets, *k)
        assert got == pytest.approx(brute_force(*sets, *k))
        assert all(0.1 < got[name] < 1 for name in ("recall", "coverage"))


def test_copies_are_inside_and_no_sample_is_its_own_neighbour():
    real = normal(41, 257) * 100 + 1000                     # far from 0: distances round
    assert fid.precision_recall(real, real.clone()) == pytest.approx(brute_force(real, real))
    copied = fid.precision_recall(real.repeat(6, 1), torch.cat([real, real[:7] + 50]))
    assert copied["precision"] == pytest.approx(41 / 48) and copied["coverage"] == 1


def test_variety_takes_equal_counts_whatever_the_order_of_the_larger_set():
    real, generated = normal(600, 4), normal(100, 4, seed=1)
    for x in (real, generated):
        x[:, 0] += 20 * (torch.arange(len(x)) % 6)              # six classes take turns
    for order in (torch.arange(600), real[:, 0].argsort()):
        result = fid.variety(measured(generated), measured(real[order]))
        assert result["images"] == 100 and result["recall"] > 0.7 and result["coverage"] > 0.8
    assert fid.variety(measured(real), measured(generated))["images"] == 100


# ------------------------------------------------------------------- sets of images, the command

def test_a_set_is_measured_and_survives_its_file(compact, tmp_path):
    a = fid.measure(textures(101), compact)                     # more than one batch
    features, logits = compact(textures(101).float())
    close((a.mu, a.sigma), fid.stats(features), rtol=0, atol=1e-5)
    assert a.score == pytest.approx(fid.inception_score(logits), rel=1e-5)
    a.n, a.features = 5001, normal(5001, 128)
    fid.save(a, tmp_path / "a.npz")
    b = fid.load(tmp_path / "a.npz")
    close((a.mu, a.sigma), (b.mu, b.sigma), rtol=0, atol=0)
    assert (b.n, tuple(b.score), b.resize) == (5001, a.score, "clean")
    close(b.features, fid.shuffled(a.features)[:5000].half().float(), rtol=0, atol=0)
    assert fid.bias(b, a) is None                               # 5,000 features of 5,001 images


def test_noise_takes_the_teachers_samples_away_from_cifar10_step_by_step(compact):
    images = data.load_images(TOP / "pretrained/compact_teacher_samples.zip")[0][:600].float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    sets = [fid.measure(images + level * noise, compact) for level in (0, 15, 60)]
    values = [fid.compare(m, fid.find("cifar10", compact))["value"] for m in sets]
    assert values == sorted(values) and values[-1] > 5 * values[0], values


@pytest.fixture
def run(capsys, monkeypatch):
    """Run fid.py with these arguments, in this process, and return what it prints."""
    monkeypatch.setattr(fid, "tune_cpu", lambda: None)          # it would stay for other tests

    def call(*args):
        fid.main([str(arg) for arg in args])
        return capsys.readouterr().out
    return call


@pytest.fixture(scope="module")
def sources(tmp_path_factory, compact):
    """Twenty images, and statistics alone, of images that would vary four times as much."""
    root, images = tmp_path_factory.mktemp("sources"), textures(20)
    np.savez(root / "images.npz", images=images)
    mu, sigma = fid.stats(fid.extract(images, compact)[0])
    np.savez(root / "wide.npz", mu=mu, sigma=4 * sigma)
    return root


def test_a_set_against_itself_is_at_zero_without_bias_and_no_json_has_nan(sources, run, tmp_path):
    images, black = sources / "images.npz", tmp_path / "black.npy"
    np.save(black, np.zeros((9, 3, 32, 32), np.uint8))
    result = json.loads(run(images, images, "--json", "--save", tmp_path / "a.npz"))
    assert result["value"] == result["bias"] == 0 and result["n"] == [20, 20]
    assert result["variety"]["precision"] == result["variety"]["recall"] == 1
    assert json.loads(run(tmp_path / "a.npz", images, "--json"))["value"] == 0
    wide = json.loads(run(images, sources / "wide.npz", "--json"))
    assert wide["variance"] == pytest.approx(0.25)
    for name in (black, images):
        out = run(name, black, "--json")
        assert "NaN" not in out and "Infinity" not in out and json.loads(out)["variance"] is None


@pytest.mark.parametrize("name", ["images.npz", "cifar10"])
def test_it_says_against_what_of_how_many_images_and_how(sources, run, monkeypatch, name):
    """The shipped statistics are of the whole set, so for a part of it CIFAR-10 is downloaded."""
    monkeypatch.chdir(sources)
    monkeypatch.setattr(data, "download", lambda *a: sources / "images.npz")
    out = run(name, "-n", 7)
    assert "to cifar10: 7 images against 50,000 images, resize clean" in out
    assert "FID" not in out and "IS-compact" in out and "7 images each" in out


def test_the_classifier_learns_two_colours_beside_what_is_shipped(tmp_path, run, monkeypatch):
    labels = torch.arange(2).repeat_interleave(24)

    def two_colours(source, split):
        seed = 0 if split == "train" else 2
        return torch.cat([textures(24, seed) // 3, textures(24, seed + 1) // 3 + 150]), labels

    monkeypatch.setattr(fid, "load_images", two_colours)
    monkeypatch.setattr(fid, "train_classifier", partial(train_classifier, batch=8))
    monkeypatch.chdir(tmp_path)
    assert "1.0000 of the test images right" in run("train", "--epochs", 8)
    assert fid.load(tmp_path / "runs/classifier" / fid.REFERENCE.name).n == 48


@pytest.mark.parametrize("arrays, args, reason", [
    ({}, "wide.npz -n 5", "-n takes"), ({}, "nowhere", "nowhere"), ({}, "wide.npz c:\\a", "c:\\a"),
    ({}, "images.npz --save a.txt", "saved as .npz"), ({}, "images.npz:test", "no test images"),
    (dict(mu=MU, sigma=SIGMA, resize="tf"), "bad.npz", "measured with --resize tf"),
    (dict(mu=np.zeros(2048), sigma=SIGMA), "bad.npz --features inception", "does not say"),
    (dict(mu=MU[:64], sigma=SIGMA[:64, :64]), "bad.npz", "64 features"),
    (dict(mu=MU), "bad.npz", "sigma"), (dict(mu=MU, sigma=SIGMA * np.nan), "bad.npz", "finite")])
def test_what_cannot_be_measured_is_refused_before_it_is(arrays, args, reason, sources, run,
                                                         compact, inception, monkeypatch, capsys):
    monkeypatch.chdir(sources)
    monkeypatch.setattr(fid, "load_net", dict(compact=compact, inception=inception).get)
    monkeypatch.setattr(fid, "extract", None)
    np.savez("bad.npz", **arrays)
    with pytest.raises((ValueError, OSError, SystemExit)) as e:
        run(*args.split())
    assert reason in str(e.value) + capsys.readouterr().err
