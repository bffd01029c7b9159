"""Sampling: engines, pools, prompts and verified weight sync. Imports models only."""
