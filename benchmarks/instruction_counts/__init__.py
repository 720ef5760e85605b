"""The instructions that the CPU kernels execute, operator by operator: a slower kernel does not land unseen.

Times of one machine say little about a change of a few per cent; the number of instructions is the same in every run.
`driver.cpp` calls each kernel once, with one thread and without torch. callgrind (valgrind) counts its instructions,
or `perf stat` where the machine has counters. Valgrind knows no AVX-512, so the kernels run in AVX2 and in plain code.
"""
