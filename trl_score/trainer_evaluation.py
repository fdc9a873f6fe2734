"""Evaluation inside of a training run: it counts each problem once, and training does not notice it."""

import torch
from torch import Tensor
from trl import GRPOTrainer

from .decoding import keep_random_state
from .rollout_metrics import means


class EvaluatingTrainer(GRPOTrainer):
    """The hooks of [`~trl_score.SCoReTrainer`] that evaluate."""

    def evaluate(self, *args, **kwargs):
        with keep_random_state():  # a run with evaluations equals one without
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        with keep_random_state():
            return super().predict(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """TRL's, with the metrics of the rollouts in its result, under the prefix of the evaluation set."""
        self._metrics["eval"].clear()
        try:
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            found = means(self._metrics["eval"])
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        finally:
            self._metrics["eval"].clear()
        return output

    def _counted(self, number: int) -> Tensor:
        """
        Whether each of the `number` rollouts of a batch of all processes is counted: (number,). In training all are. In evaluation
        with several processes, rows from the start of the data fill up the last batch, and these are not counted again.
        """
        last = number
        if not self.model.training:
            rows = getattr(self.callback_handler.eval_dataloader, "dataset", None)
            state = self.accelerator.gradient_state
            if hasattr(rows, "__len__"):
                before = len(self._metrics["eval"]["reward_t1"])  # counted in the batches before
                last = min(number, len(rows) * self.num_generations_eval - before)
            elif state.end_of_dataloader and state.remainder > 0:  # streamed data
                last = state.remainder
        return torch.arange(number, device=self.accelerator.device) < last
