"""The TensorRT libraries' builder and log, without a GPU: TensorRT for RTX compiles ahead of time;
what runs on a device alone has stand-ins."""

from __future__ import annotations

import ctypes
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from encoder_service.backends import tensorrt_runtime
from encoder_service.backends.base import Recovery
from encoder_service.backends.engine_backend import EngineBackend
from encoder_service.backends.tensorrt_library import KEPT_ERRORS, TensorrtLibrary
from encoder_service.backends.tensorrt_runtime import TensorrtRuntime
from encoder_service.engines import opening
from encoder_service.engines.sidecar import PLAN_FILE
from encoder_service.engines.tensorrt_builder import build_plan
from opticnerve.errors import ConfigError, UnusableEngine
from tests.preprocessors import mean_colour
from tests.tower_graphs import BUCKETS, WIDTH, SmallGraph, SmallTower, check_rows, pictures, plan_of

PROFILES = [{"x": ((1, 8), (4, 8))}, {"x": ((1, 32), (2, 32))}]


@pytest.fixture(scope="module")
def library() -> TensorrtLibrary:
    pytest.importorskip("tensorrt_rtx_bindings")
    return TensorrtLibrary("tensorrt_rtx")


def graph_file(path: Path, *nodes: Any) -> Path:
    """An ONNX file from x [n, m] to y."""
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", "m"]) for name in ("x", "y")
    ]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    onnx.save(model, path)
    return path


def node(kind: str, name: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, [output], name=name, **attributes)


def test_a_plan_is_built_for_two_devices(library: TensorrtLibrary, tmp_path: Path) -> None:
    graph = graph_file(tmp_path / "g", node("Relu", "step", ["x"], "y"))
    build_plan(library, graph, tmp_path / "plan", PROFILES, ("8.9", "12.0"), None)
    assert (tmp_path / "plan").stat().st_size > 1000


def test_a_node_that_the_library_does_not_know_is_named(
    library: TensorrtLibrary, tmp_path: Path
) -> None:
    graph = graph_file(
        tmp_path / "g",
        node("Relu", "step", ["x"], "z"),
        node("Frobnicate", "block.3/frobnicate", ["z"], "y"),
    )
    with pytest.raises(UnusableEngine, match=r"node block\.3/frobnicate \(Frobnicate\): \w+"):
        build_plan(library, graph, tmp_path / "plan", PROFILES, ("8.9",), None)
    assert not (tmp_path / "plan").exists()


def test_a_build_that_fails_says_the_library_s_reason(
    library: TensorrtLibrary, tmp_path: Path
) -> None:
    graph = graph_file(tmp_path / "g", node("Relu", "step", ["x"], "y"))
    upside_down = [{"x": ((4, 8), (1, 8))}]
    with pytest.raises(UnusableEngine, match=r"does not build this tower: .*profile"):
        build_plan(library, graph, tmp_path / "plan", upside_down, ("8.9",), None)


def test_a_capability_that_is_not_built_for_is_refused(library: TensorrtLibrary) -> None:
    assert library.compute_capability("8.9") != library.compute_capability("12.0")
    with pytest.raises(ConfigError, match=r"9\.0; it does for 7\.5, 8\.0"):
        library.compute_capability("9.0")


def test_errors_are_told_once(library: TensorrtLibrary) -> None:
    severity = library.module.ILogger.Severity
    for level in (severity.ERROR, severity.ERROR, severity.INFO):
        library.logger.log(level, " node 7 failed\n")
    assert library.take_errors() == "node 7 failed"
    assert library.take_errors() == "it gave no reason"


