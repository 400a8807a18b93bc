"""Opens an HTML file in headless Chromium, through its command line only, and says what a reader would meet.

    page = open_page(path, width=390, screenshot=tmp_path / "narrow.png")
    assert page.console == [] and page.overflow == 0

The page is shown in a frame of the wanted width: a window cannot be made as narrow as a telephone.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    # So that the outer page may measure the one in its frame: each file is a site of its own otherwise.
    "--disable-web-security",
    "--disable-site-isolation-trials",
    "--allow-file-access-from-files",
)
_CONSOLE = re.compile(r"^\[[^\]]*:CONSOLE[^\]]*\] (.*)$", re.MULTILINE)
_OUTER = """<!doctype html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;display:block}</style>
<iframe id="page" src="%s" width="%d" height="%d"></iframe><script id="measures" type="application/json"></script>
<script>
const frame = document.getElementById("page");
const measure = () => {
  const page = frame.contentDocument, root = page.documentElement, width = root.clientWidth;
  const scrolled = (element) => {
    for (let e = element.parentElement; e; e = e.parentElement)
      if (["auto", "scroll", "hidden"].includes(frame.contentWindow.getComputedStyle(e).overflowX)) return true;
    return false;
  };
  const wide = [...page.body.querySelectorAll("*")]
    .filter((e) => e.getBoundingClientRect().right > width + 0.5 && !scrolled(e)).map((e) => e.tagName.toLowerCase());
  document.getElementById("measures").textContent = JSON.stringify({
    title: page.title, text: page.body.innerText, height: root.scrollHeight,
    overflow: Math.max(root.scrollWidth, page.body.scrollWidth) - width, wide: [...new Set(wide)],
    scripts: page.scripts.length, pictures: page.images.length,
    broken: [...page.images].filter((picture) => !picture.complete || !picture.naturalWidth).length,
    external: [...page.querySelectorAll("[src], link[href], image[href], use[href], object[data]")].map(
      (e) => e.getAttribute("src") ?? e.getAttribute("href") ?? e.getAttribute("data")
    ).filter((address) => !/^(data:|#)/.test(address)),
  }).replaceAll("<", "\\\\u003c");
};
frame.addEventListener("load", measure);
</script>"""


@dataclass(frozen=True)
class Page:
    """What Chromium made of a file.

    Args:
        console: messages of the page's console, in order; errors and warnings included.
        title: the document's title.
        text: what can be read on the page.
        height: of the whole page, in CSS pixels.
        overflow: pixels by which the page is wider than its window; 0 where nobody has to scroll sideways.
        wide: names of the elements that stick out, those within a scrolled or clipped box left aside.
        scripts: script elements in the document.
        pictures: images in the document.
        broken: how many of them do not show.
        external: addresses of the pictures, scripts, frames and styles that are not in the file itself.
        screenshot: the picture of the whole page, or None where none was asked for.
    """

    console: list[str]
    title: str
    text: str
    height: int
    overflow: int
    wide: list[str]
    scripts: int
    pictures: int
    broken: int
    external: list[str]
    screenshot: Path | None = None


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine: PYFINETUNE_TEST_CHROMIUM, or one on PATH; None without."""
    named = os.environ.get("PYFINETUNE_TEST_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
    return next((path for path in map(shutil.which, names) if path), None)


def open_page(path: str | Path, width: int = 1280, height: int = 900, screenshot: Path | None = None) -> Page:
    """Open a file in headless Chromium; skips the test, saying why, where there is none.

    Args:
        path: the HTML file.
        width: of the window, in CSS pixels.
        height: of the window; the screenshot is of the whole page nevertheless.
        screenshot: where to write a PNG, or None for none.
    """
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium is installed (PYFINETUNE_TEST_CHROMIUM names one)")
    address = html.escape(Path(path).resolve().as_uri())
    with tempfile.TemporaryDirectory(prefix="chromium-") as folder:
        outer = Path(folder) / "outer.html"
        outer.write_text(_OUTER % (address, width, height), encoding="utf-8")
        dom, messages = _run(program, folder, outer, "--dump-dom")
        found = re.search(r'<script id="measures"[^>]*>(.+?)</script>', dom, re.DOTALL)
        assert found, f"{path} did not load in {program}:\n{messages}"
        page = Page(console=_CONSOLE.findall(messages), **json.loads(found[1]), screenshot=screenshot)
        if screenshot is not None:
            outer.write_text(_OUTER % (address, width, page.height), encoding="utf-8")
            size = f"--window-size={width},{page.height}"
            _run(program, folder, outer, size, f"--screenshot={Path(screenshot).resolve()}")
            assert Path(screenshot).is_file(), f"{program} took no picture of {path}"
    return page


def _run(program: str, folder: str, page: Path, *flags: str) -> tuple[str, str]:
    """Standard output and standard error of one fresh Chromium that shows a page."""
    profile = tempfile.mkdtemp(dir=folder)
    done = subprocess.run(
        [program, *_FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{program} ended with {done.returncode}:\n{done.stderr[-2000:]}"
    return done.stdout, done.stderr
