"""`python -m hf_ivon`: the `hf-ivon` command."""

from hf_ivon.cli.main import main

if __name__ == "__main__":
    main()
