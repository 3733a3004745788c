"""Attention states of sampled tokens, in tensors that are made once."""

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """States of one layer with room for `tokens` more: transformers' layer copies all states for
    each token that it adds. They are kept in autocast's dtype, which attention casts them to."""

    def __init__(self, layer: DynamicLayer, tokens: int):
        super().__init__()
        kind, self.is_initialized = layer.keys.device.type, True
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.keys.dtype
        self.rooms = [F.pad(states.to(dtype), (0, 0, 0, tokens)) for states in (layer.keys, layer.values)]
        self.show(layer.get_seq_length())

    def show(self, length: int) -> None:
        self.keys, self.values = (room[:, :, :length] for room in self.rooms)  # [lines, heads, length, size]

    def update(self, key_states, value_states, *args, **kwargs):
        begin, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for room, states in zip(self.rooms, (key_states, value_states)):
            room[:, :, begin:end] = states
        self.show(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.rooms = [room.index_select(0, beam_idx) for room in self.rooms]
        self.show(self.keys.shape[-2])


def make_room(cache, tokens: int) -> None:
    """Gives those layers of a cache that just grow, once it has read the prompts, room for more."""
    grows = [type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers]
    cache.layers = [RoomyLayer(layer, tokens) if can else layer for layer, can in zip(cache.layers, grows)]
