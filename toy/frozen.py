"""The files of a world: a model folder, the base model's answers beside it, and world.json, which
tells what world it is and has a hash of every file.

The worlds of seeds 0 to 4 are frozen: they stand in toy/worlds/ and are the same everywhere. Others
are built into the user's cache, where the bytes depend on the versions of torch and transformers.
"""

import gzip
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

from common import InputError, first_line

VERSION = 1  # of the frozen worlds; another one where a question, the reward or a frozen byte changes
FOLDER = Path(__file__).with_name("worlds")
ANSWERS, ABOUT = "answers.json.gz", "world.json"


def write_answers(folder: Path, answers: list[list[str]]) -> None:
    """Answers [questions][n] as packed JSON: the same bytes for the same answers."""
    (folder / ANSWERS).write_bytes(gzip.compress(json.dumps(answers).encode(), 9, mtime=0))


def read_answers(folder: str | Path) -> list[list[str]]:
    """The answers that are kept with a base model, [questions][n]; InputError where they cannot be
    read."""
    path = Path(folder) / ANSWERS
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: the toy's answers cannot be read ({first_line(error)}).") from None


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a world by name, world.json left out."""
    files = sorted(path for path in folder.iterdir() if path.name != ABOUT)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_about(folder: Path, world: str, seed: int) -> None:
    """world.json, the last file of a world to be written."""
    import torch
    import transformers

    made_with = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"world": world, "seed": seed, "version": VERSION, "made_with": made_with, "files": hashes(folder)}
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with the files of a world, in words; None where they are as written."""
    try:
        expected = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["files"]
        for name, digest in expected.items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                return f"{name} is not as it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{ABOUT} cannot be read ({first_line(error)})"
    return None


def frozen_folder(world: str, seed: int) -> Path | None:
    """The frozen world of a seed, None where the code beside us has none; InputError where it is
    damaged: building another in its place would change every number without a word."""
    folder = FOLDER / f"{world}-seed{seed}"
    if not folder.is_dir():
        return None
    if reason := damage(folder):
        again = f"git checkout -- {FOLDER.parent.name}/{FOLDER.name} brings it back"
        raise InputError(f"{folder}: this frozen world of the toy is damaged: {reason}; {again}.")
    return folder


def move_into_place(aside: Path, folder: Path) -> None:
    """Gives a finished world its name. Where another process was first its files stay; a damaged
    world's are replaced, world.json last."""
    try:
        os.rename(aside, folder)
    except OSError:
        if damage(folder):
            for path in sorted(aside.iterdir(), key=lambda path: path.name == ABOUT):
                os.replace(path, folder / path.name)
        shutil.rmtree(aside, ignore_errors=True)


def description(world: str, seed: int) -> str:
    """Which world a run is in, for its summary: "easy, version 1", or how another one was made."""
    folder = FOLDER / f"{world}-seed{seed}"
    if folder.is_dir():
        return f"{world}, version {json.loads((folder / ABOUT).read_text(encoding='utf-8'))['version']}"
    import torch

    return f"{world}, version {VERSION}, seed {seed} built with torch {torch.__version__}"
