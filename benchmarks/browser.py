"""Embeddings of artifacts of all-MiniLM-L6-v2 in headless Chromium, against ONNX Runtime's here.

    python -m benchmarks.browser FOLDER… --float FOLDER --json out.json

Cosines for three sentences and for 512 tokens of one word: of the browser's embedding to the one
made here, and of that to the float artifact's. Wants `npm ci` in examples/browser first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import qcompile
from benchmarks.common import publish
from tests.chromium import chromium
from tests.test_browser_example import EMBED, LONG, TEXTS, here, page_with, served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--float", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    session = qcompile.load(arguments.float)
    wanted = [here(session, text) for text in (*TEXTS, LONG)]
    rows: list[dict[str, Any]] = []
    for folder in arguments.folders:
        session = qcompile.load(folder)
        own = [here(session, text) for text in (*TEXTS, LONG)]
        rows.append(
            {"artifact": folder.name}
            | {
                f"browser, {at}": float(a @ b)
                for at, (a, b) in enumerate(zip(_there(folder), own, strict=True))
            }
            | {
                f"float, {at}": float(a @ b)
                for at, (a, b) in enumerate(zip(wanted, own, strict=True))
            }
        )
    publish("Cosines of three sentences and a long text", rows, arguments.json)


def _there(folder: Path) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as scratch:
        profile, page = Path(scratch) / "profile", Path(scratch) / "page"
        page.mkdir()
        page_with(folder, page)
        with chromium(profile) as browser, served(page) as address:
            browser.set_script_timeout(120)
            browser.get(address)
            found = [browser.execute_async_script(EMBED, text) for text in (*TEXTS, LONG)]
    return [np.array(vector) for _, vector in found]


if __name__ == "__main__":
    main()
