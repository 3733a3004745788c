"""The toy's base models and the rows that are made of their answers: pairs, labels, prompts.

    python -m toy.base                                     what the frozen world of seed 0 is like
    python -m toy.base --world hard --seed 7               builds another one in the user's cache
    python -m toy.base --world hard --seed 0 --freeze      builds anew what toy/worlds/ holds

Seeds 0 to 4 of both worlds are frozen; toy/frozen.py tells how. Any other is built at its first
use: the same seed gives the same bytes on the same versions.
"""

import hashlib
import math
import os
import random
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common import InputError, first_line, generate
from common.generate import decode_completion, is_tiny, sample
from common.metrics import auc
from toy import frozen
from toy.world import (
    build_tokenizer,
    corpus_answer,
    corpus_reply,
    frontier_efficiency,
    judge,
    judge_answers,
    prompt_of,
    questions,
    row_of,
    true_reward,
)

# Answers to each question that are kept: pairs are made of them, the frontier is drawn from them.
SAMPLES = {"easy": 512, "hard": 256}
PAIR_SAMPLES = {"easy": 160, "hard": 40}  # the first of these make training pairs
EVAL_SAMPLES = 20  # and the next ones held-out pairs
MAX_NEW_TOKENS = 24
RECIPES = {"easy": {"steps": 900, "peak": 1e-2}, "hard": {"steps": 4000, "peak": 5e-3}}  # of the base model's training
MODELS = {"toy": "easy", "toy:easy": "easy", "toy:hard": "hard"}  # what --model may name


# -- the base model


def cache_folder(seed: int, world: str = "easy") -> Path:
    """Where a world that is not frozen is kept: one folder for each version of the code that makes
    it and of torch."""
    sources = [Path(__file__).with_name("world.py"), Path(__file__), Path(generate.__file__)]
    code = b"".join(path.read_bytes() for path in sources)
    version = hashlib.sha256(code + torch.__version__.encode()).hexdigest()[:12]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "preference-toy"
    return root / f"{version}-{world}-seed{seed}"


def base_model(seed: int = 0, world: str = "easy") -> Path:
    """Folder of a base model and its answers: the frozen one of the seed, else one that is trained
    on first use (half a minute on one CPU thread, the hard world's two) and kept.

    Raises InputError where a frozen world is damaged, or nothing can be written in the cache."""
    if folder := frozen.frozen_folder(world, seed):
        return folder
    folder = cache_folder(seed, world)
    if frozen.damage(folder):  # or not there at all
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(dir=folder.parent))
        except OSError as error:
            cause = f"cannot be written ({first_line(error)}); XDG_CACHE_HOME names another folder"
            raise InputError(f"The toy's base model is kept in {folder.parent}, which {cause}.") from None
        build(aside, seed, world)
        frozen.move_into_place(aside, folder)
    return folder


def build(aside: Path, seed: int, world: str) -> None:
    """Makes a world in an empty folder, which goes again where it is not finished: two that start
    together do no harm, and an interrupted one leaves nothing behind."""
    threads = torch.get_num_threads()
    # Each of several processes builds the whole: their shares would be another sampling.
    several = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK") if name in os.environ}
    torch.set_num_threads(1)  # many times faster for layers this small; and the bytes are the same everywhere
    try:
        with torch.random.fork_rng(devices=[]):
            model, tokenizer = train_base(seed, world)
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            frozen.write_answers(aside, sample_answers(model, tokenizer, SAMPLES[world], seed, world))
        for path in aside.iterdir():
            path.chmod(0o644)
        aside.chmod(0o755)
        frozen.write_about(aside, world, seed)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        torch.set_num_threads(threads)
        os.environ.update(several)


