"""Pictures computed by hand on a few pixels; pages parsed as by a browser: balanced, escaped, no requests."""

import base64
import collections
import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import REPOSITORY, browser_in

from common import report

HOSTILE = "<script>alert(1)</script></style></title>\"'&amp;{x} {{7*7}} {% raw %} ä"
VOID = {"meta", "link", "img", "br", "hr", "input"}
TRIANGLE = np.array([[1, 2], [4, 2], [4, 0]])


class Page(html.parser.HTMLParser):
    """Collects the words and the elements with their attributes; every end tag must match its start tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and "script" not in self.open and "style" not in self.open:
            self.words.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def pixels(uri):
    """The RGB pixels of a data: URI, read by OpenCV."""
    data = base64.b64decode(uri.partition("base64,")[2], validate=True)
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def read_png(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR)[..., ::-1]


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)


@pytest.fixture
def page(tmp_path, picture):
    """A page with one of each piece, in which every text is hostile."""
    region = report.Region(HOSTILE, [TRIANGLE], HOSTILE, HOSTILE)
    first = {"title": HOSTILE, "panels": [(HOSTILE, picture), ("b", picture)], "regions": {HOSTILE: [region]}}
    items = [
        {**first, "values": {HOSTILE: 0.5}, "group": HOSTILE, "tags": [HOSTILE, "t"]},
        {"title": "second", "panels": [("a", picture[..., 0])], "values": {HOSTILE: np.nan, "n": np.int64(3)}},
    ]
    parts = [
        report.summary([(HOSTILE, HOSTILE, HOSTILE)]),
        report.table([{HOSTILE: HOSTILE}], caption=HOSTILE),
        report.legend() + report.legend([HOSTILE, "b"]) + report.paragraph(HOSTILE),
        report.picture(report.data_uri(picture), HOSTILE),
        report.gallery(items, [HOSTILE, "n"], note=HOSTILE) + report.gallery([], []),
    ]
    path = tmp_path / "page.html"
    report.write_page(path, HOSTILE, [(HOSTILE, part) for part in parts], subtitle=HOSTILE)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    return Page(path.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- pages


def test_hostile_text_stays_text(page):
    assert (len(page.all("script")), len(page.all("style"))) == (1, 1)
    assert page.words.count(HOSTILE) == 32
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.all("img")[0]["alt"] == HOSTILE


@pytest.mark.parametrize("quoted", ['" onload="alert(1)', "' onload='alert(1)", "</script><script>alert(1)//"])
def test_hostile_attributes_stay_attributes(quoted, picture):
    item = {"title": quoted, "panels": [(quoted, picture)], "values": {quoted: 1}, "group": quoted, "tags": [quoted]}
    item["regions"] = {quoted: [report.Region(quoted, [TRIANGLE], quoted, quoted)]}
    pieces = report.gallery([item], [quoted]) + report.table([], caption=quoted) + report.picture(quoted, quoted)
    values = [value for _, attributes in Page(pieces).elements for value in attributes.values() if value]
    assert not any("onload" in attributes for _, attributes in Page(pieces).elements)
    assert not Page(pieces).all("script")
    assert json.dumps([quoted]) in values  # data-tags
    # data-sort, two of data-group, data-tag, three of a path, aria-label, src, alt; alt of the panel; data-values
    assert values.count(quoted) == 10 and f"{quoted}, {quoted}" in values and json.dumps({quoted: 1.0}) in values


def test_pieces_join_like_text():
    one, two = report.paragraph("a & b"), report.paragraph("c")
    assert "".join([one, two]) + two == one + two + two
    assert Page("".join([one]) + two).words == ["a & b", "c"]
    assert report.paragraph(one) == f"<p>{html.escape(one)}</p>\n"  # a piece given as a value is escaped once more


def test_page_never_uses_the_network(page):
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "srcset", "data"):
            assert re.match(r"data:|#", attributes.get(name) or "#")
    template = "".join(path.read_text(encoding="utf-8") for path in Path(report.__file__).parent.glob("page.*"))
    assert "</style>" in template and "showModal" in template
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttp", template)
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; img-src data:;")


def test_import_loads_neither_jinja_nor_matplotlib():
    code = "import sys, common.report; print(sorted({'jinja2', 'matplotlib'} & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_page_suits_phones_and_screen_readers(page):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert all(image["alt"] for image in page.all("img"))
    assert all(button["type"] == "button" for button in page.all("button"))
    targets = {attributes.get("id") for _, attributes in page.elements}
    assert len(page.all("a")) == 5 and all(link["href"][1:] in targets for link in page.all("a"))


def test_gallery_carries_its_values_and_groups(page):
    first, second = (card for card in page.all("article"))
    assert json.loads(first["data-values"]) == {HOSTILE: 0.5}
    assert json.loads(second["data-values"]) == {HOSTILE: None, "n": 3}  # NaN is no JSON
    assert (first["data-group"], second["data-group"]) == (HOSTILE, "")
    assert [button["data-sort"] for button in page.all("button") if "data-sort" in button] == [HOSTILE, "n"]
    assert [button["data-group"] for button in page.all("button") if "data-group" in button] == ["", HOSTILE]


def test_gallery_carries_its_tags(page):
    assert [json.loads(card["data-tags"]) for card in page.all("article")] == [[HOSTILE, "t"], []]
    buttons = [button for button in page.all("button") if "data-tag" in button]
    assert [button["data-tag"] for button in buttons] == ["", HOSTILE, "t"]
    assert [button["aria-pressed"] for button in buttons] == ["true", "false", "false"]
    counts = page.words[page.words.index("and") :][1:7]
    assert counts == ["all", "2", HOSTILE, "1", "t", "1"]
    assert "and" not in Page(report.gallery([{"title": "a", "panels": []}], ["n"])).words


def test_regions_lie_above_their_own_picture(page):
    """The picture has 9 x 12 pixels. M: to the first corner; l: steps to the others; z: back."""
    (svg,) = page.all("svg")
    assert svg["viewbox"] == "-.5 -.5 9 12"  # the centre of the first pixel is (0, 0)
    (path,) = page.all("path")
    assert path["d"] == "M1 2l3 0 0-2z" and {path["aria-label"], path["data-name"], path["data-partner"]} == {HOSTILE}
    panels = Page(report.gallery([{"title": "t", "panels": [("a", np.zeros((2, 3), np.uint8))] * 2}], []))
    assert len(panels.all("img")) == 2 and not panels.all("svg")
    dot = report.Region("", [np.array([[5, 6]]), TRIANGLE])
    item = {"title": "t", "panels": [("a", np.zeros((2, 3), np.uint8))], "regions": {"a": [dot], "b": [dot]}}
    (path,) = Page(report.gallery([item], [])).all("path")
    assert path["d"] == "M5 6l0 0zM1 2l3 0 0-2z"


@pytest.mark.parametrize("there", [True, False])
def test_a_page_is_opened_or_a_line_says_that_there_is_no_browser(tmp_path, there):
    environment, seen = browser_in(tmp_path)
    environment = environment if there else {}  # no PATH, where other browsers might be found
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(REPOSITORY)!r})"]
    command[-1] += "; from common.report import open_page; open_page('a b/ä#.html')"
    said = subprocess.run(command, cwd=tmp_path, env={**environment, "PATH": ""}, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, "")
    if there:
        assert (seen.read_text(), said.stderr) == (f"file://{tmp_path}/a%20b/%C3%A4%23.html\n", "")
    else:
        expected = "warning: no browser could be started; open a b/ä#.html yourself\n"
        assert said.stderr.endswith(expected) and said.stderr.count("\n") == 1 and not seen.exists()


def test_page_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(ValueError):
        report.write_page(path, "title", [("a heading without its html",)])
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_page_takes_undecodable_file_names(tmp_path):
    report.write_page(tmp_path / "page.html", "a\udcffb", [])
    assert "<h1>a?b</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.84126, "0.8413"),
        (np.float32(0.5), "0.5000"),
        (0.0, "0.0000"),
        (1e-5, "1e-05"),
        (12345.67, "12345.7"),
        (134, "134"),
        (np.int64(7), "7"),
        (None, "–"),
        (float("nan"), "nan"),
        (-float("inf"), "-inf"),
        (True, "True"),
        ([0.5], "[0.5]"),
        ("a<b", "a&lt;b"),
    ],
)
def test_text(value, shown):
    assert report.paragraph(value) == f"<p>{shown}</p>\n"


@pytest.mark.parametrize(
    ("count", "groups"),
    [(1, {"worst": 1}), (2, {"worst": 1, "best": 1}), (7, {"worst": 3, "median": 2, "best": 2}),
     (36, {"worst": 12, "median": 12, "best": 12}), (133, {"worst": 12, "median": 12, "best": 12})],
)  # fmt: skip
def test_worst_to_best(count, groups):
    scores = np.random.default_rng(0).permutation(count).tolist()
    chosen = report.worst_to_best(scores)
    shown = [scores[k] for k in chosen]
    assert shown == sorted(shown) and collections.Counter(chosen.values()) == groups
    assert min(scores) == shown[0] and max(scores) == shown[-1]
    middle = [scores[k] for k, group in chosen.items() if group == "median"]
    assert not middle or abs(np.mean(middle) - np.mean(scores)) <= 0.5


def test_table_columns_and_alignment():
    rows = [{"id": "a", "iou": 0.5}, {"id": "b", "iou": None, "n": 2}]
    page = Page(report.table(rows))
    assert page.words == ["id", "iou", "n", "a", "0.5000", "–", "b", "–", "2"]
    assert [cell.get("class") for cell in page.all("td")] == ["short", "number", "number"] * 2
    widths = [{"interval": "0.459 to 0.473"}, {"interval": "a sentence may be broken"}]
    assert [cell.get("class") for cell in Page(report.table(widths)).all("td")] == ["short", None]
    assert Page(report.table(rows, {"iou": "IoU (pooled)"})).words == ["IoU (pooled)", "0.5000", "–"]
    assert Page(report.table(rows, ["n", "id"])).words == ["n", "id", "–", "a", "2", "b"]
    assert Page(report.table([])).all("td") == []


# ---------------------------------------------------------------- pictures


def test_data_uri_keeps_the_pixels(picture, tmp_path):
    uri = report.data_uri(picture)
    assert uri.startswith("data:image/png;base64,")
    assert np.array_equal(pixels(uri), picture)
    for grey in (picture[..., 0], picture[..., :1]):
        assert np.array_equal(pixels(report.data_uri(grey)), picture[..., :1].repeat(3, axis=2))
    large = np.full((300, 20, 3), (200, 40, 90), np.uint8)
    assert report.data_uri(large).startswith("data:image/jpeg;base64,")
    assert np.abs(pixels(report.data_uri(large)).astype(int) - large).max() <= 3
    cv2.imwrite(str(tmp_path / "a.png"), picture[..., ::-1])
    assert np.array_equal(pixels(report.file_uri(tmp_path / "a.png")), picture)


def test_label_overlay_by_hand():
    """One pixel of each outcome on grey 100: 0.7 * 100 + 0.3 * green, and 0.05 * 100 + 0.95 * the error's colour."""
    truth = np.array([[True, True], [False, False]])
    prediction = np.array([[True, False], [True, False]])
    expected = [[[70, 117, 104], [207, 94, 5]], [[87, 176, 226], [100, 100, 100]]]
    for image in (np.full((2, 2), 100, np.uint8), np.full((2, 2, 3), 100, np.uint8)):
        assert report.label_overlay(image, truth, prediction).tolist() == expected
        assert report.label_overlay(image, truth[None], prediction[None]).tolist() == expected
        assert (image == 100).all()


