"""Sampling: the model's own distribution and nothing else, whatever the checkpoint's
generation_config, the padding and the tokenizer say.
"""

import random
from collections import Counter
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from attention import rooms
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


# -- rows that share a prompt, a batch, a process


@pytest.fixture(scope="module")
def many_kinds():
    """A model of each kind of cache: all tokens, a sliding window in some layers or all, states."""
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        Mamba2Config,
        MistralConfig,
        Qwen3NextConfig,
    )

    shape = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    shape |= models.ENDS
    states = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 80, "state_size": 8, "num_heads": 8}
    states |= {"head_dim": 8, "n_groups": 1, "chunk_size": 8, "initializer_range": 0.2, **models.ENDS}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
    linear |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
    configs = {
        "llama": LlamaConfig(**shape),
        "mistral": MistralConfig(**shape, sliding_window=5),
        "gemma3": Gemma3TextConfig(
            **shape, sliding_window=5, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        ),
        "mamba2": Mamba2Config(**states),
        "qwen3_next": Qwen3NextConfig(**(shape | linear)),
    }
    loaded = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        loaded[name] = AutoModelForCausalLM.from_config(config).float().eval()
    return loaded | {"gpt2": models.tiny_gpt2(80)}


KINDS = ["llama", "gpt2", "mistral", "gemma3", "mamba2", "qwen3_next"]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_what_generate_says(kind, many_kinds):
    """Token by token, with prompts that come more than once and rows that end before others."""
    model, prompts, expected = many_kinds[kind], prompts_of_many_lengths(), []
    never, shape = 10_000, {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, eos_token_id=[never], **shape)
        expected += 2 * [out[0, len(prompt) :].tolist()]
    ends = SimpleNamespace(pad_token_id=PAD, eos_token_id=never)
    assert generate.sample(model, prompts, ends, 12, temperature=0, n=2) == expected
    assert len({tuple(ids) for ids in expected}) > 3
    # The second token of the first answers stands for EOS: these rows leave in the middle.
    eos = expected[0][1]
    ends = SimpleNamespace(pad_token_id=PAD, eos_token_id=eos)
    cut = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in expected]
    assert generate.sample(model, prompts, ends, 12, temperature=0, n=2) == cut
    assert len({len(ids) for ids in cut}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_does_not_depend_on_its_company(kind, many_kinds, monkeypatch):
    """Its random numbers are its own: neither the size of batches nor its company matters."""
    model, prompts = many_kinds[kind], prompts_of_many_lengths()
    expected = generate.sample(model, prompts, ENDS, 12, top_p=0.9, seed=4, n=3)
    assert len({tuple(ids) for ids in expected}) > 20
    for size in (1, 5, 7):
        monkeypatch.setattr(generate, "samples_at_once", lambda model, size=size: size)
        assert generate.sample(model, prompts, ENDS, 12, top_p=0.9, seed=4, n=3) == expected
    assert generate.sample(model, prompts[:3], ENDS, 12, top_p=0.9, seed=4, n=3) == expected[:9]


def test_two_processes_sample_what_one_does(monkeypatch):
    """As `shard_items` deals prompts out, with n completions of each."""
    model, prompts = models.tiny_llama(80), prompts_of_many_lengths()
    expected = generate.sample(model, prompts, ENDS, 12, seed=4, n=3)
    monkeypatch.setattr(generate.processes, "world_size", lambda: 2)
    monkeypatch.setattr(generate.processes, "sum_over_processes", lambda count: count)
    for rank in (0, 1):
        monkeypatch.setattr(generate.processes, "rank", lambda rank=rank: rank)
        groups = [expected[3 * i : 3 * i + 3] for i in range(rank, len(prompts), 2)]
        assert generate.sample(model, prompts[rank::2], ENDS, 12, seed=4, n=3) == [ids for g in groups for ids in g]


def test_a_prompt_is_read_once_and_ended_rows_leave(monkeypatch):
    """The lines of each forward pass: distinct prompts first, then those that go on."""
    model, lines = model_that_ends(), []
    forward = model.forward

    def counted(input_ids, **inputs):
        lines.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(generate.inspect, "signature", lambda _: SimpleNamespace(parameters=INPUTS))
    answers = generate.sample(model, [[BOS, 3], [BOS, 3, 4]], ENDS, 6, n=20)
    assert lines[0] == (2, 3)
    assert lines[1:] == [(sum(len(ids) > step for ids in answers), 1) for step in range(1, len(lines))]
    assert lines[1][0] < 40


INPUTS = ("input_ids", "attention_mask", "position_ids", "use_cache", "cache", "past_key_values", "logits_to_keep")


@pytest.mark.parametrize("autocast", [False, True])
def test_states_in_spare_room_are_those_of_a_growing_cache(monkeypatch, autocast):
    """The same tokens as with transformers' own layers: prompts of several lengths, rows that end,
    several completions of each; in bfloat16 too, where the room holds what attention would cast.
    """
    model = models.tiny_llama(12)
    prompts = [[BOS, 3, 4, 5, 6, 7], [BOS, 9], [BOS, 4, 8, 3]]

    def answers():
        context = partial(torch.autocast, "cpu", torch.bfloat16) if autocast else None
        return generate.sample(model, prompts, ENDS, 24, seed=3, autocast=context, n=7, top_p=0.9)

    updates, update = [], rooms.RoomyLayer.update
    monkeypatch.setattr(rooms.RoomyLayer, "update", lambda *args, **more: updates.append(1) or update(*args, **more))
    ours, count = answers(), len(updates)
    monkeypatch.setattr(rooms, "make_room", lambda *args: None)
    assert ours == answers()
    assert count == len(updates) > 20
    assert len({len(ids) for ids in ours}) > 3


def test_a_process_without_rows_makes_the_passes_of_the_others(monkeypatch):
    """Another process goes on to its seventh token: this one's forward passes do too, its answer
    does not.
    """
    model, passes = model_that_ends(), []
    monkeypatch.setattr(generate.processes, "sum_over_processes", lambda count: count + (len(passes) < 7))
    next_logits = generate.next_logits
    monkeypatch.setattr(generate, "next_logits", lambda *args, **room: passes.append(1) or next_logits(*args, **room))
    answers = generate.sample(model, [[BOS, 3]], SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS), 8, seed=1)
    ended = answers[0].index(EOS) + 1
    assert ended < 7 == len(passes)
    assert len(answers[0]) == ended


