"""What samples the attempts of an evaluation: the interface of `sampling.py` and `endpoint.py`, and of a sampler of your own."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .decoding import Decoding


@dataclass(frozen=True)
class Attempt:
    """
    A sampled text: an attempt, or feedback on an attempt in Self-Refine.

    Attributes:
        text (`str`):
            The text.
        num_tokens (`int`, *optional*):
            Number of tokens. `None` if an endpoint does not say.
        truncated (`bool`):
            Whether the text was cut off at the maximum length.
        token_ids (`list[int]`, *optional*):
            The tokens, if the backend knows them.
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
            Name of the model in the results.
        backend (`str`):
            Key of `BACKENDS`.
        decoding (`str`):
            Description for the results: what changes the distribution besides temperature and `top_p`.
    """

    name: str
    backend: str
    decoding: str = "nothing else"

    def identity(self) -> dict:
        """Weights, tokenizer and chat template that the attempts come from. Results with another identity are not reused."""
        return {}

    @abstractmethod
    def length(self, prompt: str | list[dict]) -> int:
        """Length of a prompt, in any unit. Batches have prompts of similar length."""

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
                The user's turns between the attempts, one fewer than the number of attempts to sample. Each turn is a text for all
                prompts, or `B` texts if a dataset has a column `correction_instruction`.
            decoding ([`Decoding`]):
                Temperature, `top_p` and maximum length of an attempt.
            seed (`int`):
                Seed of the sampling. The same seed, prompts and machine give the same attempts.
            given (`int`, *optional*, defaults to `0`):
                Number of attempts that the prompts already contain.

        Returns:
            `list[list[Attempt]]`: `B` rows of `len(instructions) + 1` attempts.
        """
