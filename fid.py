"""How far is one set of images from another? FID (Heusel et al. 2017, arXiv 1706.08500), the
Inception Score, IS (Salimans et al. 2016, arXiv 1606.03498), precision and recall.

    python fid.py samples.npz cifar10                           # offline: FD-compact, not FID
    python fid.py samples.npz cifar10 --features inception      # FID with Clean-FID's resize
    python fid.py samples.npz cifar10-32x32.npz --features inception --resize tf    # as EDM, SiD
    python fid.py train --data cifar10                          # the classifier behind FD-compact

    python fid.py pretrained/compact_teacher_samples.zip        # FD-compact 2.10, IS-compact 4.28

FD-compact is the same distance as FID in the features of a small CIFAR-10 classifier that comes
with this project. It needs no download, and its numbers are not FIDs nor comparable with any.

A set is a folder, a .zip, an .npy or an .npz of images, or `cifar10`. It can also be an .npz of
what was measured before, which --save writes, or of the statistics mu and sigma alone, as EDM's
fid-refs are, from which precision and recall can't be had.
"""
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
from tqdm import tqdm

from data import download, load_images
from plumbing.cli import count, parser, run_main, torch_device, whole
from plumbing.features import Classifier, Inception, read_net, resize, train_classifier
from plumbing.loop import atomic, claim, save as save_weights, tune_cpu

NAMES = {"compact": ("FD-compact", "IS-compact"), "inception": ("FID", "IS")}
PRETRAINED = Path(__file__).parent / "pretrained"
CLASSIFIER = PRETRAINED / "compact_classifier.pt"
REFERENCE = PRETRAINED / "compact_classifier_cifar10.npz"            # its training set, measured
INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth",
             "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")


# ----------------------------------------------------------------------------- images to features

def load_net(features="compact"):
    """Return the network behind a distance, in eval mode: "compact" from pretrained/, "inception"
    downloaded once and checked. Raises ValueError or OSError, which names the file."""
    return read_net(features, CLASSIFIER if features == "compact" else download(*INCEPTION))


def extract(images, net, how="clean", bar=""):
    """Return the network's features (N, d) and logits (N, classes), float32 on the CPU.

    images: (N, C, H, W), of 3 channels or grey, uint8 or float, in [0, 255]. Floats are rounded
    and clipped first, as a saved file would be. how: the resize to the network's size, see
    features.resize. bar: the name of a progress bar, none if it is empty. Raises ValueError for
    floats in another range.
    """
    if images.is_floating_point() and not (images > 2).any():
        raise ValueError("no value of these images is above 2: floats must be in [0, 255], "
                         "not in [0, 1] or [-1, 1]")
    features, logits, where = [], [], next(net.parameters()).device
    for x in tqdm(images.split(64), bar, disable=None if bar else True):
        x = x.to(where)
        if x.is_floating_point():
            x = x.round().clamp(0, 255)
        with torch.inference_mode():
            x = resize(x.float(), net.size, how)                        # (n, C, size, size)
            f, y = net(x.expand(-1, 3, -1, -1))                         # grey as RGB
        features.append(f.cpu())
        logits.append(y.cpu())
    return torch.cat(features), torch.cat(logits)


