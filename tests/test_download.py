"""download.py against a local HTTP server with good and bad manners, and against good and bad zips."""

import http.server
import socket
import stat
import zipfile
from pathlib import Path

import pytest
from conftest import serving

from common import download
from common.download import check_zip, fetch, safe_extract

DATA = bytes(range(256)) * 5000  # 1.28 MB, five chunks


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.content; server.manners says how badly, server.log keeps (path, Range) of every request."""

    def do_GET(self):
        server, manners, asked = self.server, self.server.manners, self.headers.get("Range")
        server.log.append((self.path, asked))
        if self.path == "/missing":
            return self.send_error(404)
        if "busy" in manners and len(server.log) < 3:
            return self.send_error(503)
        body, total, status = server.content, len(server.content), 200
        same = self.headers.get("If-Range") in (None, server.etag)
        if asked and same and "no range" not in manners:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                return self.send_error(416)
            body, status = body[start:], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if "no length" not in manners:
            self.send_header("Content-Length", str(len(body)))
        if "no etag" not in manners:
            self.send_header("ETag", server.etag)
        self.end_headers()
        if "cut once" in manners and len(server.log) == 1 or "cut always" in manners:
            body = body[: len(body) // 2]
        if "cut often" in manners:
            body = body[:200_000]
        if "only first half" in manners:
            body = body[: max(0, total // 2 - (total - len(body)))]
        self.wfile.write(body)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS", (0, 0, 0))
    with serving(Handler) as server:
        server.content, server.manners, server.etag, server.log = DATA, set(), '"v1"', []
        server.url += "/data.zip"
        yield server


def left_over(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetch_writes_the_file_and_nothing_else(server, tmp_path):
    fetch(server.url, tmp_path / "new" / "data.zip")
    assert (tmp_path / "new" / "data.zip").read_bytes() == DATA
    assert left_over(tmp_path / "new") == ["data.zip"]


def test_a_cut_connection_is_resumed_in_the_same_run(server, tmp_path):
    server.manners = {"cut once"}
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA
    assert [asked for _, asked in server.log] == [None, f"bytes={len(DATA) // 2}-"]


def test_a_cut_download_is_resumed_by_the_next_run(server, tmp_path):
    server.manners = {"only first half"}
    with pytest.raises(OSError, match="640,000 of 1,280,000 bytes.*run the same command again to resume"):
        fetch(server.url, tmp_path / "data.zip")
    assert left_over(tmp_path) == ["data.zip.part", "data.zip.part.json"]
    server.manners, server.log = set(), []
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA
    assert [asked for _, asked in server.log] == ["bytes=640000-"]
    assert left_over(tmp_path) == ["data.zip"]


def test_a_line_that_breaks_often_gets_there_as_long_as_bytes_come(server, tmp_path):
    server.manners = {"cut often"}
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA
    assert len(server.log) == 7 > len(download.RETRY_WAITS) + 1


@pytest.mark.parametrize("manners", [{"no range"}, {"no etag"}, {"no range", "no etag"}])
def test_resuming_with_a_server_that_cannot_starts_again(server, tmp_path, manners):
    server.manners = manners | {"cut once"}
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA


@pytest.mark.parametrize("manners", [set(), {"no etag"}])
def test_a_file_that_changed_meanwhile_is_never_mixed(server, tmp_path, manners):
    server.manners = manners | {"only first half"}
    with pytest.raises(OSError, match="resume"):
        fetch(server.url, tmp_path / "data.zip")
    server.manners, server.content, server.etag = manners, DATA[::-1] + b"longer", '"v2"'
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == server.content


def test_a_file_that_became_shorter_starts_again(server, tmp_path):
    server.manners = {"only first half", "no etag"}
    with pytest.raises(OSError, match="resume"):
        fetch(server.url, tmp_path / "data.zip")
    server.manners, server.content = {"no etag"}, b"short"
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == b"short"


def test_a_part_of_unknown_origin_is_not_trusted(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(b"something else")
    (tmp_path / "data.zip.part.json").write_text("[1]")
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA


def test_a_whole_part_needs_no_server(server, tmp_path):
    (tmp_path / "data.zip.part").write_bytes(DATA)
    note = f'{{"url": "{server.url}", "size": {len(DATA)}, "validator": null}}'
    (tmp_path / "data.zip.part.json").write_text(note)
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA
    assert server.log == []


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.manners = {"busy"}
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA


def test_a_server_that_always_cuts_ends_in_one_line(server, tmp_path):
    server.manners = {"cut always", "no range"}
    with pytest.raises(OSError, match="ended after 640,000 of 1,280,000 bytes") as raised:
        fetch(server.url, tmp_path / "data.zip")
    assert "\n" not in str(raised.value) and server.url in str(raised.value)
    assert not (tmp_path / "data.zip").exists()


def test_an_unknown_length_is_accepted(server, tmp_path):
    server.manners = {"no length"}
    fetch(server.url, tmp_path / "data.zip")
    assert (tmp_path / "data.zip").read_bytes() == DATA


def test_404_names_the_address(server, tmp_path):
    url = server.url.replace("data.zip", "missing")
    with pytest.raises(OSError, match="missing answers 404"):
        fetch(url, tmp_path / "data.zip")
    assert len(server.log) == 1 and left_over(tmp_path) == []


def test_a_refused_connection_names_the_address(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS", (0,))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.zip"
    with pytest.raises(OSError, match="cannot download http://127.0.0.1:.*refused"):
        fetch(url, tmp_path / "data.zip")


def test_a_silent_server_times_out(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RETRY_WAITS", ())
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(OSError, match="timed out"):
            fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/data.zip", tmp_path / "data.zip")


@pytest.mark.parametrize("url", ["file:///etc/hosts", "data.zip", "ftp://a/b", "http://", "http://a b/", "http://[/"])
def test_no_address(tmp_path, url):
    with pytest.raises(ValueError, match="address"):
        fetch(url, tmp_path / "data.zip")


def test_sha256_and_check_decide_whether_the_file_gets_its_name(server, tmp_path):
    import hashlib

    fetch(server.url, tmp_path / "good.zip", sha256=hashlib.sha256(DATA).hexdigest().upper())
    with pytest.raises(ValueError, match="expected 1234"):
        fetch(server.url, tmp_path / "data.zip", sha256="1234")
    with pytest.raises(ValueError, match="data.zip: .*not a complete zip"):
        fetch(server.url, tmp_path / "data.zip", check=check_zip)
    assert left_over(tmp_path) == ["good.zip"]


def test_a_disk_too_small_is_named_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="1,000 bytes free.*needs 1,280,000"):
        fetch(server.url, tmp_path / "data.zip")
    assert left_over(tmp_path) == []


# ---------------------------------------------------------------- zips


def make_zip(path, names=("data/a.txt", "data/b/c.txt"), mode=0, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, method
            archive.writestr(info, b"text of " * 100 + name.encode())
    return path


@pytest.mark.parametrize("folder, expected", [("data", "a.txt"), ("other", "data/a.txt")])
def test_extract_strips_a_folder_of_the_same_name_only(tmp_path, folder, expected):
    archive = make_zip(tmp_path / "x.zip")
    check_zip(archive)
    safe_extract(archive, tmp_path / "new" / folder)
    assert (tmp_path / "new" / folder / expected).read_bytes().endswith(b"data/a.txt")
    assert left_over(tmp_path / "new") == [folder]
    with pytest.raises(FileExistsError, match="exists already"):
        safe_extract(archive, tmp_path / "new" / folder)


@pytest.mark.parametrize("name", ["../a.txt", "data/../../a.txt", "/etc/a.txt", "..\\a.txt", "C:/a.txt", "C:a.txt"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    archive = make_zip(tmp_path / "x.zip", ["data/good.txt", name])
    for action in (check_zip, lambda path: safe_extract(path, tmp_path / "data")):
        with pytest.raises(ValueError, match="outside of the folder"):
            action(archive)
    assert left_over(tmp_path) == ["x.zip"]


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o666, stat.S_IFIFO])
def test_links_and_devices_are_refused(tmp_path, mode):
    archive = make_zip(tmp_path / "x.zip", mode=mode)
    with pytest.raises(ValueError, match="link or a device"):
        safe_extract(archive, tmp_path / "data")


def test_a_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/zeros", bytes(10**7))
    with pytest.raises(ValueError, match="unpacks to 10,000,000 bytes, more than the 1,000,000"):
        safe_extract(tmp_path / "x.zip", tmp_path / "data", max_bytes=10**6)
    assert left_over(tmp_path) == ["x.zip"]


def test_damaged_zips_are_named(tmp_path):
    whole = make_zip(tmp_path / "whole.zip", method=zipfile.ZIP_STORED).read_bytes()
    for number, data in enumerate([b"", b"no zip", whole[: len(whole) // 2]]):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(data)
        for action in (check_zip, lambda path: safe_extract(path, tmp_path / "data")):
            with pytest.raises(ValueError, match="not a complete zip"):
                action(path)
    flipped = bytearray(whole)
    flipped[100] ^= 1  # inside the first entry's bytes: only its CRC can tell
    Path(tmp_path / "flipped.zip").write_bytes(flipped)
    for action in (check_zip, lambda path: safe_extract(path, tmp_path / "data")):
        with pytest.raises(ValueError, match="damaged"):
            action(tmp_path / "flipped.zip")
    assert not (tmp_path / "data").exists()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match="empty"):
        check_zip(tmp_path / "empty.zip")
