"""A hostile user: kills, full disks, crafted files, bad options, broken downloads, two runs at once.

    python tests/attack.py                      # everything, at most 15 minutes: runs/attack.md
    python tests/attack.py --short              # a part of it, at most 3
    python tests/attack.py --seed 1             # other files, other moments
    python tests/attack.py --only kill --keep   # the cases whose kind or name holds this text

A case is a script's main(argv) in a fork of this process, which has torch loaded, with its own
folder, 8 GiB of memory and a limit of seconds. It ends well with status 0, or with status 2 and
exactly one line that says what is wrong, and leaves what lay in its folder as it was. Anything else
is a defect: a signal, a traceback, a hang, a file that is taken though it is wrong, a leftover.
The exit status is 1 if there is any.
"""
import argparse
import csv
import functools
import http.server
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"}

from plumbing.plots import pyplot       # noqa: E402
from plumbing.run import run_main       # noqa: E402

import numpy as np                      # noqa: E402
import torch                            # noqa: E402

import bench                            # noqa: E402
import bregman                          # noqa: E402
import cifar_distill                    # noqa: E402
import crafted                          # noqa: E402
import edm                              # noqa: E402
import experiments                      # noqa: E402
import fid                              # noqa: E402
import toy2d                            # noqa: E402
from crafted import IMAGES              # noqa: E402
from data import save_images            # noqa: E402

SCRIPTS = {module.__name__: module.main
           for module in (bench, bregman, cifar_distill, edm, experiments, fid, toy2d)}
MEMORY = 8 * 2 ** 30
BAR = re.compile(r"\d+%\||(it|img|step|batch|B|s)/(s|it|img|step|batch)\b")      # tqdm's
UNCLEAR = re.compile(r"weights_only|BytesIO|inline_container|\.part|0x[0-9a-f]{6}|long long"
                     r"|Default process group|total_steps|enforce fail|\[Errno|<class|object at")


# ------------------------------------------------------------------------------- one process

@dataclass
class Ran:
    """How a process ended: its status, minus a signal's number, or None at its limit."""
    status: int | None
    out: str
    err: str

    def lines(self):
        """What it said on stderr, without progress bars."""
        return [line for line in re.split("[\r\n]", self.err) if line and not BAR.search(line)]


