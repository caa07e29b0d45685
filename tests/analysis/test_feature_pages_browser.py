"""The pages in a real browser, from disk: headless Chromium through its driver."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e_sae.analysis.feature_html import page_name
from e2e_sae.analysis.feature_pages import Shown, write_pages
from tests.analysis.tiny_features import TEXTS, tiny_features, tiny_other

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)"
)
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1400,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of two SAEs."""
    out = tmp_path_factory.mktemp("site") / "pages"
    a, b = tiny_features("A"), tiny_features("B", seed=1)
    write_pages(out, [Shown(a, tiny_other(b), TEXTS), Shown(b, tiny_other(a), TEXTS)])
    return out


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER, log_output=os.devnull))
    yield driver
    driver.quit()


def column(browser: Any, n: int) -> list[str]:
    """Texts of a column of the index' table."""
    script = "return [...document.querySelectorAll('#rows tr')].map((row) => row.cells[arguments[0]].innerText)"
    return browser.execute_script(script, n)


def sort_by(browser: Any, key: str) -> tuple[list[str], str]:
    """Latents in their order, and which order it says it is."""
    button = browser.find_element("css selector", f"th button[data-key={key}]")
    button.click()
    return column(browser, 0), browser.execute_script("return arguments[0].closest('th').ariaSort", button)


def search(browser: Any, text: str) -> list[str]:
    field = browser.find_element("id", "query")
    field.clear()
    field.send_keys(text)
    return column(browser, 0)


def test_the_pages_work_from_disk_without_a_network_and_without_errors(browser: Any, site: Path):
    browser.get((site / "index.html").as_uri())
    browser.find_element("link text", "A relu at blocks.1.hook_resid_pre").click()
    assert browser.find_element("id", "count").text == "5 of 5 latents"

    # Sorted: by effect at first; each column either way; nothing comes last.
    assert column(browser, 0) == ["4", "0", "6", "2", "8"]
    assert sort_by(browser, "kl") == (["2", "6", "0", "4", "8"], "ascending")
    assert sort_by(browser, "frequency") == (["6", "4", "2", "0", "8"], "descending")
    assert sort_by(browser, "largest") == (["0", "2", "4", "6", "8"], "descending")
    assert sort_by(browser, "here") == (["0", "2", "4", "6", "8"], "descending")
    assert sort_by(browser, "n") == (["0", "2", "4", "6", "8"], "ascending")
    assert column(browser, 1) == ["·def", "·class", "·return", "self", ""]

    # Searched: by token, by number, for what is not there, in the promoted tokens.
    assert search(browser, "CLASS") == ["2"]
    assert search(browser, "#4") == ["4"]
    assert search(browser, "no such text") == []
    assert browser.find_element("id", "count").text == "0 of 5 latents"
    assert search(browser, "<script>") == ["0", "2", "4", "6"]
    browser.find_element("css selector", "#scope option[value=promoted]").click()
    assert search(browser, "<script>") == ["0"]
    browser.find_element("css selector", "#scope option[value=tokens]").click()
    assert search(browser, " return") == ["4"]

    # A page, by the keyboard; to its neighbours; and back to what was searched for.
    browser.find_element("id", "query").send_keys("\ue007")
    assert browser.find_element("tag name", "h1").text == "Latent 4"
    browser.find_element("tag name", "body").send_keys("\ue014")
    assert browser.find_element("tag name", "h1").text == "Latent 6"
    browser.find_element("link text", "2").click()
    assert browser.find_element("tag name", "h1").text == "Latent 2"
    browser.find_element("css selector", "a[href*='B-blocks']").click()
    assert browser.current_url == (site / "B-blocks-1-hook_resid_pre" / page_name(6)).as_uri()
    for _ in range(4):  # B's page, 2, 6, 4
        browser.back()
    assert (browser.find_element("id", "query").get_attribute("value"), column(browser, 0)) == (" return", ["4"])

    assert browser.execute_script("return window.pwned === undefined")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # The browser's own first tab asks too, for chrome:// and data: files.
    ours = [request["request"]["url"] for request in asked if request["documentURL"].startswith("file:")]
    assert ours
    assert not [url for url in ours if not url.startswith(site.as_uri())]


def test_colours_follow_the_activations_in_light_and_dark(browser: Any, site: Path):
    browser.get((site / "A-blocks-1-hook_resid_pre" / page_name(2)).as_uri())
    shown: list[tuple[str, ...]] = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        script = """return ["body", "mark.s2", "mark.s9"].map((name) =>
            getComputedStyle(document.querySelector(name)).backgroundColor)"""
        shown.append(tuple(browser.execute_script(script)))
    assert all(len(set(colours)) == 3 for colours in shown)
    assert not set(shown[0]) & set(shown[1])
