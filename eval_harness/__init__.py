"""Evaluation of Motif-2 with lm-eval: suites, tasks, a sandbox for generated programs, reports."""
