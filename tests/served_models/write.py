"""Rewrites the bundles that tests serve: `PYTHONPATH=tests python -m served_models.write [NAME/VERSION ...]`."""

import shutil
import sys

from served_models import models

from conformance import onnx_registry

onnx_registry.cache_registry()
for folder in sys.argv[1:] or models.MODELS:
    shutil.rmtree(models.BUNDLES / folder, ignore_errors=True)
    models.export(folder, models.BUNDLES)