class Child:
    """main(argv) of a script in a fork, in the folder `cwd`."""

    def __init__(self, script, argv, cwd, env=None, setup=lambda: None):
        self.words = tempfile.TemporaryFile(), tempfile.TemporaryFile()
        self.status = None
        sys.stdout.flush(), sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self.live(script, list(map(str, argv)), cwd, env or {}, setup)

    def live(self, script, argv, cwd, env, setup):
        """The child's life."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, file in zip((1, 2), self.words):
                os.dup2(file.fileno(), number)
            os.chdir(cwd)
            os.environ |= env
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            sys.argv = [f"{script}.py", *argv]
            setup()
            run_main(SCRIPTS[script])
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except KeyboardInterrupt:                   # before run_main, or after it
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def ended(self):
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def kill(self, number=signal.SIGKILL):
        if not self.ended():
            os.kill(self.pid, number)

    def wait(self, limit=60):
        """-> Ran."""
        end = time.monotonic() + limit
        while not self.ended() and time.monotonic() < end:
            time.sleep(0.002)
        status = self.status
        if status is None:
            self.kill()
            os.waitpid(self.pid, 0)
        out, err = (self.said(file) for file in self.words)
        return Ran(status, out, err)

    def said(self, file):
        file.seek(0)
        text = file.read().decode(errors="replace")
        file.close()
        return text


def until(condition, limit=60):
    """Wait for it, looking 2,000 times a second -> whether it came."""
    end = time.monotonic() + limit
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.0005)
    return bool(done)


# ----------------------------------------------------------------------------------- the verdict

def leftovers(folder):
    return [str(p.relative_to(folder)) for p in folder.rglob(".*.part*")]


def contents(folder):
    """path -> what changes when a file in a folder does."""
    found = ((p, p.stat()) for p in folder.rglob("*") if p.is_file())
    return {p: (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in found}


def defect(ran, expect="refuse", must=""):
    """"" for a good end, else what is wrong with it. expect: "refuse", "work" or "either"; must: a
    pattern for the line."""
    lines, last = ran.lines(), (ran.lines() or [""])[-1]
    if ran.status is None:
        return "hang"
    if ran.status < 0:
        return f"killed by {signal.Signals(-ran.status).name}"
    if "Traceback" in ran.err:
        return f"traceback: {last}"
    if ran.status not in (0, 2):
        return f"status {ran.status}: {last}"
    if ran.status == 2 and len(lines) != 1:
        return f"{len(lines)} lines: {' / '.join(lines)[:300]}"
    if expect == "refuse" and not ran.status:
        return f"silent: taken, and said {ran.out.strip()[-200:]!r}"
    if expect == "work" and ran.status:
        return f"refused: {last}"
    if ran.status and (UNCLEAR.search(last) or not re.search(must, last)):
        return f"unclear: {last}"
    return ""


@dataclass
class Case:
    """Arguments of a script and how it should end. item: of the list of what did not hold once, in
    which `before` is what this case printed then."""
    kind: str
    name: str
    script: str = ""
    argv: list = field(default_factory=list)
    expect: str = "refuse"
    must: str = ""
    item: str = ""
    before: str = ""
    env: dict = field(default_factory=dict)
    limit: float = 60
    setup: object = lambda: None
    play: object = None             # play(case, attack) -> (defect, what was said), for the others

    def run(self, attack):
        """-> the defect, or "", and the last line that was said."""
        if self.play:
            return self.play(self, attack)
        before = contents(attack.folder)
        ran = Child(self.script, self.argv, attack.folder, self.env, self.setup).wait(self.limit)
        wrong = defect(ran, self.expect, self.must)
        after = contents(attack.folder)
        if ran.status and any(after.get(p) != was for p, was in before.items()):
            wrong = wrong or "damaged: a file that was there"
        if left := leftovers(attack.folder):
            wrong = wrong or f"leftover: {left[0]}"
        for p in set(after) - set(before):
            p.unlink(missing_ok=True)
        return wrong, (ran.lines() or ran.out.strip().splitlines() or [""])[-1]


# --------------------------------------------------------------------------- what is attacked

TINY = {        # a run of about a second
    "toy2d": "--steps 4 --init-steps 2 --batch 16 --width 8 --cells 4",
    "edm": "train --data good.npz --kimg 0.04 --batch 4 --preview 1 --save-every 0.008",
    "cifar_distill": "--preset smoke --data good.npz --reference good.npz --bank none --kimg 0.032 "
                     "--batch 4 --wait-kimg 0.008 --eval-every 0.016 --eval-n 8 --preview 4 "
                     "--save-every 0.008 --device cpu",
    "bregman": "", "fid": "good.npz good.npz", "bench": "--batch 2 --rounds 1 --frechet 4",
    "experiments": "--results none --figures figures",
}


class Attack:
    """The folder that cases run in, with what they start from."""

    def __init__(self, folder, rng):
        self.folder, self.rng, self.store = folder / "here", rng, folder / "store"
        self.folder.mkdir(), self.store.mkdir()
        save_images(torch.from_numpy(IMAGES), self.folder / "good.npz")
        np.savez(self.folder / "labelled.npz", images=IMAGES, labels=crafted.beyond_classes() % 10)
        np.savez(self.folder / "many.npz", images=np.tile(IMAGES, (3, 1, 1, 1)),
                 labels=np.arange(192) % 10)
        for script in ("edm", "cifar_distill"):
            ran = self.child(script, f"{TINY[script]} --out {script}").wait()
            if ran.status:
                raise RuntimeError(f"{script}.py does not run:\n{ran.err}")
        self.states = {script: torch.load(self.folder / script / "checkpoint.pt")
                       for script in ("edm", "cifar_distill")}
        self.teacher = str(cifar_distill.HERE / "pretrained/compact_teacher.pt")

    def child(self, script, argv, **how):
        return Child(script, argv.split() if isinstance(argv, str) else argv, self.folder, **how)

    def fresh(self, name):
        """A folder of the store, empty."""
        path = self.store / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


def tiny(script, *more):
    return [*TINY[script].split(), *map(str, more)]


# --------------------------------------------------------------------------------- command lines

BAD = ("", "nan", "inf", "-inf", "-1", "1e308", "-1e308", "1e-308", "evil", "10**12", "1" + "0" * 30,
       "0x10", "1,5", "٣e", "None", "\x00", "--", "1" * 5000)
TEXTS = ("", "\x00")            # what no text may be
COMMANDS = [        # script, what comes before the option
    ("bregman", []), ("toy2d", tiny("toy2d")), ("edm", tiny("edm", "--out", "new")),
    ("edm", ["sample", "edm/teacher.pt", "-n", "1", "--steps", "1"]),
    ("cifar_distill", tiny("cifar_distill", "--out", "new")),
    ("cifar_distill", ["sample", "cifar_distill/student.pt", "-n", "1"]),
    ("fid", tiny("fid")), ("fid", ["train", "--data", "labelled.npz", "--epochs", "1"]),
    ("bench", tiny("bench")), ("experiments", tiny("experiments")),
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
    ("cifar_distill", "--part level", "part"), ("cifar_distill", "--norm two-stage --batch 4", "20"),
    ("cifar_distill", "--resume --out nowhere", "resume"), ("cifar_distill", "--cond", "cond"),
    ("cifar_distill", "--teacher nowhere.pt --out new", "nowhere"),
    ("cifar_distill", "--data nowhere --out new", "nowhere"),
    ("cifar_distill", "--guide self --out new --data good.npz", "class"),
    ("cifar_distill", "--h sba --lam -51", "lam"), ("cifar_distill", "sample", "student"),
    ("cifar_distill", "sample good.npz", "good.npz"), ("cifar_distill", "--teacher . --out new", ""),
    ("cifar_distill", "sample edm/checkpoint.pt", "sigma_init"),
    ("fid", "", "a"), ("fid", "nowhere good.npz", "nowhere"), ("fid", "good.npz nowhere", "nowhere"),
    ("fid", "good.npz good.npz --save a.txt", "npz"), ("fid", "train --data good.npz", "labels"),
    ("fid", "train --data labelled.npz --out new", "128"), ("fid", "good.npz cifar10 -n 1", "2"),
    ("experiments", "--run nobody", "nobody"), ("experiments", "--results good.npz", "results"),
    ("experiments", "--results nowhere --gif", "nowhere"), ("bregman", "--out good.npz/a.png", "good"),
    ("bregman", "--out /proc/a.png", "/proc"), ("bregman", "--out a.evil", "evil"),
    ("bregman", "--out edm", "edm"), ("bregman", "--out " + "a" * 300 + ".png", "long"),
    ("bregman", "--out a", "a"), ("bench", "--net nobody", "nobody"),
    ("edm", "sample edm/teacher.pt -n 1 --steps 1 --out edm", "edm"),
    ("edm", "sample edm/teacher.pt -n 1 --steps 1 --out a.evil", ""),
    ("toy2d", "--steps 1 --out good.npz", "good.npz"), ("toy2d", "--steps 1 --out /proc/a", "/proc"),
]
HUGE = [        # script, options: more than there is memory for, or than can be counted
    ("toy2d", tiny("toy2d", "--width", 10 ** 9)), ("toy2d", tiny("toy2d", "--batch", 2 * 10 ** 9)),
    ("toy2d", tiny("toy2d", "--width", 10 ** 12)), ("toy2d", tiny("toy2d", "--batch", 10 ** 12)),
    ("toy2d", tiny("toy2d", "--cells", 10 ** 6, "--ratio", "exact")),
    ("edm", tiny("edm", "--batch", 2 * 10 ** 9, "--out", "new")),
    ("edm", "sample edm/teacher.pt --steps 1 --batch 2000000000 -n 2000000000".split()),
    ("edm", "sample edm/teacher.pt --steps 2000000000 -n 1 --batch 2000000000".split()),
    ("cifar_distill", tiny("cifar_distill", "--batch", 2 * 10 ** 9, "--out", "new")),
    ("cifar_distill", "sample cifar_distill/student.pt -n 2000000000".split()),
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
                yield Case("command line", f"{script} {flag}=evil", script, [*before, f"{flag}=evil"])
                continue
            for value in ["", *rng.sample(BAD[1:], 1 if flag in FREE_TEXT else 5)]:
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
    "--lam": ("-1",), "--w": ("-1", "1e308", "1e-308", "-1e308"), "--p-mean": ("-1", "1e-308"),
}


def expected(flag, value):
    if flag in FREE_TEXT and value not in TEXTS:
        return "either"
    if flag in ("--guide", "--init", "--reward") and not value:
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
    more = {"edm": "0.048", "cifar_distill": "0.04"}[script]
    return tiny(script, "--kimg", more, "--resume", "--out", path.parent)


# what can't be told from a good file: moments of a parameter that was never moved, and the noise of
# another kind of device, which a line on stderr says is drawn anew
TOLD = re.compile(r"\.state\.\d+: removed|generator: (longer|empty|huge)")


def files(attack, share):
    """Every kind of file that a script reads, broken. share: of the files of each kind."""
    rng, folder = attack.rng, attack.folder / "crafted"
    folder.mkdir()

    def some(n):
        return max(3, round(share * n))
    sources = [("edm", functools.partial(resume, "edm"), crafted.checkpoints(
                    attack.states["edm"], folder / "edm", rng, some(45), edm.FREE)),
               ("cifar_distill", functools.partial(resume, "cifar_distill"), crafted.checkpoints(
                    attack.states["cifar_distill"], folder / "cifar", rng, some(55),
                    cifar_distill.FREE))]
    for script, name in (("edm", "teacher"), ("cifar_distill", "student")):
        state = torch.load(attack.folder / script / f"{name}.pt")
        options = ["-n", "1", *(["--steps", "1"] if script == "edm" else [])]
        sources.append((script, lambda p, o=options: ["sample", p, *o], crafted.checkpoints(
            {"ema": state["ema"]} | ({"config": {"sigma_init": 2.5}} if name == "student" else {}),
            folder / name, rng, some(20))))
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
            if script != "fid" and TOLD.search(name):
                expect = "either"
            yield Case("crafted file", f"{script}: {name}", script, argv(path), expect)


# ------------------------------------------------------------------------------------------ kills

def timeless(value):
    """Without what no two runs share."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "out")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def same(a, b):
    if torch.is_tensor(a):
        return torch.is_tensor(b) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def outcome(out):
    """What a run left, for comparison."""
    left = {"names": sorted(p.name for p in out.iterdir())}
    for p in out.iterdir():
        if p.suffix == ".pt":
            left[p.name] = timeless(torch.load(p))
        elif p.suffix == ".csv":
            left[p.name] = [timeless(row) for row in csv.DictReader(p.read_text().splitlines())]
        elif p.name == "result.json" and "history" in (result := json.loads(p.read_text())):
            left[p.name] = timeless(result)
        elif p.suffix in (".npy", ".npz"):
            left[p.name] = p.read_bytes()
    return left


