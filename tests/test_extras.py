"""common/extras.py: packages that are absent, and packages that are there but broken."""

import pytest

from common.extras import load_extra


def test_a_package_that_is_there():
    assert load_extra("json.decoder", "x").JSONDecodeError


def test_a_package_that_is_absent():
    with pytest.raises(OSError, match="^nowhere is not installed: pip install -r requirements-x.txt$"):
        load_extra("nowhere.inner", "x")
    with pytest.raises(OSError, match="^no-where is not installed: pip install -r requirements-x.txt; or leave it$"):
        load_extra("nowhere", "x", "no-where", "; or leave it")


def test_a_package_that_does_not_work_here(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("raise ImportError('DLL load failed')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(OSError, match="^broken is installed but cannot be imported: DLL load failed$"):
        load_extra("broken", "x")
