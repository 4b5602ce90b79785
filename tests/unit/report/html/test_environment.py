"""Properties of all pages: a record adds only text to them, and they need no network."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tests.unit.report.html_samples import complete

from bnlab.errors import MissingPackage
from bnlab.report.html import diagnosis
from bnlab.report.html import environment as _environment


def test_a_page_asks_for_nothing():
    page = diagnosis.render(complete())
    assert "default-src 'none'" in page
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in page
    assert " src=" not in page
    assert "url(" not in page
    assert "@import" not in page


def test_without_jinja2_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingPackage, match=r"Install it: pip install 'bnlab\[report\]'"):
        _environment.page("diagnosis.html.j2")


def test_a_page_needs_neither_torch_nor_numpy():
    code = (
        "import sys; from bnlab.report.html import compact, diagnosis, receipt; "
        "sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_script_or_style_ends_its_element():
    for name in ("page.css", "page.js", "theme.js", "layer.js", "network.js", "plots.js"):
        assert "</" not in _environment._asset(name)
