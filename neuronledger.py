"""The name that users import: the version, and the root of every error that NeuronLedger raises.

Everything else lives in `governance` (the use cases), `algorithms` (mathematics on tensors) and
`registry` (the SQL record). This module imports none of them, so all of them may import it.
"""

__version__ = "0.1.0"


class NeuronLedgerError(Exception):
    """Something that the user can mend: bad input, a refused change, a failed check.

    Args:
        problem: what is wrong, naming the file, tensor, row or record.
        mend: what to do about it, as an imperative sentence without a final full stop.

    Attributes:
        exit_code: what the command line exits with (1 a check failed or a gate refused,
            2 wrong usage or input, 3 the registry or a lock is busy).
    """

    exit_code = 2

    def __init__(self, problem: str, mend: str) -> None:
        self.problem = problem.rstrip(".")
        self.mend = mend[:1].upper() + mend[1:].rstrip(".")
        super().__init__(f"{self.problem}. {self.mend}.")
