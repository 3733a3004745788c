"""Log-probabilities of completions: exact on a bigram table, against the plain oracle on GPT-2 and
Llama, in every layout.
"""

import importlib

import pytest
import torch

from common import batches, data, oracle
from common import models as model_loading
from common.oracle import plain_logps, sequences_of
from tests.models import bigram_logps, bigram_model, random_table, tiny_gpt2, tiny_llama
from tests.runs import EXAMPLES, KNOWN, PAIRS, numbers_of, start_of, toy_examples

LAYOUTS = ("shared", "rows", "model_head")
every_script = pytest.mark.parametrize("script", PAIRS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


# -- exact values


@every_script
@every_layout
def test_exact_on_a_bigram_table(script, layout):
    completion_logps = importlib.import_module(script).completion_logps
    table = random_table(8)
    model = bigram_model(table)
    batch = batches.collate(EXAMPLES, 0, layout, "cpu")
    with torch.no_grad():
        got = completion_logps(model, batch)
    expected = [bigram_logps(table, e["prompt"], e["completions"][j]) for j in (0, 1) for e in EXAMPLES]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=0)


@every_layout
def test_padding_and_company_change_nothing_on_the_table(layout):
    """A row alone has no padding; among others it has. Whatever the pad id is, nothing changes."""
    import dpo

    table = random_table(8)
    model = bigram_model(table)
    with torch.no_grad():
        together = [
            dpo.completion_logps(model, batches.collate(EXAMPLES, pad, layout, "cpu")).view(2, -1) for pad in (0, 2, 5)
        ]
        alone = torch.stack([dpo.completion_logps(model, batches.collate([e], 0, layout, "cpu")) for e in EXAMPLES], 1)
    for got in together:
        torch.testing.assert_close(got, alone, atol=1e-6, rtol=0)


@every_layout
def test_the_batch_says_what_its_docstring_says(layout):
    batch = batches.collate(EXAMPLES, 0, layout, "cpu")
    ids, n = batch["input_ids"].flatten(), len(EXAMPLES)
    for s in range(2 * n):
        prompt, completion = EXAMPLES[s % n]["prompt"], EXAMPLES[s % n]["completions"][s // n]
        mine = batch["sequence_ids"] == s
        assert batch["targets"][mine].tolist() == completion
        assert ids[batch["logit_index"][mine]].tolist() == [prompt[-1], *completion[:-1]]
        assert batch["position_ids"].flatten()[batch["logit_index"][mine]].tolist() == list(
            range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        )
        assert batch["completion_tokens"][s] == len(completion)
        assert ids[batch["last"][s]] == completion[-1]


def test_the_shared_mask_lets_an_answer_see_the_prompt_and_itself():
    batch = batches.collate(
        [{"prompt": [1, 5], "completions": [[4, 2], [7, 2]]}, {"prompt": [1], "completions": [[4, 2], [2]]}],
        0,
        "shared",
        "cpu",
    )
    visible = (batch["attention_mask"] == 0)[:, 0].int().tolist()
    assert visible[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]
    assert [line[:4] for line in visible[1][:4]] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]
    assert not any(any(line[4:]) for line in visible[1][:4])  # no real token sees padding


# -- the answer's end


def test_one_eos_ends_an_answer_and_none_a_cut_one(tiny_gpt2):
    tokenizer = model_loading.load_tokenizer(str(tiny_gpt2))
    eos = tokenizer.eos_token_id
    words = tokenizer(" it is paris .").input_ids[1:]
    prompt = tokenizer("what is the capital of france ?").input_ids
    whole, _, _ = data.encode_row(
        tokenizer, "what is the capital of france ?", [" it is paris .", " it is paris . <eos>"], 64
    )
    assert whole == {"prompt": prompt, "completions": [[*words, eos], [*words, eos]]}
    cut, _, _ = data.encode_row(
        tokenizer, "what is the capital of france ?", [" it is paris .", " it"], len(prompt) + 3
    )
    assert cut == {"prompt": prompt, "completions": [words[:3], [words[0], eos]]}
    exactly, _, _ = data.encode_row(
        tokenizer, "what is the capital of france ?", [" it is paris ."], len(prompt) + len(words)
    )
    assert exactly["completions"] == [words]  # the text fits and its end does not


# -- against the oracle


def test_the_oracle_on_a_bigram_table():
    table = random_table(8)
    expected = torch.tensor([bigram_logps(table, p, c) for p, c in sequences_of(EXAMPLES)])
    torch.testing.assert_close(
        plain_logps(bigram_model(table), sequences_of(EXAMPLES), 0, batch_size=3), expected, atol=1e-5, rtol=0
    )


