"""The pages in a real browser: no errors, nothing fetched, tables that sort and filter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from qcompile.page import comparison, page
from tests.imagined_reports import OPS, full_ranges, full_report

WIDTHS = {"phone": 390, "desktop": 1280}


class Shown:
    """A page that is open."""

    def __init__(self, browser: webdriver.Chrome, path: Path, text: str, width: int) -> None:
        path.write_text(text, encoding="utf-8")
        self.browser = browser
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(path.as_uri())

    def run(self, script: str) -> Any:
        return self.browser.execute_script(f"return {script}")

    def header(self, name: str) -> WebElement:
        buttons = self.browser.find_elements(By.CSS_SELECTOR, ".ops thead button")
        (found,) = [button for button in buttons if button.text.startswith(name)]
        return found

    def sorted_by(self) -> dict[str, str]:
        """Columns that say how they are sorted."""
        return dict(
            self.run(
                "Array.from(document.querySelectorAll('.ops thead th'), "
                "th => [th.textContent.trim(), th.getAttribute('aria-sort')])"
                ".filter(([, order]) => order !== 'none')"
            )
        )

    def paths(self) -> list[str]:
        """Of the rows that show."""
        rows = self.browser.find_elements(By.CSS_SELECTOR, ".ops tbody tr")
        return [str(row.get_attribute("data-path")) for row in rows if row.is_displayed()]

    def filter(self, text: str) -> list[str]:
        field = self.browser.find_element(By.CSS_SELECTOR, "input[type=search]")
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(Keys.DELETE + text)
        return self.paths()

    def check(self) -> None:
        """No errors so far, nothing fetched, nothing wider than the screen."""
        assert self.browser.get_log("browser") == []  # type: ignore[no-untyped-call]
        assert self.run("performance.getEntriesByType('resource').length") == 0
        assert self.run("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_page(browser: webdriver.Chrome, tmp_path: Path, width: int) -> None:
    shown = Shown(browser, tmp_path / "page.html", page(full_report(), full_ranges()), width)
    shown.check()
    names = [op.name for op in OPS] + ["model.layers.0.attn"]
    assert shown.paths() == names
    assert shown.sorted_by() == {}

    # As numbers, not as text; what has none is last, up and down.
    known = [op for op in OPS if op.sqnr_db is not None]
    known.sort(key=lambda op: op.sqnr_db or 0.0)
    up = [op.name for op in known]
    without = ["model.layers.10.fc1", "model.layers.0.attn"]
    shown.header("SQNR").click()
    assert shown.sorted_by() == {"SQNR, dB": "ascending"}
    assert shown.paths() == up + without
    shown.header("SQNR").click()
    assert shown.sorted_by() == {"SQNR, dB": "descending"}
    assert shown.paths() == up[::-1] + without

    shown.header("bytes").send_keys("\n")
    assert shown.sorted_by() == {"bytes": "ascending"}
    assert shown.paths()[:-1] == [op.name for op in sorted(OPS, key=lambda op: op.bytes or 0)]
    # Every other column, too; layer 10 comes after layer 1.
    for header in ("kernel", "precision", "K×N", "16-bit safe", "reason", "#", "module"):
        shown.header(header).click()
        assert shown.sorted_by() == {header: "ascending"}
        assert sorted(shown.paths()) == sorted(names)
    layers = [path.split(".")[2] for path in shown.paths() if path.startswith("model")]
    assert layers == ["0", "0", "0", "1", "10"]

    count = browser.find_element(By.CSS_SELECTOR, "output")
    assert set(shown.filter("FC1")) == {"model.layers.0.fc1", "model.layers.10.fc1"}
    assert count.text == "2 of 6"
    assert shown.filter("*.1.*") == [OPS[2].name]
    assert shown.filter("fc1*") == []
    assert shown.filter("${x") == [OPS[2].name]
    assert set(shown.filter("")) == set(names)
    assert count.text == "6 of 6"
    shown.check()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_the_comparison(browser: webdriver.Chrome, tmp_path: Path, width: int) -> None:
    other = full_report()
    other.ops = OPS[:-1]
    text = comparison([("one", full_report()), ("other", other), ("again", other)])
    shown = Shown(browser, tmp_path / "compared.html", text, width)
    shown.check()
    assert len(shown.paths()) == len(OPS)
    browser.find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
    assert shown.paths() == ["lm_head"]
    assert shown.filter("fc1") == []
    browser.find_element(By.CSS_SELECTOR, "input[type=checkbox]").click()
    shown.header("SQNR, other").click()
    assert shown.paths() == ["model.layers.0.fc1", "model.layers.10.fc1"]
    shown.check()


def test_dark_and_printed(browser: webdriver.Chrome, tmp_path: Path) -> None:
    shown = Shown(browser, tmp_path / "page.html", page(full_report(), full_ranges()), 1280)
    ink = "getComputedStyle(document.querySelector('.drawing text')).fill"
    seen = {}
    for media, scheme in (("screen", "light"), ("screen", "dark"), ("print", "dark")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": media, "features": features}
        )
        seen[media, scheme] = shown.run(ink)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    assert seen["screen", "dark"] != seen["screen", "light"] == seen["print", "dark"]
