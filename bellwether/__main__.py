"""``python -m bellwether`` is the command ``bellwether``."""

from bellwether.cli.cli import main

main()
