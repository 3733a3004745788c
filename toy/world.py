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


@lru_cache
def questions() -> list[dict]:
    """All 100 questions: `question`, `right` (one word), `options` (every answer word of its kind),
    `unseen` (held out of training)."""
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
            {"question": q, "right": right, "options": options, "unseen": i in unseen}
            for i, (q, right) in enumerate(kind)
        ]
    return rows


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
    word = row["right"] if rng.random() >= WRONG_SHARE else rng.choice([o for o in row["options"] if o != row["right"]])
    return " ".join(f"{opener} it is {word} {closer}".split())


def build_tokenizer():
    """A word-level fast tokenizer with pad, bos, eos and unk; bos is put before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    texts = [f"{prompt_of(row)} it is" for row in questions()]
    texts += [option for row in questions() for option in row["options"]]
    words = sorted({word for text in [*texts, *OPENERS, *CLOSERS] for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def row_of(prompt: str) -> dict:
    """The question that a prompt asks."""
    return next(row for row in questions() if prompt_of(row) == prompt)


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
