"""Training: recipes, optimisers and schedules."""

from fastmask.training.evaluation import Evaluation, evaluate
from fastmask.training.optimizer import (
    clip_gradients,
    learning_rate_factor,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from fastmask.training.recipe import Recipe
from fastmask.training.trainer import Trainer

__all__ = [
    "Evaluation",
    "Recipe",
    "Trainer",
    "clip_gradients",
    "evaluate",
    "learning_rate_factor",
    "make_optimizer",
    "make_schedule",
    "parameter_groups",
]
