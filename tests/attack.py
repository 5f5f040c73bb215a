"""A hostile user: kills, full disks, crafted files, bad options, broken downloads, two at once.

    python tests/attack.py                      # everything, at most 15 minutes: runs/attack.md
    python tests/attack.py --short              # a part of it, at most 3
    python tests/attack.py --seed 1             # other files, other moments
    python tests/attack.py --only kill --keep   # the cases whose kind or name holds this text

A case ends well with status 0, or with status 2 and exactly one line that says what is wrong, and
leaves what lay in its folder as it was. Anything else is a defect: a signal, a traceback, a hang, a
file that is taken though it is wrong, a leftover. The exit status is 1 if there is any. sandbox.py
is what cases run in, crafted.py makes the files, disturbed.py kills. It needs Linux.
"""
import argparse
import functools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from sandbox import HERE, Attack, Case, Child, defect, tiny         # sets up the paths

import numpy as np
import torch

import cifar_distill
import crafted
import edm
from crafted import IMAGES
from disturbed import (EARLY, disks, downloads, early, impatient, interrupted, killed, kills,
                       processes, two_runs)
from plumbing.plots import pyplot

# --------------------------------------------------------------------------------- command lines

BAD = ("", "nan", "inf", "-inf", "-1", "1e308", "-1e308", "1e-308", "evil", "10**12",
       "1" + "0" * 30, "0x10", "1,5", "٣e", "None", "\x00", "--", "1" * 5000)
