"""`python -m lora_ext` prints how this copy was built: a table for bug reports."""

import argparse

from .build_info import build_info

if __name__ == "__main__":
    argparse.ArgumentParser("python -m lora_ext", description=__doc__).parse_args()
    print(build_info())
