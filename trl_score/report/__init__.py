"""
One HTML page from training runs, evaluations and scaling studies: tables with intervals, figures, a browser of rollouts. It
needs no network and no other file. What a model wrote is data in it, never markup.
"""

from .figures import COLORS, training_figure
from .folders import STATE, Found, Run, find
from .page import write_report


__all__ = ["COLORS", "STATE", "Found", "Run", "find", "training_figure", "write_report"]
