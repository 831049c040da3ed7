"""The modules of the distillation trainer: data, models, training loop, report. ``train.py`` runs them."""
