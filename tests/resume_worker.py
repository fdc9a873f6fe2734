"""
What test_resume.py runs in processes of its own: training runs, one after the other, each uninterrupted, killed or resumed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from datasets import Dataset, IterableDataset

from trl_score import SCoReConfig, SCoReTrainer
from trl_score.records import disconnect
from trl_score.tasks import Arithmetic
from trl_score.tasks.arithmetic import BASE_MODEL_PATH


PROMPTS = ["a", "b", "a a", "b b", "a b", "b a", "a a a", "a a b", "b b b"]


def make_trainer(model, folder, stream=False, schedule=None, kill=None, **settings):
    """A trainer that saves after every step, and the problems that it generates for, with the steps done before."""
    arithmetic = model == "arithmetic"
    seen = []

    def reward(completions, prompts, trainer_state, attempt, answer=None, **_):
        if attempt == 1:
            seen.append((trainer_state.global_step, sorted({str(prompt) for prompt in prompts})))
        if arithmetic:
            return task.reward(completions, answer)
        return [float("a" in completion) for completion in completions]

    class Trainer(SCoReTrainer):
        def training_step(self, *args, **kwargs):
            if kill == [self.state.global_step, "training"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(*args, **kwargs)

        def _save_optimizer_and_scheduler(self, output_dir):
            if kill == [self.state.global_step, "saving"]:
                os.kill(os.getpid(), signal.SIGKILL)
            super()._save_optimizer_and_scheduler(output_dir)

        def create_model_card(self, *args, **kwargs):
            pass  # its figure takes longer than the step

    task = Arithmetic(num_train=len(PROMPTS))
    dataset = task.load("train") if arithmetic else Dataset.from_dict({"prompt": PROMPTS})
    if stream:
        rows = dataset.to_list()
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    config = {
        "output_dir": str(folder),
        "correction_instruction": task.correction_instruction if arithmetic else "a b",
        "max_completion_length": 8 if arithmetic else 2,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "stage1_steps": 2,
        "learning_rate": 1e-3 if arithmetic else 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": "WORLD_SIZE" not in os.environ,
        "disable_tqdm": True,
    }
    model = str(BASE_MODEL_PATH) if arithmetic else model
    trainer = Trainer(model, reward, SCoReConfig(**config | settings), train_dataset=dataset, schedule=schedule)
    return trainer, seen


def main():
    for settings in json.loads(sys.argv[1]):
        checkpoint, removed = settings.pop("resume", None), settings.pop("remove", None)
        trainer, _ = make_trainer(**settings)
        if removed and trainer.is_world_process_zero():
            Path(removed).unlink()
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(Path(settings["folder"], "end")))
    disconnect()


if __name__ == "__main__":
    main()
