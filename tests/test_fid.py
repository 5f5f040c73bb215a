"""fid.py against recorded Inception outputs (fixtures/), closed forms, Pillow, SciPy's sqrtm, NumPy
and brute force."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import data
import fid
from plumbing.cli import run_main
from plumbing.features import Classifier, Inception, read_net, train_classifier

TOP = Path(__file__).parent.parent
FIXTURE = json.loads((TOP / "fixtures/inception.json").read_text())
close = torch.testing.assert_close
double = torch.float64


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
    with pytest.raises(ValueError, match="weights.pth: not weights of the compact"):
        read_net("compact", path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fid, "download", lambda url, sha256: path)
        return fid.load_net("inception")


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


# ------------------------------------------------------------------------- the networks, the resize

@pytest.mark.parametrize("how, key", [("tf", "tf_bilinear"), ("clean", "pil_bicubic")])
def test_inception_outputs(inception, how, key):
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    features, logits = fid.extract(torch.from_numpy(images), inception, how)
    expected = FIXTURE[key]
    close(features[:, ::64], torch.tensor(expected["pool_every64"]), rtol=0, atol=2e-6)
    close(features.mean(1), torch.tensor(expected["pool_mean"]), rtol=0, atol=1e-6)
    close(features.std(1, correction=0), torch.tensor(expected["pool_std"]), rtol=1e-3, atol=0)
    close(logits[:, ::63], torch.tensor(expected["logits_unbiased_every63"]), rtol=0, atol=1e-5)


def test_classifier_learns_two_colours_and_survives_its_file(tmp_path):
    images = torch.cat([textures(24) // 3, textures(24, seed=1) // 3 + 150])
    labels = torch.arange(2).repeat_interleave(24)
    state = train_classifier(images, labels, epochs=8, batch=8)
    assert state["head.weight"].dtype == torch.float16
    torch.save(state, tmp_path / "c.pt")
    net = read_net("compact", tmp_path / "c.pt")
    new = torch.cat([textures(9, 2) // 3, textures(9, 3) // 3 + 150])
    assert fid.extract(new, net)[1].argmax(1).tolist() == [0] * 9 + [1] * 9
    with pytest.raises(ValueError, match="labels from 0 to 9"):
        train_classifier(images, None, batch=8)


@pytest.mark.parametrize("size", [32, 512])
def test_clean_resize_is_pillows(size):
    image = textures(1, size=size)[0]
    expected = np.stack([np.asarray(Image.fromarray(c.astype(np.float32)).resize(
        (299, 299), Image.Resampling.BICUBIC)) for c in image.numpy()]).clip(0, 255)
    close(fid.resize(image[None].float(), 299)[0], torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_tf_resize_is_bilinear_between_corners_without_half_pixels():
    x = textures(1)[0].float()
    y = fid.resize(x[None], 299, "tf")[0]
    for i, j in [(0, 0), (1, 5), (150, 77), (298, 298)]:
        (v, a), (u, b) = divmod(i * 32 / 299, 1), divmod(j * 32 / 299, 1)
        rows, columns = [int(v), min(int(v) + 1, 31)], [int(u), min(int(u) + 1, 31)]
        corners = x[:, rows][:, :, columns]                                 # (3, 2, 2)
        expected = torch.tensor([1 - a, a]) @ corners @ torch.tensor([1 - b, b])
        close(y[:, i, j], expected, rtol=0, atol=1e-3)


def test_grey_and_floats_are_what_a_saved_rgb_file_would_be(compact):
    x = textures(4, size=40)[:, :1, :28]
    expected = fid.extract(x.expand(-1, 3, -1, -1), compact)
    close(fid.extract(x, compact), expected)
    noisy = x + torch.linspace(-0.4, 0.4, x.numel()).view(x.shape)
    noisy[x == 255] += 50
    close(fid.extract(noisy, compact), expected)


@pytest.mark.parametrize("low", [0, -1])
def test_floats_in_another_range_than_0_to_255_are_refused(compact, low):
    x = low + (1 - low) * textures(4).float() / 255
    with pytest.raises(ValueError, match=r"above 2: .*\[0, 255\]"):
        fid.measure(x, compact)
    x[3, 0, 0, 0] = 3
    assert fid.measure(x, compact).n == 4                   # a set that is nearly black


# ------------------------------------------------------------------------------- Fréchet distance

def random_stats(d, seed, n=None):
    x = normal(n or 4 * d, d, seed).double()
    return fid.stats(x @ normal(d, d, seed + 100).double() / d ** 0.5 + seed)


def test_stats_are_numpys():
    x = np.random.RandomState(0).standard_normal((5000, 7)) + 3         # more than one part
    mu, sigma = fid.stats(torch.from_numpy(x))
    close(mu, torch.from_numpy(x.mean(0)))
    close(sigma, torch.from_numpy(np.cov(x.T)))
    assert mu.dtype == sigma.dtype == double
    with pytest.raises(ValueError, match="at least 2"):
        fid.stats(torch.zeros(1, 7))


def test_frechet_is_scipys_sqrtm():
    (mu1, s1), (mu2, s2) = random_stats(64, 0), random_stats(64, 10)
    root = np.trace(scipy.linalg.sqrtm((s1 @ s2).numpy())).real
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert fid.frechet(mu1, s1, mu2, s2) == pytest.approx(expected.item(), rel=1e-8)
    assert fid.frechet(mu2, s2, mu1, s1) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_of_singular_covariances():
    few, many = random_stats(64, 0, n=10), random_stats(64, 1)
    value = fid.frechet(*few, *many)
    assert value > 0 and fid.frechet(*many, *few) == pytest.approx(value, rel=1e-6)
    zero, shift = torch.zeros(64, 64, dtype=double), few[0] - many[0]
    expected = shift.square().sum() + many[1].trace()
    assert fid.frechet(few[0], zero, *many) == pytest.approx(expected.item())
    for n in (10, 64, 65, 1000):
        same = random_stats(64, 3, n)
        assert abs(fid.frechet(*same, *same)) < 1e-6
    rounded = few[1].float().double()                       # its negative eigenvalues are rounding
    assert fid.frechet(many[0], rounded, many[0], rounded) < 1e-2 * rounded.trace()
    with pytest.raises(ValueError, match="eigenvalue -"):
        fid.frechet(*many, few[0], few[1] - few[1].trace() / 64 * torch.eye(64))


def test_bias_is_what_more_images_take_away():
    """A set against twenty times as many images of its own kind, two classes that take turns: the
    truth is near 0."""
    few, many = normal(600, 32), normal(12_000, 32, seed=1)
    few[1::2] += 1
    many[1::2] += 1
    few, many = measured(few), measured(many)
    value = fid.frechet(few.mu, few.sigma, many.mu, many.sigma)
    assert fid.bias(few, many) == pytest.approx(value, rel=0.2)
    assert fid.bias(measured(normal(64, 32)), many) is None
    assert fid.bias(fid.Measured(few.mu, few.sigma), many) == 0


# -------------------------------------------------------------------------------- Inception Score

@pytest.mark.parametrize("classes", [torch.arange(5000) // 500, torch.arange(5000) % 10])
def test_inception_score_of_sets_sorted_by_class_and_with_classes_in_turn(classes):
    one_hot = torch.eye(10)[classes] * 1e4
    assert fid.inception_score(one_hot, splits=1) == pytest.approx((10, 0))
    assert fid.inception_score(one_hot)[0] == pytest.approx(10, rel=0.02)
    assert fid.inception_score(one_hot[:1]) == pytest.approx((1, 0))        # less than one a split


def test_inception_score_is_its_definition():
    logits = normal(103, 7).double() * 2
    p = fid.shuffled(logits).softmax(1).numpy()
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean())
              for part in np.array_split(p, 4)]
    assert fid.inception_score(logits, 4) == pytest.approx((np.mean(scores), np.std(scores)))


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


def blobs(n, m):
    return normal(n, 3) + 20, normal(m, 3, seed=1) * 0.7 + 20.5


def clusters():
    """Balls much smaller than their distance from the centre, which is far from 0."""
    centres = torch.tensor([999.0, 1001.0]).repeat(100)[:, None]
    return [normal(200, 8, seed=s).double() * 1e-4 + centres for s in (0, 1)]


@pytest.mark.parametrize("sets, cells, k", [
    (blobs(60, 60), 2 ** 24, (3, 5)), (blobs(50, 83), 7 * 50, (3, 5)),      # at once, 7 rows a time
    (blobs(60, 60), 2 ** 24, (1, 2)), (clusters(), 2 ** 24, (3, 5))])
def test_precision_and_recall_are_brute_forces(sets, cells, k, monkeypatch):
    monkeypatch.setattr(fid, "CELLS", cells)
    got = fid.precision_recall(*sets, *k)
    assert got == pytest.approx(brute_force(*sets, *k))
    assert all(0.1 < got[name] < 1 for name in ("recall", "coverage"))


def test_copies_are_inside_and_no_sample_is_its_own_neighbour():
    real = normal(40, 256) * 100 + 1000                     # far from 0: distances round
    assert fid.precision_recall(real, real.clone()) == pytest.approx(brute_force(real, real))
    many = normal(41, 257) * 100 + 1000                     # a size at which copies' distances
    copied = fid.precision_recall(many.repeat(6, 1), torch.cat([many, many[:7] + 50]))  # round
    assert copied["precision"] == pytest.approx(41 / 48) and copied["coverage"] == 1
    one = fid.precision_recall(real, real[:1].repeat(40, 1))
    assert one["recall"] == pytest.approx(1 / 40) and one["precision"] == 1


def test_variety_takes_equal_counts_whatever_the_order_of_the_larger_set():
    real, generated = normal(600, 4), normal(100, 4, seed=1)
    for x in (real, generated):
        x[:, 0] += 20 * (torch.arange(len(x)) % 6)              # six classes take turns
    for order in (torch.arange(600), real[:, 0].argsort()):
        result = fid.variety(measured(generated), measured(real[order]))
        assert result["images"] == 100 and result["recall"] > 0.7 and result["coverage"] > 0.8
    assert fid.variety(measured(generated[:5]), measured(real)) is None
    assert fid.variety(measured(generated), fid.Measured(*fid.stats(real))) is None


# --------------------------------------------------------------------------------- sets of images

def test_measure_is_the_statistics_of_the_features(compact):
    x = textures(101)                                           # more than one batch
    a = fid.measure(x, compact)
    features, logits = compact(x.float())
    assert a.n == 101 and a.features.dtype == torch.float32
    close((a.features, (a.mu, a.sigma)), (features, fid.stats(features)), rtol=0, atol=1e-5)
    assert a.score == pytest.approx(fid.inception_score(logits), rel=1e-5)
    assert fid.measure(a, compact) is a


def test_measured_survives_its_file(tmp_path):
    a = measured(normal(5001, 2))
    a.score = (2.5, 0.25)
    fid.save(a, tmp_path / "a.npz")
    b = fid.load(tmp_path / "a.npz")
    close((a.mu, a.sigma), (b.mu, b.sigma), rtol=0, atol=0)
    assert (b.n, *b.score, b.features.dtype, b.resize) == (5001, 2.5, 0.25, torch.float32, None)
    close(b.features, fid.shuffled(a.features)[:5000].half().float(), rtol=0, atol=0)
    assert fid.bias(b, a) is None                           # 5,000 features of 5,001 images


def test_distortions_raise_fd_compact_step_by_step(compact):
    """Noise and blur: the teacher's own samples, ever more distorted."""
    images = data.load_images(TOP / "pretrained/compact_teacher_samples.zip")[0][:600]
    reference, x = fid.measure(images[1::2], compact), images[::2].float()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    blur = lambda k: torch.nn.functional.interpolate(               # noqa: E731
        torch.nn.functional.avg_pool2d(x, k), size=32, mode="bilinear")
    for ladder in ([x, x + 15 * noise, x + 60 * noise], [x, blur(2), blur(8)]):
        sets = [fid.measure(step, compact) for step in ladder]
        values = [fid.frechet(m.mu, m.sigma, reference.mu, reference.sigma) for m in sets]
        assert values == sorted(values) and values[-1] > 5 * values[0], values


