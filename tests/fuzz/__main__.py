"""``python -m tests.fuzz --count 20000 --seed 0 --out results.json``."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what lies in no directory is not looked for elsewhere
os.environ.setdefault("OMP_NUM_THREADS", "1")

from .hostile import directory_of, run, summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="directories to load")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="index of the first")
    parser.add_argument("--out", type=Path, help="JSON file for counts, errors and failures")
    parser.add_argument("--write", type=Path, help="write the directory of --start there, and stop")
    args = parser.parse_args()
    if args.write:
        kind, directory = directory_of(args.seed, args.start)
        directory.write(args.write)
        sys.stdout.write(f"{kind}\n")
        return 0
    begun = time.perf_counter()
    found = summary(run(args.count, args.seed, start=args.start))
    found |= dict(seed=args.seed, start=args.start, seconds=round(time.perf_counter() - begun))
    text = json.dumps(found, indent=1)
    if args.out:
        args.out.write_text(text)
    sys.stdout.write(f"{found['directories']} directories, {len(found['failures'])} failures\n")
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
