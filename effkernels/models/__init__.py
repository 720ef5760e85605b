"""The networks, the registry that builds them by name, and the loading of other libraries' checkpoints."""

from __future__ import annotations

from effkernels.models.architecture import BASELINE, Architecture, Stage
from effkernels.models.checkpoint_tensors import CheckpointError
from effkernels.models.checkpoints import Checkpoint, read_checkpoint
from effkernels.models.config import ModelConfig
from effkernels.models.conversion import convert_state_dict
from effkernels.models.efficientnet import EfficientNet, EfficientNetFeatures
from effkernels.models.features import FeatureInfo
from effkernels.models.layouts import Semantics
from effkernels.models.pretrained import HubError
from effkernels.models.registry import create_model, list_models, load_checkpoint, model_config, register

__all__ = [
    "BASELINE",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "EfficientNet",
    "EfficientNetFeatures",
    "FeatureInfo",
    "HubError",
    "ModelConfig",
    "Semantics",
    "Stage",
    "convert_state_dict",
    "create_model",
    "list_models",
    "load_checkpoint",
    "model_config",
    "read_checkpoint",
    "register",
]
