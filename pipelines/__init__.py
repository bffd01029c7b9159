"""What a user runs: stages, tasks, evaluation, recipes and the command line."""
