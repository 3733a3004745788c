"""The 21 claims of the papers: for each the command that decides it here, what the result files
say, and a verdict by the rule of experiments/effects.py.

    python -m experiments.claims               a line a claim
    python -m experiments.claims --claim 13    all of one: every effect, and the value of each seed

docs/claims.md shows the same (`python -m tests.pages --fix`), so a new result file changes it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for python experiments/claims.py

from common import InputError
from experiments import study
from experiments.claim_table import CLAIMS, Claim
from experiments.effects import VERDICTS, Finding, in_words
from experiments.effects import number as number_of

RESULTS = study.ROOT / "results"
SHOWN = 20  # seeds whose values are printed


@dataclass
class Args:
    claim: int = 0
    """Show all of this claim, by its number; 0: a line for each."""
    results: str = str(RESULTS)
    """Folder of the result files."""


def sentence_of(claim: Claim, finding: Finding) -> str:
    """Why the verdict is what it is."""
    return claim.because.get(finding.verdict, "By the rule; why is not written yet.")


# -- the page


def source_words(claim: Claim, finding: Finding) -> str:
    """The bed and where its numbers are from."""
    return f"{claim.bed}. {finding.source}" if finding.source else f"{claim.bed}. No result file yet"


def row_of(number: int, results: Path) -> list[str]:
    """A claim's cells in the table of the page."""
    claim, finding = CLAIMS[number], CLAIMS[number].finding(results)
    effects = [in_words(effect) for effect in finding.effects if effect.decides]
    effects += [
        f"*beside it* {in_words(effect)}"
        for effect in finding.effects
        if not effect.decides and effect.mean is not None
    ]
    if finding.unfit and finding.source:
        effects.append(f"*the bed cannot show it:* {finding.unfit}")
    verdict = f"**{finding.verdict}**"
    reported = f"{claim.text}. *Paper:* {claim.reported}"
    cells = [number, reported, f"`{claim.command}`", source_words(claim, finding), "<br>".join(effects), verdict]
    return [str(cell).replace("pi*", "pi\\*") for cell in (*cells, sentence_of(claim, finding))]


def table(first: int, last: int, results: Path) -> str:
    """The page's table of the claims from `first` to `last`."""
    heads = ["", "claim", "command", "bed and source", "effect, 95% interval", "verdict", "because"]
    lines = [heads, ["---"] * len(heads), *(row_of(number, results) for number in range(first, last + 1))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(results: Path) -> str:
    """The claims of each verdict, by number."""
    found: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for number, claim in CLAIMS.items():
        found[claim.finding(results).verdict].append(str(number))
    return "\n".join(
        f"- {verdict}, {len(found[verdict])}: {', '.join(found[verdict]) or 'none'}" for verdict in VERDICTS
    )


def block(results: Path, kind: str, *numbers: str) -> str:
    """A block of the page by its mark's words: verdicts, or table and the first and last claim."""
    if kind == "verdicts" and not numbers:
        return verdicts(results)
    if kind == "table" and len(numbers) == 2 and all(text.isdigit() and int(text) in CLAIMS for text in numbers):
        return table(*map(int, numbers), results)
    raise KeyError(" ".join((kind, *numbers)))


# -- the command line


def print_claim(number: int, results: Path) -> None:
    """All of a claim."""
    claim, finding = CLAIMS[number], CLAIMS[number].finding(results)
    print(f"{number}. {claim.text}: {finding.verdict}")
    for name, words in (
        ("paper", claim.reported),
        ("command", claim.command),
        ("bed", source_words(claim, finding)),
        ("because", sentence_of(claim, finding)),
        ("bed cannot show it", finding.unfit),
    ):
        print(f"   {name}: {words}" if words else "", end="\n" if words else "")
    for effect in finding.effects:
        print(f"\n   {'' if effect.decides else 'beside it, '}{in_words(effect)}")
        for seed, value in list(effect.values.items())[:SHOWN]:
            print(f"      {seed}: {number_of(value)}")
        if len(effect.values) > SHOWN:
            print(f"      and {len(effect.values) - SHOWN} more")


def print_table(results: Path) -> None:
    """A line a claim."""
    rows = []
    for number, claim in CLAIMS.items():
        finding = claim.finding(results)
        first = finding.effects[0]
        rows.append([f"{number}. {claim.text}", finding.verdict, in_words(first).removesuffix(f": {first.verdict}")])
    study.print_table(["claim", "verdict", "first of the effects that decide"], rows)


def main(args: Args) -> None:
    """Prints the table, or all of one claim."""
    results = Path(args.results)
    if not results.is_dir():
        raise InputError(f"--results {results}: there is no such folder.")
    if args.claim and args.claim not in CLAIMS:
        raise InputError(f"--claim {args.claim}: expected 1 to {max(CLAIMS)}.")
    if args.claim:
        print_claim(args.claim, results)
    else:
        print_table(results)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
