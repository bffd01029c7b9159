"""EvalPlus' tests (arXiv:2305.01210) without numpy, which they import for two names and the sandbox does not have.

The hub's form is read (evalplus/humanevalplus, evalplus/mbppplus; the files named OriginFmt), in which `test` holds all
inputs and results. EvalPlus' release files hold inputs alone, whose results a program would have to make: refused.
"""

from pipelines.tasks.base import Row

_NUMPY = '''
class np:
    """What the tests use of numpy."""

    class ndarray:
        pass

    float32 = float64 = float

    @staticmethod
    def allclose(out, exp, rtol, atol):
        if isinstance(out, (list, tuple)) and isinstance(exp, (list, tuple)):
            return len(out) == len(exp) and all(np.allclose(a, b, rtol, atol) for a, b in zip(out, exp))
        return out == exp or abs(out - exp) <= atol + rtol * abs(exp)
'''

# HumanEval/32 asks for a root; the hub's form has the arguments in the wrong places, so that every program fails.
_ROOT_TEST = "_poly(*candidate(*inp), inp) <= 0.0001"
_MENDED_ROOT_TEST = "abs(_poly(*inp, candidate(*inp))) <= 0.0001"


def check_tests(row: Row) -> str | None:
    """None for a row in the hub's form, else the reason."""
    if "plus_input" in row:
        return "EvalPlus' release form, with inputs and no results: take the hub's form (OriginFmt)"
    test = row.get("test")
    return (
        None
        if isinstance(test, str) and ("assertion(" in test or _ROOT_TEST in test)
        else "field 'test' holds no tests of EvalPlus"
    )


def prepare_tests(row: Row) -> Row:
    test = row["test"].replace("import numpy as np\n", _NUMPY, 1).replace(_ROOT_TEST, _MENDED_ROOT_TEST)
    return row | {"test": test}
