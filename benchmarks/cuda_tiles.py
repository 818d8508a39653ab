"""Time every tile of the GEMMs on the GPU at hand: where ``tiles.py`` has its costs from.

    python -m benchmarks.cuda_tiles CUBINS OUT.json [--rows 1,16,2048] [--weights 4096x4096]

CUBINS is a folder of compiled kernels, as ``aot.compile_all`` keeps them in its cache. Launched
through the CUDA driver, many launches in one CUDA graph, over weights that are together several
times the GPU's cache. Needs torch with CUDA; the float16 figures are of its matrix product.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

ROWS: Final = (1, 8, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WEIGHTS: Final = (
    (4096, 4096),
    (4096, 6144),
    (4096, 14336),
    (4096, 16384),
    (5120, 5120),
    (5120, 20480),
    (14336, 4096),
    (16384, 4096),
    (20480, 5120),
)
"""Input and output channels."""
BYTES_OF_WEIGHTS: Final = 400e6
GROUP: Final = 8

_SWIZZLE: Final = {32: 1, 64: 2, 128: 3}
_MAX_DYNAMIC_SHARED: Final = 8


class Kernel:
    """A compiled GEMM, loaded into the current CUDA context."""

    def __init__(self, cuda: ctypes.CDLL, path: Path) -> None:
        self.cuda = cuda
        stored = json.loads(path.read_text(encoding="utf-8"))
        self.name = path.name.partition("_sm")[0]
        family, codes, *numbers = self.name.replace("gemm_hopper", "hopper").split("_")
        self.codes = codes
        self.tile = tuple(map(int, numbers))
        self.hopper = family == "hopper"
        self.rows = self.tile[0] * max(self.tile[5], 1)
        self.threads, self.shared = stored["threads"], stored["shared"]
        self.boxes = stored["boxes"]
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), bytes.fromhex(stored["cubin"]))
        entry = stored["entry"].encode()
        self.call("cuModuleGetFunction", ctypes.byref(self.function), module, entry)
        if self.shared > 48 * 1024:
            self.call("cuFuncSetAttribute", self.function, _MAX_DYNAMIC_SHARED, self.shared)

    def call(self, name: str, *arguments: Any) -> None:
        """A function of the driver; stops the program where it fails."""
        code = getattr(self.cuda, name)(*arguments)
        if code:
            sys.exit(f"{name}: CUDA error {code} for {self.name}")

    def pack(self, a: Any, b: Any, out: Any, scales: tuple[Any, Any]) -> Any:
        """The arguments of a launch; keeps what they point to."""
        (m, k), n = a.shape, b.shape[0]
        values: list[Any] = []
        for tensor, box in zip((a, b, out), self.boxes or [None] * 3, strict=True):
            if box is None:
                values.append(ctypes.c_void_p(tensor.data_ptr()))
                continue
            rows, columns = tensor.shape
            values += [self.tensor_map(tensor, box), ctypes.c_int32(rows), ctypes.c_int32(columns)]
            values += [ctypes.c_int64(columns), ctypes.c_int64(1)]
        values += [ctypes.c_void_p(scale.data_ptr()) for scale in scales]
        values.append(ctypes.c_void_p())
        values += [ctypes.c_int32(value) for value in (m, n, k, 1, 0, 0, GROUP)]
        values += [ctypes.c_void_p(), ctypes.c_void_p()]
        pointers = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        return pointers, values

    def tensor_map(self, tensor: Any, box: list[int]) -> ctypes.Array[ctypes.c_char]:
        """A CUtensorMap of a matrix, aligned to 64 bytes."""
        room = ctypes.create_string_buffer(192)
        aligned = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
        rows, columns = tensor.shape
        size = tensor.element_size()
        self.call(
            "cuTensorMapEncodeTiled",
            aligned,
            0 if size == 1 else 1,
            2,
            ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows),
            (ctypes.c_uint64 * 1)(columns * size),
            (ctypes.c_uint32 * 2)(box[1], box[0]),
            (ctypes.c_uint32 * 2)(1, 1),
            0,
            _SWIZZLE[box[1] * size],
            2,
            0,
        )
        return aligned

    def launch(self, packed: Any, m: int, n: int, multiprocessors: int, stream: int) -> None:
        """One product."""
        tiles = math.ceil(m / self.rows) * math.ceil(n / self.tile[1])
        blocks = min(tiles, multiprocessors) if self.hopper else tiles
        grid = (blocks, 1, 1, self.threads, 1, 1, self.shared)
        handle = ctypes.c_void_p(stream)
        self.call("cuLaunchKernel", self.function, *grid, handle, packed[0], None)

    def suits(self, m: int) -> bool:
        """Whether the tile is worth timing at `m` rows."""
        if self.rows == 16:
            return m <= 16
        if self.rows == 32:
            return 8 < m <= 32
        return self.rows == 64 or m >= 64


def measure(folder: Path, out: Path, rows: list[int], weights: list[tuple[int, int]]) -> None:
    """Times in µs of every kernel in `folder`, into `out`."""
    import torch

    cuda_module: Any = torch.cuda
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    cuda = ctypes.CDLL("libcuda.so.1")
    kernels = [Kernel(cuda, path) for path in sorted(folder.glob("gemm*.json"))]
    stream = cuda_module.Stream()

    def timed(work: Any, repeats: int) -> float:
        with torch.cuda.stream(stream):
            work()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                work()
            graph.replay()
            marks = []
            for _ in range(repeats):
                ends = [cuda_module.Event(enable_timing=True) for _ in range(2)]
                ends[0].record()
                graph.replay()
                ends[1].record()
                marks.append(ends)
            torch.cuda.synchronize()
            return float(np.median([start.elapsed_time(end) for start, end in marks])) * 1e3

    found = []
    for k, n in weights:
        count = math.ceil(BYTES_OF_WEIGHTS / (n * k))
        codes = [
            torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(count)
        ]
        # Bytes of e4m3 without the two that are NaN.
        other = [torch.where(each == 127, 126, each) for each in codes]
        by_type = {"int8": codes, "fp8": other}
        floats = [
            torch.randn(k, n, dtype=torch.float16, device=device) * 0.02 for _ in range(count)
        ]
        scale = torch.rand(n, device=device)
        for m in rows:
            x = torch.randint(-127, 128, (m, k), dtype=torch.int8, device=device)
            half = torch.randn(m, k, dtype=torch.float16, device=device)
            scales = (torch.rand(m, device=device), scale)
            y = torch.empty(m, n, dtype=torch.float16, device=device)
            launches = count if m < 1024 else min(count, 6)
            repeats = 7 if m < 1024 else 5

            def products(
                half: Any = half, y: Any = y, floats: Any = floats, launches: int = launches
            ) -> None:
                for i in range(launches):
                    torch.matmul(half, floats[i], out=y)

            base = timed(products, repeats) / launches
            times = {}
            for kernel in kernels:
                if not kernel.suits(m):
                    continue
                rows_of = x if kernel.codes == "int8" else torch.where(x == 127, 126, x)
                weights_of = by_type[kernel.codes][:launches]
                packed = [kernel.pack(rows_of, w, y, scales) for w in weights_of]

                def work(kernel: Kernel = kernel, packed: Any = packed, m: int = m) -> None:
                    for arguments in packed:
                        handle = torch.cuda.current_stream().cuda_stream
                        kernel.launch(arguments, m, n, multiprocessors, handle)  # noqa: B023

                times[kernel.name] = timed(work, repeats) / launches
            found.append({"m": m, "n": n, "k": k, "float16": base, "tiles": times})
            best = sorted(times.items(), key=lambda item: item[1])[:4]
            cells = "  ".join(f"{name[5:]} {t:.1f} {base / t:.2f}x" for name, t in best)
            print(f"M={m:5d} K={k:5d} N={n:5d}  float16 {base:7.1f}  {cells}", flush=True)
        out.write_text(json.dumps({"sms": multiprocessors, "times": found}), encoding="utf-8")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cubins", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--weights", default=",".join(f"{k}x{n}" for k, n in WEIGHTS))
    arguments = parser.parse_args()
    rows = [int(m) for m in arguments.rows.split(",")]
    weights = [(int(k), int(n)) for k, n in (w.split("x") for w in arguments.weights.split(","))]
    measure(arguments.cubins, arguments.out, rows, weights)


if __name__ == "__main__":
    main()
