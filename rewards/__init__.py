"""Rewards: functions of text that run on a laptop. No torch, no Ray, nothing else of this project.

Usage: `from rewards import Rubric, Sample, load_reward`.
"""

from rewards.adapters import from_openrlhf, from_trl, from_verl
from rewards.base import FINISH_REASONS, RewardFunction, Sample, Score, ScoreStatus, as_reward, reward
from rewards.code_reward import code_reward
from rewards.extract import Extraction, extract_answer
from rewards.format import r1_format, r1_format_thinking, tag_count, tagged_format
from rewards.language import language_consistency
from rewards.length import cosine_length, kimi_length, soft_overlong, thinking_length, truncation_penalty
from rewards.load import load_reward, load_rubric, register
from rewards.math_answer import (
    answer_reward,
    answers_equal,
    exact_answer,
    math_answer,
    normalise_answer,
    parse_number,
    strict_math_answer,
)
from rewards.pool import CallStatus, Outcome, WorkerPool
from rewards.remote import http
from rewards.repetition import repetition_penalty
from rewards.rubric import Gate, Rubric, failure_shares, reward_seconds

__all__ = [
    "FINISH_REASONS",
    "CallStatus",
    "Extraction",
    "Gate",
    "Outcome",
    "RewardFunction",
    "Rubric",
    "Sample",
    "Score",
    "ScoreStatus",
    "WorkerPool",
    "answer_reward",
    "answers_equal",
    "as_reward",
    "code_reward",
    "cosine_length",
    "exact_answer",
    "extract_answer",
    "failure_shares",
    "from_openrlhf",
    "from_trl",
    "from_verl",
    "http",
    "kimi_length",
    "language_consistency",
    "load_reward",
    "load_rubric",
    "math_answer",
    "normalise_answer",
    "parse_number",
    "r1_format",
    "r1_format_thinking",
    "register",
    "repetition_penalty",
    "reward",
    "reward_seconds",
    "soft_overlong",
    "strict_math_answer",
    "tag_count",
    "tagged_format",
    "thinking_length",
    "truncation_penalty",
]
