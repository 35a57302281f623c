"""What the tables of the forward hold, column by column."""

import triton.language as tl

# Columns of the forward geometry: sizes, then the offsets of the sections of `scratch`.
FWD_H = tl.constexpr(0)
FWD_W = tl.constexpr(1)
FWD_PADDED_W = tl.constexpr(2)  # w up to the next multiple of 16
FWD_BLOCKS = tl.constexpr(3)  # blocks of rows
FWD_COLUMN_TILES = tl.constexpr(4)
FWD_T = tl.constexpr(5)  # [h]
FWD_S = tl.constexpr(6)  # [padded_w]
FWD_BLOCK_MAX = tl.constexpr(7)  # [blocks]
FWD_BLOCK_SUM = tl.constexpr(8)  # [blocks]
FWD_TILE_MAX = tl.constexpr(9)  # [column tiles]
FWD_TILE_SUM = tl.constexpr(10)  # [column tiles]
FWD_BLOCK_UNIT = tl.constexpr(11)  # [blocks]
FWD_PARTIAL_UNIT = tl.constexpr(12)  # [blocks]
FWD_TILE_UNIT = tl.constexpr(13)  # [column tiles]
FWD_PARTIAL = tl.constexpr(14)  # [blocks, padded_w]
FWD_UV = tl.constexpr(15)  # the offset of u, and of v behind it, in `uv`
FWD_INNER = tl.constexpr(16)
FWD_CHANNELS = tl.constexpr(17)
FWD_FIELDS = tl.constexpr(18)

# Columns of the forward addresses.
FWD_WEIGHT = tl.constexpr(0)
FWD_U_IN = tl.constexpr(1)
FWD_V_IN = tl.constexpr(2)
FWD_Y = tl.constexpr(3)
FWD_ADDRESSES = tl.constexpr(4)
