"""``python -m vifamily`` is the command ``vifamily``."""

from vifamily.cli import main

if __name__ == "__main__":
    main()
