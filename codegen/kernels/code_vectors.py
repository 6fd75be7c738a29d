"""Float32 vectors of the x86 convolutions as codes: saturated bytes, and squares transposed."""

from collections.abc import Sequence

from t3c.codegen.kernels.emit import LANES, Emitter, i32
from t3c.codegen.kernels.family import Image


def codes_of(e: Emitter, values: Sequence[str], image: Image, *, wide: bool) -> str:
    """Up to four float32 vectors as codes, saturated: bytes, vector after vector; 64 of them."""
    if not wide:
        return _joined(e, [*values, *[values[-1]] * (4 - len(values))], image)

    def rounded(vector: str) -> str:  # to the nearest even: one instruction
        name = "llvm.x86.avx512.mask.cvtps2dq.512"
        rest = f"{i32(0)}, T.int16(-1), T.int32(4)"
        return f'T.call_llvm_pure_intrin("int32x16", "{name}", {vector}, {rest})'

    def narrow(dtype: str, name: str, a: str, b: str) -> str:
        line = f'T.call_llvm_pure_intrin("{dtype}", "llvm.x86.avx512.{name}.512", {a}, {b})'
        return e.let("n", line)

    four = [e.let("q", rounded(value)) for value in values]
    four += four[-1:] * (4 - len(four))
    words = [
        narrow("int16x32", "packssdw", four[2 * i], four[2 * i + 1])
        for i in range(2 if len(values) > 2 else 1)
    ]
    packed = _stored(e, narrow("int8x64", _narrowing(image), words[0], words[-1]), image, 64)
    # lane l of every 128 bits holds dword l of vector 0, 1, 2, 3
    dwords = f'T.reinterpret({packed}, dtype="int32x16")'
    turned = f"T.Shuffle([{dwords}], {[4 * k + v for v in range(4) for k in range(4)]})"
    return e.let("n", f'T.reinterpret({turned}, dtype="uint8x64")')


def _narrowing(image: Image) -> str:
    """The instruction that makes bytes of 16-bit words."""
    return "packuswb" if (image.signed, image.bits) == (False, 8) else "packsswb"


def _stored(e: Emitter, packed: str, image: Image, count: int) -> str:
    """The stored bytes of `count` saturated ones: cut off where fewer bits or symmetry ask for it.

    Unsigned codes of 7 bits are what signed saturation leaves, without the negative ones.
    """

    def all_of(value: int) -> str:
        return f"T.broadcast(T.int8({value}), {count})"

    if not image.signed:
        return packed if image.bits == 8 else e.let("n", f"T.max({packed}, {all_of(0)})")
    low, high = image.ends
    if image.bits == 8:
        return e.let("n", f"T.bitwise_xor(T.max({packed}, {all_of(low)}), {all_of(-128)})")
    cut = f"T.max(T.min({packed}, {all_of(high)}), {all_of(low)})"
    return e.let("n", f"{cut} + {all_of(1 << (image.bits - 1))}")


def _joined(e: Emitter, values: Sequence[str], image: Image) -> str:
    """`codes_of` with the instructions of AVX2, two vectors at a time."""

    def call(dtype: str, name: str, *args: str) -> str:
        return e.let(
            "n", f'T.call_llvm_pure_intrin("{dtype}", "llvm.x86.{name}", {", ".join(args)})'
        )

    found = []
    for pair in (values[:2], values[2:]):
        words = []
        for value in pair:
            half = [f"T.Shuffle([{value}], {list(range(8 * i, 8 * i + 8))})" for i in (0, 1)]
            whole = [call("int32x8", "avx.cvt.ps2dq.256", h) for h in half]
            words.append(call("int16x16", "avx2.packssdw", *whole))
        packed = _stored(e, call("int8x32", f"avx2.{_narrowing(image)}", *words), image, 32)
        dwords = f'T.reinterpret({packed}, dtype="int32x8")'
        turned = f"T.Shuffle([{dwords}], [0, 4, 1, 5, 2, 6, 3, 7])"
        found.append(e.let("n", f'T.reinterpret({turned}, dtype="uint8x32")'))
    return e.let("n", f"T.Shuffle([{', '.join(found)}], {list(range(64))})")


def transpose(e: Emitter, rows: Sequence[str]) -> list[str]:
    """Sixteen vectors of sixteen lanes: vector i, lane j becomes vector j, lane i."""
    names = list(rows)
    for step in (1, 2, 4, 8):
        turned = list(names)
        low = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
        high = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
        for i in range(LANES):
            if not i & step:
                pair = f"{names[i]}, {names[i + step]}"
                turned[i] = e.let("x", f"T.Shuffle([{pair}], {low})")
                turned[i + step] = e.let("x", f"T.Shuffle([{pair}], {high})")
        names = turned
    return names
