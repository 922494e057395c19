"""Pictures of the page, from a service that runs on the demo shop.

recsys demo && recsys serve runs/demo/runs/run/bundle &
python docs/pictures/take.py http://127.0.0.1:8100 i00007 u0047
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from urllib.parse import quote

from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
SIZE = {"width": 1200, "height": 800}
MOST = 200_000
"""Bytes of a picture."""


def take(url: str, item: str, user: str, words: str = "oak desk lamp") -> list[Path]:
    """Write page-search, -item, -user and -dark.png beside this file."""
    places = {
        "search": (f"#/search/{quote(words)}", "light"),
        "item": (f"#/item/{quote(item, safe='')}", "light"),
        "user": (f"#/user/{quote(user, safe='')}", "light"),
        "dark": (f"#/item/{quote(item, safe='')}?diversity=0.3", "dark"),
    }
    written = []
    with sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for name, (place, scheme) in places.items():
            page = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
            page.goto(f"{url}/{place}")
            page.wait_for_selector("#view[aria-busy]", state="detached")
            if page.inner_text("#alert"):
                raise SystemExit(page.inner_text("#alert"))
            path = HERE / f"page-{name}.png"
            page.screenshot(path=path)
            if path.stat().st_size > MOST:
                raise SystemExit(f"{path} has {path.stat().st_size:,} bytes; at most {MOST:,}.")
            written.append(path)
        browser.close()
    return written


if __name__ == "__main__":
    take(*sys.argv[1:])
