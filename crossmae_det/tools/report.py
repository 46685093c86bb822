"""The command report."""

from argparse import ArgumentParser
from pathlib import Path

from crossmae_det.engine.launch import PAGE, start_log

COMPARISON = "comparison.html"


def report(parser: ArgumentParser) -> None:
    """Write the report of a run again, or compare several runs, in one HTML file.

    With one run it is written to RUN/report.html, with several to comparison.html, where
    differences are to the first run. Runs may be of any task, running, killed or old.

      crossmae-det report output/demo
      crossmae-det report output/demo output/demo_lr5e-4 --output lr.html
    """
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--output", metavar="FILE", help="the page to write, .html")
    args = parser.parse_args()
    several = len(args.runs) > 1
    output = Path(args.output or (COMPARISON if several else Path(args.runs[0], PAGE)))
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the page is HTML: name a file with suffix .html")
    start_log()
    from crossmae_det.report.page import write_comparison, write_run_page

    if several:
        write_comparison(args.runs, output)
    else:
        write_run_page(args.runs[0], output)
    print(output)
