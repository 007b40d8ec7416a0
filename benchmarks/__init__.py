"""Latency and memory of one LoRA linear layer, ours against the alternatives, on this machine.

`python -m benchmarks` measures the headline cells, `python -m benchmarks --full` the whole grid,
`python -m benchmarks.gpu` a first set on a CUDA device, and `python -m benchmarks.report FILE`
renders the report of an earlier run again. Data flows one way:

    shapes -> problem -> variants -> agreement, timing, memory -> runner -> results (JSON)
                                                                  -> targets -> report, plots
"""