def shuffled(x):
    """Return the rows of x in a random order, always the same. Sets come sorted by class, or with
    the classes in turn: neither neighbours nor every tenth image would be a fair part of them."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


# -------------------------------------------------------------------------- features to a distance

def stats(features):
    """Return the mean (d,) and the covariance over N - 1 (d, d) of features (N, d), in float64.
    Raises ValueError below two."""
    n, parts = len(features), features.split(4096)      # in float64 a part at a time
    if n < 2:
        raise ValueError(f"{n} image(s): a covariance takes at least 2")
    mu = sum(f.double().sum(0) for f in parts) / n
    return mu, sum((f.double() - mu).T @ (f.double() - mu) for f in parts) / (n - 1)


def factor(sigma):
    """Return F with F F^T = sigma: Cholesky's, or by eigenvalues where there is none, since a
    covariance of fewer images than dimensions is singular. Raises ValueError for a negative one."""
    F, failed = torch.linalg.cholesky_ex(sigma)
    if failed:
        values, vectors = torch.linalg.eigh(sigma)
        if values[0] < -1e-5 * values[-1].abs():        # rounding to float32 does less
            raise ValueError(f"no covariance: it has the eigenvalue {values[0].item():.3g}")
        F = vectors * values.clamp(min=0).sqrt()
    return F


def frechet(mu1, sigma1, mu2, sigma2):
    """Return the Fréchet distance of two Gaussians, |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).

    The trace of the root needs no root of a matrix: with S = F F^T and P = F1^T F2, it is the sum
    of the roots of the eigenvalues of P P^T, which are those of S1 S2. mu: (d,), sigma: (d, d),
    tensors in float64. Raises ValueError for what is no covariance.
    """
    P = factor(sigma1).T @ factor(sigma2)
    values = torch.from_numpy(scipy.linalg.eigvalsh((P @ P.T).numpy(), driver="evd"))
    if values[0] > 1e-12 * values[-1]:
        root = values.sqrt().sum()
    else:                               # rounding, 1e-16, has a root that is not small
        root = torch.linalg.svdvals(P).sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def inception_score(logits, splits=10):
    """Return the mean and the standard deviation of exp E KL(p(y|x) ‖ p(y)) over random splits of
    logits (N, classes). It lies between 1 and the number of classes."""
    scores = []
    for part in shuffled(logits).tensor_split(min(splits, len(logits))):
        p = part.double().softmax(1)                                        # p(y|x)
        marginal = p.mean(0)                                                # p(y)
        kl = torch.xlogy(p, p).sum(1).mean() - torch.xlogy(marginal, marginal).sum()
        scores.append(kl.exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# ------------------------------------------------------------------------------ precision, recall

CELLS = 2 ** 23                     # of a matrix of distances at a time: 64 MB


def distances(x, y):
    """Yield some rows i of x and their squared distances to y, (rows, len(y))."""
    for rows in torch.arange(len(x)).split(max(1, CELLS // len(y))):
        square = x[rows].square().sum(1, keepdim=True) + y.square().sum(1)
        yield rows, square.addmm_(x[rows], y.T, alpha=-2)


def neighbours(x, k):
    """Return each sample's squared distances to its k nearest others in x, rising (N, k). The
    margin is for rounding: a copy of the k-th neighbour is on the ball, and counts as in it."""
    nearest = []
    for rows, square in distances(x, x):
        square[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(square.topk(k, largest=False).values)
    return torch.cat(nearest) + 1e-13 * x.square().sum(1, keepdim=True)


def precision_recall(real, generated, k=3, k_coverage=5):
    """Return precision, recall, density and coverage of features (N, d), (M, d), as a dictionary.

    A sample's ball reaches to its k-th neighbour in its own set. Precision is the fraction of
    generated samples in any real ball, recall that of real samples in any generated ball
    (Kynkäänniemi et al. 2019, arXiv 1904.06991). Density is the number of real balls that a
    generated sample is in, over k_coverage; coverage is the fraction of real balls with a
    generated sample in them (Naeem et al. 2020, arXiv 2002.09797). Take N = M to compare sets, of
    more than k and k_coverage samples.
    """
    center = real.double().mean(0)      # a difference of squares: float32 loses tight clusters
    real, generated = real.double() - center, generated.double() - center
    near = neighbours(real, max(k, k_coverage))
    ball, ball_coverage = near[:, k - 1], near[:, k_coverage - 1]                       # (N,)
    ball_generated = neighbours(generated, k)[:, -1:]                                   # (M, 1)
    precise, pairs, recalled, covered = 0, 0, False, False
    for rows, square in distances(generated, real):             # (rows, N)
        precise += (square <= ball).any(1).sum().item()
        recalled |= (square <= ball_generated[rows]).any(0)                             # (N,)
        inside = square <= ball_coverage
        pairs += inside.sum().item()
        covered |= inside.any(0)                                                        # (N,)
    return {"precision": precise / len(generated), "recall": recalled.double().mean().item(),
            "density": pairs / (k_coverage * len(generated)),
            "coverage": covered.double().mean().item()}


# -------------------------------------------------------------------------------- sets of images

@dataclass
class Measured:
    """What is kept of a set of images. 50,000 images have 400 MB of Inception's features."""
    mu: torch.Tensor                        # (d,), float64
    sigma: torch.Tensor                     # (d, d), float64
    n: int | None = None                    # images behind mu and sigma, if known
    score: tuple | None = None              # Inception Score: mean and standard deviation
    features: torch.Tensor | None = None    # (n, d), float32, or fewer if they come from a file
    resize: str | None = None               # how its images came to the network's size, if known


def measure(images, net, how="clean", bar=""):
    """Return Measured of images (N, C, H, W), whose range and options are those of extract. What
    find() found measured stays as it is."""
    if isinstance(images, Measured):
        return images
    features, logits = extract(images, net, how, bar)
    return Measured(*stats(features), len(images), inception_score(logits), features, how)


