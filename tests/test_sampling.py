"""Sampling: the model's own distribution and nothing else, whatever the checkpoint's
generation_config, the padding and the tokenizer say.
"""

import random
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from common import generate
from tests import models

PAD, BOS, EOS = 0, 1, 2
ENDS = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)  # all that sample asks a tokenizer for


def chi_square(counts: dict[int, int], probabilities: torch.Tensor) -> float:
    """Pearson's statistic as a number of standard deviations above its expectation; tokens expected
    less than five times are taken together.
    """
    total = sum(counts.values())
    expected = total * probabilities
    observed = torch.tensor([float(counts.get(v, 0)) for v in range(len(probabilities))], dtype=torch.float64)
    rare = expected < 5
    groups = [(observed[~rare], expected[~rare])] + (
        [(observed[rare].sum()[None], expected[rare].sum()[None])] if rare.any() else []
    )
    observed, expected = (torch.cat(column) for column in zip(*groups))
    if (expected == 0).any():
        assert (observed[expected == 0] == 0).all()
        observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    return (((observed - expected) ** 2 / expected).sum().item() - freedom) / (2 * freedom) ** 0.5


@pytest.fixture(scope="module")
def flat():
    """A bigram model of 120 words, all of them likely: sampling from the 50 likeliest would be seen
    at once.
    """
    table = models.random_table(120, seed=1, spread=0.3)
    return SimpleNamespace(table=table, load=lambda: models.bigram_model(table))


def draw(model, prompt, count, **changes):
    return generate.sample(model, [prompt] * count, ENDS, **{"max_new_tokens": 1, **changes})


def test_frequencies_are_the_softmax(flat):
    counts = Counter(ids[0] for ids in draw(flat.load(), [BOS, 7], 20_000, seed=3))
    assert len(counts) > 115  # top_k = 50, which transformers uses where nothing is said, would leave 50
    assert chi_square(counts, flat.table[7].exp()) < 5
    # negative controls: the bound tells apart the 50 likeliest of 120 words, and a temperature of
    # .6
    generator = torch.Generator().manual_seed(0)
    top = flat.table[7].exp() * (flat.table[7] >= flat.table[7].topk(50).values[-1])
    for other, least in ((top, 100), ((flat.table[7] / 0.6).softmax(-1), 15)):
        sampled = torch.multinomial(other, 20_000, replacement=True, generator=generator)
        assert chi_square(Counter(sampled.tolist()), flat.table[7].exp()) > least


def test_later_tokens_follow_their_own_distribution():
    table = models.random_table(12, seed=2)
    counts: dict[int, Counter] = {}
    for ids in draw(models.bigram_model(table), [BOS, 7], 4_000, max_new_tokens=12):
        for u, v in pairwise([7, *ids]):
            counts.setdefault(u, Counter())[v] += 1
    assert set(counts) == set(range(12)) - {EOS}  # nothing comes after EOS
    assert min(counter.total() for counter in counts.values()) > 500
    assert max(chi_square(counter, table[u].exp()) for u, counter in counts.items()) < 5


def test_temperature_and_top_p_are_passed_on(flat):
    counts = Counter(ids[0] for ids in draw(flat.load(), [BOS, 7], 20_000, temperature=0.25))
    assert chi_square(counts, (flat.table[7] / 0.25).softmax(-1)) < 5
    probabilities, order = flat.table[7].exp().sort(descending=True)
    kept = order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1]  # the fewest words that have half of the probability
    nucleus = torch.zeros(120, dtype=torch.float64)
    nucleus[kept] = flat.table[7].exp()[kept]
    counts = Counter(ids[0] for ids in draw(flat.load(), [BOS, 7], 20_000, top_p=0.5))
    assert set(counts) == set(kept.tolist())
    assert chi_square(counts, nucleus / nucleus.sum()) < 5


