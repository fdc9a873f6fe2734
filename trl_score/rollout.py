r"""
A rollout: problem $x_1$, attempt $y_1 \sim \pi(\cdot \mid x_1)$, correction instruction $p_1$, attempt
$y_2 \sim \pi(\cdot \mid x_2)$ with $x_2 = [x_1, y_1, p_1]$, and so on (Section 3).

Tokens in, tokens out. The context of an attempt is the prompt's tokens, the sampled tokens of the attempts before, and
between them a bridge: what the chat template puts between an assistant's text and the next assistant's text (end of turn,
the user's turn with the instruction, generation prompt). An attempt is never decoded and encoded again, so the tokens that
are trained are the tokens that were sampled.
"""

import json
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file
from trl import is_conversational
from trl.chat_template_utils import parse_response


SENTINEL = "ASSISTANT-TEXT-STANDS-HERE"
# Arguments of `apply_chat_template` that are no variables of the template.
RENDERING = {
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length"),
}
SETTINGS_FILE = "score.json"


@dataclass
class Rollouts:
    """
    `B` rollouts of `K` attempts, as token ids.

    Attributes:
        prompt_ids (`list[list[int]]`):
            The `B` prompts.
        attempts (`list[list[list[int]]]`):
            `attempts[i][k - 1]`: the sampled tokens of attempt `k`, with the end-of-sequence token if it was sampled.
        bridges (`list[list[list[int]]]`):
            `bridges[i][k - 1]`: the tokens between attempt `k` and attempt `k + 1`.
        logprobs (`list[list[list[float]]]`, *optional*):
            Log-probability of each sampled token, where the sampler reports them.
    """

    prompt_ids: list[list[int]]
    attempts: list[list[list[int]]]
    bridges: list[list[list[int]]]
    logprobs: list[list[list[float]]] | None = None

    @property
    def completion_ids(self) -> list[list[int]]:
        """All tokens after the prompt: `y1, bridge, y2, ..`."""
        return self._interleave(self.attempts, self.bridges)

    @property
    def attempt_ids(self) -> list[list[int]]:
        """For each token of `completion_ids`: `k` if it belongs to attempt `k`, 0 if to a bridge."""
        numbers = [[[k] * len(ids) for k, ids in enumerate(attempts, start=1)] for attempts in self.attempts]
        return self._interleave(numbers, self._zeros(0))

    @property
    def completion_logprobs(self) -> list[list[float]] | None:
        """For each token of `completion_ids`: its log-probability, 0.0 in a bridge."""
        return None if self.logprobs is None else self._interleave(self.logprobs, self._zeros(0.0))

    def context_ids(self, attempt: int) -> list[list[int]]:
        """What attempt `attempt`, from 1, was sampled from: the prompt, and the attempts before with their bridges."""
        before = attempt - 1
        return [
            prompt
            + [token for pair in zip(row[:before], between[:before], strict=True) for ids in pair for token in ids]
            for prompt, row, between in zip(self.prompt_ids, self.attempts, self.bridges, strict=True)
        ]

    def _zeros(self, zero: float) -> list[list[list[float]]]:
        return [[[zero] * len(ids) for ids in bridges] for bridges in self.bridges]

    @staticmethod
    def _interleave(attempts: list, bridges: list) -> list:
        return [
            [item for attempt, bridge in zip(row, [*between, []], strict=True) for item in attempt + bridge]
            for row, between in zip(attempts, bridges, strict=True)
        ]


