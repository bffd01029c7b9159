"""Math-Verify as a second opinion: optional, and only inside a worker process that is killed at its deadline.

Math-Verify's own timeouts are alarms of the main thread. Here they are off; the pool's deadline holds in any thread.
Needs `pip install math-verify`. Usage: `answer_reward(name="mv", equal=math_verify_equal)`.
"""

from typing import Any

from rewards.pool import CallStatus, shared_pool

TIMEOUT_S, NUM_WORKERS, MEMORY_LIMIT_MIB = 5.0, 2, 4096


def math_verify_equal(gold: str, predicted: str, timeout_s: float = TIMEOUT_S) -> tuple[bool, str]:
    """The verdict of Math-Verify on two bare answers, and "math_verify", "timeout" or its error as the reason."""
    pool = shared_pool(NUM_WORKERS, memory_limit_mib=MEMORY_LIMIT_MIB)
    outcome = pool.call(verify_unguarded, gold, predicted, timeout_s=timeout_s)
    if outcome.status is CallStatus.OK:
        return bool(outcome.value), "math_verify"
    if outcome.status is CallStatus.TIMEOUT:
        return False, f"timeout: Math-Verify took more than {timeout_s} s"
    return False, f"Math-Verify failed: {outcome.error.strip().rpartition(chr(10))[2]}"


def verify_unguarded(gold: str, predicted: str) -> bool:
    """Ask Math-Verify in this process, without any limit of time or memory."""
    from math_verify import parse, verify  # lazy: an optional package that takes a second to import

    boxed_gold, boxed = (f"\\boxed{{{text}}}" for text in (gold, predicted))
    no_alarm: Any = None  # annotated as a number there; None turns the alarm off
    parsed_gold, parsed = (parse(text, parsing_timeout=no_alarm) for text in (boxed_gold, boxed))
    return bool(verify(parsed_gold, parsed, timeout_seconds=no_alarm))
