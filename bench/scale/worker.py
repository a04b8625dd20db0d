"""An encoder or an LLM worker, on a device of the comparison.

    SCALE_SERVICE=encoder|llm SCALE_DEVICE=DEVICE python -m bench.scale.worker FLAGS

DEVICE is ``core:N``: the process runs only on that core; or ``scripted:SOCKET:N``: each forward
pass occupies a scripted device for its time while it is computed, so the model should be small.
Queues, batches, gRPC, the store and the scheduler are the product's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.scale.devices import Device

SERVICE, DEVICE, TIMES = "SCALE_SERVICE", "SCALE_DEVICE", "SCALE_TIMES"


@dataclass(frozen=True)
class PassTimes:
    """Milliseconds of scripted forward passes: of a tower's batch, and of a decoder's step."""

    tower: float = 5.0
    patch: float = 2.0
    step: float = 30.0
    sequence: float = 8.0  # Of each sequence that decodes.
    prompt_token: float = 0.4

    def text(self) -> str:
        return ",".join(str(value) for value in asdict(self).values())

    @classmethod
    def read(cls, text: str) -> PassTimes:
        return cls(*map(float, text.split(",")))

    def of_batch(self, plans: Sequence[Any]) -> float:
        """Seconds of a tower's pass."""
        patches: int = sum(plan.num_patches for plan in plans)
        return (self.tower + self.patch * patches) / 1000

    def of_step(self, plan: Any) -> float:
        """Seconds of a decoder's step; 0 for one that computes nothing."""
        if not plan.works:
            return 0.0
        decodes: int = plan.num_decodes
        prompt: int = plan.num_tokens - decodes
        return (self.step + self.sequence * decodes + self.prompt_token * prompt) / 1000


def script(device: Device, times: PassTimes) -> None:
    """Makes all later forward passes of this process occupy the device."""
    from encoder_service.backends.torch_backend import TorchBackend
    from llm_service.device.model_runner import ModelRunner

    encode, execute = TorchBackend.encode, ModelRunner.execute

    def encode_on_device(self: TorchBackend, pixels: Any, plans: Any) -> Any:
        device.begin(times.of_batch(plans))
        try:
            return encode(self, pixels, plans)
        finally:
            device.end()

    def execute_on_device(self: ModelRunner, plan: Any) -> Any:
        device.begin(times.of_step(plan))
        try:
            return execute(self, plan)
        finally:
            device.end()

    TorchBackend.encode = encode_on_device  # type: ignore[method-assign]
    ModelRunner.execute = execute_on_device  # type: ignore[method-assign]


def main() -> int:
    kind, _, place = os.environ[DEVICE].partition(":")
    if kind == "core":
        os.sched_setaffinity(0, {int(place)})
    elif kind == "scripted":
        path, _, number = place.rpartition(":")
        script(Device(path, int(number)), PassTimes.read(os.environ[TIMES]))
    if os.environ[SERVICE] == "encoder":
        from encoder_service.__main__ import main as serve
    else:
        from llm_service.__main__ import main as serve
    return serve(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
