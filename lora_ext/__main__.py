"""`python -m lora_ext` prints how this copy was built: a table for bug reports."""

from .build_info import build_info

if __name__ == "__main__":
    print(build_info())