# -- one token


def test_a_token_of_probability_0_is_never_drawn():
    """Not at either end of the random numbers, and not where a float32 sum would be its own sum."""
    never = float("-inf")
    logits = torch.tensor([[never, 0.0, never, 1.0, never]]).repeat(3, 1)
    for top_p in (1.0, 0.999, 0.5):
        uniforms = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
        drawn = generate.draw(logits.clone(), uniforms, 1.0, top_p, [])
        assert set(drawn.tolist()) <= {1, 3}
        assert drawn[2] == 3
    assert generate.draw(logits.clone(), uniforms, 1.0, 1.0, [3]).tolist() == [1, 1, 1]


def test_rare_tokens_of_a_large_vocabulary_keep_their_odds():
    """Of 150,000 tokens the last 100,000 have 1e-10 each: even steps from 0 to 1 find the token
    that the exact cumulative sum says, so no rounding of the sum or of the numbers shows.
    """
    exact = torch.full((150_000,), 1e-10, dtype=torch.float64)
    exact[:50_000] = (1 - 1e-5) / 50_000
    logits = exact.log().float()[None]
    exact = logits[0].double().softmax(-1)
    uniforms = torch.linspace(0, 1, 201, dtype=torch.float64)[:-1]
    rare = 1 - 1e-5 * torch.linspace(1, 1e-3, 300, dtype=torch.float64)
    uniforms = torch.cat([uniforms, rare])
    drawn = torch.cat([generate.draw(logits, u[None], 1.0, 1.0, []) for u in uniforms])
    high = exact.cumsum(0)[drawn]
    assert ((high - exact[drawn] - 2e-7 <= uniforms) & (uniforms <= high + 2e-7)).all()
    assert len(set(drawn[-300:].tolist())) > 290  # float32 has about a hundred steps there


