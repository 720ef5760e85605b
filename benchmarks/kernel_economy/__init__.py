"""The compiled code of every CUDA kernel: registers, spills, width of memory accesses, special functions.

``reading`` reads it off the built library, ``rules`` says what each kernel family claims, ``loops``, ``paths`` and
``counts`` count the instructions of each part of a kernel, and ``python -m benchmarks.kernel_economy`` writes these
counts (effkernels/kernel_counts.json) and the tables of docs/kernels.md. Nothing here needs a GPU.
"""
