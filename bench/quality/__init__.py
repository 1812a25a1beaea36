"""How much a model's answers change with selection, and what its options are worth.

`python -m bench.quality run --settings quick`; docs/quality.md has what came of it, and
CONTRIBUTING.md how to run it.
"""
