"""
The proof of correctness. A policy over three tokens has 7 attempts of up to two tokens (`E`, `aE`, `bE`, `aa`, `ab`, `ba`,
`bb`), so 49 rollouts of two attempts and 343 of three. Over all of them, and all groups of them that the leave-one-out
baseline can see, the expected gradient of the loss that `SCoReTrainer` minimizes is compared with autograd of the exact
objective.
"""

import itertools

import pytest
import torch

from trl_score.objective import (
    kl_weights,
    leave_one_out_advantages,
    shaped_rewards,
    shared_first_credit,
    spread_to_tokens,
    tree_advantages,
)
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


def expected_advantages(rewards, probabilities, num_generations, penalty=None, **shaping):
    """The advantage of each rollout, averaged over all groups that it can be in: (R, N)."""
    rows = len(rewards)
    others = list(itertools.product(range(rows), repeat=num_generations - 1))
    index = torch.tensor([[row, *other] for row in range(rows) for other in others])  # (R * groups, G)
    if penalty is not None:
        shaping["penalty"] = penalty[index.flatten()]
    advantages = leave_one_out_advantages(shaped_rewards(rewards[index.flatten()], **shaping), num_generations)
    advantages = advantages.view(rows, len(others), num_generations, -1)[:, :, 0]  # of the first of each group
    chance = probabilities[torch.tensor(others)].prod(1)  # of the others
    return (advantages * chance[None, :, None]).sum(1)


CASES = [
    *({"stage": 1, "target": 2, "gamma": gamma, "alpha": 10.0} for gamma in (0, 1)),
    *({"stage": 2, "target": 2, "gamma": gamma, "alpha": alpha} for gamma in (0, 1) for alpha in (0.0, 2.0, 10.0)),
    {"stage": 2, "kl_stage": 1, "target": None, "gamma": 0, "alpha": 10.0},  # `stage_schedule="joint"`
]


def cases_for(num_attempts):
    if num_attempts == 2:
        return CASES
    return [*CASES, *({"stage": 1, "target": 3, "gamma": gamma, "alpha": 10.0} for gamma in (0, 1))]


KL = [(0.0, 0.0), (0.3, 0.0), (0.3, 0.7)]


@pytest.mark.parametrize("kl_level", ["token", "sequence"])
@pytest.mark.parametrize("num_attempts", [2, 3])
def test_expected_gradient_equals_autograd_of_the_exact_objective(enumerated, num_attempts, kl_level):
    trainer, inputs, rewards, log_probs = enumerated(num_attempts)
    parameters = list(trainer.model.parameters())
    probabilities = attempt_log_probs(log_probs()[0], inputs, num_attempts).sum(1).exp().detach()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0).double())  # nothing is left out

    for case, (beta, stage1_beta) in itertools.product(cases_for(num_attempts), KL):
        stage, target, gamma, alpha = case["stage"], case["target"], case["gamma"], case["alpha"]
        weights = kl_weights(
            case.get("kl_stage", stage), beta=beta, stage1_beta=stage1_beta, num_attempts=num_attempts, target=target
        ).double()
        penalty = None
        if kl_level == "sequence":
            current, reference = (attempt_log_probs(x, inputs, num_attempts).detach() for x in log_probs())
            penalty = weights * (current - reference)
        advantages = expected_advantages(
            rewards, probabilities, 2, penalty, stage=stage, target=target, gamma=gamma, alpha=alpha
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
                "kl_weights": spread_to_tokens(weights * scale * (kl_level == "token"), inputs["attempt_ids"]),
            },
        )
        computed = torch.autograd.grad(-loss * LENGTH, parameters)  # dr_grpo divides by the limit

        credit = shaped_rewards(rewards, stage=stage, target=target, gamma=0, alpha=alpha)
        objective = exact_objective(*log_probs(), inputs, rewards, credit, weights, gamma, kl_level)
        exact = torch.autograd.grad(objective, parameters)
        for got, expected in zip(computed, exact, strict=True):  # TRL's fused LM head computes in float32
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4, msg=f"{case} {beta=} {stage1_beta=}")
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
    shaping = {"stage": 2, "alpha": 10.0}
    advantages = expected_advantages(rewards, probabilities, 3, **shaping)
    credit = shaped_rewards(rewards, **shaping)
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
    credit = shaped_rewards(rewards, stage=2, alpha=10.0)
    wrong = credit.sum(1, keepdim=True).expand(-1, 2) * probabilities[:, None] * len(probabilities)
    loss = trainer._compute_loss(
        trainer.model, {**inputs, "advantages": spread_to_tokens(wrong, inputs["attempt_ids"])}
    )
    computed = torch.autograd.grad(-loss * LENGTH, parameters)
    objective = exact_objective(*log_probs(), inputs, rewards, credit, torch.zeros(2), gamma=0)
    exact = torch.autograd.grad(objective, parameters)
    assert max((got - expected).abs().max() for got, expected in zip(computed, exact, strict=True)) > 1e-2


@pytest.mark.parametrize("stage", [1, 2])
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

    credit = shaped_rewards(rewards, stage=stage, alpha=10.0)
    unknown = credit.clone()
    unknown[:, 0] = torch.nan
    index = torch.cartesian_prod(torch.arange(len(credit)), torch.arange(len(credit)))  # all groups of two
    advantages = leave_one_out_advantages(unknown[index.flatten()], 2).view(len(credit), -1, 2, 2)[:, :, 0]
    advantages = (advantages * probabilities[None, :, None]).sum(1)
    assert (advantages[:, 0] == 0).all()
    weights = kl_weights(stage, beta=0.3, stage1_beta=0.7).double()
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


