"""The tables of docs/methods are those of what was measured."""

from __future__ import annotations

import json

from benchmarks.methods_table import FOLDER, JSON, pages, table, updated

ROWS = [
    {"scheme": scheme, "blocks": blocks, "kl": kl, "top1_agreement": 0.8125, "perplexity": 110.04,
     "perplexity_float": 107.7}
    for scheme, blocks, kl in [("w4a16:gptq", "asymmetric", 0.04706), ("nf4", "", 0.1)]
]  # fmt: skip


def test_the_pages_show_what_was_measured() -> None:
    measured = json.loads(JSON.read_text(encoding="utf-8"))
    for path in FOLDER.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert updated(text, path.stem, measured) == text, f"{path.stem}: run methods_table"


def test_a_row_is_on_the_page_of_each_of_its_methods() -> None:
    assert pages("w4a16:awq+gptq") == ("awq", "gptq")
    assert pages("fp4") == pages("nf4") == ("nf4",)
    measured = {"opt-30m": ROWS, "llama-28m": ROWS[:1]}
    made = updated("before\n<!-- measured -->\nold\n<!-- end -->\nafter", "gptq", measured)
    assert made.startswith("before\n") and made.endswith("\nafter")
    line = "| `w4a16:gptq` | asymmetric | 0.0471, 81.2 %, 110.0 | 0.0471, 81.2 %, 110.0 |"
    assert line in made and "old" not in made and "nf4" not in made
    assert "| `nf4` | of 64 | 0.1000, 81.2 %, 110.0 | — |" in updated(made, "README", measured)
    assert updated(made, "hqq", measured) == made
    assert updated("all\n", "gptq", measured).startswith("all\n\n<!-- measured -->\n\n| | blocks")


def test_models_without_rows_have_no_column() -> None:
    assert "Llama" not in table([("nf4", "")], {"opt-30m": ROWS})
