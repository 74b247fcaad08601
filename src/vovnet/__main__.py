"""`python -m vovnet`: the command line without its script."""

from vovnet.cli.main import main

main()
