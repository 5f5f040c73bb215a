"""What attack.py's cases run in: a script's main(argv) in a fork of a process that has torch
loaded, in a folder of its own, with 8 GiB of memory and a limit of seconds; and the verdict on how
it ended."""
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "tests")]
os.environ |= {"OMP_NUM_THREADS": "1", "no_proxy": "127.0.0.1", "PYTHONDONTWRITEBYTECODE": "1"}

from plumbing.run import run_main       # noqa: E402

import numpy as np                      # noqa: E402
import torch                            # noqa: E402

import bench                            # noqa: E402
import bregman                          # noqa: E402
import cifar_distill                    # noqa: E402
import edm                              # noqa: E402
import experiments                      # noqa: E402
import fid                              # noqa: E402
import plane                            # noqa: E402
import sd_distill                       # noqa: E402
import toy2d                            # noqa: E402
from crafted import IMAGES              # noqa: E402
from data import save_images            # noqa: E402

SCRIPTS = {module.__name__: module.main
           for module in (bench, bregman, cifar_distill, edm, experiments, fid, plane,
                          sd_distill, toy2d)}
MEMORY = 8 * 2 ** 30
BAR = re.compile(r"\d+%\||(it|img|step|batch|B|s)/(s|it|img|step|batch)\b")      # tqdm's
UNCLEAR = re.compile(r"weights_only|BytesIO|inline_container|\.part|0x[0-9a-f]{6}|long long"
                     r"|Default process group|total_steps|enforce fail|<class|object at")


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
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
    "edm": "train --data good.npz --kimg 0.024 --batch 4 --preview 1 --save-every 0.008",
    "cifar_distill": "--preset smoke --data good.npz --reference good.npz --bank none --kimg 0.024 "
                     "--batch 4 --wait-kimg 0.008 --eval-every 0.024 --eval-n 8 --preview 1 "
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
        np.savez(self.folder / "labelled.npz", images=IMAGES, labels=np.arange(len(IMAGES)) % 10)
        np.savez(self.folder / "many.npz", images=np.tile(IMAGES, (3, 1, 1, 1)),
                 labels=np.arange(192) % 10)
        for script in ("edm", "cifar_distill"):
            ran = self.child(script, f"{TINY[script]} --out {script}").wait()
            if ran.status:
                raise RuntimeError(f"{script}.py does not run:\n{ran.err}")
        self.states = {script: torch.load(self.folder / script / "checkpoint.pt")
                       for script in ("edm", "cifar_distill")}

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
