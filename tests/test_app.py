"""app.py as a visitor meets it: the real page in a headless browser, on this machine alone.

python -m pytest -q tests/test_app.py     # needs requirements-app.txt, playwright and Debian's chromium, or skips
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from urllib.parse import urlparse

import cv2
import numpy as np
import pytest
import tifffile
from conftest import REPOSITORY, run_script

from common import report

pytest.importorskip("gradio", reason="gradio is not installed: requirements-app.txt")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PICTURE = REPOSITORY / "docs" / "picture.png"
PATIENCE = 120  # seconds


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "models").symlink_to(REPOSITORY / "models")
    (folder / "temporary").mkdir()
    (folder / "outputs" / "nuclei_L2").mkdir(parents=True)
    gallery = report.gallery([{"title": "a", "panels": [("image", np.zeros((9, 9), np.uint8))]}], [])
    report.write_page(folder / "outputs" / "nuclei_L2" / "report.html", "the report of nuclei_L2", [("A", gallery)])
    return folder


@pytest.fixture(scope="module")
def address(place):
    """The page of a running app.py, which is ended with Ctrl-C; then nothing is left of what it was given."""
    command = [sys.executable, str(REPOSITORY / "app.py"), "--port", str(free_port()), "--open", "False"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place / "temporary")}
    server = subprocess.Popen(command, cwd=place, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        assert line.startswith("the page is at http://127.0.0.1:"), line
        yield line.split()[4].rstrip(";")
        assert list((place / "temporary").glob("nuclei-app-*"))
    finally:
        server.send_signal(signal.SIGINT)
        status = server.wait(PATIENCE)
    assert status == 130
    assert not list((place / "temporary").glob("nuclei-app-*"))


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not BROWSER:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(browser, address):
    """A function: a new visitor's page, width pixels wide. The addresses that it asked for must be local ones."""
    asked, contexts = [], []

    def start(width=1300):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector("#file input[type=file]", state="attached", timeout=PATIENCE * 1000)
        return page

    yield start
    for context in contexts:
        context.close()
    elsewhere = {url for url in asked if urlparse(url).scheme not in ("data", "blob")}
    assert {urlparse(url).hostname for url in elsewhere} == {"127.0.0.1"}


def said(page):
    return page.input_value("#said textarea")


def until(page, condition):
    """Wait until condition(what the page says) holds -> what it says."""
    end = time.monotonic() + PATIENCE
    while not condition(said(page)):
        assert time.monotonic() < end, said(page)
        time.sleep(0.1)
    return said(page)


def give(page, path):
    page.set_input_files("#file input[type=file]", str(path))
    return until(page, lambda text: text.startswith(path.stem))


def count_of(text):
    return int(text.split(" nuclei")[0].split()[-1].replace(",", ""))


def test_a_picture_its_options_and_its_files(visit, tmp_path):
    page = visit()
    count = count_of(give(page, PICTURE))
    assert 30 <= count <= 60  # 42 were drawn
    shown = page.locator("#overlay img")
    shown.wait_for()
    assert shown.evaluate("image => image.naturalWidth") == 640
    with page.expect_download() as download:
        page.click("#files a >> nth=1")
    download.value.save_as(tmp_path / "labels.tif")
    assert download.value.suggested_filename == "picture_labels.tif"
    assert tifffile.imread(tmp_path / "labels.tif").max() == count

    before, source = said(page), shown.get_attribute("src")
    page.fill("#mask input[type=number]", "0.95")
    page.keyboard.press("Tab")
    after = until(page, lambda text: text != before and "nuclei" in text)
    assert diameter_of(after) < diameter_of(before) - 1
    page.wait_for_function("source => document.querySelector('#overlay img').src != source", arg=source)
    page.click("#level label >> nth=0")
    until(page, lambda text: text != after and "nuclei" in text)
    page.click("#examples button:has(img) >> nth=2")
    until(page, lambda text: text.startswith("stained, 256 x 256"))


