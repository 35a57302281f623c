"""The host executor itself: it runs correct kernels, and exposes the barriers that broken ones lack."""

import ctypes
import re

import host_executor
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.skipif(host_executor.GXX is None, reason=host_executor.NO_GXX)

ORDERS = [0, 1, 2, 3]
CUDA_ERROR_LAUNCH_FAILURE = 719

SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

constexpr int kThreads = 96;

// y reversed within each block, through static shared memory.
template <bool barrier>
__global__ void reverse_kernel(const float* x, float* y) {
  __shared__ float shared[kThreads];
  const int i = threadIdx.x;
  shared[i] = x[blockIdx.x * kThreads + i];
  if (barrier) __syncthreads();
  y[blockIdx.x * kThreads + i] = shared[kThreads - 1 - i];
}

// The running buffer is overwritten for each k: a barrier must follow the reads too.
template <bool barrier>
__global__ void rotate_kernel(const float* x, float* y, int steps) {
  __shared__ float shared[kThreads];
  const int i = threadIdx.x;
  float value = x[i];
  for (int k = 0; k < steps; ++k) {
    if (barrier) __syncthreads();
    shared[i] = value;
    __syncthreads();
    value = shared[(i + 1) % kThreads];
  }
  y[i] = value;
}

// Each block adds its neighbour's number to its own; its own comes from dynamic shared memory across the barrier.
template <bool barrier>
__global__ void neighbour_kernel(float* numbers, float* y) {
  extern __shared__ unsigned char dynamic_shared[];
  float* own = reinterpret_cast<float*>(dynamic_shared);
  if (threadIdx.x == 0) {
    own[0] = 1.0f + blockIdx.x;
    numbers[blockIdx.x] = own[0];
  }
  if (barrier) cooperative_groups::this_grid().sync();
  if (threadIdx.x == 0) y[blockIdx.x] = own[0] + 100 * numbers[(blockIdx.x + 1) % gridDim.x];
}

