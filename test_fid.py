"""fid.py held against recorded Inception outputs (fixtures/), closed forms, and SciPy's sqrtm."""
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import data
import fid

HERE = Path(__file__).parent
FIXTURE = json.loads((HERE / "fixtures/inception.json").read_text())
close = torch.testing.assert_close
double = torch.float64


def fill(net):
    """The fixture's rule: every tensor from RandomState(its place in the sorted state dict)."""
    state = net.state_dict()
    for place, name in enumerate(sorted(state)):
        v = np.random.RandomState(place).standard_normal(tuple(state[name].shape))
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            v = 1 + 0.1 * np.abs(v)
        elif name.endswith("bn.weight"):
            v = 1 + 0.1 * v
        else:
            v *= np.sqrt(2 / np.prod(v.shape[1:])) if v.ndim >= 2 else 0.1
        state[name].copy_(torch.from_numpy(v))
    return net.eval()


@pytest.fixture(scope="module")
def inception():
    return fill(fid.Inception())


@pytest.fixture(scope="module")
def compact():
    return fid.load_net("compact")


def textures(n, seed=0, size=32):
    """Images with structure at several scales, of no dataset: smoothed noise, tinted."""
    g = torch.Generator().manual_seed(seed)
    x = sum(torch.nn.functional.interpolate(torch.randn(n, 3, s, s, generator=g), size=size,
                                            mode="bilinear") for s in (2, 4, 8, 16))
    return (x * 40 + 128).round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------- Inception

def test_inception_has_the_names_and_shapes_of_the_public_file(inception):
    state = {k: list(v.shape) for k, v in inception.state_dict().items()
             if not k.endswith("num_batches_tracked")}
    assert state == FIXTURE["tensors"]
    assert sum(p.numel() for p in inception.parameters()) == FIXTURE["params"]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how, key", [("tf", "tf_bilinear"), ("clean", "pil_bicubic")])
def test_inception_outputs(inception, how, key, fused):
    net, expected = inception, FIXTURE[key]
    if fused:
        net = fid.Inception()
        net.load_state_dict(inception.state_dict())
        net = fid.fuse(net)
    images = np.random.RandomState(0).randint(0, 256, (2, 3, 32, 32)).astype(np.uint8)
    (features, logits), = fid.extract(torch.from_numpy(images), net, how)
    close(features[:, ::64], torch.tensor(expected["pool_every64"]), rtol=0, atol=2e-6)
    close(features.mean(1), torch.tensor(expected["pool_mean"]), rtol=0, atol=1e-6)
    close(features.std(1, correction=0), torch.tensor(expected["pool_std"]), rtol=1e-3, atol=0)
    close(logits[:, ::63], torch.tensor(expected["logits_unbiased_every63"]), rtol=0, atol=1e-5)


