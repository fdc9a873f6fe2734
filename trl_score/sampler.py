"""What samples the attempts of an evaluation: the interface of `sampling.py` and `endpoint.py`, and of a sampler of your own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .decoding import Decoding


@dataclass(frozen=True)
class Attempt:
    """
    One sampled text, an attempt or (in Self-Refine) feedback on one: the text, its tokens (`None` where an endpoint does not
    say), whether it was cut off, and which tokens they are.
    """

    text: str
    num_tokens: int | None
    truncated: bool
    token_ids: list[int] | None = None


def for_each_prompt(instruction: str | list[str], number: int) -> list[str]:
    """A user's turn for each of `number` prompts, from one for all of them or one for each; see [`Sampler.sample`]."""
    return [instruction] * number if isinstance(instruction, str) else instruction


class Sampler(ABC):
    """
    Samples all attempts at some problems.

    Attributes:
        name (`str`):
            The model, for the results.
        backend (`str`):
            Key of `BACKENDS`.
        decoding (`str`):
            For the results: what shapes the distribution beside temperature and `top_p`.
    """

    name: str
    backend: str
    decoding: str = "nothing else"

    def identity(self) -> dict:
        """For the results: which weights, tokenizer and chat template the attempts come from. Results of others are not reused."""
        return {}

    @abstractmethod
    def length(self, prompt: str | list[dict]) -> int:
        """How long a prompt is, in some unit: batches are made of prompts of like length."""

    @abstractmethod
    def sample(
        self, prompts: list, instructions: list[str | list[str]], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        """
        Sample rollouts.

        Args:
            prompts (`list`):
                `B` prompts, chat messages or text.
            instructions (`list[str | list[str]]`):
                The user's turns between the attempts: one attempt more is sampled than there are. Each is a text for all
                prompts, or `B` texts where a dataset has a column `correction_instruction`.
            decoding ([`Decoding`]):
                How.
            seed (`int`):
                The same seed, prompts and machine give the same attempts.
            given (`int`, *optional*, defaults to `0`):
                Attempts that the prompts already hold.

        Returns:
            `list[list[Attempt]]`: `B` rows of `len(instructions) + 1` attempts.
        """
