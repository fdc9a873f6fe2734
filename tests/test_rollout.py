"""Tokens in, tokens out: what the second attempt sees is the prompt, the sampled tokens and the template's bridge."""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_score.rollout import Bridge, Rollouts, roll_out


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {path.stem: path.read_text() for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}
TEMPLATES["chatml"] = CHATML
# These take a message's content as a list of blocks, images among them; SCoRe is for text.
FOR_IMAGES = {"idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training"}

PROMPT = [{"role": "user", "content": "How much is 3 + 4?"}]
INSTRUCTION = "There might be an error in the solution above. Please correct it, if any."
ANSWER = "The sum of both is 12."


def make_tokenizer(template, eos_token=None, merges=()):
    """A byte-level tokenizer whose special tokens are those of the template: with no merges, text and ids are one to one."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = re.findall(
        r"<\|[^|>\s'\"{}]+\|>|<｜[^｜]+｜>|<[a-zA-Z_]+(?:\|)?>|<\|[a-z_]+>|\[/?[A-Z_]+\]|</s>", template
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        pad_token="<pad>",
        eos_token=eos_token or "<eos>",
        additional_special_tokens=sorted(set(special)),
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
    if eos_token is None:  # the token that closes the assistant's turn
        after = render(tokenizer, ANSWER).split(ANSWER)[1]
        closing = min((token for token in tokenizer.all_special_tokens if token in after), key=after.index)
        return make_tokenizer(template, eos_token=closing, merges=merges)
    return tokenizer


def render(tokenizer, answer, prompt=PROMPT):
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": INSTRUCTION}]
    return tokenizer.apply_chat_template(prompt + turns, tokenize=False, add_generation_prompt=True)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def contexts_of(tokenizer, attempts, prompt=PROMPT, instructions=None, num_attempts=2):
    """Run a rollout with given attempts: the contexts that each attempt was sampled from, and the rollouts."""
    seen = []

    def generate(contexts, attempt):
        seen.append([list(context) for context in contexts])
        return [list(ids) for ids in attempts], None

    size = len(attempts)
    bridge = Bridge(tokenizer)
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    rollouts = roll_out(
        [prompt_ids] * size,
        generate,
        lambda attempt, ids: bridge([prompt] * size, instructions or [INSTRUCTION] * size, attempt, ids),
        num_attempts,
    )
    return seen, rollouts, prompt_ids


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - FOR_IMAGES))
def test_context_of_the_second_attempt_is_prompt_sampled_ids_and_bridge(name):
    """For an attempt that closed its turn, one that was cut off, one that is only the end, and one that is nothing."""
    tokenizer = make_tokenizer(TEMPLATES[name])
    end, answer = tokenizer.eos_token_id, encode(tokenizer, ANSWER)
    attempts = [[*answer, end], answer, [end], []]
    (first, second), rollouts, prompt_ids = contexts_of(tokenizer, attempts)
    assert first == [prompt_ids] * 4
    for context, attempt, (bridge,) in zip(second, attempts, rollouts.bridges, strict=True):
        assert context == prompt_ids + attempt + bridge

    # What the template renders after an assistant's text, found without a sentinel and without `Bridge`.
    after = render(tokenizer, ANSWER).split(ANSWER)
    assert len(after) == 2
    expected = encode(tokenizer, after[1])
    closing = expected[: expected.index(end) + 1]  # a template may put a line break before its end of turn
    assert INSTRUCTION not in tokenizer.decode(closing)
    closed, cut, only_end, empty = (bridge for (bridge,) in rollouts.bridges)
    assert cut == empty == expected
    assert closed == only_end == expected[len(closing) :]

    text = tokenizer.decode(cut)
    assert text.count(INSTRUCTION) == 1 and "system" not in text.lower() and "assistant-text" not in text.lower()


def test_templates_for_images_are_the_ones_that_do_not_take_text():
    """They render nothing of a text, or fail on it: if one did render it, it would belong into the test above."""
    for name in FOR_IMAGES:
        bridge = Bridge(make_tokenizer(TEMPLATES[name], eos_token="<eos>"))
        with pytest.raises(Exception):  # noqa: B017
            bridge.text(PROMPT, INSTRUCTION)


def test_sampled_ids_are_never_decoded_and_encoded_again():
    """The tokenizer would write `ab` as one token; the policy wrote it as two."""
    tokenizer = make_tokenizer(CHATML, merges=[("a", "b")])
    a, b, ab = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "ab"))
    assert encode(tokenizer, tokenizer.decode([a, b])) == [ab]
    (_, second), rollouts, prompt_ids = contexts_of(tokenizer, [[a, b, tokenizer.eos_token_id]])
    assert second[0][len(prompt_ids) : len(prompt_ids) + 3] == [a, b, tokenizer.eos_token_id]
    assert rollouts.attempts[0][0] == [a, b, tokenizer.eos_token_id]


def test_end_of_sequence_that_is_not_the_templates_keeps_the_templates():
    """A policy that closes its turn with another token: its token is kept, and the template's end of turn follows."""
    tokenizer = make_tokenizer(CHATML, eos_token="<|endoftext|>")
    _, rollouts, _ = contexts_of(tokenizer, [[*encode(tokenizer, ANSWER), tokenizer.eos_token_id]])
    assert tokenizer.decode(rollouts.bridges[0][0]).startswith("<|im_end|>\n<|im_start|>user\n")


