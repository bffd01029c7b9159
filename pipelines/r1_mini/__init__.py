"""The claims of the R1 paper (arXiv:2501.12948) in miniature, on two CPU cores: `grpo r1-mini`.

effort.py says how much of everything, stages.py has the steps, arms.py what is compared, run.py runs the arms in two
processes, and results.py makes the table and the pictures.
"""