@functools.cache
def unbroken(attack, script):
    """-> the outcome of a run that nobody disturbs, and its seconds."""
    out, start = attack.fresh(f"unbroken_{script}") / "run", time.monotonic()
    ran = attack.child(script, tiny(script, "--out", out)).wait(120)
    assert not ran.status, ran.err
    return outcome(out), time.monotonic() - start


def killed(case, attack, script, number, moment):
    """A run is killed once or twice; then it must go on, and end as if nothing had been."""
    reference, seconds = unbroken(attack, script)
    rng, out = random.Random(f"{attack.seed} {case.name}"), attack.fresh("killed") / "run"
    argv = tiny(script, "--out", out)
    for _ in range(rng.choice((1, 2))):
        again = ["--resume"] if (out / "checkpoint.pt").exists() else []
        child = attack.child(script, argv + again)
        if moment == "saving":
            until(lambda: child.ended() or any(out.glob(".*.part*")))
        elif moment == "evaluating":
            until(lambda: child.ended() or (out / "log.csv").exists())
            time.sleep(rng.uniform(0, 0.3))
        else:
            time.sleep(rng.uniform(0, seconds))
        child.kill(number)
        ran = child.wait(60)
        fine = {signal.SIGKILL: (0, -9), signal.SIGTERM: (0, -15, 143), signal.SIGINT: (0, 130)}
        if ran.status not in fine[number] or "Traceback" in ran.err:
            return f"status {ran.status}: {ran.lines()[-1:]}", ""
    again = ["--resume"] if (out / "checkpoint.pt").exists() else []
    ran = attack.child(script, argv + again).wait(120)
    if ran.status:
        return f"does not go on: {ran.lines()[-1:]}", ""
    if left := leftovers(out.parent):
        return f"leftover: {left[0]}", ""
    if not same(reference, outcome(out)):
        return "another result than the unbroken run's", ""
    return "", "ended bit for bit as the unbroken run"


