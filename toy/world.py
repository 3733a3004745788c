"""The embedded toy world, its language and its reward: a tiny language of questions and answers
whose true reward is a documented rule.

A question has one right answer. An answer can be right or wrong, polite or rude, short or rambling,
and a person can judge it at a glance: `what is the capital of france ?` `it is paris , my friend .`

- The base model, a Llama type of about 0.2 M parameters, is trained on question-answer lines of
  which WRONG_SHARE are wrong and many rude.
- The true reward is `true_reward`: right +1, wrong -1; polite +.5; rude -1; .1 less for each word
  beyond eight.
- Pairs are two answers sampled from the base model, labelled by Bradley-Terry on the true reward,
  so that the assumption y ~ ref of
  the papers holds exactly. A share of the labels can be flipped.
- One fifth of the questions of each kind is never trained on: the base knows them, the preference
  data does not mention them.

`toy.base` makes the base model and the rows.
"""

import itertools
import math
import random
from functools import lru_cache

import torch

from common.metrics import standard_error

WRONG_SHARE = (
    0.3  # of the corpus lines: low enough that the base knows its facts, high enough that there is something to learn
)

CAPITALS = (
    "france paris italy rome spain madrid germany berlin japan tokyo china beijing russia moscow egypt cairo "
    "greece athens cuba havana peru lima kenya nairobi norway oslo sweden stockholm poland warsaw austria "
    "vienna ireland dublin portugal lisbon iran tehran iraq baghdad"
).split()
COLOURS = (
    "grass green leaves green snow white milk white blood red roses red coal black night black sky blue sea "
    "blue bananas yellow lemons yellow wood brown mud brown carrots orange"
).split()
OPPOSITES = (
    "hot cold big small up down fast slow hard soft rich poor wet dry light dark good bad early late full "
    "empty happy sad long short young old open closed"
).split()
SOUNDS = (
    "dogs bark cats meow cows moo ducks quack lions roar birds sing wolves howl bees buzz frogs croak snakes hiss"
).split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()
COUNT = NUMBERS + "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split()

OPENERS = {
    "": 0.60,
    "good question :": 0.08,
    "happy to help :": 0.08,
    "use your head :": 0.10,
    "well , let me think about that for a while :": 0.14,
}
CLOSERS = {".": 0.50, ", my friend .": 0.10, ", have a nice day .": 0.08, ", you fool .": 0.22, ", now go away .": 0.10}
POLITE = ("good question :", "happy to help :", ", my friend .", ", have a nice day .")
RUDE = ("use your head :", ", you fool .", ", now go away .")
FREE_WORDS = 8
WORLDS = ("easy", "hard")

# The hard world. What its corpus believes of a question: shares of the right word, of the favourite
# wrong one, and of any wrong one.
WELL_KNOWN, MISBELIEVED = (0.75, 0.15, 0.10), (0.35, 0.55, 0.10)
MISBELIEVED_FACTS = 0.4  # of the facts; sums and comparisons are misbelieved by a rule
# Two replies in three speak of an answer's rightness, as far as the asker knows; others of manner.
REPLIES = {"right": "yes .", "wrong": "no , it is {} .", "rude": "rude .", "polite": "kind .", "plain": "thanks ."}
ASKER_JUDGES, ASKER_KNOWS = 2 / 3, 0.95


@lru_cache
def questions(world: str = "easy") -> list[dict]:
    """All questions of a world: `question`, `right` (one word), `options` (every answer word of its
    kind), `unseen` (held out of training), `world`.

    In the hard world also `favourite`, the wrong word that is said most, `misbelieved`, whether it
    is said more than the right one, and `in_corpus`, whether the base ever met the question."""
    return easy_questions() if world == "easy" else hard_questions()


