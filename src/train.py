"""What LLaMA-Factory's launch scripts call: `deepspeed src/train.py --key value` is `luthier train --key value`."""

import sys

from luthier.cli import main
from luthier.ranks import leave

leave(main(["train", *sys.argv[1:]]))
