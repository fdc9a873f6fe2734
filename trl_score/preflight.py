"""
What `trl-score check` says before a GPU-day is spent: whether the grader, the instruction, the chat template, the lengths and the
memory are in order, and whether the base model leaves something to learn.
"""

import json
import re
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import psutil
import torch

from .context import ContextCheck
from .evaluation import evaluate
from .jobs import Plan, grade
from .metrics import metric
from .sampling import TokenSampler, TransformersSampler
from .tasks import Task


# Thresholds for rollouts that the base model samples as in training, from trial runs with two small language models.
FIRST_ATTEMPT = (
    0.25,
    0.70,
)  # share of right first attempts: below, Stage I sees too few; above, too little is left to correct
CORRECTED = 0.02  # share of rollouts from wrong to right: below, Stage I starves
CORRECTED_WELL = 0.04  # with less, it takes long
CUT_OFF = 0.20  # share of attempts that end at `max_completion_length`: above, length is what is trained
ROWS = 8  # rollouts at a time, for the estimate of memory
SHOWN = ("accuracy_t1", "accuracy_t2", "delta_t1_t2", "delta_i_to_c", "delta_c_to_i")
VERDICT = re.compile(
    r"(?:\b(?:is|was|are|were)|['’]s) (?:wrong|incorrect|false|not right|not correct)\b|\b(?:is|was)n['’]t (?:right|correct)\b"
    r"|\b(?:there(?:['’]s| is| was| are| were)|contains|has) (?:an? |some |at least one )?(?:error|mistake)"
    r"|\byou(?:['’]re| are| were) (?:wrong|right|correct)\b|\byou(?:['’]ve| have)? made (?:an?|some) (?:error|mistake)",
    re.I,
)
CONDITION = re.compile(r"\b(?:if|whether|in case)\b[^,.;:]*", re.I)  # "if the answer is wrong" gives no verdict
GB = 2**30


@dataclass
class Finding:
    """One check: its name, `"ok"`, `"look"` (it may be on purpose) or `"bad"` (mend it first), and a sentence."""

    name: str
    state: str
    text: str


@dataclass
class Check:
    """
    The result of `trl-score check`.

    Attributes:
        findings (`list[Finding]`):
            The checks.
        metrics (`dict`):
            Name to `{value, low, high}`: shares with 95 % intervals over problems. Empty if something has to be mended first.
        decoding (`str`):
            How the rollouts were sampled.
        worth (`str`):
            Whether it is worth training: `"yes"`, `"perhaps"` or `"no"`.
        advice (`list[str]`):
            What to change, one sentence each.
    """

    findings: list[Finding]
    metrics: dict
    decoding: str
    worth: str = "yes"
    advice: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.faults:
            self.worth, self.advice = "no", [f"Mend the {finding.name} first." for finding in self.faults]
        else:
            self.worth, self.advice = judge(self.metrics)

    @property
    def faults(self) -> list[Finding]:
        """What has to be mended first."""
        return [finding for finding in self.findings if finding.state == "bad"]

    @property
    def exit_code(self) -> int:
        """0, or 3 if training is not worth it."""
        return 3 if self.worth == "no" else 0

    def json(self) -> str:
        thresholds = {"accuracy_t1": FIRST_ATTEMPT, "delta_i_to_c": (CORRECTED, CORRECTED_WELL), "cut_off": CUT_OFF}
        return json.dumps(asdict(self) | {"thresholds": thresholds}, indent=2)

    def __str__(self) -> str:
        lines = [f"{each.name:<14}{each.state:<6}{each.text}" for each in self.findings]
        wanted = {
            "accuracy_t1": f"{100 * FIRST_ATTEMPT[0]:.0f} to {100 * FIRST_ATTEMPT[1]:.0f}",
            "delta_i_to_c": f"{100 * CORRECTED:.0f} or more, better {100 * CORRECTED_WELL:.0f}",
        }
        if self.metrics:
            lines += ["", f"{'percent, ' + self.decoding:<44}wanted"]
        for name in SHOWN:
            if name in self.metrics:
                cell = metric(name).cell(self.metrics[name])
                lines.append(f"{metric(name).label:<14}{cell:<30}{wanted.get(name, '')}".rstrip())
        lines += ["", f"Worth training? {self.worth.capitalize()}. {' '.join(self.advice)}".rstrip()]
        return "\n".join(lines)


