"""
The proof of correctness. A policy over three tokens has 7 attempts of up to two tokens (`E`, `aE`, `bE`, `aa`, `ab`, `ba`,
`bb`), so 49 rollouts of two attempts and 343 of three. Over all of them, and all groups of them that the leave-one-out
baseline can see, the expected gradient of the loss that `SCoReTrainer` minimizes is compared with autograd of the exact
objective.
"""

import itertools

import pytest
import torch

from trl_score.objective import Stage, shaped_rewards, spread_to_tokens, stage_one, stage_two, targets
from trl_score.rollout import roll_out


EOS = 2
ATTEMPTS = [[EOS], [0, EOS], [1, EOS], [0, 0], [0, 1], [1, 0], [1, 1]]
LENGTH = 2  # the limit of an attempt


@pytest.fixture
def enumerated(make_letters_trainer):
    """
    `enumerate(num_attempts)`: the trainer, its inputs for all rollouts of one prompt, and their rewards (R, N). With a limit
    of one token there are three attempts (`E`, `a`, `b`).
    """

    def enumerate_rollouts(num_attempts, length=LENGTH):
        trainer = make_letters_trainer(num_attempts=num_attempts, max_completion_length=length)
        attempts = ATTEMPTS if length == LENGTH else [[EOS], [0], [1]]
        model = trainer.model.double().eval()
        reference = trainer.ref_model.double().eval()
        torch.manual_seed(1)
        with torch.no_grad():  # away from the reference
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)

        chosen = list(itertools.product(range(len(attempts)), repeat=num_attempts))
        rows = len(chosen)
        rollouts = roll_out(
            [[0]] * rows,
            lambda contexts, attempt: ([attempts[row[attempt - 1]] for row in chosen], None),
            lambda attempt, ids: trainer._bridge(["a"] * rows, ["a b"] * rows, attempt, ids),
            num_attempts,
        )
        width = max(map(len, rollouts.completion_ids))
        pad = lambda lists, value: torch.tensor([ids + [value] * (width - len(ids)) for ids in lists])  # noqa: E731
        attempt_ids = pad(rollouts.attempt_ids, 0)
        inputs = {
            "prompt_ids": torch.tensor(rollouts.prompt_ids),
            "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
            "completion_ids": pad(rollouts.completion_ids, EOS),
            "completion_mask": pad([[1] * len(ids) for ids in rollouts.completion_ids], 0),
            "tool_mask": (attempt_ids > 0).long(),
            "attempt_ids": attempt_ids,
            "num_items_in_batch": (attempt_ids > 0).sum(),
        }
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        with torch.no_grad():
            reference_logits = reference(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        reference_log_probs = reference_logits.log_softmax(-1)  # (R, T, 3)
        inputs["ref_per_token_logps"] = reference_log_probs.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(
            -1
        )
        values = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.3]).double()  # reward of each of the 7 attempts
        rewards = values[torch.tensor(chosen)]

        def log_probs():
            logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
            return logits.log_softmax(-1), reference_log_probs

        return trainer, inputs, rewards, log_probs

    return enumerate_rollouts


