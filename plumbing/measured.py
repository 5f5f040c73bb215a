"""What fid.py measured of a set: read from a file, and told in words."""
import zipfile
from pathlib import Path

import numpy as np
import torch

from plumbing.options import count


def read_measured(path):
    """-> what fid.py's measurements of a set need, of what an .npz holds: features (n, d), float32;
    mu (d,) and sigma (d, d), float64; n, score, a pair, and resize, or None. {} if it is no .npz,
    or has neither features nor mu. Nothing is unpickled. Raises ValueError for what these can't be.
    """
    if Path(path).suffix != ".npz" or not zipfile.is_zipfile(path):
        return {}
    with np.load(path, allow_pickle=False) as stored:
        if "mu" not in stored and "features" not in stored:
            return {}
        if max(member.file_size for member in stored.zip.infolist()) > 2 ** 30:
            raise ValueError("a member expands beyond 1 GiB")
        known = {name: stored[name] for name in ("features", "mu", "sigma", "n", "score")
                 if name in stored}
        resize = str(stored["resize"]) if "resize" in stored else None
    if resize not in (None, "clean", "tf"):
        raise ValueError(f"its resize is {resize[:20]!r}, not clean or tf")
    for name, array in known.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite, or of no numbers")
        known[name] = torch.from_numpy(array.astype(np.float32 if name == "features" else float))
    shapes = {name: tuple(array.shape) for name, array in known.items()}
    d = shapes["features" if "features" in shapes else "mu"][-1:]
    expected = {"mu": d, "sigma": d + d, "n": (), "score": (2,),
                "features": shapes.get("features", ())[:1] + d}
    lacks = ("mu" in known) != ("sigma" in known)
    if lacks or not d or any(shapes[name] != expected[name] for name in known):
        raise ValueError(f"it has the shapes {shapes}")
    if "sigma" in known and not torch.allclose(known["sigma"], known["sigma"].T):
        raise ValueError("sigma is not symmetric")
    if "n" in known:
        known["n"] = count(known["n"])
    if "score" in known:
        known["score"] = tuple(known["score"].tolist())
    return known | {"resize": resize}


def in_words(result):
    """compare()'s dictionary for people: two lines."""
    line = f"{result['distance']} {result['value']:.4g}"
    n = [f"{k} images" if k else "statistics" for k in result["n"]]
    if any(k and k < 50_000 for k in result["n"]):
        known = result["bias"] is not None
        much = f"about {result['bias']:.2g}" if known else "too few to say how much"
        line += f" (biased upward by fewer than 50000 images: {much})"
    if result["score_mean"]:
        line += f"  {result['score']} {result['score_mean']:.3f} ± {result['score_std']:.3f}"
    line += f"  variance {result['variance']:.3f} of the reference's"
    line += f"  {n[0]} against {n[1]}  {result['features']}, resize {result['resize']}\n"
    if not result["variety"]:
        return line + "precision and recall need images (6 or more) of both sets"
    return line + ("precision {precision:.3f}  recall {recall:.3f}  density {density:.3f}  "
                   "coverage {coverage:.3f}  {images} images each").format(**result["variety"])
