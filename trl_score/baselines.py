"""
The baselines that fine-tune on self-generated attempts (Section 4): STaR on rollouts that turned wrong into right (Zelikman et
al., 2022; iterated as by Singh et al., 2024), Pair-SFT on wrong and right attempts that are paired afterwards (Welleck et al.,
2023). Both sample rollouts, make traces of them ([`~trl_score.traces`]), and fine-tune on those with TRL's `SFTTrainer`.
"""

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from .arguments import SAMPLES_OF_ROLLOUT, BaselineArguments
from .collection import collect
from .decoding import load_generation_config, with_end_token
from .evaluation import evaluate_self_correction, table
from .fingerprints import fingerprint, of_rows
from .parsing import Parser
from .records import check_folder, differences, disconnect, processes, read_json, strict_json, write_json
from .resuming import check_no_model, checkpoints, has_model, last_whole_checkpoint
from .rollout import save_rollout_settings
from .sampling import checkpoint_identity, load_rendering
from .score_config import check_bfloat16
from .tasks import Arithmetic, Task
from .tasks.arithmetic import BASE_MODEL_PATH
from .tasks.base import first
from .traces import pair_traces, star_traces, tokenized
from .training import in_one_line, init_kwargs, interruptible


RESULT = "baseline.json"
# Beginnings of the names of options that change no weight of the model that is trained. All others are compared.
WITHOUT_EFFECT = (
    *("activation_", "gradient_checkpointing", "dataloader_num_workers", "dataloader_p", "dataset_num_proc"),
    *("eval_", "per_device_eval_", "log", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "debug"),
    *("save_", "push_to_hub", "hub_", "output_dir", "model_name_or_path", "resume_from_checkpoint", "do_"),
    *("local_rank", "ddp_timeout"),
)


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
    tokenizer = with_end_token(tokenizer, load_generation_config(base, **how), base)  # as for the sampling
    training = training_options(args, model_args)
    settings = {
        **training,
        "model": base,
        **checkpoint_identity(base, **how),
        "data": fingerprint(of_rows(first(task.load("train"), arguments.num_train_problems))),
        **asdict(replace(arguments, chat_template_kwargs=rendering)),
    }
    # Nothing that is trained depends on these, or `data` tells.
    for name in (
        *("eval_task", "num_eval_problems", "data_dir", "sampling_batch_size"),
        *("dataset_train_split", "dataset_test_split"),
    ):
        del settings[name]
    result = resume(output_dir, json.loads(strict_json(settings)), set(training))
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
        last = iteration == arguments.num_iterations
        folder = output_dir if last else output_dir / f"iteration-{iteration}"
        sft_args = replace(args, output_dir=str(folder), push_to_hub=args.push_to_hub and last)
        dataset = tokenized(traces, tokenizer, instruction, rendering)
        save(output_dir, result)  # before the first checkpoint, whose settings it says
        if processes().is_main_process:  # goes to the Hub with the model
            folder.mkdir(parents=True, exist_ok=True)
            save_rollout_settings(folder, chat_template_kwargs=rendering, correction_instruction=instruction)
        entry = {
            "rollouts": len(rollouts),
            **{kind: traces["kind"].count(kind) for kind in ("i_to_c", "c_to_c")},
            "steps": fine_tune(base, dataset, sft_args, model_args),
            "seconds": round(time.time() - start, 1),
        }
        result["iterations"].append(entry)
        result["attempts_sampled"] += len(rollouts) * SAMPLES_OF_ROLLOUT[arguments.method]
        save(output_dir, result)
    return result


def training_options(args: SFTConfig, model_args: ModelConfig) -> dict:
    """The options of TRL that the weights of the fine-tuned model depend on, as JSON has them."""
    options = asdict(model_args) | args.to_dict() | {"eos_token": args.eos_token}  # `to_dict` hides all tokens
    options = {name: value for name, value in options.items() if not name.startswith(WITHOUT_EFFECT)}
    return json.loads(json.dumps(options, default=str))