TEXTS = ("", "\x00")            # what no text may be
COMMANDS = [        # script, what comes before the option
    ("bregman", []), ("toy2d", tiny("toy2d")), ("edm", tiny("edm", "--out", "new")),
    ("edm", ["sample", "edm/teacher.pt", "-n", "1", "--steps", "1"]),
    ("cifar_distill", tiny("cifar_distill", "--out", "new")),
    ("cifar_distill", ["sample", "cifar_distill/student.pt", "-n", "1"]),
    ("fid", tiny("fid")), ("fid", ["train", "--data", "labelled.npz", "--epochs", "1"]),
    ("bench", tiny("bench")), ("experiments", tiny("experiments")),
    ("sd_distill", "--prompts nowhere --model edm --out new".split()),
    ("sd_distill", "sample nowhere --prompt a".split()),
]
CONTRADICTING = [       # script, options, pattern of the line
    ("toy2d", "--sigma-min 3", "sigma-min"), ("toy2d", "--class-min 5", "class"),
    ("toy2d", "--part level --batch 8", "batch"), ("toy2d", "--ema 1", "ema"),
    ("toy2d", "--h sba --lam 51", "lam"), ("toy2d", "--h nobody", "nobody"),
    ("toy2d", "--steps 1.5", "steps"), ("toy2d", "--seed 1.0e400", "seed"), ("toy2d", "now", "now"),
    ("toy2d", "--step 3", "step"), ("toy2d", "--teacher-free=1", "teacher-free"),
    ("edm", "train", "--out"), ("edm", "", "command"), ("edm", "nobody", "nobody"),
    ("edm", "train --out new --data good.npz --decay 2 --kimg 1", "decay"),
    ("edm", "train --out new --data good.npz --label-dropout 0.1", "label-dropout"),
    ("edm", "train --out new --data good.npz --config compact-cond", "labels"),
    ("edm", "train --out new --data nowhere", "nowhere"),
    ("edm", "train --out nowhere --data good.npz --resume", "resume"),
    ("edm", "train --out edm --data good.npz", "exists"),
    ("edm", "sample nowhere.pt", "nowhere"), ("edm", "sample good.npz", "good.npz"),
    ("edm", "sample edm/teacher.pt --guide nowhere.pt", "nowhere"),
    ("edm", "sample edm/teacher.pt --guide self", "class"),
    ("edm", "sample edm/teacher.pt --guide edm/teacher.pt --guide-low 5 --guide-high 1", "5"),
    ("edm", "sample https://", "https"), ("edm", "sample ftp://a/b.pt", "ftp"),
    ("edm", "sample file:///etc/passwd", "file:"), ("edm", "sample ://", "://"),
    ("cifar_distill", "--preset nobody", "nobody"), ("cifar_distill", "--t-min 0.9", "t-min"),
    ("cifar_distill", "--part level", "part"),
    ("cifar_distill", "--norm two-stage --batch 4", "20"),
    ("cifar_distill", "--resume --out nowhere", "resume"), ("cifar_distill", "--cond", "cond"),
    ("cifar_distill", "--teacher nowhere.pt --out new", "nowhere"),
    ("cifar_distill", "--data nowhere --out new", "nowhere"),
    ("cifar_distill", "--guide self --out new --data good.npz", "class"),
    ("cifar_distill", "--h sba --lam -51", "lam"), ("cifar_distill", "sample", "checkpoint"),
    ("cifar_distill", "sample good.npz", "good.npz"),
    ("cifar_distill", "--teacher . --out new", ""),
    ("fid", "", "a"), ("fid", "nowhere good.npz", "nowhere"),
    ("fid", "good.npz nowhere", "nowhere"),
    ("fid", "good.npz good.npz --save a.txt", "npz"), ("fid", "train --data good.npz", "labels"),
    ("fid", "train --data labelled.npz --out new", "128"), ("fid", "good.npz cifar10 -n 1", "2"),
    ("experiments", "--run nobody", "nobody"), ("experiments", "--results good.npz", "results"),
    ("experiments", "--results nowhere --gif", "nowhere"),
    ("bregman", "--out good.npz/a.png", "good"),
    ("bregman", "--out /proc/a.png", "/proc"), ("bregman", "--out a.evil", "evil"),
    ("bregman", "--out edm", "edm"), ("bregman", "--out " + "a" * 300 + ".png", "long"),
    ("bregman", "--out a", "a"), ("bench", "--net nobody", "nobody"),
    ("edm", "sample edm/teacher.pt -n 1 --steps 1 --out edm", "edm"),
    ("toy2d", "--steps 1 --out good.npz", "good.npz"),
    ("toy2d", "--steps 1 --out /proc/a", "/proc"),
]
HUGE = [        # script, options: more than there is memory for, or than can be counted
    ("toy2d", tiny("toy2d", "--width", 10 ** 9)), ("toy2d", tiny("toy2d", "--batch", 2 * 10 ** 9)),
    ("toy2d", tiny("toy2d", "--width", 10 ** 12)), ("toy2d", tiny("toy2d", "--batch", 10 ** 12)),
    ("toy2d", tiny("toy2d", "--cells", 10 ** 6, "--ratio", "exact")),
    ("edm", tiny("edm", "--batch", 2 * 10 ** 9, "--out", "new")),
    ("edm", "sample edm/teacher.pt --steps 1 --batch 2000000000 -n 2000000000".split()),
    ("edm", "sample edm/teacher.pt --steps 2000000000 -n 1 --batch 2000000000".split()),
    ("cifar_distill", tiny("cifar_distill", "--batch", 2 * 10 ** 9, "--out", "new")),
    ("bench", ["--batch", "2000000000", "--rounds", "1"]),
    ("bench", tiny("bench", "--frechet", 10 ** 6)),
]


def flags(script, before):
    """The options that --help tells, but --help: (flag, whether it takes a value)."""
    words = [before[0], "--help"] if before[:1] in (["train"], ["sample"]) else ["--help"]
    ran = Child(script, words, HERE, {"COLUMNS": "200"}).wait()
    found = re.findall(r"^  (-[-\w]+)(?:, (--no-[-\w]+))?( [A-Z{\[]\S*)?", ran.out, re.M)
    return [(flag, bool(takes)) for flag, no, takes in found if flag not in ("-h", "--help")]


