"""Faults that the tests must catch: a list TABLE in each module, applied by tests.mutants."""

from dataclasses import dataclass

from tests.house import FAMILIES


@dataclass
class Mutant:
    name: str
    files: tuple[str, ...]
    old: str  # the exact text, once in each file
    new: str
    test: str  # the node that must catch it, below tests/; a test with parameters runs with all of them


def scripts_of(family: str) -> tuple[str, ...]:
    """The files of a family's scripts; a fault in their trunk is made in all of them."""
    return tuple(f"{stem}.py" for stem in FAMILIES[family])
