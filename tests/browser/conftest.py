"""A headless Chromium that records the errors of a page and its network requests."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="make test-browser installs selenium")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402


@dataclass
class Browser:
    """Opens pages from disk."""

    driver: webdriver.Chrome

    def open(self, page: Path, fragment: str = "") -> None:
        """Open a page, afresh even if it is the same file."""
        self.driver.get("about:blank")
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(page.as_uri() + fragment)

    def all(self, selector: str) -> list:
        """Return the elements that match a selector."""
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        """Return the first element that matches a selector."""
        return self.driver.find_element("css selector", selector)

    def run(self, script: str, *arguments: object):
        """Run JavaScript and return what it returns."""
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition) -> None:
        """Wait until a condition holds, because a click or a key takes effect a moment later."""
        WebDriverWait(self.driver, 10).until(lambda _: condition())

    def problems(self) -> list[str]:
        """Return the warnings and errors of the console."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Return the addresses that the page requested, except its own and inline data."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        own = self.driver.current_url.partition("#")[0]
        return [url for url in sent if url.partition("#")[0] != own and not url.startswith("data:")]

    def first_paint(self) -> float:
        """Return the milliseconds until something was painted."""
        entry = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
        return WebDriverWait(self.driver, 10).until(lambda _: self.run(f"return {entry}"))


@pytest.fixture(scope="session")
def browser():
    """Start Chromium once."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium and chromedriver are not installed: make test-browser")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
