"""Evaluation inside of a training run: it counts each problem once, and training does not notice it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import GRPOTrainer

from .callbacks import loaded_step
from .checks import check_columns, first_rows
from .decoding import keep_random_state, temporarily
from .rollout_metrics import empty_table, means


def check_given(name: str, dataset):
    """A dataset that the trainer was constructed without has the columns that SCoRe reads."""
    if isinstance(dataset, Dataset | IterableDataset):
        check_columns(name, first_rows(name, dataset))


class EvaluatingTrainer(GRPOTrainer):
    """The hooks of [`~trl_score.SCoReTrainer`] that evaluate."""

    _evaluation = "eval"  # the prefix of the last one

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        check_given("eval_dataset", eval_dataset)
        with keep_random_state():  # a run with evaluations equals one without
            return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        check_given("test_dataset", test_dataset)
        with keep_random_state():
            return super().predict(test_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """
        TRL's, with the last batch also if `dataloader_drop_last` is set. Several processes read streamed data as rows first: a stream
        does not tell which rows fill up the last batch.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        given = self.eval_dataset[given] if isinstance(given, str) else given
        if isinstance(given, IterableDataset) and self.accelerator.num_processes > 1:
            eval_dataset = Dataset.from_list(list(given))
        # With `dataloader_persistent_workers` TRL keeps the loader of the first dataset, also for another one.
        getattr(self, "_eval_dataloaders", {}).pop("eval", None)
        with temporarily(self.args, dataloader_drop_last=False):
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """The one of an evaluation: a prediction is of the same problems, and of streamed data too."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """TRL's, with the metrics of the rollouts in its result, under the prefix of the evaluation set."""
        self._metrics["eval"].clear()
        self._tables["eval"], self._evaluation = empty_table(self._tables["eval"]), metric_key_prefix
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = means(self._metrics["eval"])
            found["num_rollouts"] = len(self._metrics["eval"]["reward_t1"])
            found["num_problems"] = found["num_rollouts"] // self.num_generations_eval
            found["num_graded"] = len(self._metrics["eval"]["delta_i_to_c"])  # first and last attempt
            if (step := loaded_step(self)) is not None:
                found["loaded_step"] = step
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        finally:
            self._metrics["eval"].clear()
        return output

    @contextmanager
    def _file_of_evaluation(self) -> Iterator[None]:
        """Within this context TRL writes the table of completions of an evaluation, beside that of the training step."""
        if not (self.log_completions and self.accelerator.is_main_process):
            yield
            return
        file = Path(self.args.output_dir, "completions", f"completions_{self.state.global_step:05d}.parquet")
        aside = file.with_suffix(".aside")
        if file.exists():
            file.replace(aside)
        try:
            yield
            name = re.sub(r"[^\w.-]+", "-", self._evaluation)  # of a set such as openai/gsm8k
            file.replace(file.with_name(file.name.replace("_", f"_{name}_", 1)))
        finally:
            if aside.exists():
                aside.replace(file)

    def _counted(self, number: int) -> Tensor:
        """
        Whether each of the `number` rollouts of a batch of all processes is counted: (number,). In training all are. In evaluation
        with several processes, rows from the start of the data fill up the last batch, and these are not counted again.
        """
        last = number
        if not self.model.training:
            rows = getattr(self.callback_handler.eval_dataloader, "dataset", None)
            if hasattr(rows, "__len__"):  # no stream
                before = len(self._metrics["eval"]["reward_t1"])  # counted in the batches before
                last = min(number, len(rows) * self.num_generations_eval - before)
        return torch.arange(number, device=self.accelerator.device) < last
