"""SCoRe for TRL: train a language model to correct its own mistakes."""

from ._version import __version__
from .score_config import SCoReConfig
from .score_trainer import SCoReTrainer


__all__ = ["SCoReConfig", "SCoReTrainer", "__version__"]
