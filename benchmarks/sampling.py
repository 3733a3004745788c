"""Sampling against transformers' generate(): the same model, prompts and distribution, in turns in
one process, in processor seconds.

    python benchmarks/sampling.py                    stories260K and a random Llama type of 19M
    python benchmarks/sampling.py --model FOLDER     a model of your own besides
    python benchmarks/sampling.py --model FOLDER --scripts superhf ppo --reward FOLDER
    python benchmarks/sampling.py --tiny             a tiny random model, for tests

Before: generate() with every prompt repeated n times in float32, as the scripts called it on a CPU
until `--dtype auto` chose bfloat16 there. After: common.generate.sample, in bfloat16. Between them
generate() in bfloat16: what the dtype alone brings. With --continuous also generate_batch(),
transformers' continuous batching. --scripts runs a step of each as it was before, sampling, dtype
and in ppo.py a line for each completion, then as it is, and says what generation, scoring and
training took. Prompts are Anthropic's hh from $PREFERENCE_DATA; a random model gets random ids of
the same lengths.
"""

import json
import random
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/sampling.py

import ppo
import superhf
from benchmarks.inputs import save_model
from benchmarks.pairs import versions
from common import generate, models
from common.files import write_json
from report.facts import device_name, git_commit

LENGTHS = (205, 171, 96, 21, 60, 144, 33, 118)  # tokens of the prompts of random ids
MARKER = "\n\nAssistant:"


@dataclass
class Args:
    model: str = ""
    """Folder of a model with tokenizer, measured besides the two that are always there."""
    prompts: int = 4
    """Distinct prompts."""
    n: int = 16
    """Completions of each."""
    max_new_tokens: int = 64
    """Length limit of a completion."""
    top_p: tuple[float, ...] = (0.95, 1.0)
    """Each is measured."""
    dtype: str = "bfloat16"
    """Of matrix products after: float32 or bfloat16."""
    dtype_before: str = "float32"
    """Of matrix products before."""
    repeats: int = 1
    """How often the systems take turns."""
    continuous: bool = False
    """Measure generate_batch() too."""
    scripts: tuple[str, ...] = ()
    """Of superhf and ppo, with --model: a step of each, before and after."""
    reward: str = "toy"
    """Folder of the reward model that --scripts score with."""
    only_model: bool = False
    """Leave the other two models out."""
    tiny: bool = False
    """A tiny random model and few tokens."""
    output: str = ""
    """File of the results; empty: none is written."""


@torch.no_grad()
def sample_before(
    model, prompts, tokenizer, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, autocast=None, n=1, **_
) -> list[list[int]]:
    """generate() in batches of 64 rows of similar length."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=pad, do_sample=True, top_k=0, top_p=top_p
    )
    config.temperature = temperature
    repeated = [prompt for prompt in prompts for _ in range(n)]
    order = sorted(range(len(repeated)), key=lambda i: len(repeated[i]))
    completions: list = [None] * len(repeated)
    size, own, was_training = generate.samples_at_once(model), model.generation_config, model.training
    model.eval().generation_config = config
    torch.manual_seed(seed)
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        inputs = generate.pad_left([repeated[i] for i in chunk], pad, model.device)
        with autocast() if autocast else nullcontext():
            output = model.generate(**inputs, generation_config=config)
        for i, new in zip(chunk, output[:, inputs["input_ids"].shape[1] :].tolist()):
            completions[i] = new[: new.index(eos) + 1] if eos in new else new
    model.train(was_training).generation_config = own
    return completions


def sample_continuous(model, prompts, tokenizer, max_new_tokens, top_p=1.0, autocast=None, n=1) -> list[list[int]]:
    """generate_batch(): transformers' continuous batching."""
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, do_sample=True, top_k=0, top_p=top_p
    )
    config.pad_token_id = tokenizer.pad_token_id
    repeated = [prompt for prompt in prompts for _ in range(n)]
    with autocast() if autocast else nullcontext():
        outputs = model.eval().generate_batch(repeated, generation_config=config, progress_bar=False)
    return [output.generated_tokens for output in outputs.values()]


def prompt_texts(count: int) -> list[str]:
    """Prompts of Anthropic's hh: dialogues up to the assistant's last turn."""
    import os

    from common.files import read_rows

    rows = read_rows(os.environ["PREFERENCE_DATA"] + "/pairs/hh_harmless_base.jsonl.gz")
    texts = [row["chosen"] for _, row in zip(range(20 * count), (row for _, row in rows))]
    return [text[: text.rindex(MARKER) + len(MARKER)] for text in texts]


def model_names(args: Args) -> dict[str, str]:
    """Name -> folder, or nothing for a model that benchmarks/inputs.py makes."""
    import os

    if args.tiny:
        return {"tiny": ""}
    stories = Path(os.environ.get("PREFERENCE_DATA", "")) / "models" / "stories260K"
    named = {} if args.only_model else {"llama-19m": ""}
    if stories.is_dir() and not args.only_model:
        named = {"stories260K": str(stories)} | named
    return named | ({Path(args.model).name: args.model} if args.model else {})


