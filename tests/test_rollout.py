"""Tokens in, tokens out: what the second attempt sees is the prompt, the sampled tokens and the template's bridge."""

import re
import warnings
from functools import cache
from pathlib import Path

import pytest
import trl
from jinja2 import UndefinedError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_score.rollout import Bridge, roll_out


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FILES = Path(trl.__file__).parent.glob("chat_templates/*.jinja")
TEMPLATES = {path.stem: path.read_text(encoding="utf-8") for path in FILES}
TEMPLATES["chatml"] = CHATML
# These take a message's content as a list of blocks, images among them; SCoRe is for text.
FOR_IMAGES = {"idefics3", "idefics3_training", "llava_next", "llava_next_training", "smolvlm", "smolvlm_training"}
FOR_TEXT = sorted(set(TEMPLATES) - FOR_IMAGES)
NO_SYSTEM = {"gemma", "gemma_training"}  # these raise on a system message

PROMPT = [{"role": "user", "content": "How much is 3 + 4?"}]
SYSTEM = [{"role": "system", "content": "Be brief."}, *PROMPT]
TURNS = [*PROMPT, {"role": "assistant", "content": "7"}, {"role": "user", "content": "And 5 more?"}]
INSTRUCTION = "There might be an error in the solution above. Please correct it, if any."


@cache
def make_tokenizer(template, eos_token=None, merges=()):
    """A byte-level tokenizer whose special tokens are those of the template: with no merges, text and ids are one to one."""
    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>"])  # put before a text by itself, as Llama does: it has no place in a bridge
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", len(vocabulary))])
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
        after = rendered_after(tokenizer, PROMPT, attempt=1)
        closing = min((token for token in tokenizer.all_special_tokens if token in after), key=after.index)
        return make_tokenizer(template, eos_token=closing, merges=merges)
    return tokenizer


def rendered_after(tokenizer, prompt, attempt):
    """What the template renders after attempt `attempt`: the common end of two conversations that differ only there."""

    def render(last):
        answers = [f"My answer number {k}." for k in range(1, attempt)] + [last]
        texts = [pair for answer in answers for pair in (("assistant", answer), ("user", INSTRUCTION))]
        turns = [{"role": role, "content": text} for role, text in texts]
        return tokenizer.apply_chat_template(prompt + turns, tokenize=False, add_generation_prompt=True)

    one, other = render("The sum is 12."), render("Is the sum 8?")
    length = [a == b for a, b in zip(reversed(one), reversed(other), strict=False)].index(False)
    return one[len(one) - length :]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run(tokenizer, attempts, prompts, instructions=None):
    """Roll out a policy that says `attempts[k - 1][i]`: ids of the prompts, contexts of each attempt, rollouts."""
    bridge, contexts_seen = Bridge(tokenizer), []
    instructions = instructions or [INSTRUCTION] * len(prompts)
    prompt_ids = [
        encode(tokenizer, prompt)
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]

    def generate(contexts, attempt):
        contexts_seen.append([list(context) for context in contexts])
        return attempts[attempt - 1], None

    def between(attempt, attempt_ids):
        return bridge(prompts, instructions, attempt, attempt_ids)

    return prompt_ids, contexts_seen, roll_out(prompt_ids, generate, between, len(attempts))


@pytest.mark.parametrize("prompt", [PROMPT, SYSTEM, TURNS], ids=["problem", "system", "turns"])
@pytest.mark.parametrize("name", FOR_TEXT)
def test_context_of_an_attempt_is_prompt_sampled_ids_and_bridges(name, prompt):
    """For an attempt that closed its turn, one that was cut off, one that is only the end, and one that is nothing."""
    if prompt is SYSTEM and name in NO_SYSTEM:
        pytest.skip("the template raises on a system message")
    tokenizer = make_tokenizer(TEMPLATES[name])
    end = tokenizer.eos_token_id
    said = [encode(tokenizer, text) for text in ("The sum of both is 12.", "I was wrong, it is 7.", "7, then.")]
    attempts = [[[*answer, end], answer, [end], []] for answer in said]
    prompt_ids, contexts, rollouts = run(tokenizer, attempts, [prompt] * 4)
    assert contexts[0] == prompt_ids
    for row, (one, two) in enumerate(rollouts.bridges):
        assert contexts[1][row] == prompt_ids[row] + attempts[0][row] + one
        assert contexts[2][row] == prompt_ids[row] + attempts[0][row] + one + attempts[1][row] + two
        assert contexts[2][row] + attempts[2][row] == prompt_ids[row] + rollouts.completion_ids[row]

    for attempt, bridges in enumerate(zip(*rollouts.bridges, strict=True), start=1):
        closed, cut, only_end, empty = bridges
        whole = encode(tokenizer, rendered_after(tokenizer, prompt, attempt))
        closing = whole[: whole.index(end) + 1]  # a template may put a line break before its end of turn
        assert INSTRUCTION not in tokenizer.decode(closing)
        assert cut == empty == whole
        assert closed == only_end == whole[len(closing) :]
        text = tokenizer.decode(cut)
        assert text.count(INSTRUCTION) == 1 and prompt[-1]["content"] not in text
        assert "system" not in text.lower() and SYSTEM[0]["content"] not in text


