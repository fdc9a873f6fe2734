"""Attempts of a model behind a chat endpoint."""

import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from huggingface_hub import InferenceClient

from .decoding import Decoding
from .sampler import Attempt, Sampler, for_each_prompt
from .tasks.base import first_line


BUSY = {429, 502, 503, 504}  # status codes of a server that has too much to do
WAITS = (1, 2, 4, 8, 16)  # seconds before it is asked again, where it does not say how long
LONGEST_WAIT = 60
MOST_SAID = 500  # characters of what a server says in an error
# Fields of a request that the sampler sets itself.
OWN = ("messages", "model", "temperature", "top_p", "max_tokens", "seed", "n", "stream")


class EndpointSampler(Sampler):
    """
    A sampler that calls an OpenAI-compatible chat endpoint through `huggingface_hub.InferenceClient`. The endpoint applies the chat
    template, so attempts go back to it as text. For a model that you can load, the samplers that work with tokens are closer to
    training.

    A request sets `temperature`, `top_p` and `frequency_penalty=0`. All other options (`top_k`, `min_p`, `repetition_penalty`) have
    the server's defaults, because they have no standard names, and some servers refuse unknown names. Use `extra_body` to set them,
    such as `{"top_k": -1, "min_p": 0, "repetition_penalty": 1}` for a vLLM server.

    Args:
        model (`str`):
            The model's name at the endpoint.
        base_url (`str`, *optional*):
            Address of the endpoint. By default, the Hub's inference providers are used.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Number of requests at a time.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template. They are sent with each request, for servers that support them (vLLM, SGLang,
            `transformers serve`).
        extra_body (`dict`, *optional*):
            Further fields of each request. Fields that the sampler sets itself, such as `temperature`, are refused.
        **kwargs:
            Arguments of `InferenceClient`: `api_key`, `provider`, `timeout`, ..

    Raises:
        `ValueError`: If `base_url` is no address, or `extra_body` has a field of the sampler.
    """

    backend = "endpoint"
    decoding = "what the server adds"

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        max_concurrency: int = 16,
        chat_template_kwargs: dict | None = None,
        extra_body: dict | None = None,
        **kwargs,
    ):
        self.name, self.max_concurrency = model, max_concurrency
        self.chat_template_kwargs, self.extra_body = chat_template_kwargs or {}, extra_body or {}
        self.where = address(base_url, **kwargs)
        self._identity = endpoint_identity(self.where, self.chat_template_kwargs, self.extra_body)
        self.client = InferenceClient(base_url=base_url, **kwargs) if base_url else InferenceClient(model, **kwargs)

    def identity(self) -> dict:
        return self._identity

    def length(self, prompt: str | list[dict]) -> int:
        return len(str(prompt))

    def sample(
        self, prompts: list, instructions: list[str | list[str]], decoding: Decoding, seed: int, given: int = 0
    ) -> list[list[Attempt]]:
        body = dict(self.extra_body)
        if self.chat_template_kwargs:
            body["chat_template_kwargs"] = self.chat_template_kwargs
        turns = [for_each_prompt(instruction, len(prompts)) for instruction in instructions]

        def one(i: int) -> list[Attempt]:
            prompt = prompts[i]
            messages = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            attempts = []
            for instruction in [*(turn[i] for turn in turns), None]:  # nothing is asked after the last
                answer = self._ask(
                    messages,
                    model=self.name,
                    max_tokens=decoding.max_completion_length,
                    temperature=decoding.temperature,
                    top_p=decoding.top_p,
                    frequency_penalty=0.0,
                    seed=(seed * 1_000_003 + i) % 2**31,
                    **({"extra_body": body} if body else {}),
                )
                choice, usage = answer.choices[0], getattr(answer, "usage", None)
                text = _whole(choice.message.content or "")
                attempts.append(
                    Attempt(text, getattr(usage, "completion_tokens", None), choice.finish_reason == "length")
                )
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": instruction}]
            return attempts

        with ThreadPoolExecutor(self.max_concurrency) as pool:
            return list(pool.map(one, range(len(prompts))))

    def _ask(self, messages: list[dict], **kwargs):
        """An answer with a text. A server that has too much to do is asked again."""
        for wait in (*WAITS, None):
            try:
                answer = self.client.chat_completion(messages, **kwargs)
                break
            # Of the Hub's client or of the library below it, which is another one in other versions.
            except Exception as error:
                response = getattr(error, "response", None)
                is_busy = getattr(response, "status_code", None) in BUSY
                if not is_busy or wait is None:
                    raise self._error(error, is_busy) from error
                after = response.headers.get("Retry-After", "")
            time.sleep(min(int(after), LONGEST_WAIT) if after.isdecimal() else wait)
        choice = next(iter(answer.choices or ()), None)
        if choice is None or choice.message is None or not isinstance(choice.message.content, str | None):
            found = str(getattr(answer, "error", None) or "an answer without text")[:200]
            raise OSError(
                f"The endpoint ({self.where}) gave no attempt for the model '{self.name}', but {found}. Check its log and the request "
                "(`extra_body`)."
            )
        return answer

    def _error(self, error: Exception, is_busy: bool) -> OSError:
        what = first_line(error).rstrip(".:")
        said = " ".join(getattr(getattr(error, "response", None), "text", "").split())[:MOST_SAID]
        if said and not said.startswith("<"):  # a page of HTML says less
            what += f", and said: {said}"
        remedy = (
            f"It has too much to do: set `batch_size` lower, for fewer requests at a time (now {self.max_concurrency} at most)."
            if is_busy
            else "Check that it runs, that its address is right (`base_url`, which often ends with /v1), and that it serves this model."
        )
        return OSError(f"The endpoint ({self.where}) did not answer for the model '{self.name}': {what}. {remedy}")


def _whole(text: str) -> str:
    """A text that can be written to a file: half a character, where a server cut one, becomes the sign for it, as in other samplers."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def address(base_url: str | None = None, **kwargs) -> str:
    """
    Where requests go to, without a password that the address may hold.

    Raises:
        `ValueError`: If it is no address.
    """
    if base_url is None:
        return f"inference provider {kwargs.get('provider') or 'auto'}"
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(
            f"`base_url={base_url!r}` is no address. Give one with http:// or https://, such as http://127.0.0.1:8000/v1."
        )
    return urlsplit(base_url)._replace(netloc=urlsplit(base_url).netloc.rpartition("@")[2]).geturl().rstrip("/")


def endpoint_identity(where: str, chat_template_kwargs: dict, extra_body: dict) -> dict:
    """
    What the attempts of an endpoint come from, for the results.

    Raises:
        `ValueError`: If `extra_body` would change a field that the results say otherwise.
    """
    if taken := [name for name in OWN if name in extra_body]:
        raise ValueError(
            f"`extra_body` has `{taken[0]}`, which each request sets itself, so the results would not say how the attempts were sampled. "
            "Leave it out; `temperature`, `top_p`, `max_completion_length` and `num_samples` are arguments of their own."
        )
    return {"weights": where, "chat_template_kwargs": chat_template_kwargs, "extra_body": extra_body}
