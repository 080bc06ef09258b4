"""The study's quick mode: three tasks, seven optimizers, one seed to tune each and five to compare them.

    python benchmarks/study/demo.py

The same code, tables and plots as the study of protocol.md, with fewer seeds, and so with wider intervals. A second
call goes on where the first one was interrupted; once all is there it shows the tables again.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import report
from study import positive, quick, read, run_missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=positive(int), default=os.cpu_count(), help="at a time; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="default %(default)s")
    arguments = parser.parse_args()
    study = quick(read(arguments.out / "runs.csv"))
    try:
        run_missing(study, list(study.questions), arguments.out, arguments.jobs, None)
    except KeyboardInterrupt:
        sys.exit("interrupted: the next call goes on from here")
    print("\nValidation loss against the comparator's, in % with a 95 % interval over 5 seeds; below 0 is better\n")
    print(report.primary_table(study))
    print("\nThe share of the steps until the loss that the base has after 75 % of them\n")
    print(report.speed_table(study))
    for name, draw in report.FIGURES.items():
        draw(study).savefig(arguments.out / f"{name}.png", dpi=110)
    print(f"\nAll runs and the plots are in {arguments.out}/; docs/results.md has the whole study.")


if __name__ == "__main__":
    main()
