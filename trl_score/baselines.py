"""
The baselines that fine-tune on self-generated attempts (Section 4): STaR on rollouts that turned wrong into right (Zelikman et
al., 2022; iterated as by Singh et al., 2024), Pair-SFT on wrong and right attempts that are paired afterwards (Welleck et al.,
2023). Both make a [`~datasets.Dataset`] of traces, which TRL's `SFTTrainer` trains on.

A trace is a problem's prompt, its attempts in tokens, and which of them to learn. The others are context.
"""

import gc
import json
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from .collection import collect
from .evaluation import evaluate_self_correction, table
from .fingerprints import fingerprint, of_rows
from .records import differences, disconnect, processes, strict_json
from .rollout import Bridge, Rollouts, save_rollout_settings, tokenize_prompt
from .sampling import as_dict, checkpoint_identity, load_rendering
from .tasks import TASKS, Arithmetic, Task
from .tasks.arithmetic import BASE_MODEL_PATH
from .tasks.base import first
from .training import TaskArguments, init_kwargs, load_tasks


RESULT = "baseline.json"
SAMPLES_OF_ROLLOUT = {"star": 2, "pair_sft": 1}  # attempts that are sampled for one rollout
ITERATIONS = {"star": 3, "pair_sft": 1}


def trace(row: dict, kind: str, attempts: list[list[int]], learn: list[bool]) -> dict:
    return {"index": row["index"], "kind": kind, "prompt": row["prompt"], "attempts": attempts, "learn": learn}


def by_problem(rollouts: list[dict]) -> list[list[dict]]:
    """The rollouts of each problem whose attempts could all be graded."""
    problems = defaultdict(list)
    for row in rollouts:
        if None in row["token_ids"]:
            raise ValueError(
                "The rollouts have no tokens, as a chat endpoint does not give them. Collect them with the backend "
                "'transformers' or 'vllm'."
            )
        if None not in row["correct"]:
            problems[row["index"]].append(row)
    return [problems[index] for index in sorted(problems)]


def star_traces(
    rollouts: list[dict], *, plus: bool = False, learn: str = "right", max_per_problem: int | None = None
) -> Dataset:
    r"""
    The traces of STaR: rollouts whose first attempt is wrong and whose second is right ($D$), and with `plus` those with
    two right attempts too ($D^+$).

    Args:
        rollouts (`list[dict]`):
            Rollouts of two attempts, of [`~trl_score.collection.collect`].
        plus (`bool`, *optional*, defaults to `False`):
            Whether to keep c→c rollouts beside i→c ones.
        learn (`str`, *optional*, defaults to `"right"`):
            `"right"`: every right attempt is learnt, and a wrong one is context only. `"last"`: only the second attempt.
        max_per_problem (`int`, *optional*):
            Traces of each kind to keep for a problem at most, the first ones.

    Returns:
        [`~datasets.Dataset`] with the columns `index` (of the problem), `kind` (`"i_to_c"` or `"c_to_c"`), `prompt`,
        `attempts` (token ids of each), `learn` (whether to learn each).

    Raises:
        `ValueError`: If no rollout can be kept.
    """
    traces = []
    for rows in by_problem(rollouts):
        kinds = {"i_to_c": [False, True]} | ({"c_to_c": [True, True]} if plus else {})
        for kind, verdicts in kinds.items():
            kept = [row for row in rows if row["correct"] == verdicts][:max_per_problem]
            traces += [trace(row, kind, row["token_ids"], learnt(verdicts, learn)) for row in kept]
    return as_dataset(traces, len(rollouts), "turned a wrong attempt into a right one")


