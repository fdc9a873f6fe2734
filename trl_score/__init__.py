"""SCoRe (Kumar et al., ICLR 2025) as a plugin for Hugging Face TRL."""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__


if TYPE_CHECKING:
    from .callbacks import CollapseAlarm, KeepBestCheckpoint
    from .evaluation import evaluate_self_correction
    from .scaling import inference_scaling
    from .score_config import SCoReConfig
    from .score_trainer import SCoReTrainer

_MODULES = {
    "CollapseAlarm": "callbacks",
    "KeepBestCheckpoint": "callbacks",
    "SCoReConfig": "score_config",
    "SCoReTrainer": "score_trainer",
    "evaluate_self_correction": "evaluation",
    "inference_scaling": "scaling",
}


def __getattr__(name: str):
    """Load what is asked for, so that the command line is quick to help."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CollapseAlarm",
    "KeepBestCheckpoint",
    "SCoReConfig",
    "SCoReTrainer",
    "__version__",
    "evaluate_self_correction",
    "inference_scaling",
]
