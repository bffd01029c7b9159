"""The parts of `grpo eval`: sampling from engines or a server, judging, summing up, reporting, comparing."""
