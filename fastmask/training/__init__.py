"""Training: recipes, optimizers, single steps, whole runs, and evaluation."""

from fastmask.training.activation_checkpointing import checkpoint_activations
from fastmask.training.callbacks import Callback
from fastmask.training.config import TrainingConfig, make_training_config
from fastmask.training.evaluation import Evaluation, evaluate
from fastmask.training.optimizer import (
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    make_schedule,
    mask_probabilities,
    parameter_groups,
)
from fastmask.training.recipe import Recipe
from fastmask.training.runner import TrainingResult, train
from fastmask.training.trainer import Trainer

__all__ = [
    "Callback",
    "Evaluation",
    "Recipe",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "checkpoint_activations",
    "clip_gradients",
    "evaluate",
    "learning_rate_factor",
    "make_optimizer",
    "make_schedule",
    "make_training_config",
    "mask_probabilities",
    "parameter_groups",
    "train",
]