def pair_traces(
    rollouts: list[dict],
    *,
    plus: bool = False,
    learn: str = "right",
    max_per_problem: int | None = None,
    seed: int = 42,
) -> Dataset:
    r"""
    The traces of Pair-SFT: a wrong and a right first attempt at the same problem, sampled independently and put one after the
    other ($D$), and with `plus` pairs of two right ones too ($D^+$). Attempts are paired at random; in the pairs of a kind
    each is used once.

    Args:
        rollouts (`list[dict]`):
            Rollouts of [`~trl_score.collection.collect`], of which the first attempts are used.
        plus, learn, max_per_problem:
            As for [`star_traces`].
        seed (`int`, *optional*, defaults to `42`):
            Seed of the pairing.

    Returns:
        [`~datasets.Dataset`], as of [`star_traces`].

    Raises:
        `ValueError`: If no problem has a wrong and a right attempt.
    """
    rng, traces = random.Random(seed), []
    for rows in by_problem(rollouts):
        wrong = [row["token_ids"][0] for row in rows if not row["correct"][0]]
        right = [row["token_ids"][0] for row in rows if row["correct"][0]]
        rng.shuffle(wrong)
        rng.shuffle(right)
        pairs = {"i_to_c": (list(zip(wrong, right, strict=False)), [False, True])}
        if plus:
            pairs["c_to_c"] = (list(zip(right[::2], right[1::2], strict=False)), [True, True])
        for kind, (found, verdicts) in pairs.items():
            traces += [trace(rows[0], kind, list(pair), learnt(verdicts, learn)) for pair in found[:max_per_problem]]
    return as_dataset(traces, len(rollouts), "was right where another one at the same problem was wrong")


def learnt(verdicts: list[bool], learn: str) -> list[bool]:
    if learn not in ("right", "last"):
        raise ValueError(f"Unknown `learn={learn!r}`. Expected 'right' (every right attempt) or 'last' (the second).")
    return [right and (learn == "right" or k == len(verdicts) - 1) for k, right in enumerate(verdicts)]


def as_dataset(traces: list[dict], number: int, what: str) -> Dataset:
    if not traces:
        raise ValueError(
            f"There is nothing to learn from: of {number} rollouts none {what}. Sample more (`num_samples`), at a higher "
            "temperature, or take easier problems."
        )
    return Dataset.from_list(traces)


def tokenized(
    traces: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    correction_instruction: str,
    chat_template_kwargs: dict | None = None,
) -> Dataset:
    """
    Traces as `SFTTrainer` takes them: the tokens of [`~trl_score.rollout`], with the loss on the attempts to learn alone.

    Args:
        traces ([`~datasets.Dataset`]):
            Traces from [`star_traces`] or [`pair_traces`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The one that the attempts were sampled with.
        correction_instruction (`str`):
            The user's turn between the attempts.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template, as for the sampling.

    Returns:
        [`~datasets.Dataset`] with the columns `input_ids` and `labels` (-100 where there is no loss).
    """
    bridge = Bridge(tokenizer, chat_template_kwargs)

    def convert(rows: dict) -> dict:
        prompts, attempts = rows["prompt"], rows["attempts"]
        between = []
        for k in range(1, len(attempts[0])):
            instructions = [correction_instruction] * len(prompts)
            between.append(bridge(prompts, instructions, k, [row[k - 1] for row in attempts]))
        rollouts = Rollouts(
            [tokenize_prompt(tokenizer, prompt, chat_template_kwargs) for prompt in prompts],
            attempts,
            [list(row) for row in zip(*between, strict=True)],
        )
        result = {"input_ids": [], "labels": []}
        for prompt, completion, owners, learn in zip(
            rollouts.prompt_ids, rollouts.completion_ids, rollouts.attempt_ids, rows["learn"], strict=True
        ):
            labels = [token if k and learn[k - 1] else -100 for token, k in zip(completion, owners, strict=True)]
            result["input_ids"].append(prompt + completion)
            result["labels"].append([-100] * len(prompt) + labels)
        return result

    return traces.map(convert, batched=True, remove_columns=traces.column_names)