def kills(attack, n):
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    moments = ("any time", "saving", "any time", "evaluating")
    for i in range(n):
        script = "toy2d" if i % 10 == 9 else ("edm", "cifar_distill")[i % 2]
        number, moment = signals[i % 3], "any time" if script == "toy2d" else moments[i // 3 % 4]
        yield Case("kill", f"{script} {number.name} {moment} {i}", play=functools.partial(
            killed, script=script, number=number, moment=moment))


def early(case, attack, script, argv):
    """Ctrl-C in the first 1.5 seconds of a process of its own: no traceback."""
    rng, cwd = random.Random(f"{attack.seed} {case.name}"), attack.fresh("early")
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen([sys.executable, HERE / f"{script}.py", *argv], cwd=cwd,
                                   stdout=words, stderr=words)
        maps = Path(f"/proc/{process.pid}/maps")        # before, Python itself would complain
        until(lambda: process.poll() is not None or "ctypes" in maps.read_text())
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGINT)
        try:
            status = process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "hang", ""
        words.seek(0)
        text = words.read().decode(errors="replace")
    if "Traceback" in text or "Exception ignored" in text or status not in (130, -2, 0, 2):
        return f"status {status}: {text[-300:]}", ""
    return "", f"status {status}"


def impatient(case, attack):
    """A second Ctrl-C ends an evaluation of hours at once."""
    out = attack.fresh("impatient") / "run"
    child = attack.child("cifar_distill", tiny("cifar_distill", "--eval-n", 10 ** 6, "--out", out))
    until(lambda: child.ended() or (out / "log.csv").exists())
    time.sleep(0.5)
    child.kill(signal.SIGINT)
    time.sleep(0.05)
    child.kill(signal.SIGINT)
    ran = child.wait(20)
    wrong = "" if ran.status == 130 and "Traceback" not in ran.err else f"status {ran.status}"
    return wrong, f"status {ran.status}"