def test_inception_file_is_read_from_the_cache_and_checked(inception, tmp_path, monkeypatch):
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path))
    path = tmp_path / fid.INCEPTION[0].rsplit("/", 1)[1]
    torch.save({k: v for k, v in inception.state_dict().items() if k in FIXTURE["tensors"]}, path)
    with pytest.raises(ValueError, match="sha256"):
        fid.load_net("inception")
    monkeypatch.setattr(fid, "INCEPTION", (fid.INCEPTION[0], None))
    x = textures(1)
    close(fid.features(x, fid.load_net("inception")), fid.features(x, inception),
          rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------- resize

@pytest.mark.parametrize("size", [32, 64, 299, 512])
def test_clean_resize_is_pillows(size):
    image = textures(1, size=size)[0]
    expected = np.stack([np.asarray(Image.fromarray(c.astype(np.float32)).resize(
        (299, 299), Image.Resampling.BICUBIC)) for c in image.numpy()]).clip(0, 255)
    close(fid.resize(image[None].float(), 299)[0], torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_tf_resize_is_bilinear_between_corners_without_half_pixels():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255
    y = fid.resize(x, 299, "tf")
    for i, j in [(0, 0), (1, 5), (150, 77), (298, 298)]:
        v, u = i * 32 / 299, j * 32 / 299
        v0, u0 = int(v), int(u)
        v1, u1 = min(v0 + 1, 31), min(u0 + 1, 31)
        a, b = v - v0, u - u0
        expected = ((1 - a) * (1 - b) * x[..., v0, u0] + (1 - a) * b * x[..., v0, u1]
                    + a * (1 - b) * x[..., v1, u0] + a * b * x[..., v1, u1])
        close(y[..., i, j], expected, rtol=0, atol=1e-3)


def test_float_images_are_rounded_and_clipped_as_files_would_be(compact):
    x = textures(4)
    noisy = x.float() + torch.linspace(-0.4, 0.4, x.numel()).view(x.shape)
    noisy[x == 255] += 50
    assert torch.equal(fid.features(noisy, compact), fid.features(x, compact))


# ----------------------------------------------------------------------------- Fréchet distance

def random_stats(d, seed, n=None):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n or 4 * d, d, dtype=double, generator=g)
    return fid.stats(x @ torch.randn(d, d, dtype=double, generator=g) / d ** 0.5 + seed)


def test_stats_are_numpys():
    x = np.random.RandomState(0).standard_normal((50, 7)) + 3
    mu, sigma = fid.stats(torch.from_numpy(x))
    close(mu, torch.from_numpy(x.mean(0)))
    close(sigma, torch.from_numpy(np.cov(x.T)))
    assert mu.dtype == sigma.dtype == double


def test_frechet_closed_forms():
    mu, sigma = random_stats(16, 1)
    shift = torch.linspace(-1, 1, 16, dtype=double)
    assert fid.frechet(mu, sigma, mu + shift, sigma) == pytest.approx(shift.square().sum().item())
    Q = torch.linalg.qr(sigma)[0]                               # commuting: one eigenbasis
    a, b = torch.rand(2, 16, dtype=double, generator=torch.Generator().manual_seed(0)) + 0.1
    expected = (a.sqrt() - b.sqrt()).square().sum().item()
    assert fid.frechet(mu, Q * a @ Q.T, mu, Q * b @ Q.T) == pytest.approx(expected, rel=1e-9)
    one = lambda m, s: (np.array([m]), np.array([[s ** 2]]))    # noqa: E731
    assert fid.frechet(*one(1, 2), *one(4, 7)) == pytest.approx(3 ** 2 + 5 ** 2)


@pytest.mark.parametrize("seed", range(5))
def test_frechet_is_scipys_sqrtm(seed):
    mu1, s1 = random_stats(64, seed)
    mu2, s2 = random_stats(64, seed + 10)
    root = np.trace(scipy.linalg.sqrtm((s1 @ s2).numpy())).real
    expected = (mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root
    assert fid.frechet(mu1, s1, mu2, s2) == pytest.approx(expected.item(), rel=1e-8)
    assert fid.frechet(mu2, s2, mu1, s1) == pytest.approx(expected.item(), rel=1e-8)


def test_frechet_of_singular_covariances():
    few, many = random_stats(64, 0, n=10), random_stats(64, 1)
    value = fid.frechet(*few, *many)
    assert 0 < value < float("inf")
    assert fid.frechet(*many, *few) == pytest.approx(value, rel=1e-6)
    zero = torch.zeros(64, 64, dtype=double)
    shift = few[0] - many[0]
    expected = shift.square().sum() + many[1].trace()
    assert fid.frechet(few[0], zero, *many) == pytest.approx(expected.item())


@pytest.mark.parametrize("n", [10, 64, 65, 1000])
def test_frechet_of_identical_sets_is_zero(n):
    same = random_stats(64, 3, n)
    assert abs(fid.frechet(*same, *same)) < 1e-6


def test_frechet_refuses_other_widths_and_nan():
    with pytest.raises(ValueError, match="64 and of 32"):
        fid.frechet(*random_stats(64, 0), *random_stats(32, 0))
    mu, sigma = random_stats(8, 0)
    with pytest.raises(ValueError, match="not finite"):
        fid.frechet(mu * float("nan"), sigma, mu, sigma)


def test_frechet_is_several_times_faster_than_by_sqrtm():
    """At 1024 dimensions, to be quick: 6 times there, 12 times at 2048, which bench.py times."""
    a, b = random_stats(1024, 0), random_stats(1024, 1)

    def seconds(f, n):
        best = float("inf")
        for _ in range(n):
            start = time.perf_counter()
            f()
            best = min(best, time.perf_counter() - start)
        return best
    slow = seconds(lambda: scipy.linalg.sqrtm((a[1] @ b[1]).numpy()), 1)
    assert slow > 4 * seconds(lambda: fid.frechet(*a, *b), 3)   # 6, less a noisy machine's share


# ------------------------------------------------------------------------------ Inception Score

def test_inception_score_of_one_hot_and_of_uniform():
    one_hot = torch.eye(10).repeat_interleave(50, 0) * 1e4          # sorted by class
    assert fid.inception_score(one_hot) == pytest.approx((10, 0))
    assert fid.inception_score(torch.zeros(500, 10)) == pytest.approx((1, 0))
    assert fid.inception_score(one_hot[:, :5] * 0 + 3) == pytest.approx((1, 0))


def test_inception_score_is_its_definition():
    logits = torch.randn(103, 7, dtype=double, generator=torch.Generator().manual_seed(0)) * 2
    p = logits.softmax(1).numpy()
    scores = []
    for k in range(10):
        part = p[k::10]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    assert fid.inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)))