def command_lines(rng):
    """Every option of every script with some of the bad values, and what else can be wrong."""
    for script, before in COMMANDS:
        for flag, takes in flags(script, before):
            if not takes:
                word = f"{flag}=evil"
                yield Case("command line", f"{script} {word}", script, [*before, word])
                continue
            for value in ["", *rng.sample(BAD[1:], 1 if flag in FREE_TEXT else 3)]:
                yield Case("command line", f"{script} {flag} {value[:40]!r}", script,
                           [*before, f"{flag}={value}"] if value.startswith("-")
                           else [*before, flag, value], expected(flag, value))
            if flag != "--run":         # which then means all runs
                yield Case("command line", f"{script} {flag} alone", script, [*before, flag])
    for script, options, must in CONTRADICTING:
        yield Case("command line", f"{script} {options[:60]}", script, options.split(), must=must)
    for script, options in HUGE:
        yield Case("command line", f"{script} {' '.join(options)[-60:]}", script, options,
                   must="memory|at least|1024|must be")


FREE_TEXT = ("--out", "--save", "--results", "--figures")       # a name like another
NUMBERS_TOO = {     # values in BAD that some options take
    "--lam": ("-1",), "--p-mean": ("-1",), "--w": ("-1", "1e308", "-1e308", "1" + "0" * 30),
}


def expected(flag, value):
    if flag in FREE_TEXT and value not in TEXTS:
        return "either"
    if flag in ("--data", "--guide", "--init", "--model", "--reward") and not value:
        return "either"
    return "either" if value in NUMBERS_TOO.get(flag, ()) or value == "1e-308" else "refuse"


def environments():
    """RANK and WORLD_SIZE that contradict each other."""
    for said in ({"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"},
                 {"RANK": "-1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"},
                 {"RANK": "a", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "nan"},
                 {"RANK": "0", "WORLD_SIZE": "-2"}, {"RANK": "0", "WORLD_SIZE": "2"},
                 {"RANK": "", "WORLD_SIZE": ""}, {"RANK": "1", "WORLD_SIZE": "1" + "0" * 30}):
        name = " ".join(f"{k}={v}" for k, v in said.items())
        for script in ("cifar_distill", "edm", "toy2d"):
            yield Case("environment", f"{script}: {name}", script, tiny(script, "--out", "new"),
                       must="RANK|WORLD_SIZE", env=said, item="10",
                       before="hangs, or: Default process group has not been initialized")


# ---------------------------------------------------------------------------------- crafted files

def resume(script, path):
    """Arguments that go on with the checkpoint at `path`, for two more steps."""
    return tiny(script, "--kimg", "0.032", "--resume", "--out", path.parent)


# What can't be told from a good file: moments of a parameter that was never moved; the noise of
# another kind of device, which a line on stderr says is drawn anew; and a student's weights without
# its options, which are a teacher's.
PLAUSIBLE = re.compile(r"^config|\.state\.\d+: removed|generator: (longer|empty|huge)")


def files(attack, share):
    """Every kind of file that a script reads, broken. share: of the files of each kind."""
    rng, folder = attack.rng, attack.folder / "crafted"
    folder.mkdir()

    def some(n):
        return max(3, round(share * n))
    sources = [("edm", functools.partial(resume, "edm"), crafted.checkpoints(
                    attack.states["edm"], folder / "edm", rng, some(32), edm.FREE)),
               ("cifar_distill", functools.partial(resume, "cifar_distill"), crafted.checkpoints(
                    attack.states["cifar_distill"], folder / "cifar", rng, some(40),
                    cifar_distill.FREE))]
    for script, name in (("edm", "teacher"), ("cifar_distill", "student")):
        state = torch.load(attack.folder / script / f"{name}.pt")
        options = ["-n", "1", *(["--steps", "1"] if script == "edm" else [])]
        sources.append((script, lambda p, o=options: ["sample", p, *o], crafted.checkpoints(
            {"ema": state["ema"]} | ({"config": {"sigma_init": 2.5}} if name == "student" else {}),
            folder / name, rng, some(14))))
    touch = attack.folder / "code_ran"
    weights = {k: v for k, v in list(attack.states["edm"]["ema"].items())[:3]}
    kinds = [("edm", lambda p: ["sample", p, "-n", "1", "--steps", "1"],
              lambda f, r: crafted.pickles(weights, touch, f, r)),
             ("fid", lambda p: [p, "good.npz"], crafted.sets),
             ("fid", lambda p: [p, "good.npz"], crafted.statistics),
             ("experiments", lambda p: ["--results", p, "--figures", "figures"], crafted.results)]
    for script, argv, make in kinds:
        here = folder / make.__name__.strip("<>")
        here.mkdir()
        made = list(make(here, rng))
        sources.append((script, argv, made if share == 1 else rng.sample(made, some(len(made)))))
    for script, argv, made in sources:
        for name, path, expect in made:
            students = path.parents[1].name == "student" or not name.startswith("config")
            expect = "either" if PLAUSIBLE.search(name) and students else expect
            yield Case("crafted file", f"{script}: {name}", script, argv(path), expect)


