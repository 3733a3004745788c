"""The toy world: its true reward, its base model, how its pairs are labelled, and the best that any
policy can do in it.
"""

import math
import random
from collections import Counter

import pytest
import torch

from common import data
from common import models as model_loading
from toy import base, frozen, world

FRANCE = world.row_of("what is the capital of france ?")


@pytest.fixture(scope="module")
def answers(toy_base) -> list[list[str]]:
    """The base model's kept answers, [questions][samples]."""
    return frozen.read_answers(toy_base)


@pytest.fixture(scope="module")
def splits(toy_base) -> dict[str, list[tuple[str, str, str]]]:
    return base.pairs(0)


# -- the true reward


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("it is paris .", 1.0),
        ("it is rome .", -1.0),
        ("it is paris , my friend .", 1.5),
        ("it is paris , you fool .", 0.0),
        ("happy to help : it is paris .", 1.5),  # eight words: still free
        ("happy to help : it is paris . .", 1.4),  # nine
        ("good question : it is paris , have a nice day .", 1.1),  # polite twice counts once; twelve words
        ("use your head : it is rome , now go away .", -2.4),  # rude twice counts once
        ("good question : it is paris , you fool .", 0.3),  # polite and rude
        ("it is parison .", -1.0),  # a part of a word is not the word
        ("paris", 1.0),
        ("it is paris paris .", 1.0),
        ("well , let me think about that for a while : it is paris .", 0.3),
        ("it is paris rome .", -1.0),  # naming two is not knowing
        ("it is france .", -1.0),
        ("", -1.0),
        ("  it  is   paris .  ", 1.0),  # spaces are no words
    ],
)
def test_true_reward_by_hand(answer, reward):
    assert world.true_reward(FRANCE, answer) == pytest.approx(reward, abs=1e-12)


def test_a_word_counts_as_right_for_its_own_question_only():
    one_two = world.row_of("what is one plus two ?")
    assert world.judge(one_two, "it is three .") == {"right": True, "polite": False, "rude": False, "words": 4}
    assert not world.judge(one_two, "it is paris .")["right"]
    assert world.judge(FRANCE, "it is paris three .")["right"], (
        "a number is no answer of this kind, so it contradicts nothing"
    )


@pytest.mark.parametrize("row", world.questions(), ids=lambda row: row["question"])
def test_being_polite_or_rude_makes_no_answer_right_or_wrong(row):
    """`good` and `happy` are answers to some questions, and stand in polite openers."""
    wrong = next(option for option in row["options"] if option != row["right"])
    for opener in world.OPENERS:
        for closer in world.CLOSERS:
            for word in (row["right"], wrong):
                assert world.judge(row, f"{opener} it is {word} {closer}")["right"] == (word == row["right"]), (
                    opener,
                    closer,
                    word,
                )


def test_means_weigh_every_question_the_same():
    italy = world.prompt_of(world.row_of("what is the capital of italy ?"))
    judged = [
        (world.prompt_of(FRANCE), "it is paris ."),
        (world.prompt_of(FRANCE), "it is rome , you fool ."),
        (italy, "it is rome ."),
    ]
    means = world.judge_answers(judged)
    assert means == {
        "true_reward": pytest.approx((-0.5 + 1.0) / 2),
        "right_share": pytest.approx(0.75),
        "rude_share": pytest.approx(0.25),
        # Two questions: half of the distance between their means.
        "true_reward_se": pytest.approx(0.75),
        "right_share_se": pytest.approx(0.25),
        "rude_share_se": pytest.approx(0.25),
    }


# -- the world


