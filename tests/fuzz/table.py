"""Tables of one or several runs: ``python -m tests.fuzz.table results.json … > tables.md``."""

import json
import sys
from collections import Counter
from pathlib import Path

OUTCOMES = ("loaded", "refused", "refused by PEFT or transformers", "refused, base left wrapped")


def merged(runs: list[dict]) -> dict:
    """The counts of all runs together, and their peaks."""
    kinds: dict = {}
    ways: dict = {}
    errors: Counter = Counter()
    for run in runs:
        for held, counts in ((kinds, run["kinds"]), (ways, run["ways"])):
            for name, outcomes in counts.items():
                held.setdefault(name, Counter()).update(outcomes)
        for *error, number in run["errors"]:
            errors[tuple(error)] += number
    return dict(kinds=kinds, ways=ways, errors=errors) | {
        name: sum(run[name] for run in runs) for name in ("directories", "loads", "seconds")
    }


def rows(counts: dict) -> list[str]:
    """A row for each name: the outcomes that may be, and the sum of those that must not."""
    found = []
    for name in sorted(counts):
        numbers = [counts[name].get(outcome, 0) for outcome in OUTCOMES]
        found.append([name.replace("_", " "), *numbers, sum(counts[name].values()) - sum(numbers)])
    total = [sum(row[i] for row in found) for i in range(1, len(OUTCOMES) + 2)]
    return [f"| {' | '.join(map(str, row))} |" for row in [*found, ["all", *total]]]


def tables(runs: list[dict], most: int = 40) -> str:
    """Markdown: by mutation, by way to load, and the commonest errors."""
    found = merged(runs)
    head = [f"{' | '.join((*OUTCOMES, 'failure'))} |", f"{'---|' * (len(OUTCOMES) + 1)}"]
    lines = [f"| mutation | {head[0]}", f"|---|{head[1]}", *rows(found["kinds"]), ""]
    lines += [f"| way to load | {head[0]}", f"|---|{head[1]}", *rows(found["ways"]), ""]
    lines += ["| number | outcome | error | message |", "|---|---|---|---|"]
    for (outcome, error, message), number in found["errors"].most_common(most):
        lines.append(f"| {number} | {outcome} | {error} | {message.splitlines()[0].replace('|', ' ')} |")
    peak, slowest = (max(run[name] for run in runs) for name in ("peak_memory", "slowest"))
    sums = f"{found['directories']} directories, {found['loads']} loads, {found['seconds']} s."
    lines += ["", f"{sums} The most memory a load took was {peak >> 20} MiB, the longest time {slowest:.1f} s."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(tables([json.loads(Path(path).read_text()) for path in sys.argv[1:]]) + "\n")
