"""The losses: a file for each, with its public functions, its module and its composition."""
