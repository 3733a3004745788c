"""One process of benchmarks/gpu.py: a part of it, each result a line of JSON as soon as it is
there.

python -m benchmarks.gpu_parts rate [--tiny]     also tests, scripts, pretrain, sampling, pairs
"""

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

import dpo
import mle_pretrain
from benchmarks import memory
from benchmarks.inputs import EOS, PAD, llama_shape, save_model
from benchmarks.systems import Measurements, no_grad_logps, trl_trainer_class
from common import batches, generate, models, oracle
from pretraining import flops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = llama_shape(32, 64, layers=2, heads=2) | {"vocab_size": 512, "tie_word_embeddings": True}
TINY |= {"max_position_embeddings": 4096}
SCRIPTS = sorted((path.stem for path in ROOT.glob("*.py")), key=lambda name: (name.endswith("_pretrain"), name))


def say(**values) -> None:
    """One result, at once."""
    print(json.dumps(values), flush=True)


def autocast():
    """bfloat16 over float32 weights, as in the scripts."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


def wait() -> float:
    """The time when the device has done all that it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(work, steps: int) -> float:
    """Seconds of one `work()`, after one that is not counted."""
    work()
    start = wait()
    for _ in range(steps):
        work()
    return (wait() - start) / steps


def model_of(sizes: dict, seed: int = 0):
    """A Llama type with random weights in float32 on the device."""
    ends = {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.device(DEVICE):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | ends)).train()


def peak_bytes() -> int | None:
    """Largest bytes allocated on the GPU since the last call; None on a CPU."""
    if not CUDA:
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


# -- the parts


def rate(tiny: bool) -> None:
    """Matrix products in bfloat16 and float32."""
    size = 256 if tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
        seconds = seconds_of(partial(torch.matmul, a, b), 20)
        stated = flops.peak_flops(DEVICE, dtype)
        measured = 2 * size**3 / seconds
        say(what=f"product of {size} x {size}", dtype=str(dtype), tflops=round(measured / 1e12, 3),
            stated_tflops=stated and stated / 1e12)  # fmt: skip


def tests(tiny: bool) -> None:
    """The tests of tests/test_gpu.py: on a CPU those that run there."""
    with tempfile.TemporaryDirectory() as folder:
        report = f"{folder}/report.xml"
        words = ["-n", "0", "-q", f"--junitxml={report}", "tests/test_gpu.py", *(["-k", "cpu"] if tiny else [])]
        process = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, capture_output=True, text=True)
        import xml.etree.ElementTree as ElementTree

        for case in ElementTree.parse(report).iter("testcase"):
            bad = [child for child in case if child.tag in ("failure", "error")]
            skipped = [child.get("message", "") for child in case if child.tag == "skipped"]
            more = {"failed": bad[0].get("message", "")[:500]} if bad else {}
            more |= {"skipped": skipped[0]} if skipped else {}
            say(test=case.get("name"), seconds=float(case.get("time")), **more)
    if process.returncode not in (0, 1):
        raise SystemExit(process.stdout[-2000:] + process.stderr[-2000:])


def scripts(tiny: bool, names: list[str]) -> None:
    """These scripts for a few steps on the toy, in bfloat16."""
    steps = 1 if tiny else 3
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            module, started = importlib.import_module(name), time.perf_counter()
            fields = module.Args.__dataclass_fields__
            wanted = {"name": name, "output_dir": folder, "dtype": "bfloat16", "max_steps": steps, "log_every": 1}
            wanted |= {"kl_samples": 8, "samples": 8, "max_new_tokens": 8, "eval_every": 100}
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    module.main(module.Args(**{k: v for k, v in wanted.items() if k in fields}))
                lines = [json.loads(line) for line in (Path(folder) / name / "metrics.jsonl").read_text().splitlines()]
                losses = [line["loss"] for line in lines if line["split"] == "train"]
                result = {"losses": [round(loss, 4) for loss in losses]}
            except (Exception, SystemExit) as error:
                result = {"failed": f"{type(error).__name__}: {error}"[:500]}
            say(script=name, seconds=round(time.perf_counter() - started, 2), **result)


