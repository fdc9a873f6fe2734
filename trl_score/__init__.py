"""SCoRe (Kumar et al., ICLR 2025) as a plugin for Hugging Face TRL."""

import logging
from typing import TYPE_CHECKING

from ._version import __version__


__all__ = ["SCoReConfig", "SCoReTrainer", "__version__", "evaluate_self_correction", "inference_scaling"]

if TYPE_CHECKING:  # for type checkers and editors; a test compares it with the list and the modules below
    from .evaluation import evaluate_self_correction
    from .scaling import inference_scaling
    from .score_config import SCoReConfig
    from .score_trainer import SCoReTrainer
else:
    import importlib

    _MODULES = {
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

    def __dir__() -> list[str]:
        return sorted(__all__)


# PEFT imports bitsandbytes wherever that is installed, which then warns on some CPUs that it cannot load a kernel from the
# Hub. Here 4-bit layers never use that kernel (quantization.py), and most models have none of them.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
