"""
Small tasks for small language models, made from nothing but this file: short answers, an exact grader, held-out problems.

    trl-score evaluate --task examples/experiments/language_tasks.py:Facts --model HuggingFaceTB/SmolLM2-135M-Instruct ..

`Facts` asks for common knowledge. `Lists` asks for a short list, sorted, reversed or without its duplicates, `SixNumbers` for six
numbers in order. docs/language_models.md has what SCoRe does on them.
"""

import random
import re

from datasets import Dataset

from trl_score.tasks import Task


CONTINENTS = {
    "Europe": "France Spain Italy Germany Portugal Greece Poland Austria Hungary Sweden Norway Denmark Finland Ireland Belgium "
    "Switzerland Ukraine Romania Bulgaria Croatia Serbia Iceland Estonia Latvia",
    "Asia": "Japan China India Iran Iraq Syria Lebanon Thailand Vietnam Indonesia Philippines Malaysia Nepal Pakistan Bangladesh "
    "Mongolia Afghanistan",
    "Africa": "Egypt Kenya Nigeria Ghana Morocco Algeria Tunisia Libya Ethiopia Uganda Senegal Mali Sudan Zambia Angola",
    "America": "Canada Brazil Argentina Chile Peru Mexico Cuba Colombia Venezuela Ecuador Bolivia Uruguay Paraguay",
}
FACTS = {  # kind: wordings of the question, and pairs of what it asks about and a word of the answer
    "cap": (
        ["What is the capital of {}?", "Name the capital city of {}.", "Which city is the capital of {}?"],
        """France Paris|Spain Madrid|Italy Rome|Germany Berlin|Japan Tokyo|China Beijing|Russia Moscow|Egypt Cairo|India Delhi
        |Canada Ottawa|Brazil Brasilia|Argentina Buenos|Chile Santiago|Peru Lima|Mexico Mexico|Cuba Havana|Portugal Lisbon
        |Greece Athens|Turkey Ankara|Poland Warsaw|Austria Vienna|Hungary Budapest|Sweden Stockholm|Norway Oslo
        |Denmark Copenhagen|Finland Helsinki|Ireland Dublin|Belgium Brussels|Switzerland Bern|Netherlands Amsterdam
        |Ukraine Kyiv|Romania Bucharest|Bulgaria Sofia|Croatia Zagreb|Serbia Belgrade|Iran Tehran|Iraq Baghdad|Syria Damascus
        |Lebanon Beirut|Jordan Amman|Israel Jerusalem|Kenya Nairobi|Nigeria Abuja|Ghana Accra|Morocco Rabat|Algeria Algiers
        |Tunisia Tunis|Libya Tripoli|Ethiopia Addis|Uganda Kampala|Thailand Bangkok|Vietnam Hanoi|Indonesia Jakarta
        |Philippines Manila|Malaysia Kuala|Nepal Kathmandu|Pakistan Islamabad|Bangladesh Dhaka|Australia Canberra
        |Iceland Reykjavik|Colombia Bogota|Venezuela Caracas|Ecuador Quito|Bolivia Paz|Uruguay Montevideo|Paraguay Asuncion
        |Senegal Dakar|Mongolia Ulaanbaatar|Afghanistan Kabul|Estonia Tallinn|Latvia Riga|Lithuania Vilnius""",
    ),
    "cont": (
        ["On which continent is {}?", "Which continent is {} in?"],
        "|".join(f"{country} {continent}" for continent, names in CONTINENTS.items() for country in names.split()),
    ),
    "past": (
        ["What is the past tense of '{}'?", "Write the verb '{}' in the simple past."],
        """go went|see saw|eat ate|take took|give gave|come came|run ran|write wrote|drive drove|break broke|speak spoke
        |know knew|grow grew|fly flew|draw drew|sing sang|swim swam|drink drank|begin began|buy bought|bring brought
        |think thought|catch caught|teach taught|sleep slept|keep kept|feel felt|leave left|meet met|lose lost|find found
        |hold held|tell told|sell sold|say said|make made|build built|send sent|spend spent|win won|sit sat|stand stood
        |understand understood|forget forgot|get got|choose chose|wake woke|wear wore|throw threw|fall fell|rise rose
        |ride rode|steal stole|freeze froze|hide hid|bite bit|shake shook|hear heard|dig dug|feed fed""",
    ),
    "opp": (
        ["What is the opposite of '{}'?", "Which word means the opposite of '{}'?"],
        """hot cold|big small|up down|left right|day night|black white|good bad|happy sad|fast slow|old young|rich poor
        |hard soft|early late|open closed|full empty|high low|long short|light dark|wet dry|strong weak|win lose|love hate
        |true false|inside outside|above below|first last|before after|begin end|buy sell|push pull|near far|clean dirty
        |loud quiet|sweet sour|thick thin|wide narrow|cheap expensive|easy difficult|brave cowardly|winter summer
        |north south|east west|war peace|friend enemy|laugh cry|success failure|question answer|life death|asleep awake
        |sharp dull""",
    ),
    "plur": (
        ["What is the plural of '{}'?", "Write the plural form of '{}'."],
        """child children|mouse mice|foot feet|tooth teeth|man men|woman women|goose geese|knife knives|leaf leaves
        |wolf wolves|city cities|baby babies|box boxes|bus buses|potato potatoes|tomato tomatoes|hero heroes|wife wives
        |half halves|shelf shelves|story stories|party parties|berry berries|dish dishes|watch watches|class classes
        |fox foxes|loaf loaves|thief thieves|country countries|lady ladies|church churches|brush brushes|glass glasses
        |ox oxen|cactus cacti|person people|fly flies|key keys|day days""",
    ),
    "sym": (
        ["What is the chemical symbol of {}?", "What is the symbol for the element {}?"],
        """gold Au|silver Ag|iron Fe|copper Cu|lead Pb|oxygen O|hydrogen H|carbon C|nitrogen N|helium He|sodium Na
        |potassium K|calcium Ca|chlorine Cl|zinc Zn|tin Sn|mercury Hg|sulfur S|neon Ne|argon Ar|lithium Li|magnesium Mg
        |aluminum Al|silicon Si|phosphorus P|nickel Ni|uranium U|iodine I|titanium Ti|cobalt Co""",
    ),
    "young": (
        ["What is a young {} called?", "What do you call a baby {}?"],
        """dog puppy|cat kitten|cow calf|horse foal|sheep lamb|pig piglet|goat kid|hen chick|duck duckling|bear cub|lion cub
        |deer fawn|frog tadpole|kangaroo joey|goose gosling|swan cygnet|owl owlet|elephant calf|fox cub|eagle eaglet""",
    ),
}
HELD_OUT_FACTS = {  # more facts of each kind, none of them to train on
    "cap": """Slovakia Bratislava|Slovenia Ljubljana|Belarus Minsk|Armenia Yerevan|Azerbaijan Baku|Uzbekistan Tashkent|Cambodia Phnom
        |Laos Vientiane|Oman Muscat|Qatar Doha|Jamaica Kingston|Honduras Tegucigalpa|Nicaragua Managua|Albania Tirana
        |Malta Valletta|Cyprus Nicosia|Zambia Lusaka|Zimbabwe Harare|Angola Luanda|Mali Bamako|Sudan Khartoum|Somalia Mogadishu
        |Rwanda Kigali|Namibia Windhoek|Mozambique Maputo|Niger Niamey|Botswana Gaborone|Fiji Suva|Bahrain Manama
        |Liberia Monrovia""",
    "cont": """Slovakia Europe|Slovenia Europe|Albania Europe|Cambodia Asia|Laos Asia|Oman Asia|Qatar Asia|Zimbabwe Africa
        |Somalia Africa|Rwanda Africa|Namibia Africa|Panama America|Honduras America|Nicaragua America|Guatemala America
        |Haiti America""",
    "past": """become became|sink sank|ring rang|shoot shot|lend lent|lead led|mean meant|pay paid|sweep swept|swear swore
        |tear tore|spin spun|stick stuck|strike struck|swing swung|weep wept|fight fought|seek sought|bend bent|blow blew
        |lay laid|slide slid|bleed bled|forgive forgave|deal dealt|creep crept""",
    "opp": """always never|arrive depart|attack defend|alive dead|beautiful ugly|borrow lend|bottom top|heavy light|public private
        |male female|minimum maximum|positive negative|major minor|increase decrease|import export|smooth rough|ancient modern
        |absent present|forward backward|victory defeat|horizontal vertical|internal external|odd even|shallow deep""",
    "plur": """bench benches|bush bushes|wish wishes|match matches|enemy enemies|family families|army armies|cherry cherries
        |calf calves|life lives|echo echoes|boy boys|monkey monkeys|peach peaches|kiss kisses|tax taxes|puppy puppies
        |elf elves""",
    "sym": """barium Ba|boron B|bromine Br|fluorine F|manganese Mn|platinum Pt|radium Ra|chromium Cr|krypton Kr|xenon Xe
        |bismuth Bi|plutonium Pu""",
    "young": """tiger cub|whale calf|giraffe calf|zebra foal|donkey foal|leopard cub|seal pup|moose calf|toad tadpole""",
}
WORDS = """apple river stone cloud tiger bread chair green light music ocean paper queen robot sugar table uncle violin water
zebra candle dragon forest garden hammer island jungle kitten lemon monkey needle orange pencil rabbit silver tomato window
yellow bottle camera dollar engine flower guitar honey insect jacket knight ladder mirror napkin oyster planet quartz ribbon
saddle turtle""".split()


