"""Draw every figure of the analysis package from the quickstart's adapter, and write the gallery page.

Run examples/quickstart.py first: it leaves the adapter, its base model, test digits and the log of the training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import transformers
from matplotlib import rc_context
from tqdm import tqdm

from analysis import adapter_of, observe, style
from analysis.data import load_model, read_data
from analysis.figures import FIGURES, Inputs, draw

HEAD = """# Figures by name

Every figure that `python -m analysis figure` knows, drawn from the adapter of the quickstart (a small vision
transformer on digits of four shifted domains, each with labels of its own) and from the sweep over experts and ranks
([docs/results/experts.md](results/experts.md)). The scripts in `docs/gallery/` draw them in Python, a function of
`analysis.plots` each, and run whenever the documentation is built (`make docs`).

    python examples/quickstart.py
    python examples/gallery.py
"""


def inputs_from(quickstart: Path, runs: Path) -> Inputs:
    """All that figures are drawn from."""
    model = load_model(quickstart / "adapter", quickstart / "base")
    data = read_data(quickstart / "test.npz", model, labels="domain")
    observed = observe(model, data.batches, samples=data.samples, labels=data.labels, progress=False)
    log = json.loads((quickstart / "trainer_state.json").read_text())["log_history"]
    return Inputs(adapter_of(model), observed, log, pd.read_csv(runs), layer="1.mlp.fc1")


def main(argv: list[str] | None = None) -> Path:
    """Draw the gallery."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--quickstart", type=Path, default=Path("out/quickstart"), help="what examples/quickstart.py wrote")
    add("--runs", type=Path, default=Path("docs/results/experts.csv"), help="results of the sweep")
    add("--output", type=Path, default=Path("docs"), help="directory of gallery.md and images/gallery")
    args = parser.parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    inputs = inputs_from(args.quickstart, args.runs)
    images = args.output / "images" / "gallery"
    images.mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    # With a fixed salt and no date, equal numbers give equal files.
    with style("notebook"), rc_context({"svg.hashsalt": "gallery"}):
        for name, figure in tqdm(FIGURES.items(), desc="gallery", unit=" figures"):
            # Heat maps keep their shape, and would leave white above and below themselves.
            draw(name, inputs).figure.savefig(images / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            parts.append(f"## {figure.title}\n\n{figure.caption}\n\n![{figure.title}](images/gallery/{name}.svg)\n")
    page = args.output / "gallery.md"
    page.write_text("\n".join(parts))
    return page


if __name__ == "__main__":
    print(main())