# ------------------------------------------------------------------------------- sets of images

def test_running_sums_do_not_care_for_order_or_batch_size(compact):
    x = textures(101)
    a = fid.measure(x, compact, batch=64)
    b = fid.measure(x.flip(0), compact, batch=7)
    reference = fid.measure(textures(300, seed=1), compact)
    close(a.mu, b.mu, rtol=0, atol=1e-6)
    close(a.sigma, b.sigma, rtol=0, atol=1e-6)
    assert (fid.frechet(a.mu, a.sigma, reference.mu, reference.sigma) == pytest.approx(
        fid.frechet(b.mu, b.sigma, reference.mu, reference.sigma), rel=1e-4))
    mu, sigma = fid.stats(fid.features(x, compact))
    close(a.mu, mu)
    close(a.sigma, sigma)
    halves = [fid.stats(fid.features(x[k::2], compact))[0] for k in (0, 1)]
    for h, expected in zip(fid.measure(x, compact, batch=7).halves, halves):
        close(h.stats()[0], expected, rtol=0, atol=1e-6)


def test_memory_is_that_of_the_features_not_of_the_set(compact):
    small, large = (fid.measure(textures(n), compact) for n in (64, 256))
    size = lambda m: sum(h.outer.numel() + h.total.numel() for h in m.halves)   # noqa: E731
    assert size(small) == size(large) == 2 * (128 * 128 + 128)


def test_bias_is_what_more_images_take_away(compact):
    """A set against twenty times as many images of its own kind: the truth is near 0."""
    x = textures(6000)
    few, many = fid.measure(x[:600], compact), fid.measure(x, compact)
    value = fid.frechet(few.mu, few.sigma, many.mu, many.sigma)
    assert fid.bias(few, many) == pytest.approx(value, rel=0.35)
    assert fid.bias(fid.measure(x[:200], compact), many) is None
    assert fid.bias(fid.Measured(few.mu, few.sigma), many) == 0


def distance(a, b):
    return fid.frechet(a.mu, a.sigma, b.mu, b.sigma)


