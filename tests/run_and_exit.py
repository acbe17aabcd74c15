"""The `hf-ivon` command, ended without freeing anything: gloo can hang when torch frees a Reducer at the end."""

import os
import sys
import traceback

from torch.nn.parallel import DistributedDataParallel

from hf_ivon.cli.main import main

KEPT = []
construct = DistributedDataParallel.__init__


def keep(self, *args, **kwargs):
    KEPT.append(self)
    construct(self, *args, **kwargs)


if __name__ == "__main__":
    DistributedDataParallel.__init__ = keep
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
