"""Small, untrained models with the architectures of well-known streaming models; `build` of each file returns one.

`unroll export unroll.examples.architectures.voice:build --input samples:float32:576 --name voice --repository bundles`
"""
