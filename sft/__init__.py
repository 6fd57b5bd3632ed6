"""Supervised fine-tuning of Motif-2 with TRL: chat markup, data, stages."""
