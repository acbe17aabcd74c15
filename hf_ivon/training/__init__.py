"""IVON in Transformers' Trainer: arguments, effective sample size, the Trainer itself."""