def resume(output_dir: Path, settings: dict, training: set[str]) -> dict:
    """
    The result so far. The settings may change as long as nothing is trained, since rollouts are stored with their own. Of the
    options of `training`, a folder of an earlier version has only a few, and these are compared.

    Raises:
        `ValueError`: If the folder holds a baseline with other settings, checkpoints of unknown settings, or another run's model.
    """
    file, result = output_dir / RESULT, {"settings": settings, "iterations": [], "attempts_sampled": 0}
    folders = (output_dir, *output_dir.glob("iteration-*"))
    has_checkpoints = any(map(checkpoints, folders))
    if file.exists():
        before = read_json(file)
        if before["iterations"] or has_checkpoints or any(map(has_model, folders)):
            if changes := differences(before["settings"], settings, training - before["settings"].keys()):
                raise ValueError(
                    f"`output_dir={str(output_dir)!r}` holds another baseline: {changes}. Take another folder."
                )
            return before
    elif has_checkpoints:
        raise ValueError(
            f"`output_dir={str(output_dir)!r}` holds checkpoints, but no {RESULT} that says with which settings they were "
            "trained. Take another folder."
        )
    else:
        check_no_model(output_dir)
    return result


def save(output_dir: Path, result: dict) -> None:
    """Write the result so far, in the main process."""
    if processes().is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / RESULT, result)


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
    # A message may have its role before or after its content.
    seen = {json.dumps(prompt, sort_keys=True) for prompt in (() if held_out is None else held_out["prompt"])}
    if any(json.dumps(row["prompt"], sort_keys=True) in seen for row in rollouts):
        raise ValueError("A problem of the test split is also in the training data. Make the splits disjoint.")


class ResumableSFTTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] that takes no further step when it resumes from the last checkpoint of a finished training."""

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ) -> tuple[int, int]:
        place = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0  # the Trainer compares with `max_steps` only after a step
        return place


def fine_tune(model: str, dataset: Dataset, args: SFTConfig, model_args: ModelConfig) -> int:
    """
    TRL's `SFTTrainer` on tokenized traces; resumes from the last checkpoint in the output folder that was fully written, if
    there is one.

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
    peft_config = get_peft_config(model_args)
    if peft_config is not None:
        peft_config.revision = args.model_init_kwargs["revision"]  # saved with the adapter
    trainer = ResumableSFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config,
    )
    checkpoint = last_whole_checkpoint(args.output_dir)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    trainer.save_state()
    steps = trainer.state.global_step
    trainer.accelerator.wait_for_everyone()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return steps


@dataclass
class BaselineConfig(SFTConfig):
    """[`~trl.SFTConfig`] that says what to set on a machine without bfloat16."""

    def __post_init__(self):
        check_bfloat16(self)
        super().__post_init__()


def baselines_parser(**kwargs) -> Parser:
    """The parser of `trl-score baselines`."""
    parser = Parser((BaselineArguments, BaselineConfig, ModelConfig), "baselines", launched=True, **kwargs)
    # Traces are as long as they are, and a process that has sampled its share waits for the others.
    parser.set_defaults(max_length=None, ddp_timeout=24 * 60 * 60)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """A process of `trl-score baselines`."""
    with in_one_line():
        arguments, args, model_args = baselines_parser().parse_args_and_config(arguments)
        check_folder(args.output_dir)
    kept = (
        f"Rollouts, checkpoints and finished iterations are kept in '{args.output_dir}': the same command continues."
    )
    with interruptible(lambda: kept), in_one_line():
        run(arguments, args, model_args)
    disconnect()


def run(arguments: BaselineArguments, args: SFTConfig, model_args: ModelConfig) -> None:
    """Train a baseline, evaluate base and trained model, and print both."""
    task, eval_task = arguments.open_tasks()
    if model_args.model_name_or_path is None:
        if arguments.task != Arithmetic.name:
            sys.exit("Which model? Give --model_name_or_path: a Hub id or a folder.")
        model_args.model_name_or_path = str(BASE_MODEL_PATH)
    result = run_baseline(model_args, task, arguments, args, None if eval_task is None else eval_task.load("test"))
    how = loading(model_args, args, arguments.backend)
    evaluations = [
        evaluate_self_correction(
            model,
            eval_task,
            max_completion_length=arguments.max_completion_length,
            correction_instruction=arguments.correction_instruction or task.correction_instruction,
            chat_template_kwargs=arguments.chat_template_kwargs,
            batch_size=arguments.sampling_batch_size,
            limit=arguments.num_eval_problems,
            backend=arguments.backend,
            output_dir=Path(args.output_dir) / folder,
            **how,
        )
        for model, folder in ((model_args.model_name_or_path, "evaluation-base"), (args.output_dir, "evaluation"))
        if eval_task is not None
    ]
    if processes().is_main_process:
        print(describe(result))
        if evaluations:
            print(table(evaluations))


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
