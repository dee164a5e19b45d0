"""What the tests of OpenMMLab share: `from small_models import ...` works."""

import sys
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))
