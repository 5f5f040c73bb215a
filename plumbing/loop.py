"""A training run in its folder: steps, rows of log.csv, checkpoint.pt, signals, --resume; and the
other processes of a run under torchrun."""
import contextlib
import csv
import ctypes
import errno
import io
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import fcntl
except ImportError:                 # Windows, where a run's folder is not locked
    fcntl = None


def tune_cpu():
    """Make the CPU as fast as it can be for these networks, in this process.

    Denormal numbers, 100 times slower than others, become 0. glibc keeps the memory of freed
    tensors: given back to Linux, every page of every feature map would be cleared anew (15 to 20 %
    of a training step).
    """
    torch.set_flush_denormal(True)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)                     # M_MMAP_MAX: the heap for all sizes
        libc.mallopt(-1, 2 ** 31 - 1)           # M_TRIM_THRESHOLD: never shrink it


def check_finite(when, sigma, **named):
    """Stop on the first sample of the named values (n, ...) that is not finite, or beyond any use,
    and name its noise level, of sigma (n, 1, ...). Raises FloatingPointError."""
    for name, values in named.items():
        size = values.detach().flatten(1).abs().mean(1) if values.ndim > 1 else values.detach()
        bad = ~(size.abs() < 1e8)
        if bad.any():
            i = bad.nonzero()[0].item()
            raise FloatingPointError(f"{when}: {name} is {size[i].item():g} at sigma = "
                                     f"{sigma.flatten()[i].item():.4g}")


# ---------------------------------------------------------------------------------------- files

@contextlib.contextmanager
def atomic(path):
    """Yield a path beside `path`, and rename it to `path` when all went well: whoever looks sees
    the old file or the new one, whole. On any error, a full disk too, the old one stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())                # on the disk before it takes the old file's name
        os.replace(tmp, path)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or e.filename == str(tmp):
            raise OSError(e.errno, os.strerror(e.errno), str(path)) from e      # names the file
        raise
    finally:
        with contextlib.suppress(OSError):      # it would hide the first error
            tmp.unlink(missing_ok=True)


def save(obj, path):
    """Write what torch.save takes, through atomic()."""
    buffer = io.BytesIO()                       # torch's own writer hides a full disk
    torch.save(obj, buffer)
    with atomic(path) as tmp:
        tmp.write_bytes(buffer.getbuffer())


def load(path):
    """Return what save() wrote: tensors and plain values, and never code. Raises ValueError, which
    names the file, for anything else."""
    with open(path, "rb") as f:                 # its OSError names the file
        try:
            return torch.load(f, map_location="cpu", weights_only=True)
        except Exception as e:                  # torch raises many kinds for a broken file
            raise ValueError(f"{path}: broken, or it holds more than tensors and plain values"
                             ) from e


@contextlib.contextmanager
def claim(folder):
    """Make a run's folder and hold it: while one process does, a second run in it is refused.
    Yields the folder. Raises ValueError for the second run, OSError where one can't write."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to {folder}: choose another --out") from None
        except OSError:                         # a file system without locks
            pass
        yield folder


# ------------------------------------------------------------------------------ several processes

