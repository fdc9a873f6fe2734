"""
What is relied on in TRL. A test that fails here names what a new version of TRL has changed; CONTRIBUTING.md says which versions
are supported and why.
"""

import inspect

import pytest
import torch
import trl
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from trl_score import SCoReTrainer


HOOKS = [name for name, item in vars(SCoReTrainer).items() if inspect.isfunction(item) and hasattr(GRPOTrainer, name)]
OURS = {"__init__": {"schedule"}}  # arguments that SCoRe adds


@pytest.fixture
def make_stock_trainer(letters_model, tmp_path):
    """TRL's own trainer over the letters model."""

    def make(rollout_func=None, **settings):
        defaults = {"output_dir": str(tmp_path), "max_completion_length": 4, "num_generations": 2, "max_steps": 1}
        defaults |= {"per_device_train_batch_size": 4, "bf16": False, "use_cpu": True, "report_to": "none"}
        defaults |= {"gradient_checkpointing": False, "beta": 0.1}
        return GRPOTrainer(
            letters_model,
            lambda completions, **_: [float(len(each)) for each in completions],
            GRPOConfig(**defaults | settings),
            train_dataset=Dataset.from_dict({"prompt": ["a", "b b"] * 4}),
            rollout_func=rollout_func,
        )

    return make


def batch_of(trainer) -> dict:
    """What TRL hands to its loss."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("name", HOOKS)
def test_an_overridden_method_takes_what_trl_passes(name):
    """Every argument of TRL's method fits ours, and TRL has every argument of ours."""
    theirs = inspect.signature(getattr(GRPOTrainer, name)).parameters
    ours = inspect.signature(vars(SCoReTrainer)[name])
    named = {each for each, item in theirs.items() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)}
    try:
        ours.bind(**dict.fromkeys(named))
    except TypeError as error:
        pytest.fail(f"TRL {trl.__version__} has changed the arguments of GRPOTrainer.{name}: {error}")
    own = {each for each, item in ours.parameters.items() if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)}
    gone = own - named - OURS.get(name, set())
    assert not gone or any(item.kind == item.VAR_KEYWORD for item in theirs.values()), (
        f"TRL {trl.__version__} no longer passes {sorted(gone)} to GRPOTrainer.{name}."
    )


def test_the_hooks_that_make_the_method_are_overridden_methods_of_trl():
    """A hook that TRL renames is no longer called, and training becomes plain GRPO."""
    needed = {
        "_generate",
        "_generate_and_score_completions",
        "_prepare_inputs",
        "_compute_loss",
        "_get_per_token_logps_and_entropies",
    }
    assert needed <= {*HOOKS}, f"TRL {trl.__version__} has no GRPOTrainer.{sorted(needed - {*HOOKS})}."


def test_the_loss_takes_an_advantage_for_each_token(make_stock_trainer):
    """Advantages (B, T) with the same value at each token of a row are the advantages (B,)."""
    trainer = make_stock_trainer()
    inputs = batch_of(trainer)
    assert inputs["advantages"].dim() == 1
    inputs["advantages"] = torch.arange(4.0)
    by_row = trainer._compute_loss(trainer.model, inputs)
    inputs["advantages"] = inputs["advantages"].unsqueeze(1).expand_as(inputs["completion_ids"])
    by_token = trainer._compute_loss(trainer.model, inputs)
    torch.testing.assert_close(by_token, by_row, msg=f"TRL {trl.__version__} reads advantages (B, T) in another way.")


def test_the_kl_weight_is_compared_with_zero_and_multiplied_once(make_stock_trainer):
    """So that an object with a weight for each token can take its place."""

    class Weight(float):
        asked, shapes = [], []

        def __ne__(self, other):
            self.asked.append(other)
            return float(self) != other

        def __mul__(self, per_token_kl):
            self.shapes.append(tuple(per_token_kl.shape))
            return float(self) * per_token_kl

    trainer = make_stock_trainer()
    inputs = batch_of(trainer)
    expected = trainer._compute_loss(trainer.model, inputs)
    trainer.beta = Weight(trainer.beta)
    loss = trainer._compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, expected)
    message = f"TRL {trl.__version__} uses `beta` in another way in its loss."
    assert Weight.asked and set(Weight.asked) == {0.0}, message
    assert Weight.shapes == [tuple(inputs["completion_ids"].shape)], message


def test_a_rollout_function_makes_the_completions(make_stock_trainer):
    """It is called with prompts and trainer, and its tokens are those that are trained."""
    calls = []

    def rollout(prompts, trainer):
        calls.append((len(prompts), trainer))
        rows = len(prompts)
        return {"prompt_ids": [[0]] * rows, "completion_ids": [[1, 0, 2]] * rows, "logprobs": [[-1.0] * 3] * rows}

    trainer = make_stock_trainer(rollout)
    inputs = batch_of(trainer)
    assert [each is trainer for _, each in calls] == [True] and calls[0][0] in (2, 4)
    assert inputs["completion_ids"].tolist() == [[1, 0, 2]] * 4, (
        f"TRL {trl.__version__} changes what a rollout returns."
    )


def test_a_mask_of_tool_tokens_leaves_tokens_out_of_the_loss(make_stock_trainer):
    """Bridges between attempts are masked in this way."""
    trainer = make_stock_trainer()
    inputs = batch_of(trainer)
    inputs["advantages"] = torch.ones(4)
    losses = []
    for mask in (torch.ones_like(inputs["completion_mask"]), torch.zeros_like(inputs["completion_mask"])):
        losses.append(trainer._compute_loss(trainer.model, inputs | {"tool_mask": mask}).item())
    assert losses[0] != 0 and losses[1] == 0, f"TRL {trl.__version__} no longer masks by `tool_mask`."


def test_no_completions_are_printed_for_a_number_below_zero(make_stock_trainer, tmp_path, capsys):
    """SCoRe prints dialogues of its own, and leaves TRL's files and tables of trackers as they are."""
    trainer = make_stock_trainer(log_completions=True, logging_steps=1, save_strategy="no")
    trainer.num_completions_to_print = -1
    trainer.train()
    assert "Advantage" not in capsys.readouterr().out, f"TRL {trl.__version__} prints its table of completions anyway"
    assert list(tmp_path.glob("completions/*.parquet"))
