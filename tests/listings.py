"""Disassemblies as cuobjdump prints them, for the tests that count instructions."""

from __future__ import annotations


def listing(*lines: str) -> str:
    """Return a disassembly of these instructions, at 0x10, 0x20 and so on."""
    return "".join(f"        /*{16 * (number + 1):04x}*/  {line} ;  /* 0x0 */\n" for number, line in enumerate(lines))


# A loop over two strips of 1 pixel by 1 channel, each with a row loop of one load and one product.
STRIPS = (
    "MOV R0, 0x1",  # 10: before the loops
    "IADD3 R1, R1, 0x1, RZ",  # 20: the loop over strips
    "@P0 BRA 0x60",
    "LDG.E.128 R4, [R2.64]",  # 40: a row inside
    "FFMA R4, R4, R5, R6",
    "@P1 BRA 0x40",  # 60, where a strip at the border comes in as well
    "ISETP.GE.AND P2, PT, R1, R2, PT",  # 70: a row at the border
    "LDG.E.128 R4, [R2.64]",
    "FFMA R4, R4, R5, R6",
    "@P1 BRA 0x70",
    "BRX R8 -0x10",  # b0: the switch of the activation
    "MUFU.EX2 R4, R4",  # c0: not swish, longer
    "FMUL R4, R4, R4",
    "FMUL R4, R4, R4",
    "BRA 0x120",
    "MUFU.TANH R4, R4",  # 100: swish
    "BRA 0x120",
    "STG.E.128 [R2.64], R4",  # 120
    "@!P3 BRA 0x20",
    "EXIT",
)
