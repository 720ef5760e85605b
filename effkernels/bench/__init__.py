"""Measuring: time, memory and agreement of operators and networks, here and of contenders.

`timing.py` is the clock; `op_calls.py` and `op_timing.py` measure operators, `networks.py` networks,
`contenders.py` what they are compared with, `check.py` whether the outputs agree, `peak_memory.py` what a call takes,
`autotune.py` which Triton tiles a GPU wants.
"""
