"""python -m comfyui_mend.cli"""

import sys

from . import main

sys.exit(main())