# ------------------------------------------------------- full disks, downloads, two runs at once

def full_disk(case, attack, script, argv, size):
    """A disk of `size` bytes: the line says so, and names a file of this folder; what was there
    can still be read; with room the run goes on."""
    out = attack.fresh("disk")
    mounted = not subprocess.call(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", out],
                                  stderr=subprocess.DEVNULL)
    try:
        limit = (size, resource.RLIM_INFINITY)
        setup = (lambda: None) if mounted else lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, limit)
        argv = [a.replace("OUT", str(out / "run")) for a in argv]
        ran = attack.child(script, argv, setup=setup).wait(120)
        said = f"disk full: {out}/.* needs|{out}.*No space left|No space left.*{out}"
        wrong = defect(ran, "refuse", said)
        for p in out.rglob("*.pt"):
            torch.load(p)
        if left := leftovers(out):
            wrong = wrong or f"leftover: {left[0]}"
        return wrong, (ran.lines() or [ran.out])[-1]
    finally:
        if mounted:
            subprocess.check_call(["umount", "-l", out])


def disks():
    run = {script: [*tiny(script), "--out", "OUT"] for script in ("edm", "cifar_distill", "toy2d")}
    draw = ["sample", "edm/teacher.pt", "-n", "16", "--steps", "1", "--out"]
    tests = [("edm", run["edm"], s) for s in ("8k", "100k", "4m", "12m")]
    tests += [("cifar_distill", run["cifar_distill"], s) for s in ("8k", "2m", "20m")]
    tests += [("toy2d", run["toy2d"], s) for s in ("8k", "60k")]
    tests += [("bregman", ["--out", "OUT/w.png"], s) for s in ("8k", "40k")]
    tests += [("edm", [*draw, f"OUT/a{suffix}"], "8k") for suffix in (".npz", ".zip", ".png")]
    tests += [("fid", ["good.npz", "good.npz", "--save", "OUT/s.npz"], "16k"),
              ("fid", ["train", "--data", "many.npz", "--epochs", "1", "--out", "OUT"], "400k")]
    for script, argv, size in tests:
        size = int(size[:-1]) * {"k": 2 ** 10, "m": 2 ** 20}[size[-1]]
        yield Case("full disk", f"{script} {' '.join(argv)[-12:]} on {size} bytes", item="6",
                   before="[enforce fail at inline_container.cc:672]; or [Errno 28], without a file",
                   play=functools.partial(full_disk, script=script, argv=argv, size=size))


def two_runs(case, attack, script, again):
    """A second run in the folder of one that is running is refused; after it died, one is not."""
    out = attack.fresh("two") / "run"
    argv = tiny(script, "--out", out)
    first = attack.child(script, [*argv, *{"toy2d": ["--steps", "100000"]}.get(
        script, ["--kimg", "100"])])
    until(lambda: first.ended() or out.exists())
    if script != "toy2d":
        until(lambda: first.ended() or (out / "checkpoint.pt").exists())
    time.sleep(0.3)
    ran = attack.child(script, argv + again).wait()
    first.kill()
    first.wait()
    wrong = defect(ran, "refuse", "another run is writing to" if again or script == "toy2d"
                   else "exists: add --resume")
    third = attack.child(script, argv + (["--kimg", "100.0", "--resume"] if again else again))
    if script == "toy2d":
        after = third.wait()
        wrong = wrong or defect(after, "work")
    else:
        third.kill()
        third.wait()
    if script == "toy2d" and (left := leftovers(out.parent)):
        wrong = wrong or f"leftover: {left[0]}"
    return wrong, (ran.lines() or [ran.out])[-1]


