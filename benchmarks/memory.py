"""Memory of one training step by size of the model and number of GPUs, computed; and measured
beside the computation where a model is at hand.

    python -m benchmarks.memory                          the table, in two minutes on any machine
    python -m benchmarks.memory --measure MODEL_FOLDER   a step on the CPU in float32, beside it

Bytes on each of N GPUs, in bfloat16 under float32 weights, of P parameters, R of them embeddings,
output layer and final norm, B in a block, M in matrices:

    state         16 P / N: weights 4, gradients 4, AdamW's two moments 8
    reference      4 P / N, where the method keeps a second model: typo, superhf, ppo
    copies        one GPU: 2 M, the matrices in bfloat16 from the forward pass to the backward pass
                  several: 8 R + 2 M_R + 10 B, what is gathered at a time: the root's weights and
                  gradients in float32 with its matrices' copies, two blocks in bfloat16, and of one
                  its gradient in bfloat16 and in the float32 that it is summed in
    activations   counted: dpo.py's own loss runs on tensors without storage, with one layer and
                  with two, and every tensor that is kept for the backward pass counts once
    loading       4 P + 4 P / N: each process loads the whole model on its GPU before it is split,
                  and the reference beside the policy's share, for the samples at the end at least

The total is what is larger, loading or the others together. What is left out: the driver (about
0.5 GB), what the allocator loses to fragments, and tensors that live for one operation.
"""

import contextlib
import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python benchmarks/memory.py

import dpo
from common import InputError, batches, models
from common.files import write_json
from report.facts import git_commit, machine

GB = 1e9
FOLDER = Path(__file__).resolve().parent


def llama(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool) -> dict:
    """The sizes of a Llama type, as in its configuration."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": groups, "vocab_size": vocabulary}
    return sizes | {"tie_word_embeddings": tied, "max_position_embeddings": 131_072}


# In the shapes of well-known open models
SIZES = {
    "0.1B": llama(576, 1536, 30, 9, 3, 49_152, True),
    "0.5B": llama(896, 4864, 24, 14, 2, 151_936, True),
    "1B": llama(2048, 8192, 16, 32, 8, 128_256, True),
    "3B": llama(3072, 8192, 28, 24, 8, 128_256, True),
    "8B": llama(4096, 14_336, 32, 32, 8, 128_256, False),
    "70B": llama(8192, 28_672, 80, 64, 8, 128_256, False),
}


@dataclass
class Args:
    sizes: tuple[str, ...] = tuple(SIZES)
    """Models of the table: 0.1B, 0.5B, 1B, 3B, 8B, 70B."""
    gpus: tuple[int, ...] = (1, 8, 16)
    """Numbers of GPUs."""
    pairs: int = 4
    """Pairs in a micro-batch of each GPU."""
    prompt: int = 512
    """Tokens of each prompt."""
    answer: int = 256
    """Tokens of each answer."""
    measure: str = ""
    """A model's folder: measures a step of it on the CPU in float32 instead, and computes it."""
    output: Path | None = None
    """A JSON file for the numbers."""


# -- computed


@dataclass
class Counts:
    """Parameters and bytes of one model; activations of one micro-batch."""

    parameters: int
    root: int
    block: int
    matrices: int
    root_matrices: int
    activations: float
    recomputed: float


