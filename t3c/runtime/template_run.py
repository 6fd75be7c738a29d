"""The text of run.py, which ships in every artifact: plain TVM and numpy, no t3c."""

RUN_PY = '''\
"""Run one profile with plain TVM: python run.py [profile] [inputs.npz]"""
import ctypes, json, pathlib, sys, time
import numpy as np
import tvm
from tvm.runtime.vm import VirtualMachine

root = pathlib.Path(__file__).resolve().parent
manifest = json.loads((root / "manifest.json").read_text())
profiles = {p["name"]: p for p in manifest["profiles"]}
name = sys.argv[1] if len(sys.argv) > 1 else manifest["profiles"][-1]["name"]
if name not in profiles:
    sys.exit(f"no profile {name!r}; there are {', '.join(profiles)}")
profile = profiles[name]
if any(f.startswith("amx") for f in manifest["target"]["features"]):
    ctypes.CDLL(None).syscall(158, 0x1023, 18)  # ask Linux for the tile registers
dtypes = {"BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "F16": "f2"}
dtypes |= {"U32": "u4", "I32": "i4", "F32": "f4", "U64": "u8", "I64": "i8", "F64": "f8"}
raw = np.memmap(root / "weights.safetensors", mode="c")  # safetensors: length, JSON header, bytes
start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
header = json.loads(raw[8:start].tobytes())
device = tvm.cuda(0) if manifest["target"]["kind"] == "cuda" else tvm.cpu(0)


def weight(name):
    """Aligned tensors of the file are used in place; tvm.runtime.tensor copies the others."""
    (begin, end), info = header[name]["data_offsets"], header[name]
    flat = np.asarray(raw[start + begin : start + end]).view(dtypes[info["dtype"]])
    array = flat.reshape(info["shape"])
    in_place = device.dlpack_device_type() == 1 and array.ctypes.data % 64 == 0
    return tvm.runtime.from_dlpack(array) if in_place else tvm.runtime.tensor(array, device)


if len(sys.argv) > 2:
    inputs = dict(np.load(sys.argv[2], allow_pickle=False))
else:
    inputs = {i["name"]: np.ones(i["shape"], i["dtype"]) for i in manifest["inputs"]}
library = tvm.runtime.load_module(str(root / manifest["library"]))
args = [tvm.runtime.tensor(inputs[i["name"]], device) for i in manifest["inputs"]]
weights = [weight(name) for name in profile["weights"]]
arena = profile.get("arena_bytes")
if arena is None:  # a function of TVM's virtual machine, which allocates its outputs
    run = VirtualMachine(library, device)[profile["function"]]
    args.append(weights)
else:  # a function of addresses: weights, scratch memory, outputs
    run, empty = library[profile["function"]], tvm.runtime.empty
    args.append(tvm.runtime.tensor(np.array([w.data_ptr() for w in weights] or [0], "int64")))
    args.append(empty((max(1, arena),), "uint8"))
    written = [empty(tuple(o["shape"]), o["dtype"]) for o in manifest["outputs"]]
    args += written
outputs = run(*args)
begin = time.perf_counter()
outputs = run(*args)
seconds = time.perf_counter() - begin
if arena is not None:
    flat = written
else:
    flat = [outputs] if isinstance(outputs, tvm.runtime.Tensor) else list(outputs)
for spec, output in zip(manifest["outputs"], flat):
    print(spec["name"], tuple(output.shape), output.dtype, "mean", float(output.numpy().mean()))
print(f"profile {profile['name']}: {seconds * 1e3:.3f} ms")
'''
