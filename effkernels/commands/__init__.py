"""The commands of ``effkernels``, one module each with ``TEXT`` for the help, ``add_arguments`` and ``run``.

Results go to standard output, progress and warnings to standard error. Exit status: 0 all well, 1 something failed
(a check, a contender that was asked for, an image), 2 wrong arguments.
"""
