"""Replay the requests at both servers; the exit status is 1 if a difference is not explained."""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import closing

from rich.console import Console

from tests.compat import models, peer, servers
from tests.compat.compare import differences
from tests.compat.known import explained, write_last_run
from tests.compat.replay import Case, Client, cases
from tests.compat.report import Finding, Reasons, judge, last_run, show, stale


def replay(chosen: list[Case], reasons: Reasons) -> list[Finding]:
    """Every case at both servers, one after another."""
    peer_python = peer.python()
    models.ensure(peer_python)
    with (
        servers.running(peer_python) as (theirs, ours),
        closing(Client(theirs)) as one,
        closing(Client(ours)) as two,
    ):
        pairs = zip(chosen, one.answers(chosen), two.answers(chosen), strict=True)
        return [judge(case, differences(*answers), reasons) for case, *answers in pairs]


def main() -> int:
    """Run the suite."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression that the case's name must match")
    parser.add_argument("--every", action="store_true", help="show the cases that are equal or explained too")
    parser.add_argument("--write", action="store_true", help="put the result into docs/compatibility.md")
    options = parser.parse_args()
    reasons, console, begin = explained(), Console(), time.monotonic()
    findings = replay([case for case in cases() if re.search(options.only, case.name)], reasons)
    show(console, findings, every=options.every)
    if options.write:
        write_last_run(last_run(findings, time.monotonic() - begin))
    gone = [] if options.only else stale(findings, reasons)
    for name, kind in gone:
        console.print(f"docs/compatibility.md explains '{kind}' of '{name}', which is not so", markup=False)
    return int(bool(gone) or any(each.verdict == "different" for each in findings))


if __name__ == "__main__":
    sys.exit(main())
