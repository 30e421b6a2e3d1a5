"""Opens the store that a config selects. The Redis client is imported only if needed, because it takes megabytes."""

from typing import TYPE_CHECKING, Union

from unroll.service.store.embedded_store import EmbeddedStore, EmbeddedStoreConfig
from unroll.service.store.interface import Store

if TYPE_CHECKING:
    from unroll.service.store.redis_store import RedisStoreConfig

StoreConfig = Union[EmbeddedStoreConfig, "RedisStoreConfig"]


def open_store(config: StoreConfig) -> Store:
    """Raises StoreUnavailable if a folder cannot be used, and StoreRefused if a URL is invalid."""
    if isinstance(config, EmbeddedStoreConfig):
        return EmbeddedStore(config)
    from unroll.service.store.redis_store import RedisStore

    return RedisStore(config)
