"""Models with the architecture of well-known streaming models, small and untrained: each file's `build` makes one.

`unroll export examples.architectures.voice:build --input samples:float32:576 --name voice --repository bundles`
"""