ANSWERS = {     # path: what the server says before it hangs up, and what the line must say
    "half.pt": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"PK" * 250, "500 bytes came"),
    "none.pt": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "0 bytes"),
    "page.pt": (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n<!DOCTYPE html><html>Log in...", "page"),
    "page2.pt": (b"HTTP/1.1 200 OK\r\n\r\n\n <HTML><body>Log in</body>", "page"),
    "garbage.pt": (b"\x00\xff\xfe evil\r\n\r\n", "download"),
    "status.pt": (b"HTTP/1.1 abc evil\r\n\r\n", "download"),
    "silence.pt": (b"", "download"), "404.pt": (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
    "500.pt": (b"HTTP/1.1 500 Oops\r\n\r\nevil", "500"),
    "loop.pt": (b"HTTP/1.1 302 Found\r\nLocation: loop.pt\r\nContent-Length: 0\r\n\r\n", "download"),
    "file.pt": (b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n", "download"),
    "chunk.pt": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFF\r\nabc", "download"),
    "chunk2.pt": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nevil\r\n", "download"),
    "length.pt": (b"HTTP/1.1 200 OK\r\nContent-Length: evil\r\n\r\nabc", "download"),
    "header.pt": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 999 + b"\r\nabc", "download"),
    "unknown.pt": (b"HTTP/1.1 200 OK\r\n\r\n" + b"PK" * 250, "delete it to download it again"),
    "pickle.pkl": (b"HTTP/1.1 200 OK\r\n\r\n\x80\x04N.", "delete it to download it again"),
}


def serve(listener):
    """A server in a process of its own, which answers with ANSWERS."""
    pid = os.fork()
    if pid:
        return pid
    while True:
        connection, _ = listener.accept()
        asked = connection.recv(2 ** 16).split(b" ")
        name = asked[1].decode().strip("/") if len(asked) > 1 else ""
        connection.sendall(ANSWERS.get(name, (b"", ""))[0])
        connection.close()


def downloads(attack):
    """Broken downloads: one line; nothing kept, but what can't be known to be broken."""
    listener = socket.create_server(("127.0.0.1", 0))
    attack.server = serve(listener)
    base, cache = f"http://127.0.0.1:{listener.getsockname()[1]}", attack.store / "cache"
    listener.close()

    def play(case, attack, url, kept):
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        ran = attack.child("edm", ["sample", url, "-n", "1"],
                           env={"DI_BREGMAN_CACHE": str(cache)}).wait(30)
        wrong, left = defect(ran, "refuse", case.must), [p.name for p in cache.iterdir()]
        if bool(left) != kept:
            wrong = wrong or f"kept {left}"
        return wrong, (ran.lines() or [ran.out])[-1]

    for name, (_, must) in ANSWERS.items():
        kept = "delete" in must
        yield Case("download", name, must=must, item="2" if name[:4] in ("half", "page", "unkn") else
                   "11", before="kept as good" if name[:4] in ("half", "page", "unkn") else
                   "traceback", play=functools.partial(play, url=f"{base}/{name}", kept=kept))
    for url in ("http://", "http:///a.pt", "http://[::1/a.pt", "http://a b/c.pt", "http://a:b/c.pt",
                "http://127.0.0.1:99999/a.pt", "http://127.0.0.1:1/a.pt", "http://\x00/a.pt",
                "http://127.0.0.1:1/", "http://127.0.0.1:1/..", "http://a\nb/c.pt", "HTTP://?/#",
                "ftp://127.0.0.1/a.pt", "file:///etc/passwd", "data://text/a.pt", "http://" + "a" * 300
                + "/b.pt", "http://127.0.0.1:1/" + "a" * 300 + ".pt"):
        yield Case("download", repr(url[:60]), item="11", before="traceback: InvalidURL",
                   play=functools.partial(play, url=url, kept=False))


# ---------------------------------------------------------------------------------- two processes

def pair(attack, script, argv):
    """-> two children that are processes 0 and 1 of one run."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return [attack.child(script, argv, env={
        "RANK": str(k), "LOCAL_RANK": str(k), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}) for k in (0, 1)]


def bad_in_both(case, attack, argv, most):
    """What is wrong for both processes is told in one line, or in one line a process."""
    both = [child.wait(60) for child in pair(attack, "cifar_distill", argv)]
    lines = [line for ran in both for line in ran.lines()]
    if any(ran.status != 2 or "Traceback" in ran.err for ran in both):
        return f"status {[ran.status for ran in both]}: {lines[-1:]}", ""
    return "" if 1 <= len(lines) <= most else f"{len(lines)} lines", lines[0]


def stopped_in_two(case, attack, number, which):
    """A signal to one process, or to both: the run of two goes on and ends as an unbroken one. If
    one dies at once, the other says so in a line."""
    whole, out = attack.fresh("two_whole") / "run", attack.fresh("two_stopped") / "run"
    for child in pair(attack, "cifar_distill", tiny("cifar_distill", "--out", whole)):
        if (ran := child.wait(120)).status:
            return f"a run of two: {ran.lines()[-1:]}", ""
    argv = tiny("cifar_distill", "--out", out)
    both = pair(attack, "cifar_distill", argv)
    until(lambda: both[0].ended() or (out / "checkpoint.pt").exists())
    for k in which:
        both[k].kill(number)
    ran = [child.wait(60) for child in both]
    for k in (0, 1):
        dead = number == signal.SIGKILL
        wrong = (defect(ran[k], "refuse", "process") if dead and k not in which else
                 "" if ran[k].status in (-9, 0, 128 + number) else f"status {ran[k].status}")
        if wrong or "Traceback" in ran[k].err:
            return f"process {k}: {wrong}", ""
    for child in pair(attack, "cifar_distill", argv + ["--resume"]):
        if (again := child.wait(120)).status:
            return f"does not go on: {again.lines()[-1:]}", ""
    if left := leftovers(out):
        return f"leftover: {left[0]}", ""
    fine = same(outcome(whole), outcome(out))
    return "" if fine else "another result than the unbroken run's", "ended bit for bit the same"


def processes():
    bad = functools.partial(bad_in_both, most=1)
    yield Case("two processes", "a bad option", item="10", before="40 to 100 lines", play=functools.
               partial(bad, argv=["--batch", "evil"]))
    yield Case("two processes", "a bad file", play=functools.partial(
        bad_in_both, argv=tiny("cifar_distill", "--teacher", "nowhere", "--out", "new"), most=2))
    yield Case("two processes", "nothing to resume", play=functools.partial(
        bad, argv=tiny("cifar_distill", "--resume", "--out", "nowhere")))
    yield Case("two processes", "an odd batch", play=functools.partial(
        bad, argv=tiny("cifar_distill", "--batch", "5", "--out", "new")))
    for number, which in ((signal.SIGTERM, (0, 1)), (signal.SIGINT, (1,)), (signal.SIGKILL, (1,)),
                          (signal.SIGKILL, (0,))):
        yield Case("two processes", f"{number.name} to {which}", play=functools.partial(
            stopped_in_two, number=number, which=which))


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


STATES = [      # item, script, name, what is changed, pattern of the line, what it was before
    ("1", "cifar_distill", "moments of another shape", lambda s: longer(s, "opt_g"), "opt_g",
     "segmentation fault"),
    ("1", "edm", "moments of another shape", lambda s: longer(s, "adam"), "adam",
     "segmentation fault"),
    ("11", "edm", "a generator of another type", lambda s: s.update(generator="evil"), "generator",
     "traceback"),
    ("11", "cifar_distill", "sums of another type", lambda s: s.update(sums=[1]), "sums", "traceback"),
    ("11", "cifar_distill", "seen of another type", lambda s: s.update(seen="1"), "seen", "traceback"),
    ("11", "edm", "rows of another type", lambda s: s.update(rows={1: 2}), "rows", "traceback"),
    ("11", "edm", "config of another type", lambda s: s.update(config=[1]), "run", "traceback"),
    ("12", "cifar_distill", "a level of another length", lambda s: s.update(level=s["level"][:1]),
     "level", "goes on, with other weights"),
    ("12", "cifar_distill", "weights that are NaN", lambda s: next(iter(s["G"].values())).fill_(
        torch.nan), "finite", "goes on, status 0"),
    ("13", "cifar_distill", "no G", lambda s: s.pop("G"), "lacks G",
     "not a checkpoint of cifar_distill.py: 'G'"),
]
OPTIONS = [     # item, script, arguments, pattern of the line, what it was before
    ("11", "bregman", ["--lam", "1e308"], "lam", "traceback (toy2d.py)"),
    ("11", "toy2d", tiny("toy2d", "--h", "sba", "--lam", "1e308"), "lam", "traceback"),
    ("11", "edm", tiny("edm", "--out", "new", "--save-every", "1e-30"), "save-every", "traceback"),
    ("11", "edm", tiny("edm", "--out", "new", "--save-every", "inf"), "save-every", "traceback"),
    ("11", "edm", tiny("edm", "--out", "new", "--ref-kimg", "0"), "ref-kimg", "traceback"),
    ("11", "cifar_distill", tiny("cifar_distill", "--out", "new", "--device", "meta"), "device",
     "traceback"),
    ("11", "toy2d", tiny("toy2d", "--device", "meta"), "device", "traceback"),
    ("11", "toy2d", tiny("toy2d", "--width", 10 ** 12), "width", "traceback"),
    ("11", "toy2d", tiny("toy2d", "--batch", 10 ** 12), "batch", "traceback"),
    ("11", "toy2d", tiny("toy2d", "--width", 10 ** 6), "memory", "traceback"),
    ("12", "edm", tiny("edm", "--out", "new", "--kimg", "nan"), "kimg", "0 images, status 0"),
    ("12", "edm", tiny("edm", "--out", "new", "--warmup-kimg", "-1"), "warmup", "status 0"),
    ("12", "edm", tiny("edm", "--out", "new", "--ema-kimg", "nan"), "ema-kimg", "status 0"),
    ("12", "edm", tiny("edm", "--out", "new", "--p-std", "-1"), "p-std", "status 0"),
    ("13", "edm", tiny("edm", "--out", "new", "--seed", 10 ** 30), "seed",
     "Overflow when unpacking long long"),
    ("13", "toy2d", tiny("toy2d", "--seed", 2 ** 64), "seed", "Overflow when unpacking long long"),
    ("13", "fid", ["train", "--data", "labelled.npz", "--out", "new"], "needs 128",
     "Expected positive integer total_steps, but got 0"),
    ("13", "edm", ["sample", "items/evil.pt"], "evil.pt.*refused to load print",
     "Weights only load failed ... set weights_only to False"),
    ("13", "fid", ["items/image.zip", "good.npz"], "image.zip.*0.png.*none of PNG",
     "cannot identify image file <_io.BytesIO object at 0x7f...>"),
    ("14", "edm", tiny("edm", "--out", "new", "--data", ""), "data", "reads the current folder"),
    ("14", "edm", tiny("edm", "--out", ""), "out", "writes into the current folder"),
    ("14", "fid", [""], "empty", "reads the current folder"),
    ("14", "bregman", ["--evil"], "evil", "two lines"),
]


def items(attack):
    """The 15 things that did not hold, each as a case of its own."""
    folder, rng = attack.folder / "items", attack.rng
    folder.mkdir()
    torch.save({"a": crafted.Calls(print, "evil")}, folder / "evil.pt")
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
               must="beyond.pkl.*8 stored numbers", before="grown by 4 GB of whatever lay in memory")
    for script in ("edm", "cifar_distill"):
        yield Case("named", f"{script} killed while saving", item="5", before="21 MB are left",
                   play=functools.partial(killed, script=script, number=signal.SIGKILL,
                                          moment="saving"))
    for name, labels in (crafted.bad_labels() | {"of 11 classes": crafted.beyond_classes()}).items():
        path = folder / f"labels_{len(name)}_{name[:3].strip('-^')}.npz"
        np.savez(path, images=IMAGES, labels=labels)
        yield Case("named", f"labels: {name}", "edm", [*tiny("edm"), "--data", path, "--config",
                   "compact-cond", "--out", "new"], must="labels", item="7",
                   before="-3 trains as class 7, fractions are cut, others end in tracebacks")
    yield Case("kill", "a second Ctrl-C in a long evaluation", item="8", before="goes on",
               play=impatient)
    yield Case("named", "log.csv lost its rows", item="9", before="the row is lost", play=lost_rows)
    yield from environments()
    yield Case("named", "a covariance with a negative eigenvalue", "fid", ["good.npz", negative(
        folder)], must="eigenvalue", item="12", before="FD-compact -91")
    yield Case("named", "--batch 1", "cifar_distill", tiny("cifar_distill", "--batch", "1", "--out",
               "items/one"), "work", item="12", before="NaN in result.json")
    yield Case("named", "edm's checkpoint in cifar_distill.py", "cifar_distill",
               ["sample", "edm/teacher.pt"], must="sigma_init", item="13",
               before="not a checkpoint of cifar_distill.py: 'sigma_init'")
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
    for name, must in (("bomb.zip", "bytes"), ("bomb.npz", "array|claims|npy"), ("other.zip", "no images"),
                       ("large.zip", "pixels")):
        yield Case("named", f"expands to 1 GB: {name}", "fid", [folder / name, "good.npz"], limit=20,
                   must=f"{name}.*{must}", item="15", before="read for tens of seconds, 1 GB and more")


# ------------------------------------------------------------------------------------------ all

EARLY = [("bregman", []), ("toy2d", []), ("edm", ["train", "--out", "a", "--data", "a"]), ("fid", ["a"]),
         ("cifar_distill", ["--teacher", "a"]), ("bench", []), ("experiments", ["--results", "a"])]


def cases(attack, short):
    """All cases, or a part of each kind but the named ones."""
    share, rng = (0.12, attack.rng) if short else (1, attack.rng)
    yield from items(attack)
    for kind, made in (("option", list(command_lines(rng))), ("disk", list(disks())),
                       ("download", list(downloads(attack))), ("pair", list(processes()))):
        yield from rng.sample(made, round(share * len(made))) if short else made
    yield from files(attack, share)
    yield from kills(attack, 8 if short else 70)
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
            row = case.item, case.name, case.before, words[:160]
            lines.append("| " + " | ".join(" ".join(w.replace("|", "¦").split()) for w in row) + " |")
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