def test_templates_for_images_are_the_ones_that_do_not_take_text():
    """They render nothing of a text, or fail on it: if one did render it, it would belong into the test above."""
    for name in FOR_IMAGES:
        with pytest.raises((ValueError, UndefinedError)):
            Bridge(make_tokenizer(TEMPLATES[name], eos_token="<eos>")).text(PROMPT, INSTRUCTION)


def test_attempt_cut_off_at_a_token_of_the_bridge_is_not_taken_for_closed():
    """A line break, or a letter of the role's name, stands in the bridge but closes no turn."""
    damaged = []
    for name in FOR_TEXT:
        tokenizer = make_tokenizer(TEMPLATES[name])
        whole = encode(tokenizer, rendered_after(tokenizer, PROMPT, attempt=1))
        attempts = [encode(tokenizer, text) for text in ("12\n", "12\n\n", "I am the user", "The sums")]
        _, _, rollouts = run(tokenizer, [attempts, attempts], [PROMPT] * 4)
        damaged += [name] if any(bridge != whole for (bridge,) in rollouts.bridges) else []
    assert damaged == []


@pytest.mark.parametrize(("name", "closing"), [("cohere2", "<|END_OF_TURN_TOKEN|>"), ("gemma3", "<end_of_turn>")])
def test_end_of_turn_that_is_not_the_tokenizers_end_of_sequence_is_not_doubled(name, closing):
    """Gemma's end of sequence is `<eos>`; Cohere 2 writes two tokens at the end of a turn, of which one is sampled last."""
    tokenizer = make_tokenizer(TEMPLATES[name], eos_token="<eos>")
    _, (_, [context]), _ = run(tokenizer, [[encode(tokenizer, f"It is 12.{closing}")]] * 2, [PROMPT])
    after = tokenizer.decode(context).partition("It is 12.")[2]
    assert after == closing + rendered_after(tokenizer, PROMPT, attempt=1).partition(closing)[2]


def test_end_of_sequence_that_is_not_the_templates_keeps_the_templates():
    """A policy that closes its turn with another token: its token is kept, and the template's end of turn follows."""
    tokenizer = make_tokenizer(CHATML, eos_token="<|endoftext|>")
    _, (_, [context]), _ = run(tokenizer, [[encode(tokenizer, "It is 12.<|endoftext|>")]] * 2, [PROMPT])
    assert "It is 12.<|endoftext|><|im_end|>\n<|im_start|>user\n" in tokenizer.decode(context)


def test_sampled_ids_are_never_decoded_and_encoded_again():
    """The tokenizer would write `ab` as one token; the policy wrote it as two."""
    tokenizer = make_tokenizer(CHATML, merges=(("a", "b"),))
    a, b, ab = (tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "ab"))
    assert encode(tokenizer, tokenizer.decode([a, b])) == [ab]
    attempt = [a, b, tokenizer.eos_token_id]
    [prompt_ids], (_, [context]), rollouts = run(tokenizer, [[attempt]] * 2, [PROMPT])
    assert context == prompt_ids + attempt + rollouts.bridges[0][0]
    assert rollouts.attempts == [[attempt, attempt]]