def attempt_log_probs(log_probs, inputs, num_attempts):
    """Log-probability of each attempt of each rollout: (R, N)."""
    tokens = log_probs.gather(-1, inputs["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return torch.stack([(tokens * (inputs["attempt_ids"] == k)).sum(1) for k in range(1, num_attempts + 1)], dim=1)


def exact_objective(log_probs, reference, inputs, rewards, credit, weights, gamma, kl_level="token"):
    """
    Eq. 3 or Eq. 4 with the bonus, in closed form. With gamma = 0 each attempt's expectation is taken at the contexts that
    the current policy visits (no gradient through how often it visits them); with gamma = 1 the gradient goes through
    everything. The KL is that of the next-token distributions, at the contexts that the policy visits, or that of whole
    attempts, KL(pi(y_k | x_k) || pi_ref(y_k | x_k)).
    """
    num_attempts = rewards.size(1)
    attempts = attempt_log_probs(log_probs, inputs, num_attempts)
    log_ratios = attempts - attempt_log_probs(reference, inputs, num_attempts)  # (R, N)
    value = 0.0
    for k in range(num_attempts):
        if gamma == 1:
            probability = attempts.sum(1).exp()
        else:
            own = torch.zeros_like(attempts)
            own[:, k] = attempts[:, k] - attempts[:, k].detach()
            probability = (attempts.detach() + own).sum(1).exp()
        kl = weights[k] * log_ratios[:, k] if kl_level == "sequence" else 0.0
        value = value + (probability * (credit[:, k] - kl)).sum()
    if kl_level == "sequence":
        return value
    visits = attempts.detach().sum(1).exp()  # (R,)
    kl = (log_probs.exp() * (log_probs - reference)).sum(-1)  # (R, T)
    for k in range(num_attempts):
        value = value - weights[k] * (visits.unsqueeze(1) * kl * (inputs["attempt_ids"] == k + 1)).sum()
    return value


def expected_targets(rewards, stage, probabilities, num_generations=2, stored=None, log_ratio=None, **settings):
    """
    [`targets`] of each rollout, averaged over all groups that it can be in: advantages (R, N), and the KL weights (N,). With
    `stored`, the first attempts of all rollouts are stored ones.
    """
    rows = torch.arange(len(rewards))
    others = torch.cartesian_prod(*[rows] * (num_generations - 1)).view(-1, num_generations - 1)  # (groups, G - 1)
    first = rows.repeat_interleave(len(others)).unsqueeze(1)
    index = torch.cat([first, others.repeat(len(rows), 1)], dim=1).flatten()  # (R * groups * G,)
    settings = {"beta": 0.0, "stage1_beta": 0.0} | settings
    advantages, weights = targets(
        rewards[index],
        stage,
        num_generations=num_generations,
        log_ratio=None if log_ratio is None else log_ratio[index],
        stored=None if stored is None else torch.full((len(index),), stored),
        **settings,
    )
    advantages = advantages.view(len(rows), len(others), num_generations, -1)[:, :, 0]  # of the first of each group
    chance = probabilities[others].prod(1)  # of the others
    return (advantages * chance[None, :, None]).sum(1), weights.double()


def cases_for(num_attempts):
    """Stage, discount, bonus; the last is a schedule of its own: all attempts credited, all but the last held."""
    number = num_attempts
    for gamma in (0, 1):
        yield from ((stage_one(target), gamma, 10.0) for target in range(2, number + 1))
        yield from ((stage_two(number), gamma, alpha) for alpha in (0.0, 2.0, 10.0))
    yield Stage(2, credited=tuple(range(1, number + 1)), held=tuple(range(1, number))), 0, 10.0


KL = [(0.0, 0.0), (0.3, 0.0), (0.3, 0.7)]


@pytest.mark.parametrize("kl_level", ["token", "sequence"])
@pytest.mark.parametrize("num_attempts", [2, 3])
def test_expected_gradient_equals_autograd_of_the_exact_objective(enumerated, num_attempts, kl_level):
    trainer, inputs, rewards, log_probs = enumerated(num_attempts)
    parameters = list(trainer.model.parameters())
    probabilities = attempt_log_probs(log_probs()[0], inputs, num_attempts).sum(1).exp().detach()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0).double())  # nothing is left out

    log_ratio = None
    if kl_level == "sequence":
        current, reference = (attempt_log_probs(x, inputs, num_attempts).detach() for x in log_probs())
        log_ratio = current - reference
    for (stage, gamma, alpha), (beta, stage1_beta) in itertools.product(cases_for(num_attempts), KL):
        settings = {"alpha": alpha, "beta": beta, "stage1_beta": stage1_beta}
        advantages, weights = expected_targets(
            rewards, stage, probabilities, gamma=gamma, log_ratio=log_ratio, **settings
        )
        # The loss is linear in advantages and KL weights, so weighting both by each rollout's probability makes the mean
        # over all rollouts the expectation.
        scale = probabilities[:, None] * len(probabilities)
        trainer.beta = beta
        loss = trainer._compute_loss(
            trainer.model,
            {
                **inputs,
                "advantages": spread_to_tokens(advantages * scale, inputs["attempt_ids"]),
                "kl_weights": spread_to_tokens(weights * scale, inputs["attempt_ids"]),
            },
        )
        computed = torch.autograd.grad(-loss * LENGTH, parameters)  # dr_grpo divides by the limit

        credit = shaped_rewards(rewards, stage, gamma=0, alpha=alpha)
        held = torch.tensor([stage1_beta * (k in stage.held) for k in range(1, num_attempts + 1)])
        objective = exact_objective(*log_probs(), inputs, rewards, credit, beta + held.double(), gamma, kl_level)
        exact = torch.autograd.grad(objective, parameters)
        for got, expected in zip(computed, exact, strict=True):  # TRL's fused LM head computes in float32
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4, msg=f"{stage} {gamma=} {settings}")
        assert max(gradient.abs().max() for gradient in exact) > 1e-3


