"""Tables and figures of a results page, made from the table of results.

Every block between ``<!-- table: EXAMPLE DATASET -->`` and ``<!-- end -->`` of the page is written anew, with a figure
beside the page; the text around it stays.

    python examples/compare.py --results docs/results/domains.csv --write docs/results/domains.md
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

import pandas as pd
from common import figures, results
from common.methods import method_of

from tucka.files import write_atomically

BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(table: pd.DataFrame) -> str:
    """Averages of runs, see `results.averages`, as a table of a page.

    Raises
    ------
    ValueError
        If the runs have several metrics.
    """
    metrics = sorted(set(table["metric"]))
    if len(metrics) != 1:
        raise ValueError(f"a table is of one metric, got {', '.join(metrics) or 'no runs'}")
    seeds = sorted(set(table["seeds"]))
    of = f"mean ± s.e. of {f'{seeds[0]} seeds' if len(seeds) == 1 else 'the seeds'}" if seeds != [1] else "one seed"
    lines = [
        f"| method | adapter parameters | {metrics[0]}, {of} | learning rate | CPU time of a run |",
        "|---|---|---|---|---|",
    ]
    for row in table.itertuples():
        count = "" if len(seeds) == 1 else f" ({row.seeds})"
        error = f" ± {row.error:.1f}" if row.seeds > 1 else ""
        cells = (name_of(row), f"{row.parameters:,}", f"{row.score:.1f}{error}{count}", f"{row.learning_rate:g}")
        seconds = "" if math.isnan(row.cpu_seconds) else f"{row.cpu_seconds:.0f} s"
        lines.append("| " + " | ".join((*cells, seconds)) + " |")
    return "\n".join(lines)


def name_of(row) -> str:
    """A method, its size, and what else its name sets."""
    name = row.method.partition(":")[0]
    settings = results.read_settings(row.settings)
    sizes = [key for key in ("r", "k", "t", "p", "oft_block_size", "boft_block_size") if settings.get(key)]
    others = [key for key in method_of(row.method)[1] if key not in sizes]
    return " ".join([name, *(f"{key}={settings[key]}" for key in (*sizes, *others))])


def write(path: Path, page: Path) -> list[Path]:
    """Write the blocks of a page anew that have runs in the table; the files that were written.

    Raises
    ------
    ValueError
        If the page has no block with runs.
    """
    text, written = page.read_text(encoding="utf-8"), [page]

    def block(match: re.Match) -> str:
        example, dataset = match[2], match[3]
        table = results.table(path, example, dataset)
        if table.empty:
            return match[0]
        picture = page.with_name(f"{page.stem}-{dataset}.svg")
        written.append(figures.draw(table, picture))
        image = f"![Score against parameters of every method on {dataset}]({picture.name})"
        return f"{match[1]}\n{markdown(table)}\n\n{image}\n\n{match[4]}"

    new = BLOCK.sub(block, text)
    if len(written) == 1:
        raise ValueError(f"{page} has no block <!-- table: EXAMPLE DATASET --> … <!-- end --> of runs that {path} has")
    write_atomically(page, lambda temporary: temporary.write_text(new, encoding="utf-8"))
    return written


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="table of results")
    parser.add_argument("--write", type=Path, required=True, help="page to write the tables to")
    args = parser.parse_args(argv)
    for path in write(args.results, args.write):
        print(path)


if __name__ == "__main__":
    main()
