"""A headless Chromium for tests of pages, driven by selenium.

    with browser() as driver:
        driver.get(page.as_uri())
        resize(driver, 390, 844)
        picture(driver, tmp_path / "phone.png")
        assert not foreign(driver)

A test takes the fixture ``chromium`` of conftest.py, which skips, with the reason, where there is none.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

DESKTOP, PHONE = (1280, 900), (390, 844)


def missing() -> str | None:
    """Return why pages cannot be looked at here; None where they can."""
    if _program("chromium", "chromium-browser", "google-chrome") is None:
        return "no Chromium here; on Debian: apt-get install chromium chromium-driver"
    if _program("chromedriver") is None:
        return "no chromedriver here; on Debian: apt-get install chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed; pip install -e '.[dev]'"
    return None


@contextlib.contextmanager
def browser(width: int = DESKTOP[0], height: int = DESKTOP[1], downloads: Path | None = None) -> Iterator[Any]:
    """Yield a selenium driver of a fresh headless Chromium.

    Args:
        width: of the window, in CSS pixels.
        height: of the window, in CSS pixels.
        downloads: the folder that downloads go to.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = _program("chromium", "chromium-browser", "google-chrome") or ""
    # Chromium's sandbox refuses to start for root, and a container's /dev/shm is too small for it.
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{switch}")
    for switch in ("disable-background-networking", "disable-component-update", "no-first-run", "no-proxy-server"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    if downloads is not None:
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    here = ",".join(filter(None, (os.environ.get("NO_PROXY"), "localhost,127.0.0.1")))  # the driver's place
    own = {"SE_OFFLINE": "true", "SE_AVOID_STATS": "true", "no_proxy": here, "NO_PROXY": here}
    with mock.patch.dict(os.environ, own):
        driver = webdriver.Chrome(options=options, service=Service(_program("chromedriver")))
        try:
            resize(driver, width, height)
            yield driver
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    """Give the page another size, in CSS pixels; a window of its own cannot be narrower than 500."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def picture(driver: Any, path: Path, *, whole: bool = True, part: str = "") -> Path:
    """Write a PNG of the page, of what is seen of it without scrolling, or of a part by selector; return the path."""
    settings: dict[str, Any] = {"format": "png", "captureBeyondViewport": whole or bool(part)}
    if part:
        place = "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
        place += "return {x: box.x + scrollX, y: box.y + scrollY, width: box.width, height: box.height, scale: 1}"
        settings["clip"] = driver.execute_script(place, part)
    elif whole:
        size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        settings["clip"] = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", settings)
    path.write_bytes(base64.b64decode(shot["data"]))
    return path


def console(driver: Any) -> list[str]:
    """Return what the page wrote to the console since the last call, as ``LEVEL message``."""
    return [f"{entry['level']} {entry['message']}" for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Return the addresses that the page asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]


def foreign(driver: Any) -> list[str]:
    """Return the addresses on other machines that the page asked for since the last call."""
    own = {"localhost", "127.0.0.1", "::1", None}
    return [url for url in requests(driver) if urlsplit(url).scheme != "blob" and urlsplit(url).hostname not in own]


def _program(*names: str) -> str | None:
    """Return the path of the first of these programs that is installed."""
    return next((found for name in names if (found := shutil.which(name))), None)