# Several second attempts at each first one


def all_trees(probabilities, num_attempts, num_first, shared):
    """
    All groups of `num_first` first attempts with `shared` continuations each: the rollouts in them, (trees, num_first *
    shared), and their probabilities, (trees,).
    """
    of_first = round(len(probabilities) ** (1 / num_attempts))  # first attempts
    rest = len(probabilities) // of_first  # continuations of each
    first_probability = probabilities.view(of_first, rest).sum(1)
    branches, chances = [], []
    for first in range(of_first):
        continuations = list(itertools.product(range(rest), repeat=shared))
        rows = first * rest + torch.tensor(continuations)  # (rest ** shared, shared)
        branches.append(rows)
        chances.append(first_probability[first] * (probabilities[rows] / first_probability[first]).prod(1))
    branches, chances = torch.cat(branches), torch.cat(chances)
    index = torch.cartesian_prod(*[torch.arange(len(branches))] * num_first)  # (trees, num_first)
    return branches[index].flatten(1), chances[index].prod(1)


def mean_over_trees(values, trees, chances, rows):
    """What each rollout has in the mean over the rows of a tree, in expectation over the trees: (R, K)."""
    values = values * chances.repeat_interleave(trees.size(1)).unsqueeze(1) / trees.size(1)
    return values.new_zeros(rows, values.size(1)).index_add(0, trees.flatten(), values)


TREES = [  # attempts, their limit of tokens, first attempts of a problem, second ones at each
    *((2, 2, 2, 2), (2, 1, 2, 3), (2, 1, 3, 2)),
    (3, 1, 2, 2),
]


@pytest.mark.parametrize("kl_level", ["token", "sequence"])
@pytest.mark.parametrize(("num_attempts", "length", "num_first", "shared"), TREES)
def test_expected_gradient_over_all_trees_is_that_of_the_exact_objective(
    enumerated, num_attempts, length, num_first, shared, kl_level
):
    """With the constant that it has without trees: the rows of a tree are its rollouts, and `dr_grpo` divides by them."""
    trainer, inputs, rewards, log_probs = enumerated(num_attempts, length)
    parameters, rows = list(trainer.model.parameters()), len(rewards)
    current, reference = (attempt_log_probs(x, inputs, num_attempts).detach() for x in log_probs())
    probabilities = current.sum(1).exp()
    trees, chances = all_trees(probabilities, num_attempts, num_first, shared)
    torch.testing.assert_close(chances.sum(), torch.tensor(1.0).double())
    ones = torch.ones(trees.numel(), 1).double()
    torch.testing.assert_close(mean_over_trees(ones, trees, chances, rows)[:, 0], probabilities)

    for case, (beta, stage1_beta) in itertools.product(cases_for(num_attempts), KL[1:]):
        stage, target, gamma, alpha = case["stage"], case["target"], case["gamma"], case["alpha"]
        weights = kl_weights(
            case.get("kl_stage", stage), beta=beta, stage1_beta=stage1_beta, num_attempts=num_attempts, target=target
        ).double()
        penalty = (weights * (current - reference))[trees.flatten()] if kl_level == "sequence" else 0.0
        credit = shaped_rewards(
            rewards[trees.flatten()], stage=stage, target=target, gamma=gamma, alpha=alpha, penalty=penalty
        )
        advantages = tree_advantages(shared_first_credit(credit, shared), num_first * shared, shared)
        kl = (weights * (kl_level == "token")).expand(trees.numel(), -1)
        advantages, kl = (rows * mean_over_trees(values, trees, chances, rows) for values in (advantages, kl))
        trainer.beta = beta
        loss = trainer._compute_loss(
            trainer.model,
            {
                **inputs,
                "advantages": spread_to_tokens(advantages, inputs["attempt_ids"]),
                "kl_weights": spread_to_tokens(kl, inputs["attempt_ids"]),
            },
        )
        computed = torch.autograd.grad(-loss * length, parameters)
        credit = shaped_rewards(rewards, stage=stage, target=target, gamma=0, alpha=alpha)
        objective = exact_objective(*log_probs(), inputs, rewards, credit, weights, gamma, kl_level)
        exact = torch.autograd.grad(objective, parameters)
        for got, expected in zip(computed, exact, strict=True):
            torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4, msg=f"{case} {beta=} {stage1_beta=}")
        assert max(gradient.abs().max() for gradient in exact) > 1e-3


def test_counting_a_shared_first_attempt_again_in_its_baseline_or_dividing_it_would_be_seen(enumerated):
    """
    The expected advantage of a first attempt is its credit minus the mean credit. A baseline over all other rollouts has the
    attempt itself in it (here with one third), and a factor of 1 / m in front is a factor of 1 / m.
    """
    _, inputs, rewards, log_probs = enumerated(2)
    probabilities = attempt_log_probs(log_probs()[0], inputs, 2).sum(1).exp().detach()
    trees, chances = all_trees(probabilities, 2, num_first=2, shared=2)
    credit = shaped_rewards(rewards, stage=2, alpha=10.0)
    expected = (probabilities[:, None] * (credit - (probabilities[:, None] * credit).sum(0)))[:, 0]
    ours = tree_advantages(credit[trees.flatten()], 4, 2)
    plain = leave_one_out_advantages(credit[trees.flatten()], 4)
    ours, plain = (mean_over_trees(values, trees, chances, len(rewards))[:, 0] for values in (ours, plain))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(plain, expected * 2 / 3)
    assert expected.abs().max() > 1e-2
