"""Many runs, some at a time, each a process of one thread that yields to other work; and their
results, read again."""
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from plumbing.files import reading
from plumbing.run import Stop


def start(command, folder, cwd):
    """-> the process, whose words go to folder/log.txt; it gets no signal of the terminal's."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, process.pid, 19)
    return process


def last_line(file):
    lines = file.read_text(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def run_all(commands, cwd, at_once):
    """Run folder -> command, `at_once` of them at a time. One that fails is told in a line, and the
    others go on. A signal is handed on once, so that a run can save; no other run is then begun.
    -> exit status: 0; 1 where one failed; 128 + the signal's number."""
    waiting, running, done, failed, told = dict(commands), {}, 0, 0, False
    with Stop() as stop:
        while running or waiting and not stop.number:
            while waiting and len(running) < at_once and not stop.number:
                folder = next(iter(waiting))
                running[folder] = start(waiting.pop(folder), folder, cwd)
            if stop.number and not told:
                told = True
                for process in running.values():
                    process.terminate()
            time.sleep(0.1)
            for folder in [f for f, process in running.items() if process.poll() is not None]:
                code, done = running.pop(folder).returncode, done + 1
                if code and not told:
                    failed += 1
                    print(f"{folder} failed: {last_line(folder / 'log.txt')}", file=sys.stderr)
                elif not code:
                    print(f"{done} of {len(commands)}: {folder}", file=sys.stderr, flush=True)
    if stop.number:
        print("stopped; the same command goes on", file=sys.stderr)
        return 128 + stop.number
    return min(failed, 1)


@dataclass
class Done:
    """A finished run: result.json, and log.csv's rows (none in the plane)."""
    folder: Path
    result: dict
    log: list

    def numbers(self):
        """What tables show."""
        by_sigma = self.result.get("log_r_by_sigma", {})
        low = by_sigma.get(min(by_sigma, key=float, default=None))
        return self.log[-1] if self.log else self.result | {"log_r_low": low}

    def until(self, kimg):
        """The same after so many thousand images, or None if it has no row there."""
        if not self.log:
            return self
        end = kimg + self.result["config"]["batch"] / 1e3
        log = [row for row in self.log if row["kimg"] < end]
        return Done(self.folder, self.result, log) if log and log[-1]["kimg"] >= kimg else None


def read(folder):
    """-> Done, or None where no result is. Raises ValueError, naming the folder, for a bad one."""
    log = []
    if not (folder / "result.json").exists():
        return None
    with reading(folder, "a run's folder"):
        result = json.loads((folder / "result.json").read_text())
        result["config"]["h"]
        if (folder / "log.csv").exists():
            with open(folder / "log.csv") as f:
                log = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
            log[-1]["kimg"]
    return Done(folder, result, log)
