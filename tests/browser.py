"""Debian's Chromium, headless, and what tests of the pages ask of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")

WAIT_S = 60.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or its driver is not installed: make programs"
)


class Page:
    """One tab. Its screen has the given size until ``resize``."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        """Opens a page as a new visitor does, without what an earlier one kept."""
        self.driver.get(url)
        self.run("sessionStorage.clear(); localStorage.clear()")
        self.driver.get(url)
        self.driver.get_log("browser")
        self.driver.get_log("performance")

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """What is written in elements, seen or not."""
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return list(self.run(script, selector))

    def wait(self, condition: Callable[[], T], what: str = "") -> T:
        """The first true value of a condition."""
        return WebDriverWait(self.driver, WAIT_S, 0.05).until(lambda _: condition(), what)

    def write(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def ask(self, text: str, answers: int) -> str:
        """Sends a message, and waits until so many answers have ended; the newest one's text."""
        self.write("#question", text + Keys.ENTER)
        return self.answer(answers)

    def answer(self, number: int) -> str:
        """The text of an answer, counted from 1, when it and all before it have ended."""
        ended = '.answer[aria-busy="false"]'
        try:
            self.wait(lambda: len(self.texts(ended)) >= number)
        except TimeoutException as error:
            shown = self.texts("#turns, #composer-note")
            raise AssertionError(f"answer {number} did not end: {shown}") from error
        return self.texts(f"{ended} > .text")[number - 1]

    def errors(self) -> list[str]:
        """What the console has as errors since the last call."""
        logged = self.driver.get_log("browser")
        return [each["message"] for each in logged if each["level"] == "SEVERE"]

    def hosts(self) -> set[str]:
        """Whom requests over the network went to since the last call."""
        found = set()
        for line in self.driver.get_log("performance"):
            event = json.loads(line["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                parts = urlsplit(event["params"]["request"]["url"])
                if parts.scheme in ("http", "https", "ws", "wss"):
                    found.add(parts.netloc)
        return found

    def overflows(self) -> bool:
        """Whether the page is wider than the screen."""
        return bool(self.run("return document.documentElement.scrollWidth > innerWidth"))


@contextlib.contextmanager
def open_browser() -> Iterator[Page]:
    """A browser with an empty profile, which is gone at the end."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={Path(profile)}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            page = Page(driver)
            page.resize(1280, 800)
            yield page
        finally:
            driver.quit()