@every_script
@every_layout
def test_every_layout_agrees_with_the_oracle(script, layout, folder):
    completion_logps = importlib.import_module(script).completion_logps
    examples, model = toy_examples(folder), model_loading.load_model(folder, "cpu").eval()
    expected = plain_logps(model, sequences_of(examples), 0)
    with torch.no_grad():
        got = completion_logps(model, batches.collate(examples, 0, layout, "cpu"))
    assert expected.abs().min() > 5  # random weights: something to be wrong about
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


@every_script
def test_chunks_change_neither_values_nor_gradients(script, folder, monkeypatch):
    module = importlib.import_module(script)
    examples, model = toy_examples(folder), model_loading.load_model(folder, "cpu").eval()
    batch = batches.collate(examples, 0, "shared", "cpu")
    results = []
    for chunk in (10_000, 5):
        monkeypatch.setattr(module, "CHUNK", chunk)
        values = module.completion_logps(model, batch)
        weights = torch.arange(1.0, len(values) + 1)  # every sequence with a weight of its own
        results.append((values.detach(), torch.autograd.grad((values * weights).sum(), list(model.parameters()))))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(results[1][0], plain_logps(model, sequences_of(examples), 0), atol=1e-4, rtol=0)
    for got, expected in zip(results[1][1], results[0][1]):
        torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item() + 1e-7, rtol=1e-4)


