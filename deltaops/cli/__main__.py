"""``python -m deltaops.cli``."""

from . import main

main()
