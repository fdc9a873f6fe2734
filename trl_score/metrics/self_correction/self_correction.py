"""The self-correction metrics as an `evaluate.Metric`: `evaluate.load(path)` with this folder's path."""

import datasets
import evaluate
import torch

from trl_score.metrics import mcnemar, self_correction_values


_CITATION = """@inproceedings{kumar2025training,
  title={Training Language Models to Self-Correct via Reinforcement Learning},
  author={Kumar, Aviral and Zhuang, Vincent and Agarwal, Rishabh and others},
  booktitle={The Thirteenth International Conference on Learning Representations},
  year={2025},
  url={https://huggingface.co/papers/2409.12917}
}"""
_DESCRIPTION = """Accuracy of each attempt, its change between attempts, and how often an attempt was corrected or broken
(Kumar et al., Section 3)."""
_INPUTS = """
Args:
    predictions (`list[list[float]]`): per rollout, 1 for each right attempt and 0 for each wrong one.
Returns:
    `accuracy_t1` .. `accuracy_tN`, `delta_t1_t2` .., `delta_i_to_c`, `delta_c_to_i`: shares of all rollouts;
    `correction_rate`: corrected rollouts over those whose first attempt was wrong, None if there are none;
    `mcnemar_p`: exact test of the last attempt against the first; `num_rollouts`.
Examples:
    >>> metric = evaluate.load(path)
    >>> metric.compute(predictions=[[0, 1], [1, 1], [1, 0], [0, 1]])["delta_t1_t2"]
    0.25
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class SelfCorrection(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
            homepage="https://huggingface.co/papers/2409.12917",
        )

    def _compute(self, predictions):
        lengths = {len(row) for row in predictions}
        if len(lengths) != 1 or min(lengths) < 2:
            raise ValueError(f"Every rollout needs the same number of attempts, two or more; got {sorted(lengths)}.")
        correct = torch.tensor(predictions, dtype=torch.float64)
        if ungraded := correct.isnan().any(dim=1).sum().item():
            raise ValueError(
                f"{ungraded} rollouts have an attempt that was not graded (NaN). Leave these rollouts out."
            )
        values = {name: value.mean().item() for name, value in self_correction_values(correct).items()}
        wrong = 1 - values["accuracy_t1"]
        return {
            **values,
            "correction_rate": values["delta_i_to_c"] / wrong if wrong else None,
            "mcnemar_p": mcnemar((correct[:, 0] >= 1).tolist(), (correct[:, -1] >= 1).tolist()),
            "num_rollouts": len(predictions),
        }
