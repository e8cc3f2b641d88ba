"""Draw the screenshots of docs/serving-http.md: `python -m docs.make_screenshots`, where a Chromium is installed."""

import sys
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image

from stylefast.models.checkpoint import TINY
from tests.serving.conftest import serving
from tests.support.browser import Page, browser, chromium

FOLDER = Path(__file__).parent
MOST_BYTES = 300_000


def draw(page: Page, prompt: str, seed: int, count: int, known: int) -> int:
    """Draw pictures, and return how many the gallery has then."""
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#count", str(count))
    page.click("#draw")
    known += count * (2 if page.run("document.querySelector('#compare').checked") else 1)
    page.wait(f"document.querySelectorAll('#gallery li').length === {known}")
    page.wait("document.querySelector('#cancel').hidden")
    return known


def write(page: Page, name: str, whole: bool = False) -> None:
    """Write what is seen, or the whole page."""
    page.run("document.activeElement.blur(); scrollTo(0, 0)")
    page.run("Promise.all([...document.images].filter(one => one.src).map(one => one.decode()))")
    page.screenshot(FOLDER / name, whole)
    content = BytesIO()
    with Image.open(FOLDER / name) as image:
        image.convert("RGB").save(content, "PNG", optimize=True)
    assert content.tell() <= MOST_BYTES, f"{name} has {content.tell()} bytes"
    (FOLDER / name).write_bytes(content.getvalue())


def main() -> int:
    """Draw both."""
    program = chromium()
    if program is None:
        print("there is no Chromium; install one, e.g. by apt-get install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as profile, serving() as server, browser(program, Path(profile)) as page:
        page.size(1280, 864)
        page.open(server.url + "/")
        page.wait("document.querySelector('#model').dataset.state === 'ready'")
        page.fill("#quality", "high")
        page.click("[name=method][value=registered]")
        page.fill("#style", "watercolor")
        known = draw(page, "a boat", 3, 2, 0)
        page.fill("#style", "chalk")
        known = draw(page, "a tree", 11, 2, known)
        page.click("#compare")
        page.fill("#style", "neon")
        known = draw(page, "a cat, cool", 21, 2, known)
        write(page, "playground-desktop.png")
        page.click("#compare")
        page.click("[name=method][value=picture]")
        page.choose_file("#image", TINY / "references" / "woodcut.png")
        draw(page, "a fish, warm", 5, 1, known)
        page.size(390, 844, 1.5, True)
        write(page, "playground-phone.png", whole=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
