"""common/tables.py: rows that stay, rows that are replaced, and the headings of both.

python -m pytest -q tests/test_tables.py
"""

from common.tables import merge_table, read_table


def test_rows_of_other_keys_stay_and_headings_add_up(tmp_path):
    path = tmp_path / "t.csv"
    merge_table(path, ["image", "area"], [{"image": "a", "area": 1}, {"image": "b", "area": 2}], "image", {"a", "b"})
    merge_table(path, ["image", "um"], [{"image": "b", "um": 3}], "image", {"b"})
    assert list(read_table(path, "image")) == [
        {"image": "a", "area": "1", "um": ""},
        {"image": "b", "area": "", "um": "3"},
    ]


def test_a_table_without_rows_keeps_its_headings(tmp_path):
    path = tmp_path / "t.csv"
    merge_table(path, ["image", "area"], [], "image", {"a"})
    merge_table(path, ["image"], [], "image", {"b"})
    assert path.read_text().split() == ["image,area"]