def train_base(seed: int, world: str = "easy", steps: int | None = None):
    """A two-layer Llama type trained on question-answer lines, in the hard world with the asker's
    reply behind the answer's EOS; the loss is on all but the question."""
    from tqdm import tqdm
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, peak, steps = 32, RECIPES[world]["peak"], steps or RECIPES[world]["steps"]
    tokenizer, rng = build_tokenizer(world), random.Random(seed)
    rows = [row for row in questions(world) if row.get("in_corpus", True)]
    torch.manual_seed(seed)
    shape = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    ends = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, tie_word_embeddings=True, **shape, **ends)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    prompts = [tokenizer(prompt_of(row)).input_ids for row in rows]
    vocabulary, eos = tokenizer.get_vocab(), tokenizer.eos_token_id
    what = f"building the toy's base model, {world}, seed {seed} (once)"
    for step in tqdm(range(steps), desc=what, unit="step", mininterval=1.0):
        lines = []
        for _ in range(batch):
            i = rng.randrange(len(rows))
            texts = [corpus_answer(rows[i], rng)]
            if world == "hard":
                texts.append(corpus_reply(rows[i], texts[0], rng))
            answer = [id for text in texts for id in (*map(vocabulary.get, text.split()), eos)]
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


def sample_answers(model, tokenizer, count: int, seed: int, world: str = "easy") -> list[list[str]]:
    """`count` answers to each question at temperature 1, [questions][count]."""
    prompts = [tokenizer(prompt_of(row)).input_ids for row in questions(world)]
    answers = sample(model, prompts, tokenizer, MAX_NEW_TOKENS, seed=seed, n=count)
    texts = [decode_completion(tokenizer, ids) for ids in answers]
    return [texts[i : i + count] for i in range(0, len(texts), count)]


# -- rows


def settings_of(data: str) -> dict | None:
    """What `--data` asks of the toy, as arguments of `pairs`: world, flip, temperature; None for
    what is not the toy.

    Behind `toy` stand, each after a colon, easy or hard, the share of flipped training labels, and
    temperature=T. InputError for anything else."""
    kind, *parts = data.split(":")
    if kind != "toy":
        return None
    parts = list(filter(None, parts))
    given = [setting_of(part) for part in parts]
    settings = dict(filter(None, given))
    if len(settings) < len(parts):
        raise InputError(
            f"--data {data}: expected toy, or behind it, each after a colon and once, easy or hard, the share of "
            "flipped labels and temperature=T, for example toy:0.2 or toy:hard:temperature=0.5."
        )
    return {"world": "easy", "flip": 0.0, "temperature": 1.0} | settings


def setting_of(part: str) -> tuple[str, str | float] | None:
    """One part of such a name as an argument of `pairs` and its value; None where it is none."""
    if part in SAMPLES:
        return "world", part
    name, number = part.split("=", 1) if "=" in part else ("flip", part)
    try:
        value = float(number)
    except ValueError:
        return None
    ranges = {"flip": 0 <= value <= 1, "temperature": 0 <= value < math.inf}
    return (name, value) if ranges.get(name) else None


def model_for(model: str, data: str) -> str:
    """`--model toy` as the base model of the world that `--data` names: toy:hard is another.

    InputError where a world's base model is given the data of the other, whose words it lacks."""
    settings = settings_of(data)
    if model not in MODELS or settings is None or MODELS[model] == settings["world"]:
        return model
    if model != "toy":
        raise InputError(f"--model {model}: another world than that of --data {data}; --model toy takes the right one.")
    return f"toy:{settings['world']}"


def check_tokenizer(data: str, tokenizer) -> None:
    """InputError where `--data` is a world with words that the model's tokenizer does not know: an
    earlier run's in the other world."""
    settings = settings_of(data)
    if settings and tokenizer.unk_token_id is not None:
        texts = [f"{prompt_of(row)} {row['right']}" for row in questions(settings["world"])]
        unknown = next((text for text in texts if tokenizer.unk_token_id in tokenizer(text).input_ids), None)
        if unknown:
            raise InputError(f"--data {data}: the model's tokenizer does not know all words of {unknown!r}.")


def chance(gap: float, temperature: float) -> float:
    """sigma(gap / temperature): how likely the better answer is preferred, `gap` its lead in true
    reward; at temperature 0 always."""
    if temperature == 0:
        return (gap > 0) + 0.5 * (gap == 0)
    return 1 / (1 + math.exp(min(-gap / temperature, 700.0)))


