"""The configs of the stages, and the recipes that hold their keys."""
# ruff: noqa: F401

from opd_trainer.config.base import StageConfig, TeacherConfig
from opd_trainer.config.recipe import changed_keys, load_config, load_function
from opd_trainer.config.stages import DistillationConfig, EvaluationConfig, RLVRConfig, SFTConfig