def test_variance_of_a_set_that_varies_half_as_much():
    mu, sigma = fid.stats(normal(50, 4))
    a, b = fid.Measured(mu + 1, sigma / 4, 50), fid.Measured(mu, sigma, 50)
    assert fid.compare(a, b)["variance"] == pytest.approx(0.25)


# ---------------------------------------------------------------------------------- command line

@pytest.fixture
def run(capsys, monkeypatch):
    """Run fid.py with these arguments, in this process, and return status, stdout, stderr."""
    monkeypatch.setattr(fid, "tune_cpu", lambda: None)          # it would stay for other tests

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fid.py", *map(str, args)])
        with pytest.raises(SystemExit) as e:
            run_main(fid.main)
        return (e.value.code or 0, *capsys.readouterr())
    return call


@pytest.fixture(scope="module")
def sources(tmp_path_factory, compact):
    """The same 20 images, as images and as statistics without more."""
    root, images = tmp_path_factory.mktemp("sources"), textures(20)
    np.savez(root / "images.npz", images=images)
    mu, sigma = fid.stats(fid.extract(images, compact)[0])
    np.savez(root / "stats.npz", mu=mu, sigma=sigma)
    return root


def test_a_set_against_itself_is_at_zero_without_bias_and_no_json_has_nan(sources, run, tmp_path):
    images, black = sources / "images.npz", tmp_path / "black.npy"
    np.save(black, np.zeros((9, 3, 32, 32), np.uint8))
    code, out, err = run(images, images, "--json", "--save", tmp_path / "saved.npz")
    result = json.loads(out)
    assert result["value"] == result["bias"] == 0 and result["n"] == [20, 20]
    assert result["variety"]["precision"] == result["variety"]["recall"] == 1
    assert json.loads(run(tmp_path / "saved.npz", images, "--json")[1])["value"] == 0
    out = run(sources / "stats.npz", images)[1]
    assert out.startswith("FD-compact 0 to") and "bias" not in out and "need images" in out
    for name in (black, images):
        out = run(name, black, "--json")[1]
        assert "NaN" not in out and "Infinity" not in out and json.loads(out)["variance"] is None