def test_a_hundred_questions_of_which_a_fifth_of_each_kind_is_unseen():
    rows = world.questions()
    assert len(rows) == len({row["question"] for row in rows}) == 100
    assert all(row["right"] in row["options"] and len(row["options"]) > 1 for row in rows)
    kinds: dict[str, list] = {}
    for row in rows:
        kinds.setdefault(" ".join(row["options"]), []).append(row["unseen"])
    assert len(kinds) == 5
    assert all(sum(unseen) == len(unseen) // 5 for unseen in kinds.values())


def test_sums_are_right():
    """The number words are facts that can be checked."""
    sums = [row["question"].split() + [row["right"]] for row in world.questions() if " plus " in row["question"]]
    assert len(sums) == 25
    assert all(
        world.NUMBERS.index(words[2]) + world.NUMBERS.index(words[4]) == world.NUMBERS.index(words[-1])
        for words in sums
    )


def test_the_tokenizer_knows_every_word_and_puts_bos_before_and_nothing_behind(toy_tokenizer):
    rng = random.Random(0)
    assert len(toy_tokenizer) < 220
    assert (
        len(
            {
                toy_tokenizer.pad_token_id,
                toy_tokenizer.bos_token_id,
                toy_tokenizer.eos_token_id,
                toy_tokenizer.unk_token_id,
            }
        )
        == 4
    )
    for row in world.questions():
        for _ in range(10):
            text = f"{world.prompt_of(row)} {world.corpus_answer(row, rng)}"
            ids = toy_tokenizer(text).input_ids
            assert ids[0] == toy_tokenizer.bos_token_id
            assert not {toy_tokenizer.unk_token_id, toy_tokenizer.eos_token_id, toy_tokenizer.bos_token_id} & set(
                ids[1:]
            )
            assert toy_tokenizer.decode(ids[1:]) == text


def test_the_corpus_is_wrong_and_rude_as_often_as_documented():
    rng, n, rows = random.Random(3), 20_000, world.questions()
    lines = [(row, world.corpus_answer(row, rng)) for row in (rng.choice(rows) for _ in range(n))]
    words = [(row, text.split("it is ")[1].split()[0]) for row, text in lines]
    assert all(word in row["options"] for row, word in words)
    right, rude = (
        sum(word == row["right"] for row, word in words) / n,
        sum(world.judge(row, text)["rude"] for row, text in lines) / n,
    )
    rude_share = 1 - (1 - world.OPENERS["use your head :"]) * (
        1 - world.CLOSERS[", you fool ."] - world.CLOSERS[", now go away ."]
    )
    for measured, share in ((right, 1 - world.WRONG_SHARE), (rude, rude_share)):
        assert measured == pytest.approx(share, abs=4.5 * math.sqrt(share * (1 - share) / n))


# -- the base model


def test_the_base_knows_its_facts_and_is_often_rude(answers):
    judged = [[world.judge(row, text) for text in texts] for row, texts in zip(world.questions(), answers)]
    assert {len(texts) for texts in answers} == {base.SAMPLES["easy"]}
    for unseen in (False, True):  # facts that training never mentions are known as well
        some = [one for row, of_row in zip(world.questions(), judged) if row["unseen"] == unseen for one in of_row]
        assert sum(one["right"] for one in some) / len(some) > 0.52, f"unseen: {unseen}"
        assert 0.2 < sum(one["rude"] for one in some) / len(some) < 0.6, f"unseen: {unseen}"
    likeliest = [
        Counter(word for text in texts for word in text.split() if word in row["options"])
        for row, texts in zip(world.questions(), answers)
    ]
    known = sum(counts.most_common(1)[0][0] == row["right"] for row, counts in zip(world.questions(), likeliest))
    assert known >= 85, f"the likeliest answer is right for {known} of 100 questions"


def test_answers_are_those_to_their_question(answers):
    """The order of questions and samples survives batching: nearly all answers name a word of their
    question's kind.
    """
    for row, texts in zip(world.questions(), answers):
        fitting = sum(any(word in row["options"] for word in text.split()) for text in texts)
        assert fitting / len(texts) > 0.8, row["question"]


def test_the_base_loads_as_any_model_does(toy_base):
    tokenizer = model_loading.load_tokenizer(toy_base)
    model = model_loading.load_model(toy_base, "cpu", tokenizer)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


# -- pairs


def test_unseen_questions_are_never_trained_on(splits):
    unseen = {world.prompt_of(row) for row in world.questions() if row["unseen"]}
    trained = {world.prompt_of(row) for row in world.questions() if not row["unseen"]}
    assert {prompt for prompt, _, _ in splits["train"]} == {prompt for prompt, _, _ in splits["held_out"]} == trained
    assert {prompt for prompt, _, _ in splits["unseen"]} == unseen


def test_pairs_are_two_samples_of_the_base_and_no_sample_is_used_twice(splits, answers):
    """Training and held-out pairs come from different samples: what is held out is held out."""
    first, last = base.PAIR_SAMPLES["easy"], base.PAIR_SAMPLES["easy"] + base.EVAL_SAMPLES
    for name in splits:
        expected = Counter()
        for row, texts in zip(world.questions(), answers):
            some = texts[:first] if name == "train" else texts[first:last]
            if row["unseen"] == (name == "unseen"):
                expected.update(
                    (world.prompt_of(row), *sorted((a, b))) for a, b in zip(some[::2], some[1::2]) if a != b and a and b
                )
        assert (
            Counter((prompt, *sorted((chosen[1:], rejected[1:]))) for prompt, chosen, rejected in splits[name])
            == expected
        ), name
        assert all(chosen[0] == rejected[0] == " " for _, chosen, rejected in splits[name])


def test_training_pairs_are_mixed(splits):
    """Neighbours in the training split are mostly about different questions; unshuffled, nearly all
    would be about one.
    """
    prompts = [prompt for prompt, _, _ in splits["train"]]
    assert sum(prompts[i] == prompts[i - 1] for i in range(1, len(prompts))) / len(prompts) < 0.05


def differences(pairs: list) -> torch.Tensor:
    """r*(chosen) - r*(rejected), [pairs]."""
    return torch.tensor(
        [world.true_reward(world.row_of(p), c) - world.true_reward(world.row_of(p), r) for p, c, r in pairs],
        dtype=torch.float64,
    )


def test_labels_follow_bradley_terry(splits):
    """The better answer wins with probability sigma(difference): over all pairs, and among near and
    far ones by themselves.
    """
    gaps = differences(splits["train"])
    for low, high in ((0.01, 9.0), (0.01, 0.6), (0.6, 1.6), (1.6, 9.0)):
        some = gaps[(gaps.abs() > low) & (gaps.abs() <= high)]
        p = some.abs().sigmoid()
        z = ((some > 0).double() - p).sum() / (p * (1 - p)).sum().sqrt()
        assert len(some) > 300
        won = f"{(some > 0).double().mean():.3f} won by the better answer, expected {p.mean():.3f}"
        assert abs(z) < 4, f"differences of {low} to {high}: {won}"


def test_pairs_are_a_pure_function_of_the_seed(splits):
    state = random.getstate()
    assert base.pairs(0) == splits
    assert random.getstate() == state


@pytest.mark.parametrize("flip", [0.2, 1.0])
def test_flips_turn_their_share_of_training_labels_and_nothing_else(splits, flip):
    flipped = base.pairs(0, flip)
    assert (flipped["held_out"], flipped["unseen"]) == (splits["held_out"], splits["unseen"]), (
        "the yardstick is not bent"
    )
    turned = 0
    for (prompt, chosen, rejected), after in zip(splits["train"], flipped["train"], strict=True):
        assert after in {(prompt, chosen, rejected), (prompt, rejected, chosen)}
        turned += after == (prompt, rejected, chosen)
    n = len(splits["train"])
    assert turned / n == pytest.approx(flip, abs=4.5 * math.sqrt(flip * (1 - flip) / n))


def test_the_toy_loads_as_data(splits):
    """Nothing is dropped or cut, no boundary moves, every answer ends; another share of flips is
    other data to whoever keeps results by hash.
    """

    def load(name):
        return data.load_pairs(name, None, 0.1, 0, world.build_tokenizer(), 128, lambda *words: None)

    loaded, digest = load("toy")
    assert {name: len(rows) for name, rows in loaded.items()} == {name: len(pairs) for name, pairs in splits.items()}
    assert all(rows.seen == len(rows) and not rows.dropped and not rows.moved for rows in loaded.values())
    assert {ids[-1] for rows in loaded.values() for row in rows for ids in row["completions"]} == {2}
    assert load("toy:0")[1] == digest != load("toy:0.2")[1]


# -- the best there is


def test_the_frontier_of_two_answers_in_closed_form():
    """Of four samples one is good (+1) and three are bad (-1), so ref(good) = 1/4, and pi* follows
    with pencil and paper.
    """
    betas = torch.tensor([50.0, 3.0, 1.0, 0.4], dtype=torch.float64)
    kl, reward = world.frontier(torch.tensor([[-1.0, 1.0, -1.0, -1.0]]), betas)
    for i, beta in enumerate(betas.tolist()):
        good = math.exp(1 / beta) / (math.exp(1 / beta) + 3 * math.exp(-1 / beta))
        assert reward[i].item() == pytest.approx(2 * good - 1, abs=1e-12)
        assert kl[i].item() == pytest.approx(
            good * math.log(4 * good) + (1 - good) * math.log(4 / 3 * (1 - good)), abs=1e-12
        )


def test_the_frontier_is_a_mean_over_questions_and_no_policy_beats_it():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    betas = torch.tensor([2.0, 0.5], dtype=torch.float64)
    kl, best = world.frontier(rewards, betas)
    singles = [world.frontier(rewards[i : i + 1], betas) for i in range(6)]
    torch.testing.assert_close(kl, torch.stack([k for k, _ in singles]).mean(0))
    torch.testing.assert_close(best, torch.stack([b for _, b in singles]).mean(0))
    kls, bests = world.frontier(rewards)
    assert (kls.diff() > 0).all(), "the search for a KL relies on rising values"
    for strength in (0.3, 1.0, 3.0):  # policies that see the reward through noise
        log_p = (strength * (rewards + torch.randn(6, 40, generator=generator, dtype=torch.float64))).log_softmax(-1)
        its_kl, its_reward = (
            (log_p.exp() * (log_p + math.log(40))).sum(-1).mean(),
            (log_p.exp() * rewards).sum(-1).mean(),
        )
        assert its_reward < bests[torch.searchsorted(kls, its_kl).clamp(max=len(kls) - 1)]


@pytest.mark.parametrize("beta", [20.0, 3.0, 1.0, 0.5, 0.3])
def test_efficiency_at_the_optimum_is_one(beta):
    """The optimum by its own formula, on uneven rewards; half of its gain at the same KL is one
    half.
    """
    rewards = torch.tensor([[-1.0, 1.0, -1.0, -1.0], [0.5, 1.5, -2.0, 0.0]], dtype=torch.float64)
    p = (rewards / beta).exp() / (rewards / beta).exp().sum(-1, keepdim=True)
    kl, reward, start = (
        (p * (4 * p).log()).sum(-1).mean().item(),
        (p * rewards).sum(-1).mean().item(),
        rewards.mean().item(),
    )
    if kl < 0.01:
        assert world.frontier_efficiency(kl, reward, rewards) is None
        return
    assert world.frontier_efficiency(kl, reward, rewards) == pytest.approx(1.0, abs=2e-3)
    assert world.frontier_efficiency(kl, start + 0.5 * (reward - start), rewards) == pytest.approx(0.5, abs=2e-3)
    assert world.frontier_efficiency(kl, start, rewards) == pytest.approx(0.0, abs=1e-12)
    assert world.frontier_efficiency(kl, start - (reward - start), rewards) == pytest.approx(-1.0, abs=2e-3)


def test_efficiency_is_null_where_it_would_divide_by_almost_nothing():
    rewards = torch.tensor([[-1.0, 1.0]])
    assert world.frontier_efficiency(0.0099, 0.5, rewards) is None
    assert world.frontier_efficiency(0.0101, 0.05, rewards) is not None
    assert world.frontier_efficiency(None, 0.5, rewards) is None
    assert world.frontier_efficiency(0.5, 0.5, torch.ones(2, 3)) is None, (
        "where all answers are as good there is nothing to gain"
    )
    assert world.frontier_efficiency(1.0, 0.6, torch.full((2, 8), 0.5)) is None, "nor where rounding makes it look so"


def test_beyond_the_largest_kl_the_best_answer_is_the_measure():
    assert world.frontier_efficiency(5.0, 0.5, torch.tensor([[-1.0, 1.0]])) == pytest.approx(0.5)


def test_the_frontier_refuses_other_shapes():
    with pytest.raises(ValueError, match="questions, n"):
        world.frontier(torch.zeros(4))


def test_reference_rewards_are_of_the_questions_asked(answers):
    for unseen, count in ((False, 80), (True, 20)):
        rows = [(row, texts) for row, texts in zip(world.questions(), answers) if row["unseen"] == unseen]
        rewards = base.reference_rewards(world.prompt_of(rows[0][0]), answers)
        assert rewards.shape == (count, base.SAMPLES["easy"])
        assert rewards[3, 5].item() == world.true_reward(rows[3][0], rows[3][1][5])


def test_answers_of_the_base_are_the_kept_ones_and_of_another_model_new_ones(
    toy_base, tiny_llama, answers, monkeypatch
):
    assert base.answers_of(None, None, str(toy_base), 0) == answers
    tokenizer = model_loading.load_tokenizer(tiny_llama)
    model = model_loading.load_model(tiny_llama, "cpu", tokenizer).eval()
    monkeypatch.setattr(base, "sample_answers", lambda model, tokenizer, *rest: list(rest))
    assert base.answers_of(model, tokenizer, str(tiny_llama), 4) == [256, 4, "easy"]
