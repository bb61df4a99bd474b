"""Sums, differences and products, with the working written out or without it.

    345 + 678
    5 + 8 = 13, write 3, carry 1
    4 + 7 + 1 = 12, write 2, carry 1
    3 + 6 + 1 = 10, write 10
    So 1023

Contract: operand pairs are split by hash; sums and products count as the same either way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from random import Random

from train.data.items import Item, assistant, of_split, user

_ASK = {
    "+": ("What is {a} + {b}?", "{a} + {b} = ?", "Compute {a} + {b}.", "Add {a} and {b}."),
    "-": ("What is {a} - {b}?", "{a} - {b} = ?", "Compute {a} - {b}.", "Subtract {b} from {a}."),
    "*": ("What is {a} * {b}?", "{a} * {b} = ?", "Compute {a} * {b}.", "Multiply {a} by {b}."),
}


@dataclass(frozen=True)
class Problem:
    """`a op b`, with a ≥ b for differences and b one digit for products."""

    a: int
    op: str
    b: int

    @property
    def key(self) -> str:
        """What the split is by."""
        low, high = (self.a, self.b) if self.op == "-" else sorted((self.a, self.b))
        return f"{self.op} {low} {high}"

    @property
    def result(self) -> int:
        """The answer."""
        if self.op == "+":
            return self.a + self.b
        return self.a - self.b if self.op == "-" else self.a * self.b


_SMALL = 0.06  # of what is learned, but not asked for in an evaluation: two numbers below ten


def _draw(random: Random, evaluation: bool = False) -> Problem:
    op = random.choice("++--*")
    if not evaluation and random.random() < _SMALL:
        a, b = random.randrange(10), random.randrange(10)
        return Problem(max(a, b), op, min(a, b))
    if op == "*":
        return Problem(random.randrange(10, 100), op, random.randrange(2, 10))
    high = 100 if random.random() < 0.25 else 1000
    a, b = random.randrange(10, high), random.randrange(10, high)
    return Problem(max(a, b), op, min(a, b)) if op == "-" else Problem(a, op, b)


def problem(random: Random, evaluation: bool) -> Problem:
    """A problem of one split."""
    draw = partial(_draw, evaluation=evaluation)
    found: Problem = of_split(random, evaluation, draw, lambda drawn: drawn.key)
    return found


def working(p: Problem) -> str:
    """The written method, column by column from the right."""
    lines, carry = [f"{p.a} {p.op} {p.b}"], 0
    width = len(str(p.a)) if p.op == "*" else max(len(str(p.a)), len(str(p.b)))
    left, right = str(p.a).zfill(width)[::-1], str(p.b).zfill(width)[::-1]
    for column in range(width):
        x, y = int(left[column]), p.b if p.op == "*" else int(right[column])
        value = {"+": x + y + carry, "-": x - y - carry, "*": x * y + carry}[p.op]
        sign = "-" if p.op == "-" else "+"
        sum_text = f"{x} {p.op} {y}" + (f" {sign} {carry}" if carry else "") + f" = {value}"
        if column == width - 1:
            lines.append(f"{sum_text}, write {value}")
        else:
            carry = -(value // 10) if p.op == "-" else value // 10
            moved = f", {'borrow' if p.op == '-' else 'carry'} {carry}" if carry else ""
            lines.append(f"{sum_text}, write {value % 10}{moved}")
    lines.append(f"So {p.result}")
    return "\n".join(lines)


def ask(random: Random, p: Problem) -> str:
    """One way to ask for it."""
    return random.choice(_ASK[p.op]).format(a=p.a, b=p.b)


def item(random: Random, evaluation: bool, thinking: bool) -> Item:
    """One problem, in training after up to a few others, which are answered without working."""
    last = problem(random, evaluation)
    before = (
        [] if evaluation else [problem(random, False) for _ in range(_earlier(random, thinking))]
    )
    messages = []
    for each in before:
        messages += [user(ask(random, each)), assistant(str(each.result))]
    messages.append(user(ask(random, last)))
    answer = assistant(str(last.result), working(last) if thinking else "")
    skill = "arithmetic_thinking" if thinking else "arithmetic"
    keys = tuple(each.key for each in before)
    return Item(skill, tuple(messages), answer, last.key, thinking, keys=keys)


def _earlier(random: Random, thinking: bool) -> int:
    return random.choice((0, 0, 1, 2)) if thinking else random.choice((3, 4, 5, 10))
