// Small batch: a step as dot products, in one launch. Weights are read in torch's layout, once for up to
// eight rows.
//
// Each unit has one warp, or several that split K where units are few. Lanes run along K, over the input
// and then the state; the four gates of up to eight rows accumulate in registers; the reduction over lanes
// and warps has an order that depends on neither batch nor row.
#pragma once
#include "kernels.h"
#include "step.h"

namespace lstmfused {
namespace cuda {

constexpr int kSmallBatchThreads = 128;  // of a block, at least

// N elements at a time, 1 or a vector.
template <int N, class T>
struct Fragment {
  Accumulate<T> at[N];
};
template <int N, bool kOnce, class T>
LSTMFUSED_DEVICE Fragment<N, T> load_fragment(const T* from) {
  Fragment<N, T> fragment;
  Vector<T, N> vector;
  if constexpr (kOnce && N > 1) {
    const uint4 bits = load_once(from);
    memcpy(&vector, &bits, sizeof vector);
  } else {
    vector = load_vector<N>(from);
  }
#pragma unroll
  for (int i = 0; i < N; i++) fragment.at[i] = widen(vector.at[i]);
  return fragment;
}

// Adds up each of `Count` (a power of two) sums over the lanes of a warp. Lane l gets sum l * Count / 32:
// at each step, one half of the lanes keeps one half of the sums.
template <int Count, int Mask = kWarp / 2, class A>
LSTMFUSED_DEVICE A sum_lanes(A* sums) {
  constexpr int half = Count / 2;
  if constexpr (half > 0) {
    const bool upper = threadIdx.x & Mask;
#pragma unroll
    for (int i = 0; i < half; i++) {
      const A keep = upper ? sums[half + i] : sums[i], give = upper ? sums[i] : sums[half + i];
      sums[i] = keep + shuffle_xor(give, Mask);
    }
  } else {
    sums[0] += shuffle_xor(sums[0], Mask);
  }
  if constexpr (Mask > 1) return sum_lanes<(half > 0 ? half : 1), Mask / 2>(sums);
  return sums[0];
}

// Block (32, warps of a unit, units), grid (blocks of R rows, blocks of units).
template <class T, int R, int N>
__global__ void small_batch(const Forward<T> p) {
  using A = Accumulate<T>;
  const int lane = threadIdx.x, warp = threadIdx.y, warps = blockDim.y;
  const int64_t unit = int64_t(blockIdx.y) * blockDim.z + threadIdx.z;
  const int64_t row = int64_t(blockIdx.x) * R;
  const int last = p.B - row < R ? int(p.B - row) - 1 : R - 1;

  // Lane r of the first warp finishes row r: what it needs comes while the sums are made.
  const bool finishes = warp == 0 && lane <= last && unit < p.H;
  A bias[4][1] = {}, cx[1] = {};
  if (finishes) {
    load_bias(bias, p, unit, true);
    load_cx(cx, p, row + lane, unit, true);
  }

  // sums[r * 4 + gate] of this thread's fragments of [input | hx]: one loop over both, so that the loads of
  // both are in flight together. Rows beyond the last repeat it; their sums are not used.
  const int64_t clamped_unit = unit < p.H ? unit : p.H - 1;  // all threads must come to the barrier
  const int inputs = int((p.I + N - 1) / N), fragments = inputs + int((p.H + N - 1) / N);
  A sums[R * 4] = {};
#pragma unroll(R > 2 ? 2 : 4)
  for (int i = warp * kWarp + lane; i < fragments; i += warps * kWarp) {
    const bool of_input = i < inputs;
    const int64_t K = of_input ? p.I : p.H, k = int64_t(of_input ? i : i - inputs) * N;
    const T* const weight = (of_input ? p.weight_ih : p.weight_hh) + clamped_unit * K + k;
    const int64_t stride = of_input ? p.input_stride : p.hx_stride;
    const T* const left = (of_input ? p.input : p.hx) + row * stride + k;
    Fragment<N, T> w[4];
#pragma unroll
    for (int gate = 0; gate < 4; gate++) w[gate] = load_fragment<N, true>(weight + gate * p.H * K);
#pragma unroll
    for (int r = 0; r < R; r++) {
      const Fragment<N, T> x = load_fragment<N, false>(left + (r < last ? r : last) * stride);
#pragma unroll
      for (int gate = 0; gate < 4; gate++)
#pragma unroll
        for (int j = 0; j < N; j++) sums[r * 4 + gate] += x.at[j] * w[gate].at[j];
    }
  }

  constexpr int kLanesOfSum = kWarp / (R * 4);
  A* const shared = reinterpret_cast<A*>(shared_memory()) + threadIdx.z * warps * R * 4;  // (warps, R, 4)
  const A sum = sum_lanes<R * 4>(sums);
  if (lane % kLanesOfSum == 0) shared[warp * R * 4 + lane / kLanesOfSum] = sum;
  __syncthreads();

  if (!finishes) return;
  A total[4][1] = {};
  for (int w = 0; w < warps; w++)
#pragma unroll
    for (int gate = 0; gate < 4; gate++) total[gate][0] += shared[(w * R + lane) * 4 + gate];
  finish_states(p, row + lane, unit, total, bias, cx, true);
}

// Rows of a block. More rows read the weights fewer times, but leave multiprocessors idle where units are
// few: as few as keep the weight bytes that all blocks read from L2 below a limit. Half types have vectors
// of eight elements: more than four rows would take too many registers.
template <class T>
constexpr int kMostRows = sizeof(T) == 2 ? 4 : 8;
template <class T>
static int rows_of_block(const Forward<T>& p) {
  constexpr int64_t kReadBytes = 2 << 20;
  const int64_t weights = 4 * p.H * (p.I + p.H) * int64_t(sizeof(T));
  int rows = 1;
  while (rows < kMostRows<T> && rows < p.B && ceil_div(p.B, rows) * weights > kReadBytes) rows *= 2;
  return rows;
}

template <class T>
const char* forward_small_batch(const Forward<T>& p, const Device& device) {
  const bool vectors = in_vectors(p.input, p.input_stride, p.I) && in_vectors(p.hx, p.hx_stride, p.H) &&
                       in_vectors(p.weight_ih, p.I, p.I) && in_vectors(p.weight_hh, p.H, p.H);
  const auto run = [&](auto rows, auto width) {
    constexpr int R = decltype(rows)::value, N = decltype(width)::value;
    // As many warps a unit as have work and fit the multiprocessors, whatever the batch.
    unsigned warps = 1;
    while (warps < 8 && 2 * warps * kWarp * N <= p.I + p.H &&
           2 * warps * p.H <= 16 * device.multiprocessors)
      warps *= 2;
    const unsigned units = warps * kWarp < kSmallBatchThreads ? kSmallBatchThreads / kWarp / warps : 1;
    const dim3 grid(unsigned(ceil_div(p.B, R)), unsigned(ceil_div(p.H, units)));
    const size_t shared = sizeof(Accumulate<T>) * units * warps * R * 4;
    return launch(small_batch<T, R, N>, grid, dim3(kWarp, warps, units), shared, device.stream, p);
  };
  const auto with_width = [&](auto rows) {
    return vectors ? run(rows, Number<kVector<T>>{}) : run(rows, Number<1>{});
  };
  switch (rows_of_block(p)) {
    case 1: return with_width(Number<1>{});
    case 2: return with_width(Number<2>{});
    case 4: return with_width(Number<4>{});
    default: return with_width(Number<kMostRows<T>>{});
  }
}

}  // namespace cuda
}  // namespace lstmfused
