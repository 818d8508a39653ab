"""Write what `benchmarks.methods` measured into docs/methods: all of it, and to each page its rows.

    python -m benchmarks.methods_table

Reads docs/methods/measured.json. What stands between ``<!-- measured -->`` and ``<!-- end -->`` in
a page is replaced; a page without them gets them at its end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parents[1] / "docs" / "methods"
JSON: Final = FOLDER / "measured.json"

NAMES: Final = {"opt-30m": "OPT, 30 million", "llama-28m": "Llama, 28 million"}
_BLOCKS: Final = {"nf4": "of 64", "fp4": "of 64"}
_BETWEEN: Final = re.compile(r"(?<=<!-- measured -->\n).*?(?=<!-- end -->)", re.DOTALL)

Row = Mapping[str, Any]
Measured = Mapping[str, Sequence[Row]]


def main() -> None:
    measured = json.loads(JSON.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        path.write_text(updated(text, path.stem, measured), encoding="utf-8")


def updated(text: str, page: str, measured: Measured) -> str:
    """`text` of the page `page` with the rows that are for it: of README all of them."""
    keys = [key for key in _keys(measured) if page in ("README", *pages(key[0]))]
    if not keys:
        return text
    if not _BETWEEN.search(text):
        text += "\n<!-- measured -->\n<!-- end -->\n"
    return _BETWEEN.sub(lambda _: f"\n{table(keys, measured)}\n\n", text)


def pages(scheme: str) -> tuple[str, ...]:
    """The pages of a scheme: of the methods after its colon, or its own."""
    base, _, method = scheme.partition(":")
    return tuple(method.split("+")) if method else ("nf4" if base == "fp4" else base,)


def table(keys: Sequence[tuple[str, str]], measured: Measured) -> str:
    """Markdown: a line for each scheme and kind of blocks, figures of every model."""
    models = [name for name in NAMES if name in measured]
    heads = [f"{NAMES[name]} (float: {_float(measured[name]):.1f})" for name in models]
    lines = [f"| | blocks | {' | '.join(heads)} |", f"|---|---|{'---|' * len(models)}"]
    for scheme, blocks in keys:
        cells = [_cell(measured[name], scheme, blocks) for name in models]
        lines.append(
            f"| `{scheme}` | {blocks or _BLOCKS.get(scheme, 'none')} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _cell(rows: Sequence[Row], scheme: str, blocks: str) -> str:
    for row in rows:
        if (row["scheme"], row["blocks"]) == (scheme, blocks):
            return f"{row['kl']:.4f}, {row['top1_agreement']:.1%}, {row['perplexity']:.1f}".replace(
                "%", " %"
            )
    return "—"


def _float(rows: Sequence[Row]) -> float:
    return float(rows[0]["perplexity_float"])


def _keys(measured: Measured) -> list[tuple[str, str]]:
    """Scheme and blocks of all rows, in the order in which they were measured."""
    found = [(row["scheme"], row["blocks"]) for rows in measured.values() for row in rows]
    return sorted(dict.fromkeys(found), key=lambda key: (key[1] == "", key[1] == "symmetric"))


if __name__ == "__main__":
    main()
