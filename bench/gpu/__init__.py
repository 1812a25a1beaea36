"""The GPU check and benchmark in one command: `make gpu`, or `python -m bench.gpu`.

What `__main__` runs, in this order:

    checks     nothing is reported of a backend that fails one
    measure    the `cases`, one after the other, in a process that may die without harm:
               `bench.checks` holds the stages to float64 on the inputs that are timed, `baselines`
               is what dense attention there is, `steps` planned steps, and `timing` times them all
               by turns, as it does for `bench.run`
    model      a whole model, in such a process of its own
    page       the JSON, the targets, and the section in docs/benchmarks.md

Only `device` knows CUDA. A dry run puts the CPU's clock in its place and small cases in the place
of the real ones, and goes through everything else.
"""