def kept_bytes(config, args: Args, dtype: torch.dtype, recompute: bool) -> tuple[int, int, int]:
    """(bytes kept for the backward pass of dpo's loss, parameters, parameters in matrices).

    The tensors have no storage, so a model of any size is counted on any machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, torch.UntypedStorage] = {}  # held on to, so that no two have one address

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        row = {"prompt": [5] * args.prompt, "completions": [[6] * args.answer, [7] * args.answer]}
        batch = batches.collate([row] * args.pairs, 0, "shared", "cpu")
        batch["ref_chosen_logps"] = batch["ref_rejected_logps"] = torch.zeros(args.pairs)
        narrow = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), narrow:
            dpo.compute_loss(model, batch, 0.1)
        total = sum(p.numel() for p in model.parameters())
        is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        looked_up = 0 if is_tied else model.get_input_embeddings().weight.numel()
        matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1) - looked_up
    return sum(storage.nbytes() for storage in kept.values()), total, matrices


def count(config, args: Args, dtype: torch.dtype) -> Counts:
    """What a model of this configuration has and keeps, from models of one layer and of two."""
    layers = config.num_hidden_layers

    def whole(one: float, two: float) -> float:
        return one + (layers - 1) * (two - one)

    def few(number: int, recompute: bool):
        small = type(config)(**(config.to_dict() | {"num_hidden_layers": number}))
        return kept_bytes(small, args, dtype, recompute)

    (one, two), (lean_one, lean_two) = ([few(n, recompute) for n in (1, 2)] for recompute in (False, True))
    kept, parameters, matrices = (int(whole(a, b)) for a, b in zip(one, two))
    copies = 2 * matrices if dtype != torch.float32 else 0
    root_matrices = 2 * one[2] - two[2]
    # A block that is computed again holds what it would have kept; copies of matrices are its own.
    again = two[0] - one[0]
    lean = whole(lean_one[0], lean_two[0]) - (2 * root_matrices if dtype != torch.float32 else 0) + again
    root = 2 * one[1] - two[1]
    return Counts(parameters, root, two[1] - one[1], matrices, root_matrices, kept - copies, lean)


def memory(counts: Counts, gpus: int, second_model: bool, recompute: bool, narrow: bool = True) -> dict[str, float]:
    """Bytes on each GPU by what they are for, by the formula at the top."""
    parts = {"state": 16 * counts.parameters / gpus}
    parts["reference"] = 4 * counts.parameters / gpus if second_model else 0.0
    parts["copies"] = 2.0 * counts.matrices if narrow else 0.0
    if gpus > 1:
        parts["copies"] = 8.0 * counts.root + 2 * counts.root_matrices + 10 * counts.block
    parts["activations"] = counts.recomputed if recompute else counts.activations
    return parts | {"loading": 4.0 * counts.parameters * (1 + 1 / gpus), "total": sum(parts.values())}


def table(args: Args) -> list[dict]:
    """A line for each size, number of GPUs and kind of method; prints them."""
    lines = []
    each = f"{args.pairs} pairs of {args.prompt} + {args.answer} + {args.answer} tokens on each GPU, GB"
    print(f"{each}; in brackets with --gradient-checkpointing")
    titles = "state", "reference", "copies", "activations", "loading", "total"
    print(f"{'model':>6}{'GPUs':>5}  {'method':26}" + "".join(f"{title:>18}" for title in titles))
    for size in args.sizes:
        config = transformers.LlamaConfig(**SIZES[size])
        counts = count(config, args, torch.bfloat16)
        for gpus in args.gpus:
            for second, methods in ((False, "dpo, and most"), (True, "typo, superhf, ppo")):
                full, lean = (memory(counts, gpus, second, recompute) for recompute in (False, True))
                for parts in (full, lean):
                    parts["total"] = max(parts["total"], parts["loading"])
                words = [f"{full[title] / GB:,.1f}" for title in titles]
                words[3] += f" ({lean['activations'] / GB:,.1f})"
                words[5] += f" ({lean['total'] / GB:,.1f})"
                print(f"{size:>6}{gpus:5}  {methods:26}" + "".join(f"{word:>18}" for word in words), flush=True)
                line = {"size": size, "gpus": gpus, "second_model": second, "counts": asdict(counts)}
                lines.append(line | {"bytes": full, "bytes_recomputing": lean})
    return lines


# -- measured


def measured_step(folder: str, args: Args, recompute: bool) -> None:
    """Two of dpo's steps in float32 on the CPU; prints the peak above the start, in bytes."""
    from benchmarks.systems import Peak, touch

    device = torch.device("cpu")
    model = models.load_model(folder, device).train()
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights, peak = touch(model), Peak(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    row = {"prompt": [5] * args.prompt, "completions": [[6] * args.answer, [7] * args.answer]}
    for _ in range(2):
        batch = batches.collate([row] * args.pairs, 0, "shared", device)
        batch["ref_chosen_logps"] = batch["ref_rejected_logps"] = torch.zeros(args.pairs)
        dpo.compute_loss(model, batch, 0.1)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps(peak.now() - peak.base + weights))


def measure(args: Args) -> list[dict]:
    """Computed and measured bytes of a step of one model on the CPU; prints them."""
    config = transformers.AutoConfig.from_pretrained(args.measure)
    counts, lines = count(config, args, torch.float32), []
    for recompute in (False, True):
        call = f"benchmarks.memory.measured_step({args.measure!r}, a, {recompute})"
        sizes = f"pairs={args.pairs}, prompt={args.prompt}, answer={args.answer}"
        code = f"import benchmarks.memory; a = benchmarks.memory.Args({sizes}); {call}"
        runs = []
        for _ in range(2):
            command = [sys.executable, "-W", "ignore", "-c", code]
            process = subprocess.run(command, cwd=FOLDER.parent, capture_output=True, text=True)
            if process.returncode:
                raise InputError(f"--measure {args.measure}: {process.stderr[-2000:]}")
            runs.append(int(process.stdout.splitlines()[-1]))
        parts = memory(counts, 1, False, recompute, narrow=False)
        computed, peak = parts["total"], statistics.median(runs)
        how = "with" if recompute else "without"
        print(
            f"{how} --gradient-checkpointing: computed {computed / GB:.2f} GB (state {parts['state'] / GB:.2f}),"
            f" measured {peak / GB:.2f} GB, {peak / computed:.2f} times that"
        )
        lines.append({"recompute": recompute, "computed": parts, "measured": runs, "counts": asdict(counts)})
    return lines


def main(args: Args) -> None:
    """Computes or measures, prints, and writes the file where one is asked for."""
    if unknown := set(args.sizes) - SIZES.keys():
        raise InputError(f"--sizes {', '.join(sorted(unknown))}: expected some of {', '.join(SIZES)}.")
    if min(args.pairs, args.prompt, args.answer, *args.gpus) < 1:
        raise InputError("--pairs, --prompt, --answer and --gpus must be at least 1.")
    transformers.utils.logging.set_verbosity_error()
    lines = measure(args) if args.measure else table(args)
    if args.output:
        about = {"command": " ".join(["python -m benchmarks.memory", *sys.argv[1:]]), "commit": git_commit()}
        about |= {name: value for name, value in machine(torch.device("cpu")).items() if name in ("versions", "device")}
        with contextlib.suppress(FileExistsError):
            args.output.parent.mkdir(parents=True)
        write_json(args.output, about | {"lines": lines})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
