"""Which library of operators a session registers, and whether there is a GPU to register it for."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort
from qcompile.targets.cuda.schema import VERSION

from qcompile.errors import ConfigError, ModelError

LIBRARY: Final = "libqcompile_cuda.so"
VARIABLE: Final = "QCOMPILE_CUDA_LIBRARY"
"""Names a library that was built elsewhere; the caller trusts it by setting it."""

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@functools.cache
def gpu() -> str | None:
    """``sm90`` and the like, where ONNX Runtime's CUDA provider and a GPU are; else None."""
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return None
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device):
            return None
    return f"sm{numbers[0].value}{numbers[1].value}"


@functools.cache
def gpu_name() -> str | None:
    """What the driver calls the GPU, like ``NVIDIA H200``, where `gpu` finds one."""
    if gpu() is None:
        return None
    driver, device = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetName(name, 256, device):
        return gpu()
    return name.value.decode()


@functools.cache
def installed() -> Path | None:
    """This package's own library: named by the environment, installed, or built here before.

    Raises:
        ConfigError: the environment names a file that is not there.
    """
    given = os.environ.get(VARIABLE)
    if given:
        if not Path(given).is_file():
            raise ConfigError(f"{VARIABLE} names {given}, and there is no such file")
        return Path(given)
    beside = Path(__file__).parent / LIBRARY
    if beside.is_file():
        return beside
    try:
        from qcompile.targets.cuda.build import built

        return built()
    except (ConfigError, ImportError):
        return None


def description(path: Path) -> dict[str, Any]:
    """What ``qcompile.json`` says of a library that an artifact carries."""
    return {
        "file": path.name,
        "sha256": sha256(path),
        "operators": VERSION,
        "qcompile": importlib.metadata.version("qcompile"),
    }


def choose(folder: Path, record: Mapping[str, Any], *, trust_library: bool) -> Path:
    """The library for the artifact in `folder`: this package's own, or the one it carries.

    Raises:
        ModelError: this package has none of the artifact's version, and the artifact's own is not
            there, not trusted or not the one that was recorded.
    """
    carried = record.get("library")
    wanted = carried if isinstance(carried, dict) else {}
    version = importlib.metadata.version("qcompile")
    own = installed()
    made_by = record.get("versions", {}).get("qcompile")
    if own is not None and made_by == version and wanted.get("operators", VERSION) == VERSION:
        return own
    lacking = "is not built" if own is None else f"is of version {version}, not {made_by}"
    why = f"{folder} needs the CUDA operators, and this package's library {lacking}"
    if not wanted:
        raise ModelError(why, hint="python -m qcompile.targets.cuda.build builds it")
    if not trust_library:
        raise ModelError(
            why, hint="trust_library=True loads the one that the artifact carries, which is code"
        )
    name = str(wanted.get("file"))
    path = folder / name
    if Path(name).name != name or not path.is_file():
        raise ModelError(f"{folder} lacks the library {name} that its record names")
    if sha256(path) != wanted.get("sha256"):
        raise ModelError(f"{path} is not the library that the artifact was made with")
    return path


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
