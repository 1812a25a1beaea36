"""Whether a backend is right: what its author, or its user, runs.

problems      a problem as a few numbers and a seed
tolerances    how far a result may be from the truth, entry by entry
check         `python -m tokenselect.check`: few problems, in seconds
laws          `python -m tokenselect.conformance`: what holds of every backend, on drawn problems
pytest        the laws as tests of one's own

Laws, and they alone, need hypothesis: `pip install tokenselect[conformance]`.
"""
