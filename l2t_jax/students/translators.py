"""Students that translate: a transformer, and LSTMs with attention. They read ids and put out logits of the next id.

Legend: B batch, S source length, T target length, V vocabulary, d width, h heads.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from l2t_jax.students.layers import dropout, from_linen, relu, require_positive, require_probability
from l2t_jax.types import Array, Key, PyTree, Stepwise, Student

PAD = 0  # the id of padding
EPSILON = 1e-5  # of LayerNorm

_glorot = nn.initializers.xavier_uniform()


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be kept: flax's own, apart."""

    width: int
    heads: int

    def setup(self) -> None:
        """Make the four projections."""
        project = partial(nn.DenseGeneral, (self.heads, self.width // self.heads), kernel_init=_glorot)
        self.query, self.key, self.value = project(), project(), project()
        self.out = nn.DenseGeneral(self.width, axis=(-2, -1), kernel_init=_glorot)

    def kept(self, x: Array) -> tuple[Array, Array]:
        """The keys and values [B, S, h, d / h] of x [B, S, d]."""
        return self.key(x), self.value(x)

    def __call__(self, x: Array, keys: Array, values: Array, mask: Array) -> Array:
        """What x [B, T, d] finds there, [B, T, d]; mask [B or 1, 1, T or 1, S] is true where it may look."""
        return self.out(nn.dot_product_attention(self.query(x), keys, values, mask=mask))


class Layer(nn.Module):
    """Post-norm layer of either side: attention to itself, a decoder's to the source, two dense layers."""

    width: int
    hidden: int
    heads: int
    dropout: float
    decodes: bool

    def setup(self) -> None:
        """Make what it consists of."""
        norm = partial(nn.LayerNorm, EPSILON, use_fast_variance=False)
        self.itself, self.norm = Attention(self.width, self.heads), norm()
        if self.decodes:
            self.across, self.across_norm = Attention(self.width, self.heads), norm()
        self.up = nn.Dense(self.hidden, kernel_init=_glorot)
        self.down = nn.Dense(self.width, kernel_init=_glorot)
        self.last_norm = norm()

    def _map(
        self, x: Array, kept: PyTree, mask: Array, source: PyTree, seen: Any, keys: Key | None = None, place: Any = 0
    ) -> Array:
        x = self.norm(x + dropout(self.itself(x, kept[0], kept[1], mask), self.dropout, keys, place))
        if self.decodes:
            x = self.across_norm(x + dropout(self.across(x, source[0], source[1], seen), self.dropout, keys, place + 1))
        inner = relu(self.up(x))
        return self.last_norm(x + dropout(self.down(inner), self.dropout, keys, place + 2))

    def __call__(
        self, x: Array, place: Any, mask: Array, encoded: Array | None, seen: Array | None, keys: Key | None
    ) -> tuple[Array, None]:
        """Map x [B, T, d], which may look where the masks are true: at itself, and at the encoded source [B, S, d]."""
        source = () if encoded is None else self.across.kept(encoded)
        return self._map(x, self.itself.kept(x), mask, source, seen, keys, place), None

    def source(self, nothing: tuple[()], encoded: Array) -> tuple[tuple[()], tuple[Array, Array]]:
        """Keys and values of the source."""
        return nothing, self.across.kept(encoded)

    def step(
        self, x: Array, kept: PyTree, source: PyTree, mask: Array, seen: Array, t: Array
    ) -> tuple[Array, tuple[Array, ...]]:
        """Map x [B, 1, d] at place t, and keep its keys and values beside those before it."""
        after = tuple(
            lax.dynamic_update_slice_in_dim(old, new, t, 1) for old, new in zip(kept, self.itself.kept(x), strict=True)
        )
        return self._map(x, after, mask, source, seen), after


def _stack(layers: int, layer: Any) -> Any:
    """So many layers, one after the other, in a scan: one is traced and compiled, not each.

    What is kept of them is [B, layers, ...].
    """
    same = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": layers}
    every = nn.broadcast
    takes = {"__call__": (0, every, every, every, every), "source": every, "step": (1, 1, every, every, every)}
    return nn.scan(layer, methods={name: {**same, "in_axes": axes, "out_axes": 1} for name, axes in takes.items()})()


def positions(length: int, width: int) -> np.ndarray:
    """Sinusoids [length, d]: sin and cos of position / 10000^(2 i / d), side by side."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(width // 2) / max(width // 2 - 1, 1))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class Transformer(nn.Module):
    """Encoder and decoder; the decoder's embedding of its input is its output layer too."""

    num_classes: int
    width: int
    hidden: int
    heads: int
    layers: int
    dropout: float

    def setup(self) -> None:
        """Make embeddings and layers."""
        embed = partial(nn.Embed, self.num_classes, self.width, embedding_init=nn.initializers.normal(self.width**-0.5))
        self.source_embedding, self.target_embedding = embed(), embed()
        layer = partial(Layer, self.width, self.hidden, self.heads, self.dropout)
        self.encoder = _stack(self.layers, partial(layer, False))
        self.decoder = _stack(self.layers, partial(layer, True))

    def _places(self, first: int) -> Array:
        """Of each layer's dropouts: a number for the first of three."""
        return first + 3 * jnp.arange(self.layers)

    def _embedded(
        self, table: nn.Embed, ids: Array, first: Array | int, keys: Key | None, place: int, most: int
    ) -> Array:
        x = table(ids) * self.width**0.5
        where = lax.dynamic_slice_in_dim(jnp.asarray(positions(most, self.width), x.dtype), first, ids.shape[1])
        return dropout(x + where, self.dropout, keys, place)

    def encode(self, source: Array, keys: Key | None = None) -> Array:
        """Map ids [B, S] to [B, S, d]."""
        x = self._embedded(self.source_embedding, source, 0, keys, 0, source.shape[1])
        mask = (source != PAD)[:, None, None]
        return self.encoder(x, self._places(2), mask, None, None, keys)[0]

    def __call__(self, inputs: tuple[Array, Array], train: bool, keys: Key | None = None) -> Array:
        """Map ids of the source [B, S] and of the target before each place [B, T] to logits [B, T, V]."""
        source, target = inputs
        encoded, seen = self.encode(source, keys), (source != PAD)[:, None, None]
        length = target.shape[1]
        x = self._embedded(self.target_embedding, target, 0, keys, 1, length)
        before = jnp.tril(jnp.ones((length, length), bool))[None, None]
        x, _ = self.decoder(x, self._places(2 + 3 * self.layers), before, encoded, seen, keys)
        return self.target_embedding.attend(x)

    def begin(self, source: Array, steps: int) -> tuple[PyTree, PyTree]:
        """What all steps read of a source [B, S], and what they write: the keys and values of so many places."""
        encoded, seen = self.encode(source), (source != PAD)[:, None, None]
        _, memory = self.decoder.source((), encoded)
        shape = (source.shape[0], self.layers, steps, self.heads, self.width // self.heads)
        room = jnp.zeros(shape, encoded.dtype)
        return (memory, seen), (room, room)

    def step(self, memory: PyTree, cache: PyTree, ids: Array, t: Array) -> tuple[Array, PyTree]:
        """Logits [B, V] of what follows the ids [B] at place t, and the cache with them."""
        sources, seen = memory
        steps = cache[0].shape[2]
        x = self._embedded(self.target_embedding, ids[:, None], t, None, 1, steps)
        x, after = self.decoder.step(x, cache, sources, (jnp.arange(steps) <= t)[None, None, None], seen, t)
        return self.target_embedding.attend(x)[:, 0], after


class Recurrent(nn.Module):
    """LSTMs that read and write, with attention of what is written to what was read."""

    num_classes: int
    width: int
    layers: int
    dropout: float

    def setup(self) -> None:
        """Make embeddings, cells, attention and the output layer."""
        embed = partial(nn.Embed, self.num_classes, self.width, embedding_init=nn.initializers.normal(0.1))
        self.source_embedding, self.target_embedding = embed(), embed()
        self.encoder = [nn.RNN(nn.OptimizedLSTMCell(self.width)) for _ in range(self.layers)]
        self.decoder = [nn.RNN(nn.OptimizedLSTMCell(self.width)) for _ in range(self.layers)]
        self.attention = Attention(self.width, 1)
        self.combine = nn.Dense(self.width, use_bias=False, kernel_init=_glorot)
        self.output = nn.Dense(self.num_classes, kernel_init=_glorot)

    def encode(self, source: Array, keys: Key | None = None) -> tuple[Array, PyTree]:
        """Map ids [B, S] to [B, S, d] and to the cells' states after the last one that is no padding."""
        x = dropout(self.source_embedding(source), self.dropout, keys, 0)
        lengths, states = jnp.sum(source != PAD, axis=1), []
        nothing = jnp.zeros((source.shape[0], self.width), x.dtype)
        for i, layer in enumerate(self.encoder):
            state, x = layer(x, initial_carry=(nothing, nothing), seq_lengths=lengths, return_carry=True)
            x = dropout(x, self.dropout, keys, 2 + i)
            states.append(state)
        return x, states

    def _decode(
        self, ids: Array, kept: tuple[Array, Array], seen: Array, states: PyTree, keys: Key | None = None
    ) -> tuple[Array, PyTree]:
        """Logits [B, T, V] after ids [B, T], and the states then."""
        x, after = dropout(self.target_embedding(ids), self.dropout, keys, 1), []
        for i, (layer, state) in enumerate(zip(self.decoder, states, strict=True)):
            state, x = layer(x, initial_carry=state, return_carry=True)
            x = dropout(x, self.dropout, keys, 2 + self.layers + i)
            after.append(state)
        found = self.attention(x, *kept, seen)
        x = nn.tanh(self.combine(jnp.concatenate([found, x], axis=-1)))
        return self.output(dropout(x, self.dropout, keys, 2 + 2 * self.layers)), after

    def __call__(self, inputs: tuple[Array, Array], train: bool, keys: Key | None = None) -> Array:
        """Map ids of the source [B, S] and of the target before each place [B, T] to logits [B, T, V]."""
        source, target = inputs
        encoded, states = self.encode(source, keys)
        return self._decode(target, self.attention.kept(encoded), (source != PAD)[:, None, None], states, keys)[0]

    def begin(self, source: Array, steps: int) -> tuple[PyTree, PyTree]:
        """What all steps read of a source [B, S], and the states that they go on from."""
        encoded, states = self.encode(source)
        return (self.attention.kept(encoded), (source != PAD)[:, None, None]), states

    def step(self, memory: PyTree, cache: PyTree, ids: Array, t: Array) -> tuple[Array, PyTree]:
        """Logits [B, V] of what follows the ids [B], and the states then."""
        logits, after = self._decode(ids[:, None], memory[0], memory[1], cache)
        return logits[:, 0], after


def _student(module: Any, drops: float) -> Student:
    require_probability(dropout=drops)
    own = lambda variables: {"params": variables["params"]}  # noqa: E731
    stepwise = Stepwise(
        begin=lambda variables, source, steps: module.apply(own(variables), source, steps, method="begin"),
        step=lambda variables, *args: module.apply(own(variables), *args, method="step"),
    )
    return from_linen(module, draws=drops > 0)._replace(stepwise=stepwise)


def transformer(
    *, num_classes: int, width: int = 512, hidden: int = 1024, heads: int = 4, layers: int = 6, dropout: float = 0.3
) -> Student:
    """Build the transformer of IWSLT14: 31 543 296 parameters and 512 for each row of either embedding.

    The decoder's embedding is its output layer; the encoder's is apart. Post-norm, sinusoidal positions.

    Args:
      num_classes: V.
      width: d.
      hidden: units of the dense layers between.
      heads: of attention; they divide d.
      layers: of the encoder and of the decoder.
      dropout: probability, after each sublayer and embedding, in training.
    Returns:
      a student of ids (source [B, S], target before each place [B, T]) and logits [B, T, V].
    Raises:
      ValueError: a size is below 1, d is odd or not divided by the heads, or dropout is not in [0, 1).
    Source: Vaswani et al. 2017; shape and sharing as of fairseq's transformer_iwslt_de_en, whose dropout is 0.3 there.
    """
    require_positive(num_classes=num_classes, width=width, hidden=hidden, heads=heads, layers=layers)
    if width % heads or width % 2:
        raise ValueError(f"width={width} with heads={heads}: give an even width that the heads divide.")
    return _student(Transformer(num_classes, width, hidden, heads, layers, dropout), dropout)


def transformer_small(
    *, num_classes: int, width: int = 128, hidden: int = 256, heads: int = 4, layers: int = 2, dropout: float = 0.0
) -> Student:
    """Build a transformer that two cores train in minutes; arguments as of `transformer`."""
    return transformer(num_classes=num_classes, width=width, hidden=hidden, heads=heads, layers=layers, dropout=dropout)


def lstm(layers: int, *, num_classes: int, width: int = 256, dropout: float = 0.1) -> Student:
    """Build an LSTM encoder and decoder with attention, o = W tanh(U [attention(s), s]) of the decoder's state s.

    Args:
      layers: of cells on either side.
      num_classes: V.
      width: units of embeddings and cells.
      dropout: probability, of embeddings and of what cells put out, in training.
    Returns:
      a student of ids (source [B, S], target before each place [B, T]) and logits [B, T, V].
    Raises:
      ValueError: a size is below 1, or dropout is not in [0, 1).
    Source: Luong et al. 2015. L2T-DLF's LSTM-1 and LSTM-2 are not described in what is at hand; 256 units are those of
    Wiseman & Rush 2016, without feeding attention back into the cells (ours: so that it is computed at once).
    """
    require_positive(num_classes=num_classes, layers=layers, width=width)
    return _student(Recurrent(num_classes, width, layers, dropout), dropout)


def lstm_small(*, num_classes: int, width: int = 64, dropout: float = 0.0) -> Student:
    """Build `lstm1` at a size that two cores train in minutes; arguments as of `lstm`."""
    return lstm(1, num_classes=num_classes, width=width, dropout=dropout)