def test_it_says_against_what_of_how_many_images_and_how(sources, run, tmp_path):
    code, out, err = run(sources / "images.npz")
    assert code == 0 and "computing on cpu" in err and "CIFAR-10 classifier's view" not in err
    assert "to cifar10: 20 images against 50,000 images, resize clean" in out
    assert "IS-compact" in out and "FID" not in out and "too few to say" in out
    assert "fewer than 10 images in each of 10 splits" in out
    saved, large = tmp_path / "s.npz", tmp_path / "large.npy"
    np.save(large, textures(100, size=48))
    code, out, err = run(large, sources / "images.npz", "--save-reference", saved)
    assert "large.npy: FD-compact is a CIFAR-10 classifier's view" in err and "splits" not in out
    out = run(sources / "images.npz", saved, "-n", 7)[1]
    assert f"to {saved}: 7 images against 20" in out and "7 images each" in out
    result = json.loads(run(sources / "stats.npz", saved, "--json")[1])
    assert (result["set"], result["reference"]) == (str(sources / "stats.npz"), str(saved))
    assert result["is"] == "IS-compact" and result["n"] == [None, 20]


def test_statistics_of_another_or_an_unsaid_resize_are_refused(sources, run, tmp_path, monkeypatch):
    images, saved, edm = sources / "images.npz", tmp_path / "a.npz", tmp_path / "edm.npz"
    assert run(images, "--resize", "tf", "--save", saved)[0] == 0
    assert run(saved, "--resize", "tf")[0] == 0
    assert "a.npz was measured with --resize tf" in run(saved)[2]
    np.savez(edm, mu=np.zeros(Inception.width), sigma=np.eye(Inception.width))
    net = Inception()
    monkeypatch.setattr(fid, "load_net", lambda features: net)
    code, _, err = run(images, edm, "--features", "inception")
    assert code == 2 and "EDM's statistics are of tf" in err and err.count("fid.py:") == 1
    assert fid.find(edm, net, how="tf").n is None


