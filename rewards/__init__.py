"""Rewards: functions of text that run on a laptop. No torch, no Ray, nothing else of this project.

Usage: `from rewards import Rubric, Sample, load_reward`.
"""

from rewards.base import FINISH_REASONS, RewardFunction, Rubric, Sample, Score, ScoreStatus, as_reward, reward
from rewards.extract import Extraction, extract_answer
from rewards.format import r1_format
from rewards.length import thinking_length
from rewards.load import load_reward, register
from rewards.math_answer import answer_reward, answers_equal, exact_answer, math_answer, normalise_answer, parse_number

__all__ = [
    "FINISH_REASONS",
    "Extraction",
    "RewardFunction",
    "Rubric",
    "Sample",
    "Score",
    "ScoreStatus",
    "answer_reward",
    "answers_equal",
    "as_reward",
    "exact_answer",
    "extract_answer",
    "load_reward",
    "math_answer",
    "normalise_answer",
    "parse_number",
    "r1_format",
    "register",
    "reward",
    "thinking_length",
]
