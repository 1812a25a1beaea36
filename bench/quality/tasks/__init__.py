"""The tasks, one module each: `Settings`, `cells` and `run`.

Settings                     a frozen dataclass, what YAML may say
cells(settings, plan, lab)   every cell of it; raises InvalidProblem for what does not go
run(cells, lab)              the values of cells of one work, in any order
"""
