"""The errors that reach a user: what came, which rule it breaks, what to do."""

import difflib
from collections.abc import Iterable


class TokenSelectError(ValueError):
    """Base of every error that tokenselect raises on purpose."""


class InvalidProblem(TokenSelectError):
    """The arguments contradict one another or a documented rule; no backend could run them."""

    # What it is made with are its args; no call to super().__init__, which torch.compile would
    # report instead of the error.
    def __init__(self, came: str, rule: str, fix: str) -> None: ...

    def __str__(self) -> str:
        came, rule, fix = self.args
        return f"{came}\n  rule: {rule}\n  do:   {fix}"


class UnsupportedProblem(TokenSelectError):
    """The problem is valid, but the backends asked cannot run it. `reasons` says why, by name."""

    def __init__(self, problem: str, reasons: dict[str, list[str]], fix: str) -> None:
        super().__init__(problem, reasons, fix)
        self.reasons = reasons

    def __str__(self) -> str:
        problem, reasons, fix = self.args
        lines = [f"  {name}: {why}" for name, whys in reasons.items() for why in whys]
        return "\n".join([f"no backend asked can run {problem}", *lines, f"  do: {fix}"])


class NotCapturable(TokenSelectError):
    """A step cannot be captured in a CUDA graph: an operation in it waits for the device."""

    def __init__(self, operation: str, rule: str, fix: str) -> None: ...

    @property
    def operation(self) -> str:
        """Its name, and what is wrong with it."""
        return str(self.args[0])

    def __str__(self) -> str:
        operation, rule, fix = self.args
        return f"{operation} cannot be captured in a CUDA graph\n  rule: {rule}\n  do:   {fix}"


class RankFailed(TokenSelectError):
    """Ranks that share a call could not exchange what they had to: one failed, or left."""

    def __init__(self, rank: int, size: int, cause: str) -> None:
        super().__init__(rank, size, cause)

    def __str__(self) -> str:
        rank, size, cause = self.args
        return (
            f"rank {rank} of {size} got no answer from the others: {cause}\n"
            "  rule: all ranks of a process group make the same calls, or none can go on\n"
            "  do:   look for the first error of another rank; then start all of them again"
        )


class UnknownBackend(TokenSelectError):
    """No backend of that name is registered."""

    def __init__(self, name: object, known: Iterable[str]) -> None:
        super().__init__(name, sorted(known))

    def __str__(self) -> str:
        name, names = self.args
        close = difflib.get_close_matches(str(name).lower(), names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "name one of these, or register yours"
        return (
            f"backend={name!r} is not registered\n  rule: backend is one of "
            f"{', '.join(map(repr, names))}\n  do:   {hint}"
        )
