"""The command of dcr.record: numbers of run folders, or of a comparison of arms, into a file."""

import sys

from dcr import entry
from dcr.record import Options


@entry.command(Options)
def main(options: Options) -> None:
    from dcr.record import writing  # with pandas, which help and a user's error need not wait for

    writing.write(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