def adversarial_logits() -> dict[str, torch.Tensor]:
    """Where a search among the likeliest may go wrong: flat, peaked, ties at the edge, others."""
    generator = torch.Generator().manual_seed(0)
    random_ones = torch.randn(40, 3000, generator=generator)
    spread = torch.linspace(0.05, 8, 40)[:, None]
    ties = torch.zeros(4, 3000)
    ties[:, ::7] = 2.0
    some_out = random_ones.clone()
    some_out[:, 100:] = float("-inf")
    return {
        "random": random_ones * spread,
        "bfloat16": (random_ones * spread).bfloat16().float(),  # many ties
        "flat": torch.zeros(2, 3000),
        "ties": ties,
        "one": torch.nn.functional.one_hot(torch.tensor([0, 2999]), 3000).float() * 100,
        "masked": some_out,
    }


def in_full(logits, top_p, top):
    """The nucleus among the whole vocabulary, with what generate.nucleus returned."""
    largest, ids = generate.nucleus(logits, top_p, top)
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, largest), largest, ids


@pytest.mark.parametrize("top", [8, 512, 10_000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999])
@pytest.mark.parametrize("name", ["random", "bfloat16", "flat", "ties", "one", "masked"])
def test_the_nucleus_is_that_of_a_full_sort(name, top_p, top):
    """The same logits as transformers keeps, up to the rounding of the sums; which of equal ones
    that are is left open there.
    """
    from transformers import TopPLogitsWarper

    logits = adversarial_logits()[name]
    kept, largest, ids = in_full(logits, top_p, top)
    assert torch.equal(kept.isfinite(), in_full(logits, top_p, 3000)[0].isfinite())
    assert (ids.diff() > 0).all()
    assert largest.isfinite().sum() == kept.isfinite().sum()
    assert torch.equal(kept[kept.isfinite()], logits[kept.isfinite()])
    probabilities, sizes = logits.double().softmax(-1), kept.isfinite().sum(-1)
    ours = probabilities.masked_fill(~kept.isfinite(), 0).sort().values
    theirs = probabilities.masked_fill(~TopPLogitsWarper(top_p)(None, logits.double()).isfinite(), 0).sort().values
    assert (ours - theirs).abs().sum(-1).max() < (1e-4 if name in ("random", "masked") else 1e-3)
    assert (ours != theirs).any(-1).float().mean() < (0.2 if name in ("random", "masked") else 1.1)
    # The fewest that have top_p: enough with the least of them, too few without it.
    mass = (probabilities * kept.isfinite()).sum(-1)
    least = probabilities.masked_fill(~kept.isfinite(), 2).amin(-1)
    assert (mass > top_p - 1e-6).all()
    assert ((mass - least < top_p + 1e-6) | (sizes == 1)).all()
    # Of equal ones the larger ids.
    edge = (probabilities - least[:, None]).abs() < 1e-15
    for line in range(len(logits)):
        tied = edge[line].nonzero().flatten()
        inside = kept[line, tied].isfinite()
        assert (inside.long().diff() >= 0).all()


def test_logits_that_are_not_finite_are_an_error():
    for top_p in (1.0, 0.9):
        with pytest.raises(FloatingPointError, match="not finite"):
            generate.draw(torch.full((2, 9), float("nan")), torch.rand(2).double(), 1.0, top_p, [])


def test_progress_is_shown_where_it_takes_long(bigram, capsys, monkeypatch):
    """Nothing of a short one; of a long one its name and how many are done, on the main process."""
    draw(bigram.load(), [BOS, 9], 4)
    assert capsys.readouterr().err == ""
    clock = iter(range(0, 100_000, 7))
    monkeypatch.setattr("tqdm.std.time", lambda: next(clock))
    monkeypatch.setattr(generate, "samples_at_once", lambda model: 1)
    draw(bigram.load(), [BOS, 9], 4)
    shown = capsys.readouterr().err
    assert "sampling" in shown
    assert "/4" in shown
    monkeypatch.setattr(generate.processes, "is_main_process", lambda: False)
    draw(bigram.load(), [BOS, 9], 4)
    assert capsys.readouterr().err == ""


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
