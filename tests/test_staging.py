"""Outputs appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from qcompile.errors import OutputError
from qcompile.staging import check_output, staged


def write(folder: Path, text: str = "new") -> None:
    """What an artifact needs to be taken for one."""
    (folder / "qcompile.json").write_text(text)


def artifact(path: Path, text: str = "old") -> Path:
    path.mkdir(parents=True)
    write(path, text)
    return path


def content(output: Path) -> dict[str, str]:
    """Everything beside and in `output`, so that nothing can be left over unseen."""
    files = (p for p in output.parent.rglob("*") if p.is_file())
    return {str(p.relative_to(output.parent)): p.read_text() for p in files}


def test_the_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    with staged(output, overwrite=False) as (folder, scratch):
        (scratch / "big").write_text("temporary")
        write(folder)
        assert not output.exists()
        assert folder.stat().st_dev == scratch.stat().st_dev == output.parent.stat().st_dev
    assert content(output) == {"out/qcompile.json": "new"}
    assert [p.name for p in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_leaves_nothing(
    tmp_path: Path, error: type[BaseException], overwrite: bool
) -> None:
    output = tmp_path / "out"
    if overwrite:
        artifact(output)
    with pytest.raises(error), staged(output, overwrite=overwrite) as (folder, scratch):
        write(folder)
        (scratch / "big").write_text("temporary")
        raise error
    assert content(output) == ({"out/qcompile.json": "old"} if overwrite else {})
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if overwrite else [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_is_said_so(tmp_path: Path, number: int, overwrite: bool) -> None:
    output = tmp_path / "out"
    if overwrite:
        artifact(output)
    with (
        pytest.raises(OutputError, match=r"the disk below .* is full") as caught,
        staged(output, overwrite=overwrite) as (folder, _),
    ):
        write(folder)
        raise OSError(number, os.strerror(number))
    assert "\n" not in str(caught.value)
    assert content(output) == ({"out/qcompile.json": "old"} if overwrite else {})
    assert len(list(tmp_path.iterdir())) == overwrite


def test_other_errors_of_the_system_pass_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged(tmp_path / "out", overwrite=False):
        (tmp_path / "absent").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 8), (signal.SIGINT, 7)])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals, status: int) -> None:
    program = textwrap.dedent(
        """
        import signal, sys, time
        from pathlib import Path
        from qcompile.staging import staged
        from qcompile.terminating import Terminated
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
        try:
            with staged(Path(sys.argv[1]), overwrite=False) as (folder, scratch):
                (folder / "model.onnx").write_text("half")
                (scratch / "big").write_text("temporary")
                print("ready", flush=True)
                time.sleep(60)
        except KeyboardInterrupt:
            sys.exit(7)
        except Terminated:
            sys.exit(8)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        assert list(tmp_path.iterdir())
        process.send_signal(number)
        assert process.wait(timeout=30) == status
    assert not list(tmp_path.iterdir())


def test_the_handler_is_put_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with staged(tmp_path / "out", overwrite=False):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_can_stage(tmp_path: Path) -> None:
    def work() -> None:
        with staged(tmp_path / "out", overwrite=False) as (folder, _):
            write(folder)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert content(tmp_path / "out") == {"out/qcompile.json": "new"}


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    output = artifact(tmp_path / "out")
    with (
        pytest.raises(OutputError, match=r"out exists \(pass --overwrite"),
        staged(output, overwrite=False),
    ):
        raise AssertionError("entered")
    assert content(output) == {"out/qcompile.json": "old"}


def test_overwrite_replaces_an_artifact_whole(tmp_path: Path) -> None:
    output = artifact(tmp_path / "out")
    (output / "stale").write_text("old")
    with staged(output, overwrite=True) as (folder, _):
        write(folder)
        assert content(output)["out/qcompile.json"] == "old"
    assert content(output) == {"out/qcompile.json": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_overwrite_replaces_an_empty_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    with staged(output, overwrite=True) as (folder, _):
        write(folder)
    assert content(output) == {"out/qcompile.json": "new"}


def test_overwrite_never_deletes_what_is_no_artifact(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "file"
    (home / "qcompile.json").mkdir(parents=True)  # a folder of that name makes no artifact
    (home / "thesis.txt").write_text("years of work")
    file.write_text("a file")
    (tmp_path / "link").symlink_to(artifact(tmp_path / "real"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    before = content(tmp_path / "any")
    for name in ("home", "file", "link", "dangling"):
        with pytest.raises(OutputError, match="is not replaced"):
            check_output(tmp_path / name, overwrite=True)
        with pytest.raises(OutputError, match="exists"):
            check_output(tmp_path / name, overwrite=False)
    assert content(tmp_path / "any") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_is_not_deleted(tmp_path: Path, overwrite: bool) -> None:
    output = tmp_path / "out"
    with pytest.raises(OutputError), staged(output, overwrite=overwrite) as (folder, _):
        write(folder)
        output.mkdir()
        (output / "thesis.txt").write_text("years of work")
    assert content(output) == {"out/thesis.txt": "years of work"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_current_folder_is_refused_or_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It cannot be renamed: said before the work and not after it.
    monkeypatch.chdir(tmp_path)
    try:
        with staged(Path(), overwrite=True) as (folder, _):
            write(folder)
        assert content(tmp_path / "any") == {"qcompile.json": "new"}
    except OutputError:
        assert not list(tmp_path.iterdir())


def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("a file")
    with (
        pytest.raises(OutputError, match="cannot write below"),
        staged(file / "out", overwrite=False),
    ):
        raise AssertionError("entered")
    assert content(file) == {"file": "a file"}


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError), staged(tmp_path / ("x" * 300), overwrite=False):
        raise AssertionError("entered")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_that_a_destructor_drops_is_not_lost(tmp_path: Path) -> None:
    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    hook = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", overwrite=False):
        Dropping()
        for _ in range(500):
            time.sleep(0.01)
    assert not list(tmp_path.iterdir())
    assert sys.unraisablehook is hook


def test_an_interrupt_that_is_dropped_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged(tmp_path / "out", overwrite=False) as (folder, _):
        write(folder)
        with contextlib.suppress(KeyboardInterrupt):  # as a library may
            signal.raise_signal(signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_a_short_write_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy says so without an errno."""
    usage = shutil.disk_usage(tmp_path)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="is full"), staged(tmp_path / "out", overwrite=False):
        raise OSError("cannot flush")
    monkeypatch.undo()
    with pytest.raises(OutputError, match="is full"), staged(tmp_path / "out", overwrite=False):
        raise OSError("65536 requested and 27136 written")