def roll_out(
    prompt_ids: list[list[int]],
    generate: Callable[[list[list[int]], int], tuple[list[list[int]], list[list[float]] | None]],
    bridge: Callable[[int, list[list[int]]], list[list[int]]],
    num_attempts: int = 2,
) -> Rollouts:
    """
    Run all attempts of a batch of problems.

    Args:
        prompt_ids (`list[list[int]]`):
            Token ids of the `B` prompts.
        generate (`Callable`):
            `generate(contexts, attempt)` samples attempt `attempt` for each of `B` contexts and returns its token ids, and
            their log-probabilities or `None`.
        bridge (`Callable`):
            `bridge(attempt, attempt_ids)` returns the tokens between attempt `attempt`, whose `B` sampled ids it gets, and
            the next one.
        num_attempts (`int`, *optional*, defaults to `2`):
            Attempts in a rollout.

    Returns:
        [`Rollouts`].
    """
    contexts = [list(ids) for ids in prompt_ids]
    attempts, bridges, logprobs = [[] for _ in contexts], [[] for _ in contexts], [[] for _ in contexts]
    for attempt in range(1, num_attempts + 1):
        sampled, sampled_logprobs = generate(contexts, attempt)
        for row, ids in zip(attempts, sampled, strict=True):
            row.append(list(ids))
        if sampled_logprobs is None:
            logprobs = None
        else:
            for row, values in zip(logprobs, sampled_logprobs, strict=True):
                row.append(list(values))
        if attempt < num_attempts:
            between = bridge(attempt, sampled)
            for row, ids in zip(bridges, between, strict=True):
                row.append(ids)
            contexts = [
                context + list(ids) + after for context, ids, after in zip(contexts, sampled, between, strict=True)
            ]
    return Rollouts(prompt_ids, attempts, bridges, logprobs)


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], chat_template_kwargs: dict | None = None
) -> list[int]:
    """
    Token ids of a prompt, chat messages (with the generation prompt) or text, as in training. `chat_template_kwargs` are further
    arguments of the chat template.

    Raises:
        `ValueError`: if the prompt is chat messages and the tokenizer has no chat template.
    """
    if not is_conversational({"prompt": prompt}):
        return tokenizer(text=prompt)["input_ids"]
    check_chat_template(tokenizer)
    return tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
    )["input_ids"]


def check_chat_template_kwargs(kwargs: dict) -> None:
    """
    Raises:
        `ValueError`: If arguments say how to call the tokenizer, and are no variables of the chat template.
    """
    if ours := RENDERING.intersection(kwargs):
        raise ValueError(
            f"`chat_template_kwargs` has {', '.join(sorted(ours))}, which training and evaluation set themselves. It takes "
            "variables of the chat template, such as `enable_thinking`. Remove the others."
        )


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuse prompts of chat messages where nothing says how to render them.

    Raises:
        `ValueError`: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The prompts are chat messages, but the tokenizer has no chat template: '{tokenizer.name_or_path}' is a base model, "
            "which does not answer in turns. Use its instruction-tuned version, or fine-tune it with a chat template first "
            "(`trl.clone_chat_template`, `SFTTrainer`). A template alone is `tokenizer.chat_template`."
        )


def save_rollout_settings(
    folder: str | Path, *, chat_template_kwargs: dict | None = None, correction_instruction: str | None = None, **more
) -> None:
    """Write what a model's rollouts were rendered with, and `more` of it, to `score.json`, beside its weights or its adapter."""
    settings = {"chat_template_kwargs": chat_template_kwargs or {}, "correction_instruction": correction_instruction}
    settings |= more
    Path(folder, SETTINGS_FILE).write_text(json.dumps(settings, indent=2, ensure_ascii=False), "utf-8")


def load_rollout_settings(name: str, **kwargs) -> dict:
    """
    What [`save_rollout_settings`] wrote: `chat_template_kwargs` and `correction_instruction`. Nothing for other models.

    Args:
        name (`str`):
            Folder or Hub id of a model or an adapter.
        **kwargs:
            Where on the Hub: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`.
    """
    try:
        file = cached_file(name, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False, **kwargs)
    except (
        OSError
    ):  # no such model, or the Hub does not answer and the file is not in its cache: loading the model says so
        return {}
    return {} if file is None else json.loads(Path(file).read_text("utf-8"))


def decode_attempts(tokenizer: PreTrainedTokenizerBase, prompts: list, rollouts: Rollouts, attempt: int) -> list:
    """
    Attempts `attempt`, from 1, as TRL's completions: a list with one chat message, or text, as the prompts are.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        prompts (`list`):
            `B` prompts, chat messages or text.
        rollouts ([`Rollouts`]):
            Their rollouts.
        attempt (`int`):
            Which attempt.
    """
    attempt_ids = [attempts[attempt - 1] for attempts in rollouts.attempts]
    if not is_conversational({"prompt": prompts[0]}):
        return tokenizer.batch_decode(attempt_ids, skip_special_tokens=True)
    if any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema")):
        return [
            [parse_response(tokenizer, ids, prefix=context)]
            for ids, context in zip(attempt_ids, rollouts.context_ids(attempt), strict=True)
        ]
    contents = tokenizer.batch_decode(attempt_ids, skip_special_tokens=True)
    return [[{"role": "assistant", "content": content}] for content in contents]


