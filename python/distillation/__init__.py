"""The parts of the distillation trainer: data, models, training loop, report. ``train.py`` puts them together."""
