"""What `train.sweep` is made of.

dimension.py (the values of a key), rules.py (samplers and pruners, as they are named), plan.py (what is asked, checked),
sampling.py (what is tried next, by Optuna), study.py (the trials that all processes share), workers.py (which of these
processes live), trial.py (a trial is a run), bound.py (which ends with its sweep), loop.py; findings.py, results.py,
page.py, plots.py (what comes out).
"""
