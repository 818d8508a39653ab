"""A session whose inputs and outputs are bound: what the GPU benchmarks time."""

from __future__ import annotations

import time

import numpy as np
import onnxruntime as ort


class Timed:
    """Runs of one session with one binding."""

    session: ort.InferenceSession
    binding: ort.IOBinding

    def warm_up(self) -> None:
        """Three runs that do not count."""
        for _ in range(3):
            self.time()

    def time(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start

    def output(self) -> np.ndarray:
        """Of the last run, in float64."""
        result: np.ndarray = self.binding.copy_outputs_to_cpu()[0].astype(np.float64)
        return result