# ----------------------------------------------- what did not hold once, and what it printed then

def changed(attack, script, name, change):
    """Arguments that go on with this script's checkpoint after `change` of it, in place."""
    state = torch.load(attack.folder / script / "checkpoint.pt")
    change(state)
    path = attack.folder / "items" / name.replace(" ", "_") / "checkpoint.pt"
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    return resume(script, path)


def longer(state, key):
    """One moment of an optimizer, with another shape than its parameter."""
    moments = state[key]["state"][0]
    name = next(k for k in moments if k != "step")
    moments[name] = torch.zeros(3)


TYPE = "traceback: TypeError: "
ATTRIBUTE = "traceback: AttributeError: "
STATES = [      # item, script, name, what is changed, pattern of the line, what it was before
    ("1", "cifar_distill", "moments of another shape", lambda s: longer(s, "opt_g"), "opt_g",
     "reads beyond the tensor: INTERNAL ASSERT FAILED, or a segmentation fault"),
    ("1", "edm", "moments of another shape", lambda s: longer(s, "adam"), "adam",
     "segmentation fault"),
    ("11", "edm", "a generator of another type", lambda s: s.update(generator="evil"), "generator",
     TYPE + "expected a torch.ByteTensor, but got str"),
    ("11", "cifar_distill", "sums of another type", lambda s: s.update(sums=[1]), "sums",
     ATTRIBUTE + "'list' object has no attribute 'items'"),
    ("11", "cifar_distill", "seen of another type", lambda s: s.update(seen="1"), "seen",
     TYPE + "'>=' not supported between instances of 'str' and 'float'"),
    ("11", "cifar_distill", "rows of another type", lambda s: s.update(rows={1: 2}), "rows",
     ATTRIBUTE + "'int' object has no attribute 'items'"),
    ("11", "edm", "config of another type", lambda s: s.update(config=[1]), "run",
     ATTRIBUTE + "'list' object has no attribute 'get'"),
    ("12", "cifar_distill", "a level of another length", lambda s: s.update(level=s["level"][:1]),
     "level", "status 0, with other weights"),
    ("12", "cifar_distill", "weights that are NaN", lambda s: next(iter(s["G"].values())).fill_(
        torch.nan), "finite", "after 32 images: log_r is nan at sigma = 0.0936"),
    ("11", "cifar_distill", "an integer key in its config", lambda s: s["config"].update({7: 1}),
     "the name of an option is 7", "status 0"),
    ("11", "edm", "an integer key in its config", lambda s: s["config"].update({7: 1}),
     "the name of an option is 7", "status 0"),
    ("13", "cifar_distill", "no G", lambda s: s.pop("G"), "lacks G",
     "not a checkpoint of cifar_distill.py: 'G'"),
]
NEW = ["--out", "new"]
ALLOCATE = "traceback: RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0."
OPTIONS = [     # item, script, arguments, pattern of the line, what it was before
    ("11", "cifar_distill", tiny("cifar_distill", *NEW, "--h", "sba", "--lam", "1e308"), "lam",
     "traceback: RuntimeError: max(): Expected reduction dim to be specified"),
    ("11", "edm", tiny("edm", *NEW, "--save-every", "1e-30"), "save-every",
     "traceback: ZeroDivisionError: integer modulo by zero"),
    ("11", "edm", tiny("edm", *NEW, "--save-every", "inf"), "save-every",
     "traceback: OverflowError: cannot convert float infinity to integer"),
    ("11", "edm", tiny("edm", *NEW, "--ref-kimg", "0"), "ref-kimg",
     "traceback: ZeroDivisionError: float division by zero"),
    ("11", "cifar_distill", tiny("cifar_distill", *NEW, "--device", "meta"), "device",
     "traceback: RuntimeError: Tensor.item() cannot be called on meta tensors"),
    ("11", "toy2d", tiny("toy2d", "--device", "meta"), "device",
     "traceback: RuntimeError: META device type not an accelerator."),
    ("11", "toy2d", tiny("toy2d", "--width", 10 ** 12), "width", ALLOCATE),
    ("11", "toy2d", tiny("toy2d", "--batch", 10 ** 12), "batch", ALLOCATE),
    ("11", "toy2d", tiny("toy2d", "--width", 10 ** 6), "memory.*bytes", ALLOCATE),
    ("11", "cifar_distill", ["sample", "cifar_distill/student.pt", "-n", 2 * 10 ** 9],
     "memory.*bytes", "hangs"),
    ("11", "edm", ["sample", "items/sparse.pt"], "another kind", "the tensor is taken for weights"),
    ("11", "edm", ["sample", "items/integer.pt"], "name of a tensor",
     TYPE + "'<' not supported between instances of 'int' and 'str'"),
    ("12", "edm", tiny("edm", *NEW, "--kimg", "nan"), "kimg", "status 0, no images"),
    ("12", "edm", tiny("edm", *NEW, "--warmup-kimg", "-1"), "warmup", "status 0"),
    ("12", "edm", tiny("edm", *NEW, "--ema-kimg", "nan"), "ema-kimg", "status 0"),
    ("12", "edm", tiny("edm", *NEW, "--p-std", "-1"), "p-std", "status 0"),
    ("12", "cifar_distill", ["sample", "cifar_distill/student.pt", "--out", "a.evil"],
     "--out: must end in", "status 0, a PNG in a.evil"),
    ("12", "edm", ["sample", "edm/teacher.pt", "-n", 10 ** 6, "--out", "a.evil"],
     "--out: must end in", "status 0 after hours, a PNG in a.evil"),
    ("13", "edm", tiny("edm", *NEW, "--seed", 10 ** 30), "seed",
     "Overflow when unpacking long long"),
    ("13", "toy2d", tiny("toy2d", "--seed", 2 ** 64), "seed", "Overflow when unpacking long long"),
    ("13", "fid", ["train", "--data", "labelled.npz", *NEW], "needs 128",
     "Expected positive integer total_steps, but got 0"),
    ("13", "edm", ["sample", "items/protocol.pt"], "protocol.pt.*more than tensors",
     "31 lines, the last: Check the documentation of torch.load to learn more about types accepted "
     "by default with weights_only"),
    ("13", "fid", ["items/image.zip", "good.npz"], "image.zip.*0.png.*none of PNG",
     "cannot identify image file <_io.BytesIO object at 0x7f...>"),
    ("14", "edm", tiny("edm", *NEW, "--data", ""), "data", "reads the current folder"),
    ("14", "edm", tiny("edm", "--out", ""), "out", "writes into the current folder, status 0"),
    ("14", "fid", [""], "empty", "reads the current folder"),
    ("14", "bregman", ["--evil"], "evil", "2 lines"),
]
INDEX = "traceback: IndexError: index "
LABELS = {      # name of crafted.bad_labels -> what edm.py printed
    "-3": "status 0: trains as class 7", "fewer": "status 0", "bools": "status 0",
    "fractions": INDEX + "44 is out of bounds",
    "NaN": INDEX + "-9223372036854775808 is out of bounds",
    "10^6": INDEX + "1000000 is out of bounds", "none": INDEX + "is out of bounds",
    "2^63": INDEX + "-9223372036854775808 is out of bounds",
    "of 11 classes": INDEX + "10 is out of bounds for dimension 0 with size 10",
    "two axes": "traceback: RuntimeError: The size of tensor a (32) must match",
    "one for all": "traceback: IndexError: too many indices",
    "texts": "invalid literal for int() with base 10: np.str_('a')",
}


