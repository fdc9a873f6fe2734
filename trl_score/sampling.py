"""Where the attempts of an evaluation come from: transformers, vLLM, or a chat endpoint (`endpoint.py`)."""

import os
import platform
import warnings
from abc import abstractmethod
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import fingerprints
from .checks import warn_of_emulated_bfloat16
from .context import ContextCheck, ContextTooShort, context_limit
from .decoding import (
    Decoding,
    end_token_ids,
    keep_random_state,
    load_generation_config,
    neutral_generation,
    with_end_token,
)
from .endpoint import EndpointSampler, address, endpoint_identity
from .fingerprints import hub_arguments
from .generation import AllAttempts, can_generate_all, contiguous_head
from .records import processes
from .rollout import (
    Bridge,
    Rollouts,
    check_chat_template_kwargs,
    decode_attempts,
    load_rollout_settings,
    roll_out,
    tokenize_prompt,
)
from .sampler import Attempt, Sampler, for_each_prompt
from .tasks.base import first_line, text_of


class TokenSampler(Sampler):
    """
    A sampler with the rollout of training: tokens in, tokens out. Subclasses set the attributes and define
    [`TokenSampler.generate`].

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`):
            The model's tokenizer.
        eos_token_ids (`set[int]`):
            The tokens that end an attempt.
        chat_template_kwargs (`dict`):
            Further arguments of the chat template.
        context_limit (`int`, *optional*):
            Number of tokens that the model can read. If rollouts can become longer, there is a warning. `None` if it is not known.
    """

    tokenizer: PreTrainedTokenizerBase
    eos_token_ids: set[int]
    chat_template_kwargs: dict
    context_limit: int | None = None
    _warned_of_context = False

    def _set_tokenizer(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict, generation: GenerationConfig | None
    ) -> None:
        self.tokenizer = with_end_token(tokenizer, generation, self.name)
        self.eos_token_ids = set(end_token_ids(self.tokenizer, generation))
        self.chat_template_kwargs = chat_template_kwargs

    def identity(self) -> dict:
        return {
            "tokenizer": fingerprints.of_tokenizer(self.tokenizer),
            "chat_template_kwargs": self.chat_template_kwargs,
        }

    @property
    def bridge(self) -> Bridge:
        """What the chat template puts between two attempts."""
        return Bridge(self.tokenizer, self.chat_template_kwargs, end_token_ids=self.eos_token_ids)

    def tokenize(self, prompt: str | list[dict]) -> list[int]:
        return tokenize_prompt(self.tokenizer, prompt, self.chat_template_kwargs)

    def length(self, prompt: str | list[dict]) -> int:
        return len(self.tokenize(prompt))

    @abstractmethod
    def generate(self, contexts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        """Sample one attempt for each context: its token ids, with the end-of-sequence token if it was sampled."""

    def roll_out(
        self,
        prompt_ids: list[list[int]],
        bridge: Callable[[int, int, list[int]], list[int]],
        num_attempts: int,
        decoding: Decoding,
        seed: int,
    ) -> Rollouts:
        """
        Sample all attempts at some problems, one attempt after the other.

        Args:
            prompt_ids (`list[list[int]]`):
                Token ids of the `B` prompts.
            bridge (`Callable[[int, int, list[int]], list[int]]`):
                `bridge(attempt, row, attempt_ids)` returns the tokens between attempt `attempt` (from 1) of row `row` (from 0) and the
                next attempt. `attempt_ids` are the tokens of this attempt.
            num_attempts (`int`):
                Number of attempts in a rollout.
            decoding ([`Decoding`]):
                Temperature, `top_p` and maximum length of an attempt.
            seed (`int`):
                Seed of the first attempt. Each later attempt has the next number as its seed.
        """
        return roll_out(
            prompt_ids,
            lambda contexts, k: (self.generate(contexts, decoding, seed + k - 1), None),
            lambda k, attempt_ids: [bridge(k, row, ids) for row, ids in enumerate(attempt_ids)],
            num_attempts,
        )

    def sample(
        self, prompts: list, instructions: list[str | list[str]], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        number, template = len(instructions) + 1, self.bridge
        prompt_ids = [self.tokenize(prompt) for prompt in prompts]
        bridge = template.by_row(prompts, lambda attempt: for_each_prompt(instructions[attempt - 1], len(prompts)))
        if not self._warned_of_context:
            try:
                context = ContextCheck(self.context_limit, decoding.max_completion_length, template)
                context.check_batch(prompt_ids, bridge, number, [None] * len(prompts))
            except ContextTooShort as error:
                self._warned_of_context = True
                warnings.warn(f"{error} Tokens beyond the context are sampled nevertheless.", stacklevel=2)
        rollouts = self.roll_out(prompt_ids, bridge, number, decoding, seed + 1 + given)
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
    A sampler that calls `generate` of transformers.

    Args:
        model (`str` or `PreTrainedModel`):
            A model object, or the Hub id or folder of a model. An adapter is loaded on top of its base model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. By default, it is the tokenizer that is saved with the model.
        reuse_cache (`bool`, *optional*, defaults to `True`):
            Whether to generate all attempts in one call, in which no token is read twice, if the model allows it. With False there is
            a call for each attempt, which reads its whole context.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template. By default, the arguments that the model was trained with.
        **kwargs:
            Arguments of `from_pretrained`: `dtype`, `revision`, `trust_remote_code`, `attn_implementation`, `quantization_config`, ..
    """

    backend = "transformers"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reuse_cache: bool = True,
        chat_template_kwargs: dict | None = None,
        **kwargs,
    ):
        if isinstance(model, str):
            self.name = model
            check_dtype(kwargs)
            tokenizer, chat_template_kwargs = load_rendering(model, tokenizer, chat_template_kwargs, **kwargs)
            kwargs.setdefault("device_map", self._device_map())
            if (base := fingerprints.base_of_adapter(model, **hub_arguments(kwargs))) is not None:
                # transformers takes one revision for both, and does not read the one that the adapter names.
                kwargs["adapter_kwargs"] = {"revision": kwargs.get("revision")}
                kwargs["revision"] = base[1].get("revision")
            try:
                model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
            except SafetensorError as error:
                raise OSError(
                    f"The weights of the model '{model}' are damaged: {error}. Copy or download them again."
                ) from error
            warn_of_emulated_bfloat16(model)
        else:
            self.name = model.config._name_or_path
            if kwargs.keys() - {"trust_remote_code", "token"}:
                raise ValueError(
                    f"`{sorted(kwargs)[0]}` is for a model that is loaded by its name, but `model` is a model already. Leave it out, "
                    "or load the model with it."
                )
            commit = getattr(model.config, "_commit_hash", None)
            revision = {} if commit is None else {"revision": commit}
            tokenizer, chat_template_kwargs = load_rendering(
                self.name, tokenizer, chat_template_kwargs, **revision, **kwargs
            )
        self.model, self.context_limit = model, context_limit(model.config)
        self._set_tokenizer(tokenizer, chat_template_kwargs, model.generation_config)
        tokenizer = self.tokenizer
        self.reuse_cache = reuse_cache
        self.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @staticmethod
    def _device_map() -> str | dict | None:
        """All GPUs for one process; of several processes each has its own."""
        if not torch.cuda.is_available():
            return None
        state = processes()
        return "auto" if state.num_processes == 1 else {"": state.local_process_index}

    def identity(self) -> dict:
        return {
            **super().identity(),
            "weights": fingerprints.of_model(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "quantization": _plain(getattr(self.model.config, "quantization_config", None)),
        }

    def roll_out(
        self,
        prompt_ids: list[list[int]],
        bridge: Callable[[int, int, list[int]], list[int]],
        num_attempts: int,
        decoding: Decoding,
        seed: int,
    ) -> Rollouts:
        """Sample all attempts at some problems: in one `generate` with one seed, if the model allows it."""
        config = decoding.generation_config(sorted(self.eos_token_ids), self.pad_token_id)
        overridden = type(self).generate is not TransformersSampler.generate  # it may sample in another way
        if overridden or not (self.reuse_cache and can_generate_all(self.model, config)):
            return super().roll_out(prompt_ids, bridge, num_attempts, decoding, seed)
        attempts = AllAttempts(prompt_ids, bridge, self.eos_token_ids, num_attempts)
        self._generate(attempts.contexts, decoding, seed, custom_generate=attempts)
        return attempts.rollouts

    def generate(self, contexts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        longest = max(map(len, contexts))
        output = self._generate(contexts, decoding, seed)
        return [self._until_end(ids) for ids in output[:, longest:].tolist()]

    def _generate(self, contexts: list[list[int]], decoding: Decoding, seed: int, **kwargs) -> torch.Tensor:
        """The contexts, padded on the left, and what is generated after them: (B, T)."""
        longest = max(map(len, contexts))
        pad = [[self.pad_token_id] * (longest - len(ids)) for ids in contexts]  # on the left
        device = self.model.device
        input_ids = torch.tensor(
            [left + ids for left, ids in zip(pad, contexts, strict=True)], device=device
        )  # (B, T)
        mask = torch.tensor([[0] * len(left) + [1] * (longest - len(left)) for left in pad], device=device)
        training = self.model.training
        self.model.eval()
        try:
            with (
                keep_random_state(),
                neutral_generation(self.model),
                contiguous_head(self.model),
                torch.inference_mode(),
            ):
                torch.manual_seed(seed)
                return self.model.generate(
                    input_ids=input_ids,
                    attention_mask=mask,
                    generation_config=decoding.generation_config(sorted(self.eos_token_ids), self.pad_token_id),
                    **kwargs,
                )
        finally:
            self.model.train(training)

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), len(ids) - 1)
        return ids[: end + 1]


class VLLMSampler(TokenSampler):
    """
    A sampler that runs vLLM in this process. From the checkpoint's `generation_config.json` only the end tokens are used.

    Args:
        model (`str`):
            Hub id or folder.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The tokenizer. By default, it is the tokenizer that is saved with the model.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template. By default, the arguments that the model was trained with.
        **kwargs:
            Arguments of `vllm.LLM`: `dtype`, `revision`, `trust_remote_code`, `tensor_parallel_size`, `gpu_memory_utilization`, ..
    """

    backend = "vllm"

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template_kwargs: dict | None = None,
        **kwargs,
    ):
        self.name, self.kwargs = model, kwargs
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise ImportError("`backend='vllm'` needs vLLM: pip install 'trl-score[vllm]'.") from error
        check_dtype(kwargs)
        if processes().num_processes > 1:
            from .checks import check_devices  # here, so that an evaluation does without TRL's trainers

            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")  # an engine starts on the first of them
            check_devices(gather_object([f"{platform.node()}, GPU {visible[0]}"]))
        rendering = load_rendering(model, tokenizer, chat_template_kwargs, **kwargs)
        self._set_tokenizer(*rendering, load_generation_config(model, **kwargs))
        self.sampling_params, self.llm = SamplingParams, LLM(model=model, **kwargs)

    def identity(self) -> dict:
        return super().identity() | checkpoint_identity(self.name, **self.kwargs)

    def generate(self, contexts: list[list[int]], decoding: Decoding, seed: int) -> list[list[int]]:
        params = [
            self.sampling_params(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                max_tokens=decoding.max_completion_length,
                stop_token_ids=sorted(self.eos_token_ids),
                seed=seed * 1_000_003 + i,
            )
            for i in range(len(contexts))
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in contexts], params, use_tqdm=False)
        attempts = [output.outputs[0] for output in outputs]
        # vLLM may know end tokens that the checkpoint's files do not name.
        self.eos_token_ids |= {
            each.token_ids[-1]
            for each in attempts
            if getattr(each, "finish_reason", None) == "stop" and each.token_ids
        }
        return [list(attempt.token_ids) for attempt in attempts]


BACKENDS = {"transformers": TransformersSampler, "vllm": VLLMSampler, "endpoint": EndpointSampler}


def open_model(
    model,
    backend: str = "transformers",
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template_kwargs: dict | None = None,
    **kwargs,
) -> tuple[dict, Callable[[], Sampler]]:
    """
    What attempts of a model belong to, for the results, and a function that loads the model once it is needed. A name is told
    from others by its files, a model in memory by its weights.

    Args:
        model (`str`, `PreTrainedModel` or [`Sampler`]):
            See [`~trl_score.evaluation.evaluate_self_correction`].

    Raises:
        `OSError`: If there is no model of that name.
        `ValueError`: If an argument has no meaning with this kind of model.
    """
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}. Expected one of: {sorted(BACKENDS)}.")
    if not isinstance(model, str):
        given = {"tokenizer": tokenizer, "chat_template_kwargs": chat_template_kwargs} | kwargs
        given = {name: value for name, value in given.items() if value is not None}
        if isinstance(model, Sampler) and given:
            raise ValueError(
                f"`{min(given)}` is for a model, but `model` is a sampler, which has its own. Give it to the sampler."
            )
        sampler = model if isinstance(model, Sampler) else TransformersSampler(model, **given)
        shared = {"model": sampler.name, "backend": sampler.backend, "decoding": sampler.decoding}
        return shared | sampler.identity(), lambda: sampler
    kind = BACKENDS[backend]
    shared = {"model": model, "backend": backend, "decoding": kind.decoding}
    if kind is EndpointSampler:
        if tokenizer is not None:
            raise ValueError("An endpoint has its own tokenizer. Leave `tokenizer` out.")
        where, body = address(**kwargs), kwargs.get("extra_body") or {}
        shared |= endpoint_identity(where, chat_template_kwargs or {}, body)
        kwargs["chat_template_kwargs"] = chat_template_kwargs
    else:
        check_dtype(kwargs)
        check_model_folder(model)
        try:
            shared |= checkpoint_identity(model, **kwargs)
            tokenizer, chat_template_kwargs = load_rendering(model, tokenizer, chat_template_kwargs, **kwargs)
        except OSError as error:
            raise OSError(
                f"The model '{model}' is not available: {first_line(error)} Give a folder or a Hub id."
            ) from error
        tokenizer = with_end_token(tokenizer, load_generation_config(model, **kwargs), model)
        shared |= {
            "tokenizer": fingerprints.of_tokenizer(tokenizer),
            "chat_template_kwargs": chat_template_kwargs,
        }
        kwargs |= {"tokenizer": tokenizer, "chat_template_kwargs": chat_template_kwargs}
    return shared, cache(partial(kind, model, **kwargs))


def load_rendering(
    name: str, tokenizer: PreTrainedTokenizerBase | None, chat_template_kwargs: dict | None, **kwargs
) -> tuple[PreTrainedTokenizerBase, dict]:
    """A model's tokenizer, and the arguments of its chat template: the given ones, else those that belong to the model."""
    where = hub_arguments(kwargs)
    if chat_template_kwargs is None:
        chat_template_kwargs = load_rollout_settings(name, **where).get("chat_template_kwargs", {})
    check_chat_template_kwargs(chat_template_kwargs)
    if tokenizer is None:
        code = {"trust_remote_code": True} if kwargs.get("trust_remote_code") else {}
        tokenizer = AutoTokenizer.from_pretrained(name, **where, **code)
    return tokenizer, dict(chat_template_kwargs)


def checkpoint_identity(name: str, **kwargs) -> dict:
    """Of a model that is not loaded: `weights`, `dtype` and `quantization`, for the results."""
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or "auto"
    return {
        "weights": fingerprints.of_checkpoint(name, **kwargs),
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": _plain(kwargs.get("quantization_config") or kwargs.get("quantization")),
    }


def _plain(quantization) -> dict | str | None:
    """A configuration as the results file has it."""
    return quantization.to_dict() if hasattr(quantization, "to_dict") else quantization


def check_model_folder(model: str) -> None:
    """
    Raises:
        `OSError`: If it is a folder without a model, or a path that does not exist.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
            return
        found = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        more = (
            f", but checkpoints. Give one of them, such as '{found[-1]}'."
            if found
            else ". Give the folder of a model or a Hub id."
        )
        raise OSError(f"The model '{model}' is not available: the folder has no config.json{more}")
    if model.startswith(("/", "./", "../", "~")):
        raise OSError(f"The model '{model}' is not available: there is no such folder. Give a folder or a Hub id.")


def check_dtype(kwargs: dict) -> None:
    """
    Raises:
        `ValueError`: If `dtype` is no type of weights.
    """
    dtype = kwargs.get("dtype")
    if not isinstance(dtype, str) or dtype == "auto":
        return
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"`dtype={dtype!r}` is no type of weights. Set it to 'bfloat16', 'float16', 'float32' or 'auto'."
        )
