"""Test modules may import what lies beside them: `import stage_dpo_toy`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
