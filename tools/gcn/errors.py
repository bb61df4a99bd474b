"""What the interpreter raises."""


class Unsupported(Exception):
    """An instruction, operand or modifier that the interpreter does not know, by name."""


class Fault(Exception):
    """The program did what hardware would not survive, or what its arguments do not allow."""
