"""Fetch a file, check it, unzip it: resumes what was cut off, and trusts neither the server nor the zip.

from download import check_zip, fetch, safe_extract

fetch("https://example.org/data.zip", "inputs/data.zip", check=check_zip)
safe_extract("inputs/data.zip", "inputs/data")
"""

import contextlib
import hashlib
import http.client
import json
import lzma
import re
import shutil
import stat
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

CHUNK_BYTES = 2**18
TIMEOUT_SECONDS = 20
RETRY_WAITS = (0.5, 1, 2)  # seconds before each further try; a try that brought new bytes starts the list again
MAX_UNPACKED_BYTES = 8 * 2**30
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of the others zipfile unpacks more at once than it is asked for
MAX_ENTRIES = 2_000_000
# What zipfile raises for files that are damaged, encrypted or packed by a method it does not know.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OverflowError,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    UnicodeDecodeError,
)


class Cut(Exception):
    """The connection failed in a way that another try may cure."""


# ---------------------------------------------------------------- fetch


def fetch(url, path, sha256=None, check=None):
    """Download `url` to `path`, with a progress bar. The name `path` appears only when the file is whole and checked.

    A cut download stays as `<path>.part` and is resumed, by the next try or the next run, when the server can and its
    file is still the same one; otherwise it starts again. sha256: the expected hexadecimal digest; check: a function
    of a path that raises ValueError, called before the file gets its name. A file that fails either is removed.
    Raises OSError (network, server, disk) or ValueError (address, digest, check), each one line that names the URL.
    """
    path = Path(path)
    part, notes = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"{url!r} is no address to download from; expected http://... or https://...")
    path.parent.mkdir(parents=True, exist_ok=True)
    _receive_all(url, part, notes)
    try:
        if sha256 and (found := _sha256(part)) != sha256.lower():
            raise ValueError(f"sha256 {found}, expected {sha256}: the file is another one or was damaged on the way")
        if check:
            check(part)
    except ValueError as error:
        part.unlink()
        notes.unlink(missing_ok=True)
        raise ValueError(f"{url}: {error}") from None
    part.replace(path)
    notes.unlink(missing_ok=True)


def _receive_all(url, part, notes):
    """Tries until `part` is whole; OSError when tries bring nothing new any more."""
    most, failures = 0, 0
    while True:
        try:
            return _receive(url, part, notes)
        except Cut as cut:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            if failures > len(RETRY_WAITS):
                kept = f"; {size:,} bytes are kept in {part}, run the same again to resume" if size else ""
                raise OSError(f"cannot download {url}: {cut}{kept}") from None
            tqdm.write(f"{cut}; trying again", file=sys.stderr)
            time.sleep(RETRY_WAITS[max(failures - 1, 0)])


def _receive(url, part, notes):
    """One try: goes on where `part` ends, when the server has the same file still, or starts again."""
    known = _read_notes(url, part, notes)
    start = part.stat().st_size if known else 0
    if known and start == known["size"]:
        return  # whole already; a run was stopped before it could be checked
    headers = {"Accept-Encoding": "identity", "User-Agent": "python"}
    if start:
        headers["Range"] = f"bytes={start}-"
        if known["validator"]:
            headers["If-Range"] = known["validator"]
    with _open(url, headers, part) as response:
        size, begins = _extent(response)
        now = {"url": url, "size": size, "validator": _validator(response)}
        if begins and (begins != start or now != known):
            part.unlink()
            raise Cut(f"{url} has changed since the download began")
        if size is not None and size - begins > (free := shutil.disk_usage(part.parent).free):
            raise OSError(f"{part.parent} has {free:,} bytes free; the rest of {url} needs {size - begins:,}")
        notes.write_text(json.dumps(now))
        _save(response, part, begins, size)
    if size is not None and (received := part.stat().st_size) != size:
        raise Cut(f"{url} ended after {received:,} of {size:,} bytes")


