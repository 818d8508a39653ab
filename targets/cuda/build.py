"""Build the library: ``python -m qcompile.targets.cuda.build``.

Triton compiles the kernels, g++ the operators; neither needs a GPU or a CUDA toolkit. What is built
is kept by the hash of what it was built from.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import platformdirs
from qcompile.targets.cuda.aot import SOURCES, Binary, compile_all, triton_version
from qcompile.targets.cuda.emit import assembly, tables
from qcompile.targets.cuda.library import LIBRARY
from qcompile.targets.cuda.variants import all_variants

from qcompile.errors import ConfigError, QcompileError

HEADERS_VARIABLE: Final = "QCOMPILE_ORT_INCLUDE"

_HERE: Final = Path(__file__).parent
_NATIVE: Final = _HERE / "native"
_HEADER: Final = "onnxruntime_c_api.h"
_FLAGS: Final = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wl,--no-undefined",
    "-static-libstdc++",
    "-static-libgcc",
]


def build(output: Path | None = None) -> Path:
    """The library, built unless one of the same sources is there; a copy at `output`, if given.

    Raises:
        ConfigError: the compiler, ONNX Runtime's headers or Triton is missing.
        QcompileError: the compiler refuses the sources.
    """
    headers = find_headers()
    compiler = find_compiler()
    cache = cache_folder()
    library = cache / _key(headers, compiler) / LIBRARY
    if not library.exists():
        binaries = list(compile_all(all_variants(), cache / "kernels"))
        library.parent.mkdir(parents=True, exist_ok=True)
        _link(binaries, headers, compiler, library)
    if output is not None:
        shutil.copy2(library, output)
        return output
    return library


def built() -> Path | None:
    """The library of the present sources, if it has been built here.

    Raises:
        ConfigError: what it would be built with is missing.
    """
    library = cache_folder() / _key(find_headers(), find_compiler()) / LIBRARY
    return library if library.is_file() else None


def cache_folder() -> Path:
    """Where kernels and libraries are kept."""
    return Path(platformdirs.user_cache_dir("qcompile")) / "cuda"


def find_headers() -> Path:
    """The folder of ONNX Runtime's C headers.

    Raises:
        ConfigError: they are nowhere.
    """
    given = os.environ.get(HEADERS_VARIABLE)
    places = [
        Path(prefix, "include", below)
        for prefix in (sys.prefix, "/usr/local", "/usr")
        for below in ("onnxruntime", "onnxruntime/core/session", "")
    ]
    if given:
        places = [Path(given)]
    for place in places:
        if (place / _HEADER).is_file():
            return place
    raise ConfigError(
        f"ONNX Runtime's C headers ({_HEADER}) are missing",
        hint=f"install Debian's libonnxruntime-dev, 1.17 or later, or unpack it with dpkg -x and "
        f"let {HEADERS_VARIABLE} name the folder",
    )


def find_compiler() -> str:
    """The C++ compiler: $CXX, or g++.

    Raises:
        ConfigError: there is none.
    """
    name = os.environ.get("CXX") or "g++"
    found = shutil.which(name)
    if found is None:
        raise ConfigError(f"there is no C++ compiler {name}", hint="install g++, or set CXX")
    return found


def _key(headers: Path, compiler: str) -> str:
    """Of everything that the library is built from."""
    digest = hashlib.sha256()
    names = [*SOURCES, "build.py", "emit.py", "schema.py", "tiles.py", "variants.py"]
    paths = [*(_HERE / name for name in names), *sorted(_NATIVE.iterdir()), headers / _HEADER]
    for path in paths:
        digest.update(path.read_bytes())
    asked = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    if asked.returncode:
        raise ConfigError(f"{compiler} --version fails: is it a C++ compiler?", hint="set CXX")
    digest.update(asked.stdout + triton_version().encode())
    return digest.hexdigest()[:24]


def _link(binaries: Iterable[Binary], headers: Path, compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kept = list(binaries)
        for binary in kept:
            (folder / f"{binary.variant.name}.cubin").write_bytes(binary.cubin)
        (folder / "images.S").write_text(assembly(kept, folder), encoding="utf-8")
        (folder / "tables.cc").write_text(tables(kept), encoding="utf-8")
        sources = [*sorted(_NATIVE.glob("*.cc")), folder / "tables.cc", folder / "images.S"]
        made = folder / LIBRARY
        command = [compiler, *_FLAGS, f"-Wl,--version-script={_NATIVE / 'exports.map'}"]
        command += [f"-I{_NATIVE}", "-isystem", str(headers)]
        command += [*map(str, sources), "-ldl", "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise QcompileError(f"{compiler} does not compile the library: {done.stderr.strip()}")
        # Renaming within the folder: a second builder must never see half a library.
        partial = library.with_suffix(f".{os.getpid()}")
        shutil.copyfile(made, partial)
        partial.replace(library)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build the CUDA custom-op library.")
    parser.add_argument("-o", "--output", type=Path, help="copy the library here")
    arguments = parser.parse_args()
    try:
        print(build(arguments.output))
    except QcompileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
