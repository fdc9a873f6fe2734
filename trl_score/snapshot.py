"""The weights that a model had at some time, to ask it what it would have said then."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Snapshot:
    """
    A copy of the weights that are trained: all of them in full fine-tuning, the adapter's with LoRA. One mechanism serves
    both, at the memory of that copy.

    Attributes:
        target (`int`):
            The attempt that Stage I began to train when the copy was made.
        weights (`dict[str, torch.Tensor]`):
            By name of the parameter.
    """

    target: int
    weights: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, target: int) -> "Snapshot":
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return cls(target, {name: parameter.detach().clone() for name, parameter in trained.items()})

    @contextmanager
    def in_place_of_the_weights(self, model: nn.Module) -> Iterator[None]:
        """The model has these weights inside, and its own again afterwards. Not for training inside."""
        parameters = dict(model.named_parameters())
        current = {name: parameters[name].data for name in self.weights}
        try:
            for name, value in self.weights.items():
                parameters[name].data = value
            yield
        finally:
            for name, value in current.items():
                parameters[name].data = value