def items(attack):
    """The 15 things that did not hold, each as a case of its own."""
    folder, rng = attack.folder / "items", attack.rng
    folder.mkdir()
    torch.save({"a": torch.zeros(2)}, folder / "protocol.pt", pickle_protocol=4)
    torch.save({"a": torch.eye(2).to_sparse()}, folder / "sparse.pt")
    torch.save({1: torch.zeros(2)}, folder / "integer.pt")
    crafted.zipped(folder / "image.zip", {"0.png": b"evil", "1.png": crafted.png(32, 32)})
    for item, script, name, change, must, before in STATES:
        yield Case("named", f"{script}: {name}", script,
                   changed(attack, script, f"{script} {name}", change), must=must, item=item,
                   before=before)
    for item, script, argv, must, before in OPTIONS:
        yield Case("named", f"{script} {' '.join(map(str, argv[-2:]))!r}", script, argv, must=must,
                   item=item, before=before)
    for script, again in (("edm", []), ("edm", ["--resume"]), ("cifar_distill", ["--resume"]),
                          ("toy2d", [])):
        yield Case("two runs", f"{script} {' '.join(again)} in one folder", item="3",
                   before="both write, both end with status 0",
                   play=functools.partial(two_runs, script=script, again=again))
    path = folder / "beyond.pkl"
    path.write_bytes(crafted.with_stubs(lambda: {"ema": crafted.tree(
        {"a": crafted.claiming(0, (10 ** 9,), (1,))})}))
    yield Case("named", "a tensor beyond its storage", "edm", ["sample", path], item="4",
               must="beyond.pkl.*8 stored numbers",
               before="grown by 4 GB of whatever lay in memory")
    for script in ("edm", "cifar_distill"):
        yield Case("named", f"{script} killed while saving", item="5", before="21 MB are left",
                   play=functools.partial(killed, script=script, number=signal.SIGKILL,
                                          moment="saving"))
    wrong = crafted.bad_labels() | {"of 11 classes": np.arange(len(IMAGES)) % 11}
    for name, labels in wrong.items():
        path = folder / f"labels_{name.replace(' ', '_')}.npz"
        np.savez(path, images=IMAGES, labels=labels)
        yield Case("named", f"labels: {name}", "edm", [*tiny("edm"), "--data", path, "--config",
                   "compact-cond", *NEW], must="labels", item="7", before=LABELS[name])
    yield Case("kill", "a second Ctrl-C in a long evaluation", item="8", before="goes on",
               play=impatient)
    yield Case("named", "Ctrl-C in bench.py", item="8", before="goes on, or a traceback",
               play=interrupted)
    yield Case("named", "log.csv lost its rows", item="9", before="the row is lost", play=lost_rows)
    yield Case("named", "a covariance with a negative eigenvalue", "fid", ["good.npz", negative(
        folder)], must="eigenvalue", item="12", before="FD-compact -91")
    yield Case("named", "--batch 1", "cifar_distill", tiny("cifar_distill", "--batch", "1", "--out",
               "items/one"), "work", item="12", before="NaN in result.json")
    yield Case("named", "edm's checkpoint in cifar_distill.py", "cifar_distill",
               tiny("cifar_distill", "--resume", "--out", "edm"), must="edm/.*rows", item="13",
               before="not a checkpoint of cifar_distill.py: 'G'")
    yield from bombs(folder)