def measure(name: str, folder: str, args: Args) -> list[dict]:
    """An entry for each top_p: completions and tokens a processor second of each system."""
    with tempfile.TemporaryDirectory() as made:
        if not folder:
            save_model(name, Path(made))
        tokenizer = models.load_tokenizer(folder or made)
        model = models.load_model(folder or made, torch.device("cpu"), tokenizer)
    if folder:
        prompts = [tokenizer(text).input_ids for text in prompt_texts(args.prompts)]
        prompts = [ids for ids in prompts if len(ids) <= 256][: args.prompts]
    else:
        rng = random.Random(0)
        lengths = [LENGTHS[i % len(LENGTHS)] // (8 if args.tiny else 1) for i in range(args.prompts)]
        prompts = [[rng.randrange(2, model.config.vocab_size) for _ in range(length)] for length in lengths]
    systems = {"before": (sample_before, args.dtype_before), "after": (generate.sample, args.dtype)}
    if args.dtype != args.dtype_before:
        systems[f"before_{args.dtype}"] = (sample_before, args.dtype)
    systems |= {"continuous": (sample_continuous, args.dtype)} if args.continuous else {}
    entries = []
    for top_p in args.top_p:
        runs: dict[str, list[dict]] = {system: [] for system in systems}
        for _ in range(args.repeats):
            for system, (sample, dtype) in systems.items():
                autocast = partial(torch.autocast, "cpu", torch.bfloat16) if dtype == "bfloat16" else None
                started = time.process_time()
                done = sample(model, prompts, tokenizer, args.max_new_tokens, top_p=top_p, autocast=autocast, n=args.n)
                seconds = time.process_time() - started
                runs[system].append({"seconds": seconds, "completions": len(done), "tokens": sum(map(len, done))})
        rates = {}
        for system, measured in runs.items():
            total = sum(run["seconds"] for run in measured)
            rates[system] = {key: sum(run[key] for run in measured) / total for key in ("completions", "tokens")}
        times = rates["after"]["tokens"] / rates["before"]["tokens"]
        entries.append({"model": name, "top_p": top_p, "times": times, "a_second": rates, "runs": runs})
        shown = ", ".join(f"{system} {rate['tokens']:.0f}" for system, rate in rates.items())
        print(f"{name}, top_p {top_p}: {shown} tokens a second; {times:.2f} times", flush=True)
    return entries


def run_script(module, args: Args, system: str, folder: Path) -> dict:
    """One step of a script; the processor seconds of its parts and completions a second of them."""
    spent = {"generation": 0.0, "scoring": 0.0, "training": 0.0}

    @contextmanager
    def timed(seconds, name):
        started = time.process_time()
        yield
        spent[name] += time.process_time() - started

    rows = folder / "prompts.jsonl"
    texts = sorted(set(prompt_texts(64)), key=lambda text: (not 100 < len(text) < 800, text))[:80]
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    sizes = {"batch_size": args.prompts, "completions": args.n}
    sizes |= {"ppo_epochs": 1, "share_prompt": system == "after"} if module is ppo else {}
    dtype = {"before": args.dtype_before, "after": args.dtype}[system]
    given = module.Args(
        model=args.model, data=str(rows), reward=args.reward, name=f"{module.__name__}-{system}", max_steps=1,
        kl_samples=0, micro_batch_size=8, max_new_tokens=args.max_new_tokens, dtype=dtype, max_length=1024,
        output_dir=str(folder), holdout=0.0, log_every=1, **sizes,
    )  # fmt: skip
    sample = {"before": sample_before, "after": generate.sample}[system]
    with mock.patch.object(generate, "sample", sample), mock.patch.object(module, "timed", timed):
        module.main(given)
    seconds = sum(spent.values())
    shares = {name: part / seconds for name, part in spent.items()}
    return {"seconds": seconds, "completions_a_second": args.prompts * args.n / seconds, "shares": shares}


def main(args: Args) -> None:
    """Measures, prints, writes the file."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if args.tiny:
        args.prompts, args.n, args.max_new_tokens, args.dtype, args.dtype_before = 2, 4, 4, "float32", "float32"
    # Of a folder its name: where it lies is the machine's own affair.
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    about = {
        "command": " ".join(["python", "benchmarks/sampling.py", *words]),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": device_name(torch.device("cpu")),
        "versions": versions(),
        "threads": 1,
    }
    report: dict = {"sampling": [], "scripts": []}
    for name, folder in model_names(args).items():
        report["sampling"] += measure(name, folder, args)
    for name in args.scripts:
        entry: dict = {"script": name, "model": Path(args.model).name}
        with tempfile.TemporaryDirectory() as folder:
            for system in ("before", "after"):
                entry[system] = run_script({"superhf": superhf, "ppo": ppo}[name], args, system, Path(folder))
                print(name, system, json.dumps(entry[system]), flush=True)
        entry["times"] = entry["after"]["completions_a_second"] / entry["before"]["completions_a_second"]
        report["scripts"].append(entry)
    if args.output:
        write_json(Path(args.output), about | report)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
