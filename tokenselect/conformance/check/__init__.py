"""The check behind `python -m tokenselect.check`: few problems per backend, in seconds."""