def save(measured, path):
    """Write an .npz with mu, sigma (EDM's names), and as far as known n, score, resize, and
    features: float16, of 5,000 images at most."""
    known = {k: v for k, v in vars(measured).items() if v is not None}
    if measured.features is not None:
        known["features"] = shuffled(measured.features)[:5000].half()
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, **known)


def load(path):
    """Return Measured of an .npz with mu and sigma, None for another file. Raises ValueError, which
    names the file, where they can't be what they are called."""
    if Path(path).suffix != ".npz" or not zipfile.is_zipfile(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as f:
            if "mu" not in f:
                return None
            mu, sigma = (torch.from_numpy(f[name]).double() for name in ("mu", "sigma"))
            known = {name: f[name].tolist() for name in ("n", "score", "resize") if name in f}
            if "features" in f:
                known["features"] = torch.from_numpy(f["features"]).float()
        if not (mu.isfinite().all() and sigma.isfinite().all()):
            raise ValueError("not finite")
        return Measured(mu, sigma, **known)
    except (KeyError, ValueError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: not the statistics mu and sigma of images: {e}") from e


def find(source, net, n=None, how=None):
    """Return what measure() takes: the images (N, C, H, W) of SOURCE or SOURCE:SPLIT, or Measured
    where `source` holds that. CIFAR-10's whole training set in the compact features is at hand.

    n: how many of its images, or all. how: the resize, "clean" where it is empty; but statistics
    for Inception that do not say how they were made need it. Raises ValueError or OSError.
    """
    if source == "cifar10" and isinstance(net, Classifier) and not n:
        source = REFERENCE
    if stored := load(source):
        if n:
            raise ValueError(f"-n takes some of a set's images: {source} has none")
        if len(stored.mu) != net.width:
            raise ValueError(f"{source}: {len(stored.mu)} features, this network has {net.width}")
        if not (stored.resize or how) and isinstance(net, Inception):
            raise ValueError(f"{source} does not say how its images were resized: add --resize tf "
                             "(EDM's statistics are of tf) or --resize clean")
        if stored.resize not in (None, how or "clean"):
            raise ValueError(f"{source} was measured with --resize {stored.resize}: add that")
        return stored
    name, _, split = str(source).rpartition(":")
    if split not in ("train", "test") or not name:
        name, split = source, "train"
    images = load_images(name, split)[0]
    images = shuffled(images)[:n] if n and n < len(images) else images
    if isinstance(net, Classifier) and images.shape[1:] != (3, 32, 32):
        print(f"{source}: FD-compact is a CIFAR-10 classifier's view, of 32 x 32 RGB images, to "
              "which these are resized", file=sys.stderr)
    return images


# --------------------------------------------------------------------------- one set to another

def bias(a, b):
    """Return how much the distance of two Measured is too high because `a` has so few images.

    The distance is linear in 1/N (Chong & Forsyth 2020, arXiv 1911.07023), so what halving the set
    adds is what doubling it, again and again, would take away. None where a half has no more
    images than there are features, since there the line does not hold, or for fewer than 50,000
    whose features are not at hand; 0 for other statistics.
    """
    if a.features is None or len(a.features) != a.n:
        return 0.0 if a.n is None or a.n >= 50_000 else None
    if a.n // 2 <= len(a.mu):
        return None
    halves = [frechet(*stats(half), b.mu, b.sigma) for half in shuffled(a.features).tensor_split(2)]
    return sum(halves) / 2 - frechet(a.mu, a.sigma, b.mu, b.sigma)


def variety(a, b):
    """Return precision_recall of Measured a against b on equally many images, and `images`, how
    many; None without the features of 6 images of each."""
    if a.features is None or b.features is None:
        return None
    n = min(len(a.features), len(b.features))
    if n < 6:
        return None
    return precision_recall(shuffled(b.features)[:n], shuffled(a.features)[:n]) | {"images": n}


def compare(a, b, features="compact", how="clean"):
    """Return the distance of two Measured and all that should be said with it, a dictionary."""
    names, variances = NAMES[features], [m.sigma.trace().item() for m in (a, b)]
    value = frechet(a.mu, a.sigma, b.mu, b.sigma)
    excess = [bias(a, b), bias(b, a)]
    if value <= 1e-8 * sum(variances):              # one set, and the rounding of its features
        value, excess = 0.0, [0.0]
    return {"distance": names[0], "value": value, "bias": None if None in excess else sum(excess),
            "is": names[1], "is_mean": a.score and a.score[0], "is_std": a.score and a.score[1],
            "variance": variances[0] / variances[1] if variances[1] else None,  # below 1: less
            "variety": variety(a, b), "n": [a.n, b.n], "features": features, "resize": how}


def in_words(result):
    """Return compare's dictionary, which also names the reference, as lines of text."""
    n = [f"{k:,} images" if k else "statistics" for k in result["n"]]
    lines = [f"{result['distance']} {result['value']:.4g} to {result['reference']}: {n[0]} "
             f"against {n[1]}, resize {result['resize']}"]
    if result["value"] and any(k and k < 50_000 for k in result["n"]):
        known = result["bias"] is not None
        much = f"about {result['bias']:.2g}" if known else "too few to say how much"
        lines += [f"biased upward by fewer than 50,000 images: {much}"]
    if result["is_mean"]:
        lines += [f"{result['is']} {result['is_mean']:.3f} ± {result['is_std']:.3f}"]
        if (result["n"][0] or 0) < 100:
            lines[-1] += "; fewer than 10 images in each of 10 splits make it too low"
    if result["variance"]:
        lines += [f"variance {result['variance']:.3f} of the reference's"]
    words = ("precision {precision:.3f}  recall {recall:.3f}  density {density:.3f}  "
             "coverage {coverage:.3f}  {images} images each")
    lines += [words.format(**result["variety"]) if result["variety"] else
              "precision and recall need images (6 or more) of both sets"]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ command line

@dataclass
class ClassifierConfig:
    data: str = "cifar10"           # the labelled images: what data.load_images takes
    out: Path = Path("runs/classifier")     # the folder for its weights and statistics
    epochs: count = 12              # how often it sees each image
    seed: whole = 0                 # of its weights and of the order of the images
    device: torch_device = "cuda" if torch.cuda.is_available() else "cpu"     # what computes


def train(argv):
    """Train FD-compact's classifier and measure its training set. Both files have the names that
    they have in pretrained/: copy them there to use them."""
    p = parser("fid.py train", "Train FD-compact's classifier.", ClassifierConfig)
    cfg = ClassifierConfig(**vars(p.parse_args(argv)))
    tune_cpu()
    images, labels = load_images(cfg.data, "train")
    test_images, test_labels = load_images(cfg.data, "test")
    with claim(cfg.out) as folder:
        weights = folder / CLASSIFIER.name
        save_weights(train_classifier(images, labels, cfg.epochs, seed=cfg.seed,
                                      device=cfg.device), weights)
        net = read_net("compact", weights).to(cfg.device)       # judge what was saved: float16
        save(measure(images, net), folder / REFERENCE.name)
        right = extract(test_images, net)[1].argmax(1) == test_labels
        print(f"{right.double().mean():.4f} of the test images right: {weights}")


def main(argv):
    if argv[:1] == ["train"]:
        return train(argv[1:])
    p = parser("fid.py", __doc__.split("\n\n")[-1])
    add = p.add_argument
    add("a", help="the set to judge; SOURCE:test takes its test split")
    add("b", nargs="?", default="cifar10", help="the reference (cifar10)")
    add("-n", type=count, help="take so many of A's images, at random")
    add("--features", choices=NAMES, default="compact",
        help="of which network; compact: FD-compact, inception: FID (compact)")
    add("--resize", choices=("clean", "tf"), help="how images come to the network's size; clean: "
        "Pillow's bicubic, as Clean-FID, tf: TensorFlow 1's bilinear, as EDM (clean)")
    add("--device", type=torch_device, default=ClassifierConfig.device,
        help=f"what computes ({ClassifierConfig.device})")
    add("--save", metavar="FILE.npz", help="keep A's statistics, and features of 5,000 images")
    add("--json", action="store_true", help="print the result as JSON")
    args = p.parse_args(argv)
    if args.save and Path(args.save).suffix != ".npz":
        p.error(f"{args.save}: statistics are saved as .npz")
    tune_cpu()
    net, how = load_net(args.features).to(args.device), args.resize or "clean"
    sets = [find(args.a, net, args.n, args.resize), find(args.b, net, None, args.resize)]
    # both sets were found; measuring takes long
    print(f"computing on {args.device}", file=sys.stderr)
    a, b = (measure(s, net, how, name) for s, name in zip(sets, (args.a, args.b)))
    try:
        if args.save:
            save(a, args.save)
    finally:                                    # a full disk does not cost the result
        result = {"set": args.a, "reference": args.b} | compare(a, b, args.features, how)
        print(json.dumps(result, allow_nan=False) if args.json else in_words(result))


if __name__ == "__main__":
    run_main(main)
