"""The site: whatever the documents link to is on it, and it asks no other machine for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SPEC = spec_from_file_location("make_site", ROOT / "docs" / "make_site.py")
assert SPEC is not None and SPEC.loader is not None
make_site: Any = module_from_spec(SPEC)
SPEC.loader.exec_module(make_site)


def test_every_link_leads_to_a_page_or_a_file(tmp_path: Path) -> None:
    make_site.Pages(tmp_path).write()
    pages = sorted(tmp_path.rglob("*.md"))
    assert len(pages) > 15 and (tmp_path / "files/concat_cli/core/losses.py.txt").is_file()
    for page in pages:
        for _, link in make_site.LINK.findall(page.read_text("utf-8")):
            place = link.partition("#")[0]
            if place and not re.match("[a-z]+:", place):
                assert (page.parent / place).is_file(), f"{page} links to {link}"


def test_a_link_to_nothing_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.md").write_text("[two](two.md)")
    monkeypatch.setattr(make_site, "ROOT", tmp_path)
    monkeypatch.setattr(make_site, "PAGES", {})
    with pytest.raises(SystemExit, match=r"docs/one.md links to two.md, which is not there"):
        make_site.Pages(tmp_path / "out").write()


@pytest.mark.skipif(find_spec("zensical") is None, reason='pip install -e ".[docs]"')
def test_the_site_asks_for_nothing() -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "make_site.py"], check=True)
    pages = sorted((ROOT / "site").rglob("*.html"))
    loaded = r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(https?://[^\s\">]+)"
    assert len(pages) > 15 and "Predictor" in (ROOT / "site" / "api.html").read_text("utf-8")
    assert [found for p in pages for found in re.findall(loaded, p.read_text("utf-8"))] == []
