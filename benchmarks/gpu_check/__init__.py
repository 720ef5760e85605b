"""Every check that needs a machine with a GPU, in one command of some minutes: ``make gpu-check``.

``python3 -m benchmarks.gpu_check [parts] --minutes N`` runs the parts one after the other, each in a process of its
own and within its share of the time: `PARTS` in ``schedule`` lists them by what is most worth knowing, one module here
each. It uses that machine's Python and packages, installs nothing, and needs no network. A tool that does not work
there gives 'not available', which is not 'passed'.

Every step is written down when it ends (``progress``), every measured row at once (``results``). What the time did not
reach is 'cut', with how far it came, and the next call resumes it. ``--device cpu --smoke`` is a dry run on the CPU,
with stand-ins for the tools that need a GPU.
"""
