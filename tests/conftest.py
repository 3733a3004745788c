"""Fixtures that all tests share.

Threads and telemetry are set before torch and transformers are imported.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # layers this small are slower on several threads
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # plain `pytest` does not put the current folder there, `python -m pytest` does

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import models, runs  # noqa: E402

torch.set_num_threads(1)


def pytest_addoption(parser) -> None:
    """`--fuzz 10000`: so many generated files of each format, other ones each time; `--all`: whole
    experiments and benchmarks in small, too; `--chat-model FOLDER`: all scripts on a real model.
    """
    parser.addoption("--fuzz", type=int, default=0, help="generated files of each format in tests/test_fuzz.py")
    parser.addoption("--chat-model", default="", help="folder of a chat model, for tests/test_chat_model.py")
    parser.addoption("--all", action="store_true", help="the tests marked study, too")


def pytest_collection_modifyitems(config, items) -> None:
    """Skips what takes minutes and is seldom touched, unless `--all` asks for it."""
    if not config.getoption("--all"):
        for item in items:
            if item.get_closest_marker("study"):
                item.add_marker(pytest.mark.skip(reason="a whole experiment or benchmark in small: pytest --all"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder, where scripts are run from."""
    return ROOT


@pytest.fixture(scope="session")
def toy_base() -> Path:
    """Folder of the easy world of seed 0, a frozen one: the base model and its answers."""
    from toy import base

    return base.base_model(0)


@pytest.fixture(scope="session")
def toy_tokenizer():
    """The toy's word-level tokenizer: a real fast tokenizer that puts BOS before every text,
    without the base model's training.
    """
    from toy import world

    return world.build_tokenizer()


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory, toy_tokenizer) -> Path:
    """Folder of a random GPT-2 type of two layers with the toy's tokenizer; learned positions,
    dropout .1 as GPT-2 has it.
    """
    return models.save(models.tiny_gpt2(len(toy_tokenizer)), toy_tokenizer, tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, toy_tokenizer) -> Path:
    """Folder of a random Llama type of two layers with the toy's tokenizer; rotary positions,
    grouped keys.
    """
    return models.save(
        models.tiny_llama(len(toy_tokenizer)), toy_tokenizer, tmp_path_factory.mktemp("models") / "llama"
    )


@pytest.fixture
def llama(tiny_llama) -> str:
    return str(tiny_llama)


@pytest.fixture
def gpt2(tiny_gpt2) -> str:
    return str(tiny_gpt2)


@pytest.fixture(params=["tiny_gpt2", "tiny_llama"])
def folder(request) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="session")
def file13(tmp_path_factory) -> str:
    """13 pairs: batches of 8 and 4 leave an uneven last step."""
    return runs.write_pairs(tmp_path_factory.mktemp("data") / "pairs.jsonl", 13)


@pytest.fixture(scope="session")
def bigram(tmp_path_factory, toy_tokenizer) -> SimpleNamespace:
    """A model whose log-probabilities are known exactly, with the toy's tokenizer: `table` [from,
    to] in nats (float64), `folder`, `tokenizer`, `load()` for a fresh model, and `logps(prompt ids,
    completion ids)` for the exact summed log-probability.
    """
    table = models.random_table(len(toy_tokenizer), seed=0)
    folder = models.save(models.bigram_model(table), toy_tokenizer, tmp_path_factory.mktemp("models") / "bigram")
    return SimpleNamespace(
        table=table,
        folder=folder,
        tokenizer=toy_tokenizer,
        load=lambda: models.bigram_model(table),
        logps=lambda prompt, completion: models.bigram_logps(table, prompt, completion),
    )


@pytest.fixture(scope="session")
def preference_data() -> Path:
    """Folder of real data and small models; the test is skipped where there is none."""
    folder = os.environ.get("PREFERENCE_DATA")
    if not folder:
        pytest.skip("needs real data: PREFERENCE_DATA is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"needs real data: PREFERENCE_DATA={folder} is no folder")
    return Path(folder)
