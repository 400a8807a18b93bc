"""The page opener itself: it sees the faults that the tests of our pages look for."""

from __future__ import annotations

import pytest
from chromium import open_page

GOOD = "<!doctype html><meta charset=utf-8><title>Résumé</title><body style='margin:0'><p>5 &lt;/script> 6</p>"


def test_a_good_page_has_nothing_to_report(tmp_path):
    path = tmp_path / "a page & more.html"
    path.write_text(GOOD, encoding="utf-8")
    picture = tmp_path / "page.png"
    page = open_page(path, width=390, screenshot=picture)
    assert (page.console, page.overflow, page.wide, page.scripts, page.external) == ([], 0, [], 0, [])
    assert (page.title, page.text.strip()) == ("Résumé", "5 </script> 6")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(("width", "overflow"), [(390, 510), (1280, 0)])
def test_faults_are_seen(tmp_path, width, overflow):
    path = tmp_path / "bad.html"
    faults = "<div style='width:900px'>wide</div><script>console.error('boom'); noSuchThing();</script>"
    path.write_text(GOOD + faults, encoding="utf-8")
    page = open_page(path, width=width)
    assert page.overflow == overflow
    assert page.wide == (["div"] if overflow else [])
    assert page.scripts == 1
    assert ["boom" in line for line in page.console] == [True, False]
    assert "noSuchThing is not defined" in page.console[1]


def test_what_is_fetched_beside_the_page_is_named(tmp_path):
    (tmp_path / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>")
    path = tmp_path / "page.html"
    path.write_text(GOOD + "<img src=a.svg><a href=b.html>b</a><img src=data:,>", encoding="utf-8")
    assert open_page(path).external == ["a.svg"]