def negative(folder):
    path = folder / "negative.npz"
    np.savez(path, mu=np.zeros(128), sigma=np.diag([-9.0] + [1.0] * 127))
    return path


def lost_rows(case, attack):
    """Killed between checkpoint.pt and log.csv: the next start writes the row again."""
    run = attack.fresh("rows") / "run"
    shutil.copytree(attack.folder / "edm", run)
    whole = (run / "log.csv").read_text()
    (run / "log.csv").write_text(whole.splitlines(keepends=True)[0])
    ran = attack.child("edm", tiny("edm", "--out", run, "--resume")).wait()
    fine = (run / "log.csv").read_text() == whole
    return defect(ran, "work") or ("" if fine else "a row is lost"), "all rows are there again"


def bombs(folder):
    """Small files that would expand to gigabytes are refused in seconds."""
    gigabyte = crafted.zeros(2 ** 30)
    for name, member in (("bomb.zip", "a.png"), ("bomb.npz", "images.npy"), ("other.zip", "a.bin")):
        crafted.lying_zip(folder / name, member, gigabyte, 2 ** 30)
    crafted.zipped(folder / "large.zip", {"a.png": crafted.png(40000, 40000, gigabyte[:10 ** 6])})
    for name, must in (("bomb.zip", "bytes"), ("bomb.npz", "magic|header"),
                       ("other.zip", "no images"), ("large.zip", "pixels")):
        yield Case("named", f"expands to 1 GB: {name}", "fid", [folder / name, "good.npz"],
                   limit=20, must=f"{name}.*{must}", item="15",
                   before="1 GB is read, then: Bad CRC-32")


