"""The tasks, by name."""

from .arithmetic import Arithmetic
from .base import Task


__all__ = ["Arithmetic", "Task"]
