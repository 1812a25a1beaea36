"""What the demo refuses, each with a message that says what came and what to do."""


class DemoError(ValueError):
    """Base of the demo's errors."""


class MissingPackage(DemoError):
    """A package that only the demo needs is not installed."""


class UnsupportedModel(DemoError):
    """The model, or the length that is asked for, is beyond what the demo does."""


class UnusableText(DemoError):
    """The text, the model and the lengths asked for do not fit together."""