def test_distortions_raise_fd_compact_step_by_step(compact):
    """Noise, blur and fewer kinds of image: the teacher's own samples, ever more distorted."""
    images = data.load_images(HERE / "pretrained/compact_teacher_samples.zip")[0][:2000]
    logits = torch.cat([l for _, l in fid.extract(images, compact)])
    reference = fid.measure(images[1::2], compact)
    own = distance(fid.measure(images[::2], compact), reference)
    x, g = images[::2].float(), torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=g)
    ladders = {
        "noise": [x + s * noise for s in (5, 15, 40, 100)],
        "blur": [torch.nn.functional.interpolate(torch.nn.functional.avg_pool2d(x, k),
                                                 size=32, mode="bilinear") for k in (2, 4, 8, 16)],
        "classes": [x[logits[::2].argmax(1) < k] for k in (8, 5, 3, 2)]}
    for kind, steps in ladders.items():
        values = [own] + [distance(fid.measure(s, compact), reference) for s in steps]
        assert values == sorted(values), f"{kind}: {values}"
        assert values[-1] > 5 * values[0]


def test_shipped_classifier_and_statistics_fit():
    assert fid.CLASSIFIER.stat().st_size + fid.REFERENCE.stat().st_size < 2e6
    reference = fid.load_stats(fid.REFERENCE)
    assert reference.n == 50_000 and reference.mu.shape == (128,)
    assert torch.linalg.eigvalsh(reference.sigma).min() > 0


# --------------------------------------------------------------------------------- command line

