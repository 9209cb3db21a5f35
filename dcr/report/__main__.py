"""python -m dcr.report"""

import sys

from dcr.report import main

sys.exit(main(sys.argv[1:]))
