"""The fast backends, one module each. Each is loaded when it is first asked for."""
