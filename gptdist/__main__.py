import sys

from gptdist.cli import main

sys.exit(main())
