"""Other people's models on the fused operators: timm, torchvision, lukemelas, Hugging Face, NVIDIA, or your own.

report = effkernels.optimize_(model.eval())
print(report)
"""

from __future__ import annotations

from effkernels.nn.norm_act import SyncBatchNormAct
from effkernels.optimize.norms import convert_sync_batchnorm, fold_bn_
from effkernels.optimize.optimizer import optimize_, restore_
from effkernels.optimize.report import BlockReport, NotFusedError, Report

__all__ = [
    "BlockReport",
    "NotFusedError",
    "Report",
    "SyncBatchNormAct",
    "convert_sync_batchnorm",
    "fold_bn_",
    "optimize_",
    "restore_",
]
