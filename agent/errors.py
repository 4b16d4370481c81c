"""The errors that weir expects: each says what is wrong and what to do about it."""


class WeirError(Exception):
    """An expected failure: the command ends with exit status 1 and no traceback.

    ``message`` is one sentence about what is wrong; ``hint`` says what to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message
