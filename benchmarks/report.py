"""``python -m benchmarks.report FILE``: results as the markdown of the README. vtok_fast/bench/report.py does
it."""

import sys

from vtok_fast.bench.report import load, markdown

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.report RESULTS.json")
    print(markdown(load(sys.argv[1])), end="")