def test_sequence_kl_is_another_gradient_than_the_per_token_one(enumerated):
    """The comparison above would see one taken for the other."""
    trainer, inputs, rewards, log_probs = enumerated(2)
    credit, weights = torch.zeros_like(rewards), torch.ones(2).double()
    token, sequence = (
        torch.autograd.grad(
            exact_objective(*log_probs(), inputs, rewards, credit, weights, 0, level), [*trainer.model.parameters()]
        )
        for level in ("token", "sequence")
    )
    assert max((one - other).abs().max() for one, other in zip(token, sequence, strict=True)) > 1e-2


def test_baseline_is_unbiased_in_groups_of_three(enumerated):
    """The expected advantage is the credit minus its mean, whatever the size of the group."""
    _trainer, inputs, rewards, log_probs = enumerated(2)
    probabilities = attempt_log_probs(log_probs()[0], inputs, 2).sum(1).exp().detach()
    advantages, _ = expected_targets(rewards, stage_two(2), probabilities, 3, alpha=10.0)
    credit = shaped_rewards(rewards, stage_two(2), alpha=10.0)
    torch.testing.assert_close(advantages, credit - (probabilities[:, None] * credit).sum(0))


def test_trajectory_reward_on_both_attempts_would_not_be_the_objective(enumerated):
    """
    The error of other implementations: r1 + r2 + alpha (r2 - r1) on the tokens of both attempts gives r1 the weight
    1 - alpha on attempt 1. The comparison above would have seen it.
    """
    trainer, inputs, rewards, log_probs = enumerated(2)
    trainer.beta = 0.0
    parameters = list(trainer.model.parameters())
    probabilities = attempt_log_probs(log_probs()[0], inputs, 2).sum(1).exp().detach()
    credit = shaped_rewards(rewards, stage_two(2), alpha=10.0)
    wrong = credit.sum(1, keepdim=True).expand(-1, 2) * probabilities[:, None] * len(probabilities)
    loss = trainer._compute_loss(
        trainer.model, {**inputs, "advantages": spread_to_tokens(wrong, inputs["attempt_ids"])}
    )
    computed = torch.autograd.grad(-loss * LENGTH, parameters)
    objective = exact_objective(*log_probs(), inputs, rewards, credit, torch.zeros(2), gamma=0)
    exact = torch.autograd.grad(objective, parameters)
    assert max((got - expected).abs().max() for got, expected in zip(computed, exact, strict=True)) > 1e-2


@pytest.mark.parametrize("stage", [stage_one(2), stage_two(2)])
def test_expected_gradient_with_stored_first_attempts(enumerated, stage):
    """
    First attempts from another model: the second attempt's expectation is taken at them, and nothing is asked of their own
    tokens. In a group with sampled ones, those have their own baseline.
    """
    trainer, inputs, rewards, log_probs = enumerated(2)
    parameters = list(trainer.model.parameters())
    stored = torch.rand(len(ATTEMPTS), generator=torch.Generator().manual_seed(0)).double()
    stored = (stored / stored.sum()).repeat_interleave(len(ATTEMPTS))  # (R,), of the first attempt of each rollout
    of_second = attempt_log_probs(log_probs()[0], inputs, 2)[:, 1]  # (R,)
    probabilities = (stored * of_second.exp()).detach()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0).double())

    credit = shaped_rewards(rewards, stage, alpha=10.0)
    advantages, weights = expected_targets(
        rewards, stage, probabilities, stored=True, alpha=10.0, beta=0.3, stage1_beta=0.7
    )
    assert (advantages[:, 0] == 0).all()
    attempt_ids = torch.where(inputs["attempt_ids"] == 2, 2, 0)
    scale = probabilities[:, None] * len(probabilities)
    loss = trainer._compute_loss(
        trainer.model,
        {
            **inputs,
            "attempt_ids": attempt_ids,
            "tool_mask": (attempt_ids > 0).long(),
            "advantages": spread_to_tokens(advantages * scale, attempt_ids),
            "kl_weights": spread_to_tokens(weights * scale, attempt_ids),
        },
    )
    computed = torch.autograd.grad(-loss * LENGTH, parameters)

    current, reference = log_probs()
    kl = (current.exp() * (current - reference)).sum(-1)  # (R, T)
    of_second = attempt_log_probs(current, inputs, 2)[:, 1]
    objective = (stored * of_second.exp() * credit[:, 1]).sum()
    objective = objective - weights[1] * (probabilities[:, None] * kl * (attempt_ids == 2)).sum()
    exact = torch.autograd.grad(objective, parameters)
    for got, expected in zip(computed, exact, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in exact) > 1e-3