def test_three_attempts_and_what_belongs_to_whom():
    """y1 = `a`, end; y2 = `a`, end; ..: bridges have the id 0 and no log-probability."""
    tokenizer = make_tokenizer(CHATML)
    attempt = [*encode(tokenizer, "a"), tokenizer.eos_token_id]
    (first, second, third), rollouts, _prompt_ids = contexts_of(tokenizer, [attempt], num_attempts=3)
    one, two = rollouts.bridges[0]
    assert one == two == encode(tokenizer, f"\n<|im_start|>user\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    assert second == [first[0] + attempt + one]
    assert third == [second[0] + attempt + two]
    assert rollouts.completion_ids == [attempt + one + attempt + two + attempt]
    gap = [0] * len(one)
    assert rollouts.attempt_ids == [[1, 1, *gap, 2, 2, *gap, 3, 3]]
    assert rollouts.completion_logprobs is None


def test_log_probabilities_line_up_with_the_tokens():
    logprobs = [[[-0.1, -0.2], [-0.3]], [[], [-0.4]]]
    rollouts = Rollouts([[9], [9]], [[[1, 2], [3]], [[], [4]]], [[[7, 8]], [[7, 8]]], logprobs)
    assert rollouts.completion_ids == [[1, 2, 7, 8, 3], [7, 8, 4]]
    assert rollouts.attempt_ids == [[1, 1, 0, 0, 2], [0, 0, 2]]
    assert rollouts.completion_logprobs == [[-0.1, -0.2, 0.0, 0.0, -0.3], [0.0, 0.0, -0.4]]


def test_rows_of_a_batch_have_their_own_instructions_and_prompts():
    tokenizer = make_tokenizer(CHATML)
    prompts = [PROMPT, [{"role": "system", "content": "Be brief."}, *PROMPT], [*PROMPT, *render_turns(), *PROMPT]]
    bridges = Bridge(tokenizer)(prompts, ["Look again.", "Once more!", "Look again."], 1, [[], [], []])
    texts = [tokenizer.decode(ids) for ids in bridges]
    for text, instruction in zip(texts, ["Look again.", "Once more!", "Look again."], strict=True):
        assert text == f"<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"


def render_turns():
    return [{"role": "assistant", "content": "7"}]


def test_plain_text_gets_the_end_of_sequence_and_the_instruction_between_blank_lines():
    tokenizer = make_tokenizer(CHATML, eos_token="<eos>")
    answer, end = encode(tokenizer, "seven"), tokenizer.eos_token_id
    closed, cut, empty = Bridge(tokenizer)(["3 + 4 ="] * 3, ["Check."] * 3, 1, [[*answer, end], answer, []])
    assert tokenizer.decode(closed) == "\n\nCheck.\n\n"
    assert cut == empty == [end, *closed]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    ],
)
def test_template_that_hides_an_attempt_or_the_instruction_is_an_error(template):
    with pytest.raises(ValueError, match="does not render the assistant's turn and the correction instruction"):
        Bridge(make_tokenizer(template, eos_token="<eos>")).text(PROMPT, INSTRUCTION)


def test_template_may_strip_the_instruction():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}<end>\n{% endfor %}"
    before, after = Bridge(make_tokenizer(template, eos_token="<end>")).text(PROMPT, "  Check.\n")
    assert (before, after) == ("<end>\nuser: ", "Check.<end>\n")


def test_arguments_of_the_template_reach_it():
    template = CHATML.replace("assistant\n{% endif %}", "assistant\n{{ '<think>' if thinking else '' }}{% endif %}")
    tokenizer = make_tokenizer(template)
    assert Bridge(tokenizer, {"thinking": True}).text(PROMPT, "Check.")[1].endswith("assistant\n<think>")
    assert Bridge(tokenizer).text(PROMPT, "Check.")[1].endswith("assistant\n")
