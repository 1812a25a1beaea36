"""The GPU check and benchmark in one command: `make gpu`, or `python -m bench.gpu`.

What `__main__` runs, in this order:

    gate      the checks: nothing is reported of a backend that fails one
      probe     what they run; `graphs` has those of plans and CUDA graphs
    worker    the cells of `plan`, one after the other, in a process that may die without harm
      inputs    made on the device
      truth     equivalence, on the inputs that are timed
      rivals    what dense attention there is
      reuse     planned steps: selections reused, made afresh, and both by turns
      measure   times: `device` has the clock, the graphs and the memory
    report    the JSON, the table, the targets; `page` has the section in docs/benchmarks.md

Only `device` knows CUDA. A dry run puts the CPU's clock in its place and small cells in the place
of the real ones, and goes through everything else.
"""
