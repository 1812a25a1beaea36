"""From a call to the stages of a backend: names, operators, the step."""