def test_temperature_zero_is_greedy(flat):
    (ids,) = draw(flat.load(), [BOS, 7], 1, max_new_tokens=5, temperature=0)
    expected, last = [], 7
    for _ in range(5):
        last = int(flat.table[last].argmax())
        expected.append(last)
        if last == EOS:
            break
    assert ids == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.1},
        {"top_k": 3},
        {"top_p": 0.2},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"eos_token_id": list(range(2, 60))},
        {"suppress_tokens": list(range(3, 100))},
        {"begin_suppress_tokens": list(range(3, 100))},
        {"forced_eos_token_id": 2},
        {"min_new_tokens": 12},
        {"num_beams": 3},
        {"max_length": 5},
        {"exponential_decay_length_penalty": (1, 3.0)},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_checkpoints_generation_config_does_not_leak(flat, changes):
    model = flat.load()
    expected = [
        draw(model, [BOS, 7], 50, max_new_tokens=12),
        draw(model, [BOS, 7], 1, max_new_tokens=12, temperature=0),
    ]
    for name, value in changes.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    assert [
        draw(model, [BOS, 7], 50, max_new_tokens=12),
        draw(model, [BOS, 7], 1, max_new_tokens=12, temperature=0),
    ] == expected
    assert model.generation_config is own  # and it is still there afterwards
    assert all(getattr(own, name) == value for name, value in changes.items())


