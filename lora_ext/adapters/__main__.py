"""`python -m lora_ext.adapters convert FROM TO --layout LAYOUT`: a folder in another layout."""

import argparse

from .convert import convert
from .layouts import LAYOUTS

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m lora_ext.adapters", description=__doc__)
    add = parser.add_subparsers(required=True).add_parser("convert").add_argument
    add("source", metavar="FROM")
    add("target", metavar="TO")
    add("--layout", choices=LAYOUTS, required=True)
    add("--base", help="path or name of the base model, if adapter_config.json names another")
    convert(**vars(parser.parse_args()))