def run(*args):
    done = subprocess.run([sys.executable, HERE / "fid.py", *map(str, args)],
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same images in every form that fid.py takes."""
    root, images = tmp_path_factory.mktemp("sources"), textures(20).permute(0, 2, 3, 1).numpy()
    (root / "folder").mkdir()
    with zipfile.ZipFile(root / "images.zip", "w") as z:
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / f"folder/{i:04}.png")
            z.write(root / f"folder/{i:04}.png", f"{i:04}.png")
    subprocess.run(["tar", "cf", root / "images.tar", "-C", root, "folder"], check=True)
    np.save(root / "images.npy", images)
    np.savez(root / "images.npz", images=images)
    mu, sigma = fid.stats(fid.features(textures(20), fid.load_net()))
    np.savez(root / "stats.npz", mu=mu, sigma=sigma)
    return root


def test_cli_on_every_kind_of_source(sources):
    """One process for all: main() is called as the command line calls it."""
    script = ("import sys, fid\n"
              "for name in sys.argv[2:]:\n"
              "    fid.main([sys.argv[1] + '/' + name, sys.argv[1] + '/stats.npz', '--json'])\n")
    names = ["folder", "images.zip", "images.tar", "images.npy", "images.npz", "stats.npz"]
    out = subprocess.run([sys.executable, "-c", script, sources, *names], cwd=HERE, text=True,
                         capture_output=True, check=True).stdout
    results = [json.loads(line) for line in out.splitlines()]
    assert len(results) == len(names)
    for result, name in zip(results, names):
        assert abs(result["value"]) < 1e-6 and result["distance"] == "FD-compact"
        assert result["n"] == [None if name == "stats.npz" else 20, None]
        assert (result["score_mean"] is None) == (name == "stats.npz")


def test_cli_says_what_it_measured(sources, tmp_path):
    code, out, _ = run(sources / "images.npz", "--save-stats", tmp_path / "s.npz")
    assert code == 0 and out.count("\n") == 1
    for part in ("FD-compact", "IS-compact", "20 images against 50000", "resize clean",
                 "too few to say"):
        assert part in out
    assert "FID" not in out
    assert "7 images against 50000" in run(sources / "images.npz", "-n", 7)[1]
    assert fid.load_stats(tmp_path / "s.npz").n == 20


def test_variance_of_a_set_that_varies_half_as_much():
    g = torch.Generator().manual_seed(0)
    mu, sigma = fid.stats(torch.randn(50, 4, generator=g))
    a, b = fid.Measured(mu + 1, sigma / 4, 50), fid.Measured(mu, sigma, 50)
    assert fid.compare(a, b)["variance"] == pytest.approx(0.25)


def test_cli_of_a_split(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        (tmp_path / "set" / split).mkdir(parents=True)
        for i, image in enumerate(textures(5, seed).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(tmp_path / "set" / split / f"{i}.png")
    code, out, err = run(f"{tmp_path}/set", f"{tmp_path}/set:test", "--json")
    assert code == 0, err
    assert json.loads(out)["value"] > 0.01 and json.loads(out)["n"] == [5, 5]


def bad_sources(root):
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    good = textures(2).permute(0, 2, 3, 1).numpy()
    Image.fromarray(good[0]).save(root / "broken/a.png")
    (root / "broken/b.png").write_bytes((root / "broken/a.png").read_bytes()[:100])
    (root / "mixed").mkdir()
    Image.fromarray(good[0]).save(root / "mixed/a.png")
    Image.fromarray(good[0][:16]).save(root / "mixed/b.png")
    np.savez(root / "one.npz", images=good[:1])
    np.savez(root / "wide.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(root / "odd.npz", mu=np.zeros(128), sigma=np.eye(64))
    np.savez(root / "nan.npz", mu=np.full(128, np.nan), sigma=np.eye(128))
    (root / "half.npz").write_bytes((root / "wide.npz").read_bytes()[:1000])
    return {"empty": "no images", "broken": "b.png", "mixed": "one size", "one.npz": "at least 2",
            "wide.npz": "2048", "odd.npz": "sigma", "nan.npz": "not finite",
            "half.npz": "half.npz", "nowhere": "no such file"}


def test_bad_sources_are_one_line_each(tmp_path, capsys, monkeypatch):
    for name, reason in bad_sources(tmp_path).items():
        monkeypatch.setattr(sys, "argv", ["fid.py", str(tmp_path / name)])
        with pytest.raises(SystemExit) as e:
            data.run_main(fid.main)
        error = capsys.readouterr().err.splitlines()[-1]
        assert e.value.code == 2 and reason in error, (name, error)


def test_nan_in_features_names_the_image(compact):
    class Broken(torch.nn.Linear):
        size = 32

        def forward(self, x):
            f = x.mean((2, 3))
            f[(x == 255).all((1, 2, 3))] = torch.nan
            return f, f
    x = textures(5)
    x[3] = 255
    with pytest.raises(ValueError, match="image 3"):
        fid.measure(x, Broken(1, 1), batch=2)


def test_without_network_the_error_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("DI_BREGMAN_CACHE", str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(data.urllib.request, "urlopen", offline)
    with pytest.raises(OSError, match=rf"put it at {tmp_path}/pt_inception-2015-12-05"):
        fid.load_net("inception")
    code, _, err = run("x.npz", "--features", "resnet")
    assert code == 2 and "resnet" in err and err.count("\n") == 1


def test_training_the_classifier(tmp_path, monkeypatch):
    """Two colours, two classes: learnt in seconds; what is written is what load_net reads."""
    root = tmp_path / "set"
    for split in ("train", "test"):
        for k, name in enumerate(("dark", "light")):
            (root / split / name).mkdir(parents=True)
            for i in range(40):
                image = textures(1, seed=i + 100 * (split == "test"))[0].permute(1, 2, 0) // 3
                Image.fromarray((image + 150 * k).numpy()).save(root / split / name / f"{i}.png")
    code, out, err = 0, "", ""
    fid.train_classifier(root, tmp_path / "c.pt", epochs=6, batch=16)
    monkeypatch.setattr(fid, "CLASSIFIER", tmp_path / "c.pt")
    net = fid.load_net()
    images, labels = data.load_images(root, "test")
    logits = torch.cat([l for _, l in fid.extract(images, net)])
    assert (logits.argmax(1) == labels).double().mean() > 0.9
    assert fid.load_stats(tmp_path / "c_cifar10.npz").n == 80