def test_a_saved_generation_config_does_not_leak(flat, tmp_path):
    """The same, as a user meets it: a folder whose generation_config.json says something else."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = flat.load()
    expected = draw(model, [BOS, 7], 200, max_new_tokens=6)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=5, top_p=0.9, repetition_penalty=1.5, eos_token_id=[2, 5, 9]
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.generation_config.top_k == 5
    assert draw(loaded, [BOS, 7], 200, max_new_tokens=6) == expected


# -- padding


def prompts_of_many_lengths():
    rng = random.Random(0)
    return [[BOS, *(rng.randrange(4, 80) for _ in range(length))] for length in (11, 1, 5, 30, 2, 17, 8, 3)]


@pytest.mark.parametrize("build", [models.tiny_gpt2, models.tiny_llama])
def test_padding_on_the_left_changes_nothing(build):
    model, prompts = build(80), prompts_of_many_lengths()
    together = generate.sample(model, prompts, ENDS, 12, temperature=0)
    alone = [generate.sample(model, [prompt], ENDS, 12, temperature=0)[0] for prompt in prompts]
    assert together == alone
    assert len({tuple(ids) for ids in alone}) >= len(prompts) - 1  # answers that do depend on the prompt
    for prompt, completion in zip(
        prompts, alone
    ):  # and they are what a forward pass over the text so far says, without a cache
        ids = list(prompt)
        for token in completion:
            assert int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
            ids.append(token)


def test_answers_come_back_in_the_order_of_the_prompts(bigram, monkeypatch):
    """Prompts are sorted by length inside; which batch size is used says nothing about which answer
    belongs to which prompt.
    """
    prompts = [[BOS, *([5] * i), 20 + i] for i in (9, 0, 4, 7, 2, 5, 1)]
    expected = [generate.sample(bigram.load(), [prompt], ENDS, 3, temperature=0)[0] for prompt in prompts]
    assert [ids[0] for ids in expected] == [int(bigram.table[prompt[-1]].argmax()) for prompt in prompts]
    for batch_size in (1, 2, 3, 64):
        monkeypatch.setattr(generate, "samples_at_once", lambda model, size=batch_size: size)
        assert generate.sample(bigram.load(), prompts, ENDS, 3, temperature=0) == expected


def test_no_prompts_no_answers(bigram):
    assert generate.sample(bigram.load(), [], ENDS, 3) == []


# -- the end


def model_that_ends(pad: int = PAD):
    """Half of all tokens are EOS, and the rest pad tokens as often as words: neither may be taken
    for the other.
    """
    probabilities = torch.tensor([0.2, 0.1, 0.5, 0.1, 0.1], dtype=torch.float64)
    return models.bigram_model(probabilities.log().expand(5, 5).clone())


def test_eos_is_kept_and_nothing_comes_after_it():
    answers = draw(model_that_ends(), [BOS, 3], 3_000, max_new_tokens=6)
    ended = [ids for ids in answers if EOS in ids]
    assert all(ids.index(EOS) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 6 for ids in answers if EOS not in ids)
    lengths = Counter(len(ids) for ids in ended)
    for length in range(1, 6):  # half of what is left ends at each token
        assert lengths[length] == pytest.approx(3_000 * 0.5**length, abs=5 * (3_000 * 0.5**length) ** 0.5)
    assert len(answers) - len(ended) == pytest.approx(3_000 / 2**6, abs=40)
    assert PAD in {token for ids in answers for token in ids}  # a sampled pad token is a token like any other


def test_a_tokenizer_whose_pad_is_eos_gives_the_same_answers():
    prompts = [[BOS, 3], [BOS, 3, 4, 3], [BOS]] * 50
    expected = generate.sample(model_that_ends(), prompts, ENDS, 6, seed=1)
    assert (
        generate.sample(model_that_ends(), prompts, SimpleNamespace(pad_token_id=EOS, eos_token_id=EOS), 6, seed=1)
        == expected
    )
    llama, prompts = models.tiny_llama(80), prompts_of_many_lengths()
    expected = generate.sample(llama, prompts, ENDS, 8, temperature=0)
    assert (
        generate.sample(llama, prompts, SimpleNamespace(pad_token_id=EOS, eos_token_id=EOS), 8, temperature=0)
        == expected
    )


def test_a_prompt_that_holds_eos_is_answered():
    """Dialogues hold EOS between turns: what stands in the prompt ends nothing."""
    answers = draw(model_that_ends(), [BOS, 3, EOS, 3], 200, max_new_tokens=4)
    assert {len(ids) for ids in answers} == {1, 2, 3, 4}


def test_text_of_leaves_out_eos_and_nothing_else(toy_tokenizer):
    ids = toy_tokenizer("it is paris .").input_ids[1:]
    assert (
        generate.decode_completion(toy_tokenizer, [*ids, EOS])
        == generate.decode_completion(toy_tokenizer, ids)
        == "it is paris ."
    )
    assert generate.decode_completion(toy_tokenizer, []) == generate.decode_completion(toy_tokenizer, [EOS]) == ""
    assert (
        generate.decode_completion(toy_tokenizer, [PAD, *ids]) == "<pad> it is paris ."
    )  # a sampled pad token is shown


# -- what is left alone


def test_the_callers_random_numbers_and_mode_are_untouched(bigram):
    model = bigram.load().train()
    torch.manual_seed(5)
    random.seed(5)
    state, other = torch.get_rng_state(), random.getstate()
    first = draw(model, [BOS, 9], 20, max_new_tokens=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    assert model.training
    torch.manual_seed(6)
    assert draw(model, [BOS, 9], 20, max_new_tokens=8, seed=1) == first  # the seed alone decides
    assert draw(model, [BOS, 9], 20, max_new_tokens=8, seed=2) != first
    draw(model.eval(), [BOS, 9], 2)
    assert not model.training


def test_an_error_leaves_the_model_as_it_was(bigram):
    model = bigram.load().train()
    own, state = model.generation_config, torch.get_rng_state()
    with pytest.raises(IndexError):
        generate.sample(model, [[BOS, 10_000]], ENDS, 3)
    assert model.training
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_while_sampling():
    model, prompts = models.tiny_gpt2(80), prompts_of_many_lengths()
    assert model.config.resid_pdrop == 0.1
    expected = generate.sample(model.eval(), prompts, ENDS, 12, temperature=0)
    assert generate.sample(model.train(), prompts, ENDS, 12, temperature=0) == expected
