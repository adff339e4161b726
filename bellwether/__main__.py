"""``python -m bellwether`` is the command ``bellwether``."""

from bellwether.cli.main import main

main()
