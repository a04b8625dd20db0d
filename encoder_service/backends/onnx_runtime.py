"""Runs an exported tower with onnxruntime, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch

from encoder_service.backends.base import Bucket
from encoder_service.backends.engine_backend import OutputBuffers
from opticnerve.errors import UnusableEngine

if TYPE_CHECKING:
    from opticnerve.models.towers.graph import Tensors, TowerGraph

VERSION = str(onnxruntime.__version__)
NUMPY = {
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}


class OnnxRuntime:
    """Implements ``EngineRuntime``. Reads inputs from and writes outputs to torch's memory."""

    def __init__(
        self, file: Path, graph: TowerGraph, buckets: Sequence[Bucket], threads: int
    ) -> None:
        """Raises UnusableEngine for a file that onnxruntime does not load."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # Errors.
        # Threads that wait would take cores from the gateway and the LLM worker.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                file, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base.
            raise UnusableEngine(f"onnxruntime {VERSION} does not load {file}: {error}") from error
        self._binding: Any = self._session.io_binding()
        self._buckets = buckets
        self._outputs = OutputBuffers(graph, buckets, torch.device("cpu"))

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, bucket: int, pictures: int, inputs: Tensors) -> Tensors:
        outputs = self._outputs.views(pictures, self._buckets[bucket].patches)
        for name, tensor in inputs.items():
            self._binding.bind_input(name, *_placed(tensor))
        for name, tensor in outputs.items():
            self._binding.bind_output(name, *_placed(tensor))
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise RuntimeError(f"onnxruntime: {error}") from error
        return outputs

    def keep_kernels(self) -> None:
        """Does nothing: no kernels are compiled."""

    def close(self) -> None:
        self._session = self._binding = None


def _placed(tensor: torch.Tensor) -> tuple[str, int, Any, tuple[int, ...], int]:
    """(device, its index, type, shape, address), as onnxruntime binds memory."""
    return "cpu", 0, NUMPY[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
