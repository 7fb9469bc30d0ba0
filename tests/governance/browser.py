"""A browser without a window, where the machine has one: what it measures on a page, and its pictures of it."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PAPER_WIDTH = 688
"""What A4 leaves between the margins of the style sheet, 182 mm, in CSS pixels."""

_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
_MEASURE = """
const wide = document.documentElement.clientWidth, seen = [];
const scrolls = element => { for (let at = element; at; at = at.parentElement)
  if (getComputedStyle(at).overflowX === "auto" || getComputedStyle(at).clipPath !== "none") return true;
  return false; };
for (const element of document.querySelectorAll("body *")) {
  const box = element.getBoundingClientRect();
  if (box.width && (box.right > wide + 1 || box.left < -1) && !scrolls(element) && !element.closest(".skip, .fills"))
    seen.push(`${element.tagName} ${element.getAttribute("class")}: ${element.textContent.slice(0, 40)}`);
}
const labels = [];
for (const chart of document.querySelectorAll("svg[role=img]")) {
  const frame = chart.getBoundingClientRect();
  const boxes = [...chart.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([text, box], index) => {
    if (box.left < frame.left - 1 || box.right > frame.right + 1) labels.push(`${text} is cut off`);
    if (box.top < frame.top - 1 || box.bottom > frame.bottom + 1) labels.push(`${text} is cut off`);
    for (const [other, beside] of boxes.slice(index + 1))
      if (Math.min(box.right, beside.right) - Math.max(box.left, beside.left) > 1
          && Math.min(box.bottom, beside.bottom) - Math.max(box.top, beside.top) > 3)
        labels.push(`${text} on ${other}`);
  });
}
const said = document.createElement("pre");
said.id = "measured";
said.textContent = JSON.stringify({
  width: innerWidth, page: document.documentElement.scrollWidth, overflowing: seen, labels,
  ground: getComputedStyle(document.body).backgroundColor,
  folded: [...document.querySelectorAll("details > :not(summary)")].filter(
    one => !one.checkVisibility({contentVisibilityAuto: true}) || !one.offsetHeight).length,
});
parent.document.body.replaceChildren(said);
"""


def find_browser() -> str | None:
    """The path of a Chromium; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass(frozen=True)
class Browser:
    """A Chromium with a profile of its own in a directory."""

    program: str
    place: Path

    def measure(self, source: str, width: int = 1280, *, dark: bool = False, paper: bool = False) -> dict[str, Any]:
        """What stands where on a page; on paper every rule for print holds and none for the screen.

        The page stands in a frame, since a window cannot be as narrow as a telephone.
        """
        if paper:
            source = source.replace("@media print", "@media all").replace("@media screen", "@media not all")
        source = _POLICY.sub("", source).replace("</body>", f"<script>{_MEASURE}</script></body>")
        frame = f'<iframe srcdoc="{html.escape(source)}" style="width: {width}px; height: 1400px; border: 0"></iframe>'
        around = f'<!doctype html><html style="color-scheme: light dark"><body>{frame}</body></html>'
        shown = self._run(around, 1400, ["--dump-dom"], dark=dark)
        found = re.search(r'<pre id="measured">(.*?)</pre>', shown, re.DOTALL)
        assert found, shown[-2000:]
        measured: dict[str, Any] = json.loads(html.unescape(found[1]))
        return measured

    def picture(self, source: str, width: int = 1280, *, dark: bool = False) -> bytes:
        """A PNG of a page's beginning."""
        file = self.place / "page.png"
        self._run(source, width, [f"--screenshot={file}", "--hide-scrollbars"], dark=dark)
        return file.read_bytes()

    def printed(self, source: str) -> bytes:
        """A page as PDF."""
        file = self.place / "page.pdf"
        self._run(source, 1280, [f"--print-to-pdf={file}", "--no-pdf-header-footer"], dark=False)
        return file.read_bytes()

    def _run(self, source: str, width: int, options: list[str], *, dark: bool) -> str:
        page = self.place / "page.html"
        page.write_text(source, encoding="utf-8")
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [
            self.program,
            "--headless",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            *root,
            f"--user-data-dir={self.place / 'profile'}",
            f"--window-size={width},1400",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            *options,
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout
