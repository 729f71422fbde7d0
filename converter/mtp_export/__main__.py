"""`python -m mtp_export`: the command line."""

from mtp_export.cli.main import main

main()