def pretrain(tiny: bool) -> None:
    """mle_pretrain's step on a new model: tokens a second, share of the peak, memory."""
    for size, context, chunks in (("tiny", 64, 4),) if tiny else (("0.1B", 1024, 16), ("1B", 1024, 8)):
        sizes = TINY if tiny else memory.SIZES[size]
        peak_bytes()
        model = model_of(sizes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids = torch.randint(2, sizes["vocab_size"], (chunks, context), device=DEVICE)
        batch = {"input_ids": ids, "scores": torch.zeros(chunks, context, device=DEVICE)}

        def step(model=model, optimizer=optimizer, batch=batch) -> None:
            with autocast():
                loss, _ = mle_pretrain.compute_loss(model, batch, 0.0)
            (loss / batch["input_ids"].numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        seconds = seconds_of(step, 2 if tiny else 5)
        per_token = flops.training_flops(model, context)
        share = flops.peak_share(per_token, chunks * context, seconds, DEVICE, torch.bfloat16)
        say(model=size, context=context, tokens_per_second=round(chunks * context / seconds),
            tflops=round(per_token * chunks * context / seconds / 1e12, 3), share_of_stated_peak=share,
            peak_bytes=peak_bytes())  # fmt: skip
        del model, optimizer, batch, step
        gc.collect()


def sampling(tiny: bool) -> None:
    """Completions of random prompts, tokens a second."""
    sizes, prompts, room, length = (TINY, 8, 8, 16) if tiny else (memory.SIZES["0.1B"], 256, 128, 64)
    model = model_of(sizes).eval()
    rng, tokenizer = random.Random(0), SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    ids = [[rng.randrange(2, sizes["vocab_size"]) for _ in range(length)] for _ in range(prompts)]
    for top_p in (1.0, 0.95):
        sample = partial(generate.sample, model, ids, tokenizer, room, top_p=top_p, autocast=autocast)
        sample()
        start = wait()
        made = sum(len(completion) for completion in sample(seed=1))
        say(prompts=prompts, prompt_tokens=length, new_tokens=room, top_p=top_p,
            tokens_per_second=round(made / (wait() - start)), peak_bytes=peak_bytes())  # fmt: skip


# -- pairs


def pair_rows(length: int, count: int, vocabulary: int) -> list[dict]:
    """Pairs of random ids whose lines are `length` tokens at most: half of it the prompt; answers
    of half to all of their room."""
    rng = random.Random(0)

    def ids(n: int) -> list[int]:
        return [rng.randrange(2, vocabulary) for _ in range(n)]

    room = length // 4
    return [
        {"prompt": ids(length // 2), "completions": [ids(rng.randint(room // 2, room)) for _ in range(2)]}
        for _ in range(count)
    ]


def ours(folder: str, steps: list[list[dict]]) -> dict:
    """dpo's loop in bfloat16: seconds of a step with its reference, first loss and
    log-probabilities.
    """
    model = models.load_model(folder, DEVICE).train()
    rows = [row for rows in steps for row in rows]
    layout = oracle.choose_layout(partial(no_grad_logps, model), model, {"train": rows}, PAD, DEVICE, True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    measured = Measurements()
    peak_bytes()
    for rows in steps:
        with autocast():
            ref = no_grad_logps(model, batches.collate(rows, PAD, layout, DEVICE)).float()
        batch = batches.collate(rows, PAD, layout, DEVICE)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = ref.chunk(2)
        with autocast():
            loss, metrics = dpo.compute_loss(model, batch, 0.1)
        (loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        measured.losses.append(metrics["loss"] / len(rows))
        measured.logps = measured.logps or ref.tolist()
        measured.end_step(DEVICE)
    # The reference is computed once for an epoch: its time lies between steps, and counts.
    return summary(measured, steps) | {"layout": layout}


def trl(folder: str, steps: list[list[dict]], **options) -> dict:
    """TRL's DPOTrainer in bfloat16 over float32 weights on the same rows in the same order."""
    from datasets import Dataset
    from trl import DPOConfig

    measured = Measurements()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            measured.end_step(DEVICE)

    def note_logps(_module, _inputs, outputs):
        if torch.is_grad_enabled() and not measured.logps and hasattr(outputs, "log_probs"):
            measured.logps = outputs.log_probs.detach().sum(1).tolist()

    model = models.load_model(folder, DEVICE)
    rows = [
        {"prompt_ids": row["prompt"], "chosen_ids": row["completions"][0], "rejected_ids": row["completions"][1]}
        for rows in steps
        for row in rows
    ]
    peak_bytes()
    with tempfile.TemporaryDirectory() as output, contextlib.redirect_stdout(sys.stderr):
        config = DPOConfig(
            output_dir=output, per_device_train_batch_size=len(steps[0]), num_train_epochs=1, learning_rate=1e-6,
            beta=0.1, bf16=True, max_length=None, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not CUDA, **options,
        )  # fmt: skip
        trainer = trl_trainer_class(measured, DEVICE)(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
        )
        model.register_forward_hook(note_logps)
        trainer.train()
    result = summary(measured, steps)
    if options.get("padding_free"):
        result["padding_free"] = bool(trainer.padding_free)  # TRL 1.16 says that it pads all the same
    if measured.reference and options.get("precompute_ref_log_probs"):  # before the first step: its share
        share = statistics.mean(measured.reference[1:] or measured.reference)
        result |= {"step_seconds": result["step_seconds"] + share}
        result["tokens_per_second"] = round(result["tokens"] / result["step_seconds"])
    return result


def summary(measured: Measurements, steps: list[list[dict]]) -> dict:
    """Seconds of the steps after the first, and what they computed."""
    seconds = (measured.ends[-1] - measured.ends[0]) / (len(measured.ends) - 1)
    tokens = statistics.mean(batches.count_tokens(rows) for rows in steps[1:])
    return {
        "step_seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds),
        "first_loss": round(float(measured.losses[0]), 5),
        "first_logps": [round(value, 2) for value in measured.logps[:2]],
        "peak_bytes": peak_bytes(),
    }


def pairs(tiny: bool) -> None:
    """dpo beside TRL in bfloat16, by model and length; what fails says so and the rest goes on."""
    systems = {"ours": ours}
    if importlib.util.find_spec("trl") is None:
        say(note="TRL is not installed (pip install trl, see requirements-optional.txt): ours alone is measured")
    else:
        tuned = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        systems["TRL"], systems["TRL, tuned"] = trl, partial(trl, **tuned)
        systems["TRL, tuned, padding-free"] = partial(trl, **tuned, padding_free=True)
    lengths = (64, 128) if tiny else (1024, 2048)
    for size, count in (("tiny", 2),) if tiny else (("0.1B", 8), ("1B", 4)):
        sizes = TINY if tiny else memory.SIZES[size]
        with tempfile.TemporaryDirectory() as folder:
            save_model("tiny", Path(folder))  # its tokenizer
            model_of(sizes).save_pretrained(folder)
            for length in lengths:
                rows = pair_rows(length, 4 * count, sizes["vocab_size"])
                steps = [rows[i : i + count] for i in range(0, len(rows), count)]
                for name, system in systems.items():
                    try:
                        result = system(folder, steps)
                    except Exception as error:
                        result = {"failed" if name == "ours" else "not run": f"{type(error).__name__}: {error}"[:500]}
                    say(model=size, length=length, system=name, **result)
                    gc.collect()
                    if CUDA:
                        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("rate", "tests", "scripts", "pretrain", "sampling", "pairs"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    given = parser.parse_args()
    if not CUDA:
        torch.set_num_threads(1)  # tiny models: several threads would wait for each other
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    parts = {"rate": rate, "tests": tests, "scripts": partial(scripts, names=given.scripts), "pretrain": pretrain}
    (parts | {"sampling": sampling, "pairs": pairs})[given.part](given.tiny)
