"""The extraction policy and the traps of math-verify, on invented answers; then the shared data."""

import gzip
import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest
from datasets import Dataset

from trl_score.tasks import GSM8K, Math
from trl_score.tasks.math import MathTask
from trl_score.tasks.math_grading import AT_ONCE, extract_answer, is_correct, is_readable, parse_gold


DATA = Path(os.environ.get("TRL_SCORE_DATA", Path(__file__).parents[2] / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "generations").exists(), reason="no shared data")


@pytest.fixture(scope="module")
def grader():
    task = MathTask()
    yield task
    task.close()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So x.\nFinal Answer: The final answer is $7$. I hope it is correct.", "7"),
        ("The final answer is $1$. I hope it is correct. No: The final answer is $2$. I hope it is correct.", "2"),
        (r"\boxed{3} and so on. Final Answer: The final answer is $4$. I hope it is correct.", "4"),
        ("The final answer is 12.\nThat was easy.", "12"),
        ("**Final answer is: 12**", "12"),
        ("The final answer is:\n\\[\n\\boxed{12}\n\\]", "12"),
        ("The final answer is:\n\n$$12$$", "12"),
        (r"The final answer is \( \frac{1}{2} \). I hope it is correct.", r"\frac{1}{2}"),
        ("Final Answer: The final answer is $f(x)=2x$. I hope it is correct.\n\nProblem: What is 2?", "f(x)=2x"),
        (r"Thus \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"First \boxed{1}. But then \boxed{2}", "2"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1} \text{ or } \boxed{2}$", "1, 2"),
        (r"$x = \boxed{1}$ and $x = \boxed{2}$", "1, 2"),
        (r"$x_1 = \boxed{1}$, \(x_2 = \boxed{1}\)", "x_1 =1, x_2 =1"),
        (r"\[x = \boxed{2} \quad \text{and} \quad y = \boxed{1}\]", "x =2, y =1"),
        (r"$x = \boxed{1}$ and $y = \boxed{2}$, so $x + y = \boxed{3}$", "3"),
        (r"$x = \boxed{1}. y = \boxed{2}$", "2"),
        ("$x = \\boxed{1}$\n\n$$\\boxed{1}$$", "1"),
        (r"\boxed 5 is it", "5"),
        (r"\fbox{6}", "6"),
        (r"\boxed{7} and then \boxed{8", "7"),
        ("a <<1+1=2>>2\n#### 1,234", "1,234"),
        ("The final answer is 15 gallons * 8 = <<15*8=120>>120 pints\n#### 120", "120"),
        (r"A mistake before the final answer is a common one. \boxed{80}", "80"),
        (r"$x = \boxed{3}$ or $x = \boxed{4}$", "3, 4"),
        (r"\boxed{3}. Now it may rain or not. \boxed{4}", "4"),
        (r"\boxed12 is it", "12"),
        ("It is 5. Final Answer: The final answer is $$. I hope it is correct.", ""),
        ("The answer is 3 or 4.", "3 or 4"),
        ("The answer is 3.", "3"),
        ("The answer is 3, because 1 + 2 = 3.", "3"),
        ("**Answer:** $3$", "3"),
        ("He has 3 apples and 4 pears.\nA: 7", "7"),
        ('{"reasoning": "1 + 2", "answer": "3"}', "3"),
        ("Hence $x < 2$ is our answer.", "x < 2"),
        ("So we add.\n\n3 apples", "3 apples"),
        ("We get\n\\[ x = 3 \\]", "x = 3"),
        (r"The answer is 4. No. It is \boxed{3}. The answer is clear.", "3"),
        (r"\boxed{4}. Wait. The answer is 3.", "3"),
        (r"The answer is \boxed{4}. It is not \boxed{5}.", "4"),
        (r"<think>\boxed{5}</think> I do not know", None),
        ("<think>\nThe answer is 5. Wait, let me see", None),
        ("<think>" + "I add. " * 5000 + r"\boxed{5}", None),
        ("I don't think there is an error, so the final answer is $5$. I hope it is correct.", "5"),
        (r"\boxed{4}. I do not believe that this is right so the answer is \boxed{5}.", "5"),
        (r"If $n=4$ then $2=3$, which is not the case, so the answer is $\boxed{5}$.", "5"),
        (r"$\boxed{5}$ (not 6)", "5"),
        (r"\boxed{5} (no units). \boxed{6} (not right)", "5"),
        ("The answer is 4. Let me check. So the answer is actually 5.", "5"),
        (r"\boxed{4}. No, the answer should be 5.", "5"),
        ("The answer is 4. I checked it. The answer remains 4.", "4"),
        ("Answer: She pays $18 in total.", "She pays $18 in total"),
        ("**Answer:** The total is $18.", "The total is $18"),
        ("The answer is $.50 each.", ".50 each"),
        ("I reason.\n<answer>18</answer>", "18"),
        (r"\boxed{17}. <answer> \boxed{18} </answer>", "18"),
        (r"The answer is $\boxed{\frac{3}{4}}$ or $0.75$.", r"\frac{3}{4}, 0.75"),
        ("\\boxed{7}\n\nMy earlier answer was 5, which was wrong.", "7"),
        (r"The correct answer is \boxed{7}. Note that the earlier answer, \boxed{5}, was incorrect.", "7"),
        ("**Corrected answer:** 7\n\n**Original answer:** 5", "7"),
        ("Corrected answer: \\boxed{7}\nPrevious answer: \\boxed{5}", "7"),
        ("\\boxed{7}\n\nThe previous answer was 5.", "7"),
        ("The answer is 7. In the solution above the answer was 5.", "7"),
        ("The answer is 7. A common mistake is to say the answer is 5.", "7"),
        ("The answer is 7. If we had forgotten the sign, the answer would be 5.", "7"),
        (r"\boxed{7}. Without the sign, we would get \boxed{5}.", "7"),
        ("The answer is 7. Twice the answer is 14.", "7"),
        ("The answer is 5, which is wrong. The answer is 7.", "7"),
        (r"\boxed{5}. This is incorrect. \boxed{7}", "7"),
        ("Half of the answer is 5.", None),
        ("The original answer was 5, which is correct.", "5"),
        (r"My previous answer, \boxed{5}, was correct.", "5"),
        ("My first attempt was wrong. The answer is $5$.", "5"),
        ("I made an error above, the answer is 5.", "5"),
        ("If we take 3 from 8, the answer would be 5.", "5"),
        ("Without loss of generality x > 0, and the answer would be 5.", "5"),
        (r"\boxed{5}, which is not wrong", "5"),
        ("The answer is 72 instead of 70.", "72"),
        ("The answer should be 72 (not 70).", "72"),
        ("The answer is 48 + 24 = **72** clips.", "48 + 24 = 72 clips"),
        ("***Answer: 72***", "72"),
        ("The answer is 2**3 + 4**5.", "2**3 + 4**5"),
        ("**Answer: 72** This is correct.", "72"),
        ("**The answer is 72**, as 24 + 48 is 72.", "72"),
        ("The answer is 72, as required.", "72"),
        ("I confirm that the answer is 72.", "72"),
        ("The answer is 72, confirming the solution above.", "72"),
        ("The final answer is $72$, and the solution above is correct. I hope it is correct.", "72"),
        ("The answers are $7$ and $2$.", "$7$ and $2$"),
        (r"The sum is \boxed{0}. For the solutions are $1,-1$.", "0"),
        (r"\boxed{165}. This answer equals $\binom{11}{3}.$ Is this a coincidence?", r"\binom{11}{3}"),
        ("**Final Answer:**\n\n- 72 clips", "72 clips"),
        ("Answer:\n- 7\n- 2", None),
        ("**Final Answer**\n\n72 clips\n\nLet me know if I can help.", "72 clips"),
        ("#### Final Answer\n$72$\n\nThis is all.", "72"),
        ("### The Final Answer\n\\[\n72\n\\]\nThis is all.", "72"),
        ("#### Solution\n24 + 48 = 72\n\n$72$", "72"),
        ("#### 1. Add\n24 + 48 = 72\n#### 2. Conclude\n\n72", "72"),
        ("#### 72.\n\nThis is all.", "72"),
        ("#### Anna", "Anna"),
        ("<answer>The answer is 72</answer>", "72"),
        ("<answer>x < 72</answer>", "x < 72"),
        ("<answer>70</answer> No. <answer>72</answer>", "72"),
        ("The answer is 72. ✅", "72"),
        ("The final answer is still $72$. I hope it is correct.", "72"),
        ("The final answer is therefore: $72$. I hope it is correct.", "72"),
        ("The final answer is $72$, not $70$. I hope it is correct.", "72"),
        ("The final answer is **72** (not 70), since 24 + 48 = 72. I hope it is correct.", "72"),
        (r"The final answer is, as 24 + 48 is 72, $\boxed{72}$. I hope it is correct.", "72"),
        ("The final answer is $72$, which is wrong. I hope it is correct.", ""),
        ("Answer: 72 ✅", "72"),
        ("The answer is 72<|endoftext|>", "72"),
        ("The answer is $72$.</s>\n", "72"),
        ("A: 7\nB: 2\nOne of these.", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_the_last_stated_answer_is_found(text, answer):
    assert extract_answer(text) == answer


def final(answer: str) -> str:
    return f"Final Answer: The final answer is ${answer}$. I hope it is correct."


RIGHT = [
    ("0.5", r"\frac{1}{2}"), (r"\frac12", "0.5"), (r"\dfrac{2}{4}", r"\frac{1}{2}"), ("x=5", "5"), ("5", "x=5"),
    ("1,234", "1234"), (r"1{,}234", "1234"), (r"\$5.00", "5"), ("5", r"\$5"), ("12 inches", "12"), ("21 dogs", "21"),
    (r"21\text{ dogs}", "21"), ("21", r"21\text{ dogs}"), (r"90^\circ", "90"), (r"30\%", "30"), ("b+a", "a+b"),
    (r"3\frac{1}{2}", "3.5"), ("3, 4", "4, 3"), (r"\{3,4\}", "3,4"), (r"\text{blue}", "blue"), ("Blue", r"\text{blue}"),
    ("(C)", r"\text{(C)}"), ("2^{10}", "1024"), (r"x\in(-\infty,5]", r"(-\infty,5]"), (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("5:15", r"\text{5:15}"),
    (r"5:15 \text{ P.M.}", r"\text{5:15 p.m.}"), ("41_5", "41_5"), ("41", "41_5"), ("7.", "7"), ("0.3333333", r"\frac{1}{3}"),
    ("Each of them needs 101 stamps", "101"), ("12 345", "12345"), ("x=12,345", "12345"), ("2 3/4", "2.75"), (r"2\text{ m/s}^2", "2"),
    ("$12$ dollars", "12"), ("12 m", "12"), ("€12", "12"), ("90°", "90"), (r"\text{12 cm}", "12"), ("4t", "4 t"),
    ("a + b + c", "c+b+a"), ("2+3i", "3 i + 2"), (r"1-\frac{1}{\mathrm{e}}", r"1-\frac{1}{e}"), ("3(4)", "12"),
    ("p(3) = 10", "10"), ("2+2=4", "4"), (r"x=3 \quad \text{or} \quad x=4", "3, 4"), ("x>4", r"(4,\infty)"),
    (r"\varnothing", r"\emptyset"), ("2^{-98}", r"\frac{1}{2^{98}}"), ("A, C", r"\text{A,C}"),
    ("0.3", r"30\%"), ("30", r"30\%"), (r"30\%", r"30\%"), (r"30\%", "0.3"), (r"\frac{3}{10}", r"30\%"),
    (r"6\text{ times}", "6"), ("6", r"6\text{ times}"), ("6 times a week", "6"), (r"6 \text{ quarters}", "6"), ("3 double rooms", "3"),
    (r"-2,\,3", "-2,3"), (r"x=5,\, x=-11", "5,-11"), ("5, -11", r"5,\,-11"), (r"(1,\,2)", "(1,2)"), (r"1 \text{, } 2", "1,2"),
    (r"4/3 \pi", r"\frac{4\pi}{3}"), (r"2/3 \sqrt{3}", r"\frac{2}{3}\sqrt3"), ("y = 3/4 x + 2", r"y=\frac34x+2"),
    ("1/2 + 3/2 i", r"\frac12+\frac32 i"), ("2/3 m", r"\frac23"), (r"\frac\pi3", r"\frac{\pi}{3}"), (r"\frac{\pi}{4}-\sqrt2", r"\frac \pi4 - \sqrt2"),
    (r"2007+\frac{\pi}{2}", r"2007 + \frac\pi 2"), (r"\sqrt\pi", r"\sqrt{\pi}"), (r"\frac{12}{5525}", r"\frac{12}{5,\!525}"),
    (r"1,234\pi", r"1234\pi"), (r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"),
]  # fmt: skip
WRONG = [
    (r"4/3 \pi", r"\frac{4}{3\pi}"), ("6 times as many", "6"), ("5 quarters of the cake", "5"), ("3 times 2", "2"), (r"5,\,5", "5"),
    ("6", "5"), ("Each of them needs at least 101 stamps", "101"), ("3 or 4", "3"), (r"3 \text{ or } 4", "4"), ("3, 4", "3"), (r"3 \pm 1", "4"), ("it is 3, or perhaps 4", "4"),
    ("x=3 or x=4", "4"), ("y=5", "x=5"), ("x", "4"), ("4x", "4"), ("", "0"), (r"\text{}", "0"), (r"4 \neq 5", "5"),
    ("x > 4", "4"), ("0.33", r"\frac{1}{3}"), (r"\infty", r"-\infty"), ("3.14", r"\pi"), ("(2,1)", "(1,2)"), ("(1,2)", "[1,2]"),
    (r"\text{red}", r"\text{blue}"), ("(B)", r"\text{(C)}"), ("5", "5{:}15"), (r"5:15 \text{ a.m.}", r"\text{5:15 p.m.}"),
    ("41_6", "41_5"), ("-2", r"\pm 2"), ("i", "1"), ("1/0", "0"), (r"\text{yes}", r"\text{no}"),
    (r"1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "7"), ("4", "4t"), ("6bc", "6ab"), ("a + b", "a+b+c"), (r"2\pi r", r"2\pi r h"),
    ("3 4", "7"), ("3(4)", "7"), ("3 = 4", "4"), (r"x=3 \lor x=4", "4"), (r"x=3 \\ x=4", "4"), (r"3 \text{ if so, } 4 \text{ if not}", "3"),
    (r"5\text{ cm or } \frac{7}{2}", "5"), ("2 sin x", "2"), ("12 vs 0", "0"), ("not 5", "5"), (r"5\sqrt{2}$ $0", "0"), (r"\frac{2}{7} 0", "0"), (r"\sqrt{2}$ then $0", "0"), ("3...", "3"), ("1,23", "123"),
    ("2^{-99}", "2^{-98}"), ("0.0", r"10^{-7}"), ("0.0000001", "0"), (r"\frac{3}{7^{40}}", r"\frac{2}{7^{40}}"), ("0.000333", r"\frac{1}{3000}"),
    (r"0.3\%", r"30\%"), (r"3000\%", r"30\%"), ("0.003", r"30\%"), ("3000", r"30\%"), (r"30\%", "0.003"), (r"500\%", "0.05"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_equal_answers_are_right_in_a_sentence_and_in_a_box(answer, gold):
    assert is_correct(final(answer), gold) and is_correct(rf"So it is \boxed{{{answer}}}.", gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_other_answers_and_hedges_are_wrong(answer, gold):
    assert not is_correct(final(answer), gold) and not is_correct(rf"So it is \boxed{{{answer}}}.", gold)


SEPARATORS = [
    " ", "$ $", "$; $", "$ / $", "$ vs $", "$\n$", "$ or maybe $", "$ (or $", "$ - or - $", "$ then $", "$ not $", "$... $", ": ", "; ", " | ", "$ | $",
    r"\quad ", r"\\", r"\mid ", r"\lor ", r"\vee ", r"\cup ", r"\to ", r"\Rightarrow ", r"\iff ", r"\neq ", r"\ ", "~", r"\text{ or }",
    r"\text{ vs }", r"\text{, or maybe }", ", ", " and ", r"\dots ", r" \& ", r"\in ", " = ",
]  # fmt: skip


def test_no_separator_makes_one_answer_of_two():
    """Whatever stands between them, neither of two different answers counts. math-verify by itself often takes the last."""
    answers = ["3", r"\frac{2}{7}", r"5\sqrt{2}", "(1,2)", r"12\text{ cm}"]
    scored = []
    for first, second in itertools.permutations(answers, 2):
        for text in (final(f"{first}{separator}{second}") for separator in SEPARATORS):
            scored += [(text, gold) for gold in (first, second) if is_correct(text, gold)]
    assert not scored


NOTHING_STATED = [
    ("I do not know. There are 3 unknowns.", "3"), ("1. First, let us", "1"), ("The answer is 4. It is not $5$.", "5"),
    ("So we get $x = 5", "5"), (r"The answer is $\frac{1}{2", r"\frac{1}{2}"), (r"The answer is \boxed{5", "5"), ("The answer is $5 +", "5"),
    ("5 5 5 5 5 5", "5"), ("5\n5\n5\n5", "5"), ("1\n2\n3\n4\n5", "5"), ("1. Let x be\n2.", "2"), ("- 4\n- 5", "5"), ("Step 5:", "5"),
    ("x = 3\nx = 5", "5"), ("(A)\n(B)\n(C)", r"\text{(C)}"), ("So 2 + 3 = 5 and we go on with", "5"), ("x = 5 or x = 6, hmm", "5"),
    ("Is the answer 5? I do not know.", "5"), ("the answer is 5? no.", "5"), ("The answer is not 5.", "5"), ("I don't think the answer is 5.", "5"),
    (r"It cannot be \boxed{5}.", "5"), (r"The answer isn't \boxed{5}", "5"), (r"\boxed{5} is wrong.", "5"), (r"\boxed{5} is not the answer.", "5"),
    ("The answer is 4 or 5.", "5"), ("The answer is one of 3, 4, 5.", "5"), (r"\boxed{4} or 5", "4"), (r"either 4 or \boxed{5}", "5"),
    (r"\boxed{5}\boxed{6}", "6"), ("The answer is 5. The answer is 6.", "5"), ("#### 5\n#### 6", "5"), ("The answer is 5, 6, or 7", "5"),
    ("The final answer is $$. I hope it is correct. 5", "5"), ("The answer is 5 if n is even and 6 if n is odd", "5"), ("$5$ $6$", "6"),
]  # fmt: skip


RETRACTED = [  # by what follows
    "That's wrong.", "Wait, that's incorrect.", "\n\nHmm, that's not right. Let me redo it.", "No, this is not correct.", "However, this is wrong.",
    "Oops, that isn't correct.", "This can't be right.", "That cannot be correct.", "This doesn't seem right.", "But that does not work.",
    "This answer is incorrect.", "This is not the correct answer.", "This is the wrong answer.", "Wait, it should be 41.", "No, actually, this must be $41$.", "Wait, I made a mistake.", "(This is wrong.)", "❌",
]  # fmt: skip
KEPT = [
    "This is correct.", "This is not wrong.", "It is wrong to say 41.", "This is incorrect only if n = 0.", "It is impossible for n to be larger.",
    "It is not possible to do better.", "The previous answer was wrong.", "But the first solution is incorrect.", "Note that 41 is wrong.",
    "Wait, I made a mistake in the previous attempt, not here.", "No other value works.", "This is not 41.", "It cannot be true that n > 42.",
    "Actually, it should be noted that 41 is odd.", "It should be 42 for all n.",
]  # fmt: skip


@pytest.mark.parametrize(
    "form",
    ["The answer is 42.", r"\boxed{42}", r"So $n = \boxed{42}$.", "The final answer is $42$. I hope it is correct."],
)
def test_an_answer_that_is_taken_back_is_none_and_remarks_leave_it(form):
    assert [after for after in RETRACTED if is_correct(f"{form} {after}", "42")] == []
    assert [after for after in KEPT if not is_correct(f"{form} {after}", "42")] == []


@pytest.mark.parametrize(("text", "gold"), NOTHING_STATED)
def test_a_text_that_does_not_state_the_answer_gets_nothing_for_its_numbers(text, gold):
    assert not is_correct(text, gold)


FREE = {  # what is not the gold answer, though its number is in it: (gold, answers)
    "unsolved equations": [("6", ["3x=6", "x+1=6", "x^2=6", r"\sqrt{x}=6", "x/2=6", "-x=6", "|x|=6", r"\ln x = 6", "2a+b=6", "4=6"]),
                           ("x=6", ["2x=12", "y=6", "x^2=36"]), (r"(-\infty,2)", ["2x+3<7", "2x<4"])],
    "number words": [("5", ["5 million", r"5\text{ thousand}", r"\$5 \text{ billion}", "5 dozen", "5 hundred", "5 hundredths", "5 thirds",
                            "5 squared", "5 and a half", "5-million", r"5\ \mathrm{thousand}"])],
    "relations": [("5", ["less than 5", "half of 5", "at least 5", "not 5", "twice 5", "almost 5", "up to 5", "5 or more", "a multiple of 5",
                         "the square root of 5", "negative 5", "5 more than x", "between 4 and 6", "from 1 to 5", "5 out of 6", "next to 5",
                         "one less than 5", r"\text{less than } 5", r"\le 5", "<5", "10 percent of 50", "5 if x>0", "everything but 5", "it will exceed 5", "Total = 5 = 6", r"\text{Total} = 2x = 5",
                         "5/2 days", "5/x", "a 5 or 6"]),
                  (r"x \in [1,2]", ["1 < x < 2", r"x \le 2", "(1,2)"]), (r"\begin{pmatrix}1\\8\end{pmatrix}", [r"\begin{pmatrix}1\\[6pt]2\end{pmatrix}"])],
    "lists for pairs": [("(1,2)", ["1,2", r"\{1,2\}", "1 and 2", "2,1", "[1,2]"]), ("[1,2]", ["1,2", r"\{1,2\}", "(1,2)"]),
                        ("1,2", ["(1,2)", "[1,2]"]), ("(1,2,3)", ["1,2,3", "((1,2),3)"])],
    "repetitions": [("5", ["5,5", "5, 5, 5", "5 and 5", r"\{5,5\}", "5;5"]), ("1,2", ["1,1,2"])],
    "prefixes": [("0", ["0x10", "0b10", "0x0", "0y5"])],
    "ellipses": [("1,5", [r"1,2,\ldots,5", "1, ..., 5", r"1,\dots,5"]), ("5", ["...5", r"5,\ldots", "5, …"]), ("1,2", [r"1,2,\cdots", r"\{1,2,\ldots\}"])],
    "named values": [("a=1, b=2", ["(a,b)=(2,1)", "(b,a)=(1,2)", "(2,1)", "2, 1", "a=2, b=1"]), ("x_1=1, x_2=2", ["x_1=2, x_2=1"])],
    "parts of a union": [(r"(-\infty,2)\cup(3,\infty)", [r"(-\infty,2), (3,\infty)", r"(-\infty,2) \text{ and } (3,\infty)", r"(-\infty,2)"])],
    "families of solutions": [(r"x=2 \pi k, k \in \mathbb{Z}", [r"2\pi", r"x=\pi k, k \in \mathbb{Z}", r"k \in \mathbb{Z}"])],
    "two numbers": [("34", [r"3\,4", r"3\;4", r"3\ 4"]), ("5", ["5 or 6", "5 +- 1", "5!", "5–6", "5 to 6", "5 vs 6", "5'", "5 mod 6 + 1", "5_6 7"]), ("6", [r"5\pm 1", "5 or 6", "5 = 6"])],
    "rounding": [(r"\frac13", ["0.3333", "0.33334"]), (r"\pi", ["3.14", "3.1417"]), (r"\sqrt2", ["1.4143"]), ("10000", ["10001"]), ("123456", ["123456.5"])],
    "notation": [(r"0.\overline{3}", ["0.3"]), ("101_2", ["101_3"]), (r"3\pmod 7", [r"3\pmod 5"]), ("5:15 p.m.", ["5:15 a.m.", "5:15"]), ("5", ["5 p.m."])],
}  # fmt: skip
BOTH_CASES = [  # problem, gold, right and wrong answers
    (None, "R-r", ["-r+R", "(R-r)"], ["r-R"]),
    (None, r"\frac{S_1}{s_1}", ["S_1/s_1"], ["s_1/S_1", r"\frac{s_1}{S_1}"]),
    (
        "Two circles have radii $R > r$. What is the length of the smaller one?",
        r"2\pi r",
        [r"\pi \cdot 2 r"],
        [r"2\pi R", r"2R\pi"],
    ),
    ("Factor $R^2-r^2$.", "(R-r)(R+r)", ["(R+r)(R-r)"], ["R^2-r^2", "(r-R)(R+r)"]),
    (
        r"What is its radius, in $\triangle ABC$ with sides $a$, $b$, $c$?",
        r"\frac{abc}{4S}",
        [r"\frac{bac}{4S}"],
        [r"\frac{ABC}{4S}"],
    ),
    ("Which is larger, $A$ or $a$?", "A", ["A"], []),
    ("Double $x$.", "2x", ["2X"], []),
]


@pytest.mark.parametrize(("problem", "gold", "right", "wrong"), BOTH_CASES)
def test_capital_letters_are_others_where_the_problem_has_both(problem, gold, right, wrong):
    """math-verify makes small letters of all of them."""
    assert [each for each in right if not is_correct(rf"\boxed{{{each}}}", gold, problem)] == []
    assert [each for each in wrong if is_correct(rf"\boxed{{{each}}}", gold, problem)] == []


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("The answer is not 17 but 18.", "18", "17"),
        ("The answer is not $17$, but rather $18$.", "18", "17"),
        ("The answer is not 17 but more than 18.", "", "18"),
        ("Ans: 12", "12", "1"),
        (r"The answer is $11,\! 111,\! 100$. It is large.", "11111100", "11"),
        ("That gives the speed.\n\n5 meters per second", "5", "2"),
        ("She earns\n$12 per hour", "12", "1"),
        ("We add.\n$5 + 3", "", "8"),  # a formula that is cut off
        ("The answer is that there is no solution.", r"\emptyset", "0"),
        (r"\boxed{\text{No real solutions}}", r"\emptyset", "0"),
        (r"\boxed{\varnothing}", r"\text{no solution}", r"\text{no}"),
        ("Ans. 12", "12", "1"),
        ("The answer is 12 (apples).", "12", "1"),
        ("The answer is 12 (or 13).", "", "12"),
        ("The answer is 5 (million).", "", "5"),
        ("The answer is 5 (x).", "", "5"),
    ],
)
def test_what_is_said_beside_an_answer(text, right, wrong):
    assert not is_correct(text, wrong) and (not right or is_correct(text, right))


WITHHELD = {  # the gold answer in other forms
    "solved equations": [("6", ["x=6", "f(2)=6", "a+b=6", "AB=6", r"\angle ABC = 6^\circ", r"\text{Area}=6", "x = 2+4 = 6", "6=x", "a_{10}=6"]),
                         ("(1,2)", ["(x,y)=(1,2)", "x=1, y=2"])],
    "equal equations": [("x+y=1", ["2x+2y=2", "y=1-x", "x+y-1=0", "1=y+x"]), ("6x-4y=12", ["3x-2y=6"]), ("y=2x+3", ["y-2x=3", "2x+3=y"])],
    "number words": [("5000000", ["5 million", r"5\text{ million}", r"\$5 \text{ million}", "5 million dollars"]), ("60", ["5 dozen"]), ("4", ["four", r"\mbox{four}"]),
                     ("42", ["forty-two", "forty two", "Forty-two"]), ("100", ["one hundred"]), (r"\frac12", ["one half", "half"]), (r"\frac23", ["two-thirds"])],
    "functions": [("3", [r"\log_2 8", r"\log_2(8)", "log_2(8)", r"\log_{2}8"]), (r"\frac12", [r"\sin 30^\circ", "cos(60°)", "sin(pi/6)"]), (r"\ln x", ["ln(x)", "ln x"]),
                  (r"\frac{\pi}{2}", ["pi/2", "π/2"]), (r"2\sqrt{3}", ["2sqrt(3)", "2*sqrt(3)", "2√3", r"\sqrt{12}"]), (r"\sqrt{x+1}", ["sqrt(x+1)"]),
                  (r"\arctan x", ["arctan(x)", "atan(x)", r"\operatorname{arctan}(x)"]), ("-2", [r"\sqrt[3]{-8}"]), ("e^{-x}", ["e^(-x)", "exp(-x)"])],
    "matrices": [(r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{bmatrix} 1 \\[6pt] 2 \end{bmatrix}", r"\begin{pmatrix}1\\[0.5em]2\end{pmatrix}"])],
    "articles": [(r"\text{ellipse}", ["an ellipse", r"\text{an ellipse}", "The ellipse"]), (r"\text{a circle}", ["circle"])],
    "sentences": [("12", ["It will take 12 days", "She can buy 12 pens", "= 12", r"\text{Total} = 3 \times 4 = 12", "12/day", r"\$12/\text{hour}", "twelve"]), ("18", ["eighteen"])],
    "units": [("5", [r"5\,\text{cm}", "5~cm", r"5\,\mathrm{cm}^2", "5\u2009cm", r"5\,\frac{\text{m}}{\text{s}}", r"5 \mathrm{~cm}", "5%", r"5\,\%", "5 sq. ft"]),
              ("10", ["10 m/s", "10 km/h", "10 ft/s^2", "10 square feet", r"10\text{ m}/\text{s}", "10°C", "10 USD", "10 lbs.", "10cents", "10 L", "10 kPa", "10 kWh"]),
              ("12", ["12 (apples)", r"12\text{ (apples)}", r"12\ (\text{cm}^2)"]), ("3m", ["3 m", r"3\,m"]), (r"3\pi", ["3pi square units"])],
    "subscripts": [("x_1^2", ["x^2_1", "x^{2}_{1}", "x_{1}^2"]), ("a_1+a_2", ["a_2+a_1"])],
    "repeating decimals": [(r"\frac13", [r"0.\overline{3}", r"0.\bar{3}", r"0.\dot{3}", "0.(3)", "0.333...", r".\overline{3}"]), (r"\frac16", [r"0.1\overline{6}"]), (r"0.\overline{3}", [r"\frac13"])],
    "imaginary unit": [("-1", ["i^2", r"e^{i\pi}"]), ("i-1", ["i(1+i)"]), ("2i", ["(1+i)^2"]), ("-i", ["i^3", "1/i"])],
    "five digits": [(r"\frac13", ["0.33333"]), (r"\frac23", ["0.66667", "0.66666"]), (r"\pi", ["3.1416", "3.14159"]), (r"\frac16", ["0.16667"]), (r"(\frac13,1)", ["(0.33333,1)"])],
    "moduli": [("3", [r"3\pmod{7}", r"x\equiv 3\pmod{7}", "3 (mod 7)", r"x \equiv 3 \bmod 7"]), (r"3\pmod 7", ["3", r"n\equiv3\pmod{7}"])],
    "powers of ten": [("5000", ["5e3", "5E3", r"5\times10^3", "5 x 10^3"]), ("0.001", ["1e-3", "10⁻³"])],
    "dashes": [("-5", ["–5", "−5", "—5"]), ("x-3", ["x – 3"])],
    "inequalities": [(r"(-\infty,-1] \cup [1,\infty)", [r"x\le -1 \text{ or } x\ge 1", "x<=-1 or x>=1"]), ("(1,2)", ["1<x<2", "2>x>1", "x>1 and x<2"]), ("[-3,5)", ["[-3,5["]), ("(-3,5]", ["]-3,5]"]), (r"[4,\infty)", ["x≥4", r"\{x \mid x \ge 4\}"]),
                     ("1<x<2", ["(1,2)"]), (r"x \in [1,2]", [r"1 \le x \le 2", "[1,2]"]), (r"x\in(-\infty,-1]\cup[1,\infty)", [r"x\le -1 \text{ or } x\ge 1"]),
                     (r"(-\infty,\infty)", [r"\mathbb{R}", r"\text{all real numbers}"])],
    "clock times": [(r"5 \text{ p.m.}", ["5 p.m.", "5pm", "5:00 PM", r"5\text{ pm}"]), (r"5:15 \text{ p.m.}", ["5:15 pm", r"5\!:\!15\,\text{p.m.}"])],
    "numbers": [("2.5", ["2½", "2 1/2", r"2\frac12", "5/2"]), ("1234567", ["1 234 567", r"1,\!234,567"]), ("7", [r"\text{7}", r"\mathbf{7}", "7.0", r"7\,"])],
    "lists": [("1,2", ["2 and 1", r"\{2,1\}", "x=1 or x=2"]), (r"\frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}", [r"\frac{1\pm\sqrt5}{2}"]), (r"\text{A,C}", ["A and C"]), ("2:3", ["2 to 3"])],
    "other spellings": [("120", [r"120\degree"]), ("12.5", [r"\text{\$}12.50", r"12\frac12\%", "12 1/2%"]), ("500", ["₹500"]), ("1:2", [r"1\colon 2", r"1 \text{ to } 2"]), ("10", [r"{5 \choose 2}"]),
                        ("42", [r"\bf 42", r"{\bf 42}", r"\large 42"]), (r"33\frac13", [r"33\frac{1}{3}\%"]), ("7", [r"\textcolor{red}{7}", r"\color{blue} 7", r"\underline{7}"]), ("5", [r"5\text{ N}\cdot\text{m}", r"5 \text{ kg}\cdot\text{m}^2/\text{s}"])],
    "two forms of one answer": [(r"\frac12", [r"\frac{1}{2}$ or $0.5", r"\frac{1}{2} \text{ or } 0.5", r"\frac12$ or $50\%"])],
    "marks inside of an answer": [(r"5:30 \text{ p.m.}", ["5:30$ pm$"]), ("5", [r"\mathbf{x = 5}"]), (r"(-\infty,\infty)", [r"\text{All real numbers}"])],
    "spaces and braces in text": [(r"\mathbb{Z}_2", [r"\mathbb Z_2", r"\mathbb{Z}_{2}"]), (r"\text{June 20}", [r"\text{June } 20"])],
    "families of solutions": [(r"x=2 \pi k, k \in \mathbb{Z}", [r"x = 2\pi k, k \in \mathbb{Z}", r"2k\pi, \quad k\in\mathbb Z", r"x=2k\pi"])],
    "names of values": [("42", [r"\det(A)=42", r"\|v\| = 42", r"V_{\text{max}} = 42", r"x_{\min}=42", r"\lim_{x\to 0} f(x) = 42", r"\operatorname{rank}(A)=42", r"n(A\cup B)=42", "f^{-1}(3)=42"]), (r"\frac35", [r"\cos A = \frac{3}{5}", r"\sin\angle ABC=\frac35"]), ("2x", [r"\frac{dy}{dx}=2x"])],
    "named values": [("a=1, b=2", ["(a,b)=(1,2)", "(1,2)", "1, 2", "b=2, a=1"]), ("x_1=1, x_2=2", ["x=1 or x=2", "x=1,2", "2, 1", "x_2=2, x_1=1"])],
    "unions": [(r"(-\infty,2)\cup(3,\infty)", [r"(-\infty,2) \text{ or } (3,\infty)"])],
    "bases": [("101_2", ["101_{2}", r"101_{\text{two}}", "101 base 2"])],
}  # fmt: skip


@pytest.mark.parametrize("kind", FREE)
def test_an_answer_that_only_contains_the_number_gets_nothing(kind):
    attempts = [
        (form, gold)
        for gold, answers in FREE[kind]
        for answer in answers
        for form in (final(answer), rf"\boxed{{{answer}}}")
    ]
    assert [attempt for attempt in attempts if is_correct(*attempt)] == []


@pytest.mark.parametrize("kind", WITHHELD)
def test_the_gold_answer_is_right_in_every_form(kind):
    attempts = [
        (form, gold)
        for gold, answers in WITHHELD[kind]
        for answer in answers
        for form in (final(answer), rf"\boxed{{{answer}}}")
    ]
    assert [attempt for attempt in attempts if not is_correct(*attempt)] == []


@pytest.mark.parametrize("gold", ["B", r"\text{(B)}", r"\textbf{(B)}\ 42"])
def test_an_option_of_a_multiple_choice_may_be_written_out(gold):
    right = ["B", "(B) 42", "B) 42", "B. 42", r"\textbf{(B)}\ 42", r"\text{(B)}\quad 42", "Option (B) 42"]
    wrong = ["A", "(A) 42", "(B) 42, (C) 43", "(B) or (C)", "A. B", "B and C", "(A)(B)", "(B) 42 or C", r"(B) \cap C"]
    assert [answer for answer in right if not is_correct(rf"\boxed{{{answer}}}", gold)] == []
    assert [answer for answer in wrong if is_correct(rf"\boxed{{{answer}}}", gold)] == []
    assert is_correct("The correct option is **(B) 42**.", gold) and not is_correct("The answer is (C) 42.", gold)
    assert not is_correct("The answer is (B). Let me see. So the answer is (C) 43.", gold)


def test_the_text_of_an_option_is_an_answer_too():
    assert is_correct(r"\boxed{\textbf{(B)}\ 42}", "42") and is_correct(r"\boxed{42}", r"\textbf{(B)}\ 42")
    for answer, gold in [("(B) 43", "42"), ("43", r"\textbf{(B)}\ 42"), ("(B) 43", r"\textbf{(B)}\ 42"), ("a", "a:b")]:
        assert not is_correct(rf"\boxed{{{answer}}}", gold)


REPEATED = [  # problem, gold, answers that only repeat the problem, answers that do not
    (r"Simplify $\sqrt{1331}$.", r"11\sqrt{11}", [r"\sqrt{1331}", r"\sqrt {1331}", r"\left(\sqrt{1331}\right)", r"x=\sqrt{1331}", "sqrt(1331)", "√1331",
     r"1\cdot\sqrt{1331}", r"\sqrt{1331}\text{ cm}", r"\displaystyle\sqrt{1331}", r"\sqrt[2]{1331}"], [r"11\sqrt{11}", r"\sqrt{11}\cdot 11", r"\sqrt{1331}=11\sqrt{11}"]),
    (r"Simplify $\frac{6}{8}$.", r"\frac34", [r"\frac{6}{8}", "6/8", r"\dfrac68"], ["3/4", "0.75"]),
    ("Expand $f(x)=(x+1)(x-2)$.", "x^2-x-2", ["(x+1)(x-2)", r"(x-2)\cdot(x+1)", r"(x+1)\times(x-2)", r"\left(x+1\right)\left(x-2\right)", "f(x)=(1+x)(-2+x)"], ["-2-x+x^2"]),
    (r"Compute $3 \cdot 7$.", "21", [r"3\times 7", "7*3", "(3)(7)"], ["21"]),
    ("What is 17*23?", "391", ["17*23", r"23\cdot 17"], ["391"]),
    (r"Rationalize $\frac{1}{\sqrt2}$.", r"\frac{\sqrt2}{2}", [r"1/\sqrt{2}"], [r"\sqrt2/2"]),
    (r"Compute $\sum_{k=1}^{10} k$.", "55", [r"\sum_{k=1}^{10}k"], ["55"]),
    (r"Express $0.4\overline5$ as a fraction.", r"\frac{41}{90}", [r"0.4\overline{5}"], [r"\frac{41}{90}"]),
    ("Solve $2x+3<7$.", r"(-\infty,2)", ["2x+3<7"], ["x<2"]),
    ("If $6x=12$, what is $3x$?", "6", ["6x=12"], ["6", "3x=6"]),
    ("Put $2x - y + 3 = 0$ in slope-intercept form.", "y=2x+3", ["2x-y+3=0"], ["y=3+2x"]),
    ("There are 5 dogs, $5$ cats and the point $(1,2)$.", "5", [], ["5", "5 dogs"]),
    ("He drinks 90% of it and gives 70% of the rest. How much is that, as a percentage?", "70", [], ["70", "70%", r"70\%"]),
    (r"Which of $\frac12$ and $-3$ is larger?", r"\frac12", [], [r"\frac12", "1/2", "0.5"]),
]  # fmt: skip


@pytest.mark.parametrize(("problem", "gold", "repeated", "right"), REPEATED)
def test_an_expression_of_the_problem_is_no_answer_unless_it_is_the_gold_answer(problem, gold, repeated, right):
    assert [answer for answer in repeated if is_correct(final(answer), gold, problem)] == []
    assert [answer for answer in right if not is_correct(final(answer), gold, problem)] == []


def test_a_task_hands_the_problem_to_its_reward():
    class Mine(MathTask):
        name = "mine"

        def rows(self, split):
            return Dataset.from_list([{"problem": r"Simplify $\sqrt{50}$.", "answer": r"5\sqrt2"}] * 2)

    mine = Mine()
    rows = mine.load("train")
    columns = {name: rows[name] for name in rows.column_names if name != "prompt"}
    assert mine.reward([final(r"\sqrt{50}"), final(r"5\sqrt{2}")], **columns) == [0.0, 1.0]
    mine.close()


def test_a_gold_answer_that_cannot_be_parsed_is_an_error(grader):
    for gold in ("", "  ", "$$", "3 cats or 4 dogs"):
        with pytest.raises(ValueError, match=r"gold answer .* cannot be parsed"):
            parse_gold(gold)
    with pytest.raises(ValueError, match="cannot be parsed"):
        grader.reward([final("5")], answer=[""])
    assert grader.unreadable_golds(["5", "", r"\frac{1}{2}", "3 cats or 4 dogs"]) == ["", "3 cats or 4 dogs"]


def test_a_gold_answer_is_checked_without_mathematics_unless_that_could_take_long():
    """MATH has 4,194 different ones, and to parse them all takes most of a minute."""
    quick = [
        r"\frac{3}{4}",
        "x^2 + 2x^{11}",
        r"90^\circ",
        r"\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \end{pmatrix}",
        r"\left[0, \pi\right)",
        "18,\\!000",
    ]
    slow = [
        "9!!!!",
        "2^{3^{4}}",
        "x^2^9",
        "7^{99}",
        "x^{100}",
        r"\sum_{k=1}^9 k",
        r"\binom{9}{3}",
        "12345678901",
        "(x+1)^9",
    ]
    for gold in [*quick, "3 cats", "3 cats or 4 dogs", "5 or so 6 things"]:
        assert AT_ONCE.fullmatch(gold)
    for gold in slow:
        assert not AT_ONCE.fullmatch(gold)
    for gold in [*quick, *slow[1:], "3 cats", "", "$$"]:
        try:
            parsed = bool(parse_gold(gold))
        except ValueError:
            parsed = False
        assert is_readable(gold) == parsed
    assert not is_readable("3 cats or 4 dogs")


HOSTILE = [
    r"\boxed{" * 3000, "\\boxed{" + "{" * 400 + "}" * 400 + "}", "\x00\ud800", "$" * 5000, r"\boxed{1}" * 4000,
    "final answer is " * 3000, "####" * 4000, "answer: " * 4000, "x" * 10**6, final(r"\frac{1}{" * 100 + "2" + "}" * 100),
    final(r"\sum_{k=1}^{10^{9}} k"), final("x^{99999999}+1"), final("+".join("1" * 400)), final("\\"), final("}{"), "\\boxed",
    final(r"\int_0^1 x^{x^{x}} dx"), "*" * 20_000, "`$" * 9000, "[BEGIN]" * 1000, "(" * 10_000,
]  # fmt: skip


def test_no_text_raises_or_takes_long(grader):
    started = time.monotonic()
    assert grader.reward(HOSTILE, answer=["5"] * len(HOSTILE)) == [0.0] * len(HOSTILE)
    assert time.monotonic() - started < 5 * len(HOSTILE)


def test_an_answer_that_never_ends_or_eats_memory_is_wrong_and_the_next_is_graded(caplog):
    """Powers of powers: sympy tries to write out the number, in C code that no signal interrupts."""
    task = MathTask(time_limit=1.0, memory=2 * 2**30, num_workers=2)
    tower, product = final(r"10^{10^{10^{10}}}"), final(r"\binom{10^{9}}{10^{8}}")
    attempts = [final("5"), tower, final("5"), product, final("4"), final("9999999!!!!"), final("5")]
    assert task.reward(attempts, answer=["5"] * 7) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert "could not be graded" in caplog.text and "count as wrong" in caplog.text
    task.close()


def test_grading_works_outside_the_main_thread_and_on_chat_messages(grader):
    """math-verify's own limit of time needs the main thread: it is built on a signal."""
    found = []
    completions = [[{"role": "assistant", "content": final("5")}], final("6")]
    thread = threading.Thread(target=lambda: found.append(grader.reward(completions, answer=["5", "5"])))
    thread.start()
    thread.join()
    assert found == [[1.0, 0.0]]


def test_a_worker_that_dies_is_replaced(grader):
    grader.reward([final("5")], answer=["5"])
    for worker in grader._pool._workers:
        worker.process.kill()
        worker.process.wait()
    assert grader.reward([final("5")] * 3, answer=["5"] * 3) == [1.0] * 3


# --- the shared data: labels of others, on real text ---

UNSTATED = "states no answer, but for a formula in a sentence"
ANOTHER_POLICY = {
    "ap-0005": "1000,99 with a decimal comma: here a list",
    "ap-0012": UNSTATED,
    "ap-0014": UNSTATED,
    "ap-0094": "contradicts itself: 7 = 11",
    "ap-0100": "-x > -1 is not solved for x",
    "ap-0102": "-x >= -1 is not solved for x",
    "ap-0113": UNSTATED,
    "ap-0114": UNSTATED,
    "ap-0115": UNSTATED,
    "ap-0117": UNSTATED,
    "ap-0118": UNSTATED,
    "ap-0127": "asks for two decimals; here 0.33 is not 1/3",
    "ap-0135": UNSTATED,
    "ap-0150": UNSTATED,
    "ap-0226": "two boxes with words between them: the last counts",
    "ap-0238": "two boxes with words between them, in the gold",
    "ap-0251": "a wrong label: 1 + 1/e is not 1 - 1/e",
    "ap-0262": 'boxes with an "or" between them, in the gold: parts of one answer',
    "ap-0271": "order of a list matters there",
    "ap-0287": "75 is accepted for 0.75 there",
    "ap-0311": "3245/5 is not accepted for 649 there",
    "ap-1012": "at least 101 is not 101",
}
WRONG_LABEL = {"mg-03424", "mg-03428", "mg-03431"}  # right: the published grader had cut "p.m." off the answer
STATES_NOTHING = {"mg-02003", "mg-02020", "mg-02054", "mg-02210", "mg-02451", "mg-03258", "mg-03364"}


@needs_data
def test_agreement_with_labels_on_real_model_text(grader):
    """2,102 labelled attempts: every disagreement is known. No wrong answer is accepted."""
    with gzip.open(DATA / "generations" / "math_generations.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["label"] is not None]
    verdicts = grader.grade([row["completion"] for row in rows], [row["gold"] for row in rows])
    pairs = list(zip(rows, verdicts, strict=True))
    assert len(rows) == 2102 and {row["id"] for row, verdict in pairs if verdict and not row["label"]} == WRONG_LABEL
    assert {row["id"] for row, verdict in pairs if row["label"] and not verdict} == STATES_NOTHING
    assert len(WRONG_LABEL | STATES_NOTHING) / len(rows) <= 0.01


@needs_data
def test_agreement_with_the_test_vectors_of_other_graders(grader):
    rows = [json.loads(line) for line in (DATA / "grader_vectors" / "answer_pairs.jsonl").read_text().splitlines()]
    texts = [final(row["pred"]) if row["kind"] == "answer" else row["pred"] for row in rows]
    golds = [row["gold"] if row["kind"] == "answer" else extract_answer(row["gold"]) or row["gold"] for row in rows]
    verdicts = grader.grade(texts, golds)
    different = {row["id"] for row, verdict in zip(rows, verdicts, strict=True) if verdict != row["expected"]}
    assert len(rows) == 617 and different == ANOTHER_POLICY.keys()


@needs_data
@pytest.mark.slow
def test_gold_answers_are_right_by_their_own_solutions():
    """What is loaded can be graded: the reference solution of every row scores 1."""
    for task in (Math(str(DATA)), GSM8K(str(DATA))):
        for split in ("train", "test"):
            name = f"{task.name}/{'math500' if (task.name, split) == ('math', 'test') else split}.jsonl.gz"
            with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
                solutions = {
                    row.get("problem") or row["question"]: row.get("solution") or row["answer"]
                    for row in map(json.loads, file)
                }
            rows = task.rows(split)
            texts = [solutions[problem] for problem in rows["problem"]]
            assert all(task.grade(texts, rows["answer"], rows["problem"]))
        task.close()
