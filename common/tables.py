"""CSV tables that several calls share: new rows replace those of the same key, and all other rows stay.

from common.tables import merge_table, read_table

merge_table("images.csv", ["image", "objects"], [{"image": "a", "objects": 12}], key="image", replaced={"a"})
list(read_table("images.csv", key="image"))    # [{"image": "a", "objects": "12"}]
"""

import csv
import itertools
from pathlib import Path

from common.files import atomic_path


def read_table(path, key):
    """Yield the rows of a CSV file as {column: text}; a file that does not exist has none.

    key: a column that the table must have. ValueError, naming the file, when it is not such a table.
    """
    if not Path(path).exists():
        return
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # spreadsheets write a byte order mark
        try:
            reader = csv.DictReader(file, restval="")
            if key not in (reader.fieldnames or ()):
                raise ValueError(f"{path} was not written by this script: it has no column {key!r}; move it elsewhere")
            for row in reader:
                row.pop(None, None)  # cells beyond the last heading
                yield row
        except csv.Error as error:
            raise ValueError(f"{path} is not a readable table ({error}); move it elsewhere") from None


def _headings(path):
    """The headings of a CSV file, [] when there is none; a table may have headings and no rows."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        return next(csv.reader(file), [])


def merge_table(path, columns, rows, key, replaced):
    """Write a CSV file, whole or not at all: the rows that are there, and after them `rows`, {column: value} each.

    columns: headings of the new rows; others that the file has stay. replaced: values of the column `key`; earlier rows
    with one of them are dropped. The earlier rows are never in memory together. ValueError as in read_table.
    """
    earlier = read_table(path, key)
    first = list(itertools.islice(earlier, 1))
    columns = list(dict.fromkeys([*_headings(path), *columns]))
    with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(row for row in itertools.chain(first, earlier) if row[key] not in replaced)
        writer.writerows(rows)
