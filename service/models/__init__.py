"""The served models: their versions, the loading of one, and the repository of bundles that decides which are served."""