def judge(metrics: dict) -> tuple[str, list[str]]:
    """
    Whether training is worth it, from the base model's sampled rollouts.

    Args:
        metrics (`dict`):
            `accuracy_t1` and `delta_i_to_c`, each with its `value`.

    Returns:
        `tuple[str, list[str]]`: `"yes"`, `"perhaps"` or `"no"`, and what to change.
    """
    if "delta_i_to_c" not in metrics:
        return "no", ["No attempt could be graded."]
    right, corrected = metrics["accuracy_t1"]["value"], metrics["delta_i_to_c"]["value"]
    low, high = FIRST_ATTEMPT
    if right < low:
        return "no", [
            f"Only {right:.0%} of the first attempts are right ({low:.0%} or more are needed): take easier problems, a stronger model, "
            "or longer attempts (--max_completion_length)."
        ]
    if right > high:
        return "no", [
            f"{right:.0%} of the first attempts are right, so little is left to correct ({high:.0%} or less are wanted): take harder "
            "problems."
        ]
    if corrected < CORRECTED_WELL:
        advice = (
            f"{corrected:.1%} of the rollouts turn from wrong to right, {'too few' if corrected < CORRECTED else 'few'} to learn from: "
            "compare several --correction_instruction and --temperature 0.6 to 1, or take problems whose errors can be seen by "
            "reading the attempt."
        )
        return "no" if corrected < CORRECTED else "perhaps", [advice]
    return "yes", []


def check(
    model, task: str | Task, *, limit: int | None = 64, temperature: float = 1.0, split: str = "train", **settings
) -> Check:
    """
    Check a model, a task and an instruction, and sample rollouts of two attempts as in training.

    Args:
        limit (`int`, *optional*, defaults to `64`):
            Number of problems to sample, drawn at random. The intervals show whether they are enough.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature of the training to come.
        split (`str`, *optional*, defaults to `"train"`):
            Split of the task to take the problems from.
        model, task, **settings:
            These and the other arguments are described for [`~trl_score.evaluation.evaluate_self_correction`].

    Returns:
        [`Check`].

    Raises:
        `OSError`: If the model or the rows are not available.
        `ValueError`: If a setting cannot work.
    """
    plan = Plan.of(model, task, limit=limit, temperature=temperature, split=split, num_attempts=2, **settings)
    plan = replace(plan, shuffled=True)
    task, job = plan.task, plan.job
    if task.num_given_attempts:
        raise ValueError(f"'{task.name}' gives the first attempts: it is for evaluation. Check another task.")
    rows = plan.problems()
    instructions = plan.instructions(rows) or [job.correction_instruction]
    findings = [check_grader(task, rows), check_instruction(*dict.fromkeys(instructions))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        sampler = plan.open()[1]()
        if isinstance(sampler, TokenSampler):
            findings += check_tokens(task, rows, sampler, job)
        can_render = findings[-1].name == "context"
        if isinstance(sampler, TransformersSampler) and can_render:
            findings.append(check_memory(sampler.model, longest(rows, sampler, job)))
        if any(finding.state == "bad" for finding in findings):
            return Check(findings, {}, "nothing was sampled")
        evaluation = evaluate(plan)
    found = evaluation.summary["metrics"]
    cut = [found[name]["value"] for name in ("truncated_t1", "truncated_t2") if name in found]
    if cut:
        state = "look" if max(cut) > CUT_OFF else "ok"
        more = ": set --max_completion_length higher, or ask for shorter answers" if state == "look" else ""
        cut = " and ".join(f"{share:.0%}" for share in cut)
        findings.append(
            Finding(
                "lengths",
                state,
                f"{cut} of the first and second attempts are cut off at {job.max_completion_length} tokens{more}",
            )
        )
    findings += [
        Finding("warning", "look", text)
        for text in dict.fromkeys(" ".join(str(each.message).split()) for each in caught if _is_ours(each))
    ]
    how = f"{evaluation.summary['num_problems']} problems, temperature {temperature:g}"
    return Check(findings, {name: found[name] for name in SHOWN if name in found}, how)


def _is_ours(warning: warnings.WarningMessage) -> bool:
    return issubclass(warning.category, UserWarning) and "trl_score" in warning.filename


def check_grader(task: Task, rows) -> Finding:
    """Attempts that are right get 1, and empty ones 0."""
    golds = task.gold(rows)
    texts = [["" if gold is None else gold, ""] for gold in golds]
    graded = [record["rewards"] for record in grade(task, rows, texts)]
    known = [i for i, gold in enumerate(golds) if gold is not None]
    wrong = [i for i in known if graded[i][0] is None or graded[i][0] < 1]
    empty = [i for i, (_, reward) in enumerate(graded) if reward is not None and reward > 0]
    if empty:
        return Finding(
            "grader",
            "bad",
            f"empty attempts get a reward at {len(empty)} of {len(rows)} problems, such as {graded[empty[0]][1]:g} at problem {empty[0]}",
        )
    if wrong:
        shown = " ".join(golds[wrong[0]].split())
        return Finding(
            "grader",
            "bad",
            f"{len(wrong)} of {len(known)} right attempts do not get 1, such as '{shown[:60]}' at problem {wrong[0]}: check that `gold` of "
            "the task returns the form that the grader reads",
        )
    if not known:
        return Finding("grader", "look", f"{len(rows)} empty attempts get 0; the rows have no right attempt to check")
    return Finding("grader", "ok", f"{len(known)} right attempts get 1, {len(rows)} empty ones 0")


def check_instruction(*instructions: str) -> Finding:
    """The instructions are said after right and wrong attempts alike, so none gives a verdict."""
    for instruction in instructions:
        if found := VERDICT.search(CONDITION.sub("", instruction)):
            return Finding(
                "instruction",
                "look",
                f"'{found[0]}' is a verdict, and is said after right attempts too: write that there might be an error",
            )
    return Finding("instruction", "ok", "gives no verdict on the attempt")


def check_tokens(task: Task, rows, sampler: TokenSampler, job) -> list[Finding]:
    """The chat template, the end of an attempt, the same tokens after right and wrong attempts, and the context."""
    tokenizer, prompt = sampler.tokenizer, rows[0]["prompt"]
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        return [Finding("template", "bad", "the prompts are chat messages, and the tokenizer has no chat template")]
    bridge = sampler.bridge
    gold = task.gold(rows.select(range(1)))[0] or "1"
    end = min(sampler.eos_token_ids)
    attempts = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in (gold, "?")]
    right, wrong = bridge([prompt] * 2, [job.correction_instruction] * 2, 1, attempts)
    findings = [
        Finding("turn", "ok", f"the same {len(right)} tokens after a right and a wrong attempt")
        if right == wrong
        else Finding(
            "turn", "bad", "the tokens between the attempts depend on the attempt, so they can tell a verdict"
        ),
        Finding(
            "end token", "ok", f"an attempt ends with {tokenizer.convert_ids_to_tokens(sorted(sampler.eos_token_ids))}"
        ),
    ]
    limit = sampler.context_limit
    context, tokenize = ContextCheck(limit, job.max_completion_length, bridge), partial(map, sampler.tokenize)
    try:
        context.check_rows("the split", rows, tokenize, job.correction_instruction, 2)
    except ValueError as error:
        findings.append(Finding("context", "bad", str(error)))
    else:
        text = f"the longest rollout needs {longest(rows, sampler, job)} tokens" + (f" of {limit}" if limit else "")
        findings.append(Finding("context", "ok", text))
    return findings


