"""Runs that are killed again and again: `python -m tests.kills [script ...] [--kills 20]`.

Each script trains on the toy in a process of its own, with a checkpoint after every step, is killed
with SIGKILL at a random moment, at times while it saves, and goes on with --resume until it is
finished. Weights, metrics.jsonl, candidates.jsonl and summary.json must then be those of a run that
nobody disturbed, bit for bit; of the summary all but time, speed and memory. A run that is finished
before the last kill is compared and begun anew.

The processes are forked from this one, which has torch and transformers loaded: a start takes no
time, and the kills fall on what the scripts do.
"""

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
STEPS = 9
COMMON = f"--max-steps {STEPS} --save-every 1 --eval-every 2 --log-every 2".split()
ALIGNMENT = [*COMMON, *"--batch-size 8 --micro-batch-size 4 --kl-samples 8 --max-new-tokens 12".split()]
PRETRAINING = [*COMMON, *"--batch-size 4 --micro-batch-size 2 --samples 12 --max-new-tokens 12 --tokens 1e4".split()]
FLAGS = {  # of the method: what has a state of its own
    "dph": "--head-dropout 0.2 --prior-decay 0.1 --n 3".split(),
    "superhf": "--completions 4".split(),
    "ppo": "--ppo-epochs 2".split(),
    "pointwise_dpo": ["--learn-partition"],
}
CHANGING = {"seconds", "tokens_per_second", "peak_memory_bytes", "peak_flops_share", "time_shares"}
COMPARED = ("model.safetensors", "metrics.jsonl", "candidates.jsonl")


def scripts() -> list[str]:
    """All scripts, by name."""
    return sorted(path.stem for path in ROOT.glob("*.py"))


def words_of(script: str, name: str, folder: Path) -> list[str]:
    """The command line of a new run."""
    flags = PRETRAINING if script.endswith("_pretrain") else ALIGNMENT
    if script == "reward_model":
        flags = flags[: flags.index("--kl-samples")]  # it samples nothing
    return [*flags, *FLAGS.get(script, []), "--name", name, "--output-dir", str(folder)]


def load_libraries() -> None:
    """What every script imports, so that a forked process begins with its own work."""
    import torch
    import transformers  # noqa: F401
    import tyro  # noqa: F401
    from torch.distributed.checkpoint import state_dict  # noqa: F401

    from common import evaluate, run  # noqa: F401
    from toy import base

    torch.set_num_threads(1)
    base.base_model(0)


def start(script: str, words: list[str], log: Path) -> int:
    """The id of a forked process that runs a script with these words; it prints into `log`."""
    if process := os.fork():
        return process
    status = 1
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(ROOT)
        sys.argv = [f"{script}.py", *words]
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        status = 0
    except SystemExit as error:
        print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(process: int, seconds: float = 600, is_time=lambda: True) -> int | None:
    """The exit status of a process, minus the signal where one ended it; None: it still runs, some
    seconds have passed, and then it is time."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end and is_time():
            return None
        time.sleep(0.001)


def wait_for_a_moment(process: int, run: Path, seconds: float, rng: random.Random) -> int | None:
    """Waits until a process is to be killed, every third time while it writes a checkpoint; its
    exit status where it ends before."""
    if rng.random() < 2 / 3:
        return wait(process, rng.uniform(0, seconds))
    status = wait(process, rng.uniform(0, seconds / 2), lambda: any((run / "checkpoints").glob("part-*")))
    return wait(process, rng.uniform(0, 0.03)) if status is None else status


def kill(process: int) -> None:
    """SIGKILL, and the end of it."""
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def moment_of(folder: Path) -> str:
    """Where a killed run stood, from what it left behind."""
    if not (folder / "args.json").exists():
        return "before the folder"
    if (folder / "summary.json").exists():
        return "after the summary"
    names = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    if any(name.startswith("part-") for name in names) or len(names) > 1:
        return "in a checkpoint"
    if any(folder.glob("*.part")):
        return "in a file"
    if not names:
        return "before the first checkpoint"
    return "after the last step" if names == [f"step-{STEPS:08d}"] else "between steps"


def facts_of(folder: Path) -> dict:
    """Everything about a finished run that must not depend on kills."""
    facts: dict = {name: (folder / name).read_bytes() for name in COMPARED if (folder / name).exists()}
    summary = json.loads((folder / "summary.json").read_text())
    summary["args"].pop("name")
    return facts | {name: value for name, value in summary.items() if name not in CHANGING}


def differences(folder: Path, whole: dict) -> list[str]:
    """What of a finished run is not as in the undisturbed one."""
    facts = facts_of(folder)
    return sorted(name for name in facts.keys() | whole.keys() if facts.get(name) != whole.get(name))


def kill_again_and_again(script: str, kills: int, folder: Path, rng: random.Random) -> tuple[Counter, list[str]]:
    """(kills by moment and finished runs, what did not heal) of one script."""
    counts, faults = Counter(), []
    log = folder / f"{script}.log"
    started = time.monotonic()
    if status := wait(start(script, words_of(script, f"{script}-whole", folder), log)):
        return counts, [f"the undisturbed run ends with {status}: {log.read_text()[-600:]}"]
    seconds = time.monotonic() - started
    whole = facts_of(folder / f"{script}-whole")
    while kills > 0 and len(faults) < 3:
        run = folder / f"{script}-{counts['finished']}"
        while True:
            words = ["--resume", str(run)] if run.exists() else words_of(script, run.name, folder)
            process = start(script, words, log)
            status = wait_for_a_moment(process, run, seconds, rng) if kills else wait(process)
            if status is None:
                kill(process)
                kills -= 1
                counts[moment_of(run)] += 1
                if not (run / "summary.json").exists():
                    continue
            elif status:
                faults.append(f"{' '.join(words)} ends with {status}: {log.read_text()[-600:]}")
                break
            counts["finished"] += 1
            faults += [f"{run.name}: {name} is not as without kills" for name in differences(run, whole)]
            break
    return counts, faults


def main() -> None:
    """Kills the scripts that were named, or all; exits with 1 where something did not heal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", help="names without .py; none: all")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs for each script")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    args = parser.parse_args()
    load_libraries()
    total, failed = Counter(), 0
    for script in args.scripts or scripts():
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(f"{script} {args.seed}")
            counts, faults = kill_again_and_again(script, args.kills, Path(folder), rng)
        total += counts
        failed += len(faults)
        kills = sum(number for moment, number in counts.items() if moment != "finished")
        moments = ", ".join(f"{number} {moment}" for moment, number in counts.most_common() if moment != "finished")
        print(
            f"{script}: {kills} kills ({moments}), {counts['finished']} runs finished and the same as without.",
            flush=True,
        )
        for fault in faults:
            print(f"    {fault}", flush=True)
    finished = total.pop("finished", 0)
    moments = ", ".join(f"{number} {moment}" for moment, number in total.most_common())
    print(f"{sum(total.values())} kills ({moments}); {finished} runs finished; {failed} did not heal.")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
