"""How far form alone, or single words, tell apart the two kinds of some pairings of sources.

    python benchmarks/balance.py <data> [--record <name>]

These are the numbers that `plan=true` shows for the rows of a run, here of whole sources, less the
rows kept apart for `data=final`. `--record` writes them to docs/records/<name>.csv.
"""

import argparse
import datetime

from dcr.balance import balance
from dcr.core import config, sources
from dcr.record import origins, writing

PAIRINGS = {  # by name: sources of seemingly toxic and of toxic prompts
    "paper": (["xstest_safe"], ["stl_safety"]),
    "harmfulqa": (["xstest_safe"], ["harmfulqa"]),
    "xstest": (["xstest_safe"], ["xstest_unsafe"]),
    "contrasts": (
        ["contrasts_seemingly_toxic", "contrasts_seemingly_toxic_heldout"],
        ["contrasts_toxic", "contrasts_toxic_heldout"],
    ),
    "registers": (
        ["registers_seemingly_toxic", "registers_seemingly_toxic_heldout"],
        ["registers_toxic", "registers_toxic_heldout"],
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("data", help="folder of the sets")
    parser.add_argument("--record", help="the name of a record to write, or to write anew")
    options = parser.parse_args()
    data = options.data
    now = datetime.datetime.now(datetime.UTC).isoformat()
    found = []
    for name, pairing in PAIRINGS.items():
        kinds = [[row for of in names for row in sources.read(of, root=data)] for names in pairing]
        told, asked = balance(*kinds), sources.fingerprint([*kinds[0], *kinds[1]])[:12]
        assert told
        print(name, *(": ".join(row) for row in told.rows()), sep="\n  ")
        about = {"name": name, "n": sum(map(len, kinds)), "prompts": asked}
        about |= {"machine": origins.device(), "date": now}
        for by, value in (("form", told.form), ("words", told.words)):
            found.append(about | {"metric": f"balance/{by}", "value": value})
    if options.record:
        out = config.CONF.parent / writing.RECORDS / f"{options.record}.csv"
        writing.keep(found, out, f"python benchmarks/balance.py <data> --record {options.record}")


if __name__ == "__main__":
    main()