def diameter_of(text):
    return float(text.split("median diameter ")[1].split()[0])


def test_a_broken_file_and_then_a_good_one(visit, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(PICTURE.read_bytes()[:500])
    page = visit()
    assert give(page, broken) == "broken.png: unreadable: no whole picture of 8 or 16 bits"
    page.click("#file button[aria-label='Clear']")
    until(page, lambda text: text.startswith("Drop a picture"))
    assert count_of(give(page, PICTURE)) > 0


def test_a_huge_picture_shows_progress_and_stops(visit, tmp_path):
    huge = tmp_path / "huge.png"
    cv2.imwrite(str(huge), np.zeros((10_000, 10_000), np.uint8))
    page = visit()
    page.set_input_files("#file input[type=file]", str(huge))
    page.wait_for_selector("#said :text('batches')", timeout=PATIENCE * 1000)
    page.click("#stop")
    until(page, lambda text: text == "Stopped.")


def test_two_visitors_at_once(visit):
    first, second = visit(), visit()
    first.set_input_files("#file input[type=file]", str(PICTURE))
    second.click("#examples button:has(img) >> nth=1")
    assert until(first, lambda text: "nuclei" in text).startswith("picture, ")
    assert until(second, lambda text: "nuclei" in text).startswith("small, ")
    assert said(first).startswith("picture, ")


def test_a_phone(visit):
    page = visit(width=390)
    give(page, PICTURE)
    page.locator("#overlay img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_other_tabs(visit):
    page = visit()
    page.click("role=tab[name='Classes']")
    page.wait_for_selector("#class textarea")
    page.click("role=tab[name='Runs']")
    page.wait_for_selector("#runs :text('nuclei_L2')", state="attached")
    page.click("#report_of input")
    page.click("role=option[name='nuclei_L2']")
    frame = page.frame_locator("iframe")
    frame.locator("text=the report of nuclei_L2 >> nth=0").wait_for()
    frame.locator(".controls").wait_for()  # its script has run


def test_no_other_file_is_served(address):
    import httpx  # which gradio needs

    for path in ("/etc/passwd", REPOSITORY / "README.md", "models/nuclei_L2/config.yml", "../README.md"):
        assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)
    given = {"path": str(PICTURE), "meta": {"_type": "gradio.FileData"}}
    event = httpx.post(f"{address}gradio_api/call/classify", json={"data": [given, None]}).json()["event_id"]
    assert "event: error" in httpx.get(f"{address}gradio_api/call/classify/{event}", timeout=PATIENCE).text
    answer = httpx.get(f"{address}config")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    for path, headers in (
        ("config", {"host": "elsewhere.example"}),
        ("config", {"sec-fetch-site": "cross-site"}),
        ("gradio_api/file=http://elsewhere.example/a.png", {}),
    ):
        assert httpx.get(f"{address}{path}", headers=headers).status_code == 403
    assert httpx.get(address, headers={"sec-fetch-site": "cross-site"}).status_code == 200  # a link leads here


def test_mistakes_on_the_command_line(place, tmp_path):
    assert (
        "finds masks, not individual nuclei" in run_script("app.py", "--name", "nuclei_L2", cwd=place, ok=False).stderr
    )
    assert "no such file; the runs are: " in run_script("app.py", "--name", "gone", cwd=place, ok=False).stderr
    assert "models/ has no run of individual nuclei: python" in run_script("app.py", cwd=tmp_path, ok=False).stderr
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('gradio')")
    search = f"{tmp_path}{os.pathsep}{REPOSITORY}"
    missing = run_script("app.py", cwd=place, ok=False, env={"PYTHONPATH": search})
    assert "pip install -r requirements-app.txt" in missing.stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        busy = run_script("app.py", "--port", port, "--open", "False", cwd=place, ok=False)
    assert f"port {port} is in use; give another --port" in busy.stderr
