"""typo.py: its two losses, its estimate of the forward KL, and that a resumed run finds the
reference's samples again.
"""

import dataclasses
import json

import pytest
import torch

import typo
from common import batches, data, evaluate, generate
from common import models as model_loading
from common.run import Run
from tests.runs import lines_of, model_of, pairs, train, weights, write_pairs
from toy import frozen, world


def test_supervised_term_against_its_gradient():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (
        torch.randn(50, generator=generator, dtype=torch.float64).mul(5).requires_grad_() for _ in range(2)
    )
    losses = typo.typo_loss(chosen, rejected)
    assert losses.shape == (50,)
    assert losses.dtype == torch.float64
    got = torch.autograd.grad(losses.sum(), (chosen, rejected))
    expected = -torch.sigmoid(-(chosen - rejected)).detach()
    torch.testing.assert_close(got[0], expected)
    torch.testing.assert_close(got[1], -expected)
    torch.testing.assert_close(typo.typo_loss(torch.zeros(1), torch.zeros(1)), torch.tensor([2.0]).log())
    assert typo.typo_loss(torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])).isfinite().all()
    with pytest.raises(ValueError, match="one shape"):
        typo.typo_loss(torch.zeros(3), torch.zeros(3, 1))


def test_forward_kl_value_gradient_and_direction():
    generator = torch.Generator().manual_seed(1)
    policy, ref = (torch.randn(4, 3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    policy.requires_grad_()
    kl = typo.forward_kl(policy, ref)
    assert kl.shape == (4, 3)
    assert kl.dtype == torch.float64
    p, r = policy.softmax(-1), ref.softmax(-1)
    torch.testing.assert_close(kl, (r * (r / p).log()).sum(-1))
    assert not torch.allclose(kl, (p * (p / r).log()).sum(-1), rtol=1e-2)  # the other direction
    torch.testing.assert_close(torch.autograd.grad(kl.sum(), policy)[0], (p - r).detach())
    assert typo.forward_kl(ref, ref).abs().max() < 1e-12
    with pytest.raises(ValueError, match="one shape"):
        typo.forward_kl(ref, ref[:, :1])


def batch_with_samples(model, anchor, tokenizer, samples: int):
    """Two pairs and `samples` answers of the reference for each, and these by themselves."""
    pairs = [
        ("what is one plus two ?", " it is three .", " it is four , you fool ."),
        ("what colour has snow ?", " it is white .", " it is red ."),
    ]
    rows = data.encode_rows(tokenizer, pairs, 64)
    completions = [
        [tokenizer(text).input_ids[1:] + [tokenizer.eos_token_id] for text in texts[:samples]]
        for texts in (["it is", "open ."], ["snow it is .", "red"])
    ]
    answers = [{"prompt": row["prompt"], "completions": d} for row, d in zip(rows, completions)]
    batch, sample = (batches.collate(x, tokenizer.pad_token_id, "shared", "cpu") for x in (rows, answers))
    with torch.no_grad():
        sample["ref_logits"] = typo.completion_logits(anchor, sample)
    return batch | {"ref_sample": sample}, answers


@pytest.mark.parametrize("samples", [1, 2])
def test_loss_is_the_supervised_term_plus_lambda_times_the_sum_over_tokens(tiny_llama, samples):
    tokenizer = model_loading.load_tokenizer(tiny_llama)
    anchor = model_loading.load_model(tiny_llama, "cpu", tokenizer).eval()
    model = model_loading.load_model(tiny_llama, "cpu", tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    batch, answers = batch_with_samples(model, anchor, tokenizer, samples)
    plain, _ = typo.compute_loss(model, batch, lam=0.0, ref_term="samples")
    loss, metrics = typo.compute_loss(model, batch, lam=0.7, ref_term="samples")
    expected = 0.0
    for answer in answers:
        for completion in answer["completions"]:
            ids = torch.tensor([answer["prompt"] + completion])
            p, r = (m(ids).logits[0, len(answer["prompt"]) - 1 : -1].log_softmax(-1) for m in (model, anchor))
            expected += (r.exp() * (r - p)).sum().item() / samples
    assert expected > 0.01
    assert (loss - plain).item() == pytest.approx(0.7 * expected, rel=1e-4)
    torch.testing.assert_close(metrics["rewards/margins"], metrics["logps/chosen"] - metrics["logps/rejected"])


def test_pairs_term(tiny_llama):
    tokenizer = model_loading.load_tokenizer(tiny_llama)
    model = model_loading.load_model(tiny_llama, "cpu", tokenizer).eval()
    batch, _ = batch_with_samples(model, model, tokenizer, 1)
    del batch["ref_sample"]
    plain, metrics = typo.compute_loss(model, batch, lam=0.0, ref_term="samples")
    loss, _ = typo.compute_loss(model, batch, lam=0.4, ref_term="pairs")
    assert (loss - plain).item() == pytest.approx(
        -0.2 * (metrics["logps/chosen"] + metrics["logps/rejected"]).item(), rel=1e-5
    )


def test_run_resumes_with_the_same_samples(toy_base, tmp_path, monkeypatch):
    args = typo.Args(
        max_steps=6, save_every=3, log_every=1, kl_samples=0, output_dir=str(tmp_path), name="whole", batch_size=8
    )
    typo.main(args)
    samples = json.loads((tmp_path / "whole" / "ref_samples.json").read_text())
    assert set(samples) == {"train", "held_out", "unseen"}
    assert all(len(answers) == 1 and len(answers[0]) >= 1 for answers in samples["train"])
    written = Run.log

    def stop_after_four(self, split, numbers):
        written(self, split, numbers)
        if self.step == 4 and split == "train":
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", stop_after_four)
        with pytest.raises(RuntimeError, match="killed"):
            typo.main(dataclasses.replace(args, name="part"))
    typo.main(typo.Args(resume=str(tmp_path / "part")))
    assert weights(tmp_path / "whole") == weights(tmp_path / "part")


def test_large_lambda_stays_at_the_reference(toy_base, tmp_path):
    moved = {}
    for lam in (0.0, 30.0):
        typo.main(
            typo.Args(lam=lam, max_steps=25, kl_samples=100, output_dir=str(tmp_path), name=f"lam{lam:g}", log_every=25)
        )
        moved[lam] = json.loads((tmp_path / f"lam{lam:g}" / "summary.json").read_text())["after"]["kl"]
    assert moved[0.0] > 10 * moved[30.0]


def test_samples_come_from_the_reference_at_temperature_one(toy_base):
    """Their right share is the base model's, which any truncation or another temperature would
    raise.
    """
    tokenizer = model_loading.load_tokenizer(toy_base)
    model = model_loading.load_model(toy_base, "cpu", tokenizer).eval()
    rows = [
        {"prompt": tokenizer(world.prompt_of(row)).input_ids, "completions": []}
        for row in world.questions()
        for _ in range(6)
    ]
    samples = evaluate.sample_rows(model, tokenizer, rows, 2, 24, seed=0, autocast=None)
    asked = [row for row in world.questions() for _ in range(6)]
    right = [
        world.judge(q, generate.decode_completion(tokenizer, ids))["right"]
        for q, answers in zip(asked, samples)
        for ids in answers
    ]
    answers = frozen.read_answers(toy_base)
    base = [world.judge(q, text)["right"] for q, texts in zip(world.questions(), answers) for text in texts]
    assert sum(right) / len(right) == pytest.approx(sum(base) / len(base), abs=0.06)


def test_the_reference_of_a_run_is_what_training_began_with(tiny_llama, tmp_path):
    """Lambda changes nothing in the first step, where the KL and its gradient are zero; the second
    step's loss grows by lambda times the KL between the model before training and after one step.
    """
    file = write_pairs(tmp_path / "pairs.jsonl", 13)
    setup = {"model": str(tiny_llama), "data": file, "batch_size": 13, "epochs": 2, "warmup": 0.0}
    setup |= {"max_new_tokens": 4, "lr": 1e-3}
    plain = train("typo", tmp_path / "plain", lam=0.0, **setup)
    run = train("typo", tmp_path / "run", lam=2.0, **setup)
    one = train("typo", tmp_path / "one", lam=2.0, **setup, max_steps=1)
    before, after = model_of(tiny_llama), model_of(one)
    tokenizer, kls = model_loading.load_tokenizer(str(tiny_llama)), []
    samples = json.loads((run / "ref_samples.json").read_text())["train"]
    prompts = [tokenizer(row["prompt"]).input_ids for row in pairs(13)]
    with torch.no_grad():
        for prompt, (completion,) in zip(prompts, samples, strict=True):
            ids = torch.tensor([prompt + completion])
            p, r = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (after, before))
            kls.append((r.exp() * (r - p)).sum().item())
    gap = lines_of(run)[1]["loss"] - lines_of(plain)[1]["loss"]
    assert sum(kls) / 13 > 0.01
    assert gap == pytest.approx(2.0 * sum(kls) / 13, rel=1e-2)
