"""What a measurement says about a claim: an effect with its 95% interval, and a verdict by rule.

An effect is a difference that is taken so that more of it speaks for the claim. Its interval is
Student's, over the differences of units measured on both sides: seeds, or questions. A number
without chance, the end of an exact computation, is an interval of no width.

The rule. An effect above a bound (0 unless the claim says how much counts)
    holds       where the whole interval lies above the bound
    fails       where the whole interval lies below it
    undecided   otherwise, and with fewer than three seeds
and an effect that must be nothing holds where the whole interval lies within the margin, and fails
where all of it lies beyond. A claim holds where all effects that decide it hold, fails where one of
them fails, and is undecided otherwise, among others where its bed cannot show it, whatever the
interval; where nothing was measured it was not run.
"""

import math
from dataclasses import dataclass, field, replace

from experiments import study
from experiments.study import t_quantile

HOLDS, FAILS, UNDECIDED, NOT_RUN = VERDICTS = ("holds", "fails", "undecided", "not run")
FEWEST = 3  # seeds; with two the interval is 18 standard errors wide


# -- intervals


def paired_interval(differences: list[float]) -> tuple[float, float | None]:
    """(mean, half the width of the 95% interval) of paired differences; None of a single one."""
    mean, std = study.mean_and_std(differences)
    count = len(differences)
    return mean, None if std is None else t_quantile(count - 1) * std / math.sqrt(count)


def unpaired_interval(ours: tuple[float, float, int], others: tuple[float, float, int]) -> tuple[float, float]:
    """Welch's interval of a difference of means, as `paired_interval`; each side a mean, a standard
    deviation and a count: for files that do not keep the values of their seeds."""
    (mean, std, count), (other_mean, other_std, other_count) = ours, others
    a, b = std**2 / count, other_std**2 / other_count
    if a + b == 0:
        return mean - other_mean, 0.0
    degrees = (a + b) ** 2 / (a**2 / (count - 1) + b**2 / (other_count - 1))
    return mean - other_mean, t_quantile(degrees) * math.sqrt(a + b)


# -- effects


@dataclass(frozen=True)
class Goal:
    """What an effect must be for its claim to hold: above a bound, or within a margin around 0."""

    above: float | None = None
    within: float | None = None

    def of(self, low: float, high: float) -> str:
        """The verdict on an interval."""
        if self.within is not None:
            inside, outside = -self.within <= low and high <= self.within, low > self.within or high < -self.within
        else:
            inside, outside = low > self.above, high < self.above
        return HOLDS if inside else FAILS if outside else UNDECIDED

    def words(self) -> str:
        """The goal in words."""
        return f"above {self.above:g}" if self.within is None else f"within ± {self.within:g}"


POSITIVE = Goal(above=0.0)


@dataclass(frozen=True)
class Effect:
    """A difference that speaks for or against a claim."""

    what: str
    goal: Goal = POSITIVE
    mean: float | None = None  # None: not measured
    half: float | None = None  # of the interval; None: too few values for one
    runs: int = 0  # seeds, or whatever chance was drawn anew for; 0: an exact computation
    over: str = ""  # what the interval is over
    values: dict[str, float] = field(default_factory=dict)  # of each seed
    decides: bool = True  # else it stands beside those that do

    @property
    def verdict(self) -> str:
        """By the rule of this module."""
        if self.mean is None:
            return NOT_RUN
        if self.half is None or 0 < self.runs < FEWEST:
            return UNDECIDED
        return self.goal.of(self.mean - self.half, self.mean + self.half)


def paired(what: str, ours: dict, others: dict, goal: Goal = POSITIVE, scale=lambda value: value) -> Effect:
    """The effect of ours - others, {seed: value} each, over the seeds that both have."""
    both = sorted(ours.keys() & others.keys())
    if not both:
        return Effect(what, goal)
    values = {f"seed {seed}": scale(ours[seed]) - scale(others[seed]) for seed in both}
    mean, half = paired_interval(list(values.values()))
    return Effect(what, goal, mean, half, len(both), f"{len(both)} seeds", values)


def exact(what: str, value: float, goal: Goal = POSITIVE) -> Effect:
    """An effect without chance."""
    return Effect(what, goal, value, 0.0, 0, "exact")


def beside(effect: Effect) -> Effect:
    """The effect as one that does not decide."""
    return replace(effect, decides=False)


@dataclass(frozen=True)
class Finding:
    """What the result files say about a claim."""

    effects: list[Effect]
    source: str = ""  # files, commits, versions
    unfit: str = ""  # why the bed cannot show the claim, where it cannot

    @property
    def verdict(self) -> str:
        """By the rule of this module."""
        verdicts = [effect.verdict for effect in self.effects if effect.decides]
        if set(verdicts) == {NOT_RUN}:
            return NOT_RUN
        if self.unfit:
            return UNDECIDED
        if FAILS in verdicts:
            return FAILS
        return HOLDS if set(verdicts) == {HOLDS} else UNDECIDED


# -- words


def number(value: float, sign: bool = True) -> str:
    """A number as pages show it: three digits behind the point, very small ones as powers."""
    plus = "+" if sign else ""
    return f"{value:{plus}.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:{plus}.0e}"


def in_words(effect: Effect) -> str:
    """An effect in a line: its mean and interval, and of one that decides the goal and verdict."""
    if effect.mean is None:
        return f"{effect.what}: not run"
    judged = f"; {effect.goal.words()}: {effect.verdict}" if effect.decides else ""
    if effect.runs == 0:
        return f"{effect.what}: {number(effect.mean, sign=False)}{judged}"
    interval = "no interval"
    if effect.half is not None:
        interval = f"[{number(effect.mean - effect.half)}, {number(effect.mean + effect.half)}]"
    return f"{effect.what}: {number(effect.mean)} {interval}, {effect.over}{judged}"