def _read_notes(url, part, notes):
    """What is known of the file that `part` is a piece of: {url, size, validator}, or None to start again."""
    try:
        known = json.loads(notes.read_text())
        return known if part.stat().st_size and known["url"] == url and known.keys() >= {"size", "validator"} else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def _open(url, headers, part):
    """The response; Cut for what may pass, OSError for what will not."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        answer = f"{url} answers {error.code} {error.reason}"
        if error.code == 416:  # nothing behind the bytes we have: the file there is shorter now
            part.unlink(missing_ok=True)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise Cut(answer) from None
        raise OSError(f"{answer}; check the address, or get the file by hand") from None
    except (http.client.InvalidURL, UnicodeError, ValueError) as error:
        raise ValueError(f"{url!r} is no valid address: {error}") from None
    except (OSError, http.client.HTTPException) as error:  # refused, no such host, timed out, cut before the headers
        raise Cut(f"no answer from {url} ({getattr(error, 'reason', None) or error or type(error).__name__})") from None


def _extent(response):
    """(size of the whole file or None, position at which this response begins)."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        return (int(found[2]), int(found[1])) if found else (None, -1)
    length = response.headers.get("Content-Length", "")
    return (int(length) if length.isdecimal() else None), 0


def _validator(response):
    """What tells this version of the file from another: a strong ETag or the date of change (RFC 9110, If-Range)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _save(response, part, begins, size):
    """Appends the response to `part`, or writes it anew when it begins at 0."""
    name = part.name.removesuffix(".part")
    bar = tqdm(total=size, initial=begins, unit="B", unit_scale=True, desc=name, disable=None)
    try:
        with bar, open(part, "ab" if begins else "wb") as file:
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    except OSError as error:  # a full disk; a write's error names no file
        raise OSError(error.errno, error.strerror, str(part)) from None


def _read(response):
    try:
        return response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise Cut(f"the connection was cut ({error or type(error).__name__})") from None


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- unzip


def check_zip(path, max_bytes=MAX_UNPACKED_BYTES):
    """ValueError unless `path` is a whole zip (every entry's CRC is right) that safe_extract would unpack."""
    with open_zip(path) as archive:
        _check_entries(path, archive.infolist(), max_bytes)
        try:
            broken = archive.testzip()
        except ZIP_ERRORS as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        if broken:
            raise ValueError(f"{path} is damaged: the CRC of {broken} is wrong")


def open_zip(path):
    """zipfile.ZipFile(path), with a ValueError when that is no whole zip."""
    try:
        return zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise ValueError(f"{path} is no whole zip ({error})") from None


def safe_extract(path, folder, max_bytes=MAX_UNPACKED_BYTES):
    """Unpack a zip as the new folder `folder`, which appears only when everything is in it.

    Where the zip holds one folder of that same name, its content becomes `folder`. Refused with ValueError: entries
    that climb out of the folder, absolute names, links, devices, encryption, and more than max_bytes unpacked.
    """
    path, folder = Path(path), Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it to unpack {path} again")
    with open_zip(path) as archive:
        entries = [info for info in archive.infolist() if not info.filename.startswith("__MACOSX/")]
        needed = _check_entries(path, entries, max_bytes)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(folder.parent).free):
            raise OSError(f"{folder.parent} has {free:,} bytes free; {path} unpacks to {needed:,}")
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            try:
                for info in tqdm(entries, desc=f"unzip {path.name}", unit="file", disable=None):
                    archive.extract(info, scratch / "new")
            except ZIP_ERRORS as error:
                raise ValueError(f"{path} is damaged ({error})") from None
            tops = {PurePosixPath(info.filename).parts[0] for info in entries}
            (scratch / "new" / folder.name if tops == {folder.name} else scratch / "new").rename(folder)


def _check_entries(path, entries, max_bytes):
    """The number of bytes the entries unpack to; ValueError for any entry that no honest data set has."""
    for info in entries:
        name = info.filename.replace("\\", "/")
        parts = PurePosixPath(name).parts
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not parts or name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in parts:
            raise ValueError(f"{path} is not safe to unpack: {info.filename!r} lies outside of the folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{path} is not safe to unpack: {info.filename!r} is a link or a device")
        if info.flag_bits & 1:
            raise ValueError(f"{path}: {info.filename!r} is encrypted")
        if info.compress_type not in PACKED:
            raise ValueError(f"{path}: {info.filename!r} is neither stored nor deflated; pack the files again as a zip")
    total = sum(info.file_size for info in entries)
    if total > max_bytes:
        raise ValueError(f"{path} unpacks to {total:,} bytes, more than the {max_bytes:,} that are allowed")
    if not 0 < len(entries) <= MAX_ENTRIES:
        raise ValueError(f"{path} holds {len(entries):,} files; expected 1 to {MAX_ENTRIES:,}")
    return total