@pytest.mark.parametrize("with_logprobs", [True, False])
def test_three_attempts_line_up_with_their_numbers_and_log_probabilities(with_logprobs):
    """
    Attempts 2 3, 4 and 5 6 to the prompt 1, with the bridges 10 11 and 20: the completion is 2 3 10 11 4 20 5 6. Those to
    the prompt 7 8 are nothing, 9 and nothing: 10 11 9 20.
    """
    sampled = [[[2, 3], []], [[4], [9]], [[5, 6], []]]
    logprobs = [[[-0.2, -0.3], []], [[-0.4], [-0.9]], [[-0.5, -0.6], []]]
    contexts_seen = []

    def generate(contexts, attempt):
        contexts_seen.append([list(context) for context in contexts])
        return sampled[attempt - 1], logprobs[attempt - 1] if with_logprobs else None

    def bridge(attempt, attempt_ids):
        assert attempt_ids == sampled[attempt - 1]
        return [[10, 11] if attempt == 1 else [20] for _ in attempt_ids]

    rollouts = roll_out([[1], [7, 8]], generate, bridge, num_attempts=3)
    assert contexts_seen == [
        [[1], [7, 8]],
        [[1, 2, 3, 10, 11], [7, 8, 10, 11]],
        [[1, 2, 3, 10, 11, 4, 20], [7, 8, 10, 11, 9, 20]],
    ]
    assert rollouts.prompt_ids == [[1], [7, 8]]
    assert rollouts.completion_ids == [[2, 3, 10, 11, 4, 20, 5, 6], [10, 11, 9, 20]]
    assert rollouts.attempt_ids == [[1, 1, 0, 0, 2, 0, 3, 3], [0, 0, 2, 0]]
    expected = [[-0.2, -0.3, 0.0, 0.0, -0.4, 0.0, -0.5, -0.6], [0.0, 0.0, -0.9, 0.0]]
    assert rollouts.completion_logprobs == (expected if with_logprobs else None)


def test_rows_of_a_batch_have_their_own_instructions_and_prompts():
    tokenizer = make_tokenizer(CHATML)
    instructions = ["Look again.", "Once more!", "Look again.", " Check.\n"]
    _, _, rollouts = run(tokenizer, [[[], [], [], []]] * 2, [PROMPT, SYSTEM, TURNS, PROMPT], instructions)
    for (bridge,), instruction in zip(rollouts.bridges, instructions, strict=True):
        expected = f"<|im_end|>\n<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(bridge) == expected


def test_plain_text_gets_the_end_of_sequence_and_the_instruction_between_blank_lines():
    """An attempt that closed itself, one cut off, one cut off at a line break, and one that is nothing."""
    tokenizer = make_tokenizer(CHATML, eos_token="<eos>")
    attempts = [encode(tokenizer, text) for text in ("seven<eos>", "seven", "seven\n", "")]
    _, (_, contexts), _ = run(tokenizer, [attempts, attempts], ["3 + 4 ="] * 4, ["Check."] * 4)
    texts = [tokenizer.decode(context) for context in contexts]
    assert texts == [f"3 + 4 ={said}<eos>\n\nCheck.\n\n" for said in ("seven", "seven", "seven\n", "")]


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


def test_empty_instruction_is_an_error():
    """Of a streamed dataset's row, say: a configured one is refused before."""
    for prompt in (PROMPT, "3 + 4 ="):
        with pytest.raises(ValueError, match="empty correction instruction"):
            Bridge(make_tokenizer(CHATML)).text(prompt, " \n")


def test_context_ids_are_what_each_attempt_was_sampled_from():
    tokenizer = make_tokenizer(CHATML)
    said = [[encode(tokenizer, text)] for text in ("12", "7, sorry", "7")]
    _, contexts, rollouts = run(tokenizer, said, [PROMPT])
    assert [rollouts.context_ids(attempt) for attempt in (1, 2, 3)] == contexts


# Warnings of templates and prompts


def warned(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught]


def check_template(tokenizer, *ends, prompt=PROMPT):
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ends} | {tokenizer.eos_token_id}
    return warned(lambda: Bridge(tokenizer, end_token_ids=ends).text(prompt, INSTRUCTION))


@pytest.mark.parametrize("name", FOR_TEXT)
def test_template_whose_end_of_turn_ends_an_attempt_is_not_warned_about(name):
    assert check_template(make_tokenizer(TEMPLATES[name])) == []


