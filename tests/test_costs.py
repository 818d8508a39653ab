"""Kept times: written at once or not at all, refused where they were asked for and are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.costs import CostTable, default_path, open_costs
from qcompile.errors import ConfigError

HERE = {"processor": "this one", "threads": "2"}
THERE = HERE | {"threads": "4"}
TABLE = CostTable(machine=HERE, seconds={"static 128x768x3072": 1.25e-4, "float 1x2x3+bias": 1e-9})
DAMAGED = [
    pytest.param(b"", id="empty"),
    pytest.param(b'{"machine": {}', id="cut-off"),
    pytest.param(b"[]", id="another-kind"),
    pytest.param(b"{}", id="no-machine"),
    pytest.param(b'{"machine": {}, "seconds": {"float": "fast"}}', id="no-number"),
    pytest.param(b'{"machine": {}, "speeds": {}}', id="another-table"),
    pytest.param(b"\xff\xfe\x00", id="no-text"),
]


@given(st.dictionaries(st.text(min_size=1), st.floats(1e-9, 1e3)))
def test_a_table_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, seconds: dict[str, float]
) -> None:
    path = tmp_path_factory.mktemp("costs") / "table.json"
    table = CostTable(machine=HERE, seconds=seconds)
    table.write(path)
    assert open_costs(path, THERE) == table


def test_a_table_is_kept_where_no_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert open_costs(None, HERE) == CostTable(machine=HERE)
    assert list(tmp_path.iterdir()) == [], "reading makes nothing"
    TABLE.write(default_path(HERE))
    assert open_costs(None, HERE) == TABLE
    assert open_costs(None, THERE) == CostTable(machine=THERE)


def test_each_machine_has_a_path_of_its_own() -> None:
    """In the tests' cache, whose folder conftest sets."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "qcompile"
    assert default_path(HERE) != default_path(THERE)
    assert default_path(HERE).parent == default_path(THERE).parent == folder
    assert default_path(HERE) == default_path(dict(reversed(HERE.items())))


def test_a_path_that_is_given_is_read_whatever_its_machine(tmp_path: Path) -> None:
    """Its times serve to compile for that machine from here."""
    TABLE.write(tmp_path / "table.json")
    assert open_costs(tmp_path / "table.json", THERE).machine == HERE


def test_a_path_that_does_not_exist_is_an_empty_table(tmp_path: Path) -> None:
    assert open_costs(tmp_path / "new" / "table.json", HERE) == CostTable(machine=HERE)
    assert list(tmp_path.iterdir()) == []


def test_writing_makes_the_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "table.json"
    TABLE.write(path)
    TABLE.write(path)
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]
    assert json.loads(path.read_text())["format"] == 1


def test_a_write_that_fails_leaves_the_old_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.json"
    TABLE.write(path)
    before = path.read_bytes()

    def refuse(source: str, target: Path) -> None:
        assert Path(source).parent == tmp_path, "on another disk it could not be moved at once"
        assert CostTable.model_validate_json(Path(source).read_text()).seconds == {}
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompile.costs.os.replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        CostTable(machine=HERE).write(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(source: str, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qcompile.costs.os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        TABLE.write(tmp_path / "table.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_table_that_was_asked_for_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"table\.json is not a table of measured times"):
        open_costs(path, HERE)


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_is_measured_again(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = default_path(HERE)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert open_costs(None, HERE) == CostTable(machine=HERE)
    TABLE.write(path)
    assert open_costs(None, HERE) == TABLE


def test_a_table_of_a_later_qcompile_is_refused(tmp_path: Path) -> None:
    """Writing over it would lose what the later one measured."""
    path = tmp_path / "table.json"
    TABLE.model_copy(update={"format": 2}).write(path)
    with pytest.raises(ConfigError, match="has format 2, this qcompile reads 1"):
        open_costs(path, HERE)


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        open_costs(tmp_path, HERE)