def test_the_result_is_saved_before_it_is_printed(sources, tmp_path, monkeypatch):
    def broken(*_):
        raise UnicodeEncodeError("ascii", "±", 0, 1, "no such character")
    monkeypatch.setattr(fid, "tune_cpu", lambda: None)
    monkeypatch.setattr(fid, "in_words", broken)
    with pytest.raises(UnicodeEncodeError):
        fid.main([str(sources / "images.npz"), "--save", str(tmp_path / "a.npz")])
    assert fid.load(tmp_path / "a.npz").n == 20


def test_a_split_is_what_follows_a_set_and_a_colon(compact, monkeypatch):
    asked = []
    monkeypatch.setattr(fid, "load_images", lambda *a: asked.append(a) or (textures(2), None))
    for source in ("a/b", "a/b:test", "a:train", "c:\\photos"):
        fid.find(source, compact)
    assert asked == [("a/b", "train"), ("a/b", "test"), ("a", "train"), ("c:\\photos", "train")]


def test_training_the_classifier_does_not_touch_what_is_shipped(tmp_path, run, monkeypatch):
    images, labels = textures(140), torch.arange(140) % 10
    monkeypatch.setattr(fid, "load_images", lambda source, split: (images, labels))
    monkeypatch.chdir(tmp_path)
    code, out, err = run("train", "--epochs", 1)
    assert code == 0 and "of the test images right" in out, err
    made = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("[!.]*.*")}
    assert made == {"runs/classifier/" + p.name for p in (fid.CLASSIFIER, fid.REFERENCE)}
    net = read_net("compact", tmp_path / "runs/classifier" / fid.CLASSIFIER.name)
    reference = fid.load(tmp_path / "runs/classifier" / fid.REFERENCE.name)
    close(reference.mu, fid.measure(images, net).mu)


@pytest.mark.parametrize("name, arrays, args, reason", [
    ("stats.npz", {}, "-n 5", "-n takes"),
    ("stats.npz", {}, "--save a.txt", "a.txt: statistics are saved as"),
    ("nowhere", {}, "stats.npz", "nowhere"), ("stats.npz", {}, "nowhere", "nowhere"),
    ("bad.npz", {"mu": np.zeros(64), "sigma": np.eye(64)}, "", "64 features"),
    ("bad.npz", {"mu": np.zeros(128)}, "", "sigma"),
    ("bad.npz", {"mu": np.zeros(128), "sigma": np.eye(128) * np.nan}, "", "not finite")])
def test_what_cannot_be_measured_is_one_line(name, arrays, args, reason, sources, run, monkeypatch):
    """And it is said before anything is measured."""
    monkeypatch.chdir(sources)
    monkeypatch.setattr(fid, "extract", None)
    if arrays:
        np.savez(name, **arrays)
    code, out, err = run(name, *args.split())
    assert code == 2 and reason in err and err.count("fid.py:") == 1, err
