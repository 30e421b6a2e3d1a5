"""From a config to the store that it selects. Only where that is a Redis is its client imported: it takes megabytes."""

from typing import TYPE_CHECKING, Union

from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Store

if TYPE_CHECKING:
    from unroll.service.store.redis_store import RedisStoreConfig

StoreConfig = Union[EmbeddedStoreConfig, "RedisStoreConfig"]


def open_store(config: StoreConfig) -> Store:
    """Raises StoreUnavailable if a folder cannot be used, and StoreRefused if a URL is wrong."""
    if isinstance(config, EmbeddedStoreConfig):
        return EmbeddedStore(config)
    from unroll.service.store.redis_store import RedisStore

    return RedisStore(config)