def split_answers(seed: int, world: str):
    """(split, question, answers) for each question and split that has it: "train", "held_out"
    (other answers to the same questions), "unseen" (other questions)."""
    first, last = PAIR_SAMPLES[world], PAIR_SAMPLES[world] + EVAL_SAMPLES
    for row, texts in zip(questions(world), frozen.read_answers(base_model(seed, world))):
        if row["unseen"]:
            yield "unseen", row, texts[first:last]
        else:
            yield "train", row, texts[:first]
            yield "held_out", row, texts[first:last]


def pairs(
    seed: int = 0, flip: float = 0.0, world: str = "easy", temperature: float = 1.0
) -> dict[str, list[tuple[str, str, str]]]:
    """Preference pairs (prompt, chosen, rejected) in the splits of `split_answers`.

    Two answers of the base model to one question; the better one is chosen with probability
    sigma((r*(a) - r*(b)) / temperature), and in "train" a share `flip` of the labels is then turned
    round. Identical answers say nothing and are left out."""
    rng = random.Random(seed + 1)
    splits: dict[str, list] = {"train": [], "held_out": [], "unseen": []}
    for name, row, some in split_answers(seed, world):
        for a, b in zip(some[::2], some[1::2]):
            first_better = rng.random() < chance(true_reward(row, a) - true_reward(row, b), temperature)
            first_chosen = first_better != (rng.random() < flip and name == "train")
            if a != b and a and b:
                chosen, rejected = (a, b) if first_chosen else (b, a)
                splits[name].append((prompt_of(row), " " + chosen, " " + rejected))
    rng.shuffle(splits["train"])
    return splits


def labelled(
    seed: int = 0, flip: float = 0.0, world: str = "easy", temperature: float = 1.0, continuous: bool = False
) -> dict[str, list[tuple[str, str, float]]]:
    """Labelled answers (prompt, answer, label) to the questions of `pairs`, from the same answers
    of the base model, each labelled alone.

    The label is 1 with probability sigma(r* / temperature), else 0, or with `continuous` that
    probability itself; in "train" a share `flip` of the labels z becomes 1 - z."""
    rng = random.Random(seed + 2)
    splits: dict[str, list] = {"train": [], "held_out": [], "unseen": []}
    for name, row, some in split_answers(seed, world):
        for text in filter(None, some):
            good = chance(true_reward(row, text), temperature)
            is_good, flipped = rng.random() < good, rng.random() < flip and name == "train"
            label = good if continuous else float(is_good)
            splits[name].append((prompt_of(row), " " + text, 1 - label if flipped else label))
    rng.shuffle(splits["train"])
    return splits


def prompts(
    seed: int = 0, flip: float = 0.0, world: str = "easy", temperature: float = 1.0
) -> dict[str, list[tuple[str]]]:
    """Questions alone, (prompt,): "train", "held_out" (the same questions, which are then answered
    anew) and "unseen". They are the same for every seed and have no label that could be flipped."""
    trained = [(prompt_of(row),) for row in questions(world) if not row["unseen"]]
    return {
        "train": trained,
        "held_out": trained,
        "unseen": [(prompt_of(row),) for row in questions(world) if row["unseen"]],
    }


# -- what is measured


