"""Configs of the stages, and the recipes that they are read from."""

from trainer.config.base import StageConfig, TeacherConfig, is_server
from trainer.config.recipe import load_config, load_function
from trainer.config.stages import DistillationConfig, EvaluationConfig, RLVRConfig, SFTConfig

__all__ = [
    "DistillationConfig",
    "EvaluationConfig",
    "RLVRConfig",
    "SFTConfig",
    "StageConfig",
    "TeacherConfig",
    "is_server",
    "load_config",
    "load_function",
]