# ------------------------------------------------------------------------------------------ all

def cases(attack, short):
    """All cases, or a part of each kind but the named ones."""
    share, rng = (0.12, attack.rng) if short else (1, attack.rng)
    yield from items(attack)
    for made in (command_lines(rng), environments(), disks(), downloads(attack), processes()):
        first, *others = made
        yield first
        yield from rng.sample(others, max(1, round(share * len(others)))) if short else others
    yield from files(attack, share)
    yield from kills(attack, 8 if short else 62)
    for i in range(1 if short else 3):
        for script, argv in EARLY:
            yield Case("Ctrl-C at once", f"{script} {i}", item="8", before="traceback",
                       play=functools.partial(early, script=script, argv=argv))


def report(done, seed, seconds):
    """The table of figures, the items and the defects, in Markdown. done: (case, defect, said)."""
    lines = [f"seed {seed}, {seconds / 60:.1f} minutes, torch {torch.__version__}\n",
             "| attack | cases | defects |", "|---|---|---|"]
    count = Counter(case.kind for case, *_ in done)
    bad = Counter(case.kind for case, wrong, _ in done if wrong)
    lines += [f"| {kind} | {count[kind]} | {bad[kind]} |" for kind in sorted(count)]
    lines += [f"| all | {sum(count.values())} | {sum(bad.values())} |\n",
              "| item | case | before | now |", "|---|---|---|---|"]
    for case, wrong, said in sorted(done, key=lambda d: int(d[0].item or 0)):
        if case.item:
            words = f"DEFECT: {wrong}" if wrong else said
            row = [" ".join(w.replace("|", "¦").split())
                   for w in (case.item, case.name, case.before, words[:160])]
            lines.append(f"| {' | '.join(row)} |")
    lines += ["", *(f"- {case.kind}, {case.name}: {wrong}" for case, wrong, _ in done if wrong)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a part of the cases: 3 minutes")
    parser.add_argument("--seed", type=int, default=0, help="of files, moments and choices (0)")
    parser.add_argument("--only", default="", help="cases whose kind or name holds this text")
    parser.add_argument("--out", type=Path, default=HERE / "runs/attack.md", help="the report")
    parser.add_argument("--keep", action="store_true", help="keep the folder that it worked in")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # through `finally`
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a job in the background ignores it
    torch.set_num_threads(1)
    pyplot()
    start, done = time.monotonic(), []
    folder = Path(tempfile.mkdtemp(prefix="attack-"))
    attack = Attack(folder, random.Random(args.seed))
    attack.seed, attack.server = args.seed, None
    try:
        for case in cases(attack, args.short):
            if args.only in f"{case.kind} {case.name}":
                began = time.monotonic()
                wrong, said = case.run(attack)
                done.append((case, wrong, said.replace(f"{folder}/", "")))
                if wrong or time.monotonic() - began > 10:
                    print(f"{case.kind}, {case.name} ({time.monotonic() - began:.0f} s): {wrong}",
                          flush=True)
    finally:
        if attack.server:
            os.kill(attack.server, signal.SIGKILL)
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    text = report(done, args.seed, time.monotonic() - start)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(text, end="")
    return int(any(wrong for _, wrong, _ in done))


if __name__ == "__main__":
    sys.exit(main())