@pytest.mark.parametrize(
    ("name", "eos_token", "ends"),
    [
        ("gemma3", "<eos>", ["<end_of_turn>"]),
        ("phi3", "<|endoftext|>", ["<|end|>"]),
        ("llama3", "<|end_of_text|>", ["<|eot_id|>", "<|eom_id|>"]),
        ("glm4moe", "<|endoftext|>", ["<|user|>", "<|observation|>"]),
        ("cohere2", "<|END_OF_TURN_TOKEN|>", []),  # behind another token
        ("gptoss", "<|return|>", []),  # only the last turn ends so, the ones before it with <|end|>
    ],
)
def test_end_tokens_of_the_model_count_as_the_tokenizers(name, eos_token, ends):
    assert check_template(make_tokenizer(TEMPLATES[name], eos_token=eos_token), *ends) == []


PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("name", "closing"),
    [
        ("chatml", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("gemma3", "<end_of_turn>"),
        ("phi3", "<|end|>"),
        ("deepseekv3", "<｜end▁of▁sentence｜>"),
        ("cohere", "<|END_OF_TURN_TOKEN|>"),
        ("cohere2", "<|END_OF_TURN_TOKEN|>"),
        ("glm4moe", "<|user|>"),
    ],
)
def test_template_whose_end_of_turn_is_no_end_is_warned_about(name, closing):
    """A base model with a chat template: it closes its turn, and generation continues behind it."""
    tokenizer = make_tokenizer(TEMPLATES[name], eos_token="<base-eos>")
    [message] = check_template(tokenizer)
    assert f"ends the assistant's turn with '{closing}', but generation stops only at ['<base-eos>']" in message
    assert f"Set `tokenizer.eos_token = '{closing}'`" in message
    assert check_template(tokenizer, closing) == []


def test_template_whose_end_of_turn_is_no_token_is_warned_about():
    [message] = check_template(make_tokenizer(PLAIN, eos_token="<eos>"))
    assert "ends the assistant's turn with no special token" in message
    ending = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}")
    assert check_template(make_tokenizer(ending, eos_token="<eos>")) == []


def test_a_template_is_checked_once_and_only_where_end_tokens_are_known():
    tokenizer = make_tokenizer(CHATML, eos_token="<base-eos>")
    bridge = Bridge(tokenizer, end_token_ids=[tokenizer.eos_token_id])
    assert len(warned(lambda: [bridge.text(PROMPT, INSTRUCTION), bridge.text(PROMPT, INSTRUCTION)])) == 1
    assert warned(lambda: Bridge(tokenizer).text(PROMPT, INSTRUCTION)) == []


@pytest.mark.parametrize(
    "name", ["chatml", "qwen3", "llama3", "gemma3", "phi3", "deepseekv3", "cohere", "gptoss", "glm4moe"]
)
def test_prompts_that_a_template_rendered_are_warned_about(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    rendered = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    [message] = warned(lambda: Bridge(tokenizer).text(rendered, INSTRUCTION))
    assert "as if a chat template had rendered it" in message and "Give the prompts as chat messages" in message
    assert warned(lambda: Bridge(tokenizer).text(PROMPT, INSTRUCTION)) == []
    [message] = warned(lambda: Bridge(tokenizer).text([{"role": "user", "content": rendered}], INSTRUCTION))
    assert "as if a chat template had rendered it before" in message and "turns within a turn" in message


def test_rendered_prompts_without_special_tokens_are_known_by_their_end():
    tokenizer = make_tokenizer(PLAIN, eos_token="<eos>")
    [message] = warned(lambda: Bridge(tokenizer).text("user: How much is 3 + 4?\nassistant:", INSTRUCTION))
    assert "contains 'assistant:'" in message


@pytest.mark.parametrize("template", [CHATML, PLAIN, None])
def test_plain_text_is_not_taken_for_rendered(template):
    tokenizer = make_tokenizer(CHATML)
    if template != CHATML:
        tokenizer = make_tokenizer(PLAIN, eos_token="<eos>")
    if template is None:
        tokenizer.chat_template = None
    texts = [
        "How much is 3 + 4?",
        "Q: 3 < 4 | 5 > 2?\nA:",
        "def f(x):\n    return x <= 1\n",
        "assistant",
        "<b>x</b>",
        "",
    ]
    assert warned(lambda: [Bridge(tokenizer).text(text, INSTRUCTION) for text in texts]) == []


def test_a_text_that_begins_with_the_beginning_of_sequence_is_warned_about():
    """Without a chat template too: the tokenizer writes another."""
    tokenizer = make_tokenizer(PLAIN, eos_token="<eos>")
    assert any("'<bos>'" in each for each in warned(lambda: Bridge(tokenizer).text("<bos>Solve it.", INSTRUCTION)))
