"""Measuring: time, memory and agreement of operators, blocks and networks, here and of contenders.

`timing.py` is the clock; `measure.py` times contenders in turns and notes how far the times can be believed
(`calibration.py`, `machine.py`). `op_cases.py`, `block_cases.py` and `networks.py` measure operators, blocks and
networks, `contenders.py` is what the networks are compared with, `suites.py` makes the cases. `compare.py` compares two
files of results, `check.py` checks whether the outputs agree, `peak_memory.py` measures what a call takes, and
`autotune.py` which Triton tiles a GPU wants.
"""
