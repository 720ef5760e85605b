"""The compiled code of every CUDA kernel: registers, spills, width of memory accesses, special functions.

``reading`` reads it off the built library, ``rules`` says what each kernel family claims, ``estimate`` holds counted
bytes and instruction slots against their floors, and ``python -m benchmarks.kernel_economy`` writes the tables of
docs/kernels.md. Nothing here needs a GPU.
"""