def test_label_overlay_compares_class_by_class():
    truth = np.array([[[True, True]], [[False, False]]])  # both pixels are of class 0
    prediction = np.array([[[False, True]], [[True, False]]])  # the first was called class 1
    overlay = report.label_overlay(np.zeros((1, 2), np.uint8), truth, prediction)
    assert overlay.tolist() == [[[202, 89, 0], [0, 47, 34]]]  # missed, found


def test_mask_picture():
    one = np.array([[True, False]])
    assert report.mask_picture(one).tolist() == report.mask_picture(one[None]).tolist() == [[[255] * 3, [0] * 3]]
    several = report.mask_picture(np.eye(9, dtype=bool)[:, None])  # pixel c is of class c; the ninth colour is reused
    assert several.shape == (1, 9, 3) and len({tuple(colour) for colour in several[0].tolist()}) == 7


def test_brighten():
    dim = np.repeat(np.array([0, 10, 20], np.uint8), 100).reshape(10, 30)
    assert np.unique(report.brighten(dim)).tolist() == [0, 128, 255]
    bright = np.array([[0, 255]] * 2, np.uint8)
    assert np.array_equal(report.brighten(bright), bright)
    assert not report.brighten(np.zeros((2, 2), np.uint8)).any()
    opaque = np.dstack([dim, dim, dim, np.full_like(dim, 255)])  # alpha does not count
    assert np.array_equal(report.brighten(opaque)[..., 0], report.brighten(dim))


