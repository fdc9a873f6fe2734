"""
What test_distributed.py runs in each process: SCoRe on rollouts that are a function of the context and of the row's number in
the global batch, so that they do not depend on how many processes there are.
"""

import json
import os
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoConfig, set_seed

from trl_score import KeepBestCheckpoint, SCoReConfig, SCoReTrainer
from trl_score.records import disconnect
from trl_score.reference import TRAINED_FLAG
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


class FixedRollouts(SCoReTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        first_row = self.accelerator.process_index * len(prompt_ids)
        end = self._tokenizer.eos_token_id
        sampled = []
        for row, context in enumerate(prompt_ids, start=first_row):
            rng = random.Random(f"{context} {row}")
            ids = [rng.randrange(10) for _ in range(rng.randint(1, self.max_completion_length))]
            sampled.append(ids if len(ids) == self.max_completion_length else [*ids, end])
        return sampled, None


def reward(completions, answer, **kwargs):
    """The share of the line's numbers that are right: random lines are hardly ever right as a whole."""
    pairs = [
        (completion[0]["content"].split(), gold.split()) for completion, gold in zip(completions, answer, strict=True)
    ]
    return [sum(got == wanted for got, wanted in zip(text, gold, strict=False)) / len(gold) for text, gold in pairs]


def move(model):
    """Take the policy away from the reference."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * parameter.std()


def main():
    folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
    with_lora, generated = settings.pop("lora", False), settings.pop("generated", False)
    num_test, evaluate_only = settings.pop("num_test", 8), settings.pop("evaluate_only", False)
    streamed = settings.pop("streamed", False)
    # nodes: no process sees another one's files
    best, nodes = settings.pop("best", False), settings.pop("nodes", False)
    config = SCoReConfig(
        **{
            "output_dir": str(folder / (f"out{os.environ['RANK']}" if nodes else "out")),
            "correction_instruction": Arithmetic.correction_instruction,
            "max_completion_length": 8,
            "learning_rate": 0.1,
            "optim": "sgd",  # Adam would turn rounding of tiny gradients into whole steps
            "max_grad_norm": 0.1,
            "alpha": 2.0,
            "stage1_beta": 0.5,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "use_cpu": os.environ.get("ACCELERATE_TORCH_DEVICE") != "cpu",
            "disable_tqdm": True,
            "per_device_eval_batch_size": 2,
            "eval_on_start": generated,  # with FSDP2 the Trainer cannot evaluate before it trains
            **settings,
        }
    )
    set_seed(0)  # of the adapter
    task = Arithmetic(num_train=16, num_test=num_test)
    train_dataset, eval_dataset = task.load("train"), task.load("test")
    if streamed:  # in as many shards as processes
        shards = int(os.environ["WORLD_SIZE"])
        train_dataset, eval_dataset = (rows.to_iterable_dataset(shards) for rows in (train_dataset, eval_dataset))
    trainer = (SCoReTrainer if generated else FixedRollouts)(
        str(BASE_MODEL_PATH),
        task.reward if generated else reward,
        config,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        peft_config=LoraConfig(r=4) if with_lora else None,
        callbacks=[KeepBestCheckpoint(1, load_at_end=True)] if best else None,
    )
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"])
    if evaluate_only:
        move(trainer.model)
        metrics = trainer.evaluate()
        if trainer.is_world_process_zero():
            (folder / "metrics.json").write_text(json.dumps(metrics))
        disconnect()
        return
    trainer.train()
    # What the model is in the end is what was saved, whatever holds the weights in which pieces.
    trainer.save_model(str(folder / "model"))
    if nodes:
        save_file(trainer.model.state_dict(), folder / f"rank{os.environ['RANK']}.safetensors")
    if generated:
        trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        kind = str(trainer.accelerator.distributed_type).rpartition(".")[2]
        evaluations = [log for log in trainer.state.log_history if "eval_stage" in log]
        result = {"kind": kind, "logs": logs, "evaluations": evaluations}
        (folder / "result.json").write_text(json.dumps(result))
        if not with_lora:
            assert getattr(AutoConfig.from_pretrained(folder / "model"), TRAINED_FLAG)
    disconnect()


if __name__ == "__main__":
    main()