class Facts(Task):
    """
    1,054 questions of common knowledge: 432 to train on, 622 held out, no fact in both. An answer is right if it has the word
    and no "not" (a word of the answer, for capitals of two words).
    """

    name = "facts"
    correction_instruction = "Please answer my question directly, in a short sentence."

    def load(self, split):
        rows = []
        for kind, (wordings, pairs) in FACTS.items():
            facts = [pair.split() for pair in pairs.split("|")]
            held_out = [fact for fact in facts if random.Random(f"{kind} {fact[0]}").random() < 0.45]
            train = [fact for fact in facts if fact not in held_out]
            held_out += [pair.split() for pair in HELD_OUT_FACTS[kind].split("|")]
            for subject, gold in held_out if split == "test" else train:
                questions = [wording.format(subject) for wording in wordings]
                rows += [{"prompt": _chat(question, ""), "gold": gold, "level": kind} for question in questions]
        random.Random(1).shuffle(rows)
        return Dataset.from_list(rows)

    def reward(self, completions, gold, **kwargs):
        return [
            float(self.is_right(attempt[-1]["content"], word)) for attempt, word in zip(completions, gold, strict=True)
        ]

    @staticmethod
    def is_right(text: str, word: str) -> bool:
        case = re.IGNORECASE if len(word) > 2 else 0  # symbols of elements
        return not re.search(r"\bnot\b", text) and bool(re.search(rf"(?<![A-Za-z]){word}(?![A-Za-z])", text, case))


