"""tokenselect inside other libraries. Each is imported by name: it needs a package of its own."""
