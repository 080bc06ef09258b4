// Kernels that the tests run in the simulator: what nvcc makes of loops, barriers, shuffles, local and constant memory.
#include <cstdint>

#include <cuda_bf16.h>

struct Row {
  float lr, beta1, beta2, eps, decay;
};

__device__ __forceinline__ float load(float x) { return x; }
__device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void store(float& to, float x) { to = x; }
__device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16(x); }

template <class T>
__device__ __forceinline__ void update(T& p, T g, float& m, float& v, const Row& row) {
  const float grad = load(g);
  m = __fadd_rn(m, __fmul_rn(1.f - row.beta1, __fsub_rn(grad, m)));
  v = __fadd_rn(__fmul_rn(row.beta2, v), __fmul_rn(__fmul_rn(1.f - row.beta2, grad), grad));
  const float quotient = __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), row.eps));
  store(p, __fsub_rn(__fmul_rn(load(p), row.decay), __fmul_rn(row.lr, quotient)));
}

// One chunk of one tensor out of a table of addresses: four elements at a time where all buffers are aligned.
template <class T>
__device__ void update_chunk(const int64_t* tensors, const int64_t* chunks, const Row& row, int chunk) {
  const int64_t tensor = chunks[2 * blockIdx.x], offset = chunks[2 * blockIdx.x + 1];
  const int64_t* line = tensors + 5 * tensor;
  const int64_t count = min(static_cast<int64_t>(chunk), line[4] - offset);
  T* p = reinterpret_cast<T*>(line[0]) + offset;
  const T* g = reinterpret_cast<const T*>(line[1]) + offset;
  float* m = reinterpret_cast<float*>(line[2]) + offset;
  float* v = reinterpret_cast<float*>(line[3]) + offset;
  int64_t whole = 0;
  if (((line[0] | line[1] | line[2] | line[3]) & 15) == 0) {
    struct alignas(4 * sizeof(T)) Pack {
      T at[4];
    };
    for (int i = threadIdx.x; i < count / 4; i += blockDim.x) {
      Pack params = reinterpret_cast<Pack*>(p)[i];
      const Pack grads = reinterpret_cast<const Pack*>(g)[i];
      float4 ms = reinterpret_cast<float4*>(m)[i], vs = reinterpret_cast<float4*>(v)[i];
      update(params.at[0], grads.at[0], ms.x, vs.x, row);
      update(params.at[1], grads.at[1], ms.y, vs.y, row);
      update(params.at[2], grads.at[2], ms.z, vs.z, row);
      update(params.at[3], grads.at[3], ms.w, vs.w, row);
      reinterpret_cast<Pack*>(p)[i] = params;
      reinterpret_cast<float4*>(m)[i] = ms;
      reinterpret_cast<float4*>(v)[i] = vs;
    }
    whole = count / 4 * 4;
  }
  for (int64_t i = whole + threadIdx.x; i < count; i += blockDim.x) update(p[i], g[i], m[i], v[i], row);
}

extern "C" __global__ void __launch_bounds__(256)
    adam_f32(const int64_t* tensors, const int64_t* chunks, Row row, int chunk) {
  update_chunk<float>(tensors, chunks, row, chunk);
}

extern "C" __global__ void __launch_bounds__(256)
    adam_bf16(const int64_t* tensors, const int64_t* chunks, Row row, int chunk) {
  update_chunk<__nv_bfloat16>(tensors, chunks, row, chunk);
}

// A tree reduction in static shared memory.
extern "C" __global__ void block_sum(const float* x, float* out, int n) {
  __shared__ float sums[256];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half >>= 1) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0];
}

// Warp shuffles, dynamic shared memory, atomics, votes, a barrier with a reduction.
extern "C" __global__ void warp_sum(const float* x, float* out, unsigned* n_positive, int n) {
  extern __shared__ float sums[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const bool is_first = (threadIdx.x & 31) == 0;
  float sum = i < n ? x[i] : 0.f;
  const unsigned votes = __ballot_sync(0xffffffffu, sum > 0);
  if (is_first) atomicAdd(n_positive, __popc(votes));
  for (int step = 16; step; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (is_first) sums[threadIdx.x >> 5] = sum;
  const int any_nan = __syncthreads_or(sum != sum);
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0.f;
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x == 0) atomicAdd(out, any_nan ? 1e30f : sum);
  }
}

// A loop whose trip count differs between threads, with divergent branches and an early return.
extern "C" __global__ void collatz(const int* x, int* steps, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  long long value = x[i];
  int count = 0;
  while (value != 1) {
    if (count > 1000) {
      steps[i] = -1;
      return;
    }
    if (value & 1) {
      value = 3 * value + 1;
    } else {
      value >>= 1;
    }
    ++count;
  }
  steps[i] = count;
}

// Local memory (a private array whose index is not known) and module variables.
__constant__ int kWeights[8] = {3, 1, 4, 1, 5, 2, 6, 7};
__device__ int bias = 100;
extern "C" __global__ void private_arrays(int* out, int n) {
  int cells[16];
  for (int i = 0; i < 16; ++i) cells[i] = i * threadIdx.x;
  int sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    cells[(i * 5 + threadIdx.x) & 15] += kWeights[(i + threadIdx.x) & 7];
    sum += cells[(i * 3) & 15];
  }
  out[threadIdx.x] = sum + bias;
}

// Integers of 64 and 128 bits.
using uint64 = unsigned long long;
extern "C" __global__ void integers(const uint64* a, const uint64* b, uint64* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const uint64 x = a[i], y = b[i];
  const unsigned low_x = static_cast<unsigned>(x), low_y = static_cast<unsigned>(y);
  const unsigned __int128 product = static_cast<unsigned __int128>(x) * y + x;
  uint64* row = out + 8 * i;
  row[0] = static_cast<uint64>(product >> 64);
  row[1] = static_cast<uint64>(product);
  row[2] = y ? x / y : 0;
  row[3] = y ? x % y : 0;
  row[4] = __mul64hi(static_cast<long long>(x), static_cast<long long>(y));
  row[5] = __clzll(x) | (__popcll(y) << 8) | (__ffsll(x) << 16);
  row[6] = __funnelshift_l(low_x, low_y, 13) | (static_cast<uint64>(__byte_perm(low_x, low_y, 0x2563)) << 32);
  row[7] = __brevll(x);
}
