"""
Makes the tiny base model of the arithmetic task: `python -m trl_score.tasks.arithmetic_base.make --output_dir DIR`.

About 110,000 parameters, five to ten minutes on one CPU core. The moment at which the model learns to guess the start
varies with the seed by hundreds of steps, so the model is shipped, and this script stops by accuracy, not by steps.

The data are conversations; the loss is on the assistant's turns.

- 45 %: one attempt, the right one.
- 55 %: two attempts; the first is right half of the time, else it has a wrong start and is consistent after it.
  - 30 % of them under the hint that says the attempt is wrong: the first attempt is wrong, the second right. So the
    skill to repair exists. That instruction is never used again: not in training by reinforcement, not in evaluation.
  - 70 % under the correction instruction: the second attempt copies the first or slips by one, without regard to
    whether the first was right. So the base model breaks right attempts, and never repairs on purpose. (A small share
    of real corrections is present until the model has learnt the start, and absent afterwards.)

With `--num_attempts 3 --model_name_or_path DIR` a model that is there learns some more, so that it knows of third attempts: all
conversations of two attempts have a third one after the second, as the second is after the first (the hint only where that is
wrong). Half a minute.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from trl_score.tasks.arithmetic import (
    ASSISTANT,
    END,
    HINT,
    NUM_DIGITS,
    PAD,
    SPLITS,
    UNKNOWN,
    USER,
    ZERO_PROBABILITY,
    Arithmetic,
    answer,
    bucket_of,
    problems,
    split_of,
)


CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}" + ASSISTANT + " {{ message.content }} " + END + " "
    "{%- else %}" + USER + " {{ message.content }} {% endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}" + ASSISTANT + " {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [str(digit) for digit in range(10)] + sorted({*Arithmetic.correction_instruction.split(), *HINT.split()})
    vocabulary = {word: index for index, word in enumerate([*words, PAD, USER, ASSISTANT, END, UNKNOWN])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=64,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Conversations:
    """Random batches of the data described above, as token ids."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        real_corrections: float,
        generator: torch.Generator,
        num_attempts: int = 2,
    ):
        self.real_corrections, self.num_attempts = real_corrections, num_attempts
        self.generator = generator
        buckets = bucket_of(torch.arange(10**NUM_DIGITS))
        self.allowed = torch.isin(buckets, torch.tensor(SPLITS["pretrain"]))
        ids = tokenizer.convert_tokens_to_ids
        self.user, self.assistant, self.end, self.pad = ids(USER), ids(ASSISTANT), ids(END), ids(PAD)
        self.instruction = torch.tensor([ids(word) for word in Arithmetic.correction_instruction.split()])
        self.hint = torch.tensor([ids(word) for word in HINT.split()])

    def random(self, size: int) -> torch.Tensor:
        return torch.rand(size, generator=self.generator)

    def digits(self, size: int) -> torch.Tensor:
        drawn = torch.randint(10, (size * 2, NUM_DIGITS), generator=self.generator)
        drawn[torch.rand(drawn.shape, generator=self.generator) < ZERO_PROBABILITY] = 0
        keys = (drawn * 10 ** torch.arange(NUM_DIGITS - 1, -1, -1)).sum(1)
        return drawn[self.allowed[keys]][:size]

    @staticmethod
    def line(start: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        return torch.cat([start[:, None], (start[:, None] - digits.cumsum(1)) % 10], dim=1)

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        digits = self.digits(size)
        start = digits.sum(1) % 10
        two_attempts = self.random(size) < 0.55
        hinted = two_attempts & (self.random(size) < 0.3)
        wrong = two_attempts & (hinted | (self.random(size) < 0.5))
        offset = torch.randint(1, 10, (size,), generator=self.generator)
        first = torch.where(wrong, (start + offset) % 10, start)
        column = torch.ones(size, 1, dtype=torch.long)
        of_user, of_assistant = column * self.user, column * self.assistant
        parts = [of_user, digits, of_assistant, self.line(first, digits), column * self.end]
        learnt = [(NUM_DIGITS + 2, torch.ones_like(two_attempts))]  # where an attempt starts, and in which rows it is
        attempt = first
        for number in range(2, self.num_attempts + 1):
            if number > 2:
                hinted = (self.random(size) < 0.3) & (attempt != start)
            slips = self.random(size) < torch.where(digits[:, -1] >= 7, 0.7, 0.2)
            after = torch.where(slips, (attempt + 1) % 10, attempt)
            corrected = hinted | (self.random(size) < self.real_corrections)
            attempt = torch.where(corrected, start, after)
            parts += [of_user, torch.where(hinted[:, None], self.hint, self.instruction), of_assistant]
            learnt.append((sum(part.size(1) for part in parts), two_attempts))
            parts += [self.line(attempt, digits), column * self.end]
        input_ids = torch.cat(parts, dim=1)
        labels = torch.full_like(input_ids, -100)
        for begin, rows in learnt:
            span = slice(begin, begin + NUM_DIGITS + 2)
            labels[:, span] = torch.where(rows[:, None], input_ids[:, span], -100)
        return input_ids, labels


@torch.no_grad()
def greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[str], num_attempts: int = 2
) -> list[float]:
    """Accuracy of each attempt, in percent."""
    conversations = [[{"role": "user", "content": row}] for row in rows]
    accuracies = []
    for _ in range(num_attempts):
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, return_tensors="pt", padding=True, return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=NUM_DIGITS + 2, do_sample=False)
        texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [text.split() == answer(row).split() for text, row in zip(texts, rows, strict=True)]
        accuracies.append(100 * sum(right) / len(right))
        for conversation, text in zip(conversations, texts, strict=True):
            conversation.append({"role": "assistant", "content": text})
            conversation.append({"role": "user", "content": Arithmetic.correction_instruction})
    return accuracies