def answers_of(model, tokenizer, folder: str, seed: int, world: str = "easy") -> list[list[str]]:
    """Answers of a reference model to all questions, [questions][n]: those kept with the base
    model, or 25,600 new ones of another model."""
    if (Path(folder) / frozen.ANSWERS).exists():
        return frozen.read_answers(folder)
    return sample_answers(model, tokenizer, 25_600 // len(questions(world)), seed, world)


def reference_rewards(prompt: str, answers: list[list[str]]) -> torch.Tensor:
    """True rewards [questions, n] of the reference's answers to the trained questions, or the
    unseen ones, whichever `prompt` is one of."""
    asked = row_of(prompt)
    of_world = zip(questions(asked["world"]), answers)
    chosen = [(row, texts) for row, texts in of_world if row["unseen"] == asked["unseen"]]
    return torch.tensor([[true_reward(row, text) for text in texts] for row, texts in chosen], dtype=torch.float64)


def judge_of(data: str, model_folder: str, tokenizer, seed: int):
    """What the toy's true reward says of answers, as a function for `evaluate_samples`; None where
    `--data` is not the toy.

    Args:
        model_folder: of the reference.
    """
    settings = settings_of(data)
    if settings is None:
        return None

    def judge(answers: list[tuple[str, str]], kl: float, ref_model) -> dict:
        metrics = judge_answers(answers) | {"frontier_efficiency": None}
        # The frontier takes hundreds of answers to each question: cheap for tiny models only.
        if ref_model is not None and is_tiny(ref_model) and len(tokenizer) < 1000:
            texts = answers_of(ref_model, tokenizer, model_folder, seed, settings["world"])
            ref_rewards = reference_rewards(answers[0][0], texts)
            metrics["frontier_efficiency"] = frontier_efficiency(kl, metrics["true_reward"], ref_rewards)
        return metrics

    return judge


def rank_correlation(rows: list[dict], rewards: torch.Tensor) -> float | None:
    """On the toy, how well rewards [rows, 2] order the answers to a question as the true reward
    does, mean over questions.

    1 always, 0 no better than chance, -1 never; ties of the true reward left out, of the rewards
    counted as one half. Answers to different questions are not compared: Bradley-Terry says nothing
    of them."""
    by_question: dict[str, list] = {}
    for row, values in zip(rows, rewards.tolist()):
        prompt, *answers = row["texts"]
        for answer, reward in zip(answers, values):
            by_question.setdefault(prompt, []).append((true_reward(row_of(prompt), answer), reward))
    tables = [torch.tensor(pairs) for pairs in by_question.values()]  # [answers, 2] each: true reward, reward
    shares = [share for table in tables if (share := auc(table[:, 1], table[:, 0])) is not None]
    return 2 * sum(shares) / len(shares) - 1 if shares else None


def statistics(answers: list[list[str]], world: str) -> dict[str, float]:
    """What a base model's answers are like, means over questions.

    Shares of right, polite and rude answers; `words` an answer; `entropy` of the answers to a
    question as counted, in nats; `likeliest_right`, the share of questions whose most frequent word
    of those that could be right is right; right answers and this also over unseen questions."""
    table: dict[str, list[float]] = {}
    for row, texts in zip(questions(world), answers, strict=True):
        traits = [judge(row, text) for text in texts]
        counts = Counter(word for text in texts for word in set(text.split()) & set(row["options"]))
        shares = [count / len(texts) for count in Counter(texts).values()]
        values = {f"{name}_share": sum(t[name] for t in traits) / len(texts) for name in ("right", "polite", "rude")}
        values["words"] = sum(t["words"] for t in traits) / len(texts)
        values["entropy"] = -sum(share * math.log(share) for share in shares)
        values["likeliest_right"] = float(bool(counts) and counts.most_common(1)[0][0] == row["right"])
        if row["unseen"]:
            values |= {f"unseen_{name}": values[name] for name in ("right_share", "likeliest_right")}
        for name, value in values.items():
            table.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in table.items()}


# -- the command line


@dataclass
class Args:
    world: Literal["easy", "hard"] = "easy"
    """Which world."""
    seed: int = 0
    """Seed of the base model and its answers."""
    freeze: bool = False
    """Build it anew, and keep it in toy/worlds/ in place of what is there."""


def main(args: Args) -> None:
    """Builds a world, or finds it, and prints what its base model's answers are like."""
    if args.freeze:
        folder = frozen.FOLDER / f"{args.world}-seed{args.seed}"
        frozen.FOLDER.mkdir(exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=frozen.FOLDER))
        build(aside, args.seed, args.world)
        shutil.rmtree(folder, ignore_errors=True)
        frozen.move_into_place(aside, folder)
    folder = base_model(args.seed, args.world)
    print(f"{frozen.description(args.world, args.seed)}: {folder}")
    for name, value in statistics(frozen.read_answers(folder), args.world).items():
        print(f"{name:24}{value:.3f}")
    for name, rows in pairs(args.seed, world=args.world).items():
        print(f"{f'pairs, {name}':24}{len(rows)}")


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted: nothing of the world was kept; the same command builds it.") from None
