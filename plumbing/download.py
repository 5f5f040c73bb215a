"""Checked downloads, kept in ~/.cache/di-bregman, or where $DI_BREGMAN_CACHE says.

A file put there by hand, under its own name, is used as if it had been downloaded.
"""
import hashlib
import http.client
import re
import urllib.request

from tqdm import tqdm

from plumbing.files import atomic, cache

PAGE = (b"<!doctype", b"<html")     # how a login page or an error page begins


def download(url, sha256=None, apart=False):
    """-> Path of the file at `url` in the cache, fetched once with a progress bar.

    url: http:// or https://. sha256: hexadecimal, None where the publisher's is not known. apart:
    put some digits of the address before the file's name, which others may have too. Raises
    ValueError for another kind of address and for a file of another sha256 (a fresh download is not
    kept), OSError where the file can't be fetched whole, naming the place to put it by hand.
    """
    name = re.split("[?#]", url)[0].rsplit("/", 1)[-1]
    if not url.lower().startswith(("http://", "https://")) or not name.strip("."):
        raise ValueError(f"{url}: not the http:// or https:// address of a file")
    path = cache() / (f"{hashlib.sha256(url.encode()).hexdigest()[:8]}_{name}" if apart else name)
    if path.exists():
        with open(path, "rb") as f:
            got = hashlib.file_digest(f, "sha256").hexdigest() if sha256 else None
        if got != sha256:
            raise ValueError(f"{path}: sha256 is {got}, expected {sha256}; "
                             "delete it to download it again")
        return path
    digest = hashlib.sha256()
    with atomic(path) as tmp, open(tmp, "wb") as out:
        for chunk in _chunks(url, path):
            out.write(chunk)
            digest.update(chunk)
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"{url}: sha256 is {digest.hexdigest()}, expected {sha256}; "
                             "nothing was kept")
    return path


def _chunks(url, path):
    """Yield the file's bytes, 1 MiB at a time. Raises OSError unless the whole of it comes."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            size, got = int(answer.headers["Content-Length"] or 0), 0       # 0: it does not say
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := answer.read(1 << 20):
                    if not got and chunk.lstrip(b"\xef\xbb\xbf\r\n\t ").lower().startswith(PAGE):
                        raise OSError("a web page came instead of the file")
                    got += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
            if not got or got < size:           # read() ends quietly where the connection does
                raise OSError(f"{got:,} bytes came, of {size:,}")
    except (OSError, http.client.HTTPException, ValueError) as e:       # ValueError: a bad address
        reason = " ".join(str(getattr(e, "reason", e)).split()) or repr(e)
        raise OSError(f"can't download {url} ({reason}); fetch it elsewhere and put it at {path}"
                      ) from e
