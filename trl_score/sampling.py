"""Where attempts come from in an evaluation: transformers, vLLM, or a chat endpoint."""

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import PartialState
from huggingface_hub import InferenceClient
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .cache import can_reuse_cache, reused_cache
from .rollout import Bridge, decode_attempts, roll_out, tokenize_prompt
from .tasks.base import text_of


@dataclass(frozen=True)
class Decoding:
    """
    How an attempt is decoded.

    Args:
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Tokens of one attempt.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_completion_length: int = 1024


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


class Sampler(ABC):
    """
    Samples all attempts at some problems.

    Attributes:
        name (`str`):
            The model, for the results.
        backend (`str`):
            Key of `BACKENDS`.
    """

    name: str
    backend: str

    @abstractmethod
    def length(self, prompt: str | list[dict]) -> int:
        """How long a prompt is, in some unit: batches are made of prompts of like length."""

    @abstractmethod
    def sample(
        self, prompts: list, instructions: list[str], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        """
        Sample rollouts.

        Args:
            prompts (`list`):
                `B` prompts, chat messages or text.
            instructions (`list[str]`):
                The user's turns between the attempts, the same for all prompts: one attempt more is sampled than there are.
            decoding ([`Decoding`]):
                How.
            seed (`int`):
                The same seed, prompts and machine give the same attempts.
            given (`int`, *optional*, defaults to `0`):
                Attempts that the prompts already hold.

        Returns:
            `list[list[Attempt]]`: `B` rows of `len(instructions) + 1` attempts.
        """


class TokenSampler(Sampler):
    """The rollout of training: tokens in, tokens out. Subclasses write [`TokenSampler.generate`]."""

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: set[int]

    def tokenize(self, prompt: str | list[dict]) -> list[int]:
        return tokenize_prompt(self.tokenizer, prompt)

    def length(self, prompt: str | list[dict]) -> int:
        return len(self.tokenize(prompt))

    @abstractmethod
    def generate(self, contexts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        """Sample one attempt for each context: its token ids, with the end-of-sequence token if it was sampled."""

    def sample(
        self, prompts: list, instructions: list[str], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        bridge = Bridge(self.tokenizer, end_token_ids=self.eos_token_ids)

        def between(attempt, attempt_ids):
            return bridge(prompts, [instructions[attempt - 1]] * len(prompts), attempt, attempt_ids)

        def generate(contexts, attempt):
            return self.generate(contexts, decoding, seed + attempt + given), None

        number = len(instructions) + 1
        rollouts = roll_out([self.tokenize(prompt) for prompt in prompts], generate, between, number)
        texts = [decode_attempts(self.tokenizer, prompts, rollouts, k + 1) for k in range(number)]
        return [
            [
                Attempt(text_of(text[i]), len(ids), not ids or ids[-1] not in self.eos_token_ids, list(ids))
                for text, ids in zip(texts, rollouts.attempts[i], strict=True)
            ]
            for i in range(len(prompts))
        ]


class TransformersSampler(TokenSampler):
    """
    `generate` of transformers.

    Args:
        model (`str` or `PreTrainedModel`):
            A model, or the Hub id or folder of one; a folder with an adapter is loaded on top of its base model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer; by default, the one saved with it.
        reuse_cache (`bool`, *optional*, defaults to `True`):
            Go on from the key-value cache of the attempt before, where the model allows it.
        **kwargs:
            For `from_pretrained`: `dtype`, `revision`, `quantization_config`, `device_map`, ..
    """

    backend = "transformers"

    def __init__(self, model, tokenizer: PreTrainedTokenizerBase | None = None, reuse_cache: bool = True, **kwargs):
        self.name = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            kwargs.setdefault("device_map", self._device_map())
            revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model, **revision)
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
        self.model: PreTrainedModel = model
        self.tokenizer = tokenizer
        self.reuse_cache = reuse_cache and can_reuse_cache(model)
        eos = model.generation_config.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.eos_token_ids = {tokenizer.eos_token_id, *eos}
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @staticmethod
    def _device_map() -> str | dict | None:
        """All GPUs for one process; of several processes each has its own."""
        if not torch.cuda.is_available():
            return None
        state = PartialState()
        return "auto" if state.num_processes == 1 else {"": state.local_process_index}

    def sample(
        self, prompts: list, instructions: list[str], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        with reused_cache(self.model) if self.reuse_cache else nullcontext():
            return super().sample(prompts, instructions, decoding, seed, given)

    def generate(self, contexts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        longest = max(map(len, contexts))
        pad = [[self.pad_token_id] * (longest - len(ids)) for ids in contexts]  # on the left
        device = self.model.device
        input_ids = torch.tensor(
            [left + ids for left, ids in zip(pad, contexts, strict=True)], device=device
        )  # (B, T)
        mask = torch.tensor([[0] * len(left) + [1] * (longest - len(left)) for left in pad], device=device)
        how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if decoding.temperature > 0:
            how = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
        set_seed(seed)
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=mask,
                    max_new_tokens=decoding.max_completion_length,
                    eos_token_id=list(self.eos_token_ids),
                    pad_token_id=self.pad_token_id,
                    **how,
                )
        finally:
            self.model.train(training)
        return [self._until_end(ids) for ids in output[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids) - 1)
        return ids[: end + 1]


class VLLMSampler(TokenSampler):
    """
    vLLM in this process.

    Args:
        model (`str`):
            Hub id or folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Its tokenizer.
        **kwargs:
            For `vllm.LLM`: `dtype`, `revision`, `tensor_parallel_size`, `gpu_memory_utilization`, ..
    """

    backend = "vllm"

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase | None = None, **kwargs):
        self.name = model
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError("`backend='vllm'` needs vLLM: pip install 'trl-score[vllm]'.") from error
        self.sampling_params, self.llm = SamplingParams, LLM(model=model, **kwargs)
        self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
        self.eos_token_ids = {self.tokenizer.eos_token_id}

    def generate(self, contexts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        params = [
            self.sampling_params(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_completion_length,
                seed=seed * 1_000_003 + i,
            )
            for i in range(len(contexts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in contexts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


class EndpointSampler(Sampler):
    """
    An OpenAI-compatible chat endpoint, by `huggingface_hub.InferenceClient`: the endpoint applies the chat template, so
    attempts go back to it as text. For a model of one's own, the token-exact samplers are closer to training.

    Args:
        model (`str`):
            The model's name at the endpoint.
        base_url (`str`, *optional*):
            The endpoint; by default, the Hub's inference providers.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests at a time.
        **kwargs:
            For `InferenceClient`: `api_key`, `provider`, `timeout`, ..
    """

    backend = "endpoint"

    def __init__(self, model: str, base_url: str | None = None, max_concurrency: int = 16, **kwargs):
        self.name, self.max_concurrency = model, max_concurrency
        self.client = InferenceClient(base_url=base_url, **kwargs) if base_url else InferenceClient(model, **kwargs)

    def length(self, prompt: str | list[dict]) -> int:
        return len(str(prompt))

    def sample(
        self, prompts: list, instructions: list[str], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        def one(i: int) -> list[Attempt]:
            prompt = prompts[i]
            messages = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            attempts = []
            for instruction in [*instructions, None]:  # nothing is asked after the last
                answer = self.client.chat_completion(
                    messages,
                    model=self.name,
                    max_tokens=decoding.max_completion_length,
                    temperature=decoding.temperature,
                    top_p=decoding.top_p,
                    seed=seed * 1_000_003 + i,
                )
                choice = answer.choices[0]
                text = choice.message.content or ""
                usage = getattr(answer, "usage", None)
                attempts.append(
                    Attempt(text, getattr(usage, "completion_tokens", None), choice.finish_reason == "length")
                )
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": instruction}]
            return attempts

        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(one, range(len(prompts))))


BACKENDS = {"transformers": TransformersSampler, "vllm": VLLMSampler, "endpoint": EndpointSampler}


def name_of(model) -> str:
    """What results call a model, its name or a sampler."""
    return (
        model if isinstance(model, str) else model.name if isinstance(model, Sampler) else model.config._name_or_path
    )


def as_sampler(
    model, backend: str = "transformers", tokenizer: PreTrainedTokenizerBase | None = None, **kwargs
) -> Sampler:
    """The sampler that `model` is, or the one of a model or of a name."""
    if isinstance(model, Sampler):
        return model
    if not isinstance(model, str):
        return TransformersSampler(model, tokenizer)
    return BACKENDS[backend](model, **({} if tokenizer is None else {"tokenizer": tokenizer}), **kwargs)
