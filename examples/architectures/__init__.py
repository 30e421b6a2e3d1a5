"""Small, untrained models with the architectures of well-known streaming models; each file's `build` returns one.

`unroll export unroll.examples.architectures.voice:build --input samples:float32:576 --name voice --repository bundles`
"""