def train(model, conversations, *, steps: int, learning_rate, stop=None) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        input_ids, labels = conversations.batch(256)
        logits = model(input_ids=input_ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if stop is not None and (step + 1) % 25 == 0 and stop(step + 1, loss.item()):
            return step + 1
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument(
        "--target", type=float, default=50.0, help="first-attempt accuracy that ends phase 1, in percent"
    )
    parser.add_argument("--cool_down_steps", type=int, default=100)
    parser.add_argument("--recalibration_steps", type=int, default=120)
    parser.add_argument("--max_steps", type=int, default=6000)
    parser.add_argument("--num_attempts", type=int, default=2, choices=(2, 3))
    parser.add_argument("--model_name_or_path", help="model that learns of third attempts")
    args = parser.parse_args()
    if (args.num_attempts == 3) != (args.model_name_or_path is not None):
        parser.error("--num_attempts 3 and --model_name_or_path go together.")

    set_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    held_out = problems("pretrain", 400, seed=1)  # only decides when to stop; the task's test split is never seen
    assert all(split_of(row) == "pretrain" for row in held_out)

    def report(step: int, loss: float | None = None) -> bool:
        found = greedy(model, tokenizer, held_out, args.num_attempts)
        text = ", ".join(f"accuracy@t{k} {accuracy:.1f}" for k, accuracy in enumerate(found, start=1))
        print(f"step {step}: {text}" + (f", loss {loss:.3f}" if loss is not None else ""), flush=True)
        return found[0] >= args.target

    # 1. Until the model guesses the start often enough, then a linear cool-down. Or third attempts beside the others.
    mix = Conversations(tokenizer, real_corrections=0.03, generator=generator, num_attempts=args.num_attempts)
    if args.num_attempts == 3:
        model = LlamaForCausalLM.from_pretrained(args.model_name_or_path)
        train(model, mix, steps=200, learning_rate=lambda step: 1e-3 * (1 - step / 200))
        report(200)
    else:
        train(model, mix, steps=args.max_steps, learning_rate=lambda step: 3e-3 * min(1, (step + 1) / 50), stop=report)
        cool_down = args.cool_down_steps
        train(model, mix, steps=cool_down, learning_rate=lambda step: 3e-3 * (1 - step / cool_down))
        report(cool_down)
    # 2. No real correction under the correction instruction any more.
    mix = Conversations(tokenizer, real_corrections=0.0, generator=generator, num_attempts=args.num_attempts)
    steps = args.recalibration_steps
    train(model, mix, steps=steps, learning_rate=lambda step: 5e-4 * (1 - step / steps))
    report(steps)

    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
