"""The version of trl-score."""

__version__ = "0.1.0"
