"""Run an artifact on arm64, in qemu, and compare its outputs with those of this machine.

    python tools/arm64_check.py FOLDER… [--root build/arm64]

On a Debian machine, without root: an arm64 Python from Debian's packages and the aarch64 wheels
of onnxruntime and numpy are unpacked into ``--root`` (once; 200 MB), and run by qemu-user-static,
which is unpacked beside them where it is not installed. Every FOLDER's ``check.npz`` is the input.
Printed for each output: SQNR in dB of arm64 against this machine, of both against float, and of
this machine against itself where embeddings are changed by 1e-7 of themselves (not of onnx-edge).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from qcompile.passes.constants import constant
from qcompile.targets import get_target

from qcompile.artifact import GRAPH, SAMPLE, read_record, read_sample
from qcompile.errors import ModelError
from qcompile.metrics import sqnr_db
from qcompile.session import open_session, run_outputs

_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")

_RUN = """
import sys
import numpy, onnxruntime
graph, sample, output, *names = sys.argv[1:]
session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
with numpy.load(sample) as data:
    feed = {i.name: data["input." + i.name] for i in session.get_inputs()}
numpy.savez(output, **dict(zip(names, session.run(names, feed))))
"""

_PROCESSOR = """processor\t: {}
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0b
CPU revision\t: 0

"""
"""Of /proc/cpuinfo, a cortex-a76: ONNX Runtime reads it, and crashes on that of an x86 machine."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--root", type=Path, default=Path("build/arm64"))
    given = parser.parse_args()
    root = given.root.resolve()
    if not (root / "ready").is_file():
        install(root)
    for folder in given.folders:
        compare(folder, root)


def install(root: Path) -> None:
    """Unpack qemu, an arm64 Python, and the wheels for it into `root`."""
    shutil.rmtree(root, ignore_errors=True)
    apt(root, "update")
    apt(root, "install", "--download-only", "--no-install-recommends", "python3", "libstdc++6")
    if installed_qemu() is None:
        native = run("dpkg", "--print-architecture")
        apt(root, "download", f"qemu-user-static:{native}")
    for package in (root / "apt").rglob("*.deb"):
        run("dpkg", "-x", str(package), str(root))
    version = os.readlink(root / "usr/bin/python3").removeprefix("python")
    wheels = root / "wheels"
    run(
        sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:",
        "-d", str(wheels), *(f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 17)),
        f"--python-version={version}",
        f"onnxruntime=={ort.__version__}", f"numpy=={np.__version__}",
    )  # fmt: skip
    for wheel in wheels.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(root / "site")
    (root / "proc").mkdir()
    count = os.cpu_count() or 1
    (root / "proc/cpuinfo").write_text("".join(_PROCESSOR.format(i) for i in range(count)))
    (root / "ready").touch()


def apt(root: Path, *words: str) -> None:
    """apt-get on lists of its own, as if nothing were installed."""
    state = root / "apt"
    for folder in ("lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    sources = next(path for path in _SOURCES if Path(path).is_file())
    native = run("dpkg", "--print-architecture")
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": f"arm64,{native}",
        "Dir::State::lists": f"{state}/lists",
        "Dir::State::status": f"{state}/status",
        "Dir::Cache": f"{state}/cache",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "/dev/null",
        "Debug::NoLocking": "1",
    }
    options = [f"-o{key}={value}" for key, value in settings.items()]
    run("apt-get", "-q", "-y", *options, *words, folder=state)


def installed_qemu() -> str | None:
    """The emulator of this machine, if there is one."""
    return shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")


def compare(folder: Path, root: Path) -> None:
    """Print how far the outputs of the artifact `folder` on arm64 are from those here.

    Raises:
        ModelError: no artifact, or one with a cache, which check.npz does not hold.
    """
    feed, reference, _ = read_sample(folder)
    record = read_record(folder)
    runtime = get_target(record["target"]).runtime(folder)
    session = open_session(folder / GRAPH, runtime)
    lacking = [i.name for i in session.get_inputs() if i.name not in feed]
    if lacking:
        raise ModelError(f"{folder / SAMPLE} has no {lacking[0]}: compile it without --cache")
    here = run_outputs(session, feed)
    qemu = installed_qemu() or str(root / "usr/bin/qemu-aarch64-static")
    with tempfile.TemporaryDirectory() as scratch:
        output = f"{scratch}/outputs.npz"
        python = str((root / "usr/bin/python3").resolve())
        run(
            qemu, "-cpu", "cortex-a76", "-L", str(root), "-E", f"PYTHONPATH={root / 'site'}",
            python, "-c", _RUN, str(folder / GRAPH), str(folder / SAMPLE), output, *here,
        )  # fmt: skip
        with np.load(output) as data:
            there = dict(data)
        nudged = {}
        # Between Q/DQ nodes, one more node would change what is fused.
        if not record["target"].startswith("onnx-edge"):
            nudge(folder / GRAPH, Path(scratch) / GRAPH)
            nudged = run_outputs(open_session(Path(scratch) / GRAPH, runtime), feed)
    for name, value in here.items():
        print(
            f"{folder.name} {name}: arm64 against {platform.machine()} {sqnr(value, there[name])}, "
            f"against float {sqnr(reference[name], there[name])} "
            f"and {sqnr(reference[name], value)}, "
            f"nudged {sqnr(value, nudged[name]) if nudged else '-'}, "
            f"largest difference {np.abs(value - there[name]).max():.3g} "
            f"of {np.abs(value).max():.3g}"
        )


def nudge(graph: Path, changed: Path) -> None:
    """Write `graph` with what is looked up in float tables by token multiplied by 1 ± 1e-7."""
    model = ir.load(graph)
    rng = np.random.default_rng(0)
    for node in list(model.graph):
        table, value = node.inputs[0] if node.op_type == "Gather" else None, node.outputs[0]
        if table is None or table.const_value is None or table.dtype != ir.DataType.FLOAT:
            continue
        if value.shape is None or len(value.shape) != 3 or not isinstance(value.shape[2], int):
            continue
        factors = (1 + 1e-7 * rng.choice((-1, 1), value.shape[2])).astype(np.float32)
        moved = ir.node("Mul", [value, constant(model.graph, "nudge", factors)])
        value.replace_all_uses_with(moved.outputs[0])
        moved.replace_input_with(0, value)
        model.graph.insert_after(node, moved)
    ir.save(model, changed, external_data=f"{changed.name}.data")


def sqnr(wanted: np.ndarray, found: np.ndarray) -> str:
    """In dB, or that they are the same."""
    if np.array_equal(wanted, found):
        return "equal"
    noise = np.square(wanted - found, dtype=np.float64).sum()
    return f"{sqnr_db(float(np.square(wanted, dtype=np.float64).sum()), float(noise)):.1f} dB"


def run(*words: str, folder: Path | None = None) -> str:
    """The output of a command, which has to succeed."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{words[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