def test_errors_are_logged_and_the_last_are_kept(
    library: TensorrtLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        library.logger.log(library.module.ILogger.Severity.ERROR, f"error {number}")
    assert "error 0" in caplog.messages[0] and len(caplog.messages) == 100
    assert len(library.errors) == KEPT_ERRORS and "error 99" in library.take_errors()


# ---- the runtime, on a device that has stand-ins


class Context:
    """An execution context that runs the graph's module between the addresses it was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profiles: list[int] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory = address, size

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profiles.append(profile)
        return self.engine.takes_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.engine.fails:
            self.engine.library.errors.append("no memory for layer 3")
            return False
        graph = self.engine.graph
        inputs = {
            name: at(self.addresses[name], shape, graph.inputs[name].dtype)
            for name, shape in self.shapes.items()
        }
        (rows,) = graph.module(**inputs)
        at(self.addresses["rows"], tuple(rows.shape), graph.dtype).copy_(rows)
        return True


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The tensor that lies there."""
    count = torch.Size(shape).numel()
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Engine:
    """What a library deserializes."""

    num_optimization_profiles = len(BUCKETS)
    device_memory_size_v2 = 4096

    def __init__(self, library: Any, graph: SmallGraph) -> None:
        self.library, self.graph, self.fails = library, graph, False
        self.takes_profiles = True
        self.contexts: list[Context] = []
        self.settings = Settings()

    def create_runtime_config(self) -> Settings:
        return self.settings

    def create_execution_context(self, settings: Settings) -> Context:
        assert settings is self.settings and settings.strategy == "user managed"
        self.contexts.append(Context(self))
        return self.contexts[-1]


class Settings:
    """How contexts are made, and the cache of kernels, which TensorRT for RTX alone has."""

    def __init__(self) -> None:
        self.strategy, self.loaded = "", b""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Settings:
        return self

    def set_runtime_cache(self, cache: Settings) -> None:
        assert cache is self

    def deserialize(self, data: bytes) -> bool:
        self.loaded = data
        return True

    def serialize(self) -> bytes:
        return b"kernels"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A library whose engine is a ``SmallGraph``, and a torch whose CUDA is the CPU."""
    stream = SimpleNamespace(cuda_stream=7, synchronize=lambda: None)
    cuda = SimpleNamespace(
        device=lambda device: nullcontext(),
        Stream=lambda device: stream,
        stream=lambda each: nullcontext(),
    )
    fake = SimpleNamespace(cuda=cuda, empty=torch.empty, uint8=torch.uint8)
    monkeypatch.setattr(tensorrt_runtime, "torch", fake)
    graph = SmallGraph(SmallTower(WIDTH))
    made = SimpleNamespace(name="tensorrt_rtx", version="1", logger=None, errors=[], graph=graph)
    made.engine = Engine(made, graph)
    made.module = SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        Runtime=lambda logger: SimpleNamespace(
            deserialize_cuda_engine=lambda data: made.engine if data == b"plan" else None
        ),
    )
    made.take_errors = lambda: TensorrtLibrary.take_errors(made)
    return made


def runtime_of(stand_in: Any, directory: Path, plan: bytes = b"plan") -> TensorrtRuntime:
    (directory / "plan").write_bytes(plan)
    return TensorrtRuntime(
        stand_in, directory / "plan", stand_in.graph, BUCKETS, directory / "kept" / "kernels"
    )


def test_contexts_and_buffers_are_made_once(stand_in: Any, tmp_path: Path) -> None:
    runtime = runtime_of(stand_in, tmp_path)
    backend = EngineBackend("tensorrt_rtx", stand_in.graph, BUCKETS, runtime, mean_colour)
    places = set()
    for sizes in ((8, 12, 4, 32, 8, 4), (4,), (16, 8)):
        pixels, plans = pictures(*sizes)
        check_rows(backend.encode(pixels, plans), SmallTower(WIDTH), pixels, plans)
        places |= {context.addresses["rows"] for context in stand_in.engine.contexts}
    contexts = stand_in.engine.contexts
    assert [context.profiles for context in contexts] == [[0], [1]]
    assert len(places) == 1 and len({context.memory for context in contexts}) == 1


def test_a_call_that_fails_says_why(stand_in: Any, tmp_path: Path) -> None:
    runtime = runtime_of(stand_in, tmp_path)
    backend = EngineBackend("tensorrt_rtx", stand_in.graph, BUCKETS, runtime, mean_colour)
    backend._on_cuda = True
    stand_in.engine.fails = True
    with pytest.raises(UnusableEngine, match=r"does not run here: .*no memory for layer 3"):
        backend.warm(plan_of(8), 0)
    backend._on_cuda = False
    stand_in.errors.append("an earlier fault")
    with pytest.raises(RuntimeError, match="no memory for layer 3") as caught:
        backend.encode(*pictures(8))
    assert "an earlier fault" not in str(caught.value)
    assert backend.classify(caught.value) is Recovery.ISOLATE


def test_a_plan_that_does_not_load_is_refused(stand_in: Any, tmp_path: Path) -> None:
    stand_in.errors.append("compiled for another device")
    with pytest.raises(UnusableEngine, match=r"does not load .*compiled for another device"):
        runtime_of(stand_in, tmp_path, b"another")
    stand_in.engine.takes_profiles = False
    with pytest.raises(UnusableEngine, match="does not take profile 0"):
        runtime_of(stand_in, tmp_path)
    stand_in.engine.num_optimization_profiles = 5
    with pytest.raises(UnusableEngine, match="5 profiles for 2 buckets"):
        runtime_of(stand_in, tmp_path)


def test_kernels_are_kept_by_plan_device_and_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[Path] = []
    monkeypatch.setattr(tensorrt_runtime, "TensorrtRuntime", lambda *given: kept.append(given[-1]))
    plan = SimpleNamespace(sha256="a" * 64)
    sidecar: Any = SimpleNamespace(files={PLAN_FILE: plan}, buckets=BUCKETS)
    graph: Any = SimpleNamespace(device=torch.device("cuda"))
    library: Any = SimpleNamespace()
    for capability, driver in (("8.9", "13000"), ("12.0", "13000"), ("8.9", "13010")):
        monkeypatch.setattr(opening, "device_capability", lambda _, here=capability: here)
        monkeypatch.setattr(opening, "driver_version", lambda here=driver: here)
        opening.open_runtime(tmp_path, sidecar, library, graph, 1)
    assert len(set(kept)) == 3
    assert kept[0].name == f"{'a' * 64}-8.9-13000.cache"


def test_a_machine_without_a_driver_has_no_version_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert opening.driver_version() == "0"


def test_a_second_close_does_nothing(stand_in: Any, tmp_path: Path) -> None:
    runtime = runtime_of(stand_in, tmp_path)
    runtime.close()
    runtime.close()


def test_compiled_kernels_are_kept_for_the_next_start(stand_in: Any, tmp_path: Path) -> None:
    with closing(runtime_of(stand_in, tmp_path)):
        assert stand_in.engine.settings.loaded == b""
    assert not (tmp_path / "kept" / "kernels").exists(), "nothing has been compiled"
    with closing(runtime_of(stand_in, tmp_path)) as runtime:
        backend = EngineBackend("tensorrt_rtx", stand_in.graph, BUCKETS, runtime, mean_colour)
        backend._on_cuda = True
        backend.warm(plan_of(8), 0)
        assert (tmp_path / "kept" / "kernels").read_bytes() == b"kernels"
    with closing(runtime_of(stand_in, tmp_path)):
        assert stand_in.engine.settings.loaded == b"kernels"
