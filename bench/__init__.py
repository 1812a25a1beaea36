"""Named workloads, and what the backends take for them beside dense attention."""