class Bridge:
    """
    The tokens between two attempts.

    For chat messages the bridge is found by rendering the conversation with a sentinel in the assistant's place and taking
    what follows the sentinel, so it is right for templates that rewrite or drop earlier turns. For plain text it is the
    end-of-sequence token and the instruction between blank lines.

    Where the policy closed its turn itself, the token it closed it with is not repeated; where it was cut off or closed
    it with another token, the bridge starts with the template's own end of turn.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's tokenizer.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template.
        end_token_ids (`Collection[int]`, *optional*):
            The tokens that end an attempt. If given, a chat template that ends the assistant's turn with none of them is
            warned about.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict | None = None,
        end_token_ids: Collection[int] | None = None,
    ):
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        check_chat_template_kwargs(self.chat_template_kwargs)
        self._unchecked_ends = end_token_ids  # None once the template was checked
        # What can close a turn. An ordinary token of the template, such as its line break, does not.
        special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._closing_ids = special | {tokenizer.eos_token_id}

    def text(self, prompt: str | list[dict], instruction: str, attempt: int = 1) -> tuple[str, str]:
        """
        The bridge after attempt `attempt`, as text before the instruction and text from the instruction on.

        Raises:
            `ValueError`: if the instruction is empty, or the chat template does not show it or the assistant's text.
        """
        if not instruction.strip():
            raise ValueError(
                "An empty correction instruction would not ask the model to correct its attempt. Set it to a sentence."
            )
        self._warn_of_rendered(prompt)
        if not is_conversational({"prompt": prompt}):
            return (self.tokenizer.eos_token or "") + "\n\n", f"{instruction}\n\n"
        turn = [{"role": "assistant", "content": SENTINEL}, {"role": "user", "content": instruction}]
        rendered = self.tokenizer.apply_chat_template(
            prompt + turn * attempt, tokenize=False, add_generation_prompt=True, **self.chat_template_kwargs
        )
        before, sentinel, after = rendered.rpartition(SENTINEL)
        start = after.find(instruction.strip())
        if not sentinel or before.count(SENTINEL) != attempt - 1 or start < 0:
            raise ValueError(
                "The chat template does not render the assistant's turn and the correction instruction after it, so the "
                "second attempt would not see the first. Set a chat template on the tokenizer that renders every turn."
            )
        if self._unchecked_ends is not None:
            self._warn_of_end_of_turn(prompt, after[:start])
        return after[:start], after[start:]

    def _warn_of_end_of_turn(self, prompt: list[dict], after: str):
        """`after`: what the template puts between the assistant's text and the next user's."""
        ends, self._unchecked_ends = set(self._unchecked_ends), None
        # A template may close the last turn with another token than the turns before it, as gpt-oss does.
        last = self.tokenizer.apply_chat_template(
            [*prompt, {"role": "assistant", "content": SENTINEL}], tokenize=False, **self.chat_template_kwargs
        ).rpartition(SENTINEL)[2]
        closing = [self._first_special_tokens(text, ends) for text in (after, last)]
        if ends.intersection(closing[0] + closing[1]):
            return
        # Of several tokens in a row, as of Cohere 2, the last one is the end.
        found = closing[1][-1:] or closing[0][:1]
        name = "no special token"
        remedy = "Use a chat template that closes it with one, and a model that was trained with it."
        if found:
            token = self.tokenizer.convert_ids_to_tokens(found[0])
            name = repr(token)
            remedy = f"Set `tokenizer.eos_token = {token!r}` and pass that tokenizer."
        warnings.warn(
            f"The chat template ends the assistant's turn with {name}, but generation stops only at "
            f"{self.tokenizer.convert_ids_to_tokens(sorted(ends))}. An attempt then continues behind the end of its turn. {remedy}",
            stacklevel=2,
        )

    def _first_special_tokens(self, text: str, ends: set[int]) -> list[int]:
        """The first special tokens of a text that stand in a row."""
        special = ends.union(self.tokenizer.added_tokens_decoder)
        ids = self._tokenize([text])[0] if text else []
        start = next((i for i, token in enumerate(ids) if token in special), len(ids))
        return list(takewhile(special.__contains__, ids[start:]))

    @cached_property
    def _marks(self) -> tuple[list[str], str]:
        """What shows that a text was rendered by a chat template: special tokens in it, or the generation prompt at its end."""
        tokenizer = self.tokenizer
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = [token for token in special if token != tokenizer.unk_token and len(token) > 2]
        generation_prompt = ""
        if tokenizer.chat_template is not None:
            try:
                generation_prompt = tokenizer.apply_chat_template(
                    [{"role": "user", "content": SENTINEL}],
                    tokenize=False,
                    add_generation_prompt=True,
                    **self.chat_template_kwargs,
                ).rpartition(SENTINEL)[2]
            except Exception:  # a template for other messages: only its special tokens are looked for
                pass
        return special, generation_prompt.strip()

    def _warn_of_rendered(self, prompt: str | list[dict]):
        special, generation_prompt = self._marks
        texts = [prompt] if isinstance(prompt, str) else [turn.get("content") for turn in prompt]
        texts = [text for text in texts if isinstance(text, str)]
        mark = next((token for token in special if any(token in text for text in texts)), None)
        if mark is None and len(generation_prompt) > 3 and any(t.rstrip().endswith(generation_prompt) for t in texts):
            mark = generation_prompt
        if mark is None:
            return
        if isinstance(prompt, str):
            message = (
                f"A prompt is text that contains {mark!r}, as if a chat template had rendered it. The correction instruction "
                "then stands outside of any turn, and the tokenizer may add a second beginning-of-sequence token. Give the "
                "prompts as chat messages (`[{'role': 'user', 'content': ...}]`)."
            )
        else:
            message = (
                f"A chat message of a prompt contains {mark!r}, as if a chat template had rendered it before. The template renders it "
                "again, so the model reads turns within a turn. Give the text of the message alone as its `content`."
            )
        warnings.warn(message, stacklevel=2)

    def __call__(
        self, prompts: list, instructions: list[str], attempt: int, attempt_ids: list[list[int]]
    ) -> list[list[int]]:
        """
        Token ids of the bridges of a batch.

        Args:
            prompts (`list`):
                `B` prompts, chat messages or text.
            instructions (`list[str]`):
                `B` correction instructions.
            attempt (`int`):
                The attempt before the bridge, from 1.
            attempt_ids (`list[list[int]]`):
                The sampled ids of that attempt.
        """
        rendered = self.rendered(prompts, instructions, attempt)
        return [self.join(ids, *each) for ids, each in zip(attempt_ids, rendered, strict=True)]

    def by_row(
        self, prompts: list, instructions: Callable[[int], list[str]]
    ) -> Callable[[int, int, list[int]], list[int]]:
        """
        The bridges of a batch, one row at a time: what is rendered for an attempt is rendered once, for all rows.

        Args:
            prompts (`list`):
                `B` prompts, chat messages or text.
            instructions (`Callable[[int], list[str]]`):
                The `B` correction instructions after attempt `attempt`, from 1.

        Returns:
            `Callable[[int, int, list[int]], list[int]]`: from an attempt, from 1, a row, from 0, and the sampled ids of that attempt
            to the bridge after it.
        """
        rendered = cache(lambda attempt: self.rendered(prompts, instructions(attempt), attempt))
        return lambda attempt, row, attempt_ids: self.join(attempt_ids, *rendered(attempt)[row])

    def rendered(self, prompts: list, instructions: list[str], attempt: int) -> list[tuple[list[int], int]]:
        """
        For each row what [`Bridge.join`] makes the bridge after attempt `attempt` from, whatever that attempt says: the tokens
        after the assistant's text, and how many of them stand before the instruction.
        """
        # The rollouts of a problem share their bridge.
        keys = [(repr(prompt), instruction) for prompt, instruction in zip(prompts, instructions, strict=True)]
        texts = {}
        for key, prompt, instruction in zip(keys, prompts, instructions, strict=True):
            if key not in texts:
                texts[key] = self.text(prompt, instruction, attempt)
        unique = list(dict.fromkeys(texts.values()))
        heads = self._tokenize([head for head, _ in unique])
        wholes = self._tokenize([head + tail for head, tail in unique])
        tokens = {text: (whole, len(head)) for text, whole, head in zip(unique, wholes, heads, strict=True)}
        return [tokens[texts[key]] for key in keys]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(text=texts, add_special_tokens=False)["input_ids"]

    def join(self, attempt_ids: list[int], bridge_ids: list[int], head_length: int) -> list[int]:
        """The bridge without its end of turn if the attempt ends with that token."""
        if attempt_ids and attempt_ids[-1] in self._closing_ids.intersection(bridge_ids[:head_length]):
            return bridge_ids[bridge_ids.index(attempt_ids[-1]) + 1 :]
        return bridge_ids
