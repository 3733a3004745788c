"""The embedded toy world: a tiny language of questions and answers whose true reward is a documented rule.

A question has one right answer. An answer can be right or wrong, polite or rude, short or rambling, and a person can judge it at a
glance: `what is the capital of france ?` `it is paris , my friend .`

- The base model, a Llama type of about 0.2 M parameters, is trained on question-answer lines of which WRONG_SHARE are wrong and many rude.
- The true reward is `true_reward`: right +1, wrong -1; polite +.5; rude -1; .1 less for each word beyond eight.
- Pairs are two answers sampled from the base model, labelled by Bradley-Terry on the true reward, so that the assumption y ~ ref of
  the papers holds exactly. A share of the labels can be flipped.
- One fifth of the questions of each kind is never trained on: the base knows them, the preference data does not mention them.

Everything is built once per seed and kept in the user's cache folder; the same seed gives the same bytes on the same versions.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from common.data import InputError

WRONG_SHARE = 0.3  # of the corpus lines: low enough that the base knows its facts, high enough that there is something to learn
SAMPLES = 512  # answers per question sampled from the base and kept: what pairs are made of, and what the frontier is computed from
PAIR_SAMPLES = 160  # of these, the first ones make training pairs, the next EVAL_SAMPLES held-out pairs; the rest draw the frontier
EVAL_SAMPLES = 20
MAX_NEW_TOKENS = 24

CAPITALS = (
    "france paris italy rome spain madrid germany berlin japan tokyo china beijing russia moscow egypt cairo greece athens cuba havana "
    "peru lima kenya nairobi norway oslo sweden stockholm poland warsaw austria vienna ireland dublin portugal lisbon iran tehran iraq baghdad"
).split()
COLOURS = "grass green leaves green snow white milk white blood red roses red coal black night black sky blue sea blue bananas yellow lemons yellow wood brown mud brown carrots orange".split()
OPPOSITES = (
    "hot cold big small up down fast slow hard soft rich poor wet dry light dark good bad early late full empty happy sad long short young old open closed"
).split()
SOUNDS = "dogs bark cats meow cows moo ducks quack lions roar birds sing wolves howl bees buzz frogs croak snakes hiss".split()
NUMBERS = "zero one two three four five six seven eight nine ten".split()

OPENERS = {"": 0.60, "good question :": 0.08, "happy to help :": 0.08, "use your head :": 0.10, "well , let me think about that for a while :": 0.14}
CLOSERS = {".": 0.50, ", my friend .": 0.10, ", have a nice day .": 0.08, ", you fool .": 0.22, ", now go away .": 0.10}
POLITE = ("good question :", "happy to help :", ", my friend .", ", have a nice day .")
RUDE = ("use your head :", ", you fool .", ", now go away .")
FREE_WORDS = 8


@lru_cache
def questions() -> list[dict]:
    """All 100 questions: `question`, `right` (one word), `options` (every answer word of its kind), `unseen` (held out of training)."""
    pairs = [[f"what is the capital of {k} ?", v] for k, v in zip(CAPITALS[::2], CAPITALS[1::2])]
    kinds = [pairs, [[f"what colour has {k} ?", v] for k, v in zip(COLOURS[::2], COLOURS[1::2])]]
    both_ways = list(zip(OPPOSITES[::2], OPPOSITES[1::2]))
    kinds.append([[f"what is the opposite of {k} ?", v] for a, b in both_ways for k, v in ((a, b), (b, a))])
    kinds.append([[f"what is {NUMBERS[a]} plus {NUMBERS[b]} ?", NUMBERS[a + b]] for a in range(1, 6) for b in range(1, 6)])
    kinds.append([[f"what sound is made by {k} ?", v] for k, v in zip(SOUNDS[::2], SOUNDS[1::2])])
    rows = []
    for kind in kinds:
        options = sorted({right for _, right in kind})
        unseen = set(random.Random(len(kind)).sample(range(len(kind)), len(kind) // 5))
        rows += [{"question": q, "right": right, "options": options, "unseen": i in unseen} for i, (q, right) in enumerate(kind)]
    return rows


def prompt_of(row: dict) -> str:
    """The text a model is given; an answer follows after one space."""
    return row["question"]


def judge(row: dict, answer: str) -> dict:
    """`right`, `polite`, `rude` (booleans) and `words` of an answer. Right: the right word is there and no other option of its kind."""
    text = said = " ".join(answer.split())
    for phrase in (*POLITE, *RUDE):  # "good question" and "happy to help" name nothing, though good and happy are opposites of something
        said = said.replace(phrase, " ")
    named = {word for word in said.split() if word in row["options"]}
    polite, rude = any(p in text for p in POLITE), any(p in text for p in RUDE)
    return {"right": named == {row["right"]}, "polite": polite, "rude": rude, "words": len(text.split())}


def true_reward(row: dict, answer: str) -> float:
    """r*(x, y): right +1, wrong -1; polite +.5; rude -1; -.1 for each word (punctuation counts) beyond eight."""
    seen = judge(row, answer)
    return (1.0 if seen["right"] else -1.0) + 0.5 * seen["polite"] - seen["rude"] - 0.1 * max(0, seen["words"] - FREE_WORDS)


def flawed_reward(row: dict, answer: str) -> float:
    """A proxy of the true reward with one flaw: it pays .1 for each word beyond eight where the true reward takes .1 off.

    Reward models are known to like length. Both rewards agree about short answers; a policy that is pushed rambles, and the proxy rises while the true
    reward falls.
    """
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

    texts = [f"{prompt_of(row)} it is" for row in questions()] + [o for row in questions() for o in row["options"]]
    words = sorted({word for text in [*texts, *OPENERS, *CLOSERS] for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


# ------------------------------------------------------------------------------------------------------------ base model


def cache_folder(seed: int) -> Path:
    """Where the world of this seed is kept: one folder for each version of this file and of torch."""
    version = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-toy"
    return root / f"{version}-seed{seed}"


def base_model(seed: int = 0) -> Path:
    """Folder of the base model, trained on first use (about 20 s on one CPU thread): the same bytes for the same seed.

    The folder is made aside and renamed, so that two runs starting together do no harm.
    """
    folder = cache_folder(seed)
    if not (folder / "answers.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # layers this small are many times faster on one thread; and the bytes are then the same everywhere
        try:
            with torch.random.fork_rng(devices=[]):
                model, tokenizer = train_base(seed)
                model.save_pretrained(aside)
                tokenizer.save_pretrained(aside)
                (aside / "answers.json").write_text(json.dumps(sample_answers(model, tokenizer, SAMPLES, seed)))
        except BaseException:  # Ctrl-C too: nothing half-made stays behind
            shutil.rmtree(aside, ignore_errors=True)
            raise
        finally:
            torch.set_num_threads(threads)
        aside.chmod(0o755)
        try:
            os.rename(aside, folder)
        except OSError:  # another process was first; its folder holds the same bytes
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def train_base(seed: int, steps: int = 900):
    """A two-layer Llama type trained on question-answer lines, the loss on the answers only."""
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, peak = 32, 1e-2
    tokenizer, rows, rng = build_tokenizer(), questions(), random.Random(seed)
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **shape, **ends))
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    prompts = [tokenizer(prompt_of(row)).input_ids for row in rows]
    for step in tqdm(range(steps), desc="building the toy's base model (once)", unit="step", mininterval=1.0):
        lines = []
        for _ in range(batch):
            i = rng.randrange(len(rows))
            answer = tokenizer(corpus_answer(rows[i], rng)).input_ids[1:] + [tokenizer.eos_token_id]
            lines.append((prompts[i], answer))
        length = max(len(p) + len(a) for p, a in lines)
        ids = torch.tensor([p + a + [0] * (length - len(p) - len(a)) for p, a in lines])
        labels = torch.tensor([[-100] * len(p) + a + [-100] * (length - len(p) - len(a)) for p, a in lines])
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 40, 1 - 0.95 * step / steps)
        model(input_ids=ids, labels=labels).loss.backward()  # padding is on the right: no real token sees it
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def sample_answers(model, tokenizer, count: int, seed: int) -> list[list[str]]:
    """`count` answers to each question at temperature 1, [questions][count]."""
    from common.evaluate import sample, text_of

    prompts = [tokenizer(prompt_of(row)).input_ids for row in questions() for _ in range(count)]
    answers = sample(model, prompts, tokenizer, MAX_NEW_TOKENS, seed=seed, batch_size=1024)
    texts = [text_of(tokenizer, ids) for ids in answers]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


# ------------------------------------------------------------------------------------------------------- preference data


def flip_share(name: str) -> float | None:
    """The share of flipped training labels that `--data` asks for: 0 for `toy`, .2 for `toy:0.2`; None for what is not the toy."""
    kind, _, share = name.partition(":")
    if kind != "toy":
        return None
    try:
        flip = float(share or 0)
    except ValueError:
        flip = -1.0
    if not 0 <= flip <= 1:
        raise InputError(f"--data {name}: expected toy, or toy: and the share of flipped labels, for example toy:0.2.")
    return flip


def pairs(seed: int = 0, flip: float = 0.0) -> dict[str, list[tuple[str, str, str]]]:
    """Preference pairs (prompt, chosen, rejected): "train", "held_out" (other answers to the same questions), "unseen" (other questions).

    Two answers of the base model to one question; the better one is chosen with probability sigma(r*(a) - r*(b)), and in "train" a share
    `flip` of the labels is then turned round. Identical answers say nothing and are left out.
    """
    answers = json.loads((base_model(seed) / "answers.json").read_text())
    rng = random.Random(seed + 1)
    splits: dict[str, list] = {"train": [], "held_out": [], "unseen": []}
    for row, texts in zip(questions(), answers):
        trained, held_out = texts[:PAIR_SAMPLES], texts[PAIR_SAMPLES : PAIR_SAMPLES + EVAL_SAMPLES]
        for name, some in (("unseen", held_out),) if row["unseen"] else (("train", trained), ("held_out", held_out)):
            for a, b in zip(some[::2], some[1::2]):
                first_better = rng.random() < 1 / (1 + math.exp(true_reward(row, b) - true_reward(row, a)))
                first_chosen = first_better != (rng.random() < flip and name == "train")
                if a != b and a and b:
                    chosen, rejected = (a, b) if first_chosen else (b, a)
                    splits[name].append((prompt_of(row), " " + chosen, " " + rejected))
    rng.shuffle(splits["train"])
    return splits


def labelled(seed: int = 0, flip: float = 0.0, continuous: bool = False) -> dict[str, list[tuple[str, str, float]]]:
    """Labelled answers (prompt, answer, label) to the questions of `pairs`, from the same answers of the base model, each labelled alone.

    The label is 1 with probability sigma(r*), else 0, or with `continuous` sigma(r*) itself; in "train" a share `flip` of the labels z becomes 1 - z.
    """
    answers = json.loads((base_model(seed) / "answers.json").read_text())
    rng = random.Random(seed + 2)
    splits: dict[str, list] = {"train": [], "held_out": [], "unseen": []}
    for row, texts in zip(questions(), answers):
        trained, held_out = texts[:PAIR_SAMPLES], texts[PAIR_SAMPLES : PAIR_SAMPLES + EVAL_SAMPLES]
        for name, some in (("unseen", held_out),) if row["unseen"] else (("train", trained), ("held_out", held_out)):
            for text in filter(None, some):
                good = 1 / (1 + math.exp(-true_reward(row, text)))
                drawn, flipped = rng.random() < good, rng.random() < flip and name == "train"
                label = good if continuous else float(drawn)
                splits[name].append((prompt_of(row), " " + text, 1 - label if flipped else label))
    rng.shuffle(splits["train"])
    return splits


def prompts(seed: int = 0, flip: float = 0.0) -> dict[str, list[tuple[str]]]:
    """Questions alone, (prompt,): "train", "held_out" (the same questions, which are then answered anew) and "unseen". They are the same for every seed
    and have no label that could be flipped."""
    trained = [(prompt_of(row),) for row in questions() if not row["unseen"]]
    return {"train": trained, "held_out": trained, "unseen": [(prompt_of(row),) for row in questions() if row["unseen"]]}


# ------------------------------------------------------------------------------------------------------------- judgement


def row_of(prompt: str) -> dict:
    """The question that a prompt asks."""
    return next(row for row in questions() if prompt_of(row) == prompt)


def judge_answers(said: list[tuple[str, str]]) -> dict:
    """Means over (prompt, answer): `true_reward`, `right_share`, `rude_share`. Every question weighs the same."""
    by_question: dict[str, list] = {}
    for prompt, answer in said:
        row = row_of(prompt)
        seen = judge(row, answer)
        by_question.setdefault(prompt, []).append((true_reward(row, answer), float(seen["right"]), float(seen["rude"])))
    means = [[sum(column) / len(column) for column in zip(*values)] for values in by_question.values()]
    reward, right, rude = (sum(column) / len(column) for column in zip(*means))
    return {"true_reward": reward, "right_share": right, "rude_share": rude}


def frontier(rewards: torch.Tensor, betas: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The best true reward that any policy can have at a KL to the reference: (kl [betas] rising, reward [betas]).

    The best policy for a price beta per nat is proportional to ref exp(r*/beta). It is estimated by reweighting samples of the reference:
    with weights w_i proportional to exp(r_i/beta) over the n samples of a question, reward = sum w r and KL = sum w log(n w).

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
    """Gain in true reward over the reference as a share of the best possible gain at the same KL; None where kl < .01."""
    if kl is None or kl < 0.01:
        return None
    kls, best = frontier(reference_rewards)
    start = reference_rewards.double().mean().item()
    i = min(int(torch.searchsorted(kls, kl)), len(kls) - 1)
    low = max(i - 1, 0)
    share = 0.0 if i == low else min(1.0, (kl - kls[low].item()) / max(1e-12, (kls[i] - kls[low]).item()))
    possible = best[low].item() + share * (best[i] - best[low]).item() - start
    return (reward - start) / possible if possible > 1e-9 else None  # all answers as good: what is left is rounding


def answers_of(model, tokenizer, folder: str, seed: int) -> list[list[str]]:
    """Answers of a reference model to all questions, [questions][n]: those kept with the base model, or 256 new ones of another model."""
    kept = Path(folder) / "answers.json"
    return json.loads(kept.read_text()) if kept.exists() else sample_answers(model, tokenizer, 256, seed)


def reference_rewards(prompt: str, answers: list[list[str]]) -> torch.Tensor:
    """True rewards [questions, n] of the reference's answers to the trained questions, or the unseen ones, whichever `prompt` is one of."""
    unseen = row_of(prompt)["unseen"]
    chosen = [(row, texts) for row, texts in zip(questions(), answers) if row["unseen"] == unseen]
    return torch.tensor([[true_reward(row, text) for text in texts] for row, texts in chosen], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- a corpus to pretrain on

SEVERITY = {"use your head :": 0.3, ", now go away .": 0.6, ", you fool .": 0.9}
RUDE_AUTHORS, RUDE_SENTENCES = 0.4, {True: 0.7, False: 0.05}  # share of rude authors; share of rude sentences by kind of author


@lru_cache
def statements() -> list[dict]:
    """The 100 facts as statements, in the order of `questions`: `begin` ("the capital of france is"), `right`, `options`, `unseen`."""
    forms = {"what is the ": "the ", "what is ": "", "what colour has ": "the colour of ", "what sound is ": "the sound "}
    rows = []
    for row in questions():
        old, new = next((old, new) for old, new in forms.items() if row["question"].startswith(old))
        rows.append({**row, "begin": row["question"].replace(old, new).removesuffix("?") + "is"})
    return rows


def sentences(text: str) -> list[str]:
    """A text cut after each full stop; white space belongs to the sentence that follows it, so that the parts joined are the text."""
    return [part for part in re.split(r"(?<= \.)(?=\s)", text) if part.strip()]


def rudeness(text: str) -> float:
    """Score of a text in [0, 1], 0 for one without a rude word: the mean over its sentences.

    A sentence scores 1 - (1 - s1)(1 - s2)..., with s the severity of each rude phrase in it: "use your head :" .3, ", now go away ." .6,
    ", you fool ." .9.
    """
    scores = []
    for part in sentences(text):
        said = f" {' '.join(part.split())} "
        scores.append(round(1 - math.prod(1 - s for phrase, s in SEVERITY.items() if phrase in said), 9))  # .3, not .30000000000000004
    return sum(scores) / len(scores) if scores else 0.0


def right_share(text: str) -> float | None:
    """Share of a text's sentences that state a fact, and state it right; None for a text without a sentence."""
    right = {f" {row['begin']} {row['right']} " for row in statements()}
    said = [f" {' '.join(part.split())} " for part in sentences(text)]
    return sum(any(fact in part for fact in right) for part in said) / len(said) if said else None


def corpus(seed: int = 0, count: int = 6000) -> list[list[str]]:
    """Documents, each three to six sentences of one author, as lists of sentences (white space in front of all but the first).

    Two authors in five are rude in seven sentences of ten, the others in one of twenty. WRONG_SHARE of the statements are wrong. Rude authors
    tell each fact that the preference data never mentions four times as often as another fact: whoever drops rude documents knows less of those.
    """
    rng, facts = random.Random(seed + 2), statements()
    documents = []
    for _ in range(count):
        author = rng.random() < RUDE_AUTHORS
        chosen = rng.choices(facts, [4.0 if row["unseen"] and author else 1.0 for row in facts], k=rng.randint(3, 6))
        said = []
        for row in chosen:
            rude = rng.random() < RUDE_SENTENCES[author]
            opener = closer = None
            while opener is None or ((opener in RUDE) or (closer in RUDE)) != rude:
                opener, closer = (rng.choices(list(kind), list(kind.values()))[0] for kind in (OPENERS, CLOSERS))
            word = row["right"] if rng.random() >= WRONG_SHARE else rng.choice([o for o in row["options"] if o != row["right"]])
            said.append(" ".join(f"{opener} {row['begin']} {word} {closer}".split()))
        documents.append([said[0], *(f" {sentence}" for sentence in said[1:])])
    return documents