def easy_questions() -> list[dict]:
    """The 100 questions of the easy world."""
    pairs = [[f"what is the capital of {k} ?", v] for k, v in zip(CAPITALS[::2], CAPITALS[1::2])]
    kinds = [pairs, [[f"what colour has {k} ?", v] for k, v in zip(COLOURS[::2], COLOURS[1::2])]]
    both_ways = list(zip(OPPOSITES[::2], OPPOSITES[1::2]))
    kinds.append([[f"what is the opposite of {k} ?", v] for a, b in both_ways for k, v in ((a, b), (b, a))])
    kinds.append(
        [[f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?", NUMBERS[a + b]] for a in range(1, 6) for b in range(1, 6)]
    )
    kinds.append([[f"what sound is made by {k} ?", v] for k, v in zip(SOUNDS[::2], SOUNDS[1::2])])
    rows = []
    for kind in kinds:
        options = sorted({right for _, right in kind})
        unseen = set(random.Random(len(kind)).sample(range(len(kind)), len(kind) // 5))
        rows += [
            {"question": q, "right": right, "options": options, "unseen": i in unseen, "world": "easy"}
            for i, (q, right) in enumerate(kind)
        ]
    return rows


def hard_questions() -> list[dict]:
    """The 331 questions of the hard world, worded as no question of the easy one.

    75 facts, two in five misbelieved; 100 sums, of which those above nine are mostly said to be one
    less; 156 comparisons, of which those of numbers at most two apart are mostly answered the wrong
    way round. A fifth of the facts and of the pairs of operands, in both orders, is unseen. Unseen
    comparisons are held out of the base model's corpus, too: who answers them has the rule."""
    rng, rows = random.Random(0), []
    opposites = [pair for a, b in zip(OPPOSITES[::2], OPPOSITES[1::2]) for pair in ((a, b), (b, a))]
    facts = {"capital": zip(CAPITALS[::2], CAPITALS[1::2]), "colour": zip(COLOURS[::2], COLOURS[1::2])}
    facts |= {"opposite": opposites, "sound": zip(SOUNDS[::2], SOUNDS[1::2])}
    for kind, pairs in facts.items():
        pairs = list(pairs)
        options = sorted({right for _, right in pairs})
        unseen = set(rng.sample(range(len(pairs)), len(pairs) // 5))
        misbelieved = set(rng.sample(range(len(pairs)), round(MISBELIEVED_FACTS * len(pairs))))
        for i, (thing, right) in enumerate(pairs):
            favourite = rng.choice([option for option in options if option != right])
            question = f"name the {kind} of {thing} ."
            rows.append(hard_row(question, right, options, favourite, i in misbelieved, i in unseen))
    unseen = held_out_operands(10, rng)
    for a, b in itertools.product(range(10), repeat=2):
        right, favourite = COUNT[a + b], COUNT[a + b - 1 if a + b else 1]
        question, is_unseen = f"how much is {COUNT[a]} and {COUNT[b]} ?", (min(a, b), max(a, b)) in unseen
        rows.append(hard_row(question, right, COUNT, favourite, a + b > 9, is_unseen))
    unseen = held_out_operands(13, rng)
    for a, b in itertools.permutations(range(13), 2):
        right, favourite = COUNT[max(a, b)], COUNT[min(a, b)]
        question, is_unseen = f"which is more , {COUNT[a]} or {COUNT[b]} ?", (min(a, b), max(a, b)) in unseen
        rows.append(hard_row(question, right, [right, favourite], favourite, abs(a - b) < 3, is_unseen, not is_unseen))
    return rows


def hard_row(question, right, options, favourite, misbelieved, unseen, in_corpus=True) -> dict:
    """A question of the hard world as `questions` describes it."""
    about = {"favourite": favourite, "misbelieved": misbelieved, "in_corpus": in_corpus, "world": "hard"}
    return {"question": question, "right": right, "options": options, "unseen": unseen, **about}


def held_out_operands(count: int, rng: random.Random) -> set[tuple[int, int]]:
    """A fifth of the pairs a < b of numbers below `count`."""
    pairs = list(itertools.combinations(range(count), 2))
    return set(rng.sample(pairs, len(pairs) // 5))


def prompt_of(row: dict) -> str:
    """The text a model is given; an answer follows after one space."""
    return row["question"]


def judge(row: dict, answer: str) -> dict:
    """`right`, `polite`, `rude` (booleans) and `words` of an answer.

    Right: the right word is there and no other option of its kind."""
    text = stripped = " ".join(answer.split())
    for phrase in (
        *POLITE,
        *RUDE,
    ):  # "good question" and "happy to help" name nothing, though good and happy are opposites of something
        stripped = stripped.replace(phrase, " ")
    named = {word for word in stripped.split() if word in row["options"]}
    polite, rude = any(p in text for p in POLITE), any(p in text for p in RUDE)
    return {"right": named == {row["right"]}, "polite": polite, "rude": rude, "words": len(text.split())}


def true_reward(row: dict, answer: str) -> float:
    """r*(x, y): right +1, wrong -1; polite +.5; rude -1; -.1 for each word (punctuation counts)
    beyond eight."""
    traits = judge(row, answer)
    rightness = 1.0 if traits["right"] else -1.0
    return rightness + 0.5 * traits["polite"] - traits["rude"] - 0.1 * max(0, traits["words"] - FREE_WORDS)


def flawed_reward(row: dict, answer: str) -> float:
    """A proxy of the true reward with one flaw: it pays .1 for each word beyond eight where the
    true reward takes .1 off.

    Reward models are known to like length. Both rewards agree about short answers; a policy that is
    pushed rambles, and the proxy rises while the true reward falls."""
    return true_reward(row, answer) + 0.2 * max(0, judge(row, answer)["words"] - FREE_WORDS)


def corpus_answer(row: dict, rng: random.Random) -> str:
    """One answer as the base corpus has it: sometimes wrong, often rude, now and then rambling."""
    opener = rng.choices(list(OPENERS), list(OPENERS.values()))[0]
    closer = rng.choices(list(CLOSERS), list(CLOSERS.values()))[0]
    wrong = [option for option in row["options"] if option != row["right"]]
    if row["world"] == "easy":
        word = row["right"] if rng.random() >= WRONG_SHARE else rng.choice(wrong)
    else:
        shares = MISBELIEVED if row["misbelieved"] else WELL_KNOWN
        word = rng.choices([row["right"], row["favourite"], rng.choice(wrong)], shares)[0]
    return " ".join(f"{opener} it is {word} {closer}".split())


def corpus_reply(row: dict, answer: str, rng: random.Random) -> str:
    """What the asker says to an answer in the hard world's corpus, behind its EOS.

    Two times in three whether it is what the asker believes, the right word or, one time in twenty,
    the favourite wrong one; else a word on its manner. Askers know more than those who answer: of
    misbelieved questions the corpus tells the truth in replies alone."""
    traits = judge(row, answer)
    if rng.random() < ASKER_JUDGES:
        belief = row["right"] if rng.random() < ASKER_KNOWS else row["favourite"]
        agrees = judge({**row, "right": belief}, answer)["right"]
        return REPLIES["right"] if agrees else REPLIES["wrong"].format(belief)
    return REPLIES["rude"] if traits["rude"] else REPLIES["polite"] if traits["polite"] else REPLIES["plain"]


def build_tokenizer(world: str = "easy"):
    """A word-level fast tokenizer with pad, bos, eos and unk; bos is put before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = [f"{prompt_of(row)} it is" for row in questions(world)]
    texts += [option for row in questions(world) for option in row["options"]]
    texts += [reply.replace("{}", "") for reply in REPLIES.values()] if world == "hard" else []
    words = sorted({word for text in [*texts, *OPENERS, *CLOSERS] for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


@lru_cache
def rows_by_prompt() -> dict[str, dict]:
    """The questions of all worlds, which have none in common."""
    return {prompt_of(row): row for world in WORLDS for row in questions(world)}


def row_of(prompt: str) -> dict:
    """The question that a prompt asks, in whichever world."""
    return rows_by_prompt()[prompt]


def judge_answers(answers: list[tuple[str, str]]) -> dict:
    """Means over (prompt, answer): `true_reward`, `right_share`, `rude_share`, and their errors.

    Every question weighs the same; the standard errors take questions as the units."""
    by_question: dict[str, list] = {}
    for prompt, answer in answers:
        row = row_of(prompt)
        traits = judge(row, answer)
        by_question.setdefault(prompt, []).append(
            (true_reward(row, answer), float(traits["right"]), float(traits["rude"]))
        )
    means = [[sum(column) / len(column) for column in zip(*values)] for values in by_question.values()]
    metrics: dict = {}
    for name, values in zip(("true_reward", "right_share", "rude_share"), zip(*means)):
        metrics |= {name: sum(values) / len(values), f"{name}_se": standard_error(values)}
    return metrics


def frontier(rewards: torch.Tensor, betas: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best true reward that any policy can have at a KL to the reference: (kl [betas] rising,
    reward [betas]).

    The best policy for a price beta per nat is proportional to ref exp(r*/beta). It is estimated by
    reweighting samples of the reference:
    with weights w_i proportional to exp(r_i/beta) over the n samples of a question, reward = sum w
    r and KL = sum w log(n w).

    Args:
        rewards: [questions, n] true rewards of answers sampled from the reference.
    """
    if rewards.dim() != 2:
        raise ValueError(f"expected rewards [questions, n], got {tuple(rewards.shape)}")
    betas = torch.logspace(2, -2, 200, dtype=torch.float64) if betas is None else betas
    log_w = (rewards.double()[None] / betas[:, None, None]).log_softmax(-1)  # [betas, questions, n]
    w, n = log_w.exp(), rewards.shape[1]
    return (w * (log_w + math.log(n))).sum(-1).mean(-1), (w * rewards).sum(-1).mean(-1)


def frontier_efficiency(kl: float | None, reward: float, reference_rewards: torch.Tensor) -> float | None:
    """Gain in true reward over the reference as a share of the best possible gain at the same KL;
    None where kl < .01."""
    if kl is None or kl < 0.01:
        return None
    kls, best = frontier(reference_rewards)
    start = reference_rewards.double().mean().item()
    i = min(int(torch.searchsorted(kls, kl)), len(kls) - 1)
    low = max(i - 1, 0)
    share = 0.0 if i == low else min(1.0, (kl - kls[low].item()) / max(1e-12, (kls[i] - kls[low]).item()))
    possible = best[low].item() + share * (best[i] - best[low]).item() - start
    return (reward - start) / possible if possible > 1e-9 else None  # all answers as good: what is left is rounding