__global__ void warp_kernel(const double* x, double* sums, float* downs, int* any) {
  const int i = threadIdx.x;
  double sum = x[i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  sums[i] = sum;
  downs[i] = __shfl_down_sync(0xffffffffu, static_cast<float>(x[i]), 3, 8);
  __syncwarp();
  any[i] = __syncthreads_or(i == 40) + 2 * __syncthreads_or(0);
}

// The barriers of these do not match.
__global__ void divergent_block_kernel(int* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void two_barriers_kernel(int* y) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1;
}
__global__ void divergent_warp_kernel(int* y) {
  if (threadIdx.x < 40) y[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
__global__ void divergent_grid_kernel(int* y) {
  if (blockIdx.x > 0) cooperative_groups::this_grid().sync();
  y[threadIdx.x] = 1;
}

__global__ void convert_kernel(const float* x, __half* half, float* from_half, __nv_bfloat16* bfloat,
                               float* from_bfloat, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    half[i] = static_cast<__half>(x[i]);
    from_half[i] = static_cast<float>(half[i]);
    bfloat[i] = static_cast<__nv_bfloat16>(x[i]);
    from_bfloat[i] = static_cast<float>(bfloat[i]);
  }
}

template <typename Kernel, typename... P>
int launch(Kernel kernel, int blocks, int threads, P... parameters) {
  void* arguments[] = {&parameters...};
  return cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, 64);
}

extern "C" {
int reverse(bool barrier, int blocks, const float* x, float* y) {
  return launch(barrier ? reverse_kernel<true> : reverse_kernel<false>, blocks, kThreads, x, y);
}
int rotate(bool barrier, int steps, const float* x, float* y) {
  return launch(barrier ? rotate_kernel<true> : rotate_kernel<false>, 1, kThreads, x, y, steps);
}
int neighbour(bool barrier, int blocks, float* numbers, float* y) {
  return launch(barrier ? neighbour_kernel<true> : neighbour_kernel<false>, blocks, 32, numbers, y);
}
int warp(const double* x, double* sums, float* downs, int* any) {
  return launch(warp_kernel, 1, 64, x, sums, downs, any);
}
int mismatched(int which, int* y) {
  void (*kernels[])(int*) = {divergent_block_kernel, two_barriers_kernel, divergent_warp_kernel, divergent_grid_kernel};
  return launch(kernels[which], 2, 64, y);
}
int convert(int count, const float* x, __half* half, float* from_half, __nv_bfloat16* bfloat, float* from_bfloat) {
  return launch(convert_kernel, 1, 64, x, half, from_half, bfloat, from_bfloat, count);
}
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return host_executor.build(SOURCE, tmp_path_factory.mktemp("executor"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def wrong_orders(run) -> list[int]:
    """The orders in which ``run(order)``, a pair of arrays, gives something else than it should."""
    return [order for order in ORDERS if not np.array_equal(*run(order))]


def test_block_barrier(library: ctypes.CDLL) -> None:
    x = np.arange(4 * 96, dtype=np.float32)

    def run(order: int, barrier: bool) -> tuple[np.ndarray, np.ndarray]:
        host_executor.configure(library, multiprocessors=4, seed=order)
        y = np.full_like(x, np.nan)
        assert library.reverse(barrier, 4, pointer(x), pointer(y)) == 0
        return y, x.reshape(4, 96)[:, ::-1].ravel()

    assert wrong_orders(lambda order: run(order, True)) == []
    assert wrong_orders(lambda order: run(order, False)) == ORDERS
    # What was never written is NaN, not a number that happens to be right.
    assert np.isnan(run(0, False)[0]).any()


def test_barrier_after_the_reads(library: ctypes.CDLL) -> None:
    x = np.arange(96, dtype=np.float32)

    def run(order: int, barrier: bool) -> tuple[np.ndarray, np.ndarray]:
        host_executor.configure(library, multiprocessors=1, seed=order)
        y = np.full_like(x, np.nan)
        assert library.rotate(barrier, 5, pointer(x), pointer(y)) == 0
        return y, np.roll(x, -5)

    assert wrong_orders(lambda order: run(order, True)) == []
    assert len(wrong_orders(lambda order: run(order, False))) >= len(ORDERS) - 1


def test_grid_barrier_and_dynamic_shared_memory(library: ctypes.CDLL) -> None:
    def run(order: int, barrier: bool) -> tuple[np.ndarray, np.ndarray]:
        host_executor.configure(library, multiprocessors=5, seed=order)
        numbers, y = np.full(5, np.nan, np.float32), np.full(5, np.nan, np.float32)
        assert library.neighbour(barrier, 5, pointer(numbers), pointer(y)) == 0
        own = np.arange(1, 6, dtype=np.float32)
        return y, own + 100 * np.roll(own, -1)

    assert wrong_orders(lambda order: run(order, True)) == []
    assert wrong_orders(lambda order: run(order, False)) == ORDERS


@pytest.mark.parametrize("order", ORDERS)
def test_warp(library: ctypes.CDLL, order: int) -> None:
    host_executor.configure(library, multiprocessors=1, seed=order)
    x = np.arange(64, dtype=np.float64) ** 2
    sums, downs, any_ = np.zeros(64), np.zeros(64, np.float32), np.zeros(64, np.int32)
    assert library.warp(pointer(x), pointer(sums), pointer(downs), pointer(any_)) == 0
    assert np.array_equal(sums, x.reshape(2, 32).sum(1).repeat(32))
    lane = np.arange(64)
    assert np.array_equal(downs, x[np.where(lane % 8 < 5, lane + 3, lane)])
    assert np.array_equal(any_, np.ones(64, np.int32))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (0, r"thread 0 waits at a block barrier \(line \d+\) thread 40 has ended"),
        (1, r"thread 0 waits at a block barrier \(line \d+\) thread 40 waits at a block barrier \(line \d+\)"),
        (2, r"thread 32 waits in a warp \(line \d+\) thread 40 has ended"),
        (3, r"some blocks have ended, others wait at a grid barrier"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_mismatched_barriers_are_errors(library: ctypes.CDLL, which: int, message: str, order: int) -> None:
    host_executor.configure(library, multiprocessors=2, seed=order)
    y = np.zeros(64, np.int32)
    assert library.mismatched(which, pointer(y)) == CUDA_ERROR_LAUNCH_FAILURE
    assert re.search(message, library.host_executor_message().decode())


def test_too_large_cooperative_grid(library: ctypes.CDLL) -> None:
    host_executor.configure(library, multiprocessors=2, seed=0)
    x = np.zeros(3 * 96, np.float32)
    assert library.reverse(True, 3, pointer(x), pointer(x)) == 720  # cudaErrorCooperativeLaunchTooLarge


def test_half_types_convert_as_torch_does(library: ctypes.CDLL) -> None:
    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    edges = [halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()]
    # Neighbours and midpoints of numbers of the half types, and numbers of every magnitude.
    edges += [(edges[0][:-1].double() + edges[0][1:].double()).div(2).float()]
    edges += [torch.randint(-(2**31), 2**31 - 1, (1 << 16,), dtype=torch.int32).view(torch.float32)]
    x = torch.cat(edges)
    half, bfloat = torch.empty_like(x, dtype=torch.float16), torch.empty_like(x, dtype=torch.bfloat16)
    from_half, from_bfloat = torch.empty_like(x), torch.empty_like(x)
    host_executor.configure(library, multiprocessors=1, seed=0)
    arrays = [ctypes.c_void_p(t.data_ptr()) for t in (x, half, from_half, bfloat, from_bfloat)]
    assert library.convert(len(x), *arrays) == 0
    torch.testing.assert_close(half, x.to(torch.float16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(from_half, half.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(from_bfloat, bfloat.float(), rtol=0, atol=0, equal_nan=True)