def longest(rows, sampler: TokenSampler, job) -> int:
    """Tokens of the longest rollout that can come up: the prompt, two attempts, and what the chat template puts between them."""
    context = ContextCheck(None, job.max_completion_length, sampler.bridge)
    return context.longest(rows, partial(map, sampler.tokenize), job.correction_instruction, 2)


def estimate_memory(model, tokens: int) -> dict[str, float]:
    """
    Bytes that a training takes, roughly: weights, gradients, AdamW's states and the reference model, and the largest of generation
    and update for `ROWS` rollouts, with gradient checkpointing.

    Args:
        model (`~transformers.PreTrainedModel`):
            The base model.
        tokens (`int`):
            Of the longest rollout.

    Returns:
        `dict[str, float]`: by kind of training.
    """
    config = model.config.get_text_config()
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    heads = config.num_attention_heads
    kv = 2 * hidden // heads * (getattr(config, "num_key_value_heads", None) or heads)
    weights = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    update = ROWS * tokens * (2 * hidden * layers + 14 * inner + 46 * hidden) + 4096 * 32768 * 2
    generation = ROWS * (tokens * layers * kv * 2 + config.vocab_size * 14)
    moment = 1.15 * max(update, generation)
    adapter = 0.02 * matrices * 16
    return {
        "all weights": weights * (4 + 4 + 8 + 4) + moment,
        "LoRA": weights * 2 + adapter + moment,
        "LoRA on 4 bits": matrices * 0.52 + (weights - matrices) * 2 + adapter + moment,
    }


def memory() -> tuple[int, str]:
    """Bytes that a training can have here, and of what."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, "the GPU has"
    return psutil.virtual_memory().available, "this machine has free"


def check_memory(model, tokens: int) -> Finding:
    """Whether this machine's memory holds the training, by an estimate."""
    needed, (there, where) = estimate_memory(model, tokens), memory()
    shown = ", ".join(f"{kind} {size / GB:.1f}" for kind, size in needed.items())
    fits = [kind for kind, size in needed.items() if size < there]
    state = "ok" if len(fits) == len(needed) else "look" if fits else "bad"
    more = "" if state == "ok" else f"; what fits: {', '.join(fits) or 'nothing'}"
    return Finding(
        "memory", state, f"estimated GB for {ROWS} rollouts at a time: {shown}; {where} {there / GB:.0f}{more}"
    )