# ---------------------------------------------------------------- files


def test_contact_sheet_is_crisp(tmp_path, picture):
    path = tmp_path / "sheet.png"
    report.contact_sheet([[picture, picture[::-1]], [picture]], path, size=40)
    sheet, crisp = read_png(path), picture.repeat(3, axis=0).repeat(3, axis=1)  # 12 x 9 grows to 36 x 27
    assert sheet.shape == (8 + 2 * (36 + 8), 8 + 2 * (27 + 8), 3)
    assert np.array_equal(sheet[8:44, 8:35], crisp)
    assert np.array_equal(sheet[8:44, 43:70], crisp[::-1])
    assert np.array_equal(sheet[52:88, 8:35], crisp)
    assert (sheet[52:88, 43:70] == 255).all()


def test_contact_sheet_captions(tmp_path, picture):
    path = tmp_path / "sheet.png"
    for captions, extra in [(["one", "$two"], 20), ([["a", "b"], ["c" * 99]], 40)]:
        report.contact_sheet([[picture, picture], [np.zeros((90, 60), np.uint8)]], path, captions, size=60)
        sheet = read_png(path)
        assert sheet.shape == (8 + 2 * (60 + 8) + extra, 8 + 2 * (45 + 8), 3)
        assert (sheet[8:26] < 128).any()  # there is writing above the first row
