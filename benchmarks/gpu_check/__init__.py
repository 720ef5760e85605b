"""Everything that only a machine with a GPU can tell, in one command: ``make gpu-check``.

``python3 -m benchmarks.gpu_check [parts]`` runs the parts one after the other, each in a process of its own: `PARTS`
in ``runner`` lists them, one module here each. It uses that machine's Python and packages, installs nothing, and
needs no network. A tool that does not work there gives 'not available', which is not 'passed'.
"""
