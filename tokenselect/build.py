"""Compile the native backend's kernels now, not at the first call: python -m tokenselect.build.

Exit code 0: they are compiled, and load. 1: they are not, and the reason is printed.
"""

import logging
import sys

from tokenselect.kernels.native.library import Library, open_library


def main() -> int:
    """Compile, load, and say where the library is and which path of it runs here."""
    logging.basicConfig(format="%(message)s")
    made = open_library()
    if isinstance(made, Library):
        print(f"native: {made.path} kernels in {made.file}")
        return 0
    print(f"native is not available: {made}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
