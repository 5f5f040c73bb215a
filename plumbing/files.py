"""Files: written aside and renamed, locked while a run writes, read with errors that name them."""
import contextlib
import errno
import os
import re
import tempfile
from pathlib import Path

import torch

from plumbing.run import Stop

try:
    import fcntl
except ImportError:                 # Windows: runs are not locked there
    fcntl = None


def _lock(fd):
    """Whether the file or folder was free, and now is this process's, until it is closed."""
    if fcntl:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:                                         # a file system without locks
            pass
    return True


def _sweep(folder, name=""):
    """Remove what killed processes left of files called `name`, or of all."""
    for left in folder.glob(f".{name or '*'}.????????.part*"):
        with contextlib.suppress(OSError):
            fd = os.open(left, os.O_RDONLY)
            if _lock(fd):
                left.unlink(missing_ok=True)
            os.close(fd)


@contextlib.contextmanager
def claim(folder):
    """Make a run's folder, hold it against other runs, and remove what a killed run left in it.
    Yields the folder. Raises ValueError while another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):            # one that can't be written fails here
        pass
    fd = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl and not _lock(fd):
            raise ValueError(f"another run is writing to {folder}: choose another --out")
        _sweep(folder)
        yield folder
    finally:
        if fcntl:
            os.close(fd)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path` and rename it to `path` when all went well, so that
    whoever looks sees the old file or the new one; on any error the old one stays. A full disk is
    an OSError that names the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent, path.name.translate({ord(c): "?" for c in "[]*"}))
    try:
        fd, tmp = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part" + path.suffix,
                                   dir=path.parent)
    except OSError as e:
        raise OSError(e.errno, os.strerror(e.errno), str(path)) from e
    tmp = Path(tmp)
    try:
        _lock(fd)                               # says to _sweep that its writer lives
        os.chmod(tmp, 0o644)
        yield tmp
        os.fsync(fd)                            # on disk before it takes the old file's name
        os.replace(tmp, path)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if e.filename == str(tmp):
                e.filename = str(path)
            raise
        needed = getattr(e, "needed", None) or f"more than {tmp.stat().st_size:,}"
        raise OSError(f"disk full: {path} needs {needed} bytes") from e
    finally:
        tmp.unlink(missing_ok=True)
        os.close(fd)


def save_atomic(obj, path):
    """torch.save through atomic()."""
    with atomic(path) as tmp, open(tmp, "wb") as f:
        try:
            torch.save(obj, f)
            f.flush()
        except (OSError, RuntimeError) as e:    # torch's zip writer hides a full disk in its own
            full = e if isinstance(e, OSError) else e.__context__
            if not isinstance(full, OSError):
                raise
            full.needed = f"about {_bytes(obj):,}"
            raise full


def _bytes(obj):
    if torch.is_tensor(obj):
        return obj.nbytes
    parts = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return sum(map(_bytes, parts))


def cache():
    """The folder of downloads."""
    return Path(os.environ.get("DI_BREGMAN_CACHE") or "~/.cache/di-bregman").expanduser()


@contextlib.contextmanager
def reading(path, what):
    """Turn whatever a broken file makes its reader raise into a ValueError that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, Stop.Now):
        raise
    except BaseException as e:                  # a decoder in Rust may panic with a BaseException
        if isinstance(e, OSError) and e.filename:       # says itself which file and why
            raise
        banned = re.search(r"GLOBAL (\S+)", str(e))     # torch's weights_only, in several lines
        words = getattr(e, "strerror", None) or str(e)
        lines = words.replace(str(path) + ": ", "").splitlines() or [repr(e)]
        reason = f"refused to load {banned[1]}" if banned else lines[0]
        reason = re.sub(r"^\[enforce fail at \S+\][ .]*", "", reason)      # torch's line of C++
        if "weights_only" in reason:                # torch's advice is to run what the file says
            reason = "it holds more than tensors and plain values"
        again = "; delete it to download it again" if cache() in Path(path).parents else ""
        raise ValueError(f"{path}: not {what}: {reason}{again}") from e
