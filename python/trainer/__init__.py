"""The trainer for real runs: ``train.py --config FILE`` and torchrun. `engine` has the loop, `config` every setting."""
