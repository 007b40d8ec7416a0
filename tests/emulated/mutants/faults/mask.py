"""Dropout's bits on Hopper: drawn ahead in shares, queued, applied."""

from emulated.mutants.faults.fault import Fault, faults_of

CONSUMER = "gemm/sm90a/multiply.h"

of_mask = faults_of("gemm/sm90a/mask_ahead.h")


MASK = [
    of_mask(
        "mask_bits_reversed",
        "the first element of a word is taken from its lowest bit",
        "it was shifted in first",
        ("(31 - share % 4 * 8 - i)", "(share % 4 * 8 + i)"),
    ),
    of_mask(
        "mask_words_reversed",
        "the first word is taken for the last",
        "shares come in at the end",
        ("words[share / 4] >>", "words[kWords - 1 - share / 4] >>"),
    ),
    of_mask(
        "mask_share_of_seven_bits",
        "seven bits of a share go on to the next word",
        "a share has eight",
        ("words[i + 1] >> 24", "words[i + 1] >> 25"),
    ),
    of_mask(
        "mask_rows_exchanged",
        "a thread's second row is taken to lie 64 rows on",
        "it lies 8 rows on, and the next row block 64",
        ("of_rows / 2 * 64 + of_rows % 2 * 8", "of_rows % 2 * 64 + of_rows / 2 * 8"),
    ),
    of_mask(
        "mask_of_the_first_tile",
        "all tiles have the bits of the first",
        "each has its own",
        ("    drawn = 0;\n", ""),
    ),
    of_mask(
        "mask_not_scaled",
        "what is kept is not scaled",
        "inverted dropout divides by the probability",
        ("kept ? value * scale : 0.f", "kept ? value : 0.f"),
    ),
    Fault(
        "mask_drawn_before_it_is_applied",
        "a share of the next tile's bits is drawn before this one's are applied",
        "the queue has no place for it",
        (
            (
                CONSUMER,
                "      ahead.apply(acc);\n",
                "      ahead.draw_in_step(min(next, block.tiles - 1));\n      ahead.apply(acc);\n",
            ),
        ),
    ),
]
