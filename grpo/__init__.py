"""GRPO itself: advantages, losses, packing, the learner and the trainer. Imports rollout, rewards and models."""
