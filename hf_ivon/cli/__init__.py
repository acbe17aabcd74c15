"""The `hf-ivon` command."""