@dataclass
class BaselineArguments(TaskArguments):
    """
    How the traces of a baseline are made.

    Args:
        method (`str`, *optional*, defaults to `"star"`):
            `"star"` or `"pair_sft"`.
        plus (`bool`, *optional*, defaults to `False`):
            $D^+$: learn from two right attempts too.
        num_samples (`int`, *optional*, defaults to `30`):
            Attempts sampled for each problem over all iterations, so that methods compare at equal samples: SCoRe's number is
            steps x rollouts per step x attempts / problems.
        num_iterations (`int`, *optional*):
            Rounds of sampling and fine-tuning, each from the base model; 3 of STaR, 1 of Pair-SFT by default.
        learn (`str`, *optional*, defaults to `"right"`):
            Attempts to learn: `"right"`, every right one; `"last"`, the second one only.
        max_per_problem (`int`, *optional*):
            Traces of each kind (i→c, c→c) to keep for a problem at most.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Tokens of one attempt.
        sampling_batch_size (`int`, *optional*, defaults to `32`):
            Rollouts sampled at a time.
        backend (`str`, *optional*, defaults to `"transformers"`):
            Where attempts come from: `"transformers"` or `"vllm"`.
        correction_instruction (`str`, *optional*):
            The user's turn between the attempts, if not the task's.
        chat_template_kwargs (`dict`, *optional*):
            Further arguments of the chat template; by default, those the base model was trained with.
    """

    method: str = field(
        default="star", metadata={"help": "Baseline: star or pair_sft.", "choices": ["star", "pair_sft"]}
    )
    plus: bool = field(default=False, metadata={"help": "D+: learn from two right attempts too."})
    num_samples: int = field(
        default=30, metadata={"help": "Attempts sampled for each problem over all iterations, for equal budgets."}
    )
    num_iterations: int | None = field(
        default=None,
        metadata={"help": "Rounds of sampling and fine-tuning, each from the base model. star: 3, pair_sft: 1."},
    )
    learn: str = field(
        default="right",
        metadata={"help": "Attempts to learn: every right one, or the last only.", "choices": ["right", "last"]},
    )
    max_per_problem: int | None = field(
        default=None, metadata={"help": "Traces of each kind (i→c, c→c) to keep for a problem at most."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    max_completion_length: int = field(default=1024, metadata={"help": "Tokens of one attempt."})
    sampling_batch_size: int = field(default=32, metadata={"help": "Rollouts sampled at a time."})
    backend: str = field(
        default="transformers",
        metadata={"help": "Where attempts come from.", "choices": ["transformers", "vllm"]},
    )
    correction_instruction: str | None = field(
        default=None, metadata={"help": "The user's turn between the attempts, if not the task's."}
    )
    chat_template_kwargs: str | dict | None = field(
        default=None, metadata={"help": "Further arguments of the chat template as JSON."}
    )

    def __post_init__(self):
        self.chat_template_kwargs = as_dict(self.chat_template_kwargs, "chat_template_kwargs")
        if self.method not in ITERATIONS:
            raise ValueError(f"Unknown method {self.method!r}. Expected one of: {sorted(ITERATIONS)}.")
        self.num_iterations = ITERATIONS[self.method] if self.num_iterations is None else self.num_iterations
        needed = SAMPLES_OF_ROLLOUT[self.method] * self.num_iterations
        if self.num_iterations < 1 or self.num_samples < needed:
            raise ValueError(
                f"`num_samples={self.num_samples}` attempts per problem are too few for `num_iterations={self.num_iterations}` "
                f"of {self.method}. Set it to {max(needed, 1)} or more, and the iterations to 1 or more."
            )

    @property
    def rollouts_per_iteration(self) -> int:
        return self.num_samples // (SAMPLES_OF_ROLLOUT[self.method] * self.num_iterations)


def run_baseline(
    model_args: ModelConfig, task: Task, arguments: BaselineArguments, args: SFTConfig, held_out: Dataset | None = None
) -> dict:
    """
    Sample traces, fine-tune the base model on them, and again with the model that came out. What was done in the output folder
    before is kept: collected rollouts, checkpoints, finished iterations.

    Args:
        model_args (`~trl.ModelConfig`):
            The base model, its quantization and its adapter.
        task ([`~trl_score.tasks.Task`]):
            Its training split is sampled.
        arguments ([`BaselineArguments`]):
            The baseline.
        args (`~trl.SFTConfig`):
            Configuration of each fine-tuning. The last iteration's model is saved in `output_dir`, those before in `iteration-k`.
        held_out ([`~datasets.Dataset`], *optional*):
            Problems that must not be among those that are learnt from.

    Returns:
        `dict`: `settings`; `iterations`, for each the number of `rollouts`, of traces (`i_to_c`, `c_to_c`) and of optimizer
        `steps`, and its `seconds`; `attempts_sampled`, in all. Also written to `baseline.json`.

    Raises:
        `ValueError`: If nothing can be learnt, a trace does not fit `max_length`, a held-out problem was sampled, the settings
            cannot work together, or the output folder holds another baseline.
    """
    if arguments.backend == "vllm" and model_args.use_peft:
        raise ValueError(
            "`backend='vllm'` samples from whole models, and `use_peft=True` trains an adapter. Set `backend='transformers'`, or "
            "fine-tune the model itself."
        )
    output_dir, base = Path(args.output_dir), model_args.model_name_or_path
    how = loading(model_args, args, arguments.backend)
    tokenizer, rendering = load_rendering(base, None, arguments.chat_template_kwargs, **how)
    sft = ("learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed")
    settings = {
        "model": base,
        **checkpoint_identity(base, **how),
        "data": fingerprint(of_rows(first(task.load("train"), arguments.num_train_problems))),
        **asdict(replace(arguments, chat_template_kwargs=rendering)),
        **{name: getattr(args, name) for name in sft},
    }
    # Nothing that is trained depends on these.
    for name in ("eval_task", "num_eval_problems", "data_dir", "sampling_batch_size"):
        del settings[name]
    result = resume(output_dir / RESULT, settings)
    instruction = arguments.correction_instruction or task.correction_instruction
    options = {"plus": arguments.plus, "learn": arguments.learn, "max_per_problem": arguments.max_per_problem}
    for iteration in range(len(result["iterations"]) + 1, arguments.num_iterations + 1):
        start = time.time()
        rollouts = collect(
            base if iteration == 1 else str(output_dir / f"iteration-{iteration - 1}"),
            task,
            output_dir=output_dir / f"rollouts-{iteration}",
            num_attempts=SAMPLES_OF_ROLLOUT[arguments.method],
            num_samples=arguments.rollouts_per_iteration,
            temperature=arguments.temperature,
            max_completion_length=arguments.max_completion_length,
            correction_instruction=instruction,
            chat_template_kwargs=rendering,
            batch_size=arguments.sampling_batch_size,
            limit=arguments.num_train_problems,
            seed=args.seed + iteration,
            backend=arguments.backend,
            tokenizer=tokenizer,
            **how,
        )
        check_held_out(rollouts, held_out)
        if arguments.method == "star":
            traces = star_traces(rollouts, **options)
        else:
            traces = pair_traces(rollouts, **options, seed=args.seed)
        folder = output_dir if iteration == arguments.num_iterations else output_dir / f"iteration-{iteration}"
        dataset = tokenized(traces, tokenizer, instruction, rendering)
        entry = {
            "rollouts": len(rollouts),
            **{kind: traces["kind"].count(kind) for kind in ("i_to_c", "c_to_c")},
            "steps": fine_tune(base, dataset, replace(args, output_dir=str(folder)), model_args),
            "seconds": round(time.time() - start, 1),
        }
        if processes().is_main_process:
            save_rollout_settings(folder, chat_template_kwargs=rendering, correction_instruction=instruction)
        result["iterations"].append(entry)
        result["attempts_sampled"] += len(rollouts) * SAMPLES_OF_ROLLOUT[arguments.method]
        if processes().is_main_process:
            (output_dir / RESULT).write_text(strict_json(result), "utf-8")
    return result


def resume(file: Path, settings: dict) -> dict:
    """The result so far; none of another baseline."""
    if not file.exists():
        return {"settings": settings, "iterations": [], "attempts_sampled": 0}
    result = json.loads(file.read_text("utf-8"))
    if changes := differences(result["settings"], settings):
        raise ValueError(f"`output_dir={str(file.parent)!r}` holds another baseline: {changes}. Take another folder.")
    return result


def loading(model_args: ModelConfig, args: SFTConfig, backend: str) -> dict:
    """What models are loaded with for sampling. Of an adapter, the revision is its base model's; a folder has none."""
    quantization = get_quantization_config(model_args)
    found = {"dtype": model_args.dtype, "revision": model_args.model_revision, "quantization_config": quantization}
    found["trust_remote_code"] = args.trust_remote_code or None
    if backend == "transformers":
        found["attn_implementation"] = model_args.attn_implementation
    return {name: value for name, value in found.items() if value is not None}


def check_held_out(rollouts: list[dict], held_out: Dataset | None) -> None:
    """No problem that is evaluated on is learnt from."""
    seen = {json.dumps(prompt) for prompt in (() if held_out is None else held_out["prompt"])}
    if any(json.dumps(row["prompt"]) in seen for row in rollouts):
        raise ValueError("A problem of the test split is among those to learn from. Make the splits disjoint.")


def fine_tune(model: str, dataset: Dataset, args: SFTConfig, model_args: ModelConfig) -> int:
    """
    TRL's `SFTTrainer` on tokenized traces; resumes from the last checkpoint in the output folder, if there is one.

    Returns:
        `int`: optimizer steps.

    Raises:
        `ValueError`: If a trace is longer than `max_length`, as TRL would cut off its last attempt.
    """
    longest = max(map(len, dataset["input_ids"]))
    if args.max_length is not None and longest > args.max_length:
        raise ValueError(
            f"`max_length={args.max_length}` is too short for a trace of {longest} tokens, whose last attempt would be cut off. "
            "Set it higher, or to None."
        )
    args.model_init_kwargs = init_kwargs(args, model_args)
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    folder = Path(args.output_dir)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    trainer.save_model()
    trainer.save_state()
    steps = trainer.state.global_step
    trainer.accelerator.wait_for_everyone()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


def main() -> None:
    """A process of `trl-score baselines`."""
    parser = TrlParser((BaselineArguments, SFTConfig, ModelConfig))
    # Traces are as long as they are, and a process that has sampled its share waits for the others.
    parser.set_defaults(max_length=None, ddp_timeout=24 * 60 * 60)
    arguments, args, model_args = parser.parse_args_and_config()
    if arguments.task is None:
        sys.exit(f"Which problems? Give --task: {', '.join(TASKS)}.")
    if model_args.model_name_or_path is None:
        if arguments.task != Arithmetic.name:
            sys.exit("Which model? Give --model_name_or_path: a Hub id or a folder.")
        model_args.model_name_or_path = str(BASE_MODEL_PATH)
    task, eval_task = load_tasks(arguments)
    try:
        result = run_baseline(model_args, task, arguments, args, None if eval_task is None else eval_task.load("test"))
        evaluations = []
        for model, folder in ((model_args.model_name_or_path, "evaluation-base"), (args.output_dir, "evaluation")):
            if eval_task is not None:
                evaluations.append(
                    evaluate_self_correction(
                        model,
                        eval_task,
                        max_completion_length=arguments.max_completion_length,
                        correction_instruction=arguments.correction_instruction,
                        chat_template_kwargs=arguments.chat_template_kwargs,
                        batch_size=arguments.sampling_batch_size,
                        limit=arguments.num_eval_problems,
                        backend=arguments.backend,
                        output_dir=Path(args.output_dir) / folder,
                        **loading(model_args, args, arguments.backend),
                    )
                )
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(str(error))
    if processes().is_main_process:
        print(describe(result))
        if evaluations:
            print(table(evaluations))
    disconnect()


def describe(result: dict) -> str:
    settings = result["settings"]
    lines = [f"{settings['method']} D{'+' * settings['plus']}: {result['attempts_sampled']} attempts sampled"]
    for k, entry in enumerate(result["iterations"], start=1):
        lines.append(
            f"iteration {k}: {entry['rollouts']} rollouts, traces i→c {entry['i_to_c']}, c→c {entry['c_to_c']}; "
            f"{entry['steps']} optimizer steps"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
