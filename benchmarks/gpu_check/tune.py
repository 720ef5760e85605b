"""Part `tune`: the fastest Triton tiles on this GPU, and the faster backend, by `effkernels tune`.

Answers are kept as they come, in the work folder of the check and not among those of this machine's user, so that
another turn continues where this one was cut and no other measurement is changed by them.
"""

from __future__ import annotations

import os
import sys

from benchmarks.gpu_check.common import WORK, Cut, NotAvailable, Options, python, run_part, tool_output
from benchmarks.gpu_check.progress import copy_out
from effkernels.triton import tuned_plan

FOLDER = WORK / "tuned"
_CLOSING_SECONDS = 2.0


def tune(options: Options) -> str:
    """Return the calls of EfficientNet-B0 at batch 1 and 256; in a dry run one call by Triton's interpreter."""
    options.needs_gpu()
    command = python("-m", "effkernels", "tune", "--model", "efficientnet_b0")
    variables = {tuned_plan.VARIABLE: str(FOLDER)}
    if options.dry:
        command += ["--batch-size", "1", "--img-size", "32", "--ops", "conv_bn_act", "--dry-run"]
        variables["TRITON_INTERPRET"] = "1"
    else:
        command += ["--batch-size", "1", "256"]
    try:
        status, output = tool_output(command, options.left - _CLOSING_SECONDS, variables)
    except NotAvailable as late:
        if "did not end" not in str(late):
            raise
        raise Cut(f"{known()} files of answers so far") from late
    finally:
        copy_out(*FOLDER.glob("**/*.json"))
    print(output[-8000:])
    last = (output.strip().splitlines() or ["no output"])[-1]
    if "there is nothing to tune" in last:
        raise NotAvailable(last)
    assert status == 0, last
    return last


def known() -> int:
    """Return how many files hold answers."""
    return len([name for _, _, names in os.walk(FOLDER) for name in names if name.endswith(".json")])


if __name__ == "__main__":
    sys.exit(run_part(tune))
