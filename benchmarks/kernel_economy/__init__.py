"""The compiled code of every CUDA kernel: registers, spills, width of memory accesses, special functions.

``reading`` reads it off the built library. ``loops`` and ``paths`` follow a warp through the disassembly, ``counts``
and ``pointwise`` count what it issues in each part of a kernel, ``limits`` adds that up for a unit of work. ``rules``
has the claims of each kernel family. ``python -m benchmarks.kernel_economy`` writes the counts
(effkernels/plan/kernel_counts.json) and the tables of docs/kernels.md. Nothing here needs a GPU.
"""
