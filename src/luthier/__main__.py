"""`python -m luthier` is `luthier`."""

from luthier.cli import main
from luthier.ranks import leave

leave(main())