def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def processes(device):
    """Join torchrun's other processes, if there are any."""
    if world() > 1:
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        # the others wait while process 0 evaluates, which takes longer than the default allows
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                                timeout=timedelta(hours=2))
    yield
    if world() > 1:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first():
    """Let the other processes enter when process 0 has left, since it may download."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world() > 1:
        dist.barrier()


def gather(values):
    """Return the whole batch (n world, ...) of which each process has a share (n, ...): process k
    has every world-th sample from the k-th on."""
    if world() == 1:
        return values
    shares = [torch.empty_like(values) for _ in range(world())]
    dist.all_gather(shares, values.contiguous())
    return torch.stack(shares, 1).flatten(0, 1)


def all_mean(tensors):
    """Replace each tensor by its mean over all processes, in place and in one message."""
    if world() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = (flat / world()).split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [p.view_as(t) for p, t in zip(parts, tensors)])


# ---------------------------------------------------------------------------------------- a run

class Stop:
    """`with Stop() as stop:` makes SIGINT and SIGTERM set stop.number, so that a loop can end after
    its step; a second signal ends the process. In a thread, which gets no signals, it does nothing.

    While stop.at_once is set the first signal raises Stop.Now instead of waiting.
    """

    class Now(BaseException):
        """Leaves an evaluation, which may take long and changes nothing until its end."""

    def __enter__(self):
        self.number, self.at_once, self.old = 0, False, {}
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def ask(self, number, frame):
        if self.number:
            # Ctrl-C already reached this process, and torchrun sends it once more
            if world() == 1:
                os._exit(128 + number)
            return
        self.number = number
        if self.at_once:
            raise Stop.Now

    def agreed(self, device):
        """Return whether any process was asked: all leave their loops at the same step."""
        if world() > 1:
            number = torch.tensor(self.number, device=device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.number = int(number)
        return bool(self.number)


def begin(cfg, out, resume, free):
    """Return the state that a run goes on from, or {} for a new one.

    out: the run's folder. free: names of the options that may change when a run goes on. Raises
    ValueError or OSError unless the folder holds a checkpoint just where `resume` asks for one, of
    a run with the same options.
    """
    path = Path(out) / "checkpoint.pt"
    if not resume:
        if path.exists():
            raise FileExistsError(f"{path} exists: add --resume to go on, or choose another --out")
        return {}
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: no {path}")
    state = load(path)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise ValueError(f"{path}: not a run's checkpoint")
    old, new = state["config"], asdict(cfg)
    differ = [f"--{k.replace('_', '-')} was {old.get(k)!r}, is {v!r}" for k, v in new.items()
              if k not in free and old.get(k) != v]
    if differ:
        raise ValueError(f"{path} is a run of another configuration: {'; '.join(differ)}")
    return state


def take_up(trainer, state, path, networks, optimizers):
    """Load what a run saved into `trainer`. networks, optimizers: names of its attributes. Raises
    ValueError, which names the file `path`, for the state of another network or optimiser."""
    try:
        for key in (*networks, *optimizers):
            getattr(trainer, key).load_state_dict(state[key])
        for key in optimizers:
            for p, moments in getattr(trainer, key).state.items():
                for name, moment in moments.items():
                    if moment.shape != (() if name == "step" else p.shape):
                        # torch would crash on such a shape
                        raise ValueError(f"{key}: {name} is {tuple(moment.shape)}")
                    if name != "step":      # fused Adam counts on moments laid out as the parameter
                        moments[name] = torch.empty_like(p).copy_(moment)
        trainer.seen = state["seen"]
        if len(state["generator"]) == len(trainer.generator.get_state()):
            trainer.generator.set_state(state["generator"])
        else:
            trainer.generator.manual_seed(trainer.cfg.seed + trainer.seen)
            if rank() == 0:
                print("the noise goes on anew, from the seed: the run was on another kind of "
                      "device", file=sys.stderr)
    except (KeyError, AttributeError, TypeError, RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())
        raise ValueError(f"{path}: not a checkpoint of such a run: {reason[:200]}") from e


def train(trainer, cfg, out, evaluate, every, state, note=""):
    """Step a trainer until it has seen cfg.kimg thousand images, from `state` on.

    trainer: has seen, step() and state(). evaluate(rows) returns the next row of log.csv, numbers
    by name, each `every` thousand images. A signal may leave it at any point, so train() empties
    the trainer's sums after the row. Process 0 alone writes: checkpoint.pt before each evaluation
    and every cfg.save_every thousand images. note: the first line of log.csv. Returns the rows, and
    0 or 128 + the number of the signal that stopped the run, after it printed how to go on.
    """
    rows, before, start = state.get("rows", []), state.get("seconds", 0.0), time.time()
    end, main, steps, stepped = round(1e3 * cfg.kimg), rank() == 0, 0, 0.0
    waits = 1e3 * getattr(cfg, "wait_kimg", 0.0)        # a step takes less time until then

    def due(every):
        return trainer.seen % max(1, round(1e3 * every)) < cfg.batch or trainer.seen >= end

    def seconds():
        return before + time.time() - start

    def save_all():
        save(trainer.state() | {"rows": rows, "seconds": seconds()}, out / "checkpoint.pt")

    def add_row(values):
        row = {name: float(value) for name, value in values.items()}
        rows.append({"kimg": trainer.seen / 1e3, "seconds": seconds()} | row)
        trainer.sums = {}
        names = list(dict.fromkeys(k for row in rows for k in row))
        with atomic(out / "log.csv") as tmp, open(tmp, "w", newline="") as f:
            f.write(f"# {note}\n" if note else "")
            writer = csv.DictWriter(f, names)
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in rows)

    bar = tqdm(total=end, initial=trainer.seen, unit="img", disable=not main, smoothing=0.1)
    with Stop() as stop, bar:
        while True:
            done = rows and round(1e3 * rows[-1]["kimg"]) == trainer.seen       # in a resumed run
            if main and due(every) and not done and not stop.number:
                with contextlib.suppress(Stop.Now):
                    stop.at_once = True
                    values = evaluate(rows)
                    stop.at_once = False
                    add_row(values)
            if trainer.seen >= end or stop.agreed(cfg.device):
                break
            at, moving = time.time(), trainer.seen >= waits
            trainer.step()
            bar.update(cfg.batch)
            if moving:
                steps, stepped = steps + 1, stepped + time.time() - at
                hours = stepped / steps * (end - trainer.seen) / cfg.batch / 3600
                if main and steps == 10 and hours > 1:
                    tqdm.write(f"at this speed about {hours:.1f} hours are left", file=sys.stderr)
            if main and (due(cfg.save_every) or due(every)):    # before the evaluation
                save_all()
        if main:
            save_all()                                          # with the last row
    if stop.number and main:
        launcher = "python" if world() == 1 else f"torchrun --nproc_per_node={world()}"
        words = [a for a in sys.argv if a != "--resume"] + ["--resume"]
        print(f"stopped after {trainer.seen} images; to go on: {launcher} {shlex.join(words)}")
    return rows, stop.number and 128 + stop.number