class Lists(Task):
    """
    A list of numbers or words, `sort`ed, `reverse`d, or with its `duplicates` removed. The held-out problems have other numbers
    or words than those to train on.

    Args:
        kind (`str`, *optional*, defaults to `"sort"`):
            `"sort"`, `"reverse"` or `"duplicates"`.
        length (`int`, *optional*, defaults to `5`):
            Items of a list.
        problems (`int`, *optional*, defaults to `2000`):
            Problems to train on; 500 are held out.
    """

    correction_instruction = (
        "There might be an error in the list above. Check it and write the correct list. Give only the list."
    )
    questions = {
        "sort": "Sort these numbers in ascending order: {}. Give only the sorted list.",
        "reverse": "Write these words in reverse order: {}. Give only the list.",
        "duplicates": "Remove the duplicates from this list, keep the order: {}. Give only the list.",
    }

    def __init__(self, kind: str = "sort", length: int = 5, problems: int = 2000):
        if kind not in self.questions:
            raise ValueError(f"There is no list task `kind={kind!r}`. Choose one of: {', '.join(self.questions)}.")
        self.kind, self.length, self.problems, self.name = kind, length, problems, f"lists-{kind}-{length}"

    def load(self, split):
        generator, rows, seen = random.Random(f"{self.name} {split}"), [], set()
        while len(rows) < (self.problems if split == "train" else 500):
            items = self._items(generator)
            is_held_out = random.Random(" ".join(sorted(items))).random() < 0.3
            if is_held_out == (split == "test") and tuple(items) not in seen:
                seen.add(tuple(items))
                question = self.questions[self.kind].format(", ".join(items))
                rows.append({"prompt": _chat(question), "gold": " ".join(self._solution(items))})
        return Dataset.from_list(rows)

    def _items(self, generator: random.Random) -> list[str]:
        if self.kind == "sort":
            return [str(number) for number in generator.sample(range(1, 100), self.length)]
        if self.kind == "reverse":
            return generator.sample(WORDS, self.length)
        few = generator.sample(WORDS, max(self.length - 2, 1))
        return [generator.choice(few) for _ in range(self.length)]

    def _solution(self, items: list[str]) -> list[str]:
        if self.kind == "sort":
            return sorted(items, key=int)
        return items[::-1] if self.kind == "reverse" else list(dict.fromkeys(items))

    def answer(self, text, **row):
        pattern = r"\d+" if self.kind == "sort" else r"[a-z]+"
        return " ".join(re.findall(pattern, text.lower())) or None

    def reward(self, completions, gold, **kwargs):
        return [
            float(self.answer(attempt[-1]["content"]) == right)
            for attempt, right in zip(completions, gold, strict=True)
        ]


class SixNumbers(Lists):
    """Six numbers to sort. The question says how to write the answer, so that few errors are errors of form."""

    questions = {
        "sort": "Sort these numbers in ascending order: {}. Answer with the numbers only, separated by commas."
    }

    def __init__(self):
        super().__init__("sort", length=6)


def _chat(question: str, system: str | None = None) -> list[dict]:
    """The prompt; `system=None` leaves the system turn to the chat template."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": question}]
