"""A headless Chromium for the tests of pages: `pytest_plugins = ("browser",)` gives the fixture `browser`.

It never fetches a driver and never reaches a network: the page under test has to stand on its own.
(PYTEST_DONT_REWRITE: no asserts here, and a test imports the helpers before pytest loads the fixture.)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    # No name resolves: a page that asks for something from outside can't get it, here or anywhere.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--window-size=1280,860",
)


def _installed(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Selenium driver of the installed Chromium, with its own fresh profile."""
    chromium = _installed("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromedriver = _installed("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium here: install chromium and its chromedriver (Debian: chromium chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Chromium wants writable places of its own; the tests' user may have none.
    service = Service(chromedriver, env={**os.environ, "XDG_CONFIG_HOME": str(profile), "XDG_CACHE_HOME": str(profile)})
    driver = Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, path: Path, fragment: str = "") -> None:
    """Load the file `path` anew (also where only the fragment differs), forgetting older log entries."""
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(path.resolve().as_uri() + fragment)


def emulate(driver: Any, *, width: int = 0, height: int = 0, ratio: float = 1, **media: str) -> None:
    """Another screen (width 0: the window's own) and other media features, such as `prefers_color_scheme`."""
    if width:
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": ratio, "mobile": width < 600},
        )
    else:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def complaints(driver: Any) -> list[str]:
    """What the console has said since `open_page`, blocked requests and script errors included."""
    said = [entry["message"] for entry in driver.get_log("browser")]
    # Chromium's advice on reading pixels is for the test that reads them, not for the page.
    return [message for message in said if "willReadFrequently" not in message]


def requests(driver: Any) -> list[str]:
    """Every address that the page has asked for since `open_page`."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
