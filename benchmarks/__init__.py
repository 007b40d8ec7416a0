"""Latency and memory of one LoRA linear layer, ours against the alternatives, on this machine.

`python -m benchmarks` measures the headline cells, `python -m benchmarks --full` the whole grid;
`.gpu`, `.adapters` and `.whole_models` are suites of their own.
All but `.gpu` have their command from `suite`. Data flows one way:

    shapes -> problem -> variants -> agreement, timing, memory -> runner -> results, targets

and from there, alike for every benchmark:

    results (JSON) -> report -> layer_report, gpu_report, ...    made of markdown
                             -> layer_figures, models_figures, ...  made of figures

`python -m benchmarks.report FILE` renders the report of an earlier run again, whatever it was.
"""
