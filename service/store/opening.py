"""From a config to the store that it selects."""

from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Store
from unroll.service.store.redis_store import RedisStore, RedisStoreConfig

StoreConfig = EmbeddedStoreConfig | RedisStoreConfig


def open_store(config: StoreConfig) -> Store:
    """Raises StoreUnavailable if a folder cannot be used, and StoreRefused if a URL is wrong."""
    return EmbeddedStore(config) if isinstance(config, EmbeddedStoreConfig) else RedisStore(config)
