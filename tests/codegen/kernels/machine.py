"""Targets of kernel tests, as far as any processor with VNNI can run them."""


def llvm(mcpu: str) -> dict[str, object]:
    """LLVM's description of a processor; "" is any.

    Tiles are emulated where they lack. Other instructions of their first processor (16-bit floats)
    are not, so that the code around the tiles is that of plain AVX-512.
    """
    if mcpu == "sapphirerapids":
        tiles = ["+amx-tile", "+amx-int8"]
        return {"kind": "llvm", "mcpu": "icelake-server", "mattr": tiles}
    return {"kind": "llvm", "mcpu": mcpu} if mcpu else {"kind": "llvm"}
