"""Download a file, check it, unpack it. Cut downloads are resumed; neither the server nor the zip file is trusted.

from common.download import check_zip, fetch, safe_extract

fetch("https://example.org/data.zip", "inputs/data.zip", check=check_zip)
safe_extract("inputs/data.zip", "inputs/data")

Why not the library pooch (1.9): it cannot resume a download, checks no disk space, and unpacks with plain extractall.
"""

import hashlib
import http.client
import json
import re
import shutil
import stat
import struct
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common.files import new_folder

CHUNK_BYTES = 2**18
TIMEOUT_SECONDS = 20
RETRY_WAITS = (0.5, 1, 2)  # seconds before each further attempt; an attempt that brings new bytes starts the list again
MAX_UNPACKED_BYTES = 8 * 2**30
MAX_ENTRIES = 2_000_000
PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # with other methods zipfile can unpack more than it was asked for
# What zipfile raises for a file that is damaged, encrypted or compressed by an unknown method.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OverflowError, RuntimeError, UnicodeError)


class Cut(Exception):
    """The connection failed in a way that another attempt may cure."""


# ---------------------------------------------------------------- fetch


def fetch(url, path, sha256=None, check=None):
    """Download `url` to `path`, with a progress bar. `path` appears only when the file is complete and checked.

    A cut download stays as `<path>.part`. The next attempt or the next run resumes it if the server supports that and
    its file has not changed; otherwise the download starts again.
    sha256: the expected hexadecimal digest. check: called with the path of the complete file before it is renamed;
    raises ValueError to reject it. A file that fails either is removed.
    Raises OSError (network, server, disk) or ValueError (address, digest, check) with one line that names the URL.
    """
    path = Path(path)
    part, notes = path.with_name(path.name + ".part"), path.with_name(path.name + ".part.json")
    if not re.match(r"https?://[^/]", url):
        raise ValueError(f"{url!r} is not an address to download from; expected http://... or https://...")
    path.parent.mkdir(parents=True, exist_ok=True)
    _receive_all(url, part, notes)
    try:
        if sha256 and (found := _sha256(part)) != sha256.lower():
            raise ValueError(f"sha256 {found}, expected {sha256}: the file differs or was damaged on the way")
        if check:
            check(part)
    except ValueError as error:
        part.unlink()
        notes.unlink(missing_ok=True)
        raise ValueError(f"{url}: {error}") from None
    part.replace(path)
    notes.unlink(missing_ok=True)


def _receive_all(url, part, notes):
    """Repeat attempts until `part` is complete. OSError when attempts bring no new bytes."""
    most, failures = 0, 0
    while True:
        try:
            return _receive(url, part, notes)
        except Cut as cut:
            size = part.stat().st_size if part.exists() else 0
            failures = 0 if size > most else failures + 1
            most = max(most, size)
            if failures > len(RETRY_WAITS):
                kept = f"; {size:,} bytes are kept in {part}, run the same command again to resume" if size else ""
                raise OSError(f"cannot download {url}: {cut}{kept}") from None
            tqdm.write(f"{cut}; trying again", file=sys.stderr)
            time.sleep(RETRY_WAITS[max(failures - 1, 0)])


def _receive(url, part, notes):
    """One attempt: continue where `part` ends if the server still has the same file, else start again."""
    known = _read_notes(url, part, notes)
    start = part.stat().st_size if known else 0
    if known and start == known["size"]:
        return  # complete already: an earlier run was stopped before it could check the file
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
    """What is known about the file that `part` is a piece of, {url, size, validator}; None to start again."""
    try:
        known = json.loads(notes.read_text())
        if known["url"] == url and part.stat().st_size:
            return {key: known[key] for key in ("url", "size", "validator")}
    except (OSError, ValueError, KeyError, TypeError):  # no notes, or not ours
        pass
    return None


def _open(url, headers, part):
    """The response. Raises Cut for a failure that may pass, OSError for one that will not."""
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        answer = f"{url} answers {error.code} {error.reason}"
        if error.code == 416:  # no bytes after ours: the server's file is shorter now
            part.unlink(missing_ok=True)
        if error.code in (408, 416, 429) or error.code >= 500:
            raise Cut(answer) from None
        raise OSError(f"{answer}; check the address, or download the file by hand") from None
    except (http.client.InvalidURL, UnicodeError, ValueError) as error:
        raise ValueError(f"{url!r} is not a valid address: {error}") from None
    except (OSError, http.client.HTTPException) as error:  # refused, no such host, timed out, cut before the headers
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise Cut(f"no answer from {url} ({reason})") from None


def _extent(response):
    """(size of the complete file or None, position in it at which this response begins)."""
    if response.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found:
            return None, -1
        return int(found[2]), int(found[1])
    length = response.headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else None
    return size, 0


def _validator(response):
    """What identifies this version of the file: a strong ETag, or the date of its last change (RFC 9110, If-Range)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _save(response, part, begins, size):
    """Append the response to `part`, or write a new file if the response begins at 0."""
    name = part.name.removesuffix(".part")
    bar = tqdm(total=size, initial=begins, unit="B", unit_scale=True, desc=name, disable=None)
    try:
        with bar, open(part, "ab" if begins else "wb") as file:
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
    except OSError as error:  # a full disk; a failed write names no file
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
    """ValueError unless `path` is a complete zip file, with correct CRCs, that safe_extract would unpack."""
    with open_zip(path) as archive:
        _check_entries(path, archive.infolist(), max_bytes)
        try:
            broken = archive.testzip()
        except ZIP_ERRORS as error:
            raise ValueError(f"{path} is damaged ({error})") from None
        if broken:
            raise ValueError(f"{path} is damaged: the CRC of {broken} is wrong")


def open_zip(path):
    """zipfile.ZipFile(path). ValueError if the file is not a complete zip file."""
    try:
        return zipfile.ZipFile(path)
    except ZIP_ERRORS as error:
        raise ValueError(f"{path} is not a complete zip file ({error})") from None


def safe_extract(path, folder, max_bytes=MAX_UNPACKED_BYTES):
    """Unpack a zip file as the new folder `folder`, which appears only when it is complete.

    If all entries lie in one folder that has the same name as `folder`, that level is left out.
    Raises ValueError for a damaged file and for what no honest data set holds: entries outside the folder, absolute
    names, links, devices, encryption, more than max_bytes unpacked. Raises FileExistsError if `folder` exists, and
    OSError if the disk is too small.
    """
    path, folder = Path(path), Path(folder)
    with open_zip(path) as archive:
        entries = [info for info in archive.infolist() if not info.filename.startswith("__MACOSX/")]
        needed = _check_entries(path, entries, max_bytes)
        with new_folder(folder) as new:
            if needed > (free := shutil.disk_usage(new).free):
                raise OSError(f"{folder.parent} has {free:,} bytes free; {path} unpacks to {needed:,}")
            try:
                for info in tqdm(entries, desc=f"unzip {path.name}", unit="file", disable=None):
                    archive.extract(info, new)
            except ZIP_ERRORS as error:
                raise ValueError(f"{path} is damaged ({error})") from None
            inner = new / folder.name
            if list(new.iterdir()) == [inner] and inner.is_dir():
                inner.rename(new.with_name("inner"))
                new.rmdir()
                new.with_name("inner").rename(new)


def _check_entries(path, entries, max_bytes):
    """The number of bytes that the entries unpack to. ValueError for an entry that no honest data set holds."""
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
