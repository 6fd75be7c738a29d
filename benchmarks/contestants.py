"""Who runs: each kind prepares its files once in a folder, then loads calls bound to inputs.

`prepare` is slow (lowering, calibration) and runs once for each network; `load` gives, for every
name, a function from inputs to a call without arguments that returns the first output. Where a peer
has settings whose best cannot be known beforehand, a contestant has several candidates.
"""

import copy
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import CALIBRATION, FirstOutput, Inputs, Network, first

Run = Callable[[], Any]
Bind = Callable[[Inputs], Run]
Levels = {"native": "x86", "vnni": "x86-vnni", "avx2": "x86-avx2"}


@dataclass(frozen=True, slots=True)
class Contestant:
    """One line of the table.

    Attributes:
        name: For example ``OpenVINO int8``.
        kind: ``ours``, ``int8``, ``float``, or ``unrestricted`` where a level cannot be enforced.
        candidates: Settings, in words -> function that makes it; the fastest one runs.
        note: What the reader must know, such as a level that could not be restricted.
    """

    name: str
    kind: str
    candidates: dict[str, Callable[[], Bind]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contestants share.

    Attributes:
        folder: Prepared files of this network.
        threads: Threads of one call.
        isa: ``native``, ``vnni`` or ``avx2``.
    """

    folder: Path
    threads: int
    isa: str


def ours_prepare(net: Network, setting: Setting) -> None:
    """Lower the chain of given shares, with every profile proved."""
    import t3c
    from benchmarks.shares import SharePlanner

    model, inputs = net.build()
    t3c.lower(
        model,
        Levels[setting.isa],
        inputs,
        setting.folder / f"ours-{setting.isa}",
        calibration=[net.draw(i) for i in CALIBRATION],
        planner=SharePlanner(net.shares, setting.threads),
        checks=setting.folder / f"checks-{setting.isa}",
        calls=0,
    )


def ours(net: Network, setting: Setting) -> Iterator[Contestant]:
    """Every profile, largest first."""
    import t3c

    session = t3c.load(
        setting.folder / f"ours-{setting.isa}", hashes=False, threads=setting.threads
    )
    for profile in reversed(session.profiles):
        variant = session.variants[profile.name]

        def bind(inputs: Inputs, variant: Any = variant) -> Run:
            return lambda: first(variant(*inputs))

        yield Contestant(f"t3c {profile.name}", "ours", {"": lambda bind=bind: bind})


def torch_peers(net: Network, setting: Setting) -> Iterator[Contestant]:
    """Eager and compiled float32, dynamic int8 with each engine."""
    model, _ = net.build()
    wrapped = FirstOutput(model).eval()

    def eager(module: Any) -> Bind:
        return lambda inputs: lambda: module(*inputs)

    def compiled() -> Bind:
        import torch._inductor.config as inductor

        inductor.freezing = True
        return eager(torch.compile(wrapped))

    def int8(engine: str) -> Bind:
        torch.backends.quantized.engine = engine
        made: Any = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(wrapped), {torch.nn.Linear}, dtype=torch.qint8
        )
        return eager(made)

    yield Contestant("torch fp32", "float", {"": lambda: eager(wrapped)})
    yield Contestant("torch compile fp32", "float", {"freezing": compiled})
    # FBGEMM, the engine "x86", has no switch: it would go on using AVX-512.
    wanted = ("onednn",) if setting.isa == "avx2" else ("onednn", "x86")
    engines = [e for e in wanted if e in torch.backends.quantized.supported_engines]
    note = "linear layers only; convolutions stay float32" if net.kind == "conv" else ""
    candidates = {e: (lambda e=e: int8(e)) for e in engines}
    yield Contestant("torch int8 dynamic", "int8", candidates, note)


def onnx_prepare(net: Network, setting: Setting) -> None:
    """Export once; both ONNX Runtime and OpenVINO read it."""
    model, inputs = net.build()
    names = [f"input{i}" for i in range(len(inputs))]
    path = str(setting.folder / "model.onnx")
    wrapped = FirstOutput(model).eval()
    torch.onnx.export(wrapped, inputs, path, input_names=names, opset_version=17, dynamo=False)


def ort_prepare(net: Network, setting: Setting) -> None:
    """Dynamic int8; static int8 (QDQ, per channel) with unsigned and with signed activations."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    folder = setting.folder
    path, ready = str(folder / "model.onnx"), str(folder / "ready.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    quantize_dynamic(
        ready, str(folder / "dynamic.onnx"), weight_type=QuantType.QInt8, per_channel=True
    )

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # no stubs
        """The calibration inputs."""

        def __init__(self) -> None:
            self.left = iter([_numpy(net.draw(i)) for i in CALIBRATION])

        def get_next(self) -> Any:
            return next(self.left, None)

    for name, kind in (("u8", QuantType.QUInt8), ("s8", QuantType.QInt8)):
        quantize_static(
            ready,
            str(folder / f"static-{name}.onnx"),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=kind,
            weight_type=QuantType.QInt8,
        )


def ort_peers(net: Network, setting: Setting) -> Iterator[Contestant]:
    """Float32, dynamic and static int8."""
    import onnxruntime as ort

    note = "" if setting.isa == "native" else "unrestricted: ONNX Runtime has no such switch"

    def session(name: str) -> Bind:
        options = ort.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        made = ort.InferenceSession(
            str(setting.folder / name), options, providers=["CPUExecutionProvider"]
        )

        def bind(inputs: Inputs) -> Run:
            given = _numpy(inputs)
            return lambda: made.run(None, given)[0]

        return bind

    files = {
        "ORT fp32": ("float", {"": "model.onnx"}),
        "ORT int8 dynamic": ("int8", {"": "dynamic.onnx"}),
        "ORT int8 static": ("int8", {"u8s8": "static-u8.onnx", "s8s8": "static-s8.onnx"}),
    }
    for name, (kind, candidates) in files.items():
        made = {how: (lambda f=f: session(f)) for how, f in candidates.items()}
        yield Contestant(name, kind if setting.isa == "native" else "unrestricted", made, note)


def openvino_prepare(net: Network, setting: Setting) -> None:
    """Int8 by NNCF: model type transformer, or both presets for a convolutional network."""
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    core = ov.Core()
    data = nncf.Dataset([_numpy(net.draw(i)) for i in CALIBRATION])
    if net.kind == "conv":
        presets: dict[str, dict[str, Any]] = {
            "mixed": {"preset": nncf.QuantizationPreset.MIXED},
            "performance": {"preset": nncf.QuantizationPreset.PERFORMANCE},
        }
    else:
        presets = {"transformer": {"model_type": nncf.ModelType.TRANSFORMER}}
    for name, extra in presets.items():
        model = core.read_model(str(setting.folder / "model.onnx"))
        quantized = nncf.quantize(model, data, subset_size=len(CALIBRATION), **extra)
        ov.save_model(quantized, setting.folder / f"ov-{name}.xml", compress_to_fp16=False)


def openvino_peers(net: Network, setting: Setting) -> Iterator[Contestant]:
    """Float32, bfloat16, and int8 with both hints and both precisions of what stays float."""
    import openvino as ov

    core = ov.Core()
    can_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def compiled(file: Path, hint: str, precision: str) -> Bind:
        settings = {
            "INFERENCE_NUM_THREADS": setting.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": hint,
            "INFERENCE_PRECISION_HINT": precision,
            "ENABLE_CPU_PINNING": False,
        }
        made = core.compile_model(core.read_model(str(file)), "CPU", settings)

        def bind(inputs: Inputs) -> Run:
            request = made.create_infer_request()
            for i, value in enumerate(inputs):
                request.set_input_tensor(i, ov.Tensor(value.numpy()))

            def run() -> Any:
                request.infer()
                return request.get_output_tensor(0).data

            return run

        return bind

    def candidates(files: dict[str, Path], precisions: list[str]) -> dict[str, Callable[[], Bind]]:
        return {
            f"{name} {hint} {precision}".strip(): (
                lambda f=file, h=hint, p=precision: compiled(f, h, p)
            )
            for name, file in files.items()
            for hint in ("LATENCY", "THROUGHPUT")
            for precision in precisions
        }

    plain = {"": setting.folder / "model.onnx"}
    int8 = {f.stem.removeprefix("ov-"): f for f in sorted(setting.folder.glob("ov-*.xml"))}
    yield Contestant("OpenVINO fp32", "float", candidates(plain, ["f32"]))
    if can_bf16:
        yield Contestant("OpenVINO bf16", "float", candidates(plain, ["bf16"]))
    else:
        yield Contestant("OpenVINO bf16", "float", {}, "this processor has no bfloat16")
    precisions = ["f32", "bf16"] if can_bf16 else ["f32"]
    yield Contestant("OpenVINO int8", "int8", candidates(int8, precisions))


PREPARE = {
    "ours": ours_prepare,
    "onnx": onnx_prepare,
    "ort": ort_prepare,
    "openvino": openvino_prepare,
}
"""Step -> what it does; ``onnx`` comes before the peers that read its file."""
PEERS = {"ours": ours, "torch": torch_peers, "ort": ort_peers, "openvino": openvino_peers}

LIMITS = {
    "native": {},
    "vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
"""Level -> environment that keeps peers to its instructions."""


def environment(isa: str, threads: int, cache: Path) -> dict[str, str]:
    """What a process that prepares or times must start with."""
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "TVM_NUM_THREADS")}
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    return {**os.environ, **counts, **compiled, **LIMITS[isa]}


def _numpy(inputs: Inputs) -> dict[str, Any]:
    return {f"input{i}": x.numpy() for i, x in enumerate(inputs)}
