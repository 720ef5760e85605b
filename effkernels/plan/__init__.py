"""Plan the launches of a network on a GPU and estimate their time, without a GPU.

`launches.py` puts every operator that a forward calls to the plan that its launcher uses; `record.py` finds the calls
on the meta device; `work.py` and `time_estimate.py` estimate the time of each launch from counted instructions
(`kernel_counts.py`); `gpus.py` is the table of GPUs.
"""

from __future__ import annotations

from effkernels.plan.launches import Plan, PlannedLaunch, Totals, plan_model

__all__ = ["Plan", "PlannedLaunch", "Totals", "plan_model"]
