"""Runs that are disturbed, for attack.py: kills, full disks, broken downloads, two runs in one
folder, two processes. Each function of a case returns (the defect, or "", and what was said)."""
import csv
import functools
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sandbox import HERE, Case, defect, leftovers, tiny, until

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


def interrupted(case, attack):
    """Ctrl-C at five moments of a bench.py that is loaded: it ends without a word."""
    rng, ended = random.Random(f"{attack.seed} {case.name}"), []
    for _ in range(5):
        child = attack.child("bench", tiny("bench"))
        time.sleep(rng.uniform(0, 1.5))
        child.kill(signal.SIGINT)
        ran = child.wait(20)
        ended.append(ran.status)
        if ran.status not in (0, 130) or ran.lines():
            return f"status {ran.status}: {ran.lines()[-1:]}", ""
    return "", f"status {ended}"


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
                   before="[enforce fail at inline_container.cc:672]; [Errno 28] without a file",
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
    "page.pt": (b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n<!DOCTYPE html><html>Log in...",
                "page"),
    "page2.pt": (b"HTTP/1.1 200 OK\r\n\r\n\n <HTML><body>Log in</body>", "page"),
    "garbage.pt": (b"\x00\xff\xfe evil\r\n\r\n", "download"),
    "status.pt": (b"HTTP/1.1 abc evil\r\n\r\n", "download"),
    "silence.pt": (b"", "download"), "404.pt": (b"HTTP/1.1 404 Not Found\r\n\r\n", "404"),
    "500.pt": (b"HTTP/1.1 500 Oops\r\n\r\nevil", "500"),
    "loop.pt": (b"HTTP/1.1 302 Found\r\nLocation: loop.pt\r\nContent-Length: 0\r\n\r\n",
                "download"),
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
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
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
        item, before = (("2", "kept as good") if name[:4] in ("half", "page", "unkn") else
                        ("11", "traceback"))
        yield Case("download", name, must=must, item=item, before=before, play=functools.partial(
            play, url=f"{base}/{name}", kept="delete" in must))
    for url in ("http://", "http:///a.pt", "http://[::1/a.pt", "http://a b/c.pt", "http://a:b/c.pt",
                "http://127.0.0.1:99999/a.pt", "http://127.0.0.1:1/a.pt", "http://\x00/a.pt",
                "http://127.0.0.1:1/", "http://127.0.0.1:1/..", "http://a\nb/c.pt", "HTTP://?/#",
                "ftp://127.0.0.1/a.pt", "file:///etc/passwd", "data://text/a.pt",
                f"http://{'a' * 300}/b.pt", f"http://127.0.0.1:1/{'a' * 300}.pt"):
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


EARLY = [("bregman", []), ("toy2d", []), ("edm", ["train", "--out", "a", "--data", "a"]),
         ("fid", ["a"]), ("cifar_distill", ["--teacher", "a"]), ("bench", []),
         ("experiments", ["--results", "a"])]
