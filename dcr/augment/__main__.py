"""python -m dcr.augment"""

import sys

from dcr import cli
from dcr.augment import main
from dcr.config import UserError
from dcr.text import single_line

if __name__ == "__main__":
    cli.stop_once()
    try:
        with cli.faults_in_words():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {single_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