def test_a_shared_prompt_has_the_gradients_of_separate_passes(folder):
    """With respect to all weights; separate passes: each answer alone with its prompt, unpadded."""
    import dpo

    examples, model = toy_examples(folder), model_loading.load_model(folder, "cpu").eval()
    values = dpo.completion_logps(model, batches.collate(examples, 0, "shared", "cpu"))
    weights = torch.linspace(-1.0, 1.5, len(values))
    shared = torch.autograd.grad((values * weights).sum(), list(model.parameters()))
    total = [torch.zeros_like(p) for p in model.parameters()]
    for weight, (prompt, completion) in zip(weights, sequences_of(examples)):
        ids = torch.tensor([prompt + completion])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        for sum_of, grad in zip(
            total, torch.autograd.grad(weight * logps[len(prompt) - 1 :].sum(), list(model.parameters()))
        ):
            sum_of += grad
    for (name, _), got, expected in zip(model.named_parameters(), shared, total):
        torch.testing.assert_close(
            got,
            expected,
            atol=1e-5 * expected.abs().max().item() + 1e-6,
            rtol=1e-4,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@every_layout
def test_a_row_alone_is_what_it_is_in_a_padded_batch(layout, folder):
    import dpo

    examples, model = toy_examples(folder), model_loading.load_model(folder, "cpu").eval()
    with torch.no_grad():
        together = dpo.completion_logps(model, batches.collate(examples, 0, layout, "cpu")).view(2, -1)
        alone = torch.stack([dpo.completion_logps(model, batches.collate([e], 0, layout, "cpu")) for e in examples], 1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@every_layout
def test_rows_may_differ_in_how_many_answers_they_have(layout, folder):
    """Sequences are numbered answer by answer, over the rows that have one."""
    import dpo

    model = model_loading.load_model(folder, "cpu").eval()
    rows = [
        {"prompt": [1, 7, 8], "completions": [[10, 2]]},
        {"prompt": [1, 9], "completions": [[11, 12, 13, 2], [14, 2], [15, 3]]},
        {"prompt": [1, 6, 7, 8], "completions": [[16], [17, 18, 2]]},
    ]
    sequences = [(rows[i]["prompt"], rows[i]["completions"][j]) for i, j in [(0, 0), (1, 0), (2, 0), (1, 1), (2, 1)]]
    sequences.append((rows[1]["prompt"], rows[1]["completions"][2]))
    batch = batches.collate(rows, 0, layout, "cpu")
    assert batch["completion_tokens"].tolist() == [len(completion) for _, completion in sequences]
    assert batch["input_ids"].flatten()[batch["last"]].tolist() == [completion[-1] for _, completion in sequences]
    with torch.no_grad():
        logps = dpo.completion_logps(model, batch)
    torch.testing.assert_close(logps, plain_logps(model, sequences, 0), atol=1e-4, rtol=0)


def test_an_answer_does_not_see_the_other_one(folder):
    """Another first answer, of the same length, leaves the second one's log-probability as it was,
    bit for bit.
    """
    import dpo

    model = model_loading.load_model(folder, "cpu").eval()
    first, second = [10, 11, 12, 2], [20, 21, 2]
    with torch.no_grad():
        a, b = (
            dpo.completion_logps(
                model, batches.collate([{"prompt": [1, 7, 8, 9], "completions": [x, second]}], 0, "shared", "cpu")
            )
            for x in (first, [30, 31, 32, 2])
        )
    assert a[0] != b[0]
    assert a[1] == b[1]


# -- precision


@every_script
def test_log_softmax_is_taken_in_float32_under_autocast(script):
    """The same bf16 logits, log-softmax in float32: a thousand tokens are right to a hundredth of a
    nat; in bf16 they are off by much more.
    """
    completion_logps = importlib.import_module(script).completion_logps
    tokens = torch.randint(8, (1, 1000), generator=torch.Generator().manual_seed(0))[0].tolist()
    model = bigram_model(random_table(8))
    batch = batches.collate([{"prompt": [1], "completions": [tokens]}], 0, "rows", "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = completion_logps(model, batch)
        logits = model(batch["input_ids"]).logits[0, :-1]
    index = torch.tensor(tokens)[:, None]
    exact = logits.double().log_softmax(-1).gather(-1, index).sum().item()
    in_bf16 = logits.log_softmax(-1, dtype=torch.bfloat16).gather(-1, index).double().sum().item()
    assert logits.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    assert abs(got.item() - exact) < 0.01
    assert abs(in_bf16 - exact) > 0.1  # the check can fail


def kept_for_backward(model, batch) -> int:
    """How many tensors of the mask's shape a forward pass under bfloat16 keeps."""
    import dpo

    lines, _, length, _ = batch["attention_mask"].shape
    kept = {}  # a tensor kept alive keeps its address

    def pack(tensor):
        if tensor.shape[0] == lines and tensor.shape[-2:] == (length, length):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            logps = dpo.completion_logps(model, batch)
    assert logps.requires_grad
    return len(kept)


@pytest.mark.parametrize("layers", [4, 8])
def test_one_mask_is_kept_for_all_layers(layers):
    model = tiny_llama(8, num_hidden_layers=layers)
    batch = batches.collate(EXAMPLES, 0, "shared", "cpu", torch.bfloat16)
    assert kept_for_backward(model, batch) == 1
    wide = batches.collate(EXAMPLES, 0, "shared", "cpu")
    assert kept_for_backward(model, wide) == layers  # each casts it: the check can fail


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_bf16_mask_changes_no_number_and_bf16_is_near_the_oracle(build):
    import dpo

    model, answers = build(8, initializer_range=0.1), {}
    for dtype in (torch.float32, torch.bfloat16):
        batch = batches.collate(EXAMPLES, 0, "shared", "cpu", dtype)
        assert batch["attention_mask"].dtype == dtype
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            answers[dtype] = dpo.completion_logps(model, batch)
    assert torch.equal(*answers.values())
    exact = plain_logps(model, sequences_of(EXAMPLES), 0)
    assert (answers[torch.bfloat16] - exact).abs().max() < 0.05


@every_script
def test_bf16_logits_are_scored_in_float32(script):
    """Without autocast's help, which would raise them by itself."""
    logits = torch.randn(1000, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(1000) % 50
    got = importlib.import_module(script).token_logps(lambda x: x, logits, targets)
    exact = logits.double().log_softmax(-1)[torch.arange(1000), targets]
    assert got.dtype == torch.float32
    assert (got.double() - exact).abs().max() < 1e-5


@every_script
def test_the_gradient_of_bf16_logits_is_rounded_once(script):
    """Worked out in float32, block by block, and written over the logits."""
    module = importlib.import_module(script)
    logits = torch.randn(module.BLOCK + 7, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(len(logits)) % 50
    exact = torch.nn.functional.one_hot(targets, 50) - logits.float().softmax(-1)
    logits.requires_grad_()
    module.token_logps(lambda x: x * 1, logits, targets).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.float(), exact, rtol=2**-8, atol=1e-6)


@every_script
def test_token_logps_gradient_is_exact(script):
    """With more rows than one group has: weight * (1[target] - softmax) in closed form, and
    autograd through torch's own log-softmax.
    """
    module = importlib.import_module(script)
    generator = torch.Generator().manual_seed(0)
    tokens = module.BLOCK + 7
    hidden, head = torch.randn(tokens, 3, dtype=torch.float64, generator=generator), torch.nn.Linear(3, 11).double()
    targets = torch.arange(tokens) % 11
    weights = torch.randn(
        tokens, dtype=torch.float64, generator=generator
    )  # what comes from above differs from token to token
    logits = head(hidden).detach().requires_grad_()
    closed_form = weights[:, None] * (torch.nn.functional.one_hot(targets, 11) - logits.detach().softmax(-1))
    (weights * module.token_logps(lambda x: x, logits, targets)).sum().backward()
    torch.testing.assert_close(logits.grad, closed_form, rtol=1e-10, atol=1e-12)
    hidden.requires_grad_()
    inputs = (hidden, head.weight, head.bias)
    got = torch.autograd.grad((weights * module.token_logps(head, hidden, targets)).sum(), inputs)
    expected = torch.autograd.grad(
        (weights * head(hidden).log_softmax(-1)[torch.arange(tokens), targets]).sum(), inputs
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@every_script
def test_a_second_backward_through_used_up_logits_is_refused(script):
    """The logits have become their gradient; going back again must not give numbers."""
    hidden = torch.randn(3, 4, requires_grad=True)
    logps = importlib.import_module(script).token_logps(torch.nn.Linear(4, 5), hidden, torch.tensor([0, 1, 2]))
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_float64_stays_float64():
    import dpo

    table = random_table(8)
    model = bigram_model(table).double()
    with torch.no_grad():
        model.lm_head.weight.copy_(table.T)
        got = dpo.completion_logps(model, batches.collate(EXAMPLES, 0, "rows", "cpu"))
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, torch.tensor([bigram_logps(table, p, c) for p, c in sequences_of(EXAMPLES)], dtype=torch.float64)
    )


# -- step 0


@pytest.mark.parametrize("script", KNOWN)
@every_layout
def test_step_0_is_log_2_with_a_reference_computed_independently(script, layout, folder):
    """The reference's numbers come from the oracle and a model loaded for itself; a perturbed
    reference shows that the test can fail.
    """
    module = importlib.import_module(script)
    examples, numbers = toy_examples(folder), numbers_of(module)
    model = model_loading.load_model(folder, "cpu")
    model = module.add_head(model, {}) if script == "dph" else model
    model.train()
    batch = batches.collate(examples, 0, layout, "cpu")

    def step_0(reference):
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = plain_logps(
            reference, sequences_of(examples), 0
        ).chunk(2)
        loss, metrics = module.compute_loss(model, batch, **numbers)
        return loss.item() / len(examples), metrics

    reference = model_loading.load_model(folder, "cpu").eval()
    loss, metrics = step_0(reference)
    assert loss == pytest.approx(start_of(script), abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(metrics[name].item()) < 1e-3
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    loss, _ = step_0(reference)
    assert abs(loss - start_of(script)) > 0.01


@pytest.mark.parametrize("script", KNOWN)
def test_dropout_in_the_configuration_would_show(script, tiny_gpt2):
    """The control to the test above: with GPT-2's own dropout on, the first loss is not log 2."""
    from transformers import AutoModelForCausalLM

    module = importlib.import_module(script)
    examples = toy_examples(tiny_gpt2)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2).train()
    model = module.add_head(model, {}) if script == "dph" else model
    batch = batches.collate(examples, 0, "shared", "cpu")
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = plain_logps(
        model_loading.load_model(str(tiny_gpt2), "cpu").eval(), sequences_of(examples), 0
    ).chunk(2)
    torch.manual_seed(0)
    loss, _ = module.compute_loss(model, batch, **numbers_of(module))
    assert abs(loss.item() / len(examples) - start_of(script)) > 0.005


# -- real models


def test_a_real_model_agrees_with_the_oracle(preference_data):
    import dpo

    folder = str(preference_data / "models" / "stories260K")
    tokenizer = model_loading.load_tokenizer(folder)
    model = model_loading.load_model(folder, "cpu", tokenizer).eval()
    pair = (
        "Once upon a time, there was a little girl",
        " named Lily. She loved to play.",
        " who saw a big red dog and ran.",
    )
    examples = data.encode_rows(
        tokenizer, [pair, ("The cat", " sat on the mat.", " flew to the moon and back again.")], 128
    )
    expected = plain_logps(model, sequences_of(examples), tokenizer.pad_token_id)
    for layout in LAYOUTS:
        with torch.no_grad():
            got = dpo.completion_logps(model, batches.collate(examples, tokenizer.pad_token_id, layout, "cpu"))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_layout_that_a_model_reads_wrongly_is_not_used(tiny_gpt2):
    """A model that ignores the float mask: the check before the first step falls back to rows, and
    says so.
    """
    import dpo

    model = model_loading.load_model(str(tiny_gpt2), "cpu").eval()
    examples, printed = toy_examples(tiny_gpt2), []

    def deaf(model, batch):
        if batch["attention_mask"].dim() == 4:
            batch = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
        return dpo.completion_logps(model, batch)

    logps = model_loading.bind_forward(model, deaf)
    assert oracle.choose_layout(logps, model, {"train": examples}, 0, "cpu", True, printed.append) == "rows"
    assert "not used" in printed[0]
    logps = model_loading.bind_forward(model, dpo.completion_logps)
    assert oracle.choose_layout(logps, model, {"train": examples}, 0, "cpu", True, printed.append) == "shared"
    assert oracle.choose_layout(logps, model, {"train": examples}, 0, "cpu", False, printed.append) == "rows"
