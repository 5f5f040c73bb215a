#!/usr/bin/env python3
"""Run every command of the pages as a reader would, with tiny settings, and the solutions' edits.

    python .ci/commands.py          # some minutes; status 1 and the end of stderr if one fails

Each page has a copy of the project to itself, and its commands follow each other there. What can't
be run so is left out by name: see LEFT_OUT.
"""
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]

from PIL import Image                                                   # noqa: E402

from data import load_images, save_grid                                 # noqa: E402
from test_pages import PAGES, apply, commands, edits                    # noqa: E402

PLANE = "--steps 4 --batch 32 --width 16 --init-steps 2"
TEACHER = "--kimg 0.032 --decay 0 --batch 16"
TINY = {        # what makes a command short, by the words that it starts with; the first counts
    "cifar_distill.py": "--kimg 0.032 --batch 8 --wait-kimg 0.016 --eval-every 0.016 --eval-n 16 "
                        "--preview 1 --save-every 0.016",
    "toy2d.py": PLANE,
    "train_teacher.py --data": TEACHER,                     # else it is CIFAR-10, a download
    "train_teacher.py": f"{TEACHER} --data pretrained/compact_teacher_cond_samples.zip",
    "edm.py sample pretrained/compact_teacher": "-n 8 --steps 4",
    "edm.py sample": "-n 8",                                # a student has no steps
    "fid.py train": "--epochs 1 --data classes",
    "fid.py": "", "bregman.py": "", "experiments.py": "", "course/page.py": "",
    "bench.py": "--batch 2 --rounds 1 --frechet 64",
}
LEFT_OUT = {    # words in a command -> why it is not run here
    "--preset paper": "it downloads the official teacher and CIFAR-10",
    "--features inception": "it downloads Inception's weights",
    "edm-": "it downloads official weights",
    "sd_distill.py": "it has requirements of its own, and needs Stable Diffusion's weights",
    "imagenet64": "it needs ImageNet",
    "experiments.py --run": "it trains for hours; tests/test_experiments.py runs a tiny group",
}


def copy_project(folder):
    """Copy the project into `folder`, and make the sets of images that the pages speak of."""
    keep_out = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache")
    shutil.copytree(HERE, folder, ignore=keep_out)
    images, labels = load_images(HERE / "pretrained/compact_teacher_cond_samples.zip")
    for i in range(320):                                    # for fid.py train
        path = folder / f"classes/{'train' if i < 160 else 'test'}/{labels[i]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_grid(images[i:i + 1], path, 1, scale=1)
    for name in ("photos", "pictures"):                     # of several sizes
        (folder / name).mkdir()
        for i, image in enumerate(images[:40].permute(0, 2, 3, 1).numpy()):
            size = 40 + i % 3, 50
            Image.fromarray(image).resize(size).save(folder / name / f"{i}.png")
    return folder


def run(words, folder):
    """Run a command line in a copy. Returns whether it ended with status 0."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    said = f"{time.monotonic() - start:4.0f} s  {folder.name}: {shlex.join(words)}"
    if done.returncode:
        said += f"\n  status {done.returncode}: {done.stderr[-2000:]}"
    print(said, flush=True)
    return done.returncode == 0


def run_page(page, scratch):
    """Run a page's commands, of which the later need the earlier. Returns how many failed."""
    folder = copy_project(scratch / page.replace("/", "_"))
    failed = 0
    for command in commands(page):
        why = [reason for words, reason in LEFT_OUT.items() if words in command]
        if why:
            print(f"not run: {command}: {why[0]}", flush=True)
            continue
        short = next(short for start, short in TINY.items() if command.startswith(start))
        failed += not run([*shlex.split(command), *shlex.split(short)], folder)
    return failed


def run_edit(exercise, file, pairs, scratch):
    """Return whether a solution's edit does not apply, or does not run."""
    folder = copy_project(scratch / f"exercise_{exercise}_{len(pairs)}")
    path = folder / file
    path.write_text(apply(pairs, path.read_text()))
    h = "lecam" if exercise == "1" else "be"
    return not run(["toy2d.py", "--h", h, *PLANE.split()], folder)


def main():
    os.environ |= {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9",
                   "https_proxy": "http://127.0.0.1:9"}         # no network
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        scratch = Path(scratch)
        os.environ["DI_BREGMAN_CACHE"] = str(scratch / "cache")
        todo = [pool.submit(run_page, page, scratch) for page in PAGES if commands(page)]
        todo += [pool.submit(run_edit, *edit, scratch) for edit in edits()]
        failed = sum(job.result() for job in todo)
    print(f"{failed} failed" if failed else "every command ran")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
