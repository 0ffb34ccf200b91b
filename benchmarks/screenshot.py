"""Take the README's picture of a review page, after a few decisions; needs Chromium and playwright.

    python benchmarks/screenshot.py result/report/report.html benchmarks/results/report.png

The charts of scores, thresholds and synthetic images are left out of the picture, which would be too tall with them.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from PIL import Image

KEYS = ("ArrowRight", "a", "a", "a")


def screenshot(page: Path, out: Path, *, scheme: str = "light", width: int = 1280, height: int = 1478) -> None:
    """Write a PNG of 256 colours.

    Args:
        page: The page.
        out: The picture.
        scheme: light or dark.
        width: Of the window, in pixels.
        height: Of the picture, in pixels.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": width, "height": height})
        tab.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        tab.goto(page.resolve().as_uri())
        tab.locator(".charts > section").evaluate_all("(all) => all.slice(1).forEach((one) => (one.hidden = true))")
        for key in KEYS:
            tab.keyboard.press(key)
        tab.evaluate("window.scrollTo(0, 0)")
        tab.wait_for_timeout(500)  # pictures that come into view are decoded
        data = tab.screenshot()
        browser.close()
    Image.open(BytesIO(data)).convert("RGB").quantize(256).save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    options = parser.parse_args()
    screenshot(options.page, options.out, scheme=options.scheme)
