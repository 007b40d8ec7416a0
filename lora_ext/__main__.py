"""`python -m lora_ext` prints how this copy was built: the table to put in a bug report."""

from .build_info import build_info

if __name__ == "__main__":
    print(build_info())
